"""DPO in a plain PyTorch loop: python examples/raw_loop.py [--model FOLDER --data PAIRS.jsonl]"""

import copy

import torch
from common import load, tokenize
from torch.utils.data import DataLoader

import fastdpo
from fastdpo.integrations.head_transform import head_transform
from fastdpo.integrations.transformers import PreferenceCollator

model, tokenizer, pairs = load()
reference = copy.deepcopy(model).requires_grad_(False)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)  # 1e-6, about, for a real model
collator = PreferenceCollator(tokenizer.pad_token_id)  # [2B, T]: chosen, then rejected
batches = DataLoader(tokenize(pairs, tokenizer), batch_size=8, collate_fn=collator)
transform = head_transform(model.config)._asdict()  # softcap and scale of Gemma, Cohere, Granite, ...

for step, batch in enumerate(batches):
    ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["completion_labels"]
    with torch.no_grad():
        hidden = reference.base_model(ids, attention_mask=mask).last_hidden_state
        head = {"bias": reference.lm_head.bias, "shift": True, **transform}
        ref_logps = fastdpo.linear_token_logps(hidden, reference.lm_head.weight, labels, **head).logps
    hidden = model.base_model(ids, attention_mask=mask).last_hidden_state
    head = {"bias": model.lm_head.bias, "shift": True, **transform}
    out = fastdpo.linear_dpo_loss(hidden, model.lm_head.weight, labels, ref_logps, beta=0.1, **head)
    out.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    metrics = fastdpo.preference_metrics(out)
    accuracy, margin = metrics["rewards/accuracies"], metrics["rewards/margins"]
    print(f"step {step}  loss {out.loss:.4f}  accuracy {accuracy:.2f}  margin {margin:.3f}")
