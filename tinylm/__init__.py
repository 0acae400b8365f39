"""tinylm: train a tiny language model, look inside it, change it, ship it.

import tinylm
model = tinylm.load("runs/story")
print(tinylm.generate(model, "Once upon a time"))
"""

from __future__ import annotations

import importlib

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing itself takes longer to import than all of this
    from typing import Any

__version__ = "0.1.0"

# Public name -> the room it lives in, imported on first use: `import tinylm` must not wait for JAX. No room may have
# the name of a function: importing the room would put the module in the function's place.
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
    "prepare": "corpus",
    "Transformer": "model",
    "Cache": "model",
    "sites": "model",
    "named": "weights",
    "recording": "taps",
    "patching": "taps",
    "compose": "taps",
    "edit": "techniques",
    "fold": "techniques",
    "bitnet": "techniques.ternary",
    "load": "checkpoint",
    "save": "checkpoint",
    "FormatError": "formats",
    "card": "sharing",
    "push": "sharing",
    "Trainer": "training",
    "train": "training",
    "resume": "resuming",
    "Population": "population",
    "train_many": "population",
    "baselines": "yardsticks",
    "evaluate": "evaluation",
    "compare": "evaluation",
    "evaluate_floor": "evaluation",
    "excess": "evaluation",
    "diversity": "evaluation",
    "generate": "generation",
    "stream": "generation",
    "quantize": "quantization",
    "evaluate_suite": "suite",
    "fit": "live",
    "report": "reporting",
    "Engine": "engine",
    "export": "engine.export",
    "classify": "classification",
    "Committee": "classification",
    "add_memory": "techniques.memory",
    "discretize": "techniques.codebook",
}
# Rooms with names of their own to offer, as `tinylm.probe.logit_lens`.
WITHIN = ("classification", "codebooks", "memory", "probe", "quantization", "suite")
__all__ = ["__version__", *PUBLIC, *WITHIN]


def __getattr__(name: str) -> Any:
    if name in WITHIN:
        return importlib.import_module(f"tinylm.{name}")
    if name not in PUBLIC:
        raise AttributeError(f"module 'tinylm' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"tinylm.{PUBLIC[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
