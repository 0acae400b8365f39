"""Folders of Hugging Face's transformers: config.json, model.safetensors (or shards), the tokenizer.

    model = read("SmolLM2")                  Llama, Mistral, Qwen2, Qwen3, GPT-2, GPT-Neo, GPT-NeoX (Pythia), BERT
    write(model, "for-others")               the architecture that says this model exactly, or why none does

`hf_families` says what their settings mean, `hf_tables` what their tensors are called, `hf_weights` reads the files.
No code and no pickle of a folder is ever touched, and no name in a file leads out of it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from tinylm.config import ModelConfig
from tinylm.formats import tables
from tinylm.formats.hf_families import FAMILIES, Family, Head, pattern
from tinylm.formats.hf_said import Said
from tinylm.formats.hf_weights import CODES, FLOATS, INDEX, SINGLE, Weights, load_json, write_file
from tinylm.formats.pieces import tokenizer_of
from tinylm.formats.tables import FormatError, Row, complain
from tinylm.model import Transformer, shapes
from tinylm.store import LEFTOVER, PathLike, sync_folder, write_bytes
from tinylm.tokenizer import Tokenizer
from tinylm.weights import named

Dtype = Literal["float32", "float16", "bfloat16", "f32", "f16", "bf16"]
SHORT: dict[str, Dtype] = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}  # as GGUF calls them
ROLES = {"begin": "bos", "end": "eos", "pad": "pad", "mask": "mask", "cls": "cls", "sep": "sep"}  # ours, theirs
HEADS = ("lm_head.", "embed_out.", "cls.", "classifier.")  # names outside the trunk
OURS = ("config.json", "generation_config.json", SINGLE, "tokenizer.json", "tokenizer_config.json")
MARK = "written_by"  # in a config.json of ours; not "tinylm", which `checkpoint.save` writes
FIT = "tokenizer_sha256"  # in a config.json of ours: of the tokenizer before `_document` fitted it to transformers
DEEP = 16  # layers; JAX takes seconds to describe many more, so their tensors are looked at first


# --- reading ----------------------------------------------------------------------------------------------------------


def read(folder: PathLike) -> Transformer:
    """The model of a Hugging Face folder, float32, with its tokenizer where the kit knows its kind (else a warning).

    Raises FileNotFoundError when there is no such folder, and FormatError: an architecture or a setting that the kit
    cannot say, tensors that are missing, unknown, misshapen or not of float type, damage; all problems together.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {str(folder)!r}")
    if not (folder / "config.json").is_file():
        if (folder / "config.json").exists():
            raise FormatError(f"{folder / 'config.json'} is no file: it should hold the model's settings")
        raise FormatError(f"{folder} has no config.json: it is no folder of transformers")
    raw, weights = load_json(folder / "config.json"), Weights(folder)
    try:
        config, params = _model(raw, weights)
    except FormatError as error:
        raise FormatError(f"{folder}: {error}") from None
    return tables.build(config, params, _tokenizer(folder, raw, config))


def _model(raw: dict[str, Any], weights: Weights) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    family, kind = family_of(raw, weights.places)
    said = Said(raw)
    fields = family.ours(said, kind)
    said.refuse("quantization_config")
    said.refuse("is_encoder_decoder", False)
    said.refuse("pruned_heads", {})
    problems, config = said.problems, None
    try:
        config = tables.settings(**fields)
    except FormatError as error:
        problems.append(str(error))
    head = family.heads.get(fields["head"], Head())
    names, copies, more = _canonical(family, head, weights)
    ignored = re.compile(f"{family.ignored}|{head.ignored}").fullmatch
    for name, stored in names.items():
        dtype = weights.places[stored].dtype
        if dtype not in FLOATS and not ignored(name):
            more.append(f"{stored} has type {dtype}: the kit reads {', '.join(FLOATS)}")
    complain(problems + more)
    assert config is not None  # else there was a problem
    complain(_too_large(config, weights))
    rows, stored = rows_of(family, head, said), {name: weights.places[at].shape for name, at in names.items()}
    if config.layers > DEEP:
        complain(_misshapen(rows, config, stored))
    params = tables.read(
        rows,
        config,
        stored,
        lambda name: weights.get(names[name]),
        ignored=lambda name: bool(ignored(name)),
    )
    remedy = "if they are meant to differ, say so in config.json: tie_word_embeddings = false"
    complain([f"{a} differs from {b}: {remedy}" for a, b in copies if not _equal(weights, a, b)])
    return config, params


