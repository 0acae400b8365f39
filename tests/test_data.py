"""Token shards and batches: sealed, exact, a pure function of (seed, step)."""

import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinylm import data, shards
from tinylm.data import Batch, DataError, Masked, Rows, Tokens, Windows, check_tokens, permute, write_tokens
from tinylm.tokenizer import Tokenizer

DOCS = [f"Story {i}: once upon a time there were {i % 7} kittens. <|endoftext|> é🦙" for i in range(60)]
BYTES = Tokenizer.train([], kind="byte")


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(DOCS, vocab=300)


def ramp(n, vocab=None, **more):
    """Tokens whose value is their position."""
    return Tokens.from_array(np.arange(n), vocab=vocab or n, **more)


# ---- shards


@pytest.mark.parametrize("size", [1, 7, 100, 2**27])
def test_what_is_written_is_what_is_read(tmp_path, tokenizer, size):
    if size == 1:
        docs = DOCS[:2]
    else:
        docs = DOCS
    heard = []
    tokens = write_tokens(iter(docs), tokenizer, tmp_path, shard_tokens=size, progress=heard.append)
    expected = np.concatenate([[0], *(np.append(tokenizer.encode(d), 0) for d in docs)])
    assert np.array_equal(tokens[:], expected)
    assert tokens[:].dtype == np.int32
    assert len(tokens) == len(expected)
    raw = sum(len(d.encode()) for d in docs)
    assert heard == [raw]
    assert (tokens.documents, tokens.bytes, tokens.vocab, tokens.end) == (len(docs), raw, tokenizer.vocab, 0)
    assert tokens.bytes_per_token == raw / (len(expected) - len(docs) - 1)
    assert tokens.bytes_per_token == tokenizer.round_trip(docs).bytes_per_token
    assert tokens.tokenizer_sha256 == tokenizer.sha256
    assert len(list(tmp_path.glob("*.bin"))) == max(1, -(-len(expected) // size))
    assert {p.suffix for p in tmp_path.iterdir()} == {".bin", ".json"}
    for a, b in ((0, 5), (3, 60), (-9, None), (5, 5), (9, 2), (0, 10**9)):
        assert np.array_equal(tokens[a:b], expected[a:b])
    assert [tokens[i] for i in (0, 1, -1)] == [expected[i] for i in (0, 1, -1)]
    with pytest.raises(IndexError):
        tokens[len(tokens)]
    with pytest.raises(DataError, match="no step"):
        tokens[::2]
    tokens.require(tokenizer)
    with pytest.raises(DataError, match="is in use"):
        tokens.require(BYTES)


def test_sidecar(tmp_path, tokenizer):
    tokens = write_tokens(DOCS, tokenizer, tmp_path, split="valid", shard_tokens=1000)
    sides = [json.loads(p.read_text()) for p in sorted(tmp_path.glob("*.json"))]
    assert sum(s["tokens"] for s in sides) == len(tokens)
    assert sum(s["documents"] for s in sides) == 60
    assert sum(s["bytes"] for s in sides) == tokens.bytes
    for i, side in enumerate(sides):
        raw = (tmp_path / f"valid-{i:05d}.bin").read_bytes()
        assert side["sha256"] == hashlib.sha256(raw).hexdigest()
        assert side["file"] == f"valid-{i:05d}.bin"
        assert (side["format"], side["dtype"], side["vocab"], side["shards"]) == (1, "uint16", 300, len(sides))
        assert len(raw) == 2 * side["tokens"]
    assert tokens.sha256 == hashlib.sha256("".join(s["sha256"] for s in sides).encode()).hexdigest()


def test_writing_again_replaces_and_splits_live_side_by_side(tmp_path, tokenizer):
    first = write_tokens(DOCS, tokenizer, tmp_path, shard_tokens=100)
    write_tokens(DOCS[:3], tokenizer, tmp_path, split="valid")
    write_tokens(DOCS[:3], tokenizer, tmp_path, split="train-small")
    notes = [tmp_path / "train-1-notes.json", tmp_path / "train-00001.json.bak", tmp_path / "train-000001.bin"]
    for note in notes:
        note.write_text("mine")
    again = write_tokens(DOCS[:10], tokenizer, tmp_path)
    assert [note.read_text() for note in notes] == ["mine"] * 3
    notes[2].unlink()
    assert len(list(tmp_path.glob("train-0*.bin"))) == 1
    assert again.sha256 != first.sha256
    assert write_tokens(DOCS[:10], tokenizer, tmp_path).sha256 == again.sha256
    assert Tokens.open(tmp_path, "valid").sha256 == Tokens.open(tmp_path, "train-small").sha256


def test_a_failed_write_leaves_the_old_split(tmp_path, tokenizer):
    before = write_tokens(DOCS, tokenizer, tmp_path).sha256
    names = sorted(os.listdir(tmp_path))

    def broken():
        yield from DOCS[:5]
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        write_tokens(broken(), tokenizer, tmp_path)
    for nothing in ([], [""]):
        with pytest.raises(DataError, match="no documents"):
            write_tokens(nothing, tokenizer, tmp_path)
    assert sorted(os.listdir(tmp_path)) == names
    assert Tokens.open(tmp_path, verify=True).sha256 == before


def test_wide_vocabularies_use_uint32(tmp_path):
    wide = Tokens.from_array(np.array([0, 65536, 70000]), vocab=70001)
    assert wide[:].tolist() == [0, 65536, 70000]
    assert Tokens.from_array(np.array([65535]), vocab=65536)[0] == 65535


def test_first_tokens_only(tmp_path, tokenizer):
    tokens = write_tokens(DOCS, tokenizer, tmp_path, first=8)
    expected = np.concatenate([[0], *(np.append(tokenizer.encode(d)[:8], 0) for d in DOCS)])
    assert np.array_equal(tokens[:], expected)
    assert tokens.bytes == tokenizer.byte_lengths[expected].sum() < sum(len(d.encode()) for d in DOCS)


def test_write_errors(tmp_path, tokenizer):
    for wrong in ({"shard_tokens": 0}, {"first": 0}):
        with pytest.raises(DataError, match="at least 1"):
            write_tokens(DOCS, tokenizer, tmp_path, **wrong)
    for split in ("", "../up", "a b"):
        with pytest.raises(DataError, match="letters, digits"):
            write_tokens(DOCS, tokenizer, tmp_path, split=split)
    with pytest.raises(DataError, match="not one text"):
        write_tokens("hello", tokenizer, tmp_path)
    raw = json.loads(tokenizer.to_json())
    raw["added_tokens"] = []
    with pytest.raises(DataError, match="neither an end nor a separator"):
        write_tokens(DOCS, Tokenizer.from_json(json.dumps(raw)), tmp_path)


DAMAGE = [
    ("28 bytes|bytes, its sidecar says", lambda f: f["bin"].write_bytes(f["bin"].read_bytes()[:-2])),
    ("bytes, its sidecar says", lambda f: f["bin"].write_bytes(f["bin"].read_bytes() + b"\0")),
    ("sha256 is", lambda f: f["bin"].write_bytes(b"\x07" + f["bin"].read_bytes()[1:])),
    ("outside 0..299", lambda f: f["bin"].write_bytes(b"\xff\xff" + f["bin"].read_bytes()[2:])),
    ("is missing", lambda f: f["bin"].unlink()),
    ("not a json sidecar", lambda f: f["json"].write_text("{")),
    ("not a json sidecar", lambda f: f["json"].write_text("[]")),
    ("tokens is '9'", lambda f: edit(f["json"], tokens="9")),
    ("documents is True", lambda f: edit(f["json"], documents=True)),
    ("sha256 is None or missing", lambda f: edit(f["json"], sha256=None)),
    ("format 2", lambda f: edit(f["json"], format=2)),
    ("dtype 'int64'", lambda f: edit(f["json"], dtype="int64")),
    ("bytes, its sidecar says", lambda f: edit(f["json"], dtype="uint32")),
    ("make no sense", lambda f: edit(f["json"], file="../../etc/passwd")),
    ("make no sense", lambda f: edit(f["json"], tokens=-4)),
    ("written as 9 shards, 1 are there", lambda f: edit(f["json"], shards=9)),
    ("no split 'train' .* it has no token shards", lambda f: f["json"].unlink()),
]


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(("reason", "damage"), DAMAGE, ids=range(len(DAMAGE)))
def test_damage_is_found_when_opened(tmp_path, tokenizer, reason, damage):  # P14, P25
    write_tokens(DOCS, tokenizer, tmp_path)
    damage({"bin": tmp_path / "train-00000.bin", "json": tmp_path / "train-00000.json"})
    with pytest.raises(DataError, match=reason):
        Tokens.open(tmp_path)


def test_shards_that_do_not_belong_together(tmp_path, tokenizer):
    write_tokens(DOCS, tokenizer, tmp_path, shard_tokens=500)
    assert len(list(tmp_path.glob("*.json"))) > 3
    edit(tmp_path / "train-00002.json", tokenizer_sha256="another")
    with pytest.raises(DataError, match=r"train-00002.json: tokenizer_sha256 = 'another', but train-00000.json says"):
        Tokens.open(tmp_path)
    (tmp_path / "train-00001.json").unlink()
    with pytest.raises(DataError, match="shards"):
        Tokens.open(tmp_path)
    write_tokens(DOCS, tokenizer, tmp_path, split="valid")
    with pytest.raises(DataError, match=r"no split 'test' in .*: it has train, valid"):
        Tokens.open(tmp_path, "test")


def test_large_splits_are_sampled_when_opened_and_hashed_when_asked(tmp_path, tokenizer, monkeypatch):  # P14
    monkeypatch.setattr(shards, "CHECKED_AT_OPEN", 0)
    write_tokens(DOCS * 200, tokenizer, tmp_path)
    file = tmp_path / "train-00000.bin"
    raw = bytearray(file.read_bytes())
    raw[2 * 5] ^= 1  # too few to be met by the sample, still below the vocabulary
    file.write_bytes(raw)
    tokens = Tokens.open(tmp_path)
    with pytest.raises(DataError, match="damaged"):
        tokens.verify()
    with pytest.raises(DataError, match="damaged"):
        Tokens.open(tmp_path, verify=True)
    file.write_bytes(b"\xff\xff" * (len(raw) // 2))
    with pytest.raises(DataError, match="sampled"):
        Tokens.open(tmp_path)


def test_every_flipped_bit_is_found(tmp_path, tokenizer):  # P14
    write_tokens(DOCS[:2], tokenizer, tmp_path)
    file = tmp_path / "train-00000.bin"
    good = file.read_bytes()
    for bit in range(0, 8 * len(good), 5):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        file.write_bytes(bad)
        with pytest.raises(DataError):
            Tokens.open(tmp_path)


def test_check_tokens():  # P25
    check_tokens(np.array([], np.int32), 5)
    check_tokens(np.array([0, 4]), 5)
    for ids, reason in (
        ([0, 5], "id 5 at position 1 is outside 0..4"),
        ([3, -1], "id -1 at position 1"),
        ([-100], "id -100"),
        ([2**40], "id 1099511627776"),
    ):
        with pytest.raises(DataError, match=reason):
            check_tokens(np.array(ids), 5)
        with pytest.raises(DataError, match=reason):
            Tokens.from_array(np.array(ids), vocab=5)
    with pytest.raises(DataError, match="float64"):
        check_tokens(np.array([1.0]), 5)
    with pytest.raises(DataError, match="one row"):
        Tokens.from_array(np.zeros((2, 2), int), vocab=5)


# ---- the permutation


@pytest.mark.parametrize("seed", [0, 1, 12345678901234567890])
def test_permutation_is_a_bijection(seed):  # P14
    for n in [*range(1, 301), 997, 1009, 4096, 10007, 65537]:
        assert np.array_equal(np.sort(permute(np.arange(n), n, seed=seed, epoch=n % 3)), np.arange(n)), n


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 2**40), st.integers(0, 2**70), st.integers(0, 10**6))
def test_permutation_of_large_ranges(n, seed, epoch):
    index = np.unique(np.linspace(0, n - 1, 50).astype(np.int64))
    out = permute(index, n, seed=seed, epoch=epoch)
    assert len(np.unique(out)) == len(index)
    assert out.min() >= 0
    assert out.max() < n
    alone = [int(permute(index[i : i + 1], n, seed=seed, epoch=epoch)[0]) for i in range(len(index))]
    assert alone == out.tolist()


@pytest.mark.parametrize("n", [7, 10, 64])
def test_permutation_is_uniform(n):
    """Where index 0 and the pair (0, 1) go over many seeds: chi-square within five deviations of its mean."""
    runs = 150 * n
    out = np.array([permute(np.array([0, 1]), n, seed=s) for s in range(runs)])
    for counts in (np.bincount(out[:, 0], minlength=n), np.bincount((out[:, 1] - out[:, 0]) % n, minlength=n)[1:]):
        expected = runs / len(counts)
        chi = ((counts - expected) ** 2 / expected).sum()
        free = len(counts) - 1
        assert abs(chi - free) < 5 * math.sqrt(2 * free)


def test_permutation_has_no_order_left():
    n = 10_000
    out = permute(np.arange(n), n, seed=4).astype(float)
    assert abs(np.corrcoef(out[:-1], out[1:])[0, 1]) < 0.05
    assert abs(np.corrcoef(np.arange(n), out)[0, 1]) < 0.05
    assert abs(np.corrcoef(out, permute(np.arange(n), n, seed=4, epoch=1))[0, 1]) < 0.05


def test_permutation_is_pinned():
    """Changing it would change every run's data order, and break resuming: not by accident."""
    assert permute(np.arange(6), 1000, seed=1, epoch=2).tolist() == PINNED


PINNED = [587, 529, 395, 938, 322, 858]


# ---- windows


def test_windows_against_the_definition():
    tokens = ramp(103)
    windows = Windows(tokens, batch=4, length=10)
    assert windows.windows == 10
    seen = []
    for step in range(5):
        batch = windows(step)
        assert isinstance(batch, Batch)
        assert batch.weights is batch.positions is batch.segments is None
        assert batch.tokens.dtype == batch.targets.dtype == np.int32
        for row, target, w in zip(batch.tokens, batch.targets, windows.indices(step), strict=True):
            assert row.tolist() == list(range(10 * w, 10 * w + 10))
            assert target.tolist() == list(range(10 * w + 1, 10 * w + 11))
        seen += windows.indices(step).tolist()
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]
    assert windows.epochs(5) == 2.0


@pytest.mark.parametrize("batch", [1, 3, 8, 50])
@pytest.mark.parametrize("n", [1, 2, 7, 13, 100])
def test_each_epoch_visits_each_window_once(n, batch):  # P14
    windows = Windows(ramp(5 * n + 1), batch=batch, length=5, seed=3)
    assert windows.windows == n
    steps = math.lcm(n, batch) // batch
    seen = np.concatenate([windows.indices(s) for s in range(steps)]).reshape(-1, n)
    assert (np.sort(seen, axis=1) == np.arange(n)).all()


def test_the_data_may_be_just_enough():  # P25
    assert Windows(ramp(11), batch=2, length=10)(0).tokens.tolist() == [list(range(10))] * 2
    for n in (0, 1, 10):
        with pytest.raises(DataError, match=f"only {n} tokens: one window of length 10 needs 11"):
            Windows(Tokens.from_array(np.zeros(n, int), vocab=1), batch=2, length=10)
    for wrong in ({"batch": 0}, {"length": 0}, {"seed": -1}):
        with pytest.raises(DataError, match=f"{next(iter(wrong))} = "):
            Windows(ramp(50), **{"batch": 2, "length": 4, **wrong})
    with pytest.raises(DataError, match="step = -1"):
        Windows(ramp(50), batch=2, length=4)(-1)


def test_documents_are_separated():
    ids = np.array([0, 5, 6, 0, 7, 0, 8, 9, 9, 9, 0, 5, 0])
    windows = Windows(Tokens.from_array(ids, vocab=10, end=0), batch=1, length=6, documents=True)
    got = {int(windows.indices(s)[0]): windows(s) for s in range(2)}
    assert got[0].tokens.tolist() == [[0, 5, 6, 0, 7, 0]]
    assert got[0].segments.tolist() == [[1, 1, 1, 2, 2, 3]]
    assert got[0].positions.tolist() == [[0, 1, 2, 0, 1, 0]]
    assert got[0].targets.tolist() == [[5, 6, 0, 7, 0, 8]]
    assert got[1].tokens.tolist() == [[8, 9, 9, 9, 0, 5]]
    assert got[1].segments.tolist() == [[1, 1, 1, 1, 2, 2]]
    assert got[1].positions.tolist() == [[0, 1, 2, 3, 0, 1]]
    assert got[0].segments.dtype == got[0].positions.dtype == np.int32
    with pytest.raises(DataError, match="end token is known"):
        Windows(ramp(50), batch=2, length=4, documents=True)


def test_shards_do_not_show_in_batches(tmp_path, tokenizer):
    one = write_tokens(DOCS, tokenizer, tmp_path / "one")
    many = write_tokens(DOCS, tokenizer, tmp_path / "many", shard_tokens=37)
    for step in range(20):
        for a, b in zip(*(Windows(t, batch=3, length=50, documents=True)(step) for t in (one, many)), strict=True):
            assert (a is None and b is None) or np.array_equal(a, b)


def digest(steps):
    """A hash over many batches of every kind."""
    tokens = Tokens.from_array(np.arange(5000) * 7919 % 97, vocab=97, end=0)
    h = hashlib.sha256()
    for seed, step in steps:
        windows = Windows(tokens, batch=3, length=9, seed=seed, documents=True)
        for batch in (windows(step), Masked(windows, mask=1)(step)):
            for part in batch:
                h.update(b"-" if part is None else part.tobytes())
    return h.hexdigest()


def test_batches_are_the_same_in_another_process_and_in_any_order():  # P14
    rng = np.random.default_rng(0)
    steps = [(int(a), int(b)) for a, b in zip(rng.integers(0, 2**40, 1000), rng.integers(0, 10**7, 1000), strict=True)]
    paths = [str(Path(__file__).parent), str(Path(data.__file__).parents[1])]
    code = f"import json,sys; sys.path[:0] = {paths!r}\nimport test_data; print(test_data.digest(json.load(sys.stdin)))"
    run = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(steps), capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == digest(steps)
    windows = Windows(ramp(500), batch=3, length=7, seed=1)
    forth = [windows(s).tokens for s in range(30)]
    back = [windows(s).tokens for s in reversed(range(30))][::-1]
    assert np.array_equal(forth, back)
    assert not np.array_equal(forth[0], Windows(ramp(500), batch=3, length=7, seed=2)(0).tokens)


def test_describe_names_what_decides_the_batches():  # P14
    base = {"batch": 4, "length": 8, "seed": 0}
    tokens = ramp(200, end=0)
    facts = Windows(tokens, **base).describe()
    assert json.loads(json.dumps(facts)) == facts
    assert facts == Windows(ramp(200, end=0), **base).describe()
    others = [
        Windows(tokens, **{**base, "batch": 5}),
        Windows(tokens, **{**base, "length": 9}),
        Windows(tokens, **{**base, "seed": 1}),
        Windows(tokens, **base, documents=True),
        Windows(ramp(201, end=0), **base),
        Windows(Tokens.from_array(np.arange(200)[::-1].copy(), vocab=200), **base),
        Masked(Windows(tokens, **base), mask=3),
        Masked(Windows(tokens, **base), mask=4),
        Masked(Windows(tokens, **base), mask=3, rate=0.2),
        Masked(Windows(tokens, **base), mask=3, keep=[1]),
        Windows(ramp(199, end=0), **base),
    ]
    seen = [json.dumps(o.describe(), sort_keys=True) for o in others] + [json.dumps(facts, sort_keys=True)]
    assert len(set(seen)) == len(seen)


# ---- masking


def test_masking_is_80_10_10():
    rng = np.random.default_rng(1)
    tokens = Tokens.from_array(rng.integers(0, 1000, 200_001), vocab=1000)
    windows = Windows(tokens, batch=64, length=128)
    masked = Masked(windows, mask=4, keep=range(5))
    chosen = hidden = same = eligible = 0
    drawn = []
    for step in range(20):
        plain, batch = windows(step), masked(step)
        assert np.array_equal(batch.targets, plain.tokens)
        assert batch.segments is None, "a mask of all would be built from it"
        at = batch.weights == 1
        assert ((batch.weights == 0) | at).all()
        assert (batch.tokens[~at] == plain.tokens[~at]).all()
        assert not (plain.tokens[at] < 5).any()
        eligible += (plain.tokens >= 5).sum()
        chosen += at.sum()
        hidden += (batch.tokens[at] == 4).sum()
        same += (batch.tokens[at] == plain.tokens[at]).sum()
        other = at & (batch.tokens != 4) & (batch.tokens != plain.tokens)
        drawn.append(batch.tokens[other])
    drawn = np.concatenate(drawn)
    for share, expected, n in (
        (chosen / eligible, 0.15, eligible),
        (hidden / chosen, 0.8, chosen),
        (same / chosen, 0.1, chosen),
        (len(drawn) / chosen, 0.1, chosen),
    ):
        assert abs(share - expected) < 5 * math.sqrt(expected / n) + 3e-4
    assert 400 < drawn.mean() < 600
    assert drawn.max() > 990
    assert drawn.min() < 10


def test_masks_are_fresh_and_repeatable():
    windows = Windows(ramp(41), batch=4, length=10)  # four windows: every batch is the whole data
    masked = Masked(windows, mask=0)
    assert all(np.array_equal(a, b) for a, b in zip(masked(3), masked(3), strict=True) if a is not None)
    rows = {tuple(np.flatnonzero(masked(s).weights[windows.indices(s) == 0])) for s in range(20)}
    assert len(rows) > 10
    other = Masked(Windows(ramp(41), batch=4, length=10, seed=1), mask=0)
    assert not np.array_equal(other(3).weights, masked(3).weights)


def test_a_batch_always_has_something_to_predict():
    masked = Masked(Windows(ramp(5), batch=1, length=4), mask=0, rate=0.01, keep=[0, 1, 2])
    for step in range(50):
        assert masked(step).weights.tolist() == [[0, 0, 0, 1]]
    none = Masked(Windows(ramp(5), batch=1, length=4), mask=0, keep=range(5))
    assert none(0).weights.sum() == 0
    for wrong, reason in (({"rate": 0.0}, "rate"), ({"mask": 9}, "id 9"), ({"keep": [-1]}, "id -1")):
        with pytest.raises(DataError, match=reason):
            Masked(Windows(ramp(5), batch=1, length=4), **{"mask": 0, **wrong})


def test_masking_keeps_documents_apart():
    ids = np.array([0, 5, 6, 0, 7, 0, 8])
    windows = Windows(Tokens.from_array(ids, vocab=10, end=0), batch=1, length=6, documents=True)
    batch = Masked(windows, mask=1, keep=[0])(0)
    assert batch.segments.tolist() == [[1, 1, 1, 2, 2, 3]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 0]]


