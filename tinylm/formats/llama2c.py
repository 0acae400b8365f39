"""llama2.c's files (github.com/karpathy/llama2.c): model.bin in its three versions, and tokenizer.bin.

    version 0  seven int32 (width, hidden, layers, heads, kv_heads, vocab, context; vocab is negative where the head
               is not the embedding), then float32: embedding, each kind of tensor for all layers, rotary tables
    version 1  "ak42" and the version as int32, the seven, one byte (head is the embedding), zeros up to byte 256,
               then float32: all norms, the matrices
    version 2  as 1 with the group size as int32 behind the byte; norms are float32, matrices int8 with one float32
               scale per group of numbers: q = round(x / scale), scale = max |x| / 127

Version 1 is read and not written: no published program reads it. What the programs have nothing for is refused: other
norms and activations, windows, `qk_norm`, `theta`, and so on.
"""

from __future__ import annotations

import gzip
import math
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tinylm.config import ModelConfig
from tinylm.formats import tables
from tinylm.formats.llama2c_tokenizers import SLACK, beside, own_files, read_tokenizer, tokenizer_file, tokenizer_path
from tinylm.formats.tables import KEY_PAIRS, QUERY_PAIRS, TRANSPOSED, FormatError, Row, complain
from tinylm.model import Transformer
from tinylm.store import PathLike, replacing, write_bytes
from tinylm.tokenizer import Tokenizer
from tinylm.weights import named

MAGIC = 0x616B3432
HEADERS = {0: 28, 1: 256, 2: 256}  # bytes
GROUP, SMALLEST = 64, 4  # numbers per scale: as a rule, and at least (two would save a quarter, one nothing)
LAYERS = 512  # more are no model of this kind; each costs time before the file is known to be sound

ROWS = (
    Row("tok_embeddings", "embed.table"),
    Row("attention_norm.{i}", "blocks.{i}.attn_norm.scale"),
    Row("wq.{i}", "blocks.{i}.attn.q.kernel", QUERY_PAIRS),
    Row("wk.{i}", "blocks.{i}.attn.k.kernel", KEY_PAIRS),
    Row("wv.{i}", "blocks.{i}.attn.v.kernel", TRANSPOSED),
    Row("wo.{i}", "blocks.{i}.attn.o.kernel", TRANSPOSED),
    Row("ffn_norm.{i}", "blocks.{i}.mlp_norm.scale"),
    Row("w1.{i}", "blocks.{i}.mlp.gate.kernel", TRANSPOSED),
    Row("w2.{i}", "blocks.{i}.mlp.down.kernel", TRANSPOSED),
    Row("w3.{i}", "blocks.{i}.mlp.up.kernel", TRANSPOSED),
    Row("norm", "norm.scale"),
    Row("output", "head.out.kernel", TRANSPOSED),
)
"""One table for reading and writing, in version 0's order."""

MATRICES = ("tok_embeddings", "wq.{i}", "wk.{i}", "wv.{i}", "wo.{i}", "w1.{i}", "w2.{i}", "w3.{i}", "output")
ORDERS = {  # of the tensors in each version
    0: (*(row.theirs for row in ROWS[:-1]), "freqs_cos", "freqs_sin", "output"),
    1: ("attention_norm.{i}", "ffn_norm.{i}", "norm", *MATRICES),
    2: ("attention_norm.{i}", "ffn_norm.{i}", "norm", *MATRICES),
}
ROTARY_TABLES = ("freqs_cos", "freqs_sin")  # of version 0; the program computes its own


