"""The Liger drop-in beside liger-kernel itself: signatures, loss, auxiliary outputs, gradients."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdpo import dpo_loss, linear_dpo_loss, linear_token_logps
from fastdpo.integrations import liger as ours
from fastdpo.losses import LOSSES

NAMES = ("DPO", "CPO", "SimPO", "ORPO", "KTO")
LIGER_DPO_LOSSES = (
    *("sigmoid", "hinge", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "apo_zero", "apo_down"),
    "discopop",
)


@pytest.fixture(scope="module")
def theirs() -> Any:
    return pytest.importorskip("liger_kernel.chunked_loss", reason="pip install --no-deps liger-kernel==0.8.5")


def batch(pairs: int = 3, length: int = 6, hidden: int = 16, vocab: int = 61) -> dict[str, Tensor]:
    labels = torch.randint(0, vocab, (2 * pairs, length))
    labels[0, :2] = labels[3, 4:] = labels[5, 1:] = -100
    return dict(
        _input=torch.randn(2 * pairs, length, hidden, requires_grad=True),
        lin_weight=(0.3 * torch.randn(vocab, hidden)).requires_grad_(),
        target=labels,
        bias=torch.randn(vocab, requires_grad=True),
        ref_input=torch.randn(2 * pairs, length, hidden + 8),
        ref_weight=0.3 * torch.randn(vocab, hidden + 8),
        ref_bias=torch.randn(vocab),
    )


def compare(theirs: Any, name: str, options: dict[str, Any], tensors: dict[str, Any], scale: float = 1.0) -> None:
    """Loss, auxiliary outputs and gradients of the module, in float32."""
    results = []
    for package, more in ((theirs, dict(compiled=False)), (ours, {})):
        module = getattr(package, f"LigerFusedLinear{name}Loss")(**options, **more)
        loss, auxiliary = module(**tensors)
        inputs = [x for x in tensors.values() if isinstance(x, Tensor) and x.requires_grad]
        results.append((loss, auxiliary, torch.autograd.grad(scale * loss, inputs)))
    (their_loss, their_auxiliary, their_grads), (loss, auxiliary, grads) = results
    assert loss.dtype == their_loss.dtype and loss.shape == their_loss.shape == ()
    torch.testing.assert_close(loss, their_loss, rtol=1e-5, atol=1e-6)
    assert len(auxiliary) == len(their_auxiliary)
    for mine, other in zip(auxiliary, their_auxiliary, strict=True):
        assert not mine.requires_grad
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=2e-5)
    for mine, other in zip(grads, their_grads, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6 * max(1.0, float(other.abs().max())))


@pytest.mark.parametrize("loss_type", LIGER_DPO_LOSSES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(use_ref_model=False, beta=0.5),
        dict(average_log_prob=True, beta=0.8, compute_nll_loss=True, alpha=0.3),
        dict(compute_nll_loss=True, chunk_size=2),
    ],
    ids=str,
)
def test_dpo(theirs: Any, loss_type: str, options: dict[str, Any]) -> None:
    smoothing = dict(label_smoothing=0.1) if loss_type in ("exo_pair", "robust") else {}
    tau = dict(discopop_tau=0.7) if loss_type == "discopop" else {}
    compare(theirs, "DPO", dict(loss_type=loss_type) | options | smoothing | tau, batch())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("CPO", {}),
        ("CPO", dict(label_smoothing=0.2, alpha=0.5, average_log_prob=True)),
        ("CPO", dict(compute_nll_loss=False, beta=0.3)),
        ("SimPO", {}),
        ("SimPO", dict(gamma=1.2, beta=2.0, compute_nll_loss=False, label_smoothing=0.1)),
        ("ORPO", {}),
        ("ORPO", dict(beta=0.7, compute_nll_loss=False)),
    ],
    ids=str,
)
@pytest.mark.parametrize("bias", [True, False])
def test_without_a_reference(theirs: Any, name: str, options: dict[str, Any], bias: bool) -> None:
    tensors = {key: value for key, value in batch().items() if not key.startswith("ref_")}
    compare(theirs, name, options, tensors if bias else tensors | dict(bias=None), scale=3.0)


def test_orpo_with_its_own_nll_target(theirs: Any) -> None:
    """ORPO's NLL counts the prompt's tokens too."""
    tensors = {key: value for key, value in batch().items() if not key.startswith("ref_")}
    nll_target = torch.where(tensors["target"] == -100, 5, tensors["target"])
    compare(theirs, "ORPO", {}, tensors | dict(nll_target=nll_target))
    compare(theirs, "ORPO", dict(compute_nll_loss=False), tensors | dict(nll_target=nll_target))


@pytest.mark.parametrize("options", [{}, dict(use_ref_model=True), dict(average_log_prob=True, beta=0.6)], ids=str)
@pytest.mark.parametrize("kl", [None, 0.4, torch.tensor(0.4), torch.tensor([0.4])], ids=str)
def test_kto(theirs: Any, options: dict[str, Any], kl: Any) -> None:
    labels = torch.tensor([True, False, False, True, True, False])
    compare(theirs, "KTO", options, batch() | dict(preference_labels=labels, kl=kl))


def test_kto_with_a_kl_per_sequence(theirs: Any) -> None:
    """As Liger with one chunk: in smaller ones it takes every sequence with every kl."""
    labels = torch.tensor([True, False, False, True, True, False])
    tensors = batch() | dict(preference_labels=labels, kl=torch.rand(6))
    compare(theirs, "KTO", dict(chunk_size=6, use_ref_model=True), tensors)


def test_signatures(theirs: Any) -> None:
    """Names, order and defaults of constructors, calls and functions."""
    import liger_kernel.chunked_loss.functional as functional

    def of(function: Any, skip: tuple[str, ...] = ()) -> list[tuple[str, Any]]:
        return [(p.name, p.default) for p in inspect.signature(function).parameters.values() if p.name not in skip]

    for name in NAMES:
        their_module, my_module = (getattr(x, f"LigerFusedLinear{name}Loss") for x in (theirs, ours))
        assert of(my_module) == of(their_module)
        assert of(my_module.forward) == of(their_module.forward)
        assert vars(my_module()).keys() == vars(their_module()).keys()
        their_function = getattr(functional, f"liger_fused_linear_{name.lower()}").__self__
        mine = getattr(ours, f"liger_fused_linear_{name.lower()}")
        assert of(mine) == of(their_function.forward, skip=("ctx",))
        assert mine is getattr(ours, f"LigerFusedLinear{name}Function").apply


def test_function_equals_module() -> None:
    tensors = batch()
    ordered = [
        tensors[key] for key in ("_input", "lin_weight", "target", "bias", "ref_input", "ref_weight", "ref_bias")
    ]
    loss, auxiliary = ours.liger_fused_linear_dpo(*ordered, -100, 0.3, False, True, True, False, 1, "hinge")
    module_loss, module_auxiliary = ours.LigerFusedLinearDPOLoss(beta=0.3, loss_type="hinge")(**tensors)
    assert torch.equal(loss, module_loss)
    assert all(torch.equal(a, b) for a, b in zip(auxiliary, module_auxiliary, strict=True))


def test_where_liger_ignores_or_fails() -> None:
    """label_smoothing in sigmoid; losses that Liger does not have; empty completions."""
    tensors = {key: value for key, value in batch().items() if not key.startswith("ref_")}
    target, bias = tensors["target"], tensors["bias"]
    logits = tensors["_input"] @ tensors["lin_weight"].T + bias
    loss, _ = ours.LigerFusedLinearDPOLoss(use_ref_model=False, label_smoothing=0.1)(**tensors)
    torch.testing.assert_close(loss, dpo_loss(logits, target, label_smoothing=0.1).loss)
    for name in sorted(set(LOSSES) - set(LIGER_DPO_LOSSES)):
        loss, _ = ours.LigerFusedLinearDPOLoss(use_ref_model=False, loss_type=name)(**tensors)
        torch.testing.assert_close(loss, dpo_loss(logits, target, loss_type=name).loss)
    more = dict(average_log_prob=True, compute_nll_loss=True, alpha=0.3)
    for name in ("aot", "cpo"):
        loss, auxiliary = ours.LigerFusedLinearDPOLoss(use_ref_model=False, loss_type=name, **more)(**tensors)
        torch.testing.assert_close(
            loss, dpo_loss(logits, target, loss_type=name, length_normalize=True, alpha=0.3).loss
        )
        torch.testing.assert_close(auxiliary.nll_loss, dpo_loss(logits, target, loss_type="sft").loss.detach())
    empty = tensors | dict(target=torch.where(torch.arange(6)[:, None] == 0, -100, target))
    loss, auxiliary = ours.LigerFusedLinearSimPOLoss()(**empty)
    assert loss.isfinite() and all(x.isfinite().all() for x in auxiliary)


@pytest.mark.parametrize(
    ("name", "options", "tensors", "message"),
    [
        ("DPO", dict(loss_type="sigmoyd"), {}, "unknown loss 'sigmoyd', .*did you mean 'sigmoid'"),
        ("DPO", dict(loss_type="exo_pair"), {}, "label_smoothing: loss 'exo_pair' needs it above 0"),
        ("DPO", dict(loss_type="robust", label_smoothing=0.5), {}, r"label_smoothing: expected a number in \[0, 0.5\)"),
        ("DPO", dict(discopop_tau=0.1), {}, "discopop_tau: loss 'sigmoid' does not use it"),
        ("DPO", {}, dict(ref_input=None), "ref_input: use_ref_model=True needs a tensor, got None"),
        ("DPO", {}, dict(ref_weight=None), "ref_weight: use_ref_model=True needs a tensor, got None"),
        ("KTO", {}, dict(preference_labels=None), r"preference_labels: expected a bool tensor \[S\], got None"),
        (
            "KTO",
            {},
            dict(preference_labels=torch.ones(6)),
            r"preference_labels: expected a bool tensor \[6\], got torch.float32",
        ),
        (
            "KTO",
            {},
            dict(preference_labels=torch.ones(6).bool(), kl=torch.ones(5)),
            r"kl: expected shape \[\] or \[6\]",
        ),
        ("DPO", dict(loss_type="simpo"), {}, "use_ref_model: loss 'simpo' has no reference, expected False, got True"),
        ("DPO", {}, dict(target=torch.zeros(6, 5).long()), r"target: expected .*\[6, 6\], got \[6, 5\]"),
        ("DPO", {}, dict(_input=torch.zeros(6, 16)), r"_input: expected \[2B, T, H\], got shape \[6, 16\]"),
    ],
)
def test_errors(name: str, options: dict[str, Any], tensors: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(ours, f"LigerFusedLinear{name}Loss")(**options)(**batch() | tensors)


@pytest.mark.parametrize("name", NAMES)
def test_options_are_checked_at_construction(name: str) -> None:
    module = getattr(ours, f"LigerFusedLinear{name}Loss")
    with pytest.raises(ValueError, match="beta: expected a finite number above 0, got -1"):
        module(beta=-1)
    with pytest.raises(ValueError, match="chunk_size: expected an int of at least 1, got 0"):
        module(chunk_size=0)
    with pytest.raises(TypeError, match="ignore_index: expected an int, got None"):
        module(ignore_index=None)
    flag = "use_ref_model" if name in ("DPO", "KTO") else "compute_nll_loss"
    with pytest.raises(TypeError, match=f"{flag}: expected True or False, got 1"):
        module(**{flag: 1})


def test_the_head_is_summed_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """No operation of the logit means sees more than SUM_ROWS rows of a bf16 head: a CPU would copy them to float32."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from fastdpo.integrations.liger import functions

    monkeypatch.setattr(functions, "SUM_ROWS", 16)
    largest = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func._schema.name == "aten::sum":
                largest.append(args[0].numel())
            return func(*args, **(kwargs or {}))

    hidden, weight, bias = torch.randn(4, 3, 8).bfloat16(), torch.randn(61, 8).bfloat16(), torch.randn(61).bfloat16()
    with Sizes(), torch.autocast("cpu", dtype=torch.bfloat16):
        sums = functions._logit_sums(hidden, weight, bias)
    assert max(largest) <= 16 * 8 and sums.dtype == torch.float32
    torch.testing.assert_close(sums, (hidden.float() @ weight.float().T + bias.float()).sum((1, 2)))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("name", "options"), [("DPO", {}), ("ORPO", {}), ("KTO", dict(use_ref_model=True))], ids=str)
