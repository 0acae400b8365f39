"""Model cards, and pull and push against a small hub of our own on this machine."""

import base64
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

import tinylm
from tinylm.config import ModelConfig, TrainConfig
from tinylm.formats import hf
from tinylm.formats.hub import pull
from tinylm.formats.tables import FormatError
from tinylm.model import Transformer
from tinylm.run import Run
from tinylm.sharing import card, push
from tinylm.tokenizer import Tokenizer
from tinylm.weights import named

TOKENIZER = Tokenizer.train([], kind="byte")
CONFIG = ModelConfig(vocab=TOKENIZER.vocab, context=16, width=8, layers=2, heads=2)
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def model():
    return Transformer(CONFIG, rngs=0, tokenizer=TOKENIZER)


@pytest.fixture
def run(model, tmp_path):
    """A run folder, with the provenance of its data beside it."""
    shards = tmp_path / "private" / "shards"
    shards.mkdir(parents=True)
    counted = {"documents": 1234, "bytes": 56789, "sha256": "a" * 64, "tokens": 4321}
    about = {"wish": {"sources": ["world"]}, "documents_read": 1300, "bytes_read": 60000, "train": counted}
    about |= {"duplicates": {"exact": 17}, "contamination": {"overlapping": 5}}
    (shards / "provenance.json").write_text(json.dumps(about))
    data = {"train": {"folder": str(shards), "split": "train", "sha256": "a" * 64}}
    data |= {"valid": {"folder": str(shards), "split": "valid", "sha256": "b" * 64}}
    train = TrainConfig(steps=20, learning_rate=0.0123, batch=4)
    with Run.create(tmp_path / "story", model=CONFIG, train=train, tokenizer=TOKENIZER, data=data) as made:
        made.log({"step": 10, "loss": 3.5, "tokens": 640, "seconds": 1.5, "valid_loss": 3.25, "valid_bits": 1.125})
        made.log({"step": 20, "loss": 2.5, "tokens": 1280, "seconds": 3.0})
        made.save(20, {f"params.{name}": value for name, value in named(model).items()})
        made.log({"step": 30, "loss": 0.125, "tokens": 1920, "seconds": 4.0})  # after the newest checkpoint
    return tmp_path / "story"


# --- the card ---------------------------------------------------------------------------------------------------------


def rows(text):
    """The cells of every table."""
    cells = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {key.strip().replace("\\", ""): value.strip() for key, value in cells}


def test_card_of_a_run(run):
    text = card(run, extra={"license": "apache-2.0", "language": ["en"]}, text="Stories, told small.")
    assert text.startswith('---\nlibrary_name: "tinylm"\npipeline_tag: "text-generation"\n')
    assert '\nlicense: "apache-2.0"\nlanguage: ["en"]\n---\n' in text
    assert "\n# story\n" in text
    assert "\nStories, told small.\n" in text
    told = rows(text)
    count = sum(np.size(x) for x in named(Transformer(CONFIG)).values())
    assert told["parameters"] == f"{count:,}"
    assert (told["width"], told["layers"], told["learning_rate"], told["batch"]) == ("8", "2", "0.0123", "4")
    assert (told["last step"], told["tokens seen"]) == ("20", "1,280")
    assert told["training loss, nats per token"] == "2.5"
    assert (told["held-out bits per byte"], told["... after step"]) == ("1.125", "10")
    assert told["train, sha256 of the tokens"] == "a" * 64
    assert (told["train, documents"], told["train, tokens"], told["source"]) == ("1,234", "4,321", "world")
    assert (told["duplicates removed, exact"], told["contamination removed, overlapping"]) == ("17", "5")
    assert told["sha256"] == TOKENIZER.sha256
    assert "private" not in text  # where things lay is nobody's business
    assert f"numpy {np.__version__}" in text
    assert 'tinylm.load("story")' in text


def test_card_without_provenance_or_figures(run, model, tmp_path):
    shutil.rmtree(tmp_path / "private")
    told = rows(card(run))
    assert told["train, sha256 of the tokens"] == "a" * 64
    assert "source" not in told
    saved = tinylm.save(model, tmp_path / "saved")
    text = card(saved)
    assert "## Training" not in text
    assert "## Data" not in text
    with pytest.raises(FileNotFoundError):
        card(tmp_path)


def test_card_of_another_programs_model_says_what_it_shows(model, tmp_path):
    for path in (hf.write(model, tmp_path / "theirs"), tinylm.save(model, tmp_path / "small.gguf")):
        text = card(path)
        assert f"# {path.name}".replace("_", r"\_") in text
        told = rows(text)
        assert (told["width"], told["layers"]) == ("8", "2")
        assert told["sha256"] == tinylm.load(path).tokenizer.sha256
        assert "## Training" not in text
        assert "## Data" not in text


