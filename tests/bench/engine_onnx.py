"""The graphs that onnxruntime runs fastest on a CPU, for engine.py: its own fused operators, built by hand.

`decoder`: packed query, key and value; GroupQueryAttention with rotary positions inside and its cache in place;
SkipSimplifiedLayerNormalization for sum and norm. `encoder`: SkipLayerNormalization, BiasGelu and either Attention or
MultiHeadAttention. Weights are float32, or blocks of 4 or 8 bit (MatMulNBits); dynamic int8 is made of the float32
graph by onnxruntime's own tool.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tinylm.config import ModelConfig

FUSED = "com.microsoft"
ROWS = 32  # width of the blocks in the embedding: it must divide the model's


class Graph:
    """Nodes and constants in the making; `bits`: 32, or those of MatMulNBits, with `block` inputs for each scale."""

    def __init__(self, bits: int, block: int = 32):
        self.bits, self.block, self.nodes, self.constants = bits, block, [], {}

    def add(self, op: str, *inputs: str | np.ndarray, outputs: int | list[str] = 1, domain: str = FUSED, **attributes):
        """A node; returns the name of its value, or the names of several."""
        name = f"{op}.{len(self.nodes)}"
        names = outputs if isinstance(outputs, list) else [f"{name}:{i}" for i in range(outputs)]
        inputs = [x if isinstance(x, str) else self.constant(f"{name}.{i}", x) for i, x in enumerate(inputs)]
        self.nodes.append(helper.make_node(op, inputs, names, name, domain=domain, **attributes))
        return names[0] if outputs == 1 else names

    def plain(self, op: str, *inputs: str | np.ndarray, **more):
        """A node of ONNX's own operators."""
        return self.add(op, *inputs, domain="", **more)

    def constant(self, name: str, value: np.ndarray) -> str:
        """A constant by its name; given twice it is stored once."""
        self.constants[name] = numpy_helper.from_array(np.ascontiguousarray(value), name)
        return name

    def linear(self, x: str, name: str, weight: np.ndarray) -> str:
        """x @ weight, of shape (inputs, outputs)."""
        if self.bits == 32:
            return self.plain("MatMul", x, self.constant(name, weight))
        codes, scales = blocks(weight.T, self.bits, self.block)
        rows, size = weight.shape[1], {"K": weight.shape[0], "N": weight.shape[1]}
        packed = codes if self.bits == 8 else codes[..., ::2] | codes[..., 1::2] << 4
        kept = self.constant(f"{name}.codes", packed), self.constant(f"{name}.scales", scales.reshape(rows, -1))
        return self.add("MatMulNBits", x, *kept, bits=self.bits, block_size=self.block, accuracy_level=4, **size)

    def picked(self, ids: str, name: str, table: np.ndarray) -> str:
        """Rows of a table; kept in 8 bit beside matrices of fewer bits than 32."""
        if self.bits == 32:
            return self.plain("Gather", self.constant(name, table), ids)
        codes, scales = blocks(table, 8, ROWS)
        kept = self.constant(f"{name}.rows", codes.reshape(table.shape[0], -1)), ids
        scales = self.constant(f"{name}.row_scales", scales)
        return self.add("GatherBlockQuantized", *kept, scales, bits=8, block_size=ROWS, quantize_axis=1, gather_axis=0)

    def save(self, path: Path, inputs: list[tuple], outputs: list[tuple]) -> Path:
        """Write the model. Inputs and outputs: name, type, shape."""
        values = [[helper.make_tensor_value_info(*x) for x in given] for given in (inputs, outputs)]
        graph = helper.make_graph(self.nodes, "bench", *values, [*self.constants.values()])
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid(FUSED, 1)]
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
        return path


