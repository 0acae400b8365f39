"""Sets, heads, fine-tuning and figures of classification, against NumPy written out and worked examples."""

import gzip
import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_model import NumpyModel, random_params

from tinylm import classification as room
from tinylm.classification import (
    PROTOCOLS,
    Dataset,
    SetError,
    calibration,
    classified,
    classify,
    classify_many,
    confusion_matrix,
    evaluate_classes,
    macro_f1,
    masked_texts,
    read_set,
    scores,
    settle,
    snapshots,
    wilson,
    with_classes,
)
from tinylm.classification.sets import marked, rows_of
from tinylm.config import ConfigError, ModelConfig, TrainConfig
from tinylm.data import DataError, Labelled
from tinylm.evaluation import EvaluationError
from tinylm.model import Transformer, shapes
from tinylm.parts import LastClassHead
from tinylm.presets import count, preset, working_set
from tinylm.quantization import quantize
from tinylm.resuming import resume
from tinylm.step import compiled_loss
from tinylm.tokenizer import Tokenizer
from tinylm.training import train
from tinylm.weights import assign, bind, named, pure
from tinylm.world import World

# --- models -----------------------------------------------------------------------------------------------------------

SMALL = {"kind": "encoder", "vocab": 40, "context": 12, "width": 16, "layers": 2, "heads": 2, "positions": "learned"}
EMBBERT = {"block": "embbert", "heads": 1, "hidden": 32, "embed_rank": 4, "token_types": 3, "kernel": 5, "bias": True}
MODELS = {
    "mean": {"block": "post", "pooling": "mean", "bias": True},
    "attention": {"pooling": "attention", "pooler": False},
    "last": {"kind": "decoder", "positions": "rope", "pooling": "last"},
    "embbert": {**EMBBERT, "pooler": False},
    "convolutional": {"layers": 1, "convs": 2, "channels": 3, "kernel": (4, 3), "block": "post", "embed_rank": 5},
}


@pytest.mark.parametrize("name", MODELS)
def test_the_new_parts_equal_numpy(name):
    config = ModelConfig.from_dict({**SMALL, **MODELS[name], "head": "classes", "classes": 3})
    model = Transformer(config)
    params = random_params(shapes(config))
    params |= {n: np.abs(x) for n, x in params.items() if n.endswith(".var")}
    assign(model, params)
    twin = NumpyModel(config, params)
    tokens = np.random.default_rng(0).integers(0, 40, (2, 9)).astype(np.int32)
    segments = np.array([[1] * 9, [1] * 6 + [0] * 3], np.int32)
    wanted = np.stack([twin(t, segments=s) for t, s in zip(tokens, segments, strict=True)])
    graph, values = pure(model)
    program = jax.jit(lambda p, t, s: bind(graph, p)(t, segments=s))
    ours = np.asarray(program(values, tokens, segments))
    np.testing.assert_allclose(ours, wanted, atol=2e-4 * np.abs(wanted).max())
    if config.convs == 0:  # what stands in the padding changes nothing; the paper's front end is blind to it
        other = np.where(segments > 0, tokens, 7)
        np.testing.assert_allclose(program(values, other, segments), ours, atol=1e-5 * np.abs(wanted).max())


def test_embbert_has_the_published_size():
    """357,248 parameters; 1.953 MB with activations in float32 and 0.781 to 0.784 in int8 and half precision."""
    bare = preset("embbert-q", head="none")
    assert count(bare) == 357_248 == sum(int(np.prod(s.shape)) for s in shapes(bare).values())
    assert working_set(bare) == 1_953_280
    assert working_set(bare, weight=2, matrix=1, activation=2) == pytest.approx(782_000, rel=2e-3)


@pytest.mark.parametrize(("name", "millions"), [
    ("bert-6", 66.7), ("bert-1", 77.8), ("bert-1-conv2", 31.3), ("bert-1-conv2-heads8", 19.2),
])  # fmt: skip
def test_the_papers_sizes(name, millions):
    assert count(preset(name)) / 1e6 == pytest.approx(millions, abs=0.051)


