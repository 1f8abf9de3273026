"""Whether the C library keeps freed memory for the next tensor or gives it back.

Training makes the same tensors in every step, so what is kept is used again, but for the largest:
among the others they leave holes that these fill, and the process grows from step to step. Pruning
makes few and large ones of many sizes, and what is kept of one size is of no use to the next: of an
8B teacher's walk the process had grown to half more than it needed.
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGE = 32 * 1024**2
"""The largest size from which glibc can be told to ask the kernel for pages of a tensor's own."""


def reuse_freed_memory() -> bool:
    """Make the C library keep freed memory for the next tensor; True where that is possible.

    Only tensors above 32 MB get pages of their own and give them back; in the default the library
    gives back the others' memory too. A small student's step makes four of them, for the
    embeddings; where a layer's matrices are as large, from some 2,000 dims on, their gradients cost
    a page fault for every 4 KB, which was not measured. Elsewhere than with glibc nothing is
    changed. It holds for the whole process.
    """
    return _set({_M_MMAP_THRESHOLD: _LARGE, _M_TRIM_THRESHOLD: 2**31 - 1})


def give_back_freed_memory() -> bool:
    """Make the C library give freed memory back to the system, whatever was said before."""
    return _set({_M_MMAP_THRESHOLD: _LARGE, _M_TRIM_THRESHOLD: _LARGE})


def _set(options: dict[int, int]) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return all(bool(mallopt(option, value)) for option, value in options.items())
