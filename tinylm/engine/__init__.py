"""The engine: a model in one file, run fast on a CPU.

    engine = Engine("story.tlm")
    print(engine.generate("Once upon a time", tokens=200, seed=3))
    for piece in engine.stream("Once"): print(piece, end="")
    engine.logits([1, 2, 3])                       (3, V)
    engine.score("Once upon a time").bits_per_byte
    engine.embed(["a text", "another"])            (2, D)

Everything runs in the native library; without it the NumPy twin gives the same numbers slowly, with a warning.
Importing this imports neither JAX nor NumPy nor `tokenizers`: they are loaded when arrays are asked for, or a text must
be encoded that native code cannot (`encoding`).
"""

from __future__ import annotations

import codecs
import math
import operator

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from typing import Any

    import numpy as np

SETTINGS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
LARGEST = 2**31 - 1
CUT = 2**18  # characters of a text from which on the tokenizer encodes it in parts
TAIL = 2**14  # bytes of a tokenizer.json that nearly always hold all that follows its vocabulary


class Engine:
    """A model from a .tlm file, ready to run. Threads may share it: each call works in a session of its own.

    Args:
        path: of the file, from `tinylm.export`.
        threads: 0: one per 2 MB of weights, at most one per core. Results do not depend on it.
        cache: keys and values as "float32" or "int8"; "auto" as the file says.
        screen: find the next token from half of the head's bytes, where that gives the same one (`sampling.cc`).
        speculate: tokens guessed per pass, at most 7, and 0 for none; guesses change no text.
        kernels: "avx512", "avxvnni", "avx2", "neon" or "scalar"; None: the best for this processor.
        draft: path of a smaller model with the same tokenizer, which guesses where the text itself gives no guess, as
            long as that saves time. Not for lists of prompts.

    Raises:
        ValueError: a damaged file, or an argument out of range; the message names it.
    """

    def __init__(
        self,
        path: Any,
        threads: int = 0,
        cache: str = "auto",
        screen: bool = True,
        speculate: int = 7,
        kernels: str | None = None,
        draft: Any = None,
    ) -> None:
        if cache not in ("auto", "float32", "int8"):
            raise ValueError(f"cache = {cache!r}: must be auto, float32 or int8")
        threads, speculate = _whole("threads", threads, 0, 1024), _whole("speculate", speculate, 0, LARGEST)
        self.path = str(path)
        named = {"threads": threads, "cache": cache, "screen": bool(screen), "speculate": min(speculate, 7)}
        self._core = _core(self.path, kernels=kernels, draft=None if draft is None else str(draft), **named)
        self.facts = self._core.facts
        self._pieces = self._core.pieces()
        self._tokenizer: Any = None

    def __repr__(self) -> str:
        f = self.facts
        size = f"{('decoder', 'encoder')[f.kind]}, width {f.width}, {f.layers} layers, vocab {f.vocab}"
        return f"Engine({self.path!r}: {size}; {self._core.kernels})"

    # ---- text and ids

    @property
    def tokenizer(self) -> Any:
        """The model's `Tokenizer`. Raises ValueError for a file without one."""
        if self._tokenizer is None:
            text = self._core.data("tokenizer")
            if text is None:
                raise ValueError(f"{self.path} has no tokenizer: give token ids instead of a text")
            from tinylm.tokenizer import Tokenizer

            self._tokenizer = Tokenizer.from_json(text.decode())
        return self._tokenizer

    def encode(self, text: str) -> list[int]:
        """Token ids of a text alone, without the begin token."""
        if not text:
            return []
        try:
            ids = self._core.encode(text.encode()) if len(text) <= CUT else None
        except UnicodeEncodeError:  # half of a surrogate pair: the tokenizer says where
            ids = None
        return self.tokenizer.encode(text).tolist() if ids is None else ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(map(self.piece, ids)).decode("utf-8", errors="replace")

    def piece(self, token: int) -> bytes:
        """The bytes that an id stands for: b"" for special tokens. Raises ValueError for a file without a tokenizer."""
        if self._pieces is None:
            raise ValueError(f"{self.path} has no tokenizer: use `ids` for token ids instead of text")
        return self._pieces[token]

    def _ids(self, text: str | Sequence[int]) -> list[int]:
        """A text with the tokens that stand around it, or ids as they are."""
        if not isinstance(text, str):
            try:
                ids = [operator.index(i) for i in text]
            except TypeError:
                raise ValueError(f"{type(text).__name__}: give a text, token ids, or a list of either") from None
            if ids and not (min(ids) >= 0 and max(ids) < self.facts.vocab):
                wrong = next(i for i in ids if not 0 <= i < self.facts.vocab)
                raise ValueError(f"token id {wrong} is outside 0..{self.facts.vocab - 1}")
            return ids
        ids = self.encode(text)
        if self.facts.kind:  # an encoder
            t = self.tokenizer
            first, last = (t.begin if t.cls is None else t.cls), (t.end if t.sep is None else t.sep)
            return [i for i in (first, *ids, last) if i is not None]
        return ids if self.facts.begin < 0 else [self.facts.begin, *ids]

    @property
    def prefix(self) -> str:
        """What encoding puts in front of every text, and decoding gives back: " " or "". `Text` takes it away again."""
        # Read off the tokenizer's json without parsing all of it.
        if self._tokenizer is not None:
            return self._tokenizer.prefix.decode()
        text = self._core.data("tokenizer", TAIL) or b""
        if b'"normalizer":' not in text:
            text = self._core.data("tokenizer") or b""
        at, after, splits = (text.rfind(key) for key in (b'"normalizer":', b'"post_processor":', b'"pre_tokenizer":'))
        steps = text[at:after] + text[splits:]  # keys are sorted
        metaspace = b'"type":"Metaspace"' in steps and b'"prepend_scheme":"never"' not in steps
        return " " if metaspace or b'"type":"Prepend"' in steps or b'"add_prefix_space":true' in steps else ""

    # ---- generation

    def ids(
        self, prompt: str | Sequence[int] = "", *, tokens: int = 256, seed: int = 0, **sampling: Any
    ) -> Iterator[int]:
        """Yield token ids that go on with `prompt`, until the model ends the text or `tokens` were made."""
        for _, new, _ in self._write([self._ids(prompt)], tokens, 1, seed, sampling):
            yield from new

    def stream(
        self,
        prompt: str | Sequence[int] = "",
        *,
        tokens: int = 256,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        **sampling: Any,
    ) -> Iterator[str]:
        """Yield the continuation of `prompt` in pieces of text, until the model ends it.

        Args:
            prompt: beginning of the text, or its token ids; empty lets the model begin.
            tokens: at most so many. seed: of the choices; the same text for the same seed, however it is made.
            stop: texts at which to end; they are not part of the result.
            sampling: temperature = 0.8, top_k = 0, top_p = 1, min_p = 0, repetition_penalty = 1; see `Sampling`.

        Raises:
            ValueError: a setting out of range, an encoder, or a model whose logits are not finite.
        """
        text = Text(_stops(stop), "" if len(prompt) else self.prefix)
        for _, new, ended in self._write([self._ids(prompt)], tokens, 1, seed, sampling):
            piece = text.push(b"".join(map(self.piece, new)), bool(ended))
            if piece:
                yield piece
            if text.stopped:
                return

    def generate(
        self,
        prompt: str | Sequence = "",
        *,
        tokens: int = 256,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        together: int = 64,
        **sampling: Any,
    ) -> str | list[str]:
        """The whole text, prompt included; a list of prompts gives a list, `together` of them written side by side.

        Arguments and errors as in `stream`. Text i of a list depends on the seed and on i, not on the other texts.
        """
        many = _is_many(prompt)
        prompts = list(prompt) if many else [prompt]
        starts = [self._ids(one) for one in prompts]
        stops = _stops(stop)
        prefix = "" if all(len(one) for one in prompts) else self.prefix
        texts = [Text(stops, "" if len(one) else prefix) for one in prompts]
        pieces = [[one if isinstance(one, str) else self.decode(one)] for one in prompts]
        writing = self._write(starts, tokens, _whole("together", together, 1, 65536), seed, sampling)
        stopped = None
        while starts:
            try:
                number, new, ended = writing.send(stopped)
            except StopIteration:
                break
            pieces[number].append(texts[number].push(b"".join(map(self.piece, new)), bool(ended)))
            stopped = texts[number].stopped or None
        whole = ["".join(parts) for parts in pieces]
        return whole if many else whole[0]

    def _write(self, starts: list[list[int]], tokens: int, together: int, seed: int, sampling: dict[str, Any]) -> Any:
        for name in sampling:
            if name not in SETTINGS:
                raise ValueError(f"there is no setting {name!r}; known: {', '.join(SETTINGS)}")
        settings = {name: _number(name, value) for name, value in sampling.items()}
        settings["seed"] = _whole("seed", seed, 0, 2**64 - 1)
        for start in starts:
            if not start:
                raise ValueError("a prompt without tokens cannot be continued: start with the begin token")
        return self._core.write(starts, _whole("tokens", tokens, 0, LARGEST), together, settings)

    def learn(self, texts: Iterable[str | Sequence[int]], most: int = 0) -> bytes:
        """Guess from now on what mostly follows in these texts, `most` entries of it (0: all that occur twice).

        Returns the table, for `use` another time. Guesses are checked: no text changes, but it may come sooner.
        """
        ends = [i for i in self.facts.ends if i >= 0][:1]
        return self._core.learn([i for text in texts for i in (*self._ids(text), *ends)], most)

    def use(self, table: bytes) -> None:
        """Use a table that `learn` returned."""
        self._core.use(table)

    # ---- reading

    def logits(self, text: str | Sequence[int]) -> np.ndarray:
        """(T, V) float32, a row per token; (C,) of a classifier. Raises ValueError for a text beyond the context."""
        rows = self._core.forward([self._ids(text)], False)[0]
        return rows[0] if self.facts.classes else rows

    def classify(self, text: str | Sequence) -> np.ndarray:
        """(C,) scores, a list of texts gives (N, C); softmax makes probabilities of them."""
        if not self.facts.classes:
            raise ValueError(f"{self.path} has no classes: use `logits` or `embed`")
        import numpy as np

        many = _is_many(text)
        rows = self._core.forward([self._ids(one) for one in (text if many else [text])], False)
        return np.concatenate(rows) if many else rows[0][0]

    def embed(self, text: str | Sequence, pooling: str = "mean") -> np.ndarray | list[np.ndarray]:
        """(D,) features of a text, a list of texts gives (N, D): what the head reads, after the last norm.

        pooling: "mean" over the tokens, "first" (BERT's), "last", or "none" for all of them, (T, D) per text.
        """
        pools = {"mean": lambda x: x.mean(0), "first": lambda x: x[0], "last": lambda x: x[-1], "none": lambda x: x}
        if pooling not in pools:
            raise ValueError(f"pooling = {pooling!r}: must be one of {', '.join(pools)}")
        import numpy as np

        many = _is_many(text)
        rows = self._core.forward([self._ids(one) for one in (text if many else [text])], True)
        pooled = [pools[pooling](x) for x in rows]
        return (pooled if pooling == "none" else np.stack(pooled)) if many else pooled[0]

    def score(self, text: str | Sequence[int]) -> Score:
        """How probable a text is. Each token is predicted from those before it, beyond the context as in generation."""
        ids = self._ids(text)
        if not ids:
            raise ValueError("a text without tokens has no score")
        logs = self._core.score(ids)
        # Without a begin token in front, the first token is given and not scored.
        if isinstance(text, str) and self.facts.begin >= 0:
            size = len(text.encode())
        else:
            size = len(b"".join(map(self.piece, ids[1:]))) if self._pieces else 0
        return Score(logs[1:], size)


