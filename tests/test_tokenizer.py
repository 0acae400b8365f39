"""Tokenizers: exact, deterministic, safe to load."""

import copy
import functools
import gzip
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from tinylm import tokenizer as module
from tinylm.tokenizer import SPECIALS, Tokenizer, TokenizerError, blocks
from tinylm.vocabulary import BYTE_OF, SYMBOLS

VOCAB = {"bpe": 340, "wordpiece": 590, "unigram": 330, "byte": 261}
KINDS = tuple(VOCAB)
STORIES = [
    f'Once upon a time, {name} found a {thing}. "It\'s {thing} number {i}!" said {name}.\r\n\r\n#{i} ##ing naïve 語🦙'
    for i, (name, thing) in enumerate((n, t) for n in ("Lily", "Tom", "Ben", "Mia") for t in ("kite", "ball", "kitten"))
] * 4


@pytest.fixture(scope="module")
def trained():
    return {kind: Tokenizer.train(STORIES, vocab=VOCAB[kind], kind=kind) for kind in KINDS}


def text():
    """Any valid Unicode, rich in what tokenizers trip over."""
    alphabet = st.characters(exclude_categories=("Cs",))
    nasty = st.sampled_from(
        [*SPECIALS, "##", "#", "##ing", "[UNK]", " ", "  ", "\r\n", "\x00", "\ufeff", "é", "🦙", "Ġ", "Once upon"]
    )
    return st.lists(st.one_of(nasty, st.text(alphabet, max_size=20)), max_size=12).map("".join)


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_is_exact_and_specials_never_come_from_text(trained, kind):  # P26
    tk = trained[kind]
    assert tk.lossless
    assert tk.kind == kind

    @settings(max_examples=250, deadline=None)
    @given(text())
    def check(x):
        ids = tk.encode(x)
        assert ids.dtype == np.int32
        assert tk.decode_bytes(ids) == x.encode()
        assert tk.decode(ids) == x
        assert len(ids) == 0 or (ids.min() >= len(SPECIALS) and ids.max() < tk.vocab)
        assert tk.byte_lengths[ids].sum() == len(x.encode())

    check()


def test_byte_symbols_are_the_library_s():
    assert sorted(SYMBOLS) == sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for x in ("\x00\t é語🦙~", "".join(map(chr, range(1, 0x100)))):
        assert "".join(s for s, _ in level.pre_tokenize_str(x)) == "".join(SYMBOLS[b] for b in x.encode())
    assert all(BYTE_OF[s] == b for b, s in enumerate(SYMBOLS))


@pytest.mark.parametrize("kind", KINDS)
def test_every_byte_is_a_token_and_the_layout_is_stated(trained, kind):
    tk = trained[kind]
    assert tk.names[:5] == SPECIALS
    assert (tk.end, tk.pad, tk.mask, tk.cls, tk.sep) == (0, 1, 2, 3, 4)
    assert {bytes([b]) for b in range(256)} <= set(tk.token_bytes)
    assert tk.token_bytes[:5] == (b"",) * 5
    assert tk.byte_lengths.tolist() == [len(b) for b in tk.token_bytes]
    assert tk.vocab == len(tk.names) == VOCAB[kind]
    if kind == "wordpiece":
        assert {"##" + s for s in SYMBOLS} <= set(tk.names)


def test_byte_tokenizer_agrees_with_the_library_and_needs_no_training(trained):
    tk = trained["byte"]
    x = "".join(STORIES)
    assert tk._rust.encode(x, add_special_tokens=False).ids == tk.encode(x).tolist()
    assert tk == Tokenizer.train([], kind="byte")


def test_bpe_against_a_worked_example():
    """Sennrich et al. 2016, figure 1 style: 'ab' is the most frequent pair, then 'ab'+'c'."""
    tk = Tokenizer.train(["abc", "abc", "abc", "ab"], vocab=263, kind="bpe")
    assert tk.names[261:263] == ("ab", "abc")
    assert [tk.names[i] for i in tk.encode("abcab")] == ["abc", "ab"]


