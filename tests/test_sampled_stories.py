"""data_scripts/sampled_stories.py: texts of an exported model in a file, and going on with it."""

import importlib.util
import json
import types
from pathlib import Path

import pytest

import tinylm
from tinylm.reading import documents
from tinylm.tokenizer import Tokenizer

SCRIPT = Path(__file__).parents[1] / "data_scripts" / "sampled_stories.py"


@pytest.fixture
def script(monkeypatch):
    """The script as a module, whose engine writes 512 texts: every other one is cut off by the limit."""
    spec = importlib.util.spec_from_file_location("sampled_stories", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "Engine", lambda path, **_: Writer())
    return module


class Writer:
    facts = types.SimpleNamespace(context=64)

    def encode(self, text):
        return text.split()

    def generate(self, prompts, *, tokens, seed, temperature):
        return [f"Story {seed} {i}." if i % 2 else "word " * tokens for i in range(len(prompts))]


def run(script, monkeypatch, *args):
    monkeypatch.setattr("sys.argv", ["sampled_stories.py", *map(str, args)])
    script.main()


def test_whole_texts_are_kept_and_a_second_call_goes_on(script, monkeypatch, tmp_path, capsys):
    model, out = tmp_path / "m.tlm", tmp_path / "s.txt"
    model.write_bytes(b"weights")
    run(script, monkeypatch, model, "--out", out, "--megabytes", 0.004)
    first, note = out.read_bytes(), json.loads((tmp_path / "s.txt.json").read_text())
    assert list(documents(out))[:2] == ["Story 0 1.", "Story 0 3."]
    assert (note["groups"], note["texts"], note["sampled"], note["bytes"]) == (1, 256, 512, len(first))
    out.write_bytes(first + b"half a te")  # a run that was killed while it wrote
    run(script, monkeypatch, model, "--out", out, "--megabytes", 0.008)
    assert out.read_bytes().startswith(first + b"Story 1 1.\n<|endoftext|>\n")
    assert "512 texts" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="was sampled with other settings"):
        run(script, monkeypatch, model, "--out", out, "--temperature", 0.5)
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(SystemExit, match=r"no mine.txt.json says what it is"):
        run(script, monkeypatch, model, "--out", tmp_path / "mine.txt")
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_a_model_that_ends_no_text_is_said(monkeypatch, tmp_path):
    """The engine itself: a random model writes until it is cut off, or what is no sentence."""
    tokenizer = Tokenizer.train([], kind="byte")
    config = tinylm.ModelConfig(vocab=tokenizer.vocab, context=12, width=16, layers=1, heads=1)
    tinylm.export(tinylm.Transformer(config, tokenizer=tokenizer), tmp_path / "m.tlm")
    spec = importlib.util.spec_from_file_location("sampled_stories", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(SystemExit, match="none of 512 texts ended within 11 tokens"):
        run(module, monkeypatch, tmp_path / "m.tlm", "--out", tmp_path / "s.txt")
    with pytest.raises(SystemExit, match="error: "):
        run(module, monkeypatch, tmp_path / "nothing.tlm", "--out", tmp_path / "s.txt")
