"""What a subnetwork predicts, beside the whole model, chance and the bigram table: surprisals and their correlation."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tinylm import show
from tinylm.data import DataError, Tokens, Windows, check_tokens
from tinylm.model import Transformer
from tinylm.probe.bigrams import Bigrams
from tinylm.probe.subnetworks import Subnetwork, masked, scores_of
from tinylm.weights import bind

RESAMPLES = 1000


@dataclasses.dataclass(frozen=True)
class Row:
    """One model's figures over the same tokens.

    Attributes:
        bits, sd: mean and standard deviation of its surprisal, bits per token.
        r: Pearson correlation of its surprisals with the bigrams', where those are finite (the paper's `dropinf`).
        r_ci95: of r, windows resampled.
        r_all: the same with infinite ones set to the largest finite one.
        soft: soft cross-entropy to the bigram shares, bits per token; the bigrams' own entropy is the least.
    """

    bits: float
    sd: float
    r: float
    r_ci95: tuple[float, float]
    r_all: float
    soft: float


@dataclasses.dataclass(frozen=True)
class Report:
    """What a subnetwork does, beside its controls.

    Attributes:
        rows: "full", "subnetwork", "random", "complement", "without random" -> `Row`.
        share, kept: of the maskable weights. first_mlp: share of the kept ones that lie in the first MLP;
            first_mlp_of_all: what that holds of all maskable ones.
        seen: share of the tokens whose bigram was counted.
    """

    rows: Mapping[str, Row]
    share: float
    kept: int
    first_mlp: float
    first_mlp_of_all: float
    seen: float

    def table(self) -> show.Picture:
        """To look at."""
        names = ["model", "bits per token", "sd", "r to bigrams", "95% interval", "soft CE"]
        rows = [
            [name, f"{r.bits:.3f}", f"{r.sd:.2f}", f"{r.r:.3f}", f"{r.r_ci95[0]:.3f} to {r.r_ci95[1]:.3f}",
             f"{r.soft:.3f}"] for name, r in self.rows.items()
        ]  # fmt: skip
        title = f"{self.kept:,} weights kept, {self.share:.2%}; {self.first_mlp:.0%} of them in the first MLP"
        return show.table(rows, names, f"{title}, which holds {self.first_mlp_of_all:.0%} of all")

    def __repr__(self) -> str:
        return self.table().text

    def _repr_html_(self) -> str:
        return self.table().html


@functools.lru_cache(maxsize=8)
def _scores(graph: Any) -> Any:
    def run(params, tokens, targets, rows):
        logp = jax.nn.log_softmax(bind(graph, params)(tokens).astype(jnp.float32))
        own = jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0]
        return -own / jnp.log(2.0), -jnp.sum(rows * logp, axis=-1) / jnp.log(2.0)

    return jax.jit(run)


def measure(
    model: Transformer,
    part: Subnetwork,
    bigrams: Bigrams,
    held_out: Tokens,
    *,
    windows: int = 200,
    length: int = 128,
    batch: int = 20,
    seed: int = 0,
) -> Report:
    """Surprisals of five models over the same held-out windows (Chang and Bergen 2025, section 4).

    full; subnetwork; random: as many weights of every matrix at random; complement: full minus subnetwork; without
    random: full minus random. `windows` is cut to what there are.

    Raises DataError: masks of another model, bigrams or texts of another vocabulary, or nothing to read.
    """
    if bigrams.vocab != model.config.vocab:
        raise DataError(f"the bigrams know {bigrams.vocab} ids, the model {model.config.vocab}: count with vocab=...")
    if windows < 1 or batch < 1:
        raise DataError(f"windows = {windows}, batch = {batch}: read at least one")
    graph, params = masked(model, "binary", part.paths(model))
    source = Windows(held_out, batch=1, length=min(length, model.config.context), seed=seed)
    count = min(windows, source.windows)
    chosen = [source(i) for i in range(count)]
    tokens, targets = (np.concatenate([getattr(b, name) for b in chosen]) for name in ("tokens", "targets"))
    check_tokens(tokens, model.config.vocab, "held_out")
    whole = Subnetwork({path: np.ones_like(mask) for path, mask in part.masks.items()})
    random = part.shuffled(seed)
    every = {"full": whole, "subnetwork": part, "random": random}
    every |= {"complement": part.complement(), "without random": random.complement()}
    soft: dict[str, list] = {name: [] for name in every}
    own: dict[str, list] = {name: [] for name in every}
    run = _scores(graph)
    given = {name: {**params, **scores_of(one, params)} for name, one in every.items()}
    for at in range(0, count, batch):
        here = slice(at, at + batch)
        rows = bigrams.rows(tokens[here])
        for name, values in given.items():
            a, b = run(values, tokens[here], targets[here], rows)
            own[name].append(np.asarray(a, np.float64))
            soft[name].append(np.asarray(b, np.float64))
    key = bigrams.surprisal(tokens, targets)
    seen = np.isfinite(key)
    if not seen.any():
        raise DataError("no pair of the held-out texts was ever counted: are these bigrams of such texts?")
    filled = np.where(seen, key, key[seen].max())
    rows = {}
    for name in every:
        bits = np.concatenate(own[name])
        r, ci95 = correlation(bits, key, seed=seed)
        all_r, _ = correlation(bits, filled, seed=seed)
        rows[name] = Row(
            float(bits.mean()), float(bits.std()), r, ci95, all_r, float(np.concatenate(soft[name]).mean())
        )
    first = r"blocks\.0\.mlp\..*"
    return Report(rows, part.share, part.kept, part.where(first), whole.where(first), float(seen.mean()))


def correlation(x: np.ndarray, y: np.ndarray, *, seed: int = 0) -> tuple[float, tuple[float, float]]:
    """Pearson's r of (windows, positions) arrays where both are finite, and its 95 percent interval over windows."""
    good = np.isfinite(x) & np.isfinite(y)
    x, y = np.where(good, x, 0), np.where(good, y, 0)
    x, y = x - x.sum() / good.sum() * good, y - y.sum() / good.sum() * good  # of the whole, for accuracy only
    sums = np.stack([good.sum(1), x.sum(1), y.sum(1), (x * x).sum(1), (y * y).sum(1), (x * y).sum(1)], axis=1)
    weights = np.random.default_rng(seed).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), RESAMPLES)
    drawn = _pearson(*(weights @ sums).T)
    return float(_pearson(*sums.sum(0))), (float(np.quantile(drawn, 0.025)), float(np.quantile(drawn, 0.975)))


def _pearson(n: Any, x: Any, y: Any, xx: Any, yy: Any, xy: Any) -> Any:
    return (n * xy - x * y) / np.sqrt(np.maximum((n * xx - x * x) * (n * yy - y * y), 1e-300))
