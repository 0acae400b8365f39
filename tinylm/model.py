"""One transformer, decoder and encoder: all forward maths, the cache, and every tap site.

Read it top to bottom: attention, MLP, blocks, the whole; `parts` holds the smaller parts and heads. The configuration
picks parts from tables when the model is built; no forward pass branches on it. Letters in shapes: B batch, T
positions, S positions held in the cache, D width, H query heads, K key/value heads, E head width, F hidden width, V
vocabulary, C classes.

Tap sites are dotted attribute paths. A module's own path names its output; the rest are values inside it:

    embed                               (B T D)      token embedding plus learned positions
    front                               (B T D)      after a convolutional front end, where there is one
    blocks.0.attn_norm                  (B T D)      what attention reads (pre-norm and parallel blocks)
    blocks.0.attn.q .k .v               (B T H|K E)  projections, before QK-norm and rotation
    blocks.0.attn.scores .pattern       (B H T S)    before and after the softmax; asking gives up any fused kernel
    blocks.0.attn.heads                 (B T H E)    weighted values per head, before the output matrix
    blocks.0.attn                       (B T D)      attention's contribution to the residual stream
    blocks.0.resid_mid                  (B T D)      stream between attention and MLP (not in parallel blocks)
    blocks.0.mlp_norm                   (B T D)      what the MLP reads
    blocks.0.mlp.hidden                 (B T F)      neuron activations
    blocks.0.mlp                        (B T D)      the MLP's contribution
    blocks.0.conv.hidden .conv          (B T F|D)    convolution branch of an embbert block
    blocks.0.resid                      (B T D)      stream after the block
    norm                                (B T D)      after the last norm
    logits                              (B T V)      (B C) with a "classes" head, (B T D) with none
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Float, Int, PRNGKeyArray

from tinylm import ops
from tinylm.config import ModelConfig
from tinylm.parts import HEADS, NORMS, Convolutions, Embedding, Factored, Linear, RMSNorm, dropout, fan, rotate
from tinylm.parts import POOLED as POOLED
from tinylm.parts import TiedHead as TiedHead
from tinylm.parts import UntiedHead as UntiedHead
from tinylm.taps import Tap, check, recording, untouched, wants, watched, within
from tinylm.techniques import apply
from tinylm.tokenizer import Tokenizer
from tinylm.weights import bind, initialize, named, pure

# --- attention --------------------------------------------------------------------------------------------------------


class Cache(NamedTuple):
    """Keys and values of what was read so far: one array per layer, and how many positions each row holds."""

    keys: tuple[Float[Array, "B S K E"], ...]
    values: tuple[Float[Array, "B S K E"], ...]
    length: Int[Array, " B"]

    @classmethod
    def empty(cls, config: ModelConfig, batch: int, capacity: int = 0, dtype: Any = jnp.float32) -> Cache:
        """Room for `capacity` positions (0: the whole context) of `batch` rows."""
        shape = (batch, capacity or config.context, config.kv_heads, config.head_width)
        rooms = tuple(jnp.zeros(shape, dtype) for _ in range(config.layers))
        return cls(rooms, rooms, jnp.zeros(batch, jnp.int32))


class Scope(NamedTuple):
    """Where the T positions of a call stand: what attention needs to know besides their features."""

    positions: Int[Array | np.ndarray, "b T"]
    """For rotary and learned positions; b is 1 or B."""
    segments: Int[Array | np.ndarray, "B T"] | None
    """Positions see only their own segment (document, or padding)."""
    start: Int[Array, " B"] | None
    """Index of the first of the T positions in the cache; None without a cache."""


def visible(scope: Scope, queries: int, keys: int, causal: bool, window: int) -> Array | None:
    """Which keys each query may see, (b, 1, T, S) boolean; None when it is all of them."""
    q = jnp.arange(queries)[None, :, None]
    if scope.start is not None:
        q = q + scope.start[:, None, None]
    k = jnp.arange(keys)[None, None, :]
    rules = []
    if causal:
        rules.append(k <= q)
    if window:
        rules.append(jnp.abs(q - k) < window)
    if scope.segments is not None:
        rules.append(scope.segments[:, :, None] == scope.segments[:, None, :])
    return functools.reduce(jnp.logical_and, rules)[:, None] if rules else None


def attend(q, k, v, mask, scale, tap: Tap, drop: Callable[[Array], Array]) -> Float[Array, "B T H E"]:
    """Attention written out, the fastest way on a CPU: query heads are grouped by the key head they share, so that both
    products are plain batches of matrices, and the mask is added, which costs nothing backwards.
    """
    b, t, h, e = q.shape
    q = q.transpose(0, 2, 1, 3).reshape(b, k.shape[2], -1, e)
    scores = jnp.einsum("bkte,bske->bkts", q, k, preferred_element_type=jnp.float32) * scale
    scores = tap("scores", scores.reshape(b, h, t, -1))
    if mask is not None:
        scores = scores + jnp.where(mask, 0.0, jnp.finfo(jnp.float32).min)
    pattern = drop(tap("pattern", jax.nn.softmax(scores, axis=-1))).astype(v.dtype)
    heads = jnp.einsum("bkts,bske->bkte", pattern.reshape(b, k.shape[2], -1, k.shape[1]), v)
    return heads.reshape(b, h, t, e).transpose(0, 2, 1, 3)


def attend_fused(
    q, k, v, mask, scale, by: Literal["cudnn", "xla"] = "xla", causal=False, window=0
) -> Float[Array, "B T H E"]:
    """The same by JAX's function, on a GPU. `causal`, with `window`, stands for the mask that says so."""
    near = (window - 1, 0) if causal and window else None
    return jax.nn.dot_product_attention(
        q, k, v, mask=mask, scale=scale, is_causal=causal, implementation=by, local_window_size=near
    )


