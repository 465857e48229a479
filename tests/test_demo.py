"""The demo: its task can be checked, its data are disjoint, its checks fail when they should, and it runs."""

from __future__ import annotations

import copy
import json
import random
import subprocess
import sys

import pytest

pytest.importorskip("trl")

from fastdpo import demo, demo_task
from fastdpo.demo_model import Settings

PROMPT = "sort nine two seventeen four :"


def test_checker():
    assert demo_task.is_right(PROMPT, " two four nine seventeen")
    for wrong in (
        "two four nine",
        "two four nine seventeen seventeen",
        "two nine four seventeen",
        "seventeen nine four two",
        "well two four nine seventeen",
        "two four nine eighteen",
        "",
    ):
        assert not demo_task.is_right(PROMPT, wrong), wrong


@pytest.mark.parametrize("kind", [*demo_task.MIX, "swapped"])
def test_kinds_of_answers(kind):
    rng = random.Random(0)
    for prompt in demo_task.prompts(3, 50):
        text = demo_task.answer(prompt, kind, rng)
        assert text.startswith(" ")
        assert demo_task.is_right(prompt, text) == (kind == "right")


def test_pairs():
    made = demo_task.pairs(demo_task.prompts(0, 200), 0)
    assert all(demo_task.is_right(p.prompt, p.chosen) and not demo_task.is_right(p.prompt, p.rejected) for p in made)
    assert made == demo_task.pairs(demo_task.prompts(0, 200), 0), "the seed decides"
    assert made != demo_task.pairs(demo_task.prompts(1, 200), 0)


def test_no_prompt_is_in_two_sets():
    sets = Settings().split()
    assert [len(s) for s in sets] == [Settings().pretrain_prompts, Settings().train_pairs, Settings().held_out_pairs]
    assert len(set().union(*sets)) == sum(map(len, sets))


def test_tokenizer_knows_every_word():
    tokenizer = demo_task.tokenizer()
    unknown = tokenizer.unk_token_id
    stream = demo_task.examples(demo_task.prompts(0, 50), 0)
    for _ in range(200):
        prompt, answer = next(stream)
        ids = tokenizer(prompt + answer + " " + demo_task.END)["input_ids"]
        assert unknown not in ids
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids) == prompt + answer + " " + demo_task.END
    lengths = {len(ids) for ids in tokenizer(demo_task.prompts(0, 50))["input_ids"]}
    assert len(lengths) == 1, "generation is not padded"


LEG = {
    "losses": [0.69, 0.5],
    "reward_accuracy_before": 0.0,
    "reward_accuracy_after": 0.95,
    "greedy_before": 0.3,
    "greedy_after": 0.9,
    "seconds": 2.0,
    "seconds_per_step": 1.0,
    "peak_memory_mib": 1000.0,
    "resident_mib": 600.0,
}


def _report(**changes):
    legs = {"trl": {"name": "trl", **LEG}, "fastdpo": {"name": "fastdpo", **LEG, **changes}}
    return demo.make_report(copy.deepcopy(legs), Settings())


@pytest.mark.parametrize(
    ("changes", "failure"),
    [
        ({}, None),
        ({"losses": [0.69, 0.5004]}, None),
        ({"losses": [0.69, 0.501]}, "step 2: the losses differ by 2.0e-03"),
        ({"losses": [float("nan"), 0.5]}, "step 1: the losses differ by nan"),
        ({"losses": [0.69]}, "the runs made 2 and 1 steps"),
        ({"reward_accuracy_after": 0.9}, "fastdpo: held-out reward accuracy 0.900"),
        ({"greedy_after": 0.3}, "fastdpo: greedy answers right 0.300 before, 0.300 after"),
    ],
)
def test_what_must_hold(changes, failure):
    failures = _report(**changes)["failures"]
    assert (failures == []) if failure is None else (len(failures) == 1 and failures[0].startswith(failure))


def test_table_fits_100_columns():
    text = demo.table(_report())
    assert max(map(len, text.splitlines())) <= 100
    assert "largest relative difference: 0.0e+00" in text


def test_runs_end_to_end(tmp_path):
    """Too small to learn: the report is made, the losses agree, and the exit code says what falls short."""
    small = (
        "--vocabulary 256 --hidden 32 --layers 1 --pretrain_steps 5 --train_pairs 16 --held_out_pairs 8 --batch_pairs 8"
    )
    done = subprocess.run(
        [sys.executable, "-m", "fastdpo.demo", "--output", str(tmp_path), *small.split()],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 1, done.stderr
    assert "FAILED" in done.stderr
    assert "greedy answers right" in done.stderr
    assert "Warning" not in done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report["trl"]["losses"]) == 2
    assert report["largest_difference"] < demo.MOST_DIFFERENCE
    assert not any(f.startswith("step") for f in report["failures"])
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert all((tmp_path / f"model_{name}" / "model.safetensors").is_file() for name in ("trl", "fastdpo"))
