"""More than 2^31 logits: offsets are 64-bit. (Triton: test_gpu_kernels.py, through strides.)"""

from __future__ import annotations

import psutil
import pytest
import torch
from compaction_kit import kept

from fastdpo import linear_token_logps, token_logps
from fastdpo.backend import load

ROWS, VOCAB = 16500, 131072  # 2.16e9 logits, 4.3 GB in bf16
NEEDED = 1.2 * 2 * ROWS * VOCAB
STREAMS = not isinstance(load("cpu"), str) and load("cpu").streams()  # type: ignore[union-attr]


@pytest.mark.slow
@pytest.mark.skipif(isinstance(load("cpu"), str), reason="no C++ compiler")
@pytest.mark.skipif(psutil.virtual_memory().available < NEEDED, reason="less than 5.2 GB of memory free")
def test_more_than_2_31_logits() -> None:
    """The last rows are right, forward and in-place backward."""
    assert ROWS * VOCAB > 2**31
    few = (torch.randn(7, VOCAB) * 3).bfloat16()
    logits = torch.empty(ROWS, VOCAB, dtype=torch.bfloat16)
    for start in range(0, ROWS, 7):  # a row is known by its number, modulo 7
        logits[start : start + 7] = few[: min(7, ROWS - start)]
    labels = torch.arange(ROWS) * 7919 % VOCAB
    out = token_logps(logits.requires_grad_(), labels, inplace_backward=True, backend="cpu")
    some = torch.tensor([0, 1, ROWS // 2, ROWS - 2, ROWS - 1])
    x = few[some % 7].double().requires_grad_()
    truth = x.log_softmax(1).gather(1, labels[some, None]).squeeze(1)
    torch.testing.assert_close(out.logps[some].double(), truth.detach(), rtol=1e-5, atol=1e-5)
    truth.sum().backward()
    (gradient,) = torch.autograd.grad(out.logps.sum(), logits)
    torch.testing.assert_close(gradient[some].double(), x.grad, rtol=2**-7, atol=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(not STREAMS, reason="this CPU has no bf16 products")
@pytest.mark.skipif(psutil.virtual_memory().available < NEEDED, reason="less than 5.2 GB of memory free")
def test_more_than_2_31_exponentials() -> None:
    """From hidden states, exact: the forward keeps a number for each logit, and the backward's last ones are right."""
    assert ROWS * (VOCAB - 900) > 2**31  # of the last columns every number lies beyond
    few, weight, bias = torch.randn(7, 32).bfloat16(), (torch.randn(VOCAB, 32) / 2).bfloat16(), torch.randn(VOCAB)
    hidden = few[torch.arange(ROWS) % 7]  # a row is known by its number, modulo 7
    labels = torch.arange(ROWS) * 7919 % VOCAB
    labels[ROWS // 2], labels[-2] = VOCAB - 1, VOCAB - 500
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    grads = torch.randn(ROWS)
    out = linear_token_logps(*leaves[:2], labels, bias=bias, grad_tol=0, workspace_mb=4500, backend="cpu")
    assert kept(out) == ["Exponentials"]
    dx, dw, db = torch.autograd.grad(out.logps, leaves, grads)

    x, w, g = few.double(), weight.detach().double(), grads.double()
    logp = (x @ w.T + bias.detach().double()).log_softmax(1)
    rows = torch.tensor([0, 1, ROWS // 2, ROWS - 2, ROWS - 1])
    torch.testing.assert_close(out.logps[rows].detach().double(), logp[rows % 7, labels[rows]], rtol=1e-5, atol=1e-5)
    true_dx = g[rows, None] * (w[labels[rows]] - logp[rows % 7].exp() @ w)
    torch.testing.assert_close(dx[rows].double(), true_dx, rtol=2**-6, atol=2**-8 * true_dx.abs().max().item())
    columns = torch.tensor([0, 1, 32767, 32768, VOCAB // 2, VOCAB - 900, VOCAB - 500, VOCAB - 2, VOCAB - 1])
    d = g[:, None] * ((labels[:, None] == columns).double() - logp[:, columns].exp()[torch.arange(ROWS) % 7])
    for result, truth in ((dw[columns], d.T @ hidden.detach().double()), (db[columns], d.sum(0))):
        torch.testing.assert_close(result.double(), truth, rtol=2**-6, atol=2**-8 * truth.abs().max().item())
