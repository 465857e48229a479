"""The TRL drop-in: same outputs, same gradients, same training, and TRL as it was afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

import trl.kernels
import trl.kernels.chunked_logprob
import trl.trainer.utils
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from fastdpo import BetaSchedule, demo_task
from fastdpo.integrations import trl as integration
from fastdpo.integrations.trl import FastDPOTrainer, patch, patched, unpatch

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

ORIGINAL = trl.kernels.chunked_logprob.ChunkedLogProbFunction
ORIGINAL_SITES = integration._current()
VOCAB = 203  # ragged
PAIRS = [pair._asdict() for pair in demo_task.pairs(demo_task.prompts(0, 6), 0)]


@pytest.fixture(autouse=True)
def _trl_as_it_was():
    yield
    unpatch()
    assert integration._current() == ORIGINAL_SITES


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    """A folder with a random model of 203 tokens and a tokenizer of words."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = demo_task.tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def train(trainer_class: type, config_class: type, tiny: str, output: Path, lora: bool = False, **settings: Any) -> Any:
    """Three steps of two rows in float32; returns the trainer."""
    args = config_class(
        output_dir=str(output),
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        bf16=False,
        use_cpu=True,
        seed=1,
        **settings,
    )
    rows = PAIRS if config_class is DPOConfig else [{"prompt": p["prompt"], "completion": p["rejected"]} for p in PAIRS]
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM") if lora else None
    trainer = trainer_class(
        model=AutoModelForCausalLM.from_pretrained(tiny),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(tiny),
        peft_config=adapter,
    )
    trainer.train()
    return trainer


def assert_same_run(theirs: Any, mine: Any) -> None:
    """Equal logs (all metrics, not the loss alone) and weights, to float32 rounding."""
    skip = ("runtime", "per_second", "flos")
    for a, b in zip(theirs.state.log_history, mine.state.log_history, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            if not any(word in key for word in skip):
                assert b[key] == pytest.approx(a[key], rel=2e-4, abs=2e-4), key
    weights = dict(mine.model.named_parameters())
    for name, weight in theirs.model.named_parameters():
        # Adam's first steps are of the size of the learning rate wherever the gradient is not zero; a gradient that is
        # zero but for rounding may go either way
        off = (weights[name] - weight).abs() > 2e-5
        assert off.float().mean() < 2e-3, f"{name}: {int(off.sum())} of {off.numel()} weights differ"


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="plain"),
        pytest.param({"lora": True}, id="lora"),
        pytest.param({"use_weighting": True}, id="wpo"),
        pytest.param({"loss_type": ["ipo", "sft"], "loss_weights": [1.0, 0.5]}, id="two_losses"),
        pytest.param({"loss_type": "discopop", "f_divergence_type": "js_divergence"}, id="f_divergence"),
        pytest.param({"loss_type": "aot", "label_smoothing": 0.1, "ld_alpha": 0.5}, id="ld_alpha"),
        pytest.param(
            {"loss_type": ["sigmoid_norm", "bco_pair", "exo_pair"], "label_smoothing": 1e-3}, id="three_losses"
        ),
    ],
)
def test_three_steps_equal_trl(tiny, tmp_path, settings):
    theirs = train(DPOTrainer, DPOConfig, tiny, tmp_path / "trl", **settings)
    mine = train(FastDPOTrainer, DPOConfig, tiny, tmp_path / "fastdpo", **settings)
    assert len(mine.state.log_history) == 4
    assert_same_run(theirs, mine)


def test_beta_schedule(tiny, tmp_path):
    class Scheduled(FastDPOTrainer):
        beta_schedule = BetaSchedule(0.4, 0.1, 3)

    logs = train(Scheduled, DPOConfig, tiny, tmp_path / "scheduled").state.log_history
    assert [record["beta"] for record in logs[:3]] == pytest.approx([0.4, 0.3, 0.2])
    constant = train(FastDPOTrainer, DPOConfig, tiny, tmp_path / "constant", beta=0.4).state.log_history
    assert logs[0]["rewards/chosen"] == constant[0]["rewards/chosen"]
    assert logs[1]["rewards/chosen"] == pytest.approx(0.75 * constant[1]["rewards/chosen"], rel=1e-3)


