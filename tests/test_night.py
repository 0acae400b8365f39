"""The long figures of the promises: minutes each, before a release (`pytest -m slow tests/test_night.py`)."""

import collections
import json
import os
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import test_data
import test_engine_file
import test_health
import test_live
import test_show
import test_store
import test_tokenizer
from conftest import resident
from damage import damaged
from hypothesis import given, settings

from tinylm.config import ModelConfig, TrainConfig
from tinylm.data import Tokens, write_tokens
from tinylm.engine import file as engine_file
from tinylm.engine.twin import Twin
from tinylm.formats import FormatError
from tinylm.model import Transformer
from tinylm.resuming import resume
from tinylm.store import CheckpointDamaged, read_file, verify_file, write_file
from tinylm.text import documents
from tinylm.tokenizer import Tokenizer
from tinylm.training import train

pytestmark = pytest.mark.slow
KINDS = ("flip", "truncate", "extend", "zero", "swap", "cut")


def test_a_hundred_thousand_damaged_checkpoints(tmp_path):  # P4
    path, bad = tmp_path / "a", tmp_path / "b"
    write_file(path, test_store.SAMPLE, {"step": 3})
    rng, data, tried = np.random.default_rng(5), path.read_bytes(), 0
    for n in range(100_000):
        new = test_store.damaged(data, KINDS[n % 6], rng)
        if new != data:
            tried += 1
            bad.write_bytes(new)
            with pytest.raises(CheckpointDamaged):
                (read_file if n % 2 else verify_file)(bad)
    assert tried > 90_000


def test_thirty_stops_of_fifteen_million_parameters(tmp_path):  # P3
    """Stopped after every step and opened again from the folder, with dropout, accumulation, a schedule and epochs."""
    rng = np.random.default_rng(0)
    tokens = Tokens.from_array(rng.integers(0, 32_000, 40 * 33).astype(np.uint16), vocab=32_000)
    shape = ModelConfig(vocab=32_000, context=64, width=288, layers=6, heads=6, dropout=0.1)
    config = TrainConfig(steps=31, batch=4, length=32, accumulate=2, warmup=5, log_every=1, keep=2)
    whole = train(Transformer(shape), tokens, config)
    assert len(list(whole)) == 31
    trainer, losses = train(Transformer(shape), tokens, config, out=tmp_path / "run"), []
    for stop in range(1, 31):
        for step in trainer:
            if step.step == stop:
                break
        losses += trainer.losses
        trainer.run.close()
        trainer = resume(tmp_path / "run", data=tokens)
        assert trainer.step == stop
    assert losses + [step.loss for step in trainer] == whole.losses
    mine, theirs = trainer.tensors(), whole.tensors()
    assert sum(x.size for name, x in theirs.items() if name.startswith("params.")) > 15e6
    assert mine.keys() == theirs.keys()
    assert [name for name in theirs if not np.array_equal(mine[name], theirs[name])] == []
    trainer.run.close()


def test_six_hundred_poisons():  # P12
    test_health.check_poisons(600)


def test_ten_thousand_batches_in_two_processes():  # P14
    rng = np.random.default_rng(1)
    steps = [
        (int(a), int(b)) for a, b in zip(rng.integers(0, 2**40, 10_000), rng.integers(0, 10**7, 10_000), strict=True)
    ]
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    code = f"import json,sys; sys.path[:0] = {paths!r}\nimport test_data; print(test_data.digest(json.load(sys.stdin)))"
    done = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(steps), capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == test_data.digest(steps)


@pytest.mark.filterwarnings("ignore")  # of jupyter_client and zmq
def test_a_killed_kernel_goes_on_with_one_call(tmp_path):  # P19
    """Three kernels are killed while they train; a fourth ends the run; every loss is that of an undisturbed one."""
    pytest.importorskip("ipykernel", "7.0")
    fit = "import asyncio\ntrainer = await tinylm.fit({}, view=None)\nprint(trainer.outcome)"
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    options = "TrainConfig(steps=4000, batch=2, log_every=5, save_every=0.05)"

    def kernel():
        found = test_live.Kernel()
        output, errors, _, _ = found.run(test_live.SETUP)
        assert errors == [], output
        return found

    one = kernel()
    try:
        output, errors, _, _ = one.run(fit.format(f"*new(1)[:2], {options}, out={whole!r}"))
        assert (errors, output.split()) == ([], ["done"]), output
        one.run(f"first = tinylm.train(*new(1)[:2], {options}, out={parts!r})")
        one.run("for step in first:\n  if step.step > 99: break\nfirst.run.close()")
        for wait in (0.3, 0.8, 1.3):
            victim = kernel()
            try:
                code = fit.format(f"tinylm.resume({parts!r}, data=data)")
                with pytest.raises(TimeoutError):
                    victim.run(code, wait, lambda _, victim=victim: kill(victim))
            finally:
                victim.client.stop_channels()
                victim.manager.shutdown_kernel(now=True)
        output, errors, _, _ = one.run(fit.format(f"tinylm.resume({parts!r}, data=data)"))
        assert (errors, output.split()) == ([], ["done"]), output
    finally:
        one.client.stop_channels()
        one.manager.shutdown_kernel(now=True)
    logs = [Path(folder, "run.jsonl").read_text().splitlines() for folder in (whole, parts)]
    both = [[(r["step"], r["loss"]) for r in map(json.loads, log) if r["step"] % 5 == 0] for log in logs]
    assert both[0] == both[1]


def kill(victim):
    victim.manager.provisioner.process.kill()
    raise TimeoutError


