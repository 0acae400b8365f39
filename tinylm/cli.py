"""`tinylm ...`: the kit from a terminal.

Figures go to stdout (one json object with --json), progress to stderr; an error is one line and exit status 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NoReturn, get_args

from tinylm.commands import (
    cmd_bench,
    cmd_classify,
    cmd_convert,
    cmd_evaluate,
    cmd_export,
    cmd_generate,
    cmd_report,
    cmd_resume,
    cmd_run,
    cmd_serve,
    cmd_sizes,
    cmd_story,
    cmd_tokens,
    cmd_train,
)
from tinylm.config import Codec, ModelConfig, Sampling, TrainConfig
from tinylm.engine.command import guarded
from tinylm.options import add_options, amount, duration, escaped, matching

OPTIONS = ("dtype", "rounding", "version", "group", "codec")  # of `convert`, passed on to the format
EXPORTING = ("bits", "group", "embed", "head", "cache", "absmean")  # of `export`, passed on
LIMITS = ("tokens", "seconds", "running")  # of `serve`
CALIBRATION = 64  # documents that are enough for the largest input of every matrix


class Parser(argparse.ArgumentParser):
    """Errors in one line, with the way to the help."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\nsee `{self.prog} --help`\n")


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    import tinylm

    layout = lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=100)  # noqa: E731
    parser = Parser(prog="tinylm", description="Train tiny language models, look at them, use them.")
    parser.add_argument("--version", action="version", version=f"tinylm {tinylm.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)

    def command(name: str, run: Callable, example: str) -> argparse.ArgumentParser:
        text = (run.__doc__ or "").strip()
        made = commands.add_parser(
            name, help=text, description=text, epilog=f"example: {example}", formatter_class=layout, allow_abbrev=False
        )
        made.add_argument("--json", action="store_true", help="print figures as one json object")
        made.set_defaults(run=run, parser=made)
        return made

    def separator_option(p: argparse.ArgumentParser) -> None:
        text = r"what stands between the documents of a text file, such as '\n\n' (default <|endoftext|>)"
        p.add_argument("--separator", type=escaped, default="<|endoftext|>", metavar="TEXT", help=text)

    def corpus_options(p: argparse.ArgumentParser) -> None:
        separator_option(p)
        p.add_argument("--valid", metavar="SOURCE", help="held-out text (default: 5%% of the documents, by hash)")
        p.add_argument("--tokenizer", metavar="FILE", help="use this tokenizer.json instead of training one")
        p.add_argument("--kind-of-tokenizer", choices=["bpe", "wordpiece", "unigram", "byte"], help="(default bpe)")
        p.add_argument("--keep-duplicates", action="store_true", help="do not remove equal and nearly equal documents")

    p = command("story", cmd_story, "tinylm story --budget 2m")
    p.add_argument("--budget", type=duration, default=120.0, metavar="TIME", help="time for everything (default 2m)")
    p.add_argument(
        "--text", metavar="SOURCE", help="your own text instead of the embedded world: file, folder or hf:ID"
    )
    separator_option(p)
    p.add_argument(
        "--preset", default=None, metavar="NAME", help="a size such as 300K or 1M, or a name of `tinylm sizes`"
    )
    p.add_argument("--out", metavar="DIR", help="folder for the run (default runs/story, or the next free number)")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="another story, another model (default 0)")

    p = command("tokens", cmd_tokens, "tinylm tokens stories.txt --out data/stories --vocab 4096")
    p.add_argument("files", nargs="+", metavar="SOURCE", help="text file, jsonl, parquet, folder, hf:ID, or world")
    p.add_argument("--out", required=True, metavar="DIR", help="folder for tokenizer and shards")
    p.add_argument("--vocab", type=amount, metavar="N", help="token ids to learn (default 4096)")
    corpus_options(p)

    p = command("train", cmd_train, "tinylm train --text stories.txt --preset 1M --budget 20m --out runs/first")
    p.add_argument("--text", required=True, metavar="SOURCE", help="text, a folder of token shards, hf:ID, or world")
    p.add_argument("--out", required=True, metavar="DIR", help="new folder for the run")
    p.add_argument("--preset", default="1M", metavar="NAME", help="a size, or a name of `tinylm sizes` (default 1M)")
    corpus_options(p)
    add_options(p, TrainConfig, "training (ends after --budget 20m unless --steps, --tokens or --budget says else)")
    add_options(p, ModelConfig, "model: changes to the preset")

    p = command("resume", cmd_resume, "tinylm resume runs/first --steps 20000")
    p.add_argument("folder", metavar="DIR", help="folder of a run")
    add_options(
        p,
        TrainConfig,
        "a later end",
        skip=[f.name for f in dataclasses.fields(TrainConfig) if f.name not in ("steps", "tokens", "budget")],
    )

    p = command("evaluate", cmd_evaluate, "tinylm evaluate runs/first --text valid.txt --json")
    p.add_argument("folder", metavar="DIR", help="folder of a run or of a saved model")
    p.add_argument("--text", metavar="SOURCE", help="text to score: file, folder, hf:ID, or world")
    p.add_argument(
        "--suite", nargs="?", const="all", metavar="TASKS",
        help="instead: minimal pairs, cloze and the other tasks, all or those named, with commas between",
    )  # fmt: skip
    p.add_argument(
        "--pairs", metavar="SOURCE", help="of the suite: minimal pairs in BLiMP's format (default: the world's)"
    )
    p.add_argument("--cloze", metavar="SOURCE", help="of the suite: passages in LAMBADA's format")
    p.add_argument("--train", metavar="SOURCE", help="of the suite: the training text, to look for what was memorised")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="of the suite's choices (default 0)")
    separator_option(p)
    p.add_argument("--limit", type=amount, metavar="N", help="only the first N documents, or items of a task")
    p.add_argument("--stride", type=amount, metavar="N", help="tokens between windows (default half the context)")

    p = command("report", cmd_report, "tinylm report runs/story")
    p.add_argument("folder", metavar="DIR", help="folder of a run")
    p.add_argument("--out", metavar="FILE", help="the page (default report.html in the run's folder)")
    p.add_argument("--text", metavar="SOURCE", help="what to score (default the run's own held-out text)")
    separator_option(p)
    p.add_argument("--prompt", action="append", metavar="TEXT", help="how a sample begins; may be given again")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="of samples and intervals (default 0)")

    p = command("classify", cmd_classify, "tinylm classify runs/bert --data train.jsonl --test test.jsonl --members 4")
    p.add_argument("folder", metavar="DIR", help="folder of a pretrained model, or of a committee")
    p.add_argument("--data", required=True, metavar="SOURCE", help="jsonl, csv, tsv, FewRel's json, hf:ID, or world")
    p.add_argument("--test", metavar="SOURCE", help="texts to score (default: a fifth of the data, held out)")
    p.add_argument("--out", metavar="DIR", help="new folder for the classifiers, as a committee")
    p.add_argument("--members", type=amount, default=1, metavar="N", help="fine-tune so many (default 1)")
    p.add_argument("--epochs", type=amount, default=10, metavar="N", help="passes at most (default 10)")
    p.add_argument("--batch", type=amount, default=32, metavar="N", help="texts per step (default 32)")
    p.add_argument("--learning-rate", type=float, default=1e-3, metavar="X", help="its peak (default 0.001)")
    p.add_argument("--pooling", choices=["cls", "mean", "attention", "last"], metavar="X",
                   help="read scores off: cls, mean, attention, last (default cls; last of a decoder)")  # fmt: skip
    p.add_argument("--balance", action="store_true", help="rare classes count as much as frequent ones")
    p.add_argument("--markers", action="store_true", help="FewRel: mark both entities")
    p.add_argument("--limit", type=amount, metavar="N", help="only so many texts")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="of split, order and new weights (default 0)")

    p = command("generate", cmd_generate, 'tinylm generate runs/first --prompt "Once upon a time"')
    p.add_argument("folder", metavar="DIR", help="folder of a run or of a saved model")
    p.add_argument("--prompt", default="", metavar="TEXT", help="how the text begins")
    p.add_argument("--tokens", type=amount, default=256, metavar="N", help="make at most so many (default 256)")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="of the random choices (default 0)")
    p.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; may be given again")
    add_options(p, Sampling, "sampling")

    p = command("convert", cmd_convert, "tinylm convert runs/story story.gguf --dtype q8_0")
    p.add_argument("source", metavar="SRC", help="a run, a saved model, a .bin, a .gguf, a transformers folder, hf:ID")
    p.add_argument("target", metavar="DST", help="file ending in .bin, .gguf or .onnx, a new folder, or hf:NAME/REPO")
    p.add_argument("--to", choices=["hf", "tinylm"], help="what to write into a folder (default tinylm; hub: hf)")
    p.add_argument("--tokenizer", metavar="FILE", help="of a llama2.c file that has none beside it")
    option = functools.partial(p.add_argument, default=argparse.SUPPRESS)
    option("--dtype", metavar="X", help="of the weights: float32, float16; q8_0, tq1_0, tq2_0 (gguf); int8 (onnx)")
    option("--rounding", action="store_true", help="round weights to ternary ones (gguf's tq1_0, tq2_0)")
    option("--version", type=int, metavar="N", help="of llama2.c's format: 0 (float32), 2 (int8)")
    option("--group", type=int, metavar="N", help="weights per scale in version 2 (default 64)")
    option("--codec", choices=get_args(Codec), help="of the kit's own files (default raw)")

    kinds = ["float32", "int8", "int4", "ternary", "ternary2"]
    p = command("export", cmd_export, "tinylm export runs/story story.tlm")
    p.add_argument("folder", metavar="DIR", help="folder of a run or of a saved model; whatever `convert` reads")
    p.add_argument("target", metavar="FILE", help="the file to write; the engine's are called .tlm")
    option = functools.partial(p.add_argument, default=argparse.SUPPRESS)
    option("--bits", choices=kinds, help="of the matrices (default int8)")
    option("--group", type=amount, metavar="N", help="weights per scale, a multiple of 16 (default a whole row)")
    option("--embed", choices=kinds, help="of the embedding (default int8)")
    option("--head", choices=kinds, help="of the head (default as the embedding)")
    text = "other bits for matrices with a matching name, such as '.*down=int8'; may be given again"
    p.add_argument("--only", action="append", type=matching, metavar="NAME=BITS", help=text)
    option("--cache", choices=["auto", "float32", "int8"], help="keys and values of the texts so far (default auto)")
    option("--absmean", action="store_true", help="round to ternary what was not trained to be")
    p.add_argument("--calibration", metavar="SOURCE", help="text that fixes the scales of inputs (default: per token)")
    separator_option(p)

    def engine_options(p: argparse.ArgumentParser) -> None:
        p.add_argument("file", metavar="FILE", help="a .tlm file, from `tinylm export`")
        group = p.add_argument_group("engine")
        option = functools.partial(group.add_argument, default=argparse.SUPPRESS)
        option("--threads", type=amount, metavar="N", help="(default: as many as pay)")
        option("--cache", choices=["auto", "float32", "int8"], help="keys and values (default as the file says)")
        option("--speculate", type=amount, metavar="N", help="tokens guessed per pass; the text stays the same")
        option("--no-screen", dest="screen", action="store_false", help="compute all of the head for each token")
        option("--draft", metavar="FILE", help="a smaller .tlm file that guesses; the text stays the same")
        option("--kernels", metavar="NAME", help="avx512, avxvnni, avx2, neon, scalar (default: the fastest here)")

    p = command("run", cmd_run, 'tinylm run story.tlm "Once upon a time"')
    engine_options(p)
    p.add_argument("text", nargs="?", metavar="PROMPT", help="how the text begins")
    p.add_argument("--prompt", metavar="TEXT", help="the same")
    option = functools.partial(p.add_argument, default=argparse.SUPPRESS)
    option("--tokens", type=amount, metavar="N", help="make at most so many (default 256)")
    option("--seed", type=int, metavar="N", help="of the random choices (default 0)")
    option("--stop", action="append", metavar="TEXT", help="end before this text; may be given again")
    add_options(p, Sampling, "sampling")

    p = command("serve", cmd_serve, "tinylm serve story.tlm --port 8000")
    engine_options(p)
    p.add_argument("--host", default="127.0.0.1", metavar="NAME", help="address to listen on (default 127.0.0.1)")
    p.add_argument("--port", type=int, default=8000, metavar="N", help="0 takes a free one (default 8000)")
    p.add_argument("--name", metavar="NAME", help="of the model (default the file's)")
    option = functools.partial(p.add_argument, default=argparse.SUPPRESS)
    option("--tokens", type=amount, metavar="N", help="the largest max_tokens (default 4096)")
    option("--seconds", type=duration, metavar="TIME", help="the longest request (default 2m)")
    option("--running", type=amount, metavar="N", help="requests that generate at the same time (default 2)")

    p = command("bench", cmd_bench, "tinylm bench train --preset 1M --batch 8; tinylm bench engine story.tlm")
    p.add_argument("what", choices=["train", "engine"], metavar="train|engine", help="what is to be measured")
    p.add_argument("file", nargs="?", metavar="FILE", help="of the engine: a .tlm file")
    p.add_argument("--seconds", type=duration, default=5.0, metavar="TIME", help="for each figure (default 5s)")
    p.add_argument("--threads", type=amount, action="append", metavar="N", help="of the engine; may be given again")
    p.add_argument("--preset", default="1M", metavar="NAME", help="a size, or a name of `tinylm sizes` (default 1M)")
    add_options(p, TrainConfig, "training", skip=["steps", "tokens", "budget"])
    add_options(p, ModelConfig, "model: changes to the preset")

    p = command("sizes", cmd_sizes, "tinylm sizes --preset 1M --vocab 2048")
    p.add_argument("--preset", action="append", metavar="NAME", help="only this one, in detail; may be given again")
    add_options(p, ModelConfig, "model: changes to the preset")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the `tinylm` command."""
    parser = build_parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        args.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    guarded(args.run, args)
