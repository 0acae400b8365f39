"""The engine against llama.cpp, onnxruntime, llama2.c, JAX and PyTorch: same weights, one run, in turns.

    python tests/bench/engine.py decode  [--sizes 0.26M 6M ...] [--bits int8 int4 ternary float32] [--threads 1 2]
    python tests/bench/engine.py prefill [--sizes ...]      256 tokens read at once, head included
    python tests/bench/engine.py batch   [--sizes 15M]      64 texts side by side
    python tests/bench/engine.py start   [--sizes ...]      cold process to first token, memory, size of the file
    python tests/bench/engine.py bert    [--sizes BERT-1 BERT-6]
    python tests/bench/engine.py speculate                  real stories (TINYLM_DATA, default ../shared/data)

Every engine runs in a process of its own, pinned to as many cores as it has threads, and keeps its model loaded. First
each tries its settings (attention, cache, layout of the weights, compiler flags) and keeps the fastest. Then, round for
round, each has a turn of `--seconds`; figures are medians over rounds, ratios are taken within a round and come with
their range. "CPU" is the process's CPU time over wall time and threads: far from 1.00, somebody else had the core.
"bound" is what the cores can read: the model's bytes at those bits, streamed in the same rounds. "as float32": how many
greedy tokens come before the first that differs from JAX in float32; random weights have many near ties. What is not
installed is left out; llama2.c takes part when LLAMA2C names its folder. Files are kept in --folder if it is given.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import engine_models as models
from engine_models import Files

HERE = Path(__file__).parent
HOME = HERE.parents[1]
LLAMA = [
    {"flash": flash, "cache": cache, "repack": repack}
    for flash, cache in ((0, "f16"), (0, "f32"), (1, "f16"), (1, "q8_0"))
    for repack in (True, False)
]
SETTINGS: dict[str, list[dict]] = {
    "llama.cpp": LLAMA,
    "llama2.c": [{"flags": "-Ofast"}, {"flags": "-O3"}],
    "jax": [{"turned": False}, {"turned": True}],
    "onnxruntime": [{"joined": joined} for joined in (False, True)],
    "onnxruntime dynamic int8": [
        {"joined": joined, "tensor": one} for joined in (False, True) for one in (False, True)
    ],
    "torch bfloat16": [{"compiled": False}, {"compiled": True}],
    "torch int8": [{"backend": "x86"}, {"backend": "onednn"}],
}
SETTINGS |= {
    f"onnxruntime MatMulNBits {bits}": [
        {"joined": joined, "block": block} for joined in (False, True) for block in (32, 128)
    ]
    for bits in (4, 8)
}
"""What each engine tries, or each with some kind of weights."""


class Peer(NamedTuple):
    """Somebody's engine with weights of some kind; `file`: its name in `Files`."""

    engine: str
    weights: str
    file: str


OURS = "tinylm"
PEERS = {
    "int8": [
        Peer("llama.cpp", "Q8_0", "q8_0.gguf"),
        Peer("onnxruntime", "dynamic int8", "dynamic.onnx"),
        Peer("onnxruntime", "MatMulNBits 8", "blocks8.onnx"),
        Peer("llama2.c", "runq", "v2.bin"),
    ],
    "int4": [Peer("llama.cpp", "Q4_0", "q4_0.gguf"), Peer("onnxruntime", "MatMulNBits 4", "blocks4.onnx")],
    "ternary": [Peer("llama.cpp", "TQ2_0", "tq2_0.gguf"), Peer("llama.cpp", "TQ1_0", "tq1_0.gguf")],
    "float32": [
        Peer("llama.cpp", "F32", "f32.gguf"),
        Peer("onnxruntime", "float32", "float32.onnx"),
        Peer("llama2.c", "run", "v0.bin"),
        Peer("jax", "float32", "weights.safetensors"),
    ],
}


@functools.cache
def missing(engine: str) -> str:
    """Why an engine cannot take part, or nothing."""
    if engine == "llama2.c":
        return "" if os.environ.get("LLAMA2C") else "LLAMA2C does not name the folder of its source"
    if engine == OURS:
        from tinylm import native

        return "" if native.available() else "its native library is not there"
    packages = {"llama.cpp": ["llama_cpp"], "onnxruntime": ["onnxruntime", "onnx"]}.get(engine, [engine])
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else ""


