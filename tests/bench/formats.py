"""One published model in every format, opened by the program each format is for: same text, same perplexity?

    python tests/bench/formats.py [--data FOLDER] [--bytes 100000] [--tokens 128]

Takes stories15M from TINYLM_DATA (default ../shared/data). A program that is not installed is left out. Perplexity is
of the same documents cut at the same tokens, every token but the first of each, at most `context` of them.
"""

import argparse
import gzip
import math
import os
import tempfile
from pathlib import Path

import jax
import numpy as np
from scipy.special import logsumexp

from tinylm.checkpoint import load, save
from tinylm.config import Sampling
from tinylm.generation import generate_tokens
from tinylm.model import Transformer
from tinylm.weights import assign, bind, named, pure

HOME = Path(__file__).parents[2]


def texts(model, data: Path, size: int) -> list[np.ndarray]:
    """Documents as ids, each behind the begin token and no longer than the context."""
    raw = gzip.decompress((data / "tinystories" / "train_v2_gpt4.txt.gz").read_bytes()).decode()
    docs, held = [], 0
    for text in raw.split("<|endoftext|>"):
        if text.strip() and held < size:
            ids = np.concatenate([[model.tokenizer.begin], model.tokenizer.encode(text.strip())]).astype(np.int32)
            docs.append(ids[: model.config.context])
            held += len(text)
    return docs


def nats(logits: np.ndarray, ids: np.ndarray) -> float:
    """Summed loss of ids[1:]."""
    x = np.asarray(logits, np.float64)[: len(ids) - 1]
    return float((logsumexp(x, axis=-1) - x[np.arange(len(x)), ids[1:]]).sum())


def ours(model: Transformer):
    """Logits of one text, and the greedy continuation of the begin token."""
    graph, params = pure(model)
    forward = jax.jit(lambda params, ids: bind(graph, params)(ids))
    width = model.config.context

    def logits(ids):
        padded = np.zeros((1, width), np.int32)
        padded[0, : len(ids)] = ids
        return np.asarray(forward(params, padded))[0, : len(ids)]

    def greedy(count):
        made = generate_tokens(model, [[model.tokenizer.begin]], tokens=count, sampling=Sampling(temperature=0.0))
        return np.concatenate([part[0] for part in made]).tolist()

    return logits, greedy


def stepwise(logits, begin):
    """Greedy text from a function of the whole text so far."""

    def greedy(count):
        ids = [begin]
        for _ in range(count):
            ids.append(int(np.argmax(logits(np.array(ids))[-1])))
        return ids[1:]

    return greedy


def transformers(model, folder: Path, **options):
    import torch
    from transformers import AutoModelForCausalLM

    save(model, folder / "hf", format="hf", **options)
    theirs = AutoModelForCausalLM.from_pretrained(folder / "hf").eval()

    @torch.no_grad()
    def logits(ids):
        return theirs(torch.tensor(np.asarray(ids)[None], dtype=torch.long)).logits[0].float().numpy()

    return logits, stepwise(logits, model.tokenizer.begin), folder / "hf" / "model.safetensors"


def llama_cpp(model, folder: Path, **options):
    import llama_cpp as program

    path = save(model, folder / f"{options['dtype']}.gguf", **options)
    theirs = program.Llama(str(path), n_ctx=model.config.context, logits_all=True, verbose=False, n_threads=1)

    def logits(ids):
        theirs.reset()
        theirs.eval(list(map(int, ids)))
        return theirs.scores[: len(ids)].copy()

    return logits, stepwise(logits, model.tokenizer.begin), path


def onnxruntime(model, folder: Path, plain: bool = False, **options):
    import onnxruntime as program

    path, c, settings = (
        save(model, folder / f"{options['dtype']}.onnx", **options),
        model.config,
        program.SessionOptions(),
    )
    if plain:  # nodes as they stand in the file
        settings.graph_optimization_level = program.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = program.InferenceSession(str(path), settings)
    empty = np.zeros((1, c.kv_heads, 0, c.head_width), np.float32)
    past = {f"past_key_values.{i}.{x}": empty for i in range(c.layers) for x in ("key", "value")}

    def logits(ids):
        row = np.asarray(ids, np.int64)[None]
        return session.run(["logits"], {"input_ids": row, "attention_mask": np.ones_like(row), **past})[0][0]

    return logits, stepwise(logits, model.tokenizer.begin), path


