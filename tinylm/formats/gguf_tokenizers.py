"""Tokenizers inside GGUF files: SentencePiece BPE ("llama"), byte-level BPE ("gpt2") and WordPiece ("bert").

`read` makes our tokenizer from a file's entries, `write` the entries from our tokenizer. llama.cpp names the cutting of
a byte-level BPE's text into words by `tokenizer.ggml.pre`, and knows the patterns by heart.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tinylm.formats import gguf, pieces
from tinylm.formats.gguf import Strings
from tinylm.formats.pieces import BYTE, CONTROL, NORMAL, PATTERNS, SPACE, UNKNOWN, UNUSED, USER
from tinylm.formats.tables import FormatError
from tinylm.store import PathLike
from tinylm.tokenizer import Tokenizer
from tinylm.vocabulary import TokenizerError, pair_of

AT = "tokenizer.ggml."
PRE = {  # llama.cpp's names of one pattern; the first is written
    "gpt2": ("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "exaone4", "granite-docling"),
    "smollm": ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    "llama3": ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "lfm2"),
    "qwen2": ("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez"),
}
PADDING = re.compile(r"\[PAD\d+\]")
NONE = ("none", "no_vocab")
# What llama.cpp calls our roles, its own spelling of the last. In front of a text BERT's kind has only cls.
ROLES = {"begin": "bos", "end": "eos", "pad": "padding", "mask": "mask", "cls": "cls", "sep": "seperator"}


# --- reading ----------------------------------------------------------------------------------------------------------


def read(metadata: Mapping[str, Any], vocab: int) -> Tokenizer | None:
    """The tokenizer of a model with `vocab` token ids; None where the file has none.

    Raises FormatError: a kind that is not known, entries that are missing or contradict each other, with the remedy.
    """
    kind = metadata.get(f"{AT}model", "none")
    if isinstance(kind, str) and kind in NONE:
        return None
    with _refused():
        makers = {"llama": _sentencepiece, "gpt2": _bytes, "bert": _wordpieces}
        if not isinstance(kind, str) or kind not in makers:
            raise FormatError(f"{AT}model = {str(kind)[:40]!r}: known are {', '.join(makers)}")
        tokens = metadata.get(f"{AT}tokens")
        if not isinstance(tokens, Strings) or tokens.count != vocab:
            count = tokens.count if isinstance(tokens, Strings) else "no"
            raise FormatError(f"{AT}tokens lists {count} texts, and the model has {vocab:,} token ids")
        names = list(tokens)
        types = _numbers(metadata, "token_type", "iu", len(names)) or [NORMAL] * len(names)
        while names and types[-1] == UNUSED and PADDING.fullmatch(names[-1]):  # they only fill up the embedding
            names.pop()
            types.pop()
        if wrong := {*types} - {NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE}:
            raise FormatError(f"{AT}token_type holds {sorted(wrong)[0]}: 1 to 6 are known")
        made = Tokenizer.from_json(json.dumps(makers[kind](metadata, names, types)))
        roles = {role: said for role, said in ROLES.items() if kind != "bert" or role not in ("begin", "end")}
        # bos opens each text in training also where `add_bos_token` is false: llama.cpp then puts none before a prompt,
        # but GPT-2 has learned its <|endoftext|> as the beginning of texts all the same.
        return made.with_roles({role: _id(metadata, said, made.vocab) for role, said in roles.items()})


def tokenizer_of(path: PathLike) -> Tokenizer | None:
    """The tokenizer of a GGUF file, also of one without tensors. Raises FileNotFoundError, FormatError as `read`."""
    file = gguf.open_file(path)
    with gguf.named(path):
        tokens = file.metadata.get(f"{AT}tokens")
        return read(file.metadata, tokens.count if isinstance(tokens, Strings) else 0)


@contextlib.contextmanager
def _refused() -> Iterator[None]:
    try:
        yield
    except (FormatError, TokenizerError) as error:
        raise FormatError(f"its tokenizer: {error}. The model alone: tokenizer=False") from None


def _numbers(metadata: Mapping[str, Any], key: str, kinds: str, count: int) -> list:
    values = metadata.get(f"{AT}{key}")
    if values is None:
        return []
    if not isinstance(values, np.ndarray) or values.dtype.kind not in kinds or len(values) < count:
        raise FormatError(f"{AT}{key} holds no {count:,} numbers, one for each token")
    return values[:count].tolist()


def _id(metadata: Mapping[str, Any], role: str, count: int) -> int | None:
    value = metadata.get(f"{AT}{role}_token_id")
    return value if type(value) is int and 0 <= value < count else None


def _sentencepiece(metadata: Mapping[str, Any], names: list[str], types: list[int]) -> dict[str, Any]:
    scores = _numbers(metadata, "scores", "f", len(names))
    if not scores:
        raise FormatError(f"{AT}scores is missing")
    where = lambda *kinds: [i for i, kind in enumerate(types) if kind in kinds]  # noqa: E731
    begin, end, unknown = (_id(metadata, role, len(names)) for role in ("bos", "eos", "unknown"))
    special = {i for i in (begin, end, unknown) if i is not None} | {*where(CONTROL, UNKNOWN, UNUSED)}
    return pieces.scored(
        names,
        scores,
        unknown=next(iter(where(UNKNOWN)), unknown),
        begin=begin,
        end=end,
        bytes_at=pieces.bytes_among(names, types),
        control=sorted(special),
        user=where(USER),
        add_prefix_space=metadata.get(f"{AT}add_space_prefix", True) is True,
    )


def _bytes(metadata: Mapping[str, Any], names: list[str], types: list[int]) -> dict[str, Any]:
    pre = metadata.get(f"{AT}pre")
    pattern = next((key for key, known in PRE.items() if isinstance(pre, str) and pre in known), None)
    if pattern is None:
        known = ", ".join(itertools.chain(*PRE.values()))
        raise FormatError(f"{AT}pre = {str(pre)[:40]!r} names an unknown way to cut text into words; known: {known}")
    merges = metadata.get(f"{AT}merges")
    if not isinstance(merges, Strings):
        raise FormatError(f"{AT}merges is missing")
    special = {i for i, kind in enumerate(types) if kind in (CONTROL, UNKNOWN)}
    special |= {i for role in ("bos", "eos") if (i := _id(metadata, role, len(names))) is not None}
    plain = {names[i]: i for i, kind in enumerate(types) if kind == USER and i not in special}
    vocab = {name: i for i, name in enumerate(names)}
    if len(vocab) != len(names):
        raise FormatError(f"{len(names) - len(vocab):,} tokens occur twice")
    return pieces.merged(vocab, list(merges), {names[i]: i for i in sorted(special)}, pattern, plain=plain)


def _wordpieces(metadata: Mapping[str, Any], names: list[str], types: list[int]) -> dict[str, Any]:
    """BERT's pieces; the file marks the beginning of a word (U+2581) where BERT marks the inside (##)."""

    def ours(name: str, kind: int) -> str:
        if name.startswith(SPACE):
            return name[1:]
        whole = kind != NORMAL or (len(name) > 2 and name[0] == "[" and name[-1] == "]")  # [unused1] in older files
        return name if whole else f"##{name}"

    lowercase = metadata.get(f"{AT}normalizer.lowercase", True) is True
    document = pieces.wordpieces([ours(*pair) for pair in zip(names, types, strict=True)], lowercase)
    accents = metadata.get(f"{AT}normalizer.strip_accents")
    document["normalizer"]["strip_accents"] = accents if type(accents) is bool else None
    return document


