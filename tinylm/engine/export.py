r"""A model to a `.tlm` file: every matrix rounded as asked, everything else as it is.

    export(model, "story.tlm")                                            int8, the table and head too
    export(model, "story.tlm", bits="ternary", embed="int8")              a model trained ternary, exactly
    export(model, "story.tlm", bits="int4", group=32, only={r".*\.down": "int8"})

Works on every decoder and encoder of the kit. Techniques with codes and scales of their own are written as they were
trained, norms included, and others are folded; other modules that are not the kit's own are refused by path, unless
they offer `.weight()` and are nothing but x @ weight() + bias (`modules`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

import tinylm
from tinylm.config import ModelConfig
from tinylm.engine import encoding, file, modules, rounding
from tinylm.engine.layout import (
    BLOCKS,
    CACHES,
    GATED,
    HEADS,
    KINDS,
    MLPS,
    NORMS,
    POOLINGS,
    Constants,
    Kind,
    Tensor,
    floats,
    ints,
    pieces,
    problem,
    raw,
)  # fmt: skip
from tinylm.store import PathLike

if TYPE_CHECKING:
    from tinylm.model import Transformer

PLANES_FROM = 2048  # ids of a decoder's int8 head from which on screening it pays
SHOWN = 10  # problems spelt out in one message
VECTORS = r"(norm|embed_norm|head\.norm|blocks\.\d+\.(attn_norm|mlp_norm|attn\.[qk]_norm))\.(scale|bias)|head\.bias"


class Row(NamedTuple):
    """One matrix of the file. `error` is |w - rounded| / |w|, over all weights."""

    name: str
    bits: str
    rows: int
    columns: int
    group: int
    bytes: int
    """Codes, scales and padding, as they stand in the file."""
    error: float

    @property
    def bits_per_weight(self) -> float:
        """Of the file, all included."""
        return 8 * self.bytes / (self.rows * self.columns)


class Report(NamedTuple):
    """What an export wrote: `rows` by matrix, `bytes` of the whole file."""

    path: Path
    rows: tuple[Row, ...]
    bytes: int

    @property
    def weights(self) -> int:
        """Weights in matrices."""
        return sum(row.rows * row.columns for row in self.rows)

    @property
    def bits_per_weight(self) -> float:
        """Over all matrices, with scales and padding."""
        return 8 * sum(row.bytes for row in self.rows) / self.weights

    def __repr__(self) -> str:
        """A line per kind of matrix: those of all blocks in one, where they are stored alike."""
        kinds: dict[tuple, list[Row]] = {}
        for row in self.rows:
            kinds.setdefault(
                (re.sub(r"\.\d+\.", ".*.", row.name), row.bits, row.group, row.rows, row.columns), []
            ).append(row)
        lines = [f"{'matrix':<20}{'bits':<10}{'shape':>14}{'kB':>10}{'bits/weight':>13}{'error':>18}"]
        for (name, bits, group, rows, columns), found in kinds.items():
            errors = [row.error for row in found]
            error = f"{min(errors):.2%} .. {max(errors):.2%}" if len(found) > 1 else f"{errors[0]:.2%}"
            what = f"{bits}/{group}" if group else bits
            size = sum(row.bytes for row in found) / 1e3
            lines.append(
                f"{name:<20}{what:<10}{f'{rows}x{columns}':>14}{size:>10,.1f}{found[0].bits_per_weight:>13.2f}{error:>18}"
            )
        total = f"{self.weights:,} weights in {self.bits_per_weight:.2f} bits each; {self.bytes / 1e6:.2f} MB in all"
        return "\n".join([f"{self.path}: {total}", *lines])


def export(
    model: Transformer,
    path: PathLike,
    bits: str = "int8",
    *,
    group: int = 0,
    embed: str | None = None,
    head: str | None = None,
    only: Mapping[str, str] | None = None,
    cache: str = "auto",
    activations: str | None = None,
    calibration: Sequence[np.ndarray] | None = None,
    absmean: bool = False,
) -> Report:
    """Write a model as one file for the engine; an older file of that name is replaced, whole or not at all.

    Args:
        model: any of the kit's.
        bits: of every matrix inside the blocks: "float32", "int8", "int4", "ternary", "ternary2"; see `rounding`.
        group: columns per scale, a multiple of 16; 0: a scale per row, which is faster. Matrices that a technique
            trained keep their codes and scales, whatever `group` and `absmean` say, where the bits can hold them.
        embed: bits of the embedding, and of the tied head; default int8, float32 where `bits` is.
        head: bits of the head's matrices; default as `embed`. A tied head with other bits is stored beside the table.
            An int8 head over 2048 ids and more becomes "planes", which the engine can screen.
        only: pattern -> bits, for matrices whose whole name matches, such as r"blocks\\.0\\..*"; the last match counts.
        cache: keys and values as "float32" or "int8"; "auto": int8 where the heads are wide enough, float32 where every
            matrix is.
        activations: "int8" or "float32", to make sure of them: they are floats exactly where every matrix is float32.
            With "int8" also matrices are taken whose inputs were rounded in some other way while they were trained.
        calibration: token rows; inputs inside the blocks are then rounded with one scale each, the largest seen
        there, not
            one per token. A little faster, and less exact.
        absmean: round what is not ternary to ternary all the same (BitNet b1.58); ruins a model not trained for it.

    Returns:
        What became of every matrix.

    Raises:
        FormatError: all that cannot be exported, with the reasons; nothing is written then. OSError: as `tinylm.save`.
    """
    path, edits = Path(path), [change.to_dict() for change in model.config.edits]
    model = modules.folded(model, path)
    settings = {
        "bits": bits, "group": group, "embed": embed, "head": head, "only": dict(only or {}), "cache": cache,
        "activations": activations, "calibration": calibration is not None, "absmean": absmean,
    }  # fmt: skip
    if cache not in CACHES:
        raise problem(f"cache = {cache!r}: must be one of {', '.join(CACHES)}")
    problems = list(modules.strangers(model))
    _complain(path, problems)
    tensors: dict[str, Tensor] = {}
    rows = []
    matrices = dict(modules.matrices(model, activations == "int8", problems))
    wanted = _bits_of(model.config, matrices, bits, embed, head, only or {}, problems)
    for name, kind in wanted.items():
        matrix = matrices[name] if name in matrices else matrices["embed"]
        try:
            rounded, kind = _rounded(matrix, kind, group, absmean)
        except ValueError as error:
            problems.append(f"{name}: {error}")
            continue
        tensors[name], dither = rounding.pack(rounded)
        if dither is not None:
            tensors[f"{name}.dither"] = dither
        if matrix.bias is not None:
            tensors[f"{name}.bias"] = floats(matrix.bias)
        if matrix.input:
            tensors[f"{name}.input"] = floats(np.array([matrix.input], np.float32))
        for part, vector in zip(("scale", "bias"), matrix.norm or (), strict=False):
            if vector is not None:
                tensors[f"{name}.norm.{part}"] = floats(np.broadcast_to(vector, matrix.weight.shape[1]))
        rows.append(_row(name, kind, matrix.weight, rounded, tensors[name]))
    _complain(path, problems)
    quantized = any(tensor.kind > Kind.panel_float for tensor in tensors.values())
    if activations not in (None, "int8" if quantized else "float32"):
        raise problem(
            f'{path}: activations = {activations!r}: they are float32 if and only if bits = "float32" for all matrices'
        )
    tensors |= {name: floats(value) for name, value in _vectors(model)}
    tensors |= _layers(model.config)
    if calibration is not None:
        if any(matrix.norm is not None for matrix in matrices.values()):
            raise problem(f"{path}: calibration: not for matrices with norms of their own, leave it out")
        tensors = _inputs(model, calibration) | tensors
    tensors |= _texts(model, {"export": settings, "edits": edits})
    exact = cache == "auto" and not quantized
    file.write(path, _constants(model, "float32" if exact else cache, quantized), tensors)
    return Report(path, tuple(rows), path.stat().st_size)


def about(path: PathLike) -> ModelConfig:
    """The settings of the model in a file. Raises as `file.read`, and FormatError where the file does not say them."""
    found = file.read(path)
    try:
        said = json.loads(found.tensors["provenance"].data.tobytes())["model"]
        config = ModelConfig.from_dict(said)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise problem(f"{path} does not say the settings of its model ({error})") from None
    expected = dict(_numbers(config))
    wrong = [name for name, value in expected.items() if getattr(found.constants, name) != value]
    if wrong:
        raise problem(f"{path} says two things of its model: {', '.join(wrong)} differ")
    return config


# --- what a model consists of -----------------------------------------------------------------------------------------


def _vectors(model: Transformer) -> Iterator[tuple[str, np.ndarray]]:
    """Norms, the small embeddings, and the mlm head's bias."""
    from tinylm.weights import named

    for name in ("embed_positions", "embed_types"):
        if getattr(model, name) is not None:
            yield name, np.asarray(getattr(model, name).weight(), np.float32)
    for name, value in named(model).items():
        if re.fullmatch(VECTORS, name):
            yield name, np.asarray(value, np.float32)


