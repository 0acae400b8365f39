"""The suite as a whole: completions, checkpoints of a run, the harness of others, everything at once."""

import functools
import json
from types import SimpleNamespace

import numpy as np
import pytest

from tinylm.checkpoint import Run, save
from tinylm.config import ModelConfig, TrainConfig
from tinylm.evaluation import EvaluationError, evaluate
from tinylm.generation import generate
from tinylm.model import Transformer
from tinylm.suite import PROMPTS, Pair, Scorer, complete, dynamics, evaluate_suite, minimal_pairs, rubric
from tinylm.suite.command import suite_command
from tinylm.suite.harness import harness
from tinylm.tokenizer import Tokenizer
from tinylm.weights import named
from tinylm.world import World

PAIRS = [Pair(f"The {a} was red.", f"The {a} were red.", "x") for a in ("cat", "dog", "ball", "house", "bird")]


@functools.cache
def tokenizer():
    return Tokenizer.train(World().texts(40), vocab=400)


@functools.cache
def model(seed=3):
    config = ModelConfig(vocab=tokenizer().vocab, context=64, width=32, layers=2, heads=2, init_std=0.3)
    return Transformer(config, rngs=seed, tokenizer=tokenizer())


# --- completions ------------------------------------------------------------------------------------------------------


def test_completions_are_generations_whose_end_is_known():
    prompts = ["Lily had a", "Tom", "Once upon a time"]
    made = complete(model(), prompts, tokens=12, temperature=0, seed=1)
    assert [one.whole for one in made] == generate(model(), prompts, tokens=12, temperature=0)
    assert made == complete(model(), prompts, tokens=12, temperature=0, seed=1)
    twice = complete(model(), ["Tom"] * 6, tokens=12, batch=2)
    assert len({one.text for one in twice}) == 6  # equal prompts, in one batch or in several, get different ends


def test_a_completion_that_ends_says_so():
    m = Transformer(model().config, rngs=3, tokenizer=tokenizer())
    m.norm.scale[...] = m.norm.scale[...] * 0  # all logits 0: the likeliest is id 0, which here begins and ends a text
    assert tokenizer().end == 0
    (one,) = complete(m, ["Tom"], tokens=5, temperature=0)
    assert one.ended
    assert one.text == ""


def test_the_rubric_on_a_model():
    got = rubric(model(), prompts=PROMPTS[:3], samples=2, tokens=8, seed=4)
    assert got.settings["stories"] == 6
    assert (got.settings["tokens"], got.figures["words"].units) == (8, 3)
    assert got["names_kept"] == rubric(model(), prompts=PROMPTS[:3], samples=2, tokens=8, seed=4)["names_kept"]


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    config = model().config
    with Run.create(tmp_path / "run", model=config, train=TrainConfig(steps=9), tokenizer=tokenizer()) as run:
        for step in (1, 2, 4):
            run.save(step, {f"params.{name}": np.asarray(x) for name, x in named(model(step)).items()})
    return tmp_path / "run"


def test_a_row_per_checkpoint(run):
    tasks = {
        "pairs": lambda m: minimal_pairs(m, PAIRS),
        "text": lambda m: evaluate(m, ["The cat was red.", "A dog."]),
        "width": lambda m: m.config.width,
    }
    seen = []
    got = dynamics(run, tasks, progress=seen.append)
    assert got.steps == (1, 2, 4) == tuple(seen)
    for i, step in enumerate(got.steps):
        alone = minimal_pairs(model(step), PAIRS)
        assert got.figures["pairs.margin"][i].value == pytest.approx(alone["margin"], abs=1e-4)
        assert got.column("text.bits_per_byte")[i] == pytest.approx(tasks["text"](model(step)).bits_per_byte, abs=1e-4)
    assert len(set(got.column("pairs.margin"))) == 3
    assert got.column("width") == [32, 32, 32]
    assert json.loads(json.dumps(got.to_dict()))["steps"] == [1, 2, 4]
    lines = got.to_csv().splitlines()
    assert lines[0].startswith("step,pairs.accuracy,pairs.accuracy_low,pairs.accuracy_high,")
    assert float(lines[2].split(",")[1]) == got.column("pairs.accuracy")[1]
    assert repr(got).splitlines()[0].split() == ["step", *got.figures]
    assert "<table" in got._repr_html_()
    assert dynamics(run, {"n": lambda m: 1}, steps=[4, 2]).steps == (2, 4)


def test_damaged_checkpoints_are_noted(run):
    path = run / "checkpoints" / "step-00000002.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(raw)
    got = dynamics(run, {"n": lambda m: 1.0})
    assert got.steps == (1, 4)
    assert got.notes[0].startswith("step 2 passed over: ")
    assert got.notes[0] in repr(got)


