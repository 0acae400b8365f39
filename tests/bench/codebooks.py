"""Codebooks: what they cost in a training step, the speed and memory of an index, the time of a query.

python tests/bench/codebooks.py step                        # times over the same model without codebooks
python tests/bench/codebooks.py index --tokens 5000000      # random text of that many tokens
"""

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

import tinylm
from tinylm import codebooks
from tinylm.techniques.codebook import discretize

SIZES = {
    "0.3M": tinylm.ModelConfig(vocab=1024, context=256, width=80, layers=3, heads=4),
    "1M": tinylm.ModelConfig(vocab=2048, context=256, width=128, layers=4, heads=4),
    "7M": tinylm.ModelConfig(vocab=4096, context=256, width=288, layers=6, heads=6),
}


def trainer(config: tinylm.ModelConfig, sites: list[str], codes: int, k: int):
    model = tinylm.Transformer(config)
    if sites:
        discretize(model, sites, codes=codes, k=k)
    tokens = tinylm.Tokens.from_array(np.random.default_rng(0).integers(0, config.vocab, 50_000), vocab=config.vocab)
    # Logged at every step: none is in flight when the clock is read, where it would run in the other's time.
    more = {"optimizer": "adamw", "learning_rate": 1e-3, "log_every": 1}
    recipe = tinylm.TrainConfig(steps=10_000, batch=8, length=config.context, **more)
    return tinylm.train(model, tokens, recipe).every_step()


def step(rounds: int, names: list[str], clock: Callable[[], float]) -> None:
    """Rows of medians over alternating rounds, ratio round by round."""
    print("| size | sites | codes | k | without, ms | with, ms | ratio (range) |")
    print("|---|---|---|---|---|---|---|")
    for size in names:
        plain = trainer(SIZES[size], [], 0, 0)
        for sites in (["attn"], ["mlp"], ["attn", "mlp"]):
            for codes, k in ((512, 1), (512, 8), (512, 32), (2048, 8)):
                other = trainer(SIZES[size], sites, codes, k)
                spent: dict[str, list[float]] = {"plain": [], "other": []}
                for _ in range(rounds + 1):
                    for name, run in (("plain", plain), ("other", other)):
                        begun = clock()
                        for _ in range(3):
                            next(run)
                        spent[name].append((clock() - begun) / 3 * 1e3)
                other.close()
                one, two = (times[1:] for times in spent.values())
                ratios = [b / a for a, b in zip(one, two, strict=True)]
                ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
                line = f"{statistics.median(one):.0f} | {statistics.median(two):.0f} | {ratio}"
                print(f"| {size} | {'+'.join(sites)} | {codes} | {k} | {line} |", flush=True)
        plain.close()


def index(count: int, size: str, codes: int, k: int) -> None:
    """One index: positions per second, the process's largest memory, what queries take."""
    config = SIZES[size]
    model = discretize(tinylm.Transformer(config), ["attn", "mlp"], codes=codes, k=k)
    ids = np.random.default_rng(0).integers(1, config.vocab, count)
    ids[:: config.context] = 0  # documents of one window each
    tokens = tinylm.Tokens.from_array(ids, vocab=config.vocab, end=0)
    codebooks.start(model, [tokens[: 16 * 256].reshape(16, 256)])
    codebooks.read(model, tokens[: 32 * 256].reshape(32, 256))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        noted: list[float] = []

        def watch(done: int) -> None:
            noted.append(time.perf_counter())
            if len(noted) % 50 == 0:
                print(f"  {done:,} positions, {done / (noted[-1] - begun):,.0f} per second", flush=True)

        made = codebooks.build(model, tokens, Path(folder) / "i", progress=watch)
        spent, run = time.perf_counter() - begun, noted[-1] - begun
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        disk = sum(f.stat().st_size for f in made.folder.iterdir()) / 2**20
        print(f"{made}: {spent:.1f} s, {count / spent:,.0f} positions per second ({run:.1f} s of it the model)")
        print(f"largest memory {peak:,.0f} MiB ({before:,.0f} before); {disk:,.0f} MiB on disk")
        begun = time.perf_counter()
        again = codebooks.Index(made.folder)
        print(f"opened in {time.perf_counter() - begun:.2f} s")
        rng, times = np.random.default_rng(1), []
        for _ in range(200):
            column = again.columns[rng.integers(len(again.columns))]
            begun = time.perf_counter()
            places = again.postings(*column, int(rng.integers(codes)))
            again.where(np.asarray(places[:10], np.int64))
            times.append((time.perf_counter() - begun) * 1e6)
        usual, most = statistics.median(times), max(times)
        print(f"postings of a code and the documents of ten: median {usual:.0f} us, most {most:.0f}")
        labels = codebooks.Labels("token", np.asarray(again.tokens, np.int32), tuple(map(str, range(config.vocab))))
        begun = time.perf_counter()
        one = codebooks.reading.together(
            again.chosen(*again.columns[0]), labels.values, codes, config.vocab, np.ones(len(again), bool)
        )
        took = time.perf_counter() - begun
        print(f"one codebook against all {config.vocab} tokens: {took:.2f} s ({one.sum():,} firings)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["step", "index"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES))
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--codes", type=int, default=512)
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--cpu", action="store_true", help="seconds of all cores' work: for a machine that others use")
    given = parser.parse_args()
    print(f"devices: {jax.devices()}")
    if given.what == "step":
        step(given.rounds, given.sizes, time.process_time if given.cpu else time.perf_counter)
    else:
        index(given.tokens, given.sizes[0], given.codes, given.k)
