"""Peak memory of the contenders that a short `make bench` had no time for. Memory needs no idle machine.

    python -m benchmarks.memory docs/benchmarks.json && python -m benchmarks.report docs/benchmarks.json --output docs

Each contender that has seconds and no MiB runs its case once more, in a process of its own, on inputs of the same
shape; the file is written after each case.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fastdpo.bench.isolated import run_alone

from .cases import Case, Shape
from .inputs import make

LIMIT = 90  # seconds of a run, as two run at once


def lacking(case: dict[str, Any]) -> list[str]:
    """Contenders of a case of benchmarks.json whose memory was not taken."""
    return [
        name
        for name, found in case["contenders"].items()
        if "seconds" in found and "mib" not in found and "memory failed" not in found
    ]


def fill(case: dict[str, Any]) -> None:
    """Take it, into the case."""
    given = Case(**{field: case[field] for field in Case._fields})
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        inputs = Path(folder) / "inputs.pt"
        torch.save(tuple(make(given, Shape(**case["shape"]))), inputs)
        names = lacking(case)
        outcomes = pool.map(lambda name: run_alone(name, inputs, given.needs, limit=LIMIT), names)
        for name, outcome in zip(names, outcomes, strict=True):
            found = {"mib": outcome.mib} if outcome.mib is not None else {"memory failed": outcome.failed}
            case["contenders"][name] |= found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmarks", type=Path, help="benchmarks.json, of benchmarks.report")
    return parser


def main() -> None:
    path = _parser().parse_args().benchmarks
    doc = json.loads(path.read_text(encoding="utf-8"))
    waiting = [case for case in doc["cases"].values() if lacking(case)]
    for case in tqdm(waiting, unit="case"):
        fill(case)
        path.write_text(json.dumps(doc, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
