"""The forward pass against NumPy, against a published checkpoint, and against itself by other ways."""

import functools
import gzip
import itertools
import re

import jax
import jax.numpy as jnp
import llama2c
import numpy as np
import pytest
from numpy_model import NumpyModel, random_params

from tinylm import model as model_room
from tinylm.config import ModelConfig, Sampling
from tinylm.generation import generate_tokens
from tinylm.model import Cache, Scope, Transformer, attend, attend_fused, attention_kind, dropout, shapes, visible
from tinylm.taps import untouched
from tinylm.weights import assign, bind, named, pure

B, T = 2, 17
SMALL = {"vocab": 61, "context": 24, "width": 32, "layers": 2, "heads": 4}
NEO = {"norm": "layernorm", "mlp": "gelu_tanh", "positions": "learned", "window": (0, 5), "attention_scale": 1.0}
BERT = {"kind": "encoder", "norm": "layernorm", "norm_eps": 1e-12, "block": "post", "mlp": "gelu", "head": "mlm"}
BERT |= {"positions": "learned", "bias": True, "embed_norm": True, "token_types": 2}
GRID = {
    "llama": {"kv_heads": 2},
    "neo": {**NEO, "bias": True, "qkv_bias": False},
    "bert": BERT,
    "neox": {"block": "parallel", "norm": "layernorm", "mlp": "gelu", "bias": True, "head": "untied"},
    "pythia": {"block": "parallel", "norm": "layernorm", "mlp": "gelu", "bias": True, "rotary": 2},
    "classifier": {**BERT, "head": "classes", "classes": 5},
    "embedder": {**BERT, "head": "none"},
    "windows": {"window": (0, 4, 1), "layers": 3, "kv_heads": 1},
    "caps": {"qk_norm": True, "softcap": 3.0, "mlp": "geglu", "bias": True, "kv_heads": 2},
    "mixed": {"positions": ("rope", "none"), "theta": 50.0, "mlp": "reglu", "block": "post", "qkv_bias": True},
    "wide heads": {"head_width": 6, "heads": 3, "positions": "none", "mlp": "relu2", "norm_eps": 0.1},
    "encoder rope": {"kind": "encoder", "window": 3, "block": "parallel", "kv_heads": 2, "embed_norm": True},
}
DECODERS = [name for name, options in GRID.items() if options.get("kind") != "encoder"]


def config_of(name):
    return ModelConfig.from_dict({**SMALL, **GRID[name]})


@functools.cache
def graph_of(config):
    return pure(Transformer(config))[0]


@functools.cache
def params_of(config):
    return random_params(shapes(config))


@functools.cache
def program(config):
    """The compiled forward pass; every test of a configuration shares it."""
    graph = graph_of(config)
    return jax.jit(lambda params, tokens, **kw: bind(graph, params)(tokens, **kw))


def run(config, tokens, **kw):
    return program(config)(params_of(config), jnp.asarray(tokens), **kw)


def random_tokens(seed=0, vocab=61, shape=(B, T)):
    return np.random.default_rng(seed).integers(0, vocab, shape).astype(np.int32)


def near(ours, theirs, tolerance=1e-4):
    __tracebackhide__ = True
    off = np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()
    assert off <= tolerance, off


# --- against NumPy ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GRID)
def test_numpy_twin(name):
    config, tokens = config_of(name), random_tokens()
    twin = NumpyModel(config, params_of(config))
    near(run(config, tokens), np.stack([twin(row) for row in tokens]))


@pytest.mark.parametrize("name", ["llama", "neo", "bert"])
def test_numpy_twin_with_segments_positions_types(name):
    config, tokens = config_of(name), random_tokens()
    segments = np.repeat([[1, 2, 0], [3, 3, 7]], [6, 7, 4], axis=1).astype(np.int32)
    positions = np.stack([[*range(6), *range(7), *range(4)], [*range(13), *range(4)]]).astype(np.int32)
    types = random_tokens(1, 2) if name == "bert" else None
    ours = run(config, tokens, segments=segments, positions=positions, types=types)
    twin = NumpyModel(config, params_of(config))
    rows = range(B)
    near(
        ours, np.stack([twin(tokens[r], positions[r], segments[r], None if types is None else types[r]) for r in rows])
    )


