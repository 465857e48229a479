"""dpo_loss: by hand, against plain PyTorch, packed and padded, its modules and its fused kernel."""

from __future__ import annotations

import math

import pytest
import torch
from every_loss import needed, referenced
from preference_kit import batch, pair_logits, plain
from torch import Tensor

import fastdpo
from fastdpo import BetaSchedule, dpo_loss, linear_dpo_loss
from fastdpo.losses import LOSSES


def test_hand_worked_sigmoid() -> None:
    """ref chosen ln 0.2, rejected ln 0.5: ratios ln 2 and ln 0.5, h = ln 4; beta 0.5: sigmoid(ln 2) = 2/3.

    loss = -ln(2/3); smoothed by 0.1: -0.9 ln(2/3) - 0.1 ln(1/3).
    """
    logits, labels = pair_logits()
    ref = torch.tensor([0.2, 0.5], dtype=torch.float64).log()
    out = dpo_loss(logits, labels, ref, beta=0.5)
    assert out.loss.item() == pytest.approx(-math.log(2 / 3), rel=1e-12)
    assert out.chosen_logps.item() == pytest.approx(math.log(0.4), rel=1e-12)
    assert out.rejected_logps.item() == pytest.approx(math.log(0.25), rel=1e-12)
    assert out.chosen_rewards.item() == pytest.approx(0.5 * math.log(2), rel=1e-12)
    assert out.rejected_rewards.item() == pytest.approx(-0.5 * math.log(2), rel=1e-12)
    smoothed = dpo_loss(logits, labels, ref, beta=0.5, label_smoothing=0.1)
    assert smoothed.loss.item() == pytest.approx(-0.9 * math.log(2 / 3) - 0.1 * math.log(1 / 3), rel=1e-12)


def test_hand_worked_reference_free() -> None:
    """h = ln 0.4 - ln 0.25 = ln 1.6; beta 1: loss = -ln(1.6 / 2.6)."""
    logits, labels = pair_logits()
    out = dpo_loss(logits, labels, beta=1.0)
    assert out.loss.item() == pytest.approx(-math.log(1.6 / 2.6), rel=1e-12)
    assert out.chosen_rewards.item() == pytest.approx(math.log(0.4), rel=1e-12)


def test_hand_worked_gradient() -> None:
    """d loss / d logit of the target = -beta sigmoid(-beta h) (1 - p) for chosen: -0.5 * 1/3 * (1 - p)."""
    logits, labels = pair_logits()
    logits.requires_grad_()
    ref = torch.tensor([0.2, 0.5], dtype=torch.float64).log()
    dpo_loss(logits, labels, ref, beta=0.5).loss.backward()
    torch.testing.assert_close(logits.grad[0, 0], torch.tensor([0.2, -0.2], dtype=torch.float64) * 0.5 / 3)
    torch.testing.assert_close(logits.grad[1, 0], torch.tensor([-0.75, 0.75], dtype=torch.float64) * 0.5 / 3)
    assert logits.grad[1, 1].count_nonzero() == 0


def test_hand_worked_hinge_and_ipo() -> None:
    """h = ln 4, beta 0.5. hinge: 1 - ln 2. ipo: ratios ln 2 over 2 tokens, -ln 2 over 1: (1.5 ln 2 - 1)^2."""
    logits, labels = pair_logits()
    ref = torch.tensor([0.2, 0.5], dtype=torch.float64).log()
    hinge = dpo_loss(logits, labels, ref, beta=0.5, loss_type="hinge").loss.item()
    assert hinge == pytest.approx(1 - math.log(2), rel=1e-12)
    ipo = dpo_loss(logits, labels, ref, beta=0.5, loss_type="ipo").loss.item()
    assert ipo == pytest.approx((1.5 * math.log(2) - 1) ** 2, rel=1e-12)


