"""What `fastdpo bench` found, as text of at most 100 columns: the table, achieved rates, and one sentence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from .gpu import Ceilings
from .isolated import Outcome
from .race import Entry

WIDTH = 100
FAST = "fastdpo"
# What the others are compared with: the first that has numbers. In words, for the sentence
BASELINES = {"TRL 1.16": "what TRL runs", "eager": "logits and log_softmax in PyTorch"}
PASSES = {"forward": 1, "frozen": 2, "both": 3}  # products of an exact head, 2 N V H each


class Shape(NamedTuple):
    """Of the work."""

    tokens: int
    vocab: int
    width: int
    itemsize: int  # bytes of an element
    needs: str

    def flop(self) -> float:
        """Of an exact head."""
        return 2.0 * PASSES[self.needs] * self.tokens * self.vocab * self.width

    def bytes(self) -> float:
        """That no head can avoid: hidden and weight read once, their gradients written once."""
        hidden, weight = self.tokens * self.width, self.vocab * self.width
        written = {"forward": 0, "frozen": hidden, "both": hidden + weight}[self.needs]
        return float(self.itemsize * (hidden + weight + written))


def baseline(outcomes: Mapping[Entry, Outcome]) -> Entry | None:
    """The first of BASELINES that has numbers; else the first of the others that has."""
    good = [e for e, outcome in outcomes.items() if outcome.failed is None and not e.contender.startswith(FAST)]
    return next((e for name in BASELINES for e in good if e.contender == name), good[0] if good else None)


def title(entry: Entry, outcomes: Mapping[Entry, Outcome]) -> str:
    """The contender; with the kind of inputs where it ran on several."""
    several = sum(other.contender == entry.contender for other in outcomes) > 1
    return f"{entry.contender}, {entry.kind}" if several else entry.contender


def duration(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if abs(seconds) < 0.1 else f"{seconds:.2f} s"


def table(outcomes: Mapping[Entry, Outcome], tokens: int, left_out: Mapping[str, str]) -> str:
    """A line for each contender, and one for each that was left out, with what to do about it."""
    base = baseline(outcomes)
    first = None if base is None else outcomes[base]
    lines = [f"{'':26}{'time':>10}{'faster':>9}{'peak memory':>14}{'of it':>7}{'tokens/s':>11}  saved per step"]
    for entry, outcome in outcomes.items():
        line = f"{title(entry, outcomes):26}"
        if outcome.seconds is None or outcome.mib is None:
            lines += [f"{line}  {_words(outcome)}"[:WIDTH]]
            continue
        line += f"{duration(outcome.seconds):>10}"
        line += f"{first.seconds / outcome.seconds:>7.1f} x" if first and first.seconds else f"{'':9}"
        line += f"{outcome.mib:>10,.0f} MiB"
        line += f"{outcome.mib / first.mib:>7.0%}" if first and first.mib else f"{'':7}"
        line += f"{tokens / outcome.seconds:>11,.0f}"
        if first and first.seconds and first.mib and entry != base:
            line += f"  {duration(first.seconds - outcome.seconds)}, {round(first.mib - outcome.mib):,} MiB"
        lines.append(line)
    if base is not None:
        lines.append(f"faster, of it, saved: against {title(base, outcomes)}")
    lines += [f"{name:26}  {why}" for name, why in left_out.items()]
    return "\n".join(lines)


def achieved(outcomes: Mapping[Entry, Outcome], shape: Shape, ceilings: Ceilings) -> str:
    """Useful work per second, and its share of what the device was measured to reach."""
    lines = [
        f"{'':26}{'TFLOP/s':>10}{'of the device':>15}{'GB/s':>10}{'of the device':>15}",
        f"{'the device, measured':26}{ceilings.flop_per_second / 1e12:>10.1f}{'':15}"
        f"{ceilings.bytes_per_second / 1e9:>10.0f}",
    ]
    for entry, outcome in outcomes.items():
        if outcome.seconds is None:
            continue
        flop, moved = shape.flop() / outcome.seconds, shape.bytes() / outcome.seconds
        lines.append(
            f"{title(entry, outcomes):26}{flop / 1e12:>10.1f}{flop / ceilings.flop_per_second:>15.0%}"
            f"{moved / 1e9:>10.1f}{moved / ceilings.bytes_per_second:>15.0%}"
        )
    lines.append("FLOP of an exact head (what is left out counts as done); bytes of its inputs and gradients, once")
    return "\n".join(lines)


def sentence(outcomes: Mapping[Entry, Outcome], left_out: Mapping[str, str]) -> str:
    """What it comes to: against what TRL runs, if that was measured, and against the fastest of the others."""
    base = baseline(outcomes)
    fast = {e.kind: o for e, o in outcomes.items() if e.contender == FAST}
    if base is None or any(outcome.failed for outcome in fast.values()):
        return "There is nothing to compare fastdpo's head with on this machine."
    first = outcomes[base]
    assert first.seconds and first.mib is not None
    shares = {kind: "{} of the time and {} of the memory".format(*_shares(o, first)) for kind, o in fast.items()}
    than = BASELINES.get(base.contender, f"{base.contender}'s")
    kinds = list(shares)
    text = f"On this machine fastdpo's head takes {shares[kinds[0]]} of {than}"
    if len(kinds) > 1:
        text += f" where the softmax is {kinds[0]}, as a trained model's is, "
        text += f"and {shares[kinds[1]]} where it is {kinds[1]}"
    others = {e: o.seconds for e, o in outcomes.items() if o.seconds and not e.contender.startswith(FAST)}
    best = min(others, key=others.__getitem__)
    if best != base:
        alike = {kind: Entry(best.contender, kind) for kind in kinds}  # on the same inputs, where it has a time
        found = [
            "{} and {}".format(*_shares(fast[kind], outcomes[entry if entry in others else best]))
            for kind, entry in alike.items()
        ]
        text += f"; of those of the fastest other, {best.contender}, {' or '.join(found)}"
    missing = next((name for name in BASELINES if name in left_out or _failed(name, outcomes)), None)
    if missing == "TRL 1.16":
        text += "; TRL's was not measured, as said above"
    return f"{text}."


def _shares(outcome: Outcome, of: Outcome) -> tuple[str, str]:
    """Of another's time and memory."""
    assert outcome.seconds is not None and outcome.mib is not None and of.seconds and of.mib is not None
    return f"{outcome.seconds / of.seconds:.0%}", f"{outcome.mib / of.mib:.0%}" if of.mib > 0 else "all"


def _failed(name: str, outcomes: Mapping[Entry, Outcome]) -> bool:
    return any(entry.contender == name and outcome.failed for entry, outcome in outcomes.items())


def _words(outcome: Outcome) -> str:
    return "out of memory" if outcome.failed == "memory" else str(outcome.failed).split(";")[0]
