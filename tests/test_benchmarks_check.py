"""`make bench-check`: which ratios count as lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import check
from benchmarks.cases import CASES
from benchmarks.group import Result


def document(**seconds: float) -> dict:
    """benchmarks.json of the first checked case."""
    case = next(case for case in CASES if case.check)
    contenders = {name.replace("_", " "): {"seconds": value} for name, value in seconds.items()}
    shape = {"tokens": 128, "vocab": 1024, "width": 64, "left_out": ""}
    return {"cases": {case.name: {"shape": shape, "contenders": contenders}}}


COMMITTED = document(fastdpo=1.0, fastdpo_exact=3.0, CCE=3.0, eager=8.0)


def test_ratios() -> None:
    name = next(iter(COMMITTED["cases"]))
    assert check.ratios(COMMITTED) == {(name, "CCE"): 3.0, (name, "eager"): 8.0}


def test_ratios_in_turn_only() -> None:
    """One run in a process of its own is not beside fastdpo's; a contender without a time has no ratio."""
    doc = document(fastdpo=1.0, CCE=3.0, PyTorch=90.0)
    contenders = next(iter(doc["cases"].values()))["contenders"]
    contenders["PyTorch"]["alone"] = True
    contenders["Liger"] = {"failed": "not installed: liger-kernel"}
    assert [contender for _, contender in check.ratios(doc)] == ["CCE"]


@pytest.mark.parametrize(("slower", "lost"), [(1.0, 0), (1 / 0.9, 0), (1 / 0.75, 2), (0.5, 0)])
def test_a_loss(slower: float, lost: int) -> None:
    """Of a tenth: allowed. Of a quarter: not. Twice as fast: no loss."""
    now = document(fastdpo=slower, CCE=3.0, eager=8.0)
    found = check.losses(check.ratios(COMMITTED), check.ratios(now), 0.2)
    assert len(found) == lost
    for (_, contender), said in found.items():
        before = {"CCE": 3.0, "eager": 8.0}[contender]
        assert f"was {before:.2f} x" in said and f"now {before / slower:.2f} x" in said and "a loss of 25%" in said


def test_a_slower_machine_is_no_loss() -> None:
    now = document(fastdpo=2.0, CCE=6.0, eager=16.0)
    assert check.losses(check.ratios(COMMITTED), check.ratios(now), 0.2) == {}


def test_what_is_missing_is_lost() -> None:
    found = check.losses(check.ratios(COMMITTED), check.ratios(document(fastdpo=1.0, CCE=3.0)), 0.2)
    ((key, said),) = found.items()
    assert key[1] == "eager" and said.endswith("not measured now")
    assert len(check.losses(check.ratios(COMMITTED), {}, 0.2)) == 2


@pytest.mark.parametrize(
    ("runs", "fails"),
    [
        ([{"fastdpo": 1.0, "CCE": 3.0, "eager": 8.0}], False),
        ([{"fastdpo": 2.0, "CCE": 3.0, "eager": 8.0}, {"fastdpo": 1.0, "CCE": 3.0, "eager": 8.0}], False),
        ([{"fastdpo": 2.0, "CCE": 3.0, "eager": 8.0}] * 2, True),
        ([{"CCE": 3.0, "eager": 8.0}] * 2, True),
    ],
    ids=["as before", "noise", "lost", "fastdpo failed"],
)
def test_the_command(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    runs: list[dict[str, float]],
    fails: bool,
) -> None:
    """A case that has lost is measured again; what is lost twice is an error."""
    left = iter(runs)

    def measure(case: object, shape: object, seconds: float, **options: object) -> dict[str, Result]:
        assert options["names"] == ["fastdpo", "CCE", "eager"]
        return {name: Result([value]) for name, value in next(left).items()}

    monkeypatch.setattr(check, "measure", measure)
    monkeypatch.setattr(check, "warm_up", lambda: None)
    path = tmp_path / "benchmarks.json"
    path.write_text(json.dumps(COMMITTED))
    monkeypatch.setattr("sys.argv", ["check", "--committed", str(path)])
    if fails:
        with pytest.raises(SystemExit, match=r"was 3\.00 x"):
            check.main()
    else:
        check.main()
    assert next(left, None) is None
    left_out = [case.name for case in CASES if case.check][1:]
    said = capsys.readouterr().out
    assert left_out and all(f"{name}: left out" in said for name in left_out)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--committed", "{folder}/none.json"], "none.json: no such file"),
        (["--allowed", "1.5"], "--allowed 1.5: expected a share"),
    ],
)
def test_bad_arguments(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    words: list[str],
    message: str,
) -> None:
    monkeypatch.setattr("sys.argv", ["check", *(word.format(folder=tmp_path) for word in words)])
    with pytest.raises(SystemExit, match="2"):
        check.main()
    assert message in capsys.readouterr().err
