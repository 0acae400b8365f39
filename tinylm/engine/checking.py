"""What a `.tlm` file must hold: constants that a model can have, and its tensors, no others, with sound values."""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from tinylm.engine import encoding
from tinylm.engine.layout import (
    BLOCKS,
    CACHES,
    ENDS,
    GATED,
    GROUPED,
    HEADS,
    KINDS,
    MLPS,
    NORMS,
    PANEL,
    POOLINGS,
    Constants,
    Flaw,
    Kind,
    Tensor,
    parts,
    pieces_of,
    tensor_bytes,
    up,
)  # fmt: skip

WIDEST = 65536  # columns of a matrix: 255 * 127 * 65536 < 2^31, so sums of codes are exact in 32 bits
LIMITS = {"vocab": 2**24, "known": 2**24, "context": 2**24, "layers": 2**12, "classes": 2**24, "token_types": 2**20}
LIMITS["head_width"] = 1024


class _Need(NamedTuple):
    """A tensor that a model may have: "matrix", or a kind's name; `needed` where it must have it."""

    sort: str
    rows: int
    columns: int
    needed: bool = True


def check(c: Constants, tensors: Mapping[str, Tensor]) -> None:
    """Raise Flaw unless the constants are those of a model and the tensors are its own, with sound values."""
    _check_constants(c)
    if c.layers > len(tensors):  # a file that lies must not make us list a million blocks
        raise Flaw(f"it announces {c.layers:,} layers and holds {len(tensors):,} tensors")
    needs = dict(_needs(c, tensors))
    for name, need in list(needs.items()):
        planes = name in tensors and tensors[name].kind == Kind.panel_planes
        if need.sort == "matrix" and planes:
            needs[f"{name}.dither"] = _Need("ints", 1, up(need.columns, PANEL))
    for name, need in needs.items():
        if need.needed and name not in tensors:
            raise Flaw(f"{name} is missing")
    for name, tensor in tensors.items():
        if name not in needs:
            raise Flaw(f"{name[:72]} is not part of such a model")
        need = needs[name]
        sort = "matrix" if tensor.kind >= Kind.panel_float else tensor.kind.name
        columns = tensor.columns if need.sort == "raw" else need.columns
        if sort != need.sort or (tensor.rows, tensor.columns) != (need.rows, columns) or len(name.encode()) > 71:
            raise Flaw(f"{name} holds {tensor.rows} x {tensor.columns} of kind {tensor.kind.name}")
        if tensor.group and (tensor.kind not in GROUPED or tensor.group % PANEL):
            raise Flaw(f"{name} has scales for groups of {tensor.group}")
        if len(tensor.data) != tensor_bytes(tensor.kind, tensor.rows, tensor.columns, tensor.group):
            raise Flaw(f"{name} has {len(tensor.data)} bytes")
        _check_values(name, tensor)
    quantized = any(t.kind > Kind.panel_float for name, t in tensors.items())
    if c.activations != (8 if quantized else 32):
        raise Flaw(f"activations = {c.activations}, against what its matrices are")
    if any(tensors["windows"].values[0] < 0) or not set(tensors["rotates"].values[0].tolist()) <= {0, 1}:
        raise Flaw("its windows are negative or rotates is neither 0 nor 1")
    if bool(tensors["rotates"].values.any()) != (c.rotary > 0) or c.rotary % 2 or not 0 <= c.rotary <= c.head_width:
        raise Flaw(f"{c.rotary} of {c.head_width} features rotate")
    if "pieces" in tensors:
        pieces_of(tensors["pieces"].data, c.known)
    if "merges" in tensors:
        encoding.check(tensors["merges"].data, c.known)


def _check_constants(c: Constants) -> None:
    for name, choices in (
        ("kind", KINDS),
        ("norm", NORMS),
        ("block", BLOCKS),
        ("mlp", MLPS),
        ("head", HEADS),
        ("pooling", POOLINGS),
        ("cache", CACHES),
    ):
        if not 0 <= getattr(c, name) < len(choices):
            raise Flaw(f"{name} = {getattr(c, name)}: must be below {len(choices)}")
    for name in ("vocab", "context", "width", "layers", "heads", "kv_heads", "head_width", "hidden", "known"):
        if not 1 <= getattr(c, name) <= LIMITS.get(name, WIDEST):
            raise Flaw(f"{name} = {getattr(c, name)}: impossible, or more than the engine has room for")
    for name in ("qk_norm", "embed_norm", "learned", "bare"):
        if getattr(c, name) not in (0, 1):
            raise Flaw(f"{name} = {getattr(c, name)}: must be 0 or 1")
    if c.heads % c.kv_heads or c.heads * c.head_width > WIDEST:
        raise Flaw(f"{c.heads} heads of {c.head_width}, {c.kv_heads} of keys")
    if (HEADS[c.head] == "classes") != (c.classes > 0) or not 0 <= c.classes <= LIMITS["classes"]:
        raise Flaw(f"a head of kind {HEADS[c.head]} with {c.classes} classes")
    if (c.pooling or c.bare) and not c.classes:
        raise Flaw(f"pooling = {c.pooling}, bare = {c.bare}: nothing is pooled without classes")
    if not 0 <= c.token_types <= LIMITS["token_types"] or c.known > c.vocab or c.members != 1:
        raise Flaw(f"token_types = {c.token_types}, known = {c.known} of {c.vocab}, members = {c.members}")
    marks = (*c.ends, *([c.begin] if c.begin != -1 else []))
    if not all(0 <= i < c.known for i in marks) or len(set(c.ends)) < len(c.ends) or len(c.ends) > ENDS:
        raise Flaw(f"texts begin with {c.begin} and end with {c.ends}")
    if c.cache == 2 and c.head_width % 16:
        raise Flaw(f"an int8 cache needs a head width that is a multiple of 16, not {c.head_width}")
    for name, least in (("norm_eps", 0.0), ("theta", 0.0), ("attention_scale", 0.0), ("softcap", -1.0)):
        if not least < getattr(c, name) < math.inf or getattr(c, name) < 0:
            raise Flaw(f"{name} = {getattr(c, name)}")


