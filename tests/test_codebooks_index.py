"""The index's parts against brute force, on many random corpora: windows, and codes turned into postings."""

import numpy as np
import pytest

import tinylm
from tinylm.codebooks import CodebookError, Explorer, Index
from tinylm.codebooks import index as index_room


@pytest.mark.parametrize("seed", range(20))
def test_windows_read_every_position_once(seed):
    rng = np.random.default_rng(seed)
    context = int(rng.integers(2, 12))
    stride = int(rng.integers(1, context + 1))
    ids = rng.integers(0, 6, int(rng.integers(1, 120)))
    tokens = tinylm.Tokens.from_array(ids, vocab=6, end=0)
    starts = sorted({0, *np.flatnonzero(ids == 0).tolist()})
    seen = np.zeros(len(ids), int)
    for at, stop, new in index_room.windows(tokens, context, stride):
        assert at <= new < stop <= at + context
        seen[new:stop] += 1
        document = starts[np.searchsorted(starts, new, side="right") - 1]
        assert document <= at  # no window begins in another document, and none goes on into one
        assert not (ids[at + 1 : stop] == 0).any()
        assert new == document or new - at >= context - stride  # what was read before it, at least
    assert (seen == 1).all()


@pytest.mark.parametrize("seed", range(20))
def test_postings_are_the_codes_turned_round(seed, tmp_path, monkeypatch):
    rng = np.random.default_rng(seed)
    monkeypatch.setattr(index_room, "BLOCK", int(rng.integers(1, 50)))
    n, codes = int(rng.integers(1, 200)), int(rng.integers(1, 20))
    k = int(rng.integers(1, min(codes, 4) + 1))
    notes = np.array([rng.permutation(codes)[:k] for _ in range(n)], np.uint16)
    made = index_room._turned(tmp_path, "x.0", notes, codes)
    offsets, postings = made["x.0.offsets"], made["x.0.postings"]
    for code in range(codes):
        expected = np.flatnonzero((notes == code).any(1))
        np.testing.assert_array_equal(postings[offsets[code] : offsets[code + 1]], expected)


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"format": "other"}', "\xff", '{"format": 1, "files": 3}'])
def test_what_is_no_index(tmp_path, text):
    (tmp_path / "index.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CodebookError, match="index"):
        Index(tmp_path)


def test_the_explorer_needs_a_tokenizer():
    class Bare:
        tokenizer = None

    with pytest.raises(CodebookError, match="no tokenizer"):
        Explorer(Bare(), None)
