"""`tinylm export`, `run` and `serve`: their arguments reach the engine, the quick way and argparse's are one."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest

import tinylm.__main__
import tinylm.engine
from tinylm import cli, native
from tinylm.engine import Engine, command
from tinylm.engine.serve import Server
from tinylm.markup import plain

ROOT = Path(__file__).parents[1]


class Echo:
    """An engine that says what it was asked."""

    asked: list = []  # noqa: RUF012

    def __init__(self, path, **opening):
        if path == "nowhere.tlm":
            raise FileNotFoundError("no file 'nowhere.tlm'")
        self.path, self.opening = path, opening

    def stream(self, prompt="", **settings):
        Echo.asked.append((self.path, self.opening, prompt, settings))
        if settings.get("temperature", 1) < 0:
            raise ValueError("temperature = -1.0: must not be negative")
        yield " upon"
        if prompt == "Slow":
            raise KeyboardInterrupt
        if prompt == "Warn":
            warnings.warn("no native library", stacklevel=1)
        yield " a time\n\x1b[31mred"

    def generate(self, prompt="", **settings):
        return prompt + "".join(self.stream(prompt, **settings))

    def ids(self, prompt="", **settings):
        yield from range(3)

    def piece(self, token):
        return (b" upon", b" a", b" time")[token]

    prefix = ""

    def encode(self, text):
        return text.split()


@pytest.fixture(autouse=True)
def echo(monkeypatch):
    monkeypatch.setattr(tinylm.engine, "Engine", Echo, raising=False)
    Echo.asked.clear()


def run(*args, capsys, monkeypatch=None):
    """(exit status, stdout, stderr); with monkeypatch through the entry point, where `run` has its quick way."""
    try:
        if monkeypatch:
            monkeypatch.setattr(sys, "argv", ["tinylm", *map(str, args)])
            tinylm.__main__.main()
        else:
            cli.main([str(arg) for arg in args])
        status = 0
    except SystemExit as stop:
        status = stop.code or 0
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return status, out, err


EVERYTHING = {
    "tokens": ("5", 5),
    "seed": ("7", 7),
    "temperature": ("0.5", 0.5),
    "top_k": ("40", 40),
    "top_p": ("0.9", 0.9),
    "min_p": ("0.1", 0.1),
    "repetition_penalty": ("1.1", 1.1),
    "threads": ("2", 2),
    "speculate": ("0", 0),
    "cache": ("int8", "int8"),
    "kernels": ("scalar", "scalar"),
    "draft": ("small.tlm", "small.tlm"),
}


def test_every_option_reaches_the_engine_both_ways(capsys, monkeypatch):
    words = [word for name, (text, _) in EVERYTHING.items() for word in (f"--{name.replace('_', '-')}", text)]
    values = {name: value for name, (_, value) in EVERYTHING.items()}
    opening = {name: values[name] for name in ("threads", "cache", "speculate", "kernels", "draft")}
    settings = {name: value for name, value in values.items() if name not in opening}
    assert command.plainly(["s.tlm", *words]) == {"path": "s.tlm", **values}
    for prompt in (["Once"], ["--prompt", "Once"]):
        for quick in (None, monkeypatch):
            status, out, _ = run("run", "s.tlm", *prompt, *words, capsys=capsys, monkeypatch=quick)
            assert status == 0
            assert out.startswith("Once upon a time\n")
    assert Echo.asked == [("s.tlm", opening, "Once", settings)] * 4
    assert set(EVERYTHING) == set(command.PLAIN) - {"prompt"}


def test_what_was_not_asked_is_left_to_the_engine(capsys, monkeypatch):
    for quick in (None, monkeypatch):
        run("run", "s.tlm", capsys=capsys, monkeypatch=quick)
    assert Echo.asked == [("s.tlm", {}, "", {})] * 2


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--help"],
        ["s.tlm", "--tokens"],
        ["s.tlm", "--tokens", "few"],
        ["s.tlm", "--tokens", "1K"],
        ["s.tlm", "--tokens=5"],
        ["s.tlm", "--seed", "-1"],
        ["s.tlm", "--top_k", "5"],
        ["s.tlm", "--tokens", "1", "--tokens", "2"],
        ["s.tlm", "Once", "--prompt", "Twice"],
        ["s.tlm", "--prompt", "Twice", "Once"],
        ["s.tlm", "Once", "more"],
        ["s.tlm", "--json"],
        ["s.tlm", "--stop", "x"],
        ["s.tlm", "--no-screen"],
        ["s.tlm", "--", "x"],
        ["s.tlm", "-x"],
        ["--prompt", "Once"],
    ],
)
def test_what_is_not_plain_goes_to_argparse(words):
    assert command.plainly(words) is None


def test_spellings_of_argparse(capsys):
    args = ["--tokens=1K", "--no-screen", "--stop", "a", "--stop", "b", "--seed", "-1"]
    assert run("run", "s.tlm", *args, capsys=capsys)[0] == 0
    assert Echo.asked == [("s.tlm", {"screen": False}, "", {"tokens": 1000, "seed": -1, "stop": ["a", "b"]})]


def test_the_terminal_is_safe(capsys, monkeypatch):
    _, out, _ = run("run", "s.tlm", "caf\u00e9 \u202e\u200d", capsys=capsys, monkeypatch=monkeypatch)
    assert out == "caf\u00e9 \\u202e\u200d upon a time\n\u241b[31mred\n"


def test_run_as_json(capsys):
    status, out, _ = run("run", "s.tlm", "Once", "--json", capsys=capsys)
    figures = json.loads(out)
    assert status == 0
    assert figures["prompt"] == "Once"
    assert figures["text"] == "Once upon a time\n\x1b[31mred"
    assert figures["seconds"] > 0


def test_errors_are_one_line(capsys, monkeypatch):
    for quick in (None, monkeypatch):
        assert run("run", "nowhere.tlm", capsys=capsys, monkeypatch=quick) == (
            1,
            "",
            "tinylm: no file 'nowhere.tlm'\n",
        )
        status, out, err = run("run", "s.tlm", "--temperature", "-1", capsys=capsys, monkeypatch=quick)
        assert (status, out, err) == (1, "", "tinylm: temperature = -1.0: must not be negative\n")
        status, out, err = run("run", "s.tlm", "a", "--prompt", "b", capsys=capsys, monkeypatch=quick)
        assert (status, out) == (1, "")
        assert "give it once" in err
        status, out, err = run("run", "s.tlm", "--tokens", "few", capsys=capsys, monkeypatch=quick)
        assert (status, out) == (2, "")
        assert "no whole number" in err
        status, out, err = run("run", capsys=capsys, monkeypatch=quick)
        assert (status, out) == (2, "")
        assert "required: FILE" in err
        status, out, err = run("run", "s.tlm", "Slow", capsys=capsys, monkeypatch=quick)
        assert (status, out, err) == (130, "Slow upon\n", "interrupted\n")
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            status, out, err = run("run", "s.tlm", "Warn", capsys=capsys, monkeypatch=quick)
        assert (status, err) == (0, "tinylm: no native library\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model, its weights as they were drawn."""
    tokenizer = tinylm.Tokenizer.train(tinylm.World().texts(80), vocab=512)
    model = tinylm.Transformer(tinylm.preset("50K", vocab=512, context=64), tokenizer=tokenizer)
    return tinylm.save(model, tmp_path_factory.mktemp("models") / "model")


