"""One training step, compiled: the loss, its gradient, the update, and the guard that keeps non-finite values out.

The slow twin is a few lines of optax written out plainly in the tests; both must agree. `spikes` judges the losses.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tinylm import ops, optim
from tinylm.data import Batch
from tinylm.losses import Rows, class_nats, head_nats
from tinylm.model import Transformer, device
from tinylm.spread import Layout
from tinylm.techniques import ticked
from tinylm.weights import bind, fixed


class State(NamedTuple):
    """All that a step changes."""

    params: dict[str, jax.Array]
    opt: Any
    step: jax.Array
    """Steps that took effect, int32."""
    halted: jax.Array
    """Set by the first step that was not finite; no later step changes anything."""


def cross_entropy(
    model: Transformer, batch: Batch, key: jax.Array | None, z_loss: float = 0.0
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """The sum to minimise (cross-entropy plus z-loss); the summed cross-entropy in nats, and its summed weights."""
    x, _ = model.trunk(batch.tokens, positions=batch.positions, segments=batch.segments, key=key)
    if jnp.ndim(batch.targets) == 1:  # a class per text
        return class_nats(model.unembed(x, segments=batch.segments), batch.targets, batch.weights)
    targets = jnp.asarray(batch.targets).reshape(-1)
    weights = jnp.ones(targets.shape) if batch.weights is None else jnp.asarray(batch.weights).reshape(-1)
    x = x.reshape(-1, x.shape[-1])
    if batch.picked is not None:
        at = jnp.asarray(batch.picked).reshape(-1)
        x, targets = (y.at[at].get(mode="clip") for y in (x, targets))
        weights = weights.at[at].get(mode="fill", fill_value=0)
    total, nats = head_nats(model, Rows(x, targets, weights.astype(jnp.float32)), z_loss)
    return total, (nats, jnp.float32(weights.size) if batch.weights is None else weights.sum())


def fetching(params: Mapping[str, Any], batch: Batch) -> dict[str, Any]:
    """The parts of a model's state that a batch sets for itself: which memories its rows fetch."""
    return {} if batch.fetched is None else {n: batch.fetched for n in params if n.rpartition(".")[2] == "fetched"}


def step_of(graph: Any, recipe: optim.Recipe, drops: bool) -> Callable:
    """One training step `(state, batch, rate, seed, knobs) -> (state, figures)`, to be compiled.

    `knobs` are settings of the recipe as arrays, for members of a population that differ in them; usually none.
    """
    dtype = jnp.dtype(recipe.dtype)
    ways = contextlib.nullcontext if recipe.native else ops.plain

    def loss(params: dict, kept: dict, batch: Batch, key: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        compute = {**jax.tree.map(lambda p: p.astype(dtype), params), **kept}  # float32 masters, `dtype` arithmetic
        compute |= fetching(kept, batch)
        with ways():
            return cross_entropy(bind(graph, compute), batch, key if drops else None, recipe.z_loss)

    gradient = jax.value_and_grad(loss, has_aux=True)

    def in_parts(params: dict, kept: dict, batch: Batch, key: jax.Array):
        """Sums over `accumulate` parts of the batch, one after the other, so only one part's activations exist."""
        parts = jax.tree.map(lambda x: x.reshape(recipe.accumulate, -1, *x.shape[1:]), batch)
        keys = jax.random.split(key, recipe.accumulate)

        def add(total, part):
            return jax.tree.map(jnp.add, total, gradient(params, kept, *part)), None

        one = jax.eval_shape(gradient, params, kept, *jax.tree.map(lambda x: x[0], (parts, keys)))
        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), one)
        return jax.lax.scan(add, zero, (parts, keys))[0]

    def step(state: State, batch: Batch, rate: jax.Array, seed: jax.Array, knobs: dict[str, jax.Array]):
        rule = optim.build(dataclasses.replace(recipe, **knobs))
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        still = fixed(graph, state.params)
        params = {name: x for name, x in state.params.items() if name not in still}
        kept = {name: x for name, x in state.params.items() if name in still}
        (_, (nats, weight)), grads = (in_parts if recipe.accumulate > 1 else gradient)(params, kept, batch, key)
        # An MLM batch of very short texts may hide nothing: no weight is no gradient, not a division by zero.
        weight = jnp.maximum(weight, 1e-9)
        grads = jax.tree.map(lambda g: g / weight, grads)
        norm = optax.tree.norm(grads)
        halted = state.halted | ~(jnp.isfinite(nats) & jnp.isfinite(norm))
        with ways():
            change, opt = rule.update(optim.clipped(grads, norm, recipe.clip), state.opt, params, rate)
        new = State({**jax.tree.map(jnp.add, params, change), **ticked(kept)}, opt, state.step + 1, halted)
        old = state._replace(halted=halted)
        new = jax.tree.map(lambda a, b: jnp.where(halted, a, b), old, new)
        return new, {"loss": nats / weight, "grad_norm": norm, "halted": halted}

    return step


