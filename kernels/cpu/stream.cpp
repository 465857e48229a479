// z = hidden @ weight.T streamed over the vocabulary; row results; and the columns that hold the probability.
//
// The product is taken as z.T: 32 rows of weight (dense, as they lie) times the packed tile, [32, n] float32, which
// stays in cache. SIMD runs over tokens, so no sum crosses lanes: per token a bound m <= lse (base 2), s = sum 2^(x-m)
// and the statistics.
//
// A column that nowhere reaches 2^(x-m) > eps nowhere has p > eps, since m <= lse: it is dropped at once, and only its
// mass is noted. The others are candidates: their x is kept (a few percent of V), and once lse is known those of least
// mass are dropped too, up to the tolerance. The bound starts from the target and a probe of the first columns, and
// rises from wave to wave.
//
// Chunks and waves are of fixed sizes and merge in order: results do not depend on the number of threads.

#include "stream.h"

#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>

#include "pack.h"
#include "simd.h"
#include "transform.h"

namespace fastdpo {
namespace {

using c10::BFloat16;

constexpr int64_t kRows = 32;  // rows of weight a product: [32, 256] float32 is 32 KB
constexpr int64_t kGroup = 4;  // columns a pass over the tokens' sums
constexpr int64_t kChunk = 1024;  // rows of weight a task
constexpr int64_t kProbe = 4;  // chunks that only raise the bound
constexpr int64_t kWave = 32;  // chunks between two rises of the bound
constexpr double kSlack = 256;  // eps = grad_tol / kSlack
constexpr double kCandidates = 0.4;  // of V: with more the tile is dense, and the search ends
constexpr double kDense = 0.25;  // of V: keeping more would cost more than it saves
constexpr float kOverflow = 60;  // x - m beyond this: m rises at once
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Per token, over some columns; as Sums in row_forward.cpp. before/after: largest raw logit on either side of the target
template <typename Real>
struct TokenSums {
  std::vector<Real> m, s, dropped, ex, ee, total, before, after;

  TokenSums(int64_t n, Real bound)
      : m(n, bound), s(n), dropped(n), ex(n), ee(n), total(n), before(n, -kInfinity), after(n, -kInfinity) {}

  void raise(int64_t i, Real to) {
    const Real delta = to - m[i], f = std::exp2(-delta);
    ex[i] = s[i] == 0 ? 0 : f * (ex[i] - delta * s[i]);
    s[i] *= f;
    dropped[i] *= f;
    ee[i] *= f * f;
    m[i] = to;
  }
};

struct Chunk {
  TokenSums<float> sums;
  std::vector<int32_t> columns;  // candidates
  std::vector<float> x;  // [candidates, padded n]
  std::vector<float> row_sum;  // [H] sum of mass * weight[v] over dropped columns
  double row_mass = 0;

  Chunk(int64_t padded, int64_t width) : sums(padded, 0), row_sum(width) {}
};

struct Scratch {
  std::vector<float> logits;  // [32, padded n]
  std::vector<BFloat16> weight;  // [32, H], where weight is float32
};

struct Target {
  int64_t column, token;
};

struct Tile {
  const StreamInputs& in;
  int64_t padded;  // n, up to whole vectors
  std::vector<BFloat16> packed;  // hidden.T in pairs of k: [H/2, padded, 2]
  std::vector<Target> targets;  // by column
  std::vector<float> bound;  // [padded]
  // [n] of the target, from the same product as every other logit: x, and the raw logit (negated for a negative scale)
  std::vector<float> target_x, target_raw;

  explicit Tile(const StreamInputs& inputs) : in(inputs), padded((in.n + kLanes - 1) / kLanes * kLanes) {
    packed = pack_hidden(in.hidden, in.n, in.width, padded);
    for (int64_t i = 0; i < in.n; ++i)
      targets.push_back({in.targets[i], i});
    std::sort(targets.begin(), targets.end(), [](Target a, Target b) {
      return a.column != b.column ? a.column < b.column : a.token < b.token;
    });
    bound.assign(padded, 200.f);  // a padding token: 2^(x - 200) is nothing
    target_x.resize(in.n);
    target_raw.resize(in.n);
  }
};

template <typename W, bool kSoftcap, bool kStats>
struct Streamer {
  Tile& tile;
  Base2<kSoftcap> base2;
  float log2_eps;  // infinity: no candidates
  double least_mass;  // below it a dropped row is left out of mean_row

