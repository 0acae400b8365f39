"""Committees: the rules by hand, members alone and together, files, the engine; and what the analyses count."""

import itertools
import json
import re

import numpy as np
import pytest

from tinylm.checkpoint import load, save
from tinylm.classification import (
    Committee,
    Dataset,
    EngineCommittee,
    SetError,
    cascade,
    cascade_curve,
    combined,
    confusion_map,
    cost,
    coverage,
    curve,
    disagreement_map,
    diversity,
    frontier,
    k_curve,
    learned_weights,
    only_committee,
    parameters_like,
    scores,
    select_texts,
    uncertainty,
    where_larger_helps,
)
from tinylm.classification.command import classify_command
from tinylm.classification.metrics import probabilities
from tinylm.config import ModelConfig
from tinylm.model import Transformer
from tinylm.presets import count, size
from tinylm.tokenizer import Tokenizer

TEXTS = ("the sun is up", "a fish in the sea", "one boat and two fish", "a bird in a tree")
DATA = Dataset(TEXTS, np.array([0, 1, 1, 2]), ("light", "water", "wood"))

# Three members, four texts, two classes. Right: member 0 on texts 0 1, member 1 on 0 2, member 2 on 1 2 3.
LABELS = np.array([0, 0, 1, 1])
LOGITS = np.array([
    [[2.0, 0.0], [1.0, 0.0], [3.0, 0.0], [1.0, 0.0]],
    [[1.0, 0.0], [0.0, 0.5], [0.0, 1.0], [1.0, 0.0]],
    [[0.0, 4.0], [1.0, 0.0], [0.0, 1.0], [0.0, 3.0]],
])  # fmt: skip


# --- the rules --------------------------------------------------------------------------------------------------------


def test_rules_by_hand():
    assert combined(LOGITS).tolist() == [[3.0, 4.0], [2.0, 0.5], [3.0, 2.0], [2.0, 3.0]]
    assert combined(LOGITS, "vote").argmax(-1).tolist() == [0, 0, 1, 0]
    wanted = np.mean([np.exp(z) / np.exp(z).sum(-1, keepdims=True) for z in LOGITS], axis=0)
    np.testing.assert_allclose(np.exp(combined(LOGITS, "probs")), wanted)
    assert combined(LOGITS, weights=[1, 0, 2]).tolist()[0] == [2.0, 8.0]
    tied = np.array([[[1.0, 0.0]], [[0.0, 3.0]]])
    assert combined(tied, "vote").argmax(-1).tolist() == [1]  # by the sum of logits
    with pytest.raises(SetError, match=r"combine = 'logit'; did you mean 'logits'"):
        combined(LOGITS, "logit")
    with pytest.raises(SetError, match="2 weights for 3 members"):
        combined(LOGITS, weights=[1, 2])
    with pytest.raises(SetError, match="must be finite"):
        combined(LOGITS, weights=[1, np.nan, 2])
    with pytest.raises(SetError, match=r"logits of shape \(4, 2\)"):
        combined(LOGITS[0])


def test_learned_weights_are_the_least_of_the_loss():
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 3, 400)
    good, noise = np.eye(3)[labels] * 2 + draw.normal(size=(400, 3)), draw.normal(size=(400, 3)) * 3
    z = np.stack([good, noise])
    w = learned_weights(z, labels)

    def loss(w):
        return -np.log(probabilities(np.einsum("k,knc->nc", w, z))[np.arange(400), labels]).mean()

    assert abs(w[1]) < 0.1 * w[0]
    for step in itertools.product([-0.05, 0, 0.05], repeat=2):
        assert loss(w) <= loss(w + np.array(step)) + 1e-9


# --- committees -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def members():
    tokenizer = Tokenizer.train([*TEXTS, "noise"], vocab=270)
    config = ModelConfig(
        kind="encoder", vocab=270, context=12, width=16, layers=1, heads=2, positions="learned", head="classes",
        classes=3, norm="layernorm", mlp="gelu", bias=True, block="post", init_std=0.4,
    )  # fmt: skip
    return [Transformer(config, rngs=seed, tokenizer=tokenizer) for seed in range(3)]


