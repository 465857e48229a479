"""What the row kernels share: the transform of a logit, where a row's aligned part lies, constants.

    z = raw                                      IDENTITY: scale/temperature = 1, no softcap
    z = raw * outer                              SCALE:    outer = scale / temperature
    z = outer * tanh(raw * inner)                SOFTCAP:  outer = softcap / temperature, inner = scale / softcap

A block of logits is seen as [K, LANES, VEC]: each lane (thread) holds K vectors of VEC logits, 16 bytes each. Reducing
over K and VEC stays within a thread: no shuffle and no barrier in a main loop.
"""

from __future__ import annotations

import triton
import triton.language as tl

IDENTITY = tl.constexpr(0)
SCALE = tl.constexpr(1)
SOFTCAP = tl.constexpr(2)

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NO_MAX = tl.constexpr(float("-inf"))
# Stands for log2 p where p is 0, in p * log2 p: exp2 of it is 0 in float32, and 0 * -inf would be NaN
LOG2_OF_ZERO = tl.constexpr(-200.0)


@triton.jit
def tanh(x):
    """x * P(x^2) / Q(x^2), within a few ulp for every x.

    The [9/8] quotient whose largest relative error (2e-8) is the least on |x| <= 9.02; beyond, tanh is 1 in float32.
    Against 1 - 2 / (1 + exp(2x)) it keeps small x accurate, and spends one special-function operation instead of two:
    a GPU issues 8 FMAs for each of those.
    """
    x = tl.minimum(tl.maximum(x, -9.02, propagate_nan=tl.PropagateNan.ALL), 9.02, propagate_nan=tl.PropagateNan.ALL)
    y = x * x
    p = tl.fma(y, 1.3318898815277032e-08, 2.058335285903766e-05)
    p = tl.fma(p, y, 3.4940267066868344e-03)
    p = tl.fma(p, y, 0.1337971135057126)
    p = tl.fma(p, y, 0.9999999790353976)
    q = tl.fma(y, 7.761947413010251e-07, 3.283080008907433e-04)
    q = tl.fma(q, y, 2.5871043369163446e-02)
    q = tl.fma(q, y, 0.4671302659681494)
    q = tl.fma(q, y, 1.0)
    # q is in [1, 600]; q^-1/2 squared is as near as a division is (2 ulp), in 3 instructions for its 8
    r = tl.rsqrt(q)
    return x * p * (r * r)


@triton.jit
def transformed(raw, inner, outer, KIND: tl.constexpr):
    """(z, tanh(raw * inner)) of float32 logits; without softcap the second is the first."""
    if KIND == SOFTCAP:
        t = tanh(raw * inner)
        return t * outer, t
    if KIND == SCALE:
        z = raw * outer
        return z, z
    return raw, raw


@triton.jit
def row_start(row, rows, stride_g, stride_r):
    """Offset of row i = group * rows + r. int64: N*V passes 2^31 on real work."""
    group = row // rows
    return group.to(tl.int64) * stride_g + (row - group * rows).to(tl.int64) * stride_r


@triton.jit
def aligned_part(pointer, width, PEEL: tl.constexpr, VEC: tl.constexpr):
    """(head, body): the row's first `head` logits lie before its first 16-byte boundary, `body` fill whole vectors.

    Fewer than VEC logits follow. With odd V almost every row starts off the boundary, and unaligned rows would be read
    2 bytes at a time.
    """
    if PEEL:
        ELEMENT: tl.constexpr = 16 // VEC
        head = (((16 - pointer.to(tl.int64) % 16) % 16) // ELEMENT).to(tl.int32)
        head = tl.minimum(head, width)
        return head, (width - head) // VEC * VEC
    else:
        return 0, width // VEC * VEC


@triton.jit
def edge_columns(head, body, width, LANES: tl.constexpr, VEC: tl.constexpr):
    """Columns (and which count) of the logits before and after the aligned part: one a lane, at most 2*VEC-2."""
    lane = tl.arange(0, LANES)
    columns = tl.where(lane < VEC, lane, head + body + lane - VEC)
    return columns, ((lane < head) | (lane >= VEC)) & (columns < width)
