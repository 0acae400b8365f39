"""N Wikipedia articles, the first 128 tokens of each -> token shards. Run again: up to date.

    python data_scripts/wikipedia.py --out data/wiki --articles 40000
    python data_scripts/wikipedia.py --out data/wiki --articles 5000 --source articles.jsonl --vocab 8000

The setting of the tiny-BERT experiments: 20,000, 40,000 or 90,000 articles of wikimedia/wikipedia (20231101.en), each
cut to its first 128 WordPiece tokens. They shuffle all 6.4 million articles with a seed; here the articles are drawn by
their hash from the first `--pool` of the stream, so that only those are downloaded. 126 tokens of text are kept by
default: `data.Rows(length=128)` puts the start and end token around them.
"""

import argparse
import itertools
import json
import os
from pathlib import Path

from own_text import finish, make, options

from tinylm.text import documents, sample

HUB = "hf:wikimedia/wikipedia@20231101.en"


def draw(args: argparse.Namespace) -> Path:
    """Write the drawn articles to OUT-articles/, unless the same draw lies there already."""
    folder = Path(args.out).with_name(Path(args.out).name + "-articles")
    wish = {"source": args.source, "articles": args.articles, "pool": args.pool, "seed": args.seed}
    note, file = folder / "draw.json", folder / "articles.jsonl"
    if note.is_file() and file.is_file() and json.loads(note.read_text()) == wish:
        return file
    folder.mkdir(parents=True, exist_ok=True)
    pool = itertools.islice(documents(args.source), args.pool or 5 * args.articles)
    partial = folder / f".articles.{os.getpid()}"
    with partial.open("w", encoding="utf-8") as out:
        for text in sample(pool, args.articles, seed=args.seed):
            out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    note.unlink(missing_ok=True)
    partial.replace(file)
    note.write_text(json.dumps(wish))
    return file


def main() -> None:
    """The command line."""
    parser = options(__doc__)
    parser.set_defaults(kind="wordpiece", vocab=30_522)
    parser.add_argument("--source", default=HUB, help=f"file, folder or hf:ID (default {HUB})")
    parser.add_argument("--articles", type=int, default=20_000, metavar="N", help="(default 20000)")
    parser.add_argument("--pool", type=int, metavar="N", help="draw from the first N articles (default 5 per article)")
    parser.add_argument("--first", type=int, default=126, metavar="N", help="tokens kept of each (default 126)")
    parser.add_argument("--seed", type=int, default=42, help="of the draw (default 42)")
    args = parser.parse_args()

    def work() -> None:
        make([str(draw(args))], args, first=args.first)

    finish(work)


if __name__ == "__main__":
    main()
