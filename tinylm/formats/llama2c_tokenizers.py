"""llama2.c's tokenizer.bin: int32 longest piece, then for each id a float32 score, an int32 length and the bytes.

The program knows ids by their places: 1 begins a text and ends it, 3 to 258 are the bytes. It puts a space in front of
every prompt, then merges the neighbours whose union has the best score, across words. Bytes that stand for themselves,
instead of being called <0x00> to <0xFF>, take part in merging: so a byte-level tokenizer can be said, too.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import struct
import warnings
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tinylm.formats import pieces
from tinylm.formats.tables import FormatError
from tinylm.store import PathLike
from tinylm.tokenizer import Tokenizer
from tinylm.vocabulary import LARGEST, SYMBOLS, pair_of

UNKNOWN, BEGIN, END, BYTES = 0, 1, 2, range(3, 259)  # ids that the program knows
NEVER = -1e10  # a score that the program never merges to
SLACK = 16 * 2**20  # bytes that any compressed file may unpack to; beyond, twice its own size


# --- reading ----------------------------------------------------------------------------------------------------------


def read_tokenizer(path: PathLike, vocab: int) -> Tokenizer:
    """A tokenizer.bin of `vocab` pieces (the file does not say how many), plain or gzipped.

    SentencePiece's kind gives a tokenizer that puts a space before each text, as SentencePiece and llama2.c do. The
    kind that `tokenizer_file` makes of a byte-level one, known by bytes that stand for themselves, gives one that cuts
    words as GPT-2 does, with no space in front, as the model was trained. `end` is `begin`: llama2.c knows no other.

    Raises FileNotFoundError, and FormatError, with the file's name, for a file that is damaged or has another number
    of pieces.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no tokenizer {str(path)!r}")
    return pieces.load(lambda: _document(*_entries(path, vocab)), path)


def beside(path: Path, vocab: int) -> Tokenizer | None:
    """The tokenizer beside the model `path`: its own, else tokenizer.bin, else the only tok*.bin that fits.

    Warns where there are only files that do not fit, or several that do. Raises FormatError where its own does not fit.
    """
    for file in own_files(path):
        if file.is_file():
            try:
                return read_tokenizer(file, vocab)
            except FormatError as error:
                remedy = "give the right one (tokenizer=PATH), or read the model alone (tokenizer=False)"
                raise FormatError(f"{error}. It lies beside {path.name}: {remedy}") from None
    usual = _and_packed(path.with_name("tokenizer.bin"))
    loose = sorted(file for end in ("bin", "bin.gz") for file in path.parent.glob(f"tok*.{end}"))
    others = (".tokenizer.bin", ".tokenizer.bin.gz")  # another model's own
    seen, fits = [], {}
    for file in dict.fromkeys((*usual, *(file for file in loose if not file.name.endswith(others)))):
        if file != path and file.is_file():
            seen.append(file.name)
            with contextlib.suppress(FormatError):
                fits[file.name] = found = read_tokenizer(file, vocab)
                if file in usual:
                    return found
    alike = [found for found in fits.values() if found == next(iter(fits.values()))]
    if alike and len(alike) == len(fits):  # one, or copies of it
        return alike[0]
    if seen:
        what = f"{', '.join(fits)} all fit" if fits else f"no tokenizer beside it fits ({', '.join(seen)})"
        remedy = "name one (tokenizer=PATH), or say that there is none (tokenizer=False)"
        warnings.warn(f"{path}: {what}, so the model has none: {remedy}", stacklevel=3)
    return None


def tokenizer_path(path: PathLike) -> Path:
    """Where `llama2c.write` puts the tokenizer of the model `path`: story.tokenizer.bin beside story.bin."""
    stem = Path(path).name.removesuffix(".gz").removesuffix(".bin")
    return Path(path).with_name(f"{stem}.tokenizer.bin")


def own_files(path: PathLike) -> tuple[Path, Path]:
    """The names under which a tokenizer belongs to the model `path` alone: `tokenizer_path`, plain and gzipped."""
    return _and_packed(tokenizer_path(path))


def _and_packed(path: Path) -> tuple[Path, Path]:
    return path, path.with_name(f"{path.name}.gz")