@pytest.mark.parametrize("suffix", ["bin", "gguf", "onnx"])
@pytest.mark.parametrize("changes", [{"pooling": "mean"}, {"pooler": False}, {"block": "embbert"}], ids=str)
def test_formats_refuse_what_they_cannot_say(changes, suffix, tmp_path):
    from tinylm.formats import FormatError

    wide = {**EMBBERT, "head": "none"} if "block" in changes else {"head": "classes", "classes": 2, "block": "post"}
    config = ModelConfig.from_dict({**SMALL, "norm": "layernorm", "embed_norm": True, "mlp": "gelu", **wide, **changes})
    from tinylm.checkpoint import save

    with pytest.raises(FormatError):
        save(Transformer(config), tmp_path / f"m.{suffix}")
    assert not list(tmp_path.iterdir())


def test_the_engine_refuses_pooling_by_attention(tmp_path):
    from tinylm.engine.export import export
    from tinylm.formats import FormatError

    config = ModelConfig.from_dict({**SMALL, "head": "classes", "classes": 2, "pooling": "attention"})
    with pytest.raises(FormatError, match="head is a AttentionClassHead, which the engine does not know"):
        export(Transformer(config), tmp_path / "m.tlm")


def test_batch_norms_are_settled_on_texts_of_every_class():
    """Sets come sorted by class: the first batches would be those of one class."""
    config = ModelConfig.from_dict({**SMALL, **MODELS["convolutional"], "head": "classes", "classes": 2})
    model = Transformer(config.replace(init_std=1.0))
    tokens = np.repeat(np.array([[3], [4]], np.int32), 20, axis=0).repeat(9, axis=1)
    means = []
    for rows, calls in ((tokens[:20], 4), (tokens, 8), (tokens, 4)):  # one class; all texts; half of the texts
        settle(model, rows, np.ones_like(rows), batch=5, calls=calls)
        means.append(np.asarray(named(model)["front.batch.0.mean"]))
    assert np.abs(means[2] - means[1]).max() < 0.5 * np.abs(means[0] - means[1]).max()


def test_the_last_position_is_counted_in_whole_numbers():
    """bfloat16 has 8 bits: 259 ones add up to 260 in it."""
    head = LastClassHead(ModelConfig.from_dict({**SMALL, "width": 1, "heads": 1, "head_width": 2, "head": "classes",
                                                "classes": 2}))  # fmt: skip
    x, real = jnp.arange(300.0)[None, :, None], (jnp.arange(300) < 259)[None].astype(jnp.bfloat16)
    assert int(head.pool(x, real)[0, 0]) == 258


def test_batch_norms_are_settled_by_the_batches_own_statistics():
    config = ModelConfig.from_dict({**SMALL, **MODELS["convolutional"], "head": "classes", "classes": 2})
    model = Transformer(config)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 40, (8, 9)), jnp.int32)
    segments = jnp.ones_like(tokens)
    trained = np.asarray(model(tokens, segments=segments, key=jax.random.key(0)))
    before = np.asarray(model(tokens, segments=segments))
    settle(model, tokens, segments, batch=8)
    after = np.asarray(model(tokens, segments=segments))
    assert np.abs(before - trained).max() > 10 * np.abs(after - trained).max()
    np.testing.assert_allclose(after, trained, atol=1e-5)


# --- sets -------------------------------------------------------------------------------------------------------------

WORDING = ["In", "York", ",", "Ann", "Lee", "sang"]
RELATIONS = {
    "P1": [
        {"tokens": WORDING, "h": ["ann lee", "Q1", [[3, 4]]], "t": ["york", "Q2", [[1]]]},
        {"tokens": ["Bo", "ate"], "h": ["bo", "Q1", [[0]]], "t": ["bo", "Q2", [[0]]]},
    ],
    "P0": [{"tokens": ["x", "y"], "h": ["x", "Q", [[0]]], "t": ["y", "Q", [[1]]]}],
}  # fmt: skip


