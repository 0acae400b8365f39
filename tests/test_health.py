"""A run stays whole: full disks, signals, spikes, what is not finite, other machines, cells run again, long runs."""

import argparse
import ast
import asyncio
import gc
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import resident
from test_training import digest

from tinylm import folder as folders
from tinylm.checkpoint import Run
from tinylm.commands import train_to_the_end
from tinylm.config import ModelConfig, TrainConfig
from tinylm.data import Tokens, Windows
from tinylm.live import fit
from tinylm.model import Transformer
from tinylm.resuming import resume
from tinylm.step import spikes
from tinylm.training import Trainer, TrainingDiverged, train

PACKAGE = Path(folders.__file__).parent
MODEL = ModelConfig(vocab=16, context=8, width=8, layers=1, heads=2)
CONFIG = TrainConfig(steps=12, batch=2, optimizer="adamw", learning_rate=1e-2, warmup=2, log_every=1, seed=3)
TOKENS = Tokens.from_array(np.random.default_rng(0).integers(0, 16, 600), vocab=16)


def new(data=TOKENS, out=None, valid=None, tracker=None, **changes):
    return train(Transformer(MODEL, rngs=1), data, CONFIG.replace(**changes), out=out, valid=valid, tracker=tracker)


@pytest.fixture(scope="module")
def digests():
    """Of an undisturbed run, after each step."""
    trainer = new()
    found = {0: digest(trainer)}
    return found | {step.step: digest(trainer) for step in trainer}


# --- the disk ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*training goes on")
def test_a_full_disk_loses_no_line_of_the_log_and_ends_no_run(digests, tmp_path):  # P5
    """Neither lines nor checkpoints can be written for a while; both are there in the end."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    trainer = new(out=tmp_path / "run", save_every=1e-9)
    try:
        for step in trainer:
            if step.step == 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, (600, hard))
            if step.step == 6:
                assert len(trainer.run.history()) < 6
                assert trainer.run.last_saved_step == max(trainer.run.steps()) < 6
                assert isinstance(trainer.last_error, OSError)
            if step.step == 8:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert trainer.outcome == "done"
    assert [record["step"] for record in trainer.run.history()] == list(range(1, 13))
    assert trainer.run.last_saved_step == 12
    assert digest(trainer) == digests[12]
    assert not list(tmp_path.rglob(".tinylm-*"))


def test_saving_takes_one_percent_of_the_time(monkeypatch, tmp_path):  # P9
    """On a clock of our own: whatever a save costs, the next is a hundred times as far away."""
    clock = [0.0]
    monkeypatch.setattr(Trainer, "elapsed", property(lambda self: clock[0]))
    for cost in (0.01, 1.0, 30.0):
        trainer, spent = new(out=tmp_path / str(cost), save_every=60.0), 0.0
        clock[0] = trainer._saved_at = 0.0
        while clock[0] < 50_000:
            clock[0] += 0.7
            if trainer._save_is_due():
                clock[0] += cost
                spent += cost
                trainer._saved_at, trainer._save_cost = clock[0], cost
        assert 0 < spent <= 0.01 * clock[0] + cost
        trainer.run.close()


# --- signals ----------------------------------------------------------------------------------------------------------


def disturbed(place, act, out=None):
    """A trainer whose fifth step does `act` while it makes its batch, logs, saves, or is in the caller's hands."""
    windows = Windows(TOKENS, batch=2, length=8, seed=3)

    def batches(step):
        if place == "batch" and step == 4:
            act()
        return windows(step)

    trainer = new(batches, out=out)
    if place in ("log", "save"):
        real = getattr(trainer.run, place)

        def wrapped(*args, **more):
            if trainer.step == 5:
                act()
            return real(*args, **more)

        setattr(trainer.run, place, wrapped)
    return trainer


