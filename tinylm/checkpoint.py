"""`save` and `load` of models, and the door to everything else about checkpoints.

A saved model is a folder: config.json ({"format", "tinylm": the ModelConfig, "tokenizer": its sha256, "versions"}),
model.safetensors (see `store`) and, when the model has a tokenizer, tokenizer.json. Nothing here unpickles, follows a
name found in a file, or opens anything but the given path and its neighbours of exactly these names.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from tinylm import formats
from tinylm.config import Codec, ModelConfig
from tinylm.folder import (
    FORMAT,
    RunLocked,
    contents,
    is_run,
    naming,
    pretty,
    read_config,
    read_tokenizer,
    versions,
)
from tinylm.model import Transformer, shapes
from tinylm.run import STEP, Run
from tinylm.store import CheckpointDamaged, PathLike, StateMismatch, read_file, write_bytes, write_file
from tinylm.weights import assign, named

__all__ = [
    "CheckpointDamaged",
    "Run",
    "RunLocked",
    "StateMismatch",
    "differences",
    "load",
    "read_file",
    "require_match",
    "save",
    "versions",
    "write_file",
]

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
FOREIGN = (".tlm", ".h5", ".msgpack", ".npz")
NO_FOLDERS = (*PICKLES, *FOREIGN, ".safetensors", ".json", ".txt", ".zip", ".tar", ".gz", ".tgz")  # suffixes of files
STATE = ("opt.average.", "params.")  # the part of a training state that is the model: its average, where there is one


def save(model: Transformer, path: PathLike, *, format: str | None = None, **options: Any) -> Path:
    """Write a model: into the folder `path` (made if need be) for `load`, or as another program's file.

    Args:
        model: to save. path: a folder, or a file whose suffix says the format: .bin (llama2.c), .gguf, .onnx.
        format: "hf" writes a folder for Hugging Face's transformers, "tinylm" the kit's own; files say it by suffix.
        options: of the format (see `tinylm.formats`); of the kit's own folder `codec="planes"`, a smaller file, without
            loss (`write_file` can also store the difference to an earlier file).

    Raises:
        FileExistsError: the folder is a run or somebody else's model. OSError: path, free and needed MB.
        FormatError: what the format cannot say of this model; nothing is written then.
    """
    if not str(path).strip() or Path(path).name in (".bin", ".gguf", ".onnx"):
        raise formats.FormatError(f"{str(path)!r} is no name for a file or a folder")
    if format not in (None, "tinylm") or (format is None and formats.format_of(path)):
        return formats.write(model, path, format=format, **options)
    if Path(path).suffix.lower() in NO_FOLDERS:
        raise formats.FormatError(f"{path}: the kit's own models are folders; name one without {Path(path).suffix}")
    formats.require_known(options, ["codec"], "the kit's own folder")
    return _save(model, Path(path), **options)


def _save(model: Transformer, folder: Path, *, codec: Codec = "raw") -> Path:
    """The kit's own folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "config.json").exists() and "tinylm" not in (there := read_config(folder)):
        what = "a run" if is_run(there) else "another program's model"
        raise FileExistsError(f"{folder} holds {what}: save into another folder")
    tokenizer = model.tokenizer
    about = {"tinylm": model.config.to_dict(), "tokenizer": tokenizer.sha256 if tokenizer else None}
    # The file says again what config.json says: see `load`.
    write_file(folder / "model.safetensors", named(model), about, codec=codec)
    if tokenizer is not None:
        write_bytes(folder / "tokenizer.json", tokenizer.to_json().encode())
    else:
        (folder / "tokenizer.json").unlink(missing_ok=True)
    write_bytes(folder / "config.json", pretty({"format": FORMAT, **about, "versions": versions()}))
    return folder


