"""A throw-away reader of llama2.c's first file format and a NumPy forward pass of it, for the tests alone.

The model file: seven int32 (dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len; a negative vocab_size
marks an unshared classifier), then float32 arrays in a fixed order, matrices as (outputs, inputs). Rotary positions
turn neighbours: features 2i and 2i + 1 of a head. The tokenizer file: int32 longest token, then per token a float32
score, an int32 length and the bytes; text is merged greedily by score, bytes without a token become ids 3 to 258.
"""

import functools
import gzip
import itertools
import re
import struct
from typing import NamedTuple

import numpy as np

from tinylm.config import ModelConfig


def read_bytes(path):
    raw = path.read_bytes()
    return gzip.decompress(raw) if path.suffix == ".gz" else raw


class Llama(NamedTuple):
    dim: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    context: int
    w: dict

    @property
    def head(self):
        return self.dim // self.heads


def read_model(path) -> Llama:
    raw = read_bytes(path)
    dim, hidden, layers, heads, kv_heads, vocab, context = struct.unpack("<7i", raw[:28])
    values, kv, shared, vocab = np.frombuffer(raw, "<f4", offset=28), dim // heads * kv_heads, vocab > 0, abs(vocab)
    order = {
        "embedding": (vocab, dim),
        "rms_att": (layers, dim),
        "wq": (layers, dim, dim),
        "wk": (layers, kv, dim),
        "wv": (layers, kv, dim),
        "wo": (layers, dim, dim),
        "rms_ffn": (layers, dim),
        "w1": (layers, hidden, dim),
        "w2": (layers, dim, hidden),
        "w3": (layers, hidden, dim),
        "rms_final": (dim,),
        "freq_cis_real": (context, dim // heads // 2),
        "freq_cis_imag": (context, dim // heads // 2),
    }
    if not shared:
        order["classifier"] = (vocab, dim)
    w, at = {}, 0
    for name, shape in order.items():
        size = int(np.prod(shape))
        w[name] = values[at : at + size].reshape(shape)
        at += size
    assert at == len(values), "the file has another length than its header says"
    return Llama(dim, hidden, layers, heads, kv_heads, vocab, context, w)


def forward(m: Llama, tokens) -> np.ndarray:
    """(T, V) logits of one text, float64."""
    w, t = m.w, len(tokens)
    rms = lambda x, scale: x / np.sqrt(np.mean(x * x, -1, keepdims=True) + 1e-5) * scale  # noqa: E731
    turn = (w["freq_cis_real"] + 1j * w["freq_cis_imag"].astype(np.float64))[:t, None]

    def rotary(x):
        z = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
        return np.stack([z.real, z.imag], -1).reshape(x.shape)

    x = w["embedding"][tokens].astype(np.float64)
    later = np.triu(np.full((t, t), -np.inf), 1)
    for i in range(m.layers):
        y = rms(x, w["rms_att"][i])
        q = rotary((y @ w["wq"][i].T).reshape(t, m.heads, m.head))
        k = rotary((y @ w["wk"][i].T).reshape(t, m.kv_heads, m.head)).repeat(m.heads // m.kv_heads, 1)
        v = (y @ w["wv"][i].T).reshape(t, m.kv_heads, m.head).repeat(m.heads // m.kv_heads, 1)
        scores = np.einsum("the,she->hts", q, k) / np.sqrt(m.head) + later
        pattern = np.exp(scores - scores.max(-1, keepdims=True))
        pattern /= pattern.sum(-1, keepdims=True)
        x = x + np.einsum("hts,she->the", pattern, v).reshape(t, m.dim) @ w["wo"][i].T
        y = rms(x, w["rms_ffn"][i])
        gate = y @ w["w1"][i].T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ w["w3"][i].T)) @ w["w2"][i].T
    return rms(x, w["rms_final"]) @ w.get("classifier", w["embedding"]).T


def to_tinylm(m: Llama) -> tuple[ModelConfig, dict]:
    """The settings and the parameters by the kit's names; rows of q and k from interleaved to half-split."""

    def halves(x, heads):
        return x.reshape(heads, m.head // 2, 2, m.dim).swapaxes(1, 2).reshape(-1, m.dim)

    config = ModelConfig(
        vocab=m.vocab,
        context=m.context,
        width=m.dim,
        layers=m.layers,
        heads=m.heads,
        kv_heads=m.kv_heads,
        hidden=m.hidden,
        head="untied" if "classifier" in m.w else "tied",
    )
    params = {"embed.table": m.w["embedding"], "norm.scale": m.w["rms_final"]}
    if "classifier" in m.w:
        params["head.out.kernel"] = m.w["classifier"].T
    for i in range(m.layers):
        w = {name: value[i] for name, value in m.w.items() if name[0] in "rw" and name != "rms_final"}
        w["wq"], w["wk"] = halves(w["wq"], m.heads), halves(w["wk"], m.kv_heads)
        theirs = {"attn.q": "wq", "attn.k": "wk", "attn.v": "wv", "attn.o": "wo"}
        theirs |= {"mlp.gate": "w1", "mlp.down": "w2", "mlp.up": "w3"}
        params |= {f"blocks.{i}.{ours}.kernel": w[name].T for ours, name in theirs.items()}
        params |= {f"blocks.{i}.attn_norm.scale": w["rms_att"], f"blocks.{i}.mlp_norm.scale": w["rms_ffn"]}
    return config, params


class Pieces:
    """tokenizer.bin: `encode` (no begin token; one space in front, as sentencepiece has it) and `decode`."""

    BEGIN, BYTES = 1, 3  # ids 0, 1, 2 are unknown, begin, end; 3 to 258 are the bytes

    def __init__(self, path, vocab):
        raw, at = read_bytes(path), 4
        self.scores, self.pieces = [], []
        for _ in range(vocab):
            score, length = struct.unpack_from("<fi", raw, at)
            self.scores.append(score)
            self.pieces.append(raw[at + 8 : at + 8 + length])
            at += 8 + length
        # The byte tokens may carry the same text as true tokens, so they are no candidates.
        self.ids = {piece: i for i, piece in enumerate(self.pieces) if i >= self.BYTES + 256}

    def encode(self, text):
        """Word by word: no piece of these vocabularies holds a space anywhere but in front."""
        return [i for word in re.findall(r" [^ ]*", " " + text) for i in self.word(word)]

    @functools.cache  # noqa: B019 (lives as long as the tests)
    def word(self, text):
        ids = []
        for char in text:
            raw = char.encode()
            ids += [self.ids[raw]] if raw in self.ids else [self.BYTES + b for b in raw]
        while True:
            pairs = [
                (self.ids.get(self.pieces[a] + self.pieces[b]), i) for i, (a, b) in enumerate(itertools.pairwise(ids))
            ]
            pairs = [(self.scores[joined], -i, joined) for joined, i in pairs if joined is not None]
            if not pairs:
                return ids
            _, i, joined = max(pairs)
            ids[-i : -i + 2] = [joined]