@pytest.fixture
def harmless():
    """What comes too late or too early must not end the tests."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    old = {number: signal.signal(number, lambda *_: None) for number in numbers}
    yield old
    for number, handler in old.items():
        signal.signal(number, handler)


def check_signal(number, place, digests, tmp_path):
    before = signal.getsignal(number)
    trainer = disturbed(place, lambda: signal.raise_signal(number), tmp_path / "run")
    for step in trainer:
        if step.step == 5 and place == "caller":
            signal.raise_signal(number)
    assert (trainer.outcome, trainer.signal) == ("interrupted", number)
    assert trainer.step < 12
    assert signal.getsignal(number) is before
    assert Run.open(tmp_path / "run").steps() == [trainer.step]  # nothing is lost
    assert digest(trainer) == digests[trainer.step]
    trainer.run.close()
    again = resume(tmp_path / "run", data=trainer.batches)
    list(again)
    assert digest(again) == digests[12]
    again.run.close()


@pytest.mark.parametrize("place", ["batch", "log", "caller"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_end_the_step_and_save_it(number, place, digests, harmless, tmp_path):  # P6
    check_signal(number, place, digests, tmp_path)


def test_a_signal_during_a_save_lets_it_end(digests, harmless, tmp_path):  # P6
    trainer = disturbed("save", lambda: signal.raise_signal(signal.SIGTERM), tmp_path / "run")
    trainer._save_is_due = lambda: True
    list(trainer)
    assert trainer.signal == signal.SIGTERM
    assert 5 in trainer.run.steps()
    assert Run.open(tmp_path / "run").restore()[3] == []
    trainer.run.close()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_the_command_exits_as_the_signal_asks(number, status, harmless, tmp_path, capsys):  # P6
    trainer = disturbed("batch", lambda: signal.raise_signal(number), tmp_path / "run")
    with pytest.raises(SystemExit) as stop:
        train_to_the_end(trainer, argparse.Namespace(json=False))
    assert stop.value.code == status
    assert "go on with: tinylm resume" in capsys.readouterr().out
    trainer.run.close()


# --- what is not finite, and what stands out --------------------------------------------------------------------------


def weighted(at=-1, place=(0, 0), value=1.0):
    """Batches of weights 1 but for one, at one step."""
    windows = Windows(TOKENS, batch=2, length=8, seed=3)

    def batches(step):
        weights = np.ones((2, 8), np.float32)
        if step == at:
            weights[place] = value
        return windows(step)._replace(weights=weights)

    return batches


def check_poisons(count=60):
    trainer = new(weighted(), log_every=100)
    begin = trainer.tensors()
    list(trainer.every_step())
    clean = digest(trainer)
    rng, said, poisons = np.random.default_rng(0), [], [np.nan, np.inf, -np.inf, 3e38]
    for case in range(count):
        at, place = int(rng.integers(0, 8)), (int(rng.integers(2)), int(rng.integers(8)))
        trainer.adopt(begin)
        trainer.batches = weighted(at, place, poisons[case % 4])
        try:
            list(trainer.every_step())
            assert case % 4 == 3  # a large finite weight may pass
        except TrainingDiverged as error:
            said.append(str(error).startswith(f"step {at + 1}:"))
            assert trainer.step == at == int(trainer.state.step)
            if case % 8 == 0:  # without the poison it goes on as if that had never been
                trainer.batches = weighted()
                list(trainer.every_step())
                assert digest(trainer) == clean, case
        assert all(np.isfinite(value).all() for value in trainer.tensors().values()), case
    assert len(said) >= count * 3 // 4
    assert all(said)


def test_sixty_poisons_never_reach_the_weights():  # P12
    check_poisons()


def test_weights_that_overflow_stop_the_run_and_stay_as_they_are():  # P12
    trainer = new(weighted(), log_every=100)
    begin = trainer.tensors()
    stopped = 0
    for name in [name for name in begin if name.startswith("params.")]:
        changed = {key: np.array(value) for key, value in begin.items()}
        changed[name].reshape(-1)[0] = 3e38
        trainer.adopt(changed)
        before = digest(trainer)
        try:
            list(trainer.every_step())
        except TrainingDiverged:
            stopped += 1
            assert digest(trainer) == before or trainer.step > 0
        assert all(np.isfinite(value).all() for value in trainer.tensors().values()), name
    assert stopped > 0


def spikes_one_by_one(losses, since=0):
    """The definition, written out."""
    found = []
    for i in range(since, len(losses)):
        before = [x for x in losses[:i] if np.isfinite(x)][-128:]
        if np.isfinite(losses[i]) and len(before) >= 32:
            middle = np.median(before)
            spread = max(np.median(np.abs(np.array(before) - middle)), 0.01 * abs(middle))
            found += [i] if losses[i] > middle + 6 * spread else []
    return found


def curve(seed, count=400):
    rng = np.random.default_rng(seed)
    noise = np.clip(rng.standard_normal(count), -3, 3)
    return 3 + 2 * np.exp(-np.arange(count) / 60) + 0.1 * noise


@pytest.mark.parametrize("seed", range(10))
def test_spikes_are_found_and_nothing_else(seed):  # P13
    rng, losses = np.random.default_rng([seed, 1]), curve(seed)
    assert spikes(losses.tolist()) == []
    at = np.sort(rng.choice(np.arange(200, 400), 3, replace=False))
    losses[at] += rng.uniform(1.5, 4, 3)
    assert spikes(losses.tolist()) == at.tolist()
    broken = np.insert(losses, [50, 150, 390], [np.nan, np.inf, -np.inf])  # changes nothing but the numbering
    assert [broken[i] for i in spikes(broken.tolist())] == losses[at].tolist()
    since = int(rng.integers(0, 400))
    assert spikes(losses.tolist(), since) == [i for i in at.tolist() if i >= since]
    wild = (losses + rng.exponential(0.2, 400)).tolist()
    assert spikes(wild) == spikes_one_by_one(wild)
    assert spikes(wild, since) == spikes_one_by_one(wild, since)


def test_a_spike_is_in_the_log(tmp_path):  # P13
    rng = np.random.default_rng(0)

    def batches(step):
        ids = rng.integers(0, 16, (2, 9)) if step == 49 else np.full((2, 9), 3)
        return Windows(TOKENS, batch=2, length=8)(0)._replace(
            tokens=ids[:, :-1].astype(np.int32), targets=ids[:, 1:].astype(np.int32)
        )

    trainer = new(batches, out=tmp_path / "run", steps=60, log_every=7)
    list(trainer)
    assert trainer.spikes == [50]
    assert [r["spikes"] for r in trainer.run.history() if "spikes" in r] == [[50]]


# --- the same bits, or a word about it --------------------------------------------------------------------------------


def stopped_run(out):
    trainer = new(out=out)
    for step in trainer:
        if step.step == 5:
            trainer.stop()
    trainer.run.close()


def edited(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config["circumstances"] |= changes
    config.pop("seal", None)
    (folder / "config.json").write_text(json.dumps(config))


def check_circumstances(tmp_path):
    stopped_run(tmp_path / "run")
    about = json.loads((tmp_path / "run" / "config.json").read_text())["circumstances"]
    assert {"jaxlib", "device", "processor", "NPROC", "XLA_FLAGS"} <= about.keys()
    resume(tmp_path / "run", data=TOKENS).run.close()  # warnings are errors: here there is none
    for name in ("jaxlib", "processor", "NPROC"):
        edited(tmp_path / "run", **{name: "97"})
        with pytest.warns(UserWarning, match=rf"not bit for bit: .*{name} was 97 and is {about[name]}"):
            resume(tmp_path / "run", data=TOKENS).run.close()
        edited(tmp_path / "run", **{name: about[name]})


def test_another_machine_is_named_when_a_run_goes_on(tmp_path):  # P11
    check_circumstances(tmp_path)


def test_the_command_gives_xla_the_run_s_number_of_threads(tmp_path, monkeypatch):  # P11
    stopped_run(tmp_path / "run")
    edited(tmp_path / "run", NPROC="7")
    monkeypatch.setenv("NPROC", "3")
    folders.pin(tmp_path / "run")
    monkeypatch.delitem(sys.modules, "jax")
    folders.pin(tmp_path / "run")
    assert os.environ["NPROC"] == "3"  # what was asked for stays
    del os.environ["NPROC"]
    for nowhere in (tmp_path, tmp_path / "none"):
        folders.pin(nowhere)
        assert "NPROC" not in os.environ
    folders.pin(tmp_path / "run")
    assert os.environ["NPROC"] == "7"


# --- again and again --------------------------------------------------------------------------------------------------


def handles() -> int:
    return len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 0


@pytest.mark.parametrize("count", [10, pytest.param(40, marks=pytest.mark.slow)])
def test_cells_run_again_compile_nothing_and_leave_nothing(count, tmp_path):  # P16
    list(new(out=tmp_path / "first", steps=2))
    before = None
    for again in range(count):
        trainer = new(out=tmp_path / f"{again}", steps=2, learning_rate=0.01 + again / 1000, seed=again)
        list(trainer)
        held = trainer.update._cache_size(), handles(), threading.active_count(), signal.getsignal(signal.SIGINT)
        before = before or held
        assert held == before
    for again in range(3):  # left in the middle, and forgotten: the lock is free
        for _ in new(out=tmp_path / f"left-{again}"):
            break
        gc.collect()
        Run.open(tmp_path / f"left-{again}", write=True).close()
    assert handles() <= before[1]


def grown(steps, warm):
    """By how much bytes of memory, file handles, arrays and Python's objects grow in `steps` steps after `warm`."""
    trainer, found = new(steps=steps, log_every=100), {}
    for step in trainer:
        if step.step in (warm, steps):
            gc.collect()
            found[step.step] = resident(), handles(), len(jax.live_arrays()), len(gc.get_objects())
    assert len(trainer.losses) == steps
    return [after - before for before, after in zip(found[warm], found[steps], strict=True)]


