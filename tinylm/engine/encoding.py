"""Which tokenizers native code encodes with, and what it needs to know of them: the tensor "merges".

    "words"     byte-level BPE behind GPT-2's pattern, as `Tokenizer.train` makes it. Native code knows what Latin
                characters, their punctuation and pictures are to the pattern (letters, numbers, spaces); texts with
                others go to the `tokenizers` library, as do all texts of tokenizers of other kinds.
    "spaces"    BPE over characters with a byte fallback, as SentencePiece and llama2.c have it
    bytes       a token per byte

The tensor is of 32-bit words, little-endian:

    u32 rules (sum of `Rule`), characters, merges, 0
    u32 ids of the 256 bytes
    u32 (code point, id) of each character that has a token, ascending; none of them under "words"
    u32 (left, right, result) of each merge, the most urgent first
"""

from __future__ import annotations

import enum
import json
from typing import TYPE_CHECKING, Any

import numpy as np

from tinylm.engine.layout import Flaw

if TYPE_CHECKING:
    from tinylm.tokenizer import Tokenizer

HEAD = 4 + 256
SPACE = "\u2581"
CODES = 0x110000


class Rule(enum.IntFlag):
    """How a text becomes the symbols that are merged; without any it is its bytes, all of them one word."""

    words = 1
    """GPT-2's pattern cuts it into words, whose bytes are the symbols."""
    spaces = 2
    """Characters are the symbols, a space being U+2581; those without a token are their bytes."""
    front = 4
    """A U+2581 comes in front."""
    front_once = 8
    """But not where the text begins with one."""
    each_space = 16
    """A word begins at every U+2581; else the text is one word."""


def merges(tokenizer: Tokenizer) -> bytes | None:
    """The tensor's bytes, or None for a tokenizer of another kind."""
    from tinylm.vocabulary import SYMBOLS

    raw = json.loads(tokenizer.to_json())
    model, added = raw["model"], raw.get("added_tokens") or []
    if model["type"] != "BPE" or model.get("ignore_merges") or not all(t["special"] for t in added):
        return None
    vocab, rules = model["vocab"], _rules(tokenizer.kind, raw)
    symbols = [f"<0x{byte:02X}>" for byte in range(256)] if rules and rules & Rule.spaces else SYMBOLS
    if rules is None or not all(name in vocab for name in symbols):
        return None
    characters = np.zeros((0, 2), "<u4")
    if rules & Rule.spaces:
        # A single character that was added may be a symbol of the library's, too, or not: that is its own affair.
        if SPACE not in vocab or any(len(t["content"]) == 1 for t in added):
            return None
        characters = np.array(sorted((ord(name), i) for name, i in vocab.items() if len(name) == 1), "<u4")
    ranks = dict(enumerate(_pairs(model["merges"])))
    last = {pair: rank for rank, pair in ranks.items()}  # of a pair that comes twice the last counts
    pairs = [pair for rank, pair in ranks.items() if last[pair] == rank]
    triples = np.array([(vocab[a], vocab[b], vocab[a + b]) for a, b in pairs], "<u4")
    parts = [
        np.array([rules, len(characters), len(pairs), 0], "<u4"),
        np.array([vocab[name] for name in symbols], "<u4"),
        characters,
        triples,
    ]
    return b"".join(part.tobytes() for part in parts)


def _pairs(listed: list) -> list[tuple[str, str]]:
    from tinylm.vocabulary import pair_of

    return [tuple(pair_of(merge)) for merge in listed]


def _rules(kind: str, raw: dict[str, Any]) -> Rule | None:
    """The rules of a tokenizer.json, None: there are none for it here."""
    if kind == "byte":
        return Rule(0)
    normalizers = _steps(raw.get("normalizer"), "normalizers")
    splits = _steps(raw.get("pre_tokenizer"), "pretokenizers")
    if [step["type"] for step in splits] == ["ByteLevel"] and not normalizers:
        level = splits[0]
        return Rule.words if level.get("use_regex", True) and not level["add_prefix_space"] else None
    if not raw["model"].get("byte_fallback"):
        return None
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = {"type": "Prepend", "prepend": SPACE}
    if not splits:
        known = {1: ([replace], Rule.spaces), 2: ([prepend, replace], Rule.spaces | Rule.front)}
        steps, rules = known.get(len(normalizers), (None, None))
        return rules if normalizers == steps else None
    if normalizers or [step["type"] for step in splits] != ["Metaspace"]:
        return None
    scheme = splits[0].get("prepend_scheme", "always")
    front = Rule(0) if scheme == "never" else Rule.front | Rule.front_once
    return Rule.spaces | front | (Rule.each_space if splits[0].get("split", True) else Rule(0))


def _steps(part: dict[str, Any] | None, plural: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, a Sequence unrolled."""
    return [] if part is None else part[plural] if part["type"] == "Sequence" else [part]


def check(data: np.ndarray, known: int) -> None:
    """Raise Flaw unless these bytes (size,) are the tensor of a tokenizer of `known` tokens."""
    words = data[: len(data) // 4 * 4].view("<u4")
    if len(data) % 4 or len(words) < HEAD:
        raise Flaw("its merges end too soon")
    rules, characters, count, zero = (int(x) for x in words[:4])
    middle = HEAD + 2 * characters
    if zero or len(words) != middle + 3 * count:
        raise Flaw(f"its merges are not {characters:,} characters and {count:,} merges")
    codes = words[HEAD:middle].reshape(-1, 2)[:, 0].astype(np.int64)
    ids = np.concatenate([words[4:HEAD], words[HEAD + 1 : middle : 2], words[middle:]])
    spaced = bool(rules & Rule.spaces)
    good = rules < 32 and not rules & Rule.words if spaced else rules <= Rule.words and not characters
    if not good or (spaced and ord(SPACE) not in codes):
        raise Flaw(f"its merges follow rules ({rules}) that are not known")
    if (ids >= known).any() or (np.diff(codes) <= 0).any() or (codes >= CODES).any():
        raise Flaw("its merges hold ids or characters that there are not")
