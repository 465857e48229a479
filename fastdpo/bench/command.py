"""`fastdpo bench`: what fastdpo's head saves on this machine against what is installed.

A table on the terminal; in the output folder bench.png (time and peak memory side by side) and bench.json (everything).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import backend
from ..system import installed_version
from . import report
from .arguments import DTYPES, check_memory, device_of, head_of, parser
from .isolated import LOADING, Contender
from .measure import machine
from .providers import PACKAGES, PROVIDERS, Batch
from .race import Entry, Here, Runner, product_seconds, race
from .work import Work, work_of

DEFAULT = tuple(name for name in PROVIDERS if name != "fastdpo exact, kept")
# Whose cost depends on how peaked the softmax is. CCE skips blocks of small gradients in its Triton kernels alone
PEAKED_MATTERS = {"cpu": ("fastdpo",), "cuda": ("fastdpo", "CCE")}
SECONDS = 105.0  # of everything, where the user does not say how many tokens
RUNNING = 50.0  # of them for the runs; the rest for loading and checking
PRODUCTS = 6  # forward products that a run takes, about, as a mean over the contenders
RUNS = 3  # of each contender that are planned for, where tokens are chosen
TOKENS = (256, 8192)  # chosen: fewer are no training step, more show nothing else
GRADIENTS = {
    "both": "gradients of hidden and weight",
    "frozen": "gradient of hidden alone (frozen head)",
    "forward": "no gradients",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report. Returns 0, or 1, with one line on stderr, where there are no numbers of fastdpo."""
    options = parser().parse_args(argv)
    try:
        found = bench(options)
    except (ValueError, OSError) as error:
        print(f"fastdpo bench: {error}", file=sys.stderr)
        return 1
    failed = [point for point in found["points"] if point["contender"] == report.FAST and point["failed"]]
    if failed:
        print(f"fastdpo bench: FAILED: fastdpo: {failed[0]['failed']}", file=sys.stderr)
    return 1 if failed else 0


def bench(options: argparse.Namespace) -> dict[str, Any]:
    """What the options say; prints the table and returns what is in bench.json.

    Raises:
        ValueError, OSError: options that do not go together, or a model or data that cannot be read.
    """
    from .gpu import ceilings, describe
    from .picture import draw

    started = time.perf_counter()
    device, dtype, head = device_of(options.device), DTYPES[options.dtype], head_of(options)
    check_memory(options, head)
    gpu = device.type == "cuda"
    present, left_out = installed(dict.fromkeys([report.FAST, *(options.contenders or DEFAULT)]))
    backend.load("triton" if gpu else "cpu")  # built on first use, which can take a minute
    product = product_seconds(head.vocab, head.width, dtype, device)
    fitting = int(RUNNING / ((len(present) + 1) * RUNS * PRODUCTS * product)) // 64 * 64
    work = work_of(options, head, options.tokens or min(max(fitting, TOKENS[0]), TOKENS[1]), dtype, device)
    first, *others = work.batches
    tokens = len(work.batches[first].labels)
    matters = PEAKED_MATTERS[device.type]
    entries = [Entry(name, kind) for name in present for kind in (first, *(others if name in matters else ()))]
    on = describe(device) if gpu else machine()
    what = f"{tokens:,} tokens, V = {head.vocab:,}, H = {head.width:,}, {options.dtype}, {GRADIENTS[options.needs]}"
    print(f"{what}\n{work.words}\n{on}", flush=True)
    reached = ceilings(dtype, device) if gpu else None
    # A budget is for what is chosen here, not for what the user asked for
    budget = None if options.tokens else SECONDS - (time.perf_counter() - started)
    outcomes, rounds = _race(entries, work, options, device, budget)

    summary = report.sentence(outcomes, left_out)
    print(f"\n{report.table(outcomes, tokens, left_out)}")
    print(
        f"time: medians of {rounds} round{'s' * (rounds > 1)}, all in turn; "
        f"the forward product alone: {report.duration(product * tokens)}\n"
        "peak memory: above inputs and returned gradients, "
        + ("of torch's allocator" if gpu else "each in a process of its own")
    )
    if reached is not None:
        shape = report.Shape(tokens, head.vocab, head.width, dtype.itemsize, options.needs)
        print(f"\n{report.achieved(outcomes, shape, reached)}")
    for note in work.notes:
        print(f"note: {note}")
    output: Path = options.output
    draw(outcomes, f"{what}\n{textwrap.fill(work.words, 150)}\n{on}", output / "bench.png")
    found = {
        "machine": on,
        "versions": _versions(),
        "settings": {
            **{key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()},
            **{"tokens": tokens, "vocab": head.vocab, "hidden": head.width, "device": str(device), "rounds": rounds},
        },
        "inputs": work.words,
        "notes": work.notes,
        "product_seconds": product * tokens,
        "ceilings": None if reached is None else reached._asdict(),
        "points": [{**entry._asdict(), **outcome._asdict()} for entry, outcome in outcomes.items()],
        "left_out": left_out,
        "summary": summary,
    }
    (output / "bench.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"\n{output / 'bench.png'}, {output / 'bench.json'}\n\n{textwrap.fill(summary, report.WIDTH)}")
    return found


def installed(names: Iterable[str]) -> tuple[list[str], dict[str, str]]:
    """(contenders that can run, why the others cannot, with what to do about it)."""
    present: list[str] = []
    left_out: dict[str, str] = {}
    for name in names:
        if name in PACKAGES and installed_version(PACKAGES[name]) is None:
            left_out[name] = f"not installed: pip install {PACKAGES[name]}"
        else:
            present.append(name)
    return present, left_out


def _race(
    entries: list[Entry], work: Work, options: argparse.Namespace, device: torch.device, budget: float | None
) -> Any:
    from tqdm import tqdm

    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        bar = stack.enter_context(tqdm(total=len(entries) * (options.rounds + 2), ncols=80, leave=False))

        def progress(what: str) -> None:
            bar.set_description_str(f"{what:<34}")
            bar.update()

        runners: dict[Entry, Runner] = {}
        for entry in entries:
            runners[entry] = _runner(entry, work.batches, options.needs, device, folder)
            stack.callback(runners[entry].close)
        return race(runners, options.rounds, options.limit, budget, progress, 2 * LOADING)


def _runner(entry: Entry, batches: dict[str, Batch], needs: str, device: torch.device, folder: Path) -> Runner:
    if device.type == "cuda":
        batch = batches[entry.kind]
        hidden, weight, labels, grads = (x.to(device) for x in (batch.hidden, batch.weight, batch.labels, batch.grads))
        batches[entry.kind] = Batch(hidden, weight, labels, batch.lengths, grads)  # once for all contenders
        return Here(entry.contender, batches[entry.kind], needs)
    path = folder / f"{entry.kind}.pt"
    if not path.exists():
        torch.save(tuple(batches[entry.kind]), path)
    return Contender(entry.contender, path, needs)


def _versions() -> dict[str, str]:
    from ..doctor import versions

    return dict(versions()) | {package: installed_version(package) or "not installed" for package in PACKAGES.values()}


if __name__ == "__main__":
    sys.exit(main())
