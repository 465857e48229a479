"""benchmarks.gpu_static: bytes counted in the interpreter, the estimate worked out by hand, and docs/gpu.md."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
pytest.importorskip("matplotlib")
import triton.language as tl  # noqa: E402

from benchmarks import gpu_bytes, gpu_report, gpu_roofline  # noqa: E402
from benchmarks.gpu_counter import counted  # noqa: E402
from benchmarks.gpu_peers import PEERS  # noqa: E402

DOCS = Path(__file__).parent.parent / "docs"


@triton.jit
def every_other(source, sink, size, BLOCK: tl.constexpr):
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(source + columns, mask=columns < size, other=0.0).to(tl.float32)
    first = tl.load(source).to(tl.float32)
    tl.store(sink + columns, x + first, mask=(columns < size) & (columns % 2 == 0))


def test_the_counter_counts_lanes_that_are_not_masked_off() -> None:
    """37 halves loaded, twice the first one; 19 floats stored. In sectors: 32 + 5 halves are 64 + 10 bytes, two and
    one; and one for each first."""
    source, sink = torch.arange(100).half(), torch.full((100,), -1.0)
    with counted(sectors=True) as moved:
        every_other[(2,)](source, sink, 37, BLOCK=32)
    assert moved.loaded == {"source": 37 * 2 + 2 * 2}
    assert moved.stored == {"sink": 19 * 4}
    assert moved.sectors == {"source": (2 + 1 + 2) * 32}
    assert sink[:37:2].tolist() == list(range(0, 37, 2)) and (sink[1::2] == -1).all()  # and computes as before
    every_other[(2,)](source, sink, 37, BLOCK=32)  # not counted any more
    assert moved.loaded.total() == 78


@pytest.mark.parametrize("vocab", gpu_bytes.VOCABULARIES)
@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("forward", 2.02),
        ("forward, all statistics", 2.02),
        ("backward", 4.04),
        ("backward, out of place", 4.04),
        ("backward, entropy", 4.04),
    ],
)
def test_bytes_per_logit(name: str, limit: float, vocab: int) -> None:
    found = gpu_bytes.measure("fastdpo", name, vocab)
    assert found["loaded"] >= 2 and found["stored"] == (2 if "backward" in name else 0)
    assert found["bytes"] <= limit


def test_an_estimate_by_hand() -> None:
    """1 GHz, 10 processors of 100 lanes: 1e12 instructions, 1e11 special, 2e12 bytes a second."""
    device = gpu_roofline.Device("a device", "sm_90", 10, 1e9, 100, 10, 1, 2e12)
    memory = gpu_roofline.estimate([gpu_roofline.Work(2, 0.5, 0.05)], 2, device)
    assert memory == {"seconds": pytest.approx(1e-12), "limit": "memory", "share": pytest.approx(1)}
    issue = gpu_roofline.estimate([gpu_roofline.Work(2, 4, 0.05)], 2, device)
    assert issue == {"seconds": pytest.approx(4e-12), "limit": "issue", "share": pytest.approx(0.25)}
    special = gpu_roofline.estimate([gpu_roofline.Work(2, 1, 0.2)], 2, device)
    assert special == {"seconds": pytest.approx(2e-12), "limit": "special", "share": pytest.approx(0.5)}
    both = gpu_roofline.estimate([gpu_roofline.Work(2, 0, 0), gpu_roofline.Work(4, 1, 0.3)], 6, device)
    assert both == {"seconds": pytest.approx(4e-12), "limit": "special", "share": pytest.approx(0.75)}
    quarter = gpu_roofline.estimate([gpu_roofline.Work(2, 1, 0.2)], 2, device._replace(special=25, slots=4))
    assert quarter["seconds"] == pytest.approx(1.6e-12)  # 1 - 0.2 + 4 * 0.2 slots


# --- the page --------------------------------------------------------------------------------------------------------


def committed() -> dict[str, Any]:
    return json.loads((DOCS / "gpu_static.json").read_text(encoding="utf-8"))


def test_the_page_is_current() -> None:
    text = (DOCS / "gpu.md").read_text(encoding="utf-8")
    assert gpu_report.page(text, committed()) == text, "run python -m benchmarks.gpu_report"
    assert (DOCS / "gpu_static.png").exists() and "(gpu_static.png)" in text


def test_no_contender_is_left_out() -> None:
    found = committed()
    for target in gpu_report.TARGETS:
        there = {(k["contender"], k["pass"]) for k in found["kernels"] if k["target"] == target}
        assert there >= set(PEERS)
    assert {(r["contender"], r["pass"], r["vocab"]) for r in found["bytes"]} == {
        (*run, vocab) for run in gpu_bytes.RUNS for vocab in gpu_bytes.VOCABULARIES
    }
    compared = {(r["contender"], r["pass"]) for r in found["passes"]}
    assert compared >= {key for key in PEERS if key[0] != "CCE"}


def test_the_committed_figures_keep_their_limits() -> None:
    limits = {"forward": (2.02, 7), "backward": (4.04, 7), "forward, all statistics": (2.02, 15)}
    rows = [r for r in committed()["passes"] if r["contender"] == "fastdpo" and r["pass"] in limits]
    assert len(rows) == 3 * len(gpu_bytes.VOCABULARIES)
    for row in rows:
        moved, instructions = limits[row["pass"]]
        (hopper,) = row["loops"]["sm_90"]
        assert row["bytes"] <= moved and hopper["instructions"] <= instructions, row["pass"]


def test_nobody_takes_fewer_instructions() -> None:
    """As docs/gpu.md says; and no kernel of fastdpo spills."""
    found = committed()
    ours = {(r["pass"], r["vocab"]): r["loops"] for r in found["passes"] if r["contender"] == "fastdpo"}
    for row in found["passes"]:
        for target, loops in row["loops"].items():
            mine = ours[row["pass"], row["vocab"]][target]
            assert sum(loop["instructions"] for loop in mine) <= sum(loop["instructions"] for loop in loops)
    assert not any(k["spills"] for k in found["kernels"] if k["contender"] == "fastdpo")


@pytest.mark.slow
def test_the_committed_figures_are_what_the_command_gives(tmp_path: Path) -> None:
    if committed()["versions"] != {name: version(name) for name in committed()["versions"]}:
        pytest.skip("docs/gpu_static.json was made by other versions")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.gpu_static", "--output", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "gpu_static.json").read_text()) == committed()
    assert gpu_report.tables(committed()) in done.stdout
    assert (tmp_path / "gpu_static.png").stat().st_size and (tmp_path / "gpu_static.md").stat().st_size
