"""A study folder without any training: cells by a law, so that the right answers are known."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastdpo.study.cells import Cell, grid, runs

START = {"name": "start", "model": "policy-model", "role": "start"}
STRONG = {"name": "strong", "model": "strong-model", "role": "stronger"}
WEAK = {"name": "weak", "model": "weak-model", "role": "weaker"}
NO_REFERENCE = {"name": "none", "model": None, "role": "none"}
OWN_QUALITY = {"start": 0.3, "strong": 0.8, "weak": 0.15}

Law = Callable[[Cell], dict[str, Any]]  # -> what differs from `healthy`, or {"error": ...}, {"degenerate": [...]}


def healthy(cell: Cell, noise: float = 0.01) -> dict[str, float]:
    """Quality peaks at beta 0.1, a decade either way costs 0.2; a stronger reference adds 0.1, none takes 0.15."""
    draw = random.Random(cell.id)
    reference = "none" if cell.parameterization == "posterior" else cell.reference
    bonus = {"strong": 0.1, "weak": -0.1, "none": -0.15}.get(reference, 0.0)
    bonus -= 0.05 if cell.parameterization == "likelihood" else 0.0
    quality = 0.75 + bonus - 0.2 * math.log10(cell.beta / 0.1) ** 2 + noise * draw.uniform(-1, 1)
    kl = 0.05 / cell.beta**0.7 * (1 + 0.05 * draw.random())
    return {
        "reward_accuracy": 0.9,
        "reward_margin": 1.5 * cell.beta**0.5,
        "chosen_displacement": 2 - 1 / cell.beta**0.6,
        "chosen_displacement_token": 0.5 - 0.25 / cell.beta**0.6,
        "rejected_displacement": -3 / cell.beta**0.6,
        "chosen_falls": 0.4,
        "kl_start": kl,
        "kl_start_se": 0.1 * kl,
        "kl_start_sequence": 5 * kl,
        "kl_reference": None if reference == "none" else 1.2 * kl,
        "kl_reference_se": None if reference == "none" else 0.1 * kl,
        "length": 5.0,
        "length_se": 0.1,
        "repetition": 0.02,
        "quality": quality,
        "quality_se": noise,
    }


def write_study(
    folder: Path,
    law: Law = lambda cell: {},
    *,
    betas: Sequence[float] = (0.01, 0.03, 0.1, 0.3, 1.0),
    parameterizations: Sequence[str] = ("ratio", "posterior", "likelihood"),
    references: Sequence[dict[str, Any]] = (START, STRONG, WEAK),
    loss_types: Sequence[str] = ("sigmoid",),
    seeds: Sequence[int] = (0, 1),
    noise: float = 0.01,
    **settings: Any,
) -> Path:
    """study.json and cells/; returns the folder."""
    measured = {one["name"]: {"quality": OWN_QUALITY[one["name"]], "length": 6.0} for one in references if one["model"]}
    study = {
        "policy": "policy-model",
        "data": {"train": "pairs.jsonl", "held_out": None, "held_out_share": 0.2},
        "betas": list(betas),
        "parameterizations": list(parameterizations),
        "references": list(references),
        "loss_types": list(loss_types),
        "seeds": list(seeds),
        "training": {"learning_rate": 1e-4, "max_steps": 20},
        "scorer": "scoring.py:right",
        "quality": "right answers",
        "higher_is_better": True,
        "start": {"quality": OWN_QUALITY["start"], "length": 6.0},
        "reference_measures": measured,
        "machine": "a machine, 2 cores",
        "versions": {"torch": "2.13.0"},
        "version": "0.1.0",
        **settings,
    }
    shutil.rmtree(folder / "cells", ignore_errors=True)
    (folder / "cells").mkdir(parents=True)
    (folder / "study.json").write_text(json.dumps(study))
    for cell, own in runs(study).items():
        record = _record(own, law(own), noise)
        shared = {"id": cell.id, "cell": cell._asdict(), "same_run_as": None if cell is own else own.id}
        (folder / "cells" / f"{cell.id}.json").write_text(json.dumps({**record, **shared}))
    assert len(grid(study)) == len(list((folder / "cells").iterdir()))
    return folder


def _record(cell: Cell, changed: dict[str, Any], noise: float) -> dict[str, Any]:
    if "error" in changed:
        return {"status": "failed", "error": changed["error"], "seconds": 0.0, "curves": [], "measures": {},
                "degenerate": []}  # fmt: skip
    degenerate = changed.pop("degenerate", [])
    learned = [1 - math.exp(-step / 8) for step in range(1, 21)]
    curves = [
        {
            "step": step,
            "loss": 0.69 - 0.5 * cell.beta**0.3 * share,
            "rewards/accuracies": 0.5 + 0.4 * share,
            "rewards/margins": 3 * cell.beta**0.5 * share,
        }
        for step, share in enumerate(learned, start=1)
    ]
    measures = {**healthy(cell, noise), **changed}
    return {"status": "done", "error": None, "seconds": random.random(), "curves": curves, "measures": measures,
            "degenerate": degenerate}  # fmt: skip
