"""What is measured: heads of real models, and how a case shrinks to fit a machine and a time.

Most telling first: where the time does not last, the last are left out, and named.
"""

from __future__ import annotations

from typing import NamedTuple

from .cost import hidden_operations, logits_passes

MODELS = {  # V, H
    "Gemma 3 270M": (262144, 640),
    "Gemma 3 1B": (262144, 1152),
    "Gemma 3 4B": (262144, 2560),
    "Qwen3 0.6B": (151936, 1024),
    "Qwen3 1.7B": (151936, 2048),
    "Qwen3 4B": (151936, 2560),
    "Qwen3 8B": (151936, 4096),
    "Llama 3 8B": (128256, 4096),
    "Mistral 7B": (32768, 4096),
}


class Case(NamedTuple):
    """One group of the tables: what every contender is given."""

    model: str  # of MODELS
    entry: str = "hidden"  # or "logits"
    layout: str = "packed"  # completions alone; "padded": [2B, T], half of it prompts, which do not count
    needs: str = "both"  # gradients of hidden and weight; "frozen": of hidden alone
    dtype: str = "bfloat16"
    softmax: str = "peaked"  # as a trained model's; "dense": random weights, of which nothing can be left out
    tokens: int = 2048  # N at most: the batch's positions
    share: float = 1.0  # of the time, beside the other cases
    check: bool = False  # measured by `make bench-check`

    @property
    def name(self) -> str:
        parts = [self.model, f"from {self.entry}", {"bfloat16": "bf16"}.get(self.dtype, self.dtype), self.layout]
        if self.entry == "hidden":
            parts += [{"frozen": "frozen head", "forward": "forward only"}.get(self.needs, ""), self.softmax]
        return ", ".join(part for part in parts if part)


CASES = (
    Case("Gemma 3 270M", tokens=512, share=4, check=True),
    Case("Llama 3 8B", "logits", tokens=1024, share=2.5, check=True),
    Case("Mistral 7B", tokens=512, share=2.2, check=True),
    Case("Qwen3 0.6B", layout="padded"),
    Case("Llama 3 8B", share=1.5),
    Case("Gemma 3 270M", needs="frozen", tokens=512, share=0.7, check=True),
    Case("Gemma 3 270M", "logits", "padded", tokens=1024, share=0.6),
    Case("Qwen3 0.6B", "logits", dtype="float32", tokens=1024, share=0.6),
    Case("Qwen3 0.6B", dtype="float32"),
    Case("Gemma 3 270M", softmax="dense", tokens=512),
    Case("Mistral 7B", "logits", tokens=2048, share=0.5),
    Case("Gemma 3 1B", needs="frozen"),
    Case("Qwen3 8B"),
    Case("Gemma 3 4B"),
    Case("Qwen3 1.7B", layout="padded", needs="frozen"),
    Case("Llama 3 8B", layout="padded"),
    Case("Qwen3 4B", softmax="dense"),
    Case("Gemma 3 270M", tokens=4096, layout="padded"),
    Case("Mistral 7B", dtype="float32", needs="frozen"),
)
LEAST_TOKENS, LEAST_VOCAB = 128, 0.5  # of the head's vocabulary
ROUNDS = 3  # that a case's time is made for, its gate and first run among them
SLOWER = 2.0  # than the operations model, all contenders in sum


class Shape(NamedTuple):
    """A case as it is measured."""

    tokens: int
    vocab: int
    width: int
    left_out: str = ""  # what the case has and this has not


class Machine(NamedTuple):
    """What a case must fit."""

    operations: dict[str, float]  # a second, of a product, by dtype
    bytes_moved: float  # a second, of a copy, read and written
    memory: int  # bytes that are free


def seconds_a_token(case: Case, vocab: int, machine: Machine) -> float:
    """All contenders once, about."""
    size = 2 if case.dtype == "bfloat16" else 4
    if case.entry == "logits":
        return logits_passes(size) * vocab * SLOWER / machine.bytes_moved
    operations = hidden_operations(case.needs) * vocab * MODELS[case.model][1]
    return operations * SLOWER / machine.operations[case.dtype]


def memory_needed(case: Case, tokens: int, vocab: int) -> int:
    """Bytes: the inputs, their float32 truth and gradients, and eager's logits."""
    size = 2 if case.dtype == "bfloat16" else 4
    width = MODELS[case.model][1]
    weight = 0 if case.entry == "logits" else vocab * width * (3 * size + 16)
    return weight + tokens * vocab * (3 * size + 16)


def fit(case: Case, seconds: float, machine: Machine) -> Shape | None:
    """The largest batch of the case that takes `seconds`: fewer tokens, then less vocabulary; None: not even that."""
    vocab, width = MODELS[case.model]
    wanted = vocab
    while vocab >= LEAST_VOCAB * wanted:
        tokens = int(seconds / ROUNDS / seconds_a_token(case, vocab, machine))
        while tokens >= LEAST_TOKENS and memory_needed(case, min(tokens, case.tokens), vocab) > machine.memory:
            tokens //= 2
        if tokens >= LEAST_TOKENS:
            tokens = min(case.tokens, tokens // 64 * 64)
            missing = [f"N = {tokens:,} of {case.tokens:,}"] if tokens < case.tokens else []
            missing += [f"V = {vocab:,} of {wanted:,}"] if vocab < wanted else []
            return Shape(tokens, vocab, width, ", ".join(missing))
        vocab //= 2
    return None
