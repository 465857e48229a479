"""Every loss by hand, and its options."""

from __future__ import annotations

import math
from functools import partial
from math import exp, log, sqrt
from typing import Any

import pytest
import torch
from every_loss import needed
from loss_kit import F64, loss_of, one_pair

from fastdpo import dpo_loss, sequence_logps
from fastdpo.losses import LOSSES, LossOptions, Pairs
from fastdpo.losses.divergences import F_DIVERGENCES

# sigmoid(ln 2) = 2/3, sigmoid(ln 4) = 4/5
BY_HAND = [
    ("sigmoid", dict(beta=1), -log(4 / 5)),
    ("sigmoid", dict(beta=1, label_smoothing=0.1), -0.9 * log(4 / 5) - 0.1 * log(1 / 5)),
    ("sigmoid", dict(beta=1, gamma=log(2)), -log(2 / 3)),
    ("sigmoid_norm", dict(beta=2), -log(8 / 9)),  # h = ln(2)/2 + ln(2)/1; beta h = ln 8
    ("hinge", dict(beta=0.5), 1 - log(2)),
    ("hinge", dict(beta=1, gamma=2), 3 - log(4)),
    ("hinge", dict(beta=1), 0),
    ("ipo", dict(beta=0.5), (1.5 * log(2) - 1) ** 2),
    ("ipo", dict(beta=0.5, length_normalize=False), (log(4) - 1) ** 2),
    ("robust", dict(beta=1, label_smoothing=0.1), (-0.9 * log(4 / 5) + 0.1 * log(1 / 5)) / 0.8),
    ("exo_pair", dict(beta=1, label_smoothing=0.1), 0.8 * log(0.8 / 0.9) + 0.2 * log(0.2 / 0.1)),
    ("discopop", dict(beta=1, discopop_tau=1), 0.2 * -log(4 / 5) + 0.8 / 4),
    ("nca_pair", dict(beta=1), -log(2 / 3) - 0.5 * log(1 / 3) - 0.5 * log(2 / 3)),
    ("bco_pair", dict(beta=1), -2 * log(2 / 3)),
    ("sppo_hard", dict(beta=0.5), 2 * (log(2) - 1) ** 2),
    ("aot", dict(beta=1), -log(4 / 5)),  # one pair: nothing to sort
    ("aot_unpaired", dict(beta=1, label_smoothing=0.1), -0.9 * log(4 / 5) - 0.1 * log(1 / 5)),
    ("apo_zero", dict(beta=1), 1 / 3 + 1 / 3),
    ("apo_down", dict(beta=1), 2 / 3 + 1 / 5),
    ("kto", dict(beta=1), 1 / 3),
    ("kto", dict(beta=1, kl=log(2)), (1 / 2 + 1 / 5) / 2),
    # h = ln(0.4 / 0.25) = ln 1.6, and the NLL -ln(0.4)/2
    ("cpo", dict(beta=1), -log(1.6 / 2.6) - log(0.4) / 2),
    ("cpo", dict(beta=1, alpha=0), -log(1.6 / 2.6)),
    # beta h = 2 (ln(0.4)/2 - ln 0.25) = ln 6.4
    ("simpo", dict(beta=2), -log(1 / (1 + exp(0.5) / 6.4))),
    ("simpo", dict(beta=2, gamma=0), -log(6.4 / 7.4)),
    # p_w = sqrt 0.4, odds of p_l = 0.25 are 1/3
    ("orpo", dict(beta=1, alpha=0), log(1 + (1 / 3) * (1 - sqrt(0.4)) / sqrt(0.4))),
    ("orpo", dict(beta=2), 2 * log(1 + (1 / 3) * (1 - sqrt(0.4)) / sqrt(0.4)) - log(0.4) / 2),
    ("sft", {}, -log(0.4) / 2),
]


def test_every_loss_is_worked_by_hand() -> None:
    assert {name for name, _, _ in BY_HAND} == set(LOSSES)


@pytest.mark.parametrize(("loss_type", "options", "expected"), BY_HAND, ids=str)
def test_by_hand(loss_type: str, options: dict[str, Any], expected: float) -> None:
    assert loss_of(loss_type, **options) == pytest.approx(expected, rel=1e-12, abs=1e-15)


def sequences(chosen: list[float], rejected: list[float], ref: list[float] | None = None) -> Pairs:
    logps = torch.tensor(chosen + rejected, dtype=F64)
    return Pairs.split(logps, None if ref is None else torch.tensor(ref, dtype=F64), torch.ones_like(logps))


