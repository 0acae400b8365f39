"""Watching a training changes nothing in it: exact under interrupts, stops, cancellation and broken displays."""

import asyncio
import contextlib
import io
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from tinylm import live, show
from tinylm import training as trains
from tinylm.config import ModelConfig, TrainConfig
from tinylm.data import Windows
from tinylm.live import TerminalView, Watch, fit
from tinylm.model import Transformer
from tinylm.quantization import Watched
from tinylm.quantization.spec import QuantizationError
from tinylm.shards import Tokens
from tinylm.techniques import edit
from tinylm.tokenizer import Tokenizer
from tinylm.weights import named

TEXT = "The cat sat on the mat. A dog ran to the cat, and the cat ran away. " * 60
STEPS = 60


@pytest.fixture(scope="module")
def data():
    tokenizer = Tokenizer.train([TEXT], vocab=290)
    ids = np.concatenate([[tokenizer.end], tokenizer.encode(TEXT), [tokenizer.end]])
    tokens = Tokens.from_array(ids, vocab=290, bytes=len(TEXT), end=tokenizer.end, tokenizer=tokenizer.sha256)
    tokens.tokenizer = tokenizer
    return tokens


def new(data, **changes):
    """A fresh model with what `fit` wants beside it."""
    config = ModelConfig(vocab=290, context=16, width=16, layers=1, heads=2)
    usual = {"steps": STEPS, "batch": 2, "warmup": 4, "log_every": 7, "eval_every": 20, "eval_batches": 1}
    return Transformer(config, tokenizer=data.tokenizer), data, TrainConfig(**{**usual, **changes})


@pytest.fixture(scope="module")
def reference(data):
    """Losses and weights of the plain loop."""
    model, tokens, config = new(data)
    trainer = trains.train(model, tokens, config, valid=tokens)
    list(trainer)
    return trainer.losses, {name: np.asarray(w) for name, w in named(model).items()}


def same(trainer, reference):
    losses, weights = reference
    assert trainer.losses == losses
    assert all(np.array_equal(w, weights[name]) for name, w in named(trainer.model).items())


class Recorder:
    """A view that keeps what it is told, and does something at each drawing."""

    def __init__(self, do=lambda trainer, step: None):
        self.calls, self.do, self.extras = [], do, {}

    def open(self, trainer):
        self.calls.append("open")

    def draw(self, trainer, step, **extras):
        self.calls.append(step.step)
        self.do(trainer, step)

    def close(self, trainer, step, **extras):
        self.calls.append("close")
        self.extras = extras


@pytest.fixture
def every_step(monkeypatch):
    """No throttle: every step is drawn."""
    monkeypatch.setattr(live, "UPDATES", 0.0)
    monkeypatch.setattr(live, "DRAWING", float("inf"))


def waited(awaitable):
    async def main():
        return await awaitable

    return asyncio.run(main())


# --- the same training ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["run", "await"])
def test_watching_changes_no_bit(data, reference, every_step, form):  # P20
    view = Recorder()
    model, tokens, config = new(data)
    watched = fit(model, tokens, config, valid=tokens, view=view, prompt="The", sample_every=0.01)
    trainer = watched.run() if form == "run" else waited(watched)
    same(trainer, reference)
    assert trainer.model is model
    assert trainer.outcome == "done"
    assert view.calls == ["open", *range(1, STEPS + 1), "close"]
    assert f"step {STEPS}" in view.extras["story"].text
    assert view.extras["story"].text.splitlines()[1].startswith("The")


def test_fifty_display_errors_change_no_bit(data, reference, every_step):  # P20
    def fail(trainer, step):
        raise RuntimeError("no screen <script>")

    view = Recorder(fail)
    trainer = fit(*new(data), valid=data, view=view, sample_every=0).run()
    same(trainer, reference)
    assert len(view.calls) - 2 == STEPS >= 50
    assert view.extras["notes"] == [
        f"{STEPS} display errors, the last: RuntimeError: no screen <script> (the training is not affected)"
    ]