def test_precomputed_reference_equals_trl(tiny, tmp_path, monkeypatch):
    calls = []
    spied = integration.TokenLogpFunction.apply
    monkeypatch.setattr(
        integration.TokenLogpFunction, "apply", lambda self, *a: calls.append(a[0].requires_grad) or spied(self, *a)
    )
    # TRL keeps the reference logps in a file named after data and model: give each trainer its own
    for i, name in enumerate(("trl", "fastdpo")):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(
            Dataset, "_get_cache_file_path", lambda self, f, folder=tmp_path / name: str(folder / f"cache-{f}.arrow")
        )
        trainer = train(
            (DPOTrainer, FastDPOTrainer)[i], DPOConfig, tiny, tmp_path / name, precompute_ref_log_probs=True
        )
        if i == 0:
            theirs = trainer
            assert not calls
    assert_same_run(theirs, trainer)
    assert calls.count(True) == 3, "three steps"
    assert calls.count(False) >= 3, "the reference pass over six pairs"


def test_patch_serves_other_trainers(tiny, tmp_path, monkeypatch):
    theirs = train(SFTTrainer, SFTConfig, tiny, tmp_path / "trl")
    calls = []
    spied = integration.TokenLogpFunction.apply
    monkeypatch.setattr(integration.TokenLogpFunction, "apply", lambda self, *a: calls.append(1) or spied(self, *a))
    with patched():
        mine = train(SFTTrainer, SFTConfig, tiny, tmp_path / "patched")
    assert len(calls) == 3
    assert_same_run(theirs, mine)


# --- the function ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("softcap", "scale"), [(None, 1.0), (3.0, 0.7)])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_five_outputs_and_gradients_equal_trl(bias, softcap, scale, temperature):
    torch.manual_seed(0)
    inputs = [torch.randn(37, 16, requires_grad=True), torch.randn(VOCAB, 16, requires_grad=True)]
    inputs += [torch.randn(VOCAB, requires_grad=True)] if bias else []
    targets = torch.randint(VOCAB, (37,))
    slopes = torch.randn(2, 37)
    results = []
    for function in (ORIGINAL, integration.TokenLogpFunction()):
        hidden, weight, *rest = inputs
        out = function.apply(hidden, weight, rest[0] if bias else None, targets, temperature, 64, softcap, scale)
        assert [x.requires_grad for x in out] == [True, True, False, False, False]
        gradients = torch.autograd.grad((out[0] * slopes[0] + out[1] * slopes[1]).sum(), inputs)
        results.append((*out, *gradients))
    for theirs, mine in zip(*results, strict=True):
        assert mine.dtype == theirs.dtype
        # relative to the largest: rounding of a sum over the vocabulary
        mine, theirs = mine.detach().float(), theirs.detach().float()
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("outputs", [(), ("log_probs",), ("log_probs", "is_top1"), ("mean_logits", "entropy")])
def test_outputs_not_asked_for_are_none(outputs):
    out = integration.TokenLogpFunction().apply(
        torch.randn(5, 4), torch.randn(9, 4), None, torch.arange(5), 1.0, 4, None, 1.0, outputs
    )
    names = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    assert out[0].shape == (5,)
    assert [x is not None for x in out[1:]] == [name in outputs for name in names]


def test_no_position_counts(tiny):
    """TRL then hands over [0, H], and needs a differentiable zero."""
    model = AutoModelForCausalLM.from_pretrained(tiny)
    trl.trainer.utils.add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    with patched():
        out = model(torch.arange(12).view(2, 6), labels=torch.full((2, 6), -100), fused_lm_head=True)
    out.log_probs.sum().backward()
    assert out.loss == 0
    assert model.lm_head.weight.grad is None or not model.lm_head.weight.grad.any()


