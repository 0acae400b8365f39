import functools
import importlib
import json
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from tinylm.config import ModelConfig
from tinylm.evaluation import (
    EvaluationError,
    bootstrap,
    compare,
    diversity,
    evaluate,
    evaluate_floor,
    evaluation,
    excess,
    score,
    token_logprobs,
)
from tinylm.model import Transformer
from tinylm.world import World
from tinylm.yardsticks import KneserNey, frame

room = importlib.import_module("tinylm.evaluation")  # `from tinylm import evaluate` is the function


class Letters:
    """Tokens are the given strings, taken greedily; the last id ends a document."""

    def __init__(self, *pieces):
        self.pieces, self.vocab, self.end = pieces, len(pieces) + 1, len(pieces)

    def encode(self, text):
        ids = []
        while text:
            ids.append(next(i for i, piece in enumerate(self.pieces) if text.startswith(piece)))
            text = text[len(self.pieces[ids[-1]]) :]
        return np.array(ids, np.int32)

    def decode_bytes(self, ids):
        return "".join(self.pieces[i] for i in ids).encode()


class Bytes:
    """Ids are bytes; NUL, which no test text holds, ends a document."""

    vocab, end = 256, 0

    def encode(self, text):
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def decode_bytes(self, ids):
        return bytes(ids.tolist())


ABCD = Letters("a", "b", "c", "d")


def texts(number, longest, seed=0):
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(list("abcd"), size=rng.integers(1, longest))) for _ in range(number)]


def tiny(**changes):
    sizes = {"vocab": 5, "context": 24, "width": 16, "layers": 2, "heads": 2, "init_std": 0.4}
    return Transformer(ModelConfig(**sizes | changes), rngs=1)


# --- closed forms -----------------------------------------------------------------------------------------------------


def test_a_uniform_byte_model_pays_8_bits_a_byte_and_8_for_the_end():
    got = score(["ab", "é", "x" * 100], Bytes(), lambda tokens: np.zeros((*tokens.shape, 256)), context=16)
    assert (got.bytes, got.tokens, got.documents) == (104, 107, 3)
    assert got.bits_per_byte == pytest.approx(8 * 107 / 104)
    assert got.nats_per_token == pytest.approx(math.log(256))
    assert got.document_bits == pytest.approx([24, 24, 808])
    assert got.document_bytes.tolist() == [2, 2, 100]


@settings(deadline=None)
@given(st.lists(st.text("abcd", min_size=1, max_size=70), min_size=1, max_size=9), st.integers(1, 40))
def test_a_bigram_model_is_scored_exactly(documents, context):
    table = np.random.default_rng(0).normal(size=(5, 5))
    logp = table - np.log(np.exp(table).sum(1, keepdims=True))
    bits = 0.0
    for text in documents:
        before = "abcd$".index("$")
        for letter in text + "$":
            bits -= logp[before, "abcd$".index(letter)] / math.log(2)
            before = "abcd$".index(letter)
    got = score(documents, ABCD, lambda tokens: table[tokens], context=context)
    assert got.bits_per_byte == pytest.approx(bits / sum(map(len, documents)))
    assert got.tokens == sum(len(text) + 1 for text in documents)


def test_one_distribution_through_two_tokenizers_costs_the_same():
    """Each letter, and the end, has 1/5. In pairs: a pair 1/25, the end 1/5, and 4/25 left on a piece never used."""
    documents = ["abcd", "ddcb", "ab" * 40]
    pairs = Letters(*(a + b for a in "abcd" for b in "abcd"), "?")
    row = np.log(np.array([1 / 25] * 16 + [4 / 25, 1 / 5]))
    one = score(documents, ABCD, lambda tokens: np.zeros((*tokens.shape, 5)), context=32)
    two = score(documents, pairs, lambda tokens: np.broadcast_to(row, (*tokens.shape, 18)), context=32)
    assert one.bits_per_byte == pytest.approx(math.log2(5) * (88 + 3) / 88)
    assert two.bits_per_byte == pytest.approx(one.bits_per_byte)
    assert two.nats_per_token > one.nats_per_token  # which is why loss per token is no headline
    assert compare(one, two).bits_per_byte == pytest.approx(0)


# --- windows ----------------------------------------------------------------------------------------------------------


