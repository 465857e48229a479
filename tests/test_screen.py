"""Columns summed from 8-bit products (kernels/cpu/screen.h): logps against float64, where screening is hard."""

from __future__ import annotations

import pytest
import torch
from heads import peaked
from torch import Tensor

from fastdpo import linear_token_logps
from fastdpo.backend import load
from fastdpo.options import Transform

STREAMS = not isinstance(load("cpu"), str) and load("cpu").streams()  # type: ignore[union-attr]
pytestmark = pytest.mark.skipif(not STREAMS, reason="this CPU has no bf16 products")

VOCAB, TOL = 20011, 2.0**-10


def head(name: str) -> tuple[Tensor, ...]:
    """hidden, weight, bias, labels; logits = those of `name`."""
    hidden, weight, labels = peaked(200, VOCAB, 26)  # a width that four does not divide
    bias = torch.zeros(VOCAB)
    if name == "outliers":  # a few dimensions of hidden a hundred times the others, as trained models have
        hidden[:, :2] *= 100
        weight[:, :2] /= 100
    elif name == "rows of all sizes":
        weight *= torch.logspace(-3, 0.3, VOCAB)[torch.randperm(VOCAB)][:, None]
    elif name == "flat":
        hidden *= 0.01
    elif name == "bias decides":
        hidden *= 0.1
        bias[::100] += 12
    elif name == "one token is flat":  # within the tolerance of the tile, and all of that token's probability
        hidden[7] = 0
    elif name == "zeros":
        hidden[3] = 0
        weight[:500] = 0
    return hidden.bfloat16(), weight.bfloat16(), bias, labels


NAMES = ["plain", "outliers", "rows of all sizes", "flat", "bias decides", "one token is flat", "zeros"]
TRANSFORMS = [Transform(), Transform(-0.7, None, 1.2), Transform(1.5, 30.0, 0.9)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("transform", TRANSFORMS, ids=["plain", "negative scale", "softcap"])
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_logps(name: str, transform: Transform, weight_dtype: torch.dtype) -> None:
    hidden, weight, bias, labels = head(name)
    keywords = transform._asdict() | {"bias": bias, "stats": ("lse",)}
    truth = linear_token_logps(hidden.double(), weight.double(), labels, **keywords)
    weight = weight.to(weight_dtype)
    results = {"forward only": linear_token_logps(hidden, weight, labels, backend="cpu", **keywords)}
    leaf = weight.clone().requires_grad_()
    results["with columns"] = linear_token_logps(hidden, leaf, labels, backend="cpu", **keywords)
    for how, result in results.items():
        for stat in ("logps", "lse"):
            error = (getattr(result, stat).double() - getattr(truth, stat)).abs()
            assert error.max() < 5e-4 and error.mean() < 3e-5, f"{how}, {stat}: {error.max():.1e}, {error.mean():.1e}"


def test_screening_spares_products() -> None:
    """It is on: a sparse softmax's logps differ from the exact ones, a little, and exact mode's do not."""
    hidden, weight, bias, labels = head("plain")
    keywords = {"bias": bias, "backend": "cpu"}
    screened, again, exact = (
        linear_token_logps(hidden, weight, labels, grad_tol=tol, **keywords).logps for tol in (TOL, TOL, 0)
    )
    assert torch.equal(screened, again)
    assert 0 < (screened - exact).abs().max() < 5e-4


def test_threads_do_not_matter() -> None:
    hidden, weight, bias, labels = head("outliers")
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(linear_token_logps(hidden, weight, labels, bias=bias, backend="cpu").logps)
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite(value: float) -> None:
    """In hidden it stays with its token; in a row of weight it reaches every token, as in float32."""
    hidden, weight, bias, labels = head("plain")
    clean = linear_token_logps(hidden, weight, labels, bias=bias, backend="cpu").logps
    spoiled = hidden.clone()
    spoiled[5, 3] = value
    found = linear_token_logps(spoiled, weight, labels, bias=bias, backend="cpu").logps
    assert found[5].isnan()
    others = torch.arange(len(labels)) != 5
    torch.testing.assert_close(found[others], clean[others], rtol=0, atol=5e-4)
    row = weight.clone()
    row[11, 3] = value
    truth = linear_token_logps(hidden.float(), row.float(), labels, bias=bias, backend="eager").logps
    found = linear_token_logps(hidden, row, labels, bias=bias, backend="cpu").logps
    assert torch.equal(found.isfinite(), truth.isfinite())
