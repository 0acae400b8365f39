"""Memories as techniques, the tree, retrieval and surgery: against NumPy written out and closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinylm import optim
from tinylm.checkpoint import load, save
from tinylm.config import ConfigError, ModelConfig, TrainConfig
from tinylm.engine.export import export
from tinylm.formats import FormatError
from tinylm.generation import generate
from tinylm.markup import Picture
from tinylm.memory import (
    Documents,
    MemoriesError,
    Only,
    States,
    TfIdf,
    Tree,
    add_memory,
    bake,
    blocked,
    blocks,
    browse,
    delete,
    fetching,
    generic_nodes,
    kmeans,
    memories,
    paths,
    read_nodes,
    recall,
    score,
    shuffled,
    swap,
    tell,
    token_scores,
    typical,
    under,
    write_nodes,
)
from tinylm.memory.clusters import balanced, components, distances
from tinylm.model import Cache, Transformer, sites
from tinylm.shards import write_tokens
from tinylm.store import StateMismatch
from tinylm.techniques import EditError, edit, fold
from tinylm.tokenizer import Tokenizer
from tinylm.training import train
from tinylm.weights import assign, bind, named, pure

CONFIG = ModelConfig(vocab=300, context=24, width=16, layers=1, heads=2)
IDS = np.random.default_rng(0).integers(0, 300, (3, 12)).astype(np.int32)
SHAPE = {"children": 2, "rows": (3, 2)}


def stirred(model, seed=0, size=0.3):
    """A model all of whose parameters are random, also those that start at zero."""
    rng = np.random.default_rng(seed)
    old = named(model)
    assign(
        model, {n: x if "fetched" in n else size * rng.normal(size=x.shape).astype(np.float32) for n, x in old.items()}
    )
    return model


@functools.partial(jax.jit, static_argnums=0)
def run(graph, params, tokens):
    return bind(graph, params)(tokens)


def logits(model, tokens=IDS):
    return np.asarray(run(*pure(model), tokens))


def silu(x):
    return x / (1 + np.exp(-x))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def seen_in(model, *wanted, tokens=IDS):
    seen = {}

    def tap(site, x):
        seen[site] = np.asarray(x)
        return x

    model(tokens, tap=tap)
    return [seen[name] for name in wanted]


def test_every_kind_starts_as_an_exact_no_op():
    expected = logits(Transformer(CONFIG))
    for kind in ("ffn", "lora_qk", "lora_vo", "lora_ffn", "kv"):
        model = add_memory(Transformer(CONFIG), kind, **SHAPE)
        assert np.array_equal(logits(fetching(model, [[0, 1], [1, 4], [-1, 2]])), expected), kind
        stirred(model)  # and nothing fetched is nothing, whatever the blocks say
        same, held = Transformer(CONFIG), named(model)
        assign(same, {n: held[n] if n in held else held[inner(n, held)] for n in named(same)})
        none = np.full((3, 2), -1)
        np.testing.assert_array_equal(logits(fetching(model, none)), logits(same), err_msg=kind)
        assert np.abs(logits(fetching(model, none + 1)) - logits(same)).max() > 1e-3, kind


def inner(name, held):
    """Where a plain model's parameter lies in one with a memory around some of its modules."""
    parts = name.split(".")
    return next(n for i in range(len(parts)) if (n := ".".join([*parts[:i], "inner", *parts[i:]])) in held)


NODES = np.array([[0, 1], [1, 2], [1, -1]], np.int32)


