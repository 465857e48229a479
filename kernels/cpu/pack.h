// The packed right-hand side that brgemm takes: pairs of k side by side.
#pragma once

#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace fastdpo {

// hidden [n, H] -> hidden.T as [H/2, padded, 2], zeros beyond n; H even
inline std::vector<c10::BFloat16> pack_hidden(const c10::BFloat16* hidden, int64_t n, int64_t width, int64_t padded) {
  std::vector<c10::BFloat16> packed(width * padded, c10::BFloat16(0));
  at::parallel_for(0, width / 2, 16, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k)
      for (int64_t i = 0; i < n; ++i)
        std::copy_n(hidden + i * width + 2 * k, 2, packed.data() + (k * padded + i) * 2);
  });
  return packed;
}

// Rows of weight as brgemm's left-hand side: bf16 as they lie, float32 rounded into `scratch`. Returns [rows, H] and
// the distance of its rows.
template <typename W>
std::pair<const c10::BFloat16*, int64_t> weight_rows(
    const W* weight, int64_t stride, int64_t rows, int64_t width, std::vector<c10::BFloat16>& scratch) {
  if constexpr (std::is_same_v<W, c10::BFloat16>) {
    return {weight, stride};
  } else {
    scratch.resize(rows * width);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t k = 0; k < width; ++k)
        scratch[r * width + k] = c10::BFloat16(weight[r * stride + k]);
    return {scratch.data(), width};
  }
}

}  // namespace fastdpo
