"""DPO training with the exact head and with the compact one (grad_tol="auto"), on a real model and real pairs.

    python -m benchmarks.training_quality --model FOLDER --data PAIRS.jsonl --output DIR [--steps 60] [--max-length 512]

Three runs of FastDPOTrainer, 2 pairs a step, a tenth of the pairs held out: exact, compact, and exact with another seed
(another order of the data), whose distance from the first is the run-to-run noise. One after the other, each in a
process of its own; a finished one is not repeated. DIR/quality.png: loss, held-out reward accuracy and margin.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure

from fastdpo.plots import BLUE, GREY, ORANGE, STYLE, series

RUNS = {  # name: grad_tol, seed, colour
    "exact, other seed": (0.0, 1, GREY),
    "exact": (0.0, 0, ORANGE),
    "compact": ("auto", 0, BLUE),
}
SPLIT_SEED = 0
PANELS = (
    ("loss", "Training loss, mean of 5 steps"),
    ("eval_loss", "Held-out loss"),
    ("eval_rewards/accuracies", "Held-out reward accuracy"),
    ("eval_rewards/margins", "Held-out reward margin"),
)


def train(name: str, options: argparse.Namespace, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig

    from fastdpo.integrations.trl import FastDPOTrainer
    from fastdpo.recorder import RunRecorder
    from fastdpo.train_data import plain_chat_template, read_pairs

    grad_tol, seed, _ = RUNS[name]
    split = read_pairs(options.data).train_test_split(test_size=0.1, seed=SPLIT_SEED)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.chat_template = tokenizer.chat_template or plain_chat_template(tokenizer)
    config = DPOConfig(
        output_dir=str(folder),
        max_steps=options.steps,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        max_length=options.max_length,
        learning_rate=options.learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=5,
        beta=0.1,
        bf16=True,
        use_cpu=not torch.accelerator.is_available(),
        seed=seed,
        logging_steps=5,
        eval_strategy="steps",
        eval_steps=options.eval_steps,
        eval_on_start=True,
        save_strategy="no",
        report_to="none",
    )
    unfinished = folder / "metrics.part.jsonl"
    trainer = FastDPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32),
        args=config,
        train_dataset=split["train"],
        eval_dataset=split["test"],
        processing_class=tokenizer,
        callbacks=[RunRecorder(unfinished)],
    )
    trainer.head_keywords = {"grad_tol": grad_tol}
    trainer.train()
    unfinished.rename(folder / "metrics.jsonl")


def curve(records: list[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Steps and values; no accuracy at step 0, where every margin is rounding alone."""
    steps, values = series(records, key)
    skip = 1 if key == "eval_rewards/accuracies" else 0
    return steps[skip:], values[skip:]


def picture(records: dict[str, list[dict[str, Any]]], path: Path) -> None:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13, 3.6), layout="constrained")
        for axes, (key, title) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
            for name, lines in records.items():
                steps, values = curve(lines, key)
                width, style = (5.0, "-") if name == "exact" else (1.6, "-" if name == "compact" else "--")
                axes.plot(steps, values, style, color=RUNS[name][2], lw=width, label=name)
            axes.set(title=title, xlabel="step")
        axes.legend()
        figure.savefig(path, dpi=120)


def distances(records: dict[str, list[dict[str, Any]]]) -> None:
    """The largest and the mean distance of each curve from the exact run's."""
    print(
        f"{'distance from the exact run':32}{'compact, mean':>15}{'largest':>9}{'other seed, mean':>18}{'largest':>9}"
    )
    for key, title in PANELS:
        values = {name: torch.tensor(curve(lines, key)[1]) for name, lines in records.items()}
        line = f"{title:32}"
        for name, width in (("compact", 15), ("exact, other seed", 18)):
            apart = (values[name] - values["exact"]).abs()
            line += f"{apart.mean():{width}.4f}{apart.max():9.4f}"
        print(line)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--eval-steps", type=int, default=10)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=5e-6)
    parser.add_argument("--run", choices=list(RUNS), help=argparse.SUPPRESS)
    return parser


def main() -> None:
    options = _parser().parse_args()
    folders = {name: options.output / name.replace(", ", "-").replace(" ", "-") for name in RUNS}
    if options.run:
        train(options.run, options, folders[options.run])
        return
    for name, folder in folders.items():
        if not (folder / "metrics.jsonl").exists():
            print(f"{name} ...", flush=True)
            command = [sys.executable, "-m", "benchmarks.training_quality", *sys.argv[1:], "--run", name]
            subprocess.run(command, check=True)
    records = {
        name: [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for name, folder in folders.items()
    }
    distances(records)
    picture(records, options.output / "quality.png")
    print(options.output / "quality.png")


if __name__ == "__main__":
    main()
