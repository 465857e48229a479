"""TRL: `linear_token_logps` in place of `ChunkedLogProbFunction`.

TRL's trainers take everything they need from the LM head through one autograd Function. So the drop-in replaces that
Function and nothing else: losses, metrics, LoRA, precomputed references and data stay TRL's own code.

    from fastdpo.integrations.trl import FastDPOTrainer      # in place of trl.DPOTrainer

or, for any TRL trainer that scores tokens (SFT, DPO, KTO, GRPO, RLOO, ...):

    from fastdpo.integrations.trl import patch
    patch()

FastDPOTrainer also trains adapters on the LM head, which TRL refuses (trl_head.py, output_head.py).
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..head import linear_token_logps
from ..names import check_names
from ..options import HEAD_KEYWORDS, head_options
from .head_product import check_weight, whole
from .head_transform import HeadTransform, head_transform
from .output_head import check_head, output_head
from .zero3 import regathered

try:
    import trl as _trl
    from accelerate.utils import is_peft_model
    from trl.trainer import utils as _trl_utils

    from .trl_head import adapter_on_head_allowed, whole_heads
    from .trl_packing import PackingTrainer
except ImportError as error:
    raise ImportError(f"fastdpo.integrations.trl needs TRL: pip install fastdpo[trl] ({error})") from error

# Every place where TRL looks the Function up. `_use_triton` of trl.trainer.utils decides one thing only: whether the
# positions without a label are dropped before the head, or scored and thrown away. That of trl.kernels stays: TRL's
# Triton kernels ask it.
_FUNCTION = "ChunkedLogProbFunction"
_SITES = (
    ("trl.trainer.utils", f"_{_FUNCTION}"),
    ("trl.trainer.utils", "_use_triton"),
    ("trl.kernels", _FUNCTION),
    ("trl.kernels.chunked_logprob", _FUNCTION),
)
_NEEDED = (("trl.trainer.utils", "maybe_gather_lm_head_ctx"),)  # and used as it is
_ARGUMENTS = (
    *("ctx", "hidden", "weight", "bias", "targets", "temperature", "chunk_size"),
    *("final_logit_softcapping", "logit_scale", "outputs"),
)
_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")  # in the order in which TRL returns them

# What patch() found, for unpatch(); None while patch() is not in force
_before_patch: list[Any] | None = None


class TokenLogpFunction:
    """What TRL finds in place of its `ChunkedLogProbFunction`: an object whose `apply` has the same arguments."""

    def __init__(self, **head_keywords: Any) -> None:
        # A bad keyword raises here, not in the first step. TRL says all the others itself, at each call
        check_names("patch()", head_keywords, HEAD_KEYWORDS)
        head_options(**head_keywords)
        self.head_keywords = head_keywords
        #: The head that the next call is of, where weight and bias alone do not say it (trl_head.py)
        self.head: nn.Module | None = None
        #: The model's softcap and logit scale, where they are known better than TRL reads them
        self.transform: HeadTransform | None = None

    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = _OUTPUTS,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Per-token results of hidden @ weight.T + bias; replaces `trl.kernels.ChunkedLogProbFunction.apply`.

        Args:
            hidden: `[N, H]`, any float dtype; autocast holds.
            weight: `[V, H]`; a DTensor must have been gathered (TRL does), and a parameter that DeepSpeed ZeRO-3
                partitions be gathered for this call (TRL does); the backward gathers it again.
            bias: `[V]` or None.
            targets: int64 `[N]`; -100 is allowed: the position is not read and its results are 0.
            temperature, final_logit_softcapping, logit_scale: as for `linear_token_logps`.
            chunk_size: of TRL's tiles; without meaning here (`workspace_mb` bounds the memory).
            outputs: what to compute beside the log-probabilities; "log_probs" is allowed and changes nothing.

        Returns:
            (logprobs, entropy, log_sum_sq_probs, mean_logits, is_top1), each `[N]` float32, is_top1 bool; None where
            not in outputs. logprobs and entropy are differentiable.

        Raises:
            ValueError: an unknown entry in outputs; whatever `linear_token_logps` raises.
            UnsupportedHead: a quantised weight.
        """
        for name in outputs:
            if name not in ("log_probs", *_OUTPUTS):
                raise ValueError(f"outputs: unknown entry {name!r}, expected log_probs, {', '.join(_OUTPUTS)}")
        stats = tuple(name for name in _OUTPUTS if name in outputs)
        if self.transform is not None:
            final_logit_softcapping, logit_scale = self.transform
        head, self.head = self.head, None
        parameters = [weight, bias] if head is None else list(head.parameters())
        gather = _trl_utils.maybe_gather_lm_head_ctx
        with gather(*parameters), regathered(parameters, gather):
            if head is None:
                check_weight(weight)
            else:
                hidden, weight, bias = output_head(head, hidden)
                weight, bias = whole(weight), whole(bias)
            result = linear_token_logps(
                hidden,
                weight,
                targets,
                bias=bias,
                temperature=temperature,
                softcap=final_logit_softcapping,
                logit_scale=logit_scale,
                stats=stats,
                **self.head_keywords,
            )
        return result.logps, result.entropy, result.log_sum_sq_probs, result.mean_logits, result.is_top1


