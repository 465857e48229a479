"""What a loss function sees: the sequence logps of B pairs, and its own options."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class LossOptions(NamedTuple):
    """What a loss function reads beside its pairs. A tensor holds one value per pair, `[B]`."""

    beta: float | Tensor = 0.1  # strength of the KL constraint
    label_smoothing: float = 0.0  # eps: probability that a preference is the wrong way round
    gamma: float | Tensor | None = None  # margin that the rewards should keep; None: the row's own, without a row 0
    discopop_tau: float = 0.05
    kl: float | Tensor = 0.0  # KTO's reference point, [] or a number


class Pairs(NamedTuple):
    """Sequence logps of B pairs; each `[B]`. Without a reference its logps are 0 (the reference-free losses).

    A sequence logp is the sum of its token logps, or their mean after `averaged()`.
    """

    chosen: Tensor  # log p(y_w|x)
    rejected: Tensor  # log p(y_l|x)
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_score: Tensor  # f'(p/p_ref) of f-DPO; chosen_ratio for the reverse KL, which is DPO
    rejected_score: Tensor
    chosen_length: Tensor  # tokens that count
    rejected_length: Tensor
    chosen_nll: Tensor  # -log p(y_w|x), always summed and without token weights

    @classmethod
    def split(
        cls,
        logps: Tensor,  # [2B]: rows 0..B-1 chosen, B..2B-1 rejected
        ref_logps: Tensor | None,  # [2B]
        lengths: Tensor,  # [2B]
        nll: Tensor | None = None,  # [2B]; None: -logps
        divergence: Callable[[Tensor], Tensor] | None = None,  # log-ratio -> score; None: the log-ratio itself
    ) -> Pairs:
        half = logps.shape[0] // 2
        ref = logps.new_zeros(logps.shape) if ref_logps is None else ref_logps
        score = logps - ref if divergence is None else divergence(logps - ref)
        nll = -logps if nll is None else nll
        return cls(
            chosen=logps[:half],
            rejected=logps[half:],
            ref_chosen=ref[:half],
            ref_rejected=ref[half:],
            chosen_score=score[:half],
            rejected_score=score[half:],
            chosen_length=lengths[:half],
            rejected_length=lengths[half:],
            chosen_nll=nll[:half],
        )

    def averaged(self) -> Pairs:
        """Per token: logps and scores divided by their sequence's length (1 where it is empty)."""
        chosen, rejected = self.chosen_length.clamp(min=1), self.rejected_length.clamp(min=1)
        return self._replace(
            chosen=self.chosen / chosen,
            rejected=self.rejected / rejected,
            ref_chosen=self.ref_chosen / chosen,
            ref_rejected=self.ref_rejected / rejected,
            chosen_score=self.chosen_score / chosen,
            rejected_score=self.rejected_score / rejected,
        )

    def without_reference(self) -> Pairs:
        """The same with the reference's logps 0."""
        none = self.ref_chosen.new_zeros(self.ref_chosen.shape)
        return self._replace(ref_chosen=none, ref_rejected=none, chosen_score=self.chosen, rejected_score=self.rejected)

    @property
    def chosen_ratio(self) -> Tensor:
        """r_w = log p(y_w|x) - log p_ref(y_w|x)"""
        return self.chosen - self.ref_chosen

    @property
    def rejected_ratio(self) -> Tensor:
        """r_l = log p(y_l|x) - log p_ref(y_l|x)"""
        return self.rejected - self.ref_rejected

    @property
    def margin(self) -> Tensor:
        """h = r_w - r_l (of the scores, under another f-divergence than the reverse KL)"""
        return self.chosen_score - self.rejected_score
