"""python zero3_run.py MODEL OUTPUT KIND plain|zero3: three steps; prints the losses and the norms of the head."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path

ZERO3 = {
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "train_micro_batch_size_per_gpu": 2,
}
TARGETS = {"full": None, "lora": ["q_proj"], "lora on the head": ["q_proj", "lm_head"]}


def main(model: str, output: str, kind: str, how: str) -> None:
    if how == "zero3":  # one process, before anything is imported that asks
        os.environ |= {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_DEEPSPEED": "true", "MASTER_ADDR": "127.0.0.1"}
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "0"}
    from datasets import Dataset
    from peft import LoraConfig
    from trl import DPOConfig
    from trl_kit import PAIRS, config_of, tokenizer_of

    from fastdpo.integrations.trl import FastDPOTrainer

    targets = TARGETS[kind]
    trainer = FastDPOTrainer(
        model,
        args=config_of(DPOConfig, Path(output), **({"deepspeed": ZERO3} if how == "zero3" else {})),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=tokenizer_of(model),
        peft_config=targets and LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"),
    )
    trainer.train()
    parameters = dict(trainer.model.get_output_embeddings().named_parameters())
    partitioned = all(parameter.numel() == 0 for parameter in parameters.values())
    gathered = contextlib.nullcontext()
    if how == "zero3":
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters(list(parameters.values()))
    with gathered:
        norms = {name: parameter.detach().double().norm().item() for name, parameter in parameters.items()}
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    print(json.dumps({"loss": losses, "head": norms, "partitioned": partitioned}))


if __name__ == "__main__":
    main(*sys.argv[1:])
