"""Folders of transformers, read and written: layouts, refusals and damage. Nothing here needs torch or transformers;
`test_formats_transformers` has their opinion of the numbers.
"""

import functools
import gc
import json
import warnings

import numpy as np
import pytest
from damage import damaged, peak

from tinylm.config import ModelConfig
from tinylm.formats import hf, tables
from tinylm.formats.tables import FormatError
from tinylm.model import Transformer
from tinylm.tokenizer import Tokenizer
from tinylm.weights import assign, named

OURS = {"vocab": 512, "context": 32, "width": 32, "layers": 3, "heads": 4, "hidden": 48}
GPT = {"norm": "layernorm", "positions": "learned", "bias": True}
ROPE = {**GPT, "positions": "rope", "mlp": "gelu"}
BERT = {**GPT, "kind": "encoder", "block": "post", "mlp": "gelu", "embed_norm": True, "token_types": 2}
NEO = {**GPT, "mlp": "gelu_tanh", "qkv_bias": False, "attention_scale": 1.0}
EXACT = [  # architecture, settings that it says as they are
    ("LlamaForCausalLM", {}),
    ("LlamaForCausalLM", {"kv_heads": 2, "head": "untied", "theta": 777.0, "mlp": "geglu"}),
    ("LlamaForCausalLM", {"head_width": 16, "bias": True, "mlp": "reglu"}),
    ("LlamaModel", {"head": "none"}),
    ("MistralForCausalLM", {"window": 6}),
    ("Qwen2ForCausalLM", {"qkv_bias": True}),
    ("Qwen2ForCausalLM", {"qkv_bias": True, "window": (0, 6), "kv_heads": 1}),
    ("Qwen3ForCausalLM", {"qk_norm": True, "head_width": 16, "window": (0, 6)}),
    ("GPT2LMHeadModel", {**GPT, "mlp": "gelu_tanh", "dropout": 0.2}),
    ("GPT2LMHeadModel", {**GPT, "mlp": "gelu", "head": "untied", "attention_scale": 1.0}),
    ("GPT2Model", {**GPT, "mlp": "gelu_tanh", "head": "none"}),
    ("GPTNeoForCausalLM", {**NEO, "window": (0, 5)}),
    ("GPTNeoXForCausalLM", {**ROPE, "block": "parallel", "rotary": 2}),
    ("GPTNeoXForCausalLM", {**ROPE, "head": "untied", "heads": 2, "rotary": 6, "qkv_bias": True}),
    ("BertForMaskedLM", {**BERT, "head": "mlm", "norm_eps": 1e-12}),
    ("BertLMHeadModel", {**BERT, "head": "mlm", "kind": "decoder"}),
    ("BertForSequenceClassification", {**BERT, "head": "classes", "classes": 3, "mlp": "gelu_tanh"}),
    ("BertModel", {**BERT, "head": "none"}),
]
WITH_ZEROS = [  # what they always have and the model lacks is zero
    ("LlamaForCausalLM", {"bias": True, "qkv_bias": False}),
    ("Qwen2ForCausalLM", {"window": (0, 6, 6)}),
    ("GPT2LMHeadModel", {**GPT, "mlp": "gelu", "bias": False}),
    ("GPT2LMHeadModel", {**GPT, "mlp": "relu2", "qkv_bias": False}),
    ("BertForMaskedLM", {**BERT, "head": "mlm", "token_types": 0, "bias": False}),
]
WRITABLE = EXACT + WITH_ZEROS
TOKENIZER = Tokenizer.train(["One day, a fox met a wolf. It was sad. The end."] * 3, vocab=300)


def scrambled(settings):
    """A model of ours whose biases and norms are random too."""
    model = Transformer(ModelConfig(**{**OURS, **settings}), rngs=0, tokenizer=TOKENIZER)
    rng = np.random.default_rng(1)
    assign(model, {n: x + 0.3 * rng.standard_normal(x.shape).astype(np.float32) for n, x in named(model).items()})
    return model


def bits(model):
    return {name: np.asarray(x).tobytes() for name, x in named(model).items()}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def said(folder):
    return json.loads((folder / "config.json").read_text())


