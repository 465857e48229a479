"""Shift, mask and sequence layout of a batch. The only file that knows -100.

Kernels see `targets`, int64 `[N]`, with -1 where a position does not count; and `bounds`, int64 `[2B+1]`: sequence
s owns the flat positions bounds[s] .. bounds[s+1]-1. A padded batch `[2B, T]` is the packed batch whose bounds are
0, T, 2T, ….

The checks that look at values are inside torch ops (below), so that torch.compile traces past them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .inputs import check_tensor, result_dtype

IGNORE_INDEX = -100
IGNORED = -1  # what kernels read in place of ignore_index


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
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"labels: expected an int64 or int32 tensor, got {labels.dtype}")
    if shift:
        labels = shift_labels(labels, ignore_index)
    return torch.ops.fastdpo.targets(labels.reshape(-1), vocab, ignore_index)


def sequence_bounds(labels: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The bounds, int64 `[2B+1]`, of a padded `[2B, T]` batch (`cu_seqlens=None`) or of a packed one.

    Raises:
        ValueError: labels of the wrong shape; an odd number of sequences; cu_seqlens that does not start at 0, end
            at N and rise.
        TypeError: cu_seqlens is not an integer tensor.
    """
    check_tensor("labels", labels, floats=False)
    if cu_seqlens is None:
        if labels.dim() != 2:
            raise ValueError(f"labels: expected [2B, T] (or packed with cu_seqlens), got shape {list(labels.shape)}")
        sequences, length = labels.shape
        _even("labels", sequences)
        return torch.arange(sequences + 1, device=labels.device) * length
    if labels.dim() != 1 and not (labels.dim() == 2 and labels.shape[0] == 1):
        raise ValueError(f"labels: expected packed [N] or [1, N] with cu_seqlens, got shape {list(labels.shape)}")
    check_tensor("cu_seqlens", cu_seqlens, floats=False)
    if cu_seqlens.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"cu_seqlens: expected an int32 tensor, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens: expected shape [2B+1], got {list(cu_seqlens.shape)}")
    _even("cu_seqlens", cu_seqlens.shape[0] - 1)
    return torch.ops.fastdpo.bounds(cu_seqlens.to(labels.device), labels.numel())


def _even(name: str, sequences: int) -> None:
    if sequences % 2:
        raise ValueError(
            f"{name}: a pair batch needs an even number of sequences (chosen 0..B-1, rejected B..2B-1), got {sequences}"
        )


def reference(ref_logps: Tensor | None, sequences: int) -> Tensor | None:
    """Checked reference logps `[2B]`, detached, float32 (float64 stays).

    Raises:
        TypeError: not a tensor of floats.
        ValueError: another shape than [2B], or NaN or infinity in it.
    """
    if ref_logps is None:
        return None
    if not isinstance(ref_logps, Tensor) or not ref_logps.is_floating_point():
        kind = ref_logps.dtype if isinstance(ref_logps, Tensor) else type(ref_logps).__name__
        raise TypeError(f"ref_logps: expected a float32 tensor [{sequences}], got {kind}")
    if ref_logps.shape != (sequences,):
        raise ValueError(
            f"ref_logps: expected one sequence logp per sequence, shape [{sequences}], got {list(ref_logps.shape)}"
        )
    return torch.ops.fastdpo.reference(ref_logps.detach())


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


@torch.library.custom_op("fastdpo::reference", mutates_args=())
def _reference(ref_logps: Tensor) -> Tensor:
    finite = ref_logps.isfinite()
    if not _capturing(ref_logps) and not bool(finite.all()):
        position = int((~finite).nonzero()[0])
        raise ValueError(
            f"ref_logps: expected finite numbers, got {float(ref_logps[position])} for sequence {position}"
        )
    return ref_logps.to(result_dtype(ref_logps.dtype), copy=True)


@_reference.register_fake
def _(ref_logps: Tensor) -> Tensor:
    return torch.empty_like(ref_logps, dtype=result_dtype(ref_logps.dtype))
