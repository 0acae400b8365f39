"""Fine-tuning: a pretrained model gets a classifier's head and learns a set; many of them as one program.

It is training like any other (`objective="classes"`): batches are a function of (seed, step), members of a population
take their steps together, and run folders, checkpoints and interrupts are those of `train`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tinylm.classification.metrics import Classified, classified, confusion_matrix, macro_f1
from tinylm.classification.scoring import encoded, filler, run, scores, settle
from tinylm.classification.sets import Dataset, SetError, rows_of
from tinylm.config import ModelConfig, TrainConfig
from tinylm.data import Labelled, Masked, Rows, Tokens
from tinylm.model import Transformer
from tinylm.population import Population, train_many
from tinylm.training import Trainer, train
from tinylm.weights import assign, named, pure

__all__ = [
    "Epoch", "Finetuned", "classify", "classify_many", "faithful", "fixed", "masked_texts", "parameters_like",
    "snapshots", "with_classes",
]  # fmt: skip

DEFAULTS: dict[str, Any] = {
    "batch": 32, "optimizer": "adamw", "learning_rate": 5e-4, "schedule": "linear", "final": 0.0, "beta2": 0.999,
    "weight_decay": 0.01,
}  # fmt: skip
WARMUP = 0.06  # share of the steps (RoBERTa, Liu et al. 2019)


class Epoch(NamedTuple):
    """One pass over the texts: mean training loss in nats, and accuracy, macro-F1 and loss on the validation texts."""

    epoch: int
    loss: float
    valid_loss: float | None = None
    valid_accuracy: float | None = None
    valid_f1: float | None = None


@dataclasses.dataclass(eq=False)
class Finetuned:
    """A classifier and how it came about.

    Attributes:
        model: a `Transformer` with a "classes" head, its weights those of the best epoch. names: of the classes.
        history: every epoch. best: the epoch whose weights were kept, from 1. seconds: of training and validation.
    """

    model: Transformer
    names: tuple[str, ...]
    history: list[Epoch]
    best: int
    seconds: float

    def evaluate(self, dataset: Dataset, *, seed: int = 0) -> Classified:
        """Accuracy, macro-F1, calibration and confusion on a set, whose classes are matched by name.

        Raises SetError for a class that was not learned.
        """
        dataset = dataset.numbered_as(self.names)
        found = scores(self.model, dataset.texts)
        return classified(found, dataset.labels, dataset.names, texts=dataset.texts, seed=seed)

    def predict(self, texts: Sequence[str]) -> list[str]:
        """The class of each text, by name."""
        return [self.names[i] for i in scores(self.model, texts).argmax(-1)]


def with_classes(
    model: Transformer, classes: int, *, pooling: str | None = None, pooler: bool = True, seed: int = 0
) -> Transformer:
    """A copy of a model with a new classifier in place of its head; everything else keeps its weights.

    Args:
        pooling, pooler: see `ModelConfig`; default "cls" of an encoder and "last" of a decoder.
        seed: of the new head's weights.
    """
    pooling = pooling or ("cls" if model.config.kind == "encoder" else "last")
    config = model.config.replace(head="classes", classes=classes, pooling=pooling, pooler=pooler, softcap=0.0)
    new = Transformer(config, rngs=seed, tokenizer=model.tokenizer)
    values, old = named(new), named(model)
    kept = [name for name in values if name in old and not name.startswith("head.")]
    assign(new, {**values, **{name: jnp.copy(old[name]) for name in kept}})
    return new


def classify(model: Transformer, dataset: Dataset, **settings: Any) -> Finetuned:
    """Fine-tune one model: `classify_many` of a single member, with its arguments."""
    seed = settings.pop("seed", 0)
    return classify_many([model], dataset, seeds=[seed], **settings)[0]


def classify_many(
    models: Sequence[Transformer],
    dataset: Dataset,
    *,
    valid: Dataset | float | None = 0.1,
    epochs: int = 10,
    patience: int = 3,
    score: str = "valid_accuracy",
    balance: bool = False,
    pooling: str | None = None,
    pooler: bool = True,
    length: int = 0,
    seeds: Sequence[int] | None = None,
    split_seed: int = 0,
    out: str | Path | None = None,
    together: bool = True,
    progress: Callable[[list[Epoch]], Any] = lambda newest: None,
    **settings: Any,
) -> list[Finetuned]:
    """Fine-tune models of one shape on a set, together; each ends as it would alone. The models given stay as they are.

    Args:
        models: pretrained or new; a head of another kind is replaced, so is a classifier of other classes or of
            another pooling than the one asked for.
        dataset: to learn. valid: to choose the best epoch by: a set, a share of the texts that is held out
            for it (the same for all members), or None: the last weights are kept.
        epochs: passes over the texts. patience: epochs without a better score after which a member has ended.
        score: "valid_accuracy", "valid_f1" (larger is better) or "valid_loss".
        balance: weigh every text by N / (C count of its class), so that classes count the same in the loss.
        pooling, pooler: see `with_classes`. After masked pretraining take "mean" for an encoder: nothing is ever
            predicted at the first position, so that "cls" starts from a place that attention left idle.
        length: tokens of a row; 0: as many as the longest text needs.
        seeds: of each member's head, order of texts and dropout; default 0, 1, ... split_seed: of what is held out.
        out: a new folder for run folders, as in `train_many`; a single model's run is the folder itself.
        together: as one program, the way for a GPU; false: one after the other, which takes less time on a CPU.
        progress: called after each epoch with the members' newest.
        settings: of `TrainConfig`, on top of AdamW at 5e-4, batch 32, linear to zero, 6 percent warm-up. Small models
            want more: 3e-3 to 1e-2 at width 32 (notebooks/LAB.md, 2026-11-21).

    Raises:
        SetError: a set that does not fit, a setting that follows from other arguments, or a member that diverged in its
            first epoch. ConfigError: settings that do not fit, or models of different shapes.
        TrainingDiverged: a model trained alone.
        KeyboardInterrupt: interrupted; what was learned is in `out`, if that was given.
    """
    _fitting(models, dataset, valid, seeds, settings)
    if score not in ("valid_accuracy", "valid_f1", "valid_loss") or epochs < 1 or patience < 1:
        raise SetError(f"score = {score!r}, epochs = {epochs}, patience = {patience}: a field of Epoch, and at least 1")
    if not together and len(models) > 1:
        given = {k: v for k, v in locals().items() if k not in ("models", "seeds", "out", "settings", "together")}
        places = [None if out is None else Path(out) / f"member-{i:03d}" for i in range(len(models))]
        each = zip(models, range(len(models)) if seeds is None else seeds, places, strict=True)
        return [classify_many([m], seeds=[seed], out=place, **given, **settings)[0] for m, seed, place in each]
    begun = time.perf_counter()
    seeds = list(range(len(models)) if seeds is None else seeds)
    if valid is None or isinstance(valid, Dataset):
        learn, held = dataset, valid
    else:
        learn, held = dataset.split(valid, seed=split_seed)
    classes = len(dataset.names)
    held = None if held is None else held.numbered_as(dataset.names)
    fresh = [
        nnx.clone(model)
        if (model.config.head, model.config.classes) == ("classes", classes) and pooling in (None, model.config.pooling)
        else with_classes(model, classes, pooling=pooling, pooler=pooler, seed=seed)
        for model, seed in zip(models, seeds, strict=True)
    ]
    lead = fresh[0]
    tokens, segments = encoded(lead, learn.texts, length)
    config = _config(epochs, len(learn), tokens.shape[1], settings)
    each = config.steps // epochs
    counts = np.maximum(learn.counts, 1)
    weights = len(learn) / (classes * counts) if balance else None
    rows = [row[:n] for row, n in zip(tokens, segments.sum(1), strict=True)]
    shape = {"batch": config.batch, "length": tokens.shape[1], "pad": filler(lead), "weights": weights}
    sources = [Labelled(rows, learn.labels, seed=seed, **shape) for seed in seeds]
    configs = [config.replace(seed=seed) for seed in seeds]
    running: Trainer | Population
    if len(fresh) == 1:
        running = train(lead, sources[0], configs[0], out=out)
    else:
        running = train_many(fresh, sources, configs, out=out)
    inside = None if held is None else encoded(lead, held.texts, tokens.shape[1])
    members = list(running.members) if isinstance(running, Population) else [running]
    active = lambda: running.members if isinstance(running, Population) else members  # noqa: E731
    kept = [_Kept(score, patience) for _ in members]
    for steps in running:
        for member, step in zip(active(), steps if isinstance(steps, list) else [steps], strict=True):
            if not kept[members.index(member)].over:
                settle(member.model, tokens, segments, batch=config.batch)
                mean = float(np.mean(member.losses[-each:]))
                kept[members.index(member)].epoch = Epoch(step.step // each, mean)
        going = [i for i, k in enumerate(kept) if not k.over and members[i] in active()]
        if inside is not None:
            graph = pure(members[going[0]].model)[0]
            stacked = jax.tree.map(lambda *x: jnp.stack(x), *(named(members[i].model) for i in going))
            found = dict(zip(going, run(graph, stacked, *inside), strict=True))
        for i in going:
            kept[i].see(members[i].model, None if inside is None else found[i], held)
        progress([kept[i].history[-1] for i in going])
        if all(kept[i].over for i, m in enumerate(members) if m in active()):
            running.stop()
    if running.outcome == "interrupted":
        raise KeyboardInterrupt("fine-tuning was interrupted")
    if not all(own.history for own in kept):
        lost = [i for i, own in enumerate(kept) if not own.history]
        raise SetError(f"models {lost} diverged before their first epoch ended: take a lower learning_rate")
    for member, own in zip(members, kept, strict=True):
        if own.weights is not None:
            assign(member.model, own.weights)
    spent = time.perf_counter() - begun
    return [Finetuned(m.model, dataset.names, k.history, k.best, spent) for m, k in zip(members, kept, strict=True)]


def snapshots(
    model: Transformer, dataset: Dataset, *, members: int, epochs: int, seed: int = 0, **settings: Any
) -> list[Finetuned]:
    """A committee for the price of one training (Huang et al. 2017, snapshot ensembles): the learning rate falls to
    zero `members` times, each time from where the last one ended, and every end is a member.

    Args:
        epochs: in all, shared out evenly.
        settings: of `classify`, but for `valid` and `out`; a cosine schedule is usual.

    Raises SetError for fewer epochs than members, or a setting that is not to be had here.
    """
    if wrong := {"valid", "out"} & settings.keys():
        raise SetError(f"{', '.join(sorted(wrong))}: every member is the end of its part of one training, kept nowhere")
    if epochs < members or members < 1:
        raise SetError(f"{members} members and {epochs} epochs: each needs at least one")
    found: list[Finetuned] = []
    for i in range(members):
        more = epochs * (i + 1) // members - epochs * i // members
        found.append(classify(model, dataset, epochs=more, seed=seed + i, valid=None, **settings))
        model = found[-1].model
    return found


def _fitting(models: Sequence[Transformer], dataset: Any, valid: Any, seeds: Any, settings: dict[str, Any]) -> None:
    """Refuse what cannot be meant, before anything is trained."""
    if not isinstance(dataset, Dataset):
        raise SetError(f"a {type(dataset).__name__} is no Dataset: read_set makes one of pairs, files and hub ids")
    if valid is not None and not isinstance(valid, Dataset | float):
        raise SetError(f"valid = {valid!r}: a Dataset, a share of the texts such as 0.1, or None")
    if not len(models) or (seeds is not None and len(seeds) != len(models)):
        raise SetError(f"{len(models)} models and {len(seeds or ())} seeds: give one seed per model")
    own = {"seed": "seeds", "steps": "epochs", "tokens": "epochs", "budget": "epochs", "objective": "", "log_every": ""}
    for name in own.keys() & settings.keys():
        raise SetError(f"{name}: {f'give {own[name]} instead' if own[name] else 'fine-tuning sets it itself'}")


def _config(epochs: int, texts: int, length: int, settings: dict[str, Any]) -> TrainConfig:
    wanted = {**DEFAULTS, **settings}
    each = max(1, texts // min(wanted["batch"], texts))
    wanted["batch"] = min(wanted["batch"], texts)
    steps = epochs * each
    wanted = {"warmup": round(WARMUP * steps), **wanted, "objective": "classes", "steps": steps, "length": length}
    return TrainConfig.from_dict({**wanted, "log_every": each})


class _Kept:
    """The best weights of a member so far, and whether its patience is over."""

    def __init__(self, score: str, patience: int) -> None:
        self.score, self.patience = score, patience
        self.history: list[Epoch] = []
        self.epoch, self.best, self.weights, self.over = Epoch(0, 0.0), 0, None, False
        self._value = -np.inf

    def see(self, model: Transformer, logits: np.ndarray | None, held: Dataset | None) -> None:
        if logits is None or held is None:
            self.history.append(self.epoch)
            self.best = self.epoch.epoch
            return
        labels, classes = held.labels, len(held.names)
        z = logits.astype(np.float64)
        top = z.max(-1, keepdims=True)
        nll = float((np.log(np.exp(z - top).sum(-1)) + top[:, 0] - z[np.arange(len(z)), labels]).mean())
        confusion = confusion_matrix(labels, logits.argmax(-1), classes)
        newest = self.epoch._replace(
            valid_loss=nll, valid_accuracy=float(np.trace(confusion) / len(labels)), valid_f1=float(macro_f1(confusion))
        )
        self.history.append(newest)
        value = getattr(newest, self.score) * (-1 if self.score == "valid_loss" else 1)
        if value > self._value:
            self._value, self.best = value, newest.epoch
            self.weights = {name: jnp.copy(x) for name, x in named(model).items()}
        self.over = newest.epoch - self.best >= self.patience


# --- pretraining on texts ---------------------------------------------------------------------------------------------


def masked_texts(
    model: Transformer, texts: Sequence[str], *, batch: int = 32, length: int = 0, rate: float = 0.15, seed: int = 0
) -> Masked:
    """Masked-language batches over the first tokens of each text, one text per row, as the paper has its articles.

    Give it to `train` or, one per member, to `train_many`, with `objective="mlm"` and `mask_rate=rate`. The head is
    computed on masked positions only. Raises SetError for a model without tokenizer.
    """
    t, length = model.tokenizer, length or model.config.context
    if isinstance(texts, str):
        raise SetError("one text was given where several are needed: put it in a list")
    if t is None or t.mask is None or t.cls is None or t.sep is None or t.end is None:
        raise SetError("masked texts need a model with a tokenizer that has mask, cls, sep and end tokens")
    ids = [row[1:-1][: length - 2] for row in rows_of(texts, t)]
    between = [[t.end]] if t.begin in (None, t.end) else [[t.end], [t.begin]]
    parts = [*between]
    for row in ids:
        parts += [row, *between]
    joined = np.concatenate([np.asarray(part, np.int64) for part in parts])
    tokens = Tokens.from_array(joined, vocab=t.vocab, documents=len(ids), end=t.end, tokenizer=t.sha256)
    pad = filler(model)
    rows = Rows(tokens, batch=batch, length=length, cls=t.cls, sep=t.sep, pad=pad, seed=seed)
    return Masked(rows, rate=rate, mask=t.mask, vocab=t.vocab, keep=[t.cls, t.sep, pad])


def faithful(texts: int, *, epochs: int = 50, tune: bool = False) -> TrainConfig:
    """The run of Tiny language models (Gross et al. 2025, 2.1) to the letter, on so many texts.

    AdamW at 5e-5, weight decay 0.01, batch 32, 50 epochs, no clipping, dropout 0.1 (the presets'), 15 percent masked;
    a linear schedule that moves once per epoch. Their warm-up of one epoch makes the first epoch of pretraining run at
    a rate of zero; here it is the peak divided by the steps of an epoch, since a warm-up starts above zero. What
    differs: float32 and not float16 with a scaled loss; the rate falls to 1/50 of the peak in the last epoch by
    1 - e/50 and not (50 - e)/49.

    Args:
        texts: of the set. epochs: passes. tune: fine-tuning, without warm-up, instead of pretraining.
    """
    each = max(1, texts // 32)
    return TrainConfig(
        steps=epochs * each, batch=32, objective="classes" if tune else "mlm", mask_rate=0.15, optimizer="adamw",
        learning_rate=5e-5, schedule="linear", final=0.0, warmup=0 if tune else each, stairs=each,
        beta2=0.999, weight_decay=0.01, clip=0.0,
    )  # fmt: skip


def fixed(texts: int, *, width: int = 768, epochs: int = 50, tune: bool = False, mask_rate: float = 0.2) -> TrainConfig:
    """The same run with what stands in its way taken out.

    Differs from `faithful`: the rate moves with every step, after a warm-up of 6 percent of them, so that no epoch is
    lost; it is 0.4 / width, half of it for fine-tuning, since narrow models want more (measured at widths 32 and 64:
    notebooks/LAB.md, 2026-11-21; at 768 it is about what was usual); 20 percent masked (15 to 30 are good: Wettig et
    al. 2023); gradients clipped at 1; beta2 of 0.98. Both compute the head on masked positions alone, which changes no
    value. Classify with pooling="mean" after it: see `classify_many`.
    """
    steps = epochs * max(1, texts // 32)
    return faithful(texts, epochs=epochs, tune=tune).replace(
        learning_rate=(0.2 if tune else 0.4) / width,
        mask_rate=mask_rate,
        stairs=0,
        warmup=round(WARMUP * steps),
        clip=1.0,
        beta2=0.98,
    )


def parameters_like(config: ModelConfig, target: int) -> ModelConfig:
    """The shape of `config` as wide as it takes to have about `target` parameters: a committee's size in one model.

    Heads keep their width, so that the width moves in their steps; the nearest shape is given.
    """
    from tinylm.presets import count

    each = config.head_width
    wide = lambda heads: config.replace(  # noqa: E731
        width=heads * each, heads=heads, kv_heads=heads, head_width=each,
        hidden=round(config.hidden / config.width * heads * each),
    )  # fmt: skip
    return min(map(wide, range(1, 257)), key=lambda c: abs(count(c) - target))
