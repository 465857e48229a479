"""Metrics by hand; with packed batches, several betas and references of both kinds."""

from __future__ import annotations

from math import log

import pytest
import torch

from fastdpo import dpo_loss, preference_metrics
from fastdpo.head import TokenLogps

STATS = ("entropy", "mean_logits", "is_top1")


def two_pairs():
    """Probability of the label over a vocabulary of 2: chosen (0.8, 0.5) and (0.6); rejected (0.25) and none."""
    p = torch.tensor([[0.8, 0.5], [0.6, 0.9], [0.25, 0.9], [0.9, 0.9]], dtype=torch.float64)
    labels = torch.tensor([[1, 1], [1, -100], [1, -100], [-100, -100]])
    return torch.stack([(1 - p).log(), p.log()], dim=-1), labels


def test_by_hand() -> None:
    logits, labels = two_pairs()
    ref = torch.tensor([[0.4, 0.5], [0.3, 0.1], [0.5, 0.1], [0.1, 0.1]], dtype=torch.float64).log()
    metrics = preference_metrics(dpo_loss(logits, labels, ref, beta=2, stats=STATS), ref)
    ln = {key: value.item() for key, value in metrics.items()}
    # log-ratios: chosen ln 2 and ln 2; rejected -ln 2 and 0
    assert ln["rewards/chosen"] == pytest.approx(2 * log(2))
    assert ln["rewards/rejected"] == pytest.approx(-log(2))
    assert ln["rewards/margins"] == pytest.approx(3 * log(2))
    assert ln["rewards/accuracies"] == 1
    assert ln["logps/chosen"] == pytest.approx((log(0.4) + log(0.6)) / 2)
    assert ln["logps/rejected"] == pytest.approx(log(0.25) / 2)
    assert (ln["lengths/chosen"], ln["lengths/rejected"]) == (1.5, 0.5)
    entropies = [-p * log(p) - (1 - p) * log(1 - p) for p in (0.8, 0.5, 0.6, 0.25)]
    assert ln["entropy"] == pytest.approx(sum(entropies) / 4)
    means = [(log(p) + log(1 - p)) / 2 for p in (0.8, 0.5, 0.6)]
    assert ln["logits/chosen"] == pytest.approx(sum(means) / 3)
    assert ln["logits/rejected"] == pytest.approx((log(0.25) + log(0.75)) / 2)
    assert ln["mean_token_accuracy"] == pytest.approx(2 / 3)  # of 0.5 and 0.5, the first is the top: not the label
    # ratios p/p_ref over the four tokens: 2, 1, 2, 1/2
    assert ln["kl/completion"] == pytest.approx((log(2) + 0 + log(2) - log(2)) / 4)
    assert ln["kl/policy_sample"] == pytest.approx(((1 / 2 - 1 + log(2)) * 2 + (2 - 1 - log(2))) / 4)


def test_what_was_not_asked_for_is_not_there() -> None:
    logits, labels = two_pairs()
    metrics = preference_metrics(dpo_loss(logits, labels))
    assert set(metrics) == {
        f"{name}/{side}" for name in ("rewards", "logps", "lengths") for side in ("chosen", "rejected")
    } | {"rewards/margins", "rewards/accuracies"}
    sums = torch.zeros(4)
    assert "kl/policy_sample" not in preference_metrics(dpo_loss(logits, labels, sums), sums)
    assert all(not value.requires_grad for value in metrics.values())


def test_accuracy_ties_and_several_betas() -> None:
    logits, labels = two_pairs()
    metrics = preference_metrics(dpo_loss(logits[[1, 1, 1, 0]], labels[[1, 1, 1, 0]], betas=[0.1, 1.0]))
    assert metrics["rewards/accuracies"].tolist() == [0.5, 0.5]  # equal; ln 0.6 above ln 0.4
    assert metrics["rewards/margins"].tolist() == pytest.approx([0.05 * log(1.5), 0.5 * log(1.5)])
    assert metrics["logps/chosen"].shape == ()


def test_packed_equals_padded() -> None:
    logits, labels = two_pairs()
    keep = labels != -100
    padded = dpo_loss(logits, labels, stats=STATS)
    packed = dpo_loss(logits[keep], labels[keep], stats=STATS, cu_seqlens=torch.tensor([0, 2, 3, 4, 4]))
    ref = torch.full((4, 2), -0.7)
    expected, found = preference_metrics(padded, ref), preference_metrics(packed, ref[keep][None])
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value)


def test_no_pairs() -> None:
    out = dpo_loss(torch.randn(0, 3, 5), torch.zeros(0, 3, dtype=torch.int64), stats=STATS)
    assert isinstance(out.stats, TokenLogps)
    assert all(value == 0 for value in preference_metrics(out, torch.zeros(0)).values())


def test_errors() -> None:
    logits, labels = two_pairs()
    out = dpo_loss(logits, labels)
    with pytest.raises(ValueError, match=r"ref_logps: .*shape \[4\].*, got \[3\]"):
        preference_metrics(out, torch.zeros(3))
