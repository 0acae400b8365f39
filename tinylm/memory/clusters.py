"""Which documents belong together: their embeddings, and a tree of clusters that a text is led down.

    tree = Tree.fit(texts, children=8, depth=3)     # TF-IDF and SVD, or embed=any function of texts
    nodes = tree.find(texts)                        # (texts, depth), the cluster of every level

Pouransari et al. 2025 (arXiv 2510.02375), sections on clustering: k-means at every node of a tree, balanced; a text
goes at each level to the child whose centroid is nearest.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tinylm.store import PathLike, StateMismatch, read_file, write_file

Embed = Callable[[Sequence[str]], np.ndarray]
WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)?")
AT_ONCE = 4096  # texts or rows worked on at a time


class MemoriesError(ValueError):
    """Something about clusters or a bank that cannot be used; the message names it and the remedy."""


def texts_of(texts: Sequence[str], name: str = "texts") -> list[str]:
    """The texts as a list. Raises MemoriesError for one text, which is a sequence of letters, and for what is none."""
    if isinstance(texts, str):
        raise MemoriesError(f"{name} = {texts[:40]!r} is one text: give a list of texts")
    texts = list(texts)
    if wrong := [f"{name}[{i}] = {text!r}" for i, text in enumerate(texts) if not isinstance(text, str)]:
        raise MemoriesError(f"{wrong[0][:80]}: must be a text")
    return texts


def words(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return WORD.findall(text.lower())


def unit(x: np.ndarray) -> np.ndarray:
    """Rows of length 1, float32; rows of zeros stay."""
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    return (x / np.where(norm > 0, norm, 1)).astype(np.float32)


class TfIdf:
    """Words weighed by rarity, then the directions that explain most: (texts, dims), rows of length 1.

    A word counts 1 + log(times), times log((1 + n) / (1 + texts with it)) + 1, rows scaled to length 1 (Salton and
    Buckley 1988, scikit-learn's smoothing); then a randomised SVD (Halko et al. 2011). Words in fewer than `least`
    texts, and all but the `most` commonest, are left out.
    """

    kind = "tfidf"

    def __init__(self, texts: Sequence[str], *, dims: int = 64, most: int = 20_000, least: int = 2, seed: int = 0):
        texts = texts_of(texts)
        seen = Counter(word for text in texts for word in set(words(text)))
        kept = sorted((word for word, n in seen.items() if n >= least), key=lambda word: (-seen[word], word))[:most]
        if not kept:
            raise MemoriesError(f"no word occurs in {least} of {len(texts)} texts: give more texts, or least=1")
        self.vocabulary = {word: i for i, word in enumerate(kept)}
        self.idf = np.log((1 + len(texts)) / (1 + np.array([seen[word] for word in kept]))) + 1
        self.components = components(self.weights(texts), dims, seed)

    def weights(self, texts: Sequence[str]) -> Any:
        """The sparse (texts, words) matrix before the SVD."""
        from scipy import sparse  # comes with JAX

        ends, columns, values = [0], [], []
        for text in texts:
            found = Counter(i for word in words(text) if (i := self.vocabulary.get(word)) is not None)
            row = (1 + np.log(np.array(list(found.values()), float))) * self.idf[list(found)]
            columns += found
            values.append(row / (np.linalg.norm(row) or 1.0))
            ends.append(len(columns))
        flat = np.concatenate(values) if values else np.zeros(0)
        shape = (len(ends) - 1, len(self.vocabulary))
        return sparse.csr_matrix((flat, np.array(columns, np.int64), np.array(ends)), shape=shape)

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        return unit(self.weights(list(texts)) @ self.components.T)

    def arrays(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """What `saved` makes it from again."""
        return {"idf": self.idf, "components": self.components}, {"vocabulary": list(self.vocabulary)}

    @classmethod
    def saved(cls, arrays: dict[str, np.ndarray], about: dict[str, Any]) -> TfIdf:
        """The embedding that gave these `arrays`."""
        made = cls.__new__(cls)
        made.vocabulary = {word: i for i, word in enumerate(about["vocabulary"])}
        made.idf, made.components = arrays["idf"], arrays["components"]
        return made


def components(x: Any, dims: int, seed: int) -> np.ndarray:
    """The (dims, columns) leading right singular vectors of a matrix, by four rounds of subspace iteration."""
    dims = min(dims, *x.shape)
    rng = np.random.default_rng(seed)
    basis = x.T @ (x @ rng.normal(size=(x.shape[1], min(dims + 10, *x.shape))))
    for _ in range(4):
        basis = x.T @ (x @ np.linalg.qr(basis)[0])
    basis = np.linalg.qr(basis)[0]
    _, _, right = np.linalg.svd(x @ basis, full_matrices=False)
    return (right @ basis.T)[:dims]


class States:
    """Mean of a model's own states over a text, rows of length 1. An encoder loaded from elsewhere serves too.

    Args:
        model: with a tokenizer. site: whose values are averaged, see `tinylm.sites`; "norm" is what the head reads.
        batch: texts at a time; of each the first `context` tokens are read.
    """

    kind = "states"

    def __init__(self, model: Any, site: str = "norm", *, batch: int = 64):
        if model.tokenizer is None:
            raise MemoriesError("a model without a tokenizer cannot read texts: set model.tokenizer")
        if not isinstance(batch, int) or batch < 1:
            raise MemoriesError(f"batch = {batch!r}: must be a number of texts")
        self.model, self.site, self.batch = model, site, batch

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        import jax

        from tinylm.taps import recording
        from tinylm.weights import bind, pure

        graph, params = pure(self.model)

        @jax.jit
        def mean(params: Any, tokens: Any, real: Any) -> Any:
            seen: dict[str, Any] = {}
            segments = real.astype(np.int32) if self.model.config.kind == "encoder" else None
            bind(graph, params)(tokens, segments=segments, tap=recording(seen, re.escape(self.site)))
            return (seen[self.site] * real[..., None]).sum(1) / real.sum(1, keepdims=True)

        found, context = [], self.model.config.context
        for at in range(0, len(texts), self.batch):
            ids = [self.model.tokenizer.encode(text)[:context] for text in texts[at : at + self.batch]]
            tokens, real = np.zeros((self.batch, context), np.int32), np.zeros((self.batch, context), np.float32)
            for row, own in enumerate(ids):
                tokens[row, : len(own)], real[row, : max(1, len(own))] = own, 1
            found.append(np.asarray(mean(params, tokens, real))[: len(ids)])
        return unit(np.concatenate(found)) if found else np.zeros((0, self.model.config.width), np.float32)


# --- the tree ---------------------------------------------------------------------------------------------------------


def distances(x: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """(rows, centroids) squared Euclidean, without the rows' own norm, which changes no comparison."""
    return (centroids**2).sum(1) - 2 * x @ centroids.T


def begin(x: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """k-means++ (Arthur and Vassilvitskii 2007): each next centroid a row drawn by its squared distance."""
    chosen = [int(rng.integers(len(x)))]
    near = ((x - x[chosen[0]]) ** 2).sum(1)
    for _ in range(k - 1):
        total = near.sum()
        chosen.append(int(rng.choice(len(x), p=near / total) if total > 0 else rng.integers(len(x))))
        near = np.minimum(near, ((x - x[chosen[-1]]) ** 2).sum(1))
    return x[chosen].astype(np.float32)


def balanced(labels: np.ndarray, k: int, most: float, rng: np.random.Generator) -> np.ndarray:
    """Labels of which none has more than most / k of all, most above 1: as long as one has, it shares out its rows
    evenly, and at random, with the smallest.
    """
    labels = labels.copy()
    while True:
        sizes = np.bincount(labels, minlength=k)
        large, small = int(sizes.argmax()), int(sizes.argmin())
        if sizes[large] <= max(most * len(labels) / k, sizes[small] + 1):
            return labels
        labels[rng.choice(np.flatnonzero(labels == large), (sizes[large] - sizes[small]) // 2, replace=False)] = small


def kmeans(
    x: np.ndarray, k: int, *, steps: int = 20, most: float = 1.5, sample: int = 6400, seed: int = 0
) -> np.ndarray:
    """(k, dims) centroids of balanced k-means: `steps` rounds, each on `sample` rows drawn anew (all, if fewer).

    A round assigns the rows to their nearest centroid, evens out the assignments (`balanced`), and moves each centroid
    to the mean of its rows; one without rows goes to a row drawn at random.
    """
    rng = np.random.default_rng(seed)
    centroids = begin(x if len(x) <= sample else x[rng.choice(len(x), sample, replace=False)], k, rng)
    for _ in range(steps):
        rows = x if len(x) <= sample else x[rng.choice(len(x), sample, replace=False)]
        labels = balanced(distances(rows, centroids).argmin(1), k, most, rng)
        for c in range(k):
            own = rows[labels == c]
            centroids[c] = own.mean(0) if len(own) else rows[rng.integers(len(rows))]
    return centroids


class Tree:
    """A tree of clusters: `children` at every node, `depth` levels; node n of a level has children n k .. n k + k - 1.

    Attributes:
        children, depth: its shape. embed: texts -> (texts, dims).
        centroids: of each level, (children ** level, dims) float32.
    """

    def __init__(self, embed: Embed | None, centroids: Sequence[np.ndarray]):
        self.embed, self.centroids = embed, [np.asarray(c, np.float32) for c in centroids]
        self.children, self.depth = len(self.centroids[0]), len(self.centroids)

    @classmethod
    def fit(
        cls,
        texts: Sequence[str],
        *,
        children: int = 8,
        depth: int = 2,
        embed: Embed | None = None,
        steps: int = 20,
        most: float = 1.5,
        sample: int = 6400,
        seed: int = 0,
    ) -> Tree:
        """Cluster texts.

        Args:
            texts: to learn from; no text of a test belongs here.
            embed: default `TfIdf` of these texts. steps, most, sample: see `kmeans`.

        Raises:
            MemoriesError: fewer texts than children, settings out of range, or an embedding that is not (texts, dims)
                and finite.
        """
        texts = texts_of(texts)
        for name, value, least in (("children", children, 2), ("depth", depth, 1), ("steps", steps, 0)):
            if not isinstance(value, int | np.integer) or value < least:
                raise MemoriesError(f"{name} = {value!r}: must be a whole number of at least {least}")
        if len(texts) < children:
            raise MemoriesError(f"children = {children}: {len(texts)} texts cannot be clustered so")
        if not isinstance(sample, int | np.integer) or sample < children:
            raise MemoriesError(f"sample = {sample!r}: must be a number of texts, one for each of {children} children")
        if not most > 1:
            raise MemoriesError(f"most = {most!r}: must be above 1, the even share of a cluster")
        embed = TfIdf(texts, seed=seed) if embed is None else embed
        x = embedded(embed, texts)
        centroids, labels = [], np.zeros(len(x), np.int64)
        for level in range(depth):
            found = np.empty((children ** (level + 1), x.shape[1]), np.float32)
            after = np.empty_like(labels)
            for node in range(children**level):
                own, room = np.flatnonzero(labels == node), slice(node * children, (node + 1) * children)
                if not len(own):  # nothing was led here: what is later goes to the first child
                    found[room] = centroids[-1][node]
                    continue
                how = {"steps": steps, "most": most, "sample": sample, "seed": seed + (node << 4) + level}
                found[room] = kmeans(x[own], children, **how)
                after[own] = node * children + distances(x[own], found[room]).argmin(1)
            centroids.append(found)
            labels = after
        return cls(embed, centroids)

    def find(self, texts: Sequence[str]) -> np.ndarray:
        """(texts, depth) int32: the nodes on each text's way down."""
        if self.embed is None:
            raise MemoriesError("this tree was loaded without its embedding: Tree.load(path, embed=...)")
        return self.descend(embedded(self.embed, texts_of(texts)))

    def descend(self, x: np.ndarray) -> np.ndarray:
        """(rows, depth) int32: at each level the child with the nearest centroid, of those of the node above.

        Raises MemoriesError unless x is (rows, dims), dims those of the centroids.
        """
        if (len(x) and x.shape[-1] != self.centroids[0].shape[1]) or x.ndim != 2:
            raise MemoriesError(f"x {x.shape}: this tree is of embeddings of {self.centroids[0].shape[1]} dims")
        nodes = np.zeros((len(x), self.depth), np.int32)
        above = np.zeros(len(x), np.int64)
        for level, table in enumerate(self.centroids):
            groups = table.reshape(-1, self.children, table.shape[1])
            for at in range(0, len(x), AT_ONCE):
                rows, own = x[at : at + AT_ONCE], groups[above[at : at + AT_ONCE]]
                near = (own**2).sum(2) - 2 * np.einsum("nd,nkd->nk", rows, own)
                above[at : at + AT_ONCE] = above[at : at + AT_ONCE] * self.children + near.argmin(1)
            nodes[:, level] = above
        return nodes

    @property
    def sha256(self) -> str:
        """Of the centroids: two trees of one hash lead the same embedding to the same nodes."""
        return hashlib.sha256(b"".join(c.tobytes() for c in self.centroids)).hexdigest()

    def save(self, path: PathLike) -> None:
        """Write the tree, and its embedding where that is `TfIdf`, to one file that knows its own hash."""
        arrays = {f"centroids.{i}": c for i, c in enumerate(self.centroids)}
        about: dict[str, Any] = {"kind": getattr(self.embed, "kind", "callable"), "depth": self.depth}
        if isinstance(self.embed, TfIdf):
            more, said = self.embed.arrays()
            arrays, about = arrays | more, about | said
        write_file(path, arrays, {"tree": about})

    @classmethod
    def load(cls, path: PathLike, embed: Embed | None = None) -> Tree:
        """A tree made by `save`; `embed` is needed where it was a model or a function. Raises what `read_file` does."""
        arrays, about = read_file(path)
        if "tree" not in about:
            raise StateMismatch(f"{path} holds no tree of clusters")
        about = about["tree"]
        if embed is None and about["kind"] == "tfidf":
            embed = TfIdf.saved(arrays, about)
        return cls(embed, [arrays[f"centroids.{i}"] for i in range(about["depth"])])

    def __repr__(self) -> str:
        kind = getattr(self.embed, "kind", "none" if self.embed is None else "callable")
        return f"Tree({self.children} children, depth {self.depth}, {self.children**self.depth:,} leaves, {kind})"


def embedded(embed: Embed, texts: list[str]) -> np.ndarray:
    """(texts, dims) float32 from any embedding. Raises MemoriesError where that gives something else."""
    x = np.asarray(embed(texts), np.float32)
    if x.ndim != 2 or len(x) != len(texts) or not np.isfinite(x).all():
        raise MemoriesError(
            f"the embedding gave {x.shape} for {len(texts)} texts: (texts, dims), all finite, is needed"
        )
    return x


# --- beside the shards ------------------------------------------------------------------------------------------------


def write_nodes(tokens: Any, nodes: np.ndarray, tree: Tree) -> Path:
    """Keep the nodes of a split's documents beside its shards, in one hashed file that names the split and the tree.

    Raises MemoriesError for tokens in memory, or other numbers of documents.
    """
    if tokens.folder is None:
        raise MemoriesError("these tokens are in memory: write_tokens puts them into a folder")
    nodes = np.asarray(nodes)
    if nodes.shape != (tokens.documents, tree.depth):
        raise MemoriesError(f"nodes {nodes.shape} for {tokens.documents} documents and {tree.depth} levels")
    path = Path(tokens.folder) / f"{tokens.split}-nodes.safetensors"
    about = {"tokens": tokens.sha256, "tree": tree.sha256, "children": tree.children}
    write_file(path, {"nodes": np.asarray(nodes, np.int32)}, about)
    return path


def read_nodes(tokens: Any, tree: Tree | None = None) -> np.ndarray:
    """What `write_nodes` kept. Raises FileNotFoundError, and StateMismatch where tokens or tree are others by now."""
    if tokens.folder is None:
        raise MemoriesError("these tokens are in memory: nothing lies beside them")
    path = Path(tokens.folder) / f"{tokens.split}-nodes.safetensors"
    arrays, about = read_file(path)
    for name, sha in (("tokens", tokens.sha256), ("tree", tree.sha256 if tree else about.get("tree"))):
        if about.get(name) != sha:
            raise StateMismatch(f"{path} was made for other {name}: run write_nodes again")
    return arrays["nodes"]
