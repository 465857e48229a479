"""The tensors that the head takes: shapes, dtypes, devices; one clear error per disagreement."""

from __future__ import annotations

import torch
from torch import Tensor


def as_rows(logits: Tensor, labels: Tensor) -> Tensor:
    """logits `[..., V]` as `[G, R, V]`, without a copy where strides allow it: kernels take any strides of G and R.

    Raises:
        TypeError: logits are not floats.
        ValueError: labels are not shaped like logits without V, or on another device.
    """
    check_tensor("logits", logits)
    check_tensor("labels", labels, floats=False)
    if logits.dim() < 2:
        raise ValueError(f"logits: expected [..., V] with at least one row dimension, got shape {list(logits.shape)}")
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels: expected the shape of logits without its last dimension, {list(logits.shape[:-1])}, "
            f"got {list(labels.shape)}"
        )
    if labels.device != logits.device:
        raise ValueError(f"labels: expected on {logits.device} like logits, got {labels.device}")
    if logits.shape[-1] == 0:
        raise ValueError(f"logits: expected a vocabulary of at least 1, got shape {list(logits.shape)}")
    if logits.stride(-1) != 1 and logits.shape[-1] != 1:
        logits = logits.contiguous()
    if logits.dim() == 2:
        return logits.unsqueeze(0)
    return logits if logits.dim() == 3 else logits.reshape(logits.shape[:-2].numel(), *logits.shape[-2:])


def rows_apart(rows: Tensor) -> bool:
    """Whether no two rows of `[G, R, V]` share memory (an expanded tensor's do): only then may one be overwritten."""
    groups, count, vocab = rows.shape
    outer, inner = rows.stride(0), rows.stride(1)
    return (count <= 1 or inner >= vocab) and (groups <= 1 or outer >= (count - 1) * inner + vocab)


def check_tensor(name: str, value: object, floats: bool = True) -> None:
    """Raise TypeError for anything but a tensor (of floats)."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if floats and not value.is_floating_point():
        raise TypeError(f"{name}: expected a float tensor, got {value.dtype}")


def check_indices(name: str, value: object) -> None:
    """Raise TypeError for anything but a tensor of int64 or int32."""
    check_tensor(name, value, floats=False)
    if value.dtype not in (torch.int64, torch.int32):  # type: ignore[attr-defined]
        raise TypeError(f"{name}: expected an int64 or int32 tensor, got {value.dtype}")  # type: ignore[attr-defined]


def check_token_logps(name: str, value: object, labels: Tensor) -> None:
    """Raise unless value is a tensor of floats that is shaped like labels, and on their device."""
    check_tensor(name, value)
    assert isinstance(value, Tensor)
    if value.shape != labels.shape:
        raise ValueError(f"{name}: expected the shape of labels, {list(labels.shape)}, got {list(value.shape)}")
    if value.device != labels.device:
        raise ValueError(f"{name}: expected on {labels.device} like labels, got {value.device}")


def check_flag(name: str, value: object) -> None:
    """Raise TypeError for anything but True and False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r}")


def check_linear(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> None:
    """Raise for inputs of linear_token_logps that disagree."""
    named = {"hidden": hidden, "weight": weight} | ({} if bias is None else {"bias": bias})
    check_tensor("labels", labels, floats=False)
    for name, tensor in named.items():
        check_tensor(name, tensor)
    for name, tensor in (named | {"labels": labels}).items():
        if tensor.device != hidden.device:
            raise ValueError(f"{name}: expected on {hidden.device} like hidden, got {tensor.device}")
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"weight: expected [V, H], got shape {list(weight.shape)}")
    if hidden.dim() < 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden: expected [..., H] with H={weight.shape[1]} of weight {list(weight.shape)}, "
            f"got shape {list(hidden.shape)}"
        )
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"labels: expected hidden's shape without H, {list(hidden.shape[:-1])}, got {list(labels.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected [V] = [{weight.shape[0]}], got shape {list(bias.shape)}")


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of logps, statistics, losses and sums: float32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def product_dtype(hidden: Tensor) -> torch.dtype:
    """autocast's dtype under autocast (which leaves float64 alone), else hidden's."""
    device = hidden.device.type
    if hidden.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return hidden.dtype
