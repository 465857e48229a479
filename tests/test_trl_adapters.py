"""PEFT below the head on FastDPOTrainer: the same run as TRL's, for each way in which TRL takes an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from peft import (
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import AutoModelForCausalLM
from trl import DPOTrainer
from trl_kit import assert_same_run, make, save_model, train, trl_as_it_was  # noqa: F401

from fastdpo.integrations.trl import FastDPOTrainer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
TRAINERS = (DPOTrainer, FastDPOTrainer)
TASK = {"task_type": "CAUSAL_LM"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("tied"), tie_word_embeddings=True)


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], **TASK, **settings})


def same(tiny: str, tmp_path: Path, config: Any, **settings: Any) -> Any:
    runs = [
        train(kind, tiny, tmp_path / kind.__name__, arguments={"peft_config": config}, **settings) for kind in TRAINERS
    ]
    assert_same_run(*runs)
    return runs[1]


NEW = {
    "rslora": lora(use_rslora=True, lora_alpha=16),
    "dora": lora(use_dora=True),
    "all-linear": lora(target_modules="all-linear"),
    "lora_bias": lora(lora_bias=True),
    "the head saved": lora(modules_to_save=["lm_head"]),
    "loha": LoHaConfig(r=4, target_modules=["q_proj"], **TASK),
    "ia3": IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[], **TASK),
    "prompt tuning": PromptTuningConfig(num_virtual_tokens=3, **TASK),
    "p-tuning": PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=16, **TASK),
}


@pytest.mark.parametrize("name", NEW)
def test_a_new_adapter(tiny, tmp_path, name):
    same(tiny, tmp_path, NEW[name])


def test_prefix_tuning(tiny, tmp_path):
    """It takes part by the key-value cache, which gradient checkpointing has no place for."""
    same(tiny, tmp_path, PrefixTuningConfig(num_virtual_tokens=3, **TASK), gradient_checkpointing=False)


@pytest.mark.parametrize("targets", [["q_proj"], ["embed_tokens"]], ids=str)
def test_a_tied_model(tied, tmp_path, targets):
    """LoRA on the embedding leaves the head, which shares its weight, as it is."""
    same(tied, tmp_path, lora(target_modules=targets))


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"gradient_checkpointing": True}, id="checkpointing"),
        pytest.param(
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}, id="reentrant"
        ),
        pytest.param({"gradient_accumulation_steps": 3, "per_device_train_batch_size": 1}, id="accumulation"),
        pytest.param({"loss_type": "ipo", "use_weighting": True}, id="weights"),
        pytest.param({"ld_alpha": 0.4}, id="ld_alpha"),
    ],
)
def test_options(tiny, tmp_path, settings):
    same(tiny, tmp_path, NEW["dora"], **settings)


@pytest.mark.parametrize("name", ["rslora", "dora", "the head saved"])
def test_an_existing_adapter_and_its_ref_copy(tiny, tmp_path, name):
    runs = []
    for kind in TRAINERS:
        torch.manual_seed(0)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), NEW[name])
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.05 * torch.randn_like(parameter)
        runs.append(train(kind, tiny, tmp_path / kind.__name__, model=model))
        assert set(model.peft_config) == {"default", "ref"}
    assert runs[1].state.log_history[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert_same_run(*runs)


def test_a_bf16_base_with_float32_adapters(tiny, tmp_path):
    """As PEFT makes them by default. bf16 logits: no closer than TRL's rounding of them."""
    losses = []
    for kind in TRAINERS:
        model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16)
        run = train(kind, tiny, tmp_path / kind.__name__, model=model, arguments={"peft_config": lora()})
        losses.append([record["loss"] for record in run.state.log_history[:3]])
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_what_trl_refuses_is_refused(tiny, tmp_path):
    for kind in TRAINERS:
        with pytest.raises(NotImplementedError, match="sync_ref_model=True"):
            make(kind, tiny, tmp_path, arguments={"peft_config": lora()}, sync_ref_model=True)
