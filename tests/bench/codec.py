"""Size and speed of the checkpoint codec on a model trained here: python tests/bench/codec.py [--steps 300] [--runs 3]

Each coder sees the same bytes; for a difference, planes gets both arrays and the others their exclusive or. The runs
take turns; medians. Arrays: in processor seconds, one thread. Files (with hash and fsync): in seconds.
"""

import argparse
import lzma
import statistics
import tempfile
import time
import zlib
from pathlib import Path

import ml_dtypes
import numpy as np

import tinylm
from tinylm import planes
from tinylm.store import read_file, write_file

try:
    import zstandard
except ImportError:
    zstandard = None


def trained(folder: Path, steps: int) -> dict[int, dict[str, np.ndarray]]:
    """The training state after `steps`, and 10 and 100 steps before."""
    world = tinylm.World()
    texts = world.corpus(1_000_000)
    tokenizer = tinylm.Tokenizer.train(texts, vocab=1024)
    tokens = tinylm.write_tokens(texts, tokenizer, folder)
    model = tinylm.Transformer(tinylm.preset("1M", vocab=1024, context=256), tokenizer=tokenizer)
    config = tinylm.TrainConfig(steps=steps, batch=4, optimizer="adamw", learning_rate=0.003)
    trainer = tinylm.train(model, tokens, config)
    wanted = (steps - 100, steps - 10, steps)
    return {step.step: trainer.tensors() for step in trainer if step.step in wanted}


def joined(state: dict[str, np.ndarray], part: str) -> np.ndarray:
    kept = [value.ravel() for name, value in state.items() if part in name and value.dtype == np.float32]
    return np.concatenate(kept)


def samples(states: dict[int, dict[str, np.ndarray]]) -> dict[str, tuple[np.ndarray, np.ndarray | None]]:
    *earlier, state = (states[step] for step in sorted(states))
    weights = joined(state, "params.")
    matrices = [value for name, value in state.items() if name.startswith("params.") and value.ndim > 1]
    codes = [np.round(m / np.abs(m).max() * 127).astype(np.int8).ravel() for m in matrices]
    trits = np.concatenate([np.round(m / np.abs(m).mean()).clip(-1, 1).ravel() + 1 for m in matrices]).astype(np.uint8)
    trits = trits[: len(trits) // 20 * 20]
    half = [joined(s, "params.").astype(ml_dtypes.bfloat16) for s in (state, *earlier)]
    return {
        "float32 weights": (weights, None),
        "bfloat16 weights": (half[0], None),
        "Adam's first moments": (joined(state, ".mu."), None),
        "Adam's second moments": (joined(state, ".nu."), None),
        "int8 codes": (np.concatenate(codes), None),
        "ternary, 4 in a byte": ((trits.reshape(-1, 4) << np.arange(0, 8, 2)).sum(1).astype(np.uint8), None),
        "ternary, 5 in a byte": ((trits.reshape(-1, 5) * 3 ** np.arange(5)).sum(1).astype(np.uint8), None),
        "float32, 10 steps on": (weights, joined(earlier[1], "params.")),
        "float32, 100 steps on": (weights, joined(earlier[0], "params.")),
        "bfloat16, 10 steps on": (half[0], half[2]),
        "Adam's moments, 10 on": (joined(state, "opt."), joined(earlier[1], "opt.")),
    }


def seen_by_others(array: np.ndarray, base: np.ndarray | None) -> bytes:
    raw = array.view(np.uint8)
    return (raw if base is None else raw ^ base.view(np.uint8)).tobytes()


def coders(array: np.ndarray, base: np.ndarray | None) -> dict:
    """name: (code, decode); decode gets what code gave."""
    raw = seen_by_others(array, base)
    kind = array.dtype, array.shape
    found = {
        "planes": (lambda: planes.encode(array, base), lambda data: planes.decode(data, *kind, base)),
        "zlib -6": (lambda: zlib.compress(raw, 6), zlib.decompress),
    }
    if zstandard is not None:
        for level in (3, 19):
            coder, reader = zstandard.ZstdCompressor(level), zstandard.ZstdDecompressor()
            found[f"zstd -{level}"] = (lambda coder=coder: coder.compress(raw), reader.decompress)
    return {**found, "xz -6": (lambda: lzma.compress(raw), lzma.decompress)}


def timed(call, *given):
    begun, busy = time.perf_counter(), time.process_time()
    result = call(*given)
    return result, time.perf_counter() - begun, time.process_time() - busy


def arrays(states: dict[int, dict[str, np.ndarray]], runs: int) -> None:
    print("| what | " + " | ".join(coders(np.zeros(1, np.uint8), None)) + " |\n| --- |" + " ---: |" * 5)
    for name, (array, base) in samples(states).items():
        times: dict[str, list[tuple[float, float, float]]] = {}
        for _ in range(runs):
            for coder, (code, decode) in coders(array, base).items():
                data, _, coding = timed(code)
                back, _, decoding = timed(decode, data)
                exact = back if isinstance(back, bytes) else seen_by_others(back, base)
                assert exact == seen_by_others(array, base), coder
                times.setdefault(coder, []).append((len(data), coding, decoding))
        cells = []
        for figures in times.values():
            size, coding, decoding = map(statistics.median, zip(*figures, strict=True))
            speeds = f"{array.nbytes / coding / 1e6:.0f}, {array.nbytes / decoding / 1e6:.0f}"
            cells.append(f"{size / array.nbytes:.1%} ({speeds})")
        print(f"| {name}, {array.nbytes / 1e6:.1f} MB | " + " | ".join(cells) + " |", flush=True)


def files(states: dict[int, dict[str, np.ndarray]], folder: Path, runs: int) -> None:
    far, near, last = sorted(states)
    whole = {name: {"codec": name} for name in ("raw", "planes")}
    bases = {f"planes, base {last - step} steps ago": folder / f"{step}" for step in (near, far)}
    differences = {way: {"codec": "planes", "base": base} for way, base in bases.items()}
    big = {f"x.{n}": np.random.default_rng(n).standard_normal(1_000_000).astype(np.float32) for n in range(24)}
    for step in (far, near):
        write_file(folder / f"{step}", states[step])
    print("\n| file | size | saved | read |\n| --- | ---: | ---: | ---: |")
    for what, state, ways in (("training state", states[last], whole | differences), ("96 MB of weights", big, whole)):
        size = sum(value.nbytes for value in state.values())
        times: dict[str, list[tuple[float, float, int]]] = {way: [] for way in ways}
        for _ in range(runs):
            for way, more in ways.items():
                _, saving, _ = timed(lambda more=more: write_file(folder / "new", state, **more))  # noqa: B023
                found, reading, _ = timed(read_file, folder / "new")
                assert all(found[0][name].tobytes() == value.tobytes() for name, value in state.items())
                times[way].append((saving, reading, (folder / "new").stat().st_size))
        for way, figures in times.items():
            saving, reading, stored = map(statistics.median, zip(*figures, strict=True))
            print(f"| {what}, {way} | {stored / size:.1%} of {size / 1e6:.1f} MB | {saving:.3f} s | {reading:.3f} s |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--runs", type=int, default=3)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        states = trained(Path(folder) / "tokens", chosen.steps)
        print("Size, then MB of the array coded and decoded in a second.\n")
        arrays(states, chosen.runs)
        files(states, Path(folder), chosen.runs)


if __name__ == "__main__":
    main()
