"""The grid of a study: a cell for each loss, parameterization, reference, beta and seed; which of them are one run."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple


class Cell(NamedTuple):
    """One point of the grid."""

    loss_type: str
    parameterization: str
    reference: str  # its name
    beta: float
    seed: int

    @property
    def id(self) -> str:
        """Its name, also of its files."""
        return f"{self.loss_type}-{self.parameterization}-{self.reference}-beta{self.beta:g}-seed{self.seed}"


def grid(study: Mapping[str, Any]) -> list[Cell]:
    """All cells, seeds varying fastest.

    Args:
        study: study.json, or `config.to_dict`: loss_types, parameterizations, references, betas, seeds.
    """
    names = [one["name"] for one in study["references"]]
    return [
        Cell(*values)
        for values in itertools.product(
            study["loss_types"], study["parameterizations"], names, study["betas"], study["seeds"]
        )
    ]


def runs(study: Mapping[str, Any]) -> dict[Cell, Cell]:
    """Each cell of the grid -> the cell whose training it is: itself, or the first that is the same by construction.

    The posterior's reward beta log p(y|x) asks no reference anything; and without a reference, p_ref = 1 in the other
    two as well.
    """
    without = {one["name"] for one in study["references"] if one["model"] is None}
    first: dict[Cell, Cell] = {}
    found = {}
    for cell in grid(study):
        if cell.parameterization == "posterior" or cell.reference in without:
            found[cell] = first.setdefault(cell._replace(parameterization="posterior", reference=""), cell)
        else:
            found[cell] = cell
    return found
