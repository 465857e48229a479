"""DPO with transformers' own Trainer: python examples/hf_trainer.py [--model FOLDER --data PAIRS.jsonl]"""

from common import load, print_steps, tokenize
from transformers import Trainer, TrainingArguments

from fastdpo.integrations.transformers import PreferenceCollator, PreferenceLoss, add_reference, fused_head

model, tokenizer, pairs = load()
fused_head(model)  # from here on, model(..., labels=...) gives token logps and makes no logits
collator = PreferenceCollator(tokenizer.pad_token_id)
rows = add_reference(tokenize(pairs, tokenizer), model, collator)  # the reference is the model as it is now
loss = PreferenceLoss(beta=0.1)  # loss_type="ipo", "simpo", ...: every one in docs/losses.md

trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir="out/hf_trainer",
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,  # 1e-6, about, for a real model
        lr_scheduler_type="constant",
        max_steps=10,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
    ),
    data_collator=collator,
    train_dataset=rows,
    compute_loss_func=loss,
    callbacks=[loss],  # logs rewards and accuracies
)
trainer.train()
print_steps(trainer)