def test_wordpiece_is_longest_match_first(trained):
    """Against a ten-line greedy search (Wu et al. 2016) over the library's own words."""
    tk = trained["wordpiece"]
    ids = {n: i for i, n in enumerate(tk.names)}
    for x in STORIES[:12]:
        expected = []
        for word, _ in tk._rust.pre_tokenizer.pre_tokenize_str(x):
            at = 0
            while at < len(word):
                mark = "##" if at else ""
                to = next(e for e in range(len(word), at, -1) if mark + word[at:e] in ids)
                expected.append(ids[mark + word[at:to]])
                at = to
        assert tk.encode(x).tolist() == expected


def test_unigram_takes_the_most_probable_segmentation(trained):
    tk = trained["unigram"]
    scores = dict(json.loads(tk.to_json())["model"]["vocab"])
    for x in ("Lily", " kitten", " number", "zebra"):
        symbols = "".join(SYMBOLS[b] for b in x.encode())
        best = [0.0] + [-1e9] * len(symbols)
        for e in range(1, len(symbols) + 1):
            best[e] = max(best[s] + scores[symbols[s:e]] for s in range(e) if symbols[s:e] in scores)
        got = sum(scores[tk.names[i]] for i in tk.encode(x))
        assert got == pytest.approx(best[-1], abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_training_does_not_depend_on_order_or_process(trained, kind):
    shuffled = STORIES[:]
    random.Random(1).shuffle(shuffled)
    assert Tokenizer.train(iter(shuffled), vocab=VOCAB[kind], kind=kind) == trained[kind]
    code = (
        "import json,sys; from tinylm.tokenizer import Tokenizer; docs, kind, vocab = json.load(sys.stdin);"
        "print(Tokenizer.train(docs, vocab=vocab, kind=kind).sha256)"
    )
    got = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps([STORIES, kind, VOCAB[kind]]),
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(module.__file__).parents[1])},
    )
    assert got.stdout.strip() == trained[kind].sha256


def test_training_errors():
    for kind, least in (("bpe", 261), ("wordpiece", 517), ("unigram", 261)):
        with pytest.raises(TokenizerError, match=f"at least {least}"):
            Tokenizer.train(STORIES, vocab=least - 1, kind=kind)
        assert Tokenizer.train(STORIES, vocab=least, kind=kind).vocab == least
    with pytest.raises(TokenizerError, match="no text"):
        Tokenizer.train([])
    with pytest.raises(TokenizerError, match="wrap it in a list"):
        Tokenizer.train("one text")
    with pytest.raises(TokenizerError, match="document 1: expected str, got NoneType"):
        Tokenizer.train(iter(["a", None]))
    with pytest.raises(TokenizerError, match="must be one of"):
        Tokenizer.train(STORIES, kind="char")
    with pytest.raises(TokenizerError, match=r"lone surrogate U\+D800"):
        Tokenizer.train(["a\ud800"])

    def broken():
        yield "a"
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        Tokenizer.train(broken())


def test_encode_and_decode_errors(trained):  # P25, P26
    for tk in trained.values():
        with pytest.raises(TokenizerError, match=r"character 1 of the text is the lone surrogate U\+DC80"):
            tk.encode("a\udc80")
        with pytest.raises(TokenizerError, match="expected str, got int"):
            tk.encode_batch(iter(["a", 3]))
        for wrong in ([tk.vocab], [-1], [999999], [-100]):
            with pytest.raises(TokenizerError, match=f"token id {wrong[0]} is outside 0..{tk.vocab - 1}"):
                tk.decode(wrong)
        with pytest.raises(TokenizerError, match="whole numbers"):
            tk.decode(np.array([1.0]))
        assert tk.decode([]) == ""
        assert len(tk.encode("")) == 0
        assert tk.encode_batch([]) == []
        assert tk.decode([tk.end, *tk.encode("hi"), tk.pad]) == "hi"


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 339), max_size=40))
def test_stream_equals_decode(ids):
    tk = test_stream_equals_decode.tokenizer
    stream = tk.stream()
    parts = [stream.push(i) for i in ids]
    assert "".join(parts) + stream.flush() == tk.decode(ids)


test_stream_equals_decode.tokenizer = Tokenizer.train(STORIES, vocab=340)


def test_stream_holds_back_incomplete_characters(trained):
    stream = trained["byte"].stream()
    assert [stream.push(i) for i in trained["byte"].encode("é🦙")] == ["", "é", "", "", "", "🦙"]
    assert stream.flush() == ""
    stream.push(trained["byte"].encode("é")[0])
    assert stream.flush() == "\ufffd"


