"""Three optimizer steps are the same steps however they are computed: trainer x adapter x packing x reference.

The truth is TRL's DPOTrainer, padded, with a live reference. It trains no adapter on the head: there it is
FastDPOTrainer, padded. TRL always has a reference; "none" is the loss that does not use one, sft.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

import cache_kit
import packing_kit as kit
import torch
from datasets import Dataset
from packing_kit import assert_same_run
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from trl import DPOConfig, DPOTrainer

from fastdpo.cache import ReferenceCache
from fastdpo.integrations.trl import FastDPOTrainer
from fastdpo.integrations.trl_packing.forward import PackedForward

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

ADAPTERS = {"full": None, "lora": ("q_proj", "v_proj"), "lora_on_head": ("q_proj", "lm_head")}
PACKINGS = {"padded": {}, "padding_free": {"padding_free": True}, "shared_prompt": {"shared_prompt": True}}
REFERENCES = ("none", "live", "cached", "precomputed")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return cache_kit.save_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def cache(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> ReferenceCache:
    found = ReferenceCache(tmp_path_factory.mktemp("cache"))
    found.build(tiny, cache_kit.tokenizer_of(tiny), kit.PAIRS, max_length=1024, progress=False)
    return found


def run(trainer_class: type, tiny: str, output: Path, adapter: str, reference: str, arguments: dict[str, Any]) -> Any:
    modules = ADAPTERS[adapter]
    if modules is not None:
        arguments = arguments | {"peft_config": kit.lora(*modules)}
    settings: dict[str, Any] = {"precompute_ref_log_probs": reference == "precomputed"}
    settings["loss_type"] = "sft" if reference == "none" else "sigmoid"
    with pytest.MonkeyPatch.context() as patch:
        # TRL keeps precomputed logps in a file named after data and model: each run its own
        patch.setattr(Dataset, "_get_cache_file_path", lambda self, name: str(output / f"cache-{name}.arrow"))
        return kit.train(trainer_class, tiny, output, arguments=arguments, **settings)


@pytest.fixture(scope="module")
def truth(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(adapter, reference) -> the trainer after its three steps, made once."""
    made: dict[tuple[str, bool], Any] = {}

    def of(adapter: str, reference: str) -> Any:
        key = adapter, reference == "none"
        if key not in made:
            trainer_class = FastDPOTrainer if adapter == "lora_on_head" else DPOTrainer
            output = tmp_path_factory.mktemp("truth")
            made[key] = run(trainer_class, tiny, output, adapter, "none" if key[1] else "live", {})
        return made[key]

    return of


@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_fastdpo_trains_as_trl(adapter, packing, reference, truth, tiny, cache, tmp_path, monkeypatch):
    theirs = truth(adapter, reference)
    rows: list[torch.Size] = []
    spied = PackedForward._run
    monkeypatch.setattr(
        PackedForward,
        "_run",
        lambda self, call, row, ids, **kw: rows.append(ids.shape) or spied(self, call, row, ids, **kw),
    )
    arguments = PACKINGS[packing] | ({"reference_cache": cache} if reference == "cached" else {})
    mine = run(FastDPOTrainer, tiny, tmp_path, adapter, reference, arguments)
    assert_same_run(theirs, mine)
    assert bool(rows) == (packing != "padded") and {len(shape) for shape in rows} <= {2} and {r[0] for r in rows} <= {1}


@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_trl_precomputed_is_trl_live(adapter, truth, tiny, tmp_path):
    assert_same_run(truth(adapter, "live"), run(DPOTrainer, tiny, tmp_path, adapter, "precomputed", {}))


@pytest.mark.parametrize("packing", ["padding_free", "shared_prompt"])
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"max_length": 12}, id="cut"),
        pytest.param({"max_length": 12, "truncation_mode": "keep_end"}, id="cut_in_front"),
        pytest.param({"use_weighting": True}, id="wpo"),
        pytest.param({"loss_type": ["ipo", "sft"], "loss_weights": [1.0, 0.5]}, id="ipo_sft"),
        pytest.param(
            {"ld_alpha": 0.5, "gradient_checkpointing": False, "per_device_train_batch_size": 3}, id="ld_alpha"
        ),
        pytest.param({"f_divergence_type": "js_divergence", "pad_to_multiple_of": 16}, id="pad_to_multiple"),
        pytest.param(
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}, id="reentrant"
        ),
    ],
)
def test_options_of_trl(settings, packing, tiny, tmp_path):
    theirs = kit.train(DPOTrainer, tiny, tmp_path / "trl", **settings)
    mine = kit.train(FastDPOTrainer, tiny, tmp_path / "fastdpo", arguments=PACKINGS[packing], **settings)
    assert_same_run(theirs, mine)


@pytest.mark.parametrize("packing", PACKINGS)
def test_evaluation(packing, tiny, tmp_path):
    """Before a step, after one, and on data that comes later."""
    metrics = []
    for trainer_class, arguments in ((DPOTrainer, {}), (FastDPOTrainer, PACKINGS[packing])):
        trainer = kit.make(
            trainer_class, tiny, tmp_path, arguments={"eval_dataset": Dataset.from_list(kit.PAIRS[:3]), **arguments}
        )
        found = [trainer.evaluate()]
        trainer.train()
        found += [trainer.evaluate(), trainer.evaluate(Dataset.from_list(kit.PAIRS[3:]))]
        metrics.append(found)
    for theirs, mine in zip(*metrics, strict=True):
        for key in (
            "eval_loss",
            "eval_rewards/margins",
            "eval_logps/chosen",
            "eval_entropy",
            "eval_mean_token_accuracy",
        ):
            assert mine[key] == pytest.approx(theirs[key], rel=2e-4, abs=2e-4), key


