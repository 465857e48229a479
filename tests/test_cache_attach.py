"""What attaching columns promises: the data set stays as it was, and says how its columns were made."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest

pytest.importorskip("trl")

import cache_kit as kit
from datasets import Dataset, load_from_disk
from test_cache_trl import config

from fastdpo import cli
from fastdpo.cache import CacheError, ReferenceCache, columns, record, shard
from fastdpo.integrations.trl import FastDPOTrainer

PAIRS = kit.rows(6)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return kit.save_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def cache(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> ReferenceCache:
    """With token logps, cut to 12 tokens."""
    found = ReferenceCache(tmp_path_factory.mktemp("cache"))
    found.build(tiny, kit.tokenizer_of(tiny), PAIRS, token_logps=True, max_length=12, shard_size=3, progress=False)
    return found


def train(tiny: str, output: Path, data: Dataset, ref_model=None, **settings) -> None:
    settings = {"max_length": 12, "precompute_ref_log_probs": True, "max_steps": 1, **settings}
    common = {"train_dataset": data, "processing_class": kit.tokenizer_of(tiny)}
    FastDPOTrainer(kit.model_of(tiny), ref_model, args=config(output, **settings), **common)


def test_columns_say_how_they_were_made(tiny, cache, tmp_path):
    attached = cache.attach(Dataset.from_list(PAIRS))
    attached.map(lambda row: {"more": 1}).select(range(4)).save_to_disk(tmp_path / "saved")
    again = load_from_disk(tmp_path / "saved")
    (made,) = record.read(again)
    assert made == (cache.reference().reference.id, 1.0, 12, "keep_start", None)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*are taken as they are")
        train(tiny, tmp_path, again)
    for settings, message in [
        ({"max_length": 13}, "max_length: the train data's ref_chosen_logps were made with 12, the trainer has 13"),
        ({"truncation_mode": "keep_end"}, "truncation_mode: the train"),
        ({"ld_alpha": 0.5}, "ld_alpha: the train"),
        ({"ref_model": kit.model_of(tiny)}, "ref_model: expected None, as the train data has"),
    ]:
        with pytest.raises(CacheError, match=message):
            train(tiny, tmp_path, again, **settings)
    assert len(record.read(cache.attach(attached))) == 1, "attached anew, said anew"


def test_columns_that_say_nothing_are_warned_of(tiny, cache, tmp_path):
    with pytest.warns(UserWarning, match="train data: .* are taken as they are; nothing says which reference"):
        train(tiny, tmp_path, Dataset.from_list(cache.attach(PAIRS)))


def test_the_format_stays(cache):
    data = Dataset.from_list([{**row, "number": i} for i, row in enumerate(PAIRS)])
    attached = cache.attach(data.with_format("torch", ["number"], output_all_columns=True))
    assert attached.format["type"] == "torch" and attached.format["output_all_columns"]
    assert attached.format["columns"] == ["number", columns.CHOSEN, columns.REJECTED]
    assert attached[0]["chosen"] == PAIRS[0]["chosen"]
    assert cache.attach(data).format["type"] is None
    assert data.info.description == ""


def test_each_shard_is_read_once_for_token_logps(cache, monkeypatch):
    monkeypatch.setattr(columns, "BATCH", 2)
    data, reads, read = Dataset.from_list(PAIRS), [], shard.read
    expected = cache.attach(PAIRS, token_logps=True)
    monkeypatch.setattr(shard, "read", lambda *a, **k: reads.append(a) or read(*a, **k))
    attached = cache.attach(data, token_logps=True)
    assert len(reads) == len(kit.shard_paths(cache)) == 4
    for mine, theirs in zip(attached, expected, strict=True):
        assert mine["ref_rejected_token_logps"] == pytest.approx(theirs["ref_rejected_token_logps"])
        assert mine["ref_chosen_logps"] == theirs["ref_chosen_logps"]


def test_rows_without_a_completion_token_are_counted(tiny, cache):
    cache.build(tiny, kit.tokenizer_of(tiny), PAIRS[:2], max_length=5, progress=False)
    with pytest.warns(UserWarning, match="4 of 4 completions have no token within max_length 5: logp 0"):
        cache.attach(PAIRS[:2], max_length=5)


def test_bad_keywords_and_rows(tiny, cache, tmp_path):
    tokenizer = kit.tokenizer_of(tiny)
    with pytest.raises(CacheError, match="shardsize: not a keyword of attach with on_miss='compute'"):
        cache.attach(PAIRS, on_miss="compute", model=tiny, tokenizer=tokenizer, shardsize=3)
    tokenizer.chat_template = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
    tokenizer.chat_template += "{% endif %}{{ m.content }}{% endfor %}"
    roles = ("user", "system")
    rows = [
        {"prompt": [{"role": role, "content": "a"}]}
        | {k: [{"role": "assistant", "content": k}] for k in ("chosen", "rejected")}
        for role in roles
    ]
    with pytest.raises(CacheError, match="data: row 1: cannot be made into tokens: TemplateError: no system"):
        ReferenceCache(tmp_path / "c").build(tiny, tokenizer, rows, progress=False)
    with pytest.raises(CacheError, match="row 0: cannot be made into tokens"):
        ReferenceCache(tmp_path / "c").build(tiny, tokenizer, rows[::-1], progress=False)


def test_a_path_and_a_relative_folder_are_models(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(tiny).parent)
    cache = ReferenceCache(tmp_path / "cache")
    relative = Path(tiny).name
    cache.build(Path(relative), kit.tokenizer_of(relative), PAIRS, progress=False)
    assert cache.reference().tokenizer == cache.reference().model == str(Path(tiny).resolve())
    monkeypatch.chdir(tmp_path)
    assert cache.attach(PAIRS)[0][columns.CHOSEN] < 0


def test_a_tokenizer_that_was_put_into_a_manifest_is_not_loaded(tiny, tmp_path, monkeypatch):
    from transformers import AutoTokenizer

    cache = ReferenceCache(tmp_path / "cache")
    cache.build(tiny, kit.tokenizer_of(tiny), PAIRS, progress=False)
    path = tmp_path / "cache" / "references" / "reference.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer": "/elsewhere"}))
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: pytest.fail("loaded a tokenizer"))
    with pytest.raises(CacheError, match=r"reference.json: damaged or edited"):
        cache.attach(PAIRS)


def test_max_length_is_a_number(capsys):
    for command in (["build", "--model", "m"], ["attach", "--output", "o"]):
        with pytest.raises(SystemExit):
            cli.main(["cache", *command, "--data", "d", "--cache", "c", "--max-length", "abc"])
        assert "expected a number of tokens, or 0 for all, got 'abc'" in capsys.readouterr().err
