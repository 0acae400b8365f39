"""The slow twin of `tinylm.model`: the papers' equations in float64 NumPy, one text at a time.

Written from the papers (Vaswani 2017, Devlin 2018, Su 2021, Shazeer 2020, Ainslie 2023, Zhang and Sennrich 2019, the
GPT-NeoX and Gemma 2 reports), not from the model's code. Parameters come by the kit's names.
"""

import numpy as np
from scipy.special import erf

SQRT2, SQRT2PI = np.sqrt(2.0), np.sqrt(2.0 / np.pi)
ACTIVATION = {
    "swiglu": lambda x: x / (1 + np.exp(-x)),
    "geglu": lambda x: 0.5 * x * (1 + erf(x / SQRT2)),
    "reglu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: 0.5 * x * (1 + erf(x / SQRT2)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(SQRT2PI * (x + 0.044715 * x**3))),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
}


class NumpyModel:
    """`NumpyModel(config, params)(tokens)` -> (T, V) logits of one text; `pattern[layer]` (H, T, T) stays behind."""

    def __init__(self, config, params):
        self.c = config
        self.p = {name: np.asarray(value, np.float64) for name, value in params.items()}
        self.pattern = {}

    def linear(self, name, x):
        return x @ self.p[f"{name}.kernel"] + self.p.get(f"{name}.bias", 0.0)

    def norm(self, name, x):
        if self.c.norm == "rmsnorm":
            return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + self.c.norm_eps) * self.p[f"{name}.scale"]
        z = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + self.c.norm_eps)
        return z * self.p[f"{name}.scale"] + self.p[f"{name}.bias"]

    def head_norm(self, name, x):
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + self.c.norm_eps) * self.p[f"{name}.scale"]

    def turn(self, x, positions):
        """Features i and i + E/2 are one complex number, turned by position * theta^(-2i/E)."""
        if self.c.rotary and self.c.rotary < x.shape[-1]:
            return np.concatenate([self.turn(x[..., : self.c.rotary], positions), x[..., self.c.rotary :]], -1)
        half = x.shape[-1] // 2
        angle = np.array([[m * self.c.theta ** (-2 * i / (2 * half)) for i in range(half)] for m in positions])
        z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)
        return np.concatenate([z.real, z.imag], -1)

    def attention(self, layer, x, positions, segments):
        c, name, t = self.c, f"blocks.{layer}.attn", len(x)
        q = self.linear(f"{name}.q", x).reshape(t, c.heads, c.head_width).transpose(1, 0, 2)
        k = self.linear(f"{name}.k", x).reshape(t, c.kv_heads, c.head_width).transpose(1, 0, 2)
        v = self.linear(f"{name}.v", x).reshape(t, c.kv_heads, c.head_width).transpose(1, 0, 2)
        if c.qk_norm:
            q, k = self.head_norm(f"{name}.q_norm", q), self.head_norm(f"{name}.k_norm", k)
        if c.at("positions", layer) == "rope":
            q, k = self.turn(q, positions), self.turn(k, positions)
        window = c.at("window", layer) or t + 1
        out, patterns = [], []
        for h in range(c.heads):
            shared = h // (c.heads // c.kv_heads)
            scores = q[h] @ k[shared].T * (c.attention_scale or 1 / np.sqrt(c.head_width))
            for i in range(t):
                for j in range(t):
                    late = c.kind == "decoder" and j > i
                    other = segments is not None and segments[i] != segments[j]
                    if late or other or abs(i - j) >= window:
                        scores[i, j] = -np.inf
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            patterns.append(weights / weights.sum(-1, keepdims=True))
            out.append(patterns[-1] @ v[shared])
        self.pattern[layer] = np.array(patterns)
        return self.linear(f"{name}.o", np.concatenate(out, -1))

    def mlp(self, layer, x):
        name, act = f"blocks.{layer}.mlp", ACTIVATION[self.c.mlp]
        if self.c.mlp in ("swiglu", "geglu", "reglu"):
            return self.linear(f"{name}.down", act(self.linear(f"{name}.gate", x)) * self.linear(f"{name}.up", x))
        return self.linear(f"{name}.down", act(self.linear(f"{name}.up", x)))

    def row(self, name, ids):
        """Rows of a table, expanded by its matrix where it is a factored one."""
        x = self.p[f"{name}.table"][np.asarray(ids)]
        return x @ self.p[f"{name}.expand.kernel"] if self.c.embed_rank else x

    def front(self, x):
        """(T, D) as an image; convolutions written out, batch norm by the population, GELU."""
        x = x[..., None]
        for i in range(self.c.convs + 1):
            kernel, norm = self.p[f"front.convs.{i}.kernel"], f"front.batch.{i}"
            a, b = kernel.shape[:2]
            wide = np.pad(x, (((a - 1) // 2, a // 2), ((b - 1) // 2, b // 2), (0, 0)))
            cells = ((u, v) for u in range(a) for v in range(b))
            y = sum(wide[u : u + x.shape[0], v : v + x.shape[1]] @ kernel[u, v] for u, v in cells)
            y = y + self.p[f"front.convs.{i}.bias"]
            y = (y - self.p[f"{norm}.mean"]) / np.sqrt(self.p[f"{norm}.var"] + 1e-5)
            x = ACTIVATION["gelu"](y * self.p[f"{norm}.scale"] + self.p[f"{norm}.bias"])
        return x[..., 0]

    def embbert(self, b, x, segments):
        """exp(q1 k1) attention - exp(q2 k2) convolution of the normed input (EmbBERT-Q, 2502.10001)."""
        x = self.norm(f"{b}.attn_norm", x)
        q1, k1, q2, k2 = self.p[f"{b}.mix.table"]
        scores = self.linear(f"{b}.attn.q", x) @ x.T / np.sqrt(x.shape[1])
        if segments is not None:
            scores = np.where(np.asarray(segments)[:, None] == np.asarray(segments)[None], scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        attended = self.linear(f"{b}.attn.o", weights / weights.sum(-1, keepdims=True) @ x)
        kernel, y = self.p[f"{b}.conv.kernel"], np.zeros((len(x), self.c.hidden))
        for t in range(len(x)):
            for c in range(self.c.hidden):
                source = x[:, c // (self.c.hidden // self.c.width)]
                y[t, c] = sum(kernel[j, c] * source[t - j] for j in range(min(len(kernel), t + 1)))
        y = y + self.p[f"{b}.conv.bias"]
        return np.exp(q1 @ k1) * attended - np.exp(q2 @ k2) * self.linear(f"{b}.conv.down", y / (1 + np.exp(-y)))

    def pooled(self, x, segments):
        """What a classifier reads of the (T, D) features."""
        real = np.ones(len(x), bool) if segments is None else np.asarray(segments) > 0
        if self.c.pooling == "attention":
            scores = np.where(real, self.linear("head.score", x)[:, 0], -np.inf)
            weights = np.exp(scores - scores.max())
            return weights / weights.sum() @ x
        return {"cls": x[0], "mean": x[real].mean(0), "last": x[real.sum() - 1]}[self.c.pooling]

    def __call__(self, tokens, positions=None, segments=None, types=None):
        c, p = self.c, self.p
        positions = range(len(tokens)) if positions is None else positions
        x = self.row("embed", tokens)
        if c.at("positions", 0) == "learned":
            x = x + self.row("embed_positions", list(positions))
        if c.block == "embbert" and types is None:
            real = np.ones(len(tokens), int) if segments is None else np.asarray(segments)
            types = [0 if not r else 2 if i + 1 == len(real) or not real[i + 1] else 1 for i, r in enumerate(real)]
        if c.token_types:
            x = x + p["embed_types.table"][np.zeros(len(tokens), int) if types is None else types]
        if c.embed_norm:
            x = self.norm("embed_norm", x)
        if c.convs:
            x = self.front(x)
        for i in range(c.layers):
            b = f"blocks.{i}"
            if c.block == "embbert":
                x = self.embbert(b, x, segments)
            elif c.block == "pre":
                x = x + self.attention(i, self.norm(f"{b}.attn_norm", x), positions, segments)
                x = x + self.mlp(i, self.norm(f"{b}.mlp_norm", x))
            elif c.block == "post":
                x = self.norm(f"{b}.attn_norm", x + self.attention(i, x, positions, segments))
                x = self.norm(f"{b}.mlp_norm", x + self.mlp(i, x))
            else:
                attended = self.attention(i, self.norm(f"{b}.attn_norm", x), positions, segments)
                x = x + attended + self.mlp(i, self.norm(f"{b}.mlp_norm", x))
        if c.block not in ("post", "embbert"):
            x = self.norm("norm", x)
        if c.head == "tied":
            logits = x @ p["embed.table"].T
        elif c.head == "untied":
            logits = self.linear("head.out", x)
        elif c.head == "classes":
            pooled = self.pooled(x, segments)
            logits = self.linear("head.out", np.tanh(self.linear("head.dense", pooled)) if c.pooler else pooled)
        elif c.head == "none":
            logits = x
        else:
            z = self.linear("head.dense", x)
            logits = self.norm("head.norm", ACTIVATION["gelu"](z)) @ p["embed.table"].T + p["head.bias"]
        return c.softcap * np.tanh(logits / c.softcap) if c.softcap else logits


def random_params(shapes, seed=0):
    """Random values for every parameter, also for those that start at 0 or 1; large enough that nothing is linear."""
    rng = np.random.default_rng(seed)
    centre = lambda name: 1.0 if name.endswith("scale") else 3.0 if name.endswith(".var") else 0.0  # noqa: E731
    spread = lambda name, s: 1.5 * s.shape[0] ** -0.5 if name.endswith("kernel") else 0.5  # noqa: E731
    return {
        name: (centre(name) + spread(name, s) * rng.standard_normal(s.shape)).astype(np.float32)
        for name, s in sorted(shapes.items())
    }
