"""The longest pair: the search by attempts, the memory model, and the benchmark from end to end, its runs stubbed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # benchmarks is no installed package

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from benchmarks import longest  # noqa: E402
from fastdpo.bench import memory_model  # noqa: E402
from fastdpo.bench.isolated import Outcome  # noqa: E402
from fastdpo.bench.providers import PROVIDERS  # noqa: E402

GOOD = Outcome(1.0, 1.0)


def attempts(fits: int, slow: int = 1 << 30):
    """An attempt that memory ends beyond `fits` tokens, and time beyond `slow`; and what was tried."""
    tried: list[int] = []

    def attempt(tokens: int) -> Outcome:
        tried.append(tokens)
        if tokens > slow:
            return Outcome(None, None, "more than 20 s")
        return GOOD if tokens <= fits else Outcome(None, None, "memory")

    return attempt, tried


@pytest.mark.parametrize("guess", [100, 900, 1000, 1100, 5000])
def test_the_search_finds_the_end_within_a_tenth(guess):
    attempt, tried = attempts(1000)
    assert longest.search(attempt, guess) == {"tokens": pytest.approx(1000 / 1.05, rel=0.051), "stopped": None}
    assert len(tried) <= longest.TRIES


def test_the_search_says_what_ended_it():
    attempt, _ = attempts(1 << 40, slow=700)
    found = longest.search(attempt, 1000)
    assert 700 / longest.APART <= found["tokens"] <= 700 and found["stopped"] == "time"
    attempt, _ = attempts(1 << 40)
    assert longest.search(attempt, 500, most=600) == {"tokens": 600, "stopped": "most"}
    attempt, _ = attempts(1)
    assert longest.search(attempt, 64) == {"tokens": 0, "stopped": None}
    broken = lambda tokens: Outcome(None, None, "ModuleNotFoundError: No module named 'x'")  # noqa: E731
    assert longest.search(broken, 64) == {"tokens": 0, "stopped": "ModuleNotFoundError: No module named 'x'"}


def test_the_memory_model():
    """By hand: eager holds 12 bytes a logit where that is more than its gradients."""
    vocab, width = 1000, 10
    eager = memory_model.GPU["eager"]
    assert eager(memory_model.Sizes(50, vocab, width)) == 12 * 50 * vocab
    assert memory_model.longest_pair(eager, 12_020 * 50, vocab, width) == 50, "hidden takes 20 bytes a token"
    assert memory_model.longest_pair(eager, 12_020 * 51 - 1, vocab, width) == 50
    assert memory_model.longest_pair(eager, 10_000, vocab, width) == 0, "not even the gradient of weight"
    for formulas in (memory_model.CPU, memory_model.GPU):
        assert set(formulas) <= set(PROVIDERS)
        large = {n: memory_model.longest_pair(f, 80 * 2**30, 262144, 640) for n, f in formulas.items()}
        assert large["eager"] < large["Liger"] < large["fastdpo"] < large["fastdpo exact"]


def test_the_benchmark(tmp_path, capsys, monkeypatch):
    """eager and fastdpo under one budget, on a tiny head; JSON, table and figure; what is known is not run again."""
    calls: list[int] = []
    monkeypatch.setattr(longest, "STATES", 64)
    monkeypatch.setattr(longest, "held_alone", lambda name, inputs: 900.0)
    monkeypatch.setattr(
        longest,
        "run_alone",
        lambda name, inputs, limit, memory_mib: (
            calls.append(len(torch.load(inputs)[2])),
            GOOD if calls[-1] <= {"eager": 300, "fastdpo": 4000}[name] else Outcome(None, None, "memory"),
        )[1],
    )
    sizes = ["--hidden", "16", "--vocab", "4096", "--memory-mib", "1000"]
    monkeypatch.setattr(sys, "argv", ["longest", *sizes, "--contenders", "eager", "fastdpo", "--output", str(tmp_path)])
    longest.main()
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "longest.json").read_text())
    points = {point["contender"]: point for point in found["points"]}
    assert 270 <= points["eager"]["tokens"] <= 300 and 3600 <= points["fastdpo"]["tokens"] <= 4000
    assert points["eager"]["limit_mib"] == 1900 and points["eager"]["model"] > 0
    assert f"| eager | {points['eager']['tokens']:,} |" in out
    assert "on top, for libraries and weight: eager 900 MiB, fastdpo 900 MiB" in out
    ratio = points["eager"]["model"] / points["eager"]["tokens"]
    assert f"memory model, eager at 1,000 MiB: {ratio:.2f} of what was measured" in out
    assert (tmp_path / "longest.png").read_bytes().startswith(b"\x89PNG")
    assert {(p["contender"], p["gib"]) for p in found["gpu"]} == {
        (name, gib) for name in ("eager", "fastdpo") for gib in longest.GPU_GIB
    }
    known = len(calls)
    longest.main()
    assert len(calls) == known
