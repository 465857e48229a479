"""From hidden states: token logps and the gradients of hidden and weight, on a real model's states over real pairs.

    python -m benchmarks.from_hidden --model FOLDER --data PAIRS.jsonl [--pairs 4] [--max-length 1024] [--rounds 3]

Completion tokens only, for every contender; dtype bf16. Checked first against float32 mathematics on the same inputs.
Memory: peak resident set of a process of its own, above inputs and returned gradients. A contender that is not
installed is named and left out.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from fastdpo.recorder import peak_memory_mib, resident_memory_mib

from .measure import alternate, machine
from .providers import PROVIDERS

CHECKED_TOKENS = 256


def hidden_states(model_name: str, data: Path, pairs: int, max_length: int) -> tuple[Tensor, Tensor, Tensor]:
    """hidden bf16 [N, H], labels [N], weight bf16 [V, H] over the completions of the first pairs."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.data_utils import apply_chat_template

    from fastdpo.train_data import plain_chat_template, read_pairs

    model = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    tokenizer.chat_template = tokenizer.chat_template or plain_chat_template(tokenizer)
    hidden, labels = [], []
    for row in read_pairs(data).select(range(pairs)):
        text = apply_chat_template(row, tokenizer)
        for side in ("chosen", "rejected"):
            prompt = tokenizer(text["prompt"]).input_ids
            ids = (prompt + tokenizer(text[side], add_special_tokens=False).input_ids)[:max_length]
            with torch.no_grad():
                states = model.model(torch.tensor([ids])).last_hidden_state[0]
            hidden.append(states[len(prompt) - 1 : len(ids) - 1])
            labels += ids[len(prompt) :]
    return torch.cat(hidden), torch.tensor(labels), model.lm_head.weight.detach().clone()


def run(name: str, hidden: Tensor, weight: Tensor, labels: Tensor, grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    h, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    logps = PROVIDERS[name](h, w, labels)
    dx, dw = torch.autograd.grad(logps, [h, w], grads.to(logps.dtype))
    return logps.detach(), dx, dw


def errors(name: str, hidden: Tensor, weight: Tensor, labels: Tensor, grads: Tensor) -> tuple[float, float, float]:
    """Mean absolute error of a logp; relative errors of dX and dW, against float32."""
    few = slice(0, CHECKED_TOKENS)
    truth = run("eager", hidden[few].float(), weight.float(), labels[few], grads[few])
    result = run(name, hidden[few], weight, labels[few], grads[few])
    relative = [((r.float() - t).norm() / t.norm()).item() for r, t in zip(result[1:], truth[1:], strict=True)]
    return (result[0] - truth[0]).abs().mean().item(), relative[0], relative[1]


def peak_mib(name: str, inputs: str) -> float:
    """In this process: peak resident MiB of one run above inputs and returned gradients."""
    hidden, labels, weight, grads = torch.load(inputs)
    run(name, hidden[:64], weight[:1024], labels[:64] % 1024, grads[:64])  # compilers and libraries loaded
    before = resident_memory_mib()
    _, dx, dw = run(name, hidden, weight, labels, grads)
    return peak_memory_mib() - before - (dx.nbytes + dw.nbytes) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--contenders", nargs="*", default=list(PROVIDERS), choices=list(PROVIDERS))
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        print(peak_mib(*options.memory_of))
        return
    if options.model is None or options.data is None:
        parser.error("--model and --data are needed")

    hidden, labels, weight = hidden_states(options.model, options.data, options.pairs, options.max_length)
    grads = torch.randn(len(labels), generator=torch.Generator().manual_seed(0))
    (count, width), vocab = hidden.shape, weight.shape[0]
    print(f"{machine()}; N={count}, V={vocab}, H={width}, bf16, medians of {options.rounds}", flush=True)
    checked = {}
    for name in options.contenders:
        try:
            checked[name] = errors(name, hidden, weight, labels, grads)
        except ImportError as error:
            print(f"{name}: left out ({error})")

    buffer = hidden.new_empty((256, vocab))

    def product() -> None:
        for tile in hidden.split(256):
            torch.mm(tile, weight.T, out=buffer[: len(tile)])

    calls = {"forward product alone": product}
    calls |= {name: lambda name=name: run(name, hidden, weight, labels, grads) for name in checked}
    seconds = alternate(calls, options.rounds)
    print(f"{'':24}{'seconds':>9}{'x product':>11}{'MiB':>9}{'logp error':>12}{'dX error':>10}{'dW error':>10}")
    with tempfile.NamedTemporaryFile(suffix=".pt") as file:
        torch.save((hidden, labels, weight, grads), file.name)
        for name, value in seconds.items():
            line = f"{name:24}{value:9.2f}{value / seconds['forward product alone']:11.2f}"
            if name in checked:
                command = [sys.executable, "-m", "benchmarks.from_hidden", "--memory-of", name, file.name]
                peak = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
                line += f"{peak:9.0f}" + "".join(
                    f"{e:{w}.1e}" for e, w in zip(checked[name], (12, 10, 10), strict=True)
                )
            print(line, flush=True)


if __name__ == "__main__":
    main()
