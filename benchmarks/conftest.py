"""pytest's side of the suite: its time, its JSON, what it says at its end."""

from __future__ import annotations

from typing import Any

import pytest

from . import cases
from .session import Session

SESSION = pytest.StashKey[Session]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastdpo")
    group.addoption("--bench-seconds", type=float, default=720, help="of the whole run (default 720)")
    group.addoption("--bench-limit", type=float, default=30, help="seconds of one run of a contender (default 30)")


@pytest.fixture(scope="session")
def session(request: pytest.FixtureRequest) -> Session:
    options = request.config.option
    made = Session(options.bench_seconds, options.bench_limit, cases.CASES)
    request.config.stash[SESSION] = made
    return made


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    output_json["fastdpo"] = config.stash[SESSION].report()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    found = config.stash.get(SESSION, None)
    if found is None:
        return
    terminalreporter.section("what was left out")
    for name, (shape, _) in found.found.items():
        if shape is not None and shape.left_out:
            terminalreporter.write_line(f"{name}: {shape.left_out}")
    for name, why in found.left_out.items():
        terminalreporter.write_line(f"{name}: {why}")
    for name, contenders in found.not_timed.items():
        for contender, why in contenders.items():
            terminalreporter.write_line(f"{name}: {contender}: {why}")
