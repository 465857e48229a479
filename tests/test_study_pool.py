"""Worker processes: jobs come back with their outcome, a death costs a retry, and none is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import study_work  # noqa: F401  what the workers import

from fastdpo.study.pool import Place, Pool

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals")


def pids(path: Path) -> list[int]:
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def test_outcomes_and_deaths(tmp_path: Path) -> None:
    jobs = [("do", "a"), ("raise", "b"), ("die", "c"), ("die once", "d"), ("do", "e"), ("do", "f")]
    with Pool("study_work:make", tmp_path, [Place(None, 1)] * 2, tmp_path / "logs") as pool:
        found = {outcome.job[1]: outcome.error for outcome in pool.run(jobs)}
        assert set(found) == set("abcdef")
        assert found["c"] == f"2 workers died over it, the last with exit code -9; see {tmp_path / 'logs'}"
        assert found["b"] == "ValueError: b is bad"
        assert [found[name] for name in "adef"] == [None] * 4
        assert len(pids(tmp_path / "d")) == 2 and len(set(pids(tmp_path / "c"))) == 2, "by another worker"
        assert "ValueError: b is bad" in "".join(path.read_text() for path in (tmp_path / "logs").glob("*.log"))
        alive = {pid for name in "aef" for pid in pids(tmp_path / name) if psutil.pid_exists(pid)}
        assert [outcome.error for outcome in pool.run([("do", "g")])] == [None]
        assert set(pids(tmp_path / "g")) <= alive | set(pids(tmp_path / "d")), "a worker lives on"
        for worker in pool._workers.values():  # while they have nothing to do
            os.kill(worker.process.pid, signal.SIGKILL)
            worker.process.join()
        assert [outcome.error for outcome in pool.run([("do", "h")])] == [None]
    assert not psutil.pid_exists(pids(tmp_path / "h")[0])


def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "from pathlib import Path\n"
        "from fastdpo.study.pool import Place, Pool\n"
        "if __name__ == '__main__':\n"
        f"    folder = Path({str(tmp_path)!r})\n"
        "    with Pool('study_work:make', folder, [Place(None, 1)], folder / 'logs') as pool:\n"
        "        list(pool.run([('sleep', 'job')]))\n"
    )
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here.parent), str(here)])}
    for end in (signal.SIGKILL, signal.SIGINT):
        (tmp_path / "job").unlink(missing_ok=True)
        parent = subprocess.Popen([sys.executable, str(script)], env=environment, stderr=subprocess.DEVNULL)
        wait_until(lambda: pids(tmp_path / "job"))
        (worker,) = pids(tmp_path / "job")
        parent.send_signal(end)
        parent.wait(30)
        wait_until(lambda worker=worker: not runs(worker))


def runs(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def wait_until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
