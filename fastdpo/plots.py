"""The pictures: curves of `fastdpo train`, report of `fastdpo demo`.

Colours of Okabe and Ito, which colour-blind people can tell apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#E69F00", "#009E73", "#6E6E6E"
STYLE: Any = {
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


def demo_report(report: dict[str, Any], path: Path) -> None:
    """The demo's report as one PNG: both losses, their difference, what was learned, what it cost.

    Args:
        report: `fastdpo.demo.make_report`'s.
        path: of the PNG.
    """
    legs = (("TRL", report["trl"], ORANGE), ("fastdpo", report["fastdpo"], BLUE))
    steps = range(1, len(report["differences"]) + 1)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 7.5), layout="constrained")
        (loss, difference), (learned, cost) = figure.subplots(2, 2)

        # The curves lie on each other: a wide one below, a thin one above
        for (name, leg, colour), width, dashes in zip(legs, (6, 1.6), ("-", "--"), strict=True):
            loss.plot(range(1, len(leg["losses"]) + 1), leg["losses"], dashes, color=colour, lw=width, label=name)
        loss.set(title="DPO loss per step", xlabel="step", ylim=(0, None))
        loss.legend()

        # Equal losses have no place on a logarithmic axis
        difference.semilogy(steps, [max(d, 1e-9) for d in report["differences"]], "o-", color=GREY, ms=3.5, lw=1)
        difference.axhline(1e-3, color="black", lw=1, ls=":")
        difference.annotate("allowed: 1e-3", (1, 1e-3), xytext=(0, 4), textcoords="offset points", fontsize=9)
        difference.set(title="Relative difference of the losses (0 drawn at 1e-9)", xlabel="step", ylim=(5e-10, 1e-2))

        groups = (
            ("greedy answers\nright, before", "greedy_before"),
            ("greedy answers\nright, after", "greedy_after"),
            ("reward accuracy\nafter", "reward_accuracy_after"),
        )
        for offset, (name, leg, colour) in zip((-0.2, 0.2), legs, strict=True):
            places = [i + offset for i in range(len(groups))]
            bars = learned.bar(places, [leg[key] for _, key in groups], 0.36, color=colour, label=name)
            learned.bar_label(bars, fmt="%.2f", padding=2, fontsize=9)
        learned.set_xticks(range(len(groups)), [title for title, _ in groups])
        learned.set(title="On held-out prompts", ylim=(0, 1.25))
        learned.set_yticks([0, 0.25, 0.5, 0.75, 1])
        learned.grid(visible=False, axis="x")
        learned.legend(loc="upper left", ncols=2)

        costs = (
            ("seconds\nper step", "seconds_per_step", "{:.2f} s"),
            ("peak memory\nof the process", "peak_memory_mib", "{:,.0f} MiB"),
        )
        for i, (_, key, form) in enumerate(costs):
            most = max(leg[key] for _, leg, _ in legs)
            for offset, (name, leg, colour) in zip((-0.2, 0.2), legs, strict=True):
                bars = cost.bar(i + offset, leg[key] / most, 0.36, color=colour, label=name if i == 0 else None)
                cost.bar_label(bars, labels=[form.format(leg[key])], padding=2, fontsize=9)
        cost.set_xticks(range(len(costs)), [title for title, _, _ in costs])
        cost.set(title="Cost (height: share of the larger)", ylim=(0, 1.3))
        cost.set_yticks([])
        cost.grid(visible=False)
        cost.legend(loc="upper right", ncols=2)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
