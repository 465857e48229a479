"""Unpaired losses: by hand, on every path, against their pair form and against TRL's KTOTrainer."""

from __future__ import annotations

from math import log
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdpo import dpo_loss, kto_kl, linear_unpaired_loss, unpaired_loss
from fastdpo.losses import LOSSES

UNPAIRED = [name for name, row in LOSSES.items() if row.side is not None]


def completions() -> tuple[Tensor, Tensor, Tensor]:
    """Three of one token, probability 0.8, 0.5, 0.4 over a vocabulary of 2; reference ln 0.4, ln 0.5, ln 0.8."""
    p = torch.tensor([[0.8], [0.5], [0.4]], dtype=torch.float64)
    logits, labels = torch.stack([(1 - p).log(), p.log()], dim=-1), torch.ones(3, 1, dtype=torch.int64)
    return logits, labels, torch.tensor([0.4, 0.5, 0.8], dtype=torch.float64).log()


@pytest.mark.parametrize(
    ("options", "losses"),
    [
        # log-ratios ln 2, 0, -ln 2; desirable, desirable, undesirable
        (dict(), [1 / 3, 1 / 2, 1 / 3]),
        (dict(kl=log(2)), [1 / 2, 2 / 3, 1 / 5]),
        (dict(kl=torch.tensor(log(2)), desirable_weight=0.5, undesirable_weight=2), [1 / 4, 1 / 3, 2 / 5]),
        (dict(kl=torch.tensor([log(2), 0, log(2)])), [1 / 2, 1 / 2, 1 / 5]),
        (dict(loss_type="apo_zero"), [1 / 3, 1 / 2, 1 / 3]),
        (dict(loss_type="bco_pair"), [-log(2 / 3), -log(1 / 2), -log(2 / 3)]),
    ],
    ids=str,
)
def test_by_hand(options: dict[str, Any], losses: list[float]) -> None:
    logits, labels, ref = completions()
    out = unpaired_loss(logits, labels, torch.tensor([True, True, False]), ref, beta=1, **options)
    assert out.loss.item() == pytest.approx(sum(losses) / 3, rel=1e-7)
    assert out.logps.tolist() == pytest.approx([log(0.8), log(0.5), log(0.4)])
    assert out.rewards.tolist() == pytest.approx([log(2), 0, -log(2)], abs=1e-12)


@pytest.mark.parametrize("loss_type", UNPAIRED)
def test_equals_the_pair_form(loss_type: str) -> None:
    logits, labels, ref = torch.randn(6, 5, 11), torch.randint(0, 11, (6, 5)), -12 * torch.rand(6)
    desirable = torch.arange(6) < 3
    pairs = dpo_loss(logits, labels, ref, beta=0.7, loss_type=loss_type)
    out = unpaired_loss(logits, labels, desirable, ref, beta=0.7, loss_type=loss_type)
    # kto's pair form is the mean of its two sides, the others' the sum
    torch.testing.assert_close(pairs.loss, out.loss * (1 if loss_type == "kto" else 2))
    torch.testing.assert_close(torch.cat([pairs.chosen_rewards, pairs.rejected_rewards]), out.rewards)


@pytest.mark.parametrize("shift", [False, True])
def test_packed_equals_padded(backend: str, shift: bool) -> None:
    """An odd number of sequences; from hidden and from logits; the reference per token."""
    lengths = torch.tensor([6, 0, 3])
    keep = torch.arange(6)[None] < lengths[:, None]
    hidden, weight, bias = torch.randn(3, 6, 16, requires_grad=True), torch.randn(301, 16), torch.randn(301)
    labels = torch.where(keep, torch.randint(0, 301, (3, 6)), -100)
    desirable, ref = torch.tensor([True, True, False]), -5 * torch.rand(3, 6)
    keywords = dict(beta=0.2, kl=0.3, shift=shift, backend=backend, undesirable_weight=1.5)
    cu_seqlens = torch.tensor([0, 6, 6, 9])
    for more in (dict(), dict(length_normalize=True)):
        keywords |= more
        padded = linear_unpaired_loss(hidden, weight, labels, desirable, ref, bias=bias, **keywords)
        packed = linear_unpaired_loss(
            hidden[keep], weight, labels[keep], desirable, ref[keep], bias=bias, cu_seqlens=cu_seqlens, **keywords
        )
        logits = unpaired_loss(hidden @ weight.T + bias, labels, desirable, ref, **keywords)
        for out in (packed, logits):
            torch.testing.assert_close(out.loss, padded.loss, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(out.rewards, padded.rewards, rtol=1e-5, atol=1e-5)
            grads = [torch.autograd.grad(x.loss, hidden, retain_graph=True)[0] for x in (out, padded)]
            torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


def test_kto_kl() -> None:
    logps = torch.tensor([1.0, 4.0], requires_grad=True)
    assert kto_kl(logps, torch.tensor([0.0, 1.0])).item() == 2
    assert kto_kl(logps, torch.tensor([9.0, 9.0])).item() == 0
    assert not kto_kl(logps, torch.zeros(2)).requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(loss_type="sigmoid"), "loss_type: loss 'sigmoid' needs pairs, expected one of bco_pair, apo_zero, kto"),
        (dict(loss_type="ktoo"), "unknown loss 'ktoo', expected one of bco_pair, apo_zero, kto; did you mean 'kto'"),
        (dict(loss_type="bco_pair", kl=0.1), "kl: loss 'bco_pair' does not use it"),
        (dict(desirable_weight=-1), r"desirable_weight: expected a number in \[0, inf\], got -1"),
        (dict(desirable=torch.ones(3)), r"desirable: expected a bool tensor \[3\], got torch.float32 \[3\]"),
        (dict(desirable=torch.ones(2).bool()), r"desirable: expected a bool tensor \[3\], got torch.bool \[2\]"),
        (dict(ref_logps=torch.zeros(2)), r"ref_logps: .*shape \[3\].*, got \[2\]"),
        (dict(kl=torch.zeros(2)), r"kl: expected shape \[\] or \[3\], got \[2\]"),
        (dict(beta=0), "beta: expected a finite number above 0"),
    ],
    ids=str,
)
def test_errors(options: dict[str, Any], message: str) -> None:
    logits, labels, _ = completions()
    with pytest.raises(ValueError, match=message):
        unpaired_loss(logits, labels, **dict(desirable=torch.ones(3).bool()) | options)


def test_kto_kl_of_nothing() -> None:
    for logps, ref in ((torch.zeros(0), torch.zeros(0)), (torch.zeros(3, 1), torch.zeros(3))):
        with pytest.raises(ValueError, match="logps, ref_logps: expected"):
            kto_kl(logps, ref)
