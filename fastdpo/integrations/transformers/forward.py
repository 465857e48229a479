"""The forward of a model with a fused head: backbone, then `linear_token_logps` in place of logits."""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ...batch import IGNORE_INDEX
from ...batch import shift_labels as shifted
from ...head import TokenLogps, linear_token_logps
from ...options import head_options
from ..head_transform import HeadTransform, head_transform
from .head import lm_head

_STATE = "_fastdpo_head"
_KEYWORDS = ("temperature", "stats", "grad_tol", "workspace_mb", "backend")


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
    def tokens(self) -> TokenLogps:
        """The token results, as `linear_token_logps` returns them."""
        assert self.token_logps is not None
        return TokenLogps(self.token_logps, **{name: getattr(self, name) for name in TokenLogps._fields[1:]})


@dataclass
class _State:
    keywords: dict[str, Any]
    transform: HeadTransform
    original: Any  # the instance's own forward, if accelerate's device_map had set one


def fused_head(model: Any, *, check: bool = True, **keywords: Any) -> Any:
    """Let a causal LM compute its loss and token logps by `linear_token_logps`, in place; returns the model.

    Afterwards `model(input_ids, ..., labels=labels)` returns a `FusedOutput`, whose loss is the model's own: the mean
    over the labels that count, or their sum by `num_items_in_batch` (0, not nan, where none counts), plus a mixture
    of experts' load-balancing loss where the model adds it. `labels` `[B, T]` are shifted as the model shifts them;
    `shift_labels` in their place are taken as aligned. Without labels, the forward is the model's own: generation
    and logits stay as they were. Modules, state dict and checkpoints do not change; a deepcopy is fused too.

    `completion_labels` in place of labels are the same to the model, under a name that transformers' Trainer leaves
    alone; `ref_logps` beside them is handed on in the output (see `PreferenceLoss`).

    Args:
        model: a decoder-only `PreTrainedModel` (of a vision-language model, the whole), or a `PeftModel` of one; before
            or after PEFT, but before DDP, FSDP or DeepSpeed.
        check: compare the loss and token logps of eight tokens with the model's own, once, now. Skipped where the
            model's weights are not loaded yet (meta device).
        keywords: `temperature`, `stats`, `grad_tol`, `workspace_mb`, `backend`, as for `fastdpo.linear_token_logps`.

    Raises:
        TypeError: not a `PreTrainedModel` or `PeftModel`; an unknown keyword.
        ValueError: a bad keyword value; an unknown scale or cap of the logits (`head_transform`); a model whose own
            logits are otherwise than the head, scale and cap make them; a model that is fused already, or whose
            forward another library replaced (but for accelerate's device_map).
        NotImplementedError: an encoder-decoder; a head that is not one product (`lm_head`), here or at a later call.
    """
    base = _base(model)
    if is_fused(base):
        raise ValueError(f"model: this {type(base).__name__} is fused already; unfuse_head(model) first")
    if getattr(base.config, "is_encoder_decoder", False):
        raise NotImplementedError(f"model: {type(base).__name__} is an encoder-decoder; expected a decoder-only model")
    if "forward" in base.__dict__ and not hasattr(base, "_hf_hook"):  # that of a device_map only moves what is given
        raise ValueError(
            "model: its forward was replaced already, and a fused head would leave that out (accelerate's autocast, "
            "TRL's own fused head, ...); fuse the head before a Trainer or accelerator.prepare takes the model"
        )
    for name in keywords:
        if name not in _KEYWORDS:
            raise TypeError(f"{name}: not a keyword of fused_head; expected some of check, {', '.join(_KEYWORDS)}")
    head_options(**keywords)
    state = _State(keywords, head_transform(base.config), base.__dict__.get("forward"))
    if not any(parameter.is_meta for parameter in base.parameters()):
        lm_head(base)
        if check:
            _compare(base, state)
    base.__dict__[_STATE] = state
    base.forward = types.MethodType(_make_forward(type(base)), base)
    return model


def unfuse_head(model: Any) -> Any:
    """Undo `fused_head`, in place; returns the model. A model that is not fused stays as it is."""
    base = _base(model)
    state = base.__dict__.pop(_STATE, None)
    # A forward that was set since (accelerate's autocast) calls ours, which without the state is the model's own
    if state is not None and getattr(base.__dict__.get("forward"), "_fastdpo", False):
        if state.original is None:
            del base.forward
        else:
            base.forward = state.original
    return model


def is_fused(model: Any) -> bool:
    """Whether `fused_head` is in force on this model."""
    return _STATE in _base(model).__dict__


def _base(model: Any) -> PreTrainedModel:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(base, PreTrainedModel):
        raise TypeError(
            f"model: expected a PreTrainedModel or a PeftModel, got {type(base).__name__} (fuse the head before DDP, "
            "FSDP or torch.compile wraps the model)"
        )
    return base


