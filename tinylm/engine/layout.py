"""What a `.tlm` file consists of: kinds of tensors, the constants, and how many bytes each tensor takes; see `file`."""

from __future__ import annotations

import enum
import itertools
import math
import struct
from typing import NamedTuple

import numpy as np

ALIGN, PANEL = 64, 16
CONSTANTS, TABLE = 64, 320  # where the constants and the tensor table begin


class Kind(enum.IntEnum):
    """What a tensor holds, see the table above."""

    floats = 0
    ints = 1
    raw = 2
    panel_float = 8
    panel_int8 = 9
    panel_planes = 10
    panel_int4 = 11
    panel_ternary = 12
    packed_ternary = 13


GROUPED = (Kind.panel_int8, Kind.panel_int4, Kind.panel_ternary, Kind.packed_ternary)

NORMS = ("rmsnorm", "layernorm")
BLOCKS = ("pre", "post", "parallel")
MLPS = ("swiglu", "geglu", "reglu", "gelu", "gelu_tanh", "relu2")
GATED = MLPS[:3]
HEADS = ("tied", "untied", "mlm", "classes", "none")
POOLINGS = ("cls", "mean", "last")
KINDS = ("decoder", "encoder")
CACHES = ("auto", "float32", "int8")
ACTIVATIONS = {8: "int8", 32: "float32"}
ENDS = 4  # ids that end a text, at most
FLOATS_AT = 40  # field of the first float


class Constants(NamedTuple):
    """Fields 0 .. 30 (int32; `ends` takes four, filled up with -1), then from field 40 on (float32)."""

    kind: int
    """Index into KINDS."""
    vocab: int
    context: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    hidden: int
    norm: int
    """Index into NORMS, as `block`, `mlp` and `head` into theirs."""
    block: int
    mlp: int
    rotary: int
    """Features of each head that rotate, all of them: head_width; 0 where no layer rotates."""
    qk_norm: int
    head: int
    classes: int
    embed_norm: int
    token_types: int
    learned: int
    """Whether positions have embeddings."""
    known: int
    """Ids that the tokenizer knows: ids from there on are never sampled."""
    begin: int
    """Id before every text; -1: none."""
    ends: tuple[int, ...]
    """Ids that end a text."""
    tensors: int
    activations: int
    """8: codes, with a scale per token; 32: floats, since every matrix is panel_float."""
    cache: int
    """Index into CACHES; 0: int8 where head_width is a multiple of 16 and at least 32."""
    members: int
    """1."""
    pooling: int
    """Index into POOLINGS: what a classes head reads; 0 for all other heads."""
    bare: int
    """1: a classes head without head.dense and its tanh."""
    norm_eps: float
    theta: float
    attention_scale: float
    """On the scores; never 0."""
    softcap: float
    """0: off."""

    def packed(self) -> bytes:
        """The 256 bytes of the file."""
        fields = list(self)
        at = self._fields.index("ends")
        fields[at : at + 1] = [*self.ends, *[-1] * (ENDS - len(self.ends))]
        whole, real = fields[:-4], fields[-4:]
        return struct.pack(f"<{len(whole)}i", *whole).ljust(4 * FLOATS_AT, b"\0") + struct.pack("<4f", *real).ljust(
            TABLE - CONSTANTS - 4 * FLOATS_AT, b"\0"
        )

    @classmethod
    def unpacked(cls, data: bytes) -> Constants:
        """The inverse. Raises Flaw for bytes that `packed` never makes."""
        at, count = cls._fields.index("ends"), len(cls._fields) - 4 + ENDS - 1
        whole = list(struct.unpack_from(f"<{count}i", data))
        ends = whole[at : at + ENDS]
        whole[at : at + ENDS] = [tuple(i for i in ends if i != -1)]
        found = cls(*whole, *struct.unpack_from("<4f", data, 4 * FLOATS_AT))  # type: ignore[call-arg]
        if found.packed() != data:
            raise Flaw("its constants hold fields that are not known")
        return found


