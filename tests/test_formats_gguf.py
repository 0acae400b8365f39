"""GGUF files: the container against the `gguf` package, and what is refused."""

import functools
import gc
import math
import os
import struct

import damage
import numpy as np
import pytest
from ggufs import BERT, DECODER, LAYER, MODELS, bert_tokenizer, made, random, tokenizer  # noqa: F401 (two are fixtures)

from tinylm.config import ModelConfig
from tinylm.formats import ggml, gguf
from tinylm.formats import gguf_models as models
from tinylm.formats.tables import FormatError
from tinylm.model import Transformer
from tinylm.tokenizer import Tokenizer
from tinylm.weights import named

# --- the container ----------------------------------------------------------------------------------------------------


def test_a_file_of_the_gguf_package_is_read_and_ours_by_it(tmp_path):
    package = pytest.importorskip("gguf", reason="the gguf package is not installed")
    rng = np.random.default_rng(0)
    arrays = {"a": rng.standard_normal((3, 64)).astype(np.float32), "b.c": rng.standard_normal(5).astype(np.float16)}
    writer = package.GGUFWriter(tmp_path / "theirs.gguf", "llama")
    entries = {"uint8": 200, "int8": -5, "uint16": 60000, "int16": -300, "uint32": 2**32 - 1, "int32": -(2**31)}
    entries |= {"uint64": 2**63, "int64": -(2**60), "float32": 1e-5, "float64": math.pi, "bool": True, "string": "é🦙"}
    for kind, value in entries.items():
        getattr(writer, f"add_{kind}")(f"x.{kind}", value)
    writer.add_array("x.texts", ["", "a", "▁b"])
    writer.add_array("x.numbers", [1, -2, 3])
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    for version in (3, 2):  # the two differ in the number alone
        raw = (tmp_path / "theirs.gguf").read_bytes()
        (tmp_path / "theirs.gguf").write_bytes(raw[:4] + struct.pack("<I", version) + raw[8:])
        file = gguf.open_file(tmp_path / "theirs.gguf")
        assert {key: file.metadata[f"x.{key}"] for key in entries} == entries
        assert list(file.metadata["x.texts"]) == ["", "a", "▁b"]
        assert file.metadata["x.numbers"].tolist() == [1, -2, 3]
        for name, array in arrays.items():
            np.testing.assert_array_equal(file.tensor(name), array.astype(np.float32))

    values = {
        "general.architecture": "llama",
        "i": 7,
        "f": 0.5,
        "b": True,
        "s": ["x", "yz"],
        "n": np.array([1, -1], "<i4"),
    }
    kinds = {"a": (ggml.TYPES["Q8_0"], arrays["a"]), "b.c": (ggml.TYPES["F32"], arrays["b.c"])}
    gguf.write_file(tmp_path / "ours.gguf", values, kinds)
    theirs = package.GGUFReader(tmp_path / "ours.gguf")
    assert theirs.get_field("i").contents() == 7
    assert theirs.get_field("b").contents() is True
    assert theirs.get_field("s").contents() == ["x", "yz"]
    assert theirs.get_field("n").contents() == [1, -1]
    for tensor in theirs.tensors:
        array = package.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(array, gguf.open_file(tmp_path / "ours.gguf").tensor(tensor.name))


def head(*entries, tensors=(), version=3, data=b"", counts=None):
    """A GGUF file from raw entries and rows of the table."""
    count = counts or (len(tensors), len(entries))
    raw = b"GGUF" + struct.pack("<IQQ", version, *count) + b"".join(entries) + b"".join(tensors)
    return raw + bytes(-len(raw) % 32) + data


def text(value):
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def row(name, *shape, kind=0, offset=0):
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def number(key, value=1):
    return text(key) + struct.pack("<II", 4, value)


