"""The Functions as modules: their fields are Liger's constructor arguments, in Liger's order."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from ...inputs import check_flag
from ...options import head_options
from .functions import (
    PairAuxiliary,
    liger_fused_linear_cpo,
    liger_fused_linear_dpo,
    liger_fused_linear_kto,
    liger_fused_linear_orpo,
    liger_fused_linear_simpo,
    loss_keywords,
)


class _Module(nn.Module):
    _loss: ClassVar[str]  # of a module without a loss_type

    def __post_init__(self) -> None:
        super().__init__()
        options = self._options()
        head_options(ignore_index=options["ignore_index"])
        check_flag("compiled", options["compiled"])
        if not isinstance(options["chunk_size"], int) or options["chunk_size"] < 1:
            raise ValueError(f"chunk_size: expected an int of at least 1, got {options['chunk_size']!r}")
        loss_keywords(options if "loss_type" in options else options | dict(loss_type=self._loss))

    def _options(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(cast(Any, self))}


@dataclass(eq=False, repr=False)
class LigerFusedLinearDPOLoss(_Module):
    """`LigerFusedLinearDPOFunction` as a module."""

    ignore_index: int = -100
    beta: float = 0.1
    alpha: float = 1.0
    compute_nll_loss: bool = False
    compiled: bool = True
    use_ref_model: bool = True
    average_log_prob: bool = False
    chunk_size: int = 1
    loss_type: str = "sigmoid"
    label_smoothing: float = 0.0
    discopop_tau: float = 0.05

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
    ) -> tuple[Tensor, PairAuxiliary]:
        """Shapes and values: `LigerFusedLinearDPOFunction`."""
        tensors = (_input, lin_weight, target, bias, ref_input, ref_weight, ref_bias)
        return liger_fused_linear_dpo(*tensors, **self._options())


@dataclass(eq=False, repr=False)
class LigerFusedLinearCPOLoss(_Module):
    """`LigerFusedLinearCPOFunction` as a module."""

    _loss: ClassVar[str] = "cpo"

    ignore_index: int = -100
    beta: float = 0.1
    alpha: float = 1.0
    label_smoothing: float = 0.0
    compute_nll_loss: bool = True
    compiled: bool = True
    average_log_prob: bool = False
    chunk_size: int = 1

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, PairAuxiliary]:
        """Shapes and values: `LigerFusedLinearCPOFunction`."""
        return liger_fused_linear_cpo(_input, lin_weight, target, bias, **self._options())


@dataclass(eq=False, repr=False)
class LigerFusedLinearSimPOLoss(_Module):
    """`LigerFusedLinearSimPOFunction` as a module; compute_nll_loss is True here and False there, as in Liger."""

    _loss: ClassVar[str] = "simpo"

    ignore_index: int = -100
    beta: float = 0.1
    alpha: float = 1.0
    label_smoothing: float = 0.0
    compute_nll_loss: bool = True
    compiled: bool = True
    gamma: float = 0.5
    chunk_size: int = 1

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, PairAuxiliary]:
        """Shapes and values: `LigerFusedLinearSimPOFunction`."""
        return liger_fused_linear_simpo(_input, lin_weight, target, bias, **self._options())


@dataclass(eq=False, repr=False)
class LigerFusedLinearORPOLoss(_Module):
    """`LigerFusedLinearORPOFunction` as a module."""

    _loss: ClassVar[str] = "orpo"

    ignore_index: int = -100
    beta: float = 0.1
    compute_nll_loss: bool = True
    compiled: bool = True
    chunk_size: int = 1

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        nll_target: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Shapes and values: `LigerFusedLinearORPOFunction`."""
        return liger_fused_linear_orpo(_input, lin_weight, target, bias, nll_target=nll_target, **self._options())


@dataclass(eq=False, repr=False)
class LigerFusedLinearKTOLoss(_Module):
    """`LigerFusedLinearKTOFunction` as a module; use_ref_model is False here and True there, as in Liger."""

    _loss: ClassVar[str] = "kto"

    ignore_index: int = -100
    beta: float = 0.1
    compiled: bool = True
    use_ref_model: bool = False
    average_log_prob: bool = False
    chunk_size: int = 1

    def forward(
        self,
        _input: Tensor,  # before the weight, as in Liger
        lin_weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        preference_labels: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        kl: Tensor | float | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Shapes and values: `LigerFusedLinearKTOFunction`."""
        if preference_labels is None:
            raise ValueError("preference_labels: expected a bool tensor [S], got None")
        tensors = (_input, lin_weight, target, preference_labels, bias, ref_input, ref_weight, ref_bias, kl)
        return liger_fused_linear_kto(*tensors, **self._options())
