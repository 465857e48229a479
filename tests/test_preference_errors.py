"""dpo_loss where there is nothing to learn from, with all options, and its errors."""

from __future__ import annotations

import math

import pytest
import torch
from preference_kit import batch

from fastdpo import TokenLogps, dpo_loss, kto_kl, linear_dpo_loss, loss_of_tokens, preference_metrics, sequence_logps
from fastdpo.losses import LOSSES, LossOptions, Pairs

TOKENS, LABELS = TokenLogps(-torch.rand(4, 3)), torch.zeros(4, 3).long()
OPTIONS = dict(
    token_weights=torch.rand(4, 7),
    ld_alpha=0.4,
    gamma=0.2,
    f_divergence_type="js_divergence",
    use_weighting=True,
    pair_weights=torch.rand(2),
    alpha=0.3,
    label_smoothing=0.1,
)


def test_options_packed_equal_padded(backend: str) -> None:
    """Everything at once, from hidden and from logits, with the reference per token."""
    hidden, weight, labels, _ = batch()
    lengths = torch.tensor([7, 3, 2, 5])
    keep = torch.arange(7)[None] < lengths[:, None]
    labels = torch.where(keep, torch.randint(0, 301, (4, 7)), -100)
    ref = -6 * torch.rand(4, 7)
    cu_seqlens = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    for shift in (False, True):
        hidden.requires_grad_()
        keywords = OPTIONS | dict(shift=shift, backend=backend, beta=torch.tensor([0.1, 0.3]))
        padded = linear_dpo_loss(hidden, weight, labels, ref, **keywords)
        keywords |= dict(cu_seqlens=cu_seqlens, token_weights=keywords["token_weights"][keep])
        packed = linear_dpo_loss(hidden[keep], weight, labels[keep], ref[keep], **keywords)
        logits = dpo_loss((hidden @ weight.T)[keep], labels[keep], ref[keep], **keywords)
        for out in (packed, logits):
            torch.testing.assert_close(out.loss, padded.loss, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(out.chosen_logps, padded.chosen_logps, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(
                *(torch.autograd.grad(x.loss, hidden, retain_graph=True)[0] for x in (out, padded)),
                rtol=1e-4,
                atol=1e-6,
            )


@pytest.mark.parametrize("pairs", [0, 1])
def test_nothing_to_learn_from(backend: str, pairs: int) -> None:
    """No pairs, and a pair of fully masked sequences: finite loss, zero gradient."""
    h = torch.randn(2 * pairs, 4, 8, requires_grad=True)
    labels = torch.full((2 * pairs, 4), -100)
    out = linear_dpo_loss(h, torch.randn(20, 8), labels, torch.zeros(2 * pairs), backend=backend)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(math.log(2) if pairs else 0.0)
    assert h.grad.count_nonzero() == 0


def losses_of(**keywords) -> None:
    logits = torch.randn(4, 3, 7)
    arguments = dict(labels=torch.zeros(4, 3, dtype=torch.int64), ref_logps=None) | keywords
    dpo_loss(arguments.pop("logits", logits), **arguments)


PACKED = dict(logits=torch.randn(12, 7), labels=torch.zeros(12, dtype=torch.int64))


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        (dict(logits=torch.randn(3, 3, 7), labels=torch.zeros(3, 3).long()), "labels: a pair batch .* got 3"),
        (dict(ref_logps=torch.zeros(3)), r"ref_logps: .*shape \[4\].*, got \[3\]"),
        (dict(ref_logps=torch.zeros(4, 5)), r"ref_logps: .*shape \[4\], or per token, .* \[4, 3\], got \[4, 5\]"),
        (dict(ref_logps=torch.tensor([0, 0, float("nan"), 0])), r"ref_logps: expected finite .* got nan at \[2\]"),
        (dict(loss_type="sigmiod"), "unknown loss 'sigmiod', .*did you mean 'sigmoid'"),
        (dict(loss_type="hinge", label_smoothing=0.1), "label_smoothing: loss 'hinge' does not use it"),
        (dict(label_smoothing=0.5), r"label_smoothing: expected a number in \[0, 0.5\), got 0.5"),
        (dict(beta=0.0), "beta: expected a finite number above 0, got 0.0"),
        (
            PACKED | dict(cu_seqlens=torch.tensor([0, 4, 11])),
            "cu_seqlens: expected to start at 0 and end at N=12, got 0 and 11",
        ),
        (PACKED | dict(cu_seqlens=torch.tensor([1, 4, 12])), "cu_seqlens: expected to start at 0"),
        (PACKED | dict(cu_seqlens=torch.tensor([0, 8, 4, 8, 12])), "cu_seqlens: expected values that never fall"),
        (
            PACKED | dict(cu_seqlens=torch.tensor([0, 4, 8, 12])),
            "cu_seqlens: a pair batch needs an even number .* got 3",
        ),
        (dict(cu_seqlens=torch.tensor([0, 4, 12])), r"labels: expected packed \[N\]"),
        (dict(labels=torch.zeros(12).long(), logits=torch.randn(12, 7)), r"labels: expected \[2B, T\]"),
    ],
)
def test_errors(keywords: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        losses_of(**keywords)


def test_wrong_types() -> None:
    with pytest.raises(TypeError, match="ref_logps: expected a float32 tensor"):
        losses_of(ref_logps=[0.0] * 4)
    with pytest.raises(TypeError, match="cu_seqlens: expected an int64 or int32 tensor, got torch.float32"):
        losses_of(**PACKED, cu_seqlens=torch.tensor([0.0, 4.0, 12.0]))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: loss_of_tokens(3, LABELS), TypeError, "tokens: expected fastdpo.TokenLogps, got int"),
        (lambda: loss_of_tokens(TOKENS, LABELS.float()), TypeError, "labels: expected an int64 or int32 tensor"),
        (lambda: loss_of_tokens(TOKENS, LABELS[:, :2]), ValueError, r"tokens.logps: .* \[4, 2\], got \[4, 3\]"),
        (lambda: loss_of_tokens(TOKENS, LABELS.to("meta")), ValueError, "tokens.logps: expected on meta like labels"),
        (lambda: sequence_logps(TOKENS.logps, LABELS.to("meta")), ValueError, "token_logps: expected on meta like lab"),
        (lambda: sequence_logps(TOKENS.logps, LABELS.float()), TypeError, "labels: expected an int64 or int32 tensor"),
        (lambda: preference_metrics(3), TypeError, "out: expected fastdpo.PreferenceOutput, got int"),
        (lambda: kto_kl(torch.zeros(3), [1.0]), TypeError, "ref_logps: expected a tensor, got list"),
    ],
)
def test_what_comes_after_the_head(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_pairs_split() -> None:
    pairs = Pairs.split(torch.arange(4.0), None, torch.ones(4))
    assert pairs.chosen.tolist() == [0, 1] and pairs.rejected.tolist() == [2, 3]
    assert LOSSES["hinge"](pairs, LossOptions(beta=0.25)).tolist() == [1.5, 1.5]  # margins -2