def test_aot_sorts_over_the_batch() -> None:
    """aot: policy margins 3, -1 and reference margins 0, 2, sorted -1, 3 and 0, 2: z = -1, 1.
    aot_unpaired: chosen ratios 3, 0, rejected 1, -1, sorted 0, 3 and -1, 1: z = 1, 2."""
    pairs = sequences([3, 0], [0, 1], [0, 0, 0, -2])
    losses = LOSSES["aot"](pairs, LossOptions(beta=1))
    torch.testing.assert_close(losses, torch.tensor([log(1 + exp(1)), log(1 + exp(-1))], dtype=F64))
    pairs = sequences([3, 0], [1, -1])
    losses = LOSSES["aot_unpaired"](pairs, LossOptions(beta=1))
    torch.testing.assert_close(losses, torch.tensor([log(1 + exp(-1)), log(1 + exp(-2))], dtype=F64))


@pytest.mark.parametrize(
    ("options", "margin"),
    [
        (dict(f_divergence_type="forward_kl"), 1.5),  # 1 - 1/t: 1/2 and -1
        (dict(f_divergence_type="js_divergence"), log(2)),  # ln(2t / (t+1)): ln 4/3 and ln 2/3
        (dict(f_divergence_type="alpha_divergence"), sqrt(2)),  # 2 (1 - t^-1/2): 2 - sqrt 2 and 2 - 2 sqrt 2
        (dict(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=2), 1.5),  # t - 1: 1 and -1/2
        (dict(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=1), log(4)),
    ],
    ids=str,
)
def test_f_divergences(options: dict[str, Any], margin: float) -> None:
    """t = p/p_ref is 2 for chosen, 1/2 for rejected."""
    assert loss_of("sigmoid", beta=1, **options) == pytest.approx(log(1 + exp(-margin)), rel=1e-12)


DIVERGED = [(name, "reverse_kl", 1.0) for name in LOSSES] + [
    (name, divergence, alpha)
    for name, row in LOSSES.items()
    if "f_divergence_type" in row.uses
    for divergence in F_DIVERGENCES
    for alpha in ((0.5, 1.5, 2.0) if divergence == "alpha_divergence" else (0.5,))
]


@pytest.mark.parametrize(("loss_type", "divergence", "alpha"), DIVERGED)
def test_huge_log_ratios_are_finite(loss_type: str, divergence: str, alpha: float) -> None:
    """Value and gradient, in float32; sums of long completions are that large."""
    row = LOSSES[loss_type]
    ratios = [(a, b) for a in (-500.0, -100.0, 100.0, 500.0) for b in (-500.0, -100.0, 100.0, 500.0)]
    ref = torch.full((2,), -600.0)
    for ratio in ratios:
        logps = (ref + torch.tensor(ratio)).requires_grad_()
        pairs = Pairs.split(logps, ref, torch.ones(2), None, partial(F_DIVERGENCES[divergence], alpha=alpha))
        loss = row.function(pairs, LossOptions(label_smoothing=0.1)).sum()
        (grad,) = torch.autograd.grad(loss, logps)
        assert loss.isfinite() and grad.isfinite().all(), ratio


def test_parameterizations() -> None:
    logits, labels, ref = one_pair()
    loss = partial(dpo_loss, logits, labels, beta=1)
    assert loss(parameterization="posterior").loss.item() == pytest.approx(-log(1.6 / 2.6))
    # the unconditional reference logps of the completions: ln 0.2 and ln 0.5
    assert loss(ref, parameterization="likelihood").loss.item() == pytest.approx(-log(4 / 5))
    assert loss(ref, parameterization="ratio").loss.item() == pytest.approx(-log(4 / 5))
    with pytest.raises(ValueError, match="ref_logps: parameterization='posterior' has no reference"):
        loss(ref, parameterization="posterior")
    with pytest.raises(ValueError, match="ref_logps: parameterization='likelihood' needs"):
        loss(parameterization="likelihood")


def test_combinations() -> None:
    """MPO: 0.8 sigmoid + 0.2 bco + 1 sft."""
    parts = -0.8 * log(4 / 5) - 0.2 * 2 * log(2 / 3) - log(0.4) / 2
    names = ["sigmoid", "bco_pair", "sft"]
    assert loss_of(names, beta=1, loss_weights=[0.8, 0.2, 1.0]) == pytest.approx(parts)
    assert loss_of(tuple(names), beta=1) == pytest.approx(-log(4 / 5) - 2 * log(2 / 3) - log(0.4) / 2)
    # each with its own reference, gamma, length normalisation and NLL term
    together = loss_of(["sigmoid", "simpo", "cpo"], beta=2, loss_weights=[1, 0.5, 0.25])
    alone = [loss_of(name, beta=2) for name in ("sigmoid", "simpo", "cpo")]
    assert together == pytest.approx(alone[0] + 0.5 * alone[1] + 0.25 * alone[2])
    assert loss_of(["sigmoid", "cpo"], beta=1, alpha=0) == pytest.approx(-log(4 / 5) - log(1.6 / 2.6))


