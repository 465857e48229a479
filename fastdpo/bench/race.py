"""Several contenders measured together: each checked, then all in turn, round after round. What fails is said."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import torch

from .gate import WrongResult
from .isolated import Failed, Outcome, run_here, verify, warm_up
from .measure import alternate, cost_on
from .providers import Batch

ROWS = 256  # of the product that is timed alone
SLOWER = 5  # times the first runner's check, or the limit of a run: what each of the others' may take


class Entry(NamedTuple):
    """Who runs on what."""

    contender: str  # of PROVIDERS
    kind: str  # of inputs: real, sampled, peaked, dense


class Runner(Protocol):
    """isolated.Contender, or Here."""

    def ready(self, timeout: float) -> float: ...
    def check(self, timeout: float) -> None: ...
    def run(self, limit: float | None = None) -> Outcome: ...
    def close(self) -> None: ...


class Here:
    """A contender in this process, for a GPU: its memory is counted apart, and a second context would take of it."""

    def __init__(self, name: str, batch: Batch, needs: str) -> None:
        self._name, self._batch, self._needs = name, batch, needs

    def ready(self, timeout: float) -> float:
        self._try(lambda: warm_up(self._name, self._batch, self._needs))
        return 0.0

    def check(self, timeout: float) -> None:
        self._try(lambda: verify(self._name, self._batch, self._needs))

    def run(self, limit: float | None = None) -> Outcome:
        found: list[Outcome] = []

        def once() -> None:
            cost = run_here(self._name, self._batch, self._needs)
            found.append(Outcome(cost.seconds, cost.mib))

        self._try(once)
        seconds = found[0].seconds
        if limit is not None and seconds is not None and seconds > limit:
            raise Failed(f"more than {limit:g} s")
        return found[0]

    def close(self) -> None:
        torch.cuda.empty_cache()

    def _try(self, call: Callable[[], None]) -> None:
        try:
            call()
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            raise Failed("memory") from None
        except WrongResult as error:
            raise Failed(f"refused, {error}") from None
        except Exception as error:  # a contender's own: the others go on
            said = (str(error).strip() or "no message").splitlines()[0]
            raise Failed(f"{type(error).__name__}: {said}") from None


def race(
    runners: Mapping[Entry, Runner],
    rounds: int,
    limit: float,
    seconds: float | None = None,
    progress: Callable[[str], None] = lambda what: None,
    loading: float = 60,
) -> tuple[dict[Entry, Outcome], int]:
    """Check each runner, run it once under `limit` seconds, then all in turn; (what each costs, rounds run).

    Args:
        rounds: seconds are medians of so many, without the first run of each; memory is the most of all runs.
        seconds: for all rounds together; there are fewer of them, at least one, where they would take longer. None: no
            limit.
        progress: told of each step.
        loading: seconds that each may take to be ready.
    """
    outcomes: dict[Entry, Outcome] = {}
    started = time.perf_counter()

    def fail(entry: Entry, failed: Failed) -> None:
        outcomes[entry] = Outcome(None, None, str(failed))
        runners[entry].close()

    for entry, runner in runners.items():
        progress(f"{entry.contender}: loading")
        try:
            runner.ready(loading)
        except Failed as failed:
            fail(entry, failed)
    # Only now, so that no process loads while another one is timed
    patience = loading
    for entry, runner in runners.items():
        if entry in outcomes:
            continue
        progress(f"{entry.contender}: checked, first run")
        try:
            begin = time.perf_counter()
            runner.check(patience)
            patience = min(patience, max(limit, SLOWER * (time.perf_counter() - begin)))
            outcomes[entry] = runner.run(limit)
        except Failed as failed:
            fail(entry, failed)
    good = [entry for entry, outcome in outcomes.items() if outcome.failed is None]
    one_round = sum(outcomes[entry].seconds or 0.0 for entry in good)
    if seconds is not None and one_round:
        rounds = max(1, min(rounds, int((seconds - (time.perf_counter() - started)) / one_round)))
    while good:
        try:
            calls: dict[str, Callable[[], object]] = {
                _key(entry): _call(entry, runners[entry], outcomes, progress) for entry in good
            }
            medians = alternate(calls, rounds, warmup=0, seconds_of=_own_clock)
            break
        except _Dropped as dropped:
            fail(dropped.entry, dropped.failed)
            good.remove(dropped.entry)
    for entry in good:
        outcomes[entry] = outcomes[entry]._replace(seconds=medians[_key(entry)])
    return {entry: outcomes[entry] for entry in runners}, rounds


def _key(entry: Entry) -> str:
    return f"{entry.contender}, {entry.kind}"


def _own_clock(call: Callable[[], object]) -> float:
    seconds = call()
    assert isinstance(seconds, float)
    return seconds


class _Dropped(Exception):
    def __init__(self, entry: Entry, failed: Failed) -> None:
        self.entry, self.failed = entry, failed


def _call(
    entry: Entry, runner: Runner, outcomes: dict[Entry, Outcome], progress: Callable[[str], None]
) -> Callable[[], float]:
    """A run that returns its seconds, as the runner timed it, and remembers the most memory."""

    def once() -> float:
        progress(f"{entry.contender}: timed")
        try:
            outcome = runner.run()
        except Failed as failed:
            raise _Dropped(entry, failed) from None
        assert outcome.seconds is not None and outcome.mib is not None
        outcomes[entry] = outcomes[entry]._replace(mib=max(outcome.mib, outcomes[entry].mib or 0.0))
        return outcome.seconds

    return once


def product_seconds(vocab: int, width: int, dtype: torch.dtype, device: torch.device) -> float:
    """Of the forward product alone, per token: the best of three, of ROWS tokens with a head `[vocab, width]`."""
    hidden = torch.full((ROWS, width), 0.01, dtype=dtype, device=device)
    weight = torch.full((vocab, width), 0.01, dtype=dtype, device=device)
    out = torch.empty((ROWS, vocab), dtype=dtype, device=device)

    def product() -> list[torch.Tensor]:
        torch.mm(hidden, weight.T, out=out)
        return []

    timed = cost_on(device)
    return min(timed(product).seconds for _ in range(4)) / ROWS
