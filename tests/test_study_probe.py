"""`fastdpo study --probe`: its numbers by hand and against a trainer, its cache, its words and its errors."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("trl")
pytest.importorskip("pyarrow")

import cache_kit as kit
import study_kit

from fastdpo import demo_task
from fastdpo.cache import Entries, ReferenceCache, ReferenceModel
from fastdpo.study import probe, probe_numbers, probe_report, probe_samples
from fastdpo.study.config import Sampling
from fastdpo.study.probe_numbers import Estimate
from fastdpo.study.probe_scores import Scores

PAIRS = kit.rows(12)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """policy; other: other weights; foreign: another tokenizer too."""
    folder = tmp_path_factory.mktemp("models")
    found = {name: kit.save_model(folder / name, seed) for seed, name in enumerate(("policy", "other", "foreign"))}
    demo_task.tokenizer(backwards=True).save_pretrained(found["foreign"])
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    return str(path)


def arguments(models: dict[str, str], data: str, output: Path, *more: str) -> list[str]:
    fixed = ["--policy", models["policy"], "--data", data, "--dtype", "float32", "--output", str(output)]
    references = {"self": models["policy"], "other": models["other"], "foreign": models["foreign"]}
    return [*fixed, *(f"--reference={name}={model}" for name, model in references.items()), *more]


@pytest.fixture(scope="module")
def done(models, data, tmp_path_factory) -> Path:
    """A probe's output folder."""
    output = tmp_path_factory.mktemp("probe")
    assert (
        probe.main(arguments(models, data, output, "--beta", "0.1", "1", "--samples", "3", "--max-new-tokens", "8"))
        == 0
    )
    return output


def read(output: Path) -> dict:
    found = json.loads((output / "probe.json").read_text())
    return {**found, "references": {one["name"]: one for one in found["references"]}}


def scores(chosen: list[float], rejected: list[float], id: str = "x") -> Scores:
    sides = (Entries(np.array(side), np.full(len(side), 2, np.int32), []) for side in (chosen, rejected))
    return Scores(*sides, id, True, np.zeros(len(chosen)), "model", "float32", 512, "keep_start")


# --- numbers by hand -------------------------------------------------------------------------------------------------


def test_the_first_step_by_hand():
    """h = log 3, -log 3, log 19 at beta 1: weights sigmoid(-h) = 1/4, 3/4, 1/20; losses log 4/3, log 4, log 20/19."""
    policy = scores([math.log(3), 0.0, math.log(19)], [0.0, 0.0, 0.0])
    reference = scores([0.0, 0.0, 0.0], [0.0, -math.log(3), 0.0])
    (at,) = probe_numbers.start(policy, reference, [1.0])
    assert at.loss.value == pytest.approx(math.log(4 / 3 * 4 * 20 / 19) / 3)
    assert at.weight_mean == pytest.approx(1.05 / 3) and at.weight_p50 == pytest.approx(0.25)
    assert at.effective_share == pytest.approx(1.05**2 / (3 * (0.25**2 + 0.75**2 + 0.05**2)))
    assert (at.satisfied, at.full) == (pytest.approx(1 / 3), 0.0)
    half, three = probe_numbers.start(policy, reference, [0.5, 3.0])
    assert half.weight_p50 == pytest.approx(1 / (1 + math.sqrt(3)))
    assert (three.satisfied, three.full) == (pytest.approx(2 / 3), pytest.approx(1 / 3))  # 1/28, 27/28, 1/6860


def test_the_policy_as_its_own_reference():
    (at,) = probe_numbers.start(policy := scores([-5.0, -9.0], [-7.0, -3.0]), policy, [10.0])
    assert at.loss == Estimate(pytest.approx(math.log(2)), 0.0)
    assert (at.weight_p10, at.weight_p90, at.effective_share) == (0.5, 0.5, 1.0)


def test_weights_that_vanish():
    assert probe_numbers.effective_share(np.array([1e-200, 1e-200])) == pytest.approx(1)
    assert probe_numbers.effective_share(np.zeros(3)) == 0.0


def test_means_by_hand():
    """6 nats over 4 tokens; residuals 1/2 and -1/2, so the error is sqrt(2/1 * 1/2) / 4."""
    found = probe_numbers.estimate(np.array([2.0, 4.0]), np.array([1, 3]))
    assert found == Estimate(1.5, pytest.approx(0.25))
    assert math.isnan(probe_numbers.estimate(np.array([2.0])).se)
    assert math.isnan(probe_numbers.estimate(np.array([2.0, 4.0]), clusters=[7, 7]).se)