def test_export_writes_what_was_asked(folder, tmp_path, capsys):
    target = tmp_path / "story.tlm"
    status, out, _ = run("export", folder, target, "--json", capsys=capsys)
    figures = json.loads(out)
    assert status == 0
    assert figures["target"] == str(target)
    assert figures["bytes"] == target.stat().st_size
    assert {row["bits"] for row in figures["matrices"]} == {"int8"}
    assert figures["weights"] == sum(row["rows"] * row["columns"] for row in figures["matrices"])
    assert 8 < figures["bits_per_weight"] < 10
    args = ["--bits", "int4", "--group", "16", "--only", r".*\.down=int8", "--embed", "int8", "--head", "float32"]
    status, out, _ = run("export", folder, target, *args, "--json", capsys=capsys)
    bits = {row["name"]: (row["bits"], row["group"]) for row in json.loads(out)["matrices"]}
    assert bits["blocks.0.attn.q"] == ("int4", 16)
    assert bits["blocks.0.mlp.down"][0] == bits["embed"][0] == "int8"
    assert bits["head.out"][0] == "float32"
    status, out, _ = run("export", folder, target, capsys=capsys)
    assert out.startswith(f"{target}: ")
    assert "bits each" in out


def test_export_with_fixed_scales(folder, tmp_path, capsys):
    text = tmp_path / "stories.txt"
    text.write_text("\n<|endoftext|>\n".join(tinylm.World().texts(5)))
    sizes = []
    for more in ([], ["--calibration", text]):
        _, out, _ = run("export", folder, tmp_path / "s.tlm", "--json", *more, capsys=capsys)
        sizes.append(json.loads(out)["bytes"])
    assert sizes[1] > sizes[0]  # a scale for each input


