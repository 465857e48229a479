// torch.ops.fastdpo_cpu.*: tensors to pointers. Shapes and values were checked by fastdpo's Python; here only what
// would read out of bounds.

#include <ATen/core/Tensor.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "kernels.h"
#include "stream.h"

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

// Tensors for logps, lse and, where stats, entropy, mean_logits, log_sum_sq_probs, is_top1; and pointers to them
std::pair<std::vector<Tensor>, RowResults> row_results(const Tensor& like, int64_t n, bool stats) {
  std::vector<Tensor> out;
  for (int i = 0; i < (stats ? 5 : 2); ++i)
    out.push_back(at::empty({n}, like.options().dtype(at::kFloat)));
  RowResults results{out[0].data_ptr<float>(), out[1].data_ptr<float>(), nullptr, nullptr, nullptr, nullptr};
  if (stats) {
    out.push_back(at::empty({n}, like.options().dtype(at::kBool)));
    results.entropy = out[2].data_ptr<float>();
    results.mean_logits = out[3].data_ptr<float>();
    results.log_sum_sq_probs = out[4].data_ptr<float>();
    results.is_top1 = out[5].data_ptr<bool>();
  }
  return {out, results};
}

std::vector<Tensor> forward(
    const Tensor& logits, const Tensor& targets, double logit_scale, std::optional<double> softcap,
    double temperature, bool stats) {
  const Rows rows = rows_of(logits);
  check_rows(targets, rows.count);
  auto [out, results] = row_results(logits, rows.count, stats);
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

template <typename T>
Tensor to_tensor(const std::vector<T>& values, at::IntArrayRef shape, at::ScalarType dtype) {
  Tensor out = at::empty(shape, at::TensorOptions().dtype(dtype));
  std::copy(values.begin(), values.end(), out.data_ptr<T>());
  return out;
}

// Whether this CPU has the bf16 product that the streamed head is made of
bool streams() {
  const at::BFloat16 one[2] = {1, 1};
  float result = 0;
  try {
    at::native::cpublas::brgemm(1, 1, 2, 2, 1, 1, false, one, one, &result, true);
    at::native::cpublas::brgemm_release(true);
  } catch (const c10::Error&) {
    return false;
  }
  return result == 2;
}

StreamInputs stream_inputs(
    const Tensor& hidden, const Tensor& weight, const OptTensor& bias, const Tensor& targets, const Transform& t) {
  const int64_t n = hidden.size(0), width = hidden.size(1), vocab = weight.size(0);
  check_rows(hidden, n * width);
  check_rows(targets, n);
  TORCH_CHECK(width % 2 == 0 && weight.size(1) == width && weight.stride(1) == 1, "weight: expected dense rows, H even");
  TORCH_CHECK(
      weight.scalar_type() == at::kFloat || weight.scalar_type() == at::kBFloat16,
      "weight: expected bfloat16 or float32, got ", weight.scalar_type());
  return {
      hidden.const_data_ptr<at::BFloat16>(), weight.const_data_ptr(), weight.scalar_type() == at::kFloat,
      weight.stride(0), floats(bias, vocab), targets.const_data_ptr<int64_t>(), n, vocab, width, t};
}

// D.T of columns first .. last-1: bf16 [last - first, n]
Tensor streamed_gradient(
    const Tensor& hidden, const Tensor& weight, const OptTensor& bias, const Tensor& targets, const Tensor& logps,
    const Tensor& lse, const OptTensor& entropy, const OptTensor& grad_logps, const OptTensor& grad_entropy,
    double logit_scale, std::optional<double> softcap, double temperature, int64_t first, int64_t last) {
  const int64_t n = hidden.size(0);
  const auto in = stream_inputs(hidden, weight, bias, targets, {logit_scale, softcap, temperature});
  TORCH_CHECK(0 <= first && first <= last && last <= in.vocab, "first, last: expected a range of columns");
  TORCH_CHECK(!grad_entropy || entropy, "grad_entropy needs entropy");
  const RowGrads grads{floats(logps, n), floats(lse, n), floats(entropy, n), floats(grad_logps, n),
                       floats(grad_entropy, n)};
  Tensor out = at::empty({last - first, n}, hidden.options());
  stream_gradient(in, grads, first, last, out.data_ptr<at::BFloat16>());
  return out;
}

// row results as forward(), then columns int32 [k], probs bf16 [k, n], dropped [n], mean_row [H]; k = 0: dense
std::vector<Tensor> stream(
    const Tensor& hidden, const Tensor& weight, const OptTensor& bias, const Tensor& targets, double logit_scale,
    std::optional<double> softcap, double temperature, bool stats, double grad_tol, double workspace_mb) {
  const int64_t n = hidden.size(0), width = hidden.size(1);
  const auto in = stream_inputs(hidden, weight, bias, targets, {logit_scale, softcap, temperature});
  auto [out, results] = row_results(hidden, n, stats);
  Compact compact;
  stream_forward(in, grad_tol, workspace_mb, results, compact);
  const int64_t k = int64_t(compact.columns.size());
  compact.dropped.resize(n);
  compact.mean_row.resize(width);
  out.push_back(to_tensor(compact.columns, {k}, at::kInt));
  out.push_back(to_tensor(compact.probs, {k, n}, at::kBFloat16));
  out.push_back(to_tensor(compact.dropped, {n}, at::kFloat));
  out.push_back(to_tensor(compact.mean_row, {width}, at::kFloat));
  return out;
}

// probs bf16 or float32 [k, n], columns int32 [k] -> gradient like probs
Tensor compact(
    const Tensor& probs, const Tensor& columns, const Tensor& targets, const Tensor& logps, const Tensor& lse,
    const Tensor& grad_logps, double logit_scale, std::optional<double> softcap, double temperature) {
  const int64_t k = probs.size(0), n = probs.size(1);
  check_rows(probs, k * n);
  check_rows(columns, k);
  check_rows(targets, n);
  const RowGrads grads{floats(logps, n), floats(lse, n), nullptr, floats(grad_logps, n), nullptr};
  Tensor out = at::empty_like(probs);
  compact_gradient(
      probs.scalar_type(), probs.const_data_ptr(), k, n, columns.const_data_ptr<int32_t>(),
      targets.const_data_ptr<int64_t>(), grads, {logit_scale, softcap, temperature}, out.data_ptr());
  return out;
}

void weight_gradient(Tensor total, const Tensor& slots, const Tensor& grad, const Tensor& hidden) {
  const int64_t k = grad.size(0), n = grad.size(1), width = hidden.size(1);
  check_rows(slots, k);
  check_rows(grad, k * n);
  check_rows(hidden, n * width);
  TORCH_CHECK(n % 2 == 0, "grad: expected an even number of tokens");
  TORCH_CHECK(total.is_contiguous() && total.size(1) == width, "total: expected contiguous [., H]");
  add_weight_gradient(
      total.data_ptr<float>(), slots.const_data_ptr<int64_t>(), grad.const_data_ptr<at::BFloat16>(),
      hidden.const_data_ptr<at::BFloat16>(), k, n, width);
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
  m.def("streams() -> bool", streams);
  m.def(
      "stream_forward(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, float logit_scale, float? softcap, "
      "float temperature, bool stats, float grad_tol, float workspace_mb) -> Tensor[]",
      stream);
  m.def(
      "compact_gradient(Tensor probs, Tensor columns, Tensor targets, Tensor logps, Tensor lse, Tensor grad_logps, "
      "float logit_scale, float? softcap, float temperature) -> Tensor",
      compact);
  m.def(
      "stream_gradient(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor logps, Tensor lse, "
      "Tensor? entropy, Tensor? grad_logps, Tensor? grad_entropy, float logit_scale, float? softcap, "
      "float temperature, int first, int last) -> Tensor",
      streamed_gradient);
  m.def("weight_gradient(Tensor(a!) total, Tensor slots, Tensor grad, Tensor hidden) -> ()", weight_gradient);
  m.def("sequence_sums(Tensor values, Tensor bounds) -> Tensor", sums);
  m.def(
      "pair_sigmoid(Tensor logps, Tensor bounds, Tensor? ref_logps, float beta, float label_smoothing) "
      "-> (Tensor, Tensor, Tensor)",
      sigmoid);
}

}  // namespace fastdpo
