"""Every loss × option against TRL's own `DPOTrainer._compute_loss`: value and gradients of a small model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from every_loss import needed, referenced
from torch import Tensor

pytest.importorskip("trl")

from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer

from fastdpo import demo_task, linear_dpo_loss, linear_token_logps
from fastdpo.losses import LOSSES

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

TRL_LOSSES = [
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
]
DIVERGENCES = [
    dict(f_divergence_type="forward_kl"),
    dict(f_divergence_type="js_divergence"),
    dict(f_divergence_type="alpha_divergence"),
    dict(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=1.5),
    dict(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=1.0),
]


def cases() -> list[Any]:
    """(loss_type, options), every option that the loss uses in TRL."""
    found = []
    for name in TRL_LOSSES:
        uses = LOSSES[name].uses
        options: list[dict[str, Any]] = [{}, dict(beta=0.37)]
        options += [dict(ld_alpha=0.0), dict(ld_alpha=0.4), dict(ld_alpha=1.0)] if "ld_alpha" in uses else []
        # TRL's in-place product with the weights raises in hinge (autograd) and in sft (an expanded tensor)
        options += [dict(use_weighting=True)] if "use_weighting" in uses and name not in ("hinge", "sft") else []
        options += DIVERGENCES if "f_divergence_type" in uses else []
        # TRL ignores it in sigmoid and sigmoid_norm, where here it is cDPO's
        smoothed = "label_smoothing" in uses and not name.startswith("sigmoid")
        options += [dict(label_smoothing=0.15)] if smoothed else []
        options += [dict(discopop_tau=0.8)] if "discopop_tau" in uses else []
        found += [(name, given) for given in options]
    return [
        *found,
        (["sigmoid", "bco_pair", "sft"], dict(loss_weights=[0.8, 0.2, 1.0])),  # MPO
        (["sigmoid", "sft"], dict(f_divergence_type="forward_kl", ld_alpha=0.3)),
        (["hinge", "robust", "aot"], dict(label_smoothing=0.1, loss_weights=[0.5, -1.0, 2.0])),
        (["ipo", "nca_pair"], dict(ld_alpha=0.5, use_weighting=True)),
    ]


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    torch.manual_seed(0)
    tokenizer = demo_task.tokenizer()
    config = LlamaConfig(
        vocab_size=203,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.1,
    )
    policy, reference = LlamaForCausalLM(config), LlamaForCausalLM(config)
    with torch.no_grad():  # a reference not far from the policy, as in training
        for mine, theirs in zip(reference.parameters(), policy.parameters(), strict=True):
            mine.copy_(theirs + 0.1 * mine)
    return DPOTrainer(
        model=policy,
        ref_model=reference,
        args=DPOConfig(
            output_dir=str(tmp_path_factory.mktemp("out")),
            per_device_train_batch_size=5,
            use_weighting=True,  # so that the head returns log_sum_sq_probs
            report_to="none",
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_list([p._asdict() for p in demo_task.pairs(demo_task.prompts(0, 5), 0)]),
        processing_class=tokenizer,
    )


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("loss_type", "options"), cases(), ids=str)
def test_equals_trl(trainer: Any, loss_type: str | list[str], options: dict[str, Any]) -> None:
    model, batch = trainer.model, next(iter(trainer.get_train_dataloader()))
    names = [loss_type] if isinstance(loss_type, str) else loss_type
    given = {key: value for name in names for key, value in needed(name).items()} | options
    trainer.loss_types, trainer.loss_weights = names, given.get("loss_weights", [1.0] * len(names))
    trainer.beta = given.get("beta", 0.1)
    trainer.label_smoothing = given.get("label_smoothing", 0.0)
    trainer.ld_alpha = given.get("ld_alpha")
    trainer.use_weighting = given.get("use_weighting", False)
    trainer.args.discopop_tau = given.get("discopop_tau", 0.05)
    trainer.f_divergence_type = given.get("f_divergence_type", "reverse_kl")
    trainer.f_alpha_divergence_coef = given.get("f_alpha_divergence_coef", 0.5)
    theirs = trainer._compute_loss(model, batch, False)
    their_gradients = gradients(model, theirs)

    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    ref = None
    if any(referenced(name) for name in names):
        with torch.no_grad():
            hidden = trainer.ref_model.model(**inputs).last_hidden_state
            ref = linear_token_logps(hidden, trainer.ref_model.lm_head.weight, labels, shift=True).logps
    hidden = model.model(**inputs).last_hidden_state
    mine = linear_dpo_loss(hidden, model.lm_head.weight, labels, ref, loss_type=loss_type, shift=True, **given)
    my_gradients = gradients(model, mine.loss)

    assert mine.loss.item() == pytest.approx(theirs.item(), rel=1e-5, abs=1e-6)
    assert my_gradients.keys() == their_gradients.keys()
    norms = [torch.stack([g.norm() for g in found.values()]).norm() for found in (my_gradients, their_gradients)]
    assert norms[1] > 0
    torch.testing.assert_close(*norms, rtol=2e-5, atol=0)
    for name, gradient in their_gradients.items():
        # discopop's sigmoid(z / tau) multiplies the rounding of the logps by 1 / tau
        scale = float(gradient.abs().max())
        torch.testing.assert_close(
            my_gradients[name], gradient, rtol=1e-4, atol=(1e-4 if "discopop" in names else 2e-5) * scale
        )
