"""A long run: does memory stay flat, and does FastDPOTrainer stay with stock TRL?

    python -m benchmarks.soak --output DIR [--steps 2000]

The demo's model and task, the same seed through TRL's DPOTrainer and through FastDPOTrainer, in float32 and in bf16
(TRL's default: autocast), where fastdpo's tiles are compacted; each run in a process of its own.

Memory: resident after each step; MiB per 1,000 steps, by the median growth of ten stretches of the second half: a leak
grows in each, an allocator jumps in one. Drift: rounding differs, and training amplifies it, so one more run is the
truth, TRL in float64, and another of each precision the yardstick, TRL with `log_softmax` where it has a gather less
`logsumexp`. How far the weights of each are from the truth, relative to how far they have moved; and the losses. Rows
of words that never occur count apart: Adam moves a weight by about the learning rate however small its gradient is,
and a compacted tile leaves theirs at zero (docs/algorithm.md).

DIR/soak.json, DIR/soak.png. Exit code 1, with the reason: memory grows, fastdpo is further from the truth than twice
the further of TRL's two formulas (in float32 in those rows too), or no tile was compacted in bf16.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure

from fastdpo.bench.measure import machine
from fastdpo.plots import BLUE, GREEN, ORANGE, STYLE

OTHER = "TRL, log_softmax"
RUNS = {"TRL": ORANGE, OTHER: GREEN, "fastdpo": BLUE}
PRECISIONS = ("float32", "bfloat16")
TRUTH = ("TRL", "float64")
LEGS = [TRUTH, *((name, precision) for precision in PRECISIONS for name in RUNS)]
MOST_GROWTH = 2.0  # MiB per 1,000 steps; the allocator's own noise is about 1
MOST_DRIFT = 2.0  # times the further of TRL's two formulas


def leg(name: str, precision: str, folder: Path, steps: int) -> None:
    """In this process, which is the run's own: train, write FOLDER/NAME-PRECISION.json and the weights."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer
    from trl.trainer import utils

    from fastdpo import tiles
    from fastdpo.integrations.trl import FastDPOTrainer
    from fastdpo.memory import resident_memory_mib
    from fastdpo.train_data import read_pairs

    class Memory(TrainerCallback):
        def __init__(self) -> None:
            self.mib: list[float] = []

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.mib.append(resident_memory_mib())

    kinds: Counter[str] = Counter()
    forward = tiles.forward

    def counted(*arguments: Any) -> Any:
        results, saved = forward(*arguments)
        kinds.update("exact" if kept is None else type(kept).__name__ for *_, kept in (saved.tiles if saved else ()))
        return results, saved

    tiles.forward = counted
    if name == OTHER:
        utils._ChunkedLogProbFunction = LogSoftmax
    memory = Memory()
    config = DPOConfig(
        output_dir=str(folder / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        bf16=precision == "bfloat16",
        gradient_checkpointing=False,
        use_cpu=True,
        seed=0,
    )
    dtype = torch.float64 if precision == "float64" else torch.float32
    trainer = (FastDPOTrainer if name == "fastdpo" else DPOTrainer)(
        model=AutoModelForCausalLM.from_pretrained(folder / "start", dtype=dtype),
        args=config,
        train_dataset=read_pairs(folder / "train.jsonl"),
        processing_class=AutoTokenizer.from_pretrained(folder / "start"),
        callbacks=[memory],
    )
    trainer.train()
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    result = {"losses": losses, "mib": memory.mib, "tiles": kinds}
    (folder / f"{name}-{precision}.json").write_text(json.dumps(result))
    torch.save({k: v.detach() for k, v in trainer.model.named_parameters()}, folder / f"{name}-{precision}.pt")


class LogSoftmax:
    """In place of TRL's `ChunkedLogProbFunction`, with its arguments and results."""

    @staticmethod
    def apply(
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None,
        logit_scale: float,
        outputs: tuple[str, ...],
    ) -> tuple[torch.Tensor, ...]:
        if softcap is not None or logit_scale != 1:
            raise NotImplementedError(f"softcap {softcap}, logit_scale {logit_scale}: expected a head without them")
        logits = torch.nn.functional.linear(hidden, weight, bias) / temperature
        logps = logits.log_softmax(-1)
        of_targets = logps.gather(-1, targets.clamp(min=0)[:, None]).squeeze(-1) * (targets >= 0)
        with torch.no_grad():
            entropy, squares = -(logps.exp() * logps).sum(-1), (2 * logps).logsumexp(-1)
            return of_targets, entropy, squares, logits.mean(-1), logits.argmax(-1) == targets


def drift(folder: Path, truth: tuple[str, str], other: tuple[str, str], words: int) -> tuple[float, float]:
    """Distance of two runs' weights, by the distance of the first from the start.

    words: how many ids occur.

    Returns:
        of all weights but the rows of words that never occur; of those rows.
    """
    from safetensors.torch import load_file

    start = load_file(folder / "start" / "model.safetensors")
    a, b = (torch.load(folder / f"{'-'.join(run)}.pt", weights_only=True) for run in (truth, other))
    apart, moved = np.zeros(2), np.zeros(2)
    for name in a:
        cut = words if name.endswith(("embed_tokens.weight", "lm_head.weight")) else len(a[name])
        for total, x, y in ((apart, a, b), (moved, a, start)):
            squares = (x[name].double() - y[name].double()) ** 2
            total += [float(squares[:cut].sum()), float(squares[cut:].sum())]
    occurring, absent = np.sqrt(apart / moved)
    return float(occurring), float(absent)


def growth(mib: list[float]) -> float:
    """MiB per 1,000 steps: the median growth over ten stretches of the second half, each at its median."""
    half = len(mib) // 2
    stretches = np.array_split(mib[half:], min(11, len(mib) - half))
    steps = (len(mib) - half) / len(stretches)
    return float(np.median(np.diff([np.median(one) for one in stretches])) / steps * 1000)


def problems(found: dict[str, Any]) -> list[str]:
    """What the soak should not have found, a line each. found: soak.json."""
    lines = []
    for precision in PRECISIONS:
        runs = found[precision]
        mine = runs["fastdpo"]
        if not mine["growth"] <= MOST_GROWTH:
            lines.append(
                f"{precision}: memory grows by {mine['growth']:.1f} MiB per 1,000 steps, at most {MOST_GROWTH}"
            )
        for measure in ("drift", "loss_apart", *(("drift_of_absent_words",) if precision == "float32" else ())):
            farthest = max(runs[name][measure] for name in runs if name != "fastdpo")
            if not mine[measure] <= MOST_DRIFT * farthest:
                lines.append(f"{precision}: {measure} of fastdpo {mine[measure]:.1e}, of TRL at most {farthest:.1e}")
    if not found["bfloat16"]["fastdpo"]["compacted"]:
        lines.append("bfloat16: no tile was compacted, so the soak says nothing of that path")
    return lines


def summary(folder: Path, runs: dict[tuple[str, str], dict[str, Any]]) -> dict[str, Any]:
    """soak.json: of each run growth, both drifts, mean distance of the losses, share of compacted tiles."""
    from transformers import AutoTokenizer

    words = len(AutoTokenizer.from_pretrained(folder / "start"))
    found: dict[str, Any] = {"machine": machine(), "steps": len(runs[TRUTH]["mib"])}
    for precision in PRECISIONS:
        found[precision] = {}
        for name in RUNS:
            run = runs[name, precision]
            tiles = run["tiles"]
            occurring, absent = drift(folder, TRUTH, (name, precision), words)
            found[precision][name] = {
                "growth": growth(run["mib"]),
                "drift": occurring,
                "drift_of_absent_words": absent,
                "loss_apart": float(losses_off(runs, name, precision).mean()),
                "compacted": (tiles.get("Sparse", 0) + tiles.get("Compact", 0)) / max(1, sum(tiles.values())),
            }
    return found


def losses_off(runs: dict[tuple[str, str], dict[str, Any]], name: str, precision: str) -> np.ndarray:
    return np.abs(np.subtract(runs[name, precision]["losses"], runs[TRUTH]["losses"]))


def picture(runs: dict[tuple[str, str], dict[str, Any]], path: Path) -> None:
    window = min(25, len(runs[TRUTH]["losses"]))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 7), layout="constrained")
        for (memory, apart), precision in zip(figure.subplots(2, 2, sharex=True), PRECISIONS, strict=True):
            for name, color in RUNS.items():
                mib, off = runs[name, precision]["mib"], losses_off(runs, name, precision)
                memory.plot(range(1, len(mib) + 1), mib, color=color, label=name, lw=1)
                off = np.convolve(off, np.full(window, 1 / window), "valid")
                apart.semilogy(np.arange(len(off)) + window // 2, off + 1e-9, color=color, label=name, lw=1.2)
            memory.set(title=f"{precision}: resident memory, MiB", ylim=(0, None))
            apart.set(title=f"{precision}: loss, distance from float64's, mean of {window} steps")
            memory.legend(loc="lower right")
            apart.legend(loc="upper left")
        for axes in (memory, apart):
            axes.set_xlabel("step")
        figure.savefig(path, dpi=120)


def table(found: dict[str, Any]) -> str:
    columns = ("MiB per 1,000 steps", "weights off", "absent words", "mean loss off", "tiles compacted")
    lines = [f"{'':28}{columns[0]:>20}" + "".join(f"{column:>16}" for column in columns[1:])]
    for precision in PRECISIONS:
        for name, run in found[precision].items():
            numbers = "".join(f"{run[key]:16.1e}" for key in ("drift", "drift_of_absent_words", "loss_apart"))
            compacted = f"{run['compacted']:16.0%}" if name == "fastdpo" else ""
            lines.append(f"{f'{precision}: {name}':28}{run['growth']:20.2f}{numbers}{compacted}")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--leg", nargs=2, metavar=("RUN", "PRECISION"), help=argparse.SUPPRESS)
    return parser


def main() -> int:
    options = _parser().parse_args()
    folder = options.output
    if options.leg:
        leg(*options.leg, folder, options.steps)
        return 0
    from tqdm import tqdm

    from fastdpo import demo
    from fastdpo.demo_model import Settings

    demo.prepare(folder, Settings(vocabulary=4096, pretrain_steps=1000))  # so long, so that its softmax is sparse
    quiet = {"PYTHONWARNINGS": "ignore", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
    for name, precision in tqdm(LEGS, unit="run"):
        command = [sys.executable, "-m", "benchmarks.soak", "--output", str(folder), "--leg", name, precision]
        command += ["--steps", str(options.steps)]
        subprocess.run(command, env={**os.environ, **quiet}, check=True, stdout=subprocess.DEVNULL)
    runs = {run: json.loads((folder / f"{'-'.join(run)}.json").read_text()) for run in LEGS}
    found = summary(folder, runs)
    (folder / "soak.json").write_text(json.dumps(found, indent=1) + "\n")
    picture(runs, folder / "soak.png")
    print(f"{machine()}; {found['steps']} steps", table(found), folder / "soak.png", *problems(found), sep="\n")
    return 1 if problems(found) else 0


if __name__ == "__main__":
    sys.exit(main())
