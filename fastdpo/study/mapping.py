"""Dataclasses from mappings, as YAML and JSON hold them: unknown names are refused, with the nearest that there is."""

from __future__ import annotations

import dataclasses
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from ..names import did_you_mean
from .errors import StudyError

T = TypeVar("T")


def build(kind: type[T], given: Any, where: str = "") -> T:
    """A dataclass of a mapping, and so the dataclasses in it; lists become tuples.

    Args:
        where: what the mapping is called, for messages; "" for the whole.

    Raises:
        StudyError: an unknown name, one that is missing, a value of another type, or one that the dataclass refuses.
    """
    if not isinstance(given, dict):
        raise StudyError(f"{where or 'config'}: expected a mapping of settings, got {given!r}")
    known = {one.name: one for one in dataclasses.fields(kind)}  # type: ignore[arg-type]
    dot = f"{where}." if where else ""
    for name in given:
        if name not in known:
            raise StudyError(
                f"{dot}{name}: unknown setting, expected some of {', '.join(known)}{did_you_mean(str(name), known)}"
            )
    for name, one in known.items():
        if name not in given and one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING:
            raise StudyError(f"{dot}{name}: not given")
    hints = get_type_hints(kind)
    values = {name: _value(hints[name], value, f"{dot}{name}") for name, value in given.items()}
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise StudyError(f"{dot}{error}") from None


def _value(hint: Any, value: Any, where: str) -> Any:
    """A value as its field holds it. Numbers are left to the dataclass."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return build(hint, value, where)
    if get_origin(hint) is tuple:
        item = get_args(hint)[0]
        items = value if isinstance(value, (list, tuple)) else [value]
        if isinstance(item, type) and dataclasses.is_dataclass(item):
            return tuple(build(item, one, f"{where}.{i}") for i, one in enumerate(items))
        wanted = (int, float) if item is float else item
        if not items or any(not isinstance(one, wanted) or isinstance(one, bool) for one in items):
            raise StudyError(f"{where}: expected a list of {item.__name__}, got {value!r}")
        return tuple(item(one) for one in items)
    kinds = [get_origin(one) or one for one in (get_args(hint) if isinstance(hint, UnionType) else (hint,))]
    named = {str: "text", dict: "a mapping"}.get(kinds[0])
    if named is not None and not isinstance(value, kinds[0]) and not (value is None and len(kinds) > 1):
        raise StudyError(f"{where}: expected {named}, got {value!r}")
    return value
