"""A model of the kit as TransformerLens's HookedTransformer, weights copied by hand: an independent oracle."""

import numpy as np


def hooked(model):
    """The same Llama-like or GPT-2-like decoder there. Needs torch and transformer_lens below 4."""
    import torch
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    from tinylm.weights import named

    c = model.config
    assert (c.block, c.kind) == ("pre", "decoder")
    rms, rope = c.norm == "rmsnorm", c.positions == "rope"
    acts = {"swiglu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_new"}
    gated = c.mlp == "swiglu"
    theirs = HookedTransformer(
        HookedTransformerConfig(
            d_model=c.width, d_head=c.head_width, n_layers=c.layers, n_ctx=c.context, n_heads=c.heads, d_mlp=c.hidden,
            d_vocab=c.vocab, act_fn=acts[c.mlp], gated_mlp=gated, eps=c.norm_eps, final_rms=rms,
            normalization_type="RMS" if rms else "LN", positional_embedding_type="rotary" if rope else "standard",
            rotary_dim=c.head_width if rope else None, rotary_base=int(c.theta), dtype=torch.float32, device="cpu",
            n_key_value_heads=c.kv_heads if c.kv_heads < c.heads else None, default_prepend_bos=False,
        )
    )  # fmt: skip
    p = {name: np.asarray(x, np.float32) for name, x in named(model).items()}
    new = {name: torch.zeros_like(x) for name, x in theirs.state_dict().items() if x.is_floating_point()}
    for name, x in theirs.state_dict().items():
        if name.endswith(("mask", "IGNORE", "rotary_sin", "rotary_cos")):
            new[name] = x
    table = p["embed.table"]
    read = p["head.out.kernel"] if c.head == "untied" else table.T
    given = {"embed.W_E": table, "unembed.W_U": read, "ln_final.w": p["norm.scale"]}
    if "norm.bias" in p:
        given["ln_final.b"] = p["norm.bias"]
    if not rope:
        given["pos_embed.W_pos"] = p["embed_positions.table"]
    split = lambda x, heads: x.reshape(c.width, heads, -1).transpose(1, 0, 2)  # noqa: E731
    few = "_" if c.kv_heads < c.heads else ""
    for i in range(c.layers):
        a = f"blocks.{i}"
        for ours, yours in (("attn_norm", "ln1"), ("mlp_norm", "ln2")):
            given[f"{a}.{yours}.w"] = p[f"{a}.{ours}.scale"]
            if not rms:
                given[f"{a}.{yours}.b"] = p[f"{a}.{ours}.bias"]
        given[f"{a}.attn.W_Q"] = split(p[f"{a}.attn.q.kernel"], c.heads)
        given[f"{a}.attn.{few}W_K"] = split(p[f"{a}.attn.k.kernel"], c.kv_heads)
        given[f"{a}.attn.{few}W_V"] = split(p[f"{a}.attn.v.kernel"], c.kv_heads)
        given[f"{a}.attn.W_O"] = p[f"{a}.attn.o.kernel"].reshape(c.heads, c.head_width, c.width)
        given[f"{a}.mlp.W_in"], given[f"{a}.mlp.W_out"] = p[f"{a}.mlp.up.kernel"], p[f"{a}.mlp.down.kernel"]
        if gated:
            given[f"{a}.mlp.W_gate"] = p[f"{a}.mlp.gate.kernel"]
        if c.bias:
            for ours, yours, heads in (("q", "b_Q", c.heads), ("k", "b_K", c.kv_heads), ("v", "b_V", c.kv_heads)):
                given[f"{a}.attn.{few if ours != 'q' else ''}{yours}"] = p[f"{a}.attn.{ours}.bias"].reshape(heads, -1)
            given[f"{a}.attn.b_O"] = p[f"{a}.attn.o.bias"]
            given[f"{a}.mlp.b_in"], given[f"{a}.mlp.b_out"] = p[f"{a}.mlp.up.bias"], p[f"{a}.mlp.down.bias"]
    for name, x in given.items():
        assert new[name].shape == x.shape, (name, new[name].shape, x.shape)
        new[name] = torch.from_numpy(np.ascontiguousarray(x))
    theirs.load_state_dict(new)
    return theirs.eval()