def test_ffn_memory_is_more_hidden_units():
    for mlp in ("swiglu", "gelu_tanh"):
        model = stirred(add_memory(Transformer(CONFIG.replace(mlp=mlp)), **SHAPE))
        own = fetching(model, NODES)
        x, hidden = seen_in(own, "blocks.0.mlp_norm", "blocks.0.mlp.memory")
        bank = [np.asarray(model.blocks[0].mlp.bank[i][...]) for i in (0, 1)]
        pieces = 3 if mlp == "swiglu" else 2
        inner = np.asarray(model.blocks[0].mlp.inner(jnp.array(x)))
        y = np.asarray(own.blocks[0].mlp(jnp.array(x)))
        act = silu if mlp == "swiglu" else lambda z: np.asarray(jax.nn.gelu(z, approximate=True))
        for row, nodes in enumerate(NODES):
            more, units = 0.0, []
            for level, node in enumerate(nodes):
                if node >= 0:
                    block = bank[level][node].reshape(pieces, SHAPE["rows"][level], 16)
                    h = act(x[row] @ block[0].T) * (x[row] @ block[1].T) if pieces == 3 else act(x[row] @ block[0].T)
                    units.append(h)
                    more = more + h @ block[-1]
            np.testing.assert_allclose(y[row], inner[row] + more, rtol=2e-4, atol=2e-5)
            np.testing.assert_allclose(hidden[row][:, : sum(u.shape[1] for u in units)], np.hstack(units), atol=2e-5)
        assert sites(model)["blocks.0.mlp.memory"] == (1, 2, 5)


def test_lora_memory_is_a_change_of_rank_r():
    model = stirred(add_memory(Transformer(CONFIG), "lora_vo", alpha=3.0, **SHAPE))
    own, x = fetching(model, NODES), np.random.default_rng(1).normal(size=(3, 5, 16)).astype(np.float32)
    v, bank = own.blocks[0].attn.v, [np.asarray(model.blocks[0].attn.v.bank[i][...]) for i in (0, 1)]
    y = np.asarray(v(jnp.array(x)))
    for row, nodes in enumerate(NODES):
        w = np.asarray(v.inner.weight()).copy()
        for level, node in enumerate(nodes):
            if node >= 0:
                r = SHAPE["rows"][level]
                a, b = bank[level][node][: r * 16].reshape(r, 16), bank[level][node][r * 16 :].reshape(r, 16)
                w += 3.0 / 5 * a.T @ b
        np.testing.assert_allclose(y[row], x[row] @ w, rtol=2e-4, atol=2e-5)


def test_kv_memory_is_attention_without_mask_and_positions():
    model = stirred(add_memory(Transformer(CONFIG.replace(kv_heads=1, qk_norm=True)), "kv", **SHAPE))
    q, with_memory = seen_in(fetching(model, NODES), "blocks.0.attn.q", "blocks.0.attn.heads")
    (without,) = seen_in(fetching(model, "none"), "blocks.0.attn.heads")
    attn, bank = model.blocks[0].attn, [np.asarray(model.blocks[0].attn.bank[i][...]) for i in (0, 1)]
    q = np.asarray(attn.inner.q_norm(jnp.array(q)))
    for row, nodes in enumerate(NODES):
        found = [bank[i][n].reshape(2, SHAPE["rows"][i], 2, 8) for i, n in enumerate(nodes) if n >= 0]
        key, value = (np.concatenate([f[i] for f in found]) for i in (0, 1))
        for head in range(2):
            pattern = softmax(q[row, :, head] @ key[:, head].T * 8**-0.5)
            expected = without[row, :, head] + pattern @ value[:, head]
            np.testing.assert_allclose(with_memory[row, :, head], expected, rtol=2e-4, atol=2e-5)
    own = fetching(model, NODES)
    graph, params = pure(own)
    cached = jax.jit(lambda tokens, cache: bind(graph, params)(tokens, cache=cache))
    whole, (first, cache) = logits(own), cached(IDS[:, :6], Cache.empty(own.config, 3))
    np.testing.assert_allclose(first, whole[:, :6], atol=1e-5)
    np.testing.assert_allclose(cached(IDS[:, 6:], cache)[0], whole[:, 6:], atol=1e-5)


def test_blocks_have_the_papers_sizes():
    """Pouransari et al. 2025: 3 r L d for FFN; 336 units in 35 layers of 512 are 18.06M."""
    model = add_memory(Transformer(CONFIG), **SHAPE)
    assert [m.values(0) for m in memories(model).values()] == [3 * 3 * 16]
    assert 3 * (256 + 64 + 16) * 35 * 512 == 18_063_360
    kv = memories(add_memory(Transformer(CONFIG), "kv", **SHAPE)).values()
    assert [m.values(1) for m in kv] == [2 * 2 * 16]
    half = add_memory(Transformer(CONFIG), children=2, rows=(0, 2))  # a level may be left out
    assert logits(fetching(stirred(half), NODES)).shape == (3, 12, 300)
    late = memories(add_memory(Transformer(CONFIG.replace(layers=2)), layers="late", **SHAPE))
    assert list(late) == ["blocks.1.mlp"]


