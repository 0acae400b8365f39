"""Looking inside a model: what its parts do, what they read and write, and which of its weights are needed.

    from tinylm import probe
    probe.sweep(model, clean, corrupt, probe.logit_difference(right, wrong), "heads")   # activation patching
    probe.direct(model, tokens)                                                      # who wrote these logits
    probe.find(model, tokens, probe.Bigrams.count(tokens), sizes=(10,))              # the bigram subnetwork

Everything is a function of a model and token ids and works on any model of the kit: decoder or encoder, imported, with
techniques on it. Sites are those of `model`. Names are imported on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

PUBLIC = {
    "record": "activations",
    "sweep": "patching",
    "paths": "patching",
    "baseline": "patching",
    "logit_difference": "patching",
    "direct": "attribution",
    "gradient": "attribution",
    "integrated": "attribution",
    "logit_lens": "lenses",
    "tuned_lens": "lenses",
    "patterns": "attention",
    "head_scores": "attention",
    "attention_browser": "attention",
    "ridge": "linear",
    "linear_probe": "linear",
    "neurons": "units",
    "neuron_browser": "units",
    "Bigrams": "bigrams",
    "find": "subnetworks",
    "Subnetwork": "subnetworks",
    "overlap": "subnetworks",
    "measure": "surprisals",
    "rotations": "rotation",
    "signal": "theory",
    "lipschitz": "theory",
    "heat_map": "pictures",
}
__all__ = [*PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module 'tinylm.probe' has no attribute {name!r}; it has {', '.join(sorted(PUBLIC))}")
    value = globals()[name] = getattr(importlib.import_module(f"tinylm.probe.{PUBLIC[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
