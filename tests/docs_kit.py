"""Python blocks of the documents, run in order with the names that the text around them takes for granted."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def blocks(document: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(encoding="utf-8"), flags=re.DOTALL)


def run(document: str, names: dict[str, Any], only: slice = slice(None)) -> dict[str, Any]:
    """Run the blocks (or some of them) in one namespace, which is returned."""
    for number, block in list(enumerate(blocks(document)))[only]:
        exec(compile(block, f"{document}, block {number}", "exec"), names)
    return names


# --- docs/distributed.md, on every rank of a group -------------------------------------------------------------------


def distributed_blocks(rank: int, folder: str) -> list[float]:
    """The losses of the four blocks: FSDP2, a split vocabulary, a tensor-parallel model, split sequences."""
    import torch
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoModelForCausalLM

    import fastdpo

    world = dist.get_world_size()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    model = AutoModelForCausalLM.from_pretrained(folder)
    input_ids = torch.randint(3, 50, (4, 6), generator=torch.Generator().manual_seed(0))
    whole, hidden = model.lm_head.weight.detach().clone(), model.model(input_ids).last_hidden_state.detach()
    names = {
        **{"fastdpo": fastdpo, "fully_shard": fully_shard, "AutoModelForCausalLM": AutoModelForCausalLM},
        **{"model": model, "folder": folder, "input_ids": input_ids, "labels": input_ids, "ref_logps": torch.zeros(4)},
    }
    parts = blocks("docs/distributed.md")
    losses = []
    for number, block in enumerate(parts):
        if number == 1:
            names |= {"group": dist.group.WORLD, "my_rows_of_the_head": whole.tensor_split(world)[rank]}
            names["hidden"] = hidden.clone().requires_grad_()
        if number == 3:
            mine = [part.tensor_split(world, dim=1)[rank] for part in (hidden, input_ids)]
            names |= {"my_hidden": mine[0], "my_labels": mine[1], "weight": whole}
        exec(compile(block, f"docs/distributed.md, block {number}", "exec"), names)
        losses.append(float(names["out"].loss))
    return losses
