"""Loading reads the given file and nothing else: no code runs, nothing is written, nobody is asked, no path followed.

Python's audit hooks report every file opened, process started, socket made and module imported meanwhile. A file that
was opened must lie in the given folder; `ACTING` lists what must not happen at all.
"""

import functools
import io
import json
import os
import pickle
import struct
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import test_checkpoint
import test_engine_file
from damage import damaged

import tinylm
from tinylm import formats
from tinylm.checkpoint import save
from tinylm.config import ModelConfig
from tinylm.data import write_tokens
from tinylm.engine import file as engine_file
from tinylm.engine.twin import Twin
from tinylm.folder import read_config
from tinylm.model import Transformer
from tinylm.shards import Tokens
from tinylm.store import read_file, write_file
from tinylm.text import documents
from tinylm.tokenizer import Tokenizer

BYTES = Tokenizer.train([], kind="byte")
MARKER = "tinylm-was-tricked"
ACTING = (  # events, or their beginnings, of what is more than reading
    "subprocess", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.startfile", "pty.", "socket.",
    "urllib.", "http.", "ftplib.", "smtplib.", "poplib.", "imaplib.", "telnetlib.", "webbrowser.", "pickle.", "shelve.",
    "ctypes.dlopen", "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.chown",
    "os.truncate", "os.putenv", "os.unsetenv", "os.kill", "os.utime", "os.setxattr", "shutil.", "tempfile.", "sqlite3.",
    "code.", "signal.", "syslog.",
)  # fmt: skip


@functools.cache
def listen():
    """From now on `tried` hears what happens; a hook cannot be taken away again."""
    sys.addaudithook(test_checkpoint.watch)


class Trick:
    """What a pickle can do when it is loaded."""

    def __reduce__(self):
        return (open, (MARKER, "w"))


def zipped(name, data):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(name, data)
    return out.getvalue()


def tarred(name, data):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        about = tarfile.TarInfo(name)
        about.size = len(data)
        archive.addfile(about, io.BytesIO(data))
    return out.getvalue()


def numpys(compressed):
    out = io.BytesIO()
    objects = np.array([Trick()], dtype=object)
    (np.savez if compressed else np.save)(out, objects, allow_pickle=True)
    return out.getvalue()


PICKLE = pickle.dumps(Trick())
WEAPONS = {  # fifteen ways in that other loaders have had
    "pickle": PICKLE,
    "old pickle": pickle.dumps(Trick(), protocol=0),
    "pickled npy": numpys(False),
    "pickled npz": numpys(True),
    "torch's zip": zipped("archive/data.pkl", PICKLE),
    "zip that climbs": zipped(f"../../{MARKER}", b"x"),
    "tar that climbs": tarred(f"../../{MARKER}", b"x"),
    "absolute tar": tarred(f"/tmp/{MARKER}", b"x"),
    "python": f"open({MARKER!r}, 'w')\n".encode(),
    "yaml": f"!!python/object/apply:open [{MARKER!r}, w]\n".encode(),
    "notebook": json.dumps({"cells": [{"cell_type": "code", "source": [f"open({MARKER!r}, 'w')"]}]}).encode(),
    "json that names code": json.dumps(
        {"auto_map": {"AutoModel": "evil.Model"}, "model_type": "evil", "trust_remote_code": True}
    ).encode(),
    "json that names files": json.dumps({"file": "/etc/passwd", "weight_map": {"x": "../../secret"}}).encode(),
    "header that is huge": struct.pack("<Q", 2**62) + b"{}",
    "a template": b"{{ cycler.__init__.__globals__.os.system('touch " + MARKER.encode() + b"') }}",
}
NAMES = [
    "model.safetensors",
    "config.json",
    "tokenizer.json",
    "x.tlm",
    "x.gguf",
    "x.bin",
    "train-00000.json",
    "x.jsonl",
]


def tried(act):
    """What `act` did to the machine; refusals of the kit are what is expected."""
    listen()
    test_checkpoint.WATCHED = []
    try:
        act()
    except (ValueError, OSError):
        pass
    finally:
        seen, test_checkpoint.WATCHED = test_checkpoint.WATCHED, None
    return seen


def require_harmless(seen, allowed, where):
    """Files of `allowed` were opened, to read; no module came from there; nothing else was done."""
    ours = (str(Path(tinylm.__file__).parent), sys.prefix, sys.base_prefix, "/proc/self")  # lazy imports
    for event, args in seen:
        if event == "open":
            path, _, flags = args
            assert not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT), (where, args)
            assert isinstance(path, int) or str(path).startswith((str(allowed), *ours)), (where, args)
        elif event == "import":
            assert not str(args[1] or "").startswith(str(allowed)), (where, args)
        else:
            assert not event.startswith(ACTING), (where, event, args)


