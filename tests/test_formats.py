"""The door to other programs' formats: what goes out comes back, and what comes in works like any model of the kit."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tinylm
from tinylm import cli, formats
from tinylm.checkpoint import load, save
from tinylm.config import ModelConfig, TrainConfig
from tinylm.data import Tokens, write_tokens
from tinylm.evaluation import evaluate
from tinylm.formats import FormatError, format_of
from tinylm.generation import generate
from tinylm.model import Transformer, sites
from tinylm.taps import recording
from tinylm.tokenizer import Tokenizer
from tinylm.training import train
from tinylm.weights import assign, named
from tinylm.world import World

LLAMA = {"context": 64, "width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "init_std": 0.2}
TARGETS = {"llama2c": "m.bin", "gguf": "m.gguf", "hf": "m"}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(World().texts(60), vocab=320)


@pytest.fixture(scope="module")
def model(tokenizer):
    return Transformer(ModelConfig(vocab=tokenizer.vocab, **LLAMA), rngs=3, tokenizer=tokenizer)


def written(model, folder, name):
    """Without rounding, so that what is read back can be compared bit for bit."""
    options = {"gguf": {"dtype": "float32"}}.get(name, {})
    return save(model, folder / TARGETS[name], format=name, **options)


@pytest.mark.parametrize("name", TARGETS)
def test_out_and_back(name, model, tmp_path):
    """The same text from the same seed, whatever the file numbers its tokens by."""
    path = written(model, tmp_path, name)
    back = load(path)
    assert back.config.replace(vocab=1, init_std=0) == model.config.replace(vocab=1, init_std=0)
    settings = {"tokens": 40, "temperature": 0.0}
    assert generate(back, "Once upon", **settings) == generate(model, "Once upon", **settings)
    text = World().story(7).text
    mine, theirs = evaluate(model, [text]), evaluate(back, [text])
    if name != "llama2c":  # which cuts a text in other pieces
        assert theirs.bits_per_byte == pytest.approx(mine.bits_per_byte, rel=1e-6)
        assert back.tokenizer.encode(text).tolist() == model.tokenizer.encode(text).tolist()
        old = named(model)
        assert all((np.asarray(value) == np.asarray(old[n])).all() for n, value in named(back).items())


@pytest.mark.parametrize("name", TARGETS)
def test_what_comes_in_works_like_any_model(name, model, tmp_path):
    """Taps, training, checkpoints, evaluation, generation, and every way out again."""
    back = load(written(model, tmp_path, name))
    seen = {}
    ids = back.tokenizer.encode("One day, a fox")[None]
    back(ids, tap=recording(seen))
    assert seen.keys() == sites(back).keys()
    write_tokens(World().texts(8), back.tokenizer, tmp_path / "data")
    tokens = Tokens.open(tmp_path / "data", "train")
    trainer = train(back, tokens, TrainConfig(steps=16, batch=4, learning_rate=1e-2, warmup=1), out=tmp_path / "run")
    list(trainer)
    assert np.mean(trainer.losses[-3:]) < trainer.losses[0]
    again = load(tmp_path / "run")
    assert generate(again, "The", tokens=8, seed=1) == generate(back, "The", tokens=8, seed=1)
    for other in TARGETS:
        onward = load(written(again, tmp_path / f"from {name}", other))
        greedy = {"tokens": 30, "temperature": 0.0}
        assert generate(onward, "The", **greedy) == generate(again, "The", **greedy)


def test_the_format_follows_from_the_name():
    assert [format_of(p) for p in ("a.bin", "b/a.GGUF", "x.bin.gz", "a.onnx", "folder", "v1.2", "a.safetensors")] == [
        "llama2c", "gguf", "llama2c", "onnx", None, None, None,
    ]  # fmt: skip


def test_wrong_ways_are_told(model, tmp_path):
    with pytest.raises(FormatError, match=r"m\.gguf has the suffix of gguf, but format = 'hf'"):
        save(model, tmp_path / "m.gguf", format="hf")
    with pytest.raises(FormatError, match=r"m: a gguf file ends in \.gguf"):
        save(model, tmp_path / "m", format="gguf")
    with pytest.raises(FormatError, match="format = 'ggml'; did you mean 'gguf'"):
        save(model, tmp_path / "m", format="ggml")
    with pytest.raises(FormatError, match="gguf files: no option 'group'; known: dtype"):
        save(model, tmp_path / "m.gguf", group=3)
    with pytest.raises(FormatError, match=r"no known format has the suffix '\.txt'; known: \.bin, \.gguf, \.onnx"):
        (tmp_path / "a.txt").write_text("hello")
        formats.read(tmp_path / "a.txt")
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        formats.read(tmp_path / "none.gguf")
    for begin in (b"PK\x03\x04", b"\x80\x02}q", b"\x80\x05\x95"):
        (tmp_path / "pytorch_model.bin").write_bytes(begin + bytes(100))
        with pytest.raises(FormatError, match="is a pickle .* tinylm never does. Convert it to safetensors"):
            load(tmp_path / "pytorch_model.bin")
    (tmp_path / "m.onnx").write_bytes(b"")
    with pytest.raises(FormatError, match="onnx files are written, not read"):
        load(tmp_path / "m.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "m.onnx", "pytorch_model.bin"]


def test_a_width_that_begins_like_a_pickle(tmp_path):
    """640 as four bytes is 80 02 00 00, and a pickle of protocol 2 begins with 80 02."""
    config = ModelConfig(vocab=16, context=8, width=640, layers=1, heads=10, hidden=64)
    assert load(save(Transformer(config), tmp_path / "m.bin")).config.width == 640


def test_names_that_are_none(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("", " ", ".gguf", "m.safetensors", "m.pt", "m.bin.gz", "m.gguf.gz", "m.zip"):
        with pytest.raises(FormatError, match="is no name|are folders|are written uncompressed"):
            save(model, path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FormatError, match="kit's own folder: no option 'dtype'; known: codec"):
        save(model, "m", dtype="float16")
    with pytest.raises(FormatError, match="loading .*own, which is the kit's own: no option 'tokenizer'; known: none"):
        load(save(model, "own"), tokenizer="x")
    with pytest.raises(FormatError, match="reading hf: no option 'typo'"):  # before anything is fetched
        load("hf:some/model", typo=1)


def test_a_layout_that_theirs_has_and_ours_lacks(tokenizer, tmp_path, capsys):
    """GPT-2 always has biases; what is read back has them, zero, and the comparison says that nothing changed."""
    config = ModelConfig(
        vocab=tokenizer.vocab, **{**LLAMA, "kv_heads": 4}, norm="layernorm", positions="learned", mlp="gelu_tanh"
    )
    source = save(Transformer(config, tokenizer=tokenizer), tmp_path / "own")
    out, _, status = convert(capsys, source, tmp_path / "hf", "--to", "hf")
    assert (status, out.endswith("read back exactly\n")) == (0, True)


def test_nothing_is_written_of_a_model_the_format_cannot_say(tokenizer, tmp_path):
    odd = Transformer(ModelConfig(vocab=tokenizer.vocab, **LLAMA, qk_norm=True, softcap=3.0), tokenizer=tokenizer)
    for name in TARGETS:
        with pytest.raises(FormatError, match="softcap"):
            written(odd, tmp_path, name)
    assert list(tmp_path.iterdir()) == []


def test_a_smaller_file_of_our_own(model, tmp_path):
    plain, coded = save(model, tmp_path / "plain"), save(model, tmp_path / "coded", codec="planes")
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (plain, coded)]
    assert sizes[1] < 0.9 * sizes[0]
    a, b = named(load(plain)), named(load(coded))
    assert all((np.asarray(a[n]) == np.asarray(b[n])).all() for n in a)
    with pytest.raises(ValueError, match="codec = 'zip'"):
        save(model, tmp_path / "other", codec="zip")


# --- the command ------------------------------------------------------------------------------------------------------


def convert(capsys, *args):
    """stdout, stderr and the exit status of `tinylm convert`."""
    try:
        cli.main(["convert", *map(str, args)])
        status = 0
    except SystemExit as stop:
        status = stop.code
    return *capsys.readouterr(), status


def test_convert(model, tmp_path, capsys):
    source = save(model, tmp_path / "own")
    out, err, status = convert(capsys, source, tmp_path / "m.gguf", "--dtype", "f32")
    assert (err, status) == ("", 0)
    assert out.startswith(f"{tmp_path / 'm.gguf'}: ")
    assert out.endswith(" MB, read back exactly\n")
    out, _, status = convert(capsys, tmp_path / "m.gguf", tmp_path / "small.gguf", "--dtype", "q8_0", "--json")
    figures = json.loads(out)
    assert 0 < figures["largest_change"] < 0.01
    assert figures["bytes"] == (tmp_path / "small.gguf").stat().st_size
    assert convert(capsys, tmp_path / "small.gguf", tmp_path / "hf", "--to", "hf")[2] == 0
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] == "llama"
    assert convert(capsys, tmp_path / "hf", tmp_path / "again", "--codec", "planes")[2] == 0
    assert "tinylm" in json.loads((tmp_path / "again" / "config.json").read_text())
    assert convert(capsys, tmp_path / "again", tmp_path / "m.bin", "--version", "2", "--group", "32")[2] == 0


def test_convert_says_what_is_wrong_in_one_line(model, tmp_path, capsys):
    source = save(model, tmp_path / "own")
    for args, text in (
        ((tmp_path / "nothing", tmp_path / "m.gguf"), "there is no file or folder"),
        ((source, tmp_path / "m.gguf", "--dtype", "q3"), "q3"),
        ((source, tmp_path / "m.bin", "--dtype", "f16"), "llama2c files: no option 'dtype'; known: version, group"),
        ((source, tmp_path / "m.tar"), "m.tar"),
    ):
        out, err, status = convert(capsys, *args)
        assert (out, status) == ("", 1), args
        assert text in err
        assert err.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["own"]


def test_reading_needs_no_optional_package(model, tmp_path):
    """A gguf, a .bin and a transformers folder open without torch, onnx or the hub's package."""
    paths = [str(written(model, tmp_path, name)) for name in TARGETS]
    code = (
        "import sys, tinylm\n"
        f"for path in {paths!r}: tinylm.load(path)\n"
        "print(*{'torch', 'transformers', 'onnx', 'onnxruntime', 'gguf', 'sentencepiece', 'huggingface_hub'}"
        " & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(tinylm.__file__).parents[1], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_an_odd_vocabulary_survives(tokenizer, tmp_path):
    """A table with more rows than the tokenizer has ids, as padded embeddings have."""
    model = Transformer(ModelConfig(vocab=tokenizer.vocab + 8, **LLAMA), rngs=1, tokenizer=tokenizer)
    assign(model, {n: np.asarray(v) for n, v in named(model).items()})
    for name in ("gguf", "hf"):
        back = load(written(model, tmp_path, name))
        assert back.config.vocab == tokenizer.vocab + 8
        assert back.tokenizer.vocab in (tokenizer.vocab, tokenizer.vocab + 8)