def patch(**head_keywords: Any) -> None:
    """Let every TRL trainer of this process score tokens with fastdpo, until `unpatch()`.

    Replaces `ChunkedLogProbFunction` (same five outputs, same gradients), and scores only the positions that count
    on every device (TRL does so where it has Triton, and scores all of them elsewhere). Call it before or after
    building a trainer. A second call changes nothing but the keywords.

    Args:
        head_keywords: `grad_tol`, `workspace_mb`, `backend`, as for `fastdpo.linear_token_logps`.

    Raises:
        RuntimeError: the installed TRL does not have the internals of 1.16.
        ValueError: a bad keyword value.
    """
    global _before_patch
    found = _current()
    _install(TokenLogpFunction(**head_keywords))
    if _before_patch is None:
        _before_patch = found


def unpatch() -> None:
    """Undo `patch()`: TRL gets back exactly what patch() found. Without a patch() before it, does nothing."""
    global _before_patch
    if _before_patch is not None:
        _restore(_before_patch)
        _before_patch = None


@contextmanager
def patched(**head_keywords: Any) -> Iterator[TokenLogpFunction]:
    """`patch()` for the length of a with-block, which restores exactly what was there before; nests.

    For one trainer at a time: TRL's names are the process's, so trainers in several threads would undo each other.
    Arguments and errors: as `patch`. A `patch()` or `unpatch()` inside the block lasts until its end.
    """
    global _before_patch
    found, found_before = _current(), _before_patch
    function = TokenLogpFunction(**head_keywords)
    _install(function)
    try:
        yield function
    finally:
        _restore(found)
        _before_patch = found_before


