"""Named tensors in a safetensors file, as every model folder of ours has them."""

from __future__ import annotations

import re
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def save_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """safetensors' save, with the operating system's error where it hides one (a full disk), and
    a file that all may read: the library's is its owner's alone."""
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:
        if number := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(number.group(1)), str(error), str(file)) from error
        raise
    file.chmod(0o644)
