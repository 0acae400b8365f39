"""The same face as `core`, by the NumPy twin: for machines without the native library."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tinylm.engine.twin import Twin, start_of


class Slow:
    """One open file. `threads`, `screen`, `speculate`, `kernels` and `draft` change no results and are ignored."""

    kernels = "numpy"

    def __init__(self, path: str, *, cache: str = "auto", **ignored: Any) -> None:
        self._twin = Twin(path)
        self.facts = self._twin.constants
        self.ends = set(self.facts.ends)
        if cache != "auto":
            self._twin.int8_cache = cache == "int8"
            if cache == "int8" and self.facts.head_width % 16:
                raise ValueError(f"an int8 cache needs heads of a multiple of 16, not {self.facts.head_width}")

    def data(self, name: str, last: int | None = None) -> bytes | None:
        """The bytes of a tensor, or the `last` of them; None where there is none."""
        tensor = self._twin.tensors.get(name)
        return None if tensor is None else np.asarray(tensor.values).tobytes()[-last if last else 0 :]

    def pieces(self) -> list[bytes] | None:
        """What each id stands for, or None: a file without a tokenizer."""
        data = self.data("pieces")
        if data is None:
            return None
        (count,) = struct.unpack_from("<I", data)
        offsets = np.frombuffer(data, "<u4", count + 1, 4).tolist()
        text = data[4 + 4 * (count + 1) :]
        return [text[a:b] for a, b in itertools.pairwise(offsets)] + [b""] * (self.facts.vocab - count)

    def encode(self, text: bytes) -> None:
        """Texts become ids in the tokenizer's own library."""

    def learn(self, tokens: Sequence[int], most: int = 0) -> bytes:
        """Nothing is guessed here."""
        return b""

    def use(self, table: bytes) -> None:
        """Nothing is guessed here."""

    def write(
        self, prompts: Sequence[Sequence[int]], tokens: int, together: int, settings: dict[str, Any]
    ) -> Iterator[tuple[int, list[int], int]]:
        """As `core.Native.write`, one text after the other."""
        for number, prompt in enumerate(prompts):
            stop = None
            for token in self._twin.generate(prompt, tokens, stream=number, **settings):
                if token in self.ends:
                    break
                stop = yield number, [token], 0
                if stop:
                    break
            if not stop:
                yield number, [], 1

    def forward(self, texts: Sequence[Sequence[int]], features: bool) -> list[np.ndarray]:
        """Per text: features (T, D), or the head's output (T, V), of a classifier (1, C)."""
        for i, text in enumerate(texts):
            if not 1 <= len(text) <= self.facts.context:
                raise ValueError(f"text {i} has {len(text)} tokens: the model takes 1 to {self.facts.context}")
        if features or self.facts.head == 4:
            return [self._twin.features(text) for text in texts]
        if self.facts.classes:
            return [self._twin.classify(text)[None] for text in texts]
        return [self._twin.logits(text) for text in texts]

    def score(self, tokens: Sequence[int]) -> list[float]:
        """Natural log of the probability of each token after those before it; 0 for the first."""
        if self.facts.kind:
            raise ValueError("this model is an encoder: it fills gaps and gives no probability of a text")
        logs, scored = [0.0], 1
        while scored < len(tokens):
            begin = start_of(scored, self.facts.context)
            end = min(len(tokens) - 1, begin + self.facts.context)
            rows = self._twin.logits(tokens[begin:end])[scored - 1 - begin :].astype(np.float64)
            rows -= rows.max(-1, keepdims=True)
            rows -= np.log(np.exp(rows).sum(-1, keepdims=True))
            logs += [float(row[token]) for row, token in zip(rows, tokens[scored : end + 1], strict=True)]
            scored = end + 1
        return logs
