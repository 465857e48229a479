// D [k, n] of a whole tile: compact_gradient.h for every column.

#include "compact_gradient.h"

#include <ATen/Parallel.h>

namespace fastdpo {
namespace {

template <typename T>
void run(
    const T* probs, int64_t k, int64_t n, const int32_t* columns, const int64_t* targets,
    const CompactGradient& gradient, T* out) {
  at::parallel_for(0, k, 64, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c)
      gradient.column(probs + c * n, 0, n, out + c * n);
  });
  for (int64_t i = 0; i < n; ++i) {
    const auto column = std::lower_bound(columns, columns + k, targets[i]);
    if (column != columns + k && *column == targets[i])
      out[(column - columns) * n + i] = T(gradient.target(i));
  }
}

}  // namespace

void compact_gradient(
    c10::ScalarType dtype, const void* probs, int64_t k, int64_t n, const int32_t* columns, const int64_t* targets,
    const RowGrads& grads, const Transform& t, void* out) {
  const CompactGradient gradient(grads, t);
  const auto call = [&](auto type) {
    using T = decltype(type);
    run<T>(static_cast<const T*>(probs), k, n, columns, targets, gradient, static_cast<T*>(out));
  };
  if (dtype == c10::ScalarType::BFloat16)
    call(c10::BFloat16{});
  else if (dtype == c10::ScalarType::Half)
    call(c10::Half{});
  else
    call(float{});
}

}  // namespace fastdpo
