// Which candidates of a tile are kept. Of every column only the entries p[i, v] > floor are worth their memory; columns
// of least mass m[v] = sum of these are dropped, as long as the mass of all that is dropped, entries and columns, stays
// within grad_tol * n. Then the entries of the others, the mass that each token lost, and the mean dropped row.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <bit>
#include <numeric>

#include "stream_tile.h"

namespace fastdpo {
namespace {

constexpr double kDense = 0.25;  // of V: keeping more would cost more than it saves
// Of grad_tol: entries up to it are not kept. On real text the first takes a twentieth of what may be dropped; where a
// token's softmax is flat, more, and every such entry costs a column that could have been dropped.
constexpr double kFloors[] = {0x1p-15, 0x1p-19, 0};

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

// Of each candidate: mass of its entries above the floor, their number; and whether a target stands in it
struct Weighed {
  std::vector<float> mass;
  std::vector<int32_t> entries;
  std::vector<char> targets;
  double below = 0;  // mass of all entries that are not above it
};

// p = e * factor [padded], with the bounds that the chunk's e were taken from. In float64 until they are subtracted: where
// they are in the thousands, float32 would leave a thousandth of p.
std::vector<float> factors(const Chunk& chunk, const std::vector<double>& lse2) {
  std::vector<float> result(lse2.size());
  for (size_t i = 0; i < lse2.size(); ++i)
    result[i] = float(chunk.sums.m[i] - lse2[i]);
  for (size_t i = 0; i < lse2.size(); i += kLanes)
    exp2(F::loadu(result.data() + i)).store(result.data() + i);
  return result;
}

Weighed weigh(
    const Tile& tile, std::vector<Chunk>& chunks, const std::vector<int64_t>& start, const std::vector<double>& lse2,
    float floor) {
  Weighed out{std::vector<float>(start.back()), std::vector<int32_t>(start.back()), std::vector<char>(start.back())};
  std::vector<double> below(chunks.size(), 0.);
  each_chunk(chunks, [&](int64_t c, Chunk& chunk) {
    const auto factor = factors(chunk, lse2);
    const F floors(floor), one(1.f), zero(0.f);
    for (size_t j = 0; j < chunk.columns.size(); ++j) {
      const float* e = chunk.e.data() + int64_t(j) * tile.padded;
      F all = zero, above = zero, count = zero;
      for (int64_t i = 0; i < tile.padded; i += kLanes) {
        const F p = F::loadu(e + i) * F::loadu(factor.data() + i), kept = p > floors;
        all = all + p;
        above = above + (p & kept);
        count = count + (one & kept);
      }
      out.mass[start[c] + j] = sum(above);
      out.entries[start[c] + j] = int32_t(sum(count));
      below[c] += std::max(0.f, sum(all - above));
      const auto target = tile.first_target(chunk.columns[j]);
      out.targets[start[c] + j] = target != tile.targets.end() && target->column == chunk.columns[j];
    }
  });
  out.below = std::accumulate(below.begin(), below.end(), 0.);
  return out;
}

}  // namespace

Sparse choose(
    const Tile& tile, std::vector<Chunk>& chunks, const std::vector<double>& lse2, std::vector<double> dropped) {
  const int64_t n = tile.in.n, padded = tile.padded, width = tile.in.width;
  const double budget = tile.grad_tol * double(n) - std::accumulate(dropped.begin(), dropped.end(), 0.);
  if (!(budget >= 0))
    return {};
  const auto start = starts(chunks);
  float floor;
  Weighed weighed;
  for (const double part : kFloors) {
    floor = float(tile.grad_tol * part);
    weighed = weigh(tile, chunks, start, lse2, floor);
    if (weighed.below < budget / 4)
      break;
  }
  const auto keep = keep_most(weighed.mass, weighed.targets, budget - weighed.below);
  // Of the columns and of the entries kept
  std::vector<int64_t> slot(keep.size() + 1, 0), at(keep.size() + 1, 0);
  for (size_t j = 0; j < keep.size(); ++j) {
    slot[j + 1] = slot[j] + keep[j];
    at[j + 1] = at[j] + (keep[j] ? weighed.entries[j] : 0);
  }
  const int64_t kept = slot.back();
  if (double(kept) > kDense * double(tile.in.vocab) || at.back() > std::numeric_limits<int32_t>::max())
    return {};

  const auto floats = at::TensorOptions().dtype(at::kFloat), ints = floats.dtype(at::kInt);
  const Sparse out{
      at::empty({kept}, ints), at::empty({kept + 1}, ints), at::empty({at.back()}, ints), at::empty({n}, floats),
      at::empty({width}, floats)};
  auto *columns = out.columns.data_ptr<int32_t>(), *starts = out.starts.data_ptr<int32_t>();
  auto* entries = reinterpret_cast<uint32_t*>(out.entries.data_ptr<int32_t>());
  starts[kept] = int32_t(at.back());
  each_chunk(chunks, [&](int64_t c, Chunk& chunk) {
    auto& lost = chunk.sums.dropped;  // from here on: of this chunk's candidates
    std::fill(lost.begin(), lost.end(), 0.f);
    const auto factor = factors(chunk, lse2);
    std::vector<float> p(padded);
    std::vector<c10::BFloat16> rounded(padded);
    std::vector<uint32_t> found(padded + 1);
    for (int64_t j = start[c]; j < start[c + 1]; ++j) {
      const int32_t column = chunk.columns[j - start[c]];
      const float* e = chunk.e.data() + (j - start[c]) * padded;
      if (j + 2 < start[c + 1] && !keep[j + 2])
        tile.prefetch_row(chunk.columns[j + 2 - start[c]]);
      // Beyond this the entries are kept, up to it lost
      const F least(keep[j] ? floor : kInfinity);
      for (int64_t i = 0; i < padded; i += kLanes) {
        const F value = F::loadu(e + i) * F::loadu(factor.data() + i);
        value.store(p.data() + i);
        (F::loadu(lost.data() + i) + (value & (value <= least))).store(lost.data() + i);
      }
      if (!keep[j]) {
        tile.add_row(column, weighed.mass[j], chunk);
        continue;
      }
      // A token's own target is not lost: the backward has its p from its logp, with an entry or without
      for (auto target = tile.first_target(column); target != tile.targets.end() && target->column == column; ++target)
        if (p[target->token] <= floor)
          lost[target->token] -= p[target->token];
      columns[slot[j]] = column;
      starts[slot[j]] = int32_t(at[j]);
      at::vec::convert(p.data(), rounded.data(), padded);
      uint32_t count = 0;  // without a branch: which entries these are, no processor foresees
      for (int64_t i = 0; i < padded; ++i) {
        found[count] = uint32_t(i) << 16 | rounded[i].x;
        count += p[i] > floor;
      }
      std::copy_n(found.data(), weighed.entries[j], entries + at[j]);
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
