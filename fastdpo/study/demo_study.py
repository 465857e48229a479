"""The study with nothing to prepare: the demo's task, a small policy, and references that know it better and worse.

DIR/demo/start, stronger, weaker, other    models with their tokenizers; `other` has the words in another order
DIR/demo/train.jsonl, held_out.jsonl       pairs; no prompt is in both, nor was any pretrained on
DIR/demo/config.yaml                       a config as any other, which may be changed and run again
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from .. import demo_task
from ..cache import files
from ..demo_model import Settings, build, pretrain
from . import runner
from .errors import StudyError
from .pool import Place, Pool

SETTINGS = Settings(vocabulary=256, hidden=96, layers=3, train_pairs=480, held_out_pairs=200)


class Kind(NamedTuple):
    """How a model of the demo is pretrained."""

    steps: int
    mix: dict[str, float]  # kinds of answers that it reads (demo_task)
    own_tokens: bool = False


MODELS = {
    "start": Kind(800, demo_task.MIX),
    "stronger": Kind(800, {"right": 0.6, "reversed": 0.2, "rambling": 0.2}),
    "weaker": Kind(250, demo_task.MIX),
    "other": Kind(400, demo_task.MIX, own_tokens=True),
}

CONFIG = """\
# The demo's study. A copy can be changed and run: fastdpo study COPY --output ANOTHER_DIR (beside the models, here).
policy: start
data: {train: train.jsonl, held_out: held_out.jsonl}
references:
  start: policy
  stronger: {model: stronger, role: stronger}   # pretrained on more right answers
  weaker: {model: weaker, role: weaker}         # pretrained for less time
  # none: null                                  # no reference: the posterior again
  # other: other                                # another tokenizer
betas: [0.03, 0.3, 1, 3, 30, 300]
parameterizations: [ratio, posterior, likelihood]
loss_types: [sigmoid]
seeds: [0, 1, 2, 3]
training:
  learning_rate: 2e-4
  lr_scheduler_type: constant_with_warmup
  warmup_steps: 4
  num_train_epochs: 2
  per_device_train_batch_size: 16
  max_length: 64
  bf16: false
  gradient_checkpointing: false
sampling: {prompts: 200, max_new_tokens: 32, batch: 200}
scorer: fastdpo.study.demo_study:right
quality: share of right answers
"""


def prepare(folder: Path) -> Path:
    """Make DIR/demo, as far as it is not there; returns its config.yaml.

    Raises:
        StudyError: a model could not be pretrained.
    """
    demo = folder / "demo"
    demo.mkdir(parents=True, exist_ok=True)
    with runner.alone(folder), runner.interruptible():
        _, train, held_out = SETTINGS.split()
        for name, prompts, seed in (("train", train, SETTINGS.seed), ("held_out", held_out, SETTINGS.seed + 1)):
            if not (demo / f"{name}.jsonl").exists():
                lines = [json.dumps(pair._asdict()) + "\n" for pair in demo_task.pairs(prompts, seed)]
                files.write(demo / f"{name}.jsonl", "".join(lines).encode())
        missing = [name for name in MODELS if not (demo / name).exists()]
        cores = os.cpu_count() or 1
        places = [Place(None, 1)] * min(cores, max(1, len(missing)))
        with Pool("fastdpo.study.demo_study:worker", demo, places, folder / "work" / "logs") as pool:
            for outcome in runner.bar(pool.run(missing), len(missing), "pretraining"):
                if outcome.error is not None:
                    raise StudyError(f"demo: {outcome.job} could not be pretrained: {outcome.error}")
        if not (demo / "config.yaml").exists():
            files.write(demo / "config.yaml", CONFIG.encode())
    return demo / "config.yaml"


def worker(demo: Path) -> Callable[[str], None]:
    """What pretrains one of MODELS."""

    def do(name: str) -> None:
        kind = MODELS[name]
        settings = dataclasses.replace(SETTINGS, pretrain_steps=kind.steps)
        tokenizer = demo_task.tokenizer(backwards=kind.own_tokens)
        model = build(settings, tokenizer)
        pretrain(model, tokenizer, settings.split()[0], settings, kind.mix)
        unfinished = demo / f".{name}"
        shutil.rmtree(unfinished, ignore_errors=True)
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        unfinished.rename(demo / name)

    return do


def right(prompts: list[str], answers: list[str], rows: list[dict[str, Any]]) -> list[float]:
    """1 for the sorted numbers and not a word more, else 0: a study's scorer."""
    return [float(demo_task.is_right(prompt, answer)) for prompt, answer in zip(prompts, answers, strict=True)]
