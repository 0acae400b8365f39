"""Our models against Hugging Face's: theirs read here, ours opened there, with the same logits and the same text.

Needs `torch` and `transformers`, which the kit itself never does; without them these tests are skipped.
"""

import json
import logging

import jax
import numpy as np
import pytest
from test_formats_hf import BERT, GPT, NEO, ROPE, TOKENIZER, WRITABLE, scrambled

import tinylm
from tinylm.config import ModelConfig, Sampling
from tinylm.formats import hf, pieces
from tinylm.generation import generate, generate_tokens
from tinylm.model import Transformer
from tinylm.tokenizer import Tokenizer
from tinylm.weights import bind, pure

torch = pytest.importorskip("torch", reason="torch is not installed: no second opinion from Hugging Face")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # theirs are not ours to mend; what they log is tested below

TOLERANCE = 1e-4
TOKENS = np.random.default_rng(0).integers(0, 61, (2, 20)).astype(np.int32)
SIZES = {"vocab_size": 61, "hidden_size": 32, "max_position_embeddings": 24}
LLAMA = {**SIZES, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
NEO_JSON = {**SIZES, "num_layers": 3, "num_heads": 4, "window_size": 5}
NEO_JSON |= {"attention_types": [[["global", "local", "global"], 1]]}
NEOX = {**SIZES, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
GPT2 = {"vocab_size": 61, "n_positions": 24, "n_embd": 32, "n_layer": 3, "n_head": 4}
QWEN = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
THETA = {"rope_type": "default", "rope_theta": 500.0}

# architecture, settings; each line is one more way to say the same family
CASES = [
    ("LlamaForCausalLM", LLAMA),
    ("LlamaForCausalLM", {**LLAMA, "tie_word_embeddings": True, "rope_parameters": THETA}),
    ("LlamaForCausalLM", {**LLAMA, "attention_bias": True, "head_dim": 16, "rms_norm_eps": 1e-3}),
    ("LlamaForCausalLM", {**LLAMA, "mlp_bias": True, "num_key_value_heads": 4}),
    ("LlamaForCausalLM", {**LLAMA, "attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"}),
    ("LlamaForCausalLM", {**LLAMA, "hidden_act": "relu"}),
    ("LlamaModel", LLAMA),
    ("MistralForCausalLM", {**LLAMA, "sliding_window": 6, "head_dim": 8}),
    ("MistralForCausalLM", {**LLAMA, "sliding_window": None, "head_dim": 12}),
    ("Qwen2ForCausalLM", LLAMA),
    ("Qwen2ForCausalLM", {**LLAMA, **QWEN, "tie_word_embeddings": True}),
    ("Qwen3ForCausalLM", {**LLAMA, "head_dim": 16}),
    ("Qwen3ForCausalLM", {**LLAMA, **QWEN, "head_dim": 16, "attention_bias": True, "tie_word_embeddings": True}),
    ("GPTNeoForCausalLM", NEO_JSON),
    ("GPTNeoForCausalLM", {**NEO_JSON, "attention_types": [[["global"], 3]], "intermediate_size": 40}),
    ("GPTNeoForCausalLM", {**NEO_JSON, "tie_word_embeddings": False, "activation_function": "gelu"}),
    ("GPTNeoXForCausalLM", NEOX),
    ("GPTNeoXForCausalLM", {**NEOX, "rope_parameters": {**THETA, "partial_rotary_factor": 0.5}}),
    (
        "GPTNeoXForCausalLM",
        {**NEOX, "rope_parameters": {**THETA, "partial_rotary_factor": 1.0}, "hidden_act": "gelu_new"},
    ),
    ("GPTNeoXForCausalLM", {**NEOX, "use_parallel_residual": False, "attention_bias": False}),
    ("GPTNeoXForCausalLM", {**NEOX, "tie_word_embeddings": True, "hidden_act": "gelu_fast"}),
    ("GPT2LMHeadModel", GPT2),
    ("GPT2LMHeadModel", {**GPT2, "tie_word_embeddings": False, "n_inner": 40, "activation_function": "gelu"}),
    ("GPT2LMHeadModel", {**GPT2, "scale_attn_weights": False, "activation_function": "gelu_pytorch_tanh"}),
    ("GPT2Model", GPT2),
    ("BertForMaskedLM", NEOX),
    ("BertForMaskedLM", {**NEOX, "layer_norm_eps": 1e-3, "type_vocab_size": 3, "is_decoder": True}),
    ("BertLMHeadModel", {**NEOX, "is_decoder": True}),
    ("BertForPreTraining", NEOX),
    ("BertForSequenceClassification", {**NEOX, "num_labels": 3, "hidden_act": "gelu_new"}),
    ("BertModel", NEOX),
]
NAMES = [f"{name}-{i}" for i, (name, _) in enumerate(CASES)]


def theirs(architecture, settings):
    """A random model; biases and norms are random too, as no fresh model's are."""
    torch.manual_seed(0)
    kind = getattr(transformers, architecture)
    model = kind(kind.config_class(**settings)).eval()
    with torch.no_grad():
        for name, x in model.named_parameters():
            x.copy_(torch.randn_like(x) * 0.3 + (1.0 if x.ndim == 1 and name.endswith("weight") else 0.0))
    return model


def their_logits(model, tokens=TOKENS, **extra):
    with torch.no_grad():
        out = model(torch.tensor(tokens, dtype=torch.long), **extra)
    found = next(out[name] for name in ("logits", "prediction_logits", "last_hidden_state") if name in out)
    return found.float().numpy()


def our_logits(model, tokens=TOKENS, **extra):
    graph, params = pure(model)
    return np.asarray(jax.jit(lambda p, x, kw: bind(graph, p)(x, **kw))(params, tokens, extra))


@pytest.mark.parametrize(("architecture", "settings"), CASES, ids=NAMES)
def test_their_models_give_the_same_logits_here(architecture, settings, tmp_path):
    model = theirs(architecture, settings)
    model.save_pretrained(tmp_path)
    extra, ours = {}, {}
    if architecture.startswith("Bert"):
        types = np.tile(np.arange(20) // 12, (2, 1))
        extra, ours = {"token_type_ids": torch.tensor(types)}, {"types": types.astype(np.int32)}
    off = np.abs(our_logits(hf.read(tmp_path), **ours) - their_logits(model, **extra)).max()
    print(f"{architecture}, read here: {off:.1e}")
    assert off <= TOLERANCE, off


# --- old fields, other files ------------------------------------------------------------------------------------------


def rewritten(folder, **changes):
    """The config.json with other fields; None removes one."""
    raw = json.loads((folder / "config.json").read_text()) | changes
    raw = {name: value for name, value in raw.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(raw))


@pytest.mark.parametrize(
    ("architecture", "settings", "old"),
    [
        ("LlamaForCausalLM", {**LLAMA, "rope_parameters": THETA}, {"rope_theta": 500.0, "rope_parameters": None}),
        (
            "LlamaForCausalLM",
            {**LLAMA, "rope_parameters": THETA},
            {"rope_theta": 500, "rope_parameters": None, "rope_scaling": {"type": "default"}, "head_dim": None},
        ),
        (
            "GPTNeoXForCausalLM",
            {**NEOX, "rope_parameters": {**THETA, "partial_rotary_factor": 0.5}},
            {"rotary_pct": 0.5, "rotary_emb_base": 500, "rope_parameters": None},
        ),
        ("GPTNeoXForCausalLM", NEOX, {"rope_parameters": None}),  # a quarter rotates where nothing is said
        ("GPTNeoForCausalLM", NEO_JSON, {"attention_types": None}),
        ("Qwen2ForCausalLM", {**LLAMA, **QWEN}, {"layer_types": None, "max_window_layers": 1}),
        ("BertModel", NEOX, {"architectures": None}),
        ("BertForMaskedLM", NEOX, {"architectures": None}),
        ("BertForSequenceClassification", NEOX, {"architectures": None}),
        ("GPT2LMHeadModel", GPT2, {"architectures": None}),
    ],
)
def test_old_and_missing_fields(architecture, settings, old, tmp_path):
    model = theirs(architecture, settings)
    model.save_pretrained(tmp_path)
    rewritten(tmp_path, **old)
    expected = their_logits(type(model).from_pretrained(tmp_path).eval())  # they read the old fields too
    assert np.abs(expected - their_logits(model)).max() <= TOLERANCE
    assert np.abs(our_logits(hf.read(tmp_path)) - expected).max() <= TOLERANCE


def test_shards(tmp_path):
    model = theirs("GPTNeoXForCausalLM", NEOX)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert np.abs(our_logits(hf.read(tmp_path)) - their_logits(model)).max() <= TOLERANCE


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_floats(dtype, tmp_path):
    theirs("LlamaForCausalLM", LLAMA).to(getattr(torch, dtype)).save_pretrained(tmp_path)
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert np.abs(our_logits(hf.read(tmp_path)) - their_logits(model)).max() <= TOLERANCE


def test_gpt2_without_its_prefix(tmp_path):
    """As it was published: names of the bare model, and buffers of masks."""
    model = theirs("GPT2LMHeadModel", GPT2)
    model.transformer.save_pretrained(tmp_path)
    from safetensors.numpy import load_file, save_file

    tensors = load_file(tmp_path / "model.safetensors")
    tensors |= {f"h.{i}.attn.bias": np.ones((1, 1, 24, 24), np.uint8) for i in range(3)}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    rewritten(tmp_path, architectures=["GPT2LMHeadModel"])
    assert np.abs(our_logits(hf.read(tmp_path)) - their_logits(model)).max() <= TOLERANCE


# --- ours there -------------------------------------------------------------------------------------------------------


def opened(folder):
    """Their model of a folder of ours: their logger and their loading report must find nothing to say."""
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    kinds = {"ForSequenceClassification": "ForSequenceClassification", "ForMaskedLM": "ForMaskedLM"}
    kinds |= {"ForCausalLM": "ForCausalLM", "LMHeadModel": "ForCausalLM", "Model": ""}
    kind = next(auto for ending, auto in kinds.items() if architecture.endswith(ending))
    auto = getattr(transformers, f"AutoModel{kind}")
    said = []
    listener = logging.Handler(logging.WARNING)
    listener.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("transformers").addHandler(listener)
    try:
        model, report = auto.from_pretrained(folder, output_loading_info=True)
    finally:
        logging.getLogger("transformers").removeHandler(listener)
    assert said == []
    assert not any(report.values()), report
    assert type(model).__name__ == architecture
    return model.eval()


@pytest.mark.parametrize(("architecture", "settings"), WRITABLE, ids=[name for name, _ in WRITABLE])
def test_our_models_give_the_same_logits_there(architecture, settings, tmp_path):
    model = scrambled(settings)
    hf.write(model, tmp_path)
    there = opened(tmp_path)
    assert type(there).__name__ == architecture
    off = np.abs(our_logits(model) - their_logits(there)).max()
    print(f"{architecture}, opened there: {off:.1e}")
    assert off <= TOLERANCE, off


def test_published_bert(shared_data):
    folder = shared_data / "ckpt" / "tiny_random_bert" / "safetensors"
    model = transformers.BertLMHeadModel.from_pretrained(folder).eval()
    assert np.abs(our_logits(hf.read(folder)) - their_logits(model)).max() <= TOLERANCE


def test_their_tokenizer_gives_the_same_ids(tmp_path):
    for number, settings in enumerate(({}, {**GPT, "mlp": "gelu"}, {**BERT, "head": "mlm"})):
        folder = hf.write(scrambled(settings), tmp_path / str(number))
        there = transformers.AutoTokenizer.from_pretrained(folder)
        for text in ("One day, a fox met a wolf.", " two  spaces\n\nand lines", "Ünïcode 语🦙", ""):
            assert there(text, add_special_tokens=False)["input_ids"] == TOKENIZER.encode(text).tolist()
            assert there.decode(TOKENIZER.encode(text)) == text
        assert there.eos_token_id == there.bos_token_id == TOKENIZER.end
        assert (there.pad_token_id, there.mask_token_id) == (TOKENIZER.pad, TOKENIZER.mask)
    assert (there.cls_token_id, there.sep_token_id) == (TOKENIZER.cls, TOKENIZER.sep)


def test_published_tokenizers_give_the_same_ids(shared_data, tmp_path):
    folder = shared_data / "tokenizers"
    found = [Tokenizer(pieces.sentencepiece(folder / "llama2_tokenizer.model"))]
    found += [Tokenizer.load(folder / f"{name}_tokenizer.json") for name in ("babyberta", "bert-uncased")]
    for number, tokenizer in enumerate(found):
        model = Transformer(
            ModelConfig(vocab=tokenizer.vocab, context=16, width=8, layers=1, heads=2), tokenizer=tokenizer
        )
        there = transformers.AutoTokenizer.from_pretrained(hf.write(model, tmp_path / str(number)))
        for text in (
            "One day, a fox met a wolf.",
            " two  spaces\n\nand lines",
            "Ünïcode 语🦙",
            "",
            "it's 12345 o'clock!",
        ):
            assert there(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text).tolist()
        assert (there.bos_token_id, there.eos_token_id) == (tokenizer.begin, tokenizer.end)


def test_pairs_of_texts_are_framed_as_theirs(tmp_path):
    """An encoder's cls and sep, and the types that BERT's own tokenizer gives."""
    raw = pieces.wordpieces(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "one", "day", "fox"], lowercase=True)
    (tmp_path / "vocab.txt").write_text("\n".join(raw["model"]["vocab"]) + "\n")
    own = transformers.BertTokenizer.from_pretrained(tmp_path)
    for number, settings in enumerate(({"head": "mlm"}, {"head": "classes", "classes": 2}, {"head": "none"})):
        config = ModelConfig(**{**BERT, **settings}, vocab=8, context=16, width=8, layers=1, heads=2)
        folder = hf.write(Transformer(config, tokenizer=Tokenizer(raw)), tmp_path / str(number))
        there = transformers.AutoTokenizer.from_pretrained(folder)
        for texts in (("one day",), ("one day", "fox")):
            assert there(*texts)["input_ids"] == own(*texts)["input_ids"]
            assert there(*texts)["token_type_ids"] == own(*texts)["token_type_ids"]
        with torch.no_grad():
            opened(folder)(**there("one day", "fox", return_tensors="pt"))
        assert hf.read(folder).tokenizer == Tokenizer(raw)


GREEDY = [{"kv_heads": 2}, {**GPT, "mlp": "gelu_tanh"}, {"window": 6}, {**NEO, "window": (0, 5)}, {**ROPE, "rotary": 4}]


@pytest.mark.parametrize("settings", GREEDY)
def test_greedy_text_is_the_same(settings, tmp_path):
    model = scrambled(settings)
    there = opened(hf.write(model, tmp_path))
    prompt = TOKENIZER.encode("One day")
    ours = next(generate_tokens(model, [prompt], tokens=16, sampling=Sampling(temperature=0.0), chunk=16))[0]
    with torch.no_grad():
        ids = torch.tensor(prompt[None].astype(np.int64))
        banned = list(range(TOKENIZER.vocab, 512))  # ids without a text, which ours never gives
        made = there.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, min_new_tokens=16, do_sample=False,
            eos_token_id=None, suppress_tokens=banned, pad_token_id=0,
        )  # fmt: skip
    assert made[0, len(prompt) :].tolist() == ours.tolist()


def same_text(model, prompt, tokens, folder):
    """Their tokenizer, model and generate with nothing said but greedily, against ours."""
    there, tokenizer = opened(hf.write(model, folder)), transformers.AutoTokenizer.from_pretrained(folder)
    made = there.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=tokens, do_sample=False)
    text = tokenizer.decode(made[0], skip_special_tokens=True)
    assert text == generate(model, prompt, tokens=tokens, temperature=0)
    assert hf.read(folder).tokenizer == model.tokenizer
    return text


@pytest.mark.parametrize("settings", GREEDY)
def test_a_prompt_is_continued_there_as_here(settings, tmp_path):
    for number, prompt in enumerate(("One day", "", "The fox ")):
        same_text(scrambled(settings), prompt, 16, tmp_path / str(number))
    instruct = scrambled(settings)
    instruct.tokenizer = TOKENIZER.with_roles({"begin": TOKENIZER.cls, "end": TOKENIZER.sep})
    same_text(instruct, "One day", 16, tmp_path / "instruct")


def test_a_published_model_tells_the_same_story_there(shared_data, tmp_path):
    model = tinylm.load(shared_data / "ckpt" / "stories260K" / "stories260K.bin")
    for number, prompt in enumerate(("Once upon a time", "One day, Lily")):
        assert len(same_text(model, prompt, 100, tmp_path / str(number))) > 150
