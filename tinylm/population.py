"""Many models of one shape trained as one program: seeds, sweeps, members of a committee.

    runs = train_many(ModelConfig(...), tokens, TrainConfig(steps=500).grid(seed=range(8)), valid=held_out)
    for steps in runs:
        print([step.loss for step in steps])

Every member is a `Trainer` of its own, with its data order, curve, run folder and checkpoints; only the step they take
is shared: their states are stacked and `jax.vmap` runs over them. Each member ends as it would alone, to float32
rounding; any of them can be loaded, and resumed alone or with others.
"""

from __future__ import annotations

import dataclasses
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tinylm import optim
from tinylm.config import ConfigError, ModelConfig, TrainConfig
from tinylm.data import Batch, Batches, Tokens, alike
from tinylm.model import Transformer
from tinylm.step import compiled_updates
from tinylm.training import Interrupt, Step, Trainer, TrainingDiverged, create

KNOBS = ("weight_decay", "beta1", "beta2", "eps")  # of the recipe: arrays of one value per member
FREE = (*KNOBS, "seed", "learning_rate", "schedule", "final", "warmup", "decay", "stairs", "mask_rate", "documents")


class Population:
    """Trainers that take their steps together. Iterate to train; made by `train_many`, or from trainers at one step.

    Attributes:
        members: the trainers still training, in the order given.
        dropped: those that left, by `drop` or because a loss was not finite.
        outcome: "running", "done", "interrupted" or "stopped".
    """

    def __init__(self, members: Sequence[Trainer]):
        if not members:
            raise ConfigError("a population needs at least one member")
        self.members, self.dropped = list(members), list[Trainer]()
        self.outcome, self._ask = "running", False
        self._state: Any = None  # stacked while the loop runs; the members hold their own at all other times
        for number, member in enumerate(self.members):
            if wrong := differences(self.members[0], member):
                raise ConfigError(f"member {number} cannot take its steps together with member 0: {wrong}")

    @property
    def models(self) -> list[Transformer]:
        """The members' models, current at every yielded step and at the end."""
        return [member.model for member in self.members]

    @property
    def curves(self) -> np.ndarray:
        """(members, steps) float32 losses of this sitting, in nats per token."""
        return np.array([member.losses for member in self.members], np.float32)

    def stop(self) -> None:
        """Ask the loop to end after the step it is in."""
        self._ask = True

    def drop(self, *numbers: int) -> None:
        """Let members go, by their place in `members`: their models keep the weights, their folders a checkpoint."""
        for i in numbers:
            if not 0 <= i < len(self.members):
                raise IndexError(f"there is no member {i}: the population has {len(self.members)}")
        running = self._state is not None
        self._deal()
        for i in sorted(set(numbers), reverse=True):
            member = self.members.pop(i)
            self.dropped.append(member)
            member._finish()
        if running and self.members:
            self._stack()

    def __iter__(self) -> Iterator[list[Step]]:
        """Yield the members' steps wherever a `Trainer` would yield one; all models are current then.

        A member whose loss or gradient is not finite is dropped with a warning, and the others go on.
        """
        self.outcome, self._ask = "running", False
        for member in self.members:
            member.outcome, member.signal, member._clock = "running", 0, time.perf_counter()
            member.tracker.start({"model": member.model.config.to_dict(), "train": member.config.to_dict()})
        self._stack()
        with Interrupt() as interrupt:
            try:
                while self.members and self.members[0].progress < 1.0 and not (interrupt.asked or self._ask):
                    last = self._go()
                    if self.members and self.members[0]._due(interrupt) and (steps := self._note(last)):
                        yield steps
                self.outcome = "interrupted" if interrupt.asked else "stopped" if self._ask else "done"
            finally:
                if self.outcome == "running":
                    self.outcome = "stopped"
                self._deal()
                for member in self.members:
                    member.outcome, member.signal = self.outcome, interrupt.asked
                    member._finish()

    def _go(self) -> list[Step]:
        """One call of the device for all members; their newest steps."""
        lead = self.members[0]
        batches, done = lead._next(self._batch)
        steps = range(lead.step, lead.step + len(batches))
        rates = [[optim.rate(m.config, step, p) for m in self.members] for step, p in zip(steps, done, strict=True)]
        given = np.array(rates, np.float32), self._seeds, self._knobs
        self._state, figures = self._update(self._state, batches, *given)
        figures = jax.device_get(figures)
        lost, last = {}, []
        for i, member in enumerate(self.members):
            member.step += len(batches)
            try:
                for k, step in enumerate(steps):
                    own = {name: values[k, i] for name, values in figures.items()}
                    if own["halted"]:
                        member.state = self._member(i)
                    newest = member._taken(step + 1, rates[k][i], own)
                last.append(newest)
            except TrainingDiverged as error:
                lost[i] = error
        for i, error in lost.items():
            warnings.warn(f"member {i} of {len(self.members)} is dropped: {error}", stacklevel=4)
        if lost:
            self.drop(*lost)
        return last

    def _note(self, steps: list[Step]) -> list[Step]:
        """Validate, log and save what is due, and give every member its model."""
        over = self.members[0]._over
        for i, member in enumerate(self.members):
            member.state, member._over = self._member(i), over
            steps[i] = member._note(steps[i])
            member.sync()
            member.state = None  # type: ignore[assignment]
        return steps

    def _batch(self, step: int) -> Batch:
        """The members' batches of a step, stacked."""
        own = [member._batch(step) for member in self.members]
        if not all(alike(own[0], other) for other in own):  # rare: the masks of one need more room
            own = [batch._replace(picked=None) for batch in own]
        return Batch._make(None if parts[0] is None else np.stack(parts) for parts in zip(*own, strict=True))

    def _member(self, i: int) -> Any:
        return jax.tree.map(lambda x: x[i], self._state)

    def _stack(self) -> None:
        """Take the members' states together, and the settings they differ in as arrays."""
        configs = [member.config for member in self.members]
        self._state = jax.tree.map(lambda *x: jnp.stack(x), *(member.state for member in self.members))
        for member in self.members:
            member.state = None  # type: ignore[assignment]  # one copy is enough
        differing = [name for name in KNOBS if len({getattr(config, name) for config in configs}) > 1]
        self._knobs = {name: np.array([getattr(c, name) for c in configs], np.float32) for name in differing}
        self._seeds = np.array([config.seed for config in configs], np.uint32)
        lead = self.members[0]
        recipe = dataclasses.replace(lead.recipe, **dict.fromkeys(differing, 0.5))  # one program for all values
        self._update = compiled_updates(lead.graph, recipe, lead.model.config.draws)

    def _deal(self) -> None:
        """Give every member its own state again."""
        if self._state is not None:
            for i, member in enumerate(self.members):
                member.state = self._member(i)
            self._state = None


