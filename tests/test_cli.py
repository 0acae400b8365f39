"""The command line: every command on a tiny run, figures as json, errors in one line, signals as exit codes."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tinylm import cli, corpus, options
from tinylm.config import ModelConfig, Sampling, TrainConfig
from tinylm.markup import plain
from tinylm.world import World

TINY = "--preset 50K --vocab 512 --context 64 --steps 6 --batch 2".split()  # noqa: SIM905


def run(*args, capsys):
    """(exit status, stdout, stderr) of `tinylm ...`, in this process."""
    try:
        cli.main([str(arg) for arg in args])
        status = 0
    except SystemExit as stop:
        status = stop.code or 0
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return status, out, err


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "stories.txt"
    path.write_text("\n<|endoftext|>\n".join(World().texts(80)))
    return path


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    cli.main(["train", "--text", str(text), "--out", str(folder), *TINY])
    return folder


def test_train_reports_json_alone_on_stdout(text, tmp_path, capsys):
    status, out, err = run("train", "--text", text, "--out", tmp_path / "run", *TINY, "--json", capsys=capsys)
    figures = json.loads(out)
    assert (status, figures["outcome"], figures["step"]) == (0, "done", 6)
    assert figures["valid_bits"] > 0
    assert "parameters: 2 layers of width 32, context 64; 6 steps" in err
    assert json.loads((tmp_path / "run" / "run.jsonl").read_text().splitlines()[-1])["step"] == 6


def test_evaluate(trained, text, capsys):
    status, out, _ = run("evaluate", trained, "--text", text, "--limit", "10", "--json", capsys=capsys)
    figures = json.loads(out)
    assert status == 0
    assert {"bits_per_byte", "ci95", "nats_per_token", "bytes", "tokens"} <= figures.keys()
    assert figures["ci95"][0] < figures["bits_per_byte"] < figures["ci95"][1]
    assert figures["bytes"] == sum(len(story.encode()) for story in World().texts(10))
    _, out, _ = run("evaluate", trained, "--text", text, "--limit", "10", capsys=capsys)
    assert out.startswith(f"{figures['bits_per_byte']:.4f} bits per byte (95% interval")


def test_generate(trained, capsys):
    args = ["generate", trained, "--prompt", "One day", "--tokens", "20", "--temperature", "0.9", "--seed", "4"]
    status, out, _ = run(*args, capsys=capsys)
    assert status == 0
    assert out.startswith("One day")
    _, again, _ = run(*args, "--json", capsys=capsys)
    assert plain(json.loads(again)["text"]) + "\n" == out
    _, other, _ = run(*args[:-1], "5", capsys=capsys)
    assert other != out


def test_resume_goes_on(text, tmp_path, capsys):
    run("train", "--text", text, "--out", tmp_path / "run", *TINY, capsys=capsys)
    status, out, _ = run("resume", tmp_path / "run", "--steps", "9", "--json", capsys=capsys)
    assert (status, json.loads(out)["step"]) == (0, 9)
    status, out, _ = run("resume", tmp_path / "run", capsys=capsys)
    assert status == 0
    assert "done at step 9" in out
    assert "nothing was left to do; for more give a later end" in out


def test_tokens_are_made_once(text, tmp_path, capsys):
    args = ["tokens", text, "--out", tmp_path / "data", "--vocab", "600"]
    status, out, _ = run(*args, "--json", capsys=capsys)
    assert status == 0
    about = json.loads(out)
    assert about["train"]["documents"] + about["valid"]["documents"] == 80
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / "data").iterdir()}
    status, _, err = run(*args, capsys=capsys)
    assert "up to date" in err
    assert before == {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / "data").iterdir()}
    status, _, err = run(*args[:-1], "700", capsys=capsys)
    assert status == 1
    assert "other sources or settings" in err
    small = ["--preset", "60K", "--context", "64", "--steps", "2", "--batch", "2", "--json"]
    status, out, _ = run("train", "--text", tmp_path / "data", "--out", tmp_path / "run", *small, capsys=capsys)
    assert status == 0
    assert run("resume", tmp_path / "run", "--steps", "3", capsys=capsys)[0] == 0


def test_the_world_is_a_source(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(corpus, "WORLD_BYTES", 100_000)
    status, out, _ = run("train", "--text", "world", "--out", tmp_path / "run", *TINY, "--json", capsys=capsys)
    assert (status, json.loads(out)["outcome"]) == (0, "done")


def test_a_failed_start_does_not_block_its_folder(text, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    args = ["tokens", text, "--out", tmp_path / "run" / "data", "--vocab", "512"]
    assert run(*args, capsys=capsys)[0] == 0  # what an interrupted `train` leaves behind
    assert run("train", "--text", text, "--out", tmp_path / "run", *TINY, capsys=capsys)[0] == 0


def test_evaluate_on_the_world_knows_the_floor(trained, capsys):
    status, out, _ = run("evaluate", trained, "--text", "world", "--limit", "5", "--json", capsys=capsys)
    figures = json.loads(out)
    assert status == 0
    assert figures["excess"] == figures["bits_per_byte"] - figures["floor"] > 0


def test_control_characters_do_not_reach_the_terminal(trained, capsys):  # P23
    status, out, _ = run("generate", trained, "--prompt", "\x1b[31mred\u200d", "--tokens", "3", capsys=capsys)
    assert status == 0
    assert "\x1b" not in out
    assert out.startswith("\u241b[31mred\u200d")


def test_sizes(capsys):
    status, out, _ = run("sizes", "--json", capsys=capsys)
    assert status == 0
    sizes = json.loads(out)
    assert sizes["stories260K"]["total"] == 260_032
    assert all(sum(s["groups"].values()) == s["total"] for s in sizes.values())
    _, out, _ = run("sizes", "--preset", "stories15M", capsys=capsys)
    assert "15,191,712" in out
    assert "token embedding" in out


@pytest.mark.parametrize(
    "command", ["story", "tokens", "train", "resume", "evaluate", "generate", "convert", "sizes", "report"]
)
def test_help_reads_well(command, capsys):
    status, out, _ = run(command, "--help", capsys=capsys)
    assert status == 0
    assert f"example: tinylm {command}" in out
    assert max(map(len, out.splitlines())) <= 110
    shown = {"train": (TrainConfig, ModelConfig), "generate": (Sampling,), "sizes": (ModelConfig,)}.get(command, ())
    for cls in shown:
        for field in dataclasses.fields(cls):
            if field.name == "edits":  # no text on a command line
                continue
            assert f"--{field.name.replace('_', '-')}" in out
            assert options.attribute_help(cls)[field.name]


@pytest.mark.parametrize(
    ("args", "status", "said"),
    [
        (["train", "--text", "nowhere.txt", "--out", "{new}"], 1, "no file or folder 'nowhere.txt'"),
        (["train", "--text", "{text}", "--out", "{new}", "--preset", "1MM"], 1, "no preset '1MM'"),
        (["train", "--text", "{text}", "--out", "{run}"], 1, "holds a run already"),
        (["train", "--text", "{text}", "--out", "{text}"], 1, "is a file, and a run needs a folder"),
        (
            ["train", "--text", "{text}", "--out", "{new}", "--preset", "bert-tiny", "--steps", "2"],
            1,
            "needs a decoder",
        ),
        (["train", "--text", "{text}", "--out", "{new}", "--steps", "2", "--seed", "5000000000"], 1, "below 2^32"),
        (["train", "--text", "{text}", "--out", " "], 1, "--out is empty"),
        (["resume", "{text}"], 1, "is a file, not the folder of a run"),
        (["resume", "{run}", "--steps", "5"], 1, "lies behind"),
        (["train", "--text", "{text}", "--out", "{new}", "--steps", "3", "--budget", "9"], 1, "exactly one of steps"),
        (["train", "--text", "{text}", "--out", "{new}", "--budget", "soon"], 2, "no length of time"),
        (["train", "--text", "{text}", "--out", "{new}", "--dropout", "1.5"], 1, "dropout = 1.5"),
        (["train", "--text", "{text}", "--out", "{new}", "--optimizer", "sdg"], 2, "invalid choice: 'sdg'"),
        (["train", "--out", "{new}"], 2, "required: --text"),
        (["resume", "nowhere"], 1, "nowhere"),
        (["evaluate", "{run}", "--text", "nowhere.txt"], 1, "nowhere.txt"),
        (["evaluate", "{text}", "--text", "{text}"], 1, "stories.txt"),
        (["generate", "nowhere"], 1, "no file or folder 'nowhere'"),
        (["generate", "{run}", "--temperature", "-1"], 1, "temperature = -1.0"),
        (["generate", "{run}", "--tokens", "few"], 2, "no whole number"),
        (["tokens", "{text}", "--out", "{new}", "--vocab", "100"], 1, "100"),
        (["story", "--budget", "5s"], 1, "too short"),
        (["sizes", "--preset", "gpt5"], 1, "no preset 'gpt5'"),
        (
            ["generate", "{run}", "--promt", "x"],
            2,
            "tinylm generate: unrecognized arguments: --promt x",
        ),
        (["run", "{run}", "Once"], 1, "a folder; the engine runs one file, which `tinylm export"),
        (["report", "{text}"], 1, "is a file, not the folder of a run"),
        (["telescope"], 2, "invalid choice: 'telescope'"),
        ([], 2, "required: COMMAND"),
    ],
)
def test_errors_are_one_line(args, status, said, trained, text, tmp_path, capsys):
    new = tmp_path / "new"
    places = {"new": str(new), "run": str(trained), "text": str(text)}
    got, out, err = run(*[arg.format(**places) for arg in args], capsys=capsys)
    assert (got, out) == (status, "")
    assert said in err
    assert len(err.strip().splitlines()[-1]) < 400
    assert not (new / "config.json").exists()


def test_durations_and_amounts():
    assert [options.duration(t) for t in ("90", "90s", "20m", "1.5h")] == [90, 90, 1200, 5400]
    assert [options.amount(t) for t in ("5000", "300K", "1.5M", "2b", "1_000", "49e6")] == [
        5000,
        300_000,
        1_500_000,
        2 * 10**9,
        1000,
        49 * 10**6,
    ]


def test_ctrl_c_saves_and_says_how_to_go_on(text, tmp_path):  # P6
    args = ["train", "--text", text, "--out", tmp_path / "run", *TINY[:-4], "--steps", "100000", "--batch", "2"]
    command = [sys.executable, "-m", "tinylm", *map(str, args)]
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    end = time.monotonic() + 120
    log = tmp_path / "run" / "run.jsonl"
    while time.monotonic() < end and not (log.exists() and log.stat().st_size):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert f"tinylm resume {tmp_path / 'run'}" in out
    assert list((tmp_path / "run" / "checkpoints").glob("step-*.safetensors"))


def test_the_main_job(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tinylm.story.LEAST", 5.0)  # nothing to be proud of, but soon done
    status, out, err = run("story", "--budget", "7s", "--out", tmp_path / "story", "--json", capsys=capsys)
    figures = json.loads(out)
    assert status == 0
    assert 0 < figures["floor"] < figures["bits_per_byte"] < 4  # how good depends on how busy the machine is
    assert figures["excess"] == figures["bits_per_byte"] - figures["floor"]
    assert figures["ci95"][0] < figures["bits_per_byte"] < figures["ci95"][1]
    assert figures["baselines"]["kneser_ney_5"] < figures["baselines"]["bigram"] < figures["baselines"]["unigram"]
    assert figures["story"].strip()
    assert figures["outcome"] == "done"
    assert "this model" in err
    status, out, _ = run("generate", figures["folder"], "--tokens", "10", capsys=capsys)
    assert status == 0


def test_the_main_job_on_your_own_text(text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tinylm.story.LEAST", 5.0)
    args = ["story", "--budget", "6s", "--text", text, "--preset", "50K", "--out", tmp_path / "own", "--json"]
    status, out, err = run(*args, capsys=capsys)
    assert status == 0, err
    assert json.loads(out)["floor"] is None
    few = tmp_path / "few.txt"
    few.write_text("One story alone.")
    status, _, err = run("story", "--budget", "20s", "--text", few, "--out", tmp_path / "few", capsys=capsys)
    assert status == 1
    assert "too few" in err or "empty" in err


def test_paragraphs_as_documents(tmp_path, capsys):
    book = tmp_path / "book.txt"
    book.write_text("\n\n".join(World().texts(40)).replace("\n\n\n", "\n\n"))
    args = ["tokens", book, "--vocab", "512", "--out"]
    status, _, err = run(*args, tmp_path / "one", capsys=capsys)
    assert status == 1
    assert r"--separator '\n\n'" in err
    status, out, _ = run(*args, tmp_path / "many", "--separator", r"\n\n", "--json", capsys=capsys)
    assert status == 0
    assert json.loads(out)["documents_read"] > 100
    assert options.escaped(r"a\n\tbé<|x|>漢") == "a\n\tbé<|x|>漢"