def test_long_text_is_cut_where_nothing_changes(trained, monkeypatch):
    x = " ".join(STORIES) * 2
    whole = {kind: tk.encode(x) for kind, tk in trained.items()}
    monkeypatch.setattr(module, "LONGEST", 300)
    assert len(list(module._cut(x, 300))) > 10
    for kind, tk in trained.items():
        assert np.array_equal(tk.encode(x), whole[kind])
        run = "é" * 1000 + "\n" * 999
        assert tk.decode(tk.encode(run)) == run


def test_as_a_value(trained, tmp_path):
    tk = trained["bpe"]
    same = Tokenizer.from_json(tk.to_json())
    assert same == tk
    assert hash(same) == hash(tk)
    assert tk != trained["unigram"]
    assert tk != "tokenizer"
    assert pickle.loads(pickle.dumps(tk)) == tk
    assert copy.deepcopy(tk) is tk
    with pytest.raises(AttributeError):
        tk.vocab = 3
    with pytest.raises(ValueError, match="read-only"):
        tk.byte_lengths[0] = 1
    assert tk.save(tmp_path) == tmp_path / "tokenizer.json"
    assert os.listdir(tmp_path) == ["tokenizer.json"]
    assert Tokenizer.load(tmp_path) == Tokenizer.load(tmp_path / "tokenizer.json") == tk
    raw = json.loads(tk.to_json())
    assert Tokenizer.from_json(json.dumps(dict(reversed(raw.items())))).sha256 == tk.sha256
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(TokenizerError, match=r"pipe.json: it is not a regular file"):
        Tokenizer.load(tmp_path / "pipe.json")
    with pytest.raises(FileNotFoundError, match="no tokenizer at"):
        Tokenizer.load(tmp_path / "nothing")
    (tmp_path / "bad.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(TokenizerError, match=r"bad.json: not UTF-8 at byte 7"):
        Tokenizer.load(tmp_path / "bad.json")


@pytest.mark.parametrize("kind", KINDS)
def test_the_saved_file_means_the_same_to_the_library(trained, kind):
    """Whoever loads our tokenizer.json with `tokenizers` alone gets the same ids."""
    plain = tokenizers.Tokenizer.from_str(trained[kind].to_json())
    for x in STORIES[:12]:
        assert plain.encode(x).ids == trained[kind].encode(x).tolist()


def test_round_trip_report(trained):
    report = trained["bpe"].round_trip(STORIES)
    size = sum(len(x.encode()) for x in STORIES)
    tokens = sum(len(trained["bpe"].encode(x)) for x in STORIES)
    assert (report.documents, report.bytes, report.tokens, report.failures) == (len(STORIES), size, tokens, 0)
    assert report.bytes_per_token == size / tokens
    assert [len(b) for b in blocks(["ab"] * 5, size=4)] == [2, 2, 1]


def test_covered_counts_raw_bytes(trained):
    x = STORIES[0]
    for tk in trained.values():
        total = [tk.covered(x, n) for n in range(len(tk.encode(x)) + 2)]
        assert total[0] == 0
        assert total[-1] == len(x.encode())
        assert total == sorted(total)


# ---- loading what others made


def foreign(**changes):
    """A small lower-casing WordPiece, as BERT's."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "world", "##s", ","]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    bert = {
        "type": "BertNormalizer",
        "clean_text": True,
        "handle_chinese_chars": True,
        "strip_accents": None,
        "lowercase": True,
    }
    raw = {
        "version": "1.0",
        "truncation": {"max_length": 128, "strategy": "LongestFirst", "stride": 0},
        "padding": {
            "strategy": {"Fixed": 128},
            "direction": "Right",
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "[PAD]",
        },
        "added_tokens": [{"id": i, "content": names[i], **flags} for i in range(5)],
        "normalizer": bert,
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": None,
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": {n: i for i, n in enumerate(names)},
        },
    }
    return {**raw, **changes}


@pytest.mark.parametrize(
    ("names", "begin", "end"),
    [("<s> </s>", 0, 1), ("<|begin_of_text|> <|end_of_text|>", 0, 1), ("<eos> <bos>", 1, 0), ("<pad> <s>", 1, 1)]
    + [("<|endoftext|> <|pad|>", 0, 0), ("</s> <mask>", 0, 0), ("[CLS] [SEP]", None, None)],
)
def test_what_begins_and_ends_a_text(names, begin, end):
    """One id does both where a tokenizer has but one; ours and BERT's stay as they were."""
    text = own_json("byte")
    for old, new in zip(SPECIALS, [*names.split(), "<a>", "<b>", "<c>"], strict=True):
        text = text.replace(json.dumps(old), json.dumps(new))
    tk = Tokenizer.from_json(text)
    assert (tk.begin, tk.end) == (begin, end)
    assert tk.prefix == b""


def test_a_lossy_foreign_tokenizer_says_so():
    tk = Tokenizer.from_json(json.dumps(foreign()))
    assert not tk.lossless
    assert tk.encode("Hello WORLDS, café").tolist() == [5, 6, 7, 8, 1]
    assert tk.decode(tk.encode("Hello worlds")) == " hello worlds"
    assert (tk.end, tk.pad, tk.mask, tk.cls, tk.sep) == (None, 0, 4, 2, 3)
    assert tk.covered("Hello WORLDS, café", 3) == len("Hello WORLDS")
    assert len(tk.encode("hello")) == 1, "padding and truncation of the file are not applied"


@functools.cache
def own_json(kind):
    return Tokenizer.train(STORIES[:4], vocab=530, kind=kind).to_json()


def own(kind="bpe"):
    return json.loads(own_json(kind))


def edited(raw, path, value):
    raw = copy.deepcopy(raw)
    at = raw
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return raw


SPLIT = {"type": "Split", "pattern": {"String": "x"}, "behavior": "Isolated", "invert": False}
KNOWN_BAD = [
    ("unknown entry", lambda: {**own(), "extra": 1}),
    ("no model", lambda: {"version": "1.0"}),
    ("version", lambda: edited(own(), ["version"], "2.0")),
    ("model type", lambda: edited(own(), ["model", "type"], "Evil")),
    ("normalizer 'Precompiled'", lambda: foreign(normalizer={"type": "Precompiled", "precompiled_charsmap": ""})),
    ("Replace.pattern", lambda: foreign(normalizer={"type": "Replace", "pattern": {"String": ""}, "content": "a"})),
    ("Replace.pattern", lambda: foreign(normalizer={"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""})),
    ("Split.pattern", lambda: foreign(pre_tokenizer={**SPLIT, "pattern": {"Regex": "(a|a)*b"}})),
    ("without behavior", lambda: foreign(pre_tokenizer={k: v for k, v in SPLIT.items() if k != "behavior"})),
    ("padding", lambda: foreign(padding={"strategy": {"Fixed": 2**31}})),
    ("padding", lambda: foreign(padding={"strategy": {"Fixed": 2**63}})),
    ("truncation", lambda: foreign(truncation={"max_length": -1})),
    ("truncation", lambda: foreign(truncation=[128])),
    ("ids must be", lambda: edited(own(), ["model", "vocab", "!"], 2**32 - 1)),
    ("ids must be", lambda: edited(own(), ["model", "vocab", "!"], 7)),
    ("not a whole number", lambda: edited(own(), ["model", "vocab", "!"], True)),
    ("not a whole number", lambda: edited(own(), ["model", "vocab", "!"], 5.0)),
    ("not in the vocabulary", lambda: edited(own(), ["model", "merges"], [["Once", "zz"]])),
    ("not a pair", lambda: edited(own(), ["model", "merges"], ["a"])),
    ("not a pair", lambda: edited(own(), ["model", "merges"], [["a", "b", "c"]])),
    ("dropout", lambda: edited(own(), ["model", "dropout"], 0.5)),
    ("unk_token", lambda: edited(foreign(), ["model", "unk_token"], "nope")),
    ("max_input_chars", lambda: edited(foreign(), ["model", "max_input_chars_per_word"], 2**40)),
    ("unk_id", lambda: edited(own("unigram"), ["model", "unk_id"], 10**6)),
    ("score", lambda: edited(own("unigram"), ["model", "vocab", 9, 1], 1e300)),
    ("twice", lambda: edited(own("unigram"), ["model", "vocab", 9, 0], "!")),
    ("has id 3, the vocabulary says 1", lambda: edited(own(), ["added_tokens", 1, "id"], 3)),
    ("content", lambda: edited(own(), ["added_tokens", 1, "content"], "")),
    ("flags", lambda: edited(own(), ["added_tokens", 1, "special"], 1)),
    ("twice", lambda: edited(own(), ["added_tokens", 1, "content"], "<|mask|>")),
    ("decoder", lambda: edited(own(), ["decoder"], {"type": "Rot13"})),
    ("steps", lambda: foreign(normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}] * 99})),
]  # fmt: skip


@pytest.mark.parametrize(("reason", "make"), KNOWN_BAD, ids=range(len(KNOWN_BAD)))
def test_known_bad_files_are_refused_by_name(reason, make, monkeypatch):  # P26
    bad = json.dumps(make())
    monkeypatch.setattr(module, "_rust", lambda *_: pytest.fail("the library was asked"))
    with pytest.raises(TokenizerError, match=reason):
        Tokenizer.from_json(bad)


def test_files_that_are_no_json():  # P26
    for bad, reason in (
        ("", "not a json file"),
        ("[1]", "one json object"),
        ('{"a": 1, "a": 2}', "repeats a key"),
        ('{"a": NaN}', "NaN"),
        ('{"a": "\\ud800"}', "lone surrogate"),
        ("[" * 100_000, "not a json file"),
        ('{"a": ' + "9" * 5000 + "}", "not a usable json"),
        (" " * (16 * 2**20 + 1), "limit"),
    ):
        with pytest.raises(TokenizerError, match=reason):
            Tokenizer.from_json(bad)


def test_a_special_token_that_text_could_forge_is_refused():  # P26
    """A vocabulary whose longest match on plain text is its special token."""
    raw = edited(foreign(), ["pre_tokenizer"], {"type": "WhitespaceSplit"})
    raw["model"]["vocab"] = {("<evil>" if n == "[CLS]" else n): i for n, i in raw["model"]["vocab"].items()}
    raw["added_tokens"][2]["content"] = "<evil>"
    with pytest.raises(TokenizerError, match="'<evil>' becomes special token 2"):
        Tokenizer.from_json(json.dumps(raw))


def mutate(rng, raw):
    """One to three random changes anywhere in the json: values, keys, types, structure."""
    raw = copy.deepcopy(raw)
    odd = [
        None,
        True,
        False,
        0,
        1,
        -1,
        2**31,
        2**32 - 1,
        2**63,
        1.5,
        1e308,
        "",
        "a",
        "##",
        "\x00",
        "é",
        "<|pad|>",
        [],
        {},
        [[]],
        {"type": "ByteLevel"},
    ]
    for _ in range(rng.randint(1, 3)):
        spots = []

        def walk(at, spots=spots):
            items = list(at.items()) if isinstance(at, dict) else list(enumerate(at))
            for key, value in rng.sample(items, min(len(items), 12)):
                spots.append((at, key))
                if isinstance(value, (dict, list)):
                    walk(value)

        walk(raw)
        if not spots:
            break
        at, key = rng.choice(spots)
        how = rng.randrange(5)
        if how == 0:
            at[key] = copy.deepcopy(rng.choice(odd))
        elif how == 1:
            del at[key]
        elif how == 2 and isinstance(at, dict):
            at[str(rng.choice([*odd, *SPECIALS, "type", "pattern"]))] = at.pop(key)
        elif how == 3 and isinstance(at, list):
            at.insert(rng.randrange(len(at) + 1), copy.deepcopy(at[rng.randrange(len(at))]) if at else None)
        else:
            other, its = rng.choice(spots)
            if its in other if isinstance(other, dict) else its < len(other):
                at[key] = copy.deepcopy(other[its])
    return raw


def survives(seed, count):
    """Load `count` mutated files in a child process; its exit code says what happened: 0 is well, else the case."""
    sources = [own("bpe"), own("wordpiece"), own("unigram"), foreign()]
    pid = os.fork()
    if pid:
        limit = time.monotonic() + 5 + count / 10
        while time.monotonic() < limit:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return "hang"
    code = 1
    try:
        rng = random.Random(seed)
        loaded = 0
        for _ in range(count):
            raw = mutate(rng, rng.choice(sources))
            try:
                tk = Tokenizer.from_json(json.dumps(raw))
                loaded += 1
                for x in ("Once upon a time <|mask|> ##ing é🦙\x00", "a" * 300):
                    ids = tk.encode(x)
                    assert not len(ids) or (ids.min() >= 0 and ids.max() < tk.vocab)
                    assert not tk.lossless or tk.decode(ids) == x
            except TokenizerError:
                pass
        code = 0 if 0 < loaded < count else 3  # the mutations must neither all be refused nor all be harmless
    finally:
        os._exit(code)


@pytest.mark.filterwarnings("ignore:.*fork")  # JAX, where loaded, warns; the child never touches it
def test_mutated_files_never_crash():  # P26
    for seed in range(4):
        assert survives(seed, 100) == 0, f"seed {seed}"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork")
def test_3000_mutated_files_never_crash():
    for seed in range(100, 130):
        assert survives(seed, 100) == 0, f"seed {seed}"


# ---- real data


def test_golden_gpt2(shared_data):
    """OpenAI's vocabulary and merges, against llama.cpp's published tokenisations."""
    folder = shared_data / "tokenizers"
    vocab = json.loads((folder / "gpt2_vocab.json").read_text(encoding="utf-8"))
    merges = [
        m
        for m in (folder / "gpt2_merges.txt").read_text(encoding="utf-8").split("\n")
        if m and not m.startswith("#version")
    ]
    raw = own()
    end = next(t for t in raw["added_tokens"] if t["content"] == "<|endoftext|>")
    raw["added_tokens"] = [{**end, "id": vocab["<|endoftext|>"]}]
    raw["model"] = {"type": "BPE", "vocab": vocab, "merges": merges}
    tk = Tokenizer.from_json(json.dumps(raw))
    assert tk.lossless
    assert tk.vocab == 50257
    assert (tk.end, tk.pad) == (50256, None)
    cases = (folder / "ggml-vocab-gpt-2.gguf.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    golden = (folder / "ggml-vocab-gpt-2.gguf.out").read_text(encoding="utf-8").split("\n")
    assert len(cases) > 40
    for x, line in zip(cases, golden, strict=False):
        assert tk.encode(x).tolist() == [int(i) for i in line.split()], repr(x)
        assert tk.decode(tk.encode(x)) == x


def test_foreign_files(shared_data):
    bert = Tokenizer.load(shared_data / "tokenizers" / "bert-uncased_tokenizer.json")
    assert (bert.kind, bert.vocab, bert.lossless, bert.mask) == ("wordpiece", 30522, False, 103)
    assert [bert.names[i] for i in bert.encode("Hello, [MASK] embeddings")] == [
        "hello",
        ",",
        "[",
        "mask",
        "]",
        "em",
        "##bed",
        "##ding",
        "##s",
    ]
    names = (shared_data / "tokenizers" / "bert-base-uncased_vocab.txt").read_text(encoding="utf-8").split("\n")
    assert list(bert.names) == names[:30522]
    baby = Tokenizer.load(shared_data / "tokenizers" / "babyberta_tokenizer.json")
    assert (baby.kind, baby.vocab, baby.lossless, baby.end, baby.pad) == ("bpe", 8192, False, 4, 1)
    assert baby.decode(baby.encode("Where IS it?")) == " where is it?"


def test_bert_matches_golden(shared_data):
    """llama.cpp's tokenisations with BERT's vocabulary."""
    folder = shared_data / "tokenizers"
    bert = Tokenizer.load(folder / "bert-uncased_tokenizer.json")
    cases = (folder / "ggml-vocab-bert-bge.gguf.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    golden = (folder / "ggml-vocab-bert-bge.gguf.out").read_text(encoding="utf-8").split("\n")
    same = [bert.encode(x).tolist() == [int(i) for i in line.split()] for x, line in zip(cases, golden, strict=False)]
    assert len(same) > 40
    assert all(same)


def test_real_stories(shared_data):
    raw = gzip.decompress((shared_data / "tinystories" / "train_v1.txt.gz").read_bytes()).decode()
    stories = [s.strip("\n") for s in raw.split("<|endoftext|>") if s.strip("\n")]
    stories = stories[:800]
    for kind, least in (("bpe", 3.9), ("wordpiece", 3.9), ("unigram", 3.9)):
        report = Tokenizer.train(stories, vocab=4096, kind=kind).round_trip(stories)
        assert report.failures == 0
        assert report.bytes == sum(len(s.encode()) for s in stories)
        assert report.bytes_per_token > least
