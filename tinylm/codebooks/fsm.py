"""TokFSM: does a model with codebooks learn a finite-state machine, and do its codes stand for the states?

The world's mode "fsm" (Tamkin, Taufeeque and Goodman 2023, section 3): a state is two digits, every state has as many
equally likely successors. Tokens are the digits 0 to 9; `BEGIN` opens a text.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tinylm.codebooks.books import CodebookError, read, tapped
from tinylm.data import Batch
from tinylm.weights import bind, pure
from tinylm.world import World

BEGIN, VOCAB = 10, 11


class Walks:
    """Batches of random walks, made as they are asked for: `walks(step)`, a pure function of (seed, step).

    A row is `BEGIN` and as many digits of a walk from a uniformly drawn state as make `length` inputs.
    """

    def __init__(self, world: World, *, batch: int, length: int, seed: int = 0):
        self.table, self.batch, self.length, self.seed = world.successor_table, batch, length, seed

    def __call__(self, step: int) -> Batch:
        rng = np.random.default_rng([self.seed, step])
        rows = digits(walks(self.table, self.batch, self.length // 2 + 1, rng))[:, : self.length + 1]
        return Batch(rows[:, :-1].copy(), rows[:, 1:].copy())


def walks(table: np.ndarray, count: int, length: int, rng: np.random.Generator) -> np.ndarray:
    """(count, length) states of random walks; `table` (states, successors) says where each leads."""
    states = np.empty((count, length), np.int64)
    states[:, 0] = rng.integers(0, len(table), count)
    for i in range(1, length):
        states[:, i] = table[states[:, i - 1], rng.integers(0, table.shape[1], count)]
    return states


def ending(table: np.ndarray, last: np.ndarray, length: int, rng: np.random.Generator) -> np.ndarray:
    """(n, length) valid walks that end in the states `last`, by the machine run backwards.

    Where a state has no predecessor (rare), the walk starts anew in a random one: that step is no valid one.
    """
    before = [np.flatnonzero((table == state).any(1)) for state in range(len(table))]
    rows = np.empty((len(last), length), np.int64)
    rows[:, -1] = last
    for i in range(length - 2, -1, -1):
        rows[:, i] = [rng.choice(before[s]) if len(before[s]) else rng.integers(len(table)) for s in rows[:, i + 1]]
    return rows


def digits(states: np.ndarray) -> np.ndarray:
    """`BEGIN`, then two digits per state: (n, length) to (n, 1 + 2 length) int32."""
    pairs = np.stack([states // 10, states % 10], -1).reshape(len(states), -1)
    return np.concatenate([np.full((len(states), 1), BEGIN), pairs], 1).astype(np.int32)


@functools.lru_cache(maxsize=16)
def _last(graph: Any) -> Any:
    """Probabilities (n V) of the token after the last, with codes replaced there where `put` is true."""

    def run(params: dict, tokens: jax.Array, codes: dict[str, jax.Array], put: dict[str, jax.Array]) -> jax.Array:
        def tap(site: str, x: jax.Array) -> jax.Array:
            return x.at[:, -1].set(jnp.where(put[site], codes[site], x[:, -1])) if site in codes else x

        model = tapped(bind(graph, params), tap) if codes else bind(graph, params)
        x, _ = model.trunk(tokens)
        return jax.nn.softmax(model.unembed(x[:, -1:])[:, 0].astype(jnp.float32))

    return jax.jit(run)


def following(
    model: Any, tokens: np.ndarray, codes: Mapping[str, jax.Array] | None = None, only: Sequence[str] | None = None
) -> np.ndarray:
    """Probabilities (n, V) of the next token.

    Args:
        codes: name -> ids (n, groups, k) to put at the last position. only: the names of those that count; None: all.
    """
    graph, params = pure(model)
    codes = codes or {}
    put = {f"{name}.codes": jnp.bool_(only is None or name in only) for name in codes}
    return np.asarray(_last(graph)(params, jnp.asarray(tokens), {f"{n}.codes": x for n, x in codes.items()}, put))


def successors(model: Any, tokens: np.ndarray) -> np.ndarray:
    """(n, 100) probabilities of every next state after n texts of whole states."""
    first = following(model, tokens)[:, :10]
    longer = np.concatenate([np.repeat(tokens, 10, 0), np.tile(np.arange(10), len(tokens))[:, None]], 1)
    second = following(model, longer.astype(np.int32))[:, :10].reshape(-1, 10, 10)
    return (first[:, :, None] * second).reshape(len(tokens), 100)


class Machine(NamedTuple):
    """How well the machine was learned.

    Attributes:
        first: share of the true successors among as many likeliest ones, after BEGIN and one state; mean over states.
        later: the same after a walk of several states. mass: probability of the true successors there, which is the
            expected share of valid transitions at temperature 1.
    """

    first: float
    later: float
    mass: float


def machine(model: Any, world: World, *, length: int = 8, seed: int = 0) -> Machine:
    """Exact figures over all states; `length`: states in the longer texts."""
    table, rng = world.successor_table, np.random.default_rng(seed)
    every = np.arange(len(table))
    true = np.zeros((len(table), 100), bool)
    true[every[:, None], table] = True
    shares = []
    for walk in (every[:, None], ending(table, every, length, rng)):
        found = successors(model, digits(walk))
        best = np.argsort(-found, 1)[:, : table.shape[1]]
        shares.append(np.take_along_axis(true, best, 1).mean())
    return Machine(float(shares[0]), float(shares[1]), float((found * true).sum(1).mean()))


def purity(model: Any, world: World, states: int = 1) -> dict[str, float]:
    """Name -> share of the codes that fire at the last digit for exactly one of all valid texts of `states` states.

    Of those that fire at all, over all groups. 1: the paper's bigrams, 2: a state and its successor, four digits.
    """
    walk = np.arange(world.states)[:, None]
    for _ in range(states - 1):
        walk = np.concatenate(
            [np.repeat(walk, world.successors, 0), world.successor_table[walk[:, -1]].reshape(-1, 1)], 1
        )
    found = {}
    for name, ids in read(model, digits(walk)).items():
        counts = [np.bincount(np.asarray(ids[:, -1, g]).ravel()) for g in range(ids.shape[2])]
        fired = np.concatenate(counts)
        found[name] = float((fired == 1).sum() / (fired > 0).sum())
    return found


def divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Jensen-Shannon divergence of the last axis, in nats."""
    middle = (p + q) / 2
    part = lambda x: np.sum(np.where(x > 0, x * np.log(np.maximum(x, 1e-30) / np.maximum(middle, 1e-30)), 0), -1)  # noqa: E731
    return (part(p) + part(q)) / 2


