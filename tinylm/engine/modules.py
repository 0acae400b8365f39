"""A model's modules as the engine sees them: matrices with what belongs to them, and what it cannot run, by path.

A technique that offers `rounded()` is taken as it was trained: its codes and scales, and its norm. All others are
folded.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tinylm.engine.layout import POOLINGS, problem

if TYPE_CHECKING:
    from tinylm.model import Transformer

MATRICES = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down")
READERS = {"attn_norm": MATRICES[:3], "mlp_norm": MATRICES[4:6]}
"""The matrices that read what a block's norm gives."""


class Codes(NamedTuple):
    """What was trained: weight [r, k] is codes[r, k] * scales[r, k // group], or scales[r, 0] with group 0."""

    codes: np.ndarray
    """(outputs, inputs), whole numbers."""
    scales: np.ndarray
    """(outputs, groups) float32."""
    group: int


class Matrix(NamedTuple):
    """One matrix of a model."""

    weight: np.ndarray
    """(outputs, inputs) float32."""
    bias: np.ndarray | None
    codes: Codes | None = None
    norm: tuple[np.ndarray, np.ndarray | None] | None = None
    """Scale, and bias of a layernorm, of the matrix's own norm of its input."""
    input: float = 0.0
    """Scale of its input, one for all tokens; 0: a scale per token."""


def folded(model: Transformer, path: Path) -> Transformer:
    """A copy of a model without techniques, but for those that `matrices` takes as they are. Raises FormatError."""
    if not model.config.edits:
        return model
    from flax import nnx

    from tinylm.techniques import EditError, Technique, modules, put

    plain, problems = nnx.clone(model), []
    for name, module in list(modules(plain)):
        if isinstance(module, Technique) and not (_is_identity(module) or _offered(module)):
            try:
                put(plain, name, module.fold())
            except EditError as error:
                problems.append(f"{name}: {error}")
    if problems:
        raise problem(f"{path}: {'; '.join(problems)}; tinylm.save into a folder keeps everything")
    plain.config = plain.config.replace(edits=())
    return plain


def strangers(model: Transformer) -> Iterator[str]:
    """Modules that are not the kit's own and no matrix either, with their paths."""
    from flax import nnx

    from tinylm import model as room
    from tinylm import parts

    c = model.config
    norm = parts.NORMS[c.norm]
    head = parts.POOLED[c.pooling] if c.head == "classes" and c.pooling in POOLINGS else room.HEADS[c.head]
    table = {"": room.Transformer, "norm": norm, "embed_norm": norm, "head": head, "head.norm": norm}
    inside = {
        "": room.BLOCKS[c.block],
        "attn": room.Attention,
        "mlp": room.MLPS[c.mlp],
        "attn_norm": norm,
        "mlp_norm": norm,
    }
    inside |= {"attn.q_norm": parts.RMSNorm, "attn.k_norm": parts.RMSNorm}
    for i in range(c.layers):
        table |= {f"blocks.{i}.{name}".rstrip("."): kind for name, kind in inside.items()}
    names = {"embed", "embed_positions", "embed_types", "head.out", "head.dense"}
    names |= {f"blocks.{i}.{name}" for i in range(c.layers) for name in MATRICES}
    foreign: tuple[str, ...] = ()
    for path, module in sorted(nnx.iter_modules(model), key=lambda found: len(found[0])):
        name = ".".join(map(str, path))
        if name == "blocks" or name.startswith(foreign):
            continue
        if name in names:
            expected = parts.Embedding if name.startswith("embed") else parts.Linear
            reason = "" if callable(getattr(module, "weight", None)) else "which offers no weight()"
        else:
            expected, reason = table.get(name), "which the engine does not know"
        if type(module) is not expected:
            foreign = (*foreign, f"{name}.")  # what is inside it is its own affair
            block, _, own = name.rpartition(".")
            if own in READERS and _is_identity(module):
                bare = [reader for reader in _readers(model, block, own) if getattr(reader, "norm", None) is None]
                reason = "and what reads it has no norm of its own" if bare or c.block == "post" else ""
            if reason:
                yield f"{name or 'the model'} is a {type(module).__name__}, {reason}"


def _readers(model: Transformer, block: str, norm: str) -> list[Any]:
    own = model.blocks[int(block.rpartition(".")[2])]
    return [module for name in READERS[norm] if (module := _at(own, name)) is not None]


def _at(block: Any, name: str) -> Any:
    """The module of a block, such as "attn.q"; None where it has none."""
    part, _, own = name.partition(".")
    return getattr(getattr(block, part), own, None)


def _is_identity(module: Any) -> bool:
    """Is it the technique that takes a norm away?"""
    from tinylm.techniques import Technique, find

    return isinstance(module, Technique) and isinstance(module, find("identity"))


def _offered(module: Any) -> Any:
    """A technique's codes and scales, or None."""
    from tinylm.techniques import EditError

    try:
        return module.rounded() if hasattr(module, "rounded") else None
    except EditError:  # a table of values has no scale
        return None