def family_of(raw: dict[str, Any], names: Iterable[str] = ()) -> tuple[Family, str]:
    """The family of a config.json and the kind of its head.

    Without `architectures` model_type decides: a causal model, but for bert the heads that the tensors are for.
    """
    listed, type_ = raw.get("architectures"), raw.get("model_type")
    known = {name: (family, kind) for family in FAMILIES for name, kind in family.architectures.items()}
    if listed:
        name = listed[0] if type(listed) is list and type(listed[0]) is str else None
        if name not in known:
            raise FormatError(f"architectures = {str(listed)[:80]}: the kit reads {', '.join(known)}")
        family, kind = known[name]
        if type_ is not None and type_ != family.type:
            raise FormatError(f"model_type = {str(type_)[:80]!r}, and architectures = {listed[0]}: one must be wrong")
        return family, kind
    found = next((family for family in FAMILIES if family.type == type_), None)
    if found is None:
        kinds = ", ".join(family.type for family in FAMILIES)
        raise FormatError(f"model_type = {str(type_)[:80]!r}, without architectures: the kit reads {kinds}")
    if found.type != "bert":
        return found, "causal"
    begins = {name.split(".", 1)[0] for name in names}
    return found, "mlm" if "cls" in begins else "classes" if "classifier" in begins else "none"


def _canonical(family: Family, head: Head, weights: Weights) -> tuple[dict[str, str], list[tuple[str, str]], list[str]]:
    """Names of the table -> names in the file; pairs stored twice, which must be equal; problems."""
    bare = not any(name.startswith(family.prefix) for name in weights.places)
    names, problems = dict[str, str](), []
    for stored in weights.places:
        name = family.prefix + stored if bare and not stored.startswith(HEADS) else stored
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        if name in names:
            problems.append(f"{stored} and {names[name]} are one tensor under two names")
        names[name] = stored
    copies = []
    for copy, original in head.twins.items():
        if copy in names:
            stored = names.pop(copy)
            copies += [(stored, names[original])] if original in names else []
            names.setdefault(original, stored)
    return names, copies, problems


def rows_of(family: Family, head: Head, said: Said) -> list[Row]:
    """The table for one config.json: what it says is absent is zero."""
    rows = (*family.rows, *head.rows)
    absent = tuple(said.absent) or ("\0",)
    return [row._replace(filled=0.0) if type(row.ours) is str and row.ours.endswith(absent) else row for row in rows]


def _too_large(config: ModelConfig, weights: Weights) -> list[str]:
    """Settings larger than any tensor of the file: found before anything of that size is so much as described."""
    largest = max((math.prod(place.shape) for place in weights.places.values()), default=0)
    sizes = {
        "vocabulary": config.vocab,
        "hidden width": config.hidden,
        "heads": config.heads * config.head_width,
        "context": config.context if config.positions == "learned" else 1,
        "token types": config.token_types,
        "classes": config.classes,
    }
    return [
        f"{what} x width = {size:,} x {config.width:,}, and the largest tensor has {largest:,} numbers"
        for what, size in sizes.items()
        if size * config.width > largest
    ]


