"""A model's parameters by name: set them at first, read them, put others in, take a model apart and bind it again."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer


def initialize(model: nnx.Module, rngs: nnx.Rngs, std: float) -> None:
    """Set every initial value. The whole table:

        where                           value
        matrices, embedding tables      normal with standard deviation `std`
        norm scales                     1
        biases                          0

    That is BERT's and GPT-2's table. Two others learned more slowly at these sizes (notebooks/LAB.md, 2026-11-21):
    1 / sqrt(inputs) with block outputs at zero, and normal(0.05).
    Each value depends on the seed and its own name alone, so a part added elsewhere changes nothing here. NumPy draws
    them: nothing is compiled, and they are the same on every device. Under a trace (`nnx.eval_shape`) only shapes
    matter: there they are NaN.
    """
    key, values = rngs.params(), named(model)
    traced = isinstance(key, Tracer)
    words = [] if traced else jax.random.key_data(key).tolist()
    for name, old in values.items():
        if name.rpartition(".")[2] in ("kernel", "table"):  # norms and biases are made as they start
            if traced:
                values[name] = jnp.full(old.shape, jnp.nan, old.dtype)
                continue
            own = np.random.Generator(np.random.Philox(np.random.SeedSequence([*words, zlib.crc32(name.encode())])))
            values[name] = np.float32(std) * own.standard_normal(old.shape, np.float32)
    assign(model, values)


def dotted(path: tuple) -> str:
    """`("blocks", 0, "attn")` -> `"blocks.0.attn"`."""
    return ".".join(map(str, path))


def named(model: nnx.Module) -> dict[str, Any]:
    """Every parameter by its dotted path. These are the live arrays, not copies: copy before donating them.

    For an abstract model (`nnx.eval_shape`) they are shapes.
    """
    return {dotted(path): leaf.get_value() for path, leaf in nnx.to_flat_state(nnx.state(model))}


def pure(model: nnx.Module) -> tuple[Any, dict[str, Any]]:
    """The model taken apart into a static graph, equal for equal configurations, and its parameters by name.

    `bind` puts them together again: `jax.jit(lambda p, x: bind(graph, p)(x))(params, tokens)` is the kit's one way to
    compile a model, and the parameters are a plain dict for `jax.grad`, `jax.vmap` and optax.
    """
    return nnx.graphdef(model), named(model)


def bind(graph: Any, params: Mapping[str, Any]) -> Any:
    """The model of `graph` with these parameters; cheap under `jax.jit`, where it happens once, while tracing."""
    parts = lambda name: tuple(int(part) if part.isdigit() else part for part in name.split("."))  # noqa: E731
    return nnx.merge(graph, nnx.from_flat_state([(parts(name), value) for name, value in params.items()]))


def fixed(graph: Any, params: Mapping[str, Any]) -> frozenset[str]:
    """Names of what training leaves alone: arrays of a model that are no `nnx.Param`, such as codes."""
    leaves = nnx.to_flat_state(nnx.state(bind(graph, params)))
    return frozenset(dotted(path) for path, leaf in leaves if not isinstance(leaf, nnx.Param))


def assign(model: nnx.Module, values: Mapping[str, Any]) -> None:
    """Set all parameters at once, or none: raises ValueError that names the missing, extra and misshapen ones."""
    flat = {dotted(path): (path, leaf) for path, leaf in nnx.to_flat_state(nnx.state(model))}
    wrong = [f"missing {n}" for n in flat.keys() - values.keys()] + [
        f"unknown {n}" for n in values.keys() - flat.keys()
    ]
    wrong += [
        f"{n} has shape {tuple(np.shape(values[n]))} instead of {tuple(leaf.shape)}"
        for n, (_, leaf) in flat.items()
        if n in values and tuple(np.shape(values[n])) != tuple(leaf.shape)
    ]
    if wrong:
        raise ValueError(f"these weights are not this model's: {'; '.join(sorted(wrong)[:10])} ({len(wrong)} in all)")
    nnx.update(model, nnx.from_flat_state([(path, leaf.replace(_own(values[n]))) for n, (path, leaf) in flat.items()]))


def _own(x: Any) -> jax.Array:
    """An array on the device that nobody else writes to; unlike `jnp.asarray` this compiles nothing."""
    return x if isinstance(x, jax.Array) else jax.device_put(np.array(x))
