"""How the tests start a shearling of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

Shearling = Callable[..., "subprocess.CompletedProcess[str]"]
"""The fixture ``shearling``: arguments of the command -> its exit code and output."""


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "pipelines", *map(str, arguments)]


def environment(**extra: str) -> dict[str, str]:
    """The environment of a shearling of its own: offline, one thread."""
    quiet = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return {**os.environ, **quiet, **extra}
