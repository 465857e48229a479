"""A whole study: finished cells are kept, killed ones end the same, failed ones are named and tried again."""

from __future__ import annotations

import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import study_kit
import yaml

from fastdpo import cli
from fastdpo.cache import claims
from fastdpo.study import command, cost, results, runner, summary
from fastdpo.study.errors import StudyError
from fastdpo.study.pool import Outcome, Pool

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.skipif(sys.platform == "win32", reason="signals"),
]
KILLS = 3


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return study_kit.world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def grid(world: Path) -> dict[str, Any]:
    """Two betas, two references and the posterior: 6 runs for 8 cells."""
    references = {"start": "policy", "better": {"model": str(world / "better"), "role": "stronger"}}
    return study_kit.settings(world, references=references, parameterizations=["ratio", "posterior"])


@pytest.fixture(scope="module")
def unbroken(grid: dict[str, Any], world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that nothing disturbed."""
    folder = tmp_path_factory.mktemp("unbroken") / "DIR"
    (world / "grid.yaml").write_text(yaml.safe_dump(grid, sort_keys=False))
    process = study_kit.study_process(world / "grid.yaml", folder)
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, error.decode()
    assert b"8 cells, of which 2 are the same training as another by construction: 6 runs, 0 of them done" in out
    return folder


def kept(folder: Path) -> dict[str, bytes]:
    """What must not depend on how a study came to its end."""
    return {name: (folder / name).read_bytes() for name in ("results.json", "results.csv", "study.json")}


def test_what_a_study_leaves(unbroken):
    study = results.load(unbroken)
    assert [cell.status for cell in study.cells] == ["done"] * 8
    shared = [cell for cell in study.cells if cell.same_run_as]
    assert [(cell.id, cell.same_run_as) for cell in shared] == [
        (f"sigmoid-posterior-better-beta{beta}-seed0", f"sigmoid-posterior-start-beta{beta}-seed0")
        for beta in ("0.1", "1")
    ]
    by_id = {cell.id: cell for cell in study.cells}
    for cell in shared:
        own = by_id[cell.same_run_as]
        assert (cell.measures, cell.curves) == (own.measures, own.curves) and cell.seconds == 0 < own.seconds
        assert results.load_tokens(unbroken, cell.id) == results.load_tokens(unbroken, own.id)
    assert study.config["quality"] == "score" and study.config["start"]["quality"] is not None
    assert set(study.config["reference_measures"]) == {"start", "better"}
    whole = json.loads((unbroken / "results.json").read_text())
    assert len(whole["cells"]) == 8 and "seconds" not in whole["cells"][0]
    header, *lines = (unbroken / "results.csv").read_text().splitlines()
    assert len(lines) == 8 and header.startswith("id,loss_type,parameterization,reference,beta,seed,same_run_as")
    with pytest.raises(StudyError, match="no token logps"):
        results.load_tokens(unbroken, "other")
    with pytest.raises(StudyError, match="expected a folder of `fastdpo study`"):
        results.load(unbroken / "refs")


def test_killed_at_random_it_ends_the_same(unbroken, world, tmp_path):
    folder = tmp_path / "DIR"
    rng, seen = random.Random(), []
    for _ in range(KILLS):
        process = study_kit.study_process(world / "grid.yaml", folder)
        before, deadline = done(folder), time.monotonic() + 200
        # Some time after it has written something more: at work on the next
        while done(folder) == before and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(rng.random())
        workers = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        study_kit.kill_group(process)
        psutil.wait_procs(workers, timeout=30)
        assert not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers)
        seen.append(done(folder))
    process = study_kit.study_process(world / "grid.yaml", folder)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error.decode()
    assert seen == sorted(seen) and 0 < seen[0] < 8
    assert kept(folder) == kept(unbroken)


def done(folder: Path) -> int:
    return len([*folder.glob("references/*.json"), *folder.glob("cells/*.json")])


def test_a_finished_study_is_left_as_it_is(unbroken, world, monkeypatch):
    monkeypatch.setattr("fastdpo.study.pool.Worker.__init__", lambda *_: pytest.fail("started a worker"))
    before = kept(unbroken)
    assert runner.run(study_kit.from_dict(yaml.safe_load((world / "grid.yaml").read_text())), unbroken) == []
    assert kept(unbroken) == before


def test_settings_that_cells_depend_on_may_not_change(unbroken, grid, world):
    before = kept(unbroken)
    for changes, message in (
        ({"training": {**grid["training"], "learning_rate": 2e-3}}, "with another training .*0.001.*0.002"),
        ({"threads": 2}, r"with another threads \(1 there, 2 now\)"),
        ({"references": {**grid["references"], "better": str(world / "foreign")}}, "with another references.better"),
        ({"data": {**grid["data"], "train_rows": 4}}, "with another data, data_fingerprint"),
    ):
        with pytest.raises(StudyError, match=message):
            runner.run(study_kit.from_dict({**grid, **changes}), unbroken)
    assert kept(unbroken) == before
    # A smaller grid is part of what there is
    smaller = {**grid, "betas": [1], "references": {"better": grid["references"]["better"]}}
    with runner.alone(unbroken):
        study = runner.settle(study_kit.from_dict(smaller), unbroken)
        assert len(results.load(unbroken).cells) == 2 and study["start"] is not None
        runner.settle(study_kit.from_dict(grid), unbroken)


def test_two_at_once_are_refused(unbroken, grid):
    with runner.alone(unbroken), pytest.raises(StudyError, match="another `fastdpo study` is at work there"):
        runner.run(study_kit.from_dict(grid), unbroken)


def test_a_claim_from_elsewhere_holds_as_long_as_it_is_touched(tmp_path, monkeypatch, capsys):
    """Another container, or this machine before it started again: process ids say nothing of it."""
    claim = tmp_path / "work" / "claims" / "study.0.claim"
    claim.parent.mkdir(parents=True)
    claim.write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": "1", "builder": "another"}))
    with pytest.raises(StudyError, match="another `fastdpo study` is at work there"), runner.alone(tmp_path):
        pass
    for module in (claims, runner):
        monkeypatch.setattr(module, "LEASE", 0.1)
    os.utime(claim, (0, 0))
    with runner.alone(tmp_path):
        assert [path.name for path in claim.parent.glob("*.claim")] == ["study.0.claim", "study.1.claim"]
    assert not list(claim.parent.glob("*.claim"))
    assert "was in use elsewhere; waits 0.1 s" in capsys.readouterr().out


class InThisProcess(Pool):
    """Without workers, whose imports take longer than the jobs."""

    def run(self, jobs):
        do = runner.worker(self._argument)
        for job in jobs:
            try:
                do(job)
                yield Outcome(job, None)
            except Exception as error:
                yield Outcome(job, f"{type(error).__name__}: {error}")


def test_failed_cells_are_named_and_tried_again(world, tmp_path, capsys, monkeypatch):
    """Here a scorer fails at beta = 1; the others go on, and the exit code says so."""
    flag = tmp_path / "broken"
    (tmp_path / "scoring.py").write_text(
        "from pathlib import Path\nimport inspect\n"
        "def score(prompts, answers, rows):\n"
        "    frames = [f.frame.f_locals.get('cell') for f in inspect.stack()]\n"
        f"    if Path({str(flag)!r}).exists() and any(getattr(c, 'beta', 0) == 1 for c in frames):\n"
        "        raise RuntimeError('the scorer is broken')\n"
        "    return [len(a.split()) for a in answers]\n"
    )
    flag.touch()
    settings = study_kit.settings(world, scorer=f"{tmp_path / 'scoring.py'}:score")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    monkeypatch.setattr(command, "write_pages", lambda folder: folder / "report.html")
    monkeypatch.setattr(runner, "Pool", InThisProcess)
    arguments = ["study", str(tmp_path / "config.yaml"), "--output", str(tmp_path / "DIR")]
    assert cli.main(arguments) == 1
    error = capsys.readouterr().err
    assert "FAILED: 1 cells: sigmoid-ratio-start-beta1-seed0" in error and "the scorer is broken" in error
    study = results.load(tmp_path / "DIR")
    assert [cell.status for cell in study.cells] == ["done", "failed"]
    assert study.cells[1].error == "RuntimeError: the scorer is broken" and study.cells[1].measures == {}
    flag.unlink()
    with (tmp_path / "scoring.py").open("a") as file:
        file.write("# mended\n")
    assert cli.main(arguments) == 0
    output = capsys.readouterr().out
    assert "2 runs, 1 of them done" in output
    assert "scoring.py:score has changed; the cells so far are not scored again" in output
    assert [cell.status for cell in results.load(tmp_path / "DIR").cells] == ["done", "done"]


def test_pages_are_of_the_best_cell_or_the_one_asked_for(unbroken, capsys):
    """tokens.html names its cell."""
    pages = {}
    study = results.load(unbroken)
    best = summary.best(summary.groups(study), higher_is_better=True).cells[0].id
    other = next(cell.id for cell in study.cells if cell.id != best)
    for cell, words in ((best, []), (other, ["--tokens", other])):
        assert cli.main(["study", "--report", str(unbroken), *words]) == 0
        assert capsys.readouterr().out.strip() == str(unbroken / "report.html")
        pages[cell] = (unbroken / "tokens.html").read_text(encoding="utf-8")
        assert cell in pages[cell]
    assert len(pages) == len(set(pages.values())) == 2
    (unbroken / "report.html").unlink()
    assert cli.main(["study", "--report", str(unbroken), "--tokens", "nope"]) == 1
    assert "nope:" in capsys.readouterr().err and (unbroken / "report.html").is_file()


def test_errors_are_one_line(tmp_path, capsys):
    assert cli.main(["study", str(tmp_path / "none.yaml"), "--output", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith(f"fastdpo study: {tmp_path / 'none.yaml'}: cannot be read")
    for words, message in (
        ([], "expected CONFIG --output DIR, or --demo --output DIR"),
        (["--demo", "config.yaml", "--output", "DIR"], "not allowed with argument"),
        (["config.yaml", "--report", "DIR"], "not allowed with argument"),
        (["--report", "DIR", "--output", "DIR"], "--output DIR: expected CONFIG or --demo with it"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["study", *words])
        assert message in capsys.readouterr().err
    assert cli.main(["study", "--cost", str(tmp_path)]) == 1
    assert "no study.json" in capsys.readouterr().err


def test_cost_beside_runs_of_trl(unbroken, capsys):
    """The same cells as trl.DPOTrainer with a live reference: the same losses, or no figure."""
    before = kept(unbroken)
    assert cli.main(["study", "--cost", str(unbroken), "--cells", "2"]) == 0
    found = json.loads((unbroken / "cost.json").read_text())
    assert found["timed"] == ["sigmoid-ratio-start-beta0.1-seed0", "sigmoid-ratio-better-beta0.1-seed0"]
    assert found["cells"] == 4 and found["largest_difference_of_losses"] < 1e-4
    for side in ("trl", "study"):
        parts = [value for name, value in found[side].items() if name.endswith("_seconds")]
        assert found[side]["seconds"] == pytest.approx(sum(parts)) and min(found[side].values()) >= 0
        assert found[side]["sweep_minutes"] == pytest.approx(found[side]["seconds"] * 4 / 60)
    assert found["trl"]["reference_seconds"] == 0 < found["study"]["reference_seconds"]
    assert "4 cells on 1 workers, minutes" in capsys.readouterr().out
    assert kept(unbroken) == before

    path = results.cell_path(unbroken, found["timed"][0])
    record = path.read_text()
    path.write_text(record.replace('"loss": 0.', '"loss": 0.9', 1))
    with pytest.raises(StudyError, match="the losses of TRL's runs differ by"):
        cost._compare(unbroken, results.load(unbroken), [], results.load(unbroken).cells[:1], [stock_of(record)])
    path.write_text(record)


def stock_of(record: str) -> dict[str, Any]:
    """What a run of TRL with these losses would report."""
    return {"losses": [one["loss"] for one in json.loads(record)["curves"]]}