def written(path, text):
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def test_every_kind_of_file(tmp_path):
    jsonl = written(tmp_path / "a.jsonl.gz", '{"text": "one", "label": "b"}\n\n{"text": "two", "label": "a"}\n')
    csv = written(tmp_path / "a.csv", '2,"one, with ""quotes""",x\n1,two,y\n')
    tsv = written(tmp_path / "a.tsv", 'sentence1\tsentence2\tlabel\nhe said "no\tbye\t10\nb\tc\t9\n')
    first = read_set(jsonl)
    assert (first.texts, first.labels.tolist(), first.names) == (("one", "two"), [1, 0], ("a", "b"))
    second = read_set(csv, text=1, label=0)
    assert (second.texts[0], second.labels.tolist(), second.names) == ('one, with "quotes"', [1, 0], ("1", "2"))
    third = read_set(tsv, text=["sentence1", "sentence2"], names=[*"abcdefghij", "k"])
    assert (third.texts[0], third.labels.tolist()) == ('he said "no\nbye', [10, 9])
    relations = written(tmp_path / "val_wiki.json", json.dumps(RELATIONS))
    names = written(tmp_path / "pid2name.json", json.dumps({"P1": ["sang in", "..."], "P0": ["is", "..."]}))
    fewrel = read_set(relations, names=names)
    assert (fewrel.texts[0], fewrel.names) == ("In York , Ann Lee sang", ("is", "sang in"))
    assert read_set(relations, markers=True).texts[:2] == (
        "In [t] York [/t] , [h] Ann Lee [/h] sang", "[h] [t] Bo [/t] [/h] ate",
    )  # fmt: skip
    assert read_set([("a", "x"), ("b", "y")], limit=2).names == ("x", "y")
    numbers = [("a", "2"), ("b", "0")]
    assert read_set(numbers, names=["2", "1", "0"]).labels.tolist() == [0, 2]  # by name, where they are names
    assert read_set([("a", 1), ("b", 0)], names={0: "no", 1: "yes"}).names == ("no", "yes")
    made = World().classification("topic", classes=3, n=6)
    assert read_set(made).labels.tolist() == made.labels.tolist()
    assert marked(["a", "b"], [0], [1]) == "[h] a [/h] [t] b [/t]"


@pytest.mark.parametrize(("name", "text", "settings", "message"), [
    ("a.txt", "x", {}, "unknown suffix '.txt'; known: .json"),
    ("a.jsonl", "", {}, "no text in it"),
    ("a.jsonl", '{"text": 1}', {}, "row 1: none of the fields label, intent"),
    ("a.jsonl", '{"text": "x", "label": 1}', {"text": "body"}, "row 1: no field 'body'; it has"),
    ("a.jsonl", '{"text": "x", "label": 1}', {"text": ["text", "other"]}, "no field 'other'"),
    ("a.jsonl", "{", {}, "a.jsonl: Expecting"),
    ("a.jsonl", "[1]", {}, "not a record"),
    ("a.jsonl", '{"text": "x", "label": "a"}', {"markers": True}, "no places of its entities"),
    ("a.jsonl", '{"text": "x", "label": 5}', {"names": ["a", "b"]}, "class 5 is not among the 2 names"),
    ("a.jsonl.gz", None, {}, "there is no file"),
    ("a.jsonl", '{"text": null, "label": "a"}', {}, "row 1: no text or no class"),
    ("a.jsonl", '{"text": "x", "label": NaN}', {}, "row 1: no text or no class"),
    ("a.csv", "text,label\none, two,a\n", {}, "line 2: 3 cells, and 2 in the first"),
    ("a.json", '{"P1": [3]}', {}, "not in FewRel's form"),
    ("a.jsonl", '{"text": "x", "label": "a"}', {}, "at least two different names"),
])  # fmt: skip
def test_bad_sets(name, text, settings, message, tmp_path):
    path = tmp_path / name
    if text is not None:
        written(path, text)
    with pytest.raises(SetError) as error:
        read_set(path, **settings)
    assert message in str(error.value)