FLAWS = {
    "no GGUF file: it begins with b'NOPE'": b"NOPE" + bytes(60),
    "it is compressed: unpack it first": b"\x1f\x8b" + bytes(60),
    "no GGUF file of 24 bytes or more": b"GGUF",
    "GGUF version 1: known are 2 and 3": head(version=1),
    "GGUF version 3, big-endian": head(version=3 << 24),
    "9,223,372,036,854,775,808 tensors are announced": head(counts=(2**63, 0)),
    "1,000,000 entries are announced": head(counts=(0, 10**6)),
    "the key 'a' occurs twice": head(number("a"), number("a")),
    "key 0 is empty": head(number("")),
    "the length of key 1 needs 8 bytes": head(number("a"), counts=(0, 2))[:44],
    "key 0 is not UTF-8 at byte 1": head(number(b"a\xff")),
    "key 0 has 18,446,744,073,709,551,615 bytes": head(struct.pack("<Q", 2**64 - 1), counts=(0, 1), data=bytes(64)),
    "'a' has the unknown type 13": head(text("a") + struct.pack("<II", 13, 1)),
    "'a' is neither true nor false: 2": head(text("a") + struct.pack("<IB", 7, 2), data=bytes(64)),
    "'a' is an array of arrays": head(text("a") + struct.pack("<IIQ", 9, 9, 1), data=bytes(64)),
    "'a' is an array of the unknown type 77": head(text("a") + struct.pack("<IIQ", 9, 77, 1), data=bytes(64)),
    "the value of 'a' needs 34,359,738,368 bytes": head(text("a") + struct.pack("<IIQ", 9, 10, 2**32)),
    "'a' announces 4,294,967,296 strings": head(text("a") + struct.pack("<IIQ", 9, 8, 2**32)),
    "'a' ends beyond the end": head(text("a") + struct.pack("<IIQQ", 9, 8, 1, 2**60), data=bytes(64)),
    "general.alignment = 3: not a power of two": head(number("general.alignment", 3)),
    "tensor 't' has 5 dimensions": head(tensors=[row("t", 1, 1, 1, 1, 1)]),
    "tensor 't' has 0 dimensions": head(tensors=[row("t")]),
    "tensor 't' is empty": head(tensors=[row("t", 0)]),
    "tensor 0 has a name of 64 characters": head(tensors=[row("t" * 64, 1)]),
    "tensor 't' has the type IQ4_XS; known are F32": head(tensors=[row("t", 256, kind=23)]),
    "tensor 't' has the type number 999": head(tensors=[row("t", 1, kind=999)]),
    "rows of 33 values are no whole blocks of 32": head(tensors=[row("t", 33, kind=8)]),
    "tensor 't' would take 340,282,366,920,938,463": head(tensors=[row("t", 2**63, 2**63, kind=0)]),
    "tensor 't' would take 4 bytes from 7 on": head(tensors=[row("t", 1, offset=7)], data=bytes(64)),
    "tensor 't' would take 4 bytes from 18,446,744,073,709,551,584": head(tensors=[row("t", 1, offset=2**64 - 32)]),
    "tensor 't' occurs twice": head(tensors=[row("t", 1), row("t", 1, offset=32)], data=bytes(64)),
    "tensor 'b' overlaps 'a'": head(tensors=[row("a", 16), row("b", 1, offset=32)], data=bytes(128)),
    "tensor 't' ends at byte": head(tensors=[row("t", 8)], data=bytes(31)),
}


@pytest.mark.parametrize("flaw", FLAWS)
def test_a_flawed_container_is_refused_by_name(flaw, tmp_path):
    (tmp_path / "bad.gguf").write_bytes(FLAWS[flaw])
    with pytest.raises(FormatError) as error:
        gguf.open_file(tmp_path / "bad.gguf")
    assert str(error.value).startswith(f"{tmp_path / 'bad.gguf'}: ")
    assert flaw in str(error.value)


def test_only_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FormatError, match="no GGUF file"):
        gguf.open_file(tmp_path / "pipe")
    with pytest.raises(FileNotFoundError):
        gguf.open_file(tmp_path / "absent")


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_model_comes_back_as_it_was(name, tokenizer, bert_tokenizer, tmp_path):
    model = made(name, tokenizer, bert_tokenizer)
    path = models.write(model, tmp_path / "m.gguf", dtype="f32")
    again = models.read(path)
    assert again.config == model.config
    assert again.tokenizer == model.tokenizer
    for parameter, value in named(again).items():
        np.testing.assert_array_equal(value, named(model)[parameter], parameter)
    first = path.read_bytes()
    assert models.write(again, path, dtype="f32").read_bytes() == first
    assert models.read(models.write(model, path, tokenizer=False)).tokenizer is None


