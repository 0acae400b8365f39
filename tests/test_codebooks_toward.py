"""Codes chosen by what they write: against direct attribution run by hand, and against what activating them does."""

import jax.numpy as jnp
import numpy as np
import pytest

import tinylm
from tinylm import codebooks
from tinylm.codebooks import CodebookError, steering
from tinylm.config import ModelConfig
from tinylm.techniques.codebook import discretize
from tinylm.weights import named

CONFIG = ModelConfig(vocab=60, context=32, width=16, layers=2, heads=2)


def coded(sites=("attn", "mlp"), **changes):
    model = tinylm.Transformer(CONFIG.replace(**changes), rngs=3)
    if model.config.block == "pre":
        model.norm.scale[...] = jnp.linspace(0.5, 2.0, 16)
    return discretize(model, list(sites), "paper", codes=20, k=2, rngs=1)


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
@pytest.mark.parametrize("head", ["tied", "untied"])
def test_the_push_of_a_code_is_its_share_of_the_logit(norm, head):
    model = coded(norm=norm, head=head)
    weights = {name: np.asarray(value, np.float64) for name, value in named(model).items()}
    read = weights["embed.table"].T if head == "tied" else weights["head.out.kernel"]

    def share(vector):  # of a vector in the stream, in the logit of token 7 over the mean of all, the scale held at 1
        centred = vector - vector.mean() if norm == "layernorm" else vector
        logits = (centred * weights["norm.scale"]) @ read
        return logits[7] - logits.mean()

    found = codebooks.codes_toward(model, 7, per=20)
    pushes = []
    for site, group, code in found:
        book = weights[f"{site}.book"]
        vector = np.zeros(16)
        vector[8 * group : 8 * group + 8] = book[group, code] if site.endswith("attn.o") else 0.0
        own = vector @ weights[f"{site}.inner.kernel"] if site.endswith("attn.o") else book[group, code]
        pushes.append(share(own))
    assert min(pushes) > 0
    assert pushes == sorted(pushes, reverse=True)
    every = 2 * (2 * 20 + 20)  # two layers, two heads of 20 codes and an MLP of 20
    assert 0.3 * every < len(found) < 0.7 * every  # those that push it down are left out
    assert codebooks.codes_toward(model, 7, most=3) == codebooks.codes_toward(model, 7)[:3]
    assert len(codebooks.codes_toward(model, 7)) == 6


def test_activating_them_raises_the_token_more_than_others_do():
    model = coded()
    texts = np.random.default_rng(0).integers(0, 60, (8, 12))
    for token in (4, 30, 51):
        own, others = (
            [code for code in codebooks.codes_toward(model, t) if code[0] == "blocks.1.mlp.down"]  # no way but directly
            for t in (token, (token + 20) % 60)
        )
        raised = codebooks.effects(model, texts, [*own, *others])[:, token]
        assert raised[0] > max(0, raised[1])


def test_codes_that_never_fired_are_left_out(tmp_path):
    model = coded(("mlp",))
    ids = np.random.default_rng(1).integers(1, 60, 120)
    index = codebooks.build(model, tinylm.Tokens.from_array(ids, vocab=60, end=0), tmp_path / "i")
    fired = {
        (name, 0, int(code)) for name in ("blocks.0.mlp.down", "blocks.1.mlp.down")
        for code in np.unique(index.chosen(name, 0))
    }  # fmt: skip
    every, seen = (set(codebooks.codes_toward(model, 7, per=20, index=i)) for i in (None, index))
    assert seen == every & fired
    with pytest.raises(CodebookError, match="lower `least`"):
        codebooks.codes_toward(model, 7, index=index, least=10**6)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"token": "a"}, "token = 'a'"),
        ({"per": 0}, "per = 0: must be at least 1"),
        ({"most": 0}, "most = 0"),
        ({"least": 0.5}, "least = 0.5"),
    ],
)
def test_what_cannot_be_asked(given, message):
    with pytest.raises(CodebookError, match=message):
        codebooks.codes_toward(coded(), **{"token": 1, **given})


def test_an_index_of_another_model_is_refused(tmp_path):
    ids = np.random.default_rng(1).integers(1, 60, 120)
    index = codebooks.build(coded(("mlp",)), tinylm.Tokens.from_array(ids, vocab=60, end=0), tmp_path / "i")
    with pytest.raises(CodebookError, match="no codes at blocks.0.attn.o: another model's"):
        codebooks.codes_toward(coded(), 7, index=index)


@pytest.mark.parametrize(
    ("model", "token", "message"),
    [
        (lambda: coded(), 60, r"token = 60: the vocabulary has ids 0 to 59"),
        (lambda: coded(block="post"), 1, "no direct effect"),
        (lambda: tinylm.edit(coded(("attn",)), r"blocks\.0\.attn\.q", "codebook", codes=8, k=1), 1, r"attn\.q are not"),
        (lambda: tinylm.Transformer(CONFIG), 1, "no codebook"),
    ],
)
def test_what_writes_nothing_is_refused(model, token, message):
    with pytest.raises(CodebookError, match=message):
        steering.codes_toward(model(), token)


def test_a_word_is_looked_for_in_any_letters():
    assert codebooks.containing("Dragon")(["a dragon.", "DRAGONS!", "a drag on"]) == ["Dragon", "Dragon", ""]
