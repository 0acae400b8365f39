"""Training over several devices, by `jax.sharding` alone: arrays are placed, and XLA adds the communication.

    data    every device holds all weights and takes its share of each batch
    fsdp    weights and optimiser state are split too, and gathered where they are used (Rajbhandari et al. 2020)

Several hosts: call `jax.distributed.initialize()` in every process before anything else of JAX; each then computes the
same batches (they depend on the step alone) and keeps its own part of them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tinylm.config import ConfigError, TrainConfig

AXIS = "data"


class Layout(NamedTuple):
    """Where arrays lie: a mesh of one axis, and whether weights are split over it. Hashable: it is compiled in."""

    mesh: Mesh
    split: bool

    def weights(self, shape: tuple[int, ...]) -> NamedSharding:
        """Of a parameter or of its optimiser state: split along the longest side that the devices divide, or whole."""
        sides = [i for i, n in enumerate(shape) if n % self.mesh.size == 0 and n > 0] if self.split else []
        longest = max(sides, key=lambda i: shape[i], default=None)
        return NamedSharding(self.mesh, PartitionSpec(*(AXIS if i == longest else None for i in range(len(shape)))))

    def rows(self, before: int = 0) -> NamedSharding:
        """Of a batch: split by rows, which come after `before` other axes."""
        return NamedSharding(self.mesh, PartitionSpec(*[None] * before, AXIS))

    def place(self, tree: Any) -> Any:
        """A training state from the host, or from one device, in its place."""
        return jax.tree.map(lambda x: jax.device_put(x, self.weights(np.shape(x))), tree)

    def keep(self, tree: Any) -> Any:
        """While tracing: a state that stays where it lies."""
        return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, self.weights(x.shape)), tree)

    def batch(self, batch: Any) -> Any:
        """A batch of NumPy arrays, each process keeping the rows of its own devices."""
        cut = lambda x: jax.make_array_from_callback(x.shape, self.rows(), lambda at: x[at])  # noqa: E731
        return jax.tree.map(cut, batch)


def layout(config: TrainConfig) -> Layout | None:
    """The layout a run asks for, over all devices of all processes; None on one device.

    Raises:
        ConfigError: the batch cannot be shared out, or the end of the run is a matter of each process's clock.
    """
    if config.parallel == "none":
        if jax.process_count() > 1:
            raise ConfigError('TrainConfig.parallel = "none" in one of several processes: set it to "data" or "fsdp"')
        return None
    devices = jax.devices()
    rows, n = config.batch // config.accumulate, len(devices)
    if rows % n:
        raise ConfigError(f"TrainConfig.batch = {config.batch}: {rows} rows at a time do not divide over {n} devices")
    if jax.process_count() > 1 and config.budget:
        raise ConfigError("TrainConfig.budget: clocks of several processes differ; set steps or tokens")
    return Layout(Mesh(np.array(devices), (AXIS,)), config.parallel == "fsdp")


def gathered(tree: Any) -> Any:
    """NumPy arrays of a state, wherever its parts lie; every process must ask."""

    def whole(x: Any) -> np.ndarray:
        if isinstance(x, jax.Array) and not x.is_fully_addressable and not x.is_fully_replicated:
            return np.asarray(multihost_utils.process_allgather(x, tiled=True))
        return np.asarray(x)

    return jax.tree.map(whole, tree)


def anyone(asked: bool) -> bool:
    """Whether any of the processes asks; all must call it at the same step."""
    return asked if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.bool_(asked)).any())


def leads() -> bool:
    """Whether this process writes the files."""
    return jax.process_index() == 0
