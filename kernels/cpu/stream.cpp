// z = hidden @ weight.T streamed over the vocabulary; row results; and the columns that hold the probability.
//
// The product is taken as z.T: 32 rows of weight (dense, as they lie) times the packed tile, [32, n] float32, which
// stays in cache. SIMD runs over tokens, so no sum crosses lanes: per token a bound m <= lse (base 2), s = sum 2^(x-m)
// and the statistics.
//
// A column that nowhere reaches 2^(x-m) > eps nowhere has p > eps, since m <= lse: it is dropped at once, and only its
// mass is noted. The others are candidates: their 2^(x-m) are kept (a few percent of V), and once lse is known those of
// least mass are dropped too, up to the tolerance. The bound starts from the target, and rises from wave to wave: the
// first is of few columns, since most of them become candidates.
//
// Chunks and waves are of fixed sizes and merge in order: results do not depend on the number of threads.

#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <utility>

#include "stream_tile.h"
#include "tasks.h"
#include "transform.h"

namespace fastdpo {
namespace {

using c10::BFloat16;

constexpr int64_t kRows = 32;  // rows of weight a product: [32, 256] float32 is 32 KB
constexpr int64_t kGroup = 4;  // columns a pass over the tokens' sums
constexpr int64_t kChunk = 512;  // rows of weight a task
constexpr int64_t kWave = kWaveRows / kChunk;  // chunks
constexpr int64_t kProbe = kWave / 8;  // chunks that raise the bound for a start
constexpr double kSlack = 256;  // eps = grad_tol / kSlack
constexpr double kCandidates = 0.4;  // of V: with more the tile is dense, and the search ends
constexpr float kOverflow = 60;  // x - m beyond this: m rises at once

// What a pass over the vocabulary leaves beside the sums
enum class Keep { kNothing, kCandidates, kExponentials };

struct Scratch {
  std::vector<float> logits;  // [32, padded n]
  std::vector<BFloat16> weight;  // [32, H], where weight is float32
};

template <typename W, bool kSoftcap, bool kStats>
struct Streamer {
  Tile& tile;
  Base2<kSoftcap> base2;
  float log2_eps;
  Exponentials kept;  // of this tile's tokens
  std::atomic<bool> overflowed{false};

  Streamer(Tile& t, const Exponentials& exponentials)
      : tile(t), base2(t.in.transform), log2_eps(float(std::log2(t.grad_tol / kSlack))), kept(exponentials) {}

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

  void chunk(int64_t first, int64_t last, Keep keep, Scratch& scratch, Chunk& out) {
    const auto& in = tile.in;
    std::copy(tile.bound.begin(), tile.bound.end(), out.sums.m.begin());
    auto target = tile.first_target(first);
    scratch.logits.resize(kRows * tile.padded);
    for (int64_t v0 = first; v0 < last; v0 += kRows) {
      const int64_t rows = std::min(kRows, last - v0);
      const auto [block, stride] = weight_rows(weight(v0), in.weight_stride, rows, in.width, scratch.weight);
      at::native::cpublas::brgemm(
          rows, tile.padded, in.width, stride, tile.padded, tile.padded, false, block, tile.packed.data(),
          scratch.logits.data(), true);
      for (int64_t r = 0; r < rows;) {
        // The next rows, while the exponentials of these are computed
        for (int64_t v = v0 + kRows + r, end = std::min(last, v + kGroup); v < end; ++v)
          tile.prefetch_row(v);
        const bool target_near = target != tile.targets.end() && target->column < v0 + r + kGroup;
        // is_top1 asks what stands before and what after a target: then column by column
        const bool together = r + kGroup <= rows && !(kStats && target_near);
        const auto next = together ? columns<kGroup>(keep) : columns<1>(keep);
        (this->*next)(v0 + r, scratch.logits.data() + r * tile.padded, target, out);
        r += together ? kGroup : 1;
      }
    }
  }

