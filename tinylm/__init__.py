"""tinylm: train a tiny language model, look inside it, change it, ship it.

import tinylm
model = tinylm.load("runs/story")
print(tinylm.generate(model, "Once upon a time"))
"""

import importlib
import sys
import types
from typing import Any

__version__ = "0.1.0"

# Public name -> the room it lives in. Imported on first use: `import tinylm` must not wait for JAX.
PUBLIC = {
    "ConfigError": "config",
    "ModelConfig": "config",
    "Sampling": "config",
    "TrainConfig": "config",
    "preset": "presets",
    "size": "presets",
    "World": "world",
    "documents": "text",
    "deduplicate": "text",
    "contamination": "text",
    "split": "text",
    "Tokenizer": "tokenizer",
    "Tokens": "data",
    "Windows": "data",
    "Masked": "data",
    "write_tokens": "data",
    "Transformer": "model",
    "Cache": "model",
    "sites": "model",
    "named": "weights",
    "recording": "taps",
    "patching": "taps",
    "compose": "taps",
    "load": "checkpoint",
    "save": "checkpoint",
    "Trainer": "training",
    "train": "training",
    "resume": "training",
    "baselines": "yardsticks",
    "evaluate": "evaluation",
    "compare": "evaluation",
    "diversity": "evaluation",
    "generate": "generation",
    "stream": "generation",
    "fit": "fit",
}
__all__ = ["__version__", *PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module 'tinylm' has no attribute {name!r}")
    # Read from the room at each use: a name here that is also a room's (train, fit) would be hidden by the module.
    return getattr(importlib.import_module(f"tinylm.{PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(types.ModuleType):
    """Temporary: a function wins over the room of the same name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in PUBLIC and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
