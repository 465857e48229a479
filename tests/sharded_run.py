"""python sharded_run.py MODEL OUTPUT KIND HOW: three steps of four rows; prints losses and norms of the head.

HOW: plain, zero3, ddp (as one of two processes; RANK and MASTER_PORT are the caller's) or fsdp2 (one process, since
accelerate's is not for CPUs: the trainer's model is sharded here, its head apart, so that it stays sharded).
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

ZERO3 = {
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "train_micro_batch_size_per_gpu": "auto",
}
LOCAL = {"MASTER_ADDR": "127.0.0.1", "DS_ACCELERATOR": "cpu"}
ENVIRONMENT: dict[str, dict[str, str]] = {
    "plain": {},
    "zero3": {"ACCELERATE_USE_DEEPSPEED": "true", "WORLD_SIZE": "1", **LOCAL},
    "ddp": {"WORLD_SIZE": "2", **LOCAL},
    "fsdp2": {},
}
TARGETS = {"full": None, "lora": ["q_proj"], "lora on the head": ["q_proj", "lm_head"]}


def main(model: str, output: str, kind: str, how: str) -> None:
    os.environ.update(ENVIRONMENT[how])  # before anything is imported that asks
    from datasets import Dataset
    from peft import LoraConfig
    from trl import DPOConfig
    from trl_kit import config_of, rows, tokenizer_of

    from fastdpo.integrations.trl import FastDPOTrainer

    targets = TARGETS[kind]
    settings = {"deepspeed": ZERO3} if how == "zero3" else {}
    batch = 4 // int(os.environ.get("WORLD_SIZE", "1"))
    trainer = FastDPOTrainer(
        model,
        args=config_of(DPOConfig, Path(output), per_device_train_batch_size=batch, **settings),
        train_dataset=Dataset.from_list(rows(12)),
        processing_class=tokenizer_of(model),
        peft_config=targets and LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"),
    )
    if how == "fsdp2":
        shard(trainer.model)
    trainer.train()
    parameters = dict(trainer.model.get_output_embeddings().named_parameters())
    sharded = all(parameter.numel() == 0 or hasattr(parameter, "full_tensor") for parameter in parameters.values())
    gathered = contextlib.nullcontext()
    if how == "zero3":
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters(list(parameters.values()))
    with gathered:
        norms = {name: float(parameter.detach().double().norm()) for name, parameter in parameters.items()}
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    print(json.dumps({"loss": losses, "head": norms, "sharded": sharded}))


def shard(model: Any) -> None:
    import torch.distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    fully_shard(model.get_output_embeddings(), mesh=mesh)
    fully_shard(model, mesh=mesh)


if __name__ == "__main__":
    main(*sys.argv[1:])
