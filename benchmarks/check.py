"""Has fastdpo lost speed? Ratios of seconds, contender to fastdpo, beside the committed ones: `make bench-check`.

    python -m benchmarks.check [--committed docs/benchmarks.json] [--allowed 0.2] [--seconds 240]

Ratios and not seconds, since machines differ. The cases with check=True in cases.py, at the committed shapes, all
contenders in turn. A case that has lost is measured once more, and the better ratio counts. Exit code 1 for a ratio
that lost more than --allowed, or that was not measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .cases import CASES, Case, Shape
from .group import measure
from .report import OURS
from .session import warm_up

Ratios = dict[tuple[str, str], float]  # (case, contender): its seconds, times fastdpo's


def ratios(doc: dict[str, Any]) -> Ratios:
    """Of benchmarks.json: contenders that ran in turn with fastdpo."""
    found = {}
    for name, case in doc["cases"].items():
        ours = case["contenders"].get(OURS, {}).get("seconds")
        for contender, result in case["contenders"].items():
            theirs = not contender.startswith(OURS) and not result.get("alone")
            if ours and theirs and "seconds" in result:
                found[name, contender] = result["seconds"] / ours
    return found


def losses(committed: Ratios, measured: Ratios, allowed: float) -> dict[tuple[str, str], str]:
    """What has lost more than `allowed` (a share), or was not measured: in words."""
    found = {}
    for key, before in committed.items():
        now = measured.get(key)
        if now is None:
            found[key] = f"{key[0]}: {key[1]}: was {before:.2f} x fastdpo's seconds, not measured now"
        elif now < before * (1 - allowed):
            found[key] = (
                f"{key[0]}: {key[1]}: was {before:.2f} x fastdpo's seconds, now {now:.2f} x: a loss of "
                f"{1 - now / before:.0%}, {allowed:.0%} allowed"
            )
    return found


def measured_ratios(case: Case, committed: dict[str, Any], seconds: float) -> Ratios:
    """Of one case, now, at its committed shape."""
    others = [contender for name, contender in ratios({"cases": {case.name: committed}})]
    results = measure(case, Shape(**committed["shape"]), seconds, limit=seconds, names=[OURS, *others], memory=False)
    timed = {name: {"seconds": result.seconds} for name, result in results.items() if result.rounds}
    return ratios({"cases": {case.name: {"contenders": timed}}}) if OURS in timed else {}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--committed", type=Path, default=Path("docs/benchmarks.json"))
    parser.add_argument("--allowed", type=float, default=0.2)
    parser.add_argument("--seconds", type=float, default=240, help="of all cases; a second measurement comes on top")
    return parser


def main() -> None:
    parser = _parser()
    options = parser.parse_args()
    if not 0 <= options.allowed < 1:
        parser.error(f"--allowed {options.allowed:g}: expected a share from 0 to below 1")
    if not options.committed.is_file():
        parser.error(f"--committed {options.committed}: no such file, expected a benchmarks.json of benchmarks.report")
    doc = json.loads(options.committed.read_text(encoding="utf-8"))
    checked = [case for case in CASES if case.check]
    cases = [case for case in checked if case.name in doc["cases"]]
    for case in checked:
        if case not in cases:
            print(f"{case.name}: left out, {options.committed} has no numbers of it")
    if not cases:
        sys.exit(f"{options.committed}: none of the checked cases is in it")
    doc["cases"] = {case.name: doc["cases"][case.name] for case in cases}
    before, now = ratios(doc), {}
    lost: dict[tuple[str, str], str] = {}
    warm_up()
    for attempt in ("", ", again"):
        again = [case for case in cases if not attempt or any(name == case.name for name, _ in lost)]
        for case in tqdm(again, unit="case", desc=f"measuring{attempt}"):
            found = measured_ratios(case, doc["cases"][case.name], options.seconds / len(cases))
            now |= {key: max(ratio, now.get(key, 0.0)) for key, ratio in found.items()}
        lost = losses(before, now, options.allowed)
    for key, ratio in before.items():
        print(f"{key[0]:50} {key[1]:15} committed {ratio:7.2f} x, now {now.get(key, float('nan')):7.2f} x")
    if lost:
        sys.exit("\n".join(lost.values()))


if __name__ == "__main__":
    main()
