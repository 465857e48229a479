"""Building where something is wrong: nothing wrong is stored, and the error says what it was."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("trl")

import cache_kit as kit
import numpy as np
import torch
from build_kit import PAIRS, build, cache, tiny  # noqa: F401
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from fastdpo.cache import CacheError, MissingEntry, ReferenceModel, Sequence, score


def test_a_logp_that_is_not_finite_is_not_stored(tiny, cache, monkeypatch):
    call = score.Scorer.__call__

    def one_is_nan(self, sequences):
        return [
            logps * np.nan if found.ids[0] == sequences[0].ids[0] and len(found.ids) == 12 else logps
            for found, logps in zip(sequences, call(self, sequences), strict=True)
        ]

    tokenizer = kit.tokenizer_of(tiny)
    rows = [{"prompt": "sort one two three four five :", "chosen": " one two three four", "rejected": " five"}, *PAIRS]
    monkeypatch.setattr(score.Scorer, "__call__", one_is_nan)
    with pytest.raises(
        CacheError, match="^1 sequences have no finite logp in float32 and were not stored: row 0 chosen"
    ):
        build(cache, tiny, rows, tokenizer)
    monkeypatch.undo()
    assert len(kit.entries(cache)) == 21, "all others are"
    with pytest.raises(MissingEntry, match="^row 0 chosen of 22"):
        cache.attach(rows)
    assert build(cache, tiny, rows, tokenizer).scored == 1


def test_a_token_that_the_model_does_not_have(tiny, cache):
    rows = [{"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [999]}]
    with pytest.raises(CacheError, match="data, among row 0 .*: token id 999: the model has 203"):
        cache.build(tiny, None, rows, progress=False)


def test_bad_arguments(tiny, cache):
    tokenizer = kit.tokenizer_of(tiny)
    bad: list[tuple[dict[str, Any], str]] = [
        ({"max_length": 0}, "max_length: expected an int above 0, or None, got 0"),
        ({"truncation_mode": "left"}, "truncation_mode: expected"),
        ({"shard_size": 0}, "shard_size: expected an int above 0"),
        ({"batch_tokens": 1.5}, "batch_tokens: expected an int above 0"),
        ({"dtype": "int8"}, "dtype: expected one of float32"),
        ({"autocast": "float32"}, "autocast: expected bfloat16, float16 or None"),
        ({"name": "a/b"}, "name: expected letters"),
        ({"temperature": 0.0}, "temperature: expected a finite number above 0"),
        ({"backend": "cuda"}, "backend: unknown backend"),
    ]
    for keywords, message in bad:
        with pytest.raises(ValueError, match=message):
            build(cache, tiny, **keywords)
    with pytest.raises(CacheError, match="data: has no rows"):
        build(cache, tiny, [])
    with pytest.raises(CacheError, match="data: missing column rejected; has prompt, chosen"):
        build(cache, tiny, [{"prompt": "a", "chosen": "b"}])
    with pytest.raises(CacheError, match="data: expected one data set, got a dict of train"):
        build(cache, tiny, {"train": PAIRS})
    with pytest.raises(CacheError, match="tokenizer: expected one, for data that has no prompt_ids"):
        cache.build(tiny, None, PAIRS, progress=False)
    messages = [{k: [{"role": "user", "content": v}] for k, v in PAIRS[0].items()}]
    with pytest.raises(CacheError, match="tokenizer: has no chat_template"):
        build(cache, tiny, messages, tokenizer)
    assert not cache.path.exists(), "none of them left anything"
    build(cache, tiny, PAIRS[:1])
    for keywords, message in [
        ({"on_miss": "zero"}, "on_miss: expected 'raise' or 'compute'"),
        ({"on_miss": "compute"}, "model: expected one with on_miss='compute'"),
        ({"model": tiny}, "model: expected none with on_miss='raise'"),
        ({"shard_size": 3}, "shard_size: not a keyword of attach"),
        ({"max_length": -3}, "max_length: expected"),
    ]:
        with pytest.raises(CacheError, match=message):
            cache.attach(PAIRS[:1], **keywords)


def test_a_head_that_is_not_a_plain_layer_is_refused(tiny, cache):
    model = get_peft_model(kit.model_of(tiny), LoraConfig(r=4, target_modules=["lm_head"]))
    with pytest.raises(CacheError, match="model: expected an LM head that is a plain Linear layer, got Linear"):
        build(cache, model, tokenizer=kit.tokenizer_of(tiny))


def test_scorer_alone(tiny):
    reference = ReferenceModel(tiny)
    ids = np.arange(2, 9, dtype=np.int32)
    whole = reference.scorer([Sequence(ids, np.ones(7, np.bool_))])[0]
    assert whole.shape == (6,), "nothing predicts the first"
    none, part = reference.scorer([Sequence(ids, np.zeros(7, np.bool_)), Sequence(ids, ids > 5)])
    assert none.shape == (0,)
    np.testing.assert_allclose(part, whole[-3:], rtol=1e-5)


def test_computing_into_an_empty_cache_and_as_built(tiny, cache):
    keywords = {"tokenizer": kit.tokenizer_of(tiny), "on_miss": "compute", "model": tiny, "progress": False}
    cache.attach(PAIRS[:2], **keywords, max_length=9)
    assert cache.reference().max_length == 9
    cache.attach(PAIRS[2:4], **keywords)
    assert cache.reference().max_length == 9, "as it was built"
    assert len(kit.entries(cache)) == 8
    cache.attach(PAIRS[:1], "other", **keywords, dtype="bfloat16")
    assert sorted(cache.references) == ["other", "reference"]
    with pytest.raises(CacheError, match="name: 'other' is another reference"):
        cache.attach(PAIRS[:1], "other", **keywords)


@pytest.mark.parametrize("stream", [False, True])
def test_a_model_that_is_trained_on_stores_nothing(tiny, cache, stream):
    """What it scores then is not the reference's."""
    model = kit.model_of(tiny)
    data = Dataset.from_list(PAIRS)
    keywords = {"tokenizer": kit.tokenizer_of(tiny), "on_miss": "compute", "model": model, "progress": False}
    attached = cache.attach(data.to_iterable_dataset(), **keywords)
    if not stream:
        cache.build(model, kit.tokenizer_of(tiny), PAIRS[:1], progress=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    with pytest.raises(CacheError, match="changed after it was fingerprinted"):
        list(attached)
    assert len(kit.entries(cache)) == (0 if stream else 2)
