"""Heads on many ranks, over torch.distributed: the vocabulary split (`VocabParallel`), or every sequence
(`SequenceParallel`). Data-parallel weights that are sharded (FSDP2) are gathered: `plain`.

Vocabulary-parallel: rank r holds the rows start .. stop-1 of the head, and every rank the same hidden states. With
lse_r the logsumexp over r's columns:

    lse = log sum_r exp(lse_r)          logp = z_y - lse,  z_y on the rank that holds row y
    p_v = exp(z_v - lse)                dX = sum_r D_r @ weight_r,    dW_r = D_r.T @ X

So a forward exchanges a few numbers per token, a backward dX; the logits, the choice of columns (compaction.py) and dW
stay where the rows are. Each rank may drop 1/ranks of `grad_tol`, by probabilities under the lse of all.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function


class VocabParallel:
    """This rank's share of an LM head whose rows (columns of the logits) are split over the ranks of a group.

    For `vocab_parallel=` of `token_logps`, `linear_token_logps` and the losses: every rank passes its own weight
    `[rows, H]` (or logits `[..., rows]`), and the same hidden states, labels (ids of the whole vocabulary) and
    keywords; every rank gets the same results, the whole gradient of hidden, and its own part of dW, db or dlogits.
    Construction is a collective call. Shares may differ in size, in the order of the ranks.

    Args:
        rows: rows of the head on this rank, at least 1.
        group: the ranks that share the head; None: all.

    Attributes:
        start, stop: this rank's rows in the whole vocabulary. vocab: V. sizes: rows of each rank. ranks: their number.

    Raises:
        ValueError: rows below 1, or this process is not in the group.
        RuntimeError: torch.distributed is not initialised.
    """

    def __init__(self, rows: int, group: dist.ProcessGroup | None = None) -> None:
        rank, self.ranks = _place(group)
        sizes: list[int] = [0] * self.ranks
        dist.all_gather_object(sizes, rows, group=group)
        if not all(isinstance(size, int) and size > 0 for size in sizes):  # on every rank, so that none waits
            raise ValueError(f"rows: expected at least 1 row of the head on each rank, got {sizes}")
        self.rows, self.group = rows, group
        self.sizes = tuple(sizes)
        self.start, self.vocab = sum(sizes[:rank]), sum(sizes)
        self.stop = self.start + rows

    @classmethod
    def of(cls, weight: Tensor) -> VocabParallel:
        """The share of a DTensor `[V, H]` that is sharded by rows on a mesh of one dimension, as the head of a
        tensor-parallel model of transformers is.

        Raises:
            TypeError: not a DTensor.
            ValueError: another placement than one Shard(0).
        """
        from torch.distributed.tensor import DTensor, Shard

        if not isinstance(weight, DTensor):
            raise TypeError(f"weight: expected a DTensor, got {type(weight).__name__}")
        if list(weight.placements) != [Shard(0)]:
            raise ValueError(f"weight: expected the placements [Shard(0)], got {list(weight.placements)}")
        return cls(weight.to_local().shape[0], weight.device_mesh.get_group())

    def check(self, name: str, rows: int) -> None:
        """Raise ValueError unless that many rows are this rank's."""
        if rows != self.rows:
            raise ValueError(f"{name}: expected this rank's {self.rows} rows of the vocabulary, got {rows}")

    def local(self, targets: Tensor) -> Tensor:
        """targets in the whole vocabulary -> of this rank's rows; one on another rank: `rows`."""
        here = (targets >= self.start) & (targets < self.stop)
        there = torch.where(targets < 0, targets, self.rows)
        return torch.where(here, targets - self.start, there)

    def merge(self, results: list[Tensor], targets: Tensor, stats: tuple[str, ...]) -> tuple[list[Tensor], Tensor]:
        """Row results over this rank's columns -> over all; and lse - lse_r, float64 `[n]`.

        Args:
            results: logps, lse and the stats, each `[n]`; where the target is elsewhere its logit counted as 0.
            targets: int64 `[n]`, of this rank's rows.
        """
        logps, lse = results[:2]
        owned = (targets >= 0) & (targets < self.rows)
        mine = torch.stack([lse, torch.where(owned, logps, 0), owned, *results[2:]]).double()
        parts = [torch.empty_like(mine) for _ in range(self.ranks)]
        dist.all_gather(parts, mine, group=self.group)
        lses, owned_logps, owners, *values = torch.stack(parts, dim=1)  # each [ranks, n]
        whole = torch.logsumexp(lses, dim=0)
        apart = whole - lses
        share = torch.exp(-apart)
        counted = targets >= 0
        # z_y - lse_r from its own kernel, which does not round between the two
        merged = [torch.where(owners > 0, owned_logps - apart, 0).sum(0), whole]
        for name, value in zip(stats, values, strict=True):
            if name == "entropy":  # -sum_v p_v log p_v with p_v = share * p_v of its rank
                merged.append(torch.where(share > 0, share * (value + apart), 0).sum(0))
            elif name == "log_sum_sq_probs":
                merged.append(torch.logsumexp(torch.where(share > 0, value - 2 * apart, -torch.inf), dim=0))
            elif name == "mean_logits":
                merged.append((value * value.new_tensor(self.sizes)[:, None]).sum(0) / self.vocab)
            else:
                raise NotImplementedError(f"stats: a vocabulary-parallel head does not know {name!r}")
        return [torch.where(counted, m, 0).to(logps.dtype) for m in merged], whole - lse

    def sum_(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, in place."""
        dist.all_reduce(tensor, group=self.group)
        return tensor


class SequenceParallel:
    """The ranks of a group each hold a part of every sequence of a batch (context or sequence parallelism).

    For `sequence_parallel=` of the losses: every rank passes its part of hidden (or logits) and labels, any positions
    of each of the same sequences in the same order (padded `[2B, T/ranks, ...]`, or packed with its own cu_seqlens; a
    rank may hold none of a sequence). Token logps are of the rank's own positions; sequence logps, loss and rewards are
    of whole sequences and the same on every rank. Labels must have been shifted before they were split; reference logps
    are of whole sequences, `[2B]`, or per token of the rank's part (packed: `[1, N]`). `preference_metrics` and
    `sequence_logps` of such a batch are collective calls too.

    Args:
        group: the ranks that hold the parts; None: all.
        gradients: how the ranks' gradients are put together afterwards: "mean" (DDP, FSDP and DeepSpeed average them)
            or "sum".

    Raises:
        ValueError: another word for gradients, or this process is not in the group.
        RuntimeError: torch.distributed is not initialised.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, gradients: str = "mean") -> None:
        if gradients not in ("mean", "sum"):
            raise ValueError(f"gradients: expected 'mean' or 'sum', got {gradients!r}")
        self.group, self.gradients = group, gradients
        _, self.ranks = _place(group)

    def sum(self, values: Tensor) -> Tensor:
        """values `[S]` of each rank's part -> of whole sequences; differentiable."""
        return _SumOverRanks.apply(values, self)