def _layers(config: ModelConfig) -> dict[str, Tensor]:
    windows = [config.at("window", i) for i in range(config.layers)]
    rotates = [config.at("positions", i) == "rope" for i in range(config.layers)]
    return {"windows": ints(np.minimum(windows, 2**31 - 1)), "rotates": ints(np.array(rotates))}


def _texts(model: Transformer, told: dict[str, Any]) -> dict[str, Tensor]:
    tokenizer, texts = model.tokenizer, {}
    if tokenizer is not None:
        canonical = json.dumps(
            json.loads(tokenizer.to_json()), sort_keys=True, ensure_ascii=True, separators=(",", ":")
        )
        texts["tokenizer"] = raw(canonical.encode())
        texts["pieces"] = raw(pieces(tokenizer.token_bytes))
        if (found := encoding.merges(tokenizer)) is not None:
            texts["merges"] = raw(found)
    story = {"tinylm": tinylm.__version__, "model": model.config.to_dict(), **told}
    story["tokenizer"] = None if tokenizer is None else tokenizer.sha256
    texts["provenance"] = raw(json.dumps(story, sort_keys=True).encode())
    return texts


def _numbers(config: ModelConfig) -> Iterator[tuple[str, int | float]]:
    """The constants that follow from the settings alone."""
    choices = {"kind": KINDS, "norm": NORMS, "block": BLOCKS, "mlp": MLPS, "head": HEADS}
    for name in Constants._fields:
        if name in choices:
            yield name, choices[name].index(getattr(config, name))
        elif name in ("norm_eps", "theta", "softcap"):
            yield name, float(np.float32(getattr(config, name)))
        elif hasattr(config, name) and name not in ("rotary", "attention_scale", "pooling"):
            yield name, int(getattr(config, name))
    pools = config.head == "classes"
    yield "pooling", POOLINGS.index(config.pooling) if pools else 0
    yield "bare", int(pools and not config.pooler)
    rotates = "rope" in {config.at("positions", i) for i in range(config.layers)}
    yield "rotary", (config.rotary or config.head_width) if rotates else 0
    yield "learned", int(config.at("positions", 0) == "learned")
    yield "attention_scale", float(np.float32(config.attention_scale or config.head_width**-0.5))


