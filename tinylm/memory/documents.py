"""Batches whose rows know what to fetch: windows of documents of one leaf, with the nodes on the way to it."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tinylm.data import Batch, DataError, permute
from tinylm.memory.clusters import MemoriesError
from tinylm.shards import Tokens


def generic_nodes(children: int, depth: int) -> np.ndarray:
    """(depth,) int32: the node after the last of every level, which is no document's."""
    return np.array([children ** (level + 1) for level in range(depth)], np.int32)


def require_nodes(nodes: Any, children: int, depth: int) -> np.ndarray:
    """(rows, depth) int32 numbers of nodes, -1 for none and the generic ones included; "generic" or "none" is one row.

    Raises MemoriesError.
    """
    if isinstance(nodes, str):
        if nodes not in ("generic", "none"):
            raise MemoriesError(f'nodes = {nodes!r}: give numbers, "generic" or "none"')
        nodes = generic_nodes(children, depth) if nodes == "generic" else np.full(depth, -1)
    nodes = np.atleast_2d(np.asarray(nodes))
    if nodes.ndim != 2 or nodes.shape[1] != depth or nodes.dtype.kind not in "iu":
        raise MemoriesError(f"nodes {nodes.shape}: give whole numbers, one for each of {depth} levels")
    for level, most in enumerate(generic_nodes(children, depth).tolist()):
        if nodes.size and not -1 <= nodes[:, level].min() <= nodes[:, level].max() <= most:
            raise MemoriesError(f"level {level} has nodes 0 to {most - 1} and the generic {most}: {nodes[:, level]}")
    return nodes.astype(np.int32)


def shuffled(nodes: np.ndarray, seed: int = 0) -> np.ndarray:
    """The control of random clusters: the same paths, dealt out to the documents at random."""
    return np.asarray(nodes)[np.random.default_rng(seed).permutation(len(nodes))]


