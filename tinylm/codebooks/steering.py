"""Steering: codes activated or banned while a model writes, and whether that makes it write about what was meant.

    handles = codes_for(index, topic_labels, "farm")
    steer(model, ["One day,"], activate=handles)               # at every position
    steer(model, ["One day,"], activate=handles, positions=(8, 24))
    steered(model, activate=handles)                           # a model like any other, for every function of the kit

A handle is (site, group, code); a `Match` is one too. An activated code takes the place of the weakest of the k that a
position chose (the paper's way); a banned one leaves its place to the next nearest.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tinylm import show
from tinylm.codebooks.books import CodebookError, books, named_book, site, walk
from tinylm.codebooks.reading import Labels, Match, fired, halves, together
from tinylm.config import Sampling
from tinylm.evaluation import evaluate
from tinylm.generation import Settings, pick, prompt_ids, tokenizer_of, until_end
from tinylm.model import Cache
from tinylm.parts import LayerNorm
from tinylm.probe.activations import matrix_of
from tinylm.shards import DataError, check_tokens
from tinylm.suite.results import Estimate, estimate
from tinylm.weights import bind, pure

Handle = tuple[str, int, int]


def handle(code: Handle | Match) -> Handle:
    """(site, group, code) of either. Raises CodebookError for what is neither."""
    own = (code.site, code.group, code.code) if isinstance(code, Match) else code
    whole = isinstance(own, Sequence) and len(own) == 3 and isinstance(own[0], str)
    if not whole or not all(isinstance(n, int | np.integer) for n in own[1:]):
        raise CodebookError(f"{code!r} is no code: give a list of (site, group, code), or of matches")
    return own[0], int(own[1]), int(own[2])


def leans(
    model: Any, activate: Sequence[Handle | Match] = (), ban: Sequence[Handle | Match] = ()
) -> dict[str, jax.Array]:
    """Parameter name -> (groups, codes) added to the scores: inf for activated codes, -inf for banned ones.

    Raises CodebookError for a code there is not, one that is both, more than k activated in one group, or so many
    banned that fewer than k are left.
    """
    on, off = ({handle(code) for code in codes} for codes in (activate, ban))
    if on & off:
        raise CodebookError(f"{sorted(on & off)[0]} is both activated and banned")
    for name, group, code in sorted(on | off):
        shape = named_book(model, name).lean.shape
        if not (0 <= group < shape[0] and 0 <= code < shape[1]):
            raise CodebookError(
                f"{name} has {shape[0]} groups of {shape[1]} codes: there is no code {code} in group {group}"
            )
    found = {}
    for path, book in walk(model):
        lean = np.array(book.lean[...])
        for codes, value in ((on, np.inf), (off, -np.inf)):
            for name, group, code in codes:
                if name == site(path):
                    lean[group, code] = value
        most, least = (lean == np.inf).sum(1).max(), (lean != -np.inf).sum(1).min()
        if most > book.k:
            raise CodebookError(f"{site(path)} chooses {book.k} codes per group, {most} are activated: activate fewer")
        if least < book.k:
            raise CodebookError(f"{site(path)} chooses {book.k} codes per group, {least} are not banned: ban fewer")
        found[f"{path}.lean"] = jnp.asarray(lean)
    return found


def steered(model: Any, *, activate: Sequence[Handle | Match] = (), ban: Sequence[Handle | Match] = ()) -> Any:
    """A model that shares its weights with this one and always chooses, or never chooses, these codes."""
    graph, params = pure(model)
    books(model)
    return bind(graph, {**params, **leans(model, activate, ban)})


@functools.lru_cache(maxsize=16)
def _writer(graph: Any) -> Callable:
    def write(params, leaned, prompts, lengths, settings, seed, window, count):
        """Tokens (B, prompt + count): the prompt read and continued one position at a time, steered inside `window`."""
        model = bind(graph, params)
        rows, steps = prompts.shape[0], prompts.shape[1] + count
        cache = Cache.empty(model.config, rows, steps, dtype=model.embed.weight().dtype)
        known = model.config.vocab if model.tokenizer is None else model.tokenizer.vocab
        padded = jnp.pad(prompts, [(0, 0), (0, count)])
        key = jax.random.key(seed)

        def one(carry, at):
            cache, logits, seen = carry
            keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(key, row), at - lengths[row]))(
                jnp.arange(rows)
            )
            logits = jnp.where(jnp.arange(logits.shape[-1]) < known, logits, -jnp.inf)
            token = jnp.where(at < lengths, padded[:, at], pick(logits, seen, settings, keys))
            inside = (window[0] <= at) & (at < window[1])
            own = {name: jnp.where(inside, lean, params[name]) for name, lean in leaned.items()}
            x, cache = bind(graph, {**params, **own}).trunk(token[:, None], cache=cache)
            seen = seen.at[jnp.arange(rows), token].set(True)
            return (cache, model.unembed(x[:, 0]), seen), token

        vocab = model.config.vocab
        first = cache, jnp.zeros((rows, vocab), jnp.float32), jnp.zeros((rows, vocab), bool)
        _, tokens = jax.lax.scan(one, first, jnp.arange(steps))
        return tokens.T

    return jax.jit(write, static_argnames="count")


def steer_tokens(
    model: Any,
    prompts: Sequence[Sequence[int] | np.ndarray],
    *,
    activate: Sequence[Handle | Match] = (),
    ban: Sequence[Handle | Match] = (),
    positions: tuple[int, int] | None = None,
    tokens: int = 64,
    sampling: Sampling | None = None,
    seed: int = 0,
) -> list[list[int]]:
    """The `tokens` next ids of each prompt; one compiled loop, the same one for all codes, positions and seeds.

    Args:
        positions: first and last-plus-one position, of prompt and text together, at which codes are changed; None: all.

    Raises CodebookError for codes that cannot be, an empty prompt or one of other ids, more than the context holds, or
    positions that are none.
    """
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    if not len(lengths) or lengths.min() < 1:
        raise CodebookError("a prompt without tokens cannot be continued; start with the tokenizer's begin token")
    if lengths.max() + tokens > model.config.context:
        raise CodebookError(
            f"{lengths.max()} tokens of prompt and {tokens} more do not fit the context of {model.config.context}"
        )
    if tokens < 1:
        raise CodebookError(f"tokens = {tokens}: must be at least 1")
    span = (0, model.config.context) if positions is None else tuple(positions)
    if len(span) != 2 or not 0 <= span[0] < span[1]:
        raise CodebookError(f"positions = {span}: give the first and the last-plus-one")
    books(model)
    graph, params = pure(model)
    rows = np.zeros((len(prompts), lengths.max()), np.int32)
    for row, prompt in zip(rows, prompts, strict=True):
        row[: len(prompt)] = prompt
    try:
        check_tokens(rows, model.config.vocab, "prompts")
    except DataError as error:
        raise CodebookError(str(error)) from None
    window = np.array(span, np.int32)
    given = Settings.of(sampling or Sampling())
    leaned = leans(model, activate, ban)
    out = np.asarray(_writer(graph)(params, leaned, rows, lengths, given, np.uint32(seed), window, count=tokens))
    return [row[n : n + tokens].tolist() for row, n in zip(out, lengths.tolist(), strict=True)]


def steer(
    model: Any,
    prompts: Sequence[str],
    *,
    activate: Sequence[Handle | Match] = (),
    ban: Sequence[Handle | Match] = (),
    positions: tuple[int, int] | None = None,
    tokens: int = 64,
    seed: int = 0,
    **sampling: Any,
) -> list[str]:
    """Each prompt with its steered continuation, as `steer_tokens`; `sampling`: fields of `Sampling`."""
    tokenizer = tokenizer_of(model)
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    made = steer_tokens(
        model, [prompt_ids(tokenizer, p) for p in prompts], activate=activate, ban=ban, positions=positions,
        tokens=tokens, sampling=Sampling.from_dict(sampling), seed=seed,
    )  # fmt: skip
    return [p + tokenizer.decode(until_end(tokenizer, row)) for p, row in zip(prompts, made, strict=True)]


# --- which codes ------------------------------------------------------------------------------------------------------


def codes_for(
    index: Any, labels: Labels, label: str, *, per: int = 1, sites: str = ".*", least: int = 20
) -> list[Match]:
    """The handles of a class: in every group of codes the `per` of highest precision, those of doubtful precision last.

    Ranked by the lower end of the Wilson interval of their precision, among codes that fire `least` times on it; the
    figures are of the documents they were not chosen on. Raises CodebookError for an unknown class or no such code.
    """
    if label not in labels.names:
        raise CodebookError(f"{labels.kind} has no class {label!r}; it has {', '.join(labels.names[:20])}")
    chosen, c = halves(index), labels.names.index(label)
    here = np.where(labels.values == c, 0, -1).astype(np.int32)
    size, found = int((here[~chosen] == 0).sum()), []
    for name, group in index.columns:
        if not re.fullmatch(sites, name):
            continue
        ids, codes = index.chosen(name, group), index.codes[name]
        (one, all_one), (two, all_two) = (
            (together(ids, here, codes, 1, h)[:, 0], fired(ids, codes, h)) for h in (chosen, ~chosen)
        )
        low = np.where(one >= least, wilson(one, all_one), -1.0)
        for code in np.argsort(-low, kind="stable")[:per]:
            if low[code] >= 0:
                hits, n = int(two[code]), int(all_two[code])
                figures = (
                    hits / max(1, n),
                    hits / max(1, size),
                    2 * hits / max(1, n + size),
                    n,
                    size / max(1, int((~chosen).sum())),
                )
                found.append(Match(labels.kind, label, name, group, int(code), *figures))
    if not found:
        raise CodebookError(
            f"no code fires {least} times on {labels.kind} {label!r}: index more text, or lower `least`"
        )
    return found


def codes_toward(
    model: Any, token: int, *, per: int = 1, most: int | None = None, index: Any = None, least: int = 1
) -> list[Handle]:
    """The codes that write a token: in every group the `per` that push its logit up most, the strongest first.

    What a code adds to the residual stream is known without running the model; the last norm, its scale held, and the
    unembedding turn it into logits (direct attribution), of which the mean over the vocabulary is taken off.

    Args:
        token: its id. most: only so many, over all groups. index: leaves out codes that fired fewer than `least` times
            in it: nothing ever trained those.

    Raises CodebookError: an id outside the vocabulary, a stream that is no sum (post-norm), a head that is more than a
    matrix, codes that are not added to the stream, or none left.
    """
    c, found = model.config, []
    books(model)
    if not isinstance(token, int | np.integer) or not 0 <= token < c.vocab:
        raise CodebookError(f"token = {token!r}: the vocabulary has ids 0 to {c.vocab - 1}")
    for name, value in (("per", per), ("most", most), ("least", least)):
        if value is not None and (type(value) is not int or value < 1):
            raise CodebookError(f"{name} = {value!r}: must be at least 1")
    if c.block in ("post", "embbert") or c.head not in ("tied", "untied"):
        raise CodebookError(f'codes of a "{c.block}" model with a "{c.head}" head have no direct effect on its logits')
    read = np.asarray(model.embed.weight().T if c.head == "tied" else model.head.out.weight(), np.float32)
    wanted = (read[:, token] - read.mean(1)) * np.asarray(model.norm.scale[...], np.float32)
    wanted -= wanted.mean() if isinstance(model.norm, LayerNorm) else 0.0
    for path, book in walk(model):
        own = np.asarray(book.book[...], np.float32)
        if not re.fullmatch(r"blocks\.\d+(\.attn\.o|\.mlp\.down)?", site(path)):
            raise CodebookError(f"codes at {site(path)} are not added to the residual stream: none of them writes")
        groups, codes, wide = own.shape
        if index is not None and index.codes.get(site(path)) != codes:
            raise CodebookError(
                f"the index has {index.codes.get(site(path), 'no')} codes at {site(path)}: another model's"
            )
        toward = wanted  # by the features that the codes stand in
        if book.side == "input":
            toward = np.asarray(matrix_of(book), np.float32) @ wanted
        pushed = np.einsum("gce,ge->gc", own, toward.reshape(groups, wide))
        for g in range(groups):
            if index is not None:
                fires = fired(index.chosen(site(path), g), codes, np.ones(len(index), bool))
                pushed[g, fires < least] = -np.inf
            best = np.argsort(-pushed[g], kind="stable")[:per]
            found += [(float(pushed[g, i]), (site(path), g, int(i))) for i in best if pushed[g, i] > 0]
    if not found:
        raise CodebookError(f"no code pushes token {token} up: leave out `index`, or lower `least`")
    return [code for _, code in sorted(found, key=lambda pair: -pair[0])][:most]


def wilson(hits: np.ndarray, n: np.ndarray, z: float = 1.96) -> np.ndarray:
    """Lower end of the Wilson score interval of hits / n; 0 where n is 0."""
    n = np.maximum(np.asarray(n, float), 1e-9)
    p = np.minimum(hits / n, 1)
    return (p + z * z / (2 * n) - z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))) / (1 + z * z / n)


def like(index: Any, handles: Sequence[Handle | Match], *, seed: int = 0) -> list[Handle]:
    """As many random codes in the same groups, each about as frequent as the one it stands for: the control."""
    rng, found = np.random.default_rng(seed), []
    for name, group, code in map(handle, handles):
        counts = fired(index.chosen(name, group), index.codes[name], np.ones(len(index), bool))
        near = np.argsort(np.abs(np.log1p(counts) - np.log1p(counts[code])), kind="stable")[:21]
        own = {(name, group, code), *found, *map(handle, handles)}
        near = [int(other) for other in near if (name, group, int(other)) not in own and counts[other] > 0]
        if not near:
            raise CodebookError(
                f"{name} group {group} has no other code that fires: there is no control for code {code}"
            )
        found.append((name, group, near[rng.integers(len(near))]))
    return found


# --- did it help ------------------------------------------------------------------------------------------------------


class Bayes:
    """A classifier of texts: multinomial naive Bayes on words, add-one counts. `Bayes(texts, names)(others)`: names."""

    def __init__(self, texts: Sequence[str], names: Sequence[str]):
        self.names = sorted(set(names))
        counts = {name: Counter[str]() for name in self.names}
        for text, name in zip(texts, names, strict=True):
            counts[name].update(self.words(text))
        self.vocabulary = {word: i for i, word in enumerate(sorted(set().union(*counts.values())))}
        table = np.ones((len(self.names), len(self.vocabulary)))
        for row, name in zip(table, self.names, strict=True):
            for word, n in counts[name].items():
                row[self.vocabulary[word]] += n
        self.table = np.log(table / table.sum(1, keepdims=True))
        share = Counter(names)
        self.prior = np.log([share[name] / len(names) for name in self.names])

    @staticmethod
    def words(text: str) -> list[str]:
        """Lower-case words."""
        return re.findall(r"[a-z']+", text.lower())

    def __call__(self, texts: Sequence[str]) -> list[str]:
        found = []
        for text in texts:
            places = [self.vocabulary[w] for w in self.words(text) if w in self.vocabulary]
            found.append(self.names[int(np.argmax(self.prior + self.table[:, places].sum(1)))])
        return found

    def accuracy(self, texts: Sequence[str], names: Sequence[str]) -> float:
        """Share of texts that it names right."""
        return float(np.mean([a == b for a, b in zip(self(texts), names, strict=True)]))


def containing(word: str) -> Callable[[Sequence[str]], list[str]]:
    """A classifier for `trial`: the word where a text has it, in any letters, else "": the paper's measure."""
    return lambda texts: [word if word.lower() in text.lower() else "" for text in texts]