@pytest.fixture(scope="module")
def committee(members):
    return Committee(members, DATA.names)


def test_a_committee_is_the_sum_of_its_members_alone(committee, members):
    alone = np.stack([scores(model, TEXTS) for model in members])
    np.testing.assert_allclose(committee.member_logits(TEXTS), alone, atol=1e-5)
    np.testing.assert_allclose(committee.logits(TEXTS), alone.sum(0), atol=1e-5)
    t = members[0].tokenizer
    rows = [[t.cls, *t.encode(text), t.sep] for text in TEXTS]
    rows = [row if len(row) <= 12 else [*row[:11], t.sep] for row in rows]
    one = np.stack([np.asarray(members[0](np.asarray([row])))[0] for row in rows])
    np.testing.assert_allclose(alone[0], one, atol=1e-4)  # batches and padding change nothing
    assert committee.predict(TEXTS) == [DATA.names[i] for i in alone.sum(0).argmax(-1)]
    found = committee.evaluate(DATA)
    assert found["accuracy"] == (alone.sum(0).argmax(-1) == DATA.labels).mean()
    np.testing.assert_allclose(found.logits, alone.mean(0), atol=1e-5)
    assert len(committee) == 3
    assert repr(committee) == "Committee of 3 by logits: 1 layers of width 16, 3 classes"


def test_members_of_other_shapes_sit_together(members):
    deep = Transformer(members[0].config.replace(layers=2), rngs=9, tokenizer=members[0].tokenizer)
    mixed = Committee([members[0], deep, members[1]], combine="probs")
    wanted = np.stack([scores(m, TEXTS) for m in mixed.members])
    np.testing.assert_allclose(mixed.member_logits(TEXTS), wanted, atol=1e-5)
    assert mixed.names == ("0", "1", "2")


def test_weights_are_learned_on_a_set(committee):
    fitted = committee.fitted(DATA)
    assert len(fitted.weights) == 3
    assert fitted.evaluate(DATA)["nll"] <= committee.evaluate(DATA)["nll"] + 1e-9


def test_files(committee, tmp_path):
    fitted = committee.fitted(DATA)
    fitted.save(tmp_path / "c")
    again = Committee.load(tmp_path / "c")
    assert (again.names, again.combine, again.weights) == (DATA.names, "logits", fitted.weights)
    np.testing.assert_array_equal(again.logits(TEXTS), fitted.logits(TEXTS))
    one = load(tmp_path / "c" / "member-001")  # each a model of its own
    np.testing.assert_array_equal(scores(one, TEXTS), scores(committee.members[1], TEXTS))
    smaller = Committee(fitted.members[:2], fitted.names)
    smaller.save(tmp_path / "c")  # over the larger one: whole until the end, and no member is left over
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["committee.json", "member-003", "member-004"]
    np.testing.assert_array_equal(Committee.load(tmp_path / "c").logits(TEXTS), smaller.logits(TEXTS))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "note").write_text("mine")
    with pytest.raises(FileExistsError, match="no committee"):
        committee.save(tmp_path / "other")
    with pytest.raises(SetError, match="is no committee"):
        Committee.load(tmp_path / "other")
    raw = json.loads((tmp_path / "c" / "committee.json").read_text())
    for change in ({"members": ["../c/member-000"]}, {"format": 9}, {"names": None}):
        (tmp_path / "c" / "committee.json").write_text(json.dumps({**raw, **change}))
        with pytest.raises(SetError, match="is damaged or of another version"):
            Committee.load(tmp_path / "c")


