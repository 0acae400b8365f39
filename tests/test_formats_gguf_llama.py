"""GGUF files against llama.cpp itself: the same logits, tokens and texts, and what its rounding explains."""

import gzip

import jax
import numpy as np
import pytest
from ggufs import (  # noqa: F401 (three are fixtures)
    DECODER,
    DECODERS,
    DOCS,
    MODELS,
    bert_tokenizer,
    like_llama_cpp,
    llama_cpp,
    made,
    our_greedy,
    random,
    their_greedy,
    their_logits,
    to_bf16,
    to_half,
    to_q8_0,
    to_q8_k,
    tokenizer,
)

from tinylm.config import ModelConfig
from tinylm.formats import ggml, gguf, gguf_tokenizers
from tinylm.formats import gguf_models as models
from tinylm.formats.tables import FormatError
from tinylm.generation import generate
from tinylm.tokenizer import Tokenizer
from tinylm.weights import assign, bind, named, pure

# --- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DECODERS)
def test_llama_cpp_gives_the_same_logits_tokens_and_text(name, tokenizer, bert_tokenizer, like_llama_cpp, tmp_path):
    model = made(name, tokenizer, bert_tokenizer)
    ids = [tokenizer.end, *tokenizer.encode(DOCS[3])[:40]]
    f32 = models.write(model, tmp_path / "f32.gguf", dtype="f32")
    theirs = llama_cpp(f32)
    for document in DOCS[::40]:
        assert theirs.tokenize(document.encode(), add_bos=True) == [tokenizer.end, *tokenizer.encode(document)]
    ours = models.read(f32)(np.array([ids]))[0]
    assert np.abs(ours - their_logits(theirs, ids)).max() < (1e-2 if "gelu" in model.config.mlp else 1e-5)
    assert their_greedy(theirs, ids[:8], 24) == our_greedy(model, ids[:8], 24)
    f16 = models.write(model, tmp_path / "f16.gguf", dtype="f16")
    tabled, halved = like_llama_cpp(f32), like_llama_cpp(f16, to_half, to_half)
    del tabled  # its forward pass would round too
    np.testing.assert_allclose(halved(np.array([ids]))[0], their_logits(llama_cpp(f16), ids), atol=2e-3)


@pytest.mark.parametrize("name", ["gpt2", "gptneox", "gptneox serial"])
def test_what_differs_from_llama_cpp_is_its_table_of_gelu(name, tokenizer, bert_tokenizer, like_llama_cpp, tmp_path):
    path = models.write(made(name, tokenizer, bert_tokenizer), tmp_path / "m.gguf", dtype="f32")
    ids = [tokenizer.end, *tokenizer.encode(DOCS[3])[:40]]
    theirs = their_logits(llama_cpp(path), ids)
    plain = np.abs(models.read(path)(np.array([ids]))[0] - theirs)
    tabled = np.abs(like_llama_cpp(path)(np.array([ids]))[0] - theirs)
    assert plain.max() < 1e-2
    assert tabled.max() < 5e-4  # a value beside the border of two table entries may fall into the other one
    assert tabled.mean() < 0.1 * plain.mean()


@pytest.mark.parametrize("name", ["bert", "bert bare", "bert classes"])
def test_llama_cpp_embeds_and_classifies_alike(name, tokenizer, bert_tokenizer, like_llama_cpp, tmp_path):
    model = made(name, tokenizer, bert_tokenizer)
    path = models.write(model, tmp_path / "m.gguf", dtype="f32")
    llm = llama_cpp(path, embedding=True, logits_all=False)
    words = "Once upon a time, there was a FOX being Café 23!"
    ids = [bert_tokenizer.cls, *bert_tokenizer.encode(words), bert_tokenizer.sep]
    assert bert_tokenizer.specials["[UNK]"] not in ids
    assert llm.tokenize(words.encode()) == ids
    ours = np.asarray(like_llama_cpp(path)(np.array([ids])))[0]
    there = pytest.importorskip("llama_cpp")
    llm._batch.add_sequence(ids, 0, True)
    llm._ctx.decode(llm._batch)
    context = llm._ctx.ctx
    found = there.llama_get_embeddings_seq(context, 0) if ours.ndim == 1 else there.llama_get_embeddings(context)
    np.testing.assert_allclose(np.array(found[: ours.size]).reshape(ours.shape), ours, atol=5e-4)


