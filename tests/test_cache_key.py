"""Keys and fingerprints: what changes them, what does not, and that every process gives the same."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("trl")

import cache_kit as kit
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Cohere2Config, Gemma2Config, GraniteConfig

from fastdpo.cache import CacheError, Reference, ReferenceModel, Sequence, fingerprint
from fastdpo.cache.key import as_array, halves
from fastdpo.cache.rows import Preparation, prior_prefix, sequence
from fastdpo.integrations.head_transform import head_transform
from fastdpo.train_data import plain_chat_template

REFERENCE = Reference("f" * 64, "float32", None, 1.0, None, 1.0)
CHAT = {
    "prompt": [{"role": "user", "content": "sort two one three four"}],
    "chosen": [{"role": "assistant", "content": "one two three four"}],
    "rejected": [{"role": "assistant", "content": "four three two one"}],
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return kit.save_model(tmp_path_factory.mktemp("tiny"))


def key(ids: list[int], mask: list[int], reference: Reference = REFERENCE, prior: bool = False) -> bytes:
    return Sequence(np.array(ids, np.int32), np.array(mask, np.bool_), prior).key(reference)


def test_key_is_of_exactly_what_was_scored():
    variants = [
        key([1, 2, 3], [0, 1, 1]),
        key([1, 2, 4], [0, 1, 1]),
        key([1, 2, 3], [0, 0, 1]),
        key([1, 2, 3], [0, 1, 1], prior=True),
        key([1, 2], [0, 1]),
        key([1, 2, 3, 0], [0, 1, 1, 0]),
        key([1, 2, 3], [0, 1, 1], replace(REFERENCE, fingerprint="e" * 64)),
        key([1, 2, 3], [0, 1, 1], replace(REFERENCE, dtype="bfloat16")),
        key([1, 2, 3], [0, 1, 1], replace(REFERENCE, autocast="bfloat16")),
        key([1, 2, 3], [0, 1, 1], replace(REFERENCE, temperature=0.7)),
        key([1, 2, 3], [0, 1, 1], replace(REFERENCE, softcap=30.0)),
        key([1, 2, 3], [0, 1, 1], replace(REFERENCE, logit_scale=0.5)),
    ]
    assert len(set(variants)) == len(variants)
    assert all(len(variant) * 8 >= 128 for variant in variants)
    assert key([1, 2, 3], [0, 1, 1]) == variants[0]
    wide = Sequence(np.array([1, 2, 3], np.int64), np.array([0, 1, 1], np.bool_))
    assert wide.key(REFERENCE) == variants[0], "of the numbers, not of how they are stored"


def test_the_format_of_a_key_does_not_change_by_accident():
    """A cache on disk is found again by what later versions compute."""
    assert REFERENCE.id == "c39e1c109fe029aa2d6d65eee1410d29"
    assert key([1, 2, 3], [0, 1, 1]).hex() == "a2d8a7b303efadc330ba3d99733276ef"


def test_halves_sort_as_the_bytes_do():
    keys = sorted(np.random.default_rng(0).bytes(16) for _ in range(100))
    keys[3] = keys[2][:8] + b"\xff" * 8
    hi, lo = halves(as_array(sorted(keys)))
    assert (np.lexsort((lo, hi)) == np.arange(100)).all()


@pytest.mark.parametrize("which", ["max_length", "truncation_mode", "chat_template"])
def test_how_rows_become_tokens_changes_the_key(tiny, which):
    tokenizer = kit.tokenizer_of(tiny)
    tokenizer.chat_template = plain_chat_template(tokenizer)
    cut = [6, "keep_start"]
    before = sequence(Preparation(CHAT, tokenizer)(CHAT), 0, *cut, None).key(REFERENCE)
    assert sequence(Preparation(CHAT, tokenizer)(CHAT), 0, *cut, None).key(REFERENCE) == before
    if which == "max_length":
        cut[0] = 7
    elif which == "truncation_mode":
        cut[1] = "keep_end"
    else:
        tokenizer.chat_template = tokenizer.chat_template.replace("###", "sort")
    assert sequence(Preparation(CHAT, tokenizer)(CHAT), 0, *cut, None).key(REFERENCE) != before


def test_prior_is_of_the_tokens_that_count_given_the_prompt(tiny):
    tokenizer = kit.tokenizer_of(tiny)
    row = kit.rows(1)[0]
    prepared = Preparation(row, tokenizer)(row)
    given, alone = (sequence(prepared, part, 9, "keep_start", prior_prefix(tokenizer)) for part in (0, 2))
    assert alone.ids.tolist() == [tokenizer.eos_token_id, *given.ids[given.mask]]
    assert alone.counted.sum() == given.counted.sum() > 0
    assert alone.key(REFERENCE) != given.key(REFERENCE)


# --- fingerprints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_files_and_model_agree(tmp_path, tied, dtype):
    folder = kit.save_model(tmp_path / "one", tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    expected = fingerprint.of_model(model)
    assert fingerprint.of_checkpoint(folder, dtype).fingerprint == expected
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    for how in (dtype, "auto"):
        assert fingerprint.of_checkpoint(str(tmp_path / "many"), how).fingerprint == expected
    other = "bfloat16" if dtype == "float32" else "float32"
    assert fingerprint.of_checkpoint(folder, other).fingerprint != expected


def test_every_weight_counts(tiny):
    model = kit.model_of(tiny)
    before = fingerprint.of_model(model)
    for name, tensor in model.state_dict().items():
        old = tensor.flatten()[-1].item()
        tensor.flatten()[-1] = float(np.nextafter(np.float32(old), np.float32(9)))
        assert fingerprint.of_model(model) != before, name
        tensor.flatten()[-1] = old
    assert fingerprint.of_model(model) == before
    model.config.rms_norm_eps *= 2
    assert fingerprint.of_model(model) != before, "the architecture counts"


def test_what_a_trainer_does_to_a_model_does_not_count(tiny):
    model = kit.model_of(tiny)
    before = fingerprint.of_model(model)
    model.config.pad_token_id = 7
    model.config.use_cache = False
    model.config._name_or_path = "elsewhere"
    model.train()
    model.requires_grad_(False)
    assert fingerprint.of_model(model) == before


def test_adapters_count_while_they_are_enabled(tiny, tmp_path):
    plain = fingerprint.of_model(kit.model_of(tiny))
    config = LoraConfig(r=4, target_modules=["v_proj", "q_proj", "o_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(kit.model_of(tiny), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapted = fingerprint.of_model(model)
    assert adapted != plain
    with model.disable_adapter():
        assert fingerprint.of_model(model) == plain
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(kit.model_of(tiny), tmp_path, adapter_name="another_name")
    assert fingerprint.of_model(again) == adapted
    assert fingerprint.of_checkpoint(str(tmp_path)) is None, "its own files are not the model"
    assert ReferenceModel(str(tmp_path)).reference.fingerprint == adapted
    model.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"] *= 2
    model.peft_config["default"].lora_alpha *= 2
    assert fingerprint.of_model(model) != adapted


def test_files_that_loading_does_more_with_are_not_hashed_as_they_are(tiny, tmp_path):
    from safetensors.torch import load_file, save_file

    for change in ("a name more", "a name less", "a shape"):
        folder = tmp_path / change
        shutil.copytree(tiny, folder)
        weights = load_file(folder / "model.safetensors")
        if change == "a name more":
            weights["model.old.weight"] = torch.zeros(3)
        elif change == "a name less":
            del weights["model.norm.weight"]
        else:
            weights["model.norm.weight"] = torch.zeros(5)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        assert fingerprint.of_checkpoint(str(folder)) is None


def test_weights_that_are_not_there_raise(tiny):
    model = kit.model_of(tiny)
    with pytest.raises(CacheError, match=r"model: model\..* is on the meta device"):
        fingerprint.of_model(copy.deepcopy(model).to("meta"))
    model.model.norm.weight.ds_id = 3
    with pytest.raises(CacheError, match="norm.weight is partitioned by DeepSpeed ZeRO-3"):
        fingerprint.of_model(model)


def test_two_processes_agree(tiny, tmp_path):
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import cache_kit as kit
from peft import LoraConfig, get_peft_model
from fastdpo.cache import ReferenceModel
import torch
torch.manual_seed(0)
model = get_peft_model(kit.model_of({tiny!r}), LoraConfig(target_modules=["v_proj", "q_proj", "o_proj"]))
print(ReferenceModel({tiny!r}).reference.id, ReferenceModel(model).reference.id)
"""
    answers = set()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        answers.add(done.stdout)
    assert len(answers) == 1
    assert answers.pop().split()[0] == ReferenceModel(tiny).reference.id


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (Gemma2Config(final_logit_softcapping=30.0), (30.0, 1.0)),
        (Cohere2Config(logit_scale=0.25), (None, 0.25)),
        (GraniteConfig(logits_scaling=8.0), (None, 0.125)),
    ],
)
def test_head_transforms_are_in_the_reference(config, expected):
    assert head_transform(config) == expected


