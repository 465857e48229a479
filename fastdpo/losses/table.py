"""LOSSES: name -> the loss's function, its paper and the options that it uses.

To add a loss: a function of (Pairs, LossOptions) in margin.py or sides.py, its docstring the equation, and a row here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor

from ..names import did_you_mean
from .margin import aot, aot_unpaired, discopop, exo_pair, hinge, ipo, orpo, robust, sigmoid
from .pairs import LossOptions, Pairs
from .sides import apo_down, apo_zero, apo_zero_side, bco_pair, bco_side, kto, kto_side, nca_pair, nll, sft, sppo_hard

LossFunction = Callable[[Pairs, LossOptions], Tensor]  # -> [B]
SideFunction = Callable[[Tensor, "bool | Tensor", LossOptions], Tensor]  # (log-ratio [S], desirable [S]) -> [S]

# Options that not every loss uses, in groups
REFERENCE = frozenset({"ref_logps", "parameterization"})
TOKENS = frozenset({"token_weights", "ld_alpha", "length_normalize"})
PAIRED = frozenset({"pair_weights", "use_weighting"})  # and so a beta or gamma per pair
DIVERGENCE = frozenset({"f_divergence_type", "f_alpha_divergence_coef"})
SMOOTHING, GAMMA, BETA = frozenset({"label_smoothing"}), frozenset({"gamma"}), frozenset({"betas"})
SEQUENCE = TOKENS | PAIRED | REFERENCE | BETA
MARGIN = SEQUENCE | DIVERGENCE | GAMMA
EVERYTHING = MARGIN | SMOOTHING | {"discopop_tau", "kl"}


class Loss(NamedTuple):
    """A row of the table. `alpha`, `gamma` and `length_normalize` are its defaults of these options."""

    function: LossFunction
    paper: str = ""
    uses: frozenset[str] = EVERYTHING
    needs: str | None = None  # an option that must be given
    alpha: float = 0.0
    gamma: float = 0.0
    length_normalize: bool = False
    side: SideFunction | None = None  # the same of single completions, desirable or not; None: it needs pairs

    def __call__(self, pairs: Pairs, options: LossOptions) -> Tensor:
        """The loss of each pair, `[B]`, as this row defines it: with its averages, its gamma where options have none,
        its NLL term, and without a reference if it has none. pairs hold sums, as `Pairs.split` makes them.
        """
        if "ref_logps" not in self.uses:
            pairs = pairs.without_reference()
        if options.gamma is None:
            options = options._replace(gamma=self.gamma)
        values = self.function(pairs.averaged() if self.length_normalize else pairs, options)
        return values + self.alpha * nll(pairs) if self.alpha else values


LOSSES: dict[str, Loss] = {
    "sigmoid": Loss(sigmoid, "DPO, arXiv 2305.18290, eq. 7; smoothed: cDPO", MARGIN | SMOOTHING),
    "sigmoid_norm": Loss(sigmoid, "Tülu 3, arXiv 2411.15124", MARGIN | SMOOTHING, length_normalize=True),
    "hinge": Loss(hinge, "SLiC, arXiv 2305.10425, on DPO's rewards", MARGIN),
    # Per token, as its authors told TRL; length_normalize=False is the paper's text
    "ipo": Loss(ipo, "arXiv 2310.12036, eq. 17", SEQUENCE | DIVERGENCE, length_normalize=True),
    "robust": Loss(robust, "arXiv 2403.00409", MARGIN | SMOOTHING),
    "exo_pair": Loss(exo_pair, "EXO, arXiv 2402.00856, eq. 16", MARGIN | SMOOTHING, needs="label_smoothing"),
    "discopop": Loss(discopop, "arXiv 2406.08414, eq. 5", MARGIN | {"discopop_tau"}),
    "nca_pair": Loss(nca_pair, "NCA, arXiv 2402.05369", SEQUENCE),
    "bco_pair": Loss(bco_pair, "BCO, arXiv 2404.04656, without its reward shift", SEQUENCE, side=bco_side),
    "sppo_hard": Loss(sppo_hard, "SPPO, arXiv 2405.00675, eq. 4.7 with P = 1 and 0", SEQUENCE),
    "aot": Loss(aot, "arXiv 2406.05882", (SEQUENCE | SMOOTHING | GAMMA) - PAIRED),
    "aot_unpaired": Loss(aot_unpaired, "arXiv 2406.05882", (SEQUENCE | SMOOTHING | GAMMA) - PAIRED),
    "apo_zero": Loss(apo_zero, "APO, arXiv 2408.06266, eq. 7", SEQUENCE, side=apo_zero_side),
    "apo_down": Loss(apo_down, "APO, arXiv 2408.06266, eq. 8", SEQUENCE),
    "kto": Loss(kto, "arXiv 2402.01306; chosen desirable, rejected undesirable", SEQUENCE | {"kl"}, side=kto_side),
    "cpo": Loss(sigmoid, "arXiv 2401.08417", TOKENS | PAIRED | BETA | SMOOTHING | GAMMA, alpha=1.0),
    "simpo": Loss(
        sigmoid, "arXiv 2405.14734, eq. 6", TOKENS | PAIRED | BETA | SMOOTHING | GAMMA, gamma=0.5, length_normalize=True
    ),
    "orpo": Loss(orpo, "arXiv 2403.07691, eq. 6 and 7", TOKENS | PAIRED | BETA, alpha=1.0, length_normalize=True),
    "sft": Loss(sft, "", PAIRED),
}


# Those of TRL's DPOTrainer; for the others it has trainers of their own, or none
TRL_LOSSES = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
)
# Other projects' names
ALIASES = {"dpo": "sigmoid", "kto_pair": "kto"}


def find_loss(loss_type: str | LossFunction, among: Mapping[str, Loss] = LOSSES) -> Loss:
    """The row of a name; a row of its own for a callable, which may use every option. among: what an error names.

    Raises:
        ValueError: a name that is not in the table.
        TypeError: neither a name nor a callable.
    """
    if isinstance(loss_type, Loss):
        return loss_type
    if isinstance(loss_type, str):
        if loss_type not in LOSSES:
            raise ValueError(
                f"loss_type: unknown loss {loss_type!r}, expected one of {', '.join(among)}"
                f"{did_you_mean(loss_type, among, ALIASES)}"
            )
        return LOSSES[loss_type]
    if not callable(loss_type):
        raise TypeError(f"loss_type: expected a name, a callable or a list of them, got {loss_type!r}")
    return Loss(loss_type)


def loss_name(loss_type: object) -> str:
    """A loss as an error message calls it."""
    return repr(loss_type) if isinstance(loss_type, str) else getattr(loss_type, "__name__", type(loss_type).__name__)