def _misshapen(rows: list[Row], config: ModelConfig, stored: dict[str, tuple[int, ...]]) -> list[str]:
    """Tensors of a deep model that are missing or misshapen, from the description of its first layer alone."""
    one = config.replace(layers=1)
    wanted, templates = shapes(one), {row.theirs.replace("{i}", "0"): row.theirs for row in rows}
    problems = []
    for row in tables.unrolled(rows, one):
        shape = tuple(row.turn.shape(tuple(tuple(wanted[name].shape) for name in row.ours), one))
        for i in range(config.layers) if "{i}" in templates[row.theirs] else (0,):
            name = templates[row.theirs].replace("{i}", str(i))
            if name not in stored and row.filled is None:
                problems.append(f"{name} is missing")
            elif stored.get(name, shape) != shape:
                problems.append(f"{name} has shape {stored[name]} instead of {shape}")
    return problems


def _equal(weights: Weights, a: str, b: str) -> bool:
    x, y = weights.places[a], weights.places[b]
    return x.dtype == y.dtype and x.shape == y.shape and weights.get(a).tobytes() == weights.get(b).tobytes()


def _tokenizer(folder: Path, raw: dict[str, Any], config: ModelConfig) -> Tokenizer | None:
    try:
        tokenizer = tokenizer_of(folder)
        if tokenizer is not None and tokenizer.vocab > config.vocab:
            raise FormatError(f"it has {tokenizer.vocab} ids, and the model {config.vocab}")
    except FormatError as error:
        warnings.warn(f"{folder}: loaded without its tokenizer, which the kit does not take: {error}", stacklevel=3)
        return None
    if tokenizer is None:
        return None
    tokenizer = tokenizer.with_roles(_roles(folder, raw, tokenizer))
    fit = raw.get(FIT) if raw.get(MARK) == "tinylm" else None
    return _unframed(tokenizer, config, fit) if type(fit) is str and fit != tokenizer.sha256 else tokenizer


def _roles(folder: Path, raw: dict[str, Any], tokenizer: Tokenizer) -> dict[str, int]:
    """The id in each role: by config.json's ids, else tokenizer_config.json's names, else generation_config.json's ids.

    Of several, the first that is special; ids of tokens that were never added are passed over.
    """
    added = {token["id"]: token for token in json.loads(tokenizer.to_json()).get("added_tokens") or []}
    named = {token["content"]: i for i, token in added.items()}
    words, last = _beside(folder / "tokenizer_config.json"), _beside(folder / "generation_config.json")
    roles = {}
    for role, theirs in ROLES.items():
        word = words.get(f"{theirs}_token")
        word = word.get("content") if type(word) is dict else word
        ids = [raw.get(f"{theirs}_token_id"), named.get(word) if type(word) is str else None]
        for said in (*ids, last.get(f"{theirs}_token_id")):
            found = [i for i in (said if type(said) is list else [said]) if type(i) is int and i in added]
            if found:
                roles[role] = next((i for i in found if added[i]["special"]), found[0])
                break
    return roles


def _beside(path: Path) -> dict[str, Any]:
    """What a file beside config.json says; nothing where there is none, or (with a warning) a damaged one."""
    try:
        return load_json(path) if path.is_file() else {}
    except FormatError as error:
        warnings.warn(f"{error}; the begin and end tokens it may name are not used", stacklevel=5)
        return {}


def _unframed(tokenizer: Tokenizer, config: ModelConfig, sha256: str) -> Tokenizer:
    """The tokenizer that `_document` wrote; without its template it is the one that training data was made with."""
    document = json.loads(tokenizer.to_json())
    ours, there = _template(tokenizer, config), document.get("post_processor")
    steps = there.get("processors") if there else None
    if ours is not None and there == ours:
        document["post_processor"] = None
    elif ours is not None and type(steps) is list and len(steps) == 2 and steps[1] == ours:
        document["post_processor"] = steps[0]
    else:
        return tokenizer
    found = Tokenizer(document)
    if found.sha256 != sha256 and document["post_processor"] is None:  # some files lack the entry
        bare = Tokenizer({name: part for name, part in document.items() if name != "post_processor"})
        return bare if bare.sha256 == sha256 else found
    return found


