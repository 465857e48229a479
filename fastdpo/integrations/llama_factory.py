"""LLaMA-Factory: its preference trainers without logits.

    python -m fastdpo.integrations.llama_factory train config.yaml         # in place of llamafactory-cli train
    torchrun ... -m fastdpo.integrations.llama_factory train config.yaml   # on several devices

or, in a script of one's own, `patch()` before `run_exp()`. LLaMA-Factory has no plugins, so two of its classes are
patched: `CustomDPOTrainer` (stage dpo: every pref_loss, pref_ftx, pref_bco_weight, ld_alpha) and `CustomKTOTrainer`
(stage kto). Losses, data and checkpoints stay LLaMA-Factory's own; it is the log-probabilities that come from
`fused_head`. One metric differs: logits/chosen and logits/rejected are means over the completions' tokens, as TRL's
are, not over prompts and padding too.

Written against LLaMA-Factory 0.9's published source, and tested on a stand-in with its interface: where the installed
one has another, `patch()` raises.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from typing import Any

from torch import Tensor

from ..names import check_names
from ..options import HEAD_KEYWORDS, head_options
from ..sequences import sequence_logps
from .transformers import fused_head, is_fused

_DPO = ("llamafactory.train.dpo.trainer", "CustomDPOTrainer")
_KTO = ("llamafactory.train.kto.trainer", "CustomKTOTrainer")
_AVERAGED = ("ipo", "orpo", "simpo")  # losses that LLaMA-Factory gives means over tokens

# (module and class, method, its parameters' first names, ours)
_SITES: list[tuple[tuple[str, str], str, tuple[str, ...], Any]]

# What patch() found, and the keywords it was given; None while it is not in force
_before_patch: list[Any] | None = None
_head_keywords: dict[str, Any] = {}


def patch(**head_keywords: Any) -> None:
    """Let LLaMA-Factory's DPO and KTO trainers of this process compute token logps with fastdpo, until `unpatch()`.

    Call it before a trainer is built: the trainer fuses its models' heads before anything wraps them. A second call
    changes nothing but the keywords.

    Args:
        head_keywords: `grad_tol`, `workspace_mb`, `backend`, as for `fastdpo.linear_token_logps`.

    Raises:
        ImportError: no LLaMA-Factory.
        RuntimeError: one with other internals.
        TypeError, ValueError: a bad keyword.
    """
    global _before_patch, _head_keywords
    check_names("patch()", head_keywords, HEAD_KEYWORDS)
    head_options(**head_keywords)
    found = [_find(*site) for site in _SITES] if _before_patch is None else _before_patch
    _head_keywords = head_keywords
    _before_patch = found
    for where, method, _, ours in _SITES:
        setattr(_class(where), method, ours)


def unpatch() -> None:
    """Undo `patch()`: the classes get back what it found. Trainers that were built keep fused heads, and logits too."""
    global _before_patch
    if _before_patch is not None:
        for (where, method, _, _), original in zip(_SITES, _before_patch, strict=True):
            setattr(_class(where), method, original)
        _before_patch = None


def main(arguments: list[str] | None = None) -> None:
    """`train config.yaml [overrides]`: patch(), and LLaMA-Factory's own run_exp()."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) < 2 or arguments[0] != "train":
        raise SystemExit("usage: python -m fastdpo.integrations.llama_factory train config.yaml [key=value ...]")
    patch()
    sys.argv = [sys.argv[0], *arguments[1:]]  # run_exp reads it
    importlib.import_module("llamafactory.train.tuner").run_exp()


# --- what takes the places -------------------------------------------------------------------------------------------


def _dpo_init(self: Any, model: Any, ref_model: Any, *args: Any, **keywords: Any) -> None:
    _fuse(model, ref_model)
    _original(_DPO, "__init__")(self, model, ref_model, *args, **keywords)


def _kto_init(self: Any, model: Any, ref_model: Any, *args: Any, **keywords: Any) -> None:
    _fuse(model, ref_model)
    _original(_KTO, "__init__")(self, model, ref_model, *args, **keywords)


