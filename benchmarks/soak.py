"""A long run: does memory stay flat, and does FastDPOTrainer stay with stock TRL?

    python -m benchmarks.soak --output DIR [--steps 2000]

The demo's model and task, float32, the same seed through TRL's DPOTrainer and through FastDPOTrainer, each in a process
of its own. Resident memory of the steps' ends: its slope over the second half of the run, MiB per 1,000 steps. Drift:
rounding differs, and training amplifies it, so a third run is the truth, TRL in float64, and a fourth the yardstick,
TRL with `log_softmax` where it has a gather less `logsumexp`. How far the weights of each are from the truth, relative
to how far they have moved; and the losses.
DIR/soak.json, DIR/soak.png. Exit code 1: memory grows, or fastdpo is further from the truth than twice the further of
TRL's two formulas.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure

from fastdpo.bench.measure import machine
from fastdpo.plots import BLUE, GREEN, GREY, ORANGE, STYLE

TRUTH, OTHER = "TRL, float64", "TRL, log_softmax"
RUNS = {TRUTH: GREY, "TRL": ORANGE, OTHER: GREEN, "fastdpo": BLUE}
MOST_GROWTH = 2.0  # MiB per 1,000 steps; the allocator's own noise is about 1
MOST_DRIFT = 2.0  # times the further of TRL's two formulas


def leg(name: str, folder: Path, steps: int) -> None:
    """In this process: train, write FOLDER/NAME.json and the weights."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer
    from trl.trainer import utils

    from fastdpo.integrations.trl import FastDPOTrainer
    from fastdpo.memory import resident_memory_mib
    from fastdpo.train_data import read_pairs

    class Memory(TrainerCallback):
        def __init__(self) -> None:
            self.mib: list[float] = []

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.mib.append(resident_memory_mib())

    if name == OTHER:
        utils._ChunkedLogProbFunction = LogSoftmax  # in this process, which is the run's own
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
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        seed=0,
    )
    trainer = (FastDPOTrainer if name == "fastdpo" else DPOTrainer)(
        model=AutoModelForCausalLM.from_pretrained(
            folder / "start", dtype=torch.float64 if name == TRUTH else torch.float32
        ),
        args=config,
        train_dataset=read_pairs(folder / "train.jsonl"),
        processing_class=AutoTokenizer.from_pretrained(folder / "start"),
        callbacks=[memory],
    )
    trainer.train()
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    (folder / f"{name}.json").write_text(json.dumps({"losses": losses, "mib": memory.mib}))
    torch.save({k: v.detach() for k, v in trainer.model.named_parameters()}, folder / f"{name}.pt")


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


def drift(folder: Path, one: str, other: str) -> float:
    """Distance of two runs' weights, by the distance of the first from the start."""
    from safetensors.torch import load_file

    start = load_file(folder / "start" / "model.safetensors")
    a, b = (torch.load(folder / f"{name}.pt", weights_only=True) for name in (one, other))
    apart = sum(((a[k] - b[k]).double() ** 2).sum() for k in a)
    moved = sum(((a[k] - start[k]).double() ** 2).sum() for k in a if k in start)
    return float((apart / moved).sqrt())


def growth(mib: list[float]) -> float:
    """MiB per 1,000 steps, of a line through the second half."""
    half = len(mib) // 2
    return float(np.polyfit(np.arange(half, len(mib)), mib[half:], 1)[0] * 1000)


def picture(runs: dict[str, dict[str, Any]], losses_off: dict[str, np.ndarray], path: Path) -> None:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 3.8), layout="constrained")
        memory, apart = figure.subplots(1, 2)
        for name, run in runs.items():
            memory.plot(range(1, len(run["mib"]) + 1), run["mib"], color=RUNS[name], label=name, lw=1)
        memory.set(title="Resident memory, MiB", xlabel="step", ylim=(0, None))
        for name, off in losses_off.items():
            apart.semilogy(range(1, len(off) + 1), off + 1e-9, color=RUNS[name], lw=0.8, label=name)
        apart.set(title="Loss, distance from float64's", xlabel="step")
        for axes in (memory, apart):
            axes.legend()
        figure.savefig(path, dpi=120)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--leg", choices=list(RUNS), help=argparse.SUPPRESS)
    return parser


def main() -> int:
    options = _parser().parse_args()
    folder = options.output
    if options.leg:
        leg(options.leg, folder, options.steps)
        return 0
    from tqdm import tqdm

    from fastdpo import demo
    from fastdpo.demo_model import Settings

    demo.prepare(folder, Settings(vocabulary=4096))
    quiet = {"PYTHONWARNINGS": "ignore", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
    for name in tqdm(RUNS, unit="run"):
        command = [sys.executable, "-m", "benchmarks.soak", "--output", str(folder), "--leg", name]
        command += ["--steps", str(options.steps)]
        subprocess.run(command, env={**os.environ, **quiet}, check=True, stdout=subprocess.DEVNULL)
    runs = {name: json.loads((folder / f"{name}.json").read_text()) for name in RUNS}
    found: dict[str, Any] = {"machine": machine(), "steps": options.steps}
    found["growth"] = {name: growth(run["mib"]) for name, run in runs.items()}
    losses_off = {
        name: np.abs(np.subtract(run["losses"], runs[TRUTH]["losses"])) for name, run in runs.items() if name != TRUTH
    }
    found["drift"] = {name: drift(folder, TRUTH, name) for name in losses_off}
    found["loss_apart"] = {name: float(off.mean()) for name, off in losses_off.items()}
    (folder / "soak.json").write_text(json.dumps(found, indent=1) + "\n")
    picture(runs, losses_off, folder / "soak.png")
    print(f"{machine()}; {options.steps} steps")
    print(f"{'':20}{'MiB per 1,000 steps':>20}{'weights off':>18}{'mean loss off':>20}")
    for name in RUNS:
        apart = f"{found['drift'][name]:18.1e}{found['loss_apart'][name]:20.1e}" if name in found["drift"] else ""
        print(f"{name:20}{found['growth'][name]:20.2f}{apart}")
    print(folder / "soak.png")
    flat = found["growth"]["fastdpo"] <= MOST_GROWTH
    together = found["drift"]["fastdpo"] <= MOST_DRIFT * max(found["drift"]["TRL"], found["drift"][OTHER])
    return 0 if flat and together else 1


if __name__ == "__main__":
    sys.exit(main())
