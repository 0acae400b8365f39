"""Vocabularies of other programs as tokenizer.json documents: SentencePiece (BPE and unigram), GPT-2, BERT.

SentencePiece merges the pair of neighbours whose union has the best score; `tokenizers` merges the pair of best rank.
Listing every split of every piece into two known ones, by the score of the piece, makes the two do the same.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tinylm.formats.tables import FormatError
from tinylm.store import PathLike
from tinylm.tokenizer import Tokenizer
from tinylm.vocabulary import BYTE_NAME, GPT4, LARGEST, QWEN, TokenizerError, marked, pair_of, parse

SPACE = "\u2581"  # SentencePiece's visible space
LONGEST = 256  # characters of one piece: all its splits are looked up, so work grows with the square
MOST = 2**20  # pieces
MERGES = 2**21  # Gemma's 256,000 pieces have 580,000
BAD = -1e5  # the score of what a unigram model must never find in a text

LEVEL: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
DIGITS: dict[str, Any] = {"type": "Digits", "individual_digits": True}


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


PATTERNS: dict[str, list[dict[str, Any]]] = {
    "gpt2": [LEVEL],
    "smollm": [DIGITS, LEVEL],
    "llama3": [_split(GPT4), {**LEVEL, "use_regex": False}],
    "qwen2": [_split(QWEN), {**LEVEL, "use_regex": False}],
}
"""How published byte-level tokenizers cut text into words, as pre-tokenizer steps; GPT-NeoX cuts as GPT-2 does."""


# --- the documents ----------------------------------------------------------------------------------------------------


def scored(
    pieces: Sequence[str],
    scores: Sequence[float],
    *,
    unknown: int | None,
    begin: int | None,
    end: int | None,
    bytes_at: Sequence[int] | None,
    control: Sequence[int] = (),
    user: Sequence[int] = (),
    add_prefix_space: bool = True,
) -> dict[str, Any]:
    """The tokenizer.json of a SentencePiece-BPE vocabulary.

    Args:
        pieces: text of each id; a space may be written " " or U+2581. scores: of each; the best is merged first.
        unknown, begin, end: their ids, None where there is none. control: more ids that no text ever becomes.
        bytes_at: the ids of the bytes 0 to 255, in this order, for characters without a piece. They are renamed to
            <0x00> .. <0xFF> whatever the file calls them: some repeat the text of an ordinary piece.
        user: ids whose text is always one token, found before anything is merged.
        add_prefix_space: a space is put in front of every text.

    Raises:
        FormatError: pieces that occur twice, are empty or too long; scores that are no numbers; ids out of range.
    """
    names, special, plain = _names(pieces, scores, unknown, begin, end, bytes_at, control, user)
    known = {names[i]: i for i in plain}
    merges = []
    for i in sorted(plain, key=lambda i: -scores[i]):
        piece = names[i]
        for at in range(1, len(piece)):
            left, right = piece[:at], piece[at:]
            if left in known and right in known:
                merges.append([left, right])
        if len(merges) > MERGES:
            raise FormatError(f"more than {MERGES:,} ways to merge {len(plain):,} pieces")
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None if unknown is None else names[unknown],
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": bytes_at is not None,
        "vocab": {name: i for i, name in enumerate(names)},
        "merges": merges,
    }
    return _spaced(model, names, special, user, add_prefix_space)


def unigram_scored(
    pieces: Sequence[str],
    scores: Sequence[float],
    *,
    unknown: int | None,
    begin: int | None,
    end: int | None,
    bytes_at: Sequence[int] | None,
    control: Sequence[int] = (),
    user: Sequence[int] = (),
    add_prefix_space: bool = True,
) -> dict[str, Any]:
    """The tokenizer.json of a SentencePiece-unigram vocabulary: scores are log-probabilities. As `scored` otherwise."""
    names, _, plain = _names(pieces, scores, unknown, begin, end, bytes_at, control, user)
    if unknown is None:
        raise FormatError("a unigram vocabulary needs an unknown piece")
    special = {i for i in (unknown, begin, end, *control) if i is not None}
    ordinary = set(plain)
    model = {
        "type": "Unigram",
        "unk_id": unknown,
        "vocab": [[name, float(scores[i]) if i in ordinary else BAD] for i, name in enumerate(names)],
        "byte_fallback": bytes_at is not None,
    }
    document = _spaced(model, names, special, user, add_prefix_space)
    if bytes_at is not None:  # the text "<0x41>" must not become the byte 0x41: cut where only a byte's name reaches
        document["pre_tokenizer"] = _split(BYTE_NAME)
    return document


def merged(
    vocab: Mapping[str, int],
    merges: Sequence[str | Sequence[str]],
    specials: Iterable[str] | Mapping[str, int],
    pattern: str = "gpt2",
    *,
    plain: Mapping[str, int] | None = None,
    add_prefix_space: bool = False,
    nfc: bool = False,
) -> dict[str, Any]:
    """The tokenizer.json of a byte-level BPE vocabulary (GPT-2 kind).

    Args:
        vocab: name in byte symbols -> id, as in vocab.json. merges: as in merges.txt, best first.
        specials: names of the special tokens in `vocab`, or name -> id.
        pattern: a key of `PATTERNS`.
        plain: added tokens that ordinary text may become, name -> id (GPT-NeoX's runs of spaces).
        add_prefix_space: a space is put in front of every text. nfc: text is composed first (Qwen, GPT-NeoX).

    Raises:
        FormatError: a pattern or a special token that is not known.
    """
    if pattern not in PATTERNS:
        raise FormatError(f"words are cut by the pattern {pattern!r}: known are {', '.join(PATTERNS)}")
    if not isinstance(specials, Mapping):
        names = list(specials)
        if missing := [name for name in names if name not in vocab]:
            raise FormatError(f"special tokens {missing} are not in the vocabulary")
        specials = {name: vocab[name] for name in names}
    steps = [{**step, "add_prefix_space": add_prefix_space} if step is LEVEL else step for step in PATTERNS[pattern]]
    added = [_added(i, name, True) for name, i in specials.items()]
    added += [_added(i, name, False) for name, i in (plain or {}).items()]
    outside = {token["content"] for token in added} - vocab.keys()
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": pattern == "llama3",
        "vocab": {**vocab, **{t["content"]: t["id"] for t in added if t["content"] in outside}},
        "merges": [list(pair_of(merge)) for merge in merges],
    }
    return _document(
        model,
        added,
        normalizer={"type": "NFC"} if nfc else None,
        pre_tokenizer=steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps},
        decoder=dict(LEVEL),
    )


def wordpieces(vocab: Sequence[str], lowercase: bool) -> dict[str, Any]:
    """The tokenizer.json of BERT's vocab.txt, one piece per id; `lowercase` also drops accents, as BERT does.

    Raises FormatError for a piece that occurs twice, or without [UNK].
    """
    _once(vocab)
    if "[UNK]" not in vocab:
        raise FormatError("the vocabulary has no [UNK]: it is not BERT's kind")
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    model = {
        "type": "WordPiece",
        "unk_token": "[UNK]",
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100,
        "vocab": {name: i for i, name in enumerate(vocab)},
    }
    bert = {"clean_text": True, "handle_chinese_chars": True, "strip_accents": None, "lowercase": lowercase}
    return _document(
        model,
        [_added(i, name, True) for i, name in enumerate(vocab) if name in special],
        normalizer={"type": "BertNormalizer", **bert},
        pre_tokenizer={"type": "BertPreTokenizer"},
        decoder={"type": "WordPiece", "prefix": "##", "cleanup": True},
    )


def _names(
    pieces: Sequence[str],
    scores: Sequence[float],
    unknown: int | None,
    begin: int | None,
    end: int | None,
    bytes_at: Sequence[int] | None,
    control: Sequence[int],
    user: Sequence[int],
) -> tuple[list[str], set[int], list[int]]:
    """Each id's name, the special ids, and the ids that text becomes by merging."""
    count = len(pieces)
    special = {i for i in (unknown, begin, end, *control) if i is not None}
    at = [] if bytes_at is None else list(bytes_at)
    if not 0 < count <= MOST or len(scores) != count:
        raise FormatError(f"{count:,} pieces with {len(scores):,} scores: 1 to {MOST:,} are expected, a score for each")
    if wrong := [i for i in (*special, *at, *user) if not 0 <= i < count]:
        raise FormatError(f"id {wrong[0]} is outside the vocabulary of {count:,} pieces")
    if bytes_at is not None and (len(at) != 256 or len({*at, *special}) != 256 + len(special)):
        raise FormatError(f"{len(at)} ids of bytes are given: 256 different ones are needed, none of them special")
    names = [piece.replace(" ", SPACE) if i not in special else piece for i, piece in enumerate(pieces)]
    for byte, i in enumerate(at):
        names[i] = f"<0x{byte:02X}>"
    _once(names)
    for i, (name, score) in enumerate(zip(names, scores, strict=True)):
        if not 0 < len(name) <= LONGEST:
            raise FormatError(f"piece {i} has {len(name):,} characters: 1 to {LONGEST} are allowed")
        if not math.isfinite(score):
            raise FormatError(f"piece {i} ({name[:40]!r}) has the score {score}")
    apart = {*special, *at, *user}
    return names, special, [i for i in range(count) if i not in apart]


def _once(names: Sequence[str]) -> None:
    seen: dict[str, int] = {}
    for i, name in enumerate(names):
        if seen.setdefault(name, i) != i:
            raise FormatError(f"the piece {name[:40]!r} occurs twice, as ids {seen[name]} and {i}")


def _spaced(model: dict, names: Sequence[str], special: set[int], user: Sequence[int], prefix: bool) -> dict[str, Any]:
    """A whole document around a SentencePiece model: spaces become U+2581, with one in front where `prefix`."""
    if user and prefix:
        raise FormatError(f"{len(user)} pieces of the user's beside a space in front of each text: not supported")
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    steps = [{"type": "Prepend", "prepend": SPACE}, replace] if prefix else [replace]
    back = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"}]
    back += [{"type": "Fuse"}, *([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else [])]
    added = [_added(i, names[i], True) for i in sorted(special)]
    added += [_added(i, names[i].replace(SPACE, " "), False) for i in user]
    return _document(
        model,
        sorted(added, key=lambda token: token["id"]),
        normalizer={"type": "Sequence", "normalizers": steps},
        pre_tokenizer=None,
        decoder={"type": "Sequence", "decoders": back},
    )


def _added(i: int, content: str, special: bool) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}
    return {"id": i, "content": content, **flags}


def _document(model: dict[str, Any], added: list[dict[str, Any]], **parts: Any) -> dict[str, Any]:
    head = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added}
    return {**head, "post_processor": None, **parts, "model": model}


