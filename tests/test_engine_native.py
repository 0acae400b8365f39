"""The native engine against JAX, the NumPy twin (bit for bit), and itself in every way it can be run."""

import contextlib
import functools
import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import tinylm
from tinylm import native
from tinylm.config import ModelConfig
from tinylm.engine import Engine
from tinylm.engine.export import export
from tinylm.engine.slow import Slow
from tinylm.engine.twin import Twin
from tinylm.weights import assign

pytestmark = pytest.mark.skipif(not native.available(), reason="the native library is not built")

SIZES = {"vocab": 261, "context": 24, "width": 32, "layers": 2, "heads": 4, "init_std": 0.2}
DECODERS = {
    "llama": {"kv_heads": 2},
    "gpt2": {"norm": "layernorm", "mlp": "gelu_tanh", "positions": "learned", "bias": True},
    "pythia": {"norm": "layernorm", "block": "parallel", "mlp": "gelu", "rotary": 4, "bias": True, "head": "untied"},
    "windows": {"window": (5, 0), "positions": ("rope", "none"), "qk_norm": True, "softcap": 5.0, "mlp": "geglu"},
    "wide heads": {"head_width": 48, "kv_heads": 1, "mlp": "relu2", "attention_scale": 0.3, "qkv_bias": True},
    "odd": {"width": 20, "heads": 2, "hidden": 23, "vocab": 263, "head_width": 6, "mlp": "reglu"},
    "whole panels": {"vocab": 272, "layers": 1},
    "original": {"block": "post", "norm": "layernorm", "embed_norm": True, "token_types": 2, "positions": "learned"},
}
READERS = {
    "bert": {"head": "mlm", "positions": "learned", "bias": True, "norm": "layernorm", "block": "post", "mlp": "gelu"},
    "classes": {"head": "classes", "classes": 3, "norm": "layernorm", "token_types": 2, "embed_norm": True},
    "mean": {"head": "classes", "classes": 3, "pooling": "mean", "block": "post", "norm": "layernorm"},
    "last": {"kind": "decoder", "head": "classes", "classes": 5, "pooling": "last", "pooler": False},
    "features": {"head": "none", "window": 4},
}
PROMPT = [5, 17, 200, 17, 5, 17, 200]
ALL = DECODERS | {name: {"kind": "encoder", **more} for name, more in READERS.items()}


@functools.cache
def model_of(name: str) -> tinylm.Transformer:
    """A small random model, whose norms and biases are random too."""
    model = tinylm.Transformer(ModelConfig(**(SIZES | ALL[name])), rngs=3)
    noise = np.random.default_rng(0)
    values = {path: np.asarray(value) for path, value in tinylm.named(model).items()}
    vary = lambda x: x + noise.normal(0, 0.2, x.shape).astype(np.float32) if x.ndim == 1 else x  # noqa: E731
    assign(model, {path: vary(value) for path, value in values.items()})
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("engine")


@pytest.fixture(scope="module")
def files(folder):
    """(name of the model, bits) -> its file; made once."""
    made = {}

    def file_of(name: str, bits: str, **more) -> str:
        key = (name, bits, *more.items())
        if key not in made:
            made[key] = str(folder / f"{len(made)}.tlm")
            export(model_of(name), made[key], bits=bits, **more)
        return made[key]

    return file_of


def tokens_for(path: str, length: int = 24) -> list[int]:
    return np.random.default_rng(1).integers(0, Engine(path).facts.known, length).tolist()


# ---- what the model computes


@pytest.mark.parametrize("name", ALL)
def test_float_weights_give_what_jax_gives(files, name):
    path = files(name, "float32")
    tokens = tokens_for(path)
    expected = np.asarray(model_of(name)(np.array([tokens])))[0]
    np.testing.assert_allclose(Engine(path).logits(tokens), expected, atol=1e-4, rtol=1e-4)


WAYS = {"float32": {}, "int8": {}, "int4": {}, "ternary": {"absmean": True}, "int4 in groups": {"group": 32}}


