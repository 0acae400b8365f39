"""Against TransformerLens on the same weights: cached activations, patching, attribution, logit lens."""

import warnings

import numpy as np
import pytest

import tinylm
from tinylm import probe
from tinylm.model import Transformer
from tinylm.probe.activations import seen

pytestmark = pytest.mark.filterwarnings("ignore")
T = 6


@pytest.fixture(scope="module", params=["llama", "gpt2", "stories260K"])
def pair(request):
    """A model here and there, and a text."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("torch")
        lens = pytest.importorskip("transformer_lens")
        if not hasattr(lens, "patching") or int(getattr(lens, "__version__", "3").split(".")[0]) > 3:
            pytest.skip("TransformerLens below version 4 is the oracle: HookedTransformer is gone since")
        import torch
        from hooked import hooked

        torch.set_num_threads(1)
        if request.param == "stories260K":
            path = request.getfixturevalue("shared_data") / "ckpt" / "stories260K" / "stories260K.bin"
            model = tinylm.load(path)
        else:
            small = {"vocab": 40, "context": 16, "width": 24, "layers": 2, "heads": 4, "init_std": 0.2}
            gpt2 = {"norm": "layernorm", "mlp": "gelu_tanh", "positions": "learned", "bias": True}
            llama = {"kv_heads": 2, "head": "untied"}
            model = Transformer(tinylm.ModelConfig(**small, **(llama if request.param == "llama" else gpt2)))
        theirs = hooked(model)
    rng = np.random.default_rng(0)
    clean = rng.integers(0, model.config.vocab, (1, T), dtype=np.int32)
    corrupt = clean.copy()
    corrupt[0, 2] = (corrupt[0, 2] + 7) % model.config.vocab
    return model, theirs, clean, corrupt


def theirs_of(x):
    import torch

    return torch.from_numpy(x.astype(np.int64))


def test_cached_activations(pair):
    model, theirs, clean, _ = pair
    logits, cache = theirs.run_with_cache(theirs_of(clean))
    ours = seen(model, clean, r"blocks\.\d+\.(resid|resid_mid|attn\.pattern|attn\.heads|mlp|mlp\.hidden)|logits")
    names = {"resid": "hook_resid_post", "resid_mid": "hook_resid_mid", "attn.pattern": "attn.hook_pattern"}
    names |= {"attn.heads": "attn.hook_z", "mlp": "hook_mlp_out", "mlp.hidden": "mlp.hook_post"}
    np.testing.assert_allclose(ours["logits"], logits.detach().numpy(), atol=1e-4)
    for layer in range(model.config.layers):
        for mine, yours in names.items():
            found = cache[f"blocks.{layer}.{yours}"].detach().numpy()
            np.testing.assert_allclose(ours[f"blocks.{layer}.{mine}"], found, atol=1e-4)


@pytest.mark.parametrize("part", ["resid_pre", "mlp", "heads"])
def test_patching(pair, part):
    import torch
    from transformer_lens import patching

    model, theirs, clean, corrupt = pair
    if part == "heads" and model.config.layers > 2:
        part = "pattern"  # the same path, fewer of their passes
    _, cache = theirs.run_with_cache(theirs_of(clean))
    metric = lambda logits: logits[0, -1, 3] - logits[0, -1, 5]  # noqa: E731
    patching.tqdm = lambda x, **_: x
    functions = {"resid_pre": patching.get_act_patch_resid_pre, "mlp": patching.get_act_patch_mlp_out}
    functions |= {"heads": patching.get_act_patch_attn_head_out_by_pos}
    functions |= {"pattern": patching.get_act_patch_attn_head_pattern_all_pos}
    with torch.no_grad():
        found = functions[part](theirs, theirs_of(corrupt), cache, metric).numpy()
    if part == "heads":
        found = found.transpose(0, 2, 1)
    ours = probe.sweep(model, clean, corrupt, probe.logit_difference([3], [5]), part, positions=part != "pattern")
    assert ours.shape == found.shape
    np.testing.assert_allclose(ours, found, atol=1e-4)


def test_direct_attribution(pair):
    model, theirs, clean, _ = pair
    _, cache = theirs.run_with_cache(theirs_of(clean))
    stack, labels = cache.get_full_resid_decomposition(-1, mlp_input=False, expand_neurons=False, return_labels=True)
    stack = cache.apply_ln_to_stack(stack, -1, pos_slice=None)
    stack = stack * theirs.ln_final.w  # which that leaves to folding
    found = (stack @ theirs.W_U)[:, 0, -1].detach().numpy()
    ours = probe.direct(model, clean)
    names = dict(zip(labels, found, strict=True))
    for name, value in zip(ours.names, ours.values[:, 0, -1], strict=True):
        if ".head." in name:
            _, layer, _, _, head = name.split(".")
            np.testing.assert_allclose(value, names[f"L{layer}H{head}"], atol=1e-4)
        elif name.endswith(".mlp"):
            np.testing.assert_allclose(value, names[f"{name.split('.')[1]}_mlp_out"], atol=1e-4)


def test_logit_lens(pair):
    model, theirs, clean, _ = pair
    _, cache = theirs.run_with_cache(theirs_of(clean))
    streams, _ = cache.accumulated_resid(-1, incl_mid=False, return_labels=True)
    found = theirs.unembed(theirs.ln_final(streams[:, 0])).detach().numpy()
    np.testing.assert_allclose(probe.logit_lens(model, clean).logits[:, 0], found, atol=1e-4)