def test_qwen2_is_read_as_halves(tokenizer, tmp_path):
    """The same parameters as the file of a llama, where rows of query and key are permuted."""
    model = random(ModelConfig(vocab=tokenizer.vocab, **MODELS["llama qkv"]), tokenizer)
    file = gguf.open_file(models.write(model, tmp_path / "llama.gguf", dtype="f32"))
    tensors = models.tables.write(models.ARCHITECTURES["qwen2"].rows, model.config, named(model))
    metadata = {key.replace("llama.", "qwen2."): value for key, value in file.metadata.items()}
    metadata = {key: list(value) if isinstance(value, gguf.Strings) else value for key, value in metadata.items()}
    metadata["general.architecture"] = "qwen2"
    path = tmp_path / "qwen2.gguf"
    gguf.write_file(path, metadata, {key: (ggml.TYPES["F32"], x) for key, x in tensors.items()})
    again, ids = models.read(path), [tokenizer.end, *tokenizer.encode(DOCS[3])[:40]]
    np.testing.assert_array_equal(again(np.array([ids])), model(np.array([ids])))
    np.testing.assert_allclose(again(np.array([ids]))[0], their_logits(llama_cpp(path), ids), atol=1e-5)


# --- smaller types ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide(tokenizer):
    """A model of width 256 whose matrices inside the blocks are exactly ternary, one scale each."""
    settings = {"context": 64, "width": 256, "layers": 2, "heads": 4, "kv_heads": 2, "hidden": 512}
    model, rng = random(ModelConfig(vocab=tokenizer.vocab, **settings), tokenizer), np.random.default_rng(5)
    values = dict(named(model))
    for name in [name for name in values if name.endswith("kernel")]:
        scale = np.float32(np.float16(rng.uniform(0.02, 0.04)))
        values[name] = rng.integers(-1, 2, values[name].shape).astype(np.float32) * scale
    assign(model, values)
    return model


@pytest.mark.parametrize("dtype", ["tq1_0", "tq2_0"])
def test_a_ternary_model_is_kept_bit_for_bit_and_llama_cpp_tells_the_same(dtype, wide, like_llama_cpp, tmp_path):
    path = models.write(wide, tmp_path / "m.gguf", dtype=dtype, embedding="f32")
    again = models.read(path)
    for name, value in named(wide).items():
        np.testing.assert_array_equal(named(again)[name], value, name)
    weights = sum(x.size for name, x in named(wide).items() if name.endswith("kernel"))
    held = sum(p.size for name, p in gguf.open_file(path).tensors.items() if p.kind.name.lower() == dtype)
    assert held * 8 / weights == {"tq1_0": 1.6875, "tq2_0": 2.0625}[dtype]
    ids = [wide.tokenizer.end, *wide.tokenizer.encode(DOCS[3])[:20].tolist()]
    theirs = llama_cpp(path)
    assert their_greedy(theirs, ids, 24) == our_greedy(again, ids, 24)
    exact, rounded = again(np.array([ids]))[0], like_llama_cpp(path, inside=to_q8_k)(np.array([ids]))[0]
    found = their_logits(theirs, ids)
    assert np.abs(exact - found).max() < 0.05 * np.abs(exact).max()  # their activations have eight bits
    assert np.abs(rounded - found).mean() < 0.3 * np.abs(exact - found).mean()


def test_weights_that_are_not_ternary_are_refused_with_all_names(wide, tokenizer, tmp_path):
    model = random(wide.config, tokenizer)
    with pytest.raises(FormatError) as error:
        models.write(model, tmp_path / "m.gguf", dtype="tq2_0")
    assert "blk.0.attn_q.weight: 256 of 256 blocks of 256 weights are not ternary" in str(error.value)
    assert "and 4 more. Ternary blocks want a width and hidden in multiples of 256" in str(error.value)
    assert not list(tmp_path.iterdir())
    rounded = models.read(models.write(model, tmp_path / "m.gguf", dtype="tq2_0", rounding=True))
    kernel = np.asarray(named(rounded)["blocks.0.mlp.up.kernel"]).T.reshape(-1, 256)
    assert all(len(np.unique(np.abs(block))) <= 2 for block in kernel)

    narrow = random(ModelConfig(vocab=400, **MODELS["llama"]), tokenizer)
    with pytest.raises(FormatError, match="rows of 32 weights are no blocks of 256, and float16 would round them"):
        models.write(narrow, tmp_path / "n.gguf", dtype="tq1_0")
    assign(narrow, {name: np.asarray(x, np.float16).astype(np.float32) for name, x in named(narrow).items()})
    kept = models.read(models.write(narrow, tmp_path / "n.gguf", dtype="tq1_0"))
    np.testing.assert_array_equal(named(kept)["blocks.1.attn.q.kernel"], named(narrow)["blocks.1.attn.q.kernel"])


