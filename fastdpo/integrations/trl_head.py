"""LM heads that are more than an nn.Linear, in TRL: what they compute, where TRL reads `lm_head.weight` alone.

TRL's fused forward asks the model for its head, and hands the head's weight and bias to the Function that it finds.
For one step a stand-in answers in the head's place, and the Function is told which head it was; output_head.py says
what that computes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from trl.trainer import dpo_trainer

from .head_product import is_bare
from .zero3 import announce


class HeadStandIn:
    """What TRL asks of an LM head: a bias, and a weight, for its device and to gather it: the smallest will do."""

    def __init__(self, head: nn.Module) -> None:
        announce(head)
        smallest: Any = min(head.parameters(), key=lambda parameter: parameter.numel())
        self.weight: Tensor = smallest.to_local() if isinstance(smallest, DTensor) else smallest
        self.bias = None


@contextmanager
def whole_heads(function: Any, models: Iterable[Any]) -> Iterator[None]:
    """Tell `function.head` of the head that a model's forward asks for, where that is not a bare nn.Linear, or is
    sharded: TRL gathers a DTensor so that each rank keeps its own gradient of its rows.

    Args:
        function: the Function that TRL finds; its `apply` takes `head`, and leaves None.
        models: whose `get_output_embeddings` TRL's fused forward calls.
    """
    with ExitStack() as stack:
        for model in models:
            head = model.get_output_embeddings()
            if not is_bare(head) or _sharded(head):  # seen from outside: within, FSDP2 may have gathered it
                stack.enter_context(mock.patch.object(model, "get_output_embeddings", _standing_in(function, head)))
        yield


def _standing_in(function: Any, head: nn.Module) -> Any:
    def get_output_embeddings() -> nn.Module | HeadStandIn:
        if is_bare(head) and not _sharded(head):
            return head
        function.head = head
        return HeadStandIn(head)

    return get_output_embeddings


def _sharded(head: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in head.parameters())


class _NoLayer:
    """Nothing is one."""


@contextmanager
def adapter_on_head_allowed() -> Iterator[None]:
    """TRL's DPOTrainer refuses a PEFT layer on the head, which it would ignore; not within this block."""
    if not hasattr(dpo_trainer, "BaseTunerLayer"):  # PEFT is not installed
        yield
        return
    with mock.patch.object(dpo_trainer, "BaseTunerLayer", _NoLayer):
        yield
