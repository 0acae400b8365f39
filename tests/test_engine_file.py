"""The engine's file: its bytes as the format's text says, and what happens to damaged and hostile ones."""

import hashlib
import os
import struct
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from damage import damaged
from hypothesis import given
from hypothesis import strategies as st

from tinylm.engine import checksum, file, layout, rounding
from tinylm.engine.checksum import crc32c
from tinylm.engine.twin import Twin
from tinylm.formats import FormatError

CONSTANTS = layout.Constants(
    kind=0, vocab=3, context=5, width=2, layers=1, heads=1, kv_heads=1, head_width=2, hidden=4, norm=0, block=0, mlp=0,
    rotary=2, qk_norm=0, head=0, classes=0, embed_norm=0, token_types=0, learned=0, known=3, begin=1, ends=(1, 2),
    tensors=0, activations=8, cache=0, members=1, pooling=0, bare=0, norm_eps=1e-5, theta=10_000.0, attention_scale=0.7,
    softcap=0.0,
)  # fmt: skip
FIELDS = {  # the contract's numbers, written down once more
    0: 0, 1: 3, 2: 5, 3: 2, 4: 1, 5: 1, 6: 1, 7: 2, 8: 4, 9: 0, 10: 0, 11: 0, 12: 2, 13: 0, 14: 0, 15: 0, 16: 0, 17: 0,
    18: 0, 19: 3, 20: 1, 21: 1, 22: 2, 23: -1, 24: -1, 26: 8, 27: 0, 28: 1, 29: 0, 30: 0,
}  # fmt: skip
SHAPES = {"embed": (3, 2), "blocks.0.mlp.gate": (4, 2), "blocks.0.mlp.up": (4, 2), "blocks.0.mlp.down": (2, 4)}
SHAPES |= {f"blocks.0.attn.{name}": (2, 2) for name in "qkvo"}


def tensors(bits="int8", **more):
    rng = np.random.default_rng(0)
    made = {}
    for name, shape in SHAPES.items():
        made[name], dither = rounding.pack(rounding.quantize(rng.standard_normal(shape), bits, absmean=True))
        if dither is not None:
            made[f"{name}.dither"] = dither
    for name in ("blocks.0.attn_norm", "blocks.0.mlp_norm", "norm"):
        made[f"{name}.scale"] = layout.floats(np.ones(2))
    made |= {"windows": layout.ints(np.array([0])), "rotates": layout.ints(np.array([1]))}
    made["blocks.0.attn.o.norm.scale"] = layout.floats(np.array([0.5, 2]))
    made["pieces"] = layout.raw(layout.pieces([b"", b"ab", b"\xff"]))
    made["merges"] = layout.raw(struct.pack("<264I", 2, 2, 0, 0, *[0] * 256, ord("a"), 1, 0x2581, 2))
    return made | more


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return file.write(tmp_path_factory.mktemp("tlm") / "sound.tlm", CONSTANTS, tensors())


def summed(raw):
    """The bytes with the size, the CRC and the sha256 that they should have."""
    raw = bytearray(raw)
    raw[16:24] = struct.pack("<Q", len(raw))
    raw[32:64] = hashlib.sha256(raw[64:]).digest()
    raw[24:28] = struct.pack("<I", crc32c(bytes(raw[32:])))
    return bytes(raw)


# --- the checksum -----------------------------------------------------------------------------------------------------


