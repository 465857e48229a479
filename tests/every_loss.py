"""What each loss of the table needs to be called at all, and whether it takes a reference."""

from __future__ import annotations

from typing import Any

from fastdpo.losses import LOSSES


def needed(loss_type: str) -> dict[str, Any]:
    """The keywords without which the loss raises."""
    return {"label_smoothing": 1e-3} if LOSSES[loss_type].needs == "label_smoothing" else {}


def referenced(loss_type: str) -> bool:
    return "ref_logps" in LOSSES[loss_type].uses
