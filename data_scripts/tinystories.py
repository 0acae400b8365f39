"""TinyStories (Eldan and Li 2023) -> token shards, from the hub or from files. Run again: up to date.

    python data_scripts/tinystories.py --out data/tinystories
    python data_scripts/tinystories.py --out data/tinystories --source TinyStories-train.txt

About 15 % of the published training stories are duplicates and about 30 % of the validation stories occur in training,
so duplicates are removed and the held-out stories are split off anew. V1, V2 (GPT-4 only) and cleaned copies are
different data: name the one used. The whole set (2.1 million stories) is held in memory: 6 GB, estimated.
"""

from own_text import finish, make, options, reading_options

HUB = "hf:roneneldan/TinyStories"


def main() -> None:
    """The command line."""
    parser = options(__doc__)
    parser.add_argument("--source", action="append", help=f"file, folder or hf:ID, may be repeated (default {HUB})")
    reading_options(parser)
    args = parser.parse_args()
    finish(make, args.source or [HUB], args, separator=args.separator, limit=args.limit)


if __name__ == "__main__":
    main()
