"""Banks in files: streamed equals resident, only fetched rows change, a killed run resumes bit for bit."""

import json
import os
import shutil
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

from tinylm.config import ConfigError, ModelConfig, TrainConfig
from tinylm.data import Batch
from tinylm.memory import Bank, MemoriesError, add_memory, fetching, resume_with_bank, train_with_bank
from tinylm.memory import bank as bank_module
from tinylm.memory.training import Slots
from tinylm.model import Transformer
from tinylm.store import CheckpointDamaged, StateMismatch
from tinylm.training import train
from tinylm.weights import named

ROOT = Path(__file__).parents[1]
CONFIG = ModelConfig(vocab=64, context=8, width=16, layers=1, heads=2)
SHAPE = {"children": 3, "rows": (2, 1)}
RUN = TrainConfig(steps=12, batch=4, length=8, warmup=2, log_every=4, optimizer="adamw", save_every=0.0, clip=0.0)


def batches(step):
    """Rows of different leaves, now and then the generic one or none."""
    rng = np.random.default_rng([7, step])
    tokens = rng.integers(0, 64, (4, 9)).astype(np.int32)
    leaf = rng.integers(0, 9, 4)
    nodes = np.stack([leaf // 3, leaf], axis=1).astype(np.int32)
    nodes[0] = [3, 9] if step % 3 == 0 else nodes[0]
    nodes[1, 1] = -1
    return Batch(tokens[:, :-1], tokens[:, 1:], fetched=nodes)


def resident():
    return add_memory(Transformer(CONFIG), **SHAPE)


def with_slots(slots=6):
    return add_memory(Transformer(CONFIG), **SHAPE, slots=slots)


@pytest.fixture(scope="module")
def whole():
    """The run with everything on the device."""
    trainer = train(resident(), batches, RUN)
    list(trainer)
    return trainer


@pytest.fixture(scope="module")
def streamed(tmp_path_factory):
    """The same run with slots and files, never interrupted, with its run folder."""
    folder = tmp_path_factory.mktemp("streamed")
    trainer = train_with_bank(with_slots(), batches, RUN, Bank.of(folder / "bank", resident()), out=folder / "run")
    list(trainer)
    return trainer, folder


def test_streamed_is_resident(whole, streamed):
    trainer, _ = streamed
    assert trainer.losses == pytest.approx(whole.losses, abs=1e-6)
    bank, state = trainer.bank, whole.tensors()
    for level in (0, 1):
        rows, columns = bank.read(level, np.arange(bank.nodes[level])), bank.columns(level)
        for (kind, name), place in columns.items():
            leaf = f"{name}.bank.{level}"
            full = [
                n for n in state if n.endswith(leaf) and (n.startswith("params.") if kind == "param" else kind in n)
            ]
            expected = np.asarray(state[full[0]]).reshape(len(rows), -1)
            np.testing.assert_allclose(rows[:, place], expected, atol=2e-6, err_msg=f"{kind} {leaf}")
    own, nodes = bank.resident(trainer.model), [[0, 1], [2, 8], [3, 9]]
    tokens = batches(99).tokens[:3]
    expected = np.asarray(fetching(whole.model, nodes)(tokens))
    np.testing.assert_allclose(np.asarray(fetching(own, nodes)(tokens)), expected, atol=1e-5)
    np.testing.assert_allclose(np.asarray(bank.fetching(trainer.model, nodes)(tokens)), expected, atol=1e-5)


def test_rows_that_nothing_fetched_stay(tmp_path):
    before = resident()
    bank = Bank.of(tmp_path / "bank", before)
    few = lambda step: batches(step)._replace(fetched=np.array([[0, 0], [0, 2], [0, 0], [-1, -1]], np.int32))  # noqa: E731
    start = [bank.read(level, np.arange(n)) for level, n in enumerate(bank.nodes)]
    list(train_with_bank(with_slots(2), few, RUN.replace(steps=3), bank))
    again = Bank.open(tmp_path / "bank")
    for level, moved in ((0, {0}), (1, {0, 2})):
        rows = again.read(level, np.arange(again.nodes[level]))
        assert set(np.flatnonzero((rows != start[level]).any(1)).tolist()) == moved
    assert again.step == 3


def test_slots():
    slots = Slots(3)

    def fetch(wanted, call):
        missing, into, leaving = slots.plan(np.array(wanted))
        slots.take(np.array(wanted), missing, into, call)
        return [x.tolist() for x in (missing, into, leaving)]

    assert fetch([4, 7], 1) == [[4, 7], [0, 1], [-1, -1]]
    assert fetch([7, 9], 2) == [[9], [2], [-1]]
    assert fetch([2], 3) == [[2], [0], [4]]  # 4 was unused for longest
    assert slots.places(np.array([9, -1, 2, 7])).tolist() == [2, -1, 0, 1]
    with pytest.raises(MemoriesError, match="fetches 4 blocks of a level and the model has 3 slots"):
        slots.plan(np.arange(4))


def test_a_batch_that_does_not_fit_leaves_the_bank_whole(whole, tmp_path):
    bank, before = Bank.of(tmp_path / "bank", resident()), named(resident())
    wide = np.array([[0, 0], [1, 3], [2, 6], [0, 1], [0, 2]], np.int32)  # level 0 fits, level 1 does not
    source = lambda step: batches(step)._replace(fetched=wide) if step == 2 else batches(step)  # noqa: E731
    trainer = train_with_bank(with_slots(4), source, RUN, bank)
    with pytest.raises(MemoriesError, match="fetches 5 blocks"):
        list(trainer)
    assert trainer.step == 2
    assert trainer.losses == pytest.approx(whole.losses[:2], abs=1e-6)
    for level in (0, 1):
        values = bank.read(level, np.arange(bank.nodes[level]))[:, : bank.values[level][0]]
        fetched = np.unique([batches(step).fetched[:, level] for step in (0, 1)])
        moved = (values != np.asarray(before[f"blocks.0.mlp.bank.{level}"])).any(axis=1)
        assert np.array_equal(np.flatnonzero(moved), fetched[fetched >= 0])


CODE = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from test_memory_bank import *
folder = Path(sys.argv[2])
trainer = train_with_bank(with_slots(), batches, RUN, Bank.of(folder / "bank", resident()), out=folder / "run")
for step in trainer:
    if step.step == 4:
        trainer.save()
    if step.step == 8:
        os.kill(os.getpid(), signal.SIGKILL)
"""


def require_same_end(folder, step, streamed):
    """The run in `folder` goes on from `step` and ends as the uninterrupted one did."""
    bank = Bank.open(folder / "bank")
    trainer = resume_with_bank(folder / "run", bank, data=batches)
    assert trainer.step == step
    list(trainer)
    one, other = trainer.tensors(), streamed[0].tensors()
    assert one.keys() == other.keys()
    for name, value in other.items():
        assert np.array_equal(one[name], value), name
    for level, n in enumerate(bank.nodes):
        assert np.array_equal(bank.read(level, np.arange(n)), streamed[0].bank.read(level, np.arange(n)))


def test_a_killed_run_resumes_bit_for_bit(streamed, tmp_path):  # P1
    done = subprocess.run([sys.executable, "-c", CODE, str(ROOT / "tests"), str(tmp_path)], cwd=ROOT, timeout=200)
    assert done.returncode == -signal.SIGKILL
    require_same_end(tmp_path, 4, streamed)


def test_a_checkpoint_can_be_interrupted_anywhere(streamed, tmp_path):
    """The folders as they are before the checkpoint is written, and before its rows are in their places."""
    home = tmp_path / "first"
    trainer = train_with_bank(with_slots(), batches, RUN, Bank.of(home / "bank", resident()), out=home / "run")
    kept = {"before": trainer.run, "after": trainer.bank}

    def copying(name, then):
        def call(*args, **more):
            shutil.copytree(home, tmp_path / name)  # files are mapped: what was written is there, durable or not
            return then(*args, **more)

        return call

    for step in trainer:
        if step.step == 4:
            trainer.save()
        if step.step == 8:
            kept["before"].save = copying("before", kept["before"].save)
            kept["after"].apply = copying("after", kept["after"].apply)
            trainer.save()
            break
    require_same_end(tmp_path / "before", 4, streamed)
    require_same_end(tmp_path / "after", 8, streamed)


@pytest.mark.slow
def test_two_devices_and_a_population_equal_one(whole):
    code = f"""
import json, sys
sys.path.insert(0, {str(ROOT / "tests")!r})
from test_memory_bank import *
from tinylm.population import Population
from tinylm.training import Trainer
two = train(resident(), batches, RUN.replace(parallel="data"))
list(two)
many = Population([Trainer(resident(), batches, RUN), Trainer(resident(), lambda step: batches(step + 50), RUN)])
list(many)
print(json.dumps([two.losses, many.members[0].losses]))
"""
    env = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count=2 {os.environ['XLA_FLAGS']}"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, stdout=subprocess.PIPE, check=True, timeout=400
    )
    for losses in json.loads(done.stdout):
        assert losses == pytest.approx(whole.losses, rel=1e-5)


def test_what_is_written_between_two_runs_is_taken_up(streamed, tmp_path):
    shutil.copytree(streamed[1], tmp_path / "one")
    bank, slots = Bank.open(tmp_path / "one" / "bank"), streamed[0].bank.slots
    node = int(slots["node.1"].max())  # on the device in the checkpoint
    bank.write(1, [node], 7.0)
    trainer = resume_with_bank(tmp_path / "one" / "run", bank, data=batches)
    assert node not in trainer.slots[1].node
    assert (trainer.slots[0].node == slots["node.0"]).all()
    trainer.state, _ = trainer._bring(trainer.state, [batches(0)._replace(fetched=np.array([[node // 3, node]]))])
    (held,) = [rows[nodes == node] for level, nodes, rows in trainer._held() if level == 1]
    assert (held[:, :48] == 7).all()
    assert not held[:, 48:].any()
    trainer.run.close()


def test_the_bank_of_another_run_is_refused(streamed, tmp_path):
    """Also one that stands at the same step; nothing of one step is written twice."""
    shutil.copytree(streamed[1], tmp_path / "one")
    bank, slots = Bank.open(tmp_path / "one" / "bank"), streamed[0].bank.slots
    node = slots["node.1"][-1:]
    bank.stage(1, node, bank.read(1, node) + 1)
    bank.prepare(12, slots)
    bank.apply()
    with pytest.raises(StateMismatch, match=f"has another node {node[0]} of level 1 than the checkpoint of step 12"):
        resume_with_bank(tmp_path / "one" / "run", bank, data=batches)
    with pytest.raises(MemoriesError, match="give a Bank, such as Bank.open"):
        resume_with_bank(tmp_path / "one" / "run", tmp_path / "one" / "bank", data=batches)
    trainer, path = streamed[0], streamed[0].run.path(12)
    before = path.stat().st_mtime_ns
    assert trainer.save() == path
    assert path.stat().st_mtime_ns == before


def test_a_step_that_fails_leaves_the_rows_usable(made, tmp_path):
    bank = Bank.open(shutil.copytree(made, tmp_path / "bank"))
    three = lambda step: batches(step)._replace(fetched=batches(step).fetched[:3])  # noqa: E731
    with pytest.raises(MemoriesError, match="3 rows of nodes for 4 rows of tokens"):
        list(train_with_bank(with_slots(), three, RUN, bank))
    trainer = train_with_bank(with_slots(), batches, RUN, bank)

    def failing(*args):
        raise RuntimeError("in the step")

    trainer._inner = failing
    with pytest.raises(RuntimeError, match="in the step"):
        list(trainer)
    bank.verify()
    before = Bank.open(made)
    for level, n in enumerate(bank.nodes):
        assert np.array_equal(bank.read(level, np.arange(n)), before.read(level, np.arange(n)))


def test_a_bank_is_refused_where_it_does_not_belong(streamed, tmp_path):
    _, folder = streamed
    bank = Bank.open(folder / "bank")
    assert bank.step == 12
    assert bank.parameters == (4 * 2 + 10 * 1) * 3 * 16
    with pytest.raises(StateMismatch, match="holds the rows of step 12, the run's checkpoint is of 5"):
        bank.recover(5)
    with pytest.raises(FileExistsError, match="holds a bank already"):
        Bank.of(folder / "bank", resident())
    with pytest.raises(MemoriesError, match="holds slots"):
        Bank.of(tmp_path / "b", with_slots())
    with pytest.raises(MemoriesError, match="holds slots of a bank that lies in files: fetch with"):
        fetching(with_slots(), [0, 0])
    with pytest.raises(MemoriesError, match="bank of other memories"):
        train_with_bank(add_memory(Transformer(CONFIG), children=2, rows=(1,), slots=2), batches, RUN, bank)
    with pytest.raises(ConfigError, match="one device and without ema"):
        train_with_bank(with_slots(), batches, RUN.replace(ema=0.9), bank)
    with pytest.raises(MemoriesError, match="do not fit 2 slots"):
        bank.fetching(with_slots(2), [[0, 0], [1, 3], [2, 6]])
    shutil.copytree(folder / "bank", tmp_path / "cut")
    os.truncate(tmp_path / "cut" / "level-0.rows", 100)
    with pytest.raises(StateMismatch, match="100 bytes instead of"):
        Bank.open(tmp_path / "cut")


def test_a_new_bank_draws_every_node_and_can_be_edited(tmp_path):
    model = with_slots(2)
    bank = Bank.create(tmp_path / "bank", model, seed=3)
    rows, columns = bank.read(1, np.arange(10)), bank.columns(1)
    values = rows[:, columns["param", "blocks.0.mlp"]].reshape(10, 3, 16)
    assert len(np.unique(values[:, 0, 0])) == 10
    assert not values[:, 2].any()  # the part behind the activation: a no-op
    assert not rows[:, columns["mean", "blocks.0.mlp"]].any()
    assert 0.8 < values[:, :2].std() * 4 < 1.2  # 1 / sqrt(width)
    tokens = batches(0).tokens
    assert np.array_equal(np.asarray(bank.fetching(model, [2, 8])(tokens)), np.asarray(Transformer(CONFIG)(tokens)))
    bank.write(1, [3, 4], 7.0)
    again = Bank.open(tmp_path / "bank")
    assert (again.read(1, np.array([3, 4]))[:, :48] == 7).all()
    assert np.array_equal(again.read(1, np.array([5])), rows[5:6])
    assert set(named(bank.resident(model))) == set(named(resident()))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a bank that is never changed: copy it."""
    return Bank.of(tmp_path_factory.mktemp("made") / "bank", resident()).folder


def flip(path, byte, bit=3):
    with path.open("r+b") as file:
        file.seek(byte)
        old = file.read(1)[0]
        file.seek(byte)
        file.write(bytes([old ^ (1 << bit)]))


def test_a_flipped_bit_is_found_and_named(made, tmp_path):
    folder = Path(shutil.copytree(made, tmp_path / "bank"))
    bank = Bank.open(folder)
    bank.verify()
    size = 4 * (3 * 48 + 1)  # parameters, two moments, a count
    raw, sums = (folder / "level-1.rows").read_bytes(), (folder / "level-1.sums").read_bytes()
    assert sums == b"".join(zlib.crc32(raw[n * size : (n + 1) * size], n).to_bytes(4, sys.byteorder) for n in range(10))
    for byte in (0, 4 * 50, 4 * 100, size - 1):  # a parameter, each moment, the count
        flip(folder / "level-1.rows", 7 * size + byte)
        with pytest.raises(
            CheckpointDamaged, match=rf"level-1\.rows: node 7 of level 1, bytes {7 * size} to {8 * size - 1}, "
        ):
            Bank.open(folder).verify()
        with pytest.raises(CheckpointDamaged, match="node 7 of level 1"):
            bank.fetching(with_slots(), [2, 7])
        bank.read(1, [6, 8])
        flip(folder / "level-1.rows", 7 * size + byte)
        bank.verify()
    for name, place in (("rows", 2 * size), ("rows", 3 * size), ("sums", 4 * 5)):
        flip(folder / f"level-1.{name}", place)
    with pytest.raises(CheckpointDamaged, match="node 2 of level 1.*, and 2 more of 10 rows: put back .* bank.write"):
        bank.verify()
    bank.write(1, [2, 3, 5], 0)  # the remedy that the message names
    Bank.open(folder).verify()
    rows = np.memmap(folder / "level-1.rows", np.float32, "r+", shape=(10, size // 4))
    rows[[0, 1]] = rows[[1, 0]]  # sound rows, at each other's places
    with pytest.raises(CheckpointDamaged, match="node 0 of level 1.*, and 1 more"):
        bank.verify()


def test_changed_rows_are_checked_before_they_replace_others(made, tmp_path):
    folder = Path(shutil.copytree(made, tmp_path / "bank"))
    bank = Bank.open(folder)
    before = bank.read(0, np.arange(4))
    bank.stage(0, np.array([1, 2]), before[1:3] + 1)
    bank.prepare(5, {})
    flip(folder / "level-0.changed", 2 * 4 * bank.width(0))
    again = Bank.open(folder)
    for _ in range(2):  # also when it is tried anew
        with pytest.raises(CheckpointDamaged, match=r"level-0\.changed: node 2 of level 0"):
            again.recover(5)
    with pytest.raises(CheckpointDamaged, match=r"level-0\.changed"):
        bank.read(0, [2])
    with pytest.raises(MemoriesError, match=r"killed here as it saved.* keep its rows with bank.recover.5., or drop"):
        again.write(0, [1], 0)
    again.recover(0)  # the checkpoint before is whole
    again.verify()
    assert np.array_equal(again.read(0, np.arange(4)), before)
    again.stage(0, np.array([3]), before[3:] + 1)
    again.prepare(0, {})  # as far as a killed `write` came
    again = Bank.open(folder)
    again.write(0, [1], 2.0)
    again.verify()
    assert (again.read(0, [1])[:, :96] == 2).all()
    assert np.array_equal(again.read(0, [3]), before[3:])


class Watched:
    """A mapped file that tells before anything is done to it."""

    def __init__(self, table, tell):
        self.table, self.tell = table, tell

    def __getitem__(self, at):
        return self.table[at]

    def __setitem__(self, at, value):
        self.tell()
        self.table[at] = value
        self.tell()

    def flush(self):
        self.tell()
        self.table.flush()


def test_rows_and_sums_agree_wherever_a_commit_is_killed(made, tmp_path, monkeypatch):
    bank = Bank.open(shutil.copytree(made, tmp_path / "bank"))
    copies = []

    def copy():
        copies.append(Path(shutil.copytree(bank.folder, tmp_path / f"copy-{len(copies)}")))

    def telling(call):
        return lambda *args, **more: (copy(), call(*args, **more))[1]

    levels = [(0, np.array([1, 3])), (1, np.array([0, 4, 9]))]
    old = [bank.read(level, np.arange(n)) for level, n in enumerate(bank.nodes)]
    new = [rows.copy() for rows in old]
    monkeypatch.setattr(bank_module, "PIECE", 1)  # row by row
    for name in ("_rows", "_sums", "_changed"):
        setattr(bank, name, [Watched(table, copy) for table in getattr(bank, name)])
    for name in ("write_file", "sync_folder"):
        monkeypatch.setattr(bank_module, name, telling(getattr(bank_module, name)))
    for name in ("replace", "truncate"):
        monkeypatch.setattr(os, name, telling(getattr(os, name)))
    for level, nodes in levels:
        new[level][nodes] += 1
        bank.stage(level, nodes, new[level][nodes])
    bank.prepare(5, {"node.0": np.array([4])})
    bank.apply()
    copy()
    monkeypatch.undo()
    assert len(copies) > 20
    steps = set()
    for folder in copies:
        prepared = (folder / "commit.safetensors").exists()
        for step in {Bank.open(folder).step, 5} if prepared else {Bank.open(folder).step}:
            one = Bank.open(shutil.copytree(folder, f"{folder}-{step}"))
            one.verify()  # as it was left
            for rows, level in zip(new if one.step else old, (0, 1), strict=True):
                assert np.array_equal(one.read(level, np.arange(len(rows))), rows)
            one.recover(step)
            for again in (one, Bank.open(one.folder)):
                again.verify()
                assert again.step == step
                assert set(again.slots) == ({"node.0"} if step else set())
                for rows, level in zip(new if step else old, (0, 1), strict=True):
                    assert np.array_equal(again.read(level, np.arange(len(rows))), rows)
            assert not any((one.folder / f"{name}.safetensors").exists() for name in ("commit", "applied"))
            steps.add((prepared, step))
    assert steps == {(False, 0), (True, 0), (True, 5), (False, 5)}


def test_what_a_bank_cannot_do_is_said(made, tmp_path):
    bank = Bank.open(shutil.copytree(made, tmp_path / "bank"))
    for call, said in (
        (lambda: bank.read(2, [0]), "level = 2: this bank has levels 0 to 1"),
        (lambda: bank.read(1, [10]), "level 1 has nodes 0 to 8 and the generic 9"),
        (lambda: bank.read(1, [-1]), "level 1 has nodes 0 to 8"),
        (lambda: bank.write(7, [0], 0), "level = 7"),
        (lambda: bank.write(1, [0.5], 0), "nodes = "),
        (lambda: bank.write(1, [1], float("nan")), "one number or .1, 48. of them, all finite"),
        (lambda: bank.write(1, [1], np.zeros((2, 3))), "one number or .1, 48. of them"),
        (lambda: bank.fetching(with_slots(), "genric"), 'nodes = .genric.: give numbers, "generic" or "none"'),
    ):
        with pytest.raises(MemoriesError, match=said):
            call()
    bank.verify()
    assert not bank.read(1, []).size
    about = bank.folder / "bank.json"
    text = about.read_text()
    for damaged in (text[:40], "{}", '{"format": 2}', "[]"):
        about.write_text(damaged)
        with pytest.raises(CheckpointDamaged, match="bank.json is not what was written"):
            Bank.open(bank.folder)
    about.write_text(text.replace('"format": 2', '"format": 1'))
    with pytest.raises(StateMismatch, match="bank format 1; this version reads 2"):
        Bank.open(bank.folder)