# --- SentencePiece's file ---------------------------------------------------------------------------------------------

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)  # types of pieces in sentencepiece_model.proto
KINDS = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}


def sentencepiece(path: PathLike) -> dict[str, Any]:
    """The tokenizer.json of a tokenizer.model, BPE or unigram.

    Raises FormatError, with the file's name, for a file that is damaged, and for vocabularies of words or characters,
    normalisation other than the identity, and spaces that are removed or put behind a word.
    """
    path = Path(path)
    raw = limited(path)
    try:
        return _model(raw)
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from None


def _model(raw: bytes) -> dict[str, Any]:
    pieces, scores, types = [], [], []
    trainer, normalizer = b"", b""
    for field, value in _fields(raw):
        if field == 1:
            piece = dict(_fields(_message(value)))
            pieces.append(_text(piece.get(1, b"")))
            scores.append(_float(piece.get(2, bytes(4))))
            types.append(_count(piece.get(3, NORMAL)))
            if len(pieces) > MOST:
                raise FormatError(f"more than {MOST:,} pieces")
        elif field == 2:
            trainer = _message(value)
        elif field == 3:
            normalizer = _message(value)
    if not pieces:
        raise FormatError("it holds no pieces; is it a SentencePiece model?")
    how, rules = dict(_fields(trainer)), dict(_fields(normalizer))
    kind = KINDS.get(_count(how.get(3, 1)), "unknown")
    problems = []
    if kind not in ("bpe", "unigram"):
        problems.append(f"its model is of kind {kind!r}, and known are 'bpe' and 'unigram'")
    if rules.get(2):
        problems.append(f"it normalises text by {_text(rules.get(1, b''))[:40]!r}, and known is 'identity'")
    if rules.get(4, 1):
        problems.append("it removes spaces (remove_extra_whitespaces)")
    if not rules.get(5, 1) or how.get(24, 0):
        problems.append("it keeps spaces as they are, or behind words")
    if problems:
        raise FormatError(f"{'; '.join(problems)}. Convert it to a tokenizer.json and read that")
    where = lambda *wanted: [i for i, t in enumerate(types) if t in wanted]  # noqa: E731
    unknown = where(UNKNOWN)
    begin, end = (_signed(how.get(field, default)) for field, default in ((41, 1), (42, 2)))
    controls = where(CONTROL)
    make = scored if kind == "bpe" else unigram_scored
    document = make(
        pieces,
        scores,
        unknown=unknown[0] if unknown else None,
        begin=begin if begin in controls else None,
        end=end if end in controls else None,
        bytes_at=bytes_among(pieces, types),
        control=[*controls, *unknown[1:], *where(UNUSED)],
        user=where(USER),
        add_prefix_space=bool(rules.get(3, 1)),
    )
    return marked(document, {role: i for role, i in (("begin", begin), ("end", end)) if i in controls})