def present(peers: Iterable[Peer]) -> list[Peer]:
    """Those that can take part; says of the others why not."""
    for engine in dict.fromkeys(peer.engine for peer in peers):
        if missing(engine):
            print(f"({engine} is left out: {missing(engine)})")
    return [peer for peer in peers if not missing(peer.engine)]


# --- processes --------------------------------------------------------------------------------------------------------


FAILURES = (RuntimeError, ValueError, OSError, subprocess.CalledProcessError)  # of an engine, or of writing its file


class Turn(NamedTuple):
    """Tasks per second, CPU seconds per second and thread, and the ids that were made."""

    rate: float
    cpu: float
    ids: list[int]


class Process:
    """An engine that waits for its turn."""

    def __init__(self, command: Sequence[str], threads: int, settings: dict):
        self.threads, self.settings, self.times = threads, settings, 1
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (open as long as the child)
        with pinned(threads):
            files = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors}
            self.child = subprocess.Popen(command, **files, text=True, env=environment(threads))
        self.answer("ready")

    def answer(self, expected: str = "") -> str:
        """Its next line. Raises RuntimeError with its last words when it has ended instead."""
        line = self.child.stdout.readline()
        if not line or (expected and line.strip() != expected):
            self.child.kill()
            self.close()
            raise RuntimeError(self.words or f"it said {line!r} and ended with {self.child.returncode}")
        return line

    def turn(self) -> Turn:
        """Do the task `times` times."""
        self.child.stdin.write(f"{self.times}\n")
        self.child.stdin.flush()
        seconds, spent, *ids = self.answer().split()
        return Turn(self.times / float(seconds), float(spent) / float(seconds) / self.threads, [*map(int, ids)])

    def memory(self) -> dict[str, float]:
        """MB: the most it had, and of that what is its own and what is mapped files, now."""
        lines = dict(
            line.split(":", 1)
            for line in Path(f"/proc/{self.child.pid}/status").read_text().splitlines()
            if ":" in line
        )
        return {name: int(lines[name].split()[0]) * 1024 / 1e6 for name in ("VmHWM", "RssAnon", "RssFile")}

    def close(self) -> None:
        """End it, if it has not ended."""
        if self.errors.closed:
            return
        with contextlib.suppress(BrokenPipeError):
            self.child.stdin.close()
        self.child.stdout.close()
        self.child.wait()
        self.errors.seek(0)
        self.words = "".join(self.errors.read().strip().splitlines()[-1:])
        self.errors.close()


@contextlib.contextmanager
def pinned(threads: int):
    """A process started inside keeps to the last `threads` cores of those we may use."""
    ours = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(ours)[-threads:])
    try:
        yield
    finally:
        os.sched_setaffinity(0, ours)


def environment(threads: int) -> dict[str, str]:
    """Thread counts for libraries that ask the environment; OpenMP's threads spin, as those of all others do."""
    count = str(threads)
    return {
        **os.environ,
        "NPROC": count,
        "OMP_NUM_THREADS": count,
        "PYTHONPATH": str(HERE),
        "PYTHONSAFEPATH": "1",  # not the sources in this folder, but what is installed
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }


def command(peer: Peer, files: Files, task: dict, settings: dict) -> list[str]:
    """The command line of an engine."""
    stem, dot, kind = peer.file.rpartition(".")
    marks = [name for name in ("joined", "tensor", "apart") if settings.get(name)]
    if kind == "onnx":
        marks += [str(settings["block"])] if "block" in settings else []
        marks += [] if task.get("all", 1) else ["last"]
    path = files("-".join([stem, *marks]) + dot + kind)
    if peer.engine == "llama2.c":
        program = models.llama2c(peer.weights, settings["flags"], files.folder.parent, task["threads"])
        return [str(program), path, str(task["tokens"])]
    c = files.config
    shape = {"vocab": c.vocab, "context": c.context, "config": c.to_dict()}
    spec = {"engine": peer.engine, "weights": peer.weights, "path": path, **shape, **settings, **task}
    return [sys.executable, str(HERE / "engine_peers.py"), json.dumps(spec)]


