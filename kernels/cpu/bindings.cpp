// torch.ops.fastdpo_cpu.*: tensors to pointers. Shapes and values were checked by fastdpo's Python; here only what
// would read out of bounds.

#include <ATen/core/Tensor.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include "kernels.h"
#include "stream_forward.h"

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

// Whether this CPU has the products that the streamed head is made of, in bf16 and in bytes
bool streams() {
  const at::BFloat16 one[2] = {1, 1};
  const uint8_t bytes[4] = {1, 1, 1, 1};
  const int8_t signed_bytes[4] = {1, 1, 1, -1};
  float result = 0;
  int32_t byte_result = 0;
  try {
    at::native::cpublas::brgemm(1, 1, 2, 2, 1, 1, false, one, one, &result, true);
    at::native::cpublas::brgemm(1, 1, 4, 4, 1, 1, false, bytes, signed_bytes, &byte_result, true);
    at::native::cpublas::brgemm_release(true);
  } catch (const std::exception&) {  // oneDNN's own errors too
    return false;
  }
  return result == 2 && byte_result == 2;
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

// D.T of columns first .. last-1 into out, bf16 [last - first, n]
void streamed_gradient(
    const Tensor& hidden, const Tensor& weight, const OptTensor& bias, const Tensor& targets, const Tensor& logps,
    const Tensor& lse, const OptTensor& entropy, const OptTensor& grad_logps, const OptTensor& grad_entropy,
    double logit_scale, std::optional<double> softcap, double temperature, int64_t first, int64_t last, Tensor out) {
  const int64_t n = hidden.size(0);
  check_rows(out, (last - first) * n);
  const auto in = stream_inputs(hidden, weight, bias, targets, {logit_scale, softcap, temperature});
  TORCH_CHECK(0 <= first && first <= last && last <= in.vocab, "first, last: expected a range of columns");
  TORCH_CHECK(!grad_entropy || entropy, "grad_entropy needs entropy");
  const RowGrads grads{floats(logps, n), floats(lse, n), floats(entropy, n), floats(grad_logps, n),
                       floats(grad_entropy, n)};
  stream_gradient(in, grads, first, last, out.data_ptr<at::BFloat16>());
}

// columns, starts, entries, dropped, mean_row (Sparse); no columns: dense
void append(std::vector<Tensor>& out, const Sparse& tile, const Tensor& like) {
  const bool kept = tile.columns.defined();
  for (const Tensor& part : {tile.columns, tile.starts, tile.entries, tile.dropped, tile.mean_row})
    out.push_back(kept ? part : at::empty({0}, like.options().dtype(at::kFloat)));
}

// row results as forward(); where `keep`, values bf16 [V, n] (or [0, n]: not usable) and scale of Exponentials; then
// the five tensors of each tile
std::vector<Tensor> stream(
    const Tensor& hidden, const Tensor& weight, const OptTensor& bias, const Tensor& targets, double logit_scale,
    std::optional<double> softcap, double temperature, bool stats, int64_t tile_tokens, double grad_tol,
    bool search, double workspace_mb, bool keep, const OptTensor& bounds) {
  TORCH_CHECK(0 < tile_tokens && tile_tokens <= 65536, "tile_tokens: expected 1 to 65536, got ", tile_tokens);
  auto in = stream_inputs(hidden, weight, bias, targets, {logit_scale, softcap, temperature});
  in.bounds = floats(bounds, in.n);
  auto [out, results] = row_results(hidden, in.n, stats);
  Exponentials kept{nullptr, nullptr, in.n};
  Tensor values, scale;
  if (keep) {
    values = at::empty({in.vocab, in.n}, hidden.options());
    scale = at::empty({(in.vocab + kWaveRows - 1) / kWaveRows, in.n}, hidden.options().dtype(at::kFloat));
    kept.values = values.data_ptr<at::BFloat16>();
    kept.scale = scale.data_ptr<float>();
  }
  const auto tiles = stream_forward(in, tile_tokens, grad_tol, search, workspace_mb, results, kept);
  if (keep) {
    out.push_back(kept.usable ? values : at::empty({0, in.n}, hidden.options()));
    out.push_back(scale);
  }
  for (const Sparse& tile : tiles)
    append(out, tile, hidden);
  return out;
}

// TileScan over tensors, which it keeps between its two calls
struct TensorScan : torch::CustomClassHolder {
  TileScan scan;
  std::vector<Tensor> inputs;

  std::vector<Tensor> rows(
      const Tensor& hidden, const Tensor& weight, const OptTensor& bias, const Tensor& targets, const Tensor& bounds,
      double logit_scale, std::optional<double> softcap, double temperature, bool stats, double grad_tol,
      double workspace_mb) {
    auto in = stream_inputs(hidden, weight, bias, targets, {logit_scale, softcap, temperature});
    in.bounds = floats(bounds, in.n);
    inputs = {hidden, weight, targets, bounds};
    if (bias)
      inputs.push_back(*bias);
    auto [out, results] = row_results(hidden, in.n, stats);
    scan.rows(in, grad_tol, workspace_mb, results);
    return out;
  }

  std::vector<Tensor> choose(const Tensor& apart) {
    TORCH_CHECK(scan.waiting(), "choose: expected a call of rows() before it");
    check_rows(apart, scan.tokens());
    std::vector<Tensor> out;
    append(out, scan.choose(apart.const_data_ptr<double>()), inputs[0]);
    inputs.clear();
    return out;
  }
};

// Of the tiles that start at tokens `firsts`, five tensors each as stream() returned them. dx float32 [n, H], dw like
// weight, db float32 [V]; with `add`, dw and db hold another part already.
void compact_backward(
    const Tensor& hidden, const Tensor& weight, const Tensor& targets, const Tensor& logps, const Tensor& lse,
    const Tensor& grad_logps, double logit_scale, std::optional<double> softcap, double temperature,
    at::IntArrayRef firsts, at::TensorList kept, const OptTensor& dx, const OptTensor& dw, const OptTensor& db,
    bool add) {
  const auto in = stream_inputs(hidden, weight, std::nullopt, targets, {logit_scale, softcap, temperature});
  const RowGrads grads{floats(logps, in.n), floats(lse, in.n), nullptr, floats(grad_logps, in.n), nullptr};
  TORCH_CHECK(kept.size() == 5 * firsts.size(), "kept: expected five tensors a tile");
  std::vector<Sparse> sparse;
  std::vector<CompactTile> tiles;
  sparse.reserve(firsts.size());
  for (size_t t = 0; t < firsts.size(); ++t) {
    const Tensor* parts = &kept[5 * t];
    const Sparse& tile = sparse.emplace_back(Sparse{parts[0], parts[1], parts[2], parts[3], parts[4]});
    const int64_t n = tile.dropped.numel(), k = tile.columns.numel();
    check_rows(tile.columns, k);
    check_rows(tile.starts, k + 1);
    check_rows(tile.entries, tile.starts.const_data_ptr<int32_t>()[k]);
    check_rows(tile.mean_row, in.width);
    TORCH_CHECK(0 <= firsts[t] && firsts[t] + n <= in.n, "firsts: expected tiles within the tokens");
    tiles.push_back({firsts[t], n, tile});
  }
  StreamGradients out{nullptr, nullptr, nullptr, add};
  if (dx) {
    check_rows(*dx, in.n * in.width);
    out.dx = dx->data_ptr<float>();
  }
  if (dw) {
    check_rows(*dw, in.vocab * in.width);
    TORCH_CHECK(dw->scalar_type() == weight.scalar_type(), "dw: expected weight's dtype");
    out.dw = dw->data_ptr();
  }
  if (db) {
    check_rows(*db, in.vocab);
    out.db = db->data_ptr<float>();
  }
  stream_backward(in, grads, tiles, out);
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
      "float temperature, bool stats, int tile_tokens, float grad_tol, bool search, float workspace_mb, bool keep, "
      "Tensor? bounds) -> Tensor[]",
      stream);
  m.def(
      "stream_backward(Tensor hidden, Tensor weight, Tensor targets, Tensor logps, Tensor lse, Tensor grad_logps, "
      "float logit_scale, float? softcap, float temperature, int[] firsts, Tensor[] kept, Tensor(a!)? dx, "
      "Tensor(b!)? dw, Tensor(c!)? db, bool add) -> ()",
      compact_backward);
  m.def(
      "compact_gradient(Tensor probs, Tensor columns, Tensor targets, Tensor logps, Tensor lse, Tensor grad_logps, "
      "float logit_scale, float? softcap, float temperature) -> Tensor",
      compact);
  m.def(
      "stream_gradient(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor logps, Tensor lse, "
      "Tensor? entropy, Tensor? grad_logps, Tensor? grad_entropy, float logit_scale, float? softcap, "
      "float temperature, int first, int last, Tensor(a!) out) -> ()",
      streamed_gradient);
  m.class_<TensorScan>("TileScan")
      .def(torch::init<>())
      .def("rows", &TensorScan::rows)
      .def("choose", &TensorScan::choose);
  m.def("sequence_sums(Tensor values, Tensor bounds) -> Tensor", sums);
  m.def(
      "pair_sigmoid(Tensor logps, Tensor bounds, Tensor? ref_logps, float beta, float label_smoothing) "
      "-> (Tensor, Tensor, Tensor)",
      sigmoid);
}

}  // namespace fastdpo
