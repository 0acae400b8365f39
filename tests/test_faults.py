"""P2: at every file operation an error, a crash or a power cut; the run stays good, and a returned save stays."""

import contextlib
import errno
import os
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest

from tinylm import store
from tinylm.config import ModelConfig, TrainConfig
from tinylm.run import Run


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """The disk's own patience is not under test here: which calls are made is."""
    monkeypatch.setattr(os, "fsync", os.fstat)


def state(step):
    return {"params.w": np.full((4, 3), step, np.float32), "step": np.array(step)}


def prepared(folder):
    model, train = ModelConfig(vocab=261, width=8, layers=1, heads=1), TrainConfig(steps=100)
    run = Run.create(folder, model=model, train=train)
    for step in (1, 2):
        run.log({"step": step})
        run.save(step, state(step))
    return run


def litter(folder):
    return [p for p in Path(folder).rglob("*") if store.LEFTOVER.fullmatch(p.name)]


class Crash(BaseException):
    """The process died; nothing of it runs any more."""


class Disk:
    """Counts the file operations of `store` and `run`, fails one of them, and records what a power cut could leave.

    The record is a small file system: what each file held at its last fsync and holds now, which names were on the disk
    at the last fsync of their folder and which are in place now.
    """

    OPERATIONS = ("open", "write", "fsync", "close", "replace", "rename", "unlink", "statvfs")

    def __init__(self, base, patch, fail_at=None, fault=None):
        self.base, self.count, self.fail_at, self.fault, self.dead = Path(base), 0, fail_at, fault, False
        self.trace, self.failed = [], None
        self.real = {name: getattr(os, name) for name in self.OPERATIONS}
        self.files, self.names = {}, {}  # inode -> [durable bytes, bytes now]; path -> [durable inode, inode now]
        self.folders = {p for p in [self.base, *self.base.rglob("*")] if p.is_dir()}
        for path in (p for p in self.base.rglob("*") if p.is_file()):
            self.files[path] = [path.read_bytes(), bytearray(path.read_bytes())]
            self.names[path] = [path, path]
        self.opened = {}
        for name in self.OPERATIONS:
            patch.setattr(os, name, lambda *args, name=name, **more: self.call(name, *args, **more))

    def call(self, name, *args, **more):
        if self.dead:
            raise Crash
        index, self.count = self.count, self.count + 1
        if index == self.fail_at:
            self.failed = name
            if self.fault == "crash":
                self.dead = True
                raise Crash
            if self.fault == "torn":
                if name == "write":
                    self.done(name, (args[0], bytes(args[1])[: len(args[1]) // 2]), self.real["write"](*args))
                self.dead = True
                raise Crash
            if name == "close":
                self.real["close"](*args)  # Linux closes the descriptor even when it reports an error
            raise OSError(self.fault, os.strerror(self.fault), *[str(a) for a in args[:1] if not isinstance(a, int)])
        result = self.real[name](*args, **more)
        self.done(name, args, result)
        return result

    def done(self, name, args, result):
        if name == "open":
            path, flags = Path(args[0]), args[1]
            self.opened[result] = path
            if flags & os.O_CREAT and path not in self.names:
                inode = (path, self.count)
                self.files[inode] = [b"", bytearray()]
                self.names[path] = [None, inode]
            self.trace.append(f"open {kind(path)}")
        elif name == "write":
            self.files[self.names[self.opened[args[0]]][1]][1] += bytes(args[1])[:result]
            self.trace.append("write")
        elif name == "fsync":
            path = self.opened[args[0]]
            if path in self.folders:
                for entry in (e for p, e in self.names.items() if p.parent == path):
                    entry[0] = entry[1]
            else:
                held = self.files[self.names[path][1]]
                held[0] = bytes(held[1])
            self.trace.append(f"fsync {kind(path)}")
        elif name in ("replace", "rename"):
            source, target = map(Path, args)
            self.names.setdefault(target, [None, None])[1] = self.names[source][1]
            self.names[source][1] = None
            self.trace.append(f"rename to {kind(target)}")
        elif name == "unlink":
            self.names[Path(args[0])][1] = None
            self.trace.append("unlink")

    def after_power_cut(self, target, data, names):
        """Materialise one possible disk: `data` lost|zeros|half|kept (unsynced bytes), `names` lost|kept (unsynced)."""
        for folder in self.folders:
            (target / folder.relative_to(self.base)).mkdir(parents=True, exist_ok=True)
        for path, entry in self.names.items():
            inode = entry[names == "kept"]
            if inode is None:
                continue
            durable, now = self.files[inode]
            new = bytes(now[len(durable) :])
            tail = {"lost": b"", "zeros": bytes(len(new)), "half": new[: len(new) // 2], "kept": new}[data]
            (target / path.relative_to(self.base)).write_bytes(durable + tail)


def kind(path):
    if path.suffix == ".tmp":
        return "temporary"
    return "trash" if path.suffix == ".trash" else path.name


POWER_CUTS = [(d, n) for d in ("lost", "zeros", "half", "kept") for n in ("lost", "kept")]


def scenario(run):
    """Save, prune, rewind: every operation a writer has. Returns the steps whose save returned, as a live list."""
    returned = []

    def act():
        run.log({"step": 3})
        run.save(3, state(3))
        returned.append(3)
        run.prune(2)
        run.log({"step": 4})
        run.rewind(3)
        run.save(5, state(5))
        returned.append(5)
        run.rewind(3)

    return act, returned


def check_after(folder, returned, rewound=False):
    """What must hold on any disk a fault leaves: it opens, a sound step is there, no acknowledged one is lost."""
    with Run.open(folder, write=True) as again:
        step, tensors, _, notes = again.restore()
        assert int(tensors["step"]) == step
        assert notes == [], notes
        assert step >= max([2, *[s for s in returned if s < 5]]), (step, returned)
        assert not litter(folder)
        logged = [r["step"] for r in again.history()]
        assert logged[:2] == [1, 2]
        assert 3 not in returned or 3 in logged
        again.save(9, state(9))
        assert again.restore()[0] == 9


def operations(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        run = prepared(tmp_path / "count")
        disk = Disk(run.folder, patch)
        scenario(run)[0]()
    run.close()
    return disk


def test_a_save_is_fsync_then_rename_then_fsync_of_the_folder(tmp_path):  # P2
    with prepared(tmp_path) as run, pytest.MonkeyPatch.context() as patch:
        disk = Disk(run.folder, patch)
        run.save(3, state(3))
    order = [event for event in disk.trace if not event.startswith(("open", "write"))]
    assert order == ["fsync run.jsonl", "fsync temporary", "rename to step-00000003.safetensors", "fsync checkpoints"]


def outcome(act):
    """The fault as it reached the caller."""
    try:
        act()
    except (OSError, Crash) as error:
        return error
    return None


def test_every_operation_times_every_fault_leaves_a_good_run(tmp_path):  # P2, P8
    total, checked, base, here, target = operations(tmp_path).count, 0, *map(tmp_path.joinpath, ("base", "here", "cut"))
    prepared(base).close()
    assert total > 40
    for index in range(total):
        for fault in (errno.EIO, errno.ENOSPC, "crash", "torn"):
            shutil.copytree(base, here)
            run = Run.open(here, write=True)
            act, returned = scenario(run)
            with pytest.MonkeyPatch.context() as patch:
                disk = Disk(here, patch, index, fault)
                error = outcome(act)
            run.close()
            if isinstance(error, OSError):
                assert error.errno == fault
                assert error.filename is not None
                assert disk.dead or not [p for p in litter(here) if p.suffix == ".tmp"]
            elif error is None:
                assert disk.failed == "close", f"operation {index} failed unnoticed"  # of a file that was only read
            else:
                for data, names in POWER_CUTS[index % 2 :: 2]:
                    disk.after_power_cut(target, data, names)
                    check_after(target, returned)
                    shutil.rmtree(target)
                    checked += 1
            check_after(here, returned)
            shutil.rmtree(here)
            checked += 1
    assert checked >= 300


@pytest.mark.parametrize("guard", ["fsync of the file", "fsync of the folder", "temporary name"])
def test_the_power_cut_test_catches_a_writer_without(guard, tmp_path):  # P2, P30
    """P30: take one guard away and the replay must find a lost or damaged checkpoint."""
    found = []
    for data, names in POWER_CUTS:
        here, target = tmp_path / f"{data}-{names}", tmp_path / f"cut-{data}-{names}"
        run = prepared(here)
        with pytest.MonkeyPatch.context() as patch:
            if guard == "temporary name":

                @contextlib.contextmanager
                def unsafe(path, size):
                    file = os.open(path, os.O_WRONLY | os.O_CREAT)
                    yield file
                    os.close(file)

                patch.setattr(store, "replacing", unsafe)
            disk = Disk(here, patch)
            counted = os.fsync

            def skipping(file, counted=counted):
                folder = stat.S_ISDIR(os.fstat(file).st_mode)
                return None if folder == (guard == "fsync of the folder") else counted(file)

            if guard != "temporary name":
                patch.setattr(os, "fsync", skipping)
            run.save(3, state(3))
        run.close()
        disk.after_power_cut(target, data, names)
        with Run.open(target) as after:
            step, _, _, notes = after.restore()
            found.append(step != 3 or notes)
    assert any(found)