def test_dynamics_of_nothing(run, tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 3; it has"):
        dynamics(run, {"n": lambda m: 1.0}, steps=[3])
    with pytest.raises(FileNotFoundError):
        dynamics(tmp_path / "absent", {"n": lambda m: 1.0})
    with pytest.raises(EvaluationError, match="at least one task"):
        dynamics(run, {})
    with pytest.raises(EvaluationError, match="task 'n' gives str"):
        dynamics(run, {"n": lambda m: "good"})
    with pytest.raises(EvaluationError, match="no column 'm'"):
        dynamics(run, {"n": lambda m: 1.0}).column("m")


# --- everything at once -----------------------------------------------------------------------------------------------


def test_the_whole_suite(tmp_path):
    (tmp_path / "pairs.jsonl").write_text(
        "".join(json.dumps({"sentence_good": p.good, "sentence_bad": p.bad}) + "\n" for p in PAIRS)
    )
    (tmp_path / "cloze.jsonl").write_text('{"text": "Tom saw a cat. Mia saw the cat"}\n{"text": "A red ball"}\n')
    texts = list(World().texts(30))
    (tmp_path / "train.txt").write_text("<|endoftext|>".join(texts[:20]))
    seen = []
    files = {"pairs": tmp_path / "pairs.jsonl", "clozes": tmp_path / "cloze.jsonl"}
    more = {"text": texts[20:], "train": tmp_path / "train.txt", "count": 3, "tokens": 4}
    got = evaluate_suite(model(), **files, **more, progress=seen.append)
    assert seen == ["pairs", "cloze", "rubric", "variety", "memorisation"]
    assert got["pairs"]["margin"] == minimal_pairs(model(), [p._replace(paradigm="pairs") for p in PAIRS])["margin"]
    assert got["cloze"].settings["items"] == 2
    assert got["rubric"].settings["stories"] == 4 * len(PROMPTS)
    assert got["memorisation"].settings["count"] == 3
    assert list(json.loads(json.dumps(got.to_dict()))) == seen
    assert all(task in repr(got) for task in seen)
    assert got._repr_html_().count("<table") == 5
    with pytest.raises(EvaluationError, match="'judge' was not run"):
        got["judge"]


def test_the_suite_from_a_terminal(tmp_path):
    save(model(), tmp_path / "model")
    (tmp_path / "held.txt").write_text("###".join(World().texts(20)))
    args = {"folder": tmp_path / "model", "suite": "cloze, variety", "text": str(tmp_path / "held.txt"), "train": None}
    args |= {"pairs": None, "cloze": None, "separator": "###", "limit": None, "seed": 0}
    said = []
    figures, text = suite_command(SimpleNamespace(**args), said.append)
    assert said == ["cloze ...", "variety ..."]
    held = (tmp_path / "held.txt").read_text().split("###")
    again = evaluate_suite(model(), ["cloze", "variety"], text=held)
    assert figures == again.to_dict()
    assert text == repr(again)


def test_the_suite_with_what_is_at_hand():
    with pytest.raises(EvaluationError, match="no task is called blimp; known: pairs"):
        evaluate_suite(model(), ["blimp"])
    with pytest.raises(EvaluationError, match="memorisation needs train="):
        evaluate_suite(model(), ["memorisation"], text=["a"])


# --- the harness of others --------------------------------------------------------------------------------------------


def requests(*args):
    return [SimpleNamespace(args=one) for one in args]


def test_without_the_harness(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.api.model", None)
    with pytest.raises(EvaluationError, match="pip install lm_eval"):
        harness(model())


@pytest.fixture
def adapter():
    pytest.importorskip("lm_eval.api.model", reason="lm_eval is not installed")
    return harness(model())


def test_the_adapter(adapter):
    pairs = [("The cat", " sat"), ("The cat ", "sat"), ("", "The cat")]
    found = adapter.loglikelihood(requests(*pairs))
    one, two = Scorer(model()).continuations([("The cat", " sat"), ("", "The cat")])
    assert [x for x, _ in found] == pytest.approx([one.logprob, one.logprob, two.logprob], abs=1e-4)
    assert [x for _, x in found] == [one.greedy, one.greedy, two.greedy]
    story = World().story(0).text
    (rolling,) = adapter.loglikelihood_rolling(requests((story,)))
    assert rolling == pytest.approx(Scorer(model()).texts([story])[0].sum())
    greedy = generate(model(), "Tom had", tokens=12, temperature=0).removeprefix("Tom had")
    asked = [("Tom had", {"until": [], "max_gen_toks": 12}), ("Tom had", {"until": greedy[4:6], "max_gen_toks": 12})]
    assert adapter.generate_until(requests(*asked)) == [greedy, greedy[: greedy.find(greedy[4:6])]]


def test_the_adapter_says_what_transformers_says(adapter, tmp_path):
    """The harness's own class on the same weights, exported."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate, which lm_eval's transformers models need, is not installed")
    models = pytest.importorskip("lm_eval.models.huggingface")
    save(model(), tmp_path / "hf", format="hf")
    theirs = models.HFLM(pretrained=str(tmp_path / "hf"), device="cpu", dtype="float32", batch_size=1)
    split = World().story(2).text.split(" ")
    pairs = [(" ".join(split[:n]), " " + " ".join(split[n : n + 2])) for n in (3, 7, 12, 70)]  # the last is cut
    for ours, other in zip(
        adapter.loglikelihood(requests(*pairs)), theirs.loglikelihood(requests(*pairs), disable_tqdm=True), strict=True
    ):
        assert ours[0] == pytest.approx(other[0], abs=2e-4)
        assert ours[1] == other[1]


def test_a_task_of_the_harness(adapter, tmp_path):
    import lm_eval

    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps({"good": p.good, "bad": p.bad}) + "\n" for p in PAIRS))
    task = {
        "task": "ours", "dataset_path": "json", "dataset_kwargs": {"data_files": {"train": str(file)}},
        "output_type": "multiple_choice", "validation_split": "train", "doc_to_text": "", "doc_to_target": 0,
        "doc_to_choice": "{{[good, bad]}}", "target_delimiter": "", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    found = lm_eval.simple_evaluate(model=adapter, tasks=[task], bootstrap_iters=0)
    assert found["results"]["ours"]["acc,none"] == pytest.approx(minimal_pairs(model(), PAIRS)["accuracy"])