def variants(peer: Peer, task: dict) -> list[dict]:
    """The settings a peer has to choose from."""
    known = SETTINGS.get(f"{peer.engine} {peer.weights}") or SETTINGS.get(peer.engine) or [{}]
    if peer.engine == "onnxruntime" and task["task"] == "bert":  # the product of queries, keys and values inside or not
        known = [{"apart": False}, {"apart": True}]
    if peer.engine == "llama.cpp" and task["task"] == "batch":  # one cache for all texts, or one for each
        known = [{**settings, "unified": unified} for settings in known for unified in (False, True)]
    return known


def fastest(peer: Peer, files: Files, task: dict, variants: Sequence[dict]) -> Process | None:
    """A peer with the best of its settings, running; None, said aloud, where it works with none of them."""
    best, best_rate, why = None, 0.0, ""
    for settings in variants:
        try:
            process, rate = Process(command(peer, files, task, settings), task["threads"], settings), 1.0
            if len(variants) > 1:
                rate = process.turn().rate
                process.times = max(1, round(0.1 * rate))
                rate = max(rate, *(process.turn().rate for _ in range(3 if rate > 2 else 1)))
        except FAILURES as error:
            why = str(error) or type(error).__name__
            continue
        worse = process
        if rate > best_rate:
            worse, best, best_rate = best, process, rate
        if worse:
            worse.close()
    if best is None:
        print(f"({peer.engine} {peer.weights} of {files.size} is left out: {why})")
    return best


def alternate(processes: dict, rounds: int, seconds: float) -> dict[object, list[Turn]]:
    """Turns of every process, round for round; each turn takes about `seconds`."""
    for process in processes.values():
        process.times = max(1, round(seconds * process.turn().rate))
    turns = {key: [] for key in processes}
    for _ in range(rounds):
        for key, process in processes.items():
            time.sleep(0.05)  # threads of the one before come to rest
            turns[key].append(process.turn())
    return turns


# --- tables -----------------------------------------------------------------------------------------------------------


def rate(turns: Sequence[Turn], scale: float = 1.0) -> str:
    return f"{scale * statistics.median(turn.rate for turn in turns):,.0f}"


def ratio(over: Sequence[Turn] | None, under: Sequence[Turn]) -> str:
    """Median and range over the rounds."""
    if over is None:
        return ""
    values = [a.rate / b.rate for a, b in zip(over, under, strict=True)]
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def alike(ids: Sequence[int], reference: Sequence[int], rows: int = 1) -> int:
    """How many tokens of each row come before the first that differs, summed over the rows; rows 0: all that agree."""
    if not rows:
        return sum(a == b for a, b in zip(ids, reference, strict=True))
    length, total = len(reference) // rows, 0
    for row in range(rows):
        pairs = zip(ids[row * length :][:length], reference[row * length :][:length], strict=True)
        total += next((i for i, (a, b) in enumerate(pairs) if a != b), length)
    return total


def said(settings: dict) -> str:
    return ", ".join(f"{key} {value}" for key, value in settings.items())


def compare(title: str, peers: list[Peer], files: Files, task: dict, args, bound: str = "", reference=None) -> None:
    """One table: all peers in turns, ours first. `bound`: the bits whose bytes a token reads."""
    processes: dict = {}
    try:
        for peer in peers:
            if process := fastest(peer, files, task, variants(peer, task)):
                processes[peer] = process
        if bound:
            bytes_ = models.step_bytes(files.config, bound)
            program = [str(models.bandwidth(files.folder.parent)), str(bytes_), str(task["threads"])]
            processes["bound"] = Process(program, task["threads"], {})
        turns = alternate(processes, args.rounds, args.seconds)
    finally:
        for process in processes.values():
            process.close()
    rows = task.get("rows", 1)
    follows = rows if task["task"] in ("decode", "batch") else 0  # each token is read by the next
    scale = rows * (1 if task["task"] == "bert" else task["tokens"])
    ours = next((turns[peer] for peer in turns if peer != "bound" and peer.engine == OURS), None)
    print(f"\n{title}\n")
    unit = "rows/s" if task["task"] == "bert" else "tokens/s"
    agree = f" as float32, of {len(reference)} |" if reference else ""
    share = " of the bound |" if bound else ""
    print(f"| engine | weights | settings | {unit} | CPU | ours over it (range) |{share}{agree}")
    print(f"|---|---|---|---|---|---|{'---|' * (share.count('|') + agree.count('|'))}")
    for key, taken in turns.items():
        if key == "bound":
            streamed = f"{bytes_ * statistics.median(turn.rate for turn in taken) / 1e9:.1f} GB/s"
            row = ["bound", f"{bytes_ / 1e6:.2f} MB", streamed, rate(taken)]
        else:
            row = [key.engine, key.weights, said(processes[key].settings), rate(taken, scale)]
        row += [
            f"{statistics.median(turn.cpu for turn in taken):.2f}",
            "" if key == "bound" or taken is ours else ratio(ours, taken),
        ]
        if bound:
            of = [scale * a.rate / b.rate for a, b in zip(taken, turns["bound"], strict=True)]
            row.append("" if key == "bound" else f"{100 * statistics.median(of):.0f} %")
        if reference:
            row.append("" if key == "bound" else str(alike(taken[-1].ids, reference, follows)))
        print("| " + " | ".join(row) + " |", flush=True)