@pytest.mark.parametrize("moved", [False, True])
def test_card_of_a_run_with_its_data_in_it(run, moved, tmp_path):
    """As `tinylm train --text world` leaves it: the data lies in the run's folder, which may be moved."""
    (tmp_path / "private" / "shards").rename(run / "data")
    about = json.loads((run / "data" / "provenance.json").read_text())
    about["valid"] = {"documents": 77, "bytes": 888, "sha256": "b" * 64, "tokens": 99}
    (run / "data" / "provenance.json").write_text(json.dumps(about))
    raw = json.loads((run / "config.json").read_text())
    for part in raw["data"].values():
        part["folder"] = str(tmp_path / "private" / "shards") if moved else "data"
    (run / "config.json").write_text(json.dumps(raw))
    told = rows(card(run))
    assert [told[f"train, {key}"] for key in ("documents", "bytes", "tokens")] == ["1,234", "56,789", "4,321"]
    assert [told[f"valid, {key}"] for key in ("documents", "bytes", "tokens")] == ["77", "888", "99"]
    assert told["source"] == "world"


def test_provenance_of_other_data_is_not_claimed(run, tmp_path):
    path = tmp_path / "private" / "shards" / "provenance.json"
    path.write_text(path.read_text().replace("a" * 64, "c" * 64))
    assert "source" not in rows(card(run))


def test_text_of_a_user_is_no_markup(run):
    evil = "<script>alert(1)</script> | [x](http://y) \n---\n# head `code` **bold**"
    text = card(run, text=evil, name=evil, extra={"license": "x\n---\n# y: {", "note": evil})
    assert "<script>" not in text.partition("\n---\n")[2]
    head = text.split("\n---\n")[0].splitlines()
    assert len(head) == 6  # the user's newlines made no line
    assert json.loads(head[-1].partition(": ")[2]) == evil
    body = text.partition("\n---\n")[2]
    assert "\n---" not in body
    assert "\n# head" not in body
    assert "\\[x\\](http" in body
    with pytest.raises(ValueError, match="letters, digits"):
        card(run, extra={"a: b\n---": 1})
    with pytest.raises(ValueError, match="json"):
        card(run, extra={"a": object()})


# --- the hub ----------------------------------------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """The few answers of a hub that pull and push ask for; repositories live in `server.files`, by name."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        headers = {"Content-Length": str(len(body)), "X-Request-Id": "test", **headers}
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        path, files = self.path.partition("?")[0].strip("/"), self.server.files
        self.server.asked.append(path)
        parts = path.removeprefix("api/models/").split("/")
        name, rest = "/".join(parts[:2]), parts[2:]
        if name == "me/gated":
            return self.answer(403, {}, X_Error_Code="GatedRepo")
        if name not in files:
            return self.answer(404, {}, X_Error_Code="RepoNotFound")
        if len(rest) > 1 and rest[1] not in ("main", COMMIT):
            return self.answer(404, {}, X_Error_Code="RevisionNotFound")
        if path.startswith("api/") and rest[:1] in ([], ["revision"]):
            siblings = [{"rfilename": file} for file in files[name]]
            return self.answer(200, {"id": name, "sha": COMMIT, "siblings": siblings})
        if path.startswith("api/") and rest[0] == "tree":
            listed = [{"type": "file", "path": p, "size": len(x), "oid": "0" * 40} for p, x in files[name].items()]
            return self.answer(200, listed)
        if rest[:1] == ["resolve"] and rest[2] in files[name]:
            body = files[name][rest[2]]
            return self.answer(200, body, ETag=f'"{len(body):040}"', X_Repo_Commit=COMMIT)
        return self.answer(404, {}, X_Error_Code="EntryNotFound")

    do_HEAD = do_GET

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != "Bearer hf_test":
            return self.answer(401, {})
        path = self.path.partition("?")[0]
        if path == "/api/repos/create":
            wish = json.loads(body)
            name = f"{wish['organization']}/{wish['name']}" if wish.get("organization") else f"me/{wish['name']}"
            self.server.private[name] = wish.get("private", wish.get("visibility") == "private")  # old, new
            self.server.files.setdefault(name, {})
            return self.answer(200, {"url": f"{self.server.url}/{name}", "name": name})
        if path == "/api/validate-yaml":
            return self.answer(200, {"warnings": [], "errors": []})
        name = "/".join(path.split("/")[3:5])
        if "/preupload/" in path:
            wanted = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": wanted})
        if "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"{self.server.url}/{name}/commit/{COMMIT}"
            return self.answer(200, {"commitUrl": url, "commitOid": COMMIT, "success": True})
        return self.answer(404, {})


@pytest.fixture
def server(monkeypatch):
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed: there is nothing to pull with")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.private, server.asked = {}, {}, []
    server.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def published(server, model, tmp_path):
    """me/small on the hub: a model, and things that must not be fetched."""
    files = {path.name: path.read_bytes() for path in hf.write(model, tmp_path / "made").iterdir()}
    files |= {"modeling_evil.py": b"import os", "pytorch_model.bin": b"\x80\x04", "onnx/model.onnx": b"x"}
    server.files["me/small"] = files
    return server


