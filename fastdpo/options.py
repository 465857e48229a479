"""The options that every path shares, checked once: one clear error per bad value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from .backend import BACKENDS
from .batch import IGNORE_INDEX
from .inputs import check_flag
from .parallel import VocabParallel, check_parallel

STATS = ("entropy", "mean_logits", "is_top1", "log_sum_sq_probs", "lse", "dropped_mass")
INFINITY = float("inf")
# Keywords of the head that a trainer's integration leaves to its user
HEAD_KEYWORDS = ("grad_tol", "workspace_mb", "backend")


class Transform(NamedTuple):
    """What a model does to its raw logits z before the softmax:

    softcap * tanh(z * logit_scale / softcap) / temperature      (without softcap: z * logit_scale / temperature)
    """

    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0


class HeadOptions(NamedTuple):
    """Keywords of `token_logps` and `linear_token_logps`, as constants that torch.compile can trace."""

    transform: Transform = Transform()
    ignore_index: int = IGNORE_INDEX
    shift: bool = False
    stats: tuple[str, ...] = ()
    backend: str = "auto"
    inplace_backward: bool = False
    grad_tol: float | None = None  # None: "auto"
    workspace_mb: float = 256.0
    vocab_parallel: VocabParallel | None = None


def head_options(
    *,
    ignore_index: int = IGNORE_INDEX,
    shift: bool = False,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    stats: Sequence[str] = (),
    backend: str = "auto",
    inplace_backward: bool = False,
    grad_tol: float | str = "auto",
    workspace_mb: float = 256,
    vocab_parallel: VocabParallel | None = None,
) -> HeadOptions:
    """Check the keywords and pack them.

    Raises:
        ValueError: an unknown stat or backend, or a number outside its range; names the argument and its value.
        NotImplementedError: vocab_parallel under torch.compile, or with is_top1, which no rank knows alone.
    """
    if isinstance(stats, str) or not isinstance(stats, (tuple, list)):
        raise ValueError(f"stats: expected a sequence of names such as ('entropy',), got {stats!r}")
    for name in stats:
        if name not in STATS:
            raise ValueError(f"stats: unknown stat {name!r}, expected names among {', '.join(STATS)}")
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend: unknown backend {backend!r}, expected one of auto, {', '.join(BACKENDS)}")
    if not isinstance(ignore_index, int) or isinstance(ignore_index, bool):
        raise TypeError(f"ignore_index: expected an int, got {ignore_index!r}")
    for name, flag in (("shift", shift), ("inplace_backward", inplace_backward)):
        check_flag(name, flag)
    check_number("temperature", temperature, above=0)
    if softcap is not None:
        check_number("softcap", softcap, above=0, hint=" (None: no softcap)")
    check_number("logit_scale", logit_scale)
    check_number("workspace_mb", workspace_mb, above=0)
    check_parallel("vocab_parallel", vocab_parallel, VocabParallel)
    if vocab_parallel is not None and "is_top1" in stats:
        raise NotImplementedError("stats: is_top1 is not known to a vocabulary-parallel head")
    if grad_tol == "auto":
        tolerance = None
    elif isinstance(grad_tol, (int, float)) and not isinstance(grad_tol, bool) and 0 <= grad_tol < 1:
        tolerance = float(grad_tol)
    else:
        raise ValueError(f"grad_tol: expected 'auto' or a number in [0, 1), got {grad_tol!r}")
    transform = Transform(float(logit_scale), None if softcap is None else float(softcap), float(temperature))
    # dict.fromkeys: a stat asked for twice is computed once
    unique = tuple(dict.fromkeys(stats))
    return HeadOptions(
        *(transform, int(ignore_index), shift, unique, backend, inplace_backward, tolerance),
        *(float(workspace_mb), vocab_parallel),
    )


def check_number(name: str, value: object, above: float = -INFINITY, hint: str = "") -> None:
    """Raise for anything but a finite Python number greater than `above`. Plain comparisons: torch.compile traces them.

    A tensor is refused: its gradient would be lost, and its value would split the graph.
    """
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        found = "a tensor" if isinstance(value, Tensor) else repr(value)
        raise TypeError(f"{name}: expected a number, got {found}{hint}")
    if not above < value < INFINITY:
        bound = f" above {above:g}" if above > -INFINITY else ""
        raise ValueError(f"{name}: expected a finite number{bound}, got {value!r}{hint}")


def check_within(name: str, value: object, low: float, high: float) -> None:
    """Raise for anything but a finite Python number in [low, high]."""
    check_number(name, value)
    if not low <= value <= high:  # type: ignore[operator]
        raise ValueError(f"{name}: expected a number in [{low:g}, {high:g}], got {value!r}")
