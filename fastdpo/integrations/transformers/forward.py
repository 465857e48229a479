"""fused_head and unfuse_head: a model's forward, replaced on the instance and given back."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ...names import check_names
from ...options import HEAD_KEYWORDS, head_options
from ..head_transform import head_transform
from .check import compare
from .compute import FusedHead, fused_output
from .head import check as check_lm_head

_STATE = "_fastdpo_head"
_KEYWORDS = ("temperature", "stats", *HEAD_KEYWORDS)


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
        keywords: `temperature` (of the loss too), `stats`, `grad_tol`, `workspace_mb`, `backend`, as for
            `fastdpo.linear_token_logps`.

    Raises:
        TypeError: not a `PreTrainedModel` or `PeftModel`; an unknown keyword.
        ValueError: a bad keyword value; an unknown scale or cap of the logits (`head_transform`); a model whose own
            logits are otherwise than the head, scale and cap make them; a model that is fused already, or whose
            forward another library replaced (but for accelerate's device_map).
        NotImplementedError: an encoder-decoder.
        UnsupportedHead: a head that is not one product (output_head.py), here or at a later call.
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
    check_names("fused_head", keywords, ("check", *_KEYWORDS))
    head_options(**keywords)
    state = FusedHead(keywords, head_transform(base.config), base.__dict__.get("forward"))
    if not any(parameter.is_meta for parameter in base.parameters()):
        check_lm_head(base)
        if check:
            compare(base, state)
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
        state: FusedHead | None = self.__dict__.get(_STATE)
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
                return fused_output(self, state, targets, shift_labels, ref_logps, num_items_in_batch, kwargs)
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
