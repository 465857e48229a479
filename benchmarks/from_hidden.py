"""From hidden states: token logps and the gradients of hidden and weight, on a real model's states over real pairs.

    python -m benchmarks.from_hidden --model FOLDER --data PAIRS.jsonl [--pairs 4] [--max-length 1024] [--rounds 3]
        [--needs both|frozen|forward] [--tokens N] [--dense] [--contenders NAME ...]

Completion tokens only, for every contender; dtype bf16. Checked first against float32 mathematics on the same inputs;
a wrong contender is not timed. Memory: peak resident set of a process of its own, above inputs and returned gradients.
A contender that is not installed is named and left out; PyTorch's chunks take minutes on a large vocabulary.
--needs frozen: no gradient of weight; forward: none at all.
--tokens: that many, from as many pairs as it takes, as one pair of two sequences. --dense: random hidden and weight.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from fastdpo.bench.gate import Gate, WrongResult
from fastdpo.bench.inputs import dense_batch, real_batch
from fastdpo.bench.isolated import run_alone
from fastdpo.bench.measure import alternate, machine
from fastdpo.bench.providers import NEEDS, PROVIDERS, run

from .group import product_alone


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--dense", action="store_true")
    parser.add_argument("--needs", default="both", choices=NEEDS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--contenders", nargs="*", default=list(PROVIDERS), choices=list(PROVIDERS))
    return parser


def main() -> None:
    options = _parser().parse_args()

    needs = options.needs
    batch = real_batch(options.model, options.data, options.pairs, options.max_length, options.tokens)
    if options.dense:
        batch = dense_batch(batch)
    (count, width), vocab = batch.hidden.shape, batch.weight.shape[0]
    kind = "random (dense)" if options.dense else "real"
    print(
        f"{machine()}; {kind}, N={count}, V={vocab}, H={width}, bf16, {needs}, medians of {options.rounds}", flush=True
    )
    gate, checked = Gate(batch, needs), {}
    for name in options.contenders:
        try:
            checked[name] = gate.errors(name)
        except (ImportError, WrongResult) as error:
            print(f"{name}: left out ({error})")

    calls: dict[str, Callable[[], object]] = {"forward product alone": product_alone(batch)}
    calls |= {name: lambda name=name: run(name, batch, needs) for name in checked}
    seconds = alternate(calls, options.rounds)
    print(f"{'':24}{'seconds':>9}{'x product':>11}{'MiB':>9}{'logp error':>12}{'dX error':>10}{'dW error':>10}")
    with tempfile.NamedTemporaryFile(suffix=".pt") as file:
        torch.save(tuple(batch), file.name)
        for name, value in seconds.items():
            line = f"{name:24}{value:9.2f}{value / seconds['forward product alone']:11.2f}"
            if name in checked:
                alone = run_alone(name, Path(file.name), needs)
                line += f"{alone.failed or format(alone.mib, '.0f'):>9}"
                line += "".join(f"{e:{w}.1e}" for e, w in zip(checked[name], (12, 10, 10), strict=False))
            print(line, flush=True)


if __name__ == "__main__":
    main()
