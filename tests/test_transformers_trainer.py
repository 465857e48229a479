"""transformers' own Trainer on a model with a fused head: SFT as before, and preference pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")

import datasets
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from fastdpo import linear_dpo_loss, preference_metrics
from fastdpo.integrations.transformers import PreferenceCollator, PreferenceLoss, add_reference, fused_head, unfuse_head

VOCAB, PAD = 101, 0


@pytest.fixture(autouse=True)
def _no_poison():
    """transformers' own initialisation reads memory that torch.empty gave it."""
    torch.use_deterministic_algorithms(False)


def tiny() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB, pad_token_id=PAD, bos_token_id=None, eos_token_id=1, initializer_range=0.3, **sizes
        )
    )


def pairs(count: int = 5) -> Any:
    torch.manual_seed(1)
    ids = lambda n: torch.randint(2, VOCAB, (n,)).tolist()  # noqa: E731
    return datasets.Dataset.from_list(
        [{"prompt_ids": ids(2 + i), "chosen_ids": ids(3 + i), "rejected_ids": ids(7 - i)} for i in range(count)]
    )


def texts() -> Any:
    return datasets.Dataset.from_list(
        [{"input_ids": row["chosen_ids"] * 2, "labels": row["chosen_ids"] * 2} for row in pairs().select([0, 0, 0, 0])]
        + [{"input_ids": [7] * 6, "labels": [-100] * 4 + [7] * 2}] * 4
    )


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    return TrainingArguments(
        **{
            "output_dir": str(folder),
            "per_device_train_batch_size": 1,
            "learning_rate": 1e-3,
            "max_steps": 3,
            "logging_steps": 1,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
            "remove_unused_columns": False,
            "lr_scheduler_type": "constant",
            "optim": "sgd",
            **settings,
        }
    )


def losses(trainer: Any) -> list[float]:
    return [record["loss"] for record in trainer.state.log_history if "loss" in record]


def assert_same(theirs: Trainer, mine: Trainer) -> None:
    assert losses(mine) == pytest.approx(losses(theirs), rel=2e-4, abs=2e-4)
    assert len(losses(mine)) == 3
    weights = dict(mine.model.named_parameters())
    for name, weight in theirs.model.named_parameters():
        torch.testing.assert_close(weights[name], weight, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2}, {"bf16": True}], ids=str)
def test_sft_trains_as_without_a_fused_head(tmp_path, settings):
    runs = []
    for fuse in (False, True):
        model = fused_head(tiny(), grad_tol=0) if fuse else tiny()
        trainer = Trainer(model, arguments(tmp_path, **settings), train_dataset=texts(), eval_dataset=texts())
        trainer.train()
        runs.append((trainer, trainer.evaluate()["eval_loss"]))
    tolerance = 2e-2 if settings.get("bf16") else 2e-4
    assert losses(runs[1][0]) == pytest.approx(losses(runs[0][0]), rel=tolerance)
    assert runs[1][1] == pytest.approx(runs[0][1], rel=tolerance)
    if not settings.get("bf16"):
        assert_same(runs[0][0], runs[1][0])
    assert unfuse_head(runs[1][0].model)(torch.arange(4)[None]).logits is not None


def test_label_smoothing_is_refused(tmp_path):
    trainer = Trainer(fused_head(tiny()), arguments(tmp_path, label_smoothing_factor=0.1), train_dataset=texts())
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        trainer.train()


# --- pairs -----------------------------------------------------------------------------------------------------------


def by_hand(rows: Any, model: Any, steps: list[list[int]], **keywords: Any) -> list[float]:
    """Plain steps of SGD on linear_dpo_loss, a whole batch of pairs each."""
    collator, optimizer, found = PreferenceCollator(PAD), torch.optim.SGD(model.parameters(), 1e-3), []
    for step in steps:
        batch = collator([rows[i] for i in step])
        hidden = model.model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        out = linear_dpo_loss(
            hidden, model.lm_head.weight, batch["completion_labels"], batch.get("ref_logps"), shift=True, **keywords
        )
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append(out.loss.item())
    return found


