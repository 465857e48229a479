// The gradient of a range of logits straight from hidden states: z.T is streamed as in stream.cpp, in float32, and what
// leaves the cache is D.T [w, n], bf16, for the library's products dX += D @ W and dW = D.T @ X.

#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>

#include "gradient.h"
#include "pack.h"
#include "simd.h"
#include "stream.h"

namespace fastdpo {
namespace {

using c10::BFloat16;

constexpr int64_t kRows = 32;  // rows of weight a product
constexpr int64_t kTokens = 256;  // tokens a product: [32, 256] float32 stays in cache
constexpr int64_t kChunk = 256;  // rows of weight a task

template <typename W, bool kSoftcap, bool kEntropy>
void run(const StreamInputs& in, const RowGrads& grads, int64_t first, int64_t last, BFloat16* out) {
  const Gradient<kSoftcap, kEntropy> gradient(grads, in.transform);
  const W* weight = static_cast<const W*>(in.weight);
  for (int64_t t0 = 0; t0 < in.n; t0 += kTokens) {
    const int64_t n = std::min(kTokens, in.n - t0), padded = (n + kStep - 1) / kStep * kStep;
    const auto packed = pack_hidden(in.hidden + t0 * in.width, n, in.width, padded);
    std::vector<float> numbers[4];
    for (auto& values : numbers)
      values.assign(padded, 0.f);
    for (int64_t i = 0; i < n; ++i) {
      const auto row = gradient.row(t0 + i);
      numbers[0][i] = row.lse2;
      numbers[1][i] = row.minus_g;
      numbers[2][i] = row.minus_h_ln2;
      numbers[3][i] = row.minus_h_H;
    }
    const auto rows_at = [&](int64_t i) {
      return GradientRow<F>{
          F::loadu(numbers[0].data() + i), F::loadu(numbers[1].data() + i), F::loadu(numbers[2].data() + i),
          F::loadu(numbers[3].data() + i)};
    };
    const int64_t chunks = (last - first + kChunk - 1) / kChunk;
    at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> logits(kRows * padded);
      std::vector<BFloat16> scratch, tail(kStep);
      const int64_t stop = std::min(last, first + end * kChunk);
      for (int64_t v = first + begin * kChunk; v < stop; v += kRows) {
        const int64_t rows = std::min(kRows, stop - v);
        const auto [block, stride] = weight_rows(weight + v * in.weight_stride, in.weight_stride, rows, in.width, scratch);
        at::native::cpublas::brgemm(
            rows, padded, in.width, stride, padded, padded, false, block, packed.data(), logits.data(), true);
        for (int64_t r = 0; r < rows; ++r) {
          const F bias(in.bias ? in.bias[v + r] : 0.f);
          const float* raw = logits.data() + r * padded;
          BFloat16* to = out + (v + r - first) * in.n + t0;
          for (int64_t i = 0; i < padded; i += kStep) {
            const F2 value{
                gradient(F::loadu(raw + i) + bias, rows_at(i)),
                gradient(F::loadu(raw + i + kLanes) + bias, rows_at(i + kLanes))};
            if (i + kStep <= n) {
              store2(to + i, value);
            } else {
              store2(tail.data(), value);
              std::copy_n(tail.data(), n - i, to + i);
            }
          }
        }
      }
      at::native::cpublas::brgemm_release(true);
    });
  }
  for (int64_t i = 0; i < in.n; ++i)
    if (in.targets[i] >= first && in.targets[i] < last)
      out[(in.targets[i] - first) * in.n + i] = BFloat16(gradient.target(i));
}

template <typename W>
void dispatch(const StreamInputs& in, const RowGrads& grads, int64_t first, int64_t last, BFloat16* out) {
  const bool entropy = grads.grad_entropy != nullptr;
  const auto function = in.transform.softcap ? (entropy ? run<W, true, true> : run<W, true, false>)
                                             : (entropy ? run<W, false, true> : run<W, false, false>);
  function(in, grads, first, last, out);
}

}  // namespace

void stream_gradient(const StreamInputs& in, const RowGrads& grads, int64_t first, int64_t last, BFloat16* out) {
  (in.float_weight ? dispatch<float> : dispatch<BFloat16>)(in, grads, first, last, out);
}

}  // namespace fastdpo
