"""Names that a user gave: the error for one that nobody knows, and what was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType

_NONE: Mapping[str, str] = MappingProxyType({})


def check_names(function: str, keywords: Iterable[str], known: Collection[str]) -> None:
    """Raise TypeError for a keyword that the function does not have."""
    for name in keywords:
        if name not in known:
            raise TypeError(
                f"{name}: not a keyword of {function}{did_you_mean(name, known)}; expected some of {', '.join(known)}"
            )


def did_you_mean(name: str, known: Iterable[str], aliases: Mapping[str, str] = _NONE) -> str:
    """'; did you mean ...?' where a known name is near, else nothing: another's name for it, one that differs in case,
    those that begin with it, or one that is spelt alike."""
    by_lower = {one.lower(): one for one in known}
    asked = name.lower().replace("-", "_")
    near = [aliases.get(asked, asked)]
    if near[0] not in by_lower:
        near = [one for one in by_lower if len(asked) > 1 and one.startswith(asked)]
    if not near:
        by_lower |= {alias: by_lower[one] for alias, one in aliases.items() if one in by_lower}
        near = difflib.get_close_matches(asked, by_lower, n=1)
    return f"; did you mean {' or '.join(repr(by_lower[one]) for one in near)}?" if near else ""
