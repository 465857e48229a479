"""A study folder, read: which cells there are and what was measured of them.

DIR/study.json                 the settings, and what was measured before any training
DIR/cells/<id>.json            one finished cell
DIR/cells/<id>.tokens.npz      token logps of some held-out pairs (tokens.py), of cells that are a run of their own
DIR/cells/<id>.answers.jsonl   the sampled answers, likewise
DIR/results.json, results.csv  all cells together, without what differs from run to run
"""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any, NamedTuple

from ..cache import files
from . import tokens
from .cells import Cell, grid
from .config import opened
from .errors import StudyError
from .tokens import TokenRow


class CellResult(NamedTuple):
    """One cell that was run, or that shares the run of another."""

    id: str
    loss_type: str
    parameterization: str
    reference: str
    beta: float
    seed: int
    same_run_as: str | None  # id of the cell whose training this is, by construction
    status: str  # "done" or "failed"
    error: str | None
    seconds: float
    curves: list[dict[str, Any]]  # per logged step: step, loss, rewards/accuracies, rewards/margins
    measures: dict[str, Any]  # measures.py
    degenerate: list[str]  # reasons; empty: healthy


class Study(NamedTuple):
    """A study folder."""

    folder: Path
    config: dict[str, Any]  # study.json
    cells: list[CellResult]  # those that there are, in the grid's order


def load(folder: Path) -> Study:
    """Read a study folder, finished or not.

    Raises:
        StudyError: it is none.
    """
    config = read_json(folder / "study.json")
    if config is None:
        raise StudyError(f"{folder}: no study.json, expected a folder of `fastdpo study`")
    found = [(cell, read_json(cell_path(folder, cell.id))) for cell in grid(config)]
    return Study(folder, config, [_result(cell, record) for cell, record in found if record is not None])


def cell_path(folder: Path, id: str) -> Path:
    """The JSON file of a cell."""
    return folder / "cells" / f"{id}.json"


def _result(cell: Cell, record: dict[str, Any]) -> CellResult:
    others = ("same_run_as", "status", "error", "seconds", "curves", "measures", "degenerate")
    return CellResult(cell.id, *cell, **{name: record[name] for name in others})


def load_tokens(folder: Path, id: str) -> list[TokenRow]:
    """Token logps of a cell on the first held-out pairs, each token as the policy's tokenizer writes it.

    Raises:
        StudyError: no such cell, or it failed.
    """
    from transformers import AutoTokenizer

    study = load(folder)
    cell = next((one for one in study.cells if one.id == id), None)
    path = folder / "cells" / f"{(cell and cell.same_run_as) or id}.tokens.npz"
    if cell is None or not path.is_file():
        raise StudyError(f"{id}: {folder} has no token logps of it, expected a cell that is done")
    policy = opened(study.config["policy"], folder)
    tokenizer = AutoTokenizer.from_pretrained(policy, trust_remote_code=study.config["trust_remote_code"])
    return tokens.load(path, tokenizer, cell.beta)


def write(folder: Path) -> Study:
    """Write results.json and results.csv; the same cells give the same bytes."""
    study = load(folder)
    cells = [{name: value for name, value in cell._asdict().items() if name != "seconds"} for cell in study.cells]
    write_json(folder / "results.json", {"config": study.config, "cells": cells})
    names = sorted({name for cell in study.cells for name in cell.measures})
    fixed = ("id", *Cell._fields, "same_run_as", "status", "error")
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow([*fixed, *names, "degenerate"])
    for cell in study.cells:
        measured = [cell.measures.get(name) for name in names]
        rows.writerow([*(getattr(cell, name) for name in fixed), *measured, "; ".join(cell.degenerate)])
    files.write(folder / "results.csv", table.getvalue().encode())
    return study


def read_json(path: Path) -> Any:
    """What a file holds; None where there is none."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None


def write_json(path: Path, value: Any) -> None:
    """Strict JSON, whole or not at all. A number that is not finite raises ValueError."""
    files.write(path, json.dumps(value, indent=1, allow_nan=False).encode())