def attention_kind(
    device: tuple[str, float], dtype: Any, width: int, lengths: tuple[int, int], masked: bool
) -> Literal["written", "cudnn", "xla"]:
    """Which attention to use: "written" on a CPU; on a GPU "cudnn" (flash attention) where that can, else "xla".

    cuDNN's conditions are those of JAX's `check_is_flash_attention`; `width` is a head's, `lengths` are T and S.
    """
    platform, capability = device
    wide = width % 8 or width > (256 if capability >= 9 else 128)
    odd = masked and any(length % 2 for length in lengths)
    if capability >= 8 and jnp.dtype(dtype).itemsize == 2 and not wide and not odd:
        return "cudnn"
    return "written" if platform == "cpu" else "xla"


def device() -> tuple[str, float]:
    """Platform and CUDA compute capability (0: none) of the device that programs are made for."""
    here = jax.config.jax_default_device or jax.devices()[0]  # pyright: ignore[reportAttributeAccessIssue]
    number = re.fullmatch(r"\d+\.\d+", str(getattr(here, "compute_capability", "")))
    return getattr(here, "platform", here), float(number[0]) if number else 0.0


class Attention(nnx.Module):
    """Multi-head attention with grouped queries (Ainslie et al. 2023); full or sliding window; optional QK-norm."""

    def __init__(self, config: ModelConfig, layer: int):
        c = config
        self.q = Linear(c.width, c.heads * c.head_width, bias=bool(c.qkv_bias))
        self.k = Linear(c.width, c.kv_heads * c.head_width, bias=bool(c.qkv_bias))
        self.v = Linear(c.width, c.kv_heads * c.head_width, bias=bool(c.qkv_bias))
        self.o = Linear(c.heads * c.head_width, c.width, bias=c.bias)
        self.q_norm = RMSNorm(c.head_width, c.norm_eps) if c.qk_norm else same
        self.k_norm = RMSNorm(c.head_width, c.norm_eps) if c.qk_norm else same
        self.place = rotate if c.at("positions", layer) == "rope" else same
        self.theta, self.rotary = c.theta, c.rotary or c.head_width
        self.causal, self.window = c.kind == "decoder", c.at("window", layer)
        self.scale = c.attention_scale or c.head_width**-0.5
        self.head_width, self.dropout = c.head_width, c.dropout

    def __call__(self, x: Float[Array, "B T D"], scope: Scope, past=None, tap: Tap = untouched, key=None):
        """Returns the output (B T D) and the layer's keys and values, (B S K E) each."""
        split = lambda y: y.reshape(*y.shape[:2], -1, self.head_width)  # noqa: E731
        q, k, v = (tap(name, split(y)) for name, y in zip("qkv", fan(x, self.q, self.k, self.v), strict=True))
        q, k = self.q_norm(q), self.k_norm(k)
        q, k = (self.place(y, scope.positions, self.theta, self.rotary) for y in (q, k))
        if past is not None and scope.start is not None:  # a cache gives both
            k, v = write(past[0], k, scope.start), write(past[1], v, scope.start)
        mask = visible(scope, q.shape[1], k.shape[1], self.causal, self.window)
        implied = self.causal and past is None and scope.segments is None  # `causal` says all that the mask does
        masked = mask is not None and not implied
        kind = attention_kind(device(), q.dtype, self.head_width, (q.shape[1], k.shape[1]), masked)
        dropping = key is not None and self.dropout > 0
        scored = dropping or wants(tap, "pattern") or wants(tap, "scores")
        if kind == "written" and past is None and not scored and ops.native(q, k, v):
            heads = ops.attention(q, k, v, scope.segments, ops.Sight(self.causal, self.window, self.scale))
        elif kind == "written" or scored:
            drop = functools.partial(dropout, rate=self.dropout, key=key, salt=0)
            heads = attend(q, k, v, mask, self.scale, tap, drop)
        else:
            heads = attend_fused(q, k, v, mask if masked else None, self.scale, kind, implied, self.window)
        heads = tap("heads", heads)
        return self.o(heads.reshape(*x.shape[:2], -1)), (k, v)


