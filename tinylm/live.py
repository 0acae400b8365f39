"""Train with something to look at: `await fit(...)` in a notebook, `fit(...).run()` in a script.

    trainer = await fit(model, tokens, TrainConfig(budget=120), valid=held_out)
    trainer = await fit(trainer)          # goes on after Stop or Interrupt, or with what `resume(folder)` gave

The view only looks: losses and weights are bit for bit those of `train`, whatever the display does. It is redrawn at
most four times a second and for at most one percent of the time; what goes wrong in it is counted, never raised.

Awaiting hands control back once per step, which is what lets a Stop button work: a cell that blocks never sees its
click. Both forms end with the model whole when interrupted, and without a traceback.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any, Protocol, TextIO

from tinylm import show
from tinylm.config import TrainConfig
from tinylm.generation import stream
from tinylm.markup import Picture, duration, visible
from tinylm.model import Transformer
from tinylm.training import Step, Trainer, train

UPDATES = 0.25  # seconds between two drawings, at least
DRAWING = 0.01  # share of the time that drawing may take
TELLING = 0.03  # share of the time that samples may take, compilation aside
SAMPLE = 120  # tokens

# --- fit --------------------------------------------------------------------------------------------------------------


class Fit:
    """A training about to be watched: `await` it, or `run()` it; both give the `Trainer`."""

    def __init__(self, make: Callable[[], Trainer], view: View | None, remembered: dict[str, Any]):
        self._make, self._view, self._options = make, view, remembered

    def __repr__(self) -> str:
        return "this training has not begun: write `trainer = await fit(...)`, or `fit(...).run()` where await is not"

    def __await__(self) -> Generator[Any, None, Trainer]:
        return self._go().__await__()

    def _start(self, stoppable: bool) -> tuple[Trainer, Watch]:
        trainer = self._make()
        # What was drawn beside the curves is drawn again when the training goes on.
        options = {**trainer.watched, **{k: v for k, v in self._options.items() if v is not None}}
        if callable(options.get("watch")):
            options["watch"] = options["watch"](trainer)
        trainer.watched = options
        view = self._view if self._view is not None else NotebookView(stoppable) if in_notebook() else TerminalView()
        return trainer, Watch(trainer, view, **options)

    async def _go(self) -> Trainer:
        watch = None
        try:
            trainer, watch = self._start(stoppable=True)
            with watch, contextlib.closing(trainer.every_step()) as steps:
                for step in steps:
                    watch.look(step)
                    await asyncio.sleep(0)
        except asyncio.CancelledError:
            # A kernel says Interrupt this way when the loop's own guard has gone: the steps are closed, the model is
            # whole, so the cell may end quietly. Elsewhere a cancelled task has to say so.
            task = asyncio.current_task()
            if watch is None or task is None or not in_notebook():
                raise
            task.uncancel()
        return trainer

    def run(self) -> Trainer:
        """Train until done, stopped or interrupted, without an event loop. In a script a second Ctrl-C is final."""
        with Patience() as patience:
            trainer, watch = self._start(stoppable=False)
            with watch, contextlib.closing(trainer.every_step()) as steps:
                for step in steps:
                    watch.look(step)
                    if patience.asked:
                        trainer.stop()
        return trainer


def fit(
    model: Transformer | Trainer,
    data: Any = None,
    config: TrainConfig | None = None,
    *,
    valid: Any = None,
    out: str | os.PathLike | None = None,
    floor: float | None = None,
    baselines: Mapping[str, float] | None = None,
    prompt: str | None = None,
    sample_every: float | None = None,
    watch: Callable[[Trainer], Panel] | None = None,
    tracker: Any = None,
    view: View | None = None,
) -> Fit:
    """Train and watch. Await what this returns, or call its `run()`.

    Args:
        model: a model, with `data` and `config` as in `train`; or a `Trainer` alone, which goes on where it is.
        valid, out, tracker: as in `train`.
        floor, baselines: bits per byte, drawn into the curve: what no model can beat, and what a model should.
        prompt: beginning of the sample (default: none). sample_every: seconds between samples, default 15; 0 is none.
        watch: what else to draw: a function that is given the trainer and returns a `Panel`, such as
            `tinylm.quantization.Watched`; it looks at the weights whenever the view is drawn.
        view: default a live picture in a notebook, a line of text elsewhere.

    Raises:
        TypeError: a trainer together with what only a new one takes. What `train` raises, once it is awaited or run.
    """
    options = {
        "floor": floor, "baselines": baselines, "prompt": prompt, "sample_every": sample_every, "watch": watch,
    }  # fmt: skip
    if isinstance(model, Trainer):
        given = {"data": data, "config": config, "valid": valid, "out": out, "tracker": tracker}
        extra = [name for name, value in given.items() if value is not None]
        if extra:
            raise TypeError(f"fit(trainer) goes on with what the trainer has; leave out {', '.join(extra)}")
        return Fit(lambda: model, view, options)
    if data is None or config is None:
        raise TypeError("fit(model, data, config): data and config are missing; only a Trainer goes on without them")
    return Fit(lambda: train(model, data, config, valid=valid, out=out, tracker=tracker), view, options)


class Patience:
    """In a notebook, lets a second Interrupt wait for the step too: there the training's state has to outlive it."""

    def __init__(self) -> None:
        self.asked, self._old = False, None

    def __enter__(self) -> Patience:
        if in_notebook() and threading.current_thread() is threading.main_thread():
            self._old = signal.signal(signal.SIGINT, self._ask)
        return self

    def _ask(self, *_: object) -> None:
        self.asked = True

    def __exit__(self, *_: object) -> None:
        if self._old is not None:
            signal.signal(signal.SIGINT, self._old)


