r"""1.58 bits: weights of -1, 0 and 1 times a scale, in the forward pass of an ordinary training.

    bitnet(model)                                                            # all of a recipe, norms included
    edit(model, r"blocks\.\d+\.(attn|mlp)\.\w+", "ternary", scale="median")  # the matrices alone

The arithmetic is BitNet b1.58's (Ma et al. 2024) with the median of b1.58 Reloaded (Nielsen and Schneider-Kamp 2024):
codes = clip(round(W / scale), -1, 1), inputs in int8 per token, y = codes' product times both scales, and gradients
that know nothing of it: dL/dx = g (scale codes), dL/dW = g' x_rounded.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tinylm.parts import RMSNorm
from tinylm.techniques import EditError, Technique, all_or_none, edit, technique
from tinylm.techniques.rounding import (
    Cells,
    Per,
    Rounding,
    Stored,
    kept,
    mean,
    median,
    nearest,
    one_of,
    optimal,
    require,
)
from tinylm.techniques.rounding import stochastic as drawn

SCALES = {"mean": mean, "median": median, "mse": optimal}


@technique("ternary")
class Ternary(Rounding):
    """A ternary matrix, trained through its rounding.

    A moving average of the floats underneath (`TrainConfig.ema`) rounds to other codes, and is worse than either end.

    Settings:
        scale: "mean" or "median" of the magnitudes, or "mse", the one of least squared error.
        per: "tensor", "channel" or inputs per group.
        activations: "int8" per token, "none", or another of `rounding.INPUTS`.
        norm: of the inputs: "none", "rmsnorm", or "layernorm" without parameters. norm_eps: in it.
        ramp: training steps over which the rounding comes in, linearly: weights and inputs are
            x + strength * (rounded - x). 0: at once. What was trained is what is rounded in full, so finish the ramp.
        stochastic: round up or down at random, in proportion; see `rounding.stochastic`.
        half: the scale is a float16 number, as group scales are in files.
        authors: what Reloaded's package does and should not: the bias is added before both scales are multiplied in,
            so that it acts differently on every token. Only for comparison.
    """

    def __init__(
        self,
        inner: nnx.Module,
        *,
        rngs: nnx.Rngs,
        scale: str = "mean",
        per: Per = "tensor",
        activations: str = "int8",
        norm: str = "none",
        norm_eps: float = 1e-5,
        ramp: int = 0,
        stochastic: bool = False,
        half: bool = False,
        authors: bool = False,
    ):
        low_high = {"low": -1, "high": 1}
        super().__init__(inner, rngs=rngs, per=per, activations=activations, norm=norm, norm_eps=norm_eps, **low_high)
        self.scale = one_of("scale", scale, SCALES)
        self.stochastic, self.half, self.authors, self.ramp = stochastic, half, authors, ramp
        require(not authors or per == "tensor", "per", per, 'authors=True means "tensor"')
        require(type(ramp) is int and ramp >= 0, "ramp", ramp, "must be a number of steps, 0 for none")
        self.clock = Stored(jnp.float32(0)) if ramp else None  # training steps since; see `techniques.ticked`

    def strength(self) -> Any:
        if self.clock is None:
            return 1.0
        return jax.lax.stop_gradient(jnp.minimum(1.0, self.clock[...].astype(jnp.float32) / self.ramp))

    def code(self, cells: Cells) -> tuple[jax.Array, jax.Array]:
        scale = kept(jnp.maximum(SCALES[self.scale](cells, -1, 1), 1e-5), self.half)
        return (drawn if self.stochastic else nearest)(cells.x, scale, -1, 1), scale

    def shift(self, step: jax.Array | float) -> jax.Array:
        if not self.authors:
            return self.bias[...]
        return self.bias[...] * (jax.lax.stop_gradient(self.rounded().scale[0, 0]) * step)


@technique("identity")
class Identity(Technique):
    """Nothing, where a norm was: BitNet with the norms inside its matrices has none before them. Its scale is gone."""

    accepts = (RMSNorm,)

    def __init__(self, inner: nnx.Module, *, rngs: nnx.Rngs):
        del inner, rngs
        self.inner = None

    def __call__(self, x: jax.Array) -> jax.Array:
        return x

    def fold(self) -> nnx.Module:
        raise EditError("its norm is gone, and a plain block has one")


PRESETS: dict[str, dict[str, Any]] = {
    "faithful": {"placement": "layernorm", "scale": "median", "activations": "int8_128", "authors": True},
    "fixed": {"placement": "sub", "scale": "median", "activations": "int8"},
}

READ, WRITE = r"blocks\.\d+\.(attn\.[qkv]|mlp\.(gate|up))", r"blocks\.\d+\.(attn\.o|mlp\.down)"
PLACEMENTS = {"none": ("none", "none"), "inside": ("rmsnorm", "rmsnorm"), "sub": ("none", "rmsnorm")}
PLACEMENTS |= {"layernorm": ("layernorm", "layernorm")}


def bitnet(model: Any, preset: str = "fixed", *, tables: str = "full", rngs: Any = 0, **changes: Any) -> Any:
    """Make every matrix inside the blocks ternary, by a recipe; a live, partly trained model may change so too.

                        faithful: b1.58 Reloaded's package      fixed
        scale           median of the matrix                    the same
        inputs          int8 per token; the largest is 128 and  the largest is 127
                        then clipped to 127
        bias            added before both scales, so that it    added last
                        differs from token to token
        norms           LayerNorm without parameters in every   RMSNorm in front of o and down (BitNet b1.58 2B4T): the
                        matrix, after the block's own           other matrices read what the block's norm gave already
        in a file       scales found anew from rounded weights  codes and scales of `rounded()`, never found anew

    Its settings for training, in the kit's terms: a learning rate several times that of floats, which falls at half of
    the run, and no weight decay from there on (BitNet's two stages; Reloaded saw no gain from them below 100M).

    Args:
        model: changed in place.
        preset: "faithful" or "fixed". changes: settings of `Ternary` on top, and
            placement: of norms: "none", "sub", "layernorm", or "inside" (RMSNorm in every matrix, and none in front of
                attention and MLP).
            activations: also "a4.8": BitNet a4.8's, int4 for what q, k, v, gate and up read, int8 of the larger half
                for o and down.
        tables: embedding (with a tied head) and head: "full", "int8" or "ternary", a scale per id; ternary ones take
            the settings of weights (scale, ramp, stochastic, half) from the matrices.

    Returns:
        The model.

    Raises:
        EditError: an unknown name or setting, "inside" in a post-norm model, whose norms hold the stream itself, or
        in one that is so already. The model is then as it was.
    """
    settings = {**PRESETS[one_of("preset", preset, PRESETS)], **changes}
    placement = one_of("placement", settings.pop("placement"), PLACEMENTS)
    one_of("tables", tables, ("full", "int8", "ternary"))
    post = placement == "inside" and model.config.block == "post"
    require(not post, "placement", placement, 'a post-norm block has no norm in front to take out; take "sub"')
    before = settings.pop("activations")
    sorts = ("int4", "int8_half") if before == "a4.8" else (before, before)
    of_weights = {name: settings[name] for name in ("scale", "ramp", "stochastic", "half") if name in settings}
    with all_or_none(model):
        for where, norm, activations in zip((READ, WRITE), PLACEMENTS[placement], sorts, strict=True):
            own = {"norm": norm, "activations": activations, "norm_eps": model.config.norm_eps}
            edit(model, where, "ternary", rngs=rngs, **own, **settings)
        if placement == "inside":
            edit(model, r"blocks\.\d+\.(attn|mlp)_norm", "identity", rngs=rngs)
        if tables != "full":
            more = of_weights if tables == "ternary" else {}
            edit(model, r"embed|head\.out", tables, rngs=rngs, per="channel", activations="none", **more)
    return model
