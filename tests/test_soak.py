"""The measures of benchmarks/soak.py; the run itself, with few steps, is a slow test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from benchmarks.soak import PRECISIONS, RUNS, drift, growth, problems

ROOT = Path(__file__).parent.parent


def test_growth_is_of_the_second_half() -> None:
    """A start-up that grows is no leak; a leak of 0.005 MiB a step is 5 MiB per 1,000 steps."""
    noise = np.random.default_rng(0).normal(0, 0.1, 2000)
    start_up = np.minimum(np.arange(2000), 500) * 0.2
    assert growth((100 + start_up + noise).tolist()) == pytest.approx(0, abs=0.1)
    assert growth((100 + start_up + 0.005 * np.arange(2000) + noise).tolist()) == pytest.approx(5, abs=0.1)


def test_drift_is_relative_to_the_way(tmp_path: Path) -> None:
    start = {"a": torch.zeros(3), "b": torch.ones(2, 2)}
    (tmp_path / "start").mkdir()
    save_file(start, tmp_path / "start" / "model.safetensors")
    moved = {name: tensor + 2 for name, tensor in start.items()}
    apart = {**moved, "a": moved["a"] + torch.tensor([0.0, 0.0, 2.0])}
    torch.save(moved, tmp_path / "one-float64.pt")
    torch.save(apart, tmp_path / "other-float32.pt")
    one, other = ("one", "float64"), ("other", "float32")
    assert drift(tmp_path, one, one) == 0
    assert drift(tmp_path, one, other) == pytest.approx((4 / 28) ** 0.5)


@pytest.mark.parametrize(
    ("precision", "measure", "value", "problem"),
    [
        ("float32", "growth", 2.5, "float32: memory grows by 2.5 MiB"),
        ("bfloat16", "growth", float("nan"), "bfloat16: memory grows"),
        ("bfloat16", "drift", 0.3, "bfloat16: fastdpo is 3.0e-01 from float64, TRL at most 1.0e-01"),
        ("bfloat16", "compacted", 0.0, "bfloat16: no tile was compacted"),
        ("float32", "compacted", 0.0, None),
    ],
)
def test_the_verdict(precision: str, measure: str, value: float, problem: str | None) -> None:
    found = {
        each: {name: {"growth": 1.0, "drift": 0.1, "loss_apart": 0.1, "compacted": 1.0} for name in RUNS}
        for each in PRECISIONS
    }
    assert problems(found) == []
    found[precision]["fastdpo"][measure] = value
    lines = problems(found)
    assert lines == [] if problem is None else len(lines) == 1 and lines[0].startswith(problem)


@pytest.mark.slow
def test_a_short_soak(tmp_path: Path) -> None:
    """Of six steps only the growth means nothing yet."""
    command = [sys.executable, "-m", "benchmarks.soak", "--output", str(tmp_path), "--steps", "6"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert (tmp_path / "soak.png").stat().st_size > 0, done.stderr
    found = json.loads((tmp_path / "soak.json").read_text(encoding="utf-8"))
    assert found["float32"]["fastdpo"]["drift"] < 1e-3
    assert [line for line in problems(found) if "memory grows" not in line] == []
    assert done.returncode == bool(problems(found))
