import itertools
import math
import random
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tinylm.text import documents, split
from tinylm.tokenizer import Tokenizer
from tinylm.yardsticks import EvaluationError, KneserNey, baselines, frame


class Bytes:
    """One token per byte; ids are the bytes, and NUL, which no test text holds, ends a document."""

    vocab, end = 256, 0

    def encode(self, text):
        return np.frombuffer(text.encode(), np.uint8)

    def decode_bytes(self, ids):
        return bytes(ids.tolist())


# --- the account ------------------------------------------------------------------------------------------------------


def test_a_document_is_framed_by_its_end_and_counted_in_raw_bytes():
    framed, sizes = frame(["ab", "é"], Bytes())
    assert [doc.tolist() for doc in framed] == [[0, 97, 98, 0], [0, 0xC3, 0xA9, 0]]
    assert sizes.tolist() == [2, 2]  # bytes, not characters
    assert {doc.dtype for doc in framed} == {np.dtype(np.int32)}


def test_a_foreign_start_and_end():
    (doc,), _ = frame(["a"], Bytes(), start=1, end=2)
    assert doc.tolist() == [1, 97, 2]


def fake(ids=(1,), back="a", **more):
    return SimpleNamespace(
        **{"encode": lambda text: list(ids), "decode": lambda ids: back, "vocab": 9, "end": 0} | more
    )


@pytest.mark.parametrize(
    ("documents", "tokenizer", "message"),
    [
        ([], Bytes(), "no document"),
        (["a", ""], Bytes(), "document 1 is empty"),
        (["\ud800"], Bytes(), "not valid Unicode"),
        (["a"], fake(end=None), "pass end=ID"),
        (["a"], fake(ids=[9]), r"id 9, and the vocabulary is 0\.\.8"),
        (["a"], fake(ids=[-1]), "id -1"),
        (["A"], fake(), "lossy=True"),
    ],
)
def test_what_cannot_be_scored_is_refused(documents, tokenizer, message):
    with pytest.raises(EvaluationError, match=message):
        frame(documents, tokenizer)


def test_a_lossy_tokenizer_passes_when_asked_for():
    (doc,), sizes = frame(["A"], fake(), lossy=True)
    assert doc.tolist() == [0, 1, 0]
    assert sizes.tolist() == [1]


# --- Kneser-Ney -------------------------------------------------------------------------------------------------------


def test_a_bigram_worked_out_by_hand():
    """One document 1 2 over 4 ids: too little for estimated discounts, so a count of 1 loses 0.5.

    Unigrams: 1, 2 and end each follow one other token: (1 - 0.5) / 3 + 1.5 / 3 * 1 / 4 = 7/24; id 3 gets 1/8.
    Bigrams: p(1 | start) = (1 - 0.5) / 1 + 0.5 * 7/24 = 31/48, and so on along the document.
    """
    model = KneserNey([np.array([0, 1, 2, 0])], 4, order=2)
    seen, unseen = model.logprobs([np.array([0, 1, 2, 0]), np.array([0, 3, 0])])
    assert np.exp(seen) == pytest.approx([31 / 48] * 3)
    assert np.exp(unseen) == pytest.approx([0.5 * 1 / 8, 7 / 24])  # nothing ever followed 3: the unigram


