"""Library products whose sums stay float32: gradients are rounded once, at their end.

cuBLAS can leave products of bf16 and fp16 in float32 (`out_dtype`). The CPU's library cannot, nor can PyTorch before
2.10 add them to a float32 sum, nor some of its ROCm builds; so what a device can do is tried, once.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .inputs import result_dtype


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in result_dtype; where the library must, rounded to a's dtype before"""
    if keeps_float32(a):
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b).to(result_dtype(a.dtype))


def write_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a @ b, rounded once"""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif out.dtype == torch.float32 and keeps_float32(a):
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:
        out.copy_(torch.mm(a, b))


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total (float32; float64 from float64) += a @ b"""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif keeps_float32(a, add=True):
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += product(a, b)


def keeps_float32(like: Tensor, add: bool = False) -> bool:
    """Whether the library leaves products of like's dtype, bf16 or fp16, in float32 (add: and adds them to it)."""
    half = like.dtype in (torch.bfloat16, torch.float16)
    return half and like.device.type != "cpu" and _tried(like.device, like.dtype, add)


@functools.cache
def _tried(device: torch.device, dtype: torch.dtype, add: bool) -> bool:
    small, total = (torch.zeros((8, 8), dtype=kind, device=device) for kind in (dtype, torch.float32))
    try:
        if add:
            torch.addmm(total, small, small, out_dtype=torch.float32, out=total)
        else:
            torch.mm(small, small, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return True
