"""Losses of completions that come one by one, each desirable or not (KTO), in place of pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .batch import IGNORE_INDEX, Layout, Reference, constant, make_layout, make_reference
from .head import TokenLogps, from_hidden, from_logits
from .inputs import check_flag, check_tensor
from .losses import LOSSES, LossOptions
from .losses.table import SideFunction, find_loss, loss_name
from .options import INFINITY, check_number, check_within, head_options
from .parallel import SequenceParallel, VocabParallel, check_parallel
from .sequences import lengths, reference_sums, sequence_sums


class UnpairedOutput(NamedTuple):
    """What an unpaired loss returns. All but `loss` and `stats.logps` / `stats.entropy` are detached."""

    loss: Tensor  # [], mean over the sequences
    logps: Tensor  # [S] sequence logps; means over tokens with length_normalize
    rewards: Tensor  # [S] beta * (logps - reference)
    stats: TokenLogps  # per token, shaped like labels
    layout: Layout


class _Options(NamedTuple):
    side: SideFunction
    beta: float
    kl: float | Tensor
    weights: tuple[float, float]  # of desirable and of undesirable completions
    length_normalize: bool


def unpaired_loss(
    logits: Tensor,
    labels: Tensor,
    desirable: Tensor,
    ref_logps: Tensor | None = None,
    *,
    beta: float = 0.1,
    loss_type: str = "kto",
    kl: float | Tensor = 0.0,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    length_normalize: bool = False,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    shift: bool = False,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    stats: Sequence[str] = (),
    inplace_backward: bool = False,
    backend: str = "auto",
    vocab_parallel: VocabParallel | None = None,
    sequence_parallel: SequenceParallel | None = None,
) -> UnpairedOutput:
    """KTO's loss (arXiv 2402.01306), or another that takes completions one by one, from logits.

    Args:
        logits: padded `[S, T, V]`, or packed `[N, V]` or `[1, N, V]` with cu_seqlens `[S+1]`.
        labels: `[S, T]`, or packed `[N]` or `[1, N]`.
        desirable: bool `[S]`.
        ref_logps: reference logps, float, detached: `[S]`, or per token, shaped like labels. None: reference-free.
        beta: above 0.
        loss_type: a loss whose row in `fastdpo.losses.LOSSES` has a `side`: kto, bco_pair (BCO) or apo_zero.
        kl: KTO's reference point, a number or a tensor, `[]` or one per sequence, `[S]`; a constant. `kto_kl` estimates
            it.
        desirable_weight, undesirable_weight: multiply the loss of the one kind and of the other, at least 0.
        length_normalize: sequence logps are means over their tokens, not sums.
        The other keywords: `dpo_loss`.

    Raises:
        TypeError, ValueError: as `dpo_loss`; desirable that is not bool `[S]`; a loss that needs pairs.
    """
    options = _options(loss_type, beta, kl, desirable_weight, undesirable_weight, length_normalize)
    head = head_options(
        ignore_index=ignore_index,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        stats=stats,
        inplace_backward=inplace_backward,
        backend=backend,
        vocab_parallel=vocab_parallel,
    )
    layout, ref = _layout(labels, desirable, ref_logps, cu_seqlens, ignore_index, shift, sequence_parallel)
    tokens = from_logits(logits, layout.labels, head)
    return _unpaired(tokens, layout, desirable, ref, options, backend)


def linear_unpaired_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    desirable: Tensor,
    ref_logps: Tensor | None = None,
    *,
    beta: float = 0.1,
    loss_type: str = "kto",
    kl: float | Tensor = 0.0,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    length_normalize: bool = False,
    cu_seqlens: Tensor | None = None,
    bias: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    shift: bool = False,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    stats: Sequence[str] = (),
    grad_tol: float | str = "auto",
    workspace_mb: float = 256,
    backend: str = "auto",
    vocab_parallel: VocabParallel | None = None,
    sequence_parallel: SequenceParallel | None = None,
) -> UnpairedOutput:
    """The same from hidden states: padded `[S, T, H]`, or packed `[N, H]` or `[1, N, H]`; weight `[V, H]`.

    The other arguments and errors: `unpaired_loss` and `linear_token_logps`.
    """
    options = _options(loss_type, beta, kl, desirable_weight, undesirable_weight, length_normalize)
    head = head_options(
        ignore_index=ignore_index,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        stats=stats,
        grad_tol=grad_tol,
        workspace_mb=workspace_mb,
        backend=backend,
        vocab_parallel=vocab_parallel,
    )
    layout, ref = _layout(labels, desirable, ref_logps, cu_seqlens, ignore_index, shift, sequence_parallel)
    tokens = from_hidden(hidden, weight, layout.labels, bias, head)
    return _unpaired(tokens, layout, desirable, ref, options, backend)


def kto_kl(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """KTO's reference point, `[]`, detached: max(0, mean(logps - ref_logps)).

    Args:
        logps, ref_logps: `[M]` sequence logps of the policy and of the reference, of completions that belong to other
            prompts of the batch (arXiv 2402.01306; TRL shifts the completions of the batch by one).

    Raises:
        TypeError: no tensors of floats.
        ValueError: no completion, or shapes that disagree.
    """
    for name, value in (("logps", logps), ("ref_logps", ref_logps)):
        check_tensor(name, value)
    if logps.dim() != 1 or not len(logps) or ref_logps.shape != logps.shape:
        shapes = f"{list(logps.shape)} and {list(ref_logps.shape)}"
        raise ValueError(f"logps, ref_logps: expected [M] and [M], M at least 1, got {shapes}")
    return (logps - ref_logps).mean().clamp(min=0).detach()


def _options(
    loss_type: str, beta: float, kl: float | Tensor, desirable: float, undesirable: float, length_normalize: bool
) -> _Options:
    one_by_one = {name: row for name, row in LOSSES.items() if row.side is not None}
    row = find_loss(loss_type, one_by_one)
    if row.side is None:
        known = ", ".join(one_by_one)
        raise ValueError(f"loss_type: loss {loss_name(loss_type)} needs pairs, expected one of {known}")
    check_flag("length_normalize", length_normalize)
    check_number("beta", beta, above=0)
    if not isinstance(kl, Tensor):
        check_number("kl", kl)
    if "kl" not in row.uses and (isinstance(kl, Tensor) or kl != 0):
        value = "" if isinstance(kl, Tensor) else f", got {kl!r}"
        raise ValueError(f"kl: loss {loss_type!r} does not use it{value}")
    check_within("desirable_weight", desirable, 0, INFINITY)
    check_within("undesirable_weight", undesirable, 0, INFINITY)
    return _Options(row.side, beta, kl, (desirable, undesirable), length_normalize)


def _layout(
    labels: Tensor,
    desirable: Tensor,
    ref_logps: Tensor | None,
    cu_seqlens: Tensor | None,
    ignore_index: int,
    shift: bool,
    sequence_parallel: SequenceParallel | None,
) -> tuple[Layout, Reference | None]:
    check_parallel("sequence_parallel", sequence_parallel, SequenceParallel)
    layout = make_layout(labels, cu_seqlens, ignore_index, shift, False, sequence_parallel)
    check_tensor("desirable", desirable, floats=False)
    if desirable.dtype != torch.bool or desirable.shape != (layout.sequences,):
        raise ValueError(
            f"desirable: expected a bool tensor [{layout.sequences}], got {desirable.dtype} {list(desirable.shape)}"
        )
    return layout, make_reference(ref_logps, layout)


def _unpaired(
    tokens: TokenLogps, layout: Layout, desirable: Tensor, reference: Reference | None, options: _Options, backend: str
) -> UnpairedOutput:
    logps = tokens.logps.reshape(-1)
    kl = constant("kl", options.kl, ([], [layout.sequences]), logps) if isinstance(options.kl, Tensor) else options.kl
    desirable = desirable.to(logps.device)
    sums = sequence_sums(logps, layout, backend)
    ref = reference_sums(reference, layout, logps, None, backend)
    ratio = sums if ref is None else sums - ref
    if options.length_normalize:
        per_token = 1 / lengths(layout, logps, backend).clamp(min=1)
        sums, ratio = sums * per_token, ratio * per_token
    losses = options.side(ratio, desirable, LossOptions(options.beta, kl=kl))
    losses = torch.where(desirable, options.weights[0] * losses, options.weights[1] * losses)
    loss = losses.sum() / max(1, layout.sequences)
    return UnpairedOutput(loss, sums.detach(), (options.beta * ratio).detach(), tokens, layout)
