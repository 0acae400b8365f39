"""What each layer already knows: the stream after every layer, read as if it were the last one.

logit lens (nostalgebraist 2020): the model's own last norm and head. tuned lens (Belrose et al. 2023): the same after
an affine map per layer, trained to say what the model says in the end.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from tinylm import ops
from tinylm.data import DataError, Tokens, Windows, check_tokens
from tinylm.model import Transformer
from tinylm.probe.activations import seen
from tinylm.taps import recording
from tinylm.weights import bind, pure


@dataclasses.dataclass(frozen=True)
class Lens:
    """Logits of every layer: `names` "embed", "blocks.0.resid", ...; `logits` (layers + 1, B, T, V) float32."""

    names: tuple[str, ...]
    logits: np.ndarray

    def logprobs(self) -> np.ndarray:
        """(layers + 1, B, T, V) natural log-probabilities."""
        return np.asarray(jax.nn.log_softmax(self.logits))

    def divergence(self) -> np.ndarray:
        """(layers + 1,) mean Kullback-Leibler divergence from the last layer's prediction, in bits."""
        logp = self.logprobs()
        return (np.exp(logp[-1]) * (logp[-1] - logp)).sum(-1).mean((1, 2)) / np.log(2)

    def surprisal(self, tokens: np.ndarray) -> np.ndarray:
        """(layers + 1,) mean bits that each layer needs for the next token of the (B, T) `tokens` that were read.

        Raises DataError for tokens of another shape, or fewer than 2 a row.
        """
        if np.shape(tokens) != self.logits.shape[1:3] or self.logits.shape[2] < 2:
            want = self.logits.shape[1:3]
            raise DataError(f"tokens have shape {np.shape(tokens)}: give the {want} that were read, at least 2 a row")
        check_tokens(tokens, self.logits.shape[-1])
        logp = self.logprobs()[:, :, :-1]
        ids = np.broadcast_to(np.asarray(tokens)[None, :, 1:, None], (*logp.shape[:-1], 1))
        return -np.take_along_axis(logp, ids, -1)[..., 0].mean((1, 2)) / np.log(2)


def streams(model: Transformer, tokens: Any) -> tuple[tuple[str, ...], Array]:
    """Names and values (layers + 1, B, T, D) of the stream: after the embedding and after every block."""
    names = ("embed", *(f"blocks.{layer}.resid" for layer in range(model.config.layers)))
    values = seen(model, tokens, "|".join(map(re.escape, names)))
    return names, jnp.stack([values[name] for name in names])


@functools.lru_cache(maxsize=16)
def _reader(graph: Any) -> Callable:
    def read(params, stream):
        model = bind(graph, params)
        return jax.lax.map(lambda x: model.unembed(model.norm(x)).astype(jnp.float32), stream)

    return jax.jit(read)


def _require_tokens(model: Transformer) -> None:
    if model.config.head in ("classes", "none"):
        raise DataError(f'a "{model.config.head}" head predicts no tokens: there is nothing to read')


def logit_lens(model: Transformer, tokens: np.ndarray) -> Lens:
    """The model's own reading of every layer. The last equals its logits. Raises DataError for a "classes" head."""
    _require_tokens(model)
    graph, params = pure(model)
    names, stream = streams(model, tokens)
    return Lens(names, np.asarray(_reader(graph)(params, stream)))


@dataclasses.dataclass(frozen=True)
class TunedLens:
    """An affine map per layer: `weights` (layers + 1, D, D) and `biases` (layers + 1, D); the last is the identity.

    `losses`: (steps, layers + 1) divergence from the model, nats, while it was trained.
    """

    weights: np.ndarray
    biases: np.ndarray
    losses: np.ndarray

    def __call__(self, model: Transformer, tokens: np.ndarray) -> Lens:
        """The reading of every layer."""
        graph, params = pure(model)
        names, stream = streams(model, tokens)
        return Lens(names, np.asarray(_reader(graph)(params, _moved(stream, self.weights, self.biases))))


def _moved(stream: Array, weights: Any, biases: Any) -> Float[Array, "L B T D"]:
    return jnp.einsum("lbtd,lde->lbte", stream, weights) + biases[:, None, None]


def tuned_lens(
    model: Transformer,
    data: Tokens,
    *,
    steps: int = 300,
    batch: int = 8,
    length: int = 64,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> TunedLens:
    """Train the maps of all layers together, in one program, on KL(model || lens). They start as the identity.

    Raises DataError: a head that predicts no tokens, texts of another vocabulary, or fewer than 1 step.
    """
    _require_tokens(model)
    if not isinstance(data, Tokens):
        raise DataError(
            f"the texts are a {type(data).__name__}: give Tokens, such as Tokens.from_array(ids, vocab=...)"
        )
    if data.vocab > model.config.vocab:
        raise DataError(f"the texts have {data.vocab} ids, the model {model.config.vocab}: was another tokenizer used?")
    if steps < 1:
        raise DataError(f"steps = {steps}: need at least 1")
    graph, params = pure(model)
    windows = Windows(data, batch=batch, length=min(length, model.config.context), seed=seed)
    layers, width = model.config.layers, model.config.width
    maps = {"w": jnp.broadcast_to(jnp.eye(width), (layers, width, width)), "b": jnp.zeros((layers, width))}
    rule = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))
    names = ("embed", *(f"blocks.{layer}.resid" for layer in range(layers)))

    @jax.jit
    def step(maps, state, params, tokens):
        model = bind(graph, params)
        got: dict[str, Array] = {}
        model(tokens, tap=recording(got, "|".join(map(re.escape, names))))
        stream = jnp.stack([got[name] for name in names])
        goal = jax.nn.log_softmax(model.unembed(model.norm(stream[-1])).astype(jnp.float32))

        def loss(maps):
            def one(x, w, b):
                logp = jax.nn.log_softmax(model.unembed(model.norm(x @ w + b)).astype(jnp.float32))
                return (jnp.exp(goal) * (goal - logp)).sum(-1).mean()

            each = jax.vmap(one)(stream[:-1], maps["w"], maps["b"])
            return each.sum(), each

        slopes, each = jax.grad(loss, has_aux=True)(maps)
        change, state = rule.update(slopes, state)
        return optax.apply_updates(maps, change), state, each

    state, losses = rule.init(maps), []
    with ops.plain():
        for i in range(steps):
            maps, state, each = step(maps, state, params, windows(i).tokens)
            losses.append(np.append(np.asarray(each), 0.0))
    weights = np.concatenate([maps["w"], np.eye(width, dtype=np.float32)[None]])
    biases = np.concatenate([maps["b"], np.zeros((1, width), np.float32)])
    return TunedLens(weights, biases, np.array(losses))
