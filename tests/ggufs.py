"""What the tests of GGUF files share: small models of every architecture, llama.cpp, and how it rounds."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from tinylm.config import ModelConfig, Sampling
from tinylm.formats import gguf_models as models
from tinylm.generation import generate_tokens
from tinylm.model import Transformer
from tinylm.tokenizer import Tokenizer
from tinylm.weights import assign, named

DOCS = [
    f"Once upon a time, there was a fox called {i}. \"Hello, y'all!\" it said.\n\n  It's  {i * 7}!" for i in range(200)
]
DECODER = {"context": 64, "width": 32, "layers": 2, "heads": 4}
LAYER = {**DECODER, "norm": "layernorm", "bias": True}
NEOX = {**LAYER, "mlp": "gelu", "head": "untied", "rotary": 2}
BERT = {"kind": "encoder", "block": "post", "mlp": "gelu", "positions": "learned", "embed_norm": True, "token_types": 2}
MODELS = {
    "llama": {**DECODER, "kv_heads": 2, "theta": 500.0},
    "llama biased": {**DECODER, "bias": True, "head": "untied", "head_width": 16},
    "llama qkv": {**DECODER, "qkv_bias": True, "norm_eps": 1e-3},
    "qwen3": {**DECODER, "qk_norm": True, "kv_heads": 1, "head_width": 32},
    "gpt2": {**LAYER, "mlp": "gelu_tanh", "positions": "learned"},
    "gpt2 untied": {**LAYER, "mlp": "gelu_tanh", "positions": "learned", "head": "untied"},
    "gptneox": {**NEOX, "block": "parallel"},
    "gptneox serial": {**NEOX, "rotary": 0},
    "bert": {**LAYER, **BERT, "head": "none"},
    "bert classes": {**LAYER, **BERT, "head": "classes", "classes": 3},
    "bert bare": {**LAYER, **BERT, "head": "none", "bias": False, "token_types": 0},
}
DECODERS = [name for name in MODELS if not name.startswith("bert")]
GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(DOCS, vocab=400)


@pytest.fixture(scope="module")
def bert_tokenizer():
    from tinylm.formats.pieces import wordpieces

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[unused0]", "##", "#", ",", ".", "!", "once", "up", "##on"]
    words += ["a", "time", "fox", "##es", "there", "was", "be", "##ing", "cafe", *"bcdefgxyz0123456789"]
    return Tokenizer.from_json(json.dumps(wordpieces([*words, *(f"##{c}" for c in "abcdefghi0123")], lowercase=True)))


def random(config, tokenizer=None, seed=0):
    """A model with no parameter at its neutral value."""
    rng = np.random.default_rng(seed)
    model = Transformer(config, tokenizer=tokenizer)
    values = {n: 0.1 * rng.standard_normal(x.shape) + n.endswith("scale") for n, x in named(model).items()}
    assign(model, {name: np.asarray(x, np.float32) for name, x in values.items()})
    return model


def made(name, tokenizer, bert_tokenizer, **more):
    words = bert_tokenizer if name.startswith("bert") else tokenizer
    return random(ModelConfig(**{"vocab": words.vocab, **MODELS[name], **more}), words)


def llama_cpp(path, context=0, **settings):
    """llama.cpp with float32 keys and values; one thread, because its threads spin while they wait."""
    there = pytest.importorskip("llama_cpp", reason="llama.cpp is not installed (pip install llama-cpp-python)")
    settings = {"n_threads": 1, "n_threads_batch": 1, "type_k": 0, "type_v": 0, "verbose": False, **settings}
    return there.Llama(str(path), n_ctx=context, **{"logits_all": True, **settings})


def their_logits(llm, ids):
    llm.reset()
    llm.eval([int(i) for i in ids])
    return np.array(llm.scores[: len(ids)])


def their_greedy(llm, ids, count):
    ids = [int(i) for i in ids]
    llm.reset()
    llm.eval(ids)
    for _ in range(count):
        ids.append(int(np.argmax(llm.scores[llm.n_tokens - 1])))
        llm.eval(ids[-1:])
    return ids


def our_greedy(model, ids, count):
    parts = [part[0] for part in generate_tokens(model, [np.array(ids)], tokens=count, sampling=GREEDY)]
    return [int(i) for i in np.concatenate([ids, *parts])]


# llama.cpp rounds what a matrix of 16 or fewer bits is multiplied by, to the type its dot product wants.


def to_half(x):
    return x.astype(jnp.float16).astype(jnp.float32)


def to_bf16(x):
    return x.astype(jnp.bfloat16).astype(jnp.float32)


def to_q8_0(x):
    blocks = np.asarray(x, np.float32).reshape(-1, 32)
    most = np.abs(blocks).max(1, keepdims=True)
    codes = np.rint(blocks * np.where(most > 0, 127 / np.where(most > 0, most, 1), 0))
    return jnp.asarray((codes * (most / np.float32(127)).astype(np.float16).astype(np.float32)).reshape(x.shape))


def to_q8_k(x):
    blocks = np.asarray(x, np.float32).reshape(-1, 256)
    most = np.take_along_axis(blocks, np.abs(blocks).argmax(1)[:, None], 1)
    scale = -127 / np.where(most == 0, 1, most)
    return jnp.asarray((np.minimum(np.rint(blocks * scale), 127) / scale).reshape(x.shape))


@pytest.fixture
def like_llama_cpp(monkeypatch):
    """Make our forward pass round as llama.cpp's does: `inside` the blocks, at the `head`; GELU by a float16 table."""

    def rounding(inside, head):
        from tinylm import model, parts

        def linear(self, x):
            y = (inside if self.rounds else head)(x) @ self.weight()
            return y if self.bias is None else y + self.bias[...]

        monkeypatch.setattr(parts.Linear, "rounds", property(lambda self: id(self) not in heads), raising=False)
        monkeypatch.setattr(parts.Linear, "__call__", linear)
        monkeypatch.setattr(model, "fan", lambda x, *maps: tuple(m(x) for m in maps))
        monkeypatch.setattr(model.TiedHead, "__call__", lambda self, x, table, *_: head(x) @ table.T)

    heads = set()

    def gelu(x):
        x = to_half(x)
        y = 0.5 * x * (1 + jnp.tanh(0.79788456080286535588 * x * (1 + 0.044715 * x * x)))
        return to_half(y)

    def load(path, inside=lambda x: x, head=lambda x: x):
        from tinylm import model

        monkeypatch.setitem(model.ACTIVATIONS, "gelu", gelu)
        monkeypatch.setitem(model.ACTIVATIONS, "gelu_tanh", gelu)
        loaded = models.read(path)
        heads.add(id(getattr(loaded.head, "out", None)))
        rounding(inside, head)
        return loaded

    return load
