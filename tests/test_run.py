"""The run folder: its lock, its log, its checkpoints, and every way a disk or a process can fail under it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tinylm import run as run_module
from tinylm import store
from tinylm.config import ConfigError, ModelConfig, TrainConfig
from tinylm.run import Run, RunLocked
from tinylm.store import CheckpointDamaged, StateMismatch, read_file
from tinylm.tokenizer import Tokenizer

MODEL, TRAIN = ModelConfig(vocab=261, width=8, layers=1, heads=1), TrainConfig(steps=100)


def state(step):
    return {"params.w": np.full((4, 3), step, np.float32), "step": np.array(step)}


def create(folder, **more):
    return Run.create(folder, model=MODEL, train=TRAIN, data={"kind": "none"}, **more)


@pytest.fixture
def run(tmp_path):
    with create(tmp_path / "run") as run:
        yield run


def fill(run, *steps):
    for step in steps:
        run.log({"step": step, "loss": 1 / step})
        run.save(step, state(step))


def litter(folder):
    return [p for p in Path(folder).rglob("*") if store.LEFTOVER.fullmatch(p.name)]


def flip(path, at=-1):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


# --- config and tokenizer ---------------------------------------------------------------------------------------------


def test_a_run_comes_back(tmp_path):
    tokenizer = Tokenizer.train([], kind="byte")
    with create(tmp_path / "a" / "run", tokenizer=tokenizer) as made:
        fill(made, 1)
    found = Run.open(tmp_path / "a" / "run")
    assert (found.model, found.train, found.data) == (MODEL, TRAIN, {"kind": "none"})
    assert found.tokenizer == tokenizer
    step, tensors, metadata, notes = found.restore()
    assert (step, metadata, notes) == (1, {"step": 1}, [])
    np.testing.assert_array_equal(tensors["params.w"], state(1)["params.w"])
    assert set(json.loads((found.folder / "config.json").read_text())["versions"]) >= {"python", "jax", "numpy"}


def test_a_new_run_needs_an_empty_folder(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"empty folder, and it holds notes\.txt"):
        create(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(FileExistsError, match="is a file, and a run needs a folder"):
        create(tmp_path / "notes.txt")
    (tmp_path / "jupyter" / ".ipynb_checkpoints").mkdir(parents=True)
    create(tmp_path / "jupyter").close()
    with pytest.raises(FileExistsError, match="holds a run already: take another"):
        create(tmp_path / "jupyter")


def test_a_crash_while_creating_can_be_repeated(tmp_path, monkeypatch):
    for last in range(1, 4):
        calls = []

        def crash(path, data, calls=calls, last=last):
            calls.append(path)
            if len(calls) == last:
                raise KeyboardInterrupt
            store.write_bytes(path, data)

        with monkeypatch.context() as patch:
            patch.setattr(run_module, "write_bytes", crash)
            with pytest.raises(KeyboardInterrupt):
                create(tmp_path / "run", tokenizer=Tokenizer.train([], kind="byte"))
        (tmp_path / "run" / f".tinylm-{'0' * 16}.tmp").write_text("half")
    create(tmp_path / "run").close()
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "checkpoints",
        "config.json",
        "lock",
        "run.jsonl",
        "tokenizer.json",
    ]
    assert Run.open(tmp_path / "run").tokenizer is None  # the one of the crashed attempt is not this run's


def test_no_run_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        Run.open(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match=r"no config\.json; it is empty"):
        Run.open(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="no 'model' and 'train'"):
        Run.open(tmp_path)


def test_config_mismatches_are_refused(run):  # P10
    path, good = run.folder / "config.json", json.loads((run.folder / "config.json").read_text())
    for change, error, match in (
        ({"format": 2}, StateMismatch, "format 2.*update tinylm"),
        ({"model": {**good["model"], "widht": 3}}, ConfigError, r"config\.json.*'widht'; did you mean 'width'"),
        ({"model": {**good["model"], "width": "wide"}}, ConfigError, r"config\.json.*width = 'wide'"),
        ({"train": {}}, ConfigError, "exactly one of steps"),
        ({"model": 3}, FileNotFoundError, "not a run folder"),
    ):
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(error, match=match):
            Run.open(run.folder)
    for text in ("", "{", "[]", "[" * 10**5, "\x00" * 100):
        path.write_text(text)
        with pytest.raises(CheckpointDamaged, match=r"config\.json is damaged"):
            Run.open(run.folder)


def test_another_tokenizer_is_refused(tmp_path):  # P10
    with create(tmp_path, tokenizer=Tokenizer.train([], kind="byte")) as run:
        (tmp_path / "tokenizer.json").write_text(Tokenizer.train(["abc abc"], vocab=263).to_json())
        with pytest.raises(StateMismatch, match=r"tokenizer\.json is another tokenizer"):
            _ = run.tokenizer


def test_change_of_the_training_config(run):
    longer = TRAIN.replace(steps=500)
    run.change(longer)
    assert run.train == Run.open(run.folder).train == longer


# --- the log ----------------------------------------------------------------------------------------------------------


def test_the_log_keeps_every_digit(run):
    loss = np.float32(0.1)
    run.log({"step": 1, "loss": loss, "exact": 0.1 + 0.2, "bad": [float("nan"), -float("inf")], "n": np.int64(3)})
    assert run.history() == [
        {"step": 1, "loss": float(loss), "exact": 0.30000000000000004, "bad": [None, None], "n": 3}
    ]
    json.loads((run.folder / "run.jsonl").read_text(), parse_constant=pytest.fail)


def test_a_log_torn_anywhere_is_mended(run, monkeypatch):  # P1
    monkeypatch.setattr(os, "fsync", os.fstat)
    for step in range(1, 4):
        run.log({"step": step, "text": "é\n"})
    run.close()
    whole = (run.folder / "run.jsonl").read_bytes()
    for cut in range(len(whole) + 1):
        os.unlink(run.folder / "run.jsonl")  # what is written over goes to the disk at once
        (run.folder / "run.jsonl").write_bytes(whole[:cut])
        complete = sum(end <= cut for end in (i for i, b in enumerate(whole) if b == ord("\n")))
        assert [r["step"] for r in Run.open(run.folder).history()] == [1, 2, 3][:complete]
        with Run.open(run.folder, write=True) as again:
            again.log({"step": 9})
            assert [r["step"] for r in again.history()] == [*[1, 2, 3][:complete], 9]


def test_a_log_damaged_inside_is_named_and_cut_when_it_is_in_the_lost_future(run):
    for step in range(1, 6):
        run.log({"step": step})
    lines = (run.folder / "run.jsonl").read_bytes().splitlines(keepends=True)
    (run.folder / "run.jsonl").write_bytes(b"".join([*lines[:2], b"\x00\x00\n", *lines[3:]]))
    with pytest.raises(CheckpointDamaged, match=r"run\.jsonl line 3 is damaged"):
        run.history()
    with pytest.raises(CheckpointDamaged, match="line 3"):
        run.rewind(4)
    run.rewind(2)
    assert run.history() == [{"step": 1}, {"step": 2}]


def test_rewind_keeps_what_has_no_step(run):
    for record in ({"event": "start"}, {"step": 1}, {"step": 2}, {"event": "note"}, {"step": 3}):
        run.log(record)
    run.rewind(2)
    assert run.history() == [{"event": "start"}, {"step": 1}, {"step": 2}, {"event": "note"}]


def test_a_short_write_leaves_no_half_line_and_loses_none(run, monkeypatch):  # P5
    run.log({"step": 1})
    real = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda file, data: real(file, data[:4]))
        with pytest.raises(OSError, match=r"No space left.*not logged.*run\.jsonl"):
            run.log({"step": 2})
    assert run.history() == [{"step": 1}]
    run.log({"step": 3})
    assert run.history() == [{"step": 1}, {"step": 2}, {"step": 3}]


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_restore_passes_over_damage_and_says_so(run):  # P4
    fill(run, 10, 20, 30, 40)
    assert run.last_saved_step == 40
    flip(run.path(40))
    run.path(30).write_bytes(run.path(30).read_bytes()[:99])
    step, tensors, _, notes = run.restore()
    assert (step, int(tensors["step"])) == (20, 20)
    assert len(notes) == 3
    assert "step-00000040.safetensors is damaged: its sha256" in notes[0]
    assert "step-00000030.safetensors is damaged" in notes[1]
    assert "20 steps are lost" in notes[2]
    assert run.steps() == [10, 20, 30, 40]
    with pytest.raises(CheckpointDamaged, match="00000030"):
        run.restore(30)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 25; it has \[10, 20, 30, 40\]"):
        run.restore(25)
    for damaged in (10, 20):
        flip(run.path(damaged))
    with pytest.raises(CheckpointDamaged, match="no sound checkpoint"):
        run.restore()


def test_restore_of_nothing(run):
    with pytest.raises(FileNotFoundError, match="no checkpoint yet"):
        run.restore()
    shutil.rmtree(run.folder / "checkpoints")
    assert run.steps() == []


def test_a_renamed_checkpoint_is_not_believed(run):  # P4
    fill(run, 1)
    shutil.copy(run.path(1), run.path(5))
    step, _, _, notes = run.restore()
    assert step == 1
    assert "holds step 1 (renamed?)" in notes[0]


def test_a_newer_format_is_never_passed_over(run, monkeypatch):  # P10
    fill(run, 1)
    with monkeypatch.context() as patch:
        patch.setattr(store, "FORMAT", 3)
        fill(run, 2)
    with pytest.raises(StateMismatch, match="format 3"):
        run.restore()
    run.close()
    with Run.open(run.folder, write=True) as fresh:
        assert fresh.prune(1) == []
        assert fresh.steps() == [1, 2]


FOREIGN = [
    "step-5.safetensors",
    "step-00000005 (copy).safetensors",
    "step-00000005.safetensors.aside-1",
    "step-00000005.safetensors~",
    "step-00000005.SAFETENSORS",
    "step--0000005.safetensors",
    "step-000000005.safetensors",
    "step-٠٠٠٠٠٠٠٥.safetensors",
    "step-00000005\n.safetensors",
    " step-00000005.safetensors",
    "5",
    "model.safetensors",
    ".tinylm-abc.tmp",
    ".tinylm-0123456789abcdef.tmp.txt",
    ".nfs0001",
]


def test_foreign_files_are_never_listed_read_or_removed(run):  # P8
    fill(run, 1, 2, 3)
    folder = run.folder / "checkpoints"
    for name in FOREIGN:
        (folder / name).write_text("mine")
    for name in ("7", "step-00000007.safetensors", ".ipynb_checkpoints", f".tinylm-{'a' * 16}.tmp"):
        (folder / name).mkdir()
    (folder / "step-00000008.safetensors").symlink_to(run.path(1))
    (folder / f".tinylm-{'b' * 16}.trash").symlink_to(run.path(1))
    before = {p.name for p in folder.iterdir()}
    assert run.steps() == [1, 2, 3]
    assert run.restore()[0] == 3
    run.close()
    with Run.open(run.folder, write=True) as again:
        assert again.prune(1) == [1, 2]
        assert again.rewind(3) == []
    assert before - {p.name for p in folder.iterdir()} == {run.path(1).name, run.path(2).name}


@pytest.mark.parametrize("size", [0, 1, 8, 50, 200])
def test_half_files(run, size):  # P4
    fill(run, 1, 2)
    run.path(2).write_bytes(run.path(2).read_bytes()[:size])
    assert run.restore()[0] == 1


def test_prune_keeps_the_newest_sound_ones_and_all_damaged_ones(run):  # P8
    fill(run, 1, 2, 3, 4, 5, 6)
    flip(run.path(6))
    flip(run.path(2))
    assert run.prune(2, protect=[1, 99]) == [3]
    assert run.steps() == [1, 2, 4, 5, 6]
    with pytest.raises(ValueError, match="keep = 0"):
        run.prune(0)
    run.close()
    with Run.open(run.folder, write=True) as fresh:  # nothing known by heart: every byte is looked at again
        assert fresh.prune(1) == [1, 4]
        assert fresh.steps() == [2, 5, 6]


def test_rewind_sets_the_future_aside(run):  # P1, P8
    fill(run, 10, 20, 30)
    flip(run.path(30))
    bytes_before = run.path(30).read_bytes()
    step, *_ = run.restore()
    assert [p.name for p in run.rewind(step)] == ["step-00000030.safetensors.aside-1"]
    assert [r["step"] for r in run.history()] == [10, 20]
    fill(run, 30)
    flip(run.path(30), at=-2)
    fill(run, 30)  # saving over a damaged one keeps that too
    folder = run.folder / "checkpoints"
    assert (folder / "step-00000030.safetensors.aside-1").read_bytes() == bytes_before
    assert (folder / "step-00000030.safetensors.aside-2").exists()
    assert run.restore()[0] == run.last_saved_step == 30
    run.rewind(20)
    assert run.last_saved_step == 20


def test_saving_in_the_past_without_rewind_warns_and_wins(run):
    fill(run, 10, 20, 30)
    with pytest.warns(UserWarning, match=r"step 15 replaces.*00000020.*00000030"):
        run.save(15, state(15))
    assert run.steps() == [10, 15]
    run.prune(1)
    assert run.restore()[0] == 15


@pytest.mark.parametrize("cases", [100, pytest.param(500, marks=pytest.mark.slow)])
def test_random_sequences_against_a_model(cases, tmp_path, monkeypatch):  # P8
    """P8: random histories of save, damage, prune, rewind, reopen, with clocks that jump; two sets are the oracle."""
    monkeypatch.setattr(os, "fsync", os.fstat)
    rng = np.random.default_rng(0)
    for case in range(cases):
        run, sound, bad, step = create(tmp_path / f"{case}"), set(), set(), 0
        for _ in range(int(rng.integers(3, 12))):
            action = rng.choice(["save", "save", "save", "damage", "prune", "rewind", "reopen"])
            if action == "save":
                step += int(rng.integers(1, 4))
                run.save(step, state(step))
                sound.add(step)
                bad.discard(step)
                os.utime(run.path(step), (time.time() + int(rng.integers(-4e7, 4e7)),) * 2)  # clocks jump
            elif action == "damage" and sound:
                victim = int(rng.choice(sorted(sound)))
                flip(run.path(victim), at=int(rng.integers(-20, 0)))
                sound.discard(victim)
                bad.add(victim)
            elif action == "prune":
                keep = int(rng.integers(1, 4))
                run.prune(keep)
                sound = set(sorted(sound)[-keep:])
            elif action == "rewind" and sound:
                step = int(rng.choice(sorted(sound)))
                run.rewind(step)
                sound, bad = {s for s in sound if s <= step}, {s for s in bad if s <= step}
            elif action == "reopen":
                run.close()
                run = Run.open(run.folder, write=True)
            assert run.steps() == sorted(sound | bad)
            if sound:
                assert run.restore()[0] == max(sound)
        run.close()


# --- the lock (P7) ----------------------------------------------------------------------------------------------------


def test_reading_needs_no_lock_and_writing_needs_it(run):  # P7
    fill(run, 1)
    reader = Run.open(run.folder)
    assert reader.restore()[0] == 1
    for act in (lambda: reader.save(2, {}), lambda: reader.log({}), lambda: reader.prune(1), lambda: reader.rewind(0)):
        with pytest.raises(RunLocked, match="reading only"):
            act()
    with pytest.raises(RunLocked, match=rf"process {os.getpid()}, this very process.*host .+ since 2"):
        Run.open(run.folder, write=True)
    run.close()
    run.close()
    Run.open(run.folder, write=True).close()


def test_a_forgotten_run_frees_its_lock(tmp_path):
    create(tmp_path)
    Run.open(tmp_path, write=True).close()


WORKER = """
import os, sys
from tinylm.run import Run, RunLocked
held = None
for line in sys.stdin:
    verb, folder = line.split()
    if verb == "free":
        held = held.close() if held else None
        print("freed", flush=True)
        continue
    try:
        held = Run.open(folder, write=True)
        print("won", os.getpid(), flush=True)
    except RunLocked as error:
        print("lost", error, flush=True)
