"""Vocabularies of other programs: the same ids as the sentencepiece library and llama.cpp's golden files give."""

import functools
import gzip
import io
import json
import random
import struct
import time

import pytest
from damage import damaged, peak

from tinylm.formats import pieces
from tinylm.formats.tables import FormatError
from tinylm.tokenizer import Tokenizer

NASTY = ["  ", "   ", "▁▁", "<s>", "</s>", "<unk>", "<0x41>", "Once upon", "ing ", " the", "naïve", "日本語", "🦙"]


def strings(count, seed=0):
    """Random texts, rich in what SentencePiece treats apart."""
    rng = random.Random(seed)
    letters = [*map(chr, range(32, 127)), *" \n\t\r éüπжд\u200d\ufeff\u2003▁\x00", *NASTY]
    whole = lambda: chr(rng.choice([rng.randrange(32, 0xD800), rng.randrange(0xE000, 0x110000)]))  # noqa: E731
    for i in range(count):
        size = rng.randrange(60)
        yield "".join(rng.choice(letters) if i % 3 else whole() if i % 2 else rng.choice(" a\n=") * rng.randrange(9)
                      for _ in range(size))  # fmt: skip


def golden(folder, name):
    cases = (folder / f"{name}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = (folder / f"{name}.out").read_text(encoding="utf-8").split("\n")
    found = [(x, [int(i) for i in line.split()]) for x, line in zip(cases, lines, strict=False)]
    assert len(found) > 40
    return found


def test_llama_2_is_sentencepiece_s(shared_data):
    spm = pytest.importorskip("sentencepiece", reason="the library to compare with")
    file = shared_data / "tokenizers" / "llama2_tokenizer.model"
    tk, theirs = Tokenizer(pieces.sentencepiece(file)), spm.SentencePieceProcessor(model_file=str(file))
    assert (tk.vocab, tk.begin, tk.end, tk.prefix) == (32000, 1, 2, b" ")
    for text in strings(10_000):
        assert tk.encode(text).tolist() == theirs.encode(text), repr(text)
    raw = gzip.decompress((shared_data / "tinystories" / "valid_v1_a.txt.gz").read_bytes()).decode()
    assert tk.encode(raw[:100_000]).tolist() == theirs.encode(raw[:100_000])
    text = "naïve 語🦙  \x00 <0x41>"
    assert tk.decode_bytes(tk.encode(text)) == b" " + text.encode()


def test_golden_llama(shared_data):
    """llama.cpp's tokenisations with the same vocabulary."""
    tk = Tokenizer(pieces.sentencepiece(shared_data / "tokenizers" / "llama2_tokenizer.model"))
    for text, ids in golden(shared_data / "tokenizers", "ggml-vocab-llama-spm.gguf"):
        assert tk.encode(text).tolist() == ids, repr(text)


@functools.cache
def trained(kind, fallback, prefix=True):
    """The file of a SentencePiece model learned here."""
    spm = pytest.importorskip("sentencepiece", reason="the library to compare with")
    rng, file = random.Random(1), io.BytesIO()
    words = ["once", "upon", "a", "time", "there", "was", "little", "girl", "she", "loved", "to", "play", "in", "park"]
    lines = [" ".join(rng.choices(words, k=12)) for _ in range(500)]
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=file, vocab_size=400 if fallback else 140, model_type=kind,
        byte_fallback=fallback, normalization_rule_name="identity", remove_extra_whitespaces=False,
        add_dummy_prefix=prefix, minloglevel=9, hard_vocab_limit=False, required_chars="</>0x41suk",
    )  # fmt: skip
    return file.getvalue()


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize(("fallback", "prefix"), [(True, True), (False, True), (True, False)])
def test_learned_models_are_sentencepiece_s(tmp_path, kind, fallback, prefix):
    spm = pytest.importorskip("sentencepiece", reason="the library to compare with")
    raw = trained(kind, fallback, prefix)
    (tmp_path / "tokenizer.model").write_bytes(raw)
    tk, theirs = pieces.tokenizer_of(tmp_path), spm.SentencePieceProcessor(model_proto=raw)
    assert (tk.kind, tk.begin, tk.end, tk.prefix) == (kind, 1, 2, b" " if prefix else b"")
    for text in [*strings(2000), "once upon a little park", "she loved <0x41> and <0x4>"]:
        assert tk.encode(text).tolist() == theirs.encode(text), repr(text)


