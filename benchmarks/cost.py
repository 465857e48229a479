"""What each contender has to do, from its source: floating-point operations, bytes of logits held, bytes moved.

N tokens, V vocabulary, H width; products in units of 2 N V H operations. Rows: those that a contender computes, in a
padded batch all or only those that count.
"""

from __future__ import annotations

from typing import NamedTuple

# Products [N, H] x [H, V] of (forward only, frozen head, both gradients); a contender that recomputes the logits in its
# backward has one more
PRODUCTS = {
    "eager": (1, 2, 3),
    "torch.compile": (1, 2, 3),
    "PyTorch": (1, 3, 4),
    "TRL 1.16": (1, 3, 4),
    "Liger": (1, 2, 3),
    "CCE": (1, 2, 3),
    "fastdpo": (1, 1, 1),  # and two for each gradient on the columns kept
    "fastdpo exact": (1, 2, 3),  # one more where the logits do not fit its workspace
    "fastdpo exact, kept": (1, 2, 3),
}
DROPS_MASKED = ("CCE", "fastdpo", "fastdpo exact", "fastdpo exact, kept")
NEEDS = ("forward", "frozen", "both")
WORKSPACE = 256 << 20  # fastdpo's default, bytes
TRL_ROWS, TRL_COLUMNS = 4096, 32768


class Work(NamedTuple):
    """Of one batch."""

    tokens: int  # N, all rows
    counted: int  # rows whose label counts
    longest: int  # 2B times the longest sequence: the rows of Liger's padded batch
    vocab: int
    width: int
    size: int  # bytes of an element
    needs: str
    kept: float | None  # share of the columns that fastdpo keeps; None: all, "dense"


def rows(name: str, work: Work) -> int:
    if name == "Liger":
        return work.longest
    return work.counted if name in DROPS_MASKED else work.tokens


def operations(name: str, work: Work) -> float:
    """Floating-point operations of the products."""
    products: float = PRODUCTS[name][NEEDS.index(work.needs)]
    gradients = NEEDS.index(work.needs)
    recomputes = work.counted * work.vocab * work.size > WORKSPACE
    if name == "fastdpo":
        exact = work.kept is None
        products += gradients * (1.0 if work.kept is None else work.kept) + (exact and recomputes and gradients > 0)
    elif name == "fastdpo exact":
        products += recomputes and gradients > 0
    return 2.0 * products * rows(name, work) * work.vocab * work.width


def logits_held(name: str, work: Work) -> int:
    """Bytes of `[., V]` that exist at once."""
    all_rows = rows(name, work) * work.vocab
    held = {
        "eager": 12 * all_rows,  # log-softmax, its gradient and the gather's, float32
        "torch.compile": work.size * all_rows,
        "PyTorch": 8 * _pytorch_chunk(work) * work.vocab,  # a chunk's logits and their gradient, float32
        # Its tile, and seven tensors of float32 and one of bool made from it
        "TRL 1.16": min(work.tokens, TRL_ROWS) * min(work.vocab, TRL_COLUMNS) * (work.size + 29),
        "CCE": work.size * all_rows,
        "Liger": (work.size + 4) * work.vocab * _liger_pair(work),
        "fastdpo exact, kept": work.size * all_rows,
    }
    # fastdpo, its compact mode: streamed through cache in bf16, else its workspace
    exact = name == "fastdpo exact" or (work.kept is None and work.needs != "forward")
    workspace = min(WORKSPACE, work.size * all_rows)
    return held.get(name, workspace if exact or work.size != 2 else 0)


def _pytorch_chunk(work: Work) -> int:
    """Rows of a chunk: LinearCrossEntropyOptions' "aspect_ratio", in float32 "aspect_ratio:2"."""
    target = -(-work.tokens // -(-work.vocab // work.width))
    chunk: int = 1 << (target - 1).bit_length()
    return max(1, min(chunk // (1 if work.size == 2 else 2), work.tokens))


def _liger_pair(work: Work) -> int:
    """Rows of one pair: four sequences are two pairs."""
    return work.longest // 2


def hidden_operations(needs: str) -> float:
    """Of all contenders together, in units of N V H."""
    return 2.0 * sum(products[NEEDS.index(needs)] for products in PRODUCTS.values())


def logits_passes(size: int) -> float:
    """Bytes that eager's kind moves for one logit, for all contenders from logits together."""
    return 6 * (size + 4 * 6)


def least_moved(work: Work) -> int:
    """From logits, bytes that any contender must move: read in the forward, read and written in the backward."""
    return 3 * work.size * work.counted * work.vocab
