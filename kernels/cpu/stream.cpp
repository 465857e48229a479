// z = hidden @ weight.T streamed over the vocabulary; row results; and the columns that hold the probability.
//
// The product is taken as z.T: 32 rows of weight (dense, as they lie) times the packed tile, [32, n] float32, which
// stays in cache. SIMD runs over tokens, so no sum crosses lanes: per token a bound m <= lse (base 2), s = sum 2^(x-m)
// and the statistics.
//
// A column that nowhere reaches 2^(x-m) > eps nowhere has p > eps, since m <= lse: it is dropped at once, and only its
// mass is noted. The others are candidates: their 2^(x-m) are kept (a few percent of V), and once lse is known those of
// least mass are dropped too, up to the tolerance. The bound starts from the targets of the whole tile, the likeliest
// columns that are known, and rises from wave to wave.
//
// With a tolerance most columns are not even computed in bf16: screen.h. A tile whose screened columns turn out to hold
// more than may be dropped is done again without.
//
// Chunks and waves are of fixed sizes and merge in order: results do not depend on the number of threads.

#include "streamer.h"
#include "tasks.h"

namespace fastdpo {
namespace {

constexpr int64_t kChunk = 512;  // rows of weight a task
constexpr int64_t kWave = kWaveRows / kChunk;  // chunks
constexpr int64_t kFirstWave = kWave / 8;
constexpr double kCandidates = 0.4;  // of V: with more the tile is dense, and the search ends
constexpr double kInVain = 0.7;  // of a wave's columns: where so many matter, the next wave is not screened

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
  streamer.raise_bounds();
  const auto at_least = tile.bound;  // of lse; over all ranks
  TokenSums<double> all;
  all.reset(n, -std::numeric_limits<double>::infinity());
  std::copy_n(tile.bound.begin(), n, all.m.begin());

  Keep keep = tile.search ? Keep::kCandidates : kept.values ? Keep::kExponentials : Keep::kNothing;
  // Their e may take half of the workspace: vectors grow by doubling
  const double fit = workspace_mb * 0x1p20 / 2 / double(sizeof(float) * tile.padded);
  const int64_t most_candidates = int64_t(std::min(kCandidates * double(in.vocab), fit));
  std::atomic<int64_t> candidates{0};  // beyond the most the next wave seeks none
  std::atomic<int64_t> matter{0};  // columns of a wave that could not be dropped at once
  bool screening = tile.screen.depth > 0;
  const auto wave = [&](int64_t from, int64_t to) {
    const bool none = keep == Keep::kCandidates && from > 0 && candidates > most_candidates;
    each_task(from, to, [&] {
      return [&, scratch = Scratch()](int64_t c) mutable {
        chunks[c].reset(tile.padded, in.width);
        streamer.chunk(
            c * kChunk, std::min(in.vocab, (c + 1) * kChunk), none ? Keep::kNothing : keep, screening && !none, scratch,
            chunks[c]);
        candidates += int64_t(chunks[c].columns.size());
        matter += screening ? chunks[c].again : int64_t(chunks[c].columns.size());
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

  if (keep == Keep::kExponentials) {  // waves of equal size, each with one bound; so the first chunks are taken twice
    keep = Keep::kNothing;
    const int64_t probe = std::min(kFirstWave, count);
    TokenSums<double> probed = all;
    wave(0, probe);
    add(0, probe, probed);
    streamer.overflowed = false;
    keep = Keep::kExponentials;
  }
  for (int64_t from = 0, to; from < count; from = to) {
    // An eighth of V, or little: a token whose one likely column is yet to come makes candidates of all others
    to = from + (keep == Keep::kExponentials ? kWave : from == 0 ? kFirstWave : std::clamp((count + 7) / 8, kFirstWave, kWave));
    to = std::min(to, count);
    if (keep == Keep::kExponentials)
      std::copy_n(tile.bound.begin(), n, kept.scale + from / kWave * kept.stride);  // a factor once lse is known
    matter = 0;
    wave(from, to);
    add(from, to, all);
    if (from == 0)  // few, whatever they are
      candidates = 0;
    // A first wave says little; one that neither screens nor seeks candidates, nothing
    const bool known = screening || keep == Keep::kCandidates;
    screening = tile.screen.depth && !(keep == Keep::kCandidates && candidates > most_candidates) &&
        (from == 0 || (known && double(matter) <= kInVain * double(kChunk * (to - from))));
  }
  if (keep == Keep::kCandidates && candidates > most_candidates) {
    keep = Keep::kNothing;
    for (auto& chunk : chunks)
      chunk.e = {};
  }

  Scanned found{true, false, std::vector<double>(tile.padded, kInfinity), std::vector<double>(n)};
  auto& lse2 = found.lse2;
  bool finite = true;
  double screened = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double log2_s = std::log2(all.s[i]);
    lse2[i] = all.m[i] + log2_s;
    finite &= std::isfinite(lse2[i]);
    found.dropped[i] = all.dropped[i] / all.s[i];
    screened += found.dropped[i] * std::exp2(std::min(0., lse2[i] - at_least[i]));
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
  found.trusted = !tile.screen.depth || screened <= tile.grad_tol * double(n);  // not of a NaN
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
  const auto one = tile.in.float_weight ? runner<float>(softcap, stats) : runner<BFloat16>(softcap, stats);
  auto found = one(tile, chunks, workspace_mb, out, kept);
  if (!found.trusted) {
    tile.make_dense();
    found = one(tile, chunks, workspace_mb, out, kept);
    found.trusted = false;
  }
  return found;
}

}  // namespace fastdpo