def test_a_worked_example():
    """ "ab" is worth less than "bc", so a b c merges from the right; a control piece never comes from text."""
    names = ["<unk>", "<s>", "</s>", *map(str, range(256)), "a", "b", "c", " ", "ab", "bc", "abc", "x", "xx"]
    scores = [0.0] * 263 + [-2.0, -1.0, -3.0, 0.0, 0.0]
    doc = pieces.scored(names, scores, unknown=0, begin=1, end=2, bytes_at=range(3, 259), add_prefix_space=False)
    assert doc["model"]["merges"] == [["x", "x"], ["b", "c"], ["a", "b"], ["a", "bc"], ["ab", "c"]]
    tk = Tokenizer(doc)
    assert [tk.names[i] for i in tk.encode("abab bc")] == ["ab", "ab", "▁", "bc"]
    assert [tk.names[i] for i in tk.encode("abc")] == ["abc"]
    assert [tk.names[i] for i in tk.encode("xxx é")] == ["xx", "x", "▁", "<0xC3>", "<0xA9>"]


def test_gpt2_and_bert_folders(shared_data, tmp_path):
    folder = shared_data / "tokenizers"
    assert pieces.tokenizer_of(tmp_path) is None
    (tmp_path / "vocab.txt").write_bytes((folder / "bert-base-uncased_vocab.txt").read_bytes())
    bert = pieces.tokenizer_of(tmp_path)
    for text, ids in golden(folder, "ggml-vocab-bert-bge.gguf"):
        assert bert.encode(text).tolist() == ids
    assert (bert.begin, bert.end, bert.cls, bert.sep) == (None, None, 101, 102)
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert pieces.tokenizer_of(tmp_path) != bert
    (tmp_path / "vocab.json").write_bytes((folder / "gpt2_vocab.json").read_bytes())
    (tmp_path / "merges.txt").write_bytes((folder / "gpt2_merges.txt").read_bytes())
    gpt2 = pieces.tokenizer_of(tmp_path)
    for text, ids in golden(folder, "ggml-vocab-gpt-2.gguf"):
        assert gpt2.encode(text).tolist() == ids
    assert gpt2.lossless
    assert (gpt2.begin, gpt2.end) == (50256, 50256)
    own = Tokenizer.train([], kind="byte")
    own.save(tmp_path)
    assert pieces.tokenizer_of(tmp_path) == own


def test_patterns_of_published_tokenizers():
    """The words each pattern cuts, from their published rules, and added tokens in the middle of the ids."""
    own = Tokenizer.train([], kind="byte")
    vocab = {name: i for i, name in enumerate(own.names)}
    vocab |= {"12": len(vocab), "123": len(vocab) + 1, "Ġ1": len(vocab) + 2}
    merges = [["Ġ", "1"], ["1", "2"], ["12", "3"]]
    words = {"gpt2": ["Ġ1", "2", "3"], "llama3": ["Ġ", "123"], "qwen2": ["Ġ", "1", "2", "3"]}
    words["smollm"] = words["qwen2"]
    assert words.keys() == pieces.PATTERNS.keys()
    for pattern, expected in words.items():
        tk = Tokenizer(pieces.merged(vocab, merges, own.names[:5], pattern))
        ids = tk.encode(" 123")
        assert [tk.names[i] for i in ids] == expected
        assert tk.lossless
    doc = pieces.merged(vocab, merges, own.names[:5], plain={"<tool>": len(vocab)}, nfc=True)
    tk = Tokenizer(doc)
    assert tk.encode("a<tool>").tolist()[-1] == len(vocab)
    own = Tokenizer.train(["It's 12345"] * 9, vocab=300)
    moved = json.loads(own.to_json())
    names = {n: i for n, i in moved["model"]["vocab"].items() if n not in own.names[:5]}
    moved["model"]["vocab"] = names  # ids 5 and up: the specials are only among the added tokens
    assert Tokenizer(moved).encode("It's 12345").tolist() == own.encode("It's 12345").tolist()


