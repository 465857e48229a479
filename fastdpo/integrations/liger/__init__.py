"""Liger: `LigerFusedLinear{DPO,CPO,SimPO,ORPO,KTO}Loss` of liger-kernel 0.8.5 by fastdpo's head.

Same constructors, same calls, same returned values; change the import:

    from fastdpo.integrations.liger import LigerFusedLinearDPOLoss    # was liger_kernel.chunked_loss

`compiled` and `chunk_size` are accepted and mean nothing: nothing is compiled, and memory does not depend on a chunk.
What differs from Liger:

- Every loss that `fastdpo.linear_dpo_loss` knows is a `loss_type`. One that Liger does not have keeps its own averaging
  and NLL term, unless average_log_prob or compute_nll_loss is True.
- label_smoothing in sigmoid is cDPO's, and an option that a loss does not use raises; Liger ignores both.
- Options are checked when a module is made.
- A KTO `kl` of one number per sequence belongs to that sequence, as in Liger with a chunk_size of the whole batch; in
  smaller chunks Liger takes every sequence with the kl of all others.
- An average over an empty completion is 0 and not NaN.

Liger itself need not be installed. functions.py: the losses; modules.py: the same as modules.
"""

from .functions import (
    LigerFusedLinearCPOFunction,
    LigerFusedLinearDPOFunction,
    LigerFusedLinearKTOFunction,
    LigerFusedLinearORPOFunction,
    LigerFusedLinearSimPOFunction,
    PairAuxiliary,
    liger_fused_linear_cpo,
    liger_fused_linear_dpo,
    liger_fused_linear_kto,
    liger_fused_linear_orpo,
    liger_fused_linear_simpo,
)
from .modules import (
    LigerFusedLinearCPOLoss,
    LigerFusedLinearDPOLoss,
    LigerFusedLinearKTOLoss,
    LigerFusedLinearORPOLoss,
    LigerFusedLinearSimPOLoss,
)

__all__ = [
    "LigerFusedLinearCPOFunction",
    "LigerFusedLinearCPOLoss",
    "LigerFusedLinearDPOFunction",
    "LigerFusedLinearDPOLoss",
    "LigerFusedLinearKTOFunction",
    "LigerFusedLinearKTOLoss",
    "LigerFusedLinearORPOFunction",
    "LigerFusedLinearORPOLoss",
    "LigerFusedLinearSimPOFunction",
    "LigerFusedLinearSimPOLoss",
    "PairAuxiliary",
    "liger_fused_linear_cpo",
    "liger_fused_linear_dpo",
    "liger_fused_linear_kto",
    "liger_fused_linear_orpo",
    "liger_fused_linear_simpo",
]
