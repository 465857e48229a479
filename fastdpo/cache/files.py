"""Files that are there whole or not at all, on local and network file systems; and none outside of the cache."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Collection
from pathlib import Path

from .errors import CacheError

TEMPORARY = ".tmp"  # suffix of what is being written; a killed writer leaves it, `gc` removes it


def write(path: Path, data: bytes | memoryview, *, sync: bool = True) -> None:
    """Create or replace `path` in one step. With `sync`, a crash of the machine does not lose it once this returns."""
    temporary = _temporary(path, data, sync)
    os.replace(temporary, path)
    if sync:
        _sync_folder(path.parent)


def write_new(path: Path, data: bytes) -> bool:
    """Create `path` in one step; False if it is there already. Of several writers, on any machine, one succeeds."""
    temporary = _temporary(path, data, True)
    try:
        # A hard link is the one step that also NFS makes or refuses as a whole
        os.link(temporary, path)
    except FileExistsError:
        # An NFS client that asked twice is told of its own first success
        if temporary.stat().st_nlink != 2:
            return False
    except OSError:  # a file system without hard links
        try:
            with path.open("xb") as file:
                file.write(data)
        except FileExistsError:
            return False
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)
    return True


def touch(folder: Path) -> float:
    """Create a file in a folder and remove it; returns what time that was for the file system.

    An NFS client then forgets the listing of the folder that it had kept.
    """
    temporary = _temporary(folder / "now", b"", False)
    try:
        return temporary.stat().st_mtime
    finally:
        temporary.unlink(missing_ok=True)


def refuse_links(root: Path, names: Collection[str], depth: int) -> None:
    """Raise CacheError for a link out of a folder: what is written or deleted in the folder would be so elsewhere.

    Args:
        names: of the files and folders in it that count.
        depth: of the folders below that count.
    """
    home = Path(os.path.realpath(root))

    def look(folder: str | Path, left: int) -> None:
        # What is no folder, or went away meanwhile, has no links in it
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
            for entry in entries:
                if left == depth and entry.name not in names:
                    continue
                if entry.is_symlink() and not (target := Path(os.path.realpath(entry.path))).is_relative_to(home):
                    raise CacheError(f"{entry.path}: a link that leads out of the cache, to {target}; not followed")
                if left and entry.is_dir():
                    look(entry.path, left - 1)

    look(root, depth)


def _temporary(path: Path, data: bytes | memoryview, sync: bool) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{uuid.uuid4().hex}{TEMPORARY}"
    try:
        with temporary.open("xb") as file:
            file.write(data)
            if sync:
                file.flush()
                os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def _sync_folder(folder: Path) -> None:
    # A rename is on disk when its folder is. Windows opens no folders, and needs none
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
