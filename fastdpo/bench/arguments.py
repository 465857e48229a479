"""The command line of `fastdpo bench`, checked."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .providers import NEEDS, PROVIDERS

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class BenchError(ValueError):
    """A command line that cannot be measured; the message names the argument, its value and what was expected."""


class Head(NamedTuple):
    """Whose head is measured."""

    vocab: int
    width: int
    config: Any  # of the model; None without one


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="fastdpo bench", description="What fastdpo's head saves on this machine against what is installed."
    )
    add = found.add_argument
    add("model", nargs="?", metavar="MODEL", help="folder, or hub id, of which no more than the config is downloaded")
    add("--hidden", type=_positive, metavar="H", help="width of the head, where no MODEL is given")
    add("--vocab", type=_positive, metavar="V", help="tokens of the vocabulary, likewise")
    add("--tokens", type=_positive, metavar="N", help="of completions (default: what takes under two minutes)")
    add("--data", type=Path, metavar="FILE.jsonl", help="pairs, for MODEL's hidden states")
    add("--dtype", choices=DTYPES, default="bfloat16", help="(bfloat16)")
    add("--needs", choices=NEEDS, default="both", help="gradients: both, of a frozen head, or none (both)")
    add("--contenders", nargs="+", choices=PROVIDERS, metavar="NAME", help=", ".join(PROVIDERS))
    add("--rounds", type=_positive, default=3, help="medians of so many (3)")
    add("--limit", type=_seconds, default=15.0, metavar="S", help="seconds that one run may take (15)")
    add("--device", default="auto", help="cpu, cuda or cuda:N (the GPU, if there is one)")
    add("--output", type=Path, default=Path("bench"), metavar="DIR", help="(bench)")
    return found


def device_of(name: str) -> torch.device:
    """Where to run; a GPU becomes torch's current device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise BenchError(f"--device {name}: expected cpu, cuda or cuda:N (an AMD GPU is cuda, too)")
    if device.type == "cpu":
        return device
    if not torch.cuda.is_available():
        raise BenchError(f"--device {name}: torch sees no GPU; `fastdpo doctor` says more")
    index, count = torch.cuda.current_device() if device.index is None else device.index, torch.cuda.device_count()
    if index >= count:
        raise BenchError(f"--device {name}: expected an index below {count}, the number of GPUs that torch sees")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def head_of(options: argparse.Namespace) -> Head:
    """The sizes that the options name, or the model's config."""
    if options.model is None:
        if options.vocab is None or options.hidden is None:
            raise BenchError("MODEL: not given, expected a folder or hub id, or else --hidden and --vocab")
        if options.data is not None:
            raise BenchError(f"--data {options.data}: only a MODEL can make hidden states of it")
        return Head(options.vocab, options.hidden, None)
    if options.vocab is not None or options.hidden is not None:
        raise BenchError(f"MODEL {options.model}: its config has the sizes; leave out --hidden and --vocab")
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(options.model)
    except (OSError, ValueError) as error:
        raise BenchError(f"MODEL {options.model}: no config: {str(error).strip().splitlines()[0]}") from None
    text = config.get_text_config()
    return Head(text.vocab_size, text.hidden_size, config)


def check_memory(options: argparse.Namespace, head: Head) -> None:
    """Raise BenchError where the inputs would not fit the memory that is free."""
    import psutil

    # Peaked and dense, one of them in float32 before it is rounded
    each = head.width * (2 * DTYPES[options.dtype].itemsize + 4)
    needed, free = (head.vocab + (options.tokens or 0)) * each, psutil.virtual_memory().available
    if needed > free:
        given = [("--hidden", head.width), ("--vocab", head.vocab), ("--tokens", options.tokens)]
        words = " ".join(f"{name} {value}" for name, value in given if value is not None)
        sizes = f"inputs of {needed / 2**30:,.1f} GiB, expected at most {free / 2**30:.1f}, which are free"
        raise BenchError(f"{words}: {sizes}")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"expected seconds above 0, got {text!r}")
    return value