@pytest.mark.parametrize("bits", WAYS)
@pytest.mark.parametrize("name", ALL)
def test_bits_are_those_of_the_twin(files, name, bits):
    path = files(name, bits.split()[0], **WAYS[bits])
    tokens = tokens_for(path)
    slow = Slow(path)
    for features in (True, False):
        expected = slow.forward([tokens], features)[0]
        for kernels in ("", "scalar"):
            found = Engine(path, kernels=kernels)._core.forward([tokens], features)[0]
            np.testing.assert_array_equal(found, expected)


def test_a_batch_of_texts_is_each_of_them_alone(files):
    for name in ("bert", "classes", "features", "llama", "windows"):
        path = files(name, "int8")
        engine = Engine(path, threads=2)
        texts = [tokens_for(path)[:n] for n in (1, 7, 24, 16, 2)]
        for features in (True, False):
            for one, text in zip(engine._core.forward(texts, features), texts, strict=True):
                np.testing.assert_array_equal(one, Engine(path, threads=1)._core.forward([text], features)[0])


@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
def test_a_text_read_in_pieces_is_pooled_whole(folder, pooling):
    more = {"context": 600, "head": "classes", "classes": 3, "pooling": pooling}
    path = str(folder / f"long-{pooling}.tlm")
    export(tinylm.Transformer(ModelConfig(**(SIZES | more))), path, bits="int8")
    texts = [tokens_for(path, n) for n in (5, 600, 400, 3, 1)]
    core, slow = Engine(path)._core, Slow(path)
    for found, expected in zip(core.forward(texts, False), slow.forward(texts, False), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_classes_and_pooled_features(files):
    engine = Engine(files("classes", "int8"))
    texts = [[1, 2, 3], [4, 5]]
    np.testing.assert_array_equal(engine.classify(texts)[1], engine.classify(texts[1]))
    whole = engine.embed(texts[0], pooling="none")
    np.testing.assert_allclose(engine.embed(texts[0]), whole.mean(0), rtol=1e-6)
    np.testing.assert_array_equal(engine.embed(texts, pooling="last")[0], whole[-1])
    np.testing.assert_array_equal(engine.embed(texts, pooling="first")[0], whole[0])


# ---- what it writes


def written(path: str, **more) -> list[int]:
    settings = {"temperature": 1.0, "seed": 4, "tokens": 60} | {k: more.pop(k) for k in list(more) if k in SETTINGS}
    return list(Engine(path, **more).ids(PROMPT, **settings))


SETTINGS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "tokens")
SAMPLING = [
    {"temperature": 0.0},
    {},
    {"temperature": 0.6, "seed": 2**40},
    {"top_k": 7},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"top_k": 30, "top_p": 0.9, "min_p": 0.01},
    {"repetition_penalty": 1.4},
    {"temperature": 0.0, "repetition_penalty": 0.5},
    {"temperature": 30.0, "top_p": 0.99},
    {"temperature": 1e-30},
]


@pytest.mark.parametrize("sampling", SAMPLING, ids=str)
def test_tokens_are_those_of_the_twin(files, sampling):
    """Also beyond the context, where the oldest half is dropped."""
    path = files("llama", "int8")
    expected = list(Twin(path).generate(PROMPT, 60, **({"temperature": 1.0, "seed": 4} | sampling)))
    assert written(path, **sampling) == expected


@pytest.mark.parametrize("name", DECODERS)
def test_every_way_to_write_gives_the_same_text(files, name):  # P29
    path = files(name, "int8")
    expected = written(path, threads=1, speculate=0)
    assert len(expected) == 60
    assert written(path, threads=2, speculate=0) == expected
    assert written(path, threads=1, speculate=7) == expected
    assert written(path, threads=2, speculate=3, kernels="scalar") == expected


@pytest.fixture(scope="module")
def screened(folder):
    """A model whose head is screened, and sharp enough that few rows can win."""
    model = tinylm.Transformer(ModelConfig(**(SIZES | {"vocab": 5000, "init_std": 0.1, "context": 64})), rngs=0)
    path = str(folder / "screened.tlm")
    export(model, path, bits="int8")
    assert Engine(path).facts.screened
    return path


