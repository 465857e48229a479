// Two vectors of floats at a time from float32, bf16 or fp16 memory, and exp2.
// at::vec where it is enough (any CPU that PyTorch knows); AVX-512 by hand where an instruction does more.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <cstdint>

namespace fastdpo {

using F = at::vec::Vectorized<float>;
constexpr int64_t kLanes = F::size();
constexpr int64_t kStep = 2 * kLanes;  // elements that load2 and store2 move

struct F2 {
  F a, b;
};

#if defined(CPU_CAPABILITY_AVX512)

// 2^x for x < 128, relative error below 3e-7; 2^-inf = 0. f = x - floor(x) in [0, 1), then p(f) * 2^floor(x):
// vreduceps and vscalefps do the two outer steps, infinities and underflow included.
inline F exp2(F x) {
  const __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF);
  __m512 p = _mm512_set1_ps(1.8775767e-3f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(8.9893397e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5826318e-2f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4015361e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9315308e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.9999994e-1f));
  return _mm512_scalef_ps(p, x);
}

inline F2 load2(const float* p) {
  return {_mm512_loadu_ps(p), _mm512_loadu_ps(p + 16)};
}
inline F2 load2(const c10::Half* p) {
  return {
      _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))),
      _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 16)))};
}
inline F2 load2(const c10::BFloat16* p) {
  const auto half = [](const c10::BFloat16* q) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(q)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  };
  return {half(p), half(p + 16)};
}

inline void store2(float* p, F2 x) {
  _mm512_storeu_ps(p, x.a);
  _mm512_storeu_ps(p + 16, x.b);
}
inline void store2(c10::Half* p, F2 x) {
  constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x.a, nearest));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 16), _mm512_cvtps_ph(x.b, nearest));
}
inline void store2(c10::BFloat16* p, F2 x) {
#if defined(__AVX512BF16__)
  const __m512bh packed = _mm512_cvtne2ps_pbh(x.b, x.a);
  _mm512_storeu_si512(p, reinterpret_cast<const __m512i&>(packed));
#else
  at::vec::convert_from_float<c10::BFloat16>(x.a, x.b).store(p);
#endif
}

// One instruction where at::vec::maximum takes four: if either is NaN the result is b
inline F larger(F a, F b) {
  return _mm512_max_ps(a, b);
}

#else

inline F larger(F a, F b) {
  return at::vec::maximum(a, b);
}

// As above by at::vec: n = round(x), 2^n through the exponent bits. Below the normal range it is 0; above it, large
// enough for every caller to notice, as infinity is.
inline F exp2(F given) {
  const F x = at::vec::clamp(given, F(-126.f), F(127.f));
  const F n = x.round();
  const F f = x - n;
  F p(1.5403530e-4f);
  p = at::vec::fmadd(p, f, F(1.3333558e-3f));
  p = at::vec::fmadd(p, f, F(9.6181291e-3f));
  p = at::vec::fmadd(p, f, F(5.5504109e-2f));
  p = at::vec::fmadd(p, f, F(2.4022651e-1f));
  p = at::vec::fmadd(p, f, F(6.9314718e-1f));
  p = at::vec::fmadd(p, f, F(1.f));
  const auto exponent = at::vec::convert_to_int_of_same_size(n) + at::vec::Vectorized<int32_t>(127);
  const F result = p * at::vec::cast<float>(exponent << at::vec::Vectorized<int32_t>(23));
  return F::blendv(result, F(0.f), given < F(-126.f));
}

inline F2 load2(const float* p) {
  return {F::loadu(p), F::loadu(p + kLanes)};
}
template <typename T>
inline F2 load2(const T* p) {
  const auto [a, b] = at::vec::convert_to_float<T>(at::vec::Vectorized<T>::loadu(p));
  return {a, b};
}
inline void store2(float* p, F2 x) {
  x.a.store(p);
  x.b.store(p + kLanes);
}
template <typename T>
inline void store2(T* p, F2 x) {
  at::vec::convert_from_float<T>(x.a, x.b).store(p);
}

#endif

inline float sum(F x) {
  return at::vec::vec_reduce_all<float>([](F a, F b) { return a + b; }, x);
}
inline float max(F x) {
  return at::vec::vec_reduce_all<float>([](F a, F b) { return at::vec::maximum(a, b); }, x);
}

}  // namespace fastdpo
