"""The parts of a training step that native kernels do faster on a CPU, each with its plain JAX twin.

An operation is native where all of this holds while it is traced: the program is for a CPU, the extension is there and
knows this processor, nothing has switched it off, and the arrays are large enough to be worth a call. Everywhere else
the twin runs, and on a GPU nothing of this exists. Results agree to rounding; bits do not depend on the number of
threads.

Derivatives are the operations' own, taken once and backwards. For second derivatives, forward mode (`jax.jvp`,
`jax.hessian`) and looking at a program's parts, switch to the twins:

    with ops.plain():
        jax.hessian(loss)(params)
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int8

from tinylm import native as extension

WORTHWHILE = 2**20  # multiplications: below it a call costs more than it saves
FEWEST = 32  # rows of a product: for fewer, packing the weights costs more than it saves

_plainly = jax.make_user_context(default_value=False)  # part of the key of every compiled function


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """Inside, everything is traced as plain JAX. The environment variable TINYLM_PLAIN=1 does so for good."""
    with _plainly(True):
        yield


def _library() -> ctypes.CDLL | None:
    try:
        return extension.library()
    except extension.NativeMissing:
        return None


@functools.cache
def kernels() -> str:
    """The instruction set of the native kernels in use: "avx512bf16", "avx512", "avx2"; "" when there are none."""
    library = _library()
    if library is None or not hasattr(library, "tlm_training_kernels"):
        return ""
    library.tlm_training_kernels.restype = ctypes.c_char_p
    name = library.tlm_training_kernels().decode()
    for target in TARGETS if name else ():
        handler = jax.ffi.pycapsule(getattr(library, f"tlm_{target}"))
        jax.ffi.register_ffi_target(f"tinylm_{target}", handler, platform="cpu")
    return name


TARGETS = (
    "linear",
    "linear_dx",
    "linear_dw",
    "loss",
    "attention",
    "attention_back",
    "rotate",
    "gate",
    "orthogonalize",
    "int8_product",
)


def native(*arrays: Array) -> bool:
    """Whether operations on these arrays are native here: float32 and bfloat16 on a CPU."""
    if _plainly.value or os.environ.get("TINYLM_PLAIN", "0") not in ("", "0"):
        return False
    here = jax.config.jax_default_device or jax.devices()[0]  # pyright: ignore[reportAttributeAccessIssue]
    if getattr(here, "platform", here) != "cpu" or any(x.dtype not in (jnp.float32, jnp.bfloat16) for x in arrays):
        return False
    return bool(kernels())


def call(target: str, twin: Callable, results: Any, *arrays: Array, **settings: Any) -> Any:
    """A native operation, or its twin when the program turns out to be for another platform."""

    @jax.custom_jvp
    def here(*arrays):
        return jax.ffi.ffi_call(f"tinylm_{target}", results, vmap_method="broadcast_all")(*arrays, **settings)

    @here.defjvp
    def refuse(*_):
        raise NotImplementedError(
            f"{target}: native operations have first derivatives only, backwards; "
            "for others trace inside `with tinylm.ops.plain():`"
        )

    return jax.lax.platform_dependent(*arrays, cpu=here, default=twin)


def shaped(shape: tuple[int, ...], like: Array) -> jax.ShapeDtypeStruct:
    """An array of this shape and of the type of `like`."""
    return jax.ShapeDtypeStruct(shape, like.dtype)


# --- products ---------------------------------------------------------------------------------------------------------


def linear(
    x: Float[Array, "*batch inputs"], *weights: Float[Array, "inputs outputs"]
) -> tuple[Float[Array, "*batch outputs"], ...]:
    """`x @ w` for every weight matrix, in x's precision; several matrices of one input share its packing."""
    rows = x.size // x.shape[-1]
    small = rows < FEWEST or rows * min(w.size for w in weights) < WORTHWHILE
    if small or not native(x, *weights) or not 1 <= len(weights) <= 4:
        return tuple(x @ w.astype(x.dtype) for w in weights)
    y = _linear(x.reshape(rows, x.shape[-1]), weights)
    return tuple(part.reshape(*x.shape[:-1], part.shape[-1]) for part in y)


@jax.custom_vjp
def _linear(x: Array, weights: tuple[Array, ...]) -> tuple[Array, ...]:
    twin = lambda x, *weights: [x @ w.astype(x.dtype) for w in weights]  # noqa: E731
    results = [shaped((x.shape[0], w.shape[1]), x) for w in weights]
    return tuple(call("linear", twin, results, x, *weights))


