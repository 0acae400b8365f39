"""Seconds to save and to read a 188 MB training state, hash included: python tests/bench/checkpoint.py [--runs 5]"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from tinylm.store import read_file, verify_file, write_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    state = {f"x.{n}": np.random.default_rng(n).standard_normal(1_000_000, np.float32) for n in range(47)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.safetensors"
        calls = {
            "save": lambda: write_file(path, state, {}),
            "read": lambda: read_file(path),
            "verify": lambda: verify_file(path),
        }
        for name, call in calls.items():
            seconds = []
            for _ in range(runs):
                begun = time.perf_counter()
                call()
                seconds.append(time.perf_counter() - begun)
            low, middle, high = min(seconds), statistics.median(seconds), max(seconds)
            print(f"{name:<8} {middle:.2f} s  ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
