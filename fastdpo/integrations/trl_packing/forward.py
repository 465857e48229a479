"""The forward of a model with TRL's fused head, packed: `[R, T]` in and out, one row `[1, N]` within."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .layout import Layout, layout
from .support import Plan, plan, probe

_BATCH = ("input_ids", "attention_mask", "labels")
_KEPT = ("fused_lm_head", "use_cache", "output_router_logits")  # what else TRL's DPO loss passes


class PackedForward:
    """In place of a model's `forward` while `packed` holds: with `fused_lm_head=True`, TRL's results from one row.

    Without it, the model's own forward.

    Args:
        model: a transformers causal language model that TRL gave its fused head.
        option: "padding_free" or "shared_prompt".

    Raises:
        ValueError: a model that cannot run packed; at the first batch, one whose results show it.
    """

    def __init__(self, model: Any, option: str) -> None:
        self.model, self.option = model, option
        self.plan: Plan = plan(model, option)
        self.inner: Callable[..., Any] = model.forward
        self._probed = False
        self._mask_second = list(inspect.signature(type(model.base_model).forward).parameters)[2] == "attention_mask"

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        if not keywords.get("fused_lm_head"):
            return self.inner(*args, **keywords)
        batch, others = self._batch(args, keywords)
        row = layout(**batch, shared_prompt=self.option == "shared_prompt")
        if not self._probed:
            probe(self.model, self.option, self._hidden, batch["input_ids"].device)
            self._probed = True
        targets = batch["labels"].roll(-1, 1)
        targets[:, -1] = -100
        out = self._run(self.inner, row, row.pack(batch["input_ids"]), shift_labels=row.pack(targets), **others)
        for name, value in list(out.items()):
            if name not in ("loss", "aux_loss"):
                out[name] = row.unpack(value)[:, :-1]
        if self.option == "shared_prompt":  # a target in both rows is one in the packed row
            out["loss"] = -out.log_probs.sum() / out.label_mask.sum().clamp(min=1)
        return out

    def _batch(self, args: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        given = {name: value for name, value in keywords.items() if value is not None}
        unknown = sorted(set(given) - {*_BATCH, *_KEPT})
        if args or unknown or not set(_BATCH) <= set(given):
            raise ValueError(
                f"{self.option}: expected the keywords {', '.join(_BATCH)} of a text batch, got "
                f"{', '.join(sorted(given))}" + (f" and {len(args)} without a keyword" if args else "")
            )
        if self.option == "shared_prompt" and given.get("output_router_logits"):
            raise ValueError(
                "shared_prompt: the load-balancing loss of a mixture of experts would count a prompt once, not for "
                "both completions; expected router_aux_loss_coef=0, or padding_free instead"
            )
        return {name: given[name] for name in _BATCH}, {name: given[name] for name in _KEPT if name in given}

    def _run(self, call: Callable[..., Any], row: Layout, ids: Tensor, **keywords: Any) -> Any:
        mask, further = self.plan.attention(row, self.model.dtype)
        args: tuple[Any, ...] = (ids,)
        if mask is not None and self._mask_second:
            # Without a keyword: TRL takes that for a mask of padding, and counts tokens for the router's loss by it
            args = (ids, mask)
        elif mask is not None:
            further["attention_mask"] = mask
        return call(*args, position_ids=row.position_ids, **further, **keywords)

    def _hidden(self, row: Layout, ids: Tensor) -> Tensor:
        return self._run(self.model.base_model, row, ids, use_cache=False).last_hidden_state


@contextmanager
def packed(*forwards: PackedForward) -> Iterator[None]:
    """Each model's forward is its PackedForward for the length of a with-block, and then what it was; nests."""
    before = [(one.model, one.model.__dict__.get("forward")) for one in forwards]
    for one in forwards:
        if one.model.forward is not one:
            one.inner = one.model.forward
            one.model.forward = one
    try:
        yield
    finally:
        for model, own in before:
            if own is None:
                del model.forward
            else:
                model.forward = own


def unwrapped(model: nn.Module) -> Any:
    """The transformers model within a PEFT model."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
