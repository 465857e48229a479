"""Who is at what now, so that several builders on one folder do not do the same work. No locks.

A builder that starts on a piece of work creates the file `<piece>.<generation>.claim`; of several, one succeeds. It
touches the file as long as it works, and removes it once the shard is there. The claim of a builder that died is
overridden by creating the next generation: at once if the process was of this machine, else when nobody has touched
the claim for LEASE seconds of our own clock. Claims are advice: were one lost or overridden too early, the same
completion would be scored twice, never wrongly and never not at all.

    DIR/claims/work-*            someone builds or merges: `gc` refuses
    DIR/claims/gc                someone collects garbage: builds wait
    DIR/claims/ID/<chunk>        someone scores these completions of a reference
    DIR/claims/ID/upkeep         someone repairs or merges its shards
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from . import files
from .errors import CacheError

FOLDER = "claims"
SUFFIX = ".claim"
LEASE = 60.0  # seconds without a sign of life
_BEAT = 10.0
_NAME = re.compile(r"(.+)\.(\d+)\.claim")
_here: set[str] = set()  # the Claims of this process that are at work


class Claims:
    """The claims of one builder in one folder; a context manager, which gives back what is still held."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._builder = uuid.uuid4().hex
        self._me = json.dumps({**_process(os.getpid()), "builder": self._builder}).encode()
        self._held: dict[str, list[Path]] = {}  # piece -> the claim's file, and those it overrides
        self._seen: dict[Path, tuple[float, float]] = {}  # another's claim -> (its mtime, when we first saw that)
        self._stop = threading.Event()
        self._beat = threading.Thread(target=self._keep_alive, name="fastdpo-claims", daemon=True)

    def __enter__(self) -> Claims:
        _here.add(self._builder)
        self._beat.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        self._beat.join()
        self.release(list(self._held))
        _here.discard(self._builder)

    def take(self, piece: str) -> bool:
        """Claim one piece of work; False while another builder is at it."""
        others = sorted(
            (p for p in self._folder.glob(f"{piece}.*{SUFFIX}") if _NAME.fullmatch(p.name)), key=_generation
        )
        if others and self._mine(others[-1]):
            self._held[piece] = others[::-1]
            return True
        if others and self._alive(others[-1]):
            return False
        generation = _generation(others[-1]) + 1 if others else 0
        path = self._folder / f"{piece}.{generation}{SUFFIX}"
        self._held[piece] = [path, *others]  # before it is there, so that an interrupt leaves none behind
        if files.write_new(path, self._me) or self._mine(path):
            return True
        del self._held[piece]
        return False

    def wait(self, piece: str) -> None:
        """Claim one piece of work, as soon as no other is at it."""
        pause = 0.02
        while not self.take(piece):
            time.sleep(pause)
            pause = min(2 * pause, 1.0)

    def release(self, pieces: list[str]) -> None:
        """Give pieces back, done or not."""
        for piece in pieces:
            claim, *overridden = self._held.pop(piece)
            for path in [*([claim] if self._mine(claim) else []), *overridden]:
                path.unlink(missing_ok=True)

    def _mine(self, path: Path) -> bool:
        return _owner(path).get("builder") == self._builder

    def _alive(self, path: Path) -> bool:
        owner = _owner(path)
        if owner.get("host") == _host():
            return _runs(owner)
        touched = 0.0
        with contextlib.suppress(OSError):  # just removed
            touched = path.stat().st_mtime
        mtime, since = self._seen.get(path, (None, 0.0))
        if mtime != touched:
            self._seen[path] = (touched, time.monotonic())
            return True
        return time.monotonic() - since < LEASE

    def _keep_alive(self) -> None:
        while not self._stop.wait(_BEAT):
            for paths in list(self._held.values()):
                with contextlib.suppress(OSError):
                    os.utime(paths[0])


@contextlib.contextmanager
def at_work(root: Path) -> Iterator[None]:
    """Says for the length of a with-block that someone builds or merges in a cache. Waits for `gc`, if that is on."""
    folder = root / FOLDER
    with Claims(folder) as claims:
        while True:
            piece = f"work-{uuid.uuid4().hex}"
            claims.take(piece)
            if not live(folder.glob(f"gc.*{SUFFIX}")):
                break
            claims.release([piece])  # whoever came first of the two sees the other
            time.sleep(0.2)
        yield


@contextlib.contextmanager
def collecting(root: Path) -> Iterator[None]:
    """Keeps builders waiting for the length of a with-block.

    Raises:
        CacheError: someone is building, merging or collecting garbage.
    """
    with Claims(root / FOLDER) as claims:
        if not claims.take("gc"):
            raise CacheError(f"{root}: someone else is collecting garbage")
        refuse_while_building(root)
        yield


def refuse_while_building(root: Path) -> None:
    """Raise CacheError if someone is building or merging in a cache."""
    building = live(path for path in (root / FOLDER).rglob(f"*{SUFFIX}") if not path.name.startswith("gc."))
    if building:
        raise CacheError(f"{building[0]}: someone is building; collect garbage when they are done")


def live(paths: Iterable[Path]) -> list[Path]:
    """Claims that may be at work: those of processes of this machine that run, and those touched within LEASE."""
    found = []
    for path in paths:
        owner = _owner(path)
        if owner.get("host") == _host():
            alive = _runs(owner)
        else:
            alive = False
            with contextlib.suppress(FileNotFoundError):  # just removed
                # By the file system's clock, which is not ours
                alive = files.touch(path.parent) - path.stat().st_mtime < LEASE
        if alive:
            found.append(path)
    return found


def _owner(path: Path) -> dict[str, Any]:
    """What a claim says of who made it; empty if it is gone or says nothing of use."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    types = {"host": str, "pid": int, "builder": str}
    return found if isinstance(found, dict) and all(isinstance(found.get(k), t) for k, t in types.items()) else {}


def _runs(owner: dict[str, Any]) -> bool:
    """Whether the owner of a claim, of this machine, is at work."""
    if owner["pid"] == os.getpid() and owner["builder"] not in _here:
        return False  # an earlier process with our id; or a build of ours that was interrupted
    now = _process(owner["pid"])["started"]
    return now is not None and now == owner.get("started")


def _generation(path: Path) -> int:
    return int(path.name.removesuffix(SUFFIX).rpartition(".")[2])


@functools.cache
def _host() -> str:
    """This boot of this machine, and which processes it can see: process ids mean nothing elsewhere."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _process(pid: int) -> dict[str, object]:
    """What tells a running process from a later one with the same id; `started` is None where it does not run."""
    started: str | None = None
    try:
        # Field 22, counted after the command, which may hold anything
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        started = None if stat[0] in "ZX" else stat[19]
    except OSError:
        if not Path("/proc/self/stat").exists():  # no Linux: the id must do
            with contextlib.suppress(ImportError):
                import psutil

                started = "running" if psutil.pid_exists(pid) else None
    return {"host": _host(), "pid": pid, "started": started}
