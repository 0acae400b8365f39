"""What a model remembers for a text: fetch by prompt or by document, score, and change memories while it writes.

model_of_sea = fetching(model, tree.find(["The captain"]))       # shares the weights; generate, evaluate, look inside
told = tell(model, tree, "The captain", tokens=200, every=50)    # retrieves anew every 50 tokens
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tinylm.evaluation import Window, batches, bootstrap
from tinylm.generation import generate
from tinylm.memory.clusters import MemoriesError, Tree, texts_of
from tinylm.memory.documents import require_nodes
from tinylm.techniques.memory import Memory
from tinylm.weights import bind, dotted, pure
from tinylm.yardsticks import frame


def memories(model: Any) -> dict[str, Memory]:
    """Path -> every memory of a model, in the order of the blocks. Raises MemoriesError where it has none."""
    found = {dotted(path): module for path, module in nnx.iter_modules(model) if isinstance(module, Memory)}
    if not found:
        raise MemoriesError("this model has no memory: give it one with add_memory(model, ...)")
    return dict(sorted(found.items(), key=lambda one: [int(p) if p.isdigit() else p for p in one[0].split(".")]))


def shape_of(model: Any) -> tuple[int, int]:
    """Children and depth of the tree that a model's memories belong to. Raises MemoriesError where they differ."""
    shapes = {(m.children, len(m.rows)) for m in memories(model).values()}
    if len(shapes) > 1:
        raise MemoriesError(f"the memories of this model are of different trees: {sorted(shapes)}")
    return shapes.pop()


def require_resident(model: Any, remedy: str) -> None:
    """Raise MemoriesError for a model that holds slots of a bank in files."""
    if any(memory.slots for memory in memories(model).values()):
        raise MemoriesError(f"this model holds slots of a bank that lies in files: {remedy}")


def fetching(model: Any, nodes: Any = "generic") -> Any:
    """The model, sharing its weights, with what `nodes` says at hand.

    Args:
        model: stays as it is.
        nodes: (levels,) for all rows of whatever it reads, or (rows, levels), one for each; -1 leaves a level out;
            "generic" or "none".

    Raises:
        MemoriesError: no memory, nodes that its tree does not have, or a model with slots, which fetches from a bank.
    """
    children, depth = shape_of(model)
    if not (isinstance(nodes, str) and nodes == "none"):
        require_resident(model, "fetch with Bank.fetching, or make it whole with Bank.resident")
    nodes = jnp.asarray(require_nodes(nodes, children, depth))
    graph, params = pure(model)
    return bind(graph, {name: nodes if name.rpartition(".")[2] == "fetched" else x for name, x in params.items()})


def tell(
    model: Any, tree: Tree, prompt: str, *, tokens: int = 200, every: int = 50, seed: int = 0, **sampling: Any
) -> str:
    """A text whose memories follow it: every `every` tokens those of the text so far are fetched (strict retrieval).

    What was read with other memories is read again with the new ones. Settings as in `generate`.

    Raises MemoriesError for a model without memory, or a tree that its memories do not belong to.
    """
    if shape_of(model) != (tree.children, tree.depth):
        children, depth = shape_of(model)
        raise MemoriesError(f"{tree!r} is not this model's: its memories have {children} children and depth {depth}")
    if every < 1 or tokens < 0:
        raise MemoriesError(f"every = {every}, tokens = {tokens}: every must be at least 1, and tokens not negative")
    text, made = prompt, 0
    while made < tokens:
        own = fetching(model, tree.find([text])[0])
        longer = generate(own, text, tokens=min(every, tokens - made), seed=seed + made, **sampling)
        if longer == text:
            break
        text, made = longer, made + every
    return text


# --- scores -----------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def _logprobs(graph: Any, params: Any, tokens: Any, targets: Any) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each target (B T), and whether it was the likeliest."""
    logits = bind(graph, params)(tokens).astype(jnp.float32)
    found = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0] - jax.nn.logsumexp(logits, axis=-1)
    return found, logits.argmax(-1) == targets


