"""The table of losses: a user's own, names, schedules, and the errors of options that a loss does not use."""

from __future__ import annotations

import ast
import math
from math import log
from pathlib import Path
from typing import Any

import pytest
import torch
from every_loss import needed, referenced
from loss_kit import F64, loss_of, one_pair
from torch import Tensor

import fastdpo
from fastdpo import BetaSchedule, LinearDPOLoss, dpo_loss, sequence_logps, token_logps
from fastdpo.losses import LOSSES, Loss, LossOptions, Pairs


def squared(pairs: Pairs, options: LossOptions) -> Tensor:
    return (1 - options.beta * pairs.margin) ** 2


def test_callable() -> None:
    assert loss_of(squared, beta=0.5) == pytest.approx((1 - log(2)) ** 2)
    assert loss_of([squared, "sigmoid"], beta=0.5, loss_weights=[2, 1]) == pytest.approx(
        2 * (1 - log(2)) ** 2 - log(2 / 3)
    )
    assert loss_of(Loss(squared, length_normalize=True), beta=1) == pytest.approx((1 - 1.5 * log(2)) ** 2)
    with pytest.raises(
        ValueError, match=r"loss_type: expected a loss that returns one number per pair, \[1\], got \[\]"
    ):
        loss_of(lambda pairs, options: pairs.margin.sum())
    with pytest.raises(TypeError, match="loss_type: expected a name, a callable or a list of them, got 3"):
        loss_of(3)


def test_row_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOSSES, "squared", Loss(squared, uses=frozenset({"ref_logps"})))
    assert loss_of("squared", beta=0.5) == pytest.approx((1 - log(2)) ** 2)
    with pytest.raises(ValueError, match="gamma: loss 'squared' does not use it"):
        loss_of("squared", gamma=1)


def test_a_row_called_is_that_loss() -> None:
    """With its own averages, gamma, NLL term and no reference where it has none; options of one's own go before."""
    ref = one_pair()[2]
    logps = torch.tensor([0.4, 0.25], dtype=F64).log()
    pairs = Pairs.split(logps, ref, torch.tensor([2, 1], dtype=F64))
    for name, row in LOSSES.items():
        smoothing = needed(name)
        expected = loss_of(name, beta=0.7, **smoothing)
        assert row(pairs, LossOptions(beta=0.7, **smoothing)).item() == pytest.approx(expected), name
    assert LOSSES["simpo"](pairs, LossOptions(beta=2, gamma=0)).item() == pytest.approx(-log(6.4 / 7.4))


@pytest.mark.parametrize(
    ("name", "suggested"),
    [
        *(("IPO", "'ipo'"), ("SimPO", "'simpo'"), ("exo", "'exo_pair'"), ("nca", "'nca_pair'"), ("bco", "'bco_pair'")),
        *(("apo", "'apo_zero' or 'apo_down'"), ("sppo", "'sppo_hard'"), ("dpo", "'sigmoid'"), ("kto_pair", "'kto'")),
        ("dop", "'sigmoid'"),
    ],
)
def test_suggestions(name: str, suggested: str) -> None:
    with pytest.raises(ValueError, match=f"unknown loss {name!r}, .*; did you mean {suggested}\\?"):
        loss_of(name)


def test_modules_take_the_batch_at_the_call() -> None:
    for name in ("cu_seqlens", "bias"):
        with pytest.raises(TypeError, match=f"{name}: comes with the batch, expected at the call"):
            LinearDPOLoss(**{name: torch.zeros(1)})


def test_schedule_steps() -> None:
    for steps in (0.5, 0, True):
        with pytest.raises(ValueError, match="steps: expected an int of at least 1, got"):
            BetaSchedule(0.1, 0.2, steps)


