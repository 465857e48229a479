"""What a sweep costs beside the same sweep run as separate runs of TRL: some of its cells, timed so.

python -m fastdpo.study.cost DIR ID OUTPUT       one such run: trl.DPOTrainer, a live reference model, the same measures
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from ..system import process_seconds
from . import results, runner
from .cells import grid
from .errors import StudyError
from .results import CellResult, read_json, write_json

_MOST_DIFFERENCE = 1e-3  # of the two losses at any step, relative
_SATURATED = 1e-3  # a loss below that is rounding alone


def measure(folder: Path, count: int) -> str:
    """Time `count` cells of a finished study as runs of TRL, as many at once as the study has workers and with its
    threads; write DIR/cost.json. Returns the table of it.

    Only cells with the ratio and a reference of the policy's tokens: stock TRL has no other.

    Raises:
        StudyError: no such cells, a run of TRL that failed, or one whose losses are not the cell's.
    """
    study = results.load(folder)
    cells = [cell for cell in study.cells if _is_stock(cell, study.config)]
    if not cells or count < 1:
        raise StudyError(
            f"{folder}: {len(cells)} cells that stock TRL could run, expected at least one; --cells {count}"
        )
    step = len(cells) / min(count, len(cells))
    chosen = [cells[int(i * step)] for i in range(min(count, len(cells)))]
    stock = _time(folder, study.config, chosen)
    found = _compare(folder, study, cells, chosen, stock)
    write_json(folder / "cost.json", found)
    return table(found)


def table(found: dict[str, Any]) -> str:
    """cost.json as text."""
    rows = [
        ("seconds of a worker per run", f"TRL {metadata.version('trl')}", "fastdpo study"),
        *(
            (name, f"{found['trl'][key]:.1f}", f"{found['study'][key]:.1f}")
            for name, key in (
                ("  start-up: imports, data", "startup_seconds"),
                ("  references, scored once", "reference_seconds"),
                ("  training", "train_seconds"),
                ("  measures", "measure_seconds"),
                ("  in all", "seconds"),
            )
        ),
        (
            f"{found['cells']} cells on {found['workers']} workers, minutes",
            f"{found['trl']['sweep_minutes']:.1f}",
            f"{found['study']['sweep_minutes']:.1f}",
        ),
    ]
    return "\n".join(f"{name:<48} {a:>10} {b:>14}" for name, a, b in rows)


def _is_stock(cell: CellResult, config: dict[str, Any]) -> bool:
    reference = next(one for one in config["references"] if one["name"] == cell.reference)
    # Of a reference with other tokens there is no KL
    return (
        cell.status == "done"
        and cell.parameterization == "ratio"
        and reference["model"] is not None
        and cell.measures.get("kl_reference") is not None
        and (config["peft"] is None or reference["model"] == config["policy"])  # TRL's reference is then the base model
    )


def _time(folder: Path, config: dict[str, Any], chosen: list[CellResult]) -> list[dict[str, Any]]:
    """One record a cell: seconds of its process, train_seconds, measure_seconds, losses."""
    from tqdm import tqdm

    places, records = runner.places(config), []
    scratch = folder / "work" / "cost"
    scratch.mkdir(parents=True, exist_ok=True)
    with tqdm(total=len(chosen), desc="runs of TRL", ncols=80) as bar:
        for first in range(0, len(chosen), len(places)):
            running = []
            for cell, place in zip(chosen[first : first + len(places)], places, strict=False):
                environment = {**os.environ, "OMP_NUM_THREADS": str(place.threads), "TQDM_DISABLE": "1"}
                if place.device is not None:
                    environment["CUDA_VISIBLE_DEVICES"] = place.device
                output = scratch / f"{cell.id}.json"
                output.unlink(missing_ok=True)
                command = [sys.executable, "-m", "fastdpo.study.cost", str(folder), cell.id, str(output)]
                log = (scratch / f"{cell.id}.log").open("wb")
                running.append((subprocess.Popen(command, env=environment, stdout=log, stderr=log), output, log))
            try:
                for process, output, log in running:
                    code = process.wait()
                    if code or not output.is_file():
                        raise StudyError(f"a run of TRL ended with exit code {code}; see {log.name}")
                    records.append(read_json(output))
                    bar.update()
            finally:
                for process, _, log in running:
                    process.kill()
                    log.close()
    return records


def _compare(
    folder: Path, study: results.Study, cells: list[CellResult], chosen: list[CellResult], stock: list[dict[str, Any]]
) -> dict[str, Any]:
    """cost.json of the timings."""
    differences = [
        abs(a - b["loss"]) / max(abs(a), _SATURATED)
        for record, cell in zip(stock, chosen, strict=True)
        for a, b in zip(record["losses"], cell.curves, strict=True)
        if a is not None and b["loss"] is not None
    ]
    largest = max(differences)
    if not largest <= _MOST_DIFFERENCE:
        raise StudyError(f"the losses of TRL's runs differ by {largest:.1e}, expected at most {_MOST_DIFFERENCE:g}")
    runs = sum(cell.same_run_as is None for cell in study.cells)
    workers = study.config["workers"]
    references = sum(read_json(path)["score_seconds"] for path in (folder / "references").glob("*.json"))
    startup = read_json(folder / "work" / "startup.json")["seconds"] * workers / runs
    ours = [read_json(results.cell_path(folder, cell.id)) for cell in chosen]
    for one in ours:
        one |= {"startup_seconds": startup, "measure_seconds": one["seconds"] - one["train_seconds"]}
    trl, mine = _mean_of(stock, 0.0), _mean_of(ours, references / runs)
    for side in (trl, mine):
        side["sweep_minutes"] = side["seconds"] * len(cells) / workers / 60
    return {
        "timed": [cell.id for cell in chosen],
        "cells": len(cells),
        "workers": workers,
        "threads": study.config["threads"],
        "machine": study.config["machine"],
        "largest_difference_of_losses": largest,
        "trl": trl,
        "study": mine,
    }


def _mean_of(records: list[dict[str, Any]], reference_seconds: float) -> dict[str, float]:
    names = ("startup_seconds", "train_seconds", "measure_seconds")
    found = {name: sum(one[name] for one in records) / len(records) for name in names}
    found["reference_seconds"] = reference_seconds
    return {**found, "seconds": sum(found.values())}


# --- one run of TRL --------------------------------------------------------------------------------------------------


def stock_run(folder: Path, id: str) -> dict[str, Any]:
    """The cell as a user of TRL would run it: trl.DPOTrainer with the reference model in memory; then its measures."""
    import torch
    from transformers import AutoModelForCausalLM
    from trl import DPOTrainer

    from .cell_run import Lab, trained_model
    from .training import trained

    lab = Lab(folder, folder / "work" / "cost")
    cell = next(cell for cell in grid(lab.study) if cell.id == id)
    began, startup = time.perf_counter(), process_seconds()
    reference = lab.policy(cell.reference)
    live = None  # TRL's own: the policy before training
    if reference.model is not None and reference.model != lab.config.policy:
        dtype = getattr(torch, reference.dtype or lab.config.dtype)
        live = AutoModelForCausalLM.from_pretrained(reference.model, dtype=dtype)
    data = (lab.config, lab.tokenizer, lab.pairs.train)
    trainer, curves = trained(DPOTrainer, lab.arguments(cell), *data, ref_model=live)
    halfway = time.perf_counter()
    lab.measure(trained_model(trainer), cell, curves)
    return {
        "startup_seconds": startup,
        "train_seconds": halfway - began,
        "measure_seconds": time.perf_counter() - halfway,
        "losses": [one["loss"] for one in curves],
    }


if __name__ == "__main__":
    Path(sys.argv[3]).write_text(json.dumps(stock_run(Path(sys.argv[1]), sys.argv[2])), encoding="utf-8")