def token_scores(
    model: Any, framed: Sequence[np.ndarray], nodes: np.ndarray | None, *, batch: int = 32
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each document, with the memories it fetches: log-probability and hit of every token but the first.

    Args:
        framed: token ids with what they begin from in front. nodes: (documents, levels); None: what the model's own
            state says, as for one without memory. batch: windows at a time; a long document is read in windows that
            overlap by half.
    """
    context = model.config.context
    stride = max(1, context // 2)
    windows = []
    for i, ids in enumerate(framed):
        for k in range(1 + max(0, -(-(len(ids) - 1 - context) // stride))):
            length = min(context, len(ids) - 1 - k * stride)
            windows.append(Window(i, k * stride, length, context - stride if k else 0))
    graph, params = pure(model)
    fetches = [name for name in params if name.rpartition(".")[2] == "fetched"] if nodes is not None else []
    if fetches:
        require_resident(model, "make it whole with Bank.resident")
    nodes = require_nodes(nodes, *shape_of(model)) if fetches else None
    found = [(np.zeros(len(ids) - 1), np.zeros(len(ids) - 1, bool)) for ids in framed]
    for some, rows, size in batches(windows, context, batch):
        tokens, targets = np.zeros((2, rows, size), np.int32)
        own = np.full((rows, nodes.shape[1] if nodes is not None else 1), -1, np.int32)
        for row, (i, begin, length, _) in enumerate(some):
            tokens[row, :length], targets[row, :length] = framed[i][begin:][:length], framed[i][begin + 1 :][:length]
            if nodes is not None:
                own[row] = nodes[i]
        results = _logprobs(graph, {**params, **dict.fromkeys(fetches, own)}, tokens, targets)
        for (i, begin, length, skip), *values in zip(some, *map(np.asarray, results), strict=False):
            for kept, value in zip(found[i], values, strict=True):
                kept[begin + skip : begin + length] = value[skip:length]
    return found


class Score(NamedTuple):
    """Bits per byte of texts with the memories each fetched; `ci95` over texts; `bits` and `bytes` per text."""

    bits_per_byte: float
    ci95: tuple[float, float] | None
    nats_per_token: float
    bits: np.ndarray
    bytes: np.ndarray

    def __repr__(self) -> str:
        return f"{self.bits_per_byte:.4f} bits/byte, {self.nats_per_token:.4f} nats/token, {len(self.bits)} texts"


def score(model: Any, texts: Sequence[str], nodes: Any = None, *, after: Sequence[int] | None = None) -> Score:
    """How well a model predicts texts, each with its own memories.

    Args:
        nodes: (texts, levels), or a row for all of them, or as in `fetching`; None: what the model's own state says (a
            new one: nothing). A model without memory makes no use of them.
        after: only what comes after so many characters of each text is scored (the prefix that was retrieved with);
            the token that reaches over the border counts with the prefix.

    Raises:
        MemoriesError: no tokenizer, other numbers of texts, nodes and `after`, nodes that are not there, or a text with
            nothing after its prefix.
        EvaluationError: no text, or an empty one.
    """
    tokenizer, texts = _tokenizer(model), texts_of(texts)
    framed, size = frame(texts, tokenizer)
    nodes = _a_row_for_each(model, nodes, len(texts))
    skips, size = [0] * len(texts), size.astype(float)
    if after is not None:
        if len(after) != len(texts) or min(after) < 0:
            raise MemoriesError(f"after = {list(after)[:8]}: give one number of characters, 0 or more, for each text")
        lengths = np.array([len(tokenizer.decode_bytes([i])) for i in range(tokenizer.vocab)])
        for i, (ids, text) in enumerate(zip(framed, texts, strict=True)):
            covered = np.cumsum([0, *lengths[ids[1:-1]]])
            skips[i] = int(np.searchsorted(covered, len(text[: after[i]].encode())))
            size[i] -= covered[min(skips[i], len(covered) - 1)]
            if size[i] <= 0:
                raise MemoriesError(f"after[{i}] = {after[i]}: nothing of the text, {len(text)} characters, is left")
    nats = [-logp[skip:] for (logp, _), skip in zip(token_scores(model, framed, nodes), skips, strict=True)]
    bits = np.array([n.sum() for n in nats]) / math.log(2)
    total = float(bits.sum() / size.sum())
    per_token = float(sum(n.sum() for n in nats) / sum(map(len, nats)))
    return Score(total, bootstrap(bits, size), per_token, bits, size)


def _tokenizer(model: Any) -> Any:
    if model.tokenizer is None:
        raise MemoriesError("a model without a tokenizer cannot read texts: set model.tokenizer")
    return model.tokenizer


def _a_row_for_each(model: Any, nodes: Any, count: int) -> np.ndarray | None:
    """(count, levels) nodes; None where none are given or the model fetches nothing."""
    if nodes is None or not any(isinstance(module, Memory) for _, module in nnx.iter_modules(model)):
        return None
    nodes = require_nodes(nodes, *shape_of(model))
    if len(nodes) not in (1, count):
        raise MemoriesError(f"{len(nodes)} rows of nodes for {count} texts: one for each, or one for all")
    return np.broadcast_to(nodes, (count, nodes.shape[1]))


class Recall(NamedTuple):
    """Of each question: whether every token of the answer was the likeliest, and the answer's log-probability."""

    hits: np.ndarray
    logprobs: np.ndarray

    @property
    def accuracy(self) -> float:
        """Share of the questions answered."""
        return float(self.hits.mean())


def recall(model: Any, prompts: Sequence[str], answers: Sequence[str], nodes: Any = None) -> Recall:
    """Ask for facts: does the model continue each prompt with its answer, token for token, taking the likeliest?

    Args:
        nodes: as in `score`: of the prompts alone (strict), or of where the answer is to be found (oracle).

    Raises MemoriesError as `score` does, and for no question or an empty answer.
    """
    tokenizer, prompts, answers = _tokenizer(model), texts_of(prompts, "prompts"), texts_of(answers, "answers")
    if len(prompts) != len(answers) or not prompts or not all(answers):
        raise MemoriesError(f"{len(prompts)} prompts and {len(answers)} answers: one answer for each, and none empty")
    framed, starts = [], []
    for prompt, answer in zip(prompts, answers, strict=True):
        whole, part = tokenizer.encode(prompt + answer), tokenizer.encode(prompt)
        same = next((i for i, (a, b) in enumerate(zip(whole, part, strict=False)) if a != b), len(part))
        framed.append(np.concatenate([[tokenizer.begin], whole]).astype(np.int32))
        starts.append(same)
    found = token_scores(model, framed, _a_row_for_each(model, nodes, len(framed)))
    hits = np.array([hit[at:].all() for (_, hit), at in zip(found, starts, strict=True)])
    return Recall(hits, np.array([logp[at:].sum() for (logp, _), at in zip(found, starts, strict=True)]))