def test_pull_fetches_the_model_and_nothing_else(published, model, tmp_path):
    folder = pull("me/small", cache=tmp_path / "cache")
    assert sorted(path.name for path in folder.iterdir()) == sorted(hf.OURS)
    back = hf.read(folder)
    assert all(np.array_equal(x, named(model)[name]) for name, x in named(back).items())
    assert back.tokenizer == TOKENIZER
    assert not [path for path in published.asked if path.endswith((".py", ".bin", ".onnx"))]
    assert pull("me/small", "main", cache=tmp_path / "cache") == folder


def test_pull_without_a_network_uses_what_is_there(published, tmp_path, monkeypatch):
    folder = pull("me/small", cache=tmp_path / "cache")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert pull("me/small", cache=tmp_path / "cache") == folder
    with pytest.raises(FormatError, match=r"me/other could not be fetched from http://127\.0\.0\.1:9"):
        pull("me/other", cache=tmp_path / "cache")


def test_what_pull_refuses(published, tmp_path):
    published.files["me/pickled"] = {"config.json": b"{}", "pytorch_model.bin": b"\x80\x04"}
    published.files["me/empty"] = {"README.md": b""}
    published.files["me/bare"] = {"model.safetensors": b""}
    for name, message in {
        "me/none": r"no repository 'me/none' at http://127.*hf auth login",
        "me/gated": "its owner must let you in",
        "me/pickled": r"only as a pickle \(pytorch_model\.bin\).*can run any code",
        "me/empty": r"has no model\.safetensors; it holds README\.md",
        "me/bare": r"has no config\.json",
        "../etc": "is no name of a repository",
        "a/b/c": "is no name of a repository",
        "": "is no name of a repository",
    }.items():
        with pytest.raises(FormatError, match=message):
            pull(name, cache=tmp_path / "cache")
    with pytest.raises(FormatError, match="has no revision 'v9'"):
        pull("me/small", "v9", cache=tmp_path / "cache")


def test_push_and_pull_again(server, run, model, tmp_path):
    address = push(run, "me/story", extra={"license": "mit"})
    assert address == f"{server.url}/me/story"
    assert server.private["me/story"] is True
    assert sorted(server.files["me/story"]) == sorted([*hf.OURS, "README.md"])
    about = server.files["me/story"]["README.md"].decode()
    assert 'library_name: "transformers"' in about
    assert 'tinylm.load("hf:me/story")' in about
    assert 'license: "mit"' in about
    back = hf.read(pull("me/story", cache=tmp_path / "cache"))
    assert all(np.array_equal(x, named(model)[name]) for name, x in named(back).items())


def test_push_in_our_own_format(server, model, tmp_path):
    saved = tinylm.save(model, tmp_path / "saved")
    push(saved, "me/own", private=False, format="tinylm")
    assert server.private["me/own"] is False
    assert 'tinylm.load(pull("me/own"))' in server.files["me/own"]["README.md"].decode()
    back = tinylm.load(pull("me/own", cache=tmp_path / "cache"))
    assert all(np.array_equal(x, named(model)[name]) for name, x in named(back).items())


def test_push_of_another_programs_model_in_half_floats(server, model, tmp_path, monkeypatch):
    loads = []
    load = tinylm.load
    monkeypatch.setattr("tinylm.sharing.load", lambda *args, **more: loads.append(args) or load(*args, **more))
    for path in (tinylm.save(model, tmp_path / "small.gguf"), hf.write(model, tmp_path / "theirs")):
        push(path, "me/half", dtype="bf16")
        assert json.loads(server.files["me/half"]["config.json"])["dtype"] == "bfloat16"
        assert "sha256" in rows(server.files["me/half"]["README.md"].decode())
        assert len(loads) == 1  # the card does not load it once more
        loads.clear()
    for format, option in (("hf", "codec"), ("tinylm", "dtype")):
        with pytest.raises(FormatError, match=f"no option '{option}'"):
            push(tmp_path / "theirs", "me/odd", format=format, **{option: "float16"})
    assert "me/odd" not in server.files


def test_what_push_refuses(server, run, tmp_path, monkeypatch):
    with pytest.raises(FormatError, match="no name of a repository"):
        push(run, "a/b/c")
    with pytest.raises(FormatError, match="must be hf or tinylm"):
        push(run, "me/x", format="gguf")
    odd = tinylm.save(Transformer(CONFIG.replace(softcap=5.0)), tmp_path / "odd")
    with pytest.raises(FormatError, match="softcap"):
        push(odd, "me/x")
    assert server.files == {}
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(FormatError, match="me/x"):
        push(run, "me/x")