def _linear_forward(x: Array, weights: tuple[Array, ...]) -> tuple[tuple[Array, ...], tuple]:
    return _linear(x, weights), (x, weights)


def _linear_backward(saved: tuple[Array, tuple[Array, ...]], dy: tuple[Array, ...]) -> tuple[Array, tuple[Array, ...]]:
    x, weights = saved
    n = len(weights)
    back = lambda *a: [sum(d @ w.astype(d.dtype).T for d, w in zip(a[:n], a[n:], strict=True))]  # noqa: E731
    (dx,) = call("linear_dx", back, [shaped(x.shape, x)], *dy, *weights)
    twin = lambda x, *dy: [(x.T @ d).astype(w.dtype) for d, w in zip(dy, weights, strict=True)]  # noqa: E731
    dw = call("linear_dw", twin, [shaped(w.shape, w) for w in weights], x, *dy)
    return dx, tuple(dw)


_linear.defvjp(_linear_forward, _linear_backward)


# --- rotary positions, and SwiGLU ---


def rotate(
    x: Float[Array, "B T H E"], cosine: Float[Array | np.ndarray, "b T R"], sine: Float[Array | np.ndarray, "b T R"]
) -> Float[Array, "B T H E"]:
    """Features i and i + R turned by an angle per position, those from 2 R on left alone; b is 1 or B."""
    tables = jnp.asarray(cosine, jnp.float32), jnp.asarray(sine, jnp.float32)
    if not native(x) or 64 * x.size < WORTHWHILE:
        return _plain_rotate(x, *tables)
    return _rotate(x, *tables)


def _plain_rotate(x: Array, cosine: Array, sine: Array) -> Array:
    half, cosine, sine = cosine.shape[-1], cosine[:, :, None], sine[:, :, None]
    a, b = jnp.split(x[..., : 2 * half].astype(jnp.float32), 2, axis=-1)
    turned = [(a * cosine - b * sine).astype(x.dtype), (b * cosine + a * sine).astype(x.dtype)]
    return jnp.concatenate([*turned, x[..., 2 * half :]], axis=-1)


def _rotate_call(x: Array, cosine: Array, sine: Array, back: bool) -> Array:
    twin = lambda x, cosine, sine: [_plain_rotate(x, cosine, -sine if back else sine)]  # noqa: E731
    return call("rotate", twin, [shaped(x.shape, x)], x, cosine, sine, back=back)[0]


@jax.custom_vjp
def _rotate(x: Array, cosine: Array, sine: Array) -> Array:
    return _rotate_call(x, cosine, sine, back=False)


_rotate.defvjp(
    lambda x, cosine, sine: (_rotate(x, cosine, sine), (cosine, sine)),
    lambda angles, dy: (_rotate_call(dy, *angles, back=True), None, None),
)


def swiglu(gate: Float[Array, "*batch hidden"], up: Float[Array, "*batch hidden"]) -> Float[Array, "*batch hidden"]:
    """silu(gate) * up (Shazeer 2020)."""
    if not native(gate, up) or 64 * gate.size < WORTHWHILE or gate.dtype != up.dtype:
        return jax.nn.silu(gate) * up
    return _swiglu(gate, up)


@jax.custom_vjp
def _swiglu(gate: Array, up: Array) -> Array:
    return call("gate", lambda gate, up: [jax.nn.silu(gate) * up], [shaped(gate.shape, gate)], gate, up)[0]


