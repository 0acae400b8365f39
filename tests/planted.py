"""A model whose bigram subnetwork is known because it was built by hand."""

import numpy as np

from tinylm.config import ModelConfig
from tinylm.model import Transformer
from tinylm.weights import assign, named


def planted(table, *, layers=2, noise=0.05, seed=0):
    """A model that says log table[i] after token i by its embedding and its first MLP alone, and just their masks.

    The stream has V features that say which token it is, V that say the next one's logits, and one that brings every
    stream to the same length, so that the last norm divides by a constant. All other weights are noise.
    """
    v = len(table)
    width = 2 * v + 4
    sizes = {"hidden": v + 8, "mlp": "relu2", "positions": "none", "head": "untied"}
    config = ModelConfig(vocab=v, context=64, width=width, layers=layers, heads=2, **sizes)
    rng = np.random.default_rng(seed)
    model = Transformer(config)
    values = {name: np.array(x) for name, x in named(model).items()}
    for name, x in values.items():
        if name.endswith("kernel"):
            values[name] = noise * rng.standard_normal(x.shape)
    rows = np.log(table)
    rows -= rows.mean(1, keepdims=True)
    length = 1.1 * np.linalg.norm(rows, axis=1).max()
    up, down = values["blocks.0.mlp.up.kernel"], values["blocks.0.mlp.down.kernel"]
    masks = {name.removesuffix(".kernel"): np.zeros(x.shape, bool) for name, x in values.items() if ".kernel" in name}
    masks = {name: mask for name, mask in masks.items() if name.startswith("blocks")}
    for i in range(v):
        up[i, i] = 1.0
        down[i, v : 2 * v] = rows[i]
        down[i, 2 * v] = np.sqrt(length**2 - (rows[i] ** 2).sum())
        masks["blocks.0.mlp.up"][i, i] = True
        masks["blocks.0.mlp.down"][i, v : 2 * v + 1] = True
    values["embed.table"] = np.eye(v, width)
    values["head.out.kernel"] = np.zeros((width, v))
    values["head.out.kernel"][v : 2 * v] = np.eye(v)
    for layer in range(layers):
        values[f"blocks.{layer}.mlp_norm.scale"] = np.full(width, 1 / np.sqrt(width))
        values[f"blocks.{layer}.attn_norm.scale"] = np.full(width, 1 / np.sqrt(width))
    values["norm.scale"] = np.full(width, np.sqrt((1 + length**2) / width))
    assign(model, {name: np.asarray(x, np.float32) for name, x in values.items()})
    return model, masks
