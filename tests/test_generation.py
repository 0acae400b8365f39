"""Generation: the cached, compiled loop against a naive one, the filters against NumPy, and where texts end."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy_model import random_params
from scipy import stats

from tinylm.config import ConfigError, ModelConfig, Sampling
from tinylm.generation import GenerateError, Settings, filtered, generate, generate_tokens, pick, stream
from tinylm.model import Transformer, shapes
from tinylm.tokenizer import Tokenizer
from tinylm.weights import assign, bind, named, pure

room = sys.modules[generate.__module__]  # `tinylm.generate` itself names the function
BYTES = Tokenizer.train([], kind="byte")
CONTEXT = 16
OPTIONS = {
    "rope": {"kv_heads": 1, "qk_norm": True},
    "learned": {"positions": "learned", "window": (0, 5), "norm": "layernorm", "mlp": "gelu"},
}


@functools.cache
def made(name="rope", context=CONTEXT):
    config = ModelConfig(vocab=BYTES.vocab, context=context, width=16, layers=2, heads=2, **OPTIONS[name])
    model = Transformer(config, tokenizer=BYTES)
    assign(model, random_params(shapes(config)))
    return model


@functools.cache
def forward(model):
    graph, params = pure(model)
    program = jax.jit(lambda p, x: bind(graph, p)(x))
    return lambda ids: program(params, jnp.asarray(ids))


def naive(model, prompts, tokens, sampling, seed=0):
    """No cache, one token at a time, the whole window read each time; the window moves on by half a context."""
    context, texts = model.config.context, [list(p) for p in prompts]
    for row, ids in enumerate(texts):
        for number in range(tokens):
            start = 0
            while len(ids) - start > context:
                start += max(1, context // 2)
            padded = np.zeros((1, context), np.int32)
            padded[0, : len(ids) - start] = ids[start:]
            logits = np.array(forward(model)(padded)[0, len(ids) - start - 1], np.float64)
            used = np.setdiff1d(ids, [model.tokenizer.end])
            factor = np.where(logits[used] > 0, 1 / sampling.repetition_penalty, sampling.repetition_penalty)
            logits[used] *= factor
            if sampling.temperature == 0:
                ids.append(int(logits.argmax()))
                continue
            logits = numpy_filter(logits / sampling.temperature, sampling)
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), row), number)
            ids.append(int(np.argmax(logits + np.asarray(jax.random.gumbel(key, logits.shape)))))
    return [ids[len(p) :] for p, ids in zip(prompts, texts, strict=True)]


def numpy_filter(logits, sampling):
    """Tokens from the most probable on, one by one, until a rule forbids the rest."""
    kept, order = np.full(logits.shape, -np.inf), np.argsort(-logits)
    if sampling.top_k:
        order = order[: sampling.top_k]
    share = np.exp(logits[order] - logits[order].max())
    share, total = share / share.sum(), 0.0
    for token, p in zip(order, share, strict=True):
        if (total >= sampling.top_p and sampling.top_p < 1) or p < sampling.min_p * share[0]:
            break
        kept[token], total = logits[token], total + p
    return kept


def ids_of(model, prompts, tokens, seed=0, chunk=16, **sampling):
    parts = generate_tokens(model, prompts, tokens=tokens, sampling=Sampling(**sampling), seed=seed, chunk=chunk)
    return np.concatenate(list(parts), axis=1).tolist()


# --- the compiled loop ------------------------------------------------------------------------------------------------

PROMPTS = [[0], [0, 70, 80], list(range(40, 40 + CONTEXT)), list(range(100, 100 + 3 * CONTEXT))]


@pytest.mark.parametrize("name", OPTIONS)
def test_greedy_equals_the_naive_loop(name):
    """Also far beyond the context, and for prompts longer than it."""
    model = made(name)
    greedy = Sampling(temperature=0.0)
    assert ids_of(model, PROMPTS, 45, temperature=0.0) == naive(model, PROMPTS, 45, greedy)


def test_sampled_equals_the_naive_loop():
    model, options = made(), {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2}
    assert ids_of(model, PROMPTS[:2], 40, 5, **options) == naive(model, PROMPTS[:2], 40, Sampling(**options), 5)


def altered(vocab=BYTES.vocab, **values):
    """The model, with more ids than its tokenizer or other weights."""
    config = made().config.replace(vocab=vocab, head="untied", softcap=0.0)
    model = Transformer(config, tokenizer=BYTES)
    assign(model, {**random_params(shapes(config)), **values})
    return model


@pytest.mark.parametrize("temperature", [0.0, 5.0])
@pytest.mark.parametrize("top_k", [0, 290])
def test_ids_the_tokenizer_lacks_are_never_made(temperature, top_k):
    kernel = np.zeros((16, 300), np.float32)
    kernel[:, BYTES.vocab :] = np.random.default_rng(0).standard_normal((16, 300 - BYTES.vocab)) * 50
    model = altered(300, **{"head.out.kernel": kernel})
    options = {"temperature": temperature, "top_k": top_k, "repetition_penalty": 1.1}
    made = ids_of(model, [[0, 70], [0, 75, 80]], 40, **options)
    assert np.max(made) < BYTES.vocab
    assert isinstance(generate(model, "a", tokens=40, **options), str)
    bare = Transformer(model.config)
    assign(bare, named(model))
    assert np.max(ids_of(bare, [[0, 70]], 40, temperature=5.0)) >= BYTES.vocab  # no tokenizer, nothing to forbid


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["embed.table", "blocks.1.mlp.down.kernel"])
def test_damaged_weights(name, value):
    broken = np.full(shapes(altered().config)[name].shape, value, np.float32)
    with pytest.raises(GenerateError, match=r"the model's logits are not finite: its weights are damaged or training"):
        generate(altered(**{name: broken}), "One day", tokens=4)


def test_the_end_token_is_not_punished():
    """The prompt begins with it, so a penalty would keep every text from ending."""
    kernel = np.zeros((16, BYTES.vocab), np.float32)
    table = np.ones((BYTES.vocab, 16), np.float32)
    kernel[:, BYTES.end], kernel[:, 70] = 2.0, 1.9
    rest = {"embed.table": table, "norm.scale": np.ones(16, np.float32), "head.out.kernel": kernel}
    still = {n: np.zeros(s.shape, np.float32) for n, s in shapes(altered().config).items() if n.startswith("blocks")}
    model = altered(**still, **rest)
    assert ids_of(model, [[BYTES.end, 80]], 2, temperature=0.0, repetition_penalty=2.0) == [[BYTES.end, BYTES.end]]


def test_context_of_one():
    model = made(context=1)
    assert ids_of(model, [[5]], 6, temperature=0.0) == naive(model, [[5]], 6, Sampling(temperature=0.0))


def test_seed_and_chunk():
    model = made()
    texts = {chunk: ids_of(model, PROMPTS[:2], 50, 3, chunk) for chunk in (1, 7, 16, 50)}
    assert all(text == texts[1] for text in texts.values())
    assert ids_of(model, PROMPTS[:2], 50, 4) != texts[1]
    assert texts[1][0][:20] != texts[1][1][:20]
    assert ids_of(model, [[0], [0]], 20, 3)[0] != ids_of(model, [[0], [0]], 20, 3)[1]  # rows draw for themselves


def test_other_rows_do_not_matter():
    """Up to the context and beyond, where the rows' windows move on at different times."""
    model = made()
    alone = ids_of(model, PROMPTS[1:2], 40, 3)[0]
    for others in (PROMPTS[2:], [[1] * 9, [2] * 14, [3] * 5]):
        assert ids_of(model, [PROMPTS[1], *others], 40, 3)[0] == alone


