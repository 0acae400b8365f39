"""CRC-32C (Castagnoli), the checksum of `.tlm` files that native code can check in passing."""

from __future__ import annotations

import functools

import numpy as np

POLYNOMIAL = 0x82F63B78  # reflected, as every number here
ROW = 2**15  # words of 32 bits that are worked on together


def crc32c(data: memoryview | np.ndarray | bytes) -> int:
    """CRC-32C of the bytes, as in RFC 3720.

    The sum is linear: a word with n words behind it counts as that word multiplied by x^(32 n), added to the last one.
    So rows are folded onto the next row, and halves of the last row onto each other, until one word is left.
    """
    data = np.frombuffer(data, np.uint8)
    words = -(-len(data) // 4)
    row = min(ROW, 1 << max(0, words - 1).bit_length())
    whole = max(0, len(data) // (4 * row) - 1)  # rows at the end that are taken as they are
    lead = len(data) - 4 * row * whole
    front = np.zeros(-(-lead // (4 * row)) * (4 * row), np.uint8)  # zeros in front change nothing
    front[len(front) - lead :] = data[:lead]
    if len(data) < 4:
        state = 0xFFFFFFFF
        for byte in data.tolist():
            state = _byte(state, byte)
        return state ^ 0xFFFFFFFF
    front[len(front) - lead :][:4] ^= 255
    state = np.zeros(row, np.uint32)
    for part in (front, data[lead:]):
        for words in part.view("<u4").reshape(-1, row):
            state = _advanced(state, row) ^ words
    while row > 1:
        row //= 2
        state = _advanced(state[:row], row) ^ state[row:]
    return int(_advanced(state, 1)[0]) ^ 0xFFFFFFFF


def _byte(state: int, byte: int) -> int:
    """The state after one byte more."""
    state ^= byte
    for _ in range(8):
        state = (state >> 1) ^ (POLYNOMIAL if state & 1 else 0)
    return state


def _advanced(words: np.ndarray, by: int) -> np.ndarray:
    """Each word multiplied by x^(32 by); `by` is a power of two."""
    low, high = _tables(by)
    return low[words & 0xFFFF] ^ high[words >> 16]


@functools.cache
def _tables(by: int) -> tuple[np.ndarray, np.ndarray]:
    """The products of all low and all high halves of a word."""
    if by > 1:
        bits = _advanced(_advanced(np.uint32(1) << np.arange(32, dtype=np.uint32), by // 2), by // 2)
    else:
        bits = np.uint32(1) << np.arange(32, dtype=np.uint32)
        for _ in range(32):
            bits = (bits >> 1) ^ np.where(bits & 1, np.uint32(POLYNOMIAL), np.uint32(0))
    return _sums(bits[:16]), _sums(bits[16:])


def _sums(bits: np.ndarray) -> np.ndarray:
    """The sum of every subset of 16 words, numbered by the bits of its members."""
    table = np.zeros(1, np.uint32)
    for bit in bits:
        table = np.concatenate([table, table ^ bit])
    return table
