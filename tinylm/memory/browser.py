"""A tree of clusters to look at: how large each is, which words tell it from its siblings, and examples."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from tinylm.markup import FAINT, Picture, framed, tag, visible
from tinylm.memory.clusters import MemoriesError, Tree, texts_of, words
from tinylm.show import BLUE, GREEN, ORANGE

TINTS = (BLUE, ORANGE, GREEN)
LONGEST = 90  # characters of an example


def typical(texts: Sequence[str], groups: np.ndarray, most: int = 5) -> dict[int, list[str]]:
    """Group -> the words whose log-odds against all other groups stand out most (Monroe et al. 2008, a flat prior).

    `groups` is (texts,) whole numbers. Raises MemoriesError for other numbers of them.
    """
    texts, groups = texts_of(texts), np.asarray(groups)
    if groups.shape != (len(texts),):
        raise MemoriesError(f"groups {groups.shape} for {len(texts)} texts: give one number for each")
    total: Counter[str] = Counter()
    own: dict[int, Counter[str]] = {}
    for text, group in zip(texts, groups.tolist(), strict=True):
        found = Counter(set(words(text)))
        total.update(found)
        own.setdefault(group, Counter()).update(found)
    everything = sum(total.values())

    def apart(word: str, n: int, size: int) -> float:
        rest, others = total[word] - n, everything - size
        a, b, c, d = n + 0.5, size - n + 0.5, rest + 0.5, others - rest + 0.5
        return (math.log(a / b) - math.log(c / d)) / math.sqrt(1 / a + 1 / c)

    ranked = {}
    for group, counts in own.items():
        size = sum(counts.values())
        ranked[group] = sorted(counts, key=lambda w, c=counts, s=size: (-apart(w, c[w], s), w))[:most]
    return ranked


def browse(
    tree: Tree,
    texts: Sequence[str],
    nodes: np.ndarray | None = None,
    *,
    depth: int = 2,
    most: int = 5,
    examples: int = 1,
) -> Picture:
    """The tree as a picture: a bar per level, wide as its clusters are large, and a line per cluster under it.

    Args:
        texts: documents to show it by. nodes: theirs, where they are known. depth: levels shown.
        most: words per cluster. examples: texts of each cluster at the last level shown.

    Raises MemoriesError for other numbers of texts and nodes, or no level to show.
    """
    texts = texts_of(texts)
    nodes = tree.find(texts) if nodes is None else np.asarray(nodes)
    if nodes.shape != (len(texts), tree.depth) or depth < 1:
        raise MemoriesError(
            f"nodes {nodes.shape}, depth = {depth}: give ({len(texts)}, {tree.depth}) nodes, depth >= 1"
        )
    depth = min(depth, tree.depth)
    said = [typical(texts, nodes[:, level], most) for level in range(depth)]
    rows, lines = [], []

    def line(level: int, node: int) -> None:
        own = np.flatnonzero(nodes[:, level] == node)
        if not len(own):
            return
        title = f"{len(own):,}  {' '.join(said[level][node])}"
        label = tag("span", f"{level}.{node}  ", style=FAINT)
        rows.append(tag("div", label, title, style=f"padding-left:{18 * level}px"))
        lines.append(f"{'  ' * level}{level}.{node}  {visible(title)}")
        if level + 1 == depth:
            for i in own[:examples].tolist():
                short = " ".join(texts[i].split())[:LONGEST]
                rows.append(tag("div", f"“{short}…”", style=f"padding-left:{18 * level + 18}px;{FAINT}"))
                lines.append(f"{'  ' * level}  “{visible(short)}…”")
        else:
            for child in range(node * tree.children, (node + 1) * tree.children):
                line(level + 1, child)

    for node in range(tree.children):
        line(0, node)
    numbers: list[list[object]] = [["level", "cluster", "documents", "typical words"]]
    for level in range(depth):
        sizes = np.bincount(nodes[:, level], minlength=tree.children ** (level + 1)).tolist()
        numbers += [[level, node, size, " ".join(said[level][node])] for node, size in enumerate(sizes) if size]
    return Picture(framed(icicle(tree, nodes, depth), *rows), "\n".join(lines), numbers)


def icicle(tree: Tree, nodes: np.ndarray, depth: int) -> str:
    """An SVG with a row per level; a cluster is as wide as its share of the documents."""
    width, height, parts = 760.0, 22, []
    for level in range(depth):
        sizes, at = np.bincount(nodes[:, level], minlength=tree.children ** (level + 1)), 0.0
        for node, size in enumerate(sizes.tolist()):
            wide = width * size / max(1, len(nodes))
            if wide >= 0.5:
                color = TINTS[(node // tree.children**level) % len(TINTS)]
                box = {
                    "x": round(at, 1),
                    "y": level * height,
                    "width": round(max(wide - 1, 0.5), 1),
                    "height": height - 2,
                }
                parts.append(tag("rect", tag("title", f"{level}.{node}: {size}"), fill=color, opacity=0.75, **box))
            at += wide
    what = f"sizes of the clusters of {depth} levels"
    return tag(
        "svg", tag("title", what), *parts, viewBox=f"0 0 {width:g} {height * depth}", role="img", aria_label=what,
        style="display:block;width:100%;height:auto;margin-bottom:8px",
    )  # fmt: skip
