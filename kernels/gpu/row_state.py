"""The running state of a row's sums: absorb a block of logits, merge states.

In base 2, each lane with a maximum of its own: exp2(z * log2e - ref) is one FMA and one exp2. Lanes meet once, at the
end, and so do the programs of a row, by the same function.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .row_math import LOG2_OF_ZERO, LOG2E, NO_MAX

# A state: (m, ref, s, t, q, a, earlier), each [LANES]
#   m        maximum of z                           ref  m * log2e, rounded: what the exponents below are relative to
#   s        sum e, e = exp2(z * log2e - ref)       t    sum e * log2 e         q  sum e^2        a  sum z
#   earlier  maximum of z over the columns before the target
STATE = tl.constexpr(7)


@triton.jit
def absorb(state, z, counted, before, ENTROPY: tl.constexpr, MEAN: tl.constexpr, SQUARES: tl.constexpr):
    """The state after the block z [K, LANES, VEC]; padded logits are -inf. counted, before: masks of z or None."""
    m, ref, s, t, q, a, earlier = state
    m = tl.maximum(m, lane_max(z))
    new = m * LOG2E
    # All -inf so far: any finite reference makes each exp2 below 0, and -inf - -inf would be NaN
    safe = tl.where(m == NO_MAX, 0.0, new)
    d = tl.fma(z, LOG2E, -safe[None, :, None])
    e = tl.exp2(d)
    shift = ref - safe
    shrink = tl.exp2(shift)
    if ENTROPY:
        # sum e (d + shift) = t + shift * s: the sum so far, relative to the new reference
        moved = tl.fma(s, tl.maximum(shift, LOG2_OF_ZERO), t)
        t = tl.fma(moved, shrink, lane_sum(e * tl.maximum(d, LOG2_OF_ZERO)))
    if SQUARES:
        q = tl.fma(q, shrink * shrink, lane_sum(e * e))
    if MEAN:
        if counted is None:
            a += lane_sum(z)
        else:
            a += lane_sum(tl.where(counted, z, 0.0))
    s = tl.fma(s, shrink, lane_sum(e))
    if before is not None:
        earlier = tl.maximum(earlier, lane_max(tl.where(before, z, NO_MAX)))
    return m, new, s, t, q, a, earlier


@triton.jit
def lane_max(z):
    return tl.max(tl.max(z, 2), 0)


@triton.jit
def lane_sum(z):
    return tl.sum(tl.sum(z, 2), 0)


@triton.jit
def merged(state):
    """One scalar state from a vector of them: lanes, or the programs of a row."""
    m, ref, s, t, q, a, earlier = state
    ref_max = tl.max(ref, 0)
    shift = ref - tl.where(ref_max == NO_MAX, 0.0, ref_max)
    shrink = tl.exp2(shift)
    t = tl.sum(tl.fma(s, tl.maximum(shift, LOG2_OF_ZERO), t) * shrink, 0)
    q = tl.sum(q * shrink * shrink, 0)
    return tl.max(m, 0), ref_max, tl.sum(s * shrink, 0), t, q, tl.sum(a, 0), tl.max(earlier, 0)
