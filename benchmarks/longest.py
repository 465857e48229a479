"""The longest pair of sequences that each contender trains within a memory budget.

    python -m benchmarks.longest --output DIR [--model FOLDER --data PAIRS.jsonl | --hidden H --vocab V]
        [--memory-mib 1024 2048] [--limit 20] [--contenders NAME ...]

bf16, gradients of hidden and weight. Measured on a CPU: each try is a process of its own whose data (RLIMIT_DATA) is
limited to what its libraries and weight take, which differs from contender to contender and is measured first, and the
budget: hidden states, gradients and all that the head needs. The number of tokens is bisected to a tenth. A try that
takes more than --limit seconds ends the search: "at least". Hidden states: of the model on the data, repeated where
there are more tokens than that; without a model random ones, as peaked as a trained model's. For GPUs computed, not
run: from fastdpo/bench/memory_model.py, of which the CPU part is compared with what was measured. All of it is the head
alone; a model's own activations come on top. DIR/longest.json, DIR/longest.png; points already in the JSON are not
measured again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastdpo.bench import memory_model
from fastdpo.bench.inputs import halves, random_batch, real_batch, slopes
from fastdpo.bench.isolated import Contender, Failed, Outcome, run_alone
from fastdpo.bench.measure import machine
from fastdpo.bench.providers import PROVIDERS, Batch

from .longest_figure import draw

DEFAULT = tuple(name for name in PROVIDERS if name != "fastdpo exact, kept")
GPU_GIB = (8, 24, 80)
APART = 1.1  # the bisection ends when what fits and what does not are so close
TRIES = 12
STATES = 4096  # of the model; repeated beyond
MOST = 1 << 17  # tokens


def search(attempt: Callable[[int], Outcome], guess: int, most: int = MOST) -> dict[str, Any]:
    """{"tokens": the most that worked, "stopped": None (memory), "time", "most" or an error}, from few attempts."""
    worked, failed, stopped, step = 0, None, None, 1.15
    tokens = max(2, min(guess, most))
    for _ in range(TRIES):
        outcome = attempt(tokens)
        if outcome.failed is None:
            worked = tokens
        else:
            failed = tokens
            if outcome.failed != "memory":
                stopped = "time" if outcome.failed.startswith("more than") else outcome.failed
            else:
                stopped = None
        if worked == most:
            stopped = "most"
            break
        if failed is not None and (failed <= 2 or failed <= worked * APART or stopped not in (None, "time")):
            break
        if failed is None:
            tokens, step = min(most, max(worked + 2, int(worked * step))), min(4.0, step**2)
        else:
            tokens = max(2, int((worked * failed) ** 0.5)) if worked else max(2, failed // 2)
    return {"tokens": worked, "stopped": stopped}


def batch_of(options: argparse.Namespace) -> Batch:
    if options.model is not None:
        return real_batch(options.model, options.data, 0, 1024, STATES, exact=False)
    return random_batch("peaked", STATES, options.vocab, options.hidden, torch.bfloat16)


def of_length(batch: Batch, tokens: int) -> Batch:
    """One pair of so many tokens, of the batch's as often as it takes."""
    rows = torch.arange(tokens) % len(batch.labels)
    return Batch(batch.hidden[rows], batch.weight, batch.labels[rows], halves(tokens), slopes(tokens))


