"""Reading, splitting, duplicates, contamination."""

import gzip
import json
import logging
import os
import random
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinylm import reading, text
from tinylm.text import TextError, bands, clean, contamination, deduplicate, documents, fingerprint, sample, split

DOCS = ["Once upon a time.\nThe end.", "Second story é🦙", "Third\r\nwith CRLF"]


def put(path, raw):
    path.write_bytes(gzip.compress(raw) if path.name.endswith(".gz") else raw)
    return path


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.raw", "A.TXT"])
def test_text_files_are_split_at_the_separator(tmp_path, name):
    raw = "\n<|endoftext|>\n".join(["", *DOCS, "", "\n"]).encode()
    assert list(documents(put(tmp_path / name, raw))) == DOCS
    assert list(documents(str(tmp_path / name), limit=2)) == DOCS[:2]
    assert len(list(documents(tmp_path / name, separator=None))) == 1


def test_a_file_without_the_separator_is_one_document(tmp_path):
    path = put(tmp_path / "a.txt", b"one\n\n\ntwo\n\n\n\n three \n")
    assert list(documents(path)) == ["one\n\n\ntwo\n\n\n\n three "]
    assert list(documents(path, separator="\n\n\n")) == ["one", "two", " three "]


@settings(max_examples=150, deadline=None)
@given(st.text("ab<|>", max_size=200), st.sampled_from(["<|>", "a", "ab", "||"]), st.integers(1, 7))
def test_streamed_splitting_equals_splitting_at_once(whole, separator, size):
    pieces = [whole[i : i + size] for i in range(0, len(whole), size)]
    assert list(reading._split(iter(pieces), separator)) == whole.split(separator)