def in_notebook() -> bool:
    """Whether the code runs in a Jupyter kernel."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None


# --- watching ---------------------------------------------------------------------------------------------------------


class View(Protocol):
    """Where a training is shown. All three may raise: that is counted and changes nothing."""

    def open(self, trainer: Trainer) -> None: ...
    def draw(self, trainer: Trainer, step: Step | None, **extras: Any) -> None: ...
    def close(self, trainer: Trainer, step: Step | None, **extras: Any) -> None: ...


class Panel(Protocol):
    """Something to draw beside the curves of a training."""

    def look(self) -> Any: ...
    def picture(self) -> Picture: ...


class Watch:
    """Decides when a view draws and when the model tells a sample, and keeps their mistakes away from the training.

    Attributes:
        errors: mistakes of the display so far. last_error: the newest one.
    """

    def __init__(
        self,
        trainer: Trainer,
        view: View,
        *,
        floor: float | None = None,
        baselines: Mapping[str, float] | None = None,
        prompt: str = "",
        sample_every: float = 15.0,
        watch: Panel | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.trainer, self.view, self.clock, self.panel = trainer, view, clock, watch
        self.extras: dict[str, Any] = {"floor": floor, "baselines": baselines, "story": None}
        self.errors, self.last_error = 0, None
        self.step: Step | None = None
        self.prompt = prompt
        able = trainer.model.tokenizer is not None and trainer.model.config.kind == "decoder"
        self.sample_every = sample_every if able else 0.0
        self._next_drawing = self._next_piece = 0.0
        self._next_sample = clock() + sample_every / 3
        self._telling: Iterator[str] | None = None
        self._told, self._told_at, self._pieces = "", 0, 0

    def __enter__(self) -> Watch:
        self._guarded(self.view.open, self.trainer)
        return self

    def look(self, step: Step) -> None:
        """Called after every step: almost always two comparisons."""
        self.step, now = step, self.clock()
        if self.sample_every and now >= (self._next_piece if self._telling is not None else self._next_sample):
            self._guarded(self._tell)
            now = self.clock()
        if now >= self._next_drawing:
            self._guarded(self._look_beside)
            self._guarded(self.view.draw, self.trainer, step, **self._shown())
            spent = self.clock() - now
            self._next_drawing = now + max(UPDATES, spent / DRAWING)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is asyncio.CancelledError:
            self.trainer.outcome = "interrupted"
        if self.sample_every and self.trainer.outcome == "done":
            self._telling = None
            self._guarded(self._tell_all)
        self._guarded(self._look_beside)
        self._guarded(self.view.close, self.trainer, self.step, **self._shown())

    def _look_beside(self) -> None:
        if self.panel is not None:
            self.panel.look()
            self.extras["panel"] = self.panel.picture()

    def _tell(self) -> None:
        """A few more tokens of the sample; the next ones when this has become `TELLING` of the time."""
        begun = self.clock()
        if self._telling is None:
            self.trainer.sync()
            self._told, self._told_at, self._next_sample = "", self.trainer.step, begun + self.sample_every
            self._telling = self._pieces_of()
        piece = next(self._telling, None)
        spent = self.clock() - begun
        self._pieces += 1
        # The first piece compiles, for seconds: that is paid once and does not make the others late.
        self._next_piece = begun + spent + (0.0 if self._pieces == 1 else spent / TELLING)
        if piece is not None:
            self._told += piece
        else:
            self._telling = None
            self._finish_story()

    def _tell_all(self) -> None:
        self._told, self._told_at = "".join(self._pieces_of()), self.trainer.step
        self._finish_story()

    def _pieces_of(self) -> Iterator[str]:
        model = self.trainer.model
        fitting = max(16, min(SAMPLE, model.config.context - 32))  # beyond the context more would have to be compiled
        return stream(model, self.prompt, tokens=fitting, seed=self.trainer.config.seed)

    def _finish_story(self) -> None:
        title = f"a sample at step {self._told_at:,}, temperature 0.8"
        self.extras["story"] = show.sample(self.prompt + self._told, title, prompt=self.prompt)

    def _shown(self) -> dict[str, Any]:
        if not self.errors:
            return self.extras
        said = f"{self.errors} display errors, the last: {type(self.last_error).__name__}: {self.last_error}"[:300]
        return {**self.extras, "notes": [f"{said} (the training is not affected)"]}

    def _guarded(self, call: Callable[..., None], *args: Any, **named: Any) -> None:
        try:
            call(*args, **named)
        except Exception as error:  # whatever a display does, hours of training are worth more
            self.errors, self.last_error = self.errors + 1, error


# --- notebook ---------------------------------------------------------------------------------------------------------


class NotebookView:
    """One output, redrawn in place as static HTML, and a Stop button while a click can be heard."""

    def __init__(self, stoppable: bool = True):
        self.stoppable = stoppable
        self._handle: Any = None
        self._button: Any = None
        self._place: Any = None

    def open(self, trainer: Trainer) -> None:
        from IPython.display import display

        hint = "Interrupt the kernel (■) to stop; the model stays usable."
        bundle = {"text/plain": hint, "text/html": show.framed(show.tag("div", hint, style=show.FAINT))}
        if self.stoppable:
            with contextlib.suppress(ImportError):
                from ipywidgets import Button

                self._button = Button(
                    description="Stop", icon="stop", tooltip="End after this step; the model stays usable"
                )
                self._button.on_click(lambda _: self._stop(trainer))
                bundle = {**self._button._repr_mimebundle_(), "text/plain": hint}
        self._place = display(bundle, raw=True, display_id=True)
        picture = show.run_summary(trainer)
        self._handle = display(bundle_of(picture), raw=True, display_id=True)

    def _stop(self, trainer: Trainer) -> None:
        trainer.stop()
        self._button.description, self._button.disabled = "Stopping", True

    def draw(self, trainer: Trainer, step: Step | None, **extras: Any) -> None:
        if self._handle is not None:
            self._handle.update(bundle_of(show.run_summary(trainer, step=step, **extras)), raw=True)

    def close(self, trainer: Trainer, step: Step | None, **extras: Any) -> None:
        try:
            self.draw(trainer, step, **extras)
        finally:  # no dead button stays behind, neither now nor in the saved notebook
            if self._place is not None:
                self._place.update({"text/plain": "", "text/html": ""}, raw=True)
            if self._button is not None:
                self._button.close()


def bundle_of(picture: Picture) -> dict[str, str]:
    """A picture by media type, as Jupyter's messages carry it."""
    return {"text/html": str(picture.html), "text/plain": picture.text}