def blocks(rows: np.ndarray, bits: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Unsigned codes (rows, blocks, block) around 2^(bits-1), and scales (rows, blocks), for rows (rows, inputs)."""
    zero = 1 << bits - 1
    rows = np.pad(rows, ((0, 0), (0, -rows.shape[1] % block))).reshape(len(rows), -1, block)
    scales = np.maximum(np.abs(rows).max(axis=-1), 1e-9) / np.float32(zero - 1)
    return (np.rint(rows / scales[..., None]) + zero).astype(np.uint8), scales.astype(np.float32)


def decoder(
    params: dict,
    c: ModelConfig,
    path: Path,
    *,
    bits: int = 32,
    block: int = 32,
    last: bool = False,
    joined: bool = False,
) -> Path:
    """A decoder of Llama's kind: ids (B T), tokens held less one (B), tokens held -> logits (B T V), caches in place.

    `last`: logits of the last position alone. `joined`: gate and up in one product, then split.
    """
    g, table, eps = Graph(bits, block), params["embed.table"], c.norm_eps
    frequency = c.theta ** (-np.arange(c.head_width // 2) * 2 / c.head_width)
    angle = np.outer(np.arange(c.context), frequency)
    cos, sin = (g.constant(f.__name__, f(angle).astype(np.float32)) for f in (np.cos, np.sin))
    inside = c.head_width % 16 == 0  # GroupQueryAttention rotates such heads alone
    x, y = g.picked("ids", "embed.table", table), ""
    caches, results = [], []
    for i in range(c.layers):
        at = f"blocks.{i}"
        if not y:
            scale = g.constant(f"{at}.attn_norm", params[f"{at}.attn_norm.scale"])
            normed = g.plain("SimplifiedLayerNormalization", x, scale, axis=-1, epsilon=eps)
        else:
            normed, x = summed(g, x, y, params[f"{at}.attn_norm.scale"], eps)
        kernels = [params[f"{at}.attn.{n}.kernel"] for n in "qkv"]
        heads = {"num_heads": c.heads, "kv_num_heads": c.kv_heads, "scale": c.head_width**-0.5}
        past = [f"past.{i}.{n}" for n in ("key", "value")]
        present = [f"present.{i}.{n}" for n in ("key", "value")]
        if inside:
            qkv = [g.linear(normed, f"{at}.attn.qkv", np.concatenate(kernels, axis=1)), "", ""]
            rest = (cos, sin)
        else:
            qkv = [g.linear(normed, f"{at}.attn.{n}", kernel) for n, kernel in zip("qkv", kernels, strict=True)]
            for j, count in ((0, c.heads), (1, c.kv_heads)):
                qkv[j] = g.add("RotaryEmbedding", qkv[j], "position", cos, sin, num_heads=count)
            rest = ()
        outputs = [f"{at}.heads", *present]
        g.add(
            "GroupQueryAttention", *qkv, *past, "held", "total", *rest, outputs=outputs, do_rotary=int(inside), **heads
        )
        caches += past
        results += present
        y = g.linear(f"{at}.heads", f"{at}.attn.o", params[f"{at}.attn.o.kernel"])
        normed, x = summed(g, x, y, params[f"{at}.mlp_norm.scale"], eps)
        kernels = [params[f"{at}.mlp.{n}.kernel"] for n in ("gate", "up")]
        if joined:
            both = g.linear(normed, f"{at}.mlp.both", np.concatenate(kernels, axis=1))
            gate, up = g.plain("Split", both, outputs=2, num_outputs=2, axis=-1)
        else:
            gate, up = (g.linear(normed, f"{at}.mlp.{n}", kernel) for n, kernel in zip("ab", kernels, strict=True))
        hidden = g.plain("Mul", g.add("QuickGelu", gate, alpha=1.0), up)
        y = g.linear(hidden, f"{at}.mlp.down", params[f"{at}.mlp.down.kernel"])
    normed, _ = summed(g, x, y, params["norm.scale"], eps)
    if last:
        normed = g.plain("Slice", normed, np.array([-1]), np.array([2**31]), np.array([1]))
    g.nodes.append(helper.make_node("Identity", [g.linear(normed, "head", table.T)], ["logits"]))
    cache = [("B", c.kv_heads, c.context, c.head_width)]
    described = lambda names: [(name, TensorProto.FLOAT, *cache) for name in names]  # noqa: E731
    inputs = [("ids", TensorProto.INT64, ("B", "T")), ("held", TensorProto.INT32, ("B",))]
    inputs += [("total", TensorProto.INT32, (1,)), *described(caches)]
    if not inside:
        inputs.append(("position", TensorProto.INT64, (1,)))
    return g.save(path, inputs, [("logits", TensorProto.FLOAT, ("B", "t", c.vocab)), *described(results)])


def summed(g: Graph, x: str, y: str, scale: np.ndarray, eps: float) -> tuple[str, str]:
    """The norm of x + y, and x + y."""
    normed, _, _, total = g.add("SkipSimplifiedLayerNormalization", x, y, scale, outputs=4, epsilon=eps)
    return normed, total


def encoder(params: dict, c: ModelConfig, path: Path, *, apart: bool = False) -> Path:
    """A BERT without head, float32: ids (B T) -> features (B T D).

    `apart`: the product with query, key and value before the operator (MultiHeadAttention), not inside (Attention).
    """
    g, eps = Graph(32), c.norm_eps
    vectors = lambda name: (params[f"{name}.scale"], params[f"{name}.bias"])  # noqa: E731
    x = g.picked("ids", "embed.table", params["embed.table"])
    x = g.plain("Add", x, params["embed_positions.table"][: c.context])
    x = g.plain("LayerNormalization", x, *vectors("embed_norm"), epsilon=eps)
    for i in range(c.layers):
        at = f"blocks.{i}"
        kernel, bias = (
            np.concatenate([params[f"{at}.attn.{n}.{part}"] for n in "qkv"], axis=-1) for part in ("kernel", "bias")
        )
        if not apart:
            weight = g.constant(f"{at}.attn.qkv", kernel)
            y = g.add("Attention", x, weight, g.constant(f"{at}.attn.qkv_bias", bias), num_heads=c.heads)
        else:
            packed = g.plain("Split", g.linear(x, f"{at}.attn.qkv", kernel), outputs=3, num_outputs=3, axis=-1)
            y = g.add("MultiHeadAttention", *packed, bias, num_heads=c.heads)
        y = g.linear(y, f"{at}.attn.o", params[f"{at}.attn.o.kernel"])
        x = g.add("SkipLayerNormalization", y, x, *vectors(f"{at}.attn_norm"), params[f"{at}.attn.o.bias"], epsilon=eps)
        y = g.add("BiasGelu", g.linear(x, f"{at}.mlp.up", params[f"{at}.mlp.up.kernel"]), params[f"{at}.mlp.up.bias"])
        y = g.linear(y, f"{at}.mlp.down", params[f"{at}.mlp.down.kernel"])
        x = g.add(
            "SkipLayerNormalization", y, x, *vectors(f"{at}.mlp_norm"), params[f"{at}.mlp.down.bias"], epsilon=eps
        )
    g.nodes.append(helper.make_node("Identity", [x], ["features"]))
    shape = ("B", c.context, c.width)
    return g.save(path, [("ids", TensorProto.INT64, ("B", c.context))], [("features", TensorProto.FLOAT, shape)])


def dynamic(source: Path, path: Path, channels: bool = True) -> Path:
    """onnxruntime's dynamic quantisation of a float32 graph: int8 matrices, a scale per channel or one for all."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    known = {"DefaultTensorType": TensorProto.FLOAT}  # it cannot tell the type of what its own operators give
    quantize_dynamic(source, path, per_channel=channels, weight_type=QuantType.QInt8, extra_options=known)
    return path
