r"""Hierarchical memories: parameters that a model fetches for a document, beside those it always has.

    add_memory(model, children=16, rows=(16, 8, 4))                     # joined to every MLP, three levels
    edit(model, r"blocks\.[3-5]\.mlp", "memory", children=16, rows=(16, 8, 4))

After Pouransari et al. 2025 (arXiv 2510.02375). Documents are clustered into a tree with `children` at every node
(`tinylm.memory`). Each node of each level below the root owns one block of parameters; a document fetches those of the
nodes on its path, and the blocks of all levels are joined. What is fetched is part of the model's state: `fetched`,
(rows, levels) numbers of nodes within their level; one row serves a whole batch, -1 fetches nothing, and the node after
the last of a level is the generic one, which belongs to no document. A new model fetches nothing, and every block is
silent until it is trained, so that the edit changes no output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from tinylm.parts import Linear
from tinylm.taps import Tap, untouched, wants
from tinylm.techniques import EditError, Technique, edit, technique


class Fetched(nnx.Variable):
    """Which node of each level each row of a batch fetches; no parameter, training leaves it alone."""


@runtime_checkable
class FeedForward(Protocol):
    """What the memory "ffn" joins: the kit's MLPs."""

    up: Any
    down: Any
    activation: Any


@runtime_checkable
class SelfAttention(Protocol):
    """What the memory "kv" joins: the kit's attention."""

    q: Any
    o: Any
    q_norm: Any


def nodes_in(children: int, level: int) -> int:
    """Nodes of a level, counted from 0: `children` to the power of level + 1. The generic node comes after them."""
    return children ** (level + 1)


class Memory(Technique):
    """What all kinds of memory share: the bank, and how blocks are fetched from it.

    One row of one array is one block: `bank.<level>` is (nodes + 1, values), the generic node last.

    Settings:
        children: of every node of the tree. rows: how many rows (hidden units, ranks, or keys) a block of each level
            has; as many levels as there are numbers, 0 leaves one out.
        slots: hold only so many blocks per level, and number them instead of nodes: the bank itself is then a file
            (`tinylm.memory.Bank`). 0 holds all.
    """

    silent: ClassVar[tuple[str, ...]]
    """Pieces that start at zero, so that a block that was never trained adds exactly nothing."""

    def __init__(
        self, inner: nnx.Module, *, rngs: nnx.Rngs, children: int = 4, rows: Sequence[int] = (8,), slots: int = 0
    ):
        super().__init__(inner, rngs=rngs)
        rows = (rows,) if type(rows) is int else tuple(rows)
        if type(children) is not int or children < 1:
            raise EditError(f"children = {children!r}: must be a whole number of at least 1")
        if not rows or not all(type(r) is int and r >= 0 for r in rows) or not any(rows):
            raise EditError(f"rows = {rows!r}: give rows of a block for each level, at least one above 0")
        if type(slots) is not int or slots < 0:
            raise EditError(f"slots = {slots!r}: must be a number of blocks, 0 for all")
        self.children, self.rows, self.slots = children, rows, slots
        held = [nodes_in(children, level) + 1 for level in range(len(rows))]
        held = [min(n, slots) if slots else n for n in held]
        key = rngs.params()
        self.bank = nnx.List([nnx.Param(self.draw(jax.random.fold_in(key, i), i, n)) for i, n in enumerate(held)])
        self.fetched = Fetched(jnp.full((1, len(rows)), -1, jnp.int32))

    @property
    def root(self) -> Any:
        """The module under everything that is wrapped around it."""
        module = self.inner
        while isinstance(module, Technique):
            module = module.inner
        return module

    def pieces(self) -> dict[str, int]:
        """What a row of a block consists of: name -> values."""
        raise NotImplementedError

    def values(self, level: int) -> int:
        """Parameters of one block of a level."""
        return self.rows[level] * sum(self.pieces().values())

    def draw(self, key: PRNGKeyArray, level: int, nodes: int) -> Float[Array, "nodes values"]:
        """Initial blocks: silent pieces zero, the others normal with deviation 1 / sqrt(inputs), cut at three."""
        parts = []
        for i, (name, width) in enumerate(self.pieces().items()):
            shape = (nodes, self.rows[level] * width)
            own = jax.random.fold_in(key, i)
            parts.append(jnp.zeros(shape) if name in self.silent else self.initial(own, shape) / np.sqrt(width))
        return jnp.concatenate(parts, axis=1)

    def initial(self, key: PRNGKeyArray, shape: tuple[int, int]) -> Array:
        """Of variance about 1."""
        return jax.random.truncated_normal(key, -3, 3, shape)

    def fold(self) -> nnx.Module:
        raise EditError("its memory is fetched for each text, and no plain module does that; see tinylm.memory.bake")

    def recall(self, dtype: Any) -> dict[str, Float[Array, "b R _"]]:
        """The fetched blocks of all levels, joined: name of a piece -> (b, R, values), zeros where none is fetched."""
        if self.fetched.shape[1] != len(self.rows):
            raise ValueError(
                f"nodes of {self.fetched.shape[1]} levels are fetched, and the memory has {len(self.rows)}"
            )
        found: dict[str, list[Array]] = {name: [] for name in self.pieces()}
        for level, r in enumerate(self.rows):
            nodes = self.fetched[...][:, level]
            table = self.bank[level][...]
            block = table.at[jnp.maximum(nodes, 0)].get(
                mode="fill", fill_value=np.nan
            )  # another tree's: not in silence
            block = jnp.where((nodes >= 0)[:, None], block, 0).astype(dtype)
            at = 0
            for name, width in self.pieces().items():
                found[name].append(block[:, at : at + r * width].reshape(len(nodes), r, width))
                at += r * width
        return {name: jnp.concatenate(parts, axis=1) for name, parts in found.items()}


