"""How fast the world writes and scores, one process: python tests/bench/world.py [--runs 5]"""

import argparse
import statistics
import time

from tinylm.world import World


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    runs, world = parser.parse_args().runs, World()
    written, scored = [], []
    for run in range(runs + 1):  # the first builds the world's tables and is not counted
        begun = time.perf_counter()
        texts = list(world.texts(2000, seed=run))
        written.append(sum(len(t.encode()) for t in texts) / (time.perf_counter() - begun) / 1e6)
        begun = time.perf_counter()
        for text in texts[:100]:
            world.logprob(text)
        scored.append((time.perf_counter() - begun) * 10)
    for name, values in (("MB/s of text", written[1:]), ("ms per exact score", scored[1:])):
        print(f"{statistics.median(values):6.1f} {name}  ({min(values):.1f} to {max(values):.1f})")


if __name__ == "__main__":
    main()