@pytest.mark.parametrize(
    "keywords",
    [{"beta": 0.5}, {"loss_type": "simpo"}, {"loss_type": ["ipo", "hinge"], "loss_weights": [1.0, 0.5]}],
    ids=["dpo", "simpo", "two"],
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_pairs_train_as_by_hand(tmp_path, keywords, accumulate):
    model, collator = fused_head(tiny()), PreferenceCollator(PAD)
    rows = pairs(6)
    if keywords != {"loss_type": "simpo"}:
        rows = add_reference(rows, model, collator)
    settings = {"gradient_accumulation_steps": accumulate, "per_device_train_batch_size": 2 // accumulate}
    args = arguments(tmp_path, **settings, train_sampling_strategy="sequential")
    loss = PreferenceLoss(**keywords)
    trainer = Trainer(model, args, collator, rows, eval_dataset=rows, compute_loss_func=loss, callbacks=[loss])
    trainer.train()
    other = tiny()
    assert losses(trainer) == pytest.approx(by_hand(rows, other, [[0, 1], [2, 3], [4, 5]], **keywords), rel=1e-4)
    for (name, weight), truth in zip(trainer.model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(weight, truth, rtol=1e-4, atol=1e-6, msg=name)
    assert {"rewards/accuracies", "rewards/margins", "logps/chosen"} <= set(trainer.state.log_history[0])
    assert trainer.evaluate()["eval_loss"] > 0
    assert "eval_rewards/accuracies" in trainer.state.log_history[-1]


def test_an_uneven_last_step_is_a_mean_over_its_pairs(tmp_path):
    """Five pairs, two a batch, two batches a step: 4 pairs, then 1."""
    settings = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "max_steps": 2}
    args = arguments(tmp_path, **settings, train_sampling_strategy="sequential")
    loss = PreferenceLoss(loss_type="simpo")
    trainer = Trainer(fused_head(tiny()), args, PreferenceCollator(PAD), pairs(), compute_loss_func=loss)
    trainer.train()
    assert losses(trainer) == pytest.approx(by_hand(pairs(), tiny(), [[0, 1, 2, 3], [4]], loss_type="simpo"), rel=1e-4)


def test_pairs_with_lora_and_bf16(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny(), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    collator, loss = PreferenceCollator(PAD), PreferenceLoss(beta=0.5)
    rows = add_reference(pairs(4), fused_head(model), collator)
    settings = {"per_device_train_batch_size": 4, "bf16": True, "learning_rate": 1.0, "max_steps": 6}
    trainer = Trainer(model, arguments(tmp_path, **settings), collator, rows, compute_loss_func=loss)
    head = model.get_base_model().lm_head.weight.clone()
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(0.6931, abs=1e-2)
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.02
    assert model.get_base_model().lm_head.weight.equal(head)


def test_router_loss_is_in_the_preference_loss():
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes: dict[str, Any] = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    sizes |= dict(num_key_value_heads=2, num_local_experts=2, router_aux_loss_coef=0.5)
    model = fused_head(MixtralForCausalLM(MixtralConfig(vocab_size=VOCAB, **sizes)))
    batch = PreferenceCollator(PAD)(list(pairs()))
    labels, loss = batch.pop("labels"), PreferenceLoss(loss_type="simpo")
    plain, routed = model(**batch), model(**batch, output_router_logits=True)
    assert loss(routed, labels).item() == pytest.approx(loss(plain, labels).item() + 0.5 * routed.aux_loss.item())


def test_the_collator():
    rows = [
        {
            "prompt_ids": [5, 6],
            "chosen_ids": [7],
            "rejected_ids": [8, 9],
            "ref_chosen_logps": -1,
            "ref_rejected_logps": -2.5,
        },
        {
            "prompt_ids": [5],
            "chosen_ids": [6],
            "rejected_ids": [7],
            "ref_chosen_logps": -3.0,
            "ref_rejected_logps": -4.0,
        },
    ]
    batch = PreferenceCollator(PAD)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 0], [5, 6, 0, 0], [5, 6, 8, 9], [5, 7, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]]
    _ = -100
    assert batch["completion_labels"].tolist() == [[_, _, 7, _], [_, 6, _, _], [_, _, 8, 9], [_, 7, _, _]]
    assert batch["ref_logps"].tolist() == [-1, -3, -2.5, -4]
    assert batch["labels"].tolist() == [[_, 1], [_, 1]]
    assert PreferenceCollator(PAD, max_length=2)(rows)["input_ids"].tolist() == [[5, 6], [5, 6], [5, 6], [5, 7]]
    assert PreferenceCollator(PAD, 2, "keep_end")(rows)["input_ids"].tolist() == [[6, 7], [5, 6], [8, 9], [5, 7]]
    del rows[1]["ref_rejected_logps"]
    with pytest.raises(ValueError, match="ref_chosen_logps and ref_rejected_logps: in some rows only"):
        PreferenceCollator(PAD)(rows)
    with pytest.raises(KeyError, match="chosen_ids: not in the row, which has prompt_ids"):
        PreferenceCollator(PAD)([{"prompt_ids": [1]}])
    for arguments, message in (
        ({"pad_token_id": None}, "pad_token_id: expected an int, got None"),
        ({"pad_token_id": 0, "max_length": 0}, "max_length: expected a number above 0"),
        ({"pad_token_id": 0, "truncation_mode": "middle"}, "truncation_mode: expected 'keep_start' or 'keep_end'"),
    ):
        with pytest.raises(ValueError, match=message):
            PreferenceCollator(**arguments)


def test_add_reference_is_the_model_as_it_is():
    model, collator = fused_head(tiny()).train(), PreferenceCollator(PAD)
    rows = add_reference(pairs(), model, collator, batch_size=2)
    batch = collator(list(rows))
    labels = batch.pop("labels")
    assert model.training
    torch.testing.assert_close(model(**batch).token_logps.sum(-1), batch["ref_logps"], rtol=1e-4, atol=1e-4)
    assert PreferenceLoss(beta=0.5)(model(**batch), labels).item() == pytest.approx(0.6931, abs=1e-3)


def test_metrics_are_means_since_the_last_log():
    model, collator, loss = fused_head(tiny()), PreferenceCollator(PAD), PreferenceLoss(loss_type="simpo")
    batches = [collator([row]) for row in pairs(2)]
    expected = []
    loss.on_init_end(None, None, None)
    for batch in batches:
        labels = batch.pop("labels")
        loss(model(**batch), labels)
        hidden = model.model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        out = linear_dpo_loss(hidden, model.lm_head.weight, batch["completion_labels"], shift=True, loss_type="simpo")
        expected.append(preference_metrics(out)["rewards/margins"].item())
    logs: dict[str, Any] = {"loss": 1.0}
    state = type("State", (), {"log_history": [{}]})()
    loss.on_log(None, state, None, logs)
    assert logs["rewards/margins"] == pytest.approx(sum(expected) / 2, rel=1e-4)
    assert state.log_history[-1]["rewards/margins"] == logs["rewards/margins"]
    for later in ({"loss": 1.0}, {"eval_loss": 1.0}, {"train_runtime": 1.0}):
        given = dict(later)
        loss.on_log(None, state, None, given)
        assert given == later


def test_a_loss_that_is_no_callback_keeps_nothing():
    model, loss = fused_head(tiny()), PreferenceLoss(loss_type="simpo")
    batch = PreferenceCollator(PAD)(list(pairs()))
    labels = batch.pop("labels")
    loss(model(**batch), labels)
    assert loss._metrics == {"": [], "eval_": []}


def test_metrics_of_training_and_of_evaluation_are_apart():
    model, loss = fused_head(tiny()), PreferenceLoss(loss_type="simpo")
    loss.on_init_end(None, None, None)
    batches = [PreferenceCollator(PAD)([row]) for row in pairs(2)]
    labels = [batch.pop("labels") for batch in batches]
    loss(model(**batches[0]), labels[0])
    with torch.no_grad():
        out = model(**batches[1])
        loss(out, labels[1])
    logs: dict[str, Any] = {"eval_loss": 1.0}
    loss.on_log(None, type("State", (), {"log_history": [{}]})(), None, logs)
    counted = out.label_mask.sum(-1)
    assert logs["eval_lengths/chosen"] == counted[0]
    assert logs["eval_logps/chosen"] == pytest.approx((out.token_logps[0].sum() / counted[0]).item(), rel=1e-4)


def test_what_the_loss_refuses(tmp_path):
    model, batch = tiny(), PreferenceCollator(PAD)(list(pairs()))
    labels, loss = batch.pop("labels"), PreferenceLoss(loss_type="simpo")
    fused = fused_head(tiny())
    forward = fused.forward  # as accelerate keeps it
    unfuse_head(fused)
    with pytest.raises(ValueError, match="completion_labels: only a model with a fused head takes them"):
        forward(**batch)
    with pytest.raises(ValueError, match="outputs: have no token_logps"):
        loss(model(batch["input_ids"]), labels)
    out = fused_head(model)(**batch)
    with pytest.raises(ValueError, match=r"labels: expected PreferenceCollator's, \[5, 2\].*got \[10, 13\]"):
        loss(out, batch["completion_labels"], 5)
    with pytest.raises(ValueError, match=r"ref_logps: not in the batch.*PreferenceLoss\(reference_free=True\)"):
        PreferenceLoss(loss_type=["simpo", "ipo"])(out, labels)
    assert PreferenceLoss(reference_free=True)(out, labels).isfinite()
    assert PreferenceLoss(parameterization="posterior")(out, labels).isfinite()
    with pytest.raises(ValueError, match="beta: expected one number"):
        PreferenceLoss(beta=lambda step: 0.1)
    with pytest.raises(TypeError, match="bata: not a keyword of loss_of_tokens"):
        PreferenceLoss(bata=0.1)
    with pytest.raises(ValueError, match="use_weighting: needs tokens with log_sum_sq_probs"):
        PreferenceLoss(use_weighting=True)(fused_head(tiny())(**batch, ref_logps=torch.zeros(10)), labels)
