"""What a completion request of OpenAI's may say, what is refused and why, and the texts that answer it.

No HTTP here: `serve` is around it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import secrets
import time
from collections.abc import Callable, Iterator
from typing import Any

from tinylm.engine import Text


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one client may ask for, and all of them together.

    Attributes:
        body: bytes of a request.
        tokens: `max_tokens` of a completion.
        choices: completions of one request, prompts times `n`.
        seconds: time for all completions of a request; those that are not done end there, as if at `max_tokens`.
        reading: seconds to send a request, and to take a piece of the answer.
        running: requests that generate at the same time.
        waiting: requests that wait for their turn; more are refused with status 429.
        patience: seconds that one waits; then it is refused with status 503.
        connections: open connections; more are refused with status 503.
    """

    body: int = 1 << 20
    tokens: int = 4096
    choices: int = 16
    seconds: float = 120.0
    reading: float = 15.0
    running: int = 2
    waiting: int = 16
    patience: float = 30.0
    connections: int = 64

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not (isinstance(value, int | float) and 0 < value < math.inf) and (field.name, value) != ("waiting", 0):
                raise ValueError(f"{field.name} = {value!r}: a limit is a positive number")


class Refusal(Exception):
    """A request that gets an error: its status, and the fields of OpenAI's error object."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, "invalid_request_error")
        kind = kind if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclasses.dataclass(frozen=True)
class Request:
    """A completion request, checked. `settings` are the arguments of `Engine.stream` but for seed."""

    prompts: tuple[str, ...]
    n: int
    seed: int
    stream: bool
    usage: bool
    settings: dict[str, Any]

    @classmethod
    def parse(cls, asked: Any, name: str, limits: Limits) -> Request:
        """Raises Refusal, naming the field, its value and what may be there."""
        if not isinstance(asked, dict):
            raise Refusal(400, "the body is no JSON object")
        for field in asked:
            if field in REFUSED and asked[field] not in REFUSED[field][0]:
                raise Refusal(400, f"{field} is not offered here: {REFUSED[field][1]}", field, "unsupported_parameter")
            if field not in REFUSED and field not in FIELDS:
                raise Refusal(400, f"unknown field {shown(field)}", field[:100], "unknown_parameter")
        asked = {field: value for field, value in asked.items() if value is not None}
        if (model := asked.get("model", name)) != name:
            raise Refusal(404, f"no model {shown(model)} here; this server has {name!r}", "model", "model_not_found")
        prompts = asked.get("prompt", "")
        prompts = [prompts] if isinstance(prompts, str) else prompts
        if not (isinstance(prompts, list) and prompts and all(isinstance(p, str) for p in prompts)):
            raise Refusal(400, "prompt must be a text or a list of texts; token ids are not taken", "prompt")
        number = Numbers(asked)
        n = number.whole("n", 1, 1, limits.choices)
        if n * len(prompts) > limits.choices:
            raise Refusal(400, f"{len(prompts)} prompts times n = {n} are more than {limits.choices} completions", "n")
        stop = asked.get("stop", [])
        stop = [stop] if isinstance(stop, str) else stop
        if not (isinstance(stop, list) and len(stop) <= 4 and all(isinstance(s, str) and s for s in stop)):
            raise Refusal(400, "stop must be a text or a list of up to 4 texts, none of them empty", "stop")
        for field, texts in (("prompt", prompts), ("stop", stop)):
            if any("\ud800" <= letter <= "\udfff" for text in texts for letter in text):
                raise Refusal(400, f"{field} holds half of a surrogate pair, which is no text", field)
        options = asked.get("stream_options", {})
        if not (isinstance(options, dict) and all(k == "include_usage" for k in options)):
            raise Refusal(400, 'stream_options may hold "include_usage" alone', "stream_options")
        for field, value in (("stream", asked.get("stream", False)), ("include_usage", options.get("include_usage"))):
            if value not in (True, False, None) or (isinstance(value, int) and not isinstance(value, bool)):
                raise Refusal(400, f"{field} = {shown(value)}: must be true or false", field)
        settings = {
            "tokens": number.whole("max_tokens", 16, 0, limits.tokens),
            "temperature": number.real("temperature", 1.0, 0.0, 2.0),
            "top_k": number.whole("top_k", 0, 0, 2**31 - 1),
            "top_p": number.real("top_p", 1.0, 0.0, 1.0, open_below=True),
            "min_p": number.real("min_p", 0.0, 0.0, 1.0),
            "repetition_penalty": number.real("repetition_penalty", 1.0, 0.01, 100.0),
            "stop": tuple(stop),
        }
        seed = number.whole("seed", secrets.randbelow(2**31), -(2**63), 2**63 - 1) % 2**32
        usage = bool(options.get("include_usage"))
        return cls(tuple(prompts), n, seed, bool(asked.get("stream")), usage, settings)


FIELDS = frozenset(
    [
        "model", "prompt", "max_tokens", "n", "seed", "stop", "stream", "stream_options", "temperature", "top_p",
        "user", "top_k", "min_p", "repetition_penalty",  # ours: llama.cpp and vLLM take them too
    ]
)  # fmt: skip
# Fields of OpenAI's that are not offered: the values that ask for nothing, and what to do instead.
REFUSED: dict[str, tuple[tuple, str]] = {
    "echo": ((None, False), "put the prompt before the completion yourself"),
    "logprobs": ((None,), "Engine.logits and Engine.score give them in Python"),
    "best_of": ((None, 1), "ask for n completions"),
    "suffix": ((None, ""), "models here continue a text, they do not fill gaps"),
    "logit_bias": ((None, {}), "leave it out"),
    "presence_penalty": ((None, 0), "use repetition_penalty"),
    "frequency_penalty": ((None, 0), "use repetition_penalty"),
}


class Numbers:
    """The numbers of a request, each within its range or refused."""

    def __init__(self, asked: dict[str, Any]) -> None:
        self.asked = asked

    def whole(self, name: str, default: int, least: int, most: int) -> int:
        value = self.asked.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise Refusal(400, f"{name} = {shown(value)}: must be a whole number from {least} to {most}", name)
        return value

    def real(self, name: str, default: float, least: float, most: float, open_below: bool = False) -> float:
        value = self.asked.get(name, default)
        right = isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most
        if not right or (open_below and value == least):
            bound = "above" if open_below else "from"
            raise Refusal(400, f"{name} = {shown(value)}: must be a number {bound} {least:g} to {most:g}", name)
        return float(value)


def shown(value: Any) -> str:
    """A value of a client's, short and harmless."""
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."


