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
    """Path -> plain matrix of a model and its spec: the last that matches. Raises QuantizationError for an idle one."""
    able = {path: m for path, m in modules(model) if isinstance(m, Linear | Embedding)}
    found: dict[str, tuple[Any, Spec]] = {}
    for spec in specs:
        matched = [path for path in able if re.fullmatch(spec.where, path)]
        if not matched:
            raise QuantizationError(f"no matrix matches {spec.where!r}{suggest(spec.where.replace(chr(92), ''), able)}")
        found |= {path: (able[path], spec) for path in matched}
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
        function = splitting.split_table if spec.method == "split" else splitting.kmeans_table
        table, codes = function(w, int(spec.bits))
        made = Quantized(
            bare(module), rngs=nnx.Rngs(0), low=0, levels=len(table), per="table", **_inputs_settings(spec)
        )
        made.put(codes, table=table)
    else:
        low, high, zero = spec.low, spec.low + spec.levels - 1, None
        cells = rows(w, spec.per)
        settings = {"kind": spec.range, "percentile": spec.percentile, "half": spec.half}
        if spec.affine:
            scale, zero = affine(cells, spec.levels, **settings)
        else:
            scale = scales(cells, low, high, **settings)
        per_cell = [of_cells(x, spec.per, w.shape) for x in ((scale,) if zero is None else (scale, zero))]
        wide = [spread(x, spec.per, len(w)) for x in per_cell]
        given = (w, wide[0], wide[1] if zero is not None else 0.0, low, high)
        if spec.method == "gptq":
            codes = adaptive.gptq(*given, seen.hessian)  # type: ignore[union-attr]
        elif spec.method == "adaround":
            codes = adaptive.adaround(*given, seen.rows)  # type: ignore[union-attr]
        else:
            codes = adaptive.nearest(*given)
        made = Quantized(
            bare(module), rngs=nnx.Rngs(0), low=low, levels=spec.levels, per=spec.per, affine=spec.affine,
            half=spec.half, **_inputs_settings(spec),
        )  # fmt: skip
        made.put(codes, *per_cell)
    if spec.static:
        step, zero = static_of(seen.rows, spec)  # type: ignore[union-attr]
        made.step.set_value(jnp.full(1, step, jnp.float32))
        if made.offset is not None:
            made.offset.set_value(jnp.full(1, zero, jnp.float32))
    return made


def _inputs_settings(spec: Spec) -> dict[str, Any]:
    return {"activations": spec.activations, "static": spec.static}


def static_of(x: np.ndarray, spec: Spec) -> tuple[float, float]:
    """The step, and the zero, of int8 inputs."""
    cells = x.reshape(1, -1).astype(np.float64)
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
    made = rounded(module, spec.replace(method="nearest") if not spec.by_table else spec)
    w = matrix_of(module)
    off = np.asarray(made.matrix(), np.float64) - w
    return Measured(stored_bytes(made), w.size, float(np.sum(off * off)))


def stored_bytes(made: Quantized) -> int:
    """Bytes of the codes and of everything that goes with them, the bias and a norm aside."""
    extra = (made.scale, made.zero, made.table, made.step, made.offset)
    return size(made.levels, made.shape[0] * made.shape[1]) + sum(x[...].nbytes for x in extra if x is not None)
