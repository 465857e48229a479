"""The Triton kernels of TRL, Liger and CCE as they launch them, compiled for GPUs that are not here.

`launches(contender, pass, V, target)` are the kernels that do one pass over the logits; `measure(launch, target)` is
what fastdpo.gpu.machine_code reads of one. Arguments are specialised as Triton does at a launch: tensors lie on 16
bytes, integers of 1 are constants, multiples of 16 are known to be.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import triton
from fastdpo.gpu import machine_code
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TRL_CHUNK = 32768  # columns a tile, of trl.trainer.utils
TRL_BLOCK = 1024
ROWS = 4096  # tokens of a launch, where a kernel takes their number


class Launch(NamedTuple):
    kernel: Any  # a JITFunction
    arguments: dict[str, Any]  # "*bf16": a tensor; a number; None; constexprs
    block: int  # logits a program holds at once; 0: none of its own, it multiplies matrices
    warps: int = 4
    stages: int | None = None  # None: the target's default
    stores: bool | None = None  # which of the kernel's loops is meant: the one that stores, or the one that does not
    columns: float = 1.0  # the share of the logits that it is run on


def measure(launch: Launch, target: GPUTarget) -> dict[str, Any]:
    """As machine_code.read."""
    kernel = launch.kernel
    constants = {p.name for p in kernel.params if p.is_constexpr}
    signature, values, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        value = launch.arguments[name]
        if name in constants or value is None or (value == 1 and isinstance(value, int)):
            signature[name], values[(i,)] = "constexpr", value
            continue
        signature[name] = value if isinstance(value, str) else "fp32" if isinstance(value, float) else "i32"
        if isinstance(value, str) or (isinstance(value, int) and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    options = {"num_warps": launch.warps} | ({} if launch.stages is None else {"num_stages": launch.stages})
    source = ASTSource(kernel, signature, constexprs=values, attrs=attributes)
    return machine_code.read(triton.compile(source, target=target, options=options), launch.block, launch.stores)


# --- TRL 1.16 --------------------------------------------------------------------------------------------------------


def trl_chunked(vocab: int, kernel: str, softcap: bool = False, **flags: bool) -> list[Launch]:
    """trl.kernels.chunked_logprob, which its DPO trainer runs on tiles of 32,768 columns: the last may be odd."""
    from trl.kernels import chunked_logprob

    def launch(width: int, columns: int) -> Launch:
        arguments = {name: "*fp32" for name in function.arg_names} | {
            "mm_ptr": "*bf16",
            "mm_stride": TRL_CHUNK,
            "targets_ptr": "*i64",
            "vocab_start": 0,
            "n_cols": width,
            "logit_scale": 1.0,
            "softcap": 30.0 if softcap else 1.0,
            "inv_t": 1.0,
            "HAS_SOFTCAP": softcap,
            "BLOCK_SIZE": TRL_BLOCK,
            **flags,
        }
        return Launch(function, arguments, TRL_BLOCK, columns=columns / vocab)

    function = getattr(chunked_logprob, kernel)
    whole, rest = vocab // TRL_CHUNK * TRL_CHUNK, vocab % TRL_CHUNK
    return [launch(width, columns) for width, columns in ((TRL_CHUNK, whole), (rest, rest)) if columns]


def trl_forward(vocab: int, target: GPUTarget, stats: str = "", softcap: bool = False) -> list[Launch]:
    """stats: of ENTROPY, MEAN_LOGITS, IS_TOP1, LOG_SUM_SQ_PROBS."""
    names = ("ENTROPY", "LOG_SUM_SQ_PROBS", "MEAN_LOGITS", "IS_TOP1")
    return trl_chunked(vocab, "_forward_kernel", softcap, **{f"HAS_{name}": name in stats.split() for name in names})


def trl_backward(vocab: int, target: GPUTarget, entropy: bool = False, softcap: bool = False) -> list[Launch]:
    return trl_chunked(vocab, "_backward_kernel", softcap, HAS_LOGPROB_GRAD=True, HAS_ENTROPY_GRAD=entropy)


def trl_selective(
    vocab: int, target: GPUTarget, kernel: str = "_forward_kernel", entropy: bool = False
) -> list[Launch]:
    """trl.kernels.logprob_entropy: from logits in memory, always with the entropy."""
    from trl.kernels import logprob_entropy

    function = getattr(logprob_entropy, kernel)
    known: dict[str, Any] = {
        "logits_ptr": "*bf16",
        "grad_logits_ptr": "*bf16",
        "index_ptr": "*i64",
        "row_mask_ptr": "*i64",
        "logits_batch_stride": 0,
        "logits_row_stride": vocab,
        "index_batch_stride": 0,
        "index_row_stride": 1,
        "mask_batch_stride": 0,
        "mask_row_stride": 0,
        "grad_logits_batch_stride": ROWS * vocab,
        "grad_logits_row_stride": vocab,
        "n_cols": vocab,
        "rows_per_batch": ROWS,
        "TEMPERATURE": 1.0,
        "HAS_MASK": False,
        "BLOCK_SIZE": TRL_BLOCK,
        "HAS_LOGPROB_GRAD": True,
        "HAS_ENTROPY_GRAD": entropy,
    }
    return [Launch(function, {name: known.get(name, "*fp32") for name in function.arg_names}, TRL_BLOCK)]


def trl_selective_backward(vocab: int, target: GPUTarget, entropy: bool = False) -> list[Launch]:
    return trl_selective(vocab, target, "_backward_kernel", entropy)


# --- Liger 0.8.5 -----------------------------------------------------------------------------------------------------


def liger(
    vocab: int,
    target: GPUTarget,
    gradients: bool = False,
    softcap: bool = False,
    reduction: str = "none",
    fused_linear: bool = False,
) -> list[Launch]:
    """liger_kernel.ops.cross_entropy, one kernel: a loop for the loss, and with gradients a loop over them."""
    from liger_kernel.ops.cross_entropy import MAX_FUSED_SIZE, liger_cross_entropy_kernel

    block = min(MAX_FUSED_SIZE, triton.next_power_of_2(vocab))
    warps = 16 if target.backend == "hip" else 8 if target.arch == 100 and not fused_linear else 32
    arguments = {
        "X_ptr": "*bf16",
        "X_stride": vocab,
        "Y_ptr": "*i64",
        "Y_stride": 1,
        "weight_ptr": None,
        "loss_ptr": "*fp32" if fused_linear else "*bf16",
        "z_loss_ptr": None,
        "loss_stride": 1,
        "token_accuracy_ptr": None,
        "token_accuracy_stride": 0,
        "predicted_tokens_ptr": None,
        "predicted_tokens_stride": 0,
        "n_cols": vocab,
        "n_non_ignore": ROWS - 1,
        "sum_non_ignore_weight": ROWS - 1,
        "weight_sum": 0.0,
        "ignore_index": -100,
        "lse_square_scale": 0.0,
        "label_smoothing": 0.0,
        "reduction": reduction,
        "softcap": 30.0 if softcap else None,
        "RETURN_Z_LOSS": False,
        "RETURN_TOKEN_ACCURACY": False,
        "RETURN_PREDICTED_TOKENS": False,
        "BLOCK_SIZE": block,
        "HAS_WEIGHT": False,
        "HAS_SOFTCAPPING": softcap,
        "HAS_GRADIENTS": gradients,
    }
    return [Launch(liger_cross_entropy_kernel, arguments, block, warps, stores=gradients)]


def liger_selective(vocab: int, target: GPUTarget) -> list[Launch]:
    """liger_kernel.ops.grpo_loss: token log-probabilities from logits, without a gradient."""
    from liger_kernel.ops.grpo_loss import _selective_log_softmax_kernel

    arguments = {
        "LOGITS": "*bf16",
        "INPUT_IDS": "*i64",
        "LOG_P": "*fp32",
        "MASK": None,
        "TEMPERATURE": 1.0,
        "stride_input_ids_b": ROWS,
        "stride_input_ids_l": 1,
        "stride_mask_b": 0,
        "stride_mask_l": 0,
        "L": ROWS,
        "N": vocab,
        "BLOCK_N": 2048,
    }
    return [Launch(_selective_log_softmax_kernel, arguments, 2048, warps=1, stages=4)]


# --- CCE 25.1.1 ------------------------------------------------------------------------------------------------------


def cce(vocab: int, target: GPUTarget, kernel: str = "forward") -> list[Launch]:
    """cut_cross_entropy: hidden times head inside the kernel, hidden of 2,048."""
    from cut_cross_entropy import cce_backward, cce_lse_forward, indexed_dot, tl_autotune

    function, config = {
        "forward": (cce_lse_forward._cce_lse_forward_kernel, tl_autotune._cce_forward_best_config()),
        "target": (indexed_dot._indexed_neg_dot_forward_kernel, tl_autotune._indexed_dot_best_config()),
        "backward": (cce_backward._cce_backward_kernel, tl_autotune._cce_backward_best_config()),
    }[kernel]
    while not hasattr(function, "arg_names") or not hasattr(function, "params"):  # below its heuristics
        function = function.fn
    hidden = 2048
    tensors = {
        "E": "*bf16",
        "C": "*bf16",
        "dE": "*bf16",
        "dC": "*bf16",
        "dOut": "*bf16",
        "LSE": "*fp32",
        "Out": "*fp32",
    }
    tensors |= {"Locks": "*u32", "dELocks": "*i32", "dCLocks": "*i32", "Targets": "*i64", "Inds": "*i64"}
    tensors |= dict.fromkeys(("LA", "Valids", "VocabOrdering", "softcap"))
    numbers = {"B": ROWS, "V": vocab, "D": hidden, "B_BIN": 1024, "grad_scale": 1.0, "filter_eps": 2.0**-12}
    numbers |= {"stride_eb": hidden, "stride_cv": hidden, "num_locks": ROWS // 128}
    numbers |= dict.fromkeys(("stride_ed", "stride_cd", "stride_lse_b", "stride_vb", "stride_ib"), 1)
    numbers |= {"n_de_locks_0": ROWS // 32, "n_de_locks_1": 32, "n_dc_locks_0": vocab // 32, "n_dc_locks_1": 32}
    flags = dict.fromkeys(("HAS_VALIDS", "HAS_VOCAB_ORDERING", "HAS_SOFTCAP", "HAS_LA", "SHIFT", "ITEM_DO"), False)
    flags |= dict.fromkeys(("EVEN_D", "MM_BACK_EVEN_D", "FILTER_GRAD", "HAS_TARGETS", "REQUIRES_GRAD"), True)
    blocks = {**config.kwargs, "GROUP_B": 8, "DOT_PRECISION": "ieee"}
    blocks["MM_BACK_BLOCK_D"] = 2 * config.kwargs["BLOCK_D"]
    known: dict[str, Any] = {**tensors, **numbers, **flags, **blocks}
    arguments = {name: known[name] for name in function.arg_names}
    return [Launch(function, arguments, 0, config.num_warps, config.num_stages)]


# --- all -------------------------------------------------------------------------------------------------------------

_Builder = Callable[..., list[Launch]]
# (contender, pass) -> what makes its launches, and with which options
PEERS: dict[tuple[str, str], tuple[_Builder, dict[str, Any]]] = {
    ("TRL chunked", "forward"): (trl_forward, {}),
    ("TRL chunked", "forward, DPO metrics"): (trl_forward, {"stats": "ENTROPY MEAN_LOGITS IS_TOP1"}),
    ("TRL chunked", "forward, all statistics"): (
        trl_forward,
        {"stats": "ENTROPY MEAN_LOGITS IS_TOP1 LOG_SUM_SQ_PROBS"},
    ),
    ("TRL chunked", "forward, softcap"): (trl_forward, {"softcap": True}),
    ("TRL chunked", "backward"): (trl_backward, {}),
    ("TRL chunked", "backward, entropy"): (trl_backward, {"entropy": True}),
    ("TRL chunked", "backward, softcap"): (trl_backward, {"softcap": True}),
    ("TRL from logits", "forward"): (trl_selective, {}),
    ("TRL from logits", "backward"): (trl_selective_backward, {}),
    ("TRL from logits", "backward, entropy"): (trl_selective_backward, {"entropy": True}),
    ("Liger CE", "forward"): (liger, {}),
    ("Liger CE", "forward, softcap"): (liger, {"softcap": True}),
    ("Liger CE", "backward"): (liger, {"gradients": True}),
    ("Liger CE", "backward, softcap"): (liger, {"gradients": True, "softcap": True}),
    ("Liger CE, mean", "forward"): (liger, {"reduction": "mean"}),
    ("Liger CE, mean", "backward"): (liger, {"gradients": True, "reduction": "mean"}),
    ("Liger fused linear CE", "forward"): (liger, {"fused_linear": True}),
    ("Liger fused linear CE", "backward"): (liger, {"gradients": True, "fused_linear": True}),
    ("Liger selective", "forward"): (liger_selective, {}),
    ("CCE", "forward, with its product"): (cce, {"kernel": "forward"}),
    ("CCE", "target's logit, with its product"): (cce, {"kernel": "target"}),
    ("CCE", "backward, with its products"): (cce, {"kernel": "backward"}),
}


def launches(contender: str, name: str, vocab: int, target: GPUTarget) -> list[Launch]:
    """The kernels of a pass over `vocab` columns; their `columns` sum to 1."""
    build, options = PEERS[contender, name]
    return build(vocab, target, **options)
