"""Published sizes, the dial, and what a size costs."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinylm.config import ConfigError, ModelConfig
from tinylm.model import shapes
from tinylm.presets import PRESETS, count, parameters, parse_size, preset, size

# Totals printed by the models' authors, or counted from their tables; (low, high) where a table is rounded.
PUBLISHED = {
    "stories260K": (260_032, 260_032),
    "stories15M": (15_191_712, 15_191_712),
    "stories42M": (41_000_000, 42_999_999),
    "stories110M": (109_000_000, 110_999_999),
    "tinystories-1M": (1_065_000, 1_074_999),
    "tinystories-3M": (2_925_000, 2_934_999),
    "tinystories-8M": (9_000_000, 9_014_999),
    "tinystories-28M": (30_550_000, 30_649_999),
    "tinystories-33M": (36_350_000, 36_449_999),
    "tinystories-1layer-21M": (23_350_000, 23_449_999),
    "bert-6": (66_650_000, 66_749_999),
    "bert-1": (77_750_000, 77_849_999),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_counts(name):
    low, high = PUBLISHED[name]
    assert low <= count(preset(name)) <= high


@pytest.mark.parametrize("name", PRESETS)
def test_closed_form_equals_the_arrays(name):
    config = preset(name)
    real = {n: math.prod(s.shape) for n, s in shapes(config).items()}
    groups = parameters(config)
    inside = lambda *words: sum(v for n, v in real.items() if any(w in n for w in words))  # noqa: E731
    assert sum(groups.values()) == sum(real.values()) == count(config)
    assert groups["token embedding"] == real["embed.table"]
    assert groups["position embedding"] == real.get("embed_positions.table", 0)
    assert groups["type embedding"] == real.get("embed_types.table", 0)
    assert groups["mlp"] == inside(".mlp.")
    assert groups["attention"] == inside(".attn.q.", ".attn.k.", ".attn.v.", ".attn.o.")
    assert groups["head"] == inside("head.")
    assert groups["norms"] == sum(v for n, v in real.items() if "norm" in n and not n.startswith("head."))


ODD = [
    {"qk_norm": True, "kv_heads": 1, "bias": True, "qkv_bias": False, "head": "untied", "mlp": "geglu"},
    {"head": "mlm", "norm": "layernorm", "block": "post", "token_types": 3, "embed_norm": True, "qkv_bias": True},
    {"block": "parallel", "mlp": "relu2", "positions": "learned", "head_width": 12, "bias": True},
    {"kind": "encoder", "head": "classes", "classes": 7, "rotary": 4},
    {"kind": "encoder", "head": "none"},
]


@pytest.mark.parametrize("settings", ODD, ids=str)
def test_closed_form_equals_the_arrays_of_odd_shapes(settings):
    config = ModelConfig(vocab=50, context=9, width=24, layers=3, heads=2, **settings)
    assert count(config) == sum(math.prod(s.shape) for s in shapes(config).values())


@pytest.mark.parametrize("text", ["500K", "1M", "1.5M", "3M", "10m", "30M", "60M", "100M"])
def test_dial(text):
    config = preset(text)
    assert config == preset(params=text) == preset(params=parse_size(text))
    assert abs(count(config) / parse_size(text) - 1) <= 0.12
    assert config.layers == max(2, round(config.width / 32)) or abs(config.layers - config.width / 32) <= 2.5
    assert (config.qk_norm, config.norm, config.positions, config.mlp) == (True, "rmsnorm", "rope", "swiglu")


@settings(deadline=None, max_examples=10)
@given(st.integers(150_000, 60_000_000), st.sampled_from([512, 1024, 4096]))
def test_dial_reaches_any_size(target, vocab):
    off = abs(count(preset(params=target, vocab=vocab)) / target - 1)
    assert off <= (0.12 if target >= 500_000 else 0.25)


def test_dial_takes_settings():
    config = preset("3M", vocab=1024, context=64, dropout=0.1, kv_heads=2)
    assert (config.vocab, config.context, config.dropout, config.kv_heads) == (1024, 64, 0.1, 2)
    assert abs(count(config) / 3e6 - 1) <= 0.12
    assert preset("2M", layers=3).layers == 3
    assert preset("stories260K", context=64).context == 64


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: preset("stories15"), "no preset 'stories15'; did you mean 'stories15M'"),
        (lambda: preset("1M", widht=3), "no setting 'widht'; did you mean 'width'"),
        (lambda: preset(), "give a name or params, not neither"),
        (lambda: preset("1M", params="1M"), "not both"),
        (lambda: preset(params="100K", vocab=32_000), "no shape with about 100,000 parameters at vocab = 32000"),
        (lambda: preset("1M", dropout=3), "dropout = 3.0: must be at least 0"),
        (lambda: preset(params="large"), "'large' is no size; write for example 300K or 3M"),
        (lambda: preset("1.2.3M"), "no preset '1.2.3M'"),
    ],
)
def test_wrong(call, message):
    with pytest.raises(ConfigError) as error:
        call()
    assert message in str(error.value)


def test_parse_size():
    assert [parse_size(s) for s in ("300K", "1.5M", "1000", 77, " 2m ")] == [300_000, 1_500_000, 1000, 77, 2_000_000]


def test_cost_of_a_size():
    """Every multiply-add of one position counted one by one, for a model small enough."""
    c = ModelConfig(vocab=10, context=8, width=4, layers=2, heads=2, kv_heads=1, hidden=6, window=(0, 3))
    cost = size(c)
    matrices = 2 * (4 * 4 + 4 * 2 + 4 * 2 + 4 * 4 + 3 * 4 * 6) + 4 * 10
    attention = 2 * 4 * (8 + 3) / 2  # scores and values, width of all heads 4, half of what could be seen
    assert cost.flops == 2 * (matrices + attention)
    assert cost.kv_bytes == 4 * 2 * 2 * 2  # float32, keys and values, layers, one head of 2
    assert cost.total == count(c)
    assert cost.body == cost.total - 40
    assert cost.float32 == 4 * cost.total
    assert cost.ternary < cost.int8 < cost.float32
    scales = 2 * (4 + 2 + 2 + 4 + 6 + 6 + 4) + 10
    assert cost.int8 == (cost.total - 5 * 4) + 4 * scales + 4 * 5 * 4  # five norms of 4 stay float32
    assert size(preset("bert-6")).flops > 2 * 6 * 12 * 768**2