def by_bits(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ 0x82F63B78 * (crc & 1)
    return crc ^ 0xFFFFFFFF


def test_crc_of_rfc_3720():
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E


@given(st.binary(max_size=700))
def test_crc_bit_by_bit(data):
    assert crc32c(data) == by_bits(data)


@pytest.mark.parametrize("size", [63, 64, 65, 127, 128, 129, 255, 4096, 5003])
def test_crc_of_many_rows(size, monkeypatch):
    monkeypatch.setattr(checksum, "ROW", 16)
    data = np.random.default_rng(size).bytes(size)
    assert crc32c(data) == by_bits(data)
    assert crc32c(np.frombuffer(data, np.uint8)[3:]) == by_bits(data[3:])


# --- the bytes of a sound file ----------------------------------------------------------------------------------------


def test_bytes_are_those_of_the_format(sound):
    raw = sound.read_bytes()
    assert raw[:8] == b"tinylm\r\n"
    assert struct.unpack_from("<IIQII", raw, 8) == (1, 0, len(raw), by_bits(raw[32:]), 0)
    assert raw[32:64] == hashlib.sha256(raw[64:]).digest()
    whole, real = struct.unpack_from("<64i", raw, 64), struct.unpack_from("<64f", raw, 64)
    count = whole[25]
    for at in set(range(64)) - {25, 40, 41, 42}:
        assert whole[at] == FIELDS.get(at, 0)
    assert real[40:44] == tuple(np.float32([1e-5, 1e4, 0.7, 0]).tolist())
    end, names = 320 + 112 * count, []
    for i in range(count):
        name, kind, rows, columns, group, a, b, offset, size = struct.unpack_from("<72s6i2Q", raw, 320 + 112 * i)
        name = name.rstrip(b"\0").decode()
        names.append(name)
        assert (a, b, group) == (0, 0, 0)
        assert offset % 64 == 0
        assert offset >= end
        assert not any(raw[end:offset])
        end = offset + size
        if name in SHAPES:
            assert (kind, rows, columns, size) == (9, *SHAPES[name], 16 * 16 + 4 * 16)
        elif name == "pieces":
            assert kind == 2
            assert raw[offset:end] == struct.pack("<5I", 3, 0, 0, 2, 3) + b"ab\xff"
        elif name == "merges":
            assert (kind, rows, columns, size) == (2, 1, 264 * 4, 264 * 4)
        else:
            assert (kind, rows, columns) == (1 if name in ("windows", "rotates") else 0, 1, size // 4)
    assert names == list(tensors())
    assert len(raw) == -(-end // 64) * 64


def test_round_trip(sound):
    found = file.read(sound)
    assert found.constants._replace(tensors=0, norm_eps=0, attention_scale=0) == CONSTANTS._replace(
        norm_eps=0, attention_scale=0
    )
    assert found.sha256 == hashlib.sha256(sound.read_bytes()[64:]).hexdigest()
    for name, tensor in tensors().items():
        assert found.tensors[name][:4] == tensor[:4]
        np.testing.assert_array_equal(found.tensors[name].data, tensor.data)
        assert not found.tensors[name].data.flags.writeable
    assert layout.pieces_of(found.tensors["pieces"].data, 3) == [b"", b"ab", b"\xff"]


@pytest.mark.parametrize("bits", rounding.BITS)
def test_every_kind_of_matrix(bits, tmp_path):
    constants = CONSTANTS._replace(activations=32 if bits == "float32" else 8)
    path = file.write(tmp_path / "m.tlm", constants, tensors(bits))
    assert file.read(path).tensors["embed"].kind == rounding.BITS[bits]
    assert Twin(path).logits([1, 2]).shape == (2, 3)


def test_reading_needs_no_jax(sound):
    code = f"import sys; from tinylm.engine import twin; twin.Twin({str(sound)!r}).logits([1]); "
    code += "print('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


# --- what is refused --------------------------------------------------------------------------------------------------


def test_every_damaged_byte_is_found(sound, tmp_path):  # P27
    raw, path = sound.read_bytes(), tmp_path / "bad.tlm"
    path.write_bytes(raw)
    rng = np.random.default_rng(1)
    with path.open("r+b", buffering=0) as out:
        for at, byte in enumerate(raw):
            os.pwrite(out.fileno(), bytes([byte ^ int(rng.integers(1, 256))]), at)
            with pytest.raises(FormatError, match=r"bad\.tlm is no sound \.tlm file"):
                file.read(path)
            os.pwrite(out.fileno(), bytes([byte]), at)
    file.read(path)


@pytest.mark.parametrize("bits", ["int8", "planes", "ternary"])
def test_damage_that_the_sums_hide(bits, tmp_path):  # P27
    """A file made by an enemy has right sums: it is refused, or it is another sound file and runs."""
    raw = file.write(tmp_path / "sound.tlm", CONSTANTS, tensors(bits)).read_bytes()
    path, refused, ran = tmp_path / "bad.tlm", 0, 0
    for _, bad in damaged(raw, 500, seed=len(bits)):
        path.write_bytes(summed(bad) if len(bad) >= 64 else bad)
        try:
            file.read(path)
        except FormatError:
            refused += 1
        else:
            assert Twin(path).logits([0]).shape[0] == 1
            ran += 1
    assert refused > 200
    assert ran > 10


def changed(raw, at, code, *values):
    return summed(raw[:at] + struct.pack(code, *values) + raw[at + struct.calcsize(code) :])


def entry(raw, name):
    """Where the table's entry of a tensor begins."""
    return next(at for at in range(320, len(raw), 112) if raw[at:].startswith(name.encode() + b"\0"))


HOSTILE = {
    "many tensors": (lambda r: changed(r, 64 + 4 * 25, "<i", 2**31 - 1), "announces 2,147,483,647 tensors"),
    "negative tensors": (lambda r: changed(r, 64 + 4 * 25, "<i", -1), "announces -1"),
    "many layers": (lambda r: changed(r, 64 + 4 * 4, "<i", 4096), "4,096 layers"),
    "more layers": (lambda r: changed(r, 64 + 4 * 4, "<i", 2**30), "layers = 1073741824"),
    "wide": (lambda r: changed(r, 64 + 4 * 3, "<i", 2**31 - 1), "width = 2147483647"),
    "vocabulary": (lambda r: changed(r, 64 + 4, "<i", 2**24), "embed holds 3 x 2"),
    "heads": (lambda r: changed(r, 64 + 4 * 5, "<i", 65536), "65536 heads of 2"),
    "no width": (lambda r: changed(r, 64 + 4 * 3, "<i", 0), "width = 0"),
    "unknown norm": (lambda r: changed(r, 64 + 4 * 9, "<i", 2), "norm = 2"),
    "unknown field": (lambda r: changed(r, 64 + 4 * 63, "<i", 1), "fields that are not known"),
    "begin": (lambda r: changed(r, 64 + 4 * 20, "<i", 3), "begin with 3"),
    "two ends": (lambda r: changed(r, 64 + 4 * 22, "<i", 1), r"end with \(1, 1\)"),
    "eps": (lambda r: changed(r, 64 + 4 * 40, "<f", np.nan), "norm_eps = nan"),
    "theta": (lambda r: changed(r, 64 + 4 * 41, "<f", np.inf), "theta = inf"),
    "scale": (lambda r: changed(r, 64 + 4 * 42, "<f", 0.0), "attention_scale = 0"),
    "softcap": (lambda r: changed(r, 64 + 4 * 43, "<f", -1.0), "softcap = -1"),
    "float activations": (lambda r: changed(r, 64 + 4 * 26, "<i", 32), "activations = 32"),
    "int8 cache": (lambda r: changed(r, 64 + 4 * 27, "<i", 2), "multiple of 16, not 2"),
    "rotary": (lambda r: changed(r, 64 + 4 * 12, "<i", 4), "4 of 2 features rotate"),
    "no rotary": (lambda r: changed(r, 64 + 4 * 12, "<i", 0), "0 of 2 features rotate"),
    "rows": (lambda r: changed(r, entry(r, "embed") + 76, "<i", 2**31 - 1), "embed has .* bytes"),
    "columns": (lambda r: changed(r, entry(r, "embed") + 80, "<i", -1), "-1 columns"),
    "kind": (lambda r: changed(r, entry(r, "embed") + 72, "<i", 7), "embed has kind 7"),
    "other kind": (lambda r: changed(r, entry(r, "embed") + 72, "<i", 0), "embed has 320 bytes"),
    "group": (lambda r: changed(r, entry(r, "embed") + 84, "<i", 2**31 - 1), "embed has .* bytes"),
    "odd group": (lambda r: changed(r, entry(r, "embed") + 84, "<i", 8), "embed"),
    "spare": (lambda r: changed(r, entry(r, "embed") + 88, "<i", 1), "entry 0"),
    "offset": (lambda r: changed(r, entry(r, "embed") + 96, "<Q", 2**64 - 64), "embed has 320 bytes from"),
    "not aligned": (lambda r: changed(r, entry(r, "embed") + 96, "<Q", 2593), "embed has 320 bytes from"),
    "overlap": (lambda r: changed(r, entry(r, "embed") + 96, "<Q", offset_of(r, "blocks.0.attn.q")), "overlaps"),
    "size": (lambda r: changed(r, entry(r, "embed") + 104, "<Q", 2**63), "embed has 9,223"),
    "name": (lambda r: changed(r, entry(r, "embed"), "<6s", b"\xff\0\0\0\0\0"), "decode"),
    "no name": (lambda r: changed(r, entry(r, "embed"), "<6s", b"\0" * 6), "entry 0"),
    "another name": (lambda r: changed(r, entry(r, "embed"), "<6s", b"embex\0"), "embed is missing"),
    "twice": (lambda r: changed(r, entry(r, "blocks.0.attn.q"), "<16s", b"embed"), "'embed' occurs twice"),
    "not zero": (lambda r: summed(r[:-1] + b"\1"), "the end overlaps .* or something lies between"),
    "window": (lambda r: changed(r, offset_of(r, "windows"), "<i", -1), "windows are negative"),
    "rotates": (lambda r: changed(r, offset_of(r, "rotates"), "<i", 2), "rotates is neither"),
    "norm scale": (lambda r: changed(r, offset_of(r, "norm.scale"), "<f", np.nan), "norm.scale holds"),
    "code": (lambda r: changed(r, offset_of(r, "embed"), "<B", 0), "embed holds values that are impossible"),
    "scale of a row": (lambda r: changed(r, offset_of(r, "embed") + 256, "<f", -1), "embed holds"),
    "scale of no row": (lambda r: changed(r, offset_of(r, "embed") + 256 + 12, "<f", 1), "embed holds"),
    "piece count": (lambda r: changed(r, offset_of(r, "pieces"), "<I", 2**32 - 1), "pieces are not those of 3"),
    "matrix norm": (lambda r: changed(r, offset_of(r, "blocks.0.attn.o.norm.scale"), "<f", np.inf), "o.norm.scale"),
    "rules": (lambda r: changed(r, offset_of(r, "merges"), "<I", 33), r"rules \(33\)"),
    "characters": (lambda r: changed(r, offset_of(r, "merges") + 4, "<I", 2**31), "not 2,147,483,648 characters"),
    "many merges": (lambda r: changed(r, offset_of(r, "merges") + 8, "<I", 2**32 - 1), "4,294,967,295 merges"),
    "byte's id": (lambda r: changed(r, offset_of(r, "merges") + 16, "<I", 3), "ids or characters that there are not"),
    "code point": (lambda r: changed(r, offset_of(r, "merges") + 1040, "<I", 0x2582), "ids or characters"),
    "piece order": (lambda r: changed(r, offset_of(r, "pieces") + 8, "<I", 3), "do not follow"),
}  # fmt: skip


def offset_of(raw, name):
    return struct.unpack_from("<Q", raw, entry(raw, name) + 96)[0]


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_with_right_sums(case, sound, tmp_path):  # P27
    make, message = HOSTILE[case]
    path = tmp_path / "bad.tlm"
    path.write_bytes(make(sound.read_bytes()))
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match=message):
            file.read(path)
        assert tracemalloc.get_traced_memory()[1] < 4e6
    finally:
        tracemalloc.stop()


def test_what_is_no_file_of_the_engine(sound, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file '.*none\.tlm'"):
        file.read(tmp_path / "none.tlm")
    with pytest.raises(FormatError, match="a folder; the engine runs one file, which `tinylm export"):
        file.read(tmp_path)
    os.mkfifo(tmp_path / "pipe.tlm")
    with pytest.raises(FormatError, match="not a regular file"):
        file.read(tmp_path / "pipe.tlm")
    raw, path = sound.read_bytes(), tmp_path / "x.tlm"
    for bad, message in (
        (b"", "0 bytes, too few"),
        (raw[:319], "319 bytes, too few"),
        (raw[:-1], "should have"),
        (raw + b"\0", "should have"),
        (b"GGUF" + raw[4:], "does not begin"),
        (raw[:8] + struct.pack("<I", 2) + raw[12:], "has version 2, and this tinylm reads up to 1: update tinylm"),
        (raw[:8] + struct.pack("<I", 0) + raw[12:], "what is not known"),
    ):
        path.write_bytes(bad)
        with pytest.raises(FormatError, match=message):
            file.read(path)


@pytest.mark.parametrize(
    ("constants", "more", "message"),
    [
        ({"width": 3}, {}, "embed holds 3 x 2"),
        ({"head": 1}, {}, r"head\.out is missing"),
        ({"learned": 1}, {}, "embed_positions is missing"),
        ({}, {"extra": layout.ints(np.zeros(1))}, "extra is not part of such a model"),
        ({}, {"norm.scale": layout.floats(np.array([1, np.inf]))}, r"norm\.scale holds values"),
        ({}, {"blocks.0.attn.q.input": layout.floats(np.zeros(1))}, r"blocks\.0\.attn\.q\.input holds"),
        ({}, {"blocks.0.attn.q.norm.bias": layout.floats(np.zeros(2))}, r"q\.norm\.bias is not part"),
        ({}, {"embed.norm.scale": layout.floats(np.ones(2))}, r"embed\.norm\.scale is not part"),
        ({}, {"merges": layout.raw(bytes(8))}, "merges end too soon"),
        ({}, {"embed.dither": layout.ints(np.zeros(16))}, r"embed\.dither is not part"),
        ({}, {"pieces": layout.raw(layout.pieces([b"a"]))}, "pieces are not those of 3 tokens"),
        ({"members": 2}, {}, "members = 2"),
        ({"ends": (0, 1, 2, 2)}, {}, "end with"),
    ],
)
def test_nothing_is_written_that_could_not_be_read(constants, more, message, tmp_path):
    path = tmp_path / "m.tlm"
    path.write_bytes(b"older")
    with pytest.raises(FormatError, match=message):
        file.write(path, CONSTANTS._replace(**constants), tensors(**more))
    assert path.read_bytes() == b"older"
    assert os.listdir(tmp_path) == ["m.tlm"]


def test_planes_need_their_dither(tmp_path):
    made = tensors("planes")
    del made["embed.dither"]
    with pytest.raises(FormatError, match=r"embed\.dither is missing"):
        file.write(tmp_path / "m.tlm", CONSTANTS, made)
    made = tensors("planes", **{"embed.dither": layout.ints(np.full(16, 8))})
    with pytest.raises(FormatError, match=r"embed\.dither holds"):
        file.write(tmp_path / "m.tlm", CONSTANTS, made)
