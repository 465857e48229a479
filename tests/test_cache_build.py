"""Building: logps equal a direct forward, each completion is scored once, in any form of data."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

pytest.importorskip("trl")

import cache_kit as kit
import numpy as np
import torch
from build_kit import PAIRS, build, cache, tiny  # noqa: F401
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM

from fastdpo import demo_task
from fastdpo.cache import CacheError, MissingEntry, ReferenceCache
from fastdpo.cache import build as build_module
from fastdpo.train_data import plain_chat_template


def direct(model: Any, tokenizer: Any, prompt: str, completion: str, temperature: float = 1.0) -> list[float]:
    """Token logps of the completion and its end, from the model's own logits, in float64."""
    ids = tokenizer(prompt + completion + tokenizer.eos_token, return_tensors="pt")["input_ids"]
    start = len(tokenizer(prompt)["input_ids"])
    with torch.no_grad():
        logps = (model(ids).logits.double() / temperature).log_softmax(-1)
    return [logps[0, t - 1, ids[0, t]].item() for t in range(start, ids.shape[1])]


def test_logps_equal_a_direct_forward(tiny, cache):
    report = build(cache, tiny, token_logps=True, temperature=0.8)
    assert (report.sequences, report.scored, report.duplicates, report.cached) == (20, 20, 0, 0)
    model, tokenizer = kit.model_of(tiny), kit.tokenizer_of(tiny)
    for row in cache.attach(PAIRS, token_logps=True):
        for side in ("chosen", "rejected"):
            truth = direct(model, tokenizer, row["prompt"], row[side], 0.8)
            np.testing.assert_allclose(row[f"ref_{side}_token_logps"], truth, rtol=1e-5, atol=1e-6)
            assert row[f"ref_{side}_logps"] == pytest.approx(sum(truth), rel=1e-6)


@pytest.mark.parametrize("architecture", ["softcap", "scale", "bias"])
def test_head_transforms_and_bias(architecture, cache):
    tokenizer = demo_task.tokenizer()
    sizes = {"vocab_size": kit.VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0, "initializer_range": 0.5}
    if architecture == "softcap":
        model = Gemma2ForCausalLM(Gemma2Config(**sizes, head_dim=16, final_logit_softcapping=2.0))
    else:
        model = CohereForCausalLM(CohereConfig(**sizes, logit_scale=0.25))
    if architecture == "bias":
        model.lm_head.bias = torch.nn.Parameter(torch.randn(kit.VOCAB))
    build(cache, model.eval(), PAIRS[:3], tokenizer)
    for row in cache.attach(PAIRS[:3], tokenizer=tokenizer):
        truth = direct(model, tokenizer, row["prompt"], row["chosen"])
        assert row["ref_chosen_logps"] == pytest.approx(sum(truth), rel=1e-6)


def test_a_model_whose_logits_are_made_otherwise_is_refused(tiny, cache):
    model = kit.model_of(tiny)
    forward = model.forward

    def doubled(*arguments, **keywords):
        out = forward(*arguments, **keywords)
        out.logits = out.logits * 2
        return out

    model.forward = doubled
    with pytest.raises(CacheError, match=r"model: LlamaForCausalLM does not make its logits of head\(last_hidden"):
        build(cache, model, tokenizer=kit.tokenizer_of(tiny))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_batches_change_rounding_only(tiny, tmp_path, dtype):
    found = []
    for tokens in (1, 40, 8192):
        cache = ReferenceCache(tmp_path / str(tokens))
        build(cache, tiny, batch_tokens=tokens, dtype=dtype)
        found.append(np.array([[r["ref_chosen_logps"], r["ref_rejected_logps"]] for r in cache.attach(PAIRS)]))
    relative = 1e-6 if dtype == "float32" else 1e-2
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=relative)
    assert cache.reference().reference.dtype == dtype


def test_duplicates_are_scored_once_and_new_rows_only(tiny, cache, monkeypatch):
    scored = []
    batches = build_module.Builder._batches
    monkeypatch.setattr(build_module.Builder, "_batches", lambda *a: (scored.append(len(b)) or b for b in batches(*a)))
    report = build(cache, tiny, PAIRS[:4] + PAIRS[:2])
    assert (report.sequences, report.scored, report.duplicates) == (12, 8, 4)
    report = build(cache, tiny, PAIRS[2:7])
    assert (report.scored, report.cached) == (6, 4)
    swapped = [{"prompt": r["prompt"], "chosen": r["rejected"], "rejected": r["chosen"]} for r in PAIRS[:7]]
    report = build(cache, tiny, swapped)
    assert (report.scored, report.cached, report.shards) == (0, 14, 0), "the same completions, on the other side"
    assert sum(scored) == 14
    assert "7" not in str(report) and "14 already there" in str(report)


def test_nothing_is_loaded_when_nothing_is_missing(tiny, cache, monkeypatch):
    build(cache, tiny)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("loaded a model"))
    assert build(cache, tiny).cached == 20


