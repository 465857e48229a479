"""PEFT's layers on an LM head, each as one product (head_product.py), as its own forward computes it.

LoRA (arXiv 2106.09685) is the head's product made wider, x W' + s (dropout(x) A') B' = [x, s dropout(x) A'] [W, B]':
merging W + s B A would round the adapter away in bf16 and could not have dropout. Its price is a copy of the head, in
the product's dtype, and a gradient of that size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import layer as lora
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn

from ..inputs import product_dtype
from .head_product import HeadProduct, check_weight, computes_as, product_of, unsupported, whole

_Terms = list[tuple[Tensor, Tensor]]  # logits = sum of input @ matrix.T, [..., K] and [V, K]

_NORM_ROWS = 4096  # of the vocabulary, whose norms are taken at a time


@product_of.register
def _lora(head: lora.Linear, hidden: Tensor) -> HeadProduct:
    if not computes_as(head, lora.Linear):
        raise unsupported(head, "which has a forward of its own")
    if _off(head):
        return product_of(head.base_layer, hidden)
    base = product_of(head.base_layer, hidden)
    x, terms, bias = hidden, [(base.hidden, base.weight)], base.bias
    for name in _active(head):
        lora_A: Any = head.lora_A[name]
        x = head._cast_input_dtype(x, lora_A.weight.dtype)
        variant = head.lora_variant.get(name)
        if isinstance(variant, DoraLinearVariant):
            terms, bias = _with_dora(head, name, x, terms, bias)
        elif variant is None:
            dropped = head.lora_dropout[name](x)
            terms = [*terms, (_inner(head, name, dropped), whole(head.lora_B[name].weight))]
            outer_bias = head.lora_B[name].bias
            if outer_bias is not None:
                outer_bias = head.scaling[name] * whole(outer_bias)
                bias = outer_bias if bias is None else whole(bias) + outer_bias
        else:
            raise unsupported(head, f"whose adapter {name!r} is a {type(variant).__name__}")
    return _joined(terms, bias, hidden) if len(terms) > 1 else base


def _with_dora(
    head: lora.Linear, name: str, x: Tensor, terms: _Terms, bias: Tensor | None
) -> tuple[_Terms, Tensor | None]:
    """DoRA (arXiv 2402.09353) on top of the terms: m / |W + s B A| times their sum and s B A, the norm a constant.

    As the terms and (m / norm - 1) times them: of a product in bf16 the latter alone keeps small changes of m.
    """
    bottom = head.get_base_layer()
    weight, outer = whole(bottom.weight), whole(head.lora_B[name].weight)
    norm = _norms(head, name, weight, outer, x.dtype)
    gain = (whole(head.lora_magnitude_vector[name].weight) / norm).unsqueeze(1)  # [V, 1]
    dropout = head.lora_dropout[name]
    if isinstance(dropout, nn.Identity) or not head.training:
        changed = [(given, (gain - 1) * whole(matrix)) for given, matrix in terms]
        # The layer's own bias is outside of DoRA; an earlier adapter's is inside
        if bias is not None and bias is not bottom.bias:
            inside = bias if bottom.bias is None else bias - whole(bottom.bias)
            bias = bias + (gain[:, 0] - 1) * inside
    else:  # PEFT then takes W from the dropped input, and no other adapter
        x = dropout(x)
        changed = [(x, (gain - 1) * weight)]
    return [*terms, *changed, (_inner(head, name, x), gain * outer)], bias


def _norms(head: lora.Linear, name: str, weight: Tensor, outer: Tensor, dtype: torch.dtype) -> Tensor:
    """Norm of each row of W + s B A, `[V]`."""
    inner, scaling = whole(head.lora_A[name].weight), head.scaling[name]
    norms: Any = head.lora_magnitude_vector[name].get_weight_norm
    blocks = zip(weight.detach().split(_NORM_ROWS), outer.detach().split(_NORM_ROWS), strict=True)
    with torch.no_grad():
        return torch.cat([norms(w.to(dtype), (b @ inner).to(dtype), scaling) for w, b in blocks])


@product_of.register
def _target_parameter(head: lora.ParamWrapper, hidden: Tensor) -> HeadProduct:
    """target_parameters=["lm_head.weight"]: PEFT adds the whole W + s B A, in the weight's dtype."""
    if not computes_as(head, lora.ParamWrapper):
        raise unsupported(head, "which has a forward of its own")
    if _off(head):
        return product_of(head.base_layer, hidden)
    base = product_of(head.base_layer, hidden)
    if head.parameter_name != "weight" or head.base_layer is not head.get_base_layer():
        raise unsupported(head, f"on its {head.parameter_name}")
    deltas = [head.get_delta_weight(name) for name in _active(head)]
    return base._replace(weight=whole(base.weight) + sum(deltas[1:], deltas[0])) if deltas else base


@product_of.register
def _tokens(head: TrainableTokensLayer, hidden: Tensor) -> HeadProduct:
    """Rows of the head replaced. PEFT's layer then leaves out the head's bias."""
    if not head.active_adapters or _off(head):
        return product_of(head.base_layer, hidden)
    if not isinstance(head.base_layer, nn.Linear):
        raise unsupported(head, f"on a {type(head.base_layer).__name__}")
    check_weight(head.base_layer.weight)
    head._check_overlapping_tokens(head.active_adapters)
    return HeadProduct(hidden, head.get_merged_weights(head.active_adapters), None)


@product_of.register
def _token_indices(head: TrainableTokensWrapper, hidden: Tensor) -> HeadProduct:
    return product_of(head.token_adapter, hidden)


@product_of.register
def _modules_to_save(head: ModulesToSaveWrapper, hidden: Tensor) -> HeadProduct:
    """The active adapter's copy of the head."""
    active = head.active_adapters
    if head.disable_adapters or not active or any(name not in head._adapters for name in active):
        return product_of(head.original_module, hidden)
    return product_of(head.modules_to_save[active[0]], hidden)


# --- shared ----------------------------------------------------------------------------------------------------------


def _off(head: lora.LoraLayer | TrainableTokensLayer) -> bool:
    """Whether the layer below is all that counts: adapters merged, or disabled, which as in PEFT unmerges them."""
    if head.disable_adapters and head.merged:
        head.unmerge()
    return bool(head.disable_adapters or head.merged)


def _active(head: lora.LoraLayer) -> list[str]:
    return [name for name in head.active_adapters if name in head.lora_A]


def _inner(head: lora.Linear, name: str, x: Tensor) -> Tensor:
    """s x A', `[..., r]`."""
    return F.linear(x, whole(head.lora_A[name].weight)) * head.scaling[name]


def _joined(terms: _Terms, bias: Tensor | None, hidden: Tensor) -> HeadProduct:
    """All terms as one product, in the dtype in which it will run."""
    dtype = product_dtype(hidden)
    inputs = torch.cat([given.to(dtype) for given, _ in terms], -1)
    matrix = torch.cat([whole(matrix).to(dtype) for _, matrix in terms], -1)
    return HeadProduct(inputs, matrix, None if bias is None else whole(bias))