def _make_forward(cls: type) -> Callable[..., Any]:
    """A forward with the signature of the class's own, which Trainer and generate() read. Holds no model: a deepcopy of
    the model takes it along."""

    names = list(inspect.signature(cls.forward).parameters)[1:]  # type: ignore[attr-defined]

    @functools.wraps(cls.forward)  # type: ignore[attr-defined]
    def forward(
        self: Any,
        *args: Any,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        completion_labels: Tensor | None = None,
        ref_logps: Tensor | None = None,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        state: _State | None = self.__dict__.get(_STATE)
        if state is not None:  # by name: the backbone's arguments may have another order
            kwargs |= dict(zip(names, args, strict=False))
            args, labels = (), kwargs.pop("labels", labels)
            if labels is not None and completion_labels is not None:
                raise ValueError(
                    "labels: given beside completion_labels, expected one of them (the Trainer takes the labels of "
                    "PreferenceCollator out, with compute_loss_func=PreferenceLoss(...); elsewhere drop them)"
                )
            targets = labels if completion_labels is None else completion_labels
            if targets is not None or shift_labels is not None:
                return _fused(self, state, targets, shift_labels, ref_logps, num_items_in_batch, kwargs)
        if completion_labels is not None or ref_logps is not None:
            raise ValueError(
                "ref_logps: given without completion_labels"
                if state is not None
                else "completion_labels: only a model with a fused head takes them (fused_head(model))"
            )
        if state is not None and num_items_in_batch is not None:
            raise ValueError(
                "labels: the Trainer counted them (num_items_in_batch) and kept them from the model, for a loss from "
                "logits that a fused head does not make: label_smoothing_factor, or a compute_loss_func. Unset it, use "
                "PreferenceLoss, or unfuse_head(model)"
            )
        passed = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
        kwargs |= {name: value for name, value in passed.items() if value is not None}
        original = None if state is None else state.original
        return original(*args, **kwargs) if original is not None else cls.forward(self, *args, **kwargs)  # type: ignore[attr-defined]

    forward._fastdpo = True  # type: ignore[attr-defined]
    return forward


def _fused(
    model: Any,
    state: _State,
    labels: Tensor | None,
    aligned: Tensor | None,
    ref_logps: Tensor | None,
    num_items_in_batch: Any,
    kwargs: dict[str, Any],
) -> FusedOutput:
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
    outputs = model.base_model(**kwargs)
    hidden, head = outputs.last_hidden_state, lm_head(model)
    hidden = hidden.to(head.weight.device)  # the backbone may end on another device (device_map)
    if aligned is None:
        assert labels is not None
        aligned = shifted(labels)
    targets = aligned.to(hidden.device)
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(f"labels: shape {list(targets.shape)}, expected {list(hidden.shape[:-1])}, the hidden states'")
    tokens = linear_token_logps(
        hidden if torch.is_autocast_enabled(hidden.device.type) else hidden.to(head.weight.dtype),
        head.weight,
        targets,
        bias=head.bias,
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


# --- the check -------------------------------------------------------------------------------------------------------


def _compare(model: Any, state: _State) -> None:
    """Raise ValueError unless the fused head gives the model's own loss and logps on eight tokens."""
    ids = torch.arange(1, 9, device=model.device)[None] * 7 % model.get_input_embeddings().num_embeddings
    mask = torch.ones_like(ids)
    exact = _State({"temperature": 1.0, "grad_tol": 0}, state.transform, None)
    with torch.no_grad(), _evaluating(model):
        own = model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False)
        ours = _fused(model, exact, ids, None, None, None, {"input_ids": ids, "attention_mask": mask})
    logits = own.logits.float()
    truth = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None].to(logits.device))[..., 0]
    assert ours.token_logps is not None and ours.loss is not None
    rounding = 1e-3 if model.dtype in (torch.float32, torch.float64) else 3e-2
    bound = rounding * max(1.0, float(logits.abs().max()))
    error = float((ours.token_logps[:, :-1].to(truth) - truth).abs().max())
    if not error <= bound:
        raise ValueError(
            f"model: {type(model).__name__} does not make its logits of lm_head(last_hidden_state), softcap "
            f"{state.transform.softcap} and scale {state.transform.logit_scale}: logps differ by {error:.3g}"
        )
    if own.loss is not None and not abs(float(ours.loss) - float(own.loss)) <= bound:
        raise ValueError(
            f"model: {type(model).__name__}'s own loss is {float(own.loss):.6g}, that of its token logps "
            f"{float(ours.loss):.6g}: it adds something that a fused head would leave out"
        )


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
