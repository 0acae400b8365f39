"""Going on in the middle of a training with another technique, or with other settings: 16 bits first, then 1.58.

    for step in trainer:                       # Continual QAT (Nielsen et al. 2025): some of the run in floats
        if step.progress >= 0.3:
            break
    trainer = switch(trainer, bitnet)
    for step in trainer: ...                   # on, at the same step, with the same data and schedule

BitNet's second stage, from half of the run on, is such a change too, of settings alone:

    trainer = switch(trainer, config=trainer.config.replace(learning_rate=1e-3, weight_decay=0.0))
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tinylm.config import TrainConfig
from tinylm.quantization.spec import QuantizationError
from tinylm.techniques import all_or_none
from tinylm.training import Trainer, train


def switch(
    trainer: Trainer,
    change: Callable[[Any], Any] | None = None,
    *,
    config: TrainConfig | None = None,
    keep_optimizer: bool = True,
    out: str | os.PathLike | None = None,
) -> Trainer:
    """A trainer that goes on where another one stopped, with a model or settings that were changed.

    Args:
        trainer: not in use; its model is changed in place. A run folder of its own stays as it is: it describes
            another model.
        change: edits a model, such as `bitnet` or `lambda m: edit(m, r"blocks\\..*", "int4")`.
        config: other settings from here on. The batches stay those of the first trainer.
        keep_optimizer: whether the optimiser's state goes along; without it only weights, step and schedule do.
        out: a new run folder.

    Raises:
        What `change` and `train` raise: FileExistsError where `out` holds something. QuantizationError: `change` gave
        another model. The model is then as it was, and the trainer can go on.
    """
    trainer.sync()
    old, model = trainer.tensors(), trainer.model
    with all_or_none(model):
        if change is not None and (changed := change(model)) is not None and changed is not model:
            raise QuantizationError("change gave another model: it has to edit the one it is given, in place")
        config = config or trainer.config
        new = train(model, trainer.batches, config, valid=trainer.valid, out=out, tracker=trainer.tracker)
        new.adopt(carry(old, new.tensors(), keep_optimizer=keep_optimizer), trainer.seconds)
    new.valid_bytes, new.history, new.losses = trainer.valid_bytes, list(trainer.history), list(trainer.losses)
    new.watched = dict(trainer.watched)
    return new


def carry(
    old: Mapping[str, np.ndarray], new: Mapping[str, np.ndarray], *, keep_optimizer: bool = True
) -> dict[str, np.ndarray]:
    """A training state (see `Trainer.tensors`) for a model some of whose modules were wrapped or unwrapped since.

    A wrapped module's parameters are found under `.inner`; so what has the same name without that, and the same shape,
    is the same. Everything else is as `new` has it: fresh.
    """
    plain = {name.replace(".inner.", "."): value for name, value in old.items()}
    found = {}
    for name, value in new.items():
        before = plain.get(name.replace(".inner.", "."))
        same = before is not None and before.shape == value.shape and before.dtype == value.dtype
        found[name] = before if same and (keep_optimizer or not name.startswith("opt.")) else value
    return found
