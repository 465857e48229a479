"""Which heads fused_head takes: PEFT's where they are one product; and what it refuses, by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
pytest.importorskip("peft")

import peft
import transformers
from test_transformers import SIZES, VOCAB, assert_equal_runs, batch, loss_and_gradients, tiny

from fastdpo.integrations.head_product import UnsupportedHead
from fastdpo.integrations.transformers import fused_head, is_fused, unfuse_head


@pytest.fixture(autouse=True)
def _no_poison():
    """transformers' own initialisation reads memory that torch.empty gave it."""
    torch.use_deterministic_algorithms(False)


# --- PEFT ------------------------------------------------------------------------------------------------------------


def lora(model: Any, **settings: Any) -> Any:
    config = peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False, **settings})
    return peft.get_peft_model(model, config).eval()


@pytest.mark.parametrize("first", ["fused", "peft"])
@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["lm_head"]}], ids=["lora", "modules_to_save"])
def test_lora(first, settings):
    reference = lora(tiny(), **settings)
    model = lora(fused_head(tiny()), **settings) if first == "fused" else fused_head(lora(tiny(), **settings))
    model.load_state_dict(reference.state_dict())
    if settings:
        with torch.no_grad():
            for one in (reference, model):
                one.get_base_model().lm_head.modules_to_save["default"].weight.mul_(1.5)
    assert_equal_runs(loss_and_gradients(reference, **batch()), loss_and_gradients(model, **batch()))
    with model.disable_adapter(), reference.disable_adapter():
        torch.testing.assert_close(model(**batch()).loss, reference(**batch()).loss, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_an_adapter_on_the_head(settings):
    model, reference = (lora(tiny(), target_modules=["lm_head"], **settings) for _ in range(2))
    model.load_state_dict(reference.state_dict())
    fused_head(model)
    assert_equal_runs(loss_and_gradients(reference, **batch()), loss_and_gradients(model, **batch()))
    for one in (reference, model):
        one.merge_adapter()
    torch.testing.assert_close(model(**batch()).loss, reference(**batch()).loss, rtol=1e-4, atol=1e-4)


# --- what it refuses -------------------------------------------------------------------------------------------------


class Quantised(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def test_heads_it_cannot_honour():
    model = tiny()
    linear = model.lm_head
    for head, message in (
        (Quantised(32, VOCAB), "a .*Quantised, which has a forward of its own"),
        (nn.Sequential(linear), "Sequential, is not supported"),
    ):
        model.lm_head = head
        with pytest.raises(UnsupportedHead, match=message):
            fused_head(model)
    model.lm_head = linear
    fused_head(model)
    linear.weight = nn.Parameter(torch.ones(VOCAB, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedHead, match="holds Parameter torch.int8"):
        model(**batch())
    linear.weight = nn.Parameter(torch.ones(VOCAB, 32))
    linear.weight.ds_id = 0  # what DeepSpeed sets on a partitioned parameter
    with pytest.raises(UnsupportedHead, match="its weight is partitioned by DeepSpeed ZeRO-3"):
        model(**batch())
    del linear.weight.ds_id
    linear.register_forward_hook(lambda *a: None)
    with pytest.raises(UnsupportedHead, match="has forward hooks"):
        model(**batch())


def test_models_it_cannot_honour():
    with pytest.raises(TypeError, match="expected a PreTrainedModel or a PeftModel, got Linear"):
        fused_head(nn.Linear(2, 2))
    sizes = dict(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(NotImplementedError, match="is an encoder-decoder"):
        fused_head(transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)))
    model = tiny()
    model.config.logits_temperature = 0.5
    with pytest.raises(ValueError, match=r"logits_temperature: 0\.5 in the config"):
        fused_head(model)
    model = tiny("cohere")
    model.logit_scale = 0.5  # other than its config says
    with pytest.raises(ValueError, match="CohereForCausalLM does not make its logits of .* scale 0.25: logps differ"):
        fused_head(model)
    assert not is_fused(model)


def test_a_model_that_masks_logits_is_refused():
    images = {"<image>": 4} | {f"IMGIMG{letter}Z": 10 + i for i, letter in enumerate("ABCDEFGH")}
    codes = {"embed_dim": 8, "num_embeddings": 8, "latent_channels": 8, "resolution": 16, "base_channels": 32}
    codes |= {"channel_multiplier": [1, 1], "num_res_blocks": 1}
    sizes = {name: size for name, size in SIZES.items() if name != "head_dim"}
    config = transformers.ChameleonConfig(**sizes, vocabulary_map=images, vq_config=codes)
    with pytest.raises(ValueError, match="ChameleonForConditionalGeneration takes tokens out of its vocabulary"):
        fused_head(transformers.ChameleonForConditionalGeneration(config))


def test_a_loss_with_more_in_it_is_refused(monkeypatch):
    model = tiny()
    own = type(model).forward

    def with_more(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = own(self, *args, **kwargs)
        if out.loss is not None:
            out.loss = out.loss + 1
        return out

    monkeypatch.setattr(type(model), "forward", with_more)
    with pytest.raises(ValueError, match="it adds something that a fused head would leave out"):
        fused_head(model)


def test_arguments():
    model = tiny()
    with pytest.raises(TypeError, match="softcap: not a keyword of fused_head"):
        fused_head(model, softcap=3.0)
    with pytest.raises(ValueError, match="backend: unknown backend"):
        fused_head(model, backend="cuda")
    assert not is_fused(model)
    with pytest.raises(ValueError, match="is fused already"):
        fused_head(fused_head(model))
    inputs = batch()
    labels = inputs.pop("labels")
    for more, message in (
        ({"labels": labels, "return_dict": False}, "return_dict: False with labels"),
        ({"labels": labels, "logits_to_keep": 1}, "logits_to_keep: not with labels"),
        ({"labels": labels[:, 1:]}, r"labels: shape \[2, 8\], expected \[2, 9\]"),
        ({"labels": labels, "completion_labels": labels}, "labels: given beside completion_labels"),
        ({"ref_logps": torch.zeros(2)}, "ref_logps: given without completion_labels"),
        ({"num_items_in_batch": 3}, "label_smoothing_factor, or a compute_loss_func"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**inputs, **more)
    unfuse_head(model)