def test_no_tokens():
    assert list(generate_tokens(made(), [[0]], tokens=0)) == []
    assert generate(made(), "abc", tokens=0) == "abc"
    assert generate(made(), [], tokens=3) == []


# --- picking ----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**32 - 1),
    st.floats(0.1, 8),
    st.integers(0, 50),
    st.one_of(st.just(1.0), st.floats(0.01, 1)),
    st.one_of(st.just(0.0), st.floats(0, 1)),
)
def test_filters_are_numpys(seed, spread, top_k, top_p, min_p):
    logits = (spread * np.random.default_rng(seed).standard_normal((3, 40))).astype(np.float32)
    sampling = Sampling(top_k=top_k, top_p=top_p, min_p=min_p)
    ours = np.asarray(filtering(logits, Settings.of(sampling)))
    for row, x in zip(ours, logits, strict=True):
        near = [numpy_filter(x.astype(np.float64), s) for s in nudged(sampling)]  # a limit may fall on a token
        assert any(np.array_equal(np.isfinite(row), np.isfinite(one)) for one in near)
        assert np.array_equal(row[np.isfinite(row)], x[np.isfinite(row)])
        assert np.isfinite(row[x.argmax()])


filtering = jax.jit(filtered)


def nudged(s):
    for d in (0, -1e-5, 1e-5):
        for e in (0, -1e-5, 1e-5):
            p = s.top_p if s.top_p == 1 else min(1.0, max(1e-9, s.top_p + d))
            yield s.replace(top_p=p, min_p=min(1.0, max(0.0, s.min_p + e)) if s.min_p else 0.0)