# --- matrices ---------------------------------------------------------------------------------------------------------


def matrices(model: Transformer, as_int8: bool, problems: list[str]) -> Iterator[tuple[str, Matrix]]:
    """Every matrix by its name in the file.

    as_int8: take also those that were trained with inputs rounded otherwise than the engine rounds them, to int8.
    problems: gets a line for each module that is not what it says.
    """
    yield "embed", Matrix(np.asarray(model.embed.weight(), np.float32), None, _codes(_offered(model.embed)))
    eps = model.config.norm_eps
    for i, block in enumerate(model.blocks):
        for name in MATRICES:
            if (module := _at(block, name)) is not None:
                full = f"blocks.{i}.{name}"
                yield full, _matrix(full, module, eps, as_int8, problems)
    for own in ("dense", "out"):
        if (module := getattr(model.head, own, None)) is not None:
            full = f"head.{own}"
            matrix = _matrix(full, module, eps, as_int8, problems)
            if matrix.norm is not None or matrix.input:
                problems.append(f"{full} has a norm or an input scale of its own, as only matrices of blocks may")
            yield full, matrix


def _matrix(name: str, module: Any, eps: float, as_int8: bool, problems: list[str]) -> Matrix:
    """A module of another class than the kit's must do what it says."""
    import jax.numpy as jnp

    from tinylm.parts import Linear

    weight, bias = np.asarray(module.weight(), np.float32), getattr(module, "bias", None)
    bias = None if bias is None else np.asarray(bias[...], np.float32)
    kind, offered, norm, step = type(module).__name__, _offered(module), None, 0.0
    if type(module) is not Linear:
        said = x = np.random.default_rng(0).standard_normal((4, len(weight))).astype(np.float32)
        what = "x @ weight() + bias"
        if offered is not None:
            norm, odd = _norm(getattr(module, "norm", None), eps)
            if odd:
                problems.append(f"{name} has a norm inside {odd}")
            said, step, inputs = _rounded_inputs(module, said)
            if inputs and not as_int8:
                problems.append(
                    f"{name} was trained with inputs rounded as {inputs!r}, and the engine rounds them to int8 codes"
                    ' of 127 steps to each side: take that with activations="int8"'
                )
            weight = np.asarray(offered.dense(), np.float32)
            what = "what its codes and scales give (a ramp that is not finished, or a bias that is scaled)"
        found, said = np.asarray(module(jnp.asarray(x))), said @ weight + (0 if bias is None else bias)
        if not np.abs(found - said).max() <= 1e-4 * np.abs(said).max():
            problems.append(f"{name} is a {kind}, whose output is not {what}")
    return Matrix(weight.T, bias, _codes(offered), norm, step)


def _codes(offered: Any) -> Codes | None:
    """A technique's codes, outputs first; None where it offers none, or none that a scale alone turns into weights."""
    if offered is None or offered.zero is not None:
        return None
    codes, scales = np.asarray(offered.codes).T, np.asarray(offered.scale, np.float32).T
    return Codes(codes, np.ascontiguousarray(np.broadcast_to(scales, (len(codes), scales.shape[1]))), offered.group)


def _norm(module: Any, eps: float) -> tuple[tuple[np.ndarray, np.ndarray | None] | None, str]:
    """Scale and bias of a matrix's own norm, and what is wrong with it."""
    from tinylm.parts import LayerNorm, RMSNorm
    from tinylm.techniques.rounding import CenteredNorm

    if module is None:
        return None, ""
    if type(module) not in (RMSNorm, LayerNorm, CenteredNorm):
        return None, f"of a kind that the engine does not know: {type(module).__name__}"
    odd = "" if module.eps == eps else f"whose norm_eps = {module.eps:g}: it must be the model's own, {eps:g}"
    if type(module) is CenteredNorm:
        return (np.ones(1, np.float32), np.zeros(1, np.float32)), odd
    bias = np.asarray(module.bias[...], np.float32) if type(module) is LayerNorm else None
    return (np.asarray(module.scale[...], np.float32), bias), odd


def _rounded_inputs(module: Any, x: np.ndarray) -> tuple[np.ndarray, float, str]:
    """What a technique makes of its inputs, their static scale or 0, and how they are rounded if not as here."""
    import jax.numpy as jnp

    from tinylm.techniques.rounding import rounded_inputs

    y = jnp.asarray(x)
    y = y if getattr(module, "norm", None) is None else module.norm(y)
    if static := getattr(module, "static", ""):
        step, offset = np.asarray(module.step[...]), 0 if module.offset is None else np.asarray(module.offset[...])
        low, high = (-127, 127) if static == "symmetric" else (0, 255)
        rounded = (np.clip(np.rint(np.asarray(y) / step) + offset, low, high) - offset) * step
        return rounded, float(step[0]) if static == "symmetric" else 0.0, "" if static == "symmetric" else static
    rounded, _ = rounded_inputs(y, module.inputs)
    return np.asarray(rounded), 0.0, "" if module.inputs in ("none", "int8") else module.inputs
