"""Ready-made sizes, one dial that makes others, and what a size costs.

`preset("stories15M")` is a published shape; `preset(params="3M")` is this kit's own shape with about that many
parameters, embeddings included. Other settings go on top: `preset("1M", vocab=1024, context=128)`.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from tinylm.config import GATED, ConfigError, ModelConfig, suggest

LLAMA = {"norm_eps": 1e-5, "mlp": "swiglu", "positions": "rope"}
# GPT-Neo as TinyStories uses it: learned positions, biases but on q, k, v, full and local-256 layers in turn, unscaled
# scores; the paper's counts hold for the 10,000 most frequent tokens.
NEO = {
    "vocab": 10_000,
    "context": 512,
    "heads": 16,
    "norm": "layernorm",
    "mlp": "gelu_tanh",
    "positions": "learned",
    "window": (0, 256),
    "attention_scale": 1.0,
    "bias": True,
    "qkv_bias": False,
}
BERT = {
    "kind": "encoder",
    "vocab": 30_522,
    "norm": "layernorm",
    "norm_eps": 1e-12,
    "block": "post",
    "mlp": "gelu",
    "positions": "learned",
    "head": "mlm",
    "bias": True,
    "embed_norm": True,
    "token_types": 2,
    "dropout": 0.1,
}

# The convolutional variants of the same paper: a front end in the place of a layer.
CONVOLUTIONAL = {**BERT, "context": 128, "layers": 1}
# EmbBERT (2502.10001): 357,248 parameters without a head, which the preset's own adds to.
EMBBERT = {
    "kind": "encoder",
    "vocab": 8192,
    "context": 256,
    "width": 128,
    "layers": 4,
    "heads": 1,
    "hidden": 128,
    "block": "embbert",
    "positions": "learned",
    "embed_rank": 16,
    "token_types": 3,
    "kernel": 32,
    "bias": True,
    "head": "mlm",
    "dropout": 0.1,
    "init_std": 0.05,
}

SIZE = re.compile(r"\d+(\.\d+)?[KkMm]")

PRESETS: dict[str, dict[str, Any]] = {
    # llama2.c's ladder (github.com/karpathy/llama2.c, the tinyllamas table)
    "stories260K": {
        **LLAMA,
        "vocab": 512,
        "context": 512,
        "width": 64,
        "layers": 5,
        "heads": 8,
        "kv_heads": 4,
        "hidden": 172,
    },
    "stories15M": {**LLAMA, "vocab": 32_000, "context": 256, "width": 288, "layers": 6, "heads": 6, "hidden": 768},
    "stories42M": {**LLAMA, "vocab": 32_000, "context": 1024, "width": 512, "layers": 8, "heads": 8, "hidden": 1376},
    "stories110M": {**LLAMA, "vocab": 32_000, "context": 1024, "width": 768, "layers": 12, "heads": 12, "hidden": 2048},
    # TinyStories (Eldan and Li 2023)
    "tinystories-1M": {**NEO, "width": 64, "layers": 8},
    "tinystories-3M": {**NEO, "width": 128, "layers": 8},
    "tinystories-8M": {**NEO, "width": 256, "layers": 8},
    "tinystories-28M": {**NEO, "width": 512, "layers": 8},
    "tinystories-33M": {**NEO, "width": 768, "layers": 4},
    "tinystories-1layer-21M": {**NEO, "width": 1024, "layers": 1},
    # BERT-tiny (Turc et al. 2019); BERT-1 and BERT-6 as in Tiny language models (Gross et al. 2025)
    "bert-tiny": {**BERT, "context": 512, "width": 128, "layers": 2, "heads": 2},
    "bert-1": {**BERT, "context": 128, "width": 1536, "layers": 1, "heads": 24},
    "bert-6": {**BERT, "context": 128, "width": 768, "layers": 6, "heads": 12},
    "bert-1-conv2": {**CONVOLUTIONAL, "width": 768, "heads": 12, "convs": 2},
    "bert-1-conv2-heads8": {**CONVOLUTIONAL, "width": 512, "heads": 8, "convs": 2},
    "bert-1-conv3": {**CONVOLUTIONAL, "width": 768, "heads": 12, "convs": 3, "channels": 32},
    "bert-1-conv2-k16": {**CONVOLUTIONAL, "width": 768, "heads": 12, "convs": 2, "kernel": (16, 3)},
    "embbert-q": EMBBERT,
}


def preset(name: str | None = None, *, params: str | int | None = None, **settings: Any) -> ModelConfig:
    """A model's settings by name, or by size.

    Args:
        name: a key of `PRESETS`, or a size such as "1M", the same as `params="1M"`.
        params: "300K", "3M" or a number: parameters with embeddings, reached within 12 percent (25 below half a
            million, where shapes lie far apart) by the kit's own decoder (RMSNorm, RoPE, SwiGLU, QK-norm, tied head, 32
            features of width per layer). Needs `vocab` to mean anything; its default is 4096.
        settings: fields of `ModelConfig`, put on top.

    Raises:
        ConfigError: unknown name or setting, or a size the vocabulary alone exceeds.
    """
    if (name is None) == (params is None):
        raise ConfigError(f"preset: give a name or params, not {'both' if name else 'neither'}")
    if name is not None and SIZE.fullmatch(name) and name not in PRESETS:
        name, params = None, name
    if params is not None:
        return dial(parse_size(params), settings)
    if name not in PRESETS:
        raise ConfigError(f"no preset {name!r}{suggest(str(name), [*PRESETS, '1M'])}")
    return ModelConfig.from_dict({**PRESETS[name], **settings})


def vocab_for(name: str) -> int:
    """How many token ids suit a preset: a published one's own, else few enough to leave parameters for the blocks."""
    if name in PRESETS:
        return PRESETS[name]["vocab"]
    if not SIZE.fullmatch(name):
        raise ConfigError(f"no preset {name!r}{suggest(name, [*PRESETS, '1M'])}")
    total = parse_size(name)
    return 512 if total < 150_000 else 1024 if total < 350_000 else 2048 if total < 1_500_000 else 4096


