"""The training loop, as an iterator: the caller owns the loop.

    for step in train(model, tokens, TrainConfig(steps=500), out="runs/first"):
        print(step.step, step.loss)

What can be relied on: the whole state (weights, optimiser, step) changes hands at once, so a Ctrl-C leaves it exactly
at a step; a batch and its randomness depend on the seed and the step alone, so a resumed run repeats the uninterrupted
one bit for bit; a loss or gradient that is not finite never reaches the weights.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import math
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tinylm import optim
from tinylm.checkpoint import require_match
from tinylm.config import ConfigError, TrainConfig
from tinylm.data import Batch, Batches, DataError, Tokens, alike, batches_of, picking
from tinylm.model import Transformer, device
from tinylm.run import NoTracker, Run, Tracker
from tinylm.spread import anyone, gathered, layout, leads
from tinylm.step import State, compiled_loss, compiled_update, spikes
from tinylm.weights import assign, fixed, pure


class TrainingDiverged(RuntimeError):
    """A loss or gradient was not finite. The model holds the weights from before that step."""


class Step(NamedTuple):
    """What one step gave; `str(step)` is a line to print.

    Attributes:
        step: optimiser steps done, this one included.
        loss: mean cross-entropy of this step's batch, nats per predicted token.
        tokens: positions trained on so far (batch x length x steps).
        seconds: training time so far, earlier sittings included.
        tokens_per_second: over about the last ten seconds.
        learning_rate, grad_norm: of this step, before clipping.
        progress: share of the run that is done. eta: seconds to go.
        valid_loss: nats per token on the validation batches, where they were due. valid_bits: the same in bits per
            byte, roughly: windows cut through documents; `evaluate` scores whole ones.
    """

    step: int
    loss: float
    tokens: int
    seconds: float
    tokens_per_second: float
    learning_rate: float
    grad_norm: float
    progress: float
    eta: float
    valid_loss: float | None = None
    valid_bits: float | None = None

    def __str__(self) -> str:
        valid = "" if self.valid_bits is None else f"  valid {self.valid_bits:.3f} bits/byte"
        return (
            f"step {self.step}  {self.progress:4.0%}  loss {self.loss:.3f}{valid}  "
            f"{self.tokens_per_second:,.0f} tokens/s  {self.eta:.0f} s to go"
        )


# --- the loop ---------------------------------------------------------------------------------------------------------

# A CPU maps and clears a program's temporaries anew in every call: 15 to 25 percent of a step. So steps share calls, as
# many as keep an interrupt waiting for a second and a half at most.
CALL, MOST = 1.5, 8

copies = jax.jit(functools.partial(jax.tree.map, jnp.copy))


class Interrupt:
    """Ctrl-C, SIGTERM and SIGHUP become a flag that is looked at between steps; a second one acts as usual.

    `asked` is the signal's number, or 0. Off the main thread, where Python delivers no signals, it does nothing.
    """

    def __init__(self) -> None:
        self.asked = 0
        self._old: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", None)):
                if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                    self._old[number] = signal.signal(number, self._flag)
        return self

    def _flag(self, number: int, frame: Any) -> None:
        self.asked = number
        self._restore()

    def _restore(self) -> None:
        while self._old:
            number, old = self._old.popitem()
            signal.signal(number, old)

    def __exit__(self, *_: object) -> None:
        if threading.current_thread() is threading.main_thread():
            self._restore()


class Trainer:
    """A training run in progress: an iterator of logged steps. Made by `train` and `resume`.

    Iterating again after an interrupt, or after `break`, goes on where it stopped.

    Attributes:
        model: gets the current weights at every yielded step and at the end.
        history: every logged step so far. losses: of every step of this sitting. spikes: steps where they stood out.
        outcome: "running", "done", "interrupted" (a signal; `signal` holds its number), "stopped" (`stop()`, or the
            caller left the loop) or "diverged".
        run: the run folder, or None. last_error: what the disk last refused, or None.
        watched: what a live view draws beside the curves, kept for the next sitting.
    """

    def __init__(
        self,
        model: Transformer,
        data: Tokens | Batches,
        config: TrainConfig,
        *,
        valid: Tokens | Batches | None = None,
        run: Run | None = None,
        tracker: Tracker | None = None,
    ):
        self.model, self.config, self.run = model, config, run
        self.tracker: Tracker = tracker or NoTracker()
        tie = functools.partial(batches_of, model=model.config, tokenizer=model.tokenizer)
        self.batches = tie(data, config) if isinstance(data, Tokens) else data
        self.valid_bytes = valid.bytes_per_prediction if isinstance(valid, Tokens) else None
        try:
            self.valid = tie(valid, config.replace(seed=0)) if isinstance(valid, Tokens) else valid
        except (DataError, ConfigError) as error:
            raise type(error)(f"the held-out text: {error}") from None
        # A batch source of one's own may make other batches than the config says.
        length = getattr(self.batches, "length", config.length or model.config.context)
        self.tokens_per_step = getattr(self.batches, "batch", config.batch) * length
        self.steps = config.steps or -(-config.tokens // self.tokens_per_step)  # 0: the clock decides
        self.graph, params = pure(model)
        self.recipe = optim.Recipe.of(config)
        self.layout = layout(config)
        self._paced = not config.steps_per_call and self.layout is None and device()[0] == "cpu"
        self.update = compiled_update(self.graph, self.recipe, model.config.draws, self.layout)
        params = copies(params)  # the step reuses their buffers; the model keeps its own
        still = fixed(self.graph, params)
        opt = optim.build(self.recipe).init({name: x for name, x in params.items() if name not in still})
        self.state = self._placed(State(params, opt, jnp.int32(0), jnp.bool_(False)))
        self.step, self.seconds = 0, 0.0
        self.history: list[Step] = []
        self.losses, self.spikes = list[float](), list[int]()
        self.outcome, self.signal = "running", 0
        self.last_error: OSError | None = None
        self.watched: dict[str, Any] = {}
        self.kept = run is not None  # by some process, if not by this one
        self._ask, self._over = False, False
        self._clock: float | None = None
        self._flying: collections.deque[tuple[int, float, int, Callable[[], dict]]] = collections.deque()
        self._rates: collections.deque[tuple[float, int]] = collections.deque()
        self._saved_at, self._save_cost, self._saved_step, self._looked = 0.0, 0.0, -1, 0
        self._together = config.steps_per_call or 1

    # - asking -

    def stop(self) -> None:
        """Ask the loop to end after the step it is in."""
        self._ask = True

    @property
    def elapsed(self) -> float:
        """Training seconds, earlier sittings included; the clock runs only while the loop does."""
        return self.seconds + (0.0 if self._clock is None else time.perf_counter() - self._clock)

    @property
    def progress(self) -> float:
        """Share of the run that is done, 0 to 1."""
        return min(1.0, self.step / self.steps if self.steps else self.elapsed / self.config.budget)

    # - going -

    def __iter__(self) -> Iterator[Step]:
        """Yield every logged step (each `log_every`-th, each validated one, the last); the model then is current."""
        for step in self.every_step():
            if self.history and step is self.history[-1]:
                self.sync()
                yield step

    def every_step(self) -> Generator[Step, None, None]:
        """Yield after every step and leave the model alone: what a live view drives. `sync` updates the model.

        Raises:
            TrainingDiverged: naming the step; model and run folder hold the state before it.
        """
        self.outcome, self.signal, self._ask, self._clock = "running", 0, False, time.perf_counter()
        self._over = self.progress >= 1.0
        self.tracker.start({"model": self.model.config.to_dict(), "train": self.config.to_dict()})
        with Interrupt() as interrupt:
            try:
                while not (self._over or self._stops(interrupt)):
                    sent = self._launch()
                    due = self._due(interrupt)
                    # At most two calls are in flight, so an interrupt waits for no more; what is due needs all of them
                    # landed, so that it sees the state of exactly this step.
                    while len(self._flying) > (0 if due or self._paced else sent):
                        step = self._land()
                        yield self._note(step) if due and not self._flying else step
                while self._flying:
                    step = self._land()
                    yield step if self._flying else self._note(step)
                self.outcome = "interrupted" if interrupt.asked else "stopped" if self._ask else "done"
                self.signal = interrupt.asked
            finally:
                self._finish()

    def _launch(self) -> int:
        """Send the next steps to the device, which works while Python goes on; returns how many."""
        batches, done = self._next(self._batch)
        count = len(batches)
        steps = range(self.step, self.step + count)
        rates = [optim.rate(self.config, step, share) for step, share in zip(steps, done, strict=True)]
        room = MOST - count if self._paced else 0
        given = np.array(rates + room * [0.0], np.float32), np.uint32(self.config.seed)
        number, begun = (np.int32(count),) if self._paced else (), time.perf_counter()
        self.state, figures = self.update(self.state, batches + room * batches[-1:], *given, *number)
        fetched = functools.cache(lambda: jax.device_get(figures))
        if self._paced and fetched() and self._rates:  # the first call compiles, and says nothing of the speed
            each = (time.perf_counter() - begun) / count
            self._together = max(1, min(MOST, 2 * self._together, int(CALL / each)))
        self._flying += [(step + 1, rate, i, fetched) for i, (step, rate) in enumerate(zip(steps, rates, strict=True))]
        self.step += count
        return count

    def _stops(self, interrupt: Interrupt) -> bool:
        """Whether the loop was asked to end; several processes agree on it, where they log."""
        asked = bool(interrupt.asked or self._ask)
        return asked if jax.process_count() == 1 else self.step % self.config.log_every == 0 and anyone(asked)

    def _placed(self, state: State) -> State:
        return state if self.layout is None else self.layout.place(state)

    def _next(self, batch: Callable[[int], Batch]) -> tuple[list[Batch], list[float]]:
        """The batches of the steps that go to the device together, and the share of the run done before each."""
        progress, batches = self.progress, [batch(self.step)]
        for step in range(self.step + 1, self.step + self._steps_together()):
            batches.append(batch(step))
            if not alike(*batches[-2:]):  # a step's arithmetic depends on its own batch alone, never on its neighbours
                batches.pop()
                break
        return batches, [(self.step + i) / self.steps if self.steps else progress for i in range(len(batches))]

    def _batch(self, step: int) -> Batch:
        return self._picked(self.batches(step), self.config.accumulate)

    def _picked(self, batch: Batch, parts: int) -> Batch:
        if self.layout is not None:
            return self.layout.batch(batch)
        return picking(batch, self.config.mask_rate if self.config.objective == "mlm" else 1.0, parts)

    def _steps_together(self) -> int:
        """As many as share a call, and not beyond a step after which something is due."""
        ends = [self.config.log_every, self.config.eval_every] if self._together > 1 else []
        left = [every - self.step % every for every in ends if every]
        left += [self.config.until_milestone(self.step)] if self.config.milestones else []
        return min([self._together, *left, *([self.steps - self.step] if self.steps else [])])

    def _due(self, interrupt: Interrupt) -> bool:
        """Whether the newest step is to be logged, validated or saved; here, and only here, it becomes the last one."""
        every = self.config.eval_every
        self._over = self.progress >= 1.0
        return bool(
            self.step % self.config.log_every == 0
            or (every and self.step % every == 0)
            or self._over
            or self._stops(interrupt)
            or self._save_is_due()
            or self._is_milestone(self.step)
        )

    def _land(self) -> Step:
        """Wait for the oldest step in flight and take its figures."""
        number, learning_rate, index, fetched = self._flying.popleft()
        return self._taken(number, learning_rate, {name: values[index] for name, values in fetched().items()})

    def _taken(self, number: int, learning_rate: float, figures: dict[str, Any]) -> Step:
        """A step from its number and figures. Raises TrainingDiverged."""
        if figures["halted"]:
            self._diverge(number, figures)
        self.losses.append(float(figures["loss"]))
        now, tokens = self.elapsed, number * self.tokens_per_step
        if not self._rates:
            self._rates.append((now, tokens))  # the first step compiles; speed counts from its end
        (then, before), speed = self._rates[0], 0.0
        if now > then:
            speed = (tokens - before) / (now - then)
            self._rates.append((now, tokens))
            while now - self._rates[0][0] > 10:
                self._rates.popleft()
        if self.steps:
            done = number / self.steps
            eta = (self.steps - number) * self.tokens_per_step / speed if speed else math.inf
        else:
            done = min(1.0, now / self.config.budget)
            eta = max(0.0, self.config.budget - now)
        norm = float(figures["grad_norm"])
        return Step(number, self.losses[-1], tokens, now, speed, learning_rate, norm, done, eta)

    def _note(self, step: Step) -> Step:
        """Validate, log and save what is due at this step, which is the newest."""
        every = self.config.eval_every
        if self._over:
            step = step._replace(progress=1.0, eta=0.0)
        if self.valid is not None and (self._over or (every and step.step % every == 0)):
            step = step._replace(**self.validate())
        self.history.append(step)
        record = {k: v for k, v in step._asdict().items() if v is not None and k not in ("eta", "progress")}
        new = [step.step - len(self.losses) + 1 + i for i in spikes(self.losses, self._looked)]
        record |= {"spikes": new} if new else {}
        self.spikes, self._looked = self.spikes + new, len(self.losses)
        if self.run is not None:
            with self._warned("a line of the log has to wait"):
                self.run.log(record)
        self.tracker.log(record)
        if self._save_is_due() or self._is_milestone(self.step):
            self._saved_at = self.elapsed  # also where it fails: try again after as long
            with self._warned(f"no checkpoint at step {self.step}"):
                self.save()
        return step

    def _diverge(self, number: int, figures: dict) -> None:
        self._flying.clear()
        self.step = int(self.state.step)
        self.state = self._placed(self.state._replace(halted=jnp.bool_(False)))
        self.outcome = "diverged"
        indices = getattr(self.batches, "indices", None)
        where = "" if indices is None else f" on windows {', '.join(map(str, indices(number - 1)[:8]))}, ..."
        raise TrainingDiverged(
            f"step {number}{where}: loss {figures['loss']:.4g}, gradient norm {figures['grad_norm']:.4g}. The model "
            f"holds the weights of step {self.step}; try a lower learning_rate (now {self.config.learning_rate:g}) or "
            "more warmup"
        )

    def _finish(self) -> None:
        """However the loop ended: the model gets the whole state, and the run folder a checkpoint of it."""
        if self.outcome == "running":  # the caller left the loop, or an error of his passed through it
            self.outcome = "stopped"
        with contextlib.suppress(TrainingDiverged):
            while self._flying:
                step = self._land()
                if not self._flying:
                    self._note(step)
        self.seconds, self._clock = self.elapsed, None
        self.sync()
        try:
            if self.kept and self._saved_step != self.step:
                self.save()
            if self.run is not None and self.outcome == "done":
                self.run.close()  # so that it can be resumed from this very process
        finally:
            self.tracker.finish(self.outcome)

    # - state -

    def sync(self) -> None:
        """Give the model the current weights (copies: the loop goes on with its own)."""
        params = optim.evaluated(self.state.params, self.state.opt)
        assign(self.model, copies(params if self.layout is None else gathered(params)))

    def validate(self) -> dict[str, float]:
        """Nats per token on `eval_batches` fixed validation batches, and bits per byte where the bytes are known."""
        assert self.valid is not None
        loss = compiled_loss(self.graph)
        params = optim.evaluated(self.state.params, self.state.opt)
        sums = [loss(params, self._picked(self.valid(i), 1)) for i in range(self.config.eval_batches)]
        nats, weight = (float(sum(part)) for part in zip(*sums, strict=True))
        found = {"valid_loss": nats / weight}
        if self.valid_bytes and self.config.objective == "next_token":
            found["valid_bits"] = found["valid_loss"] / math.log(2) / self.valid_bytes
        return found

    def tensors(self) -> dict[str, np.ndarray]:
        """The whole state by name: `params.*`, `opt.*`, `step`."""
        state = {"params": self.state.params, "opt": self.state.opt, "step": self.state.step}
        leaves, _ = jax.tree_util.tree_flatten_with_path(gathered(state))
        return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}

    def adopt(self, tensors: dict[str, np.ndarray], seconds: float = 0.0) -> None:
        """Go on from a state that `tensors` gave. Raises StateMismatch, naming the differences, and changes nothing."""
        require_match(self.tensors(), tensors, "the saved training state")
        template = {"params": self.state.params, "opt": self.state.opt, "step": self.state.step}
        leaves, shape = jax.tree_util.tree_flatten_with_path(template)
        names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
        state = jax.tree_util.tree_unflatten(shape, [jnp.array(tensors[name]) for name in names])
        self.state = self._placed(State(**state, halted=jnp.bool_(False)))
        self.step, self.seconds, self._saved_at, self._saved_step = int(tensors["step"]), seconds, seconds, -1
        self.sync()

    def save(self) -> Path | None:
        """Write a checkpoint of the newest state now; of several processes all must ask, and the first writes.

        Raises OSError from the disk, ValueError without `out`.
        """
        if not self.kept:
            raise ValueError('this training has no folder: give train(..., out="runs/name")')
        begun, tensors, path = time.perf_counter(), self.tensors(), None
        if self.run is not None:
            path = self.run.save(self.step, tensors, {"seconds": self.elapsed}, codec=self.config.codec)
            self.run.prune(self.config.keep, filter(self._is_milestone, self.run.steps()))
        self._saved_step, self._saved_at, self._save_cost = self.step, self.elapsed, time.perf_counter() - begun
        return path

    def _save_is_due(self) -> bool:
        """Saving takes at most one percent of the time, however slow the disk."""
        if not (self.kept and self.config.save_every):
            return False
        due = self.elapsed - self._saved_at >= max(self.config.save_every, 100 * self._save_cost)
        return due if jax.process_count() == 1 else self.step % self.config.log_every == 0 and anyone(due)

    def _is_milestone(self, step: int) -> bool:
        return self.kept and step > 0 and self.config.until_milestone(step - 1) == 1

    @contextlib.contextmanager
    def _warned(self, what: str) -> Iterator[None]:
        """Hours of training are worth more than a file: say what the disk refused, and go on."""
        try:
            yield
        except OSError as error:
            self.last_error = error
            warnings.warn(f"{what}: {error}; training goes on", stacklevel=5)


def train(
    model: Transformer,
    data: Tokens | Batches,
    config: TrainConfig,
    *,
    valid: Tokens | Batches | None = None,
    out: str | os.PathLike | None = None,
    tracker: Tracker | None = None,
) -> Trainer:
    """Train `model`; iterate over what this returns.

    Args:
        model: trained in place.
        data: token shards, from which `config` makes batches; or any function of the step number that gives `Batch`es
            and depends on nothing else.
        config: how long, how fast, how.
        valid: held-out tokens or batches; validated every `eval_every` steps and at the end.
        out: a new folder for settings, tokenizer, run.jsonl and checkpoints; without it nothing is written.
        tracker: gets every logged record too.

    Raises:
        ConfigError: data, model and objective do not fit. FileExistsError: `out` holds something already.
    """
    trainer = Trainer(model, data, config, valid=valid, tracker=tracker)
    if out is not None:
        trainer.run, trainer.kept = create(trainer, Path(out), data, valid) if leads() else None, True
    return trainer


def create(trainer: Trainer, out: Path, data: Tokens | Batches, valid: Tokens | Batches | None) -> Run:
    """The new folder of a trainer's run."""
    about = {"train": describe(data, out), "valid": describe(valid, out)}
    model = trainer.model
    return Run.create(out, model=model.config, train=trainer.config, tokenizer=model.tokenizer, data=about)


def describe(data: Tokens | Batches | None, out: Path) -> dict[str, Any] | None:
    """What config.json keeps of the data: where it lies, and its hash."""
    if not isinstance(data, Tokens):
        return None
    folder = None if data.folder is None else Path(data.folder).absolute()
    if folder is not None and folder.is_relative_to(out.absolute()):
        folder = folder.relative_to(out.absolute())  # a run folder that holds its own data may be moved
    return {"folder": None if folder is None else str(folder), "split": data.split, "sha256": data.sha256}
