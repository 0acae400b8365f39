"""Where heads look: patterns, the scores that name well-known heads, and a browser."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from tinylm import show
from tinylm.data import DataError, check_tokens
from tinylm.markup import FAINT, Picture, framed, tag, visible
from tinylm.model import Transformer
from tinylm.probe.activations import seen
from tinylm.probe.pictures import cells, spelled


def patterns(model: Transformer, tokens: np.ndarray) -> Float[np.ndarray, "layers B heads T S"]:
    """Attention weights of every head; rows sum to 1."""
    values = seen(model, tokens, r"blocks\.\d+\.attn\.pattern")
    return np.stack([values[f"blocks.{layer}.attn.pattern"] for layer in range(model.config.layers)])


SCORES = {
    "previous": "from a token to the one before it",
    "current": "from a token to itself",
    "first": "from a token to the first of the text",
    "duplicate": "from a token to its earlier occurrence",
    "induction": "from a token to the one after its earlier occurrence (Elhage et al. 2021; Olsson et al. 2022)",
}


def scores_of(pattern: Float[np.ndarray, "*lead T S"], half: int) -> dict[str, np.ndarray]:
    """Mean attention weight along each kind's diagonal, of patterns over a text of `half` tokens, told twice.

    "previous", "current" and "first" average over all positions that have such a token; the other two over the second
    half, where position t repeats position t - half.
    """
    along = lambda back, since: np.diagonal(pattern, -back, -2, -1)[..., since - back :].mean(-1)  # noqa: E731
    return {
        "previous": along(1, 1),
        "current": along(0, 0),
        "first": pattern[..., 1:, 0].mean(-1),
        "duplicate": along(half, half),
        "induction": along(half - 1, half),
    }


def head_scores(
    model: Transformer, *, half: int = 24, rows: int = 16, seed: int = 0, begin: int | None = None
) -> dict[str, Float[np.ndarray, "layers heads"]]:
    """The kinds of `SCORES` for every head, on random tokens told twice: nothing but the repetition can be known.

    Args:
        half: tokens that are repeated; those of a row are all different if the vocabulary has as many.
        begin: an id in front of every row, which patterns then are cut by; None: none.

    Raises DataError when two halves do not fit the context, without rows, or for a `begin` that is no id.
    """
    c = model.config
    lead = 0 if begin is None else 1
    if type(half) is not int or 2 * half + lead > c.context or half < 2:
        raise DataError(f"half = {half!r}: a whole number from 2, twice which must fit the context of {c.context}")
    if type(rows) is not int or rows < 1:
        raise DataError(f"rows = {rows!r}: read at least 1 text")
    if begin is not None:
        check_tokens(np.asarray(begin), c.vocab, "begin")
    rng = np.random.default_rng(seed)
    others = np.setdiff1d(np.arange(c.vocab), [] if begin is None else [begin])
    once = np.stack([rng.choice(others, half, replace=half > len(others)) for _ in range(rows)])
    tokens = np.concatenate([np.full((rows, lead), begin or 0), once, once], axis=1).astype(np.int32)
    pattern = patterns(model, tokens)[..., lead:, lead:]
    return {name: score.mean(1) for name, score in scores_of(pattern, half).items()}


def attention_browser(
    model: Transformer,
    tokens: np.ndarray | str,
    *,
    layers: Sequence[int] | None = None,
    head: tuple[int, int] | None = None,
    least: float = 0.02,
) -> Picture:
    """All heads of a text as small maps, rows looking at columns; one of them large, with its tokens.

    Args:
        tokens: (T,) ids, or a text for the model's tokenizer. layers: which; None: all.
        head: (layer, head) to show large; None: the one with the least spread-out rows. least: weights below it are
            left blank.

    Raises DataError for a text without a tokenizer, more than 64 tokens, or layers or a head that are not there.
    """
    if isinstance(tokens, str):
        if model.tokenizer is None:
            raise DataError("the model has no tokenizer: give token ids")
        tokens = model.tokenizer.encode(tokens)
    ids = np.asarray(tokens, np.int32).reshape(-1)
    if not 1 < len(ids) <= 64:
        raise DataError(f"{len(ids)} tokens: a map can be read with 2 to 64")
    every = patterns(model, ids[None])[:, 0]
    chosen = list(range(model.config.layers) if layers is None else layers)
    count = every.shape[:2]
    if not chosen or not all(0 <= layer < count[0] for layer in chosen):
        raise DataError(f"layers = {chosen}: the model has layers 0 to {count[0] - 1}")
    if head is not None and not (len(head) == 2 and all(0 <= i < n for i, n in zip(head, count, strict=True))):
        raise DataError(f"head = {head}: (layer, head) of {count[0]} layers with {count[1]} heads each")
    if head is None:
        sharp = -(every * np.log(np.maximum(every, 1e-9))).sum(-1)[..., len(ids) // 2 :].mean(-1)
        sharp = sharp + 1e3 * (every[..., 0].mean(-1) > 0.6)  # heads that rest on the first token say little
        head = divmod(int(np.argmin(sharp[chosen])), model.config.heads)
        head = (chosen[head[0]], head[1])
    words = [spelled(model.tokenizer, i) for i in ids.tolist()]
    rows = []
    for layer in chosen:
        maps = []
        for h, pattern in enumerate(every[layer]):
            svg = cells(pattern, size=92, least=least, title=f"layer {layer} head {h}")
            label = tag("div", f"{layer}.{h}", style=f"font-size:11px;{FAINT}")
            maps.append(tag("div", label, svg, style="width:92px"))
        rows.append(tag("div", *maps, style="display:flex;flex-wrap:wrap;gap:6px 10px;margin-bottom:8px"))
    large = cells(every[head], size=300, least=least, title=f"layer {head[0]} head {head[1]}", words=words)
    note = f"layer.head; each row is a token, coloured where it looks. Large: layer {head[0]} head {head[1]}."
    top = [f"{words[t]} -> {words[int(every[head][t].argmax())]}" for t in range(len(ids))]
    text = visible(f"{note}\n" + "\n".join(top))
    numbers: list[list[object]] = [["layer", "head", "token", "looks at", "share"]]
    for layer in chosen:
        for h, pattern in enumerate(every[layer]):
            some = np.argwhere(pattern > least).tolist()
            numbers += [[layer, h, f"{t} {words[t]}", f"{s} {words[s]}", float(pattern[t, s])] for t, s in some]
    return Picture(framed(*rows, tag("div", note, style=f"margin:6px 0;{FAINT}"), large), text, numbers)


def score_table(scores: dict[str, np.ndarray], most: int = 8) -> show.Picture:
    """The heads that score highest in each kind."""
    rows = []
    for name, values in scores.items():
        order = np.argsort(-values, axis=None)[:most]
        best = [f"{i // values.shape[1]}.{i % values.shape[1]} {values.flat[i]:.2f}" for i in order.tolist()]
        rows.append([name, "   ".join(best)])
    return show.table(rows, ["kind", "layer.head and score"])
