"""Which weight and bias a model's LM head multiplies with, looked up at each call: FSDP and PEFT replace them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class LMHead(NamedTuple):
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]


def lm_head(model: Any) -> LMHead:
    """Weight and bias of a `PreTrainedModel`'s LM head, as its forward would use them now.

    A LoRA adapter on the head counts while it is merged into the weight; a copy of the head that PEFT trains
    (`modules_to_save`) is taken where it is active.

    Raises:
        NotImplementedError: a head that is not one product with a weight: none at all, another class than Linear, an
            adapter that is not merged, a quantised or sharded weight, hooks that would not run. Names the head.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise NotImplementedError(f"lm_head: {type(model).__name__} has no output embeddings; expected a causal LM")
    linear = _without_adapters(head)
    if not isinstance(linear, nn.Linear) or type(linear).forward is not nn.Linear.forward:
        raise NotImplementedError(f"lm_head: expected a Linear layer, got a {type(linear).__name__}")
    for module in {id(m): m for m in (head, linear)}.values():
        if module._forward_pre_hooks or module._forward_hooks:
            raise NotImplementedError(
                f"lm_head: {type(module).__name__} has forward hooks, which a fused head would not run (an FSDP unit "
                "of its own, tensor parallelism, ...)"
            )
    _check_numbers("weight", linear.weight)
    if linear.bias is not None:
        _check_numbers("bias", linear.bias)
    return LMHead(linear.weight, linear.bias)


def _without_adapters(head: Any) -> Any:
    """The layer that PEFT's wrappers would run; raises where they would do more than run it."""
    if hasattr(head, "modules_to_save"):  # peft.utils.ModulesToSaveWrapper
        active = [name for name in head.active_adapters if name in head.modules_to_save]
        if head.disable_adapters or not active:
            return head.original_module
        if len(active) > 1:
            raise NotImplementedError(
                f"lm_head: {len(active)} copies of it are active ({', '.join(active)}), expected one"
            )
        return head.modules_to_save[active[0]]
    if not hasattr(head, "base_layer"):  # no peft.tuners.BaseTunerLayer
        return head
    adapters = [name for name in head.active_adapters if name in head._get_available_adapters()]
    if head.disable_adapters and head.merged:
        raise NotImplementedError(
            f"lm_head: the adapter {', '.join(head.merged_adapters)} is merged into it and disabled; unmerge it"
        )
    if not head.disable_adapters and adapters and set(adapters) - set(head.merged_adapters):
        raise NotImplementedError(
            f"lm_head: the adapter {', '.join(adapters)} ({type(head).__name__}) is not merged into it; leave the head "
            "out of target_modules, or train a copy of it (modules_to_save)"
        )
    return _without_adapters(head.base_layer)


def _check_numbers(name: str, parameter: Any) -> None:
    """Raise unless it is a plain tensor of floats with its numbers."""
    if hasattr(parameter, "ds_id"):
        raise NotImplementedError(f"lm_head: its {name} is partitioned by DeepSpeed ZeRO-3; use ZeRO-2 or FSDP2")
    if hasattr(parameter, "full_tensor"):
        raise NotImplementedError(f"lm_head: its {name} is sharded (a DTensor); keep the head in FSDP2's root unit")
    if parameter.is_meta:
        raise NotImplementedError(f"lm_head: its {name} is on the meta device (offloaded, or not loaded)")
    if type(parameter) not in (nn.Parameter, Tensor) or parameter.dtype not in _FLOATS:
        kind = parameter.dtype if type(parameter) in (nn.Parameter, Tensor) else type(parameter).__name__
        raise NotImplementedError(f"lm_head: its {name} is quantised ({kind}); expected float32, bfloat16 or float16")
