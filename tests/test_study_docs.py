"""docs/study.md: its configs are read by what they are for; its section is written from a study."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("trl")
pytest.importorskip("yaml")
import docs_kit
from docs_kit import ROOT
from study_folder import START, STRONG, write_study

from fastdpo.train_data import read_pairs

PAGE = (ROOT / "docs" / "study.md").read_text(encoding="utf-8")
CONFIGS = docs_kit.blocks("docs/study.md", "yaml")
SCORER, PAIRS = docs_kit.blocks("docs/study.md")


def make_study() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_study", ROOT / "docs" / "make_study.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("text", CONFIGS, ids=["own", "paper"])
def test_configs(tmp_path: Path, text: str) -> None:
    from trl import DPOConfig

    from fastdpo.study import config

    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    study = config.read(path)
    known = {one.name for one in dataclasses.fields(DPOConfig)}
    assert len(CONFIGS) == 2 and study.training and set(study.training) <= known
    assert study.references[0].role == "start" and len(study.seeds) == 3
    assert study.training["learning_rate"] < 1e-4  # a number, not text


def test_the_scorer_of_the_page() -> None:
    names: dict[str, object] = {}
    exec(SCORER, names)
    assert names["score"](["p", "p"], ["it is 4", "5"], [{"expected": "4"}] * 2) == [1.0, 0.0]


def test_the_pairs_of_the_paper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a data set with UltraFeedback's columns it makes what `--data` takes."""
    import datasets

    messages = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    columns = {"prompt_id": "a", "prompt": "2 + 2?", "chosen": messages, "messages": messages, "score_chosen": 8.5}
    row = {**columns, "rejected": [messages[0], {"role": "assistant", "content": "5"}], "score_rejected": 2.0}
    asked = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *name, split: asked.append((*name, split)) or datasets.Dataset.from_list([row])
    )
    exec(PAIRS, {})
    assert asked == [("allenai/ultrafeedback_binarized_cleaned", "train_prefs")]
    assert read_pairs("ultrafeedback.jsonl")[:] == {"chosen": [row["chosen"]], "rejected": [row["rejected"]]}


def test_the_section_of_a_study(tmp_path: Path) -> None:
    """Between the marks, from the folder's numbers; what is around stays, and twice is as once."""
    page = tmp_path / "docs" / "study.md"
    page.parent.mkdir()
    page.write_text(PAGE, encoding="utf-8")
    folder = write_study(tmp_path / "study", betas=[0.01, 0.1, 1.0], references=[START, STRONG])
    script = make_study()
    script.write(folder, page)
    once = page.read_text(encoding="utf-8")
    before, after = (PAGE.split(mark)[i] for mark, i in ((script.BEGIN, 0), (script.END, 1)))
    assert once.startswith(before) and once.endswith(after)
    section = once[len(before) :]
    assert "| β | start (the start model) | strong (a stronger model) |" in section and "### 3. Does a" in section
    assert "0.1 is best (right answers: 0.7" in section and "What this does not show" in section
    assert "](study_quality.png)" in section and (page.parent / "study_frontier.png").is_file()
    script.write(folder, page)
    assert page.read_text(encoding="utf-8") == once
    page.write_text("no marks", encoding="utf-8")
    with pytest.raises(ValueError, match="expected one <!-- demo study -->"):
        script.write(folder, page)


def test_links_of_the_page() -> None:
    for target in re.findall(r"\]\(([\w./]+)\)", PAGE):
        assert (ROOT / "docs" / target).exists(), target