def _entries(path: Path, vocab: int) -> tuple[list[bytes], list[float]]:
    raw = pieces.limited(path)
    if path.suffix == ".gz":
        try:
            with gzip.open(path) as file:
                raw = file.read(min(LARGEST, 2 * len(raw) + SLACK) + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise FormatError(f"{path} cannot be read: {error}") from None
    texts, scores, at = [], [], 4
    for i in range(vocab):
        if len(raw) - at < 8:
            raise FormatError(f"it ends before piece {i} of the {vocab:,} that the model has: another model's, or cut")
        score, length = struct.unpack_from("<fi", raw, at)
        at += 8
        if not 0 < length <= len(raw) - at:
            raise FormatError(f"piece {i} is of {length:,} bytes: another model's, or damaged")
        texts.append(raw[at : at + length])
        scores.append(score)
        at += length
    if at != len(raw):
        raise FormatError(f"{len(raw) - at:,} bytes follow the {vocab:,} pieces that the model has: another model's")
    return texts, scores


def _document(texts: Sequence[bytes], scores: Sequence[float]) -> dict[str, Any]:
    if len(texts) <= BYTES[-1]:
        raise FormatError(f"{len(texts)} pieces are too few: ids up to {BYTES[-1]} have fixed places")
    never = [i for i, score in enumerate(scores) if score <= NEVER and i > BYTES[-1]]
    if all(texts[i] == bytes([byte]) for byte, i in enumerate(BYTES)):
        return _byte_level(texts, scores, [UNKNOWN, BEGIN, END, *never])
    names = ["" if i in BYTES else _text(text, i) for i, text in enumerate(texts)]
    names[BEGIN] = names[BEGIN].strip()  # "\n<s>\n" in newer files
    names[END] = f"\n{names[END].strip()}\n"  # a name that gives it no role
    control = [END, *never]
    return pieces.scored(names, scores, unknown=UNKNOWN, begin=BEGIN, end=None, bytes_at=BYTES, control=control)


def _byte_level(texts: Sequence[bytes], scores: Sequence[float], special: list[int]) -> dict[str, Any]:
    names = ["".join(SYMBOLS[byte] for byte in text) for text in texts]
    for i in special:
        names[i] = _text(texts[i], i)
    model = pieces.scored(names, scores, unknown=None, begin=None, end=None, bytes_at=None, control=special)["model"]
    return pieces.merged(model["vocab"], model["merges"], {names[i]: i for i in special})


def _text(raw: bytes, i: int) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise FormatError(f"piece {i}, {raw[:20]!r}, is not UTF-8") from None


# --- writing ----------------------------------------------------------------------------------------------------------


def tokenizer_file(tokenizer: Tokenizer, vocab: int) -> tuple[bytes, np.ndarray]:
    """The bytes of a tokenizer.bin of `vocab` pieces, and the order (vocab,): our id at each of its places.

    Pieces are scored by the rank of the first merge that makes them.

    Raises FormatError for WordPiece and unigram, for text that is changed or cut in ways the program has nothing for,
    and for a token that holds the byte 0, which ends a text in C.
    """
    raw = json.loads(tokenizer.to_json())
    model, spaced = raw["model"], not tokenizer.lossless
    _require(tokenizer, raw)
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(model["merges"]):
        ranks.setdefault("".join(pair_of(pair)), rank)
    known = {name: i for i, name in enumerate(tokenizer.names)}
    bytes_at = [known[name] for byte in range(256) if (name := f"<0x{byte:02X}>" if spaced else SYMBOLS[byte]) in known]
    if len(bytes_at) < 256:
        raise FormatError(f"llama2.c needs a token for every byte, and this tokenizer lacks {256 - len(bytes_at)}")
    order = _order(tokenizer, model.get("unk_token"), bytes_at, vocab)
    special, fixed = set(tokenizer.specials.values()), set(bytes_at)
    entries, longest = [], 0
    for place, i in enumerate(order):
        if i >= tokenizer.vocab:  # an id that only fills the embedding
            text, score = f"<|unused {i}|>".encode(), NEVER
        elif i in special or (spaced and i in fixed):
            name = tokenizer.names[i]
            text, score = (f"\n{name.strip()}\n" if spaced and place in (BEGIN, END) else name).encode(), NEVER
        else:
            text = tokenizer.token_bytes[i]
            score = NEVER if i in fixed else -float(ranks.get(tokenizer.names[i], len(ranks)))
        if b"\0" in text and text != b"\0":
            raise FormatError(f"token {i}, {text[:20]!r}, holds the byte 0, which ends a text for llama2.c")
        entries.append(struct.pack("<fi", score, len(text)) + text)
        longest = max(longest, len(text))
    return struct.pack("<i", longest) + b"".join(entries), np.array(order)


def _require(tokenizer: Tokenizer, raw: Mapping[str, Any]) -> None:
    """Raises FormatError unless this is SentencePiece's BPE with a space in front, or a byte-level one cut as GPT-2."""
    if raw["model"]["type"] != "BPE":
        raise FormatError(f"llama2.c merges pairs, and this tokenizer is {tokenizer.kind}: train one of kind 'bpe'")
    level, cut = pieces.PATTERNS["gpt2"][0], raw.get("pre_tokenizer") or {}
    spaced = pieces.scored(["a"], [0.0], unknown=None, begin=None, end=None, bytes_at=None)["normalizer"]
    if tokenizer.lossless:
        known = {**level, **cut} == level
    else:
        known = raw.get("normalizer") == spaced and not cut and raw["model"].get("byte_fallback")
    if not known:
        raise FormatError("llama2.c knows SentencePiece's and GPT-2's way with text, and this tokenizer has another")
    if tokenizer.begin is None:
        raise FormatError("llama2.c begins every text with one token, and this tokenizer has no begin or end token")


def _order(tokenizer: Tokenizer, unknown: str | None, bytes_at: Sequence[int], vocab: int) -> list[int]:
    """Our id at each place: unknown or padding, begin, another special one, bytes, pieces, the rest of the specials."""
    special = list(tokenizer.specials.values())
    first = tokenizer.specials.get(unknown or "", tokenizer.pad)
    wanted = [tokenizer.end, tokenizer.mask, *special, *range(tokenizer.vocab, vocab)]
    spare = list(dict.fromkeys(i for i in wanted if i is not None and i not in (tokenizer.begin, first)))
    if first is None and spare:
        first = spare.pop()
    if first is None or tokenizer.begin is None or not spare:
        raise FormatError(
            f"llama2.c has three special tokens, and this tokenizer {len(special)}: give the model two ids more than "
            "the tokenizer, and they will take the places"
        )
    head = [first, tokenizer.begin, spare[0], *bytes_at]
    rest = sorted(set(range(vocab)) - set(head), key=lambda i: (i in special, i))
    return [*head, *rest]
