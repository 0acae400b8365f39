"""Saving and loading models: what comes back, what is refused, and what loading touches."""

import json
import os
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tinylm import checkpoint
from tinylm.checkpoint import (
    CheckpointDamaged,
    Run,
    StateMismatch,
    differences,
    load,
    read_file,
    require_match,
    save,
    write_file,
)
from tinylm.config import ConfigError, ModelConfig, TrainConfig
from tinylm.model import Transformer
from tinylm.tokenizer import Tokenizer
from tinylm.weights import assign, named

BYTES = Tokenizer.train([], kind="byte")
CONFIG = ModelConfig(vocab=BYTES.vocab, context=16, width=8, layers=2, heads=2, window=(0, 4))


@pytest.fixture(scope="module")
def model():
    return Transformer(CONFIG, rngs=3, tokenizer=BYTES)


@pytest.fixture
def saved(model, tmp_path):
    return save(model, tmp_path / "deep" / "model")


@pytest.fixture
def run(model, tmp_path):
    with Run.create(tmp_path / "run", model=CONFIG, train=TrainConfig(steps=9), tokenizer=BYTES) as run:
        for step in (1, 2):
            scaled = {f"params.{name}": value * step for name, value in named(model).items()}
            run.save(step, {**scaled, "optimizer.count": np.array(step)})
        yield run


def same(a, b, factor=1):
    assert named(a).keys() == named(b).keys()
    for name, value in named(a).items():
        np.testing.assert_array_equal(value * factor, named(b)[name])


def test_a_model_comes_back_and_computes_the_same(model, saved):
    found = load(saved)
    assert (found.config, found.tokenizer) == (CONFIG, BYTES)
    same(model, found)
    tokens = jnp.arange(12).reshape(2, 6)
    np.testing.assert_array_equal(model(tokens), found(tokens))
    same(model, load(saved / "model.safetensors"))
    same(model, load(str(saved)))


def test_every_kind_of_model_comes_back(tmp_path):
    for n, more in enumerate(({"head": "untied", "bias": True}, {"kind": "encoder", "head": "mlm", "token_types": 2})):
        model = Transformer(CONFIG.replace(**more), rngs=n)
        found = load(save(model, tmp_path / f"{n}"))
        assert found.config == model.config
        assert found.tokenizer is None
        same(model, found)


def test_loading_computes_no_random_weights(model, saved, monkeypatch):
    import jax

    real = jax.random.normal
    calls = []

    def counted(*args, **more):
        out = real(*args, **more)
        calls.append(not isinstance(out, jax.core.Tracer))
        return out

    monkeypatch.setattr(jax.random, "normal", counted)
    same(model, load(saved))
    assert not any(calls)


def test_saving_twice_gives_the_same_bytes_and_replaces(model, saved, tmp_path):
    other = save(model, tmp_path / "other")
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (saved / name).read_bytes() == (other / name).read_bytes()
    bare = Transformer(CONFIG, rngs=4)
    save(bare, other)
    same(bare, load(other))
    assert sorted(p.name for p in other.iterdir()) == ["config.json", "model.safetensors"]


def test_bfloat16_weights_come_back_only_where_they_are_expected(model, tmp_path):
    half = nnx.clone(model)
    assign(half, {name: value.astype(jnp.bfloat16) for name, value in named(model).items()})
    save(half, tmp_path)
    assert {t.dtype.name for t in read_file(tmp_path / "model.safetensors")[0].values()} == {"bfloat16"}
    with pytest.raises(StateMismatch, match="has type bfloat16 instead of float32"):
        load(tmp_path)


def test_a_model_is_never_saved_over_something_else(model, run, tmp_path):
    with pytest.raises(FileExistsError, match="holds a run"):
        save(model, run.folder)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(FileExistsError, match="another program's model"):
        save(model, tmp_path / "hf")
    assert [p.name for p in (tmp_path / "hf").iterdir()] == ["config.json"]


