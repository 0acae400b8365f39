"""ggml's block types against the `gguf` package, which is tested against ggml's own C code, bit for bit."""

import numpy as np
import pytest

from tinylm.formats import ggml
from tinylm.formats.ggml import NUMBERED, TERNARY, TYPES, WRITTEN, FormatError, decode, encode

gguf = pytest.importorskip("gguf", reason="the oracle of block types is not installed (pip install gguf)")
quants = gguf.quants


def ternary(rng, rows, width, scale=0.0107421875):
    """Weights -d, 0, d with d exact in float16."""
    return (rng.integers(-1, 2, (rows, width)) * np.float32(scale)).astype(np.float32)


def test_numbers_and_sizes_are_ggmls():
    for name, kind in TYPES.items():
        theirs = gguf.GGMLQuantizationType[name]
        assert (kind.number, kind.values, kind.bytes) == (theirs.value, *gguf.GGML_QUANT_SIZES[theirs])
    for number, name in ggml.UNREAD.items():
        assert gguf.GGMLQuantizationType[name].value == number
        assert number not in NUMBERED


@pytest.mark.parametrize("name", TYPES)
def test_any_bytes_decode_as_ggml_decodes_them(name):
    kind = TYPES[name]
    raw = np.random.default_rng(0).integers(0, 256, (7, 1024 // kind.values * kind.bytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        theirs = np.asarray(quants.dequantize(raw, gguf.GGMLQuantizationType[name])).reshape(7, 1024)
        ours = decode(raw.reshape(-1), kind, (7, 1024))
    assert ours.dtype == np.float32
    same = (ours.view(np.uint32) == theirs.view(np.uint32)) | (np.isnan(ours) & np.isnan(theirs))
    assert same.all()


@pytest.mark.parametrize("name", WRITTEN)
def test_floats_encode_as_ggml_encodes_them(name):
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((9, 1024)) * np.exp(3 * rng.standard_normal((9, 1)))).astype(np.float32)
    x[3, :300] = 0  # blocks of nothing but zeros
    x[4, ::2] = 0.5 * x[4, 1::2]  # halves, where roundings differ
    x[5, :64] = np.tile([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 0.49999997], 8)
    theirs = np.asarray(quants.quantize(x, gguf.GGMLQuantizationType[name])).view(np.uint8).reshape(-1)
    np.testing.assert_array_equal(encode(x, TYPES[name], rounding=True), theirs)


@pytest.mark.parametrize("name", TERNARY)
def test_ternary_weights_come_back_bit_for_bit(name):
    rng = np.random.default_rng(2)
    x = ternary(rng, 16, 512)
    x[5] = 0
    x[6, :256] *= np.float32(2)  # a block of its own scale
    raw = encode(x, TYPES[name])
    again = decode(raw, TYPES[name], x.shape)
    np.testing.assert_array_equal(again, x)
    np.testing.assert_array_equal(encode(again, TYPES[name]), raw)
    assert len(raw) == x.size * TYPES[name].bytes // 256
    smallest = (rng.integers(-1, 2, (1, 256)) * np.float32(2**-24)).astype(np.float32)  # whose inverse is no float16
    np.testing.assert_array_equal(decode(encode(smallest, TYPES[name]), TYPES[name], (1, 256)), smallest)


@pytest.mark.parametrize("name", TERNARY)
def test_other_weights_are_refused_unless_rounding_is_asked_for(name):
    rng = np.random.default_rng(3)
    x = ternary(rng, 4, 256)
    x[2, 7] = 0.001
    with pytest.raises(FormatError, match="1 of 4 blocks of 256 weights are not ternary"):
        encode(x, TYPES[name])
    with pytest.raises(FormatError, match="4 of 4 blocks have a scale that is not a float16"):
        encode(ternary(rng, 4, 256, 0.1), TYPES[name])
    rounded = decode(encode(x, TYPES[name], rounding=True), TYPES[name], x.shape)
    x[2, 7] = 0
    np.testing.assert_array_equal(rounded, x)


def test_what_a_type_cannot_hold_is_refused():
    with pytest.raises(FormatError, match="not finite"):
        encode(np.array([1, np.nan], np.float32), TYPES["F32"])
    with pytest.raises(FormatError, match="beyond float16"):
        encode(np.array([7e4], np.float32), TYPES["F16"])
    with pytest.raises(FormatError, match="beyond float16"):
        encode(np.full(32, 1e7, np.float32), TYPES["Q8_0"])
    with pytest.raises(FormatError, match="beyond float16"):
        encode(np.full(256, 1e5, np.float32), TYPES["TQ2_0"], rounding=True)
    with pytest.raises(FormatError, match=r"only read, not written; written are F32, F16, Q8_0, BF16, TQ1_0, TQ2_0"):
        encode(np.zeros(256, np.float32), TYPES["Q4_K"])
    with pytest.raises(FormatError, match="rows of 48 values are no whole blocks of 32"):
        encode(np.zeros((2, 48), np.float32), TYPES["Q8_0"])
    largest = np.array([65519.0], np.float32)  # rounds down to the largest float16
    assert decode(encode(largest, TYPES["F16"]), TYPES["F16"], (1,))[0] == 65504