# --- writing ----------------------------------------------------------------------------------------------------------


def write(tokenizer: Tokenizer | None, vocab: int) -> dict[str, Any]:
    """The entries that say this tokenizer to llama.cpp; ids from its own vocabulary up to `vocab` are padding.

    Texts begin as everywhere in the kit: with `tokenizer.begin`. Unicode normalisation (NFC) is left out: llama.cpp has
    none, so text that is not composed may get other tokens there.

    Raises:
        FormatError: a tokenizer that llama.cpp does not have.
    """
    if tokenizer is None:
        return {f"{AT}model": NONE[0]}
    raw = json.loads(tokenizer.to_json())
    normalizers, splits = _steps(raw, "normalizer", "normalizers"), _steps(raw, "pre_tokenizer", "pretokenizers")
    kinds = [step["type"] for step in normalizers], [step["type"] for step in splits]
    if raw["model"]["type"] == "WordPiece" and kinds == (["BertNormalizer"], ["BertPreTokenizer"]):
        entries = _said_wordpieces(tokenizer, normalizers[0])
    elif raw["model"]["type"] == "BPE" and kinds[0] in ([], ["NFC"]) and "ByteLevel" in kinds[1]:
        entries = _said_bytes(tokenizer, raw, splits)
    elif raw["model"]["type"] == "BPE" and kinds[0] in (["Prepend", "Replace"], ["Replace"]):
        entries = _said_sentencepiece(tokenizer, raw, kinds[0] == ["Prepend", "Replace"])
    else:
        raise _unsaid(f"{raw['model']['type']} over {', '.join(kinds[0] + kinds[1]) or 'the whole text'}")
    tokens, types = entries[f"{AT}tokens"], entries[f"{AT}token_type"]
    padding = [f"[PAD{i}]" for i in range(len(tokens), vocab)]
    entries[f"{AT}tokens"] = [*tokens, *padding]
    entries[f"{AT}token_type"] = np.array([*types, *[UNUSED] * len(padding)], np.int32)
    if f"{AT}scores" in entries:
        entries[f"{AT}scores"] = np.array([*entries[f"{AT}scores"], *[0.0] * len(padding)], np.float32)
    if len({*entries[f"{AT}tokens"]}) != vocab:
        raise _unsaid("a vocabulary in which two tokens have the same text")
    return entries


