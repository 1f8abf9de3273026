"""Token sequences merged where they begin alike, and who attends to whom among them.

The nodes of a tree stand in the order of a depth-first walk as long as the sequences are added in
sorted order. Then, wherever a row of nodes is cut into blocks, all that a block's nodes may see is
the block itself and the ancestors of its first node: attention needs no [N, N] matrix.

Shapes: N nodes, G blocks, B nodes of a block, K keys of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

BLOCK = 64
"""Nodes whose attention is computed together: each sees its block and the way down to it."""
REPEATED = 4
"""A row may grow to this many times a shared beginning, so that few rows repeat a long one."""

Request = tuple[Any, list[int], list[int]]
"""What lm-eval hands over: the strings (or None), the context's tokens, the continuation's."""


@dataclass
class PrefixTree:
    """Token sequences merged where they begin alike; parents stand before their children."""

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    _children: dict[tuple[int, int], int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, sequence: Sequence[int]) -> list[int]:
        """Add a sequence and return the node of each of its tokens."""
        path: list[int] = []
        node = -1
        for depth, token in enumerate(sequence):
            child = self._children.get((node, token))
            if child is None:
                child = len(self.tokens)
                self._children[node, token] = child
                self.tokens.append(token)
                self.parents.append(node)
                self.depths.append(depth)
            node = child
            path.append(node)
        return path

    def shared(self, sequence: Sequence[int]) -> int:
        """How many of the sequence's first tokens are in the tree already."""
        node = -1
        for length, token in enumerate(sequence):
            child = self._children.get((node, token))
            if child is None:
                return length
            node = child
        return len(sequence)

    @property
    def is_chain(self) -> bool:
        """Whether the tree is one plain sequence."""
        return all(parent == node - 1 for node, parent in enumerate(self.parents))

    def ancestors(self, node: int) -> list[int]:
        """The nodes on the way to a node, from the root down, without itself."""
        found = []
        while (node := self.parents[node]) >= 0:
            found.append(node)
        return found[::-1]


@dataclass(frozen=True)
class Blocks:
    """A tree's nodes cut into blocks of ``BLOCK``, with the keys that each needs."""

    keys_GK: npt.NDArray[np.int64]
    """Nodes that are keys of the block; where there are fewer, node 0 fills up."""
    seen_GBK: npt.NDArray[np.bool_]
    """Whether the block's b-th node sees its k-th key."""


def cut_into_blocks(tree: PrefixTree, size: int = BLOCK) -> Blocks:
    """Cut a tree whose sequences were added in sorted order into blocks of ``size`` nodes.

    In a depth-first order every subtree is one stretch. An ancestor outside of the block of a node
    in it has a subtree that reaches from before the block's start to that node, so it is an
    ancestor of the block's first node too.
    """
    starts = range(0, len(tree), size)
    ways = [tree.ancestors(start) for start in starts]
    width = max(len(way) for way in ways) + size
    keys_GK = np.zeros((len(ways), width), dtype=np.int64)
    seen_GBK = np.zeros((len(ways), size, width), dtype=np.bool_)
    for group, (start, way) in enumerate(zip(starts, ways, strict=True)):
        nodes = range(start, min(start + size, len(tree)))
        keys_GK[group, : len(way)] = way
        keys_GK[group, len(way) : len(way) + len(nodes)] = nodes
        seen_BK = seen_GBK[group]
        for row, node in enumerate(nodes):
            parent = tree.parents[node]
            if parent >= start:
                seen_BK[row] = seen_BK[parent - start]
            else:
                seen_BK[row, : parent_place(way, parent)] = True
            seen_BK[row, len(way) + row] = True
        seen_BK[len(nodes) :, 0] = True  # what fills the last block up must see something
    return Blocks(keys_GK, seen_GBK)


def parent_place(way: Sequence[int], parent: int) -> int:
    """How many of the nodes on the way to a block a child of ``parent`` sees."""
    return way.index(parent) + 1 if parent >= 0 else 0


@dataclass
class Row:
    """One forward pass: a tree, and for each request in it the nodes that predict its tokens."""

    tree: PrefixTree = field(default_factory=PrefixTree)
    wanted: list[tuple[int, list[int], list[int]]] = field(default_factory=list)
    """(number of the request, predicting nodes, predicted tokens)"""


def pack(requests: Sequence[Request], max_length: int, budget: int) -> list[Row]:
    """Distribute requests over rows of about ``budget`` nodes.

    Sorted by their tokens, requests with a common beginning are neighbours and meet in one row. A
    request longer than the budget gets a row of its own, and those that share a long beginning with
    it may follow until the row is ``REPEATED`` times that long. As in HFLM, what exceeds
    ``max_length`` is cut from the left, and the last token is no input.
    """
    inputs = [(ctx + cont)[-(max_length + 1) :][:-1] for _, ctx, cont in requests]
    rows: list[Row] = []
    for number in sorted(range(len(inputs)), key=inputs.__getitem__):
        sequence, continuation = inputs[number], requests[number][2]
        row = rows[-1] if rows else None
        shared = row.tree.shared(sequence) if row else 0
        room = max(budget, REPEATED * shared)
        if row is None or len(row.tree) + len(sequence) - shared > room:
            row = Row()
            rows.append(row)
        path = row.tree.add(sequence)
        row.wanted.append((number, path[-len(continuation) :], continuation))
    return rows
