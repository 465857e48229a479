"""What a model does to its logits beside the LM head: one table, from a config to `linear_token_logps`'s keywords.

    softcap, logit_scale = head_transform(model.config)

Found by reading every causal LM of transformers 5.23. Needs no library: a config is anything with the attributes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple


class HeadTransform(NamedTuple):
    """The keywords of `linear_token_logps`."""

    softcap: float | None = None
    logit_scale: float = 1.0


def _multiply(value: float) -> float:
    return value


def _divide(value: float) -> float:
    return 1 / value


# A config's attribute -> the softcap. None (or no such attribute): no cap
SOFTCAPS = (
    "final_logit_softcapping",  # Gemma 2, 3, 3n, 4, T5Gemma, VaultGemma, NanoChat, PaliGemma and others
    "logits_soft_cap",  # RecurrentGemma
    "output_logit_soft_cap",  # xLSTM
)

# A config's attribute -> how it makes the logit scale. Hidden states divided before the head are the same, as the head
# of such a model has no bias
SCALES: dict[str, Callable[[float], float]] = {
    "logit_scale": _multiply,  # Cohere
    "output_multiplier": _multiply,  # Muse Glimmer, Muse Spark
    "lm_head_multiplier": _multiply,  # Falcon-H1
    "logits_scaling": _divide,  # Granite; MiniCPM3, which divides the hidden states
    "logits_mup_width_multiplier": _divide,  # Inkling, which divides the hidden states
}


def _ignore(value: float) -> float:
    return 1.0


# (model_type, attribute): what that architecture does otherwise than the others
_OTHERWISE: dict[tuple[str, str], Callable[[float], float]] = {
    ("hyperclovax", "logits_scaling"): _multiply,
    ("mpt", "logit_scale"): _ignore,
    ("aya_vision", "logit_scale"): _ignore,  # has Cohere's text config, and not its scale
    ("cohere2_vision", "logit_scale"): _ignore,
}

# Looks like a scale or cap of the head, by name; and what has such a name without being one
_HEAD = re.compile(
    r"logit|lm_head|unembed|^(final|output|head)_.*(softcap|soft_cap|multiplier)|^mup_|^softcap|^soft_cap"
)
_SCALING = re.compile(r"scal|softcap|soft_cap|_cap|mult|divi|width|temperature")
_ELSEWHERE = re.compile(
    r"attn|attention|router|expert|moe|gate|mlp|ssm|embedding|residual|init|contrastive|vision|image|audio|per_"
)
# Names that no pattern would find, or that more than one number makes: MiniCPM's code outside transformers divides the
# hidden states by hidden_size / dim_model_base. (MiniCPM3 of transformers says that as logits_scaling)
_NAMED = ("dim_model_base",)


def head_transform(config: Any) -> HeadTransform:
    """Softcap and logit scale of a model's LM head.

    Args:
        config: a transformers config; of a vision-language model, its text config is read.

    Raises:
        ValueError: an attribute that looks like a scale or cap of the head, is not in the tables above and has a value
            that would matter; two scales at once; fewer logits than the head has rows (`unpadded_vocab_size`).
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    whole, model_type = getattr(config, "model_type", ""), getattr(text, "model_type", "")
    caps = {name: float(cap) for name in SOFTCAPS if (cap := getattr(text, name, None)) is not None}
    scales = {
        name: _OTHERWISE.get((whole, name), _OTHERWISE.get((model_type, name), scale))(float(value))
        for name, scale in SCALES.items()
        if isinstance(value := getattr(text, name, None), (int, float))
    }
    scales = {name: scale for name, scale in scales.items() if scale != 1}
    for found in (caps, scales):
        if len(found) > 1:
            raise ValueError(f"config: {' and '.join(found)} are both set; expected one of them ({model_type})")
    for name, value in _unknown(text, model_type):
        raise ValueError(
            f"{name}: {value!r} in the config ({model_type}) looks like a scale or cap of the LM head that fastdpo "
            "does not know; pass softcap and logit_scale yourself"
        )
    rows, kept = getattr(text, "vocab_size", None), getattr(text, "unpadded_vocab_size", None)
    if rows is not None and kept is not None and kept < rows:
        raise ValueError(
            f"unpadded_vocab_size: {kept} of the config ({model_type}) drops logits of a head of {rows} rows; give "
            f"linear_token_logps weight[:{kept}]"
        )
    return HeadTransform(next(iter(caps.values()), None), next(iter(scales.values()), 1.0))


def _unknown(text: Any, model_type: str) -> Iterator[tuple[str, Any]]:
    """(name, value) of what would scale or cap the logits for all one can see."""
    for name, value in (text.to_dict() if hasattr(text, "to_dict") else vars(text)).items():
        if name in SOFTCAPS or name in SCALES or value is None or value is False or isinstance(value, (dict, list)):
            continue
        if not isinstance(value, bool) and value == 1:
            continue
        if name in _NAMED:
            if not hasattr(text, "logits_scaling") and value != getattr(text, "hidden_size", None):
                yield name, value
        elif _HEAD.search(name) and _SCALING.search(name) and not _ELSEWHERE.search(name):
            yield name, value
