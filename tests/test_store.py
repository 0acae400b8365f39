"""The hashed file: round trips, every kind of damage, and what the safetensors library makes of it."""

import errno
import hashlib
import json
import os
import resource
import struct
import subprocess
import sys
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tinylm import store
from tinylm.store import CheckpointDamaged, StateMismatch, read_file, verify_file, write_file

SAMPLE = {
    "blocks.0.attn.q.kernel": np.arange(96, dtype=np.float32).reshape(8, 12) / 7,
    "half": np.arange(33).astype(ml_dtypes.bfloat16),
    "count": np.array(7, np.int32),
    "key": np.array([1, 2**32 - 1], np.uint32),
    "nothing": np.zeros((3, 0, 2), np.float64),
    "flags": np.array([True, False, True]),
    "odd": np.arange(5, dtype=np.uint8),
}


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert a[name].shape == b[name].shape, name
        assert a[name].tobytes() == b[name].tobytes(), name


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "a.safetensors"
    write_file(path, SAMPLE, {"step": 3, "deep": {"x": [1, 2.5, None]}})
    return path


def test_round_trip(path):
    tensors, metadata = read_file(path)
    same(tensors, SAMPLE)
    assert metadata == verify_file(path) == {"step": 3, "deep": {"x": [1, 2.5, None]}}
    assert all(t.flags.writeable and t.flags.aligned for t in tensors.values())


names = st.text(st.characters(exclude_categories=("Cs",)), max_size=20).filter(lambda name: name != "__metadata__")
dtypes = st.sampled_from(list(store.DTYPES.values()))
arrays = dtypes.flatmap(
    lambda dtype: hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4).flatmap(
        lambda shape: st.binary(
            min_size=int(np.prod(shape)) * dtype.itemsize, max_size=int(np.prod(shape)) * dtype.itemsize
        ).map(lambda raw: np.frombuffer(bytes(b & 1 for b in raw) if dtype.kind == "b" else raw, dtype).reshape(shape))
    )
)
values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(), st.lists)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(names, arrays, max_size=5), st.dictionaries(st.text(), values, max_size=3))
def test_any_arrays_and_metadata_come_back(tmp_path_factory, tensors, metadata):
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)  # no waiting for the disk
        write_file(path, tensors, metadata)
    found, about = read_file(path)
    same(found, tensors)
    assert about == metadata


def test_layouts_of_memory_do_not_matter(tmp_path):
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    for n, odd in enumerate((base.T, base[::2, ::-1], base.astype(">f4"), np.asfortranarray(base))):
        write_file(tmp_path / f"{n}", {"x": odd}, {})
        np.testing.assert_array_equal(read_file(tmp_path / f"{n}")[0]["x"], odd)


def test_numpy_scalars_in_metadata(tmp_path):
    write_file(tmp_path / "x", {}, {"best": np.float32(0.1), "inf": float("inf"), "steps": np.arange(3)})
    assert read_file(tmp_path / "x") == ({}, {"best": float(np.float32(0.1)), "inf": float("inf"), "steps": [0, 1, 2]})


@pytest.mark.parametrize(
    ("tensors", "metadata", "error", "match"),
    [
        ({"x": np.array(["a"])}, {}, ValueError, "'x' has type <U1"),
        ({"x": np.array([object()])}, {}, ValueError, "'x' has type object"),
        ({"x": np.zeros(2, np.complex128)}, {}, ValueError, "complex128"),
        ({"__metadata__": np.zeros(2)}, {}, ValueError, "cannot be a tensor's name"),
        ({1: np.zeros(2)}, {}, ValueError, "1 cannot be a tensor's name"),
        ({"\ud800": np.zeros(2)}, {}, ValueError, "Unicode"),
        ({}, {"x": object()}, TypeError, "json"),
        ({}, {"x": "y" * 2**24}, ValueError, "over the limit"),
    ],
)
def test_what_the_format_cannot_say_is_refused_before_writing(tmp_path, tensors, metadata, error, match):
    with pytest.raises(error, match=match):
        write_file(tmp_path / "x", tensors, metadata)
    assert not list(tmp_path.iterdir())


