"""`fastdpo demo`: a small model learns preferences, once through TRL's DPOTrainer and once through FastDPOTrainer.

Nothing is downloaded. The folder then holds report.png, report.json, the pairs as `fastdpo train --data` reads them,
the start and both trained models.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import demo_task
from .demo_model import Settings, build, pretrain

MOST_DIFFERENCE = 1e-3  # of the two losses at any step, relative
LEAST_REWARD_ACCURACY = 0.9  # on held-out pairs, after


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 1 if a run failed or its results are not what they must be; the last lines say which."""
    arguments = vars(_parser().parse_args(argv))
    folder: Path = arguments.pop("output")
    settings = Settings(**arguments)
    started = time.perf_counter()
    prepare(folder, settings)
    legs = {}
    for name in ("trl", "fastdpo"):
        leg = run_leg(name, folder)
        if leg is None:
            return 1
        legs[name] = leg
    report = make_report(legs, settings)
    report["total_seconds"] = time.perf_counter() - started
    (folder / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    from .plots import demo_report

    demo_report(report, folder / "report.png")
    print(table(report))
    print(f"\n{folder / 'report.png'}, {folder / 'report.json'}; {report['total_seconds']:.0f} seconds in all")
    for failure in report["failures"]:
        print(f"fastdpo demo: FAILED: {failure}", file=sys.stderr)
    return 1 if report["failures"] else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastdpo demo", description="A small model learns preferences, beside TRL's own DPOTrainer."
    )
    parser.add_argument("--output", default="demo", type=Path, help="folder for the report and the models (demo)")
    for setting in dataclasses.fields(Settings):
        kind = type(setting.default)
        parser.add_argument(f"--{setting.name}", type=kind, default=setting.default, help=f"({setting.default})")
    return parser


def prepare(folder: Path, settings: Settings) -> None:
    """FOLDER/start (the pretrained model), train.jsonl, held_out.jsonl, settings.json."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder.mkdir(parents=True, exist_ok=True)
    pretrain_prompts, train, held_out = settings.split()
    demo_task.save_pairs(folder / "train.jsonl", demo_task.pairs(train, settings.seed))
    demo_task.save_pairs(folder / "held_out.jsonl", demo_task.pairs(held_out, settings.seed + 1))
    (folder / "settings.json").write_text(json.dumps(dataclasses.asdict(settings), indent=1), encoding="utf-8")
    tokenizer = demo_task.tokenizer()
    model = build(settings, tokenizer)
    example = demo_task.pairs(train, settings.seed)[0]
    print(
        f"Task: {example.prompt}\n  chosen:   {example.chosen.strip()}\n  rejected: {example.rejected.strip()}\n"
        f"Model: Llama, {settings.layers} layers, hidden {settings.hidden}, "
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters; vocabulary {settings.vocabulary:,}, of "
        f"which the task uses {len(tokenizer)}\n"
        f"Data: {settings.train_pairs} pairs to train on, {settings.held_out_pairs} held out, no prompt in both"
    )
    pretrain(model, tokenizer, pretrain_prompts, settings)
    model.save_pretrained(folder / "start")
    tokenizer.save_pretrained(folder / "start")


def run_leg(name: str, folder: Path) -> dict[str, Any] | None:
    """One DPO run in a process of its own; None, with a message, if it failed."""
    quiet = {"PYTHONWARNINGS": "ignore", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    result = folder / f"leg_{name}.json"
    result.unlink(missing_ok=True)
    code = subprocess.run(
        [sys.executable, "-m", "fastdpo.demo_leg", name, str(folder)], env={**os.environ, **quiet}
    ).returncode
    if code != 0 or not result.is_file():
        print(f"fastdpo demo: FAILED: the {name} run ended with exit code {code}", file=sys.stderr)
        return None
    return json.loads(result.read_text(encoding="utf-8"))


def make_report(legs: dict[str, dict[str, Any]], settings: Settings) -> dict[str, Any]:
    """Both legs, the difference of their losses, and what is not as it must be."""
    trl, fast = legs["trl"], legs["fastdpo"]
    failures = []
    if len(trl["losses"]) != len(fast["losses"]) or not trl["losses"]:
        failures.append(f"the runs made {len(trl['losses'])} and {len(fast['losses'])} steps")
    differences = [abs(a - b) / abs(a) for a, b in zip(trl["losses"], fast["losses"], strict=False)]
    # `not <=`: a NaN must fail as well
    for step, difference in enumerate(differences, start=1):
        if not difference <= MOST_DIFFERENCE:
            failures.append(f"step {step}: the losses differ by {difference:.1e}, expected at most {MOST_DIFFERENCE:g}")
            break
    for leg in (trl, fast):
        if not leg["reward_accuracy_after"] > LEAST_REWARD_ACCURACY:
            failures.append(
                f"{leg['name']}: held-out reward accuracy {leg['reward_accuracy_after']:.3f}, "
                f"expected above {LEAST_REWARD_ACCURACY}"
            )
        if not leg["greedy_after"] > leg["greedy_before"]:
            before, after = leg["greedy_before"], leg["greedy_after"]
            failures.append(f"{leg['name']}: greedy answers right {before:.3f} before, {after:.3f} after")
    return {
        "settings": dataclasses.asdict(settings),
        "differences": differences,
        "largest_difference": max(differences, default=float("nan")),
        "failures": failures,
        **legs,
    }


def table(report: dict[str, Any]) -> str:
    """The report as text of at most 100 columns."""
    trl, fast = report["trl"], report["fastdpo"]
    head = f"{'step':>4} {'TRL':>10} {'fastdpo':>10} {'difference':>11}"
    rows = [
        f"{step:>4} {a:>10.6f} {b:>10.6f} {difference:>11.1e}"
        for step, (a, b, difference) in enumerate(
            zip(trl["losses"], fast["losses"], report["differences"], strict=False), start=1
        )
    ]
    half = (len(rows) + 1) // 2  # two halves side by side
    left, right = [head, *rows[:half]], [head, *rows[half:]]
    right += [""] * (len(left) - len(right))
    lines = ["", "Loss per step, and relative difference"]
    lines += [f"{a:<38}   |   {b}".rstrip() for a, b in zip(left, right, strict=True)]
    lines += [f"largest relative difference: {report['largest_difference']:.1e} (at most {MOST_DIFFERENCE:g})", ""]

    lines.append(f"{'held-out pairs and prompts':<44} {'TRL':>12} {'fastdpo':>12}")
    measures = (
        ("reward accuracy, before *", "reward_accuracy_before", ".3f"),
        ("reward accuracy, after", "reward_accuracy_after", ".3f"),
        ("greedy answers that are right, before", "greedy_before", ".3f"),
        ("greedy answers that are right, after", "greedy_after", ".3f"),
        ("seconds of training", "seconds", ".1f"),
        ("seconds per step, median", "seconds_per_step", ".3f"),
        ("peak resident memory, MiB", "peak_memory_mib", ",.0f"),
        ("  of it above what was there before, MiB", "above", ",.0f"),
    )
    for leg in (trl, fast):
        leg["above"] = leg["peak_memory_mib"] - leg["resident_mib"]
    lines += [f"{title:<44} {trl[key]:>12{form}} {fast[key]:>12{form}}" for title, key, form in measures]
    lines.append("* 0 by definition: policy and reference are still the same, so no reward is above another")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