def write(room: Float[Array, "B S K E"], new: Float[Array, "B T K E"], start: Int[Array, " B"]) -> Array:
    """Put `new` into each row of `room` from that row's own `start` on."""
    put = lambda row, x, at: jax.lax.dynamic_update_slice(row, x.astype(row.dtype), (at, 0, 0))  # noqa: E731
    return jax.vmap(put)(room, new, start)


# --- MLP --------------------------------------------------------------------------------------------------------------

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "swiglu": jax.nn.silu,
    "geglu": functools.partial(jax.nn.gelu, approximate=False),
    "reglu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}


class MLP(nnx.Module):
    """down(activation(up(x)))."""

    def __init__(self, config: ModelConfig):
        self.up = Linear(config.width, config.hidden, bias=config.bias)
        self.down = Linear(config.hidden, config.width, bias=config.bias)
        self.activation = ACTIVATIONS[config.mlp]

    def __call__(self, x: Float[Array, "B T D"], tap: Tap = untouched) -> Float[Array, "B T D"]:
        return self.down(tap("hidden", self.activation(self.up(x))))


class GatedMLP(MLP):
    """down(activation(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.gate = Linear(config.width, config.hidden, bias=config.bias)

    def __call__(self, x: Float[Array, "B T D"], tap: Tap = untouched) -> Float[Array, "B T D"]:
        gate, up = fan(x, self.gate, self.up)
        hidden = ops.swiglu(gate, up) if self.activation is jax.nn.silu else self.activation(gate) * up
        return self.down(tap("hidden", hidden))


MLPS = {"swiglu": GatedMLP, "geglu": GatedMLP, "reglu": GatedMLP, "gelu": MLP, "gelu_tanh": MLP, "relu2": MLP}

# --- blocks -----------------------------------------------------------------------------------------------------------


class PreBlock(nnx.Module):
    """x + attn(norm(x)), then x + mlp(norm(x)): GPT-2, Llama."""

    def __init__(self, config: ModelConfig, layer: int):
        norm = functools.partial(NORMS[config.norm], config.width, config.norm_eps)
        self.attn_norm, self.attn = norm(), Attention(config, layer)
        self.mlp_norm, self.mlp = norm(), MLPS[config.mlp](config)
        self.dropout = config.dropout

    def __call__(self, x: Float[Array, "B T D"], scope: Scope, past=None, tap: Tap = untouched, key=None):
        """Returns the residual stream after the block and attention's keys and values."""
        y, past = self.attn(tap("attn_norm", self.attn_norm(x)), scope, past, within("attn", tap), key)
        x = tap("resid_mid", x + tap("attn", dropout(y, self.dropout, key, 1)))
        y = self.mlp(tap("mlp_norm", self.mlp_norm(x)), within("mlp", tap))
        return tap("resid", x + tap("mlp", dropout(y, self.dropout, key, 2))), past


