r"""Techniques: modules that wrap a model's own modules, recorded as data and made again whenever the model is built.

    edit(model, r"blocks\.\d+\.(attn|mlp)\.\w+", "ternary", scale="median")

A technique is a class in a file of this room, registered by name. It is made as `(inner, *, rngs, **settings)`, called
exactly like what it wraps, and stands in its place, so sites, training, checkpoints and generation go on as before.
One that stands for a matrix offers `.weight()`, the effective dense one; then counting, `fold` and every exporter work
with no knowledge of it. Parameters of a wrapped module are found under `<path>.inner`.
"""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, TypeVar

import jax
from flax import nnx

from tinylm.config import Edit, suggest
from tinylm.parts import Embedding, Linear

# A technique is in the file of its name, imported on first use; these are in another's.
ELSEWHERE: dict[str, str] = {
    "identity": "ternary",
    "int8": "integer",
    "int4": "integer",
    "int2": "integer",
    "lsq": "integer",
    "memory_lora": "memory",
    "memory_kv": "memory",
}
FILES = frozenset(file.name for file in pkgutil.iter_modules(__path__))
_known: dict[str, type[Technique]] = {}


class EditError(ValueError):
    """A change that cannot be made to this model; the message names what and the remedy. The model is as it was."""


class Technique(nnx.Module):
    """What every technique is.

    Attributes:
        accepts: the classes of modules it can wrap.
        inner: what it wraps: a module of the kit, or another technique.
    """

    accepts: ClassVar[tuple[type, ...]] = (Linear,)

    def __init__(self, inner: nnx.Module, *, rngs: nnx.Rngs):
        del rngs
        self.inner: Any = inner

    @property
    def bias(self) -> Any:
        """The wrapped matrix's bias, or None."""
        return self.inner.bias

    def fold(self) -> nnx.Module:
        """A plain module that computes the same, or nearly: the class of the technique says how nearly.

        Raises EditError where no plain module can.
        """
        root = self.inner
        while isinstance(root, Technique):
            root = root.inner
        weight = getattr(self, "weight", None)
        if weight is None or not isinstance(root, Linear | Embedding):
            raise EditError(f"{type(self).__name__} is more than a matrix: no plain module can stand for it")
        plain = nnx.clone(root)
        (plain.kernel if isinstance(plain, Linear) else plain.table).set_value(weight())
        return plain


def ticked(params: dict[str, Any]) -> dict[str, Any]:
    """Parameters after a training step: every technique's clock, which its ramp follows, is one step on."""
    return {name: value + 1 if name.rpartition(".")[2] == "clock" else value for name, value in params.items()}


T = TypeVar("T", bound=type[Technique])


def technique(name: str) -> Callable[[T], T]:
    """Class decorator: make a technique known by `name`. Raises ValueError when the name is another's."""

    def register(cls: T) -> T:
        if (before := _known.setdefault(name, cls)).__qualname__ != cls.__qualname__:
            raise ValueError(f"the technique {name!r} is {before.__qualname__} already: choose another name")
        _known[name] = cls  # the same class defined again, as running a notebook's cell twice does
        return cls

    return register


def find(name: str) -> type[Technique]:
    """The class of a technique. Raises EditError for an unknown name."""
    if name not in _known and (file := ELSEWHERE.get(name, name)) in FILES:
        importlib.import_module(f"tinylm.techniques.{file}")
    if name not in _known:
        raise EditError(f"no technique is called {name!r}{suggest(name, built_in())}")
    return _known[name]


def built_in() -> list[str]:
    """The names of all techniques, those of one's own included; imports every file of this room."""
    for file in sorted(FILES):
        importlib.import_module(f"tinylm.techniques.{file}")
    return sorted(_known)


