"""More than 2^31 logits: offsets are 64-bit. (Triton: test_gpu_kernels.py, through strides.)"""

from __future__ import annotations

import psutil
import pytest
import torch

from fastdpo import token_logps
from fastdpo.backend import load

ROWS, VOCAB = 16500, 131072  # 2.16e9 logits, 4.3 GB in bf16
NEEDED = 1.2 * 2 * ROWS * VOCAB


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
