"""A run folder that survives kill -9, full disks and flipped bits.

    config.json                              {"format", "model", "train", "data", "tokenizer": its sha256, "versions",
                                             "circumstances": what its bits depend on besides, "seal": the sha256
                                             of all that, as json with sorted keys}
    tokenizer.json                           when the run has one
    run.jsonl                                one json object per logged step
    checkpoints/step-00000100.safetensors    the whole state after step 100, see `store`
    lock                                     held by the one process that writes

Files of other names are never read, listed or touched.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tinylm.config import Codec, ModelConfig, TrainConfig
from tinylm.folder import (
    FORMAT,
    INVISIBLE,
    Lock,
    RunLocked,
    circumstances,
    contents,
    is_run,
    naming,
    parsed,
    pretty,
    read_config,
    read_tokenizer,
    require_unchanged,
    versions,
)
from tinylm.reading import regular
from tinylm.shards import sealed
from tinylm.store import (
    LEFTOVER,
    CheckpointDamaged,
    PathLike,
    StateMismatch,
    clear_leftovers,
    leftover,
    named_errors,
    read_file,
    sync_folder,
    verify_file,
    write_bytes,
    write_file,
)
from tinylm.tokenizer import Tokenizer

STEP = re.compile(r"step-([0-9]{8,})\.safetensors")
# what a crash inside `create` may leave, and the token shards that were made for this run
OURS_BEFORE_CONFIG = {"lock", "tokenizer.json", "run.jsonl", "checkpoints", "data"}


class Run:
    """One run folder. Reading needs no lock and may go on while another process writes; writing takes the lock.

    Attributes:
        folder: its path. model, train: the configs. data: what the batches were, as json.
        last_saved_step: newest step known to be whole on disk, from `save` or `restore`; None before either.
    """

    def __init__(self, folder: PathLike, config: Mapping[str, Any], lock: Lock | None):
        self.folder = Path(folder)
        self._adopt(config)
        self.last_saved_step: int | None = None
        self._lock = lock
        self._sound: dict[int, tuple] = {}  # step -> the signature its file had when every byte was checked
        self._unwritten = b""  # lines of the log that the disk has refused so far

    def _adopt(self, config: Mapping[str, Any]) -> None:
        with naming(self.folder / "config.json"):
            self.model = ModelConfig.from_dict(config["model"])
            self.train = TrainConfig.from_dict(config["train"])
        self.data: dict[str, Any] = config["data"]
        self._config = dict(config)

    @classmethod
    def create(
        cls,
        folder: PathLike,
        *,
        model: ModelConfig,
        train: TrainConfig,
        tokenizer: Tokenizer | None = None,
        data: Mapping[str, Any] | None = None,
    ) -> Run:
        """A new run, open for writing. Raises FileExistsError for a folder that holds anything, RunLocked."""
        folder = Path(folder)
        config = sealed(
            {
                "format": FORMAT,
                "model": model.to_dict(),
                "train": train.to_dict(),
                "data": _finite(data or {}),
                "tokenizer": tokenizer.sha256 if tokenizer else None,
                "versions": versions(),
                "circumstances": circumstances(),
            }
        )
        require_free(folder)
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        lock = Lock(folder)
        try:
            require_free(folder)  # again: another process may have made it a run before we had the lock
            clear_leftovers(folder)
            if tokenizer is not None:
                write_bytes(folder / "tokenizer.json", tokenizer.to_json().encode())
            write_bytes(folder / "run.jsonl", b"")
            sync_folder(folder.absolute().parent)
            write_bytes(folder / "config.json", pretty(config))  # last: a folder with it is a whole run
            return cls(folder, json.loads(pretty(config)), lock)
        except BaseException:
            lock.release()
            raise

    @classmethod
    def open(cls, folder: PathLike, *, write: bool = False) -> Run:
        """An existing run. With `write`, take the lock and clear what a crash left behind.

        Raises FileNotFoundError, RunLocked, CheckpointDamaged (config.json is no json), ConfigError, StateMismatch.
        """
        folder = Path(folder)
        config = read_config(folder)
        if not is_run(config):
            raise FileNotFoundError(f"{folder} is not a run folder: its config.json has no 'model' and 'train'")
        if not write:
            return cls(folder, config, None)
        lock = Lock(folder)
        try:
            run = cls(folder, read_config(folder), lock)
            require_unchanged(run._config, folder)
            (folder / "checkpoints").mkdir(exist_ok=True)
            clear_leftovers(folder)
            clear_leftovers(folder / "checkpoints")
            run._mend_log()
            return run
        except BaseException:
            lock.release()
            raise

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        steps = self.steps()
        held = f"{len(steps)} checkpoints, newest step {steps[-1]}" if steps else "no checkpoint"
        return f"Run({str(self.folder)!r}: {held})"

    def close(self) -> None:
        """Release the lock; the object can still read. Closing twice is fine."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The run's tokenizer, read anew. Raises StateMismatch if the file is not the one the run was made with."""
        return read_tokenizer(self.folder, self._config.get("tokenizer"))

    @property
    def made_with(self) -> dict[str, str]:
        """The packages, the machine and what else its bits depend on, as they were when it began."""
        found = {**self._config.get("versions", {}), **(self._config.get("circumstances") or {})}
        return {name: str(value) for name, value in found.items() if value != ""}

    def changes(self) -> list[str]:
        """What the run's bits depend on and is not as it was when it began, as `"NPROC was 2 and is 4"`."""
        then, now = self._config.get("circumstances"), circumstances()
        if type(then) is not dict:  # a run of an earlier version
            return []
        names = sorted(then.keys() | now.keys())
        return [f"{n} was {then.get(n)} and is {now.get(n)}" for n in names if then.get(n) != now.get(n)]

    def change(self, train: TrainConfig) -> None:
        """Replace the training config (a resume with more steps), on disk too."""
        self._writing()
        config = sealed({**self._config, "train": train.to_dict()})
        write_bytes(self.folder / "config.json", pretty(config))
        self._adopt(json.loads(pretty(config)))

    # --- the log ------------------------------------------------------------------------------------------------------

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one json line to run.jsonl. Floats keep every digit; NaN and infinities, not json, become null.

        Raises OSError when the disk refuses; the line is kept, and comes before the next one or the next checkpoint.
        """
        self._writing()
        if not isinstance(record, Mapping):
            raise TypeError(f"a line of the log is a mapping, such as {{'step': 1}}, not {record!r}")
        self._unwritten += (json.dumps(_finite(record), allow_nan=False) + "\n").encode()
        self._write_log()

    def _write_log(self) -> None:
        if not self._unwritten:
            return
        with named_errors(self._log, "not logged"):
            file = os.open(self._log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            try:
                before = os.fstat(file).st_size
                if os.write(file, self._unwritten) != len(self._unwritten):
                    os.ftruncate(file, before)  # a full disk: no half line may stay in front of later ones
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                self._unwritten = b""
            finally:
                os.close(file)

    def history(self) -> list[dict[str, Any]]:
        """Every record of run.jsonl, without a last line torn by a crash. CheckpointDamaged for any other bad line."""
        records = [parsed(line) for line in self._lines()]
        if records and records[-1] is None:
            records.pop()
        if None in records:
            raise CheckpointDamaged(f"{self._log} line {records.index(None) + 1} is damaged: no json object")
        return records  # type: ignore[return-value]

    def rewind(self, step: int) -> list[Path]:
        """Go back to just after `step`: cut later records from the log, set later checkpoints aside.

        Later checkpoints belong to a future that is about to be replaced; they are renamed, never deleted. Returns
        their new paths. Call it with the step that `restore` gave before training on.
        """
        self._writing()
        self._write_log()
        aside = [self._set_aside(later) for later in reversed(self.steps()) if later > step]
        if (self.last_saved_step or 0) > step:
            self.last_saved_step = step if step in self._sound else None
        kept, damaged, lines = [], None, self._lines()
        for number, line in enumerate(lines, 1):
            record = parsed(line)
            if record is None:
                damaged = damaged or number
            elif not isinstance(at := record.get("step"), int) or at <= step:
                if damaged:
                    raise CheckpointDamaged(f"{self._log} line {damaged} is damaged: no json object")
                kept.append(line + b"\n")
        if len(kept) < len(lines):
            write_bytes(self._log, b"".join(kept))
        return aside

    @property
    def _log(self) -> Path:
        return self.folder / "run.jsonl"

    def _lines(self) -> list[bytes]:
        return self._logged().splitlines()

    def _logged(self, *, follow: bool = True) -> bytes:
        try:
            return regular(self._log, None, follow=follow)
        except FileNotFoundError:
            return b""
        except ValueError as error:
            raise CheckpointDamaged(f"{self._log} is damaged: {error}") from error

    def _mend_log(self) -> None:
        """A line torn by a crash must not become the beginning of the next one."""
        with named_errors(self._log, "no log"):  # lines will be added: in this folder, not where a link leads
            data = self._logged(follow=False)
        if data and not data.endswith(b"\n"):
            good, torn = data[: data.rfind(b"\n") + 1], data[data.rfind(b"\n") + 1 :]
            write_bytes(self._log, good if parsed(torn) is None else data + b"\n")

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def path(self, step: int) -> Path:
        """Where the checkpoint of `step` is or would be."""
        return self.folder / "checkpoints" / f"step-{step:08d}.safetensors"

    def steps(self) -> list[int]:
        """Steps that have a checkpoint file, ascending, sound or not; only regular files of exactly our names count."""
        try:
            with os.scandir(self.folder / "checkpoints") as entries:
                names = [entry.name for entry in entries if entry.is_file(follow_symlinks=False)]
        except FileNotFoundError:
            return []
        found = [int(match[1]) for match in map(STEP.fullmatch, names) if match]
        return sorted(step for step in set(found) if self.path(step).name in names)

    def save(
        self,
        step: int,
        tensors: Mapping[str, Any],
        metadata: Mapping[str, Any] | None = None,
        *,
        codec: Codec = "raw",
    ) -> Path:
        """Write the checkpoint of `step`; when this returns, it and the log so far survive a power cut.

        `metadata` gets the key "step"; `codec` is that of `store.write_file`, and every checkpoint stands for itself:
        none is the difference to another one, which `prune` might delete. Later checkpoints, which `rewind` would have
        set aside, are set aside with a warning: `restore` must find this one. Raises OSError with path, free and needed
        MB; earlier checkpoints stay.
        """
        self._writing()
        if isinstance(step, bool) or not isinstance(step, int | np.integer) or step < 0:
            raise ValueError(f"step = {step!r}: must be a whole number, not negative")
        path = self.path(step)
        if path.exists() and not self._is_sound(step):
            self._set_aside(step)  # damaged ones are evidence
        self._write_log()
        self._sync_log()
        write_file(path, tensors, {**(metadata or {}), "step": step}, codec=codec)
        self._sound[step] = _signature(path)
        self.last_saved_step = step
        if later := [self._set_aside(later).name for later in self.steps() if later > step]:
            warnings.warn(f"step {step} replaces a later past, now set aside: {', '.join(later)}", stacklevel=2)
        return path

    def restore(self, step: int | None = None) -> tuple[int, dict[str, np.ndarray], dict[str, Any], list[str]]:
        """(step, tensors, metadata, notes) of one step, or of the newest sound one.

        `notes` names every damaged file passed over (they stay where they are) and how many steps that costs. Raises
        FileNotFoundError when there is none, CheckpointDamaged when none is sound or config.json was changed,
        StateMismatch for a newer format.
        """
        require_unchanged(self._config, self.folder)
        if step is not None:
            if step not in (found := self.steps()):
                raise FileNotFoundError(f"{self.folder} has no checkpoint of step {step}; it has {found or 'none'}")
            return step, *self._read(step), []
        for _ in range(10):  # a writer may remove old files between our look and our read: then look again
            notes, vanished = [], False
            for newest in reversed(found := self.steps()):
                try:
                    tensors, metadata = self._read(newest)
                except FileNotFoundError:
                    vanished = True
                except CheckpointDamaged as error:
                    notes.append(f"{error}; it is kept")
                else:
                    if notes:
                        notes.append(f"restored step {newest}: {found[-1] - newest} steps are lost")
                    return newest, tensors, metadata, notes
            if not vanished:
                break
        if notes:
            raise CheckpointDamaged(f"{self.folder} has no sound checkpoint: {'; '.join(notes)}")
        raise FileNotFoundError(f"{self.folder} has no checkpoint yet")

    def prune(self, keep: int, protect: Iterable[int] = ()) -> list[int]:
        """Delete old checkpoints; returns their steps. Stay: the `keep` newest sound ones, `protect`, damaged files.

        A file goes only after every byte of it was checked, so nothing that `save` did not write can go.
        """
        self._writing()
        if keep < 1:
            raise ValueError(f"keep = {keep}: must be at least 1, the newest sound checkpoint always stays")
        sound, stay = [step for step in self.steps() if self._is_sound(step)], set(protect)
        gone = [step for step in sound[:-keep] if step not in stay]
        for step in gone:
            trash = leftover(self.folder / "checkpoints", "trash")
            os.replace(self.path(step), trash)  # out of sight first: a half-deleted file is never listed
            os.unlink(trash)
            self._sound.pop(step, None)
        return gone

    def _read(self, step: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        signature = _signature(self.path(step))
        tensors, metadata = read_file(self.path(step))
        self._check_step(step, metadata)
        self._sound[step] = signature
        self.last_saved_step = max(step, self.last_saved_step or 0)
        return tensors, metadata

    def _is_sound(self, step: int) -> bool:
        try:
            signature = _signature(self.path(step))
            if self._sound.get(step) != signature:
                self._check_step(step, verify_file(self.path(step)))
                self._sound[step] = signature
        except (CheckpointDamaged, StateMismatch, FileNotFoundError):
            return False
        return True

    def _check_step(self, step: int, metadata: Mapping[str, Any]) -> None:
        if metadata.get("step") != step:
            raise CheckpointDamaged(f"{self.path(step)} is damaged: it holds step {metadata.get('step')} (renamed?)")

    def _set_aside(self, step: int) -> Path:
        number, path = 1, self.path(step)
        while (aside := path.with_name(f"{path.name}.aside-{number}")).exists():
            number += 1
        os.rename(path, aside)
        sync_folder(path.parent)
        self._sound.pop(step, None)
        return aside

    def _sync_log(self) -> None:
        with named_errors(self._log, "not on the disk yet"):
            file = os.open(self._log, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            try:
                os.fsync(file)
            finally:
                os.close(file)

    def _writing(self) -> None:
        if self._lock is None:
            raise RunLocked(f"{self.folder} is open for reading only: Run.open(folder, write=True)")
        self._lock.require()


def require_free(folder: Path) -> None:
    """Raise FileExistsError unless a run can begin here: no such folder, an empty one, or what a failed start left."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f"{folder} is a file, and a run needs a folder: take another `out`")
    names = {name for name in os.listdir(folder) if not LEFTOVER.fullmatch(name)} - INVISIBLE
    if "config.json" in names and is_run(read_config(folder)):
        raise FileExistsError(
            f"{folder} holds a run already: take another `out`, or go on with `tinylm resume {folder}`"
        )
    checkpoints = folder / "checkpoints"
    if names - OURS_BEFORE_CONFIG or (checkpoints.is_dir() and any(checkpoints.iterdir())):
        raise FileExistsError(f"{folder}: a new run needs an empty folder, and {contents(folder)}")


def _signature(path: Path) -> tuple[int, int, int]:
    status = os.stat(path)
    return status.st_ino, status.st_size, status.st_mtime_ns


def _finite(value: Any) -> Any:
    """json-able: arrays become lists, NaN and infinities None."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if hasattr(value, "tolist"):
        return _finite(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Tracker(Protocol):
    """Where figures go besides run.jsonl: an adapter of three methods for any experiment tracker."""

    def start(self, config: dict[str, Any]) -> None: ...
    def log(self, record: dict[str, Any]) -> None: ...
    def finish(self, outcome: str) -> None: ...


class NoTracker:
    """The tracker that keeps nothing."""

    def start(self, config: dict[str, Any]) -> None:
        """Called once, with the model's and the run's settings."""

    def log(self, record: dict[str, Any]) -> None:
        """Called with every line of run.jsonl."""

    def finish(self, outcome: str) -> None:
        """Called with "done", "interrupted", "stopped" or "diverged"."""
