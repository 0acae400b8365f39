"""Tokens per second, greedy: tinylm.generate and its ONNX files in onnxruntime: python tests/bench/onnx_decode.py

The shape is stories15M's with random weights, 240 tokens after a prompt of 8; the best of several runs.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime

from tinylm.config import Sampling
from tinylm.formats.onnx_graph import write
from tinylm.generation import generate_tokens
from tinylm.model import Transformer
from tinylm.presets import preset

PROMPT, TOKENS = [1, 2, 3, 4, 5, 6, 7, 8], 240


def decode(session: onnxruntime.InferenceSession) -> None:
    """Greedy tokens with the cache, as in the docstring of `onnx_graph`."""
    caches = [x for x in session.get_inputs() if x.name.startswith("past")]
    past = {x.name: np.zeros((1, x.shape[1], 0, x.shape[3]), np.float32) for x in caches}
    new, mask = PROMPT, np.ones((1, len(PROMPT) + TOKENS), np.int64)
    for held in range(len(PROMPT), len(PROMPT) + TOKENS):
        logits, *present = session.run(None, {"input_ids": [new], "attention_mask": mask[:, :held], **past})
        past, new = dict(zip(past, present, strict=True)), [int(logits[0, -1].argmax())]


def best(runs: int, call) -> float:
    """Tokens per second of the fastest of `runs` calls, after one that warms up."""
    seconds = []
    for _ in range(runs + 1):
        begun = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begun)
    return TOKENS / min(seconds[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="stories15M")
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    model = Transformer(preset(args.preset))
    greedy = Sampling(temperature=0.0)
    rate = best(args.runs, lambda: list(generate_tokens(model, [PROMPT], tokens=TOKENS, sampling=greedy)))
    print(f"tinylm            all threads  {rate:6.0f} tokens/s")
    with tempfile.TemporaryDirectory() as folder:
        for dtype in ("float32", "float16", "int8"):
            begun = time.perf_counter()
            path = write(model, Path(folder) / "m.onnx", dtype=dtype)
            print(
                f"onnx {dtype:<8} {path.stat().st_size / 1e6:6.1f} MB, written in {time.perf_counter() - begun:.2f} s"
            )
            for threads in (1, 2):
                options = onnxruntime.SessionOptions()
                options.intra_op_num_threads = threads
                session = onnxruntime.InferenceSession(str(path), options)
                rate = best(args.runs, lambda session=session: decode(session))
                print(f"                  {threads} threads    {rate:6.0f} tokens/s")


if __name__ == "__main__":
    main()