def test_order_of_rows_and_shard_size_do_not_matter(tiny, cache, tmp_path):
    build(cache, tiny, shard_size=3)
    assert len(kit.shard_paths(cache)) == 7
    other = ReferenceCache(tmp_path / "other")
    build(other, tiny, PAIRS[::-1], shard_size=3)
    assert kit.entries(other) == kit.entries(cache)


@pytest.mark.parametrize("step", ["build from a folder", "build from a stream", "attach", "compute"])
def test_global_random_state_is_untouched(tiny, cache, step):
    def draw() -> tuple[Any, ...]:
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()  # noqa: NPY002

    def noisy() -> Any:
        draw()
        yield from PAIRS

    tokenizer = kit.tokenizer_of(tiny)
    build(cache, tiny, max_length=9)
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    expected = draw()
    torch.set_rng_state(states[0]), np.random.set_state(states[1]), random.setstate(states[2])  # noqa: NPY002
    if step == "build from a folder":
        assert build(cache, tiny).scored > 0
    elif step == "build from a stream":
        assert build(cache, tiny, noisy(), tokenizer).scored > 0
    elif step == "attach":
        cache.attach(PAIRS)
    else:
        cache.attach(PAIRS, max_length=11, on_miss="compute", model=tiny, tokenizer=tokenizer, progress=False)
    assert draw() == expected


