"""`tinylm evaluate DIR --suite`: the suite from a terminal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tinylm.checkpoint import load
from tinylm.suite import evaluate_suite
from tinylm.text import documents

__all__ = ["suite_command"]


def suite_command(args: Any, say: Callable[[str], Any]) -> tuple[dict[str, Any], str]:
    """(figures for json, text) of the tasks that the options ask for.

    Args:
        args: with `folder`, `suite` (task names joined by commas, or "all"), `text`, `train`, `pairs`, `cloze`
            (sources, or None; the text "world" is the embedded world), `separator`, `limit`, `seed`.
        say: told each task's name.

    Raises EvaluationError, TextError, GenerateError, OSError.
    """
    names = [] if args.suite in ("", "all") else [name.strip() for name in args.suite.split(",")]
    read = lambda source: None if source in (None, "world") else documents(source, separator=args.separator)  # noqa: E731
    found = evaluate_suite(
        load(args.folder), names, pairs=args.pairs, clozes=args.cloze, text=read(args.text), train=read(args.train),
        limit=args.limit, seed=args.seed, progress=lambda task: say(f"{task} ..."),
    )  # fmt: skip
    return found.to_dict(), repr(found)