# --- what is measured -------------------------------------------------------------------------------------------------


def once(peer: Peer, files: Files, task: dict) -> list[int] | None:
    """The ids that a peer makes, or None where it is missing."""
    process = None if missing(peer.engine) else fastest(peer, files, task, [{}])
    if process is None:
        return None
    try:
        return process.turn().ids
    finally:
        process.close()


def tokens_of(size: str) -> int:
    return 128 if size.startswith("42M") else 256


def decode(args) -> None:
    for size, bits, threads in itertools.product(args.sizes, args.bits, args.threads):
        if size not in models.TERNARY if bits == "ternary" else size == "42Mt":
            continue
        files = Files(size, args.folder, ternary=bits == "ternary")
        task = {"task": "decode", "tokens": args.tokens or tokens_of(size), "threads": threads}
        reference = once(PEERS["float32"][-1], files, task)
        peers = present([Peer(OURS, bits, f"{bits}.tlm"), *PEERS[bits]])
        title = f"Decoding, {size}, {bits}, {threads} thread{'s' * (threads > 1)}, {task['tokens']} tokens"
        compare(title, peers, files, task, args, bound=bits, reference=reference)


def prefill(args) -> None:
    peers = [peer for peer in PEERS["int8"] if peer.engine != "llama2.c"]  # it reads a prompt token by token
    for size, threads, whole in itertools.product(args.sizes, args.threads, args.logits):
        files = Files(size, args.folder)
        task = {"task": "prefill", "tokens": args.tokens or 256, "threads": threads, "all": int(whole == "all")}
        reference = once(PEERS["float32"][1], files, task)
        title = f"Reading {task['tokens']} tokens, {size}, logits of {whole}, {threads} thread{'s' * (threads > 1)}"
        compare(title, present([Peer(OURS, "int8", "int8.tlm"), *peers]), files, task, args, "", reference)


def batch(args) -> None:
    peers = [
        Peer(OURS, "int8", "int8.tlm"),
        *(p for p in PEERS["int8"] if p.engine != "llama2.c"),
        PEERS["float32"][-1],
    ]
    for size, threads in itertools.product(args.sizes, args.threads):
        files = Files(size, args.folder)
        task = {"task": "batch", "tokens": args.tokens or 128, "threads": threads, "rows": args.rows}
        reference = once(PEERS["float32"][-1], files, task)
        title = (
            f"{args.rows} texts side by side, {size}, {threads} thread{'s' * (threads > 1)}, {task['tokens']} tokens"
        )
        compare(title, present(peers), files, task, args, reference=reference)


def bert(args) -> None:
    peers = [
        Peer(OURS, "int8", "int8.tlm"),
        Peer("onnxruntime", "dynamic int8", "dynamic.onnx"),
        Peer("torch", "bfloat16", "weights.safetensors"),
        Peer("torch", "int8", "weights.safetensors"),
    ]
    for size, threads, block in itertools.product(args.sizes, args.threads, args.blocks):
        files = Files(size, args.folder)
        task = {"task": "bert", "tokens": 128, "rows": args.rows, "threads": threads, "block": block}
        reference = once(Peer("torch", "float32", "weights.safetensors"), files, task)
        title = f"{size}, {args.rows} rows of 128 tokens in blocks of {block}, {threads} thread{'s' * (threads > 1)}"
        compare(title, present(peers), files, task, args, reference=reference)


