"""The TRL drop-in: same outputs, same gradients, same training, and TRL as it was afterwards."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("trl")

import trl.kernels
import trl.kernels.chunked_logprob
import trl.trainer.utils
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl import DPOTrainer, SFTConfig, SFTTrainer
from trl_kit import PAIRS, VOCAB, assert_same_run, own_files, save_model, train, trl_as_it_was  # noqa: F401

from fastdpo import BetaSchedule
from fastdpo.integrations import trl as integration
from fastdpo.integrations.trl import FastDPOTrainer, patch, patched, unpatch

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

ORIGINAL = trl.kernels.chunked_logprob.ChunkedLogProbFunction
COMPLETIONS = [{"prompt": pair["prompt"], "completion": pair["rejected"]} for pair in PAIRS]
LORA = {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="plain"),
        pytest.param({"arguments": LORA}, id="lora"),
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
    theirs = train(DPOTrainer, tiny, tmp_path / "trl", **settings)
    mine = train(FastDPOTrainer, tiny, tmp_path / "fastdpo", **settings)
    assert len(mine.state.log_history) == 4
    assert_same_run(theirs, mine)


def test_beta_schedule(tiny, tmp_path):
    class Scheduled(FastDPOTrainer):
        beta_schedule = BetaSchedule(0.4, 0.1, 3)

    logs = train(Scheduled, tiny, tmp_path / "scheduled").state.log_history
    assert [record["beta"] for record in logs[:3]] == pytest.approx([0.4, 0.3, 0.2])
    constant = train(FastDPOTrainer, tiny, tmp_path / "constant", beta=0.4).state.log_history
    assert logs[0]["rewards/chosen"] == constant[0]["rewards/chosen"]
    assert logs[1]["rewards/chosen"] == pytest.approx(0.75 * constant[1]["rewards/chosen"], rel=1e-3)


@pytest.mark.usefixtures("own_files")
def test_precomputed_reference_equals_trl(tiny, tmp_path, monkeypatch):
    calls = []
    spied = integration.TokenLogpFunction.apply
    monkeypatch.setattr(
        integration.TokenLogpFunction, "apply", lambda self, *a: calls.append(a[0].requires_grad) or spied(self, *a)
    )
    theirs = train(DPOTrainer, tiny, tmp_path / "trl", precompute_ref_log_probs=True)
    assert not calls
    mine = train(FastDPOTrainer, tiny, tmp_path / "fastdpo", precompute_ref_log_probs=True)
    assert_same_run(theirs, mine)
    assert calls.count(True) == 3, "three steps"
    assert calls.count(False) >= 3, "the reference pass over six pairs"


def test_patch_serves_other_trainers(tiny, tmp_path, monkeypatch):
    settings = {"config_class": SFTConfig, "rows": COMPLETIONS}
    theirs = train(SFTTrainer, tiny, tmp_path / "trl", **settings)
    calls = []
    spied = integration.TokenLogpFunction.apply
    monkeypatch.setattr(integration.TokenLogpFunction, "apply", lambda self, *a: calls.append(1) or spied(self, *a))
    with patched():
        mine = train(SFTTrainer, tiny, tmp_path / "patched", **settings)
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
    quantised = (arguments[0], arguments[1].to(torch.float8_e4m3fn), *arguments[2:])
    with pytest.raises(NotImplementedError, match=r"weight: an LM head that holds Tensor torch.float8_e4m3fn \[9, 4\]"):
        function.apply(*quantised)
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
