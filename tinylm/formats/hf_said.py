"""A config.json of Hugging Face's, asked for what changes the maths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LARGEST = 2**31 - 1


class Said:
    """A config.json, asked for everything that changes the maths.

    Each question checks type and range and gives a harmless value where they are wrong; `problems` gathers what is.

    Attributes:
        raw: the object of the file.
        problems: one line each, with name and value.
        absent: endings of our names whose tensors the file leaves out, because they are zero.
    """

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw, self.problems, self.absent = raw, list[str](), set[str]()

    def get(self, *names: str) -> tuple[str, Any]:
        """The first of these names that is there and not null, and its value; else the first name and None."""
        return next(((name, self.raw[name]) for name in names if self.raw.get(name) is not None), (names[0], None))

    def wrong(self, name: str, value: Any, what: str) -> None:
        """Note a problem."""
        text = repr(value)
        self.problems.append(f"{name} = {text if len(text) <= 80 else text[:77] + '...'}: {what}")

    def whole(self, *names: str, default: int | None = None, most: int = LARGEST) -> int:
        """A whole number from 1 to `most`."""
        name, value = self.get(*names)
        if value is None and default is not None:
            return default
        if type(value) is not int or not 1 <= value <= most:
            self.wrong(name, value, f"must be a whole number from 1 to {most}")
            return 1
        return value

    def number(self, *names: str, default: float, zero: bool = False) -> float:
        """A finite number above 0, or from 0 on with `zero`."""
        name, value = self.get(*names)
        if value is None:
            return default
        ok = type(value) in (int, float) and abs(value) < 1e38 and (value > 0 or (zero and value == 0))
        if not ok:
            self.wrong(name, value, f"must be a number {'of at least' if zero else 'above'} 0")
        return float(value) if ok else default

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.raw.get(name)
        if value is not None and type(value) is not bool:
            self.wrong(name, value, "must be true or false")
        return value if type(value) is bool else default

    def among(self, name: str, known: Mapping[str, str], default: str) -> str:
        """What a name stands for here."""
        value = self.raw.get(name, default)
        if type(value) is not str or value not in known:
            self.wrong(name, value, f"the kit knows {', '.join(known)}")
            return known[default]
        return known[value]

    def refuse(self, name: str, *neutral: Any) -> None:
        """The kit cannot say this setting; only these values, and null, change nothing."""
        value = self.raw.get(name)
        if value is not None and not any(type(value) is type(n) and value == n for n in neutral):
            self.wrong(name, value, "the kit's model has nothing like it")

    def dropout(self, *names: str) -> float:
        """One share for the places we have, where theirs are the same. It acts in training only."""
        shares = {
            self.number(name, default=0.1 if "pdrop" in name or "prob" in name else 0.0, zero=True) for name in names
        }
        share = shares.pop()
        return share if not shares and share < 1 else 0.0

    def rope(self, head_width: int, *, partial: float | None = None) -> dict[str, Any]:
        """theta and rotary.

        `partial`: the share of each head that rotates by default; None: here all of it must.
        Old files have rope_theta (rotary_emb_base), rope_scaling and rotary_pct, new ones all of it in rope_parameters.
        """
        name, inner = self.get("rope_scaling", "rope_parameters")
        if inner is not None and type(inner) is not dict:
            self.wrong(name, inner, "must be an object")
        inner = Said(inner if type(inner) is dict else {})
        kind = inner.raw.get("rope_type", inner.raw.get("type"))
        if kind not in (None, "default"):
            self.wrong(f"{name}.rope_type", kind, 'the kit knows only "default", unscaled rotary positions')
        if any(type(value) is dict for value in inner.raw.values()):
            self.wrong(name, inner.raw, "the kit has one rotation for all layers")
        outer = self.number("rope_theta", "rotary_emb_base", default=10_000.0)
        theta = inner.number("rope_theta", default=outer)
        share = inner.number(
            "partial_rotary_factor",
            default=self.number("partial_rotary_factor", "rotary_pct", default=1.0 if partial is None else partial),
        )
        self.problems += [f"{name}.{problem}" for problem in inner.problems]
        if share > 1 or (partial is None and share != 1):
            self.wrong("partial_rotary_factor", share, "must be at most 1" if share > 1 else "here all features rotate")
        width = int(head_width * min(share, 1.0))
        if not width or width % 2:
            self.wrong("partial_rotary_factor", share, f"rotates {width} of {head_width} features, not an even number")
        return {"theta": theta, "rotary": 0 if width == head_width else width}
