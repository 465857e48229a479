"""The documents' examples run, and the table of losses is the one that LOSSES makes."""

from __future__ import annotations

import importlib.util
import re
import sys
from types import ModuleType

import docs_kit
import pytest
import torch
import torch.nn.functional as F
from docs_kit import ROOT, blocks

import fastdpo
from fastdpo import eager
from fastdpo.backend import BACKENDS, choose


def run(code: str) -> fastdpo.PreferenceOutput:
    names = dict(
        fastdpo=fastdpo,
        torch=torch,
        F=F,
        hidden=torch.randn(8, 5, 16, requires_grad=True),
        weight=torch.randn(53, 16),
        labels=torch.randint(0, 53, (8, 5)),
        ref_logps=-20 * torch.rand(8),
    )
    exec(code, names)
    names["out"].loss.sum().backward()
    assert names["hidden"].grad.count_nonzero()
    return names["out"]


def test_the_readmes_own_loss() -> None:
    """Ten lines: a function, and a call through the fused head."""
    *_, example = blocks("README.md")
    assert len(example.strip().splitlines()) <= 10
    assert run(example).loss.shape == ()


@pytest.mark.parametrize("example", blocks("docs/losses.md"), ids=["several", "own"])
def test_the_losses_page(example: str) -> None:
    assert run(example).loss.isfinite().all()


def test_the_table_is_current() -> None:
    spec = importlib.util.spec_from_file_location("make_losses", ROOT / "docs" / "make_losses.py")
    make_losses = importlib.util.module_from_spec(spec)
    pytest.importorskip("matplotlib")
    spec.loader.exec_module(make_losses)
    page = (ROOT / "docs" / "losses.md").read_text()
    assert make_losses.table() in page, "run python docs/make_losses.py"
    assert (ROOT / "docs" / "losses.png").exists()
    for name in ("sigmoid", "orpo", "sft", "discopop"):  # the drawn slope is that of the drawn loss
        margin = torch.linspace(-6, 6, 2001).double()
        loss, slope = make_losses.curve(name, margin)
        torch.testing.assert_close(torch.gradient(loss, spacing=(margin,))[0][1:-1], slope[1:-1], rtol=1e-2, atol=1e-2)


def test_a_backend_as_contributing_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """The functions that the page names and its row of the table make a backend that trains, and is taken by device."""
    page = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8")
    functions = page.partition("## A backend\n")[2].partition("Then a row of the table")[0]
    mine = ModuleType("fastdpo.mine")
    for name in re.findall(r"`(\w+)(?:\(\))?`[,;]", functions):
        setattr(mine, name, getattr(eager, name))
    monkeypatch.setitem(sys.modules, "fastdpo.mine", mine)
    monkeypatch.setitem(BACKENDS, "mine", None)  # removed again after the test
    assert len(blocks("docs/contributing.md")) == 2
    docs_kit.run("docs/contributing.md", {"torch": torch}, only=slice(1, 2))
    assert choose("auto", torch.device("xpu"), torch.bfloat16) is mine
    weight, labels = torch.randn(503, 16), torch.randint(0, 503, (4, 7))
    results = []
    for backend in ("mine", "eager"):
        hidden = (3 * weight[labels]).requires_grad_()
        keywords = {"stats": ("entropy", "dropped_mass"), "grad_tol": 0.01, "backend": backend}
        out = fastdpo.linear_dpo_loss(hidden, weight, labels, torch.zeros(4), **keywords)
        assert out.stats.dropped_mass.any()  # compacted
        results.append((out.loss, *torch.autograd.grad(out.loss, hidden)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    with pytest.raises(RuntimeError, match="backend='mine' cannot run: it has no kernels for torch.float16"):
        fastdpo.token_logps(torch.zeros(2, 5).half(), torch.zeros(2).long(), backend="mine")
