"""A model asked for something between two training steps: without dropout, and then as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def evaluating(model: nn.Module | Any) -> Iterator[None]:
    """With-block in which the model and all of its modules evaluate; each that trained does so again afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
