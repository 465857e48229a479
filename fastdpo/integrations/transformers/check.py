"""Whether a fused head gives what the model gives: asked of the model itself, once."""

from __future__ import annotations

from typing import Any

import torch

from ...evaluating import evaluating
from .compute import FusedHead, fused_output


def compare(model: Any, state: FusedHead) -> None:
    """Raise ValueError unless the fused head gives the model's own loss and logps on eight tokens."""
    ids = torch.arange(1, 9, device=model.device)[None] * 7 % model.get_input_embeddings().num_embeddings
    mask = torch.ones_like(ids)
    exact = FusedHead({"temperature": 1.0, "grad_tol": 0}, state.transform, None)
    with torch.no_grad(), evaluating(model):
        own = model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False)
        ours = fused_output(model, exact, ids, None, None, None, {"input_ids": ids, "attention_mask": mask})
    logits = own.logits.float()
    truth = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None].to(logits.device))[..., 0]
    assert ours.token_logps is not None and ours.loss is not None
    if bool((logits <= torch.finfo(own.logits.dtype).min).any()):  # Chameleon's image tokens
        raise ValueError(
            f"model: {type(model).__name__} takes tokens out of its vocabulary by logits of -inf, or the lowest float; "
            "a fused head would leave them in"
        )
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
