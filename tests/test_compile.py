"""The ops under torch.compile and torch.library's own checks."""

from __future__ import annotations

import pytest
import torch
from every_loss import needed, referenced
from heads import peaked
from torch import Tensor

from fastdpo import dpo_loss, linear_dpo_loss, linear_token_logps
from fastdpo.backend import load
from fastdpo.losses import LOSSES

NO_COMPILER = isinstance(load("cpu"), str)


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    labels = torch.randint(0, 53, (4, 6))
    labels[0, :2] = -100
    return torch.randn(4, 6, 8, requires_grad=True), torch.randn(53, 8, requires_grad=True), labels, -torch.rand(4)


@pytest.mark.skipif(NO_COMPILER, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize(
    "options",
    [
        *(dict(loss_type=name) | needed(name) for name in LOSSES),
        dict(loss_type=["sigmoid", lambda pairs, options: -pairs.margin], loss_weights=[0.5, 1.0], alpha=0.1),
        dict(
            beta=torch.tensor([0.1, 0.2]),
            gamma=0.5,
            f_divergence_type="js_divergence",
            ld_alpha=0.5,
            use_weighting=True,
        ),
        dict(pair_weights=torch.rand(2), f_divergence_type="alpha_divergence", length_normalize=True),
        dict(betas=[0.1, 0.5], parameterization="likelihood"),
    ],
    ids=lambda options: options["loss_type"] if isinstance(options.get("loss_type"), str) else "-".join(options),
)
def test_compiles_without_graph_break(options: dict) -> None:
    hidden, weight, labels, ref = batch()
    ref = ref if not isinstance(options.get("loss_type"), str) or referenced(options["loss_type"]) else None
    cu_seqlens = torch.tensor([0, 6, 12, 18, 24])

    def losses(hidden: Tensor, weight: Tensor) -> Tensor:
        keywords = dict(shift=True, stats=("entropy", "is_top1"), **options)
        from_hidden = linear_dpo_loss(hidden, weight, labels, ref, softcap=20.0, **keywords)
        logits = (hidden @ weight.T).view(24, 53)
        packed = dpo_loss(logits, labels.view(24), ref, cu_seqlens=cu_seqlens, inplace_backward=True, **keywords)
        return from_hidden.loss.sum() + packed.loss.sum() + from_hidden.stats.entropy.mean()

    expected = losses(hidden, weight)
    expected_grads = torch.autograd.grad(expected, [hidden, weight])
    torch._dynamo.reset()
    # Inductor's C++ takes half a minute a graph: the whole of it for one loss, tracing and autograd for the others
    compiler = "inductor" if options.get("loss_type") == "sigmoid" else "aot_eager"
    result = torch.compile(losses, fullgraph=True, backend=compiler)(hidden, weight)
    torch.testing.assert_close(result, expected)
    for grad, true in zip(torch.autograd.grad(result, [hidden, weight]), expected_grads, strict=True):
        torch.testing.assert_close(grad, true, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(NO_COMPILER, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("frozen", [False, True], ids=["both", "frozen head"])
def test_compiles_with_compaction(frozen: bool) -> None:
    """The same columns are dropped, the same bits come out; also of another number of tokens, and without gradients."""

    def scores(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        out = linear_token_logps(hidden, weight, labels, grad_tol=2**-10, stats=("dropped_mass",))
        return out.logps, out.dropped_mass

    compiled = torch.compile(scores, fullgraph=True)
    for tokens in (600, 300):
        hidden, weight, labels = peaked(tokens)
        labels[::7] = -100
        leaves = [hidden.requires_grad_()] + ([] if frozen else [weight.requires_grad_()])
        g = torch.randn(tokens)
        (logps, dropped), (true_logps, true_dropped) = (f(hidden, weight, labels) for f in (compiled, scores))
        assert torch.equal(logps, true_logps) and torch.equal(dropped, true_dropped) and dropped.any()
        for grad, true in zip(*(torch.autograd.grad(x, leaves, g) for x in (logps, true_logps)), strict=True):
            assert torch.equal(grad, true)
    with torch.no_grad():
        assert torch.equal(compiled(hidden, weight, labels)[0], logps)


@pytest.mark.skipif(NO_COMPILER, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiles_with_dynamic_numbers() -> None:
    """A beta schedule, and dynamic shapes: floats become symbols in the graph."""
    hidden, weight, labels, ref = batch()
    logits = (hidden @ weight.T).detach()
    compiled = torch.compile(lambda x, beta: dpo_loss(x, labels, ref, beta=beta).loss, fullgraph=True, dynamic=True)
    for beta in (0.1, 0.2, 0.3):
        torch.testing.assert_close(compiled(logits, beta), dpo_loss(logits, labels, ref, beta=beta).loss)


def test_opcheck(backend: str) -> None:
    hidden, weight, labels, ref = (x.detach() for x in batch())
    ops = torch.ops.fastdpo
    targets = ops.targets(labels.view(-1), 53, -100)
    logits = (hidden @ weight.T).view(1, 24, 53)
    transform = (1.0, 30.0, 0.7)
    logps, lse, entropy = ops.row_forward(logits, targets, *transform, ["entropy"], backend)
    grads = (logps, lse, entropy, torch.randn(24), torch.randn(24))
    flat = hidden.view(24, 8)
    bounds = torch.arange(5) * 6
    linear = (flat, weight, None, targets)
    samples = [
        (ops.targets, (labels.view(-1), 53, -100)),
        (ops.bounds, (bounds, 24)),
        (ops.constant, (ref, "ref_logps", None)),
        (ops.row_forward, (logits, targets, *transform, ["entropy", "is_top1"], backend)),
        (ops.row_backward, (logits, targets, *grads, *transform, backend)),
        (ops.row_backward_, (logits.clone(), targets, *grads, *transform, backend)),
        (ops.linear_logps, (*linear, *transform, "entropy", torch.float32, 0.0, 256.0, True, True, False, backend)),
        (ops.linear_logps, (*linear, *transform, "", torch.float32, 0.05, 256.0, True, True, False, backend)),
        (
            ops.linear_backward,
            (*linear, *grads, [], *transform, torch.float32, 0.0, 1e-3, [True, True, False], backend),
        ),
        (ops.sequence_sums, (logps, bounds, backend)),
        (ops.pair_sigmoid, (logps, bounds, ref, 0.1, 0.0, backend)),
    ]
    for op, arguments in samples:
        torch.library.opcheck(
            op, arguments, test_utils=("test_schema", "test_faketensor", "test_autograd_registration")
        )
