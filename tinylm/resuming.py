"""Going on with a run from its folder alone, bit for bit as if it had never stopped."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

from tinylm.checkpoint import Run, StateMismatch, load
from tinylm.shards import Tokens
from tinylm.training import Batches, Step, Tracker, Trainer


def resume(
    folder: str | os.PathLike,
    *,
    data: Tokens | Batches | None = None,
    valid: Tokens | Batches | None = None,
    tracker: Tracker | None = None,
    **longer: float,
) -> Trainer:
    """Go on with the run in `folder` from its newest sound checkpoint, exactly as if it had never stopped.

    Args:
        folder: made by `train(..., out=folder)`.
        data, valid: needed only when the run was not made from token shards, or they have moved.
        tracker: as in `train`.
        longer: a later end than the run was made for, `steps=`, `tokens=` or `budget=`; the schedule stretches with it.

    Raises:
        FileNotFoundError: no run, or no checkpoint, or no data. StateMismatch: other data than before.
        RunLocked: another process trains in this folder.
    """
    run = Run.open(folder, write=True)
    try:
        step, tensors, metadata, notes = run.restore()
        for note in notes:
            warnings.warn(note, stacklevel=2)
        if longer:
            run.change(run.train.replace(**{"steps": 0, "tokens": 0, "budget": 0.0, **longer}))
        model = load(run.path(step))
        train_data = reopen(data, run.data.get("train"), run.folder, "data")
        valid_data = reopen(valid, run.data.get("valid"), run.folder, "valid", needed=False)
        trainer = Trainer(model, train_data, run.train, valid=valid_data, run=run, tracker=tracker)
        trainer.adopt(tensors, metadata["seconds"])
        run.rewind(step)
        fields = set(Step._fields)
        old = ({k: v for k, v in record.items() if k in fields} for record in run.history())
        trainer.history = [Step(**{"eta": 0.0, "progress": 0.0, **record}) for record in old]
        trainer._saved_step = step
        return trainer
    except BaseException:
        run.close()
        raise


def reopen(
    given: Tokens | Batches | None, about: dict[str, Any] | None, home: Path, name: str, needed: bool = True
) -> Any:
    """The data of a run once more: what the caller gives, or the shards the run was made from."""
    if given is None and about is not None and about["folder"] is not None:
        given = Tokens.open(home / about["folder"], about["split"])
    if given is None and needed:
        raise FileNotFoundError(f"{home} was trained on data made in memory: give it again, resume(folder, {name}=...)")
    if isinstance(given, Tokens) and about is not None and given.sha256 != about["sha256"]:
        raise StateMismatch(
            f"the {name} of {home} has changed: sha256 was {about['sha256'][:12]}..., now {given.sha256[:12]}...; "
            "a resumed run must see the same tokens"
        )
    return given