def test_nll_term() -> None:
    """RPO: alpha times -ln(0.4)/2; over all tokens of the batch, not over the means of its sequences."""
    assert loss_of("sigmoid", beta=1, alpha=0.3) == pytest.approx(-log(4 / 5) - 0.3 * log(0.4) / 2)
    logits, labels, _ = one_pair()
    logits, labels = logits[[0, 0, 1, 1]], torch.tensor([[1, 1], [1, -100], [1, 1], [1, 1]])
    assert dpo_loss(logits, labels, loss_type="sft").loss.item() == pytest.approx(-log(0.8 * 0.5 * 0.8) / 3)


def test_pair_weights_weigh_the_nll_of_each_pair() -> None:
    """Chosen of 2 tokens at 0.8 and 0.5 and of 1 at 0.8: with weights 3 and 0.5, (3 ln 0.4 + 0.5 ln 0.8) / 3."""
    logits, labels, _ = one_pair()
    logits, labels = logits[[0, 0, 1, 1]], torch.tensor([[1, 1], [1, -100], [1, 1], [1, 1]])
    weights, expected = torch.tensor([3, 0.5]), -(3 * log(0.4) + 0.5 * log(0.8)) / 3
    weighted = partial(dpo_loss, logits, labels, pair_weights=weights)
    assert weighted(loss_type="sft").loss.item() == pytest.approx(expected)
    for name in ("sigmoid", "cpo", "orpo"):
        term = weighted(loss_type=name, alpha=0.7).loss - weighted(loss_type=name, alpha=0).loss
        assert term.item() == pytest.approx(0.7 * expected)
    out = dpo_loss(logits, labels, loss_type="sft", use_weighting=True)
    # the weight of each pair: token p of 0.8, 0.5, 0.25, 0.9 have a sum p^2 of 0.68, 0.5, 0.625, 0.82
    rejected = sqrt(0.25 / 0.625 * 0.9 / 0.82)
    policy = [sqrt(0.8 / 0.68 * 0.5 / 0.5) * rejected, 0.8 / 0.68 * rejected]
    assert out.loss.item() == pytest.approx(-(policy[0] * log(0.4) + policy[1] * log(0.8)) / 3)


def test_wpo_weights() -> None:
    """Token p of 0.8, 0.5, 0.25 over two tokens: sum p^2 of 0.68, 0.5, 0.625; the weight gets no gradient."""
    weight = sqrt(0.8 / 0.68 * 0.5 / 0.5) * 0.25 / 0.625
    assert loss_of("sigmoid", beta=1, use_weighting=True) == pytest.approx(-weight * log(4 / 5))
    assert loss_of("sigmoid", beta=1, use_weighting=True, pair_weights=torch.tensor([3.0])) == pytest.approx(
        -3 * weight * log(4 / 5)
    )
    logits, labels, ref = one_pair()
    grads = []
    for options in ({}, dict(use_weighting=True)):
        logits.requires_grad_()
        grads.append(torch.autograd.grad(dpo_loss(logits, labels, ref, beta=1, **options).loss, logits)[0])
    torch.testing.assert_close(grads[1], weight * grads[0])


def test_ld_dpo() -> None:
    """One token is shared: the chosen logp is ln 0.8 + 0.5 ln 0.5; the reference, given per token, likewise."""
    logits, labels, _ = one_pair()
    ref = torch.tensor([[0.4, 0.5], [0.5, 0.1]], dtype=F64).log()
    out = dpo_loss(logits, labels, ref, beta=1, ld_alpha=0.5)
    assert out.chosen_logps.item() == pytest.approx(log(0.8) + 0.5 * log(0.5))
    assert out.loss.item() == pytest.approx(-log(4 / 5))  # the halves of ln 0.5 cancel: ln 2 + ln 2 again
    sums = sequence_logps(ref, labels, ld_alpha=0.5)
    assert sums.tolist() == pytest.approx([log(0.4) + 0.5 * log(0.5), log(0.5)])
    assert dpo_loss(logits, labels, sums, beta=1, ld_alpha=0.5).loss.item() == pytest.approx(out.loss.item())
    # the NLL term is not weighted
    with_nll = dpo_loss(logits, labels, ref, beta=1, ld_alpha=0.5, alpha=1)
    assert with_nll.loss.item() == pytest.approx(-log(4 / 5) - log(0.4) / 2)


