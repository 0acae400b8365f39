"""The kit as a whole: imports flow one way, nothing heavy at start, nothing dangerous, everything documented."""

import ast
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import tinylm

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tinylm"
# A room imports only from rooms to its left.
ORDER = """
    config presets native taps world reading text vocabulary tokenizer shards corpus data weights ops parts techniques
    model losses optim spread step planes store formats folder run checkpoint training resuming population speed
    yardsticks evaluation generation markup show quantization suite probe codebooks memory engine classification
    sharing live story reporting options commands cli __main__
""".split()  # noqa: SIM905
# Rooms that work without JAX, so that a world, a text or a tokenizer can be had in milliseconds.
LIGHT = ["native", "config", "presets", "world", "reading", "text", "vocabulary", "tokenizer", "shards", "corpus"]
LIGHT += ["data", "planes", "store", "markup", "engine"]


def room(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = sorted(PACKAGE.rglob("*.py"))
ROOMS = [path for path in FILES if path != PACKAGE / "__init__.py"]


def imported_rooms(path):
    """Rooms a file imports, anywhere in it, but for `if TYPE_CHECKING:`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = ["tinylm", *path.relative_to(PACKAGE).parent.parts]
    unreal = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in unreal:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module.split(".") if node.module else [])]
            names = [".".join([*base, alias.name]) for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "tinylm" and len(parts) > 1:
                yield parts[1], node.lineno


def test_every_room_has_its_place():
    assert {room(path) for path in ROOMS} <= set(ORDER)
    assert len(set(ORDER)) == len(ORDER)


@pytest.mark.parametrize("path", ROOMS, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_rooms_import_leftwards(path):
    here = room(path)
    for other, line in imported_rooms(path):
        assert other in ORDER, f"{path.name}:{line} imports tinylm.{other}"
        assert ORDER.index(other) <= ORDER.index(here), f"{path.name}:{line}: {here} may not import {other}"
        assert other != here or len(path.relative_to(PACKAGE).parts) > 1


def modules_after(statement):
    code = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


HEAVY = {"jax", "flax", "optax", "datasets", "pyarrow", "tokengrams", "IPython", "ipywidgets"}
HEAVY |= {"torch", "transformers", "onnx", "onnxruntime", "gguf", "huggingface_hub"}


def test_import_tinylm_is_light():
    assert not modules_after("import tinylm") & (HEAVY | {"numpy", "tokenizers"})
    assert not modules_after("import tinylm; tinylm.preset; tinylm.ModelConfig; dir(tinylm)") & HEAVY


def test_the_engine_starts_with_next_to_nothing():
    """`tinylm run` is to show its first token in the time that some of these take to import."""
    slow = {"numpy", "tokenizers", "argparse", "dataclasses", "typing", "inspect", "pathlib", "json"}
    before = modules_after("pass")
    loaded = modules_after("import tinylm.__main__, tinylm.engine.command; from tinylm.engine import Engine") - before
    assert not loaded & (HEAVY | slow)


def test_rooms_before_the_model_need_no_jax():
    assert not modules_after("; ".join(f"import tinylm.{name}" for name in LIGHT)) & HEAVY


def test_the_rest_is_not_heavier_than_jax():
    loaded = modules_after("; ".join(f"import tinylm.{name}" for name in sorted({room(path) for path in ROOMS})))
    assert not loaded & (HEAVY - {"jax", "flax", "optax", "IPython"})  # flax brings IPython where it is installed


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_dangerous(path):  # P28
    """No bare except, nothing that runs what it reads, no star import, and a file one can read in one go."""
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 500
    forbidden = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
    for node in ast.walk(ast.parse(source)):
        where = f"{path.name}:{getattr(node, 'lineno', 0)}"
        assert not (isinstance(node, ast.ExceptHandler) and node.type is None), f"{where}: bare except"
        if isinstance(node, ast.Import):
            assert not {alias.name.split(".")[0] for alias in node.names} & forbidden, where
        if isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in forbidden, where
            assert all(alias.name != "*" for alias in node.names), where
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec", "compile", "__import__"), where
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            assert isinstance(node.value, ast.Constant), where
            assert node.value.value is False, where
        if isinstance(node, ast.keyword) and node.arg == "shell":
            raise AssertionError(f"{where}: shell=")


@pytest.mark.parametrize("path", sorted((ROOT / "tests").glob("*.py")), ids=lambda path: path.name)
def test_tests_can_be_read_in_one_go(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 600


NAMES = [name for name in tinylm.__all__ if name != "__version__"]


@pytest.mark.parametrize("name", NAMES)
def test_public_names_are_documented(name):
    thing = getattr(tinylm, name)
    doc = inspect.getdoc(thing) or ""
    assert len(doc) > 20, f"tinylm.{name} has no docstring"
    if isinstance(thing, type):  # one of its own: dataclass and NamedTuple write one that only repeats the fields
        assert not doc.startswith(f"{thing.__name__}("), f"tinylm.{name} has no docstring of its own"
    assert name in dir(tinylm)


def test_unknown_public_name():
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        tinylm.trian


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_module_says_what_it_is(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def test_notebooks_hold_no_outputs():
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            assert not cell.get("outputs"), f"{path.name} holds outputs; strip them"
            assert cell.get("execution_count") is None, f"{path.name} holds execution counts"