  Streamer(Tile& t, double grad_tol) : tile(t), base2(t.in.transform) {
    log2_eps = grad_tol > 0 ? float(std::log2(grad_tol / kSlack)) : kInfinity;
    least_mass = grad_tol * double(t.in.n) / double(t.in.vocab) / 16;
  }

  const W* weight(int64_t v) const {
    return static_cast<const W*>(tile.in.weight) + v * tile.in.weight_stride;
  }

  float target_logit(int64_t i) const {
    const auto& in = tile.in;
    const BFloat16* x = in.hidden + i * in.width;
    const W* w = weight(in.targets[i]);
    float z = in.bias ? in.bias[in.targets[i]] : 0.f;
    for (int64_t k = 0; k < in.width; ++k)
      z += float(x[k]) * float(BFloat16(w[k]));
    return z;
  }

  void chunk(int64_t first, int64_t last, bool collect, Scratch& scratch, Chunk& out) const {
    const auto& in = tile.in;
    std::copy(tile.bound.begin(), tile.bound.end(), out.sums.m.begin());
    auto target = std::lower_bound(
        tile.targets.cbegin(), tile.targets.cend(), first, [](Target t, int64_t v) { return t.column < v; });
    scratch.logits.resize(kRows * tile.padded);
    for (int64_t v0 = first; v0 < last; v0 += kRows) {
      const int64_t rows = std::min(kRows, last - v0);
      const auto [block, stride] = weight_rows(weight(v0), in.weight_stride, rows, in.width, scratch.weight);
      at::native::cpublas::brgemm(
          rows, tile.padded, in.width, stride, tile.padded, tile.padded, false, block, tile.packed.data(),
          scratch.logits.data(), true);
      for (int64_t r = 0; r < rows;) {
        const bool target_near = target != tile.targets.end() && target->column < v0 + r + kGroup;
        // is_top1 asks what stands before and what after a target: then column by column
        const bool together = r + kGroup <= rows && !(kStats && target_near);
        const auto next = together ? (collect ? &Streamer::group<kGroup, true> : &Streamer::group<kGroup, false>)
                                   : (collect ? &Streamer::group<1, true> : &Streamer::group<1, false>);
        (this->*next)(v0 + r, scratch.logits.data() + r * tile.padded, target, out);
        r += together ? kGroup : 1;
      }
    }
  }

