"""What transformers are made of: linear maps, embeddings, norms, dropout, rotary positions, convolutions, heads.

Letters in shapes as in `model`: B batch, T positions, H heads, E head width, D width, V vocabulary, C classes.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from tinylm import ops
from tinylm.config import ModelConfig
from tinylm.taps import Tap, untouched


class Linear(nnx.Module):
    """`x @ weight() + bias`. Every weight matrix of the kit goes through here; `kernel` is (inputs, outputs)."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = False):
        self.kernel = nnx.Param(np.zeros((inputs, outputs), np.float32))
        self.bias = nnx.Param(np.zeros(outputs, np.float32)) if bias else None

    def weight(self) -> Float[Array, "inputs outputs"]:
        """The effective dense matrix, in float32."""
        return self.kernel[...]

    def __call__(self, x: Float[Array, "*batch inputs"]) -> Float[Array, "*batch outputs"]:
        return fan(x, self)[0]


def fan(x: Float[Array, "*batch inputs"], *maps: Any) -> tuple[Float[Array, "*batch _"], ...]:
    """The outputs of several linear maps of one input."""
    if any(type(m).__call__ is not Linear.__call__ for m in maps):  # one of somebody's own
        return tuple(m(x) for m in maps)
    y = ops.linear(x, *(m.weight() for m in maps))
    return tuple(z if m.bias is None else z + m.bias[...].astype(x.dtype) for z, m in zip(y, maps, strict=True))


class Embedding(nnx.Module):
    """Rows of a table picked by id; `weight()` is (ids, width)."""

    def __init__(self, ids: int, width: int):
        self.table = nnx.Param(np.zeros((ids, width), np.float32))

    def weight(self) -> Float[Array, "ids width"]:
        return self.table[...]

    def __call__(self, ids: Int[Array | np.ndarray, "*batch"]) -> Float[Array, "*batch width"]:
        return self.weight()[ids]


class Factored(nnx.Module):
    """An embedding whose rows are `rank` wide and expanded by a matrix; `weight()` is (ids, width)."""

    def __init__(self, ids: int, width: int, rank: int):
        self.table = nnx.Param(np.zeros((ids, rank), np.float32))
        self.expand = Linear(rank, width)

    def weight(self) -> Float[Array, "ids width"]:
        return self.table[...] @ self.expand.weight()

    def __call__(self, ids: Int[Array | np.ndarray, "*batch"]) -> Float[Array, "*batch width"]:
        return self.expand(self.table[...][ids])


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis, in float32 (Zhang and Sennrich 2019)."""

    def __init__(self, width: int, eps: float):
        self.scale = nnx.Param(np.ones(width, np.float32))
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        z = x.astype(jnp.float32)
        z = z * jax.lax.rsqrt(jnp.mean(z * z, axis=-1, keepdims=True) + self.eps)
        return (z * self.scale[...]).astype(x.dtype)


class LayerNorm(RMSNorm):
    """(x - mean) / std * scale + bias over the last axis, in float32 (Ba et al. 2016)."""

    def __init__(self, width: int, eps: float):
        super().__init__(width, eps)
        self.bias = nnx.Param(np.zeros(width, np.float32))

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
    half = width // 2
    xp = np if isinstance(positions, np.ndarray) else jnp  # XLA would compute the sines again for every head and layer
    frequency = theta ** (-xp.arange(half, dtype=np.float32) / half)
    angle = positions[:, :, None].astype(np.float32) * frequency
    return ops.rotate(x, xp.cos(angle), xp.sin(angle))


# --- a convolutional front end ----------------------------------------------------------------------------------------


class Statistic(nnx.Variable):
    """A mean or variance of the population, which training leaves alone (see `BatchNorm`)."""


class BatchNorm(nnx.Module):
    """(x - mean) / std * scale + bias over all but the last axis (Ioffe and Szegedy 2015).

    In training, by the batch's own statistics, padding included; else by those of the population, which
    `tinylm.classification.settle` measures over batches after training ("precise" statistics, Wu and Johnson 2021)
    in place of a running average, which would have to come out of a step that has no other by-product.
    """

    def __init__(self, width: int, eps: float = 1e-5):
        self.scale, self.bias = nnx.Param(np.ones(width, np.float32)), nnx.Param(np.zeros(width, np.float32))
        self.mean, self.var = Statistic(jnp.zeros(width)), Statistic(jnp.ones(width))
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch width"], training: bool, tap: Tap = untouched):
        z = x.astype(jnp.float32)
        mean, var = self.mean[...], self.var[...]
        if training:
            axes = tuple(range(z.ndim - 1))
            mean, var = tap("mean", z.mean(axes)), tap("var", z.var(axes))
        return ((z - mean) * jax.lax.rsqrt(var + self.eps) * self.scale[...] + self.bias[...]).astype(x.dtype)


class Conv2d(nnx.Module):
    """A convolution over (positions, features) of (B, T, D, channels), padded to the same size; with a bias."""

    def __init__(self, span: tuple[int, int], inputs: int, outputs: int):
        self.kernel = nnx.Param(np.zeros((*span, inputs, outputs), np.float32))
        self.bias = nnx.Param(np.zeros(outputs, np.float32))

    def __call__(self, x: Float[Array, "B T D _"]) -> Float[Array, "B T D _"]:
        kernel, sides = self.kernel[...].astype(x.dtype), ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=sides)
        return y + self.bias[...].astype(x.dtype)


class Convolutions(nnx.Module):
    """The front end of Tiny language models (Gross et al. 2025): the embedded text as an image of one channel, `convs`
    times {convolution, batch norm, GELU} to `channels`, and once 1 x 1 back to one. No sum around it, and it does not
    know padding, as there.
    """

    def __init__(self, config: ModelConfig):
        c = config
        span = c.kernel if isinstance(c.kernel, tuple) else (c.kernel,)
        wide = [1, *[c.channels] * c.convs, 1]
        spans = [(span[0], span[-1])] * c.convs + [(1, 1)]
        self.convs = nnx.List([Conv2d(s, a, b) for s, a, b in zip(spans, wide[:-1], wide[1:], strict=True)])
        self.batch = nnx.List([BatchNorm(width) for width in wide[1:]])

    def __call__(self, x: Float[Array, "B T D"], training: bool = False, tap: Tap = untouched) -> Float[Array, "B T D"]:
        x = x[..., None]
        for i, (conv, norm) in enumerate(zip(self.convs, self.batch, strict=True)):
            own = lambda site, value, i=i: tap(f"batch.{i}.{site}", value)  # noqa: E731
            x = jax.nn.gelu(norm(conv(x), training, own), approximate=False)
        return x[..., 0]


# --- heads ------------------------------------------------------------------------------------------------------------


class TiedHead(nnx.Module):
    """Logits by the token embedding, transposed. The Param is used twice, never stored twice."""

    def __init__(self, config: ModelConfig):
        del config

    def __call__(self, x: Float[Array, "*batch D"], embedding: Any, segments: Any = None) -> Float[Array, "*batch V"]:
        return x @ embedding.T.astype(x.dtype)


class UntiedHead(nnx.Module):
    """Logits by a matrix of their own."""

    def __init__(self, config: ModelConfig):
        self.out = Linear(config.width, config.vocab)

    def __call__(self, x: Float[Array, "*batch D"], embedding: Any, segments: Any = None) -> Float[Array, "*batch V"]:
        return self.out(x)


class MLMHead(nnx.Module):
    """BERT's prediction head: dense, GELU, norm, the tied embedding, a bias per token (Devlin et al. 2018)."""

    def __init__(self, config: ModelConfig):
        self.dense = Linear(config.width, config.width, bias=True)
        self.norm = NORMS[config.norm](config.width, config.norm_eps)
        self.bias = nnx.Param(np.zeros(config.vocab, np.float32))

    def __call__(self, x: Float[Array, "*batch D"], embedding: Any, segments: Any = None) -> Float[Array, "*batch V"]:
        x = self.norm(jax.nn.gelu(self.dense(x), approximate=False))
        return x @ embedding.T.astype(x.dtype) + self.bias[...].astype(x.dtype)


