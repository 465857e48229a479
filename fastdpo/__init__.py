"""fastdpo: the fastest and leanest loss for preference tuning of language models."""

from . import ops as _ops  # noqa: F401  registers torch.ops.fastdpo
from .head import LinearTokenLogpsFunction, TokenLogps, TokenLogpsFunction, linear_token_logps, token_logps
from .metrics import preference_metrics
from .modules import DPOLoss, LinearDPOLoss
from .pair_kernel import DPOFunction
from .parallel import SequenceParallel, VocabParallel
from .preference import PreferenceOutput, dpo_loss, linear_dpo_loss, loss_of_tokens
from .schedule import BetaSchedule
from .sequences import sequence_logps
from .unpaired import UnpairedOutput, kto_kl, linear_unpaired_loss, unpaired_loss

__version__ = "0.1.0"
__all__ = [
    "BetaSchedule",
    "DPOFunction",
    "DPOLoss",
    "LinearDPOLoss",
    "LinearTokenLogpsFunction",
    "PreferenceOutput",
    "SequenceParallel",
    "TokenLogps",
    "TokenLogpsFunction",
    "UnpairedOutput",
    "VocabParallel",
    "dpo_loss",
    "kto_kl",
    "linear_dpo_loss",
    "linear_token_logps",
    "linear_unpaired_loss",
    "loss_of_tokens",
    "preference_metrics",
    "sequence_logps",
    "token_logps",
    "unpaired_loss",
]
