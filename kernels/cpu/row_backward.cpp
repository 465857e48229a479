// Gradient (gradient.h) of the raw logits [N, W], columns vocab_start .. vocab_start+W-1 of the vocabulary, possibly in
// place. Each logit is read once and each gradient written once.

#include <ATen/Parallel.h>

#include <cstring>

#include "gradient.h"
#include "kernels.h"
#include "simd.h"

namespace fastdpo {
namespace {

template <typename T, bool kSoftcap, bool kEntropy>
void all_rows(
    const Rows& logits, const int64_t* targets, const RowGrads& grads, const Transform& t, int64_t vocab_start,
    const Rows& out) {
  const Gradient<kSoftcap, kEntropy> gradient(grads, t);
  const int64_t width = logits.vocab;
  at::parallel_for(0, logits.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T* in = logits.row<T>(i);
      T* to = out.row<T>(i);
      if (targets[i] < 0) {
        std::memset(static_cast<void*>(to), 0, width * sizeof(T));
        continue;
      }
      const auto [lse2, minus_g, minus_h_ln2, minus_h_H] = gradient.row(i);
      const GradientRow<F> row{F(lse2), F(minus_g), F(minus_h_ln2), F(minus_h_H)};
      int64_t v = 0;
      for (; v + kStep <= width; v += kStep) {
        const F2 raw = load2(in + v);
        store2(to + v, F2{gradient(raw.a, row), gradient(raw.b, row)});
      }
      if (v < width) {
        T tail[kStep] = {};
        std::memcpy(static_cast<void*>(tail), in + v, (width - v) * sizeof(T));
        const F2 raw = load2(tail);
        store2(tail, F2{gradient(raw.a, row), gradient(raw.b, row)});
        std::memcpy(static_cast<void*>(to + v), tail, (width - v) * sizeof(T));
      }
      const int64_t y = targets[i] - vocab_start;
      if (y >= 0 && y < width)
        to[y] = T(gradient.target(i));
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
