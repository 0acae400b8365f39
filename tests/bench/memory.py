"""What a bank 20 times larger than its anchor costs: a step with and without it, and peak memory.

    python tests/bench/memory.py [--steps 30] [--batch 16] [--length 256] [--width 128] [--layers 4] [--folder DIR]

Each way of training runs in a process of its own: the anchor alone; the bank resident (every block and its moments on
the device); streamed (20 slots per level, the bank in files). Figures: milliseconds of wall clock and of CPU time per
step, medians without the first quarter, where programs are compiled; the most memory that the process held, above what
it held before the model. On a machine that others use, CPU time is the figure to trust.
"""

import argparse
import itertools
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WAYS = ("anchor", "resident", "streamed")
CHILDREN, ROWS, SLOTS = 8, (8, 16, 24), 20


def batches_of(settings):
    """Batches of random tokens, one leaf per row, Zipf-distributed as topics are."""
    import numpy as np

    from tinylm.data import Batch

    share = 1 / np.arange(1, CHILDREN**3 + 1)
    share /= share.sum()

    def batches(step: int) -> Batch:
        rng = np.random.default_rng(step)
        tokens = rng.integers(0, 1024, (settings["batch"], settings["length"] + 1)).astype(np.int32)
        leaf = rng.choice(CHILDREN**3, settings["batch"], p=share)
        nodes = np.stack([leaf // CHILDREN**2, leaf // CHILDREN, leaf], axis=1).astype(np.int32)
        return Batch(tokens[:, :-1], tokens[:, 1:], fetched=nodes)

    return batches


def measured(way: str, settings: dict) -> dict:
    """One way of training, in this process."""
    from tinylm import ModelConfig, TrainConfig, Transformer, named
    from tinylm.memory import Bank, add_memory, train_with_bank
    from tinylm.training import train

    shape = {"width": settings["width"], "layers": settings["layers"], "heads": 4}
    model = Transformer(ModelConfig(vocab=1024, context=settings["length"], **shape))
    found = {"way": way, "anchor": sum(x.size for x in named(model).values())}
    config = TrainConfig(steps=settings["steps"], batch=settings["batch"], log_every=10**6, save_every=0.0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if way != "anchor":
        add_memory(model, children=CHILDREN, rows=ROWS, slots=SLOTS if way == "streamed" else 0)
    if way == "streamed":
        bank = Bank.create(Path(settings["folder"]) / "bank", model)
        found["bank"] = bank.parameters
        trainer = train_with_bank(model, batches_of(settings), config, bank)
    else:
        trainer = train(model, batches_of(settings), config)
    clocks = [(time.perf_counter(), time.process_time())]
    for _ in trainer.every_step():
        clocks.append((time.perf_counter(), time.process_time()))
    late = clocks[len(clocks) // 4 :]
    spent = [[1000 * (b[i] - a[i]) for a, b in itertools.pairwise(late)] for i in (0, 1)]
    found |= {"wall_ms": statistics.median(spent[0]), "cpu_ms": statistics.mean(spent[1])}
    return found | {"peak_mb": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("steps", 30), ("batch", 16), ("length", 256), ("width", 128), ("layers", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--folder", help="where the bank lies; default: a temporary folder")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = vars(parser.parse_args())
    if args["way"]:
        print(json.dumps(measured(args["way"], args)))
        return
    rows = []
    with tempfile.TemporaryDirectory(prefix="bank-") as folder:
        for way in WAYS:
            given = [f"--{k}={v}" for k, v in args.items() if v is not None and k != "folder"]
            command = [sys.executable, __file__, f"--way={way}", f"--folder={args['folder'] or folder}", *given]
            rows.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    first = rows[0]
    print(
        f"anchor {first['anchor']:,} parameters, bank {rows[2]['bank']:,} ({rows[2]['bank'] / first['anchor']:.1f} x)"
    )
    print(f"{'':10}{'wall ms':>10}{'CPU ms':>10}{'ratio':>8}{'peak MB':>10}")
    for row in rows:
        ratio = row["cpu_ms"] / first["cpu_ms"]
        print(f"{row['way']:10}{row['wall_ms']:>10.0f}{row['cpu_ms']:>10.0f}{ratio:>8.2f}{row['peak_mb']:>10.0f}")


if __name__ == "__main__":
    main()