  template <int kCount>
  static auto columns(Keep keep) {
    return keep == Keep::kCandidates     ? &Streamer::group<kCount, Keep::kCandidates>
           : keep == Keep::kExponentials ? &Streamer::group<kCount, Keep::kExponentials>
                                         : &Streamer::group<kCount, Keep::kNothing>;
  }

  // kCount columns from v on, at x [kCount, padded n]: raw logits, then core(raw), then e = 2^(core * factor - m). Several
  // columns at a time, so that the sums of a token are loaded and stored once for all of them.
  template <int kCount, Keep kKeep>
  void group(int64_t v, float* x, std::vector<Target>::const_iterator& target, Chunk& out) {
    constexpr bool kCollect = kKeep == Keep::kCandidates;
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
        const F core = base2.core(raw);
        if (kSoftcap || in.bias)
          core.store(x + c * padded + i);
        top[c] = larger(at::vec::fmsub(core, factor, m), top[c]);  // in this order a NaN hides no other token's
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
      tile.target_x[t->token] = x[(t->column - v) * padded + t->token] * base2.factor;
      tops[t->column - v] = kInfinity;  // a target is always kept
      if constexpr (kStats && kCount == 1)  // alone in `after` until now; it belongs to neither side
        tile.target_raw[t->token] = std::exchange(sums.after[t->token], -kInfinity);
    }
    if (highest > kOverflow)
      raise_overflowing(x, kCount, out);

    F mass[kCount];
    float drop[kCount];  // 1 where the column is dropped at once
    float* e_of[kCount];  // of a candidate
    bool any_drop = false, any_candidate = false;
    for (int c = 0; c < kCount; ++c) {
      mass[c] = F(0.f);
      drop[c] = kCollect && tops[c] <= log2_eps ? 1.f : 0.f;
      any_drop |= drop[c] > 0;
      any_candidate |= kCollect && drop[c] == 0;
      e_of[c] = x + c * padded;
    }
    if (any_candidate) {
      float* next = out.room(kCount, padded);
      for (int c = 0; c < kCount; ++c) {
        if (drop[c] > 0)
          continue;
        out.columns.push_back(int32_t(v + c));
        e_of[c] = std::exchange(next, next + padded);
      }
    }
    for (int64_t i = 0; i < padded; i += kLanes) {
      const F m = F::loadu(sums.m.data() + i);
      F s(0.f), dropped(0.f), ex(0.f), ee(0.f);
      for (int c = 0; c < kCount; ++c) {
        F above = at::vec::fmsub(F::loadu(x + c * padded + i), factor, m);
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
        if constexpr (kKeep == Keep::kExponentials)
          (kSoftcap ? e * base2.flatness(above + m) : e).store(x + c * padded + i);
        else if (any_candidate)
          e.store(e_of[c] + i);
      }
      (F::loadu(sums.s.data() + i) + s).store(sums.s.data() + i);
      if (kCollect && any_drop)
        (F::loadu(sums.dropped.data() + i) + dropped).store(sums.dropped.data() + i);
      if constexpr (kStats) {
        (F::loadu(sums.ex.data() + i) + ex).store(sums.ex.data() + i);
        (F::loadu(sums.ee.data() + i) + ee).store(sums.ee.data() + i);
      }
    }
    if constexpr (kKeep == Keep::kExponentials) {
      for (int c = 0; c < kCount; ++c)
        at::vec::convert(x + c * padded, kept.values + (v + c) * kept.stride, in.n);
    }
    for (int c = 0; kCollect && c < kCount; ++c)
      if (drop[c] > 0)
        tile.add_row(v + c, sum(mass[c]), out);
  }

