"""Every loss × option against TRL's own `DPOTrainer._compute_loss`: value and gradients of a small model."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch
from every_loss import needed, referenced
from torch import Tensor

pytest.importorskip("trl")

from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from fastdpo import demo_task, kto_kl, linear_dpo_loss, linear_token_logps, linear_unpaired_loss, preference_metrics
from fastdpo.losses import LOSSES
from fastdpo.losses.table import TRL_LOSSES

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

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


def models() -> tuple[Any, Any, Any]:
    """Policy, reference and tokenizer; the reference is not far from the policy, as in training."""
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
    with torch.no_grad():
        for mine, theirs in zip(reference.parameters(), policy.parameters(), strict=True):
            mine.copy_(theirs - 0.1 * mine)
    return policy, reference, tokenizer


def make_trainer(
    trainer_class: Any, config_class: Any, rows: list[dict[str, Any]], folder: Any, **settings: Any
) -> Any:
    policy, reference, tokenizer = models()
    args = config_class(
        output_dir=str(folder),
        per_device_train_batch_size=5,
        report_to="none",
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        **settings,
    )
    return trainer_class(
        model=policy,
        ref_model=reference,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


def test_trls_losses_are_these() -> None:
    """As TRL's own error names them."""
    source = inspect.getsource(DPOTrainer)
    (known,) = re.findall(r"Should be one of \[(.*?)\]", source, flags=re.DOTALL)
    assert set(re.findall(r"'(\w+)'", known)) == set(TRL_LOSSES) <= set(LOSSES)


PAIRS = [pair._asdict() for pair in demo_task.pairs(demo_task.prompts(0, 5), 0)]


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    # use_weighting: the head returns log_sum_sq_probs
    return make_trainer(DPOTrainer, DPOConfig, PAIRS, tmp_path_factory.mktemp("out"), use_weighting=True)


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

    # discopop's sigmoid(z / tau) multiplies the rounding of the logps by 1 / tau
    assert_same(mine.loss, my_gradients, theirs, their_gradients, 1e-4 if "discopop" in names else 2e-5)


@pytest.mark.parametrize("loss_type", ["sigmoid", "bco_pair"])
def test_metrics_equal_trl(trainer: Any, loss_type: str) -> None:
    """All that TRL logs of a batch, but from the head's statistics."""
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.loss_types, trainer.loss_weights, trainer.beta, trainer.ld_alpha = [loss_type], [1.0], 0.3, None
    trainer.f_divergence_type, trainer.use_weighting = "reverse_kl", False
    trainer._metrics["train"].clear()
    trainer._compute_loss(trainer.model, batch, False)
    theirs = {key: values[0] for key, values in trainer._metrics["train"].items() if key != "num_tokens"}

    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        hidden = trainer.ref_model.model(**inputs).last_hidden_state
        ref = linear_token_logps(hidden, trainer.ref_model.lm_head.weight, labels, shift=True).logps
        hidden, head = trainer.model.model(**inputs).last_hidden_state, trainer.model.lm_head.weight
        stats = ("entropy", "mean_logits", "is_top1")
        out = linear_dpo_loss(hidden, head, labels, ref, beta=0.3, loss_type=loss_type, shift=True, stats=stats)
    mine = {key: value.item() for key, value in preference_metrics(out).items()}
    assert {key for key in mine if not key.startswith("lengths/")} == theirs.keys()
    for key, value in theirs.items():
        assert mine[key] == pytest.approx(value, rel=1e-5, abs=1e-6), key


def assert_same(
    mine: Tensor, my_gradients: dict[str, Tensor], theirs: Tensor, their_gradients: dict[str, Tensor], rounding: float
) -> None:
    assert mine.item() == pytest.approx(theirs.item(), rel=1e-5, abs=1e-6)
    assert my_gradients.keys() == their_gradients.keys()
    norms = [torch.stack([g.norm() for g in found.values()]).norm() for found in (my_gradients, their_gradients)]
    assert norms[1] > 0
    torch.testing.assert_close(*norms, rtol=2e-5, atol=0)
    for name, gradient in their_gradients.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(my_gradients[name], gradient, rtol=1e-4, atol=rounding * scale)


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_unpaired_equals_trl(loss_type: str, tmp_path: Any) -> None:
    """KTO with the KL term of TRL's mismatched completions."""
    rows = [
        {"prompt": p["prompt"], "completion": p[side], "label": side == "chosen"}
        for p, side in zip(PAIRS, ("chosen", "rejected", "chosen", "chosen", "rejected"), strict=True)
    ]
    weights = dict(desirable_weight=0.7, undesirable_weight=1.3)
    trainer = make_trainer(
        KTOTrainer, KTOConfig, rows, tmp_path, loss_type=loss_type, train_sampling_strategy="sequential", **weights
    )
    trainer.model.train(False)
    batch = next(iter(trainer.get_train_dataloader()))
    theirs = trainer._compute_loss(trainer.model, batch, False)
    their_gradients = gradients(trainer.model, theirs)

    def sequences(model: Any, prefix: str = "") -> tuple[Tensor, Tensor]:
        inputs = {key: batch[prefix + key] for key in ("input_ids", "attention_mask")}
        labels = batch[prefix + "input_ids"].masked_fill(batch[prefix + "completion_mask"] == 0, -100)
        return model.model(**inputs).last_hidden_state, labels

    def logps(model: Any, prefix: str = "") -> Tensor:
        hidden, labels = sequences(model, prefix)
        return linear_token_logps(hidden, model.lm_head.weight, labels, shift=True).logps.sum(1)

    with torch.no_grad():
        ref = logps(trainer.ref_model)
        options = dict(loss_type="apo_zero")
        if loss_type == "kto":
            options = dict(kl=kto_kl(logps(trainer.model, "KL_"), logps(trainer.ref_model, "KL_")))
            assert options["kl"] > 0
    hidden, labels = sequences(trainer.model)
    head = trainer.model.lm_head.weight
    mine = linear_unpaired_loss(hidden, head, labels, batch["label"].bool(), ref, shift=True, **options, **weights)
    assert_same(mine.loss, gradients(trainer.model, mine.loss), theirs, their_gradients, 2e-5)
