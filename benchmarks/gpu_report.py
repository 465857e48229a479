"""The tables and the picture of benchmarks.gpu_static, from its JSON; and docs/gpu.md, from the JSON that is committed.

python -m benchmarks.gpu_report            docs/gpu_static.json -> the tables in docs/gpu.md, docs/gpu_static.png
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastdpo.plots import BLUE, GREY, ORANGE, STYLE

from .gpu_roofline import DEVICES

DOCS = Path(__file__).parent.parent / "docs"
BEGIN, END = "<!-- tables: python -m benchmarks.gpu_report -->", "<!-- end of tables -->"
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
LIMITS = {"memory": "memory", "issue": "issue", "special": "exp2"}
# Okabe and Ito
COLOURS = {
    "fastdpo": BLUE,
    "TRL chunked": ORANGE,
    "TRL from logits": "#D55E00",
    "Liger CE": "#CC79A7",
    "Liger selective": "#009E73",
}


def tables(found: dict[str, Any]) -> str:
    """All tables, as Markdown that can be read on a terminal."""
    parts = [
        ("### Instructions and bytes per logit", _loops(found)),
        ("### Estimates: what share of the memory bound can be reached", _estimates(found)),
        ("### Where another is ahead of fastdpo", _ahead(found)),
        ("### Bytes, counted", _bytes(found)),
        *((f"### Every kernel, {target}", _kernels(found, target)) for target in TARGETS),
    ]
    return "\n\n".join(f"{title}\n\n{text}" for title, text in parts)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown with its columns padded; all but the first three to the right."""
    rows = [header, *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [cell.ljust(w) if i < 3 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        return "| " + " | ".join(cells) + " |"

    rule = ["-" * w if i < 3 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join([line(rows[0]), "| " + " | ".join(rule) + " |", *map(line, rows[1:])])


def _sum(loops: Sequence[dict[str, float]], key: str) -> float:
    return sum(loop[key] for loop in loops)


def _loops(found: dict[str, Any]) -> str:
    """Contenders beside each other: instructions for each target, special functions, bytes, widths."""
    header = ["pass", "V", "contender", "bytes", *TARGETS, "MUFU, sm_90", "load bits", "store bits", "occupancy"]
    rows = []
    for row in found["passes"]:
        loops = row["loops"]
        hopper = loops["sm_90"]
        rows.append(
            [
                row["pass"],
                f"{row['vocab']:,}",
                row["contender"],
                f"{row['bytes']:.3f}",
                *(f"{_sum(loops[target], 'instructions'):.1f}" for target in TARGETS),
                f"{_sum(hopper, 'special'):.2f}",
                *(_span(hopper, key, str) for key in ("load_bits", "store_bits")),
                _span(hopper, "occupancy", "{:.0%}".format),
            ]
        )
    return _table(header, rows)


def _span(loops: Sequence[dict[str, float]], key: str, form: Any) -> str:
    """One value, or each of several loops'."""
    return " / ".join(dict.fromkeys(form(loop[key]) for loop in loops))


def _estimates(found: dict[str, Any]) -> str:
    """Share of the bound and what limits it on each device; time against fastdpo's."""
    header = ["pass", "V", "contender"]
    for device in DEVICES:
        header += [f"{device.name}: share", "limit", "time / fastdpo's"]
    ours = {(r["pass"], r["vocab"]): r["estimates"] for r in found["passes"] if r["contender"] == "fastdpo"}
    rows = []
    for row in found["passes"]:
        cells = [row["pass"], f"{row['vocab']:,}", row["contender"]]
        for device in DEVICES:
            one = row["estimates"][device.name]
            ratio = one["seconds"] / ours[row["pass"], row["vocab"]][device.name]["seconds"]
            cells += [f"{one['share']:.0%}", LIMITS[one["limit"]], f"{ratio:.2f}"]
        rows.append(cells)
    return _table(header, rows)


def _ahead(found: dict[str, Any]) -> str:
    """Every figure of the two tables above in which a contender is better: fastdpo's / its own."""
    rows = []
    ours = {(r["pass"], r["vocab"]): r for r in found["passes"] if r["contender"] == "fastdpo"}
    devices = {device.target: device.name for device in DEVICES}
    for row in found["passes"]:
        pair = (ours[row["pass"], row["vocab"]], row)
        figures: dict[str, list[str]] = {}
        for target in TARGETS:
            loops = [r["loops"][target] for r in pair]
            compared = {
                "bytes": ([r["bytes"] for r in pair], "{:.3f}", -1),
                "instructions": ([_sum(each, "instructions") for each in loops], "{:.1f}", -1),
                "special functions": ([_sum(each, "special") for each in loops], "{:.2f}", -1),
                "occupancy": ([min(loop["occupancy"] for loop in each) for each in loops], "{:.0%}", 1),
            }
            if target in devices:
                compared["share"] = ([r["estimates"][devices[target]]["share"] for r in pair], "{:.0%}", 1)
            for name, ((mine, other), form, better) in compared.items():
                texts = [form.format(mine), form.format(other)]
                ahead = (other - mine) * better > 0 and texts[0] != texts[1]
                figures.setdefault(name, []).append(" / ".join(texts) if ahead else "")
        for name, cells in figures.items():
            if any(cells):
                rest = [""] if len(cells) < len(TARGETS) else []  # no device's estimate for sm_80
                rows.append([row["pass"], f"{row['vocab']:,}", row["contender"], name, *rest, *cells])
    return _table(["pass", "V", "contender", "figure", *TARGETS], rows)


def _bytes(found: dict[str, Any]) -> str:
    header = ["contender", "pass", "V", "logits loaded", "in sectors", "stored", "other loaded", "stored", "sum"]
    keys = ("loaded", "sectors", "stored", "other_loaded", "other_stored", "bytes")
    rows = [
        [r["contender"], r["pass"], f"{r['vocab']:,}", *(f"{r[key]:.3f}" if key in r else "" for key in keys)]
        for r in found["bytes"]
    ]
    return _table(header, rows)


def _kernels(found: dict[str, Any], target: str) -> str:
    header = ["contender", "kernel", "V", "registers", "spills", "shared", "load", "store", "instr.", "special"]
    header += ["warps", "programs", "occupancy"]
    rows = []
    for k in found["kernels"]:
        if k["target"] == target:
            name = k["pass"] if k["columns"] == 1 else f"{k['pass']} ({k['columns']:.0%} of the columns)"
            numbers = [str(k.get(key, "–")) for key in ("registers", "spills", "shared", "load_bits", "store_bits")]
            numbers += [f"{k[key]:.2f}" if key in k else "–" for key in ("instructions_per_logit", "special_per_logit")]
            numbers += [str(k["warps"]), str(k["programs"]), f"{k['occupancy']:.0%}"]
            rows.append([k["contender"], name, f"{k['vocab']:,}" if k["vocab"] else "any", *numbers])
    return _table(header, rows)


_Rows = dict[tuple[str, str], dict[str, Any]]  # by pass and contender


def picture(found: dict[str, Any], path: Path) -> None:
    """Instructions per logit on sm_90, and the estimated share of the memory bound on each device, as one PNG."""
    rows = {(r["pass"], r["contender"]): r for r in found["passes"] if r["vocab"] == 131072}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12, 5.4), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
        _draw_instructions(left, rows)
        _draw_shares(right, rows)
        figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=len(COLOURS))
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)


