"""Jobs for the tests of the pool, by name: `study_work:make`."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def make(folder: Path) -> Callable[[tuple[str, Any]], None]:
    """A job is (what to do, name); each leaves a line in folder/<name>."""

    def do(job: tuple[str, Any]) -> None:
        what, name = job
        path = folder / name
        seen = path.read_text().count("\n") if path.exists() else 0
        with path.open("a") as file:
            file.write(f"{os.getpid()}\n")
        if what == "raise":
            raise ValueError(f"{name} is bad")
        if what == "die" or (what == "die once" and not seen):
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "sleep":
            time.sleep(600)

    return do
