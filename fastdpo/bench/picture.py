"""The picture of `fastdpo bench`: time and peak memory of each contender, side by side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from ..plots import BLUE, GREY, ORANGE, STYLE
from .isolated import Outcome
from .race import Entry
from .report import FAST, baseline, duration, title

SKY = "#56B4E9"  # Okabe and Ito


def draw(outcomes: Mapping[Entry, Outcome], heading: str, path: Path) -> None:
    """Horizontal bars, one row a contender; what has no numbers is said in words.

    Args:
        heading: what was measured, on what.
        path: of the PNG.
    """
    base = baseline(outcomes)
    rows = list(outcomes)[::-1]  # the first on top
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 1.7 + 0.42 * len(rows)), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for axes, seconds in zip(panels, (True, False), strict=True):
            values = [outcomes[entry].seconds if seconds else outcomes[entry].mib for entry in rows]
            most = max((value for value in values if value is not None), default=1.0) or 1.0
            for y, (entry, value) in enumerate(zip(rows, values, strict=True)):
                if value is None:
                    axes.text(most * 0.01, y, _words(outcomes[entry].failed or ""), va="center", style="italic")
                    continue
                axes.barh(y, value, 0.66, color=_colour(entry, base))
                axes.text(value + most * 0.015, y, duration(value) if seconds else f"{value:,.0f} MiB", va="center")
            axes.set_yticks(range(len(rows)), [title(entry, outcomes) for entry in rows])
            axes.set_title("Time of a step's head" if seconds else "Peak memory above the inputs")
            axes.set(xlim=(0, most * 1.22), xlabel="seconds" if seconds else "MiB")
            axes.grid(visible=False, axis="y")
        figure.suptitle(heading, fontsize=9, x=0.01, ha="left")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)


def _colour(entry: Entry, base: Entry | None) -> str:
    if entry.contender.startswith(FAST):
        return BLUE if entry.contender == FAST else SKY
    return ORANGE if entry == base else GREY


def _words(failed: str) -> str:
    """The short of it; the table on the terminal has it all."""
    if failed == "memory":
        return "out of memory"
    return failed.split(",")[0] if failed.startswith(("more than", "refused")) else "failed"