class ClassHead(nnx.Module):
    """BERT's classifier: dense and tanh on the first position, then one score per class (Devlin et al. 2018)."""

    def __init__(self, config: ModelConfig):
        self.dense = Linear(config.width, config.width, bias=True) if config.pooler else None
        self.out = Linear(config.width, config.classes, bias=True)

    def pool(self, x: Float[Array, "*batch T D"], real: Float[Array, "*batch T"]) -> Float[Array, "*batch D"]:
        """One vector of a text from those of its positions; `real` is 0 on padding, 1 elsewhere."""
        return x[..., 0, :]

    def __call__(self, x: Float[Array, "*batch T D"], embedding: Any, segments: Any = None) -> Float[Array, "*batch C"]:
        real = jnp.ones(x.shape[:-1], x.dtype) if segments is None else (jnp.asarray(segments) > 0).astype(x.dtype)
        x = self.pool(x, real)
        return self.out(x if self.dense is None else jnp.tanh(self.dense(x)))


class MeanClassHead(ClassHead):
    """The classifier on the mean over the positions."""

    def pool(self, x: Float[Array, "*batch T D"], real: Float[Array, "*batch T"]) -> Float[Array, "*batch D"]:
        return jnp.einsum("...td,...t->...d", x, real / jnp.maximum(real.sum(-1, keepdims=True), 1))


class AttentionClassHead(ClassHead):
    """The classifier on a mean with learned weights (SeqPool: Hassani et al. 2021, compact transformers)."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.score = Linear(config.width, 1, bias=True)

    def pool(self, x: Float[Array, "*batch T D"], real: Float[Array, "*batch T"]) -> Float[Array, "*batch D"]:
        scores = jnp.where(real > 0, self.score(x)[..., 0], jnp.finfo(x.dtype).min)
        return jnp.einsum("...td,...t->...d", x, jax.nn.softmax(scores, axis=-1))


class LastClassHead(ClassHead):
    """The classifier on the last position, the only one of a decoder that saw all of the text."""

    def pool(self, x: Float[Array, "*batch T D"], real: Float[Array, "*batch T"]) -> Float[Array, "*batch D"]:
        last = jnp.maximum((real > 0).sum(-1) - 1, 0)  # whole numbers: bfloat16 cannot count beyond 256
        return jnp.take_along_axis(x, last[..., None, None], axis=-2)[..., 0, :]


POOLED = {"cls": ClassHead, "mean": MeanClassHead, "attention": AttentionClassHead, "last": LastClassHead}


class NoHead(nnx.Module):
    """The features themselves, for models that only embed."""

    def __init__(self, config: ModelConfig):
        del config

    def __call__(self, x: Float[Array, "*batch D"], embedding: Any, segments: Any = None) -> Float[Array, "*batch D"]:
        return x


HEADS = {"tied": TiedHead, "untied": UntiedHead, "mlm": MLMHead, "classes": ClassHead, "none": NoHead}