# --- a published checkpoint -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stories(shared_data):
    """stories260K as its file says, as a NumPy model, as ours, and its tokenizer."""
    folder = shared_data / "ckpt" / "stories260K"
    theirs = llama2c.read_model(folder / "stories260K.bin")
    config, params = llama2c.to_tinylm(theirs)
    model = Transformer(config)
    assign(model, params)
    return theirs, model, llama2c.Pieces(folder / "tok512.bin", 512)


def test_published_loss(stories, shared_data):
    """1.297 nats per token (llama2.c's table); a sample of 60 stories lies within 0.03 of it, two standard errors."""
    theirs, model, pieces = stories
    text = gzip.decompress((shared_data / "tinystories" / "valid_v1_a.txt.gz").read_bytes()).decode()
    docs = [doc for doc in re.split(r"\n\n+(?=Once upon a time|One day)", text)[1:] if len(doc) < 3000][:60]
    rows = [[pieces.BEGIN, *pieces.encode(doc.strip())][:385] for doc in docs]
    tokens = np.zeros((len(rows), 385), np.int32)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    graph, params = pure(model)

    @jax.jit
    def nats(params, tokens):
        logits = bind(graph, params)(tokens[:, :-1])
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)[..., 0]

    lost = [np.asarray(nats(params, part)) for part in np.split(tokens, 4)]
    lost = [row[: len(ids) - 1] for row, ids in zip(np.concatenate(lost), rows, strict=True)]
    loss = sum(map(np.sum, lost)) / sum(map(len, lost))
    assert abs(loss - 1.297) < 0.03
    logits = llama2c.forward(theirs, rows[0][:-1])  # the same story, token by token, by the NumPy forward pass
    logits -= logits.max(-1, keepdims=True)
    exact = np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(logits)), rows[0][1:]]
    np.testing.assert_allclose(lost[0], exact, atol=2e-4)


def test_published_greedy_text(stories):
    theirs, model, pieces = stories
    prompt = [pieces.BEGIN, *pieces.encode("Once upon a time")]
    greedy = list(prompt)
    for _ in range(72):
        greedy.append(int(llama2c.forward(theirs, greedy)[-1].argmax()))
    made = generate_tokens(model, [prompt], tokens=72, sampling=Sampling(temperature=0.0))
    assert np.concatenate(list(made), axis=1)[0].tolist() == greedy[len(prompt) :]
    text = b"".join(pieces.pieces[i] for i in greedy[1:]).decode()
    assert text.startswith(" Once upon a time, there was a little girl named Lily")


# --- cached, fused, masked: the fast ways and the slow ways ----------------------------------------------------------


@pytest.mark.parametrize("name", DECODERS)
def test_cache_token_by_token(name):
    config, tokens = config_of(name), random_tokens()
    whole, cache, parts = run(config, tokens), Cache.empty(config, B), []
    for t in range(T):
        logits, cache = run(config, tokens[:, t : t + 1], cache=cache)
        parts.append(logits)
    near(jnp.concatenate(parts, 1), np.asarray(whole), 2e-5)
    assert cache.length.tolist() == [T, T]


@pytest.mark.parametrize("name", ["llama", "neo", "windows"])
def test_cache_in_chunks_and_rows_of_different_lengths(name):
    """Rows of 5 and 11 tokens, padded on the right; then 6 more of each at once."""
    config, lengths = config_of(name), np.array([5, 11], np.int32)
    texts = [random_tokens(7, shape=(1, n + 6)) for n in lengths]
    padded = np.zeros((2, 11), np.int32)
    for row, text, n in zip(padded, texts, lengths, strict=True):
        row[:n] = text[0, :n]
    first, cache = run(config, padded, cache=Cache.empty(config, 2, 20))
    more = np.concatenate([text[:, n:] for text, n in zip(texts, lengths, strict=True)])
    second, cache = run(config, more, cache=cache._replace(length=jnp.asarray(lengths)))
    for row, text in enumerate(texts):
        whole = np.asarray(run(config, text))[0]
        near(first[row, : lengths[row]], whole[: lengths[row]], 2e-5)
        near(second[row], whole[lengths[row] :], 2e-5)
    assert cache.keys[0].shape == (2, 20, config.kv_heads, config.head_width)


