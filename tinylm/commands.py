"""What each command of `tinylm` does. Figures go to stdout, progress to stderr."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinylm.config import ConfigError, ModelConfig, Sampling, TrainConfig
from tinylm.engine.command import OPENING, say
from tinylm.options import chosen

OPTIONS = ("dtype", "rounding", "version", "group", "codec")  # of `convert`, passed on to the format
EXPORTING = ("bits", "group", "embed", "head", "cache", "absmean")  # of `export`, passed on
LIMITS = ("tokens", "seconds", "running")  # of `serve`
CALIBRATION = 64  # documents that are enough for the largest input of every matrix


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
    from tinylm.folder import pin

    pin(Path(args.folder))  # before JAX is there
    from tinylm.resuming import resume

    longer = {k: v for k, v in chosen(args, TrainConfig).items() if k in ("steps", "tokens", "budget")}
    train_to_the_end(resume(args.folder, **longer), args)


def train_to_the_end(trainer: Any, args: argparse.Namespace) -> None:
    """Drive a training run with a live line; exit as the signal that stopped it asks for."""
    from tinylm.live import TerminalView, fit
    from tinylm.presets import count
    from tinylm.speed import usage

    config, model, before = trainer.config, trainer.model.config, trainer.step
    end = f"{config.budget:.0f} s" if config.budget else f"{trainer.steps:,} steps"
    say(f"{count(model):,} parameters: {model.layers} layers of width {model.width}, context {model.context}; {end}")
    fit(trainer, view=TerminalView(sys.stderr), sample_every=0).run()
    folder = trainer.run.folder
    last = trainer.history[-1] if trainer.history else None
    used = usage(trainer)
    figures = {"folder": str(folder), "outcome": trainer.outcome, **(last._asdict() if last else {})}
    figures["usage"] = used.to_dict()
    text = f"{trainer.outcome} at step {trainer.step:,}"
    if last is not None and last.valid_bits is not None:
        text += f": {last.valid_bits:.4f} bits per byte on held-out windows"
    text += f"; everything is in {folder}\n{used}"
    if trainer.outcome == "done" and before == trainer.step:
        text += "\nnothing was left to do; for more give a later end, such as --steps or --budget"
    if trainer.outcome != "done":
        text += f"\ngo on with: tinylm resume {folder}"
    report(args, figures, text)
    if trainer.signal:
        raise SystemExit(128 + trainer.signal)


def cmd_evaluate(args: argparse.Namespace) -> None:
    """Bits per byte of a model on a text, with an interval over documents; or what it has learned, with --suite."""
    if args.suite is not None:
        from tinylm.suite.command import suite_command

        report(args, *suite_command(args, say))
        return
    if args.text is None:
        raise ConfigError("--text: say which text to score, or --suite")
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


def cmd_report(args: argparse.Namespace) -> None:
    """Write one HTML page about a run: curves, scores beside their controls, samples, sizes, provenance."""
    from tinylm.reporting import report as write
    from tinylm.text import documents

    text = None if args.text is None else documents(args.text, separator=args.separator)
    asked = {} if args.prompt is None else {"prompts": args.prompt}
    made = write(args.folder, args.out, text=text, seed=args.seed, **asked)
    report(args, {"page": str(made.path), **made.figures}, str(made.path))


def cmd_classify(args: argparse.Namespace) -> None:
    """Fine-tune a model to tell classes apart, or several as a committee; or score one that can."""
    from tinylm.classification.command import classify_command

    report(args, *classify_command(args, say))


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
    own = ", a folder in this kit's own format" if path.is_dir() and not args.to else ""
    text = f"{path}{own}: {count(model.config):,} parameters, {mb(size)}"
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


def cmd_export(args: argparse.Namespace) -> None:
    """Round a model's weights into one file for the engine, which runs it on a CPU."""
    from tinylm.checkpoint import load
    from tinylm.engine.export import export
    from tinylm.text import documents

    model = load(args.folder)
    asked = {name: getattr(args, name) for name in EXPORTING if hasattr(args, name)}
    if args.calibration:
        if model.tokenizer is None:
            raise ConfigError(
                f"{args.folder} has no tokenizer to read {args.calibration} with: leave --calibration out"
            )
        texts = documents(args.calibration, separator=args.separator, limit=CALIBRATION)
        asked["calibration"] = [model.tokenizer.encode(text)[: model.config.context] for text in texts]
    written = export(model, args.target, only=dict(args.only or ()), **asked)
    matrices = [{**row._asdict(), "bits_per_weight": row.bits_per_weight} for row in written.rows]
    figures = {"target": str(written.path), "bytes": written.bytes, "weights": written.weights}
    report(args, {**figures, "bits_per_weight": written.bits_per_weight, "matrices": matrices}, str(written))


def cmd_run(args: argparse.Namespace) -> None:
    """Continue a text with an exported model."""
    from tinylm.engine import Engine, command

    if args.text is not None and args.prompt is not None:
        raise ConfigError("the prompt is there twice, as PROMPT and as --prompt: give it once")
    prompt = args.text or args.prompt or ""
    opening, settings = opening_of(args), chosen(args, Sampling)
    settings.update({name: getattr(args, name) for name in ("tokens", "seed", "stop") if hasattr(args, name)})
    if not args.json:
        command.run(args.file, prompt, **opening, **settings)
        return
    began = time.perf_counter()
    text = Engine(args.file, **opening).generate(prompt, **settings)
    print(json.dumps({"prompt": prompt, "text": text, "seconds": time.perf_counter() - began}, indent=2))


def cmd_serve(args: argparse.Namespace) -> None:
    """Answer OpenAI's completions over HTTP with an exported model, on this machine, until Ctrl-C."""
    from tinylm.engine import Engine
    from tinylm.engine.completions import Limits
    from tinylm.engine.serve import Server, serve

    limits = Limits(**{name: getattr(args, name) for name in LIMITS if hasattr(args, name)})
    engine, name = Engine(args.file, **opening_of(args)), args.name or Path(args.file).stem
    server = Server(engine, name, args.host, args.port, limits, say)
    if not server.only_loopback:
        say(f"tinylm: {args.host} can be reached from other machines, without a password")
    example = f"""curl {server.url}/v1/completions -H 'Content-Type: application/json' -d '{{"prompt": "Once"}}'"""
    report(args, {"url": server.url, "model": name}, f"{name} at {server.url}; Ctrl-C ends it\n{example}")
    serve(server)


def cmd_bench(args: argparse.Namespace) -> None:
    """How fast this machine trains a size (`bench train`), or runs an exported file (`bench engine FILE`)."""
    if args.what == "engine":
        from tinylm.engine.measuring import measure, table

        if args.file is None:
            raise ConfigError("bench engine: which file? `tinylm export DIR story.tlm` makes one")
        speeds = measure(args.file, threads=args.threads or (), seconds=args.seconds)
        report(
            args, {"file": args.file, "speeds": [one._asdict() for one in speeds]}, columns(table(args.file, speeds))
        )
        return
    from tinylm.presets import preset
    from tinylm.speed import measure as train_for

    if args.file is not None:
        raise ConfigError(f"bench train takes no file, got {args.file!r}: name a size with --preset")
    config = TrainConfig.from_dict({"steps": 10**9, "log_every": 5, **chosen(args, TrainConfig)})
    used = train_for(preset(args.preset, **chosen(args, ModelConfig)), config, args.seconds)
    report(args, used.to_dict(), str(used))


def opening_of(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `Engine` that were given."""
    return {name: getattr(args, name) for name in OPENING if hasattr(args, name)}


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
