"""Files of one version, for all later ones to read: `python tests/golden.py 0.1.0` writes tests/golden/0.1.0 once, at a
release. A folder that is there is never written again.
"""

import json
import sys
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent / "golden"
TEXTS = ["The cat sat on the mat.", "A dog ran to the cat, and the cat ran away."] * 4
PROMPT = "The cat"


def said(model) -> list[float]:
    """The logits after a prompt, enough of them to know the model by."""
    tokens = np.asarray(model.tokenizer.encode(PROMPT), np.int32)[None]
    return [round(float(x), 4) for x in np.asarray(model(tokens))[0, -1, ::16]]


def main() -> None:
    import tinylm

    folder = FOLDER / sys.argv[1]
    folder.mkdir(parents=True)
    tokenizer = tinylm.Tokenizer.train([], kind="byte")
    tokens = tinylm.write_tokens(TEXTS, tokenizer, folder / "run" / "data")
    config = tinylm.ModelConfig(vocab=tokenizer.vocab, context=16, width=8, layers=1, heads=2)
    model = tinylm.Transformer(config, tokenizer=tokenizer)
    settings = tinylm.TrainConfig(steps=4, batch=2, optimizer="adamw", learning_rate=0.01, codec="planes")
    trainer = tinylm.train(model, tokens, settings, out=folder / "run")
    list(trainer)
    tinylm.save(model, folder / "model")
    tinylm.save(model, folder / "coded", codec="planes")
    tinylm.export(model, folder / "model.tlm")
    ids = list(tinylm.Engine(str(folder / "model.tlm")).ids(PROMPT, tokens=8, temperature=0.0))
    about = {"logits": said(model), "ids": [int(i) for i in ids], "tokens": tokens.sha256, "losses": trainer.losses}
    (folder / "golden.json").write_text(json.dumps(about) + "\n")
    (folder / "run" / "lock").unlink()
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {size / 1000:.0f} KB")
    assert size < 200_000


if __name__ == "__main__":
    main()