def picks(logits, n, seen=(), **sampling):
    keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(0)))(jnp.arange(n))
    mark = np.zeros((n, len(logits)), bool)
    mark[:, list(seen)] = True
    rows = jnp.tile(jnp.asarray(logits, jnp.float32), (n, 1))
    return np.asarray(picking(rows, jnp.asarray(mark), Settings.of(Sampling(**sampling)), keys))


picking = jax.jit(pick)


@pytest.mark.parametrize(
    "sampling",
    [{"temperature": 1.0}, {"temperature": 0.5}, {"temperature": 2.0, "top_k": 4}, {"temperature": 1.0, "top_p": 0.8}],
    ids=str,
)
def test_frequencies(sampling):
    """Chi-square at p > 0.001 (the seed is fixed, so it cannot fail by chance later)."""
    logits, n = np.array([2.0, 1.0, 0.5, 0.0, -0.5, -1.0]), 4000
    exact = np.exp(numpy_filter(logits / sampling["temperature"], Sampling(**sampling)))
    exact /= exact.sum()
    counts = np.bincount(picks(logits, n, **sampling), minlength=6)
    assert not counts[exact == 0].any()
    assert stats.chisquare(counts[exact > 0], n * exact[exact > 0]).pvalue > 0.001


def test_repetition_penalty():
    """Divides positive logits and multiplies negative ones (Keskar et al. 2019), before anything else."""
    assert picks([3.0, 2.0, -1.0], 1, seen=[0], temperature=0.0, repetition_penalty=2.0) == [1]
    assert picks([3.0, 2.0, -1.0], 1, seen=[0], temperature=0.0, repetition_penalty=1.4) == [0]
    assert picks([-3.0, -2.0, -5.0], 1, seen=[1], temperature=0.0, repetition_penalty=2.0) == [0]
    logits, n = np.array([1.0, 0.5, -0.5, -1.0]), 4000
    exact = np.exp([1.0 / 1.5, 0.5, -0.5 * 1.5, -1.0])
    counts = np.bincount(picks(logits, n, seen=[0, 2], temperature=1.0, repetition_penalty=1.5), minlength=4)
    assert stats.chisquare(counts, n * exact / exact.sum()).pvalue > 0.001


@pytest.mark.parametrize("temperature", [0.0, 1e-30, 1e-44])
def test_the_coldest_is_greedy(temperature):
    assert (picks([1.0, 90.0, 91.0, 5.0], 8, temperature=temperature) == 2).all()


# --- texts: ends, stops, characters -----------------------------------------------------------------------------------


@pytest.fixture
def says(monkeypatch):
    """Makes the model say the given ids, chunk by chunk."""

    def script(*rows):
        def scripted(model, prompts, *, tokens, chunk=16, **_):
            for at in range(0, tokens, chunk):
                yield np.array([row[at : min(at + chunk, tokens)] for row in rows])

        monkeypatch.setattr(room, "generate_tokens", scripted)

    return script


