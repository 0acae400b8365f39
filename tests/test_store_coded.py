"""Files whose tensors are coded: the same values in fewer bytes, differences to a base, and every kind of damage."""

import hashlib
import json
import os
import struct
import tracemalloc

import damage
import ml_dtypes
import numpy as np
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st
from test_run import create, flip
from test_store import SAMPLE, arrays, crafted, names, put, resealed, same

from tinylm import store
from tinylm.run import Run
from tinylm.store import CheckpointDamaged, StateMismatch, read_file, verify_file, write_file

RNG = np.random.default_rng(0)
WEIGHTS = {
    "params.w": RNG.standard_normal((60, 50)).astype(np.float32),
    "params.half": RNG.standard_normal(4000).astype(ml_dtypes.bfloat16),
    "opt.mu": np.zeros((60, 50), np.float32),
    "codes": np.round(RNG.standard_normal(2000) * 20).astype(np.int8),
    **SAMPLE,
}
LATER = {
    "params.w": WEIGHTS["params.w"] * np.float32(1.0001),
    "params.half": np.where(np.arange(4000) % 9 == 0, 1, WEIGHTS["params.half"]).astype(ml_dtypes.bfloat16),
    "opt.mu": np.ones((60, 50), np.float32),
    "codes": WEIGHTS["codes"][:1000],  # of another shape
    "new": np.full(9000, 3, np.int64),
}


@pytest.fixture
def coded(tmp_path):
    path = tmp_path / "coded.safetensors"
    write_file(path, WEIGHTS, {"step": 3}, codec="planes")
    return path


@pytest.fixture
def delta(coded):
    path = coded.with_name("delta.safetensors")
    write_file(path, LATER, {"step": 4}, codec="planes", base=coded)
    return path


def inner_of(path):
    data = path.read_bytes()
    return json.loads(json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])["__metadata__"]["tinylm"])


def recast(path, change, name="recast.safetensors"):
    """The same data under changed tinylm metadata, and a hash that is right."""
    data = path.read_bytes()
    length = 8 + struct.unpack("<Q", data[:8])[0]
    header, inner = json.loads(data[8:length]), inner_of(path)
    change(inner)
    header["__metadata__"]["tinylm"] = json.dumps(inner)
    path.with_name(name).write_bytes(crafted(header, data[length:]))
    return path.with_name(name)


# --- what comes back --------------------------------------------------------------------------------------------------


def test_coded_files_come_back_and_are_smaller(coded, delta):
    plain, alone = coded.with_name("plain"), coded.with_name("alone")
    write_file(plain, WEIGHTS, {"step": 3})
    write_file(alone, LATER, {"step": 4}, codec="planes")
    for path, tensors, step in ((coded, WEIGHTS, 3), (delta, LATER, 4), (alone, LATER, 4)):
        found, metadata = read_file(path)
        same(found, tensors)
        assert metadata == verify_file(path) == {"step": step}
        assert all(t.flags.writeable and t.flags.aligned and t.flags.c_contiguous for t in found.values())
    assert coded.stat().st_size < 0.7 * plain.stat().st_size
    assert delta.stat().st_size < 0.8 * alone.stat().st_size
    assert {name for name, entry in inner_of(delta)["planes"].items() if entry["delta"]} == {"params.w", "params.half"}


def test_same_tensors_same_bytes(coded):
    again = coded.with_name("again")
    write_file(again, dict(reversed(WEIGHTS.items())), {"step": 3}, codec="planes")
    assert again.read_bytes() == coded.read_bytes()


def test_a_coded_file_is_a_safetensors_file_with_the_hash_of_what_is_stored(coded):
    with safetensors.safe_open(coded, "numpy") as file:
        kinds = {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118 not a mapping
    entries = inner_of(coded)["planes"]
    assert kinds.keys() == WEIGHTS.keys()
    assert set(entries) == {"params.w", "params.half", "opt.mu", "codes"}  # the others are small, and stay
    assert all(kinds[name] == (np.uint8 if name in entries else WEIGHTS[name].dtype) for name in WEIGHTS)
    data = coded.read_bytes()
    zeroed = data[: store.SLOT.start] + b"0" * 64 + data[store.SLOT.stop :]
    assert data[store.SLOT].decode() == hashlib.sha256(zeroed).hexdigest()


def test_what_does_not_shrink_makes_the_file_of_always(tmp_path):
    """So a reader that knows no codec reads it too."""
    for codec in ("raw", "planes"):
        write_file(tmp_path / codec, SAMPLE, {"step": 3}, codec=codec)
    assert (tmp_path / "raw").read_bytes() == (tmp_path / "planes").read_bytes()
    assert inner_of(tmp_path / "raw") == {"format": 1, "metadata": {"step": 3}}


def test_a_reader_that_knows_no_codec_says_so(coded, monkeypatch):
    monkeypatch.setattr(store, "CODED", store.FORMAT)  # as it was before there was one
    with pytest.raises(StateMismatch, match=r"format 2, this tinylm reads up to 1: update tinylm"):
        read_file(coded)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(names, arrays, max_size=4), st.dictionaries(names, arrays, max_size=4), st.integers(1, 300))
