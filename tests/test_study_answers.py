"""The answers to the three questions, from studies whose answers are known."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

pytest.importorskip("trl")
from study_folder import NO_REFERENCE, START, STRONG, WEAK, write_study

from fastdpo.study import results
from fastdpo.study.answers import QUESTIONS, Answer, answers, caveats
from fastdpo.study.summary import best, difference, groups, of, pareto


def ask(folder: Path) -> list[Answer]:
    found = answers(results.load(folder), "sigmoid")
    assert [answer.question for answer in found] == list(QUESTIONS)
    for answer in found:
        for text in (answer.here, answer.beside):
            assert text[0].isupper() and text.endswith("."), text
            assert "  " not in text and " ." not in text and "None" not in text and "nan" not in text, text
    return found


def test_the_law_is_found(tmp_path: Path) -> None:
    """A peak at 0.1, the ratio above the others, a stronger reference better."""
    strength, need, stronger = ask(write_study(tmp_path))
    assert "With start (the start model) as the reference, β = 0.1 is best (right answers: 0.7" in strength.here
    assert "better than β = 0.01, 0.03, 0.3 and 1 by more than the noise" in strength.here
    assert "With strong (a stronger model) as the reference, β = 0.1 is best (right answers: 0.8" in strength.here
    assert "The shape agrees" in strength.beside
    assert "is better than the posterior" in need.here and "So here the reference helps." in need.here
    assert "the best ratio (0.8" in stronger.here and "is better than the one with start" in stronger.here
    assert "By itself strong reaches 0.800, and the start model 0.300." in stronger.here
    assert "is worse than the one with start" in stronger.here  # weak
    assert stronger.beside == "With strong it is as the paper found with a reference that is like the policy."


def test_no_difference_is_claimed_from_noise(tmp_path: Path) -> None:
    """All cells have the same expectation; the noise is of the seeds."""

    def law(cell):
        return {"quality": 0.5 + 0.05 * random.Random(cell.id).gauss(0, 1), "quality_se": 0.05}

    strength, need, stronger = ask(write_study(tmp_path, law, seeds=range(4), references=[START, STRONG]))
    assert "better than" not in strength.here and "is not told apart from β =" in strength.here
    assert "is not told apart from the posterior" in need.here and "do not show that a reference is needed" in need.here
    assert "neither confirms nor contradicts" in need.beside and "neither confirm nor contradict" in stronger.beside


def test_seeds_that_agree_by_luck_prove_nothing(tmp_path: Path) -> None:
    """Equal qualities of the seeds; but the answers that were scored leave an error of 0.05."""

    def law(cell):
        return {"quality": 0.5 + 0.02 * (cell.beta == 0.1), "quality_se": 0.05}

    (strength, *_) = ask(write_study(tmp_path, law))
    assert "better than" not in strength.here


def test_welch(tmp_path: Path) -> None:
    """Against t and p worked out for (1, 2, 3) and (4, 5, 9): t = -3/sqrt(26/9)... by an independent routine."""
    values = {0.1: (1.0, 2.0, 3.0), 1.0: (4.0, 5.0, 9.0)}
    folder = write_study(
        tmp_path,
        lambda cell: {"quality": values[cell.beta][cell.seed], "quality_se": 0.0},
        betas=(0.1, 1.0),
        seeds=(0, 1, 2),
        parameterizations=["ratio"],
        references=[START],
    )
    low, high = groups(results.load(folder))
    test = difference(low, high)
    # variances 1/3 and 7/3: t = -4 / sqrt(8/3) = -2.449, 2.56 degrees of freedom
    assert test.value == pytest.approx(-4) and test.se == pytest.approx((8 / 3) ** 0.5)
    assert test.p == pytest.approx(_student(2.449489743, 2.56), abs=1e-4)


def _student(t: float, freedom: float) -> float:
    """P(|T| > t) by summing the density."""
    import math

    scale = math.gamma((freedom + 1) / 2) / math.sqrt(freedom * math.pi) / math.gamma(freedom / 2)
    steps = 200_000
    inside = sum((1 + ((i + 0.5) * t / steps) ** 2 / freedom) ** (-(freedom + 1) / 2) for i in range(steps))
    return 1 - 2 * scale * inside * t / steps


def test_lower_can_be_better(tmp_path: Path) -> None:
    def law(cell):
        return {"quality": 10.0 + abs(cell.beta - 0.3) + 0.001 * cell.seed}

    folder = write_study(tmp_path, law, higher_is_better=False, quality="perplexity")
    strength, *_ = ask(folder)
    assert "β = 0.3 is best (perplexity: 10.00 ± 0.00)" in strength.here
    study = results.load(folder)
    front = pareto(groups(study), higher_is_better=False)
    qualities = [group.mean("quality").value for group in front]
    assert qualities == sorted(qualities, reverse=True) and len(front) > 1
    assert best(of(groups(study), "sigmoid", "ratio", "start"), higher_is_better=False).beta == 0.3


def test_one_seed_tests_nothing(tmp_path: Path) -> None:
    strength, need, stronger = ask(write_study(tmp_path, seeds=[3]))
    assert "β = 0.1 is best" in strength.here and "for want of a second seed" in strength.here
    assert "±" not in strength.here + need.here + stronger.here
    assert "which one seed cannot test" in need.here and "neither confirms nor contradicts" in need.beside
    assert "There is one seed a cell." in caveats(results.load(tmp_path))[1]


def test_one_beta_says_nothing_of_the_strength(tmp_path: Path) -> None:
    strength, *_ = ask(write_study(tmp_path, betas=[0.1]))
    assert "only β = 0.1 was tried" in strength.here and "too few healthy runs" in strength.beside


def test_a_best_beta_at_the_edge_is_named(tmp_path: Path) -> None:
    strength, *_ = ask(write_study(tmp_path, betas=[0.1, 0.3, 1.0]))
    assert "the smallest β that was tried" in strength.here and "not seen here" in strength.beside


def test_degenerate_runs_are_never_chosen(tmp_path: Path) -> None:
    def law(cell):
        return {"quality": 0.99, "degenerate": ["answers do not end"]} if cell.beta == 0.01 and cell.seed else {}

    strength, *_ = ask(write_study(tmp_path, law))
    assert "β = 0.1 is best" in strength.here and "β = 0.01 is best" not in strength.here
    assert "Runs at β = 0.01 are degenerate" in strength.here
    assert "The shape agrees" in strength.beside
    every = ask(write_study(tmp_path, lambda cell: {"degenerate": ["empty answers"]}))
    assert "every run is degenerate" in every[0].here


@pytest.mark.parametrize("parameterizations", [["ratio"], ["posterior"], ["likelihood"], ["posterior", "likelihood"]])
@pytest.mark.parametrize("references", [[START], [STRONG, WEAK], [NO_REFERENCE], [START, NO_REFERENCE]])
@pytest.mark.parametrize("seeds", [[0], [0, 1]])
def test_whatever_is_missing(tmp_path: Path, parameterizations, references, seeds) -> None:
    """Whole sentences that claim nothing that was not run."""
    strength, need, stronger = ask(
        write_study(tmp_path, parameterizations=parameterizations, references=references, seeds=seeds)
    )
    if STRONG not in references:
        assert "The study cannot say" in stronger.here
    compared = parameterizations == ["ratio"] and references == [START, NO_REFERENCE]
    assert ("The study cannot say" in need.here) == (not compared)
    if parameterizations == ["posterior"] or references == [NO_REFERENCE]:
        assert "Without a reference, β = 0.1 is best" in strength.here
    if parameterizations == ["likelihood"] and references == [START]:
        assert strength.here.startswith("There are no runs of the ratio; these are of the likelihood. With start")


def test_without_a_scorer_different_rewards_are_not_compared(tmp_path: Path) -> None:
    """Quality is then the accuracy of each run's own reward."""
    folder = write_study(tmp_path, scorer=None, quality="reward accuracy on held-out pairs")
    strength, need, stronger = ask(folder)
    assert "β = 0.1 is best" in strength.here
    for answer in (need, stronger):
        assert answer.here.startswith("The study cannot say: without a scorer")
    assert any("neither parameterizations nor references" in one for one in caveats(results.load(folder)))


def test_all_failed(tmp_path: Path) -> None:
    strength, need, stronger = ask(write_study(tmp_path, lambda cell: {"error": "out of memory"}))
    assert "every run failed" in strength.here
    assert "The study cannot say" in need.here and "The study cannot say" in stronger.here


def test_a_stronger_reference_that_is_none_is_called_out(tmp_path: Path) -> None:
    folder = write_study(tmp_path, reference_measures={"strong": {"quality": 0.1}, "weak": {"quality": 0.2}})
    assert "By itself strong reaches 0.100, and the start model 0.300: by this measure it is not stronger." in (
        ask(folder)[2].here
    )


def test_runs_that_are_one_count_once(tmp_path: Path) -> None:
    """The posterior beside three references, and every reward without one: a single setting, of two seeds."""
    folder = write_study(tmp_path, references=[START, STRONG, NO_REFERENCE])
    found = groups(results.load(folder))
    settings = list(dict.fromkeys((group.setting.parameterization, group.setting.reference) for group in found))
    assert settings == [
        ("ratio", "start"),
        ("ratio", "strong"),
        ("posterior", "none"),
        ("likelihood", "start"),
        ("likelihood", "strong"),
    ]
    assert all(len(group.cells) == 2 for group in found) and len(found) == 25