class PostBlock(PreBlock):
    """norm(x + attn(x)), then norm(x + mlp(x)): the original transformer and BERT."""

    def __call__(self, x: Float[Array, "B T D"], scope: Scope, past=None, tap: Tap = untouched, key=None):
        y, past = self.attn(x, scope, past, within("attn", tap), key)
        x = tap("resid_mid", self.attn_norm(x + tap("attn", dropout(y, self.dropout, key, 1))))
        y = self.mlp(tap("mlp_norm", x), within("mlp", tap))
        return tap("resid", self.mlp_norm(x + tap("mlp", dropout(y, self.dropout, key, 2)))), past


class ParallelBlock(PreBlock):
    """x + attn(norm(x)) + mlp(norm'(x)): GPT-NeoX, Pythia."""

    def __call__(self, x: Float[Array, "B T D"], scope: Scope, past=None, tap: Tap = untouched, key=None):
        y, past = self.attn(tap("attn_norm", self.attn_norm(x)), scope, past, within("attn", tap), key)
        z = self.mlp(tap("mlp_norm", self.mlp_norm(x)), within("mlp", tap))
        y = tap("attn", dropout(y, self.dropout, key, 1))
        return tap("resid", x + y + tap("mlp", dropout(z, self.dropout, key, 2))), past


class SelfKeys(nnx.Module):
    """o(softmax((q x) x^T / sqrt(D)) x): one head whose keys and values are its input (EmbBERT-Q, 2502.10001)."""

    def __init__(self, config: ModelConfig):
        self.q = Linear(config.width, config.width, bias=config.bias)
        self.o = Linear(config.width, config.width, bias=config.bias)
        self.dropout = config.dropout

    def __call__(self, x: Float[Array, "B T D"], scope: Scope, tap: Tap = untouched, key=None):
        q, x = tap("q", self.q(x))[:, :, None], x[:, :, None]
        mask = visible(scope, q.shape[1], q.shape[1], False, 0)
        drop = functools.partial(dropout, rate=self.dropout, key=key, salt=0)
        heads = tap("heads", attend(q, x, x, mask, x.shape[-1] ** -0.5, tap, drop))
        return self.o(heads[:, :, 0])


