"""Codes read and used: find them in a corpus, name what they mean, steer a model by them, look at them.

    index = codebooks.build(model, tokens, "runs/index")                  # which code fires where, on disk
    labels = [codebooks.token_labels(index, tokenizer), *codebooks.regex_labels(index, tokenizer, {"fire": r"\\bfire"})]
    codebooks.Explorer(model, index, labels=labels)                       # what each means, and does
    codebooks.steer(model, ["One day,"], activate=[("blocks.1.mlp.down", 0, 17)])

The technique itself is `tinylm.techniques.codebook`; `fsm` holds what belongs to finite-state machines, `sae` what
codes are compared with.
"""

from tinylm.codebooks.books import CodebookError, books, dead, read, start, tapped, usage, wake
from tinylm.codebooks.explorer import Explorer, usage_picture
from tinylm.codebooks.index import Index, build
from tinylm.codebooks.reading import (
    Fired,
    Labels,
    Match,
    best_codes,
    best_neurons,
    contexts,
    named_codes,
    pair_labels,
    regex_labels,
    token_labels,
    world_labels,
)
from tinylm.codebooks.steering import (
    Bayes,
    Steering,
    codes_for,
    codes_toward,
    containing,
    effects,
    like,
    steer,
    steered,
    trial,
)

__all__ = [
    "Bayes", "CodebookError", "Explorer", "Fired", "Index", "Labels", "Match", "Steering", "best_codes",
    "best_neurons", "books", "build", "codes_for", "codes_toward", "containing", "contexts", "dead", "effects", "like",
    "named_codes", "pair_labels", "read", "regex_labels", "start", "steer", "steered", "tapped", "token_labels",
    "trial", "usage", "usage_picture", "wake", "world_labels",
]  # fmt: skip
