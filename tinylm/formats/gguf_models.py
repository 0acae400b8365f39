"""GGUF files as llama.cpp reads and writes them: llama, qwen2, qwen3, gpt2, gptneox and bert models, and ours as these.

    model = read("SmolLM2-135M.Q4_1.gguf")
    write(model, "story.gguf", dtype="q8_0")

A tensor's rows are the outputs of a matrix, as in PyTorch. The llama architecture turns neighbouring features of a head
together, the others distant ones, as here. The file does not say the activation: llama.cpp computes GELU through a
float16 table of its tanh approximation in every model, also where the model means the exact one (gptneox, bert).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tinylm.config import ModelConfig
from tinylm.formats import ggml, gguf, gguf_tokenizers, tables
from tinylm.formats.tables import KEY_PAIRS, QUERY_PAIRS, SAME, TRANSPOSED, FormatError, Row, Turn, require_said
from tinylm.model import Transformer
from tinylm.store import PathLike
from tinylm.weights import named

LAYERS = 512  # llama.cpp has room for no more
FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32, "tq1_0": 36, "tq2_0": 37}  # general.file_type
SHORT = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}  # the names used elsewhere in the kit
EXACT = ("position_embd.weight", "token_types.weight")  # tables of these stay float32, as in llama.cpp's own files


# --- names ------------------------------------------------------------------------------------------------------------


def _split(x: np.ndarray, c: ModelConfig) -> tuple[np.ndarray, ...]:
    q, k = c.heads * c.head_width, c.kv_heads * c.head_width
    return tuple(part.T for part in np.split(x, [q, q + k]))


QKV = Turn(
    _split,
    lambda xs, c: np.concatenate([x.T for x in xs]),
    lambda s, c: (sum(x[-1] for x in s), *s[0][:-1]),
)
"""Query, key and value matrices (or biases) below one another."""


def _linear(theirs: str, ours: str, turn: Turn = TRANSPOSED, filled: float | None = None) -> list[Row]:
    """A matrix and its bias, which may be absent where `filled` is 0."""
    bias = SAME if turn is TRANSPOSED else turn
    return [Row(f"{theirs}.weight", f"{ours}.kernel", turn), Row(f"{theirs}.bias", f"{ours}.bias", bias, filled)]


def _norm(theirs: str, ours: str) -> list[Row]:
    return [Row(f"{theirs}.weight", f"{ours}.scale"), Row(f"{theirs}.bias", f"{ours}.bias")]


def _fused() -> list[Row]:
    ours = lambda part: tuple(f"blocks.{{i}}.attn.{x}.{part}" for x in "qkv")  # noqa: E731
    return [
        Row("blk.{i}.attn_qkv.weight", ours("kernel"), QKV),
        Row("blk.{i}.attn_qkv.bias", ours("bias"), QKV),
        *_linear("blk.{i}.attn_output", "blocks.{i}.attn.o"),
    ]


def _apart(query: Turn = TRANSPOSED, key: Turn = TRANSPOSED) -> list[Row]:
    return [
        *_linear("blk.{i}.attn_q", "blocks.{i}.attn.q", query, 0.0),
        *_linear("blk.{i}.attn_k", "blocks.{i}.attn.k", key, 0.0),
        *_linear("blk.{i}.attn_v", "blocks.{i}.attn.v", filled=0.0),
        *_linear("blk.{i}.attn_output", "blocks.{i}.attn.o", filled=0.0),
    ]


def _mlp(filled: float | None) -> list[Row]:
    parts = [_linear(f"blk.{{i}}.ffn_{x}", f"blocks.{{i}}.mlp.{x}", filled=filled) for x in ("gate", "up", "down")]
    return [row for part in parts for row in part]


EMBED = [Row("token_embd.weight", "embed.table")]
POSITIONS = [Row("position_embd.weight", "embed_positions.table")]
HEAD = [*_norm("output_norm", "norm"), Row("output.weight", "head.out.kernel", TRANSPOSED)]
NORMS = [*_norm("blk.{i}.attn_norm", "blocks.{i}.attn_norm"), *_norm("blk.{i}.ffn_norm", "blocks.{i}.mlp_norm")]
QK_NORMS = [Row(f"blk.{{i}}.attn_{x}_norm.weight", f"blocks.{{i}}.attn.{x}_norm.scale") for x in "qk"]
POST_NORMS = [
    *_norm("token_embd_norm", "embed_norm"),
    *_norm("blk.{i}.attn_output_norm", "blocks.{i}.attn_norm"),
    *_norm("blk.{i}.layer_output_norm", "blocks.{i}.mlp_norm"),
]


# --- architectures ----------------------------------------------------------------------------------------------------


class Architecture(NamedTuple):
    """One of llama.cpp's: its table, the settings that all its models share, and those it leaves open.

    `open` maps a setting to the values it may have, () for any; `eps` is the key of the norms' epsilon; `rope`: the
    rotary keys are read and written.
    """

    rows: list[Row]
    fixed: Mapping[str, Any]
    open: Mapping[str, tuple]
    eps: str
    rope: bool = True


PLAIN = {"window": 0, "softcap": 0.0, "token_types": 0, "embed_norm": False, "kind": "decoder"}
RMS = {**PLAIN, "norm": "rmsnorm", "block": "pre", "mlp": "swiglu", "positions": "rope", "rotary": 0}
LAYER = {**PLAIN, "norm": "layernorm", "qk_norm": False}
HEADS = (("tied", "untied"), ("none", "classes"))  # of decoders, of encoders; without and with tensors of their own
TIED_OR_NOT = {"head": HEADS[0]}
ANY = (False, True)
RMS_EPS, LAYER_EPS = "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"

ARCHITECTURES = {
    "llama": Architecture(
        [*EMBED, *NORMS, *_apart(QUERY_PAIRS, KEY_PAIRS), *_mlp(0.0), *HEAD],
        {**RMS, "qk_norm": False},
        {**TIED_OR_NOT, "bias": ANY, "qkv_bias": ANY},
        RMS_EPS,
    ),
    "qwen2": Architecture(
        [*EMBED, *NORMS, *_apart(), *_mlp(None), *HEAD],
        {**RMS, "qk_norm": False, "bias": False},
        {**TIED_OR_NOT, "qkv_bias": ANY},
        RMS_EPS,
    ),
    "qwen3": Architecture(
        [*EMBED, *NORMS, *QK_NORMS, *_apart(), *_mlp(None), *HEAD],
        {**RMS, "qk_norm": True, "bias": False, "qkv_bias": False},
        TIED_OR_NOT,
        RMS_EPS,
    ),
    "gpt2": Architecture(
        [*EMBED, *POSITIONS, *NORMS, *_fused(), *_mlp(None), *HEAD],
        {**LAYER, "block": "pre", "mlp": "gelu_tanh", "positions": "learned", "bias": True, "qkv_bias": True},
        TIED_OR_NOT,
        LAYER_EPS,
        rope=False,
    ),
    "gptneox": Architecture(
        [*EMBED, *NORMS, *_fused(), *_mlp(None), *HEAD],
        {**LAYER, "mlp": "gelu", "positions": "rope", "bias": True, "qkv_bias": True, "head": "untied"},
        {"block": ("parallel", "pre"), "rotary": ()},
        LAYER_EPS,
    ),
    "bert": Architecture(
        [
            *EMBED,
            *POSITIONS,
            Row("token_types.weight", "embed_types.table"),
            *POST_NORMS,
            *_apart(),
            *_mlp(0.0),
            *_linear("cls", "head.dense"),
            *_linear("cls.output", "head.out"),
        ],
        {**LAYER, "kind": "encoder", "block": "post", "mlp": "gelu", "positions": "learned", "embed_norm": True},
        {"head": HEADS[1], "bias": ANY, "qkv_bias": ANY, "token_types": ()},
        LAYER_EPS,
        rope=False,
    ),
}

NEUTRAL: dict[str, tuple] = {  # what a file may also say; () is anything
    "vocab_size": (),
    "tensor_data_layout": (),
    "pooling_type": (),
    "classifier.output_labels": (),
    "rope.scaling.type": ("none", "linear"),  # linear by a factor of 1
    "rope.scaling.factor": (0.0, 1.0),
    "rope.scale_linear": (0.0, 1.0),
    "rope.scaling.finetuned": (False,),
    "rope.scaling.original_context_length": (),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attention.sliding_window": (0,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
}


# --- reading ----------------------------------------------------------------------------------------------------------


def read(path: PathLike, *, tokenizer: bool = True) -> Transformer:
    """The model in a GGUF file, its weights as float32, with its tokenizer.

    Args:
        path: the file. tokenizer: False leaves it out, for a kind that is not known here.

    Raises:
        FileNotFoundError, and FormatError: a damaged file; an architecture, a setting, a tensor type or a tokenizer
        that is not known; all wrong settings and all wrong tensors are reported together.
    """
    file = gguf.open_file(path)
    with gguf.named(path):
        name = file.metadata.get("general.architecture")
        if not isinstance(name, str) or name not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise FormatError(f"general.architecture = {str(name)[:40]!r}: known are {known}")
        architecture = ARCHITECTURES[name]
        config = _config(file, name, architecture)
        shapes = {tensor: place.shape for tensor, place in file.tensors.items()}
        if "rope_freqs.weight" in shapes:
            raise FormatError("rope_freqs.weight scales the rotary angles, which the kit's models cannot do")
        params = tables.read(architecture.rows, config, shapes, file.tensor)
        words = gguf_tokenizers.read(file.metadata, config.vocab) if tokenizer else None
        return tables.build(config, params, words)


def _config(file: gguf.File, name: str, architecture: Architecture) -> ModelConfig:
    """The settings, from the entries and from which tensors there are."""
    problems, used = [], set[str]()

    def entry(key: str, kind: type, default: Any = None) -> Any:
        used.add(f"{name}.{key}")
        value = file.metadata.get(f"{name}.{key}", default)
        if value is None:
            problems.append(f"{name}.{key} is missing")
        elif type(value) is not kind:
            problems.append(f"{name}.{key} = {str(value)[:40]}: not {'a whole number' if kind is int else kind}")
            value = None
        return value

    heads, width = entry("attention.head_count", int), entry("embedding_length", int)
    fields: dict[str, Any] = {
        "context": entry("context_length", int),
        "width": width,
        "layers": entry("block_count", int),
        "hidden": entry("feed_forward_length", int),
        "heads": heads,
        "kv_heads": entry("attention.head_count_kv", int, heads),
        "norm_eps": entry(architecture.eps, float),
    }
    head_width = entry("attention.key_length", int, width // heads if width and heads else 0)
    values = entry("attention.value_length", int, head_width)
    if values != head_width:
        problems.append(f"keys of {head_width} features a head and values of {values}")
    fields["head_width"] = head_width
    if architecture.rope:
        fields["theta"] = entry("rope.freq_base", float, 10_000.0)
        turned = entry("rope.dimension_count", int, head_width)
        fields["rotary"] = 0 if turned == head_width else turned
    if name == "gptneox":
        fields["block"] = "parallel" if entry("use_parallel_residual", bool, True) else "pre"
    causal = entry("attention.causal", bool, name != "bert")
    if causal != (name != "bert"):
        problems.append(f"{name}.attention.causal = {causal}")
    for key, value in file.metadata.items():
        if not key.startswith(f"{name}.") or key in used:
            continue
        allowed = NEUTRAL.get(key.removeprefix(f"{name}."))
        if allowed is None or (allowed and (isinstance(value, np.ndarray) or value not in allowed)):
            problems.append(f"{key} = {str(value)[:40]!r} is not known here")
    tables.complain(problems)
    if not 0 < fields["layers"] <= LAYERS:
        raise FormatError(f"{name}.block_count = {fields['layers']:,}: 1 to {LAYERS} are allowed")
    there = lambda *tensors: any(tensor in file.tensors for tensor in tensors)  # noqa: E731
    some = lambda *parts: there(*(f"blk.{i}.{x}.bias" for i in range(fields["layers"]) for x in parts))  # noqa: E731
    shape = lambda tensor: file.tensors[tensor].shape if tensor in file.tensors else (0,)  # noqa: E731
    found = {
        "head": HEADS[name == "bert"][there("output.weight", "cls.weight")],
        "bias": some("attn_output", "ffn_gate", "ffn_up", "ffn_down"),
        "qkv_bias": some("attn_q", "attn_k", "attn_v"),
        "token_types": shape("token_types.weight")[0],
    }
    fields |= {key: value for key, value in found.items() if key in architecture.open}
    if found["head"] == "classes":
        fields["classes"] = shape("cls.output.weight")[0]
    fixed = {key: value for key, value in architecture.fixed.items() if key not in architecture.open}
    wrong = {key: fields[key] for key, value in fixed.items() if fields.get(key, value) != value}
    if wrong:
        raise FormatError(f"{name} models have no {', '.join(f'{key} = {value}' for key, value in wrong.items())}")
    vocab = shape("token_embd.weight")[0]
    return tables.settings(**{**architecture.fixed, **fields, "vocab": vocab})


# --- writing ----------------------------------------------------------------------------------------------------------


def write(
    model: Transformer,
    path: PathLike,
    *,
    dtype: str = "f16",
    embedding: str | None = None,
    tokenizer: bool = True,
    rounding: bool = False,
) -> Path:
    """Write a model, with its tokenizer, for llama.cpp.

    Norms, biases and tables of positions stay float32. A matrix whose rows are no whole blocks of its type (32 values
    for q8_0, 256 for tq1_0 and tq2_0) becomes f16.

    Args:
        model: a decoder or an encoder that one of `ARCHITECTURES` can say. path: the file, replaced whole.
        dtype: of the matrices inside the blocks: "float32", "float16", "bfloat16" (or GGUF's "f32", "f16", "bf16"),
            "q8_0", "tq1_0" or "tq2_0". The ternary types are exact: each 256 weights of a row must be -d, 0 or d with
            d a float16.
        embedding: type of the embedding and the head; None: as dtype, and "f16" beside a ternary one.
        tokenizer: False leaves it out, where llama.cpp has no such tokenizer. rounding: round weights to ternary ones.

    Raises:
        FormatError: everything about the model that the format cannot say; then nothing is written. OSError.
    """
    path = Path(path)
    dtype = SHORT.get(str(dtype).lower(), str(dtype).lower())
    embedding = str(embedding or ("f16" if dtype.upper() in ggml.TERNARY else dtype)).lower()
    embedding = SHORT.get(embedding, embedding)
    for given in (dtype, embedding):
        if given not in FILE_TYPES:
            raise FormatError(f"dtype = {given!r}: must be one of {', '.join([*SHORT, *FILE_TYPES])}")
    config = model.config
    name = architecture_of(config)
    architecture = ARCHITECTURES[name]
    _require(config, name)
    tensors = tables.write(architecture.rows, config, named(model))
    kinds = {key: _kind(key, array.shape, dtype, embedding) for key, array in tensors.items()}
    metadata: dict[str, Any] = {
        "general.architecture": name,
        "general.type": "model",
        "general.file_type": FILE_TYPES[dtype],
        "general.quantization_version": 2,
        **{f"{name}.{key}": value for key, value in _entries(config, name, architecture).items()},
        **gguf_tokenizers.write(model.tokenizer if tokenizer else None, config.vocab),
    }
    if name == "bert":
        metadata["tokenizer.ggml.token_type_count"] = max(1, config.token_types)
    try:
        if dtype.upper() in ggml.TERNARY:
            tables.complain([f"{key}: {why}" for key, x in tensors.items() if (why := _inexact(key, x, kinds[key]))])
        gguf.write_file(path, metadata, {key: (kinds[key], x) for key, x in tensors.items()}, rounding=rounding)
    except FormatError as error:
        remedy = (
            ". Ternary blocks want a width and hidden in multiples of 256, and ternary weights: fold the technique "
            "that makes them, or pass rounding=True; or take another dtype"
        )
        raise FormatError(f"{error}{remedy if dtype.upper() in ggml.TERNARY else ''}") from None
    return path


def architecture_of(config: ModelConfig) -> str:
    """The architecture that comes nearest to a model; `write` refuses what it cannot say."""
    if config.kind == "encoder":
        return "bert"
    if config.at("positions", 0) == "learned":
        return "gpt2"
    if config.norm == "layernorm" or config.block == "parallel":
        return "gptneox"
    return "qwen3" if config.qk_norm else "llama"


def _require(config: ModelConfig, name: str) -> None:
    """Refuse what the architecture cannot say."""
    said: dict[str, Any] = {**ARCHITECTURES[name].fixed, **ARCHITECTURES[name].open}
    said = {key: values for key, values in said.items() if values != ()}
    said["attention_scale"] = (0.0, config.head_width**-0.5)
    said |= {"pooling": ("cls",), "pooler": (True,), "embed_rank": (0,), "convs": (0,)}
    if "rotary" in said:
        said["rotary"] = (0, config.head_width)
    if config.layers > LAYERS:
        raise FormatError(f"{config.layers} layers: llama.cpp has room for {LAYERS}")
    if name in ("gpt2", "bert"):  # their matrices are squares there
        said["head_width"] = config.width // config.heads
    require_said(config, f"llama.cpp ({name})", **said)


def _entries(config: ModelConfig, name: str, architecture: Architecture) -> dict[str, Any]:
    entries: dict[str, Any] = {
        "vocab_size": config.vocab,
        "context_length": config.context,
        "embedding_length": config.width,
        "block_count": config.layers,
        "feed_forward_length": config.hidden,
        "attention.head_count": config.heads,
        "attention.head_count_kv": config.kv_heads,
        "attention.key_length": config.head_width,
        "attention.value_length": config.head_width,
        architecture.eps: config.norm_eps,
    }
    if architecture.rope:
        entries |= {"rope.freq_base": config.theta, "rope.dimension_count": config.rotary or config.head_width}
    if name == "gptneox":
        entries["use_parallel_residual"] = config.block == "parallel"
    if name == "bert":
        entries |= {"attention.causal": False, "pooling_type": 4 if config.head == "classes" else 0}  # 4: scores
        if config.head == "classes":
            entries["classifier.output_labels"] = [f"LABEL_{i}" for i in range(config.classes)]
    return entries


def _kind(name: str, shape: tuple[int, ...], dtype: str, embedding: str) -> ggml.Type:
    if len(shape) == 1 or name in EXACT:
        return ggml.TYPES["F32"]
    kind = ggml.TYPES[(dtype if name.startswith("blk.") else embedding).upper()]
    return ggml.TYPES["F16"] if shape[-1] % kind.values else kind


def _inexact(name: str, array: np.ndarray, kind: ggml.Type) -> str:
    """Why a matrix of a ternary model that fits no ternary blocks cannot be kept as float16; "" where it can."""
    if kind.name != "F16" or not name.startswith("blk."):
        return ""
    with np.errstate(over="ignore"):
        same = (array.astype(np.float16) == array).all()
    return "" if same else f"rows of {array.shape[-1]} weights are no blocks of 256, and float16 would round them"