class CausalConv(nnx.Module):
    """down(silu(convolution over time)): each feature filtered by itself, from this position back."""

    def __init__(self, config: ModelConfig):
        # Row j: weight of the position j back.
        assert isinstance(config.kernel, int)  # ModelConfig lets embbert have no other
        self.kernel = nnx.Param(np.zeros((config.kernel, config.hidden), np.float32))
        self.bias = nnx.Param(np.zeros(config.hidden, np.float32))
        self.down = Linear(config.hidden, config.width, bias=config.bias)

    def __call__(self, x: Float[Array, "B T D"], tap: Tap = untouched) -> Float[Array, "B T D"]:
        kernel, t = self.kernel[...].astype(x.dtype), x.shape[1]
        x = jnp.repeat(x, kernel.shape[1] // x.shape[-1], axis=-1)
        far = min(len(kernel), t) - 1
        padded = jnp.pad(x, ((0, 0), (far, 0), (0, 0)))
        y = sum(kernel[j] * padded[:, far - j : far - j + t] for j in range(far + 1))  # faster than XLA's convolution
        return self.down(tap("hidden", jax.nn.silu(y + self.bias[...].astype(x.dtype))))


class EmbBlock(nnx.Module):
    """exp(q1 k1) attn(norm(x)) - exp(q2 k2) conv(norm(x)), and no sum with x: EmbBERT-Q (2502.10001).

    `mix` holds q1, k1, q2, k2. They start with the standard deviation of every matrix, not with the paper's 0.1.
    """

    def __init__(self, config: ModelConfig, layer: int):
        del layer
        self.attn_norm = NORMS[config.norm](config.width, config.norm_eps)
        self.attn, self.conv, self.mix = SelfKeys(config), CausalConv(config), Embedding(4, config.width)

    def __call__(self, x: Float[Array, "B T D"], scope: Scope, past=None, tap: Tap = untouched, key=None):
        x = tap("attn_norm", self.attn_norm(x))
        mix = self.mix.weight()
        first, second = jnp.exp(mix[0] @ mix[1]).astype(x.dtype), jnp.exp(mix[2] @ mix[3]).astype(x.dtype)
        seen = tap("attn", self.attn(x, scope, within("attn", tap), key))
        return tap("resid", first * seen - second * tap("conv", self.conv(x, within("conv", tap)))), past


BLOCKS = {"pre": PreBlock, "post": PostBlock, "parallel": ParallelBlock, "embbert": EmbBlock}
UNNORMED = ("post", "embbert")  # blocks with no norm after the last: post-norm ones end in one of their own

# --- the whole --------------------------------------------------------------------------------------------------------


# What the table look-ups leave on a module are named functions, never lambdas or partials made anew: two models of one
# configuration must have equal graphs, or every one of them would be compiled again.


def same(x: Array, *unused: Any) -> Array:
    """x as it is: no norm, no rotation, no cap."""
    return x


def first_type(tokens: Array, segments: Any) -> Array:
    """BERT's token types of a single text: 0."""
    return jnp.zeros_like(tokens)


def text_types(tokens: Array, segments: Any) -> Array:
    """EmbBERT's token types of a single text: 0 padding, 1 text, 2 its last token, the separator."""
    real = jnp.ones_like(tokens) if segments is None else (jnp.asarray(segments) > 0).astype(tokens.dtype)
    return real + real * (1 - jnp.pad(real, ((0, 0), (0, 1)))[:, 1:])


TYPES = {"embbert": text_types}


def capped(logits: Array, cap: float) -> Array:
    """cap * tanh(logits / cap): keeps logits inside (-cap, cap) (Gemma 2)."""
    return cap * jnp.tanh(logits / cap)


class Transformer(nnx.Module):
    """Token ids in, logits out.

    Args:
        config: sizes and parts.
        rngs: of the initial weights; a whole number is a seed.
        tokenizer: carried along, so that `generate(model, "Once")` and `save(model, folder)` need nothing else.

    Raises:
        ValueError: the tokenizer knows more ids than the model.
        EditError: an edit of the config cannot be made.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs | int = 0, tokenizer: Tokenizer | None = None):
        if tokenizer is not None and tokenizer.vocab > config.vocab:
            raise ValueError(
                f"tokenizer has {tokenizer.vocab} ids, the model only {config.vocab}; set vocab={tokenizer.vocab}"
            )
        c = self.config = config
        self.tokenizer = tokenizer
        norm = functools.partial(NORMS[c.norm], c.width, c.norm_eps)
        table = functools.partial(Factored, rank=c.embed_rank) if c.embed_rank else Embedding
        self.embed = table(c.vocab, c.width)
        self.embed_positions = table(c.context, c.width) if c.at("positions", 0) == "learned" else None
        self.embed_types = Embedding(c.token_types, c.width) if c.token_types else None
        self.embed_norm = norm() if c.embed_norm else same
        self.types = TYPES.get(c.block, first_type)
        self.front = Convolutions(c) if c.convs else None
        self.blocks = nnx.List([BLOCKS[c.block](c, layer) for layer in range(c.layers)])
        self.norm = same if c.block in UNNORMED else norm()
        self.head = (POOLED[c.pooling] if c.head == "classes" else HEADS[c.head])(c)
        self.cap = capped if c.softcap else same
        rngs = rngs if isinstance(rngs, nnx.Rngs) else nnx.Rngs(rngs)
        initialize(self, rngs, c.init_std)
        for change in c.edits:  # after the initial weights, which are those of the plain model of the same seed
            apply(self, change, rngs)

    def __call__(
        self,
        tokens: Int[Array | np.ndarray, "B T"],
        *,
        positions: Int[Array | np.ndarray, "B T"] | None = None,
        segments: Int[Array | np.ndarray, "B T"] | None = None,
        types: Int[Array | np.ndarray, "B T"] | None = None,
        cache: Cache | None = None,
        tap: Tap = untouched,
        key: PRNGKeyArray | None = None,
    ):
        """Logits (B T V); with a cache, the pair of logits and the cache holding T positions more.

        Args:
            tokens: ids in [0, vocab); not checked here, where they may be traced (see `data.check_tokens`).
            positions: default 0 .. T-1, or on from what the cache holds.
            segments: positions see only their own segment; not with a cache.
            types: BERT's token types, default 0.
            cache: `Cache.empty(...)`, or what an earlier call returned.
            tap: sees every site of the module's docstring.
            key: for dropout; None switches dropout off.

        Raises:
            ValueError: no rows, too many tokens for the context or the cache, or a tap meant for other sites.
        """
        tap = watched(tap)
        x, new = self.trunk(tokens, positions=positions, segments=segments, types=types, cache=cache, tap=tap, key=key)
        logits = self.unembed(x, tap, segments)
        check(tap)
        return logits if new is None else (logits, new)

    def trunk(self, tokens, *, positions=None, segments=None, types=None, cache=None, tap: Tap = untouched, key=None):
        """Everything before the head: normed features (B T D), and the cache or None."""
        t = tokens.shape[1]
        if not tokens.size:
            raise ValueError(f"an empty batch: tokens have shape {tokens.shape}")
        if cache is None and t > self.config.context:
            raise ValueError(f"{t} tokens do not fit a context of {self.config.context}")
        if cache is not None and segments is not None:
            raise ValueError("segments cannot be used with a cache: keys read earlier have no segment")
        if cache is not None and self.config.kind == "encoder":
            raise ValueError("an encoder cannot use a cache: every position also sees the later ones")
        if cache is not None:
            held = 0 if isinstance(cache.length, Tracer) else int(np.max(cache.length))  # 0: not known yet
            room = cache.keys[0].shape[1]
            if held + t > room:
                raise ValueError(f"{t} more tokens do not fit a cache of {room} positions that holds {held}")
        start = None if cache is None else cache.length
        if positions is None:
            positions = np.arange(t)[None] if start is None else start[:, None] + jnp.arange(t)[None]
        scope = Scope(positions, segments, start)
        x = self.embed(tokens)
        if self.embed_positions is not None:
            x = x + self.embed_positions(positions)
        if self.embed_types is not None:
            x = x + self.embed_types(self.types(jnp.asarray(tokens), segments) if types is None else types)
        x = tap("embed", dropout(self.embed_norm(x), self.config.dropout, key, 0))
        if self.front is not None:
            x = tap("front", self.front(x, training=key is not None, tap=within("front", tap)))
        pasts = [None] * len(self.blocks) if cache is None else list(zip(cache.keys, cache.values, strict=True))
        for i, block in enumerate(self.blocks):
            block_key = None if key is None else jax.random.fold_in(key, i + 1)
            x, pasts[i] = block(x, scope, pasts[i], within(f"blocks.{i}", tap), block_key)
        x = tap("norm", self.norm(x))
        if cache is None:
            return x, None
        keys, values = zip(*pasts, strict=True)
        return x, Cache(keys, values, cache.length + t)

    def unembed(self, x: Float[Array, "*batch D"], tap: Tap = untouched, segments: Any = None) -> Float[Array, ...]:
        """The head: normed features to logits (*batch V); class scores (B C) from (B T D) with a "classes" head, which
        leaves out positions whose segment is 0.
        """
        return tap("logits", self.cap(self.head(x, self.embed.weight(), segments), self.config.softcap))


def shapes(config: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Name -> shape and dtype of every parameter, without computing any."""
    return dict(_shapes(config))


@functools.lru_cache(maxsize=64)
def _shapes(config: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    return named(nnx.eval_shape(lambda: Transformer(config)))  # type: ignore[return-value]


def sites(model: Transformer) -> dict[str, tuple[int, ...]]:
    """Every tap site of this model with the shape it has for one row of two tokens; computes nothing."""
    graph, params = pure(model)
    seen: dict[str, Array] = {}
    jax.eval_shape(lambda p: bind(graph, p)(jnp.zeros((1, 2), jnp.int32), tap=recording(seen)), params)
    return {site: x.shape for site, x in seen.items()}
