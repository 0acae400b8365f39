"""Names there and here: one table per architecture, read forwards to import a model and backwards to export it.

A row pairs one tensor of theirs with one or more parameters of ours and a reversible `Turn`; `{i}` stands for
the layer. Reading and writing report all problems together, and before any large array is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from tinylm.config import ConfigError, ModelConfig
from tinylm.model import Transformer, shapes
from tinylm.tokenizer import Tokenizer
from tinylm.weights import assign

SHOWN = 10  # problems spelt out in one message


class FormatError(ValueError):
    """A file that cannot be read, or a model that a format cannot say: the message lists every problem found."""


class Turn(NamedTuple):
    """A reversible change of layout between one array of theirs and `parts` arrays of ours.

    `ours(array, config)` gives a tuple of `parts` arrays, `theirs(arrays, config)` one array; each undoes the other.
    `shape(shapes, config)` is the shape of theirs when ours have `shapes`.
    """

    ours: Callable[[np.ndarray, ModelConfig], tuple[np.ndarray, ...]]
    theirs: Callable[[tuple[np.ndarray, ...], ModelConfig], np.ndarray]
    shape: Callable[[tuple[tuple[int, ...], ...], ModelConfig], tuple[int, ...]]


SAME = Turn(lambda x, c: (x,), lambda xs, c: xs[0], lambda s, c: s[0])
"""Stored as it is."""

TRANSPOSED = Turn(lambda x, c: (x.T,), lambda xs, c: xs[0].T, lambda s, c: s[0][::-1])
"""(outputs, inputs) there, (inputs, outputs) here: every PyTorch linear layer."""


def pairs_to_halves(rows: np.ndarray, heads: int, rotary: int) -> np.ndarray:
    """Reorder the rows (heads * E, ...) of a query or key matrix from interleaved to half-split rotary positions.

    Interleaved (llama2.c, GGUF's llama) turns features 2i and 2i + 1 of a head together, half-split (Hugging
    Face, here) i and i + rotary/2.
    """
    return _reordered(rows, heads, np.concatenate([np.arange(0, rotary, 2), np.arange(1, rotary, 2)]))


def halves_to_pairs(rows: np.ndarray, heads: int, rotary: int) -> np.ndarray:
    """The inverse of `pairs_to_halves`."""
    return _reordered(rows, heads, np.arange(rotary).reshape(2, -1).T.reshape(-1))


def _reordered(rows: np.ndarray, heads: int, order: np.ndarray) -> np.ndarray:
    split = rows.reshape(heads, -1, *rows.shape[1:])
    rest = np.arange(len(order), split.shape[1])
    return split[:, np.concatenate([order, rest])].reshape(rows.shape)


def _interleaved(heads: Callable[[ModelConfig], int]) -> Turn:
    turning = lambda c: (heads(c), c.rotary or c.head_width)  # noqa: E731
    return Turn(
        lambda x, c: (pairs_to_halves(x, *turning(c)).T,),
        lambda xs, c: halves_to_pairs(xs[0].T, *turning(c)),
        lambda s, c: s[0][::-1],
    )


QUERY_PAIRS = _interleaved(lambda c: c.heads)
"""A query matrix, (outputs, inputs), for interleaved rotary positions."""

KEY_PAIRS = _interleaved(lambda c: c.kv_heads)
"""A key matrix, (outputs, inputs), for interleaved rotary positions."""


class Row(NamedTuple):
    """`theirs` is one tensor's name there; `ours` the parameter's name here, or several that it holds together.

    `filled`: where their file lacks the tensor, ours is this value; writing leaves the tensor out when every
    value is it.
    """

    theirs: str
    ours: str | tuple[str, ...]
    turn: Turn = SAME
    filled: float | None = None


def unrolled(rows: Iterable[Row], config: ModelConfig) -> Iterator[Row]:
    """The rows of all layers: `{i}` replaced by each layer's number. Rows without any of our parameters are left out.

    A table therefore lists biases, an untied head and the like once, and holds for models with and without them.
    """
    known = shapes(config)
    for row in rows:
        for i in range(config.layers) if "{i}" in row.theirs else (None,):
            fill = (lambda name: name) if i is None else (lambda name, i=i: name.replace("{i}", str(i)))
            ours = (row.ours,) if isinstance(row.ours, str) else row.ours
            ours = tuple(fill(name) for name in ours)
            present = [name for name in ours if name in known]
            if len(present) == len(ours):
                yield Row(fill(row.theirs), ours, row.turn, row.filled)


def read(
    rows: Iterable[Row],
    config: ModelConfig,
    tensors: Mapping[str, tuple[int, ...]],
    get: Callable[[str], np.ndarray],
    *,
    ignored: Callable[[str], bool] = lambda name: False,
) -> dict[str, np.ndarray]:
    """Our parameters, float32, from their tensors.

    Args:
        rows: the table. config: of the model to fill.
        tensors: shape of each of their tensors, known from the header alone.
        get: fetches one of them, as a NumPy array of any float type.
        ignored: their tensors that hold nothing (buffers, masks).

    Raises:
        FormatError: tensors that are missing, unknown or misshapen, all of them, before any is fetched; values that are
            not finite.
    """
    if config.layers > max(1, len(tensors)):  # a header that lies must not make us build a million blocks
        raise FormatError(f"{config.layers:,} layers are announced, and the file holds {len(tensors):,} tensors")
    wanted, problems = shapes(config), []
    found, used = list(unrolled(rows, config)), set[str]()
    for row in found:
        used.add(row.theirs)
        if row.theirs not in tensors:
            if row.filled is None:
                problems.append(f"{row.theirs} is missing")
            continue
        expected = tuple(row.turn.shape(tuple(tuple(wanted[name].shape) for name in row.ours), config))
        if tuple(tensors[row.theirs]) != expected:
            problems.append(f"{row.theirs} has shape {tuple(tensors[row.theirs])} instead of {expected}")
    problems += [f"{name} is unknown" for name in sorted(tensors) if name not in used and not ignored(name)]
    unfilled = wanted.keys() - {name for row in found for name in row.ours}
    problems += [f"no tensor of theirs holds {name}" for name in sorted(unfilled)]
    complain(problems)
    params: dict[str, np.ndarray] = {}
    for row in found:
        if row.theirs not in tensors:
            params |= {name: np.full(wanted[name].shape, row.filled, np.float32) for name in row.ours}
            continue
        array = np.asarray(get(row.theirs)).astype(np.float32)
        if not np.isfinite(array).all():
            problems.append(f"{row.theirs} holds values that are not finite")
        parts = row.turn.ours(array, config)
        params |= {name: np.ascontiguousarray(part) for name, part in zip(row.ours, parts, strict=True)}
    complain(problems)
    return params


def write(rows: Iterable[Row], config: ModelConfig, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Their tensors, float32, from our parameters (`weights.named`), in the table's order.

    Raises:
        FormatError: parameters of ours that the table has no place for, all of them.
    """
    found = list(unrolled(rows, config))
    placed = {name for row in found for name in row.ours}
    complain([f"{name} has no place in this format" for name in sorted(params.keys() - placed)])
    complain([f"{name} is missing" for name in sorted(placed - params.keys())])
    tensors = {}
    for row in found:
        ours = tuple(np.asarray(params[name], np.float32) for name in row.ours)
        if row.filled is not None and all((x == row.filled).all() for x in ours):
            continue
        tensors[row.theirs] = np.ascontiguousarray(row.turn.theirs(ours, config))
    return tensors


