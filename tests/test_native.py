"""The C++ test programs: every kernel against plain loops, and the engine under the address sanitizer."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

import tinylm

ROOT = Path(__file__).parents[1]
NATIVE = ROOT / "tinylm" / "native"
FLAGS = ["-std=c++20", "-ffp-contract=off", "-fno-math-errno", "-pthread", f"-I{NATIVE}"]
KERNELS = {
    "SCALAR": [],
    "AVX2": ["-march=x86-64-v3"],
    "AVXVNNI": ["-march=x86-64-v3", "-mavxvnni"],
    "AVX512": ["-march=x86-64-v4", "-mavx512vnni"],
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="compiles for x86-64"),
    pytest.mark.skipif(shutil.which("c++") is None, reason="no c++ here"),
]


def compiled(program, sources, folder, *flags):
    """The program of tests/native with these sources, made with `flags`, and the kernels of every instruction set."""
    objects = []
    for name, options in KERNELS.items():
        objects.append(folder / f"{name}.o")
        source = NATIVE / "engine" / "kernels.cc"
        command = ["c++", *FLAGS, "-O1", *options, f"-DTINYLM_{name}", "-c", source, "-o", objects[-1]]
        subprocess.run(command, check=True, timeout=900)
    made = folder / program
    files = [ROOT / "tests" / "native" / f"{program}.cc", *sources, *objects]
    subprocess.run(["c++", *FLAGS, *flags, *files, "-o", made], check=True, timeout=900)
    return made


def test_every_kernel_against_plain_loops(tmp_path):
    made = compiled("kernels_test", [NATIVE / "engine" / "dispatch.cc"], tmp_path, "-O2")
    done = subprocess.run([made], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "scalar" in done.stdout


def test_the_engine_under_the_address_sanitizer(tmp_path):
    config = tinylm.ModelConfig(vocab=2100, context=64, width=32, layers=2, heads=2)
    model = tmp_path / "model.tlm"
    tinylm.export(tinylm.Transformer(config), model)
    sources = [path for path in (NATIVE / "engine").glob("*.cc") if path.name != "kernels.cc"]
    made = compiled("engine_test", sources, tmp_path, "-O1", "-fsanitize=address")
    for arguments in ([model], [model, "200", tmp_path]):
        done = subprocess.run([made, *arguments], capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout + done.stderr