@pytest.mark.parametrize(("dtype", "rounds"), [("bf16", to_bf16), ("q8_0", to_q8_0)])
def test_other_types_are_read_as_llama_cpp_means_them(dtype, rounds, wide, tokenizer, like_llama_cpp, tmp_path):
    model = random(wide.config, tokenizer)
    path = models.write(model, tmp_path / "m.gguf", dtype=dtype)
    kinds = {name: place.kind.name.lower() for name, place in gguf.open_file(path).tensors.items()}
    assert {kinds["token_embd.weight"], kinds["blk.0.ffn_up.weight"]} == {dtype}
    assert kinds["blk.0.attn_norm.weight"] == "f32"
    ids = [tokenizer.end, *tokenizer.encode(DOCS[3])[:20]]
    found, exact = their_logits(llama_cpp(path), ids), models.read(path)(np.array([ids]))[0]
    assert np.abs(found - exact).max() < 0.05 * np.abs(exact).max()
    rounded = like_llama_cpp(path, rounds, rounds)(np.array([ids]))[0]
    assert np.abs(found - rounded).mean() < 0.3 * np.abs(found - exact).mean()


# --- tokenizers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt-2", "llama-spm", "bert-bge"])
def test_llama_cpps_own_examples_are_encoded_alike(name, shared_data, tmp_path):
    """The pairs of text and ids that llama.cpp tests its tokenizers with; then all of it through our writer."""
    file = shared_data / "tokenizers" / f"ggml-vocab-{name}.gguf"
    tokenizer = gguf_tokenizers.tokenizer_of(file)
    mark = "\n__ggml_vocab_test__\n"
    texts = file.with_suffix(".gguf.inp").read_bytes().decode().removesuffix(mark).split(mark)
    lines = file.with_suffix(".gguf.out").read_text().splitlines()
    assert len(texts) == len(lines) == 46
    for example, line in zip(texts, lines, strict=True):
        assert tokenizer.encode(example).tolist() == [int(i) for i in line.split()], repr(example)

    rare = "<|endoftext|> <s> Ünïcödé ẞ ǅ ﬁ ½ Ⅷ ٣ \u200b\u00ad 𝔘 \t\r\n \x7f 日本語 42 -- 'S 'll ##x [MASK] ▁ <0x41>"
    entries = {"general.architecture": "llama", **gguf_tokenizers.write(tokenizer, tokenizer.vocab + 3)}
    gguf.write_file(tmp_path / "words.gguf", entries, {})
    there = pytest.importorskip("llama_cpp", reason="llama.cpp is not installed (pip install llama-cpp-python)")
    settings = there.llama_model_default_params()
    settings.vocab_only = True
    theirs = there._internals.LlamaModel(path_model=str(tmp_path / "words.gguf"), params=settings, verbose=False)
    assert theirs.n_vocab() == tokenizer.vocab + 3
    for example in [*texts, *DOCS[::50], *([] if name == "bert-bge" else [rare])]:
        assert theirs.tokenize(example.encode(), False, False) == tokenizer.encode(example).tolist(), repr(example)
    again = gguf_tokenizers.read(gguf.open_file(tmp_path / "words.gguf").metadata, tokenizer.vocab + 3)
    assert (again.names, again.specials) == (tokenizer.names, tokenizer.specials)
    assert [again.encode(x).tolist() for x in texts] == [tokenizer.encode(x).tolist() for x in texts]


