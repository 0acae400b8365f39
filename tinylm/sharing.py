"""Giving a model away: a model card generated from what the run wrote down, and a push to the Hugging Face hub.

    print(card("runs/first"))
    push("runs/first", "me/stories", extra={"license": "apache-2.0", "language": "en"})

A card says only what files prove: settings, hashes, counts and figures of the run, never where it lay on a disk.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from tinylm.checkpoint import load, save
from tinylm.config import ModelConfig, TrainConfig
from tinylm.folder import is_run, naming, read_config, read_tokenizer, versions
from tinylm.formats import hub
from tinylm.formats.tables import FormatError
from tinylm.model import Transformer, shapes
from tinylm.reading import regular
from tinylm.run import Run
from tinylm.store import PathLike, write_bytes
from tinylm.tokenizer import Tokenizer

Format = Literal["hf", "tinylm"]
TASKS = {"mlm": "fill-mask", "classes": "text-classification", "none": "feature-extraction"}
SPECIAL = re.compile(r"([\\`*_{}\[\]#!|~$]|^[-+=])")
SHAPE = ("vocab", "context", "width", "layers", "heads", "kv_heads", "head_width", "hidden")
TOLD = {"optimizer", "learning_rate", "schedule", "batch", "objective", "dtype", "seed"}  # also where it is the default
UNTOLD = {"log_every", "eval_batches", "save_every", "keep", "codec"}  # settings that change no result


def card(
    source: PathLike,
    *,
    extra: Mapping[str, Any] | None = None,
    text: str = "",
    name: str = "",
    format: Format = "tinylm",
    model: Transformer | None = None,
) -> str:
    """A README.md for a model: front matter for the hub, then what it is, how it was trained, how to load it.

    Args:
        source: a run folder, or anything else that `tinylm.load` loads: of that, the card says what the model shows.
        extra: more entries of the front matter, such as license, language, datasets.
        text: a paragraph of your own. name: the title; default the folder's. format: what the files will be.
        model: that of another program's files, where it is loaded already.

    Raises:
        FileNotFoundError, CheckpointDamaged, StateMismatch, ConfigError, FormatError: as `tinylm.load`.
        ValueError: `extra` holds what json cannot say.
    """
    folder = Path(source)
    raw = read_config(folder) if (folder / "config.json").is_file() else {}
    if is_run(raw):
        with Run.open(folder) as run:
            config, tokenizer = run.model, run.tokenizer
            step = max(run.steps(), default=0)
            records = [record for record in run.history() if _number(record.get("step")) <= step]
        parts = [*_training(run.train, records), *_data(run.data, folder)]
    elif isinstance(raw.get("tinylm"), dict):
        with naming(folder / "config.json"):
            config = ModelConfig.from_dict(raw["tinylm"])
        tokenizer, parts = read_tokenizer(folder, raw.get("tokenizer")), []
    else:
        model = model or load(source)
        config, tokenizer, parts = model.config, model.tokenizer, []
    title = name or folder.absolute().name
    made = raw["versions"] if isinstance(raw.get("versions"), dict) else versions()
    lines = [
        *_front(config, extra or {}, format),
        f"# {_plain(title)}",
        *([_plain(text)] if text else []),
        _summary(config),
        *parts,
        *_tokenizer(tokenizer),
        "## Versions",
        ", ".join(f"{_plain(key)} {_plain(value)}" for key, value in made.items()),
        "## Use",
        _use(config, title, format),
    ]
    return "\n\n".join(lines) + "\n"


def push(
    source: PathLike,
    repository: str,
    *,
    private: bool = True,
    format: Format = "hf",
    extra: Mapping[str, Any] | None = None,
    text: str = "",
    **options: Any,
) -> str:
    """Upload a model and its card to the Hugging Face hub; returns the page's address.

    Nothing is uploaded but the files of the format and README.md, in one commit. Log in first: `hf auth login`.

    Args:
        source: anything that `tinylm.load` loads; of a run folder, its newest sound checkpoint.
        repository: "name/repository"; made if need be. private: when it is made; an older one stays as it is.
        format: "hf" for transformers, "tinylm" for `tinylm.load` alone. extra, text: for `card`.
        options: of the format, such as `dtype="bfloat16"` for hf, `codec="planes"` for tinylm.

    Raises:
        FormatError: transformers cannot say this model; an option that the format does not know; no login, no network,
            a refusal of the hub, no package.
    """
    library, errors, failures = hub.package()
    if not hub.NAME.fullmatch(repository):
        raise FormatError(f"{repository!r} is no name of a repository: it looks like name/repository")
    if format not in ("hf", "tinylm"):
        raise FormatError(f"format = {format!r}: must be hf or tinylm")
    api = library.HfApi(endpoint=hub.endpoint())
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        model = load(source)
        save(model, folder, format=format, **options)
        about = card(source, extra=extra, text=text, name=repository, format=format, model=model)
        write_bytes(folder / "README.md", about.encode())
        try:
            address = api.create_repo(repository, private=private, exist_ok=True)
            api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Model written by tinylm")
        except (errors.LocalTokenNotFoundError, errors.RepositoryNotFoundError) as error:
            raise FormatError(f"{api.endpoint} does not let you write {repository}: `hf auth login` first") from error
        except (ValueError, *failures) as error:
            reason = " ".join(str(error).split())[:300]
            raise FormatError(f"{repository} could not be pushed to {api.endpoint}: {reason}") from error
    return str(address)


# --- parts of a card --------------------------------------------------------------------------------------------------


def _front(config: ModelConfig, extra: Mapping[str, Any], format: Format) -> list[str]:
    """YAML; every value is json, which YAML contains, so that no text of a user can add a line."""
    entries: dict[str, Any] = {
        "library_name": "transformers" if format == "hf" else "tinylm",
        "pipeline_tag": TASKS.get(config.head, "text-generation"),
        "tags": ["tinylm"],
    }
    for key, value in extra.items():
        if not re.fullmatch(r"\w[\w-]*", key):
            raise ValueError(f"extra has the key {key!r}: letters, digits, - and _ only")
        entries[key] = value
    try:
        lines = [f"{key}: {json.dumps(value, allow_nan=False)}" for key, value in entries.items()]
    except TypeError as error:
        raise ValueError(f"extra holds what json cannot say: {error}") from error
    return ["\n".join(["---", *lines, "---"])]


def _summary(config: ModelConfig) -> str:
    count = sum(math.prod(leaf.shape) for leaf in shapes(config).values())
    kind = "Reads left to right" if config.kind == "decoder" else "Reads both ways"
    told = config.to_dict()
    neutral = ModelConfig(**{name: told[name] for name in SHAPE}).to_dict()
    other = {name: told[name] for name in told if name not in SHAPE and told[name] != neutral[name]}
    rows = [("parameters", f"{count:,}"), *((name, told[name]) for name in SHAPE), *other.items()]
    return f"{kind}: a transformer of {count:,} parameters, made with tinylm.\n\n" + _table(("model", ""), rows)


def _training(train: TrainConfig, records: list[dict[str, Any]]) -> list[str]:
    last = records[-1] if records else {}
    seen = [("last step", last.get("step")), ("tokens seen", last.get("tokens")), ("seconds", last.get("seconds"))]
    measured = [("training loss, nats per token", last.get("loss"))]
    valid = next((record for record in reversed(records) if record.get("valid_loss") is not None), {})
    measured += [
        ("held-out loss, nats per token", valid.get("valid_loss")),
        ("held-out bits per byte", valid.get("valid_bits")),
        ("... after step", valid.get("step")),
    ]
    neutral = {**TrainConfig(steps=1).to_dict(), "steps": 0}
    told = {k: v for k, v in train.to_dict().items() if k not in UNTOLD and (v != neutral[k] or k in TOLD)}
    rows = [*((k, v) for k, v in seen if v is not None), *told.items()]
    results = [(k, v) for k, v in measured if v is not None]
    parts = ["## Training", _table(("training", ""), rows)]
    return parts + (["## Results", _table(("measured", "value"), results)] if results else [])


def _data(data: Mapping[str, Any], run: Path) -> list[str]:
    """Hashes of the tokens, and their provenance where it is still there and is theirs."""
    rows: list[tuple[str, Any]] = []
    about: dict[str, Any] = {}
    for split in ("train", "valid"):
        part = data.get(split)
        if not isinstance(part, dict):
            continue
        rows.append((f"{split}, sha256 of the tokens", part.get("sha256")))
        for place in (part.get("folder"), "data"):  # seen from the run's folder, which may have been moved with them
            found = _provenance(run, place)
            counted = found.get(split)
            if isinstance(counted, dict) and counted.get("sha256") == part.get("sha256"):
                about = about or found
                rows += [(f"{split}, {key}", counted.get(key)) for key in ("documents", "bytes", "tokens")]
                break
    wish = about.get("wish")
    if isinstance(wish, dict) and isinstance(wish.get("sources"), list):
        rows += [("source", source) for source in wish["sources"]]
    rows += [(key.replace("_", " "), about[key]) for key in ("documents_read", "bytes_read") if key in about]
    for key in ("duplicates", "contamination"):
        found = about.get(key)
        if isinstance(found, dict):
            rows += [(f"{key} removed, {inner}", value) for inner, value in found.items()]
    return ["## Data", _table(("data", ""), rows)] if rows else []


def _provenance(run: Path, folder: Any) -> dict[str, Any]:
    try:
        raw = json.loads(regular(run / folder / "provenance.json"))
    except (OSError, ValueError, TypeError, RecursionError):
        return {}
    return raw if isinstance(raw, dict) else {}


def _tokenizer(tokenizer: Tokenizer | None) -> list[str]:
    if tokenizer is None:
        return []
    exact = "yes" if tokenizer.lossless else "no"
    rows = [("kind", tokenizer.kind), ("ids", tokenizer.vocab), ("gives every text back", exact)]
    return ["## Tokenizer", _table(("tokenizer", ""), [*rows, ("sha256", tokenizer.sha256)])]


def _use(config: ModelConfig, name: str, format: Format) -> str:
    name = name if re.fullmatch(r"[\w./ -]+", name) else "path/to/it"
    given = json.dumps(f"hf:{name}" if format == "hf" else name)
    lines = ["import tinylm", "", f"model = tinylm.load({given})"]
    if format == "tinylm" and hub.NAME.fullmatch(name) and "/" in name:  # of the hub, but not for transformers
        lines = ["import tinylm", "from tinylm.formats.hub import pull", "", f"model = tinylm.load(pull({given}))"]
    if config.kind == "decoder" and config.head in ("tied", "untied"):
        lines.append('print(tinylm.generate(model, "Once upon a time"))')
    return "\n".join(["```python", *lines, "```"])


def _table(head: tuple[str, str], rows: Iterable[tuple[str, Any]]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|"]
    return "\n".join(lines + [f"| {_plain(key)} | {_plain(_said(value))} |" for key, value in rows])


def _said(value: Any) -> str:
    if type(value) is int:
        return f"{value:,}"
    return f"{value:.6g}" if type(value) is float else str(value)


def _plain(text: Any) -> str:
    """Text that Markdown shows as it is, on one line: no markup, no html, no end of the table's cell."""
    line = " ".join(str(text).split())
    return SPECIAL.sub(r"\\\1", line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