def test_subsamples_are_balanced_apart_and_repeatable():
    whole = Dataset(tuple(f"{c} {i}" for c in range(3) for i in range(9)), np.repeat([0, 1, 2], 9), ("a", "b", "c"))
    some = whole.balanced(4)
    assert some.counts.tolist() == [4, 4, 4]
    assert some.texts == whole.balanced(4).texts != whole.balanced(4, seed=1).texts
    learn, test = room.Protocol(5, 3, True)(whole)
    assert (learn.counts.tolist(), test.counts.tolist()) == ([5] * 3, [3] * 3)
    assert not set(learn.texts) & set(test.texts)
    assert room.Protocol(2, 1, False)(whole, whole)[1].counts.tolist() == [1, 1, 1]
    learn, held = whole.split(0.34, seed=2)
    assert (held.counts.tolist(), len(learn) + len(held)) == ([3, 3, 3], 27)
    assert set(learn.texts) | set(held.texts) == set(whole.texts)
    few, most = whole.take([0, 1, 9, 10, 18]).split(0.9)  # nothing is held out of a single text, and never all
    assert (few.counts.tolist(), most.counts.tolist()) == ([1, 1, 1], [1, 1, 0])
    other = whole.only(["c", "a"]).numbered_as(whole.names)
    assert (other.names, other.labels.tolist()) == (whole.names, [0] * 9 + [2] * 9)
    assert whole.numbered_as(["0", "1", "2"]) is whole
    assert whole.only(["c", "a"]).labels.tolist() == [1] * 9 + [0] * 9
    assert (PROTOCOLS["fewrel"].train, PROTOCOLS["fewrel"].test) == (630, 70)
    for call, message in [
        (lambda: whole.balanced(10), "class 'a' has 9"),
        (lambda: whole.split(1.0), "between 0 and 1"),
        (lambda: whole.only(["d"]), "no class is called 'd'"),
        (lambda: PROTOCOLS["ag_news"](whole), "give test="),
        (lambda: Dataset(("x",), np.array([2]), ("a", "b")), "from 0 to 1"),
        (lambda: Dataset((), np.array([]), ("a", "b")), "0 texts"),
        (lambda: Dataset(("x",), np.array([[0]]), ("a", "b")), "must be sequences"),
        (lambda: Dataset("x", np.array([0]), ("a", "b")), "must be sequences"),
        (lambda: whole.numbered_as(["a", "b", "d"]), "lacks 1, such as 'c'"),
        (lambda: read_set(["ab", "cd"]), "pair 1 is 'ab'"),
        (lambda: read_set(None), "None is no set"),
    ]:
        with pytest.raises(SetError, match=message):
            call()


def test_real_fewrel_follows_the_protocol(shared_data):
    whole = read_set(shared_data / "cls/fewrel/val_wiki.json.gz", names=shared_data / "cls/fewrel/pid2name.json.gz")
    assert (len(whole), len(whole.names), set(whole.counts.tolist())) == (11_200, 16, {700})
    learn, test = PROTOCOLS["fewrel"](whole)
    assert (set(learn.counts.tolist()), set(test.counts.tolist())) == ({630}, {70})
    assert "crosses" in whole.names


# --- figures ----------------------------------------------------------------------------------------------------------


def test_figures_by_hand():
    """Six texts, three classes: predictions 0 0 1 1 2 0, labels 0 0 0 1 1 2."""
    labels, picks = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 2, 0])
    logits = np.log(np.where(np.eye(3)[picks] > 0, 0.8, 0.1))
    found = classified(logits, labels, "abc")
    assert found.confusion.tolist() == [[2, 1, 0], [0, 1, 1], [1, 0, 0]]
    assert found["accuracy"] == pytest.approx(0.5)
    assert found["macro_f1"] == pytest.approx((2 * 2 / (3 + 3) + 2 * 1 / (2 + 2) + 0) / 3)
    assert found["nll"] == pytest.approx(-(3 * np.log(0.8) + 3 * np.log(0.1)) / 6)
    assert found["ece"] == pytest.approx(0.3)
    assert {name: f["accuracy"].value for name, f in found.groups["class"].items()} == {
        "a": pytest.approx(2 / 3), "b": 0.5, "c": 0.0,
    }  # fmt: skip
    assert json.loads(json.dumps(found.to_dict()))["figures"]["accuracy"]["units"] == 6
    assert "macro_f1" in repr(found)
    assert "[[" not in repr(found)


def slow_f1(labels, picks, classes):
    """scikit-learn's definition, a class at a time."""
    each = []
    for c in range(classes):
        tp, fp = ((picks == c) & (labels == c)).sum(), ((picks == c) & (labels != c)).sum()
        precision = tp / (tp + fp) if tp + fp else 0.0
        recall = tp / (labels == c).sum() if (labels == c).any() else 0.0
        each.append(2 * precision * recall / (precision + recall) if precision + recall else 0.0)
    return np.mean(each)


def slow_ece(probs, labels, bins=15):
    total = 0.0
    for i in range(bins):
        inside = [n for n, p in enumerate(probs) if i / bins < p.max() <= (i + 1) / bins]
        if inside:
            right = np.mean([probs[n].argmax() == labels[n] for n in inside])
            total += len(inside) / len(labels) * abs(right - np.mean([probs[n].max() for n in inside]))
    return total


