"""fused_head: the model's own loss, gradients, generation and checkpoints, without logits; and what it refuses."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
pytest.importorskip("peft")

import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from fastdpo.integrations.transformers import FusedOutput, fused_head, is_fused, unfuse_head

VOCAB = 151
SIZES: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=16,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    initializer_range=0.3,
)
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama tied": {"model_type": "llama", "tie_word_embeddings": True},
    "gemma2": {"final_logit_softcapping": 3.0},
    "cohere": {"logit_scale": 0.25},
    "phi": {},  # its head has a bias
    "mixtral": {"num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 0.5},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "output_router_logits": True,
    },
    "llama4_text": {"num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 48},  # no base_model
    "gpt2": {"n_embd": 32, "n_head": 2, "n_layer": 2, "n_positions": 32},  # other positional arguments
}


def tiny(family: str = "llama", **settings: Any) -> Any:
    torch.manual_seed(0)
    settings = {**FAMILIES.get(family, {}), **settings}
    config = AutoConfig.for_model(settings.pop("model_type", family), **{**SIZES, **settings})
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(autouse=True)
def _no_poison():
    """transformers' own initialisation reads memory that torch.empty gave it."""
    torch.use_deterministic_algorithms(False)


def batch(rows: int = 2, length: int = 9) -> dict[str, Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(3, VOCAB, (rows, length))
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :3] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def loss_and_gradients(model: Any, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_equal_runs(theirs: Any, mine: Any, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(mine[0], theirs[0], rtol=tolerance, atol=tolerance)
    assert mine[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        atol = tolerance * max(1e-3, float(gradient.abs().max()))
        torch.testing.assert_close(mine[1][name], gradient, rtol=10 * tolerance, atol=atol, msg=name)


# --- the loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_the_models_own(family):
    model = tiny(family)
    for more in ({}, {"num_items_in_batch": torch.tensor(17)}):
        theirs = loss_and_gradients(unfuse_head(model), **batch(), **more)
        mine = loss_and_gradients(fused_head(model), **batch(), **more)
        assert_equal_runs(theirs, mine)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_token_results(family):
    model, inputs = tiny(family), batch()
    logits = model(inputs["input_ids"]).logits
    truth = logits[:, :-1].log_softmax(-1).gather(-1, inputs["input_ids"][:, 1:, None])[..., 0]
    fused_head(model, stats=("entropy", "is_top1"), grad_tol=0)
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    position = names.index("labels")  # given by position too
    out = model(inputs["input_ids"], *[None] * (position - 1), inputs["input_ids"])
    torch.testing.assert_close(out.token_logps[:, :-1], truth, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.entropy, torch.distributions.Categorical(logits=logits).entropy() * out.label_mask)
    assert (out.is_top1[:, :-1] == (logits[:, :-1].argmax(-1) == inputs["input_ids"][:, 1:])).all()
    assert out.label_mask[:, :-1].all() and not out.label_mask[:, -1].any()
    assert "logits" not in out and out.mean_logits is None
    assert out.tokens.logps is out.token_logps


def _no_logits(forward):
    def checked(self, x):
        out = forward(self, x)
        return pytest.fail("the head ran") if out.shape[-1] == VOCAB else out

    return checked


def test_no_logits_are_made(monkeypatch):
    model = fused_head(tiny())
    monkeypatch.setattr(nn.Linear, "forward", _no_logits(nn.Linear.forward))
    model(**batch()).loss.backward()
    with pytest.raises(pytest.fail.Exception):
        model(batch()["input_ids"])


def test_shift_labels_and_a_batch_that_does_not_count():
    model, inputs = tiny(), batch()
    aligned = torch.cat([inputs["labels"][:, 1:], torch.full((2, 1), -100)], 1)
    del inputs["labels"]
    theirs = loss_and_gradients(model, **inputs, labels=aligned, shift_labels=aligned)
    fused_head(model)
    assert_equal_runs(theirs, loss_and_gradients(model, **inputs, labels=aligned, shift_labels=aligned))
    assert_equal_runs(theirs, loss_and_gradients(model, **inputs, shift_labels=aligned))
    none, gradients = loss_and_gradients(model, **inputs, labels=torch.full_like(aligned, -100))
    assert none == 0
    assert not any(g.any() for g in gradients.values())


def test_router_loss_as_asked_for():
    model = fused_head(tiny("mixtral"))
    with_it, without = model(**batch()), model(**batch(), output_router_logits=False)
    torch.testing.assert_close(with_it.loss - without.loss, 0.5 * with_it.aux_loss)
    assert without.aux_loss is None


def test_a_config_without_return_dict():
    model = tiny()
    model.config.return_dict = False
    assert fused_head(model, check=False)(**batch()).loss > 0


def test_hidden_states_and_cache_are_passed_on():
    out = fused_head(tiny())(**batch(), output_hidden_states=True, use_cache=True)
    assert len(out.hidden_states) == 3
    assert out.past_key_values.get_seq_length() == 9


@pytest.mark.parametrize("family", ["llama tied", "gemma2"])
def test_bf16_autocast_and_gradient_checkpointing(family):
    model = tiny(family).train()
    with torch.autocast("cpu", torch.bfloat16):
        theirs = loss_and_gradients(model, **batch())
    fused_head(model, grad_tol=0)
    model.gradient_checkpointing_enable()
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal_runs(theirs, loss_and_gradients(model, **batch()), tolerance=4e-2)
    assert_equal_runs(
        loss_and_gradients(unfuse_head(model), **batch()), loss_and_gradients(fused_head(model), **batch())
    )


def test_compiled():
    model = tiny("gemma2")
    theirs = loss_and_gradients(model, **batch())
    fused_head(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    model.zero_grad()
    loss = compiled(**batch()).loss
    loss.backward()
    assert_equal_runs(theirs, (loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))


def test_bf16_weights():
    model = tiny("cohere").bfloat16()
    theirs = model(**batch()).loss
    torch.testing.assert_close(fused_head(model)(**batch()).loss, theirs, rtol=2e-2, atol=2e-2, check_dtype=False)


def test_vision_language_model():
    text = {**SIZES, "model_type": "gemma2", "final_logit_softcapping": 3.0}
    vision = {"model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    settings = {"image_token_id": 150, "projection_dim": 32, "hidden_size": 32}
    config = transformers.PaliGemmaConfig(text_config=text, vision_config=vision, **settings)
    model = transformers.PaliGemmaForConditionalGeneration(config).eval()
    inputs = batch()
    inputs["input_ids"][:, :4] = 150
    inputs |= {"pixel_values": torch.randn(2, 3, 8, 8), "token_type_ids": torch.zeros_like(inputs["input_ids"])}
    theirs = loss_and_gradients(model, **inputs)
    assert_equal_runs(theirs, loss_and_gradients(fused_head(model), **inputs))


@pytest.mark.parametrize("name", ["AyaVision", "Cohere2Vision"])
def test_a_vision_language_model_without_its_text_configs_scale(name):
    text = {**SIZES, "model_type": "cohere2", "logit_scale": 0.25}
    vision = {"model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    config = getattr(transformers, f"{name}Config")(text_config=text, vision_config=vision)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    theirs = loss_and_gradients(model, **batch())
    assert_equal_runs(theirs, loss_and_gradients(fused_head(model), **batch()))


# --- the model stays what it was -------------------------------------------------------------------------------------


def test_without_labels_and_undone_it_is_the_models_own():
    model, inputs = tiny(), batch()
    logits = model(inputs["input_ids"]).logits
    words = model.generate(inputs["input_ids"], max_new_tokens=4, do_sample=False)
    keys, loss = list(model.state_dict()), model(**inputs).loss
    assert fused_head(model) is model and is_fused(model)
    assert model(inputs["input_ids"]).logits.equal(logits)
    assert model.generate(inputs["input_ids"], max_new_tokens=4, do_sample=False).equal(words)
    assert list(model.state_dict()) == keys
    assert isinstance(model(**inputs), FusedOutput)
    unfuse_head(model)
    assert not is_fused(model) and "forward" not in vars(model)
    assert model(**inputs).loss.equal(loss)
    assert model(**inputs).logits is not None
    unfuse_head(model)


def test_another_ones_forward_comes_back():
    model = tiny()
    own = model.forward
    calls = []
    model.forward = theirs = lambda *a, **k: calls.append(1) or own(*a, **k)
    with pytest.raises(ValueError, match="its forward was replaced already"):
        fused_head(model)
    model._hf_hook = None  # accelerate's device_map
    fused_head(model, check=False)
    assert isinstance(model(**batch()), FusedOutput) and not calls
    model(batch()["input_ids"])
    assert calls == [1]
    unfuse_head(model)
    assert model.forward is theirs


def test_a_forward_set_over_ours_is_the_models_own_again():
    """accelerate wraps the forward for autocast, and leaves it there."""
    model = fused_head(tiny())
    fused = model.forward
    model.forward = lambda *a, **k: fused(*a, **k)
    assert isinstance(model(**batch()), FusedOutput)
    unfuse_head(model)
    assert model(**batch()).logits is not None


def test_deepcopy_is_fused_and_its_own():
    model = fused_head(tiny())
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.zero_()
    logps = other(**batch()).token_logps
    torch.testing.assert_close(logps[logps != 0], torch.full_like(logps[logps != 0], -torch.tensor(VOCAB).log()))
    unfuse_head(other)
    assert is_fused(model) and not is_fused(other)


def test_save_pretrained(tmp_path):
    model = fused_head(tiny("llama tied"))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model) and not is_fused(loaded)
    torch.testing.assert_close(loaded(**batch()).loss, model(**batch()).loss)
