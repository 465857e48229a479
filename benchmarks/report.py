"""The suite's JSON as tables, figures and the page.

    python -m benchmarks.report BENCH.json --output DIR     # DIR/benchmarks.json, .png, .md
    python -m benchmarks.report BENCH.json --output docs    # docs/benchmarks.md has its tables between two markers
    python -m benchmarks.report docs/benchmarks.json --output docs    # the same, drawn and written again

benchmarks.json holds what the tables say: of every case its shape, of every contender its numbers or why it has none.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from fastdpo.plots import GREY, STYLE

from .group import BASELINE
from .looks import LOOKS

BEGIN, END = "<!-- tables: python -m benchmarks.report BENCH.json --output docs -->", "<!-- end of tables -->"
OURS = "fastdpo"


def condensed(raw: dict[str, Any]) -> dict[str, Any]:
    """benchmarks.json of pytest-benchmark's JSON."""
    run = raw["fastdpo"]
    cases: dict[str, Any] = {name: {**case, "contenders": {}} for name, case in run["cases"].items()}
    for line in raw["benchmarks"]:
        info = dict(line["extra_info"])
        case, name = cases[info.pop("case")], info.pop("contender")
        rounds = line["stats"]["data"]
        found = {
            "seconds": statistics.median(rounds),
            "rounds": rounds,
            **{k: v for k, v in info.items() if v is not None},
        }
        if name == BASELINE[case["entry"]]:
            case["baseline"] = found
        else:
            case["contenders"][name] = found
    for name, failed in run["not_timed"].items():
        for contender, why in failed.items():
            cases[name]["contenders"][contender] = {"failed": why}
    rest = {key: run[key] for key in ("machine", "versions", "seconds", "limit", "rates", "left_out")}
    return {"taken": raw["datetime"][:10], **rest, "cases": cases}


def rate(case: dict[str, Any], found: dict[str, Any]) -> float:
    """Of the rate that the case's own product (or copy) had in the same rounds: what the contender reached."""
    baseline = case["baseline"]["seconds"]
    shape = case["shape"]
    if case["entry"] == "hidden":
        done = 2.0 * shape["tokens"] * shape["vocab"] * shape["width"]
        return found["operations"] / found["seconds"] / (done / baseline)
    size = 2 if case["dtype"] == "bfloat16" else 4
    done = 2.0 * shape["tokens"] * shape["vocab"] * size
    return found["bytes"] / found["seconds"] / (done / baseline)


def summary(doc: dict[str, Any]) -> str:
    """Markdown: what was measured on what."""
    versions = ", ".join(f"{package} {version}" for package, version in doc["versions"].items())
    rates = doc["rates"]
    products = ", ".join(f"{value / 1e9:.0f} GFLOP/s {dtype}" for dtype, value in rates["products"].items())
    return (
        f"Taken {doc['taken']} on {doc['machine']}; {versions}. The machine: products {products}; copy "
        f"{rates['copy'] / 1e9:.1f} GB/s, read and written. Budget {doc['seconds']:.0f} s, limit of a run "
        f"{doc['limit']:.0f} s."
    )


def tables(doc: dict[str, Any]) -> str:
    """Markdown: a table a case, fastest first; then what was left out."""
    parts = [summary(doc)]
    for name, case in doc["cases"].items():
        shape = case["shape"]
        text = f"### {name}\n\nN = {shape['tokens']:,}, V = {shape['vocab']:,}, H = {shape['width']:,}"
        text += f" (left out: {shape['left_out']})" if shape["left_out"] else ""
        parts.append(f"{text}.\n\n{table(case)}")
    if doc["left_out"]:
        parts.append("### Left out\n\n" + "\n".join(f"- {name}: {why}" for name, why in doc["left_out"].items()))
    return "\n\n".join(parts)


