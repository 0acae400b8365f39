"""ONNX files: run by onnxruntime and by onnx's own NumPy evaluator, they compute what the model computes."""

import functools
import json
import random
import re
import sys
import textwrap

import jax
import jax.numpy as jnp
import llama2c
import numpy as np
import pytest
from flax import nnx
from numpy_model import NumpyModel, random_params
from test_model import DECODERS, GRID, SMALL, config_of, near, params_of, program, random_tokens

from tinylm.config import ModelConfig, Sampling
from tinylm.formats.tables import FormatError, build
from tinylm.generation import generate_tokens
from tinylm.model import Cache, shapes
from tinylm.taps import recording
from tinylm.tokenizer import Tokenizer
from tinylm.weights import bind, named, pure

onnx = pytest.importorskip("onnx", reason="needs onnx (the extra tinylm[onnx])")
reference = pytest.importorskip("onnx.reference")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")

from tinylm.formats import onnx_graph
from tinylm.formats.onnx_graph import BLOCK, blockwise, write

PROMPT = "Once upon a time"


def model_of(name):
    return build(config_of(name), params_of(config_of(name)))


class Session:
    """An ONNX file in onnxruntime, on one thread; `plain`: every node as the standard says it, none rewritten."""

    def __init__(self, source, plain=False):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        if plain:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        self.session = onnxruntime.InferenceSession(source if isinstance(source, bytes) else str(source), options)
        self.inputs = {x.name: x for x in self.session.get_inputs()}

    def __call__(self, tokens, mask=None, past=None, types=None):
        """The first output, and the past for the next call."""
        tokens = np.asarray(tokens, np.int64)
        past = self.nothing(len(tokens)) if past is None else past
        held = next((x.shape[2] for x in past.values()), 0) + tokens.shape[1]
        feed = {"input_ids": tokens, "attention_mask": np.ones((len(tokens), held)) if mask is None else mask, **past}
        feed["attention_mask"] = np.asarray(feed["attention_mask"], np.int64)
        if "token_type_ids" in self.inputs:
            feed["token_type_ids"] = np.zeros_like(tokens) if types is None else np.asarray(types, np.int64)
        first, *present = self.session.run(None, feed)
        return first, dict(zip(past, present, strict=True))

    def nothing(self, rows):
        pasts = [x for x in self.inputs.values() if x.name.startswith("past")]
        return {x.name: np.zeros((rows, x.shape[1], 0, x.shape[3]), np.float32) for x in pasts}

    def greedy(self, prompt, count):
        made, new, past = [], list(prompt), None
        for _ in range(count):
            logits, past = self([new], past=past)
            new = [int(logits[0, -1].argmax())]
            made += new
        return made


def ours_of(name, tokens, **more):
    return np.asarray(program(config_of(name))(params_of(config_of(name)), jnp.asarray(tokens), **more))


@functools.cache
def ours(name):
    return ours_of(name, random_tokens())


# --- the same numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GRID)
def test_every_kind_of_model(name, tmp_path):
    path = write(model_of(name), tmp_path / "m.onnx")
    onnx.checker.check_model(str(path), full_check=True)
    for plain in (False, True):
        near(Session(path, plain)(random_tokens())[0], ours(name), 1e-5)


@pytest.mark.parametrize("name", ["llama", "bert", "caps", "windows", "pythia"])
def test_the_standards_own_evaluator(name, tmp_path):
    """onnx's NumPy reference: the file means the same without onnxruntime."""
    tokens = random_tokens().astype(np.int64)
    session = reference.ReferenceEvaluator(str(write(model_of(name), tmp_path / "m.onnx")))
    feed = {"input_ids": tokens, "attention_mask": np.ones_like(tokens), "token_type_ids": np.zeros_like(tokens)}
    c = config_of(name)
    for i in range(c.layers):
        empty = np.zeros((2, c.kv_heads, 0, c.head_width), np.float32)
        feed |= {f"past_key_values.{i}.key": empty, f"past_key_values.{i}.value": empty}
    first, *_ = session.run(None, {x: feed[x] for x in session.input_names})
    near(first, ours(name), 1e-5)


