"""Files of every released version load for ever, and mean what they meant."""

import json
import shutil

import golden
import pytest

import tinylm
from tinylm.checkpoint import Run
from tinylm.engine.twin import Twin
from tinylm.resuming import resume

VERSIONS = sorted(path for path in golden.FOLDER.iterdir() if path.is_dir())


@pytest.fixture(params=VERSIONS, ids=lambda path: path.name)
def version(request):
    return request.param


def about(version):
    return json.loads((version / "golden.json").read_text())


def test_it_is_small(version):
    assert sum(path.stat().st_size for path in version.rglob("*") if path.is_file()) < 200_000


@pytest.mark.parametrize("name", ["model", "coded", "run"])
def test_models_of_every_version_load(version, name):  # P10
    assert golden.said(tinylm.load(version / name)) == pytest.approx(about(version)["logits"], abs=2e-4)


def test_tokens_of_every_version_load(version):  # P10
    assert tinylm.Tokens.open(version / "run" / "data", verify=True).sha256 == about(version)["tokens"]


def test_engine_files_of_every_version_load(version):  # P10, P29
    twin = Twin(version / "model.tlm")
    prompt = tinylm.load(version / "model").tokenizer.encode(golden.PROMPT)
    assert list(twin.generate(prompt, 8, temperature=0.0)) == about(version)["ids"]


@pytest.mark.filterwarnings("ignore:.*not bit for bit")
def test_runs_of_every_version_go_on(version, tmp_path):  # P10
    shutil.copytree(version / "run", tmp_path / "run")
    losses = [record["loss"] for record in Run.open(tmp_path / "run").history()]
    assert losses[-1] == about(version)["losses"][-1]
    trainer = resume(tmp_path / "run", steps=6)
    list(trainer)
    assert trainer.step == 6
    trainer.run.close()
