"""The metrics of a preference batch, from log-probabilities and the head's statistics: no logits needed."""

from __future__ import annotations

import torch
from torch import Tensor

from .batch import make_reference
from .preference import PreferenceOutput
from .sequences import lengths, reference_sums, sequence_sums


@torch.no_grad()
def preference_metrics(out: PreferenceOutput, ref_logps: Tensor | None = None) -> dict[str, Tensor]:
    """The metrics of one batch, by TRL's names; float, `[]` (rewards `[len(betas)]` with betas), on the device.

    Means are over pairs (rewards, logps, lengths) or over the tokens that count (the others). Only the check
    of ref_logps waits for the device.

    Args:
        out: what `dpo_loss` or `linear_dpo_loss` returned.
        ref_logps: the reference's logps, `[2B]` sums or per token, shaped like labels; not weighted, not normalised.

    Returns:
        rewards/chosen, rewards/rejected, rewards/margins, rewards/accuracies: of `out`; a tie counts as wrong.
        logps/chosen, logps/rejected: of `out`.
        lengths/chosen, lengths/rejected: tokens that count.
        entropy, logits/chosen, logits/rejected, mean_token_accuracy (of chosen): where the loss was asked for
            stats=("entropy", "mean_logits", "is_top1"). logits/*: the mean logit over the vocabulary.
        kl/completion: with ref_logps. mean(log p - log p_ref) over the tokens: how far the policy has moved on these
            completions. Estimates KL(p || p_ref) per token only if the policy wrote them, -KL(p_ref || p) if the
            reference did; may be negative.
        kl/policy_sample: with ref_logps per token. mean(exp(d) - 1 - d), d = log p_ref - log p (Schulman's k3,
            http://joschu.net/blog/kl-approx.html): estimates KL(p || p_ref) per token, never negative; unbiased if
            the policy wrote the completions.

    Raises:
        TypeError, ValueError: `out` of another function; ref_logps of another shape, or not finite.
    """
    if not isinstance(out, PreferenceOutput):
        raise TypeError(f"out: expected fastdpo.PreferenceOutput, got {type(out).__name__}")
    layout, stats = out.layout, out.stats
    counts = lengths(layout, stats.logps, "auto")
    tokens = counts.sum().clamp(min=1)
    chosen_tokens, rejected_tokens = (half.sum().clamp(min=1) for half in counts.chunk(2))

    def sums(values: Tensor) -> tuple[Tensor, Tensor]:
        """Over the tokens of each side; 0 where ignored."""
        flat = values.reshape(-1).to(stats.logps.dtype)
        chosen, rejected = sequence_sums(flat, layout, "auto").chunk(2)
        return chosen.sum(), rejected.sum()

    sides = {
        "rewards/chosen": out.chosen_rewards,
        "rewards/rejected": out.rejected_rewards,
        "rewards/margins": out.chosen_rewards - out.rejected_rewards,
        "rewards/accuracies": (out.chosen_rewards > out.rejected_rewards).to(out.chosen_rewards.dtype),
        "logps/chosen": out.chosen_logps,
        "logps/rejected": out.rejected_logps,
    }
    sides["lengths/chosen"], sides["lengths/rejected"] = counts.chunk(2)
    metrics = {name: values.sum(-1) / max(1, values.shape[-1]) for name, values in sides.items()}
    if stats.entropy is not None:
        metrics["entropy"] = sum(sums(stats.entropy)) / tokens
    if stats.mean_logits is not None:
        chosen, rejected = sums(stats.mean_logits)
        metrics["logits/chosen"], metrics["logits/rejected"] = chosen / chosen_tokens, rejected / rejected_tokens
    if stats.is_top1 is not None:
        metrics["mean_token_accuracy"] = sums(stats.is_top1)[0] / chosen_tokens
    ref = make_reference(ref_logps, layout)
    if ref is not None:
        ref_total = reference_sums(ref, layout, stats.logps, None, "auto")
        assert ref_total is not None
        metrics["kl/completion"] = (sum(sums(stats.logps)) - ref_total.sum()) / tokens
        if ref.per_token:
            d = ref.logps.to(stats.logps) - stats.logps.reshape(-1)  # 0 where ignored
            metrics["kl/policy_sample"] = sum(sums(d.exp() - 1 - d)) / tokens
    return metrics
