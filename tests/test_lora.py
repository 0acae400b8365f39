"""Low-rank adapters against the formula, against peft on a model of another library, and through training and files."""

import jax.numpy as jnp
import numpy as np
import pytest

import tinylm
from tinylm.config import ModelConfig, TrainConfig
from tinylm.techniques import EditError, edit, fold
from tinylm.techniques.lora import ADAPTERS
from tinylm.weights import assign, named

SHAPE = ModelConfig(vocab=40, context=16, width=16, layers=2, heads=2, bias=True)
IDS = np.arange(24, dtype=np.int32).reshape(2, 12)
WHERE = r"blocks\.\d+\.attn\.[qv]"


def adapted(config=SHAPE, **settings):
    """A model with adapters that are not zero."""
    model = edit(tinylm.Transformer(config, rngs=1), WHERE, "lora", rngs=2, **settings)
    values = {name: np.array(value) for name, value in named(model).items()}
    rng = np.random.default_rng(0)
    assign(model, values | {n: rng.normal(size=x.shape) * 0.3 for n, x in values.items() if n.endswith("lora_b")})
    return model


def test_it_starts_as_the_model_it_was():
    plain = tinylm.Transformer(SHAPE, rngs=1)
    before = np.asarray(plain(IDS))
    np.testing.assert_array_equal(edit(plain, WHERE, "lora", rank=4)(IDS), before)
    a = named(plain)["blocks.0.attn.q.lora_a"]
    assert a.shape == (16, 4)
    assert 0.1 < np.abs(a).max() <= 0.25


def test_it_is_the_formula_and_folds():
    model = adapted(rank=3, alpha=6.0)
    q, x = model.blocks[1].attn.q, jnp.asarray(np.random.default_rng(1).normal(size=(5, 16)), np.float32)
    own = {name: np.asarray(value) for name, value in named(q).items()}
    dense = own["inner.kernel"] + 2.0 * own["lora_a"] @ own["lora_b"]
    np.testing.assert_allclose(q.weight(), dense, atol=1e-6)
    np.testing.assert_allclose(q(x), x @ dense + own["inner.bias"], atol=1e-5)
    plain = fold(model)
    assert plain.config.edits == ()
    np.testing.assert_allclose(plain(IDS), model(IDS), atol=2e-5)


def test_only_the_adapters_learn(tmp_path):
    model = edit(tinylm.Transformer(SHAPE, rngs=1), WHERE, "lora", rank=4)
    before = {name: np.array(value) for name, value in named(model).items()}
    tokens = tinylm.Tokens.from_array(np.tile(np.arange(20, dtype=np.uint16), 40), vocab=40)
    config = TrainConfig(steps=30, batch=4, length=12, learning_rate=0.02, warmup=0, rates=ADAPTERS, log_every=30)
    trainer = tinylm.train(model, tokens, config)
    for _ in trainer:
        pass
    after = named(model)
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    assert moved == {name for name in before if ".lora_" in name}
    assert trainer.losses[-1] < trainer.losses[0] - 0.05
    tinylm.save(model, tmp_path / "model")
    np.testing.assert_array_equal(tinylm.load(tmp_path / "model")(IDS), model(IDS))


def test_it_goes_over_a_ternary_matrix_and_not_under_one():
    model = edit(tinylm.Transformer(SHAPE, rngs=1), WHERE, "ternary", activations="int8")
    before = np.asarray(model(IDS))
    np.testing.assert_array_equal(edit(model, WHERE, "lora", rank=2)(IDS), before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank = 0: must be a whole number from 1 to 16"),
        ({"rank": 17}, "rank = 17"),
        ({"rank": 2.0}, "rank = 2.0"),
        ({"alpha": 0.0}, "alpha = 0.0: must be above 0"),
        ({"ranks": 4}, "ranks"),
    ],
)
def test_wrong_settings(settings, message):
    model = tinylm.Transformer(SHAPE, rngs=1)
    with pytest.raises(EditError, match=message):
        edit(model, WHERE, "lora", **settings)
    assert model.config.edits == ()


@pytest.mark.filterwarnings("ignore")  # what the two libraries deprecate of one another
def test_peft_computes_the_same(tmp_path):
    """A Llama of transformers with peft's adapters, and the same model opened here with ours."""
    pytest.importorskip("peft", reason="peft is not installed (pip install peft torch)")
    torch = pytest.importorskip("torch", reason="torch is not installed")
    import peft
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, tie_word_embeddings=True,
    )  # fmt: skip
    other = transformers.LlamaForCausalLM(config).eval()
    other.save_pretrained(tmp_path / "hf")
    rule = peft.LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(other, rule).eval()
    model = edit(tinylm.load(tmp_path / "hf"), WHERE, "lora", rank=4, alpha=12.0)
    values = {name: np.array(value) for name, value in named(model).items()}
    for name, value in theirs.named_parameters():
        if ".lora_" in name:
            _, layer, _, matrix, part, *_ = name.split("layers.")[1].join(("x.", "")).split(".")
            own = f"blocks.{layer}.attn.{matrix[0]}.{part.lower()}"
            assert values[own].shape == tuple(value.T.shape)
            values[own] = value.detach().numpy().T
    assign(model, values)
    with torch.no_grad():
        logits = theirs(torch.tensor(IDS.astype(np.int64))).logits.numpy()
    np.testing.assert_allclose(model(IDS), logits, atol=2e-5)
    np.testing.assert_allclose(fold(model)(IDS), logits, atol=2e-5)
