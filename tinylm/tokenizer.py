"""Text to token ids and back, byte for byte: BPE, WordPiece, unigram or plain bytes, all over the 256 byte symbols.

Training and encoding are done by the `tokenizers` library; decoding is our own join of `token_bytes`, so it is exact
and bytes per token can be counted. A tokenizer.json goes through `vocabulary.check` before the library sees it: the
loader panics on 4 % and aborts the process on 2 % of damaged files (tokenizers#2094, #2151, #2198).
"""

from __future__ import annotations

import codecs
import contextlib
import copy
import dataclasses
import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import tokenizers

from tinylm.reading import regular
from tinylm.vocabulary import ALONE, ROLES, SYMBOLS, Checked, TokenizerError, check, marked, parse, require

Kind = Literal["bpe", "wordpiece", "unigram", "byte"]
SPECIALS = ("<|endoftext|>", "<|pad|>", "<|mask|>", "<|cls|>", "<|sep|>")
CONTINUES = "##"  # WordPiece's mark of a piece inside a word
LONGEST = 2**18  # characters of one text handed to the library at once: it takes ~100 bytes of memory per token
AT_ONCE = 2**21  # characters of all texts


@dataclasses.dataclass(frozen=True)
class RoundTrip:
    """What `Tokenizer.round_trip` found: `failures` documents came back with other bytes, up to 5 as `examples`."""

    documents: int
    bytes: int
    tokens: int
    failures: int
    examples: tuple[str, ...]

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of the raw text per token (not of the decoded text)."""
        return self.bytes / self.tokens if self.tokens else math.nan


class Tokenizer:
    """An immutable tokenizer; equal and hashed by `sha256`, so it can be a static attribute of a model.

    Attributes:
        vocab: number of ids, 0 .. vocab - 1.
        kind: "bpe", "wordpiece", "unigram" or "byte".
        lossless: decode(encode(text)) == text for every valid text. False for foreign tokenizers that lower-case,
            normalise or add spaces: count their bytes on the raw text, never through `token_bytes`.
        names: the vocabulary's string of each id.
        token_bytes: the raw bytes each id stands for; b"" for special tokens.
        byte_lengths: (vocab,) int32, their lengths.
        specials: string -> id of the special tokens. They never come out of user text.
        begin, end: ids before and after every text; one and the same in our own tokenizers, and where a foreign one has
            but one of them; None where it has neither.
        pad, mask, cls, sep: ids by role, None when a foreign tokenizer lacks one. Roles follow from an entry "roles" of
            an added token, else from the names of the special tokens.
        prefix: what encoding puts in front of every text, so decoding gives it back: b" " for SentencePiece's, or b"".
        sha256: of the canonical json (key order and spacing do not matter).
    """

    SPECIALS = SPECIALS
    vocab: int
    kind: Kind
    lossless: bool
    names: tuple[str, ...]
    token_bytes: tuple[bytes, ...]
    byte_lengths: np.ndarray
    specials: dict[str, int]
    begin: int | None
    end: int | None
    pad: int | None
    mask: int | None
    cls: int | None
    sep: int | None
    prefix: bytes
    sha256: str
    _raw: dict[str, Any]
    _rust: tokenizers.Tokenizer
    _lookup: np.ndarray | None
    _cuttable: bool

    def __init__(self, raw: dict[str, Any]) -> None:
        checked = check(raw)
        model = raw["model"]
        merges = model.get("merges", [])
        lookup = None
        if checked.byte_level and model["type"] == "BPE" and not merges and all(s in model["vocab"] for s in SYMBOLS):
            lookup = np.array([model["vocab"][s] for s in SYMBOLS], np.int32)
        lengths = np.array([len(c) for c in checked.content], np.int32)
        lengths.flags.writeable = False
        canonical = json.dumps(raw, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
        values = {
            "_raw": raw,
            "_lookup": lookup,
            "_cuttable": checked.cuttable,
            "_rust": _rust("loading", tokenizers.Tokenizer.from_str, json.dumps(checked.encoder)),
            "vocab": len(checked.names),
            "kind": "byte" if lookup is not None else model["type"].lower(),
            "names": checked.names,
            "token_bytes": checked.content,
            "byte_lengths": lengths,
            "specials": dict(checked.specials),
            "prefix": checked.prefix,
            "sha256": hashlib.sha256(canonical.encode()).hexdigest(),
        }
        for name, value in (values | checked.roles).items():
            object.__setattr__(self, name, value)
        self._rust.encode_special_tokens = True  # "<|endoftext|>" in the text is thirteen characters like any others
        self._prove(checked)

    def _prove(self, checked: Checked) -> None:
        """The library must number the tokens as we do, and no text may become a special token."""
        for name, i in checked.added.items():
            if self._rust.token_to_id(name) != i:
                raise TokenizerError(
                    f"the id of added token {name!r} is {i}, but it follows the vocabulary at another id"
                )
        if self._rust.get_vocab_size() != self.vocab:
            raise TokenizerError(f"{self._rust.get_vocab_size()} tokens in use, {self.vocab} in the file")
        object.__setattr__(self, "lossless", False)
        model = self._raw["model"]
        unknown = (model.get("unk_token"), self.names[model["unk_id"]] if model.get("unk_id") is not None else None)
        for name, i in checked.specials.items():
            if name not in unknown and i in self.encode(f"{name} {name}{name} b"):
                raise TokenizerError(f"the text {name!r} becomes special token {i}: user text could forge it")
        if checked.lossless:
            probe = "".join(map(chr, range(0x250))) + "##é <|endoftext|>\r\n  \u2003语🦙\u200d\U0010fffd\x00 Hello' s"
            object.__setattr__(self, "lossless", self.decode_bytes(self.encode(probe)) == probe.encode())

    # ---- made, loaded, saved

    @classmethod
    def train(cls, docs: Iterable[str], *, vocab: int = 4096, kind: str = "bpe") -> Tokenizer:
        """Learn a vocabulary from documents; deterministic. Fewer than `vocab` tokens result when the text is small.

        Raises TokenizerError when `docs` holds no text or `vocab` leaves no room for the special tokens and the bytes:
        261 for bpe and unigram, 517 for wordpiece (each byte also inside a word); "byte" always has 261.
        """
        if kind not in get_args(Kind):
            raise TokenizerError(f"kind = {kind!r}: must be one of {', '.join(get_args(Kind))}")
        if kind == "byte":
            return cls(_document({"type": "BPE", "vocab": _numbered([*SPECIALS, *SYMBOLS]), "merges": []}))
        least = len(SPECIALS) + 256 * (2 if kind == "wordpiece" else 1)
        if vocab < least:
            raise TokenizerError(f"vocab = {vocab}: {kind} needs at least {least} (5 special tokens and every byte)")
        if isinstance(docs, str):
            raise TokenizerError("train takes documents (an iterable of texts), not one text: wrap it in a list")
        words = _words(docs)
        if not words:
            raise TokenizerError("no text to train a tokenizer on")
        return cls(_document({"bpe": _bpe, "wordpiece": _wordpiece, "unigram": _unigram}[kind](words, vocab)))

    @classmethod
    def from_json(cls, text: str) -> Tokenizer:
        """From the text of a tokenizer.json, which is checked first. Raises TokenizerError with the reason."""
        return cls(parse(text))

    @classmethod
    def load(cls, path: str | os.PathLike) -> Tokenizer:
        """From a tokenizer.json or a folder that holds one. Raises TokenizerError, or FileNotFoundError."""
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.exists():
            raise FileNotFoundError(f"no tokenizer at {file}")
        try:
            return cls.from_json(regular(file, None).decode("utf-8"))
        except UnicodeDecodeError as error:
            raise TokenizerError(f"{file}: not UTF-8 at byte {error.start}") from None
        except ValueError as error:
            raise TokenizerError(f"{file}: {error}") from None

    def with_roles(self, said: Mapping[str, int | None]) -> Tokenizer:
        """The same tokenizer with its begin, end, pad and so on where another file says (role -> id) that they are.

        An id that is neither special nor an added token is ignored, and where the roles agree nothing changes. Raises
        TokenizerError for a role that there is not.
        """
        require(said.keys() <= ROLES.keys(), f"roles {', '.join(said)}: known are {', '.join(ROLES)}")
        said = {role: i for role, i in said.items() if i is not None}
        if all(getattr(self, role) == i for role, i in said.items()):
            return self
        for promote in (True, False):  # an added token that ordinary text becomes cannot be made special
            with contextlib.suppress(TokenizerError):
                return Tokenizer(marked(self._raw, said, promote))
        return self

    def to_json(self) -> str:
        """The tokenizer.json, readable by `tokenizers` and `transformers`."""
        return json.dumps(self._raw, ensure_ascii=False, indent=1)

    def save(self, path: str | os.PathLike) -> Path:
        """Write tokenizer.json into the folder `path`, or to the file `path` when it ends in .json."""
        path = Path(path)
        file = path if path.suffix == ".json" else path / "tokenizer.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}.{os.getpid()}")
        partial.write_text(self.to_json(), encoding="utf-8")
        os.replace(partial, file)
        return file

    # ---- text -> ids

    def encode(self, text: str) -> np.ndarray:
        """(tokens,) int32. No end token is added. Raises TokenizerError for anything but valid Unicode text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Iterable[str]) -> list[np.ndarray]:
        """One (tokens,) int32 array per text, on all cores."""
        texts = list(texts)
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise TokenizerError(f"text {i}: expected str, got {type(text).__name__}")
        if self._lookup is not None:
            return [self._lookup[np.frombuffer(_utf8(text), np.uint8)] for text in texts]
        cut = [list(_cut(text, LONGEST)) if self._cuttable and len(text) > LONGEST else [text] for text in texts]
        for text in texts:
            _utf8(text)  # a lone surrogate would surface as the library's own error
        flat = [piece for pieces in cut for piece in pieces]
        done = []
        for block in blocks(flat, AT_ONCE):
            for result in _rust("encoding", self._rust.encode_batch_fast, block, add_special_tokens=False):
                done.append(np.array(result.ids, np.int32))
        it = iter(done)
        parts = [[next(it) for _ in pieces] for pieces in cut]
        return [part[0] if len(part) == 1 else np.concatenate(part) for part in parts]

    def covered(self, text: str, tokens: int) -> int:
        """UTF-8 bytes of the text that its first `tokens` tokens stand for, counted on the raw text."""
        if self.lossless:
            return int(self.byte_lengths[self.encode(text)[:tokens]].sum())
        offsets = _rust("encoding", self._rust.encode, text, add_special_tokens=False).offsets[:tokens]
        return len(text[: offsets[-1][1]].encode()) if offsets else 0

    # ---- ids -> text

    def decode_bytes(self, ids: Iterable | np.ndarray) -> bytes:
        """The bytes of the ids, joined; special tokens give none. TokenizerError for an id outside 0..vocab-1."""
        ids = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids))
        if ids.size and (ids.dtype.kind not in "iu" or ids.ndim != 1):
            raise TokenizerError(f"ids must be a row of whole numbers, got {ids.dtype} of shape {ids.shape}")
        outside = ids[(ids < 0) | (ids >= self.vocab)] if ids.size else ids
        if outside.size:
            raise TokenizerError(f"token id {outside[0]} is outside 0..{self.vocab - 1}")
        table = self.token_bytes
        return b"".join([table[i] for i in ids.tolist()])

    def decode(self, ids: Iterable | np.ndarray) -> str:
        """The text of the ids; bytes that are not UTF-8 become U+FFFD. Raises as `decode_bytes`."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def stream(self) -> Stream:
        """A decoder that takes one id at a time and holds back incomplete characters."""
        return Stream(self)

    def round_trip(self, docs: Iterable[str]) -> RoundTrip:
        """Encode and decode every document and compare the bytes."""
        documents = size = tokens = failures = 0
        examples = []
        for block in blocks(docs):
            for text, ids in zip(block, self.encode_batch(block), strict=True):
                raw = _utf8(text)
                documents, size, tokens = documents + 1, size + len(raw), tokens + len(ids)
                if self.decode_bytes(ids) != raw:
                    failures += 1
                    if len(examples) < 5:
                        examples.append(text[:200])
        return RoundTrip(documents, size, tokens, failures, tuple(examples))

    # ---- as a value

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a Tokenizer cannot be changed (setting {name!r})")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self.sha256 == other.sha256

    def __hash__(self) -> int:
        return hash(self.sha256)

    def __reduce__(self) -> tuple:
        return Tokenizer.from_json, (self.to_json(),)

    def __copy__(self) -> Tokenizer:
        return self

    def __deepcopy__(self, memo: dict) -> Tokenizer:
        return self

    def __repr__(self) -> str:
        return f"Tokenizer({self.kind}, vocab={self.vocab}, sha256={self.sha256[:12]})"


class Stream:
    """Text from ids, one at a time: the texts given out, joined, equal `Tokenizer.decode` of all the ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int | np.integer) -> str:
        """The text this id completes; "" while a character is still incomplete."""
        return self._decoder.decode(self._tokenizer.decode_bytes([int(token)]))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that was never completed, or ""."""
        return self._decoder.decode(b"", final=True)


def blocks(docs: Iterable[str], size: int = 2**22) -> Iterator[list[str]]:
    """Lists of documents of about `size` characters: work enough for all cores, little enough for memory."""
    block, held = [], 0
    for text in docs:
        block.append(text)
        held += len(text)
        if held >= size or len(block) >= 2**16:
            yield block
            block, held = [], 0
    if block:
        yield block


# ---- training: each learner takes word counts, so the order of documents cannot matter


def _words(docs: Iterable[str]) -> Counter[str]:
    """How often each word (GPT-2's pattern, written in byte symbols) occurs."""
    split = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str
    counts: Counter[str] = Counter()
    for i, text in enumerate(docs):
        if not isinstance(text, str):
            raise TokenizerError(f"document {i}: expected str, got {type(text).__name__}")
        _utf8(text)
        for piece in _cut(text, LONGEST):
            counts.update([word for word, _ in _rust("splitting", split, piece)])
    return counts


def _learn(words: Counter[str], trainer: Any, model: Any, split: Any) -> dict[str, Any]:
    """Run a `tokenizers` trainer over words repeated by their count (sorted: equal counts must not depend on order)."""
    learner = tokenizers.Tokenizer(model)
    learner.pre_tokenizer = split
    _rust("training", learner.train_from_iterator, _repeated(words), trainer)
    return json.loads(learner.to_str())["model"]


def _repeated(words: Counter[str]) -> Iterator[list[str]]:
    for word in sorted(words):
        for at in range(0, words[word], 4096):
            yield [word] * min(4096, words[word] - at)


def _bpe(words: Counter[str], vocab: int, seen: int = 2) -> dict[str, Any]:
    """Byte-pair encoding (Sennrich et al. 2016): ids are specials, bytes, then merges in the order learned."""
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab,
        min_frequency=seen,
        special_tokens=list(SPECIALS),
        initial_alphabet=SYMBOLS,
        show_progress=False,
    )
    return _learn(words, trainer, tokenizers.models.BPE(), None)


