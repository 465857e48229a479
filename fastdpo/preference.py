"""A pair batch to its loss: labels and layout (batch.py) -> token logps (head.py) -> loss (losses/)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor

from . import pair_kernel
from .batch import IGNORE_INDEX, Layout, Reference, make_layout, make_reference
from .head import TokenLogps, from_hidden, from_logits
from .inputs import check_token_logps
from .losses.keywords import Beta, LossKeywords, LossType, check_known
from .losses.recipe import Recipe, Sequences, make_recipe
from .options import head_options
from .parallel import SequenceParallel, VocabParallel, check_parallel
from .sequences import check_places, lengths, position_weights, reference_sums, sequence_sums

if TYPE_CHECKING:
    from typing_extensions import Unpack


class PreferenceOutput(NamedTuple):
    """What a preference loss returns. All but `loss` and `stats.logps` / `stats.entropy` are detached.

    Logps and rewards are as the loss compares them: sums over tokens, weighted by token_weights and ld_alpha, or means
    (ipo, sigmoid_norm, simpo, orpo, and any loss with length_normalize). `fastdpo.preference_metrics` makes the usual
    metrics of it.
    """

    loss: Tensor  # [], mean over pairs; [len(betas)] with betas
    chosen_logps: Tensor  # [B] sequence logps
    rejected_logps: Tensor  # [B]
    chosen_rewards: Tensor  # [B] beta * (chosen_logps - reference); [len(betas), B] with betas
    rejected_rewards: Tensor
    stats: TokenLogps  # per token, shaped like labels
    layout: Layout  # labels as aligned with the stats, and where the sequences lie


def dpo_loss(
    logits: Tensor,
    labels: Tensor,
    ref_logps: Tensor | None = None,
    *,
    beta: Beta = 0.1,
    loss_type: LossType = "sigmoid",
    label_smoothing: float = 0.0,
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
    **options: Unpack[LossKeywords],
) -> PreferenceOutput:
    """A preference loss from logits; by default DPO's (arXiv 2305.18290, eq. 7).

    Args:
        logits: padded `[2B, T, V]`, or packed `[N, V]` or `[1, N, V]` with cu_seqlens.
        labels: `[2B, T]`, or packed `[N]` or `[1, N]`; sequences 0..B-1 chosen, B..2B-1 rejected.
        ref_logps: reference logps, float, detached: sums per sequence `[2B]` in the same order (weighted as the
            policy's, if token_weights or ld_alpha weight those: `fastdpo.sequence_logps`), or per token, shaped like
            labels (TokenLogps.logps of the reference; packed also `[1, N]`). None: the reference-free loss.
        beta: strength of the KL constraint, above 0: a number, one per pair (a tensor `[B]`), or a schedule, a
            callable of `step` such as `fastdpo.BetaSchedule`.
        loss_type: a name in `fastdpo.losses.LOSSES`; a callable of `(Pairs, LossOptions)` that returns `[B]`; or a
            list of these, whose sum weighted by `loss_weights` is the loss.
        label_smoothing: probability that a preference is noise, in [0, 0.5); in sigmoid, cDPO's.
        cu_seqlens: int32 `[2B+1]`, the packed batch's boundaries: starts at 0, ends at N.
        vocab_parallel, sequence_parallel: `fastdpo.VocabParallel`, `fastdpo.SequenceParallel`: this rank has a part of
            the vocabulary, or of every sequence. Not under torch.compile.
        options: `fastdpo.losses.LossKeywords`, which documents them.
        The other keywords: `token_logps`. With shift and cu_seqlens, no sequence predicts into the next.

    Raises:
        TypeError, ValueError: as `token_logps`; an odd batch; ref_logps of another shape or not finite, or given to a
            loss without a reference; cu_seqlens that does not start at 0, end at N and rise; an unknown loss or
            option; an option that the loss does not use.
    """
    check_known(dpo_loss, options)
    recipe = make_recipe(beta, loss_type, label_smoothing, options)
    head = head_options(
        ignore_index=ignore_index,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        stats=_with_needed(stats, recipe),
        inplace_backward=inplace_backward,
        backend=backend,
        vocab_parallel=vocab_parallel,
    )
    layout = _layout(labels, cu_seqlens, ignore_index, shift, sequence_parallel, recipe)
    ref = _reference(ref_logps, layout, recipe)
    tokens = from_logits(logits, layout.labels, head)
    return _preference(tokens, layout, ref, recipe, backend)


def linear_dpo_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ref_logps: Tensor | None = None,
    *,
    beta: Beta = 0.1,
    loss_type: LossType = "sigmoid",
    label_smoothing: float = 0.0,
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
    **options: Unpack[LossKeywords],
) -> PreferenceOutput:
    """A preference loss from hidden states: padded `[2B, T, H]`, or packed `[N, H]` or `[1, N, H]`; weight `[V, H]`.

    The other arguments and errors: `dpo_loss` and `linear_token_logps`.
    """
    check_known(linear_dpo_loss, options)
    recipe = make_recipe(beta, loss_type, label_smoothing, options)
    head = head_options(
        ignore_index=ignore_index,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        stats=_with_needed(stats, recipe),
        grad_tol=grad_tol,
        workspace_mb=workspace_mb,
        backend=backend,
        vocab_parallel=vocab_parallel,
    )
    layout = _layout(labels, cu_seqlens, ignore_index, shift, sequence_parallel, recipe)
    ref = _reference(ref_logps, layout, recipe)
    tokens = from_hidden(hidden, weight, layout.labels, bias, head)
    return _preference(tokens, layout, ref, recipe, backend)


def loss_of_tokens(
    tokens: TokenLogps,
    labels: Tensor,
    ref_logps: Tensor | None = None,
    *,
    beta: Beta = 0.1,
    loss_type: LossType = "sigmoid",
    label_smoothing: float = 0.0,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    shift: bool = False,
    backend: str = "auto",
    sequence_parallel: SequenceParallel | None = None,
    **options: Unpack[LossKeywords],
) -> PreferenceOutput:
    """A preference loss from token logps that are there already: of a model that computes its own head.

    Args:
        tokens: results of `linear_token_logps` or `token_logps`, shaped like labels, 0 where those are ignored; with
            `use_weighting`, they need log_sum_sq_probs.
        shift: whether labels still are to be shifted to the tokens, as they were for the logps.
        The others and errors: `dpo_loss`.
    """
    check_known(loss_of_tokens, options)
    recipe = make_recipe(beta, loss_type, label_smoothing, options)
    layout = _layout(labels, cu_seqlens, ignore_index, shift, sequence_parallel, recipe)
    if not isinstance(tokens, TokenLogps):
        raise TypeError(f"tokens: expected fastdpo.TokenLogps, got {type(tokens).__name__}")
    check_token_logps("tokens.logps", tokens.logps, labels)
    if recipe.use_weighting and tokens.log_sum_sq_probs is None:
        raise ValueError("use_weighting: needs tokens with log_sum_sq_probs, one of stats")
    return _preference(tokens, layout, _reference(ref_logps, layout, recipe), recipe, backend)


# --- token logps -> loss ---------------------------------------------------------------------------------------------


def _layout(
    labels: Tensor,
    cu_seqlens: Tensor | None,
    ignore_index: int,
    shift: bool,
    sequence_parallel: SequenceParallel | None,
    recipe: Recipe,
) -> Layout:
    check_parallel("sequence_parallel", sequence_parallel, SequenceParallel)
    check_places(recipe.ld_alpha, sequence_parallel)  # now, and not after the head has run
    return make_layout(labels, cu_seqlens, ignore_index, shift, sequence_parallel=sequence_parallel)


def _reference(ref_logps: Tensor | None, layout: Layout, recipe: Recipe) -> Reference | None:
    recipe.check_reference(ref_logps is not None)
    return make_reference(ref_logps, layout)


def _with_needed(stats: Sequence[str], recipe: Recipe) -> Sequence[str]:
    """The stats, with what WPO's weights are made of."""
    if recipe.use_weighting and isinstance(stats, (tuple, list)):
        return (*stats, "log_sum_sq_probs")
    return stats


def _preference(
    tokens: TokenLogps, layout: Layout, reference: Reference | None, recipe: Recipe, backend: str
) -> PreferenceOutput:
    logps, bounds = tokens.logps.reshape(-1), layout.bounds
    count = layout.sequences // 2
    recipe = recipe.on(count, logps)
    if pair_kernel.fits(recipe) and layout.sequence_parallel is None:
        ref = reference_sums(reference, layout, logps, None, backend)
        beta, smoothing = cast(float, recipe.options.beta), recipe.options.label_smoothing
        loss, sums = pair_kernel.PairSigmoid.apply(logps, bounds, ref, beta, smoothing, backend)
    else:
        weights = position_weights(layout, logps, recipe.token_weights, recipe.ld_alpha, backend)
        plain = sequence_sums(logps, layout, backend)
        sums = plain if weights is None else sequence_sums(logps * weights, layout, backend)
        ref = reference_sums(reference, layout, logps, weights, backend)
        counts = lengths(layout, logps, backend)
        pair_weights = recipe.pair_weights
        if recipe.use_weighting:
            policy_weights = _policy_weights(tokens, counts, layout, backend)
            pair_weights = policy_weights if pair_weights is None else pair_weights * policy_weights
        loss = recipe.loss(Sequences(sums, ref, counts, -plain), pair_weights)
        if recipe.averages:
            per_token = 1 / counts.clamp(min=1)
            sums, ref = sums * per_token, None if ref is None else ref * per_token
    sums = sums.detach()
    ratios = sums if ref is None else sums - ref
    chosen_rewards, rejected_rewards = (recipe.rewards(ratio) for ratio in (ratios[:count], ratios[count:]))
    return PreferenceOutput(loss, sums[:count], sums[count:], chosen_rewards, rejected_rewards, tokens, layout)


def _policy_weights(tokens: TokenLogps, counts: Tensor, layout: Layout, backend: str) -> Tensor:
    """WPO's weight of each pair, `[B]`, a constant (arXiv 2406.11827, eq. 2, and its alignment by sum_v p_v^2)."""
    assert tokens.log_sum_sq_probs is not None
    aligned = (tokens.logps.detach() - tokens.log_sum_sq_probs).reshape(-1)
    chosen, rejected = (sequence_sums(aligned, layout, backend) / counts.clamp(min=1)).chunk(2)
    return torch.exp(chosen) * torch.exp(rejected)