def complain(problems: Sequence[str]) -> None:
    """Raise FormatError with all of them, unless there are none."""
    if problems:
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise FormatError("; ".join(problems[:SHOWN]) + more)


def build(config: ModelConfig, params: Mapping[str, np.ndarray], tokenizer: Tokenizer | None = None) -> Transformer:
    """A model with these parameters; no random weights are computed."""
    model = nnx.eval_shape(lambda: Transformer(config, rngs=0, tokenizer=tokenizer))
    assign(model, {name: jnp.asarray(value) for name, value in params.items()})
    return model


def settings(**fields: Any) -> ModelConfig:
    """A ModelConfig from what a foreign file says. Raises FormatError where it says what no model can be."""
    try:
        return ModelConfig.from_dict(fields)
    except ConfigError as error:
        raise FormatError(f"the file describes no model of this kit: {error}") from error


def require_said(config: ModelConfig, format: str, **allowed: Any) -> None:
    """Refuse to write a model that the format cannot say.

    Args:
        config: the model's. format: its name, for the message.
        allowed: for a setting, the values the format can say: one value, or a set or tuple of them.

    Raises:
        FormatError: every setting that differs, with its value.
    """
    problems = []
    for name, values in allowed.items():
        value = getattr(config, name)
        options = values if isinstance(values, (set, frozenset, tuple, list)) else (values,)
        if value not in options:
            said = " or ".join(map(repr, sorted(options, key=repr)))
            problems.append(f"{name} = {value!r} (it knows {said})")
    if problems:
        raise FormatError(f"{format} cannot say this model: {'; '.join(problems)}")