def load(path: PathLike, **options: Any) -> Transformer:
    """The model in a folder made by `save`, in a run folder (newest sound checkpoint), in one step's file of a run, or
    of another program: a folder of Hugging Face's transformers, llama2.c's .bin, a .gguf, or `hf:NAME/REPO` of the hub.

    `options` are those of a foreign format, such as `tokenizer="tok512.bin"` for a llama2.c file without one beside it.

    Warns when damaged checkpoints were passed over. Raises FileNotFoundError (nothing there), ValueError (another kind
    of file, with what to do), CheckpointDamaged, StateMismatch (weights that are not this config's), ConfigError.
    """
    if str(path).startswith(formats.HUB):
        return formats.read(path, **options)
    path = Path(path)
    if path.is_file() and formats.format_of(path):
        return formats.read(path, **options)
    if path.is_file():
        return _load_file(path)
    if not path.is_dir():
        raise FileNotFoundError(f"there is no file or folder {str(path)!r}")
    names = os.listdir(path)
    if "config.json" not in names:
        raise _unknown(path, names)
    config = read_config(path)
    if is_run(config) or "tinylm" in config:
        formats.require_known(options, [], f"loading {path}, which is the kit's own")
    if is_run(config):
        with Run.open(path) as run:
            _, tensors, _, notes = run.restore()
            for note in notes:
                warnings.warn(note, stacklevel=2)
            return _from_run(run, tensors)
    if "tinylm" not in config:
        return formats.read(path, **options)
    if type(config["tinylm"]) is not dict:
        raise CheckpointDamaged(f"{path / 'config.json'} is damaged: 'tinylm' holds no settings")
    tensors, about = read_file(path / "model.safetensors")
    with naming(path / "config.json"):
        model = ModelConfig.from_dict(config["tinylm"])
    for key in ("tinylm", "tokenizer"):
        if about.get(key) != config.get(key):  # a crash between two files of `save`, or a mixed-up folder
            raise StateMismatch(f"{path}: model.safetensors and config.json are of different models ({key} differs)")
    return _assemble(model, tensors, read_tokenizer(path, config.get("tokenizer")), path / "model.safetensors")


def require_match(expected: Mapping[str, Any], found: Mapping[str, Any], what: str) -> None:
    """Raise StateMismatch, with the first ten differences, unless names, shapes and dtypes are all the same."""
    if wrong := differences(expected, found):
        more = f"; and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        raise StateMismatch(f"{what} does not fit: {'; '.join(wrong[:10])}{more}")


def differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """One line per name that is missing, unknown, misshapen or of another type; both map names to array-likes."""
    wrong = []
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            wrong.append(f"{name} is missing")
        elif name not in expected:
            wrong.append(f"{name} is unknown here")
        else:
            want, have = expected[name], found[name]
            if tuple(want.shape) != tuple(have.shape):
                wrong.append(f"{name} has shape {tuple(have.shape)} instead of {tuple(want.shape)}")
            if want.dtype != have.dtype:
                wrong.append(f"{name} has type {have.dtype} instead of {want.dtype}")
    return wrong


def _load_file(path: Path) -> Transformer:
    suffix, home = path.suffix.lower(), path.absolute().parent
    if path.name == "model.safetensors" and (home / "config.json").exists():
        return load(home)
    if STEP.fullmatch(path.name) and home.name == "checkpoints" and (home.parent / "config.json").exists():
        with Run.open(home.parent) as run:
            return _from_run(run, run.restore(int(path.stem.removeprefix("step-")))[1])
    raise (
        _unknown(path, [path.name])
        if suffix != ".safetensors"
        else ValueError(f"{path} is a weight file without its config: load the folder of a saved model or of a run")
    )


def _from_run(run: Run, tensors: Mapping[str, Any]) -> Transformer:
    where = next((part for part in STATE if any(name.startswith(part) for name in tensors)), None)
    if where is None:
        raise StateMismatch(
            f"a checkpoint of {run.folder} holds no model: its tensors are {', '.join(tensors) or 'none'}"
        )
    params = {name.removeprefix(where): value for name, value in tensors.items() if name.startswith(where)}
    return _assemble(run.model, params, run.tokenizer, run.folder)


def _assemble(config: ModelConfig, tensors: Mapping[str, Any], tokenizer: Any, what: Path) -> Transformer:
    require_match(shapes(config), tensors, str(what))
    model = nnx.eval_shape(lambda: Transformer(config, rngs=0, tokenizer=tokenizer))  # no random weights are computed
    assign(model, {name: jax.numpy.asarray(value) for name, value in tensors.items()})
    return model


def _unknown(path: Path, names: list[str]) -> Exception:
    """Why `path`, with these files, is nothing that `load` can read, and what to do."""
    suffixes = {Path(name).suffix.lower() for name in names}
    if any(name.endswith("-00000.json") for name in names):
        return ValueError(f"{path} holds token shards, which a model learns from: load the folder of a run or a model")
    if suffixes & set(PICKLES) and ".safetensors" not in suffixes:
        return ValueError(
            f"{path} holds a pickle, and loading a pickle can run any code: tinylm never does. Convert it to "
            "safetensors where you trust it (safetensors.torch.save_file)"
        )
    if suffixes & set(FOREIGN):
        return ValueError(f"{path} is another program's format, which this version does not read")
    if files := sorted(name for name in names if formats.format_of(name)):
        return ValueError(f"{path} is a folder with {', '.join(files[:4])}: load the file itself, {path / files[0]}")
    if path.is_dir():
        return FileNotFoundError(f"{path} is neither a saved model nor a run: no config.json; {contents(path)}")
    return ValueError(f"{path} has the unknown suffix {path.suffix!r}: load takes the folder of a saved model or a run")
