"""A whole study: references, then cells, over worker processes; what is finished is kept, and a restart goes on.

Everything that is kept is a file that is written whole: DIR/references/<name>.json, DIR/cells/<id>.json. What is not
there is run again from its settings and seed; on a CPU to the same bits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .. import __version__
from ..cache.claims import LEASE, SUFFIX, Claims, live
from ..system import installed_version, process_seconds, processor
from . import data, results, scorer
from .cells import Cell, runs
from .config import START, StudyConfig, local, of_study, to_dict
from .errors import StudyError
from .pool import Outcome, Place, Pool
from .results import cell_path, read_json, write_json
from .training import arguments

# Lists that may grow or shrink between two runs on one folder; all else that is given must stay as it was
_GRID = ("betas", "parameterizations", "loss_types", "seeds", "references")
_FREE = (*_GRID, "workers", "token_rows", "save_models", "quality", "higher_is_better")
_VERSIONS = ("torch", "transformers", "trl", "peft", "numpy")


def run(config: StudyConfig, folder: Path) -> list[str]:
    """Run what is missing of a study; returns the ids of the cells that failed.

    Args:
        config: with paths as they are to be opened.

    Raises:
        StudyError: settings that TRL refuses; a folder of a study with other settings, or that another process is at;
            a reference that cannot be scored.
    """
    with alone(folder), interruptible():
        study = settle(config, folder)
        with Pool("fastdpo.study.runner:worker", folder, places(study), folder / "work" / "logs") as pool:
            _references(study, folder, pool)
            _cells(study, folder, pool)
        share(folder)
        done = results.write(folder)
        return [cell.id for cell in done.cells if cell.status == "failed"]


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Nobody else runs a study in this folder meanwhile. A run that was killed holds nothing: at once, or, if that was
    in another container or before this machine started again, once its claim is seen to be dead."""
    place, waited = folder / "work" / "claims", False
    with Claims(place) as claims:
        while not claims.take("study"):
            if live(place.glob(f"study.*{SUFFIX}")):
                raise StudyError(f"{folder}: another `fastdpo study` is at work there; wait for it, or stop it")
            if not waited:
                print(f"{folder}: was in use elsewhere; waits {LEASE:g} s for a sign of life from there", flush=True)
            waited = True
            time.sleep(min(1.0, LEASE))
        yield


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM unwinds as ctrl-C does, so that the workers are ended."""

    def stop(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread: its signals are the caller's
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# --- study.json ------------------------------------------------------------------------------------------------------


def settle(config: StudyConfig, folder: Path) -> dict[str, Any]:
    """Write study.json, or check it against the one that there is; returns it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of TRL's own defaults
        arguments(config, folder / "work")  # what TRL would refuse is refused now
    found, scored = data.fingerprint(data.read(config.data)), scorer.fingerprint(config.scorer)
    config = config.with_paths(lambda path: local(path, folder))
    quality = config.quality or ("score" if config.scorer else "reward accuracy on held-out pairs")
    config = dataclasses.replace(config, quality=quality)
    before = read_json(folder / "study.json")
    workers, threads = _sizes(config)
    if before is not None and config.threads == "auto":
        threads = before["threads"]  # which sums are made in which order depends on it
    study = {
        **to_dict(dataclasses.replace(config, workers=workers, threads=threads)),
        "data_fingerprint": found,
        "scorer_fingerprint": (before or {}).get("scorer_fingerprint", scored),
        "start": (before or {}).get("start"),
        "reference_measures": (before or {}).get("reference_measures", {}),
        "machine": (before or {}).get("machine") or machine(),
        "versions": (before or {}).get("versions") or versions(),
        "version": (before or {}).get("version") or __version__,
    }
    study = json.loads(json.dumps(study))  # tuples as lists, as they are read back
    if before is not None:
        _check_same(before, study, folder)
        if study["scorer_fingerprint"] != scored:
            print(f"fastdpo study: {config.scorer} has changed; the cells so far are not scored again")
        if before["versions"] != versions():
            print(f"fastdpo study: the cells so far were made with {before['versions']}, those now with {versions()}")
    write_json(folder / "study.json", study)
    return study


