"""token_logps and linear_token_logps: values, gradients, layouts, dtypes, against float64 autograd."""

from __future__ import annotations

import pytest
import torch
from close import assert_close
from heads import skip_unfit
from torch import Tensor

import fastdpo
from fastdpo import linear_token_logps, token_logps

ALL_STATS = ("entropy", "mean_logits", "is_top1", "log_sum_sq_probs", "lse", "dropped_mass")
SOFTCAPPED = dict(softcap=20.0, logit_scale=0.5, temperature=0.8)


def reference(logits: Tensor, labels: Tensor, softcap=None, logit_scale=1.0, temperature=1.0) -> tuple[Tensor, Tensor]:
    """(logps, entropy) by plain autograd, written apart from the package."""
    z = logits * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    log_p = torch.log_softmax(z / temperature, dim=-1)
    counted = labels != -100
    logps = log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    return logps * counted, entropy * counted


def gradients(outputs: list[Tensor], cotangents: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    total = sum((o.double() * c.double()).sum() for o, c in zip(outputs, cotangents, strict=True))
    return list(torch.autograd.grad(total, inputs))


def inputs(dtype: torch.dtype = torch.float32, vocab: int = 1003, hidden: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    h = torch.randn(4, 9, hidden).to(dtype).requires_grad_()
    w = torch.randn(vocab, hidden).to(dtype).requires_grad_()
    labels = torch.randint(0, vocab, (4, 9))
    labels[0, :4] = -100
    labels[2] = -100  # a fully masked sequence
    return h, w, labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("keywords", [{}, SOFTCAPPED], ids=["plain", "softcap"])
def test_from_logits(backend: str, dtype: torch.dtype, keywords: dict) -> None:
    skip_unfit(backend, dtype)
    h, w, labels = inputs(dtype)
    logits = (h @ w.T).detach().requires_grad_()
    cotangents = [torch.randn(4, 9), torch.randn(4, 9)]

    def run(logits: Tensor) -> tuple[list[Tensor], Tensor]:
        out = list(reference(logits, labels, **keywords))
        return out, gradients(out, cotangents, [logits])[0]

    truth, true_grad = run(logits.detach().double().requires_grad_())
    plain, plain_grad = run(logits)
    result = token_logps(logits, labels, stats=ALL_STATS, backend=backend, **keywords)
    grad = gradients([result.logps, result.entropy], cotangents, [logits])[0]
    assert grad.dtype == dtype
    assert_close(result.logps.detach(), truth[0].detach(), plain[0].detach())
    assert_close(result.entropy.detach(), truth[1].detach(), plain[1].detach(), unit=10)
    assert_close(grad, true_grad, plain_grad, unit=10)
    assert (result.logps[labels == -100] == 0).all()
    assert not result.lse.requires_grad and not result.is_top1.requires_grad
    assert result.dropped_mass.count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("workspace_mb", [256, 0.02], ids=["kept", "recomputed"])
@pytest.mark.parametrize("keywords", [{}, SOFTCAPPED], ids=["plain", "softcap"])
def test_from_hidden(backend: str, dtype: torch.dtype, workspace_mb: float, keywords: dict) -> None:
    skip_unfit(backend, dtype)
    h, w, labels = inputs(dtype)
    bias = torch.randn(1003).to(dtype).requires_grad_()
    cotangents = [torch.randn(4, 9), torch.randn(4, 9)]

    def run(h: Tensor, w: Tensor, b: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        out = list(reference(h @ w.T + b, labels, **keywords))
        return out, gradients(out, cotangents, [h, w, b])

    truth, true_grads = run(*(x.detach().double().requires_grad_() for x in (h, w, bias)))
    plain, plain_grads = run(h, w, bias)
    result = linear_token_logps(
        h, w, labels, bias=bias, stats=("entropy",), workspace_mb=workspace_mb, backend=backend, **keywords
    )
    grads = gradients([result.logps, result.entropy], cotangents, [h, w, bias])
    assert_close(result.logps.detach(), truth[0].detach(), plain[0].detach())
    for grad, true, yardstick in zip(grads, true_grads, plain_grads, strict=True):
        assert grad.dtype == dtype
        assert_close(grad, true, yardstick, unit=10)
    assert grads[0][2].count_nonzero() == 0  # masked rows


def test_gradcheck() -> None:
    h, w, labels = inputs(torch.float64, vocab=13, hidden=5)
    bias = torch.randn(13, dtype=torch.float64, requires_grad=True)
    for workspace_mb in (256, 1e-3):

        def run(h: Tensor, w: Tensor, b: Tensor, workspace_mb: float = workspace_mb) -> tuple[Tensor, ...]:
            out = linear_token_logps(
                h, w, labels, bias=b, stats=("entropy",), shift=True, workspace_mb=workspace_mb, **SOFTCAPPED
            )
            return out.logps, out.entropy

        assert torch.autograd.gradcheck(run, (h, w, bias))


def test_shift_equals_slicing(backend: str) -> None:
    h, w, labels = inputs()
    logits = (h @ w.T).detach()
    shifted = token_logps(logits, labels, shift=True, backend=backend).logps
    sliced = token_logps(logits[:, :-1], labels[:, 1:], backend=backend).logps
    assert torch.equal(shifted[:, :-1], sliced)
    assert (shifted[:, -1] == 0).all()
    from_hidden = linear_token_logps(h, w, labels, shift=True, backend=backend).logps
    torch.testing.assert_close(from_hidden, shifted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (2, 3, 5)])
def test_shapes(backend: str, shape: tuple[int, ...]) -> None:
    """No positions at all, and more dimensions than two."""
    h = torch.randn(*shape, 8, requires_grad=True)
    w = torch.randn(50, 8, requires_grad=True)
    labels = torch.randint(0, 50, shape)
    out = linear_token_logps(h, w, labels, stats=("is_top1",), backend=backend)
    assert out.logps.shape == out.is_top1.shape == shape
    out.logps.sum().backward()
    assert h.grad.shape == h.shape
    assert torch.isfinite(w.grad).all()
    logits = torch.randn(*shape, 50, requires_grad=True)
    token_logps(logits, labels, backend=backend).logps.sum().backward()
    assert logits.grad.shape == logits.shape


def test_inplace_backward_writes_over_the_logits(backend: str) -> None:
    leaf = torch.randn(3, 4, 101, requires_grad=True)
    labels = torch.randint(0, 101, (3, 4))
    (expected,) = torch.autograd.grad(token_logps(leaf * 2, labels, backend=backend).logps.sum(), leaf)
    logits = leaf * 2
    before = logits.detach().clone()
    logps = token_logps(logits, labels, inplace_backward=True, backend=backend).logps
    assert torch.equal(logits.detach(), before)
    logps.sum().backward(retain_graph=True)
    torch.testing.assert_close(leaf.grad, expected)
    torch.testing.assert_close(logits.detach() * 2, expected)  # the gradient of logits, through d(2x)/dx
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logps.sum().backward()


def test_retained_graph_gives_the_same_gradient_twice(backend: str) -> None:
    h, w, labels = inputs()
    loss = linear_token_logps(h, w, labels, backend=backend).logps.sum()
    first = torch.autograd.grad(loss, [h, w], retain_graph=True)
    second = torch.autograd.grad(loss, [h, w])
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_noncontiguous_inputs(backend: str) -> None:
    h, w, labels = inputs()
    expected = linear_token_logps(h, w, labels, backend=backend).logps
    ht = h.detach().permute(2, 0, 1).contiguous().permute(1, 2, 0).requires_grad_()
    wt = w.detach().T.contiguous().T.requires_grad_()
    labels_t = labels.T.contiguous().T
    out = linear_token_logps(ht, wt, labels_t, backend=backend).logps
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    out.sum().backward()
    (grad,) = torch.autograd.grad(expected.sum(), w)
    torch.testing.assert_close(wt.grad, grad, rtol=1e-4, atol=1e-5)
    logits = torch.randn(50, 4, 9).permute(1, 2, 0).requires_grad_()  # the vocabulary is not the dense dimension
    token_logps(logits, labels.clamp(max=49), backend=backend).logps.sum().backward()
    assert torch.isfinite(logits.grad).all()


def test_frozen_parts_get_no_gradient(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    h, w, labels = inputs()
    full = torch.autograd.grad(linear_token_logps(h, w, labels, backend=backend).logps.sum(), [h, w])
    for frozen in (0, 1):
        leaves = [h.detach(), w.detach()]
        leaves[1 - frozen].requires_grad_()
        linear_token_logps(*leaves, labels, backend=backend).logps.sum().backward()
        assert leaves[frozen].grad is None
        torch.testing.assert_close(leaves[1 - frozen].grad, full[1 - frozen])


def test_autocast_and_mixed_dtypes() -> None:
    """float32 master weights under bf16 autocast: bf16 products, float32 gradients of the weight."""
    h, w, labels = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = torch.nn.functional.linear(h, torch.eye(24))  # bf16, as a model's last layer
        assert hidden.dtype == torch.bfloat16
        out = linear_token_logps(hidden, w, labels, bias=torch.zeros(1003)).logps
    out.sum().backward()
    expected = linear_token_logps(h.detach().bfloat16(), w.detach().bfloat16().requires_grad_(), labels).logps
    assert torch.equal(out, expected)
    assert w.grad.dtype == h.grad.dtype == torch.float32
    without = linear_token_logps(h.detach(), w.detach().bfloat16(), labels).logps  # no autocast: hidden's dtype
    truth = linear_token_logps(h.detach(), w.detach().bfloat16().float(), labels).logps
    torch.testing.assert_close(without, truth)


def test_no_grad_keeps_nothing() -> None:
    h, w, labels = inputs()
    with torch.no_grad():
        assert not linear_token_logps(h, w, labels).logps.requires_grad
        assert not token_logps(h @ w.T, labels).logps.requires_grad


def test_under_gradient_checkpointing() -> None:
    h, w, labels = inputs()
    plain = torch.autograd.grad(linear_token_logps(h, w, labels).logps.sum(), [h, w])
    for reentrant in (True, False):
        out = torch.utils.checkpoint.checkpoint(
            lambda h, w: linear_token_logps(h, w, labels).logps, h, w, use_reentrant=reentrant
        )
        again = [None, None]
        h.grad = w.grad = None
        out.sum().backward()
        again = [h.grad, w.grad]
        for a, b in zip(again, plain, strict=True):
            assert torch.equal(a, b)


def test_bare_functions_equal_the_functions(backend: str) -> None:
    h, w, labels = inputs()
    logits = (h @ w.T).detach()
    assert torch.equal(fastdpo.TokenLogpsFunction.apply(logits, labels), token_logps(logits, labels).logps)
    bare = fastdpo.LinearTokenLogpsFunction.apply(h, w, labels)
    assert torch.equal(bare, linear_token_logps(h, w, labels).logps)
    bare.sum().backward()
    assert h.grad is not None and w.grad is not None


def test_sum_of_stats_asked_for_in_any_order() -> None:
    h, w, labels = inputs()
    one = token_logps(h @ w.T, labels, stats=("lse", "entropy", "lse"))
    two = token_logps(h @ w.T, labels, stats=("entropy", "lse"))
    assert torch.equal(one.entropy, two.entropy) and torch.equal(one.lse, two.lse)
    assert one.is_top1 is None and one.mean_logits is None


def bad(label: int) -> Tensor:
    labels = torch.zeros(2, 3, dtype=torch.int64)
    labels[1, 2] = label
    return labels


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: token_logps(torch.randn(2, 3, 7), bad(7)), ValueError, r"labels: 7 at flat position 5 .*\[0, 7\)"),
        (lambda: token_logps(torch.randn(2, 3, 7), bad(-1)), ValueError, "labels: -1 at flat position 5"),
        (lambda: token_logps(torch.zeros(2, 3, 7).long(), bad(0)), TypeError, "logits: expected a float tensor"),
        (lambda: token_logps(torch.randn(2, 3, 7), bad(0).float()), TypeError, "labels: expected an int64"),
        (lambda: token_logps(torch.randn(2, 4, 7), bad(0)), ValueError, r"labels: expected the shape .*\[2, 4\]"),
        (lambda: token_logps(torch.randn(2, 3, 7), bad(0), stats=("entrop",)), ValueError, "unknown stat 'entrop'"),
        (lambda: token_logps(torch.randn(2, 3, 7), bad(0), stats="entropy"), ValueError, "stats: expected a sequence"),
        (lambda: token_logps(torch.randn(2, 3, 7), bad(0), backend="cuda"), ValueError, "unknown backend 'cuda'"),
        (lambda: token_logps(torch.randn(2, 3, 7), bad(0), temperature=0), ValueError, "temperature: .* got 0"),
        (lambda: token_logps(torch.randn(2, 3, 7), bad(0), softcap=-1), ValueError, "softcap: .* got -1"),
        (
            lambda: token_logps(torch.randn(2, 3, 7), bad(0).to("meta")),
            ValueError,
            "labels: expected on cpu like logits, got meta",
        ),
        (
            lambda: linear_token_logps(torch.randn(2, 3, 4), torch.randn(7, 4), bad(0).to("meta")),
            ValueError,
            "labels: expected on cpu like hidden, got meta",
        ),
        (
            lambda: linear_token_logps(torch.randn(2, 3, 5), torch.randn(7, 4), bad(0)),
            ValueError,
            r"hidden: expected \[..., H\] with H=4",
        ),
        (
            lambda: linear_token_logps(torch.randn(2, 3, 4), torch.randn(7, 4), bad(0), bias=torch.randn(6)),
            ValueError,
            r"bias: expected \[V\] = \[7\]",
        ),
        (
            lambda: linear_token_logps(torch.randn(2, 3, 4), torch.randn(7, 4), bad(7)),
            ValueError,
            "labels: 7 at flat position 5",
        ),
        (
            lambda: linear_token_logps(torch.randn(2, 3, 4), torch.randn(7, 4), bad(0), grad_tol=2),
            ValueError,
            "grad_tol: .* got 2",
        ),
        (
            lambda: linear_token_logps(torch.randn(2, 3, 4), torch.randn(7, 4), bad(0), workspace_mb=0),
            ValueError,
            "workspace_mb: .* got 0",
        ),
    ],
)
def test_errors(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_overlapping_logits_are_not_overwritten(backend: str) -> None:
    """Expanded logits share memory between rows: the gradient goes to a tensor of its own."""
    leaf = torch.randn(1, 6, 50, requires_grad=True)
    labels = torch.randint(0, 50, (2, 6))
    grads = []
    for inplace in (False, True):
        logits = (leaf * 1).expand(2, 6, 50)
        logps = token_logps(logits, labels, inplace_backward=inplace, backend=backend).logps
        grads.append(torch.autograd.grad(logps.sum(), leaf)[0])
    assert torch.equal(*grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stats", [(), ("entropy", "is_top1")], ids=["plain", "stats"])
def test_nan_is_not_swallowed(backend: str, dtype: torch.dtype, stats: tuple[str, ...]) -> None:
    skip_unfit(backend, dtype)
    h, w, labels = inputs(dtype)
    with torch.no_grad():
        w[700] = float("nan")
    out = linear_token_logps(h, w, labels, stats=stats, backend=backend)
    counted = labels != -100
    assert out.logps[counted].isnan().all()
    assert not stats or out.entropy[counted].isnan().all()
    out.logps.sum().backward()
    assert h.grad[counted].isnan().any()


def test_second_derivatives_raise() -> None:
    h, w, labels = inputs()
    for loss in (
        linear_token_logps(h, w, labels).logps.sum(),
        token_logps(h @ w.T, labels).logps.sum(),
        fastdpo.dpo_loss(h @ w.T, labels).loss,
    ):
        with pytest.raises(RuntimeError, match=r"second derivatives \(create_graph=True\) are not supported"):
            torch.autograd.grad(loss, h, create_graph=True)


def test_the_saved_columns_are_freed_with_the_graph() -> None:
    """Through save_for_backward: nothing of the forward outlives its backward, and checkpointing keeps nothing."""
    h, w, labels = (x.bfloat16() if x.is_floating_point() else x for x in inputs())
    logps = linear_token_logps(h.detach().requires_grad_(), w.detach().requires_grad_(), labels, grad_tol=0.01).logps
    node = logps.grad_fn
    assert node.saved_layout is not None
    logps.sum().backward()
    with pytest.raises(RuntimeError, match="after they have already been freed"):
        _ = node.saved_tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_exact_mode_is_no_worse_than_plain(dtype: torch.dtype) -> None:
    """grad_tol=0, the entropy's gradient, recomputation: against plain PyTorch in the same dtype, on peaked rows."""
    h, w, labels = inputs(dtype, hidden=64)
    for stat in ("logps", "entropy"):
        truth_h = h.detach().double().requires_grad_()
        index = 0 if stat == "logps" else 1
        truth = torch.autograd.grad(reference(truth_h @ w.double().T, labels)[index].sum(), truth_h)[0]
        plain = torch.autograd.grad(reference(h @ w.T, labels)[index].sum(), h)[0]
        for workspace_mb in (256, 0.05):
            out = linear_token_logps(h, w, labels, stats=("entropy",), grad_tol=0, workspace_mb=workspace_mb)
            result = torch.autograd.grad(getattr(out, stat).sum(), h)[0]
            assert_close(result, truth, plain, unit=10)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: token_logps(None, bad(0)), "logits: expected a tensor, got NoneType"),
        (lambda: token_logps(torch.randn(2, 3, 7), [0]), "labels: expected a tensor, got list"),
        (lambda: linear_token_logps(torch.randn(2, 3, 4), None, bad(0)), "weight: expected a tensor, got NoneType"),
        (lambda: token_logps(torch.randn(2, 3, 7), bad(0), temperature="1"), "temperature: expected a number, got '1'"),
        (lambda: token_logps(torch.randn(2, 3, 7), bad(0), ignore_index=1.5), "ignore_index: expected an int, got 1.5"),
        (lambda: token_logps(torch.randn(2, 3, 7), bad(0), shift="no"), "shift: expected True or False, got 'no'"),
        (
            lambda: fastdpo.dpo_loss(torch.randn(2, 3, 7), bad(0), label_smoothing=torch.tensor(0.1)),
            "label_smoothing: expected a number, got a tensor",
        ),
    ],
)
def test_wrong_types(call, message: str) -> None:
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(TypeError, match=message):
            call()
