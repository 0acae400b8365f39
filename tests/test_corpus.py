"""From sources to shards: cleaned, split, idempotent, with a provenance that says what was done."""

import itertools
import json
import runpy
import sys
from pathlib import Path

import pytest

from tinylm import corpus
from tinylm.config import ConfigError
from tinylm.corpus import identity, opened, prepare
from tinylm.shards import Tokens
from tinylm.text import TextError
from tinylm.tokenizer import Tokenizer
from tinylm.world import World

SCRIPTS = Path(__file__).parents[1] / "data_scripts"
STORIES = list(World().texts(60))


@pytest.fixture
def source(tmp_path) -> Path:
    path = tmp_path / "stories.jsonl"
    near = STORIES[1].replace("One", "A", 1)
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in [*STORIES, STORIES[0], near]))
    return path


def test_what_is_written_is_what_was_read(source, tmp_path):
    lines = []
    made = prepare([source], tmp_path / "data", vocab=600, say=lines.append)
    assert made.about["documents_read"] == 62
    assert made.about["duplicates"] == {"exact": 1, "near": 1, "similarity": 0.8}
    assert made.train.documents + made.valid.documents == 60
    assert made.valid.documents > 0
    assert made.about["round_trip_failures"] == 0
    texts = []
    for tokens in (made.train, made.valid):
        ids, end = tokens[0 : len(tokens)], made.tokenizer.end
        cuts = [i for i, token in enumerate(ids) if token == end]
        texts += [made.tokenizer.decode(ids[a + 1 : b]) for a, b in itertools.pairwise(cuts)]
    assert sorted(texts) == sorted(STORIES)
    assert any("1 equal and 1 nearly equal" in line for line in lines)


def test_the_same_wish_does_nothing_another_is_refused(source, tmp_path):
    first = prepare([source], tmp_path / "data", vocab=600)
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "data").iterdir()}
    lines = []
    again = prepare([source], tmp_path / "data", vocab=600, say=lines.append)
    assert again.train.sha256 == first.train.sha256
    assert lines == [f"{tmp_path / 'data'} is up to date"]
    assert stamps == {p: p.stat().st_mtime_ns for p in (tmp_path / "data").iterdir()}
    source.write_text(source.read_text() + json.dumps({"text": "One more."}) + "\n")
    with pytest.raises(ConfigError, match="other sources or settings"):
        prepare([source], tmp_path / "data", vocab=600)
    assert opened(tmp_path / "data").about == first.about


def test_making_it_again_gives_the_same_bytes(source, tmp_path):
    a, b = (prepare([source], tmp_path / name, vocab=600) for name in ("a", "b"))
    assert (a.train.sha256, a.valid.sha256, a.tokenizer.sha256) == (b.train.sha256, b.valid.sha256, b.tokenizer.sha256)


def test_held_out_documents_of_the_training_text_are_removed(source, tmp_path):
    valid = tmp_path / "valid.txt"
    fresh = list(World().texts(5, seed=9))
    valid.write_text("<|endoftext|>".join([*fresh, STORIES[7]]))
    made = prepare([source], tmp_path / "data", valid=valid, vocab=600)
    assert made.valid.documents == 5
    assert made.about["contamination"]["exact"] == 1
    kept = prepare([source], tmp_path / "all", valid=valid, vocab=600, clean=False)
    assert (kept.train.documents, kept.valid.documents) == (62, 6)


def test_a_given_tokenizer_and_only_the_first_tokens(source, tmp_path):
    tokenizer = Tokenizer.train(STORIES, vocab=400)
    made = prepare([source], tmp_path / "data", tokenizer=tokenizer, first=10)
    assert made.tokenizer == tokenizer
    assert len(made.train) == made.train.documents * 11 + 1


def test_a_folder_of_shards_is_a_source(source, tmp_path):
    made = prepare([source], tmp_path / "data", vocab=600)
    assert prepare([tmp_path / "data"], tmp_path / "unused").train.sha256 == made.train.sha256
    assert not (tmp_path / "unused").exists()


def test_an_unfinished_folder_is_made_whole(source, tmp_path):
    made = prepare([source], tmp_path / "data", vocab=600)
    (tmp_path / "data" / "provenance.json").unlink()
    assert prepare([source], tmp_path / "data", vocab=600).train.sha256 == made.train.sha256


def test_options_that_a_folder_of_shards_cannot_take(source, tmp_path):
    prepare([source], tmp_path / "d1", vocab=600)
    for given in (
        {"valid": source},
        {"tokenizer": tmp_path / "d1"},
        {"separator": "x"},
        {"limit": 3},
        {"first": 3},
        {"kind": "bpe"},
        {"vocab": 4096},
        {"clean": False},
        {"share": 0.1},
    ):
        with pytest.raises(ConfigError, match=rf"d1 holds token shards already: {next(iter(given))} cannot apply"):
            prepare([tmp_path / "d1"], tmp_path / "d2", **given)
    with pytest.raises(ConfigError, match="valid, limit cannot apply"):
        prepare(tmp_path / "d1", tmp_path / "d2", valid=source, limit=3)