def bytes_among(names: Sequence[str], types: Sequence[int]) -> list[int] | None:
    """The ids of the bytes 0 to 255 by the types of SentencePiece's proto; None where the vocabulary has none."""
    known = {names[i]: i for i, kind in enumerate(types) if kind == BYTE}
    found = [known.get(f"<0x{byte:02X}>", -1) for byte in range(256)]
    if known and (-1 in found or types.count(BYTE) != 256):
        raise FormatError(f"{types.count(BYTE)} pieces stand for bytes: all 256 are needed, or none")
    return found if known else None


def _fields(raw: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of one protobuf message: (number, whole number or bytes)."""
    at = 0
    while at < len(raw):
        key, at = _varint(raw, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(raw, at)
            yield number, value
            continue
        if wire == 2:
            size, at = _varint(raw, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise FormatError(f"byte {at} begins a field of wire type {wire}: damaged, or not a SentencePiece model")
        if size > len(raw) - at:
            raise FormatError(f"a field of {size:,} bytes at byte {at} ends behind the {len(raw):,} there are")
        yield number, raw[at : at + size]
        at += size


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(raw):
            break
        value |= (raw[at] & 127) << shift
        at += 1
        if raw[at - 1] < 128:
            return value, at
    raise FormatError(f"a number that does not end at byte {at}: damaged, or not a SentencePiece model")


def _message(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise FormatError("a number stands where a message should: damaged, or not a SentencePiece model")
    return value


def _text(value: int | bytes) -> str:
    try:
        return _message(value).decode()
    except UnicodeDecodeError as error:
        raise FormatError(f"a piece is not UTF-8 ({error.reason})") from None


def _float(value: int | bytes) -> float:
    if isinstance(value, int) or len(value) != 4:
        raise FormatError("a score is not a 32-bit float: damaged, or not a SentencePiece model")
    score = struct.unpack("<f", value)[0]
    return score if math.isfinite(score) else math.nan


def _count(value: int | bytes) -> int:
    if not isinstance(value, int):
        raise FormatError("bytes stand where a number should: damaged, or not a SentencePiece model")
    return value


def _signed(value: int | bytes) -> int:
    value = _count(value)
    return value - 2**64 if value >= 2**63 else value


# --- a folder ---------------------------------------------------------------------------------------------------------

SPECIALS = ("<|endoftext|>", "<s>", "</s>", "<pad>", "<unk>", "<mask>")  # what vocab.json files hold


def tokenizer_of(folder: PathLike) -> Tokenizer | None:
    """The tokenizer of a Hugging Face folder, None when it has none.

    Looked for in this order: tokenizer.json, tokenizer.model, vocab.json with merges.txt, vocab.txt.

    Raises FormatError, with the file's name, for a file that is damaged or says what is not known here.
    """
    folder = Path(folder)
    if (file := folder / "tokenizer.json").is_file():
        return load(lambda: parse(_utf8(file)), file)
    if (file := folder / "tokenizer.model").is_file():
        return load(lambda: sentencepiece(file), file)
    if (file := folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return load(lambda: _gpt2(folder), file)
    if (file := folder / "vocab.txt").is_file():
        return load(lambda: _bert(folder), file)
    return None


def load(document: Callable[[], dict[str, Any]], path: PathLike) -> Tokenizer:
    """A tokenizer from a document above. Raises FormatError that names the file `path` it came from."""
    try:
        return Tokenizer(document())
    except (TokenizerError, FormatError) as error:
        known = str(error).startswith(str(Path(path).parent))
        raise FormatError(str(error) if known else f"{path}: {error}") from None


def _gpt2(folder: Path) -> dict[str, Any]:
    vocab = parse(_utf8(folder / "vocab.json"))
    lines = _utf8(folder / "merges.txt").splitlines()
    merges = [line for line in lines if line.strip() and not line.startswith("#version")]
    specials = {name: vocab[name] for name in SPECIALS if name in vocab} | _json(folder / "added_tokens.json")
    prefix = _json(folder / "tokenizer_config.json").get("add_prefix_space", False)
    return merged(vocab, merges, specials, add_prefix_space=prefix is True)


def _bert(folder: Path) -> dict[str, Any]:
    pieces = [line.rstrip("\r") for line in _utf8(folder / "vocab.txt").rstrip("\r\n").split("\n")]
    return wordpieces(pieces, _json(folder / "tokenizer_config.json").get("do_lower_case", True) is not False)


def _json(path: Path) -> dict[str, Any]:
    """Of a file that may be missing."""
    try:
        return parse(_utf8(path)) if path.is_file() else {}
    except TokenizerError as error:
        raise FormatError(f"{path}: {error}") from None


def _utf8(path: Path) -> str:
    try:
        return limited(path).decode()
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: not UTF-8 at byte {error.start}") from None


def limited(path: Path) -> bytes:
    """The bytes of a vocabulary file. Raises FormatError when it is missing, no file, or too large to be one."""
    try:
        if not path.is_file():
            raise FormatError(f"{path}: there is no such file")
        if (size := path.stat().st_size) > LARGEST:
            raise FormatError(f"{path}: {size:,} bytes, and a vocabulary has at most {LARGEST:,}")
        return path.read_bytes()
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror or error}") from None