@functools.lru_cache(maxsize=32)  # so running a notebook's cells again compiles nothing
def compiled_update(graph: Any, recipe: optim.Recipe, drops: bool, layout: Layout | None = None) -> Callable:
    """The training step `(state, batches, rates, seed) -> (state, figures)`; the old state's buffers are reused.

    `batches` is a list of as many steps as are to be done in one call, in a loop on the device, `rates` their learning
    rates; `figures` holds an array of one value per step. How many share a call changes no bit of any result. With
    `count` only so many of the steps are done: one program for any number of them.
    With a `layout` the state stays where that puts it, and XLA shares the work out, which it cannot for native kernels.
    """
    plain = step_of(graph, dataclasses.replace(recipe, native=recipe.native and layout is None), drops)

    def step(state: State, batch: Batch, rate: jax.Array, seed: jax.Array, knobs: dict[str, jax.Array]):
        state, figures = plain(state, batch, rate, seed, knobs)
        return (state, figures) if layout is None else (layout.keep(state), figures)

    @functools.partial(jax.jit, donate_argnums=0)
    def update(state: State, batches: list[Batch], rates: jax.Array, seed: jax.Array, count: jax.Array | None = None):
        given = jax.tree.map(lambda *x: jnp.stack(x), *batches), rates
        one = lambda state, given: step(state, given[0], given[1], seed, {})  # noqa: E731
        if count is None:
            return jax.lax.scan(one, state, given)
        at = lambda i: jax.tree.map(lambda x: x[i], given)  # noqa: E731
        _, figures = jax.eval_shape(one, state, at(0))
        room = jax.tree.map(lambda x: jnp.zeros((len(batches), *x.shape), x.dtype), figures)

        def body(i: jax.Array, so_far: tuple[State, dict]) -> tuple[State, dict]:
            state, new = one(so_far[0], at(i))
            return state, jax.tree.map(lambda values, value: values.at[i].set(value), so_far[1], new)

        return jax.lax.fori_loop(0, count, body, (state, room))

    return update


@functools.lru_cache(maxsize=32)
def compiled_updates(graph: Any, recipe: optim.Recipe, drops: bool) -> Callable:
    """The same for N models at once: arrays of state, batches, seeds and knobs have N in front, rates are (steps N).

    `knobs` are settings of the recipe that differ from member to member; figures are (steps N). A GPU computes all
    members side by side. A CPU takes them in turn inside the program: one member's activations stay in its cache, eight
    members' do not.
    """
    one = step_of(graph, recipe, drops)
    every = (lambda *of: jax.lax.map(lambda own: one(*own), of)) if device()[0] == "cpu" else jax.vmap(one)

    @functools.partial(jax.jit, donate_argnums=0)
    def update(state: State, batches: list[Batch], rates: jax.Array, seeds: jax.Array, knobs: dict[str, jax.Array]):
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *batches)
        return jax.lax.scan(lambda state, given: every(state, *given, seeds, knobs), state, (stacked, rates))

    return update


@functools.lru_cache(maxsize=32)
def compiled_loss(graph: Any) -> Callable:
    """`(params, batch) -> (summed nats, summed weights)`, without dropout."""
    return jax.jit(lambda p, batch: cross_entropy(bind(graph, {**p, **fetching(p, batch)}), batch, None)[1])


WINDOW, FEWEST, DEVIATIONS = 128, 32, 6.0
LEAST = 0.01  # of the median: what a deviation counts at least, where all losses are nearly the same


def spikes(losses: Sequence[float], since: int = 0) -> list[int]:
    """Places, from `since` on, of the losses that stand out: above median + 6 MAD of the 128 finite ones before.

    MAD is the median absolute deviation, 0.67 sigma of a normal law. The first 32 losses, and infinite ones or NaN,
    which `train` stops at, are no spikes.
    """
    recent = np.asarray(losses[max(0, since - 2 * WINDOW) :], np.float64)
    first, finite = len(losses) - len(recent), np.isfinite(recent)
    known = recent[finite]
    if since >= len(losses) or len(known) <= FEWEST:
        return []
    padded = np.concatenate([np.full(WINDOW, np.nan), known[:-1]])
    before = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[FEWEST:]  # row i: what was before known[i]
    at = np.flatnonzero(finite)[FEWEST:] + first
    new = at >= since
    before, value, at = before[new], known[FEWEST:][new], at[new]
    median = _middle(before)
    deviation = _middle(np.abs(before - median[:, None]))
    return at[value > median + DEVIATIONS * np.maximum(deviation, LEAST * np.abs(median))].tolist()


def _middle(rows: np.ndarray) -> np.ndarray:
    """The median of each row, NaN left out: `np.nanmedian`, thirty times faster."""
    count, rows = (rows == rows).sum(axis=1), np.sort(rows, axis=1)  # NaN comes last
    each = np.arange(len(rows))
    return (rows[each, (count - 1) // 2] + rows[each, count // 2]) / 2
