"""What PEFT adapters add to a model's fingerprint: a digest of each that has a say in its logits.

    SHA-256(config, the scaling and whether it is merged at each layer, (name, tensor) of each of its tensors by name)

An adapter has a say while it is enabled, or as long as it is merged into the weights. What it is called does not count,
nor the order of several: they add up.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

_NOT_ADAPTER = {"base_model_name_or_path", "inference_mode", "revision", "auto_mapping", "task_type", "peft_version"}


class Layer(NamedTuple):
    """One module that adapters are at work in."""

    prefixes: list[str]  # of the names of all adapters' tensors here
    active: list[str]  # adapters, in use here
    merged: list[str]  # adapters, whose share is in the weights
    scaling: dict[str, Any]  # adapter -> factor, of the kinds that have one


def plain_name(name: str) -> str:
    """A weight's name as it was before PEFT wrapped its layer."""
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")


def layers(base: nn.Module) -> dict[str, Layer]:
    """name of a module -> the adapters there."""
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils import AuxiliaryTrainingWrapper
    except ImportError:
        return {}
    found = {}
    for name, module in base.named_modules():
        if not isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            continue
        attributes = (*module.adapter_layer_names, *getattr(module, "other_param_names", ()))
        active = module.active_adapters
        scaling = getattr(module, "scaling", None)
        found[name] = Layer(
            [f"{name}.{attribute}" for attribute in attributes],
            [] if module.disable_adapters else list(active) if isinstance(active, (list, tuple)) else [active],
            list(getattr(module, "merged_adapters", ())),
            dict(scaling) if isinstance(scaling, dict) else {},
        )
    return found


def tensor_names(found: dict[str, Layer], state: dict[str, Tensor]) -> set[str]:
    """Those of a state dict that belong to adapters, in use or not."""
    starts = tuple(f"{prefix}." for layer in found.values() for prefix in layer.prefixes)
    return {name for name in state if starts and name.startswith(starts)}


def digests(
    model: Any, base: Any, found: dict[str, Layer], state: dict[str, Tensor], tensor_hash: Callable[[str, Tensor], str]
) -> list[str]:
    """One of each adapter that has a say, sorted.

    Args:
        model: has the adapters' configs; or `base`, the model inside, has them.
        found: what `layers` gave.
        state: name -> tensor, of the state dict of `base`.
        tensor_hash: name, tensor -> a text that stands for its numbers.
    """
    configs = getattr(model, "peft_config", None) or getattr(base, "peft_config", {})
    result = []
    for adapter in {adapter for layer in found.values() for adapter in (*layer.active, *layer.merged)}:
        lines = []
        for name, layer in found.items():
            if adapter not in (*layer.active, *layer.merged):
                continue
            use = [adapter in layer.active, adapter in layer.merged, layer.scaling.get(adapter)]
            lines.append(f"{plain_name(name)} {use}")
            for prefix in layer.prefixes:
                own = f"{prefix}.{adapter}"
                lines += [
                    f"{plain_name(prefix)}{tensor.removeprefix(own)} {tensor_hash(tensor, state[tensor])}"
                    for tensor in state
                    if tensor == own or tensor.startswith(f"{own}.")
                ]
        whole = hashlib.sha256(_config(configs[adapter]).encode())
        for line in sorted(lines):
            whole.update(f"\n{line}".encode())
        result.append(whole.hexdigest())
    return sorted(result)


def canonical(value: Any) -> str:
    """JSON, the same in every process."""
    # A set has another order in every process
    return json.dumps(value, sort_keys=True, default=lambda v: sorted(map(str, v)) if isinstance(v, set) else str(v))


def _config(config: Any) -> str:
    return canonical({k: v for k, v in config.to_dict().items() if k not in _NOT_ADAPTER})