def modules(model: nnx.Module, path: str = "") -> Iterator[tuple[str, nnx.Module]]:
    """Every module of a model with its dotted path, innermost first; a technique hides what it wraps."""
    for key, child in nnx.iter_children(model):
        if isinstance(child, nnx.Module):
            here = f"{path}.{key}" if path else str(key)
            if not isinstance(child, Technique):
                yield from modules(child, here)
            if not isinstance(child, nnx.List):
                yield here, child


def edit(model: Any, where: str, technique: str, *, rngs: nnx.Rngs | int = 0, **settings: Any) -> Any:
    r"""Wrap every module whose dotted path matches in a technique, in place, and record that in the model's config.

    Args:
        model: a `Transformer`; techniques can be laid on top of one another.
        where: regex for the whole path, such as `blocks\.\d+\.mlp\.\w+`; modules that the technique cannot wrap are
            passed over.
        technique: its name. settings: its own. rngs: of the parameters it adds; a whole number is a seed.

    Returns:
        The model.

    Raises:
        EditError: no such technique, nothing there that it can wrap, or settings it does not take.
        ConfigError: settings that json cannot hold.
    """
    change = Edit(where=where, technique=technique, settings=settings)
    apply(model, change, rngs if isinstance(rngs, nnx.Rngs) else nnx.Rngs(rngs))
    model.config = model.config.replace(edits=(*model.config.edits, change))
    return model


def apply(model: nnx.Module, change: Edit, rngs: nnx.Rngs) -> None:
    """Make one change to a model, without recording it: all of it, or none."""
    kind, settings = find(change.technique), dict(change.settings)
    matching = [(path, module) for path, module in modules(model) if re.fullmatch(change.where, path)]
    chosen = [(path, module) for path, module in matching if takes(kind, module)]
    if not chosen:
        names = " or ".join(cls.__name__ for cls in kind.accepts)
        if matching:
            what = ", ".join(f"{path} ({type(module).__name__})" for path, module in matching[:3])
            raise EditError(f"{change.technique} wraps {names}, and {change.where!r} matches {what}")
        able = [path for path, module in modules(model) if takes(kind, module)]
        raise EditError(f"no module matches {change.where!r}{suggest(change.where.replace(chr(92), ''), able)}")
    key, made = rngs.params(), []
    for path, module in chosen:
        own = nnx.Rngs(jax.random.fold_in(key, zlib.crc32(path.encode())))  # what else is edited changes nothing here
        try:
            made.append((path, kind(module, rngs=own, **settings)))
        except TypeError as error:
            raise EditError(f"{change.technique} at {path}: {error}") from error
    for path, module in made:
        put(model, path, module)


def takes(kind: type[Technique], module: nnx.Module) -> bool:
    """Whether a technique can wrap a module: by what stands under all that is wrapped around it already."""
    while isinstance(module, Technique):
        module = module.inner
    return isinstance(module, kind.accepts)


def put(model: Any, path: str, module: nnx.Module) -> None:
    """Set the module at a dotted path."""
    *parents, last = path.split(".")
    for name in parents:
        model = model[int(name)] if name.isdigit() else getattr(model, name)
    if last.isdigit():
        model[int(last)] = module
    else:
        setattr(model, last, module)


@contextlib.contextmanager
def all_or_none(model: Any) -> Iterator[None]:
    """Undo every edit of a model that was made inside when something is raised there; weights that were set stay so."""
    before, config = list(modules(model)), model.config
    try:
        yield
    except BaseException:
        for path, module in reversed(before):  # the outer ones first: what is inside of them is put into them again
            put(model, path, module)
        model.config = config
        raise


def fold(model: Any) -> Any:
    """A plain copy of a model: every technique replaced by the module it amounts to; the model stays as it is.

    Raises EditError: every technique that no plain module can stand for, by path.
    """
    plain, problems = nnx.clone(model), []
    for path, module in list(modules(plain)):
        if isinstance(module, Technique):
            try:
                put(plain, path, module.fold())
            except EditError as error:
                problems.append(f"{path}: {error}")
    if problems:
        raise EditError("; ".join(problems))
    plain.config = plain.config.replace(edits=())
    return plain
