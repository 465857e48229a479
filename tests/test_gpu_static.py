"""The Triton kernels as compiled for GPUs that are not here: no spills, 16-byte accesses, few instructions a logit.

One subprocess compiles them all, because this suite runs Triton's interpreter, under which nothing is compiled.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.xdist_group("compiled")  # once, for one worker

TARGETS = ["sm_80", "sm_90", "sm_100", "gfx942"]
# Names of compile_offline.CASES
FORWARD = [
    "forward",
    "forward, odd V",
    "forward, scale",
    "forward, softcap",
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
    assert row["widest_load"] == 128
    if kernel in BACKWARD + GRADIENT:
        assert row["widest_store"] == 128


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel", PROBS)
def test_gather_is_coalesced(kernel: str, target: str) -> None:
    """Neighbouring lanes read neighbouring kept columns; a column of P is stored 16 bytes at a time."""
    row = compiled()[kernel, "bf16", target]
    assert row["lanes_along_columns"] == 32
    assert row["widest_store"] == 128 or kernel == "probs, odd n"


@pytest.mark.parametrize("kernel", INSTRUCTIONS)
def test_instructions_per_logit(kernel: str) -> None:
    assert compiled()[kernel, "bf16", "sm_90"]["instructions_per_logit"] <= INSTRUCTIONS[kernel]


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize(
    "kernel", ["forward, all stats", "backward, entropy", "mass, odd V", "probs", "compact gradient"]
)
def test_other_dtypes(kernel: str, dtype: str) -> None:
    row = compiled()[kernel, dtype, "sm_90"]
    assert row["spills"] == 0
    assert row["widest_store" if kernel == "probs" else "widest_load"] == 128
