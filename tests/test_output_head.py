"""output_head: one product equal to head(hidden), in value and gradients, for each head that it knows; others raise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("peft")

import peft
from peft import LoraConfig, TrainableTokensConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from fastdpo.integrations.head_product import HeadProduct, UnsupportedHead, is_bare, product_of
from fastdpo.integrations.output_head import check_head, output_head

VOCAB, HIDDEN = 101, 16


def model(bias: bool = False, tied: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    made = LlamaForCausalLM(config).to(dtype)
    if bias:
        made.lm_head.bias = nn.Parameter(torch.randn(VOCAB, dtype=dtype))
    return made


def lora(**settings: Any) -> LoraConfig:
    fixed = {"r": 4, "lora_alpha": 12, "target_modules": ["lm_head"], "init_lora_weights": False}
    return LoraConfig(**{**fixed, **settings})


def shaken(made: Any) -> Any:
    """All adapter parameters away from their initial values (B = 0, magnitude = norm)."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if any(part in name for part in ("lora_", "modules_to_save", "trainable_tokens")):
                parameter += 0.1 * torch.randn_like(parameter)
    return made


def two_adapters(first: LoraConfig, second: LoraConfig, **settings: Any) -> Any:
    made = get_peft_model(model(**settings), first)
    made.add_adapter("second", second)
    made.base_model.set_adapter(["default", "second"])
    return shaken(made)