def differences(one: Trainer, other: Trainer) -> str:
    """Why two trainers cannot take their steps together; "" when they can."""
    if one.step != other.step:
        return f"it is at step {other.step}, not {one.step}"
    mine, yours = ({**t.config.to_dict(), **t.model.config.to_dict()} for t in (one, other))
    wrong = [name for name in mine if name not in FREE and mine[name] != yours[name]]
    if wrong:
        values = ", ".join(f"{name} = {yours[name]!r} instead of {mine[name]!r}" for name in wrong)
        return f"{values}; members may differ in {', '.join(FREE)}"
    if one.layout is not None:
        return f"parallel = {one.config.parallel!r}: the members of a population share one device"
    same = one.graph == other.graph  # techniques and tokenizers are part of it
    return "" if same else "its model is built in another way"


def train_many(
    model: ModelConfig | Sequence[Transformer],
    data: Tokens | Batches | Sequence[Batches],
    configs: Sequence[TrainConfig],
    *,
    valid: Tokens | Batches | None = None,
    out: str | os.PathLike | None = None,
    tokenizer: Any = None,
) -> Population:
    """Train one model per config together; iterate over what this returns.

    Args:
        model: the shape of all, each with initial weights of its config's seed; or the models, one per config.
        data, valid: as in `train`; every member has its own order of tokens, by its seed. A list of batch sources gives
            each member its own.
        configs: they may differ in seed, learning_rate, weight_decay, beta1, beta2, eps, mask_rate, documents and the
            schedule; `TrainConfig.grid` makes them.
        out: a new folder; member k's run is in its folder `member-00k`.
        tokenizer: of the models that are made here.

    Raises:
        ConfigError: configs that differ in what all must share, or not one per model.
    """
    configs = list(configs)
    sources: list[Any] = list(data) if isinstance(data, list | tuple) else [data] * len(configs)
    if len(sources) != len(configs):
        raise ConfigError(f"{len(sources)} sources of batches and {len(configs)} configs: give one per member, or one")
    if isinstance(model, ModelConfig):
        models = [Transformer(model, rngs=config.seed, tokenizer=tokenizer) for config in configs]
    else:
        models = list(model)
    if len(models) != len(configs):
        raise ConfigError(f"{len(models)} models and {len(configs)} configs: give one config per model")
    places = [None if out is None else Path(out) / f"member-{i:03d}" for i in range(len(configs))]
    each = zip(models, sources, configs, strict=True)
    together = Population([Trainer(model, source, config, valid=valid) for model, source, config in each])
    for trainer, source, place in zip(together.members, sources, places, strict=True):
        if place is not None:
            trainer.run, trainer.kept = create(trainer, place, source, valid), True
    return together
