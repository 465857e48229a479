// logps[i] = z[i, y] - lse[i], and the statistics, for logits [N, V]. Each logit is read once from memory: V * 2 bytes
// a row in bf16.
//
// Base 2 throughout: x = z * log2(e). The sum runs over 2^(x_v - m) with the target's x as m, a bound that costs
// nothing: logp = -ln(sum). Should a block of columns overflow it (some x_v far above m), m becomes that block's maximum
// and the block, still in cache, is done again.

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels.h"
#include "simd.h"
#include "transform.h"

namespace fastdpo {
namespace {

constexpr int64_t kBlock = 4096;  // columns; float32 sums run over one block, double over the row
// A block's sum beyond this is done again from a new m: far below float's 2^128, and its root for the sum of squares
template <bool kStats>
constexpr double kOverflow = kStats ? 0x1p60 : 0x1p120;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Sums over columns with e = 2^(x - m): s = sum e, ex = sum e (x - m), ee = sum e^2, total = sum core(raw).
// top: the largest raw logit (or the smallest, negated, under a negative scale): exact, so that ties are.
struct Sums {
  double s = 0, ex = 0, ee = 0, total = 0;
  float top = -kInfinity;

  void add(const Sums& o) {
    s += o.s;
    ex += o.ex;
    ee += o.ee;
    total += o.total;
  }
  // m grows by `delta`
  void rescale(double delta) {
    const double factor = std::exp2(-delta);
    ex = s == 0 ? 0 : factor * (ex - delta * s);
    s *= factor;
    ee *= factor * factor;
  }
};

template <typename T, bool kSoftcap>
float block_max(const T* row, int64_t n, const Base2<kSoftcap>& base2) {
  int64_t v = 0;
  F vtop(-kInfinity);
  for (; v + kStep <= n; v += kStep) {
    const F2 raw = load2(row + v);
    const F a = base2.core(raw.a) * F(base2.factor), b = base2.core(raw.b) * F(base2.factor);
    vtop = at::vec::maximum(vtop, at::vec::maximum(a, b));
  }
  float top = max(vtop);
  for (; v < n; ++v)
    top = std::max(top, float(base2.core(double(row[v])) * base2.factor));
  return top;
}

template <typename T, bool kSoftcap, bool kStats>
Sums block_sums(const T* row, int64_t n, const Base2<kSoftcap>& base2, float m) {
  const float sign = base2.in < 0 ? -1.f : 1.f;
  const F shift(m), factor(base2.factor), signs(sign), floor(-200.f);  // 2^-200 is 0 in float, and 0 * -200 is 0 where 0 * -inf is not
  F s0(0.f), s1(0.f), ex0(0.f), ex1(0.f), ee0(0.f), ee1(0.f), t0(0.f), t1(0.f);
  F top(-kInfinity);
  int64_t v = 0;
  const auto step = [&](F raw, F& s, F& ex, F& ee, F& total) {
    const F core = base2.core(raw);
    F x = at::vec::fmsub(core, factor, shift);
    if constexpr (kStats) {
      total = total + core;
      top = at::vec::maximum(top, raw * signs);
      x = at::vec::maximum(x, floor);
    }
    const F e = exp2(x);
    s = s + e;
    if constexpr (kStats) {
      ex = at::vec::fmadd(e, x, ex);
      ee = at::vec::fmadd(e, e, ee);
    }
  };
  for (; v + kStep <= n; v += kStep) {
    const F2 raw = load2(row + v);
    step(raw.a, s0, ex0, ee0, t0);
    step(raw.b, s1, ex1, ee1, t1);
  }
  Sums sums;
  sums.s = sum(s0 + s1);
  if constexpr (kStats) {
    sums.ex = sum(ex0 + ex1);
    sums.ee = sum(ee0 + ee1);
    sums.total = sum(t0 + t1);
    sums.top = max(top);
  }
  for (; v < n; ++v) {
    const double core = base2.core(double(row[v]));
    const double x = std::max(core * base2.factor - m, -200.), e = std::exp2(x);
    sums.s += e;
    sums.ex += e * x;
    sums.ee += e * e;
    sums.total += core;
    sums.top = std::max(sums.top, sign * float(row[v]));
  }
  return sums;
}

template <typename T, bool kSoftcap, bool kStats>
void one_row(const T* row, int64_t vocab, int64_t y, const Base2<kSoftcap>& base2, const RowResults& out, int64_t i) {
  const bool elsewhere = y >= vocab;  // on another rank: its logit counts as 0
  const double x_y = elsewhere ? 0. : base2.core(double(row[y])) * base2.factor;
  // A target of -inf (or NaN) bounds nothing; any finite start will do, the first block corrects it
  float m = std::isfinite(x_y) ? float(x_y) : 0.f;
  bool any = !elsewhere && std::isfinite(x_y);  // m is a term of the sum, or a maximum of one seen
  Sums sums;
  int64_t top_start = 0;  // the first block that holds the row's maximum
  for (int64_t start = 0; start < vocab; start += kBlock) {
    const int64_t n = std::min(kBlock, vocab - start);
    if (!any) {
      const float top = block_max<T, kSoftcap>(row + start, n, base2);
      if (std::isfinite(top)) {
        m = top;
        any = true;
      }
    }
    Sums block = block_sums<T, kSoftcap, kStats>(row + start, n, base2, m);
    if (!(block.s < kOverflow<kStats>)) {
      const float top = block_max<T, kSoftcap>(row + start, n, base2);
      if (std::isfinite(top) && top > m) {
        sums.rescale(double(top) - m);
        m = top;
        block = block_sums<T, kSoftcap, kStats>(row + start, n, base2, m);
      }
    }
    sums.add(block);
    if (block.top > sums.top) {
      sums.top = block.top;
      top_start = start;
    }
  }
  const double log2_s = std::log2(sums.s);
  // The large parts go through factor's own rounding, log2_s is a true logarithm of ratios
  out.logps[i] = float(base2.to_natural(x_y - m) - kLn2 * log2_s);
  out.lse[i] = float(base2.to_natural(m) + kLn2 * log2_s);
  if constexpr (kStats) {
    // H = lse - sum p z, both with m taken off
    out.entropy[i] = float(kLn2 * (log2_s - sums.ex / sums.s));
    out.mean_logits[i] = float(base2.unit * sums.total / double(vocab));
    out.log_sum_sq_probs[i] = float(kLn2 * (std::log2(sums.ee) - 2 * log2_s));
    // The first maximum counts: none equal to it before y, which only its block can hold
    const T target = elsewhere ? T(NAN) : row[y];
    const float sign = base2.in < 0 ? -1.f : 1.f;
    out.is_top1[i] = sign * float(target) == sums.top && y - top_start < kBlock &&
        std::none_of(row + top_start, row + y, [&](T other) { return other == target; });
  }
}

template <typename T, bool kSoftcap, bool kStats>
void all_rows(const Rows& logits, const int64_t* targets, const Transform& transform, const RowResults& out) {
  const Base2<kSoftcap> base2(transform);
  at::parallel_for(0, logits.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (targets[i] >= 0) {
        one_row<T, kSoftcap, kStats>(logits.row<T>(i), logits.vocab, targets[i], base2, out, i);
        continue;
      }
      out.logps[i] = out.lse[i] = 0;
      if constexpr (kStats) {
        out.entropy[i] = out.mean_logits[i] = out.log_sum_sq_probs[i] = 0;
        out.is_top1[i] = false;
      }
    }
  });
}

template <typename T>
void dispatch(const Rows& logits, const int64_t* targets, const Transform& t, const RowResults& out) {
  const bool stats = out.entropy != nullptr;
  const auto run = t.softcap ? (stats ? all_rows<T, true, true> : all_rows<T, true, false>)
                             : (stats ? all_rows<T, false, true> : all_rows<T, false, false>);
  run(logits, targets, t, out);
}

}  // namespace

void row_forward(
    c10::ScalarType dtype, const Rows& logits, const int64_t* targets, const Transform& t, const RowResults& out) {
  if (dtype == c10::ScalarType::BFloat16)
    dispatch<c10::BFloat16>(logits, targets, t, out);
  else if (dtype == c10::ScalarType::Half)
    dispatch<c10::Half>(logits, targets, t, out);
  else
    dispatch<float>(logits, targets, t, out);
}

}  // namespace fastdpo