def require_rows(fetched: int, read: int) -> None:
    """Raise ValueError unless one row of nodes serves all that is read, or each its own."""
    if fetched not in (1, read):
        raise ValueError(f"nodes are fetched for {fetched} rows and {read} are read: give one row of nodes, or {read}")


def each(x: Float[Array, "B *T d"], rows: Float[Array, "b R d"]) -> Float[Array, "B *T R"]:
    """x times the rows fetched for it: `b` is B, or 1 where all of the batch fetched the same."""
    require_rows(len(rows), len(x))
    return x @ rows[0].T if len(rows) == 1 else jnp.einsum("b...d,brd->b...r", x, rows)


def joined(weights: Float[Array, "B *T R"], rows: Float[Array, "b R d"]) -> Float[Array, "B *T d"]:
    """The fetched rows summed by weight."""
    return weights @ rows[0] if len(rows) == 1 else jnp.einsum("b...r,brd->b...d", weights, rows)


@technique("memory")
class FFNMemory(Memory):
    """More hidden units for an MLP: y + down_m(activation(gate_m x) * up_m x), without the gate where it has none.

    3 r D values per layer and level (2 r D without a gate). Tap site: `mlp.memory`, the units' activations (B T R).
    """

    accepts = (FeedForward,)
    silent = ("down",)

    def pieces(self) -> dict[str, int]:
        names = ("gate", "up", "down") if hasattr(self.root, "gate") else ("up", "down")
        return dict.fromkeys(names, inputs_of(self.root.up))

    def __call__(self, x: Float[Array, "B T D"], tap: Tap = untouched) -> Float[Array, "B T D"]:
        y, own = self.inner(x, tap), self.recall(x.dtype)
        up = each(x, own["up"])
        act = self.root.activation
        hidden = act(each(x, own["gate"])) * up if "gate" in own else act(up)
        return y + joined(tap("memory", hidden), own["down"])


@technique("memory_lora")
class LoRAMemory(Memory):
    """A fetched change of low rank to one matrix: y + alpha / R * (x A) B, with R the ranks of all levels together.

    Settings:
        alpha: the paper's is 2; divided by the rank as by Hu et al. 2021.
    """

    accepts = (Linear,)
    silent = ("b",)

    def __init__(self, inner: nnx.Module, *, rngs: nnx.Rngs, alpha: float = 2.0, **settings: Any):
        super().__init__(inner, rngs=rngs, **settings)
        if isinstance(alpha, bool) or not isinstance(alpha, int | float):
            raise EditError(f"alpha = {alpha!r}: must be a number")
        self.alpha = float(alpha)

    def pieces(self) -> dict[str, int]:
        return dict(zip("ab", self.root.kernel.shape, strict=True))

    def initial(self, key: PRNGKeyArray, shape: tuple[int, int]) -> Array:
        return jax.random.uniform(key, shape, minval=-1, maxval=1)  # Kaiming-uniform as torch's linear layers have it

    def __call__(self, x: Float[Array, "B *T D"]) -> Float[Array, "B *T F"]:
        own = self.recall(x.dtype)
        return self.inner(x) + joined(each(x, own["a"]), own["b"]) * (self.alpha / sum(self.rows))


