"""The loop: exact under interrupts, kills and resumes; guarded against what is not finite; honest about its input."""

import hashlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from tinylm.checkpoint import Run, StateMismatch, load
from tinylm.config import ConfigError, ModelConfig, TrainConfig
from tinylm.data import Windows
from tinylm.model import Transformer
from tinylm.resuming import resume
from tinylm.shards import Tokens, write_tokens
from tinylm.step import compiled_update
from tinylm.tokenizer import Tokenizer
from tinylm.training import Interrupt, TrainingDiverged, train
from tinylm.weights import named
from tinylm.world import World

MODEL = ModelConfig(vocab=512, context=32, width=32, layers=2, heads=2, dropout=0.1, window=(0, 16))
CONFIG = TrainConfig(
    steps=30, batch=4, optimizer="adamw", learning_rate=1e-2, warmup=4, log_every=1, accumulate=2, seed=3
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(World().texts(60), vocab=512)


@pytest.fixture(scope="module")
def shards(tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_tokens(World().texts(6), tokenizer, folder, split="train")
    write_tokens(World().texts(4, seed=1), tokenizer, folder, split="valid")
    return folder


@pytest.fixture(scope="module")
def tokens(shards) -> Tokens:
    return Tokens.open(shards, "train")


def fresh(tokenizer=None, config: ModelConfig = MODEL) -> Transformer:
    return Transformer(config, rngs=1, tokenizer=tokenizer)


def digest(trainer) -> str:
    """Of every bit of the training state."""
    found = hashlib.sha256()
    for name, value in sorted(trainer.tensors().items()):
        found.update(name.encode() + np.ascontiguousarray(value).tobytes())
    return found.hexdigest()


@pytest.fixture(scope="module")
def reference(tokens, tokenizer):
    """An uninterrupted run: its trainer, with every loss."""
    trainer = train(fresh(tokenizer), tokens, CONFIG)
    for _ in trainer:
        pass
    return trainer


# --- what a run gives -------------------------------------------------------------------------------------------------


def test_it_learns_and_reports(reference, tokens):
    assert reference.outcome == "done"
    assert [step.step for step in reference.history] == list(range(1, 31))
    assert np.mean(reference.losses[-5:]) < np.mean(reference.losses[:5]) - 0.3
    last = reference.history[-1]
    assert last.tokens == 30 * 4 * 32
    assert last.progress == 1.0
    assert last.learning_rate == pytest.approx(1e-2 * (0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * 29 / 30))))
    assert len(tokens) < 30 * 4 * 32, "the run must cross an epoch border for the resume tests to mean anything"


def test_the_model_is_current_at_every_yield(tokens, tokenizer):
    trainer = train(fresh(tokenizer), tokens, CONFIG.replace(steps=6, log_every=3))
    for step in trainer:
        held = named(trainer.model)
        assert all((held[name] == value).all() for name, value in trainer.state.params.items())
        assert step.step % 3 == 0
    assert [s.step for s in trainer.history] == [3, 6]
    assert len(trainer.losses) == 6


def test_weights_handed_out_survive_later_steps(tokens):  # P24
    """The step reuses its buffers; what a caller took from the model must stay readable and unchanged."""
    taken = []
    for step in (trainer := train(fresh(), tokens, CONFIG.replace(steps=8, log_every=2))):
        taken.append((step, {k: (v, np.array(v)) for k, v in named(trainer.model).items()}))
    for _, weights in taken:
        assert all((np.asarray(live) == copy).all() for live, copy in weights.values())


def test_validation_is_the_mean_loss_of_its_batches(tokens, shards, tokenizer):
    valid = Tokens.open(shards, "valid")
    model = fresh(tokenizer)
    trainer = train(model, tokens, CONFIG.replace(steps=4, eval_every=2, eval_batches=3), valid=valid)
    steps = list(trainer)
    assert [s.step for s in steps if s.valid_loss is not None] == [2, 4]
    windows, nats = Windows(valid, batch=4, length=32, seed=0), []
    for i in range(3):
        batch = windows(i)
        logp = jax.nn.log_softmax(model(batch.tokens))
        nats.append(-np.take_along_axis(np.asarray(logp), batch.targets[..., None], -1).mean())
    assert steps[-1].valid_loss == pytest.approx(np.mean(nats), rel=1e-5)
    assert steps[-1].valid_bits == pytest.approx(steps[-1].valid_loss / np.log(2) * (len(valid) - 1) / valid.bytes)