@pytest.mark.parametrize("sampling", SAMPLING, ids=str)
def test_the_screened_head_chooses_the_same_tokens(screened, sampling):
    assert written(screened, **sampling) == written(screened, screen=False, speculate=0, **sampling)


def counts(core, prompt: list[int], **settings) -> dict[str, int]:
    """tlm_counts after a text of 60 tokens."""
    for _ in core.write([prompt], 60, 1, settings):
        pass
    found = native.Counts()
    native.library().tlm_session_counts(core._idle[-1][1], found)
    return {name: getattr(found, name) for name, _ in found._fields_}


def test_screening_rescores_few_rows(screened):
    found = counts(Engine(screened, speculate=0)._core, PROMPT, temperature=0.0)
    assert found["screened"] == 60
    assert 60 <= found["rescored"] < 60 * 2500


def test_drafts_from_a_corpus_are_taken_and_change_nothing(files):
    path = files("llama", "int8")
    expected = written(path, temperature=0.0)
    engine = Engine(path, threads=1)
    table = engine.learn([PROMPT + expected] * 3)
    assert list(engine.ids(PROMPT, tokens=60, temperature=0.0)) == expected
    found = counts(engine._core, PROMPT, temperature=0.0)
    assert found["accepted"] > 20
    assert found["passes"] < found["tokens"] - 20
    again = Engine(path)
    again.use(table)
    assert list(again.ids(PROMPT, tokens=60, temperature=0.0)) == expected
    slots = len(table) - 16
    for damaged in (b"", table[:-1], b"x" + table[1:], table[:8] + bytes(8 + slots), table[:16] + b"\xff" * slots):
        with pytest.raises(ValueError, match="drafts"):
            again.use(damaged)


@pytest.fixture(scope="module")
def two_sizes(folder):
    """A large model and a small one that choose the same tokens: the further blocks of the large one add nothing."""
    paths, small = [], {}
    for layers in (1, 40):
        model = tinylm.Transformer(ModelConfig(**(SIZES | {"layers": layers, "context": 64, "width": 64})), rngs=0)
        values = {name: np.asarray(value) for name, value in tinylm.named(model).items()}
        idle = [name for name in values if name.endswith((".o.kernel", ".down.kernel")) and "blocks.0." not in name]
        values |= {name: np.zeros_like(values[name]) for name in idle} | small
        assign(model, values)
        small = values
        paths.append(str(folder / f"{layers} layers.tlm"))
        export(model, paths[-1], bits="int8")
    return paths


@pytest.mark.parametrize("sampling", [s for s in SAMPLING if s.get("temperature") != 1e-30], ids=str)
def test_drafts_of_a_smaller_model_are_taken_and_change_nothing(two_sizes, sampling):
    small, large = two_sizes
    expected = written(large, speculate=0, threads=1, tokens=150, **sampling)
    engine = Engine(large, threads=1, draft=small)
    settings = {"temperature": 1.0, "seed": 4, "tokens": 150} | sampling
    found = native.Counts()
    for _ in range(300):  # whether drafts pay is a matter of measured times, which a busy machine blurs
        assert list(engine.ids(PROMPT, **settings)) == expected
        native.library().tlm_session_counts(engine._core._idle[-1][1], found)
        if found.taken > 10:
            break
    assert found.taken > 10
    assert found.taken > 0.9 * found.asked  # all but those behind a wrong guess of another kind
    assert found.passes <= found.tokens - found.taken


def test_a_model_for_drafts_needs_the_same_tokens(files, two_sizes, folder):
    other = str(folder / "other.tlm")
    export(tinylm.Transformer(ModelConfig(**SIZES), tokenizer=tinylm.Tokenizer.train([], kind="byte")), other)
    with pytest.raises(ValueError, match="the model for drafts has other tokens"):
        Engine(two_sizes[1], draft=other)
    with pytest.raises(ValueError, match="encoder"):
        Engine(two_sizes[1], draft=files("bert", "int8"))
    with pytest.raises(ValueError, match=r"none\.tlm"):
        Engine(two_sizes[1], draft=str(folder / "none.tlm"))
    engine = Engine(two_sizes[1], draft=files("llama", "int8"))  # one that is always wrong, and shorter of memory
    assert list(engine.ids(PROMPT, tokens=60, seed=1)) == list(Engine(two_sizes[1]).ids(PROMPT, tokens=60, seed=1))


