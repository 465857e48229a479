"""One of the demo's two DPO runs, in a process of its own so that its peak memory is its own.

python -m fastdpo.demo_leg trl|fastdpo FOLDER    reads FOLDER/start and settings, writes FOLDER/leg_<name>.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from .demo_model import Settings, greedy_accuracy
from .memory import peak_memory_mib, resident_memory_mib
from .recorder import RunRecorder
from .train_data import read_pairs

NAMES = {"trl": "TRL's DPOTrainer", "fastdpo": "FastDPOTrainer"}


class _Bar(TrainerCallback):
    """One bar for the training steps, without the Trainer's log lines."""

    def __init__(self, title: str) -> None:
        self.title = title

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        from tqdm import tqdm

        self.bar = tqdm(total=state.max_steps, desc=self.title, ncols=80)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()


def run(name: str, folder: Path) -> dict[str, Any]:
    """Train from FOLDER/start with one of the trainers and measure; returns what is written as JSON."""
    from transformers import PrinterCallback
    from trl import DPOConfig, DPOTrainer

    from .integrations.trl import FastDPOTrainer

    settings = Settings(**json.loads((folder / "settings.json").read_text(encoding="utf-8")))
    start = str(folder / "start")
    tokenizer = AutoTokenizer.from_pretrained(start)
    recorder = RunRecorder(None)
    config = DPOConfig(
        output_dir=str(folder / f"trainer_{name}"),
        seed=settings.seed,
        num_train_epochs=1,
        per_device_train_batch_size=settings.batch_pairs,
        per_device_eval_batch_size=settings.batch_pairs // 2,  # the peak is to be training's
        learning_rate=settings.learning_rate,
        beta=settings.beta,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=4,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        bf16=False,  # float32, so that rounding does not hide a difference
        gradient_checkpointing=False,
        use_cpu=True,
    )
    trainer = (DPOTrainer if name == "trl" else FastDPOTrainer)(
        model=AutoModelForCausalLM.from_pretrained(start),
        args=config,
        train_dataset=read_pairs(folder / "train.jsonl"),
        eval_dataset=read_pairs(folder / "held_out.jsonl"),
        processing_class=tokenizer,
        callbacks=[recorder, _Bar(NAMES[name])],
    )
    trainer.remove_callback(PrinterCallback)
    model: Any = trainer.model
    held_out = settings.split()[2]
    result: dict[str, Any] = {"name": name}
    result["greedy_before"] = greedy_accuracy(model, tokenizer, held_out)
    result["reward_accuracy_before"] = trainer.evaluate()["eval_rewards/accuracies"]
    result["resident_mib"] = resident_memory_mib()
    trainer.train()
    result["peak_memory_mib"] = peak_memory_mib()
    result["reward_accuracy_after"] = trainer.evaluate()["eval_rewards/accuracies"]
    result["greedy_after"] = greedy_accuracy(model, tokenizer, held_out)
    result["losses"] = [record["loss"] for record in recorder.records if "loss" in record]
    result["seconds"] = sum(recorder.step_seconds)
    result["seconds_per_step"] = recorder.summary()["seconds_per_step"]
    model.save_pretrained(folder / f"model_{name}")
    tokenizer.save_pretrained(folder / f"model_{name}")
    return result


def main() -> int:
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    name, folder = sys.argv[1], Path(sys.argv[2])
    (folder / f"leg_{name}.json").write_text(json.dumps(run(name, folder), indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
