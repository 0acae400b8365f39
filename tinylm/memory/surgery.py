"""Editing what a model knows: list the blocks of a bank, leave a branch out, delete it, or take it from another model.

    nodes = blocked(tree.find(texts), branch=(0, 3), children=16)     # for this reading only
    delete(model, branch=(0, 3))                                     # for good

A branch is (level, node): that node's block and those of everything below it.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from tinylm.memory.clusters import MemoriesError
from tinylm.memory.retrieval import fetching, memories, require_resident, shape_of
from tinylm.techniques.memory import FFNMemory
from tinylm.weights import assign, named

Branch = tuple[int, int]


class Block(NamedTuple):
    """The memory of one node: how many values it has in all layers, and their norms before and behind the activation.

    `silent` is the norm of the pieces that start at zero: 0 until a document was learned there.
    """

    level: int
    node: int
    values: int
    norm: float
    silent: float


def under(branch: Branch, children: int, depth: int) -> dict[int, slice]:
    """Level -> the nodes of a branch, itself included. Raises MemoriesError for one that the tree does not have."""
    try:
        level, node = map(operator.index, branch)
    except (TypeError, ValueError):
        level = node = -1
    if not (0 <= level < depth and 0 <= node < children ** (level + 1)):
        raise MemoriesError(f"branch = {branch}: give (level, node), levels 0 to {depth - 1} of {children} children")
    return {
        at: slice(node * children ** (at - level), (node + 1) * children ** (at - level)) for at in range(level, depth)
    }


def blocked(nodes: np.ndarray, branch: Branch, children: int, whole: bool = False) -> np.ndarray:
    """Nodes with -1, fetch nothing, wherever they lie in the branch; with `whole`, on all of a path that enters it."""
    nodes = np.atleast_2d(np.array(nodes, np.int32))
    inside = np.zeros(nodes.shape, bool)
    for level, span in under(branch, children, nodes.shape[1]).items():
        inside[:, level] = (span.start <= nodes[:, level]) & (nodes[:, level] < span.stop)
    return np.where(inside.any(axis=1, keepdims=True) if whole else inside, -1, nodes).astype(np.int32)


def blocks(model: Any) -> list[Block]:
    """Every block of a bank that the model holds itself, the generic ones last in their level."""
    held, found = _resident(model), []
    for level in range(shape_of(model)[1]):
        tables = [(m, np.asarray(m.bank[level][...])) for m in held.values()]
        norm = sum((table**2).sum(1) for _, table in tables)
        silent = sum((table[:, _silent(m, level)] ** 2).sum(1) for m, table in tables)
        size = sum(table.shape[1] for _, table in tables)
        rows = zip(np.sqrt(norm).tolist(), np.sqrt(silent).tolist(), strict=True)
        found += [Block(level, node, size, *both) for node, both in enumerate(rows)]
    return found


def delete(model: Any, branch: Branch) -> Any:
    """Zero every block of a branch, for good; returns the model. Optimiser moments are the run's, not the model's.

    FFN and LoRA memories then add exactly nothing. Deleted keys of a KV memory still take their share of the softmax:
    fetch with `blocked` nodes, too, where that matters.
    """
    return _write(model, branch, lambda name, span: 0.0)


def swap(model: Any, branch: Branch, other: Any) -> Any:
    """Put another model's blocks in the place of a branch's, such as those of an earlier or a corrected training.

    Raises MemoriesError unless both have the same memories.
    """
    theirs, mine = named(other), named(model)
    names = [name for name in mine if name.split(".")[-2:-1] == ["bank"]]
    if wrong := [n for n in names if n not in theirs or theirs[n].shape != mine[n].shape]:
        raise MemoriesError(f"the other model has no such memories: {', '.join(wrong[:4])}")
    return _write(model, branch, lambda name, span: theirs[name][span])


def bake(model: Any, nodes: Any) -> Any:
    """A plain model that has the memory of one path built in, as more hidden units: for engines, which fetch nothing.

    Args:
        model: with an FFN memory in every block, and no other techniques.
        nodes: (levels,) of one document, or "generic".

    Raises MemoriesError for other memories: LoRA and KV memories, or those of some blocks only, have no such model.
    """
    from tinylm.model import Transformer

    held, config = memories(fetching(model, nodes)), model.config
    paths = [f"blocks.{i}.mlp" for i in range(config.layers)]
    if list(held) != paths or len(config.edits) != 1 or not all(type(m) is FFNMemory for m in held.values()):
        raise MemoriesError("only a model with one FFN memory in every block, and nothing else, can be baked")
    own = {path: {name: rows[0] for name, rows in m.recall(np.float32).items()} for path, m in held.items()}
    if any(len(m.fetched[...]) > 1 for m in held.values()):
        raise MemoriesError("a plain model has one memory: give the nodes of one document")
    values = {n.replace(".mlp.inner.", ".mlp."): x for n, x in named(model).items()}
    more = sum(held[paths[0]].rows)
    for path in paths:
        for name, rows in own[path].items():
            kernel, bias = f"{path}.{name}.kernel", f"{path}.{name}.bias"
            parts, axis = ([values[kernel], rows], 0) if name == "down" else ([values[kernel], rows.T], 1)
            values[kernel] = jnp.concatenate(parts, axis=axis)
            if bias in values and name != "down":
                values[bias] = jnp.pad(values[bias], (0, more))
    plain = Transformer(config.replace(hidden=config.hidden + more, edits=()), tokenizer=model.tokenizer)
    assign(plain, {name: values[name] for name in named(plain)})
    return plain


def _write(model: Any, branch: Branch, new: Any) -> Any:
    children, depth = shape_of(model)
    spans, held, values = under(branch, children, depth), _resident(model), named(model)
    for path in held:
        for level, span in spans.items():
            name = f"{path}.bank.{level}"
            values[name] = values[name].at[span].set(new(name, span))
    assign(model, values)
    return model


def _resident(model: Any) -> dict[str, Any]:
    require_resident(model, "change them with Bank.write")
    return memories(model)


def _silent(memory: Any, level: int) -> np.ndarray:
    """Which values of a block start at zero."""
    return np.concatenate(
        [np.full(memory.rows[level] * width, name in memory.silent) for name, width in memory.pieces().items()]
    )
