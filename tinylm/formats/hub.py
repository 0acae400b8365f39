"""Models of the Hugging Face hub: only their safetensors, json and vocabulary files are fetched; no code, no pickles.

Needs the package `huggingface_hub` (`pip install 'tinylm[hub]'`); HF_ENDPOINT names another server, as everywhere.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tinylm.formats.hf_weights import INDEX, PICKLES, SINGLE
from tinylm.formats.tables import FormatError
from tinylm.store import PathLike

NAME = re.compile(r"(?!.*\.\.)[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9_][\w.-]{0,95})?")
SHARD = re.compile(r"[\w-]+-\d{5}-of-\d{5}\.safetensors")
FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
)


def pull(id: str, revision: str | None = None, *, cache: PathLike | None = None) -> Path:
    """Fetch a model of the hub, or find it among what was fetched before when the hub cannot be reached.

    Args:
        id: "name/repository". revision: branch, tag or commit; None is the newest.
        cache: where files are kept; None is huggingface_hub's place for all programs.

    Returns:
        The folder, for `hf.read`.

    Raises:
        FormatError: no such repository or revision, one that needs a login, only pickles there, no network, or the
            package is missing; with the remedy.
    """
    hub, errors, failures = package()
    if not NAME.fullmatch(id):
        raise FormatError(f"{id!r} is no name of a repository: it looks like hf:name/repository")
    api = hub.HfApi(endpoint=endpoint())
    what = f"{id}{f' at revision {revision!r}' if revision else ''}"
    try:
        about = api.model_info(id, revision=revision)
        wanted = chosen(id, [file.rfilename for file in about.siblings or []])
        found = api.snapshot_download(id, revision=revision, allow_patterns=wanted, cache_dir=cache)
    except errors.GatedRepoError as error:
        raise FormatError(f"{what}: its owner must let you in; ask on its page, then `hf auth login`") from error
    except errors.RevisionNotFoundError as error:
        raise FormatError(f"{id} has no revision {revision!r} at {api.endpoint}") from error
    except errors.RepositoryNotFoundError as error:
        remedy = "check the name; a private one needs `hf auth login`"
        raise FormatError(f"there is no repository {id!r} at {api.endpoint}: {remedy}") from error
    except failures as error:
        found = kept(api, id, revision, cache)
        if found is None:
            raise FormatError(f"{what} could not be fetched from {api.endpoint}: {_short(error)}") from error
    return Path(found)


def endpoint() -> str | None:
    """The server that HF_ENDPOINT names; None for the usual one."""
    return os.environ.get("HF_ENDPOINT") or None


def chosen(id: str, files: Iterable[str]) -> list[str]:
    """What to fetch of a repository's files. Raises FormatError when that is no model the kit reads."""
    files = set(files)
    weights = (
        [SINGLE] if SINGLE in files else [INDEX, *sorted(filter(SHARD.fullmatch, files))] if INDEX in files else []
    )
    if not weights:
        pickles = sorted(file for file in files if file.endswith(PICKLES))
        if pickles:
            raise FormatError(
                f"{id} holds its weights only as a pickle ({', '.join(pickles[:3])}), and loading a pickle can run any "
                "code: tinylm never does. Its owner, or the hub's safetensors/convert space, can add model.safetensors"
            )
        raise FormatError(f"{id} has no {SINGLE}; it holds {', '.join(sorted(files)[:8]) or 'nothing'}")
    if "config.json" not in files:
        raise FormatError(f"{id} has no config.json: it is no model of transformers")
    return [*weights, *(file for file in FILES if file in files)]


def kept(api: Any, id: str, revision: str | None, cache: PathLike | None) -> str | None:
    """The folder of an earlier download, if it is whole."""
    try:
        wanted = [*FILES, SINGLE, INDEX, "*-of-*.safetensors"]
        place = {"cache_dir": cache, "local_files_only": True}
        found = api.snapshot_download(id, revision=revision, allow_patterns=wanted, **place)
    except OSError:
        return None
    there = set(os.listdir(found))
    return found if "config.json" in there and there & {SINGLE, INDEX} else None


def package() -> tuple[Any, Any, tuple[type[Exception], ...]]:
    """huggingface_hub, its errors, and what everything that goes wrong on the way is. Raises FormatError without it."""
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise FormatError("the hub needs the package huggingface_hub: pip install 'tinylm[hub]'") from error
    # OSError and the HTTPError of its client, which was another package in each of its major versions
    return huggingface_hub, errors, errors.HfHubHTTPError.__bases__


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"