# ---- rows


def test_rows_are_berts(tmp_path, tokenizer):
    docs = [*DOCS, "x", "y" * 300]
    for size in (2**27, 41):
        tokens = write_tokens(docs, tokenizer, tmp_path / str(size), shard_tokens=size)
        rows = Rows(tokens, batch=31, length=12, cls=3, sep=4, pad=1)
        assert rows.windows == len(docs)
        for step in range(2):
            batch = rows(step)
            for row, segment, weight, i in zip(
                batch.tokens, batch.segments, batch.weights, rows.indices(step), strict=True
            ):
                inside = tokenizer.encode(docs[i])[:10].tolist()
                expected = [3, *inside, 4]
                pads = 12 - len(expected)
                assert row.tolist() == expected + [1] * pads
                assert segment.tolist() == weight.tolist() == [1] * len(expected) + [0] * pads
        masked = Masked(rows, mask=2, keep=tokenizer.specials.values())(0)
        assert not masked.weights[masked.targets <= 4].any()
        assert masked.weights.sum() > 0
    assert json.dumps(rows.describe())
    for wrong in ({"length": 2}, {"cls": 999}):
        with pytest.raises(DataError):
            Rows(tokens, **{"batch": 2, "length": 12, "cls": 3, "sep": 4, "pad": 1, **wrong})
    with pytest.raises(DataError, match="end token is known"):
        Rows(ramp(50), batch=2, length=12, cls=3, sep=4, pad=1)


