"""Microbatches to workers, positions to ranks, and the canonical tree over microbatch index.

The tree is the order in which everything is summed: a range of microbatches is split at the largest
power of two below its length, so that a sum does not depend on how many islands computed it. A
worker with the contiguous range [a, b) sends the sums of the canonical subtrees of its range, at
most 2 x log2(M) of them, one when the range is aligned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from cordee.errors import LayoutError

T = TypeVar("T")
Node = tuple[int, int]
"""A subtree: the range [start, stop) of microbatches under it."""


def split_evenly(count: int, parts: int) -> list[range]:
    """`count` items as `parts` contiguous ranges whose lengths differ by at most one."""
    return [range(count * index // parts, count * (index + 1) // parts) for index in range(parts)]


def shard_rows(count: int, shards: int, index: int) -> range:
    """Rows of dim 0 that shard `index` holds, as FSDP2 cuts: equal chunks, the last ones short."""
    chunk = -(-count // shards)
    start = min(index * chunk, count)
    return range(start, min(start + chunk, count))


def context_chunks(length: int, parts: int, index: int) -> tuple[range, range]:
    """Positions of a sequence that part `index` holds, in this order: chunks index and
    2 x parts - 1 - index of 2 x parts equal ones.

    An early chunk attends to little and its late partner to much, so every part has the same work
    (zigzag; Dubey et al. 2024, section 3.3.2). One part holds the whole sequence, whatever its
    length. Raises LayoutError when the chunks are not equal.
    """
    if parts > 1 and length % (2 * parts):
        nearest = max(1, round(length / (2 * parts))) * 2 * parts
        raise LayoutError(
            "layout.context cuts a sequence in 2 x context equal chunks",
            values={"data.sequence": length, "layout.context": parts},
            fix=f"data.sequence={nearest}",
        )
    chunks = split_evenly(length, 2 * parts)
    return chunks[index], chunks[2 * parts - 1 - index]


def children(node: Node) -> tuple[Node, Node]:
    """The two subtrees of a range of length >= 2, split at the largest power of two below it."""
    start, stop = node
    middle = start + (1 << ((stop - start - 1).bit_length() - 1))
    return (start, middle), (middle, stop)


def canonical_subtrees(microbatches: range, total: int) -> list[Node]:
    """The fewest subtrees of the tree over [0, total) that make up `microbatches`, in order."""
    nodes: list[Node] = []

    def visit(node: Node) -> None:
        start, stop = node
        if stop <= microbatches.start or microbatches.stop <= start:
            return
        if microbatches.start <= start and stop <= microbatches.stop:
            nodes.append(node)
            return
        for child in children(node):
            visit(child)

    if total > 0:
        visit((0, total))
    return nodes


def fold(node: Node, leaves: Mapping[Node, T], add: Callable[[T, T], T]) -> T:
    """The sum of `node` from the subtrees in `leaves`, added in canonical order.

    `leaves` must be canonical subtrees that cover `node` exactly; KeyError for a microbatch that is
    in none.
    """
    if node in leaves:
        return leaves[node]
    if node[1] - node[0] == 1:
        raise KeyError(node)
    left, right = children(node)
    return add(fold(left, leaves, add), fold(right, leaves, add))


class TreeSum:
    """Sums leaves that arrive in order into canonical subtrees, holding O(log M) partial sums.

    `add(a, b)` may reuse `a`'s memory. The slow, obvious version is `fold` over all leaves.
    """

    def __init__(self, microbatches: range, total: int) -> None:
        self._subtrees = canonical_subtrees(microbatches, total)

    def feed(
        self, partial_sums: list[tuple[Node, T]], index: int, leaf: T, add: Callable[[T, T], T]
    ) -> None:
        """Adds microbatch `index` (they come in order), merging every subtree that is complete."""
        partial_sums.append(((index, index + 1), leaf))
        subtree = self._subtree_of(index)
        while len(partial_sums) > 1:
            (left, a), (right, b) = partial_sums[-2], partial_sums[-1]
            parent = (left[0], right[1])
            if not self._is_node(parent, (left, right), subtree):
                return
            partial_sums[-2:] = [(parent, add(a, b))]

    def _subtree_of(self, index: int) -> Node:
        return next(node for node in self._subtrees if node[0] <= index < node[1])

    @staticmethod
    def _is_node(parent: Node, siblings: Sequence[Node], subtree: Node) -> bool:
        """Whether `parent` is a node under `subtree` whose children are exactly `siblings`."""
        node = subtree
        while node[1] - node[0] > 1:
            if node == parent:
                return children(node) == tuple(siblings)
            left, right = children(node)
            node = left if parent[1] <= left[1] else right
            if parent[0] < node[0]:
                return False
        return False