# --- writing ----------------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """How one architecture would say a model.

    Attributes:
        architecture: its class name. family: of it. raw: the config.json.
        config: what that reads back as. rows: the table for it.
        reasons: why it cannot be. exact: `config` is the model's, to the last bias that is zero.
    """

    architecture: str
    family: Family
    raw: dict[str, Any]
    config: ModelConfig | None
    rows: list[Row]
    reasons: list[str]
    exact: bool


def write(model: Transformer, folder: PathLike, *, dtype: Dtype = "float32") -> Path:
    """Write a folder that transformers opens: config.json (last), model.safetensors, the tokenizer, generation ids.

    Their tokenizer frames texts as the kit does, so that a prompt is continued there as by `tinylm.generate`.

    Of the architectures that give the same logits the one is taken that has the model's own settings. Where one always
    has a bias, or token types, or a pooler (BertModel), which the model lacks, zeros are written. Dropout is written
    where theirs has the same places. The same model gives the same bytes.

    Args:
        model: without techniques (fold them first). folder: made if need be; an earlier folder of ours is replaced.
        dtype: of the weights; f32, f16 and bf16 are short for them.

    Raises:
        FormatError: no architecture says this model (every reason, for the nearest), or weights exceed the dtype.
        FileExistsError: the folder holds something else. OSError: path, free and needed MB.
    """
    dtype = SHORT[dtype] if type(dtype) is str and dtype in SHORT else dtype
    if dtype not in ("float32", "float16", "bfloat16"):
        raise FormatError(f"dtype = {dtype!r}: must be float32, float16 or bfloat16 (f32, f16, bf16)")
    folder, config = Path(folder), model.config
    params = {name: np.asarray(value, np.float32) for name, value in named(model).items()}
    complain(
        [
            f"{name} is no plain weight: fold the techniques first"
            for name in sorted(params.keys() ^ shapes(config).keys())
        ]
    )
    plan = planned(config, params)
    tensors = _tensors(plan, params)
    complain(_unwritable(tensors, dtype))
    special = _special(model.tokenizer, config) if model.tokenizer else {}
    ids = {f"{role}_token_id": i for role, (_, i) in special.items() if role in ("bos", "eos", "pad")}
    ends = sorted({ids[f"{role}_token_id"] for role in ("bos", "eos") if role in special})  # ours end at either
    raw = {
        "architectures": [plan.architecture],
        "model_type": plan.family.type,
        "dtype": dtype,
        "torch_dtype": dtype,  # its name of before 2026
        **{f"{role}_token_id": None for role in ("bos", "eos", "pad")},
        **ids,
        **plan.raw,
        MARK: "tinylm",
        **({FIT: model.tokenizer.sha256} if model.tokenizer else {}),
    }
    files = {"config.json": raw}
    if model.tokenizer:
        files["tokenizer_config.json"] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": config.context,
            "clean_up_tokenization_spaces": False,
            "model_input_names": [
                "input_ids",
                *(["token_type_ids"] if config.kind == "encoder" else []),
                "attention_mask",
            ],
            **{f"{role}_token": name for role, (name, _) in special.items()},
        }
    if config.kind == "decoder" and config.head in ("tied", "untied"):
        files["generation_config.json"] = ids | ({"eos_token_id": ends} if len(ends) > 1 else {})
        if model.tokenizer and model.tokenizer.vocab < config.vocab:  # ids without a text, which we never give either
            files["generation_config.json"]["suppress_tokens"] = [*range(model.tokenizer.vocab, config.vocab)]
    _free(folder)
    (folder / "config.json").unlink(missing_ok=True)  # without it, a half-replaced folder is no model
    sync_folder(folder)
    write_file(folder / SINGLE, tensors, dtype)
    for name in OURS[::-1]:
        if name == "tokenizer.json" and model.tokenizer:
            write_bytes(folder / name, _document(model.tokenizer, config).encode())
        elif name in files:
            write_bytes(folder / name, (json.dumps(files[name], indent=2, sort_keys=True) + "\n").encode())
        elif name != SINGLE:
            (folder / name).unlink(missing_ok=True)
    return folder


def planned(config: ModelConfig, params: dict[str, np.ndarray]) -> Plan:
    """The architecture for a model. Raises FormatError with every reason, for the nearest, when there is none."""
    o_bias = any(x.any() for name, x in params.items() if name.endswith("attn.o.bias"))
    plans = [_plan(family, config, o_bias, params) for family in FAMILIES]
    good = sorted((plan for plan in plans if not plan.reasons), key=lambda plan: not plan.exact)
    if good:
        return good[0]
    nearest = [plan for plan in plans if len(plan.reasons) == min(len(plan.reasons) for plan in plans)]
    told = "; ".join(f"not {plan.architecture}: {', '.join(plan.reasons)}" for plan in nearest)
    raise FormatError(f"no architecture of transformers that the kit knows says this model; {told}")


def _plan(family: Family, config: ModelConfig, o_bias: bool, params: dict[str, np.ndarray]) -> Plan:
    wanted = "causal" if config.head in ("tied", "untied") else config.head
    names = [name for name, kind in family.architectures.items() if kind == wanted] or list(family.architectures)
    causal_mlm = wanted == "mlm" and config.kind == "decoder" and len(names) > 1  # BertLMHeadModel
    architecture = names[1] if causal_mlm else names[0]
    raw = family.theirs(config, o_bias)
    said = Said(raw)
    fields = family.ours(said, family.architectures[architecture])
    head = family.heads.get(fields["head"], Head())
    rows = rows_of(family, head, said)
    try:
        back = tables.settings(**fields)
    except FormatError as error:
        return Plan(architecture, family, raw, None, rows, [*said.problems, str(error)], False)
    mine, theirs = _counted(config), _counted(back)
    differing = [name for name in mine if mine[name] != theirs[name]]
    reasons = said.problems + [f"{name} = {mine[name]!r} (it says {theirs[name]!r})" for name in differing]
    if not reasons:  # else names cannot be compared
        placed = {name for row in tables.unrolled(rows, back) if row.filled is None for name in row.ours}
        left = {re.sub(r"\.\d+\.", ".*.", name) for name in params.keys() - placed if params[name].any()}
        reasons = [f"it has no place for {', '.join(sorted(left))}, not zero"] if left else []
    own = (config.bias, config.qkv_bias, config.token_types)
    return Plan(architecture, family, raw, back, rows, reasons, own == (back.bias, back.qkv_bias, back.token_types))


def _counted(config: ModelConfig) -> dict[str, Any]:
    """The settings that change what a model computes, each said in one way.

    Without biases and token types: zeros say that there are none. Without what acts in training only.
    """
    said = dataclasses.asdict(config)
    for name in ("bias", "qkv_bias", "token_types", "dropout", "init_std"):
        del said[name]
    for name in ("positions", "window"):
        said[name] = pattern([config.at(name, layer) for layer in range(config.layers)])
    if said["positions"] in ("learned", "none"):
        said["theta"] = said["rotary"] = 0
    if config.rotary == config.head_width:
        said["rotary"] = 0
    if config.attention_scale == config.head_width**-0.5:
        said["attention_scale"] = 0.0
    return said


def _tensors(plan: Plan, params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Their tensors, with zeros for what they always have."""
    assert plan.config is not None
    rows = [row for row in plan.rows if row.filled is None]
    wide = shapes(plan.config)
    placed = {name for row in tables.unrolled(rows, plan.config) for name in row.ours}
    full = {name: params[name] if name in params else np.zeros(wide[name].shape, np.float32) for name in placed}
    tensors = tables.write(rows, plan.config, full)
    for name in plan.family.heads.get(plan.config.head, Head()).expected:
        width = plan.config.width
        tensors |= {f"{name}.weight": np.zeros((width, width), np.float32), f"{name}.bias": np.zeros(width, np.float32)}
    if plan.config.head == "none":
        tensors = {name.removeprefix(plan.family.prefix): x for name, x in tensors.items()}
    return tensors


