// The packed right-hand side that brgemm takes, pairs of k side by side: [K, N] as [K/2, N, 2].
#pragma once

#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

namespace fastdpo {

// Rows a and b [n] -> [n, 2]
inline void interleave(const c10::BFloat16* a, const c10::BFloat16* b, int64_t n, c10::BFloat16* out) {
  auto* pairs = reinterpret_cast<uint32_t*>(out);
  for (int64_t i = 0; i < n; ++i)
    pairs[i] = uint32_t(a[i].x) | uint32_t(b[i].x) << 16;
}

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

// A row of weight in bf16: as it lies, or float32 rounded into `scratch`
template <typename W>
const c10::BFloat16* bf16_row(const W* row, int64_t width, c10::BFloat16* scratch) {
  if constexpr (std::is_same_v<W, c10::BFloat16>) {
    return row;
  } else {
    std::copy_n(row, width, scratch);
    return scratch;
  }
}

// Rows of weight as brgemm's left-hand side: [rows, H] and the distance of its rows
template <typename W>
std::pair<const c10::BFloat16*, int64_t> weight_rows(
    const W* weight, int64_t stride, int64_t rows, int64_t width, std::vector<c10::BFloat16>& scratch) {
  if constexpr (std::is_same_v<W, c10::BFloat16>) {
    return {weight, stride};
  } else {
    scratch.resize(rows * width);
    for (int64_t r = 0; r < rows; ++r)
      bf16_row(weight + r * stride, width, scratch.data() + r * width);
    return {scratch.data(), width};
  }
}

}  // namespace fastdpo