def patching_table(
    model: Any,
    world: World,
    components: Mapping[str, Sequence[str]],
    *,
    pairs: int = 500,
    length: int = 4,
    same_digit: bool = False,
    seed: int = 0,
) -> dict[str, float]:
    """What is left of the divergence between two states' predictions when codes of one are put into the other.

    Texts that end in state A run with the codes that texts ending in B chose at the last position, at the codebooks of
    one component; the divergence to B's prediction is divided by that without a patch (means over pairs).
    Everything at the last position but its token's embedding is codes, where all of attention and MLP have them: so
    all of them together leave 0 exactly where A and B share their second digit (`same_digit`), nearly 0 elsewhere.

    Args:
        components: name of a component -> names of its codebooks.
        pairs: of different states. length: states in each text.

    Raises CodebookError for a codebook the model does not have, or a machine of too few states.
    """
    if world.states < (11 if same_digit else 2):
        raise CodebookError(f"no two of {world.states} states {'share their second digit' * same_digit or 'differ'}")
    rng = np.random.default_rng(seed)
    a = rng.integers(0, world.states, pairs)
    if same_digit:
        b = (a + 10 * rng.integers(1, max(2, -(-world.states // 10)), pairs)) % (10 * -(-world.states // 10))
        a, b = a[(b < world.states) & (a != b)], b[(b < world.states) & (a != b)]
    else:
        b = (a + rng.integers(1, world.states, pairs)) % world.states
    one, two = (digits(ending(world.successor_table, states, length, rng)) for states in (a, b))
    cached = {name: ids[:, -1] for name, ids in read(model, two).items()}
    for names in components.values():
        for name in names:
            if name not in cached:
                raise CodebookError(f"no codebook is called {name!r}; there are {', '.join(cached)}")
    target = following(model, two, cached, [])  # one program for all
    plain = divergence(following(model, one, cached, []), target).mean()
    patched = {what: following(model, one, cached, names) for what, names in components.items()}
    return {what: float(divergence(found, target).mean() / plain) for what, found in patched.items()}