def test_figures_against_slow_twins():
    draw = np.random.default_rng(3)
    logits, labels = draw.normal(size=(200, 5)) * 2, draw.integers(0, 4, 200)
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    picks = logits.argmax(-1)
    assert macro_f1(confusion_matrix(labels, picks, 5)) == pytest.approx(slow_f1(labels, picks, 5))
    assert calibration(probs, labels) == pytest.approx(slow_ece(probs, labels))
    found = classified(logits, labels, "abcde")
    for name in ("accuracy", "macro_f1"):
        low, high = found.figures[name].ci95
        assert 0 < low < found[name] < high < 1
    assert wilson(8, 10) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))  # Wilson's own example
    assert wilson(0, 5)[0] == 0.0
    whole = found.figures["macro_f1"].ci95
    with pytest.MonkeyPatch.context() as patch:  # many classes: fewer matrices at a time, the same draws
        patch.setattr("tinylm.classification.metrics.CELLS", 1000)
        assert classified(logits, labels, "abcde").figures["macro_f1"].ci95 == whole
    with pytest.raises(EvaluationError, match="do not fit"):
        classified(logits, labels - 1, "abcde")
    with pytest.raises(EvaluationError, match="not finite"):
        classified(logits * np.inf, labels, "abcde")
    with pytest.raises(EvaluationError, match="do not fit"):
        classified(logits, labels[:5], "abcde")


# --- fine-tuning ------------------------------------------------------------------------------------------------------

NOISE = ["the", "a", "of", "and", "in", "on"]
WORDS = [["sun", "sky", "day"], ["sea", "fish", "boat"], ["tree", "leaf", "bird"]]


def spotted(n, seed):
    """Texts that hold one telling word among others: a bag of words is enough."""
    draw = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    texts = [" ".join(draw.permutation([*draw.choice(NOISE, 4), WORDS[c][draw.integers(3)]])) for c in labels]
    return Dataset(tuple(texts), labels, ("light", "water", "wood"))


TUNING = {"epochs": 8, "learning_rate": 2e-2, "patience": 2, "score": "valid_loss", "balance": True, "pooling": "mean"}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(spotted(200, 9).texts, vocab=290)


@pytest.fixture(scope="module")
def shape(tokenizer):
    return preset("bert-1", vocab=tokenizer.vocab, width=16, heads=2, context=16, dropout=0.0, init_std=0.2)


@pytest.fixture(scope="module")
def tuned(tokenizer, shape):
    """Two members fine-tuned as one program, from two seeds of initial weights."""
    models = [Transformer(shape, rngs=seed, tokenizer=tokenizer) for seed in (0, 1)]
    seen = []
    found = classify_many(models, spotted(96, 0), valid=spotted(48, 1), progress=seen.append, **TUNING)
    return models, found, seen


def test_fine_tuning_learns_and_leaves_the_models_alone(tuned, shape):
    models, found, seen = tuned
    assert [m.config for m in models] == [shape, shape]
    test = spotted(60, 2)
    for one in found:
        assert one.evaluate(test)["accuracy"] > 0.7  # of a third by chance
        best = min(one.history, key=lambda e: e.valid_loss)
        assert one.best == best.epoch
        assert one.evaluate(spotted(48, 1))["accuracy"] == pytest.approx(best.valid_accuracy)
        assert one.evaluate(spotted(48, 1))["nll"] == pytest.approx(best.valid_loss, rel=1e-4)
        assert one.history[-1].epoch <= one.best + 2
    assert len(seen) == max(len(one.history) for one in found)
    assert set(found[0].predict(test.texts[:6])) <= set(test.names)
    assert evaluate_classes(found[0].model, test)["accuracy"] == found[0].evaluate(test)["accuracy"]


def test_an_interrupt_ends_fine_tuning(tokenizer, shape):
    """Ctrl-C is no way to get a classifier that learned half of it."""
    with pytest.raises(KeyboardInterrupt):
        classify(Transformer(shape, tokenizer=tokenizer), spotted(48, 0), valid=None, epochs=3,
                 progress=lambda newest: signal.raise_signal(signal.SIGINT))  # fmt: skip


def test_a_member_that_never_learned_is_no_result(tuned):
    given = {**TUNING, "learning_rate": 1e30, "valid": None}
    with pytest.raises(SetError, match=r"models \[0, 1\] diverged"), pytest.warns(UserWarning, match="is dropped"):
        classify_many(tuned[0], spotted(96, 0), **given)


def test_another_pooling_takes_another_head(tuned):
    found = classify(tuned[1][0].model, spotted(96, 0), valid=None, epochs=1, pooling="cls")
    assert (tuned[1][0].model.config.pooling, found.model.config.pooling) == ("mean", "cls")


