"""The token-level page: where on the completions a policy moved against its reference, as one self-contained HTML file.

The page loads nothing, and its content security policy lets nothing run but the one script that is named there by its
hash. Prompts and tokens are data: JSON in which no tag can begin, put into the page as text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from importlib.resources import files as resources
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from ..cache import files
from .page import source_hash
from .tokens import TokenRow, TokenSide

# What would end the data's script element, or begin another; < is \\u003c in JSON's strings, and stands nowhere else
_INERT = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"})
_DIGITS = 4  # of a logp, after the point


def write(path: Path, rows: Sequence[TokenRow], title: str, notes: Sequence[str] = ()) -> None:
    """Write the page, whole or not at all. It opens in any browser, offline; search, sorting and paging are in it.

    Args:
        rows: one a pair; with a reference in all of them, or in none.
        title: plain text.
        notes: paragraphs of plain text under the title.

    Raises:
        ValueError: lists of a completion that differ in length, or numbers that are not finite; a reference in some
            rows only.
    """
    for number, row in enumerate(rows):
        for name in ("chosen", "rejected"):
            _check(getattr(row, name), f"rows[{number}].{name}")
    referenced = {side.reference is not None for row in rows for side in (row.chosen, row.rejected)}
    if len(referenced) > 1:
        raise ValueError("rows: expected a reference in every completion or in none, got both")
    bases = ["reference", "start"] if True in referenced else ["start"]
    data = {"bases": bases, "rows": [_plain(row) for row in rows]}
    # Escaped to ASCII: so are U+2028, U+2029 and halves of surrogate pairs
    data_text = json.dumps(data, separators=(",", ":"), allow_nan=False).translate(_INERT)
    style, script = (_asset(f"token_page.{kind}") for kind in ("css", "js"))
    policy = f"default-src 'none'; style-src '{source_hash(style)}'; script-src '{source_hash(script)}'"
    policy += "; base-uri 'none'; form-action 'none'"
    inert = {"style": Markup(style), "script": Markup(script), "data": Markup(data_text)}
    template = Environment(autoescape=True, trim_blocks=True).from_string(_asset("token_page.html"))
    page = template.render(policy=policy, title=title, notes=notes, **inert)
    files.write(Path(path), page.encode("utf-8", "backslashreplace"))


def of_study(folder: Path, cell_id: str, path: Path) -> None:
    """Write the page of one cell of a study.

    Raises:
        StudyError: no such cell, or it holds no token logps.
    """
    from .results import load_tokens

    write(path, load_tokens(folder, cell_id), cell_id, ["Held-out pairs under the policy that this cell has trained."])


def _check(side: TokenSide, where: str) -> None:
    for name in ("policy", "start", "reference"):
        logps = getattr(side, name)
        if logps is None and name == "reference":
            continue
        if len(logps) != len(side.tokens):
            raise ValueError(f"{where}.{name}: expected one number a token, {len(side.tokens)}, got {len(logps)}")
        if not all(map(math.isfinite, logps)):
            raise ValueError(f"{where}.{name}: expected finite numbers, got {logps!r:.80}")


def _plain(row: TokenRow) -> dict[str, Any]:
    return {"prompt": row.prompt, "beta": row.beta, "chosen": _side(row.chosen), "rejected": _side(row.rejected)}


def _side(side: TokenSide) -> dict[str, Any]:
    logps = {name: getattr(side, name) for name in ("policy", "start", "reference")}
    rounded = {name: None if of is None else [round(float(x), _DIGITS) for x in of] for name, of in logps.items()}
    return {"tokens": list(side.tokens), **rounded}


def _asset(name: str) -> str:
    return resources(__package__).joinpath(name).read_text(encoding="utf-8").replace("\r\n", "\n")
