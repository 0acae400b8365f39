"""Classification: sets, fine-tuning of any model of the kit, committees of shallow models, and what they are worth.

train_set, test_set = PROTOCOLS["fewrel"](read_set("val_wiki.json"))
models = [Transformer(preset("bert-1", ..., width=64), rngs=s, tokenizer=tokenizer) for s in range(5)]
batches = [masked_texts(model, articles, seed=s) for s, model in enumerate(models)]  # pretraining, a source per member
list(train_many(models, batches, fixed(len(articles), width=64).grid(seed=range(5))))
committee = Committee.of(classify_many(models, train_set, epochs=10, pooling="mean"))
print(committee.evaluate(test_set))                                             # accuracy, macro-F1, calibration

sets         texts with classes from files, the hub, the world; the papers' subsamples
finetune     classify, classify_many, snapshots; masked pretraining; the paper's run, faithful and fixed
scoring      class scores, many models as one program; statistics of batch norms
metrics      accuracy, macro-F1, calibration, confusion, intervals
committee    the rules, files, the engine
analysis     accuracy against K, diversity, FLOPs, cascades, overlap
pictures     K-curve, confusion, disagreement, cascade
"""

from __future__ import annotations

from tinylm.classification.analysis import (
    Cascade,
    Diversity,
    Point,
    cascade,
    cost,
    coverage,
    curve,
    diversity,
    frontier,
    only_committee,
    select_texts,
    uncertainty,
    where_larger_helps,
)
from tinylm.classification.committee import COMBINE, Committee, EngineCommittee, combined, learned_weights
from tinylm.classification.finetune import (
    Epoch,
    Finetuned,
    classify,
    classify_many,
    faithful,
    fixed,
    masked_texts,
    parameters_like,
    snapshots,
    with_classes,
)
from tinylm.classification.metrics import Classified, calibration, classified, confusion_matrix, macro_f1, wilson
from tinylm.classification.pictures import cascade_curve, confusion_map, disagreement_map, k_curve
from tinylm.classification.scoring import evaluate_classes, scores, settle
from tinylm.classification.sets import PROTOCOLS, Dataset, Protocol, SetError, read_set

__all__ = [
    "COMBINE", "PROTOCOLS", "Cascade", "Classified", "Committee", "Dataset", "Diversity", "EngineCommittee", "Epoch",
    "Finetuned", "Point", "Protocol", "SetError", "calibration", "cascade", "cascade_curve", "classified", "classify",
    "classify_many", "combined", "confusion_map", "confusion_matrix", "cost", "coverage", "curve", "disagreement_map",
    "diversity", "evaluate_classes", "faithful", "fixed", "frontier", "k_curve", "learned_weights", "macro_f1",
    "masked_texts", "only_committee", "parameters_like", "read_set", "scores", "select_texts", "settle", "snapshots",
    "uncertainty", "where_larger_helps", "wilson", "with_classes",
]  # fmt: skip
