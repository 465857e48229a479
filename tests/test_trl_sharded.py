"""A sharded head. ZeRO-3: its data is there only while gathered; and DeepSpeed itself, where installed, and FSDP2."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import socket
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


# --- the real ones, on the CPU ----------------------------------------------------------------------------------------


def run(tiny: str, output: Path, kind: str, how: str) -> Any:
    """What sharded_run.py prints, in processes of its own."""
    here = Path(__file__).parent
    path = os.pathsep.join([str(here.parent), str(here), *filter(None, [os.environ.get("PYTHONPATH")])])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, str(here / "sharded_run.py"), tiny, str(output), kind, how]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = []
    for rank in "01" if how == "ddp" else "0":
        ranked = {} if how in ("plain", "fsdp2") else {"RANK": rank, "LOCAL_RANK": rank, "MASTER_PORT": port}
        started.append(subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path, **ranked}, **pipes))
    printed = [process.communicate(timeout=120) for process in started]
    for process, (_, errors) in zip(started, printed, strict=True):
        assert process.returncode == 0, errors[-3000:]
    return json.loads(printed[0][0].splitlines()[-1])


@pytest.fixture(scope="module")
def plain(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """kind -> what an ordinary run prints."""
    return functools.cache(lambda kind: run(tiny, tmp_path_factory.mktemp("plain"), kind, "plain"))


needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")


@pytest.mark.parametrize(
    ("how", "kind"),
    [
        pytest.param("zero3", "full", marks=needs_deepspeed),
        pytest.param("zero3", "lora", marks=needs_deepspeed),
        pytest.param("zero3", "lora on the head", marks=needs_deepspeed),
        ("ddp", "lora on the head"),
        ("fsdp2", "lora on the head"),
    ],
)
def test_distributed_training_is_the_same(tiny, plain, tmp_path, how, kind):
    theirs, mine = plain(kind), run(tiny, tmp_path, kind, how)
    assert mine["sharded"] == (how != "ddp") and not theirs["sharded"]
    assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    assert len(mine["head"]) == (3 if kind == "lora on the head" else 1)
    for name, norm in theirs["head"].items():
        assert mine["head"][name] == pytest.approx(norm, rel=1e-6)