def random_config(seed):
    pick = random.Random(seed).choice
    head = pick(["tied", "untied", "mlm", "classes", "none"])
    settings = {
        "kind": pick(["decoder", "encoder"]),
        "head": head,
        "classes": 3 if head == "classes" else 0,
        "kv_heads": pick([1, 2, 4]),
        "head_width": pick([0, 6, 10]),
        "norm": pick(["rmsnorm", "layernorm"]),
        "norm_eps": pick([1e-5, 0.1]),
        "block": pick(["pre", "post", "parallel"]),
        "mlp": pick(["swiglu", "geglu", "reglu", "gelu", "gelu_tanh", "relu2"]),
        "positions": pick(["rope", "learned", "none", ("none", "rope")]),
        "theta": pick([10_000.0, 30.0]),
        "rotary": pick([0, 2, 6]),
        "window": pick([0, 3, (5, 0, 1)]),
        "attention_scale": pick([0, 0.7]),
        "qk_norm": pick([False, True]),
        "softcap": pick([0, 2.0]),
        "bias": pick([False, True]),
        "qkv_bias": pick([None, False, True]),
        "embed_norm": pick([False, True]),
        "token_types": pick([0, 3]),
    }
    return ModelConfig.from_dict({**SMALL, "layers": 3, **settings})


@pytest.mark.parametrize("seed", range(30))
def test_any_mixture_of_settings(seed, tmp_path):
    """Against the equations in NumPy, so that no setting is forgotten in some combination."""
    config = random_config(seed)
    params = random_params(shapes(config), seed)
    path = write(build(config, params), tmp_path / "m.onnx")
    onnx.checker.check_model(str(path), full_check=True)
    tokens, types = random_tokens(seed), random_tokens(seed, 3)
    twin = NumpyModel(config, params)
    types = types if config.token_types else [None, None]
    theirs = np.stack([twin(row, types=kinds) for row, kinds in zip(tokens, types, strict=True)])
    near(Session(path)(tokens, types=types)[0], theirs, 1e-4)


@pytest.mark.parametrize("name", GRID)
def test_tap_sites_are_values_of_the_same_name(name, tmp_path):
    config, (graph, params) = config_of(name), pure(model_of(name))

    @jax.jit
    def recorded(params):
        store = {}
        bind(graph, params)(random_tokens(), tap=recording(store))
        return store

    seen = {site: np.asarray(value) for site, value in recorded(params).items()}
    if config.head == "none":
        seen["last_hidden_state"] = seen.pop("logits")
    whole = onnx.load(write(model_of(name), tmp_path / "m.onnx"))
    del whole.graph.output[:]
    whole.graph.output.extend(onnx.helper.make_empty_tensor_value_info(site) for site in seen)
    session = Session(whole.SerializeToString(), plain=True)
    feed = {"input_ids": random_tokens().astype(np.int64), "attention_mask": np.ones((2, 17), np.int64)}
    if config.token_types:
        feed["token_type_ids"] = np.zeros((2, 17), np.int64)
    values = session.session.run(list(seen), {**feed, **session.nothing(2)})
    for (site, wanted), value in zip(seen.items(), values, strict=True):
        assert value.shape == wanted.shape, site
        near(value, wanted, 2e-5)


def test_types_count(tmp_path):
    types = random_tokens(1, 2)
    wanted = ours_of("bert", random_tokens(), types=types)
    session = Session(write(model_of("bert"), tmp_path / "m.onnx"))
    near(session(random_tokens(), types=types)[0], wanted, 1e-5)
    assert np.abs(session(random_tokens())[0] - wanted).max() > 0.1


