// Which candidates of a tile are kept: those of least mass m[v] = sum_i p[i, v] are dropped, as long as the mass of all
// that is dropped stays within grad_tol * n. Then P [k, n] of the others, the mass that each token lost, and the mean
// dropped row.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <bit>
#include <numeric>

#include "stream_tile.h"

namespace fastdpo {
namespace {

constexpr double kDense = 0.25;  // of V: keeping more would cost more than it saves

// Candidates j of all chunks are numbered through; chunk c has start[c] .. start[c+1]-1
std::vector<int64_t> starts(const std::vector<Chunk>& chunks) {
  std::vector<int64_t> start(chunks.size() + 1, 0);
  for (size_t c = 0; c < chunks.size(); ++c)
    start[c + 1] = start[c] + int64_t(chunks[c].columns.size());
  return start;
}

template <typename Call>
void each_chunk(std::vector<Chunk>& chunks, const Call& call) {
  at::parallel_for(0, int64_t(chunks.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c)
      call(c, chunks[c]);
  });
}

// 1 where a candidate stays. Masses are not sorted but counted into buckets by their leading bits, ascending as positive
// floats are; only the bucket in which the budget ends is sorted.
std::vector<char> keep_most(const std::vector<float>& mass, std::vector<char> keep, double budget) {
  constexpr int kShift = 16;
  const auto bucket = [&](size_t j) { return std::bit_cast<uint32_t>(mass[j]) >> kShift; };
  std::vector<double> sums(1 << (32 - kShift), 0.);
  for (size_t j = 0; j < mass.size(); ++j)
    if (!keep[j])
      sums[bucket(j)] += mass[j];
  size_t last = 0;
  while (last < sums.size() && budget >= sums[last])
    budget -= sums[last++];
  std::vector<int64_t> order;
  for (size_t j = 0; j < mass.size(); ++j) {
    if (keep[j] || bucket(j) < last)
      continue;
    keep[j] = 1;
    if (bucket(j) == last)
      order.push_back(int64_t(j));
  }
  std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return mass[a] != mass[b] ? mass[a] < mass[b] : a < b; });
  for (const int64_t j : order) {
    budget -= mass[j];
    if (budget < 0)
      break;
    keep[j] = 0;
  }
  return keep;
}

// p = e * factor [padded], with the bounds that the chunk's e were taken from
std::vector<float> factors(const Chunk& chunk, const std::vector<float>& lse2) {
  std::vector<float> result(lse2.size());
  for (size_t i = 0; i < lse2.size(); i += kLanes)
    exp2(F::loadu(chunk.sums.m.data() + i) - F::loadu(lse2.data() + i)).store(result.data() + i);
  return result;
}

}  // namespace

Compact choose(
    const Tile& tile, std::vector<Chunk>& chunks, const std::vector<float>& lse2, std::vector<double> dropped) {
  const int64_t n = tile.in.n, padded = tile.padded, width = tile.in.width;
  const auto start = starts(chunks);
  std::vector<float> mass(start.back());
  std::vector<char> targets(start.back());  // always kept
  each_chunk(chunks, [&](int64_t c, Chunk& chunk) {
    const auto factor = factors(chunk, lse2);
    for (size_t j = 0; j < chunk.columns.size(); ++j) {
      const float* e = chunk.e.data() + int64_t(j) * padded;
      F total(0.f);
      for (int64_t i = 0; i < padded; i += kLanes)
        total = at::vec::fmadd(F::loadu(e + i), F::loadu(factor.data() + i), total);
      mass[start[c] + j] = sum(total);
      const auto target = tile.first_target(chunk.columns[j]);
      targets[start[c] + j] = target != tile.targets.end() && target->column == chunk.columns[j];
    }
  });
  const double budget = tile.grad_tol * double(n) - std::accumulate(dropped.begin(), dropped.end(), 0.);
  if (!(budget >= 0))
    return {};
  const auto keep = keep_most(mass, targets, budget);
  std::vector<int64_t> slot(mass.size() + 1, 0);
  for (size_t j = 0; j < mass.size(); ++j)
    slot[j + 1] = slot[j] + keep[j];
  const int64_t kept = slot.back();
  if (double(kept) > kDense * double(tile.in.vocab))
    return {};

  const auto floats = at::TensorOptions().dtype(at::kFloat);
  const Compact out{
      at::empty({kept}, floats.dtype(at::kInt)), at::empty({kept, n}, floats.dtype(at::kBFloat16)),
      at::empty({n}, floats), at::empty({width}, floats)};
  auto* columns = out.columns.data_ptr<int32_t>();
  auto* probs = out.probs.data_ptr<c10::BFloat16>();
  each_chunk(chunks, [&](int64_t c, Chunk& chunk) {
    auto& lost = chunk.sums.dropped;  // from here on: of this chunk's candidates
    std::fill(lost.begin(), lost.end(), 0.f);
    const auto factor = factors(chunk, lse2);
    std::vector<float> p(padded);
    for (int64_t j = start[c]; j < start[c + 1]; ++j) {
      const int32_t column = chunk.columns[j - start[c]];
      const float* e = chunk.e.data() + (j - start[c]) * padded;
      if (j + 2 < start[c + 1] && !keep[j + 2])
        tile.prefetch_row(chunk.columns[j + 2 - start[c]]);
      float* to = keep[j] ? p.data() : lost.data();
      for (int64_t i = 0; i < padded; i += kLanes)
        at::vec::fmadd(F::loadu(e + i), F::loadu(factor.data() + i), keep[j] ? F(0.f) : F::loadu(to + i)).store(to + i);
      if (keep[j]) {
        columns[slot[j]] = column;
        at::vec::convert(p.data(), probs + slot[j] * n, n);
      } else {
        tile.add_row(column, mass[j], chunk);
      }
    }
  });
  std::vector<double> row(width);
  double row_mass = 0;
  for (const auto& chunk : chunks) {
    for (int64_t i = 0; i < n; ++i)
      dropped[i] += chunk.sums.dropped[i];
    for (int64_t k = 0; k < width; ++k)
      row[k] += chunk.row_sum[k];
    row_mass += chunk.row_mass;
  }
  std::copy(dropped.begin(), dropped.end(), out.dropped.data_ptr<float>());
  for (int64_t k = 0; k < width; ++k)
    out.mean_row.data_ptr<float>()[k] = float(row_mass > 0 ? row[k] / row_mass : 0);
  return out;
}

}  // namespace fastdpo