class Header(NamedTuple):
    """What a model file says of itself; `group` is 0 where numbers are float32."""

    width: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    context: int
    version: int = 0
    shared: bool = True
    group: int = 0

    @classmethod
    def parse(cls, raw: bytes) -> Header:
        """Of a file's first bytes. Raises FormatError for what no model can be."""
        if len(raw) < HEADERS[0]:
            raise FormatError(f"it has {len(raw)} bytes, too few for a header")
        version, shared, group, at = 0, True, 0, 0
        if struct.unpack_from("<I", raw)[0] == MAGIC:
            version, at = struct.unpack_from("<i", raw, 4)[0], 8
            if version not in (1, 2):
                raise FormatError(f"it is of version {version}; known are 0, 1 and 2")
            if len(raw) < HEADERS[version]:
                raise FormatError(f"it has {len(raw)} bytes, too few for a header")
            flag = raw[36]
            group = struct.unpack_from("<i", raw, 37)[0] if version == 2 else 0
            if flag > 1 or any(raw[41 if version == 2 else 37 : HEADERS[version]]):
                raise FormatError("its header holds flags that are not known")
            shared = bool(flag)
        numbers = list(struct.unpack_from("<7i", raw, at))
        if version == 0:
            shared, numbers[5] = numbers[5] > 0, abs(numbers[5])
        header = cls(*numbers, version=version, shared=shared, group=group)
        for name, value in zip(cls._fields, numbers, strict=False):
            if value < 1:
                raise FormatError(f"its header says {name} = {value}: not a llama2.c model, or damaged")
        if header.layers > LAYERS or header.context > 2**24:
            raise FormatError(f"its header says {header.layers:,} layers and a context of {header.context:,}")
        if header.width % header.heads or header.heads % header.kv_heads:
            raise FormatError(f"its header says width {header.width}, {header.heads} and {header.kv_heads} heads")
        if version == 2 and (group < 1 or any(math.prod(s) % group for s in header.shapes(matrices=True).values())):
            raise FormatError(f"its header says groups of {group}, which its matrices cannot be cut into")
        return header

    def shapes(self, *, matrices: bool = False) -> dict[str, tuple[int, ...]]:
        """Shape of one tensor of each kind, in the file's order; `matrices`: of what version 2 stores as int8 alone."""
        head = self.width // self.heads
        kv = head * self.kv_heads
        known: dict[str, tuple[int, ...]] = dict.fromkeys(("attention_norm.{i}", "ffn_norm.{i}", "norm"), (self.width,))
        known |= {"tok_embeddings": (self.vocab, self.width), "output": (self.vocab, self.width)}
        known |= {"wq.{i}": (self.width, self.width), "wo.{i}": (self.width, self.width)}
        known |= {"wk.{i}": (kv, self.width), "wv.{i}": (kv, self.width)}
        known |= {"w1.{i}": (self.hidden, self.width), "w3.{i}": (self.hidden, self.width)}
        known |= {"w2.{i}": (self.width, self.hidden), **dict.fromkeys(ROTARY_TABLES, (self.context, head // 2))}
        order = [name for name in ORDERS[self.version] if name != "output" or not self.shared]
        return {name: known[name] for name in order if not matrices or name in MATRICES}

    def size(self) -> int:
        """Bytes of the whole file."""
        total = HEADERS[self.version]
        for name, shape in self.shapes().items():
            total += self.stored(name, math.prod(shape)) * (self.layers if "{i}" in name else 1)
        return total

    def stored(self, name: str, count: int) -> int:
        """Bytes of `count` numbers of one tensor."""
        return count + 4 * (count // self.group) if self.group and name in MATRICES else 4 * count

    def tensors(self) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """Every tensor in the file's order: its name, its kind, its shape."""
        for kind, shape in self.shapes().items():
            for i in range(self.layers) if "{i}" in kind else (0,):
                yield kind.replace("{i}", str(i)), kind, shape

    def bytes(self) -> bytes:
        """The header as it stands in a file of version 0 or 2."""
        numbers = [self.width, self.hidden, self.layers, self.heads, self.kv_heads, self.vocab, self.context]
        if self.version == 0:
            numbers[5] *= 1 if self.shared else -1
            return struct.pack("<7i", *numbers)
        return struct.pack("<Ii7iBi", MAGIC, 2, *numbers, self.shared, self.group).ljust(HEADERS[2], b"\0")


# --- reading ----------------------------------------------------------------------------------------------------------


def read(path: PathLike, *, tokenizer: Tokenizer | PathLike | bool = True) -> Transformer:
    """A model.bin of any version, plain or gzipped; int8 becomes the numbers it stands for.

    Args:
        path: the file. tokenizer: a tokenizer, or the path of a tokenizer.bin; False leaves it out. True looks beside
            the model, also for each name with .gz: <name>.tokenizer.bin, which must fit (it must have the model's
            number of pieces); tokenizer.bin if it fits; the tok*.bin that fits, if no other does. Where there are only
            others it warns, and the model has none.

    Raises:
        FileNotFoundError: there is no such model or tokenizer.
        FormatError: a file that is damaged or says what is not known, with its name; a tokenizer that does not fit.
    """
    path = Path(path)
    if not isinstance(tokenizer, (Tokenizer, str, os.PathLike, bool)):
        known = "give a Tokenizer, the path of one, True (look beside the model) or False (none)"
        raise FormatError(f"{path}: tokenizer = {str(tokenizer)[:60]!r}: {known}")
    try:
        header, raw = _unpacked(path)
        config = tables.settings(
            vocab=header.vocab,
            context=header.context,
            width=header.width,
            layers=header.layers,
            heads=header.heads,
            kv_heads=header.kv_heads,
            hidden=header.hidden,
            head="tied" if header.shared else "untied",
        )
        places, at = {}, HEADERS[header.version]
        for name, kind, shape in header.tensors():
            places[name] = (kind, shape, at)
            at += header.stored(kind, math.prod(shape))
        params = tables.read(
            ROWS,
            config,
            {name: shape for name, (_, shape, _) in places.items()},
            lambda name: _numbers(raw, header, *places[name]),
            ignored=lambda name: name in ROTARY_TABLES,
        )
    except FormatError as error:
        raise error if str(error).startswith(str(path)) else FormatError(f"{path}: {error}") from None
    if isinstance(tokenizer, bool):
        own = beside(path, header.vocab) if tokenizer else None
    else:
        own = tokenizer if isinstance(tokenizer, Tokenizer) else read_tokenizer(tokenizer, header.vocab)
    if own is not None and own.vocab > header.vocab:
        raise FormatError(f"{path}: {own} has more ids than the model, {header.vocab}: it is another model's")
    return tables.build(config, params, own)


def _numbers(raw: bytearray, header: Header, kind: str, shape: tuple[int, ...], at: int) -> np.ndarray:
    count = math.prod(shape)
    if not header.group or kind not in MATRICES:
        return np.frombuffer(raw, "<f4", count, at).reshape(shape)
    whole = np.frombuffer(raw, np.int8, count, at).reshape(-1, header.group)
    scale = np.frombuffer(raw, "<f4", len(whole), at + count)
    with np.errstate(over="ignore", invalid="ignore"):  # a damaged scale; the table's reader says so
        return (whole.astype(np.float32) * scale[:, None]).reshape(shape)


def _unpacked(path: Path) -> tuple[Header, bytearray]:
    """The header and all bytes of a model file, gzip undone. FormatError, before memory is taken, if they disagree."""
    try:
        if not path.exists():
            raise FileNotFoundError(f"there is no file {str(path)!r}")
        if not path.is_file():
            raise FormatError(f"{path} is a folder or a device: name a file")
        size = path.stat().st_size
        packed = path.suffix == ".gz"
        with gzip.open(path) if packed else path.open("rb") as file:
            header = Header.parse(file.read(HEADERS[2]))
            wanted = header.size()
            if wanted > 2 * size + SLACK if packed else wanted != size:
                raise FormatError(f"its header asks for {wanted:,} bytes, and it has {size:,}: it is damaged")
            file.seek(0)
            room, at = bytearray(wanted), 0
            while got := file.readinto(memoryview(room)[at:]):  # type: ignore[attr-defined]
                at += got
            if at < wanted or file.read(1):
                raise FormatError(f"its header asks for {wanted:,} bytes, and it holds others: it is damaged")
            return header, room
    except FileNotFoundError:
        raise
    except (OSError, EOFError, zlib.error) as error:
        raise FormatError(f"{path} cannot be read: {error}") from None


# --- writing ----------------------------------------------------------------------------------------------------------


def write(model: Transformer, path: PathLike, *, version: int = 0, group: int | None = None) -> Path:
    """Write a model for llama2.c: version 0 for `run`, 2 (int8) for `runq`.

    A tokenizer goes to <name>.tokenizer.bin beside it: `./run story.bin -z story.tokenizer.bin -i "Once"`. Where its
    ids are not in llama2.c's places the file has them in another order, and the rows of the embedding with them. What
    lay there is replaced, and removed for a model without a tokenizer. After a crash the new model may lack its
    tokenizer; another's never lies beside it.

    llama2.c puts a space before every prompt that is not empty, so `-i "One day"` goes on as `generate(model, " One
    day")` does, and shows all but that space. SentencePiece's kind puts a space there too, and models trained on texts
    that begin with one expect it; others may tell another story than `generate(model, "One day")`. No tokenizer.bin can
    prevent it: the program takes one piece, " ", for that space and for those between words. An empty prompt goes on
    alike in both. It also merges across words, so a prompt may be cut a little differently there.

    Args:
        model: a decoder of Llama's kind. path: ends in .bin as a rule.
        group: of version 2, a power of two: numbers per scale, 64 as a rule; where width or hidden is no multiple of
            it, as runq needs, the largest power of two that divides both.

    Raises:
        FormatError: everything about the model or its tokenizer that llama2.c has nothing for, or values that are not
            finite; then nothing is written. OSError: the disk refuses.
    """
    path, c = Path(path), model.config
    group = _group(c, version, group)
    _require(c)
    params = {name: np.asarray(value, np.float32) for name, value in named(model).items()}
    complain([f"{name} holds values that are not finite" for name, x in params.items() if not np.isfinite(x).all()])
    vocabulary = b""
    if model.tokenizer is not None:
        vocabulary, order = tokenizer_file(model.tokenizer, c.vocab)
        params["embed.table"] = params["embed.table"][order]
        if c.head == "untied":
            params["head.out.kernel"] = params["head.out.kernel"][:, order]
    sizes = (c.width, c.hidden, c.layers, c.heads, c.kv_heads, c.vocab, c.context)
    header = Header(*sizes, version=version, shared=c.head == "tied", group=group)
    tensors = tables.write(ROWS, c, params)
    for file in (path, tokenizer_path(path)) if vocabulary else (path,):
        if file.is_dir():
            raise FormatError(f"{file} is a folder: choose another name")
    with replacing(path, header.size() + len(vocabulary)) as number:  # room for both, or neither is begun
        with os.fdopen(number, "wb", closefd=False) as file:
            for part in _parts(header, tensors):
                file.write(part)
        for old in own_files(path):  # before the model takes its name, so that no other's is ever beside it
            if not old.is_dir():
                old.unlink(missing_ok=True)
    if vocabulary:
        write_bytes(tokenizer_path(path), vocabulary)
    return path


def _group(c: ModelConfig, version: int, group: int | None) -> int:
    """Numbers per scale, 0 for float32. Raises FormatError for a version or a group that is not written."""
    if type(version) is not int or version not in (0, 2):
        raise FormatError(f"version = {version!r}: written are 0 (float32, for run) and 2 (int8, for runq)")
    if version == 0:
        if group is not None:
            raise FormatError(f"group = {group!r} is for version 2 (int8): leave it out, or give version 2")
        return 0
    asked = GROUP if group is None else group
    if type(asked) is not int or asked < SMALLEST or asked & (asked - 1):
        raise FormatError(f"group = {asked!r}: must be a power of two, {SMALLEST} or more; {GROUP} as a rule")
    most = min(x & -x for x in (c.width, c.hidden))
    if most < SMALLEST:
        raise FormatError(
            f"width = {c.width}, hidden = {c.hidden}: runq needs groups that divide both, and those of {most} save too "
            "little: choose multiples of 32, or version 0"
        )
    return min(asked, most)


def _require(c: ModelConfig) -> None:
    """Raises FormatError with everything that llama2.c cannot say."""
    try:
        tables.require_said(
            c,
            "llama2.c",
            kind="decoder",
            norm="rmsnorm",
            norm_eps=1e-5,
            block="pre",
            mlp="swiglu",
            positions="rope",
            theta=10_000.0,
            rotary=(0, c.head_width),
            head_width=c.width // c.heads,
            window=0,
            attention_scale=(0.0, c.head_width**-0.5),
            qk_norm=False,
            softcap=0.0,
            head=("tied", "untied"),
            bias=False,
            qkv_bias=False,
            embed_norm=False,
            token_types=0,
        )
    except FormatError as error:
        remedy = ". Train with qk_norm=False (--qk-norm false), which presets switch on" if c.qk_norm else ""
        raise FormatError(f"{error}{remedy}") from None


def _parts(header: Header, tensors: Mapping[str, np.ndarray]) -> Iterator[bytes]:
    yield header.bytes()
    for name, kind, _ in header.tensors():
        if kind in ROTARY_TABLES:
            half = header.width // header.heads // 2
            angle = np.outer(np.arange(header.context), 10_000.0 ** (-np.arange(half) / half))
            x = np.cos(angle) if kind == "freqs_cos" else np.sin(angle)
        else:
            x = tensors[name]
        if header.group and kind in MATRICES:
            yield from (part.tobytes() for part in quantized(x, header.group))
        else:
            yield x.astype("<f4").tobytes()


def quantized(x: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    """int8 numbers (groups, group) and the float32 scale of each group (groups,): runq's Q8_0."""
    x = x.astype(np.float32).reshape(-1, group)
    scale = np.abs(x).max(axis=1) / np.float32(127)
    safe = np.where(scale == 0, np.float32(1), scale)  # a group of zeros
    q = np.clip(np.rint(x / safe[:, None]), -127, 127)  # the scale of the tiniest numbers is itself rounded
    return q.astype(np.int8), scale.astype("<f4")