def parse_size(text: str | int) -> int:
    """`"300K"` -> 300_000, `"1.5M"` -> 1_500_000, `"1000"` -> 1000."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KkMm]?)", str(text).strip())
    if not match:
        raise ConfigError(f"{text!r} is no size; write for example 300K or 3M")
    return round(float(match[1]) * {"": 1, "K": 1_000, "M": 1_000_000}[match[2].upper()])


def dial(target: int, settings: dict[str, Any]) -> ModelConfig:
    """The kit's own decoder with about `target` parameters: one layer per 32 of width, up to two off to come closer.

    Heads are about 32 wide, 64 from width 384 on: narrower ones cost a CPU more in attention patterns than they bring.
    """
    candidates, problem = [], None
    for width in [*range(32, 128, 16), *range(128, 384, 32), *range(384, 2049, 64)]:
        usual, head = max(2, round(width / 32)), 32 if width < 384 else 64
        heads = min((n for n in range(1, width) if width % (2 * n) == 0), key=lambda n: abs(width / n - head))
        for layers in {max(2, usual + more) for more in (-2, -1, 0, 1, 2)}:
            shape = {"width": width, "layers": layers, "heads": heads, "qk_norm": True}
            try:
                config = ModelConfig.from_dict({**shape, **settings})
            except ConfigError as error:  # kv_heads=2 cannot be had at one head, but it can further up
                problem = problem or error
                continue
            off = abs(count(config) / target - 1)
            candidates.append((max(off, 0.1), abs(layers - usual), off, config))
    if not candidates:
        raise problem or ConfigError("no shape left")
    best = min(candidates, key=lambda c: c[:3])
    if best[2] > 0.25:
        raise ConfigError(
            f"no shape with about {target:,} parameters at vocab = {best[3].vocab}: the nearest has "
            f"{count(best[3]):,}; take another size or a smaller vocab"
        )
    return best[3]


# --- what a size costs ------------------------------------------------------------------------------------------------


def parameters(config: ModelConfig) -> dict[str, int]:
    """Parameters by group, in closed form; a test holds the sum against the arrays of a real model."""
    c = config
    norm = c.width * (2 if c.norm == "layernorm" else 1)
    q, kv, inner = c.heads * c.head_width, c.kv_heads * c.head_width, c.hidden
    inputs = 2 if c.mlp in GATED else 1
    attention = c.width * (2 * q + 2 * kv) + (q + 2 * kv if c.qkv_bias else 0) + (c.width if c.bias else 0)
    mlp = (inputs + 1) * c.width * inner + (inputs * inner + c.width if c.bias else 0)
    dense = c.width * c.width + c.width if c.head != "classes" or c.pooler else 0
    rank = c.embed_rank or c.width
    learned = c.at("positions", 0) == "learned"
    if c.block == "embbert":  # q and o alone; the convolution branch stands below
        attention, mlp = 2 * (c.width * c.width + (c.width if c.bias else 0)), 0
    head = {
        "tied": 0,
        "untied": c.width * c.vocab,
        "mlm": dense + norm + c.vocab,
        "classes": dense + (c.width + 1) * c.classes + (c.width + 1 if c.pooling == "attention" else 0),
        "none": 0,
    }[c.head]
    return {
        "token embedding": c.vocab * rank,
        "position embedding": c.context * rank if learned else 0,
        "embedding expansion": (1 + learned) * rank * c.width if c.embed_rank else 0,
        "type embedding": c.token_types * c.width,
        "attention": c.layers * attention,
        "mlp": c.layers * mlp,
        "convolutions": _convolutions(c),
        "norms": c.layers * ((1 if c.block == "embbert" else 2) * norm + (2 * c.head_width if c.qk_norm else 0))
        + (norm if c.block not in ("post", "embbert") else 0)
        + (norm if c.embed_norm else 0),
        "head": head,
    }


def _spans(c: ModelConfig) -> list[tuple[int, int, int]]:
    """(weights per input and output channel, inputs, outputs) of every layer of the convolutional front end."""
    span = c.kernel if isinstance(c.kernel, tuple) else (c.kernel,)
    wide = [1, *[c.channels] * c.convs, 1] if c.convs else []
    cells = [span[0] * span[-1]] * c.convs + [1]
    return [(n, a, b) for n, a, b in zip(cells, wide[:-1], wide[1:], strict=False)]


def _convolutions(c: ModelConfig) -> int:
    """The front end, with bias, scale, shift, mean and variance of every channel; and the branch of embbert blocks: a
    filter and a bias per feature, the matrix after it, and the four vectors that weigh both branches.
    """
    front = sum(cells * a * b + 5 * b for cells, a, b in _spans(c))
    if c.block != "embbert":
        return front
    assert isinstance(c.kernel, int)
    inside = c.hidden * (c.kernel + 1) + c.hidden * c.width + (c.width if c.bias else 0) + 4 * c.width
    return front + c.layers * inside


def count(config: ModelConfig) -> int:
    """All parameters, embeddings included."""
    return sum(parameters(config).values())


@dataclasses.dataclass(frozen=True)
class Size:
    """What a configuration costs.

    Attributes:
        groups: parameters by group.
        total, body: parameters with and without the embedding tables and the head.
        flops: floating-point operations per token of a forward pass at full context, 2 per multiply-add, matrices and
            attention (half of the context on average when causal); training takes three times that.
        kv_bytes: float32 bytes of keys and values per position held in the cache.
        float32, int8, ternary: bytes of the weights in a file. int8: one byte per matrix weight and a float32 scale per
            output; ternary: 1.6 bits per weight inside the blocks with one scale per matrix, embeddings and head int8;
            norms and biases stay float32 in both.
    """

    groups: dict[str, int]
    total: int
    body: int
    flops: int
    kv_bytes: int
    float32: int
    int8: int
    ternary: int


def size(config: ModelConfig) -> Size:
    """The cost of a configuration, from its shape alone."""
    c, groups = config, parameters(config)
    total = sum(groups.values())
    q, kv = c.heads * c.head_width, c.kv_heads * c.head_width
    inputs = 2 if c.mlp in GATED else 1
    inside = [
        (c.width, q),
        (c.width, kv),
        (c.width, kv),
        (q, c.width),
        *[(c.width, c.hidden)] * inputs,
        (c.hidden, c.width),
    ]
    if c.block == "embbert":
        inside = [(c.width, c.width), (c.width, c.width), (c.hidden, c.width)]
    rank = c.embed_rank or c.width
    tables = [(rank, c.vocab)]
    tables += [(rank, c.context)] if groups["position embedding"] else []
    tables += [(rank, c.width)] * (groups["embedding expansion"] // (rank * c.width))
    tables += [(c.width, c.token_types)] if c.token_types else []
    own = {"untied": [(c.width, c.vocab)], "mlm": [(c.width, c.width)]}
    own["classes"] = [*[(c.width, c.width)] * c.pooler, (c.width, c.classes)]
    tables += own.get(c.head, [])
    inner = c.layers * sum(a * b for a, b in inside)
    filters = c.width * sum(cells * a * b for cells, a, b in _spans(c))  # an image cell per feature
    filters += groups["embedding expansion"]
    if c.block == "embbert" and isinstance(c.kernel, int):
        filters += c.layers * c.hidden * c.kernel
    outer = sum(a * b for a, b in tables)
    scales = 4 * (c.layers * sum(b for _, b in inside) + sum(b for _, b in tables))
    rest = 4 * (total - inner - outer)
    heads = {"mlm": c.width * (c.width + c.vocab), "classes": 0, "none": 0}.get(c.head, c.width * c.vocab)
    seen = sum(min(c.at("window", i) or c.context, c.context) for i in range(c.layers))
    seen = seen / 2 if c.kind == "decoder" else seen
    return Size(
        groups=groups,
        total=total,
        body=groups["attention"] + groups["mlp"] + groups["convolutions"] + groups["norms"],
        flops=round(2 * (inner + filters + heads) + 4 * q * seen),
        kv_bytes=4 * 2 * c.layers * kv,
        float32=4 * total,
        int8=inner + outer + scales + rest,
        ternary=round(inner * 1.6 / 8) + 4 * c.layers * len(inside) + outer + 4 * sum(b for _, b in tables) + rest,
    )


def working_set(config: ModelConfig, *, weight: float = 4, matrix: float = 4, activation: float = 4) -> int:
    """Bytes that a pass over a full context needs at once as EmbBERT-Q counts them (2502.10001): all weights but the
    head's, and the values of attention, context^2 per head and two rows of features per position.

    Args:
        weight: bytes of a parameter. matrix: of one inside a matrix that multiplies (blocks and expansion); below 2
            there is a float32 scale per output too. activation: of a value that is computed.
    """
    c, groups = config, parameters(config)
    outputs = {"attention": c.heads * c.head_width + 2 * c.kv_heads * c.head_width + c.width, "mlp": c.hidden + c.width}
    if c.block == "embbert":
        inside, outs = 2 * c.width * c.width + c.hidden * c.width, 3 * c.width
    else:
        inputs = 2 if c.mlp in GATED else 1
        inside = c.width * outputs["attention"] + (inputs + 1) * c.width * c.hidden
        outs = outputs["attention"] + outputs["mlp"] + (inputs - 1) * c.hidden
    expansions = groups["embedding expansion"]
    multiplied = c.layers * inside + expansions
    rest = sum(groups.values()) - groups["head"] - multiplied
    scales = 4 * (c.layers * outs + expansions // (c.embed_rank or 1)) if matrix < 2 else 0
    values = c.heads * c.context**2 + 2 * c.context * c.width
    return round(matrix * multiplied + weight * rest + scales + activation * values)
