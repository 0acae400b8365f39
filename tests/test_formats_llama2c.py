"""llama2.c's files: against its own programs, a NumPy reader and forward pass, and damaged bytes.

With LLAMA2C naming a folder that holds run.c and runq.c, the programs are built and asked for the same texts.
"""

import functools
import gzip
import os
import re
import shutil
import struct
import subprocess
import time
from pathlib import Path

import jax
import llama2c as oracle
import numpy as np
import pytest
from damage import damaged, peak

from tinylm import ModelConfig, Tokenizer, Transformer, evaluate, generate
from tinylm.config import Sampling
from tinylm.formats import llama2c, pieces, tables
from tinylm.formats.llama2c_tokenizers import read_tokenizer, tokenizer_file, tokenizer_path
from tinylm.formats.tables import FormatError
from tinylm.generation import generate_tokens
from tinylm.weights import assign, named

NAMES, THINGS = ("Lily", "Tom", "Zoe"), ("cat", "dog", "kite")
STORIES = [f"Once upon a time, {n} had a {t}. “I’m {t}!” said {n}.\n" for n in NAMES for t in THINGS]
SMALL = dict(vocab=300, context=64, width=32, layers=2, heads=4, kv_heads=2, hidden=48)


def model(seed=0, tokenizer=None, **changes):
    """Random, with weights large enough that it has something to say."""
    made = Transformer(ModelConfig(**{**SMALL, **changes}), rngs=seed, tokenizer=tokenizer)
    rng = np.random.default_rng(seed)
    assign(made, {name: np.float32(rng.normal(1, 0.2, x.shape) if name.endswith("scale") else
                                   rng.normal(0, 0.3, x.shape)) for name, x in named(made).items()})  # fmt: skip
    return made


@pytest.fixture(scope="module")
def own():
    return Tokenizer.train(STORIES * 20, vocab=300)


def logits(made, tokens):
    return np.asarray(made(np.array([tokens])))[0]


def same_params(a, b):
    a, b = named(a), named(b)
    assert a.keys() == b.keys()
    return all(np.array_equal(np.asarray(a[n]), np.asarray(b[n])) for n in a)


# ---- numbers


@pytest.mark.parametrize("changes", [{}, {"head": "untied"}, {"kv_heads": 4}, {"kv_heads": 1, "head": "untied"}])
def test_version_0_means_the_same_to_an_independent_reader(tmp_path, changes):
    made = model(**changes)
    path = llama2c.write(made, tmp_path / "m.bin")
    found = oracle.read_model(path)
    tokens = np.random.default_rng(1).integers(0, 300, 40)
    with jax.default_matmul_precision("float32"):
        assert np.abs(oracle.forward(found, tokens) - logits(made, tokens)).max() < 1e-4
    half = np.arange(4) / 4
    angle = np.outer(np.arange(64), 10_000.0**-half)
    assert np.abs(found.w["freq_cis_real"] - np.cos(angle)).max() < 1e-6
    assert np.abs(found.w["freq_cis_imag"] - np.sin(angle)).max() < 1e-6


def version_1(path):
    """The bytes of a version 0 file as version 1, which is read and never written."""
    m = oracle.read_model(path)
    sizes = (m.dim, m.hidden, m.layers, m.heads, m.kv_heads, m.vocab, m.context)
    order = ["rms_att", "rms_ffn", "rms_final", "embedding", "wq", "wk", "wv", "wo", "w1", "w2", "w3", "classifier"]
    head = b"24ka" + struct.pack("<i7iB", 1, *sizes, "classifier" not in m.w)
    return head.ljust(256, b"\0") + b"".join(m.w[name].astype("<f4").tobytes() for name in order if name in m.w)


@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize("head", ["tied", "untied"])
def test_float_versions_keep_every_bit(tmp_path, version, head):
    made = model(head=head)
    path = llama2c.write(made, tmp_path / "m.bin")
    raw = path.read_bytes()
    if version == 1:
        path.write_bytes(version_1(path))
    back = llama2c.read(path)
    assert same_params(made, back)
    assert back.config == made.config
    assert back.tokenizer is None
    packed = tmp_path / "n.bin.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert same_params(made, llama2c.read(packed))
    assert llama2c.write(back, tmp_path / "again.bin").read_bytes() == raw


