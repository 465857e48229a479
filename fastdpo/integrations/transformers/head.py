"""A model's LM head, for a fused forward: a product that output_head.py knows, without hooks of its own."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from ..head_product import UnsupportedHead
from ..output_head import check_head
from ..zero3 import is_partitioned


def lm_head(model: Any) -> nn.Module:
    """The output embeddings of a `PreTrainedModel`, looked up at each call: FSDP and PEFT replace them.

    Raises:
        UnsupportedHead: none at all, hooks that a fused head would not run, a weight that DeepSpeed ZeRO-3 partitions.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise UnsupportedHead(f"lm_head: {type(model).__name__} has no output embeddings; expected a causal LM")
    parameters = list(head.parameters())
    if any(is_partitioned(parameter) for parameter in parameters):
        raise UnsupportedHead(
            "lm_head: its weight is partitioned by DeepSpeed ZeRO-3; use FastDPOTrainer, ZeRO-2 or FSDP2"
        )
    # FSDP2's hooks gather what is gathered here
    if any(hooked(module) for module in head.modules()) and not any(isinstance(p, DTensor) for p in parameters):
        raise UnsupportedHead(f"lm_head: {type(head).__name__} has forward hooks, which a fused head would not run")
    return head


def hooked(module: nn.Module) -> bool:
    return bool(module._forward_pre_hooks or module._forward_hooks)


def check(model: Any) -> None:
    """Raise UnsupportedHead for a head that cannot be fused."""
    check_head(lm_head(model))
