"""`fastdpo bench` on a GPU, as far as that can be seen without one: the device, events, memory, what fails."""

from __future__ import annotations

from types import SimpleNamespace

import cache_kit as kit  # skips where trl is missing
import pytest
import torch

from fastdpo.bench import gpu, inputs, measure, providers, race, report
from fastdpo.bench.arguments import BenchError, device_of, head_of, parser
from fastdpo.bench.race import Entry
from fastdpo.bench.work import work_of


def test_the_device(monkeypatch):
    """The current GPU or the one that is asked for; torch takes no device without an index as the current one."""
    chosen = []
    surface = {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "current_device": lambda: 1,
        "set_device": lambda device: chosen.append(torch.cuda._utils._get_device_index(device)),
    }
    for name, value in surface.items():
        monkeypatch.setattr(torch.cuda, name, value)
    names = ("auto", "cuda", "cuda:0", "cpu")
    assert [str(device_of(name)) for name in names] == ["cuda:1", "cuda:1", "cuda:0", "cpu"]
    assert chosen == [1, 1, 0]
    with pytest.raises(BenchError, match="--device cuda:2: expected an index below 2"):
        device_of("cuda:2")


def test_a_model_that_does_not_fit_the_device(tmp_path, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(inputs, "load_model", full)
    options = parser().parse_args([kit.save_model(tmp_path / "model")])
    with pytest.raises(BenchError, match="does not fit cuda:0; expected .*--hidden 32 --vocab 203"):
        work_of(options, head_of(options), 8, torch.float32, torch.device("cuda", 0))


@pytest.fixture
def fake_cuda(monkeypatch) -> list[str]:
    """A torch.cuda that writes down what it is asked; 10 ms between two events, 64 MiB at most, 16 before."""
    asked: list[str] = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            asked.append("record")

        def synchronize(self):
            asked.append("event.synchronize")

        def elapsed_time(self, end):
            return 10.0

    def noted(name, value=None):
        return lambda *arguments: (asked.append(name), value)[1]

    surface = {
        "Event": Event,
        "synchronize": noted("synchronize"),
        "reset_peak_memory_stats": noted("reset"),
        "memory_allocated": noted("allocated", 16 << 20),
        "max_memory_allocated": noted("max", 64 << 20),
        "empty_cache": noted("empty_cache"),
        "get_device_name": noted("name", "AMD Instinct MI300X"),
    }
    monkeypatch.setattr(gpu.torch, "cuda", SimpleNamespace(**surface))
    return asked


def test_cost_on_a_gpu(fake_cuda):
    cost = gpu.cost(lambda: (fake_cuda.append("call"), [torch.zeros(1 << 20)])[1])
    assert cost == measure.Cost(0.01, 64 - 16 - 4)
    assert fake_cuda == ["synchronize", "reset", "allocated", "record", "call", "record", "event.synchronize", "max"]
    assert gpu.ceilings(torch.float32, torch.device("cpu"), size=8, copied=1000, rounds=1) == (2000 / 0.01, 1024 / 0.01)
    assert gpu.describe(torch.device("cpu")).startswith("AMD Instinct MI300X, ")


def test_a_race_on_a_gpu(fake_cuda, monkeypatch):
    monkeypatch.setattr(race, "run_here", lambda *arguments: gpu.cost(lambda: providers.run(*arguments)[1:]))
    batch = inputs.random_batch("peaked", 16, 512, 16, torch.float32)

    def out_of_memory(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(providers.TOKEN_LOGPS, "CCE", out_of_memory)

    def half_precision_only(*arguments):
        raise AssertionError("expected bf16")

    monkeypatch.setitem(providers.TOKEN_LOGPS, "PyTorch", half_precision_only)
    monkeypatch.setitem(providers.TOKEN_LOGPS, "fastdpo exact", lambda *a: 2 * providers.eager(*a))
    names = ("fastdpo", "eager", "CCE", "fastdpo exact", "PyTorch")
    found, rounds = race.race({Entry(n, "peaked"): race.Here(n, batch, "both") for n in names}, 2, 60)
    assert rounds == 2
    assert found[Entry("fastdpo", "peaked")].seconds == found[Entry("eager", "peaked")].seconds == 0.01
    assert found[Entry("CCE", "peaked")].failed == "memory"
    assert found[Entry("fastdpo exact", "peaked")].failed.startswith("refused, fastdpo exact, logps")
    assert found[Entry("PyTorch", "peaked")].failed == "AssertionError: expected bf16", "no wrong result"
    late, _ = race.race({Entry("eager", "peaked"): race.Here("eager", batch, "both")}, 2, limit=0.001)
    assert late[Entry("eager", "peaked")].failed == "more than 0.001 s"

    text = report.achieved(found, report.Shape(1000, 10**6, 1000, 2, "both"), gpu.Ceilings(1e12, 1e15))
    assert "eager" in text and "CCE" not in text
    assert "600.0" in text and "60%" in text  # 6 N V H = 6e12 in 10 ms
    assert "400.4" in text and "40%" in text  # hidden, weight and their gradients: 2 (1e6 + 1e9) 2 bytes in 10 ms
