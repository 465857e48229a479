"""The measures of benchmarks/soak.py; the run itself, with few steps, is a slow test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from benchmarks.soak import PRECISIONS, RUNS, drift, growth, problems

ROOT = Path(__file__).parent.parent


def test_growth_is_of_the_second_half() -> None:
    """A start-up and a single jump are no leak; one of 0.005 MiB a step is 5 MiB per 1,000 steps."""
    noise = np.random.default_rng(0).normal(0, 0.1, 2000)
    start_up = np.minimum(np.arange(2000), 500) * 0.2
    jump = 20.0 * (np.arange(2000) > 1300)
    assert growth((100 + start_up + jump + noise).tolist()) == pytest.approx(0, abs=0.3)
    leak = 0.005 * np.arange(2000)
    assert growth((100 + start_up + jump + leak + noise).tolist()) == pytest.approx(5, abs=0.3)


def test_drift_is_relative_to_the_way(tmp_path: Path) -> None:
    start = {"a": torch.zeros(3), "model.embed_tokens.weight": torch.ones(3, 2)}
    (tmp_path / "start").mkdir()
    save_file(start, tmp_path / "start" / "model.safetensors")
    moved = {name: tensor + 2 for name, tensor in start.items()}
    apart = {name: tensor.clone() for name, tensor in moved.items()}
    apart["a"][2] += 2
    apart["model.embed_tokens.weight"][2, 0] += 1  # of the third word, which never occurs
    torch.save(moved, tmp_path / "one-float64.pt")
    torch.save(apart, tmp_path / "other-float32.pt")
    one, other = ("one", "float64"), ("other", "float32")
    assert drift(tmp_path, one, one, 2) == (0, 0)
    assert drift(tmp_path, one, other, 2) == pytest.approx(((4 / 28) ** 0.5, (1 / 8) ** 0.5))


@pytest.mark.parametrize(
    ("precision", "measure", "value", "problem"),
    [
        ("float32", "growth", 2.5, "float32: memory grows by 2.5 MiB"),
        ("bfloat16", "growth", float("nan"), "bfloat16: memory grows"),
        ("bfloat16", "drift", 0.3, "bfloat16: drift of fastdpo 3.0e-01, of TRL at most 1.0e-01"),
        ("bfloat16", "loss_apart", float("nan"), "bfloat16: loss_apart of fastdpo"),
        ("float32", "drift_of_absent_words", 0.3, "float32: drift_of_absent_words of fastdpo"),
        ("bfloat16", "drift_of_absent_words", 0.3, None),
        ("bfloat16", "compacted", 0.0, "bfloat16: no tile was compacted"),
        ("float32", "compacted", 0.0, None),
    ],
)
def test_the_verdict(precision: str, measure: str, value: float, problem: str | None) -> None:
    run = {"growth": 1.0, "drift": 0.1, "drift_of_absent_words": 0.1, "loss_apart": 0.1, "compacted": 1.0}
    found: dict[str, Any] = {each: {name: dict(run) for name in RUNS} for each in PRECISIONS}
    assert problems(found) == []
    found[precision]["fastdpo"][measure] = value
    lines = problems(found)
    assert lines == [] if problem is None else len(lines) == 1 and lines[0].startswith(problem)


@pytest.mark.slow
def test_the_head_alone_holds_nothing_more() -> None:
    """12,000 forwards and backwards of changing sizes, compact and exact in turn, in a process of their own."""
    code = """
import random, torch, fastdpo
from fastdpo.memory import resident_memory_mib
random.seed(0)
weight = (torch.randn(4096, 128) / 2).requires_grad_()
compacted = []
for call in range(12001):
    labels = torch.randint(0, 58, (random.randint(60, 130),))
    hidden = (weight.detach()[labels] * random.uniform(0.3, 1.2)).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = fastdpo.linear_token_logps(hidden, weight, labels, stats=("dropped_mass",))
    out.logps.sum().backward()
    weight.grad = None
    compacted.append(bool(out.dropped_mass.any()))
    if call in (6000, 12000):
        print(resident_memory_mib())
assert 0.2 < sum(compacted) / len(compacted) < 0.98, sum(compacted)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    middle, end = map(float, done.stdout.split())
    assert end - middle < 2


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
