"""DPO on two processes, data parallel: each takes half of the pairs, DDP averages the gradients.

torchrun --standalone --nproc-per-node 2 examples/two_processes.py [--model FOLDER --data PAIRS.jsonl]
"""

import torch
import torch.distributed as dist
from common import load, tokenize
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from fastdpo import preference_metrics
from fastdpo.integrations.transformers import PreferenceCollator, add_reference, fused_head
from fastdpo.preference import loss_of_tokens

dist.init_process_group("gloo")  # "nccl" on GPUs
rank, processes = dist.get_rank(), dist.get_world_size()

model, tokenizer, pairs = load()  # the same seed, and so the same weights, in each process
fused_head(model)  # before DDP wraps the model: the head is then inside its forward
collator = PreferenceCollator(tokenizer.pad_token_id)
rows = add_reference(tokenize(pairs, tokenizer), model, collator)
batches = DataLoader(rows, batch_size=4, sampler=DistributedSampler(rows, shuffle=False), collate_fn=collator)
parallel = DistributedDataParallel(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)  # 1e-6, about, for a real model

for step, batch in enumerate(batches):
    out = parallel(**{name: batch[name] for name in ("input_ids", "attention_mask", "completion_labels")})
    loss = loss_of_tokens(out.tokens, out.counted, batch["ref_logps"], beta=0.1)
    loss.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    metrics = preference_metrics(loss)
    shown = torch.stack([loss.loss.detach(), metrics["rewards/accuracies"], metrics["rewards/margins"]])
    dist.all_reduce(shown)
    if rank == 0:
        value, accuracy, margin = (shown / processes).tolist()
        print(f"step {step}  loss {value:.4f}  accuracy {accuracy:.2f}  margin {margin:.3f}")

sums = [torch.zeros(()) for _ in range(processes)]
dist.all_gather(sums, sum(p.detach().double().sum() for p in model.parameters()).float())
if rank == 0:
    print(f"the {processes} processes hold {'the same' if len({s.item() for s in sums}) == 1 else 'different'} weights")
dist.destroy_process_group()
