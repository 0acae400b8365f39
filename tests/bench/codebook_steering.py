"""Steering a published model by codes, as the paper does: codes put into attention, fine-tuned, words and their rate.

    python tests/bench/codebook_steering.py OUT --data DATA [--model stories15M] [--steps 1000] [--seed 0]

After Tamkin, Taufeeque and Goodman (2023, arXiv 2310.17230), section 4.3: in TinyStories' 21M model, 40 texts of 200
tokens from four prompts; a text counts when it has the word. Steered, 2.5 percent became 65 for "dragon", 0 became 90
for "flower". There codes were picked by hand; here by a rule, and random codes of the same groups stand beside them.
"""

from __future__ import annotations

import argparse
import gzip
import json
import time
from pathlib import Path

import jax

import tinylm
from tinylm import TrainConfig, codebooks
from tinylm.codebooks import steering
from tinylm.techniques.codebook import discretize

PROMPTS = ("Once upon a time", "One day,", "There was a", "Tom and Lily")
RULES = (("fire", 1), ("fire", 3), ("write", 1), ("write", 3))  # and how many codes per head
WORDS = ("dragon", "slide", "friend", "flower", "fire", "princess", "baby")


def texts_of(data: Path, name: str) -> list[str]:
    """The stories of a file."""
    with gzip.open(data / "tinystories" / name, "rt", encoding="utf-8") as file:
        return [t.strip() for t in file.read().split("<|endoftext|>") if t.strip()]


def published(data: Path, name: str, out: Path) -> tinylm.Transformer:
    """A checkpoint of llama2.c's, unpacked first where it is packed."""
    folder = data / "ckpt" / name
    for packed in folder.glob("*.gz"):
        if not (out / packed.stem).exists():
            (out / packed.stem).write_bytes(gzip.decompress(packed.read_bytes()))
        folder = out
    tokenizer = folder / ("tok512.bin" if name == "stories260K" else "tokenizer.bin")
    return tinylm.load(folder / f"{name}.bin", tokenizer=tokenizer)


def with_codes(given: argparse.Namespace, tokens: tinylm.Tokens, kept: Path) -> tinylm.Transformer:
    """The model with codes in every head, fine-tuned; kept for the next time."""
    if (kept / "config.json").exists():
        return tinylm.load(kept)
    model = published(given.data, given.model, given.out)
    if given.codes:
        length = min(256, model.config.context)
        batches = tinylm.Windows(tokens, batch=4, length=length, seed=77 + given.seed)
        discretize(model, "attn", codes=given.codes, k=given.k, rngs=given.seed)
        codebooks.start(model, [batches(i) for i in range(32)], "data", seed=given.seed)
    rule = TrainConfig(steps=given.steps, batch=given.batch, length=min(256, model.config.context), seed=given.seed,
                       learning_rate=given.rate, optimizer="adamw", weight_decay=0.0, warmup=50)  # fmt: skip
    begun, trainer = time.perf_counter(), tinylm.train(model, tokens, rule)
    for step in trainer:
        if given.codes and step.step % 250 == 0 and step.step <= given.steps // 2:
            codebooks.wake(trainer, [batches(10**5 + step.step + i) for i in range(16)])
        if step.step % 100 == 0:
            print(step, flush=True)
    print(f"fine-tuned in {time.perf_counter() - begun:.0f} s", flush=True)
    tinylm.save(model, kept)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="stories15M")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--codes", type=int, default=1024)
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--index", type=int, default=400, metavar="STORIES")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    judge = published(given.data, given.model, given.out)
    learn = texts_of(given.data, "synthetic_stories15M.txt.gz") + texts_of(given.data, "train_v1.txt.gz")
    folder = given.out / f"{given.model}-tokens"
    tokens = tinylm.write_tokens(learn[: -given.index - 60], judge.tokenizer, folder)
    held = learn[-60:]
    kept = given.out / f"{given.model}-{given.codes}-{given.k}-{given.steps}-{given.seed}"
    model = with_codes(given, tokens, kept)
    for name, one in (("published", judge), ("with codes", model)):
        print(name, tinylm.evaluate(one, held), flush=True)
    begun = time.perf_counter()
    some = tinylm.write_tokens(learn[-given.index - 60 : -60], judge.tokenizer, folder, split="read")
    index = codebooks.build(model, some, given.out / f"{kept.name}-index")
    print(f"index of {len(index):,} positions: {time.perf_counter() - begun:.0f} s", flush=True)
    coming = codebooks.token_labels(index, judge.tokenizer, back=-1)
    results = {}
    for how, per in RULES:
        rows = []
        for word in WORDS:
            token = judge.tokenizer.encode(f"a {word}")[1]  # " drag" of " dragon"
            try:
                if how == "write":
                    codes = codebooks.codes_toward(model, token, per=per, index=index, least=5)
                else:
                    codes = codebooks.codes_for(index, coming, coming.names[token], per=per, least=5)
            except codebooks.CodebookError as error:
                print(f"{word} left out: {error}")
                continue
            rows += codebooks.trial(
                model, {word: codes}, PROMPTS, codebooks.containing(word), judge,
                index=index, repeats=10, tokens=given.tokens, seed=given.seed,
            )  # fmt: skip
        if not rows:
            continue
        print(how, per, steering.table(rows), sep="\n", flush=True)
        results[f"{how} {per}"] = [row._asdict() | {"texts": row.texts[:2]} for row in rows]
        kept.with_suffix(".json").write_text(json.dumps(results, indent=1, default=str))
        jax.clear_caches()


if __name__ == "__main__":
    main()