def _wordpiece(words: Counter[str], vocab: int) -> dict[str, Any]:
    """WordPiece as BERT ships it: pieces inside a word carry '##', encoding takes the longest match."""
    inside = [CONTINUES + s for s in SYMBOLS]
    # as "special tokens" the inside forms get fixed ids: left to itself the trainer numbers them by hash order
    trainer = tokenizers.trainers.WordPieceTrainer(
        vocab_size=vocab,
        min_frequency=2,
        special_tokens=[*SPECIALS, *inside],
        initial_alphabet=SYMBOLS,
        show_progress=False,
    )
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(ALONE), "isolated")
    learned = _learn(words, trainer, tokenizers.models.WordPiece(unk_token=SPECIALS[1]), split)["vocab"]
    base = [*SPECIALS, *SYMBOLS, *inside]
    pieces = base + [p for p in sorted(learned, key=learned.__getitem__) if p not in set(base)]
    return {
        "type": "WordPiece",
        "unk_token": SPECIALS[1],  # the format wants one; with every byte in the vocabulary nothing is unknown
        "continuing_subword_prefix": CONTINUES,
        "max_input_chars_per_word": 100,
        "vocab": _numbered(pieces[:vocab]),
    }


def _unigram(words: Counter[str], vocab: int) -> dict[str, Any]:
    """Unigram language model (Kudo 2018) by hard EM: segment each word its most probable way, recount, drop the rarest.

    Starts from four times as many BPE merges. The library's own trainer depends on hash order, stops short of `vocab`
    and gave 3.08 bytes per token where this gives 4.09 (2 MB of TinyStories, vocabulary 4096).
    """
    texts = sorted(words)
    weights = np.array([words[t] for t in texts], np.float64)
    pieces = [p for p in _bpe(words, 4 * vocab)["vocab"] if p not in SPECIALS]
    long = np.array([len(p) > 1 for p in pieces])
    score = -np.ones(len(pieces)) * math.log(len(pieces))
    room, turn = vocab - len(SPECIALS), 0
    while True:
        model = tokenizers.Tokenizer(tokenizers.models.Unigram(list(zip(pieces, score.tolist(), strict=True))))
        segmented = _rust("segmenting", model.encode_batch_fast, texts)
        ids = np.concatenate([np.array(s.ids, np.int64) for s in segmented])
        count = np.bincount(ids, np.repeat(weights, [len(s.ids) for s in segmented]), len(pieces))
        score = np.log((count + 0.1) / (count.sum() + 0.1 * len(pieces)))
        turn += 1
        if len(pieces) <= room and turn % 2 == 0:
            break
        if turn % 2 == 0:  # two rounds of EM between cuts; bytes always stay
            keep = max(room, int(0.8 * len(pieces))) - int((~long).sum())
            order = np.lexsort((np.arange(len(pieces)), -count, ~long))[:keep]
            kept = np.sort(np.concatenate([order, np.flatnonzero(~long)]))
            pieces, score, long = [pieces[i] for i in kept], score[kept], long[kept]
    ranked = sorted(zip(pieces, np.round(score, 6).tolist(), strict=True), key=lambda p: (len(p[0]) > 1, -p[1], p[0]))
    return {"type": "Unigram", "unk_id": None, "vocab": [*([s, 0.0] for s in SPECIALS), *map(list, ranked)]}


