// Gradient of the raw logits [N, W], columns vocab_start .. vocab_start+W-1 of the vocabulary, possibly in place. Each
// logit is read once and each gradient written once.
//
//   out_j = dz_j/draw_j * (g 1[j = y] - p_j (g + h (log p_j + H))),   g = d/dlogp, h = d/dentropy, p = exp(z - lse)

#include <ATen/Parallel.h>

#include <cstring>

#include "kernels.h"
#include "simd.h"
#include "transform.h"

namespace fastdpo {
namespace {

template <bool kSoftcap, bool kEntropy>
struct Gradient {
  Base2<kSoftcap> base2;
  F factor, lse2, minus_g, minus_h_ln2, minus_h_H;

  // lse in base 2 rounds to a float; what that loses is one number for the whole row: a factor of p, a summand of H
  Gradient(const Base2<kSoftcap>& b, float lse, float entropy, float g, float h) : base2(b), factor(b.factor) {
    const double exact = b.from_natural(lse), lost = double(float(exact)) - exact;
    const double scale = std::exp2(lost) * (kSoftcap ? 1 : b.slope);
    lse2 = F(float(exact));
    minus_g = F(float(-g * scale));
    minus_h_ln2 = F(float(-h * scale * kLn2));
    minus_h_H = F(float(-h * scale * (entropy + kLn2 * lost)));
  }

  // without the target's term g: -dz/draw p (g + h (ln2 x + H)) with x = log2 p
  F operator()(F raw) const {
    const F core = base2.core(raw);
    F x = at::vec::fmsub(core, factor, lse2), weight = minus_g;
    if constexpr (kEntropy) {
      x = at::vec::maximum(x, F(-200.f));  // p = 0 there, and 0 * -inf is not 0
      weight = at::vec::fmadd(x, minus_h_ln2, minus_g + minus_h_H);
    }
    if constexpr (kSoftcap)
      weight = weight * F(base2.slope) * (F(1.f) - core * core);
    return exp2(x) * weight;
  }
};

template <typename T, bool kSoftcap, bool kEntropy>
void all_rows(
    const Rows& logits, const int64_t* targets, const RowGrads& grads, const Transform& t, int64_t vocab_start,
    const Rows& out) {
  const Base2<kSoftcap> base2(t);
  const int64_t width = logits.vocab;
  const double scale = t.logit_scale / t.temperature;
  at::parallel_for(0, logits.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T* in = logits.row<T>(i);
      T* to = out.row<T>(i);
      if (targets[i] < 0) {
        std::memset(static_cast<void*>(to), 0, width * sizeof(T));
        continue;
      }
      const float g = grads.grad_logps ? grads.grad_logps[i] : 0.f;
      const float h = kEntropy ? grads.grad_entropy[i] : 0.f;
      const float entropy = kEntropy ? grads.entropy[i] : 0.f;
      const Gradient<kSoftcap, kEntropy> gradient(base2, grads.lse[i], entropy, g, h);
      int64_t v = 0;
      for (; v + kStep <= width; v += kStep) {
        const F2 raw = load2(in + v);
        store2(to + v, F2{gradient(raw.a), gradient(raw.b)});
      }
      if (v < width) {
        T tail[kStep] = {};
        std::memcpy(static_cast<void*>(tail), in + v, (width - v) * sizeof(T));
        const F2 raw = load2(tail);
        store2(tail, F2{gradient(raw.a), gradient(raw.b)});
        std::memcpy(static_cast<void*>(to + v), tail, (width - v) * sizeof(T));
      }
      const int64_t y = targets[i] - vocab_start;
      if (y >= 0 && y < width) {
        // The target's logit may be overwritten by now: take p and tanh from the saved logp
        const double logp = grads.logps[i], p = std::exp(logp);
        double slope = scale;
        if (kSoftcap) {
          const double tanh = (logp + grads.lse[i]) * t.temperature / *t.softcap;
          slope *= 1 - tanh * tanh;
        }
        const double from_entropy = p > 0 ? h * p * (logp + entropy) : 0;
        to[y] = T(float(slope * (g * (1 - p) - from_entropy)));
      }
    }
  });
}

template <typename T>
void dispatch(
    const Rows& logits, const int64_t* targets, const RowGrads& grads, const Transform& t, int64_t vocab_start,
    const Rows& out) {
  const bool entropy = grads.grad_entropy != nullptr;
  const auto run = t.softcap ? (entropy ? all_rows<T, true, true> : all_rows<T, true, false>)
                             : (entropy ? all_rows<T, false, true> : all_rows<T, false, false>);
  run(logits, targets, grads, t, vocab_start, out);
}

}  // namespace

void row_backward(
    c10::ScalarType dtype, const Rows& logits, const int64_t* targets, const RowGrads& grads, const Transform& t,
    int64_t vocab_start, const Rows& out) {
  if (dtype == c10::ScalarType::BFloat16)
    dispatch<c10::BFloat16>(logits, targets, grads, t, vocab_start, out);
  else if (dtype == c10::ScalarType::Half)
    dispatch<c10::Half>(logits, targets, grads, t, vocab_start, out);
  else
    dispatch<float>(logits, targets, grads, t, vocab_start, out);
}

}  // namespace fastdpo
