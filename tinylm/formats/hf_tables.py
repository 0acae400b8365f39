"""Hugging Face's names for what a model holds: one table per architecture, and its layouts."""

from __future__ import annotations

import numpy as np

from tinylm.config import ModelConfig
from tinylm.formats.tables import SAME, TRANSPOSED, Row, Turn

# --- layouts ----------------------------------------------------------------------------------------------------------

THIRDS = Turn(
    lambda x, c: tuple(np.split(x, 3, axis=-1)),
    lambda xs, c: np.concatenate(xs, axis=-1),
    lambda s, c: (*s[0][:-1], 3 * s[0][-1]),
)
"""GPT-2's c_attn, weight or bias: query, key and value one after another; (inputs, outputs) as here."""


def _thirds_of_heads(x: np.ndarray, config: ModelConfig) -> tuple[np.ndarray, ...]:
    split = x.reshape(config.heads, 3, config.head_width, *x.shape[1:])
    return tuple(split[:, i].reshape(-1, *x.shape[1:]).T for i in range(3))


def _heads_of_thirds(xs: tuple[np.ndarray, ...], config: ModelConfig) -> np.ndarray:
    split = [x.T.reshape(config.heads, config.head_width, *x.shape[:-1]) for x in xs]
    return np.stack(split, axis=1).reshape(-1, *xs[0].shape[:-1])


PER_HEAD = Turn(_thirds_of_heads, _heads_of_thirds, lambda s, c: (3 * s[0][-1], *s[0][:-1]))
"""GPT-NeoX's query_key_value, weight or bias: the three of each head together."""


def _linear(theirs: str, ours: str, turn: Turn = TRANSPOSED) -> tuple[Row, Row]:
    return Row(f"{theirs}.weight", f"{ours}.kernel", turn), Row(f"{theirs}.bias", f"{ours}.bias")


def _norm(theirs: str, ours: str) -> tuple[Row, Row]:
    return Row(f"{theirs}.weight", f"{ours}.scale"), Row(f"{theirs}.bias", f"{ours}.bias")


def _embedding(theirs: str, ours: str) -> Row:
    return Row(f"{theirs}.weight", f"{ours}.table")


def _fused(theirs: str, turn: Turn) -> tuple[Row, Row]:
    """Query, key and value in one tensor."""
    kernels, biases = (tuple(f"{_B}.attn.{x}.{leaf}" for x in "qkv") for leaf in ("kernel", "bias"))
    return Row(f"{theirs}.weight", kernels, turn), Row(f"{theirs}.bias", biases, turn)


# --- Llama and its kin ------------------------------------------------------------------------------------------------

_L, _B = "model.layers.{i}", "blocks.{i}"
LLAMA_ROWS = (
    _embedding("model.embed_tokens", "embed"),
    *_norm(f"{_L}.input_layernorm", f"{_B}.attn_norm"),
    *(row for x in "qkvo" for row in _linear(f"{_L}.self_attn.{x}_proj", f"{_B}.attn.{x}")),
    *(row for x in "qk" for row in _norm(f"{_L}.self_attn.{x}_norm", f"{_B}.attn.{x}_norm")),
    *_norm(f"{_L}.post_attention_layernorm", f"{_B}.mlp_norm"),
    *(row for x in ("gate", "up", "down") for row in _linear(f"{_L}.mlp.{x}_proj", f"{_B}.mlp.{x}")),
    *_norm("model.norm", "norm"),
    *_linear("lm_head", "head.out"),
)

# --- GPT-2 and GPT-Neo ------------------------------------------------------------------------------------------------


def _gpt_rows(attention: tuple[Row, ...]) -> tuple[Row, ...]:
    """What GPT-2 and GPT-Neo call the same; GPT-2's linear layers are (inputs, outputs)."""
    h = "transformer.h.{i}"
    turn = SAME if attention[0].turn is THIRDS else TRANSPOSED
    return (
        _embedding("transformer.wte", "embed"),
        _embedding("transformer.wpe", "embed_positions"),
        *_norm(f"{h}.ln_1", f"{_B}.attn_norm"),
        *attention,
        *_norm(f"{h}.ln_2", f"{_B}.mlp_norm"),
        *_linear(f"{h}.mlp.c_fc", f"{_B}.mlp.up", turn),
        *_linear(f"{h}.mlp.c_proj", f"{_B}.mlp.down", turn),
        *_norm("transformer.ln_f", "norm"),
        *_linear("lm_head", "head.out"),
    )


GPT2_ROWS = _gpt_rows(
    (
        *_fused("transformer.h.{i}.attn.c_attn", THIRDS),
        *_linear("transformer.h.{i}.attn.c_proj", f"{_B}.attn.o", SAME),
    )
)
NEO_ROWS = _gpt_rows(
    (
        *(row for x in "qkv" for row in _linear(f"transformer.h.{{i}}.attn.attention.{x}_proj", f"{_B}.attn.{x}")),
        *_linear("transformer.h.{i}.attn.attention.out_proj", f"{_B}.attn.o"),
    )
)

# --- GPT-NeoX ---------------------------------------------------------------------------------------------------------

_X = "gpt_neox.layers.{i}"
NEOX_ROWS = (
    _embedding("gpt_neox.embed_in", "embed"),
    *_norm(f"{_X}.input_layernorm", f"{_B}.attn_norm"),
    *_fused(f"{_X}.attention.query_key_value", PER_HEAD),
    *_linear(f"{_X}.attention.dense", f"{_B}.attn.o"),
    *_norm(f"{_X}.post_attention_layernorm", f"{_B}.mlp_norm"),
    *_linear(f"{_X}.mlp.dense_h_to_4h", f"{_B}.mlp.up"),
    *_linear(f"{_X}.mlp.dense_4h_to_h", f"{_B}.mlp.down"),
    *_norm("gpt_neox.final_layer_norm", "norm"),
    *_linear("embed_out", "head.out"),
)

# --- BERT -------------------------------------------------------------------------------------------------------------

_E, _T = "bert.embeddings", "bert.encoder.layer.{i}"
_SELF = {"q": "query", "k": "key", "v": "value"}
BERT_ROWS = (
    _embedding(f"{_E}.word_embeddings", "embed"),
    _embedding(f"{_E}.position_embeddings", "embed_positions"),
    _embedding(f"{_E}.token_type_embeddings", "embed_types"),
    *_norm(f"{_E}.LayerNorm", "embed_norm"),
    *(row for x, name in _SELF.items() for row in _linear(f"{_T}.attention.self.{name}", f"{_B}.attn.{x}")),
    *_linear(f"{_T}.attention.output.dense", f"{_B}.attn.o"),
    *_norm(f"{_T}.attention.output.LayerNorm", f"{_B}.attn_norm"),
    *_linear(f"{_T}.intermediate.dense", f"{_B}.mlp.up"),
    *_linear(f"{_T}.output.dense", f"{_B}.mlp.down"),
    *_norm(f"{_T}.output.LayerNorm", f"{_B}.mlp_norm"),
)
MLM_ROWS = (
    *_linear("cls.predictions.transform.dense", "head.dense"),
    *_norm("cls.predictions.transform.LayerNorm", "head.norm"),
    Row("cls.predictions.bias", "head.bias"),
)
CLASS_ROWS = (*_linear("bert.pooler.dense", "head.dense"), *_linear("classifier", "head.out"))
