"""Hugging Face transformers: any causal LM computes its loss and token log-probabilities without logits.

    from fastdpo.integrations.transformers import fused_head

    fused_head(model)                                # in place; unfuse_head(model) undoes it
    out = model(input_ids, attention_mask=mask, labels=labels)
    out.loss, out.token_logps                        # no logits; without labels the model answers as before

and preference tuning with the plain Trainer:

    from fastdpo.integrations.transformers import PreferenceCollator, PreferenceLoss

    Trainer(fused_head(model), args, PreferenceCollator(pad_token_id), rows, compute_loss_func=PreferenceLoss(beta=0.1))
"""

try:
    import transformers as _transformers  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"fastdpo.integrations.transformers needs transformers: pip install transformers ({error})"
    ) from error

from .compute import FusedOutput
from .forward import fused_head, is_fused, unfuse_head
from .preference import PreferenceCollator, PreferenceLoss, add_reference

__all__ = [
    "FusedOutput",
    "PreferenceCollator",
    "PreferenceLoss",
    "add_reference",
    "fused_head",
    "is_fused",
    "unfuse_head",
]
