"""Every block of code in the documents is run, or read by what it is for: here, or where BLOCKS says."""

from __future__ import annotations

import importlib
import re
from collections import Counter
from pathlib import Path
from typing import Any

import docs_kit
import pytest
import ranks
import torch
from docs_kit import ROOT, blocks

import fastdpo

pytest.importorskip("trl")

import cache_kit as kit
import trl
from datasets import Dataset
from transformers import Trainer, TrainingArguments
from trl_kit import trl_as_it_was  # noqa: F401

# How many blocks of each kind the tests run or read; shell: test_docs_shell.py; "text" is no code
BLOCKS = {
    ("README.md", "python"): 5,  # here; its loop: test_examples.py; its own loss: test_docs.py
    ("docs/cache.md", "python"): 1,
    ("docs/contributing.md", "python"): 2,  # a loss here, a backend in test_docs.py
    ("docs/distributed.md", "python"): 4,
    ("docs/first-hour.md", "json"): 1,  # test_first_hour.py
    ("docs/first-hour.md", "python"): 3,
    ("docs/losses.md", "python"): 2,  # test_docs.py
    ("docs/study.md", "python"): 2,  # test_study_docs.py
    ("docs/study.md", "yaml"): 2,
    ("docs/trainers.md", "python"): 6,
    ("docs/trainers.md", "yaml"): 1,  # test_axolotl.py
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return kit.save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def names(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A model, its tokenizer, a pair batch of token ids."""
    monkeypatch.chdir(tmp_path)  # what a block writes
    ids = torch.randint(3, 50, (4, 7))
    mask = torch.ones_like(ids)
    return {
        **{"fastdpo": fastdpo, "torch": torch, "model": kit.model_of(folder), "tokenizer": kit.tokenizer_of(folder)},
        **{"input_ids": ids, "mask": mask, "labels": ids, "ref_logps": torch.zeros(4)},
    }


def quick(**more: Any) -> dict[str, Any]:
    return {"max_steps": 1, "per_device_train_batch_size": 2, "report_to": "none", "use_cpu": True, **more}


def test_no_block_is_left_out() -> None:
    """A new one is to be run, and then counted."""
    every = [(document, block.language) for document in docs_kit.DOCUMENTS for block in docs_kit.parts(document)[0]]
    assert Counter(one for one in every if one[1] not in ("shell", "text")) == BLOCKS


def test_readme_before_and_after(names: dict[str, Any]) -> None:
    """Both halves give the same log-probabilities; the imports that are shown exist."""
    first, *others = blocks("README.md")
    imports = [block for block in others if block.startswith("from fastdpo.integrations")]
    before, after = first.split("# after")
    exec(before, names)
    exec("# after" + after, names)
    torch.testing.assert_close(
        names["logps"].sum(1), torch.cat([names["out"].chosen_logps, names["out"].rejected_logps]), rtol=1e-4, atol=1e-4
    )
    assert names["model"].lm_head.weight.grad.count_nonzero()
    for block in imports:
        exec(block, names)
    assert issubclass(names["DPOTrainer"], trl.DPOTrainer) and "LigerFusedLinearDPOLoss" in names


def test_contributing(names: dict[str, Any]) -> None:
    docs_kit.run("docs/contributing.md", names, only=slice(1))  # the second, a backend: test_docs.py
    hidden, weight = torch.randn(4, 7, 8), torch.randn(53, 8)
    loss = fastdpo.linear_dpo_loss(hidden, weight, names["labels"], loss_type=names["squared_margin"]).loss
    assert loss.isfinite() and loss > 0


def test_cache(names: dict[str, Any], folder: str) -> None:
    blocks_run = [block.replace('"org/model"', repr(folder)) for block in blocks("docs/cache.md")]
    names |= {"pairs": Dataset.from_list(kit.rows(6)), "config": trl.DPOConfig("out", **quick(bf16=False))}
    for block in blocks_run:
        exec(block, names)
    names["trainer"].train()
    assert names["trainer"].ref_model is None


def test_trainers(names: dict[str, Any], folder: str) -> None:
    rows = kit.rows(6)
    tokenizer, ids = names["tokenizer"], names["input_ids"]

    def tokens(text: str) -> list[int]:
        return tokenizer(text)["input_ids"]

    names |= {
        **{"Trainer": Trainer, "TrainingArguments": TrainingArguments, "DPOConfig": trl.DPOConfig},
        **{"SFTTrainer": trl.SFTTrainer, "SFTConfig": trl.SFTConfig, "ref_model": None},
        **{"settings": quick(bf16=False), "pairs": Dataset.from_list(rows)},
        "texts": Dataset.from_list([{"text": row["prompt"] + row["chosen"]} for row in rows]),
        "tokens": Dataset.from_list([{"input_ids": row, "labels": row} for row in ids.tolist()]),
        "rows": Dataset.from_list(
            [
                {
                    "prompt_ids": tokens(r["prompt"]),
                    "chosen_ids": tokens(r["chosen"]),
                    "rejected_ids": tokens(r["rejected"]),
                }
                for r in rows
            ]
        ),
    }
    for number in range(len(blocks("docs/trainers.md"))):
        if number in (1, 2, 3, 4):  # each trainer gets a model that no other has wrapped
            names["model"] = kit.model_of(folder)
        docs_kit.run("docs/trainers.md", names, only=slice(number, number + 1))
    assert "ref_chosen_logps" in names["rows"].column_names
    assert names["out"].loss.item() == pytest.approx(
        -torch.nn.functional.logsigmoid(0.1 * (names["out"].chosen_logps - names["out"].rejected_logps)).mean().item(),
        rel=1e-4,
    )


def test_distributed(folder: str) -> None:
    """On two ranks; where they share a batch, both have the same loss."""
    first, second = ranks.run(docs_kit.distributed_blocks, folder)
    assert len(first) == len(blocks("docs/distributed.md")) == 4
    assert first == pytest.approx(second, rel=1e-5)


def test_every_public_name_is_in_the_reference() -> None:
    """Of the package and its subpackages; and the reference holds nothing that is not there."""
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    shown = re.findall(r"^::: (\S+)\.(\w+)$", page, flags=re.MULTILINE)
    for module, name in shown:
        assert hasattr(importlib.import_module(module), name), f"{module}.{name}"
    inits = {".".join(path.parent.relative_to(ROOT).parts): path for path in (ROOT / "fastdpo").rglob("__init__.py")}
    packages = [name for name, path in inits.items() if "__all__" in path.read_text(encoding="utf-8")]
    assert {"fastdpo", "fastdpo.cache", "fastdpo.losses", "fastdpo.integrations.liger"} <= set(packages)
    public = {(package, name) for package in packages for name in importlib.import_module(package).__all__}
    assert {
        (package, name)
        for package, name in public
        if not any(module.startswith(package) and name == one for module, one in shown)
    } == set()
