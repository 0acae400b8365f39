"""Completions of prompts by a model, and whether it ended them itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from tinylm.config import Sampling
from tinylm.generation import generate_tokens, prompt_ids, tokenizer_of, until_end

__all__ = ["Completion", "complete"]


class Completion(NamedTuple):
    """What a model made of a prompt. `text` goes on where the prompt stops; `ended`: it came to an end by itself."""

    prompt: str
    text: str
    ended: bool

    @property
    def whole(self) -> str:
        """Prompt and continuation."""
        return self.prompt + self.text


def complete(
    model: Any, prompts: Sequence[str], *, tokens: int = 200, seed: int = 0, batch: int = 32, **sampling: Any
) -> list[Completion]:
    """One completion of every prompt; equal prompts get different ones.

    Args:
        model: a decoder with a tokenizer. prompts: beginnings of texts, without a space at the end.
        tokens: at most so many each. seed: of the choices. batch: prompts side by side; part of what a seed means.
        sampling: fields of `Sampling`; the default is the model's own distribution (temperature 1).

    Raises GenerateError, ConfigError.
    """
    tokenizer, found = tokenizer_of(model), []
    settings = Sampling.from_dict({"temperature": 1.0} | sampling)
    for number, at in enumerate(range(0, len(prompts), batch)):
        group = list(prompts[at : at + batch])
        made: list[list[int]] = [[] for _ in group]
        starts = [prompt_ids(tokenizer, prompt) for prompt in group]
        for ids in generate_tokens(model, starts, tokens=tokens, sampling=settings, seed=seed * 4096 + number):
            for row, new in zip(made, ids.tolist(), strict=True):
                row.extend(new)
            if all(len(until_end(tokenizer, row)) < len(row) for row in made):
                break
        for prompt, row in zip(group, made, strict=True):
            own = until_end(tokenizer, row)
            text = tokenizer.decode(own)
            text = text if prompt else text.removeprefix(tokenizer.prefix.decode())
            found.append(Completion(prompt, text, len(own) < len(row)))
    return found