def start(args) -> None:
    """Wall time of a whole process that makes one token, its files in the page cache."""
    for size in args.sizes:
        files, task = Files(size, args.folder), {"task": "decode", "tokens": 1, "threads": 1}
        commands = {"bare Python": [args.python, "-c", "pass"]}
        sizes = {"bare Python": 0}
        for peer in present([Peer(OURS, "int8", "int8.tlm"), *PEERS["int8"], *PEERS["float32"][:3]]):
            name = f"{peer.engine} {peer.weights}"
            settings = {"repack": False} if peer.engine == "llama.cpp" else SETTINGS.get(peer.engine, [{}])[0]
            try:
                commands[name] = command(peer, files, task, settings)
            except FAILURES as error:
                print(f"({name} of {size} is left out: {error})")
                continue
            sizes[name] = Path(files(peer.file)).stat().st_size / 1e6
            if peer.engine == "llama2.c":
                commands[name].append("once")
            else:
                spec = json.loads(commands[name][-1])
                code = f"import engine_peers as e; e.first({spec!r})"
                if peer.engine == OURS:
                    code = f"from tinylm.engine import Engine; e = Engine({spec['path']!r}, threads=1); "
                    code += "[*e.ids([1], tokens=1, temperature=0)]"
                commands[name] = [args.python if peer.engine == OURS else sys.executable, "-c", code]
        seconds, memory = {name: [] for name in commands}, {}
        for _ in range(2 + 4 * args.rounds):  # two to warm up
            for name, line in commands.items():
                with pinned(1):
                    begun = time.perf_counter()
                    subprocess.run(line, stdout=-3, stderr=-3, env=environment(1), check=True)
                    seconds[name].append(time.perf_counter() - begun)
        for name, line in commands.items():  # once more, and look before it ends
            waits = [*line[:-1], f"{line[-1]}; print('ready', flush=True); input()"] if line[1] == "-c" else line[:-1]
            process = Process(waits, 1, {})
            memory[name] = process.memory()
            process.child.stdin.write("\n")
            process.close()
        print(f"\nFrom a cold process to the first token, {size}, one core\n")
        print("| engine | ms in all | (range) | without bare Python | resident at most, MB | own | files | file, MB |")
        print("|---|---|---|---|---|---|---|---|")
        for name, taken in seconds.items():
            taken = [1000 * x for x in taken[2:]]
            middle, bare = statistics.median(taken), 1000 * statistics.median(seconds["bare Python"][2:])
            row = [name, f"{middle:.1f}", f"{min(taken):.1f} to {max(taken):.1f}", f"{middle - bare:.1f}"]
            if "llama2.c" in name:
                row[-1] = "(no Python)"
            row += [f"{megabytes:.1f}" for megabytes in memory[name].values()]
            print("| " + " | ".join([*row, f"{sizes[name]:.2f}"]) + " |", flush=True)


