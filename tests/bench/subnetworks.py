"""Which parameters predict as bigrams do: masks over a trained model, beside random ones and the complement.

    python tests/bench/subnetworks.py OUT --data DATA [--models own,stories260K] [--seeds 3] [--steps 400]
        [--sizes 5] [--budget 1800]

After Chang and Bergen (2025, arXiv 2504.15471). `own` is a 1.07M-parameter model trained here for `budget` seconds on
the TinyStories text in DATA (see the README on TINYLM_DATA), stories260K and stories15M are llama2.c's checkpoints from
there. `sizes` are weights of the penalty on the share kept; r is the
correlation of surprisals with the bigrams'. What is found is kept in OUT and not searched for again.
"""

from __future__ import annotations

import argparse
import gzip
import json
import time
from pathlib import Path

import tinylm
from tinylm import ModelConfig, Tokens, TrainConfig, Transformer, probe

PUBLISHED = {"stories260K": "stories260K/stories260K.bin", "stories15M": "stories15M/stories15M.bin.gz"}
STEPS = {"batch": 8, "length": 64}


def stories(data: Path, *names: str) -> list[str]:
    """Documents of TinyStories files, each once."""
    found: dict[str, None] = {}
    for name in names:
        with gzip.open(data / "tinystories" / f"{name}.txt.gz", "rt", encoding="utf-8") as file:
            found |= dict.fromkeys(text.strip() for text in file.read().split("<|endoftext|>") if text.strip())
    return list(found)


def prepared(name: str, out: Path, data: Path, budget: float) -> tuple[Transformer, Tokens, Tokens]:
    """A model, and the texts in its tokens: to learn the mask on, and to measure on."""
    learn = stories(data, "train_v1", "train_v2_gpt4")
    seen = set(learn)
    held = [text for text in stories(data, "valid_v1_a") if text not in seen]
    folder = out / f"tokens-{name}"
    if name in PUBLISHED:
        model = tinylm.load(data / "ckpt" / PUBLISHED[name])
    elif (out / "own").exists():
        model = tinylm.load(out / "own")
    else:
        tokenizer = tinylm.Tokenizer.train(learn, vocab=2048)
        shape = ModelConfig(vocab=tokenizer.vocab, context=256, width=128, layers=4, heads=4)
        model = Transformer(shape, tokenizer=tokenizer)
        tokens = tinylm.write_tokens(learn, tokenizer, folder)
        rule = TrainConfig(budget=budget, batch=8, length=128, learning_rate=0.01, log_every=100)
        trainer = tinylm.train(model, tokens, rule)
        for step in trainer:
            print(step, flush=True)
        if trainer.outcome != "done":
            raise KeyboardInterrupt
        tinylm.save(model, out / "own")
    if not folder.exists():
        tinylm.write_tokens(learn, model.tokenizer, folder)
    if "valid" not in {file.name.split("-")[0].split(".")[0] for file in folder.iterdir()}:
        tinylm.write_tokens(held, model.tokenizer, folder, split="valid")
    return model, Tokens.open(folder), Tokens.open(folder, "valid")


def search(
    model: Transformer, learn: Tokens, held: Tokens, steps: int, sizes: tuple[float, ...], seed: int
) -> list[dict]:
    """Masks of a few sizes, and how each predicts beside the full model, random masks, and what they leave."""
    bigrams = probe.Bigrams.count(learn, model.config.vocab)
    rows = []
    for found in probe.find(model, learn, bigrams, sizes=sizes, steps=steps, seed=seed, **STEPS):
        figures = probe.measure(model, found, bigrams, held, windows=200, length=STEPS["length"], seed=seed)
        print(figures, flush=True)
        rows.append(
            {"size": found.settings["size"], "share": found.share, "first MLP": figures.first_mlp,
             "bits": {name: row.bits for name, row in figures.rows.items()},
             "r": {name: [row.r, *row.r_ci95] for name, row in figures.rows.items()}}
        )  # fmt: skip
    return rows


def main() -> None:
    """What is missing is computed, everything is printed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", default="own,stories260K")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--sizes", default="5")
    parser.add_argument("--budget", type=float, default=1800.0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "figures.json"
    figures = json.loads(file.read_text()) if file.exists() else {}
    sizes = tuple(float(size) for size in args.sizes.split(","))
    for name in args.models.split(","):
        given = prepared(name, args.out, args.data, args.budget)
        for seed in range(args.seeds):
            key = f"{name}, seed {seed}, {args.steps} steps, {args.sizes}"
            if key not in figures:
                begun = time.perf_counter()
                figures[key] = search(*given, args.steps, sizes, seed)
                file.write_text(json.dumps(figures, indent=1))
                print(f"{key}: {time.perf_counter() - begun:.0f} s", flush=True)
            for row in figures[key]:
                r = "  ".join(f"{way} {x[0]:.3f}" for way, x in row["r"].items())
                print(f"{key}: size {row['size']}, kept {row['share']:.1%}, first MLP {row['first MLP']:.0%}; r: {r}")


if __name__ == "__main__":
    main()
