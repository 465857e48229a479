"""The keywords of a loss, checked once: one clear error per bad value, and for each option that a loss does not use."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, TypedDict, cast

from torch import Tensor

from ..names import check_names, did_you_mean
from ..options import INFINITY, check_number, check_within
from .divergences import F_DIVERGENCES
from .pairs import LossOptions
from .table import DIVERGENCE, LOSSES, PAIRED, Loss, LossFunction, find_loss, loss_name

Beta = float | Tensor | Callable[[int], float]
LossType = str | LossFunction | Sequence[str | LossFunction]
PARAMETERIZATIONS = ("ratio", "posterior", "likelihood")


class LossKeywords(TypedDict, total=False):
    """Keywords of `dpo_loss` and `linear_dpo_loss` beside beta, loss_type and label_smoothing.

    loss_weights: one number per loss of a list `loss_type`; default 1 each (MPO, arXiv 2411.10442).
    alpha: weight of the NLL of the chosen completions, a mean over their tokens (RPO, arXiv 2404.19733). None: 1 for
        cpo and orpo, whose definition holds it, else 0; in a list, weighted as its loss.
    gamma: margin that the rewards should keep, `beta h - gamma`; a number or `[B]` (Llama 2's margin, SimPO's gamma,
        ODPO's offset, arXiv 2402.10571). None: 0.5 for simpo, else 0.
    discopop_tau: temperature of discopop.
    kl: KTO's reference point, a number or a tensor `[]`; a constant. `fastdpo.kto_kl` estimates it.
    parameterization: the reward beta r (arXiv 2407.13709). "ratio": r = log p(y|x)/p_ref(y|x); "posterior":
        r = log p(y|x), takes no ref_logps; "likelihood": r = log p(y|x)/p_ref(y), where ref_logps are the reference's
        logps of the completion without its prompt.
    f_divergence_type: reverse_kl, forward_kl, js_divergence or alpha_divergence (f-DPO, arXiv 2309.16240).
    f_alpha_divergence_coef: the alpha of alpha_divergence.
    length_normalize: sequence logps are means over their tokens, not sums. None: True for ipo, sigmoid_norm, simpo
        and orpo, else False.
    ld_alpha: weight, in [0, 1], of the tokens beyond the shorter completion's length (LD-DPO, arXiv 2409.06411).
    token_weights: weight of each label's logp, float, shaped like labels (and shifted with them); a constant
        (TIS-DPO, arXiv 2410.04350).
    pair_weights: `[B]`, multiplies each pair's loss, its NLL term too; the loss stays the mean over B pairs. Constant.
    use_weighting: multiply each pair's loss, its NLL term too, by both completions' probability per token (WPO,
        arXiv 2406.11827).
    betas: several beta at once, a sequence of numbers: loss is `[len(betas)]`, rewards `[len(betas), B]`.
    step: the number that a beta schedule is called with.
    """

    loss_weights: Sequence[float] | None
    alpha: float | None
    gamma: float | Tensor | None
    discopop_tau: float
    kl: float | Tensor
    parameterization: str
    f_divergence_type: str
    f_alpha_divergence_coef: float
    length_normalize: bool | None
    ld_alpha: float | None
    token_weights: Tensor | None
    pair_weights: Tensor | None
    use_weighting: bool
    betas: Sequence[float] | None
    step: int | None


DEFAULTS: dict[str, Any] = {
    "loss_weights": None,
    "alpha": None,
    "gamma": None,
    "discopop_tau": LossOptions().discopop_tau,
    "kl": 0.0,
    "parameterization": "ratio",
    "f_divergence_type": "reverse_kl",
    "f_alpha_divergence_coef": 0.5,
    "length_normalize": None,
    "ld_alpha": None,
    "token_weights": None,
    "pair_weights": None,
    "use_weighting": False,
    "betas": None,
    "step": None,
}
# What a batch brings along: the modules take these at the call
PER_BATCH = ("beta", "gamma", "kl", "token_weights", "pair_weights", "step")


def check_known(function: Callable[..., object], keywords: Collection[str]) -> None:
    """Raise TypeError for a keyword that is neither the function's own nor one of `LossKeywords`."""
    if not all(name in DEFAULTS for name in keywords):
        check_names(function.__name__, keywords, sorted({*(function.__kwdefaults__ or {}), *DEFAULTS}))


def find_losses(loss_type: LossType) -> tuple[Loss, ...]:
    """The rows of one loss or of a list of them."""
    if isinstance(loss_type, (list, tuple)) and not isinstance(loss_type, Loss):
        if not loss_type:
            raise ValueError("loss_type: expected at least one loss, got an empty list")
        return tuple(find_loss(one) for one in loss_type)
    return (find_loss(cast("str | LossFunction", loss_type)),)


def beta_at(beta: Beta, step: int | None) -> float | Tensor:
    """The beta of this step, where it is a schedule; else itself.

    Raises:
        TypeError: a schedule without a step.
        ValueError: a step without a schedule.
    """
    if not is_schedule(beta):
        if step is not None:
            raise ValueError(f"step: beta is no schedule, so nothing depends on the step, got {step!r}")
        return cast("float | Tensor", beta)
    if not isinstance(step, int) or isinstance(step, bool):
        raise TypeError(f"step: beta is a schedule, which needs the step as an int, got {step!r}")
    return cast("Callable[[int], float]", beta)(step)


def is_schedule(beta: Beta) -> bool:
    return callable(beta) and not isinstance(beta, Tensor)


def check_keywords(
    beta: float | Tensor, loss_type: LossType, label_smoothing: float, keywords: LossKeywords
) -> tuple[tuple[Loss, ...], dict[str, Any]]:
    """The rows of loss_type, and every keyword with its default.

    Raises:
        TypeError: a value of another type.
        ValueError: an unknown name; a number outside its range; an option that no given loss uses.
    """
    rows = find_losses(loss_type)
    values: dict[str, Any] = {**DEFAULTS, **keywords}
    _check_values(beta, label_smoothing, values)
    given = {name: values[name] for name in keywords if _differs(values[name], DEFAULTS[name])}
    if label_smoothing:
        given["label_smoothing"] = label_smoothing
    _check_used(rows, loss_type, given)
    for row in rows:
        if row.needs is not None and row.needs not in given:
            raise ValueError(f"{row.needs}: loss {_name(row, loss_type)} needs it above 0, got 0 (the paper: 1e-3)")
    if values["f_alpha_divergence_coef"] != 0.5 and values["f_divergence_type"] != "alpha_divergence":
        raise ValueError(
            f"f_alpha_divergence_coef: f_divergence_type={values['f_divergence_type']!r} does not use it "
            f"(alpha_divergence does), got {values['f_alpha_divergence_coef']!r}"
        )
    for name, value in (("beta", beta), ("gamma", values["gamma"])):
        if isinstance(value, Tensor) and value.dim() > 0:
            _check_used(rows, loss_type, {"pair_weights": value}, f"{name}: one value per pair")
    if isinstance(beta, Tensor):
        _check_used(rows, loss_type, {"betas": beta}, "beta")
    weights = values["loss_weights"]
    if weights is None:
        values["loss_weights"] = (1.0,) * len(rows)
    elif len(weights) != len(rows):
        raise ValueError(f"loss_weights: expected one number per loss, {len(rows)}, got {len(weights)}")
    return rows, values


def _check_values(beta: float | Tensor, label_smoothing: float, values: dict[str, Any]) -> None:
    if not isinstance(beta, Tensor):  # its values: with the batch
        check_number("beta", beta, above=0)
    check_number("label_smoothing", label_smoothing)
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing: expected a number in [0, 0.5), got {label_smoothing!r}")
    check_number("discopop_tau", values["discopop_tau"], above=0)
    check_number("f_alpha_divergence_coef", values["f_alpha_divergence_coef"])
    for name in ("gamma", "kl"):
        if values[name] is not None and not isinstance(values[name], Tensor):
            check_number(name, values[name])
    if values["alpha"] is not None:
        check_within("alpha", values["alpha"], 0, INFINITY)
    if values["ld_alpha"] is not None:
        check_within("ld_alpha", values["ld_alpha"], 0, 1)
    for name, known in (("parameterization", PARAMETERIZATIONS), ("f_divergence_type", tuple(F_DIVERGENCES))):
        if values[name] not in known:
            raise ValueError(
                f"{name}: unknown {values[name]!r}, expected one of {', '.join(known)}"
                f"{did_you_mean(str(values[name]), known)}"
            )
    for name in ("use_weighting", "length_normalize"):
        if not isinstance(values[name], bool) and (name == "use_weighting" or values[name] is not None):
            raise TypeError(f"{name}: expected True or False, got {values[name]!r}")
    for name in ("token_weights", "pair_weights"):
        if values[name] is not None and not isinstance(values[name], Tensor):
            raise TypeError(f"{name}: expected a float tensor, got {type(values[name]).__name__}")
    for name in ("loss_weights", "betas"):
        if values[name] is not None:
            if not isinstance(values[name], (list, tuple)) or not values[name]:
                raise TypeError(f"{name}: expected a list of numbers, got {values[name]!r}")
            for number in values[name]:
                check_number(name, number, above=0 if name == "betas" else -INFINITY)
    if values["betas"] is not None and (isinstance(beta, Tensor) or beta != LossOptions().beta):
        raise ValueError(f"betas: expected beta or betas, got both (beta={beta!r})")


def _differs(value: Any, default: Any) -> bool:
    return isinstance(value, Tensor) or value != default


def _check_used(rows: tuple[Loss, ...], loss_type: LossType, given: dict[str, Any], what: str | None = None) -> None:
    """Raise for an option that no given loss uses, or, where it changes all of them, not every one."""
    for option in given:
        if not any(option in row.uses for row in LOSSES.values()):
            continue  # of every loss
        concerned = [row for row in rows if option not in DIVERGENCE or "ref_logps" in row.uses]
        not_used = [row for row in concerned if option not in row.uses]
        if not concerned or len(not_used) == len(concerned) or (not_used and option in DIVERGENCE | PAIRED):
            name = _name((not_used or list(rows))[0], loss_type)
            users = ", ".join(known for known, row in LOSSES.items() if option in row.uses)
            value = "" if isinstance(given[option], Tensor) else f", got {given[option]!r}"
            raise ValueError(f"{what or option}: loss {name} does not use it{value}; those that do: {users}")


def _name(row: Loss, loss_type: LossType) -> str:
    asked = loss_type if isinstance(loss_type, (list, tuple)) and not isinstance(loss_type, Loss) else [loss_type]
    return next(loss_name(one) for one in asked if find_loss(cast("str | LossFunction", one)) == row)
