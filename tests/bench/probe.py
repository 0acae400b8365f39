"""Times of a patching sweep over every head and position, here and in TransformerLens, and how far results differ.

    python tests/bench/probe.py [PATH ...] [--tokens 16] [--runs 3]

PATH: a checkpoint; without one a random model of the preset "1M". TransformerLens (below version 4) may be absent.
"""

import argparse
import importlib.util
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np

import tinylm
from tinylm import probe

sys.path.insert(0, str(Path(__file__).parents[1]))


def theirs(model, clean, corrupt, right, wrong):
    """The sweep as TransformerLens documents it: one forward pass per layer, head and position."""
    import torch
    from hooked import hooked
    from transformer_lens import patching

    # On a busy machine torch's threads wait for each other: give both programs one core (taskset -c 0) to compare.
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    patching.tqdm = lambda x, **_: x
    there = hooked(model)
    a, b = torch.from_numpy(clean.astype(np.int64)), torch.from_numpy(corrupt.astype(np.int64))
    with torch.no_grad():
        _, cache = there.run_with_cache(a)

    def metric(logits):
        return logits[0, -1, right] - logits[0, -1, wrong]

    def sweep():
        with torch.no_grad():
            return patching.get_act_patch_attn_head_out_by_pos(there, b, cache, metric).permute(0, 2, 1).numpy()

    return sweep


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("paths", nargs="*")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--runs", type=int, default=3)
    given = parser.parse_args()
    models = {Path(path).name: tinylm.load(path) for path in given.paths}
    models = models or {"random 1M": tinylm.Transformer(tinylm.preset("1M", vocab=2048))}
    for name, model in models.items():
        rng = np.random.default_rng(0)
        clean = rng.integers(0, model.config.vocab, (1, given.tokens), dtype=np.int32)
        corrupt = clean.copy()
        corrupt[0, given.tokens // 2] = (corrupt[0, given.tokens // 2] + 7) % model.config.vocab
        metric = probe.logit_difference([3], [5])
        begun = time.perf_counter()
        ours = probe.sweep(model, clean, corrupt, metric, "heads")
        print(f"{name}: {ours.size} patches, {time.perf_counter() - begun:.2f} s with compiling")
        other = importlib.util.find_spec("transformer_lens") and theirs(model, clean, corrupt, 3, 5)
        took: dict[str, list[float]] = {"ours": [], "TransformerLens": []}
        for _ in range(given.runs):
            begun = time.perf_counter()
            ours = probe.sweep(model, clean, corrupt, metric, "heads")
            took["ours"].append(time.perf_counter() - begun)
            if other:
                begun = time.perf_counter()
                found = other()
                took["TransformerLens"].append(time.perf_counter() - begun)
        for who, times in took.items():
            if times:
                print(f"  {who:<16} {statistics.median(times):7.3f} s  ({min(times):.3f} to {max(times):.3f})")
        if other:
            ratios = [b / a for a, b in zip(took["ours"], took["TransformerLens"], strict=True)]
            print(f"  {statistics.median(ratios):.1f} times as fast ({min(ratios):.1f} to {max(ratios):.1f}), "
                  f"largest difference {np.abs(ours - found).max():.1e}")  # fmt: skip


if __name__ == "__main__":
    main()