def _needs(c: Constants, has: Container[str]) -> Iterator[tuple[str, _Need]]:
    """Every tensor that a model with these constants has or, if others are there, may have."""

    def norm(name: str) -> Iterator[tuple[str, _Need]]:
        yield f"{name}.scale", _Need("floats", 1, c.width)
        if NORMS[c.norm] == "layernorm":
            yield f"{name}.bias", _Need("floats", 1, c.width)

    def matrix(
        name: str, rows: int, columns: int, needed: bool = True, bias: bool = False
    ) -> Iterator[tuple[str, _Need]]:
        yield name, _Need("matrix", rows, columns, needed)
        if bias or name.startswith("blocks."):
            yield f"{name}.bias", _Need("floats", 1, rows, bias)
        if name.startswith("blocks."):
            yield f"{name}.input", _Need("floats", 1, 1, False)
        if name.startswith("blocks.") and f"{name}.norm.scale" in has:
            yield f"{name}.norm.scale", _Need("floats", 1, columns)
            yield f"{name}.norm.bias", _Need("floats", 1, columns, False)

    def norm_before(name: str, *readers: str) -> Iterator[tuple[str, _Need]]:
        """It may be missing where all that read it have norms of their own."""
        own = all(f"{reader}.norm.scale" in has for reader in readers) and BLOCKS[c.block] != "post"
        if not own or f"{name}.scale" in has:
            yield from norm(name)

    heads, kv, kind = c.heads * c.head_width, c.kv_heads * c.head_width, HEADS[c.head]
    yield from matrix("embed", c.vocab, c.width)
    if c.learned:
        yield "embed_positions", _Need("floats", c.context, c.width)
    if c.token_types:
        yield "embed_types", _Need("floats", c.token_types, c.width)
    if c.embed_norm:
        yield from norm("embed_norm")
    for i in range(c.layers):
        attn, mlp = f"blocks.{i}.attn", f"blocks.{i}.mlp"
        ins = ("gate", "up") if MLPS[c.mlp] in GATED else ("up",)
        yield from norm_before(f"{attn}_norm", *(f"{attn}.{part}" for part in "qkv"))
        yield from norm_before(f"{mlp}_norm", *(f"{mlp}.{part}" for part in ins))
        for name, rows, columns in (
            ("q", heads, c.width),
            ("k", kv, c.width),
            ("v", kv, c.width),
            ("o", c.width, heads),
        ):
            yield from matrix(f"{attn}.{name}", rows, columns)
        for name in ("q_norm", "k_norm") if c.qk_norm else ():
            yield f"{attn}.{name}.scale", _Need("floats", 1, c.head_width)
        for name in ins:
            yield from matrix(f"{mlp}.{name}", c.hidden, c.width)
        yield from matrix(f"{mlp}.down", c.width, c.hidden)
    if BLOCKS[c.block] != "post":
        yield from norm("norm")
    yield "windows", _Need("ints", 1, c.layers)
    yield "rotates", _Need("ints", 1, c.layers)
    if kind in ("tied", "untied", "mlm"):
        yield from matrix("head.out", c.vocab, c.width, kind == "untied")
    if kind == "mlm" or (kind == "classes" and not c.bare):
        yield from matrix("head.dense", c.width, c.width, bias=True)
    if kind == "mlm":
        yield from norm("head.norm")
        yield "head.bias", _Need("floats", 1, c.vocab)
    if kind == "classes":
        yield from matrix("head.out", c.classes, c.width, bias=True)
    for name in ("tokenizer", "pieces", "merges", "provenance", "grams"):
        yield name, _Need("raw", 1, 0, False)


def _check_values(name: str, tensor: Tensor) -> None:
    """Raise Flaw for numbers that are not finite and codes that no weight has."""
    kind = tensor.kind
    if kind == Kind.floats:
        sound = bool(np.isfinite(tensor.values).all())
        if name.endswith(".input"):
            sound = sound and bool(tensor.values[0, 0] >= 1e-30)
    elif kind == Kind.ints:
        sound = not name.endswith(".dither") or bool(((tensor.values >= -8) & (tensor.values < 8)).all())
    elif kind == Kind.raw:
        sound = True
    else:
        codes, scales = parts(tensor)
        missing = tensor.rows % PANEL
        finite = bool(np.isfinite(scales).all()) and not (scales < 0).any()
        sound = finite and not (missing and len(scales) and scales[-1, :, missing:].any())
        if kind == Kind.panel_float:
            weights = codes.view("<f4").reshape(-1, up(tensor.columns, PANEL), PANEL)
            sound = bool(np.isfinite(weights).all()) and not (missing and weights[-1, :, missing:].any())
        elif kind == Kind.panel_int8:
            sound = sound and bool(codes.min() >= 1)
        elif kind == Kind.panel_int4:
            sound = sound and bool((codes & 15).min() >= 1 and codes.min() >= 16)
        elif kind == Kind.panel_ternary:
            sound = sound and not (codes & (codes >> 1) & 0x55).any()
        elif kind == Kind.packed_ternary:
            sound = sound and bool(codes.max() < 3**5)
    if not sound:
        raise Flaw(f"{name} holds values that are impossible")