def test_members_are_what_they_would_be_alone(tuned):
    models, found, _ = tuned
    alone = classify_many(models, spotted(96, 0), valid=spotted(48, 1), together=False, **TUNING)
    for one, other in zip(found, alone, strict=True):
        assert [e.epoch for e in one.history] == [e.epoch for e in other.history]
        np.testing.assert_allclose([e.loss for e in one.history], [e.loss for e in other.history], rtol=1e-3, atol=1e-4)
        a, b = named(one.model), named(other.model)
        off = max(float(np.abs(np.asarray(a[n]) - np.asarray(b[n])).max()) for n in a)
        assert off < 3e-2  # Adam turns rounding of tiny gradients into steps; two seeds lie further apart by far
    a, b = (named(one.model) for one in found)
    assert max(float(np.abs(np.asarray(a[n]) - np.asarray(b[n])).max()) for n in a) > 0.3


def test_a_new_head_and_the_old_body(tokenizer, shape):
    model = Transformer(shape, rngs=3, tokenizer=tokenizer)
    new = with_classes(model, 4, pooling="mean", seed=1)
    old, values = named(model), named(new)
    assert (new.config.head, new.config.classes, new.config.pooling) == ("classes", 4, "mean")
    body = [name for name in values if not name.startswith("head.")]
    assert all((np.asarray(values[n]) == np.asarray(old[n])).all() for n in body)
    assert values["head.out.kernel"].shape == (16, 4)
    decoder = Transformer(ModelConfig(vocab=290, context=16, width=16, layers=1, heads=2), tokenizer=tokenizer)
    assert with_classes(decoder, 2).config.pooling == "last"
    assert rows_of(["sun"], tokenizer, "decoder")[0][[0, -1]].tolist() == [tokenizer.begin, tokenizer.end]


def test_the_loss_is_the_weighted_mean_over_texts(tokenizer, shape):
    model = with_classes(Transformer(shape, tokenizer=tokenizer), 3)
    data = spotted(8, 0)
    weights = np.array([1.0, 2.0, 0.5], np.float32)
    source = Labelled(rows_of(data.texts, tokenizer), data.labels, batch=8, length=16, pad=0, weights=weights)
    batch = source(0)
    graph, params = pure(model)
    nats, total = compiled_loss(graph)(params, batch)
    found = classified(scores(model, data.texts), data.labels, data.names)
    assert float(total) == pytest.approx(weights[data.labels].sum())
    assert float(nats) == pytest.approx((weights[data.labels] * found.items["nll"]).sum(), rel=1e-4)
    assert sorted(source.indices(0).tolist()) == list(range(8))
    assert (source.indices(0) != source.indices(1)).any()
    assert source(5).targets.shape == (8,)
    with pytest.raises(DataError, match="1 texts and 2 labels"):
        Labelled([np.array([1])], np.array([0, 1]), batch=1, length=4, pad=0)


def test_a_long_text_keeps_its_last_token():
    source = Labelled([np.arange(9), np.arange(2)], np.array([0, 1]), batch=2, length=4, pad=7)
    assert sorted(source(0).tokens.tolist()) == [[0, 1, 2, 8], [0, 1, 7, 7]]


def test_runs_have_folders_and_resume(tokenizer, shape, tmp_path, tuned):
    models, _, _ = tuned
    data = spotted(96, 0)
    whole = classify(models[0], data, valid=None, epochs=2, out=tmp_path / "run")
    again = resume(tmp_path / "run", steps=8, data=lambda step: Labelled(
        rows_of(data.texts, tokenizer), data.labels, batch=32, length=16, pad=tokenizer.pad)(step))  # fmt: skip
    list(again)
    assert (again.step, again.config.objective, whole.best) == (8, "classes", 2)


