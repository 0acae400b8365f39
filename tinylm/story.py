"""The main job: from nothing to a model that tells stories, measured against all that can be known of them."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tinylm.config import ConfigError, TrainConfig
from tinylm.corpus import LEARN_FROM, WORLD_BYTES
from tinylm.evaluation import baselines, evaluate
from tinylm.generation import stream
from tinylm.live import TerminalView, fit
from tinylm.markup import plain
from tinylm.model import Transformer
from tinylm.presets import count, preset, vocab_for
from tinylm.reading import END
from tinylm.run import require_free
from tinylm.shards import write_tokens
from tinylm.text import clean, deduplicate, documents, sample, split
from tinylm.tokenizer import Tokenizer
from tinylm.training import train
from tinylm.world import World

LEAST = 20.0  # seconds: below this nothing is learned; it takes about a minute to beat the 5-grams
HELD_OUT = 200  # documents that are scored
HELD_STREAM = 2**40  # of the world; seeds of training text are below 2^32
NAMES = {
    "gzip": "gzip -9",
    "xz": "xz -9e",
    "unigram": "unigrams",
    "bigram": "bigrams",
    "kneser_ney_5": "5-grams, Kneser-Ney",
}


def recipe(budget: float) -> dict[str, Any]:
    """What to train in so many seconds on two CPU cores: the sweeps of 2026-11-21 in notebooks/LAB.md."""
    if budget < 600:
        return {"preset": "400K", "shape": {"width": 96, "layers": 2, "heads": 2}, "batch": 2}
    if budget < 3600:
        return {"preset": "1M", "shape": {"heads": 2}, "batch": 4}
    return {"preset": "3M", "shape": {}, "batch": 8}


def story(
    *,
    text: str | None = None,
    separator: str | None = END,
    preset_name: str | None = None,
    budget: float = 120.0,
    out: str | os.PathLike | None = None,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: print(line, flush=True),
    tell: Callable[[str], None] = lambda piece: print(piece, end="", flush=True),
) -> dict[str, Any]:
    """Make a corpus, train a tokenizer and a model on it, score it, and let it tell a story.

    Args:
        text: a source for `documents`; None is the embedded world, whose entropy is known.
        separator: stands between the documents of a text file.
        preset_name: of the model; None picks a size for the budget.
        budget: seconds for all of it.
        out: folder of the run; None is runs/story, or the first free runs/story-2, ...
        seed: of the model and its story. say: takes a line. tell: takes a piece of the story.

    Returns:
        The figures, for json: folder, bits_per_byte, ci95, floor, excess, baselines, story, parameters, ...

    Raises:
        ConfigError: the budget or the text is too small. FileExistsError: `out` holds something.
    """
    begun = time.perf_counter()
    left = lambda: budget - (time.perf_counter() - begun)  # noqa: E731
    if budget < LEAST:
        raise ConfigError(f"a budget of {budget:.0f} s is too short to learn anything; give at least {LEAST:.0f}s")
    folder = free_folder() if out is None else Path(out)
    require_free(folder)
    if not 0 <= seed < 2**32:
        raise ConfigError(f"seed = {seed}: must be a whole number from 0 to 2^32 - 1")
    plan = recipe(budget)
    name, shape = (preset_name, {}) if preset_name else (plan["preset"], plan["shape"])

    if text is None:
        world = World()
        docs = world.corpus(min(WORLD_BYTES, int(50_000 * budget)), seed=seed)
        held = list(world.texts(HELD_OUT, seed=HELD_STREAM))
        floor = world.floor(held).bits_per_byte
        kind = f"{len(docs):,} stories of the embedded world; no model can beat {floor:.3f} bits per byte"
    else:
        docs, whole = read_some(documents(text, separator=separator), int(50_000 * budget))
        docs, report = deduplicate(docs)
        docs, held = split(docs) if len(docs) > 1 else (docs, [])
        held, overlap = clean(held, docs)
        held, _ = read_some(held[:HELD_OUT], int(2_000 * budget))
        floor = None
        if len(held) < 2 or not docs:
            raise ConfigError(
                f"{text} gives {len(docs)} training and {len(held)} held-out documents after cleaning, which is too "
                r"few; give more text, or say what separates its documents (--separator '\n\n' for paragraphs)"
            )
        removed = report.exact + report.near + len(overlap.flagged)
        part = "" if whole else " (its beginning: there is no time for more)"
        kind = f"{len(docs):,} documents of {text}{part}; {removed:,} duplicates and overlaps removed"
    size = sum(len(d.encode()) for d in docs)
    say(f"text       {size / 1e6:.1f} MB, {kind}")

    tokenizer = Tokenizer.train(sample(docs, LEARN_FROM), vocab=vocab_for(name))
    config = preset(name, **{"context": 256, **shape, "vocab": tokenizer.vocab})
    tokens = write_tokens(docs, tokenizer, folder / "data", split="train")
    valid = write_tokens(held, tokenizer, folder / "data", split="valid")
    known = f"vocabulary {tokenizer.vocab:,}, {valid.bytes_per_token:.2f} bytes per token"
    say(f"tokens     {known}, {len(tokens):,} to train on")
    others = baselines(docs, held, tokenizer, names=list(NAMES))

    model = Transformer(config, rngs=seed, tokenizer=tokenizer)
    say(f"model      {count(config):,} parameters: {config.layers} layers of width {config.width}")
    finish = 8.0 + 0.05 * budget  # scoring, the story, and compiling both
    settings = TrainConfig(
        budget=max(5.0, left() - finish), batch=plan["batch"], seed=seed, log_every=20, eval_every=200, eval_batches=16
    )
    trainer = train(model, tokens, settings, valid=valid, out=folder)
    fit(trainer, floor=floor, view=TerminalView(sys.stderr), sample_every=0).run()

    if trainer.signal not in (0, signal.SIGINT):  # a request to end; Ctrl-C only ends the training
        raise SystemExit(128 + trainer.signal)
    found = evaluate(model, held)
    say(f"\nbits per byte of {found.documents} held-out documents, lower is better")
    table = {NAMES[key]: value for key, value in others.items()}
    table["this model"] = found.bits_per_byte
    if floor is not None:
        table["the floor"] = floor
    for label, value in sorted(table.items(), key=lambda item: -item[1]):
        extra = f"   ({found.ci95[0]:.3f} to {found.ci95[1]:.3f})" if label == "this model" and found.ci95 else ""
        say(f"  {label:<20} {value:6.3f}  {'█' * round(36 * value / max(table.values()))}{extra}")

    if floor is not None:
        say(f"this model spends {found.bits_per_byte - floor:.3f} bits per byte more than it must")
    say("\na story it tells:\n")
    told = []
    for piece in stream(model, "", tokens=400, temperature=0.7, min_p=0.05, seed=seed):
        told.append(piece)
        tell(plain(piece))
    seen, spent = trainer.step * trainer.tokens_per_step, trainer.seconds
    say(
        f"\n\n{seen:,} tokens in {spent:.0f} s of training; everything is in {folder}\n"
        f"more stories    tinylm generate {folder} --temperature 0.7 --seed 1\n"
        f"go on training  tinylm resume {folder} --budget {spent + 300:.0f}s\n"
        f"a page about it tinylm report {folder}\n"
        "your own text   tinylm story --text FILE\n"
        "look inside     pip install jupyterlab && jupyter lab notebooks/01_train_a_storyteller.ipynb"
    )
    return {
        "folder": str(folder),
        "bits_per_byte": found.bits_per_byte,
        "ci95": found.ci95,
        "floor": floor,
        "excess": None if floor is None else found.bits_per_byte - floor,
        "baselines": others,
        "story": "".join(told),
        "parameters": count(config),
        "tokens": seen,
        "seconds": time.perf_counter() - begun,
        "outcome": trainer.outcome,
    }


def free_folder() -> Path:
    """runs/story, or the first of runs/story-2, runs/story-3, ... where a run can begin."""
    for name in itertools.chain(["story"], (f"story-{i}" for i in itertools.count(2))):
        try:
            require_free(Path("runs") / name)
        except FileExistsError:
            continue
        return Path("runs") / name
    raise AssertionError("the numbers do not end")


def read_some(docs: Iterable[str], size: int) -> tuple[list[str], bool]:
    """The first documents, up to about `size` bytes but at least two, and whether that is all of them."""
    some, held = [], 0
    for text in docs:
        if held >= size and len(some) > 1:
            return some, False
        some.append(text)
        held += len(text.encode())
    return some, True
