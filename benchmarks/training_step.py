"""A training step from end to end: stock TRL's DPOTrainer and FastDPOTrainer on a real model and real pairs.

    python -m benchmarks.training_step --model FOLDER --data PAIRS.jsonl --output DIR [--steps 4] [--rounds 2]
        [--max-length 512] [--pairs 2] [--contenders NAME ...]

bf16 weights and products, --pairs a step. Each run is `fastdpo train` in a process of its own, on the same rows (the
first of the data) with the same seed; contenders alternate. Seconds of a step: median over a run, then over the
rounds; the first step of a run, which warms up, is left out. Memory: the process's peak. The losses of TRL and fastdpo
differ by bf16's rounding (benchmarks.bf16_agreement); further off than LOSS_APART, an error stands in a line's place.
Results: a table, DIR/training_step.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fastdpo.bench.measure import machine

LORA = ["--use_peft", "--lora_r", "16", "--lora_target_modules", "q_proj", "k_proj", "v_proj", "o_proj"]
CONTENDERS: dict[str, list[str]] = {
    "TRL 1.16": ["--trainer", "trl"],
    "fastdpo": [],
    "fastdpo, shared prompts": ["--shared_prompt"],
    "fastdpo, cached reference": ["--reference_cache", "{cache}"],
    "fastdpo, cached and shared": ["--reference_cache", "{cache}", "--shared_prompt"],
    "TRL 1.16, LoRA": ["--trainer", "trl", *LORA],
    "fastdpo, LoRA": LORA,
}
LOSS_APART = 0.1  # mean over the steps; TRL with another chunk size differs from itself by up to 0.03


def run(name: str, rows: Path, options: argparse.Namespace, number: int) -> dict[str, Any]:
    """One run: its step seconds (without the first), peak MiB and losses."""
    output = options.output / f"{name.replace(' ', '-').replace(',', '')}-{number}"
    extra = [word.format(cache=options.output / "refs") for word in CONTENDERS[name]]
    _fastdpo(
        *("train", "--model_name_or_path", options.model, "--data", str(rows), "--output_dir", str(output)),
        *("--max_steps", str(options.steps), "--per_device_train_batch_size", str(options.pairs)),
        *("--gradient_accumulation_steps", "1", "--max_length", str(options.max_length), "--bf16"),
        *("--dtype", "bfloat16", "--seed", "0", "--save_strategy", "no", "--disable_tqdm", "true", *extra),
    )
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    summary = records[-1]["summary"]
    for file in output.glob("*.safetensors"):
        file.unlink()
    return {
        "seconds": statistics.median(summary["step_seconds"][1:]),
        "mib": summary["peak_memory_mib"],
        "losses": [record["loss"] for record in records if "loss" in record],
    }


def _stock(name: str) -> str:
    """The TRL run that a contender is compared with."""
    return "TRL 1.16, LoRA" if "LoRA" in name else "TRL 1.16"


def _fastdpo(*words: str) -> None:
    done = subprocess.run([sys.executable, "-m", "fastdpo.cli", *words], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"fastdpo {' '.join(words)}:\n{done.stderr}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--contenders", nargs="*", default=list(CONTENDERS), choices=list(CONTENDERS))
    return parser


def main() -> None:
    parser = _parser()
    options = parser.parse_args()
    if options.steps < 2:
        parser.error(f"--steps {options.steps}: expected at least 2, as the first is not counted")
    needed = {_stock(name) for name in options.contenders}
    options.contenders = [name for name in CONTENDERS if name in needed or name in options.contenders]
    options.output.mkdir(parents=True, exist_ok=True)
    rows = options.output / "rows.jsonl"
    rows.write_text("\n".join(options.data.read_text().splitlines()[: options.steps * options.pairs]) + "\n")
    if any("cached" in name for name in options.contenders):
        cached = ("--model", options.model, "--data", str(rows), "--cache", str(options.output / "refs"))
        _fastdpo("cache", "build", *cached, "--max-length", str(options.max_length), "--dtype", "bfloat16")

    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in options.contenders}
    for number, name in tqdm([(n, name) for n in range(options.rounds) for name in options.contenders], unit="run"):
        runs[name].append(run(name, rows, options, number))

    found = {"machine": machine(), "max_length": options.max_length, "pairs": options.pairs, "runs": runs}
    (options.output / "training_step.json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"{machine()}; {options.pairs} pairs a step, max length {options.max_length}, bf16")
    print(f"{'':28}{'seconds':>9}{'x TRL':>8}{'MiB':>8}{'of TRL':>8}  losses")
    for name, results in runs.items():
        first = runs[_stock(name)]
        apart = [abs(a - b) for a, b in zip(results[0]["losses"], first[0]["losses"], strict=True)]
        if statistics.mean(apart) > LOSS_APART:
            raise AssertionError(f"{name}: losses {results[0]['losses']}, TRL's {first[0]['losses']}; not reported")
        seconds, theirs = (statistics.median(r["seconds"] for r in each) for each in (results, first))
        mib, their_mib = (statistics.median(r["mib"] for r in each) for each in (results, first))
        losses = " ".join(f"{loss:.4f}" for loss in results[0]["losses"])
        print(f"{name:28}{seconds:9.2f}{theirs / seconds:8.2f}{mib:8.0f}{mib / their_mib:8.0%}  {losses}")


if __name__ == "__main__":
    main()