@pytest.mark.filterwarnings("ignore")  # of nbconvert
def test_a_converted_notebook_holds_nothing_that_acts():  # P23
    """All payloads in all displays, saved as outputs and made into one page by nbconvert: only elements of ours."""
    nbformat, nbconvert = pytest.importorskip("nbformat"), pytest.importorskip("nbconvert")
    cells, inert = [], nbformat.v4.new_output("display_data", {"text/plain": "x", "text/html": "<div>x</div>"})
    for payload in test_show.PAYLOADS:
        for picture in test_show.displays(payload[:10_000]).values():
            shown = {"text/html": str(getattr(picture, "html", picture)), "text/plain": getattr(picture, "text", "")}
            cells.append([nbformat.v4.new_output("display_data", shown)])

    def page(outputs):
        book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("x", outputs=found) for found in outputs])
        text = nbconvert.HTMLExporter(template_name="basic").from_notebook_node(book)[0]
        seen = collections.Counter()

        class Acting(HTMLParser):
            def handle_starttag(self, name, attrs):
                seen.update(
                    [name] if name in ("script", "iframe", "img", "object", "embed", "form", "a", "link") else []
                )
                seen.update(key for key, _ in attrs if key.startswith("on"))
                leading = [value or "" for key, value in attrs if key in ("href", "src", "action", "style")]
                seen.update(value for value in leading if "javascript" in value.lower())

        Acting().feed(text)
        return seen

    assert page(cells) == page([[inert]] * len(cells))


@pytest.mark.parametrize("kind", test_tokenizer.KINDS)
def test_five_thousand_strings_of_each_kind(kind):  # P26
    tokenizer = Tokenizer.train(test_tokenizer.STORIES, vocab=test_tokenizer.VOCAB[kind], kind=kind)

    @settings(max_examples=5000, deadline=None)
    @given(test_tokenizer.text())
    def check(x):
        ids = tokenizer.encode(x)
        assert tokenizer.decode_bytes(ids) == x.encode()
        assert len(ids) == 0 or (ids.min() >= 5 and ids.max() < tokenizer.vocab)

    check()


@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_hundred_thousand_tokenizers():  # P26
    for seed in range(1000, 2000):
        assert test_tokenizer.survives(seed, 100) == 0, f"seed {seed}"


@pytest.mark.parametrize("bits", ["int8", "planes", "ternary", "float32"])
def test_fifty_thousand_hostile_engine_files(bits, tmp_path):  # P27
    """Half of them with sums made right again: refused, or another sound file that runs."""
    constants = test_engine_file.CONSTANTS._replace(activations=32 if bits == "float32" else 8)
    raw = engine_file.write(tmp_path / "sound.tlm", constants, test_engine_file.tensors(bits)).read_bytes()
    folder = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else tmp_path
    path, refused, ran = folder / f"tinylm-night-{os.getpid()}.tlm", 0, 0
    try:
        for number, (_, bad) in enumerate(damaged(raw, 50_000, seed=len(bits))):
            path.write_bytes(test_engine_file.summed(bad) if number % 2 and len(bad) >= 64 else bad)
            try:
                engine_file.read(path)
            except FormatError:
                refused += 1
            else:
                assert number % 2 or bad == raw
                assert Twin(path).logits([0]).shape[0] == 1
                ran += 1
    finally:
        path.unlink(missing_ok=True)
    assert refused > 25_000
    assert ran > 100


def test_a_hundred_thousand_hostile_checkpoints(tmp_path):  # P27
    write_file(tmp_path / "a", test_store.SAMPLE, {"step": 3})
    rng, data, refused = np.random.default_rng(6), (tmp_path / "a").read_bytes(), 0
    for n in range(100_000):
        bad = test_store.damaged(data, KINDS[n % 6], rng)
        (tmp_path / "b").write_bytes(test_store.resealed(bad) if len(bad) > 100 else bad)
        try:
            tensors, _ = read_file(tmp_path / "b")
        except ValueError:
            refused += 1
        else:
            assert sum(tensor.nbytes for tensor in tensors.values()) <= len(bad)
    assert refused > 30_000
    shutil.rmtree(tmp_path)


def test_one_line_of_fifty_megabytes(tmp_path):  # P25
    words = np.random.default_rng(0).integers(0, 50_000, 8_500_000).astype("U5")
    path = tmp_path / "line.txt"
    path.write_text(" ".join(words.tolist()))
    size = path.stat().st_size
    assert size > 45e6
    del words
    tokenizer = Tokenizer.train(["0 1 2 3 4 5 6 7 8 9 12 345 678"], vocab=280)
    before = resident()
    tokens = write_tokens(documents(path), tokenizer, tmp_path / "tokens")
    assert tokens.documents == 1
    assert tokens.bytes == size
    assert resident() - before < 2 * size + 300e6


EXPORT = """
import hashlib, sys, tinylm
tokenizer = tinylm.Tokenizer.train(["abc abd " * 9], vocab=264)
config = tinylm.ModelConfig(vocab=264, context=16, width=16, layers=1, heads=2)
path = sys.argv[1]
tinylm.export(tinylm.Transformer(config, rngs=1, tokenizer=tokenizer), path)
print(hashlib.sha256(open(path, "rb").read()).hexdigest())
"""


def test_five_processes_write_the_same_file(tmp_path):  # P29
    hashes = set()
    for seed in range(5):
        env = {**os.environ, "PYTHONHASHSEED": str(seed), "TZ": ["UTC", "Asia/Tokyo"][seed % 2]}
        env["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), env.get("PYTHONPATH", "")])
        command = [sys.executable, "-c", EXPORT, str(tmp_path / f"{seed}.tlm")]
        hashes.add(subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout)
    assert len(hashes) == 1
