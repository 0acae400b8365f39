"""What codebooks cost in quality, what codes stand for, and whether they steer: TokFSM, TinyStories, the world.

    python tests/bench/codebook_experiments.py OUT [--parts fsm,stories,world,read,steer] [--seeds 3] [--data DATA]

After Tamkin, Taufeeque and Goodman (2023, arXiv 2310.17230), at sizes for two cores. Models and figures are kept in
OUT, so that a run can be stopped and gone on with; `report` prints what there is. DATA (see the README on TINYLM_DATA)
is for `stories` alone.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import tinylm
from tinylm import ModelConfig, TrainConfig, Transformer, World, codebooks
from tinylm.codebooks import fsm, sae, steering
from tinylm.codebooks.index import windows
from tinylm.probe.activations import record
from tinylm.techniques.codebook import discretize

PROMPTS = ("Once upon a time", "One day,", "There was a", "In the morning")


class Bench:
    """Where things are kept, and what is asked for."""

    def __init__(self, out: Path, seeds: int, data: Path | None) -> None:
        self.out, self.seeds, self.data = out, range(seeds), data
        out.mkdir(parents=True, exist_ok=True)
        self.file = out / "figures.json"
        self.figures: dict[str, Any] = json.loads(self.file.read_text()) if self.file.exists() else {}

    def keep(self, name: str, make: Callable[..., Any], *given: Any) -> Any:
        """The figure of that name: `make(*given)` unless it is there."""
        if name not in self.figures:
            begun = time.perf_counter()
            self.figures[name] = make(*given)
            self.file.write_text(json.dumps(self.figures, indent=1))
            jax.clear_caches()  # a process may map only so many compiled programs
            print(f"{name} ({time.perf_counter() - begun:.0f} s): {json.dumps(self.figures[name])}", flush=True)
        return self.figures[name]

    def trained(self, name: str, start: Callable[[], Transformer], data: Any, **rule: Any) -> Transformer:
        """A model of that name, trained from `start()` unless it is there."""
        folder = self.out / "models" / name
        if (folder / "config.json").exists():
            return tinylm.load(folder)
        model, every = start(), rule.pop("wake", None)
        rule = {"optimizer": "adamw", "weight_decay": 0.0, "log_every": 50, "warmup": 50, "steps_per_call": 5} | rule
        trainer = tinylm.train(model, data, TrainConfig(**rule))
        for step in trainer:
            if every and step.step % 250 == 0 and step.step <= rule["steps"] // 2:
                codebooks.wake(trainer, every(step.step))
        if trainer.outcome != "done":
            raise KeyboardInterrupt
        print(f"trained {name}: {np.mean(trainer.losses[-100:]):.4f} nats", flush=True)
        tinylm.save(model, folder)
        return model


def nats(model: Transformer, batches: list[Any]) -> list[float]:
    """Mean loss per token, and share of tokens whose likeliest was right."""
    loss, right = [], []
    for b in batches:
        logits = np.asarray(model(b.tokens), np.float64)
        logits -= logits.max(-1, keepdims=True)
        own = np.take_along_axis(logits, b.targets[..., None], -1)[..., 0] - np.log(np.exp(logits).sum(-1))
        loss.append(-own.mean())
        right.append((logits.argmax(-1) == b.targets).mean())
    return [round(float(np.mean(x)), 4) for x in (loss, right)]


# --- TokFSM -----------------------------------------------------------------------------------------------------------

FSM = {
    "attn": (["attn"], "released"), "attn+mlp": (["attn", "mlp"], "released"),
    "attn, paper": (["attn"], "paper"),
}  # fmt: skip


def run_fsm(b: Bench) -> None:
    """100 states with 10 successors; k = 1; trained dense, then with codes; the control goes on without."""
    world, length, batch = World(mode="fsm", states=100, successors=10), 64, 32
    config = ModelConfig(vocab=fsm.VOCAB, context=66, width=64, layers=2, heads=4, mlp="gelu", norm="layernorm")
    b.keep("fsm floor", lambda: (np.log(100) + (length / 2 - 1) * np.log(10)) / length)
    held = [fsm.Walks(world, batch=batch, length=length, seed=999)(i) for i in range(40)]
    for seed in b.seeds:
        walks = fsm.Walks(world, batch=batch, length=length, seed=seed)
        more = {"batch": batch, "length": length, "seed": seed}
        at = lambda step, walks=walks: [walks(10**6 + step + i) for i in range(8)]  # noqa: E731
        dense = lambda seed=seed, walks=walks, more=more: b.trained(  # noqa: E731
            f"fsm-dense-{seed}", lambda: Transformer(config, rngs=seed), walks, steps=2000, learning_rate=0.01,
            **{**more, "optimizer": "muon"},
        )  # fmt: skip
        for kind in ("without", *FSM):

            def start(kind=kind, seed=seed, dense=dense, at=at) -> Transformer:
                model = dense()
                if kind != "without":
                    sites, preset = FSM[kind]
                    discretize(model, sites, preset, codes=1024, k=1, rngs=seed)
                    codebooks.start(model, at(0), "kmeans", seed=seed)
                return model

            def figures(kind=kind, seed=seed, start=start, walks=walks, more=more, at=at) -> dict:
                wake = None if kind == "without" else at
                model = b.trained(f"fsm-{kind}-{seed}", start, walks, steps=2500, learning_rate=2e-3, wake=wake, **more)
                found = {"loss": nats(model, held)} | fsm.machine(model, world)._asdict()
                return found if kind == "without" else found | of_codes(model)

            def of_codes(model: Transformer, at=at) -> dict:
                names = list(codebooks.books(model))
                parts = {n: [n] for n in names}
                for kind in ("attn", "mlp"):
                    if own := [n for n in names if kind in n]:
                        parts[f"all {kind}"] = own
                parts["all"] = names
                return {
                    "unused": codebooks.dead(codebooks.usage(model, at(5000))),
                    "purity, states": fsm.purity(model, world), "purity, pairs": fsm.purity(model, world, 2),
                    "left": fsm.patching_table(model, world, parts),
                    "states": state_codes(model, world),
                }  # fmt: skip

            b.keep(f"fsm {kind} {seed}", figures)


def state_codes(model: Transformer, world: World) -> dict:
    """Precision of each state's best code, and of the best neuron at that recall, at second digits of long walks."""
    rng = np.random.default_rng(0)
    rows = fsm.digits(fsm.walks(world.successor_table, 400, 30, rng))
    states = rows[:, 1::2] * 10 + rows[:, 2::2]
    labels = np.full(rows.shape, -1, np.int32)
    labels[:, 2::2] = states
    fires = {name: np.asarray(ids).reshape(-1, *ids.shape[2:]) for name, ids in codebooks.read(model, rows).items()}
    sizes = {name: book.book.shape[1] for name, book in codebooks.books(model).items()}
    every = codebooks.Fired(fires, sizes, np.arange(0, rows.size, rows.shape[1]))
    kind = codebooks.Labels("state", labels.ravel(), tuple(map(str, range(100))))
    best = codebooks.best_codes(every, kind)
    dense = record(codebooks.tapped(model, lambda _, x: x, on=False), rows, r"blocks\.\d+\.(attn\.heads|mlp)")
    neurons = {name: x.reshape(rows.size, -1) for name, x in dense.items()}
    other = codebooks.best_neurons(neurons, every, kind, {m.label: m.recall for m in best})
    mean = lambda ms, what: round(float(np.mean([getattr(m, what) for m in ms])), 4)  # noqa: E731
    where = statistics.mode(m.site for m in best)
    return {"code": mean(best, "precision"), "recall": mean(best, "recall"), "neuron": mean(other, "precision"),
            "neuron's recall": mean(other, "recall"), "mostly": where}  # fmt: skip