def test_all_that_llama_cpp_cannot_say_is_refused_at_once(tmp_path):
    config = ModelConfig(vocab=300, **DECODER, mlp="relu2", window=16, softcap=5.0, attention_scale=1.0)
    with pytest.raises(FormatError) as error:
        models.write(Transformer(config), tmp_path / "m.gguf", tokenizer=False)
    for part in ("llama.cpp (llama)", "mlp = 'relu2'", "window = 16", "softcap = 5.0", "attention_scale = 1.0"):
        assert part in str(error.value)
    with pytest.raises(FormatError, match=r"head = 'mlm' \(it knows 'classes' or 'none'"):
        models.write(Transformer(ModelConfig(vocab=300, **LAYER, **BERT, head="mlm")), tmp_path / "m.gguf")
    with pytest.raises(FormatError, match="dtype = 'q4_k': must be one of float32, float16"):
        models.write(Transformer(ModelConfig(vocab=300, **DECODER)), tmp_path / "m.gguf", dtype="q4_k")
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("general.architecture", "mamba", "general.architecture = 'mamba': known are llama, qwen2"),
        ("llama.rope.scaling.factor", 4.0, r"llama.rope.scaling.factor = '4.0' is not known here"),
        ("llama.attention.sliding_window", 32, "llama.attention.sliding_window = '32' is not known here"),
        ("llama.expert_count", 8, "llama.expert_count = '8' is not known here"),
        ("llama.final_logit_softcapping", 30.0, "llama.final_logit_softcapping"),
        ("llama.rope.dimension_count", 4, "llama models have no rotary = 4"),
        ("llama.block_count", 2**31, "llama.block_count = 2,147,483,648: 1 to 512"),
        ("llama.block_count", 3, "blk.2.attn_norm.weight is missing"),
        ("llama.context_length", 0, "ModelConfig.context = 0"),
        ("llama.embedding_length", "64", "llama.embedding_length = 64: not a whole number"),
        ("llama.attention.head_count", 0, "the file describes no model of this kit"),
        ("llama.attention.value_length", 4, "keys of 8 features a head and values of 4"),
        ("llama.attention.causal", False, "llama.attention.causal = False"),
        ("tokenizer.ggml.pre", "falcon", "'falcon' names an unknown way to cut text into words; known: gpt-2"),
        ("tokenizer.ggml.model", "rwkv", "its tokenizer: tokenizer.ggml.model = 'rwkv': known are llama, gpt2, bert"),
        ("tokenizer.ggml.tokens", ["a"], "lists 1 texts, and the model has 400 token ids"),
        ("tokenizer.ggml.token_type", "x", "token_type holds no 400 numbers"),
    ],
)
def test_a_file_that_says_something_else_is_refused(key, value, message, tokenizer, tmp_path):
    model = random(ModelConfig(vocab=tokenizer.vocab, **MODELS["llama"]), tokenizer)
    file = gguf.open_file(models.write(model, tmp_path / "m.gguf"))
    metadata = {k: list(v) if isinstance(v, gguf.Strings) else v for k, v in file.metadata.items()}
    gguf.write_file(
        tmp_path / "m.gguf",
        {**metadata, key: value},
        {name: (place.kind, file.tensor(name)) for name, place in file.tensors.items()},
    )
    with pytest.raises(FormatError, match=message) as error:
        models.read(tmp_path / "m.gguf")
    assert str(error.value).startswith(str(tmp_path / "m.gguf"))
    if key.startswith("tokenizer"):
        assert models.read(tmp_path / "m.gguf", tokenizer=False).tokenizer is None


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def fuzz(monkeypatch, tmp_path):
    """Read `count` damaged copies; gives how many were refused, how many loaded, and the most memory held.

    GGUF has no checksum: a flipped bit of a weight, a setting or a token gives another sound file. Shapes are computed
    once per configuration, and models are not put together: both take their time with sound files alone.
    """
    monkeypatch.setattr(models.tables, "shapes", functools.cache(models.tables.shapes))
    monkeypatch.setattr(models.tables, "build", lambda *parts: parts)
    gc.collect()
    gc.freeze()  # `peak` collects garbage each time, and need not look at what was there before
    yield lambda count: _fuzz(count, tmp_path)
    gc.unfreeze()


def _fuzz(count, tmp_path):
    words = Tokenizer.train([], kind="byte")
    model = random(ModelConfig(vocab=words.vocab, context=16, width=8, layers=1, heads=2, hidden=16), words)
    path, refused, most = models.write(model, tmp_path / "good.gguf"), 0, 0
    raw, bad = path.read_bytes(), tmp_path / "bad.gguf"
    for name, content in damage.damaged(raw, count):
        bad.write_bytes(content)
        found, held = damage.peak(lambda: models.read(bad))
        most = max(most, held)
        if isinstance(found, Exception):
            assert type(found) is FormatError, (name, repr(found))
            assert str(found).startswith(str(bad)), (name, str(found))
            refused += 1
        else:
            config, params, tokenizer = found
            expected = {key: x.shape for key, x in models.tables.shapes(config).items()}
            assert {key: x.shape for key, x in params.items()} == expected, name
            assert tokenizer is None or tokenizer.vocab <= config.vocab, name
        assert held < 2 * len(content) + 20e6, (name, held)
    return refused, count - refused, most


def test_damaged_files_are_refused_or_are_other_sound_files(fuzz):
    refused, loaded, _ = fuzz(300)
    assert refused > 150
    assert loaded > 10


def test_long_lists_stay_in_the_file(tmp_path):
    raw = head(text("a") + struct.pack("<IIQ", 9, 8, 2**20) + bytes(8 * 2**20))
    (tmp_path / "m.gguf").write_bytes(raw)
    file, held = damage.peak(lambda: gguf.open_file(tmp_path / "m.gguf"))
    assert file.metadata["a"].count == 2**20
    assert held < 1e6


@pytest.mark.slow
def test_ten_thousand_damaged_files(fuzz):
    refused, loaded, most = fuzz(10_000)
    print(f"{refused} refused, {loaded} loaded as other files, {most / 1e6:.1f} MB held at most")
    assert refused > 5_000
