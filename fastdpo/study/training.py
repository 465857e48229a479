"""One cell's training: FastDPOTrainer with what the study says of all cells and the cell of itself."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch

from ..names import did_you_mean
from .cells import Cell
from .config import StudyConfig
from .errors import StudyError

CURVES = ("loss", "rewards/accuracies", "rewards/margins")
# What a study itself decides in every run
OWN = ("beta", "loss_type", "loss_weights", "seed", "data_seed", "output_dir", "precompute_ref_log_probs")


def arguments(config: StudyConfig, work: Path, cell: Cell | None = None) -> Any:
    """TRL's DPOConfig of a cell; of none: what all cells have in common.

    Args:
        work: folder for what a trainer writes.

    Raises:
        StudyError: keywords that TRL does not have, or values that it does not take.
    """
    from trl import DPOConfig

    known = [one.name for one in dataclasses.fields(DPOConfig)]
    for name in config.training:
        if name in OWN:
            raise StudyError(f"training.{name}: the study sets it in each run, expected it not to be given")
        if name not in known:
            raise StudyError(f"training.{name}: not a setting of TRL's DPOConfig{did_you_mean(name, known)}")
    given = {
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": not torch.accelerator.is_available(),
        "trust_remote_code": config.trust_remote_code,
        **config.training,
    }
    given["model_init_kwargs"] = {"dtype": config.dtype, **(given.get("model_init_kwargs") or {})}
    if cell is not None:
        given |= {"loss_type": [cell.loss_type], "beta": cell.beta, "seed": cell.seed}
    try:
        return DPOConfig(output_dir=str(work / ("all" if cell is None else cell.id)), **given)
    except (TypeError, ValueError) as error:
        raise StudyError(f"training: {error}") from None


def trained(trainer_class: Any, args: Any, config: StudyConfig, tokenizer: Any, pairs: Any, **keywords: Any) -> Any:
    """(the trainer after its last step, what was logged of each: step and CURVES, None where not finite).

    Args:
        trainer_class: FastDPOTrainer, or TRL's for comparison.
        keywords: of it.
    """
    from transformers import PrinterCallback

    from ..recorder import RunRecorder

    recorder = RunRecorder(None)
    trainer = trainer_class(
        model=config.policy,
        args=args,
        train_dataset=pairs,
        processing_class=tokenizer,
        peft_config=_peft_config(config),
        callbacks=[recorder],
        **keywords,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    logged = [one for one in recorder.records if "loss" in one]
    return trainer, [{"step": one["step"], **{name: finite(one.get(name)) for name in CURVES}} for one in logged]


def _peft_config(config: StudyConfig) -> Any:
    """The adapter's, or None."""
    if config.peft is None:
        return None
    from peft import LoraConfig

    try:
        return LoraConfig(**{"task_type": "CAUSAL_LM", **config.peft})
    except (TypeError, ValueError) as error:
        raise StudyError(f"peft: {error}") from None


def finite(value: Any) -> float | None:
    """A number as JSON can hold it; None for none, and for what is not finite."""
    return float(value) if value is not None and math.isfinite(value) else None