def _unsaid(what: str) -> FormatError:
    return FormatError(
        f"llama.cpp has no tokenizer such as {what}: it has byte-level BPE, SentencePiece BPE and BERT's WordPiece. "
        "The model alone: tokenizer=False"
    )


def _steps(raw: Mapping[str, Any], part: str, plural: str) -> list[dict[str, Any]]:
    step = raw.get(part)
    return [] if step is None else step[plural] if step["type"] == "Sequence" else [step]


def _entries(
    kind: str,
    pre: str,
    tokenizer: Tokenizer,
    names: Sequence[str],
    types: Sequence[int],
    **more: Any,
) -> dict[str, Any]:
    if tokenizer.end is None and kind != "bert":
        raise _unsaid("one without an end token (it would take token 11 or 2 for it)")
    begin = tokenizer.cls if kind == "bert" else tokenizer.begin
    roles = {"bos": begin, "eos": tokenizer.end, "padding": tokenizer.pad, "mask": tokenizer.mask}
    marked = {role for token in json.loads(tokenizer.to_json())["added_tokens"] for role in token.get("roles", ())}
    roles |= {ROLES[role]: getattr(tokenizer, role) for role in ("cls", "sep") if role in marked}  # else by their names
    said = {f"{role}_token_id": i for role, i in roles.items() if i is not None}
    first = {"model": kind, "pre": pre, "tokens": list(names), "token_type": list(types)}
    flags = {"add_bos_token": True} | ({} if kind == "bert" else {"add_eos_token": False})
    return {f"{AT}{key}": value for key, value in {**first, **more, **said, **flags}.items()}


