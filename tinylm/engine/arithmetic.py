"""The engine's arithmetic in NumPy: every sum, product and function in the order that fixes its bits.

All floats are float32 unless a line says otherwise; arrays have any shape, and work along the last axis. Native code
computes the same bits with every instruction set, which is why sums go through 16 lanes and products through `fma`.
"""

from __future__ import annotations

import numpy as np

LANES = 16
LOG2E = np.float32(1.44269504)
F32 = np.float32
INF, LARGEST = np.float32(np.inf), np.finfo(np.float32).max
LEAST = np.float32(-31)  # log2 of the least share of the largest probability that counts in filters

Numbers = np.ndarray | np.floating


def fma(a: Numbers, b: Numbers, c: Numbers) -> np.ndarray:
    """a * b + c, rounded once (but for results below 2^-126, where float64 could round before).

    The product of two floats is exact in float64. The sum with c is rounded there, and again to float32: wrong where
    the first rounding hit the middle between two floats. There it is rounded to odd instead (Boldo and Melquiond
    2008).
    """
    p, c = np.multiply(a, b, dtype=np.float64), np.asarray(c, np.float64)
    s = p + c
    middle = (s.view(np.int64) & 0x1FFFFFFF) == 0x10000000
    if middle.any():
        back = s - p
        lost = (p - (s - back)) + (c - back)  # exact: Knuth's two-sum
        bits = s.view(np.int64) + np.where((lost > 0) == (s > 0), 1, -1)
        s = np.where(middle & (lost != 0) & np.isfinite(s), bits.view(np.float64), s)
    return s.astype(np.float32)


def largest(a: float | np.ndarray, b: np.ndarray) -> np.ndarray:
    """`a` where it is above `b`, else `b`, also where that is not a number."""
    return np.where(a > b, F32(a), b)


def blocks(x: np.ndarray) -> np.ndarray:
    """(..., n) -> (..., ceil(n / 16), 16), filled up with zeros."""
    pad = [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % LANES)]
    return np.pad(x, pad).reshape(*x.shape[:-1], -1, LANES)


def across(lanes: np.ndarray) -> np.ndarray:
    """(..., 16) -> (...): the sum of the lanes, halves onto halves."""
    for half in (8, 4, 2, 1):
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes[..., 0]


def lanesum(x: np.ndarray) -> np.ndarray:
    """(..., n) -> (...): lane i sums x[i], x[i + 16], ... in this order, then the lanes are summed."""
    cut = blocks(x)
    lanes = np.zeros((*x.shape[:-1], LANES), np.float32)
    for i in range(cut.shape[-2]):
        lanes = lanes + cut[..., i, :]
    return across(lanes)


def squaresum(x: np.ndarray) -> np.ndarray:
    """`lanesum` of the squares, each added by `fma`."""
    cut = blocks(x)
    lanes = np.zeros((*x.shape[:-1], LANES), np.float32)
    for i in range(cut.shape[-2]):
        lanes = fma(cut[..., i, :], cut[..., i, :], lanes)
    return across(lanes)


