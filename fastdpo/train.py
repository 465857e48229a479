"""`fastdpo train`: DPO training through FastDPOTrainer. Takes what `trl dpo` takes, and a data file.

In the output folder: the model and tokenizer (`from_pretrained` loads them), checkpoints, metrics.jsonl (one JSON
object per logged step, written as it goes), curves.png (loss, reward accuracy, margin).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .losses.table import ALIASES, TRL_LOSSES
from .names import did_you_mean
from .train_data import DataError, plain_chat_template, read_pairs


@dataclass
class FastDPOArguments:
    """What `fastdpo train` takes beside the arguments of `trl dpo`."""

    data: str | None = field(
        default=None,
        metadata={
            "help": "Preference pairs, JSON lines with prompt (optional), chosen and rejected, each a string or a list "
            "of messages. With --test_split_size, that share of it is held out."
        },
    )
    eval_data: str | None = field(
        default=None,
        metadata={"help": "Held-out pairs, like --data; evaluated at the end, or as --eval_strategy says."},
    )
    reference_cache: str | None = field(
        default=None,
        metadata={"help": "Folder of `fastdpo cache build`: reference logps from there; no reference model is loaded."},
    )
    reference: str | None = field(
        default=None, metadata={"help": "Name of the reference in --reference_cache; default: the only one."}
    )
    parameterization: str = field(
        default="ratio",
        metadata={
            "help": "The reward (arXiv 2407.13709): ratio, DPO's; posterior, without a reference; likelihood, with the "
            "reference's logps of completions alone, from a --reference_cache built with --prior.",
            "choices": ["ratio", "posterior", "likelihood"],
        },
    )
    shared_prompt: bool = field(
        default=False,
        metadata={"help": "Run each prompt once for both completions; --padding_free alone spares the padding only."},
    )
    trainer: str = field(
        default="fastdpo",
        metadata={"help": "fastdpo, or trl: TRL's own DPOTrainer, for comparison.", "choices": ["fastdpo", "trl"]},
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Train. Returns 0, or 1 with one line on stderr if the arguments or the data are not usable."""
    from .cache import CacheError
    from .integrations.head_product import UnsupportedHead

    try:
        run(*parse(argv))
    except (DataError, CacheError, UnsupportedHead) as error:
        print(f"fastdpo train: {error}", file=sys.stderr)
        return 1
    return 0


def parse(argv: Sequence[str] | None) -> tuple[FastDPOArguments, Any, Any, Any, Any]:
    """argv -> (FastDPOArguments, ScriptArguments, DPOConfig, ModelConfig, DatasetMixtureConfig); TRL's parser.

    Defaults that differ from `trl dpo`: logging_steps=1, for the curves; use_cpu where there is no accelerator.
    """
    from trl import DatasetMixtureConfig, DPOConfig, ModelConfig, ScriptArguments, TrlParser

    types: Any = (FastDPOArguments, ScriptArguments, DPOConfig, ModelConfig, DatasetMixtureConfig)
    parser = TrlParser(types, prog="fastdpo train")
    parser.set_defaults_with_config(logging_steps=1, use_cpu=not torch.accelerator.is_available())
    for action in parser._actions:
        if action.dest == "padding_free":  # TRL's own text says that it does nothing
            action.help = "Compute no padding: a batch is one row. FastDPOTrainer only."
        if action.dest == "bf16":  # bool | None, which TRL's parser wants spelled out; `--bf16` alone works here too
            action.nargs, action.const = "?", True
    try:
        parsed: Any = parser.parse_args_and_config(args=argv)
    except FileNotFoundError as error:
        raise DataError(f"--config {error.filename}: no such file, expected YAML") from None
    except ValueError as error:  # an unknown argument, or a value that DPOConfig refuses
        raise DataError(str(error)) from None
    return parsed