def test_ranks():
    """The second pair is a tie, and so wrong; the third is right per token only."""
    found = scores([-1.0, -2.0, -6.0], [-2.0, -2.0, -5.0])
    found.chosen.counts[2] = 4
    assert probe_numbers.right(found).tolist() == [True, False, False]
    assert probe_numbers.right(found, normalized=True).tolist() == [True, False, True]
    other = scores([-1.0, -1.0, -1.0], [-2.0, -2.0, -2.0])
    assert probe_numbers.compare("r", found, other, [1.0]).agreement == pytest.approx(1 / 3)


def test_the_sampled_kl_is_the_kl():
    """Answers of two tokens, drawn from p; exact KL(p || q) is known."""
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.2, 0.6])
    drawn = np.random.default_rng(0).choice(3, (4000, 2), p=p)
    ours, theirs = (
        Entries(np.log(of)[drawn].sum(1), np.full(4000, 2, np.int32), list(np.log(of)[drawn])) for of in (p, q)
    )
    found, exact = probe_numbers.sampled_kl(ours, theirs, range(4000)), float((p * np.log(p / q)).sum())
    for estimate, truth in ((found.per_token, exact), (found.nonnegative, exact), (found.per_answer, 2 * exact)):
        assert 0 < estimate.se < 0.03
        assert abs(estimate.value - truth) < 4 * estimate.se
    assert (found.answers, found.tokens) == (4000, 8000)
    turned = probe_numbers.sampled_kl(theirs, ours, range(4000))
    assert turned.per_token.value < 0 < turned.nonnegative.value
    twice = probe_numbers.sampled_kl(ours, theirs, [i // 2000 for i in range(4000)])
    assert twice.per_token.value == pytest.approx(found.per_token.value)
    assert twice.per_token.se != pytest.approx(found.per_token.se)


# --- end to end ------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_loss_is_the_trainers(done, models, tmp_path):
    from datasets import Dataset
    from trl import DPOConfig

    from fastdpo.integrations.trl import FastDPOTrainer

    for name in ("other", "foreign"):
        for at in read(done)["references"][name]["at"]:
            config = DPOConfig(
                output_dir=str(tmp_path),
                beta=at["beta"],
                max_length=512,
                bf16=False,
                use_cpu=True,
                report_to="none",
                per_device_eval_batch_size=4,
                disable_tqdm=True,
            )
            trainer = FastDPOTrainer(
                kit.model_of(models["policy"]),
                args=config,
                train_dataset=Dataset.from_list(PAIRS),
                eval_dataset=Dataset.from_list(PAIRS),
                processing_class=kit.tokenizer_of(models["policy"]),
                reference_cache=done / "refs",
                reference=name,
            )
            metrics = trainer.evaluate()
            assert at["loss"]["value"] == pytest.approx(metrics["eval_loss"], rel=1e-4)


def test_what_each_reference_gets(done):
    found = read(done)
    own, other, foreign = (found["references"][name] for name in ("self", "other", "foreign"))
    assert own["is_policy"] and own["margin"]["value"] == 0 and own["sampled"]["nonnegative"]["value"] == 0
    assert own["ranks_right"] == found["policy"]["ranks_right"] and own["agreement"] == 1
    assert not other["is_policy"] and other["same_tokens"]
    assert other["sampled"]["per_token"]["value"] > 0 and other["sampled"]["answers"] == 36
    ratio = other["chosen_per_answer"]["value"] - other["rejected_per_answer"]["value"]
    assert ratio == pytest.approx(other["margin"]["value"])
    assert not foreign["same_tokens"] and foreign["at"][0]["loss"]["value"] > 0
    assert foreign["chosen_per_token"] is foreign["rejected_per_token"] is foreign["sampled"] is None
    assert found["settings"]["pairs"] == 12 and found["settings"]["dtype"] == "float32"


def test_pairs_without_a_completion_are_left_out(models, data, tmp_path, capsys):
    """Prompts have 6 tokens, and 12 where the data was made longer."""
    lines = [{**row, "prompt": row["prompt"] * (1 + (i < 5))} for i, row in enumerate(PAIRS)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in lines))
    given = ["--policy", models["policy"], "--reference", f"other={models['other']}", "--data", str(path)]
    given += ["--output", str(tmp_path), "--max-length"]
    assert probe.main([*given, "9"]) == 0
    settings = read(tmp_path)["settings"]
    assert (settings["pairs"], settings["pairs_left_out"], settings["completions_cut"]) == (7, 5, 14)
    assert "5 further pairs are left out" in capsys.readouterr().out
    assert probe.main([*given, "2"]) == 1
    assert "--max-length 2: no pair has a token left" in capsys.readouterr().err


def test_the_text(done):
    text = (done / "probe.md").read_text()
    for words in ("It is the policy itself", "Its tokens are others than the policy's", "n/a", "0.693 ± 0.000"):
        assert words in text
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 3
    for table in tables:
        assert len({len(line) for line in table}) == 1, "columns stand under each other"
    assert (done / "probe.png").read_bytes().startswith(b"\x89PNG")


def test_a_second_probe_loads_no_model(done, models, data, tmp_path, monkeypatch, capsys):
    def refuse(self):
        raise AssertionError("loaded")

    monkeypatch.setattr(ReferenceModel, "_load", refuse)
    before = read(done)["references"]
    again = ("--beta", "1", "0.5", "--samples", "3", "--max-new-tokens", "8")
    assert probe.main(arguments(models, data, done, *again)) == 0
    after = read(done)["references"]
    assert [at["beta"] for at in after["other"]["at"]] == [0.5, 1]
    assert (
        after["other"]["at"][1] == before["other"]["at"][1] and after["other"]["sampled"] == before["other"]["sampled"]
    )
    by_cache = ["--cache", str(done / "refs"), "--policy-name", "policy", "--data", data, "--beta", "1", "0.5"]
    assert probe.main([*by_cache, "--output", str(tmp_path)]) == 0
    for name, one in read(tmp_path)["references"].items():
        assert one == {**after[name], "sampled": None}
    assert probe.main([*by_cache, "--reference", "foreign", "--output", str(tmp_path)]) == 0
    assert list(read(tmp_path)["references"]) == ["foreign"]


def test_the_cache_of_a_study(tmp_path):
    """Its references, its start as the policy, its training pairs."""
    world, folder = study_kit.world(tmp_path / "world"), tmp_path / "study"
    references = {"start": "policy", "better": str(world / "better"), "foreign": str(world / "foreign")}
    study_kit.lab(world, folder, "better", "foreign", references=references)
    given = ["--cache", str(folder / "refs"), "--policy-name", "start", "--data", str(world / "train.jsonl")]
    assert probe.main([*given, "--output", str(tmp_path)]) == 0
    found = read(tmp_path)["references"]
    assert {name: one["same_tokens"] for name, one in found.items()} == {"better": True, "foreign": False}
    assert read(tmp_path)["settings"]["pairs"] == 8 and not found["better"]["is_policy"]


def test_a_model_that_is_there_twice_is_scored_once(models, data, tmp_path, monkeypatch):
    loads = []
    load = ReferenceModel._load
    monkeypatch.setattr(ReferenceModel, "_load", lambda self: loads.append(self.path) or load(self))
    assert probe.main(arguments(models, data, tmp_path, "--limit", "4")) == 0
    assert sorted(loads) == sorted([models["policy"], models["other"], models["foreign"]])
    assert read(tmp_path)["settings"]["pairs"] == 4


# --- samples ---------------------------------------------------------------------------------------------------------


def test_samples_go_on_where_they_were(models, tmp_path, monkeypatch):
    """A run that was killed ends as one that was not."""
    model, tokenizer = ReferenceModel(models["policy"]), kit.tokenizer_of(models["policy"])
    prompts, sampling = [[7, 8, 9], [5, 6], [9, 9]], Sampling(per_prompt=2, max_new_tokens=6, batch=1)

    def sampled(folder: str, seed: int = 0):
        return probe_samples.sampled(tmp_path / folder, model, tokenizer, prompts, sampling, seed)

    whole = sampled("a")
    assert [(one.prompt, one.prompt_ids) for one in whole[::2]] == [(0, [5, 6]), (1, [9, 9]), (2, [7, 8, 9])]
    assert [one.prompt for one in whole] == [0, 0, 1, 1, 2, 2] and all(1 <= len(one.ids) <= 6 for one in whole)
    assert sampled("b", seed=7) != whole
    calls, sample = [], probe_samples.sample

    def deadly(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return sample(*arguments)

    monkeypatch.setattr(probe_samples, "sample", deadly)
    with pytest.raises(KeyboardInterrupt):
        sampled("c")
    assert sampled("c") == whole
    assert len(calls) == 4, "the first batch was kept"
    assert sampled("c") == whole and len(calls) == 4


# --- words and errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("margin", "effective", "satisfied", "words"),
    [
        (Estimate(-3.0, 1.0), 0.95, 0.0, ["ahead of the policy's by 3 nats", "At beta 0.1 nearly all pairs carry"]),
        (Estimate(3.0, 1.0), 0.7, 0.2, ["The policy's margins are ahead", "At beta 0.1 the gradient is uneven"]),
        (Estimate(1.0, 1.0), 0.4, 0.2, ["in no one direction", "At beta 0.1 few pairs carry the gradient"]),
        (Estimate(1.0, math.nan), 0.95, 0.5, ["in no one direction", "At beta 0.1 few pairs carry the gradient"]),
    ],
)
def test_in_words(margin, effective, satisfied, words):
    found = probe_numbers.compare("r", scores([-1.0], [-2.0]), scores([-1.0], [-3.0], "y"), [0.1])
    at = found.at[0]._replace(effective_share=effective, satisfied=satisfied)
    said = probe_report.in_words(found._replace(margin=margin, at=[at]))
    assert said.startswith("It ranks 100% of the pairs right, and 100% the way the policy does.")
    for part in words:
        assert part in said


def test_models_that_read_other_lengths_are_not_compared(models, data, tmp_path, capsys):
    cache, tokenizer = ReferenceCache(tmp_path / "refs"), kit.tokenizer_of(models["policy"])
    for name, model, length in (("start", "policy", 20), ("short", "other", 9)):
        cache.build(models[model], tokenizer, PAIRS, name=name, max_length=length, progress=False)
    given = ["--cache", str(tmp_path / "refs"), "--policy-name", "start", "--data", data, "--output", str(tmp_path)]
    assert probe.main(given) == 1
    assert "short: was scored with max_length 9 (keep_start), expected the policy's, 20" in capsys.readouterr().err


def test_errors_are_one_line(models, data, done, tmp_path, capsys):
    cache = ["--cache", str(done / "refs"), "--data", data, "--output", str(tmp_path)]
    policy = ["--policy", models["policy"], "--data", data, "--output", str(tmp_path)]
    for given, message in [
        (policy, "--reference: not given, expected NAME=MODEL"),
        ([*policy, "--reference", "policy=x"], "--reference: expected NAME=MODEL, each name once"),
        ([*policy, "--reference", models["other"]], "--reference: expected NAME=MODEL"),
        ([*policy, "--reference", "a=b", "--beta", "0"], "--beta: expected"),
        ([*policy, "--reference", "a=b", "--limit", "0"], "--limit: expected at least 1, got 0"),
        ([*policy, "--reference", "a=b", "--policy-name", "x"], "--policy-name: belongs to --cache"),
        ([*policy, "--reference", f"a={tmp_path / 'none'}"], "tokenizer: "),
        (arguments(models, str(tmp_path / "none.jsonl"), tmp_path), "none.jsonl: no such file"),
        (arguments(models, data, tmp_path, "--samples", "1", "--max-length", "9"), "--max-new-tokens 128: no prompt"),
        (["--data", data, "--output", str(tmp_path)], "--policy: not given"),
        (cache, "--policy-name: not given"),
        ([*cache, "--policy-name", "none"], "reference: 'none' is not in"),
        ([*cache, "--policy-name", "policy", "--samples", "2"], "--samples: with --cache no model is loaded"),
        ([*cache, "--policy-name", "policy", "--policy", "x"], "--policy: with --cache no model is loaded"),
        ([*cache, "--policy-name", "policy", "--dtype", "float32"], "--dtype: with --cache no model is loaded"),
        (arguments(models, data, tmp_path, "--seed", "3"), "--seed: of --samples, which are not asked for, got 3"),
    ]:
        assert probe.main(given) == 1, message
        err = capsys.readouterr().err
        assert message in err.strip().splitlines()[-1], err
        assert err.strip().splitlines()[-1].startswith("fastdpo study --probe: ")