# --- terminal ---------------------------------------------------------------------------------------------------------


class TerminalView:
    """One line that is rewritten on a terminal; elsewhere a plain line now and then, without control codes."""

    def __init__(self, stream: TextIO | None = None, *, every: float = 10.0, width: int = 0):
        """`stream`: default stderr. `every`: seconds between plain lines. `width`: columns, 0 asks the terminal."""
        self.stream = stream if stream is not None else sys.stderr
        self.every, self.width = every, width
        self.live = bool(getattr(self.stream, "isatty", lambda: False)()) and os.environ.get("TERM") != "dumb"
        self.color = self.live and not os.environ.get("NO_COLOR")
        self._next = -math.inf

    def open(self, trainer: Trainer) -> None:
        if trainer.progress < 1.0:
            self._write("compiling the first step")

    def draw(self, trainer: Trainer, step: Step | None, **extras: Any) -> None:
        if step is None or (not self.live and step.seconds < self._next):
            return
        self._next = step.seconds + self.every
        self._write(self._line(trainer, step, extras.get("floor")), step.progress)

    def close(self, trainer: Trainer, step: Step | None, **extras: Any) -> None:
        if step is not None:
            self._write(self._line(trainer, step, extras.get("floor")), step.progress)
        self.stream.write(("\n" if self.live else "") + show.SAID[trainer.outcome] + "\n")
        if extras.get("story") is not None:
            self.stream.write(extras["story"].text + "\n")
        for note in extras.get("notes", ()):
            self.stream.write(visible(note) + "\n")
        self.stream.flush()

    def _line(self, trainer: Trainer, step: Step, floor: float | None) -> str:
        valid = next((s.valid_bits for s in reversed(trainer.history) if s.valid_bits is not None), None)
        said = "" if valid is None else f"  {valid:.3f} bits/byte" + ("" if floor is None else f" (floor {floor:.3f})")
        left = f"  {duration(step.eta)} to go" if step.progress < 1 else f"  {duration(step.seconds)}"
        speed = f"  {step.tokens_per_second:,.0f} tokens/s" if step.tokens_per_second else ""
        return f"{step.progress:4.0%}  step {step.step:,}  loss {step.loss:.3f}{said}{speed}{left}"

    def _write(self, line: str, progress: float | None = None) -> None:
        if not self.live:
            self.stream.write(line + "\n")
        else:
            width = (self.width or shutil.get_terminal_size().columns) - 1  # a full last column would wrap
            bar = ""
            if progress is not None and width >= 70:
                done = round(16 * progress)
                bar = "━" * done + "─" * (16 - done) + " "
            line = (bar + line)[:width].ljust(width)
            if self.color and bar:
                line = f"\x1b[34m{line[: len(bar)]}\x1b[0m{line[len(bar) :]}"
            self.stream.write("\r" + line)
        self.stream.flush()
