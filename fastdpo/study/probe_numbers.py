"""What a probe measures of a policy and a reference: pure functions of their logps, in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from ..cache import Entries
from ..losses import LossOptions, Pairs, sigmoid
from .measures import clustered
from .probe_scores import Scores

SATISFIED, FULL = 0.1, 0.9  # gradient weights: below the one a pair is satisfied, above the other it pulls in full


class Estimate(NamedTuple):
    """A mean and its standard error (NaN where one pair is all there is)."""

    value: float
    se: float


class AtBeta(NamedTuple):
    """How a run with this beta starts. Weights: d loss / d(beta h) of each pair, without its sign, in (0, 1)."""

    beta: float
    loss: Estimate  # DPO's sigmoid loss at the first step, mean over pairs
    weight_mean: float
    weight_p10: float
    weight_p50: float
    weight_p90: float
    effective_share: float  # Kish: (sum w)^2 / (n sum w^2); 1 if all pairs have the same weight
    satisfied: float  # share of pairs whose weight is below SATISFIED
    full: float  # share of pairs whose weight is above FULL


class SampledKL(NamedTuple):
    """KL(policy || reference) on the policy's own answers."""

    answers: int
    tokens: int
    per_token: Estimate  # nats; sum of log-ratios over sum of tokens
    per_answer: Estimate  # nats; mean of the answers' log-ratios, unbiased
    nonnegative: Estimate  # nats per token; mean of exp(d) - 1 - d, d = log p_ref - log p


class Compatibility(NamedTuple):
    """A reference beside a policy, on n pairs. Log-ratios are log p_policy - log p_ref, nats."""

    name: str
    model: str
    is_policy: bool  # the same weights, scored alike
    same_tokens: bool
    chosen_per_token: Estimate | None  # None: tokens are others
    rejected_per_token: Estimate | None
    chosen_per_answer: Estimate
    rejected_per_answer: Estimate
    margin: Estimate  # h: the log-ratio of chosen less that of rejected
    sampled: SampledKL | None
    ranks_right: float  # share of pairs with log p_ref(chosen) > log p_ref(rejected); a tie is wrong
    ranks_right_normalized: float  # the same of logps per token
    agreement: float  # share of pairs that policy and reference rank alike
    at: list[AtBeta]


def compare(
    name: str,
    policy: Scores,
    reference: Scores,
    betas: Sequence[float],
    answers: tuple[Entries, Entries, Sequence[int]] | None = None,
) -> Compatibility:
    """All measures of one reference.

    Args:
        answers: the policy's own, as `sampled_kl` takes them; None: there are none.
    """
    chosen, rejected = (
        ours.logp - theirs.logp
        for ours, theirs in ((policy.chosen, reference.chosen), (policy.rejected, reference.rejected))
    )
    same = reference.same_tokens
    return Compatibility(
        name=name,
        model=reference.model,
        is_policy=policy.id == reference.id,
        same_tokens=same,
        chosen_per_token=estimate(chosen, policy.chosen.counts) if same else None,
        rejected_per_token=estimate(rejected, policy.rejected.counts) if same else None,
        chosen_per_answer=estimate(chosen),
        rejected_per_answer=estimate(rejected),
        margin=estimate(chosen - rejected),
        sampled=sampled_kl(*answers) if answers is not None and same else None,
        ranks_right=float(right(reference).mean()),
        ranks_right_normalized=float(right(reference, normalized=True).mean()),
        agreement=float((right(policy) == right(reference)).mean()),
        at=start(policy, reference, betas),
    )


def right(scores: Scores, normalized: bool = False) -> np.ndarray:
    """bool [n]: whether the model gives the chosen completion the higher logp, or with `normalized` logp per token."""
    chosen, rejected = (
        side.logp / np.maximum(side.counts, 1) if normalized else side.logp for side in (scores.chosen, scores.rejected)
    )
    return chosen > rejected


def start(policy: Scores, reference: Scores, betas: Sequence[float]) -> list[AtBeta]:
    """The first step's losses and gradient weights, per beta, of `fastdpo.losses` and autograd."""
    logps, ref_logps, lengths = (
        torch.from_numpy(np.concatenate(sides).astype(np.float64))
        for sides in (
            (policy.chosen.logp, policy.rejected.logp),
            (reference.chosen.logp, reference.rejected.logp),
            (policy.chosen.counts, policy.rejected.counts),
        )
    )
    logps.requires_grad_()
    found = []
    for beta in betas:
        losses = sigmoid(Pairs.split(logps, ref_logps, lengths), LossOptions(beta))
        (gradient,) = torch.autograd.grad(losses.sum(), logps)
        # d loss / d log p(chosen) = -beta w
        weights = (-gradient.chunk(2)[0] / beta).numpy()
        low, median, high = np.quantile(weights, [0.1, 0.5, 0.9])
        found.append(
            AtBeta(
                beta=beta,
                loss=estimate(losses.detach().numpy()),
                weight_mean=float(weights.mean()),
                weight_p10=float(low),
                weight_p50=float(median),
                weight_p90=float(high),
                effective_share=effective_share(weights),
                satisfied=float((weights < SATISFIED).mean()),
                full=float((weights > FULL).mean()),
            )
        )
    return found


def effective_share(weights: np.ndarray) -> float:
    """(sum w)^2 / (n sum w^2) of n nonnegative weights: Kish's effective sample size as a share; 0 if all are 0."""
    largest = weights.max()
    if largest == 0:
        return 0.0
    scaled = weights / largest  # squares of tiny weights would vanish
    return float(scaled.sum() ** 2 / (len(scaled) * (scaled**2).sum()))


def sampled_kl(policy: Entries, reference: Entries, prompts: Sequence[int]) -> SampledKL:
    """Estimates of KL(policy || reference) from n answers that the policy wrote; prompts are independent.

    Args:
        policy, reference: the answers scored by each, with token logps.
        prompts: n, which answers are to the same prompt.
    """
    ratios = policy.logp - reference.logp
    k3 = []
    for ours, theirs in zip(policy.token_logps, reference.token_logps, strict=True):
        d = theirs.astype(np.float64) - ours
        k3.append((np.expm1(d) - d).sum())
    return SampledKL(
        answers=len(ratios),
        tokens=int(policy.counts.sum()),
        per_token=estimate(ratios, policy.counts, prompts),
        per_answer=estimate(ratios, clusters=prompts),
        nonnegative=estimate(np.array(k3), policy.counts, prompts),
    )


def estimate(values: np.ndarray, weights: np.ndarray | None = None, clusters: Sequence[int] | None = None) -> Estimate:
    """sum(values) / sum(weights), weights 1 by default, over independent clusters, by default each value one."""
    clusters = range(len(values)) if clusters is None else clusters
    value, se = clustered(values, clusters, None if weights is None else weights.tolist())
    return Estimate(value, se if len(set(clusters)) > 1 else math.nan)