def change(folder, **changes):
    """Other fields in config.json."""
    (folder / "config.json").write_text(json.dumps(said(folder) | changes))


def pack(tensors, types="F32"):
    """A safetensors file, by the specification."""
    kinds = {"F32": np.float32, "F16": np.float16, "I64": np.int64, "F64": np.float64, "U8": np.uint8}
    entries, data = {}, b""
    for name, x in tensors.items():
        kind = types if isinstance(types, str) else types.get(name, "F32")
        raw = np.asarray(x, kinds[kind]).tobytes()
        entries[name] = {"dtype": kind, "shape": list(np.shape(x)), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    head = json.dumps(entries).encode()
    return len(head).to_bytes(8, "little") + head + data


def unpack(folder):
    """The tensors of a float32 file, read by hand."""
    raw = (folder / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    entries = json.loads(raw[8:start])
    entries.pop("__metadata__", None)
    return {
        name: np.frombuffer(raw[start:], "<f4", int(np.prod(e["shape"])), e["data_offsets"][0]).reshape(e["shape"])
        for name, e in entries.items()
    }


@pytest.fixture
def llama(tmp_path):
    return hf.write(scrambled({"head": "untied"}), tmp_path / "llama")


# --- there and back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("architecture", "settings"), EXACT, ids=[name for name, _ in EXACT])
def test_what_is_written_reads_back_bit_for_bit(architecture, settings, tmp_path):
    model = scrambled(settings)
    back = hf.read(hf.write(model, tmp_path))
    assert said(tmp_path)["architectures"] == [architecture]
    assert bits(back) == bits(model)
    expected = model.config if "Bert" in architecture or "GPT" in architecture else model.config.replace(dropout=0.0)
    assert back.config == expected
    assert back.tokenizer == TOKENIZER


@pytest.mark.parametrize(("architecture", "settings"), WITH_ZEROS, ids=[name for name, _ in WITH_ZEROS])
def test_what_a_model_lacks_is_zero(architecture, settings, tmp_path):
    model = scrambled(settings)
    back = hf.read(hf.write(model, tmp_path))
    assert said(tmp_path)["architectures"] == [architecture]
    found, wanted = bits(back), bits(model)
    assert {name: found[name] for name in wanted} == wanted
    added = found.keys() - wanted.keys()
    assert added
    assert not any(any(found[name]) for name in added)
    assert bits(hf.read(hf.write(back, tmp_path / "again"))) == found


def test_biases_that_a_config_denies_are_zero(tmp_path):
    """Llama's two flags, and Qwen3's one, against our one `bias`."""
    for number, (settings, kept) in enumerate(
        [({"bias": True}, "mlp"), ({"bias": True}, "attn"), ({"bias": True, "qk_norm": True}, "attn")]
    ):
        model = scrambled(settings)
        values = {n: np.asarray(x) for n, x in named(model).items()}
        gone = {n for n in values if n.startswith("blocks") and n.endswith(".bias") and f".{kept}." not in n}
        assign(model, {n: np.zeros_like(x) if n in gone else x for n, x in values.items()})
        folder = hf.write(model, tmp_path / str(number))
        tensors = unpack(folder)
        flags = {"mlp_bias": kept == "mlp", "attention_bias": kept == "attn"}
        change(folder, **flags)
        denied = "self_attn" if kept == "mlp" else "mlp"
        left = {n: x for n, x in tensors.items() if not (n.endswith("proj.bias") and denied in n)}
        (folder / "model.safetensors").write_bytes(pack(left))
        assert len(left) < len(tensors) or "qk_norm" in settings
        expected = {n: v for n, v in bits(model).items() if kept == "attn" or ".attn." not in n or "bias" not in n}
        found = bits(hf.read(folder))
        assert {n: found[n] for n in expected} == expected
        assert not any(any(found[n]) for n in found.keys() & gone)


def test_same_model_same_bytes(tmp_path):
    first = contents(hf.write(scrambled({}), tmp_path / "a"))
    assert first == contents(hf.write(scrambled({}), tmp_path / "b"))
    assert sorted(first) == sorted(hf.OURS)
    assert not any(len(x) % 4 for x in (first["model.safetensors"],))


def test_half_floats(tmp_path):
    model = scrambled({})
    wanted = np.asarray(model.embed.weight())
    import ml_dtypes

    for dtype, kind in (("float16", np.float16), ("bfloat16", ml_dtypes.bfloat16)):
        back = hf.read(hf.write(model, tmp_path / dtype, dtype=dtype))
        assert np.array_equal(back.embed.weight(), wanted.astype(kind).astype(np.float32))
    assign(model, {n: np.asarray(x) * 1e6 for n, x in named(model).items()})
    with pytest.raises(FormatError, match=r"exceed float16 \(use bfloat16\)"):
        hf.write(model, tmp_path / "large", dtype="float16")
    assert not (tmp_path / "large").exists()
    with pytest.raises(FormatError, match="float64"):
        hf.write(model, tmp_path / "large", dtype="float64")
    with pytest.raises(FormatError, match=r"dtype = \['f16'\]"):
        hf.write(model, tmp_path / "large", dtype=["f16"])
    first = next(iter(named(model)))
    assign(model, {n: np.full(x.shape, np.nan if n == first else 1.0, np.float32) for n, x in named(model).items()})
    for dtype in ("f32", "f16", "bf16"):
        with pytest.raises(FormatError, match=r"model\.\S+ holds values that are not finite$"):
            hf.write(model, tmp_path / "nan", dtype=dtype)
    for short, name in (("f32", "float32"), ("f16", "float16"), ("bf16", "bfloat16")):
        assert contents(hf.write(scrambled({}), tmp_path / short, dtype=short))["config.json"].count(name.encode()) == 2


def test_fused_layouts(tmp_path):
    """Each number says where it must land: GPT-2 holds q, k, v one after another, GPT-NeoX those of each head."""
    folder = hf.write(scrambled({**GPT, "mlp": "gelu"}), tmp_path / "gpt2")
    tensors = unpack(folder)
    fused = np.arange(32 * 96, dtype=np.float32).reshape(32, 96)
    (folder / "model.safetensors").write_bytes(pack({**tensors, "transformer.h.1.attn.c_attn.weight": fused}))
    attention = hf.read(folder).blocks[1].attn
    for x, start in (("q", 0), ("k", 32), ("v", 64)):
        assert np.array_equal(getattr(attention, x).weight(), fused[:, start : start + 32])

    folder = hf.write(scrambled({**ROPE, "block": "parallel"}), tmp_path / "neox")
    tensors = unpack(folder)
    fused = np.arange(96 * 32, dtype=np.float32).reshape(96, 32)
    name = "gpt_neox.layers.2.attention.query_key_value"
    tensors |= {f"{name}.weight": fused, f"{name}.bias": np.arange(96)}
    (folder / "model.safetensors").write_bytes(pack(tensors))
    attention = hf.read(folder).blocks[2].attn
    for i, x in enumerate("qkv"):  # row 24 h + 8 i + e of theirs is column 8 h + e of ours
        rows = [24 * h + 8 * i + e for h in range(4) for e in range(8)]
        assert np.array_equal(getattr(attention, x).weight(), fused[rows].T)
        assert np.array_equal(getattr(attention, x).bias[...], rows)


def test_what_old_files_hold(tmp_path):
    """Buffers, names of the bare model, gamma and beta, tied tensors stored twice."""
    model = scrambled({**GPT, "mlp": "gelu_tanh"})
    folder = hf.write(model, tmp_path / "gpt2")
    tensors = {n.removeprefix("transformer."): x for n, x in unpack(folder).items()}
    tensors |= {"h.0.attn.bias": np.ones((1, 1, 4, 4)), "h.0.attn.masked_bias": np.array(-1e4)}
    tensors["lm_head.weight"] = tensors["wte.weight"]
    (folder / "model.safetensors").write_bytes(pack(tensors, {"h.0.attn.bias": "U8"}))
    assert bits(hf.read(folder)) == bits(model)
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    (folder / "model.safetensors").write_bytes(pack(tensors))
    with pytest.raises(FormatError, match=r"lm_head\.weight differs from wte\.weight.*tie_word_embeddings = false"):
        hf.read(folder)
    del tensors["wte.weight"]  # tied, and stored under the other name
    tensors["lm_head.weight"] = tensors["lm_head.weight"] - 1
    (folder / "model.safetensors").write_bytes(pack(tensors))
    assert hf.read(folder).config.head == "tied"

    model = scrambled({**BERT, "head": "mlm"})
    folder = hf.write(model, tmp_path / "bert")
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    tensors = unpack(folder)
    for new, name in old.items():
        tensors = {n.replace(new, name): x for n, x in tensors.items()}
    tensors |= {"bert.embeddings.position_ids": np.arange(32)[None], "bert.pooler.dense.bias": np.zeros(32)}
    tensors |= {"cls.seq_relationship.weight": np.zeros((2, 32)), "cls.predictions.decoder.bias": np.zeros(512)}
    tensors["cls.predictions.decoder.bias"] = tensors.pop("cls.predictions.bias")
    (folder / "model.safetensors").write_bytes(pack(tensors, {"bert.embeddings.position_ids": "I64"}))
    assert bits(hf.read(folder)) == bits(model)


def sharded(folder):
    """The folder's tensors in two shards; returns the index."""
    tensors = unpack(folder)
    names = sorted(tensors)
    where = {}
    for number, part in enumerate((names[:10], names[10:]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        (folder / file).write_bytes(pack({name: tensors[name] for name in part}))
        where |= dict.fromkeys(part, file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return where


def test_shards(llama):
    expected = bits(hf.read(llama))
    where = sharded(llama)
    assert bits(hf.read(llama)) == expected
    index = llama / "model.safetensors.index.json"
    name = next(iter(where))
    index.write_text(json.dumps({"weight_map": {**where, "no.such": where[name], name: "../secret.safetensors"}}))
    with pytest.raises(FormatError, match=r"'../secret\.safetensors'") as error:
        hf.read(llama)
    assert "lacks no.such" in str(error.value)
    assert f"holds {name}, which the index does not say" in str(error.value)
    index.write_text(json.dumps({"weight_map": where}))
    (llama / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FormatError, match=r"model-00002-of-00002\.safetensors is missing"):
        hf.read(llama)


def test_published_bert(shared_data):
    folder = shared_data / "ckpt" / "tiny_random_bert"
    model = hf.read(folder / "safetensors")
    assert (model.config.head, model.config.layers, model.config.token_types) == ("mlm", 5, 16)
    assert model.tokenizer.vocab <= model.config.vocab
    with pytest.raises(FormatError, match=r"pytorch_model\.bin.*can run any code.*save_pretrained"):
        hf.read(folder / "pytorch_bin")


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["OPTForCausalLM"]}, r"OPTForCausalLM.*LlamaForCausalLM"),
        ({"architectures": ["MistralForCausalLM"]}, "model_type = 'llama'"),
        ({"architectures": None, "model_type": "mamba"}, "mamba"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, r"rope_scaling\.rope_type = 'llama3'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, r"rope_parameters\.rope_type = 'yarn'"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "one rotation for all layers"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"hidden_act": "gelu_new"}, "hidden_act = 'gelu_new': the kit knows silu"),
        ({"sliding_window": 4}, "sliding_window = 4"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"hidden_size": "32"}, "hidden_size = '32'"),
        ({"num_hidden_layers": 2**40}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "kv_heads = 3"),
        ({"vocab_size": 2**30}, "the largest tensor has 16,384 numbers"),
        ({"num_hidden_layers": 4}, "layers.3.self_attn.q_proj.weight is missing"),
        ({"num_hidden_layers": 2}, "layers.2.self_attn.q_proj.weight is unknown"),
        ({"intermediate_size": 47}, r"shape \(48, 32\) instead of \(47, 32\)"),
        ({"attention_bias": True}, r"q_proj\.bias is missing"),
    ],
)
def test_settings_that_cannot_be_said(llama, changes, message):
    change(llama, **changes)
    with pytest.raises(FormatError, match=message):
        hf.read(llama)


@pytest.mark.parametrize(
    ("settings", "changes", "message"),
    [
        ({**GPT, "mlp": "gelu"}, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
        ({**GPT, "mlp": "gelu"}, {"add_cross_attention": True}, "add_cross_attention = True"),
        ({**GPT, "mlp": "gelu"}, {"activation_function": "relu"}, "activation_function = 'relu'"),
        (NEO, {"attention_types": [[["global"], 2]]}, "for each of 3 layers"),
        (NEO, {"attention_types": [[["global"], 10**9]]}, "for each of 3 layers"),
        (NEO, {"attention_layers": ["local"] * 3}, "attention_layers = "),
        (ROPE, {"rope_parameters": {"partial_rotary_factor": 0.2}}, "rotates 1 of 8"),
        (ROPE, {"head_dim": 16}, "head_dim = 16"),
        ({**BERT, "head": "mlm"}, {"position_embedding_type": "relative_key"}, "relative_key"),
        ({**BERT, "head": "mlm"}, {"hidden_act": "gelu_new"}, "exact gelu"),
        ({**BERT, "head": "mlm"}, {"tie_word_embeddings": False}, "tie_word_embeddings = False"),
        ({**BERT, "head": "mlm"}, {"hidden_act": "silu"}, "hidden_act = 'silu'"),
        ({"window": 6}, {"layer_types": ["full_attention"] * 3}, "layer_types"),
        ({"qkv_bias": True}, {"layer_types": ["sliding_attention"] * 3}, "use_sliding_window is false"),
        ({"qkv_bias": True}, {"layer_types": ["full_attention"]}, "for each of 3 layers"),
    ],
)
def test_settings_of_others_that_cannot_be_said(settings, changes, message, tmp_path):
    change(hf.write(scrambled(settings), tmp_path), **changes)
    with pytest.raises(FormatError, match=message):
        hf.read(tmp_path)


def test_all_problems_are_told_together(llama):
    change(llama, hidden_act="tanh", rope_scaling={"type": "linear"}, sliding_window=3, quantization_config={"bits": 4})
    tensors = unpack(llama)
    (llama / "model.safetensors").write_bytes(pack(tensors, {"lm_head.weight": "F64"}))
    with pytest.raises(FormatError) as error:
        hf.read(llama)
    for what in (
        str(llama),
        "hidden_act",
        "linear",
        "sliding_window",
        "quantization_config",
        "lm_head.weight has type F64",
    ):
        assert what in str(error.value)
    hf.write(scrambled({"head": "untied"}), llama.parent / "other")
    tensors = unpack(llama.parent / "other")
    tensors["extra"] = tensors.pop("lm_head.weight")
    tensors["model.norm.weight"] = np.ones(31)
    (llama.parent / "other" / "model.safetensors").write_bytes(pack(tensors))
    with pytest.raises(FormatError) as error:
        hf.read(llama.parent / "other")
    for what in ("lm_head.weight is missing", "extra is unknown", "model.norm.weight has shape (31,)"):
        assert what in str(error.value)


def test_weights_that_are_not_finite(llama):
    tensors = unpack(llama)
    tensors["model.norm.weight"] = np.full(32, np.nan)
    (llama / "model.safetensors").write_bytes(pack(tensors))
    with pytest.raises(FormatError, match=r"model\.norm\.weight holds values that are not finite"):
        hf.read(llama)


def test_folders_that_hold_no_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        hf.read(tmp_path / "none")
    with pytest.raises(FormatError, match=r"no config\.json"):
        hf.read(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FormatError, match=r"no model\.safetensors"):
        hf.read(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(FormatError, match=r"model\.safetensors is damaged, .*: the file is empty$"):
        hf.read(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").mkdir()
    with pytest.raises(FormatError, match=r"config\.json is no file: it should hold the model's settings"):
        hf.read(tmp_path)


def test_a_tokenizer_that_the_kit_refuses_is_left_out_with_a_warning(llama):
    (llama / "tokenizer.json").write_text('{"model": {"type": "Strange"}}')
    with pytest.warns(UserWarning, match=r"without its tokenizer.*Strange"):
        assert hf.read(llama).tokenizer is None
    TOKENIZER.train(["many words of all kinds"], vocab=261).save(llama)
    change(llama, vocab_size=512)
    (llama / "tokenizer.json").unlink()
    assert hf.read(llama).tokenizer is None


@pytest.mark.parametrize(
    ("settings", "reasons"),
    [
        ({"norm": "layernorm"}, ["not LlamaForCausalLM: norm = 'layernorm' (it says 'rmsnorm')"]),
        ({"softcap": 30.0, "qk_norm": True}, ["not Qwen3ForCausalLM: softcap = 30.0 (it says 0.0)"]),
        ({"mlp": "relu2"}, ["mlp = 'relu2' (it says 'swiglu')"]),
        ({"window": (0, 4, 8)}, ["window = (0, 4, 8)"]),
        ({"rotary": 4}, ["rotary = 4"]),
        ({"qk_norm": True, "bias": True}, ["not Qwen3ForCausalLM: it has no place for blocks.*.mlp.down.bias"]),
        ({**BERT, "head": "tied"}, ["head = 'tied' (it says 'mlm')"]),
        ({**BERT, "head": "mlm", "mlp": "gelu_tanh"}, ["knows only exact gelu"]),
        ({"positions": ("rope", "none")}, ["positions = ('rope', 'none') (it says 'rope')"]),
    ],
)
def test_models_that_no_architecture_says(settings, reasons, tmp_path):
    with pytest.raises(FormatError) as error:
        hf.write(scrambled(settings), tmp_path / "out")
    for reason in reasons:
        assert reason in str(error.value)
    assert not (tmp_path / "out").exists()


def test_folders_that_are_not_ours_stay(tmp_path, llama):
    model = scrambled({})
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "letter.txt").write_text("Dear")
    with pytest.raises(FileExistsError, match=r"letter\.txt"):
        hf.write(model, tmp_path / "notes")
    before = contents(llama)
    change(llama, transformers_version="5.0")
    with pytest.raises(FileExistsError, match="another model"):
        hf.write(model, llama)
    (llama / "config.json").write_bytes(before["config.json"])
    model.tokenizer = None
    hf.write(model, llama)  # our own is replaced, and nothing of it is left
    assert sorted(contents(llama)) == ["config.json", "generation_config.json", "model.safetensors"]
    assert bits(hf.read(llama)) == bits(model)


# --- damage -----------------------------------------------------------------------------------------------------------

VALUES = [None, True, False, 0, -1, 1, 2, 3, 7, 2**31, 2**63, 10**40, float("inf"), float("nan"), 0.5, -1.5, 1e-300]
VALUES += ["", "x", "gelu", "default", "\ud800", [], [1], [[]], {}, {"a": 1}, {"rope_type": []}, [[["global"], 10**9]]]
VALUES += [["full_attention"] * 3, ["LlamaForCausalLM"], "bert", [[["global"] * 3, 1]] * 100]
SEEDS = [{}, {"qkv_bias": True, "window": (0, 6)}, {**GPT, "mlp": "gelu"}, {**NEO, "window": (0, 5)}, ROPE]
SEEDS += [{**BERT, "head": "mlm"}, {**BERT, "head": "classes", "classes": 3}]
MORE = ["rope_scaling", "head_dim", "sliding_window", "layer_types", "attention_layers", "id2label", "num_labels"]
SOUND = object()
SMALL = {"width": 8, "layers": 2, "hidden": 8, "vocab": 16, "context": 8, "heads": 2, "head_width": 4}


def attack(tmp_path, monkeypatch, count, seed=0):
    """Read `count` damaged folders: damaged weights, damaged text of config.json, changed values in it.

    No format here has a checksum: a folder that still describes a sound model is loaded, and counted. Anything but a
    FormatError otherwise fails, and so does memory above twice the folder's size and 20 MB.
    """
    loaded = worst = 0
    monkeypatch.setattr(tables, "shapes", functools.lru_cache(tables.shapes))  # JAX takes most of the time otherwise
    monkeypatch.setattr(tables, "build", lambda config, params, tokenizer: SOUND)
    for number, settings in enumerate(SEEDS):
        folder = tmp_path / str(number)
        small = {**SMALL, **settings}
        hf.write(Transformer(ModelConfig(**small), rngs=0), folder)
        sound = contents(folder)
        rng = np.random.default_rng([seed, number])
        gc.collect()
        gc.freeze()  # `peak` collects before each measurement: all that JAX holds takes it 0.3 s
        raw = json.loads(sound["config.json"])
        keys = [*raw, *MORE]
        share = -(-count // (3 * len(SEEDS)))
        files = [("model.safetensors", bad) for _, bad in damaged(sound["model.safetensors"], share, seed)]
        files += [("config.json", bad) for _, bad in damaged(sound["config.json"], share, seed)]
        for _ in range(share):
            changes = {
                keys[rng.integers(len(keys))]: VALUES[rng.integers(len(VALUES))] for _ in range(rng.integers(1, 4))
            }
            files.append(("config.json", json.dumps(raw | changes).encode()))
        for name, bad in files:
            (folder / name).write_bytes(bad)
            found, held = peak(lambda folder=folder: hf.read(folder))
            (folder / name).write_bytes(sound[name])
            assert found is SOUND or isinstance(found, FormatError), (name, bad[:2000], found)
            loaded += found is SOUND
            worst = max(worst, held - 2 * (len(bad) + sum(map(len, sound.values()))))
        gc.unfreeze()
    assert worst < 20e6
    assert 0 < loaded < count
    return loaded, worst


def test_damaged_folders_are_refused(tmp_path, monkeypatch):  # P27
    attack(tmp_path, monkeypatch, 300)


@pytest.mark.slow
def test_ten_thousand_damaged_folders_are_refused(tmp_path, monkeypatch):
    print(attack(tmp_path, monkeypatch, 10_000, seed=1))


def test_damaged_index(llama, monkeypatch):
    monkeypatch.setattr(tables, "shapes", functools.lru_cache(tables.shapes))
    monkeypatch.setattr(tables, "build", lambda config, params, tokenizer: SOUND)
    sharded(llama)
    index = llama / "model.safetensors.index.json"
    sound = index.read_bytes()
    for name, bad in damaged(sound, 100):
        index.write_bytes(bad)
        try:
            hf.read(llama)
        except FormatError:
            continue
        except Exception as error:
            raise AssertionError(name) from error


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"[]",
        b"null",
        b'{"x": 1, "x": 1}',
        b'{"x":{"dtype":"F32","shape":[281474976710656,281474976710656,0],"data_offsets":[0,0]}}',
        b'{"x":{"dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,0]}}',
        b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"y":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b'{"x":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}',
        b'{"x":{"dtype":["F32"],"shape":[1],"data_offsets":[0,4]}}',
        b'{"' + b"n" * 300 + b'":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b"9" * 10_000,
        b"\xff\xfe",
    ],
)
def test_headers_that_lie(llama, text):  # P27
    (llama / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(FormatError, match=r"model\.safetensors is damaged|is unknown|is missing|largest tensor"):
        hf.read(llama)
    with pytest.raises(FormatError):
        (llama / "config.json").write_bytes(text)
        hf.read(llama)


def test_a_deep_model(tmp_path, monkeypatch):
    """Many layers take JAX seconds: what is wrong with them is found without it."""
    folder = hf.write(Transformer(ModelConfig(**{**SMALL, "layers": hf.DEEP + 1}), rngs=0), tmp_path)
    assert hf.read(folder).config.layers == hf.DEEP + 1
    described = []
    monkeypatch.setattr(
        tables, "shapes", lambda config, old=tables.shapes: described.append(config.layers) or old(config)
    )
    tensors = unpack(folder)
    del tensors["model.layers.9.mlp.up_proj.weight"]
    tensors["model.layers.16.self_attn.q_proj.weight"] = np.zeros((8, 7))
    (folder / "model.safetensors").write_bytes(pack(tensors))
    with pytest.raises(FormatError, match=r"layers\.9\.mlp\.up_proj\.weight is missing") as error:
        hf.read(folder)
    assert "model.layers.16.self_attn.q_proj.weight has shape (8, 7) instead of (8, 8)" in str(error.value)
    assert set(described) == {1}


def test_warnings_are_not_needed(llama):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hf.read(llama)
