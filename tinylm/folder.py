"""What a folder of ours says about itself: its config.json, its tokenizer.json, and who is writing there.

POSIX only: the lock is `flock`.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import functools
import importlib.metadata
import json
import os
import platform
import socket
import stat
import sys
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tinylm.config import ConfigError
from tinylm.reading import regular
from tinylm.shards import UNSEAL, seal_broken
from tinylm.store import CheckpointDamaged, StateMismatch, named_errors
from tinylm.tokenizer import Tokenizer

FORMAT = 1
INVISIBLE = {".ipynb_checkpoints", ".DS_Store"}


class RunLocked(RuntimeError):
    """Somebody else writes this run; the message names the process, its host and since when."""


class Lock:
    """The one writer's lock on a folder; `release` frees it, as do garbage collection and the end of the process.

    The kernel frees the flock of a dead process, so a lock never outlives its holder; the json in the file only says
    who holds it. Raises RunLocked, or OSError where the file system cannot lock.
    """

    def __init__(self, folder: Path):
        path = folder / "lock"
        # What is written below must not go where a link in somebody else's folder leads.
        with named_errors(path, "no lock"):
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        if not stat.S_ISREG(os.fstat(file).st_mode):
            os.close(file)
            raise OSError(errno.EINVAL, "not a regular file; no lock", str(path))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = parsed(os.pread(file, 4096, 0)) or {}
            os.close(file)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise OSError(error.errno, f"cannot lock: {error.strerror}", str(path)) from error
            pid = holder.get("pid", "unknown")
            itself = ", this very process (close it with trainer.run.close())," if pid == os.getpid() else ""
            raise RunLocked(
                f"{folder} is being written by process {pid}{itself} on host {holder.get('host', 'unknown')} "
                f"since {holder.get('start', 'unknown')}"
            ) from None
        self.path, self.file = path, file
        self.release = weakref.finalize(self, _unlock, file, os.getpid())
        start = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        with named_errors(path, "no lock"):
            os.ftruncate(file, 0)
            os.pwrite(file, json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "start": start}).encode(), 0)

    def require(self) -> None:
        """Raise RunLocked when the file was deleted and is another one by now, which somebody else may hold."""
        with contextlib.suppress(FileNotFoundError):  # nobody else has begun
            if not os.path.samestat(os.fstat(self.file), os.lstat(self.path)):
                raise RunLocked(
                    f"{self.path} was replaced, so another process may write there; this one no longer does"
                )


def _unlock(file: int, owner: int) -> None:
    if os.getpid() == owner:  # a forked child has a copy of the descriptor; unlocking there would unlock its parent
        with contextlib.suppress(OSError):
            os.ftruncate(file, 0)  # so that nobody is told of us when the next holder has not signed yet
        fcntl.flock(file, fcntl.LOCK_UN)
    os.close(file)


def versions() -> dict[str, str]:
    """What made a file: packages, Python, machine."""
    return dict(_versions())


@functools.cache  # nothing of it changes while a process runs
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}"}
    for name in ("tinylm", "jax", "jaxlib", "flax", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def circumstances() -> dict[str, str]:
    """What the bits of a run depend on besides its settings and data.

    On a CPU that is its model, the instructions of our kernels, and how many threads XLA cuts a large product for: the
    cores it may use, or NPROC. AdamW on our kernels gives the same bits for any number, Muon and plain JAX do not.
    """
    import jax

    from tinylm import ops

    device = jax.devices()[0]
    found = {name: version for name, version in versions().items() if name in ("machine", "tinylm", "jax", "jaxlib")}
    found |= {"device": f"{jax.device_count()} x {device.device_kind}", "XLA_FLAGS": os.environ.get("XLA_FLAGS", "")}
    if device.platform == "cpu":
        found |= {"processor": _processor(), "kernels": ops.kernels() if ops.native() else "", "NPROC": _cores()}
    return found


@functools.cache
def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _cores() -> str:
    visible = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return os.environ.get("NPROC") or str(visible)


def pin(folder: Path) -> None:
    """Let XLA cut its work for as many threads as when the run began. It asks once: with JAX here nothing is done."""
    if "jax" not in sys.modules:
        with contextlib.suppress(OSError, ValueError):  # whoever opens the run says what is wrong with it
            then = read_config(folder).get("circumstances", {})
            if str(then.get("NPROC", "")).isdigit():
                os.environ.setdefault("NPROC", str(then["NPROC"]))


def read_config(folder: Path) -> dict[str, Any]:
    """A folder's config.json. Raises FileNotFoundError, CheckpointDamaged (no json object), StateMismatch (newer)."""
    path = folder / "config.json"
    try:
        config = json.loads(regular(path))
    except NotADirectoryError:
        raise FileNotFoundError(f"{folder} is a file, not the folder of a run") from None
    except FileNotFoundError:
        raise FileNotFoundError(f"{folder} has no config.json; {contents(folder)}") from None
    except IsADirectoryError:
        raise CheckpointDamaged(f"{path} is a folder, and should be a file") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointDamaged(f"{path} is damaged: {error}") from error
    if type(config) is not dict:
        raise CheckpointDamaged(f"{path} is damaged: it holds no json object")
    if type(config.get("format")) is int and config["format"] > FORMAT:
        raise StateMismatch(f"{path} has format {config['format']}, this tinylm reads up to {FORMAT}: update tinylm")
    return config


def require_unchanged(config: Mapping[str, Any], folder: Path) -> None:
    """Raise CheckpointDamaged unless a run's config.json is what was written: one bit can turn 0.1 into 0.5."""
    if seal_broken(config):
        path = folder / "config.json"
        raise CheckpointDamaged(f"{path} was changed after it was written: damaged, or edited; if it was you, {UNSEAL}")


def is_run(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is a run's (and not that of a saved model, or of somebody else)."""
    return all(type(config.get(key)) is dict for key in ("model", "train", "data"))


def read_tokenizer(folder: Path, sha256: str | None) -> Tokenizer | None:
    """The folder's tokenizer, which must be the one `config.json` names; None when it names none."""
    if sha256 is None:
        return None
    path = folder / "tokenizer.json"
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise CheckpointDamaged(f"{path} is damaged: it is not a regular file")
    tokenizer = Tokenizer.load(path)
    if tokenizer.sha256 != sha256:
        raise StateMismatch(f"{path} is another tokenizer: sha256 {tokenizer.sha256}, not {sha256}")
    return tokenizer


def contents(folder: Path) -> str:
    """`"it holds a, b, c"`, for messages."""
    if not folder.exists():
        return "there is no such folder"
    names = sorted(set(os.listdir(folder)) - INVISIBLE)
    return f"it holds {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}" if names else "it is empty"


def pretty(config: Mapping[str, Any]) -> bytes:
    """The text of a config.json."""
    return (json.dumps(config, indent=2) + "\n").encode()


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Say which file held a setting that cannot be used."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def parsed(line: bytes) -> dict[str, Any] | None:
    """The json object in `line`, or None."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if type(record) is dict else None
