"""docs/losses.png and the table in docs/losses.md, from fastdpo.losses.LOSSES: `python docs/make_losses.py`."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor

from fastdpo.losses import LOSSES, Loss, LossOptions, Pairs
from fastdpo.losses.table import PAIRED, REFERENCE, SEQUENCE
from fastdpo.plots import BLUE, GREY, ORANGE, STYLE

HERE = Path(__file__).parent
BEGIN, END = "<!-- table: python docs/make_losses.py -->", "<!-- end of table -->"
COLUMNS = 5
MEAN_LOGP = -3.5  # of the two sides, about which the margin opens
SMOOTHED = {"robust": 0.1, "exo_pair": 1e-3}  # label_smoothing of those that are nothing without it


def table() -> str:
    """The losses as a Markdown table."""
    lines = ["| `loss_type` | loss of a pair | from | its own options |", "|---|---|---|---|"]
    for name, row in LOSSES.items():
        equation = " ".join((row.function.__doc__ or "").split()).replace("|", "\\|")
        lines.append(f"| `{name}` | `{equation}`{_defaults(row)} | {row.paper or '–'} | {_options(row)} |")
    return "\n".join(lines)


def _defaults(row: Loss) -> str:
    """What differs from other rows before and after the function."""
    found = ["means over tokens"] if row.length_normalize else []
    found += [f"gamma = {row.gamma:g}"] if row.gamma else []
    found += [f"plus {row.alpha:g} NLL"] if row.alpha else []
    return f"; {', '.join(found)}" if found else ""


def _options(row: Loss) -> str:
    own = [f"`{name}`" for name in sorted(row.uses - SEQUENCE - {"f_alpha_divergence_coef"})]
    if not row.uses >= REFERENCE:
        own.append("no reference")
    if not row.uses >= PAIRED:
        own.append("nothing per pair")
    return ", ".join(own) or "–"


def write_table() -> None:
    page = HERE / "losses.md"
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")


def curve(name: str, margin: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and slope of single pairs of `margin` `[M]`, at beta 1: r_w = margin/2, r_l = -margin/2, one token each."""
    row = LOSSES[name]
    margin = margin.clone().requires_grad_()
    logps = torch.cat([MEAN_LOGP + margin / 2, MEAN_LOGP - margin / 2])
    ref = torch.full_like(logps, MEAN_LOGP) if "ref_logps" in row.uses else None
    # One pair at a time: some losses look at the whole batch
    losses = []
    for i in range(len(margin)):
        both = [i, i + len(margin)]
        pairs = Pairs.split(logps[both], None if ref is None else ref[both], torch.ones(2))
        options = LossOptions(beta=1.0, label_smoothing=SMOOTHED.get(name, 0.0), gamma=row.gamma)  # without the NLL
        losses.append(row.function(pairs, options)[0])
    loss = torch.stack(losses)
    (slope,) = torch.autograd.grad(loss.sum(), margin)
    return loss.detach(), slope


def draw() -> None:
    margin = torch.linspace(-6, 6, 241)
    rows = -(-len(LOSSES) // COLUMNS)
    with matplotlib.rc_context({**STYLE, "axes.titlesize": 10.5, "font.size": 9}):
        figure = Figure(figsize=(12, 2.35 * rows + 0.6), layout="constrained")
        axes = figure.subplots(rows, COLUMNS, sharex=True, sharey=True).flat
        plain, _ = curve("sigmoid", margin)
        for (name, row), ax in zip(LOSSES.items(), axes, strict=False):
            loss, slope = curve(name, margin)
            if name != "sigmoid":
                ax.plot(margin, plain, color=GREY, lw=1, alpha=0.5)
            ax.plot(margin, loss, color=BLUE, lw=2)
            ax.plot(margin, slope, "--", color=ORANGE, lw=1.6)
            ax.axhline(0, color="black", lw=0.6)
            title = f"{name}, eps = {SMOOTHED[name]:g}" if name in SMOOTHED else name
            title += f", gamma = {row.gamma:g}" if row.gamma else ""
            ax.set(title=title, ylim=(-2.5, 6), xlim=(-6, 6), xticks=(-6, -3, 0, 3, 6))
        for ax in axes:  # what the losses left over
            ax.axis("off")
        styles = (
            ("loss", "-", BLUE, 2.0, 1.0),
            ("slope", "--", ORANGE, 1.6, 1.0),
            ("sigmoid's loss", "-", GREY, 1.0, 0.5),
        )
        lines = [
            matplotlib.lines.Line2D([], [], ls=ls, color=colour, lw=lw, alpha=alpha, label=label)
            for label, ls, colour, lw, alpha in styles
        ]
        figure.legend(handles=lines, loc="outside upper left", ncols=3)
        figure.supxlabel("margin h = r_w - r_l, at beta = 1, with r_w = h/2 and r_l = -h/2", fontsize=10)
        figure.savefig(HERE / "losses.png", dpi=110)


if __name__ == "__main__":
    write_table()
    draw()
