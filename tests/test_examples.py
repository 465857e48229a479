"""Every example runs as a newcomer would run it, and its loss falls."""

from __future__ import annotations

import copy
import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("trl")
pytest.importorskip("peft")

import cache_kit as kit
import torch
from datasets import Dataset

ROOT = Path(__file__).parent.parent
EXAMPLES = ("raw_loop", "trl_dpo", "hf_trainer", "lora", "two_processes")
LAUNCH = {"two_processes": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]}


def run(name: str, folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *LAUNCH.get(name, []), str(ROOT / "examples" / f"{name}.py"), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def steps(output: str) -> list[tuple[float, float, float]]:
    """(loss, accuracy, margin) of each step printed."""
    found = re.findall(r"^step \d+  loss (\S+)  accuracy (\S+)  margin (\S+)$", output, flags=re.MULTILINE)
    return [(float(loss), float(accuracy), float(margin)) for loss, accuracy, margin in found]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> Callable[[str], str]:
    """What an example prints, run once."""
    return functools.cache(lambda name: run(name, tmp_path_factory.mktemp(name)))


@pytest.mark.parametrize("name", EXAMPLES)
def test_runs_and_learns(name, outputs):
    output = outputs(name)
    printed = steps(output)
    assert len(printed) == 10
    assert printed[0][0] == pytest.approx(0.6931, abs=2e-3), "the model is its reference at first"
    assert printed[-1][0] < 0.67
    assert printed[-1][1] > 0.7
    if name == "two_processes":
        assert "the 2 processes hold the same weights" in output
    if name == "lora":
        assert re.search(r"^[\d,]+ of [\d,]+ parameters are trained$", output, flags=re.MULTILINE)


@pytest.fixture
def common() -> ModuleType:
    spec = importlib.util.spec_from_file_location("examples_common", ROOT / "examples" / "common.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_takes_a_model_and_data(common, tmp_path):
    folder, data, rows = kit.save_model(tmp_path / "model"), tmp_path / "pairs.jsonl", kit.rows(count=3)
    data.write_text("\n".join(map(json.dumps, rows)))
    model, tokenizer, pairs = common.load(["--model", folder, "--data", str(data)])
    assert model.get_output_embeddings().weight.shape == (kit.VOCAB, 32)
    tokens = common.tokenize(pairs, tokenizer)
    for row, found in zip(rows, tokens, strict=True):
        assert tokenizer.decode(found["prompt_ids"]) == row["prompt"]
        assert tokenizer.decode(found["rejected_ids"][:-1]) == row["rejected"].strip()
        assert found["chosen_ids"][-1] == tokenizer.eos_token_id
    with pytest.raises(ValueError, match="prompt: not a column of the data, which has chosen, rejected"):
        common.tokenize(pairs.remove_columns("prompt"), tokenizer)


def test_takes_messages(common):
    _, tokenizer, _ = common.load([])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }} : {% endfor %}{% if add_generation_prompt %}{{ 'one ' }}{% endif %}"
    )
    message = lambda role, content: [{"role": role, "content": content}]  # noqa: E731
    pairs = Dataset.from_list(
        [
            {
                "prompt": message("user", "sort two one"),
                "chosen": message("assistant", "one two"),
                "rejected": message("assistant", "one one"),
            }
        ]
    )
    (row,) = common.tokenize(pairs, tokenizer)
    assert tokenizer.decode(row["prompt_ids"]) == "sort two one : one"
    assert tokenizer.decode(row["chosen_ids"]) == "two :"
    assert tokenizer.decode(row["rejected_ids"]) == "one :"


def test_the_same_training_on_two_processes_as_on_one(outputs):
    """4 pairs on each of two processes are the raw loop's 8."""
    one, two = steps(outputs("raw_loop")), steps(outputs("two_processes"))
    assert [loss for loss, *_ in two] == pytest.approx([loss for loss, *_ in one], abs=3e-4)
    assert [margin for *_, margin in two] == pytest.approx([margin for *_, margin in one], abs=3e-3)


def test_they_are_short():
    files = sorted((ROOT / "examples").glob("*.py"))
    assert {file.stem for file in files} == {*EXAMPLES, "common"}
    for file in files:
        assert len(file.read_text().splitlines()) < 80, file.name
    loop = (ROOT / "examples" / "raw_loop.py").read_text()
    assert len(loop.splitlines()) <= 34
    assert f"```python\n{loop}```" in (ROOT / "README.md").read_text(), "the README shows what runs here"


def test_the_trainers_page(common, tmp_path, monkeypatch):
    """Every block of docs/trainers.md runs, in order, each that trains on a small model of its own."""
    import transformers
    import trl

    import fastdpo
    from fastdpo.integrations.transformers import is_fused

    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "trainers.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 6
    model, tokenizer, pairs = common.load([])
    pairs = pairs.select(range(4))
    rows = common.tokenize(pairs, tokenizer)
    batch = transformers.default_data_collator([{"ids": row["prompt_ids"]} for row in rows])["ids"]
    settings = {"max_steps": 1, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    names = {"fastdpo": fastdpo, "model": model, "ref_model": copy.deepcopy(model), "tokenizer": tokenizer}
    names |= {"pairs": pairs, "rows": rows, "settings": {**settings, "bf16": False}}
    names |= {name: getattr(trl, name) for name in ("DPOConfig", "SFTConfig", "SFTTrainer")}
    names |= {name: getattr(transformers, name) for name in ("Trainer", "TrainingArguments")}
    names |= {"input_ids": batch, "mask": torch.ones_like(batch), "labels": batch, "ref_logps": -torch.ones(len(batch))}
    names["texts"] = Dataset.from_list([{"prompt": p["prompt"], "completion": p["chosen"]} for p in pairs])
    names["tokens"] = Dataset.from_list([{"input_ids": r["prompt_ids"], "labels": r["prompt_ids"]} for r in rows])
    fused = []
    for block in blocks:
        names["model"] = copy.deepcopy(model)
        exec(block, names)
        trained = not names["model"].lm_head.weight.equal(model.lm_head.weight)
        assert trained == (".train()" in block)
        fused.append(is_fused(names["model"]))
    assert fused == [False, False, False, True, False, False], "the pairs' block alone leaves it fused"
    assert names["logps"].shape == batch.shape


def test_the_trainers_page_names_files_that_are_there():
    page = (ROOT / "docs" / "trainers.md").read_text()
    paths = set(re.findall(r"`(examples/\w+\.py)`", page))
    assert {Path(path).stem for path in paths} == set(EXAMPLES)
    assert all((ROOT / path).exists() for path in paths)
