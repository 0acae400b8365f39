"""ONNX: a model as one file for onnxruntime and all that is built on it (browsers, phones, other languages).

The graph is built node by node from the configuration, in the order of `tinylm.model`: read the two side by side. Every
tap site of that room is a value of the same name and shape in the graph. Names of inputs and outputs are those of
Hugging Face's exporter (optimum), which transformers.js and onnxruntime-genai expect as well; B rows, T tokens, P
positions read before (0 at first), other letters as in `tinylm.model`:

    input_ids                                       (B T)        int64
    attention_mask                                  (B P+T)      int64: 1, and 0 where a row is padded
    token_type_ids                                  (B T)        int64; models with token types
    past_key_values.{i}.key, .value                 (B K P E)    decoders
    logits                                          (B T V)      (B C) with a "classes" head
    last_hidden_state                               (B T D)      with no head, instead of logits
    present.{i}.key, .value                         (B K P+T E)  decoders: the next call's past

Positions are counted by the mask: rows may be padded on either side, on the left if they go on, on the right for a
"classes" head. One graph reads a prompt and goes on from it, and the file holds the tokenizer.json:

    import numpy, onnxruntime, tokenizers

    session = onnxruntime.InferenceSession("story.onnx")
    tokenizer = tokenizers.Tokenizer.from_str(session.get_modelmeta().custom_metadata_map["tokenizer"])
    caches = [x for x in session.get_inputs() if x.name.startswith("past")]
    past = {x.name: numpy.zeros((1, x.shape[1], 0, x.shape[3]), numpy.float32) for x in caches}
    text = new = [tokenizer.token_to_id("<|endoftext|>"), *tokenizer.encode("Once upon a time").ids]
    for _ in range(64):
        logits, *present = session.run(None, {"input_ids": [new], "attention_mask": [[1] * len(text)], **past})
        past, new = dict(zip(past, present)), [int(logits[0, -1].argmax())]
        text = text + new
    print(tokenizer.decode(text))

Metadata: "tinylm" (the ModelConfig as json), "tokenizer" (a tokenizer.json), "tokenizer_sha256". The graph does not
know the context, so a model without learned positions goes on past it; dropout is for training.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

import tinylm
from tinylm.config import GATED, ModelConfig
from tinylm.formats.tables import FormatError, complain
from tinylm.model import Transformer, shapes
from tinylm.store import PathLike, write_bytes
from tinylm.weights import named

OPSET, IR = 21, 10  # onnx 1.16 of March 2024: the first with scales per block, which int8 needs
LIMIT = 2_000_000_000  # bytes of weights: one protobuf message takes 2^31 with all else in it
BLOCK = 32  # inputs that share a scale in int8, as in GGUF's Q8_0
LOWEST = float(np.finfo(np.float32).min)
HALF = float(np.finfo(np.float16).max)

Dtype = Literal["float32", "float16", "int8"]
Value = str | int | float | list[int] | np.ndarray
"""An operand: the name of a value in the graph, or a constant."""


def write(model: Transformer, path: PathLike, *, dtype: Dtype = "float32") -> Path:
    """Write any model of the kit, decoder or encoder, as an ONNX file; equal models give equal bytes.

    Args:
        model: with its tokenizer, if it has one. path: of the file, replaced whole or not at all.
        dtype: of the matrices and the token embedding in the file; inputs and outputs stay float32. float16 halves
            the file. int8 is blocks of 32 inputs with a float32 scale each, 0.28 of the size: onnxruntime makes
            its 8-bit kernels of them and rounds what it multiplies by as well.

    Raises:
        FormatError: the package onnx is missing, dtype is none of the three, or parameters that have no place, are
            not finite, too large for float16, or over 2 GB. OSError: see `store.write_file`.
    """
    if dtype not in get_args(Dtype):
        raise FormatError(f"dtype = {dtype!r}: must be one of {', '.join(get_args(Dtype))}")
    plain = {"pooling": "cls", "pooler": True, "embed_rank": 0, "convs": 0}
    changed = {
        name: getattr(model.config, name) for name, usual in plain.items() if getattr(model.config, name) != usual
    }
    changed |= {"block": model.config.block} if model.config.block not in BLOCKS else {}
    complain([f"{name} = {value!r} has no place in this format" for name, value in changed.items()])
    graph = Graph({name: np.asarray(value, np.float32) for name, value in named(model).items()}, dtype)
    expected = shapes(model.config)
    complain([f"{name} has no place in this format" for name in sorted(graph.params.keys() - expected)])
    complain([f"{name} is missing" for name in sorted(expected.keys() - graph.params)])
    wrong = [name for name, value in graph.params.items() if not np.isfinite(value).all()]
    complain([f"{name} holds values that are not finite" for name in wrong])
    inputs, outputs = transformer(graph, model.config)
    complain([f"no node reads {name}" for name in sorted(graph.params.keys() - graph.read)])
    if (size := sum(len(x.raw_data) for x in graph.initializers)) > LIMIT:
        raise FormatError(f"{path}: an ONNX file holds up to {LIMIT:,} bytes of weights; as {dtype} these are {size:,}")
    about = {"tinylm": json.dumps(model.config.to_dict())}
    if model.tokenizer is not None:
        about |= {"tokenizer": model.tokenizer.to_json(), "tokenizer_sha256": model.tokenizer.sha256}
    helper = graph.onnx.helper
    described = lambda values: [helper.make_tensor_value_info(*value) for value in values]  # noqa: E731
    whole = helper.make_model(
        helper.make_graph(graph.nodes, "tinylm", described(inputs), described(outputs), graph.initializers),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR,
        producer_name="tinylm",
        producer_version=tinylm.__version__,
    )
    helper.set_model_props(whole, about)
    write_bytes(path, whole.SerializeToString(deterministic=True))
    return Path(path)


def package() -> Any:
    """The package onnx. Raises FormatError with what to install."""
    try:
        import onnx
        import onnx.helper
    except ImportError as error:
        raise FormatError("writing ONNX needs the package onnx: pip install 'tinylm[onnx]'") from error
    return onnx


# --- nodes ------------------------------------------------------------------------------------------------------------


class Graph:
    """Nodes and constants in the making.

    Attributes:
        params: by name, float32. dtype: of matrices in the file.
        nodes, initializers: what ONNX wants. read: names of the parameters that some node reads.
    """

    def __init__(self, params: Mapping[str, np.ndarray], dtype: Dtype):
        self.onnx = package()
        self.type = self.onnx.TensorProto
        self.params, self.dtype = params, dtype
        self.nodes, self.initializers, self.read = [], [], set[str]()
        self._constants: dict[tuple, str] = {}
        self._stored, self._sites = set[str](), set[str]()

    def add(self, op: str, *operands: Value, outputs: int = 1, **attributes: Any) -> Any:
        """A node of ONNX's operator `op`: the name of its value, or the names where it has several `outputs`."""
        name = f"{op}_{len(self.nodes)}"
        values = [name] if outputs == 1 else [f"{name}.{i}" for i in range(outputs)]
        operands = tuple(x if isinstance(x, str) else self.constant(x) for x in operands)
        self.nodes.append(self.onnx.helper.make_node(op, operands, values, name, **attributes))
        return name if outputs == 1 else values

    def site(self, name: str, value: str) -> str:
        """Give the value of the newest node the name of its tap site, or of an output; a copy of any other value."""
        if self.nodes[-1].output[0] != value or value in self._sites:
            self.add("Identity", value)
        self._sites.add(name)
        self.nodes[-1].name = self.nodes[-1].output[0] = name
        return name

    def constant(self, value: int | float | list[int] | np.ndarray) -> str:
        """A constant: int64 from whole numbers, float32 from others; equal ones are stored once."""
        if not isinstance(value, np.ndarray):
            value = np.array(value, np.float32 if isinstance(value, float) else np.int64)
        key = (value.dtype, value.shape, value.tobytes())
        if key not in self._constants:
            self._constants[key] = self.stored(f"constant_{len(self._constants)}", value)
        return self._constants[key]

    def stored(self, name: str, array: np.ndarray) -> str:
        """An array in the file, once."""
        if name not in self._stored:
            self._stored.add(name)
            helper, little = self.onnx.helper, array.astype(array.dtype.newbyteorder("<"))
            kind = helper.np_dtype_to_tensor_dtype(array.dtype)
            self.initializers.append(helper.make_tensor(name, kind, array.shape, little.tobytes(), raw=True))
        return name

    def vector(self, name: str) -> str:
        """A parameter that stays float32: a bias, a scale, a small table."""
        self.read.add(name)
        return self.stored(name, self.params[name])

    def matrix(self, name: str, turned: bool = False) -> str:
        """A matrix (inputs, outputs), as float32 from whatever the file holds; `turned`: kept as (outputs, inputs)."""
        kept = self._kept(name, int(turned))
        if turned:
            kept = [self.add("Transpose", part) for part in kept]
        return self._float32(kept, axis=0)

    def rows(self, name: str, ids: str) -> str:
        """Rows of a table (ids, width), picked and then made float32."""
        return self._float32([self.add("Gather", part, ids) for part in self._kept(name, 1)], axis=-1)

    def _kept(self, name: str, axis: int) -> list[str]:
        """What the file holds of a matrix whose inputs lie along `axis`: itself, or codes and scales."""
        if self.dtype == "float32":
            return [self.vector(name)]
        self.read.add(name)
        if self.dtype == "float16":
            if (largest := np.abs(self.params[name]).max()) > HALF:
                raise FormatError(f"{name} holds a value of size {largest:g}, float16 ends at {HALF:g}: write float32")
            return [self.stored(name, self.params[name].astype(np.float16))]
        codes, scales = blockwise(self.params[name], axis)
        return [self.stored(f"{name}.codes", codes), self.stored(f"{name}.scales", scales)]

    def _float32(self, kept: list[str], axis: int) -> str:
        if self.dtype == "float16":
            return self.add("Cast", *kept, to=self.type.FLOAT)
        return self.add("DequantizeLinear", *kept, axis=axis, block_size=BLOCK) if self.dtype == "int8" else kept[0]


