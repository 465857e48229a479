"""Cost as the work grows: seconds and memory over tokens N and vocabulary V, for each contender, real and dense.

    python -m benchmarks.growth --model FOLDER --data PAIRS.jsonl --output DIR [--limit 50] [--contenders NAME ...]

Hidden states of real pairs, bf16, gradients of hidden and weight; a smaller V is the first rows of the model's head.
Dense: random hidden and weight, whose softmax is not sparse. Each point in a process of its own, which may run --limit
seconds and use the machine's memory; what does not finish there is not tried with more tokens, nor drawn.
N varies at the largest V, V at N = 2,048. DIR/growth.json, DIR/growth.png; points already in the JSON are not measured
again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure

from fastdpo.bench.inputs import dense_batch, real_batch
from fastdpo.bench.isolated import run_alone
from fastdpo.bench.measure import machine
from fastdpo.bench.providers import PROVIDERS, Batch
from fastdpo.plots import STYLE

from .looks import LOOKS

TOKENS = (512, 2048, 8192, 32768)
VOCABULARIES = (32768, 65536, 131072, 262144)
CASES = [(tokens, VOCABULARIES[-1]) for tokens in TOKENS] + [(2048, vocab) for vocab in VOCABULARIES[:-1]]
DENSE = ("fastdpo", "fastdpo exact")  # the others do not look at the softmax
CONTENDERS = ("eager", "TRL 1.16", "Liger", "CCE", "fastdpo", "fastdpo exact")


def inputs_of(kind: str, vocab: int, real: Path) -> Path:
    """A file with the batch of a kind and V beside `real`, that of the whole head; made once."""
    path = real.with_name(f"{real.stem}-{kind}-{vocab}.pt")
    if not path.exists():
        whole = Batch(*torch.load(real, weights_only=True))
        batch = whole._replace(weight=whole.weight[:vocab].clone(), labels=whole.labels % vocab)
        torch.save(tuple(dense_batch(batch) if kind == "dense" else batch), path)
    return path


def measure(options: argparse.Namespace, inputs: Path, path: Path) -> list[dict[str, Any]]:
    from tqdm import tqdm

    found: list[dict[str, Any]] = json.loads(path.read_text())["points"] if path.exists() else []
    cases = [(name, "real") for name in options.contenders] + [(n, "dense") for n in DENSE if n in options.contenders]
    grid = [(case, vocab, tokens) for case in cases for tokens, vocab in CASES]
    for (name, kind), vocab, tokens in tqdm(grid, unit="point"):
        key = {"contender": name, "kind": kind, "vocab": vocab, "tokens": tokens}
        if any(key.items() <= old.items() for old in found):
            continue
        stopped = [
            old
            for old in found
            if (old["contender"], old["kind"]) == (name, kind)
            and "failed" in old
            and old["vocab"] <= vocab
            and old["tokens"] <= tokens
        ]
        if stopped:
            result = {"failed": stopped[0]["failed"]}
        else:
            batch = inputs_of(kind, vocab, inputs)
            outcome = run_alone(name, batch, tokens=tokens, limit=options.limit)
            result = {key: value for key, value in outcome._asdict().items() if value is not None}
        found.append(key | result)
        path.write_text(json.dumps({"machine": machine(), "limit": options.limit, "points": found}, indent=1) + "\n")
    return found


def table(points: list[dict[str, Any]]) -> str:
    """Markdown: a row for each contender, kind and V; seconds and MiB for each N measured."""
    lines = ["| contender | V | " + " | ".join(f"N = {n:,}" for n in TOKENS) + " |", "|---|---|" + "---|" * len(TOKENS)]
    rows: dict[tuple[str, str, int], dict[int, str]] = {}
    for p in points:
        cell = p["failed"] if "failed" in p else f"{p['seconds']:.2f} s, {p['mib']:,.0f} MiB"
        rows.setdefault((p["contender"], p["kind"], p["vocab"]), {})[p["tokens"]] = cell
    for (name, kind, vocab), cells in rows.items():
        title = name if kind == "real" else f"{name}, dense"
        lines.append(f"| {title} | {vocab:,} | " + " | ".join(cells.get(n, "") for n in TOKENS) + " |")
    return "\n".join(lines)


def picture(points: list[dict[str, Any]], path: Path) -> None:
    panels = (("tokens", "vocab", VOCABULARIES[-1], "N tokens, V = 262,144"), ("vocab", "tokens", 2048, "V, N = 2,048"))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 8), layout="constrained")
        for row, (x, fixed, value, label) in zip(figure.subplots(2, 2), panels, strict=True):
            for axes, (y, title) in zip(row, (("seconds", "Seconds"), ("mib", "Peak MiB")), strict=True):
                for name in CONTENDERS:
                    for kind, style in (("real", "o-"), ("dense", "s:")):
                        mine = [p for p in points if (p["contender"], p["kind"], p[fixed]) == (name, kind, value)]
                        mine = sorted((p for p in mine if "failed" not in p), key=lambda p: p[x])
                        if mine:
                            title_of = name if kind == "real" else f"{name}, dense"
                            axes.loglog(
                                [p[x] for p in mine], [p[y] for p in mine], style, color=LOOKS[name][0], label=title_of
                            )
                ticks = TOKENS if x == "tokens" else VOCABULARIES
                axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], minor=False)
                axes.set_xticks([], minor=True)
                axes.set(title=title, xlabel=label)
        figure.axes[0].legend(fontsize=8)
        figure.savefig(path, dpi=120)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--limit", type=float, default=50)
    parser.add_argument("--contenders", nargs="*", default=list(CONTENDERS), choices=list(PROVIDERS))
    return parser


def main() -> None:
    options = _parser().parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    inputs = options.output / "inputs.pt"
    if not inputs.exists():
        torch.save(tuple(real_batch(options.model, options.data, 0, 1024, TOKENS[-1])), inputs)
    points = measure(options, inputs, options.output / "growth.json")
    print(machine())
    print(table(points))
    picture(points, options.output / "growth.png")
    print(options.output / "growth.png")


if __name__ == "__main__":
    main()
