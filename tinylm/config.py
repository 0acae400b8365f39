"""Every setting of a model and of a training run: frozen dataclasses, checked when made, readable as json.

The names are the field's: `vocab, context, width, layers, heads, kv_heads, hidden`. A setting that may differ from
layer to layer takes a tuple, repeated over the layers: `window=(0, 256)` alternates full and local attention.
"""

import dataclasses
import difflib
import functools
import itertools
import json
import math
import re
import types
import typing
from typing import Any, Literal, Self, get_args

Norm = Literal["rmsnorm", "layernorm"]
Block = Literal["pre", "post", "parallel", "embbert"]
MLP = Literal["swiglu", "geglu", "reglu", "gelu", "gelu_tanh", "relu2"]
Position = Literal["rope", "learned", "none"]
Kind = Literal["decoder", "encoder"]
Head = Literal["tied", "untied", "mlm", "classes", "none"]
Pooling = Literal["cls", "mean", "attention", "last"]
Objective = Literal["next_token", "mlm", "classes"]
Optimizer = Literal[
    "adamw", "muon", "schedule_free",
    "nadam", "radam", "amsgrad", "adabelief", "yogi", "lamb", "lion", "adafactor", "rmsprop", "sgd",
]  # fmt: skip
Schedule = Literal["cosine", "wsd", "linear", "constant"]
Dtype = Literal["float32", "bfloat16"]
Parallel = Literal["none", "data", "fsdp"]
Codec = Literal["raw", "planes"]

GATED = ("swiglu", "geglu", "reglu")


class ConfigError(ValueError):
    """A setting that cannot be used; the message names it, its value and the remedy."""


