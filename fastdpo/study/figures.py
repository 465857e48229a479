"""The report's pictures. Drawn at the size they print at, with text of 9 points or more; same study, same bytes.

A colour and a line style for each reference, a marker for each parameterization; beta, where it is a colour, from the
cividis map. All can be told apart by the colour-blind, and in grey by style and marker.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator

from ..plots import BLUE, GREEN, GREY, ORANGE, STYLE
from . import summary, wording
from .blocks import Picture
from .results import Study
from .summary import NONE, Group, Setting

WIDTH = 7.6  # inches: what a page in print has
PRINT: Any = {**STYLE, "font.size": 9, "axes.titlesize": 10, "legend.fontsize": 9, "axes.labelsize": 9.5}
COLOURS = (BLUE, ORANGE, GREEN, "#CC79A7", "#56B4E9", "#D55E00")  # of Okabe and Ito
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)))
MARKERS = {"ratio": "o", "likelihood": "^", "posterior": "s"}
BESIDE = 1.05  # factor between two references at one beta
LARGE_LOSS = 10.0
CURVES = (
    ("loss", "Loss"),
    ("rewards/accuracies", "Reward accuracy"),
    ("rewards/margins", "Reward margin"),
)


class _Look(NamedTuple):
    """How references are drawn: the same in every picture of a study."""

    colours: dict[str, str]
    dashes: dict[str, Any]


def draw(study: Study, loss_type: str, folder: Path) -> list[Picture]:
    """The pictures of the runs with one loss, as PNGs in `folder`; none where nothing was measured.

    Returns what was drawn, in order: quality over beta, quality over KL, changes of the chosen log-probabilities over
    beta, and three sets of learning curves.
    """
    found = [group for group in summary.groups(study) if group.setting.loss_type == loss_type and group.cells]
    look = _look(study)
    only = len(study.config["loss_types"]) == 1
    suffix = "" if only else "-" + re.sub(r"[^A-Za-z0-9_]", "_", loss_type)
    pictures = [_quality(study, found, look), _frontier(study, found, look), _displacement(study, found, look)]
    pictures += [_curves(found, key, title) for key, title in CURVES]
    drawn = []
    for name, figure, alt, caption in filter(None, pictures):
        path = folder / f"{name}{suffix}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context(PRINT):
            figure.savefig(path, dpi=150, metadata={"Software": None})
        drawn.append(Picture(path, alt, caption))
    return drawn


_Drawn = tuple[str, Figure, str, str] | None  # name, picture, what it shows, caption


def _look(study: Study) -> _Look:
    names = [one["name"] for one in study.config["references"] if one["model"] is not None]
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    dashes = {name: DASHES[i % len(DASHES)] for i, name in enumerate(names)}
    return _Look({**colours, NONE: "black"}, {**dashes, NONE: (0, (1, 1))})


def _plain(text: str) -> str:
    """Text as matplotlib shows it: $ begins no formula."""
    return text.replace("$", r"\$")


def _settings(found: Sequence[Group]) -> dict[str, dict[Setting, list[Group]]]:
    """parameterization -> setting -> its groups by beta"""
    panels: dict[str, dict[Setting, list[Group]]] = {}
    for group in found:
        panels.setdefault(group.setting.parameterization, {}).setdefault(group.setting, []).append(group)
    return panels


def _over_beta(
    found: Sequence[Group], look: _Look, measure: str, label: str, level: Callable[[Axes], None]
) -> Figure | None:
    """A panel a parameterization, a line a reference, bars of standard errors, crosses on degenerate groups."""
    found = [group for group in found if group.mean(measure) is not None]
    panels = _settings(found)
    if not panels:
        return None
    with matplotlib.rc_context(PRINT):
        figure = Figure(figsize=(WIDTH, 3.5), layout="constrained")
        row = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (parameterization, settings) in zip(row, panels.items(), strict=True):
            level(axes)
            for i, line in enumerate(settings.values()):
                _line(axes, line, look, measure, beside=i - (len(settings) - 1) / 2)
            axes.set_xscale("log")
            axes.set_xticks(sorted({group.beta for group in found}), labels=None)
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
            axes.tick_params(axis="x", labelrotation=45 if len({g.beta for g in found}) > 5 else 0)
            axes.set(title=parameterization, xlabel="β")
        row[0].set_ylabel(_plain(label))
        names = list(dict.fromkeys(group.setting.reference for group in found))
        handles = [_reference_line(name, look) for name in names]
        handles += [line for axes in row[:1] for line in axes.lines if not line.get_label().startswith("_")]
        if any(group.degenerate for group in found):
            handles.append(_cross())
        figure.legend(handles=handles, loc="outside lower center", ncols=4)
    return figure


def _reference_line(name: str, look: _Look) -> Line2D:
    label = "no reference" if name == NONE else f"reference: {_plain(name)}"
    return Line2D([], [], color=look.colours[name], ls=look.dashes[name], lw=1.8, label=label)


def _cross() -> Line2D:
    return Line2D([], [], color="black", marker="x", ms=8, mew=1.2, ls="", label="degenerate")


def _line(axes: Axes, line: Sequence[Group], look: _Look, measure: str, beside: float) -> None:
    """One setting over beta, `beside` steps beside the true place, so that lines that agree can both be seen."""
    colour, kind = look.colours[line[0].setting.reference], MARKERS[line[0].setting.parameterization]
    points = [(group, group.beta * BESIDE**beside, group.mean(measure)) for group in line]
    values = [mean.value for _, _, mean in points if mean is not None]
    axes.plot([x for _, x, _ in points], values, color=colour, ls=look.dashes[line[0].setting.reference], lw=1.6)
    for group, x, mean in points:
        if mean is not None:
            _point(axes, group, x, mean.value, colour, kind, yerr=mean.se)


def _point(axes: Axes, group: Group, x: float, y: float, colour: str, kind: str, **errors: float | None) -> None:
    """A marker with its error bars; hollow under a cross if a seed is degenerate."""
    bars: dict[str, Any] = {name: [error] for name, error in errors.items() if error is not None}
    ill = bool(group.degenerate)
    fill = "white" if ill else colour
    axes.errorbar([x], [y], fmt=kind, ms=8 if ill else 5.5, mfc=fill, color=colour, capsize=2.5, lw=1.2, **bars)
    if ill:
        axes.plot([x], [y], "x", color="black", ms=8, mew=1.2, zorder=5)


def _quality(study: Study, found: Sequence[Group], look: _Look) -> _Drawn:
    start = (study.config.get("start") or {}).get("quality")
    own = {name: one.get("quality") for name, one in (study.config.get("reference_measures") or {}).items()}
    # The start model is drawn once, also where it is a reference too
    same = {one["name"] for one in study.config["references"] if one["role"] == "start"}

    def levels(axes: Axes) -> None:
        if start is not None:
            axes.axhline(start, color=GREY, lw=1.2, ls=(0, (6, 2)), label="start model, untrained")
        for name, value in own.items():
            if value is not None and name in look.colours and name not in same:
                axes.axhline(value, color=look.colours[name], lw=1, ls=":", label=f"{_plain(name)} by itself")

    quality = study.config["quality"]
    figure = _over_beta(found, look, "quality", quality, levels)
    lower = "" if study.config["higher_is_better"] else " Lower is better."
    if figure is None:
        return None
    return (
        "quality",
        figure,
        f"{quality} over beta, a panel for each parameterization",
        f"{wording.sentence(quality)} over β.{lower} {_bars(found)} Horizontal "
        "lines: the start model before training, and each other reference by itself. Hollow with a cross: a seed at "
        "least is degenerate. References at one β are drawn side by side.",
    )


def _bars(found: Sequence[Group]) -> str:
    seeds = sorted({len(group.cells) for group in found})
    if seeds[-1] == 1:
        return "One seed a point, so there are no error bars."
    several = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    return f"Points are means over {several} seeds, bars one standard error of the mean over seeds."


def _displacement(study: Study, found: Sequence[Group], look: _Look) -> _Drawn:
    def zero(axes: Axes) -> None:
        axes.axhline(0, color=GREY, lw=1.2, ls=(0, (6, 2)), label="as before training")

    figure = _over_beta(found, look, "chosen_displacement", "change of log p(chosen), nats", zero)
    if figure is None:
        return None
    return (
        "displacement",
        figure,
        "change of the chosen completions' log-probability over beta, a panel for each parameterization",
        "Likelihood displacement: how much training changed the log-probability of the held-out chosen completions, in "
        f"nats per completion. Below 0 the policy makes less likely what it was to prefer. {_bars(found)}",
    )


def _frontier(study: Study, found: Sequence[Group], look: _Look) -> _Drawn:
    points = [(group, group.mean("kl_start"), group.mean("quality")) for group in found]
    able = [(group, kl, quality) for group, kl, quality in points if kl is not None and quality is not None]
    if not able:
        return None
    higher, quality_name = study.config["higher_is_better"], study.config["quality"]
    with matplotlib.rc_context(PRINT):
        figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
        axes = figure.subplots()
        for group, kl, quality in able:
            colour, kind = look.colours[group.setting.reference], MARKERS[group.setting.parameterization]
            errors = {"xerr": _kl_error(group, kl), "yerr": quality.se}
            _point(axes, group, kl.value, quality.value, colour, kind, **errors)
        front = summary.pareto(found, higher)
        xs = [group.mean("kl_start").value for group in front]  # type: ignore[union-attr]
        ys = [group.mean("quality").value for group in front]  # type: ignore[union-attr]
        axes.step(xs, ys, where="post", color=GREY, lw=5, alpha=0.3, solid_capstyle="butt", zorder=0)
        start = (study.config.get("start") or {}).get("quality")
        if start is not None:
            axes.axhline(start, color=GREY, lw=1.2, ls=(0, (6, 2)))
        values = [kl.value for _, kl, _ in able]
        if min(values) > 0 and max(values) > 30 * min(values):
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set(xlabel="KL(policy ‖ start model), nats per token", ylabel=_plain(quality_name))
        figure.legend(handles=_frontier_legend(able, look, start), loc="outside lower center", ncols=4)
    return (
        "frontier",
        figure,
        f"{quality_name} over the KL from the start model, a point for each beta of each setting",
        f"{wording.sentence(quality_name)} against how far the policy went from the start model, a point for each β. "
        "Wide grey line: the frontier, the healthy points that no other beats in both. "
        f"{_bars(found)} Bars across: one standard error of the "
        "KL, over seeds or of its sampling, the larger.",
    )


def _kl_error(group: Group, kl: summary.Mean) -> float:
    sampled = summary.mean([cell.measures.get("kl_start_se") for cell in group.cells])
    own = 0.0 if sampled is None else sampled.value / sampled.seeds**0.5
    return max(kl.se or 0.0, own)


def _frontier_legend(able: Sequence[tuple[Group, Any, Any]], look: _Look, start: float | None) -> list[Line2D]:
    names = list(dict.fromkeys(group.setting.reference for group, _, _ in able))
    kinds = list(dict.fromkeys(group.setting.parameterization for group, _, _ in able))
    handles = [Line2D([], [], color=GREY, marker=MARKERS[kind], ls="", ms=6, label=kind) for kind in kinds]
    for name in names:
        line = _reference_line(name, look)
        line.set(linestyle="-", linewidth=5)
        handles.append(line)
    handles.append(Line2D([], [], color=GREY, lw=5, alpha=0.3, label="frontier"))
    if start is not None:
        handles.append(Line2D([], [], color=GREY, lw=1.2, ls=(0, (6, 2)), label="start model, untrained"))
    if any(group.degenerate for group, _, _ in able):
        handles.append(_cross())
    return handles


def _curves(found: Sequence[Group], key: str, title: str) -> _Drawn:
    """One measure over the steps: a panel a setting, a line a beta, the mean over seeds."""
    lines = [(group, _mean_curve(group, key)) for group in found]
    lines = [(group, curve) for group, curve in lines if curve[0]]
    if not lines:
        return None
    betas = sorted({group.beta for group, _ in lines})
    values = [value for _, curve in lines for value in curve[1]]
    # A loss at a large beta would flatten all others
    logarithmic = key == "rewards/margins" or (key == "loss" and max(values) > LARGE_LOSS)
    settings = _settings([group for group, _ in lines])
    columns = min(3, max(map(len, settings.values())))
    places = _places(settings, columns)
    rows = 1 + max(row for row, _ in places.values())
    with matplotlib.rc_context(PRINT):
        # cividis up to where it is still dark enough on white
        shades = [matplotlib.colormaps["cividis"](0.82 * i / max(1, len(betas) - 1)) for i in range(len(betas))]
        style = {beta: (shades[i], DASHES[i % len(DASHES)]) for i, beta in enumerate(betas)}
        figure = Figure(figsize=(WIDTH, 1.9 * rows + 0.5), layout="constrained")
        panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for group, curve in lines:
            colour, dashes = style[group.beta]
            panels[places[group.setting]].plot(*curve, color=colour, ls=dashes, lw=1.4)
        for setting, place in places.items():
            where = "no reference" if setting.reference == NONE else _plain(setting.reference)
            panels[place].set(title=f"{setting.parameterization}, {where}", xlabel="step")
            panels[place].tick_params(labelbottom=True)
            panels[place].xaxis.get_major_locator().set_params(integer=True)
        if logarithmic:
            panels[0, 0].set_yscale("symlog", linthresh=0.1)
            decades = [10.0**power for power in range(0, 13, 2)]  # a label at each would lie on the next one
            panels[0, 0].yaxis.set_major_locator(FixedLocator([*(-one for one in reversed(decades)), 0, *decades]))
            if min(values) > -1e-3:  # but for rounding
                panels[0, 0].set_ylim(bottom=0)
        for place in set(np.ndindex(rows, columns)) - set(places.values()):
            panels[place].axis("off")
        figure.supylabel(title.lower(), fontsize=9.5)
        handles = [Line2D([], [], color=style[b][0], ls=style[b][1], lw=1.6, label=f"β = {b:g}") for b in betas]
        figure.legend(handles=handles, loc="outside upper left", ncols=6)
    return (
        f"curves-{key.split('/')[-1]}",
        figure,
        f"{title} over the training steps, a panel for each parameterization and reference",
        f"{title} of the training batches over the steps; a line for each β, the mean over its seeds."
        + (" The axis is logarithmic beyond ±0.1." if logarithmic else ""),
    )


def _places(settings: dict[str, dict[Setting, list[Group]]], columns: int) -> dict[Setting, tuple[int, int]]:
    """(row, column) of each panel; a parameterization begins a row."""
    places, row = {}, 0
    for named in settings.values():
        for i, setting in enumerate(named):
            places[setting] = (row + i // columns, i % columns)
        row += -(-len(named) // columns)
    return places


def _mean_curve(group: Group, key: str) -> tuple[list[float], list[float]]:
    by_step: dict[float, list[float]] = {}
    for cell in group.cells:
        for record in cell.curves:
            if record.get(key) is not None:
                by_step.setdefault(record["step"], []).append(record[key])
    steps = sorted(by_step)
    return steps, [sum(by_step[step]) / len(by_step[step]) for step in steps]
