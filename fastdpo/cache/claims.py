"""Who is scoring what now, so that several builders on one folder do not do the same work. No locks.

A builder that starts on a piece of work creates the file `<piece>.<generation>.claim`; of several, one succeeds. It
touches the file as long as it works, and removes it once the shard is there. The claim of a builder that died is
overridden by creating the next generation: at once if the process was of this machine, else when nobody has touched
the claim for LEASE seconds of our own clock. Claims are advice: were one lost or overridden too early, the same
completion would be scored twice, never wrongly and never not at all.

They lie beside the shards. Creating one makes an NFS client forget the listing of the folder that it had kept, so
what another builder finished before is seen.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from types import TracebackType

from . import files

SUFFIX = ".claim"
LEASE = 60.0  # seconds without a sign of life
_BEAT = 10.0


class Claims:
    """The claims of one builder in one folder; a context manager, which gives back what is still held."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._me = json.dumps({**_process(os.getpid()), "builder": uuid.uuid4().hex}).encode()
        self._held: dict[str, list[Path]] = {}  # piece -> the claim's file, and those it overrides
        self._seen: dict[Path, tuple[float, float]] = {}  # another's claim -> (its mtime, when we first saw that)
        self._stop = threading.Event()
        self._beat = threading.Thread(target=self._keep_alive, name="fastdpo-claims", daemon=True)

    def __enter__(self) -> Claims:
        self._beat.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        self._beat.join()
        self.release(list(self._held))

    def take(self, piece: str) -> bool:
        """Claim one piece of work; False while another builder is at it."""
        others = sorted(self._folder.glob(f"{piece}.*{SUFFIX}"), key=_generation)
        if others and self._alive(others[-1]):
            return False
        generation = _generation(others[-1]) + 1 if others else 0
        path = self._folder / f"{piece}.{generation}{SUFFIX}"
        if not files.write_new(path, self._me):
            return False
        self._held[piece] = [path, *others]
        return True

    def release(self, pieces: list[str]) -> None:
        """Give pieces back, done or not."""
        for piece in pieces:
            for path in self._held.pop(piece):
                path.unlink(missing_ok=True)

    def _alive(self, path: Path) -> bool:
        try:
            owner = json.loads(path.read_bytes())
            touched = path.stat().st_mtime
        except (OSError, ValueError):  # just removed, or not yet written on a file system without hard links
            owner, touched = {}, 0.0
        if owner and owner["host"] == _host():
            return _process(owner["pid"]) == {k: owner[k] for k in ("host", "pid", "started")}
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


def live(folder: Path) -> list[Path]:
    """Claims that may be at work: those of processes of this machine that run, and those touched within LEASE."""
    found = []
    for path in folder.glob(f"*{SUFFIX}"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            owner, age = json.loads(path.read_bytes()), time.time() - path.stat().st_mtime
            same = owner["host"] == _host()
            if _process(owner["pid"])["started"] == owner["started"] if same else age < LEASE:
                found.append(path)
    return found


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