def _constants(model: Transformer, cache: str, quantized: bool) -> Constants:
    tokenizer = model.tokenizer
    known = model.config.vocab if tokenizer is None else tokenizer.vocab
    begin = -1 if tokenizer is None or tokenizer.begin is None else tokenizer.begin
    end = None if tokenizer is None else tokenizer.end
    ends = tuple(sorted({i for i in (begin, end) if i not in (None, -1)}))  # a text also ends where the next one begins
    made = {"known": known, "begin": begin, "ends": ends, "tensors": 0, "activations": 8 if quantized else 32}
    return Constants(**dict(_numbers(model.config)), **made, cache=CACHES.index(cache), members=1)


# --- how it is stored -------------------------------------------------------------------------------------------------


def _bits_of(
    config: ModelConfig,
    matrices: Mapping[str, modules.Matrix],
    bits: str,
    embed: str | None,
    head: str | None,
    only: Mapping[str, str],
    problems: list[str],
) -> dict[str, str]:
    """Bits of every matrix of the file, in its order."""
    embed = embed or (bits if bits in ("float32", "int8") else "int8")
    head = head or embed
    names = list(matrices)
    if config.head in ("tied", "mlm") and (head != embed or any(re.fullmatch(p, "head.out") for p in only)):
        names.append("head.out")
    wanted = {name: embed if name == "embed" else head if name.startswith("head.") else bits for name in names}
    for pattern, own in only.items():
        found = [name for name in names if re.fullmatch(pattern, name)]
        if not found:
            problems.append(f"only: {pattern!r} matches no matrix; they are {', '.join(names[:8])} and so on")
        wanted |= dict.fromkeys(found, own)
    top = "head.out" if "head.out" in names else "embed"
    if (
        config.kind == "decoder"
        and config.head in ("tied", "untied")
        and config.vocab >= PLANES_FROM
        and wanted[top] == "int8"
    ):
        wanted[top] = "planes"
    problems += [
        f"{name}: bits = {own!r}: must be one of {', '.join(rounding.BITS)}"
        for name, own in wanted.items()
        if own not in rounding.BITS
    ]
    return {name: own for name, own in wanted.items() if own in rounding.BITS}


