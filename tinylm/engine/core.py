"""A file behind the native library: the model, a pool of sessions, and plain calls. `slow` has the same face in NumPy.

Imports ctypes alone: the first token of a small model comes sooner than `import numpy` would return.
"""

from __future__ import annotations

import ctypes as c
import itertools
import os
import struct

from tinylm import native
from tinylm.native import EngineError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any

    import numpy as np

CACHES = ("auto", "float32", "int8")
KEPT = 4  # idle sessions of one text each; their memory is what they last needed
SLICE = 30  # milliseconds that a call may take, so that Ctrl-C is seen
MOST_AT_ONCE = 16  # tokens per call
MOST_DRAFTED = 7


class Native:
    """One open file. Any number of threads may use it: each call takes a session of its own."""

    def __init__(
        self,
        path: str,
        *,
        threads: int = 0,
        cache: str = "auto",
        screen: bool = True,
        speculate: int = MOST_DRAFTED,
        kernels: str | None = None,
        draft: str | None = None,
        check: bool = True,
    ) -> None:
        self._lib = native.library()
        self._model, self._idle, self._drafts = c.c_void_p(), [], c.c_void_p()
        self._smaller = Native(draft, check=check) if draft else None
        self._threads, self._speculate = threads, speculate
        options = native.Options(kernels.encode() if kernels else None, CACHES.index(cache), screen, check)
        try:
            native.call("tlm_open", os.fsencode(path), options, self._model)
        except EngineError as error:
            raise EngineError(f"{path}: {error}") from None
        self.facts = native.Facts()
        self._lib.tlm_info(self._model, self.facts)
        self.kernels = self.facts.kernels.decode()
        self.ends = {i for i in self.facts.ends if i >= 0}
        if self._smaller:
            self._give(*self._take())  # what is wrong with it shows here

    def __del__(self) -> None:
        for pid, session in getattr(self, "_idle", ()):
            self._free(pid, session)
        if getattr(self, "_model", None):
            self._lib.tlm_draft_free(self._drafts)
            self._lib.tlm_close(self._model)

    # ---- what the file holds

    def data(self, name: str, last: int | None = None) -> bytes | None:
        """The bytes of a tensor, or the `last` of them; None where there is none."""
        tensor = native.Tensor()
        if not self._lib.tlm_tensor_find(self._model, name.encode(), tensor):
            return None
        size = tensor.bytes if last is None else min(last, tensor.bytes)
        return c.string_at(tensor.data + tensor.bytes - size, size)

    def pieces(self) -> Pieces | None:
        """What each id stands for, or None: a file without a tokenizer."""
        tensor = native.Tensor()
        if not self._lib.tlm_tensor_find(self._model, b"pieces", tensor):
            return None
        return Pieces(self, tensor.data, tensor.bytes)

    def encode(self, text: bytes) -> list[int] | None:
        """Token ids of a text of UTF-8, or None where only the tokenizer's own library knows them."""
        ids, count = (c.c_int32 * (len(text) + 1))(), c.c_int64()
        native.call("tlm_encode", self._model, text, len(text), ids, count)
        return None if count.value < 0 else ids[: count.value]

    # ---- sessions

    def _take(self, sequences: int = 1) -> tuple[int, c.c_void_p]:
        while sequences == 1 and self._idle:
            pid, session = self._idle.pop()
            if pid == os.getpid():  # another process's threads did not come along
                return pid, session
        session = c.c_void_p()
        native.call("tlm_session_new", self._model, sequences, self._threads, session)
        if self._drafts:
            native.call("tlm_session_draft", session, self._drafts)
        if self._smaller and sequences == 1:
            native.call("tlm_session_draft_model", session, self._smaller._model)
        return os.getpid(), session

    def _give(self, pid: int, session: c.c_void_p, sequences: int = 1) -> None:
        if sequences == 1 and len(self._idle) < KEPT:
            self._idle.append((pid, session))
        else:
            self._free(pid, session)

    def _free(self, pid: int, session: c.c_void_p, own: Callable[[], int] = os.getpid) -> None:
        if pid == own():  # not `os.getpid`: when Python ends, modules may be gone before the last engine is
            self._lib.tlm_session_free(session)

    def learn(self, tokens: Sequence[int] | bytes, most: int = 0) -> bytes:
        """Use what mostly follows what in a corpus, ids as a sequence or as int32 bytes; returns the table."""
        ids, count = _ints(tokens)
        draft = c.c_void_p()
        native.call("tlm_draft_learn", ids, count, self.facts.vocab, most, draft)
        data, size = c.c_void_p(), c.c_uint64()
        self._lib.tlm_draft_data(draft, data, size)
        table = c.string_at(data, size.value)
        self._lib.tlm_draft_free(draft)
        self.use(table)
        return table

    def use(self, table: bytes) -> None:
        """Use a table that `learn` returned, in sessions from now on. Not while others generate."""
        draft = c.c_void_p()
        native.call("tlm_draft_read", table, len(table), draft)
        for pid, session in self._idle:
            self._free(pid, session)
        self._idle = []
        self._lib.tlm_draft_free(self._drafts)
        self._drafts = draft

    # ---- texts

    def write(
        self, prompts: Sequence[Sequence[int]], tokens: int, together: int, settings: dict[str, Any]
    ) -> Iterator[tuple[int, list[int], int]]:
        """Yield (number of the prompt, new ids, why it ended or 0), `together` texts at a time, until all have ended.

        Send a true value back to end that text. Number i has the random stream i.
        """
        slots = max(1, min(together, len(prompts)))
        pid, session = self._take(slots)
        try:
            waiting = iter(range(len(prompts)))
            begin = lambda slot: self._start(session, slot, next(waiting, None), prompts, tokens, settings)  # noqa: E731
            works = [begin(slot) for slot in range(slots)]
            most = 1
            new = (c.c_int32 * (slots * MOST_AT_ONCE))()
            made, ended = (c.c_int32 * slots)(), (c.c_int32 * slots)()
            while any(number is not None for number in works):
                native.call("tlm_next", session, most, SLICE, new, made, ended, None)
                for slot, number in enumerate(works):
                    if number is None:
                        continue
                    stop = yield number, new[slot * most : slot * most + made[slot]], ended[slot]
                    if stop and not ended[slot]:
                        native.call("tlm_stop", session, slot)
                    if stop or ended[slot]:
                        works[slot] = begin(slot)
                most = min(2 * most, MOST_AT_ONCE)  # the first token at once, then fewer calls
        finally:
            self._give(pid, session, slots)

    def _start(self, session, slot, number, prompts, tokens, settings) -> int | None:
        if number is None:
            return None
        chosen = native.Settings(0.8, 0, 1, 0, 1, tokens, 0, number, self._speculate)
        for name, value in settings.items():
            setattr(chosen, name, value)
        ids, count = _ints(prompts[number])
        native.call("tlm_start", session, slot, ids, count, chosen)
        return number

    def forward(self, texts: Sequence[Sequence[int]], features: bool) -> list[np.ndarray]:
        """Per text: features (T, D), or the head's output (T, V), of a classifier (1, C)."""
        import numpy as np

        facts = self.facts
        what = native.FEATURES if features else native.OUTPUT
        columns = facts.width if features else facts.outputs
        single = not features and facts.classes
        out: list[np.ndarray] = []
        pid, session = self._take()
        try:
            for ids in _some(texts):  # some at a time, so that Ctrl-C is seen
                flat, _ = _ints([i for text in ids for i in text])
                sizes, count = _ints([len(text) for text in ids])
                ends = list(itertools.accumulate(1 if single else len(text) for text in ids))
                block = np.empty((ends[-1], columns), np.float32)
                native.call("tlm_forward", session, count, sizes, flat, None, what, block.ctypes.data, None)
                out += np.split(block, ends[:-1])
        finally:
            self._give(pid, session)
        return out

    def score(self, tokens: Sequence[int]) -> list[float]:
        """Natural log of the probability of each token after those before it; 0 for the first."""
        ids, count = _ints(tokens)
        logs = (c.c_double * count)()
        pid, session = self._take()
        try:
            native.call("tlm_score", session, ids, count, logs, None)
        finally:
            self._give(pid, session)
        return list(logs)


