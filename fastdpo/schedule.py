"""A schedule of beta over the steps of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .options import check_number

SHAPES = ("linear", "cosine")


@dataclass(frozen=True)
class BetaSchedule:
    """beta from `start` at step 0 to `end` at step `steps` and from there on: `BetaSchedule(0.3, 0.05, 1000)(step)`.

    `dpo_loss(..., beta=schedule, step=step)`, `FastDPOTrainer.beta_schedule`; any callable of the step will do as well.
    In a function under torch.compile, pass it `schedule(step)`: a cosine of a symbolic step cannot be traced.

    Args:
        start, end: above 0.
        steps: an int, at least 1.
        shape: "linear", or "cosine" (half a cosine: slow at both ends).

    Raises:
        ValueError, TypeError: a value that is not as above.
    """

    start: float
    end: float
    steps: int
    shape: str = "linear"

    def __post_init__(self) -> None:
        check_number("start", self.start, above=0)
        check_number("end", self.end, above=0)
        if not isinstance(self.steps, int) or isinstance(self.steps, bool) or self.steps < 1:
            raise ValueError(f"steps: expected an int of at least 1, got {self.steps!r}")
        if self.shape not in SHAPES:
            raise ValueError(f"shape: unknown {self.shape!r}, expected one of {', '.join(SHAPES)}")

    def __call__(self, step: int) -> float:
        share = min(max(step / self.steps, 0.0), 1.0)
        if self.shape == "cosine":
            share = 0.5 - 0.5 * math.cos(math.pi * share)
        return self.start + (self.end - self.start) * share