def test_bf16(theirs: Any, name: str, options: dict[str, Any], autocast: bool) -> None:
    """bf16 tensors, or float32 ones under autocast: dtypes as Liger's, values nearer to float32 mathematics."""
    tensors = batch()
    if name == "ORPO":
        tensors = {key: value for key, value in tensors.items() if not key.startswith("ref_")}
    if name == "KTO":
        tensors["preference_labels"] = torch.arange(6) % 2 == 0
    exact, low = ({key: value.detach() for key, value in tensors.items()} for _ in range(2))
    for key, value in exact.items():
        if value.is_floating_point():
            exact[key] = value.bfloat16().float()
            low[key] = exact[key] if autocast else value.bfloat16()
    results = []
    for package, given, on in ((ours, exact, False), (ours, low, autocast), (theirs, low, autocast)):
        module = getattr(package, f"LigerFusedLinear{name}Loss")(**options, compiled=False)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on):
            loss, auxiliary = module(**given)
        results.append((loss, *auxiliary))
    for truth, mine, other in zip(*results, strict=True):
        assert mine.dtype == other.dtype == torch.float32
        assert (mine - truth).abs().max() <= (other - truth).abs().max() + 1e-2 * truth.abs().max()


@pytest.mark.parametrize("without", [("bias",), ("ref_bias",), ("bias", "ref_bias")], ids=str)
def test_without_biases(theirs: Any, without: tuple[str, ...]) -> None:
    compare(theirs, "DPO", {}, batch() | dict.fromkeys(without))