class Steering(NamedTuple):
    """How texts came out under one treatment.

    Attributes:
        topic, treatment: "none", "random" or "codes", and others of the caller's. success: share that the classifier
            gives the topic. bits_per_byte: of the texts, prompts included, under the judge. distinct: different pairs
            of words / all pairs. texts: themselves.
    """

    topic: str
    treatment: str
    success: Estimate
    bits_per_byte: float
    distinct: float
    texts: tuple[str, ...]


def trial(
    model: Any,
    handles: Mapping[str, Sequence[Handle | Match]],
    prompts: Sequence[str],
    classify: Callable[[Sequence[str]], Sequence[str]],
    judge: Any,
    *,
    index: Any = None,
    repeats: int = 10,
    tokens: int = 64,
    positions: tuple[int, int] | None = None,
    seed: int = 0,
    **sampling: Any,
) -> list[Steering]:
    """Steer to every topic, beside no steering and, with an index, random codes of the same groups and frequencies.

    Args:
        handles: topic -> codes to activate. prompts: each is continued `repeats` times.
        classify: texts -> topics, such as `Bayes`; it sees continuations alone. judge: another model, for fluency.
        tokens, positions, sampling: as in `steer`.
    """
    given = [p for p in prompts for _ in range(repeats)]
    write = functools.partial(steer, model, given, positions=positions, tokens=tokens, **sampling)
    plain, rows = write(seed=seed), []
    for number, (topic, codes) in enumerate(handles.items()):
        made = {"none": plain}
        if index is not None:
            made["random"] = write(activate=like(index, codes, seed=seed + number), seed=seed)
        made["codes"] = write(activate=codes, seed=seed)
        rows += [outcome(topic, what, given, texts, classify, judge) for what, texts in made.items()]
    return rows


