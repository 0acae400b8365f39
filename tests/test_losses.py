"""The chunked loss against the plain one, NumPy and finite differences; the head on some positions only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_model import random_params

from tinylm import losses
from tinylm.config import ModelConfig, TrainConfig
from tinylm.data import Batch, picking
from tinylm.losses import Rows, chunked_nats, head_nats, plain_nats, taken
from tinylm.model import Transformer, shapes
from tinylm.optim import Recipe, build
from tinylm.step import State, compiled_loss, compiled_update
from tinylm.weights import assign, bind, pure

SMALL = {"vocab": 307, "width": 32, "layers": 1, "heads": 2, "context": 12}
HEADS = {"tied": {}, "untied": {"head": "untied"}, "mlm": {"head": "mlm"}, "capped": {"softcap": 4.0}}


def model_of(name):
    model = Transformer(ModelConfig(**SMALL, **HEADS[name]))
    assign(model, random_params(shapes(model.config)))
    return model


def rows_of(n=48, seed=0):
    rng = np.random.default_rng(seed)
    return Rows(
        jnp.asarray(rng.standard_normal((n, 32)), jnp.float32),
        jnp.asarray(rng.integers(0, 307, n), jnp.int32),
        jnp.asarray(rng.random(n), jnp.float32),
    )


def slopes(nats, head, rows):
    """Loss and gradient towards the head's arrays and the features."""
    return jax.jit(jax.value_and_grad(lambda head, x: nats(head, rows._replace(x=x))[0], argnums=(0, 1)))(head, rows.x)


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("name", HEADS)
def test_plain_nats_in_numpy(name, z_loss):
    model, rows = model_of(name), rows_of()
    how, head = taken(model, z_loss)
    total, nats = plain_nats(how, head, rows)
    logits = np.asarray(model.unembed(rows.x), np.float64)
    lse = np.log(np.exp(logits).sum(-1))
    each = lse - logits[np.arange(48), rows.targets]
    assert float(nats) == pytest.approx(float((each * rows.weights).sum()), rel=1e-5)
    assert float(total) == pytest.approx(float(((each + z_loss * lse**2) * rows.weights).sum()), rel=1e-5)


@pytest.mark.parametrize("chunks", [1, 2, 6, 48])
@pytest.mark.parametrize("name", HEADS)
def test_chunked_is_plain(name, chunks):
    model, rows = model_of(name), rows_of()
    how, head = taken(model, 1e-3)
    plain = slopes(lambda head, rows: plain_nats(how, head, rows), head, rows)
    pieces = slopes(lambda head, rows: chunked_nats(how, chunks, head, rows), head, rows)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(pieces), strict=True):
        assert float(jnp.abs(a - b).max()) <= 1e-6 * max(1.0, float(jnp.abs(a).max()))
    assert plain_nats(how, head, rows)[1] == pytest.approx(float(chunked_nats(how, chunks, head, rows)[1]), rel=1e-6)


def test_any_number_of_rows_is_cut(monkeypatch):
    """Rows that do not divide are padded with rows of no weight, whatever is at once."""
    model, rows = model_of("mlm"), rows_of(43)
    expected = slopes(lambda head, rows: plain_nats(taken(model)[0], head, rows), taken(model)[1], rows)
    graph, params = pure(model)
    for at_once in (5, 42, 43):
        monkeypatch.setattr(losses, "at_once", lambda vocab, n=at_once: n)
        found = jax.value_and_grad(lambda p, x: head_nats(bind(graph, p), rows._replace(x=x))[0], (0, 1))(
            params, rows.x
        )
        assert float(found[0]) == pytest.approx(float(expected[0]), rel=1e-6)
        np.testing.assert_allclose(found[1][1], expected[1][1], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(found[1][0]["embed.table"], expected[1][0].table, rtol=1e-4, atol=1e-5)


def test_the_logits_never_exist_at_once():
    """The largest array of the compiled gradient is far below rows x vocabulary."""
    rows = rows_of(4096)
    how, head = taken(model_of("tied"))

    def temporary(nats):
        lowered = jax.jit(jax.grad(lambda head: nats(head, rows)[0])).lower(head)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    whole = 4096 * 307 * 4
    assert temporary(lambda head, rows: plain_nats(how, head, rows)) >= whole
    assert temporary(lambda head, rows: chunked_nats(how, 32, head, rows)) < whole / 4


# --- the head on the positions that count -----------------------------------------------------------------------------


def masked_batch(rows=4, share=0.2, seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 307, (rows, 12)).astype(np.int32)
    weights = (rng.random((rows, 12)) < share).astype(np.float32)
    weights[0, 0] = 1
    return Batch(tokens, np.roll(tokens, 1, 1), weights)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_picking_lists_every_position_with_weight(parts):
    batches = [masked_batch(rows=16, seed=seed) for seed in range(6)]
    made = [picking(batch, 0.2, parts) for batch in batches]
    assert len({batch.picked.shape for batch in made}) == 1
    for batch in made:
        for picked, weights in zip(batch.picked, batch.weights.reshape(parts, -1), strict=True):
            assert picked[picked < len(weights)].tolist() == np.flatnonzero(weights).tolist()
            assert (picked <= len(weights)).all()
    assert made[0].picked.shape[1] % (192 // parts // 8) == 0
    few = picking(batches[0], 0.001, parts)  # fewer were expected: there is room all the same
    assert (few.picked < 192 // parts).sum() == np.count_nonzero(batches[0].weights)


def test_picking_leaves_alone_what_would_gain_nothing():
    full = masked_batch(share=1.0)
    assert picking(full, 0.1) is full
    assert picking(masked_batch(), 0.9).picked is None
    bare = full._replace(weights=None)
    assert picking(bare, 0.1) is bare
    none = full._replace(weights=0 * full.weights)
    assert (picking(none, 0.1).picked == 48).all()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_head_on_some_positions_gives_the_same_step(accumulate):
    model = Transformer(ModelConfig(**SMALL, kind="encoder", head="mlm"))
    graph, params = pure(model)
    recipe = Recipe.of(TrainConfig(steps=1, optimizer="adamw", batch=16, accumulate=accumulate, eps=1e-6))
    found = []
    for batch in (masked_batch(rows=16), picking(masked_batch(rows=16), 0.2, accumulate)):
        fresh = jax.tree.map(jnp.copy, params)
        state = State(fresh, build(recipe).init(fresh), jnp.int32(0), jnp.bool_(False))
        rate = np.array([0.01], np.float32)
        found.append(compiled_update(graph, recipe, False)(state, [batch], rate, np.uint32(0)))
        sums = compiled_loss(graph)(params, picking(batch, 0.2))
        assert float(sums[1]) == batch.weights.sum()
    (a, first), (b, second) = found
    assert float(first["loss"][0]) == pytest.approx(float(second["loss"][0]), rel=1e-6)
    assert max(float(jnp.abs(a.params[n] - b.params[n]).max()) for n in params) < 1e-5
