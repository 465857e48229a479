"""A reference model: which function it is, without loading it where that can be."""

from __future__ import annotations

import functools
import os
from typing import Any

import torch

from ..integrations.head_transform import head_transform
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
        named = isinstance(model, (str, os.PathLike))
        self.path = os.fspath(model) if named else None
        self._model: Any = None if named else model
        self._stamp: Any = None  # of the model, as its fingerprint was taken
        self._dtype, self._autocast, self._temperature = dtype, autocast, float(temperature)
        self._device, self._backend = device, backend
        self._hub: dict[str, Any] = {
            "trust_remote_code": trust_remote_code,
            **({} if revision is None else {"revision": revision}),
        }

    @property
    def name(self) -> str:
        """Its folder or hub id, as far as it is known."""
        if self.path is not None:
            return os.path.abspath(self.path) if os.path.isdir(self.path) else self.path
        return getattr(self._model.config, "_name_or_path", "") or type(self._model).__name__

    @functools.cached_property
    def reference(self) -> Reference:
        """What the keys of its logps are made of.

        Raises:
            CacheError: files that cannot be read.
            ValueError: a scale or cap of its head that is not known (`head_transform`).
        """
        known = None
        if self._model is None:
            known = self._read(fingerprint.of_checkpoint, self._dtype)
        if known is None:
            if self._model is None:
                self._model = self._load()
            self._stamp = fingerprint.stamp(self._model)
            known = fingerprint.Checkpoint(fingerprint.of_model(self._model), self._model.config, self._model.dtype)
        softcap, scale = head_transform(known.config)
        dtype = str(known.dtype).removeprefix("torch.")
        return Reference(known.fingerprint, dtype, self._autocast, self._temperature, softcap, scale)

    @property
    def loaded(self) -> Any:
        """The model itself.

        Raises:
            CacheError: its files are not those any more that were fingerprinted; or they cannot be read.
        """
        expected = self.reference.fingerprint
        if self._model is None:
            model = self._load()
            if fingerprint.of_model(model) != expected:
                raise CacheError(f"model: {self.path} changed on disk after it was fingerprinted; start again")
            self._model, self._stamp = model, fingerprint.stamp(model)
        return self._model

    def check_unchanged(self) -> None:
        """Raise CacheError if the model is not the one any more that was fingerprinted: trained on, say."""
        expected, model = self.reference.fingerprint, self.loaded
        seen = fingerprint.stamp(model)
        if seen != self._stamp:  # moved, perhaps
            if fingerprint.of_model(model) != expected:
                raise CacheError(
                    f"model: {self.name} changed after it was fingerprinted; what it scores now must not be stored as "
                    "the reference's. Give the cache a copy, or the folder it came from"
                )
            self._stamp = seen

    def _load(self) -> Any:
        from transformers import AutoModelForCausalLM

        dtype = self._dtype if self._dtype == "auto" else getattr(torch, self._dtype)
        return self._read(AutoModelForCausalLM.from_pretrained, dtype=dtype).to(
            self._device or torch.accelerator.current_accelerator() or "cpu"
        )

    def _read(self, function: Any, *arguments: Any, **keywords: Any) -> Any:
        from safetensors import SafetensorError

        try:
            return function(self.path, *arguments, **keywords, **self._hub)
        except SafetensorError as error:
            raise CacheError(f"model: {self.path}: its safetensors are cut short or damaged: {error}") from None

    @functools.cached_property
    def scorer(self) -> Scorer:
        """Gives the logps; loads the model."""
        return Scorer(self.loaded, self.reference, self._backend)
