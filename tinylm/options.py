"""Command line options from the dataclasses of `config`, their help from its docstrings, and how values are typed."""

from __future__ import annotations

import argparse
import dataclasses
import re
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any

from tinylm.config import Config


def duration(text: str) -> float:
    """Seconds: "90", "90s", "20m", "1.5h"."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip().lower())
    if not match or not float(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no length of time; write for example 90s, 20m or 1.5h")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


def amount(text: str) -> int:
    """A whole number: "5000", "5e3", "300K", "10M", "1.5B"."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d{1,2})?)([kmb]?)", text.strip().lower().replace("_", ""))
    number = float(match[1]) * {"": 1, "k": 1e3, "m": 1e6, "b": 1e9}[match[2]] if match else 0.5
    if number % 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number; write for example 5000, 300K or 10M")
    return round(number)


def escaped(text: str) -> str:
    r"""Text as typed, with \n, \t and the like meant as in Python."""
    return text.encode("latin-1", "backslashreplace").decode("unicode_escape")


def matching(text: str) -> tuple[str, str]:
    """ "PATTERN=VALUE"."""
    name, equals, value = text.rpartition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"{text!r}: write a pattern, = and a value, such as '.*down=int8'")
    return name, value


def yes_or_no(text: str) -> bool:
    """ "true" or "false"."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r}: write true or false")
    return text.lower() == "true"


def attribute_help(cls: type) -> dict[str, str]:
    """Attribute -> its line of the class docstring's list of attributes."""
    listed = (cls.__doc__ or "").partition("Attributes:")[2]
    return {name: " ".join(text.split()) for name, text in re.findall(r"^ {8}(\w+): (.+(?:\n {9,}.+)*)", listed, re.M)}


def add_options(parser: argparse.ArgumentParser, cls: type[Config], title: str, skip: Sequence[str] = ()) -> None:
    """One option per field of a config dataclass; an option that is not given leaves no trace in the namespace."""
    group, help_of = parser.add_argument_group(title), attribute_help(cls)
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if field.name in skip:
            continue
        kind = typing.get_type_hints(cls)[field.name]
        if any(isinstance(k, type) and issubclass(k, Config) for k in typing.get_args(kind)):
            continue  # a list of settings of their own, such as a model's edits
        options: dict[str, Any] = {"type": scalar(kind), "metavar": "X"}
        if typing.get_origin(kind) is typing.Literal:
            options = {"choices": typing.get_args(kind)}
            if len(options["choices"]) > 6:
                options["metavar"] = "NAME"
        elif tuple in {typing.get_origin(k) for k in typing.get_args(kind)}:  # one value, or one per layer in turn
            options = {"type": scalar(typing.get_args(kind)[0]), "nargs": "+", "metavar": "X"}
        elif typing.get_origin(kind) is tuple:
            options = {"type": str, "nargs": "+", "metavar": "X"}
        if field.name == "budget":
            options = {"type": duration, "metavar": "TIME"}
        shown = "" if field.default in (None, 0, 0.0) else f" (default {field.default})"
        named = f": {', '.join(options['choices'])}" if options.get("metavar") == "NAME" else ""
        text = help_of[field.name].rstrip(".").replace("%", "%%") + named + shown
        group.add_argument(f"--{field.name.replace('_', '-')}", default=argparse.SUPPRESS, help=text, **options)


def scalar(kind: Any) -> Callable[[str], Any]:
    """The function that reads one value of a field's type."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        kind = typing.get_args(kind)[0]
    return {int: amount, float: float, bool: yes_or_no}.get(kind, str)


def chosen(args: argparse.Namespace, cls: type[Config]) -> dict[str, Any]:
    """The fields of `cls` that were given on the command line."""
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(cls) if hasattr(args, f.name)}  # type: ignore[arg-type]
    return {k: (v[0] if len(v) == 1 else tuple(v)) if isinstance(v, list) else v for k, v in given.items()}
