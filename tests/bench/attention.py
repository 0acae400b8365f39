"""A training step with attention written out and with JAX's own, in turn: python tests/bench/attention.py [--runs 60]

The model is the one `tinylm story` trains in two minutes, 418K parameters, batch 2 x 256, Muon.
"""

import argparse
import statistics
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from tinylm import model, optim
from tinylm.config import TrainConfig
from tinylm.data import Batch
from tinylm.presets import preset
from tinylm.step import State, compiled_update
from tinylm.weights import pure


def stepper(kind: str):
    """A function that does one training step, compiled with attention of this kind."""
    config = preset("400K", vocab=2048, width=96, layers=2, heads=2, context=256)
    recipe = optim.Recipe.of(TrainConfig(steps=1, batch=2))
    graph, params = pure(model.Transformer(config))
    compiled_update.cache_clear()
    update = compiled_update(graph, recipe, False)
    state = State(params, optim.build(recipe).init(params), jnp.int32(0), jnp.bool_(False))
    state = jax.tree.map(jnp.copy, state)
    tokens = np.random.default_rng(0).integers(0, 2048, (2, 2, 256)).astype(np.int32)
    batch = Batch(tokens[0], tokens[1], None, None, None)

    def step() -> None:
        nonlocal state
        state, figures = update(state, batch, np.float32(1e-3), np.uint32(0))
        jax.block_until_ready(figures)

    with mock.patch.object(model, "attention_kind", return_value=kind):  # asked while tracing, so once
        step()
    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=60)
    runs = parser.parse_args().runs
    steps = {"written": stepper("written"), "xla": stepper("xla")}
    took: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(runs):
        for name, step in steps.items():
            begun = time.perf_counter()
            step()
            took[name].append((time.perf_counter() - begun) * 1e3)
    for name, values in took.items():
        print(f"{name:<8} {statistics.median(values):6.2f} ms  ({min(values):.2f} to {max(values):.2f})")
    ratios = [a / b for a, b in zip(took["xla"], took["written"], strict=True)]
    print(f"xla / written {statistics.median(ratios):.3f}, run by run")


if __name__ == "__main__":
    main()