class Tensor(NamedTuple):
    """One tensor as it stands in the file; `data` is (bytes,) uint8, codes and scales together."""

    kind: Kind
    rows: int
    columns: int
    group: int
    data: np.ndarray

    @property
    def values(self) -> np.ndarray:
        """(rows, columns) of a tensor that is no matrix of panels."""
        dtype = {Kind.floats: "<f4", Kind.ints: "<i4", Kind.raw: "u1"}[self.kind]
        return self.data.view(dtype).reshape(self.rows, self.columns)


def floats(values: np.ndarray) -> Tensor:
    """A tensor of kind floats from a vector or a matrix."""
    return _plain(Kind.floats, np.atleast_2d(values).astype("<f4"))


def ints(values: np.ndarray) -> Tensor:
    """A tensor of kind ints from a vector or a matrix."""
    return _plain(Kind.ints, np.atleast_2d(values).astype("<i4"))


def raw(data: bytes) -> Tensor:
    """A tensor of kind raw."""
    return _plain(Kind.raw, np.frombuffer(data, np.uint8)[None])


def _plain(kind: Kind, values: np.ndarray) -> Tensor:
    rows, columns = values.shape
    return Tensor(kind, rows, columns, 0, np.ascontiguousarray(values).reshape(-1).view(np.uint8))


def up(size: int, step: int = ALIGN) -> int:
    """`size` rounded up to a multiple of `step`."""
    return -(-size // step) * step


def code_bytes(kind: Kind, rows: int, columns: int) -> int:
    """Bytes of a tensor's codes, before the padding that its scales need."""
    cells = up(rows, PANEL) * up(columns, PANEL)
    if kind == Kind.packed_ternary:
        return -(-cells // 5)
    bits = {Kind.panel_float: 32, Kind.panel_int8: 8, Kind.panel_planes: 8, Kind.panel_int4: 4, Kind.panel_ternary: 2}
    if kind in bits:
        return cells * bits[kind] // 8
    return rows * columns * (1 if kind == Kind.raw else 4)


def scale_shape(kind: Kind, rows: int, columns: int, group: int) -> tuple[int, int, int]:
    """(panels, scales along a row, 16); nothing where the kind has no scales."""
    if kind <= Kind.panel_float:
        return (0, 0, PANEL)
    return up(rows, PANEL) // PANEL, -(-up(columns, PANEL) // group) if group else 1, PANEL


def tensor_bytes(kind: Kind, rows: int, columns: int, group: int) -> int:
    """Bytes of a whole tensor."""
    codes = code_bytes(kind, rows, columns)
    scales = math.prod(scale_shape(kind, rows, columns, group)) * (2 if group else 4)
    return up(codes) + scales if scales else codes


def parts(tensor: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The codes, (bytes,) uint8, and the scales, as `scale_shape` says, of a matrix."""
    codes = code_bytes(tensor.kind, tensor.rows, tensor.columns)
    shape = scale_shape(tensor.kind, tensor.rows, tensor.columns, tensor.group)
    rest = tensor.data[up(codes) :] if math.prod(shape) else tensor.data[:0]
    return tensor.data[:codes], rest.view("<f2" if tensor.group else "<f4").reshape(shape)


class Flaw(ValueError):
    """A reason why a file is not sound, still without the file's name."""


def problem(text: str) -> ValueError:
    """A FormatError to raise; its room brings JAX along, which nobody with a sound file needs."""
    from tinylm.formats.tables import FormatError

    return FormatError(text)


def pieces(tokens: list[bytes] | tuple[bytes, ...]) -> bytes:
    """The bytes of every token id as the tensor "pieces" holds them."""
    offsets = np.cumsum([0, *map(len, tokens)]).astype("<u4")
    return struct.pack("<I", len(tokens)) + offsets.tobytes() + b"".join(tokens)


def pieces_of(data: np.ndarray, count: int) -> list[bytes]:
    """The inverse. Raises Flaw unless they are `count` sound pieces."""
    head = 4 * (count + 2)
    if len(data) < head or int(data[:4].view("<u4")[0]) != count:
        raise Flaw(f"its pieces are not those of {count} tokens")
    offsets = data[4:head].view("<u4").astype(np.int64)
    if offsets[0] or (np.diff(offsets) < 0).any() or offsets[-1] != len(data) - head:
        raise Flaw("its pieces do not follow each other")
    text = data[head:].tobytes()
    return [text[a:b] for a, b in itertools.pairwise(offsets.tolist())]
