"""FastDPOTrainer with a cache trains as with a live reference, and loads none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

import cache_kit as kit
import torch
import trl.trainer.dpo_trainer as dpo_trainer
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl import DPOConfig
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl_kit import assert_same_run

from fastdpo import cli
from fastdpo.cache import CacheError, MissingEntry, ReferenceCache
from fastdpo.cache.rows import MAX_LENGTH
from fastdpo.integrations.trl import FastDPOTrainer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
PAIRS = kit.rows(6)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return kit.save_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def cache(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> ReferenceCache:
    """With token logps, uncut and cut to 12 tokens."""
    found = ReferenceCache(tmp_path_factory.mktemp("cache"))
    for max_length in (12, MAX_LENGTH):
        found.build(tiny, kit.tokenizer_of(tiny), PAIRS, token_logps=True, max_length=max_length, progress=False)
    return found


def config(output: Path, **settings: Any) -> DPOConfig:
    fixed = {"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "logging_steps": 1, "seed": 1}
    fixed |= {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "bf16": False, "use_cpu": True}
    return DPOConfig(output_dir=str(output), **{**fixed, **settings})


def trainer(tiny: str, output: Path, cache: Any = None, data: Any = None, lora: bool = False, **settings: Any) -> Any:
    return FastDPOTrainer(
        AutoModelForCausalLM.from_pretrained(tiny),
        args=config(output, **settings),
        train_dataset=Dataset.from_list(PAIRS) if data is None else data,
        processing_class=kit.tokenizer_of(tiny),
        peft_config=LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM") if lora else None,
        **({} if cache is None else {"reference_cache": cache}),
    )


@pytest.fixture
def no_reference(monkeypatch):
    """Loading a model by name fails the test: it would be the reference."""
    monkeypatch.setattr(dpo_trainer, "create_model_from_path", lambda *_, **__: pytest.fail("loaded a reference"))
    monkeypatch.setattr(FastDPOTrainer, "compute_ref_log_probs", lambda *_: pytest.fail("asked a reference"))


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="plain"),
        pytest.param({"lora": True}, id="lora"),
        pytest.param({"ld_alpha": 0.3}, id="ld_alpha"),
        pytest.param({"max_length": 12}, id="cut"),
        pytest.param({"loss_type": ["ipo", "aot"], "beta": 0.5}, id="two_losses"),
    ],
)
def test_trains_as_with_a_live_reference(tiny, cache, tmp_path, settings, request):
    live = trainer(tiny, tmp_path / "live", **settings)
    live.train()
    request.getfixturevalue("no_reference")
    cached = trainer(tiny, tmp_path / "cached", cache, **settings)
    cached.train()
    assert cached.ref_model is None
    for run in (live, cached):  # before the first step policy and reference are equal, but for rounding: a tie
        del run.state.log_history[0]["rewards/accuracies"]
    assert_same_run(live, cached)


def test_beta_and_loss_change_no_key(tiny, cache, tmp_path, no_reference):
    losses = []
    for settings in ({"beta": 0.1}, {"beta": 0.9}, {"loss_type": ["hinge"]}):
        run = trainer(tiny, tmp_path, str(cache.path), **settings)
        run.train()
        losses.append(run.state.log_history[-1]["train_loss"])
    assert len(set(losses)) == 3


def test_evaluation_and_new_data_after_training(tiny, cache, tmp_path, no_reference):
    held_out = Dataset.from_list(PAIRS[:4])
    run = FastDPOTrainer(
        AutoModelForCausalLM.from_pretrained(tiny),
        args=config(tmp_path, eval_strategy="steps", eval_steps=3),
        train_dataset=Dataset.from_list(PAIRS),
        eval_dataset={"a": held_out, "b": held_out},
        processing_class=kit.tokenizer_of(tiny),
        reference_cache=cache,
    )
    run.train()
    (a,) = (log["eval_a_loss"] for log in run.state.log_history if "eval_a_loss" in log)
    assert run.evaluate(held_out)["eval_loss"] == pytest.approx(a, rel=1e-5)
    assert run.evaluate({"c": held_out})["eval_c_loss"] == pytest.approx(a, rel=1e-5)
    with pytest.raises(MissingEntry):
        run.evaluate(Dataset.from_list(kit.rows(2, seed=9)))


def test_streaming(tiny, cache, tmp_path, no_reference):
    stream = trainer(tiny, tmp_path / "stream", cache, Dataset.from_list(PAIRS).to_iterable_dataset())
    stream.train()
    assert stream.state.log_history[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    absent = Dataset.from_list(kit.rows(6, seed=9)).to_iterable_dataset()
    with pytest.raises(MissingEntry, match="row 0 chosen"):
        trainer(tiny, tmp_path / "absent", cache, absent).train()


def test_attached_columns_need_no_cache(tiny, cache, tmp_path, no_reference):
    attached = cache.attach(Dataset.from_list(PAIRS), max_length=MAX_LENGTH)
    a = trainer(tiny, tmp_path / "columns", data=attached, precompute_ref_log_probs=True)
    b = trainer(tiny, tmp_path / "cache", cache)
    for run in (a, b):
        run.train()
        assert run.ref_model is None
    assert_same_run(a, b)


def test_a_reference_with_another_tokenizer(tiny, cache, tmp_path, no_reference):
    """It splits on the word's end, and was built from the text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = sorted({word for row in PAIRS for text in row.values() for word in text.split()}, reverse=True)
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["?", "<other end>", *words])}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder = kit.save_model(tmp_path / "other", seed=4)
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<other end>", unk_token="?").save_pretrained(folder)
    found = ReferenceCache(tmp_path / "cache")
    found.build(folder, kit.tokenizer_of(folder), PAIRS, progress=False)
    run = trainer(tiny, tmp_path / "run", found)
    expected = found.attach(PAIRS)
    assert [row["ref_chosen_logps"] for row in run.train_dataset] == [row["ref_chosen_logps"] for row in expected]
    run.train()


