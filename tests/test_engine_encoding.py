"""Texts to ids in native code, against the `tokenizers` library: the same ids for every text, or none."""

import gzip
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tinylm
from tinylm import native
from tinylm.config import ModelConfig
from tinylm.engine import Engine, encoding, file, layout
from tinylm.engine.export import export
from tinylm.formats import FormatError
from tinylm.tokenizer import Tokenizer

pytestmark = pytest.mark.skipif(not native.available(), reason="the native library is not built")

DATA = Path(os.environ.get("TINYLM_DATA", Path(__file__).parents[2] / "shared" / "data"))
STORY = """Once upon a time, there was a tiny robot named Bip. Bip didn't like the rain; it'd rust!
"I'm sad," said Bip.

"We'll play inside," Mom said, "and you've 12 toys."   They've played   all day.\tThe end.\r\n"""
TRICKY = [
    "", " ", "  ", "a  b", " \n a", "\n\n", "'s 's''s it's IT'S we'll'll", "12ab34 5", "<|endoftext|>",
    "x <s> y</s><unk>",
    "<0x41> <0x0A>", "!?...--- \x00\x01\x1c\x1d\x1e\x1f\x7f", "a\x0bb\x0cc\rd", "\u2581a \u2581 b", " \u2581", "  lead",
    "caf\u00e9 \u00e9t\u00e9", "\u4f60\u597d", "\U0001f999 x", "a\u00a0b\u3000c", "\u2019s", "trailing ", "tab\tx",
    "'", "''s", "'sa", "' s", "a'", " 's", "  's", "9's",
]  # fmt: skip
LETTERS = (
    "ab e'slltdrvm.,!? \n\t\r\x0b\x1f019<|>x\u2581\u00e9\u4f60\U0001f999\u00a0\u2028\u2019\u201d\u00b2\u0085\u200d"
)