def test_the_model_inside_a_run(model, run):
    same(model, load(run.folder), factor=2)
    same(model, load(run.path(1)))
    assert load(run.folder).tokenizer == BYTES
    data = bytearray(run.path(2).read_bytes())
    data[-1] ^= 1
    run.path(2).write_bytes(data)
    with (
        pytest.warns(UserWarning, match=r"step-00000002\.safetensors is damaged"),
        pytest.warns(UserWarning, match="1 steps are lost"),
    ):
        same(model, load(run.folder))
    with pytest.raises(CheckpointDamaged, match="00000002"):
        load(run.path(2))


# --- mismatches (P10) -------------------------------------------------------------------------------------------------


def test_every_leaf_missing_extra_misshapen_retyped_or_renamed_is_refused(model, saved, monkeypatch):  # P10
    monkeypatch.setattr(os, "fsync", os.fstat)  # no waiting for the disk
    tensors, about = read_file(saved / "model.safetensors")
    for name, value in tensors.items():
        rest = {n: v for n, v in tensors.items() if n != name}
        for bad, match in (
            (rest, f"{name} is missing"),
            ({**tensors, f"{name}2": value}, f"{name}2 is unknown"),
            ({**rest, name: np.concatenate([value, value])}, f"{name} has shape .* instead of"),
            ({**rest, name: value.astype(np.float16)}, f"{name} has type float16 instead of float32"),
            ({**rest, "renamed": value}, f"{name} is missing; .*renamed is unknown|renamed is unknown.*"),
        ):
            write_file(saved / "model.safetensors", bad, about)
            with pytest.raises(StateMismatch, match=match):
                load(saved)


def test_the_first_ten_differences_are_listed_together():  # P10
    want = {f"w{n:02d}": np.zeros(n) for n in range(20)}
    have = {f"w{n:02d}": np.zeros(n + 1, np.float16) for n in range(3, 20)}
    assert len(differences(want, have)) == 3 + 2 * 17
    with pytest.raises(StateMismatch, match=r"^state does not fit: w00 is missing; .*w06 has shape .*; and 27 more$"):
        require_match(want, have, "state")
    require_match(want, want, "state")


def test_files_of_different_models_are_not_mixed(model, saved, tmp_path):  # P10
    other = save(Transformer(CONFIG.replace(theta=500.0), rngs=3, tokenizer=BYTES), tmp_path / "other")
    (other / "model.safetensors").replace(saved / "model.safetensors")  # same shapes, other mathematics
    with pytest.raises(StateMismatch, match="different models"):
        load(saved)
    save(model, saved)
    (saved / "tokenizer.json").write_text(Tokenizer.train(["abc abc"], vocab=263).to_json())
    with pytest.raises(StateMismatch, match="another tokenizer"):
        load(saved)
    (saved / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="tokenizer"):
        load(saved)


def test_a_config_that_cannot_be_used(saved):  # P10
    path, good = saved / "config.json", json.loads((saved / "config.json").read_text())
    for text, error, match in (
        (
            json.dumps({**good, "tinylm": {**good["tinylm"], "depth": 3}}),
            ConfigError,
            r"config\.json.*no setting 'depth'",
        ),
        (json.dumps({**good, "tinylm": {**good["tinylm"], "width": 16}}), StateMismatch, "different models"),
        (json.dumps({**good, "tinylm": 4}), CheckpointDamaged, "'tinylm' holds no settings"),
        (json.dumps({**good, "format": 2}), StateMismatch, "update tinylm"),
        ("{", CheckpointDamaged, r"config\.json is damaged"),
    ):
        path.write_text(text)
        with pytest.raises(error, match=match):
            load(saved)


