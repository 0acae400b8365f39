"""A TopK sparse autoencoder of a codebook's size, and codes without training: what codes are to be compared with.

The autoencoder is Gao et al.'s (2024, arXiv 2406.04093): latents = TopK(relu(W (x - b) + c)), reconstruction
D latents + b with unit columns of D; least squares by Adam. Groups have autoencoders of their own, as heads have codes.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from tinylm.techniques.codebook import nearest


class SAE(NamedTuple):
    """Weights of one autoencoder per group: encoder and decoder (G, E, C) and (G, C, E), biases (G, C) and (G, E)."""

    encoder: Float[Array, "G E C"]
    decoder: Float[Array, "G C E"]
    bias: Float[Array, "G C"]
    center: Float[Array, "G E"]


def latents(sae: SAE, x: Float[Array, "n G E"], k: int) -> tuple[Array, Array]:
    """Values and ids (n, G, k) of the k largest latents; values are 0 where fewer are above 0."""
    pre = jnp.einsum("nge,gec->gnc", x - sae.center, sae.encoder) + sae.bias[:, None]
    values, ids = jax.lax.top_k(jax.nn.relu(pre), k)
    return values.swapaxes(0, 1), ids.swapaxes(0, 1)


def rebuilt(sae: SAE, values: Array, ids: Array) -> Float[Array, "n G E"]:
    """The states that latents stand for."""
    group = jnp.arange(sae.decoder.shape[0])[:, None]
    return (values[..., None] * sae.decoder[group, ids]).sum(-2) + sae.center


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _train(sae: SAE, states: Array, k: int, steps: int, batch: int, rate: float) -> tuple[SAE, Array]:
    rule = optax.adam(rate)

    def loss(sae: SAE, x: Array) -> Array:
        return jnp.mean(jnp.sum((rebuilt(sae, *latents(sae, x, k)) - x) ** 2, (-2, -1)))

    def one(carry: Any, key: Array) -> Any:
        sae, opt = carry
        value, grad = jax.value_and_grad(loss)(sae, states[jax.random.randint(key, (batch,), 0, len(states))])
        change, opt = rule.update(grad, opt)
        new: Any = optax.apply_updates(sae, change)
        norm = jnp.linalg.norm(new.decoder, axis=-1, keepdims=True)
        return (new._replace(decoder=new.decoder / norm), opt), value

    keys = jax.random.split(jax.random.key(1), steps)
    (sae, _), losses = jax.lax.scan(one, (sae, rule.init(sae)), keys)
    return sae, losses


def train_sae(
    states: np.ndarray, codes: int, k: int, *, steps: int = 2000, batch: int = 1024, rate: float = 1e-3, seed: int = 0
) -> tuple[SAE, float]:
    """Fit autoencoders to (n, groups, width) states; also the share of variance left unexplained on them."""
    groups, width = states.shape[1:]
    x = jnp.asarray(states, jnp.float32)
    size = float(jnp.sqrt(jnp.mean(jnp.sum((x - x.mean(0)) ** 2, -1)))) or 1.0  # so that one rate fits all
    d = jax.random.normal(jax.random.key(seed), (groups, codes, width))
    d = d / jnp.linalg.norm(d, axis=-1, keepdims=True)
    sae = SAE(d.swapaxes(1, 2), d, jnp.zeros((groups, codes)), x.mean(0) / size)
    sae, _ = _train(sae, x / size, k, steps, batch, rate)
    sae = sae._replace(center=sae.center * size, bias=sae.bias * size)
    error = jnp.sum((rebuilt(sae, *latents(sae, x, k)) - x) ** 2) / jnp.sum((x - x.mean(0)) ** 2)
    return sae, float(error)


def sae_ids(sae: SAE, states: np.ndarray, k: int, *, chunk: int = 4096) -> np.ndarray:
    """(n, groups, k) latents that fire, -1 where fewer than k do."""
    found = []
    run = jax.jit(lambda x: latents(sae, x, k))
    for at in range(0, len(states), chunk):
        part = np.asarray(states[at : at + chunk], np.float32)
        values, ids = run(np.pad(part, [(0, chunk - len(part)), (0, 0), (0, 0)]))
        found.append(np.where(np.asarray(values) > 0, np.asarray(ids), -1)[: len(part)])
    return np.concatenate(found)


def random_ids(states: np.ndarray, codes: int, k: int, *, seed: int = 0) -> np.ndarray:
    """(n, groups, k) the k nearest of random codes: the control that only knows the states' geometry."""
    groups, width = states.shape[1:]
    book = jax.random.normal(jax.random.key(seed), (groups, codes, width))
    return np.asarray(jax.jit(lambda x: nearest(x, book, jnp.zeros((groups, codes)), k))(jnp.asarray(states)))