@pytest.mark.parametrize("name", NAMES)
def test_functions_called_positionally(theirs: Any, name: str) -> None:
    """Every argument of Liger's signature by position."""
    import liger_kernel.chunked_loss.functional as functional

    tensors = batch() | dict(weight=0.3 * torch.randn(61, 16), preference_labels=torch.arange(6) % 2 == 0)
    mine = getattr(ours, f"liger_fused_linear_{name.lower()}")
    arguments = []
    for parameter in inspect.signature(mine).parameters.values():
        values = tensors | dict(compiled=False, beta=0.3, use_ref_model=True)
        arguments.append(values.get(parameter.name, parameter.default))
    loss, auxiliary = mine(*arguments)
    their_loss, their_auxiliary = getattr(functional, f"liger_fused_linear_{name.lower()}")(*arguments)
    torch.testing.assert_close(loss, their_loss, rtol=1e-5, atol=1e-6)
    for one, other in zip(auxiliary, their_auxiliary, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-5)


def test_a_weight_without_gradient_gets_none() -> None:
    """A frozen head, as under LoRA."""
    tensors = batch()
    tensors["lin_weight"].requires_grad_(False)
    loss, _ = ours.LigerFusedLinearDPOLoss()(**tensors)
    loss.backward()
    assert tensors["lin_weight"].grad is None and tensors["_input"].grad is not None
    with torch.no_grad():
        names = ("ref_input", "ref_weight", "target")
        ref = linear_token_logps(*(tensors[name] for name in names), bias=tensors["ref_bias"]).logps
    expected = linear_dpo_loss(
        tensors["_input"], tensors["lin_weight"], tensors["target"], ref.sum(1), bias=tensors["bias"]
    )
    torch.testing.assert_close(loss, expected.loss)