def spaced(normalizer, pre_tokenizer) -> Tokenizer:
    """A small SentencePiece-like tokenizer with merges of its own, some of which give the same piece."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"\u2581abelst'\u4f60"]
    listed = ["\u2581 a", "a b", "l l", "\u2581 \u2581", "\u2581a b", "\u2581 ab", "e s", "b e", "s t", "es t", "e st"]
    listed += ["\u2581\u2581 \u2581\u2581", "' s", "\u2581 \u2581\u2581", "\u4f60 \u4f60"]
    names += dict.fromkeys(merge.replace(" ", "") for merge in listed)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    document = {
        "version": "1.0", "normalizer": normalizer, "pre_tokenizer": pre_tokenizer,
        "added_tokens": [{"id": i, "content": names[i], **flags} for i in range(3)],
        "model": {
            "type": "BPE", "vocab": {name: i for i, name in enumerate(names)}, "merges": listed, "unk_token": "<unk>",
            "fuse_unk": True, "byte_fallback": True,
        },
    }  # fmt: skip
    return Tokenizer.from_json(json.dumps(document))


PREPEND = {"type": "Prepend", "prepend": "\u2581"}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}


def metaspace(scheme: str, split: bool) -> Tokenizer:
    return spaced(None, {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme, "split": split})


MAKERS = {
    "trained": lambda: Tokenizer.train([STORY] * 30, vocab=400),
    "bytes": lambda: Tokenizer.train([], kind="byte"),
    "prepend": lambda: spaced({"type": "Sequence", "normalizers": [PREPEND, REPLACE]}, None),
    "replace": lambda: spaced(REPLACE, None),
    "metaspace": lambda: metaspace("always", True),
    "metaspace first": lambda: metaspace("first", False),
    "metaspace never": lambda: metaspace("never", True),
    "stories260K": lambda: real("stories260K"),
    "stories15M": lambda: real("stories15M"),
}


def real(name: str) -> Tokenizer:
    if not (DATA / "ckpt" / name).exists():
        pytest.skip(f"no data at {DATA}: set TINYLM_DATA")
    return tinylm.load(next((DATA / "ckpt" / name).glob("stories*"))).tokenizer


def exported(tokenizer: Tokenizer, path: Path) -> Engine:
    config = ModelConfig(vocab=tokenizer.vocab, width=16, layers=1, heads=1, context=8)
    return Engine(export(tinylm.Transformer(config, tokenizer=tokenizer), path).path)


@pytest.fixture(scope="module", params=MAKERS)
def pair(request, tmp_path_factory):
    tokenizer = MAKERS[request.param]()
    return tokenizer, exported(tokenizer, tmp_path_factory.mktemp("encoding") / "m.tlm")


def same(pair, text: str) -> None:
    tokenizer, engine = pair
    expected = tokenizer.encode(text).tolist()
    found = engine._core.encode(text.encode())
    if found is None:  # only what the pattern needs classes of characters for
        assert any(ord(letter) >= 0x250 for letter in text)
        assert tokenizer.kind == "bpe"
        assert "metaspace" not in str(tokenizer.to_json()).lower()
    else:
        assert found == expected
    assert engine.encode(text) == expected


def test_tricky_texts(pair):
    for text in TRICKY:
        same(pair, text)
    for code in range(128):
        for text in (f"a{chr(code)}b", f" {chr(code)} ", chr(code) * 3):
            same(pair, text)


def test_every_character_that_native_code_knows(pair):
    """Alone, between letters, behind a space, doubled, and before a digit."""
    codes = [*range(128, 0x250), *range(0x2000, 0x2070), 0xFE0F, 0x1F2FF, *range(0x1F300, 0x1FB00, 3), 0x1FB00]
    for text in ("{0}", "a{0}b {0}", " {0}{0} 1{0}2", "{0} {0}\n{0}a  {0}'s"):
        texts = [text.format(chr(code)) for code in codes]
        for one, ids in zip(texts, pair[0].encode_batch(texts), strict=True):
            found = pair[1]._core.encode(one.encode())
            assert found is None or found == ids.tolist()
    assert pair[1]._core.encode("\u201cCaf\u00e9\u201d \u2013 it\u2019s \U0001f999\u2026".encode()) is not None


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from(LETTERS), max_size=60))
def test_any_text_of_few_letters(pair, text):
    same(pair, text)


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(codec="utf-8"), max_size=40))
def test_any_text(pair, text):
    same(pair, text)


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(codec="ascii"), max_size=200))
def test_any_ascii_text(pair, text):
    same(pair, text)


def test_stories(pair):
    same(pair, STORY * 20)
    corpus = DATA / "tinystories" / "valid_v1_a.txt.gz"
    if corpus.exists():
        with gzip.open(corpus, "rt", encoding="utf-8") as lines:
            for text in lines.read(300_000).split("<|endoftext|>"):
                same(pair, text)


def test_what_is_no_text(pair):
    tokenizer, engine = pair
    with pytest.raises(ValueError, match=r"lone surrogate U\+D800"):
        engine.encode("a\ud800b")
    if json.loads(tokenizer.to_json())["model"].get("byte_fallback"):
        for bad in (b"\xff", b"a\xc3", b"\xed\xa0\x80", b"\xc0\x80", b"\xf4\x90\x80\x80", b"\x80"):
            with pytest.raises(ValueError, match="not UTF-8"):
                engine._core.encode(bad)


def test_a_long_text_is_cut_as_the_tokenizer_cuts_it(pair):
    tokenizer, engine = pair
    text = "x" * 300_000 + STORY
    assert engine.encode(text) == tokenizer.encode(text).tolist()


OTHERS = {
    "wordpiece": lambda: Tokenizer.train([STORY] * 30, vocab=600, kind="wordpiece"),
    "unigram": lambda: Tokenizer.train([STORY] * 30, vocab=400, kind="unigram"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_tokenizers_go_to_the_library(name, tmp_path):
    tokenizer = OTHERS[name]()
    assert encoding.merges(tokenizer) is None
    engine = exported(tokenizer, tmp_path / "m.tlm")
    assert "merges" not in file.read(engine.path).tensors
    assert engine.encode(STORY) == tokenizer.encode(STORY).tolist()


def test_a_file_without_merges_still_encodes(tmp_path):
    tokenizer = MAKERS["trained"]()
    path = exported(tokenizer, tmp_path / "m.tlm").path
    found = file.read(path)
    older = file.write(tmp_path / "old.tlm", found.constants, {n: t for n, t in found.tensors.items() if n != "merges"})
    assert Engine(older).encode(STORY) == tokenizer.encode(STORY).tolist()


def test_encoding_imports_little(tmp_path):
    """Only a text beyond the file's rules brings NumPy and the library along."""
    path = exported(MAKERS["trained"](), tmp_path / "m.tlm").path
    code = f"""
import sys
from tinylm.engine import Engine
engine = Engine({path!r})
print(len(engine.generate("Once upon a time", tokens=3)) > 0)
print(sorted({{"numpy", "jax", "tokenizers", "json", "re"}} & set(sys.modules)))
engine.encode("\\u4f60")
print("tokenizers" in sys.modules)
"""
    root = Path(tinylm.__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=root)
    assert run.stdout.split("\n")[:3] == ["True", "[]", "True"], run.stderr