def quantize(x: np.ndarray, fixed: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """(..., n) float32 -> codes (..., n) int8 and scales (...): x is about codes * scale, codes are -127 .. 127.

    The scale is the largest magnitude over 127, or `fixed`. Where a value is not finite the scale is NaN and the codes
    are 0; where all are below 1e-30 both are 0.
    """
    peak = np.abs(x).max(-1)
    finite = peak < INF
    if fixed:
        scale = np.broadcast_to(F32(fixed), peak.shape)
        steps = np.clip(np.rint(x * (F32(1) / F32(fixed))), -127, 127)
        used = finite
    else:
        used = finite & (peak >= F32(1e-30))
        peak = np.where(used, peak, F32(1))
        scale = np.where(used, peak / F32(127), F32(0))
        steps = np.rint(x * (F32(127) / peak)[..., None])
    codes = np.where(used[..., None], steps, F32(0)).astype(np.int8)
    return codes, np.where(finite, scale, F32(np.nan))


def rmsnorm(x: np.ndarray, scale: np.ndarray, eps: float) -> np.ndarray:
    """x over its root mean square, times `scale`."""
    r = F32(1) / np.sqrt(squaresum(x) / F32(x.shape[-1]) + F32(eps))
    return (x * r[..., None]) * scale


def layernorm(x: np.ndarray, scale: np.ndarray, bias: np.ndarray, eps: float) -> np.ndarray:
    """x minus its mean, over its standard deviation, times `scale` plus `bias`."""
    z = x - (lanesum(x) / F32(x.shape[-1]))[..., None]
    r = F32(1) / np.sqrt(squaresum(z) / F32(x.shape[-1]) + F32(eps))
    return fma(z * r[..., None], scale, bias)


# --- functions of one number ------------------------------------------------------------------------------------------

EXP2 = np.array([0.00132647273, 0.00967151299, 0.0555073358, 0.240222424, 0.693147004, 1.0], np.float32)
"""2^f for |f| <= 1/2, highest power first; minimax, relative error 1.7e-7."""
ERF = np.array([1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592], np.float32)
"""Abramowitz and Stegun 7.1.26; absolute error 1.5e-7."""


def polynomial(coefficients: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Horner's rule, highest power first."""
    y = np.full_like(x, coefficients[0])
    for c in coefficients[1:]:
        y = fma(y, x, c)
    return y


def exp2(x: np.ndarray) -> np.ndarray:
    """2^x, with x held within -126 .. 126."""
    x = largest(-126, x)
    x = np.where(x > 126, F32(126), x)
    n = np.rint(x)
    return np.ldexp(polynomial(EXP2, x - n), np.nan_to_num(n).astype(np.int32))


def exp(x: np.ndarray) -> np.ndarray:
    """e^x."""
    return exp2(x * LOG2E)


def tanh(x: np.ndarray) -> np.ndarray:
    """The hyperbolic tangent."""
    return F32(1) - F32(2) / (F32(1) + exp(F32(2) * x))


def erf(x: np.ndarray) -> np.ndarray:
    """The error function."""
    a = np.abs(x)
    t = F32(1) / fma(F32(0.3275911), a, F32(1))
    return np.copysign(F32(1) - (polynomial(ERF, t) * t) * exp(-(a * a)), x)


def silu(x: np.ndarray) -> np.ndarray:
    """x * sigmoid(x)."""
    return x / (F32(1) + exp(-x))


def relu(x: np.ndarray) -> np.ndarray:
    """max(0, x)."""
    return largest(0, x)


def relu2(x: np.ndarray) -> np.ndarray:
    """max(0, x)^2."""
    return relu(x) * relu(x)


def gelu(x: np.ndarray) -> np.ndarray:
    """x times the share of a normal distribution below x."""
    return (F32(0.5) * x) * (F32(1) + erf(x * F32(0.70710678)))


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    """GPT-2's approximation of `gelu`."""
    inner = F32(0.79788456) * fma(F32(0.044715) * x, x * x, x)
    return (F32(0.5) * x) * (F32(1) + tanh(inner))


ACTIVATIONS = {"swiglu": silu, "geglu": gelu, "reglu": relu, "gelu": gelu, "gelu_tanh": gelu_tanh, "relu2": relu2}
"""ModelConfig.mlp -> its function; what is gated multiplies by the other matrix's output."""

# --- noise ------------------------------------------------------------------------------------------------------------

CEPHES = [7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1]
LOG = np.array([*CEPHES, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1, -0.5], np.float32)
"""Of (ln(1 + f) - f) / f^2, highest power first: Cephes' logf."""
SQRT_HALF = 0x3F3504F3  # the bits of sqrt(1/2)
M64 = 2**64 - 1


def mix64(z: int) -> int:
    """The finaliser of splitmix64."""
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & M64
    z = (z ^ z >> 27) * 0x94D049BB133111EB & M64
    return z ^ z >> 31


def mix32(x: np.ndarray) -> np.ndarray:
    """A bijection of uint32 (lowbias32, Ellis 2018)."""
    x = (x ^ x >> 16) * np.uint32(0x7FEB352D)
    x = (x ^ x >> 15) * np.uint32(0x846CA68B)
    return x ^ x >> 16


def log(f: np.ndarray, exponent: np.ndarray) -> np.ndarray:
    """ln of (1 + f) * 2^exponent, 1 + f in sqrt(1/2) .. sqrt(2)."""
    return fma(exponent.astype(np.float32), F32(0.69314718056), fma(polynomial(LOG, f), f * f, f))


def split(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x > 0 as (f, exponent) for `log`."""
    bits = x.view(np.int32)
    exponent = (bits - SQRT_HALF) >> 23
    return (bits - (exponent << 23)).view(np.float32) - F32(1), exponent


def gumbel(seed: int, stream: int, position: int, count: int) -> np.ndarray:
    """Gumbel noise of tokens 0 .. count - 1, (count,) float32: a function of the four numbers (`gumbel.h`).

    argmax(x + noise) is a sample of softmax(x); `stream` numbers the text in its batch, `position` the token in the
    text.
    """
    golden = 0x9E3779B97F4A7C15
    key = mix64(seed + golden & M64)
    for number in (stream, position):
        key = mix64((key ^ number) + golden & M64)
    bits = mix32(mix32(np.arange(count, dtype=np.uint32) ^ np.uint32(key & 0xFFFFFFFF)) + np.uint32(key >> 32))
    uniform = (bits >> 1).astype(np.int32).astype(np.float32) * F32(2**-31) + F32(2**-32)
    w = np.minimum(uniform, F32(1 - 2**-24))
    f, exponent = split(F32(1) - w)
    waiting = -log(np.where(exponent == 0, -w, f), exponent)  # -ln(1 - w); 1 - w has lost w's low bits
    return -log(*split(waiting))


# --- sampling ---------------------------------------------------------------------------------------------------------


def argmax(x: np.ndarray) -> int:
    """The first index of the largest value; 0 where none is a number."""
    return int(np.argmax(np.where(np.isnan(x), -INF, x)))


def inverse_of(temperature: float) -> np.float32:
    """1 / temperature, finite."""
    with np.errstate(over="ignore", divide="ignore"):
        return np.minimum(F32(1) / F32(temperature), LARGEST)


def weights(x: np.ndarray) -> np.ndarray:
    """e^x for x <= 0 in units of 2^-30, int64: whole numbers, whose sums are exact in any order; 0 below 2^-31.

    Products and sums are rounded apart here, not by `fma`, which costs much where the processor has none.
    """
    t = x * LOG2E
    n = np.rint(t)
    p = np.full_like(t, EXP2[0])
    for c in EXP2[1:]:
        p = p * (t - n) + c
    power = np.ldexp(p, np.maximum(n, -40).astype(np.int32) + 30)
    return np.where(t >= LEAST, power, F32(0)).astype(np.int64)


def kept(x: np.ndarray, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """Which tokens the filters allow, (V,) boolean; `x` are logits over the temperature, their largest 0.

    As `generation.filtered`: tokens rank by value, then by id; probabilities are those among the `top_k`; a token stays
    while all that rank higher have less than `top_p` together, and where it has `min_p` of the first one's probability.
    """
    order = np.argsort(-x, kind="stable")
    order = order[:top_k] if top_k else order[x[order] * LOG2E >= LEAST]
    if F32(top_p) < 1 or min_p > 0:
        weight = weights(x[order])
        before = np.cumsum(weight) - weight
        enough = np.float64(F32(top_p)) * weight.sum() if F32(top_p) < 1 else np.inf
        order = order[(before < enough) & (weight >= np.float64(F32(min_p)) * 2**30)]
    allowed = np.zeros(len(x), bool)
    allowed[order] = True
    return allowed