class Score:
    """Of a text: `nats` in total, `tokens` and `bytes` that they are spread over, `logs` per token."""

    def __init__(self, logs: list[float], size: int) -> None:
        self.logs, self.tokens, self.bytes = logs, len(logs), size
        self.nats = -math.fsum(logs)

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan

    def __repr__(self) -> str:
        each = f"{self.nats_per_token:.4f} per token, {self.bits_per_byte:.4f} bits per byte"
        return f"Score({self.nats:.3f} nats over {self.tokens} tokens: {each})"


class Text:
    """Bytes of tokens in, text out: without `lead` in front, complete characters, up to a text at which to stop.

    Args:
        stops: texts, none of them empty, at which the text ends; they are not part of it.
        lead: what is taken away from its beginning: `Engine.prefix` where the prompt is empty.

    Attributes:
        stopped: whether one of `stops` was met.
    """

    def __init__(self, stops: tuple[str, ...] = (), lead: str = "") -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stops, self._lead, self.stopped = stops, lead, False
        self._hold = max((len(s) for s in stops), default=1) - 1  # a stop text may begin in what is held back
        self._held = ""

    def push(self, new: bytes, ended: bool) -> str:
        """The text that is certain now, after the bytes `new`; all of it where they `ended` the text."""
        self._held += self._decoder.decode(new, ended)
        if self._lead and self._held:
            self._held, self._lead = self._held.removeprefix(self._lead), ""
        found = [at for s in self._stops if (at := self._held.find(s)) >= 0]
        self.stopped = bool(found)
        until = min(found) if found else len(self._held) if ended else max(0, len(self._held) - self._hold)
        text, self._held = self._held[:until], self._held[until:]
        return text


def _core(path: str, **options: Any) -> Any:
    from tinylm import native

    try:
        native.library()
    except native.NativeMissing as missing:
        import warnings

        warnings.warn(f"{missing}. Until then NumPy does its work, slowly", RuntimeWarning, stacklevel=3)
        from tinylm.engine.slow import Slow

        return Slow(path, **options)
    from tinylm.engine.core import Native

    return Native(path, **options)


def _stops(stop: str | Sequence[str]) -> tuple[str, ...]:
    return tuple(s for s in ((stop,) if isinstance(stop, str) else stop) if s)


def _is_many(text: Any) -> bool:
    """Is this a list of texts (or of lists of ids), and not one?"""
    if isinstance(text, str) or getattr(text, "ndim", 0) == 1:
        return False
    return len(text) == 0 or not hasattr(text[0], "__index__")


def _whole(name: str, value: Any, least: int, most: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if isinstance(value, bool) or not least <= number <= most:
        raise ValueError(f"{name} = {value!r}: must be a whole number from {least} to {most}")
    return number


def _number(name: str, value: Any) -> float | int:
    if name == "top_k":
        return _whole(name, value, 0, LARGEST)
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise ValueError(f"{name} = {value!r}: must be a number")
    return float(value)
