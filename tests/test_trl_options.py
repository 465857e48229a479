"""What TRL's DPOTrainer accepts, on FastDPOTrainer: the same run, of training options, references and evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

import numpy as np
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import DPOTrainer
from trl_kit import PAIRS, assert_same_run, assert_same_weights, make, own_files, save_model, train, trl_as_it_was  # noqa: F401

from fastdpo.integrations.trl import FastDPOTrainer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
TRAINERS = (DPOTrainer, FastDPOTrainer)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("other"), seed=7)


def both(tiny: str, tmp_path: Path, **settings: Any) -> tuple[Any, Any]:
    """Each trained; asserts that the runs are the same."""
    theirs, mine = (train(kind, tiny, tmp_path / kind.__name__, **settings) for kind in TRAINERS)
    assert_same_run(theirs, mine)
    return theirs, mine


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"gradient_checkpointing": True}, id="checkpointing"),
        pytest.param(
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}, id="reentrant"
        ),
        pytest.param({"gradient_checkpointing": False}, id="no checkpointing"),
        pytest.param({"gradient_accumulation_steps": 3, "per_device_train_batch_size": 1}, id="accumulation"),
        pytest.param({"sync_ref_model": True, "ref_model_sync_steps": 1}, id="sync_ref_model"),
        pytest.param({"max_length": 9, "truncation_mode": "keep_end"}, id="keep_end"),
        pytest.param({"pad_to_multiple_of": 16}, id="pad_to_multiple_of"),
        pytest.param({"loss_type": ["hinge", "nca_pair"], "loss_weights": [0.3, 2.0]}, id="two losses"),
        pytest.param({"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3}, id="alpha_divergence"),
        pytest.param({"disable_dropout": False, "max_grad_norm": 0.1, "weight_decay": 0.1}, id="optimizer"),
    ],
)
def test_training_options(tiny, tmp_path, settings):
    both(tiny, tmp_path, **settings)


@pytest.mark.parametrize("settings", [{}, {"sync_ref_model": True, "ref_model_sync_steps": 2}], ids=["kept", "synced"])
def test_a_reference_of_its_own(tiny, other, tmp_path, settings):
    """The first step's margin is not 0 then, as it is with the policy's own copy."""
    runs = []
    for kind in TRAINERS:
        arguments = {"ref_model": AutoModelForCausalLM.from_pretrained(other)}
        runs.append(train(kind, tiny, tmp_path / kind.__name__, arguments=arguments, **settings))
    assert runs[1].state.log_history[0]["rewards/margins"] != 0
    assert_same_run(*runs)


@pytest.mark.parametrize("reference", [False, True], ids=["policy", "ref_model"])
@pytest.mark.usefixtures("own_files")
def test_precomputed_reference(tiny, other, tmp_path, reference):
    runs = []
    for kind in TRAINERS:
        arguments = {"eval_dataset": Dataset.from_list(PAIRS[:3])}
        arguments |= {"ref_model": AutoModelForCausalLM.from_pretrained(other)} if reference else {}
        settings = {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 4, "eval_strategy": "steps"}
        runs.append(train(kind, tiny, tmp_path / kind.__name__, arguments=arguments, eval_steps=2, **settings))
    assert_same_run(*runs)
    assert any("eval_loss" in record for record in runs[1].state.log_history)


def test_evaluation(tiny, other, tmp_path):
    """During training on several sets, and afterwards on new data, alone and in a dict."""
    held_out, more = Dataset.from_list(PAIRS[:3]), Dataset.from_list(PAIRS[2:])
    results = []
    for kind in TRAINERS:
        arguments = {"eval_dataset": {"a": held_out, "b": more}}
        settings = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 2}
        run = train(kind, tiny, tmp_path / kind.__name__, arguments=arguments, **settings)
        results.append((run, run.evaluate(more), run.evaluate({"c": held_out, "d": more})))
    theirs, mine = results
    assert_same_run(theirs[0], mine[0])
    assert sum("eval_a_loss" in record for record in mine[0].state.log_history) >= 1
    for a, b in zip(theirs[1:], mine[1:], strict=True):
        assert a.keys() == b.keys()
        for key in a:
            if not any(word in key for word in ("runtime", "per_second")):
                assert b[key] == pytest.approx(a[key], rel=2e-4, abs=2e-4), key
    assert mine[2]["eval_d_loss"] == pytest.approx(mine[1]["eval_loss"], rel=1e-5)


def test_return_outputs_and_compute_metrics(tiny, tmp_path):
    """Logits are recomputed then, for compute_metrics, predict() and compute_loss(return_outputs=True)."""

    def compute_metrics(prediction: Any) -> dict[str, float]:
        return {"mean_logit": float(np.mean(prediction.predictions[prediction.label_ids != -100]))}

    found = []
    for kind in TRAINERS:
        arguments = {"eval_dataset": Dataset.from_list(PAIRS[:4]), "compute_metrics": compute_metrics}
        run = make(kind, tiny, tmp_path / kind.__name__, arguments=arguments, per_device_eval_batch_size=4)
        batch = next(iter(run.get_eval_dataloader()))
        loss, outputs = run.compute_loss(run.model, batch, return_outputs=True)
        without = run.prediction_step(run.model, batch, prediction_loss_only=True)
        assert without[1:] == (None, None)
        predicted = run.prediction_step(run.model, batch, prediction_loss_only=False)
        torch.testing.assert_close(predicted[0], without[0])
        found.append((run.evaluate(), loss.detach(), outputs.logits.detach(), predicted[1], predicted[2]))
    (theirs, *a), (mine, *b) = found
    assert mine["eval_mean_logit"] == pytest.approx(theirs["eval_mean_logit"], rel=1e-4)
    assert a[1].shape[-1] == 203
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_bf16_autocast(tiny, tmp_path):
    """TRL rounds its logits to bf16, fastdpo does not: no closer than that, to TRL; and close to float32."""
    theirs, mine = (train(kind, tiny, tmp_path / kind.__name__, bf16=True) for kind in TRAINERS)
    exact = train(FastDPOTrainer, tiny, tmp_path / "float32")
    losses = [[record["loss"] for record in run.state.log_history[:3]] for run in (theirs, mine, exact)]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[1] == pytest.approx(losses[2], rel=0.02)
    assert losses[1] != losses[2], "bf16 took part"


def test_activation_offloading(tiny, tmp_path):
    """Its hooks, which need an accelerator: all that autograd saves is taken away, and brought back as a copy."""
    runs = []
    for offloads in (False, True):
        run = make(FastDPOTrainer, tiny, tmp_path / str(offloads))
        if offloads:
            taken: list[int] = []
            run.maybe_activation_offload_context = torch.autograd.graph.saved_tensors_hooks(
                lambda saved, taken=taken: taken.append(1) or saved.clone(), lambda packed: packed.clone()
            )
        run.train()
        runs.append(run)
    assert taken
    assert_same_run(*runs)


def test_iterable_data_and_conversations(tiny, tmp_path):
    template = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"

    def messages(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text.strip()}]

    rows = [
        {"prompt": messages("user", row["prompt"])}
        | {side: messages("assistant", row[side]) for side in ("chosen", "rejected")}
        for row in PAIRS
    ]
    runs = []
    for kind in TRAINERS:
        run = make(kind, tiny, tmp_path / kind.__name__)
        tokenizer = run.processing_class
        tokenizer.chat_template = template
        stream = Dataset.from_list(rows).to_iterable_dataset()
        run = kind(run.model, args=run.args, train_dataset=stream, processing_class=tokenizer)
        run.train()
        runs.append(run)
    assert_same_run(*runs)


def test_a_checkpoint_resumes(tiny, tmp_path):
    whole = train(FastDPOTrainer, tiny, tmp_path / "whole", max_steps=3)
    train(FastDPOTrainer, tiny, tmp_path / "parts", max_steps=3, save_strategy="steps", save_steps=2)
    resumed = make(FastDPOTrainer, tiny, tmp_path / "parts", max_steps=3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    assert_same_weights(whole.model, resumed.model)
    assert resumed.state.log_history[-2]["loss"] == pytest.approx(whole.state.log_history[2]["loss"], rel=1e-5)