def test_the_model_is_left_as_it_was(tiny, cache):
    model = kit.model_of(tiny)
    model.train()
    model.model.norm.eval()
    before = {name: module.training for name, module in model.named_modules()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        build(cache, model, tokenizer=kit.tokenizer_of(tiny))
    assert {name: module.training for name, module in model.named_modules()} == before
    assert all(parameter.grad is None for parameter in model.parameters())
    again = ReferenceCache(cache.path.parent / "again")
    build(again, tiny)
    assert kit.entries(again) == kit.entries(cache), "the caller's autocast has no say"


def test_autocast_is_another_reference(tiny, cache):
    build(cache, tiny, name="plain")
    build(cache, tiny, name="autocast", autocast="bfloat16")
    plain, autocast = (kit.entries(cache, name) for name in ("plain", "autocast"))
    assert not set(plain) & set(autocast)
    a, b = (cache.attach(PAIRS, name)[0]["ref_chosen_logps"] for name in ("plain", "autocast"))
    assert a != b and a == pytest.approx(b, rel=0.05)


def test_priors(tiny, cache):
    build(cache, tiny)
    with pytest.raises(MissingEntry, match="row 0 chosen prior"):
        cache.attach(PAIRS, prior=True)
    assert build(cache, tiny, prior=True).scored == len({r[s] for r in PAIRS for s in ("chosen", "rejected")})
    model, tokenizer = kit.model_of(tiny), kit.tokenizer_of(tiny)
    row = cache.attach(PAIRS, prior=True)[0]
    # No beginning of text here, so the end of text stands for no prompt
    truth = direct(model, tokenizer, tokenizer.eos_token, row["chosen"])
    assert row["ref_chosen_prior_logps"] == pytest.approx(sum(truth), rel=1e-6)


@pytest.mark.parametrize("form", ["text", "messages", "tokens", "implicit prompt", "Dataset", "file"])
def test_forms_of_data(tiny, cache, form, tmp_path):
    tokenizer = kit.tokenizer_of(tiny)
    data: Any = PAIRS[:3]
    if form == "messages":
        tokenizer.chat_template = plain_chat_template(tokenizer)
        roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        data = [{k: [{"role": roles[k], "content": v.strip()}] for k, v in row.items()} for row in data]
    elif form == "tokens":
        ids = {k: tokenizer(v)["input_ids"] for k, v in data[0].items()}
        data = [{f"{k}_ids": v for k, v in ids.items()}]
    elif form == "implicit prompt":
        data = [{k: row["prompt"] + row[k] for k in ("chosen", "rejected")} for row in data]
    elif form == "Dataset":
        data = Dataset.from_list(data).with_format("torch")
    elif form == "file":
        data = tmp_path / "pairs.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in PAIRS[:3]))
    report = build(cache, tiny, data, tokenizer)
    assert report.scored == report.sequences == 2 * (1 if form == "tokens" else 3)
    assert build(cache, tiny, data, tokenizer).scored == 0
    if form not in ("file", "tokens"):
        row = cache.attach(data, tokenizer=tokenizer)[0]
        assert row["ref_chosen_logps"] < 0
    if form == "messages":
        prompt = tokenizer.apply_chat_template(data[0]["prompt"], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(data[0]["prompt"] + data[0]["chosen"], tokenize=False)
        ids, start = tokenizer(whole, return_tensors="pt")["input_ids"], len(tokenizer(prompt)["input_ids"])
        with torch.no_grad():
            logps = kit.model_of(tiny)(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])
        assert row["ref_chosen_logps"] == pytest.approx(logps[start - 1 :].sum().item(), rel=1e-6)


def test_iterables_are_read_in_windows(tiny, cache, monkeypatch):
    monkeypatch.setattr(build_module, "WINDOW", 4)
    report = build(cache, tiny, iter(PAIRS + PAIRS[:1]), tokenizer=kit.tokenizer_of(tiny))
    assert (report.sequences, report.scored, report.cached) == (22, 20, 2)
    stream = Dataset.from_list(PAIRS).to_iterable_dataset()
    assert build(cache, tiny, stream).cached == 20
    from_stream, from_list = list(cache.attach(stream)), cache.attach(PAIRS)
    assert from_stream == from_list


def test_a_stream_raises_where_a_row_is_missing(tiny, cache):
    build(cache, tiny, PAIRS[:4])
    stream = Dataset.from_list(PAIRS).to_iterable_dataset()
    with pytest.raises(MissingEntry, match="^row 4 chosen"):
        list(cache.attach(stream))
    with pytest.raises(MissingEntry, match="^row 4 chosen, row 5 chosen.* of 20: not in reference 'reference'"):
        cache.attach(Dataset.from_list(PAIRS))


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_missing_can_be_computed(tiny, tmp_path, stream):
    cache, whole = ReferenceCache(tmp_path / "cache"), ReferenceCache(tmp_path / "whole")
    build(cache, tiny, PAIRS[:4])
    build(whole, tiny)
    data = Dataset.from_list(PAIRS)
    data = data.to_iterable_dataset() if stream else data
    keywords = {"tokenizer": kit.tokenizer_of(tiny), "on_miss": "compute", "model": tiny, "progress": False}
    found = list(cache.attach(data, **keywords))
    for mine, theirs in zip(found, whole.attach(PAIRS), strict=True):
        for side in ("ref_chosen_logps", "ref_rejected_logps"):
            assert mine[side] == pytest.approx(theirs[side], rel=1e-6)
    assert build(cache, tiny).scored == 0, "they were added"


def test_another_tokenizer_than_the_policys(tiny, cache, tmp_path):
    """The reference splits words into letters; the policy does not. Scored on the text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {c: i for i, c in enumerate("?<abcdefghijklmnopqrstuvwxyz :>")}
    core = Tokenizer(models.WordLevel({"<end>": 60, **letters}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    speller = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", unk_token="?")
    folder = kit.save_model(tmp_path / "speller", seed=1)
    speller.save_pretrained(folder)
    build(cache, folder, name="speller", tokenizer=kit.tokenizer_of(folder))
    policy, model, own = kit.tokenizer_of(tiny), kit.model_of(folder), kit.tokenizer_of(folder)
    row = cache.attach(PAIRS, "speller", tokenizer=policy)[0]
    assert row["ref_chosen_logps"] == pytest.approx(sum(direct(model, own, row["prompt"], row["chosen"])), rel=1e-6)
    tokens = [{"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4]}]
    with pytest.raises(CacheError, match="holds the tokens of another tokenizer than reference 'speller'"):
        cache.attach(tokens, "speller", tokenizer=policy)
    policy.save_pretrained(folder)
    with pytest.raises(CacheError, match="is not the one that reference 'speller' was built with any more"):
        cache.attach(PAIRS, "speller", tokenizer=kit.tokenizer_of(tiny))


def test_several_references_in_one_cache(tiny, cache, tmp_path):
    strong = kit.save_model(tmp_path / "strong", seed=3)
    build(cache, tiny, name="base")
    build(cache, strong, name="strong")
    base, other = (cache.attach(PAIRS[:1], name)[0]["ref_chosen_logps"] for name in ("base", "strong"))
    assert base != other
    with pytest.raises(CacheError, match="reference: expected a name of .* which holds base, strong"):
        cache.attach(PAIRS)
    with pytest.raises(CacheError, match=r"name: 'base' is another reference .*\(fingerprint was .* choose another"):
        build(cache, strong, name="base")
    with pytest.raises(CacheError, match="dtype was float32, is bfloat16"):
        build(cache, tiny, name="base", dtype="bfloat16")
    build(cache, strong, name="base", replace_name=True)
    assert cache.attach(PAIRS[:1], "base")[0]["ref_chosen_logps"] == other


def test_an_adapter_is_scored_and_its_base_is_not_confused_with_it(tiny, cache):
    tokenizer = kit.tokenizer_of(tiny)
    model = get_peft_model(kit.model_of(tiny), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    build(cache, model, name="adapted", tokenizer=tokenizer)
    row = cache.attach(PAIRS, "adapted", tokenizer=tokenizer)[0]
    truth = sum(direct(model, tokenizer, row["prompt"], row["chosen"]))
    assert row["ref_chosen_logps"] == pytest.approx(truth, rel=1e-6)
    with model.disable_adapter():
        build(cache, model, name="base", tokenizer=tokenizer)
    assert build(cache, tiny, name="base").scored == 0, "the same reference as the plain model"


def test_rows_that_have_no_completion_left(tiny, cache):
    report = build(cache, tiny, max_length=6)
    assert report.empty == 20
    assert "20 have no completion token within max_length" in str(report)
    assert cache.attach(PAIRS)[0]["ref_chosen_logps"] == 0.0
    assert build(cache, tiny, max_length=8).scored == 20
    assert {row["ref_chosen_logps"] for row in cache.attach(PAIRS, max_length=6)} == {0.0}