def _draw_instructions(axes: Axes, rows: _Rows) -> None:
    names = ("forward", "forward, all statistics", "backward")
    bars = [(n, c) for n in names for c in COLOURS if (n, c) in rows]
    values = [_sum(rows[bar]["loops"]["sm_90"], "instructions") for bar in bars]
    places = [i + 0.7 * names.index(n) for i, (n, _) in enumerate(bars)]  # a gap between the passes
    drawn = axes.barh(places, values, color=[COLOURS[c] for _, c in bars])
    axes.bar_label(drawn, fmt="%.1f", padding=3, fontsize=9)
    axes.set_yticks(places, [f"{n}: {c}" if i == 0 or bars[i - 1][0] != n else c for i, (n, c) in enumerate(bars)])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set(title="Instructions per logit, compiled for sm_90, V = 131,072", xlim=(0, max(values) * 1.12))


def _draw_shares(axes: Axes, rows: _Rows) -> None:
    groups = [(name, device.name) for name in ("forward", "forward and backward") for device in DEVICES]
    width = 0.8 / len(COLOURS)
    for i, (contender, colour) in enumerate(COLOURS.items()):
        mine = [(place, rows.get((name, contender)), device) for place, (name, device) in enumerate(groups)]
        at = [place + (i - (len(COLOURS) - 1) / 2) * width for place, row, _ in mine if row]
        shares = [100 * row["estimates"][device]["share"] for _, row, device in mine if row]
        axes.bar(at, shares, width, color=colour, label=contender)
    axes.axhline(100, color=GREY, lw=1, ls=":")
    axes.axvline(len(DEVICES) - 0.5, color=GREY, lw=0.8)
    axes.set_xticks(
        range(len(groups)), [f"{device}\n{name.replace('and ', 'and' + chr(10))}" for name, device in groups]
    )
    axes.tick_params(axis="x", labelsize=8.5)
    axes.grid(visible=False, axis="x")
    axes.set(title="ESTIMATE: share of the memory bound that can be reached, %", ylim=(0, 105))


def page(text: str, found: dict[str, Any]) -> str:
    """docs/gpu.md with its tables made anew."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{tables(found)}\n\n{END}{rest.split(END)[1]}"


def main() -> None:
    found = json.loads((DOCS / "gpu_static.json").read_text(encoding="utf-8"))
    path = DOCS / "gpu.md"
    path.write_text(page(path.read_text(encoding="utf-8"), found), encoding="utf-8")
    picture(found, DOCS / "gpu_static.png")


if __name__ == "__main__":
    main()