class _SumOverRanks(Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, parallel: SequenceParallel) -> Tensor:
        # Every rank computes the same loss of the sum: its slope is this rank's, and a mean over the ranks divides it
        ctx.factor = parallel.ranks if parallel.gradients == "mean" else 1
        total = values.clone()
        dist.all_reduce(total, group=parallel.group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


def plain(weight: Tensor, parallel: VocabParallel | None) -> Tensor:
    """A DTensor weight or bias as a plain tensor: with `parallel` this rank's rows, else (FSDP2's `fully_shard`) all.

    All: one gathering a call; the gradient is averaged over the ranks and scattered to the shards, as FSDP2 does with
    its own. Anything else than a DTensor as it is.
    """
    if not hasattr(weight, "full_tensor"):
        return weight
    from torch.distributed.tensor import DTensor, Partial

    assert isinstance(weight, DTensor)
    if parallel is not None:
        return weight.to_local()
    mesh = weight.device_mesh
    # gloo cannot average: the sum of gradients that are divided before
    whole = weight.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    return _DividedGradient.apply(whole, mesh.size())


class _DividedGradient(Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, by: int) -> Tensor:
        ctx.by = by
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad / ctx.by, None


def check_parallel(name: str, value: object, kind: type) -> None:
    """Raise TypeError unless value is None or a `kind`; NotImplementedError under torch.compile."""
    if value is None:
        return
    if not isinstance(value, kind):
        raise TypeError(f"{name}: expected a fastdpo.{kind.__name__}, got {type(value).__name__}")
    if torch.compiler.is_compiling():
        raise NotImplementedError(f"{name}: not under torch.compile; call the loss outside of the compiled function")


def _place(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """(this process's rank in the group, size of the group)"""
    if not dist.is_initialized():
        raise RuntimeError("torch.distributed is not initialised; call init_process_group() first")
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError("group: this process is not in it")
    return rank, dist.get_world_size(group)