def test_thousands_of_steps_leave_nothing_behind():  # P15
    _, files, arrays, objects = grown(2000, 500)
    assert (files, arrays) == (0, 0)
    assert objects < 150  # ten for each logged step, none for the others


@pytest.mark.slow
def test_twenty_thousand_steps_take_no_more_memory():  # P15
    memory, files, arrays, objects = grown(20_000, 5000)
    assert memory <= 10e6
    assert (files, arrays) == (0, 0)
    assert objects < 1500


@pytest.mark.slow
def test_bits_do_not_depend_on_cores():  # P11
    """AdamW on our kernels: for any number of threads; everything: where NPROC says how many."""
    code = (
        "import sys; sys.path[:0] = sys.argv[1:3]; import test_health as t; from tinylm.model import Transformer\n"
        "m = t.MODEL.replace(dropout=0.1, context=64, width=96, layers=2, heads=4)\n"
        "d = t.Tokens.from_array(t.np.random.default_rng(0).integers(0, 16, 9000), vocab=16)\n"
        "r = t.train(Transformer(m, rngs=1), d, t.CONFIG.replace(batch=8, optimizer=sys.argv[3]))\n"
        "list(r); print(t.digest(r))"
    )
    paths = [str(Path(__file__).parent), str(PACKAGE.parent)]

    def run(optimizer, cores, **environment):
        env = {k: v for k, v in os.environ.items() if k != "NPROC"} | environment
        pinned = [] if cores is None else ["taskset", "-c", cores]
        command = [*pinned, sys.executable, "-c", code, *paths, optimizer]
        return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout

    for optimizer in ("adamw", "muon"):
        first = run(optimizer, None, NPROC="2")
        assert run(optimizer, None, NPROC="2", PYTHONHASHSEED="7", TZ="Asia/Tokyo") == first
        assert run(optimizer, "0", NPROC="2") == first
        if optimizer == "adamw" and folders.circumstances()["kernels"]:
            assert run(optimizer, None, NPROC="1") == run(optimizer, None, NPROC="5") == first


