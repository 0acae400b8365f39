"""One page about a run: what was trained on what, how it went, how good it is beside its controls, what it costs.

Everything on it is read from the run folder or measured when the page is made. It needs no other file and runs no
script, so it can be mailed, archived, or put beside a paper.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from tinylm import show
from tinylm.checkpoint import load
from tinylm.config import ConfigError, ModelConfig, TrainConfig
from tinylm.corpus import opened
from tinylm.evaluation import Evaluation, compare, evaluate, evaluate_floor, evaluation
from tinylm.generation import generate
from tinylm.markup import FAINT, Markup, Picture, framed, tag
from tinylm.model import Transformer
from tinylm.presets import count
from tinylm.resuming import logged, reopen
from tinylm.run import Run
from tinylm.shards import DataError, Tokens
from tinylm.store import StateMismatch
from tinylm.story import HELD_OUT, NAMES, read_some
from tinylm.text import documents
from tinylm.tokenizer import Tokenizer
from tinylm.world import World
from tinylm.yardsticks import NGRAMS, EvaluationError, KneserNey, baselines, frame

HELD_BYTES, LEARNED = 2**19, 2**23  # bytes of text that are scored, and that the n-grams learn from
SHAPE = ("kind", "vocab", "context", "width", "layers", "heads", "batch", "seed")  # said even where they are usual


@dataclasses.dataclass(frozen=True, repr=False)
class Report(Picture):
    """The page as a picture; its `figures` for json, the `path` of the file."""

    figures: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    path: Path | None = None


def report(
    run: Any,
    path: str | os.PathLike | None = None,
    *,
    text: str | os.PathLike | Iterable[str] | None = None,
    prompts: Sequence[str] = ("", "", ""),
    extra: Mapping[str, Picture] | None = None,
    seed: int = 0,
) -> Report:
    """Write one HTML page about a run and return it: a notebook shows it, `.figures` has its numbers.

    Args:
        run: the folder of a run, or what `train`, `fit` or `resume` gave for one. It may still be training.
        path: of the page; None is report.html in the run's folder. One that is there is replaced.
        text: what to score, as for `evaluate`; None is the run's own held-out text, if its token shards are there.
        prompts: how the samples begin. extra: further pictures, by the title they stand under.
        seed: of samples and intervals.

    Raises:
        FileNotFoundError: no run, or none that has saved anything. ConfigError: `run` has no folder, or `path` does
            not end in .html. EvaluationError, TextError: `text` cannot be scored. OSError: the page cannot be written.
    """
    folder = _folder(run)
    target = folder / "report.html" if path is None else Path(path)
    if target.suffix.lower() != ".html":
        raise ConfigError(f"path = {os.fspath(target)!r}: a report is a page, give a name that ends in .html")
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if type(seed) is not int or not 0 <= seed < 2**32 - len(prompts):
        raise ConfigError(f"seed = {seed!r}: must be a whole number from 0 to 2^32 - 1")
    for title, picture in (extra or {}).items():
        if not isinstance(picture, Picture):
            raise ConfigError(f"extra = {{{title!r}: {picture!r:.40}}}: give pictures of the kit")
    kept = Run.open(folder)
    step, _, _, notes = kept.restore()
    model = load(kept.path(step))
    (train, no_train), (valid, no_valid) = (_split(kept, name) for name in ("train", "valid"))
    past = _past(kept, model, step, train, valid)
    scores = _scores(model, train, valid, text, seed)
    sections = {"How it went": show.run_summary(past, floor=scores.floor, baselines=scores.controls, notes=notes)}
    sections |= scores.pictures
    if model.config.kind == "decoder" and model.tokenizer is not None:
        sections["What it writes"] = _samples(model, prompts, seed)
    sections["Where its parameters are"] = show.sizes(model.config)
    sections["What it read"] = _data(
        kept, model, {"train": no_train if train is None else train, "valid": no_valid if valid is None else valid}
    )
    sections["How it was made"] = _settings(kept)
    for title, picture in (extra or {}).items():
        if title in sections:
            raise ConfigError(f"extra has {title!r}, which the page has already: give it a title of its own")
        sections[title] = picture
    lead = f"{model.config.kind}, {count(model.config):,} parameters, step {step:,}"
    name = folder.absolute().name
    inside = framed(lead, *(tag("div", tag("h2", title), Markup(part.html)) for title, part in sections.items()))
    words = "\n\n".join([f"{name}: {lead}", *(f"{title}\n{part.text}" for title, part in sections.items())])
    figures = {"folder": str(folder), "step": step, "parameters": count(model.config), **scores.figures}
    page = Report(inside, words, sections["How it went"].numbers, figures, target)
    page.save(target, title=name)
    return page


# --- what a run folder knows ------------------------------------------------------------------------------------------


def _folder(run: Any) -> Path:
    """Where a run lies, from its path, its `Run` or its trainer."""
    if isinstance(run, str | os.PathLike):
        return Path(run)
    kept = run if isinstance(run, Run) else getattr(run, "run", None)
    if not isinstance(kept, Run):
        raise ConfigError(f"run = {run!r:.80}: a report is about a run folder; train with out=FOLDER, or give its path")
    return kept.folder


def _split(kept: Run, name: str) -> tuple[Tokens | None, str]:
    """The tokens of a split; or None, and why they cannot be had."""
    try:
        found = reopen(None, kept.data.get(name), kept.folder, name, needed=False)
    except (DataError, StateMismatch) as error:
        return None, str(error)
    return found, "" if found is not None else "made in memory" if kept.data.get(name) else "none"


def _past(kept: Run, model: Transformer, step: int, train: Tokens | None, valid: Tokens | None) -> Any:
    """What `show` asks of a trainer, from the folder of one."""
    history = [record for record in logged(kept) if record.step <= step]
    last = history[-1] if history else None
    per_step = round(last.tokens / last.step) if last else 0
    rule, steps = kept.train, kept.train.steps or (-(-kept.train.tokens // per_step) if per_step else 0)
    progress = step / steps if steps else last.seconds / rule.budget if last and rule.budget else 0.0
    return SimpleNamespace(
        model=model, config=rule, history=history, losses=[], step=step, steps=steps, tokens_per_step=per_step,
        batches=SimpleNamespace(tokens=train), valid_bytes=valid.bytes_per_prediction if valid else None,
        progress=progress, outcome="done" if progress >= 1 else "stopped", elapsed=last.seconds if last else 0.0,
    )  # fmt: skip


def texts_of(tokens: Tokens, tokenizer: Tokenizer, limit: int) -> list[str]:
    """The first documents of a split as they were before they became tokens, about `limit` bytes of them."""
    ids = tokens[: int(1.2 * limit / max(1e-9, tokens.bytes_per_token)) + 1]
    pieces = np.split(ids, np.flatnonzero(ids == tokens.end))
    whole = pieces if len(ids) == len(tokens) else pieces[:-1]
    raw = (tokenizer.decode_bytes(piece).removeprefix(tokenizer.prefix) for piece in whole)
    return [text.decode("utf-8", "replace") for text in raw if text]


# --- the sections -----------------------------------------------------------------------------------------------------


class Scores(NamedTuple):
    """What scoring found: for json, for the chart of the curves, and to look at."""

    figures: dict[str, Any]
    controls: dict[str, float]
    floor: float | None
    pictures: dict[str, Picture]


def _scores(model: Transformer, train: Tokens | None, valid: Tokens | None, text: Any, seed: int) -> Scores:
    """Bits per byte beside what is simpler and learned from the same text, and beside what no model can beat."""
    tokenizer = model.tokenizer
    if model.config.kind != "decoder" or tokenizer is None:
        return Scores({}, {}, None, {})
    held = texts_of(valid, tokenizer, HELD_BYTES) if text is None and valid is not None else []
    held, _ = read_some(held if text is None else documents(text), HELD_BYTES)
    held = held[:HELD_OUT]
    if text is not None and not any(held):
        raise EvaluationError("text: there is nothing in it to score")
    if not held:
        return Scores({}, {}, None, {})
    own = evaluate(model, held, seed=seed)
    learned = texts_of(train, tokenizer, LEARNED) if train is not None else []
    others = controls(learned, held, tokenizer, seed)
    rows: list[list[Any]] = [["this model", own.bits_per_byte, span(own.ci95)]]
    figures = {"evaluation": own.to_dict(), "controls": {}}
    for name, other in others.items():
        if not isinstance(other, Evaluation):
            rows.append([name, other, "", f"{other - own.bits_per_byte:+.3f}", ""])
            figures["controls"][name] = {"bits_per_byte": other}
            continue
        gap = compare(other, own, seed=seed)
        rows.append([name, other.bits_per_byte, span(other.ci95), f"{gap.bits_per_byte:+.3f}", span(gap.ci95)])
        figures["controls"][name] = {**other.to_dict(), "above_this_model": dataclasses.asdict(gap)}
    values = {str(row[0]): float(row[1]) for row in rows}
    floor = values.pop("the floor", None)
    sizes = f"{own.documents:,} document{'s' * (own.documents > 1)}, {own.bytes:,} bytes"
    seen = f"; n-grams learned from {sum(len(t.encode()) for t in learned) / 1e6:.1f} MB" if learned else ""
    bars = show.bars(values, unit=f"bits per byte of {sizes}{seen}", strong=["this model"], floor=floor)
    header = ["", "bits per byte", "95 % interval", "above this model", "95 % interval"]
    note = tag("div", "Intervals are over documents. Another training seed would move the figures too: train several.",
               style=FAINT)  # fmt: skip
    table = show.table(rows, header)
    both = Picture(framed(Markup(bars.html), Markup(table.html), note), f"{bars.text}\n{table.text}", table.numbers)
    drawn = {name: values[name] for name in ("bigrams", "5-grams, Kneser-Ney") if name in values}
    return Scores(figures, drawn, floor, {"How good it is": both})


def controls(
    learned: Sequence[str], held: Sequence[str], tokenizer: Tokenizer, seed: int
) -> dict[str, Evaluation | float]:
    """Scores of the same texts by compressors, n-grams, and, if the embedded world wrote them, by their own law."""
    found: dict[str, Evaluation | float] = {}
    for name, value in baselines([], held, tokenizer, names=["gzip", "xz"]).items():
        found[NAMES[name]] = value
    if learned:
        known, scored = frame(learned, tokenizer)[0], frame(held, tokenizer)[0]
        for name, order in NGRAMS.items():
            found[NAMES[name]] = evaluation(held, KneserNey(known, tokenizer.vocab, order).bits(scored), seed=seed)
    with contextlib.suppress(EvaluationError, ValueError):  # a text of somebody else's has no floor that is known
        found["the floor"] = evaluate_floor(World(), held, seed=seed)
    return found


def span(interval: tuple[float, float] | None) -> str:
    """An interval to read."""
    return "" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"


def _samples(model: Transformer, prompts: Sequence[str], seed: int) -> Picture:
    """What it writes, unchosen: one text per prompt, of neighbouring seeds."""
    told = []
    for i, prompt in enumerate(prompts):
        text = generate(model, prompt, tokens=256, temperature=0.8, min_p=0.05, seed=seed + i)
        told.append(show.sample(text, f"seed {seed + i}, temperature 0.8, min-p 0.05", prompt=prompt))
    return Picture(framed(*(Markup(one.html) for one in told)), "\n\n".join(one.text for one in told))


def _data(kept: Run, model: Transformer, splits: Mapping[str, Tokens | str]) -> Picture:
    """Where the text came from, and its hashes; or why it cannot be had."""
    rows: list[list[Any]] = []
    for name, tokens in splits.items():
        if isinstance(tokens, str):
            rows.append([name, tokens])
        else:
            counts = f"{tokens.documents:,} documents, {tokens.bytes:,} bytes, {len(tokens):,} tokens"
            rows += [[name, counts], [f"{name} sha256", tokens.sha256]]
    train = splits["train"]
    if isinstance(train, Tokens) and train.folder is not None and (train.folder / "provenance.json").is_file():
        rows += [["source", source] for source in opened(train.folder).about.get("wish", {}).get("sources", [])]
    if (tokenizer := model.tokenizer) is not None:
        rows += [["tokenizer", f"{tokenizer.vocab:,} tokens"], ["tokenizer sha256", tokenizer.sha256]]
    return show.table(rows)


def _settings(kept: Run) -> Picture:
    """The settings that are not the defaults, and what the bits depend on besides."""
    usual = {**ModelConfig().to_dict(), **TrainConfig(steps=1).to_dict()}
    parts: dict[str, dict[str, Any]] = {"model": kept.model.to_dict(), "training": kept.train.to_dict()}
    rows = []
    for name, settings in parts.items():
        chosen = [f"{key} = {value}" for key, value in settings.items() if key in SHAPE or value != usual[key]]
        rows.append([name, ", ".join(chosen)])
    rows.append(["made with", ", ".join(f"{name} {value}" for name, value in kept.made_with.items())])
    return show.table(rows)
