"""Going on with a run from its folder alone, bit for bit as if it had never stopped.

Bits depend on the machine too (`folder.circumstances`); where that has changed, `resume` says so, and goes on close by.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

from tinylm.checkpoint import CheckpointDamaged, Run, StateMismatch, load
from tinylm.config import ConfigError
from tinylm.data import Batches
from tinylm.run import Tracker
from tinylm.shards import Tokens
from tinylm.training import Step, Trainer


def resume(
    folder: str | os.PathLike,
    *,
    data: Tokens | Batches | None = None,
    valid: Tokens | Batches | None = None,
    tracker: Tracker | None = None,
    **longer: float,
) -> Trainer:
    """Go on with the run in `folder` from its newest sound checkpoint, exactly as if it had never stopped.

    Warns of damaged checkpoints that were passed over, and of another machine or another jaxlib, which give other bits.

    Args:
        folder: made by `train(..., out=folder)`.
        data, valid: needed only when the run was not made from token shards, or they have moved.
        tracker: as in `train`.
        longer: a later end than the run was made for, `steps=`, `tokens=` or `budget=`; the schedule stretches with it.

    Raises:
        FileNotFoundError: no run, or no checkpoint, or no data. StateMismatch: other data than before.
        RunLocked: another process trains in this folder. ConfigError: an end that lies behind, data that is none.
        CheckpointDamaged: no sound checkpoint, or settings that were changed after they were written.
    """
    if unknown := longer.keys() - {"steps", "tokens", "budget"}:
        raise ConfigError(
            f"resume: {', '.join(sorted(unknown))} cannot change in a run; only steps, tokens or budget can"
        )
    run = Run.open(folder, write=True)
    try:
        step, tensors, metadata, notes = run.restore()
        for note in notes:
            warnings.warn(note, stacklevel=2)
        if changes := run.changes():
            said = f"{run.folder} goes on close to how it would have, not bit for bit: {'; '.join(changes)}"
            warnings.warn(said, stacklevel=2)
        config = run.train.replace(**{"steps": 0, "tokens": 0, "budget": 0.0, **longer}) if longer else run.train
        model = load(run.path(step))
        train_data = reopen(data, run.data.get("train"), run.folder, "data")
        valid_data = reopen(valid, run.data.get("valid"), run.folder, "valid", needed=False)
        trainer = Trainer(model, train_data, config, valid=valid_data, run=run, tracker=tracker)
        seconds: Any = metadata.get("seconds")
        if type(seconds) not in (int, float) or not 0 <= seconds < float("inf"):
            raise StateMismatch(f"{run.path(step)} does not say after how many seconds it was saved: {seconds!r}")
        trainer.adopt(tensors, seconds)
        if longer and trainer.progress >= 1.0:
            end = ", ".join(f"{name}={value:g}" for name, value in longer.items())
            raise ConfigError(
                f"{run.folder} is at step {step}, after {trainer.seconds:.0f} s: {end} lies behind; give a later end"
            )
        # Nothing on disk changes before all of it has been found to fit.
        run.rewind(step)
        if longer:
            run.change(config)
        trainer.history = logged(run)
        trainer._saved_step = step
        return trainer
    except BaseException:
        run.close()
        raise


def logged(run: Run) -> list[Step]:
    """The steps that a run's log has. Raises CheckpointDamaged."""
    steps = []
    for number, record in enumerate(run.history(), 1):
        own = {"eta": 0.0, "progress": 0.0, **{name: record[name] for name in Step._fields if name in record}}
        missing = [name for name in Step._fields if name not in own and name not in Step._field_defaults]
        odd = [name for name, value in own.items() if type(value) not in (int, float, type(None))]
        odd += [name for name in ("step", "tokens", "seconds") if own.get(name, 0) is None]
        if missing or odd or type(own["step"]) is not int or own["step"] < 1:
            what = ", ".join([*missing, *odd]) or "step"
            raise CheckpointDamaged(f"{run.folder / 'run.jsonl'} line {number} is damaged: {what} missing or no number")
        steps.append(Step(**own))
    return steps


def reopen(
    given: Tokens | Batches | None, about: dict[str, Any] | None, home: Path, name: str, needed: bool = True
) -> Any:
    """The data of a run once more: what the caller gives, or the shards the run was made from."""
    if about is not None and not (
        isinstance(about, dict)
        and isinstance(about.get("folder"), str | None)
        and all(isinstance(about.get(key), str) for key in ("split", "sha256"))
    ):
        raise CheckpointDamaged(f"{home / 'config.json'} does not say what the {name} was: {about!r}")
    if given is None and about is not None and about["folder"] is not None:
        # The one path that a file of ours may lead elsewhere by: nothing but shards of that name is read there.
        given = Tokens.open(home / about["folder"], about["split"])
    if given is not None and not isinstance(given, Tokens) and not callable(given):
        raise ConfigError(f"{name} = {given!r}: give Tokens, or a function from a step to its Batch")
    if given is None and needed:
        raise FileNotFoundError(f"{home} was trained on data made in memory: give it again, resume(folder, {name}=...)")
    if isinstance(given, Tokens) and about is not None and given.sha256 != about["sha256"]:
        raise StateMismatch(
            f"the {name} of {home} has changed: sha256 was {about['sha256'][:12]}..., now {given.sha256[:12]}...; "
            "a resumed run must see the same tokens"
        )
    return given
