"""FastDPOTrainer with an adapter on the LM head, against TRL's own trainer on the model's logits in float32."""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset
from peft import IA3Config, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from trl import DPOTrainer
from trl.trainer import dpo_trainer
from trl.trainer.utils import FusedCausalLMOutput
from trl_kit import (
    PAIRS,
    assert_same_run,
    assert_same_weights,
    make,
    own_files,  # noqa: F401
    save_model,
    tokenizer_of,
    train,
    trl_as_it_was,  # noqa: F401
)

from fastdpo.cache import ReferenceCache
from fastdpo.integrations.head_product import UnsupportedHead
from fastdpo.integrations.trl import FastDPOTrainer
from fastdpo.integrations.trl_head import adapter_on_head_allowed

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("tied"), tie_word_embeddings=True)


def logits_head(model: Any, **_: Any) -> None:
    """In place of add_fused_lm_head: the model's own forward, adapters and all, and log_softmax of its logits."""
    own_forward = model.forward

    def forward(self: Any, *args: Any, fused_lm_head: bool = False, labels: Any = None, **keywords: Any) -> Any:
        if not fused_lm_head:
            return own_forward(*args, **keywords)
        logits = own_forward(*args, **keywords).logits[:, :-1].float()
        labels = labels[:, 1:]
        mask = labels != -100
        logps = logits.log_softmax(-1)
        return FusedCausalLMOutput(
            log_probs=logps.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * mask,
            entropy=-(logps.exp() * logps).sum(-1) * mask,
            mean_logits=logits.mean(-1) * mask,
            is_top1=(logits.argmax(-1) == labels) & mask,
            log_sum_sq_probs=(2 * logps).logsumexp(-1) * mask,
        )

    model.forward = types.MethodType(forward, model)


@contextmanager
def truth() -> Iterator[type]:
    """TRL's trainer, whose logps come from logits."""
    with adapter_on_head_allowed(), mock.patch.object(dpo_trainer, "add_fused_lm_head", logits_head):
        yield DPOTrainer


def assert_equals_logits(tiny: str, tmp_path: Path, build: Any = None, **settings: Any) -> Any:
    """Three steps of both; returns the head of ours."""

    def model() -> Any:
        torch.manual_seed(0)
        return build(AutoModelForCausalLM.from_pretrained(tiny)) if build else None

    with truth() as trainer_class:
        theirs = train(trainer_class, tiny, tmp_path / "logits", model=model(), **settings)
    mine = train(FastDPOTrainer, tiny, tmp_path / "fastdpo", model=model(), **settings)
    assert_same_run(theirs, mine)
    return mine.model.get_output_embeddings()


def lora(*targets: str, **settings: Any) -> LoraConfig:
    return LoraConfig(r=4, target_modules=[*targets], task_type="CAUSAL_LM", **settings)


NEW = {
    "lora": lora("q_proj", "lm_head"),
    "rslora on the head alone": lora("lm_head", use_rslora=True, lora_alpha=16),
    "lora dropout, which TRL turns off": lora("lm_head", lora_dropout=0.3),
    "dora": lora("q_proj", "lm_head", use_dora=True),
    "modules_to_save": lora("q_proj", modules_to_save=["lm_head"]),
    "target_parameters": lora("q_proj", target_parameters=["lm_head.weight"]),
    "trainable_token_indices": lora("q_proj", trainable_token_indices={"lm_head": [9, 11]}),
}


@pytest.mark.parametrize("name", NEW)
def test_a_new_adapter(tiny, tmp_path, name):
    head = assert_equals_logits(tiny, tmp_path, arguments={"peft_config": NEW[name]})
    trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
    assert trained and all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in trained)


