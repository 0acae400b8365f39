"""A bank of memories that is larger than the device, in files: rows are read when fetched, written when changed.

    bank = Bank.create("runs/bank", model)          # model: add_memory(..., slots=64), which holds 64 blocks per level
    for step in train_with_bank(model, batches, config, bank): ...
    generate(bank.fetching(model, tree.find([prompt])[0]), prompt)

    bank.json                   what it belongs to: children, rows, the memories' paths, values per block
    level-0.rows, ...           float32 (nodes + 1, 3 values + memories): parameters, both Adam moments, step counts
    level-0.sums, ...           uint32 (nodes + 1): the CRC-32 of every row
    level-0.changed, ...        rows changed since the last commit, sparse, at the places they have in level-0.rows
    state.safetensors           the step the rows stand at, and which node each slot held then
    commit.safetensors          a commit that is prepared: which changed rows, and their sums, belong to which step
    applied.safetensors         the same file, once it is decided that these rows go to their places

One row of a file is all there is of a node, so fetching a node is one read. Rows are never changed in place between
two checkpoints: what leaves the device goes to `changed`. With a checkpoint these rows are made durable first
(`prepare`), then the checkpoint is written, then they are copied to their places (`apply`), which may be interrupted
and repeated; until it is done they are read from `changed`. So at every moment the newest checkpoint can be gone on
from, and a killed run resumes bit for bit (`recover`).

Every row is checked against its sum whenever it is read, parameters and moments alike, and `Bank.verify` checks all of
them. A sum begins from the number of its node, so a row at another's place is found too. It finds every flip of up to
32 neighbouring bits, and of others all but one in 4 billion; it is no protection from someone who changes both files.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from tinylm.memory.clusters import MemoriesError
from tinylm.memory.documents import generic_nodes, require_nodes
from tinylm.memory.retrieval import memories, require_resident, shape_of
from tinylm.reading import regular
from tinylm.store import CheckpointDamaged, PathLike, StateMismatch, read_file, sync_folder, write_bytes, write_file
from tinylm.weights import assign, bind, named, pure

FORMAT = 2  # 1 had no sums
KINDS = ("param", "mean", "square", "count")
"""What a row holds of each memory, in this order: all of the first kind, then all of the next."""
PIECE = 32 * 2**20  # bytes that are made, copied or checked at a time


def pieces(nodes: np.ndarray, width: int) -> list[np.ndarray]:
    """The nodes, so many at a time that their rows of `width` numbers are about `PIECE` bytes."""
    step = max(1, PIECE // (4 * width))
    return [nodes[begin : begin + step] for begin in range(0, len(nodes), step)]


def checksums(nodes: Iterable[int], rows: Float[np.ndarray, "nodes width"]) -> np.ndarray:
    """(nodes,) uint32: the CRC-32 of each row's bytes, begun from the number of its node."""
    rows = np.ascontiguousarray(rows, np.float32)
    return np.array([zlib.crc32(row, int(node)) for node, row in zip(nodes, rows, strict=True)], np.uint32)


def _about(path: Path) -> dict[str, Any]:
    """What bank.json says. Raises FileNotFoundError, StateMismatch for another format, CheckpointDamaged."""
    try:
        about = json.loads(regular(path))
        if not isinstance(about, dict) or "format" not in about:
            raise ValueError("it names no format")
        if about["format"] != FORMAT:
            raise StateMismatch(
                f"{path}: bank format {about['format']}; this version reads {FORMAT}: make the bank anew"
            )
        if missing := {"children", "rows", "names", "values"} - about.keys():
            raise ValueError(f"it does not name {', '.join(sorted(missing))}")
    except StateMismatch:
        raise
    except ValueError as error:
        raise CheckpointDamaged(f"{path} is not what was written: {error}") from error
    return about