def _check_same(before: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """Raise StudyError where finished cells of the folder would not be what the settings say."""
    fields = [one.name for one in dataclasses.fields(StudyConfig)]
    changed = [name for name in (*fields, "data_fingerprint") if name not in _FREE and before[name] != now[name]]
    for one in now["references"]:
        there = read_json(_reference_path(folder, one["name"]))
        if there is not None and there["of"] != _what(one):
            changed.append(f"references.{one['name']}")
    if changed:
        first = changed[0]
        values = f" ({before[first]!r} there, {now[first]!r} now)" if first in before else ""
        raise StudyError(
            f"{folder}: its cells were run with another {', '.join(changed)}{values}; expected the same, or another "
            "--output. Lists of the grid may change"
        )


def _sizes(config: StudyConfig) -> tuple[int, int]:
    """(workers, threads of each)"""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = config.workers if isinstance(config.workers, int) else len(_devices()) or cores
    threads = config.threads if isinstance(config.threads, int) else max(1, cores // workers)
    return workers, threads


def _devices() -> list[str]:
    """GPUs, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return given.split(",")[:count] if given else [str(i) for i in range(count)]


def places(study: dict[str, Any]) -> list[Place]:
    """One a worker: GPUs in turn, or none."""
    devices: list[Any] = list(_devices()) or [None]
    return [Place(devices[i % len(devices)], study["threads"]) for i in range(study["workers"])]


def machine() -> str:
    """Processor and number of cores."""
    return f"{processor()}, {os.cpu_count()} cores"


def versions() -> dict[str, str]:
    """Of the libraries that the numbers depend on."""
    found = {name: installed_version(name) for name in _VERSIONS}
    return {name: version for name, version in found.items() if version is not None}


# --- jobs ------------------------------------------------------------------------------------------------------------


def worker(folder: Path) -> Callable[[tuple[str, Any]], None]:
    """What a worker process does with a job: ("reference", its name) or ("cell", a Cell)."""
    import datasets
    from transformers.utils import logging

    from .cell_run import Lab

    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    lab = Lab(folder)

    write_json(folder / "work" / "startup.json", {"seconds": process_seconds()})

    def do(job: tuple[str, Any]) -> None:
        kind, what = job
        if kind == "reference":
            start = {"name": START, "model": lab.study["policy"], "dtype": None, "tokenizer": None}
            of = next((one for one in lab.study["references"] if one["name"] == what), start)
            kept = {"of": _what(of), "prior": "likelihood" in lab.config.parameterizations}
            write_json(_reference_path(folder, what), {**kept, **lab.reference(lab.policy(what))})
        else:
            cell = Cell(*what)
            write_json(cell_path(folder, cell.id), _record(cell, **lab.cell(cell)))

    return do


def _what(reference: dict[str, Any]) -> list[Any]:
    """What a reference's logps depend on, of its settings."""
    return [reference[name] for name in ("model", "dtype", "tokenizer")]


def _reference_path(folder: Path, name: str) -> Path:
    return folder / "references" / f"{name}.json"


def _record(cell: Cell, **found: Any) -> dict[str, Any]:
    """A cell's JSON."""
    fixed: dict[str, Any] = {
        "same_run_as": None,
        "status": "done",
        "error": None,
        "seconds": 0.0,
        "curves": [],
        "measures": {},
    }
    return {"id": cell.id, "cell": cell._asdict(), **fixed, "degenerate": [], **found}


def _references(study: dict[str, Any], folder: Path, pool: Pool) -> None:
    """Score and measure each reference, once; then study.json says what was measured."""
    config = of_study(study)
    asked = [one.name for one in config.references if one.model is not None]
    asked = [START, *(name for name in asked if name != START)]
    prior = "likelihood" in config.parameterizations
    there = {name: read_json(_reference_path(folder, name)) for name in asked}
    missing = [("reference", name) for name, one in there.items() if one is None or (prior and not one["prior"])]
    for outcome in bar(pool.run(missing), len(missing), "references"):
        if outcome.error is not None:
            raise StudyError(f"references.{outcome.job[1]}: {outcome.error}")
    measured = {name: read_json(_reference_path(folder, name))["measures"] for name in asked}
    study["start"], study["reference_measures"] = measured[START], measured
    write_json(folder / "study.json", study)


def _cells(study: dict[str, Any], folder: Path, pool: Pool) -> None:
    """Run the cells that there are not yet, and those that failed."""
    every = runs(study)
    own = [cell for cell, run in every.items() if cell is run]
    missing = [cell for cell in own if not _is_done(cell, folder)]
    shared = len(every) - len(own)
    print(
        f"{len(every)} cells"
        + (f", of which {shared} are the same training as another by construction" if shared else "")
        + f": {len(own)} runs, {len(own) - len(missing)} of them done; {study['workers']} workers"
    )
    jobs = [("cell", tuple(cell)) for cell in missing]
    for outcome in bar(pool.run(jobs), len(jobs), "cells"):
        if outcome.error is not None:
            cell = Cell(*outcome.job[1])
            write_json(cell_path(folder, cell.id), _record(cell, status="failed", error=outcome.error))


def _is_done(cell: Cell, folder: Path) -> bool:
    record = read_json(cell_path(folder, cell.id))
    return record is not None and record["status"] == "done" and record["same_run_as"] is None


def bar(outcomes: Iterator[Outcome], total: int, what: str) -> Iterator[Outcome]:
    """The outcomes, with a progress bar over them."""
    from tqdm import tqdm

    failed = 0
    with tqdm(total=total, desc=what, unit="run", ncols=80, disable=not total, smoothing=0.1) as shown:
        for outcome in outcomes:
            failed += outcome.error is not None
            shown.set_postfix({"failed": failed} if failed else {})
            shown.update()
            yield outcome


def share(folder: Path) -> None:
    """Write the cells that are another's run by construction."""
    for cell, own in runs(read_json(folder / "study.json")).items():
        if cell is not own:
            record = read_json(cell_path(folder, own.id))
            if record is not None:
                shared = {**record, "id": cell.id, "cell": cell._asdict(), "same_run_as": own.id, "seconds": 0.0}
                if read_json(cell_path(folder, cell.id)) != shared:
                    write_json(cell_path(folder, cell.id), shared)
