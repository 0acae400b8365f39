"""What a tokenizer.json may say: an allowlist, applied before the `tokenizers` library reads the file.

Everything that is not known here is refused by name, because the library panics, aborts the process or loads ids beyond
the vocabulary on files it should refuse. Padding and truncation are checked and then ignored: nothing here pads.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from typing import Any

# A piece inside a word starts with '##', so a literal '#' must stand alone or "##ing" in the text would be read as an
# "ing" inside a word. The 32 keeps the longest-match search, quadratic in the word, short on a line without spaces.
ALONE = "[^#]{1,32}|#"
LARGEST = 16 * 2**20  # bytes of json
TOP = (
    "version",
    "truncation",
    "padding",
    "added_tokens",
    "normalizer",
    "pre_tokenizer",
    "post_processor",
    "decoder",
    "model",
)
ROLES = {  # what foreign tokenizers call them, in order of preference; a file may say otherwise, see `marked`
    "begin": ("<s>", "<|begin_of_text|>", "<bos>", "<|endoftext|>"),
    "end": ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>"),
    "pad": ("<|pad|>", "[PAD]", "<pad>"),
    "mask": ("<|mask|>", "[MASK]", "<mask>"),
    "cls": ("<|cls|>", "[CLS]", "<s>"),
    "sep": ("<|sep|>", "[SEP]", "</s>"),
}
FLAG = (True, False)
MAYBE = (True, False, None)
BEHAVIOR = ("Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous")
GPT2 = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
GPT4 = (
    r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"""
    r"""|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
QWEN = GPT4.replace(r"\p{N}{1,3}", r"\p{N}")
BYTE_NAME = "(?<=<)0x(?=[0-9A-F]{2}>)"  # inside the text "<0x41>", which is not the byte token of that name
PATTERNS = (ALONE, GPT2, GPT4, QWEN, BYTE_NAME)  # others could make the regex engine hang

NORMALIZERS: dict[str, dict[str, Any]] = {
    "BertNormalizer": {"clean_text": FLAG, "handle_chinese_chars": FLAG, "strip_accents": MAYBE, "lowercase": FLAG},
    "Lowercase": {},
    "StripAccents": {},
    "NFC": {},
    "NFD": {},
    "NFKC": {},
    "NFKD": {},
    "Prepend": {"prepend": "text"},
    "Replace": {"pattern": "string", "content": "text"},
}
PRE_TOKENIZERS: dict[str, dict[str, Any]] = {
    "ByteLevel": {"add_prefix_space": FLAG, "trim_offsets": FLAG, "use_regex": FLAG},
    "BertPreTokenizer": {},
    "Whitespace": {},
    "WhitespaceSplit": {},
    "Digits": {"individual_digits": FLAG},
    "Punctuation": {"behavior": BEHAVIOR},
    "Metaspace": {"replacement": ("\u2581",), "prepend_scheme": ("always", "never", "first"), "split": FLAG},
    "Split": {"pattern": "known", "behavior": BEHAVIOR, "invert": (False,)},
}
OPTIONAL = {"trim_offsets", "use_regex", "prepend_scheme", "split", "strip_accents"}
LATER = {  # never handed to the library: only known names and small values may pass into a saved copy
    "post_processor": ("BertProcessing", "RobertaProcessing", "ByteLevel", "TemplateProcessing", "Sequence"),
    "decoder": (
        "ByteLevel",
        "WordPiece",
        "BPEDecoder",
        "Metaspace",
        "Sequence",
        "Fuse",
        "Replace",
        "ByteFallback",
        "Strip",
    ),
}
MODELS: dict[str, dict[str, Any]] = {
    "BPE": {
        "vocab": "vocab",
        "merges": "merges",
        "dropout": (None,),
        "unk_token": "unknown",
        "continuing_subword_prefix": (None, ""),
        "end_of_word_suffix": (None, ""),
        "fuse_unk": FLAG,
        "byte_fallback": FLAG,
        "ignore_merges": FLAG,
    },
    "WordPiece": {
        "vocab": "vocab",
        "unk_token": "unknown",
        "continuing_subword_prefix": "text",
        "max_input_chars_per_word": "size",
    },
    "Unigram": {"vocab": "scores", "unk_id": "index", "byte_fallback": FLAG},
}
NEEDED = {"BPE": {"vocab", "merges"}, "WordPiece": set(MODELS["WordPiece"]), "Unigram": {"vocab"}}


class TokenizerError(ValueError):
    """A tokenizer that cannot be trained, loaded or applied; the message says what is wrong with what."""


def byte_symbols() -> list[str]:
    """The printable character that stands for each byte (GPT-2, Radford et al. 2019): itself, or one from 256 up."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(moved)) for b in range(256)]


