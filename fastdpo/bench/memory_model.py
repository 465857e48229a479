"""How much memory each contender needs, by formula: for machines that are not here.

In bytes, above weight and hidden, with the gradients that are returned; bf16, gradients of hidden and weight. On a CPU
the formulas are checked against measurements by `python -m benchmarks.longest`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

MIB = 2**20
KEPT = 0.06  # share of the columns that fastdpo keeps of real text, of 256 tokens: 4 to 8% on Gemma 3 270M
_TILE = (4096, 32768)  # tokens and columns that TRL takes at a time


class Sizes(NamedTuple):
    tokens: int
    vocab: int
    width: int

    @property
    def logits(self) -> int:
        return self.tokens * self.vocab

    @property
    def elements(self) -> int:
        """Of hidden and weight, or of their gradients."""
        return (self.tokens + self.vocab) * self.width


Formula = Callable[[Sizes], float]

# float32 logits, their log_softmax and its gradient at once
_EAGER: Formula = lambda s: max(12 * s.logits, 2 * s.logits + 2 * s.elements)  # noqa: E731
# bf16 logits and their float32 log_softmax, and the gradients, which its forward computes
_LIGER: Formula = lambda s: 6 * s.logits + 2 * s.elements  # noqa: E731


def _trl_tile(sizes: Sizes) -> int:
    return min(sizes.tokens, _TILE[0]) * min(sizes.vocab, _TILE[1])


CPU: dict[str, Formula] = {
    "eager": _EAGER,
    # Gradients in float32, then in bf16; without Triton some seven float32 copies of a chunk
    "TRL 1.16": lambda s: max(31 * _trl_tile(s) + 4 * s.elements, 6 * s.elements),
    "Liger": _LIGER,
    # Under torch.compile all logits are kept, in bf16
    "CCE": lambda s: 2 * s.logits + 2 * s.elements,
    # Of the kept columns, the entries that are worth their memory; a range of dW in float32
    "fastdpo": lambda s: 0.085 * s.logits + 64 * MIB + 2 * s.elements,
    "fastdpo exact": lambda s: 264 * MIB + 2 * s.elements,
    "fastdpo exact, kept": lambda s: 2 * s.logits + 2 * s.elements,
}
GPU: dict[str, Formula] = {
    "eager": _EAGER,
    "TRL 1.16": lambda s: max(2 * _trl_tile(s) + 4 * s.elements, 6 * s.elements),
    "Liger": _LIGER,
    "CCE": lambda s: 2 * s.elements,
    # A tile of logits, the kept columns in bf16, a range of dW in float32
    "fastdpo": lambda s: (256 + 64) * MIB + 2 * KEPT * s.logits + 2 * s.elements,
    "fastdpo exact": lambda s: (256 + 64) * MIB + 2 * s.elements,
    "fastdpo exact, kept": lambda s: 2 * s.logits + 2 * s.elements,
}


def longest_pair(formula: Formula, budget: float, vocab: int, width: int) -> int:
    """The most tokens of a pair, both sequences together, that fit `budget` bytes beside weight; 0: none."""
    low, high = 0, 1 << 32
    while low + 1 < high:
        middle = (low + high) // 2
        need = formula(Sizes(middle, vocab, width)) + 2 * middle * width
        low, high = (middle, high) if need <= budget else (low, middle)
    return low