@technique("memory_kv")
class KVMemory(Memory):
    """Fetched keys and values that all positions see, without mask or positions: attention to them is added.

    A softmax of its own over the fetched keys of each head; the values are added to the heads, before the output
    matrix. 2 r H E values per layer and level. Of a level that is not fetched the softmax knows nothing.
    """

    accepts = (SelfAttention,)
    silent = ("value",)

    def pieces(self) -> dict[str, int]:
        return dict.fromkeys(("key", "value"), outputs_of(self.root.q))

    def __call__(self, x: Float[Array, "B T D"], scope: Any, past: Any = None, tap: Tap = untouched, key: Any = None):
        return self.inner(x, scope, past, _Joining(self, tap), key)

    def heads(self, q: Float[Array, "B T H E"]) -> Float[Array, "B T H E"]:
        """What the fetched values give to every position."""
        own, (b, _, h, e) = self.recall(q.dtype), q.shape
        nodes = self.fetched[...]
        require_rows(len(nodes), b)
        known = jnp.repeat(nodes >= 0, np.array(self.rows), axis=1, total_repeat_length=sum(self.rows))
        key, value = (jnp.broadcast_to(x.reshape(len(x), -1, h, e), (b, x.shape[1], h, e)) for x in own.values())
        scores = jnp.einsum("bthe,brhe->bhtr", self.root.q_norm(q), key, preferred_element_type=jnp.float32)
        scores = jnp.where(known[:, None, None], scores * self.root.scale, -1e30)
        pattern = (jax.nn.softmax(scores, axis=-1) * known[:, None, None]).astype(q.dtype)
        return jnp.einsum("bhtr,brhe->bthe", pattern, value)


class _Joining:
    """The tap through which KV memory reads the queries and adds to the heads."""

    def __init__(self, memory: KVMemory, outer: Tap):
        self.memory, self.outer = memory, outer
        self.q: Any = None  # the layer computes it before its heads

    def __call__(self, site: str, x: Array) -> Array:
        if site == "heads":
            x = x + self.memory.heads(self.q)
        x = self.outer(site, x)
        if site == "q":
            self.q = x
        return x

    def wants(self, site: str) -> bool:
        return site in ("q", "heads") or wants(self.outer, site)


def bare(matrix: Any) -> Any:
    """A matrix's `Linear` under its techniques."""
    while isinstance(matrix, Technique):
        matrix = matrix.inner
    return matrix


def inputs_of(matrix: Any) -> int:
    """Features that a matrix reads."""
    return bare(matrix).kernel.shape[0]


def outputs_of(matrix: Any) -> int:
    """Features that a matrix gives."""
    return bare(matrix).kernel.shape[1]


KINDS = {
    "ffn": ("memory", "mlp"),
    "lora_qk": ("memory_lora", r"attn\.[qk]"),
    "lora_vo": ("memory_lora", r"attn\.[vo]"),
    "lora_ffn": ("memory_lora", r"mlp\.(gate|up|down)"),
    "kv": ("memory_kv", "attn"),
}
"""Kind of memory -> its technique, and which modules of a block it joins."""


def add_memory(
    model: Any, kind: str = "ffn", *, layers: str | Sequence[int] = "uniform", rngs: nnx.Rngs | int = 0, **settings: Any
) -> Any:
    """Give a model a memory; it computes what it computed until the memory is trained.

    Args:
        model: a new, a trained or an imported one; changed in place.
        kind: "ffn", "lora_qk", "lora_vo", "lora_ffn" or "kv".
        layers: "uniform" (all), "late" (the later half), or the numbers of blocks.
        rngs: of the initial blocks. settings: `children`, `rows`, `slots`; of LoRA also `alpha`.

    Returns:
        The model.

    Raises:
        EditError: an unknown kind, blocks the model does not have, settings out of range.
    """
    if kind not in KINDS:
        raise EditError(f"no memory is called {kind!r}; known: {', '.join(KINDS)}")
    count = model.config.layers
    if isinstance(layers, str):
        if layers not in ("uniform", "late"):
            raise EditError(f'layers = {layers!r}: must be "uniform", "late" or numbers of blocks')
        layers = range(count // 2 if layers == "late" else 0, count)
    if not isinstance(layers, Sequence):
        raise EditError(f'layers = {layers!r}: must be "uniform", "late" or numbers of blocks')
    if not layers or not all(type(i) is int and 0 <= i < count for i in layers):
        raise EditError(f"layers = {list(layers)}: the model has blocks 0 to {count - 1}")
    name, part = KINDS[kind]
    return edit(model, rf"blocks\.({'|'.join(map(str, layers))})\.{part}", name, rngs=rngs, **settings)
