"""Who remembers which facts: memories fetched by cluster beside their controls, and the kinds of memory.

    python tests/bench/memory_experiments.py OUT [--parts facts,kinds] [--seeds 3]

Pages of a gazette state facts, each about one of a town's people, told by Zipf's law; a fact is known when a model
continues its prompt with the answer, every token the likeliest. Figures are kept in OUT/figures.json, so that a run can
be stopped and gone on with; every one is a mean over seeds and their range. After Pouransari et al. (2025, arXiv
2510.02375), at sizes for two cores.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import tinylm
from tinylm import ModelConfig, TrainConfig, Transformer, World, memory

FACTS, CHILDREN, ROWS = 1000, 8, (8, 16)
BUCKETS = {"1": (1, 1), "2 to 4": (2, 4), "5 to 19": (5, 19), "20+": (20, 10**9), "all": (1, 10**9)}
RULE = {"batch": 16, "length": 64, "warmup": 20, "log_every": 100, "memory_decay": 1e-3}
FIRST, MORE = 500, 900  # steps of the anchor alone; and of everything that starts from it
FROZEN = r"(?!.*\.bank\.).*=0"  # everything but the bank stands still


class Text(NamedTuple):
    """The gazette and what is asked about it."""

    tokenizer: tinylm.Tokenizer
    tokens: tinylm.Tokens
    nodes: np.ndarray
    prompts: list[str]
    answers: list[str]
    told: np.ndarray
    strict: np.ndarray
    where: dict[str, np.ndarray]
    """The path of every fact's pages, with the tree's nodes and with the same ones dealt out at random."""
    common: list[str]
    """Openings that are not trained on, and the paths of them."""
    common_nodes: np.ndarray


def gazette(out: Path) -> Text:
    """Pages of four facts from one town, with a story's opening after each, which states none."""
    world, rng = World(facts=FACTS), random.Random(0)
    facts = world.fact_table
    towns = [fact.prompt.split(" of ")[1].split(",")[0] for fact in facts]
    people = {town: [i for i, own in enumerate(towns) if own == town] for town in towns}

    def page() -> list[int]:
        first = rng.choices(range(FACTS), [1 / fact.rank for fact in facts])[0]
        own = people[towns[first]]
        return [first, *rng.choices(own, [1 / facts[i].rank for i in own], k=3)]

    pages = [page() for _ in range(3 * FACTS // 2)]
    stories = World(seed=1)
    openings = [" ".join(story.split()[:50]) for story in stories.texts(len(pages) + 150, seed=3)]
    texts = [" ".join(facts[i].prompt + facts[i].answer + "." for i in p) for p in pages] + openings[: len(pages)]
    tree = memory.Tree.fit(texts, children=CHILDREN, depth=2)
    nodes = tree.find(texts)
    tokenizer = tinylm.Tokenizer.train(texts, vocab=512)
    tokens = tinylm.write_tokens(texts, tokenizer, out / "tokens")
    prompts = [fact.prompt for fact in facts]
    strict, where = tree.find(prompts), {}
    for name, own in (("clusters", nodes), ("random", memory.shuffled(nodes))):
        lies = [Counter(tuple(own[n]) for n, p in enumerate(pages) if i in p) for i in range(FACTS)]
        where[name] = np.array([max(c, key=c.get) if c else strict[i] for i, c in enumerate(lies)])
    told = np.bincount(np.concatenate(pages), minlength=FACTS)
    answers = [fact.answer for fact in facts]
    return Text(
        tokenizer,
        tokens,
        nodes,
        prompts,
        answers,
        told,
        strict,
        where,
        openings[len(pages) :],
        tree.find(openings[len(pages) :]),
    )


def documents(text: Text, nodes: np.ndarray, seed: int) -> memory.Documents:
    """Batches that fetch these nodes, and the generic ones now and then."""
    return memory.Documents(
        text.tokens, nodes, children=CHILDREN, batch=RULE["batch"], length=RULE["length"], seed=seed, generic=1 / 17
    )


def anchor(text: Text, seed: int, more: int = 0) -> Transformer:
    """37,024 parameters; with `more` hidden units, the dense model that costs as much at run time as fetching them."""
    shape = ModelConfig(vocab=512, context=64, width=32, layers=2, heads=2, hidden=64 + more)
    return Transformer(shape, rngs=seed, tokenizer=text.tokenizer)


def trained(model: Transformer, data: Any, steps: int, seed: int, **more: Any) -> Transformer:
    """The model itself, after so many steps."""
    trainer = tinylm.train(model, data, TrainConfig(steps=steps, seed=seed, **RULE, **more))
    for _ in trainer:
        pass
    if trainer.outcome != "done":  # a signal is meant for this program, not for one of its trainings
        raise KeyboardInterrupt
    return model


def known(text: Text, model: Transformer, where: Any = None, common: Any = None) -> list[float]:
    """Shares of the facts known, a bucket each, and bits per byte of what is common knowledge."""
    hits = memory.recall(model, text.prompts, text.answers, where).hits
    shares = [float(hits[(text.told >= low) & (text.told <= high)].mean()) for low, high in BUCKETS.values()]
    return [*shares, memory.score(model, text.common, common).bits_per_byte]


def run_facts(text: Text, seed: int) -> dict[str, list[float]]:
    """Every way of keeping facts, after equal tokens; then what blocking the fullest branch does."""
    fetched, generic = documents(text, text.nodes, seed), memory.generic_nodes(CHILDREN, 2)
    start = trained(anchor(text, seed), fetched, FIRST, seed)
    grown = lambda: memory.add_memory(copy.deepcopy(start), children=CHILDREN, rows=ROWS, rngs=seed)  # noqa: E731
    rows = {"anchor, before": known(text, start)}
    rows["no memory"] = known(text, trained(copy.deepcopy(start), fetched, MORE, seed))
    rows["dense"] = known(text, trained(anchor(text, seed, more=sum(ROWS)), fetched, FIRST + MORE, seed))
    only = trained(grown(), memory.Only(fetched, generic), MORE, seed)
    rows["generic memory only"] = known(text, only, generic, generic)
    blind = trained(grown(), documents(text, memory.shuffled(text.nodes), seed), MORE, seed)
    rows["random clusters, oracle"] = known(text, blind, text.where["random"], generic)
    for name, model in {
        "co-trained": trained(grown(), fetched, MORE, seed),
        "frozen anchor": trained(grown(), fetched, MORE, seed, rates=(FROZEN,)),
    }.items():
        for way, where in {"generic": generic, "strict": text.strict, "oracle": text.where["clusters"]}.items():
            rows[f"{name}, {way}"] = known(text, model, where, text.common_nodes if way != "generic" else generic)
        if name == "co-trained":
            rows |= blocking(text, model)
    return rows


def blocking(text: Text, model: Transformer) -> dict[str, list[float]]:
    """Shares of facts known before and after the fullest branch is blocked: in it, elsewhere; hits changed there."""
    oracle = text.where["clusters"]
    branch = (0, int(np.bincount(oracle[text.told > 0, 0]).argmax()))
    there, told = oracle[:, 0] == branch[1], text.told > 0
    ask = lambda where: memory.recall(model, text.prompts, text.answers, where).hits  # noqa: E731
    before, after = ask(oracle), ask(memory.blocked(oracle, branch, children=CHILDREN))
    shares = [float(hits[told & place].mean()) for place in (there, ~there) for hits in (before, after)]
    return {"blocked, there before and after, elsewhere before and after, hits changed elsewhere": [
        *shares, float((before != after)[told & ~there].sum()),
    ]}  # fmt: skip


KINDS = {  # all fetch 4,608 values
    "FFN (8, 16)": ("ffn", {"rows": (8, 16)}), "LoRA-FFN (3, 5)": ("lora_ffn", {"rows": (3, 5)}),
    "LoRA-QK (6, 12)": ("lora_qk", {"rows": (6, 12)}), "LoRA-VO (6, 12)": ("lora_vo", {"rows": (6, 12)}),
    "KV (12, 24)": ("kv", {"rows": (12, 24)}), "FFN, level 0 alone": ("ffn", {"rows": (24, 0)}),
    "FFN, level 1 alone": ("ffn", {"rows": (0, 24)}), "FFN, later layer": ("ffn", {"rows": (16, 32), "layers": [1]}),
    "FFN, earlier layer": ("ffn", {"rows": (16, 32), "layers": [0]}),
}  # fmt: skip


def run_kinds(text: Text, seed: int) -> dict[str, list[float]]:
    """Kinds of memory, levels and places that fetch equally much: facts known, strict and oracle, all buckets."""
    fetched, rows = documents(text, text.nodes, seed), {}
    start = trained(anchor(text, seed), fetched, 300, seed)
    for name, (kind, settings) in KINDS.items():
        model = memory.add_memory(copy.deepcopy(start), kind, children=CHILDREN, rngs=seed, **settings)
        trained(model, fetched, 400, seed)
        for way, where in {"strict": text.strict, "oracle": text.where["clusters"]}.items():
            rows[f"{name}, {way}"] = known(text, model, where)[:-1]
    return rows


PARTS: dict[str, Callable[[Text, int], dict]] = {"facts": run_facts, "kinds": run_kinds}


def table(part: str, seeds: list[dict[str, list[float]]]) -> str:
    """Means over the seeds, and the range of the column "all"."""
    rows = []
    for name in seeds[0]:
        values = np.array([one[name] for one in seeds])
        at = list(BUCKETS).index("all") if len(values[0]) >= len(BUCKETS) else 0
        span = f"{values[:, at].min():.3f} to {values[:, at].max():.3f}"
        rows.append(f"  {name:42} " + "  ".join(f"{x:.3f}" for x in values.mean(axis=0)) + f"   ({span})")
    return "\n".join([f"{part}, {len(seeds)} seeds; told {', '.join(BUCKETS)} times; bits per byte", *rows])


def main() -> None:
    """What is missing is computed, everything is printed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--parts", default="facts,kinds")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "figures.json"
    figures = json.loads(file.read_text()) if file.exists() else {}
    text = gazette(args.out)
    print(f"{len(text.tokens):,} tokens; facts told at all: {int((text.told > 0).sum())}")
    for part in args.parts.split(","):
        for seed in range(args.seeds):
            if f"{part} {seed}" not in figures:
                begun = time.perf_counter()
                figures[f"{part} {seed}"] = PARTS[part](text, seed)
                file.write_text(json.dumps(figures, indent=1))
                print(f"{part}, seed {seed}: {time.perf_counter() - begun:.0f} s", flush=True)
        print(table(part, [figures[f"{part} {seed}"] for seed in range(args.seeds)]), flush=True)


if __name__ == "__main__":
    main()