class Bank:
    """The memories of a model, in a folder: `create` and `of` make one, `open` opens it.

    One process may write, and no other read meanwhile.

    Attributes:
        folder, children, rows: as the model's memories have them. names: their paths.
        step: of the run, that the rows stand at. slots: which node each slot held then.
    """

    def __init__(self, folder: PathLike):
        self.folder = Path(folder)
        about = _about(self.folder / "bank.json")
        self.children, self.rows, self.names = about["children"], tuple(about["rows"]), tuple(about["names"])
        self.values: list[list[int]] = about["values"]
        self.nodes = [int(n) + 1 for n in generic_nodes(self.children, len(self.rows))]
        self.slots, said = read_file(self._at("state.safetensors"))
        self.step: int = said["step"]
        self._rows = [self._map(level, "rows") for level in range(len(self.rows))]
        self._changed = [self._map(level, "changed") for level in range(len(self.rows))]
        self._sums = [self._map(level, "sums") for level in range(len(self.rows))]
        self._dirty = [np.zeros(n, bool) for n in self.nodes]
        self._new_sums = [np.zeros(n, np.uint32) for n in self.nodes]  # of the changed rows
        if self._at("applied.safetensors").exists():  # was interrupted: its rows may not be in their places
            self._take(self._at("applied.safetensors"), check=False)

    # - making one -

    @classmethod
    def create(cls, folder: PathLike, model: Any, *, seed: int = 0) -> Bank:
        """A new bank for the memories of `model`, each node's block drawn as the memories draw theirs.

        Raises FileExistsError where there is one. The files are sparse: moments take no room until they are written.
        """

        def fill(level: int, table: np.ndarray) -> None:
            step = max(1, PIECE // (4 * table.shape[1]))
            for begin in range(0, len(table), step):
                part = table[begin : begin + step]
                at = 0
                for path, memory in memories(model).items():
                    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(f"{path}.{level}.{begin}".encode()))
                    part[:, at : at + memory.values(level)] = memory.draw(key, level, len(part))
                    at += memory.values(level)

        return cls._make(folder, model, fill)

    @classmethod
    def of(cls, folder: PathLike, model: Any) -> Bank:
        """A new bank with the blocks that `model` holds itself. Raises MemoriesError where it holds slots only."""
        require_resident(model, "Bank.create makes a new one for it")

        def fill(level: int, table: np.ndarray) -> None:
            parts = [np.asarray(memory.bank[level][...]) for memory in memories(model).values()]
            table[:, : sum(p.shape[1] for p in parts)] = np.concatenate(parts, axis=1)

        return cls._make(folder, model, fill)

    @classmethod
    def _make(cls, folder: PathLike, model: Any, fill: Any) -> Bank:
        folder, held = Path(folder), memories(model)
        if (folder / "bank.json").exists():
            raise FileExistsError(f"{folder} holds a bank already: Bank.open it, or take another folder")
        children, depth = shape_of(model)
        rows = {memory.rows for memory in held.values()}
        if len(rows) > 1:
            raise MemoriesError(f"the memories of this model have blocks of different sizes: {sorted(rows)}")
        folder.mkdir(parents=True, exist_ok=True)
        values = [[memory.values(level) for memory in held.values()] for level in range(depth)]
        for level, nodes in enumerate(generic_nodes(children, depth).tolist()):
            width = 3 * sum(values[level]) + len(held)
            for kind in ("rows", "changed"):
                with (folder / f"level-{level}.{kind}").open("wb") as file:
                    file.truncate(4 * (nodes + 1) * width)
            table = np.memmap(folder / f"level-{level}.rows", np.float32, "r+", shape=(nodes + 1, width))
            fill(level, table)
            table.flush()
            sums = np.concatenate([checksums(some, table[some]) for some in pieces(np.arange(nodes + 1), width)])
            write_bytes(folder / f"level-{level}.sums", sums.tobytes())
        write_file(folder / "state.safetensors", {}, {"step": 0})
        rows_ = list(next(iter(rows)))
        about = {"format": FORMAT, "children": children, "rows": rows_, "names": list(held), "values": values}
        write_bytes(folder / "bank.json", json.dumps(about, indent=1).encode())  # last: with it the bank is whole
        return cls(folder)

    @classmethod
    def open(cls, folder: PathLike) -> Bank:
        """A bank that is there; it is not read through, see `verify`.

        Raises FileNotFoundError, StateMismatch for files of another size or format, CheckpointDamaged.
        """
        return cls(folder)

    # - rows -

    def _at(self, name: str) -> Path:
        return self.folder / name

    def width(self, level: int) -> int:
        """Numbers in a row of a level."""
        return 3 * sum(self.values[level]) + len(self.names)

    def _map(self, level: int, kind: str) -> np.memmap:
        path, nodes = self._at(f"level-{level}.{kind}"), self.nodes[level]
        shape, dtype = ((nodes,), np.uint32) if kind == "sums" else ((nodes, self.width(level)), np.float32)
        size = path.stat().st_size
        if kind == "changed" and not size:  # killed as it was emptied
            os.truncate(path, size := 4 * math.prod(shape))
        if size != 4 * math.prod(shape):
            raise StateMismatch(f"{path}: {size} bytes instead of {4 * math.prod(shape)}: damaged")
        return np.memmap(path, dtype, "r+", shape=shape)

    def columns(self, level: int) -> dict[tuple[str, str], slice]:
        """(kind, path of a memory) -> its place in a row."""
        found, at = {}, 0
        for kind in KINDS:
            for name, values in zip(self.names, self.values[level], strict=True):
                size = 1 if kind == "count" else values
                found[kind, name] = slice(at, at + size)
                at += size
        return found

    def read(self, level: int, nodes: Any) -> np.ndarray:
        """(nodes, width) float32 rows, the newest there are.

        Raises CheckpointDamaged for a row that is not what was written, MemoriesError for nodes that are not there.
        """
        nodes = self._require(level, nodes)
        rows, sums, changed = np.array(self._rows[level][nodes]), self._sums[level][nodes], self._dirty[level][nodes]
        if changed.any():
            rows[changed] = self._changed[level][nodes[changed]]
            sums = np.where(changed, self._new_sums[level][nodes], sums)
        self._check(level, nodes, rows, sums, changed)
        return rows

    def stage(self, level: int, nodes: np.ndarray, rows: Float[np.ndarray, "nodes width"]) -> None:
        """New rows, for the next commit."""
        rows = np.ascontiguousarray(rows, np.float32)
        self._new_sums[level][nodes] = checksums(nodes, rows)
        self._changed[level][nodes] = rows
        self._dirty[level][nodes] = True

    def verify(self) -> None:
        """Check every row, of parameters and of moments, against its sum; reads the files once, piece by piece.

        Raises CheckpointDamaged that names the file and the place of the first rows that are not what was written.
        """
        for level, nodes in enumerate(self.nodes):
            for some in pieces(np.arange(nodes), self.width(level)):
                self.read(level, some)

    def _require(self, level: int, nodes: Any) -> np.ndarray:
        """(nodes,) int64. Raises MemoriesError for a level or nodes that this bank does not have."""
        if not (isinstance(level, int | np.integer) and 0 <= level < len(self.rows)):
            raise MemoriesError(f"level = {level!r}: this bank has levels 0 to {len(self.rows) - 1}")
        nodes, most = np.atleast_1d(np.asarray(nodes)), self.nodes[level] - 1
        nodes = nodes if nodes.size else nodes.astype(int)
        if (
            nodes.ndim != 1
            or nodes.dtype.kind not in "iu"
            or (len(nodes) and not 0 <= nodes.min() <= nodes.max() <= most)
        ):
            raise MemoriesError(f"nodes = {nodes}: level {level} has nodes 0 to {most - 1} and the generic {most}")
        return nodes.astype(np.int64)

    def _check(self, level: int, nodes: Any, rows: np.ndarray, sums: np.ndarray, changed: np.ndarray) -> None:
        """Raise CheckpointDamaged unless these are the rows that were written; `changed`: which lie in that file."""
        bad = np.flatnonzero(checksums(nodes, rows) != sums)
        if not len(bad):
            return
        node, size, there = int(nodes[bad[0]]), 4 * self.width(level), bool(changed[bad[0]])
        path = self._at(f"level-{level}." + ("changed" if there else "rows"))
        more = f", and {len(bad) - 1} more of {len(nodes)} rows" if len(bad) > 1 else ""
        rest = "" if there else f", or give up what this node knows with bank.write({level}, {node}, 0)"
        raise CheckpointDamaged(
            f"{path}: node {node} of level {level}, bytes {node * size} to {(node + 1) * size - 1}, is not what was "
            f"written{more}: put back a copy of the folder{rest}"
        )

    def write(self, level: int, nodes: Any, values: Any) -> None:
        """Set the parameters of blocks, and forget their moments: editing knowledge. Durable when it returns.

        Between two trainings: a trainer that is under way writes what it holds itself.

        Args:
            nodes: numbers of nodes, or a slice of them.
            values: (nodes, parameters of a block in all memories), or one number for all of them: 0 deletes.

        Raises MemoriesError for nodes that are not there, values of another shape or not finite, and while a commit of
        a killed run waits to be taken up or dropped.
        """
        waiting = self._at("commit.safetensors")
        if waiting.exists() and (step := read_file(waiting)[1]["step"]) != self.step:  # the same: of a killed `write`
            raise MemoriesError(
                f"{self.folder}: a run was killed here as it saved: resume_with_bank goes on with it; or keep its rows "
                f"with bank.recover({step}), or drop them with bank.recover({self.step})"
            )
        if self._at("applied.safetensors").exists():
            self.apply()  # its rows may be in `changed` alone, where new ones go
        if isinstance(nodes, slice) and 0 <= level < len(self.nodes):
            nodes = np.arange(self.nodes[level])[nodes]
        nodes = self._require(level, nodes)
        values, shape = np.asarray(values, np.float32), (len(nodes), sum(self.values[level]))
        if values.shape not in ((), shape) or not np.isfinite(values).all():
            raise MemoriesError(f"values {values.shape}: must be one number or {shape} of them, all finite")
        rows = np.zeros((len(nodes), self.width(level)), np.float32)
        rows[:, : shape[1]] = values
        self.stage(level, nodes, rows)
        slots, name = dict(self.slots), f"node.{level}"
        if name in slots:  # what a checkpoint has on the device is no longer the node's: it is read anew
            slots[name] = np.where(np.isin(slots[name], nodes), -1, slots[name])
        self.prepare(self.step, slots)
        self.apply()

    # - durable -

    def prepare(self, step: int, slots: Mapping[str, np.ndarray]) -> None:
        """Make the changed rows durable as those of `step`; their places still hold the step before."""
        for table in self._changed:
            table.flush()
        dirty = {f"dirty.{level}": np.flatnonzero(d) for level, d in enumerate(self._dirty)}
        sums = {f"sums.{i}": s[dirty[f"dirty.{i}"]] for i, s in enumerate(self._new_sums)}
        write_file(self._at("commit.safetensors"), {**dirty, **sums, **slots}, {"step": step})

    def apply(self) -> None:
        """Copy the rows of the commit to their places; may be repeated. Raises CheckpointDamaged before it begins."""
        prepared, decided = self._at("commit.safetensors"), self._at("applied.safetensors")
        self._take(prepared if prepared.exists() else decided, check=True)
        every = [pieces(np.flatnonzero(dirty), self.width(level)) for level, dirty in enumerate(self._dirty)]
        if prepared.exists():
            os.replace(prepared, decided)  # from here on it is carried out, and its rows are read from `changed`
            sync_folder(self.folder)
        for level, parts in enumerate(every):
            for some in parts:
                self._rows[level][some] = self._changed[level][some]
                self._sums[level][some] = self._new_sums[level][some]
            self._rows[level].flush()
            self._sums[level].flush()
        write_file(self._at("state.safetensors"), self.slots, {"step": self.step})
        self._forget()

    def _take(self, path: Path, check: bool) -> None:
        """Go by a commit's step, slots and changed rows, which are checked first."""
        arrays, said = read_file(path)
        found = [(arrays.pop(f"dirty.{level}"), arrays.pop(f"sums.{level}")) for level in range(len(self.rows))]
        for level, (nodes, sums) in enumerate(found if check else []):
            for at in pieces(np.arange(len(nodes)), self.width(level)):
                self._check(level, nodes[at], self._changed[level][nodes[at]], sums[at], np.ones(len(at), bool))
        for dirty, new, (nodes, sums) in zip(self._dirty, self._new_sums, found, strict=True):
            dirty[:] = False
            dirty[nodes], new[nodes] = True, sums
        self.step, self.slots = said["step"], arrays

    def recover(self, step: int) -> None:
        """Make the rows those of the run's checkpoint at `step`. Raises StateMismatch where they are neither."""
        path = self._at("commit.safetensors")
        if path.exists() and read_file(path)[1]["step"] == step and step != self.step:
            self.apply()
        if step != self.step:
            raise StateMismatch(f"{self.folder} holds the rows of step {self.step}, the run's checkpoint is of {step}")
        self._settle()

    def begin(self) -> None:
        """Take the rows as they are for a new run, at its step 0."""
        self._settle()
        write_file(self._at("state.safetensors"), {}, {"step": 0})
        self.step, self.slots = 0, {}

    def _settle(self) -> None:
        """Carry out what is decided, and drop what is not: no checkpoint knows of it."""
        self._at("commit.safetensors").unlink(missing_ok=True)
        if self._at("applied.safetensors").exists():
            self.apply()
        else:
            self._forget()

    def _forget(self) -> None:
        """Drop what is changed: it stands in its place, or no checkpoint knows of it."""
        for name in ("commit.safetensors", "applied.safetensors"):
            self._at(name).unlink(missing_ok=True)
        sync_folder(self.folder)
        for level, dirty in enumerate(self._dirty):
            if dirty.any() or self._at(f"level-{level}.changed").stat().st_blocks:
                size = 4 * self.nodes[level] * self.width(level)
                self._changed[level] = None  # type: ignore[call-overload]
                os.truncate(self._at(f"level-{level}.changed"), 0)
                os.truncate(self._at(f"level-{level}.changed"), size)
                self._changed[level] = self._map(level, "changed")
            dirty[:] = False

    # - with a model -

    def require(self, model: Any) -> None:
        """Raise MemoriesError unless this is the bank of the model's memories."""
        held = memories(model)
        same = self.names == tuple(held) and shape_of(model) == (self.children, len(self.rows))
        if not same or any(m.rows != self.rows for m in held.values()):
            theirs = f"{self.children} children, rows {self.rows}, {', '.join(self.names[:2])}, ..."
            raise MemoriesError(f"{self.folder} is the bank of other memories: {theirs}")

    def fetching(self, model: Any, nodes: Any = "generic") -> Any:
        """As `retrieval.fetching`, for a model with slots: the blocks are read from the files into its slots."""
        self.require(model)
        nodes, (graph, params) = require_nodes(nodes, self.children, len(self.rows)), pure(model)
        own = np.full_like(nodes, -1)
        for level in range(len(self.rows)):
            wanted, which = np.unique(nodes[:, level], return_inverse=True)
            rows, columns = self.read(level, np.maximum(wanted, 0)), self.columns(level)
            own[:, level] = np.where(wanted < 0, -1, np.arange(len(wanted)))[which.reshape(-1)]
            for name in self.names:
                table = params[f"{name}.bank.{level}"]
                if len(wanted) > len(table):
                    raise MemoriesError(f"{len(wanted)} blocks of level {level} do not fit {len(table)} slots")
                params[f"{name}.bank.{level}"] = table.at[: len(wanted)].set(rows[:, columns["param", name]])
        return bind(graph, {n: jnp.asarray(own) if n.endswith(".fetched") else x for n, x in params.items()})

    def resident(self, model: Any) -> Any:
        """A model that holds all blocks itself, for banks that fit into memory."""
        from tinylm.config import Edit
        from tinylm.model import Transformer

        self.require(model)
        free = lambda e: {**dict(e.settings), "slots": 0} if "slots" in dict(e.settings) else dict(e.settings)  # noqa: E731
        edits = [Edit(where=e.where, technique=e.technique, settings=free(e)) for e in model.config.edits]
        whole = Transformer(model.config.replace(edits=tuple(edits)), tokenizer=model.tokenizer)
        values = {**named(model)}
        for level in range(len(self.rows)):
            rows, columns = self.read(level, np.arange(self.nodes[level])), self.columns(level)
            values |= {f"{n}.bank.{level}": jnp.asarray(rows[:, columns["param", n]]) for n in self.names}
        assign(whole, values)
        return whole

    @property
    def parameters(self) -> int:
        """Of all blocks, the generic ones included."""
        return sum(n * sum(v) for n, v in zip(self.nodes, self.values, strict=True))

    def __repr__(self) -> str:
        return (
            f"Bank({str(self.folder)!r}: {self.parameters:,} parameters of {sum(self.nodes):,} nodes, step {self.step})"
        )
