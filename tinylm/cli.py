"""`tinylm ...`: the kit from a terminal.

Figures go to stdout (one json object with --json), progress to stderr; an error is one line and exit status 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

from tinylm.config import Codec, ConfigError, ModelConfig, Sampling, TrainConfig
from tinylm.options import add_options, amount, chosen, duration, escaped

OPTIONS = ("dtype", "rounding", "version", "group", "codec")  # of `convert`, passed on to the format

# --- commands ---------------------------------------------------------------------------------------------------------


def say(text: str = "") -> None:
    """A line for people, on stderr, so that stdout holds results only."""
    print(text, file=sys.stderr, flush=True)


def report(args: argparse.Namespace, figures: dict[str, Any], text: str) -> None:
    """The result on stdout: as text, or with --json as one json object."""
    print(json.dumps(figures, indent=2) if args.json else text, flush=True)


def cmd_sizes(args: argparse.Namespace) -> None:
    """Parameters, cost and file sizes of the presets, or of one."""
    from tinylm.presets import PRESETS, preset, size

    names = args.preset or ["1M", "3M", "10M", "30M", "100M", *PRESETS]
    changes = chosen(args, ModelConfig)
    sizes = {name: (config := preset(name, **changes), size(config)) for name in names}
    figures = {name: {"config": c.to_dict(), **dataclasses.asdict(s)} for name, (c, s) in sizes.items()}
    rows = [["", "parameters", "no embed.", "FLOPs/token", "KV B/token", "float32", "int8", "ternary"]]
    for name, (_, s) in sizes.items():
        cells = (f"{s.total:,}", f"{s.body:,}", si(s.flops), si(s.kv_bytes), mb(s.float32), mb(s.int8), mb(s.ternary))
        rows.append([name, *cells])
    text = columns(rows)
    if len(names) == 1:
        (_, one) = sizes[names[0]]
        text += "\n\n" + columns([[g, f"{n:,}", f"{n / one.total:.1%}"] for g, n in one.groups.items() if n])
    report(args, figures, text)


def cmd_tokens(args: argparse.Namespace) -> None:
    """Clean text, learn a tokenizer, write token shards."""
    corpus = prepare_corpus(args, Path(args.out), args.files)
    report(args, corpus.to_dict(), str(corpus))


def cmd_train(args: argparse.Namespace) -> None:
    """Train a model on text, on token shards, or on the embedded world."""
    from tinylm.data import require_fit
    from tinylm.model import Transformer
    from tinylm.presets import preset, vocab_for
    from tinylm.training import train

    out = new_folder(args.out)
    settings = chosen(args, TrainConfig)
    if not {"steps", "tokens", "budget"} & settings.keys():
        settings["budget"] = 20 * 60.0
    config = TrainConfig.from_dict(settings)
    wish = {"vocab": vocab_for(args.preset), **chosen(args, ModelConfig)}
    shape = preset(args.preset, **wish)
    require_fit(config, shape)  # what cannot work is said before hours of reading text
    if not (Path(args.text) / "provenance.json").is_file():
        args.vocab = shape.vocab
    corpus = prepare_corpus(args, out / "data", [args.text])
    shape = preset(args.preset, **{**wish, "vocab": corpus.tokenizer.vocab})
    model = Transformer(shape, rngs=config.seed, tokenizer=corpus.tokenizer)
    trainer = train(model, corpus.train, config, valid=corpus.valid, out=out)
    train_to_the_end(trainer, args)


def cmd_resume(args: argparse.Namespace) -> None:
    """Go on with a run from its newest checkpoint."""
    from tinylm.resuming import resume

    longer = {k: v for k, v in chosen(args, TrainConfig).items() if k in ("steps", "tokens", "budget")}
    train_to_the_end(resume(args.folder, **longer), args)


def train_to_the_end(trainer: Any, args: argparse.Namespace) -> None:
    """Drive a training run with a live line; exit as the signal that stopped it asks for."""
    from tinylm.live import TerminalView, fit
    from tinylm.presets import count

    config, model = trainer.config, trainer.model.config
    end = f"{config.budget:.0f} s" if config.budget else f"{trainer.steps:,} steps"
    say(f"{count(model):,} parameters: {model.layers} layers of width {model.width}, context {model.context}; {end}")
    fit(trainer, view=TerminalView(sys.stderr), sample_every=0).run()
    folder = trainer.run.folder
    last = trainer.history[-1] if trainer.history else None
    figures = {"folder": str(folder), "outcome": trainer.outcome, **(last._asdict() if last else {})}
    text = f"{trainer.outcome} at step {trainer.step:,}"
    if last is not None and last.valid_bits is not None:
        text += f": {last.valid_bits:.4f} bits per byte on held-out windows"
    text += f"; everything is in {folder}"
    if trainer.outcome != "done":
        text += f"\ngo on with: tinylm resume {folder}"
    report(args, figures, text)
    if trainer.signal:
        raise SystemExit(128 + trainer.signal)


def cmd_evaluate(args: argparse.Namespace) -> None:
    """Bits per byte of a model on a text, with an interval over documents."""
    from tinylm.checkpoint import load
    from tinylm.evaluation import evaluate
    from tinylm.story import HELD_OUT, HELD_STREAM
    from tinylm.text import documents
    from tinylm.world import World

    model, floor = load(args.folder), None
    if args.text == "world":
        docs = list(World().texts(args.limit or HELD_OUT, seed=HELD_STREAM))
        floor = World().floor(docs).bits_per_byte
    else:
        docs = documents(args.text, separator=args.separator, limit=args.limit)
    found = evaluate(model, docs, stride=args.stride)
    span = f"95% interval {found.ci95[0]:.4f} to {found.ci95[1]:.4f}" if found.ci95 else str(found.ci95_reason)
    text = f"{found.bits_per_byte:.4f} bits per byte ({span})"
    if floor is not None:
        text += f"\n{found.bits_per_byte - floor:.4f} above the floor of {floor:.4f}"
    size = f"{found.bytes:,} bytes, {found.tokens:,} tokens, {found.documents:,} document{'s' * (found.documents > 1)}"
    figures = {**found.to_dict(), **({} if floor is None else {"floor": floor, "excess": found.bits_per_byte - floor})}
    report(args, figures, f"{text}\n{found.nats_per_token:.4f} nats per token; {size}")


def cmd_generate(args: argparse.Namespace) -> None:
    """Continue a text."""
    from tinylm.checkpoint import load
    from tinylm.generation import generate, stream
    from tinylm.markup import plain

    model = load(args.folder)
    settings = {**chosen(args, Sampling), "tokens": args.tokens, "seed": args.seed, "stop": args.stop or ()}
    if args.json:
        print(json.dumps({"prompt": args.prompt, "text": generate(model, args.prompt, **settings)}, indent=2))
        return
    pieces = stream(model, args.prompt, **settings)
    begun = next(pieces, "")  # what is wrong with the arguments shows here, before anything is printed
    try:
        for piece in itertools.chain([args.prompt, begun], pieces):
            print(plain(piece), end="", flush=True)
    finally:
        print()


def cmd_convert(args: argparse.Namespace) -> None:
    """Turn a model of one program into that of another: here, transformers, llama2.c, llama.cpp, onnxruntime."""
    from tinylm.checkpoint import load, save
    from tinylm.formats import HUB, format_of
    from tinylm.presets import count

    reading = {"tokenizer": args.tokenizer} if args.tokenizer else {}
    asked = {name: getattr(args, name) for name in OPTIONS if hasattr(args, name)}
    if args.target.startswith(HUB):
        from tinylm.sharing import push

        where = push(args.source, args.target.removeprefix(HUB), format=args.to or "hf", **asked)
        report(args, {"target": where}, f"pushed to {where}")
        return
    model = load(args.source, **reading)
    path = save(model, args.target, format=args.to, **asked)
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    size = sum(file.stat().st_size for file in files if file.is_file())
    figures = {"target": str(path), "parameters": count(model.config), "bytes": size}
    text = f"{path}: {count(model.config):,} parameters, {mb(size)}"
    if (args.to or format_of(path)) != "onnx":  # what can be read back is, and compared
        back = load(path)
        off = figures["largest_change"] = largest_change(model, back)
        text += ", its tokens in another order" if back.tokenizer != model.tokenizer else ""
        text += (
            ", read back exactly" if off == 0 else f", weights changed by at most {off:.2g} of each tensor's largest"
        )
    report(args, figures, text)


def largest_change(before: Any, after: Any) -> float:
    """The largest difference of two weights of one name over the largest weight of that tensor.

    Tables of tokens are compared only where both models number the tokens alike (llama2.c has an order of its own).
    """
    import numpy as np

    from tinylm.weights import named

    old, worst = named(before), 0.0
    for name, new in named(after).items():
        if name.startswith(("embed.", "head.")) and before.tokenizer != after.tokenizer:
            continue
        was = np.asarray(old.get(name, 0.0))  # a bias that theirs always has, and ours lacks
        worst = max(worst, float(np.abs(was - np.asarray(new)).max() / max(np.abs(was).max(), 1e-30)))
    return worst


def cmd_story(args: argparse.Namespace) -> None:
    """The main job: from nothing to a model that tells stories, in about two minutes."""
    from tinylm.story import story

    given = {
        "text": args.text,
        "separator": args.separator,
        "preset_name": args.preset,
        "budget": args.budget,
        "out": args.out,
        "seed": args.seed,
    }
    if args.json:
        figures = story(**given, say=say, tell=lambda piece: None)
        print(json.dumps(figures, indent=2))
    else:
        figures = story(**given)
    if figures["outcome"] == "interrupted":
        raise SystemExit(130)


# --- what commands share ----------------------------------------------------------------------------------------------


def prepare_corpus(args: argparse.Namespace, folder: Path, sources: Sequence[str]) -> Any:
    """Token shards for the command: opened when a source is a folder of shards, made otherwise."""
    from tinylm.corpus import prepare

    return prepare(
        sources,
        folder,
        valid=args.valid,
        tokenizer=args.tokenizer,
        vocab=getattr(args, "vocab", None),
        kind=args.kind_of_tokenizer,
        clean=not args.keep_duplicates,
        separator=args.separator,
        say=say,
    )


def new_folder(path: str) -> Path:
    """A folder for a new run. Raises FileExistsError before anything is spent on it."""
    from tinylm.run import require_free

    if not path.strip():
        raise ConfigError("--out is empty: name a folder")
    require_free(Path(path))
    return Path(path)


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows as text: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        right = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        lines.append("  ".join([first.ljust(widths[0]), *right]).rstrip())
    return "\n".join(lines)


def si(number: float) -> str:
    """1234567 -> "1.2M"."""
    for factor, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.1f}{letter}"
    return f"{number:.0f}"


def mb(size: float) -> str:
    """Bytes as MB."""
    return f"{size / 1e6:.2f} MB"


# --- the parser -------------------------------------------------------------------------------------------------------


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
        made.set_defaults(run=run)
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
    p.add_argument("--text", required=True, metavar="SOURCE", help="text to score: file, folder, hf:ID, or world")
    separator_option(p)
    p.add_argument("--limit", type=amount, metavar="N", help="only the first N documents")
    p.add_argument("--stride", type=amount, metavar="N", help="tokens between windows (default half the context)")

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

    p = command("sizes", cmd_sizes, "tinylm sizes --preset 1M --vocab 2048")
    p.add_argument("--preset", action="append", metavar="NAME", help="only this one, in detail; may be given again")
    add_options(p, ModelConfig, "model: changes to the preset")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the `tinylm` command."""
    args = build_parser().parse_args(argv)
    warnings.showwarning = lambda message, *_, **__: say(f"tinylm: {message}")
    try:
        args.run(args)
    except (ValueError, OSError, RuntimeError) as error:
        if os.environ.get("TINYLM_DEBUG"):
            raise
        if isinstance(error, BrokenPipeError):  # the reader of our output, such as head, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(141) from None
        say(f"tinylm: {error}")
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        say("interrupted")
        raise SystemExit(130) from None
