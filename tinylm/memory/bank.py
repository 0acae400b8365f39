"""A bank of memories that is larger than the device, in files: rows are read when fetched, written when changed.

    bank = Bank.create("runs/bank", model)          # model: add_memory(..., slots=64), which holds 64 blocks per level
    for step in train_with_bank(model, batches, config, bank): ...
    generate(bank.fetching(model, tree.find([prompt])[0]), prompt)

    bank.json                   what it belongs to: children, rows, the memories' paths, values per block
    level-0.rows, ...           float32 (nodes + 1, 3 values + memories): parameters, both Adam moments, step counts
    level-0.changed, ...        rows changed since the last commit, sparse, at the places they have in level-0.rows
    state.safetensors           the step the rows stand at, and which node each slot held then
    commit.safetensors          a commit under way: which changed rows belong to which step

One row of a file is all there is of a node, so fetching a node is one read. Rows are never changed in place between
two checkpoints: what leaves the device goes to `changed`. With a checkpoint these rows are made durable first
(`prepare`), then the checkpoint is written, then they are copied to their places (`apply`), which may be interrupted
and repeated. So at every moment the newest checkpoint can be gone on from, and a killed run resumes bit for bit
(`recover`). Rows have no hash: unlike a checkpoint's, a flipped bit in them is not found.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tinylm.memory.clusters import MemoriesError
from tinylm.memory.documents import generic_nodes, require_nodes
from tinylm.memory.retrieval import memories, require_resident, shape_of
from tinylm.store import PathLike, StateMismatch, read_file, sync_folder, write_bytes, write_file
from tinylm.weights import assign, bind, named, pure

FORMAT = 1
KINDS = ("param", "mean", "square", "count")
"""What a row holds of each memory, in this order: all of the first kind, then all of the next."""
PIECE = 32 * 2**20  # bytes that are made or copied at a time


class Bank:
    """The memories of a model, in a folder. One process may write; `create` and `of` make one, `open` opens it.

    Attributes:
        folder, children, rows: as the model's memories have them. names: their paths.
        step: of the run, that the rows stand at. slots: which node each slot held then.
    """

    def __init__(self, folder: PathLike):
        self.folder = Path(folder)
        about = json.loads((self.folder / "bank.json").read_text(encoding="utf-8"))
        if about.get("format") != FORMAT:
            raise StateMismatch(f"{folder}: bank format {about.get('format')}; this version reads {FORMAT}")
        self.children, self.rows, self.names = about["children"], tuple(about["rows"]), tuple(about["names"])
        self.values: list[list[int]] = about["values"]
        self.nodes = [int(n) + 1 for n in generic_nodes(self.children, len(self.rows))]
        self.slots, said = read_file(self._at("state.safetensors"))
        self.step: int = said["step"]
        self._rows = [self._map(level, "rows") for level in range(len(self.rows))]
        self._changed = [self._map(level, "changed") for level in range(len(self.rows))]
        self._dirty = [np.zeros(n, bool) for n in self.nodes]

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
        write_file(folder / "state.safetensors", {}, {"step": 0})
        rows_ = list(next(iter(rows)))
        about = {"format": FORMAT, "children": children, "rows": rows_, "names": list(held), "values": values}
        write_bytes(folder / "bank.json", json.dumps(about, indent=1).encode())  # last: with it the bank is whole
        return cls(folder)

    @classmethod
    def open(cls, folder: PathLike) -> Bank:
        """A bank that is there. Raises FileNotFoundError, StateMismatch for files of another size or format."""
        return cls(folder)

    # - rows -

    def _at(self, name: str) -> Path:
        return self.folder / name

    def width(self, level: int) -> int:
        """Numbers in a row of a level."""
        return 3 * sum(self.values[level]) + len(self.names)

    def _map(self, level: int, kind: str) -> np.ndarray:
        path, shape = self._at(f"level-{level}.{kind}"), (self.nodes[level], self.width(level))
        if path.stat().st_size != 4 * shape[0] * shape[1]:
            raise StateMismatch(f"{path}: {path.stat().st_size} bytes instead of {4 * shape[0] * shape[1]}: damaged")
        return np.memmap(path, np.float32, "r+", shape=shape)

    def columns(self, level: int) -> dict[tuple[str, str], slice]:
        """(kind, path of a memory) -> its place in a row."""
        found, at = {}, 0
        for kind in KINDS:
            for name, values in zip(self.names, self.values[level], strict=True):
                size = 1 if kind == "count" else values
                found[kind, name] = slice(at, at + size)
                at += size
        return found

    def read(self, level: int, nodes: np.ndarray) -> np.ndarray:
        """(nodes, width) rows, the newest there are."""
        rows, changed = np.array(self._rows[level][nodes]), self._dirty[level][nodes]
        if changed.any():
            rows[changed] = self._changed[level][nodes[changed]]
        return rows

    def stage(self, level: int, nodes: np.ndarray, rows: np.ndarray) -> None:
        """New rows, for the next commit."""
        self._changed[level][nodes] = rows
        self._dirty[level][nodes] = True

    def write(self, level: int, nodes: Any, values: Any) -> None:
        """Set the parameters of blocks, and forget their moments: editing knowledge. Durable when it returns.

        `values` is (nodes, parameters of a block in all memories), or one number for all of them: 0 deletes.
        """
        nodes = np.atleast_1d(np.arange(self.nodes[level])[nodes])
        rows = np.zeros((len(nodes), self.width(level)), np.float32)
        rows[:, : sum(self.values[level])] = values
        self.stage(level, nodes, rows)
        self.prepare(self.step, self.slots)
        self.apply()

    # - durable -

    def prepare(self, step: int, slots: Mapping[str, np.ndarray]) -> None:
        """Make the changed rows durable as those of `step`; their places still hold the step before."""
        for table in self._changed:
            table.flush()
        dirty = {f"dirty.{level}": np.flatnonzero(d) for level, d in enumerate(self._dirty)}
        write_file(self._at("commit.safetensors"), {**dirty, **slots}, {"step": step})

    def apply(self) -> None:
        """Copy the rows of the commit to their places; may be repeated."""
        arrays, said = read_file(self._at("commit.safetensors"))
        for level, (table, changed) in enumerate(zip(self._rows, self._changed, strict=True)):
            nodes, step = arrays.pop(f"dirty.{level}"), max(1, PIECE // (4 * self.width(level)))
            for begin in range(0, len(nodes), step):
                some = nodes[begin : begin + step]
                table[some] = changed[some]
            table.flush()
        write_file(self._at("state.safetensors"), arrays, {"step": said["step"]})
        self._forget()
        self.step, self.slots = said["step"], arrays

    def recover(self, step: int) -> None:
        """Make the rows those of the run's checkpoint at `step`. Raises StateMismatch where they are neither."""
        path = self._at("commit.safetensors")
        if path.exists() and read_file(path)[1]["step"] == step and step != self.step:
            self.apply()
        if step != self.step:
            raise StateMismatch(f"{self.folder} holds the rows of step {self.step}, the run's checkpoint is of {step}")
        self._forget()

    def begin(self) -> None:
        """Take the rows as they are for a new run, at its step 0."""
        write_file(self._at("state.safetensors"), {}, {"step": 0})
        self.step, self.slots = 0, {}
        self._forget()

    def _forget(self) -> None:
        """Drop what is changed: it stands in its place, or no checkpoint knows of it."""
        self._at("commit.safetensors").unlink(missing_ok=True)
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
        if isinstance(nodes, str):
            nodes = {"generic": generic_nodes(self.children, len(self.rows)), "none": [-1] * len(self.rows)}[nodes]
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
