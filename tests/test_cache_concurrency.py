"""Builders that are killed, and several at once: nothing lost, nothing doubled, the same bits."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

import cache_kit as kit

from fastdpo.cache import ReferenceCache
from fastdpo.cache.claims import Claims

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forkserver, /proc")

PAIRS = kit.rows(60)
SEQUENCES = 2 * len(PAIRS)
SHARD = 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return kit.save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def unbroken(model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[bytes, float]:
    """What a build that nothing disturbs gives."""
    cache = tmp_path_factory.mktemp("unbroken")
    builder = start(cache, model, cache / "log")
    builder.join()
    assert scored(cache / "log") == SEQUENCES
    return kit.entries(ReferenceCache(cache))


def start(cache: Path, model: str, log: Path, seconds: float = 0, **keywords: Any) -> Any:
    arguments = (str(cache), model, PAIRS, str(log), seconds)
    process = kit.processes().Process(target=kit.slow_build, args=arguments, kwargs={"shard_size": SHARD, **keywords})
    process.start()
    return process


def scored(log: Path) -> int:
    return log.stat().st_size if log.exists() else 0


def assert_whole(cache: Path, unbroken: dict[bytes, float]) -> None:
    found = ReferenceCache(cache)
    assert kit.entries(found) == unbroken, "the same keys, the same bits"
    assert found.verify() == []
    found.gc()
    assert not [path for path in cache.rglob("*") if path.name.endswith((".claim", ".tmp"))]
    assert kit.entries(found) == unbroken


def test_killed_at_ten_random_moments(model, unbroken, tmp_path):
    moments = random.Random(5)
    log, kills = tmp_path / "log", 0
    for _ in range(10):
        before = scored(log)
        builder = start(tmp_path / "cache", model, log, seconds=0.01)
        kit.wait_until(lambda before=before: scored(log) > before, builder)
        time.sleep(moments.uniform(0, 0.1))
        builder.kill()
        builder.join()
        kills += builder.exitcode == -signal.SIGKILL
    assert kills > 5, "most were at work when they died"
    last = start(tmp_path / "cache", model, log)
    last.join()
    assert last.exitcode == 0
    assert SEQUENCES <= scored(log) <= SEQUENCES + kills * SHARD
    assert_whole(tmp_path / "cache", unbroken)


@pytest.mark.parametrize("moment", kit.MOMENTS)
def test_killed_between_two_steps_of_writing(model, unbroken, tmp_path, moment):
    log = tmp_path / "log"
    for die_before in (moment, None):
        builder = start(tmp_path / "cache", model, log, die_before=die_before)
        builder.join()
        assert builder.exitcode == (0 if die_before is None else -signal.SIGKILL)
    assert SEQUENCES <= scored(log) <= SEQUENCES + SHARD
    assert_whole(tmp_path / "cache", unbroken)


@pytest.mark.parametrize("count", [2, 4])
def test_several_builders_share_the_work(model, unbroken, tmp_path, count):
    logs = [tmp_path / f"log{i}" for i in range(count)]
    builders = [start(tmp_path / "cache", model, log, seconds=0.02) for log in logs]
    for builder in builders:
        builder.join()
        assert builder.exitcode == 0
    work = [scored(log) for log in logs]
    assert sum(work) == SEQUENCES, "nothing was scored twice"
    assert sum(amount > 0 for amount in work) > 1, "more than one had something to do"
    assert_whole(tmp_path / "cache", unbroken)


def test_one_builder_dies_beside_another(model, unbroken, tmp_path):
    logs = [tmp_path / f"log{i}" for i in range(2)]
    doomed, other = (start(tmp_path / "cache", model, log, seconds=0.02) for log in logs)
    kit.wait_until(lambda: scored(logs[0]) > SHARD, doomed)
    doomed.kill()
    doomed.join()
    other.join()
    assert other.exitcode == 0
    assert sum(map(scored, logs)) <= SEQUENCES + SHARD
    assert_whole(tmp_path / "cache", unbroken)


# --- claims ----------------------------------------------------------------------------------------------------------


def claim_of_another_machine(folder: Path, piece: str) -> Path:
    with Claims(folder) as mine:
        assert mine.take(piece)
        path = next(folder.glob("*.claim"))
        content = path.read_text()
    path.write_text(content.replace('"host": "', '"host": "another '))
    return path


def test_a_claim_of_another_machine_holds_while_it_is_touched(tmp_path, monkeypatch):
    path = claim_of_another_machine(tmp_path, "a")
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with Claims(tmp_path) as mine:
        for second in range(5):
            os.utime(path, (second, second))
            assert not mine.take("a")
            now[0] += 59
        assert not mine.take("a")
        now[0] += 2
        assert mine.take("a"), "nobody has touched it for a minute of our clock, whatever theirs says"
        mine.release(["a"])
    assert not list(tmp_path.glob("*.claim"))


def test_two_who_find_a_dead_claim_do_not_both_get_it(tmp_path, monkeypatch):
    claim_of_another_machine(tmp_path, "a")
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with Claims(tmp_path) as first, Claims(tmp_path) as second:
        assert not first.take("a")
        assert not second.take("a")
        now[0] += 61
        assert [first.take("a"), second.take("a")] == [True, False]


def test_gc_waits_for_builders(model, tmp_path):
    cache = ReferenceCache(tmp_path)
    cache.build(model, kit.tokenizer_of(model), PAIRS[:2], progress=False)
    with Claims(cache.shards(cache.reference())) as claims:
        claims.take("a")
        with pytest.raises(ValueError, match="someone is building"):
            cache.gc()
    cache.gc()