def stored(model: Transformer, dtype: str) -> Transformer:
    """The model with its matrices rounded as an ONNX file of that dtype holds them; we have no reader for the file."""
    from tinylm.formats.onnx_graph import BLOCK, blockwise

    params = {name: np.asarray(value) for name, value in named(model).items()}
    for name, x in params.items():
        if name.endswith(("kernel", "table")) and dtype == "float16":
            params[name] = x.astype(np.float16).astype(np.float32)
        elif name.endswith(("kernel", "table")) and dtype == "int8":
            axis = 1 if name.endswith("table") else 0
            codes, scales = blockwise(x, axis)
            each = np.repeat(scales, BLOCK, axis)
            params[name] = codes * (each[: len(codes)] if axis == 0 else each[:, : codes.shape[1]])
    made = Transformer(model.config, tokenizer=model.tokenizer)
    assign(made, params)
    return made


CASES = [
    ("transformers, float32", transformers, {}),
    ("transformers, bfloat16", transformers, {"dtype": "bfloat16"}),
    ("llama.cpp, float32", llama_cpp, {"dtype": "float32"}),
    ("llama.cpp, float16", llama_cpp, {"dtype": "float16"}),
    ("llama.cpp, q8_0", llama_cpp, {"dtype": "q8_0"}),
    ("onnxruntime, float32", onnxruntime, {"dtype": "float32"}),
    ("onnxruntime, float16", onnxruntime, {"dtype": "float16"}),
    ("onnxruntime, int8", onnxruntime, {"dtype": "int8"}),
    ("onnxruntime, int8, not optimised", onnxruntime, {"dtype": "int8", "plain": True}),
]


def main() -> None:
    """Print one row per program and precision."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=os.environ.get("TINYLM_DATA", HOME.parent / "shared" / "data"))
    parser.add_argument("--bytes", type=int, default=100_000)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--only", default="", help="programs whose name begins so")
    args = parser.parse_args()
    checkpoint = Path(args.data) / "ckpt" / "stories15M" / "stories15M.bin.gz"
    model = load(checkpoint)
    docs = texts(model, Path(args.data), args.bytes)
    count = sum(len(ids) - 1 for ids in docs)
    logits, _ = ours(model)
    reference = sum(nats(logits(ids), ids) for ids in docs) / count
    print(f"{len(docs)} documents, {count:,} tokens; ours, float32: perplexity {math.exp(reference):.5f}")
    print("| program | MB | perplexity | against ours, same weights | largest logit difference | greedy tokens alike |")
    print("|---|---|---|---|---|---|")
    for name, peer, options in (case for case in CASES if case[0].startswith(args.only)):
        with tempfile.TemporaryDirectory() as folder:
            try:
                theirs, their_greedy, path = peer(model, Path(folder), **options)
            except ImportError:
                continue
            # The weights as the file holds them: the same precision.
            if path.suffix == ".onnx":
                same = stored(model, options["dtype"])
            else:
                same = load(path.parent if path.suffix == ".safetensors" else path)
            mine, my_greedy = ours(same)
            expected = sum(nats(mine(ids), ids) for ids in docs) / count
            found = sum(nats(theirs(ids), ids) for ids in docs) / count
            off = max(float(np.abs(mine(ids) - theirs(ids)).max()) for ids in docs[:8])
            a, b = my_greedy(args.tokens), their_greedy(args.tokens)
            alike = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), args.tokens)
            change = 100 * (math.exp(found - expected) - 1)
            row = f"| {name} | {path.stat().st_size / 1e6:.1f} | {math.exp(found):.5f} | {change:+.5f} %"
            print(f"{row} | {off:.2g} | {alike} of {args.tokens} |", flush=True)


if __name__ == "__main__":
    main()