def test_a_view_that_cannot_open_or_close_changes_no_bit(data, reference):  # P20
    broken = SimpleNamespace(open=lambda t: 1 / 0, draw=lambda t, s, **k: 1 / 0, close=lambda t, s, **k: 1 / 0)
    same(fit(*new(data), valid=data, view=broken).run(), reference)


def test_a_sample_that_fails_changes_no_bit(data, reference, monkeypatch):
    monkeypatch.setattr(live, "stream", lambda *_, **__: 1 / 0)
    view = Recorder()
    same(fit(*new(data), valid=data, view=view, sample_every=0.01).run(), reference)
    assert "ZeroDivisionError" in view.extras["notes"][0]


def test_a_panel_looks_at_the_weights_and_changes_no_bit(data, every_step):
    def ternary():
        model, tokens, config = new(data, steps=6)
        return edit(model, r"blocks\..*\.(up|q)", "ternary"), tokens, config

    view, (model, tokens, config) = Recorder(), ternary()
    trainer = fit(model, tokens, config, view=view, sample_every=0, watch=Watched).run()
    plain = trains.train(*ternary())
    list(plain)
    assert trainer.losses == plain.losses
    seen = trainer.watched["watch"]
    looks = next(iter(seen.history.values()))
    assert len(looks) == 8
    assert looks[0].step == 0
    assert looks[-1].step == 6
    assert all(0.1 < one.zeros < 0.6 for one in looks)
    assert "codes at step 6" in view.extras["panel"].text
    assert "% zero" in show.run_summary(trainer, panel=seen.picture()).html


def test_a_panel_that_fails_is_counted_and_one_that_cannot_begin_says_so(data, reference, every_step):
    view = Recorder()
    broken = SimpleNamespace(look=lambda: 1 / 0, picture=lambda: None)
    same(fit(*new(data), valid=data, view=view, sample_every=0, watch=broken).run(), reference)
    assert "ZeroDivisionError" in view.extras["notes"][0]
    with pytest.raises(QuantizationError, match="no matrix of this model has codes"):
        fit(*new(data), watch=Watched).run()


def test_models_that_cannot_tell_tell_nothing(data):
    model, tokens, config = new(data, steps=3)
    model.tokenizer = None
    view = Recorder()
    fit(model, tokens, config, view=view, sample_every=0.001).run()
    assert view.extras["story"] is None


# --- ending early and going on ----------------------------------------------------------------------------------------


def at(number, do):
    return Recorder(lambda trainer, step: do(trainer) if step.step == number else None)


ASK = {
    "stopped": lambda trainer: trainer.stop(),
    "interrupted": lambda trainer: signal.raise_signal(signal.SIGINT),
}


@pytest.mark.parametrize("form", ["run", "await"])
@pytest.mark.parametrize("outcome", ASK)
def test_stopping_and_going_on_repeats_the_whole(data, reference, every_step, form, outcome):  # P17, P18
    go = (lambda f: f.run()) if form == "run" else waited
    trainer = go(fit(*new(data), valid=data, floor=0.25, view=at(11, ASK[outcome])))
    assert trainer.outcome == outcome
    assert 11 <= trainer.step <= 11 + trains.MOST
    assert len(trainer.losses) == trainer.step
    assert np.isfinite(np.asarray(trainer.model(jax.numpy.zeros((1, 4), int)))).all()
    view = Recorder()
    assert go(fit(trainer, view=view)) is trainer
    same(trainer, reference)
    assert view.extras["floor"] == 0.25  # remembered


