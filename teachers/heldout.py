"""Which articles are kept for benchmarks: nobody is to be trained on what he is tested with."""

from __future__ import annotations

import hashlib

_RESERVED_BELOW = 64  # of 256 values of the first byte: one article in four


def is_reserved(title: str) -> bool:
    """Whether the article of this title belongs to the benchmarks and not to training.

    A function of the title alone, so the transfer set and the benchmark tasks agree without
    knowing of each other, whatever the order or the number of the articles.
    """
    return hashlib.sha256(title.encode("utf-8")).digest()[0] < _RESERVED_BELOW
