"""Compile the kernels for GPUs that are not here, and read what came out: registers, spills, widths, instructions.

    python -m fastdpo.gpu.compile_offline            one JSON line a kernel and target

Needs Triton and no GPU; not to be run with TRITON_INTERPRET=1, under which no kernel is compiled.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import launch
from .column_mass import column_mass_kernel
from .column_probs import column_probs_kernel
from .compact_gradient import compact_gradient_kernel
from .row_backward import row_backward_kernel
from .row_forward import row_combine_kernel, row_forward_kernel
from .row_math import IDENTITY, SCALE, SOFTCAP
from .sequences import pair_sigmoid_kernel, sequence_sums_kernel

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

# Types of arguments by name; any other argument is a pointer to float32
_INT64 = ("stride", "stride_g", "stride_r", "out_stride_g", "out_stride_r")
_INT32 = (
    "rows",
    "vocab",
    "width",
    "splits",
    "chunks",
    "span",
    "vocab_start",
    "pairs",
    "windows",
    "kept",
    "token_tiles",
)
_FLOAT = ("inner", "outer", "slope", "beta", "label_smoothing", "per_z")
_LOGITS = ("logits", "out", "probs", "gradient")
_POINTERS = {"targets": "*i64", "bounds": "*i64", "is_top1": "*i8", "columns": "*i32", "kept_mass": "*fp64"}
# Torch's own new memory, which Triton sees to lie on 16 bytes when it compiles at the launch
_ALIGNED = ("probs", "gradient")

_NO_STATS = dict.fromkeys(("entropy", "mean_logits", "is_top1", "log_sum_sq_probs"))
_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
_FLAGS = ("ENTROPY", "MEAN", "TOP1", "SQUARES")


class Case(NamedTuple):
    kernel: Any
    constants: dict[str, Any]  # constexprs, and the arguments that are None
    shape: Callable[[int, int], dict[str, int]] | None = None  # of a block of logits, from item size and warp size
    warps: int = launch.WARPS


def _forward(kind: Any = IDENTITY, stats: bool = False, peel: bool = False, split: bool = False) -> Case:
    none = ({} if stats else _NO_STATS) | ({} if split else {"partials": None})
    constants = {**none, **dict.fromkeys(_FLAGS, stats), "KIND": kind, "PEEL": peel}
    return Case(row_forward_kernel, constants, launch.block_shape)


def _backward(kind: Any = IDENTITY, entropy: bool = False, peel: bool = False, narrow: bool = False) -> Case:
    none = {} if entropy else dict.fromkeys(("entropy", "grad_entropy"))
    shape = functools.partial(launch.block_shape, narrow=narrow)
    return Case(row_backward_kernel, {**none, "KIND": kind, "PEEL": peel}, shape)


def _mass(kind: Any = IDENTITY, peel: bool = False) -> Case:
    return Case(column_mass_kernel, {"KIND": kind, "PEEL": peel}, launch.mass_shape)


def _probs(kind: Any = IDENTITY, wide: bool = True) -> Case:
    return Case(column_probs_kernel, {"KIND": kind, "WIDE": wide}, _tile(launch.GATHER_TILE))


def _gradient(kind: Any = IDENTITY, wide: bool = True) -> Case:
    return Case(compact_gradient_kernel, {"KIND": kind, "WIDE": wide}, _tile(launch.GRADIENT_TILE))


def _tile(tile: tuple[int, int]) -> Callable[[int, int], dict[str, int]]:
    return lambda item_size, _: launch.tile_shape(tile, item_size)


CASES = {
    "forward": _forward(),
    "forward, odd V": _forward(peel=True),
    "forward, scale": _forward(SCALE),
    "forward, softcap": _forward(SOFTCAP),
    "forward, all stats": _forward(stats=True),
    "forward, all stats, odd V, split": _forward(stats=True, peel=True, split=True),
    "forward, all stats, softcap, odd V": _forward(SOFTCAP, stats=True, peel=True),
    "backward": _backward(),
    "backward, odd V": _backward(peel=True),
    "backward, scale": _backward(SCALE),
    "backward, softcap": _backward(SOFTCAP),
    "backward, entropy": _backward(entropy=True),
    "backward, entropy, softcap, odd V": _backward(SOFTCAP, entropy=True, peel=True),
    "backward, out aligned otherwise": _backward(narrow=True),
    "combine": Case(row_combine_kernel, {"KIND": IDENTITY, "SPLITS": launch.MAX_SPLITS}, warps=launch.COMBINE_WARPS),
    "mass": _mass(),
    "mass, odd V": _mass(peel=True),
    "mass, scale": _mass(SCALE),
    "mass, softcap, odd V": _mass(SOFTCAP, peel=True),
    "probs": _probs(),
    "probs, softcap": _probs(SOFTCAP),
    "probs, odd n": _probs(wide=False),
    "compact gradient": _gradient(),
    "compact gradient, softcap": _gradient(SOFTCAP),
    "compact gradient, odd n": _gradient(wide=False),
    "sums": Case(sequence_sums_kernel, {"BLOCK": launch.SEQUENCE_BLOCK}),
    "pair": Case(pair_sigmoid_kernel, {"BLOCK": launch.SEQUENCE_BLOCK}),
    "pair, no reference": Case(pair_sigmoid_kernel, {"BLOCK": launch.SEQUENCE_BLOCK, "ref_logps": None}),
}
# Those that are compiled for fp16 and fp32 too
OTHER_DTYPES = ("forward, all stats", "backward, entropy", "mass, odd V", "probs", "compact gradient")


def compile_kernel(case: Case, target: GPUTarget, dtype: str = "bf16") -> Any:
    """Triton's compiled kernel for logits of `dtype` ("bf16", "fp16", "fp32")."""
    constants = case.constants | _shape(case, target, dtype)
    names = case.kernel.arg_names
    signature = {name: "constexpr" if name in constants else _type(name, dtype) for name in names}
    values = {(names.index(name),): getattr(value, "value", value) for name, value in constants.items()}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in _ALIGNED if name in names}
    source = ASTSource(case.kernel, signature, constexprs=values, attrs=aligned)
    return triton.compile(source, target=target, options={"num_warps": case.warps, "enable_fp_fusion": False})