@pytest.mark.parametrize("masked", [False, True])
def test_fused_attention_equals_the_written_out(masked):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, 9, h, 8)), jnp.float32) for h in (6, 2, 2))
    mask = jnp.asarray(rng.random((2, 1, 9, 9)) < 0.5) | jnp.eye(9, dtype=bool) if masked else None
    slow = attend(q, k, v, mask, 0.3, untouched, lambda x: x)
    near(attend_fused(q, k, v, mask, 0.3), np.asarray(slow), 1e-5)


@pytest.mark.parametrize("window", [0, 1, 4])
def test_causal_needs_no_mask(window):
    """Values and gradients: what a kernel is told instead of a mask, and the mask itself."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, 9, h, 8)), jnp.float32) for h in (6, 2, 2))
    mask = visible(Scope(np.zeros((1, 9), np.int32), None, None), 9, 9, True, window)
    ways = [
        lambda *x: attend_fused(*x, None, 0.3, causal=True, window=window),
        lambda *x: attend_fused(*x, mask, 0.3),
        lambda *x: attend(*x, mask, 0.3, untouched, lambda p: p),
    ]
    results = [jax.value_and_grad(lambda *x, way=way: jnp.sin(way(*x)).sum(), (0, 1, 2))(q, k, v) for way in ways]
    for value, slopes in results[1:]:
        assert abs(value - results[0][0]) < 1e-4
        for ours, theirs in zip(slopes, results[0][1], strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "platform", "dtype", "width", "lengths", "masked"),
    [
        ("written", ("cpu", 0.0), jnp.float32, 64, (8, 8), False),
        ("written", ("cpu", 0.0), jnp.bfloat16, 64, (8, 8), False),
        ("cudnn", ("gpu", 9.0), jnp.bfloat16, 64, (8, 8), False),
        ("cudnn", ("gpu", 8.0), jnp.float16, 128, (7, 7), False),
        ("cudnn", ("gpu", 10.0), jnp.bfloat16, 256, (8, 64), True),
        ("xla", ("gpu", 8.9), jnp.bfloat16, 136, (8, 8), False),
        ("xla", ("gpu", 9.0), jnp.bfloat16, 264, (8, 8), False),
        ("xla", ("gpu", 9.0), jnp.bfloat16, 36, (8, 8), False),
        ("xla", ("gpu", 9.0), jnp.bfloat16, 64, (1, 64), True),
        ("xla", ("gpu", 9.0), jnp.float32, 64, (8, 8), False),
        ("xla", ("gpu", 7.5), jnp.bfloat16, 64, (8, 8), False),
        ("xla", ("gpu", 0.0), jnp.bfloat16, 64, (8, 8), False),
        ("xla", ("tpu", 0.0), jnp.bfloat16, 64, (8, 8), False),
    ],
)
def test_attention_kind(kind, platform, dtype, width, lengths, masked):
    assert attention_kind(platform, dtype, width, lengths, masked) == kind


@pytest.mark.parametrize("name", ["llama", "windows", "bert", "encoder rope"])
def test_what_a_kernel_is_given(name, monkeypatch):
    """On a GPU: a mask only for a cache, segments, or a window to both sides; and the same logits."""
    config, tokens, given = config_of(name), random_tokens(), []
    written = np.asarray(run(config, tokens))
    monkeypatch.setattr(model_room, "device", lambda: ("gpu", 9.0))

    def fused(q, k, v, mask, scale, by, causal, window):
        given.append((by, mask is not None, causal, window))
        return attend_fused(q, k, v, mask, scale, "xla", causal, window)

    monkeypatch.setattr(model_room, "attend_fused", fused)
    forward = jax.jit(lambda params, **kw: bind(graph_of(config), params)(tokens, **kw))
    half = {n: x.astype(jnp.bfloat16) for n, x in params_of(config).items()}
    near(forward(params_of(config)), written, 2e-5)
    jax.eval_shape(forward, half)
    jax.eval_shape(functools.partial(forward, segments=tokens), half)
    causal = config.kind == "decoder"
    windows = [config.at("window", layer) for layer in range(config.layers)]
    plain = [("xla", not causal and w > 0, causal, w) for w in windows]
    # heads 8 wide and 17 tokens: cuDNN takes them, but not with a mask
    kernel = [("xla" if masked else "cudnn", masked, causal, w) for _, masked, causal, w in plain]
    assert given == plain + kernel + [("xla", True, False, w) for w in windows]


def test_bfloat16_is_near_float32():
    config, tokens = config_of("llama"), random_tokens()
    half = {name: value.astype(jnp.bfloat16) for name, value in params_of(config).items()}
    logits = program(config)(half, tokens)
    assert logits.dtype == jnp.bfloat16
    near(logits.astype(jnp.float32), np.asarray(run(config, tokens)), 0.05)


@pytest.mark.parametrize("name", DECODERS)
def test_causal(name):
    """A later token changes no earlier logit, bitwise; and does change later ones."""
    config, tokens = config_of(name), random_tokens()
    other = tokens.copy()
    other[:, 9:] = (other[:, 9:] + 1) % 61
    a, b = np.asarray(run(config, tokens)), np.asarray(run(config, other))
    assert np.array_equal(a[:, :9], b[:, :9])
    assert (np.abs(a[:, 9:] - b[:, 9:]).max(-1) > 1e-3).all()


@pytest.mark.parametrize("name", ["bert", "encoder rope"])
def test_encoder_sees_both_sides(name):
    config, tokens = config_of(name), random_tokens()
    other = tokens.copy()
    other[:, 9] = (other[:, 9] + 1) % 61
    off = np.abs(np.asarray(run(config, tokens)) - np.asarray(run(config, other))).max((0, 2))
    assert off[8] > 1e-3
    assert off[10] > 1e-3
    if config.window:  # two layers of three tokens to either side, itself included: four away is reached, five is not
        assert off[5] > 1e-4
        assert off[4] == off[14] == 0


@pytest.mark.parametrize("name", ["llama", "neo", "bert", "windows"])
def test_segments_isolate_documents(name):
    """Three documents in one row equal three rows, and none of them notices another's tokens."""
    config, tokens = config_of(name), random_tokens(shape=(1, T))
    ends = [0, 6, 13, 17]
    segments = np.repeat([[1, 2, 0]], np.diff(ends), axis=1).astype(np.int32)
    positions = np.concatenate([np.arange(n) for n in np.diff(ends)])[None].astype(np.int32)
    packed = np.asarray(run(config, tokens, segments=segments, positions=positions))
    for a, b in itertools.pairwise(ends):
        near(packed[:, a:b], np.asarray(run(config, tokens[:, a:b])), 2e-5)
    other = tokens.copy()
    other[:, 6:13] = (other[:, 6:13] + 5) % 61
    changed = np.asarray(run(config, other, segments=segments, positions=positions))
    same = (changed == packed).all((0, 2))
    assert same.tolist() == [True] * 6 + [False] * 7 + [True] * 4