@pytest.mark.parametrize("referenced", [True, False])
@pytest.mark.parametrize("pairs", [1, 3])
def test_value_and_gradient(backend: str, referenced: bool, pairs: int) -> None:
    hidden, weight, labels, ref = batch(pairs)
    ref = ref if referenced else None
    h64, w64 = hidden.double().requires_grad_(), weight.double().requires_grad_()
    truth = plain(h64 @ w64.T, labels, None if ref is None else ref.double(), 0.1)
    true_grads = torch.autograd.grad(truth, [h64, w64])
    hidden.requires_grad_()
    weight.requires_grad_()
    out = linear_dpo_loss(hidden, weight, labels, ref, backend=backend)
    torch.testing.assert_close(out.loss.double(), truth, rtol=1e-5, atol=1e-6)
    for grad, true in zip(torch.autograd.grad(out.loss, [hidden, weight]), true_grads, strict=True):
        torch.testing.assert_close(grad.double(), true, rtol=1e-4, atol=1e-6)
    logits = (hidden @ weight.T).detach().requires_grad_()
    from_logits = dpo_loss(logits, labels, ref, backend=backend)
    bare = fastdpo.DPOFunction.apply(logits, labels, ref, 0.1)
    torch.testing.assert_close(from_logits.loss, out.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(bare, from_logits.loss)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (bare, from_logits.loss)))
    per_token = -5 * torch.rand(labels.shape)
    bare, from_logits = fastdpo.DPOFunction.apply(logits, labels, per_token), dpo_loss(logits, labels, per_token)
    torch.testing.assert_close(bare, from_logits.loss)
    counted = dpo_loss(logits, labels, (per_token * (labels != -100)).sum(1), backend=backend)
    torch.testing.assert_close(from_logits.loss, counted.loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss_type", list(LOSSES))
@pytest.mark.parametrize("shift", [False, True])
def test_packed_equals_padded(backend: str, loss_type: str, shift: bool) -> None:
    """Sequences of length 7, 3, 0, 5: same loss and gradients without the padding, from hidden and from logits."""
    if backend == "triton" and loss_type not in ("sigmoid", "ipo"):
        pytest.skip("the head knows no loss: its interpreter runs the fused one, and one that is not")
    hidden, weight, labels, ref = batch()
    lengths = [7, 3, 0, 5]
    labels = torch.randint(0, 301, (4, 7))
    for row, length in enumerate(lengths):
        labels[row, length:] = -100
    keep = torch.arange(7)[None] < torch.tensor(lengths)[:, None]
    cu_seqlens = torch.tensor([0, 7, 10, 10, 15], dtype=torch.int32)
    keywords = dict(loss_type=loss_type, shift=shift, backend=backend) | needed(loss_type)
    ref = ref if referenced(loss_type) else None

    def run(hidden: Tensor, labels: Tensor, **more) -> tuple[Tensor, Tensor, Tensor]:
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        out = linear_dpo_loss(h, w, labels, ref, **keywords, **more)
        out.loss.backward()
        logits = dpo_loss(hidden @ weight.T, labels, ref, **keywords, **more)
        torch.testing.assert_close(logits.loss, out.loss, rtol=1e-5, atol=1e-5)
        return out, h.grad, w.grad

    padded, padded_dx, padded_dw = run(hidden, labels)
    packed, packed_dx, packed_dw = run(hidden[keep], labels[keep], cu_seqlens=cu_seqlens)
    torch.testing.assert_close(packed.loss, padded.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(packed.chosen_logps, padded.chosen_logps, rtol=1e-5, atol=1e-5)
    assert packed.rejected_logps[0] == 0  # the empty sequence
    torch.testing.assert_close(packed_dx, padded_dx[keep], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(packed_dw, padded_dw, rtol=1e-4, atol=1e-6)
    with_one = run(hidden[keep][None], labels[keep][None], cu_seqlens=cu_seqlens)[0]  # [1, N], as Hugging Face packs
    assert torch.equal(with_one.loss, packed.loss)


def test_stats_stay_differentiable() -> None:
    """An NLL term on the chosen logps and an entropy bonus beside the loss."""
    hidden, weight, labels, ref = batch()
    h = hidden.double().requires_grad_()
    out = linear_dpo_loss(h, weight.double(), labels, ref.double(), stats=("entropy",))
    (grad,) = torch.autograd.grad(out.loss - out.stats.logps[:2].sum() - 0.1 * out.stats.entropy.sum(), h)
    h2 = hidden.double().requires_grad_()
    logits = h2 @ weight.double().T
    log_p = torch.log_softmax(logits, -1)
    counted = labels != -100
    logps = log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * counted
    entropy = -(log_p.exp() * log_p).sum(-1) * counted
    total = plain(logits, labels, ref.double(), 0.1) - logps[:2].sum() - 0.1 * entropy.sum()
    torch.testing.assert_close(grad, torch.autograd.grad(total, h2)[0])
    for detached in out[1:5]:
        assert not detached.requires_grad


def test_modules() -> None:
    hidden, weight, labels, ref = batch()
    module = fastdpo.LinearDPOLoss(beta=0.3, shift=True, stats=("lse",))
    expected = linear_dpo_loss(hidden, weight, labels, ref, beta=0.3, shift=True, stats=("lse",))
    assert torch.equal(module(hidden, weight, labels, ref).loss, expected.loss)
    assert "beta=0.3" in repr(module)
    from_logits = fastdpo.DPOLoss(beta=0.3, loss_type="hinge")(hidden @ weight.T, labels, ref)
    assert torch.equal(from_logits.loss, dpo_loss(hidden @ weight.T, labels, ref, beta=0.3, loss_type="hinge").loss)
    with pytest.raises(ValueError, match="unknown loss 'nope'"):
        fastdpo.DPOLoss(loss_type="nope")
    with pytest.raises(ValueError, match="unknown stat 'x'"):
        fastdpo.LinearDPOLoss(stats=("x",))
    with pytest.raises(TypeError, match=r"bete: not a keyword of dpo_loss; did you mean 'beta'\?; expected some of .*"):
        fastdpo.DPOLoss(bete=0.1)
    with pytest.raises(ValueError, match="label_smoothing: loss 'hinge' does not use it"):
        fastdpo.DPOLoss(loss_type="hinge", label_smoothing=0.1)


def test_modules_take_tensors_at_the_call() -> None:
    hidden, weight, labels, ref = batch()
    per_batch = dict(pair_weights=torch.rand(2), beta=torch.rand(2), token_weights=torch.rand(4, 7))
    expected = linear_dpo_loss(hidden, weight, labels, ref, shift=True, gamma=0.1, **per_batch)
    module = fastdpo.LinearDPOLoss(shift=True, gamma=0.1)
    assert torch.equal(module(hidden, weight, labels, ref, **per_batch).loss, expected.loss)
    with pytest.raises(TypeError, match="shift: not a keyword of the call; expected some of beta"):
        module(hidden, weight, labels, ref, shift=False)


def test_beta_schedule() -> None:
    hidden, weight, labels, ref = batch()
    schedule = BetaSchedule(0.4, 0.1, 30)
    assert [schedule(step) for step in (0, 10, 30, 99)] == pytest.approx([0.4, 0.3, 0.1, 0.1])
    assert [BetaSchedule(0.4, 0.1, 30, "cosine")(step) for step in (0, 10, 15, 30)] == pytest.approx(
        [0.4, 0.325, 0.25, 0.1]
    )
    expected = linear_dpo_loss(hidden, weight, labels, ref, beta=0.3)
    scheduled = linear_dpo_loss(hidden, weight, labels, ref, beta=schedule, step=10)
    torch.testing.assert_close(scheduled.loss, expected.loss)
    torch.testing.assert_close(scheduled.chosen_rewards, expected.chosen_rewards)
    module = fastdpo.LinearDPOLoss(beta=lambda step: 0.1 * (step + 1))
    torch.testing.assert_close(module(hidden, weight, labels, ref, step=2).loss, expected.loss)
    with pytest.raises(TypeError, match="step: beta is a schedule"):
        module(hidden, weight, labels, ref)
    with pytest.raises(ValueError, match="shape: unknown 'quadratic'"):
        BetaSchedule(0.4, 0.1, 30, "quadratic")


def test_beta_and_gamma_per_pair() -> None:
    """Each pair as if alone, with its own numbers."""
    logits, labels, ref = torch.randn(6, 5, 11).double(), torch.randint(0, 11, (6, 5)), -10 * torch.rand(6).double()
    beta, gamma, weights = torch.tensor([0.1, 0.5, 2.0]), torch.tensor([0.0, 1.0, -0.3]), torch.tensor([1.0, 0.2, 3.0])
    for loss_type in ("sigmoid", "hinge", "robust", "discopop"):
        together = dpo_loss(
            logits,
            labels,
            ref,
            loss_type=loss_type,
            beta=beta.double(),
            gamma=gamma.double(),
            pair_weights=weights.double(),
        )
        alone = [
            dpo_loss(
                logits[i::3], labels[i::3], ref[i::3], loss_type=loss_type, beta=float(beta[i]), gamma=float(gamma[i])
            )
            for i in range(3)
        ]
        expected = sum(float(weights[i]) * out.loss for i, out in enumerate(alone)) / 3
        torch.testing.assert_close(together.loss, expected, rtol=1e-6, atol=1e-9)
        rewards = torch.cat([out.chosen_rewards for out in alone])
        torch.testing.assert_close(together.chosen_rewards, rewards, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    "loss_type",
    [
        *(name for name, row in LOSSES.items() if "betas" in row.uses),
        lambda pairs, options: -options.beta * pairs.margin,
    ],
)
def test_several_betas_of_one_head_pass(loss_type, monkeypatch) -> None:
    hidden, weight, labels, ref = batch()
    keywords = dict(loss_type=loss_type) | (needed(loss_type) if isinstance(loss_type, str) else {})
    ref = ref if not isinstance(loss_type, str) or referenced(loss_type) else None
    betas = [0.05, 0.1, 1.0]
    one_by_one = [linear_dpo_loss(hidden, weight, labels, ref, beta=beta, **keywords) for beta in betas]
    heads = []
    spied = fastdpo.preference.from_hidden
    monkeypatch.setattr(fastdpo.preference, "from_hidden", lambda *a, **k: heads.append(1) or spied(*a, **k))
    hidden.requires_grad_()
    out = linear_dpo_loss(hidden, weight, labels, ref, betas=betas, **keywords)
    assert len(heads) == 1
    assert out.loss.shape == (3,) and out.chosen_rewards.shape == (3, 2)
    torch.testing.assert_close(out.loss, torch.stack([one.loss for one in one_by_one]))
    torch.testing.assert_close(out.rejected_rewards, torch.stack([one.rejected_rewards for one in one_by_one]))
    (grad,) = torch.autograd.grad(out.loss[1], hidden)
    (alone,) = torch.autograd.grad(linear_dpo_loss(hidden, weight, labels, ref, beta=0.1, **keywords).loss, hidden)
    torch.testing.assert_close(grad, alone)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_the_fused_kernel_equals_the_table(backend: str, label_smoothing: float, per_token: bool, monkeypatch) -> None:
    hidden, weight, labels, ref = batch(3)
    ref = -5 * torch.rand(labels.shape) if per_token else ref
    keywords = dict(beta=0.3, label_smoothing=label_smoothing, backend=backend)
    results = []
    calls = []
    spied = fastdpo.pair_kernel.PairSigmoid.apply
    monkeypatch.setattr(fastdpo.pair_kernel.PairSigmoid, "apply", lambda *a: calls.append(1) or spied(*a))
    for fused in (True, False):
        h = hidden.clone().requires_grad_()
        if not fused:
            monkeypatch.setattr(fastdpo.pair_kernel, "fits", lambda recipe: False)
        out = linear_dpo_loss(h, weight, labels, ref, **keywords)
        results.append((*out[:5], torch.autograd.grad(out.loss, h)[0]))
        assert len(calls) == 1, "the fused kernel, and only at first"
    for kernel, table in zip(*results, strict=True):
        torch.testing.assert_close(kernel, table, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "keywords",
    [
        dict(gamma=0.1),
        dict(alpha=0.1),
        dict(betas=[0.1]),
        dict(beta=torch.tensor([0.1, 0.2])),
        dict(pair_weights=torch.ones(2)),
        dict(token_weights=torch.ones(4, 7)),
        dict(ld_alpha=0.5),
        dict(use_weighting=True),
        dict(length_normalize=True),
        dict(loss_weights=[2.0]),
        dict(f_divergence_type="forward_kl"),
        dict(loss_type=["sigmoid", "sigmoid"]),
    ],
    ids=str,
)
def test_the_fused_kernel_is_for_the_plain_sigmoid_only(keywords: dict, monkeypatch) -> None:
    hidden, weight, labels, ref = batch()
    monkeypatch.setattr(fastdpo.pair_kernel.PairSigmoid, "apply", lambda *a: pytest.fail("the fused kernel ran"))
    linear_dpo_loss(hidden, weight, labels, ref, **keywords)
