"""The batches that `fastdpo bench` measures on: the best that the model and data at hand allow, and what they are."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import torch

from . import inputs
from .arguments import BenchError, Head
from .providers import Batch


class Work(NamedTuple):
    batches: dict[str, Batch]  # by kind; the first is for all contenders
    words: str  # what they are
    notes: list[str]


def work_of(options: argparse.Namespace, head: Head, tokens: int, dtype: torch.dtype, device: torch.device) -> Work:
    """Hidden states of the model on the data, or on text of its own; where it has no weights here, random ones.

    Raises:
        BenchError: data for a model without weights; a model that does not fit the device.
        ValueError, OSError: data or a model that cannot be read.
    """
    notes: list[str] = []
    if head.config is not None:
        from ..integrations.head_transform import head_transform

        if head_transform(head.config).softcap is not None:
            notes.append("the model's softcap is left out, for every contender")
        if weights_at_hand(options.model):
            try:
                return _real(options, tokens, dtype, device, notes)
            except torch.OutOfMemoryError:
                raise BenchError(
                    f"MODEL {options.model}: does not fit {device}; expected one that does, --device cpu, "
                    f"or the sizes of its head: --hidden {head.width} --vocab {head.vocab}"
                ) from None
        if options.data is not None:
            raise BenchError(f"--data {options.data}: the weights of {options.model} are not on this machine")
        notes.append(f"the weights of {options.model} are not on this machine: only its sizes count here")
    kinds = ("peaked", "dense")
    batches = {kind: inputs.random_batch(kind, tokens, head.vocab, head.width, dtype) for kind in kinds}
    words = "random inputs: peaked, as a trained model's softmax is, and dense, of which nothing can be left out"
    return Work(batches, words, notes)


def weights_at_hand(model: str) -> bool:
    """Whether a folder holds weights, or the hub's cache those of an id; nothing is downloaded."""
    if Path(model).is_dir():
        return any(True for ending in ("*.safetensors", "*.bin") for _ in Path(model).glob(ending))
    from huggingface_hub import try_to_load_from_cache

    names = ("model.safetensors", "model.safetensors.index.json")
    return any(isinstance(try_to_load_from_cache(model, name), str) for name in names)


def _real(options: argparse.Namespace, tokens: int, dtype: torch.dtype, device: torch.device, notes: list[str]) -> Work:
    if options.data is None:
        batch = inputs.sampled_batch(options.model, tokens, dtype, device)
        words = f"hidden states of {options.model} on text that it sampled itself (your own: --data pairs.jsonl)"
        return Work({"sampled": batch}, words, notes)
    exact = options.tokens is not None
    batch = inputs.real_batch(options.model, options.data, 0, 1024, tokens, dtype, exact, device)
    return Work({"real": batch}, f"hidden states of {options.model} on the completions of {options.data}", notes)