  // Tokens whose x - m would overflow a later sum: m rises to their largest x
  void raise_overflowing(const float* x, int columns, Chunk& out) {
    overflowed = true;
    for (int64_t i = 0; i < tile.in.n; ++i) {
      float most = x[i];
      for (int c = 1; c < columns; ++c)
        most = base2.factor < 0 ? std::min(most, x[c * tile.padded + i]) : std::max(most, x[c * tile.padded + i]);
      const float to = most * base2.factor, delta = to - out.sums.m[i];
      if (delta > kOverflow && std::isfinite(delta)) {
        out.sums.raise(i, to);
        for (size_t j = 0; j < out.columns.size(); ++j)
          out.e[j * tile.padded + i] *= std::exp2(-delta);
      }
    }
  }
};

void merge(TokenSums<double>& all, const TokenSums<float>& part, int64_t i) {
  if (part.m[i] > all.m[i])
    all.raise(i, part.m[i]);
  const double delta = all.m[i] - part.m[i], f = std::exp2(-delta);
  all.ex[i] += f * (part.ex[i] - delta * part.s[i]);
  all.s[i] += f * part.s[i];
  all.dropped[i] += f * part.dropped[i];
  all.ee[i] += f * f * part.ee[i];
  all.total[i] += part.total[i];
}

// The bounds become factors, and the targets' entries their gradient: p - 1. False where a factor is too small for that.
template <typename Base>
bool finish(
    const Tile& tile, const Base& base2, const std::vector<double>& lse2, const float* logps, const Exponentials& kept) {
  const int64_t waves = (tile.in.vocab + kWaveRows - 1) / kWaveRows;
  bool usable = true;
  for (int64_t i = 0; i < tile.in.n; ++i) {
    for (int64_t w = 0; w < waves; ++w) {
      float& scale = kept.scale[w * kept.stride + i];
      scale = float(std::exp2(scale - lse2[i]));
      usable &= scale > 1e-30f;
    }
    const int64_t y = tile.in.targets[i];
    if (y >= tile.in.vocab)
      continue;
    const double flat = base2.flatness(double(tile.target_x[i])), factor = kept.scale[y / kWaveRows * kept.stride + i];
    kept.values[y * kept.stride + i] = BFloat16(float(flat * std::expm1(double(logps[i])) / factor));
  }
  return usable;
}

template <typename W, bool kSoftcap, bool kStats>
Scanned run(
    Tile& tile, std::vector<Chunk>& chunks, double workspace_mb, const RowResults& out, Exponentials& kept) {
  const auto& in = tile.in;
  Streamer<W, kSoftcap, kStats> streamer(tile, kept);
  const int64_t n = in.n, count = int64_t(chunks.size());
  for (int64_t i = 0; i < n; ++i) {
    const double raw = in.bounds ? in.bounds[i] : streamer.target_logit(i);
    const double x = streamer.base2.core(raw) * streamer.base2.factor;
    tile.bound[i] = std::isfinite(x) ? float(x) : x > 0 ? 0.f : kNoBound;  // rises with the first block
  }
  TokenSums<double> all;
  all.reset(n, -std::numeric_limits<double>::infinity());
  std::copy_n(tile.bound.begin(), n, all.m.begin());

  Keep keep = tile.grad_tol > 0 ? Keep::kCandidates : kept.values ? Keep::kExponentials : Keep::kNothing;
  // Their e may take half of the workspace: vectors grow by doubling
  const double fit = workspace_mb * 0x1p20 / 2 / double(sizeof(float) * tile.padded);
  const int64_t most_candidates = int64_t(std::min(kCandidates * double(in.vocab), fit));
  std::atomic<int64_t> candidates{0};  // beyond the most no chunk seeks any: which ones did, nothing depends on
  const auto wave = [&](int64_t from, int64_t to) {
    each_task(from, to, [&] {
      return [&, scratch = Scratch()](int64_t c) mutable {
        const bool none = keep == Keep::kCandidates && from > 0 && candidates > most_candidates;
        chunks[c].reset(tile.padded, in.width);
        streamer.chunk(
            c * kChunk, std::min(in.vocab, (c + 1) * kChunk), none ? Keep::kNothing : keep, scratch, chunks[c]);
        candidates += int64_t(chunks[c].columns.size());
      };
    });
  };
  // The sums of chunks from .. to-1 into `sums`, and what is now known of the bound
  const auto add = [&](int64_t from, int64_t to, TokenSums<double>& sums) {
    at::parallel_for(0, n, 64, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t own = in.targets[i] / kChunk;
        for (int64_t c = from; c < to; ++c) {
          const auto& part = chunks[c].sums;
          merge(sums, part, i);
          if constexpr (kStats) {
            sums.before[i] = std::max<double>(sums.before[i], c < own ? part.after[i] : part.before[i]);
            if (c >= own)
              sums.after[i] = std::max<double>(sums.after[i], part.after[i]);
          }
        }
        // The target's own term is in s only after its chunk: m alone is a bound too
        tile.bound[i] = float(sums.m[i] + std::max(0., std::log2(sums.s[i])));
      }
    });
  };

  if (keep == Keep::kExponentials) {  // waves of equal size, each with one bound; so the first ones are taken twice
    keep = Keep::kNothing;
    const int64_t probe = std::min(kProbe, count);
    TokenSums<double> probed = all;
    wave(0, probe);
    add(0, probe, probed);
    streamer.overflowed = false;
    keep = Keep::kExponentials;
  }
  for (int64_t from = 0, to; from < count; from = to) {
    if (keep == Keep::kExponentials) {
      to = from + kWave;
      std::copy_n(tile.bound.begin(), n, kept.scale + from / kWave * kept.stride);  // a factor once lse is known
    } else {
      // At most an eighth of V, or little: a token whose one likely column is yet to come makes candidates of all others
      to = from + (from == 0 ? kProbe : std::clamp((count + 7) / 8, kProbe, kWave));
    }
    to = std::min(to, count);
    wave(from, to);
    add(from, to, all);
    if (from == 0)  // few enough, whatever they are: their bound was the target's logit alone
      candidates = 0;
  }
  if (keep == Keep::kCandidates && candidates > most_candidates) {
    keep = Keep::kNothing;
    for (auto& chunk : chunks)
      chunk.e = {};
  }

  Scanned found{false, std::vector<double>(tile.padded, kInfinity), std::vector<double>(n)};
  auto& lse2 = found.lse2;
  bool finite = true;
  for (int64_t i = 0; i < n; ++i) {
    const double log2_s = std::log2(all.s[i]);
    lse2[i] = all.m[i] + log2_s;
    finite &= std::isfinite(lse2[i]);
    found.dropped[i] = all.dropped[i] / all.s[i];
    out.logps[i] = float(streamer.base2.to_natural(tile.target_x[i] - all.m[i]) - kLn2 * log2_s);
    out.lse[i] = float(streamer.base2.to_natural(all.m[i]) + kLn2 * log2_s);
    if constexpr (kStats) {
      out.entropy[i] = float(kLn2 * (log2_s - all.ex[i] / all.s[i]));
      out.mean_logits[i] = float(streamer.base2.unit * all.total[i] / double(in.vocab));
      out.log_sum_sq_probs[i] = float(kLn2 * (std::log2(all.ee[i]) - 2 * log2_s));
      out.is_top1[i] = tile.target_raw[i] > all.before[i] && tile.target_raw[i] >= all.after[i];
    }
  }
  if (keep == Keep::kExponentials)
    kept.usable &= finite && !streamer.overflowed && finish(tile, streamer.base2, lse2, out.logps, kept);
  // A NaN or infinite lse has no order of masses to choose by
  found.candidates = keep == Keep::kCandidates && finite;
  return found;
}

template <typename W>
auto runner(bool softcap, bool stats) {
  return softcap ? (stats ? run<W, true, true> : run<W, true, false>)
                 : (stats ? run<W, false, true> : run<W, false, false>);
}

}  // namespace

Scanned scan(Tile& tile, std::vector<Chunk>& chunks, double workspace_mb, const RowResults& out, Exponentials& kept) {
  const bool softcap = tile.in.transform.softcap.has_value(), stats = out.entropy != nullptr;
  chunks.resize((tile.in.vocab + kChunk - 1) / kChunk);
  return (tile.in.float_weight ? runner<float>(softcap, stats) : runner<BFloat16>(softcap, stats))(
      tile, chunks, workspace_mb, out, kept);
}

}  // namespace fastdpo
