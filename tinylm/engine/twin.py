"""The engine in plain NumPy: the specification of its arithmetic, and what runs a file without the native library.

    twin = Twin("story.tlm")
    twin.logits(tokens)                        (T, V)
    list(twin.generate([1], 100, seed=7))      the same tokens as the native engine, for every seed and setting

`arithmetic` has the sums and functions. Here: matrices, attention, blocks, heads, sampling. Letters in shapes as in
`model`: T positions of this call, S of the cache, H heads, K key heads, E head width, D width, V vocabulary.

    linear      a row x becomes codes and a scale; products with a weight row's codes are summed exactly in int32;
    output =
                float(sum) * (scale of x * scale of the row), or with groups fma(float(sum), scale, ...) over the
                groups in order, times the scale of x. Float matrices: an fma chain over the inputs in order. Then the
                bias.
    attention   every token of a call writes its keys and values first, then all attend to the cache. Scores carry the
                factor attention_scale * log2(e), so that weights are powers of two.
    norms       of the residual stream, and of a matrix's own input where the file has them, before it is rounded.
    residuals   and embeddings: plain sums, in the order of `model`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from tinylm.config import Sampling
from tinylm.engine import arithmetic, file, rounding
from tinylm.engine.arithmetic import (
    ACTIVATIONS,
    F32,
    INF,
    LANES,
    LARGEST,
    LOG2E,
    across,
    blocks,
    exp2,
    fma,
    lanesum,
    quantize,
)
from tinylm.engine.layout import BLOCKS, CACHES, GATED, HEADS, KINDS, MLPS, POOLINGS, Kind
from tinylm.store import PathLike

EXACT = 1040  # columns whose sums of codes are exact in float32, whatever the order: 127 * 127 * 1040 < 2^24
CHUNK = 256  # cached positions whose weighted codes are summed exactly before they become a float
QUERIES = 32  # attended to at once, to save memory
SURE = 1e-9  # chance per token that screening misses a row, at most

POOLS = {
    "cls": lambda x: x[:1],
    "mean": lambda x: x.cumsum(0, dtype=F32)[-1:] / F32(len(x)),  # position after position, as native code adds up
    "last": lambda x: x[-1:],
}

Watch = Callable[[str, np.ndarray], None]
"""Sees every array of integers, and the scales that go with them, by name."""


class Matrix(NamedTuple):
    """A matrix of the file, unpacked. `codes` (columns, rows) are float32, so that BLAS multiplies them, exactly."""

    name: str
    codes: np.ndarray
    scales: np.ndarray
    """(rows, groups); (rows, 0) for a matrix of floats."""
    group: int
    bias: np.ndarray | None
    input: float
    """Static scale of the input; 0: a scale per row."""
    norm: Callable[[np.ndarray], np.ndarray]
    """Of the input, before that is rounded."""

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """Rows as floats, (ids, columns): an embedding."""
        codes = self.codes[:, ids].T
        if not self.scales.size:
            return codes
        scales = self.scales[ids]
        return codes * (np.repeat(scales, self.group, axis=1)[:, : codes.shape[1]] if self.group else scales)

    def sums(self, codes: np.ndarray) -> np.ndarray:
        """Exact products with (T, columns) codes: (groups, T, rows) int32."""
        columns = len(self.codes)
        edges = range(0, columns, self.group or columns)
        return np.stack([self._sums(codes, k, min(columns, k + (self.group or columns))) for k in edges])

    def _sums(self, codes: np.ndarray, begin: int, end: int) -> np.ndarray:
        total = np.zeros((len(codes), self.codes.shape[1]), np.int32)
        for k in range(begin, end, EXACT):
            part = slice(k, min(end, k + EXACT))
            total += (codes[:, part].astype(np.float32) @ self.codes[part]).astype(np.int32)
        return total

    def __call__(self, x: np.ndarray, watch: Watch | None = None) -> np.ndarray:
        """(T, columns) -> (T, rows)."""
        x = self.norm(x)
        if self.scales.size:
            codes, scale = quantize(x, self.input)
            sums = self.sums(codes)
            if watch:
                watch(f"{self.name}.codes", codes)
                watch(f"{self.name}.scales", scale)
                watch(f"{self.name}.sums", sums)
            if self.group:
                y = np.zeros(sums.shape[1:], np.float32)
                for g, part in enumerate(sums):
                    y = fma(part.astype(np.float32), self.scales[:, g], y)
                y = y * scale[:, None]
            else:
                y = sums[0].astype(np.float32) * (scale[:, None] * self.scales[:, 0])
        else:
            y = np.zeros((len(x), self.codes.shape[1]), np.float32)
            for k, row in enumerate(self.codes):
                y = fma(x[:, k : k + 1], row, y)
        return y if self.bias is None else y + self.bias


class Past:
    """What was read: a layer's keys and values are appended by every call. Codes and scales, or floats alone."""

    def __init__(self) -> None:
        self.length = 0
        self.layers: dict[int, tuple[np.ndarray, ...]] = {}

    def append(self, layer: int, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        """Put arrays (T, ...) behind the layer's; gives all of it, (S, ...)."""
        held = self.layers.get(layer)
        whole = arrays if held is None else tuple(np.concatenate(pair) for pair in zip(held, arrays, strict=True))
        self.layers[layer] = whole
        return whole


class Screened(NamedTuple):
    """What screening found: the token, the largest value, the rows computed exactly, and the bounds of all rows."""

    token: int
    rows: np.ndarray
    low: np.ndarray
    high: np.ndarray


class Twin:
    """A file's model, in NumPy. Raises FileNotFoundError and FormatError as `file.read`."""

    def __init__(self, path: PathLike) -> None:
        found = file.read(path)
        self.path, self.constants, self.tensors = path, found.constants, found.tensors
        c = self.constants
        kinds = (Kind.floats, Kind.ints)
        self.vectors = {name: tensor.values for name, tensor in self.tensors.items() if tensor.kind in kinds}
        self.matrices = {
            name: self._unpacked(name) for name, tensor in self.tensors.items() if tensor.kind >= Kind.panel_float
        }
        wide = c.head_width % 16 == 0 and c.head_width >= 32
        self.int8_cache = wide if CACHES[c.cache] == "auto" else CACHES[c.cache] == "int8"
        self.factor = F32(c.attention_scale) * LOG2E
        self.ends, self.context = c.ends, c.context
        self._angles: list[tuple[list[float], list[float]]] = []

    def _unpacked(self, name: str) -> Matrix:
        rounded = rounding.unpack(self.tensors[name], self.tensors.get(f"{name}.dither"))
        bias, fixed = self.tensors.get(f"{name}.bias"), self.tensors.get(f"{name}.input")
        return Matrix(
            name,
            np.ascontiguousarray(rounded.codes.T, np.float32),
            rounded.scales,
            rounded.group,
            None if bias is None else bias.values[0],
            0.0 if fixed is None else float(fixed.values[0, 0]),
            functools.partial(self._norm, f"{name}.norm"),
        )

    # ---- what people ask for

    def logits(self, tokens: Sequence[int] | np.ndarray, types: Sequence[int] | None = None) -> np.ndarray:
        """(T, V) float32, a row per token. Raises ValueError for impossible tokens, or a head without logits."""
        if HEADS[self.constants.head] in ("classes", "none"):
            raise ValueError(f"{self.path} gives no logits: its head is {HEADS[self.constants.head]!r}")
        with np.errstate(all="ignore"):
            return self._head(self._trunk(tokens, types))

    def features(self, tokens: Sequence[int] | np.ndarray, types: Sequence[int] | None = None) -> np.ndarray:
        """(T, D) float32: what the head reads."""
        with np.errstate(all="ignore"):
            return self._trunk(tokens, types)

    def read(self, tokens: Sequence[int] | np.ndarray, past: Past) -> np.ndarray:
        """`features` of more tokens of the text in `past`, which holds them afterwards: the same bits, however many."""
        with np.errstate(all="ignore"):
            return self._trunk(tokens, None, past)

    def classify(self, tokens: Sequence[int] | np.ndarray, types: Sequence[int] | None = None) -> np.ndarray:
        """(C,) float32: a score per class. Raises ValueError where the model has none."""
        if HEADS[self.constants.head] != "classes":
            raise ValueError(f"{self.path} gives no classes: its head is {HEADS[self.constants.head]!r}")
        with np.errstate(all="ignore"):
            return self._head(self._trunk(tokens, types))[0]

    def integers(self, tokens: Sequence[int] | np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """Yield (name, array) of all codes, their scales and their exact sums, in the order they are computed.

        Per matrix: NAME.codes (T, inputs) int8, NAME.scales (T,), NAME.sums (groups, T, outputs) int32. With an int8
        cache, per layer: blocks.0.attn.keys, .values, .queries and .key_scales and so on, and .weights (H, T, S), the
        codes of what each query takes of each value.
        """
        seen: list[tuple[str, np.ndarray]] = []
        with np.errstate(all="ignore"):
            x = self._trunk(tokens, None, watch=lambda *found: seen.append(found))
            self._head(x, watch=lambda *found: seen.append(found))
        yield from seen

    def generate(
        self, prompt: Sequence[int], tokens: int, *, seed: int = 0, stream: int = 0, **sampling: Any
    ) -> Iterator[int]:
        """Yield the next `tokens` ids, also beyond one that ends a text.

        A text that outgrows the context is read from `start_of` on. `sampling`: the fields of `Sampling`. Raises
        ValueError for an encoder, an empty prompt or impossible ids, ConfigError.
        """
        settings = Sampling.from_dict(sampling)
        if KINDS[self.constants.kind] != "decoder":
            raise ValueError(f"{self.path} is an encoder: it fills gaps and cannot continue a text")
        text, begin, past, x = list(map(int, prompt)), -1, Past(), np.zeros(0)
        for _ in range(tokens):
            with np.errstate(all="ignore"):
                if start_of(len(text), self.context) != begin:
                    begin = start_of(len(text), self.context)
                    past = Past()
                    x = self._trunk(text[begin:], None, past)
                else:
                    x = self._trunk(text[-1:], None, past)
                logits = self._head(x[-1:])[0]
            text.append(self.pick(logits, text, settings, seed, stream))
            yield text[-1]

    def pick(self, logits: np.ndarray, text: Sequence[int], sampling: Sampling, seed: int, stream: int) -> int:
        """The token after `text`, from its logits (V,).

        Ids that the tokenizer does not know are left out, then the penalty, the temperature and the filters act. The
        first of the largest wins; with a temperature, after Gumbel noise of (seed, stream, position, id) was added.
        Raises ValueError where the logits are not finite.
        """
        c = self.constants
        x = logits[: c.known]
        if not np.isfinite(x).all():
            raise ValueError("the model's logits are not finite: its weights are damaged or training diverged")
        penalty = F32(sampling.repetition_penalty)
        if penalty != 1:
            seen = sorted({i for i in text if i < c.known} - {c.begin, *c.ends})
            punished = np.where(x > 0, x / penalty, x * penalty)[seen]
            x = x.copy()
            x[seen] = np.clip(punished, -LARGEST, LARGEST)
        if sampling.temperature == 0:
            return arithmetic.argmax(x)
        with np.errstate(over="ignore"):  # at tiny temperatures -infinity is what it should be
            x = (x - x.max()) * arithmetic.inverse_of(sampling.temperature)
        scores = x + arithmetic.gumbel(seed, stream, len(text), len(x))
        if sampling.top_k or sampling.top_p < 1 or sampling.min_p > 0:
            scores = np.where(arithmetic.kept(x, sampling.top_k, sampling.top_p, sampling.min_p), scores, -INF)
        return arithmetic.argmax(scores)

    def screened(self, features: np.ndarray, temperature: float = 0.0, noise: np.ndarray | None = None) -> Screened:
        """The token that the whole head would pick for one position's features (D,), from few of its rows.

        The high nibbles give every logit up to s * sum of x[k] * (low[k] - 7.5). Over the random dither each low -
        7.5 is a sum of four independent +-4, +-2, +-1, +-0.5, so the rest is sub-Gaussian with variance at most 21.25
        |x|^2, and |rest| <= |x| sqrt(2 * 21.25 * ln(2 V / 1e-9)) for all rows at once but with probability 1e-9. Rows
        whose upper bound reaches the best lower bound are computed exactly. The bounds stay as true after the steps
        that keep order: softcap, the temperature, `noise` added.
        """
        c, name = self.constants, "head.out" if "head.out" in self.matrices else "embed"
        m, tensor = self.matrices[name], self.tensors[name]
        if tensor.kind != Kind.panel_planes:
            raise ValueError(f"{self.path}: {name} is stored as {tensor.kind.name}, which cannot be screened")
        codes, scale = quantize(features[None], m.input)
        x, s = codes[0].astype(np.float64), float(scale[0]) * m.scales[:, 0].astype(np.float64)
        dither = self.tensors[f"{name}.dither"].values[0, : len(x)]
        high = np.floor((m.codes + 128 + dither[:, None]) / 16)
        coarse = 16 * (x @ high) + (7.5 - 128) * x.sum() - (x * dither).sum()
        reach = np.sqrt(x @ x) * math.sqrt(2 * 21.25 * math.log(2 * len(s) / SURE))
        inverse = arithmetic.inverse_of(temperature) if temperature else F32(1)
        noise = np.zeros(len(s), np.float32) if noise is None else noise

        def value(logits: np.ndarray) -> np.ndarray:
            capped = F32(c.softcap) * arithmetic.tanh(logits / F32(c.softcap)) if c.softcap else logits
            return np.where(np.arange(len(s)) < c.known, capped * inverse + noise, -INF)

        low, top = (value((s * (coarse + sign * reach)).astype(np.float32)) for sign in (-1, 1))
        slack = F32(1e-5) * np.abs(top[top > -INF]).max()  # the roundings of all that
        rows = np.flatnonzero(top >= low.max() - slack)
        with np.errstate(all="ignore"):
            exact = np.full(len(s), -INF)
            sums = (x @ m.codes[:, rows]).astype(np.float32)
            logits = np.zeros(len(s), np.float32)
            logits[rows] = sums * (scale[0] * m.scales[rows, 0])
            exact[rows] = value(logits)[rows]
        return Screened(arithmetic.argmax(exact), rows, low, top)

    # ---- the forward pass

    def _trunk(
        self,
        tokens: Sequence[int] | np.ndarray,
        types: Sequence[int] | None,
        past: Past | None = None,
        watch: Watch | None = None,
    ) -> np.ndarray:
        """Tokens to normed features, (T, D)."""
        c = self.constants
        ids, past = np.asarray(tokens), past or Past()
        if ids.ndim != 1 or not len(ids) or ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= c.vocab:
            raise ValueError(f"tokens must be at least one whole number from 0 to {c.vocab - 1}")
        if past.length + len(ids) > c.context:
            raise ValueError(f"{past.length + len(ids)} tokens do not fit a context of {c.context}")
        positions = past.length + np.arange(len(ids))
        x = self.matrices["embed"].rows(ids)
        if c.learned:
            x = x + self.vectors["embed_positions"][positions]
        if c.token_types:
            x = x + self.vectors["embed_types"][np.zeros(len(ids), int) if types is None else np.asarray(types)]
        if c.embed_norm:
            x = self._norm("embed_norm", x)
        block = {"pre": self._pre, "post": self._post, "parallel": self._parallel}[BLOCKS[c.block]]
        for layer in range(c.layers):
            x = block(layer, x, positions, past, watch)
        past.length += len(ids)
        return x if BLOCKS[c.block] == "post" else self._norm("norm", x)

    def _pre(self, layer: int, x: np.ndarray, *rest: Any) -> np.ndarray:
        name, watch = f"blocks.{layer}", rest[-1]
        x = x + self._attention(layer, self._norm(f"{name}.attn_norm", x), *rest)
        return x + self._mlp(layer, self._norm(f"{name}.mlp_norm", x), watch)

    def _post(self, layer: int, x: np.ndarray, *rest: Any) -> np.ndarray:
        name, watch = f"blocks.{layer}", rest[-1]
        x = self._norm(f"{name}.attn_norm", x + self._attention(layer, x, *rest))
        return self._norm(f"{name}.mlp_norm", x + self._mlp(layer, x, watch))

    def _parallel(self, layer: int, x: np.ndarray, *rest: Any) -> np.ndarray:
        name, watch = f"blocks.{layer}", rest[-1]
        y = self._attention(layer, self._norm(f"{name}.attn_norm", x), *rest)
        return (x + y) + self._mlp(layer, self._norm(f"{name}.mlp_norm", x), watch)

    def _norm(self, name: str, x: np.ndarray) -> np.ndarray:
        """An RMSNorm, with a bias a layernorm, and x itself where the file has no such norm."""
        scale, bias = (self.vectors.get(f"{name}.{part}") for part in ("scale", "bias"))
        if scale is None:
            return x
        if bias is None:
            return arithmetic.rmsnorm(x, scale[0], self.constants.norm_eps)
        return arithmetic.layernorm(x, scale[0], bias[0], self.constants.norm_eps)

    def _mlp(self, layer: int, x: np.ndarray, watch: Watch | None) -> np.ndarray:
        name, kind = f"blocks.{layer}.mlp", MLPS[self.constants.mlp]
        if kind in GATED:
            gate = self.matrices[f"{name}.gate"](x, watch)
            hidden = ACTIVATIONS[kind](gate) * self.matrices[f"{name}.up"](x, watch)
        else:
            hidden = ACTIVATIONS[kind](self.matrices[f"{name}.up"](x, watch))
        return self.matrices[f"{name}.down"](hidden, watch)

    def _head(self, x: np.ndarray, watch: Watch | None = None) -> np.ndarray:
        """Features (T, D) to logits (T, V), to scores (1, C) of what is pooled, or as they are."""
        c, kind, m = self.constants, HEADS[self.constants.head], self.matrices
        table = m.get("head.out", m["embed"])
        if kind == "none":
            y = x
        elif kind == "classes":
            x = POOLS[POOLINGS[c.pooling]](x)
            y = table(x if c.bare else arithmetic.tanh(m["head.dense"](x, watch)), watch)
        elif kind == "mlm":
            x = self._norm("head.norm", arithmetic.gelu(m["head.dense"](x, watch)))
            y = table(x, watch) + self.vectors["head.bias"][0]
        else:
            y = table(x, watch)
        return F32(c.softcap) * arithmetic.tanh(y / F32(c.softcap)) if c.softcap else y

    # ---- attention

    def _attention(
        self, layer: int, x: np.ndarray, positions: np.ndarray, past: Past, watch: Watch | None
    ) -> np.ndarray:
        c, name = self.constants, f"blocks.{layer}.attn"
        q, k, v = (self.matrices[f"{name}.{part}"](x, watch).reshape(len(x), -1, c.head_width) for part in "qkv")
        if c.qk_norm:
            q, k = (
                arithmetic.rmsnorm(y, self.vectors[f"{name}.{part}_norm.scale"][0], c.norm_eps)
                for y, part in ((q, "q"), (k, "k"))
            )
        if self.vectors["rotates"][0, layer]:
            q, k = self._rotated(q, positions), self._rotated(k, positions)
        if self.int8_cache:
            held = past.append(layer, *quantize(k), *quantize(v))
            q = quantize(q)
            if watch:
                for what, array in zip(("keys", "key_scales", "values", "value_scales"), held, strict=True):
                    watch(f"{name}.{what}", array)
                for what, array in zip(("queries", "query_scales"), q, strict=True):
                    watch(f"{name}.{what}", array)
        else:
            held, q = past.append(layer, k, v), (q * self.factor,)
        attend = self._attend_int8 if self.int8_cache else self._attend_float
        own = np.arange(c.heads) // (c.heads // c.kv_heads)  # of each query head, its key head
        held = [array[:, own] for array in held]
        out, weights = [], []
        for i in range(0, len(x), QUERIES):
            seen = self._visible(layer, positions[i : i + QUERIES], len(held[0]))
            heads, codes = attend([y[i : i + QUERIES] for y in q], held, seen)
            out.append(heads)
            weights.append(codes)
        if watch and self.int8_cache:
            watch(f"{name}.weights", np.concatenate(weights, axis=1))
        return self.matrices[f"{name}.o"](np.concatenate(out).reshape(len(x), -1), watch)

    def _visible(self, layer: int, queries: np.ndarray, length: int) -> np.ndarray:
        """(T, S) boolean."""
        q, k = queries[:, None], np.arange(length)[None]
        seen = k <= q if KINDS[self.constants.kind] == "decoder" else np.ones((len(q), length), bool)
        window = self.vectors["windows"][0, layer]
        return seen & (np.abs(q - k) < window) if window else seen

    def _attend_float(self, queries: list, held: list, seen: np.ndarray) -> tuple[np.ndarray, None]:
        """(T, H, E) and nothing; lane i of every sum takes the positions i, i + 16, ... in order."""
        (q,), (k, v) = queries, held
        scores = np.zeros((q.shape[1], len(q), len(k)), np.float32)
        for d in range(q.shape[2]):
            scores = fma(q[:, :, d].T[:, :, None], k[:, :, d].T[:, None], scores)
        p = _powers(scores, seen)
        lanes = np.zeros((*p.shape[:2], v.shape[2], LANES), np.float32)
        cut, values = blocks(p), blocks(v.transpose(1, 2, 0))  # (H, T, S/16, 16), (H, E, S/16, 16)
        for b in range(cut.shape[2]):
            lanes = fma(cut[:, :, None, b], values[:, None, :, b], lanes)
        return (across(lanes) * (F32(1) / lanesum(p))[..., None]).transpose(1, 0, 2), None

    def _attend_int8(self, queries: list, held: list, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(T, H, E), and the codes of each query's weights, (H, T, S) int16.

        What a query takes of a value is p * (the value's scale), rounded to 16 bits with a scale of the query's own.
        """
        (q, q_scale), (k, k_scale, v, v_scale) = queries, held
        sums = np.einsum("the,she->hts", q.astype(np.float64), k.astype(np.float64), optimize=True)  # exact
        scores = sums.astype(np.float32) * ((q_scale * self.factor).T[:, :, None] * k_scale.T[:, None])
        p = _powers(scores, seen)
        taken = p * v_scale.T[:, None]
        top = taken.max(-1)
        some = top >= F32(1e-30)
        steps = np.rint(taken * (F32(32767) / np.where(some, top, F32(1)))[..., None])
        codes = np.where(some[..., None], steps, F32(0)).astype(np.int16)
        out = np.zeros((*p.shape[:2], v.shape[2]), np.float32)
        for begin in range(0, p.shape[2], CHUNK):
            part = slice(begin, begin + CHUNK)
            own, values = codes[:, :, part].astype(np.float64), v[part].astype(np.float64)
            out = out + np.einsum("hts,she->hte", own, values, optimize=True).astype(np.float32)
        out = out * ((top / F32(32767)) * (F32(1) / lanesum(p)))[..., None]
        return out.transpose(1, 0, 2), codes

    def _rotated(self, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Rotary positions, half-split: features i and i + rotary / 2 of each head of (T, heads, E) turn together."""
        half = self.constants.rotary // 2
        cos, sin = (table[:, None] for table in self._turns(positions))
        a, b = x[..., :half], x[..., half : 2 * half]
        return np.concatenate([fma(a, cos, -(b * sin)), fma(b, cos, a * sin), x[..., 2 * half :]], axis=-1)

    def _turns(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Cosines and sines (T, rotary / 2), in float64 by the C library, as native code has them, then rounded."""
        c = self.constants
        for position in range(len(self._angles), int(positions.max()) + 1):
            angles = [position * math.pow(c.theta, -2 * i / c.rotary) for i in range(c.rotary // 2)]
            self._angles.append(([math.cos(a) for a in angles], [math.sin(a) for a in angles]))
        cos, sin = zip(*(self._angles[position] for position in positions), strict=True)
        return np.array(cos, np.float32), np.array(sin, np.float32)


def _powers(scores: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """2^(score - the row's largest) where seen, else 0; (H, T, S)."""
    scores = np.where(seen, scores, -INF)
    return np.where(seen, exp2(scores - np.fmax.reduce(scores, axis=-1, keepdims=True)), F32(0))


def start_of(length: int, context: int) -> int:
    """The first token that is read of a text, as `generation.window`: 0 while it fits, then on by half a context."""
    half = max(1, context // 2)
    return max(0, -(-(length - context) // half) * half)
