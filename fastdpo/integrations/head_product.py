"""LM heads as products, by their type: nn.Linear (PEFT's layers on it: peft_head.py), and the errors for the rest."""

from __future__ import annotations

from functools import singledispatch
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..parallel import plain

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class HeadProduct(NamedTuple):
    """logits = hidden @ weight.T + bias"""

    hidden: Tensor  # [..., K]; K is H of a bare head
    weight: Tensor  # [V, K]
    bias: Tensor | None  # [V]


class UnsupportedHead(NotImplementedError):
    """An LM head whose product is not known."""


@singledispatch
def product_of(head: Any, hidden: Tensor) -> HeadProduct:
    """`output_head` by the head's type: `register` adds one."""
    raise unsupported(head)


@product_of.register
def of_linear(head: nn.Linear, hidden: Tensor) -> HeadProduct:
    if not computes_as(head, nn.Linear):
        raise unsupported(head, "which has a forward of its own")
    if not torch.compiler.is_compiling():
        check_weight(head.weight)
    return HeadProduct(hidden, head.weight, head.bias)


def whole(parameter: Any) -> Tensor:
    """A parameter that FSDP2 shards, gathered, its gradient averaged over the ranks; any other as it is."""
    return plain(parameter, None)


def is_bare(head: object) -> TypeGuard[nn.Linear]:
    """Whether weight and bias of the head are all there is to it."""
    return isinstance(head, nn.Linear) and computes_as(head, nn.Linear)


def computes_as(head: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether head's forward is that of `kind` itself, though it be a subclass; accelerate's hooks may surround it."""
    return type(head).forward is kind.forward and ("forward" not in vars(head) or hasattr(head, "_hf_hook"))


def check_weight(weight: Tensor) -> None:
    """Raise UnsupportedHead for a weight that is not plain floats `[V, H]`: quantised, or offloaded."""
    shape = getattr(weight, "ds_shape", weight.shape)  # DeepSpeed ZeRO-3: of the whole
    if isinstance(weight, DTensor):
        weight = weight._local_tensor
    quantised = torch.utils._python_dispatch.is_traceable_wrapper_subclass(weight)  # torchao's
    if quantised or weight.dtype not in _FLOATS or len(shape) != 2:
        raise UnsupportedHead(
            f"weight: an LM head that holds {type(weight).__name__} {weight.dtype} {list(shape)} is not supported by "
            "fastdpo; expected [V, H] in float32, bf16 or fp16. Leave the head out of the quantisation"
        )
    if weight.is_meta:
        raise UnsupportedHead("weight: the LM head is offloaded (device meta); expected it on the model's device")


def unsupported(head: Any, because: str = "") -> UnsupportedHead:
    """The error that names the head."""
    kind = f"{type(head).__module__}.{type(head).__qualname__}"
    return UnsupportedHead(
        f"head: an LM head that is a {kind}{because and f', {because}'}, is not supported by fastdpo; expected "
        "nn.Linear, or on it PEFT's LoRA or DoRA, target_parameters, modules_to_save or trainable_token_indices"
    )