"""


def worker(code=WORKER, *more):
    root = str(Path(store.__file__).parent.parent)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([root, *more])}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True, bufsize=1, env=env)


def test_two_processes_race_and_exactly_one_wins_and_the_dead_block_nobody(tmp_path):  # P7
    create(tmp_path).close()
    pair = [worker(), worker()]
    try:
        for round_ in range(10):
            for one in pair:
                one.stdin.write(f"take {tmp_path}\n")
            start = time.monotonic()
            answers = [one.stdout.readline() for one in pair]
            assert round_ == 0 or time.monotonic() - start < 1
            assert sorted(a.split()[0] for a in answers) == ["lost", "won"], answers
            winner = next(a for a in answers if a.startswith("won")).split()[1]
            lost = next(a for a in answers if a.startswith("lost"))
            # a loser may look in the instant before the winner has signed
            assert f"process {winner} on host" in lost or "process unknown" in lost, lost
            for one in pair:
                one.stdin.write("free -\n")
            assert [one.stdout.readline() for one in pair] == ["freed\n"] * 2
        for victim in pair:
            victim.stdin.write(f"take {tmp_path}\n")
            assert victim.stdout.readline().startswith("won")
            with pytest.raises(RunLocked, match=f"process {victim.pid} on host"):
                Run.open(tmp_path, write=True)
            victim.send_signal(signal.SIGKILL)
            victim.wait()
            Run.open(tmp_path, write=True).close()
    finally:
        for one in pair:
            one.kill()
            one.communicate()


def test_a_forked_child_does_not_free_its_parents_lock(run):
    code = f"""