def run(own: FastDPOArguments, script: Any, config: Any, model: Any, mixture: Any) -> dict[str, Any]:
    """Train as the arguments say; returns the summary that is printed at the end.

    Raises:
        DataError: data or model not named, or data that cannot be trained on.
    """
    from transformers import AutoProcessor
    from trl import DPOTrainer, get_peft_config, get_quantization_config

    from .integrations.trl import FastDPOTrainer
    from .integrations.trl_packing import PackingError
    from .plots import training_curves
    from .recorder import RunRecorder

    if model.model_name_or_path is None:
        raise DataError("--model_name_or_path: not given, expected a model folder or a name on the Hugging Face Hub")
    if own.trainer == "trl" and own.reference_cache is not None:
        raise DataError(f"--reference_cache {own.reference_cache}: only FastDPOTrainer reads it, not --trainer trl")
    if own.trainer == "trl" and (own.shared_prompt or config.padding_free):
        option = "shared_prompt" if own.shared_prompt else "padding_free"
        raise DataError(f"--{option}: only FastDPOTrainer knows it, not --trainer trl")
    if own.trainer == "trl" and own.parameterization != "ratio":
        raise DataError(f"--parameterization {own.parameterization}: only FastDPOTrainer knows it, not --trainer trl")
    for name in config.loss_type:
        if name not in TRL_LOSSES:  # TRL finds out at the first step
            raise DataError(
                f"--loss_type {name}: expected one of {', '.join(TRL_LOSSES)}{did_you_mean(name, TRL_LOSSES, ALIASES)}"
            )
    train_data, eval_data = _datasets(own, script, config, mixture)
    # As `trl dpo` builds its model
    config.model_init_kwargs = {
        "revision": model.model_revision,
        "trust_remote_code": config.trust_remote_code,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(config.model_init_kwargs or {}),
    }
    try:
        processor = AutoProcessor.from_pretrained(
            model.model_name_or_path, revision=model.model_revision, trust_remote_code=config.trust_remote_code
        )
    except OSError as error:
        raise DataError(f"--model_name_or_path {model.model_name_or_path}: {error}") from None
    _give_chat_template(processor, train_data)

    output = Path(config.output_dir)
    recorder = RunRecorder(output / "metrics.jsonl", append=bool(config.resume_from_checkpoint))
    trainer_class: Any = DPOTrainer if own.trainer == "trl" else FastDPOTrainer
    further: dict[str, Any] = {}
    if own.trainer == "fastdpo":
        further = {"reference_cache": own.reference_cache, "reference": own.reference}
        further |= {"shared_prompt": own.shared_prompt, "parameterization": own.parameterization}
    try:
        trainer = trainer_class(
            model=model.model_name_or_path,
            args=config,
            train_dataset=train_data,
            eval_dataset=eval_data,
            processing_class=processor,
            callbacks=[recorder],
            quantization_config=get_quantization_config(model),
            peft_config=get_peft_config(model),
            **further,
        )
    except PackingError as error:
        raise DataError(str(error)) from None
    if script.ignore_bias_buffers:
        policy: Any = trainer.model
        policy._ddp_params_and_buffers_to_ignore = [n for n, b in policy.named_buffers() if b.dtype == torch.bool]
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    # With another eval_strategy, the Trainer has evaluated on its own
    if eval_data is not None and config.eval_strategy == "no":
        trainer.evaluate()
    trainer.save_model(config.output_dir)
    if config.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)

    summary = {"trainer": own.trainer, **recorder.summary()}
    if trainer.is_world_process_zero():
        recorder.write({"summary": summary})
        training_curves(recorder.records, output / "curves.png")
        print(
            f"{own.trainer}: {summary['steps']} steps, {summary['seconds_per_step']:.2f} s per step (median), "
            f"peak resident memory {summary['peak_memory_mib']:,.0f} MiB"
            + (f", GPU {summary['peak_gpu_memory_mib']:,.0f} MiB" if "peak_gpu_memory_mib" in summary else "")
            + f"; model, metrics.jsonl and curves.png in {output}"
        )
    trainer.end()
    return summary


def _datasets(own: FastDPOArguments, script: Any, config: Any, mixture: Any) -> tuple[Any, Any]:
    """Training and evaluation data (or None), from --data, or else as `trl dpo` finds them."""
    hub = bool(mixture.datasets or script.dataset_name)
    if bool(own.data) == hub:
        raise DataError(
            "--data: expected --data FILE.jsonl, or else --dataset_name (or `datasets` in the config)"
            + (", got both" if hub else "")
        )
    held_out = read_pairs(own.eval_data) if own.eval_data else None
    if own.data:
        train = read_pairs(own.data)
        if held_out is None and mixture.test_split_size:
            split = train.train_test_split(test_size=mixture.test_split_size, seed=config.seed)
            return split["train"], split["test"]
    else:
        from datasets import load_dataset
        from trl import get_dataset

        splits = (
            get_dataset(mixture)
            if mixture.datasets
            else load_dataset(script.dataset_name, name=script.dataset_config, streaming=script.dataset_streaming)
        )
        train = splits[script.dataset_train_split]
        if held_out is None and config.eval_strategy != "no":
            held_out = splits[script.dataset_test_split]
    if held_out is None and config.eval_strategy != "no":
        raise DataError(f"--eval_strategy {config.eval_strategy.value}: needs --eval_data or --test_split_size")
    return train, held_out


def _give_chat_template(processor: Any, data: Any) -> None:
    """A plain chat template, said in one line, where the data is conversational and the tokenizer has none."""
    from trl.data_utils import is_conversational

    if not is_conversational(next(iter(data))) or processor.chat_template is not None:
        return
    template = plain_chat_template(getattr(processor, "tokenizer", processor))
    processor.chat_template = template
    print(
        "fastdpo train: the tokenizer has no chat template; using a plain one (### role, message), saved with the model"
    )


if __name__ == "__main__":
    sys.exit(main())