def test_a_save_that_is_interrupted_leaves_the_old_committee(committee, tmp_path, monkeypatch):
    """The third member cannot be written: what was there is what is loaded, and the next save goes through."""
    committee.save(tmp_path / "c")
    calls = []

    def failing(model, path):
        calls.append(path)
        if len(calls) == 3:
            raise OSError("the disk is full")
        return save(model, path)

    monkeypatch.setattr("tinylm.classification.committee.save", failing)
    for folder in ("c", "new"):
        calls.clear()
        with pytest.raises(OSError, match="disk is full"):
            Committee(committee.members[::-1], committee.names).save(tmp_path / folder)
    np.testing.assert_array_equal(Committee.load(tmp_path / "c").logits(TEXTS), committee.logits(TEXTS))
    monkeypatch.undo()
    for folder in ("c", "new"):
        committee.save(tmp_path / folder)
        assert len(Committee.load(tmp_path / folder)) == 3
        assert len(list((tmp_path / folder).iterdir())) == 4


def test_the_engine(committee, tmp_path):
    exported = committee.export(tmp_path / "e", bits="float32")
    assert sorted(p.name for p in (tmp_path / "e").iterdir()) == [
        "committee.json", "member-000.tlm", "member-001.tlm", "member-002.tlm",
    ]  # fmt: skip
    texts = [*TEXTS, " ".join(TEXTS)]  # the last is longer than the context
    wanted = committee.logits(texts)
    np.testing.assert_allclose(exported.logits(texts), wanted, atol=1e-3 * np.abs(wanted).max())
    assert EngineCommittee(tmp_path / "e").predict(texts) == committee.predict(texts)


def test_bad_committees(members):
    other = Transformer(members[0].config.replace(classes=2), tokenizer=members[0].tokenizer)
    bare = Transformer(members[0].config.replace(head="none", classes=0), tokenizer=members[0].tokenizer)
    for call, message in [
        (lambda: Committee([]), "at least one member"),
        (lambda: Committee([members[0], other]), "member 1 has other classes"),
        (lambda: Committee([bare]), "member 0 has a 'none' head"),
        (lambda: Committee(members, ["a"]), "1 names for 3 classes"),
        (lambda: Committee(members, weights=[1.0]), "1 weights for 3 members"),
        (lambda: Committee(members).evaluate(Dataset(("x",), np.array([0]), ("a", "b"))), "3 classes and the set 2"),
    ]:
        with pytest.raises(SetError, match=message):
            call()


class Options:
    """What the parser gives."""

    test, out, members, epochs, batch, learning_rate = None, None, 2, 1, 4, 1e-3
    balance, markers, limit, seed, pooling = False, False, None, 0, None

    def __init__(self, **given):
        self.__dict__.update(given)


