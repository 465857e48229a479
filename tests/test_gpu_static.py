"""The Triton kernels as compiled for GPUs that are not here: no spills, 16-byte accesses, few instructions a logit.

One subprocess compiles them all, because this suite runs Triton's interpreter, under which nothing is compiled. The
peers', and bytes: test_gpu_bytes.py.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
pytestmark = pytest.mark.xdist_group("compiled")  # once, for one worker

# Older compilers make other machine code of the same kernels: a few spills, fewer programs at once
LIMITS = pytest.mark.skipif(
    tuple(map(int, version("triton").split(".")[:2])) < (3, 9), reason="the limits are those of Triton 3.9's compiler"
)
TARGETS = ["sm_80", "sm_90", "sm_100", "gfx942"]
# Names of compile_offline.CASES
FORWARD = [
    "forward",
    "forward, odd V",
    "forward, scale",
    "forward, softcap",
    "forward, DPO metrics",
    "forward, all stats",
    "forward, all stats, odd V, split",
    "forward, all stats, softcap, odd V",
]
BACKWARD = [
    "backward",
    "backward, odd V",
    "backward, scale",
    "backward, softcap",
    "backward, entropy",
    "backward, entropy, softcap, odd V",
]
MASS = ["mass", "mass, odd V", "mass, scale", "mass, softcap, odd V"]
PROBS = ["probs", "probs, softcap", "probs, odd n"]
GRADIENT = ["compact gradient", "compact gradient, softcap"]
OTHERS = ["backward, out aligned otherwise", "compact gradient, odd n", "combine", "sums", "pair", "pair, no reference"]

# On sm_90, where about 18 instructions can be issued in the time that memory takes for a bf16 logit. Kept columns
# (probs, compact gradient) are few: at 5% of the vocabulary, 50 instructions are 2.5 a logit
INSTRUCTIONS = {
    "forward": 7,
    "forward, odd V": 7,
    "forward, scale": 7.5,
    "forward, DPO metrics": 15,
    "forward, all stats": 15,
    "forward, all stats, odd V, split": 15,
    "backward": 7,
    "backward, odd V": 7,
    "backward, scale": 7.5,
    "backward, entropy": 9,
    "mass": 7,
    "mass, odd V": 7,
    "mass, scale": 8,
    "mass, softcap, odd V": 25,
    "probs": 55,
    "compact gradient": 12,
    "compact gradient, softcap": 50,
}


@functools.cache
def compiled() -> dict[tuple[str, str, str], dict[str, Any]]:
    """(kernel, dtype, target) -> what compile_offline measured."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fastdpo.gpu.compile_offline"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {(row["kernel"], row["dtype"], row["target"]): row for row in rows}


@LIMITS
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel", FORWARD + BACKWARD + MASS + PROBS + GRADIENT + OTHERS)
def test_compiles_without_spills(kernel: str, target: str) -> None:
    assert compiled()[kernel, "bf16", target]["spills"] == 0


def test_every_case_is_here() -> None:
    assert {kernel for kernel, _, _ in compiled()} == set(FORWARD + BACKWARD + MASS + PROBS + GRADIENT + OTHERS)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel", FORWARD + BACKWARD + MASS + GRADIENT)
def test_logits_move_16_bytes_at_a_time(kernel: str, target: str) -> None:
    """Also where V is odd, so that most rows start off the boundary."""
    row = compiled()[kernel, "bf16", target]
    assert row["load_bits"] == 128
    if kernel in BACKWARD + GRADIENT:
        assert row["store_bits"] == 128


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel", PROBS)
def test_gather_is_coalesced(kernel: str, target: str) -> None:
    """Neighbouring lanes read neighbouring kept columns; a column of P is stored 16 bytes at a time."""
    row = compiled()[kernel, "bf16", target]
    assert row["lanes_along_columns"] == 32
    assert row["store_bits"] == 128 or kernel == "probs, odd n"


@LIMITS
@pytest.mark.parametrize("kernel", INSTRUCTIONS)
def test_instructions_per_logit(kernel: str) -> None:
    assert compiled()[kernel, "bf16", "sm_90"]["instructions_per_logit"] <= INSTRUCTIONS[kernel]


@pytest.mark.parametrize("kernel", FORWARD + BACKWARD + MASS)
def test_special_functions_per_logit(kernel: str) -> None:
    """One exp2 a logit, and one rsqrt under a softcap: on a B200 memory takes the time of 1.2 of them."""
    for target in TARGETS:
        found = compiled()[kernel, "bf16", target]["special_per_logit"]
        least = 2 if "softcap" in kernel else 1
        assert least <= found <= least + 0.05


@LIMITS
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel", FORWARD + BACKWARD + MASS + PROBS + GRADIENT)
def test_loads_in_flight(kernel: str, target: str) -> None:
    """The programs that a multiprocessor holds at once have the about 20 KiB (H100) in flight that latency times
    bandwidth asks for: each thread issues four 16-byte loads together."""
    row = compiled()[kernel, "bf16", target]
    assert row["programs"] >= 3
    assert row["occupancy"] == row["programs"] * row["warps"] / (32 if target == "gfx942" else 64)
    if kernel in FORWARD + BACKWARD + MASS:
        warp_size = 64 if target == "gfx942" else 32
        assert row["programs"] * row["warps"] * warp_size * 4 * 16 >= 20 * 1024


@pytest.mark.parametrize("vocab", [50257, 32001])
def test_odd_vocabularies_run_what_is_compiled_here(vocab: int) -> None:
    """As the launches are planned: peeled to 16 bytes, with the compiled kernels' blocks."""
    from fastdpo.gpu import launch

    logits = torch.empty(1, 16, vocab, dtype=torch.bfloat16)
    for plan in (launch.forward_plan(logits, 16), launch.backward_plan(logits, logits, 16)):
        assert plan.peel and plan.shape == launch.block_shape(2, 32)
    assert not launch.forward_plan(torch.empty(1, 16, 131072, dtype=torch.bfloat16), 16).peel


def test_the_committed_figures_are_of_these_kernels() -> None:
    committed = json.loads((Path(__file__).parent.parent / "docs" / "gpu_static.json").read_text(encoding="utf-8"))
    if committed["versions"]["triton"] != version("triton"):
        pytest.skip("docs/gpu_static.json was made by another Triton")
    ours = [k for k in committed["kernels"] if k["contender"] == "fastdpo"]
    assert len(ours) == 4 * len({kernel for kernel, _, _ in compiled()})
    for row in ours:
        now = compiled()[row["pass"], "bf16", row["target"]]
        assert {key: row.get(key) for key in now if key not in ("kernel", "dtype")} == {
            key: value for key, value in now.items() if key not in ("kernel", "dtype")
        }, "run python -m benchmarks.gpu_static --output docs"


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize(
    "kernel", ["forward, all stats", "backward, entropy", "mass, odd V", "probs", "compact gradient"]
)
def test_other_dtypes(kernel: str, dtype: str) -> None:
    row = compiled()[kernel, dtype, "sm_90"]
    assert row["spills"] == 0
    assert row["store_bits" if kernel == "probs" else "load_bits"] == 128
