// Logits from 8-bit products, at twice the speed of bf16's, for the columns that cannot matter.
//
//     x = sx (q + ex),  w = sw (p + ew),  |ex|, |ew| <= 1/2  ->  z = sx sw (q . p) with an error of variance
//     sigma^2 = (sx^2 |w|^2 + sw^2 |x|^2) / 12
//
// if the errors do not conspire with the other factor (they are roundings, and are taken as independent of it).
//
// A column whose screened logit stays 3 sigma below the threshold for every token is summed as it is: its share of lse
// is off by e^(sigma^2/2) on average, which is taken off, and by sigma of a share below the threshold. Every other column
// is computed again, exactly.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "simd.h"

namespace fastdpo {

constexpr int64_t kScreenWidth = 32768;  // H beyond this could overflow the 32-bit sums
constexpr int64_t kScreenVocab = 16384;  // with fewer columns an error of their mean could be seen, and little is spared
constexpr float kMostSigma = 0.5f;  // in units of x; a column of more is computed exactly

// Largest |v| and sum v^2 of a row
template <typename T>
std::pair<float, float> extent(const T* row, int64_t width) {
  F most_a(0.f), most_b(0.f), sum_a(0.f), sum_b(0.f);
  int64_t k = 0;
  for (; k + kStep <= width; k += kStep) {
    const F2 v = load2(row + k);
    most_a = larger(v.a.abs(), most_a);
    most_b = larger(v.b.abs(), most_b);
    sum_a = at::vec::fmadd(v.a, v.a, sum_a);
    sum_b = at::vec::fmadd(v.b, v.b, sum_b);
  }
  float most = max(larger(most_a, most_b)), squares = sum(sum_a + sum_b);
  for (; k < width; ++k) {
    most = std::max(most, std::abs(float(row[k])));
    squares += float(row[k]) * float(row[k]);
  }
  return {most, squares};
}

#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512BF16__)
// 32 elements a step: |v| orders as its bits do, and a NaN above all
inline std::pair<float, float> extent(const c10::BFloat16* row, int64_t width) {
  const __m512i magnitude = _mm512_set1_epi16(0x7fff);
  __m512i most = _mm512_setzero_si512();
  __m512 squares = _mm512_setzero_ps();
  const auto add = [&](__m512i v) {
    most = _mm512_max_epu16(most, _mm512_and_si512(v, magnitude));
    squares = _mm512_dpbf16_ps(squares, reinterpret_cast<const __m512bh&>(v), reinterpret_cast<const __m512bh&>(v));
  };
  int64_t k = 0;
  for (; k + 32 <= width; k += 32)
    add(_mm512_loadu_si512(row + k));
  if (k < width)
    add(_mm512_maskz_loadu_epi16((__mmask32(1) << (width - k)) - 1, row + k));
  uint16_t bits[32];
  _mm512_storeu_si512(bits, most);
  return {float(c10::BFloat16(*std::max_element(bits, bits + 32), c10::BFloat16::from_bits())), _mm512_reduce_add_ps(squares)};
}
#endif

// round(v / scale) + offset of each element, as bytes
template <typename T>
void to_bytes(const T* row, int64_t width, float inverse, int32_t offset, uint8_t* out) {
  int64_t k = 0;
#if defined(CPU_CAPABILITY_AVX512)
  const __m512 factor = _mm512_set1_ps(inverse);
  const __m512i shift = _mm512_set1_epi32(offset);
  const auto bytes = [&](__m512 v) {
    return _mm512_cvtepi32_epi8(_mm512_add_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(v, factor)), shift));
  };
  for (; k + kStep <= width; k += kStep) {
    const F2 v = load2(row + k);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + k), bytes(v.a));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + k + 16), bytes(v.b));
  }
#endif
  for (; k < width; ++k)
    out[k] = uint8_t(int32_t(std::nearbyint(float(row[k]) * inverse)) + offset);
}

// A tile's tokens as the right-hand side, four k side by side
struct Screen {
  int64_t depth = 0;  // H, up to a multiple of 4; 0: no screening
  std::vector<int8_t> packed;  // [depth/4, padded, 4]
  std::vector<float> scale;  // [padded] sx
  std::vector<int32_t> offset;  // [padded] 128 sum_k q: weight's bytes are shifted by 128
  double scale2 = 0, squares = 0;  // largest sx^2 and |x|^2: for sigma
  double mean_scale2 = 0, mean_squares = 0;

  Screen() = default;

  Screen(const c10::BFloat16* hidden, int64_t n, int64_t width, int64_t padded)
      : depth((width + 3) / 4 * 4), packed(depth * padded, 0), scale(padded, 0.f), offset(padded, 0) {
    std::vector<uint8_t> bytes(depth, 0);
    for (int64_t i = 0; i < n; ++i) {
      const auto [most, row_squares] = extent(hidden + i * width, width);
      scale[i] = most / 127;
      // A NaN knows no order: of an infinite error every column is computed exactly
      scale2 = std::isfinite(most) ? std::max(scale2, double(scale[i]) * scale[i]) : INFINITY;
      squares = std::max(squares, double(row_squares));
      mean_scale2 += double(scale[i]) * scale[i] / double(n);
      mean_squares += double(row_squares) / double(n);
      to_bytes(hidden + i * width, width, most > 0 ? 127 / most : 0, 0, bytes.data());
      for (int64_t k = 0; k < depth; ++k) {
        const auto q = int8_t(bytes[k]);
        packed[(k / 4 * padded + i) * 4 + k % 4] = q;
        offset[i] += 128 * q;
      }
    }
  }

  // Of a column: sigma for the token of the largest, and sigma^2 for the mean one
  std::pair<float, float> error(float column_scale, float column_squares) const {
    const double s2 = double(column_scale) * column_scale, w2 = column_squares;
    return {
        float(std::sqrt((scale2 * w2 + s2 * squares) / 12)), float((mean_scale2 * w2 + s2 * mean_squares) / 12)};
  }
};

}  // namespace fastdpo
