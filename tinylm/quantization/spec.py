"""What is asked of `quantize`, as data."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from tinylm.config import Config, ConfigError, suggest

BITS = (1.58, 2, 3, 4, 5, 6, 7, 8)
Method = Literal["nearest", "adaround", "gptq", "kmeans", "split"]
Range = Literal["max", "percentile", "mse", "kl"]
Balance = Literal["none", "smoothquant", "awq"]


class QuantizationError(ValueError):
    """Something that cannot be quantized as asked; the message names what and the remedy."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec(Config):
    r"""How some matrices of a model become codes. Of several specs the last whose `where` matches a matrix counts.

    Attributes:
        where: regex for whole dotted paths; `blocks\..*|embed` takes the embedding, and so a tied head, too.
        bits: per weight; 1.58 is ternary.
        per: what shares a scale: "tensor", "channel" (one output), or so many inputs of an output.
        affine: codes have a zero of their own, for weights that are not centred; else they are symmetric.
        range: where a scale comes from: "max" (smallest and largest weight), "percentile" of magnitudes, "mse" (the
            clipping of 81 with the least squared error), or "kl" (TensorRT's entropy calibration, per tensor only).
        percentile: of that range.
        method: "nearest"; "adaround" (Nagel et al. 2020); "gptq" (Frantar et al. 2022); "kmeans", a table of 2^bits
            values per tensor; "split" (SplitQuant, Song and Lin 2025), three ranges per tensor.
        balance: moves scale from inputs to weights first: "smoothquant" (Xiao et al. 2022), "awq" (Lin et al. 2023).
        alpha: of smoothquant: how much is moved, 0 to 1.
        activations: dynamic rounding of the inputs, token by token: "none", "int8" or "int4".
        static: "symmetric" or "affine": int8 inputs with one step for all tokens instead, found on calibration text.
        static_range: where that comes from, as `range`: "max" of all the text, others of at most 1,024 of its tokens.
        half: scales are stored as float16.
    """

    where: str = r"blocks\..*"
    bits: float = 8.0
    per: Literal["tensor", "channel"] | int = "channel"
    affine: bool = False
    range: Range = "max"
    percentile: float = 99.9
    method: Method = "nearest"
    balance: Balance = "none"
    alpha: float = 0.5
    activations: Literal["none", "int8", "int4"] = "none"
    static: Literal["", "symmetric", "affine"] = ""
    static_range: Range = "max"
    half: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            re.compile(self.where)
        except re.error as error:
            self._require(False, "where", f"is no regular expression ({error})")
        self._require(self.bits in BITS, "bits", f"must be one of {', '.join(map(str, BITS))}")
        named = self.per in ("tensor", "channel")
        good = named or (type(self.per) is int and self.per > 0)
        self._require(good, "per", 'must be "tensor", "channel", or how many inputs share a scale')
        self._require(50 <= self.percentile <= 100, "percentile", "must be 50 to 100")
        self._require(0 <= self.alpha <= 1, "alpha", "must be 0 to 1")
        self._require(self.range != "kl" or self.per == "tensor", "range", '"kl" needs per="tensor"')
        self._require(not self.by_table or self.bits != 1.58, "bits", f"{self.method} needs whole bits")
        self._require(not (self.affine and self.bits == 1.58), "affine", "ternary codes are symmetric")
        self._require(not self.static or self.activations == "none", "static", 'needs activations="none"')

    @property
    def levels(self) -> int:
        """Different codes, tables aside: symmetric ones reach equally far, but 2 bits use all four, -2..1."""
        if self.bits == 1.58:
            return 3
        return 2 ** int(self.bits) - (0 if self.affine or self.bits == 2 else 1)

    @property
    def low(self) -> int:
        """The smallest code."""
        return 0 if self.affine else -(self.levels // 2)

    @property
    def by_table(self) -> bool:
        """Whether codes stand for values of a table, instead of multiples of a scale."""
        return self.method in ("kmeans", "split")

    @property
    def needs_data(self) -> bool:
        """Whether inputs have to be seen."""
        return self.method in ("adaround", "gptq") or self.balance != "none" or bool(self.static)


SPECS: dict[str, dict[str, Any]] = {
    "int8": {"bits": 8},
    "int4": {"bits": 4, "per": 32, "range": "mse", "half": True},
    "int2": {"bits": 2, "per": 32, "range": "mse", "half": True},
    "ternary": {"bits": 1.58, "per": "tensor", "range": "mse"},
}


def specs_of(spec: str | Spec | Iterable[str | Spec]) -> tuple[Spec, ...]:
    """A spec or its name, or several of them, as a tuple.

    Raises ConfigError for an unknown name, QuantizationError for what is neither.
    """
    several = [spec] if isinstance(spec, str | Spec) else spec
    if isinstance(several, Mapping) or not isinstance(several, Iterable):
        several = [several]
    found = []
    for one in several:
        if isinstance(one, str) and one not in SPECS:
            raise ConfigError(f"no quantization is called {one!r}{suggest(one, list(SPECS))}")
        if not isinstance(one, str | Spec):
            raise QuantizationError(f"spec = {one!r}: give {', '.join(SPECS)}, a Spec, or a list of them")
        found.append(Spec(**SPECS[one]) if isinstance(one, str) else one)
    return tuple(found)