# ---- real data


def test_real_stories(tmp_path, shared_data):
    from tinylm.text import documents

    stories = list(documents(shared_data / "tinystories" / "train_v1.txt.gz", limit=400))
    tk = Tokenizer.train(stories, vocab=1024)
    tokens = write_tokens(stories, tk, tmp_path)
    ends = np.flatnonzero(tokens[:] == tk.end)
    assert len(ends) == 401
    for i in (0, 7, 399):
        assert tk.decode(tokens[int(ends[i]) : int(ends[i + 1])]) == stories[i]
    assert 3 < tokens.bytes_per_token < 4.5
    batch = Windows(tokens, batch=8, length=64)(0)
    assert np.array_equal(batch.tokens[:, 1:], batch.targets[:, :-1])


# ---- the scripts


def script(name, *args, fails=False):
    folder = Path(data.__file__).parents[1]
    run = subprocess.run(
        [sys.executable, str(folder / "data_scripts" / f"{name}.py"), *map(str, args)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(folder)},
    )
    assert (run.returncode != 0) == fails, run.stderr
    assert "Traceback" not in run.stderr
    return run.stderr if fails else run.stdout


def hashes(out):
    return [line for line in out.splitlines() if len(line.split("  ")[0]) == 64]


def test_tinystories_script(tmp_path):
    rng = np.random.default_rng(0)
    stories = [" ".join(f"word{w}" for w in rng.integers(0, 99, 30)) for _ in range(60)]
    (tmp_path / "s.txt").write_text("\n<|endoftext|>\n".join([*stories, stories[0], stories[1] + "  "]))
    args = ("--out", tmp_path / "out", "--source", tmp_path / "s.txt", "--vocab", 300, "--share", 0.2)
    first = script("tinystories", *args)
    assert "removed 2 equal" in first
    assert len(hashes(first)) == 6  # two shards, two sidecars, the tokenizer, the provenance
    changed = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    again = script("tinystories", *args)
    assert "up to date" in again
    assert hashes(again) == hashes(first)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()} == changed
    assert hashes(script("tinystories", "--out", tmp_path / "twin", *args[2:]))[0][:64] == hashes(first)[0][:64]
    about = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert about["documents_read"] == 62
    assert about["duplicates"]["exact"] == 2
    assert about["wish"]["sources"][0].startswith("sha256:")
    assert "no file or folder" in script("tinystories", "--out", tmp_path / "x", "--source", "nowhere", fails=True)


