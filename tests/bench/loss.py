"""The loss on chunks of rows against all logits at once: time of its gradient, and memory that the program asks for.

    python tests/bench/loss.py

2,048 rows (8 x 256) of width 288, tied head; medians of ten alternating runs, ratio run by run.
"""

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from tinylm.config import ModelConfig
from tinylm.losses import Rows, at_once, chunked_nats, plain_nats, taken
from tinylm.model import Transformer

ROWS, WIDTH = 2048, 288


def main() -> None:
    """Print one row per vocabulary."""
    print("| vocabulary | chunks | plain, ms | chunked, ms | chunked over plain (range) | plain, MB | chunked, MB |")
    print("|---|---|---|---|---|---|---|")
    rng = np.random.default_rng(0)
    for vocab in (4096, 32_000):
        how, head = taken(Transformer(ModelConfig(vocab=vocab, width=WIDTH, layers=1, heads=2)))
        x = jnp.asarray(rng.standard_normal((ROWS, WIDTH)), jnp.float32)
        rest = jnp.asarray(rng.integers(0, vocab, ROWS), jnp.int32), jnp.ones(ROWS)
        chunks = -(-ROWS // at_once(vocab))
        kinds = {"plain": lambda *a, how=how: plain_nats(how, *a)}
        kinds["chunked"] = lambda *a, how=how, n=chunks: chunked_nats(how, n, *a)
        programs, spent, memory = {}, {}, {}
        for name, nats in kinds.items():
            loss = lambda head, x, nats=nats, rest=rest: nats(head, Rows(x, *rest))[0]  # noqa: E731
            programs[name] = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(head, x).compile()
            memory[name] = programs[name].memory_analysis().temp_size_in_bytes / 1e6
            spent[name] = []
        for _ in range(12):
            for name, program in programs.items():
                begun = time.perf_counter()
                jax.block_until_ready(program(head, x))
                spent[name].append(1e3 * (time.perf_counter() - begun))
        spent = {name: times[2:] for name, times in spent.items()}
        ratios = [b / a for a, b in zip(spent["plain"], spent["chunked"], strict=True)]
        middle = {name: statistics.median(times) for name, times in spent.items()}
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(
            f"| {vocab:,} | {chunks} | {middle['plain']:.0f} | {middle['chunked']:.0f} | {ratio} "
            f"| {memory['plain']:.0f} | {memory['chunked']:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