def test_the_command_fine_tunes_and_evaluates(members, tmp_path):

    lines = [{"text": t, "label": n} for t, n in zip(TEXTS * 5, [DATA.names[i] for i in DATA.labels] * 5, strict=True)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    save(Transformer(members[0].config.replace(head="mlm", classes=0), tokenizer=members[0].tokenizer), tmp_path / "m")
    told = []
    given = {"folder": str(tmp_path / "m"), "data": str(tmp_path / "a.jsonl"), "out": str(tmp_path / "c")}
    figures, text = classify_command(Options(**given, pooling="mean"), told.append)
    assert Committee.load(tmp_path / "c").members[0].config.pooling == "mean"
    assert (figures["members"], len(figures["alone"]), len(told)) == (2, 2, 1)
    assert 0 <= json.loads(json.dumps(figures))["figures"]["accuracy"]["value"] <= 1
    assert "members alone" in text
    again, _ = classify_command(Options(folder=str(tmp_path / "c"), data=str(tmp_path / "a.jsonl")), told.append)
    assert (again["members"], again["figures"]["accuracy"]["units"]) == (2, 20)


def test_the_worlds_test_texts_are_not_those_that_were_learned(members, tmp_path, monkeypatch):
    from tinylm.classification import command

    save(Transformer(members[0].config.replace(head="mlm", classes=0), tokenizer=members[0].tokenizer), tmp_path / "m")
    seen = {}
    monkeypatch.setattr(command, "classify_many", lambda models, learn, **_: seen.update(learn=learn))
    test = Committee(members)
    monkeypatch.setattr(test, "evaluate", lambda found: (_ for _ in ()).throw(SetError(found.texts)))
    monkeypatch.setattr(command.Committee, "of", lambda tuned: test)
    with pytest.raises(SetError) as told:
        classify_command(Options(folder=str(tmp_path / "m"), data="world", test="world", limit=40), print)
    assert not set(seen["learn"].texts) & set(told.value.args[0])


def test_classes_are_matched_by_name(committee):
    """A set with fewer classes, numbered in another way, is the same to a committee that knows their names."""
    other = Dataset(TEXTS[1:], np.array([1, 1, 0]), ("wood", "water"))
    found = committee.evaluate(other)
    wanted = committee.logits(TEXTS[1:]).argmax(-1) == [1, 1, 2]
    assert found.items["accuracy"].tolist() == wanted.tolist()
    assert found.names == DATA.names


# --- analyses ---------------------------------------------------------------------------------------------------------


def test_the_curve_over_all_subsets():
    """By hand: singles 2/4, 2/4, 3/4; pairs {0,1} 2/4, {0,2} 2/4, {1,2} 3/4; all three 2/4."""
    points = curve(LOGITS, LABELS)
    assert [p.k for p in points] == [1, 2, 3]
    assert [p.subsets for p in points] == [3, 3, 1]
    right = [[0.5, 0.5, 0.75], [], [0.5]]
    for pair in itertools.combinations(range(3), 2):
        right[1].append((LOGITS[list(pair)].sum(0).argmax(-1) == LABELS).mean())
    assert [p.accuracy for p in points] == pytest.approx([np.mean(r) for r in right])
    assert right[1] == [0.5, 0.5, 0.75]
    sampled = curve(LOGITS, LABELS, ks=[2], most=2)
    assert sampled[0].subsets == 2
    with pytest.raises(SetError, match="k = 4"):
        curve(LOGITS, LABELS, ks=[4])


def test_diversity_by_hand():
    found = diversity(LOGITS, LABELS)
    assert found.disagreement[0, 1] == 0.5
    assert found.disagreement[1, 2] == 0.75
    assert found.disagreement[0, 0] == 0
    assert found.mean_disagreement == pytest.approx((0.5 + 0.75 + 0.75) / 3)
    wrong = (LOGITS.argmax(-1) != LABELS).astype(float)
    assert found.correlation == pytest.approx(np.corrcoef(wrong))
    assert (found.any_right, found.all_right) == (1.0, 0.0)
    perfect = diversity(np.stack([np.eye(2)[LABELS]] * 2), LABELS)
    assert np.isnan(perfect.mean_correlation)
    # text 3: committee 3 against 2, one member of three right
    assert only_committee(LOGITS, LABELS).tolist() == [3]
    assert only_committee(LOGITS, LABELS, deep=np.eye(2)[LABELS]).tolist() == []


def test_cascade_by_hand():
    """Four texts, small right on the first two, deep on all but the first; the margin orders 3 2 1 0."""
    labels = np.array([0, 0, 1, 1])
    small = np.array([[4.0, 0], [3.0, 0], [2.0, 0], [1.0, 0]])
    deep = np.array([[0, 9.0], [9.0, 0], [0, 9.0], [0, 9.0]])
    found = cascade(small, deep, labels, (1.0, 10.0))
    assert found.share.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert found.flops.tolist() == [1, 3.5, 6, 8.5, 11]
    assert found.accuracy.tolist() == [0.5, 0.75, 1, 1, 0.75]
    assert found.oracle.tolist() == [0.5, 0.75, 1, 1, 0.75]
    assert found.random.tolist() == [0.5, 0.5625, 0.625, 0.6875, 0.75]
    assert found.recovered == pytest.approx(1.0)
    assert cascade(small[:, ::1] * np.array([[1], [1], [-9], [1]]), deep, labels).recovered < 1
    assert cascade(np.stack([small, small]), deep, labels).accuracy.tolist() == found.accuracy.tolist()
    deciles = where_larger_helps(small, deep, labels, bins=2)
    assert [(d.small, d.deep, d.texts) for d in deciles] == [(1.0, 0.5, 2), (0.0, 1.0, 2)]
    assert deciles[0].uncertainty < deciles[1].uncertainty
    assert deciles[0].gain < 0 < deciles[1].gain


def test_uncertainty():
    z = np.log(np.array([[0.7, 0.2, 0.1], [0.4, 0.35, 0.25]]))
    assert uncertainty(z) == pytest.approx([0.5, 0.95])
    assert uncertainty(z, "largest") == pytest.approx([0.3, 0.6])
    assert uncertainty(z, "entropy")[0] == pytest.approx(-sum(p * np.log(p) for p in (0.7, 0.2, 0.1)))
    assert uncertainty(LOGITS, "disagreement").tolist() == pytest.approx([2 / 3, 1 / 3, 2 / 3, 2 / 3])
    with pytest.raises(SetError, match="must be one of margin"):
        uncertainty(z, "doubt")
    with pytest.raises(SetError, match="needs the members"):
        uncertainty(z, "disagreement")


def test_costs():
    """Side by side a committee takes as long as one member; the sum is that of all."""
    shallow = ModelConfig(kind="encoder", vocab=50, context=16, width=8, layers=1, heads=1, hidden=8, mlp="gelu",
                          positions="none", head="classes", classes=3)  # fmt: skip
    one = cost(shallow, 10)
    matrices = 2 * (4 * 8 * 8 + 2 * 8 * 8)
    assert one.flops == 10 * (matrices + 4 * 8 * 10) + 2 * (8 * 8 + 8 * 3)
    both = cost([shallow, shallow.replace(layers=3)], 10)
    assert (both.depth, both.critical) == (3, cost(shallow.replace(layers=3), 10).flops)
    assert both.flops == one.flops + both.critical
    assert size(shallow).total == count(shallow)
    wide = parameters_like(shallow, 8 * count(shallow))
    assert wide.head_width == 8
    assert wide.layers == 1
    assert abs(count(wide) / (8 * count(shallow)) - 1) < 0.35
    points = {"a": (1.0, 0.5), "b": (2.0, 0.4), "c": (3.0, 0.9), "d": (3.0, 0.8)}
    assert frontier(points) == ["a", "c"]


def test_overlap(members):
    tokenizer = members[0].tokenizer
    texts = ["ZZZ QQQ", "a fish in the sea", "!!!!"]
    found = coverage(texts, DATA, tokenizer)
    assert found.argmax() == 1
    assert select_texts(texts, DATA, tokenizer, 1) == ["a fish in the sea"]
    assert "a fish in the sea" not in select_texts(texts, DATA, tokenizer, 2, most=False)
    with pytest.raises(SetError, match="there are 3 texts"):
        select_texts(texts, DATA, tokenizer, 4)


def test_pictures_are_inert():
    names = ["<script>", "b"]
    confusion = np.array([[3, 1], [0, 2]])
    shown = [
        k_curve({"<b>sum": curve(LOGITS, LABELS)}, {"deep": 0.7}),
        confusion_map(confusion, names, "<i>"),
        disagreement_map(diversity(LOGITS, LABELS).disagreement),
        cascade_curve(cascade(LOGITS, LOGITS[2], LABELS, (1e6, 2e6))),
    ]
    for picture in shown:
        assert not re.search(r"<(script|i|b>sum)", picture.html)
        assert picture.text
    assert "<svg" in shown[0].html
    assert "<svg" in shown[3].html
    assert re.search(r"3\s+1", shown[1].text)
    assert len(confusion_map(np.eye(60, dtype=int), [str(i) for i in range(60)]).text.splitlines()) < 50
