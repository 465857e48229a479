"""GPU evidence without a GPU: every Triton kernel compiled and read, its bytes counted, a bound on its speed estimated.

    python -m benchmarks.gpu_static [--output DIR]

fastdpo's kernels, TRL's, Liger's and CCE's, for sm_80, sm_90, sm_100 and gfx942. Prints the tables; DIR gets
gpu_static.json, gpu_static.md and gpu_static.png. Nothing is timed and nothing has run on a GPU: docs/gpu.md says how
each figure comes about.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from .gpu_bytes import RUNS, VOCABULARIES
from .gpu_roofline import DEVICES, Work, estimate


class Pass(NamedTuple):
    """Something that contenders do to all logits."""

    needed: float  # bytes per bf16 logit (or kept probability) that any implementation has to move
    ours: str  # of compile_offline.CASES
    odd: str | None = None  # the same where rows are not all on 16 bytes; None: compared at V = 131072 alone


PASSES = {
    "forward": Pass(2, "forward", "forward, odd V"),
    "forward, DPO metrics": Pass(2, "forward, DPO metrics"),
    "forward, all statistics": Pass(2, "forward, all stats", "forward, all stats, odd V, split"),
    "forward, softcap": Pass(2, "forward, softcap"),
    "backward": Pass(4, "backward", "backward, odd V"),
    "backward, entropy": Pass(4, "backward, entropy"),
    "backward, softcap": Pass(4, "backward, softcap"),
    "column mass": Pass(2, "mass"),
    "compact gradient": Pass(4, "compact gradient"),
}
BOTH = "forward and backward"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="folder for gpu_static.json, .md and .png")
    return parser


def main() -> None:
    parser = _parser()
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: under it Triton compiles nothing")
    from . import gpu_report

    found = gather()
    text = gpu_report.tables(found)
    print(text)
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        path = options.output / "gpu_static.json"
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        path.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
        gpu_report.picture(found, path.with_suffix(".png"))
        print(f"\n{path}, {path.with_suffix('.md').name}, {path.with_suffix('.png').name}")


def gather() -> dict[str, Any]:
    """Everything that the tables and the picture are made of."""
    kernels, moved = compiled(), counted()
    packages = ("triton", "trl", "liger_kernel", "cut_cross_entropy")
    return {
        "versions": {name: version(name) for name in packages},
        "kernels": kernels,
        "bytes": moved,
        "passes": passes(kernels, moved),
    }


def compiled() -> list[dict[str, Any]]:
    """Every kernel for every target: what machine_code.read finds."""
    jobs = list(_jobs())
    return [key | job() for key, job in tqdm(jobs, desc="compiled", unit="kernel")]


def _jobs() -> Iterator[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]:
    from fastdpo.gpu import compile_offline

    from . import gpu_peers

    for arch, target in compile_offline.TARGETS.items():
        for name, case in compile_offline.CASES.items():
            key = {"contender": "fastdpo", "pass": name, "vocab": None, "columns": 1.0, "target": arch}
            yield key, functools.partial(compile_offline.measure, case, target)
        for contender, name in gpu_peers.PEERS:
            for vocab in VOCABULARIES if name in PASSES and PASSES[name].odd else VOCABULARIES[:1]:
                for launch in gpu_peers.launches(contender, name, vocab, target):
                    key = {"contender": contender, "pass": name, "vocab": vocab}
                    key |= {"columns": round(launch.columns, 4), "target": arch}
                    yield key, functools.partial(gpu_peers.measure, launch, target)


def counted() -> list[dict[str, Any]]:
    """Bytes per logit of every contender, by benchmarks.gpu_bytes: in a process where Triton is interpreted."""
    command = [sys.executable, "-m", "benchmarks.gpu_bytes"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        found = [
            json.loads(line) for line in tqdm(process.stdout, "counted", len(RUNS) * len(VOCABULARIES), unit="run")
        ]
    if process.returncode:
        raise SystemExit(f"benchmarks.gpu_bytes ended with {process.returncode}")
    return found


def passes(kernels: list[dict[str, Any]], moved: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What contenders do to all logits, joined: bytes, instructions for each target, estimates for each device."""
    contenders = list(dict.fromkeys(kernel["contender"] for kernel in kernels))
    found = []
    for name, each in PASSES.items():
        for vocab in VOCABULARIES if each.odd else VOCABULARIES[:1]:
            for contender in contenders:
                if row := _pass(name, each, vocab, contender, kernels, moved):
                    found.append(row)
    for vocab in VOCABULARIES:
        for contender in contenders:
            halves = [r for r in found if r["vocab"] == vocab and r["contender"] == contender]
            two = [r for r in halves if r["pass"] in ("forward", "backward")]
            if len(two) == 2:
                found.append(_row(BOTH, vocab, contender, 6, sum(r["bytes"] for r in two), [r["loops"] for r in two]))
    return found


def _pass(
    name: str, each: Pass, vocab: int, contender: str, kernels: list[dict[str, Any]], moved: list[dict[str, Any]]
) -> dict[str, Any] | None:
    wanted: tuple[str, str, int | None] = (contender, name, vocab)
    if contender == "fastdpo":
        wanted = (contender, (each.ours if vocab % 8 == 0 else each.odd) or each.ours, None)
    mine = [kernel for kernel in kernels if (kernel["contender"], kernel["pass"], kernel["vocab"]) == wanted]
    if not mine:
        return None
    size = _bytes(name, vocab, contender, moved)
    loops: dict[str, list[dict[str, float]]] = {}
    for kernel in mine:
        loop = {
            "bytes": size * kernel["columns"],
            "instructions": kernel["instructions_per_logit"] * kernel["columns"],
            "special": kernel["special_per_logit"] * kernel["columns"],
            "load_bits": kernel["load_bits"],
            "store_bits": kernel["store_bits"],
            "occupancy": kernel["occupancy"],
        }
        loops.setdefault(kernel["target"], []).append(loop)
    return _row(name, vocab, contender, each.needed, size, [loops])


def _row(
    name: str, vocab: int, contender: str, needed: float, size: float, halves: list[dict[str, list[dict[str, float]]]]
) -> dict[str, Any]:
    loops = {target: [loop for half in halves for loop in half[target]] for target in halves[0]}
    estimates = {}
    for device in DEVICES:
        work = [Work(loop["bytes"], loop["instructions"], loop["special"]) for loop in loops[device.target]]
        estimates[device.name] = estimate(work, needed, device)
    row = {"pass": name, "vocab": vocab, "contender": contender, "needed": needed, "bytes": round(size, 4)}
    return row | {"loops": loops, "estimates": estimates}


def _bytes(name: str, vocab: int, contender: str, moved: list[dict[str, Any]]) -> float:
    """Counted bytes per logit. A softcap or a reduction changes arithmetic alone; so does the fused linear's launch."""
    if contender.startswith(("Liger CE", "Liger fused")):
        contender = "Liger CE"
    name = name.removesuffix(", softcap")
    size = {r["pass"]: r["bytes"] for r in moved if (r["contender"], r["vocab"]) == (contender, vocab)}
    if contender == "Liger CE" and name == "backward":  # one kernel does both
        return size[BOTH] - size["forward"]
    return size[name]


if __name__ == "__main__":
    main()
