"""Which models can run packed, and by which form of `attention`; the others are refused by name, with the reason.

First what a configuration says; then, at the first batch, a few tokens through the model itself, packed and one
sequence at a time: whatever leaks from one sequence to the next, or counts positions on its own, shows there.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.generic import is_flash_attention_requested

from ...evaluating import evaluating
from .attention import SEGMENTS, additive_mask, block_mask, flash_keywords, register, segment_table
from .layout import Layout, layout

# In multiples of what another first half of a sequence changes in its second half. A leak changes as much and more;
# rounding to bf16 0.07 of it, on Gemma 3 270M. (Another first token alone would not do: trained models attend to it
# whatever it is.)
_PROBE_TOLERANCE = 0.3


@dataclass(frozen=True)
class Plan:
    """How a model is told of a layout.

    Attributes:
        form: "flash", "segments" (SDPA), "additive" (eager) or "blocks" (flex attention).
        windows: layer type -> sliding window or None. More than one: the model takes a mask for each.
    """

    form: str
    windows: dict[str, int | None]

    def attention(self, row: Layout, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
        """(attention_mask, further keywords of the forward) for one layout."""
        if self.form == "flash":
            return None, flash_keywords(row)
        render: dict[str, Callable[[int | None], Any]] = {
            "segments": lambda window: segment_table(row, window),
            "additive": lambda window: additive_mask(row, window, dtype),
            "blocks": lambda window: block_mask(row, window),
        }
        masks = {name: render[self.form](window) for name, window in self.windows.items()}
        return (masks if len(masks) > 1 else next(iter(masks.values()))), {}


class PackingError(ValueError):
    """Something that cannot run packed."""


def refusal(option: str, model: nn.Module, reason: str) -> PackingError:
    return PackingError(f"{option}: {type(model).__name__} cannot run packed: {reason}")


def plan(model: Any, option: str) -> Plan:
    """The plan for a transformers causal language model (not its PEFT wrapper); sdpa becomes SEGMENTS.

    Args:
        option: "padding_free" or "shared_prompt".

    Raises:
        ValueError: a model whose sequences would leak into each other, or whose attention cannot be told of them.
    """
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    types = list(dict.fromkeys(getattr(config, "layer_types", None) or []))
    others = sorted(set(types) - {"full_attention", "sliding_attention"})
    if "local" in getattr(config, "attention_layers", ()):  # GPT-Neo
        others = ["local"]
    if config is not model.config:
        raise refusal(option, model, "a vision-language model; only text models are supported")
    if config.is_encoder_decoder:
        raise refusal(option, model, "an encoder-decoder")
    if getattr(model, "_is_stateful", False) or others:
        found = f"layers ({', '.join(others)})" if others else "recurrent layers"
        raise refusal(option, model, f"it has {found} that do not stop where a sequence does")
    if not getattr(config, "is_causal", True) or getattr(config, "use_bidirectional_attention", False):
        raise refusal(option, model, "its attention is not causal")
    if "position_ids" not in inspect.signature(type(model.base_model).forward).parameters:
        raise refusal(option, model, "it takes no position_ids, so a sequence could not start anew")

    windows = {name: window if name == "sliding_attention" else None for name in types} or {"every layer": window}
    if len(set(windows.values())) == 1:
        windows = {"every layer": next(iter(windows.values()))}
    name = config._attn_implementation
    if is_flash_attention_requested(config):
        if option == "shared_prompt":
            raise refusal(option, model, f"{name} knows no mask of pairs; expected sdpa, flex_attention or eager")
        return Plan("flash", windows)
    if len(windows) > 1 and not _takes_a_mask_per_type(type(model.base_model)):
        raise refusal(option, model, f"it takes no attention mask for each of {', '.join(types)}")
    if name in ("sdpa", SEGMENTS):
        if not model._can_set_attn_implementation():
            raise refusal(option, model, "its sdpa attention is its own, not transformers'; expected eager")
        register()
        model.set_attn_implementation(SEGMENTS)
        return Plan("segments", windows)
    if name in ("eager", "flex_attention"):
        return Plan("additive" if name == "eager" else "blocks", windows)
    raise refusal(
        option,
        model,
        f"attn_implementation {name!r} may not keep sequences apart; expected sdpa, flex_attention, eager or a "
        "FlashAttention",
    )


def _takes_a_mask_per_type(backbone: type[nn.Module]) -> bool:
    """Whether attention_mask may be a dict by layer type, as in transformers' models with windows on some layers."""
    try:
        return ":= attention_mask, dict)" in inspect.getsource(inspect.unwrap(backbone.forward))
    except OSError:
        return False


@torch.no_grad()
def probe(model: Any, option: str, run: Callable[[Layout, Tensor], Tensor], device: torch.device) -> None:
    """Compare a few tokens, packed and one sequence at a time. Without dropout; the model is left as it was.

    Args:
        run: (layout, packed input_ids `[1, N]`) -> last hidden states `[1, N, H]`.
        device: of the model's input.

    Raises:
        ValueError: they differ.
    """
    vocab = model.config.get_text_config().vocab_size
    rows = (torch.arange(48, device=device) * 7 + 3).remainder(vocab).view(4, 12)
    rows[2:, :6] = rows[:2, :6]  # two pairs with a common prompt
    every = torch.ones_like(rows)
    row = layout(rows, every, rows, shared_prompt=option == "shared_prompt")
    with evaluating(model):
        packed = row.unpack(run(row, row.pack(rows)))
        alone = model.base_model(input_ids=rows, use_cache=False).last_hidden_state
        other = rows.clone()
        other[:, :6] = rows.flip(1)[:, :6]
        changed = model.base_model(input_ids=other, use_cache=False).last_hidden_state
    own = (changed - alone)[:, 6:].float().norm(dim=(1, 2))
    off = (packed - alone).float().norm(dim=(1, 2))
    if not (off <= _PROBE_TOLERANCE * own).all():
        raise refusal(
            option,
            model,
            "its hidden states of packed sequences differ from those of the same sequences alone (by "
            f"{(off / own).max():.2g} of what another first half changes); sequences leak into "
            "each other, or positions do not start anew",
        )
