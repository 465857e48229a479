"""Worker processes that live for a whole study: imports are paid once. One that dies costs the job it was at a retry.

A worker ends with its parent, however that ends: by `close`, and by a thread that waits for the parent's death.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from multiprocessing import connection
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

TRIES = 2  # workers that may die over one job
_PATIENCE = 10.0  # seconds for an idle worker to leave


class Place(NamedTuple):
    """Where a worker runs."""

    device: str | None  # for CUDA_VISIBLE_DEVICES; None: as it is
    threads: int


class Outcome(NamedTuple):
    """What became of a job."""

    job: Any
    error: str | None  # one line; None: done


class Worker:
    """One process, which does one job after another.

    Args:
        work: "module:function"; called once with `argument`, returns what does a job.
        log: file for all that it prints.
    """

    def __init__(self, work: str, argument: Any, place: Place, log: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.job: Any = None
        self.process = context.Process(target=_serve, args=(theirs, work, argument, place, log))
        environment = {
            "OMP_NUM_THREADS": str(place.threads),
            "TOKENIZERS_PARALLELISM": "false",
            "TQDM_DISABLE": "1",  # one bar, the parent's
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            **({} if place.device is None else {"CUDA_VISIBLE_DEVICES": place.device}),
        }
        with mock.patch.dict(os.environ, environment):  # libraries read theirs when they are imported
            self.process.start()
        theirs.close()

    def give(self, job: Any) -> None:
        """Start on a job."""
        self.job = job
        with contextlib.suppress(OSError):  # it died just now, which `take` will say
            self.connection.send(job)

    def take(self) -> str | None:
        """What came of it: None, or the error.

        Raises:
            EOFError: the process died.
        """
        try:
            return self.connection.recv()
        except OSError as error:  # a pipe that broke in the middle
            raise EOFError from error

    def end(self) -> None:
        """End it: by itself where it has nothing to do, else at once."""
        if self.job is None:
            self.connection.close()
            self.process.join(_PATIENCE)
        self.kill()

    def kill(self) -> int | None:
        """End it at once; returns its exit code."""
        self.process.kill()
        self.process.join()
        self.connection.close()
        return self.process.exitcode


class Pool:
    """Workers, one a place; a context manager, which leaves none behind."""

    def __init__(self, work: str, argument: Any, places: list[Place], logs: Path) -> None:
        self._work, self._argument, self._places, self._logs = work, argument, places, logs
        self._workers: dict[int, Worker] = {}

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all workers."""
        for number in list(self._workers):
            self._workers.pop(number).end()

    def run(self, jobs: Iterable[Any]) -> Iterator[Outcome]:
        """Each job's outcome, as it comes. A job whose worker dies is given to another, TRIES times in all."""
        waiting, died, codes = deque(jobs), Counter[Any](), {}
        while waiting or any(worker.job is not None for worker in self._workers.values()):
            # Those that are there already before those that would have to start
            for number in sorted(range(len(self._places)), key=lambda number: number not in self._workers):
                if waiting and (number not in self._workers or self._workers[number].job is None):
                    self._worker(number).give(waiting.popleft())
            busy = {worker.connection: number for number, worker in self._workers.items() if worker.job is not None}
            for ready in connection.wait(list(busy)):
                number = busy[ready]  # type: ignore[index]
                worker = self._workers[number]
                job = worker.job
                try:
                    error = worker.take()
                except EOFError:
                    codes[job] = self._workers.pop(number).kill()
                    died[job] += 1
                    if died[job] < TRIES:
                        waiting.append(job)
                        continue
                    error = f"{TRIES} workers died over it, the last with exit code {codes[job]}; see {self._logs}"
                worker.job = None
                yield Outcome(job, error)

    def _worker(self, number: int) -> Worker:
        """An idle worker: the one that is there, if it did not die meanwhile."""
        worker = self._workers.get(number)
        if worker is None or not worker.process.is_alive():
            if worker is not None:
                worker.kill()
            log = self._logs / f"worker-{number}.log"
            worker = self._workers[number] = Worker(self._work, self._argument, self._places[number], log)
        return worker


def _serve(parent: Any, work: str, argument: Any, place: Place, log: Path) -> None:
    """A worker's life."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C is the parent's, which ends us
    threading.Thread(target=_end_with_parent, daemon=True).start()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab", buffering=0) as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())
    import torch
    from tqdm import tqdm

    torch.set_num_threads(place.threads)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system, which a worker that is killed would leave
    do = None
    while True:
        try:
            job = parent.recv()
        except EOFError:
            return
        try:
            if do is None:
                module, _, name = work.partition(":")
                do = getattr(importlib.import_module(module), name)(argument)
            do(job)
            error = None
        except Exception as caught:
            traceback.print_exc()
            error = f"{type(caught).__name__}: {caught}".strip()
        sys.stdout.flush()
        sys.stderr.flush()
        parent.send(error)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