def test_token_weights() -> None:
    """Weights 2, 0.5 on chosen, 3 on rejected: 2 ln 0.8 + 0.5 ln 0.5 and 3 ln 0.25; what stands at an ignored
    position does not matter."""
    logits, labels, _ = one_pair()
    weights = torch.tensor([[2, 0.5], [3, 7]])
    out = dpo_loss(logits, labels, beta=0.1, token_weights=weights)
    chosen, rejected = 2 * log(0.8) + 0.5 * log(0.5), 3 * log(0.25)
    assert (out.chosen_logps.item(), out.rejected_logps.item()) == pytest.approx((chosen, rejected))
    assert out.loss.item() == pytest.approx(log(1 + exp(-0.1 * (chosen - rejected))))
    # lengths stay counts of tokens
    normalized = dpo_loss(logits, labels, beta=0.1, token_weights=weights, length_normalize=True)
    assert normalized.chosen_logps.item() == pytest.approx(chosen / 2)
    # shifted with the labels: position t predicts labels[t+1], whose weight is token_weights[t+1]
    shifted = torch.tensor([[0, 1, 1], [0, 1, -100]])
    padded = torch.cat([logits, logits[:, :1]], dim=1)
    late = torch.tensor([[9, 2, 0.5], [9, 3, 7]])
    again = dpo_loss(padded, shifted, beta=0.1, token_weights=late, shift=True)
    assert again.loss.item() == pytest.approx(out.loss.item())
    both = dpo_loss(logits, labels, beta=0.1, token_weights=weights, ld_alpha=0.5)
    assert both.chosen_logps.item() == pytest.approx(2 * log(0.8) + 0.25 * log(0.5))


def test_token_weights_at_ignored_positions_and_packed() -> None:
    logits, labels, _ = one_pair()
    expected = dpo_loss(logits, labels, token_weights=torch.tensor([[2, 0.5], [3, 7]])).loss
    with_nan = dpo_loss(logits, labels, token_weights=torch.tensor([[2, 0.5], [3, math.nan]])).loss
    assert torch.equal(with_nan, expected)
    keep, packed = labels != -100, torch.tensor([2, 0.5, 3])
    for weights in (packed, packed[None]):
        loss = dpo_loss(logits[keep], labels[keep], cu_seqlens=torch.tensor([0, 2, 3]), token_weights=weights).loss
        torch.testing.assert_close(loss, expected)
    for shift in (False, True):
        with pytest.raises(ValueError, match=r"token_weights: expected shape \[2, 2\], got \[\]"):
            dpo_loss(logits, labels, token_weights=torch.tensor(1.0), shift=shift)
    with pytest.raises(ValueError, match=r"token_weights: expected finite numbers, got nan"):
        dpo_loss(logits, labels, token_weights=torch.tensor([[2, math.nan], [3, 7]]))


def test_length_normalization_of_any_loss() -> None:
    """Means: r_w = ln(2)/2, r_l = -ln 2."""
    expected = {
        "sigmoid": log(1 + exp(-1.5 * log(2))),
        "hinge": max(0.0, 1 - 1.5 * log(2)),
        "bco_pair": -log(sqrt(2) / (1 + sqrt(2))) - log(2 / 3),
        "kto": (1 / (1 + sqrt(2)) + 1 / 3) / 2,
    }
    for name, loss in expected.items():
        assert loss_of(name, beta=1, length_normalize=True) == pytest.approx(loss), name
    logits, labels, ref = one_pair()
    out = dpo_loss(logits, labels, ref, beta=2, length_normalize=True)
    assert out.chosen_logps.item() == pytest.approx(log(0.4) / 2)
    assert out.chosen_rewards.item() == pytest.approx(log(2))
    assert out.rejected_rewards.item() == pytest.approx(-2 * log(2))


def test_empty_completions_are_finite() -> None:
    logits = torch.randn(4, 3, 7, requires_grad=True)
    labels = torch.tensor([[1, 2, 3], [-100] * 3, [-100] * 3, [-100] * 3])
    for name in LOSSES:
        loss = dpo_loss(logits, labels, loss_type=name, **needed(name)).loss
        (grad,) = torch.autograd.grad(loss, logits)
        assert torch.isfinite(loss) and torch.isfinite(grad).all(), name
        assert grad[1:].count_nonzero() == 0, name