class Pieces:
    """The bytes that each id stands for, read from the file where they are needed."""

    def __init__(self, owner: Any, address: int, size: int) -> None:
        self._owner, self._address = owner, address  # the owner keeps the file open
        broken = EngineError('tensor "pieces" is damaged: export the model anew')
        if size < 8:
            raise broken
        (self.count,) = struct.unpack("<I", c.string_at(address, 4))
        self._text = 4 + 4 * (self.count + 1)
        if self._text > size:
            raise broken
        offsets = c.string_at(address + 4, 4 * (self.count + 1))
        self._offsets = memoryview(offsets).cast("I")
        self._size = size - self._text
        if self._offsets[0] != 0 or self._offsets[self.count] > self._size:
            raise broken

    def __getitem__(self, token: int) -> bytes:
        if not 0 <= token < self.count:
            return b""  # ids that only pad the embedding
        begin, end = self._offsets[token], self._offsets[token + 1]
        if not begin <= end <= self._size:
            raise EngineError(f'tensor "pieces": token {token} is damaged; export the model anew')
        return c.string_at(self._address + self._text + begin, end - begin)


def _ints(values: Any) -> tuple[Any, int]:
    """int32 values for C, and how many; `values` are numbers, int32 bytes or an array."""
    if hasattr(values, "astype"):
        values = values.astype("<i4").tobytes()
    if isinstance(values, bytes):
        return (c.c_int32 * (len(values) // 4)).from_buffer_copy(values), len(values) // 4
    try:
        return (c.c_int32 * len(values))(*values), len(values)
    except TypeError:
        raise EngineError("token ids must be whole numbers") from None


def _some(texts: Sequence, tokens: int = 4096) -> Iterator[list]:
    """The texts, about so many tokens at a time."""
    ids, held = [], 0
    for text in texts:
        ids.append(text)
        held += len(text)
        if held >= tokens:
            yield ids
            ids, held = [], 0
    if ids:
        yield ids