# --- everything else a path may be ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "error", "match"),
    [
        ((), FileNotFoundError, "no config.json; it is empty"),
        (("a.txt", "b.txt"), FileNotFoundError, r"it holds a\.txt, b\.txt"),
        (("pytorch_model.bin",), ValueError, "pickle.*never does. Convert it to safetensors"),
        (("config.json", "pytorch_model.bin"), ValueError, "pickle"),
        (("config.json", "model.safetensors"), ValueError, "is damaged, or no safetensors file"),
        (("model.gguf", "notes.txt"), ValueError, "load the file itself"),
        (("model.h5",), ValueError, "another program's format"),
    ],
)
def test_folders_that_are_no_model(tmp_path, files, error, match):
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(error, match=match):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "error", "match"),
    [
        ("model.pt", ValueError, "pickle"),
        ("model.BIN", ValueError, "model.BIN"),
        ("model.gguf", ValueError, "model.gguf"),
        ("model.onnx", ValueError, "written, not read"),
        ("model.npz", ValueError, "another program's format"),
        ("model.safetensors", ValueError, "without its config"),
        ("step-00000005.safetensors", ValueError, "without its config"),
        ("notes.md", ValueError, r"unknown suffix '\.md'"),
        ("noname", ValueError, "unknown suffix ''"),
    ],
)
def test_files_that_are_no_model(tmp_path, name, error, match):
    (tmp_path / name).write_text("x")
    with pytest.raises(error, match=match):
        load(tmp_path / name)


def test_nothing_there(tmp_path, model):
    with pytest.raises(FileNotFoundError, match="no file or folder 'some/model'"):
        load("some/model")
    with (
        Run.create(tmp_path / "run", model=CONFIG, train=TrainConfig(steps=1)) as run,
        pytest.raises(FileNotFoundError, match="no checkpoint yet"),
    ):
        load(run.folder)
    folder = save(model, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        load(folder)


# --- what loading touches (P28) ---------------------------------------------------------------------------------------

WATCHED: list | None = None


def watch(event, args):
    if WATCHED is not None and not event.startswith(("object.__", "sys._", "builtins.id", "gc.")):  # Python's own
        WATCHED.append((event, args))


@pytest.fixture(scope="module")
def audit():
    sys.addaudithook(watch)


def touched(act):
    global WATCHED
    WATCHED = []
    try:
        act()
    except (ValueError, FileNotFoundError):
        pass
    finally:
        seen, WATCHED = WATCHED, None
    return seen


def test_loading_only_reads_the_given_files(audit, model, saved, run, tmp_path):  # P28
    rng = np.random.default_rng(0)
    own = {"config.json", "model.safetensors", "tokenizer.json"}
    (saved / "__init__.py").write_text("raise SystemExit('ran')")
    (saved / "json.py").write_text("raise SystemExit('ran')")
    evil = {"../../escape": np.zeros(2, np.float32), "/tmp/absolute": np.zeros(2, np.float32)}
    whole = {name: (saved / name).read_bytes() for name in own}
    load(saved)
    load(run.folder)
    for n in range(60):
        if n:
            name = sorted(own)[n % 3]
            data = bytearray(whole[name])
            data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
            (saved / name).write_bytes(data)
        if n == 59:
            write_file(saved / "model.safetensors", evil, {})
        seen = touched(lambda: load(saved))
        assert seen
        for event, args in seen:
            if event == "open":
                path, _, flags = args
                assert str(path).startswith(str(saved)), args
                assert str(path).removeprefix(f"{saved}/") in own, args
                assert not flags & 3, args  # read only
            else:
                assert event in ("os.listdir", "os.scandir"), (event, args)
        if n:
            (saved / name).write_bytes(whole[name])
    reads = {str(args[0]) for event, args in touched(lambda: load(run.folder)) if event == "open"}
    assert reads == {str(p) for p in (run.folder / "config.json", run.path(2), run.folder / "tokenizer.json")}


def test_the_public_names_are_here():
    assert all(hasattr(checkpoint, name) for name in checkpoint.__all__)