def table(case: dict[str, Any]) -> str:
    hidden = case["entry"] == "hidden"
    models = ["TFLOP (model)", "of the product's rate", "logits held (model), MiB"]
    models = models if hidden else ["GB moved at least (model)", "of the copy's rate"]
    gradients = {"both": ["dX", "dW"], "frozen": ["dX"], "forward": []}[case["needs"]] if hidden else ["dlogits"]
    heads = ["", "seconds", "x fastdpo", "peak MiB", *models, "error of a logp", *(f"of {g}" for g in gradients)]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    ours = case["contenders"].get(OURS, {}).get("seconds")
    timed = {name: found for name, found in case["contenders"].items() if "seconds" in found}
    for name, found in sorted(timed.items(), key=lambda item: item[1]["seconds"]):
        times = f"{found['seconds'] / ours:.2f}" if ours else ""
        mib = f"{found['mib']:,.0f}" if "mib" in found else found.get("memory failed", "")
        cells = [name, f"{found['seconds']:.3g}" + (", alone" if found.get("alone") else ""), times, mib]
        if hidden:
            cells += [f"{found['operations'] / 1e12:.3g}", f"{rate(case, found):.0%}"]
            cells += [f"{found.get('logits_mib', 0):,.0f}"]
        else:
            cells += [f"{found['bytes'] / 1e9:.3g}", f"{rate(case, found):.0%}"]
        cells += [f"{error:.1e}" for error in found["errors"]]
        lines.append("| " + " | ".join(cells) + " |")
    for name, found in case["contenders"].items():
        if "failed" in found:
            lines.append(f"| {name} | {found['failed']} |" + " |" * (len(heads) - 2))
    alone = case["baseline"]["seconds"]
    times = f"{alone / ours:.2f}" if ours else ""
    lines.append(f"| *{BASELINE[case['entry']]}* | {alone:.3g} | {times} |" + " |" * (len(heads) - 3))
    return "\n".join(lines)


def picture(doc: dict[str, Any], path: Path) -> None:
    """Time and peak memory of every contender of every case, beside fastdpo's."""
    names = list(doc["cases"])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12, 1.6 + 0.42 * len(names)), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        titles = (("seconds", "Seconds, times fastdpo's"), ("mib", "Peak MiB above inputs and gradients"))
        for axes, (key, title) in zip(panels, titles, strict=True):
            for contender, (colour, marker) in LOOKS.items():
                points = []
                for row, name in enumerate(names):
                    contenders = doc["cases"][name]["contenders"]
                    value = contenders.get(contender, {}).get(key)
                    ours = contenders.get(OURS, {}).get("seconds")
                    if value is not None and (key == "mib" or ours):
                        # No memory of its own has no place on a logarithmic axis
                        points.append((max(value, 1.0) if key == "mib" else value / ours, row))
                # All contenders in one legend, drawn or not
                hollow = contender.startswith(OURS) and contender != OURS
                axes.plot(
                    *(zip(*points, strict=True) if points else ((), ())),
                    marker,
                    color=colour,
                    mfc="none" if hollow else colour,
                    mew=1.6,
                    ms=7,
                    ls="",
                    label=contender,
                    zorder=4 if contender == OURS else 3,
                )
            axes.set(title=title, xscale="log")
            axes.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
            axes.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:,g}"))
        panels[1].set_xlim(0.7, 1.3 * panels[1].get_xlim()[1])
        panels[0].axvline(1, color=GREY, lw=1)
        panels[0].set_yticks(range(len(names)), names)
        panels[0].set_ylim(len(names) - 0.5, -0.5)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
        figure.savefig(path, dpi=120)


def write_page(doc: dict[str, Any], page: Path) -> None:
    """The tables between the page's markers."""
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n\n{tables(doc)}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    return parser


def main() -> None:
    options = _parser().parse_args()
    raw = json.loads(options.bench.read_text(encoding="utf-8"))
    doc = raw if "cases" in raw else condensed(raw)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "benchmarks.json").write_text(json.dumps(doc, indent=1) + "\n", encoding="utf-8")
    picture(doc, options.output / "benchmarks.png")
    page = options.output / "benchmarks.md"
    if page.exists() and BEGIN in page.read_text(encoding="utf-8"):
        write_page(doc, page)
    else:
        page.write_text(tables(doc) + "\n", encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