@pytest.mark.parametrize("chunk", [1, 2, 3, 1000])
def test_characters_that_straddle_chunks(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(reading, "CHUNK", chunk)
    path = put(tmp_path / "a.txt", "é🦙<|endoftext|>語\r\n".encode())
    assert list(documents(path)) == ["é🦙", "語"]


@pytest.mark.parametrize("suffix", ["txt", "txt.gz", "jsonl", "jsonl.gz"])
def test_byte_order_mark_is_dropped(tmp_path, suffix):
    body = "héllo" if suffix.startswith("txt") else json.dumps({"text": "héllo"})
    assert list(documents(put(tmp_path / f"a.{suffix}", b"\xef\xbb\xbf" + body.encode()))) == ["héllo"]


def test_nul_and_blank_lines_survive(tmp_path):
    assert list(documents(put(tmp_path / "a.txt", b"a\x00b \n\n c"))) == ["a\x00b \n\n c"]


@pytest.mark.parametrize("chunk", [2, 5, 2**20])
def test_invalid_utf8(tmp_path, monkeypatch, chunk):  # P25
    monkeypatch.setattr(reading, "CHUNK", chunk)
    path = put(tmp_path / "bad.txt", "é one\ntwo ".encode() + b"\xff\xfe end")
    with pytest.raises(TextError, match=r"bad.txt: not UTF-8 at byte 11 \(0xff\), line 2; .*errors='replace'"):
        list(documents(path))
    with pytest.warns(UserWarning, match="2 invalid UTF-8 sequences replaced"):
        assert list(documents(path, errors="replace")) == ["é one\ntwo \ufffd\ufffd end"]
    with pytest.warns(UserWarning, match="2 invalid UTF-8 sequences dropped"):
        assert list(documents(path, errors="ignore")) == ["é one\ntwo  end"]
    with pytest.raises(TextError, match="byte 2"):
        list(documents(put(tmp_path / "cut.txt", b"ab\xc3")))  # a character cut off by the end of the file
    with pytest.raises(TextError, match=r"byte 14 .*line 2"):
        list(documents(put(tmp_path / "bad.jsonl", b'{"text":"a"\n"\xff"}'.replace(b'"a"\n', b'"a"}\n'))))


def test_jsonl(tmp_path):  # P25
    rows = [{"text": d, "title": "t"} for d in DOCS]
    path = put(tmp_path / "a.jsonl.gz", "\n\n".join(map(json.dumps, rows)).encode())
    assert list(documents(path)) == DOCS
    assert list(documents(path, field="title")) == ["t"] * 3
    for bad, reason in (
        ('{"text": "a"}\n{"title": "b", "id": 3}', r"a.jsonl, line 2: no field 'text'; it has 'title', 'id'"),
        ('{"text": "a"}\n\n{"text": null}', r"line 3: 'text' must be text, got NoneType"),
        ('{"text": 7}', "line 1: 'text' must be text, got int"),
        ('{"text": {"a": 1}}', "got dict"),
        ('{"text": "a"', "line 1: not json"),
        ("[" * 100_000, "line 1: not json"),
        ("[1]", "expected an object with 'text', got list"),
        ("{}", "it has none"),
        ('{"text": "\\ud800"}', "lone surrogate"),
    ):
        with pytest.raises(TextError, match=reason):
            list(documents(put(tmp_path / "a.jsonl", bad.encode())))
    with pytest.warns(UserWarning, match="1 invalid"):
        assert list(documents(put(tmp_path / "a.jsonl", b'{"text": "a\\ud800b"}'), errors="replace")) == ["a\ufffdb"]


def test_parquet(tmp_path):  # P25
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"text": DOCS * 500, "n": range(1500)}), tmp_path / "a.parquet")
    assert list(documents(tmp_path / "a.parquet")) == DOCS * 500
    with pytest.raises(TextError, match="no column 'story'; it has 'text', 'n'"):
        list(documents(tmp_path / "a.parquet", field="story"))
    with pytest.raises(TextError, match="'n' must be text, got int"):
        list(documents(tmp_path / "a.parquet", field="n"))
    pq.write_table(pa.table({"text": ["a", None]}), tmp_path / "null.parquet")
    with pytest.raises(TextError, match="row 1: 'text' must be text, got NoneType"):
        list(documents(tmp_path / "null.parquet"))
    with pytest.raises(TextError, match="not a readable parquet"):
        list(documents(put(tmp_path / "bad.parquet", b"PAR1 not really")))
    raw = (tmp_path / "a.parquet").read_bytes()
    with pytest.raises(TextError, match="not a readable parquet"):
        list(documents(put(tmp_path / "cut.parquet", raw[: len(raw) // 2])))


def test_gzip_damage(tmp_path):  # P25
    raw = gzip.compress(os.urandom(5000).hex().encode())
    for name in ("cut.txt.gz", "cut.jsonl.gz"):
        path = tmp_path / name
        path.write_bytes(raw[: len(raw) // 2])
        with pytest.raises(TextError, match="ends too early"):
            list(documents(path, separator=None))
    (tmp_path / "flip.txt.gz").write_bytes(raw[:3000] + bytes([raw[3000] ^ 255]) + raw[3001:])
    with pytest.raises(TextError, match="not a sound gzip file"):
        list(documents(tmp_path / "flip.txt.gz"))
    (tmp_path / "plain.txt.gz").write_bytes(b"not zipped")
    with pytest.raises(TextError, match="not a sound gzip file"):
        list(documents(tmp_path / "plain.txt.gz"))


def test_a_folder_is_read_in_sorted_order(tmp_path):
    put(tmp_path / "b.txt", b"b1<|endoftext|>b2")
    put(tmp_path / "a.jsonl", b'{"text": "a"}')
    (tmp_path / "sub").mkdir()
    put(tmp_path / "sub" / "c.txt.gz", b"c")
    put(tmp_path / "README.md", b"no document")
    put(tmp_path / ".hidden.txt", b"no document")
    assert list(documents(tmp_path)) == ["a", "b1", "b2", "c"]
    (tmp_path / "none").mkdir()
    with pytest.raises(TextError, match=r"no \.txt"):
        list(documents(tmp_path / "none"))


def test_what_is_no_document(tmp_path):  # P25
    for raw in (b"", b"\n\n", b"\xef\xbb\xbf", b"<|endoftext|>\n<|endoftext|>"):
        with pytest.raises(TextError, match="no documents, it is empty"):
            list(documents(put(tmp_path / "empty.txt", raw)))
    assert list(documents([])) == []
    with pytest.raises(FileNotFoundError, match=r"no file or folder 'nowhere.txt'"):
        list(documents("nowhere.txt"))
    with pytest.raises(FileNotFoundError, match="put it in a list"):
        list(documents("Once upon a time\nthere was"))
    with pytest.raises(FileNotFoundError):
        list(documents("a\x00b"))
    with pytest.raises(TextError, match="convert it"):
        list(documents(put(tmp_path / "a.csv", b"text\na")))
    with pytest.raises(TextError, match="document 1: expected str, got int"):
        list(documents(iter(["a", 1])))
    with pytest.raises(TextError, match="None to keep"):
        documents(["a"], separator="")
    with pytest.raises(TextError, match="errors = 'loose'"):
        documents(["a"], errors="loose")
    for wrong in (-1, True):
        with pytest.raises(TextError, match=f"limit = {wrong}: must be at least 0 or None"):
            documents(["a"], limit=wrong)
    with pytest.raises(TextError, match="takes a path or an iterable of str, got int"):
        documents(5)
    with pytest.raises(TextError, match=r"limit = 1.5: must be a whole number"):
        documents(["a"], limit=1.5)
    assert list(documents(["a"], limit=0)) == []
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(TextError, match="not a regular file"):
        list(documents(tmp_path / "pipe.txt"))
    (tmp_path / "loop.txt").symlink_to(tmp_path / "loop.txt")
    with pytest.raises(FileNotFoundError):
        list(documents(tmp_path / "loop.txt"))


def test_documents_stream(tmp_path):
    """The first document of a file comes before the fault at its end is met."""
    path = put(tmp_path / "a.txt", b"first<|endoftext|>" + b"x" * 3 * 2**20 + b"\xff")
    found = documents(path)
    assert next(found) == "first"
    with pytest.raises(TextError):
        list(found)


def test_hub_folder_streamed(tmp_path, monkeypatch):
    """The real `datasets`, on a folder in the hub's layout."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    pytest.importorskip("datasets")
    folder = tmp_path / "set"
    folder.mkdir()
    put(folder / "train.jsonl", b'{"text": "a"}\n{"text": "b"}\n')
    put(folder / "validation.jsonl", b'{"text": "v"}\n')
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert list(documents(f"hf:{folder}")) == ["a", "b"]
        assert list(documents(f"hf:{folder}:validation")) == ["v"]
        with pytest.raises(TextError, match="cannot be read"):
            list(documents(f"hf:{folder}:test"))
        with pytest.raises(TextError, match="no field 'story'; it has 'text'"):
            list(documents(f"hf:{folder}", field="story"))


def test_hub_names(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(name, config, *, split, streaming):
        asked.append((name, config, split, streaming))
        if name == "gone":
            raise ConnectionError("offline")

        def rows():
            yield {"text": "a"}
            if name == "breaks":
                raise OSError("connection reset")

        return rows()

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert list(documents("hf:roneneldan/TinyStories")) == ["a"]
    assert list(documents("hf:wikimedia/wikipedia@20231101.en:train")) == ["a"]
    assert list(documents("hf:x:validation", limit=1)) == ["a"]
    assert asked == [
        ("roneneldan/TinyStories", None, "train", True),
        ("wikimedia/wikipedia", "20231101.en", "train", True),
        ("x", None, "validation", True),
    ]
    with pytest.raises(TextError, match=r"hf:gone: cannot be read \(offline\); a local file"):
        list(documents("hf:gone"))
    with pytest.raises(TextError, match="stopped after 1 rows"):
        list(documents("hf:breaks"))
    with pytest.raises(TextError, match="write hf:ID"):
        list(documents("hf:"))


def test_the_hub_is_quiet_while_it_is_read(monkeypatch, caplog):
    datasets = pytest.importorskip("datasets")
    from datasets.utils import are_progress_bars_disabled

    hub = logging.getLogger("huggingface_hub.utils.probe")
    before = hub.getEffectiveLevel(), are_progress_bars_disabled()
    during = []

    def load(name, *_, **__):
        during.append((hub.getEffectiveLevel(), are_progress_bars_disabled()))
        if name == "gone":
            raise ConnectionError("offline")
        return [{"text": "a"}, {"text": "b"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(TextError, match="offline"):
        list(documents("hf:gone"))
    assert (hub.getEffectiveLevel(), are_progress_bars_disabled()) == before
    first, second = documents("hf:a"), documents("hf:b")
    assert (next(first), next(second), list(first)) == ("a", "a", ["b"])
    assert hub.getEffectiveLevel() == logging.ERROR, "the other stream goes on"
    del second  # abandoned half way
    assert (hub.getEffectiveLevel(), are_progress_bars_disabled()) == before
    assert during == [(logging.ERROR, True)] * 3


# ---- split and sample


def test_one_text_is_no_list_of_documents():
    for call in (
        lambda: split("hello"),
        lambda: deduplicate("hello"),
        lambda: clean("hello", ["a"]),
        lambda: clean(["a"], "hello"),
        lambda: contamination("hello", ["a"]),
        lambda: contamination(["a"], "hello"),
    ):
        with pytest.raises(TextError, match="give a list of documents, not one text"):
            call()


def test_split_never_moves_a_document():
    docs = [f"document {i}" for i in range(2000)]
    train, valid = split(docs, valid=0.1)
    assert sorted(train + valid) == sorted(docs)
    assert 150 < len(valid) < 250
    more_train, more_valid = split([*docs, *(f"new {i}" for i in range(500))], valid=0.1)
    assert set(train) <= set(more_train)
    assert set(valid) <= set(more_valid)
    assert split(docs, valid=0.1, seed=1)[1] != valid
    both = split([*docs, *(d + " \n" for d in docs)], valid=0.1)  # equal up to white space: on the same side
    assert not {d.strip() for d in both[0]} & {d.strip() for d in both[1]}
    with pytest.raises(TextError, match=r"1 document\(s\) at 0.05 leaves valid empty"):
        split(["only one"])
    with pytest.raises(TextError, match=r"0 document\(s\)"):
        split([])
    with pytest.raises(TextError, match="between 0 and 1"):
        split(docs, valid=0.0)


def test_sample_does_not_depend_on_order():
    docs = [f"document {i}" for i in range(300)]
    some = sample(docs, 40)
    assert len(set(some)) == 40
    shuffled = docs[:]
    random.Random(0).shuffle(shuffled)
    assert set(sample(shuffled * 2, 40)) == set(some)
    assert set(sample(docs, 60)) > set(some), "a larger sample holds the smaller"
    assert len(sample(docs, 999)) == 300
    assert some == sorted(some, key=lambda d: text._draw(d, 0))


# ---- duplicates


def words(rng, count):
    return [
        rng.choice(["the", "a", "cat", "dog", "bird", "tree", "sun", "moon", "ran", "sat", "saw", "big", "red", "old"])
        + str(rng.randrange(60))
        for _ in range(count)
    ]


def shingles(doc):
    own = text.WORD.findall(doc.lower())
    return {tuple(own[i : i + 5]) for i in range(max(1, len(own) - 4))}


def brute(docs, near):
    """The definition, pair by pair."""
    kept, sets = [], []
    for doc in docs:
        mine = shingles(doc)
        if all(len(mine & other) / len(mine | other) < near for other in sets):
            kept.append(doc)
            sets.append(mine)
    return kept


@pytest.mark.parametrize("near", [0.5, 0.8, 0.9])
def test_near_duplicates_against_brute_force(near):
    rng = random.Random(3)
    docs = []
    for _ in range(150):
        base = words(rng, rng.randint(3, 120))
        docs.append(" ".join(base))
        if rng.random() < 0.7:
            for _ in range(rng.randrange(5)):  # a few words replaced: similarities all over 0.2 .. 1
                base[rng.randrange(len(base))] = "other" + str(rng.randrange(9))
            docs.append("  ".join(base).title() + "!")
    rng.shuffle(docs)
    kept, report = deduplicate(docs, near=near)
    assert kept == brute(docs, near)
    assert report.documents == len(docs)
    assert report.kept == len(kept)
    assert report.exact + report.near == len(docs) - len(kept) > 20
    assert report.bytes_after == sum(len(d.encode()) for d in kept)


def test_exact_duplicates():
    docs = ["a b c d e f", "x", "a  b c\nd e f\n", "x", "x", "A b c d e f", "!!!", "???"]
    kept, report = deduplicate(docs, near=None)
    assert kept == ["a b c d e f", "x", "A b c d e f", "!!!", "???"]
    assert (report.exact, report.near, report.share) == (3, 0, 3 / 8)
    assert report.examples == (("a  b c\nd e f\n",) * 2, ("x", "x"), ("x", "x"))
    kept, report = deduplicate(iter(docs))
    assert kept == ["a b c d e f", "x", "!!!", "???"]
    assert (report.exact, report.near) == (3, 1)
    assert report.examples[-1] == ("a b c d e f", "A b c d e f")
    assert deduplicate([]) == ([], text.DedupReport(0, 0, 0, 0, 0, 0, 0.8, ()))
    with pytest.raises(TextError, match="above 0"):
        deduplicate(docs, near=0.0)


def test_duplicates_found_across_blocks():
    docs = [" ".join(words(random.Random(i), 30)) for i in range(1500)]
    kept, report = deduplicate([*docs, *(d.upper() for d in docs[:200])])
    assert kept == docs
    assert report.near == 200


def test_stated_miss_probability():
    """The docstring's 0.04 %, and what is measured on pairs of exactly the threshold's similarity."""
    assert bands(0.8)[:2] == (20, 5)
    assert bands(0.8)[2] == pytest.approx((1 - 0.8**5) ** 20) == pytest.approx(3.56e-4, rel=1e-2)
    for near in (0.3, 0.5, 0.7, 0.9, 1.0):
        count, rows, missed = bands(near)
        assert count * rows <= 100
        assert missed < 1e-3
    missed = 0
    for i in range(400):
        rng = random.Random(i)
        base = words(rng, 184)  # 180 shingles; the last 20 words changed: (180 - 20) / (180 + 20) = 0.8
        other = base[:-20] + [w + "x" for w in base[-20:]]
        pair = [" ".join(base), " ".join(other)]
        assert len(shingles(pair[0]) & shingles(pair[1])) / len(shingles(pair[0]) | shingles(pair[1])) == 0.8
        missed += len(deduplicate(pair)[0]) == 2
    assert missed <= 2


def test_fingerprint_ignores_white_space_only():
    assert fingerprint("a b\n") == fingerprint(" a\tb")
    assert fingerprint("a b") != fingerprint("ab")
    assert fingerprint("a") != fingerprint("A")


# ---- contamination


def brute_contamination(train, valid, ngram, threshold):
    def grams(doc):
        own = text.WORD.findall(doc.lower())
        return {tuple(own[i : i + ngram]) for i in range(len(own) - ngram + 1)}

    known = set().union(*map(grams, train))
    same = {" ".join(d.split()) for d in train}
    exact = [i for i, d in enumerate(valid) if " ".join(d.split()) in same]
    over = [
        i
        for i, d in enumerate(valid)
        if i not in exact and grams(d) and len(grams(d) & known) / len(grams(d)) >= threshold
    ]
    return exact, over


@pytest.mark.parametrize(("ngram", "threshold"), [(8, 0.5), (3, 0.2), (1, 1.0)])
def test_contamination_against_brute_force(ngram, threshold):
    rng = random.Random(5)
    train = [" ".join(words(rng, rng.randint(1, 60))) for _ in range(600)]
    valid = []
    for _ in range(200):
        fresh = " ".join(words(rng, rng.randint(1, 40)))
        old = rng.choice(train)
        valid.append(rng.choice([fresh, old + "\n", old[: len(old) // 2] + " " + fresh, old.upper()]))
    exact, over = brute_contamination(train, valid, ngram, threshold)
    report = contamination(iter(train), iter(valid), ngram=ngram, threshold=threshold)
    assert (report.exact, report.overlapping) == (len(exact), len(over))
    assert report.flagged == tuple(sorted(exact + over))
    assert len(exact) > 20
    assert len(over) > 20
    assert report.share == len(report.flagged) / 200
    kept, again = clean(valid, train, ngram=ngram, threshold=threshold)
    assert again == report
    assert kept == [d for i, d in enumerate(valid) if i not in report.flagged]
    assert contamination(train, kept, ngram=ngram, threshold=threshold).flagged == ()


def test_contamination_does_not_join_documents():
    """Four words at the end of one training document and four at the start of the next are no run of eight."""
    report = contamination(["x a b c d", "e f g h y"], ["a b c d e f g h"])
    assert report.flagged == ()
    assert contamination([], ["a b"]).flagged == ()
    assert contamination(["a b"], []).share == 0
    with pytest.raises(TextError, match="threshold"):
        contamination(["a"], ["b"], threshold=0.0)


# ---- real data


def test_tinystories(shared_data):
    folder = shared_data / "tinystories"
    v1 = list(documents(folder / "train_v1.txt.gz"))
    v2 = list(documents(folder / "train_v2_gpt4.txt.gz"))
    assert (len(v1), len(v2)) == (2316, 1400)
    kept, report = deduplicate([*v1, *v2])
    assert (report.exact, report.near, len(kept)) == (1, 0, 3715)
    assert contamination(v1, v2).flagged == (323,)
    paragraphs = list(documents(folder / "valid_v1_a.txt.gz", separator="\n\n"))
    found = contamination(v1, paragraphs)
    assert (len(paragraphs), found.exact) == (2102, 0)
    assert 0 < found.overlapping < 40


def test_wikipedia_articles(shared_data):
    articles = list(documents(shared_data / "wiki" / "enwik8_articles.jsonl.gz", limit=500))
    assert len(articles) == 500
    assert len(deduplicate(articles)[0]) == 500
