"""What int8 changes: greedy text, distance of the predictions, and bits per byte, against float32 in the same engine.

    python tests/bench/engine_parity.py --data DATA [--models stories260K,stories15M] [--stories 60] [--bits int8,int4]

The models are llama2.c's checkpoints in DATA (see the README on TINYLM_DATA), the text is TinyStories, which they
were trained on: what is compared is arithmetic. KL is from float32's prediction to the other's, nats per token, mean
over all positions; perplexity is per token, its change with an interval over stories (bootstrap). Ternary needs no
such table: what was trained ternary is written exactly (`tests/test_engine_export.py`).
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import tempfile
from pathlib import Path

import numpy as np

import tinylm

MODELS = {"stories260K": "stories260K/stories260K.bin", "stories15M": "stories15M/stories15M.bin.gz"}
PROMPTS = ("", "Once upon a time", "Lily and Tom", "One day, a big dog")


def log_softmax(x: np.ndarray) -> np.ndarray:
    """In float64."""
    x = x.astype(np.float64) - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def compared(exact: tinylm.Engine, other: tinylm.Engine, stories: list[list[int]]) -> tuple[float, np.ndarray]:
    """Mean KL, and (stories, 3): tokens, and the nats of both."""
    distances, rows = [], []
    for ids in stories:
        p, q = (log_softmax(np.asarray(engine.logits(ids)))[:-1] for engine in (exact, other))
        distances.append((np.exp(p) * (p - q)).sum(-1))
        at = np.arange(len(p)), np.asarray(ids[1:])
        rows.append([len(p), -p[at].sum(), -q[at].sum()])
    return float(np.concatenate(distances).mean()), np.array(rows)


def change(rows: np.ndarray) -> float:
    """Of the perplexity, in percent."""
    tokens, exact, other = rows.sum(0)
    return 100 * np.expm1((other - exact) / tokens)


def main() -> None:
    """Print one row per model and number of bits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", default="stories260K,stories15M")
    parser.add_argument("--bits", default="int8,int4")
    parser.add_argument("--stories", type=int, default=60)
    args = parser.parse_args()
    with gzip.open(args.data / "tinystories/train_v1.txt.gz", "rt", encoding="utf-8") as file:
        texts = [text.strip() for text in file.read().split("<|endoftext|>") if text.strip()]
    print("| model | bits | bytes | greedy text parts after, of 256 tokens (four prompts) | KL | perplexity, percent |")
    print("|---|---|---|---|---|---|")
    for name in args.models.split(","):
        model = tinylm.load(args.data / "ckpt" / MODELS[name])
        begin, context = model.tokenizer.begin, model.config.context
        stories = [[begin, *model.tokenizer.encode(text)][:context] for text in texts[: args.stories]]
        with tempfile.TemporaryDirectory() as folder:
            engines = {}
            for bits in ("float32", *args.bits.split(",")):
                path = Path(folder) / f"{bits}.tlm"
                tinylm.export(model, path, bits=bits)
                engines[bits] = path.stat().st_size, tinylm.Engine(path)
            exact = engines.pop("float32")[1]
            for bits, (size, engine) in engines.items():
                parts = []
                for prompt in PROMPTS:
                    one, two = (list(e.ids(prompt, tokens=256, temperature=0.0)) for e in (exact, engine))
                    differ = [i for i, (a, b) in enumerate(itertools.zip_longest(one, two)) if a != b]
                    parts.append(str(differ[0]) if differ else f"never ({len(one)})")
                distance, rows = compared(exact, engine, stories)
                rng = np.random.default_rng(0)
                drawn = [change(rows[rng.integers(0, len(rows), len(rows))]) for _ in range(1000)]
                low, high = np.percentile(drawn, [2.5, 97.5])
                print(
                    f"| {name} | {bits} | {size:,} | {', '.join(parts)} | {distance:.2e} | "
                    f"{change(rows):+.3f} ({low:+.3f} to {high:+.3f}) |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
