"""Many models as one program: each member is what it would be alone."""

import jax
import numpy as np
import pytest

from tinylm import population, step
from tinylm.checkpoint import load
from tinylm.config import ConfigError, ModelConfig, TrainConfig
from tinylm.data import Windows
from tinylm.model import Transformer
from tinylm.population import Population, train_many
from tinylm.resuming import resume
from tinylm.shards import Tokens, write_tokens
from tinylm.tokenizer import Tokenizer
from tinylm.training import train
from tinylm.weights import named
from tinylm.world import World

MODEL = ModelConfig(vocab=300, context=24, width=32, layers=2, heads=2, dropout=0.1)
CONFIG = TrainConfig(steps=16, batch=4, optimizer="adamw", learning_rate=1e-2, warmup=4, log_every=4, eval_batches=2)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(World().texts(40), vocab=300)


@pytest.fixture(scope="module")
def tokens(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_tokens(World().texts(6), tokenizer, folder)
    return Tokens.open(folder, "train")


def alone(config, tokens, model=MODEL, tokenizer=None, **more):
    trainer = train(Transformer(model, rngs=config.seed, tokenizer=tokenizer), tokens, config, **more)
    list(trainer)
    return trainer


def same(member, other, tolerance=2e-5):
    """Equal losses and weights, as far as float32 sums in another order allow."""
    np.testing.assert_allclose(member.losses, other.losses, rtol=tolerance)
    a, b = named(member.model), named(other.model)
    return max(float(np.abs(np.asarray(a[n]) - np.asarray(b[n])).max()) for n in a)


def test_members_are_what_they_would_be_alone(tokens):
    """Seeds, rates, schedules and the optimiser's settings differ; dropout is on."""
    configs = CONFIG.grid(seed=[0, 5], learning_rate=[1e-2, 3e-3])
    configs += [CONFIG.replace(weight_decay=0.0, seed=1), CONFIG.replace(beta2=0.99, schedule="linear", warmup=0)]
    together = train_many(MODEL, tokens, configs, valid=tokens)
    steps = list(together)
    assert [[s.step for s in row] for row in steps] == [[n] * 6 for n in (4, 8, 12, 16)]
    assert together.curves.shape == (6, 16)
    for config, member in zip(configs, together.members, strict=True):
        other = alone(config, tokens, valid=tokens)
        assert same(member, other) < 1e-4
        assert member.history[-1].valid_loss == pytest.approx(other.history[-1].valid_loss, rel=1e-4)
        assert member.outcome == "done"
    assert len({member.losses[-1] for member in together.members}) == 6


def test_side_by_side_is_in_turn(tokens, monkeypatch):
    """A GPU takes the members side by side, a CPU one after the other: one batched program, and its slow twin."""
    configs = CONFIG.grid(seed=[0, 5], learning_rate=[1e-2, 3e-3])
    in_turn = train_many(MODEL, tokens, configs)
    list(in_turn)
    monkeypatch.setattr(step, "device", lambda: ("gpu", 9.0))
    monkeypatch.setattr(population, "compiled_updates", step.compiled_updates.__wrapped__)  # nothing kept
    side_by_side = train_many(MODEL, tokens, configs)
    list(side_by_side)
    for one, other in zip(in_turn.members, side_by_side.members, strict=True):
        assert same(one, other) < 1e-4


@pytest.mark.parametrize("settings", [
    {"optimizer": "muon"},
    {"optimizer": "schedule_free", "schedule": "constant"},
    {"ema": 0.9, "accumulate": 2},
    {"steps_per_call": 4},
], ids=str)  # fmt: skip
def test_every_kind_of_step(settings, tokens):
    configs = CONFIG.replace(**settings).grid(seed=[0, 1])
    together = train_many(MODEL, tokens, configs)
    list(together)
    for config, member in zip(configs, together.members, strict=True):
        assert same(member, alone(config, tokens)) < (2e-3 if "optimizer" in settings else 1e-4)


def test_encoders_with_masks_of_their_own(tokens, tokenizer):
    model = MODEL.replace(kind="encoder", head="mlm")
    configs = CONFIG.replace(objective="mlm", mask_rate=0.2).grid(seed=[0, 1, 2])
    together = train_many(model, tokens, configs, tokenizer=tokenizer)
    list(together)
    for config, member in zip(configs, together.members, strict=True):
        assert same(member, alone(config, tokens, model, tokenizer)) < 1e-4


def test_every_member_has_a_run_folder_and_goes_on_alone_or_together(tokens, tmp_path):
    configs = CONFIG.grid(seed=[0, 1, 2])
    whole = train_many(MODEL, tokens, configs)
    list(whole)
    together = train_many(MODEL, tokens, configs, out=tmp_path / "many")
    for steps in together:
        if steps[0].step == 8:
            together.stop()
    assert (together.outcome, [m.step for m in together.members]) == ("stopped", [8, 8, 8])
    folders = sorted((tmp_path / "many").iterdir())
    assert [f.name for f in folders] == ["member-000", "member-001", "member-002"]
    for folder, model in zip(folders, together.models, strict=True):
        loaded = named(load(folder))
        assert all((np.asarray(value) == loaded[name]).all() for name, value in named(model).items())
    for member in together.members:
        member.run.close()
    lonely = resume(folders[1], data=tokens)
    list(lonely)
    assert lonely.losses == pytest.approx(whole.members[1].losses[8:], rel=2e-5)
    others = Population([resume(folders[0], data=tokens), resume(folders[2], data=tokens)])
    list(others)
    np.testing.assert_allclose(others.curves, whole.curves[[0, 2], 8:], rtol=2e-5)
    assert [s.step for s in others.members[0].history] == [4, 8, 12, 16]


def test_members_can_be_dropped_and_the_rest_is_not_disturbed(tokens):
    configs = CONFIG.grid(seed=[0, 1, 2, 3])
    together = train_many(MODEL, tokens, configs)
    for steps in together:
        if steps[0].step == 8:
            together.drop(0, 2)
    assert [(m.config.seed, m.step, m.outcome) for m in together.dropped] == [(2, 8, "stopped"), (0, 8, "stopped")]
    assert [(m.config.seed, m.step, m.outcome) for m in together.members] == [(1, 16, "done"), (3, 16, "done")]
    for member in together.members:
        assert same(member, alone(member.config, tokens)) < 1e-4
    with pytest.raises(IndexError, match="no member 2"):
        together.drop(2)


def test_one_that_diverges_leaves_and_the_rest_goes_on(tokens):
    windows = Windows(tokens, batch=4, length=24, seed=0)
    calls = []

    def poisoned(step):
        calls.append(step)
        batch = windows(step)
        bad = np.full(batch.targets.shape, np.nan if calls.count(step) == 2 and step == 6 else 1.0, np.float32)
        return batch._replace(weights=bad)

    together = train_many(MODEL, poisoned, CONFIG.grid(learning_rate=[1e-2, 2e-3, 3e-3]))
    with pytest.warns(UserWarning, match=r"member 1 of 3 is dropped: step 7"):
        list(together)
    assert [m.config.learning_rate for m in together.members] == [1e-2, 3e-3]
    (lost,) = together.dropped
    assert (lost.outcome, lost.step, len(lost.losses)) == ("diverged", 6, 6)
    assert all(np.isfinite(np.asarray(value)).all() for value in named(lost.model).values())
    assert together.curves.shape == (2, 16)


def test_iterating_again_goes_on(tokens):
    configs = CONFIG.grid(seed=[0, 1])
    together = train_many(MODEL, tokens, configs)
    for _ in together:
        break
    assert together.outcome == "stopped"
    list(together)
    for config, member in zip(configs, together.members, strict=True):
        assert same(member, alone(config, tokens)) < 1e-4


def test_one_program_serves_every_value(tokens):
    """Another sweep over the same settings compiles nothing."""
    for decays in ([0.0, 0.1], [0.3, 0.2]):
        together = train_many(MODEL, tokens, CONFIG.replace(steps=2).grid(weight_decay=decays))
        list(together)
        assert together._update._cache_size() == 1


def test_what_cannot_share_a_program_is_refused(tokens):
    with pytest.raises(ConfigError, match=r"member 1 cannot .* batch = 8 instead of 4; members may differ in"):
        train_many(MODEL, tokens, [CONFIG, CONFIG.replace(batch=8)])
    with pytest.raises(ConfigError, match="1 models and 2 configs"):
        train_many([Transformer(MODEL)], tokens, [CONFIG, CONFIG])
    with pytest.raises(ConfigError, match="at least one member"):
        train_many(MODEL, tokens, [])
    with pytest.raises(ConfigError, match="layers = 1 instead of 2"):
        train_many([Transformer(MODEL), Transformer(MODEL.replace(layers=1))], tokens, [CONFIG, CONFIG])
    ahead = train(Transformer(MODEL), tokens, CONFIG)
    for _ in ahead:
        break
    with pytest.raises(ConfigError, match="it is at step 4, not 0"):
        Population([train(Transformer(MODEL), tokens, CONFIG), ahead])


def test_grid():
    configs = CONFIG.grid(seed=range(2), learning_rate=[0.1, 0.2])
    assert [(c.seed, c.learning_rate) for c in configs] == [(0, 0.1), (0, 0.2), (1, 0.1), (1, 0.2)]
    assert CONFIG.grid() == [CONFIG]
    assert CONFIG.with_batch(16).learning_rate == pytest.approx(2e-2)
    assert jax.tree.leaves(CONFIG.with_batch(16).batch) == [16]
