"""Token sequences to token logps: the reference's forward and `linear_token_logps`, nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..batch import IGNORE_INDEX
from ..evaluating import evaluating
from ..head import linear_token_logps
from .errors import CacheError
from .key import Reference, Sequence


class Scorer:
    """Token logps of sequences under a loaded model, in evaluation mode and without gradients.

    Raises:
        CacheError: a model whose logits are not `head(last_hidden_state)` with the softcap and scale of the
            reference: checked against the model's own logits on a few tokens.
    """

    def __init__(self, model: Any, reference: Reference, backend: str = "auto") -> None:
        config = getattr(model, "active_peft_config", None)
        if config is not None and config.is_prompt_learning:
            raise CacheError("model: prompt-learning adapters are not supported; merge or disable the adapter")
        self._model = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._reference, self._backend = reference, backend
        head = self._model.get_output_embeddings()
        if not isinstance(head, nn.Linear) or not head.weight.is_floating_point():
            raise CacheError(f"model: expected an LM head that is a plain Linear layer, got {type(head).__name__}")
        self._check()

    def __call__(self, sequences: list[Sequence]) -> list[np.ndarray]:
        """float32 `[count]` of each sequence: the logps of its counted tokens. One forward of a padded batch.

        Raises:
            CacheError: a token id that the model does not have.
        """
        logps = [np.zeros(0, np.float32)] * len(sequences)
        scored = [i for i, sequence in enumerate(sequences) if sequence.counted.any()]
        if not scored:
            return logps
        ids, attended, counted = padded([sequences[i] for i in scored])
        vocabulary = self._model.get_input_embeddings().num_embeddings
        if ids.max() >= vocabulary or ids.min() < 0:
            raise CacheError(f"token id {ids.max()}: the model has {vocabulary}; is it another model's tokenizer?")
        result = self._token_logps(*map(torch.from_numpy, (ids, attended, counted)))
        for row, i in enumerate(scored):
            logps[i] = result[row, :-1][counted[row, 1:]]
        return logps

    def _token_logps(self, ids: Tensor, attended: Tensor, counted: Tensor) -> np.ndarray:
        """float32 `[B, T]`; position t holds the logp of ids[t+1], 0 where that does not count."""
        head, reference = self._model.get_output_embeddings(), self._reference
        weight, bias = (x.full_tensor() if hasattr(x, "full_tensor") else x for x in (head.weight, head.bias))
        device = self._model.device
        with torch.no_grad(), evaluating(self._model), self._autocast(device):
            hidden = self._model.base_model(
                input_ids=ids.to(device), attention_mask=attended.long().to(device), use_cache=False
            ).last_hidden_state.to(weight.device)
            return (
                linear_token_logps(
                    hidden,
                    weight,
                    ids.masked_fill(~counted, IGNORE_INDEX).to(weight.device),
                    bias=bias,
                    shift=True,
                    temperature=reference.temperature,
                    softcap=reference.softcap,
                    logit_scale=reference.logit_scale,
                    backend=self._backend,
                )
                .logps.float()
                .cpu()
                .numpy()
            )

    def _autocast(self, device: torch.device) -> Any:
        # Off too where it is not the reference's: the caller's own must not change what a key stands for
        dtype = self._reference.autocast
        return torch.autocast(
            device.type, dtype=None if dtype is None else getattr(torch, dtype), enabled=dtype is not None
        )

    def _check(self) -> None:
        vocabulary = self._model.get_input_embeddings().num_embeddings
        ids = np.arange(1, 9, dtype=np.int32) * 7 % vocabulary
        ours = self([Sequence(ids, np.ones(len(ids), np.bool_))])[0]
        device = self._model.device
        batch = torch.from_numpy(ids).long().to(device)[None]
        with torch.no_grad(), evaluating(self._model), self._autocast(device):
            logits = self._model(input_ids=batch, use_cache=False).logits.float() / self._reference.temperature
        truth = logits[:, :-1].log_softmax(-1).gather(-1, batch[:, 1:, None].to(logits.device)).flatten().cpu().numpy()
        rounding = 1e-3 if self._reference.dtype == "float32" and self._reference.autocast is None else 3e-2
        error = np.abs(ours - truth).max()
        if not error <= rounding * max(1.0, float(logits.abs().max())):
            raise CacheError(
                f"model: {type(self._model).__name__} does not make its logits of head(last_hidden_state), softcap "
                f"{self._reference.softcap} and scale {self._reference.logit_scale}: logps differ by {error:.3g}"
            )


def padded(sequences: list[Sequence]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ids int64, attended and counted bool, each `[n, T]`, padded on the right."""
    ids = np.zeros((len(sequences), max(len(one.ids) for one in sequences)), np.int64)
    attended, counted = np.zeros((2, *ids.shape), np.bool_)
    for row, one in enumerate(sequences):
        n = len(one.ids)
        ids[row, :n], attended[row, :n], counted[row, :n] = one.ids, True, one.mask
    return ids, attended, counted
