"""A study's settings: what is read, what is refused and how; the grid, and which cells are one training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

import study_kit
import yaml

from fastdpo.study import command, config, data
from fastdpo.study.cells import Cell, grid, runs
from fastdpo.study.errors import StudyError

LEAST: dict[str, Any] = {
    "policy": "org/policy",
    "data": {"train": "a.jsonl", "held_out_share": 0.5},
    "references": {"start": "policy"},
    "betas": [0.1],
}


def given(**changes: Any) -> dict[str, Any]:
    return json.loads(json.dumps({**LEAST, **changes}))


def test_defaults_and_roles() -> None:
    references = {
        "start": "policy",
        "mistral": {"model": "org/m", "role": "stronger", "dtype": "bfloat16"},
        "none": None,
        "x": "org/x",
    }
    found = config.from_dict(given(references=references, betas=1))
    assert [(one.name, one.model, one.role) for one in found.references] == [
        ("start", "org/policy", "start"),
        ("mistral", "org/m", "stronger"),
        ("none", None, "none"),
        ("x", "org/x", "other"),
    ]
    assert found.betas == (1.0,) and isinstance(found.betas[0], float)
    assert found.parameterizations == ("ratio", "posterior", "likelihood")
    assert found.sampling == config.Sampling()
    assert config.from_dict(json.loads(json.dumps(config.to_dict(found)))) == found


def test_the_printed_example_is_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--print-config"]) == 0
    text = capsys.readouterr().out
    (tmp_path / "config.yaml").write_text(text)
    found = config.read(tmp_path / "config.yaml")
    assert found.betas == (0.005, 0.01, 0.02, 0.05, 0.1)
    assert found.training["learning_rate"] == 5e-7, "a number, not PyYAML's text"
    # What is commented out is the default, and every setting is there
    uncommented = yaml.safe_load("\n".join(uncomment(line) for line in text.splitlines()[2:]))
    assert set(uncommented) == set(config.to_dict(found))
    for name, value in uncommented.items():
        if f"# {name}:" in text:
            now = getattr(found, name)
            assert (list(now) if isinstance(now, tuple) else now) == value, name
    assert set(uncommented["sampling"]) == set(config.to_dict(found)["sampling"])
    assert set(uncommented["data"]) | {"held_out"} == set(config.to_dict(found)["data"])


def uncomment(line: str) -> str:
    body = line.lstrip()
    return line.replace("# ", "", 1) if body.startswith("# ") else line


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": [1]}, "beta: unknown setting, expected some of .*; did you mean 'betas'"),
        ({"sampling": {"max_tokens": 5}}, r"sampling\.max_tokens: unknown .*did you mean 'max_new_tokens'"),
        ({"references": {"a": {"modle": "x"}}}, r"references\.0\.modle: unknown .*did you mean 'model'"),
        ({"references": {"a": {"model": "x", "role": "strong"}}}, r"unknown 'strong'.*did you mean 'stronger'"),
        ({"references": {"a": {"model": None, "role": "stronger"}}}, "'stronger' contradicts model None"),
        ({"references": {"a/b": "x"}}, "names of letters.*got 'a/b'"),
        ({"references": {"start": "org/other"}}, r"references\.start: is the policy itself"),
        (
            {"references": {"a": {"model": "x", "role": "start"}}},
            r"references\.a\.role: start is the policy itself, got",
        ),
        ({"references": {"none": "org/other"}}, r"references\.none: stands for no reference, expected null, got"),
        ({"references": {}}, "references: expected at least one|references: expected a list"),
        ({"parameterizations": ["ratios"]}, "unknown 'ratios'.*did you mean 'ratio'"),
        ({"loss_types": ["simpo"]}, "loss_types: unknown 'simpo', expected some of sigmoid"),
        ({"betas": [0.1, -1]}, r"betas: expected a finite number above 0, got -1\.0"),
        ({"betas": ["0.1"]}, r"betas: expected a list of float, got \['0.1'\]"),
        ({"betas": [0.1, 0.1000000001]}, "betas: expected each once, got 0.1, 0.1"),
        ({"seeds": [0.5]}, "seeds: expected a list of int"),
        ({"data": {"train": "a"}}, "data: expected held_out .* or held_out_share"),
        ({"data": {"train": "a", "held_out_share": 1}}, "held_out_share: expected a number below 1"),
        ({"data": {}}, r"data\.train: not given"),
        ({"data": "a.jsonl"}, "data: expected a mapping"),
        ({"sampling": {"temperature": 0}}, r"sampling\.temperature: expected a finite number above 0"),
        ({"workers": 0}, "workers: expected a whole number of at least 1 or auto, got 0"),
        ({"dtype": "float64"}, "dtype: expected one of float32"),
        ({"save_models": 1}, "save_models"),
        ({"policy": None}, "policy: expected text, got None"),
    ],
)
def test_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(StudyError, match=message):
        config.from_dict(given(**changes))


def test_what_trl_refuses_is_refused_before_any_run(tmp_path: Path) -> None:
    from fastdpo.study.training import arguments

    for training, message in (
        (
            {"learning_rat": 1},
            r"training\.learning_rat: not a setting of TRL's DPOConfig; did you mean",
        ),
        ({"beta": 1}, r"training\.beta: the study sets it"),
        ({"lr_scheduler_type": "spiral"}, "training: .*spiral"),
    ):
        with pytest.raises(StudyError, match=message):
            arguments(config.from_dict(given(training=training)), tmp_path)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="cannot be read"):
        config.read(tmp_path / "config.yaml")
    (tmp_path / "config.yaml").write_text("policy: [")
    with pytest.raises(StudyError, match="config.yaml: not YAML"):
        config.read(tmp_path / "config.yaml")
    (tmp_path / "config.yaml").write_text("- 1")
    with pytest.raises(StudyError, match="config.yaml: config: expected a mapping"):
        config.read(tmp_path / "config.yaml")


def test_paths_are_found_beside_the_file_and_move_with_the_folder(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "score.py").write_text("")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(given(policy="models", scorer="score.py:f")))
    found = config.read(tmp_path / "config.yaml")
    assert found.policy == str(tmp_path / "models") and found.scorer == f"{tmp_path / 'score.py'}:f"
    assert found.data.train == "a.jsonl", "not there: left as it is"
    stored = found.with_paths(lambda path: config.local(path, tmp_path))
    assert (stored.policy, stored.scorer, stored.references[0].model) == ("models", "score.py:f", "models")
    assert stored.with_paths(lambda path: config.opened(path, tmp_path)) == found
    assert config.local("org/model", tmp_path) == "org/model"


# --- data ------------------------------------------------------------------------------------------------------------


def write(path: Path, prompts: list[str]) -> str:
    rows = [{"prompt": prompt, "chosen": f" a{i}", "rejected": " b"} for i, prompt in enumerate(prompts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_split_keeps_prompts_together(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [f"p{i // 3}" for i in range(300)])  # three pairs a prompt
    found = data.read(config.Data(path, held_out_share=0.3))
    train, held_out = (set(rows["prompt"]) for rows in found)
    assert not train & held_out and len(found.train) + len(found.held_out) == 300
    assert len(found.held_out) == 3 * len(held_out) and 15 < len(held_out) < 45
    again = data.read(config.Data(path, held_out_share=0.3))
    assert data.fingerprint(found) == data.fingerprint(again)
    other = data.read(config.Data(path, held_out_share=0.3, seed=1))
    assert data.fingerprint(found) != data.fingerprint(other)
    less = data.read(config.Data(path, held_out_share=0.3, train_rows=5, held_out_rows=4))
    assert (len(less.train), len(less.held_out)) == (5, 4)


def test_a_prompt_in_both_is_refused(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.jsonl", ["p", "q", "r"]), write(tmp_path / "b.jsonl", ["s", "q"])
    with pytest.raises(StudyError, match="prompts of 1 of its 2 pairs are in data.train too, the first of row 1"):
        data.read(config.Data(a, b))
    with pytest.raises(StudyError, match="no such file"):
        data.read(config.Data(a, str(tmp_path / "none")))
    with pytest.raises(StudyError, match="1 pairs to held out"):
        data.read(config.Data(a, write(tmp_path / "c.jsonl", ["s"])))


# --- the grid --------------------------------------------------------------------------------------------------------


def test_cells_that_are_one_training() -> None:
    references = {"start": "policy", "other": "org/x", "none": None}
    study = config.to_dict(config.from_dict(given(references=references, betas=[0.1, 1], seeds=[0, 1])))
    found = runs(study)
    assert list(found) == grid(study) and len(found) == 3 * 3 * 2 * 2
    posterior = Cell("sigmoid", "posterior", "start", 0.1, 0)
    for parameterization in ("ratio", "posterior", "likelihood"):
        # in the grid's order, so the first of these three is the run
        assert found[Cell("sigmoid", parameterization, "none", 0.1, 0)].id == "sigmoid-ratio-none-beta0.1-seed0"
    assert found[posterior].id == "sigmoid-ratio-none-beta0.1-seed0"
    assert found[Cell("sigmoid", "posterior", "other", 1, 1)].id == "sigmoid-ratio-none-beta1-seed1"
    own = [cell for cell, run in found.items() if cell is run]
    assert len(own) == (2 * 2 + 1) * 2 * 2, "ratio and likelihood with two references, and one posterior"
    assert found[Cell("sigmoid", "likelihood", "other", 0.1, 0)].id == "sigmoid-likelihood-other-beta0.1-seed0"


def test_the_kits_config_is_one(tmp_path: Path) -> None:
    study_kit.world(tmp_path)
    assert len(runs(config.to_dict(study_kit.config(tmp_path)))) == 2
