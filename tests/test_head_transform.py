"""The table of head transforms: each family's own logits, of a tiny random model, from its hidden states and head."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import transformers

from fastdpo import linear_token_logps
from fastdpo.integrations.head_transform import SCALES, SOFTCAPS, HeadTransform, head_transform

SIZES = dict(
    vocab_size=151,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=16,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    initializer_range=0.3,
)
LATENT = dict(q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=16)
MAMBA = dict(mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=8, mamba_chunk_size=8)
PER_LAYER = dict(
    vocab_size_per_layer_input=151,
    hidden_size_per_layer_input=8,
    num_kv_shared_layers=0,
    layer_types=["full_attention"],
)
ALTUP = dict(laurel_rank=4, altup_num_inputs=2, activation_sparsity_pattern=[0.0])
EXPERTS = dict(num_local_experts=2, num_experts_per_tok=1)

# model_type: further sizes and the head's attributes, what the table makes of them
FAMILIES: dict[str, tuple[dict[str, Any], HeadTransform]] = {
    "llama": ({}, HeadTransform()),
    "gemma2": ({"final_logit_softcapping": 3.0}, HeadTransform(3.0)),
    "gemma3_text": ({"final_logit_softcapping": 3.0}, HeadTransform(3.0)),
    "vaultgemma": ({"final_logit_softcapping": 3.0}, HeadTransform(3.0)),
    "nanochat": ({"final_logit_softcapping": 3.0}, HeadTransform(3.0)),
    "beam": ({"final_logit_softcapping": 3.0}, HeadTransform(3.0)),
    "gemma3n_text": ({"final_logit_softcapping": 3.0, **PER_LAYER, **ALTUP}, HeadTransform(3.0)),
    "gemma4_text": ({"final_logit_softcapping": 3.0, **PER_LAYER}, HeadTransform(3.0)),
    "recurrent_gemma": (
        {"logits_soft_cap": 3.0, "lru_width": 32, "num_hidden_layers": 3, "attention_window_size": 8},
        HeadTransform(3.0),
    ),
    "xlstm": (
        {"output_logit_soft_cap": 3.0, "num_heads": 2, "head_dim": None, "chunk_size": 8, "embedding_dim": 32},
        HeadTransform(3.0),
    ),
    "cohere": ({"logit_scale": 0.25}, HeadTransform(None, 0.25)),
    "cohere2": ({"logit_scale": 0.25}, HeadTransform(None, 0.25)),
    "cohere2_moe": ({"logit_scale": 0.25, "num_experts": 2, "num_experts_per_tok": 1}, HeadTransform(None, 0.25)),
    "falcon_h1": ({"lm_head_multiplier": 0.25, **MAMBA}, HeadTransform(None, 0.25)),
    "granite": ({"logits_scaling": 4.0}, HeadTransform(None, 0.25)),
    "granitemoe": ({"logits_scaling": 4.0, **EXPERTS}, HeadTransform(None, 0.25)),
    "granitemoeshared": ({"logits_scaling": 4.0, "shared_intermediate_size": 16, **EXPERTS}, HeadTransform(None, 0.25)),
    "granite_swa": ({"logits_scaling": 4.0}, HeadTransform(None, 0.25)),
    "granitemoe_swa": ({"logits_scaling": 4.0, **EXPERTS}, HeadTransform(None, 0.25)),
    "hyperclovax": ({"logits_scaling": 0.25}, HeadTransform(None, 0.25)),
    "minicpm3": ({"dim_model_base": 8, "head_dim": None, **LATENT}, HeadTransform(None, 0.25)),
    "inkling_text": ({"logits_mup_width_multiplier": 4.0}, HeadTransform(None, 0.25)),
    "mpt": ({"logit_scale": 0.25, "d_model": 32, "n_heads": 2, "n_layers": 1}, HeadTransform()),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_models_own_logits(family: str) -> None:
    settings, expected = FAMILIES[family]
    sizes = {k: v for k, v in {**SIZES, **settings}.items() if v is not None}
    config = transformers.AutoConfig.for_model(family, **sizes)
    assert head_transform(config) == expected
    torch.use_deterministic_algorithms(False)  # some of them read memory that torch.empty gave them
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    ids = torch.arange(1, 10)[None] * 13 % SIZES["vocab_size"]
    with torch.no_grad():
        truth = model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
        hidden, head = model.base_model(input_ids=ids, use_cache=False)[0], model.get_output_embeddings()
        softcap, scale = head_transform(config)
        ours = linear_token_logps(
            hidden, head.weight, ids, bias=head.bias, shift=True, softcap=softcap, logit_scale=scale
        ).logps
        plain = linear_token_logps(hidden, head.weight, ids, bias=head.bias, shift=True).logps
    truth = truth[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(ours[:, :-1], truth, rtol=1e-4, atol=1e-4)
    if expected != HeadTransform():
        assert (plain[:, :-1] - truth).abs().max() > 1e-2, "without its transform the logps are others"


def test_the_whole_table_is_tested() -> None:
    given = {name for settings, _ in FAMILIES.values() for name in settings}
    # Muse has none but its vision-language models: its attribute below
    assert {*SOFTCAPS, *SCALES} - given == {"output_multiplier"}


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({}, (None, 1.0)),
        ({"output_multiplier": 0.2, "final_logit_softcapping": 20}, (20.0, 0.2)),
        ({"logits_mup_width_multiplier": 8.0}, (None, 0.125)),
        ({"logit_scale": None, "final_logit_softcapping": None}, (None, 1.0)),
        ({"logit_scale": 0.5, "logits_scaling": 1.0}, (None, 0.5)),
        ({"attn_logit_softcapping": 50.0, "mlp_up_softcap": 25.0, "gate_soft_cap": 15.0}, (None, 1.0)),
        ({"embedding_multiplier": 12.0, "residual_multiplier": 0.2, "attention_multiplier": 0.1}, (None, 1.0)),
        ({"logit_scale_init_value": 2.6, "router_logits_scale": 3.0, "num_logits_to_keep": 5}, (None, 1.0)),
        ({"dim_model_base": 64, "hidden_size": 64}, (None, 1.0)),
        ({"unpadded_vocab_size": 100, "vocab_size": 100}, (None, 1.0)),
    ],
)
def test_attributes(attributes, expected):
    assert head_transform(SimpleNamespace(**attributes)) == expected


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"output_multiplier_scale": 0.5}, r"output_multiplier_scale: 0\.5"),  # Grok-1
        ({"mup_width_multiplier": 8.0}, r"mup_width_multiplier: 8\.0"),  # Phi-3 small
        ({"dim_model_base": 256, "hidden_size": 2304}, "dim_model_base: 256"),  # MiniCPM
        ({"logit_softcap": 30.0}, r"logit_softcap: 30\.0"),
        ({"lm_head_scaling": 2.0}, r"lm_head_scaling: 2\.0"),
        ({"scale_logits": True}, "scale_logits: True"),
        ({"logits_temperature": 0.5}, r"logits_temperature: 0\.5"),
        ({"logit_scale": 0.5, "logits_scaling": 2.0}, "logit_scale and logits_scaling are both set"),
        ({"final_logit_softcapping": 3, "logits_soft_cap": 3}, "final_logit_softcapping and logits_soft_cap are both"),
        ({"unpadded_vocab_size": 99, "vocab_size": 100}, "unpadded_vocab_size: 99"),
    ],
)
def test_what_is_not_known_raises_by_name(attributes, message):
    with pytest.raises(ValueError, match=message):
        head_transform(SimpleNamespace(**attributes))


def test_no_config_of_transformers_is_refused_but_inkling2() -> None:
    """Every causal LM's defaults: a name that only looks like a head's raises nowhere."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    refused, read = set(), 0
    for name in NAMES:
        try:
            config = transformers.CONFIG_MAPPING[name]()
            config.get_text_config()
        except Exception:
            continue  # no defaults, or a config of several decoders
        read += 1
        try:
            head_transform(config)
        except ValueError as error:
            refused.add(str(error).split(":")[0])
    assert read > 100
    assert refused <= {"unpadded_vocab_size"}
