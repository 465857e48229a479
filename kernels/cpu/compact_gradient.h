// Gradient of the kept logits from their probabilities P [k, n] (columns x tokens, SIMD over tokens):
//
//   D[c, i] = dz/draw * g_i * (1[column c = y_i] - P[c, i]),   g = d/dlogp
//
// Under a softcap dz/draw = slope * (1 - tanh^2), with tanh from z = ln P + lse.
#pragma once

#include <algorithm>
#include <cmath>

#include "kernels.h"
#include "simd.h"

namespace fastdpo {

struct CompactGradient {
  const RowGrads& grads;
  bool softcap;
  double slope, per_z;

  CompactGradient(const RowGrads& g, const Transform& t)
      : grads(g),
        softcap(t.softcap.has_value()),
        slope(t.logit_scale / t.temperature),
        per_z(softcap ? t.temperature / *t.softcap : 0) {}

  // One column, without its targets: probs [n], tokens from `first` of the gradients on -> out [n]
  template <typename T>
  void column(const T* probs, int64_t first, int64_t n, T* out) const {
    const float *g = grads.grad_logps + first, *lse = grads.lse + first;
    int64_t i = 0;
    for (; i + kStep <= n; i += kStep)
      store2(out + i, value(load2(probs + i), load2(g + i), load2(lse + i)));
    if (i < n) {
      T tail[kStep] = {};
      float tail_g[kStep] = {}, tail_lse[kStep] = {};
      std::copy_n(probs + i, n - i, tail);
      std::copy_n(g + i, n - i, tail_g);
      std::copy_n(lse + i, n - i, tail_lse);
      store2(tail, value(load2(tail), load2(tail_g), load2(tail_lse)));
      std::copy_n(tail, n - i, out + i);
    }
  }

  // One entry of token i, which is not its target
  float entry(float p, int64_t i) const {
    const float grad = float(-slope) * grads.grad_logps[i] * p;
    if (!softcap)
      return grad;
    const float tanh = std::clamp((std::log(p) + grads.lse[i]) * float(per_z), -1.f, 1.f);
    return grad * (1.f - tanh * tanh);
  }

  // Of token i's own target: the saved logp is exact, P is rounded
  float target(int64_t i) const {
    const double logp = grads.logps[i], tanh = (logp + grads.lse[i]) * per_z;
    return float(slope * grads.grad_logps[i] * -std::expm1(logp) * (1 - tanh * tanh));
  }

 private:
  F2 value(F2 p, F2 g, F2 lse) const {
    return {value(p.a, g.a, lse.a), value(p.b, g.b, lse.b)};
  }

  F value(F p, F g, F lse) const {
    const F grad = p * g * F(float(-slope));
    if (!softcap)
      return grad;
    const F z = at::vec::maximum(p, F(1e-38f)).log() + lse;
    const F tanh = at::vec::clamp(z * F(float(per_z)), F(-1.f), F(1.f));
    return grad * (F(1.f) - tanh * tanh);
  }
};

}  // namespace fastdpo
