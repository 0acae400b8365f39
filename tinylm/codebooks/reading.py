"""What codes mean: labels of every position of a corpus, precision and recall of codes, names for codes, contexts.

A code (or a neuron above a threshold, or a latent of a sparse autoencoder) is looked at as a classifier of positions.
Whatever is chosen as the best of many is chosen on every other document and scored on the rest, because the best of a
thousand random classifiers looks good where it was picked.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from tinylm.codebooks.books import CodebookError

BLOCK = 1 << 20  # positions looked at together


class Labels(NamedTuple):
    """A classification of positions.

    Attributes:
        kind: such as "feeling". values: (positions,) int32 class of each, -1 for none. names: of the classes.
    """

    kind: str
    values: np.ndarray
    names: tuple[str, ...]


class Fires(Protocol):
    """What can be read: an `Index`, or `Fired`."""

    codes: Mapping[str, int]
    starts: np.ndarray

    @property
    def columns(self) -> list[tuple[str, int]]: ...
    def chosen(self, name: str, group: int = 0) -> np.ndarray: ...
    def __len__(self) -> int: ...


class Fired:
    """The same as an `Index` for ids held in memory: `ids[name]` is (positions, groups, k), -1 where nothing fired."""

    def __init__(self, ids: Mapping[str, np.ndarray], codes: Mapping[str, int], starts: np.ndarray):
        self.ids, self.codes, self.starts = dict(ids), dict(codes), np.asarray(starts)

    @property
    def columns(self) -> list[tuple[str, int]]:
        """Every (name, group)."""
        return [(name, group) for name, ids in self.ids.items() for group in range(ids.shape[1])]

    def chosen(self, name: str, group: int = 0) -> np.ndarray:
        """(positions, k)."""
        return self.ids[name][:, group]

    def __len__(self) -> int:
        return len(next(iter(self.ids.values())))


# --- labels -----------------------------------------------------------------------------------------------------------


def spans(index: Any) -> list[tuple[int, int]]:
    """First and last-plus-one position of every document."""
    return list(zip(index.starts.tolist(), [*index.starts[1:].tolist(), len(index)], strict=True))


def token_labels(index: Any, tokenizer: Any, *, back: int = 0) -> Labels:
    """The token itself; `back=1`: the one before it, `back=-1`: the one after (none beyond a document's ends)."""
    values = np.full(len(index), -1, np.int32)
    for a, b in spans(index):
        own = np.asarray(index.tokens[a:b], np.int32)
        if 0 <= back < b - a:
            values[a + back : b] = own[: len(own) - back]
        elif back < 0 and -back < b - a:
            values[a : b + back] = own[-back:]
    kind = {0: "token", 1: "previous token", -1: "next token"}.get(back, f"token {back} back")
    names = [tokenizer.decode_bytes([i]).decode("utf-8", "backslashreplace") for i in range(tokenizer.vocab)]
    return Labels(kind, values, tuple(names))


def pair_labels(index: Any, tokenizer: Any, *, most: int = 500) -> Labels:
    """The `most` frequent pairs of tokens, at their second one: bigrams."""
    before = token_labels(index, tokenizer, back=1)
    pair = before.values.astype(np.int64) * tokenizer.vocab + np.asarray(index.tokens, np.int64)
    pair[before.values < 0] = -1
    known, count = np.unique(pair[pair >= 0], return_counts=True)
    known = np.sort(known[np.argsort(-count, kind="stable")[:most]])
    at = np.minimum(np.searchsorted(known, pair), max(0, len(known) - 1))
    values = np.where(known[at] == pair, at, -1) if len(known) else pair
    names = [before.names[p // tokenizer.vocab] + before.names[p % tokenizer.vocab] for p in known.tolist()]
    return Labels("pair", values.astype(np.int32), tuple(names))


def text_of(index: Any, tokenizer: Any, a: int, b: int) -> tuple[str, np.ndarray]:
    """The text of positions a to b, and where in its UTF-8 bytes each of them begins."""
    ids = np.asarray(index.tokens[a:b], np.int64)
    begins = np.concatenate([[0], np.cumsum(tokenizer.byte_lengths[ids])[:-1]])
    return tokenizer.decode(ids), begins


def covering(begins: np.ndarray, at: Sequence[int] | np.ndarray) -> np.ndarray:
    """Which token holds each byte: the last that begins at or before it (so tokens without bytes never do)."""
    return np.searchsorted(begins, at, side="right") - 1


def regex_labels(index: Any, tokenizer: Any, patterns: Mapping[str, str], *, whole: bool = False) -> list[Labels]:
    """One two-class `Labels` per pattern: the token where its first group (or the match) begins, or all it `whole`.

    Raises CodebookError for a pattern that is none.
    """
    compiled = {}
    for name, pattern in patterns.items():
        try:
            compiled[name] = re.compile(pattern)
        except (re.error, TypeError) as error:
            raise CodebookError(f"the pattern {name!r}, {pattern!r}, is no regular expression: {error}") from None
    values = {name: np.full(len(index), -1, np.int32) for name in compiled}
    for a, b in spans(index):
        text, begins = text_of(index, tokenizer, a, b)
        byte = (lambda i: i) if text.isascii() else (lambda i, text=text: len(text[:i].encode()))
        for name, pattern in compiled.items():
            for match in pattern.finditer(text):
                first, last = match.span(1 if pattern.groups and match.start(1) >= 0 else 0)
                if last > first:
                    ends = covering(begins, [byte(first), byte(last - 1)])
                    values[name][a + ends[0] : a + (ends[1] if whole else ends[0]) + 1] = 0
    return [Labels(name, own, (name,)) for name, own in values.items()]


def world_labels(index: Any, tokenizer: Any, stories: Iterable[Any], kind: str) -> Labels:
    """A label that the world's stories carry, at every token of the sentences that have it.

    Args:
        stories: of `World.stories`, in the order in which they were indexed.
        kind: topic, plot, place, feeling, speaker, feature or state.

    Raises CodebookError where a story is not the indexed document.
    """
    values, names = np.full(len(index), -1, np.int32), dict[str, int]()
    documents = [(a, b) for a, b in spans(index) if b - a > 1]  # the last token of a corpus opens nothing
    stories = list(stories)
    if len(stories) != len(documents):
        raise CodebookError(f"{len(stories)} stories, but {len(documents)} documents are indexed")
    for number, (story, (a, b)) in enumerate(zip(stories, documents, strict=True)):
        text, begins = text_of(index, tokenizer, a, b)
        lead = len(text.encode()) - len(story.text.encode())
        if text.removeprefix(" ") != story.text and text != story.text:
            raise CodebookError(f"document {number} of the index is not story {number}: {text[:40]!r}...")
        byte = (lambda i: i) if text.isascii() else (lambda i, text=story.text: len(text[:i].encode()))
        for sentence in story.sentences:
            value = sentence.labels.get(kind)
            if value is not None:
                ends = covering(begins, [lead + byte(sentence.start), lead + byte(sentence.end - 1)])
                values[a + ends[0] : a + ends[1] + 1] = names.setdefault(str(value), len(names))
    return Labels(kind, values, tuple(names))


# --- scores -----------------------------------------------------------------------------------------------------------


def halves(fires: Fires) -> np.ndarray:
    """(positions,) True in every other document: where the best is chosen; it is scored in the rest.

    Raises CodebookError for fewer than two documents.
    """
    chosen, documents = np.zeros(len(fires), bool), spans(fires)
    if len(documents) < 2:
        raise CodebookError(f"{len(documents)} document: codes are chosen on half of them and scored on the rest")
    for i, (a, b) in enumerate(documents):
        chosen[a:b] = i % 2 == 0
    return chosen


def together(ids: np.ndarray, values: np.ndarray, codes: int, classes: int, only: np.ndarray) -> np.ndarray:
    """(codes, classes) how often each code fires at a position of each class, where `only` (positions,) is true."""
    found = np.zeros(codes * classes, np.int64)
    for at in range(0, len(values), BLOCK):
        part, own = np.asarray(ids[at : at + BLOCK], np.int64), values[at : at + BLOCK, None]
        fit = (part >= 0) & (own >= 0) & only[at : at + BLOCK, None]
        found += np.bincount((part * classes + own)[fit], minlength=codes * classes)
    return found.reshape(codes, classes)


def fired(ids: np.ndarray, codes: int, only: np.ndarray) -> np.ndarray:
    """(codes,) how often each fires where `only` is true."""
    return together(ids, np.zeros(len(only), np.int32), codes, 1, only)[:, 0]


class Match(NamedTuple):
    """A code as a classifier of one class; the figures are of the documents it was not chosen on.

    Attributes:
        kind, label: of the class. site, group, code: which code (or neuron, or latent).
        precision: share of its firings on the class; recall: share of the class on which it fires; f1: of the two.
        fires: how often it fires there. share: of positions that have the class.
    """

    kind: str
    label: str
    site: str
    group: int
    code: int
    precision: float
    recall: float
    f1: float
    fires: int
    share: float


def rates(hits: Any, fires: Any, positives: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision, recall and F1; 0 where nothing fires or nothing is to be found."""
    hits, fires, positives = (np.asarray(x, float) for x in (hits, fires, positives))
    divided = lambda a, b: np.divide(a, b, out=np.zeros(np.broadcast(a, b).shape), where=b > 0)  # noqa: E731
    return divided(hits, fires), divided(hits, positives), divided(2 * hits, fires + positives)


def best_codes(fires: Fires, labels: Labels, *, least: int = 20) -> list[Match]:
    """For every class that occurs `least` times in each half: the code of best F1 among all codes of all columns."""
    chosen, classes = halves(fires), len(labels.names)
    sizes = [np.bincount(labels.values[h & (labels.values >= 0)], minlength=classes) for h in (chosen, ~chosen)]
    found: dict[int, tuple[float, Match]] = {}
    for name, group in fires.columns:
        ids, codes = fires.chosen(name, group), fires.codes[name]
        (one, two), (all_one, all_two) = (
            [together(ids, labels.values, codes, classes, h) for h in (chosen, ~chosen)],
            [fired(ids, codes, h) for h in (chosen, ~chosen)],
        )
        f1 = rates(one, all_one[:, None], sizes[0])[2]
        for c in np.flatnonzero((sizes[0] >= least) & (sizes[1] >= least)).tolist():
            code = int(np.argmax(f1[:, c]))
            if c not in found or f1[code, c] > found[c][0]:
                p, r, f = map(float, rates(two[code, c], all_two[code], sizes[1][c]))
                share = float(sizes[1][c] / (~chosen).sum())
                match = Match(labels.kind, labels.names[c], name, group, code, p, r, f, int(all_two[code]), share)
                found[c] = (float(f1[code, c]), match)
    return [found[c][1] for c in sorted(found)]


def named_codes(fires: Fires, labels: Sequence[Labels], *, least: int = 5) -> dict[tuple[str, int], list[Match | None]]:
    """(site, group) -> for every code the class, of all kinds, that describes it best by F1; None for rare codes.

    `least`: firings in each half below which a code gets no name.
    """
    chosen, named = halves(fires), {}
    for name, group in fires.columns:
        ids, codes = fires.chosen(name, group), fires.codes[name]
        all_one, all_two = (fired(ids, codes, h) for h in (chosen, ~chosen))
        best: list[Match | None] = [None] * codes
        high = np.zeros(codes)
        for own in labels:
            classes = len(own.names)
            one, two = (together(ids, own.values, codes, classes, h) for h in (chosen, ~chosen))
            size = [np.bincount(own.values[h & (own.values >= 0)], minlength=classes) for h in (chosen, ~chosen)]
            f1 = rates(one, all_one[:, None], size[0])[2]
            for code in np.flatnonzero((all_one >= least) & (all_two >= least) & (f1.max(1) > high)):
                c = int(np.argmax(f1[code]))
                high[code] = f1[code, c]
                p, r, f = map(float, rates(two[code, c], all_two[code], size[1][c]))
                share = float(size[1][c] / (~chosen).sum())
                fires_there = int(all_two[code])
                best[code] = Match(own.kind, own.names[c], name, group, int(code), p, r, f, fires_there, share)
        named[name, group] = best
    return named


def best_neurons(
    values: Mapping[str, np.ndarray], fires: Fires, labels: Labels, recalls: Mapping[str, float]
) -> list[Match]:
    """For every class in `recalls`: the neuron, either sign, of best precision at that recall.

    A match's `group` is the sign, 1 or -1, its `code` the neuron's number.

    Args:
        values: site -> (positions, neurons) float. recalls: class -> the recall to reach, usually the best code's.
            Threshold and neuron are found in the half of the documents that codes are chosen on.
    """
    chosen, found = halves(fires), []
    for c, label in enumerate(labels.names):
        if label not in recalls:
            continue
        mine = labels.values == c
        best, match = -1.0, None
        for name, x in values.items():
            for sign in (1, -1):
                one = sign * x[chosen]
                place = min(max(recalls[label], 1e-6), 1.0)
                limit = np.quantile(one[mine[chosen]], 1 - place, axis=0, method="lower")
                fire = one >= limit
                precision = rates(fire[mine[chosen]].sum(0), fire.sum(0), 1)[0]
                n = int(np.argmax(precision))
                if precision[n] > best:
                    best = float(precision[n])
                    there = sign * x[~chosen][:, n] >= limit[n]
                    hits, positives = int(there[mine[~chosen]].sum()), int(mine[~chosen].sum())
                    p, r, f = map(float, rates(hits, there.sum(), positives))
                    size = positives / max(1, int((~chosen).sum()))
                    match = Match(labels.kind, label, name, sign, n, p, r, f, int(there.sum()), size)
        if match is not None:
            found.append(match)
    return found


# --- contexts ---------------------------------------------------------------------------------------------------------


class Context(NamedTuple):
    """A place where a code fires: its document and position there, the text before, at and after it."""

    document: int
    position: int
    before: str
    token: str
    after: str


def contexts(
    index: Any, tokenizer: Any, name: str, group: int, code: int, *, n: int = 10, around: int = 16, seed: int = 0
) -> list[Context]:
    """`n` places where a code fires, drawn evenly (a code fires or not, so none is its strongest), in corpus order.

    `around`: tokens shown before and after, within the document.
    """
    places = index.postings(name, group, code)
    if len(places) > n:
        places = places[np.sort(np.random.default_rng(seed).choice(len(places), n, replace=False))]
    found = []
    ends = np.append(index.starts[1:], len(index))
    for at, document in zip(np.asarray(places, np.int64).tolist(), index.where(places)[0].tolist(), strict=True):
        a, b = max(at - around, int(index.starts[document])), min(at + around + 1, int(ends[document]))
        parts = [
            tokenizer.decode(np.asarray(index.tokens[i:j], np.int64)) for i, j in ((a, at), (at, at + 1), (at + 1, b))
        ]
        found.append(Context(document, at - int(index.starts[document]), *parts))
    return found
