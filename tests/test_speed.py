"""What a run says of its machine: counts from first principles, and nothing made up."""

import numpy as np
import pytest

import tinylm
from tinylm.config import ModelConfig, TrainConfig
from tinylm.data import Batch
from tinylm.engine import measuring
from tinylm.speed import PEAK, Usage, measure, memory, usage, utilisation

CONFIG = ModelConfig(vocab=32, context=8, width=16, layers=2, heads=2, hidden=24)


class Run:
    layout = None

    def __init__(self, history):
        self.history, self.model = history, tinylm.Transformer(CONFIG)


class Logged:
    def __init__(self, tokens, seconds):
        self.tokens, self.seconds = tokens, seconds


def test_operations_are_counted_from_the_first_logged_step_on():
    found = usage(Run([Logged(100, 10.0), Logged(300, 11.0), Logged(1100, 15.0)]))
    matrices = 2 * (4 * 16 * 16 + 3 * 16 * 24) + 32 * 16  # blocks, and the head; looking up an embedding costs nothing
    attention = 2 * 2 * 16 * (8 + 1) / 2  # two products per layer, over half of the context and itself on average
    assert found.tokens_per_second == 200
    assert found.flops == pytest.approx(200 * 3 * 2 * (matrices + attention), rel=0.02)
    assert found.mfu is None
    assert "200 tokens/s" in str(found)
    assert found.to_dict()["devices"] == 1


@pytest.mark.parametrize("history", [[], [Logged(10, 1.0)]])
def test_too_few_steps_give_no_speed(history):
    found = usage(Run(history))
    assert (found.tokens_per_second, found.flops) == (0, 0)
    assert "tokens/s" not in str(found)
    assert "MB at most" in str(found)


def test_share_of_the_peak():
    assert utilisation("NVIDIA H200", 98.9e12) == pytest.approx(0.1)
    assert utilisation("NVIDIA H100 PCIe", 75.6e12) == pytest.approx(0.1)
    assert utilisation("NVIDIA H100 80GB HBM3", 98.9e12) == pytest.approx(0.1)
    assert utilisation("NVIDIA L40S", 36.2e12) == pytest.approx(0.1)
    assert utilisation("NVIDIA L4", 12.1e12) == pytest.approx(0.1)
    assert utilisation("cpu", 1e12) is None
    for i, name in enumerate(PEAK):  # a name inside another must come later
        assert not any(before in name for before in [*PEAK][:i])
    assert "12.0% of the peak" in str(Usage("H200", 2, 1e6, 1e15, 0.12, 10**9))


def test_memory_grows_with_what_is_used():
    class Host:
        def memory_stats(self):
            return None

    before = memory(Host())
    block = np.ones(50_000_000)  # 400 MB
    assert memory(Host()) >= before
    assert memory(Host()) > block.nbytes
    assert before > 10e6

    class Card:
        def memory_stats(self):
            return {"peak_bytes_in_use": 12345}

    assert memory(Card()) == 12345


def test_of_a_real_run():
    batch = Batch(np.zeros((2, 8), np.int32), np.ones((2, 8), np.int32))
    trainer = tinylm.train(tinylm.Transformer(CONFIG), lambda step: batch, TrainConfig(steps=6, log_every=1))
    for _ in trainer:
        pass
    assert usage(trainer).tokens_per_second > 0


def test_a_size_can_be_measured():
    found = measure(CONFIG, TrainConfig(steps=1000, batch=2, log_every=1), seconds=0.05)
    assert found.tokens_per_second > 0
    assert found.flops > 0


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_a_file_can_be_measured(kind, tmp_path):
    more = {"kind": "encoder", "head": "none"} if kind == "encoder" else {}
    path = tinylm.export(tinylm.Transformer(CONFIG.replace(**more)), tmp_path / "m.tlm").path
    one, two = measuring.measure(path, threads=[1, 2], seconds=0.01)
    assert (one.threads, two.threads) == (1, 2)
    assert one.read > 0
    if kind == "decoder":
        assert min(one.write, one.guess, one.together, one.first) > 0
    else:
        assert one[1:4] == (None, None, None)
    rows = measuring.table(path, [one, two])
    assert {len(row) for row in rows} == {6}
    with pytest.raises(ValueError, match="seconds = 0"):
        measuring.measure(path, seconds=0)
