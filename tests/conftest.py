"""What all tests share: shape checking of every annotated function, the real data, one compilation cache."""

import gc
import os
import shutil
import sys
import tempfile
from pathlib import Path

# Before JAX starts, here and in every process a test starts: CPU only, and programs compiled once for all of them.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "tinylm-test-compilations"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
# Compiling is most of the work here. Without XLA's fusion emitters and LLVM's optimisations it takes a third of the
# time. `XLA_FLAGS= pytest` compiles as users do: for a release.
QUICK = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
QUICK += " --xla_cpu_parallel_codegen_split_count=1"
os.environ.setdefault("XLA_FLAGS", QUICK)
# `jax.jit(f, compiler_options=AS_USERS)`: for tests in which bits or long trainings depend on the compiler.
AS_USERS = {"xla_backend_optimization_level": 3, "xla_cpu_use_fusion_emitters": True}
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
# Thousands of small files are flushed to a disk that nobody will ask for them.
if os.access("/dev/shm", os.W_OK) and shutil.disk_usage("/dev/shm").free > 4e9:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", "/dev/shm")

# JAX keeps a million objects alive; going through them again and again is a tenth of all test time.
gc.set_threshold(200_000, 20, 100)

from jaxtyping import install_import_hook

# The rooms with shapes in their signatures.
SHAPED = ("taps", "weights", "parts", "model", "losses", "optim", "step", "generation")
install_import_hook([f"tinylm.{room}" for room in SHAPED], "beartype.beartype")

import pytest


def resident() -> float:
    """Bytes of memory in use; 0 where the system does not say."""
    pages = Path("/proc/self/statm")
    return int(pages.read_text().split()[1]) * 4096.0 if pages.exists() else 0.0


@pytest.fixture(scope="module", autouse=True)
def bounded_memory(grown={"since": 0.0}):  # noqa: B006
    """Compiled programs and their traces would add up to six gigabytes per worker over the whole suite."""
    yield
    if "jax" in sys.modules and resident() > grown["since"] + 3e9:
        sys.modules["jax"].clear_caches()
        gc.collect()
        grown["since"] = resident()  # little of it goes back to the system, but it is used again


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with TinyStories, published checkpoints and the like; not part of the project."""
    folder = Path(os.environ.get("TINYLM_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} is absent (set TINYLM_DATA)")
    return folder
