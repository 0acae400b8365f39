"""Subnetworks: which weights of a frozen model are enough to predict the next token from the current one?

    found = find(model, tokens, Bigrams.count(tokens), sizes=(1, 10, 100))   # three weights of the size penalty at once
    found[1].share, found[1].table()
    measure(model, found[1], bigrams, held_out)

Method: masks by continuous sparsification, Chang and Bergen, Bigram Subnetworks (2025), section 3 and appendix. Their
15,000 steps are squeezed into the steps given: the learning rate and the heat's growth are set so that scores can
travel as far and the heat ends as high. Seeds order the data; masks start equal.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from tinylm import ops, show
from tinylm.data import DataError, Tokens, Windows
from tinylm.model import Transformer
from tinylm.probe.bigrams import Bigrams
from tinylm.techniques import EditError, Technique, edit, modules, put
from tinylm.techniques.mask import Mask
from tinylm.weights import bind, pure

MATRICES = r"blocks\.\d+\.(attn|mlp)\.\w+"  # all that may be masked; never embeddings, norms, biases, the head
TRAVEL, HEAT = 0.75, 15.0  # of the paper: learning rate x steps, and log of the last heat
WEIGHT_DECAY = 0.01


@dataclasses.dataclass(frozen=True, eq=False)
class Subnetwork:
    """A part of a model's matrices.

    Attributes:
        masks: path of every matrix -> (inputs, outputs) boolean, whether a weight is kept; DataError for others.
        settings: how it was found. steps: that it took.
        losses: of every step, nats, without the penalty. sizes: expected share kept, of every step.
        stable: no spike of the loss that it had not recovered from in time (the paper's rule; see `is_stable`).
        decided: the early stop's condition was met: hardly any mask was between 0.1 and 0.9 any more.
    """

    masks: Mapping[str, np.ndarray]
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    steps: int = 0
    losses: np.ndarray = dataclasses.field(default_factory=lambda: np.empty(0))
    sizes: np.ndarray = dataclasses.field(default_factory=lambda: np.empty(0))
    stable: bool = True
    decided: bool = True

    def __post_init__(self) -> None:
        if not self.masks:
            raise DataError("a subnetwork needs the mask of at least one matrix")
        for path, mask in self.masks.items():
            if mask.dtype != bool:
                raise DataError(f"the mask of {path} is {mask.dtype}: give booleans, true where a weight is kept")

    @property
    def kept(self) -> int:
        """Weights kept."""
        return sum(int(mask.sum()) for mask in self.masks.values())

    @property
    def total(self) -> int:
        """Weights that could be."""
        return sum(mask.size for mask in self.masks.values())

    @property
    def share(self) -> float:
        """kept / total."""
        return self.kept / self.total

    def where(self, pattern: str) -> float:
        r"""Share of the kept weights in matrices whose path matches: `blocks\.0\.mlp\..*` is the first MLP."""
        inside = sum(int(mask.sum()) for path, mask in self.masks.items() if re.fullmatch(pattern, path))
        return inside / max(1, self.kept)

    def complement(self) -> Subnetwork:
        """All other weights."""
        return Subnetwork({path: ~mask for path, mask in self.masks.items()}, {**self.settings, "complement": True})

    def shuffled(self, seed: int = 0) -> Subnetwork:
        """As many weights of every matrix, at random: the control."""
        rng = np.random.default_rng(seed)
        masks = {path: rng.permutation(mask.reshape(-1)).reshape(mask.shape) for path, mask in self.masks.items()}
        return Subnetwork(masks, {**self.settings, "shuffled": seed})

    def with_part(self, path: str, at: Any = ..., on: bool = True) -> Subnetwork:
        """A part added or taken away: `at` indexes the (inputs, outputs) matrix at `path`, so that a head is columns of
        q, k, v and rows of o, a neuron a column of up and a row of down. Raises DataError for an unknown path.
        """
        if path not in self.masks:
            raise DataError(f"no matrix {path!r} in this subnetwork; it has {', '.join(self.masks)}")
        new = self.masks[path].copy()
        new[at] = on
        return Subnetwork({**self.masks, path: new}, {**self.settings, "changed": path})

    def model(self, model: Transformer) -> Transformer:
        """A copy of the model with only these weights; the others are 0. Raises DataError for another model's masks."""
        graph, params = masked(model, "binary", self.paths(model))
        return bind(graph, {**params, **scores_of(self, params)})

    def paths(self, model: Transformer) -> str:
        """A regex for the matrices that masks lie on. Raises DataError where they are not this model's."""
        known = {path for path, _ in modules(model)}
        if wrong := [path for path in self.masks if path not in known]:
            raise DataError(f"a mask of another model: this one has no {wrong[0]}")
        return "|".join(map(re.escape, self.masks))

    def table(self) -> show.Picture:
        """Where the kept weights are."""
        rows = []
        for path, mask in self.masks.items():
            name = path.removeprefix("blocks.")
            rows.append([name, int(mask.sum()), f"{mask.mean():.2%}", f"{mask.sum() / max(1, self.kept):.1%}"])
        rows.append(["all", self.kept, f"{self.share:.2%}", "100%"])
        return show.table(rows, ["matrix", "kept", "of the matrix", "of all kept"])

    def __repr__(self) -> str:
        return f"Subnetwork({self.kept:,} of {self.total:,} weights, {self.share:.2%})"


def masked(model: Transformer, rule: str, where: str = MATRICES, **settings: Any) -> tuple[Any, dict[str, Any]]:
    """Graph and parameters of a copy of the model with a mask over every matrix; the model stays as it is.

    Raises EditError where the usual pattern would pass over matrices, because a technique lies around their parent.
    """
    if where == MATRICES:
        for path, module in modules(model):
            if isinstance(module, Technique) and re.fullmatch(r"blocks\.\d+(\.(attn|mlp))?", path):
                what = f"{path} has a {type(module).__name__} around it, and its matrices are at {path}.inner: "
                raise EditError(f"{what}find a subnetwork before that is put on, or say where=")
    twin = edit(nnx.clone(model), where, "mask", rule=rule, **settings)
    return pure(twin)


def scores_of(part: Subnetwork, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The parameters of binary masks. Raises DataError where they are not this model's."""
    names = {name.removesuffix(".scores"): name for name in params if name.endswith(".scores")}
    wrong = [p for p in part.masks if p not in names or params[names[p]].shape != part.masks[p].shape]
    if wrong:
        raise DataError(f"a mask of another model: {wrong[0]} has shape {part.masks[wrong[0]].shape}")
    every = {names[path]: np.ones(params[names[path]].shape, np.int8) for path in names}
    return {**every, **{names[path]: mask.astype(np.int8) for path, mask in part.masks.items()}}


def find(
    model: Transformer,
    data: Tokens,
    target: Bigrams | None,
    *,
    sizes: Sequence[float] = (10.0,),
    rule: str = "continuous",
    steps: int = 1500,
    batch: int = 32,
    length: int = 128,
    learning_rate: float = 0.0,
    seed: int = 0,
    where: str = MATRICES,
    early: bool = True,
    progress: Callable[[int, np.ndarray, np.ndarray], Any] | None = None,
    **settings: Any,
) -> list[Subnetwork]:
    """Train masks over a frozen model until it says what the target says, one subnetwork per size penalty, together.

    The loss is the soft cross-entropy to the target, averaged over all positions, plus penalty x expected share kept.

    Args:
        data: texts to train on. target: next-token shares given the current token, or None for the model's own
            predictions (optimal pruning).
        sizes: weights of the size penalty, the paper's lambda; it used 0 to 1000 and 10 for its smaller models.
        rule: "continuous", "hard_concrete" or "topk"; settings: more of the technique, such as keep=0.05 for "topk".
        steps, batch, length: of the training; length is cut to the model's context.
        learning_rate: of AdamW; 0: twice the paper's travel of 0.75 over all steps.
        early: stop when fewer than 1 percent as many masks are between 0.1 and 0.9 as are above 0.9.
        progress: called every 50 steps with step, losses and shares kept.

    Raises:
        DataError: a target or texts of another vocabulary, or penalties, steps or a rate that
            cannot be. EditError: no matrix matches `where`, or an unknown rule.
    """
    if target is not None and target.vocab != model.config.vocab:
        raise DataError(f"the target knows {target.vocab} ids, the model {model.config.vocab}: count with vocab=...")
    if not isinstance(data, Tokens):
        raise DataError(
            f"the texts are a {type(data).__name__}: give Tokens, such as Tokens.from_array(ids, vocab=...)"
        )
    if data.vocab > model.config.vocab:
        raise DataError(f"the texts have {data.vocab} ids, the model {model.config.vocab}: was another tokenizer used?")
    sizes = tuple(np.atleast_1d(np.asarray(sizes, np.float64)).tolist())
    if not sizes or steps < 1:
        raise DataError(f"sizes = {sizes}, steps = {steps}: need at least one of each")
    if not all(0 <= size < math.inf for size in sizes) or not 0 <= learning_rate < math.inf:
        raise DataError(f"sizes = {sizes}, learning_rate = {learning_rate}: penalties and the rate are at least 0")
    if rule == "binary":
        raise EditError("rule = 'binary' learns nothing: take continuous, hard_concrete or topk")
    rate = learning_rate or 2 * TRAVEL / steps
    growth = math.exp(HEAT / steps)
    graph, params = masked(model, rule, where, **{"growth": growth, **settings})
    scores = {name: x for name, x in params.items() if name.endswith(".scores")}
    clocks = [name for name in params if name.endswith(".clock")]
    still = {name: x for name, x in params.items() if name not in scores and name not in clocks}
    # A technique under the mask may have a clock of its own, which stands still.
    own = tuple(name for name in clocks if name.removesuffix(".clock") + ".scores" in scores)
    still |= {name: params[name] for name in clocks if name not in own}
    windows = Windows(data, batch=batch, length=min(length, model.config.context), seed=seed)
    first, *others = sizes
    many = bool(others)
    update = _update(graph, own, many, target is None, rule == "continuous")
    spread = (lambda x: jnp.broadcast_to(x, (len(sizes), *x.shape))) if many else (lambda x: x)
    state = jax.tree.map(lambda x: spread(jnp.array(x)), (scores, _ADAM.init(scores)))
    penalties = jnp.asarray(sizes, jnp.float32) if many else jnp.float32(first)
    losses, shares, decided = [], [], np.zeros(len(sizes), bool)
    with ops.plain() if many else contextlib.nullcontext():  # native kernels take members one by one
        for step in range(steps):
            tokens = windows(step).tokens
            rows = None if target is None else target.rows(tokens)
            state, figures = update(state, still, tokens, rows, penalties, np.float32(step), np.float32(rate))
            nats, share, done = (np.atleast_1d(np.asarray(x)) for x in figures)
            losses.append(nats)
            shares.append(share)
            decided |= done.astype(bool)
            if progress is not None and (step + 1) % 50 == 0:
                progress(step + 1, nats, share)
            if early and rule == "continuous" and done.all():
                break
    found = []
    for i, penalty in enumerate(sizes):
        mine = {name: x[i] if many else x for name, x in state[0].items()}
        twin = bind(graph, {**params, **mine})
        masks = {path: np.asarray(m.kept()) for path, m in modules(twin) if isinstance(m, Mask)}
        curve = np.array([x[i] for x in losses])
        about = {"size": float(penalty), "rule": rule, "seed": seed, "rate": rate, "batch": batch, **settings}
        stable = bool(np.isfinite(curve).all()) and is_stable(curve)
        found.append(
            Subnetwork(masks, about, len(curve), curve, np.array([x[i] for x in shares]), stable, bool(decided[i]))
        )
    return found


_ADAM = optax.scale_by_adam()


@functools.lru_cache(maxsize=8)
def _update(graph: Any, clocks: tuple[str, ...], many: bool, own_target: bool, watch: bool) -> Callable:
    def loss(scores, still, tokens, rows, penalty, step):
        model = bind(graph, {**still, **scores, **dict.fromkeys(clocks, step)})
        masks = [m for _, m in modules(model) if isinstance(m, Mask)]
        logits = model(tokens).astype(jnp.float32)
        if own_target:
            whole = bind(graph, {**still, **scores, **dict.fromkeys(clocks, step)})
            _unmask(whole)
            rows = jax.nn.softmax(jax.lax.stop_gradient(whole(tokens)).astype(jnp.float32))
        nats = (jax.nn.logsumexp(logits, axis=-1) - jnp.sum(rows * logits, axis=-1)).mean()
        count = sum(m.scores[...].size for m in masks)
        share = sum(m.size() for m in masks) / count
        soft = [m.soft() for m in masks] if watch else []
        between = sum(jnp.sum((s >= 0.1) & (s <= 0.9), dtype=jnp.int32) for s in soft)
        above = sum(jnp.sum(s > 0.9, dtype=jnp.int32) for s in soft)
        done = jnp.bool_(False) if not watch else between < 0.01 * above
        return nats + penalty * share, (nats, share, done)

    def step(state, still, tokens, rows, penalty, number, rate):
        scores, adam = state
        slopes, figures = jax.grad(loss, has_aux=True)(scores, still, tokens, rows, penalty, number)
        change, adam = _ADAM.update(slopes, adam)
        decay = rate * WEIGHT_DECAY
        scores = jax.tree.map(lambda s, c: s - rate * c - decay * s, scores, change)
        return (scores, adam), figures

    if many:
        step = jax.vmap(step, in_axes=(0, None, None, None, 0, None, None))
    return jax.jit(step, donate_argnums=0)


def _unmask(model: Any) -> None:
    for path, module in list(modules(model)):
        if isinstance(module, Mask):
            put(model, path, module.inner)


def is_stable(losses: np.ndarray, tail: int = 100) -> bool:
    """Whether every spike was recovered from `tail` steps before the end, at most a tenth of the run.

    A spike is a loss more than 0.25 nats, or more than a quarter, above the mean of the ten before it; it is recovered
    when the loss falls back to that mean or below the threshold again.
    """
    tail, limit = min(tail, len(losses) // 10), math.inf
    waiting = False
    for i in range(10, len(losses)):
        before = losses[i - 10 : i].mean()
        if not waiting and (losses[i] > before + 0.25 or losses[i] > before * 1.25):
            waiting, limit = True, min(before + 0.25, before * 1.25)
        elif waiting and losses[i] <= limit:
            waiting = False
        if waiting and i >= len(losses) - tail:
            return False
    return True


@dataclasses.dataclass(frozen=True)
class Overlap:
    """How far two subnetworks agree.

    Attributes:
        both: share of all weights that are in both. of_first: share of the first that is in the second.
        chance: mean of `both` over shuffles. p: share of shuffles at least as large, counting the observed one.
        shuffles: how many.
    """

    both: float
    of_first: float
    chance: float
    p: float
    shuffles: int


def overlap(a: Subnetwork, b: Subnetwork, *, shuffles: int = 10_000, by: str = "weights", seed: int = 0) -> Overlap:
    """Weights in both against chance, each matrix keeping its count.

    `by`: what is shuffled: "weights" (the overlap of a matrix is then hypergeometric, and is drawn as such), or "rows",
    whole rows of a matrix, as the paper does, which keeps how many weights share an input. Raises DataError for
    subnetworks of other matrices.
    """
    if {p: m.shape for p, m in a.masks.items()} != {p: m.shape for p, m in b.masks.items()}:
        raise DataError("these subnetworks are of different models: their matrices differ")
    if by not in ("weights", "rows"):
        raise DataError(f"by = {by!r}: shuffle weights or rows")
    if shuffles < 1:
        raise DataError(f"shuffles = {shuffles}: chance needs at least 1")
    rng, seen, drawn = np.random.default_rng(seed), 0, np.zeros(shuffles)
    for path, one in a.masks.items():
        two = b.masks[path]
        seen += int((one & two).sum())
        if by == "weights":
            drawn += rng.hypergeometric(one.sum(), one.size - one.sum(), two.sum(), shuffles)
        else:
            shared = one.astype(np.float32) @ two.astype(np.float32).T
            places = np.arange(len(shared))
            drawn += [shared[rng.permutation(places), places].sum() for _ in range(shuffles)]
    p = (1 + int((drawn >= seen).sum())) / (1 + shuffles)
    return Overlap(seen / a.total, seen / max(1, a.kept), float(drawn.mean() / a.total), p, shuffles)
