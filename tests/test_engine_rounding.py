"""Rounding and packing, against loops written from the format's text."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinylm.engine import layout
from tinylm.engine.layout import Kind
from tinylm.engine.rounding import BITS, Rounded, pack, quantize, unpack
from tinylm.formats import FormatError

LARGEST = {"int8": 127, "planes": 120, "int4": 7, "ternary": 1, "ternary2": 1}
GROUPED = [bits for bits in LARGEST if bits != "planes"]


def up(n, step):
    return -(-n // step) * step


def by_loops(w, kind, dither=None):
    """The code bytes of a matrix of integers, one after the other, as the format says."""
    rows, columns = len(w), len(w[0])
    get = lambda r, k: int(w[r][k]) if r < rows and k < columns else 0  # noqa: E731
    out, panels, wide = [], range(up(rows, 16) // 16), up(columns, 16)
    if kind == Kind.panel_int8:
        for p in panels:
            for k in range(0, wide, 4):
                for r in range(16):
                    out += [get(16 * p + r, k + j) + 128 for j in range(4)]
    if kind == Kind.panel_int4:
        for p in panels:
            for k in range(0, wide, 8):
                for r in range(16):
                    row = 16 * p + r
                    out += [(get(row, k + j) + 8) | (get(row, k + 4 + j) + 8) << 4 for j in range(4)]
    if kind == Kind.panel_planes:
        for part in (lambda u: u >> 4, lambda u: u & 15):
            u = lambda row, k: part(get(row, k) + 128 + int(dither[k]))  # noqa: B023, E731
            for p in panels:
                for k in range(0, wide, 8):
                    for r in range(16):
                        out += [u(16 * p + r, k + j) | u(16 * p + r, k + 4 + j) << 4 for j in range(4)]
    if kind in (Kind.panel_ternary, Kind.packed_ternary):
        for p in panels:
            for k in range(0, wide, 16):
                for r in range(16):
                    row = 16 * p + r
                    out += [sum((get(row, k + 4 * i + j) + 1) << 2 * i for i in range(4)) for j in range(4)]
    if kind == Kind.packed_ternary:
        fields = [byte >> 2 * i & 3 for byte in out for i in range(4)]
        fields += [1] * (-len(fields) % 5)
        out = [sum(t * 3**i for i, t in enumerate(fields[at : at + 5])) for at in range(0, len(fields), 5)]
    return bytes(out)


def random_codes(rng, bits, rows, columns):
    return rng.integers(-LARGEST[bits], LARGEST[bits] + 1, (rows, columns)).astype(np.int8)


@pytest.mark.parametrize("shape", [(1, 1), (16, 16), (3, 17), (33, 40), (17, 5)])
@pytest.mark.parametrize("bits", LARGEST)
def test_codes_are_where_the_format_says(bits, shape):
    codes = random_codes(np.random.default_rng(1), bits, *shape)
    scales = np.arange(1, shape[0] + 1, dtype=np.float32)[:, None]
    tensor, dither = pack(Rounded(BITS[bits], codes, scales, 0))
    expected = by_loops(codes, BITS[bits], None if dither is None else dither.values[0])
    assert tensor.data[: len(expected)].tobytes() == expected
    assert not tensor.data[len(expected) : up(len(expected), 64)].any()
    stored = tensor.data[up(len(expected), 64) :].view(np.float32)
    assert stored.tolist() == [*range(1, shape[0] + 1), *[0] * (-shape[0] % 16)]
    assert len(tensor.data) == layout.tensor_bytes(*tensor[:4])


def test_floats_are_where_the_format_says():
    w = np.random.default_rng(2).standard_normal((18, 5)).astype(np.float32)
    data = pack(quantize(w, "float32"))[0].data.view(np.float32)
    assert len(data) == 2 * 16 * 16
    for p in range(2):
        for k in range(16):
            for r in range(16):
                row = 16 * p + r
                assert data[(p * 16 + k) * 16 + r] == (w[row, k] if row < 18 and k < 5 else 0)


@pytest.mark.parametrize("bits", GROUPED)
def test_scales_of_groups_are_where_the_format_says(bits):
    w = np.random.default_rng(3).standard_normal((18, 40)).astype(np.float32)
    found = quantize(w, bits, group=32, absmean=True)
    tensor = pack(found)[0]
    codes = layout.code_bytes(*tensor[:3])
    stored = tensor.data[up(codes, 64) :].view(np.float16).reshape(2, 2, 16)
    for row in range(18):
        for g in range(2):
            assert stored[row // 16, g, row % 16] == found.scales[row, g]
    assert not stored[1, :, 2:].any()
    assert found.scales.shape == (18, 2)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 70),
    st.integers(1, 70),
    st.sampled_from(list(BITS)),
    st.sampled_from([0, 16, 48]),
    st.integers(0, 99),
)
def test_unpacking_is_the_inverse(rows, columns, bits, group, seed):
    group = group if bits in GROUPED else 0
    w = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
    found = quantize(w, bits, group=group, absmean=True)
    tensor, dither = pack(found)
    back = unpack(tensor, dither)
    assert (back.kind, back.group) == (found.kind, found.group)
    np.testing.assert_array_equal(back.codes, found.codes)
    np.testing.assert_array_equal(back.scales, found.scales)
    np.testing.assert_array_equal(back.dense(), found.dense())


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from(["int8", "planes"]),
    st.floats(1e-6, 1e6),
    st.integers(0, 99),
)
def test_rounding_is_to_the_nearest(rows, columns, bits, size, seed):
    w = (size * np.random.default_rng(seed).standard_normal((rows, columns))).astype(np.float32)
    found = quantize(w, bits)
    step = np.abs(w).max(1, keepdims=True) / LARGEST[bits]
    assert (np.abs(w - found.dense()) <= step * 0.50001).all()
    assert (np.abs(found.codes.astype(int)).max(1) == LARGEST[bits]).all()


def test_groups_are_finer_than_rows():
    w = np.random.default_rng(4).standard_normal((64, 256)).astype(np.float32)
    off = {
        (bits, g): np.linalg.norm(w - quantize(w, bits, group=g).dense()) for bits in ("int8", "int4") for g in (0, 32)
    }
    assert off["int8", 32] < 0.8 * off["int8", 0]
    assert off["int4", 32] < 0.85 * off["int4", 0]
    plain = np.abs(w).max(1, keepdims=True) / 7
    assert off["int4", 0] < 0.95 * np.linalg.norm(w - np.rint(w / plain) * plain)  # the search for a scale pays


def test_zeros_and_tiny_weights():
    w = np.zeros((3, 20), np.float32)
    w[1] = 1e-38
    w[2, :16] = 1e-9
    for bits in LARGEST:
        found = quantize(w, bits, absmean=True)
        assert found.scales[0, 0] == 0
        assert not found.codes[0].any()
        assert np.isfinite(found.dense()).all()
    small = quantize(w, "int8", group=16)  # float16 has no such scales
    assert not small.dense().any()


def test_ternary_weights_keep_their_values():
    rng = np.random.default_rng(5)
    codes = random_codes(rng, "ternary", 37, 50)
    per_row = rng.uniform(0.01, 2, (37, 1)).astype(np.float32)
    for scale in (np.full((37, 1), np.float32(0.0371)), per_row):
        for bits in ("ternary", "ternary2"):
            found = unpack(pack(quantize(codes * scale, bits))[0])
            np.testing.assert_array_equal(found.codes, codes)
            np.testing.assert_array_equal(found.scales, scale * codes.any(1, keepdims=True))
            assert found.dense().tobytes() == (codes * scale + np.float32(0)).astype(np.float32).tobytes()
    halves = np.repeat(per_row.astype(np.float16).astype(np.float32), 50, 1)
    np.testing.assert_array_equal(quantize(codes * halves, "ternary", group=16).dense(), codes * halves)


def test_what_is_not_ternary_is_refused():
    w = np.array([[0.5, 0, -0.5], [0.5, 0.25, 0]], np.float32)
    with pytest.raises(FormatError, match=r"1 of 2 rows are not ternary; .* absmean=True"):
        quantize(w, "ternary")
    found = quantize(w, "ternary2", absmean=True)
    np.testing.assert_array_equal(found.scales, [[np.float32(1) / 3], [0.25]])  # the mean magnitudes
    np.testing.assert_array_equal(found.codes, [[1, 0, -1], [1, 1, 0]])
    with pytest.raises(FormatError, match="no float16 numbers"):
        quantize(np.full((1, 16), np.float32(0.1)), "ternary", group=16)


@pytest.mark.parametrize(
    ("w", "bits", "group", "message"),
    [
        (np.ones((2, 2)), "int3", 0, "bits = 'int3': must be one of float32, int8"),
        (np.ones((2, 2)), "int8", 8, "group = 8: must be a multiple of 16"),
        (np.ones((2, 2)), "int8", -16, "group = -16"),
        (np.ones((2, 32)), "planes", 16, "as planes need"),
        (np.array([[np.nan]]), "int8", 0, "not finite"),
        (np.array([[np.inf]]), "float32", 0, "not finite"),
        (np.full((1, 16), 1e8), "int8", 16, "beyond the float16 scales"),
    ],
)
def test_refused(w, bits, group, message):
    with pytest.raises(FormatError, match=message):
        quantize(w, bits, group=group)


def test_dither_is_uniform_and_a_function_of_the_codes():
    rng = np.random.default_rng(6)
    found = quantize(rng.standard_normal((64, 4096)).astype(np.float32), "planes")
    tensor, dither = pack(found)
    again, same = pack(found)
    assert tensor.data.tobytes() == again.data.tobytes()
    assert dither.data.tobytes() == same.data.tobytes()
    offsets = dither.values[0]
    counts = np.bincount(offsets + 8, minlength=16)
    assert len(counts) == 16
    assert ((counts - 256) ** 2 / 256).sum() < 45  # chi-square of 15 degrees of freedom: 1e-4
    low = found.codes.astype(int) + 128 + offsets & 15
    assert abs(low.mean() - 7.5) < 0.1  # so the high nibble leaves a rest around zero
    assert not np.array_equal(offsets, pack(quantize(rng.standard_normal((64, 4096)), "planes"))[1].values[0])
    assert pack(quantize(np.ones((1, 5)), "planes"))[1].values[0, 5:].tolist() == [0] * 11


@pytest.mark.parametrize(
    ("bits", "expected"), [("float32", 32), ("int8", 8), ("planes", 8), ("int4", 4), ("ternary2", 2), ("ternary", 1.6)]
)
def test_bits_per_weight(bits, expected):
    rows, columns = 512, 1024
    codes = layout.code_bytes(BITS[bits], rows, columns)
    assert abs(8 * codes / (rows * columns) - expected) < 1e-4
    more = layout.tensor_bytes(BITS[bits], rows, columns, 0) - codes
    assert more == 0 if bits == "float32" else 4 * rows <= more < 4 * rows + 64
    if bits in GROUPED:
        more = layout.tensor_bytes(BITS[bits], rows, columns, 32) - codes
        assert 0 <= more - 2 * rows * columns // 32 < 64