def bytes_ids(text):
    return BYTES.encode(text).tolist() if isinstance(text, str) else [BYTES.token_bytes.index(bytes([b])) for b in text]


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 8, 64])
@pytest.mark.parametrize(
    ("text", "stop", "result"),
    [
        ("Once. The end of it", ["The end"], "Once. "),
        ("a b c d e f g", ["e f", "c d"], "a b "),
        ("ababac", ["abac"], "ab"),
        ("nothing here", ["zzz", ""], "nothing here"),
        ("naïve 🦙🦙 llama", ["🦙 l"], "naïve 🦙"),
        ("end at once", ["end"], ""),
        ("the last one", ["one"], "the last "),
        ("half of sto", ["stop"], "half of sto"),
        ("one text as stop", "text", "one "),
    ],
)
def test_stop_texts_straddle_chunks(says, text, stop, result, chunk):
    ids = bytes_ids(text)
    says(ids)
    pieces = list(stream(made(), "P", tokens=len(ids), stop=stop, chunk=chunk))
    assert "".join(pieces) == result
    assert all(pieces)
    assert generate(made(), "P", tokens=len(ids), stop=stop) == "P" + result


@pytest.mark.parametrize("chunk", [1, 3, 4, 64])
def test_end_token(says, chunk):
    ids = [*bytes_ids("The end"), BYTES.end, *bytes_ids("more")]
    says(ids)
    assert "".join(stream(made(), tokens=12, chunk=chunk)) == "The end"
    assert generate(made(), "", tokens=12) == "The end"
    says(ids, bytes_ids("goes on some"))
    assert generate(made(), ["a", "b"], tokens=12) == ["aThe end", "bgoes on some"]


@settings(deadline=None, max_examples=40)
@given(st.text(max_size=30), st.integers(1, 9))
def test_characters_are_never_split(text, chunk):
    ids = bytes_ids(text)
    with pytest.MonkeyPatch.context() as patch:
        chunks = [np.array([ids[at : at + chunk]]) for at in range(0, len(ids), chunk)]
        patch.setattr(room, "generate_tokens", lambda *_, **__: iter(chunks))
        shown = ""
        for piece in stream(made(), tokens=max(1, len(ids))):
            shown += piece
            assert text.startswith(shown)
        assert shown == text


def test_bytes_that_are_no_text(says):
    ids = bytes_ids(b"ab\xff\xf0\x9f")
    says(ids)
    assert "".join(stream(made(), tokens=5, chunk=2)) == "ab\ufffd\ufffd" == generate(made(), tokens=5)


def test_stream_is_generate_without_the_prompt():
    model = made()
    for seed in range(3):
        options = {"tokens": 40, "seed": seed, "temperature": 0.9, "top_k": 30}
        whole = generate(model, "Once", **options)
        assert whole.startswith("Once")
        for chunk in (1, 6):
            assert "Once" + "".join(stream(model, "Once", chunk=chunk, **options)) == whole
    side_by_side = generate(model, ["Once", "Twice"], **options)
    assert side_by_side[0] == whole


# --- what cannot be done ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "Sampling.temperature = -1.0: must not be negative"),
        ({"temperature": float("nan")}, "Sampling.temperature = nan"),
        ({"top_k": -1}, "Sampling.top_k = -1: must not be negative; 0 is off"),
        ({"top_k": 2.5}, "Sampling.top_k = 2.5: must be a whole number"),
        ({"top_p": 0.0}, "Sampling.top_p = 0.0: must be above 0"),
        ({"top_p": 1.1}, "Sampling.top_p = 1.1"),
        ({"min_p": 1.5}, "Sampling.min_p = 1.5"),
        ({"repetition_penalty": 0}, "Sampling.repetition_penalty = 0.0: must be above 0"),
        ({"temprature": 1.0}, "Sampling has no setting 'temprature'; did you mean 'temperature'"),
    ],
    ids=str,
)
def test_wrong_sampling(settings, message):
    for call in (generate, lambda *a, **k: list(stream(*a, **k))):
        with pytest.raises(ConfigError) as error:
            call(made(), "x", **settings)
        assert message in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": -1}, "tokens = -1"),
        ({"tokens": 1, "chunk": 0}, "chunk = 0"),
        ({"tokens": 1, "seed": -1}, "seed = -1: must be a whole number from 0"),
        ({"tokens": 1, "seed": 2**32}, "seed = 4294967296"),
    ],
    ids=str,
)
def test_wrong_numbers(options, message):
    with pytest.raises(GenerateError, match=message):
        list(generate_tokens(made(), [[0]], **options))