def test_padded_vocabularies_and_bytes(tmp_path):
    words = Tokenizer.train([], kind="byte")
    model = random(ModelConfig(**DECODER, vocab=words.vocab + 11), words)
    path = models.write(model, tmp_path / "m.gguf", dtype="f32")
    again, theirs = models.read(path), llama_cpp(path)
    assert (again.tokenizer.kind, again.tokenizer.names, again.config) == ("byte", words.names, model.config)
    assert theirs.tokenize("Ĝo 🦙\n".encode(), add_bos=True) == [words.end, *words.encode("Ĝo 🦙\n")]
    assert theirs.token_eos() == words.end
    assert theirs.detokenize(words.encode("Ĝo 🦙\n").tolist()).decode() == "Ĝo 🦙\n"


@pytest.mark.parametrize("kind", ["wordpiece", "unigram"])
def test_a_tokenizer_that_llama_cpp_lacks_is_refused_and_can_be_left_out(kind, tmp_path):
    words = Tokenizer.train(DOCS, vocab=600, kind=kind)
    model = random(ModelConfig(**DECODER, vocab=words.vocab), words)
    with pytest.raises(FormatError, match="llama.cpp has no tokenizer such as .*The model alone: tokenizer=False"):
        models.write(model, tmp_path / "m.gguf")
    path = models.write(model, tmp_path / "m.gguf", dtype="f32", tokenizer=False)
    np.testing.assert_allclose(their_logits(llama_cpp(path), range(9)), model(np.arange(9)[None])[0], atol=1e-5)


# --- published models -------------------------------------------------------------------------------------------------


def test_stories260k_tells_the_same_in_llama_cpp(shared_data, tmp_path):
    from tinylm.formats import llama2c

    model = llama2c.read(shared_data / "ckpt" / "stories260K" / "stories260K.bin")
    path = models.write(model, tmp_path / "m.gguf", dtype="f32")
    assert models.read(path).tokenizer.encode(DOCS[0]).tolist() == model.tokenizer.encode(DOCS[0]).tolist()
    theirs = llama_cpp(path, 512)
    ids = theirs.tokenize(b"Once upon a time", add_bos=True)
    assert ids == [model.tokenizer.begin, *model.tokenizer.encode("Once upon a time")]
    assert their_greedy(theirs, ids, 200) == our_greedy(model, ids, 200)
    told = theirs.create_completion("Once upon a time", max_tokens=60, temperature=0)["choices"][0]["text"]
    assert generate(model, "Once upon a time", tokens=60, temperature=0) == "Once upon a time" + told


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["f16", "q8_0"])
def test_stories15m_has_the_same_perplexity_in_llama_cpp(dtype, shared_data, tmp_path):
    """Over 100 kB of TinyStories, each story from its begin token, in windows of the context; ours with the weights
    as the file holds them, theirs with activations rounded to the same type as well."""
    from tinylm.formats import llama2c

    model = llama2c.read(shared_data / "ckpt" / "stories15M" / "stories15M.bin.gz")
    path = models.write(model, tmp_path / "m.gguf", dtype=dtype)
    again, theirs = models.read(path), llama_cpp(path, 256)
    stories = gzip.decompress((shared_data / "tinystories" / "train_v1.txt.gz").read_bytes()).decode()
    windows, size = [], 0
    for story in filter(None, map(str.strip, stories.split("<|endoftext|>"))):
        if size > 100_000:
            break
        size += len(story.encode())
        ids = [again.tokenizer.begin, *again.tokenizer.encode(story).tolist()]
        assert theirs.tokenize(story.encode(), add_bos=True) == ids
        windows += [ids[at : at + 256] for at in range(0, len(ids) - 1, 255)]

    graph, params = pure(again)
    forward = jax.jit(lambda p, x: bind(graph, p)(x)[0])
    ours = lambda ids: np.asarray(forward(params, np.array([ids + [0] * (256 - len(ids))])))[: len(ids)]  # noqa: E731

    def perplexity(logits):
        nats = count = 0
        for ids in windows:
            x = logits(ids)[:-1].astype(np.float64)
            x -= x.max(-1, keepdims=True)
            nats += (np.log(np.exp(x).sum(-1)) - x[np.arange(len(x)), ids[1:]]).sum()
            count += len(x)
        return np.exp(nats / count)

    found, expected = perplexity(lambda ids: their_logits(theirs, ids)), perplexity(ours)
    print(f"{dtype}: ours {expected:.6f}, llama.cpp {found:.6f}")
    assert abs(found / expected - 1) < 1e-3
