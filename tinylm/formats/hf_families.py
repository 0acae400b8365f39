"""What Hugging Face's config.json says in words of ours, both ways, for each architecture.

`ours` turns a config.json into settings, `theirs` does the reverse; the writer reads back what it is about to write,
so an architecture can say a model exactly when nothing differs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from tinylm.config import ModelConfig
from tinylm.formats.hf_said import Said
from tinylm.formats.hf_tables import BERT_ROWS, CLASS_ROWS, GPT2_ROWS, LLAMA_ROWS, MLM_ROWS, NEO_ROWS, NEOX_ROWS
from tinylm.formats.tables import Row

LAYERS = 256  # that a model is read with: building a deeper one takes seconds, and a header costs nothing to forge
GATES = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu", "gelu_python": "geglu", "relu": "reglu"}
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "relu2": "relu2",
}
"""Their activation -> our `mlp`. Those of one value are one function, up to the last bit of a constant."""


class Head(NamedTuple):
    """What an architecture's head adds to its table.

    Attributes:
        rows: of the head itself. ignored: pattern of further tensors that hold nothing the kit needs.
        twins: one tensor under two names, copy -> original. expected: linear layers, as wide as the model, that their
            program looks for and ours lacks; written as zeros.
    """

    rows: tuple[Row, ...] = ()
    ignored: str = "(?!)"
    twins: Mapping[str, str] = {}
    expected: tuple[str, ...] = ()


class Family(NamedTuple):
    """One model type of theirs.

    Attributes:
        type: their model_type. architectures: their class names -> our head; "causal" is tied or untied.
        prefix: what tensors of the trunk begin with, but in files of the bare trunk.
        rows: the table. ours: config.json to settings, see `Said`. theirs: back, given whether any bias of attention's
            output is not zero (theirs have one switch for those and query's, key's and value's).
        ignored: pattern of tensors that hold nothing the kit needs.
        heads: for each head of ours, what else there is to know.
    """

    type: str
    architectures: dict[str, str]
    prefix: str
    rows: tuple[Row, ...]
    ours: Callable[[Said, str], dict[str, Any]]
    theirs: Callable[[ModelConfig, bool], dict[str, Any]]
    ignored: str
    heads: Mapping[str, Head] = {}


def pattern(values: list[Any]) -> Any:
    """The shortest way to say a setting that differs from layer to layer: one value, or a tuple that repeats."""
    for n in range(1, len(values) + 1):
        if all(value == values[i % n] for i, value in enumerate(values)):
            return values[0] if n == 1 else tuple(values[:n])
    return ()


# --- Llama and its kin ------------------------------------------------------------------------------------------------

O_BIAS, MLP_BIASES = {"attn.o.bias"}, {"mlp.gate.bias", "mlp.up.bias", "mlp.down.bias"}


def _llama_ours(kin: str, said: Said, head: str) -> dict[str, Any]:
    width, heads = said.whole("hidden_size"), said.whole("num_attention_heads")
    layers = said.whole("num_hidden_layers", most=LAYERS)
    kv = said.whole("num_key_value_heads", default={"mistral": 8, "qwen2": 32, "qwen3": 32}.get(kin, heads))
    head_width = said.whole("head_dim", default=128 if kin == "qwen3" else max(1, width // heads))
    attention = kin in ("llama", "qwen3") and said.flag("attention_bias", False)
    mlp = kin == "llama" and said.flag("mlp_bias", False)
    if mlp and not attention:
        said.absent |= O_BIAS
    if attention and not mlp:
        said.absent |= MLP_BIASES
    return {
        **_decoder(said, head, tied=False),
        "context": said.whole("max_position_embeddings", default=2048),
        "width": width,
        "layers": layers,
        "heads": heads,
        "kv_heads": kv,
        "head_width": head_width,
        "hidden": said.whole("intermediate_size"),
        "norm": "rmsnorm",
        "norm_eps": said.number("rms_norm_eps", default=1e-6),
        "block": "pre",
        "mlp": said.among("hidden_act", GATES, "silu"),
        "positions": "rope",
        **said.rope(head_width),
        "window": _windows(said, kin, layers),
        "qk_norm": kin == "qwen3",
        "bias": attention or mlp,
        "qkv_bias": attention or kin == "qwen2",
    }


def _windows(said: Said, kin: str, layers: int) -> Any:
    """Tokens each layer looks back; theirs count the token itself, as ours do."""
    full, sliding = "full_attention", "sliding_attention"
    if kin == "llama":
        said.refuse("sliding_window")
        said.refuse("layer_types", [full] * layers)
        return 0
    if kin == "mistral":
        unlimited = "sliding_window" in said.raw and said.raw["sliding_window"] is None
        said.refuse("layer_types", [full if unlimited else sliding] * layers)
        return 0 if unlimited else said.whole("sliding_window", default=4096)
    size = said.whole("sliding_window", default=4096) if said.flag("use_sliding_window", False) else 0
    kinds = said.raw.get("layer_types")
    if kinds is None:
        least = said.whole("max_window_layers", default=28) if said.raw.get("max_window_layers") != 0 else 0
        kinds = [sliding if size and i >= least else full for i in range(layers)]
    if type(kinds) is not list or len(kinds) != layers or not all(k in (full, sliding) for k in kinds):
        said.wrong("layer_types", kinds, f"must name {full} or {sliding} for each of {layers} layers")
        return 0
    if sliding in kinds and not size:
        said.wrong("layer_types", kinds, f"names {sliding}, and use_sliding_window is false")
    return pattern([size if k == sliding else 0 for k in kinds])


def _decoder(said: Said, head: str, *, tied: bool) -> dict[str, Any]:
    """What every causal model says in the same words."""
    tie = said.flag("tie_word_embeddings", tied)
    return {
        "kind": "decoder",
        "vocab": said.whole("vocab_size"),
        "head": "none" if head == "none" else "tied" if tie else "untied",
        "init_std": said.number("initializer_range", default=0.02, zero=True),
    }


USUAL = {
    "vocab_size": "vocab",
    "max_position_embeddings": "context",
    "hidden_size": "width",
    "intermediate_size": "hidden",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "initializer_range": "init_std",
}


def _usual(c: ModelConfig) -> dict[str, Any]:
    """What Llama, GPT-NeoX and BERT call by the same names."""
    return {theirs: getattr(c, ours) for theirs, ours in USUAL.items()}


def _named_act(mlp: str, known: Mapping[str, str], default: str) -> str:
    """Their first name for our activation; the default where they have none, which the reading back then shows."""
    return next((theirs for theirs, ours in known.items() if ours == mlp), default)


def _llama_theirs(kin: str, c: ModelConfig, o_bias: bool) -> dict[str, Any]:
    windows = [c.at("window", layer) for layer in range(c.layers)]
    said: dict[str, Any] = {
        **_usual(c),
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_width,
        "hidden_act": _named_act(c.mlp, GATES, "silu"),
        "rms_norm_eps": c.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.theta},
        "rope_theta": c.theta,  # for readers of before rope_parameters
        "tie_word_embeddings": c.head == "tied",
    }
    if kin in ("llama", "qwen3"):
        said["attention_bias"] = bool(c.qkv_bias) or o_bias
    if kin == "llama":
        said["mlp_bias"] = c.bias
    if kin == "mistral":
        said["sliding_window"] = max(windows) or None
    if kin in ("qwen2", "qwen3"):
        said |= {"use_sliding_window": max(windows) > 0, "sliding_window": max(windows) or None, "max_window_layers": 0}
        said["layer_types"] = ["sliding_attention" if w else "full_attention" for w in windows]
    return said


def _kin(type: str, name: str) -> Family:
    architectures = {f"{name}ForCausalLM": "causal", f"{name}Model": "none"}
    return Family(
        type,
        architectures,
        "model.",
        LLAMA_ROWS,
        functools.partial(_llama_ours, type),
        functools.partial(_llama_theirs, type),
        r".*rotary_emb\.inv_freq",
        {"tied": Head(twins={"lm_head.weight": "model.embed_tokens.weight"})},
    )


# --- GPT-2 ------------------------------------------------------------------------------------------------------------


def _plain(said: Said, width: int, heads: int) -> dict[str, Any]:
    """Learned positions, layer norms, a plain MLP, heads that divide the width."""
    if width % heads:
        said.wrong("heads", heads, f"must divide the width, {width}")
    return {"norm": "layernorm", "positions": "learned", "head_width": max(1, width // heads), "bias": True}


def _gpt2_ours(said: Said, head: str) -> dict[str, Any]:
    for name in ("add_cross_attention", "scale_attn_by_inverse_layer_idx"):
        said.refuse(name, False)
    width, heads = said.whole("n_embd", "hidden_size"), said.whole("n_head", "num_attention_heads")
    return {
        **_decoder(said, head, tied=True),
        **_plain(said, width, heads),
        "context": said.whole("n_positions", "max_position_embeddings", "n_ctx"),
        "width": width,
        "layers": said.whole("n_layer", "num_hidden_layers", most=LAYERS),
        "heads": heads,
        "hidden": said.whole("n_inner", default=4 * width),
        "norm_eps": said.number("layer_norm_epsilon", default=1e-5),
        "block": "pre",
        "mlp": said.among("activation_function", ACTIVATIONS, "gelu_new"),
        "attention_scale": 0.0 if said.flag("scale_attn_weights", True) else 1.0,
        "dropout": said.dropout("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    }


def _gpt2_theirs(c: ModelConfig, o_bias: bool) -> dict[str, Any]:
    del o_bias
    return {
        "vocab_size": c.vocab,
        "n_positions": c.context,
        "n_embd": c.width,
        "n_layer": c.layers,
        "n_head": c.heads,
        "n_inner": c.hidden,
        "activation_function": _named_act(c.mlp, ACTIVATIONS, "gelu_new"),
        "layer_norm_epsilon": c.norm_eps,
        "scale_attn_weights": c.attention_scale != 1.0,
        "tie_word_embeddings": c.head == "tied",
        "initializer_range": c.init_std,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), c.dropout),
    }


# --- GPT-Neo ----------------------------------------------------------------------------------------------------------


def _neo_ours(said: Said, head: str) -> dict[str, Any]:
    width, heads = said.whole("hidden_size"), said.whole("num_heads", "num_attention_heads")
    layers = said.whole("num_layers", "num_hidden_layers", most=LAYERS)
    size = said.whole("window_size", default=256)
    kinds = _neo_kinds(said, layers)
    return {
        **_decoder(said, head, tied=True),
        **_plain(said, width, heads),
        "context": said.whole("max_position_embeddings", default=2048),
        "width": width,
        "layers": layers,
        "heads": heads,
        "hidden": said.whole("intermediate_size", default=4 * width),
        "norm_eps": said.number("layer_norm_epsilon", default=1e-5),
        "block": "pre",
        "mlp": said.among("activation_function", ACTIVATIONS, "gelu_new"),
        "window": pattern([size if kind == "local" else 0 for kind in kinds]),
        "attention_scale": 1.0,  # the scores are not divided by anything
        "qkv_bias": False,
        "dropout": said.dropout("resid_dropout", "embed_dropout", "attention_dropout"),
    }


def _neo_kinds(said: Said, layers: int) -> list[str]:
    """ "global" or "local" for each layer, from attention_types, or attention_layers, which must say the same."""
    found, types = [], said.raw.get("attention_types")
    listed = said.raw.get("attention_layers")
    what = f'must say global or local for each of {layers} layers, as in [[["global", "local"], {layers // 2}]]'
    for item in types if type(types) is list else [] if types is not None or listed else [[["global", "local"], 12]]:
        ok = type(item) is list and len(item) == 2 and type(item[0]) is list and type(item[1]) is int
        if not ok or item[1] * len(item[0]) > layers:
            said.wrong("attention_types", types, what)
            return ["global"] * layers
        found += item[0] * item[1]
        if len(found) > layers:
            break
    if types is None and listed:
        found = listed if type(listed) is list else []
    if len(found) != layers or not all(kind in ("global", "local") for kind in found):
        said.wrong("attention_types" if types else "attention_layers", types or listed, what)
        return ["global"] * layers
    said.refuse("attention_layers", found)
    return found


def _neo_theirs(c: ModelConfig, o_bias: bool) -> dict[str, Any]:
    del o_bias
    windows = [c.at("window", layer) for layer in range(c.layers)]
    kinds = ["local" if w else "global" for w in windows]
    return {
        "vocab_size": c.vocab,
        "max_position_embeddings": c.context,
        "hidden_size": c.width,
        "num_layers": c.layers,
        "num_heads": c.heads,
        "intermediate_size": c.hidden,
        "window_size": max(windows) or 256,
        "attention_types": [[kinds, 1]],
        "attention_layers": kinds,
        "activation_function": _named_act(c.mlp, ACTIVATIONS, "gelu_new"),
        "layer_norm_epsilon": c.norm_eps,
        "tie_word_embeddings": c.head == "tied",
        "initializer_range": c.init_std,
        **dict.fromkeys(("resid_dropout", "embed_dropout", "attention_dropout"), c.dropout),
    }


# --- GPT-NeoX ---------------------------------------------------------------------------------------------------------


def _neox_ours(said: Said, head: str) -> dict[str, Any]:
    width, heads = said.whole("hidden_size"), said.whole("num_attention_heads")
    attention = said.flag("attention_bias", True)
    if not attention:
        said.absent |= O_BIAS
    said.refuse("head_dim", max(1, width // heads))
    plain = _plain(said, width, heads)
    return {
        **_decoder(said, head, tied=False),
        **plain,
        "positions": "rope",
        **said.rope(plain["head_width"], partial=0.25),
        "context": said.whole("max_position_embeddings", default=2048),
        "width": width,
        "layers": said.whole("num_hidden_layers", most=LAYERS),
        "heads": heads,
        "hidden": said.whole("intermediate_size"),
        "norm_eps": said.number("layer_norm_eps", default=1e-5),
        "block": "parallel" if said.flag("use_parallel_residual", True) else "pre",
        "mlp": said.among("hidden_act", ACTIVATIONS, "gelu"),
        "qkv_bias": attention,
        "dropout": said.dropout("hidden_dropout", "attention_dropout"),
    }


def _neox_theirs(c: ModelConfig, o_bias: bool) -> dict[str, Any]:
    share = (c.rotary or c.head_width) / c.head_width
    if int(c.head_width * share) < c.rotary:  # they round down
        share = math.nextafter(share, 1.0)
    return {
        **_usual(c),
        "hidden_act": _named_act(c.mlp, ACTIVATIONS, "gelu"),
        "layer_norm_eps": c.norm_eps,
        "use_parallel_residual": c.block == "parallel",
        "rope_parameters": {"rope_type": "default", "rope_theta": c.theta, "partial_rotary_factor": share},
        "rotary_pct": share,  # for readers of before rope_parameters
        "rotary_emb_base": c.theta,
        "attention_bias": bool(c.qkv_bias) or o_bias,
        "tie_word_embeddings": c.head == "tied",
        **dict.fromkeys(("hidden_dropout", "attention_dropout"), c.dropout),
    }


# --- BERT -------------------------------------------------------------------------------------------------------------


def _bert_ours(said: Said, head: str) -> dict[str, Any]:
    said.refuse("position_embedding_type", "absolute")
    said.refuse("add_cross_attention", False)
    width, heads = said.whole("hidden_size"), said.whole("num_attention_heads")
    mlp = said.among("hidden_act", ACTIVATIONS, "gelu")
    if head == "mlm" and mlp != "gelu":
        said.wrong("hidden_act", said.raw.get("hidden_act"), "the kit's masked-language head knows only exact gelu")
    if head == "mlm" and not said.flag("tie_word_embeddings", True):
        said.wrong("tie_word_embeddings", False, "the kit's masked-language head uses the embedding")
    labels = said.raw.get("id2label")
    counted = len(labels) if type(labels) is dict and labels else said.whole("num_labels", default=2)
    return {
        **_plain(said, width, heads),
        "kind": "decoder" if said.flag("is_decoder", False) else "encoder",
        "vocab": said.whole("vocab_size"),
        "context": said.whole("max_position_embeddings", default=512),
        "width": width,
        "layers": said.whole("num_hidden_layers", most=LAYERS),
        "heads": heads,
        "hidden": said.whole("intermediate_size"),
        "norm_eps": said.number("layer_norm_eps", default=1e-12),
        "block": "post",
        "mlp": mlp,
        "head": head,
        "classes": counted if head == "classes" else 0,
        "embed_norm": True,
        "token_types": said.whole("type_vocab_size", default=2),
        "dropout": said.dropout("hidden_dropout_prob", "attention_probs_dropout_prob"),
        "init_std": said.number("initializer_range", default=0.02, zero=True),
    }


def _bert_theirs(c: ModelConfig, o_bias: bool) -> dict[str, Any]:
    del o_bias
    said: dict[str, Any] = {
        **_usual(c),
        "hidden_act": _named_act(c.mlp, ACTIVATIONS, "gelu"),
        "layer_norm_eps": c.norm_eps,
        "type_vocab_size": c.token_types or 2,  # without any, two rows of zeros: see `hf.widened`
        "is_decoder": c.kind == "decoder",
        **dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), c.dropout),
    }
    if c.head == "classes":
        said["id2label"] = {str(i): f"LABEL_{i}" for i in range(c.classes)}
        said["label2id"] = {f"LABEL_{i}": i for i in range(c.classes)}
    return said


# --- all --------------------------------------------------------------------------------------------------------------

_TIED = {"tied": Head(twins={"lm_head.weight": "transformer.wte.weight"})}
FAMILIES = (
    _kin("llama", "Llama"),
    _kin("mistral", "Mistral"),
    _kin("qwen2", "Qwen2"),
    _kin("qwen3", "Qwen3"),
    Family(
        "gpt2",
        {"GPT2LMHeadModel": "causal", "GPT2Model": "none"},
        "transformer.",
        GPT2_ROWS,
        _gpt2_ours,
        _gpt2_theirs,
        r"transformer\.h\.\d+\.attn\.(masked_)?bias",
        _TIED,
    ),
    Family(
        "gpt_neo",
        {"GPTNeoForCausalLM": "causal", "GPTNeoModel": "none"},
        "transformer.",
        NEO_ROWS,
        _neo_ours,
        _neo_theirs,
        r"transformer\.h\.\d+\.attn\.attention\.(masked_)?bias",
        _TIED,
    ),
    Family(
        "gpt_neox",
        {"GPTNeoXForCausalLM": "causal", "GPTNeoXModel": "none"},
        "gpt_neox.",
        NEOX_ROWS,
        _neox_ours,
        _neox_theirs,
        r"gpt_neox\.layers\.\d+\.attention\.((masked_)?bias|rotary_emb\.inv_freq)",
        {
            "tied": Head(twins=dict.fromkeys(("embed_out.weight", "lm_head.weight"), "gpt_neox.embed_in.weight")),
            "untied": Head(twins={"lm_head.weight": "embed_out.weight"}),
        },
    ),
    Family(
        "bert",
        {
            "BertForMaskedLM": "mlm",
            "BertLMHeadModel": "mlm",
            "BertForPreTraining": "mlm",
            "BertForSequenceClassification": "classes",
            "BertModel": "none",
        },
        "bert.",
        BERT_ROWS,
        _bert_ours,
        _bert_theirs,
        r"bert\.embeddings\.position_ids",
        {
            "mlm": Head(
                MLM_ROWS,
                r"bert\.pooler\..*|cls\.seq_relationship\..*",
                {
                    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
                    "cls.predictions.decoder.bias": "cls.predictions.bias",
                },
            ),
            "classes": Head(CLASS_ROWS),
            "none": Head(ignored=r"bert\.pooler\..*", expected=("bert.pooler.dense",)),
        },
    ),
)