def test_refusals(tmp_path):
    names, some = ["<unk>", "a", "b", "a"], dict(unknown=0, begin=None, end=None, bytes_at=None)
    for make in (pieces.scored, pieces.unigram_scored):
        with pytest.raises(FormatError, match="'a' occurs twice, as ids 1 and 3"):
            make(names, [0.0] * 4, **some)
        with pytest.raises(FormatError, match="3 pieces with 2 scores"):
            make(names[:3], [0.0] * 2, **some)
        with pytest.raises(FormatError, match="has the score nan"):
            make(names[:3], [0.0, 0.0, float("nan")], **some)
        with pytest.raises(FormatError, match="id 9 is outside"):
            make(names[:3], [0.0] * 3, **some, control=[9])
        with pytest.raises(FormatError, match="256 different ones"):
            make(names[:3], [0.0] * 3, unknown=0, begin=None, end=None, bytes_at=[1] * 256)
    with pytest.raises(FormatError, match="known are gpt2"):
        pieces.merged({"a": 0}, [], [], "evil")
    with pytest.raises(FormatError, match=r"\['x'\] are not in the vocabulary"):
        pieces.merged({"a": 0}, [], ["x"])
    with pytest.raises(FormatError, match=r"no \[UNK\]"):
        pieces.wordpieces(["a"], True)
    for file, raw, reason in (
        ("tokenizer.json", b"{", "not a json file"),
        ("tokenizer.model", b"", "holds no pieces"),
        ("tokenizer.model", b"\x0a\xff\xff\xff\xff\x7f", "ends behind"),
        ("tokenizer.model", b"\x0a\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01", "does not end"),
        ("vocab.txt", b"[UNK]\n\xff", "not UTF-8 at byte 6"),
        ("vocab.txt", b"[UNK]\na\na\n", "'a' occurs twice"),
    ):
        folder = tmp_path / f"{file}{len(raw)}"
        folder.mkdir()
        (folder / file).write_bytes(raw)
        with pytest.raises(FormatError, match=reason) as caught:
            pieces.tokenizer_of(folder)
        assert str(folder / file) in str(caught.value)


def test_normalisation_is_refused(tmp_path):
    spm = pytest.importorskip("sentencepiece", reason="the library to compare with")
    made = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d e f g"] * 50), model_writer=made, vocab_size=20, minloglevel=9,
        hard_vocab_limit=False,
    )  # fmt: skip
    (tmp_path / "x.model").write_bytes(made.getvalue())
    with pytest.raises(FormatError, match=r"normalises text by 'nmt_nfkc'.*; it removes spaces"):
        pieces.sentencepiece(tmp_path / "x.model")


def model_file():
    """A small tokenizer.model, written by hand."""

    def field(number, payload):
        return bytes([number << 3 | 2, *varint(len(payload))]) + payload

    def varint(n):
        return bytes([n]) if n < 128 else bytes([n & 127 | 128, n >> 7])

    def piece(text, score, kind):
        return field(1, field(1, text.encode()) + b"\x15" + struct.pack("<f", score) + bytes([3 << 3, kind]))

    names = [("<unk>", 2), ("<s>", 3), ("</s>", 3), *((f"<0x{b:02X}>", 6) for b in range(256))]
    names += [(x, 1) for x in ("▁", "a", "b", "ab", "▁ab", "é")]
    return (
        b"".join(piece(x, -i, kind) for i, (x, kind) in enumerate(names))
        + field(2, b"\x18\x02")
        + field(3, b"\x20\x00")
    )


def survive(tmp_path, count):
    """Every damaged tokenizer.model is refused by name, or is another sound one (a letter of a piece, a score)."""
    file, refused, most, raw = tmp_path / "tokenizer.model", 0, 0, model_file()
    file.write_bytes(raw)
    assert [pieces.tokenizer_of(tmp_path).names[i] for i in pieces.tokenizer_of(tmp_path).encode("abé")] == ["▁ab", "é"]
    for i, (name, bad) in enumerate(damaged(raw, count)):
        file.write_bytes(bad)
        started = time.monotonic()
        if i % 37 == 0:  # kinds in turn: counting memory is slow
            found, used = peak(lambda: pieces.tokenizer_of(tmp_path))
            assert used < 2 * len(bad) + 20e6, f"{name}: {used:,} bytes"
        else:
            try:
                found = pieces.tokenizer_of(tmp_path)
            except Exception as error:
                found = error
        most = max(most, time.monotonic() - started)
        if isinstance(found, Exception):
            assert isinstance(found, FormatError), f"{name}: {found!r}"
            assert str(file) in str(found)
            refused += 1
        elif i % 10 == 0:
            assert found.encode("ab é").max() < found.vocab
    print(f"tokenizer.model: {count:,} damaged, {refused:,} refused, the slowest took {most:.2f} s")
    assert refused > count / 3


def test_damaged_models(tmp_path):
    survive(tmp_path, 300)


@pytest.mark.slow
def test_10000_damaged_models(tmp_path):
    survive(tmp_path, 10_000)
