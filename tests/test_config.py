"""Settings: what is refused and how it is said, and the way to json and back."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinylm.config import Config, ConfigError, ModelConfig, TrainConfig, suggest

WRONG_MODEL = [
    ({"edits": 3}, "edits", "list of edits"),
    ({"edits": ("ternary",)}, "edits", "list of edits"),
    ({"kind": "decodr"}, "kind", "must be one of decoder, encoder"),
    ({"vocab": 0}, "vocab", "at least 1"),
    ({"vocab": 4096.0}, "vocab", "whole number"),
    ({"vocab": True}, "vocab", "whole number"),
    ({"context": -1}, "context", "at least 1"),
    ({"width": 0}, "width", "at least 1"),
    ({"width": "128"}, "width", "whole number"),
    ({"layers": 0}, "layers", "at least 1"),
    ({"heads": 3}, "heads", "must divide width = 128, or set head_width"),
    ({"heads": 0}, "heads", "at least 1"),
    ({"kv_heads": 3}, "kv_heads", "must divide heads = 4"),
    ({"kv_heads": -1}, "kv_heads", "negative"),
    ({"head_width": -2}, "head_width", "negative"),
    ({"head_width": 5}, "head_width", "even for rotary"),
    ({"hidden": -1}, "hidden", "negative"),
    ({"norm": None}, "norm", "must be one of rmsnorm, layernorm"),
    ({"norm_eps": 0.0}, "norm_eps", "above 0"),
    ({"norm_eps": float("nan")}, "norm_eps", "finite"),
    ({"block": "sandwich"}, "block", "must be one of pre, post, parallel, embbert"),
    ({"block": "embbert"}, "block", "1 head of full width"),
    ({"block": "embbert", "heads": 1, "hidden": 100}, "hidden", "multiple of 128"),
    ({"block": "embbert", "heads": 1, "hidden": 128}, "block", "encoder without"),
    ({"block": "embbert", "heads": 1, "hidden": 128, "kernel": (3, 3)}, "kernel", "one number"),
    ({"mlp": ["swiglu"]}, "mlp", "must be one of swiglu"),
    ({"positions": "alibi"}, "positions", "must be one of rope, learned, none, or a tuple"),
    ({"positions": ()}, "positions", "or a tuple"),
    ({"positions": ("rope", "learned")}, "positions", "hold for all layers"),
    ({"rotary": 7}, "rotary", "even"),
    ({"rotary": -2}, "rotary", "negative"),
    ({"width": 32, "heads": 4, "rotary": 10}, "rotary", "at most head_width = 8"),
    ({"head": "classes", "classes": 0}, "classes", "at least 1"),
    ({"classes": 3}, "classes", "set head"),
    ({"pooling": "max"}, "pooling", "must be one of cls, mean, attention, last"),
    ({"pooler": 1}, "pooler", "true or false"),
    ({"embed_rank": -1}, "embed_rank", "negative"),
    ({"convs": -1}, "convs", "negative"),
    ({"channels": 0}, "channels", "at least 1"),
    ({"block": "embbert", "heads": 1, "hidden": 128, "kernel": (3,)}, "kernel", "one number"),
    ({"kernel": 0}, "kernel", "at least 1, or a pair"),
    ({"kernel": (3, 3, 3)}, "kernel", "at least 1, or a pair"),
    ({"theta": -1.0}, "theta", "above 0"),
    ({"theta": True}, "theta", "finite number"),
    ({"theta": 10**400}, "theta", "finite number"),
    ({"window": -1}, "window", "0 for all"),
    ({"window": (0, 2.5)}, "window", "0 for all"),
    ({"attention_scale": -1.0}, "attention_scale", "negative"),
    ({"qk_norm": 1}, "qk_norm", "true or false"),
    ({"softcap": float("inf")}, "softcap", "finite"),
    ({"head": "shared"}, "head", "must be one of tied, untied, mlm"),
    ({"bias": None}, "bias", "true or false"),
    ({"qkv_bias": "no"}, "qkv_bias", "true, false or null"),
    ({"embed_norm": "yes"}, "embed_norm", "true or false"),
    ({"token_types": -1}, "token_types", "negative"),
    ({"dropout": 1.0}, "dropout", "below 1"),
    ({"dropout": -0.1}, "dropout", "at least 0"),
    ({"init_std": -0.02}, "init_std", "negative"),
]
WRONG_TRAIN = [
    ({"batch": 0}, "batch", "at least 1"),
    ({"batch": 32, "accumulate": 5}, "accumulate", "must divide batch = 32"),
    ({"accumulate": 0}, "accumulate", "at least 1"),
    ({"documents": 1}, "documents", "true or false"),
    ({"length": -1}, "length", "negative"),
    ({"objective": "gpt"}, "objective", "must be one of next_token, mlm, classes"),
    ({"mask_rate": 1.0}, "mask_rate", "between 0 and 1"),
    ({"optimizer": "adam"}, "optimizer", "must be one of adamw, muon"),
    ({"learning_rate": 0.0}, "learning_rate", "above 0"),
    ({"learning_rate": "3e-4"}, "learning_rate", "finite number"),
    ({"schedule": "cos"}, "schedule", "must be one of cosine, wsd, linear, constant"),
    ({"final": 1.5}, "final", "between 0 and 1"),
    ({"warmup": -1}, "warmup", "negative"),
    ({"stairs": -1}, "stairs", "negative"),
    ({"decay": -0.1}, "decay", "between 0 and 1"),
    ({"beta1": 1.0}, "beta1", "below 1"),
    ({"beta2": -0.5}, "beta2", "at least 0"),
    ({"eps": 0.0}, "eps", "above 0"),
    ({"weight_decay": -0.1}, "weight_decay", "negative"),
    ({"memory_decay": -0.1}, "memory_decay", "negative"),
    ({"clip": -1.0}, "clip", "negative"),
    ({"dtype": "float16"}, "dtype", "must be one of float32, bfloat16"),
    ({"codec": "zip"}, "codec", "one of raw, planes"),
    ({"native": 1}, "native", "true or false"),
    ({"parallel": "model"}, "parallel", "one of none, data, fsdp"),
    ({"steps_per_call": -1}, "steps_per_call", "negative"),
    ({"rates": (1, 2)}, "rates", "tuple of texts"),
    ({"rates": "embed"}, "rates", "write PATTERN=FACTOR"),
    ({"rates": "(=2"}, "rates", "write PATTERN=FACTOR"),
    ({"rates": "head=-1"}, "rates", "write PATTERN=FACTOR"),
    ({"z_loss": -0.1}, "z_loss", "negative"),
    ({"ema": 1.0}, "ema", "below 1"),
    ({"optimizer": "schedule_free", "schedule": "constant", "ema": 0.5}, "ema", "average of its own"),
    ({"optimizer": "schedule_free", "schedule": "cosine"}, "schedule", 'needs "constant"'),
    ({"seed": -1}, "seed", "negative"),
    ({"log_every": 0}, "log_every", "at least 1"),
    ({"eval_every": -1}, "eval_every", "negative"),
    ({"milestones": -1}, "milestones", "negative"),
    ({"eval_batches": 0}, "eval_batches", "at least 1"),
    ({"save_every": -1.0}, "save_every", "negative"),
    ({"keep": 0}, "keep", "at least 1"),
]


@pytest.mark.parametrize(("settings", "field", "remedy"), WRONG_MODEL, ids=str)
def test_wrong_model_setting(settings, field, remedy):
    with pytest.raises(ConfigError) as error:
        ModelConfig(**settings)
    assert str(error.value).startswith(f"ModelConfig.{field} = {settings[field]!r}: ")
    assert remedy in str(error.value)


@pytest.mark.parametrize(("settings", "field", "remedy"), WRONG_TRAIN, ids=str)
def test_wrong_train_setting(settings, field, remedy):
    with pytest.raises(ConfigError) as error:
        TrainConfig(steps=10, **settings)
    assert str(error.value).startswith(f"TrainConfig.{field} = {settings[field]!r}: ")
    assert remedy in str(error.value)


@pytest.mark.parametrize(("config", "wrong"), [(ModelConfig, WRONG_MODEL), (TrainConfig, WRONG_TRAIN)])
def test_every_field_has_a_wrong_value_above(config, wrong):
    fields = {f.name for f in dataclasses.fields(config)} - {"steps", "tokens", "budget"}
    assert fields == {field for _, field, _ in wrong}


@pytest.mark.parametrize("ends", [{}, {"steps": 1, "tokens": 5}, {"steps": 1, "tokens": 5, "budget": 1.0}])
def test_exactly_one_end(ends):
    with pytest.raises(ConfigError, match="exactly one of steps, tokens, budget"):
        TrainConfig(**ends)


@pytest.mark.parametrize("end", ["steps", "tokens", "budget"])
def test_an_end_is_positive(end):
    with pytest.raises(ConfigError, match=f"TrainConfig.{end} = -3.*must not be negative"):
        TrainConfig(**{end: -3})


def test_sizes_that_follow_from_others():
    c = ModelConfig(width=192, heads=6)
    assert (c.head_width, c.kv_heads, c.hidden, c.qkv_bias) == (32, 6, 512, False)  # 8/3 * 192 = 512
    c = ModelConfig(width=100, heads=5, mlp="gelu", bias=True)
    assert (c.head_width, c.hidden, c.qkv_bias) == (20, 400, True)
    assert ModelConfig(width=100, heads=4, head_width=32).head_width == 32
    assert ModelConfig(width=100, heads=5).hidden == 288  # 266.7 rounded up to a multiple of 32
    assert isinstance(ModelConfig(theta=500_000).theta, float)


def test_patterns_repeat_over_the_layers():
    c = ModelConfig(window=(0, 256, 16), positions=("rope", "none"), layers=5)
    assert [c.at("window", i) for i in range(5)] == [0, 256, 16, 0, 256]
    assert [c.at("positions", i) for i in range(3)] == ["rope", "none", "rope"]
    assert ModelConfig(window=7).at("window", 3) == 7


def test_frozen_and_hashable():
    c = ModelConfig(window=(0, 4))
    with pytest.raises(dataclasses.FrozenInstanceError):
        c.width = 3
    assert hash(c) == hash(ModelConfig(window=(0, 4)))
    assert c != ModelConfig(window=(4, 0))
    assert isinstance(c, Config)


def test_unknown_names_suggest():
    with pytest.raises(ConfigError, match="ModelConfig has no setting 'widht'; did you mean 'width'"):
        ModelConfig.from_dict({"widht": 3})
    with pytest.raises(ConfigError, match="TrainConfig has no setting 'zzzz'; known: accumulate, batch"):
        TrainConfig.from_dict({"zzzz": 3})
    with pytest.raises(ConfigError, match="did you mean 'dropout'"):
        ModelConfig().replace(drop_out=0.1)
    assert suggest("stories15m", ["stories15M", "bert-1"]) == "; did you mean 'stories15M'?"
    assert suggest("q", ["a", "b"]) == "; known: a, b"


def test_replace_checks_again():
    c = ModelConfig(window=(0, 8))
    assert c.replace(dropout=0.5) == ModelConfig(window=(0, 8), dropout=0.5)
    with pytest.raises(ConfigError, match="dropout"):
        c.replace(dropout=2)


finite = lambda low, high: st.floats(low, high, allow_nan=False)  # noqa: E731


@st.composite
def model_configs(draw):
    kv, shared, half = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 16))
    positions = st.one_of(
        st.sampled_from(["rope", "learned", "none"]),
        st.lists(st.sampled_from(["rope", "none"]), min_size=1, max_size=3).map(tuple),
    )
    head = draw(st.sampled_from(["tied", "untied", "mlm", "classes", "none"]))
    return ModelConfig(
        kind=draw(st.sampled_from(["decoder", "encoder"])),
        vocab=draw(st.integers(1, 10**6)),
        context=draw(st.integers(1, 10**5)),
        width=draw(st.sampled_from([kv * shared * half * 2, 77])),
        layers=draw(st.integers(1, 40)),
        heads=kv * shared,
        kv_heads=kv,
        head_width=half * 2,
        hidden=draw(st.integers(0, 999)),
        norm=draw(st.sampled_from(["rmsnorm", "layernorm"])),
        norm_eps=draw(finite(1e-12, 1)),
        block=draw(st.sampled_from(["pre", "post", "parallel"])),
        mlp=draw(st.sampled_from(["swiglu", "geglu", "reglu", "gelu", "gelu_tanh", "relu2"])),
        positions=draw(positions),
        theta=draw(finite(1, 1e7)),
        rotary=2 * draw(st.integers(0, half)),
        window=draw(st.one_of(st.integers(0, 99), st.lists(st.integers(0, 99), min_size=1, max_size=4).map(tuple))),
        attention_scale=draw(finite(0, 2)),
        qk_norm=draw(st.booleans()),
        softcap=draw(finite(0, 99)),
        head=head,
        classes=draw(st.integers(1, 99)) if head == "classes" else 0,
        bias=draw(st.booleans()),
        qkv_bias=draw(st.sampled_from([None, True, False])),
        embed_norm=draw(st.booleans()),
        token_types=draw(st.integers(0, 4)),
        dropout=draw(finite(0, 0.99)),
        init_std=draw(finite(0, 1)),
    )


@given(model_configs())
def test_model_json_round_trip(config):
    back = ModelConfig.from_dict(json.loads(config.to_json()))
    assert back == config
    assert hash(back) == hash(config)
    assert config.replace() == config


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "batch": st.integers(1, 50).map(lambda n: 4 * n),
            "accumulate": st.sampled_from([1, 2, 4]),
            "learning_rate": finite(1e-9, 10),
            "warmup": st.integers(0, 1000),
            "schedule": st.sampled_from(["cosine", "wsd", "linear", "constant"]),
            "optimizer": st.sampled_from(["adamw", "muon"]),
            "dtype": st.sampled_from(["float32", "bfloat16"]),
            "save_every": finite(0, 1e6),
            "beta2": finite(0, 0.9999),
        },
    ),
    st.sampled_from(["steps", "tokens", "budget"]),
    st.integers(1, 10**9),
)
def test_train_json_round_trip(settings, end, size):
    config = TrainConfig(**settings, **{end: size})
    assert TrainConfig.from_dict(json.loads(config.to_json())) == config


def test_replace_lets_derived_sizes_follow():
    small = ModelConfig(width=64, heads=2)
    wide = small.replace(width=128, heads=8)
    assert wide == ModelConfig(width=128, heads=8)
    assert (wide.kv_heads, wide.head_width, wide.hidden) == (8, 16, 352)
    grouped = ModelConfig(width=64, heads=4, kv_heads=2)
    assert grouped.replace(width=128).kv_heads == 2
