"""benchmarks/: wrong results have no time, cases fit, costs, the report, and the page that it writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import bench_tiny
import pytest
import torch

from benchmarks import cost, report
from benchmarks.cases import CASES, LEAST_TOKENS, MODELS, Case, Machine, Shape, fit
from benchmarks.group import contenders, kept_share
from benchmarks.inputs import make
from fastdpo.bench.from_logits import FROM_LOGITS, LogitsBatch, run
from fastdpo.bench.gate import Gate, WrongResult, check
from fastdpo.bench.isolated import run_alone
from fastdpo.bench.providers import TOKEN_LOGPS, Batch, eager, first_tokens, liger

ROOT = Path(__file__).parent.parent
TINY = Shape(128, 1024, 64)


# --- the gate --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", bench_tiny.WRONG.values(), ids=bench_tiny.WRONG)
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_the_gate_refuses(monkeypatch: pytest.MonkeyPatch, wrong: object, layout: str) -> None:
    monkeypatch.setitem(TOKEN_LOGPS, "wrong", wrong)
    gate = Gate(make(Case("Qwen3 0.6B", layout=layout), TINY), tokens=64)
    with pytest.raises(WrongResult, match="wrong, (logps|gradient 1): .* not reported"):
        gate.errors("wrong")


def test_the_gate_refuses_one_value_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the softmax is flat, every logp is within a tenth of -log V."""
    monkeypatch.setitem(TOKEN_LOGPS, "wrong", lambda *batch: torch.full_like(y := eager(*batch), y.mean().item()))
    gate = Gate(make(Case("Qwen3 0.6B", softmax="dense"), Shape(128, 65536, 16)), "forward", tokens=64)
    with pytest.raises(WrongResult, match="wrong, logps: .* nats off, at most 0.1.* allowed"):
        gate.errors("wrong")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", ["eager", "PyTorch", "fastdpo", "fastdpo exact", "fastdpo exact, kept"])
def test_the_gate_lets_through(name: str, dtype: str) -> None:
    batch = make(Case("Qwen3 0.6B", layout="padded", dtype=dtype), TINY)
    errors = Gate(batch, tokens=64).errors(name)
    assert len(errors) == 3
    assert all(0 < error < (0.1 if dtype == "bfloat16" else 1e-4) for error in errors)


@pytest.mark.parametrize("name", ["eager", "PyTorch", "TRL 1.16", "fastdpo", "fastdpo, in place"])
def test_the_gate_from_logits(name: str) -> None:
    if name == "TRL 1.16":
        pytest.importorskip("trl")
    batch = make(Case("Qwen3 0.6B", "logits", "padded"), TINY)
    gate = Gate(batch, tokens=64)
    before = gate.part.logits.clone()
    assert gate.errors(name)[1] < 0.01
    assert torch.equal(gate.part.logits, before), "the contender was given the gate's own logits"


def test_another_shape_is_wrong() -> None:
    with pytest.raises(WrongResult, match=r"shape \[2\], expected \[3\]"):
        check("it", torch.ones(2), torch.ones(3), 0.1)


def test_part_of_a_padded_batch_counts() -> None:
    """The first tokens of a padded sequence are its prompt; what is checked has some of them and what follows."""
    batch = make(Case("Qwen3 0.6B", layout="padded"), TINY)
    part = first_tokens(batch, 8)
    assert part.lengths == (8,) * 4
    counted = (part.labels >= 0).view(4, 8).sum(1).tolist()
    assert all(0 < count < 8 for count in counted), counted
    rows = [(batch.hidden == row).all(1).nonzero().item() for row in part.hidden]
    assert torch.equal(part.labels, batch.labels[rows]) and torch.equal(part.grads, batch.grads[rows])


def test_liger_takes_a_padded_batch() -> None:
    """Its gradient comes back for every row of the batch, in order, zero for those that do not count."""
    pytest.importorskip("liger_kernel")
    batch = make(Case("Qwen3 0.6B", layout="padded", dtype="float32"), Shape(32, 128, 8))
    with torch.compiler.set_stance("force_eager"):  # Liger compiles
        loss, dx = liger(batch, "frozen")
    assert dx.shape == batch.hidden.shape
    assert torch.equal(dx.abs().sum(1) > 0, batch.labels >= 0)
    sums = torch.stack([x.sum() for x in eager(*batch[:3]).split(list(batch.lengths))])
    torch.testing.assert_close(loss, -torch.nn.functional.logsigmoid(0.1 * (sums[:2] - sums[2:])).mean())