import os
from tinylm.run import Run
run = Run.open({str(run.folder)!r}, write=True)
if os.fork() == 0:
    run.close()
    os._exit(0)
os.wait()
print("ready", flush=True)
input()
"""
    run.close()
    parent = worker(code)
    try:
        assert parent.stdout.readline() == "ready\n"
        with pytest.raises(RunLocked):
            Run.open(run.folder, write=True)
    finally:
        parent.communicate("\n")
    Run.open(run.folder, write=True).close()


WRITER = """
import itertools, os, sys
import numpy as np
from tinylm.run import Run
while (folder := input()) and (pid := os.fork()):  # each folder gets a process, without another start of Python
    print("begun", pid, flush=True)
    os.waitpid(pid, 0)
    print("dead", flush=True)
if not folder:
    sys.exit()
with Run.open(folder, write=True) as run:
    try:
        step = run.restore()[0]
        run.rewind(step)
    except FileNotFoundError:
        step = 0
    for step in itertools.count(step + 1):
        run.log({"step": step})
        run.save(step, {"w": np.full(5000, step, np.float32), "step": np.array(step)})
        os.write(1, b"%d\\n" % step)  # whole or not at all, which `print` does not promise
        run.prune(1)
"""


def begun(writer, folder) -> int:
    """The number of a new process that writes there."""
    writer.stdin.write(f"{folder}\n")
    return int(writer.stdout.readline().removeprefix("begun "))


def test_reading_while_another_process_writes(run):  # P7
    fill(run, 1)
    run.close()
    writer = worker(WRITER)
    pid = begun(writer, run.folder)
    try:
        writer.stdout.readline()
        seen = [Run.open(run.folder).restore() for _ in range(200)]
    finally:
        os.kill(pid, signal.SIGKILL)
        writer.communicate("\n")
    assert all(int(tensors["step"]) == step and not notes for step, tensors, _, notes in seen)
    steps = [step for step, *_ in seen]
    assert steps == sorted(steps)
    assert steps[-1] > steps[0]


@pytest.mark.parametrize("kills", [8, pytest.param(100, marks=pytest.mark.slow)])
def test_kill_at_any_moment_loses_no_acknowledged_step(kills, run):  # P1
    run.close()
    rng, acknowledged = np.random.default_rng(0), 0
    writer = worker(WRITER)
    for _ in range(kills):
        pid = begun(writer, run.folder)
        first = int(writer.stdout.readline())
        assert first > acknowledged
        time.sleep(float(rng.uniform(0, 0.05)))
        os.kill(pid, signal.SIGKILL)
        acknowledged = max(map(int, iter(writer.stdout.readline, "dead\n")), default=first)
        step, tensors, _, notes = Run.open(run.folder).restore()
        assert step >= acknowledged
        assert (int(tensors["step"]), notes) == (step, [])
        acknowledged = step
    writer.communicate("\n")
    with Run.open(run.folder, write=True) as last:
        last.rewind(acknowledged)
        assert [r["step"] for r in last.history()] == list(range(1, acknowledged + 1))
        assert not litter(run.folder)


# --- what is left behind ----------------------------------------------------------------------------------------------


def test_leftovers_are_cleared_only_for_the_writer(run):  # P8
    fill(run, 1)
    folder = run.folder / "checkpoints"
    for name in (f".tinylm-{'0' * 16}.tmp", f".tinylm-{'1' * 16}.trash"):
        (folder / name).write_text("half")
    run.close()
    Run.open(run.folder)
    assert len(litter(run.folder)) == 2
    Run.open(run.folder, write=True).close()
    assert not litter(run.folder)


def test_a_failed_save_keeps_last_saved_step_true(run, monkeypatch):  # P5
    fill(run, 1)
    with monkeypatch.context() as patch:
        patch.setattr(store, "free_bytes", lambda _: 10)
        with pytest.raises(OSError, match=r"No space left.*MB needed.*step-00000002"):
            run.save(2, state(2))
    assert run.last_saved_step == 1
    assert run.restore()[0] == 1
    fill(run, 2)
    assert run.last_saved_step == 2
    assert read_file(run.path(2))[1] == {"step": 2}