def test_the_safetensors_library_reads_the_same(path):
    with safetensors.safe_open(path, "numpy") as file:
        assert set(file.keys()) == set(SAMPLE)
        same({name: file.get_tensor(name) for name in file.keys()}, SAMPLE)  # noqa: SIM118 not a mapping
        assert file.metadata()["sha256"] == path.read_bytes()[store.SLOT].decode()


def test_the_hash_is_what_the_docstring_says(path):
    data = path.read_bytes()
    zeroed = data[: store.SLOT.start] + b"0" * 64 + data[store.SLOT.stop :]
    assert data[store.SLOT].decode() == hashlib.sha256(zeroed).hexdigest()


def test_same_content_same_bytes_in_any_process(path):  # P29
    code = (
        "import sys; sys.path[:0] = sys.argv[2:]; import test_store as t; "
        "t.write_file(sys.argv[1], dict(sorted(t.SAMPLE.items(), reverse=True)), "
        "{'deep': {'x': [1, 2.5, None]}, 'step': 3})"
    )
    other = path.with_name("other")
    here = [os.path.dirname(__file__), os.path.dirname(os.path.dirname(store.__file__))]
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", code, other, *here], check=True, env=environment)
    assert other.read_bytes() == path.read_bytes()


# --- damage (P4) ------------------------------------------------------------------------------------------------------


