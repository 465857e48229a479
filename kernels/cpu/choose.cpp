// Which candidates of a tile are kept: those of least mass m[v] = sum_i p[i, v] are dropped, as long as the mass of all
// that is dropped stays within grad_tol * n. Then P [k, n] of the others, the mass that each token lost, and the mean
// dropped row.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

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

// 1 where a candidate stays
std::vector<char> keep_most(const std::vector<float>& mass, std::vector<char> keep, double budget) {
  std::vector<int64_t> order;
  for (size_t j = 0; j < mass.size(); ++j)
    if (!keep[j] && mass[j] <= budget)
      order.push_back(int64_t(j));
    else
      keep[j] = 1;
  std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return mass[a] != mass[b] ? mass[a] < mass[b] : a < b; });
  for (const int64_t j : order) {
    budget -= mass[j];
    if (budget < 0)
      keep[j] = 1;
  }
  return keep;
}

}  // namespace

Compact choose(
    const Tile& tile, std::vector<Chunk>& chunks, const std::vector<float>& lse2, std::vector<double> dropped) {
  const int64_t n = tile.in.n, padded = tile.padded, width = tile.in.width;
  const auto start = starts(chunks);
  std::vector<float> mass(start.back());
  std::vector<char> targets(start.back());  // always kept
  each_chunk(chunks, [&](int64_t c, Chunk& chunk) {
    for (size_t j = 0; j < chunk.columns.size(); ++j) {
      float* x = chunk.x.data() + int64_t(j) * padded;
      F total(0.f);
      for (int64_t i = 0; i < padded; i += kLanes) {
        const F p = exp2(F::loadu(x + i) - F::loadu(lse2.data() + i));
        p.store(x + i);
        total = total + p;
      }
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
    for (int64_t j = start[c]; j < start[c + 1]; ++j) {
      const int32_t column = chunk.columns[j - start[c]];
      const float* p = chunk.x.data() + (j - start[c]) * padded;
      if (keep[j]) {
        columns[slot[j]] = column;
        at::vec::convert(p, probs + slot[j] * n, n);
      } else {
        for (int64_t i = 0; i < n; ++i)
          lost[i] += p[i];
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