@pytest.mark.parametrize("count", [30, pytest.param(1000, marks=pytest.mark.slow)])
def test_interrupts_anywhere(count, data, reference):  # P17
    """Signals from outside at any moment, in both forms, until the training is done."""
    trainer, asked = None, 0
    while asked < count:
        model, tokens, config = new(data)
        watched = fit(model, tokens, config, valid=tokens, view=Recorder(), sample_every=0.02)
        while True:
            started = threading.Event()
            before = trains.Interrupt.__enter__

            def entered(self, before=before, started=started):
                started.set()
                return before(self)

            trains.Interrupt.__enter__ = entered
            old = signal.signal(signal.SIGINT, lambda *_: None)  # what comes too late is not the training's
            timer = threading.Thread(
                target=lambda wait, go: go.wait() and (time.sleep(wait), os.kill(os.getpid(), signal.SIGINT)),
                args=(0.04 * np.random.default_rng(asked).random(), started),
            )
            timer.start()
            try:
                trainer = watched.run() if asked % 2 else waited(watched)
            finally:
                trains.Interrupt.__enter__ = before
                timer.join()
                signal.signal(signal.SIGINT, old)
            asked += 1
            assert trainer.losses == reference[0][: trainer.step]
            if trainer.outcome == "done":
                break
            watched = fit(trainer, view=Recorder())
        same(trainer, reference)


def test_a_cancelled_task_says_so_in_a_script(data, reference, every_step):  # P17
    kept = []

    async def main():
        task = asyncio.ensure_future(fit(*new(data), valid=data, view=at(9, lambda t: (kept.append(t), task.cancel()))))
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    (trainer,) = kept
    assert trainer.outcome == "interrupted"
    same(fit(trainer, view=Recorder()).run(), reference)


def test_a_cancelled_cell_ends_quietly_in_a_notebook(data, reference, every_step, monkeypatch):  # P17
    monkeypatch.setattr(live, "in_notebook", lambda: True)

    async def main():
        task = asyncio.ensure_future(fit(*new(data), valid=data, view=at(9, lambda t: task.cancel())))
        trainer = await task
        assert trainer.outcome == "interrupted"
        return await fit(trainer, view=Recorder())

    same(asyncio.run(main()), reference)


def test_a_second_interrupt_is_patient_in_a_notebook_and_final_in_a_script(data, reference, every_step, monkeypatch):
    twice = lambda t: (signal.raise_signal(signal.SIGINT), signal.raise_signal(signal.SIGINT))  # noqa: E731
    with pytest.raises(KeyboardInterrupt):
        fit(*new(data), valid=data, view=at(9, twice)).run()
    monkeypatch.setattr(live, "in_notebook", lambda: True)
    before = signal.getsignal(signal.SIGINT)
    trainer = fit(*new(data), valid=data, view=at(9, twice)).run()
    assert trainer.outcome == "interrupted"
    assert signal.getsignal(signal.SIGINT) is before
    same(fit(trainer, view=Recorder()).run(), reference)


def test_the_event_loop_runs_between_steps(data):  # P18
    async def main():
        turns = 0

        async def count():
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        task = asyncio.ensure_future(count())
        await fit(*new(data), view=Recorder(), sample_every=0)
        task.cancel()
        return turns

    assert asyncio.run(main()) >= STEPS


def test_errors_of_the_training_reach_the_caller(data):  # P22
    windows = Windows(data, batch=2, length=16)

    def batches(step):
        if step == 5:
            raise LookupError("no batch 5")
        return windows(step)

    view = Recorder()
    model, _, config = new(data)
    with pytest.raises(LookupError, match="no batch 5"):
        waited(fit(model, batches, config, view=view))
    assert view.calls[-1] == "close"
    assert np.isfinite(np.asarray(model(jax.numpy.zeros((1, 4), int)))).all()


def test_what_fit_takes(data):
    model, tokens, config = new(data, steps=1)
    with pytest.raises(TypeError, match="data and config are missing"):
        fit(model)
    trainer = trains.train(model, tokens, config)
    with pytest.raises(TypeError, match="leave out data, out"):
        fit(trainer, tokens, out="runs/x")
    assert "await fit" in repr(fit(trainer))


# --- cost -------------------------------------------------------------------------------------------------------------


