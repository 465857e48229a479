"""The figure of `benchmarks.longest`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from fastdpo.plots import BLUE, GREEN, ORANGE, STYLE

SHADES = (ORANGE, BLUE, GREEN, "#CC79A7")  # one for each budget


def draw(found: dict[str, Any], path: Path) -> None:
    """Left: measured under each budget, hatched where memory did not end the search, a line where the memory model
    ends it. Right: computed for GPUs."""
    with matplotlib.rc_context(STYLE):
        names = list(dict.fromkeys(p["contender"] for p in (*found["points"], *found["gpu"])))[::-1]
        figure = Figure(figsize=(12, 1.8 + 0.7 * len(names)), layout="constrained")
        measured, computed = figure.subplots(1, 2, sharey=True)
        budgets = sorted({p["memory_mib"] for p in found["points"]})
        bars = [(p["contender"], budgets.index(p["memory_mib"]), p) for p in found["points"]]
        _bars(measured, names, [f"{mib:,} MiB" for mib in budgets], bars)
        measured.set_title("Measured on a CPU; memory for the head:")
        sizes = sorted({p["gib"] for p in found["gpu"]})
        bars = [(p["contender"], sizes.index(p["gib"]), {"stopped": None, **p}) for p in found["gpu"]]
        _bars(computed, names, [f"{gib} GiB" for gib in sizes], bars)
        computed.set_title("Computed for GPUs from the memory model, not run:")
        figure.suptitle(
            f"Longest pair that is trained: tokens of both sequences; V = {found['vocab']:,}, H = {found['hidden']:,}, "
            "bf16, gradients of hidden and weight; the head alone",
            fontsize=10,
            x=0.01,
            ha="left",
        )
        figure.savefig(path, dpi=120)


def _bars(axes: Any, names: list[str], labels: list[str], bars: list[tuple[str, int, dict[str, Any]]]) -> None:
    height = 0.84 / len(labels)
    most = max((point["tokens"] for *_, point in bars), default=1)
    for number, label in enumerate(labels):
        axes.barh([0], [0], color=SHADES[number], label=label)  # for the legend
    for name, number, point in bars:
        y = names.index(name) + 0.42 - height * (number + 0.5)
        tokens = point["tokens"]
        open_end = point["stopped"] in ("time", "most")
        axes.barh(
            y, tokens, height * 0.9, color=SHADES[number], hatch="//" if open_end else None, edgecolor="white", lw=0
        )
        words = f"{tokens:,}" if tokens else "none"
        if open_end:
            words = f"at least {words}"
        elif point["stopped"] is not None:
            words = "failed"
        axes.text(max(tokens, point.get("model", 1), 1) * 1.12, y, words, va="center", fontsize=8)
        if point.get("model"):
            axes.plot([point["model"]] * 2, [y - height * 0.4, y + height * 0.4], color="black", lw=2)
    if any(point.get("model") for *_, point in bars):
        axes.plot([], [], color="black", lw=2, label="memory model")
    axes.set_yticks(range(len(names)), names)
    axes.set(xscale="log", xlim=(1, most * 30), ylim=(-0.5, len(names) - 0.5), xlabel="tokens")
    axes.grid(visible=False, axis="y")
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.1), ncols=len(labels) + 1)
