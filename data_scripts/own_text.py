"""Your own text -> token shards: duplicates out, a split of its own, a tokenizer, provenance. Run again: up to date.

    python data_scripts/own_text.py stories.txt more.jsonl folder/ --out data/mine --vocab 4096
    python data_scripts/own_text.py train.txt --valid valid.txt --out data/mine --tokenizer data/other/tokenizer.json

A text file is split into documents at <|endoftext|> or at --separator, a folder is read whole, hf:ID comes from the
Hugging Face hub.
"""

import argparse
import hashlib
import sys
from pathlib import Path

from tinylm.cli import escaped
from tinylm.corpus import Corpus, prepare
from tinylm.reading import END

ERRORS = (ValueError, OSError)  # TextError, TokenizerError, DataError and ConfigError are ValueErrors


def options(description: str) -> argparse.ArgumentParser:
    """What the scripts of this folder have in common."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the shards")
    parser.add_argument("--valid", metavar="FILE", help="held-out documents (default: a share, picked by hash)")
    parser.add_argument("--share", type=float, default=0.05, help="held-out share without --valid (default 0.05)")
    parser.add_argument("--vocab", type=int, help="size of the vocabulary (default 4096)")
    parser.add_argument("--kind", choices=("bpe", "wordpiece", "unigram", "byte"), help="of tokenizer (default bpe)")
    parser.add_argument("--tokenizer", metavar="FILE", help="use this tokenizer.json instead of learning one")
    parser.add_argument("--keep-duplicates", action="store_true", help="remove nothing")
    return parser


def reading_options(parser: argparse.ArgumentParser) -> None:
    """How much is read, and what is one document."""
    text = r"what stands between the documents of a text file, such as '\n\n' (default <|endoftext|>)"
    parser.add_argument("--separator", type=escaped, default=END, metavar="TEXT", help=text)
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N documents")


def make(sources: list[str], args: argparse.Namespace, **more: int | str | None) -> Corpus:
    """Prepare the corpus, check every artifact and print its sha256."""
    settings = {"vocab": args.vocab, "kind": args.kind, "tokenizer": args.tokenizer, "share": args.share, **more}
    corpus = prepare(sources, args.out, valid=args.valid, clean=not args.keep_duplicates, say=print, **settings)
    for tokens in filter(None, (corpus.train, corpus.valid)):
        tokens.verify()
    print(corpus)
    for file in sorted(p for p in corpus.folder.iterdir() if p.suffix in (".bin", ".json") and p.is_file()):
        with file.open("rb") as stream:
            print(f"{hashlib.file_digest(stream, 'sha256').hexdigest()}  {file}")
    return corpus


def finish(work: object, *args: object, **named: object) -> None:
    """Run `work`; what can go wrong with data is one line, not a traceback."""
    try:
        work(*args, **named)  # type: ignore[operator]
    except ERRORS as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")


def main() -> None:
    """The command line."""
    parser = options(__doc__)
    parser.add_argument("source", nargs="+", help=".txt, .jsonl, .parquet, .gz of those, a folder, or hf:ID")
    reading_options(parser)
    args = parser.parse_args()
    finish(make, args.source, args, separator=args.separator, limit=args.limit)


if __name__ == "__main__":
    main()