class Slow:
    """The definition, token by token, over tuples: the twin of KneserNey."""

    def __init__(self, documents, vocab, order):
        raw = {n: Counter() for n in range(1, order + 1)}
        first = Counter()
        for doc in documents:
            for n, i in itertools.product(raw, range(len(doc))):
                if i >= 1 and i - n + 1 >= 0:
                    gram = tuple(doc[i - n + 1 : i + 1])
                    raw[n][gram] += 1
                    first[gram] += i - n + 1 == 0
        self.counts, self.vocab, self.order = {order: raw[order]}, vocab, order
        for n in range(1, order):
            lefts = Counter(longer[1:] for longer in raw[n + 1])
            self.counts[n] = Counter({g: c if first[g] else lefts[g] for g, c in raw[n].items()})
        self.discount = {n: self.discounts(self.counts[n].values()) for n in raw}

    @staticmethod
    def discounts(counts):
        n1, n2, n3, n4 = (sum(c == k for c in counts) for k in (1, 2, 3, 4))
        if n1 and n2 and n3:
            y = n1 / (n1 + 2 * n2)
            found = (0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
            if min(found[1:]) > 0:
                return found
        return 0, 0.5, 1, 1.5

    def p(self, word, context):
        below = 1 / self.vocab if not context else self.p(word, context[1:])
        n = len(context) + 1
        followers = {g[-1]: c for g, c in self.counts[n].items() if g[:-1] == context}
        if not followers:
            return below if context else 1 / self.vocab
        total, taken = sum(followers.values()), {w: self.discount[n][min(c, 3)] for w, c in followers.items()}
        own = followers.get(word, 0) - taken.get(word, 0)
        return (own + sum(taken.values()) * below) / total

    def logprobs(self, doc):
        return [math.log(self.p(doc[i], tuple(doc[max(0, i - self.order + 1) : i]))) for i in range(1, len(doc))]


DOCUMENT = st.lists(st.integers(1, 3), max_size=12).map(lambda words: [0, *words, 0])


NOTHING_TAKEN = [
    [0, 1, 2, 3, 1, 3, 0],
    [0, 3, 2, 2, 3, 1, 1, 1, 1, 2, 2, 3, 2, 0],
    [0, 3, 1, 3, 0],
    [0, 1, 2, 3, 1, 3, 0],
    [0, 1, 1, 1, 2, 3, 1, 3, 3, 0],
]


@settings(deadline=None)
@example(NOTHING_TAKEN, [[0, 1, 0]], 2)  # the estimated discount of a count of 2 is exactly 0
@given(st.lists(DOCUMENT, min_size=1, max_size=25), st.lists(DOCUMENT, min_size=1, max_size=4), st.integers(1, 5))
def test_it_is_the_definition(train, valid, order):
    fast = KneserNey([np.array(doc) for doc in train], 5, order).logprobs([np.array(doc) for doc in valid])
    slow = Slow(train, 5, order)
    for doc, logp in zip(valid, fast, strict=True):
        np.testing.assert_allclose(logp, slow.logprobs(doc), rtol=1e-10)


def corpus(documents, seed):
    """Texts over the words 1..9 with some order in them, the same in every version of Python."""
    rng = random.Random(seed).random
    told = []
    for _ in range(documents):
        words = [1 + int(9 * rng())]
        while rng() > 0.12:
            words.append((words[-1] * (1, 2, 2, 3)[int(4 * rng())] + int(2 * rng())) % 9 + 1)
        told.append(np.array([0, *words, 0]))
    return told


@settings(deadline=None)
@given(context=st.lists(st.integers(0, 10), min_size=1, max_size=6))
def test_every_distribution_sums_to_one(context):
    model = KneserNey(corpus(80, 1), 11)
    p = [math.exp(model.logprobs([np.array([*context, word])])[0][-1]) for word in range(11)]
    assert min(p) > 0
    assert sum(p) == pytest.approx(1)


KENLM = np.fromstring(
    """
    -1.1754451 -0.3384875 -0.4481045 -0.6945909 -0.9561597 -0.9154760 -0.2632480 -0.9130011 -1.0539350
    -0.4024103 -0.8417367 -0.9684113 -0.7771957 -0.3384424 -0.8473999 -1.5164150 -0.6830835 -0.7146597
    -1.0914979 -1.5164150 -0.7147541 -0.9258630 -1.3234165 -0.9407865 -0.7017862 -0.8939586 -0.4697940
    -0.5590066 -0.3791278 -0.6927955 -0.3218980 -0.6349075 -0.9146288 -0.6486751 -0.3838978 -1.0002986
    -0.7214494 -0.2256319 -0.6981415 -0.9818575 -1.3661546 -0.5644957 -0.4342540 -0.4251479 -0.8051727
    -1.0002986 -0.7346157 -0.8241078 -0.6208457 -0.7829889 -0.9079730 -1.1776662 -0.6479126 -0.7741603
    -0.9415370 -1.4397979 -0.7432933 -1.5785395 -1.0494287 -1.0099995 -0.8556786 -1.0230533 -0.9200835
    -0.9432820 -1.0002986 -0.7346157
    """,
    sep=" ",
)


def test_it_agrees_with_kenlm():
    """log10 of each token under `lmplz -o 4 --discount_fallback` (KenLM, built from source), which falls back at orders
    1 and 2 here and estimates its discounts at 3 and 4. KenLM counts <unk> as a word, hence 11 ids. (It takes the last
    n-gram of each order at its raw count when it estimates discounts; on this corpus that changes nothing.)"""
    model = KneserNey(corpus(80, 5), 11, order=4)
    logp = np.concatenate(model.logprobs(corpus(6, 2)))
    np.testing.assert_allclose(logp / math.log(10), KENLM, atol=1e-6)


def test_documents_shorter_than_the_order():
    model = KneserNey([np.array([0, 1, 0])], 3, order=5)
    np.testing.assert_allclose(
        model.logprobs([np.array([0, 1, 2, 1, 2, 1, 0])])[0], Slow([[0, 1, 0]], 3, 5).logprobs([0, 1, 2, 1, 2, 1, 0])
    )


def test_ids_beyond_the_vocabulary_are_refused():
    model = KneserNey([np.array([0, 1, 0])], 3)
    with pytest.raises(EvaluationError, match="id 3"):
        model.logprobs([np.array([0, 3, 0])])


def test_it_finds_the_entropy_of_a_markov_chain():
    rng = np.random.default_rng(0)
    chain = rng.dirichlet(np.full(20, 0.3), size=20)
    walks = np.empty((60, 1002), int)
    walks[:, 0] = 0
    for t in range(1, 1002):
        walks[:, t] = (chain[walks[:, t - 1]].cumsum(1) > rng.random((60, 1))).argmax(1)
    train, valid = list(walks[:50]), list(walks[50:])
    true = -np.mean([np.log(chain[doc[:-1], doc[1:]]).mean() for doc in valid])
    nats = {n: -np.mean([logp.mean() for logp in KneserNey(train, 20, n).logprobs(valid)]) for n in (1, 2, 5)}
    assert true < nats[2] < true * 1.01
    assert nats[2] < nats[5] < nats[2] * 1.25  # pays for contexts that tell it nothing
    assert nats[1] > 1.3 * true


# --- compressors, and all of them -------------------------------------------------------------------------------------


def noise(size, seed):
    return "".join(random.Random(seed).choices("0123456789abcdef", k=size))


def test_compressors_cannot_beat_entropy_and_find_repeats():
    """Hexadecimal noise holds 4 bits per byte; a text that xz saw in training is almost free."""
    text, other = noise(20_000, 0), noise(20_000, 1)
    got = baselines([text], [other], Bytes(), names=["gzip", "xz", "xz_given_train"])
    assert all(4 <= bits < 4.8 for bits in got.values())
    assert baselines([other, text], [text], Bytes(), names=["xz_given_train"])["xz_given_train"] < 0.1


def test_all_baselines_on_one_account():
    train, valid = ["the cat sat on the mat. the dog sat on the cat."] * 20, ["the dog sat on the mat."]
    got = baselines(train, valid, Bytes())
    assert list(got) == ["unigram", "bigram", "kneser_ney_5", "gzip", "xz", "xz_given_train"]
    assert got["unigram"] > got["bigram"] > got["kneser_ney_5"] > 0
    framed, sizes = frame(valid, Bytes())
    known, _ = frame(train, Bytes())
    assert got["bigram"] == KneserNey(known, 256, 2).bits(framed).sum() / sizes.sum()


def test_on_tinystories(shared_data):
    """The order everyone knows, and figures that move only with the estimator, the tokenizer or the text."""
    train, valid = split(documents(shared_data / "tinystories" / "train_v1.txt.gz"), valid=0.1)
    got = baselines(train, valid, Tokenizer.train(train, vocab=1024), names=["unigram", "bigram", "kneser_ney_5"])
    assert got == pytest.approx({"unigram": 2.744, "bigram": 1.661, "kneser_ney_5": 1.312}, abs=0.02)


def test_an_unknown_baseline_is_refused():
    with pytest.raises(EvaluationError, match="gzipp; known: unigram"):
        baselines(["a"], ["a"], Bytes(), names=["gzipp"])
