"""Taps: look at, or change, any value inside a model.

A tap is a function `tap(site, x) -> x`, passed as an argument to the forward pass and called with every named value on
its way. It returns the value to go on with. Nothing is attached to the model, so nothing can leak, and
`jax.jit`, `jax.grad` and `jax.vmap` work as on any other argument.

    seen = {}
    model(tokens, tap=recording(seen, r"blocks\\.\\d+\\.resid"))
    model(other, tap=patching({"blocks.0.resid": seen["blocks.0.resid"]}))
    model(tokens, tap=ablating(r"blocks\\.0\\.attn\\.heads", "mean", numpy.s_[:, :, 1]))
    model(tokens, tap=steering({"blocks.1.resid": direction}, scale=4.0))

A tap that carries a method `wants(site) -> bool` is not asked about other sites; the model then keeps its fast paths
(a GPU's attention kernel gives way only to a tap that wants the pattern). A plain function is asked about all.

A tap that carries a method `missed(sites)` is told at the end of a forward pass which sites there were, and may raise:
so `recording` and `patching` notice a misspelt site.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from tinylm.config import suggest

Tap = Callable[[str, Array], Array]


def untouched(site: str, x: Array) -> Array:
    """The tap that does nothing; the default."""
    return x


def wants(tap: Tap, site: str) -> bool:
    """Whether `tap` may look at or change `site`."""
    if tap is untouched:
        return False
    asked = getattr(tap, "wants", None)
    return asked is None or asked(site)


@dataclasses.dataclass(frozen=True)
class Within:
    """A tap as seen from inside a part: sites get the part's name in front. Made by `within`."""

    prefix: str
    tap: Tap

    def __call__(self, site: str, x: Array) -> Array:
        return self.tap(f"{self.prefix}.{site}", x)

    def wants(self, site: str) -> bool:
        return wants(self.tap, f"{self.prefix}.{site}")


def within(prefix: str, tap: Tap) -> Tap:
    """`tap`, for use inside the part called `prefix`."""
    return tap if tap is untouched else Within(prefix, tap)


@dataclasses.dataclass(frozen=True)
class Watched:
    """A tap whose model notes every site it offers. Made by `watched`."""

    tap: Tap
    sites: set[str]

    def __call__(self, site: str, x: Array) -> Array:
        self.sites.add(site)
        return self.tap(site, x)

    def wants(self, site: str) -> bool:
        self.sites.add(site)
        return wants(self.tap, site)


def watched(tap: Tap) -> Tap:
    """`tap`, for one forward pass of a whole model that ends in `check`."""
    return tap if tap is untouched else Watched(tap, set())


def check(tap: Tap) -> None:
    """Tell a watched tap which sites the pass had. Raises ValueError when it meant others."""
    if isinstance(tap, Watched) and hasattr(tap.tap, "missed"):
        tap.tap.missed(tap.sites)


def _require_regex(sites: str) -> None:
    try:
        re.compile(sites)
    except (re.error, TypeError) as error:
        raise ValueError(f"sites = {sites!r} is no regular expression: {error}") from None


def _require_inside(at: Any, site: str, shape: tuple[int, ...]) -> None:
    """Raise ValueError when an index leaves the value: JAX would clamp it to read, and drop what is written there."""
    try:
        np.broadcast_to(np.int8(0), shape)[at]
    except (jax.errors.TracerArrayConversionError, jax.errors.TracerIntegerConversionError):
        return  # an index that is traced is known only when the program runs
    except IndexError as error:
        raise ValueError(f"at = {at!r} does not index {site}, which has shape {shape}: {error}") from None


@dataclasses.dataclass(frozen=True)
class recording:
    """Tap that keeps the values of all sites whose whole name matches the regex `sites` in `store`.

    Under `jax.jit` return `store` from the jitted function: it holds tracers until then. Raises ValueError for what is
    no regex, and at the end of a forward pass without any such site.
    """

    store: MutableMapping[str, Any]
    sites: str = ".*"

    def __post_init__(self) -> None:
        _require_regex(self.sites)

    def __call__(self, site: str, x: Array) -> Array:
        if self.wants(site):
            self.store[site] = x
        return x

    def wants(self, site: str) -> bool:
        return re.fullmatch(self.sites, site) is not None

    def missed(self, sites: set[str]) -> None:
        if not any(map(self.wants, sites)):
            plain = self.sites.replace("\\", "")
            raise ValueError(f"no site matches {self.sites!r}{suggest(plain, sorted(sites))}")