def test_the_head_learns(tiny, tmp_path):
    head = train(FastDPOTrainer, tiny, tmp_path, arguments={"peft_config": NEW["dora"]}).model.get_output_embeddings()
    assert head.lora_B["default"].weight.abs().max() > 1e-4, "it starts at 0"
    assert (head.lora_magnitude_vector["default"].weight - head.base_layer.weight.norm(dim=1)).abs().max() > 1e-4


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"gradient_checkpointing": True}, id="checkpointing"),
        pytest.param({"loss_type": ["ipo"], "ld_alpha": 0.5, "use_weighting": True}, id="weights"),
    ],
)
def test_options(tiny, tmp_path, settings):
    assert_equals_logits(tiny, tmp_path, arguments={"peft_config": NEW["lora"]}, **settings)


@pytest.mark.parametrize("config", [NEW["lora"], NEW["dora"], NEW["modules_to_save"]], ids=["lora", "dora", "saved"])
def test_an_existing_adapter_and_its_ref_copy(tiny, tmp_path, config):
    """The reference is the adapter as it was: nothing is gained in the first step, though base and policy differ."""

    def build(model: Any) -> Any:
        made = get_peft_model(model, config)
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.requires_grad:
                    parameter += 0.05 * torch.randn_like(parameter)
        return made

    head = assert_equals_logits(tiny, tmp_path, build=build)
    active = head.active_adapter
    assert (active if isinstance(active, str) else active[0]) == "default"


def test_tokens_added_to_a_tied_model(tied, tmp_path):
    """PEFT ties the head's new rows to those of the embedding."""
    config = lora("q_proj", trainable_token_indices=[9, 11])
    head = assert_equals_logits(tied, tmp_path, arguments={"peft_config": config})
    assert type(head).__name__ == "TrainableTokensWrapper"


@pytest.mark.usefixtures("own_files")
def test_precomputed_reference_and_new_data(tiny, tmp_path):
    """The reference pass at construction has the adapter disabled."""
    arguments = {"peft_config": NEW["lora"]}
    live = train(FastDPOTrainer, tiny, tmp_path / "live", arguments=arguments)
    once = train(FastDPOTrainer, tiny, tmp_path / "once", arguments=arguments, precompute_ref_log_probs=True)
    assert_same_run(live, once)
    held_out = Dataset.from_list(PAIRS[:4])
    assert once.evaluate(held_out)["eval_loss"] == pytest.approx(live.evaluate(held_out)["eval_loss"], rel=1e-5)


def test_a_cached_reference(tiny, tmp_path):
    cache = ReferenceCache(tmp_path / "cache")
    cache.build(tiny, tokenizer_of(tiny), PAIRS, max_length=1024, progress=False)
    arguments = {"peft_config": NEW["dora"]}
    live = train(FastDPOTrainer, tiny, tmp_path / "live", arguments=arguments)
    cached = train(FastDPOTrainer, tiny, tmp_path / "cached", arguments={**arguments, "reference_cache": cache})
    losses = [[record["loss"] for record in run.state.log_history[:3]] for run in (live, cached)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert_same_weights(live.model, cached.model)


def test_what_is_not_known_is_refused_at_construction(tiny, tmp_path):
    config = IA3Config(target_modules=["lm_head"], feedforward_modules=[], task_type="CAUSAL_LM")
    with pytest.raises(UnsupportedHead, match=r"head: an LM head that is a peft\.tuners\.ia3\.layer\.Linear"):
        make(FastDPOTrainer, tiny, tmp_path, arguments={"peft_config": config})
    model = AutoModelForCausalLM.from_pretrained(tiny)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedHead, match=r"weight: an LM head that holds Parameter torch\.int8 \[203, 32\]"):
        make(FastDPOTrainer, tiny, tmp_path, model=model)


def test_trl_is_left_as_it_was(tiny, tmp_path):
    trainer = train(FastDPOTrainer, tiny, tmp_path, arguments={"peft_config": NEW["lora"]})
    assert "get_output_embeddings" not in vars(trainer.model.get_base_model())
    with pytest.raises(ValueError, match="Applying a PEFT adapter to `lm_head` is not supported"):
        make(DPOTrainer, tiny, tmp_path, arguments={"peft_config": NEW["lora"]})
