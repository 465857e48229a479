"""A loss as asked for, and its value: rows of the table, their weights, and what is done to the logps before them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..batch import constant
from .divergences import F_DIVERGENCES
from .keywords import Beta, LossKeywords, LossType, beta_at, check_keywords, is_schedule
from .pairs import LossOptions, Pairs
from .sides import nll
from .table import Loss


class Sequences(NamedTuple):
    """What the losses are made of: `[2B]` each, rows 0..B-1 chosen, B..2B-1 rejected."""

    logps: Tensor  # sums of the token logps, weighted by token_weights and ld_alpha
    ref_logps: Tensor | None
    lengths: Tensor  # tokens that count
    nll: Tensor  # -sum of the token logps, not weighted


class Recipe(NamedTuple):
    losses: tuple[Loss, ...]
    loss_weights: tuple[float, ...]
    options: LossOptions
    gamma: float | Tensor | None  # None: each loss's own
    alpha: float
    betas: tuple[float, ...] | None
    parameterization: str
    divergence: Callable[[Tensor], Tensor] | None  # None: the reverse KL
    length_normalize: bool | None  # None: each loss's own
    ld_alpha: float | None
    use_weighting: bool
    token_weights: Tensor | None
    pair_weights: Tensor | None

    @property
    def averages(self) -> bool:
        """Whether sequence logps are means over tokens, for every loss of the recipe."""
        return all(self.averages_for(row) for row in self.losses)

    def averages_for(self, row: Loss) -> bool:
        return row.length_normalize if self.length_normalize is None else self.length_normalize

    def check_reference(self, given: bool) -> None:
        """Raise ValueError where ref_logps are given and not used, or used and not given."""
        if given and self.parameterization == "posterior":
            raise ValueError("ref_logps: parameterization='posterior' has no reference, expected None")
        if given and not any("ref_logps" in row.uses for row in self.losses):
            raise ValueError("ref_logps: the loss has no reference, expected None")
        if not given and self.parameterization == "likelihood":
            raise ValueError("ref_logps: parameterization='likelihood' needs the reference's logps without the prompt")

    def on(self, count: int, like: Tensor) -> Recipe:
        """For a batch of `count` pairs: with the per-pair tensors checked, on the device and of the dtype of `like`."""
        options, gamma, weights = self.options, self.gamma, self.pair_weights
        per_pair: tuple[list[int], ...] = ([count], [])
        if isinstance(options.beta, Tensor):
            options = options._replace(beta=constant("beta", options.beta, per_pair, like, above=0))
        if isinstance(options.kl, Tensor):
            options = options._replace(kl=constant("kl", options.kl, ([],), like))
        if isinstance(gamma, Tensor):
            gamma = constant("gamma", gamma, per_pair, like)
        if weights is not None:
            weights = constant("pair_weights", weights, ([count],), like)
        return self._replace(options=options, gamma=gamma, pair_weights=weights)

    def rewards(self, ratios: Tensor) -> Tensor:
        """beta * log-ratio `[B]`, or `[len(betas), B]`."""
        if self.betas is None:
            return (self.options.beta * ratios).detach()
        return torch.stack([beta * ratios for beta in self.betas])

    def loss(self, sequences: Sequences, pair_weights: Tensor | None) -> Tensor:
        """The mean loss over the pairs, `[]`; or `[len(betas)]`."""
        if self.betas is None:
            return self._loss(sequences, pair_weights, self.options.beta)
        return torch.stack([self._loss(sequences, pair_weights, beta) for beta in self.betas])

    def _loss(self, sequences: Sequences, pair_weights: Tensor | None, beta: float | Tensor) -> Tensor:
        count = sequences.logps.shape[0] // 2
        total = sequences.logps.new_zeros(())
        for row, weight in zip(self.losses, self.loss_weights, strict=True):
            pairs = self._pairs(row, sequences)
            options = self.options._replace(beta=beta, gamma=row.gamma if self.gamma is None else self.gamma)
            values = row.function(pairs, options)
            if not isinstance(values, Tensor) or values.shape != (count,):
                found = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
                raise ValueError(f"loss_type: expected a loss that returns one number per pair, [{count}], got {found}")
            total = total + weight * _mean(values, pair_weights)
        if self.alpha:
            pairs = Pairs.split(sequences.logps, None, sequences.lengths, sequences.nll)
            total = total + self.alpha * _mean(nll(pairs), pair_weights)
        return total

    def _pairs(self, row: Loss, sequences: Sequences) -> Pairs:
        ref = sequences.ref_logps if "ref_logps" in row.uses else None
        divergence = self.divergence if "f_divergence_type" in row.uses else None
        pairs = Pairs.split(sequences.logps, ref, sequences.lengths, sequences.nll, divergence)
        return pairs.averaged() if self.averages_for(row) else pairs


def _mean(values: Tensor, pair_weights: Tensor | None) -> Tensor:
    """Over the B pairs, weighted or not, `[]`."""
    if pair_weights is not None:
        values = values * pair_weights
    return values.sum() / max(1, values.shape[0])


def make_recipe(beta: Beta, loss_type: LossType, label_smoothing: float, keywords: LossKeywords) -> Recipe:
    """Check the keywords (errors: `check_keywords`) and put them together."""
    if is_schedule(beta) and keywords.get("betas") is not None:
        raise ValueError("betas: expected betas or a schedule of beta, got both")
    beta = beta_at(beta, keywords.get("step"))
    losses, values = check_keywords(beta, loss_type, label_smoothing, keywords)
    alpha, weights = values["alpha"], tuple(values["loss_weights"])
    if alpha is None:
        alpha = sum(weight * row.alpha for weight, row in zip(weights, losses, strict=True))
    divergence = None
    if values["f_divergence_type"] != "reverse_kl":
        divergence = functools.partial(
            F_DIVERGENCES[values["f_divergence_type"]], alpha=values["f_alpha_divergence_coef"]
        )
    return Recipe(
        losses=losses,
        loss_weights=weights,
        options=LossOptions(beta, label_smoothing, discopop_tau=values["discopop_tau"], kl=values["kl"]),
        gamma=values["gamma"],
        alpha=alpha,
        betas=None if values["betas"] is None else tuple(values["betas"]),
        parameterization=values["parameterization"],
        divergence=divergence,
        length_normalize=values["length_normalize"],
        ld_alpha=values["ld_alpha"],
        use_weighting=values["use_weighting"],
        token_weights=values["token_weights"],
        pair_weights=values["pair_weights"],
    )
