"""What the columns of logps in a data set are: a line of its description, which survives `map`, `select` and saving.

A list of rows, a .jsonl or a .parquet file has no place for it, and a stream keeps none.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

_MARK = "fastdpo reference logps: "


class Record(NamedTuple):
    """How columns `ref_chosen_logps` and `ref_rejected_logps` were made."""

    reference: str  # id
    temperature: float
    max_length: int | None
    truncation_mode: str
    ld_alpha: float | None

    def beside(self, description: str) -> str:
        """A data set's description with this, in place of what it said of earlier columns."""
        others = [line for line in description.splitlines() if not line.startswith(_MARK)]
        return "\n".join([*others, _MARK + json.dumps(self._asdict())])


def read(dataset: Any) -> list[Record]:
    """What a data set says of its columns; several where data sets were put together."""
    found = []
    for line in (getattr(dataset.info, "description", None) or "").splitlines():
        if line.startswith(_MARK):
            try:
                found.append(Record(**json.loads(line.removeprefix(_MARK))))
            except (ValueError, TypeError):
                continue
    return found
