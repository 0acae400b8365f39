"""What an installation holds: the native library as it should be, or none and a way to go on; each archive's files."""

import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import tinylm

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
NATIVE = ROOT / "tinylm" / "native"


def library() -> Path:
    spec = importlib.util.find_spec("tinylm.native._tinylm")
    if spec is None or spec.origin is None:
        # TINYLM_NATIVE=1, as in .ci/run: there is a compiler, so there has to be a library.
        assert os.environ.get("TINYLM_NATIVE", "") in ("", "0"), "installed without the native library"
        pytest.skip("installed without the native library")
    return Path(spec.origin)


def output(*command):
    if shutil.which(command[0]) is None:
        pytest.skip(f"no {command[0]} here")
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True).stdout


def test_one_version():
    assert PROJECT["project"]["version"] == tinylm.__version__
    assert f"\nversion: {tinylm.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_command_starts_where_it_should():
    module, _, name = PROJECT["project"]["scripts"]["tinylm"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    done = subprocess.run([sys.executable, "-m", "tinylm", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"tinylm {tinylm.__version__}\n"


@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF files")
def test_the_library_shows_its_interface_and_nothing_else():
    shown = re.findall(r" [A-Zi] (\w+)", output("nm", "-D", "--defined-only", library()))
    assert "tlm_open" in shown
    assert {name for name in shown if not name.startswith("tlm_")} == set()
    declared = set(re.findall(r"^TLM_API .*?\b(tlm_\w+)\(", (NATIVE / "tinylm.h").read_text(), re.M))
    assert declared <= set(shown)


@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF files")
def test_the_library_needs_neither_python_nor_a_c_plus_plus_library():
    needed = re.findall(r"NEEDED.*\[(.+?)\]", output("readelf", "-d", library()))
    assert any(name.startswith("libc.so") for name in needed)
    assert not [name for name in needed if name.startswith(("libpython", "libstdc++", "libgcc"))]


def test_the_interface_to_xla_is_laid_out_as_its_headers_are():
    """Ours are declared anew in jax/xla.h; the compiler compares the two."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no c++ here")
    import jax.ffi

    test = NATIVE.parents[1] / "tests" / "native" / "xla_test.cc"
    output(compiler, "-std=c++20", "-fsyntax-only", "-Wno-invalid-offsetof", f"-I{jax.ffi.include_dir()}", test)


# --- slow: archives, built with pip and whatever it downloads ---------------------------------------------------------


@pytest.fixture(scope="module")
def pip(tmp_path_factory):
    """The python of a fresh environment with the build backend."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    done = subprocess.run(
        [python, "-m", "pip", "install", "-q", "scikit-build-core>=1.1", "cmake", "ninja"], check=False
    )
    if done.returncode:
        pytest.skip("no package index within reach")
    return python


@pytest.fixture(scope="module")
def source(tmp_path_factory, pip):
    """The source distribution, unpacked."""
    out = tmp_path_factory.mktemp("sdist")
    code = f"from scikit_build_core.build import build_sdist; print(build_sdist({str(out)!r}))"
    subprocess.run([pip, "-c", code], cwd=ROOT, check=True)
    (archive,) = out.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(out, filter="data")
    return next(path for path in out.iterdir() if path.is_dir())


def wheel(pip, source, out, **environment):
    """The wheel of a source tree, and what was said while it was made."""
    done = subprocess.run(
        [pip, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation", "-w", out, source],
        env={**os.environ, "PATH": f"{pip.parent}:{os.environ['PATH']}", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    made = list(out.glob("*.whl"))
    return (made[0] if made else None), done.stdout


def contents(path):
    with zipfile.ZipFile(path) as archive:
        return set(archive.namelist())


def imported(pip, path, code):
    """What `code` prints where only this wheel is installed."""
    subprocess.run([pip, "-m", "pip", "install", "-q", "--no-deps", "--force-reinstall", path], check=True)
    return subprocess.run([pip, "-c", code], cwd=path.parent, capture_output=True, text=True, check=True).stdout.strip()


FIND = "import importlib.util as u; print((s := u.find_spec('tinylm.native._tinylm')) and s.origin)"


@pytest.mark.slow
def test_the_source_distribution_holds_everything(source):
    listed = output("git", "-C", ROOT, "ls-files", "-co", "--exclude-standard").split("\n")
    here = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    kept = (
        "tinylm/",
        "tests/",
        "notebooks/",
        "data_scripts/",
        "README.md",
        "CHANGELOG.md",
        "SECURITY.md",
        "LICENSE",
        "pyproject.toml",
        "constraints.txt",
    )
    assert here - {"PKG-INFO"} == {name for name in listed if name.startswith(kept) and (ROOT / name).is_file()}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="no compiler")
def test_a_wheel_with_the_library(pip, source, tmp_path):
    path, said = wheel(pip, source, tmp_path, TINYLM_NATIVE="1")
    assert path is not None, said
    assert re.fullmatch(r"tinylm-[\d.]+-py3-none-(?!any).*\.whl", path.name)
    inside = contents(path)
    assert any(re.fullmatch(r"tinylm/native/_tinylm\.(so|pyd)", name) for name in inside)
    assert "tinylm/native/tinylm.h" in inside
    assert not [name for name in inside if name.endswith((".cc", "lanes.h", "CMakeLists.txt"))]
    assert not [name for name in inside if not name.startswith(("tinylm/", "tinylm-"))]
    assert imported(pip, path, FIND).endswith(("_tinylm.so", "_tinylm.pyd"))


@pytest.mark.slow
def test_a_wheel_without_a_compiler(pip, source, tmp_path):
    nowhere = {"CC": "/nowhere/cc", "CXX": "/nowhere/c++"}
    path, said = wheel(pip, source, tmp_path, **nowhere, TINYLM_NATIVE="0")
    assert path is not None, said
    assert path.name.endswith("-py3-none-any.whl")
    assert not [name for name in contents(path) if name.endswith((".so", ".pyd"))]
    assert "installed without its native library" in said
    assert imported(pip, path, FIND) == "None"
    assert imported(pip, path, "import tinylm; print(tinylm.__version__)") == tinylm.__version__
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    path, said = wheel(pip, source, tmp_path, **nowhere, TINYLM_NATIVE="1")
    assert path is None
    assert "CMake configuration failed" in said
