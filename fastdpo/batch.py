"""Shift, mask and sequence layout of a batch. The only file that knows -100.

Kernels see `targets`, int64 `[N]`, with -1 where a position does not count; and `bounds`, int64 `[2B+1]`: sequence
s owns the flat positions bounds[s] .. bounds[s+1]-1. A padded batch `[2B, T]` is the packed batch whose bounds are
0, T, 2T, ….

The checks that look at values are inside torch ops (below), so that torch.compile traces past them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .inputs import check_flag, check_indices, check_tensor, result_dtype
from .parallel import SequenceParallel

IGNORE_INDEX = -100
IGNORED = -1  # what kernels read in place of ignore_index


class Layout(NamedTuple):
    """Where the sequences of a batch lie, and which positions count."""

    labels: Tensor  # aligned: labels[..., t] is the target of row t; [2B, T], or packed [N] or [1, N]
    bounds: Tensor  # int64 [2B+1]
    ignore_index: int
    packed: bool
    shifted: bool  # by make_layout
    sequence_parallel: SequenceParallel | None = None  # this rank holds a part of each sequence

    @property
    def sequences(self) -> int:
        return self.bounds.shape[0] - 1

    @property
    def counted(self) -> Tensor:
        """bool `[N]`"""
        return self.labels.reshape(-1) != self.ignore_index

    @property
    def per_token(self) -> list[list[int]]:
        """The shapes that one number per token may have: of labels; packed also `[1, N]` or `[N]`."""
        positions = self.labels.numel()
        if self.packed and self.sequence_parallel is not None:  # [N] may look like [2B], on one rank and not on another
            return [[1, positions]]
        return [[positions], [1, positions]] if self.packed else [list(self.labels.shape)]


def make_layout(
    labels: Tensor,
    cu_seqlens: Tensor | None,
    ignore_index: int = IGNORE_INDEX,
    shift: bool = False,
    pairs: bool = True,
    sequence_parallel: SequenceParallel | None = None,
) -> Layout:
    """The layout of a padded (`cu_seqlens=None`) or packed batch; with shift, the labels aligned with their rows.

    Raises:
        ValueError, TypeError: as `sequence_bounds`; a shift that is not a bool, or of parts of sequences.
    """
    check_flag("shift", shift)
    if shift and sequence_parallel is not None:
        raise ValueError("shift: with sequence_parallel, labels must be shifted before they are split; expected False")
    bounds = sequence_bounds(labels, cu_seqlens, pairs)
    packed = cu_seqlens is not None
    if shift:
        labels = shift_labels(labels, ignore_index, bounds if packed else None)
    return Layout(labels, bounds, ignore_index, packed, shift, sequence_parallel)


def shift_labels(labels: Tensor, ignore_index: int = IGNORE_INDEX, bounds: Tensor | None = None) -> Tensor:
    """Hugging Face's convention to ours: position t predicts labels[t+1]; the last position of a sequence nothing.

    labels `[..., T]`, or packed `[N]` / `[1, N]` with `bounds` `[2B+1]`. Returns a tensor shaped like labels.
    """
    if labels.shape[-1] == 0:
        return labels
    shifted = torch.cat([labels[..., 1:], labels.new_full((*labels.shape[:-1], 1), ignore_index)], dim=-1)
    if bounds is None:
        return shifted
    # The position before a sequence's first token is the end of another one. Sequence 0 starts at position 0, which
    # has none before it: roll that mark to the last position, which `cat` ignored already. An empty sequence at the
    # end starts at N: drop it there.
    starts = torch.zeros(labels.numel() + 1, dtype=torch.bool, device=labels.device)
    starts = starts.scatter(0, bounds[:-1], True)
    return shifted.masked_fill(starts[:-1].roll(-1).view(labels.shape), ignore_index)


def flat_targets(labels: Tensor, vocab: int, ignore_index: int = IGNORE_INDEX, shift: bool = False) -> Tensor:
    """labels `[...]` -> targets int64 `[N]` with -1 where ignored.

    Raises:
        TypeError: labels are not integers.
        ValueError: a label that is neither ignore_index nor in [0, vocab).
    """
    check_indices("labels", labels)
    if shift:
        labels = shift_labels(labels, ignore_index)
    return torch.ops.fastdpo.targets(labels.reshape(-1), vocab, ignore_index)


def sequence_bounds(labels: Tensor, cu_seqlens: Tensor | None, pairs: bool = True) -> Tensor:
    """The bounds, int64 `[2B+1]`, of a padded `[2B, T]` batch (`cu_seqlens=None`) or of a packed one.

    Raises:
        ValueError: labels of the wrong shape; with pairs, an odd number of sequences; cu_seqlens that does not start
            at 0, end at N and rise.
        TypeError: labels or cu_seqlens is not an integer tensor.
    """
    check_indices("labels", labels)
    if cu_seqlens is None:
        if labels.dim() != 2:
            raise ValueError(f"labels: expected [2B, T] (or packed with cu_seqlens), got shape {list(labels.shape)}")
        sequences, length = labels.shape
        if pairs:
            _even("labels", sequences)
        return torch.arange(sequences + 1, device=labels.device) * length
    if labels.dim() != 1 and not (labels.dim() == 2 and labels.shape[0] == 1):
        raise ValueError(f"labels: expected packed [N] or [1, N] with cu_seqlens, got shape {list(labels.shape)}")
    check_indices("cu_seqlens", cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens: expected shape [2B+1], got {list(cu_seqlens.shape)}")
    if pairs:
        _even("cu_seqlens", cu_seqlens.shape[0] - 1)
    return torch.ops.fastdpo.bounds(cu_seqlens.to(labels.device), labels.numel())


def _even(name: str, sequences: int) -> None:
    if sequences % 2:
        raise ValueError(
            f"{name}: a pair batch needs an even number of sequences (chosen 0..B-1, rejected B..2B-1), got {sequences}"
        )


class Reference(NamedTuple):
    logps: Tensor  # per sequence [2B], or per token [N], 0 where ignored
    per_token: bool


def make_reference(ref_logps: Tensor | None, layout: Layout) -> Reference | None:
    """Checked reference logps, detached, float32 (float64 stays). `[2B]` are always sums: a packed batch of as many
    tokens as sequences takes them per token as `[1, N]`.

    Raises:
        TypeError: not a tensor of floats.
        ValueError: another shape than [2B] or that of labels, or NaN or infinity where it counts.
    """
    if ref_logps is None:
        return None
    sequences = layout.sequences
    if not isinstance(ref_logps, Tensor) or not ref_logps.is_floating_point():
        kind = ref_logps.dtype if isinstance(ref_logps, Tensor) else type(ref_logps).__name__
        raise TypeError(f"ref_logps: expected a float32 tensor [{sequences}], got {kind}")
    ref_logps = ref_logps.detach()
    if ref_logps.shape == (sequences,):
        return Reference(torch.ops.fastdpo.constant(ref_logps, "ref_logps", None), per_token=False)
    if list(ref_logps.shape) not in layout.per_token:
        raise ValueError(
            f"ref_logps: expected one logp per sequence, shape [{sequences}], or per token, shaped like labels "
            f"{list(layout.labels.shape)}, got {list(ref_logps.shape)}"
        )
    flat = torch.where(layout.counted, ref_logps.reshape(-1).to(layout.labels.device), 0.0)
    return Reference(torch.ops.fastdpo.constant(flat, "ref_logps", None), per_token=True)


def constant(
    name: str, value: Tensor, shapes: Sequence[Sequence[int]], like: Tensor, above: float | None = None
) -> Tensor:
    """A checked tensor that gets no gradient, on the device and of the dtype of `like`.

    Raises:
        TypeError: not a tensor of floats.
        ValueError: a shape that is not among `shapes`; it requires a gradient; a value that is not finite or not
            greater than `above`.
    """
    check_constant(name, value, shapes)
    return torch.ops.fastdpo.constant(value, name, above).to(like.device, like.dtype)


def check_constant(name: str, value: Tensor, shapes: Sequence[Sequence[int]]) -> None:
    """The errors of `constant` that do not look at values."""
    check_tensor(name, value)
    if list(value.shape) not in [list(shape) for shape in shapes]:
        expected = " or ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"{name}: expected shape {expected}, got {list(value.shape)}")
    if value.requires_grad:
        raise ValueError(f"{name}: expected a constant, got a tensor that requires a gradient; detach() it")


# --- ops: what must look at values -----------------------------------------------------------------------------------


def _capturing(tensor: Tensor) -> bool:
    # A value check reads the device; inside a CUDA graph capture that is an error
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


@torch.library.custom_op("fastdpo::targets", mutates_args=())
def _targets(labels: Tensor, vocab: int, ignore_index: int) -> Tensor:
    ignored = labels == ignore_index
    bad = ((labels < 0) | (labels >= vocab)) & ~ignored
    if not _capturing(labels) and bool(bad.any()):
        position = int(bad.nonzero()[0])
        raise ValueError(
            f"labels: {int(labels[position])} at flat position {position} is neither a token id in [0, {vocab}) "
            f"nor ignore_index={ignore_index}"
        )
    return torch.where(ignored, IGNORED, labels.long())


@_targets.register_fake
def _(labels: Tensor, vocab: int, ignore_index: int) -> Tensor:
    return torch.empty_like(labels, dtype=torch.int64)


@torch.library.custom_op("fastdpo::bounds", mutates_args=())
def _bounds(cu_seqlens: Tensor, positions: int) -> Tensor:
    bounds = cu_seqlens.to(torch.int64, copy=True)
    if not _capturing(bounds):
        values = bounds.cpu()
        if int(values[0]) != 0 or int(values[-1]) != positions:
            found = f"{int(values[0])} and {int(values[-1])}"
            raise ValueError(f"cu_seqlens: expected to start at 0 and end at N={positions}, got {found}")
        if bool((values.diff() < 0).any()):
            raise ValueError(f"cu_seqlens: expected values that never fall, got {values.tolist()}")
    return bounds


@_bounds.register_fake
def _(cu_seqlens: Tensor, positions: int) -> Tensor:
    return torch.empty_like(cu_seqlens, dtype=torch.int64)


@torch.library.custom_op("fastdpo::constant", mutates_args=())
def _constant(values: Tensor, name: str, above: float | None) -> Tensor:
    good = values.isfinite() if above is None else values.isfinite() & (values > above)
    if not _capturing(values) and not bool(good.all()):
        position = (~good).nonzero()[0].tolist()
        bound = "" if above is None else f" above {above:g}"
        raise ValueError(f"{name}: expected finite numbers{bound}, got {float(values[tuple(position)])} at {position}")
    return values.to(result_dtype(values.dtype), copy=True)


@_constant.register_fake
def _(values: Tensor, name: str, above: float | None) -> Tensor:
    return torch.empty_like(values, dtype=result_dtype(values.dtype))
