"""Counts the bytes that Triton kernels load and store, by argument, while Triton's interpreter runs them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder


class Moved(NamedTuple):
    """Bytes by the name of the kernel's argument: a lane that is masked off moves none. Atomics are not counted."""

    loaded: Counter[str]
    stored: Counter[str]
    sectors: Counter[str]  # loaded, if each load fetches whole sectors of 32 bytes, and the same one once


@contextmanager
def counted(sectors: bool = False) -> Iterator[Moved]:
    """Counts what kernels move while interpreted; sectors, which takes time, where wanted."""
    moved = Moved(Counter(), Counter(), Counter())
    tensors: dict[str, Tensor] = {}
    on_host, load, store = (
        GridExecutor._init_args_hst,
        InterpreterBuilder.create_masked_load,
        InterpreterBuilder.create_masked_store,
    )

    def note_arguments(self: Any, args: Any, kwargs: Any) -> Any:
        found = on_host(self, args, kwargs)
        named = {**dict(zip(self.arg_names, found[0], strict=False)), **found[1]}
        tensors.clear()
        tensors.update((name, value) for name, value in named.items() if isinstance(value, Tensor))
        return found

    def addresses(pointers: Any, mask: Any) -> np.ndarray:
        return pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].ravel()

    def owner(address: int) -> str:
        for name, tensor in tensors.items():
            begin = tensor.untyped_storage().data_ptr()
            if begin <= address < begin + tensor.untyped_storage().nbytes():
                return name
        raise LookupError(f"no argument of the kernel holds address {address:#x}")

    # A plain load or store calls the masked one
    def masked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        result = load(self, pointers, mask, *rest)
        where = addresses(pointers, mask)
        if where.size:
            name = owner(int(where[0]))
            moved.loaded[name] += where.size * result.data.itemsize
            if sectors:
                moved.sectors[name] += np.unique(where // 32).size * 32
        return result

    def masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        where = addresses(pointers, mask)
        if where.size:
            moved.stored[owner(int(where[0]))] += where.size * value.data.itemsize
        return store(self, pointers, value, mask, *rest)

    GridExecutor._init_args_hst = note_arguments
    InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = masked_load, masked_store
    try:
        yield moved
    finally:
        GridExecutor._init_args_hst = on_host
        InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = load, store