def _rounded(matrix: modules.Matrix, bits: str, group: int, absmean: bool) -> tuple[rounding.Rounded, str]:
    """A matrix in these bits, and the bits: what was trained as it is, if they hold it."""
    if matrix.codes is not None:
        for kind in (bits, "int8") if bits == "planes" else (bits,):  # planes hold less than int8
            if (trained := rounding.taken(*matrix.codes, kind)) is not None:
                return trained, kind
    return rounding.quantize(matrix.weight, bits, group=0 if bits == "planes" else group, absmean=absmean), bits


def _row(name: str, bits: str, weight: np.ndarray, rounded: rounding.Rounded, tensor: Tensor) -> Row:
    off = float(np.linalg.norm(weight - rounded.dense())) / max(float(np.linalg.norm(weight)), 1e-30)
    return Row(name, bits, tensor.rows, tensor.columns, rounded.group, len(tensor.data), off)


def _inputs(model: Transformer, calibration: Sequence[np.ndarray]) -> dict[str, Tensor]:
    """A scale per matrix of the blocks: the largest magnitude among its inputs, over 127."""
    import jax
    import jax.numpy as jnp

    from tinylm.shards import check_tokens
    from tinylm.taps import recording
    from tinylm.weights import bind, pure

    graph, params = pure(model)
    post = model.config.block == "post"
    sites = {}
    for i in range(model.config.layers):
        before = "embed" if i == 0 else f"blocks.{i - 1}.resid"
        sites |= {f"blocks.{i}.attn.{name}": before if post else f"blocks.{i}.attn_norm" for name in "qkv"}
        sites[f"blocks.{i}.attn.o"] = f"blocks.{i}.attn.heads"
        sites |= {f"blocks.{i}.mlp.{name}": f"blocks.{i}.mlp_norm" for name in ("gate", "up")}
        sites[f"blocks.{i}.mlp.down"] = f"blocks.{i}.mlp.hidden"
    if model.config.mlp not in GATED:
        sites = {name: site for name, site in sites.items() if not name.endswith(".gate")}

    @jax.jit
    def peaks(params: dict, tokens: Any) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        bind(graph, params)(tokens, tap=recording(seen))
        return {site: jnp.abs(seen[site]).max() for site in set(sites.values())}

    largest = dict.fromkeys(sites.values(), 0.0)
    for number, row in enumerate(calibration):
        check_tokens(np.asarray(row), model.config.vocab, f"calibration row {number}")
        for site, peak in peaks(params, np.atleast_2d(np.asarray(row, np.int32))).items():
            largest[site] = max(largest[site], float(peak))
    if not all(0 < peak < np.inf for peak in largest.values()):
        raise problem("calibration: no tokens, or inputs that are zero or not finite")
    return {f"{name}.input": floats(np.array([largest[site] / 127], np.float32)) for name, site in sites.items()}


def _complain(path: Path, problems: Sequence[str]) -> None:
    """Raise FormatError with all of them, unless there are none."""
    if problems:
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise problem(f"{path}: " + "; ".join(problems[:SHOWN]) + more)