def read_int8(path):
    """Version 2 by its description alone, as the oracle's `Llama`."""
    raw = path.read_bytes()
    assert raw[:8] == b"24ka" + struct.pack("<i", 2)
    dim, hidden, layers, heads, kv_heads, vocab, context = struct.unpack_from("<7i", raw, 8)
    shared, group = struct.unpack_from("<Bi", raw, 36)
    at, w, kv = 256, {}, dim // heads * kv_heads

    def floats(*shape):
        nonlocal at
        x = np.frombuffer(raw, "<f4", int(np.prod(shape)), at).reshape(shape)
        at += x.nbytes
        return x

    def whole(*shape):
        nonlocal at
        q = np.frombuffer(raw, "i1", int(np.prod(shape)), at)
        at += len(q)
        return (q.reshape(-1, group) * floats(len(q) // group, 1)).reshape(shape)

    w = {"rms_att": floats(layers, dim), "rms_ffn": floats(layers, dim), "rms_final": floats(dim)}
    w["embedding"] = whole(vocab, dim)
    sizes = {"wq": (dim, dim), "wk": (kv, dim), "wv": (kv, dim), "wo": (dim, dim)}
    for name, shape in (sizes | {"w1": (hidden, dim), "w2": (dim, hidden), "w3": (hidden, dim)}).items():
        w[name] = np.stack([whole(*shape) for _ in range(layers)])
    if not shared:
        w["classifier"] = whole(vocab, dim)
    assert at == len(raw)
    return oracle.Llama(dim, hidden, layers, heads, kv_heads, vocab, context, w), group


@pytest.mark.parametrize(("hidden", "asked", "group"), [(64, None, 32), (48, 64, 16), (44, 64, 4), (48, 8, 8)])
def test_int8_is_read_as_the_very_numbers_it_stands_for(tmp_path, hidden, asked, group):
    """Groups are made to divide width and hidden: runq would leave out the rest of a row."""
    made = model(hidden=hidden, head="untied")
    path = llama2c.write(made, tmp_path / "m.bin", version=2, group=asked)
    found, used = read_int8(path)
    assert used == group
    config, params = oracle.to_tinylm(found)
    back = llama2c.read(path)
    assert back.config == config
    assert {n: np.asarray(x).tobytes() for n, x in named(back).items()} == {
        n: np.ascontiguousarray(x, np.float32).tobytes() for n, x in params.items()
    }
    for name, x in named(made).items():  # no number is further off than half a step of its group
        error = np.abs(np.asarray(x) - np.asarray(named(back)[name]))
        assert error.max() <= (0 if name.endswith("scale") else np.abs(np.asarray(x)).max() / 253)


def test_int8_of_nothing_and_next_to_nothing():
    assert not any(x.any() for x in llama2c.quantized(np.zeros((3, 4)), 4))
    tiny = np.float32([[190, -190, 1, 0]]) * np.float32(1e-45)  # the scale, 1.5 of the smallest number, is rounded to 1
    q, scale = llama2c.quantized(tiny, 4)
    assert q.tolist() == [[127, -127, 1, 0]]
    assert scale[0] == np.float32(1e-45)


def test_a_version_or_a_group_that_helps_nobody_is_refused(tmp_path):
    """A group of 1 makes a file larger than float32; nobody reads version 1."""
    wrong = [(0, {"version": v}, "version = .*written are 0") for v in (1, 3, "2", 2.0, None, True)]
    wrong += [(0, {"group": 64}, "group = 64 is for version 2")]
    wrong += [(0, {"version": 2, "group": g}, f"group = {g!r}: must be a power of two") for g in (7, 0, 2, -4, 48, 8.0)]
    wrong += [(hidden, {"version": 2}, f"hidden = {hidden}: .*multiples of 32, or version 0") for hidden in (43, 46)]
    for hidden, options, reason in wrong:
        with pytest.raises(FormatError, match=reason):
            llama2c.write(model(hidden=hidden or 48), tmp_path / "m.bin", **options)
    sizes = [llama2c.write(model(hidden=172), tmp_path / "m.bin", version=v).stat().st_size for v in (0, 2)]
    assert sizes[1] < 0.55 * sizes[0], "groups of 4: two bytes for each weight"


@pytest.mark.parametrize("version", [0, 2])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, own, version):
    made = model(tokenizer=own)
    params = {n: np.array(x) for n, x in named(made).items()}
    params["embed.table"][7, 3], params["blocks.1.mlp.up.kernel"][0, 0] = np.nan, np.inf
    assign(made, params)
    with pytest.raises(FormatError, match="not finite") as caught:
        llama2c.write(made, tmp_path / "m.bin", version=version)
    assert all(name in str(caught.value) for name in ("embed.table", "blocks.1.mlp.up.kernel"))
    assert not list(tmp_path.iterdir())


# ---- tokenizers


def test_a_byte_level_tokenizer_goes_there_and_back(tmp_path, own):
    """Ids move to llama2.c's places, rows with them: the same text has the same probability."""
    made = model(tokenizer=own)
    path = llama2c.write(made, tmp_path / "story.bin")
    raw = oracle.Pieces(tokenizer_path(path), 300)
    assert raw.pieces[1] == b"<|endoftext|>"
    assert raw.pieces[3:259] == [bytes([b]) for b in range(256)]
    assert len(set(raw.pieces)) == 300
    back = llama2c.read(path)
    assert back.tokenizer.lossless
    assert (back.tokenizer.begin, back.tokenizer.end, back.tokenizer.pad, back.tokenizer.mask) == (1, 1, 0, 2)
    for text in STORIES:
        ids, theirs = own.encode(text), back.tokenizer.encode(text)
        assert [own.token_bytes[i] for i in ids] == [back.tokenizer.token_bytes[i] for i in theirs]
    a, b = (evaluate(m, STORIES).bits_per_byte for m in (made, back))
    assert a == pytest.approx(b, rel=1e-6)
    assert generate(made, "Once", tokens=40, temperature=0.0) == generate(back, "Once", tokens=40, temperature=0.0)


def test_ids_without_a_token_and_missing_specials(own):
    data, order = tokenizer_file(own, 310)
    assert sorted(order) == list(range(310))
    assert data.count(b"<|unused 30") == 10
    with pytest.raises(FormatError, match="holds the byte 0"):
        tokenizer_file(Tokenizer.train(["a\0\0b" * 9] * 9, vocab=270), 270)
    vocab = {s: i for i, s in enumerate(own.names[5:261])} | {"<|endoftext|>": 256}
    lone = Tokenizer(pieces.merged(vocab, [], ["<|endoftext|>"]))
    with pytest.raises(FormatError, match="three special tokens, and this tokenizer 1: give the model two ids more"):
        tokenizer_file(lone, 257)
    assert tokenizer_file(lone, 259)[1][:3].tolist() == [258, 256, 257]


@pytest.mark.parametrize(("name", "vocab"), [("stories260K/tok512.bin", 512), ("stories15M/tokenizer.bin.gz", 32000)])
def test_published_tokenizers(shared_data, tmp_path, name, vocab):
    file = shared_data / "ckpt" / name
    tk, slow = read_tokenizer(file, vocab), oracle.Pieces(file, vocab)
    raw = gzip.decompress((shared_data / "tinystories" / "train_v1.txt.gz").read_bytes()).decode()
    texts = [re.sub(" +", " ", t.strip()) for t in raw.split("<|endoftext|>") if t.strip()][:100]
    texts += ["", "naïve 語🦙\x00", "<s> </s> <0x41>", "a\n\nb"]
    for text in texts:
        assert tk.encode(text).tolist() == (slow.encode(text) if text else []), text
        assert tk.decode_bytes(tk.encode(text)) == (b" " + text.encode() if text else b"")
    assert (tk.begin, tk.end, tk.prefix) == (1, 1, b" ")
    data, order = tokenizer_file(tk, vocab)
    assert (order == np.arange(vocab)).all()
    (tmp_path / "tokenizer.bin").write_bytes(data)
    assert read_tokenizer(tmp_path / "tokenizer.bin", vocab) == tk


def older(raw, vocab):
    """The same tokenizer as earlier versions of llama2.c wrote it: bytes under the text of their character."""
    texts, scores, at = [], [], 4
    for i in range(vocab):
        score, length = struct.unpack_from("<fi", raw, at)
        text = raw[at + 8 : at + 8 + length]
        texts.append(chr(i - 3).encode() if 3 <= i < 259 else text.strip() if i < 3 else text)
        scores.append(score)
        at += 8 + length
    assert len(set(texts)) < vocab
    return raw[:4] + b"".join(struct.pack("<fi", s, len(t)) + t for s, t in zip(scores, texts, strict=True))


def test_the_older_file_repeats_characters_as_bytes(shared_data, tmp_path):
    """A look-up that finds the byte first reads "a" as id 100 and scores stories15M at 5.55 nats per token."""
    new = shared_data / "ckpt" / "stories260K" / "tok512.bin"
    (tmp_path / "tokenizer.bin").write_bytes(older(new.read_bytes(), 512))
    assert read_tokenizer(tmp_path / "tokenizer.bin", 512) == read_tokenizer(new, 512)


def test_the_tokenizer_beside_the_model(tmp_path, own):
    path = llama2c.write(model(), tmp_path / "a.bin")
    wrong, right = tokenizer_file(own, 310)[0], tokenizer_file(own, 300)[0]
    (tmp_path / "tok.tokenizer.bin").write_bytes(right)
    assert llama2c.read(path).tokenizer is None, "that of another model, tok.bin"
    (tmp_path / "tok310.bin").write_bytes(wrong)
    with pytest.warns(UserWarning, match=r"fits \(tok310.bin\), so the model has none: .*tokenizer=PATH") as seen:
        assert llama2c.read(path).tokenizer is None
    assert seen[0].filename == __file__
    assert llama2c.read(path, tokenizer=False).tokenizer is None
    (tmp_path / "tok300.bin").write_bytes(right)
    found = llama2c.read(path).tokenizer
    assert found.vocab == 300
    (tmp_path / "token.bin.gz").write_bytes(gzip.compress(right))
    assert llama2c.read(path).tokenizer == found, "a copy"
    (tmp_path / "tok_other.bin").write_bytes(tokenizer_file(Tokenizer.train(NAMES * 99, vocab=264), 300)[0])
    with pytest.warns(UserWarning, match=r"tok300.bin, tok_other.bin, token.bin.gz all fit, so the model has none"):
        assert llama2c.read(path).tokenizer is None
    (tmp_path / "tokenizer.bin").write_bytes(wrong)
    (tmp_path / "tokenizer.bin.gz").write_bytes(gzip.compress(right))
    assert llama2c.read(path).tokenizer == found
    assert llama2c.read(path, tokenizer=own).tokenizer is own
    assert llama2c.read(path, tokenizer=str(tmp_path / "tokenizer.bin.gz")).tokenizer == found
    tokenizer_path(path).write_bytes(wrong)
    with pytest.raises(
        FormatError, match=r"a.tokenizer.bin: .*another model's. It lies beside a.bin: .*tokenizer=PATH"
    ):
        llama2c.read(path)
    assert llama2c.read(path, tokenizer=False).tokenizer is None
    with pytest.raises(FormatError, match="more ids than the model"):
        llama2c.read(path, tokenizer=Tokenizer.train(STORIES * 20, vocab=310))
    for nothing in (None, 5, b"tok300.bin", ["tok300.bin"]):
        with pytest.raises(FormatError, match=r"a.bin: tokenizer = .*give a Tokenizer, the path of one"):
            llama2c.read(path, tokenizer=nothing)
    with pytest.raises(FileNotFoundError, match=r"no tokenizer .*none.bin"):
        llama2c.read(path, tokenizer=tmp_path / "none.bin")


def test_no_earlier_tokenizer_stays_with_a_model_that_has_none(tmp_path, own):
    path = llama2c.write(model(tokenizer=own), tmp_path / "m.bin")
    (tmp_path / "m.tokenizer.bin.gz").write_bytes(gzip.compress(tokenizer_path(path).read_bytes()))
    llama2c.write(model(1), path)
    assert [file.name for file in tmp_path.iterdir()] == ["m.bin"]
    assert llama2c.read(path).tokenizer is None


@pytest.mark.parametrize("name", ["m.bin", "m.tokenizer.bin"])
def test_nothing_is_written_where_a_folder_has_the_name(tmp_path, own, name):
    (tmp_path / name).mkdir()
    with pytest.raises(FormatError, match=f"{name} is a folder"):
        llama2c.write(model(tokenizer=own), tmp_path / "m.bin")
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_a_disk_that_refuses_the_model_leaves_the_earlier_pair(tmp_path, own, monkeypatch):
    path = llama2c.write(model(tokenizer=own), tmp_path / "m.bin")
    earlier = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def parts(*_):
        yield b"some"
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(llama2c, "_parts", parts)
        for tokenizer in (Tokenizer.train(STORIES[:1] * 20, vocab=300), None):
            with pytest.raises(OSError, match=r"No space.*m.bin"):
                llama2c.write(model(1, tokenizer), path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == earlier


@pytest.mark.parametrize("renames", [0, 1])
def test_a_crash_between_two_files_never_leaves_a_wrong_pair(tmp_path, own, monkeypatch, renames):
    """The other tokenizer has as many pieces, so that nothing would tell."""
    path = llama2c.write(model(0, own), tmp_path / "m.bin")
    earlier, other = path.read_bytes(), Tokenizer.train(STORIES[:1] * 20, vocab=300)
    replace, left = os.replace, [None] * renames

    def crash(*names):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        replace(*names)

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        llama2c.write(model(1, other), path)
    assert (path.read_bytes() == earlier) == (renames == 0)
    assert [file.name for file in tmp_path.iterdir()] == ["m.bin"]


# ---- refusals


def test_what_llama2c_cannot_say_is_refused_all_at_once(tmp_path, own):
    strange = dict(norm="layernorm", theta=5e5, window=8, softcap=3.0, bias=True, mlp="gelu", norm_eps=1e-6)
    with pytest.raises(FormatError) as caught:
        llama2c.write(model(**strange), tmp_path / "m.bin")
    assert all(f"{name} = " in str(caught.value) for name in strange)
    for changes in (
        dict(positions="none"), dict(rotary=4), dict(attention_scale=1.0), dict(block="post"), dict(embed_norm=True),
        dict(kind="encoder", head="mlm"), dict(head_width=16), dict(qkv_bias=True), dict(block="parallel"),
    ):  # fmt: skip
        with pytest.raises(FormatError, match=f"{next(iter(changes))} = "):
            llama2c.write(model(**changes), tmp_path / "m.bin")
    with pytest.raises(FormatError, match=r"qk_norm = True.*--qk-norm false"):
        llama2c.write(model(qk_norm=True), tmp_path / "m.bin")
    for kind, size in (("unigram", 300), ("wordpiece", 520)):
        with pytest.raises(FormatError, match=f"this tokenizer is {kind}"):
            tokenizer_file(Tokenizer.train(STORIES, vocab=size, kind=kind), size)
    level = pieces.merged({n: i for i, n in enumerate(own.names)}, [], own.names[:5], "llama3")
    with pytest.raises(FormatError, match="this tokenizer has another"):
        tokenizer_file(Tokenizer(level), 300)
    assert not list(tmp_path.iterdir()), "nothing is written"


def test_files_that_are_none_are_refused_by_name(tmp_path):
    for raw, reason in (
        (b"", "too few"),
        (bytes(28), "width = 0"),
        (struct.pack("<7i", 32, 0, 2, 4, 4, 300, 64), "hidden = 0"),
        (struct.pack("<7i", 32, 48, 2, 5, 5, 300, 64), "5 and 5 heads"),
        (struct.pack("<7i", 32, 48, 2**31 - 1, 4, 4, 300, 64), "2,147,483,647 layers"),
        (struct.pack("<7i", 2**30, 2**30, 500, 2, 2, 2**30, 64), "asks for"),
        (struct.pack("<Ii", llama2c.MAGIC, 7) + bytes(248), "version 7"),
        (struct.pack("<Ii7iBi", llama2c.MAGIC, 2, 32, 48, 2, 4, 4, 300, 64, 1, 7).ljust(256, b"\0"), "groups of 7"),
        (struct.pack("<Ii7iBi", llama2c.MAGIC, 1, 32, 48, 2, 4, 4, 300, 64, 1, 7).ljust(256, b"\0"), "flags"),
    ):
        file = tmp_path / "m.bin"
        file.write_bytes(raw)
        with pytest.raises(FormatError, match=reason) as caught:
            llama2c.read(file)
        assert str(caught.value).startswith(str(file))
    with pytest.raises(FileNotFoundError, match=r"no file .*nothing.bin"):
        llama2c.read(tmp_path / "nothing.bin")
    with pytest.raises(FormatError, match="is a folder"):
        llama2c.read(tmp_path)
    (tmp_path / "bomb.bin.gz").write_bytes(gzip.compress(struct.pack("<7i", 2**12, 2**12, 2, 4, 4, 300, 64)))
    with pytest.raises(FormatError, match="asks for"):
        llama2c.read(tmp_path / "bomb.bin.gz")


# ---- damage


def sources(tmp_path, own):
    """Name -> (file's bytes, reader)."""
    made, found = model(tokenizer=own, layers=1), {}
    for version in (2, 1, 0):
        path = llama2c.write(made, tmp_path / "m.bin", version=2 if version == 2 else 0)
        raw = version_1(path) if version == 1 else path.read_bytes()
        found[f"v{version}.bin"] = (raw, lambda path: llama2c.read(path, tokenizer=own))
    found["v0.bin.gz"] = (gzip.compress(found["v0.bin"][0], mtime=0), lambda path: llama2c.read(path, tokenizer=own))
    vocabulary = tokenizer_path(tmp_path / "m.bin").read_bytes()
    spaced = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *(b"<0x%02X>" % b for b in range(256)), b"a", b"b", b"ab", b" "]
    raw = struct.pack("<i", 6) + b"".join(struct.pack("<fi", -i, len(t)) + t for i, t in enumerate(spaced))
    found["level.bin"] = (vocabulary, lambda path: read_tokenizer(path, 300))
    found["spaced.bin"] = (raw, lambda path: read_tokenizer(path, len(spaced)))
    found["spaced.bin.gz"] = (gzip.compress(raw, mtime=0), lambda path: read_tokenizer(path, len(spaced)))
    return found


def survive(tmp_path, own, monkeypatch, count):
    """Every damaged file is refused by name, or is another sound file: the formats have no checksum.

    What a model is built of does not depend on the bytes, and takes most of the time: the building is left out.
    """
    files = sources(tmp_path, own)
    monkeypatch.setattr(tables, "shapes", functools.cache(tables.shapes))
    monkeypatch.setattr(tables, "build", lambda config, params, tokenizer: params)
    for source, (raw, read) in files.items():
        file, refused, most = tmp_path / source, 0, 0
        file.write_bytes(raw)
        read(file)
        for i, (name, bad) in enumerate(damaged(raw, count)):
            file.write_bytes(bad)
            started = time.monotonic()
            if i % 37 == 0:  # kinds in turn: counting memory is slow
                found, used = peak(lambda read=read, file=file: read(file))
                assert used < 2 * len(bad) + 20e6, f"{source} {name}: {used:,} bytes"
            else:
                try:
                    found = read(file)
                except Exception as error:
                    found = error
            most = max(most, time.monotonic() - started)
            if isinstance(found, Exception):
                assert isinstance(found, FormatError), f"{source} {name}: {found!r}"
                assert str(file) in str(found)
                refused += 1
        print(f"{source}: {count:,} damaged, {refused:,} refused, the slowest took {most:.2f} s")
        assert refused > count / 3


def test_damaged_files(tmp_path, own, monkeypatch):
    survive(tmp_path, own, monkeypatch, 60)


@pytest.mark.slow
def test_10000_damaged_files(tmp_path, own, monkeypatch):
    survive(tmp_path, own, monkeypatch, 10_000)


# ---- the real thing


def published(shared_data, size, tmp_path):
    """Model and tokenizer files, unpacked."""
    folder, files = shared_data / "ckpt" / f"stories{size}", []
    for file in sorted(folder.iterdir(), key=lambda file: file.name.startswith("tok")):
        plain = tmp_path / file.name.removesuffix(".gz")
        plain.write_bytes(oracle.read_bytes(file))
        files.append(plain)
    return files


@pytest.mark.parametrize("size", ["260K", "15M"])
def test_published_models_agree_with_numpy(shared_data, size):
    file = next((shared_data / "ckpt" / f"stories{size}").glob(f"stories{size}.bin*"))
    made, slow = llama2c.read(file), oracle.read_model(file)
    raw = gzip.decompress((shared_data / "tinystories" / "train_v1.txt.gz").read_bytes()).decode()
    texts = [t.strip() for t in raw.split("<|endoftext|>") if t.strip()]
    text = min(texts, key=lambda t: abs(len(t) - 700))
    ids = [1, *made.tokenizer.encode(text)]
    assert 100 < len(ids) < made.config.context
    expected = oracle.forward(slow, ids)
    with jax.default_matmul_precision("float32"):
        assert np.abs(expected - logits(made, ids)).max() < 1e-4
    shifted = expected - expected.max(-1, keepdims=True)
    logp = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    nats = -logp[np.arange(len(ids)), [*ids[1:], 1]].mean()
    assert evaluate(made, [text]).nats_per_token == pytest.approx(nats, abs=1e-5)
    some = [t for t in texts[: 20 if size == "15M" else 60] if len(made.tokenizer.encode(t)) < made.config.context]
    found = evaluate(made, some).nats_per_token
    assert {"260K": 1.15, "15M": 0.85}[size] < found < {"260K": 1.45, "15M": 1.2}[size]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """Call as program("run", model file, tokenizer file, prompt): what llama2.c prints, greedily."""
    source, compiler = os.environ.get("LLAMA2C"), shutil.which("cc")
    if not source or not compiler:
        pytest.skip("LLAMA2C names no folder with run.c and runq.c, or there is no C compiler")
    folder = tmp_path_factory.mktemp("llama2c")
    for name in ("run", "runq"):
        build = [compiler, "-O3", "-o", str(folder / name), str(Path(source) / f"{name}.c"), "-lm"]
        subprocess.run(build, check=True, capture_output=True)

    def call(name, file, tokenizer, prompt, steps=256):
        command = [folder / name, file, "-z", tokenizer, "-t", "0", "-n", str(steps), "-i", prompt]
        return subprocess.run(command, check=True, capture_output=True).stdout

    return call


def greedy(made, prompt, steps=256, step=None):
    """What llama2.c should print: the prompt gets a space in front, the first piece loses one, odd bytes go unseen."""
    tk, begin = made.tokenizer, made.tokenizer.begin
    text = prompt if tk.prefix or not prompt else f" {prompt}"
    ids = [begin, *tk.encode(text).tolist()]
    steps = min(steps, made.config.context)
    if step:
        while len(ids) <= steps:
            ids.append(step(ids))
    else:
        for new in generate_tokens(made, [list(ids)], tokens=steps + 1 - len(ids), sampling=Sampling(temperature=0.0)):
            ids += new[0].tolist()
    ids = ids[1 : steps + 1]
    ids = ids[: ids.index(begin)] if begin in ids else ids
    shown = [tk.token_bytes[i] or tk.names[i].encode() for i in ids]
    shown[:1] = [piece.removeprefix(b" ") for piece in shown[:1]]
    odd = lambda piece: len(piece) == 1 and not (32 <= piece[0] < 127 or piece in b"\t\n\v\f\r")  # noqa: E731
    return b"".join(piece for piece in shown if not odd(piece)) + b"\n", len(ids)


PROMPTS = ("", "Once upon a time", "Lily’s cat")


@pytest.mark.parametrize("size", ["260K", "15M"])
def test_the_program_tells_the_same_story(shared_data, tmp_path, program, size):
    """Its file and ours, read by it, against our reading; the prompts need all 256 steps or end by themselves."""
    file, vocabulary = published(shared_data, size, tmp_path)
    made = llama2c.read(file)
    ours = llama2c.write(made, tmp_path / "ours.bin")
    for prompt in PROMPTS:
        expected, count = greedy(made, prompt)
        assert program("run", file, vocabulary, prompt) == expected
        assert program("run", ours, tokenizer_path(ours), prompt) == expected
        assert count > 100


def test_the_program_runs_our_own_models(tmp_path, program, own):
    for seed, head in enumerate(("tied", "untied", "tied")):
        made = model(seed, own, head=head, context=256)
        path = llama2c.write(made, tmp_path / "own.bin")
        for prompt in PROMPTS:
            assert program("run", path, tokenizer_path(path), prompt) == greedy(made, prompt)[0]


def forward_int8(m, group, tokens):
    """runq's arithmetic: what a matrix multiplies is rounded to int8 in groups, too. The last position's logits."""

    def rounded(x):
        x = np.float32(x).reshape(-1, group)
        scale = np.abs(x).max(-1, keepdims=True) / np.float32(127)
        q = x / np.where(scale == 0, 1, scale)
        return np.sign(q) * np.floor(np.abs(q) + np.float32(0.5)) * scale

    w, head = m.w, m.head
    mul = lambda x, y: (rounded(x).reshape(x.shape).astype(np.float64)) @ y.T  # noqa: E731
    rms = lambda x, s: x / np.sqrt(np.mean(x * x, -1, keepdims=True) + 1e-5) * s  # noqa: E731
    t = len(tokens)
    turn = np.exp(1j * np.outer(np.arange(t), 10_000.0 ** (-np.arange(head // 2) / (head // 2))))[:, None]

    def rotary(x):
        z = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
        return np.stack([z.real, z.imag], -1).reshape(x.shape)

    x = w["embedding"][tokens].astype(np.float64)
    for i in range(m.layers):
        y = rms(x, w["rms_att"][i])
        q, k, v = (mul(y, w[n][i]).reshape(t, -1, head) for n in ("wq", "wk", "wv"))
        k, v = (z.repeat(m.heads // m.kv_heads, 1) for z in (rotary(k), v))
        scores = np.einsum("the,she->hts", rotary(q), k) / np.sqrt(head) + np.triu(np.full((t, t), -np.inf), 1)
        pattern = np.exp(scores - scores.max(-1, keepdims=True))
        pattern /= pattern.sum(-1, keepdims=True)
        x = x + mul(np.einsum("hts,she->the", pattern, v).reshape(t, m.dim), w["wo"][i])
        y = rms(x, w["rms_ffn"][i])
        gate = mul(y, w["w1"][i])
        x = x + mul(gate / (1 + np.exp(-gate)) * mul(y, w["w3"][i]), w["w2"][i])
    return mul(rms(x, w["rms_final"])[-1], w.get("classifier", w["embedding"]))


def test_the_int8_program_reads_our_numbers(shared_data, tmp_path, program):
    """Against its arithmetic in NumPy, on the file as another reader sees it.

    A hundred tokens: an activation that lies between two whole numbers may be rounded either way, which tells in time.
    """
    made = llama2c.read(published(shared_data, "260K", tmp_path)[0])
    path = llama2c.write(made, tmp_path / "int8.bin", version=2)
    found, group = read_int8(path)
    step = lambda ids: int(forward_int8(found, group, ids).argmax())  # noqa: E731
    expected, count = greedy(llama2c.read(path), "Once upon a time", 100, step)
    assert program("runq", path, tokenizer_path(path), "Once upon a time", 100) == expected
    assert count == 100