def test_wrong_types():
    """In a process of its own: here, shape checking would speak first."""
    program = """
import tinylm
tokenizer = tinylm.Tokenizer.train([], kind="byte")
model = tinylm.Transformer(tinylm.ModelConfig(vocab=261, width=8, heads=1, layers=1), tokenizer=tokenizer)
for prompt, options in [("x", {"seed": 1.5}), ("x", {"tokens": 2.5}), ("x", {"seed": True}), (None, {}), ([1, 2], {})]:
    for call in (tinylm.generate, lambda *a, **k: list(tinylm.stream(*a, **k))):
        try:
            call(model, prompt, **options)
        except Exception as error:
            print(f"{type(error).__name__}: {error}")
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == [
        *["GenerateError: seed = 1.5: must be a whole number from 0 to 2^32 - 1"] * 2,
        *["GenerateError: tokens = 2.5: must be a whole number from 0 to 2^32 - 1"] * 2,
        *["GenerateError: seed = True: must be a whole number from 0 to 2^32 - 1"] * 2,
        "GenerateError: prompt = None: give a text, or a list of texts",
        "GenerateError: prompt = None: give a text; `generate_tokens` goes on from token ids",
        "GenerateError: prompt = 1: give a text; `generate_tokens` goes on from token ids",
        "GenerateError: prompt = [1, 2]: give a text; `generate_tokens` goes on from token ids",
    ]


def test_wrong_models_and_prompts():
    config = made().config
    with pytest.raises(GenerateError, match="this model is an encoder"):
        list(generate_tokens(Transformer(config.replace(kind="encoder")), [[0]], tokens=1))
    with pytest.raises(GenerateError, match="no tokenizer"):
        generate(Transformer(config), "x")
    for prompts in ([], [[]], [[1], []]):
        with pytest.raises(GenerateError, match="a prompt without tokens"):
            list(generate_tokens(made(), prompts, tokens=1))
    with pytest.raises(ValueError, match=r"prompt 0: id 261 at position 0 is outside 0..260"):
        list(generate_tokens(made(), [[261]], tokens=1))


def test_a_begin_token_of_its_own(monkeypatch):
    """Foreign texts start with `begin`, end at `end` or at the next text's `begin`, and lose a space put in front."""
    text = BYTES.to_json().replace('"<|endoftext|>"', '"<s>"').replace('"<|pad|>"', '"</s>"')
    foreign = Tokenizer.from_json(text)
    object.__setattr__(foreign, "prefix", b" ")
    config = ModelConfig(vocab=BYTES.vocab, context=CONTEXT, width=16, layers=1, heads=2)
    model, asked = Transformer(config, tokenizer=foreign), []
    assert (foreign.begin, foreign.end) == (0, 1)

    def fixed(stop, model, prompts, **settings):
        asked.extend(np.asarray(p).tolist() for p in prompts)
        for ids in (foreign.encode(" Once"), [*foreign.encode("!"), stop, *foreign.encode("more")]):
            yield np.array([ids] * len(prompts))

    for stop in (0, 1):
        monkeypatch.setattr(room, "generate_tokens", functools.partial(fixed, stop))
        assert generate(model, "") == "Once!"
        assert generate(model, ["So,"]) == ["So, Once!"]
        assert "".join(stream(model, "")) == "Once!"
        assert "".join(stream(model, "So,")) == " Once!"
    assert asked[:2] == [[0], [0, *foreign.encode("So,")]]


def test_the_cache_is_as_large_as_the_text_not_as_the_context():
    """A context of two billion costs nothing; what is generated is that of the same weights with a small context."""
    small = made(context=512)
    vast = Transformer(small.config.replace(context=2**31 - 1), tokenizer=BYTES)
    assign(vast, named(small))
    for count in (5, 300):  # within the least room, and beyond it
        assert generate(vast, "Once", tokens=count, seed=3) == generate(small, "Once", tokens=count, seed=3)
