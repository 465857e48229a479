"""The three questions of arXiv 2407.13709, answered in words from a study's numbers, beside the paper's answers.

Pure functions of a study. A difference counts if Welch's t-test over seeds says so (`summary.difference`); everything
else is called what it is: within the noise, or not testable.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from . import wording
from .results import Study
from .summary import LEVEL, NONE, Difference, Group, best, difference, groups, of

QUESTIONS = (
    "How strong should the KL constraint be?",
    "Is a reference needed?",
    "Does a stronger reference help?",
)
ORDER = ("ratio", "likelihood", "posterior")  # of preference, where one parameterization speaks for a study
PAPER = (
    "Mistral-7B, trained on UltraFeedback with its own start model as the reference, was best at β = 0.01 (length-"
    "controlled win rate in AlpacaEval2: 16.25; 14.03 at β = 0.1 and 12.36 at β = 0.005), and Tulu 2 7B at β = 0.02 "
    "(10.46; 9.38 at β = 0.1, degenerate at β = 0.005).",
    "At the best β of each, the ratio to the start model reached 16.25, the likelihood 13.63 and the posterior 12.84 "
    "(Mistral-7B).",
    "Mistral-7B gained from Mistral-7B-Instruct-v0.2 as the reference, which is much like it (20.25 at β = 1, against "
    "16.25), and not from Llama-3-70B-Instruct (15.37 at best). Tulu 2 7B fell to 7.85 with Mistral-7B-Instruct-v0.2, "
    "and had 11.17 with Llama-3-70B-Instruct, against 10.46.",
)


class Answer(NamedTuple):
    """To one question."""

    question: str
    here: str  # what this study found
    paper: str  # what the paper found
    beside: str  # whether the two agree


class _Reader:
    """A study's groups of one loss, with the words for them."""

    def __init__(self, study: Study, loss_type: str) -> None:
        self.config, self.loss_type = study.config, loss_type
        self.groups = [group for group in groups(study) if group.setting.loss_type == loss_type]
        self.higher: bool = study.config["higher_is_better"]
        self.quality: str = study.config["quality"]
        self.scored: bool = study.config.get("scorer") is not None
        means = [group.mean("quality") for group in self.groups]
        self.decimals = wording.digits(mean and mean.value for mean in means)
        roles = {one["role"]: one["name"] for one in reversed(study.config["references"])}
        self.start: str | None = roles.get("start")

    def of(self, parameterization: str, reference: str) -> list[Group]:
        return of(self.groups, self.loss_type, parameterization, reference)

    def best(self, found: Sequence[Group]) -> Group | None:
        return best(found, self.higher)

    def references(self, parameterization: str) -> list[str]:
        """Of which there are runs."""
        names = (group.setting.reference for group in self.groups if group.setting.parameterization == parameterization)
        return list(dict.fromkeys(names))

    def shown(self, group: Group) -> str:
        return f"{wording.show(group.mean('quality'), self.decimals)} at β = {group.beta:g}"

    def with_reference(self, name: str) -> str:
        known = wording.reference(name, self.config)
        return "Without a reference" if name == NONE else f"With {known} as the reference"

    def gain(self, a: Group, b: Group) -> Difference:
        """Of a over b; above 0: a is better."""
        test = difference(a, b)
        return test if self.higher else test._replace(value=-test.value)

    def against(self, a: Group, b: Group, called: str) -> str:
        """How a does against b, which is `called` so: the end of a sentence whose subject is a."""
        gain = self.gain(a, b)
        by = wording.number(abs(gain.value), self.decimals)
        other = f"{called} ({self.shown(b)})"
        if gain.value == 0:
            return f"is level with {other}"
        if gain.se is None:
            return f"is {'ahead of' if gain.value > 0 else 'behind'} {other} by {by}, which one seed cannot test"
        by += f" ± {wording.number(gain.se, self.decimals)}"
        if gain.real:
            return f"is {'better' if gain.value > 0 else 'worse'} than {other} by {by} ({wording.chance(gain)})"
        return f"is not told apart from {called} ({self.shown(b)}; they differ by {by}, {wording.chance(gain)})"


def answers(study: Study, loss_type: str) -> list[Answer]:
    """One a question, in the order of QUESTIONS, from the runs with one loss."""
    reader = _Reader(study, loss_type)
    found = (_strength(reader), _need(reader), _stronger(reader))
    return [
        Answer(question, here, paper, beside)
        for question, (here, beside), paper in zip(QUESTIONS, found, PAPER, strict=True)
    ]


def _strength(reader: _Reader) -> tuple[str, str]:
    speaking = next((one for one in ORDER if reader.references(one)), None)
    if speaking is None:
        return "No run says anything about it.", _NOTHING
    told = [_best_beta(reader, reader.of(speaking, name), name) for name in reader.references(speaking)]
    about = "" if speaking == "ratio" else f"There are no runs of the ratio; these are of the {speaking}. "
    return about + " ".join(told), _same_shape(reader)