def test_a_budget_ends_in_time_and_tokens_become_steps(tokens):
    trainer = train(fresh(), tokens, CONFIG.replace(steps=0, budget=4.0, warmup=1))
    steps = list(trainer)
    assert trainer.outcome == "done"
    assert steps[-1].seconds >= 4.0
    assert steps[-3].seconds < 4.0  # two steps may be in flight
    assert steps[-1].progress == 1.0
    assert steps[-1].learning_rate < steps[0].learning_rate
    assert train(fresh(), tokens, TrainConfig(tokens=1000, batch=4)).steps == 8


def test_a_budget_always_ends_with_a_validation(tokens, shards):
    """Whether time runs out before, in or after a step."""
    valid = Tokens.open(shards, "valid")
    for budget in (0.5, 0.501, 0.507, 0.513, 0.52):
        trainer = train(fresh(), tokens, CONFIG.replace(steps=0, budget=budget, eval_batches=1), valid=valid)
        for _ in trainer:
            pass
        last = trainer.history[-1]
        assert (last.step, last.progress, trainer.outcome) == (trainer.step, 1.0, "done")
        assert last.valid_loss is not None


def test_run_jsonl_holds_every_logged_step(tokens, tokenizer, tmp_path):
    trainer = train(fresh(tokenizer), tokens, CONFIG.replace(steps=5, log_every=2), out=tmp_path / "run")
    for _ in trainer:
        pass
    lines = [json.loads(line) for line in (tmp_path / "run" / "run.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 5]
    assert {"step", "loss", "tokens", "seconds", "learning_rate", "grad_norm"} <= lines[0].keys()
    assert [line["loss"] for line in lines] == [trainer.losses[i] for i in (1, 3, 4)]
    assert Run.open(tmp_path / "run").steps() == [5]
    again = load(tmp_path / "run")
    assert all((named(again)[k] == v).all() for k, v in named(trainer.model).items())
    assert again.tokenizer == tokenizer


def test_a_tracker_hears_everything(tokens):
    heard = []

    class Heard:
        def start(self, config):
            heard.append(("start", config["train"]["steps"]))

        def log(self, record):
            heard.append(("log", record["step"]))

        def finish(self, outcome):
            heard.append(("finish", outcome))

    for _ in train(fresh(), tokens, CONFIG.replace(steps=2), tracker=Heard()):
        pass
    assert heard == [("start", 2), ("log", 1), ("log", 2), ("finish", "done")]


def test_training_again_compiles_nothing(tokens):  # P16
    for _ in train(fresh(), tokens, CONFIG.replace(steps=1)):
        pass
    update = train(fresh(), tokens, CONFIG).update
    size = update._cache_size()
    for _ in train(fresh(), tokens, CONFIG.replace(steps=2, learning_rate=0.5, seed=9)):
        pass
    assert compiled_update.cache_info().hits > 0
    assert train(fresh(), tokens, CONFIG).update is update
    assert update._cache_size() == size


def test_mlm_learns(tokens, tokenizer):
    encoder = fresh(tokenizer, MODEL.replace(kind="encoder", head="mlm", dropout=0.0))
    trainer = train(encoder, tokens, CONFIG.replace(steps=40, objective="mlm", mask_rate=0.3, batch=8))
    for _ in trainer:
        pass
    assert np.mean(trainer.losses[-8:]) < np.mean(trainer.losses[:3]) - 0.3


@pytest.mark.parametrize(("together", "log_every"), [(2, 10), (4, 10), (10, 30), (50, 7)])
def test_steps_in_one_call_change_no_bit(together, log_every, reference, tokens, tokenizer):
    trainer = train(fresh(tokenizer), tokens, CONFIG.replace(steps_per_call=together, log_every=log_every))
    assert [step.step for step in trainer] == [*range(log_every, 30, log_every), 30]
    assert trainer.losses == reference.losses
    assert digest(trainer) == digest(reference)


def test_steps_share_calls_unless_told_otherwise(reference, tokens, tokenizer, monkeypatch):
    """By default their number doubles while a call takes little time; none reaches over what is due."""
    monkeypatch.setattr("tinylm.training.CALL", 1e9)
    calls = {}
    for each in (0, 1):
        trainer = train(fresh(tokenizer), tokens, CONFIG.replace(steps_per_call=each, log_every=30))
        update, counts = trainer.update, []
        trainer.update = lambda *given, update=update, counts=counts: counts.append(given[4:]) or update(*given)
        list(trainer)
        calls[each] = [int(given[0]) if given else 1 for given in counts]
        assert trainer.losses == reference.losses
        assert digest(trainer) == digest(reference)
    assert calls == {0: [1, 1, 2, 4, 8, 8, 6], 1: [1] * 30}


def test_steps_in_one_call_with_an_interrupt_and_masks(tokens, tokenizer, tmp_path):  # P3
    """What is due inside a call is done at its step; a stopped run goes on exactly, also one step at a time."""
    config = CONFIG.replace(steps=24, objective="mlm", mask_rate=0.2, accumulate=1, log_every=12, eval_every=8)
    make = lambda: fresh(tokenizer, MODEL.replace(kind="encoder", head="mlm"))  # noqa: E731
    alone = train(make(), tokens, config, valid=tokens)
    for _ in alone:
        pass
    trainer = train(make(), tokens, config.replace(steps_per_call=6), valid=tokens, out=tmp_path / "run")
    assert [step.step for step in trainer if step.step != 12 or trainer.stop()] == [8]
    assert (trainer.step, trainer.outcome) == (12, "stopped")
    trainer.run.close()
    again = resume(tmp_path / "run", data=tokens, valid=tokens)
    assert [(step.step, step.valid_loss is None) for step in again] == [(16, False), (24, False)]
    assert trainer.losses + again.losses == alone.losses
    assert digest(again) == digest(alone)
    again.run.close()


@pytest.mark.parametrize("settings", [{"ema": 0.9}, {"optimizer": "schedule_free", "schedule": "constant"}], ids=str)
def test_averaged_weights_are_validated_handed_out_and_loaded(settings, tokens, tokenizer, tmp_path):
    config = CONFIG.replace(steps=12, **settings)
    trainer = train(fresh(tokenizer), tokens, config, valid=tokens, out=tmp_path / "run")
    last = list(trainer)[-1]
    average = trainer.state.opt.average
    assert any((value != trainer.state.params[name]).any() for name, value in average.items())
    for model in (trainer.model, load(tmp_path / "run")):
        assert all((value == average[name]).all() for name, value in named(model).items())
    batch = Windows(tokens, batch=4, length=32, seed=0)(0)
    logp = np.asarray(jax.nn.log_softmax(trainer.model(batch.tokens)))
    first = -np.take_along_axis(logp, batch.targets[..., None], -1).mean()
    assert last.valid_loss == pytest.approx(first, rel=0.2)
    again = train(fresh(tokenizer), tokens, config.replace(steps=12), out=tmp_path / "again")
    for step in again:
        if step.step == 5:
            again.stop()
    again.run.close()
    again = resume(tmp_path / "again", data=tokens)
    for _ in again:
        pass
    assert digest(again) == digest(trainer)
    again.run.close()


def test_frozen_parameters_do_not_move(tokens, tokenizer):
    model = fresh(tokenizer)
    before = {name: np.array(value) for name, value in named(model).items()}
    for _ in train(model, tokens, CONFIG.replace(steps=3, rates=(r"blocks\..*=0",))):
        pass
    moved = {name for name, value in named(model).items() if (np.asarray(value) != before[name]).any()}
    assert moved == {name for name in before if not name.startswith("blocks.")}
    with pytest.raises(ConfigError, match="'blocs' matches no parameter"):
        train(model, tokens, CONFIG.replace(rates=("blocs=0",)))


def test_documents_keep_attention_inside_each(tokens, tokenizer):
    """What stands before a document changes nothing in it: the loss is that of the documents alone."""
    config = CONFIG.replace(steps=2, documents=True)
    trainer = train(fresh(tokenizer), tokens, config)
    batch = next(b for b in map(trainer.batches, range(40)) if b.segments.max() > 1)
    model = fresh(tokenizer)
    logits = model(batch.tokens, positions=batch.positions, segments=batch.segments)
    row = int(np.argmax(batch.segments.max(1)))
    own = batch.segments[row] == batch.segments[row].max()
    alone = model(batch.tokens[row : row + 1, own])
    np.testing.assert_allclose(logits[row, own], alone[0], atol=1e-5)
    assert [step.step for step in trainer] == [1, 2]


# --- stopping and going on --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stops", "codec"), [([1], "raw"), ([2], "raw"), ([29], "planes"), ([5, 6, 20], "planes")])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(stops, codec, reference, tokens, tokenizer, tmp_path):  # P3
    trainer = train(fresh(tokenizer), tokens, CONFIG.replace(codec=codec), out=tmp_path / "run")
    losses = []
    for stop in stops:
        for step in trainer:
            if step.step >= stop:
                trainer.stop()
        losses += trainer.losses
        trainer.run.close()
        trainer = resume(tmp_path / "run", data=tokens)
        assert trainer.step == len(losses)
    for _ in trainer:
        pass
    losses += trainer.losses
    assert losses == reference.losses
    assert digest(trainer) == digest(reference)
    size = sum(value.nbytes for value in trainer.tensors().values())
    assert (trainer.run.path(30).stat().st_size < 0.9 * size) == (codec == "planes")
    trainer.run.close()


PLANTED = {
    "first moments lost": lambda t: {k: v * 0 if ".mu." in k else v for k, v in t.items()},
    "second moments lost": lambda t: {k: v * 0 if ".nu." in k else v for k, v in t.items()},
    "Adam's count lost": lambda t: {k: v * 0 if k.endswith("count") else v for k, v in t.items()},
    "weights rounded": lambda t: {
        k: np.asarray(v, jax.numpy.bfloat16).astype(v.dtype) if k.startswith("params.") else v for k, v in t.items()
    },
    "dropout's key not advanced": lambda t: {k: v - 1 if k == "step" else v for k, v in t.items()},
}


@pytest.mark.parametrize("bug", [*PLANTED, "data from the start", "data off by one"])
def test_the_resume_test_sees_planted_bugs(bug, reference, tokens, tokenizer, tmp_path):  # P3, P30
    trainer = train(fresh(tokenizer), tokens, CONFIG, out=tmp_path / "run")
    for step in trainer:
        if step.step == 10:
            trainer.stop()
    trainer.run.close()
    trainer = resume(tmp_path / "run", data=tokens)
    if bug in PLANTED:
        changed = PLANTED[bug](trainer.tensors())
        assert any((changed[k] != v).any() for k, v in trainer.tensors().items())
        trainer.adopt(changed)
        trainer.step = 10
    else:
        right = trainer.batches
        trainer.batches = lambda step: right(step - 10 if bug == "data from the start" else step + 1)
    for _ in trainer:
        pass
    trainer.run.close()
    assert digest(trainer) != digest(reference)


CHILD = """
import os, sys
os.environ["NPROC"] = "2"
from tinylm.resuming import resume
from tinylm.training import train
from tinylm.checkpoint import Run
from tinylm.shards import Tokens
import test_training as t
folder, shards, steps = sys.argv[1:]
tokens = Tokens.open(shards, "train")
if os.path.exists(folder + "/config.json") and Run.open(folder).steps():
    trainer = resume(folder)
else:
    import shutil
    shutil.rmtree(folder, ignore_errors=True)
    trainer = train(t.fresh(), tokens, t.CONFIG.replace(steps=int(steps), save_every=0.001), out=folder)
trainer._save_is_due = lambda: trainer.step % 10 == 0
for step in trainer:
    print(step.step, flush=True)
"""


def child(folder: Path, shards: Path, steps: int) -> subprocess.Popen:
    path = os.pathsep.join(
        [str(Path(__file__).parent), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    )
    env = {**os.environ, "PYTHONPATH": path}
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder), str(shards), str(steps)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=env,
    )


def logged(folder: Path) -> list[tuple[int, float]]:
    return [(r["step"], r["loss"]) for r in map(json.loads, (folder / "run.jsonl").read_text().splitlines())]


@pytest.mark.parametrize("kills", [2, pytest.param(40, marks=pytest.mark.slow)])
def test_kill_9_loses_at_most_an_interval_and_changes_nothing(kills, shards, tmp_path):  # P1
    steps = 100 + 100 * kills  # a sitting does about sixty
    whole = child(tmp_path / "whole", shards, steps)
    _, err = whole.communicate(timeout=300)
    assert whole.returncode == 0, err.decode()
    rng, killed = random.Random(7), 0
    for _ in range(kills + 20):
        process = child(tmp_path / "killed", shards, steps)
        assert process.stdout is not None
        seen = int(process.stdout.readline() or 0)
        if killed < kills:
            for line in itertools.islice(process.stdout, rng.randrange(5, 120)):
                seen = int(line)
            time.sleep(rng.random() * 0.02)
            process.kill()
            killed += 1
        _, err = process.communicate(timeout=300)
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, err.decode()
        newest = max(Run.open(tmp_path / "killed").steps(), default=0)
        assert newest >= seen - 10
    assert killed == kills
    assert logged(tmp_path / "killed") == logged(tmp_path / "whole")
    tensors = [Run.open(tmp_path / name).restore()[1] for name in ("whole", "killed")]
    assert tensors[0].keys() == tensors[1].keys()
    assert all((tensors[0][k] == tensors[1][k]).all() for k in tensors[0])


def test_ctrl_c_at_any_moment_leaves_an_exact_state(reference, tokens, tokenizer):  # P17
    """SIGINT at random moments of many sittings: the model is always usable and the losses are the undisturbed ones."""
    trainer, rng, interrupts = train(fresh(tokenizer), tokens, CONFIG), random.Random(5), 0
    while trainer.outcome != "done":
        timer = threading.Timer(rng.random() * 0.05, os.kill, (os.getpid(), signal.SIGINT))
        try:
            timer.start()  # waits for its thread, and the signal may come meanwhile
            for _ in trainer:
                pass
            timer.cancel()
            timer.join()
        except KeyboardInterrupt:  # it came before the loop or after it
            pass
        if trainer.outcome == "interrupted":
            interrupts += 1
            assert trainer.signal == signal.SIGINT
        held = named(trainer.model)
        assert all((held[name] == value).all() for name, value in trainer.state.params.items())
    assert interrupts > 0
    assert trainer.losses == reference.losses
    assert digest(trainer) == digest(reference)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_acts_at_once():  # P6
    with Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.asked == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)


