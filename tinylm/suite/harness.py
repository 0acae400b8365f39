"""EleutherAI's lm-evaluation-harness on a model of the kit: an adapter, where `lm_eval` is installed.

import lm_eval
lm_eval.simple_evaluate(model=harness(tinylm.load("runs/first")), tasks=["blimp"])
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from tinylm.config import Sampling
from tinylm.evaluation import EvaluationError
from tinylm.generation import generate_tokens, prompt_ids, until_end
from tinylm.suite.scoring import Scorer

__all__ = ["harness"]

TOKENS = 256  # generated where a task names no number, as the harness's own models do


def harness(model: Any, *, tokenizer: Any = None, batch: int = 16) -> Any:
    """An `lm_eval.api.model.LM` of a decoder: loglikelihood, loglikelihood_rolling and generate_until.

    Texts begin with the begin token, which also stands for an empty context. A context that is too long is cut on the
    left. A continuation longer than the context cannot be scored: EvaluationError.

    Raises EvaluationError where lm_eval is missing, with how to install it, and as `Scorer` does.
    """
    try:
        from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise EvaluationError(f"the harness is not installed ({error}): pip install lm_eval") from error
    scorer = Scorer(model, tokenizer=tokenizer, batch=batch)

    class Adapter(LM):
        """A tinylm decoder as the harness sees it."""

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            """(nats of the continuation, whether it is the greedy one) of each request's (context, continuation)."""
            pairs = [_moved(*request.args) for request in requests]
            found = [(one.logprob, one.greedy) for one in scorer.continuations(pairs)]
            for request, one in zip(requests, found, strict=True):
                self.cache_hook.add_partial("loglikelihood", request.args, one)
            return found

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            """Nats of each request's whole text, in windows where it is longer than the context."""
            found = [float(row.sum()) for row in scorer.texts([request.args[0] for request in requests])]
            for request, one in zip(requests, found, strict=True):
                self.cache_hook.add_partial("loglikelihood_rolling", request.args, one)
            return found

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            """The continuation of each request's context, up to the first of its stop texts."""
            found = [_generated(model, scorer.tokenizer, *request.args) for request in requests]
            for request, one in zip(requests, found, strict=True):
                self.cache_hook.add_partial("generate_until", request.args, one)
            return found

    return Adapter()


def _moved(context: str, continuation: str) -> tuple[str, str]:
    """Spaces at the end of a context belong to the word that follows them: so the harness's own models have it."""
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation


def _generated(model: Any, tokenizer: Any, context: str, settings: dict[str, Any]) -> str:
    stops = settings.get("until") or []
    stops = [stops] if isinstance(stops, str) else list(stops)
    warm = bool(settings.get("do_sample", settings.get("temperature", 0) > 0))
    kept = {name: settings[name] for name in ("top_k", "top_p", "min_p", "repetition_penalty") if name in settings}
    sampling = Sampling.from_dict({**kept, "temperature": float(settings.get("temperature", 1.0)) if warm else 0.0})
    most = int(settings.get("max_gen_toks", settings.get("max_new_tokens", TOKENS)))
    context_ids = np.asarray(prompt_ids(tokenizer, context))
    room = max(1, model.config.context - most)
    made: list[int] = []
    text = ""
    with jax.default_matmul_precision("float32"):
        for ids in generate_tokens(model, [context_ids[-room:]], tokens=most, sampling=sampling):
            made += ids[0].tolist()
            own = until_end(tokenizer, made)
            text = tokenizer.decode(own)
            if len(own) < len(made) or any(stop and stop in text for stop in stops):
                break
    cut = min((at for stop in stops if stop and (at := text.find(stop)) >= 0), default=len(text))
    return text[:cut]