def _dpo_forward(self: Any, model: Any, batch: dict[str, Any], is_ref_model: bool = False) -> Any:
    """CustomDPOTrainer.concatenated_forward. batch: `[2B, T]`, chosen first."""
    if self.finetuning_args.use_ref_model:
        batch = _detached(batch)  # the reference's forward reads the same tensors
    labels = batch.pop("labels")
    out = model(**batch, completion_labels=labels, return_dict=True, use_cache=False)
    ld_alpha = None if is_ref_model else self.ld_alpha
    logps = sequence_logps(out.token_logps, out.counted, ld_alpha=ld_alpha)
    lengths = out.label_mask.sum(-1)
    if self.loss_type in _AVERAGED:
        logps = logps / lengths
    chosen, rejected = logps.chunk(2)
    means = [mean[mask] for mean, mask in zip(out.mean_logits.chunk(2), out.label_mask.chunk(2), strict=True)]
    average = chosen if self.loss_type in _AVERAGED else chosen / lengths.chunk(2)[0]
    results = {
        "chosen_logps": chosen,
        "rejected_logps": rejected,
        "chosen_logits": means[0],
        "rejected_logits": means[1],
        "chosen_logps_avg": average,
    }
    # Older ones return a tuple of the same
    returned = inspect.signature(_original(_DPO, "concatenated_forward")).return_annotation
    return tuple(results.values()) if str(returned).lower().startswith(("tuple", "typing.tuple")) else results


def _kto_forward(self: Any, model: Any, batch: dict[str, Any], prefix: str = "") -> tuple[Tensor, Tensor]:
    """CustomKTOTrainer.forward: (sum, mean) of each sequence's logps, each `[B]`; prefix "kl_": the KL completions'."""
    batch = _detached(batch)
    text = ("input_ids", "attention_mask", "token_type_ids")
    inputs = {name: value for name, value in batch.items() if not name.startswith("kl_") and name not in text}
    for name in ("labels", "kto_tags"):
        inputs.pop(name, None)
    inputs |= {name: batch[prefix + name] for name in text if prefix + name in batch}
    out = model(**inputs, completion_labels=batch[f"{prefix}labels"], return_dict=True, use_cache=False)
    logps = out.token_logps.sum(-1)
    return logps, logps / out.label_mask.sum(-1)


_SITES = [
    (_DPO, "__init__", ("self", "model", "ref_model"), _dpo_init),
    (_DPO, "concatenated_forward", ("self", "model", "batch", "is_ref_model"), _dpo_forward),
    (_KTO, "__init__", ("self", "model", "ref_model"), _kto_init),
    (_KTO, "forward", ("self", "model", "batch", "prefix"), _kto_forward),
]


def _fuse(*models: Any) -> None:
    for model in models:
        if model is not None and not is_fused(model):
            fused_head(model, stats=("mean_logits",), **_head_keywords)


def _detached(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value.detach().clone() if isinstance(value, Tensor) else value for name, value in batch.items()}


# --- the sites -------------------------------------------------------------------------------------------------------


def _class(where: tuple[str, str]) -> Any:
    return getattr(importlib.import_module(where[0]), where[1])


def _find(where: tuple[str, str], method: str, parameters: tuple[str, ...], ours: Any) -> Any:
    """The method as LLaMA-Factory has it; raises unless it is the one that this module knows."""
    try:
        found = getattr(_class(where), method)
    except AttributeError as error:
        raise RuntimeError(f"fastdpo.integrations.llama_factory knows LLaMA-Factory 0.9; here {error}") from None
    has = tuple(inspect.signature(found).parameters)
    if has[: len(parameters)] != parameters:
        raise RuntimeError(
            f"fastdpo.integrations.llama_factory knows LLaMA-Factory 0.9; here {where[1]}.{method} takes "
            f"({', '.join(has)}), expected ({', '.join(parameters)}, ...)"
        )
    return found


def _original(where: tuple[str, str], method: str) -> Any:
    """What patch() found there; after unpatch(), what is there."""
    if _before_patch is None:
        return getattr(_class(where), method)
    return _before_patch[[site[:2] for site in _SITES].index((where, method))]


if __name__ == "__main__":
    # Under -m this file is __main__; the patched classes must find the module's own state
    importlib.import_module("fastdpo.integrations.llama_factory").main()