# --- TinyStories ------------------------------------------------------------------------------------------------------

SITES = [(s, k) for k in (8, 1, 32) for s in ("attn", "mlp", "attn+mlp")] + [("resid", 8)]


def run_stories(b: Bench) -> None:
    """Loss and accuracy with and without codes, after the same further steps."""
    if b.data is None or not b.data.exists():
        raise SystemExit(f"stories needs --data; {b.data} is not there")
    with gzip.open(b.data / "tinystories/train_v1.txt.gz", "rt", encoding="utf-8") as file:
        texts = list(dict.fromkeys(t.strip() for t in file.read().split("<|endoftext|>") if t.strip()))
    learn, held_out = tinylm.split(texts, valid=0.05)
    tokenizer = tinylm.Tokenizer.train(learn, vocab=1024)
    tokens = tinylm.write_tokens(learn, tokenizer, b.out / "stories")
    valid = tinylm.write_tokens(held_out, tokenizer, b.out / "stories", split="valid")
    config = ModelConfig(vocab=1024, context=64, width=80, layers=2, heads=4)
    source = tinylm.Windows(valid, batch=16, length=64, seed=0)
    held = [source(i) for i in range(min(60, source.windows // 16))]
    for seed in b.seeds:
        more = {"batch": 16, "length": 64, "seed": seed}
        dense = lambda seed=seed, more=more: b.trained(  # noqa: E731
            f"stories-dense-{seed}", lambda: Transformer(config, rngs=seed, tokenizer=tokenizer), tokens, steps=1500,
            learning_rate=0.01, **{**more, "optimizer": "muon"},
        )  # fmt: skip
        batches = tinylm.Windows(tokens, batch=16, length=64, seed=77 + seed)
        for sites, k in [("", 0), *SITES]:

            def figures(sites=sites, k=k, seed=seed, dense=dense, batches=batches, more=more) -> dict:
                def start() -> Transformer:
                    model = dense()
                    if sites:
                        discretize(model, sites.split("+"), codes=512, k=k, rngs=seed)
                        codebooks.start(model, [batches(i) for i in range(8)], "data", seed=seed)
                    return model

                name = f"stories-{sites or 'without'}-{k}-{seed}"
                model = b.trained(name, start, tokens, steps=400, learning_rate=2e-3, **more)
                found = {"loss": nats(model, held)}
                if sites:
                    found["unused"] = codebooks.dead(codebooks.usage(model, [batches(1000 + i) for i in range(40)]))
                shutil.rmtree(b.out / "models" / name)
                return found

            b.keep(f"stories {sites or 'without'} {k} {seed}", figures)


# --- the world --------------------------------------------------------------------------------------------------------


def made_world(b: Bench) -> tuple[World, tinylm.Tokens, Any]:
    """The text that all three parts below are about."""
    world = World(seed=0)
    texts = world.corpus(4_000_000)
    file = b.out / "world-tokenizer.json"
    if not file.exists():
        tinylm.Tokenizer.train(texts[:800], vocab=1024).save(file)
    tokenizer = tinylm.Tokenizer.load(file)
    return world, tinylm.write_tokens(texts, tokenizer, b.out / "world"), tokenizer


def world_models(b: Bench, seed: int, tokens: Any, tokenizer: Any) -> tuple[Transformer, Transformer]:
    """The model with codes, and the one trained as long without."""
    config = ModelConfig(vocab=1024, context=128, width=96, layers=3, heads=4)
    more = {"batch": 8, "length": 128, "seed": seed}
    dense = lambda: b.trained(  # noqa: E731
        f"world-dense-{seed}", lambda: Transformer(config, rngs=seed, tokenizer=tokenizer), tokens, steps=2500,
        learning_rate=0.01, **{**more, "optimizer": "muon"},
    )  # fmt: skip
    batches = tinylm.Windows(tokens, batch=8, length=128, seed=77 + seed)

    def with_codes() -> Transformer:
        # Not behind MLPs: that costs 1.7 nats here, and a model that speaks nonsense cannot be steered.
        model = discretize(dense(), "attn", codes=512, k=8, rngs=seed)
        return codebooks.start(model, [batches(i) for i in range(16)], "kmeans", seed=seed)

    rule = {"steps": 1000, "learning_rate": 2e-3, **more}
    wake = lambda step: [batches(10**5 + step + i) for i in range(16)]  # noqa: E731
    coded = b.trained(f"world-codes-{seed}", with_codes, tokens, wake=wake, **rule)
    return coded, b.trained(f"world-without-{seed}", dense, tokens, **rule)


def run_world(b: Bench) -> None:
    """Train, and what codes cost in bits per byte."""
    world, tokens, tokenizer = made_world(b)
    held = list(world.texts(60, seed=1))
    for seed in b.seeds:
        pair = world_models(b, seed, tokens, tokenizer)
        b.keep(f"world {seed}", lambda pair=pair: [tinylm.evaluate(m, held).bits_per_byte for m in pair])


def indexed(b: Bench, seed: int, model: Transformer, stories: list[Any]) -> Any:
    """The index of these stories, made unless it is there."""
    folder = b.out / f"index-{seed}"
    if folder.exists():
        return codebooks.Index(folder)
    tokens = tinylm.write_tokens([s.text for s in stories], model.tokenizer, b.out / "read")
    return codebooks.build(model, tokens, folder)


def dense_values(model: Transformer, tokens: tinylm.Tokens) -> dict[str, np.ndarray]:
    """Heads, MLP outputs and hidden neurons at every position, read in the windows that the index reads."""
    context, found = model.config.context, {}
    spans = list(windows(tokens, context, context // 2))
    for at in range(0, len(spans), 64):
        part = spans[at : at + 64]
        rows = np.zeros((len(part), context), np.int32)
        for row, (a, end, _) in zip(rows, part, strict=True):
            row[: end - a] = tokens[a:end]
        for name, x in record(model, rows, r"blocks\.\d+\.(attn\.heads|mlp|mlp\.hidden)").items():
            own = found.setdefault(name, np.zeros((len(tokens), *x.shape[2:]), np.float32))
            for row, (a, end, new) in zip(x, part, strict=True):
                own[new:end] = row[new - a : end - a]
    return found


def run_read(b: Bench) -> None:
    """Best codes against the true labels, beside the best neuron at their recall, an autoencoder and random codes."""
    world, tokens, tokenizer = made_world(b)
    stories = list(world.stories(400, seed=7))
    kinds = ("topic", "plot", "feeling", "place", "speaker", "feature")
    words = {"said": r"\b(said)\b", "quotation mark": r'(")', "he, she": r"\b([Ss]?[Hh]e)\b"}
    for seed in b.seeds:
        model, dense = world_models(b, seed, tokens, tokenizer)
        index = indexed(b, seed, model, stories)
        if f"read {seed} he, she" in b.figures:
            continue
        values = dense_values(dense, tinylm.Tokens.open(b.out / "read"))
        states = {}
        for layer in range(model.config.layers):
            states[f"blocks.{layer}.attn.o"] = values[f"blocks.{layer}.attn.heads"]
        some = np.random.default_rng(seed).permutation(len(index))[:40_000]
        latent, blind = {}, {}
        for name, x in states.items():
            fitted, _ = sae.train_sae(x[some], 512, 8, steps=1500, batch=512, rate=2e-3, seed=seed)
            latent[name], blind[name] = sae.sae_ids(fitted, x, 8), sae.random_ids(x, 512, 8, seed=seed)
        others = {
            "autoencoder": codebooks.Fired(latent, dict.fromkeys(states, 512), index.starts),
            "random": codebooks.Fired(blind, dict.fromkeys(states, 512), index.starts),
        }
        neurons = {name: x.reshape(len(x), -1) for name, x in values.items()}
        labels = [codebooks.world_labels(index, tokenizer, stories, kind) for kind in kinds]
        for own in labels + codebooks.regex_labels(index, tokenizer, words):
            b.keep(f"read {seed} {own.kind}", compared, index, own, others, neurons)
        named = [m for ms in codebooks.named_codes(index, labels).values() for m in ms if m]
        share = float(np.mean([m.f1 > 0.5 for m in named]))
        b.keep(f"read {seed} named", lambda named=named, share=share: [len(named), share])


def compared(index: Any, labels: Any, others: dict[str, Any], neurons: dict[str, np.ndarray]) -> dict:
    """Precision, recall and F1 of each, means over the classes that occur often enough."""
    best = codebooks.best_codes(index, labels, least=100)
    known = {m.label for m in best}
    rows = {"codes": best, "neurons": codebooks.best_neurons(neurons, index, labels, {m.label: m.recall for m in best})}
    rows |= {
        name: [m for m in codebooks.best_codes(f, labels, least=100) if m.label in known] for name, f in others.items()
    }
    at = {m.label: m.precision for m in rows["neurons"]}
    found: dict[str, Any] = {"classes": len(best), "share": round(float(np.mean([m.share for m in best])), 4)}
    found["above neurons"] = round(float(np.mean([m.precision > at[m.label] for m in best])), 3)
    for name, ms in rows.items():
        found[name] = [round(float(np.mean([getattr(m, f) for m in ms])), 3) for f in ("precision", "recall", "f1")]
    return found


def run_steer(b: Bench) -> None:
    """Words, feelings and topics: success and fluency beside random codes of the same groups and no steering."""
    world, tokens, tokenizer = made_world(b)
    stories = list(world.stories(400, seed=7))
    rng = np.random.default_rng(0)

    def piece(story: Any) -> str:
        words = story.text.split()
        at = int(rng.integers(max(1, len(words) - 60)))
        return " ".join(words[at : at + 60])

    learn, test = list(world.stories(1500, seed=11)), list(world.stories(300, seed=12))
    topics = codebooks.Bayes([piece(s) for s in learn], [s.labels["topic"] for s in learn])
    b.keep(
        "steer classifier of topics",
        lambda: topics.accuracy([piece(s) for s in test], [s.labels["topic"] for s in test]),
    )
    for seed in b.seeds:
        model, _ = world_models(b, seed, tokens, tokenizer)
        judge = world_models(b, (seed + 1) % len(b.seeds), tokens, tokenizer)[1]
        index = indexed(b, seed, model, stories)
        topic = codebooks.world_labels(index, tokenizer, stories, "topic")
        feeling = codebooks.world_labels(index, tokenizer, stories, "feeling")
        token = codebooks.token_labels(index, tokenizer, back=-1)
        plenty = [token.names[i] for i in np.argsort(-np.bincount(token.values[token.values >= 0], minlength=1024))]
        words = [w for w in plenty if re.fullmatch(r" [a-z]{4,}", w)][30:110:10]
        common = np.argsort(-np.bincount(feeling.values[feeling.values >= 0], minlength=len(feeling.names)))
        feelings = [feeling.names[i] for i in common[:8]]
        has = lambda names: lambda texts: [next((n for n in names if n.strip() in t.lower()), "") for t in texts]  # noqa: E731
        plans = {
            "words": (token, words, None), "feelings": (feeling, feelings, None),
            "topics": (topic, topic.names, topics),
        }  # fmt: skip
        for what, (labels, names, classify) in plans.items():
            for per in (1, 4):

                def figures(labels=labels, names=names, classify=classify, per=per, seed=seed, model=model,
                            judge=judge, index=index, has=has) -> dict:  # fmt: skip
                    rows = []
                    for name in names:
                        codes = codebooks.codes_for(index, labels, name, per=per)
                        own = classify or has([name])
                        rows += codebooks.trial(model, {name: codes}, PROMPTS, own, judge, index=index, repeats=10,
                                                tokens=64, seed=seed)  # fmt: skip
                    return told(rows)

                b.keep(f"steer {what} {per} {seed}", figures)
            if what == "topics":
                continue  # no token stands for one
            for per in (1, 2, 3, 4):

                def written(names=names, per=per, seed=seed, model=model, judge=judge, index=index, has=has) -> dict:
                    rows = []
                    for name in names:
                        token = tokenizer.encode(f"a {name.strip()}")[1]
                        codes = codebooks.codes_toward(model, token, per=per, index=index, least=5)
                        rows += codebooks.trial(model, {name: codes}, PROMPTS, has([name]), judge, index=index,
                                                repeats=10, tokens=64, seed=seed)  # fmt: skip
                    return told(rows)

                b.keep(f"steer by writing {what} {per} {seed}", written)


def told(rows: list[steering.Steering]) -> dict:
    """Per treatment: success by name, their mean, bits per byte, share of different word pairs; one text."""
    found: dict[str, Any] = {}
    for row in rows:
        own = found.setdefault(row.treatment, {"success": {}, "bits": [], "distinct": []})
        own["success"][row.topic] = round(row.success.value, 3)
        own["bits"].append(row.bits_per_byte)
        own["distinct"].append(row.distinct)
    for own in found.values():
        own["mean"] = round(float(np.mean(list(own["success"].values()))), 3)
        own |= {name: round(float(np.mean(own[name])), 3) for name in ("bits", "distinct")}
    best = max((r for r in rows if r.treatment == "codes"), key=lambda r: r.success.value)
    return found | {"a text": [best.topic, best.texts[0]]}


def report(b: Bench) -> None:
    """Every figure there is."""
    for name, value in sorted(b.figures.items()):
        print(name, json.dumps(value))


PARTS = {
    "fsm": run_fsm, "stories": run_stories, "world": run_world, "read": run_read, "steer": run_steer, "report": report,
}  # fmt: skip

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--parts", default="fsm,stories,world,read,steer")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data", type=Path)
    given = parser.parse_args()
    bench = Bench(given.out, given.seeds, given.data)
    for part in given.parts.split(","):
        PARTS[part](bench)