def speculate(args) -> None:
    """Stories of a published model with drafts and without: same texts, tokens of each pass, speed over the peers'."""
    data = Path(os.environ.get("TINYLM_DATA", HOME / ".." / "shared" / "data"))
    for size, threads in itertools.product(args.sizes, args.threads):
        checkpoint = next((data / "ckpt" / size).glob(f"{size}.bin*"), None)
        if checkpoint is None:
            print(f"({size} is left out: there is no {data / 'ckpt' / size}; set TINYLM_DATA)")
            continue
        files = models.Published(checkpoint, args.folder)
        task = {"task": "decode", "tokens": args.tokens or 200, "threads": threads}
        story = {**task, "task": "stories", "prompts": files.tokens(data / "tinystories" / "valid_v1_a.txt.gz", 16)}
        corpus = files.tokens(data / "tinystories" / "synthetic_stories15M.txt.gz", 0)
        peers = present([Peer(OURS, "int8", "int8.tlm"), *PEERS["int8"]])
        best = {peer: fastest(peer, files, task, variants(peer, task)) for peer in peers}
        processes: dict = {peer: process for peer, process in best.items() if process and peer.engine != OURS}
        drafts = {"none": {}, "the text": {"speculate": 7}, "the text, corpus": {"speculate": 7, "corpus": corpus}}
        for temperature, (name, draft) in itertools.product((0.0, 0.7, 1.0), drafts.items()):
            if not missing(OURS):
                settings = {"temperature": temperature, "speculate": 0, **draft}
                processes[temperature, name] = Process(
                    command(Peer(OURS, "int8", "int8.tlm"), files, story, settings), threads, settings
                )
        turns = alternate(processes, args.rounds, args.seconds)
        for process in [*best.values(), *processes.values()]:
            if process:
                process.close()
        rates = {key: [turn.rate * task["tokens"] for turn in taken] for key, taken in turns.items()}
        passes = {}
        for key in rates:
            if isinstance(key[0], float):  # ours: a task is many stories, and says how many tokens they have
                count, made = turns[key][-1].ids[:2]
                rates[key], passes[key] = [turn.rate * made for turn in turns[key]], made / count
        middle = {key: statistics.median(values) for key, values in rates.items()}
        rival = max((key for key in rates if key not in passes), key=middle.get, default=None)
        given = f"up to {task['tokens']} tokens after 16 given"
        print(f"\nStories of {size}, {threads} thread{'s' * (threads > 1)}, {given}\n")
        print("| engine | temperature | drafts from | tokens/s | tokens a pass | over the best peer | same texts |")
        print("|---|---|---|---|---|---|---|")
        for key, values in rates.items():
            over = [a / b for a, b in zip(values, rates[rival], strict=True)] if rival else []
            spread = f"{statistics.median(over):.2f} ({min(over):.2f} to {max(over):.2f})" if over else ""
            if key in passes:
                same = turns[key][-1].ids[2:] == turns[key[0], "none"][-1].ids[2:]
                row = [
                    OURS,
                    str(key[0]),
                    key[1],
                    f"{middle[key]:,.0f}",
                    f"{passes[key]:.2f}",
                    spread,
                    ["no", "yes"][same],
                ]
            else:
                row = [f"{key.engine} {key.weights}", "0", "none", f"{middle[key]:,.0f}", "1", spread, ""]
            print("| " + " | ".join(row) + " |", flush=True)


TASKS = {"decode": decode, "prefill": prefill, "batch": batch, "start": start, "bert": bert, "speculate": speculate}
SIZES = {"bert": ["BERT-1", "BERT-6"], "batch": ["15M"], "start": ["0.26M", "15M", "42M"]}
SIZES |= {"prefill": [*models.SIZES][:4], "speculate": ["stories15M"]}


def main() -> None:
    """Print tables of one kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=[*TASKS])
    parser.add_argument("--sizes", nargs="+")
    parser.add_argument("--bits", nargs="+", default=["int8", "int4", "ternary", "float32"], choices=[*models.BITS])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5, help="of each engine in each round")
    parser.add_argument("--tokens", type=int, default=0, help="of a text; 0: 256, or fewer for large models")
    parser.add_argument("--rows", type=int, default=0, help="texts side by side: 64 of batch, 32 of bert")
    parser.add_argument("--python", default=sys.executable, help="of start: an environment with tinylm from a wheel")
    parser.add_argument("--blocks", nargs="+", type=int, default=[2, 4, 32], help="rows that bert does at a time")
    parser.add_argument("--logits", nargs="+", default=["last", "all"], choices=["last", "all"], help="of prefill")
    parser.add_argument("--folder", type=Path, help="of the models' files, kept")
    args = parser.parse_args()
    args.sizes = args.sizes or SIZES.get(args.task, [*models.SIZES])
    args.rows = args.rows or {"bert": 32}.get(args.task, 64)
    if too_many := [n for n in args.threads if n > len(os.sched_getaffinity(0))]:
        parser.error(f"--threads {too_many[0]}: this machine lends {len(os.sched_getaffinity(0))} cores")
    with tempfile.TemporaryDirectory() as made:
        args.folder = args.folder or Path(made)
        TASKS[args.task](args)


if __name__ == "__main__":
    main()