def require_paths(nodes: np.ndarray, children: int) -> np.ndarray:
    """The nodes, if each lies under the one before it; -1 and generic ones may stand anywhere. Raises MemoriesError."""
    generic = generic_nodes(children, nodes.shape[1])
    told = (nodes >= 0) & (nodes < generic)
    wrong = (told[:, 1:] & told[:, :-1] & (nodes[:, 1:] // children != nodes[:, :-1])).any(axis=1)
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise MemoriesError(
            f"nodes[{row}] = {nodes[row].tolist()} is no path down a tree with {children} children: give `children` of "
            "the tree that found them"
        )
    return nodes


class Documents:
    """Next-token windows of documents that share a leaf: `documents(step)` -> Batch with `fetched`.

    The documents of a leaf stand one after another (Pouransari et al. 2025 pack by the finest cluster), and are cut
    into windows of `length`; the last of a leaf is filled up with positions of weight 0. Each epoch visits every window
    once, in an order that depends on the seed. Attention stays inside a document, unless `apart` is false.

    Raises DataError for tokens without an end, MemoriesError for nodes that are no paths, or settings out of range.

    Args:
        tokens: with a known end token. nodes: (documents, levels), of `Tree.find`, in the order of the tokens.
        children: of the tree.
        generic: probability that a row fetches the generic memory instead, drawn from (seed, step); the paper's 1/17
            trains a model that can also do without a retriever. 1: the control that always does.
    """

    def __init__(
        self,
        tokens: Tokens,
        nodes: np.ndarray,
        *,
        children: int,
        batch: int,
        length: int,
        seed: int = 0,
        generic: float = 0.0,
        apart: bool = True,
    ):
        if tokens.end is None:
            raise DataError("documents need tokens whose end token is known")
        self.tokens, self.batch, self.length, self.seed = tokens, int(batch), int(length), int(seed)
        self.children, self.generic, self.apart = children, float(generic), bool(apart)
        if not 0 <= self.generic <= 1 or self.batch < 1 or self.length < 1:
            raise MemoriesError(f"generic = {generic}, batch = {batch}, length = {length}: out of range")
        ends = [np.flatnonzero(p == tokens.end) + s for p, s in zip(tokens._parts, tokens._starts, strict=False)]
        self._ends = np.concatenate(ends)
        if np.ndim(nodes) != 2 or len(nodes) != len(self._ends) - 1:
            what = f"{len(nodes)} rows of nodes" if np.ndim(nodes) == 2 else f"nodes of shape {np.shape(nodes)}"
            raise MemoriesError(f"{what} for {len(self._ends) - 1} documents: one row for each, (documents, levels)")
        self.nodes = require_paths(require_nodes(nodes, children, np.shape(nodes)[1]), children)
        self._lay_out()

    def _lay_out(self) -> None:
        """Leaf by leaf: its documents in their order, how far each reaches, and the windows over all of them."""
        _, path = np.unique(self.nodes, axis=0, return_inverse=True)  # the leaf may be -1 on different paths
        order = np.argsort(path.reshape(-1), kind="stable")
        _, first = np.unique(path.reshape(-1)[order], return_index=True)
        self._leaves, starts = [], []
        for i, documents in enumerate(np.split(order, first[1:])):
            reach = np.cumsum(np.diff(self._ends)[documents])
            self._leaves.append((documents, reach))
            starts += [(i, at) for at in range(0, int(reach[-1]), self.length)]
        self._starts, self.windows = np.array(starts), len(starts)
        self.paths = np.stack([self.nodes[documents[0]] for documents, _ in self._leaves])

    def _row(self, window: int) -> np.ndarray:
        """The window's tokens, length + 1 or fewer; the leaf ends as its last document does."""
        leaf, begin = self._starts[window].tolist()
        documents, reach = self._leaves[leaf]
        row, done = np.full(min(self.length, int(reach[-1]) - begin) + 1, self.tokens.end, np.int32), 0
        which = int(np.searchsorted(reach, begin, side="right"))
        while done < len(row) and which < len(documents):
            document, before = int(documents[which]), int(reach[which - 1]) if which else 0
            place, size = int(self._ends[document]) + begin + done - before, int(reach[which]) - begin - done
            piece = row[done : done + size]
            self.tokens._read(place, piece)
            done, which = done + len(piece), which + 1
        return row

    def epochs(self, step: int) -> float:
        """How many times the windows have been seen before this step."""
        return step * self.batch / self.windows

    def indices(self, step: int) -> np.ndarray:
        """(batch,) numbers of the windows of a step."""
        at = operator.index(step) * self.batch + np.arange(self.batch)
        epochs = at // self.windows
        return np.concatenate(
            [
                permute(at[epochs == e] % self.windows, self.windows, seed=self.seed, epoch=int(e))
                for e in np.unique(epochs)
            ]
        )

    def __call__(self, step: int) -> Batch:
        tokens = np.full((self.batch, self.length), self.tokens.end, np.int32)
        targets, weights = tokens.copy(), np.zeros(tokens.shape, np.float32)
        windows = self.indices(step)
        for i, window in enumerate(windows.tolist()):
            row = self._row(window)
            tokens[i, : len(row) - 1], targets[i, : len(row) - 1], weights[i, : len(row) - 1] = row[:-1], row[1:], 1
        nodes = self.paths[self._starts[windows, 0]]
        if self.generic:
            key = int.from_bytes(hashlib.blake2b(f"generic:{self.seed}".encode(), digest_size=8).digest(), "little")
            rng = np.random.Generator(np.random.Philox(key=np.array([key, operator.index(step)], np.uint64)))
            drawn = rng.random(self.batch) < self.generic
            nodes = np.where(drawn[:, None], generic_nodes(self.children, nodes.shape[1]), nodes)
        batch = Batch(tokens, targets, weights, fetched=nodes.astype(np.int32))
        return batch._replace(**placed(tokens, self.tokens)) if self.apart else batch

    def describe(self) -> dict[str, Any]:
        """Everything that decides the batches, json-able."""
        said = {"windows": self.windows, "length": self.length, "batch": self.batch, "seed": self.seed}
        nodes = hashlib.sha256(self.nodes.tobytes()).hexdigest()
        own = {"nodes": nodes, "children": self.children, "generic": self.generic, "apart": self.apart}
        return {"kind": "documents", "sha256": self.tokens.sha256, **said, **own}


def placed(tokens: np.ndarray, of: Tokens) -> dict[str, np.ndarray]:
    """Positions and segments that restart with every document of a row."""
    starts = tokens == (of.end if of.begin is None else of.begin)
    segments = np.cumsum(starts, axis=1, dtype=np.int32)
    segments += 1 - segments[:, :1]
    here = np.arange(tokens.shape[1], dtype=np.int32)
    positions = here - np.maximum.accumulate(np.where(starts, here, 0), axis=1)
    return {"positions": positions.astype(np.int32), "segments": segments}


class Only:
    """Another source's batches with the same nodes in every row: controls, and training one branch alone."""

    def __init__(self, source: Documents, nodes: Sequence[int]):
        self.source, self.nodes = source, require_nodes(nodes, source.children, source.nodes.shape[1])
        if len(self.nodes) != 1:
            raise MemoriesError(f"nodes {self.nodes.shape}: give the same for every row, one number for each level")
        self.tokens, self.batch, self.length, self.windows = source.tokens, source.batch, source.length, source.windows

    def __call__(self, step: int) -> Batch:
        batch = self.source(step)
        return batch._replace(fetched=np.repeat(self.nodes, len(batch.tokens), axis=0))


def paths(nodes: np.ndarray) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """Each different path with the numbers of the documents that take it."""
    found, which = np.unique(nodes, axis=0, return_inverse=True)
    for i, path in enumerate(found.tolist()):
        yield tuple(path), np.flatnonzero(which.reshape(-1) == i)