def damaged(data: bytes, kind: str, rng: np.random.Generator) -> bytes:
    """One random damage; may by chance change nothing (zeros over zeros)."""
    new, at = bytearray(data), int(rng.integers(len(data)))
    size = int(rng.integers(1, 65))
    if kind == "flip":
        new[at] ^= 1 << int(rng.integers(8))
    elif kind == "truncate":
        del new[at:]
    elif kind == "extend":
        new += rng.bytes(size) if rng.integers(2) else bytes(size)
    elif kind == "zero":
        new[at : at + size] = bytes(len(new[at : at + size]))
    elif kind == "swap":
        a, b = sorted(int(n) for n in rng.integers(0, len(data) // 64, 2) * 64)
        new[a : a + 64], new[b : b + 64] = new[b : b + 64], new[a : a + 64]
    elif kind == "cut":
        del new[at : at + size]
    return bytes(new)


def put(path, data: bytes) -> None:
    """Write a file anew: ext4 sends one that is written over to the disk, which takes milliseconds."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def test_three_thousand_damaged_files_are_all_refused(path):  # P4
    rng, data, tried = np.random.default_rng(0), path.read_bytes(), 0
    target = path.with_name("bad")
    for n in range(3300):
        bad = damaged(data, ("flip", "truncate", "extend", "zero", "swap", "cut")[n % 6], rng)
        if bad == data:
            continue
        tried += 1
        put(target, bad)
        with pytest.raises(CheckpointDamaged, match="bad"):
            (read_file if n % 2 else verify_file)(target)
    assert tried >= 3000


def resealed(data: bytes) -> bytes:
    zeroed = data[: store.SLOT.start] + b"0" * 64 + data[store.SLOT.stop :]
    return data[: store.SLOT.start] + hashlib.sha256(zeroed).hexdigest().encode() + data[store.SLOT.stop :]


def test_hostile_files_with_a_valid_hash_never_do_anything_else(path):  # P27
    rng, data, target, refused = np.random.default_rng(1), path.read_bytes(), path.with_name("evil"), 0
    length = 8 + struct.unpack("<Q", data[:8])[0]
    digits = [i for i in range(store.SLOT.stop, length) if data[i : i + 1].isdigit()]
    for n in range(1500):
        if n % 3:
            bad = bytearray(data)
            bad[digits[rng.integers(len(digits))]] = ord("0") + int(rng.integers(10))
        else:
            bad = damaged(data, ("flip", "truncate", "extend", "zero", "swap", "cut")[n % 6], rng)
        put(target, resealed(bytes(bad)) if len(bad) > store.SLOT.stop else bytes(bad))
        try:
            tensors, _ = read_file(target)
        except (CheckpointDamaged, StateMismatch):
            refused += 1
        else:
            assert sum(t.nbytes for t in tensors.values()) == len(bad) - 8 - struct.unpack("<Q", bad[:8])[0]
    assert refused > 800


def crafted(header: dict | bytes, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return resealed(struct.pack("<Q", len(text)) + text + data)


ABOUT = {"sha256": "0" * 64, "tinylm": '{"format": 1, "metadata": {}}'}
FOUR = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        (b"", "0 bytes"),
        (b"\x80\x04\x95pickle" * 20, "claims a header"),
        (struct.pack("<Q", 2**63) + bytes(200), "claims a header"),
        (struct.pack("<Q", 168) + b"{" * 200, "no tinylm hash"),
        (crafted({"__metadata__": {"sha256": "0" * 64, "x": "y" * 20}}), "no tinylm metadata"),
        (crafted({"__metadata__": {**ABOUT, "tinylm": "[]"}}), "not a json object"),
        (crafted({"__metadata__": {**ABOUT, "tinylm": '{"format":0}'}}), "metadata is incomplete"),
        (crafted({"__metadata__": {**ABOUT, "tinylm": '{"format":1}'}}), "metadata is incomplete"),
        (crafted({"__metadata__": ABOUT, "x": 3}), "'x' is not described"),
        (crafted({"__metadata__": ABOUT, "x": {**FOUR, "more": 1}}, bytes(4)), "'x' is not described"),
        (crafted({"__metadata__": ABOUT, "x": {**FOUR, "dtype": "F31"}}, bytes(4)), "unknown type 'F31'"),
        (crafted({"__metadata__": ABOUT, "x": {**FOUR, "dtype": ["F32"]}}, bytes(4)), "unknown type"),
        (crafted({"__metadata__": ABOUT, "x": {**FOUR, "shape": [2]}}, bytes(4)), "do not fit its shape"),
        (crafted({"__metadata__": ABOUT, "x": {**FOUR, "shape": [-1]}}, bytes(4)), "impossible"),
        (crafted({"__metadata__": ABOUT, "x": {**FOUR, "shape": [True]}}, bytes(4)), "impossible"),
        (crafted({"__metadata__": ABOUT, "x": {**FOUR, "shape": [1.0]}}, bytes(4)), "impossible"),
        (crafted({"__metadata__": ABOUT, "x": {**FOUR, "shape": [1] * 40}}, bytes(4)), "impossible"),
        (crafted({"__metadata__": ABOUT, "x": {**FOUR, "data_offsets": [0, 2**40]}}, bytes(4)), "do not fit"),
        (crafted({"__metadata__": ABOUT, "x": {**FOUR, "data_offsets": [0]}}, bytes(4)), "impossible"),
        (crafted({"__metadata__": ABOUT, "x": {**FOUR, "data_offsets": [4, 8]}}, bytes(8)), "gap or an overlap"),
        (crafted({"__metadata__": ABOUT, "x": FOUR, "y": FOUR}, bytes(8)), "gap or an overlap"),
        (crafted({"__metadata__": ABOUT, "x": FOUR}, bytes(8)), "take 4 bytes but it holds 8"),
        (
            crafted({"__metadata__": ABOUT, "x": {**FOUR, "shape": [2**40], "data_offsets": [0, 2**42]}}, bytes(4)),
            "take 4398046511104 bytes but it holds 4",
        ),
        (
            crafted({"__metadata__": ABOUT, "x": {**FOUR, "shape": [0, 2**47, 2**47], "data_offsets": [0, 0]}}),
            "impossible shape",
        ),
        (crafted(json.dumps({"__metadata__": ABOUT}).replace(" ", "").encode()[:-1] + b',"x":' + b"[" * 10**5), "json"),
        (
            crafted(b'{"__metadata__":' + json.dumps(ABOUT, separators=(",", ":")).encode() + b',"x":{},"x":{}}'),
            "name occurs twice",
        ),
        (crafted({"__metadata__": ABOUT, "x": {**FOUR, "shape": [9]}}).replace(b"[9]", b"[" + b"9" * 5000), "header"),
    ],
)
def test_each_kind_of_bad_header_has_its_reason(tmp_path, file, reason):  # P27
    (tmp_path / "x").write_bytes(file)
    with pytest.raises(CheckpointDamaged, match=reason):
        read_file(tmp_path / "x")


def test_a_newer_format_is_no_damage_and_a_damaged_newer_one_is(tmp_path):  # P10
    newer = crafted({"__metadata__": {**ABOUT, "tinylm": '{"format": 3}'}})
    (tmp_path / "x").write_bytes(newer)
    with pytest.raises(StateMismatch, match=r"format 3.*update tinylm"):
        read_file(tmp_path / "x")
    (tmp_path / "x").write_bytes(newer.replace(b": 3", b": 4"))
    with pytest.raises(CheckpointDamaged, match="sha256"):
        read_file(tmp_path / "x")


def test_what_is_not_a_file(tmp_path):  # P27
    with pytest.raises(FileNotFoundError):
        read_file(tmp_path / "missing")
    with pytest.raises(CheckpointDamaged, match="not a regular file"):
        read_file(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointDamaged, match="not a regular file"):
        read_file(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="symbolic links"):
        read_file(tmp_path / "loop")


def test_an_unreadable_disk_is_damage(path, monkeypatch):  # P4
    def broken(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "readv", broken)
    with pytest.raises(CheckpointDamaged, match="cannot be read: Input/output error"):
        read_file(path)


def test_allocation_follows_the_file_not_its_claims(tmp_path):  # P27
    """A header may claim terabytes; nothing is allocated for it (the claim is checked against the file's length)."""
    claim = {"dtype": "F64", "shape": [2**40], "data_offsets": [0, 2**43]}
    (tmp_path / "x").write_bytes(crafted({"__metadata__": ABOUT, "x": claim}))
    tracemalloc.start()
    with pytest.raises(CheckpointDamaged):
        read_file(tmp_path / "x")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


# --- refusals of the disk (P5) ----------------------------------------------------------------------------------------


def test_a_full_disk_is_noticed_before_writing(path, monkeypatch):  # P5
    before = path.read_bytes()
    monkeypatch.setattr(store, "free_bytes", lambda _: 1000)
    with pytest.raises(OSError, match=r"No space left.*0\.4 MB needed, 0\.0 MB free.*a\.safetensors") as caught:
        write_file(path, {"x": np.zeros(100_000, np.float32)}, {})
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_limit_on_file_size_leaves_no_litter(path):  # P5
    before, (soft, hard) = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match=r"not saved: 0\.4 MB needed") as caught:
            write_file(path, {"x": np.zeros(100_000, np.float32)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_bad_places(tmp_path):  # P5
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    small = {"x": np.zeros(2)}
    for place, error in (
        ("missing/x", FileNotFoundError),
        ("file/x", NotADirectoryError),
        ("folder", IsADirectoryError),
    ):
        with pytest.raises(error, match="not saved"):
            write_file(tmp_path / place, small, {})
    longest = tmp_path / ("n" * 255)
    write_file(longest, small, {})
    same(read_file(longest)[0], small)
    with pytest.raises(OSError, match="name too long"):
        write_file(tmp_path / ("n" * 256), small, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder", "n" * 255]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder(tmp_path):  # P5
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match="not saved"):
        write_file(tmp_path / "x", {}, {})


def test_an_interrupt_leaves_no_litter(path, monkeypatch):  # P2
    before = path.read_bytes()

    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_file(path, SAMPLE, {})
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]
