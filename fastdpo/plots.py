"""The pictures: training curves of `fastdpo train`. Colours of Okabe and Ito, which colour-blind people can tell apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#E69F00", "#009E73", "#6E6E6E"
STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E5E5E5",
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "font.size": 10,
    "legend.frameon": False,
}


def series(records: Sequence[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """(steps, values) of one logged quantity, where it was logged."""
    found = [(r["step"], r[key]) for r in records if "step" in r and key in r]
    return [float(step) for step, _ in found], [float(value) for _, value in found]


def training_curves(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Loss, reward accuracy and reward margin over steps, training and evaluation, as one PNG.

    Args:
        records: the lines of metrics.jsonl.
        path: of the PNG.
    """
    panels = (("loss", "Loss"), ("rewards/accuracies", "Reward accuracy"), ("rewards/margins", "Reward margin"))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12, 3.6), layout="constrained")
        for axes, (key, title) in zip(figure.subplots(1, 3), panels, strict=True):
            steps, values = series(records, key)
            # A handful of points is no curve: show them
            axes.plot(steps, values, color=BLUE, marker="o" if len(steps) <= 20 else None, ms=4, label="training")
            steps, values = series(records, f"eval_{key}")
            if steps:
                axes.plot(steps, values, color=ORANGE, marker="D", ms=6, linestyle="--", label="held out")
                axes.legend()
            axes.set_title(title)
            axes.set_xlabel("step")
            axes.xaxis.get_major_locator().set_params(integer=True)
            if key == "rewards/accuracies":
                axes.set_ylim(-0.03, 1.03)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
