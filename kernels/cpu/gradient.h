// d(g logp + h H) / d(raw logit), for a row's logit vectors or for a vector of rows:
//
//   dz_j/draw_j * (g 1[j = y] - p_j (g + h (log p_j + H))),   g = d/dlogp, h = d/dentropy, p = exp(z - lse)
#pragma once

#include <cmath>

#include "kernels.h"
#include "simd.h"
#include "transform.h"

namespace fastdpo {

// A row's numbers, as the vector formula wants them
template <typename Real>
struct GradientRow {
  Real lse2, minus_g, minus_h_ln2, minus_h_H;
};

template <bool kSoftcap, bool kEntropy>
struct Gradient {
  const RowGrads& grads;
  Base2<kSoftcap> base2;
  double from_z;  // tanh = z * from_z under a softcap

  Gradient(const RowGrads& g, const Transform& t)
      : grads(g), base2(t), from_z(t.softcap ? t.temperature / *t.softcap : 0) {}

  // lse in base 2 rounds to a float; what that loses is one number for the whole row: a factor of p, a summand of H
  GradientRow<float> row(int64_t i) const {
    const float g = grads.grad_logps ? grads.grad_logps[i] : 0.f;
    const float h = kEntropy ? grads.grad_entropy[i] : 0.f, entropy = kEntropy ? grads.entropy[i] : 0.f;
    const double exact = base2.from_natural(grads.lse[i]), lost = double(float(exact)) - exact;
    const double scale = std::exp2(lost) * (kSoftcap ? 1 : base2.slope);
    return {
        float(exact), float(-g * scale), float(-h * scale * kLn2), float(-h * scale * (entropy + kLn2 * lost))};
  }

  // without the target's term: -dz/draw p (g + h (ln2 x + H)) with x = log2 p
  F operator()(F raw, const GradientRow<F>& row) const {
    const F core = base2.core(raw);
    F x = at::vec::fmsub(core, F(base2.factor), row.lse2), weight = row.minus_g;
    if constexpr (kEntropy) {
      x = at::vec::maximum(x, F(-200.f));  // p = 0 there, and 0 * -inf is not 0
      weight = at::vec::fmadd(x, row.minus_h_ln2, row.minus_g + row.minus_h_H);
    }
    if constexpr (kSoftcap)
      weight = weight * F(base2.slope) * (F(1.f) - core * core);
    return exp2(x) * weight;
  }

  // The target's own gradient, from the saved logp: in place, its logit may be overwritten by now
  float target(int64_t i) const {
    const double g = grads.grad_logps ? grads.grad_logps[i] : 0, h = kEntropy ? grads.grad_entropy[i] : 0;
    const double logp = grads.logps[i], p = std::exp(logp), tanh = (logp + grads.lse[i]) * from_z;
    const double from_entropy = kEntropy && p > 0 ? h * p * (logp + grads.entropy[i]) : 0;
    return float(base2.slope * (1 - tanh * tanh) * (-g * std::expm1(logp) - from_entropy));
  }
};

}  // namespace fastdpo
