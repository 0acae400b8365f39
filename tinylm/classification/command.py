"""`tinylm classify DIR --data FILE`: fine-tune, or evaluate what is fine-tuned already, from a terminal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tinylm.checkpoint import load
from tinylm.classification.committee import FILE, Committee
from tinylm.classification.finetune import classify_many
from tinylm.classification.sets import SetError, read_set

__all__ = ["classify_command"]


def classify_command(args: Any, say: Callable[[str], Any]) -> tuple[dict[str, Any], str]:
    """(figures for json, text) of one fine-tuning or evaluation.

    A committee's folder, or a model with classes, is evaluated on the data. Any other model learns them, `members`
    times, with seeds from `seed` on; the test set is `test`, or a fifth of the data that is held out; with `out` the
    classifiers are saved there as a committee.

    Args:
        args: with `folder`, `data` (a file, hf:ID or "world"), `test`, `out` (or None), `members`, `epochs`, `batch`,
            `learning_rate`, `pooling`, `balance`, `markers`, `limit`, `seed`.
        say: told each epoch's score.

    Raises SetError, ConfigError, OSError, and what `load` raises.
    """
    data = _set(args.data, args)
    if (Path(args.folder) / FILE).is_file():
        committee = Committee.load(args.folder)
    else:
        model = load(args.folder)
        committee = Committee([model], data.names) if model.config.head == "classes" else None
    if committee is not None:
        found = committee.evaluate(data)
        return {"members": len(committee), **found.to_dict()}, repr(found)
    learn, test = (data, _set(args.test, args, seed=args.seed + 1)) if args.test else data.split(0.2, seed=args.seed)

    def told(newest: list) -> None:
        if newest:
            say(f"epoch {newest[0].epoch}: " + ", ".join(f"{e.valid_accuracy or 0:.3f}" for e in newest))

    tuned = classify_many(
        [model] * args.members, learn, epochs=args.epochs, batch=args.batch, learning_rate=args.learning_rate,
        balance=args.balance, pooling=args.pooling, seeds=range(args.seed, args.seed + args.members), progress=told,
    )  # fmt: skip
    committee = Committee.of(tuned)
    if args.out:
        committee.save(args.out)
    found = committee.evaluate(test)
    alone = [one.evaluate(test)["accuracy"] for one in tuned]
    figures = {"members": len(committee), "alone": alone, "epochs": [t.best for t in tuned], **found.to_dict()}
    text = repr(found)
    if len(alone) > 1:
        text += "\nmembers alone: " + ", ".join(f"{a:.4f}" for a in alone)
    return figures, text + (f"\neverything is in {args.out}" if args.out else "")


def _set(source: str, args: Any, seed: int | None = None) -> Any:
    if source == "world":
        from tinylm.world import World

        return read_set(
            World().classification("topic", classes=4, n=args.limit or 400, seed=args.seed if seed is None else seed)
        )
    if not source:
        raise SetError("give data to learn from or to evaluate on")
    return read_set(source, markers=args.markers, limit=args.limit)