def digest(tokens, targets):
    """A stand-in for a causal model: a value that depends on all of the left context, its order, and the target."""
    hashed, found = np.zeros(len(tokens), np.int64), np.empty(tokens.shape)
    for t in range(tokens.shape[1]):
        hashed = (hashed * 31 + tokens[:, t] + 7) % 1_000_003
        found[:, t] = (hashed * 17 + targets[:, t]) % 997
    return found


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 90), min_size=1, max_size=5), st.integers(1, 50), st.integers(1, 50), st.integers(1, 5))
def test_windows_score_each_token_once_with_the_stated_context(lengths, context, stride, batch):
    stride = min(stride, context)
    rng = np.random.default_rng(sum(lengths))
    framed = [np.array([0, *rng.integers(1, 9, size=length), 0], np.int32) for length in lengths]
    got = token_logprobs(framed, digest, context=context, stride=stride, batch=batch)
    for ids, row in zip(framed, got, strict=True):
        slow = []
        for j in range(len(ids) - 1):
            window = max(0, math.ceil((j + 1 - context) / stride))  # the first that reaches it
            left = ids[window * stride : j + 1]
            assert len(left) == j + 1 or context - stride < len(left) <= context
            slow.append(digest(left[None], np.full((1, len(left)), ids[j + 1]))[0, -1])
        np.testing.assert_array_equal(row, slow)


def test_few_shapes_are_compiled():
    shapes = set()

    def spy(tokens, targets):
        shapes.add(tokens.shape)
        return np.zeros(tokens.shape)

    rng = np.random.default_rng(0)
    token_logprobs([np.zeros(n, np.int32) for n in rng.integers(2, 900, size=500)], spy, context=256, batch=8)
    assert shapes <= {(64, 32), (32, 64), (16, 128), (8, 256)}
    shapes.clear()
    token_logprobs([np.zeros(20, np.int32)], spy, context=1024, batch=16)
    assert shapes == {(1, 32)}  # one short text is not padded to a full batch
    shapes.clear()
    token_logprobs([np.zeros(n, np.int32) for n in [20] * 100 + [200] * 30], spy, context=256, batch=8)
    assert shapes == {(64, 32), (8, 256)}  # short texts do not pay for long ones
    shapes.clear()
    token_logprobs([np.zeros(n, np.int32) for n in [20] * 7 + [200] * 30], spy, context=256, batch=8)
    assert shapes == {(8, 256)}  # nor are too few of them worth a compilation


@pytest.mark.parametrize(("context", "stride", "batch"), [(0, None, 1), (8, 0, 1), (8, 9, 1), (8, 4, 0)])
def test_windows_out_of_range(context, stride, batch):
    with pytest.raises(EvaluationError, match="1 <= stride <= context"):
        token_logprobs([np.zeros(3, np.int32)], digest, context=context, stride=stride, batch=batch)


# --- the kit's own model ----------------------------------------------------------------------------------------------


def test_it_agrees_with_the_model_asked_one_token_at_a_time():
    model, documents = tiny(context=6, layers=1), ["abcd", "abcd" * 7]
    asked = jax.jit(lambda tokens: model(tokens))
    got = evaluate(model, documents, tokenizer=ABCD, stride=4)
    for text, bits in zip(documents, got.document_bits, strict=True):
        ids, nats = [4, *ABCD.encode(text), 4], 0.0
        for j in range(len(ids) - 1):
            window = max(0, math.ceil((j + 1 - 6) / 4))
            logits = np.asarray(asked(jnp.array([ids[window * 4 : j + 1]])), np.float64)[0, -1]
            nats -= logits[ids[j + 1]] - np.log(np.exp(logits).sum())
        assert bits == pytest.approx(nats / math.log(2), rel=1e-5)


@pytest.mark.parametrize("changes", [{}, {"positions": "learned", "window": 5}, {"vocab": 64}])
def test_batches_buckets_and_order_change_nothing(changes):
    model, documents = tiny(**{"context": 40, "layers": 1} | changes), texts(23, 90)
    got = evaluate(model, documents, tokenizer=ABCD, batch=16)
    for again in (
        evaluate(model, documents, tokenizer=ABCD, batch=1),
        evaluate(model, iter(documents), tokenizer=ABCD, batch=5),
        score(documents, ABCD, jax.jit(lambda tokens: model(tokens)), context=40),
    ):
        assert again.document_bits == pytest.approx(got.document_bits, rel=1e-6)
    turned = evaluate(model, documents[::-1], tokenizer=ABCD)
    assert turned.document_bits[::-1] == pytest.approx(got.document_bits, rel=1e-6)
    alone = [evaluate(model, [text], tokenizer=ABCD).document_bits[0] for text in documents[:2]]
    assert alone == pytest.approx(got.document_bits[:2], rel=1e-6)


def test_a_later_token_never_changes_an_earlier_score():
    model = tiny()
    framed, changed = ([np.array([4, 0, 1, 2, last, 4], np.int32)] for last in (0, 3))
    state = functools.partial(room._model_logprobs, *nnx.split(model))
    one, two = (token_logprobs(f, state, context=24)[0] for f in (framed, changed))
    np.testing.assert_allclose(one[:3], two[:3], rtol=1e-6)
    assert abs(one[3] - two[3]) > 1e-3