def _best_beta(reader: _Reader, found: list[Group], name: str) -> str:
    """Which beta is best with one reference, and better than which others."""
    prefix = reader.with_reference(name)
    chosen = reader.best(found)
    if chosen is None:
        return f"{prefix}, {_why_none(found)}."
    quality = f"{reader.quality}: {wording.show(chosen.mean('quality'), reader.decimals)}"
    tried = [group.beta for group in found]
    if len(tried) == 1:
        return f"{prefix}, only β = {chosen.beta:g} was tried ({quality}), which says nothing about the strength."
    told = f"{prefix}, β = {chosen.beta:g} is best ({quality})"
    others = [group for group in found if group is not chosen and reader.best([group])]
    told += f"{_better_than(reader, chosen, others)}."
    if chosen.beta in (min(tried), max(tried)):
        side = "smallest" if chosen.beta == min(tried) else "largest"
        told += f" It is the {side} β that was tried, so a better one may lie beyond."
    ill = [group.beta for group in found if group.degenerate]
    if ill:
        told += f" Runs at {wording.betas(ill)} are degenerate and were left out of the choice."
    return told


def _better_than(reader: _Reader, chosen: Group, others: list[Group]) -> str:
    tests = [(other.beta, reader.gain(chosen, other)) for other in others]
    real = [beta for beta, gain in tests if gain.real]
    noise = [beta for beta, gain in tests if gain.p is not None and not gain.real]
    untested = [beta for beta, gain in tests if gain.p is None]
    parts = []
    if real:
        parts.append(f"it is better than {wording.betas(real)} by more than the noise of the seeds")
    if noise:
        parts.append(f"it is not told apart from {wording.betas(noise)}")
    if untested:
        parts.append(f"for want of a second seed nothing tells it apart from {wording.betas(untested)}")
    return "".join(f"; {part}" for part in parts)


def _same_shape(reader: _Reader) -> str:
    found = reader.of("ratio", reader.start) if reader.start else []
    chosen = reader.best(found)
    if chosen is None or len(found) < 3:
        return (
            "The study has too few healthy runs of the ratio with the start model as the reference to compare with it."
        )
    carry = (
        " The number itself does not carry over: β multiplies log-ratios of whole answers, and the best one moves with "
        "their length, the learning rate and the number of steps."
    )
    if chosen.beta in (found[0].beta, found[-1].beta):
        side = "smallest" if chosen is found[0] else "largest"
        return (
            f"The paper's peak inside the grid is not seen here: the best β is the {side} of the grid, and what lies "
            f"beyond is not known.{carry}"
        )
    if all(end.degenerate or (reader.best([end]) and reader.gain(chosen, end).real) for end in (found[0], found[-1])):
        return f"The shape agrees: the best β lies inside the grid, and both of its ends are worse.{carry}"
    return (
        "As in the paper the best β lies inside the grid, but it is not told apart from one end of the grid at least: "
        f"that there is a peak is not shown.{carry}"
    )


def _need(reader: _Reader) -> tuple[str, str]:
    if not reader.scored:
        return _NO_SCORER, _NOTHING
    compared = {one: reader.best(reader.of(one, NONE if one == "posterior" else reader.start or "")) for one in ORDER}
    there = {one: group for one, group in compared.items() if group is not None}
    if "ratio" not in there or len(there) < 2:
        alone = "neither the likelihood nor the posterior has one"
        lacking = alone if "ratio" in there else "the ratio has none with the start model as the reference"
        return f"The study cannot say: of the healthy runs that this takes, {lacking}.", _NOTHING
    ratio = there.pop("ratio")
    told = f"At the best β of each, the ratio to {wording.reference(reader.start or '', reader.config)} "
    told += f"({reader.shown(ratio)}) "
    told += wording.listed([reader.against(ratio, other, _the(one)) for one, other in there.items()])
    gains = {one: reader.gain(ratio, other) for one, other in there.items()}
    return f"{told}. {_verdict_on_need(gains)}", _agree_on_need(gains)


def _verdict_on_need(gains: dict[str, Difference]) -> str:
    posterior = gains.get("posterior")
    if posterior is None:
        return "There are no healthy runs without a reference, so whether one is needed stays open."
    if not posterior.real:
        return "So these runs do not show that a reference is needed, nor that it is not."
    return (
        "So here the reference helps." if posterior.value > 0 else "So here training does better without a reference."
    )


def _agree_on_need(gains: dict[str, Difference]) -> str:
    against = [one for one, gain in gains.items() if gain.real and gain.value < 0]
    if against:
        return (
            f"That is not the paper's order: here the ratio does worse than {wording.listed(list(map(_the, against)))}."
        )
    if all(gain.real for gain in gains.values()):
        return "That agrees with the paper, as far as it was compared."
    open_ones = [_the(one) for one, gain in gains.items() if not gain.real]
    return f"That neither confirms nor contradicts the paper about {wording.listed(open_ones)}."


