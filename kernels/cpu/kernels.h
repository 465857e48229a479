// What the kernel files offer to bindings.cpp. Symbols as in fastdpo/eager.py, the specification:
// z = softcap * tanh(raw * logit_scale / softcap) / temperature, y the target, p = softmax(z), lse = logsumexp(z).
#pragma once

#include <c10/core/ScalarType.h>
#include <c10/util/BFloat16.h>

#include <cstdint>
#include <optional>

namespace fastdpo {

// Logits [G, R, V]: row i of G*R stands at (i / R) * group_stride + (i % R) * row_stride elements.
struct Rows {
  void* data;
  int64_t count, rows_per_group, group_stride, row_stride, vocab;

  template <typename T>
  T* row(int64_t i) const {
    return static_cast<T*>(data) + (i / rows_per_group) * group_stride + (i % rows_per_group) * row_stride;
  }
};

struct Transform {
  double logit_scale;
  std::optional<double> softcap;
  double temperature;
};

// Each float [N] (is_top1: bool [N]); the last four null: not computed.
struct RowResults {
  float *logps, *lse, *entropy, *mean_logits, *log_sum_sq_probs;
  bool* is_top1;
};

// Each float [N]; grad_logps or grad_entropy may be null, entropy where grad_entropy is.
struct RowGrads {
  const float *logps, *lse, *entropy, *grad_logps, *grad_entropy;
};

// A target of V is on another rank: its logit counts as 0.
void row_forward(c10::ScalarType, const Rows&, const int64_t* targets, const Transform&, const RowResults&);

void row_backward(
    c10::ScalarType,
    const Rows& logits,
    const int64_t* targets,
    const RowGrads&,
    const Transform&,
    int64_t vocab_start,
    const Rows& out);

// probs [k, n] of the ascending columns -> out [k, n], the gradient of those logits, transposed
void compact_gradient(
    c10::ScalarType,
    const void* probs,
    int64_t k,
    int64_t n,
    const int32_t* columns,
    const int64_t* targets,
    const RowGrads&,
    const Transform&,
    void* out);

void sequence_sums(const float* values, const int64_t* bounds, int64_t sequences, float* sums);

void pair_sigmoid(
    const float* logps,
    const int64_t* bounds,
    const float* ref_logps,
    int64_t pairs,
    double beta,
    double label_smoothing,
    float* loss,
    float* sums,
    float* slope);

}  // namespace fastdpo