def test_any_arrays_come_back(tmp_path_factory, before, after, times):
    folder = tmp_path_factory.getbasetemp()
    before, after = ({name: np.tile(a, times) for name, a in part.items()} for part in (before, after))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)  # no waiting for the disk
        write_file(folder / "before", before, {}, codec="planes")
        write_file(folder / "after", {**before, **after}, {}, codec="planes", base=folder / "before")
    same(read_file(folder / "before")[0], before)
    same(read_file(folder / "after")[0], {**before, **after})


def weights(step):
    values = np.random.default_rng(step).standard_normal((2, 300, 10)).astype(np.float32)
    return {"params.w": values[0], "opt.mu": values[1], "step": np.array(step)}


def test_coded_checkpoints_stand_for_themselves_among_raw_ones(tmp_path):
    run = create(tmp_path / "run")
    for step in range(1, 7):
        run.save(step, weights(step), {"seconds": 0.5}, codec="planes" if step % 2 else "raw")
    with pytest.raises(ValueError, match="codec = 'zip': must be one of raw, planes"):
        run.save(5, weights(5), codec="zip")
    sizes = [run.path(step).stat().st_size for step in run.steps()]
    assert max(sizes[::2]) < 0.9 * min(sizes[1::2])
    flip(run.path(6))
    assert run.prune(1) == [1, 2, 3, 4]
    run.close()
    with Run.open(run.folder, write=True) as again:
        step, tensors, metadata, notes = again.restore()
        assert (step, metadata, len(notes)) == (5, {"seconds": 0.5, "step": 5}, 2)
        assert {n: (t.dtype, t.tobytes()) for n, t in tensors.items()} == {
            n: (t.dtype, t.tobytes()) for n, t in weights(5).items()
        }
        flip(run.path(5), at=-100)
        assert again.prune(1) == []
        with pytest.raises(CheckpointDamaged, match="no sound checkpoint"):
            again.restore()


def test_reading_takes_the_memory_of_the_tensors_and_verifying_takes_none(tmp_path):
    tensors = {f"{n}": RNG.standard_normal(250_000).astype(np.float32) for n in range(40)}
    write_file(tmp_path / "a", tensors, {}, codec="planes")
    for call, most in ((read_file, 60e6), (verify_file, 6e6)):  # 40 MB of tensors, 33 MB on disk
        found, peak = damage.peak(lambda: call(tmp_path / "a"))  # noqa: B023
        assert not isinstance(found, Exception)
        assert peak < most


# --- bases ------------------------------------------------------------------------------------------------------------


def test_a_difference_needs_its_base_as_it_was(delta, coded):
    tensors, data = read_file(coded)[0], coded.read_bytes()
    write_file(coded, tensors, {"step": 5})
    for read in (read_file, verify_file):
        with pytest.raises(StateMismatch, match=r"delta\.safetensors needs its base .*coded\.safetensors as it was"):
            read(delta)
    coded.write_bytes(data[:-1])
    for read in (read_file, verify_file):
        with pytest.raises(CheckpointDamaged, match=r"delta\.safetensors needs its base: .*coded\.safetensors is dam"):
            read(delta)
    coded.unlink()
    for read in (read_file, verify_file):
        with pytest.raises(StateMismatch, match=r"delta\.safetensors needs its base .*coded\.safetensors: No such"):
            read(delta)
    coded.write_bytes(data)
    same(read_file(delta)[0], LATER)


def test_a_folder_of_differences_can_be_moved(delta, coded, tmp_path):
    (tmp_path / "new").mkdir()
    for path in (delta, coded):
        path.rename(tmp_path / "new" / path.name)
    same(read_file(tmp_path / "new" / delta.name)[0], LATER)


def test_no_chains_of_differences(delta):
    other = delta.with_name("other")
    with pytest.raises(ValueError, match=r"delta\.safetensors cannot be a base, .*: give that one, coded\.safetensors"):
        write_file(other, LATER, {}, codec="planes", base=delta)
    assert not other.exists()
    chained = recast(delta, lambda inner: inner.update(base={"file": "recast.safetensors", "sha256": "0" * 64}))
    for read in (read_file, verify_file):
        with pytest.raises(CheckpointDamaged, match="a difference itself, and a base must be whole"):
            read(chained)


def test_bases_and_codecs_that_cannot_be(tmp_path, coded):
    (tmp_path / "sub").mkdir()
    (tmp_path / "link").symlink_to(coded)
    before = coded.read_bytes()
    for more, place, match in (
        ({"codec": "zip"}, coded, "codec = 'zip': must be one of raw, planes"),
        ({"base": coded}, tmp_path / "x", "only with codec"),
        ({"base": coded, "codec": "planes"}, tmp_path / "sub" / "x", "another file of the same folder"),
        ({"base": coded, "codec": "planes"}, coded, "another file of the same folder"),
        ({"base": tmp_path / "link", "codec": "planes"}, coded, "another file of the same folder"),
    ):
        with pytest.raises(ValueError, match=match):
            write_file(place, WEIGHTS, {}, **more)
    with pytest.raises(FileNotFoundError):
        write_file(tmp_path / "x", WEIGHTS, {}, codec="planes", base=tmp_path / "missing")
    assert coded.read_bytes() == before
    assert not (tmp_path / "x").exists()


