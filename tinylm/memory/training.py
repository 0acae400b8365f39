"""Training with a bank in files: the compiled step sees only the slots, rows come and go between steps.

A batch is known before its step (it is a pure function of the step), so the rows of the next one are read, and those
that left the device are written, while the device works on the current one; the exchange itself is one compiled
gather and scatter behind it. Rows that the next batch fetches too stay where they are.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tinylm import optim
from tinylm.config import ConfigError, TrainConfig
from tinylm.data import Batch, Batches
from tinylm.memory.bank import KINDS, Bank
from tinylm.memory.clusters import MemoriesError
from tinylm.memory.documents import require_nodes
from tinylm.memory.retrieval import memories
from tinylm.resuming import resume
from tinylm.run import Tracker
from tinylm.step import State, compiled_loss
from tinylm.store import StateMismatch
from tinylm.training import Trainer, create

LEAST = 4  # rows that are exchanged at a time, padded to a power of two: few programs are compiled


def require_bank(bank: Any) -> None:
    """Raise MemoriesError for what is no bank, such as its folder's name."""
    if not isinstance(bank, Bank):
        raise MemoriesError(f"bank = {bank!r}: give a Bank, such as Bank.open(folder)")


class Slots:
    """Which node each slot of a level holds, and the call that last used it: the longest unused give way."""

    def __init__(self, count: int):
        self.node, self.used = np.full(count, -1, np.int64), np.full(count, -1, np.int64)

    def plan(self, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Nodes to bring, the slots they get, and the nodes (-1: none) that leave those. Raises MemoriesError."""
        if len(wanted) > len(self.node):
            raise MemoriesError(
                f"one call fetches {len(wanted)} blocks of a level and the model has {len(self.node)} slots: raise "
                "slots, or lower batch or steps_per_call"
            )
        missing = np.setdiff1d(wanted, self.node)
        free = np.flatnonzero(~np.isin(self.node, wanted))
        slots = free[np.argsort(self.used[free], kind="stable")][: len(missing)]
        return missing, slots, self.node[slots].copy()

    def take(self, wanted: np.ndarray, missing: np.ndarray, slots: np.ndarray, call: int) -> None:
        """The plan was carried out."""
        self.node[slots] = missing
        self.used[np.isin(self.node, wanted)] = call

    def places(self, nodes: np.ndarray) -> np.ndarray:
        """The slot of every node; -1 stays."""
        order = np.argsort(self.node, kind="stable")
        found = order[np.minimum(np.searchsorted(self.node[order], nodes), len(order) - 1)]
        return np.where(nodes < 0, -1, found).astype(np.int32)


class BankTrainer(Trainer):
    """A `Trainer` whose model holds slots of a `Bank`. Made by `train_with_bank` and `resume_with_bank`."""

    def __init__(self, model: Any, data: Batches, config: TrainConfig, *, bank: Bank, **more: Any):
        require_bank(bank)
        if config.parallel != "none" or config.ema:
            raise ConfigError('a bank in files is trained on one device and without ema: parallel="none", ema=0')
        bank.require(model)
        super().__init__(model, data, config, **more)
        self.bank, self._call = bank, 0
        depth, first = len(bank.rows), bank.names[0]
        held = [len(self.state.params[f"{first}.bank.{level}"]) for level in range(depth)]
        self.slots = [Slots(n) for n in held]
        self._exchange = exchanger(tuple(self._columns()), depth)
        self._leaving: list[tuple[int, np.ndarray, np.ndarray, jax.Array]] = []
        self._inner, self.update = self.update, self._step_with_rows
        self._paced = False  # every step more in a call wants more slots

    def _columns(self) -> list[tuple[int, int, int, int]]:
        """(leaf of the state, level, begin, end): where in a row each array of memories has its values."""
        found, columns = [], [self.bank.columns(level) for level in range(len(self.bank.rows))]
        for i, (path, _) in enumerate(jax.tree_util.tree_flatten_with_path(self.state)[0]):
            keys = [str(getattr(k, "key", getattr(k, "name", ""))) for k in path]
            if optim.in_bank(keys[-1]):
                memory, _, level = keys[-1].rpartition(".bank.")
                kind = keys[-2] if keys[-2] in KINDS else "param"
                place = columns[int(level)][kind, memory]
                found.append((i, int(level), place.start, place.stop))
        return sorted(found, key=lambda one: one[1:])

    def _step_with_rows(self, state: State, batches: list[Batch], rates: Any, seed: Any) -> tuple[State, Any]:
        self.state, batches = self._bring(state, batches)  # the one before is donated: it stays usable if a step fails
        return self._inner(self.state, batches, rates, seed)

    def _bring(self, state: State, batches: list[Batch]) -> tuple[State, list[Batch]]:
        """The state with every row that the batches fetch, and the batches with slots in place of nodes."""
        if any(batch.fetched is None for batch in batches):
            raise MemoriesError("a bank is trained on batches that say what they fetch: memory.Documents")
        shape = self.bank.children, len(self.bank.rows)
        fetched = [require_nodes(batch.fetched, *shape) for batch in batches]
        every = [np.unique(np.concatenate([f[:, level] for f in fetched])) for level in range(len(self.slots))]
        every = [wanted[wanted >= 0] for wanted in every]
        plans = [slots.plan(wanted) for slots, wanted in zip(self.slots, every, strict=True)]
        for batch, nodes in zip(batches, fetched, strict=True):
            if len(nodes) not in (1, len(batch.tokens)):
                raise MemoriesError(f"{len(nodes)} rows of nodes for {len(batch.tokens)} rows of tokens: one for each")
        most = max(len(missing) for missing, _, _ in plans)
        if most:
            self._write_back()
            room, at, rows = max(LEAST, 1 << (most - 1).bit_length()), [], []
            for level, (missing, slots, _) in enumerate(plans):
                into = np.full(room, len(self.slots[level].node), np.int32)  # no slot: dropped
                new = np.zeros((room, self.bank.width(level)), np.float32)
                into[: len(slots)], new[: len(slots)] = slots, self.bank.read(level, missing)
                at.append(into)
                rows.append(new)
            state, old = self._exchange(state, at, rows)
            for level, (_, _, leaving) in enumerate(plans):
                which = np.flatnonzero(leaving >= 0)
                self._leaving.append((level, leaving[which], which, old[level]))
        self._call += 1
        for slots, wanted, (missing, places, _) in zip(self.slots, every, plans, strict=True):
            slots.take(wanted, missing, places, self._call)
        places = [np.stack([s.places(f[:, i]) for i, s in enumerate(self.slots)], axis=1) for f in fetched]
        return state, [batch._replace(fetched=p) for batch, p in zip(batches, places, strict=True)]

    def _write_back(self) -> None:
        """What the last exchange took from the device, to the files; the device has gone on meanwhile."""
        for level, nodes, which, rows in self._leaving:
            if len(nodes):
                self.bank.stage(level, nodes, np.asarray(rows)[which])
        self._leaving = []

    def _commit(self) -> None:
        """All rows to the files, those on the device too, and durable as those of this step."""
        self._write_back()
        for level, nodes, rows in self._held():
            self.bank.stage(level, nodes, rows)
        tables = {f"node.{i}": s.node for i, s in enumerate(self.slots)}
        self.bank.prepare(self.step, tables | {f"used.{i}": s.used for i, s in enumerate(self.slots)})

    def _held(self) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """(level, nodes, their rows) that are on the device."""
        leaves, found = jax.tree.leaves(self.state), []
        for level, slots in enumerate(self.slots):
            held = np.flatnonzero(slots.node >= 0)
            if len(held):
                own = [
                    np.asarray(leaves[i]).reshape(len(slots.node), -1) for i, at, _, _ in self._columns() if at == level
                ]
                found.append((level, slots.node[held], np.concatenate(own, axis=1, dtype=np.float32)[held]))
        return found

    def save(self) -> Path | None:
        """Write a checkpoint, and the rows that belong to it; nothing where those of this step are written already."""
        if self.run is not None and self._saved_step == self.bank.step == self.step:
            return self.run.path(self.step)  # two commits of one step could not be told apart after a kill
        if self.kept:
            self._commit()
        path = super().save()
        self.bank.apply()
        return path

    def validate(self) -> dict[str, float]:
        """As `Trainer.validate`, with the rows that each validation batch fetches."""
        assert self.valid is not None
        loss, sums = compiled_loss(self.graph), []
        for i in range(self.config.eval_batches):
            self.state, (batch,) = self._bring(self.state, [self._picked(self.valid(i), 1)])
            sums.append(loss(self.state.params, batch))
        nats, weight = (float(sum(part)) for part in zip(*sums, strict=True))
        found = {"valid_loss": nats / weight}
        if self.valid_bytes:
            found["valid_bits"] = found["valid_loss"] / math.log(2) / self.valid_bytes
        return found

    def _finish(self) -> None:
        super()._finish()
        if not self.kept:  # no folder, no checkpoint: what was learned stays in the bank all the same
            self._commit()
            self.bank.apply()

    def take_up(self) -> None:
        """Go on with the slots as the bank's last commit left them. Raises StateMismatch for another run's bank."""
        for i, slots in enumerate(self.slots):
            if f"node.{i}" in self.bank.slots:
                slots.node, slots.used = self.bank.slots[f"node.{i}"].copy(), self.bank.slots[f"used.{i}"].copy()
        self._call = int(max(slots.used.max() for slots in self.slots)) if self.bank.slots else 0
        for level, nodes, rows in self._held():
            if bad := np.flatnonzero((self.bank.read(level, nodes) != rows).any(axis=1)).tolist():
                raise StateMismatch(
                    f"{self.bank.folder} has another node {nodes[bad[0]]} of level {level} than the checkpoint of step "
                    f"{self.step}: resume with the bank that this run was trained with"
                )


@functools.lru_cache(maxsize=16)
def exchanger(columns: tuple[tuple[int, int, int, int], ...], depth: int) -> Callable:
    """`(state, slots, rows) -> (state, rows that were there)`, of every level; slots beyond the last are no slots."""

    @functools.partial(jax.jit, donate_argnums=0)
    def exchange(state: State, slots: list[jax.Array], rows: list[jax.Array]) -> tuple[State, list[jax.Array]]:
        leaves, shape = jax.tree.flatten(state)
        old: list[list[jax.Array]] = [[] for _ in range(depth)]
        for i, level, begin, end in columns:
            x, at = leaves[i], slots[level]
            old[level].append(x.at[at].get(mode="clip").reshape(len(at), -1))
            leaves[i] = x.at[at].set(rows[level][:, begin:end].reshape(len(at), *x.shape[1:]), mode="drop")
        return jax.tree.unflatten(shape, leaves), [jnp.concatenate(parts, axis=1) for parts in old]

    return exchange


def train_with_bank(
    model: Any,
    data: Batches,
    config: TrainConfig,
    bank: Bank,
    *,
    valid: Batches | None = None,
    out: str | os.PathLike | None = None,
    tracker: Tracker | None = None,
) -> BankTrainer:
    """As `tinylm.train`, for a model with slots of `bank`; give `out` a folder, and the bank follows its checkpoints.

    Raises MemoriesError where model and bank do not belong together, ConfigError for several devices or an average of
    weights, which would move every row.
    """
    trainer = BankTrainer(model, data, config, bank=bank, valid=valid, tracker=tracker)
    if out is not None:
        trainer.run, trainer.kept = create(trainer, Path(out), data, valid), True
    bank.begin()
    return trainer


def resume_with_bank(
    folder: str | os.PathLike, bank: Bank, *, data: Batches, valid: Batches | None = None, **more: Any
) -> BankTrainer:
    """As `tinylm.resume`, bit for bit, rows included.

    Raises StateMismatch where the bank stands at another step than the newest checkpoint, which happens only when that
    file was damaged or the bank was trained elsewhere, or holds other rows than the checkpoint, as that of another run;
    `memories` of the model must be the bank's. What `Bank.write` changed since is taken up.
    """
    require_bank(bank)
    plain = resume(folder, data=data, valid=valid, **more)
    try:
        bank.recover(plain.step)
        memories(plain.model)
        trainer = BankTrainer(
            plain.model, data, plain.config, bank=bank, valid=valid, run=plain.run, tracker=plain.tracker
        )
        trainer.adopt(plain.tensors(), plain.seconds)
        trainer.history, trainer._saved_step = plain.history, plain.step
        trainer.take_up()
        return trainer
    except BaseException:
        if plain.run is not None:
            plain.run.close()
        raise
