"""Several devices give what one gives: forced host devices in a process of their own, and two real processes."""

import json
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from tinylm.checkpoint import load
from tinylm.config import ConfigError, ModelConfig, TrainConfig
from tinylm.model import Transformer
from tinylm.resuming import resume
from tinylm.shards import Tokens, write_tokens
from tinylm.tokenizer import Tokenizer
from tinylm.training import train
from tinylm.weights import named
from tinylm.world import World

MODEL = ModelConfig(vocab=300, context=24, width=32, layers=2, heads=2, dropout=0.1)
CONFIG = TrainConfig(steps=8, batch=8, learning_rate=5e-3, warmup=2, log_every=4, eval_batches=2)
ROOT = Path(__file__).parents[1]

# What every process runs: train the run that argv names, save it, print the losses.
CODE = """
import json, sys
settings = json.loads(sys.argv[1])
import jax
if "process" in settings:
    jax.distributed.initialize(settings["address"], settings["processes"], settings["process"])
from tinylm import Tokens, Transformer, ModelConfig, TrainConfig, train
tokens = Tokens.open(settings["data"], "train")
config = TrainConfig.from_dict(settings["train"])
model = Transformer(ModelConfig.from_dict(settings["model"]))
trainer = train(model, tokens, config, valid=tokens, out=settings["out"])
for step in trainer:
    if step.step == settings.get("stop"):
        trainer.stop()
spread = max(len(x.sharding.device_set) for x in trainer.state.params.values())
whole = sum(x.is_fully_replicated for x in jax.tree.leaves(trainer.state.params))
print(json.dumps({"losses": trainer.losses, "valid": trainer.history[-1].valid_loss, "devices": spread, "whole": whole,
                  "outcome": trainer.outcome, "weight": float(abs(trainer.model.embed.weight()).sum())}))
"""


def start(devices=1, **settings):
    """A process with so many devices."""
    flags = f"--xla_force_host_platform_device_count={devices} {os.environ['XLA_FLAGS']}"
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    settings = {"model": MODEL.to_dict(), **settings, "train": settings["train"].to_dict()}
    command = [sys.executable, "-c", textwrap.dedent(CODE), json.dumps(settings, default=str)]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_tokens(World().texts(8), Tokenizer.train(World().texts(40), vocab=300), folder)
    return folder


@pytest.fixture(scope="module")
def one(data):
    """The run on one device."""
    tokens = Tokens.open(data, "train")
    trainer = train(Transformer(MODEL), tokens, CONFIG, valid=tokens)
    list(trainer)
    return trainer


def close(found, one):
    np.testing.assert_allclose(found["losses"], one.losses, rtol=1e-5)
    assert found["valid"] == pytest.approx(one.history[-1].valid_loss, rel=1e-5)


@pytest.mark.parametrize(("parallel", "accumulate"), [("data", 1), ("fsdp", 1), ("fsdp", 2)])
def test_four_devices_equal_one_and_their_checkpoint_loads_on_one(parallel, accumulate, data, one, tmp_path):
    settings = CONFIG.replace(parallel=parallel, accumulate=accumulate)
    found = finish(start(4, data=data, train=settings, out=tmp_path / "run"))
    if accumulate == 1:  # dropout draws other numbers in parts
        close(found, one)
    assert found["devices"] == 4
    assert (found["whole"] == 0) == (parallel == "fsdp")
    model = load(tmp_path / "run")
    assert float(abs(np.asarray(model.embed.weight())).sum()) == pytest.approx(found["weight"], rel=1e-6)


def test_a_run_goes_on_with_another_number_of_devices(data, one, tmp_path):  # P11
    settings = CONFIG.replace(parallel="fsdp")
    first = finish(start(4, data=data, train=settings, out=tmp_path / "run", stop=4))
    assert first["outcome"] == "stopped"
    with pytest.warns(UserWarning, match="not bit for bit: .*device was 4 x cpu and is 1 x cpu"):
        again = resume(tmp_path / "run")
    list(again)
    np.testing.assert_allclose(first["losses"] + again.losses, one.losses, rtol=1e-5)
    again.run.close()


def test_two_processes_equal_one(data, one, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    settings = {"data": data, "train": CONFIG.replace(parallel="fsdp"), "out": tmp_path / "run"}
    both = [start(2, address=address, processes=2, process=i, **settings) for i in range(2)]
    found = [finish(process) for process in both]
    for each in found:
        close(each, one)
        assert each["devices"] == 4
    assert found[0]["weight"] == found[1]["weight"]
    final, expected = named(load(tmp_path / "run")), named(one.model)
    # Muon rounds to bfloat16: sums in another order move single weights by more than their own rounding.
    assert max(float(abs(np.asarray(final[n]) - np.asarray(expected[n])).max()) for n in expected) < 1e-3


def test_what_cannot_be_shared_out_is_refused(data, tmp_path):
    process = start(3, data=data, train=CONFIG.replace(parallel="data"), out=tmp_path / "run")
    _, err = process.communicate(timeout=240)
    assert process.returncode != 0
    assert "TrainConfig.batch = 8: 8 rows at a time do not divide over 3 devices" in err
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="parallel = 'model': must be one of none, data, fsdp"):
        CONFIG.replace(parallel="model")