def test_a_batch_writes_what_each_text_is_alone(files):
    """Text i has the stream i; slots are filled again as texts end."""
    path = files("windows", "int8")
    prompts = [PROMPT, [3], [9] * 24, [7, 8, 9], PROMPT]
    settings = {"temperature": 0.9, "seed": 11}
    alone = [list(Twin(path).generate(prompt, 30, stream=i, **settings)) for i, prompt in enumerate(prompts)]
    assert alone[0] != alone[4]
    for together, threads in itertools.product((1, 2, 64), (1, 2)):
        made = [[] for _ in prompts]
        for i, new, _ in Engine(path, threads=threads)._core.write(prompts, 30, together, settings):
            made[i] += new
        assert made == alone


def test_a_prompt_that_begins_as_the_last_text_uses_the_cache_rightly(files):
    path = files("llama", "int8")
    engine = Engine(path, threads=1)
    first = list(engine.ids(PROMPT, tokens=10))
    for prompt in (PROMPT + first, PROMPT[:3], [*PROMPT[:3], 9], PROMPT + first[:5] + [1, 2, 3]):
        assert list(engine.ids(prompt, tokens=10)) == list(Engine(path).ids(prompt, tokens=10))


def test_threads_share_a_model(files):
    engine = Engine(files("llama", "int8"), threads=2)
    expected = [list(engine.ids([i + 1], tokens=40, seed=i)) for i in range(6)]
    found: list = [None] * 6

    def work(i):
        found[i] = list(engine.ids([i + 1], tokens=40, seed=i))

    workers = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert found == expected


# ---- scores


