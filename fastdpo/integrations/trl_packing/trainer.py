"""DPOTrainer whose models run packed: `padding_free=`, `shared_prompt=`. Losses, metrics and batches stay TRL's."""

from __future__ import annotations

import copy
import inspect
from contextlib import AbstractContextManager
from typing import Any, cast

from torch import Tensor, nn
from trl import DPOTrainer

from ..trl_reference import CachedReferenceTrainer
from .forward import PackedForward, packed, unwrapped
from .support import PackingError, refusal


class PackingTrainer(CachedReferenceTrainer):
    """`CachedReferenceTrainer` that computes each batch as one row without padding.

    Same losses, gradients and metrics as padded, to rounding; also for the reference, precomputed or not.
    A model that runs SDPA runs it once a sequence from then on (attn_implementation "fastdpo_segments", which is SDPA
    for every other call); FlashAttention gets the lengths; flex and eager attention get a mask.

    Args:
        padding_free: no padding is computed. None: as `args.padding_free`, which TRL 1.16 itself ignores.
        shared_prompt: nor are prompts twice: chosen and rejected continue one prompt (arXiv 2410.20305). SDPA, flex and
            eager attention; implies padding_free.
        The others: `CachedReferenceTrainer`.

    Raises:
        PackingError: a model whose sequences would leak into each other, or anything else that packing cannot honour.
        ValueError: options that contradict each other.
    """

    def __init__(
        self, *args: Any, padding_free: bool | None = None, shared_prompt: bool = False, **keywords: Any
    ) -> None:
        named = inspect.signature(DPOTrainer.__init__).bind_partial(self, *args).arguments
        del named["self"]
        holder = named if "args" in named else keywords
        config: Any = holder.get("args")
        asked = config is not None and config.padding_free
        if padding_free is False and (asked or shared_prompt):
            other = "args.padding_free" if asked else "shared_prompt"
            raise ValueError(f"padding_free: False contradicts {other}=True")
        self._packing = "shared_prompt" if shared_prompt else "padding_free" if padding_free or asked else None
        self._forwards: dict[nn.Module, PackedForward] = {}
        if asked:  # TRL would warn that it does not
            holder["args"] = config = copy.copy(config)
            config.padding_free = False
        super().__init__(**named, **keywords)
        if asked:
            config.padding_free = cast(Any, self.args).padding_free = True
        self.padding_free = self._packing is not None
        self._packed()

    def _compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool) -> Any:
        with self._packed():
            return super()._compute_loss(model, inputs, return_outputs)

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Reference sequence logps, chosen and rejected, each `[B]`, of one padded batch of TRL's collator."""
        with self._packed():
            return super().compute_ref_log_probs(model, inputs)

    def _packed(self) -> AbstractContextManager[None]:
        """With-block in which policy and reference run packed; raises for what cannot."""
        if self._packing is None:
            return packed()
        self._check(self._packing)
        models = [model for model in (self.model, self.ref_model) if model is not None]
        bases = [unwrapped(self.accelerator.unwrap_model(model, keep_torch_compile=False)) for model in models]
        self._forwards = {base: self._forwards.get(base) or PackedForward(base, self._packing) for base in bases}
        return packed(*self._forwards.values())

    def _check(self, option: str) -> None:
        """Raise PackingError for what of the trainer cannot be honoured packed."""
        policy: Any = self.accelerator.unwrap_model(self.model)
        for config in getattr(policy, "peft_config", {}).values():
            if config.is_prompt_learning:
                raise refusal(option, policy, f"{config.peft_type.value} puts tokens before each row")
            if getattr(config, "alora_invocation_tokens", None):
                raise refusal(option, policy, "activated LoRA looks for its tokens once in each row")
        if self.args.neftune_noise_alpha is not None:
            raise PackingError(
                f"neftune_noise_alpha: {self.args.neftune_noise_alpha}; its noise depends on the length of a row, "
                f"expected None with {option}"
            )
        parallelism: Any = getattr(self.accelerator, "parallelism_config", None)
        if parallelism is not None and (parallelism.cp_size > 1 or getattr(parallelism, "sp_size", 1) > 1):
            raise PackingError(f"parallelism_config: context and sequence parallelism cut rows; {option} cannot")