def test_leaving_the_loop_keeps_the_state_and_iterating_goes_on(reference, tokens, tokenizer):  # P17
    trainer = train(fresh(tokenizer), tokens, CONFIG)
    for step in trainer:
        if step.step == 4:
            break
    assert trainer.outcome == "stopped"
    with pytest.raises(ZeroDivisionError):
        for _ in trainer:
            _ = 1 / 0
    for _ in trainer:
        pass
    assert trainer.losses == reference.losses
    assert digest(trainer) == digest(reference)


def test_training_off_the_main_thread_works(tokens):
    done = []
    thread = threading.Thread(target=lambda: done.extend(train(fresh(), tokens, CONFIG.replace(steps=3))))
    thread.start()
    thread.join()
    assert len(done) == 3


# --- what must not get through ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("at", [0, 5])
def test_a_loss_that_is_not_finite_never_reaches_the_weights(poison, at, tokens, tokenizer, tmp_path):  # P12
    clean = Windows(tokens, batch=4, length=32, seed=3)

    def batches(step):
        batch = clean(step)
        weights = np.ones_like(batch.targets, np.float32)
        weights[0, 0] = poison if step == at else 1
        return batch._replace(weights=weights)

    trainer = train(fresh(tokenizer), batches, CONFIG, out=tmp_path / "run")
    with pytest.raises(TrainingDiverged, match=f"step {at + 1}.*weights of step {at}.*learning_rate"):
        for _ in trainer:
            pass
    assert trainer.outcome == "diverged"
    assert trainer.step == at
    assert all(np.isfinite(value).all() for value in trainer.tensors().values())
    twin = train(fresh(tokenizer), lambda step: batches(step) if step < at else clean(step), CONFIG)
    for step in twin.every_step() if at else ():
        if step.step == at:
            twin.stop()
    if at:
        twin_at = train(fresh(tokenizer), batches, CONFIG)
        for step in twin_at:
            if step.step == at:
                twin_at.stop()
        assert digest(twin_at) == digest(trainer)
    assert Run.open(tmp_path / "run").restore()[0] == at
    trainer.run.close()


