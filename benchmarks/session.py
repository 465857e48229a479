"""One run of the suite: its time, the machine's rates, what was measured and what was left out."""

from __future__ import annotations

import time
from typing import Any

import psutil
import torch
from tqdm import tqdm

from fastdpo.bench.gate import Gate
from fastdpo.bench.measure import alternate, machine
from fastdpo.system import installed_version

from .cases import Case, Machine, Shape, fit
from .group import MEMORY_SECONDS, Result, contenders, measure
from .inputs import make

LEAST_SECONDS = 8  # of a case: what its gate takes
RATE_SHAPE = (256, 1024, 32768)  # N, H, V of the product that the machine's rate is taken from
PACKAGES = ("torch", "triton", "trl", "liger-kernel", "cut-cross-entropy", "transformers", "pytest-benchmark")


class Session:
    """Measures each case when it is first asked for, within `seconds` in all.

    Args:
        seconds: of the whole run.
        limit: seconds that one run of a contender may take.
        cases: to be measured, in this order.
        memory: take it too, where the time allows.
    """

    def __init__(self, seconds: float, limit: float, cases: tuple[Case, ...], memory: bool = True) -> None:
        self.begin = time.perf_counter()
        self.seconds, self.limit, self.cases, self.memory = seconds, limit, cases, memory
        self.found: dict[str, tuple[Shape | None, dict[str, Result]]] = {}
        self.left_out: dict[str, str] = {}  # by case
        self.not_timed: dict[str, dict[str, str]] = {}  # by case and contender
        self.progress = tqdm(total=len(cases), unit="case", desc="warming up")
        warm_up()
        self.rates = rates()

    def left(self) -> float:
        return self.seconds - (time.perf_counter() - self.begin)

    def measured(self, case: Case) -> tuple[Shape | None, dict[str, Result]]:
        """The case's shape here, None if it was left out; and what was found, by contender."""
        if case.name not in self.found:
            self.progress.set_description(case.name)
            self.found[case.name] = self._measure(case)
            self.progress.update()
            if len(self.found) == len(self.cases):
                self.progress.close()
        return self.found[case.name]

    def _measure(self, case: Case) -> tuple[Shape | None, dict[str, Result]]:
        waiting = [each for each in self.cases if each.name not in self.found]
        seconds = self.left() * case.share / sum(each.share for each in waiting)
        free = Machine(self.rates["products"], self.rates["copy"], int(psutil.virtual_memory().available * 0.7))
        shape = fit(case, timing(case, seconds, self.memory), free)
        if shape is None or seconds < LEAST_SECONDS:
            share = f"{max(0.0, seconds):.0f} of {self.seconds:.0f} s"
            self.left_out[case.name] = f"its share of the time, {share}, or the memory that is free, is too small"
            return None, {}
        return shape, measure(case, shape, seconds, self.limit, memory=self.memory)

    def note(self, case: Case, name: str, failed: str) -> None:
        self.not_timed.setdefault(case.name, {})[name] = failed

    def report(self) -> dict[str, Any]:
        """What goes into the JSON beside pytest-benchmark's own."""
        return {
            "machine": machine(),
            "versions": versions(),
            "seconds": self.seconds,
            "limit": self.limit,
            "rates": self.rates,
            "cases": {
                case.name: {**case._asdict(), "shape": shape._asdict()}
                for case in self.cases
                if (shape := self.found.get(case.name, (None, {}))[0]) is not None
            },
            "left_out": self.left_out,
            "not_timed": self.not_timed,
        }


def timing(case: Case, seconds: float, memory: bool) -> float:
    """Of a case's seconds, those for timing."""
    for_memory = MEMORY_SECONDS * len(contenders(case)) * memory
    return seconds - for_memory if seconds >= 2 * for_memory else seconds


def warm_up() -> None:
    """Libraries loaded, functions compiled: for all cases at once, as their shapes are dynamic."""
    torch._dynamo.config.recompile_limit = 256
    for entry in ("hidden", "logits"):
        case = Case("Gemma 3 270M", entry)
        for tokens, shape in ((8, Shape(64, 1024, 64)), (32, Shape(64, 2048, 128))):
            gate = Gate(make(case, shape), tokens=tokens)
            for name in contenders(case):
                try:
                    gate.errors(name)
                except Exception:
                    continue


def rates() -> dict[str, Any]:
    """Operations a second of a product, by dtype; bytes a second of a copy, read and written."""
    count, width, vocab = RATE_SHAPE
    found: dict[str, float] = {}
    for dtype in ("bfloat16", "float32"):
        a, b = (torch.randn(rows, width, dtype=getattr(torch, dtype)) for rows in (count, vocab))
        seconds = alternate({"product": lambda a=a, b=b: a @ b.T}, rounds=3)["product"]
        found[dtype] = 2 * count * width * vocab / seconds
    source = torch.ones(1 << 25)
    target = torch.empty_like(source)
    seconds = alternate({"copy": lambda: target.copy_(source)}, rounds=5)["copy"]
    return {"products": found, "copy": 2 * source.nbytes / seconds}


def versions() -> dict[str, str]:
    return {package: installed_version(package) or "not installed" for package in ("fastdpo", *PACKAGES)}
