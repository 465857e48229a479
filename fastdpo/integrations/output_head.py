"""An LM head as one product: the hidden states, weight and bias that `linear_token_logps` needs to equal head(hidden).

Of a bare nn.Linear these are what it holds. A head that computes anything else has a weight that does not say so: an
adapter, a quantised weight. Each kind of head that is known has a function that says exactly what it computes
(head_product.py, PEFT's: peft_head.py); any other raises, by name.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from .head_product import HeadProduct, check_weight, is_bare, of_linear, product_of
from .zero3 import is_partitioned


def output_head(head: nn.Module, hidden: Tensor) -> HeadProduct:
    """What `head(hidden)` computes, as one product, differentiable in all that takes part in it.

    Exact but for rounding, as the head stands now: training or not (dropout is drawn here), which adapters are
    active, disabled or merged. Hooks of the head are not run. A bare head's weight may be a DTensor still.

    Args:
        head: `model.get_output_embeddings()`: nn.Linear, or one of PEFT's layers on it (peft_head.py). A kind of your
            own: `product_of.register(MyHead, lambda head, hidden: HeadProduct(...))`.
        hidden: `[..., H]`.

    Raises:
        UnsupportedHead: any other head, named.
    """
    if is_bare(head):  # torch.compile cannot trace a dispatch
        return of_linear(head, hidden)
    if "peft" in sys.modules:  # else there is no layer of it
        from . import peft_head  # noqa: F401  (registers)
    return product_of(head, hidden)


def check_head(head: Any) -> None:
    """Raise UnsupportedHead where `output_head` would, before there are hidden states."""
    if is_bare(head):
        check_weight(head.weight)
        return
    parameters = list(head.parameters()) if isinstance(head, nn.Module) else []
    if any(map(is_partitioned, parameters)):
        return  # ZeRO-3: they are empty now, and the first step tells
    first = parameters[0] if parameters else torch.empty(1)
    with torch.no_grad():
        width = getattr(head, "in_features", first.shape[-1])
        output_head(head, torch.empty(0, width, dtype=first.dtype, device=first.device))