# --- the cache, padding -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DECODERS)
def test_a_prompt_then_step_by_step(name, tmp_path):
    config, tokens, wanted = config_of(name), random_tokens(), ours(name)
    session = Session(write(model_of(name), tmp_path / "m.onnx"))
    parts, past, at = [], None, 0
    for count in (6, 1, 1, 5, 1, 3):
        logits, past = session(tokens[:, at : at + count], past=past)
        parts.append(logits)
        at += count
    near(np.concatenate(parts, 1), wanted, 2e-5)
    empty = Cache.empty(config, 2, tokens.shape[1])
    _, cache = program(config)(params_of(config), jnp.asarray(tokens), cache=empty)
    for i, (key, value) in enumerate(zip(cache.keys, cache.values, strict=True)):
        near(past[f"past_key_values.{i}.key"].transpose(0, 2, 1, 3), np.asarray(key), 2e-5)
        near(past[f"past_key_values.{i}.value"].transpose(0, 2, 1, 3), np.asarray(value), 2e-5)


PADDED = [(name, side) for name in ("llama", "neo", "mixed", "windows", "encoder rope") for side in ("left", "right")]


@pytest.mark.parametrize(("name", "side"), [*PADDED, ("bert", "right"), ("classifier", "right")])
def test_padded_rows_are_as_if_alone(name, side, tmp_path):
    session, tokens = Session(write(model_of(name), tmp_path / "m.onnx")), random_tokens(shape=(3, 17))
    twin, mask = NumpyModel(config_of(name), params_of(config_of(name))), np.zeros((3, 17), np.int64)
    for row, length in zip(mask, (17, 11, 1), strict=True):
        row[slice(17 - length, None) if side == "left" else slice(length)] = 1
    batch, _ = session(tokens, mask=mask)
    assert np.isfinite(batch).all()
    for row in range(3):
        alone = twin(tokens[row, mask[row] == 1])
        near(batch[row] if name == "classifier" else batch[row, mask[row] == 1], alone, 2e-5)


@pytest.mark.parametrize("name", ["llama", "neo", "windows"])
def test_padded_rows_go_on_as_if_alone(name, tmp_path):
    """Prompts of 9 and 4 tokens, padded on the left, then six more of each, one by one."""
    session, tokens = Session(write(model_of(name), tmp_path / "m.onnx")), random_tokens(shape=(2, 15))
    twin, mask = NumpyModel(config_of(name), params_of(config_of(name))), np.ones((2, 15), np.int64)
    mask[1, :5] = 0
    logits, past = session(tokens[:, :9], mask=mask[:, :9])
    made = [logits[:, -1]]
    for t in range(9, 15):
        logits, past = session(tokens[:, t : t + 1], mask=mask[:, : t + 1], past=past)
        made.append(logits[:, -1])
    for row, start in enumerate((0, 5)):
        alone = twin(tokens[row, start:])
        near(np.stack(made)[:, row], alone[8 - start :], 2e-5)


# --- text -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def storyteller():
    """A model with random weights and a trained tokenizer."""
    tokenizer = Tokenizer.train(["Once upon a time there was a fox. One day, the fox saw a crow."] * 3, vocab=280)
    config = ModelConfig(vocab=tokenizer.vocab, context=96, width=32, layers=2, heads=4, kv_heads=2)
    return build(config, random_params(shapes(config)), tokenizer)


def test_the_example_tells_the_same_story(storyteller, tmp_path, monkeypatch, capsys):
    """The docstring's program, as it stands there, against `tinylm.generation`."""
    tokenizer = storyteller.tokenizer
    example = re.search(r"\n\n(    import numpy, onnxruntime, .*?)\n\n\S", onnx_graph.__doc__, re.S)[1]
    monkeypatch.chdir(tmp_path)
    write(storyteller, "story.onnx")
    exec(compile(textwrap.dedent(example), "example", "exec"), space := {})
    prompt = [tokenizer.end, *tokenizer.encode(PROMPT).tolist()]
    made = generate_tokens(storyteller, [prompt], tokens=64, sampling=Sampling(temperature=0.0))
    assert space["text"] == [*prompt, *np.concatenate(list(made), axis=1)[0].tolist()]
    assert len(set(space["text"])) > 10
    said = capsys.readouterr().out
    assert said.startswith(PROMPT)
    assert said == tokenizer.decode(space["text"]) + "\n"