def loaders(folder):
    """Every door that takes a file of somebody else's."""
    yield "load", lambda: tinylm.load(folder)
    for name in NAMES:
        yield f"load {name}", lambda name=name: tinylm.load(folder / name)
    yield "tokenizer", lambda: Tokenizer.load(folder)
    yield "tokens", lambda: Tokens.open(folder, verify=True)
    yield "texts", lambda: list(documents(folder / "x.jsonl"))
    yield "engine", lambda: Twin(folder / "x.tlm")
    yield "state", lambda: read_file(folder / "model.safetensors")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The working directory, where a trick would leave its mark."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    yield tmp_path
    assert not list(tmp_path.rglob(MARKER))
    assert not Path("/tmp", MARKER).exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("weapon", WEAPONS)
def test_weapons_do_nothing(weapon, place):  # P28
    folder = place / "given"
    folder.mkdir()
    for name in NAMES:
        (folder / name).write_bytes(WEAPONS[weapon])
    for name in ("json.py", "numpy.py", "__init__.py", "sitecustomize.py", "modeling_evil.py"):
        (folder / name).write_text(f"open({MARKER!r}, 'w')")
    for name, act in loaders(folder):
        require_harmless(tried(act), folder, (weapon, name))


def test_links_and_names_lead_nowhere(place):  # P28
    """What a file names is a name, never a path; a tensor may be called anything."""
    secret = place / "secret.safetensors"
    write_file(secret, {"x": np.zeros(2, np.float32)}, {})
    folder = place / "given"
    folder.mkdir()
    names = {"../../escape": np.ones(2, np.float32), "/tmp/absolute": np.ones(1), "a\nb": np.ones(1), "..": np.ones(1)}
    write_file(folder / "model.safetensors", names, {"file": "../secret.safetensors"})
    seen = tried(lambda: read_file(folder / "model.safetensors"))
    require_harmless(seen, folder, "names")
    assert sorted(path.name for path in place.rglob("*")) == ["given", "model.safetensors", "secret.safetensors"]
    about = {"file": "../secret.safetensors", "sha256": secret.read_bytes()[34:98].decode()}
    for index in ({"weight_map": {"x": "../secret.safetensors"}}, {"weight_map": {"x": str(secret)}}, about):
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
        (folder / "model.safetensors").unlink(missing_ok=True)
        require_harmless(tried(lambda: tinylm.load(folder)), folder, index)


def check_a_folder(tmp_path):
    folder = tmp_path / "given"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "json.py").write_text("raise SystemExit('ran')")
    seen = tried(lambda: read_config(folder))
    assert {args[0] for event, args in seen if event == "open"} == {str(folder / "config.json")}


def test_a_folder_s_own_code_is_left_alone(tmp_path):  # P28
    check_a_folder(tmp_path)


def good_files(folder):
    """One sound file of each kind, with what reads it."""
    model = Transformer(ModelConfig(vocab=BYTES.vocab, context=8, width=8, layers=1, heads=2), tokenizer=BYTES)
    save(model, folder / "model")
    write_tokens(["one text", "another"], BYTES, folder / "tokens")
    engine_file.write(folder / "x.tlm", test_engine_file.CONSTANTS, test_engine_file.tensors())
    (folder / "x.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    return {
        "model/model.safetensors": lambda: tinylm.load(folder / "model"),
        "model/config.json": lambda: tinylm.load(folder / "model"),
        "model/tokenizer.json": lambda: Tokenizer.load(folder / "model"),
        "tokens/train-00000.json": lambda: Tokens.open(folder / "tokens"),
        "tokens/train-00000.bin": lambda: Tokens.open(folder / "tokens"),
        "x.tlm": lambda: Twin(folder / "x.tlm"),
        "x.jsonl": lambda: list(documents(folder / "x.jsonl")),
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("count", [12, pytest.param(150, marks=pytest.mark.slow)])
def test_damaged_files_of_every_kind_open_nothing_else(count, place):  # P28
    kinds = good_files(place)
    tried(kinds["model/config.json"])  # what is imported at first use
    refused = 0
    for name, act in kinds.items():
        whole = (place / name).read_bytes()
        require_harmless(tried(act), place, name)
        for case, bad in damaged(whole, count, seed=len(name)):
            (place / name).write_bytes(bad)
            seen = tried(act)
            require_harmless(seen, place, (name, case))
            refused += 1
        (place / name).write_bytes(whole)
    assert refused == count * len(kinds)


def test_there_is_no_door_that_trusts():  # P28
    """No setting of any loader makes it run what it reads."""
    for path in Path(tinylm.__file__).parent.rglob("*.py"):
        text = path.read_text()
        for word in ("trust_remote_code=True", "weights_only=False", "allow_pickle=True", "extractall", "yaml.load"):
            assert word not in text, path
    assert formats.HUB == "hf:"
