// Gradient of the kept logits from their probabilities P [k, n] (columns x tokens, SIMD over tokens):
//
//   out[c, i] = dz/draw * g_i * (1[column c = y_i] - P[c, i]),   g = d/dlogp
//
// Under a softcap dz/draw = slope * (1 - tanh^2), with tanh from z = ln P + lse.

#include <ATen/Parallel.h>

#include <algorithm>

#include "kernels.h"
#include "simd.h"
#include "transform.h"

namespace fastdpo {
namespace {

template <typename T>
void run(
    const T* probs, int64_t k, int64_t n, const int32_t* columns, const int64_t* targets, const RowGrads& grads,
    const Transform& t, T* out) {
  const double slope = t.logit_scale / t.temperature, per_z = t.softcap ? t.temperature / *t.softcap : 0;
  const F factor{static_cast<float>(-slope)}, scale{static_cast<float>(per_z)}, one{1.f};
  const auto value = [&](F p, F g, F lse) {
    const F grad = p * g * factor;
    if (!t.softcap)
      return grad;
    const F tanh = at::vec::clamp((at::vec::maximum(p, F(1e-38f)).log() + lse) * scale, F(-1.f), one);
    return grad * (one - tanh * tanh);
  };
  at::parallel_for(0, k, 64, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      int64_t i = 0;
      for (; i + kStep <= n; i += kStep) {
        const F2 p = load2(probs + c * n + i), g = load2(grads.grad_logps + i), lse = load2(grads.lse + i);
        store2(out + c * n + i, F2{value(p.a, g.a, lse.a), value(p.b, g.b, lse.b)});
      }
      if (i < n) {
        T tail[kStep] = {};
        float g[kStep] = {}, lse[kStep] = {};
        std::copy_n(probs + c * n + i, n - i, tail);
        std::copy_n(grads.grad_logps + i, n - i, g);
        std::copy_n(grads.lse + i, n - i, lse);
        const F2 p = load2(tail), g2 = load2(g), lse2 = load2(lse);
        store2(tail, F2{value(p.a, g2.a, lse2.a), value(p.b, g2.b, lse2.b)});
        std::copy_n(tail, n - i, out + c * n + i);
      }
    }
  });
  for (int64_t i = 0; i < n; ++i) {
    const auto column = std::lower_bound(columns, columns + k, targets[i]);
    if (column == columns + k || *column != targets[i])
      continue;
    const double logp = grads.logps[i], tanh = (logp + grads.lse[i]) * per_z;  // the saved logp is exact, P is rounded
    const double grad = slope * grads.grad_logps[i] * -std::expm1(logp) * (1 - tanh * tanh);
    out[(column - columns) * n + i] = T(float(grad));
  }
}

}  // namespace

void compact_gradient(
    c10::ScalarType dtype, const void* probs, int64_t k, int64_t n, const int32_t* columns, const int64_t* targets,
    const RowGrads& grads, const Transform& t, void* out) {
  const auto call = [&](auto type) {
    using T = decltype(type);
    run<T>(static_cast<const T*>(probs), k, n, columns, targets, grads, t, static_cast<T*>(out));
  };
  if (dtype == c10::ScalarType::BFloat16)
    call(c10::BFloat16{});
  else if (dtype == c10::ScalarType::Half)
    call(c10::Half{});
  else
    call(float{});
}

}  // namespace fastdpo
