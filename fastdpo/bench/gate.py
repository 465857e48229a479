"""No speed without correctness: a contender is checked on a part of the inputs before it is timed."""

from __future__ import annotations

import time
from functools import cached_property
from typing import Generic

import torch
from torch import Tensor

from .providers import AnyBatch, Batch, dpo_truth, first_tokens, run

CHECKED_TOKENS = 256
# Relative errors of logps and of each gradient. bf16: eager's gradients are at 1.5e-2; Liger, which rounds the logps of
# whole sequences, at 6e-2
WRONG = {torch.bfloat16: 0.1, torch.float16: 0.1, torch.float32: 1e-3}
_AT_ONCE = 1 << 24  # elements that are compared


class WrongResult(AssertionError):
    """A contender's result is not that of float32 mathematics (float64, from logits or float32 inputs)."""


def check(name: str, result: Tensor, truth: Tensor, tolerance: float) -> float:
    """The relative error of a result (Frobenius norm).

    Raises:
        WrongResult: it is above `tolerance`, or not a number; the shapes differ.
    """
    if result.shape != truth.shape:
        raise WrongResult(f"{name}: shape {list(result.shape)}, expected {list(truth.shape)}; its time is not reported")
    off = total = 0.0
    wide = torch.promote_types(truth.dtype, torch.float32)
    for ours, theirs in zip(result.flatten().split(_AT_ONCE), truth.flatten().split(_AT_ONCE), strict=True):
        off += _sum_of_squares(ours.to(wide) - theirs.to(wide))
        total += _sum_of_squares(theirs)
    error = (off / total if total else off) ** 0.5
    if not error <= tolerance:
        raise WrongResult(f"{name}: relative error {error:.2e} above {tolerance:.0e}; its time is not reported")
    return error


def _sum_of_squares(values: Tensor) -> float:
    return torch.linalg.vector_norm(values.detach(), dtype=torch.float64).item() ** 2


def check_apart(name: str, logps: Tensor, truth: Tensor, counted: Tensor, tolerance: float) -> None:
    """Raise WrongResult for logps that do not tell tokens apart as the truth does, e.g. all the same.

    Where the softmax is flat, every logp is about -log V, and so near to it in relative terms.
    """
    if not counted.any():
        return
    truth = truth[counted].double()
    off = (logps[counted].double() - truth).square().mean().sqrt().item()
    most = tolerance * max(1.0, truth.std(correction=0).item())
    if not off <= most:
        raise WrongResult(f"{name}, logps: {off:.2g} nats off, at most {most:.2g} allowed; its time is not reported")


class Gate(Generic[AnyBatch]):
    """The truth of a part of a batch, computed once for all its contenders.

    Args:
        batch: from hidden states or from logits.
        needs: of NEEDS.
        tokens: about so many are checked, spread over the sequences.
    """

    def __init__(self, batch: AnyBatch, needs: str = "both", tokens: int = CHECKED_TOKENS) -> None:
        self.part = first_tokens(batch, max(2, tokens // len(batch.lengths)))
        self.needs = needs
        self.seconds: dict[str, float] = {}  # of the part, by contender

    @cached_property
    def truth(self) -> list[Tensor]:
        """What `run` returns, in float32 mathematics; from logits, or float32 inputs, in float64."""
        narrow = isinstance(self.part, Batch) and self.part[0].dtype != torch.float32
        wide = torch.float32 if narrow else torch.float64
        return run("eager", self._part_in(wide), self.needs)

    @cached_property
    def dpo_truth(self) -> list[Tensor]:
        assert isinstance(self.part, Batch)
        return dpo_truth(self.part)

    def errors(self, name: str) -> list[float]:
        """Mean absolute error of a logp (Liger: of the loss), relative errors of the gradients.

        Args:
            name: of PROVIDERS, or of FROM_LOGITS for a LogitsBatch.

        Raises:
            WrongResult: a logp or a gradient is off by more than WRONG allows.
            ImportError: a package that the contender needs is not installed.
        """
        part, start = self._part_in(self.part[0].dtype), time.perf_counter()
        result = run(name, part, self.needs)
        self.seconds[name] = time.perf_counter() - start
        truth = self.dpo_truth if name == "Liger" else self.truth
        allowed = WRONG[self.part[0].dtype]
        # A DPO loss may be almost 0: its rounding is that of the margin
        apart = (result[0].double() - truth[0].double()).abs().mean().item()
        if name != "Liger":
            check(f"{name}, logps", result[0], truth[0], allowed)
            check_apart(name, result[0], truth[0], part.labels >= 0, allowed)
        elif not apart <= allowed * max(1.0, truth[0].item()):
            raise WrongResult(f"{name}: loss {result[0].item():g}, expected {truth[0].item():g}; not reported")
        found = [apart]
        for number, (ours, theirs) in enumerate(zip(result[1:], truth[1:], strict=False), 1):
            found.append(check(f"{name}, gradient {number}", ours, theirs, allowed))
        return found

    def _part_in(self, dtype: torch.dtype) -> AnyBatch:
        """Copies: a contender may write its gradient over its input."""
        parts = [
            x.to(dtype, copy=name == "logits") if name in ("hidden", "weight", "logits") else x
            for name, x in self.part._asdict().items()
        ]
        return type(self.part)(*parts)
