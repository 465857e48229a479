"""The study with nothing to prepare: its models, its data and its config are those of a study of full size."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

pytest.importorskip("trl")
pytest.importorskip("yaml")

from fastdpo import demo_task
from fastdpo.cache.rows import vocabulary
from fastdpo.study import config, data, demo_study, runner
from fastdpo.study.cells import runs
from fastdpo.study.config import to_dict


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """DIR/demo with the models as good as untrained."""
    tiny = dataclasses.replace(demo_study.SETTINGS, hidden=16, layers=1, pretrain_batch=2, pretrain_prompts=50)
    models = {name: kind._replace(steps=1) for name, kind in demo_study.MODELS.items()}
    monkeypatch.setattr(demo_study, "SETTINGS", tiny)
    monkeypatch.setattr(demo_study, "MODELS", models)
    (tmp_path / "demo").mkdir()
    do = demo_study.worker(tmp_path / "demo")
    for name in models:
        do(name)
    assert demo_study.prepare(tmp_path) == tmp_path / "demo" / "config.yaml"
    return tmp_path / "demo"


def test_the_demo_is_a_study(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = config.read(demo / "config.yaml")
    assert len(found.betas) >= 5 and len(found.parameterizations) == 3 and len(found.seeds) >= 2
    assert [one.role for one in found.references] == ["start", "stronger", "weaker"]
    assert found.policy == str(demo / "start")
    pairs = data.read(found.data)
    assert len(pairs.train) == demo_study.SETTINGS.train_pairs
    assert len(pairs.held_out) == demo_study.SETTINGS.held_out_pairs
    assert all(demo_task.is_right(row["prompt"], row["chosen"]) for row in pairs.held_out)
    study = runner.settle(found, demo.parent)
    assert study["policy"] == "demo/start", "the folder can be moved"
    every = runs(study)
    assert len(every) == len(found.betas) * 3 * 3 * len(found.seeds)
    # made already: nothing is made again
    monkeypatch.setattr(demo_study, "worker", None)
    before = (demo / "config.yaml").read_text()
    (demo / "config.yaml").write_text(before + "# changed\n")
    demo_study.prepare(demo.parent)
    assert (demo / "config.yaml").read_text().endswith("# changed\n"), "the user's own"


def test_the_other_reference_has_other_tokens(demo: Path) -> None:
    from transformers import AutoTokenizer

    start, other = (AutoTokenizer.from_pretrained(demo / name) for name in ("start", "other"))
    assert vocabulary(start) != vocabulary(other) and set(start.get_vocab()) == set(other.get_vocab())
    assert other.eos_token_id == start.eos_token_id and other.pad_token_id == start.pad_token_id
    text = demo_task.prompts(0, 1)[0]
    assert other.decode(other(text)["input_ids"]) == text and other(text)["input_ids"] != start(text)["input_ids"]


def test_every_line_of_the_config_that_is_commented_out_can_be_used(demo: Path) -> None:
    text = demo_study.CONFIG.replace("  # none: null", "  none: null").replace("  # other: other", "  other: other")
    (demo / "mine.yaml").write_text(text)
    found = config.read(demo / "mine.yaml")
    assert [one.name for one in found.references] == ["start", "stronger", "weaker", "none", "other"]
    assert found.reference("other").model == str(demo / "other")
    shared = [cell for cell, run in runs(to_dict(found)).items() if cell is not run]
    assert {cell.reference for cell in shared} >= {"none", "other"}
