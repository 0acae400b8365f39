"""The codebook technique: choices, gradients and chunks against NumPy and closed forms; whole models; refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tinylm
from tinylm.config import ModelConfig
from tinylm.generation import generate_tokens
from tinylm.parts import Linear
from tinylm.techniques import EditError, edit, fold
from tinylm.techniques import codebook as room
from tinylm.techniques.codebook import LOSSES, Codebook, Losses, Rule, assembled, decode, discretize
from tinylm.weights import bind, pure

SMALL = ModelConfig(vocab=40, context=16, width=16, layers=2, heads=2)
TOKENS = np.arange(12, dtype=np.int32).reshape(1, 12)
RNG = np.random.default_rng(0)


# Compiled: eager calls compile every operation by itself.
nearest = jax.jit(room.nearest, static_argnames=("k", "similarity", "room", "ranked"))


def called(book, x):
    """A codebook's output."""
    graph, params = pure(book)
    return jax.jit(lambda params, x: bind(graph, params)(x))(params, x)


def numbers(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def chosen(z, book, k, similarity="cosine"):
    """(n, G, k) ids, written out."""
    ids = np.zeros((*z.shape[:2], k), int)
    for i in range(z.shape[0]):
        for g in range(z.shape[1]):
            if similarity == "cosine":
                score = book[g] @ z[i, g] / np.linalg.norm(book[g], axis=1)
            else:
                score = -np.sum((book[g] - z[i, g]) ** 2, 1)
            ids[i, g] = np.argsort(-score)[:k]
    return ids


@pytest.mark.parametrize("similarity", ["cosine", "euclidean"])
@pytest.mark.parametrize(("codes", "k"), [(64, 1), (40, 8), (40, 40)])
def test_choices_are_the_nearest(similarity, codes, k):
    z, book = numbers(7, 2, 4), numbers(2, codes, 4, seed=1)
    found = np.asarray(nearest(z, book, np.zeros((2, codes), np.float32), k, similarity))
    np.testing.assert_array_equal(found, chosen(z, book, k, similarity))


# By blocks and XLA's top-k, by counting, by counting blocks and then what is in them.
@pytest.mark.parametrize(("codes", "k"), [(256, 1), (512, 2), (96, 8), (64, 64), (2048, 8)])
def test_the_fast_search_is_the_slow_one(codes, k, monkeypatch):
    """To the last place: ties in order of places, infinities, rows of one value, NaN as -inf."""
    monkeypatch.setattr(room, "WORTHWHILE", 1)
    search = jax.jit(room.largest, static_argnames=("k", "ranked"))
    # No two of a row are equal, so none goes the slow way.
    plain = np.random.default_rng(0).permuted(np.tile(np.sinh(np.linspace(-3, 4, codes)), (40, 1)), axis=1)
    plain = plain.astype(np.float32)
    wide = plain * np.float32(10) ** np.random.default_rng(1).integers(-30, 30, plain.shape).astype(np.float32)
    odd = np.round(plain * 2) / 2 + 0.0
    odd[:10, ::3], odd[5:15, ::5], odd[15:20], odd[20:25, 1::2] = -np.inf, np.inf, 0.5, np.nan
    for scores in (plain, wide, odd):
        expected = np.asarray(jax.lax.top_k(np.where(np.isnan(scores), -np.inf, scores), k)[1])
        np.testing.assert_array_equal(search(scores, k), expected)
    np.testing.assert_array_equal(np.sort(search(plain, k, ranked=False)), np.sort(jax.lax.top_k(plain, k)[1]))


@pytest.mark.parametrize("room", [1, 64 * 2 * 10])
def test_chunks_are_the_whole(room):
    z, book, lean = numbers(23, 2, 4), numbers(2, 64, 4, seed=1), numbers(2, 64, seed=2)
    whole = nearest(z, book, lean, 3, room=10**9)
    np.testing.assert_array_equal(nearest(z, book, lean, 3, room=room), whole)


def test_a_choice_has_no_gradient():
    """Neither z nor codes get one, however the choice was found."""
    z, book = numbers(40, 1, 4), numbers(1, 64, 4, seed=1)
    pick = lambda z, book: jnp.sum(book[0, nearest(z, jax.lax.stop_gradient(book), jnp.zeros((1, 64)), 3)[:, 0]])  # noqa: E731
    to_z, to_book = jax.jit(jax.grad(pick, argnums=(0, 1)))(z, book)
    assert not np.any(to_z)
    assert to_book.sum() == 40 * 3 * 4


def test_scores_of_a_long_text_never_exist_at_once():
    z, book = jnp.zeros((4096, 4, 8)), jnp.zeros((4, 1024, 8))
    program = jax.jit(lambda z, book: nearest(z, book, jnp.zeros((4, 1024)), 8)).lower(z, book).compile()
    assert program.memory_analysis().temp_size_in_bytes < 4 * 4096 * 4 * 1024 / 2


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_decoding_adds_up(share):
    book, ids = numbers(2, 6, 3), RNG.integers(0, 6, (5, 2, 4))
    expected = [[share * sum(book[g, i] for i in ids[n, g]) for g in range(2)] for n in range(5)]
    np.testing.assert_allclose(decode(book, ids, share), expected, rtol=1e-5)


@pytest.mark.parametrize("name", sorted(LOSSES))
@pytest.mark.parametrize("share", [1.0, 0.25])
def test_gradients_in_closed_form(name, share):
    """Straight through to states; to codes the loss's, scattered, and the reconstruction's where the loss looks."""
    by = LOSSES[name]
    losses = Losses(by.model, 0.7 * by.reconstruction, 0.3 * by.commitment)
    z, book, ids, g = numbers(5, 2, 3), numbers(2, 6, 3), RNG.integers(0, 6, (5, 2, 4)), numbers(5, 2, 3, seed=9)
    g[3], g[4, 0] = 0, 0  # position 3 is padding; 4 is not: its other group has a gradient
    out, back = jax.vjp(lambda z, book: assembled(Rule(share, losses), z, book, ids), z, book)
    to_z, to_book = back(jnp.asarray(g))
    error = 2 * (np.asarray(out) - z)
    error[3] = 0
    expected = np.zeros_like(book)
    for n in range(5):
        for group in range(2):
            for i in ids[n, group]:
                expected[group, i] += share * (by.model * g + 0.7 * by.reconstruction * error)[n, group]
    np.testing.assert_allclose(to_book, expected, rtol=2e-5, atol=1e-5)
    np.testing.assert_allclose(to_z, g - 0.3 * by.commitment * error, rtol=1e-5)


def test_the_codes_gradient_is_that_of_the_written_loss():
    """Autodiff of LM loss + weight * sum |out - stop(z)|^2, with out = codes + (z - stop(z)), is the slow twin."""
    book = Codebook(Linear(6, 6), rngs=nnx.Rngs(0), groups=2, codes=5, k=2, weight=0.4)
    book.inner.kernel.set_value(jnp.asarray(numbers(6, 6)))
    graph, params = pure(book)
    x, stop = jnp.asarray(numbers(3, 4, 6)), jax.lax.stop_gradient

    def fast(params, x):
        return jnp.sum(jnp.sin(bind(graph, params)(x)))

    def slow(params, x):
        z = x.reshape(3, 4, 2, 3)
        out = decode(params["book"], bind(graph, params).nearest(z))
        y = (out + z - stop(z)).reshape(x.shape) @ params["inner.kernel"]
        return jnp.sum(jnp.sin(y)) + 0.4 * jnp.sum((out - stop(z)) ** 2)

    one, two = (jax.jit(jax.grad(f, argnums=(0, 1)))(params, x) for f in (fast, slow))
    for name in ("book", "inner.kernel"):
        np.testing.assert_allclose(one[0][name], two[0][name], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(one[1], two[1], rtol=1e-4, atol=1e-5)


def written(book, x):
    """A Codebook on the input of a Linear, in NumPy."""
    z = np.asarray(x, np.float64).reshape(*x.shape[:-1], book.groups, -1)
    if book.norm is not None:
        z = (z - z.mean(-1, keepdims=True)) / np.sqrt(z.var(-1, keepdims=True) + 1e-5)
    codes = np.asarray(book.book[...], np.float64)
    flat = z.reshape(-1, *z.shape[-2:])
    ids = chosen(flat, codes, book.k)
    out = np.stack([codes[g][ids[:, g]].sum(1) for g in range(book.groups)], 1)
    out = out / book.k if book.combine == "mean" else out
    return out.reshape(x.shape) @ np.asarray(book.inner.kernel[...], np.float64)


@pytest.mark.parametrize(("combine", "norm"), [("sum", "none"), ("mean", "layernorm")])
def test_the_module_is_what_the_paper_says(combine, norm):
    book = Codebook(Linear(8, 3), rngs=nnx.Rngs(0), groups=2, codes=20, k=3, combine=combine, norm=norm)
    book.inner.kernel.set_value(jnp.asarray(numbers(8, 3)))
    x = numbers(2, 5, 8)
    np.testing.assert_allclose(called(book, x), written(book, x), rtol=1e-4, atol=1e-4)


def test_lean_activates_and_bans():
    book = Codebook(Linear(8, 8), rngs=nnx.Rngs(0), side="output", codes=20, k=2)
    z = jnp.asarray(numbers(30, 1, 8))
    plain = np.asarray(book.nearest(z))
    book.lean.set_value(book.lean[...].at[0, 7].set(jnp.inf).at[0, int(plain[0, 0, 0])].set(-jnp.inf))
    steered = np.asarray(book.nearest(z))
    assert (steered[..., 0] == 7).all()
    assert (steered != plain[0, 0, 0]).all()
    best = np.where(plain[0, 0] == 7, -1, plain[0, 0])
    assert steered[0, 0, 1] == best[1] or plain[0, 0, 1] == 7


def test_what_is_not_finite_stays_so():
    book = Codebook(Linear(4, 4), rngs=nnx.Rngs(0), codes=6, k=1)
    book.inner.kernel.set_value(jnp.eye(4))
    y = np.asarray(called(book, np.array([[1.0, 2, 3, 4], [1.0, np.nan, 3, 4]], np.float32)))
    assert np.isfinite(y[0]).all()
    assert np.isnan(y[1]).all()


def test_all_sites_train_save_and_generate(tmp_path):
    model = discretize(tinylm.Transformer(SMALL.replace(layers=1)), ["attn", "mlp", "resid"], "released", codes=8, k=2)
    before = {name: np.array(x) for name, x in tinylm.named(model).items()}
    data = tinylm.Tokens.from_array(RNG.integers(0, 40, 500), vocab=40)
    list(tinylm.train(model, data, tinylm.TrainConfig(steps=2, batch=2, length=16, optimizer="adamw")))
    changed = {name for name, x in tinylm.named(model).items() if np.abs(np.asarray(x) - before[name]).max() > 0}
    assert {n for n in before if n.endswith(".book")} <= changed
    assert not {n for n in before if n.endswith(".lean")} & changed
    tinylm.save(model, tmp_path / "m")
    back = tinylm.load(tmp_path / "m")
    assert back.config == model.config
    graph, params = pure(model)
    assert pure(back)[0] == graph
    assert all(np.array_equal(x, params[name]) for name, x in pure(back)[1].items())
    new = next(generate_tokens(model, [[1, 2]], tokens=3))
    assert new.shape == (1, 3)


def test_a_residual_stream_is_made_of_codes():
    model = discretize(tinylm.Transformer(SMALL), "resid", layers=[1], codes=8, k=1)
    graph, params = pure(model)
    x = jax.jit(lambda p: bind(graph, p).trunk(TOKENS)[0])(params)
    codes = np.asarray(model.norm(model.blocks[1].book[0]))
    assert all(np.abs(codes - row).max(1).min() < 1e-5 for row in np.asarray(x)[0])


def test_the_batch_s_size_does_not_weigh_the_reconstruction():
    """A step divides sums by the number of tokens: twice the same batch gives the same gradient."""
    from tinylm.data import Batch
    from tinylm.step import cross_entropy

    graph, params = pure(discretize(tinylm.Transformer(SMALL.replace(layers=1)), "mlp", codes=8, k=1))
    own = {n: x for n, x in params.items() if n.endswith(".book")}

    def mean(own, copies):
        batch = Batch(np.tile(TOKENS, (copies, 1)), np.tile(TOKENS + 1, (copies, 1)))
        total, (_, weight) = cross_entropy(bind(graph, {**params, **own}), batch, None)
        return total / weight

    def gradient(copies):
        total = lambda own: mean(own, copies) * 12 * copies  # noqa: E731
        return {n: g / (12 * copies) for n, g in jax.jit(jax.grad(total))(own).items()}

    one, two = gradient(1), gradient(2)
    for name in own:
        np.testing.assert_allclose(one[name], two[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("head", ["tokens", "classes"])
def test_padding_does_not_weigh(head):
    """Codes get the same gradient from a text alone and from the text with padding behind it, which has states too."""
    from tinylm.data import Batch
    from tinylm.step import cross_entropy

    more = {} if head == "tokens" else {"kind": "encoder", "head": "classes", "classes": 3}
    graph, params = pure(discretize(tinylm.Transformer(SMALL.replace(layers=1, **more)), codes=8, k=1))
    own = {n: x for n, x in params.items() if n.endswith(".book")}

    @jax.jit
    def gradient(own, batch):
        return jax.grad(lambda own: cross_entropy(bind(graph, {**params, **own}), batch, None)[0])(own)

    text, pad = TOKENS, [(0, 0), (0, 4)]
    targets = TOKENS + 1 if head == "tokens" else np.array([1])
    weights = np.ones(TOKENS.shape, np.float32) if head == "tokens" else None
    one = gradient(own, Batch(text, targets, weights, None, np.ones_like(text)))
    if head == "tokens":
        targets, weights = np.pad(targets, pad), np.pad(weights, pad)
    two = gradient(own, Batch(np.pad(text, pad), targets, weights, None, np.pad(np.ones_like(text), pad)))
    for name in own:
        assert np.abs(one[name]).max() > 0
        np.testing.assert_allclose(one[name], two[name], rtol=1e-4, atol=1e-5)


def test_no_plain_file_can_hold_it(tmp_path):
    model = discretize(tinylm.Transformer(SMALL), "mlp", codes=8, k=1)
    with pytest.raises(EditError, match=r"blocks\.0\.mlp\.down: codebook is more than a matrix.*blocks\.1\.mlp\.down"):
        fold(model)
    with pytest.raises(tinylm.FormatError, match="codebook is more than a matrix"):
        tinylm.save(model, tmp_path / "m.gguf")
    with pytest.raises(Exception, match="codebook is more than a matrix"):
        tinylm.export(model, tmp_path / "m.tlm")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("where", "settings", "message"),
    [
        (r"blocks\.0\.attn\.o", {"groups": 3}, "groups = 3: must divide 16"),
        (r"blocks\.0\.attn\.o", {"k": 9, "codes": 8}, "k = 9: must be from 1 to codes = 8"),
        (r"blocks\.0\.attn\.o", {"codes": 0}, "codes = 0"),
        (r"blocks\.0\.attn\.o", {"side": "outptu"}, "side = 'outptu'.*did you mean 'output'"),
        (r"blocks\.0\.attn\.o", {"norm": "layer"}, "norm = 'layer'"),
        (r"blocks\.0\.attn\.o", {"loss": "mse"}, "loss = 'mse'"),
        (r"blocks\.0\.attn\.o", {"weight": -1}, "weight = -1"),
        (r"embed", {}, "codebook wraps a Linear, an MLP, attention or a block, not Embedding"),
    ],
)
def test_what_cannot_be_is_refused(where, settings, message):
    model = tinylm.Transformer(SMALL)
    with pytest.raises(EditError, match=message):
        edit(model, where, "codebook", **settings)
    assert model.config == SMALL


@pytest.mark.parametrize(
    ("arguments", "message"), [({"sites": "heads"}, "sites"), ({"layers": [2]}, "layers"), ({"preset": "x"}, "preset")]
)
def test_recipes_refuse(arguments, message):
    with pytest.raises(EditError, match=message):
        discretize(tinylm.Transformer(SMALL), **{"sites": "mlp", **arguments})


def test_two_codebooks_around_one_module_are_refused():
    """They would share a name: one could neither be read nor steered."""
    model = discretize(tinylm.Transformer(SMALL), "mlp", codes=8, k=1)
    before = model.config
    with pytest.raises(EditError, match="a codebook around it already"):
        discretize(model, "mlp", codes=4, k=1)
    assert model.config == before


def test_what_fails_at_the_second_site_leaves_the_model_alone():
    model = discretize(tinylm.Transformer(SMALL), "mlp", codes=8, k=1)
    edits, names = model.config.edits, tinylm.named(model).keys()
    with pytest.raises(EditError, match="a codebook around it already"):
        discretize(model, ["attn", "mlp"], codes=8, k=1)
    assert model.config.edits == edits
    assert tinylm.named(model).keys() == names