def _said_bytes(tokenizer: Tokenizer, raw: Mapping[str, Any], splits: list[dict[str, Any]]) -> dict[str, Any]:
    bare = lambda steps: [{k: v for k, v in step.items() if k != "trim_offsets"} for step in steps]  # noqa: E731
    pattern = next((key for key, steps in PATTERNS.items() if bare(steps) == bare(splits)), None)
    if pattern is None:
        raise _unsaid(f"byte-level BPE with words cut by {json.dumps(splits)[:200]}")
    if bool(raw["model"].get("ignore_merges")) != (pattern == "llama3") and raw["model"]["merges"]:
        raise _unsaid(f"byte-level BPE with ignore_merges = {raw['model'].get('ignore_merges')} and {PRE[pattern][0]}")
    plain = {t["content"] for t in raw["added_tokens"] if not t["special"]}
    types = [CONTROL if n in tokenizer.specials else USER if n in plain else NORMAL for n in tokenizer.names]
    merges = [m if isinstance(m, str) else " ".join(m) for m in raw["model"]["merges"]]
    return _entries("gpt2", PRE[pattern][0], tokenizer, tokenizer.names, types, merges=merges)


def _said_wordpieces(tokenizer: Tokenizer, normalizer: Mapping[str, Any]) -> dict[str, Any]:
    special = tokenizer.specials
    if missing := [name for name in ("[UNK]", "[SEP]", "[CLS]") if name not in special]:
        raise _unsaid(f"WordPiece without {', '.join(missing)}")
    if not (normalizer["clean_text"] and normalizer["handle_chinese_chars"]):
        raise _unsaid("WordPiece that keeps control characters, or Chinese ones together")
    mark = lambda name: name[2:] if name.startswith("##") else f"{SPACE}{name}"  # noqa: E731
    names = [name if name in special else mark(name) for name in tokenizer.names]
    accents = normalizer.get("strip_accents")
    more: dict[str, Any] = {"unknown_token_id": special["[UNK]"]}
    more |= {f"{ROLES[role]}_token_id": getattr(tokenizer, role) for role in ("sep", "cls")}
    more["normalizer.lowercase"] = normalizer["lowercase"]
    if accents is not None:  # else it follows `lowercase`, there as here
        more["normalizer.strip_accents"] = accents
    types = [CONTROL if name in special else NORMAL for name in tokenizer.names]
    return _entries("bert", "default", tokenizer, names, types, **more)


def _said_sentencepiece(tokenizer: Tokenizer, raw: Mapping[str, Any], prefix: bool) -> dict[str, Any]:
    """Scores from the ranks of the merges: they must be all splits of each piece, the best piece first."""
    names, special = tokenizer.names, tokenizer.specials
    bytes_at = [names.index(f"<0x{byte:02X}>") for byte in range(256)] if raw["model"].get("byte_fallback") else None
    user = [t["id"] for t in raw["added_tokens"] if not t["special"]]
    merges = [tuple(pair_of(merge)) for merge in raw["model"]["merges"]]
    ranks: dict[str, int] = {}
    for left, right in merges:
        ranks.setdefault(left + right, len(ranks))
    scores = [-1.0 - ranks[name] if name in ranks else 0.0 for name in names]
    unknown = special.get(raw["model"].get("unk_token"))
    again = pieces.scored(
        names,
        scores,
        unknown=unknown,
        begin=tokenizer.begin,
        end=tokenizer.end,
        bytes_at=bytes_at,
        control=[*special.values()],
        user=user,
        add_prefix_space=prefix,
    )
    order = lambda pairs: sorted(pairs, key=lambda p: (ranks.get(p[0] + p[1], -1), p))  # noqa: E731
    contiguous = [key for key, _ in itertools.groupby(merges, key=lambda p: p[0] + p[1])]
    if order(map(tuple, again["model"]["merges"])) != order(merges) or len(contiguous) != len(ranks):
        raise _unsaid("SentencePiece BPE whose merges do not follow from one score per piece")
    kinds = dict.fromkeys(user, USER) | dict.fromkeys(bytes_at or [], BYTE) | dict.fromkeys(special.values(), CONTROL)
    if unknown is not None:
        kinds[unknown] = UNKNOWN
    types = [kinds.get(i, NORMAL) for i in range(len(names))]
    more = {"scores": scores, "add_space_prefix": prefix}
    if unknown is not None:
        more["unknown_token_id"] = unknown
    return _entries("llama", "default", tokenizer, names, types, **more)