def test_one_source_needs_no_list(source, tmp_path):
    made = prepare([source], tmp_path / "data", vocab=600)
    for one in (source, str(source)):
        lines = []
        assert prepare(one, tmp_path / "data", vocab=600, say=lines.append).about == made.about
        assert lines == [f"{tmp_path / 'data'} is up to date"]


def test_files_of_others_are_left_alone(source, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in ("tokenizer.json", "train-1-notes.json", "thesis.txt", "z.txt"):
        (folder / name).write_text("mine")
    said = []
    with pytest.raises(
        ConfigError, match=r"mine holds other files \(thesis.txt, tokenizer.json, train-1-notes.json and 1"
    ):
        prepare([source], folder, vocab=600, say=said.append)
    assert said == []
    assert {p.read_text() for p in folder.iterdir()} == {"mine"}
    with pytest.raises(ConfigError, match="is no folder"):
        prepare([source], source)
    (tmp_path / "half").mkdir()
    for name in (".train-00000.bin.77", ".provenance.json.77", "train-00003.bin", "tokenizer.json"):
        (tmp_path / "half" / name).write_text("unfinished")
    assert prepare([source], tmp_path / "half", vocab=600).train.documents


def test_a_folder_may_hold_its_own_shards(source, tmp_path):
    source.with_name("notes.md").write_text("not read")
    made = prepare([tmp_path], tmp_path / "data", vocab=600)
    source.with_name("notes.md").write_text("still not read")
    (tmp_path / "data" / "sample.txt").write_text("below the output")
    lines = []
    assert prepare([tmp_path], tmp_path / "data", vocab=600, say=lines.append).about == made.about
    assert lines == [f"{tmp_path / 'data'} is up to date"]


def test_no_stage_is_silent(source, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "EVERY", 0.0)
    said = []
    prepare([source], tmp_path / "data", vocab=600, say=said.append)
    for line in (
        "read 1 documents",
        "looking for duplicates among 62",
        "compared 61 of 62",
        "searched",
        "learning a bpe vocabulary of 600 from",
        "counted the words of 1",
        "train: 0 MB tokenized",
    ):
        assert any(s.startswith(line) for s in said), line
    with pytest.raises(TextError, match="limit = -1"):
        prepare("world", tmp_path / "world", limit=-1)


def test_identity_is_of_the_content(tmp_path):
    a, b = tmp_path / "a.txt", tmp_path / "b.txt"
    a.write_text("x")
    b.write_text("x")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "c.txt").write_text("x")
    before = identity(folder)
    (folder / "c.txt").write_text("y")
    assert identity(a) == identity(b) != identity(folder) != before
    assert identity("hf:some/set") == "hf:some/set"
    with pytest.raises(FileNotFoundError, match="nowhere"):
        identity("nowhere")


def test_scripts_take_a_separator(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    (tmp_path / "s.txt").write_text("\n\n".join(" ".join(t.split()) for t in STORIES))
    for script, given in (("own_text", []), ("tinystories", ["--source"])):
        args = [*given, str(tmp_path / "s.txt"), "--out", str(tmp_path / script), "--kind", "byte"]
        monkeypatch.setattr(sys, "argv", [script, *args, "--separator", r"\n\n", "--limit", "50"])
        runpy.run_path(str(SCRIPTS / f"{script}.py"), run_name="__main__")
        made = opened(tmp_path / script)
        assert made.train.documents + made.valid.documents == 50
        assert made.about["wish"]["separator"] == "\n\n"


@pytest.mark.parametrize("script", ["own_text", "tinystories", "wikipedia"])
def test_scripts_are_idempotent(script, source, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    out = tmp_path / "out"
    args = {
        "own_text": [str(source), "--out", str(out), "--vocab", "600"],
        "tinystories": ["--source", str(source), "--out", str(out), "--vocab", "600"],
        "wikipedia": ["--source", str(source), "--out", str(out), "--vocab", "900", "--articles", "30"],
    }[script]
    said = []
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", [script, *args])
        runpy.run_path(str(SCRIPTS / f"{script}.py"), run_name="__main__")
        said.append(capsys.readouterr().out)
    assert "up to date" in said[1]
    assert Tokens.open(out, "train", verify=True).sha256[:16] in said[0]
    if script == "wikipedia":
        made = opened(out)
        assert made.tokenizer.kind == "wordpiece"
        assert made.train.documents + made.valid.documents <= 30
        assert max(len(made.tokenizer.encode(t)) for t in STORIES) > 126
        assert len(made.train) <= made.train.documents * 127 + 1