# ---- damaged files


def words(tokenizer: Tokenizer) -> np.ndarray:
    return np.frombuffer(encoding.merges(tokenizer), "<u4").copy()


def put(at: int, value: int):
    def change(tensor: np.ndarray) -> np.ndarray:
        tensor[at] = value
        return tensor

    return change


DAMAGE = {
    "cut": lambda w: w[:-1],
    "short": lambda w: w[:100],
    "empty": lambda w: w[:0],
    "rules": put(0, 32),
    "both rules": put(0, 3),
    "characters": put(1, 2**32 - 1),
    "merges": put(2, 2**32 - 1),
    "spare": put(3, 1),
    "byte": put(4 + 65, 10**6),
    "code": put(4 + 256, 0x110000),
    "order": put(4 + 256 + 2, 0),
    "character": put(4 + 256 + 1, 10**6),
    "merge": put(-1, 10**6),
    "no space": put(4 + 256 + 2 * 7, 0x2580),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_rules_are_refused_by_both_readers(name, tmp_path):
    tokenizer = MAKERS["prepend"]()
    path = exported(tokenizer, tmp_path / "m.tlm").path
    found = file.read(path)
    assert words(tokenizer)[4 + 256 + 2 * 7] == 0x2581
    damaged = DAMAGE[name](words(tokenizer)).tobytes()
    tensors = dict(found.tensors) | {"merges": layout.raw(damaged)}
    with pytest.raises(FormatError, match="merges"):
        file.write(tmp_path / "bad.tlm", found.constants, tensors)
    raw = Path(path).read_bytes()  # the native reader sees a file that was never checked
    entry = next(at for at in range(320, len(raw), 112) if raw[at:].startswith(b"merges\0"))
    offset, size = struct.unpack_from("<2Q", raw, entry + 96)
    changed = bytearray(raw)
    if len(damaged) == size:
        changed[offset : offset + size] = damaged
    else:  # what is left out must be zeros
        changed[offset : offset + size] = damaged.ljust(size, b"\0")
        struct.pack_into("<i", changed, entry + 80, len(damaged))
        struct.pack_into("<Q", changed, entry + 104, len(damaged))
    changed[24:28] = native.library().tlm_crc32c(bytes(changed[32:]), len(changed) - 32).to_bytes(4, "little")
    (tmp_path / "hostile.tlm").write_bytes(changed)
    with pytest.raises(ValueError, match="merges holds no rules"):
        Engine(tmp_path / "hostile.tlm")