  // kCount columns from v on: their raw logits [kCount, padded n] become x - m on the way. Several columns at a time,
  // so that the sums of a token are loaded and stored once for all of them.
  template <int kCount, bool kCollect>
  void group(int64_t v, float* x, std::vector<Target>::const_iterator& target, Chunk& out) const {
    const auto& in = tile.in;
    auto& sums = out.sums;
    const int64_t padded = tile.padded;
    const auto firsts = target;
    while (target != tile.targets.end() && target->column < v + kCount)
      ++target;
    if constexpr (kStats && kCount == 1) {  // what came before this column came before its tokens' targets
      for (auto t = firsts; t != target; ++t)
        sums.before[t->token] = std::exchange(sums.after[t->token], -kInfinity);
    }

    F top[kCount], bias[kCount];
    for (int c = 0; c < kCount; ++c) {
      top[c] = F(-kInfinity);
      bias[c] = F(in.bias ? in.bias[v + c] : 0.f);
    }
    const F factor(base2.factor), sign(base2.in < 0 ? -1.f : 1.f);
    for (int64_t i = 0; i < padded; i += kLanes) {
      const F m = F::loadu(sums.m.data() + i);
      F total(0.f), largest(-kInfinity);
      for (int c = 0; c < kCount; ++c) {
        F raw = F::loadu(x + c * padded + i);
        if (in.bias)
          raw = raw + bias[c];
        const F core = base2.core(raw), above = at::vec::fmsub(core, factor, m);
        above.store(x + c * padded + i);
        top[c] = larger(top[c], above);
        if constexpr (kStats) {
          total = total + core;
          largest = larger(largest, raw * sign);
        }
      }
      if constexpr (kStats) {
        (F::loadu(sums.total.data() + i) + total).store(sums.total.data() + i);
        larger(F::loadu(sums.after.data() + i), largest).store(sums.after.data() + i);
      }
    }
    float tops[kCount], highest = -kInfinity;
    for (int c = 0; c < kCount; ++c) {
      tops[c] = max(top[c]);
      highest = std::max(highest, tops[c]);
    }
    for (auto t = firsts; t != target; ++t) {
      tile.target_x[t->token] = x[(t->column - v) * padded + t->token] + sums.m[t->token];
      tops[t->column - v] = kInfinity;  // a target is always kept
      if constexpr (kStats && kCount == 1)  // alone in `after` until now; it belongs to neither side
        tile.target_raw[t->token] = std::exchange(sums.after[t->token], -kInfinity);
    }
    if (highest > kOverflow)
      raise_overflowing(x, kCount, sums);

    F mass[kCount];
    float drop[kCount];  // 1 where the column is dropped at once
    bool any_drop = false;
    for (int c = 0; c < kCount; ++c) {
      mass[c] = F(0.f);
      drop[c] = kCollect && tops[c] <= log2_eps ? 1.f : 0.f;
      any_drop |= drop[c] > 0;
    }
    for (int64_t i = 0; i < padded; i += kLanes) {
      F s(0.f), dropped(0.f), ex(0.f), ee(0.f);
      for (int c = 0; c < kCount; ++c) {
        F above = F::loadu(x + c * padded + i);
        if constexpr (kStats)
          above = larger(F(-200.f), above);  // in this order a NaN stays
        const F e = exp2(above);
        s = s + e;
        if constexpr (kCollect) {
          dropped = at::vec::fmadd(e, F(drop[c]), dropped);
          mass[c] = mass[c] + e;
        }
        if constexpr (kStats) {
          ex = at::vec::fmadd(e, above, ex);
          ee = at::vec::fmadd(e, e, ee);
        }
      }
      (F::loadu(sums.s.data() + i) + s).store(sums.s.data() + i);
      if (kCollect && any_drop)
        (F::loadu(sums.dropped.data() + i) + dropped).store(sums.dropped.data() + i);
      if constexpr (kStats) {
        (F::loadu(sums.ex.data() + i) + ex).store(sums.ex.data() + i);
        (F::loadu(sums.ee.data() + i) + ee).store(sums.ee.data() + i);
      }
    }
    if constexpr (!kCollect)
      return;
    for (int c = 0; c < kCount; ++c) {
      if (drop[c] > 0) {
        add_row(v + c, sum(mass[c]), out);
        continue;
      }
      out.columns.push_back(int32_t(v + c));
      const size_t at = out.x.size();
      out.x.resize(at + padded);
      for (int64_t i = 0; i < padded; i += kLanes)
        (F::loadu(x + c * padded + i) + F::loadu(sums.m.data() + i)).store(out.x.data() + at + i);
    }
  }

  // Tokens whose x - m would overflow a later sum: m rises to their largest x
  void raise_overflowing(float* x, int columns, TokenSums<float>& sums) const {
    for (int64_t i = 0; i < tile.in.n; ++i) {
      float most = x[i];
      for (int c = 1; c < columns; ++c)
        most = std::max(most, x[c * tile.padded + i]);
      if (most > kOverflow && std::isfinite(most)) {
        sums.raise(i, sums.m[i] + most);
        for (int c = 0; c < columns; ++c)
          x[c * tile.padded + i] -= most;
      }
    }
  }

