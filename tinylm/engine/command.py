"""`tinylm run`, with as little as possible between the start of the process and the first token.

A command line that is plain goes straight to the engine. All others (help, errors, other spellings) are argparse's,
whose import takes longer than opening a small model; so nothing here may import more than it needs.
"""

from __future__ import annotations

import os
import sys
import warnings

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

# Options of `tinylm run` that one value follows, and how it is read. `cli` has them with their help, and some more.
PLAIN = {
    "prompt": str,
    "tokens": int,
    "seed": int,
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
    "threads": int,
    "speculate": int,
    "cache": str,
    "kernels": str,
    "draft": str,
}
OPENING = ("threads", "cache", "screen", "speculate", "kernels", "draft")  # of `Engine`; the others are `stream`'s


def say(text: str = "") -> None:
    """A line for people, on stderr, so that stdout holds results only."""
    print(text, file=sys.stderr, flush=True)


def guarded(job: Callable, *args: Any, **named: Any) -> None:
    """Call it as a command: an error is one line and exit status 1, Ctrl-C 130, a closed pipe 141."""
    warnings.showwarning = lambda message, *_, **__: say(f"tinylm: {message}")
    try:
        job(*args, **named)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        if os.environ.get("TINYLM_DEBUG"):
            raise
        if isinstance(error, BrokenPipeError):  # the reader of our output, such as head, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(141) from None
        say(f"tinylm: {error}")
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        say("interrupted")
        raise SystemExit(130) from None


def plainly(words: Sequence[str]) -> dict[str, Any] | None:
    """The arguments of `run` that a command line stands for, or None where argparse should look at it."""
    found: dict[str, Any] = {}
    at = 0
    while at < len(words):
        word = words[at]
        name = word[2:].replace("-", "_") if word.startswith("--") and "_" not in word else None
        if name in PLAIN and name not in found and at + 1 < len(words) and not words[at + 1].startswith("-"):
            try:
                found[name] = PLAIN[name](words[at + 1])
            except ValueError:
                return None
            at += 2
        elif not word.startswith("-") and ("path" not in found or "prompt" not in found):
            found["prompt" if "path" in found else "path"] = word
            at += 1
        else:
            return None
    return found if "path" in found else None


def run(path: str, prompt: str = "", **settings: Any) -> None:
    """Continue a text with the engine and print it as it is made; `settings` are `Engine`'s and `Engine.stream`'s."""
    from tinylm.engine import Engine

    engine = Engine(path, **{name: settings.pop(name) for name in OPENING if name in settings})
    pieces = engine.stream(prompt, **settings)
    begun = next(pieces, "")  # what is wrong with the arguments shows here, before anything is printed
    try:
        print(plain(prompt + begun), end="", flush=True)
        for piece in pieces:
            print(plain(piece), end="", flush=True)
    finally:
        print()


def plain(text: str) -> str:
    """`markup.plain`, which is only loaded for text that holds more than letters and line ends."""
    if text.replace("\n", "").replace("\t", "").isprintable():
        return text
    from tinylm.markup import plain

    return plain(text)


def quick(words: Sequence[str]) -> bool:
    """Run `tinylm run` with these arguments if they are plain; False where they are not."""
    settings = plainly(words)
    if settings is not None:
        guarded(run, **settings)
    return settings is not None