def test_a_disk_that_refuses_a_checkpoint_does_not_end_the_run(tokens, tmp_path, monkeypatch):  # P5
    trainer = train(fresh(), tokens, CONFIG.replace(steps=6, save_every=1e-9), out=tmp_path / "run")
    save, full = trainer.run.save, [True]

    def refuse(*args, **more):
        if full.pop() if full else False:
            raise OSError(28, "No space left on device")
        return save(*args, **more)

    monkeypatch.setattr(trainer.run, "save", refuse)
    with pytest.warns(UserWarning, match="no checkpoint at step 1: .*No space left.*training goes on"):
        for _ in trainer:
            pass
    assert trainer.outcome == "done"
    assert isinstance(trainer.last_error, OSError)
    assert Run.open(tmp_path / "run").steps()[-1] == 6
    trainer.run.close()


def test_wrong_combinations_are_refused(tokens, tokenizer, shards, tmp_path):
    with pytest.raises(ConfigError, match='objective "mlm" needs a encoder|needs an encoder'):
        train(fresh(tokenizer), tokens, CONFIG.replace(objective="mlm"))
    with pytest.raises(ConfigError, match="512 token ids, the model knows 100"):
        train(fresh(config=MODEL.replace(vocab=100)), tokens, CONFIG)
    with pytest.raises(ConfigError, match="length = 64 is longer than the model's context of 32"):
        train(fresh(), tokens, CONFIG.replace(length=64))
    other = Tokenizer.train(["abc abd"], vocab=300)
    with pytest.raises(ConfigError, match="another tokenizer"):
        train(fresh(other), tokens, CONFIG)
    encoder = fresh(config=MODEL.replace(kind="encoder"))
    with pytest.raises(ConfigError, match="needs a tokenizer with a mask token"):
        train(encoder, tokens, CONFIG.replace(objective="mlm"))
    trainer = train(fresh(tokenizer), tokens, CONFIG.replace(steps=2), out=tmp_path / "run")
    for _ in trainer:
        pass
    trainer.run.close()
    with pytest.raises(FileExistsError):
        train(fresh(tokenizer), tokens, CONFIG, out=tmp_path / "run")
    with pytest.raises(StateMismatch, match="the tokens of .* have changed|data of .* has changed"):
        resume(tmp_path / "run", data=Tokens.open(shards, "valid"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        resume(tmp_path / "nowhere")
    with pytest.raises(ValueError, match='out="runs/name"'):
        train(fresh(), tokens, CONFIG).save()


def test_a_run_can_be_made_longer(tokens, tokenizer, tmp_path):
    trainer = train(fresh(tokenizer), tokens, CONFIG.replace(steps=3), out=tmp_path / "run")
    for _ in trainer:
        pass
    trainer.run.close()
    trainer = resume(tmp_path / "run", steps=5)
    assert [s.step for s in trainer.history] == [1, 2, 3]
    assert [s.step for s in trainer] == [4, 5]
    assert [s.step for s in trainer.history] == [1, 2, 3, 4, 5]
    assert Run.open(tmp_path / "run").train.steps == 5
    trainer.run.close()


@pytest.mark.parametrize("together", [1, 4])
def test_milestones_stay(tokens, tokenizer, tmp_path, together):
    config = CONFIG.replace(steps=30, milestones=3, keep=1, log_every=7, steps_per_call=together)
    assert config.until_milestone(0) == 1
    trainer = train(fresh(tokenizer), tokens, config, out=tmp_path / "run")
    for step in trainer:
        if step.step == 10:
            break
    trainer.run.close()
    trainer = resume(tmp_path / "run")
    for _ in trainer:
        pass
    assert trainer.run.steps() == [1, 2, 5, 10, 22, 30]
    plain = train(fresh(tokenizer), tokens, CONFIG.replace(steps=30))
    for _ in plain:
        pass
    assert trainer.losses == plain.losses[10:]  # where checkpoints are kept changes nothing


def test_milestones_are_spread_evenly_over_the_logarithm():
    config = CONFIG.replace(steps=1, milestones=4)
    at, found = 0, []
    while at < 100_000:
        at += config.until_milestone(at)
        found.append(at)
    assert found == sorted({round(10 ** (k / 4)) for k in range(21)})
    assert CONFIG.until_milestone(5) == 0
