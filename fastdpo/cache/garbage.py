"""What nothing uses any more: found, and removed."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from . import claims, files, index, journal, shard
from .verify import read

_ID = re.compile("[0-9a-f]{32}")
_ABANDONED = 3600.0  # seconds after which an unfinished file is left over


def find(root: Path, keep: set[str]) -> list[Path]:
    """Files that nothing uses, if only the references with these ids are kept. Nobody must be building."""
    gone: list[Path] = []
    for folder in (root / "shards").glob("*"):
        if not folder.is_dir() or not _ID.fullmatch(folder.name):
            continue
        there = [path for path in folder.iterdir() if not path.name.endswith(files.TEMPORARY)]
        if folder.name in keep:
            found = read(folder, folder.name)
            used = {f"{name}{shard.SUFFIX}" for name in (*(info.name for info in found.shards), *found.damaged)}
            there = [path for path in there if path.name not in used and not path.name.endswith(journal.SUFFIX)]
        gone += there
    for folder in (root / "index").glob("*"):
        there = sorted(folder.glob(f"*{index.SUFFIX}"), key=lambda path: path.stat().st_size)
        whole = [path for path in there if index.is_whole(path)] if folder.name in keep else []
        gone += [path for path in there if path not in whole[-1:]]
    gone += [path for path in (root / claims.FOLDER).rglob(f"*{claims.SUFFIX}") if not claims.live([path])]
    unfinished = list(root.rglob(f".*{files.TEMPORARY}"))
    now = files.touch(root) if unfinished else 0.0
    for path in unfinished:
        with contextlib.suppress(FileNotFoundError):
            gone += [path] if now - path.stat().st_mtime > _ABANDONED else []
    return gone


def remove(root: Path, gone: list[Path]) -> None:
    """Delete files, and the folders that are empty then; and the rows of shards that are no more."""
    for path in gone:
        path.unlink(missing_ok=True)
    for kind in ("shards", "index", claims.FOLDER):
        for folder in (root / kind).glob("*"):
            with contextlib.suppress(OSError):
                folder.rmdir()
    for folder in (root / "shards").glob("*"):
        there = {path.name.removesuffix(shard.SUFFIX) for path in folder.glob(f"*{shard.SUFFIX}")}
        old = list(folder.glob(f"*{journal.SUFFIX}"))
        if not old:
            continue
        origins, written = journal.read(folder), journal.expected(folder)
        fresh = journal.Journal(folder)
        for name in sorted(there & set(origins)):
            fresh.add(name, origins[name])
        fresh.written(*sorted(written & there))
        for path in old:
            path.unlink(missing_ok=True)