  void add_row(int64_t v, double mass, Chunk& out) const {
    if (mass < least_mass)
      return;
    const W* w = weight(v);
    const F factor{static_cast<float>(mass)};
    float* to = out.row_sum.data();
    int64_t k = 0;
    for (; k + kStep <= tile.in.width; k += kStep) {
      const F2 row = load2(w + k), before = load2(to + k);
      store2(to + k, F2{at::vec::fmadd(factor, row.a, before.a), at::vec::fmadd(factor, row.b, before.b)});
    }
    for (; k < tile.in.width; ++k)
      to[k] += float(mass) * float(w[k]);
    out.row_mass += mass;
  }
};

void merge(TokenSums<double>& all, const TokenSums<float>& part, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    if (part.m[i] > all.m[i])
      all.raise(i, part.m[i]);
    const double delta = all.m[i] - part.m[i], f = std::exp2(-delta);
    all.ex[i] += f * (part.ex[i] - delta * part.s[i]);
    all.s[i] += f * part.s[i];
    all.dropped[i] += f * part.dropped[i];
    all.ee[i] += f * f * part.ee[i];
    all.total[i] += part.total[i];
  }
}

// Choose among the candidates, lse2 [n] known: p of every candidate in place of its x, least mass dropped first
template <typename S>
void choose(const S& streamer, std::vector<Chunk>& chunks, const std::vector<float>& lse2, TokenSums<double>& all,
            double budget, Compact& compact) {
  const Tile& tile = streamer.tile;
  const int64_t n = tile.in.n, padded = tile.padded, count = int64_t(chunks.size());
  std::vector<int64_t> start(count + 1, 0);
  for (int64_t c = 0; c < count; ++c)
    start[c + 1] = start[c] + int64_t(chunks[c].columns.size());
  std::vector<float> mass(start[count]);
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      for (size_t j = 0; j < chunks[c].columns.size(); ++j) {
        float* x = chunks[c].x.data() + int64_t(j) * padded;
        F total(0.f);
        for (int64_t i = 0; i < padded; i += kLanes) {
          const F p = exp2(F::loadu(x + i) - F::loadu(lse2.data() + i));
          p.store(x + i);
          total = total + p;
        }
        mass[start[c] + j] = sum(total);
      }
    }
  });
  std::vector<char> keep(mass.size(), 1);
  std::vector<int64_t> order(mass.size());
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return mass[a] < mass[b]; });
  std::vector<int32_t> columns;
  for (const auto& chunk : chunks)
    columns.insert(columns.end(), chunk.columns.begin(), chunk.columns.end());
  const auto is_target = [&](int32_t v) {
    const auto t = std::lower_bound(
        tile.targets.begin(), tile.targets.end(), v, [](Target a, int64_t b) { return a.column < b; });
    return t != tile.targets.end() && t->column == v;
  };
  for (const int64_t j : order) {
    if (mass[j] > budget)
      break;
    if (is_target(columns[j]))
      continue;
    keep[j] = 0;
    budget -= mass[j];
  }
  std::vector<int64_t> slot(mass.size() + 1, 0);
  for (size_t j = 0; j < mass.size(); ++j)
    slot[j + 1] = slot[j] + keep[j];
  if (double(slot.back()) > kDense * double(tile.in.vocab))
    return;
  compact.columns.resize(slot.back());
  compact.probs.resize(slot.back() * n);
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      auto& dropped = chunks[c].sums.dropped;  // from here on: of this chunk's candidates
      std::fill(dropped.begin(), dropped.end(), 0.f);
      for (int64_t j = start[c]; j < start[c + 1]; ++j) {
        const float* p = chunks[c].x.data() + (j - start[c]) * padded;
        if (keep[j]) {
          compact.columns[slot[j]] = columns[j];
          at::vec::convert(p, compact.probs.data() + slot[j] * n, n);
        } else {
          for (int64_t i = 0; i < n; ++i)
            dropped[i] += p[i];
          streamer.add_row(columns[j], mass[j], chunks[c]);
        }
      }
    }
  });
  std::vector<double> row(tile.in.width);
  double row_mass = 0;
  for (const auto& chunk : chunks) {
    for (int64_t i = 0; i < n; ++i)
      all.dropped[i] += chunk.sums.dropped[i] * all.s[i];
    for (int64_t k = 0; k < tile.in.width; ++k)
      row[k] += chunk.row_sum[k];
    row_mass += chunk.row_mass;
  }
  compact.dropped.resize(n);
  for (int64_t i = 0; i < n; ++i)
    compact.dropped[i] = float(all.dropped[i] / all.s[i]);
  compact.mean_row.resize(tile.in.width);
  for (int64_t k = 0; k < tile.in.width; ++k)
    compact.mean_row[k] = float(row_mass > 0 ? row[k] / row_mass : 0);
}