def test_wrong_calls():
    model, tokens = Transformer(config_of("llama")), jnp.zeros((1, 4), jnp.int32)
    with pytest.raises(ValueError, match="25 tokens do not fit a context of 24"):
        model(jnp.zeros((1, 25), jnp.int32))
    with pytest.raises(ValueError, match="segments cannot be used with a cache"):
        model(tokens, segments=tokens, cache=Cache.empty(model.config, 1))
    bert = Transformer(config_of("bert"))
    with pytest.raises(ValueError, match="an encoder cannot use a cache"):
        bert(tokens, cache=Cache.empty(bert.config, 1))
    for shape in ((0, 4), (1, 0)):
        with pytest.raises(ValueError, match="an empty batch"):
            model(np.zeros(shape, np.int32))


def test_cache_overflow():
    model = Transformer(config_of("llama"))
    _, full = model(np.zeros((1, 4), np.int32), cache=Cache.empty(model.config, 1, 4))
    with pytest.raises(ValueError, match="2 more tokens do not fit a cache of 4 positions that holds 4"):
        model(np.zeros((1, 2), np.int32), cache=full)
    forward = jax.jit(lambda tokens: model(tokens, cache=Cache.empty(model.config, 1, 4)))
    with pytest.raises(ValueError, match="5 more tokens do not fit a cache of 4 positions"):
        forward(np.zeros((1, 5), np.int32))


# --- dropout ----------------------------------------------------------------------------------------------------------


