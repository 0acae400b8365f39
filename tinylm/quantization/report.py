"""What quantizing came to: bytes counted as they are stored, errors, codes; to read as text or in a notebook."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from tinylm.markup import FAINT, Markup, Picture, framed, number, tag
from tinylm.show import bars, table


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """One matrix. `levels`: different codes. `bytes`: of codes, scales, zeros and table. `error`: |w - rounded| / |w|.

    `output_error` is the same of what the matrix gives on the calibration text, None without one. `histogram`: how
    many weights have each code, (levels,). `how` names the method, or the technique whose codes were kept.
    """

    name: str
    how: str
    levels: int
    weights: int
    bytes: int
    error: float
    output_error: float | None
    histogram: np.ndarray

    @property
    def bits(self) -> float:
        """Stored bits per weight, scales and all."""
        return 8 * self.bytes / self.weights

    @property
    def entropy(self) -> float:
        """Bits per weight of the codes themselves, if they were coded ideally."""
        p = self.histogram[self.histogram > 0] / self.histogram.sum()
        return float(-(p * np.log2(p)).sum())


@dataclasses.dataclass(frozen=True, eq=False)
class Report:
    """What `quantize` did.

    Attributes:
        rows: one per matrix. full: bytes of everything that was kept in floats. before: bytes of the model in float32.
        bits_before, bits_after: bits per byte of the text, None without one. notes: what could not be done.
    """

    rows: tuple[Row, ...]
    full: int
    before: int
    bits_before: float | None = None
    bits_after: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """Of the whole model, as it is stored."""
        return self.full + sum(row.bytes for row in self.rows)

    @property
    def bits_per_weight(self) -> float:
        """Of the quantized matrices, scales and all."""
        return 8 * sum(row.bytes for row in self.rows) / sum(row.weights for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """The figures, ready for json."""
        rows = [{**vars(row), "histogram": row.histogram.tolist(), "bits": row.bits} for row in self.rows]
        return {**vars(self), "rows": rows, "notes": list(self.notes), "bytes": self.bytes,
                "bits_per_weight": self.bits_per_weight}  # fmt: skip

    def picture(self) -> Picture:
        """The report to look at: totals, a table of matrices, the codes of all together."""
        totals = [
            ["in float32", f"{self.before:,} B"],
            ["now", f"{self.bytes:,} B"],
            ["of that kept in floats", f"{self.full:,} B"],
            ["bits per quantized weight", number(self.bits_per_weight)],
        ]
        if self.bits_before is not None and self.bits_after is not None:
            totals.append(["bits per byte before", f"{self.bits_before:.4f}"])
            totals.append(["bits per byte after", f"{self.bits_after:.4f}"])
        head = table(totals, title="quantized")
        matrices = table(
            [
                [r.name, r.how, r.levels, round(r.bits, 3), round(r.entropy, 3), f"{r.error:.4f}",
                 "–" if r.output_error is None else f"{r.output_error:.4f}"]
                for r in self.rows
            ],
            ["matrix", "how", "levels", "bits", "entropy", "error", "of outputs"],
        )  # fmt: skip
        codes = self._codes()
        parts = [Markup(head.html), Markup(matrices.html), None if codes is None else Markup(codes.html)]
        notes = [tag("div", note, style=FAINT) for note in self.notes]
        text = [head.text, matrices.text, "" if codes is None else codes.text, *self.notes]
        return Picture(framed(*(tag("div", p, style="margin-bottom:10px") for p in parts if p), *notes),
                       "\n\n".join(filter(None, text)), matrices.numbers)  # fmt: skip

    def _codes(self) -> Picture | None:
        """Shares of the codes, where all matrices have the same few."""
        levels = {row.levels for row in self.rows}
        if len(levels) != 1 or max(levels) > 16:
            return None
        total = np.sum([row.histogram for row in self.rows], 0)
        shares = 100 * total / total.sum()
        return bars({f"code {i}": float(s) for i, s in enumerate(shares)}, unit="percent of the weights")

    def __repr__(self) -> str:
        return self.picture().text

    def _repr_html_(self) -> str:
        return self.picture().html
