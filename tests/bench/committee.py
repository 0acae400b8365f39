"""Scratch, pretrained, committee, deep, wide: what "Tiny language models" (2507.14871) claims, at a size for two cores.

    python tests/bench/committee.py DATA OUT [--steps 600] [--members 8] [--seeds 3] [--parts members,deep,wide,...]

DATA is a folder with wiki/ and cls/ (see the README on TINYLM_DATA). Every fine-tuned model's logits on the test texts
are kept in OUT/<set>/<name>.npy, so that a run can be stopped and gone on with; `report` prints what there is.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import time
from pathlib import Path

import numpy as np

from tinylm import TrainConfig, Transformer, load, preset, quantize, save, train
from tinylm.classification import (
    cascade,
    classified,
    classify,
    cost,
    curve,
    diversity,
    evaluate_classes,
    masked_texts,
    parameters_like,
    read_set,
    select_texts,
    snapshots,
    where_larger_helps,
)
from tinylm.presets import count
from tinylm.suite.results import estimate
from tinylm.tokenizer import Tokenizer

CONTEXT, BATCH, VOCAB, WIDTH = 40, 32, 2048, 32
PER_CLASS = {"fewrel16": (60, 70), "ag_news": (100, 300), "dbpedia": (30, 70)}  # to learn, to test
MORE = {"dropout": 0.0, "init_std": 0.05}
# Chosen on texts that are neither learned nor tested (notebooks/LAB.md, 2026-11-21). Mean pooling: masked pretraining
# asks nothing of the first position, and leaves it worse than random weights do.
TUNING = {"epochs": 12, "learning_rate": 3e-3, "valid": None, "length": CONTEXT, "batch": 16, "pooling": "mean"}
READING = {"optimizer": "adamw", "learning_rate": 5e-3, "weight_decay": 0.01}
DEEP = {**READING, "learning_rate": 3e-3}  # six post-norm layers: not above it, and a warm-up of at least 200 steps


class Bench:
    """The data, the tokenizer, and a place for what was done already."""

    def __init__(self, data: Path, out: Path, steps: int) -> None:
        self.data, self.out, self.steps = data, out, steps
        out.mkdir(parents=True, exist_ok=True)
        with gzip.open(data / "wiki/enwik8_articles.jsonl.gz", "rt", encoding="utf-8") as lines:
            self.articles = [json.loads(line)["text"][:1500] for line in lines]
        if not (out / "tokenizer.json").exists():
            Tokenizer.train(self.articles, vocab=VOCAB, kind="wordpiece").save(out / "tokenizer.json")
        self.tokenizer = Tokenizer.load(out / "tokenizer.json")
        self.sets = {name: self.read(name) for name in PER_CLASS}
        # Texts without their labels, and without any that is tested on: articles, news, abstracts.
        tested = {text for _, test in self.sets.values() for text in test.texts}
        self.articles = [text for text in self.articles if text not in tested]
        self.texts = list(self.articles)
        for file, label in (("ag_news", "label"), ("dbpedia14", "class")):
            own = read_set(data / f"cls/{file}/train.jsonl.gz", label=label).texts
            self.texts += [text for text in own if text not in tested]

    def read(self, name: str):
        learn, test = PER_CLASS[name]
        cls = self.data / "cls"
        if name == "fewrel16":
            both = read_set(cls / "fewrel/val_wiki.json.gz").balanced(learn + test)
            place = np.arange(len(both)) % (learn + test)
            return both.take(np.flatnonzero(place < learn)), both.take(np.flatnonzero(place >= learn))
        folder = cls / {"ag_news": "ag_news", "dbpedia": "dbpedia14"}[name]
        label = "class" if name == "dbpedia" else "label"
        both = [read_set(folder / f"{part}.jsonl.gz", label=label) for part in ("train", "valid")]
        if both[1].counts.min() < test:  # too few held out: both from one file
            whole = both[0].balanced(learn + test)
            place = np.arange(len(whole)) % (learn + test)
            return whole.take(np.flatnonzero(place < learn)), whole.take(np.flatnonzero(place >= learn))
        return both[0].balanced(learn), both[1].balanced(test)

    def shape(self, layers: int = 1):
        return preset("bert-1", vocab=VOCAB, width=WIDTH, heads=1, layers=layers, context=CONTEXT, **MORE)

    def wide(self, members: int):
        return parameters_like(self.shape(), members * count(self.shape()))

    def pretrained(self, name: str, shape, seed: int, texts=None, times: int = 1, **more) -> Transformer:
        folder = self.out / "models" / name
        if (folder / "config.json").exists():
            return load(folder)
        texts = self.texts if texts is None else texts
        model, begun = Transformer(shape, rngs=seed, tokenizer=self.tokenizer), time.perf_counter()
        rule = {**READING, **more}
        config = TrainConfig(
            steps=times * self.steps, batch=BATCH, objective="mlm", mask_rate=0.2, schedule="linear", final=0.0,
            warmup=max(self.steps // 16, 200 * (shape.layers > 1)), seed=seed, log_every=self.steps // 4, beta2=0.98,
            steps_per_call=10, **rule,
        )  # fmt: skip
        trainer = train(model, masked_texts(model, texts, batch=BATCH, length=CONTEXT, rate=0.2, seed=seed), config)
        list(trainer)
        if trainer.outcome != "done":  # half a pretraining must not be taken for a whole one
            raise KeyboardInterrupt
        print(
            f"pretrained {name}: {np.mean(trainer.losses[-50:]):.3f} nats, {time.perf_counter() - begun:.0f} s",
            flush=True,
        )
        save(model, folder)
        return model

    def tuned(self, task: str, name: str, model: Transformer, seed: int, **more) -> np.ndarray:
        file = self.out / task / f"{name}.npy"
        if file.exists():
            return np.load(file)
        learn, test = self.sets[task]
        found = classify(model, learn, seed=seed, **{**TUNING, **more})
        result = found.evaluate(test)
        print(f"{task} {name}: {result['accuracy']:.4f}, epoch {found.best}, {found.seconds:.0f} s", flush=True)
        file.parent.mkdir(exist_ok=True)
        np.save(file, result.logits.astype(np.float32))
        return result.logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--tasks", default=",".join(PER_CLASS))
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--parts", default="members,scratch,deep,wide,deepscratch,same,snapshots,amount,overlap")
    args = parser.parse_args()
    b = Bench(args.data, args.out, args.steps)
    b.sets = {name: b.sets[name] for name in args.tasks.split(",")}
    one, deep, wide = b.shape(), b.shape(6), b.wide(4)
    for name, shape in (("one", one), ("deep", deep), ("wide", wide)):
        print(name, shape.width, shape.layers, count(shape), cost(shape.replace(head="classes", classes=16), CONTEXT))
    for part in args.parts.split(","):
        PARTS[part](b, args, one, deep, wide)


def members(b, args, one, deep, wide) -> None:
    for k in range(args.members):
        model = b.pretrained(f"one-{k}", one, k)
        for task in b.sets:
            b.tuned(task, f"one-{k}", model, k)


def scratch(b, args, one, deep, wide) -> None:
    for k in range(args.seeds):
        for task in b.sets:
            b.tuned(task, f"scratch-{k}", Transformer(one, rngs=100 + k, tokenizer=b.tokenizer), k)


RULES = {"one": READING, "wide": READING, "deep": DEEP}


def large(kind: str):
    def run(b, args, one, deep, wide) -> None:
        for k in range(args.seeds):
            model = b.pretrained(f"{kind}-{k}", {"deep": deep, "wide": wide}[kind], 200 + k, **RULES[kind])
            for task in b.sets:
                b.tuned(task, f"{kind}-{k}", model, k)

    return run


def long(b, args, one, deep, wide) -> None:
    """Eight times the steps: does pretraining come to help?"""
    for k in range(args.seeds):
        model = b.pretrained(f"long-{k}", one, 600 + k, times=8)
        for task in b.sets:
            b.tuned(task, f"long-{k}", model, k)


def slow(b, args, one, deep, wide) -> None:
    """The same fine-tuning at a third of the rate: deep models may want it."""
    for k in range(args.seeds):
        for kind, shape, seed in (("one", one, k), ("deep", deep, 200 + k), ("wide", wide, 200 + k)):
            for task in b.sets:
                model = b.pretrained(f"{kind}-{k}", shape, seed, **RULES[kind])
                b.tuned(task, f"{kind}slow-{k}", model, k, learning_rate=1e-3)


def deepscratch(b, args, one, deep, wide) -> None:
    for k in range(args.seeds):
        b.tuned("fewrel16", f"deepscratch-{k}", Transformer(deep, rngs=300 + k, tokenizer=b.tokenizer), k)


def same(b, args, one, deep, wide) -> None:
    """Seeds of fine-tuning only: one pretrained model, other heads and orders."""
    for k in range(args.members):
        b.tuned("fewrel16", f"same-{k}", b.pretrained("one-0", one, 0), 1000 + k)


def snapshot(b, args, one, deep, wide) -> None:
    learn, test = b.sets["fewrel16"]
    for seed in range(args.seeds):
        if (b.out / "fewrel16" / f"snapshot-{seed}-3.npy").exists():
            continue
        model = b.pretrained(f"one-{seed}", one, seed)
        tuning = {k: v for k, v in TUNING.items() if k != "valid"} | {"epochs": 16, "schedule": "cosine"}
        for i, found in enumerate(snapshots(model, learn, members=4, seed=seed, **tuning)):
            np.save(b.out / "fewrel16" / f"snapshot-{seed}-{i}.npy", found.evaluate(test).logits.astype(np.float32))


def amount(b, args, one, deep, wide) -> None:
    """Equal steps on fewer texts."""
    texts = [b.texts[i] for i in np.random.default_rng(0).permutation(len(b.texts))]
    for n in (500, 4000):
        for k in range(args.seeds):
            model = b.pretrained(f"one-n{n}-{k}", one, 400 + k, texts[:n])
            for task in [t for t in b.sets if t != "dbpedia"]:
                b.tuned(task, f"n{n}-{k}", model, k)


def overlap(b, args, one, deep, wide) -> None:
    """The 2,000 articles that overlap most, and least, with the set."""
    for most in (True, False):
        texts = select_texts(b.articles, b.sets["fewrel16"][0], b.tokenizer, 2000, most=most, first=CONTEXT)
        for k in range(args.seeds):
            name = f"overlap-{'most' if most else 'least'}-{k}"
            b.tuned("fewrel16", name, b.pretrained(name, one, 500 + k, texts), k)


EMBBERT = {"snips": (32, 4), "emotion": (48, 5), "ag_news": (64, 2)}  # tokens read, epochs


def embbert(b, args, one, deep, wide) -> None:
    """EmbBERT-Q from scratch on all texts of three sets of its table, in float and with int8 weights."""
    for name, (length, epochs) in EMBBERT.items():
        learn, test = (read_set(b.data / f"cls/{name}/{part}.jsonl.gz") for part in ("train", "valid"))
        for seed in range(args.seeds):
            file = b.out / f"embbert-{name}-{seed}.json"
            if file.exists():
                continue
            tokenizer = Tokenizer.train(learn.texts, vocab=2048)
            shape = preset("embbert-q", vocab=tokenizer.vocab, context=length, dropout=0.0)
            tuning = {"epochs": epochs, "learning_rate": 1e-3, "batch": 32, "length": length, "pooler": False}
            found = classify(Transformer(shape, rngs=seed, tokenizer=tokenizer), learn, valid=None, seed=seed, **tuning)
            small = quantize(found.model, "int8").model
            said = {"texts": len(learn), "tested": len(test), "float": found.evaluate(test)["accuracy"],
                    "int8": evaluate_classes(small, test)["accuracy"], "seconds": round(found.seconds)}  # fmt: skip
            print(name, seed, said, flush=True)
            file.write_text(json.dumps(said))


def report(b, args, one, deep, wide) -> None:
    """What there is so far, as json: accuracies by kind, the K-curve, diversity, the cascade."""
    for task, (_, test) in b.sets.items():
        files = {file.stem: np.load(file) for file in sorted((b.out / task).glob("*.npy"))}
        kinds: dict[str, list[float]] = {}
        for name, z in files.items():
            kinds.setdefault(name.rpartition("-")[0], []).append(float((z.argmax(-1) == test.labels).mean()))
        print(task, len(test), {k: [round(a, 4) for a in v] for k, v in kinds.items()})
        for kind in ("one", "same", "scratch"):
            own = [z for name, z in files.items() if name.startswith(f"{kind}-") and name.count("-") == 1]
            if len(own) > 1:
                z = np.stack(own)
                for rule in ("logits", "probs", "vote"):
                    print(kind, rule, [(p.k, round(p.accuracy, 4), round(p.low, 4), round(p.high, 4))
                                       for p in curve(z, test.labels, combine=rule)])  # fmt: skip
                d = diversity(z, test.labels)
                print(kind, "disagreement", round(d.mean_disagreement, 3), "errors", round(d.mean_correlation, 3),
                      "any right", round(d.any_right, 3))  # fmt: skip
        members = [z for name, z in files.items() if re.fullmatch(r"one-\d+", name)]
        for name in [n for n in files if re.fullmatch(r"(deep|wide)(slow)?-\d+", n)]:
            z, big = np.stack(members), files[name]
            gap = classified(z.mean(0), test.labels, test.names).items["accuracy"]
            gap = estimate(gap - (big.argmax(-1) == test.labels))
            print(f"committee of {len(z)} minus {name}: {gap}")
            each = [cost(s.replace(head="classes", classes=16), CONTEXT).flops for s in (one, wide, deep)]
            flops = each[2 if name.startswith("deep") else 1]
            for few in (1, 3):
                for kind in ("margin", "entropy", "disagreement")[: 2 if few == 1 else 3]:
                    found = cascade(z[:few], big, test.labels, (few * each[0], flops), kind)
                    at = [int(share * len(test)) for share in (0, 0.1, 0.2, 0.3, 0.5, 1)]
                    shown = [(round(float(found.flops[i]) / 1e6, 2), *(round(float(c[i]), 4) for c in
                             (found.accuracy, found.random, found.oracle))) for i in at]  # fmt: skip
                    print(f"cascade of {few} to {name} by", kind, round(found.recovered, 3), shown)
            print([tuple(round(float(v), 3) for v in d) for d in where_larger_helps(z[:3], big, test.labels, bins=5)])
        shots = [np.stack([files[f"snapshot-{s}-{i}"] for i in range(4)]) for s in range(args.seeds)
                 if f"snapshot-{s}-3" in files]  # fmt: skip
        if shots:
            print("snapshots, 4 of one training", [round(curve(z, test.labels)[-1].accuracy, 4) for z in shots])


PARTS = {
    "report": report,
    "members": members, "scratch": scratch, "deep": large("deep"), "wide": large("wide"), "deepscratch": deepscratch,
    "long": long, "slow": slow, "same": same, "snapshots": snapshot, "amount": amount, "overlap": overlap,
    "embbert": embbert,
}  # fmt: skip

if __name__ == "__main__":
    main()