class Completion:
    """The completions of one request, made one after the other: iterate for (choice, piece of text).

    Choice i of a request with seed s is the text of seed s + i alone, so that any of them can be had again.
    """

    def __init__(self, engine: Any, request: Request, ends: float, given_up: Callable[[], bool]) -> None:
        self.engine, self.request, self.ends, self.given_up = engine, request, ends, given_up
        self.texts = [""] * (request.n * len(request.prompts))
        self.reasons: list[str | None] = [None] * len(self.texts)
        self.made = 0

    def __iter__(self) -> Iterator[tuple[int, str]]:
        settings = dict(self.request.settings)
        stop, most = settings.pop("stop"), settings["tokens"]
        for choice in range(len(self.texts)):
            prompt, seed = self.request.prompts[choice // self.request.n], (self.request.seed + choice) % 2**32
            text, made, late = Text(stop, "" if prompt else self.engine.prefix), 0, False
            with contextlib.closing(self.engine.ids(prompt, seed=seed, **settings)) as ids:
                for token in ids:
                    made += 1
                    if piece := text.push(self.engine.piece(token), False):
                        self.texts[choice] += piece
                        yield choice, piece
                    late = time.monotonic() > self.ends
                    if text.stopped or late or self.given_up():
                        break
            self.made += made
            if self.given_up():
                return
            self.reasons[choice] = "length" if not text.stopped and (made == most or late) else "stop"
            if not text.stopped and (piece := text.push(b"", True)):
                self.texts[choice] += piece
                yield choice, piece

    def usage(self) -> dict[str, int]:
        """How many tokens were asked with, without the begin token, and how many were made."""
        asked = sum(len(self.engine.encode(prompt)) for prompt in self.request.prompts)
        return {"prompt_tokens": asked, "completion_tokens": self.made, "total_tokens": asked + self.made}