SYMBOLS = byte_symbols()
BYTE_OF = {symbol: byte for byte, symbol in enumerate(SYMBOLS)}


@dataclasses.dataclass(frozen=True)
class Checked:
    """A tokenizer.json that passed: names and bytes by id, added and special tokens by name, the encoder's json.

    `roles` are ids by role, None where there is no such token.
    `prefix` is what a text's first token begins with though the text does not.
    """

    names: tuple[str, ...]
    content: tuple[bytes, ...]
    added: dict[str, int]
    specials: dict[str, int]
    roles: dict[str, int | None]
    byte_level: bool
    lossless: bool
    prefix: bytes
    cuttable: bool
    encoder: dict[str, Any]


def require(ok: Any, what: str) -> None:
    """Raise TokenizerError unless `ok`."""
    if not ok:
        raise TokenizerError(what)


def parse(text: str) -> dict[str, Any]:
    """The json of a tokenizer file; no repeated keys, no NaN, no lone surrogates, at most 16 MB."""
    require(isinstance(text, str), f"expected the text of a tokenizer.json, got {type(text).__name__}")
    require(len(text) <= LARGEST, f"tokenizer.json of {len(text):,} characters: the limit is {LARGEST:,}")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        require(len(found) == len(pairs), "tokenizer.json repeats a key")
        return found

    def refuse(constant: str) -> None:
        raise TokenizerError(f"tokenizer.json holds {constant}")

    try:
        require(len(text.encode()) <= LARGEST, "tokenizer.json is larger than 16 MB")
        raw = json.loads(text, object_pairs_hook=once, parse_constant=refuse)
        json.dumps(raw, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise TokenizerError("tokenizer.json holds a lone surrogate") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise TokenizerError(f"not a json file: {error}") from None
    except TokenizerError:
        raise
    except ValueError as error:  # a number of more than 4300 digits
        raise TokenizerError(f"not a usable json file: {error}") from None
    require(isinstance(raw, dict), "a tokenizer.json holds one json object")
    return raw


def check(raw: dict[str, Any]) -> Checked:
    """Refuse by name whatever is not allowed. Raises TokenizerError."""
    for key in raw:
        require(key in TOP, f"unknown entry {_short(key)}")
    require(raw.get("version", "1.0") == "1.0", f"version = {_short(raw.get('version'))}: only 1.0 is known")
    model: Any = raw.get("model")
    require(isinstance(model, dict), "no model")
    kind = model.get("type")
    require(isinstance(kind, str) and kind in MODELS, f"model type {_short(kind)}: known are {', '.join(MODELS)}")
    for key in NEEDED[kind]:
        require(key in model, f"{kind} without {key}")
    for key, value in model.items():
        require(key == "type" or key in MODELS[kind], f"{kind} has no entry {_short(key)}")
        if key != "type" and not isinstance(MODELS[kind][key], str):
            require(_among(value, MODELS[kind][key]), f"{kind}.{key} = {_short(value)} is not supported")
    vocab = _vocab(model)
    added = _added(raw.get("added_tokens"))
    _numbers(vocab, added)
    _model(model, vocab)
    names: list[str] = [""] * len({*vocab.values(), *(t["id"] for t in added)})
    for name, i in [*vocab.items(), *((t["content"], t["id"]) for t in added)]:
        names[i] = name
    normalizers = _chain(raw.get("normalizer"), "normalizer", "normalizers", NORMALIZERS)
    splits = _chain(raw.get("pre_tokenizer"), "pre_tokenizer", "pretokenizers", PRE_TOKENIZERS)
    for key, allowed in LATER.items():
        part = raw.get(key)
        require(
            part is None or (isinstance(part, dict) and _among(part.get("type"), allowed)), f"{key} is not a known kind"
        )
        require(_bounded(part), f"{key} holds a number or a nesting beyond reason")
    _ignored(raw.get("padding"), "padding")
    _ignored(raw.get("truncation"), "truncation")

    levels = [s for s in splits if s["type"] == "ByteLevel"]
    plain = all(s["type"] in ("ByteLevel", "Split", "Digits") for s in splits)
    byte_level = bool(levels) and plain
    prefix = model.get("continuing_subword_prefix") or ""
    covered = all(s in vocab for s in SYMBOLS) and (kind != "WordPiece" or all(prefix + s in vocab for s in SYMBOLS))
    kept = all(s["behavior"] != "Removed" for s in splits if s["type"] == "Split")
    spaced = any(s["add_prefix_space"] for s in levels)
    ordinary = all(t["special"] for t in added)
    encoder = {**raw, "truncation": None, "padding": None, "post_processor": None, "decoder": None}
    encoder["model"] = dict(model)
    if kind == "BPE":  # pairs, because the library skips a merge written as a string that begins with "#version"
        encoder["model"]["merges"] = [pair_of(merge) for merge in model["merges"]]
    encoder["added_tokens"] = [{key: t[key] for key in t if key != "roles"} for t in added]
    outside = [t for t in added if t["content"] not in vocab]
    if kind != "Unigram" and any(t["id"] != i for i, t in enumerate(outside, len(vocab))):
        # The library numbers them on from the vocabulary unless it finds them in it.
        encoder["model"]["vocab"] = {**vocab, **{t["content"]: t["id"] for t in outside}}
    plainly = {t["content"]: b"" if t["special"] else t["content"].encode() for t in added}
    return Checked(
        names=tuple(names),
        content=tuple(plainly[n] if n in plainly else _content(n, model, byte_level) for n in names),
        added={t["content"]: t["id"] for t in added},
        specials={t["content"]: t["id"] for t in added if t["special"]},
        roles=roles_of(added),
        byte_level=byte_level,
        prefix=b" " if spaced or any(_prepends(step) for step in (*normalizers, *splits)) else b"",
        lossless=byte_level and covered and kept and ordinary and not spaced and not normalizers,
        cuttable=bool(splits)
        and not any(s["type"] == "Metaspace" or s.get("use_regex") is False for s in splits)
        and not any(n["type"] in ("Prepend", "Replace") for n in normalizers),
        encoder=encoder,
    )


def pair_of(merge: Any) -> Any:
    """The two tokens of a merge, which older files write as one text."""
    return merge.split(" ") if isinstance(merge, str) else merge


def roles_of(added: list[dict[str, Any]]) -> dict[str, int | None]:
    """The id in each role: of the token whose `roles` say so, else by name; begin and end stand in for each other."""
    said = {role: token["id"] for token in added for role in token.get("roles", [])}
    special = {token["content"]: token["id"] for token in added if token["special"]}
    named = {role: next((special[n] for n in names if n in special), None) for role, names in ROLES.items()}
    roles = named | said
    return {**roles, **{a: roles[a if roles[a] is not None else b] for a, b in (("begin", "end"), ("end", "begin"))}}


def marked(document: dict[str, Any], said: Mapping[str, int], promote: bool = False) -> dict[str, Any]:
    """A tokenizer.json in which the tokens have the roles that another file says, role -> id.

    They are an entry "roles" of an added token, which the `tokenizers` library passes over (an entry of the document's
    own makes it fail). Nothing is added where the names alone give the same; an id that is no special token is ignored,
    or with `promote` made special where it is an added token.
    """
    added = [dict(token) for token in document.get("added_tokens") or []]
    by_id = {token["id"]: token for token in added if token["special"] or promote}
    wanted = {role: i for role, i in said.items() if i in by_id}
    for i in wanted.values():
        by_id[i]["special"] = True
    while wrong := {role: i for role, i in wanted.items() if roles_of(added)[role] != i}:  # one may change another
        for token in added:
            mine = [role for role in token.get("roles", []) if role not in wrong]
            mine += [role for role, i in wrong.items() if i == token["id"]]
            token.pop("roles", None)
            if mine:
                token["roles"] = sorted(mine)
    return {**document, "added_tokens": added} if wanted else document


def _prepends(step: dict[str, Any]) -> bool:
    """Whether this step puts a space in front of a text."""
    if step["type"] == "Prepend":
        return step["prepend"] in (" ", "\u2581")
    return step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never"


def _content(name: str, model: dict[str, Any], byte_level: bool) -> bytes:
    """The raw bytes an ordinary token stands for."""
    prefix = model.get("continuing_subword_prefix") or ""
    inside = bool(prefix) and name.startswith(prefix) and model["type"] == "WordPiece"
    if byte_level:
        bare = name[len(prefix) :] if inside and len(name) > len(prefix) else name
        return bytes(BYTE_OF[c] for c in bare) if all(c in BYTE_OF for c in bare) else bare.encode()
    if model.get("byte_fallback") and re.fullmatch("<0x[0-9A-F]{2}>", name):
        return bytes([int(name[3:5], 16)])
    if model["type"] == "WordPiece":
        return name[len(prefix) :].encode() if inside else f" {name}".encode()
    return name.replace("\u2581", " ").encode()


def _vocab(model: dict[str, Any]) -> dict[str, int]:
    """Name -> id of the model's own tokens."""
    raw = model["vocab"]
    if model["type"] == "Unigram":
        require(isinstance(raw, list) and raw, "Unigram.vocab must be a list of [piece, score]")
        for entry in raw:
            require(
                isinstance(entry, list) and len(entry) == 2,
                f"Unigram.vocab entry {_short(entry)} is not [piece, score]",
            )
            piece, score = entry
            require(isinstance(piece, str) and piece, f"Unigram.vocab: {_short(piece)} is not a piece")
            good = type(score) in (int, float) and math.isfinite(score) and abs(score) < 1e6
            require(good, f"Unigram.vocab: score {_short(score)} of {_short(piece)}")
        vocab = {piece: i for i, (piece, _) in enumerate(raw)}
        require(len(vocab) == len(raw), "Unigram.vocab holds a piece twice")
        return vocab
    require(isinstance(raw, dict) and raw, f"{model['type']}.vocab must be an object of token: id")
    for name, i in raw.items():
        if not name or type(i) is not int:
            raise TokenizerError(
                f"{model['type']}.vocab: id {_short(i)} of {_short(name)} is not a whole number of a token"
            )
    return raw


def _added(raw: Any) -> list[dict[str, Any]]:
    require(raw is None or isinstance(raw, list), "added_tokens must be a list")
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    for token in raw or []:
        good = isinstance(token, dict) and set(token) - {"roles"} == {"id", "content", *flags}
        require(good, f"added token {_short(token)}: needs exactly id, content, {', '.join(flags)}")
        require(
            isinstance(token["content"], str) and 0 < len(token["content"]) <= 256,
            f"added token {_short(token)}: content",
        )
        require(type(token["id"]) is int, f"added token {_short(token['content'])}: id {_short(token['id'])}")
        require(
            all(_among(token[f], FLAG) for f in flags),
            f"added token {_short(token['content'])}: flags are true or false",
        )
        said = token.get("roles", ["end"])
        require(
            isinstance(said, list) and said and all(isinstance(role, str) and role in ROLES for role in said),
            f"added token {_short(token['content'])}: roles = {_short(said)}: known are {', '.join(ROLES)}",
        )
        require(
            token["special"] or "roles" not in token, f"added token {_short(token['content'])} has roles, not special"
        )
    names = [t["content"] for t in raw or []]
    require(len(set(names)) == len(names), "an added token occurs twice")
    taken = [role for t in raw or [] for role in t.get("roles", [])]
    twice = next((role for role in taken if taken.count(role) > 1), None)
    require(twice is None, f"the role {twice} is given twice among the added tokens")
    return raw or []


def _numbers(vocab: dict[str, int], added: list[dict[str, Any]]) -> None:
    """Ids are 0..V-1, each exactly once."""
    for token in added:
        known = vocab.get(token["content"], token["id"])
        require(
            known == token["id"],
            f"added token {_short(token['content'])} has id {token['id']}, the vocabulary says {known}",
        )
    ids = sorted([*vocab.values(), *(t["id"] for t in added if t["content"] not in vocab)])
    wrong = next((i for i, found in enumerate(ids) if found != i), None)
    require(
        wrong is None,
        f"token ids must be 0..{len(ids) - 1}, each once: id {wrong} is missing or {ids[wrong or 0]} is wrong",
    )


def _model(model: dict[str, Any], vocab: dict[str, int]) -> None:
    kind = model["type"]
    if kind == "Unigram":
        unknown = model.get("unk_id")
        require(
            unknown is None or (type(unknown) is int and 0 <= unknown < len(vocab)),
            f"Unigram.unk_id = {_short(unknown)}",
        )
        return
    unknown = model.get("unk_token")
    known = (isinstance(unknown, str) and unknown in vocab) or (unknown is None and kind == "BPE")
    require(known, f"{kind}.unk_token = {_short(unknown)} is not in the vocabulary")
    if kind == "WordPiece":
        prefix, size = model["continuing_subword_prefix"], model["max_input_chars_per_word"]
        require(
            isinstance(prefix, str) and 0 < len(prefix) <= 8, f"WordPiece.continuing_subword_prefix = {_short(prefix)}"
        )
        require(type(size) is int and 0 < size <= 1000, f"WordPiece.max_input_chars_per_word = {_short(size)}: 1..1000")
        return
    require(isinstance(model["merges"], list), "BPE.merges must be a list")
    for merge in model["merges"]:
        pair = pair_of(merge)
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(p, str) and p for p in pair)):
            raise TokenizerError(f"BPE merge {_short(merge)} is not a pair of tokens")
        for token in (*pair, pair[0] + pair[1]):
            if token not in vocab:
                raise TokenizerError(f"BPE merge {_short(merge)}: {_short(token)} is not in the vocabulary")


