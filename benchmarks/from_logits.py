"""From logits on a CPU: token logps forward and backward, and what of it is the machine's memory.

    python -m benchmarks.from_logits [--rows 1024] [--vocab 131072] [--dtype bfloat16] [--rounds 7]

Every contender starts from the same logits and gives logps [N] and the gradient [N, V]. Bytes model: the forward
reads each logit once, the backward reads and writes each once; the yardstick is the machine's copy (one read, one
write an element).
"""

from __future__ import annotations

import argparse

import torch

import fastdpo
from fastdpo.bench.from_logits import FROM_LOGITS, LogitsBatch, run
from fastdpo.bench.gate import Gate
from fastdpo.bench.measure import alternate, machine

STATISTICS = ("entropy", "mean_logits", "is_top1", "log_sum_sq_probs")  # all that TRL's DPO trainer logs


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=131072)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--rounds", type=int, default=7)
    return parser


def main() -> None:
    options = _parser().parse_args()

    torch.manual_seed(0)
    logits = (torch.randn(options.rows, options.vocab) * 3).to(getattr(torch, options.dtype))
    batch = LogitsBatch(
        logits, torch.randint(0, options.vocab, (options.rows,)), (options.rows,), torch.randn(options.rows)
    )
    scratch = batch._replace(logits=logits.clone())  # fastdpo in place writes its gradient over this one
    gate = Gate(batch, tokens=8)
    for name in FROM_LOGITS:
        gate.errors(name)

    def forward(stats: tuple[str, ...] = ()) -> None:
        with torch.no_grad():
            fastdpo.token_logps(logits, batch.labels, stats=stats)

    ours = "fastdpo, in place"
    calls = {name: lambda name=name: run(name, scratch if name == ours else batch) for name in FROM_LOGITS}
    calls |= {
        "fastdpo forward": forward,
        "fastdpo forward, all statistics": lambda: forward(STATISTICS),
        "copy": lambda: scratch.logits.copy_(logits),
    }
    seconds = alternate(calls, options.rounds, before={ours: lambda: scratch.logits.copy_(logits)})
    size = logits.nbytes
    bandwidth = 2 * size / seconds["copy"]
    backward = seconds[ours] - seconds["fastdpo forward"]
    print(f"{machine()}; N={options.rows}, V={options.vocab}, {options.dtype}, medians of {options.rounds}")
    for name, value in seconds.items():
        print(f"{name:34}{value * 1e3:10.1f} ms{value / seconds[ours]:8.2f} x fastdpo, in place")
    print(f"copy bandwidth {bandwidth / 1e9:.1f} GB/s (read + write)")
    print(f"forward reads at {size / seconds['fastdpo forward'] / bandwidth:.0%} of it")
    print(f"backward reads and writes at {2 * size / backward / bandwidth:.0%} of it")


if __name__ == "__main__":
    main()