HEADS = {
    "bare": lambda: model(),
    "bias": lambda: model(bias=True),
    "lora": lambda: shaken(get_peft_model(model(), lora())),
    "rslora with a bias": lambda: shaken(get_peft_model(model(bias=True), lora(use_rslora=True))),
    "lora on a tied head": lambda: shaken(get_peft_model(model(tied=True), lora())),
    "lora_bias": lambda: shaken(get_peft_model(model(bias=True), lora(lora_bias=True))),
    "lora_bias alone": lambda: shaken(get_peft_model(model(), lora(lora_bias=True))),
    "lora dropout": lambda: shaken(get_peft_model(model(), lora(lora_dropout=0.4))),
    "dora": lambda: shaken(get_peft_model(model(), lora(use_dora=True))),
    "dora with a bias": lambda: shaken(get_peft_model(model(bias=True), lora(use_dora=True))),
    "dora dropout": lambda: shaken(get_peft_model(model(bias=True), lora(use_dora=True, lora_dropout=0.4))),
    "two loras": lambda: two_adapters(lora(), lora(r=3, lora_dropout=0.3)),
    "lora, then dora": lambda: two_adapters(lora(lora_bias=True), lora(use_dora=True), bias=True),
    "lora_bias, then dora": lambda: two_adapters(lora(lora_bias=True), lora(use_dora=True)),
    "dora, then lora": lambda: two_adapters(lora(use_dora=True), lora(r=3)),
    "target_parameters": lambda: shaken(
        get_peft_model(model(bias=True), lora(target_modules=[], target_parameters=["lm_head.weight"]))
    ),
    "modules_to_save": lambda: shaken(
        get_peft_model(model(bias=True), lora(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    ),
    "trainable_token_indices": lambda: shaken(
        get_peft_model(model(), lora(target_modules=["q_proj"], trainable_token_indices={"lm_head": [3, 7]}))
    ),
    "trainable tokens of a tied head": lambda: shaken(
        get_peft_model(model(tied=True), TrainableTokensConfig(token_indices=[3, 7], target_modules=["embed_tokens"]))
    ),
}


def gradients(logits: torch.Tensor, slopes: torch.Tensor, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = torch.autograd.grad((logits * slopes).sum(), list(inputs.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(inputs, found, strict=True) if gradient is not None}


def assert_equals_module(made: Any, dtype: torch.dtype = torch.float32, rounding: float = 2e-6) -> None:
    """Value, and the gradients of hidden and all parameters of the head, from the same random numbers."""
    head = made.get_output_embeddings()
    hidden = torch.randn(2, 9, HIDDEN, dtype=dtype, requires_grad=True)
    slopes = torch.randn(2, 9, VOCAB)
    inputs = {"hidden": hidden, **{n: p for n, p in head.named_parameters() if p.requires_grad}}
    results = []
    for whole in (True, False):
        torch.manual_seed(2)
        if whole:
            logits = head(hidden)
        else:
            product = output_head(head, hidden)
            logits = nn.functional.linear(product.hidden, product.weight, product.bias)
        results.append({"logits": logits, **gradients(logits, slopes, inputs)})
    theirs, mine = results
    assert theirs.keys() == mine.keys()
    for name, value in theirs.items():
        assert value.abs().max() > 0, name
        torch.testing.assert_close(mine[name], value, rtol=0, atol=rounding * value.abs().max().item(), msg=name)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", HEADS)
def test_equals_the_module(name, training):
    assert_equals_module(HEADS[name]().train(training))


@pytest.mark.parametrize("name", ["lora", "dora", "modules_to_save", "trainable_token_indices", "target_parameters"])
def test_disabled_and_merged(name):
    made = HEADS[name]().eval()
    hidden = torch.randn(5, HIDDEN)
    with made.disable_adapter():
        base = made.get_output_embeddings()(hidden)
        assert_close(made, hidden, base)
    adapted = made.get_output_embeddings()(hidden)
    assert not torch.allclose(base, adapted, atol=1e-3)
    assert_close(made, hidden, adapted)
    if name != "modules_to_save":
        made.merge_adapter()
        assert_close(made, hidden, adapted)
        with made.disable_adapter():  # PEFT unmerges here, and leaves it so
            assert_close(made, hidden, base)
        assert_close(made, hidden, adapted)
        assert not made.get_output_embeddings().merged_adapters


def assert_close(made: Any, hidden: torch.Tensor, expected: torch.Tensor) -> None:
    product = output_head(made.get_output_embeddings(), hidden)
    logits = nn.functional.linear(product.hidden, product.weight, product.bias)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dora", [False, True])
def test_bf16_keeps_what_the_adapter_adds(dora):
    """Merged into a bf16 weight, a young adapter would round away."""
    made = get_peft_model(model(dtype=torch.bfloat16), lora(use_dora=dora))
    head = made.get_output_embeddings()
    with torch.no_grad():
        for weight in (head.lora_A["default"].weight, head.lora_B["default"].weight):
            assert weight.dtype == torch.float32
            weight.normal_(std=0.005)
        if dora:
            head.lora_magnitude_vector["default"].weight *= 1 + 2**-10
    hidden = torch.randn(64, HIDDEN, dtype=torch.bfloat16)
    base = head.base_layer.weight.float()
    product = output_head(head, hidden)
    mine = product.hidden.float() @ product.weight.float().T - hidden.float() @ base.T
    assert product.weight.dtype == torch.bfloat16
    added = made.float().get_output_embeddings()(hidden.float()) - hidden.float() @ base.T
    assert (mine - added).norm() < 0.01 * added.norm()


def test_autocast():
    made = HEADS["dora dropout"]().train()
    with torch.autocast("cpu", torch.bfloat16):
        assert_equals_module(made, rounding=2e-2)


def test_frozen_parts_get_no_gradient():
    product = output_head(HEADS["lora"]().get_output_embeddings(), torch.randn(3, HIDDEN))
    product.weight.sum().backward()
    made = HEADS["lora"]()
    head = made.get_output_embeddings()
    output_head(head, torch.randn(3, HIDDEN)).weight.sum().backward()
    assert head.base_layer.weight.grad is None
    assert head.lora_B["default"].weight.grad.shape == (VOCAB, 4)


# --- refusals --------------------------------------------------------------------------------------------------------


class Linear4bit(nn.Linear):
    """As bitsandbytes': packed, and unpacked in its own forward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class QuantLinear(nn.Module):
    """As GPTQ's: no weight."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(2, 5, dtype=torch.int32))


class Shifted(torch.Tensor):
    """As torchao's: a tensor that is computed from others."""

    def __tensor_flatten__(self):
        return [], None

    @staticmethod
    def __tensor_unflatten__(inner, context, size, stride):
        raise NotImplementedError


def replaced_forward() -> nn.Module:
    head = nn.Linear(HIDDEN, VOCAB)
    head.forward = lambda x: x  # type: ignore[method-assign]
    return head


def holding(weight: torch.Tensor) -> nn.Module:
    head = nn.Linear(HIDDEN, VOCAB)
    head.weight = nn.Parameter(weight, requires_grad=False)
    return head


def tuned(config: Any) -> Any:
    return get_peft_model(model(), config).get_output_embeddings()


REFUSED = {
    "Linear4bit, which has a forward of its own": lambda: Linear4bit(HIDDEN, VOCAB),
    "QuantLinear": QuantLinear,
    "Linear, which has a forward of its own": replaced_forward,
    "Embedding": lambda: nn.Embedding(VOCAB, HIDDEN),
    "NoneType": lambda: None,
    "Parameter torch.int8": lambda: holding(torch.zeros(VOCAB, HIDDEN, dtype=torch.int8)),
    "Parameter torch.float8_e4m3fn": lambda: holding(torch.zeros(VOCAB, HIDDEN).to(torch.float8_e4m3fn)),
    r"Parameter torch.uint8 \[808, 1\]": lambda: holding(torch.zeros(808, 1, dtype=torch.uint8)),
    "Shifted torch.float32": lambda: holding(torch.randn(VOCAB, HIDDEN).as_subclass(Shifted)),
    "device meta": lambda: nn.Linear(HIDDEN, VOCAB, device="meta"),
    "peft.tuners.ia3": lambda: tuned(peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[])),
    "peft.tuners.loha": lambda: tuned(peft.LoHaConfig(target_modules=["lm_head"])),
    "peft.tuners.vera": lambda: tuned(peft.VeraConfig(target_modules=["lm_head"])),
    "ALoraLinearVariant": lambda: tuned(lora(alora_invocation_tokens=[3])),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_by_name(name):
    with pytest.raises(UnsupportedHead, match=name):
        check_head(REFUSED[name]())


def test_an_adapter_on_what_is_refused():
    made = model()
    made.lm_head = Linear4bit(HIDDEN, VOCAB)
    made = get_peft_model(made, lora())
    assert isinstance(made.get_output_embeddings(), peft.tuners.lora.layer.Linear)
    with pytest.raises(UnsupportedHead, match="Linear4bit"):
        check_head(made.get_output_embeddings())


def test_a_head_of_your_own():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 3 * super().forward(x)

    head, hidden = Scaled(HIDDEN, VOCAB, bias=False), torch.randn(4, HIDDEN)
    with pytest.raises(UnsupportedHead, match="Scaled"):
        check_head(head)
    product_of.register(Scaled, lambda head, hidden: HeadProduct(3 * hidden, head.weight, None))
    check_head(head)
    product = output_head(head, hidden)
    torch.testing.assert_close(product.hidden @ product.weight.T, head(hidden))


def test_is_bare():
    assert is_bare(nn.Linear(2, 3))
    assert not is_bare(replaced_forward())
    assert not is_bare(HEADS["modules_to_save"]().get_output_embeddings())
    assert not is_bare(None)