def test_only_positions_that_count_are_scored(tiny, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(tiny)
    trl.trainer.utils.add_fused_lm_head(model)
    labels = torch.full((2, 6), -100)
    labels[:, 4:] = 7
    ids = torch.arange(12).view(2, 6)
    theirs = model(ids, labels=labels, fused_lm_head=True).log_probs
    rows = []
    spied = integration.TokenLogpFunction.apply
    monkeypatch.setattr(
        integration.TokenLogpFunction, "apply", lambda self, *a: rows.append(len(a[0])) or spied(self, *a)
    )
    with patched():
        mine = model(ids, labels=labels, fused_lm_head=True).log_probs
    assert rows == [4]
    torch.testing.assert_close(mine, theirs)


def test_errors():
    function = integration.TokenLogpFunction()
    arguments = (torch.randn(5, 4), torch.randn(9, 4), None, torch.arange(5), 1.0, 4, None, 1.0)
    with pytest.raises(ValueError, match="outputs: unknown entry 'entropie'"):
        function.apply(*arguments, ("log_probs", "entropie"))
    arguments[1].ds_id = 0  # what DeepSpeed sets on a partitioned parameter
    with pytest.raises(NotImplementedError, match="weight: an LM head partitioned by DeepSpeed ZeRO-3"):
        function.apply(*arguments)
    with pytest.raises(ValueError, match="workspace_mb"):
        patch(workspace_mb=-1)
    with pytest.raises(ValueError, match="unknown backend"), patched(backend="cuda"):
        pass


# --- patching --------------------------------------------------------------------------------------------------------


def _is_patched() -> bool:
    functions = [
        trl.trainer.utils._ChunkedLogProbFunction,
        trl.kernels.ChunkedLogProbFunction,
        trl.kernels.chunked_logprob.ChunkedLogProbFunction,
    ]
    assert len(set(functions)) == 1, "all sites change together"
    mine = isinstance(functions[0], integration.TokenLogpFunction)
    assert mine or functions[0] is ORIGINAL
    assert trl.trainer.utils._use_triton(torch.device("cpu")) is mine
    assert trl.kernels.chunked_logprob._use_triton(torch.device("cpu")) is False, "TRL's own kernels ask this one"
    return mine


def test_patch_and_unpatch():
    unpatch()  # without a patch(): nothing happens
    assert not _is_patched()
    patch()
    patch(workspace_mb=8)
    assert _is_patched()
    assert trl.trainer.utils._ChunkedLogProbFunction.head_keywords == {"workspace_mb": 8}
    unpatch()
    assert not _is_patched()


def test_patched_nests():
    with patched():
        with patched(workspace_mb=8):
            assert trl.trainer.utils._ChunkedLogProbFunction.head_keywords == {"workspace_mb": 8}
        assert trl.trainer.utils._ChunkedLogProbFunction.head_keywords == {}
        assert _is_patched()
    assert not _is_patched()


def test_patched_restores_after_an_error():
    with pytest.raises(KeyError), patched():
        raise KeyError
    assert not _is_patched()


def test_patched_inside_patch_and_the_other_way_round():
    patch()
    with patched():
        unpatch()
        assert not _is_patched()
    assert _is_patched()
    unpatch()
    with patched():
        patch()
    assert not _is_patched()


def test_restores_another_ones_replacement(monkeypatch):
    other = type("Other", (ORIGINAL,), {})
    monkeypatch.setattr(trl.trainer.utils, "_ChunkedLogProbFunction", other)
    patch()
    unpatch()
    assert trl.trainer.utils._ChunkedLogProbFunction is other
    monkeypatch.undo()


def test_an_unknown_trl_is_refused(monkeypatch):
    with monkeypatch.context() as m:
        m.delattr(trl.trainer.utils, "_use_triton")
        with pytest.raises(RuntimeError, match=r"has no trl\.trainer\.utils\._use_triton.*Install trl==1\.16\.0"):
            patch()
    with monkeypatch.context() as m:
        m.setattr(ORIGINAL, "forward", staticmethod(lambda ctx, hidden, weight: None))
        with pytest.raises(RuntimeError, match=r"takes \(ctx, hidden, weight\), expected"):
            patch()
    assert not _is_patched()
