"""What transformers are made of: linear maps, embeddings, norms, dropout, rotary positions.

Letters in shapes as in `model`: B batch, T positions, H heads, E head width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from tinylm import ops


class Linear(nnx.Module):
    """`x @ weight() + bias`. Every weight matrix of the kit goes through here; `kernel` is (inputs, outputs)."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = False):
        self.kernel = nnx.Param(jnp.zeros((inputs, outputs)))
        self.bias = nnx.Param(jnp.zeros(outputs)) if bias else None

    def weight(self) -> Float[Array, "inputs outputs"]:
        """The effective dense matrix, in float32."""
        return self.kernel[...]

    def __call__(self, x: Float[Array, "*batch inputs"]) -> Float[Array, "*batch outputs"]:
        return fan(x, self)[0]


def fan(x: Float[Array, "*batch inputs"], *maps: nnx.Module) -> tuple[Float[Array, "*batch _"], ...]:
    """The outputs of several linear maps of one input."""
    if any(type(m).__call__ is not Linear.__call__ for m in maps):  # one of somebody's own
        return tuple(m(x) for m in maps)
    y = ops.linear(x, *(m.weight() for m in maps))
    return tuple(z if m.bias is None else z + m.bias[...].astype(x.dtype) for z, m in zip(y, maps, strict=True))


class Embedding(nnx.Module):
    """Rows of a table picked by id; `weight()` is (ids, width)."""

    def __init__(self, ids: int, width: int):
        self.table = nnx.Param(jnp.zeros((ids, width)))

    def weight(self) -> Float[Array, "ids width"]:
        return self.table[...]

    def __call__(self, ids: Int[Array | np.ndarray, "*batch"]) -> Float[Array, "*batch width"]:
        return self.weight()[ids]


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis, in float32 (Zhang and Sennrich 2019)."""

    def __init__(self, width: int, eps: float):
        self.scale = nnx.Param(jnp.ones(width))
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        z = x.astype(jnp.float32)
        z = z * jax.lax.rsqrt(jnp.mean(z * z, axis=-1, keepdims=True) + self.eps)
        return (z * self.scale[...]).astype(x.dtype)


class LayerNorm(RMSNorm):
    """(x - mean) / std * scale + bias over the last axis, in float32 (Ba et al. 2016)."""

    def __init__(self, width: int, eps: float):
        super().__init__(width, eps)
        self.bias = nnx.Param(jnp.zeros(width))

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        z = x.astype(jnp.float32)
        z = super().__call__(z - jnp.mean(z, axis=-1, keepdims=True))
        return (z + self.bias[...]).astype(x.dtype)


NORMS = {"rmsnorm": RMSNorm, "layernorm": LayerNorm}


def dropout(x: Array, rate: float, key: PRNGKeyArray | None, salt: int) -> Array:
    """Zero a share `rate` of x and scale up the rest; the identity without a key. `salt` tells the places apart."""
    if key is None or rate == 0:
        return x
    kept = jax.random.bernoulli(jax.random.fold_in(key, salt), 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), 0)


def rotate(
    x: Float[Array, "B T H E"], positions: Int[Array | np.ndarray, "b T"], theta: float, width: int
) -> Float[Array, "B T H E"]:
    """Rotary positions (Su et al. 2021) of the first `width` features, the others pass (GPT-NeoX).

    Half-split layout: feature i is paired with i + width/2, as in Hugging Face.
    """
    if width < x.shape[-1]:
        return jnp.concatenate([rotate(x[..., :width], positions, theta, width), x[..., width:]], axis=-1)
    half = width // 2
    xp = np if isinstance(positions, np.ndarray) else jnp  # XLA would compute the sines again for every head and layer
    frequency = theta ** (-xp.arange(half, dtype=np.float32) / half)
    angle = positions[:, :, None, None].astype(np.float32) * frequency
    cos, sin = xp.cos(angle), xp.sin(angle)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
