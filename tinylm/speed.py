"""How well a run used its machine: tokens and operations per second, share of the device's peak, memory."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import jax
import numpy as np

from tinylm.config import ModelConfig, TrainConfig
from tinylm.model import Transformer
from tinylm.presets import size
from tinylm.shards import Tokens
from tinylm.training import Trainer

TRAINING = 3  # the backward pass does every product twice more (Kaplan et al. 2020)
# Dense bfloat16 operations per second, from the makers' data sheets; the first name that is found counts.
PEAK = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "RTX 5090": 210e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


@dataclasses.dataclass(frozen=True)
class Usage:
    """What a training run cost.

    Attributes:
        device: name of one device. devices: how many shared the work.
        tokens_per_second: from the first logged step to the last, so that compilation is left out; 0: too few steps.
        flops: floating-point operations per second, of products and attention, by `presets.size`'s count.
        mfu: share of the devices' peak in bfloat16 (PaLM's model FLOPs utilisation), whatever the run's own precision;
            None where that peak is not known, as of a CPU.
        memory: most bytes in use so far: of one GPU by its allocator, or of this whole process on a CPU.
    """

    device: str
    devices: int
    tokens_per_second: float
    flops: float
    mfu: float | None
    memory: int

    def __str__(self) -> str:
        of = "" if self.mfu is None else f" ({self.mfu:.1%} of the peak)"
        many = f"{self.devices} x " if self.devices > 1 else ""
        speed = f"{self.tokens_per_second:,.0f} tokens/s, {self.flops / 1e9:,.0f} GFLOP/s{of}, "
        return f"{speed if self.tokens_per_second else ''}{self.memory / 1e6:,.0f} MB at most, on {many}{self.device}"

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def usage(trainer: Any) -> Usage:
    """What `trainer` has used so far."""
    speed = 0.0
    if trainer.history:
        first, last = trainer.history[0], trainer.history[-1]
        if last.seconds > first.seconds:
            speed = (last.tokens - first.tokens) / (last.seconds - first.seconds)
    device = jax.config.jax_default_device or jax.local_devices()[0]  # pyright: ignore[reportAttributeAccessIssue]
    count = len(jax.devices()) if trainer.layout is not None else 1
    flops = speed * TRAINING * size(trainer.model.config).flops
    return Usage(
        device.device_kind, count, speed, flops, utilisation(device.device_kind, flops / count), memory(device)
    )


def measure(model: ModelConfig, train: TrainConfig, seconds: float = 10.0) -> Usage:
    """Train a new model on tokens drawn at random for about `seconds`, compilation aside; what it cost.

    Raises ConfigError for what `training.train` refuses.
    """
    length = train.length or model.context
    ids = np.random.default_rng(0).integers(0, model.vocab, 64 * (length + 1) * train.batch)
    tokens = Tokens.from_array(ids, vocab=model.vocab, end=0)
    trainer = Trainer(Transformer(model), tokens, train)
    begun = None
    for step in trainer:
        begun = step.seconds if begun is None else begun
        if step.seconds - begun >= seconds:
            break
    return usage(trainer)


def utilisation(kind: str, flops: float) -> float | None:
    """Share of a device's peak that `flops` operations per second are."""
    peak = next((peak for name, peak in PEAK.items() if name in kind), None)
    return None if peak is None else flops / peak


def memory(device: Any) -> int:
    """Most bytes in use so far: by the device's own count, or else of this process."""
    if stats := device.memory_stats():
        return stats["peak_bytes_in_use"]
    try:
        import resource
    except ImportError:  # Windows
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most  # macOS counts bytes, others kilobytes