def llama2c_model(folder, file, pieces, vocab):
    config, params = llama2c.to_tinylm(llama2c.read_model(folder / file))
    pieces = llama2c.Pieces(folder / pieces, vocab)
    return build(config, params), [pieces.BEGIN, *pieces.encode(PROMPT)]


@pytest.mark.parametrize(
    ("name", "file", "pieces", "vocab"),
    [
        ("stories260K", "stories260K.bin", "tok512.bin", 512),
        pytest.param("stories15M", "stories15M.bin.gz", "tokenizer.bin.gz", 32000, marks=pytest.mark.slow),
    ],
)
def test_published_models_say_the_same(name, file, pieces, vocab, shared_data, tmp_path):
    """256 tokens in all, the most probable ones."""
    model, prompt = llama2c_model(shared_data / "ckpt" / name, file, pieces, vocab)
    made = generate_tokens(model, [prompt], tokens=256 - len(prompt), sampling=Sampling(temperature=0.0))
    made = np.concatenate(list(made), axis=1)[0].tolist()
    for dtype in ("float32", "float16"):
        session = Session(write(model, tmp_path / "m.onnx", dtype=dtype))
        assert session.greedy(prompt, len(made)) == made


def tinystories(shared_data, pieces, size):
    """Rows of 257 ids: the first `size` bytes of the stories, each with a begin token."""
    text = llama2c.read_bytes(shared_data / "tinystories" / "valid_v1_a.txt.gz")[:size].decode(errors="ignore")
    stories = re.split(r"\n\n+(?=Once upon a time|One day)", text)
    ids = [i for story in stories for i in (pieces.BEGIN, *pieces.encode(story.strip()))]
    return np.array(ids[: len(ids) // 257 * 257], np.int32).reshape(-1, 257)


def nats(logits, targets):
    logits = logits.astype(np.float64)
    top = logits.max(-1)
    lost = np.log(np.exp(logits - top[..., None]).sum(-1)) + top
    return (lost - np.take_along_axis(logits, targets[..., None], -1)[..., 0]).mean()


@pytest.mark.parametrize(
    ("name", "file", "pieces", "vocab", "size"),
    [
        ("stories260K", "stories260K.bin", "tok512.bin", 512, 10_000),
        pytest.param("stories260K", "stories260K.bin", "tok512.bin", 512, 100_000, marks=pytest.mark.slow),
        pytest.param("stories15M", "stories15M.bin.gz", "tokenizer.bin.gz", 32000, 100_000, marks=pytest.mark.slow),
    ],
)
def test_perplexity_of_real_text(name, file, pieces, vocab, size, shared_data, tmp_path):
    """`size` bytes of TinyStories: ours and the file's, nearly the same; int8 within a percent."""
    folder = shared_data / "ckpt" / name
    model, _ = llama2c_model(folder, file, pieces, vocab)
    rows = tinystories(shared_data, llama2c.Pieces(folder / pieces, vocab), size)
    graph, params = pure(model)
    forward = jax.jit(lambda params, tokens: bind(graph, params)(tokens))
    parts = [rows[i : i + 8] for i in range(0, len(rows) // 8 * 8, 8)]
    lost = np.mean([nats(np.asarray(forward(params, part[:, :-1])), part[:, 1:]) for part in parts])
    for dtype, limit in (("float32", 1e-5), ("float16", 1e-3), ("int8", 1e-2)):
        session = Session(write(model, tmp_path / "m.onnx", dtype=dtype))
        theirs = np.mean([nats(session(part[:, :-1])[0], part[:, 1:]) for part in parts])
        print(f"{name} {dtype}: {np.exp(lost):.5f} here, {np.exp(theirs):.5f} there, {np.exp(theirs - lost) - 1:+.2e}")
        assert abs(np.exp(theirs - lost) - 1) < limit


# --- smaller files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GRID)
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_smaller_files_hold_rounded_matrices_and_nothing_else_changes(name, dtype, tmp_path):
    config, params = config_of(name), dict(params_of(config_of(name)))
    for key, value in params.items():
        table = key == "embed.table"
        if table or key.endswith("kernel"):
            params[key] = value.astype(np.float16).astype(np.float32) if dtype == "float16" else rounded(value, table)
    path = write(model_of(name), tmp_path / "m.onnx", dtype=dtype)
    onnx.checker.check_model(str(path), full_check=True)
    wanted = np.asarray(program(config)(params, jnp.asarray(random_tokens())))
    assert np.abs(wanted - ours(name)).max() > 1e-4
    near(Session(path, plain=True)(random_tokens())[0], wanted, 2e-5)
    assert np.isfinite(Session(path)(random_tokens())[0]).all()


def rounded(matrix, table):
    """Every 32 inputs of every output, written as loops: q * scale, q whole and at most 127 either way."""
    columns = [row.copy() for row in (matrix if table else matrix.T)]
    for column in columns:
        for start in range(0, len(column), 32):
            part = column[start : start + 32]
            scale = np.float32(np.abs(part).max() / 127)
            part[:] = np.round(part / scale) * scale
    return np.stack(columns) if table else np.stack(columns).T


@pytest.mark.parametrize("axis", [0, 1])
def test_blocks(axis):
    matrix = np.random.default_rng(0).standard_normal((70, 90)).astype(np.float32)
    matrix[:BLOCK, :BLOCK] = 0
    codes, scales = blockwise(matrix, axis)
    assert (codes.dtype, scales.dtype) == (np.int8, np.float32)
    assert scales.shape == ((3, 90) if axis == 0 else (70, 3))
    each = np.repeat(scales, BLOCK, axis)[:70, :90]
    assert (np.abs(codes * each - matrix) <= each * 0.5001).all()
    assert np.abs(codes.astype(int)).max() == 127
    assert not codes[:BLOCK, :BLOCK].any()
    codes, scales = blockwise(np.float32(matrix * 1e-43), axis)  # smaller than any normal float32
    assert np.abs(codes * np.repeat(scales, BLOCK, axis)[:70, :90] - matrix * 1e-43).max() < 1e-43


def test_int8_is_near(tmp_path, storyteller):
    """onnxruntime also rounds what it multiplies by: a few percent of logits of random, very unlinear weights."""
    tokens = random_tokens(vocab=280)
    exact, _ = Session(write(storyteller, tmp_path / "a.onnx"))(tokens)
    rounded, _ = Session(write(storyteller, tmp_path / "b.onnx", dtype="int8"))(tokens)
    assert 1e-4 < np.abs(exact - rounded).mean() / np.abs(exact).mean() < 0.05


# --- the file ---------------------------------------------------------------------------------------------------------


def test_names_of_inputs_and_outputs(tmp_path):
    batch, new, past = "batch_size", "sequence_length", "past_sequence_length"
    describe = lambda values: {x.name: (x.type, x.shape) for x in values}  # noqa: E731
    session = Session(write(model_of("llama"), tmp_path / "m.onnx")).session
    room = lambda length: ("tensor(float)", [batch, 2, length, 8])  # noqa: E731
    assert describe(session.get_inputs()) == {
        "input_ids": ("tensor(int64)", [batch, new]),
        "attention_mask": ("tensor(int64)", [batch, f"{past} + {new}"]),
        **{f"past_key_values.{i}.{part}": room(past) for i in range(2) for part in ("key", "value")},
    }
    assert describe(session.get_outputs()) == {
        "logits": ("tensor(float)", [batch, new, 61]),
        **{f"present.{i}.{part}": room(f"{past} + {new}") for i in range(2) for part in ("key", "value")},
    }
    session = Session(write(model_of("embedder"), tmp_path / "m.onnx")).session
    inputs = ("input_ids", "attention_mask", "token_type_ids")
    assert describe(session.get_inputs()) == {name: ("tensor(int64)", [batch, new]) for name in inputs}
    assert describe(session.get_outputs()) == {"last_hidden_state": ("tensor(float)", [batch, new, 32])}
    session = Session(write(model_of("classifier"), tmp_path / "m.onnx")).session
    assert describe(session.get_outputs()) == {"logits": ("tensor(float)", [batch, 5])}


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_every_parameter_is_there_once(dtype, tmp_path):
    whole = onnx.load(write(model_of("bert"), tmp_path / "m.onnx", dtype=dtype))
    stored = {x.name: x for x in whole.graph.initializer}
    assert len(stored) == len(whole.graph.initializer)
    for name, value in params_of(config_of("bert")).items():
        kept = onnx.numpy_helper.to_array(stored.pop(name if name in stored else f"{name}.codes"))
        assert kept.shape == value.shape
        stored.pop(f"{name}.scales", None)
        if dtype == "float32":
            assert np.array_equal(kept, value)
    assert all(name.startswith("constant_") and x.ByteSize() < 80 for name, x in stored.items())


def test_equal_models_give_equal_bytes(storyteller, tmp_path):
    again = build(storyteller.config, {n: np.array(x) for n, x in named(storyteller).items()}, storyteller.tokenizer)
    for dtype in ("float32", "float16", "int8"):
        one, two = (write(m, tmp_path / f"{i}.onnx", dtype=dtype) for i, m in enumerate((storyteller, again)))
        assert one.read_bytes() == two.read_bytes()


def test_the_file_says_what_it_is(storyteller, tmp_path):
    about = Session(write(storyteller, tmp_path / "m.onnx")).session.get_modelmeta()
    assert about.producer_name == "tinylm"
    said = about.custom_metadata_map
    assert ModelConfig.from_dict(json.loads(said["tinylm"])) == storyteller.config
    assert Tokenizer.from_json(said["tokenizer"]) == storyteller.tokenizer
    assert said["tokenizer_sha256"] == storyteller.tokenizer.sha256
    without = Session(write(model_of("llama"), tmp_path / "m.onnx")).session.get_modelmeta()
    assert set(without.custom_metadata_map) == {"tinylm"}


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_missing_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(FormatError, match=r"pip install 'tinylm\[onnx\]'"):
        write(model_of("llama"), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_said_is_refused_and_nothing_is_written(tmp_path, monkeypatch):
    model = model_of("llama")
    with pytest.raises(FormatError, match="dtype = 'int4': must be one of float32, float16, int8"):
        write(model, tmp_path / "m.onnx", dtype="int4")
    with monkeypatch.context() as patch, pytest.raises(FormatError, match=r"m.onnx: .* up to 1,000 bytes"):
        patch.setattr(onnx_graph, "LIMIT", 1000)
        write(model, tmp_path / "m.onnx")
    huge = {**params_of(model.config), "blocks.0.attn.q.kernel": np.full((32, 32), 1e5, np.float32)}
    with pytest.raises(FormatError, match=r"blocks\.0\.attn\.q\.kernel holds a value of size 100000, float16 ends"):
        write(build(model.config, huge), tmp_path / "m.onnx", dtype="float16")
    huge["norm.scale"] = np.full(32, np.nan, np.float32)
    with pytest.raises(FormatError, match=r"norm\.scale holds values that are not finite"):
        write(build(model.config, huge), tmp_path / "m.onnx")
    model.blocks[1].attn.gain = nnx.Param(jnp.ones(4))
    with pytest.raises(FormatError, match=r"blocks\.1\.attn\.gain has no place in this format"):
        write(model, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = write(model_of("llama"), tmp_path / "m.onnx")
    before = path.read_bytes()
    monkeypatch.setattr(onnx_graph.tinylm, "__version__", "9.9")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="not saved"):
        patch.setattr("os.fsync", lambda file: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        write(model_of("llama"), path)
    assert path.read_bytes() == before
    assert write(model_of("llama"), str(path)).read_bytes() != before
    with pytest.raises(OSError, match="not saved"):
        write(model_of("llama"), tmp_path / "nowhere" / "m.onnx")
    with pytest.raises(IsADirectoryError, match="not saved"):
        write(model_of("llama"), tmp_path)
    assert list(tmp_path.iterdir()) == [path]
