"""Texts sampled from an exported model, to train a smaller one on (never to validate). Run again: it goes on.

    tinylm export stories15M.bin stories15M.tlm
    python data_scripts/sampled_stories.py stories15M.tlm --megabytes 20 --out texts/sampled.txt
    tinylm train --text texts --valid real_valid.txt --out run       (real texts lie in texts/ too)

Only texts that the model ended within its context are kept, so long ones are missing; at temperature 1 the rest is what
the model believes, at lower ones it repeats itself. sampled.txt.json says what was sampled from which file.
"""

import argparse
import hashlib
import json
import os
import sys
import time
from pathlib import Path

from tinylm.cli import escaped
from tinylm.engine import Engine
from tinylm.reading import END

GROUP = 512


def ended(engine: Engine, text: str, limit: int) -> bool:
    """Whether the model ended it: not cut off by the limit. (A text may take fewer tokens when it is read again.)"""
    return len(engine.encode(text)) < limit - 8 and text.rstrip().endswith((".", "!", "?", '"', "”"))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="FILE", help="a .tlm file, from `tinylm export`")
    parser.add_argument("--out", required=True, metavar="FILE", help="the texts, <|endoftext|> between them")
    parser.add_argument("--megabytes", type=float, default=20.0, help="of text to sample (default 20)")
    parser.add_argument("--temperature", type=float, default=1.0, help="default 1: what the model believes")
    parser.add_argument("--prompt", default="", help="how every text begins (default: as the model likes)")
    parser.add_argument("--seed", type=int, default=0, help="of the first group of texts; each has its own")
    parser.add_argument("--threads", type=int, help="default: as many as pay")
    args = parser.parse_args()
    try:
        sample(args)
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {escaped(str(error))}")


def sample(args: argparse.Namespace) -> None:
    """Append groups of texts until there are enough; after each, a note of how far the file is good."""
    engine = Engine(args.model, **({"threads": args.threads} if args.threads else {}))
    limit, out, note = engine.facts.context - 1, Path(args.out), Path(args.out + ".json")
    source = {
        "model": hashlib.sha256(Path(args.model).read_bytes()).hexdigest(), "temperature": args.temperature,
        "prompt": args.prompt, "seed": args.seed, "tokens": limit,
    }  # fmt: skip
    state = {**source, "groups": 0, "texts": 0, "sampled": 0, "bytes": 0, "seconds": 0.0}
    if note.exists():
        state = json.loads(note.read_text("utf-8"))
        if {name: state.get(name) for name in source} != source:
            raise ValueError(f"{out} was sampled with other settings, see {note}: take another --out")
    elif out.exists():
        raise ValueError(f"{out} exists, and no {note.name} says what it is: take another --out")
    with out.open("ab") as file:
        file.truncate(state["bytes"])
        while state["bytes"] < args.megabytes * 1e6:
            begun = time.perf_counter()
            seed = args.seed + state["groups"]
            texts = engine.generate([args.prompt] * GROUP, tokens=limit, seed=seed, temperature=args.temperature)
            kept = [text.strip() for text in texts if ended(engine, text, limit)]
            file.write("".join(f"{text}\n{END}\n" for text in kept).encode())
            file.flush()
            os.fsync(file.fileno())
            state["groups"] += 1
            state["texts"] += len(kept)
            state["sampled"] += GROUP
            state["bytes"] = file.tell()
            state["seconds"] += time.perf_counter() - begun
            half = note.with_suffix(".part")
            half.write_text(json.dumps(state, indent=1), "utf-8")
            os.replace(half, note)
            if not kept:
                raise ValueError(f"none of {GROUP} texts ended within {limit} tokens: nothing is kept of this model")
            rate = state["bytes"] / 1e6 / state["seconds"]
            print(
                f"\r{state['bytes'] / 1e6:.1f} MB, {state['texts']:,} texts of {state['sampled']:,}, {rate:.3f} MB/s ",
                end="", flush=True,
            )  # fmt: skip
    print(f"\n{out}: {state['texts']:,} texts, {state['bytes']:,} bytes, {state['seconds']:,.0f} s")


if __name__ == "__main__":
    main()