def _numbered(pieces: Iterable[str]) -> dict[str, int]:
    return {piece: i for i, piece in enumerate(pieces)}


def _document(model: dict[str, Any]) -> dict[str, Any]:
    """A whole tokenizer.json around a byte-level model."""
    level: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    split = {"type": "Split", "pattern": {"Regex": ALONE}, "behavior": "Isolated", "invert": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": s, **flags} for i, s in enumerate(SPECIALS)],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [level, split]}
        if model["type"] == "WordPiece"
        else level,
        "post_processor": None,
        "decoder": copy.copy(level),
        "model": model,
    }


# ---- text and bytes


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        at = error.start
        raise TokenizerError(f"character {at} of the text is the lone surrogate U+{ord(text[at]):04X}") from None


WORD_GAP = re.compile(r"(?<=\w) (?=\w)")


def _cut(text: str, size: int) -> Iterator[str]:
    """Parts of about `size` characters whose encodings, joined, are the encoding of the whole.

    Every splitting pattern in use begins a new word at a single space between two word characters. A run of `size`
    characters without one is cut anyway: the bytes stay exact, the tokens at the cut may differ.
    """
    at = 0
    while len(text) - at > size:
        gap = WORD_GAP.search(text, at + size, at + size + size // 16)
        to = gap.start() if gap else at + size
        yield text[at:to]
        at = to
    yield text[at:]


def _rust(doing: str, call: Callable, *args: Any, **named: Any) -> Any:
    """Call into the library; its errors and panics (a BaseException) become TokenizerError."""
    try:
        return call(*args, **named)
    except TokenizerError:  # raised by the documents we were handed
        raise
    except BaseException as error:
        if type(error).__name__ == "PanicException" or type(error) in (Exception, TypeError, OverflowError):
            raise TokenizerError(f"{doing}: the tokenizers library failed: {error}") from None
        raise
