"""DPO of a LoRA adapter; the model without it is the reference, and its frozen head costs no gradient of its weight.

python examples/lora.py [--model FOLDER --data PAIRS.jsonl]
"""

from common import load, print_steps
from peft import LoraConfig
from trl import DPOConfig

from fastdpo.integrations.trl import FastDPOTrainer

model, tokenizer, pairs = load()
trainer = FastDPOTrainer(
    model=model,
    args=DPOConfig(
        output_dir="out/lora",
        per_device_train_batch_size=8,
        learning_rate=1e-2,  # 1e-5, about, for a real model
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
    peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
)
trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
print(f"{trainable:,} of {sum(p.numel() for p in trainer.model.parameters()):,} parameters are trained")
trainer.train()
print_steps(trainer)
