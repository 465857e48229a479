"""What the tests of packing share: tiny models of several architectures, a padded pair batch, short training runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("trl")

import transformers
from peft import LoraConfig
from torch import Tensor
from trl.trainer.utils import add_fused_lm_head
from trl_kit import PAIRS, config_of, make, train  # noqa: F401

OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
VOCAB = 101
_SMALL = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_LLAMA = {**_SMALL, "intermediate_size": 48, "num_key_value_heads": 2, "initializer_range": 0.2}
_GEMMA = {**_LLAMA, "head_dim": 8, "sliding_window": 4}
_EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2}
_LINEAR = {"linear_num_value_heads": 2, "linear_num_key_heads": 2, "num_experts": 4, "moe_intermediate_size": 8}

#: name -> (configuration class, its arguments)
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _LLAMA),
    "mistral": ("MistralConfig", {**_LLAMA, "sliding_window": 5}),
    "gemma3": ("Gemma3TextConfig", {**_GEMMA, "layer_types": ["sliding_attention", "full_attention"]}),
    "mixtral": ("MixtralConfig", {**_LLAMA, **_EXPERTS}),
    "gpt2": ("GPT2Config", _GPT2),
    "gpt_oss": ("GptOssConfig", {**_LLAMA, **_EXPERTS, "head_dim": 8, "sliding_window": 4}),
    "gpt_neo": (
        "GPTNeoConfig",
        {"vocab_size": VOCAB, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 4}
        | {"attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64, "initializer_range": 0.2},
    ),
    "falcon": ("FalconConfig", {**_SMALL, "initializer_range": 0.2}),
    "bloom": ("BloomConfig", {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "mamba": ("MambaConfig", {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 1, "state_size": 4}),
    "rwkv": ("RwkvConfig", {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2}),
    "lfm2": ("Lfm2Config", {**_LLAMA, "layer_types": ["conv", "full_attention"]}),
    "qwen3_next": ("Qwen3NextConfig", {**_LLAMA, **_LINEAR, "layer_types": ["linear_attention", "full_attention"]}),
    "llama_not_causal": ("LlamaConfig", {**_LLAMA, "is_causal": False}),
}


def fused_model(architecture: str, attention: str = "sdpa", **settings: Any) -> Any:
    """A random model with TRL's fused head."""
    name, config = ARCHITECTURES[architecture]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**{**_IDS, **config, **settings})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    add_fused_lm_head(model, outputs=OUTPUTS)
    return model


def pair_batch(
    prompts: tuple[int, ...] = (6, 4, 0, 3),
    chosen: tuple[int, ...] = (8, 5, 5, 0),
    rejected: tuple[int, ...] = (3, 10, 7, 4),
) -> dict[str, Tensor]:
    """What TRL's DPO loss passes to a model: rows of these prompts and completions, padded on the right.

    The completions of the first pair begin with the same two tokens.
    """
    generator = torch.Generator().manual_seed(0)
    made = [torch.randint(3, VOCAB, (length,), generator=generator) for length in (*prompts, *chosen, *rejected)]
    shared, first, second = (made[i * len(prompts) : (i + 1) * len(prompts)] for i in range(3))
    if min(len(first[0]), len(second[0])) > 2:
        second[0][:2] = first[0][:2]
    rows = [torch.cat([prompt, rest]) for rests in (first, second) for prompt, rest in zip(shared, rests, strict=True)]
    width = max(map(len, rows))
    ids, mask, labels = (torch.full((len(rows), width), fill) for fill in (0, 0, -100))
    for row, (tokens, prompt) in enumerate(zip(rows, prompts * 2, strict=True)):
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = 1
        labels[row, prompt : len(tokens)] = tokens[prompt:]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def lora(*modules: str) -> LoraConfig:
    return LoraConfig(r=4, target_modules=list(modules), task_type="CAUSAL_LM")


def assert_same_run(theirs: Any, mine: Any) -> None:
    """Equal logs (all metrics, not the loss alone) and weights, to float32 rounding."""
    skip = ("runtime", "per_second", "flos")
    assert len(theirs.state.log_history) > 1
    for a, b in zip(theirs.state.log_history, mine.state.log_history, strict=True):
        assert a.keys() == b.keys()
        # In the first step the policy is the reference, and the accuracy is that of rounding
        equal = ("rewards/accuracies",) if abs(a.get("rewards/margins", 1)) < 1e-5 else ()
        for key in a:
            if not any(word in key for word in (*skip, *equal)):
                assert b[key] == pytest.approx(a[key], rel=2e-4, abs=2e-4), key
    weights = dict(mine.model.named_parameters())
    for name, weight in theirs.model.named_parameters():
        # Adam's first steps are of the size of the learning rate wherever the gradient is not zero; a gradient that is
        # zero but for rounding may go either way
        off = (weights[name] - weight).abs() > 2e-5
        assert off.float().mean() < 2e-3, f"{name}: {int(off.sum())} of {off.numel()} weights differ"
