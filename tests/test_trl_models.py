"""Model families on FastDPOTrainer, the same run as TRL's: heads with a bias, softcap or scale; experts; images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

import transformers
from trl import DPOTrainer
from trl_kit import VOCAB, assert_same_run, train, trl_as_it_was  # noqa: F401

from fastdpo import demo_task
from fastdpo.integrations.trl import FastDPOTrainer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
EXPERTS = {"output_router_logits": True, "router_aux_loss_coef": 0.3, "num_experts_per_tok": 2}

#: family -> config of it that makes the head special
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {"tie_word_embeddings": True},
    "GPTJ": {"rotary_dim": 4},  # a bias on the head
    "Gemma2": {"final_logit_softcapping": 3.0, "head_dim": 16},
    "Cohere": {"logit_scale": 0.25},
    "Granite": {"logits_scaling": 4.0},
    "Mixtral": {"num_local_experts": 4, **EXPERTS},
    "Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 16, **EXPERTS},
}


def save(family: str, folder: Path, **settings: Any) -> str:
    tokenizer = demo_task.tokenizer()
    torch.manual_seed(0)
    tokens = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    config = getattr(transformers, f"{family}Config")(**{**SMALL, **tokens, **settings})
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    bias = model.lm_head.bias
    if bias is not None:
        torch.nn.init.normal_(bias)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def both(folder: str, tmp_path: Path, **settings: Any) -> Any:
    runs = [train(kind, folder, tmp_path / kind.__name__, **settings) for kind in (DPOTrainer, FastDPOTrainer)]
    assert_same_run(*runs)
    return runs[1]


def test_a_softcap_that_trl_does_not_read(tmp_path):
    """RecurrentGemma's: the logps of step 0 are the model's own, which stock TRL's are not."""
    cap = {"logits_soft_cap": 1.0, "num_hidden_layers": 3, "attention_window_size": 8, "lru_width": 32}
    folder = save("RecurrentGemma", tmp_path / "model", **cap)
    run = train(FastDPOTrainer, folder, tmp_path, max_steps=1)
    stock = train(DPOTrainer, folder, tmp_path, max_steps=1)
    mine, theirs = (r.state.log_history[0]["logps/chosen"] for r in (run, stock))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    batch = next(iter(run.get_train_dataloader()))
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    logps = logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    chosen = (logps * batch["completion_mask"][:, 1:]).sum(1).chunk(2)[0].mean()
    assert mine == pytest.approx(float(chosen), abs=1e-3)
    assert abs(theirs - mine) > 0.02


@pytest.mark.parametrize("family", FAMILIES)
def test_family(tmp_path, family):
    run = both(save(family, tmp_path / "model", **FAMILIES[family]), tmp_path)
    config, first = run.model.config, run.state.log_history[0]
    assert ("aux_loss" in first) == hasattr(config, "output_router_logits")
    assert (run.model.lm_head.bias is not None) == (family == "GPTJ")
    if family in ("Gemma2", "Cohere", "Granite"):  # the same model without it is another one
        plain = {"Gemma2": {"final_logit_softcapping": None}, "Cohere": {"logit_scale": 1.0}}
        other = plain.get(family, {"logits_scaling": 1.0})
        settings = FAMILIES[family] | other
        without = train(FastDPOTrainer, save(family, tmp_path / "other", **settings), tmp_path, max_steps=1)
        assert abs(without.state.log_history[0]["logps/chosen"] - first["logps/chosen"]) > 0.1


@pytest.mark.parametrize("coefficient", [0.0, 1.5])
def test_router_aux_loss_coef(tmp_path, coefficient):
    """Of the trainer's config, over the model's; 0 turns it off."""
    folder = save("Qwen3Moe", tmp_path / "model", **FAMILIES["Qwen3Moe"])
    first = both(folder, tmp_path, router_aux_loss_coef=coefficient).state.log_history[0]
    assert ("aux_loss" in first) == (coefficient > 0)
    assert first["loss"] == pytest.approx(0.6931 + coefficient * first.get("aux_loss", 0), abs=1e-3)


# --- images ----------------------------------------------------------------------------------------------------------


def save_llava(folder: Path) -> str:
    """A LLaVA of random weights: a CLIP tower of 4 patches, the demo's tokenizer with an image token."""
    tokenizer = demo_task.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    image = tokenizer.convert_tokens_to_ids("<image>")
    torch.manual_seed(0)
    text = transformers.LlamaConfig(**{**SMALL, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None})
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=image, vision_feature_layer=-1, image_seq_length=4
    )
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)
    size = {"height": 16, "width": 16}
    transformers.LlavaProcessor(
        transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=(
            "{% for m in messages %}{% for part in m['content'] %}"
            "{{ '<image> ' if part['type'] == 'image' else part['text'] + ' ' }}"
            "{% endfor %}{% endfor %}"
        ),
    ).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_images(tmp_path, adapter):
    pil = pytest.importorskip("PIL.Image")
    from peft import LoraConfig
    from trl_kit import PAIRS

    folder = save_llava(tmp_path / "model")
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    rows = [
        {side: [{"role": role, "content": pair[side].strip()}] for side, role in roles.items()}
        | {"images": [pil.new("RGB", (16, 16), (40 * i, 200 - 30 * i, 7 * i))]}
        for i, pair in enumerate(PAIRS)
    ]
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM") if adapter else None
    runs = []
    for kind in (DPOTrainer, FastDPOTrainer):
        processor = transformers.AutoProcessor.from_pretrained(folder)
        model = transformers.LlavaForConditionalGeneration.from_pretrained(folder)
        arguments = {"processing_class": processor, "peft_config": config}
        runs.append(
            train(kind, folder, tmp_path / kind.__name__, model=model, rows=rows, arguments=arguments, max_length=None)
        )
    assert_same_run(*runs)
    batch = next(iter(runs[1].get_train_dataloader()))
    assert "pixel_values" in batch
