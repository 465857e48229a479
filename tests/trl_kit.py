"""What the tests of the TRL integration share: a tiny model in a folder, pairs, short runs, and their comparison."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

from cache_kit import VOCAB, rows, save_model, tokenizer_of  # noqa: F401
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import DPOConfig

from fastdpo.integrations import trl as integration

ORIGINAL_SITES = integration._current()
PAIRS = rows(6)


@pytest.fixture(autouse=True)
def trl_as_it_was() -> Iterator[None]:
    yield
    integration.unpatch()
    assert integration._current() == ORIGINAL_SITES


@pytest.fixture
def own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL keeps precomputed logps in a file named after data and model; here each trainer computes its own."""
    numbers = itertools.count()
    monkeypatch.setattr(Dataset, "_get_cache_file_path", lambda *_: str(tmp_path / f"cache-{next(numbers)}.arrow"))


def config_of(config_class: type, output: Path, **settings: Any) -> Any:
    """Three steps of two rows in float32."""
    fixed = {"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "logging_steps": 1, "seed": 1}
    fixed |= {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "bf16": False, "use_cpu": True}
    return config_class(output_dir=str(output), **{**fixed, **settings})


def make(
    trainer_class: type,
    tiny: str,
    output: Path,
    *,
    model: Any = None,
    rows: Any = None,
    config_class: type = DPOConfig,
    arguments: dict[str, Any] | None = None,
    **settings: Any,
) -> Any:
    """A trainer on the tiny model (or `model`), not yet trained. settings: of its config; arguments: of the trainer."""
    given = {
        "model": AutoModelForCausalLM.from_pretrained(tiny) if model is None else model,
        "args": config_of(config_class, output, **settings),
        "train_dataset": Dataset.from_list(PAIRS if rows is None else rows),
        "processing_class": tokenizer_of(tiny),
    }
    return trainer_class(**(given | (arguments or {})))


def train(*given: Any, **keywords: Any) -> Any:
    """`make`, and its three steps; returns the trainer."""
    trainer = make(*given, **keywords)
    trainer.train()
    return trainer


def assert_same_run(theirs: Any, mine: Any) -> None:
    """Equal logs (all metrics, not the loss alone) and weights, to float32 rounding."""
    skip = ("runtime", "per_second", "flos", "step_time")
    assert len(theirs.state.log_history) > 1
    for a, b in zip(theirs.state.log_history, mine.state.log_history, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            if not any(word in key for word in skip):
                assert b[key] == pytest.approx(a[key], rel=2e-4, abs=2e-4), key
    assert_same_weights(theirs.model, mine.model)


def assert_same_weights(theirs: Any, mine: Any) -> None:
    weights = dict(mine.named_parameters())
    for name, weight in theirs.named_parameters():
        if name.endswith("k_proj.bias"):  # softmax over the keys does not see it: its gradient is rounding alone
            continue
        # Adam's first steps are of the size of the learning rate wherever the gradient is not zero; a gradient that is
        # zero but for rounding may go either way
        off = (weights[name] - weight).abs() > 2e-5
        assert off.float().mean() < 2e-3, f"{name}: {int(off.sum())} of {off.numel()} weights differ"
