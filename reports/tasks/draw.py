"""Choices by hash, not by RNG: the same on every machine and in every version of Python."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def draw(*key: object) -> int:
    """A 64-bit number that depends on the key alone."""
    text = "\x1f".join(str(part) for part in key)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def shuffled(items: Iterable[Item], *key: object) -> list[Item]:
    """The items in an order that depends on the key and on the items' texts."""
    return sorted(items, key=lambda item: draw(*key, item))


def choose(items: Sequence[Item], *key: object) -> Item:
    """One of the items."""
    return items[draw(*key) % len(items)]


def insert_at_random(right: Item, wrong: Sequence[Item], *key: object) -> tuple[list[Item], int]:
    """Put the right answer among the wrong ones: (all answers, index of the right one)."""
    label = draw(*key) % (len(wrong) + 1)
    return [*wrong[:label], right, *wrong[label:]], label