def blockwise(matrix: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes in -127..127, shaped as the matrix, and a float32 scale per BLOCK values along `axis`.

    The nearest multiple of the scale, which is the block's largest size / 127 (the last block may be shorter).
    """
    rows = np.moveaxis(matrix, axis, 0)
    starts = np.arange(0, len(rows), BLOCK)
    scales = (np.maximum.reduceat(np.abs(rows), starts) / 127).astype(np.float32)
    each = np.repeat(np.where(scales == 0, 1, scales), BLOCK, axis=0)[: len(rows)]
    codes = np.clip(np.rint(rows / each), -127, 127).astype(np.int8)  # scales of the tiniest values are rounded
    codes, scales = (np.ascontiguousarray(np.moveaxis(x, 0, axis)) for x in (codes, scales))
    return codes, scales


# --- attention --------------------------------------------------------------------------------------------------------


class Scope(NamedTuple):
    """What all layers know of a call, as names of values; P, T and S = P + T positions were, are new, are held."""

    positions: str  # (B T)
    cos: str  # (B T 1 rotary/2); "" where no layer rotates
    sin: str
    masks: dict[int, str]  # window -> (B 1 T S) or (B 1 1 S) boolean: which keys each query may see
    ungrouped: str  # the shape (B H T S)
    grouped: str  # the shape (B K H/K*T S)


def scope(g: Graph, c: ModelConfig) -> Scope:
    """What follows from input_ids and attention_mask alone."""
    batch, new = (g.add("Shape", "input_ids", start=i, end=i + 1) for i in (0, 1))
    held = g.add("Shape", "attention_mask", start=1)
    past = g.add("Sub", held, new)
    counted = g.add("Max", g.add("Sub", g.add("CumSum", "attention_mask", 1), 1), 0)  # 0: padding on the left
    positions = g.add("Slice", counted, past, held, [1])
    cos = sin = ungrouped = grouped = ""
    if any(c.at("positions", i) == "rope" for i in range(c.layers)):
        half = (c.rotary or c.head_width) // 2
        frequency = (c.theta ** (-np.arange(half) / half)).astype(np.float32)
        angle = g.add("Mul", g.add("Cast", g.add("Unsqueeze", positions, [2, 3]), to=g.type.FLOAT), frequency)
        cos, sin = g.add("Cos", angle), g.add("Sin", angle)
    if c.kv_heads < c.heads:
        ungrouped = g.add("Concat", batch, [c.heads], new, held, axis=0)
        grouped = g.add("Concat", batch, [c.kv_heads], [-1], held, axis=0)
    k = g.add("Range", 0, g.add("Squeeze", held), 1)
    q = g.add("Unsqueeze", g.add("Slice", k, past, held), [1])
    back = g.add("Sub", q, k)  # (T S): how far behind the query the key lies
    unpadded = g.add("Unsqueeze", g.add("Cast", "attention_mask", to=g.type.BOOL), [1, 2])
    masks = {}
    for window in dict.fromkeys(c.at("window", i) for i in range(c.layers)):
        mask = unpadded
        if c.kind == "decoder":
            mask = g.add("And", mask, g.add("GreaterOrEqual", back, 0))
        if window:
            mask = g.add("And", mask, g.add("Less", g.add("Abs", back), window))
        masks[window] = mask
    return Scope(positions, cos, sin, masks, ungrouped, grouped)


def rotate(g: Graph, x: str, scope: Scope, width: int, rest: int) -> str:
    """Rotary positions of the first `width` features of (B T H E), half-split; the `rest` pass."""
    half = width // 2
    a, b, *more = g.add("Split", x, [half, half, rest] if rest else [half, half], axis=-1, outputs=3 if rest else 2)
    turned = [
        g.add("Sub", g.add("Mul", a, scope.cos), g.add("Mul", b, scope.sin)),
        g.add("Add", g.add("Mul", b, scope.cos), g.add("Mul", a, scope.sin)),
    ]
    return g.add("Concat", *turned, *more, axis=-1)


def attention(g: Graph, c: ModelConfig, layer: int, x: str, scope: Scope) -> str:
    """`model.Attention`, written out, its keys and values behind those of the past."""
    at = f"blocks.{layer}.attn"
    split = lambda y: g.add("Reshape", y, [0, 0, -1, c.head_width])  # noqa: E731
    q, k, v = (g.site(f"{at}.{n}", split(linear(g, f"{at}.{n}", x))) for n in "qkv")
    if c.qk_norm:
        q, k = (rmsnorm(g, f"{at}.{n}_norm", y, c.norm_eps) for n, y in (("q", q), ("k", k)))
    if c.at("positions", layer) == "rope":
        width = c.rotary or c.head_width
        q, k = (rotate(g, y, scope, width, c.head_width - width) for y in (q, k))
    q, k, v = (g.add("Transpose", y, perm=[0, 2, 1, 3]) for y in (q, k, v))
    if c.kind == "decoder":
        k = g.site(f"present.{layer}.key", g.add("Concat", f"past_key_values.{layer}.key", k, axis=2))
        v = g.site(f"present.{layer}.value", g.add("Concat", f"past_key_values.{layer}.value", v, axis=2))
    # Query heads lie beside the others that share their key head, so that both products are plain batches of matrices.
    group = lambda y, shape: g.add("Reshape", y, shape) if c.kv_heads < c.heads else y  # noqa: E731
    scores = g.add("MatMul", group(q, [0, c.kv_heads, -1, c.head_width]), g.add("Transpose", k, perm=[0, 1, 3, 2]))
    scores = g.add("Mul", group(scores, scope.ungrouped), float(c.attention_scale or c.head_width**-0.5))
    scores = g.site(f"{at}.scores", scores)
    pattern = g.add("Softmax", g.add("Where", scope.masks[c.at("window", layer)], scores, LOWEST), axis=-1)
    pattern = g.site(f"{at}.pattern", pattern)
    heads = group(g.add("MatMul", group(pattern, scope.grouped), v), [0, c.heads, -1, c.head_width])
    heads = g.site(f"{at}.heads", g.add("Transpose", heads, perm=[0, 2, 1, 3]))
    return g.site(at, linear(g, f"{at}.o", g.add("Reshape", heads, [0, 0, -1])))


# --- linear maps, norms, MLP ------------------------------------------------------------------------------------------


def linear(g: Graph, name: str, x: str) -> str:
    """`parts.Linear`."""
    y = g.add("MatMul", x, g.matrix(f"{name}.kernel"))
    return g.add("Add", y, g.vector(f"{name}.bias")) if f"{name}.bias" in g.params else y


def rmsnorm(g: Graph, name: str, x: str, eps: float) -> str:
    """`parts.RMSNorm`, spelt so that onnxruntime makes one kernel of it; an operator of that name came in opset 23."""
    square = g.add("ReduceMean", g.add("Pow", x, 2.0), [-1])
    return g.add("Mul", g.add("Div", x, g.add("Sqrt", g.add("Add", square, eps))), g.vector(f"{name}.scale"))


def layernorm(g: Graph, name: str, x: str, eps: float) -> str:
    """`parts.LayerNorm`."""
    return g.add("LayerNormalization", x, g.vector(f"{name}.scale"), g.vector(f"{name}.bias"), epsilon=eps)


NORMS = {"rmsnorm": rmsnorm, "layernorm": layernorm}


def norm(g: Graph, c: ModelConfig, name: str, x: str) -> str:
    """The configuration's norm."""
    return NORMS[c.norm](g, name, x, c.norm_eps)


def silu(g: Graph, x: str) -> str:
    """x * sigmoid(x)."""
    return g.add("Mul", x, g.add("Sigmoid", x))


def relu2(g: Graph, x: str) -> str:
    """The square of relu(x)."""
    return g.add("Pow", g.add("Relu", x), 2.0)


ACTIVATIONS: dict[str, Callable[[Graph, str], str]] = {
    "swiglu": silu,
    "geglu": lambda g, x: g.add("Gelu", x),
    "reglu": lambda g, x: g.add("Relu", x),
    "gelu": lambda g, x: g.add("Gelu", x),
    "gelu_tanh": lambda g, x: g.add("Gelu", x, approximate="tanh"),
    "relu2": relu2,
}


def mlp(g: Graph, c: ModelConfig, at: str, x: str) -> str:
    """`model.MLP` and `model.GatedMLP`."""
    hidden = ACTIVATIONS[c.mlp](g, linear(g, f"{at}.gate" if c.mlp in GATED else f"{at}.up", x))
    if c.mlp in GATED:
        hidden = g.add("Mul", hidden, linear(g, f"{at}.up", x))
    return g.site(at, linear(g, f"{at}.down", g.site(f"{at}.hidden", hidden)))


# --- blocks -----------------------------------------------------------------------------------------------------------


def pre(g: Graph, c: ModelConfig, i: int, x: str, scope: Scope) -> str:
    """`model.PreBlock`."""
    at = f"blocks.{i}"
    y = attention(g, c, i, g.site(f"{at}.attn_norm", norm(g, c, f"{at}.attn_norm", x)), scope)
    x = g.site(f"{at}.resid_mid", g.add("Add", x, y))
    y = mlp(g, c, f"{at}.mlp", g.site(f"{at}.mlp_norm", norm(g, c, f"{at}.mlp_norm", x)))
    return g.site(f"{at}.resid", g.add("Add", x, y))


def post(g: Graph, c: ModelConfig, i: int, x: str, scope: Scope) -> str:
    """`model.PostBlock`."""
    at = f"blocks.{i}"
    y = attention(g, c, i, x, scope)
    x = g.site(f"{at}.resid_mid", norm(g, c, f"{at}.attn_norm", g.add("Add", x, y)))
    y = mlp(g, c, f"{at}.mlp", g.site(f"{at}.mlp_norm", x))
    return g.site(f"{at}.resid", norm(g, c, f"{at}.mlp_norm", g.add("Add", x, y)))


def parallel(g: Graph, c: ModelConfig, i: int, x: str, scope: Scope) -> str:
    """`model.ParallelBlock`."""
    at = f"blocks.{i}"
    y = attention(g, c, i, g.site(f"{at}.attn_norm", norm(g, c, f"{at}.attn_norm", x)), scope)
    z = mlp(g, c, f"{at}.mlp", g.site(f"{at}.mlp_norm", norm(g, c, f"{at}.mlp_norm", x)))
    return g.site(f"{at}.resid", g.add("Add", g.add("Add", x, y), z))


BLOCKS = {"pre": pre, "post": post, "parallel": parallel}

# --- heads ------------------------------------------------------------------------------------------------------------


def tied(g: Graph, c: ModelConfig, x: str) -> str:
    """`model.TiedHead`: the file holds the embedding once."""
    return g.add("MatMul", x, g.matrix("embed.table", turned=True))


def untied(g: Graph, c: ModelConfig, x: str) -> str:
    """`model.UntiedHead`."""
    return linear(g, "head.out", x)


def mlm(g: Graph, c: ModelConfig, x: str) -> str:
    """`model.MLMHead`."""
    x = norm(g, c, "head.norm", g.add("Gelu", linear(g, "head.dense", x)))
    return g.add("Add", tied(g, c, x), g.vector("head.bias"))


def classes(g: Graph, c: ModelConfig, x: str) -> str:
    """`model.ClassHead`."""
    return linear(g, "head.out", g.add("Tanh", linear(g, "head.dense", g.add("Gather", x, 0, axis=1))))


def none(g: Graph, c: ModelConfig, x: str) -> str:
    """`model.NoHead`."""
    return x


HEADS = {"tied": tied, "untied": untied, "mlm": mlm, "classes": classes, "none": none}

# --- the whole --------------------------------------------------------------------------------------------------------


def transformer(g: Graph, c: ModelConfig) -> tuple[list[tuple], list[tuple]]:
    """`model.Transformer`: adds all of it; returns name, type and shape of the inputs and of the outputs."""
    here = scope(g, c)
    x = g.rows("embed.table", "input_ids")
    if c.at("positions", 0) == "learned":
        x = g.add("Add", x, g.add("Gather", g.vector("embed_positions.table"), here.positions))
    if c.token_types:
        x = g.add("Add", x, g.add("Gather", g.vector("embed_types.table"), "token_type_ids"))
    x = g.site("embed", norm(g, c, "embed_norm", x) if c.embed_norm else x)
    for i in range(c.layers):
        x = BLOCKS[c.block](g, c, i, x, here)
    x = g.site("norm", x if c.block == "post" else norm(g, c, "norm", x))
    y = HEADS[c.head](g, c, x)
    if c.softcap:
        y = g.add("Mul", g.add("Tanh", g.add("Div", y, c.softcap)), c.softcap)
    result = g.site("last_hidden_state" if c.head == "none" else "logits", y)

    batch, new, past = "batch_size", "sequence_length", "past_sequence_length"
    held = f"{past} + {new}" if c.kind == "decoder" else new
    inputs = [("input_ids", g.type.INT64, [batch, new]), ("attention_mask", g.type.INT64, [batch, held])]
    if c.token_types:
        inputs.append(("token_type_ids", g.type.INT64, [batch, new]))
    shape = {"classes": [batch, c.classes], "none": [batch, new, c.width]}.get(c.head, [batch, new, c.vocab])
    outputs = [(result, g.type.FLOAT, shape)]
    for i in range(c.layers if c.kind == "decoder" else 0):
        for part in ("key", "value"):
            room = lambda length: [batch, c.kv_heads, length, c.head_width]  # noqa: E731
            inputs.append((f"past_key_values.{i}.{part}", g.type.FLOAT, room(past)))
            outputs.append((f"present.{i}.{part}", g.type.FLOAT, room(held)))
    return inputs, outputs