@dataclasses.dataclass(frozen=True)
class patching:
    """Tap that puts `values[site]` in the place of the value at each of its sites.

    Raises ValueError when the shapes differ, since broadcasting would patch more than was meant, and at the end of a
    forward pass that lacks one of the sites.
    """

    values: dict[str, Any]

    def __call__(self, site: str, x: Array) -> Array:
        if site not in self.values:
            return x
        new = jnp.asarray(self.values[site])
        if new.shape != x.shape:
            raise ValueError(f"cannot patch {site}: it has shape {x.shape}, the new value {new.shape}")
        return new.astype(x.dtype)

    def wants(self, site: str) -> bool:
        return site in self.values

    def missed(self, sites: set[str]) -> None:
        for site in self.values:
            if site not in sites:
                raise ValueError(f"no site {site!r} to patch{suggest(site, sorted(sites))}")


@dataclasses.dataclass(frozen=True)
class _Composed:
    taps: tuple[Tap, ...]

    def __call__(self, site: str, x: Array) -> Array:
        for tap in self.taps:
            if wants(tap, site):
                x = tap(site, x)
        return x

    def wants(self, site: str) -> bool:
        return any(wants(tap, site) for tap in self.taps)

    def missed(self, sites: set[str]) -> None:
        for tap in self.taps:
            if hasattr(tap, "missed"):
                tap.missed(sites)


def compose(*taps: Tap) -> Tap:
    """All of `taps`, first to last: `compose(patching(p), recording(seen))` records what was patched in."""
    return _Composed(taps)


@dataclasses.dataclass(frozen=True)
class ablating:
    """Tap that takes out what flows through the sites whose whole name matches the regex.

    Args:
        sites: regex for whole names.
        by: "zero"; "mean" of this batch over rows and positions; "resample": the value of another row of the batch
            (row i gets that of row i + 1, so a single row stays as it is); or a mapping of site to the value to put
            there, which is spread over rows and positions, such as a mean over a corpus.
        at: index into the value, such as `numpy.s_[:, :, 1]` for head 1 of `attn.heads`; all of it by default.

    Raises ValueError for another `by`, a value or an index that does not fit the site, and at the end of a forward pass
    without any such site.
    """

    sites: str
    by: Any = "zero"
    at: Any = ...

    def __post_init__(self) -> None:
        _require_regex(self.sites)
        if not isinstance(self.by, Mapping) and self.by not in ("zero", "mean", "resample"):
            raise ValueError(f"by = {self.by!r}: ablate by zero, mean, resample or a mapping of site to value")

    def __call__(self, site: str, x: Array) -> Array:
        if not self.wants(site):
            return x
        _require_inside(self.at, site, x.shape)
        if isinstance(self.by, Mapping):
            if site not in self.by:
                raise ValueError(f"no value to put at {site!r}{suggest(site, self.by)}")
            new = jnp.asarray(self.by[site], x.dtype)
            if new.ndim > x.ndim or any(a not in (1, b) for a, b in zip(new.shape[::-1], x.shape[::-1], strict=False)):
                raise ValueError(f"cannot ablate {site}: it has shape {x.shape}, the value to put there {new.shape}")
            new = jnp.broadcast_to(new, x.shape)
        elif self.by == "zero":
            new = jnp.zeros_like(x)
        elif self.by == "mean":
            new = jnp.broadcast_to(x.mean((0, 1), keepdims=True), x.shape)
        else:
            new = jnp.roll(x, -1, axis=0)
        return x.at[self.at].set(new[self.at])

    def wants(self, site: str) -> bool:
        return re.fullmatch(self.sites, site) is not None

    missed = recording.missed


@dataclasses.dataclass(frozen=True)
class steering:
    """Tap that adds `scale * vectors[site]` to the value at each of its sites, spread over rows and positions.

    Raises ValueError when a vector or the index does not fit, and at the end of a forward pass that lacks one of the
    sites.
    """

    vectors: Mapping[str, Any]
    scale: Any = 1.0
    at: Any = ...

    def __call__(self, site: str, x: Array) -> Array:
        if site not in self.vectors:
            return x
        _require_inside(self.at, site, x.shape)
        vector = jnp.asarray(self.vectors[site])
        target = jax.eval_shape(lambda y: y[self.at], x).shape
        tail = target[len(target) - vector.ndim :]
        if vector.ndim > len(target) or any(a not in (1, b) for a, b in zip(vector.shape, tail, strict=True)):
            raise ValueError(f"cannot steer {site}: it has shape {target}, the vector {vector.shape}")
        return x.at[self.at].add((self.scale * vector).astype(x.dtype))

    def wants(self, site: str) -> bool:
        return site in self.vectors

    def missed(self, sites: set[str]) -> None:
        for site in self.vectors:
            if site not in sites:
                raise ValueError(f"no site {site!r} to steer{suggest(site, sorted(sites))}")
