"""patch(): TRL's other trainers that score tokens, the same run as without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

import trl
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer, RLOOConfig, RLOOTrainer, SFTConfig, SFTTrainer
from trl.trainer.utils import add_fused_lm_head
from trl_kit import PAIRS, VOCAB, assert_same_run, make, own_files, save_model, trl_as_it_was  # noqa: F401

from fastdpo.integrations import trl as integration
from fastdpo.integrations.trl import patch, patched, unpatch

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
LORA = {"peft_config": LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each call of fastdpo's head was given."""
    calls: list[int] = []
    apply = integration.TokenLogpFunction.apply
    monkeypatch.setattr(
        integration.TokenLogpFunction, "apply", lambda self, *given: calls.append(len(given[0])) or apply(self, *given)
    )
    return calls


def both(trainer_class: type, tiny: str, tmp_path: Path, scored: list[int], **settings: Any) -> Any:
    """Three steps stock, and three with patch() in force."""
    runs = []
    for patches in (False, True):
        if patches:
            patch()
        torch.manual_seed(0)
        runs.append(make(trainer_class, tiny, tmp_path / str(patches), **settings))
        runs[-1].train()
        assert len(scored) >= 3 * patches
    unpatch()
    assert_same_run(*runs)
    return runs[1]


KTO_ROWS = [
    {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
    for pair, side in zip(PAIRS, ("chosen", "rejected", "chosen", "chosen", "rejected", "rejected"), strict=True)
]


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="kto"),
        pytest.param({"loss_type": "apo_zero_unpaired"}, id="apo_zero_unpaired"),
        pytest.param({"precompute_ref_log_probs": True}, id="precomputed"),
        pytest.param({"arguments": LORA, "desirable_weight": 0.5}, id="lora"),
    ],
)
@pytest.mark.usefixtures("own_files")
def test_kto(tiny, tmp_path, scored, settings):
    both(KTOTrainer, tiny, tmp_path, scored, config_class=KTOConfig, rows=KTO_ROWS, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="completion"),
        pytest.param({"completion_only_loss": False}, id="all tokens"),
        pytest.param({"arguments": LORA}, id="lora"),
        pytest.param({"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1}, id="accumulation"),
    ],
)
def test_sft(tiny, tmp_path, scored, settings):
    rows = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in PAIRS]
    both(SFTTrainer, tiny, tmp_path, scored, config_class=SFTConfig, rows=rows, **settings)


def length(completions: list[str], **_: Any) -> list[float]:
    """A reward that the groups' members differ in."""
    return [len(text) % 13 / 13 for text in completions]


ONLINE = {
    "rows": [{"prompt": pair["prompt"]} for pair in PAIRS],
    "num_generations": 2,
    "max_completion_length": 6,
    "per_device_train_batch_size": 2,
}


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="grpo"),
        pytest.param({"beta": 0.1, "temperature": 0.7}, id="kl"),
        pytest.param({"top_entropy_quantile": 0.5}, id="entropy mask"),
        pytest.param({"cast_lm_head_to_fp32": True, "loss_type": "grpo"}, id="fp32 head"),
    ],
)
def test_grpo(tiny, tmp_path, scored, settings):
    run = both(
        GRPOTrainer,
        tiny,
        tmp_path,
        scored,
        config_class=GRPOConfig,
        arguments={"reward_funcs": length},
        **ONLINE,
        **settings,
    )
    assert any(record.get("grad_norm", 0) > 0 for record in run.state.log_history)


def test_gmpo(tiny, tmp_path, scored):
    """Of trl.experimental: GRPO's forward, a loss of its own."""
    gmpo = pytest.importorskip("trl.experimental.gmpo")
    settings = {"config_class": gmpo.GMPOConfig, "arguments": {"reward_funcs": length}, **ONLINE}
    both(gmpo.GMPOTrainer, tiny, tmp_path, scored, **settings)


@pytest.mark.parametrize("settings", [pytest.param({}, id="rloo"), pytest.param({"beta": 0.0}, id="no kl")])
def test_rloo(tiny, tmp_path, scored, settings):
    run = both(
        RLOOTrainer,
        tiny,
        tmp_path,
        scored,
        config_class=RLOOConfig,
        arguments={"reward_funcs": length},
        **ONLINE,
        **settings,
    )
    assert any(record.get("grad_norm", 0) > 0 for record in run.state.log_history)


@pytest.mark.parametrize("kind", [(KTOTrainer, KTOConfig), (trl.DPOTrainer, trl.DPOConfig)], ids=["kto", "dpo"])
def test_trl_still_refuses_an_adapter_on_the_head(tiny, tmp_path, kind):
    """patch() changes no check of TRL's: there such an adapter would be ignored."""
    config = LoraConfig(r=4, target_modules=["lm_head"], task_type="CAUSAL_LM")
    settings = {"rows": KTO_ROWS} if kind[0] is KTOTrainer else {}
    with patched(), pytest.raises(ValueError, match="Applying a PEFT adapter to `lm_head` is not supported"):
        make(kind[0], tiny, tmp_path, config_class=kind[1], arguments={"peft_config": config}, **settings)


def test_a_stock_dpo_trainer(tiny, tmp_path, scored):
    both(trl.DPOTrainer, tiny, tmp_path, scored)


@pytest.mark.parametrize("outputs", [("log_probs",), ("log_probs", "entropy", "is_top1")], ids=len)
def test_the_fused_forward_itself(tiny, outputs):
    """Shift labels, a temperature, num_items_in_batch: what experimental trainers call it with."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny)
    add_fused_lm_head(model, temperature=0.7, outputs=outputs)
    ids = torch.randint(VOCAB, (2, 9))
    labels = torch.where(torch.rand(2, 9) < 0.3, -100, ids)
    for given in ({"labels": labels}, {"shift_labels": labels}, {"labels": labels, "num_items_in_batch": 31}):
        theirs = model(ids, fused_lm_head=True, **given)
        with patched():
            mine = model(ids, fused_lm_head=True, **given)
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            torch.testing.assert_close(mine[name], value, rtol=1e-5, atol=1e-5, msg=name)