def outcome(
    topic: str, treatment: str, prompts: Sequence[str], texts: Sequence[str], classify: Callable, judge: Any
) -> Steering:
    """One treatment's figures, from texts and the prompts they begin with."""
    own = [text[len(p) :] for p, text in zip(prompts, texts, strict=True)]
    success = estimate([float(name == topic) for name in classify(own)])
    bits = evaluate(judge, [text for text in texts if text.strip()]).bits_per_byte
    pairs = [pair for text in own for words in [Bayes.words(text)] for pair in itertools.pairwise(words)]
    return Steering(topic, treatment, success, bits, len(set(pairs)) / max(1, len(pairs)), tuple(texts))


def table(rows: Sequence[Steering]) -> show.Picture:
    """Topics under each other, treatments side by side: success and bits per byte."""
    treatments = list(dict.fromkeys(row.treatment for row in rows))
    lines = []
    for topic in dict.fromkeys(row.topic for row in rows):
        own = {row.treatment: row for row in rows if row.topic == topic}
        lines.append(
            [
                topic,
                *(f"{own[t].success.value:.0%}" for t in treatments),
                *(f"{own[t].bits_per_byte:.3f}" for t in treatments),
            ]
        )
    mean = lambda what: [np.mean([what(r) for r in rows if r.treatment == t]) for t in treatments]  # noqa: E731
    lines.append(
        [
            "mean",
            *(f"{x:.0%}" for x in mean(lambda r: r.success.value)),
            *(f"{x:.3f}" for x in mean(lambda r: r.bits_per_byte)),
        ]
    )
    header = ["topic", *(f"{t}, success" for t in treatments), *(f"{t}, bits/byte" for t in treatments)]
    return show.table(lines, header)


# --- what a code does to the prediction -------------------------------------------------------------------------------


@functools.lru_cache(maxsize=16)
def _effect(graph: Any) -> Callable:
    def run(params, leaned, tokens):
        return jax.nn.log_softmax(bind(graph, {**params, **leaned})(tokens)[:, -1].astype(jnp.float32)).mean(0)

    return jax.jit(run)


def effects(model: Any, texts: np.ndarray, codes: Sequence[Handle | Match]) -> np.ndarray:
    """(codes, V): how much activating each code raises the next token's log-probability; mean over texts (n, T).

    The code is active at every position of the texts.
    """
    graph, params = pure(model)
    run, tokens = _effect(graph), jnp.asarray(texts)
    plain = run(params, leans(model), tokens)
    return np.stack([np.asarray(run(params, leans(model, [code]), tokens) - plain) for code in codes])