template <typename W, bool kSoftcap, bool kStats>
void run(
    const StreamInputs& in, double grad_tol, double workspace_mb, const RowResults& out, Compact& compact) {
  Tile tile(in);
  const Streamer<W, kSoftcap, kStats> streamer(tile, grad_tol);
  const int64_t n = in.n, count = (in.vocab + kChunk - 1) / kChunk;
  for (int64_t i = 0; i < n; ++i) {
    const double x = streamer.base2.core(double(streamer.target_logit(i))) * streamer.base2.factor;
    tile.bound[i] = std::isfinite(x) ? float(x) : 0.f;
  }
  TokenSums<double> all(n, -std::numeric_limits<double>::infinity());
  std::copy_n(tile.bound.begin(), n, all.m.begin());
  std::vector<Chunk> chunks(count, Chunk(0, 0));

  const auto wave = [&](int64_t from, int64_t to, bool collect) {
    at::parallel_for(from, to, 1, [&](int64_t begin, int64_t end) {
      Scratch scratch;
      for (int64_t c = begin; c < end; ++c) {
        chunks[c] = Chunk(tile.padded, in.width);
        streamer.chunk(c * kChunk, std::min(in.vocab, (c + 1) * kChunk), collect, scratch, chunks[c]);
      }
      at::native::cpublas::brgemm_release(true);
    });
  };
  const auto raise_bound = [&](const TokenSums<double>& seen) {
    for (int64_t i = 0; i < n; ++i)  // the target's own term is in s only after its chunk: m alone is a bound too
      tile.bound[i] = float(seen.m[i] + std::max(0., std::log2(seen.s[i])));
  };

  bool collect = grad_tol > 0;
  const int64_t probe = std::min(kProbe, count);
  if (collect) {
    wave(0, probe, false);
    TokenSums<double> probed = all;
    for (int64_t c = 0; c < probe; ++c)
      merge(probed, chunks[c].sums, n);
    raise_bound(probed);
  }
  // Their x may take half of the workspace: vectors grow by doubling
  const double fit = workspace_mb * 0x1p20 / 2 / double(sizeof(float) * tile.padded);
  const int64_t most_candidates = int64_t(std::min(kCandidates * double(in.vocab), fit));
  int64_t candidates = 0;
  for (int64_t from = 0; from < count; from += kWave) {
    const int64_t to = std::min(count, from + kWave);
    wave(from, to, collect);
    for (int64_t c = from; c < to; ++c) {
      const auto& part = chunks[c].sums;
      merge(all, part, n);
      if constexpr (kStats) {
        for (int64_t i = 0; i < n; ++i) {
          const int64_t own = in.targets[i] / kChunk;
          all.before[i] = std::max<double>(all.before[i], c < own ? part.after[i] : part.before[i]);
          if (c >= own)
            all.after[i] = std::max<double>(all.after[i], part.after[i]);
        }
      }
      candidates += int64_t(chunks[c].columns.size());
    }
    raise_bound(all);
    if (collect && candidates > most_candidates) {
      collect = false;
      for (auto& chunk : chunks)
        chunk.x = {};
    }
  }

  std::vector<float> lse2(tile.padded, kInfinity);
  const double to_z = streamer.base2.unit;
  for (int64_t i = 0; i < n; ++i) {
    const double log2_s = std::log2(all.s[i]);
    lse2[i] = float(all.m[i] + log2_s);
    out.logps[i] = float(streamer.base2.to_natural(tile.target_x[i] - all.m[i]) - kLn2 * log2_s);
    out.lse[i] = float(streamer.base2.to_natural(all.m[i]) + kLn2 * log2_s);
    if constexpr (kStats) {
      out.entropy[i] = float(kLn2 * (log2_s - all.ex[i] / all.s[i]));
      out.mean_logits[i] = float(to_z * all.total[i] / double(in.vocab));
      out.log_sum_sq_probs[i] = float(kLn2 * (std::log2(all.ee[i]) - 2 * log2_s));
      out.is_top1[i] = tile.target_raw[i] > all.before[i] && tile.target_raw[i] >= all.after[i];
    }
  }
  const double budget = grad_tol * double(n) - [&] {
    double dropped = 0;
    for (int64_t i = 0; i < n; ++i)
      dropped += all.dropped[i] / all.s[i];
    return dropped;
  }();
  // A NaN or infinite lse has no order of masses to choose by; a NaN budget fails the comparison
  const bool finite = std::all_of(lse2.begin(), lse2.begin() + n, [](float x) { return std::isfinite(x); });
  if (collect && finite && budget >= 0)
    choose(streamer, chunks, lse2, all, budget, compact);
}

template <typename W>
void dispatch(
    const StreamInputs& in, double grad_tol, double workspace_mb, const RowResults& out, Compact& compact) {
  const bool stats = out.entropy != nullptr;
  const auto function = in.transform.softcap ? (stats ? run<W, true, true> : run<W, true, false>)
                                             : (stats ? run<W, false, true> : run<W, false, false>);
  function(in, grad_tol, workspace_mb, out, compact);
}

}  // namespace

void stream_forward(
    const StreamInputs& in, double grad_tol, double workspace_mb, const RowResults& out, Compact& compact) {
  (in.float_weight ? dispatch<float> : dispatch<BFloat16>)(in, grad_tol, workspace_mb, out, compact);
}

}  // namespace fastdpo
