"""The folder's manifest: what it is, and which references it holds, by name.

    DIR/manifest.json                    format and version
    DIR/references/NAME.json             one named reference
    DIR/shards/ID/SHA256.parquet         its entries; ID is the reference's
    DIR/shards/ID/*.rows.jsonl           which rows they were computed for
    DIR/index/ID/SHA256.arrow            what was read from them

One file a name, so that builders of different references never write the same file. Each is under a checksum. The one
thing in them that is followed is where the tokenizer lies, if none is given; folders are named by hashes. Links that
lead out of the folder are refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from . import files
from .errors import CacheError
from .key import Reference

_FORMAT = {"format": "fastdpo reference logps", "version": 1}
_OWN = ("manifest.json", "references", "shards", "index", "claims")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class NamedReference:
    """A reference of the cache, and how it was last built."""

    name: str
    reference: Reference
    model: str  # folder or hub id
    tokenizer: str  # folder or hub id, "" where rows came as tokens
    vocabulary: str | None  # hash of the tokenizer's
    prior_prefix: int | None  # the token that stands for no prompt
    max_length: int | None
    truncation_mode: str
    prior: bool  # has been built with the unconditional logps
    token_logps: bool  # and with those of single tokens


class Manifest:
    """The names of one cache folder. Reading makes no folder."""

    def __init__(self, folder: Path) -> None:
        self._file, self._names = folder / "manifest.json", folder / "references"

    def create(self) -> None:
        """Make the folder a cache, unless it is one."""
        if not files.write_new(self._file, json.dumps(_FORMAT).encode()):
            with contextlib.suppress(CacheError):
                _load(self._file)
                return
            files.write(self._file, json.dumps(_FORMAT).encode())

    def check(self) -> None:
        """Raise CacheError for a folder that holds something else, a later version of this, or a link out of it."""
        files.refuse_links(self._file.parent, _OWN, depth=2)
        if not self._file.exists():
            return
        try:
            found = _load(self._file)
        except CacheError:
            if self._names.is_dir():  # cut short; what it says is known, and `create` says it again
                return
            raise
        if found != _FORMAT:
            raise CacheError(f"{self._file}: expected {_FORMAT}, got {found}")

    def require(self) -> None:
        """Raise CacheError unless the folder is a cache."""
        self.check()
        folder = self._file.parent
        if not folder.is_dir():
            raise CacheError(f"{folder}: no such folder; `build` makes a cache")
        if not self._file.exists() and not self._names.is_dir():
            raise CacheError(f"{folder}: not a cache, it has no manifest.json; `build` makes one")

    def wrong(self) -> list[tuple[Path, str]]:
        """(file, what is wrong with it)"""
        found = []
        try:
            if not self._file.exists() or _load(self._file) != _FORMAT:
                raise CacheError(f"{self._file}: missing")
        except CacheError as error:
            found.append((self._file, str(error).removeprefix(f"{self._file}: ")))
        for path in sorted(self._names.glob("*.json")):
            if not _NAME.fullmatch(path.stem):
                found.append((path, "not the name of a reference; not read"))
                continue
            try:
                self.get(path.stem)
            except CacheError as error:
                found.append((path, str(error)))
        return found

    def readable(self) -> list[NamedReference]:
        """The references whose files are right."""
        wrong = {path for path, _ in self.wrong()}
        return [self.get(path.stem) for path in sorted(self._names.glob("*.json")) if path not in wrong]

    def all(self) -> dict[str, NamedReference]:
        """name -> reference, by name."""
        self.check()
        names = sorted(path.stem for path in self._names.glob("*.json"))
        return {name: self.get(name) for name in names if _NAME.fullmatch(name)}

    def get(self, name: str) -> NamedReference:
        """Raises CacheError for an unknown name, or a file that was tampered with."""
        path = self._names / f"{check_name(name)}.json"
        if not path.exists():
            known = ", ".join(sorted(p.stem for p in self._names.glob("*.json")))
            raise CacheError(f"reference: {name!r} is not in {self._file.parent}; it holds {known or 'none'}")
        about = _load(path)
        try:
            reference = Reference(**about.pop("reference"))
            recorded, checksum = about.pop("id"), about.pop("sha256")
            named = NamedReference(reference=reference, **about)
        except (KeyError, TypeError, AttributeError) as error:
            raise CacheError(f"{path}: not a reference: {error}") from None
        if named.name != name or reference.id != recorded:
            raise CacheError(f"{path}: damaged: what it says of the reference does not hash to its id {recorded}")
        if _checksum(named) != checksum:
            raise CacheError(f"{path}: damaged or edited: what it says does not hash to its sha256 {checksum}")
        return named

    def put(self, named: NamedReference, overwrite: bool) -> NamedReference:
        """Name a reference. Building it again keeps what it held.

        Raises:
            CacheError: the name is another reference's, and not to be overwritten.
        """
        path = self._names / f"{check_name(named.name)}.json"
        if not path.exists() and files.write_new(path, _dump(named)):
            return named
        try:
            before = self.get(named.name)
        except CacheError:  # damaged: it is given anew
            before = None
        if before is not None and before.reference == named.reference:
            prior, token_logps = named.prior or before.prior, named.token_logps or before.token_logps
            named = replace(named, prior=prior, token_logps=token_logps)
        elif before is not None and not overwrite:
            differ = [
                f"{field.name} was {getattr(before.reference, field.name)}, is {getattr(named.reference, field.name)}"
                for field in fields(Reference)
                if getattr(before.reference, field.name) != getattr(named.reference, field.name)
            ]
            raise CacheError(
                f"name: {named.name!r} is another reference of {self._file.parent} ({'; '.join(differ)}); "
                "choose another name, or replace it"
            )
        if before != named:
            files.write(path, _dump(named))
        return named

    def drop(self, name: str) -> None:
        """Forget a name; `gc` then removes what belonged to it."""
        self.get(name)
        (self._names / f"{name}.json").unlink()


def check_name(name: Any) -> str:
    """Raise CacheError unless `name` is letters, digits, dot, dash and underscore, at most 64."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise CacheError(f"name: expected letters, digits, '.', '-' and '_' (at most 64), got {name!r}")
    return name


def _dump(named: NamedReference) -> bytes:
    return json.dumps({**asdict(named), "id": named.reference.id, "sha256": _checksum(named)}, indent=1).encode()


def _checksum(named: NamedReference) -> str:
    return hashlib.sha256(json.dumps(asdict(named), sort_keys=True).encode()).hexdigest()


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CacheError(f"{path}: not readable as JSON: {error}") from None