def test_edits_are_kept_and_refused(tmp_path):
    model = stirred(add_memory(Transformer(CONFIG), layers=[0], **SHAPE))
    save(model, tmp_path / "m")
    again = load(tmp_path / "m")
    assert np.array_equal(logits(fetching(again, NODES)), logits(fetching(model, NODES)))
    with pytest.raises(EditError, match="fetched for each text"):
        fold(model)
    with pytest.raises(FormatError, match=r"blocks\.0\.mlp: its memory is fetched for each text"):
        export(model, tmp_path / "m.tlm")
    for settings, what in (
        ({"kind": "attic"}, "no memory is called 'attic'"),
        ({"rows": ()}, "rows = "),
        ({"children": 0, "rows": (1,)}, "children = 0"),
        ({"layers": [7], "rows": (1,)}, "blocks 0 to 0"),
        ({"slots": -1, "rows": (1,)}, "slots = -1"),
        ({"layers": 0}, "layers = 0: must be"),
        ({"kind": "lora_vo", "alpha": "2"}, "alpha = '2': must be a number"),
    ):
        with pytest.raises(EditError, match=what):
            add_memory(Transformer(CONFIG), **settings)
    with pytest.raises(EditError, match="FeedForward"):
        edit(Transformer(CONFIG), r"blocks\.0\.attn", "memory")
    with pytest.raises(MemoriesError, match="has no memory"):
        fetching(Transformer(CONFIG))
    with pytest.raises(MemoriesError, match="level 1 has nodes 0 to 3"):
        fetching(model, [0, 5])
    with pytest.raises(MemoriesError, match="one for each of 2 levels"):
        fetching(model, [0, 1, 2])
    with pytest.raises(ConfigError, match="schedule_free"):
        recipe = optim.Recipe.of(TrainConfig(steps=1, optimizer="schedule_free", schedule="constant"))
        optim.groups({n: x for n, x in named(model).items() if "fetched" not in n}, recipe)


# --- clusters ---------------------------------------------------------------------------------------------------------

TEXTS = [f"{'the sea and a ship with sails' if i % 2 else 'a farm has cows and hay'} number {i % 5}" for i in range(40)]


def test_tfidf_against_numpy():
    texts = ["a b b", "a c", "c c d", "d a"]
    embed = TfIdf(texts, dims=4, least=1)
    words = sorted({w for t in texts for w in t.split()})
    counts = np.array([[t.split().count(w) for w in words] for t in texts], float)
    idf = np.log(5 / (1 + (counts > 0).sum(0))) + 1
    x = np.where(counts > 0, 1 + np.log(np.maximum(counts, 1)), 0) * idf
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    mine = embed.weights(texts).toarray()[:, [embed.vocabulary[w] for w in words]]
    np.testing.assert_allclose(mine, x, atol=1e-12)
    # all directions are kept, so that products of rows are those of the table
    np.testing.assert_allclose(embed(texts) @ embed(texts).T, x @ x.T, atol=1e-6)
    assert np.array_equal(embed(["nothing known"]), np.zeros((1, 4)))


def test_components_are_the_leading_singular_vectors():
    x = np.random.default_rng(0).normal(size=(50, 30)) @ np.diag(0.8 ** np.arange(30))
    right = np.linalg.svd(x)[2][:5]
    np.testing.assert_allclose(np.abs(components(x, 5, 0) @ right.T), np.eye(5), atol=1e-6)


