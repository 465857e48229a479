"""Compile the kernels for GPUs that are not here, and read what came out: registers, spills, widths, instructions.

    python -m fastdpo.gpu.compile_offline            one JSON line a kernel and target

Needs Triton and no GPU; not to be run with TRITON_INTERPRET=1, under which no kernel is compiled.
"""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import launch, machine_code
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

_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
_FLAGS = {"ENTROPY": "entropy", "MEAN": "mean_logits", "TOP1": "is_top1", "SQUARES": "log_sum_sq_probs"}
_ALL = tuple(_FLAGS)


class Case(NamedTuple):
    kernel: Any
    constants: dict[str, Any]  # constexprs, and the arguments that are None
    shape: Callable[[int, int], dict[str, int]] | None = None  # of a block of logits, from item size and warp size
    warps: int = launch.WARPS


def _forward(kind: Any = IDENTITY, stats: tuple[str, ...] = (), peel: bool = False, split: bool = False) -> Case:
    none = dict.fromkeys(name for flag, name in _FLAGS.items() if flag not in stats)
    none |= {} if split else {"partials": None}
    constants = {**none, **{flag: flag in stats for flag in _FLAGS}, "KIND": kind, "PEEL": peel}
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
    "forward, DPO metrics": _forward(stats=_ALL[:3]),  # what TRL's DPO trainer asks for
    "forward, all stats": _forward(stats=_ALL),
    "forward, all stats, odd V, split": _forward(stats=_ALL, peel=True, split=True),
    "forward, all stats, softcap, odd V": _forward(SOFTCAP, stats=_ALL, peel=True),
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
    """As machine_code.read."""
    compiled = compile_kernel(case, target, dtype)
    shape = _shape(case, target, dtype)
    block = shape.get("BLOCK") or shape.get("COLS", 0) * shape.get("ROWS", shape.get("TOKENS", 0))
    found = machine_code.read(compiled, block)
    if case.kernel is column_probs_kernel:
        found["lanes_along_columns"] = _lanes_along_columns(compiled, shape)
    return found


def _lanes_along_columns(compiled: Any, shape: dict[str, int]) -> int:
    """How many lanes of a warp read neighbouring kept columns of one row: one column each, or it is 0."""
    text = compiled.asm["ttgir"]
    (name,) = set(re.findall(rf"tt\.load .*tensor<{shape['TOKENS']}x{shape['COLS']}x.*?(#\w+)>", text))
    layout = re.search(rf"^{name} = .*sizePerThread = \[1, 1\], threadsPerWarp = \[\d+, (\d+)\]", text, re.M)
    return int(layout[1]) if layout else 0


def main() -> None:
    runs = [(name, "bf16", arch) for name in CASES for arch in TARGETS]
    runs += [(name, dtype, "sm_90") for name in OTHER_DTYPES for dtype in ("fp16", "fp32")]
    for name, dtype, arch in runs:
        found = {"kernel": name, "dtype": dtype, "target": arch, **measure(CASES[name], TARGETS[arch], dtype)}
        sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
