"""Cross-entropy without the logits: the head and the softmax are done on a few rows at a time, gradient included.

All B x T x V logits of a batch are often larger than the model: 4 x 256 x 32,000 floats are 131 MB, and
a plain step holds several copies. The loss is a sum over rows, so each chunk's gradient can be taken as soon as its
logits exist, and only sums are kept: the same three matrix products as in the plain loss (`plain_nats`, its slow twin).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from tinylm import ops
from tinylm.model import TiedHead, Transformer, UntiedHead, capped
from tinylm.parts import Linear
from tinylm.weights import bind, pure

LOGITS_AT_ONCE = {"cpu": 2**21}  # per chunk: 8 MB of float32 stay in a CPU's cache; elsewhere only memory counts
LOGITS_ELSEWHERE = 2**26
FEWEST = 256  # rows of a chunk: each chunk adds to the whole gradient of the table, which costs as much as 50 rows do


class Rows(NamedTuple):
    """Positions to predict, as rows: normed features, targets, and the share of each in the loss."""

    x: Float[Array, "N D"]
    targets: Int[Array, " N"]
    weights: Float[Array, " N"]


class Head(NamedTuple):
    """The arrays that turn features into logits, apart from the model: the loss's gradient is taken towards them."""

    params: dict[str, Array]
    table: Float[Array, "V D"]
    """The embedding, which most heads use again."""


class How(NamedTuple):
    """What is compiled in: the head's graph, the model's softcap (0: none), and the weight of the z-loss."""

    graph: Any
    softcap: float
    z_loss: float


def taken(model: Transformer, z_loss: float = 0.0) -> tuple[How, Head]:
    """The head of a model in two parts, static and arrays."""
    graph, params = pure(model.head)
    return How(graph, model.config.softcap, z_loss), Head(params, model.embed.weight())


def plain_nats(how: How, head: Head, rows: Rows) -> tuple[Array, Array]:
    """Summed weighted cross-entropy in nats, first with the z-loss, then without: all logits at once.

    The z-loss is `z_loss * logsumexp(logits)^2` per row; it keeps logits from drifting (PaLM, Chowdhery et al. 2022).
    """
    logits = bind(how.graph, head.params)(rows.x, head.table)
    logits = (capped(logits, how.softcap) if how.softcap else logits).astype(jnp.float32)
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, rows.targets)
    extra = how.z_loss * jnp.square(jax.nn.logsumexp(logits, axis=-1)) if how.z_loss else 0.0
    return ((nats + extra) * rows.weights).sum(), (nats * rows.weights).sum()


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def chunked_nats(how: How, chunks: int, head: Head, rows: Rows) -> tuple[Array, Array]:
    """`plain_nats` with 1/chunks of the logits in memory at a time; `chunks` must divide the rows."""
    add = lambda total, part: (jax.tree.map(jnp.add, total, plain_nats(how, head, part)), None)  # noqa: E731
    return jax.lax.scan(add, (jnp.float32(0), jnp.float32(0)), _cut(rows, chunks))[0]


def _cut(rows: Rows, chunks: int) -> Rows:
    """Every chunks-th row to a chunk, so that rows shared out to several devices stay where they are."""
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, chunks, *x.shape[1:]), 1, 0), rows)


def _forward(how: How, chunks: int, head: Head, rows: Rows) -> tuple[tuple[Array, Array], tuple[Head, Array]]:
    def one(head: Head, x: Array, part: Rows) -> tuple[Array, Array]:
        return plain_nats(how, head, part._replace(x=x))

    def add(carry, part: Rows):
        total, slope = carry
        both, (of_head, of_x) = jax.value_and_grad(one, argnums=(0, 1), has_aux=True)(head, part.x, part)
        slope = jax.tree.map(lambda sum, g: sum + g.astype(jnp.float32), slope, of_head)
        return (jax.tree.map(jnp.add, total, both), slope), of_x

    zero = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), head)
    (total, slope), of_x = jax.lax.scan(add, ((jnp.float32(0), jnp.float32(0)), zero), _cut(rows, chunks))
    return total, (
        jax.tree.map(lambda g, p: g.astype(p.dtype), slope, head),
        jnp.moveaxis(of_x, 0, 1).reshape(rows.x.shape),
    )


def _backward(how: How, chunks: int, saved: tuple[Head, Array], given: tuple[Array, Array]) -> tuple[Head, Rows]:
    """The loss is a sum, so its gradient was known on the way forward, up to the factor that comes from above."""
    slope, of_x = saved
    scaled = lambda g: (g * given[0]).astype(g.dtype)  # noqa: E731
    return jax.tree.map(scaled, slope), Rows(scaled(of_x), None, None)  # type: ignore[arg-type]


chunked_nats.defvjp(_forward, _backward)


def class_nats(logits: Array, labels: Any, weights: Any = None) -> tuple[Array, tuple[Array, Array]]:
    """What `step.cross_entropy` gives, of class scores (B C) and labels (B,); weights (B,) balance the classes."""
    each = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), jnp.asarray(labels))
    weights = jnp.ones(each.shape) if weights is None else jnp.asarray(weights, jnp.float32)
    nats = (each * weights).sum()
    return nats, (nats, weights.sum())


def at_once(vocab: int) -> int:
    """Rows whose logits are held at a time on this device."""
    return max(FEWEST, LOGITS_AT_ONCE.get(jax.default_backend(), LOGITS_ELSEWHERE) // vocab)


def matrix(model: Transformer) -> tuple[Array | None, bool]:
    """The matrix that is all there is to a head, and whether it is tied; None where there is more to it."""
    if model.config.softcap:
        return None, False
    if type(model.head) is TiedHead:
        return model.embed.weight(), True
    plain = type(model.head) is UntiedHead and type(model.head.out).__call__ is Linear.__call__
    return (model.head.out.weight() if plain else None), False


def head_nats(model: Transformer, rows: Rows, z_loss: float = 0.0) -> tuple[Array, Array]:
    """`plain_nats` of a model's head, in as many chunks as keep the logits small on this device."""
    table, tied = matrix(model)
    if table is not None and ops.native(rows.x, table):
        return ops.nats(rows.x, table, rows.targets, rows.weights, z_loss, tied)
    how, head = taken(model, z_loss)
    n, size = len(rows.targets), at_once(model.config.vocab)
    if n <= size:
        return plain_nats(how, head, rows)
    chunks = -(-n // size)
    size = -(-n // chunks)
    more = chunks * size - n  # rows without weight
    padded = (jnp.pad(x, [(0, more)] + [(0, 0)] * (x.ndim - 1)) for x in rows)
    return chunked_nats(how, chunks, head, Rows(*padded) if more else rows)
