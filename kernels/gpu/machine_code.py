"""Reads what Triton compiled for a GPU: registers, spills, shared memory, and the main loop's instructions per logit.

NVIDIA's machine code is disassembled by the cuobjdump inside Triton's package; AMD's is the assembly that Triton keeps.
Any Triton kernel, this package's or another's.
"""

from __future__ import annotations

import heapq
import itertools
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import triton

from .occupancy import resident


class Instruction(NamedTuple):
    at: int  # address or line
    op: str
    jump: int | None = None  # where it may branch to
    falls: bool = True  # it may be followed by the next one


class Dialect(NamedTuple):
    """How a vendor's instructions are told apart."""

    load: str  # from global memory; patterns
    store: str
    wide: str  # of 128 bits
    widths: dict[str, int]  # a pattern in a load or store -> bits; the first that is found
    counted: str  # what takes a slot of the vector unit
    special: str  # exp2, log2, reciprocal ...: units with a rate of their own


NVIDIA = Dialect(
    load="LDG",
    store="STG",
    wide=r"\.128|\.256",
    widths={r"\.256": 256, r"\.128": 128, r"\.64": 64, r"\.[US]16": 16, r"\.[US]8": 8, "": 32},
    counted="",
    special="MUFU",
)
AMD = Dialect(
    load=r"(global|buffer)_load_",
    store=r"(global|buffer)_store_",
    wide="dwordx4",
    widths={"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "short": 16, "byte": 8},
    counted="^v_",  # the scalar and memory units issue beside it
    special=r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_",
)


def read(compiled: Any, block: int = 0, stores: bool | None = None) -> dict[str, Any]:
    """What a compiled kernel takes, and what its main loop does.

    Args:
        compiled: by triton.compile, for NVIDIA or AMD.
        block: logits that a program holds at once, in one turn of its loop; 0: it has none.
        stores: the main loop is one that stores to global memory, or that does not; None: either.

    Returns:
        registers (a thread's), spills (NVIDIA: bytes of stack or local accesses, whichever is more; AMD: registers),
        shared (bytes), warps; programs and occupancy: as occupancy.resident. Where there are logits also load_bits,
        store_bits (of the accesses that logits take; 0: none), instructions_per_logit (AMD: vector ones alone) and
        special_per_logit (MUFU; AMD: transcendental): of the main loop on its shortest way, or of all without a loop.
    """
    target, warps = compiled.metadata.target, compiled.metadata.num_warps
    logits = block // (warps * target.warp_size)
    if target.backend == "hip":
        found = read_amd(compiled.asm["amdgcn"], logits, stores)
    else:
        found = read_nvidia(disassembled(compiled), logits, stores)
    shared = compiled.metadata.shared
    programs, occupancy = resident(target.arch, found["registers"], shared, warps)
    return found | {"shared": shared, "warps": warps, "programs": programs, "occupancy": occupancy}


def disassembled(compiled: Any) -> str:
    """NVIDIA: the machine code's disassembly, resource usage first."""
    tool = os.path.join(triton.__path__[0], "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [tool, "-sass", "-res-usage", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stderr + done.stdout


def read_nvidia(text: str, logits: int = 0, stores: bool | None = None) -> dict[str, Any]:
    """As read, of cuobjdump's text; logits: a thread's."""
    usage = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert usage, "cuobjdump printed no resource usage"
    code = []
    for at, op in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*?)\s*;", text):
        branch = re.search(r"BRA.*\b(0x[0-9a-f]+)", op)
        always = re.match(r"EXIT|BRA(\.\w+)*\s+0x", op)
        code.append(Instruction(int(at, 16), op, int(branch[1], 16) if branch else None, falls=not always))
    local = sum("LDL" in i.op or "STL" in i.op for i in code)
    found = {"registers": int(usage[1]), "spills": max(int(usage[2]), local)}
    return found | _per_logit(code, NVIDIA, logits, stores, end="EXIT")


def read_amd(text: str, logits: int = 0, stores: bool | None = None) -> dict[str, Any]:
    """As read, of the assembly; logits: a thread's."""

    def number(name: str) -> int:
        return max((int(n) for n in re.findall(rf"\.{name}:\s*(\d+)", text)), default=0)

    ops: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = len(ops)
        elif re.match(r"\s+(v|s|ds|global|buffer|flat|scratch)_", line):
            ops.append(line.split(";")[0].strip())
    code = []
    for at, op in enumerate(ops):
        # execz skips what no lane is active for: some lane is, nearly everywhere
        jump = labels.get(op.split()[-1]) if "branch" in op and "execz" not in op else None
        code.append(Instruction(at, op, jump, falls=not re.match("s_branch|s_endpgm", op)))
    found = {"registers": number("vgpr_count"), "spills": number("vgpr_spill_count") + number("sgpr_spill_count")}
    return found | _per_logit(code, AMD, logits, stores, end="s_endpgm")


def _per_logit(
    code: Sequence[Instruction], dialect: Dialect, logits: int, stores: bool | None, end: str
) -> dict[str, Any]:
    if not logits:
        return {}
    loop = main_loop(code, dialect, stores) or _straight(code, end)

    def count(pattern: str) -> int:
        return sum(bool(re.search(pattern, op)) for op in loop)

    return {
        "load_bits": _width(loop, dialect.load, dialect.widths, logits),
        "store_bits": _width(loop, dialect.store, dialect.widths, logits),
        "instructions_per_logit": round(count(dialect.counted) / logits, 2),
        "special_per_logit": round(count(dialect.special) / logits, 2),
    }


def main_loop(code: Sequence[Instruction], dialect: Dialect, stores: bool | None = None) -> list[str]:
    """The loop that loads most from global memory, in the widest loads if there are several. [] without a loop.

    Where the code branches inside it, the shortest way around: what the target's block alone does is not on it.
    """

    def loads(ops: list[str]) -> tuple[int, int]:
        found = [op for op in ops if re.search(dialect.load, op)]
        return sum(bool(re.search(dialect.wide, op)) for op in found), len(found)

    blocks, followers = _graph(code)
    best: list[str] = []
    for start, ops in enumerate(blocks):
        around = _shortest_cycle(start, blocks, followers) if any(loads(ops)) else []
        if stores in (None, any(re.search(dialect.store, op) for op in around)):
            best = max(best, around, key=loads)
    return best


def _graph(code: Sequence[Instruction]) -> tuple[list[list[str]], list[list[int]]]:
    """Straight pieces of code, and for each those that may follow it."""
    starts = {code[0].at} | {i.jump for i in code if i.jump is not None}
    starts |= {after.at for i, after in itertools.pairwise(code) if i.jump is not None or not i.falls}
    pieces: list[list[Instruction]] = []
    for i in code:
        if i.at in starts:
            pieces.append([])
        pieces[-1].append(i)
    number = {piece[0].at: n for n, piece in enumerate(pieces)}
    followers = []
    for n, piece in enumerate(pieces):
        last = piece[-1]
        then = [number[last.jump]] if last.jump in number else []
        followers.append(then + ([n + 1] if last.falls and n + 1 < len(pieces) else []))
    return [[i.op for i in piece] for piece in pieces], followers


def _shortest_cycle(start: int, blocks: list[list[str]], followers: list[list[int]]) -> list[str]:
    """The instructions on the shortest way from a block back to it (Dijkstra); [] if there is none."""
    queue = [(0, [n]) for n in followers[start]]
    seen: set[int] = set()
    while queue:
        length, path = heapq.heappop(queue)
        at = path[-1]
        if at == start:
            return [op for n in [start, *path[:-1]] for op in blocks[n]]
        if at not in seen:
            seen.add(at)
            for n in followers[at]:
                heapq.heappush(queue, (length + len(blocks[at]), [*path, n]))
    return []


def _straight(code: Sequence[Instruction], end: str) -> list[str]:
    """All of a kernel without a loop: what follows the last exit is padding."""
    return [i.op for i in code[: max(n for n, i in enumerate(code) if end in i.op)]]


def _width(ops: list[str], kind: str, widths: dict[str, int], logits: int) -> int:
    """Bits of the accesses that logits take: the widest that move 2 bytes of each. 0: none do."""
    moved: Counter[int] = Counter()
    for op in ops:
        if name := re.search(rf"{kind}\S*", op):
            bits = next(bits for pattern, bits in widths.items() if re.search(pattern, name[0]))
            moved[bits] += bits
    return max((bits for bits, total in moved.items() if total >= 16 * logits), default=0)