# --- cases and inputs ------------------------------------------------------------------------------------------------


def test_the_cases_cover() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    assert {case.model for case in CASES} == set(MODELS)
    for field, values in {
        "entry": {"hidden", "logits"},
        "layout": {"packed", "padded"},
        "dtype": {"bfloat16", "float32"},
        "softmax": {"peaked", "dense"},
        "needs": {"both", "frozen"},
    }.items():
        assert {getattr(case, field) for case in CASES} == values
    asked = {"eager", "torch.compile", "PyTorch", "TRL 1.16", "Liger", "CCE", "fastdpo"}
    assert all(asked <= set(contenders(case)) for case in CASES)


def test_a_case_shrinks_in_tokens_then_vocabulary() -> None:
    case = Case("Llama 3 8B", tokens=2048)
    machine = Machine({"bfloat16": 3e11, "float32": 1e11}, 3e10, 1 << 36)
    full, less, least = (fit(case, seconds, machine) for seconds in (1e4, 200, 40))
    assert full == Shape(2048, 128256, 4096)
    assert less.vocab == 128256 and LEAST_TOKENS <= less.tokens < 2048
    assert less.left_out == f"N = {less.tokens:,} of 2,048"
    assert least.vocab == 64128 and "V = 64,128 of 128,256" in least.left_out
    assert fit(case, 1.0, machine) is None
    assert fit(case, 1e4, machine._replace(memory=1 << 31)) is None
    assert fit(case, 1e4, machine._replace(memory=12 << 30)).tokens < 2048


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("entry", ["hidden", "logits"])
def test_inputs(entry: str, layout: str) -> None:
    batch = make(Case("Qwen3 0.6B", entry, layout), TINY)
    assert isinstance(batch, Batch if entry == "hidden" else LogitsBatch)
    assert sum(batch.lengths) == 128 and len(batch.lengths) == 4
    if layout == "packed":
        assert (batch.labels >= 0).all() and len(set(batch.lengths)) > 1
    else:
        counts = (batch.labels >= 0).view(4, 32)
        assert not counts[:, :16].any() and counts[:, 16:24].all()
    again = make(Case("Qwen3 0.6B", entry, layout), TINY)
    assert all(torch.equal(a, b) for a, b in zip(batch, again, strict=True) if isinstance(a, torch.Tensor))


def test_kept_share() -> None:
    """All columns are computed of random weights, exactly; few, where the softmax is peaked."""
    shape = Shape(256, 16384, 128)
    assert kept_share(make(Case("Qwen3 0.6B", softmax="dense"), shape)) is None
    assert 0 < kept_share(make(Case("Qwen3 0.6B"), shape)) < 0.25


# --- costs -----------------------------------------------------------------------------------------------------------


def test_operations() -> None:
    """In units of 2 N V H, half of the rows masked."""
    work = cost.Work(1000, 500, 1200, 20000, 8, 2, "both", kept=0.05)
    unit = 2 * 1000 * 20000 * 8
    found = {name: cost.operations(name, work) / unit for name in cost.PRODUCTS}
    assert found == pytest.approx(
        {
            "eager": 3,
            "torch.compile": 3,
            "PyTorch": 4,
            "TRL 1.16": 4,
            "Liger": 3.6,
            "CCE": 1.5,
            "fastdpo": 0.55,
            "fastdpo exact": 1.5,
            "fastdpo exact, kept": 1.5,
        }
    )
    dense, big = work._replace(kept=None), work._replace(kept=None, vocab=1 << 20)
    assert cost.operations("fastdpo", dense) / unit == 1.5  # all logits fit the workspace
    assert cost.operations("fastdpo", big) / (2 * 500 * (1 << 20) * 8) == 4  # they do not
    assert cost.operations("fastdpo", work._replace(needs="forward")) / unit == 0.5
    assert set(cost.PRODUCTS) == {*TOKEN_LOGPS, "Liger"}


