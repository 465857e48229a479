"""DPO with TRL, one line changed: python examples/trl_dpo.py [--model FOLDER --data PAIRS.jsonl]"""

import copy

from common import load, print_steps
from trl import DPOConfig

from fastdpo.integrations.trl import FastDPOTrainer as DPOTrainer  # the line; it was: from trl import DPOTrainer

model, tokenizer, pairs = load()
trainer = DPOTrainer(
    model=model,
    ref_model=copy.deepcopy(model),  # not needed for a model with a name: TRL loads it again
    args=DPOConfig(
        output_dir="out/trl_dpo",
        per_device_train_batch_size=8,
        learning_rate=1e-3,  # 1e-6, about, for a real model
        lr_scheduler_type="constant",
        max_steps=10,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        bf16=False,
    ),
    train_dataset=pairs,
    processing_class=tokenizer,
)
trainer.train()
print_steps(trainer)
