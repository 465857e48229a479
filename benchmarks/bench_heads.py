"""The timed suite, for pytest-benchmark: a group for each case, a line for each contender. `make bench`.

The contenders of a case run in turn (group.py), which pytest-benchmark, one test after the other, cannot do; so its
clock here is a tape: the seconds of each round as they were measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from .cases import CASES, Case
from .group import BASELINE, contenders

LINES = [(case, name) for case in CASES for name in (BASELINE[case.entry], *contenders(case))]


class Tape:
    """A clock that pytest-benchmark reads twice a round."""

    __name__ = "tape"

    def __init__(self) -> None:
        self.readings: Iterator[float] = iter(())

    def load(self, rounds: list[float]) -> None:
        self.readings = iter([reading for seconds in rounds for reading in (0.0, seconds)])

    def __call__(self) -> float:
        return next(self.readings)


TAPE = Tape()


@pytest.mark.filterwarnings("ignore:Benchmark fixture was not used")  # by what has no time
@pytest.mark.benchmark(timer=TAPE)
@pytest.mark.parametrize(("case", "name"), LINES, ids=[f"{case.name}: {name}" for case, name in LINES])
def test_head(case: Case, name: str, benchmark: Any, session: Any) -> None:
    shape, results = session.measured(case)
    if shape is None:
        pytest.skip(f"left out: {session.left_out[case.name]}")
    result = results[name]
    if result.failed:
        session.note(case, name, result.failed)
        if result.failed.startswith("wrong result"):
            pytest.fail(result.failed, pytrace=False)
        pytest.skip(result.failed)
    benchmark.group, benchmark.name = case.name, name
    benchmark.extra_info.update(case=case.name, contender=name, **result.info)
    TAPE.load(result.rounds)
    benchmark.pedantic(lambda: None, rounds=len(result.rounds))