def _special(tokenizer: Tokenizer, config: ModelConfig) -> dict[str, tuple[str, int]]:
    """Their role -> the special token and its id."""
    document = json.loads(tokenizer.to_json())
    marked = {role for token in document.get("added_tokens") or [] for role in token.get("roles", ())}
    wanted = [role for role in ROLES if role not in ("cls", "sep") or config.kind == "encoder" or role in marked]
    roles = {ROLES[role]: getattr(tokenizer, role) for role in wanted}
    unknown = document["model"].get("unk_token")
    roles["unk"] = tokenizer.specials.get(unknown) if type(unknown) is str else None
    return {role: (tokenizer.names[i], i) for role, i in roles.items() if i is not None}


def _unwritable(tensors: dict[str, np.ndarray], dtype: str) -> list[str]:
    problems = []
    for name, x in tensors.items():
        with np.errstate(over="ignore"):
            fits = np.isfinite(x.astype(FLOATS[CODES[dtype]])).all()
        if not fits and not np.isfinite(x).all():
            problems.append(f"{name} holds values that are not finite")
        elif not fits:
            other = "bfloat16" if dtype == "float16" else "float32"
            problems.append(f"{name} holds values that exceed {dtype} (use {other})")
    return problems


def _document(tokenizer: Tokenizer, config: ModelConfig) -> str:
    """The tokenizer.json for transformers: it frames texts, and has no roles, which config.json says there."""
    document = json.loads(tokenizer.to_json())
    for token in document.get("added_tokens") or []:
        token.pop("roles", None)  # transformers would print that it does not know them
    there, ours = document.get("post_processor"), _template(tokenizer, config)
    if ours is not None and there is None:
        document["post_processor"] = ours
    elif ours is not None and there["type"] == "ByteLevel":  # it moves offsets alone: texts would go bare
        document["post_processor"] = {"type": "Sequence", "processors": [there, ours]}
    return json.dumps(document, ensure_ascii=False, indent=1)