# --- damage -----------------------------------------------------------------------------------------------------------


def entry(**changes):
    return lambda inner: inner["planes"]["params.w"].update(changes)


def also(name):
    return lambda inner: inner["planes"].update({name: inner["planes"]["codes"]})


def based(base):
    return lambda inner: inner.update(base=base)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda inner: inner.pop("planes"), "metadata is incomplete"),
        (lambda inner: inner.update(planes={}), "metadata is incomplete"),
        (lambda inner: inner["planes"].update({"params.w": 3}), "not described by dtype, shape and delta"),
        (entry(delta=0), "not described by dtype, shape and delta"),
        (entry(more=0), "not described by dtype, shape and delta"),
        (entry(dtype="F31"), "unknown type"),
        (entry(shape=[-1]), "impossible shape"),
        (entry(shape=[1] * 40), "impossible shape"),
        (entry(delta=True), "no base"),
        (entry(shape=[60, 51]), "'params.w' cannot be decoded: its head"),
        (entry(shape=[2**47] * 3), "'params.w' cannot be decoded: its head"),
        (entry(shape=[2**47, 0, 2**47]), "'params.w' cannot be decoded: its head"),
        (entry(dtype="F64"), "'params.w' cannot be decoded: its head"),
        (also("nobody"), "'nobody' is not stored as bytes"),
        (also("half"), "'half' is not stored as bytes"),
        (also("odd"), "'odd' cannot be decoded: it has 5 bytes"),
        *((based({"file": file, "sha256": ""}), "impossible base") for file in ("", ".", "..", "../x", "/etc/passwd")),
        *((based({"file": file, "sha256": ""}), "impossible base") for file in ("a\\b", "a\0b", "a\n", "\ud800", 3)),
        (based(3), "impossible base"),
        (based({"file": "x"}), "impossible base"),
    ],
)
def test_each_kind_of_bad_coding_has_its_reason(coded, change, reason):
    with pytest.raises(CheckpointDamaged, match=reason):
        read_file(recast(coded, change))


def test_a_difference_to_what_the_base_lacks(delta, coded):
    def more(inner):
        inner["planes"]["new"]["delta"] = True

    with pytest.raises(CheckpointDamaged, match="'new' is not in its base"):
        read_file(recast(delta, more))
    write_file(coded, {**WEIGHTS, "params.w": WEIGHTS["params.w"].T}, {"step": 3}, codec="planes")
    sha256 = coded.read_bytes()[store.SLOT].decode()
    with pytest.raises(CheckpointDamaged, match=r"'params.w' cannot be decoded: its base has .* shape \(50, 60\)"):
        read_file(recast(delta, based({"file": coded.name, "sha256": sha256})))


def attack(coded, delta, count):
    """How many of `count` damaged files, half of them with a hash that is right, were refused; the others must fit."""
    refused, target = 0, coded.with_name("bad")
    known = {path: read_file(path)[0] for path in (coded, delta)}
    most = 2 * sum(t.nbytes for tensors in known.values() for t in tensors.values()) + 2**20
    tracemalloc.start()
    for path, tensors in known.items():
        data = path.read_bytes()
        begin = 8 + struct.unpack("<Q", data[:8])[0]
        inside = damage.damaged(data[begin:], count)
        for turn, (name, bad) in enumerate(damage.damaged(data, count // 2, seed=1)):
            sealed, decoder = turn // 10 % 2, turn // 10 % 4 == 1  # the kinds of damage take turns by ten
            if decoder:  # all is in order but for the data, which is what the decoder sees
                bad = data[:begin] + (next(inside)[1] + bytes(len(data)))[: len(data) - begin]
            put(target, resealed(bad) if sealed and len(bad) > store.SLOT.stop else bad)
            before = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            try:
                found = read_file(target)[0]
            except (CheckpointDamaged, StateMismatch) as error:
                refused, found = refused + 1, error
            if isinstance(found, ValueError):
                assert "bad" in str(found), name
            else:
                assert sealed or bad == data, name
                kinds, wanted = ({n: (t.dtype, t.shape) for n, t in part.items()} for part in (found, tensors))
                assert not decoder or kinds == wanted, name
            assert tracemalloc.get_traced_memory()[1] - before < most, name
    tracemalloc.stop()
    return refused


def test_three_hundred_damaged_coded_files(coded, delta):
    assert attack(coded, delta, 300) > 200


@pytest.mark.slow
def test_ten_thousand_damaged_coded_files(coded, delta):  # P4, P27
    assert attack(coded, delta, 10_000) > 7000
