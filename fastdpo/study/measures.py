"""What is measured of a policy: on held-out pairs, and on answers that it samples. All numbers are floats or None.

Standard errors are over held-out pairs, or over prompts: tokens of one answer depend on each other, and answers to one
prompt too, so a prompt is one draw. Of a ratio of sums (tokens, answers) it is the linearised one (Cochran 1977,
"Sampling Techniques", eq. 6.13).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

import numpy as np

from .sampling import Answer

Measures = dict[str, float | None]
GRAM = 4  # of `repetition`


class PairLogps(NamedTuple):
    """Sequence logps of n pairs, nats."""

    chosen: np.ndarray  # float64 [n]
    rejected: np.ndarray  # float64 [n]


def on_pairs(
    policy: PairLogps, start: PairLogps, reference: PairLogps | None, beta: float, chosen_tokens: int
) -> Measures:
    """Of held-out pairs under one reward, beta (log p(y|x) - reference).

    Args:
        policy, start: log p(y|x) of the policy and of the start model.
        reference: what the reward subtracts; None: nothing (the posterior).
        chosen_tokens: of all chosen completions.

    Returns:
        reward_accuracy, reward_accuracy_se: share of pairs whose chosen reward is above the rejected one.
        reward_margin, reward_margin_se: chosen less rejected reward, mean.
        chosen_displacement, rejected_displacement: log p(y|x) of a completion less that of the start model, mean.
        chosen_displacement_token: the same per token, over all chosen tokens.
        chosen_falls: share of pairs whose chosen completion is less likely than under the start model.
    """
    margin = policy.chosen - policy.rejected
    if reference is not None:
        margin = margin - (reference.chosen - reference.rejected)
    moved = policy.chosen - start.chosen
    accuracy, accuracy_se = mean(margin > 0)
    reward, reward_se = mean(beta * margin)
    return {
        "reward_accuracy": accuracy,
        "reward_accuracy_se": accuracy_se,
        "reward_margin": reward,
        "reward_margin_se": reward_se,
        "chosen_displacement": mean(moved)[0],
        "rejected_displacement": mean(policy.rejected - start.rejected)[0],
        "chosen_displacement_token": float(moved.sum() / max(1, chosen_tokens)),
        "chosen_falls": mean(moved < 0)[0],
    }


def on_answers(answers: SequenceOf[Answer]) -> Measures:
    """Of sampled answers alone.

    Returns:
        length, length_se: tokens of an answer, the end of text not counted.
        repetition, repetition_se: share of an answer's 4-grams of tokens that it had before, mean over answers; 0 for
            answers of fewer tokens.
        empty: share of answers without a token.
        endless: share of answers that max_new_tokens cut off.
    """
    prompts = [one.prompt for one in answers]
    length, length_se = clustered([len(one.words) for one in answers], prompts)
    again, again_se = clustered([repetition(one.words) for one in answers], prompts)
    return {
        "length": length,
        "length_se": length_se,
        "repetition": again,
        "repetition_se": again_se,
        "empty": mean([not one.words for one in answers])[0],
        "endless": mean([not one.ended for one in answers])[0],
    }


def of_scores(scores: SequenceOf[float], answers: SequenceOf[Answer]) -> Measures:
    """quality, quality_se: mean of the scorer's numbers."""
    quality, quality_se = clustered(scores, [one.prompt for one in answers])
    return {"quality": quality, "quality_se": quality_se}


def of_kl(name: str, kl: np.ndarray, answers: SequenceOf[Answer]) -> Measures:
    """kl_<name>, kl_<name>_se: nats per token, over all tokens; kl_<name>_sequence, ..._se: nats per answer.

    Args:
        kl: `[N]` of the answers' tokens, answer after answer (divergence.py).
    """
    lengths = [len(one.ids) for one in answers]
    ends = np.cumsum(lengths)
    totals = [float(kl[end - n : end].sum()) for end, n in zip(ends, lengths, strict=True)]
    prompts = [one.prompt for one in answers]
    per_token, per_token_se = clustered(totals, prompts, lengths)
    per_answer, per_answer_se = clustered(totals, prompts)
    return {
        f"kl_{name}": per_token,
        f"kl_{name}_se": per_token_se,
        f"kl_{name}_sequence": per_answer,
        f"kl_{name}_sequence_se": per_answer_se,
    }


def repetition(tokens: SequenceOf[int]) -> float:
    """Share of the n-grams of a text that are repeats of an earlier one; 0 where there is none."""
    grams = Counter(tuple(tokens[i : i + GRAM]) for i in range(len(tokens) - GRAM + 1))
    return 1 - len(grams) / grams.total() if grams else 0.0


def mean(values: SequenceOf[float] | np.ndarray) -> tuple[float, float]:
    """(mean, its standard error) of independent values; the error of a single one is 0."""
    return clustered(values, range(len(values)))


def clustered(
    values: SequenceOf[float] | np.ndarray, clusters: SequenceOf[int], weights: SequenceOf[float] | None = None
) -> tuple[float, float]:
    """(sum of values / sum of weights, its standard error over independent clusters).

    Args:
        values: totals of the weight that stands beside them.
        clusters: which belong together.
        weights: None: 1 each, so the mean.
    """
    _, at = np.unique(np.asarray(clusters), return_inverse=True)
    value = np.bincount(at, np.asarray(values, np.float64))
    weight = np.bincount(at, None if weights is None else np.asarray(weights, np.float64)).astype(np.float64)
    ratio = value.sum() / weight.sum()
    n = len(value)
    spread = float(((value - ratio * weight) ** 2).sum())
    return float(ratio), float(np.sqrt(spread * n / max(1, n - 1)) / weight.sum())