def test_wikipedia_script(tmp_path):
    rows = [{"title": f"{i}", "text": f"Article {i} is about the number {i}. " * 9 + "café"} for i in range(60)]
    (tmp_path / "w.jsonl").write_text("\n".join(map(json.dumps, rows)))
    args = ("--out", tmp_path / "out", "--source", tmp_path / "w.jsonl", "--articles", 40, "--vocab", 560)
    first = script("wikipedia", *args, "--first", 20, "--keep-duplicates", "--share", 0.2)
    tokens = [Tokens.open(tmp_path / "out", s) for s in ("train", "valid")]
    assert sum(t.documents for t in tokens) == 40
    for t in tokens:
        assert (np.diff(np.flatnonzero(t[:] == t.end)) == 21).all()
    assert "up to date" in (again := script("wikipedia", *args, "--first", 20, "--keep-duplicates", "--share", 0.2))
    assert hashes(again) == hashes(first)


def test_own_text_script(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("<|endoftext|>".join(f"Train text {i} of {i * 37}" for i in range(40)))
    (tmp_path / "v.jsonl").write_text(
        "\n".join(json.dumps({"text": f"Valid words {i} and {i * 91}"}) for i in range(5))
    )
    wrong = script("own_text", tmp_path / "in", "--limit", -1, "--out", tmp_path / "out", fails=True)
    assert wrong == "own_text.py: limit = -1: must be at least 0 or None\n"
    script("own_text", tmp_path / "in", "--valid", tmp_path / "v.jsonl", "--out", tmp_path / "out", "--kind", "byte")
    train, valid = (Tokens.open(tmp_path / "out", s) for s in ("train", "valid"))
    assert (train.documents, valid.documents, train.vocab) == (40, 5, 261)
    assert train.bytes_per_token == 1.0


def test_a_begin_token_of_its_own_opens_every_document(tmp_path):
    foreign = Tokenizer.from_json(BYTES.to_json().replace('"<|endoftext|>"', '"<s>"').replace('"<|pad|>"', '"</s>"'))
    unmasked = Tokenizer.from_json(foreign.to_json().replace('"<|mask|>"', '"<x>"'))
    tokens = write_tokens(["a", "b"], unmasked, tmp_path)
    assert tokens[:].tolist() == [1, 0, *BYTES.encode("a"), 1, 0, *BYTES.encode("b"), 1]
    assert (tokens.begin, tokens.end, tokens.bytes_per_token) == (0, 1, 1.0)
    batch = Windows(tokens, batch=1, length=6, documents=True)(0)  # each segment starts at its begin token
    assert (batch.segments.tolist(), batch.positions.tolist()) == ([[1, 2, 2, 2, 3, 3]], [[0, 0, 1, 2, 0, 1]])
    rows = Rows(tokens, batch=2, length=4, cls=3, sep=4, pad=2)(0)
    assert sorted(rows.tokens.tolist()) == sorted([3, *BYTES.encode(text), 4, 2] for text in "ab")
    assert write_tokens(["a"], BYTES, tmp_path).begin is None