def test_kmeans_is_balanced_and_finds_what_is_there():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(4, 6)) * 10
    x = (centres[rng.integers(0, 4, 400)] + rng.normal(size=(400, 6)) * 0.1).astype(np.float32)
    found = kmeans(x, 4, seed=1)
    assert np.sqrt(distances(centres, found).min(1) + (centres**2).sum(1)).max() < 0.1
    labels = balanced(np.zeros(90, int), 9, 1.5, rng)
    assert np.bincount(labels, minlength=9).max() <= 15
    assert np.array_equal(balanced(np.arange(9) % 3, 3, 1.5, rng), np.arange(9) % 3)  # nothing to even out
    crowd = np.concatenate([np.zeros((97, 2)), rng.normal(size=(3, 2)) + 9]).astype(np.float32)
    crowd[:97] += rng.normal(size=(97, 2)) * 0.01
    sizes = np.bincount(distances(crowd, kmeans(crowd, 4, seed=0)).argmin(1), minlength=4)
    assert sizes.max() < 80  # plain k-means leaves 97 together


@pytest.fixture(scope="module")
def tree():
    return Tree.fit(TEXTS, children=2, depth=2, embed=TfIdf(TEXTS, dims=8))


def test_descent_is_greedy(tree, tmp_path):
    x = tree.embed(TEXTS)
    nodes = tree.find(TEXTS)
    for row, path in zip(x, nodes, strict=True):
        node = 0
        for level in range(2):
            near = [np.sum((row - tree.centroids[level][node * 2 + child]) ** 2) for child in range(2)]
            node = node * 2 + int(np.argmin(near))
            assert path[level] == node
    sea = nodes[:, 0] == nodes[1, 0]
    assert np.array_equal(sea, np.arange(40) % 2 == 1)  # the first level parts ships from cows
    tree.save(tmp_path / "tree.safetensors")
    again = Tree.load(tmp_path / "tree.safetensors")
    assert np.array_equal(again.find(TEXTS), nodes)
    assert again.sha256 == tree.sha256
    own = Tree.fit(TEXTS, children=2, depth=1, embed=lambda texts: np.array([[len(t), 1.0] for t in texts]))
    own.save(tmp_path / "own.safetensors")
    with pytest.raises(MemoriesError, match=r"embed="):
        Tree.load(tmp_path / "own.safetensors").find(TEXTS)
    assert Tree.fit(TEXTS[:3], children=3, depth=2, embed=tree.embed).find(TEXTS).max() < 9  # more nodes than texts
    for call, what in (
        (lambda: Tree.fit(TEXTS, children=1), "children = 1"),
        (lambda: Tree.fit(TEXTS, embed=lambda texts: np.full((len(texts), 2), np.nan)), "finite"),
        (lambda: TfIdf(["one", "two"]), "least=1"),
    ):
        with pytest.raises(MemoriesError, match=what):
            call()


def test_the_browser_says_what_clusters_are_about(tree):
    nodes = tree.find(TEXTS)
    words = typical(TEXTS, nodes[:, 0], 6)
    assert "ship" in words[int(nodes[1, 0])]
    assert "cows" in words[int(nodes[0, 0])]
    picture = browse(tree, [*TEXTS, "a <script>alert(1)</script> ship"], depth=2)
    assert isinstance(picture, Picture)
    assert "<svg" in picture.html
    assert "<script" not in picture.html
    assert "ship" in picture.text


def test_nodes_lie_beside_the_shards(tree, tmp_path):
    tokenizer = Tokenizer.train(TEXTS * 3, vocab=280)
    tokens = write_tokens(TEXTS, tokenizer, tmp_path)
    nodes = tree.find(TEXTS)
    write_nodes(tokens, nodes, tree)
    assert np.array_equal(read_nodes(tokens, tree), nodes)
    other = Tree.fit(TEXTS, children=2, depth=2, embed=tree.embed, seed=5, steps=1)
    with pytest.raises(StateMismatch, match="other tree"):
        read_nodes(tokens, other)
    tokens = write_tokens(TEXTS[:30], tokenizer, tmp_path)
    with pytest.raises(StateMismatch, match="other tokens"):
        read_nodes(tokens, tree)
    with pytest.raises(MemoriesError, match="30 documents"):
        write_nodes(tokens, nodes, tree)