def measure(options: argparse.Namespace, path: Path) -> dict[str, Any]:
    from tqdm import tqdm

    points: list[dict[str, Any]] = json.loads(path.read_text())["points"] if path.exists() else []
    known = {(point["contender"], point["memory_mib"]) for point in points}
    todo = [(name, mib) for name in options.contenders for mib in options.memory_mib if (name, mib) not in known]
    batch = batch_of(options)
    vocab, width = batch.weight.shape
    found = {
        "machine": machine(),
        "inputs": "random, peaked" if options.model is None else "of a real model on real pairs",
        "vocab": vocab,
        "hidden": width,
        "limit": options.limit,
        "points": points,
        "gpu": computed(options.contenders, vocab, width),
    }
    held: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder, tqdm(total=len(todo), unit="search") as bar:
        inputs = Path(folder) / "inputs.pt"

        def attempt(name: str, mib: int, tokens: int) -> Outcome:
            bar.set_description(f"{name}, {mib:,} MiB, {tokens:,} tokens")
            torch.save(tuple(of_length(batch, tokens)), inputs)
            return run_alone(name, inputs, limit=options.limit, memory_mib=int(held[name]) + mib)

        for name, mib in todo:
            if name not in held:
                torch.save(tuple(of_length(batch, 2)), inputs)
                held[name] = held_alone(name, inputs)
            formula = memory_model.CPU.get(name, memory_model.CPU["eager"])
            guess = memory_model.longest_pair(formula, mib * memory_model.MIB, vocab, width) // 2 * 2
            point = {"contender": name, "memory_mib": mib, "limit_mib": int(held[name]) + mib}
            point |= {"model": guess} if name in memory_model.CPU else {}
            points.append(point | search(lambda tokens, n=name, m=mib: attempt(n, m, tokens), guess))  # type: ignore[misc]
            path.write_text(json.dumps(found, indent=1) + "\n")
            bar.update()
    return found


def held_alone(name: str, inputs: Path) -> float:
    """MiB that a contender holds before it runs: libraries and weight. 0 where it cannot run at all."""
    try:
        with Contender(name, inputs) as contender:
            return contender.ready()
    except Failed:
        return 0.0


def computed(names: list[str], vocab: int, width: int) -> list[dict[str, Any]]:
    """For GPUs, whose whole memory but the weight is the head's: what the memory model says."""
    weight = 2 * vocab * width
    return [
        {
            "contender": name,
            "gib": gib,
            "tokens": memory_model.longest_pair(formula, gib * 2**30 - weight, vocab, width),
        }
        for name, formula in memory_model.GPU.items()
        if name in names
        for gib in GPU_GIB
    ]


def off(points: list[dict[str, Any]]) -> list[tuple[str, float]]:
    """(contender and budget, model over measured) where memory was what ended the search."""
    return [
        (f"{p['contender']} at {p['memory_mib']:,} MiB", p["model"] / p["tokens"])
        for p in points
        if "model" in p and p["tokens"] and p["stopped"] is None
    ]


def text(found: dict[str, Any]) -> str:
    budgets = sorted({point["memory_mib"] for point in found["points"]})
    lines = ["| tokens of a pair | " + " | ".join(f"{mib:,} MiB" for mib in budgets) + " |"]
    lines += ["|---|" + "---|" * len(budgets)]
    for name in dict.fromkeys(point["contender"] for point in found["points"]):
        mine = {p["memory_mib"]: p for p in found["points"] if p["contender"] == name}
        lines.append(f"| {name} | " + " | ".join(_cell(mine.get(mib)) for mib in budgets) + " |")
    held = {p["contender"]: p["limit_mib"] - p["memory_mib"] for p in found["points"]}
    lines.append("on top, for libraries and weight: " + ", ".join(f"{name} {mib:,} MiB" for name, mib in held.items()))
    for what, ratio in off(found["points"]):
        lines.append(f"memory model, {what}: {ratio:.2f} of what was measured")
    return "\n".join(lines)


def _cell(point: dict[str, Any] | None) -> str:
    if point is None:
        return ""
    count = f"{point['tokens']:,}"
    if point["stopped"] in ("time", "most"):
        why = "stopped by time" if point["stopped"] == "time" else "no more were tried"
        return f"at least {count}, {why}"
    return (count if point["tokens"] else "none") if point["stopped"] is None else point["stopped"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--hidden", type=int, default=640)
    parser.add_argument("--vocab", type=int, default=262144)
    parser.add_argument("--memory-mib", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--limit", type=float, default=20)
    parser.add_argument("--contenders", nargs="*", default=list(DEFAULT), choices=list(PROVIDERS))
    parser.add_argument("--output", type=Path, required=True)
    return parser


def main() -> None:
    parser = _parser()
    options = parser.parse_args()
    if (options.model is None) != (options.data is None):
        parser.error("--model and --data: expected both or none")
    options.output.mkdir(parents=True, exist_ok=True)
    found = measure(options, options.output / "longest.json")
    print(found["machine"])
    print(text(found))
    draw(found, options.output / "longest.png")
    print(options.output / "longest.png")


if __name__ == "__main__":
    main()