def test_bytes() -> None:
    work = cost.Work(1000, 500, 1200, 20000, 8, 2, "both", kept=0.05)
    held = {name: cost.logits_held(name, work) for name in cost.PRODUCTS}
    assert held["eager"] == 12 * 1000 * 20000
    assert held["CCE"] == 2 * 500 * 20000
    assert held["fastdpo"] == 0
    assert held["Liger"] == 6 * 600 * 20000
    assert cost.least_moved(work) == 3 * 2 * 500 * 20000


# --- from end to end -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict, str]:
    """The suite on tiny cases with wrong contenders among the right ones: exit code, JSON, what it printed."""
    path = tmp_path_factory.mktemp("bench") / "bench.json"
    words = ["benchmarks/bench_heads.py", "-p", "bench_tiny", "--bench-seconds", "40", "--benchmark-json", str(path)]
    # pytest-benchmark would take it for a worker of this run, in which nothing can be timed
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=alone)
    assert path.exists(), done.stdout + done.stderr
    return done.returncode, json.loads(path.read_text()), done.stdout


def test_the_suite_has_no_time_of_a_wrong_contender(suite: tuple[int, dict, str]) -> None:
    code, raw, said = suite
    assert code == 1, "a wrong result must fail the run"
    timed = {(line["group"], line["name"]) for line in raw["benchmarks"]}
    hidden, logits = "Tiny, from hidden, bf16, packed, peaked", "Tiny, from logits, bf16, padded"
    assert timed == {
        *((hidden, name) for name in ("product alone", "eager", "fastdpo")),
        *((logits, name) for name in ("copy alone", "eager", "fastdpo, in place")),
    }
    assert all(min(line["stats"]["data"]) > 0 for line in raw["benchmarks"])
    refused = raw["fastdpo"]["not_timed"]
    assert all(refused[hidden][name].startswith("wrong result") for name in bench_tiny.WRONG)
    assert refused[logits]["wrong_sign"].startswith("wrong result")
    assert refused[logits]["CCE"].startswith("no CPU path")
    assert "wrong_sign: wrong result" in said and f"benchmark '{hidden}'" in said


def test_the_report_of_the_suite(suite: tuple[int, dict, str], tmp_path: Path) -> None:
    doc = report.condensed(suite[1])
    text = report.tables(doc)
    for name in bench_tiny.WRONG:
        (line,) = [line for line in text.splitlines() if line.startswith(f"| {name} |")][:1]
        assert "wrong result" in line
    case = doc["cases"]["Tiny, from hidden, bf16, packed, peaked"]
    fast = case["contenders"]["fastdpo"]
    assert fast["seconds"] > 0 and len(fast["errors"]) == 3 and fast["operations"] > 0
    assert report.rate(case, fast) == pytest.approx(
        fast["operations"] / fast["seconds"] / (2 * 128 * 1024 * 64 / case["baseline"]["seconds"])
    )
    report.picture(doc, tmp_path / "it.png")
    assert (tmp_path / "it.png").stat().st_size > 10_000


def test_alone_from_logits(tmp_path: Path) -> None:
    """In a process of its own; the gradient in place is no memory."""
    batch = make(Case("Qwen3 0.6B", "logits"), Shape(256, 32768, 0))
    torch.save(tuple(batch), tmp_path / "it.pt")
    outcome = run_alone("fastdpo, in place", tmp_path / "it.pt")
    assert outcome.failed is None and outcome.seconds > 0
    assert outcome.mib < 8  # the logits are 16 MiB
    assert "fastdpo, in place" in FROM_LOGITS and len(run("fastdpo, in place", batch)) == 2


# --- the page --------------------------------------------------------------------------------------------------------


def test_the_page_is_current() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    committed = ROOT / "docs" / "benchmarks.json"
    between = page.split(report.BEGIN)[1].split(report.END)[0].strip()
    if not committed.exists():
        assert between == "", "tables without docs/benchmarks.json"
        return
    doc = json.loads(committed.read_text())
    assert between == report.tables(doc), "run python -m benchmarks.report BENCH.json --output docs"
    assert (ROOT / "docs" / "benchmarks.png").exists()
    present = {name for case in doc["cases"].values() for name in case["contenders"]}
    assert {"eager", "torch.compile", "PyTorch", "TRL 1.16", "Liger", "CCE", "fastdpo"} <= present
