"""Builders that are killed, and several at once: nothing lost, nothing doubled, the same bits."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

import cache_kit as kit

from fastdpo.cache import ReferenceCache, claims, files
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
    for path in cache.rglob("*.tmp"):
        os.utime(path, (0, 0))
    found.gc()
    assert not [path for path in cache.rglob("*") if path.name.endswith((".claim", ".tmp"))]
    assert kit.entries(found) == unbroken


def test_killed_at_ten_random_moments(model, unbroken, tmp_path):
    moments = random.Random(5)
    log, kills = tmp_path / "log", 0
    for _ in range(10):
        before = scored(log)
        builder = start(tmp_path / "cache", model, log, seconds=0.03)
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
    with Claims(tmp_path / "claims" / cache.reference().reference.id) as mine:
        mine.take("a")
        with pytest.raises(ValueError, match="someone is building"):
            cache.gc()
    cache.gc()


def test_gc_waits_for_the_whole_of_a_build(model, tmp_path):
    cache, refused = ReferenceCache(tmp_path), []

    def rows():
        for pair in PAIRS[:3]:
            yield pair
            if cache.path.exists() and (tmp_path / "references").exists():
                with pytest.raises(ValueError, match="someone is building"):
                    ReferenceCache(tmp_path).gc()
                refused.append(pair)

    cache.build(model, kit.tokenizer_of(model), rows(), progress=False)
    assert len(refused) >= 2
    assert cache.gc() == []


def test_a_build_waits_for_gc(model, tmp_path):
    import threading

    ReferenceCache(tmp_path).build(model, kit.tokenizer_of(model), PAIRS[:2], progress=False)
    order = []
    with claims.collecting(tmp_path):

        def work():
            with claims.at_work(tmp_path):
                order.append("build")

        thread = threading.Thread(target=work)
        thread.start()
        thread.join(0.5)
        order.append("gc")
    thread.join()
    assert order == ["gc", "build"]


def test_our_own_claim_is_ours(tmp_path, monkeypatch):
    """A link that was made, and refused when a network file system asked for it again."""
    with Claims(tmp_path) as mine:
        monkeypatch.setattr(files, "write_new", lambda path, data: path.write_bytes(data) < 0)
        assert mine.take("a")
        monkeypatch.undo()
        assert mine.take("a"), "again"
        with Claims(tmp_path) as other:
            assert not other.take("a")
    assert not list(tmp_path.glob("*.claim"))


@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_interrupt_while_claiming_leaves_no_claim(tmp_path, monkeypatch, moment):
    write_new = files.write_new

    def interrupted(*arguments):
        if moment == "after":
            write_new(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "write_new", interrupted)
    with Claims(tmp_path) as mine, pytest.raises(KeyboardInterrupt):
        mine.take("a")
    monkeypatch.undo()
    assert not list(tmp_path.glob("*.claim"))


def test_a_claim_that_an_interrupted_build_of_this_process_left_is_dead(tmp_path):
    left = Claims(tmp_path)
    assert left.take("a")  # never released
    with Claims(tmp_path) as mine:
        assert mine.take("a")


@pytest.mark.parametrize("text", ["5", "[]", "{}", "null", "", '{"host": 3}', '{"host": "x", "pid": "y"}', "\x00"])
def test_a_claim_that_says_nothing_is_anothers_for_a_minute(tmp_path, monkeypatch, text):
    path = tmp_path / "a.0.claim"
    path.write_text(text)
    (tmp_path / "a.x.claim").write_text(text)
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    assert claims.live([path]) == [path]
    with Claims(tmp_path) as mine:
        assert not mine.take("a")
        now[0] += 61
        assert mine.take("a")
    os.utime(path := tmp_path / "a.x.claim", (0, 0))
    assert claims.live([path]) == []


def _repair(folder: str, model: str, failed: str) -> None:
    try:
        ReferenceCache(folder).build(model, kit.tokenizer_of(model), PAIRS, progress=False)
    except BaseException as error:
        Path(failed).write_text(repr(error))
        raise


def test_several_builders_repair_at_once(model, unbroken, tmp_path):
    """Every entry twice, in other shards, and some damage."""
    cache, other = ReferenceCache(tmp_path / "cache"), ReferenceCache(tmp_path / "other")
    for found, size in ((cache, 8), (other, 12)):
        found.build(model, kit.tokenizer_of(model), PAIRS, shard_size=size, progress=False)
    paths = kit.shard_paths(cache)
    for path in kit.shard_paths(other):
        shutil.copy(path, paths[0].parent)
    paths[0].write_bytes(b"no")
    failed = tmp_path / "failed"
    builders = [kit.processes().Process(target=_repair, args=(str(cache.path), model, str(failed))) for _ in range(3)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join()
    assert not failed.exists(), failed.read_text()
    assert kit.entries(cache).keys() == unbroken.keys()
    assert cache.verify() == []
