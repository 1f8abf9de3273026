"""Memory that is used again instead of being given back and asked for anew."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def reuse_freed_memory() -> bool:
    """Make the C library keep freed memory for the next tensor; True where that is possible.

    glibc gives every tensor above 32 MB fresh pages from the kernel and takes them away when it is
    freed. Zeroing and mapping those pages again in each step cost a fifth of its time on a CPU.
    Elsewhere than with glibc nothing is changed. It holds for the whole process.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
