"""Neurons: where each fires hardest, and which tokens it speaks for."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tinylm.data import DataError, Tokens, Windows, check_tokens
from tinylm.markup import FAINT, Picture, framed, number, tag, visible
from tinylm.model import Transformer
from tinylm.parts import LayerNorm
from tinylm.probe.activations import matrix_of, unwrapped
from tinylm.probe.pictures import spelled
from tinylm.taps import recording
from tinylm.weights import bind, pure


@dataclasses.dataclass(frozen=True)
class Neurons:
    """What was seen of every neuron of a layer.

    Attributes:
        layer: which. tokens: (rows, T) ids that were read.
        mean, active: (F,) mean activation, and share of positions where it is above 0.
        top: (F, k) largest activations, falling. row, position: (F, k) where, at most one per row.
        values: (F, k, T) float16 activations along those rows.
        promotes, demotes: (F, m) ids whose logits its output raises and lowers most, for an activation above 0.
    """

    layer: int
    tokens: np.ndarray
    mean: np.ndarray
    active: np.ndarray
    top: np.ndarray
    row: np.ndarray
    position: np.ndarray
    values: np.ndarray
    promotes: np.ndarray
    demotes: np.ndarray


@functools.lru_cache(maxsize=16)
def _pass(graph: Any, layer: int) -> Callable:
    def run(params, tokens):
        seen: dict[str, Any] = {}
        bind(graph, params)(tokens, tap=recording(seen, rf"blocks\.{layer}\.mlp\.hidden"))
        x = seen[f"blocks.{layer}.mlp.hidden"].astype(jnp.float32)
        return x.max(1), x.argmax(1), x

    return jax.jit(run)


def neurons(
    model: Transformer,
    data: Tokens | np.ndarray,
    layer: int = 0,
    *,
    rows: int = 128,
    length: int = 64,
    most: int = 8,
    batch: int = 16,
    seed: int = 0,
) -> Neurons:
    """Read many windows of text (or (rows, T) ids) and keep the strongest contexts of every neuron of a layer.

    Raises DataError: a layer that is not there or has no MLP, ids out of range or in no rows, or nothing to read.
    """
    if rows < 1 or batch < 1 or most < 1:
        raise DataError(f"rows = {rows}, batch = {batch}, most = {most}: need at least 1 of each")
    c = model.config
    if not 0 <= layer < c.layers:
        raise DataError(f"layer = {layer}: the model has layers 0 to {c.layers - 1}")
    if isinstance(data, Tokens):
        source = Windows(data, batch=1, length=min(length, c.context), seed=seed)
        ids = np.concatenate([source(i).tokens for i in range(min(rows, source.windows))])
    else:
        ids = np.asarray(data, np.int32)
    check_tokens(ids, c.vocab)
    if ids.ndim != 2 or not ids.size:
        raise DataError(f"tokens must be rows of ids, (rows, T); got shape {ids.shape}")
    block = unwrapped(model.blocks[layer])
    if not hasattr(block, "mlp"):
        raise DataError(f"a {c.block} block has no MLP whose neurons could be seen")
    graph, params = pure(model)
    run, most = _pass(graph, layer), min(most, len(ids))
    kept: list[np.ndarray] = []
    total: Any = 0.0
    active: Any = 0.0
    for at in range(0, len(ids), batch):
        part = ids[at : at + batch]
        filled = np.concatenate([part, np.repeat(part[-1:], min(batch, len(ids)) - len(part), axis=0)])
        peak, place, x = (np.asarray(v) for v in run(params, filled))
        n = len(part)
        total, active = total + x[:n].sum((0, 1)), active + (x[:n] > 0).sum((0, 1))
        number_of = np.broadcast_to(np.arange(at, at + n)[:, None], peak[:n].shape)
        new = [peak[:n], number_of, place[:n], x[:n].transpose(0, 2, 1).astype(np.float16)]
        kept = new if not kept else [np.concatenate(pair) for pair in zip(kept, new, strict=True)]
        order = np.argsort(-kept[0], axis=0, kind="stable")[:most]
        kept = [np.take_along_axis(v, order if v.ndim == 2 else order[..., None], axis=0) for v in kept]
    best, row, position, values = (v.swapaxes(0, 1) for v in kept)
    out = np.asarray(matrix_of(unwrapped(block.mlp).down), np.float32)
    out = out - out.mean(1, keepdims=True) if isinstance(model.norm, LayerNorm) else out
    read = np.asarray(model.embed.weight() if c.head != "untied" else model.head.out.weight().T, np.float32)
    scale = np.asarray(model.norm.scale[...]) if hasattr(model.norm, "scale") else 1.0
    says = (out * scale) @ read.T
    says = says - says.mean(1, keepdims=True)
    ranked = np.argsort(-says, axis=1)
    return Neurons(
        layer, ids, total / ids.size, active / ids.size, best, row, position, values, ranked[:, :8], ranked[:, :-9:-1]
    )


def neuron_browser(
    found: Neurons, tokenizer: Any = None, *, which: Sequence[int] | None = None, contexts: int = 4, around: int = 14
) -> Picture:
    """The strongest contexts of some neurons, tinted by activation, and the tokens they speak for.

    `which`: neurons; None: the six that fire most selectively (top over mean activation). `around`: tokens shown on
    each side of the peak. Raises DataError for a neuron that is not there.
    """
    if which is None:
        spread = found.top[:, : max(1, contexts)].mean(1) / (np.abs(found.mean) + 1e-3 * np.abs(found.top).max())
        which = [int(n) for n in np.argsort(-np.where(found.active > 1e-3, spread, 0))[:6]]
    if any(not 0 <= n < len(found.mean) for n in which):
        raise DataError(f"neurons {list(which)}: the layer has 0 to {len(found.mean) - 1}")
    parts, lines = [], []
    for n in which:
        head = f"layer {found.layer} neuron {n}"
        note = f"active at {found.active[n]:.1%} of positions, mean {number(float(found.mean[n]))}"
        says = "raises " + " ".join(spelled(tokenizer, i) for i in found.promotes[n][:6])
        says += " · lowers " + " ".join(spelled(tokenizer, i) for i in found.demotes[n][:4])
        shown = []
        for k in range(min(contexts, found.top.shape[1])):
            row, at, peak = int(found.row[n, k]), int(found.position[n, k]), float(found.top[n, k])
            spans = []
            for t in range(max(0, at - around), min(found.tokens.shape[1], at + around // 2)):
                share = max(0.0, float(found.values[n, k, t]) / max(peak, 1e-6))
                style = f"background:rgba(230,159,0,{0.75 * share:.2f});border-radius:2px"
                style += ";font-weight:600;border-bottom:2px solid currentColor" if t == at else ""
                piece = spelled(tokenizer, found.tokens[row, t]).replace("·", " ")
                text = piece if tokenizer else f" {piece}"
                spans.append(tag("span", text, title=f"{float(found.values[n, k, t]):.2f}", style=style))
            label = tag("span", f"{number(peak)}", style=f"display:inline-block;width:3.6em;{FAINT}")
            shown.append(tag("div", label, *spans, style="white-space:pre-wrap;line-height:1.7"))
            around_peak = "".join(
                spelled(tokenizer, i).replace("·", " ") for i in found.tokens[row, max(0, at - 6) : at + 1]
            )
            lines.append(f"{head}  {number(peak):>7}  {around_peak}")
        parts.append(tag("div", tag("b", head), " ", tag("span", note, style=FAINT), style="margin-top:10px"))
        parts += [*shown, tag("div", says, style=f"font-size:12px;{FAINT}")]
        lines.append(f"    {says}")
    return Picture(framed(*parts), visible("\n".join(lines)))
