"""The LLaMA-Factory patch, on a stand-in with the interface of its published source: same logps, no logits."""

from __future__ import annotations

import copy
import sys
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("peft")

import peft
from transformers import LlamaConfig, LlamaForCausalLM

from fastdpo.integrations import llama_factory
from fastdpo.integrations.llama_factory import main, patch, unpatch
from fastdpo.integrations.transformers import is_fused

VOCAB = 101


def naive(logits: Tensor, labels: Tensor, ld_alpha: float | None = None) -> tuple[Tensor, Tensor]:
    """(sums, lengths) of the labels' log-probabilities; ld_alpha: pair by pair, token by token."""
    logps = logits[:, :-1].log_softmax(-1)
    counted = [[t for t in range(labels.shape[1] - 1) if row[t + 1] != -100] for row in labels]
    sums = []
    for i, positions in enumerate(counted):
        common = min(len(positions), len(counted[(i + len(counted) // 2) % len(counted)]))
        weights = [1.0 if ld_alpha is None or n < common else ld_alpha for n in range(len(positions))]
        sums.append(sum(w * logps[i, t, labels[i, t + 1]] for w, t in zip(weights, positions, strict=True)))
    return torch.stack(sums), torch.tensor([len(positions) for positions in counted])


class CustomDPOTrainer:
    """What the patch touches of LLaMA-Factory's, and what calls it."""

    def __init__(self, model: Any, ref_model: Any, finetuning_args: Any, disable_dropout: bool = True, **kwargs: Any):
        self.model, self.ref_model, self.finetuning_args = model, ref_model, finetuning_args
        self.loss_type, self.ld_alpha = finetuning_args.pref_loss, finetuning_args.ld_alpha

    def concatenated_forward(
        self, model: Any, batch: dict[str, Tensor], is_ref_model: bool = False
    ) -> dict[str, Tensor]:
        if self.finetuning_args.use_ref_model:
            batch = {name: value.detach().clone() for name, value in batch.items()}
        labels = batch.pop("labels")
        logits = model(**batch, return_dict=True, use_cache=False).logits.to(torch.float32)
        logps, lengths = naive(logits, labels, None if is_ref_model else self.ld_alpha)
        averaged = self.loss_type in ("ipo", "orpo", "simpo")
        logps = logps / lengths if averaged else logps
        chosen, rejected = logps.chunk(2)
        return {
            "chosen_logps": chosen,
            "rejected_logps": rejected,
            "chosen_logits": logits.chunk(2)[0],
            "rejected_logits": logits.chunk(2)[1],
            "chosen_logps_avg": chosen if averaged else chosen / lengths.chunk(2)[0],
        }

    def compute_reference_log_probs(self, model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        context = nullcontext() if self.ref_model is not None else model.disable_adapter()
        with torch.no_grad(), context:
            out = self.concatenated_forward(self.ref_model or model, batch, is_ref_model=True)
        return out["chosen_logps"], out["rejected_logps"]


class CustomKTOTrainer:
    def __init__(self, model: Any, ref_model: Any, finetuning_args: Any, **kwargs: Any):
        self.model, self.ref_model = model, ref_model

    def forward(self, model: Any, batch: dict[str, Tensor], prefix: str = "") -> tuple[Tensor, Tensor]:
        inputs = {name: batch[prefix + name] for name in ("input_ids", "attention_mask")}
        logps, lengths = naive(model(**inputs).logits, batch[f"{prefix}labels"])
        return logps, logps / lengths


@pytest.fixture(autouse=True)
def factory(monkeypatch) -> SimpleNamespace:
    """A stand-in for the package, its two trainers fresh."""
    torch.use_deterministic_algorithms(False)  # transformers' initialisation reads memory that torch.empty gave it
    names = ["llamafactory", "llamafactory.train", "llamafactory.train.tuner"]
    names += [f"llamafactory.train.{stage}{end}" for stage in ("dpo", "kto") for end in ("", ".trainer")]
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    dpo = type("CustomDPOTrainer", (), dict(vars(CustomDPOTrainer)))
    kto = type("CustomKTOTrainer", (), dict(vars(CustomKTOTrainer)))
    sys.modules["llamafactory.train.dpo.trainer"].CustomDPOTrainer = dpo
    sys.modules["llamafactory.train.kto.trainer"].CustomKTOTrainer = kto
    yield SimpleNamespace(DPO=dpo, KTO=kto, tuner=sys.modules["llamafactory.train.tuner"])
    unpatch()


def tiny(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, initializer_range=0.3, **sizes)).eval()


def batch() -> dict[str, Tensor]:
    """Two pairs; completions of 4 and 5, 6 and 2 tokens."""
    torch.manual_seed(1)
    ids = torch.randint(2, VOCAB, (4, 9))
    mask, labels = torch.ones_like(ids), ids.clone()
    labels[:, :3] = -100
    for row, length in enumerate((4, 5, 6, 2)):
        mask[row, 3 + length :] = 0
        labels[row, 3 + length :] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def arguments(pref_loss: str = "sigmoid", ld_alpha: float | None = None, use_ref_model: bool = True) -> Any:
    return SimpleNamespace(pref_loss=pref_loss, ld_alpha=ld_alpha, use_ref_model=use_ref_model)


def without_logits(forward: Any) -> Any:
    """nn.Linear's forward, which fails where it makes logits."""

    def checked(self: Any, x: Any) -> Any:
        return pytest.fail("logits were made") if self.out_features == VOCAB else forward(self, x)

    return checked


@pytest.mark.parametrize(
    "settings",
    [{}, {"pref_loss": "ipo"}, {"pref_loss": "orpo", "use_ref_model": False}, {"ld_alpha": 0.3}],
    ids=["sigmoid", "ipo", "orpo", "ld_alpha"],
)
def test_dpo_logps_and_gradients(factory, monkeypatch, settings):
    theirs = factory.DPO(tiny(), tiny(1), arguments(**settings))
    expected = theirs.concatenated_forward(theirs.model, batch())
    expected_ref = theirs.compute_reference_log_probs(theirs.model, batch())
    patch(grad_tol=0)
    mine = factory.DPO(model=tiny(), ref_model=tiny(1), finetuning_args=arguments(**settings))
    for model in (mine.model, mine.ref_model):
        monkeypatch.setattr(type(model.lm_head), "forward", without_logits(type(model.lm_head).forward))
    out = mine.concatenated_forward(mine.model, batch())
    for name in ("chosen_logps", "rejected_logps", "chosen_logps_avg"):
        torch.testing.assert_close(out[name], expected[name], rtol=1e-4, atol=1e-4, msg=name)
    torch.testing.assert_close(
        mine.compute_reference_log_probs(mine.model, batch()), expected_ref, rtol=1e-4, atol=1e-4
    )
    gradients = []
    for trainer, result in ((theirs, expected), (mine, out)):
        (result["chosen_logps"] - 2 * result["rejected_logps"]).sum().backward()
        gradients.append([p.grad for p in trainer.model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4 * float(a.abs().max()))
    for side, rows in (("chosen", slice(0, 2)), ("rejected", slice(2, 4))):
        counted = batch()["labels"][rows, 1:] != -100
        mean = expected[f"{side}_logits"][:, :-1].mean(-1)[counted].mean()
        torch.testing.assert_close(out[f"{side}_logits"].mean(), mean, rtol=1e-4, atol=1e-4)


def test_the_batch_is_left_alone_for_the_reference(factory):
    patch()
    trainer, given = factory.DPO(tiny(), tiny(1), arguments()), batch()
    trainer.concatenated_forward(trainer.model, given)
    assert "labels" in given


def test_lora_is_its_own_reference(factory):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    torch.manual_seed(2)
    model = peft.get_peft_model(tiny(), config).eval()
    theirs = factory.DPO(copy.deepcopy(model), None, arguments())
    expected = theirs.compute_reference_log_probs(theirs.model, batch())
    policy = theirs.concatenated_forward(theirs.model, batch())
    assert not torch.allclose(policy["chosen_logps"], expected[0])
    patch()
    mine = factory.DPO(model, None, arguments())
    torch.testing.assert_close(mine.compute_reference_log_probs(model, batch()), expected, rtol=1e-4, atol=1e-4)
    out = mine.concatenated_forward(model, batch())
    torch.testing.assert_close(out["chosen_logps"], policy["chosen_logps"], rtol=1e-4, atol=1e-4)


def test_an_older_one_gets_its_tuple(factory):
    annotations = factory.DPO.concatenated_forward.__annotations__
    annotations["return"] = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
    try:
        patch()
        trainer = factory.DPO(tiny(), tiny(1), arguments())
        chosen, rejected, *_ = trainer.concatenated_forward(trainer.model, batch())
        expected = CustomDPOTrainer(tiny(), None, arguments()).concatenated_forward(tiny(), batch())
    finally:
        annotations["return"] = "dict[str, Tensor]"
    torch.testing.assert_close(chosen, expected["chosen_logps"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rejected, expected["rejected_logps"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prefix", ["", "kl_"])
def test_kto(factory, prefix):
    given = batch() | {f"kl_{name}": value.roll(1, 0) for name, value in batch().items()}
    given["kto_tags"] = torch.tensor([True, False, True, False])
    theirs = factory.KTO(tiny(), None, None)
    expected = theirs.forward(theirs.model, given, prefix)
    patch()
    mine = factory.KTO(tiny(), None, None)
    torch.testing.assert_close(mine.forward(mine.model, given, prefix), expected, rtol=1e-4, atol=1e-4)
    assert is_fused(mine.model)


def test_unpatch(factory):
    before = [getattr(c, m) for c, m in ((factory.DPO, "__init__"), (factory.DPO, "concatenated_forward"))]
    unpatch()  # without a patch(): nothing happens
    patch()
    patch(workspace_mb=8)
    assert factory.DPO.concatenated_forward is llama_factory._dpo_forward
    trainer = factory.DPO(tiny(), tiny(1), arguments())
    unpatch()
    assert [getattr(c, m) for c, m in ((factory.DPO, "__init__"), (factory.DPO, "concatenated_forward"))] == before
    out = trainer.concatenated_forward(trainer.model, batch())
    assert out["chosen_logits"].shape == (2, 9, VOCAB), "a trainer that was built makes logits again"
    assert not is_fused(factory.DPO(tiny(), None, arguments()).model)


def test_the_launcher(factory, monkeypatch):
    seen = []
    factory.tuner.run_exp = lambda: seen.append((sys.argv[1:], factory.DPO.concatenated_forward))
    monkeypatch.setattr(sys, "argv", ["llama_factory.py"])
    main(["train", "config.yaml", "learning_rate=1e-6"])
    assert seen == [(["config.yaml", "learning_rate=1e-6"], llama_factory._dpo_forward)]
    for wrong in ([], ["train"], ["export", "config.yaml"]):
        with pytest.raises(SystemExit, match="usage: python -m fastdpo.integrations.llama_factory train config.yaml"):
            main(wrong)


def test_an_unknown_one_is_refused(factory, monkeypatch):
    with pytest.raises(TypeError, match="beta: not a keyword of patch"):
        patch(beta=0.1)
    with pytest.raises(ValueError, match="backend: unknown backend"):
        patch(backend="cuda")
    factory.KTO.forward = lambda self, model, batch: None
    with pytest.raises(RuntimeError, match=r"CustomKTOTrainer.forward takes \(self, model, batch\), expected"):
        patch()
    del factory.DPO.concatenated_forward
    with pytest.raises(RuntimeError, match="has no attribute 'concatenated_forward'"):
        patch()
    monkeypatch.setitem(sys.modules, "llamafactory.train.dpo.trainer", None)
    with pytest.raises(ImportError):
        patch()
