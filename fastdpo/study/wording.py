"""Numbers, lists and names as the report writes them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from .summary import NONE, Difference, Mean

EMPTY = "–"
ROLES = {
    "start": "the start model",
    "stronger": "a stronger model",
    "weaker": "a weaker model",
    "other": "another model",
}


def digits(values: Iterable[float | None]) -> int:
    """Decimals to show a column of numbers with."""
    most = max((abs(value) for value in values if value is not None), default=0.0)
    return 1 if most >= 100 else 2 if most >= 10 else 3 if most > 0.099 else 4


def number(value: float | None, decimals: int) -> str:
    """A number, "–" for None, without a minus where it rounds to zero."""
    if value is None:
        return EMPTY
    text = f"{value:.{decimals}f}"
    return text.removeprefix("-") if not float(text) else text


def show(mean: Mean | None, decimals: int) -> str:
    """0.812 ± 0.021, without ± where there is one seed."""
    if mean is None or mean.se is None:
        return number(mean and mean.value, decimals)
    return f"{number(mean.value, decimals)} ± {number(mean.se, decimals)}"


def chance(test: Difference) -> str:
    """The test's p."""
    if test.p is None:
        return "not testable"
    return "p < 0.001" if test.p < 0.001 else f"p = {test.p:.2g}"


def listed(items: Sequence[Any], last: str = "and") -> str:
    """a, b and c"""
    words = [str(item) for item in items]
    return f"{', '.join(words[:-1])} {last} {words[-1]}" if len(words) > 1 else "".join(words)


def count(number: int, noun: str) -> str:
    """1 seed, 2 seeds"""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def betas(values: Iterable[float]) -> str:
    """β = 0.1 and 0.3"""
    return f"β = {listed([f'{value:g}' for value in values])}"


def reference(name: str, config: dict[str, Any]) -> str:
    """A reference's name, and what it is."""
    if name == NONE:
        return "no reference"
    role = next((one.get("role") for one in config["references"] if one["name"] == name), None)
    return f"{name} ({ROLES[role]})" if role in ROLES else name


def sentence(text: str) -> str:
    """With a capital at its beginning."""
    return text[:1].upper() + text[1:]
