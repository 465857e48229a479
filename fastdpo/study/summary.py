"""Cells of a study, put together over seeds: means, standard errors, and whether two of them differ."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from .results import CellResult, Study

NONE = "none"  # stands for the reference of runs that ask none anything
LEVEL = 0.05  # of the test


class Mean(NamedTuple):
    """A mean over seeds."""

    value: float
    se: float | None  # standard deviation over seeds / sqrt(seeds); None: of one seed there is none
    seeds: int


class Setting(NamedTuple):
    """What is trained, but for beta and seed."""

    loss_type: str
    parameterization: str
    reference: str  # its name; NONE for the posterior, whichever reference the grid has beside it


class Group(NamedTuple):
    """The runs of one setting and beta; runs that cells share count once."""

    setting: Setting
    beta: float
    cells: tuple[CellResult, ...]  # done; one a seed
    failed: tuple[CellResult, ...]

    def mean(self, measure: str) -> Mean | None:
        """Over the seeds in which it was measured; None if it was in none."""
        return mean([cell.measures.get(measure) for cell in self.cells])

    @property
    def degenerate(self) -> list[str]:
        """Reasons, each once; empty: every seed is healthy."""
        return list(dict.fromkeys(reason for cell in self.cells for reason in cell.degenerate))

    @property
    def degenerate_seeds(self) -> int:
        return sum(bool(cell.degenerate) for cell in self.cells)


class Difference(NamedTuple):
    """Of two means, and Welch's t-test of it."""

    value: float
    se: float | None
    p: float | None  # two-sided; None: not testable, for want of a second seed

    @property
    def real(self) -> bool:
        return self.p is not None and self.p < LEVEL


def mean(values: Sequence[Any]) -> Mean | None:
    """Mean and standard error of the numbers among `values`; None if there are none, or they are not finite."""
    numbers = [float(value) for value in values if value is not None]
    if not numbers or not all(map(math.isfinite, numbers)):
        return None
    se = statistics.stdev(numbers) / math.sqrt(len(numbers)) if len(numbers) > 1 else None
    return Mean(statistics.fmean(numbers), se, len(numbers))


def groups(study: Study) -> list[Group]:
    """The groups in the grid's order: loss, parameterization, reference, beta.

    A posterior's reward asks no reference anything, and without a reference the other parameterizations are the
    posterior: all these are `Setting(loss, "posterior", NONE)`.
    """
    without = {one["name"] for one in study.config["references"] if one["model"] is None}
    found: dict[tuple[Setting, float], dict[str, CellResult]] = {}
    for cell in study.cells:
        if cell.parameterization == "posterior" or cell.reference in without:
            setting = Setting(cell.loss_type, "posterior", NONE)
        else:
            setting = Setting(cell.loss_type, cell.parameterization, cell.reference)
        # The cell that was run comes before those that share it
        found.setdefault((setting, cell.beta), {}).setdefault(cell.same_run_as or cell.id, cell)
    # Of the posterior, once, where the grid first has it; its betas one after the other
    order = list(dict.fromkeys(setting for setting, _ in found))
    keys = sorted(found, key=lambda key: (order.index(key[0]), key[1]))
    return [_group(setting, beta, list(found[setting, beta].values())) for setting, beta in keys]


def _group(setting: Setting, beta: float, cells: list[CellResult]) -> Group:
    done = tuple(cell for cell in cells if cell.status == "done")
    return Group(setting, beta, done, tuple(cell for cell in cells if cell.status != "done"))


def of(found: Sequence[Group], loss_type: str, parameterization: str, reference: str) -> list[Group]:
    """The groups of one setting, by beta."""
    return [group for group in found if group.setting == Setting(loss_type, parameterization, reference)]


def best(found: Sequence[Group], higher_is_better: bool) -> Group | None:
    """The healthy group of the best mean quality; of equals the one of the greatest beta, the strongest constraint."""
    able = [group for group in found if not group.degenerate and group.mean("quality") is not None]
    sign = 1 if higher_is_better else -1
    return max(able, key=lambda group: (sign * _value(group), group.beta), default=None)


def _value(group: Group) -> float:
    quality = group.mean("quality")
    return math.nan if quality is None else quality.value


def pareto(found: Sequence[Group], higher_is_better: bool) -> list[Group]:
    """Of healthy groups, those that no other beats in both: quality, and KL to the start model; by KL."""
    able = [group for group in found if not group.degenerate and group.mean("quality") and group.mean("kl_start")]
    sign = 1 if higher_is_better else -1
    front: list[Group] = []
    for _, quality, _, group in sorted(
        (group.mean("kl_start").value, -sign * _value(group), i, group)  # type: ignore[union-attr]
        for i, group in enumerate(able)
    ):
        if not front or quality < -sign * _value(front[-1]):
            front.append(group)
    return front


def difference(a: Group, b: Group, measure: str = "quality") -> Difference:
    """Mean of `a` less mean of `b`, which both have, with Welch's t-test over seeds.

    Seeds can agree by luck where answers are few, and then seem to prove anything. So the variance of a mean is never
    taken to be less than what the scored answers leave: the mean of `<measure>_se`^2, over the number of seeds.
    """
    first, second = a.mean(measure), b.mean(measure)
    if first is None or second is None:
        raise ValueError(f"difference: expected two groups with {measure}, got {a.setting}, {b.setting}")
    value = first.value - second.value
    if first.se is None or second.se is None:
        return Difference(value, None, None)
    variances = [_variance(group, mean, measure) for group, mean in ((a, first), (b, second))]
    total = sum(variances)
    if total == 0:
        return Difference(value, 0.0, 1.0 if value == 0 else 0.0)
    counts = (first.seeds, second.seeds)
    freedom = total**2 / sum(variance**2 / (n - 1) for variance, n in zip(variances, counts, strict=True))
    return Difference(value, math.sqrt(total), _two_sided(value / math.sqrt(total), freedom))


def _variance(group: Group, mean: Mean, measure: str) -> float:
    own = [cell.measures.get(f"{measure}_se") for cell in group.cells]
    known = [one**2 for one in own if one is not None]
    least = statistics.fmean(known) / mean.seeds if known else 0.0
    return max((mean.se or 0.0) ** 2, least)


def _two_sided(t: float, freedom: float) -> float:
    """P(|T| > |t|) of Student's distribution."""
    import mpmath  # comes with torch, through sympy

    return float(mpmath.betainc(freedom / 2, 0.5, 0, freedom / (freedom + t * t), regularized=True))