def test_bad_fine_tuning(tuned, tokenizer, shape):
    models, found, _ = tuned
    bare = Transformer(shape)
    for call, message in [
        (lambda: classify(bare, spotted(9, 0)), "the model has no tokenizer"),
        (lambda: classify(models[0], spotted(9, 0), epochs=0), "epochs = 0"),
        (lambda: classify(models[0], spotted(9, 0), valid=1), "valid = 1: a Dataset, a share"),
        (lambda: classify(models[0], [("sun", "light")]), "a list is no Dataset"),
        (lambda: classify_many(models, spotted(9, 0), seed=3), "seed: give seeds instead"),
        (lambda: classify(models[0], spotted(9, 0), steps=3), "steps: give epochs instead"),
        (lambda: classify_many(models, spotted(9, 0), seeds=[1], together=False), "2 models and 1 seeds"),
        (lambda: snapshots(models[0], spotted(9, 0), members=1, epochs=1, valid=0.5), "valid: every member"),
        (lambda: found[0].predict("the sun"), "put it in a list"),
        (lambda: masked_texts(models[0], "the sun"), "put it in a list"),
        (lambda: classify_many(models, spotted(9, 0), seeds=[1]), "2 models and 1 seeds"),
        (lambda: found[0].evaluate(Dataset(("x",), np.array([0]), ("a", "b"))), "3 classes and the set 2"),
        (lambda: scores(models, ["x"]), "with_classes|see classify"),
        (lambda: scores([f.model for f in found], []), "no texts"),
        (lambda: scores(found[0].model, [[999]]), "token ids must be from 0"),
        (lambda: snapshots(models[0], spotted(9, 0), members=3, epochs=2), "3 members and 2 epochs"),
    ]:
        with pytest.raises(SetError, match=message):
            call()
    with pytest.raises(ConfigError, match="use tinylm.classify"):
        from tinylm.shards import Tokens

        train(bare, Tokens.from_array(np.zeros(99, int), vocab=10), TrainConfig(steps=1, objective="classes"))


# --- pretraining ------------------------------------------------------------------------------------------------------


def test_masked_texts_are_first_tokens_with_the_head_on_masked_positions(tokenizer, shape):
    model = Transformer(shape, tokenizer=tokenizer)
    texts = spotted(40, 4).texts
    source = masked_texts(model, texts, batch=8, rate=0.2, seed=1)
    plain = source.source(0)
    rows = [row.tolist() for row in rows_of(texts, tokenizer)]
    for tokens, real in zip(plain.tokens, plain.segments, strict=True):
        own = tokens[: real.sum()].tolist()
        assert own in [row if len(row) <= 16 else [*row[:15], row[-1]] for row in rows]
    trainer = train(model, source, TrainConfig(steps=2, batch=8, objective="mlm", mask_rate=0.2, log_every=1))
    assert trainer._batch(0).picked.shape[1] < plain.tokens.size
    with pytest.raises(SetError, match="with a tokenizer"):
        masked_texts(Transformer(shape), texts)


def test_the_papers_run_faithful_and_fixed():
    from tinylm.optim import rate

    config = room.faithful(3200)
    assert (config.steps, config.stairs, config.weight_decay, config.clip) == (5000, 100, 0.01, 0.0)
    rates = [rate(config, step, step / config.steps) for step in range(config.steps)]
    assert all(np.ptp(rates[i : i + 100]) < 1e-12 for i in range(0, 5000, 100))
    assert rates[0] == pytest.approx(5e-5 / 100)  # the epoch that the paper's code loses
    assert rates[100::100] == pytest.approx([5e-5 * (1 - epoch / 50) for epoch in range(1, 50)])
    tune = room.faithful(3200, tune=True)
    assert rate(tune, 0, 0.0) == pytest.approx(5e-5)
    assert rate(tune, 4999, 4999 / 5000) == pytest.approx(5e-5 / 50)
    better = room.fixed(3200)
    assert (better.learning_rate, room.fixed(3200, width=64, tune=True).learning_rate) == (0.4 / 768, 0.2 / 64)
    assert (better.stairs, better.clip, better.warmup) == (0, 1.0, 300)
    assert len({rate(better, step, step / better.steps) for step in range(200)}) == 200


def test_embbert_in_int8_gives_nearly_the_same_scores(tokenizer):
    """`quantize` knows the architecture's matrices; tables of rank 8 and filters stay as they are."""
    shape = preset("embbert-q", vocab=tokenizer.vocab, width=16, hidden=16, layers=2, embed_rank=8, context=16,
                   kernel=4, init_std=0.3, head="classes", classes=3, pooler=False)  # fmt: skip
    model = Transformer(shape, tokenizer=tokenizer)
    texts = spotted(12, 2).texts
    plain, rounded = scores(model, texts), scores(quantize(model, "int8").model, texts)
    assert 0 < np.abs(plain - rounded).max() < 0.05 * np.abs(plain).max()