def suggest(wrong: str, known: typing.Iterable[str]) -> str:
    """`'; did you mean X?'` when a known name is close to `wrong`, else the list of them all."""
    known = list(known)
    close = difflib.get_close_matches(wrong, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


def path_rate(text: str) -> tuple[re.Pattern, float]:
    """`"PATTERN=FACTOR"` in two. Raises ConfigError."""
    pattern, equals, factor = text.rpartition("=")
    try:
        found = re.compile(pattern), float(factor)
    except (re.error, ValueError):
        found = None
    if not (equals and pattern and found and 0 <= found[1] < math.inf):
        raise ConfigError(f"TrainConfig.rates = {text!r}: write PATTERN=FACTOR, for example 'embed\\..*=0.5'")
    return found


class Config:
    """What the config dataclasses share: checked types, and two-way json."""

    _derived = frozenset[str]()  # the fields that were left to follow from others

    def __post_init__(self) -> None:
        for field, allowed in field_types(type(self)).items():
            value = getattr(self, field)
            if typing.get_origin(allowed) is Literal:
                self._require(
                    value in get_args(allowed), field, f"must be one of {', '.join(map(str, get_args(allowed)))}"
                )
            elif allowed is int:
                self._require(type(value) is int, field, "must be a whole number")
            elif allowed is float:
                if type(value) is int and abs(value) < 2**1023:
                    value = float(value)
                    object.__setattr__(self, field, value)
                self._require(isinstance(value, float) and math.isfinite(value), field, "must be a finite number")
            elif allowed is bool:
                self._require(type(value) is bool, field, "must be true or false")
            elif allowed is str:
                self._require(isinstance(value, str), field, "must be text")

    def _require(self, ok: bool, field: str, what: str) -> None:
        if not ok:
            raise ConfigError(f"{type(self).__name__}.{field} = {getattr(self, field)!r}: {what}")

    def replace(self, **changes: Any) -> Self:
        """A copy with some settings changed, checked again; what was left to follow from others follows them anew."""
        kept = {name: value for name, value in self.to_dict().items() if name not in self._derived}
        return type(self).from_dict({**kept, **changes})

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Self:
        """Rebuild from `to_dict` or json (lists become tuples). Raises ConfigError for an unknown name."""
        known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        for name in raw:
            if name not in known:
                raise ConfigError(f"{cls.__name__} has no setting {name!r}{suggest(name, sorted(known))}")
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()})

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
    """Field name -> its type, with `X | None` and `X | tuple` left as unions (not checked by `Config`)."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if not isinstance(hints[f.name], types.UnionType)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Edit(Config):
    """One change that `techniques.edit` made to a model, as data: what is needed to make it again.

    Attributes:
        where: regex; every module whose whole dotted path matches was wrapped.
        technique: name of what it was wrapped in.
        settings: of the technique, as sorted pairs of name and value (json's scalars, or tuples of them); a mapping
            is taken too.
    """

    where: str
    technique: str
    settings: tuple[tuple[str, Any], ...] | dict[str, Any] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            re.compile(self.where)
        except re.error as error:
            self._require(False, "where", f"is no regular expression ({error})")
        pairs = self.settings.items() if isinstance(self.settings, dict) else self.settings
        try:
            settings = json.loads(json.dumps(dict(pairs), allow_nan=False))
        except (TypeError, ValueError):
            self._require(False, "settings", "must be names with numbers, texts, true, false, null or lists of them")
        object.__setattr__(self, "settings", tuple(sorted((k, _frozen(v)) for k, v in settings.items())))

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "settings": dict(self.settings)}


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(Config):
    """One transformer, decoder or encoder.

    Attributes:
        kind: "decoder" (causal attention) or "encoder" (every position sees every other).
        vocab: number of token ids; ids run from 0 to vocab - 1.
        context: longest sequence, in tokens.
        width: features per position in the residual stream (d_model).
        layers: number of blocks.
        heads: query heads per block; must divide width unless head_width is given.
        kv_heads: key/value heads (grouped queries); 0: as many as heads.
        head_width: features per head; 0: width / heads.
        hidden: features inside the MLP; 0: 4 width, or 8/3 width rounded up to 32 when it is gated.
        norm: normalisation layer.
        norm_eps: added to the variance in it.
        block: where norms and sums sit: "pre" (GPT-2, Llama), "post" (BERT), "parallel" (GPT-NeoX), "embbert" (no sum:
            a norm, then attention minus a causal convolution; one head, hidden a multiple of width; mlp is not used).
        mlp: activation; swiglu, geglu and reglu are gated; gelu_tanh is GPT-2's approximation.
        positions: "rope", "learned" or "none"; several alternate "rope" and "none" over the layers.
        theta: base of the rotary angles.
        rotary: features of each head that rotate; 0: all (Pythia rotates the first quarter).
        window: attention reaches this many tokens back, itself included; 0: all; several alternate over the layers.
        attention_scale: factor on the scores; 0: 1 / sqrt(head_width); GPT-Neo uses 1.
        qk_norm: RMSNorm of each query and key head before the rotation, learned scale.
        softcap: logits become softcap * tanh(logits / softcap); 0: off.
        head: "tied" (the embedding, transposed), "untied", "mlm" (BERT's: dense, gelu, norm, tied, bias), "classes"
            (BERT's classifier on pooled features: dense, tanh, a score per class), or "none" (the features).
        classes: scores that a "classes" head gives.
        pooling: what a "classes" head reads: "cls" (the first position), "mean", "attention" (a learned weighted mean)
            or "last" (for decoders); padding is left out.
        pooler: BERT's dense and tanh between pooling and scores; false: the scores right from what was pooled.
        bias: a bias in every linear layer.
        qkv_bias: the same for query, key and value alone; None: as bias.
        embed_norm: a norm right after the embeddings (BERT).
        token_types: number of segment embeddings (BERT's token_type_ids); 0: none. An "embbert" model takes 3, and
            where none are given makes them: 0 padding, 1 text, 2 its last token.
        embed_rank: width of the token and position tables, which a matrix then expands to width; 0: width itself.
        convs: layers of a convolutional front end over (positions, features) between embeddings and blocks; 0: none.
        channels: of it.
        kernel: positions that a convolution spans; of the front end features too, or a pair of both.
        dropout: share dropped of embeddings, attention patterns and block outputs, in training only.
        init_std: standard deviation of every initial matrix and embedding.
        edits: what `techniques.edit` changed since, first to last; building the model makes them again.
    """

    kind: Kind = "decoder"
    vocab: int = 4096
    context: int = 256
    width: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 0
    head_width: int = 0
    hidden: int = 0
    norm: Norm = "rmsnorm"
    norm_eps: float = 1e-5
    block: Block = "pre"
    mlp: MLP = "swiglu"
    positions: Position | tuple[Position, ...] = "rope"
    theta: float = 10_000.0
    rotary: int = 0
    window: int | tuple[int, ...] = 0
    attention_scale: float = 0.0
    qk_norm: bool = False
    softcap: float = 0.0
    head: Head = "tied"
    classes: int = 0
    pooling: Pooling = "cls"
    pooler: bool = True
    bias: bool = False
    qkv_bias: bool | None = None
    embed_norm: bool = False
    token_types: int = 0
    embed_rank: int = 0
    convs: int = 0
    channels: int = 64
    kernel: int | tuple[int, int] = 3
    dropout: float = 0.0
    init_std: float = 0.02
    edits: tuple[Edit, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("vocab", "context", "width", "layers", "heads", "channels"):
            self._require(getattr(self, field) >= 1, field, "must be at least 1")
        for field in (
            "kv_heads",
            "head_width",
            "hidden",
            "rotary",
            "classes",
            "token_types",
            "embed_rank",
            "convs",
            "softcap",
            "init_std",
            "attention_scale",
        ):
            self._require(getattr(self, field) >= 0, field, "must not be negative")
        self._require(0 <= self.dropout < 1, "dropout", "must be at least 0 and below 1")
        self._require(self.norm_eps > 0, "norm_eps", "must be above 0")
        self._require(self.theta > 0, "theta", "must be above 0")
        follow = {"head_width": not self.head_width, "kv_heads": not self.kv_heads, "hidden": not self.hidden}
        follow["qkv_bias"] = self.qkv_bias is None
        object.__setattr__(self, "_derived", frozenset(name for name, follows in follow.items() if follows))
        if not self.head_width:
            self._require(self.width % self.heads == 0, "heads", f"must divide width = {self.width}, or set head_width")
            object.__setattr__(self, "head_width", self.width // self.heads)
        if not self.kv_heads:
            object.__setattr__(self, "kv_heads", self.heads)
        self._require(self.heads % self.kv_heads == 0, "kv_heads", f"must divide heads = {self.heads}")
        if not self.hidden:
            gated = self.mlp in GATED
            object.__setattr__(self, "hidden", -(-8 * self.width // 3 // 32) * 32 if gated else 4 * self.width)
        if self.qkv_bias is None:
            object.__setattr__(self, "qkv_bias", self.bias)
        self._require(type(self.qkv_bias) is bool, "qkv_bias", "must be true, false or null")
        for name, good, what in (
            (
                "positions",
                lambda p: p in get_args(Position),
                f"must be one of {', '.join(get_args(Position))}, or a tuple",
            ),
            ("window", lambda w: type(w) is int and w >= 0, "must be a whole number of tokens, 0 for all, or a tuple"),
        ):
            pattern = self._pattern(name)
            self._require(len(pattern) > 0 and all(map(good, pattern)), name, what)
        spans = self._pattern("kernel")
        whole = len(spans) in (1, 2) and all(type(n) is int and n >= 1 for n in spans)
        self._require(whole, "kernel", "must be a whole number of at least 1, or a pair of them")
        if self.block == "embbert":
            self._require(
                self.heads == 1 and self.head_width == self.width, "block", "embbert has 1 head of full width"
            )
            self._require(self.hidden % self.width == 0, "hidden", f"of embbert must be a multiple of {self.width}")
            self._require(type(self.kernel) is int, "kernel", "of embbert must be one number")
            plain = "rope" not in self._pattern("positions") and not any(self._pattern("window"))
            self._require(plain and self.kind == "encoder", "block", 'embbert is an encoder without "rope" and window')
        if "learned" in self._pattern("positions"):
            self._require(
                set(self._pattern("positions")) == {"learned"}, "positions", "learned positions hold for all layers"
            )
        if "rope" in self._pattern("positions"):
            self._require(self.head_width % 2 == 0, "head_width", "must be even for rotary positions")
            self._require(self.rotary % 2 == 0, "rotary", "must be even")
            self._require(self.rotary <= self.head_width, "rotary", f"must be at most head_width = {self.head_width}")
        listed = self.edits if isinstance(self.edits, tuple | list) else [None]
        edits = tuple(Edit.from_dict(e) if isinstance(e, dict) else e for e in listed)
        self._require(all(isinstance(e, Edit) for e in edits), "edits", "must be a list of edits")
        object.__setattr__(self, "edits", edits)
        if self.head == "classes":
            self._require(self.classes >= 1, "classes", 'a "classes" head needs at least 1')
        else:
            self._require(self.classes == 0, "classes", f'head = {self.head!r} has none: set head to "classes"')

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "edits": tuple(edit.to_dict() for edit in self.edits)}

    def _pattern(self, field: str) -> tuple:
        value = getattr(self, field)
        return value if isinstance(value, tuple) else (value,)

    @property
    def draws(self) -> bool:
        """Whether a training step needs a key: for dropout, or to tell batch norms that this is training."""
        return self.dropout > 0 or self.convs > 0

    def at(self, field: Literal["positions", "window"], layer: int) -> Any:
        """The value of a per-layer setting at one layer: the pattern repeats."""
        pattern = self._pattern(field)
        return pattern[layer % len(pattern)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(Config):
    """One training run. Exactly one of `steps`, `tokens`, `budget` says when it ends.

    Attributes:
        steps: optimiser steps.
        tokens: training tokens (predicted ones); turned into steps.
        budget: seconds of wall clock, compilation included; the schedule then follows the clock.
        batch: sequences per optimiser step.
        length: tokens per sequence; 0: the model's context.
        steps_per_call: steps that run on the device in one go; changes no bit. 0: on a CPU as many as take half a
            second, at most 8; else one.
        accumulate: the batch is computed in this many parts, one after the other.
        documents: attention and positions stay inside each document of a sequence, instead of running across.
        objective: "next_token", "mlm" (mask_rate of the positions hidden: 80% mask, 10% random, 10% kept), or "classes"
            (a label per text; see `tinylm.classify`).
        mask_rate: share of positions that mlm predicts.
        optimizer: "muon" (Muon for matrices inside the blocks, AdamW for the rest), "adamw", "schedule_free" (AdamW
            that averages instead of a schedule), or another of optax's.
        learning_rate: its peak; 0.01 was best at widths 80 to 160 with muon; adamw, and wider models, want less.
        schedule: its shape after the warm-up; "wsd" is constant, then falls linearly.
        final: its last value as a share of the peak.
        warmup: steps of linear rise to the peak.
        stairs: steps that the learning rate stays the same, such as those of an epoch; 0: it moves with every step.
        decay: share of the run that "wsd" falls over.
        beta1: of Adam, decay of the mean.
        beta2: of Adam, decay of the square.
        eps: of Adam.
        weight_decay: decoupled, on matrices and embeddings, scaled by the learning rate.
        memory_decay: the same for fetched memories, in steps that fetch them; small, since they are to memorise.
        clip: largest global gradient norm; 0: off.
        rates: "PATTERN=FACTOR", or several: parameters whose whole name matches the regular expression learn at this
            multiple of the learning rate, 0 freezes them; the last that matches counts.
        z_loss: weight of logsumexp(logits)^2 in the loss, which keeps logits from drifting; PaLM's is 1e-4. 0: off.
        ema: decay of a moving average of the weights that is validated, handed out and loaded; 0: off.
        dtype: arithmetic of the forward and backward pass; weights and optimiser state stay float32.
        native: kernels of the extension on one CPU, where it is installed; false: plain JAX, slower.
        parallel: "data" shares each batch out to all devices; "fsdp" splits weights and optimiser state over them too.
        seed: of the initial weights, the data order, the masks and dropout.
        log_every: steps between two lines of run.jsonl.
        eval_every: steps between validations; 0: at the end only.
        eval_batches: batches per validation.
        save_every: seconds between checkpoints; 0: at the end only.
        keep: newest checkpoints that stay on disk.
        milestones: checkpoints per factor of ten in steps that stay on disk for good, beside the newest ones, to study
            how a model learns: 3 keeps steps 1, 2, 5, 10, 22, 46, 100, ...; 0: none.
        codec: of their files; "planes" makes them about a sixth smaller, without loss, and slower to write.
    """

    steps: int = 0
    tokens: int = 0
    budget: float = 0.0
    batch: int = 8
    length: int = 0
    steps_per_call: int = 0
    accumulate: int = 1
    documents: bool = False
    objective: Objective = "next_token"
    mask_rate: float = 0.15
    optimizer: Optimizer = "muon"
    learning_rate: float = 0.01
    schedule: Schedule = "cosine"
    final: float = 0.1
    warmup: int = 50
    stairs: int = 0
    decay: float = 0.2
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    memory_decay: float = 1e-3
    clip: float = 1.0
    rates: tuple[str, ...] = ()
    z_loss: float = 0.0
    ema: float = 0.0
    dtype: Dtype = "float32"
    native: bool = True
    parallel: Parallel = "none"
    seed: int = 0
    log_every: int = 10
    eval_every: int = 0
    eval_batches: int = 8
    save_every: float = 60.0
    keep: int = 2
    milestones: int = 0
    codec: Codec = "raw"

    def __post_init__(self) -> None:
        super().__post_init__()
        ends = [name for name in ("steps", "tokens", "budget") if getattr(self, name)]
        if len(ends) != 1:
            got = ", ".join(f"{n}={getattr(self, n)}" for n in ends) or "none"
            raise ConfigError(f"TrainConfig: give exactly one of steps, tokens, budget (got {got})")
        for field in (
            "steps", "tokens", "budget", "length", "warmup", "stairs", "weight_decay", "memory_decay", "clip", "z_loss",
            "eval_every", "save_every", "milestones", "seed", "steps_per_call",
        ):  # fmt: skip
            self._require(getattr(self, field) >= 0, field, "must not be negative")
        for field in ("batch", "accumulate", "log_every", "eval_batches", "keep"):
            self._require(getattr(self, field) >= 1, field, "must be at least 1")
        self._require(self.batch % self.accumulate == 0, "accumulate", f"must divide batch = {self.batch}")
        self._require(self.seed < 2**32, "seed", "must be below 2^32")
        self._require(self.learning_rate > 0, "learning_rate", "must be above 0")
        self._require(self.eps > 0, "eps", "must be above 0")
        self._require(0 < self.mask_rate < 1, "mask_rate", "must be between 0 and 1")
        for field in ("beta1", "beta2", "ema"):
            self._require(0 <= getattr(self, field) < 1, field, "must be at least 0 and below 1")
        for field in ("final", "decay"):
            self._require(0 <= getattr(self, field) <= 1, field, "must be between 0 and 1")
        if isinstance(self.rates, str):
            object.__setattr__(self, "rates", (self.rates,))
        texts = type(self.rates) is tuple and all(isinstance(r, str) for r in self.rates)
        self._require(texts, "rates", "must be a tuple of texts")
        for text in self.rates:
            path_rate(text)
        if self.optimizer == "schedule_free":
            self._require(self.schedule == "constant", "schedule", 'schedule_free needs "constant"')
            self._require(not self.ema, "ema", "schedule_free keeps an average of its own")

    def until_milestone(self, step: int) -> int:
        """Steps from after `step` up to the next milestone; 0: there are none."""
        if not self.milestones:
            return 0
        power = max(0, math.floor(math.log10(max(step, 1)) * self.milestones) - 1)
        return next(at - step for k in itertools.count(power) if (at := round(10 ** (k / self.milestones))) > step)

    def grid(self, **settings: typing.Iterable[Any]) -> list[Self]:
        """A config for every combination: `config.grid(seed=range(3), learning_rate=[1e-3, 3e-3])` gives six."""
        names = list(settings)
        return [
            self.replace(**dict(zip(names, values, strict=True)))
            for values in itertools.product(*map(list, settings.values()))
        ]

    def with_batch(self, batch: int) -> Self:
        """The same run with another batch, its learning rate by the square-root rule (Malladi et al. 2022).

        Steps are kept when `steps` ends the run: the number of tokens changes then.
        """
        return self.replace(batch=batch, learning_rate=self.learning_rate * math.sqrt(batch / self.batch))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling(Config):
    """How the next token is picked from the logits. The settings act in the order they are listed.

    Attributes:
        repetition_penalty: logits of tokens already in the text are divided by it where positive and multiplied where
            negative (Keskar et al. 2019); 1 is off.
        temperature: divides the logits; 0 takes the most probable token.
        top_k: only the k most probable; 0 is off.
        top_p: only the smallest set of most probable tokens with at least this much probability
            (Holtzman et al. 2020); 1 is off.
        min_p: only tokens with at least this share of the most probable one's probability (Nguyen et al. 2024).
    """

    repetition_penalty: float = 1.0
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.repetition_penalty > 0, "repetition_penalty", "must be above 0; 1 is off")
        self._require(self.temperature >= 0, "temperature", "must not be negative; 0 takes the most probable token")
        self._require(self.top_k >= 0, "top_k", "must not be negative; 0 is off")
        self._require(0 < self.top_p <= 1, "top_p", "must be above 0 and at most 1; 1 is off")
        self._require(0 <= self.min_p <= 1, "min_p", "must be between 0 and 1; 0 is off")