def test_what_would_be_scored_otherwise_raises(tiny, cache, tmp_path, no_reference):
    with pytest.raises(MissingEntry, match="max_length 1024"):
        trainer(tiny, tmp_path, cache, max_length=11)
    with pytest.raises(MissingEntry, match="^row 0 chosen"):
        trainer(tiny, tmp_path, cache, Dataset.from_list(kit.rows(2, seed=9)))
    plain = ReferenceCache(tmp_path / "plain")
    plain.build(tiny, kit.tokenizer_of(tiny), PAIRS, progress=False)
    with pytest.raises(CacheError, match="ld_alpha: needs the token logps .* 'reference' was built without"):
        trainer(tiny, tmp_path, plain, ld_alpha=0.5)
    with pytest.raises(CacheError, match="sync_ref_model"):
        trainer(tiny, tmp_path, cache, sync_ref_model=True)
    warm = ReferenceCache(tmp_path / "warm")
    warm.build(tiny, kit.tokenizer_of(tiny), PAIRS, temperature=2.0, progress=False)
    with pytest.raises(CacheError, match="reference: 'reference' was scored at temperature 2; DPO needs 1"):
        trainer(tiny, tmp_path, warm)
    common = {"args": config(tmp_path), "train_dataset": Dataset.from_list(PAIRS)}
    common |= {"processing_class": kit.tokenizer_of(tiny)}
    model = kit.model_of(tiny)
    with pytest.raises(CacheError, match="ref_model: expected None with a reference_cache"):
        FastDPOTrainer(model, kit.model_of(tiny), **common, reference_cache=cache)
    with pytest.raises(CacheError, match="data_collator: expected one that cuts as args do, max_length 1024"):
        FastDPOTrainer(model, **common, data_collator=DataCollatorForPreference(0, max_length=7), reference_cache=cache)
    with pytest.raises(CacheError, match="reference: 'x' without a reference_cache"):
        FastDPOTrainer(model, **common, reference="x")
    with pytest.raises(CacheError, match="'x' is not in .*; it holds reference"):
        FastDPOTrainer(model, **common, reference_cache=cache, reference="x")
    with pytest.raises(CacheError, match="nowhere: no such folder"):
        FastDPOTrainer(model, **common, reference_cache=tmp_path / "nowhere")


def test_arguments_of_the_caller_stay_as_they_are(tiny, cache, tmp_path):
    args = config(tmp_path)
    data, tokenizer = Dataset.from_list(PAIRS), kit.tokenizer_of(tiny)
    FastDPOTrainer(kit.model_of(tiny), None, args, None, data, processing_class=tokenizer, reference_cache=cache)
    assert args.precompute_ref_log_probs is False
    assert data.column_names == ["prompt", "chosen", "rejected"]
    assert dpo_trainer.hash_module.__name__ == "hash_module"


def test_our_defaults_are_trls():
    assert DPOConfig.max_length == MAX_LENGTH
    assert DPOConfig.truncation_mode == "keep_start"


def test_training_order_does_not_change(tiny, cache, tmp_path):
    """The seed alone decides which rows come when, with a cache or without."""
    orders = []
    for found in (None, cache):
        torch.manual_seed(5)
        run = trainer(tiny, tmp_path, found)
        orders.append([batch["input_ids"].tolist() for batch in run.get_train_dataloader()])
    assert orders[0] == orders[1]


# --- the command -----------------------------------------------------------------------------------------------------


def test_fastdpo_train_with_a_cache(tiny, tmp_path, capsys):
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    folder = str(tmp_path / "cache")
    assert cli.main(["cache", "build", "--model", tiny, "--data", str(data), "--cache", folder]) == 0
    base = ["train", "--model_name_or_path", tiny, "--data", str(data), "--max_steps", "2", "--logging_steps", "1"]
    base += ["--per_device_train_batch_size", "2", "--bf16", "false", "--disable_tqdm", "true"]
    losses = []
    for beta in ("0.1", "0.5"):
        for cached in ([], ["--reference_cache", folder]):
            output = tmp_path / f"out{beta}{len(cached)}"
            assert cli.main([*base, "--output_dir", str(output), "--beta", beta, *cached]) == 0
            lines = map(json.loads, (output / "metrics.jsonl").open())
            losses.append([line["loss"] for line in lines if "loss" in line])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[2] == pytest.approx(losses[3], rel=1e-5)
    capsys.readouterr()
    for more, message in [
        (["--reference_cache", folder, "--trainer", "trl"], "only FastDPOTrainer reads it"),
        (["--reference_cache", folder, "--reference", "x"], "'x' is not in"),
        (["--reference_cache", folder, "--max_length", "9"], "not in reference 'reference'"),
        (["--reference", "x"], "without a reference_cache"),
    ]:
        assert cli.main([*base, "--output_dir", str(tmp_path / "out"), *more]) == 1
        assert message in capsys.readouterr().err