def _stronger(reader: _Reader) -> tuple[str, str]:
    if not reader.scored:
        return _NO_SCORER, _NOTHING
    speaking = next((one for one in ("ratio", "likelihood") if reader.references(one)), None)
    names = reader.references(speaking) if speaking else []
    others = [name for name in names if name != reader.start]
    base = reader.best(reader.of(speaking, reader.start)) if speaking and reader.start else None
    if speaking is None or base is None or not others:
        lacking = (
            "runs with another reference than it" if base else "healthy runs with the start model as the reference"
        )
        return f"The study cannot say: it has no {lacking}.", _NOTHING
    told, gains = [], {}
    for name in others:
        found = reader.of(speaking, name)
        chosen = reader.best(found)
        if chosen is None:
            told.append(f"{reader.with_reference(name)}, {_why_none(found)}.")
            continue
        gains[name] = reader.gain(chosen, base)
        against = reader.against(chosen, base, f"the one with {reader.start}")
        told.append(f"{reader.with_reference(name)}, the best {speaking} ({reader.shown(chosen)}) {against}.")
        told += _of_its_own(reader, name)
    return " ".join(told), _agree_on_stronger(reader, gains)


def _of_its_own(reader: _Reader, name: str) -> list[str]:
    """Whether a reference that is called stronger, or weaker, is."""
    role = next(one["role"] for one in reader.config["references"] if one["name"] == name)
    own = (reader.config.get("reference_measures") or {}).get(name, {}).get("quality")
    start = (reader.config.get("start") or {}).get("quality")
    if own is None or start is None:
        return []
    shown = [wording.number(value, reader.decimals) for value in (own, start)]
    told = f"By itself {name} reaches {shown[0]}, and the start model {shown[1]}"
    better = own - start if reader.higher else start - own
    if (role == "stronger" and better <= 0) or (role == "weaker" and better >= 0):
        return [f"{told}: by this measure it is not {role}."]
    return [f"{told}."]


def _agree_on_stronger(reader: _Reader, gains: dict[str, Difference]) -> str:
    roles = {one["name"]: one["role"] for one in reader.config["references"]}
    stronger = {name: gain for name, gain in gains.items() if roles[name] == "stronger"}
    if not stronger:
        return "No reference that is named stronger has healthy runs, so there is nothing to compare with the paper."
    told = []
    for name, gain in stronger.items():
        if not gain.real:
            told.append(f"With {name} these runs neither confirm nor contradict the paper.")
        elif gain.value > 0:
            told.append(f"With {name} it is as the paper found with a reference that is like the policy.")
        else:
            told.append(f"With {name} it is as the paper found with references that do not fit the policy.")
    return " ".join(told)


def caveats(study: Study) -> list[str]:
    """What the study does not show."""
    config = study.config
    seeds = len(config["seeds"])
    return [
        "The best β is chosen on the same held-out prompts that its quality is given on. That makes the best of many "
        "look better than it is, and the more so the more β were tried.",
        f"There {'is one seed' if seeds == 1 else f'are {seeds} seeds'} a cell."
        + (
            " Nothing separates a difference from chance then; take several seeds before you conclude anything."
            if seeds == 1
            else f" A standard error from so few is itself uncertain. Where nothing differs, one test in "
            f"{round(1 / LEVEL)} comes out at p < {LEVEL:g} by chance alone, and many are made here."
        ),
        "A seed is another order of the pairs and another draw of the answers. All runs start from one model and "
        "answer the same held-out prompts: what others would change is in no standard error over seeds.",
        "It is one policy, one set of pairs, one learning rate and one number of steps for every cell. Another "
        "learning rate can move the best β, and may suit one parameterization better than another.",
        f"Quality stands for {config['quality']} and nothing else; what that does not measure, the answers do not show."
        + ("" if config.get("scorer") else _UNSCORED),
        "Reward accuracy and margin are of each run's own reward. They do not compare different parameterizations or "
        "references, nor the margin different β; KL to the start model and changes of log-probabilities do.",
        "KL is estimated from answers that the trained policy samples, and so knows only where that policy goes.",
    ]


def rule() -> str:
    """How differences are judged, in words."""
    return (
        f"One is called better than another where Welch's t-test over seeds gives p < {LEVEL:g}. ± after a mean is its "
        "standard error over seeds alone. For the test and ± after a difference it is taken at least as large as what "
        "the scored answers themselves leave, for seeds can agree by luck. Degenerate runs are shown and left out of "
        "every choice of a best β."
    )


_UNSCORED = (
    " No scorer was given, so it is the accuracy of each run's own reward on pairs: it can compare one β with another, "
    "neither parameterizations nor references, and says little about the answers that a policy gives."
)
_NO_SCORER = (
    "The study cannot say: without a scorer quality is the accuracy of each run's own reward on pairs, and runs with "
    "different parameterizations or references have different rewards."
)
_NOTHING = "There is nothing to compare with the paper."


def _why_none(found: Sequence[Group]) -> str:
    if not any(group.cells for group in found):
        return "every run failed"
    if all(group.degenerate for group in found if group.cells):
        return "every run is degenerate"
    return "no healthy run has a measured quality"


def _the(parameterization: str) -> str:
    return f"the {parameterization}"
