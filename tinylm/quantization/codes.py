"""One matrix to its codes, by a spec; and which matrices of a model a spec means."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from tinylm.config import suggest
from tinylm.parts import Embedding, Linear
from tinylm.quantization import adaptive, splitting
from tinylm.quantization.calibration import Inputs
from tinylm.quantization.ranges import affine, of_cells, rows, scales, spread
from tinylm.quantization.spec import QuantizationError, Spec
from tinylm.techniques import modules
from tinylm.techniques.packing import size
from tinylm.techniques.quantized import Quantized


class Measured(NamedTuple):
    """What rounding a matrix would come to: bytes of codes and scales, weights, summed squared error."""

    bytes: int
    weights: int
    squared: float


def matrix_of(module: Any) -> np.ndarray:
    """(inputs, outputs) float32; an embedding has its ids as outputs."""
    w = np.asarray(module.weight(), np.float32)
    return w.T if isinstance(module, Embedding) else w


def chosen_by(model: Any, specs: Sequence[Spec]) -> dict[str, tuple[Any, Spec]]:
    """Path -> plain matrix of a model and its spec: the last that matches.

    Raises QuantizationError for a spec that matches nothing, and for weights that are not finite.
    """
    able = {path: m for path, m in modules(model) if isinstance(m, Linear | Embedding)}
    found: dict[str, tuple[Any, Spec]] = {}
    for spec in specs:
        matched = [path for path in able if re.fullmatch(spec.where, path)]
        if not matched:
            raise QuantizationError(f"no matrix matches {spec.where!r}{suggest(spec.where.replace(chr(92), ''), able)}")
        found |= {path: (able[path], spec) for path in matched}
    if bad := [path for path, (module, _) in found.items() if not np.isfinite(matrix_of(module)).all()]:
        raise QuantizationError(f"weights that are not finite: {', '.join(bad)}; load a sound checkpoint")
    return {path: found[path] for path in able if path in found}  # in the model's order


def rounded(module: Any, spec: Spec, seen: Inputs | None = None) -> Quantized:
    """A matrix as a spec wants it, as a module that stands in its place.

    Raises QuantizationError when a method needs inputs and there are none.
    """
    w = matrix_of(module)
    needs = spec.method in ("adaround", "gptq") or spec.static
    if needs and seen is None:
        raise QuantizationError(f"method = {spec.method!r} needs what a matrix reads, and an embedding reads ids")
    if spec.by_table:
        table, codes = tabled(w, spec)
        made = Quantized(
            bare(module), rngs=nnx.Rngs(0), low=0, levels=len(table), per="table", **_inputs_settings(spec)
        )
        made.put(codes, table=table)
    else:
        per_cell, scale, middle, low, high = gridded(w, spec)
        given = (w, scale, middle, low, high)
        if spec.method == "gptq":
            codes = adaptive.gptq(*given, seen.hessian)  # type: ignore[union-attr]
        elif spec.method == "adaround":
            codes = adaptive.adaround(*given, seen.rows)  # type: ignore[union-attr]
        else:
            codes = adaptive.nearest(*given)
        made = Quantized(
            bare(module), rngs=nnx.Rngs(0), low=spec.low, levels=spec.levels, per=spec.per, affine=spec.affine,
            half=spec.half, **_inputs_settings(spec),
        )  # fmt: skip
        made.put(codes, *per_cell)
    if made.step is not None:
        step, zero = static_of(seen, spec)  # type: ignore[arg-type]
        made.step.set_value(jnp.full(1, step, jnp.float32))
        if made.offset is not None:
            made.offset.set_value(jnp.full(1, zero, jnp.float32))
    return made


def gridded(w: np.ndarray, spec: Spec) -> tuple[list[np.ndarray], np.ndarray, np.ndarray | float, int, int]:
    """Scales (and zeros) cell by cell, then `scale, zero, low, high` as `adaptive.nearest` takes them."""
    low, high, cells = spec.low, spec.low + spec.levels - 1, rows(w, spec.per)
    settings = {"kind": spec.range, "percentile": spec.percentile, "half": spec.half}
    found = affine(cells, spec.levels, **settings) if spec.affine else (scales(cells, low, high, **settings),)
    per_cell = [of_cells(x, spec.per, w.shape) for x in found]
    scale = spread(per_cell[0], spec.per, len(w))
    zero = spread(per_cell[1], spec.per, len(w)) if spec.affine else 0.0
    return per_cell, scale, zero, low, high


def tabled(w: np.ndarray, spec: Spec) -> tuple[np.ndarray, np.ndarray]:
    """Values and codes."""
    return (splitting.split_table if spec.method == "split" else splitting.kmeans_table)(w, int(spec.bits))


def approximated(w: np.ndarray, spec: Spec) -> np.ndarray:
    """The matrix as it is when every weight goes to the nearest value that a spec has for it."""
    if spec.by_table:
        table, codes = tabled(w, spec)
        return table[codes]
    _, scale, zero, low, high = gridded(w, spec)
    return (adaptive.nearest(w, scale, zero, low, high) - zero) * scale


def _inputs_settings(spec: Spec) -> dict[str, Any]:
    return {"activations": spec.activations, "static": spec.static}


def static_of(seen: Inputs, spec: Spec) -> tuple[float, float]:
    """The step, and the zero, of int8 inputs."""
    ends = np.array([seen.low.min(), seen.high.max()])  # of all that was read, of which the rows are a part
    cells = (ends if spec.static_range == "max" else seen.rows).reshape(1, -1).astype(np.float64)
    settings = {"kind": spec.static_range, "percentile": spec.percentile}
    if spec.static == "affine":
        step, zero = affine(cells, 256, **settings)
        return float(step[0]), float(zero[0])
    return float(scales(cells, -127, 127, **settings)[0]), 0.0


def bare(module: Any) -> nnx.Module:
    """A plain copy: `Quantized` takes its bias from it, and forgets the matrix."""
    return nnx.clone(module)


def measured(module: Any, spec: Spec) -> Measured:
    """What rounding to nearest would come to, without making anything of it."""
    made = rounded(module, spec.replace(method=spec.method if spec.by_table else "nearest", static=""))
    w = matrix_of(module)
    off = np.asarray(made.matrix(), np.float64) - w
    static = {"": 0, "symmetric": 4, "affine": 8}[spec.static]
    return Measured(stored_bytes(made) + static, w.size, float(np.sum(off * off)))


def stored_bytes(made: Quantized) -> int:
    """Bytes of the codes and of everything that goes with them, the bias and a norm aside."""
    extra = (made.scale, made.zero, made.table, made.step, made.offset)
    return size(made.levels, made.shape[0] * made.shape[1]) + sum(x[...].nbytes for x in extra if x is not None)
