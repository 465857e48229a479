"""A reference model: which function it is, without loading it where that can be."""

from __future__ import annotations

import functools
from typing import Any

import torch

from ..options import check_number, head_options
from . import fingerprint
from .errors import CacheError
from .key import Reference
from .score import Scorer

DTYPES = ("float32", "bfloat16", "float16")


class ReferenceModel:
    """A causal language model whose logps are to be cached.

    Args:
        model: a `PreTrainedModel` or `PeftModel`, scored where and as it is (enabled adapters included); or a folder
            or hub id, loaded when something has to be scored.
        dtype: for a folder or hub id: "float32" (TRL's default), "bfloat16", "float16" or "auto".
        autocast: dtype that the products run in, None: the weights'.
        temperature: divides the logits.
        device: for a folder or hub id; None: the accelerator if there is one.
        backend: of `linear_token_logps`.
        trust_remote_code: of `from_pretrained`.
        revision: of the hub id.
    """

    def __init__(
        self,
        model: Any,
        *,
        dtype: str = "float32",
        autocast: str | None = None,
        temperature: float = 1.0,
        device: str | torch.device | None = None,
        backend: str = "auto",
        trust_remote_code: bool = False,
        revision: str | None = None,
    ) -> None:
        if dtype not in (*DTYPES, "auto"):
            raise CacheError(f"dtype: expected one of {', '.join(DTYPES)} or 'auto', got {dtype!r}")
        if autocast is not None and autocast not in DTYPES[1:]:
            raise CacheError(f"autocast: expected bfloat16, float16 or None, got {autocast!r}")
        check_number("temperature", temperature, above=0)
        head_options(backend=backend)
        self.path = model if isinstance(model, str) else None
        self._model: Any = None if isinstance(model, str) else model
        self._dtype, self._autocast, self._temperature = dtype, autocast, float(temperature)
        self._device, self._backend = device, backend
        self._hub: dict[str, Any] = {
            "trust_remote_code": trust_remote_code,
            **({} if revision is None else {"revision": revision}),
        }

    @property
    def name(self) -> str:
        """Its folder or hub id, as far as it is known."""
        return self.path or getattr(self._model.config, "_name_or_path", "") or type(self._model).__name__

    @functools.cached_property
    def reference(self) -> Reference:
        """What the keys of its logps are made of."""
        known = None
        if self._model is None:
            assert self.path is not None
            known = fingerprint.of_checkpoint(self.path, self._dtype, **self._hub)
        if known is None:
            model = self.loaded
            known = fingerprint.Checkpoint(fingerprint.of_model(model), model.config, model.dtype)
        softcap, scale = fingerprint.head_transform(known.config)
        dtype = str(known.dtype).removeprefix("torch.")
        return Reference(known.fingerprint, dtype, self._autocast, self._temperature, softcap, scale)

    @functools.cached_property
    def loaded(self) -> Any:
        """The model itself."""
        if self._model is not None:
            return self._model
        from transformers import AutoModelForCausalLM

        load: Any = AutoModelForCausalLM.from_pretrained
        device = self._device or torch.accelerator.current_accelerator() or "cpu"
        dtype = self._dtype if self._dtype == "auto" else getattr(torch, self._dtype)
        return load(self.path, dtype=dtype, **self._hub).to(device)

    @functools.cached_property
    def scorer(self) -> Scorer:
        """Gives the logps; loads the model."""
        return Scorer(self.loaded, self.reference, self._backend)
