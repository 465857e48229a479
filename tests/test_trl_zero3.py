"""DeepSpeed ZeRO-3: the head's data is there only while it is gathered; with the real one where it is installed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("trl")

import trl.trainer.utils
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from trl_kit import save_model, trl_as_it_was  # noqa: F401

from fastdpo.integrations.trl import TokenLogpFunction


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("tiny"))


class Zero3:
    """A fake: its parameters are empty outside of `gather`, and whole again when their gradients arrive."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.gathers = 0
        self.whole = {}
        for i, parameter in enumerate(parameters):
            self.whole[parameter] = parameter.data.clone()
            parameter.ds_id, parameter.ds_shape = i, parameter.shape
            if parameter.requires_grad:
                parameter.register_hook(lambda gradient, parameter=parameter: self._fill(parameter))
                parameter.register_post_accumulate_grad_hook(self._empty)
            self._empty(parameter)

    @contextmanager
    def gather(self, *parameters: nn.Parameter | None) -> Iterator[None]:
        mine = [p for p in parameters if p in self.whole and p.numel() == 0]
        self.gathers += bool(mine)
        for parameter in mine:
            self._fill(parameter)
        yield
        for parameter in mine:
            self._empty(parameter)

    def _fill(self, parameter: nn.Parameter) -> None:
        parameter.data = self.whole[parameter].clone()

    def _empty(self, parameter: nn.Parameter) -> None:
        parameter.data.fill_(torch.nan)  # whoever reads it later
        parameter.data = parameter.data.new_empty(0)


def results(function: TokenLogpFunction, hidden: Any, weight: Any, bias: Any, parameters: list[Any]) -> list[Any]:
    """Logps, entropy and the gradients of hidden and the parameters."""
    targets = torch.arange(len(hidden)) % 7
    out = function.apply(hidden, weight, bias, targets, 1.0, 64, None, 1.0, ("entropy",))
    (out[0] * targets + out[1]).sum().backward()
    gradients = [x.grad for x in (hidden, *parameters) if x is not None and x.requires_grad]
    assert all(gradient is not None for gradient in gradients)
    return [out[0], out[1], *gradients]


def inputs(frozen: bool) -> tuple[Any, ...]:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(301, 16), requires_grad=not frozen)
    bias = nn.Parameter(torch.randn(301), requires_grad=not frozen)
    return torch.randn(40, 16, requires_grad=True), weight, bias


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("keywords", [{}, {"grad_tol": 0.01}, {"workspace_mb": 0.02}], ids=str)
def test_the_backward_reads_the_gathered_head(monkeypatch, keywords, frozen):
    hidden, weight, bias = inputs(frozen)
    plain = results(TokenLogpFunction(**keywords), hidden, weight, bias, [weight, bias])
    hidden, weight, bias = inputs(frozen)
    zero3 = Zero3([weight, bias])
    monkeypatch.setattr(trl.trainer.utils, "maybe_gather_lm_head_ctx", zero3.gather)
    partitioned = results(TokenLogpFunction(**keywords), hidden, weight, bias, [weight, bias])
    assert weight.numel() == bias.numel() == 0
    assert zero3.gathers == 3, "once forward, weight and bias backward"
    for a, b in zip(plain, partitioned, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_on_the_head(tiny, monkeypatch, dora):
    found = []
    for partitions in (False, True):
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False, use_dora=dora)
        head = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), config).get_output_embeddings()
        hidden = torch.randn(40, head.in_features, requires_grad=True)
        parameters = list(head.parameters())
        if partitions:
            monkeypatch.setattr(trl.trainer.utils, "maybe_gather_lm_head_ctx", Zero3(parameters).gather)
        function = TokenLogpFunction()
        function.head = head
        found.append(results(function, hidden, parameters[0], None, parameters))
    assert len(found[0]) == (6 if dora else 5)
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


# --- DeepSpeed itself, on the CPU ------------------------------------------------------------------------------------


def run(tiny: str, output: Path, *words: str) -> Any:
    """What zero3_run.py prints, of a process of its own."""
    here = Path(__file__).parent
    path = os.pathsep.join([str(here.parent), str(here), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, str(here / "zero3_run.py"), tiny, str(output), *words]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
@pytest.mark.parametrize("kind", ["full", "lora", "lora on the head"])
def test_deepspeed_trains_as_one_process_does(tiny, tmp_path, kind):
    theirs, mine = run(tiny, tmp_path / "plain", kind, "plain"), run(tiny, tmp_path / "zero3", kind, "zero3")
    assert mine["partitioned"] and not theirs["partitioned"]
    assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    assert len(mine["head"]) == (3 if kind == "lora on the head" else 1)
    for name, norm in theirs["head"].items():
        assert mine["head"][name] == pytest.approx(norm, rel=1e-6)
