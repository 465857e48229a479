"""What an installed fastdpo must do with torch alone beside it: `make wheel` runs it in a clean environment.

    python tests/smoke.py CHECKOUT

The package must not be CHECKOUT/fastdpo. Exit code 1, with the reason, where something is wrong.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from pathlib import Path

import torch

import fastdpo
from fastdpo import backend, cli

BETA, ROWS, VOCAB, WIDTH = 0.3, 5, 1031, 24


def reference(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Eq. 7 of arXiv 2305.18290, reference-free, in plain PyTorch."""
    logps = (hidden @ weight.T).log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    chosen, rejected = (logps * (labels >= 0)).sum(1).chunk(2)
    return -torch.nn.functional.logsigmoid(BETA * (chosen - rejected)).mean()


def check(name: str) -> None:
    """Loss and both gradients of one backend, from logits and from hidden states."""
    generator = torch.Generator().manual_seed(0)
    double = [
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((4, ROWS, WIDTH), (VOCAB, WIDTH))
    ]
    labels = torch.randint(VOCAB, (4, ROWS), generator=generator)
    labels[:, 0] = -100
    hidden, weight = (each.clone().requires_grad_() for each in double)
    expected = reference(hidden, weight, labels)
    expected.backward()
    for entry in ("hidden", "logits"):
        mine = [each.float().requires_grad_() for each in double]
        options = {"beta": BETA, "loss_type": "sigmoid", "backend": name}
        if entry == "hidden":
            loss = fastdpo.linear_dpo_loss(*mine, labels, **options).loss
        else:
            loss = fastdpo.dpo_loss(mine[0] @ mine[1].T, labels, **options).loss
        loss.backward()
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
        for got, truth in zip(mine, (hidden, weight), strict=True):
            assert got.grad is not None and truth.grad is not None
            error = float((got.grad - truth.grad).norm() / truth.grad.norm())
            assert error < 1e-3, f"{name}, from {entry}: a gradient is off by {error:.1e}"


def main(checkout: Path) -> None:
    place = Path(fastdpo.__file__).resolve()
    assert place.parent != checkout.resolve() / "fastdpo", f"{place} is the checkout's, not an installation's"
    assert (place.parent / "py.typed").is_file()
    for name, command in cli.COMMANDS.items():
        module = place.parent.joinpath(*command.module.split(".")[1:]).with_suffix(".py")
        assert module.is_file(), f"{module} is not in the wheel"
        if any(importlib.util.find_spec(package) is None for package in command.needs):
            assert cli.main([name]) == 1, f"fastdpo {name} goes on without {command.needs}"
    available = [name for name in ("cpu", "eager") if not isinstance(backend.load(name), str)]
    for name in available:
        check(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a warning here is a backend that was left for a slower one
        if "cpu" in available:
            fastdpo.token_logps(torch.randn(3, 7), torch.arange(3))
    assert cli.main(["doctor"]) == 0
    print(f"\nsmoke test passed: {place.parent}, backends {', '.join(available)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