@pytest.mark.parametrize("packing", ["padding_free", "shared_prompt"])
def test_a_trained_adapter_against_itself(packing, tiny, tmp_path):
    """A PEFT model as model: TRL's reference is a copy of its adapter."""
    runs = []
    for trainer_class, arguments in ((DPOTrainer, {}), (FastDPOTrainer, PACKINGS[packing])):
        torch.manual_seed(0)
        model = get_peft_model(cache_kit.model_of(tiny), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
        runs.append(kit.train(trainer_class, tiny, tmp_path, arguments={"model": model, **arguments}))
    assert_same_run(*runs)


# --- how it is asked for ---------------------------------------------------------------------------------------------


def test_padding_free_of_dpoconfig(tiny, tmp_path, caplog):
    """What TRL 1.16 warns of and ignores."""
    with caplog.at_level(logging.WARNING):
        trainer = kit.make(FastDPOTrainer, tiny, tmp_path, padding_free=True)
    assert "temporarily unavailable" not in caplog.text
    assert trainer.args.padding_free and trainer.padding_free
    assert [one.option for one in trainer._forwards.values()] == ["padding_free"] * 2, "policy and reference"
    given = kit.config_of(DPOConfig, tmp_path, padding_free=True)
    trainer = kit.make(FastDPOTrainer, tiny, tmp_path, arguments={"args": given, "shared_prompt": True})
    assert trainer._packing == "shared_prompt" and given.padding_free
    given = kit.config_of(DPOConfig, tmp_path)
    trainer = kit.make(FastDPOTrainer, tiny, tmp_path, arguments={"args": given, "shared_prompt": True})
    assert trainer.padding_free and not given.padding_free, "the user's arguments are the user's"
    trainer = kit.make(FastDPOTrainer, tiny, tmp_path)
    assert trainer._packing is None and trainer.model.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match=r"padding_free: False contradicts args\.padding_free=True"):
        kit.make(FastDPOTrainer, tiny, tmp_path, arguments={"padding_free": False}, padding_free=True)
    with pytest.raises(ValueError, match="padding_free: False contradicts shared_prompt=True"):
        kit.make(FastDPOTrainer, tiny, tmp_path, arguments={"padding_free": False, "shared_prompt": True})


def test_arguments_by_position(tiny, tmp_path):
    data, tokenizer = Dataset.from_list(kit.PAIRS), cache_kit.tokenizer_of(tiny)
    args = kit.config_of(DPOConfig, tmp_path, padding_free=True)
    trainer = FastDPOTrainer(cache_kit.model_of(tiny), None, args, None, data, processing_class=tokenizer)
    assert trainer._packing == "padding_free"
    with pytest.raises(TypeError, match="multiple values for keyword argument 'args'"):
        FastDPOTrainer(cache_kit.model_of(tiny), None, args, None, data, args=args, processing_class=tokenizer)


def test_the_model_afterwards(tiny, tmp_path):
    """It saves, loads, generates and trains again, padded or packed, as one that was never packed."""
    before = cache_kit.model_of(tiny)
    trainer = kit.make(FastDPOTrainer, tiny, tmp_path, arguments={"padding_free": True})
    model = trainer.model
    assert model.config._attn_implementation == "fastdpo_segments"
    ids = torch.arange(20).view(2, 10)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    generated = [m.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=5) for m in (before, model)]
    assert torch.equal(*generated)
    trainer.save_model(str(tmp_path / "saved"))
    assert "fastdpo" not in (tmp_path / "saved" / "config.json").read_text()
    assert cache_kit.model_of(str(tmp_path / "saved")).config._attn_implementation == "sdpa"
    theirs = kit.train(DPOTrainer, tiny, tmp_path)
    mine = kit.train(FastDPOTrainer, tiny, tmp_path, arguments={"model": model, "shared_prompt": True})
    assert_same_run(theirs, mine)
    padded = kit.make(FastDPOTrainer, tiny, tmp_path, arguments={"model": cache_kit.model_of(tiny), "ref_model": model})
    assert padded.evaluate(padded.train_dataset)["eval_rewards/margins"] != 0


@pytest.mark.parametrize("packing", ["padding_free", "shared_prompt"])
def test_bf16_autocast(packing, tiny, tmp_path):
    """The same step to bf16 rounding, reference and policy alike."""
    first = []
    for arguments in ({}, PACKINGS[packing]):
        trainer = kit.train(FastDPOTrainer, tiny, tmp_path, arguments=arguments, bf16=True, max_steps=2)
        first.append(trainer.state.log_history[1])
    padded, packed = first
    assert packed["loss"] == pytest.approx(padded["loss"], rel=2e-2)
    assert packed["grad_norm"] == pytest.approx(padded["grad_norm"], rel=2e-2)
    assert packed["logps/rejected"] == pytest.approx(padded["logps/rejected"], rel=1e-2)


def test_what_cannot_be_packed(tiny, tmp_path):
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    packing = {"padding_free": True}
    with pytest.raises(
        ValueError, match="padding_free: .* cannot run packed: PROMPT_TUNING puts tokens before each row"
    ):
        kit.make(FastDPOTrainer, tiny, tmp_path, arguments={"peft_config": prompts, **packing})
    activated = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[5])
    with pytest.raises(ValueError, match="cannot run packed: activated LoRA"):
        kit.make(FastDPOTrainer, tiny, tmp_path, arguments={"peft_config": activated, **packing})
    with pytest.raises(ValueError, match=r"neftune_noise_alpha: 5\.0; .* expected None with padding_free"):
        kit.make(FastDPOTrainer, tiny, tmp_path, arguments=packing, neftune_noise_alpha=5.0)
