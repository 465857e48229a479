"""From logits on a CPU: token logps forward and in-place backward, against plain PyTorch.

    python -m benchmarks.from_logits [--rows 1024] [--vocab 131072] [--dtype bfloat16] [--rounds 7]

Every contender starts from the same logits and gives logps [N] and the gradient [N, V]. Bytes model: the forward
reads each logit once, the backward reads and writes each once; the yardstick is the machine's copy (one read, one
write an element).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

import fastdpo
from fastdpo.bench.measure import alternate, check, machine


def plain(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.log_softmax(logits.float(), dim=-1).gather(-1, labels[:, None]).squeeze(-1)


def gradient_by(logps: Callable[[Tensor, Tensor], Tensor], logits: Tensor, labels: Tensor, grads: Tensor) -> Tensor:
    logits = logits.detach().requires_grad_()
    return torch.autograd.grad(logps(logits, labels), logits, grads)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=131072)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()

    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    logits = (torch.randn(options.rows, options.vocab) * 3).to(dtype)
    labels, grads = torch.randint(0, options.vocab, (options.rows,)), torch.randn(options.rows)
    compiled = torch.compile(plain)
    scratch = logits.clone()  # fastdpo writes its gradient over this one

    def fast(logits: Tensor, labels: Tensor) -> Tensor:
        return fastdpo.token_logps(logits, labels, inplace_backward=True).logps

    few = slice(0, 8)
    truth = gradient_by(plain, logits[few].double(), labels[few], grads[few].double())
    for name, function in {"eager": plain, "torch.compile": compiled, "fastdpo": fast}.items():
        check(name, gradient_by(function, logits[few].clone(), labels[few], grads[few]), truth, 5e-3)
        check(name, function(logits[few], labels[few]), plain(logits[few].double(), labels[few]), 1e-5)

    def forward_only() -> None:
        with torch.no_grad():
            fastdpo.token_logps(logits, labels)

    def trl_statistics() -> None:
        with torch.no_grad():
            fastdpo.token_logps(logits, labels, stats=("entropy", "mean_logits", "is_top1", "log_sum_sq_probs"))

    seconds = alternate(
        {
            "eager": lambda: gradient_by(plain, logits, labels, grads),
            "torch.compile": lambda: gradient_by(compiled, logits, labels, grads),
            "fastdpo": lambda: gradient_by(fast, scratch, labels, grads),
            "fastdpo forward": forward_only,
            "fastdpo forward, all statistics": trl_statistics,
            "copy": lambda: scratch.copy_(logits),
        },
        options.rounds,
        before={"fastdpo": lambda: scratch.copy_(logits)},
    )
    size = logits.numel() * logits.element_size()
    bandwidth = 2 * size / seconds["copy"]
    backward = seconds["fastdpo"] - seconds["fastdpo forward"]
    print(f"{machine()}; N={options.rows}, V={options.vocab}, {options.dtype}, medians of {options.rounds}")
    for name, value in seconds.items():
        print(f"{name:34}{value * 1e3:10.1f} ms{value / seconds['fastdpo']:8.2f} x fastdpo")
    print(f"copy bandwidth {bandwidth / 1e9:.1f} GB/s (read + write)")
    print(f"forward reads at {size / seconds['fastdpo forward'] / bandwidth:.0%} of it")
    print(f"backward reads and writes at {2 * size / backward / bandwidth:.0%} of it")


if __name__ == "__main__":
    main()