def test_a_file_is_read_and_limited(tmp_path):
    path = tmp_path / "stories.txt"
    path.write_text("abc\n<|endoftext|>\ndd\n<|endoftext|>\ncab")
    model = tiny()
    assert evaluate(model, path, tokenizer=ABCD).document_bytes.tolist() == [3, 2, 3]
    assert evaluate(model, str(path), tokenizer=ABCD, limit=2).documents == 2


def test_the_models_own_tokenizer_is_the_default():
    model = tiny()
    model.tokenizer = ABCD
    assert evaluate(model, ["ab"]).tokens == 3
    assert evaluate(model, ["ab"], tokenizer=ABCD).tokens == 3
    with pytest.raises(EvaluationError, match="another tokenizer"):
        evaluate(model, ["ab"], tokenizer=Letters("b", "a", "c", "d"))


@pytest.mark.parametrize(
    ("model", "source", "options", "message"),
    [
        (SimpleNamespace(config=ModelConfig(kind="encoder")), ["a"], {"tokenizer": ABCD}, "masked tokens"),
        (tiny(), ["a"], {}, "pass tokenizer="),
        (tiny(vocab=4), ["a"], {"tokenizer": ABCD}, "5 ids, the model 4"),
        (tiny(vocab=500), ["a"], {"tokenizer": ABCD}, "5 ids, the model 500"),
        (tiny(), ["a"], {"tokenizer": ABCD, "context": 25}, "longer than the model's 24"),
        (tiny(), [], {"tokenizer": ABCD}, "no text to score"),
        (tiny(), "nowhere.txt", {"tokenizer": ABCD}, "no file or folder .nowhere.txt"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(model, source, options, message):
    with pytest.raises(EvaluationError, match=message):
        evaluate(model, source, **options)


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(EvaluationError, match="it is empty"):
        evaluate(tiny(), tmp_path / "empty.txt", tokenizer=ABCD)


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (lambda tokens: np.zeros((*tokens.shape, 3)), "id 4 has no logit among 3"),
        (lambda tokens: np.zeros(tokens.shape), r"must be \(B, T, V\)"),
        (lambda tokens: np.full((*tokens.shape, 5), np.nan), "document 0, prediction 0: log-probability nan"),
        (lambda tokens: np.log(np.arange(5.0)) + np.zeros((*tokens.shape, 1)), "log-probability -inf"),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_logits_that_cannot_be_right(logits, message):
    with pytest.raises(EvaluationError, match=message):
        score(["ab"], ABCD, logits, context=8)


# --- intervals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("documents", [8, 60])
def test_the_interval_covers_the_truth_19_times_in_20(documents, monkeypatch):
    """Documents of log-normal length whose rate varies and falls with length; the truth is E[bits] / E[bytes]."""
    monkeypatch.setattr(room, "RESAMPLES", 600)
    rng = np.random.default_rng(1)

    def draw(n):
        size = rng.lognormal(6, 0.4, n)
        return size * (1 + 0.15 * rng.normal(size=n)) + 40, size

    bits, size = draw(1_000_000)
    truth, hits = bits.sum() / size.sum(), 0
    for trial in range(1000):
        low, high = bootstrap(*draw(documents), seed=trial)
        hits += low <= truth <= high
    assert 925 <= hits <= 975


def test_the_interval_is_seeded_and_needs_two_documents():
    bits, sizes = np.random.default_rng(0).normal(9, 1, size=20), np.arange(4, 24)
    assert bootstrap(bits, sizes, seed=3) == bootstrap(bits, sizes, seed=3) != bootstrap(bits, sizes, seed=4)
    low, high = bootstrap(np.array([3.0, 6.0]), np.array([1, 2]))
    assert low == pytest.approx(3)
    assert high == pytest.approx(3)
    one = evaluation(["abc"], [6.0])
    assert one.ci95 is None
    assert "two documents" in one.to_dict()["ci95_reason"]


def test_pairs_see_a_gap_that_single_intervals_hide():
    rng = np.random.default_rng(0)
    documents, hard = ["x" * 100] * 50, rng.normal(300, 60, 50)
    worse, better = evaluation(documents, hard + 2 + rng.normal(0, 3, 50)), evaluation(documents, hard)
    gap = compare(worse, better)
    assert worse.ci95[0] < better.bits_per_byte < worse.ci95[1]
    assert gap.significant
    assert gap.ci95[0] < 0.02 < gap.ci95[1]
    assert compare(better, worse).bits_per_byte == -gap.bits_per_byte
    assert not compare(better, better).significant


def test_scores_of_different_texts_are_not_compared():
    with pytest.raises(EvaluationError, match="different texts"):
        compare(evaluation(["ab", "c"], [1.0, 1.0]), evaluation(["c", "ab"], [1.0, 1.0]))


def test_an_ngram_model_compares_with_a_transformer():
    documents = texts(20, 40)
    framed, _ = frame(documents, ABCD)
    bigram = evaluation(documents, KneserNey(framed, 5, 2).bits(framed), tokens=sum(len(f) - 1 for f in framed))
    assert compare(evaluate(tiny(), documents, tokenizer=ABCD), bigram).bits_per_byte > 0.5


def test_a_score_goes_to_json():
    got = score(["ab", "cd"], ABCD, lambda tokens: np.zeros((*tokens.shape, 5)), context=8)
    raw = json.loads(json.dumps(got.to_dict()))
    assert {"bits_per_byte", "ci95", "nats_per_token", "bytes", "tokens", "documents"} <= set(raw)
    assert raw["ci95"] == pytest.approx([1.5 * math.log2(5)] * 2)
    assert "document_bits" not in raw
    assert "3.4829 bits/byte [3.4829, 3.4829], 1.6094 nats/token, 4 bytes, 2 documents" in repr(got)


# --- the floor --------------------------------------------------------------------------------------------------------


class Coin:
    """A world that tells letters a to d with 1/5 each, and ends with 1/5."""

    def logprob(self, text):
        return -(len(text) + 1) * math.log(5) if set(text) <= set("abcd") else -math.inf


def test_a_perfect_model_has_no_excess_and_another_pays_its_divergence():
    documents = texts(40, 60)
    floor = evaluate_floor(Coin(), [SimpleNamespace(text=text) for text in documents])
    perfect = score(documents, ABCD, lambda tokens: np.zeros((*tokens.shape, 5)), context=16)
    assert floor.bits_per_byte == pytest.approx(perfect.bits_per_byte)
    assert floor.nats_per_token is None
    assert excess(perfect, floor).bits_per_byte == pytest.approx(0)
    skew = np.log(np.array([0.1, 0.1, 0.1, 0.1, 0.6]))
    wrong = score(documents, ABCD, lambda tokens: np.broadcast_to(skew, (*tokens.shape, 5)), context=16)
    size, ends = sum(map(len, documents)), len(documents)
    gap = excess(wrong, floor)
    assert gap.bits_per_byte == pytest.approx((size * math.log2(2) - ends * math.log2(3)) / size)
    assert gap.significant


def test_the_floor_of_a_real_world_is_its_entropy():
    world = World(mode="bigram", words=8, length=12)
    floor = evaluate_floor(world, world.stories(200))
    assert floor.bits_per_byte == pytest.approx(world.floor(200).bits_per_byte)
    assert floor.ci95[0] < world.exact_floor().bits_per_byte < floor.ci95[1]


def test_a_text_the_world_cannot_tell_has_no_floor():
    with pytest.raises(EvaluationError, match="cannot tell story 1"):
        evaluate_floor(Coin(), ["ab", "xy"])


# --- diversity --------------------------------------------------------------------------------------------------------


def test_diversity_by_hand():
    got = diversity(["The cat sat. The cat sat. The cat!", "Don't sit!"])
    assert (got["texts"], got["words"]) == (2, 10)
    assert got["distinct_1"] == 5 / 10  # the cat sat don't sit
    assert got["distinct_2"] == 4 / 8  # the-cat cat-sat sat-the | don't-sit
    assert got["distinct_3"] == 3 / 6
    assert got["distinct_4"] == 3 / 5
    assert got["repeated_4gram"] == pytest.approx(2 / 5)


def test_repeats_count_inside_a_text_only():
    assert diversity(["one two three four"] * 3)["repeated_4gram"] == 0
    assert diversity(["one two three four"] * 3)["distinct_4"] == pytest.approx(1 / 3)
    assert diversity(["go " * 100])["repeated_4gram"] == pytest.approx(96 / 97)


def test_diversity_of_too_little_and_of_equal_lengths():
    assert diversity(["one two"])["repeated_4gram"] is None
    assert diversity([])["distinct_1"] is None
    assert diversity(["a b c d e", "f g"], words=2)["words"] == 4


def test_a_foreign_tokenizer_frames_by_its_own_begin_and_end():
    """A space that encoding puts in front is no loss: decoding takes it away again."""
    foreign = Letters(" a", "b", "<s>")
    foreign.begin, foreign.prefix = 2, b" "
    foreign.encode_batch = lambda texts: [foreign.encode(f" {text}") for text in texts]
    framed, sizes = frame(["ab", "abb"], foreign)
    assert [ids.tolist() for ids in framed] == [[2, 0, 1, 3], [2, 0, 1, 1, 3]]
    assert sizes.tolist() == [2, 3]
    assert frame(["ab"], foreign, end=1)[0][0].tolist() == [1, 0, 1, 1]
    foreign.prefix = b""
    with pytest.raises(EvaluationError, match="does not come back"):
        frame(["ab"], foreign)
