"""What a model with a fused head computes: backbone, then `linear_token_logps` in place of logits."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from ...batch import IGNORE_INDEX
from ...batch import shift_labels as shifted
from ...head import TokenLogps, linear_token_logps
from ..head_transform import HeadTransform
from ..output_head import output_head
from .head import lm_head


@dataclass
class FusedOutput(ModelOutput):
    """What a model with a fused head returns when it is given labels.

    Token results: `[B, T]`, position t of the token that t predicts, 0 where that does not count; float32.
    `token_logps` and `entropy` are differentiable. None where not asked for (`stats` of `fused_head`).
    """

    loss: Tensor | None = None  # [], as the model's own
    token_logps: Tensor | None = None
    label_mask: Tensor | None = None  # bool [B, T], whether the position counts
    entropy: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    lse: Tensor | None = None
    dropped_mass: Tensor | None = None
    aux_loss: Tensor | None = None  # [], a mixture of experts' load-balancing loss, where router logits are asked for
    router_loss: Tensor | None = None  # [], aux_loss as it is in the loss: by the model's coefficient
    ref_logps: Tensor | None = None  # as given
    past_key_values: Any = None
    hidden_states: Any = None
    attentions: Any = None
    router_logits: Any = None

    @property
    def counted(self) -> Tensor:
        """int64 `[B, T]`, labels as the losses ask for them, aligned: they only tell which tokens count."""
        assert self.label_mask is not None
        return torch.where(self.label_mask, 0, IGNORE_INDEX)

    @property
    def tokens(self) -> TokenLogps:
        """The token results, as `linear_token_logps` returns them."""
        assert self.token_logps is not None
        return TokenLogps(self.token_logps, **{name: getattr(self, name) for name in TokenLogps._fields[1:]})


@dataclass
class FusedHead:
    """What `fused_head` leaves at a model."""

    keywords: dict[str, Any]
    transform: HeadTransform
    original: Any  # the instance's own forward, if accelerate's device_map had set one


def fused_output(
    model: Any,
    state: FusedHead,
    labels: Tensor | None,
    aligned: Tensor | None,
    ref_logps: Tensor | None,
    num_items_in_batch: Any,
    kwargs: dict[str, Any],
) -> FusedOutput:
    """The output for labels `[B, T]`, or aligned ones. kwargs: the model's other arguments, by name."""
    if kwargs.pop("return_dict", None) is False:
        raise ValueError("return_dict: False with labels; a fused head returns a FusedOutput")
    keep = kwargs.pop("logits_to_keep", None)
    if isinstance(keep, Tensor) or keep:
        raise ValueError("logits_to_keep: not with labels; a fused head makes no logits")
    text = model.config.get_text_config()
    router = kwargs.get("output_router_logits")
    router = bool(getattr(text, "output_router_logits", False)) if router is None else router
    if router:
        kwargs["output_router_logits"] = True
    if not getattr(model.config, "return_dict", True):
        kwargs["return_dict"] = True
    kwargs.setdefault("use_cache", False)
    outputs = _backbone(model)(**kwargs)
    hidden, head = outputs.last_hidden_state, lm_head(model)
    weight = next(head.parameters())
    hidden = hidden.to(weight.device)  # the backbone may end on another device (device_map)
    if aligned is None:
        assert labels is not None
        aligned = shifted(labels)
    targets = aligned.to(hidden.device)
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(f"labels: shape {list(targets.shape)}, expected {list(hidden.shape[:-1])}, the hidden states'")
    product = output_head(head, hidden if torch.is_autocast_enabled(hidden.device.type) else hidden.to(weight.dtype))
    tokens = linear_token_logps(
        product.hidden,
        product.weight,
        targets,
        bias=product.bias,
        softcap=state.transform.softcap,
        logit_scale=state.transform.logit_scale,
        **state.keywords,
    )
    mask = targets != IGNORE_INDEX
    items = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    loss = -tokens.logps.sum() / (items.to(hidden.device) if isinstance(items, Tensor) else items)
    aux_loss = router_loss = None
    if router:
        aux_loss = _load_balancing_loss(model, text, outputs.router_logits, kwargs.get("attention_mask"))
        router_loss = _router_coefficient(model, text) * aux_loss.to(loss.device)
        loss = loss + router_loss
    return FusedOutput(
        loss=loss,
        token_logps=tokens.logps,
        label_mask=mask,
        **{name: getattr(tokens, name) for name in TokenLogps._fields[1:]},
        aux_loss=aux_loss,
        router_loss=router_loss,
        ref_logps=ref_logps,
        **{
            name: getattr(outputs, name, None)
            for name in ("past_key_values", "hidden_states", "attentions", "router_logits")
        },
    )


def _backbone(model: Any) -> Any:
    """What makes the hidden states; Llama 4's text model names its own otherwise than `base_model` looks for it."""
    found = model.base_model if model.base_model is not model else getattr(model, "model", None)
    if found is None:
        raise NotImplementedError(f"model: {type(model).__name__} has no backbone that base_model finds")
    return found


# --- mixtures of experts ---------------------------------------------------------------------------------------------


def _load_balancing_loss(model: Any, text: Any, router_logits: Any, attention_mask: Tensor | None) -> Tensor:
    """The model's own load-balancing loss: the function of its own modeling file."""
    function = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
    experts = getattr(model, "num_experts", None) or getattr(text, "num_experts", None)
    per_token = getattr(model, "num_experts_per_tok", None) or getattr(text, "num_experts_per_tok", None)
    if function is None or experts is None or per_token is None:
        raise NotImplementedError(
            f"output_router_logits: {type(model).__name__} makes its router loss in a way that fused_head does not "
            "know; set it to False"
        )
    return function(router_logits, experts, per_token, attention_mask)


def _router_coefficient(model: Any, text: Any) -> float:
    coefficient = getattr(model, "router_aux_loss_coef", None)
    return getattr(text, "router_aux_loss_coef", 0.0) if coefficient is None else coefficient
