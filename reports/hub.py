"""Is the Hugging Face hub there? Asked before waiting for it, and before asking it again."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from urllib.parse import urlsplit

NO_ANSWER = "which doesn't answer here"
"""Ends the reason of a task that was skipped because the hub was not there."""


def hub_answers(timeout: float = 3.0) -> bool:
    """Whether the hub's host accepts connections; offline mode asks nobody and tries the cache."""
    if hub_is_off():
        return True
    host = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        port = host.port or (80 if host.scheme == "http" else 443)
        socket.create_connection((host.hostname or "", port), timeout).close()
    except (OSError, ValueError):
        return False
    return True


def hub_is_off() -> bool:
    """Whether the user has told the hub's library to stay offline."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON")


def worth_another_try(reasons: Iterable[object]) -> bool:
    """Whether tasks that were skipped for these reasons could be measured now."""
    missed = any(str(reason).endswith(NO_ANSWER) for reason in reasons)
    return missed and not hub_is_off() and hub_answers()