# --- errors are seen --------------------------------------------------------------------------------------------------


class Refuses:
    """A tracker that fails in one of its methods."""

    def __init__(self, where):
        self.where = where

    def __getattr__(self, name):
        def method(*_):
            if name == self.where:
                raise LookupError("tracker")

        return method


def fails(step):
    raise LookupError("data")


def failing_at(place, out):
    windows = Windows(TOKENS, batch=2, length=8, seed=3)
    if place in ("start", "log", "finish"):
        return new(tracker=Refuses(place))
    if place == "first batch":
        return new(fails)
    if place == "later batch":
        return new(lambda step: windows(step) if step < 5 else fails(step))
    if place == "validation":
        return new(valid=fails, eval_every=4, eval_batches=1)
    trainer = new(out=out)

    def broken(*_, **__):
        raise LookupError("run")

    setattr(trainer.run, {"line": "log", "checkpoint": "save"}[place], broken)
    return trainer


PLACES = ["start", "log", "finish", "first batch", "later batch", "validation", "line", "checkpoint"]


@pytest.mark.parametrize("form", ["run", "await"])
@pytest.mark.parametrize("place", PLACES)
def test_an_error_anywhere_reaches_the_caller(place, form, tmp_path):  # P22
    trainer = failing_at(place, tmp_path / "run")

    async def awaited():
        return await fit(trainer)

    with pytest.raises(LookupError):
        _ = fit(trainer).run() if form == "run" else asyncio.run(awaited())
    assert np.isfinite(np.asarray(trainer.model(np.zeros((1, 4), np.int32)))).all()
    if trainer.run is not None:
        trainer.run.close()


def swallows(node) -> bool:
    """Whether a handler or a `suppress` may take any exception and say nothing."""
    everything = {"Exception", "BaseException"}
    if isinstance(node, ast.ExceptHandler):
        names = {n.id for n in ast.walk(node.type or ast.Pass()) if isinstance(n, ast.Name)}
        silent = all(isinstance(inner, ast.Pass | ast.Continue) for inner in node.body)
        return node.type is None or (bool(names & everything) and silent)
    called = isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress")
    return called and bool({ast.unparse(argument) for argument in node.args} & everything)


def test_nothing_takes_every_error_in_silence():  # P22
    assert swallows(ast.parse("with contextlib.suppress(Exception): x()").body[0].items[0].context_expr)
    for path in PACKAGE.rglob("*.py"):
        source = path.read_text()
        assert "Output()" not in source, path  # ipywidgets' swallows what is raised inside it
        assert not [f"{path.name}:{n.lineno}" for n in ast.walk(ast.parse(source)) if swallows(n)]