# --- batches, training ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, tree):
    tokenizer = Tokenizer.train(TEXTS * 3, vocab=280)
    tokens = write_tokens(TEXTS, tokenizer, tmp_path_factory.mktemp("tokens"))
    return tokens, tree.find(TEXTS), tokenizer


def test_rows_are_windows_of_one_leaf(corpus):
    tokens, nodes, tokenizer = corpus
    source = Documents(tokens, nodes, children=2, batch=4, length=16, seed=3)
    framed = [[tokenizer.end, *tokenizer.encode(text)] for text in TEXTS]
    leaves = {path: [id_ for i in which for id_ in framed[i]] + [tokenizer.end] for path, which in paths(nodes)}
    seen = {path: [] for path in leaves}
    steps = -(-source.windows // 4)
    for step in range(steps):
        batch = source(step)
        for row in range(4 if step < steps - 1 else 4 - (steps * 4 - source.windows)):
            n = int(batch.weights[row].sum())
            assert np.array_equal(batch.weights[row], np.arange(16) < n)
            whole = [*batch.tokens[row, :n], batch.targets[row, n - 1]]
            assert np.array_equal(batch.targets[row, : n - 1], batch.tokens[row, 1:n])
            seen[tuple(batch.fetched[row].tolist())].append(whole)
            starts = np.flatnonzero(batch.tokens[row] == tokenizer.end)
            assert set(batch.positions[row][starts]) <= {0}
    for path, stream in leaves.items():  # every window once, and together they are the leaf's documents
        windows = [stream[at : at + 17] for at in range(0, len(stream) - 1, 16)]
        assert sorted(map(tuple, windows)) == sorted(map(tuple, seen[path]))
    assert np.array_equal(source(2).tokens, Documents(tokens, nodes, children=2, batch=4, length=16, seed=3)(2).tokens)
    mixed = Documents(tokens, nodes, children=2, batch=4, length=16, generic=0.5)
    drawn = np.concatenate([mixed(step).fetched for step in range(50)])
    generic = (drawn == generic_nodes(2, 2)).all(1)
    assert 0.35 < generic.mean() < 0.65
    assert (drawn[~generic] < [2, 4]).all()
    assert np.array_equal(Only(mixed, [0, -1])(0).fetched, [[0, -1]] * 4)
    assert sorted(map(tuple, shuffled(nodes, 1).tolist())) == sorted(map(tuple, nodes.tolist()))
    with pytest.raises(MemoriesError, match="3 rows of nodes for 40 documents"):
        Documents(tokens, nodes[:3], children=2, batch=4, length=16)


def test_lazy_adam_against_numpy():
    recipe = optim.Recipe.of(TrainConfig(steps=1, optimizer="adamw", memory_decay=0.1, rates=(r".*\.bank\.0=0.5",)))
    rule, name = optim.build(recipe), "blocks.0.mlp.bank.0"
    rng = np.random.default_rng(0)
    p = rng.normal(size=(4, 3)).astype(np.float32)
    params, state = {name: jax.numpy.array(p)}, rule.init({name: jax.numpy.array(p)})
    mean, square, count, x = np.zeros_like(p), np.zeros_like(p), np.zeros(4), p.astype(np.float64)
    for step in range(5):
        g = rng.normal(size=(4, 3)).astype(np.float32)
        g[[0, 1 + step % 3]] = 0  # row 0 is never fetched, the others now and then
        change, state = rule.update({name: jax.numpy.array(g)}, state, params, jax.numpy.float32(0.1))
        params = {name: params[name] + change[name]}
        for row in np.flatnonzero((g != 0).any(1)):
            count[row] += 1
            mean[row], square[row] = 0.9 * mean[row] + 0.1 * g[row], 0.95 * square[row] + 0.05 * g[row] ** 2
            m, v = mean[row] / (1 - 0.9 ** count[row]), square[row] / (1 - 0.95 ** count[row])
            x[row] -= 0.05 * (m / (np.sqrt(v) + 1e-8) + 0.1 * x[row])
    np.testing.assert_allclose(params[name], x, rtol=1e-5)
    assert np.array_equal(np.asarray(params[name])[0], p[0])


@pytest.fixture(scope="module")
def trained(corpus):
    """A model and its memories, trained together on branch 0 of level 0 alone, with the generic memory now and then."""
    tokens, nodes, tokenizer = corpus
    model = add_memory(Transformer(CONFIG, tokenizer=tokenizer), **SHAPE)
    before = {n: np.asarray(x) for n, x in named(model).items()}
    source = Documents(tokens, nodes, children=2, batch=4, length=16)
    one = lambda step: source(step)._replace(fetched=np.array([[0, 0], [0, 1], [0, 1], [2, 4]], np.int32))  # noqa: E731
    config = TrainConfig(steps=12, batch=4, length=16, warmup=2, log_every=6, optimizer="adamw", memory_decay=0.5)
    trainer = train(model, one, config)
    list(trainer)
    return trainer, before


def test_only_fetched_rows_move(trained):
    trainer, before = trained
    state = {name: np.asarray(x) for name, x in trainer.tensors().items() if ".bank." in name}
    touched = {0: [0, 2], 1: [0, 1, 4]}
    for name, value in state.items():
        level = int(name[-1])
        rows = np.isin(np.arange(len(value)), touched[level])
        if name.startswith("params."):
            old = before[name.removeprefix("params.")]
            assert np.array_equal(value[~rows], old[~rows]), name
            assert (value[rows] != old[rows]).any(axis=1).all(), name
        else:
            assert not value[~rows].any(), name
            assert value[rows].reshape(rows.sum(), -1).any(axis=1).all(), name
    assert not np.array_equal(np.asarray(trainer.model.embed.weight()), before["embed.table"])


def test_a_frozen_anchor_stays(corpus):
    tokens, nodes, tokenizer = corpus
    model = add_memory(Transformer(CONFIG, tokenizer=tokenizer), **SHAPE)
    before = {n: np.asarray(x) for n, x in named(model).items()}
    source = Documents(tokens, nodes, children=2, batch=4, length=16)
    rates = (r".*=0", r".*\.bank\.\d+=1")
    list(train(model, source, TrainConfig(steps=4, batch=4, length=16, warmup=0, rates=rates)))
    moved = {n for n, x in named(model).items() if not np.array_equal(x, before[n])}
    assert moved == {"blocks.0.mlp.bank.0", "blocks.0.mlp.bank.1"}


def test_surgery(trained):
    model = trained[0].model
    found = {(b.level, b.node): b for b in blocks(model)}
    assert len(found) == 3 + 5
    assert {where for where, b in found.items() if b.silent > 0} == {(0, 0), (0, 2), (1, 0), (1, 1), (1, 4)}
    assert found[0, 0].values == 3 * 3 * 16
    assert under((0, 1), 2, 3) == {0: slice(1, 2), 1: slice(2, 4), 2: slice(4, 8)}
    nodes = np.array([[0, 0], [0, 1], [1, 2]], np.int32)
    assert blocked(nodes, (1, 1), 2).tolist() == [[0, 0], [0, -1], [1, 2]]
    assert blocked(nodes, (1, 1), 2, whole=True).tolist() == [[0, 0], [-1, -1], [1, 2]]
    kept = {n: np.asarray(x) for n, x in named(model).items()}
    full, without = logits(fetching(model, nodes)), logits(fetching(model, blocked(nodes, (0, 0), 2)))
    assert not np.array_equal(full[0], without[0])
    other = Transformer(model.config)
    assign(other, kept)
    delete(other, (0, 0))
    np.testing.assert_allclose(logits(fetching(other, nodes)), without, atol=1e-6)
    np.testing.assert_allclose(
        logits(fetching(other, nodes))[2], full[2], atol=1e-6
    )  # other branches know what they knew
    swap(other, (0, 0), model)
    assert np.array_equal(logits(fetching(other, nodes)), full)
    with pytest.raises(MemoriesError, match=r"branch = \(2, 0\)"):
        delete(model, (2, 0))
    with pytest.raises(MemoriesError, match="no such memories"):
        swap(model, (0, 0), Transformer(CONFIG))


def test_one_path_can_be_baked_into_a_plain_model(trained, tmp_path):
    model = trained[0].model
    plain = bake(model, [0, 1])
    assert plain.config.hidden == CONFIG.hidden + 5
    assert plain.config.edits == ()
    np.testing.assert_allclose(logits(plain), logits(fetching(model, [0, 1])), atol=1e-5)
    assert np.abs(logits(plain) - logits(fetching(model, "none"))).max() > 1e-3
    assert export(plain, tmp_path / "m.tlm").bytes > 0
    biased = stirred(add_memory(Transformer(CONFIG.replace(mlp="gelu", bias=True)), **SHAPE))
    np.testing.assert_allclose(logits(bake(biased, [1, 2])), logits(fetching(biased, [1, 2])), atol=1e-5)
    with pytest.raises(MemoriesError, match="can be baked"):
        bake(add_memory(Transformer(CONFIG), "kv", **SHAPE), [0, 0])
    with pytest.raises(MemoriesError, match="of one document"):
        bake(model, [[0, 0], [1, 2]])


def test_scores_are_those_of_each_documents_own_memory(trained, tree):
    model = trained[0].model
    tokenizer, nodes = model.tokenizer, tree.find(TEXTS[:5])
    framed = [np.array([tokenizer.begin, *tokenizer.encode(t), tokenizer.end]) for t in TEXTS[:5]]
    own = token_scores(model, framed, nodes)
    for ids, path, (logp, hit) in zip(framed, nodes, own, strict=True):
        n = min(24, len(ids) - 1)
        found = logits(fetching(model, path), ids[None, :n].astype(np.int32))[0].astype(np.float64)
        expected = np.log(softmax(found))[np.arange(n), ids[1 : n + 1]]
        np.testing.assert_allclose(logp[:n], expected, atol=1e-4)
        assert np.array_equal(hit[:n], found.argmax(-1) == ids[1 : n + 1])
    whole = score(model, TEXTS[:5], nodes)
    assert whole.bits_per_byte == pytest.approx(
        -sum(logp.sum() for logp, _ in own) / np.log(2) / sum(len(t.encode()) for t in TEXTS[:5])
    )
    after = score(model, TEXTS[:5], nodes, after=[10] * 5)
    assert 0 < after.bytes.sum() < whole.bytes.sum()
    asked = recall(model, ["the sea and a ", "a farm has "], ["ship", "cows"], nodes[:2])
    assert asked.hits.dtype == bool
    assert (asked.logprobs < 0).all()
    text = tell(model, tree, "the sea", tokens=8, every=4, temperature=0)
    first = generate(fetching(model, tree.find(["the sea"])[0]), "the sea", tokens=4, temperature=0)
    assert text.startswith(first)


def test_states_embed_texts(corpus):
    model = Transformer(CONFIG, tokenizer=corpus[2])
    x = States(model, "blocks.0.resid", batch=2)(TEXTS[:3])
    ids = np.array([corpus[2].encode(TEXTS[2])[:24]], np.int32)
    (mean,) = seen_in(model, "blocks.0.resid", tokens=ids)
    mean = mean[0].mean(0)
    np.testing.assert_allclose(x[2], mean / np.linalg.norm(mean), atol=1e-5)
    assert Tree.fit(TEXTS, children=2, depth=1, embed=States(model)).find(TEXTS).shape == (40, 1)


def test_misuse_is_said(trained, tree, corpus):
    model, tokens, nodes = trained[0].model, *corpus[:2]
    few, other = TEXTS[:3], Tree.fit(TEXTS, children=3, depth=2)
    of = {"children": 2, "batch": 2, "length": 8}
    blank = Transformer(CONFIG)
    for call, said in (
        (lambda: Tree.fit("a long text of words", children=2), "'a long text of words' is one text"),
        (lambda: tree.find("the sea"), "is one text: give a list"),
        (lambda: tree.find(["the sea", None]), r"texts\[1\] = None: must be a text"),
        (lambda: Tree.fit(TEXTS, children=2.5), "children = 2.5"),
        (lambda: Tree.fit(TEXTS, depth=0), "depth = 0"),
        (lambda: Tree.fit(TEXTS, steps=-1), "steps = -1"),
        (lambda: Tree.fit(TEXTS, sample=1), "sample = 1"),
        (lambda: Tree.fit(TEXTS, most=float("nan")), "most = nan"),
        (lambda: tree.descend(np.zeros((3, 99), np.float32)), "x .3, 99.: this tree is of embeddings of"),
        (lambda: States(model, batch=0), "batch = 0"),
        (lambda: score(model, "the sea"), "is one text"),
        (lambda: score(model, TEXTS[:5], nodes[:3]), "3 rows of nodes for 5 texts"),
        (lambda: score(model, few, "genric"), "nodes = 'genric'"),
        (lambda: score(model, few, after=[1]), r"after = \[1\]: give one"),
        (lambda: score(model, few, after=[-1] * 3), r"after = \[-1, -1, -1\]"),
        (lambda: score(model, few, after=[1, 999, 1]), r"after\[1\] = 999: nothing of the text"),
        (lambda: score(blank, few), "set model.tokenizer"),
        (lambda: recall(model, ["a", "b"], ["c"]), "2 prompts and 1 answers"),
        (lambda: recall(model, ["a"], [""]), "none empty"),
        (lambda: recall(model, [], []), "0 prompts"),
        (lambda: recall(model, "ab", "cd"), "prompts = 'ab' is one text"),
        (lambda: tell(model, other, "the sea"), "3 children, .* is not this model's: its memories have 2 children"),
        (lambda: tell(model, tree, "the sea", every=0), "every = 0"),
        (lambda: browse(tree, TEXTS, nodes[:3]), r"nodes \(3, 2\), depth = 2: give \(40, 2\)"),
        (lambda: browse(tree, TEXTS, depth=0), "depth = 0"),
        (lambda: browse(tree, "abc"), "is one text"),
        (lambda: typical(TEXTS, nodes[:3, 0]), r"groups \(3,\) for 40 texts"),
        (lambda: under((0.5, 1), 2, 2), r"branch = \(0.5, 1\)"),
        (lambda: under(3, 2, 2), "branch = 3"),
        (lambda: Documents(tokens, nodes[:, 0], **of), r"nodes of shape \(40,\) for 40 documents"),
        (lambda: Documents(tokens, None, **of), r"nodes of shape \(\)"),
        (lambda: Documents(tokens, nodes, **{**of, "children": 3}), "is no path down a tree with 3 children"),
    ):
        with pytest.raises(MemoriesError, match=said):
            call()
    assert States(model)([]).shape == (0, 16)
    assert write_nodes(tokens, nodes.tolist(), tree).exists()


def test_leaves_that_are_left_out_stay_on_their_own_paths(corpus):
    tokens, nodes, _ = corpus
    without = np.stack([nodes[:, 0], np.full(len(nodes), -1)], axis=1)
    assert len(np.unique(nodes[:, 0])) == 2
    source = Documents(tokens, without, children=2, batch=4, length=16)
    assert source.paths.tolist() == [[0, -1], [1, -1]]
    assert [len(documents) for documents, _ in source._leaves] == np.bincount(nodes[:, 0]).tolist()


def test_nodes_of_another_tree_are_not_fetched_in_silence():
    model = stirred(add_memory(Transformer(CONFIG), **SHAPE))
    graph, params = pure(model)

    def fetched(nodes):
        nodes = jnp.array(nodes, jnp.int32)
        return run(graph, {n: nodes if n.endswith(".fetched") else x for n, x in params.items()}, IDS)

    found = np.asarray(fetched([[1, 2], [1, 5], [-1, -1]]))  # level 1 has nodes 0 to 3 and the generic 4
    assert np.isnan(found).all(axis=(1, 2)).tolist() == [False, True, False]
    assert np.isfinite(found[[0, 2]]).all()
    with pytest.raises(ValueError, match="nodes of 3 levels are fetched, and the memory has 2"):
        fetched([[0, 0, 0]])
    with pytest.raises(ValueError, match="fetched for 2 rows and 3 are read"):
        fetched([[0, 0], [1, 2]])
