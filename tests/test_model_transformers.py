"""Our model against Hugging Face's, with the same random weights: Llama, GPT-Neo, GPT-NeoX and BERT.

Needs `torch` and `transformers`, which the kit itself never does; without them these tests are skipped.
"""

import jax
import numpy as np
import pytest

from tinylm.config import ModelConfig
from tinylm.model import Transformer, shapes
from tinylm.weights import bind, pure

torch = pytest.importorskip("torch", reason="torch is not installed: no second opinion from Hugging Face")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # theirs are not ours to mend

SMALL = {"vocab": 61, "context": 24, "width": 32, "layers": 3, "heads": 4, "hidden": 48}
TOKENS = np.random.default_rng(0).integers(0, 61, (2, 20)).astype(np.int32)
THEIRS = {"vocab_size": 61, "max_position_embeddings": 24, "hidden_size": 32, "intermediate_size": 48}
HEADS = {"num_hidden_layers": 3, "num_attention_heads": 4}
NORM = {"scale": "weight", "bias": "bias"}


def llama():
    config = transformers.LlamaConfig(**THEIRS, **HEADS, num_key_value_heads=2, rms_norm_eps=1e-5)
    rows = {"embed": "model.embed_tokens", "norm": "model.norm", "head.out": "lm_head"}
    for i in range(3):
        a, b = f"blocks.{i}", f"model.layers.{i}"
        rows |= {f"{a}.attn.{x}": f"{b}.self_attn.{x}_proj" for x in "qkvo"}
        rows |= {f"{a}.mlp.{x}": f"{b}.mlp.{x}_proj" for x in ("gate", "up", "down")}
        rows |= {f"{a}.attn_norm": f"{b}.input_layernorm", f"{a}.mlp_norm": f"{b}.post_attention_layernorm"}
    return transformers.LlamaForCausalLM(config), rows, ModelConfig(**SMALL, kv_heads=2, head="untied")


def neo():
    layers = {"num_layers": 3, "num_heads": 4, "window_size": 5}
    layers["attention_types"] = [[["global", "local", "global"], 1]]
    config = transformers.GPTNeoConfig(**THEIRS, **layers)
    rows = {"embed": "transformer.wte", "embed_positions": "transformer.wpe", "norm": "transformer.ln_f"}
    for i in range(3):
        a, b = f"blocks.{i}", f"transformer.h.{i}"
        rows |= {f"{a}.attn.{x}": f"{b}.attn.attention.{x}_proj" for x in "qkv"}
        rows |= {f"{a}.attn.o": f"{b}.attn.attention.out_proj"}
        rows |= {f"{a}.mlp.up": f"{b}.mlp.c_fc", f"{a}.mlp.down": f"{b}.mlp.c_proj"}
        rows |= {f"{a}.attn_norm": f"{b}.ln_1", f"{a}.mlp_norm": f"{b}.ln_2"}
    options = {"positions": "learned", "window": (0, 5), "attention_scale": 1.0, "bias": True, "qkv_bias": False}
    ours = ModelConfig(**SMALL, norm="layernorm", mlp="gelu_tanh", **options)
    return transformers.GPTNeoForCausalLM(config), rows, ours


def neox():
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 1.0}
    config = transformers.GPTNeoXConfig(**THEIRS, **HEADS, rope_parameters=rope, use_parallel_residual=True)
    rows = {"embed": "gpt_neox.embed_in", "norm": "gpt_neox.final_layer_norm", "head.out": "lm_head"}
    for i in range(3):
        a, b = f"blocks.{i}", f"gpt_neox.layers.{i}"
        rows |= {f"{a}.attn.{x}": f"{b}.attention.query_key_value" for x in "qkv"}
        rows |= {f"{a}.attn.o": f"{b}.attention.dense"}
        rows |= {f"{a}.mlp.up": f"{b}.mlp.dense_h_to_4h", f"{a}.mlp.down": f"{b}.mlp.dense_4h_to_h"}
        rows |= {f"{a}.attn_norm": f"{b}.input_layernorm", f"{a}.mlp_norm": f"{b}.post_attention_layernorm"}
    ours = ModelConfig(**SMALL, norm="layernorm", block="parallel", mlp="gelu", head="untied", bias=True)
    return transformers.GPTNeoXForCausalLM(config), rows, ours


def bert():
    config = transformers.BertConfig(**THEIRS, **HEADS, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    e = "bert.embeddings"
    rows = {"embed": f"{e}.word_embeddings", "embed_positions": f"{e}.position_embeddings"}
    rows |= {"embed_types": f"{e}.token_type_embeddings", "embed_norm": f"{e}.LayerNorm"}
    rows |= {"head.dense": "cls.predictions.transform.dense", "head.norm": "cls.predictions.transform.LayerNorm"}
    rows |= {"head": "cls.predictions"}
    for i in range(3):
        a, b = f"blocks.{i}", f"bert.encoder.layer.{i}"
        names = {"q": "query", "k": "key", "v": "value"}
        rows |= {f"{a}.attn.{x}": f"{b}.attention.self.{y}" for x, y in names.items()}
        rows |= {f"{a}.attn.o": f"{b}.attention.output.dense", f"{a}.attn_norm": f"{b}.attention.output.LayerNorm"}
        rows |= {f"{a}.mlp.up": f"{b}.intermediate.dense", f"{a}.mlp.down": f"{b}.output.dense"}
        rows |= {f"{a}.mlp_norm": f"{b}.output.LayerNorm"}
    options = {"head": "mlm", "bias": True, "embed_norm": True, "token_types": 2, "norm_eps": 1e-12}
    ours = ModelConfig(
        **SMALL, kind="encoder", norm="layernorm", block="post", mlp="gelu", positions="learned", **options
    )
    return transformers.BertForMaskedLM(config), rows, ours


def converted(state, rows, config):
    """Their parameters by our names; theirs are (outputs, inputs), and NeoX holds q, k, v of each head together."""
    params = {}
    for name, shape in shapes(config).items():
        part, leaf = name.rsplit(".", 1)
        x = state[f"{rows[part]}.{'bias' if leaf == 'bias' else 'weight'}"].numpy()
        if "query_key_value" in rows[part]:
            which = "qkv".index(part[-1])
            x = x.reshape(config.heads, 3, config.head_width, *x.shape[1:])[:, which].reshape(-1, *x.shape[1:])
        params[name] = x.T if leaf == "kernel" else x
        assert params[name].shape == shape.shape, name
    return params


@pytest.mark.parametrize("family", [llama, neo, neox, bert])
def test_hugging_face(family):
    torch.manual_seed(0)
    theirs, rows, config = family()
    with torch.no_grad():
        for name, x in theirs.eval().named_parameters():  # biases and norms too
            x.copy_(torch.randn_like(x) * 0.3 + (1.0 if x.ndim == 1 and name.endswith("weight") else 0.0))
        types = torch.tensor(np.arange(20) // 12, dtype=torch.long).expand(2, 20)
        extra = {"token_type_ids": types} if family is bert else {}
        expected = theirs(torch.tensor(TOKENS, dtype=torch.long), **extra).logits.numpy()
    params = converted(theirs.state_dict(), rows, config)
    graph, _ = pure(Transformer(config))
    kw = {"types": types.numpy().astype(np.int32)} if family is bert else {}
    ours = np.asarray(jax.jit(lambda p, x, kw: bind(graph, p)(x, **kw))(params, TOKENS, kw))
    off = np.abs(ours - expected).max() / np.abs(expected).max()
    print(f"{family.__name__}: largest difference {off:.1e} of the largest logit")
    assert off < 1e-5