def test_dropout_needs_a_key_and_follows_it():
    config, tokens = config_of("llama").replace(dropout=0.3), random_tokens()
    plain = np.asarray(run(config, tokens))
    near(plain, np.asarray(run(config_of("llama"), tokens)), 1e-6)
    a, b = run(config, tokens, key=jax.random.key(1)), run(config, tokens, key=jax.random.key(1))
    c = run(config, tokens, key=jax.random.key(2))
    assert np.array_equal(a, b)
    assert np.abs(np.asarray(a) - plain).max() > 0.1
    assert np.abs(np.asarray(a) - np.asarray(c)).max() > 0.1
    without = program(config_of("llama"))(params_of(config), tokens, key=jax.random.key(1))
    near(without, plain, 1e-6)  # rate 0 ignores the key


def test_dropout_rate():
    x = jnp.ones((200, 500))
    y = np.asarray(dropout(x, 0.3, jax.random.key(0), 1))
    assert set(np.unique(y)) == {0.0, np.float32(1 / 0.7)}
    assert abs((y == 0).mean() - 0.3) < 4 * (0.3 * 0.7 / y.size) ** 0.5
    assert abs(y.mean() - 1) < 0.01
    assert not np.array_equal(y, dropout(x, 0.3, jax.random.key(0), 2))  # each place drops others
    assert dropout(x, 0.3, None, 1) is x


# --- initial values ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("std", [0.02, 0.3])
def test_initial_values_follow_the_table(std):
    config = ModelConfig(vocab=300, width=96, layers=2, bias=True, head="untied", positions="learned", init_std=std)
    for name, value in named(Transformer(config, rngs=3)).items():
        x = np.asarray(value)
        if name.endswith("scale"):
            assert (x == 1).all(), name
        elif name.endswith("bias"):
            assert (x == 0).all(), name
        else:
            assert abs(x.std() - std) < 5 * std / (2 * x.size) ** 0.5, name
            assert abs(x.mean()) < 5 * std / x.size**0.5, name
            assert np.abs(x).max() > 3 * std, name  # normal, not cut off or uniform


def test_initial_values_depend_on_seed_and_name_alone():
    base = {**SMALL, "init_std": 0.02}
    a = named(Transformer(ModelConfig(**base), rngs=1))
    again = named(Transformer(ModelConfig(**base), rngs=1))
    other = named(Transformer(ModelConfig(**base), rngs=2))
    more = named(Transformer(ModelConfig(**{**base, "layers": 3}, qk_norm=True, bias=True, head="untied"), rngs=1))
    assert a.keys() < more.keys()
    for name, value in a.items():
        assert np.array_equal(value, again[name])
        assert np.array_equal(value, more[name])
        assert name.endswith("scale") or not np.array_equal(value, other[name])
    matrices = [np.asarray(v).tobytes() for n, v in a.items() if not n.endswith("scale")]
    assert len(set(matrices)) == len(matrices)


# --- one configuration, one program -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GRID)
def test_equal_configurations_have_equal_graphs(name):
    compilations = []

    @functools.lru_cache
    def forward(graph):
        compilations.append(graph)
        return jax.jit(lambda params: compilations.append(0) or bind(graph, params).embed.weight().sum())

    for seed in (1, 2):
        graph, params = pure(Transformer(config_of(name), rngs=seed))
        forward(graph)(params)
    assert len(compilations) == 2  # one program, traced once
    graph, _ = pure(Transformer(config_of(name).replace(norm_eps=0.5)))
    assert graph != compilations[0]


def test_assign_and_named():
    model = Transformer(config_of("llama"))
    values = params_of(model.config)
    assign(model, values)
    assert all(np.array_equal(value, values[name]) for name, value in named(model).items())
    before = {name: np.array(value) for name, value in named(model).items()}
    wrong = {n: v + 1 for n, v in values.items()}
    wrong["blocks.0.attn.w"] = wrong.pop("blocks.0.attn.q.kernel")
    wrong["norm.scale"] = np.zeros(3)
    with pytest.raises(ValueError, match=r"missing blocks.0.attn.q.kernel; norm.scale has shape \(3,\).*unknown.*3 in"):
        assign(model, wrong)
    assert all(np.array_equal(value, before[name]) for name, value in named(model).items())
    assert {n: (s.shape, s.dtype) for n, s in shapes(model.config).items()} == {
        n: (v.shape, v.dtype) for n, v in before.items()
    }