def _swiglu_back(saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    twin = lambda gate, up, dy: list(jax.vjp(lambda g, u: jax.nn.silu(g) * u, gate, up)[1](dy))  # noqa: E731
    return tuple(call("gate", twin, [shaped(x.shape, x) for x in saved], *saved, dy))


_swiglu.defvjp(lambda gate, up: (_swiglu(gate, up), (gate, up)), _swiglu_back)


# --- Muon's step ---

QUINTIC = 3.4445, -4.7750, 2.0315  # of Jordan et al. 2024: fast towards 1, and no nearer than 0.7 to 1.2
ITERATIONS = 5


def orthogonalize(x: Float[Array, "n rows cols"]) -> Float[Array, "n rows cols"]:
    """Every singular value of every matrix pushed towards 1 by five quintic Newton-Schulz steps (Jordan et al. 2024).

    As there, factors of products are rounded to bfloat16: the result is rough by design.
    Their sums, and everything between the products, are float32.
    """
    tall = x.shape[1] > x.shape[2]
    x = (x.mT if tall else x).astype(jnp.float32)
    if native(x):
        a, b, c = map(np.float32, QUINTIC)
        (x,) = call("orthogonalize", _orthogonalize, [shaped(x.shape, x)], x, a=a, b=b, c=c, steps=ITERATIONS)
    else:
        (x,) = _orthogonalize(x)
    return x.mT if tall else x


def _orthogonalize(x: Array) -> list[Array]:
    def product(a: Array, b: Array) -> Array:
        rounded = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
        return jnp.matmul(*rounded, preferred_element_type=jnp.float32)

    a, b, c = QUINTIC
    x = x / (jnp.linalg.norm(x, axis=(1, 2), keepdims=True) + 1e-8)
    for _ in range(ITERATIONS):
        square = product(x, x.mT)
        x = a * x + product(b * square + c * product(square, square), x)
    return [x]


# --- int8 ---


def int8_product(
    x: Float[Array, "*batch inputs"], codes: Int8[Array, "inputs outputs"], scales: Float[Array, " outputs"]
) -> Float[Array, "*batch outputs"]:
    """`x @ (codes * scales)` with x rounded to int8 row by row, its largest magnitude being 127: the engine's product.

    Sums are exact, results float32. The gradient with respect to x is that of the product without the rounding
    (straight through); codes and scales have none.
    """
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    y = _int8_product(rows, codes, scales.astype(jnp.float32))
    return y.reshape(*x.shape[:-1], codes.shape[1])


def _plain_int8_product(x: Array, codes: Array, scales: Array) -> Array:
    most = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    rounded = jnp.round(x * jnp.where(most > 0, 127.0 / most, 0.0)).astype(jnp.int8)
    sums = jax.lax.dot_general(rounded, codes, (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32)
    return sums.astype(jnp.float32) * (most / 127.0 * scales)


@jax.custom_vjp
def _int8_product(x: Array, codes: Array, scales: Array) -> Array:
    if not native(x):
        return _plain_int8_product(x, codes, scales)
    result = jax.ShapeDtypeStruct((x.shape[0], codes.shape[1]), jnp.float32)
    return call("int8_product", lambda *a: [_plain_int8_product(*a)], [result], x, codes, scales)[0]


_int8_product.defvjp(
    lambda x, codes, scales: (_int8_product(x, codes, scales), (codes, scales)),
    lambda saved, dy: ((dy * saved[1]) @ saved[0].astype(jnp.float32).T, None, None),
)


# --- loss -------------------------------------------------------------------------------------------------------------


def nats(
    x: Float[Array, "N D"],
    table: Float[Array, "rows columns"],
    targets: Int[Array, " N"],
    weights: Float[Array, " N"],
    z_loss: float = 0.0,
    tied: bool = True,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Summed weighted cross-entropy in nats of the logits `x @ table.T`, with the z-loss and without (see `losses`).

    `table` is (V D), or (D V) and not turned when it is not `tied`. Logits exist for a few rows at a time; the gradient
    is taken on the way forward. Only the first sum has one.
    """
    arrays = x, table, targets.astype(jnp.int32), weights.astype(jnp.float32)
    if native(x, table):
        return _nats(z_loss, tied, *arrays)
    total, plain = _plain_nats(z_loss, tied, *arrays)
    return total, plain


def _plain_nats(z_loss: float, tied: bool, x: Array, table: Array, targets: Array, weights: Array) -> Array:
    logits = (x @ (table.T if tied else table).astype(x.dtype)).astype(jnp.float32)
    lse = jax.nn.logsumexp(logits, axis=-1)
    plain = lse - jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return jnp.stack([((plain + z_loss * lse * lse) * weights).sum(), (plain * weights).sum()])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _nats(z_loss: float, tied: bool, x: Array, table: Array, targets: Array, weights: Array) -> tuple[Array, Array]:
    twin = lambda *arrays: [_plain_nats(z_loss, tied, *arrays)]  # noqa: E731
    results = [jax.ShapeDtypeStruct((2,), jnp.float32)]
    (sums,) = call("loss", twin, results, x, table, targets, weights, tied=tied, z_loss=np.float32(z_loss))
    return sums[0], sums[1]


def _nats_forward(z_loss: float, tied: bool, x: Array, table: Array, targets: Array, weights: Array):
    def twin(x, table, targets, weights):
        both = lambda x, table: _plain_nats(z_loss, tied, x, table, targets, weights)  # noqa: E731
        sums, back = jax.vjp(both, x, table)
        dx, dtable = back(jnp.array([1.0, 0.0]))
        return [sums, dx, dtable.astype(jnp.float32)]

    results = [
        jax.ShapeDtypeStruct((2,), jnp.float32),
        shaped(x.shape, x),
        jax.ShapeDtypeStruct(table.shape, jnp.float32),
    ]
    sums, dx, dtable = call("loss", twin, results, x, table, targets, weights, tied=tied, z_loss=np.float32(z_loss))
    return (sums[0], sums[1]), (dx, dtable.astype(table.dtype))


def _nats_backward(z_loss: float, tied: bool, saved: tuple[Array, Array], given: tuple[Array, Array]):
    dx, dtable = saved
    return (dx * given[0]).astype(dx.dtype), (dtable * given[0]).astype(dtable.dtype), None, None


_nats.defvjp(_nats_forward, _nats_backward)


# --- attention --------------------------------------------------------------------------------------------------------


class Sight(NamedTuple):
    """What queries see: earlier positions only or all, `window` positions (0: all); and the factor on the scores."""

    causal: bool
    window: int
    scale: float

    def settings(self) -> dict[str, Any]:
        return {"causal": self.causal, "window": np.int64(self.window), "scale": np.float32(self.scale)}


def attention(
    q: Float[Array, "B T H E"],
    k: Float[Array, "B T K E"],
    v: Float[Array, "B T K E"],
    segments: Int[Array | np.ndarray, "B T"] | None,
    sight: Sight,
) -> Float[Array, "B T H E"]:
    """Softmax attention of sequences to themselves, with grouped queries; scores exist for a few queries at a time."""
    if not native(q, k, v):
        return _plain_attention(sight, q, k, v, segments)
    none = jnp.zeros((q.shape[0], 0), jnp.int32)
    return _attention(sight, q, k, v, none if segments is None else jnp.asarray(segments, jnp.int32))


def _plain_attention(sight: Sight, q: Array, k: Array, v: Array, segments: Any) -> Array:
    b, t, h, e = q.shape
    group = q.reshape(b, t, k.shape[2], -1, e)
    scores = jnp.einsum("btkge,bske->bkgts", group, k, preferred_element_type=jnp.float32) * sight.scale
    far = jnp.arange(t)[:, None] - jnp.arange(t)[None, :]
    seen = (far >= 0) | (not sight.causal)
    seen &= (jnp.abs(far) < sight.window) | (not sight.window)
    if segments is not None and segments.size:
        seen = seen & (segments[:, :, None] == segments[:, None, :])[:, None, None]
    weights = jax.nn.softmax(jnp.where(seen, scores, jnp.finfo(jnp.float32).min), axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bske->btkge", weights, v).reshape(b, t, h, e)


def _attention_call(sight: Sight, q: Array, k: Array, v: Array, segments: Array) -> list[Array]:
    def twin(q, k, v, segments):  # the statistics are for the native gradient alone
        return [_plain_attention(sight, q, k, v, segments), jnp.zeros(statistics.shape)]

    statistics = jax.ShapeDtypeStruct((q.shape[0], q.shape[2], q.shape[1]), jnp.float32)
    return call("attention", twin, [shaped(q.shape, q), statistics], q, k, v, segments, **sight.settings())


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(sight: Sight, q: Array, k: Array, v: Array, segments: Array) -> Array:
    return _attention_call(sight, q, k, v, segments)[0]


def _attention_forward(sight: Sight, q: Array, k: Array, v: Array, segments: Array) -> tuple[Array, tuple]:
    out, statistics = _attention_call(sight, q, k, v, segments)
    return out, (q, k, v, segments, out, statistics)


def _attention_backward(sight: Sight, saved: tuple, dout: Array) -> tuple:
    def twin(q, k, v, segments, out, statistics, dout):
        return list(jax.vjp(lambda q, k, v: _plain_attention(sight, q, k, v, segments), q, k, v)[1](dout))

    results = [shaped(x.shape, x) for x in saved[:3]]
    return (*call("attention_back", twin, results, *saved, dout, **sight.settings()), None)


_attention.defvjp(_attention_forward, _attention_backward)
