"""Text from a decoder: batched sampling with the key/value cache, the token loop inside `jax.jit`, streamed out.

    generate(model, "Once upon a time", tokens=200)            one text, prompt included
    generate(model, ["The cat", "The dog"], seed=3)            one text per prompt
    for piece in stream(model, "Once"): print(piece, end="")   as it is made

A seed gives the same text whatever the chunk size and whichever other prompts share the batch, up to float rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tinylm.config import ModelConfig, Sampling
from tinylm.model import Cache, Transformer
from tinylm.shards import check_tokens
from tinylm.weights import bind, pure

LEAST_ROOM = 256  # positions of a cache, where the context has so many


class GenerateError(ValueError):
    """A prompt, model or setting nothing can be generated with; the message names it and the remedy."""


class Settings(NamedTuple):
    """`Sampling` as arrays, so that another temperature compiles nothing."""

    repetition_penalty: Any
    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any

    @classmethod
    def of(cls, sampling: Sampling) -> Settings:
        return cls(
            *(np.asarray(getattr(sampling, name), np.int32 if name == "top_k" else np.float32) for name in cls._fields)
        )


def filtered(logits: Float[Array, "B V"], settings: Settings) -> Float[Array, "B V"]:
    """Logits with every token that top-k, top-p or min-p forbids at -inf."""
    vocab = logits.shape[-1]
    order = jnp.argsort(-logits, axis=-1)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    k = jnp.where(settings.top_k == 0, vocab, settings.top_k)
    ranked = jnp.where(jnp.arange(vocab) < k, ranked, -jnp.inf)
    share = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(share, axis=-1) - share  # probability of all that rank higher: the first token always stays
    kept = (
        ((before < settings.top_p) | (settings.top_p >= 1))
        & (share >= settings.min_p * share[:, :1])
        & jnp.isfinite(ranked)
    )
    back = jnp.argsort(order, axis=-1)
    return jnp.where(jnp.take_along_axis(kept, back, axis=-1), logits, -jnp.inf)


def pick(logits: Float[Array, "B V"], seen: Bool[Array, "B V"], settings: Settings, keys: Array) -> Int[Array, " B"]:
    """The next token of each row; `seen` marks the tokens in its text, `keys` holds one random key per row."""
    logits = logits.astype(jnp.float32)
    punished = jnp.where(logits > 0, logits / settings.repetition_penalty, logits * settings.repetition_penalty)
    logits = jnp.where(seen, punished, logits)

    def sample(logits: Array) -> Array:
        logits = (logits - logits.max(-1, keepdims=True)) / settings.temperature  # so that no temperature overflows
        plain = (settings.top_k == 0) & (settings.top_p >= 1) & (settings.min_p <= 0)
        # Sorting the vocabulary costs more than a tiny model's forward pass: only when a filter is on.
        logits = jax.lax.cond(plain, lambda x: x, lambda x: filtered(x, settings), logits)
        return jax.vmap(jax.random.categorical)(keys, logits)

    return jax.lax.cond(settings.temperature > 0, sample, lambda x: jnp.argmax(x, axis=-1), logits).astype(jnp.int32)


class Text(NamedTuple):
    """A batch of texts in the making."""

    cache: Cache
    logits: Float[Array, "B V"]
    """For the token that comes next."""
    seen: Bool[Array, "B V"]


@functools.lru_cache(maxsize=16)
def compiled(graph: Any) -> tuple[Callable, Callable]:
    """`read` and `write` of one architecture: the two programs generation consists of."""

    def read(params: dict, tokens: Array, lengths: Array, seen: Array, capacity: int) -> Text:
        """Read the prompts, (B T) padded on the right, into an empty cache of `capacity` positions.

        Padding needs no mask: it lies after each row's last token, and is overwritten as the row grows.
        """
        model = bind(graph, params)
        cache = Cache.empty(model.config, len(tokens), capacity, dtype=model.embed.weight().dtype)
        x, cache = model.trunk(tokens, cache=cache)
        logits = model.unembed(x[jnp.arange(len(tokens)), lengths - 1])
        return Text(cache._replace(length=lengths), logits, seen)

    def write(
        params: dict, text: Text, settings: Settings, seed: Array, first: Array, count: int
    ) -> tuple[Text, Array, Array]:
        """`count` more tokens per row, (B count); `first` is the number of tokens made before.

        The last value says of each of them whether its logits were finite in all rows.
        """
        model = bind(graph, params)
        known = model.config.vocab if model.tokenizer is None else model.tokenizer.vocab
        marks = () if model.tokenizer is None else bounds(model.tokenizer)
        rows = jnp.arange(len(text.logits))
        key = jax.random.key(seed)

        def one(text: Text, number: Array) -> tuple[Text, tuple[Array, Array]]:
            keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(key, row), number))(rows)
            logits, seen, finite = text.logits, text.seen, jnp.isfinite(text.logits).all()
            if known < logits.shape[-1]:  # ids that only pad the embedding have no text
                logits = jnp.where(jnp.arange(logits.shape[-1]) < known, logits, -jnp.inf)
            for mark in marks:  # every prompt begins with one: a penalty would keep texts from ending
                seen = seen.at[:, mark].set(False)
            token = pick(logits, seen, settings, keys)
            x, cache = model.trunk(token[:, None], cache=text.cache)
            return Text(cache, model.unembed(x[:, 0]), text.seen.at[rows, token].set(True)), (token, finite)

        text, (tokens, finite) = jax.lax.scan(one, text, first + jnp.arange(count))
        return text, tokens.T, finite

    return jax.jit(read, static_argnames="capacity"), jax.jit(write, static_argnames="count", donate_argnums=1)


def generate_tokens(
    model: Transformer,
    prompts: Sequence[Sequence[int] | np.ndarray],
    *,
    tokens: int,
    sampling: Sampling | None = None,
    seed: int = 0,
    chunk: int = 16,
) -> Iterator[np.ndarray]:
    """Yield arrays (B, n), the next n token ids of every prompt, until `tokens` of them were made.

    A text that outgrows the context is seen from `window` on: whenever it fills the context, its oldest half is dropped
    and the cache is filled anew. What a row sees depends on its own length alone, never on `chunk` or the other rows.

    Args:
        model: a decoder. prompts: token ids, at least one each (usually the begin token first).
        tokens: how many to make. sampling: default `Sampling()`. seed: of the choices.
        chunk: tokens made per call of the compiled loop; more is a little faster, fewer streams more smoothly.

    Raises:
        GenerateError: the model is an encoder or damaged, a prompt is empty, `tokens` is negative, `seed` is not in
            0..2^32 - 1.
        ValueError: ids out of range.
    """
    config = model.config
    if config.kind != "decoder":
        raise GenerateError(f"this model is an {config.kind}: it fills gaps and cannot continue a text; load a decoder")
    for name, value, least in (("tokens", tokens, 0), ("chunk", chunk, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or not least <= value < 2**32:
            raise GenerateError(f"{name} = {value!r}: must be a whole number from {least} to 2^32 - 1")
    texts = []
    for row, prompt in enumerate(prompts):
        check_tokens(np.asarray(prompt, dtype=None if len(prompt) else np.int32), config.vocab, f"prompt {row}")
        texts.append(np.asarray(prompt).tolist())
    if not texts or not all(texts):
        raise GenerateError("a prompt without tokens cannot be continued; start with the tokenizer's begin token")
    graph, params = pure(model)
    read, write = compiled(graph)
    settings = Settings.of(sampling or Sampling())
    chunk = min(chunk, config.context)
    text, made, room = None, 0, 0
    while made < tokens:
        if text is None or room < 1:
            text, room = start(texts, tokens - made, config, functools.partial(read, params))
        text, new, finite = write(params, text, settings, np.uint32(seed), np.int32(made), count=chunk)
        new = np.asarray(new)[:, : min(room, tokens - made)]  # what overran a full cache is made again
        if not np.asarray(finite)[: new.shape[1]].all():
            raise GenerateError("the model's logits are not finite: its weights are damaged or training diverged")
        for row, ids in zip(texts, new.tolist(), strict=True):
            row.extend(ids)
        made, room = made + new.shape[1], room - chunk  # 0 or less: some row is full
        yield new


def window(length: int, context: int) -> int:
    """First token seen of a text of `length` tokens: 0 while it fits, then moved on by half a context at a time."""
    half = max(1, context // 2)
    return max(0, -(-(length - context) // half) * half)


def start(texts: list[list[int]], more: int, config: ModelConfig, read: Callable) -> tuple[Text, int]:
    """Read the window of each text, to make `more` tokens; returns it and how many fit before a row's context is full.

    The cache holds what may be needed, in powers of two so that few programs are compiled: a model may say that its
    context is a million positions.
    """
    context, vocab = config.context, config.vocab
    tails = [ids[window(len(ids), context) :] for ids in texts]
    longest = max(map(len, tails))
    width = min(context, -(-longest // 32) * 32)  # a multiple of 32: few shapes to compile
    tokens = np.zeros((len(tails), width), np.int32)
    seen = np.zeros((len(tails), vocab), bool)
    for row, (ids, whole) in enumerate(zip(tails, texts, strict=True)):
        tokens[row, : len(ids)] = ids
        seen[row, whole] = True
    lengths = np.array([len(ids) for ids in tails], np.int32)
    capacity = min(context, max(LEAST_ROOM, 1 << (longest + more - 1).bit_length()))
    # The first token needs no room: its logits are there.
    return read(tokens, lengths, seen, capacity=capacity), context - longest + 1


def stream(
    model: Transformer,
    prompt: str = "",
    *,
    tokens: int = 256,
    seed: int = 0,
    stop: str | Sequence[str] = (),
    chunk: int = 8,
    **sampling: Any,
) -> Iterator[str]:
    """Yield the continuation of `prompt` in pieces of text, until the model ends it.

    Args:
        model: a decoder with a tokenizer (`tinylm.load` brings it along).
        prompt: beginning of the text; empty lets the model begin.
        tokens: at most so many. seed: of the choices. chunk: see `generate_tokens`.
        stop: texts at which to end; they are not part of the result.
        sampling: fields of `Sampling`, such as `temperature=0.7`.

    Raises:
        GenerateError, ConfigError.
    """
    stop = (stop,) if isinstance(stop, str) else stop
    tokenizer = tokenizer_of(model)
    decoder, text, shown = tokenizer.stream(), "", 0
    lead = "" if prompt else tokenizer.prefix.decode()
    hold = max((len(s) for s in stop), default=1) - 1  # a stop text may begin in the pieces held back
    for ids in generate_tokens(
        model,
        [prompt_ids(tokenizer, prompt)],
        tokens=tokens,
        sampling=Sampling.from_dict(sampling),
        seed=seed,
        chunk=chunk,
    ):
        row = ids[0].tolist()
        own = until_end(tokenizer, row)
        ended = len(own) < len(row)
        for token in own:
            text += decoder.push(token)
        if ended:
            text += decoder.flush()
        if lead and text:
            text, lead = text.removeprefix(lead), ""
        found = [at for s in stop if s and (at := text.find(s)) >= 0]
        until = min(found) if found else len(text) if ended else max(shown, len(text) - hold)
        if until > shown:
            yield text[shown:until]
            shown = until
        if ended or found:
            return
    text += decoder.flush()
    if text[shown:]:
        yield text[shown:]


@overload
def generate(model: Transformer, prompt: str = "", **settings: Any) -> str: ...
@overload
def generate(model: Transformer, prompt: Sequence[str], **settings: Any) -> list[str]: ...
def generate(
    model: Transformer,
    prompt: str | Sequence[str] = "",
    *,
    tokens: int = 256,
    seed: int = 0,
    stop: str | Sequence[str] = (),
    **sampling: Any,
) -> str | list[str]:
    """The whole text, prompt included; a list of prompts gives a list, generated side by side.

    Arguments and errors as in `stream`. Each text ends where the model ends it, at a `stop` text, or after `tokens`.
    """
    stop = (stop,) if isinstance(stop, str) else stop
    tokenizer = tokenizer_of(model)
    if not isinstance(prompt, Sequence):
        raise GenerateError(f"prompt = {prompt!r}: give a text, or a list of texts")
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts:
        return []
    made: list[list[int]] = [[] for _ in prompts]
    starts = [prompt_ids(tokenizer, p) for p in prompts]
    for ids in generate_tokens(model, starts, tokens=tokens, sampling=Sampling.from_dict(sampling), seed=seed):
        for row, new in zip(made, ids.tolist(), strict=True):
            row.extend(new)
        if all(len(until_end(tokenizer, row)) < len(row) for row in made):
            break
    texts = []
    for p, row in zip(prompts, made, strict=True):
        text = tokenizer.decode(until_end(tokenizer, row))
        text = text if p else text.removeprefix(tokenizer.prefix.decode())
        cut = min((at for s in stop if s and (at := text.find(s)) >= 0), default=len(text))
        texts.append(p + text[:cut])
    return texts[0] if isinstance(prompt, str) else texts


def tokenizer_of(model: Transformer) -> Any:
    """The model's tokenizer. Raises GenerateError when it has none, or one without an end token."""
    if model.tokenizer is None:
        raise GenerateError("this model has no tokenizer; load it from a folder with one, or set model.tokenizer")
    if model.tokenizer.end is None:
        raise GenerateError("this model's tokenizer has no end token, so no text could begin or end")
    return model.tokenizer


def bounds(tokenizer: Any) -> tuple[int, ...]:
    """The ids that a text ends at: `end`, and `begin`, which opens the next text (llama2.c's models know no other)."""
    return tuple(sorted({i for i in (tokenizer.begin, tokenizer.end) if i is not None}))


def until_end(tokenizer: Any, row: list[int]) -> list[int]:
    """The ids before the first that ends a text; all of them where none does."""
    marks = bounds(tokenizer)
    return row[: next((at for at, token in enumerate(row) if token in marks), len(row))]


def prompt_ids(tokenizer: Any, prompt: str) -> np.ndarray:
    """The begin token, behind which every text of the training data began, then the prompt."""
    if not isinstance(prompt, str):
        raise GenerateError(f"prompt = {prompt!r}: give a text; `generate_tokens` goes on from token ids")
    return np.concatenate([[tokenizer.begin], tokenizer.encode(prompt)]).astype(np.int32)
