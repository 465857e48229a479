// torch.ops.fastdpo_cpu.*: tensors to pointers. Shapes and values were checked by fastdpo's Python; here only what
// would read out of bounds.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "kernels.h"

namespace fastdpo {
namespace {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

Rows rows_of(const Tensor& logits) {
  TORCH_CHECK(logits.dim() == 3 && logits.device().is_cpu(), "logits: expected a CPU tensor [G, R, V]");
  TORCH_CHECK(logits.size(2) <= 1 || logits.stride(2) == 1, "logits: expected a dense last dimension");
  return {logits.data_ptr(), logits.size(0) * logits.size(1), std::max<int64_t>(1, logits.size(1)),
          logits.stride(0), logits.stride(1), logits.size(2)};
}

void check_rows(const Tensor& values, int64_t n) {
  TORCH_CHECK(values.is_contiguous() && values.numel() == n, "expected ", n, " contiguous values, got ", values.sizes());
}

const float* floats(const OptTensor& values, int64_t n) {
  if (!values)
    return nullptr;
  check_rows(*values, n);
  return values->const_data_ptr<float>();
}

// logps, lse and, where stats, entropy, mean_logits, log_sum_sq_probs, is_top1
std::vector<Tensor> forward(
    const Tensor& logits, const Tensor& targets, double logit_scale, std::optional<double> softcap,
    double temperature, bool stats) {
  const Rows rows = rows_of(logits);
  check_rows(targets, rows.count);
  std::vector<Tensor> out;
  for (int i = 0; i < (stats ? 5 : 2); ++i)
    out.push_back(at::empty({rows.count}, logits.options().dtype(at::kFloat)));
  RowResults results{out[0].data_ptr<float>(), out[1].data_ptr<float>(), nullptr, nullptr, nullptr, nullptr};
  if (stats) {
    out.push_back(at::empty({rows.count}, logits.options().dtype(at::kBool)));
    results.entropy = out[2].data_ptr<float>();
    results.mean_logits = out[3].data_ptr<float>();
    results.log_sum_sq_probs = out[4].data_ptr<float>();
    results.is_top1 = out[5].data_ptr<bool>();
  }
  row_forward(
      logits.scalar_type(), rows, targets.const_data_ptr<int64_t>(), {logit_scale, softcap, temperature}, results);
  return out;
}

void backward(
    const Tensor& logits, const Tensor& targets, const Tensor& logps, const Tensor& lse, const OptTensor& entropy,
    const OptTensor& grad_logps, const OptTensor& grad_entropy, double logit_scale, std::optional<double> softcap,
    double temperature, int64_t vocab_start, const Tensor& out) {
  const Rows rows = rows_of(logits), to = rows_of(out);
  const int64_t n = rows.count;
  TORCH_CHECK(out.sizes() == logits.sizes() && out.scalar_type() == logits.scalar_type(), "out: expected like logits");
  check_rows(targets, n);
  TORCH_CHECK(!grad_entropy || entropy, "grad_entropy needs entropy");
  const RowGrads grads{floats(logps, n), floats(lse, n), floats(entropy, n), floats(grad_logps, n),
                       floats(grad_entropy, n)};
  row_backward(
      logits.scalar_type(), rows, targets.const_data_ptr<int64_t>(), grads, {logit_scale, softcap, temperature},
      vocab_start, to);
}

Tensor sums(const Tensor& values, const Tensor& bounds) {
  check_rows(values, values.numel());
  Tensor out = at::empty({bounds.numel() - 1}, values.options());
  sequence_sums(values.const_data_ptr<float>(), bounds.const_data_ptr<int64_t>(), out.numel(), out.data_ptr<float>());
  return out;
}

std::tuple<Tensor, Tensor, Tensor> sigmoid(
    const Tensor& logps, const Tensor& bounds, const OptTensor& ref_logps, double beta, double label_smoothing) {
  const int64_t sequences = bounds.numel() - 1;
  check_rows(logps, logps.numel());
  Tensor loss = at::empty({}, logps.options());
  Tensor totals = at::empty({sequences}, logps.options()), slope = at::empty({sequences}, logps.options());
  pair_sigmoid(
      logps.const_data_ptr<float>(), bounds.const_data_ptr<int64_t>(), floats(ref_logps, sequences), sequences / 2,
      beta, label_smoothing, loss.data_ptr<float>(), totals.data_ptr<float>(), slope.data_ptr<float>());
  return {loss, totals, slope};
}

}  // namespace

TORCH_LIBRARY(fastdpo_cpu, m) {
  m.def(
      "row_forward(Tensor logits, Tensor targets, float logit_scale, float? softcap, float temperature, bool stats) "
      "-> Tensor[]",
      forward);
  m.def(
      "row_backward(Tensor logits, Tensor targets, Tensor logps, Tensor lse, Tensor? entropy, Tensor? grad_logps, "
      "Tensor? grad_entropy, float logit_scale, float? softcap, float temperature, int vocab_start, Tensor(a!) out) "
      "-> ()",
      backward);
  m.def("sequence_sums(Tensor values, Tensor bounds) -> Tensor", sums);
  m.def(
      "pair_sigmoid(Tensor logps, Tensor bounds, Tensor? ref_logps, float beta, float label_smoothing) "
      "-> (Tensor, Tensor, Tensor)",
      sigmoid);
}

}  // namespace fastdpo
