"""TokFSM: walks, figures of a perfect machine, patching that is exact by construction."""

import itertools

import numpy as np
import pytest

import tinylm
from tinylm import codebooks
from tinylm.codebooks import CodebookError, fsm
from tinylm.config import ModelConfig
from tinylm.techniques.codebook import discretize

MACHINE = tinylm.World(mode="fsm", states=20, successors=4)


@pytest.fixture(scope="module")
def walker():
    config = ModelConfig(vocab=fsm.VOCAB, context=24, width=16, layers=2, heads=2)
    return discretize(tinylm.Transformer(config), ["attn", "mlp"], codes=16, k=1)


def test_walks_are_the_machine_s():
    source = fsm.Walks(MACHINE, batch=50, length=21)
    batch = source(3)
    np.testing.assert_array_equal(batch.tokens, source(3).tokens)
    assert (batch.tokens[:, 0] == fsm.BEGIN).all()
    np.testing.assert_array_equal(batch.tokens[:, 1:], batch.targets[:, :-1])
    states = batch.tokens[:, 1::2] * 10 + batch.tokens[:, 2::2]
    allowed = [set(row) for row in MACHINE.successor_table.tolist()]
    assert all(int(b) in allowed[a] for row in states for a, b in itertools.pairwise(row))
    backwards = fsm.ending(MACHINE.successor_table, np.arange(20), 5, np.random.default_rng(0))
    assert (backwards[:, -1] == np.arange(20)).all()


class Perfect:
    """Probabilities of the true machine, as `following` would give them."""

    @staticmethod
    def following(model, tokens, codes=None, only=None):
        out = np.zeros((len(tokens), fsm.VOCAB))
        for row, text in zip(out, tokens, strict=True):
            d = text[1:]
            state = d[(len(d) // 2 - 1) * 2 :][:2]
            after = MACHINE.successor_table[state[0] * 10 + state[1]]
            after = after[after // 10 == d[-1]] if len(d) % 2 else after
            np.add.at(row, after % 10 if len(d) % 2 else after // 10, 1 / max(1, len(after)))
        return out


def test_a_perfect_model_scores_1(monkeypatch):
    monkeypatch.setattr(fsm, "following", Perfect.following)
    assert fsm.machine(None, MACHINE) == pytest.approx((1, 1, 1))


def test_patching_all_codes_makes_it_the_other_text(walker):
    """Exact where both texts end in the same token: everything else at the last position is codes."""
    names = list(codebooks.books(walker))
    parts = {"none": [], "attn": [n for n in names if "attn" in n], "all": names}
    same = fsm.patching_table(walker, MACHINE, parts, pairs=40, same_digit=True)
    assert same["none"] == pytest.approx(1)
    assert same["all"] == pytest.approx(0, abs=1e-4)
    with pytest.raises(CodebookError, match="no codebook is called 'x'"):
        fsm.patching_table(walker, MACHINE, {"x": ["x"]}, pairs=4)
    with pytest.raises(CodebookError, match="no two of 10 states share"):
        fsm.patching_table(walker, tinylm.World(mode="fsm", states=10, successors=2), parts, same_digit=True)


def test_divergence_and_purity(walker):
    p, q = np.array([0.5, 0.5, 0]), np.array([0, 0.5, 0.5])
    assert fsm.divergence(p, q) == pytest.approx(0.5 * np.log(2))
    found = fsm.purity(walker, MACHINE)
    ids = codebooks.read(walker, fsm.digits(np.arange(20)[:, None]))
    counts = np.bincount(np.asarray(ids["blocks.1.mlp.down"])[:, -1, 0, 0])
    assert found["blocks.1.mlp.down"] == pytest.approx((counts == 1).sum() / (counts > 0).sum())