def test_a_score_is_what_each_token_costs_given_its_window(files):
    path = files("gpt2", "int8")
    tokens = tokens_for(path, 24) * 3
    twin = Twin(path)
    expected = []
    for at in range(1, len(tokens)):
        begin = max(0, -(-(at - 24) // 12) * 12)
        logits = twin.logits(tokens[begin:at])[-1].astype(np.float64)
        expected.append(logits[tokens[at]] - np.log(np.exp(logits - logits.max()).sum()) - logits.max())
    for threads in (1, 2):
        score = Engine(path, threads=threads)._core.score(tokens)
        np.testing.assert_allclose(score[1:], expected, atol=1e-5)
    np.testing.assert_allclose(Slow(path).score(tokens), score, atol=1e-5)


# ---- what is refused


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"min_p": 2.0}, "min_p"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"seed": -1}, "seed"),
        ({"tokens": -1}, "tokens"),
        ({"warmth": 1}, "warmth"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_named(files, settings, said):
    with pytest.raises(ValueError, match=said):
        list(Engine(files("llama", "int8")).ids([1], **settings))


def test_impossible_tokens_texts_and_models_are_refused(files):
    engine = Engine(files("llama", "int8"))
    for ids in ([261], [-1], [2**40]):
        with pytest.raises(ValueError, match=r"outside 0\.\.260"):
            engine.logits(ids)
    with pytest.raises(ValueError, match="text 0 has 25 tokens: the model takes 1 to 24"):
        engine.logits([1] * 25)
    with pytest.raises(ValueError, match="without tokens"):
        list(engine.ids([]))
    with pytest.raises(ValueError, match="no tokenizer"):
        engine.score("a text")
    encoder = Engine(files("bert", "int8"))
    for call in (lambda: list(encoder.ids([1])), lambda: encoder.score([1, 2])):
        with pytest.raises(ValueError, match="encoder"):
            call()
    with pytest.raises(ValueError, match="kernels = sse9"):
        Engine(engine.path, kernels="sse9")
    with pytest.raises(ValueError, match="cache"):
        Engine(engine.path, cache="int4")
    with pytest.raises(ValueError, match="multiple of 16"):
        Engine(files("odd", "int8"), cache="int8")


def test_logits_that_are_not_finite_are_an_error(folder):
    model = tinylm.Transformer(ModelConfig(**(SIZES | ALL["llama"])))
    assign(model, tinylm.named(model) | {"blocks.1.mlp_norm.scale": np.full(32, 3e38, np.float32)})
    path = str(folder / "large.tlm")
    export(model, path, bits="int8")
    for screen in (True, False):
        with pytest.raises(ValueError, match="not finite"):
            list(Engine(path, screen=screen).ids([1], tokens=3))
    with pytest.raises(ValueError, match="not finite"):
        Engine(path).score([1, 2, 3])


def test_damaged_files_give_one_error_each(files, folder):
    """Wherever a byte is changed, the checksum says so; with a right checksum, no bytes crash the engine."""
    lib = native.library()
    whole = Path(files("gpt2", "int4")).read_bytes()
    rng = np.random.default_rng(0)
    path = folder / "damaged.tlm"
    refused = []
    for trial in range(300):
        data = bytearray(whole)
        if trial % 10 == 0:
            data = data[: int(rng.integers(0, len(data)))]
        table_end = 320 + 112 * int.from_bytes(whole[64 + 100 : 64 + 104], "little")
        for _ in range(int(rng.integers(1, 4))):
            at = int(rng.integers(0, table_end if trial % 3 else len(data)))
            if at < len(data):
                data[at] = int(rng.integers(0, 256)) if trial % 2 else 255
        if trial % 5 and len(data) > 320:  # a hostile file has a right checksum
            data[16:24] = len(data).to_bytes(8, "little")
            data[24:28] = lib.tlm_crc32c(bytes(data[32:]), len(data) - 32).to_bytes(4, "little")
        path.write_bytes(bytes(data))
        try:
            engine = Engine(str(path), threads=1)
            tokens = [1 % engine.facts.vocab, 0]
            if engine.facts.context < 2**16:
                list(engine.ids(tokens, tokens=3))
        except ValueError as error:
            refused.append(str(error))
    assert len(refused) > 200
    assert all(0 < len(text) < 700 for text in refused)


DATA = Path(os.environ.get("TINYLM_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(scope="module")
def stories(folder):
    """The real stories260K."""
    if not (DATA / "ckpt" / "stories260K").exists():
        pytest.skip(f"no data at {DATA}: set TINYLM_DATA")
    path = str(folder / "stories.tlm")
    model = tinylm.load(next((DATA / "ckpt" / "stories260K").glob("*.bin*")))
    export(model, path, bits="float32")
    return model, Engine(path)


def test_text_is_what_the_kit_writes(stories):
    """Greedy, with float weights: the first hundred tokens, also of an empty prompt and with a stop."""
    model, engine = stories
    for prompt in ("", "Once upon a time", "The dog"):
        expected = tinylm.generate(model, prompt, tokens=100, temperature=0.0)
        assert engine.generate(prompt, tokens=100, temperature=0.0) == expected
        pieces = list(engine.stream(prompt, tokens=100, temperature=0.0))
        assert len(pieces) > 5
        assert prompt + "".join(pieces) == expected
        stop = expected[len(prompt) + 20 : len(prompt) + 24]
        whole = tinylm.generate(model, prompt, tokens=100, temperature=0.0, stop=stop)
        assert engine.generate(prompt, tokens=100, temperature=0.0, stop=stop) == whole
        assert prompt + "".join(engine.stream(prompt, tokens=100, temperature=0.0, stop=stop)) == whole
    assert engine.generate([], tokens=3) == []
    both = engine.generate(["", "The dog"], tokens=30, seed=2)
    assert both[0] == engine.generate("", tokens=30, seed=2)
    assert both[1].startswith("The dog")


def test_a_score_is_what_the_kit_measures(stories):
    model, engine = stories
    text = "Once upon a time, there was a little girl. She liked to play."
    ids = np.array([[model.tokenizer.begin, *model.tokenizer.encode(text)]])
    logits = np.asarray(model(ids), np.float64)[0]
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    score = engine.score(text)
    assert score.nats == pytest.approx(-logs[np.arange(ids.size - 1), ids[0, 1:]].sum(), rel=1e-4)
    assert (score.tokens, score.bytes) == (ids.size - 1, len(text))


def test_a_prefix_is_read_off_the_tokenizer(folder):
    """Without parsing it: for every real tokenizer there is."""
    files = sorted((DATA / "tokenizers").glob("*tokenizer.json")) if DATA.exists() else []
    own = tinylm.Tokenizer.train(["some text " * 100], vocab=300)
    found = [own]
    for file in files:
        with contextlib.suppress(ValueError):
            found.append(tinylm.Tokenizer.load(file))
    for tokenizer in found:
        config = ModelConfig(vocab=tokenizer.vocab, width=16, layers=1, heads=1, context=8)
        path = str(folder / "tokenizer.tlm")
        export(tinylm.Transformer(config, tokenizer=tokenizer), path, bits="int8")
        assert Engine(path).prefix == tokenizer.prefix.decode()
        assert [Engine(path).piece(i) for i in range(tokenizer.vocab)] == list(tokenizer.token_bytes)


# ---- being stopped


INTERRUPTED = """
import sys, time
from tinylm.engine import Engine
engine = Engine({path!r}, threads={threads})
prompt = [1] * {prompt}
print("go", flush=True)
try:
    for token in engine.ids(prompt, tokens=10**7, temperature=1.0):
        if {prompt} > 1:
            print("too late", flush=True)
            break
except KeyboardInterrupt:
    print(time.time(), flush=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize(("prompt", "threads"), [(1, 1), (1, 2), (30_000, 1), (30_000, 2)])
def test_ctrl_c_is_heard_at_once(folder, prompt, threads):
    """While a long text is written, and while a long prompt is read."""
    path = folder / "long.tlm"
    if not path.exists():
        config = ModelConfig(vocab=261, context=32768, width=128, layers=4, heads=4)
        export(tinylm.Transformer(config), path, bits="int8")
    code = INTERRUPTED.format(path=str(path), threads=threads, prompt=prompt)
    root = Path(tinylm.__file__).parents[1]
    waited = []
    for _ in range(3):  # the machine may be busy with something else once
        run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=root)
        try:
            assert run.stdout.readline() == "go\n"
            time.sleep(0.3)
            sent = time.time()
            run.send_signal(signal.SIGINT)
            heard = run.stdout.readline()
            run.wait(10)
        finally:
            run.kill()
            run.stdout.close()
        waited.append(float(heard) - sent)
        if waited[-1] < 0.2:
            break
    assert min(waited) < 0.2


def test_the_library_names_how_to_get_it(monkeypatch, files):
    path = files("llama", "int8")
    expected = list(Engine(path).ids(PROMPT, tokens=5))
    monkeypatch.setattr(native, "_loaded", None)
    monkeypatch.setattr(native, "find", lambda: None)
    assert not native.available()
    with pytest.warns(RuntimeWarning, match="install a wheel of tinylm") as seen:
        engine = Engine(path)
    assert len(seen) == 1
    assert list(engine.ids(PROMPT, tokens=5)) == expected


def test_a_library_of_another_build_is_not_used(monkeypatch, files):
    monkeypatch.setattr(native, "_loaded", None)
    monkeypatch.setattr(native, "VERSION", 99)
    with pytest.raises(native.NativeMissing, match="has version 2 of the interface, and this tinylm needs 99; install"):
        native.library()
    monkeypatch.setattr(native, "_loaded", None)
    monkeypatch.setattr(native, "VERSION", 2)
    assert native.library().tlm_version() == 2
    header = (Path(native.__file__).parent / "tinylm.h").read_text()
    assert f"#define TLM_VERSION {native.VERSION}\n" in header
    assert set(re.findall(r"TLM_API \S+ \*?(tlm_\w+)\(", header)) == set(native.SIGNATURES)


def test_starting_imports_little(files):
    code = f"""
import sys
from tinylm.engine import Engine
print(len(list(Engine({files("llama", "int8")!r}).ids([1], tokens=3))))
print(sorted({{"numpy", "jax", "tokenizers", "json", "threading", "dataclasses", "re"}} & set(sys.modules)))
"""
    root = Path(tinylm.__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=root)
    assert run.stdout.split("\n")[:2] == ["3", "[]"], run.stderr
