"""`fastdpo doctor`: what works on this machine, and why the rest does not.

Each available backend proves itself on a small problem: value and gradient of token_logps against the float64
eager backend.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import time
from collections.abc import Sequence

import torch

from . import __version__, backend, token_logps
from .system import installed_version

_ROWS, _VOCAB = 64, 4099  # ragged: no multiple of a vector or block


def main(argv: Sequence[str] | None = None) -> int:
    """Print the findings. Returns 0, or 1 if a backend that is available computes something wrong."""
    _parser().parse_args(argv)
    for name, value in versions():
        print(f"{name:<14}{value}")
    print()
    healthy = True
    for name in backend.BACKENDS:
        if name == "cpu":
            print("(the cpu backend is built on first use, which can take a minute)", flush=True)
        module = backend.load(name)
        if isinstance(module, str):
            print(f"{name:<8}not available: {module}")
            continue
        started = time.perf_counter()
        results = self_check(name)
        seconds = time.perf_counter() - started
        for dtype, problem in results:
            healthy = healthy and problem is None
            print(f"{name:<8}{str(dtype).removeprefix('torch.'):<10}{'OK' if problem is None else f'FAIL: {problem}'}")
        print(f"{'':<8}self-check took {seconds:.1f} s")
    return 0 if healthy else 1


def _parser() -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog="fastdpo doctor", description="Which backends work on this machine, and why the others do not."
    )


def versions() -> list[tuple[str, str]]:
    """(what, which) of everything that decides which kernels run."""
    found = [("fastdpo", __version__), ("python", platform.python_version()), ("torch", torch.__version__)]
    for package in ("triton", "transformers", "trl"):
        found.append((package, installed_version(package) or "not installed"))
    found.append(("compiler", _compiler()))
    found.append(("CPU", f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores"))
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    found.append(("GPU", ", ".join(gpus) or "none"))
    return found


def self_check(name: str) -> list[tuple[torch.dtype, str | None]]:
    """(dtype, None or what is wrong) for each dtype that the backend takes on this machine."""
    row, accelerator = backend.BACKENDS[name], torch.accelerator.current_accelerator(check_available=True)
    device = accelerator.type if accelerator is not None and accelerator.type in row.devices else "cpu"
    results: list[tuple[torch.dtype, str | None]] = []
    for dtype in row.dtypes:
        # Triton's interpreter is not always right in bfloat16
        if row.interpreter is not None and device == "cpu" and dtype == torch.bfloat16:
            continue
        try:
            results.append((dtype, _compare(name, device, dtype)))
        except Exception as error:  # whatever it is, the doctor is here to say it
            results.append((dtype, f"{type(error).__name__}: {error}"))
    return results


def _compare(name: str, device: str, dtype: torch.dtype) -> str | None:
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(_ROWS, _VOCAB, generator=generator)).to(dtype)
    labels = torch.randint(_VOCAB, (_ROWS,), generator=generator)
    labels[::7] = -100
    slope = torch.randn(_ROWS, generator=generator, dtype=torch.float64)

    def value_and_gradient(x: torch.Tensor, which: str) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.detach().requires_grad_()
        logps = token_logps(x, labels.to(x.device), backend=which).logps
        logps.backward(slope.to(logps))
        assert x.grad is not None
        return logps.detach().double().cpu(), x.grad.double().cpu()

    expected = value_and_gradient(logits.double(), "eager")
    got = value_and_gradient(logits.to(device), name)
    # logps come in float32 whatever the dtype; the gradient is rounded once to the dtype of the logits
    accurate = torch.float64 if dtype == torch.float64 else torch.float32
    allowed = (64 * torch.finfo(accurate).eps, 4 * torch.finfo(dtype).eps + 64 * torch.finfo(accurate).eps)
    for what, mine, truth, tolerance in zip(("value", "gradient"), got, expected, allowed, strict=True):
        difference = float((mine - truth).abs().max() / truth.abs().max())
        if not difference <= tolerance:  # a NaN fails as well
            return f"{what} differs from float64 by {difference:.1e} relative, expected at most {tolerance:.1e}"
    return None


def _compiler() -> str:
    from .cpu.build import BuildError, find_compiler

    try:
        command = find_compiler()
        output = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=20).stdout
    except (BuildError, OSError, subprocess.SubprocessError) as error:
        return str(error)
    return output.splitlines()[0] if output else " ".join(command)