def _template(tokenizer: Tokenizer, config: ModelConfig) -> dict[str, Any] | None:
    """What stands around a text, and around two: a begin before each, or an encoder's cls and sep."""
    encoder = config.kind == "encoder"
    first, last = (tokenizer.cls, tokenizer.sep) if encoder else (tokenizer.begin, None)
    if first is None or (encoder and last is None):
        return None
    mark = lambda i, kind: {"SpecialToken": {"id": tokenizer.names[i], "type_id": kind}}  # noqa: E731
    text = lambda which, kind: {"Sequence": {"id": which, "type_id": kind}}  # noqa: E731
    second = 0 if encoder and config.token_types == 1 else 1  # a type that the model has
    ends = [mark(last, 0)] if encoder else []
    single = [mark(first, 0), text("A", 0), *ends]
    other = [text("B", second), mark(last, second)] if encoder else [mark(first, second), text("B", second)]
    names = {tokenizer.names[i]: i for i in (first, last) if i is not None}
    known = {name: {"id": name, "ids": [i], "tokens": [name]} for name, i in names.items()}
    return {"type": "TemplateProcessing", "single": single, "pair": [*single, *other], "special_tokens": known}


def _free(folder: Path) -> None:
    """Make the folder. Raises FileExistsError unless it is empty or holds what `write` left."""
    folder.mkdir(parents=True, exist_ok=True)
    there = {path.name for path in folder.iterdir() if not LEFTOVER.fullmatch(path.name)}
    if "config.json" in there:
        try:
            raw = load_json(folder / "config.json")
        except FormatError:
            raw = {}
        if raw.get(MARK) != "tinylm" or "transformers_version" in raw:  # they write that when they save it again
            raise FileExistsError(f"{folder} holds another model or a run: write into another folder")
    elif there - set(OURS):
        raise FileExistsError(f"{folder} holds {', '.join(sorted(there)[:8])}: write into another folder")
    if INDEX in there:
        raise FileExistsError(f"{folder} holds shards of another model: write into another folder")
