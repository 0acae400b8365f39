"""Hierarchical memories: common knowledge in the model, the long tail in parameters that it fetches per document.

    tree = Tree.fit(texts, children=8, depth=2)                        # cluster
    add_memory(model, children=8, rows=(16, 8))                        # (techniques.memory)
    batches = Documents(tokens, tree.find(texts), children=8, batch=16, length=128, generic=1 / 17)
    for step in train(model, batches, config): ...                     # only fetched rows move
    generate(fetching(model, tree.find([prompt])[0]), prompt)          # strict: from the prompt alone

The engine fetches nothing: `export` refuses memories by path, and takes `bake(model, nodes)`, a plain model with the
memory of one path built in.
"""

from tinylm.memory.bank import Bank
from tinylm.memory.browser import browse, typical
from tinylm.memory.clusters import MemoriesError, States, TfIdf, Tree, kmeans, read_nodes, write_nodes
from tinylm.memory.documents import Documents, Only, generic_nodes, paths, shuffled
from tinylm.memory.retrieval import Recall, Score, fetching, memories, recall, score, shape_of, tell, token_scores
from tinylm.memory.surgery import Block, bake, blocked, blocks, delete, swap, under
from tinylm.memory.training import BankTrainer, resume_with_bank, train_with_bank
from tinylm.techniques.memory import add_memory

__all__ = [
    "Bank", "BankTrainer", "Block", "Documents", "MemoriesError", "Only", "Recall", "Score", "States", "TfIdf", "Tree",
    "add_memory", "bake", "blocked", "blocks", "browse", "delete", "fetching", "generic_nodes", "kmeans", "memories",
    "paths", "read_nodes", "recall", "resume_with_bank", "score", "shape_of", "shuffled", "swap", "tell",
    "token_scores", "train_with_bank", "typical", "under", "write_nodes",
]  # fmt: skip