@pytest.mark.parametrize(
    ("loss_type", "options", "message"),
    [
        ("sigmoid_nrom", {}, "loss_type: unknown loss 'sigmoid_nrom', .*did you mean 'sigmoid_norm'"),
        (["sigmoid", "hing"], {}, "unknown loss 'hing', .*did you mean 'hinge'"),
        ([], {}, "loss_type: expected at least one loss"),
        (
            "hinge",
            dict(label_smoothing=0.1),
            "label_smoothing: loss 'hinge' does not use it, got 0.1; those that do: sigm",
        ),
        ("sigmoid", dict(discopop_tau=0.1), "discopop_tau: loss 'sigmoid' does not use it.* those that do: discopop"),
        ("sigmoid", dict(kl=1.0), "kl: loss 'sigmoid' does not use it.*those that do: kto"),
        ("ipo", dict(gamma=1.0), "gamma: loss 'ipo' does not use it"),
        ("bco_pair", dict(f_divergence_type="forward_kl"), "f_divergence_type: loss 'bco_pair' does not use it"),
        (["sigmoid", "bco_pair"], dict(f_divergence_type="forward_kl"), "f_divergence_type: loss 'bco_pair' does not"),
        ("sft", dict(f_divergence_type="forward_kl"), "f_divergence_type: loss 'sft' does not use it"),
        ("sft", dict(ld_alpha=0.5), "ld_alpha: loss 'sft' does not use it"),
        ("simpo", dict(parameterization="posterior"), "parameterization: loss 'simpo' does not use it"),
        ("aot", dict(use_weighting=True), "use_weighting: loss 'aot' does not use it"),
        (["sigmoid", "aot"], dict(pair_weights=torch.ones(1)), "pair_weights: loss 'aot' does not use it; those"),
        ("aot", dict(beta=torch.ones(1)), "beta: one value per pair: loss 'aot' does not use it"),
        ("aot_unpaired", dict(gamma=torch.ones(1)), "gamma: one value per pair: loss 'aot_unpaired' does not use it"),
        ("exo_pair", {}, "label_smoothing: loss 'exo_pair' needs it above 0"),
        (
            "sigmoid",
            dict(f_alpha_divergence_coef=0.7),
            "f_alpha_divergence_coef: f_divergence_type='reverse_kl' does not",
        ),
        ("sigmoid", dict(f_divergence_type="forward-kl"), "f_divergence_type: unknown 'forward-kl'.*mean 'forward_kl'"),
        ("sigmoid", dict(parameterization="ration"), "parameterization: unknown 'ration'.*mean 'ratio'"),
        ("sigmoid", dict(ld_alpha=1.5), r"ld_alpha: expected a number in \[0, 1\], got 1.5"),
        ("sigmoid", dict(alpha=-1), r"alpha: expected a number in \[0, inf\], got -1"),
        ("sigmoid", dict(gamma=math.nan), "gamma: expected a finite number, got nan"),
        ("discopop", dict(discopop_tau=0), "discopop_tau: expected a finite number above 0, got 0"),
        ("sigmoid", dict(loss_weights=[1, 2]), "loss_weights: expected one number per loss, 1, got 2"),
        ("sigmoid", dict(betas=[0.1, 0]), "betas: expected a finite number above 0, got 0"),
        ("sigmoid", dict(betas=[0.1], beta=0.2), "betas: expected beta or betas, got both"),
        ("sigmoid", dict(pair_weights=torch.ones(3)), r"pair_weights: expected shape \[1\], got \[3\]"),
        ("sigmoid", dict(beta=torch.ones(3)), r"beta: expected shape \[1\] or \[\], got \[3\]"),
        ("sigmoid", dict(beta=torch.zeros(1)), r"beta: expected finite numbers above 0, got 0.0 at \[0\]"),
        ("sigmoid", dict(gamma=torch.tensor([math.inf])), r"gamma: expected finite numbers, got inf at \[0\]"),
        ("sigmoid", dict(token_weights=torch.ones(2)), r"token_weights: expected shape \[2, 2\], got \[2\]"),
        ("sigmoid", dict(pair_weights=torch.ones(1, requires_grad=True)), "pair_weights: expected a constant"),
        ("kto", dict(kl=torch.ones(2)), r"kl: expected shape \[\], got \[2\]"),
    ],
    ids=str,
)
def test_errors(loss_type: Any, options: dict[str, Any], message: str) -> None:
    logits, labels, _ = one_pair()
    with pytest.raises(ValueError, match=message):
        dpo_loss(logits, labels, loss_type=loss_type, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(lable_smoothing=0.1), "lable_smoothing: not a keyword of dpo_loss; did you mean 'label_smoothing'"),
        (dict(gama=0.1), "gama: not a keyword of dpo_loss; did you mean 'gamma'"),
        (dict(use_weighting=1), "use_weighting: expected True or False, got 1"),
        (dict(length_normalize="yes"), "length_normalize: expected True or False, got 'yes'"),
        (dict(pair_weights=[1.0]), "pair_weights: expected a float tensor, got list"),
        (dict(pair_weights=torch.ones(1).long()), "pair_weights: expected a float tensor, got torch.int64"),
        (dict(betas=0.1), "betas: expected a list of numbers, got 0.1"),
        (dict(beta="0.1"), "beta: expected a number, got '0.1'"),
        (dict(beta=lambda step: 0.1), "step: beta is a schedule, which needs the step as an int, got None"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_wrong_types(options: dict[str, Any], message: str) -> None:
    logits, labels, _ = one_pair()
    with pytest.raises(TypeError, match=message):
        dpo_loss(logits, labels, **options)


def test_reference_that_the_loss_does_not_have() -> None:
    logits, labels, ref = one_pair()
    for name in LOSSES:
        if not referenced(name):
            with pytest.raises(ValueError, match="ref_logps: the loss has no reference, expected None"):
                dpo_loss(logits, labels, ref, loss_type=name)


def test_sequence_logps_errors() -> None:
    logits, labels, _ = one_pair()
    logps = token_logps(logits, labels).logps
    assert sequence_logps(logps, labels).tolist() == pytest.approx([log(0.4), log(0.25)])
    with pytest.raises(ValueError, match=r"token_logps: expected the shape of labels, \[2, 2\], got \[2\]"):
        sequence_logps(logps[0], labels)
    with pytest.raises(ValueError, match=r"ld_alpha: expected a number in \[0, 1\], got 2"):
        sequence_logps(logps, labels, ld_alpha=2)
    with pytest.raises(ValueError, match="backend: unknown backend 'xx', expected one of auto"):
        sequence_logps(logps, labels, backend="xx")
    with pytest.raises(TypeError, match="shift: expected True or False, got 1"):
        sequence_logps(logps, labels, shift=1)
    with pytest.raises(TypeError, match="shift: expected True or False, got 1"):
        dpo_loss(logits, labels, shift=1)


def test_beta_that_would_be_ignored() -> None:
    for options, message in (
        (dict(loss_type="sft", betas=[0.1, 0.2]), "betas: loss 'sft' does not use it"),
        (dict(loss_type="sft", beta=torch.tensor(0.3)), "beta: loss 'sft' does not use it"),
        (dict(step=3), "step: beta is no schedule"),
        (dict(beta=lambda step: 0.1, step=3, betas=[0.1]), "betas: expected betas or a schedule of beta, got both"),
    ):
        with pytest.raises(ValueError, match=message):
            loss_of(**{"loss_type": "sigmoid"} | options)


def test_a_module_asks_its_schedule_at_the_call_alone() -> None:
    module = fastdpo.DPOLoss(beta=lambda step: 1 / step)
    logits, labels, ref = one_pair()
    expected = fastdpo.dpo_loss(logits, labels, ref, beta=0.25).loss
    assert torch.equal(module(logits, labels, ref, step=4).loss, expected)


def test_losses_are_named_in_their_table_alone() -> None:
    """Elsewhere: the fused kernel of the sigmoid loss, the peers' interfaces, defaults of signatures and fields."""
    package = Path(fastdpo.__file__).parent
    found = []
    for path in sorted(package.rglob("*.py")):
        place = path.relative_to(package).as_posix()
        if place.startswith(("losses/", "integrations/")) or place == "pair_kernel.py":
            continue
        tree = ast.parse(path.read_text())
        defaults = {
            node
            for function in ast.walk(tree)
            if isinstance(function, ast.FunctionDef)
            for node in (*function.args.defaults, *function.args.kw_defaults)
        }
        fields = [node.value for node in ast.walk(tree) if isinstance(node, ast.AnnAssign) and node.value]
        defaults |= {node for field in fields for node in ast.walk(field)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and node.value in LOSSES and node not in defaults:
                found.append(f"{place}:{node.lineno} {node.value}")
    assert not found
