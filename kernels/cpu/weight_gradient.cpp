// total[slots] += D @ X, D bf16 [k, n] the gradient of the kept logits, X bf16 [n, H] the tile's hidden states: the rows
// of dW that a tile touches. float32 from the products to the sum: dW is rounded once, by the caller.

#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <vector>

#include "kernels.h"
#include "simd.h"

namespace fastdpo {

constexpr int64_t kBlockRows = 32;  // [32, H] float32 stays in the second cache

void add_weight_gradient(
    float* total, const int64_t* slots, const c10::BFloat16* grad, const c10::BFloat16* hidden, int64_t k, int64_t n,
    int64_t width) {
  std::vector<c10::BFloat16> packed(n * width);  // pairs of tokens: [n/2, H, 2]
  at::parallel_for(0, n / 2, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t h = 0; h < width; ++h) {
        packed[(i * width + h) * 2] = hidden[2 * i * width + h];
        packed[(i * width + h) * 2 + 1] = hidden[(2 * i + 1) * width + h];
      }
  });
  const int64_t blocks = (k + kBlockRows - 1) / kBlockRows;
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> product(kBlockRows * width);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b * kBlockRows, rows = std::min(kBlockRows, k - first);
      at::native::cpublas::brgemm(
          rows, width, n, n, width, width, false, grad + first * n, packed.data(), product.data(), true);
      for (int64_t r = 0; r < rows; ++r) {
        float* to = total + slots[first + r] * width;
        const float* from = product.data() + r * width;
        int64_t h = 0;
        for (; h + kLanes <= width; h += kLanes)
          (F::loadu(to + h) + F::loadu(from + h)).store(to + h);
        for (; h < width; ++h)
          to[h] += from[h];
      }
    }
    at::native::cpublas::brgemm_release(true);
  });
}

}  // namespace fastdpo