# --- several adapters, and models that change ------------------------------------------------------------------------


def adapted(tiny: str, *names: str, seed: int = 0, reverse: bool = False):
    """A model with adapters of random weights, the first drawn with `seed`, all of them active."""
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(kit.model_of(tiny), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    for i, name in enumerate(names):
        generator = torch.Generator().manual_seed(i or seed)
        for full, parameter in model.named_parameters():
            if f".{name}." in full:
                parameter.data = torch.randn(parameter.shape, generator=generator)
    model.base_model.set_adapter(list(reversed(names) if reverse else names))
    return model


def test_every_active_adapter_counts(tiny):
    before = fingerprint.of_model(adapted(tiny, "a", "b"))
    assert fingerprint.of_model(adapted(tiny, "a", "b", seed=5)) != before, "the first"
    assert fingerprint.of_model(adapted(tiny, "x", "y", reverse=True)) == before, "neither name nor order"
    alone, beside = adapted(tiny, "a"), adapted(tiny, "a", "ab")
    assert fingerprint.of_model(beside) != fingerprint.of_model(alone)
    beside.base_model.set_adapter(["a"])
    assert fingerprint.of_model(beside) == fingerprint.of_model(alone), "'a' does not take in 'ab'"


def test_the_scaling_of_an_adapter_and_merging_it_count(tiny):
    model = adapted(tiny, "a")
    found = [fingerprint.of_model(model)]
    for module in model.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(3.0)
    found.append(fingerprint.of_model(model))
    model.merge_adapter()
    found.append(fingerprint.of_model(model))
    with model.disable_adapter():
        found.append(fingerprint.of_model(model))
    assert len(set(found)) == 4


@pytest.mark.parametrize("how", ["in place", "through .data", "other storage", "config", "adapter"])
def test_a_model_that_changes_is_found_out(tiny, how):
    model = adapted(tiny, "a") if how == "adapter" else kit.model_of(tiny)
    reference = ReferenceModel(model)
    assert reference.reference.fingerprint
    reference.check_unchanged()
    weight = model.get_output_embeddings().weight
    with torch.no_grad():
        if how == "in place":
            weight[5, 7] += 1
        elif how == "through .data":
            weight.data.mul_(1.5)
        elif how == "other storage":
            weight.data = weight.data + 1
        elif how == "config":
            model.config.rms_norm_eps *= 2
        else:
            model.base_model.disable_adapter_layers()
    with pytest.raises(CacheError, match="changed after it was fingerprinted"):
        reference.check_unchanged()


def test_a_model_that_is_moved_has_not_changed(tiny):
    model = kit.model_of(tiny)
    reference = ReferenceModel(model)
    assert reference.reference.fingerprint
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    reference.check_unchanged()


def test_a_folder_that_is_replaced_before_it_is_loaded_raises(tiny, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    reference = ReferenceModel(folder)
    assert reference.reference == ReferenceModel(tiny).reference
    shutil.copy(Path(kit.save_model(tmp_path / "other", seed=3)) / "model.safetensors", folder)
    with pytest.raises(CacheError, match="changed on disk after it was fingerprinted"):
        _ = reference.scorer


def test_weights_that_are_cut_short_raise(tiny, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CacheError, match="model: .*its safetensors are cut short or damaged"):
        _ = ReferenceModel(folder).reference
