r"""Models in few bits, after training or from training that knew of it; and what watching such a training needs.

    model, report = quantize(model, "int4", text="held_out.txt")
    model, report = quantize(model, [Spec(bits=4, per=64, method="gptq"), Spec(where="embed")], calibration=texts)
    tinylm.save(model, "small")              # codes and scales, in as many bits as the report says

A model trained with "ternary", "int8", "int4", "int2" or "lsq" keeps its own codes: `quantize(model)` stores them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from tinylm.config import Edit
from tinylm.evaluation import evaluate
from tinylm.parts import Embedding
from tinylm.quantization.balance import move_scale
from tinylm.quantization.calibration import Inputs, batches_of, inputs_of
from tinylm.quantization.codes import chosen_by, matrix_of, rounded, stored_bytes
from tinylm.quantization.report import Report, Row
from tinylm.quantization.sensitivity import allocate, alternatives, hutchinson, mixed, traces
from tinylm.quantization.spec import SPECS, QuantizationError, Spec, specs_of
from tinylm.quantization.switching import switch
from tinylm.quantization.watching import Watched, look
from tinylm.techniques import EditError, Technique, find, modules, put
from tinylm.techniques.quantized import Quantized
from tinylm.techniques.rounding import Rounding, root
from tinylm.weights import named

__all__ = [
    "SPECS", "Quantization", "QuantizationError", "Report", "Row", "Spec", "Watched", "allocate", "hutchinson", "look",
    "mixed", "quantize", "switch", "traces", "unpacked",
]  # fmt: skip

SETTINGS = ("low", "levels", "per", "affine", "half", "activations", "static", "norm", "norm_eps")


class Quantization(NamedTuple):
    """What `quantize` gives: a new model, and the report."""

    model: Any
    report: Report


def quantize(
    model: Any,
    spec: str | Spec | Iterable[str | Spec] | None = None,
    *,
    calibration: Any = None,
    text: Any = None,
    **settings: Any,
) -> Quantization:
    """A copy of a model whose matrices are stored as codes and scales; the model itself stays as it is.

    Args:
        model: a `Transformer`. Matrices whose technique has codes of its own keep exactly those, whatever the spec
            says; other techniques that are matrices are folded first.
        spec: "int8", "int4", "int2", "ternary", a `Spec`, or several of these; None: only what has codes of its own.
        calibration: texts, a file of them, or token arrays (rows, length), for methods that look at inputs; and for
            errors of outputs.
        text: what `evaluate` reads: bits per byte before and after.
        settings: of `Spec`, instead of one: `quantize(model, bits=4, method="gptq", calibration=texts)`.

    Raises:
        QuantizationError: nothing to quantize, weights that are not finite, or inputs that a method needs are missing
        or none. ConfigError: an impossible spec. EditError: a technique around a matrix that no plain one can stand
        for. What `evaluate` raises of the text.
    """
    if not isinstance(model, nnx.Module):
        raise QuantizationError(f"model = {str(model)[:60]!r}: give a Transformer; of a trainer its .model")
    if settings and spec is not None:
        raise QuantizationError(f"give a spec, or settings of one ({', '.join(settings)}), not both")
    specs = specs_of(spec) if spec is not None else (Spec.from_dict(settings),) if settings else ()
    new, own, edits = _plain(model)
    chosen = chosen_by(new, specs) if specs else {}
    if not chosen and not own:
        raise QuantizationError('nothing to quantize: this model has no codes of its own; give a spec such as "int8"')
    needs = any(s.needs_data for _, s in chosen.values())
    batches = batches_of(calibration, new) if needs or calibration is not None else []
    if text is not None and not isinstance(text, str | os.PathLike):
        text = list(text)  # read twice
    bits_before = None if text is None else evaluate(model, text).bits_per_byte
    notes, rows, found = [], dict[str, Row](), dict[str, dict[str, Any]]()
    at = lambda path: dict(modules(new))[path]  # noqa: E731
    if any(s.balance != "none" for _, s in chosen.values()):
        seen = inputs_of(new, batches, chosen)
        left = move_scale(new, at, {path: s for path, (_, s) in chosen.items()}, seen)
        notes += [f"{path}: nothing in front of it can take its scale" for path in left]
    for path, (module, how) in own.items():
        put(new, path, module)
        rows[path] = _row(path, how, module, np.asarray(module.matrix()), None)
        found[path] = settings_of(module)
    for stage in _stages(chosen):
        stats = inputs_of(new, batches, stage) if batches else {}  # of the model as it is by now, rounded so far
        for path in stage:
            plain, how = at(path), chosen[path][1]
            made = rounded(plain, how, stats.get(path))
            rows[path] = _row(path, how.method, made, matrix_of(plain), stats.get(path))
            put(new, path, made)
            found[path] = settings_of(made)
    new.config = new.config.replace(edits=(*edits, *_edits(found)))
    kept = sum(row.bytes for row in rows.values())
    total = lambda m: sum(x.nbytes for x in named(m).values())  # noqa: E731
    order = [path for path, _ in modules(new) if path in rows]
    report = Report(
        rows=tuple(rows[path] for path in order), full=total(new) - kept, before=_dense(model), notes=tuple(notes),
        bits_before=bits_before,
        bits_after=None if text is None else evaluate(unpacked(new), text).bits_per_byte,
    )  # fmt: skip
    return Quantization(new, report)


def unpacked(model: Any) -> Any:
    """A copy that computes the same without unpacking codes in every forward pass: plain matrices where they will do.

    Matrices that round their inputs or have norms of their own stay packed. Where none is left, the copy is a plain
    model, which runs in programs that were compiled for another of its shape. It can be saved, as any model.
    """
    new, kept = nnx.clone(model), dict[str, dict]()
    for path, module in list(modules(new)):
        if isinstance(module, Quantized):
            if module.norm is None and module.inputs == "none" and not module.static:
                put(new, path, module.fold())
            else:
                kept[path] = settings_of(module)
    others = [e for e in new.config.edits if e.technique != "quantized"]
    new.config = new.config.replace(edits=(*others, *_edits(kept)))
    return new


def _plain(model: Any) -> tuple[Any, dict[str, tuple[Quantized, str]], list[Edit]]:
    """A copy without matrix techniques; those with codes of their own, as such; and the edits that stay."""
    new, own, problems = nnx.clone(model), {}, []
    for path, module in list(modules(new)):
        if isinstance(module, Rounding):
            try:
                own[path] = (frozen(module), type(module).__name__.lower())
            except EditError as error:
                problems.append(f"{path}: {error}")
        elif isinstance(module, Technique) and hasattr(module, "weight"):
            put(new, path, module.fold())
    if problems:
        raise EditError("; ".join(problems))
    edits = [e for e in model.config.edits if not hasattr(find(e.technique), "weight")]
    return new, own, edits


def frozen(module: Rounding) -> Quantized:
    """A trained matrix as its own codes and scales, norm and rounding of inputs included."""
    if isinstance(module, Quantized):
        return module
    if getattr(module, "authors", False) and module.bias is not None:
        raise EditError('authors=True adds the bias inside the scales, which no file can hold; train with "fixed"')
    codes, plain = module.rounded(), nnx.clone(root(module))
    matrix = codes.dense()
    if not np.isfinite(matrix).all():
        raise EditError("weights that are not finite; load a sound checkpoint")
    where: Any = plain.table if isinstance(plain, Embedding) else plain.kernel
    where.set_value(matrix.T if isinstance(plain, Embedding) else matrix)
    made = Quantized(
        plain, rngs=nnx.Rngs(0), low=module.low, levels=module.high - module.low + 1, per=module.per,
        half=getattr(module, "half", False), activations=module.inputs, **norm_of(module),
    )  # fmt: skip
    made.put(np.asarray(codes.codes), np.asarray(codes.scale))
    if hasattr(module.norm, "scale"):
        made.norm.scale.set_value(module.norm.scale[...])
    return made


def norm_of(module: Rounding) -> dict[str, Any]:
    """The settings that make the norm in a module."""
    if module.norm is None:
        return {}
    return {"norm": "rmsnorm" if hasattr(module.norm, "scale") else "layernorm", "norm_eps": module.norm.eps}


def settings_of(module: Quantized) -> dict[str, Any]:
    """The settings that make a module like this one."""
    return {
        "low": module.low, "levels": module.levels, "per": "table" if module.by_table else module.per,
        "affine": module.affine, "half": module.half, "activations": module.inputs, "static": module.static,
        **norm_of(module),
    }  # fmt: skip


def _edits(found: dict[str, dict[str, Any]]) -> list[Edit]:
    """One edit for all matrices with the same settings."""
    groups: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for path, settings in found.items():
        groups.setdefault(repr(sorted(settings.items())), (settings, []))[1].append(path)
    return [Edit(where=alternatives(p), technique="quantized", settings=s) for s, p in groups.values()]


def _stages(chosen: dict[str, Any]) -> list[list[str]]:
    """The matrices block by block, so that each sees inputs from rounded ones before it."""
    stages: dict[str, list[str]] = {}
    for path in chosen:
        block = re.match(r"blocks\.\d+\.", path)
        stages.setdefault(block[0] if block else "head" if path.startswith("head") else "", []).append(path)
    # The tables come first, as in the forward pass; the head last.
    order = sorted(stages, key=lambda s: (s == "head", s != "", int(s.split(".")[1]) if s.startswith("blocks") else 0))
    return [stages[s] for s in order]


def _row(name: str, how: str, made: Quantized, w: np.ndarray, seen: Inputs | None) -> Row:
    off = np.asarray(made.matrix(), np.float64) - w
    norm = lambda x: float(np.sqrt(np.sum(np.square(x, dtype=np.float64))))  # noqa: E731
    output = None if seen is None else norm(seen.rows @ off) / max(norm(seen.rows @ w), 1e-30)
    histogram = np.bincount(np.asarray(made.codes()).reshape(-1), minlength=made.levels)
    return Row(name, how, made.levels, w.size, stored_bytes(made), norm(off) / max(norm(w), 1e-30), output, histogram)


def _dense(model: Any) -> int:
    """Bytes of the model in float32, every matrix as large as what it stands for, with its bias and norm."""
    total = 0
    inside = {path: m for path, m in modules(model) if isinstance(m, Rounding)}
    for name, value in named(model).items():
        if not any(name.startswith(f"{path}.") for path in inside):
            total += 4 * value.size
    for module in inside.values():
        bias = getattr(module, "bias", None) if not isinstance(root(module), Embedding) else None
        norm = getattr(module.norm, "scale", None)
        total += 4 * (module.weight().size + sum(x[...].size for x in (bias, norm) if x is not None))
    return total