def fake_watch(draw_cost=0.0, piece_cost=0.0, step_cost=0.002, steps=5000, monkeypatch=None):
    """Ten seconds of two-millisecond steps on a clock of our own: (drawings, share drawing, samples, share telling)."""
    spent = {"now": 0.0, "drawing": 0.0, "telling": 0.0, "samples": 0}

    def wait(seconds, what=None):
        spent["now"] += seconds
        if what:
            spent[what] += seconds

    def stream(*_, **__):
        for _i in range(10):
            wait(piece_cost, "telling")
            yield "x"
        spent["samples"] += 1

    monkeypatch.setattr(live, "stream", stream)
    view = Recorder(lambda trainer, step: wait(draw_cost, "drawing"))
    model = SimpleNamespace(tokenizer="yes", config=SimpleNamespace(kind="decoder", context=64))
    trainer = SimpleNamespace(
        model=model, sync=lambda: None, step=1, config=SimpleNamespace(seed=0), outcome="stopped", history=[]
    )
    with Watch(trainer, view, sample_every=2.0, clock=lambda: spent["now"]) as watch:
        for number in range(steps):
            wait(step_cost)
            watch.look(SimpleNamespace(step=number))
    assert watch.errors == 0
    return len(view.calls) - 2, spent


@pytest.mark.parametrize("cost", [0.0, 0.001, 0.02, 0.3])
def test_drawing_is_rare_and_cheap(cost, monkeypatch):  # P21
    drawings, spent = fake_watch(draw_cost=cost, monkeypatch=monkeypatch)
    assert 1 <= drawings <= 4 * spent["now"] + 1
    assert spent["drawing"] <= 0.011 * spent["now"] + cost  # the one that is under way counts on later time
    if cost == 0:
        assert drawings >= 35


@pytest.mark.parametrize("cost", [0.0, 0.002, 0.1])
def test_samples_take_little_time(cost, monkeypatch):  # P21
    _, spent = fake_watch(piece_cost=cost, steps=20_000, monkeypatch=monkeypatch)
    assert spent["telling"] <= 0.031 * spent["now"] + 2 * cost
    if cost < 0.1:
        assert 10 <= spent["samples"] <= 20


# --- terminal ---------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_lines_without_a_terminal_are_plain(data):
    out = io.StringIO()
    fit(*new(data), valid=data, floor=0.5, view=TerminalView(out, every=0.0)).run()
    assert "\x1b" not in out.getvalue()
    assert "\r" not in out.getvalue()
    assert "100%  step 60" in out.getvalue()
    assert "bits/byte (floor 0.500)" in out.getvalue()
    assert out.getvalue().splitlines()[0].startswith("compiling")


def test_lines_without_a_terminal_are_few(data, every_step):  # P21
    out = io.StringIO()
    fit(*new(data), view=TerminalView(out, every=1e9), sample_every=0).run()
    assert len(out.getvalue().splitlines()) == 4  # compiling, first, last, outcome