class FastDPOTrainer(PackingTrainer):
    """`trl.DPOTrainer` with fastdpo's head: same arguments, same losses, metrics and checkpoints.

    The head's softcap and logit scale are those of `head_transform`, which knows more models than TRL 1.16
    (RecurrentGemma, xLSTM, ...); a config with an unknown one raises.

    Every loss_type and option of `trl.DPOConfig`: the losses are TRL's own. TRL is patched during this trainer's own
    loss only, so other trainers of the process keep TRL's kernels.

    With `reference_cache=` no reference model is loaded; `parameterization=` takes the reference out of the reward, or
    the prompt out of the reference: `CachedReferenceTrainer`.

    With `padding_free=True` no padding is computed; with `shared_prompt=True`, nor any prompt twice: `PackingTrainer`.

    An adapter on the LM head, which `trl.DPOTrainer` refuses, is trained: PEFT's LoRA and DoRA, `target_parameters`,
    `modules_to_save`, `trainable_token_indices` (peft_head.py).

    Raises:
        UnsupportedHead: any other head, such as a quantised one.
        ValueError, TypeError: as `trl.DPOTrainer`, `patch`, `CachedReferenceTrainer` and `PackingTrainer`.
    """

    #: Keywords of `linear_token_logps` (grad_tol, workspace_mb, backend); set on a subclass or an instance
    head_keywords: dict[str, Any] = {}  # noqa: RUF012  (replaced, never changed in place)

    #: A schedule of beta, step -> number, such as fastdpo.BetaSchedule; None: args.beta throughout. Set on a subclass
    #: (a plain function as a staticmethod) or an instance; logged as "beta"
    beta_schedule: Callable[[int], float] | None = None

    def __init__(self, *args: Any, **keywords: Any) -> None:
        with adapter_on_head_allowed():
            super().__init__(*args, **keywords)
        for model in self._fused_models():
            check_head(model.get_output_embeddings())
        self._transform  # noqa: B018  raises now, not in the first step

    def _compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool) -> Any:
        if self.beta_schedule is not None:
            self.beta = self.beta_schedule(self.state.global_step)
            mode = "train" if cast(Any, self.model).training else "eval"
            self._metrics[mode]["beta"].append(self.beta)
        with self._fast_head():
            return super()._compute_loss(model, inputs, return_outputs)

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Reference sequence logps, chosen and rejected, each `[B]`, of one padded batch of TRL's collator."""
        with self._fast_head():
            return super().compute_ref_log_probs(model, inputs)

    @contextmanager
    def _fast_head(self) -> Iterator[None]:
        """TRL's fused forward scores tokens with fastdpo, and with all that the head computes."""
        models = self._fused_models()
        with patched(**self.head_keywords) as function, whole_heads(function, models):
            function.transform = self._transform
            yield

    @functools.cached_property
    def _transform(self) -> HeadTransform:
        found = {head_transform(model.config) for model in self._fused_models()}
        if len(found) > 1:
            raise ValueError(f"ref_model: its softcap and logit scale differ from the policy's: {found}")
        return found.pop()

    def _fused_models(self) -> list[Any]:
        """Policy and reference, those whose forward TRL fused with the head."""
        models = [
            self.accelerator.unwrap_model(model, keep_torch_compile=False)
            for model in (self.model, self.ref_model)
            if model is not None
        ]
        return [model.get_base_model() if is_peft_model(model) else model for model in models]


# --- the sites -------------------------------------------------------------------------------------------------------


def _always_compact(device: torch.device) -> bool:
    return True


def _current() -> list[Any]:
    """What TRL has at each site now; raises unless it is a TRL whose internals this module knows."""
    found, missing = [], []
    for module, name in (*_SITES, *_NEEDED):
        try:
            found.append(getattr(importlib.import_module(module), name))
        except (ImportError, AttributeError):
            missing.append(f"{module}.{name}")
    if missing:
        raise RuntimeError(
            f"fastdpo.integrations.trl knows the internals of TRL 1.16; TRL {_trl.__version__} has no "
            f"{', '.join(missing)}. Install trl==1.16.0."
        )
    del found[len(_SITES) :]
    for value in found:
        forward = getattr(value, "forward", None)
        if forward is not None and tuple(inspect.signature(forward).parameters) != _ARGUMENTS:
            raise RuntimeError(
                f"fastdpo.integrations.trl knows the internals of TRL 1.16; in TRL {_trl.__version__} {_FUNCTION} "
                f"takes {inspect.signature(forward)}, expected ({', '.join(_ARGUMENTS)}). Install trl==1.16.0."
            )
    return found


def _install(function: TokenLogpFunction) -> None:
    _restore([_always_compact if name == "_use_triton" else function for _, name in _SITES])


def _restore(values: list[Any]) -> None:
    for (module, name), value in zip(_SITES, values, strict=True):
        setattr(importlib.import_module(module), name, value)
