"""docs/first-hour.md, run from top to bottom on a tiny model: every command works, and what it promises is there."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import cache_kit as kit  # skips where trl is missing
import docs_kit
import pytest
from docs_kit import ROOT

from fastdpo.train_data import read_pairs

PAGE = (ROOT / "docs" / "first-hour.md").read_text()


def shown(*words: str) -> list[str]:
    """The shell blocks that contain one of the words."""
    return [code for code in docs_kit.blocks("docs/first-hour.md", "shell") if any(word in code for word in words)]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a tiny model and eight pairs, where the page's commands run."""
    folder = tmp_path_factory.mktemp("first_hour")
    kit.save_model(folder / "model", bos_token_id=2)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kit.rows(10)))
    shell(folder, *shown("fastdpo cache build"))
    return folder


def shell(folder: Path, *commands: str) -> str:
    """Their output; `fastdpo` is this repository's."""
    lines = [f'fastdpo() {{ "{sys.executable}" -m fastdpo.cli "$@"; }}', "set -e", *commands]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MODEL": "model", "PAIRS": "pairs.jsonl"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(["bash", "-c", "\n".join(lines)], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def short(code: str) -> str:
    """The same with two steps for twenty."""
    assert "--max_steps 20" in code
    return code.replace("--max_steps 20", "--max_steps 2")


def test_the_cache(place):
    assert "reference: 20 entries" in shell(place, "fastdpo cache info --cache refs")


def test_the_pair_that_is_shown(tmp_path):
    (row,) = docs_kit.blocks("docs/first-hour.md", "json")
    (tmp_path / "pairs.jsonl").write_text(row)
    assert set(read_pairs(tmp_path / "pairs.jsonl").column_names) == {"prompt", "chosen", "rejected"}


def test_a_run_and_its_report(place):
    run, show = *shown("--output_dir run"), *shown("tail -n 1")
    output = shell(place, short(run), show)
    assert "summary" in json.loads(output.splitlines()[-1])
    assert (place / "run" / "curves.png").exists()
    found = records(place / "run")
    assert found[0]["loss"] == pytest.approx(math.log(2), abs=1e-3), "as the page says"
    assert {"logps/chosen", "rewards/margins", "entropy"} <= found[0].keys()
    assert any("eval_rewards/accuracies" in record for record in found)


def test_the_sweep(place):
    (loop,) = shown("for beta in")
    output = shell(place, short(loop).replace("0.03 0.1 0.3", "0.03 0.3"))
    assert output.count("eval_loss") == 2
    betas = {path.name: records(path)[1]["rewards/margins"] for path in (place / "sweep").iterdir()}
    assert set(betas) == {"0.03", "0.3"} and betas["0.03"] != betas["0.3"]


def test_the_study(place):
    """Two betas of the three, and its results."""
    (study,) = shown("fastdpo study")
    shell(place, study.replace("max_steps: 20", "max_steps: 2").replace("0.03, 0.1, 0.3", "0.03, 0.3"))
    cells = [json.loads(path.read_text()) for path in (place / "study" / "cells").glob("*.json")]
    assert sorted(cell["cell"]["beta"] for cell in cells) == [0.03, 0.3]
    assert {cell["status"] for cell in cells} == {"done"}
    assert (place / "study" / "results.csv").exists()


def test_the_scripts(place, monkeypatch):
    """The TRL script, LoRA and the raw loop, in one session as on the page."""
    monkeypatch.chdir(place)
    names: dict[str, Any] = {"MODEL": "model", "PAIRS": "pairs.jsonl"}
    for code in docs_kit.blocks("docs/first-hour.md"):
        exec(code.replace('report_to="none"', 'report_to="none", save_strategy="no", use_cpu=True, bf16=False'), names)
        if "trainer.train()" in code:
            assert names["trainer"].state.global_step == 4
    assert names["out"].loss.item() == pytest.approx(math.log(2), abs=1e-4), "the cache's logps are the loop's"
    assert names["model"].get_output_embeddings().weight.grad.count_nonzero() > 0


@pytest.mark.slow
def test_the_commands_that_take_long(place):
    for code in (*shown("fastdpo doctor"), *shown("fastdpo demo"), *shown("fastdpo bench")):
        shell(place, code)
    assert (place / "demo" / "report.png").exists()
    assert (place / "bench" / "bench.png").exists()


def test_the_page_names_pages_that_are_there():
    for target in set(re.findall(r"\]\(([\w.]+\.md)\)", PAGE)):
        assert (ROOT / "docs" / target).exists(), target