@pytest.mark.parametrize("columns", [12, 40, 71, 100, 200])
def test_a_terminal_line_never_wraps(data, every_step, columns, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    out = Terminal()
    fit(*new(data, steps=20), view=TerminalView(out, width=columns), sample_every=0).run()
    live = out.getvalue().split("\n")[0].split("\r")[1:]
    assert len(live) == 22
    plain = [re.sub(r"\x1b\[\d+m", "", line) for line in live]
    assert {len(line) for line in plain} == {columns - 1}
    assert ("\x1b" in out.getvalue()) == (columns - 1 >= 70)


def test_no_color_and_dumb_terminals(data, every_step, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    out = Terminal()
    fit(*new(data, steps=5), view=TerminalView(out, width=100), sample_every=0).run()
    assert "\x1b" not in out.getvalue()
    assert "━" in out.getvalue()
    monkeypatch.setenv("TERM", "dumb")
    out = Terminal()
    fit(*new(data, steps=5), view=TerminalView(out), sample_every=0).run()
    assert "\r" not in out.getvalue()


def test_a_terminal_shows_no_control_codes_of_a_text():
    out = io.StringIO()
    trainer = SimpleNamespace(outcome="done", history=[])
    story = show.sample("\x1b]0;title\x07\x9b31m\u202e")
    TerminalView(out).close(trainer, None, story=story, notes=["\x1b[2J"])
    assert not set(out.getvalue()) & set("\x1b\x07\x9b\u202e")


def test_importing_needs_no_notebook():
    code = "import sys, tinylm.live; sys.exit(any(m in sys.modules for m in ('ipywidgets', 'ipykernel', 'matplotlib')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    for module in (live, show):  # IPython itself comes with flax
        assert not re.search(r"^(import|from) (IPython|ipywidgets)", Path(module.__file__).read_text(), re.M)


# --- a real kernel ----------------------------------------------------------------------------------------------------

SETUP = f"""
import sys; sys.path[:0] = {sys.path!r}
import jax, numpy as np, tinylm
from tinylm.config import ModelConfig, TrainConfig
from tinylm.shards import Tokens
text = {TEXT!r}
tokenizer = tinylm.Tokenizer.train([text], vocab=290)
ids = np.concatenate([[tokenizer.end], tokenizer.encode(text), [tokenizer.end]])
data = Tokens.from_array(ids, vocab=290, bytes=len(text), end=tokenizer.end, tokenizer=tokenizer.sha256)
def new(steps):
    config = ModelConfig(vocab=290, context=16, width=16, layers=1, heads=2)
    return tinylm.Transformer(config, tokenizer=tokenizer), data, TrainConfig(
        steps=steps, batch=2, eval_every=50, eval_batches=1)
def sound():
    alive = all(not x.is_deleted() for x in jax.tree.leaves(trainer.state))
    finite = bool(np.isfinite(np.asarray(trainer.model(jax.numpy.zeros((1, 4), int)))).all())
    print(trainer.outcome, alive and finite and len(trainer.losses) == trainer.step,
          trainer.losses == reference[:trainer.step])
"""
WIDGET = "application/vnd.jupyter.widget-view+json"


class Kernel:
    """A kernel that runs code while something happens to it."""

    def __init__(self):
        from jupyter_client.manager import KernelManager

        self.manager = KernelManager(kernel_name="python3")
        self.manager.start_kernel(env={**os.environ, "PYTHONWARNINGS": "ignore"})
        self.client = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)

    def run(self, code, wait=None, do=None):
        """(output, errors, seconds after `do`, messages); `do(button)` comes `wait` s after the drawing begins."""
        request, done, found, button, due = self.client.execute(code), None, [], None, None
        end = time.monotonic() + 120
        while time.monotonic() < end:
            if due is not None and done is None and time.monotonic() >= due:
                do(button)
                done = time.monotonic()
            try:
                message = self.client.get_iopub_msg(timeout=0.005)
            except queue.Empty:
                continue
            if message["parent_header"].get("msg_id") != request:
                continue
            found.append(message)
            content = message["content"]
            if message["msg_type"] == "display_data":
                button = content["data"].get(WIDGET, {}).get("model_id") or button
                if do is not None and due is None and "<svg" in content["data"].get("text/html", ""):
                    due = time.monotonic() + wait
            if message["msg_type"] == "status" and content["execution_state"] == "idle":
                break
        else:
            raise TimeoutError(code)
        took = None if done is None else time.monotonic() - done
        # A second Interrupt that comes just after the cell is done makes the kernel itself drop its reply; what matters
        # is the state, which is asked for next.
        with contextlib.suppress(queue.Empty):
            self.client.get_shell_msg(timeout=2)
        text = "".join(m["content"]["text"] for m in found if m["msg_type"] == "stream")
        errors = [m["content"]["evalue"] for m in found if m["msg_type"] == "error"]
        return text, errors, took, found

    def interrupt(self, button=None):
        self.manager.interrupt_kernel()

    def interrupt_twice(self, button=None):
        self.interrupt()
        time.sleep(0.01)
        self.interrupt()

    def click(self, button):
        content = {"comm_id": button, "data": {"method": "custom", "content": {"event": "click"}}}
        self.client.shell_channel.send(self.client.session.msg("comm_msg", content))


@pytest.fixture(scope="module")
def kernel():
    pytest.importorskip("ipykernel", "7.0")
    kernel = Kernel()
    output, errors, _, _ = kernel.run(SETUP)
    assert errors == [], output
    yield kernel
    kernel.client.stop_channels()
    kernel.manager.shutdown_kernel(now=True)


@pytest.mark.filterwarnings("ignore")  # of jupyter_client and zmq, which are not ours
@pytest.mark.parametrize("rounds", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_interrupts_and_stops_in_a_kernel(rounds, kernel):  # P17, P18, P21
    """Interrupts while compiling, training, twice, in both forms, and clicks on Stop: no traceback, no lost bit."""
    output, errors, _, messages = kernel.run(
        "trainer = await tinylm.fit(*new(6000), floor=0.1); reference = trainer.losses"
    )
    assert errors == [], output
    shown = [m for m in messages if m["msg_type"] in ("display_data", "update_display_data")]
    spent = (messages[-1]["header"]["date"] - messages[0]["header"]["date"]).total_seconds()
    assert len(shown) <= 4 * spent + 4
    assert sum(len(json.dumps(m["content"])) for m in shown[-2:]) < 60_000
    last = {m["content"]["transient"]["display_id"]: m["content"]["data"] for m in shown}
    assert not any(WIDGET in data for data in last.values())  # no dead button stays behind
    assert any("<svg" in data["text/html"] and "done" in data["text/plain"] for data in last.values())

    awaited, blocking = "trainer = await tinylm.fit({})", "trainer = tinylm.fit({}).run()"
    forget = "from tinylm.step import compiled_update; compiled_update.cache_clear(); jax.clear_caches()"
    happenings = [
        ("interrupted", 0.0, kernel.interrupt, awaited, forget),  # while compiling
        ("interrupted", 0.1, kernel.interrupt, awaited, ""),
        ("interrupted", 0.05, kernel.interrupt_twice, awaited, ""),
        ("interrupted", 0.0, kernel.interrupt_twice, blocking, forget),
        ("interrupted", 0.1, kernel.interrupt, blocking, ""),
        ("interrupted", 0.05, kernel.interrupt_twice, blocking, ""),
        ("stopped", 0.0, kernel.click, awaited, ""),
        ("stopped", 0.2, kernel.click, awaited, ""),
    ]
    begun = False
    for outcome, wait, do, form, first in happenings * rounds:
        if first or not begun:
            kernel.run(first + "\ntrain_this = new(6000)")
        code = form.format("*train_this" if first or not begun else "trainer")
        begun = True
        output, errors, seconds, _ = kernel.run(code, wait, do)
        assert errors == [], (outcome, form, output)
        assert "Traceback" not in output
        if not first:
            assert seconds is not None
            assert seconds < 5  # far less than the steps that were left
        output, errors, _, _ = kernel.run("sound()")
        assert (errors, output.split()) == ([], [outcome, "True", "True"]), (form, wait)
    output, errors, _, _ = kernel.run(
        "trainer = await tinylm.fit(trainer); sound(); print(trainer.losses == reference)"
    )
    assert (errors, output.split()) == ([], ["done", "True", "True", "True"])


@pytest.mark.filterwarnings("ignore")
def test_no_widgets_no_matter(kernel):  # P20
    """Without ipywidgets, and with a display that fails: text, and the same losses."""
    code = "import sys; sys.modules['ipywidgets'] = None\ntrainer = await tinylm.fit(*new(20)); print(trainer.outcome)"
    output, errors, _, messages = kernel.run(code)
    assert (errors, output.strip()) == ([], "done")
    shown = [m["content"]["data"] for m in messages if m["msg_type"] == "display_data"]
    assert "Interrupt the kernel" in shown[0]["text/plain"]
    code = "import IPython.display as d; keep = d.display; d.display = lambda *a, **k: 1 / 0\n"
    output, errors, _, _ = kernel.run(
        code + "trainer = await tinylm.fit(*new(20)); d.display = keep; print(trainer.outcome)"
    )
    assert (errors, output.strip()) == ([], "done")


def test_the_test_would_see_a_lost_state():
    """The check above is worth something: a donated buffer is deleted, and found so."""
    x = jax.numpy.ones(3)
    jax.jit(lambda y: y + 1, donate_argnums=0)(x)
    assert x.is_deleted()