def test_a_refused_export_leaves_no_file(folder, tmp_path, capsys):
    target = tmp_path / "s.tlm"
    status, out, err = run("export", folder, target, "--group", "20", capsys=capsys)
    assert (status, out) == (1, "")
    assert "group = 20" in err
    assert not target.exists()


@pytest.mark.skipif(not native.available(), reason="no native library")
def test_one_text_from_every_face(folder, tmp_path, capsys, monkeypatch):
    """`run` either way, the server at once and in pieces, and Python."""
    monkeypatch.setattr(tinylm.engine, "Engine", Engine)
    path = tmp_path / "story.tlm"
    run("export", folder, path, capsys=capsys)
    engine, prompt = Engine(path), "One day, a fox"
    settings = {"tokens": 40, "temperature": 0.9, "seed": 5}
    expected = engine.generate(prompt, **settings)
    words = ["run", path, prompt, "--tokens", "40", "--temperature", "0.9", "--seed", "5"]
    for quick in (None, monkeypatch):
        assert run(*words, capsys=capsys, monkeypatch=quick) == (0, plain(expected) + "\n", "")
    assert json.loads(run(*words, "--json", capsys=capsys)[1])["text"] == expected
    server = Server(engine, "story", port=0)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        texts = [""] * 4

        def ask(at):
            body = {"prompt": prompt, "max_tokens": 40, "temperature": 0.9, "seed": 5, "stream": bool(at % 2)}
            connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            content = connection.getresponse().read().decode()
            connection.close()
            parts = content.split("\n\n")[:-2] if at % 2 else [content]
            made = [json.loads(part.removeprefix("data: "))["choices"][0] for part in parts]
            assert made[-1]["finish_reason"] in ("stop", "length")
            texts[at] = "".join(choice["text"] for choice in made)

        threads = [threading.Thread(target=ask, args=(at,)) for at in range(4)]
        for asking in threads:
            asking.start()
        for asking in threads:
            asking.join(60)
        assert [prompt + text for text in texts] == [expected] * 4
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


@pytest.mark.parametrize("name", ["export", "run", "serve"])
def test_help_reads_well(name, capsys):
    status, out, _ = run(name, "--help", capsys=capsys)
    assert status == 0
    assert f"example: tinylm {name}" in out
    assert max(map(len, out.splitlines())) <= 110


@pytest.mark.parametrize(
    ("args", "status", "said"),
    [
        (["export", "nowhere", "x.tlm"], 1, "no file or folder 'nowhere'"),
        (["export", "a"], 2, "required: FILE"),
        (["export", "a", "b", "--bits", "int3"], 2, "invalid choice: 'int3'"),
        (["export", "a", "b", "--only", "down"], 2, "'down': write a pattern, = and a value"),
        (["serve", "nowhere.tlm"], 1, "no file 'nowhere.tlm'"),
        (["serve", "s.tlm", "--port", "99999"], 1, "cannot listen on 127.0.0.1 port 99999"),
        (["serve", "s.tlm", "--host", "no.such.host.invalid"], 1, "cannot listen on no.such.host.invalid"),
        (["serve", "s.tlm", "--seconds", "never"], 2, "no length of time"),
        (["serve", "s.tlm", "--tokens", "0"], 1, "tokens = 0: a limit is a positive number"),
    ],
)
def test_errors_of_export_and_serve(args, status, said, capsys):
    got, out, err = run(*args, capsys=capsys)
    assert (got, out) == (status, "")
    assert said in err
    assert len(err.strip().splitlines()[-1]) < 400


def test_serve_until_ctrl_c():
    code = (
        "import sys; sys.path.insert(0, 'tests'); import tinylm.engine; from test_cli_engine import Echo\n"
        "tinylm.engine.Engine = Echo\n"
        "from tinylm.__main__ import main; sys.argv = ['tinylm', 'serve', 'some/story.tlm', '--port', '0', '--json']\n"
        "main()"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=os.environ, **pipes)
    said = ""
    while not said.endswith("}\n"):
        said += process.stdout.readline()
    about = json.loads(said)
    assert about["model"] == "story"
    connection = http.client.HTTPConnection("127.0.0.1", int(re.search(r":(\d+)$", about["url"])[1]), timeout=30)
    body = json.dumps({"prompt": "Once", "max_tokens": 9, "model": "story"})
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    assert json.loads(connection.getresponse().read())["choices"][0]["text"].startswith(" upon a time")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, "")
    assert err.splitlines()[-1] == "interrupted"
    assert '"POST /v1/completions HTTP/1.1" 200' in err