def _shape(case: Case, target: GPUTarget, dtype: str) -> dict[str, int]:
    return {} if case.shape is None else case.shape(_BYTES[dtype], target.warp_size)


def _type(name: str, dtype: str) -> str:
    if name in _LOGITS:
        return f"*{dtype}"
    if name in _INT64:
        return "i64"
    if name in _INT32:
        return "i32"
    return "fp32" if name in _FLOAT else _POINTERS.get(name, "*fp32")


def measure(case: Case, target: GPUTarget, dtype: str = "bf16") -> dict[str, Any]:
    """registers, spills, shared; where there are logits (or their P): widest_load, widest_store (bits) and, on NVIDIA,
    instructions_per_logit: of the main loop, without the branch that only the target's block takes, or of all."""
    compiled = compile_kernel(case, target, dtype)
    found = {"shared": compiled.metadata.shared}
    shape = _shape(case, target, dtype)
    if case.kernel is column_probs_kernel:
        found["lanes_along_columns"] = _lanes_along_columns(compiled, shape)
    if target.backend == "hip":
        return found | _read_amd(compiled, bool(shape))
    threads = case.warps * target.warp_size
    block = shape.get("BLOCK") or shape.get("COLS", 0) * shape.get("ROWS", shape.get("TOKENS", 0))
    return found | _read_nvidia(compiled, block // threads)


def _lanes_along_columns(compiled: Any, shape: dict[str, int]) -> int:
    """How many lanes of a warp read neighbouring kept columns of one row: one column each, or it is 0."""
    text = compiled.asm["ttgir"]
    (name,) = set(re.findall(rf"tt\.load .*tensor<{shape['TOKENS']}x{shape['COLS']}x.*?(#\w+)>", text))
    layout = re.search(rf"^{name} = .*sizePerThread = \[1, 1\], threadsPerWarp = \[\d+, (\d+)\]", text, re.M)
    return int(layout[1]) if layout else 0


# --- NVIDIA ----------------------------------------------------------------------------------------------------------


def sass(compiled: Any) -> str:
    """The machine code's disassembly, resource usage first."""
    tool = os.path.join(triton.__path__[0], "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [tool, "-sass", "-res-usage", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stderr + done.stdout


def _read_nvidia(compiled: Any, logits: int) -> dict[str, Any]:
    """logits: that a thread holds at once; 0: the kernel has none."""
    text = sass(compiled)
    registers = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert registers, "cuobjdump printed no resource usage"
    instructions = [(int(at, 16), op) for at, op in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*?)\s*;", text)]
    local = sum("LDL" in op or "STL" in op for _, op in instructions)
    found: dict[str, Any] = {"registers": int(registers[1]), "spills": max(int(registers[2]), local)}
    if logits:
        loop = _main_loop(instructions) or _straight(instructions)
        found |= {
            "widest_load": _widest(loop, "LDG.E"),
            "widest_store": _widest(loop, "STG.E"),
            "instructions_per_logit": round(len(loop) / logits, 2),  # a thread's
        }
    return found


def _main_loop(instructions: list[tuple[int, str]]) -> list[str]:
    """The loop that loads most from global memory, in the widest loads if there are several, as the blocks without the
    target run it: where a forward branch inside it may be taken, it is."""
    best: list[str] = []
    for at, op in instructions:
        branch = re.search(r"BRA(?:\.\w+)*\s+(?:!?U?P\w+,\s*)?(0x[0-9a-f]+)", op)
        if branch and int(branch[1], 16) < at:
            body = [(a, o) for a, o in instructions if int(branch[1], 16) <= a <= at]
            taken = _taken(body)
            best = max(best, taken, key=_loads)
    return best


def _loads(ops: list[str]) -> tuple[int, int]:
    """Loads from global memory: the widest, and all."""
    loads = [op for op in ops if "LDG" in op]
    return sum(".128" in op for op in loads), len(loads)


def _straight(instructions: list[tuple[int, str]]) -> list[str]:
    """All of a kernel without a loop: what follows the last exit is padding."""
    ops = [op for _, op in instructions]
    return ops[: max(i for i, op in enumerate(ops) if "EXIT" in op)]


def _taken(body: list[tuple[int, str]]) -> list[str]:
    path, skip_to = [], 0
    for at, op in body:
        if at < skip_to:
            continue
        path.append(op)
        branch = re.search(r"BRA(?:\.\w+)*\s+(?:!?U?P\w+,\s*)?(0x[0-9a-f]+)", op)
        if branch and at < int(branch[1], 16) <= body[-1][0]:
            skip_to = int(branch[1], 16)
    return path


def _widest(ops: list[str], kind: str) -> int:
    names = [word for op in ops for word in op.split() if word.startswith(kind)]
    bits = {".128": 128, ".64": 64, ".U16": 16, ".U8": 8}
    return max((next((b for suffix, b in bits.items() if suffix in n), 32) for n in names), default=0)


# --- AMD -------------------------------------------------------------------------------------------------------------


def _read_amd(compiled: Any, logits: bool) -> dict[str, Any]:
    text = compiled.asm["amdgcn"]

    def number(name: str) -> int:
        return max((int(n) for n in re.findall(rf"\.{name}:\s*(\d+)", text)), default=0)

    found = {"registers": number("vgpr_count"), "spills": number("vgpr_spill_count") + number("sgpr_spill_count")}
    if logits:
        widths = {"dwordx4": 128, "dwordx2": 64, "dword ": 32, "short": 16, "ushort": 16}
        for key, kind in (("widest_load", "load"), ("widest_store", "store")):
            names = re.findall(rf"(?:global|buffer)_{kind}_(\w+ )", text)
            found[key] = max((bits for n in names for w, bits in widths.items() if n.startswith(w.strip())), default=0)
    return found


def main() -> None:
    runs = [(name, "bf16", arch) for name in CASES for arch in TARGETS]
    runs += [(name, dtype, "sm_90") for name in OTHER_DTYPES for dtype in ("fp16", "fp32")]
    for name, dtype, arch in runs:
        found = {"kernel": name, "dtype": dtype, "target": arch, **measure(CASES[name], TARGETS[arch], dtype)}
        sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
