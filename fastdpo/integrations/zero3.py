"""DeepSpeed ZeRO-3: a parameter whose data is there only while it is gathered, through autograd.

Tried with DeepSpeed 0.19.8 on the CPU, in one process and in two (tests/test_trl_sharded.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn


def is_partitioned(tensor: Tensor) -> bool:
    """Whether the tensor is a parameter that ZeRO-3 partitions, be it gathered now or not."""
    return hasattr(tensor, "ds_id")


def announce(module: nn.Module) -> None:
    """Ask the module for each of its parameters, when another module's forward is about to use them.

    So DeepSpeed learns that they take part there (its "external parameters"), and has them whole again in the backward
    too, when their gradients arrive.
    """
    for part in module.modules():
        for name, _ in part.named_parameters(recurse=False):
            getattr(part, name)


@contextmanager
def regathered(
    parameters: Iterable[Tensor | None], gather: Callable[..., AbstractContextManager[None]]
) -> Iterator[None]:
    """Let autograd save a partitioned parameter as itself, and gather it again when the backward asks for its data.

    What is saved inside the block would otherwise be empty in the backward: ZeRO-3 frees the data behind it. No copy
    of a parameter lives from forward to backward. Gradients reach the parameter itself, whole, where ZeRO-3's hooks
    await them.

    Args:
        parameters: those that the block computes with; the ones that are not partitioned are saved as ever.
        gather: `gather(parameter)` is a context in which its data is whole, such as
            `deepspeed.zero.GatheredParameters`; entered now by the caller, and in the backward, on every rank.
    """
    partitioned = {id(p): p for p in parameters if p is not None and is_partitioned(p)}
    if not partitioned:
        yield
        return

    storages = {_storage(parameter) for parameter in partitioned.values()}

    def pack(saved: Tensor) -> Tensor:
        if id(saved) in partitioned:
            return saved
        return saved.clone() if _storage(saved) in storages else saved  # a view, such as the transpose

    def unpack(saved: Tensor) -> Tensor:
        if id(saved) not in partitioned:
            return saved
        if saved.shape == saved.ds_shape:  # type: ignore[attr-defined]
            return saved.detach()
        with gather(saved):
            return saved.detach().clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
