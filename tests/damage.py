"""Damaged files for readers of every format: what a bad disk, a cut download or an enemy makes of a good one."""

import gc
import struct
import tracemalloc

import numpy as np

HUGE = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1]


def cut(raw, rng):
    return raw[: rng.integers(0, len(raw))]


def flip(raw, rng):
    raw = bytearray(raw)
    for _ in range(rng.integers(1, 9)):
        raw[rng.integers(len(raw))] ^= 1 << rng.integers(8)
    return bytes(raw)


def flip_early(raw, rng):
    """Headers are at the front, and one flipped bit in the weights is another sound file in most formats."""
    raw = bytearray(raw)
    raw[rng.integers(min(len(raw), 2048))] ^= 1 << rng.integers(8)
    return bytes(raw)


def lie(raw, rng):
    """A length, a count or an offset of the header becomes another one, often a huge one."""
    width = int(rng.choice([4, 8]))
    at = int(rng.integers(max(1, min(len(raw), 2048) - width)))
    value = HUGE[rng.integers(len(HUGE))] if rng.random() < 0.5 else int(rng.integers(0, 2**31))
    return raw[:at] + (value & (2 ** (8 * width) - 1)).to_bytes(width, "little") + raw[at + width :]


def blank(raw, rng):
    at, size = int(rng.integers(len(raw))), int(rng.integers(1, 4096))
    return raw[:at] + bytes(min(size, len(raw) - at)) + raw[at + size :]


def grow(raw, rng):
    return raw + rng.bytes(int(rng.integers(1, 4096)))


def repeat(raw, rng):
    at, size = int(rng.integers(len(raw))), int(rng.integers(1, 256))
    return raw[:at] + raw[at : at + size] + raw[at:]


def drop(raw, rng):
    at, size = int(rng.integers(len(raw))), int(rng.integers(1, 256))
    return raw[:at] + raw[at + size :]


def noise(raw, rng):
    return rng.bytes(int(rng.integers(0, 4096)))


def not_finite(raw, rng):
    at = int(rng.integers(0, max(1, len(raw) - 4))) & ~3
    return raw[:at] + struct.pack("<f", float(rng.choice([np.nan, np.inf, -np.inf]))) + raw[at + 4 :]


KINDS = (cut, flip, flip_early, lie, blank, grow, repeat, drop, noise, not_finite)


def damaged(raw, count, seed=0):
    """Yield (name, bytes) of `count` damaged copies, the kinds in turn; about one in ten is damaged twice."""
    for i in range(count):
        rng = np.random.default_rng([seed, i])
        kind = KINDS[i % len(KINDS)]
        bad = kind(raw, rng)
        if rng.random() < 0.1 and bad:
            bad = KINDS[int(rng.integers(len(KINDS)))](bad, rng)
        yield f"{i} {kind.__name__}", bad


def peak(call):
    """What `call()` gives or raises, and the bytes that Python and NumPy held at most meanwhile."""
    gc.collect(0)  # a full one takes 0.3 s once JAX is loaded
    tracemalloc.start()
    try:
        try:
            found = call()
        except Exception as error:
            found = error
        return found, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