def _chain(raw: Any, where: str, plural: str, known: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, a Sequence unrolled."""
    if raw is None:
        return []
    require(isinstance(raw, dict), f"{where} must be an object")
    steps = [raw]
    if raw.get("type") == "Sequence":
        require(set(raw) == {"type", plural} and isinstance(raw[plural], list), f"{where}: a Sequence needs {plural}")
        steps = raw[plural]
        require(len(steps) <= 16, f"{where}: {len(steps)} steps")
    for step in steps:
        require(isinstance(step, dict), f"{where}: {_short(step)}")
        kind = step.get("type")
        require(isinstance(kind, str) and kind in known, f"{where} {_short(kind)}: known are {', '.join(known)}")
        for key in known[kind].keys() - OPTIONAL:
            require(key in step, f"{where} {kind} without {key}")
        for key, value in step.items():
            require(key == "type" or key in known[kind], f"{where} {kind} has no entry {_short(key)}")
            require(
                key == "type" or _allowed(value, known[kind][key]),
                f"{where} {kind}.{key} = {_short(value)} is not supported",
            )
    return steps


def _allowed(value: Any, rule: Any) -> bool:
    if rule == "text":
        return isinstance(value, str) and len(value) <= 8
    if rule == "string":  # a literal pattern; an empty one loops for ever
        return (
            isinstance(value, dict)
            and set(value) == {"String"}
            and _allowed(value["String"], "text")
            and value["String"] != ""
        )
    if rule == "known":
        return isinstance(value, dict) and (
            (set(value) == {"Regex"} and _among(value["Regex"], PATTERNS)) or _allowed(value, "string")
        )
    return _among(value, rule)


def _ignored(raw: Any, where: str) -> None:
    require(raw is None or isinstance(raw, dict), f"{where} must be an object or null")
    require(_bounded(raw), f"{where} holds a number or a nesting beyond reason")


def _bounded(raw: Any, depth: int = 0) -> bool:
    """Only small numbers, few levels: padding to 2^63 makes the library abort the process."""
    if isinstance(raw, dict):
        return depth < 8 and all(_bounded(v, depth + 1) for v in raw.values())
    if isinstance(raw, list):
        return depth < 8 and all(_bounded(v, depth + 1) for v in raw)
    return raw is None or isinstance(raw, (str, bool)) or (type(raw) in (int, float) and 0 <= raw < 2**24)


def _among(value: Any, allowed: tuple) -> bool:
    """`value in allowed`, but 1 is not True."""
    return any(type(value) is type(a) and value == a for a in allowed)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
