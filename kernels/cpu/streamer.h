// A tile's pass over some columns of the vocabulary: products that stay in cache, sums over them, candidates.
#pragma once

#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <numeric>
#include <utility>

#include "stream_tile.h"
#include "transform.h"

namespace fastdpo {

using c10::BFloat16;

constexpr int64_t kRows = 32;  // rows of weight a product: [32, 256] float32 is 32 KB
constexpr int64_t kGroup = 4;  // columns a pass over the tokens' sums
constexpr double kSlack = 256;  // eps = grad_tol / kSlack
constexpr float kOverflow = 60;  // x - m beyond this: m rises at once

// What a pass over the vocabulary leaves beside the sums
enum class Keep { kNothing, kCandidates, kExponentials };

struct Scratch {
  std::vector<float> logits;  // [32, padded n]
  std::vector<BFloat16> weight;  // [32, H], where weight is float32, or rows from here and there
  std::vector<uint8_t> bytes;  // [32, H up to 4]
  std::vector<int32_t> products;  // [32, padded n] of bytes
  std::vector<int64_t> again;  // columns that were screened, and are to be computed exactly
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

  // Rows of weight from here and there, in bf16: [rows, H]
  void gather(const int64_t* columns, int64_t rows, std::vector<BFloat16>& out) const {
    out.resize(kRows * tile.in.width);
    for (int64_t r = 0; r < rows; ++r)
      std::copy_n(weight(columns[r]), tile.in.width, out.data() + r * tile.in.width);
  }

  // Raw logits without bias, [rows, padded n], of rows of weight `stride` apart
  void product(int64_t rows, const BFloat16* block, int64_t stride, std::vector<float>& out) const {
    out.resize(kRows * tile.padded);
    at::native::cpublas::brgemm(
        rows, tile.padded, tile.in.width, stride, tile.padded, tile.padded, false, block, tile.packed.data(), out.data(),
        true);
  }

  // The tile's targets are likely columns of all of its tokens: bound = log2 of the sum over them, where that is more
  void raise_bounds() {
    const auto& in = tile.in;
    std::vector<int64_t> columns;
    for (const auto& target : tile.targets)
      if (target.column < in.vocab && (columns.empty() || columns.back() != target.column))
        columns.push_back(target.column);
    std::vector<BFloat16> rows;
    std::vector<float> logits, sums(tile.padded, 0.f);
    const F factor(base2.factor);
    for (size_t first = 0; first < columns.size(); first += kRows) {
      const int64_t count = std::min<int64_t>(kRows, int64_t(columns.size() - first));
      gather(columns.data() + first, count, rows);
      product(count, rows.data(), in.width, logits);
      for (int64_t r = 0; r < count; ++r) {
        const F bias(in_bias(columns[first + r]));
        for (int64_t i = 0; i < tile.padded; i += kLanes) {
          const F core = base2.core(F::loadu(logits.data() + r * tile.padded + i) + bias);
          const F e = exp2(at::vec::fmsub(core, factor, F::loadu(tile.bound.data() + i)));
          (F::loadu(sums.data() + i) + e).store(sums.data() + i);
        }
      }
    }
    at::native::cpublas::brgemm_release(true);
    for (int64_t i = 0; i < in.n; ++i)
      if (sums[i] > 1 && std::isfinite(sums[i]))
        tile.bound[i] += std::log2(sums[i]);
  }

  // Columns first .. last-1 into `out`
  void chunk(int64_t first, int64_t last, Keep keep, bool screened, Scratch& scratch, Chunk& out) {
    const auto& in = tile.in;
    std::copy(tile.bound.begin(), tile.bound.end(), out.sums.m.begin());
    auto target = tile.first_target(first);
    scratch.again.clear();
    for (int64_t v0 = first; v0 < last; v0 += kRows) {
      const int64_t rows = std::min(kRows, last - v0);
      if (screened) {
        screen(v0, rows, last, keep, scratch, out);
        while (int64_t(scratch.again.size()) >= kRows)
          exactly_again(kRows, keep, scratch, target, out);
        continue;
      }
      int64_t columns[kRows];
      std::iota(columns, columns + rows, v0);
      const auto [block, stride] = weight_rows(weight(v0), in.weight_stride, rows, in.width, scratch.weight);
      exactly(columns, rows, last, block, stride, keep, scratch, target, out);
    }
    exactly_again(int64_t(scratch.again.size()), keep, scratch, target, out);
  }

  // The columns given, ascending, whose rows of weight are block [rows, H]
  void exactly(
      const int64_t* columns, int64_t rows, int64_t last, const BFloat16* block, int64_t stride, Keep keep,
      Scratch& scratch, std::vector<Target>::const_iterator& target, Chunk& out) {
    product(rows, block, stride, scratch.logits);
    for (int64_t r = 0; r < rows;) {
      // The next rows, while the exponentials of these are computed
      for (int64_t v = columns[rows - 1] + 1 + r, end = std::min(last, v + kGroup); v < end; ++v)
        tile.prefetch_row(v);
      const bool whole = r + kGroup <= rows;
      const bool target_near = whole && target != tile.targets.end() && target->column <= columns[r + kGroup - 1];
      // is_top1 asks what stands before and what after a target: then column by column
      const bool together = whole && !(kStats && target_near);
      const auto next = together ? of<kGroup>(keep) : of<1>(keep);
      (this->*next)(columns + r, scratch.logits.data() + r * tile.padded, target, out);
      r += together ? kGroup : 1;
    }
  }

  // The first `rows` of the columns that were screened and matter
  void exactly_again(
      int64_t rows, Keep keep, Scratch& scratch, std::vector<Target>::const_iterator& target, Chunk& out) {
    if (rows == 0)
      return;
    out.again += rows;
    gather(scratch.again.data(), rows, scratch.weight);
    exactly(scratch.again.data(), rows, 0, scratch.weight.data(), tile.in.width, keep, scratch, target, out);
    scratch.again.erase(scratch.again.begin(), scratch.again.begin() + rows);
  }

  // Columns v0 .. v0+rows-1 from 8-bit products (screen.h): into the sums where that is enough, else to be done again
  void screen(int64_t v0, int64_t rows, int64_t last, Keep keep, Scratch& scratch, Chunk& out) {
    const auto& screen = tile.screen;
    scratch.bytes.resize(kRows * screen.depth);
    scratch.products.resize(kRows * tile.padded);
    scratch.logits.resize(kRows * tile.padded);
    float scales[kRows], shifts[kRows], thresholds[kRows];
    const float per_raw = std::abs(base2.slope) * float(kLog2e);
    for (int64_t r = 0; r < rows; ++r) {
      const W* row = weight(v0 + r);
      const auto [most, squares] = extent(row, tile.in.width);
      scales[r] = most / 127;
      const auto [sigma, mean_variance] = screen.error(scales[r], squares);
      shifts[r] = float(kLn2 / 2) * mean_variance * per_raw * per_raw;
      thresholds[r] = sigma * per_raw <= kMostSigma ? log2_eps - 3 * sigma * per_raw : -kInfinity;
      to_bytes(row, tile.in.width, most > 0 ? 127 / most : 0, 128, scratch.bytes.data() + r * screen.depth);
    }
    at::native::cpublas::brgemm(
        rows, tile.padded, screen.depth, screen.depth, tile.padded, tile.padded, false, scratch.bytes.data(),
        screen.packed.data(), scratch.products.data(), true);
    auto target = tile.first_target(v0);
    for (int64_t r = 0; r < rows; r += kGroup) {
      for (int64_t v = v0 + kRows + r, end = std::min(last, v + kGroup); v < end; ++v)
        tile.prefetch_row(v);
      const int64_t count = std::min(kGroup, rows - r);
      float taken[kGroup] = {};  // 1 where the screened logits are taken
      for (int64_t c = 0; c < count; ++c) {
        const int64_t v = v0 + r + c;
        while (target != tile.targets.end() && target->column < v)
          ++target;
        const bool is_target = target != tile.targets.end() && target->column == v;
        const int64_t at = (r + c) * tile.padded;
        const float top = screened_top(
            scratch.products.data() + at, scales[r + c], in_bias(v), out.sums.m.data(), scratch.logits.data() + at);
        if (top > -kInfinity && top <= thresholds[r + c] && !is_target)  // a NaN leaves -infinity
          taken[c] = 1;
        else
          scratch.again.push_back(v);
      }
      if (std::any_of(taken, taken + count, [](float one) { return one > 0; }))
        add_screened(v0 + r, count, taken, shifts + r, scratch.logits.data() + r * tile.padded, keep, out);
    }
  }

  float in_bias(int64_t v) const {
    return tile.in.bias ? tile.in.bias[v] : 0.f;
  }

  // One column's products [padded n] -> core(raw logits); the largest x - m
  float screened_top(const int32_t* products, float column_scale, float column_bias, const float* m, float* core_out) {
    const F scale(column_scale), bias(column_bias), factor(base2.factor);
    F top(-kInfinity);
    for (int64_t i = 0; i < tile.padded; i += kLanes) {
      const auto product = at::vec::Vectorized<int32_t>::loadu(products + i) -
          at::vec::Vectorized<int32_t>::loadu(tile.screen.offset.data() + i);
      const F scales = F::loadu(tile.screen.scale.data() + i) * scale;
      const F core = base2.core(at::vec::fmadd(at::vec::convert_to_fp_of_same_size<float>(product), scales, bias));
      core.store(core_out + i);
      top = larger(at::vec::fmsub(core, factor, F::loadu(m + i)), top);
    }
    return max(top);
  }

  // `count` columns from v on, at x [count, padded n] = core(raw), into the sums; those not taken count nothing
  void add_screened(
      int64_t v, int64_t count, const float* taken, const float* shifts, const float* x, Keep keep, Chunk& out) {
    auto& sums = out.sums;
    const F factor(base2.factor);
    F mass[kGroup];
    std::fill_n(mass, kGroup, F(0.f));
    for (int64_t i = 0; i < tile.padded; i += kLanes) {
      const F m = F::loadu(sums.m.data() + i);
      F s(0.f), ex(0.f), ee(0.f), total(0.f);
      for (int64_t c = 0; c < count; ++c) {
        const F core = F::loadu(x + c * tile.padded + i), one(taken[c]);
        F above = at::vec::fmsub(core, factor, m + F(shifts[c]));
        if constexpr (kStats)
          above = larger(F(-200.f), above);  // in this order a NaN stays
        const F e = taken[c] > 0 ? exp2(above) : F(0.f);
        s = s + e;
        mass[c] = mass[c] + e;
        if constexpr (kStats) {
          total = at::vec::fmadd(core, one, total);
          ex = at::vec::fmadd(e, above, ex);
          ee = at::vec::fmadd(e, e, ee);
        }
      }
      (F::loadu(sums.s.data() + i) + s).store(sums.s.data() + i);
      (F::loadu(sums.dropped.data() + i) + s).store(sums.dropped.data() + i);
      if constexpr (kStats) {
        (F::loadu(sums.total.data() + i) + total).store(sums.total.data() + i);
        (F::loadu(sums.ex.data() + i) + ex).store(sums.ex.data() + i);
        (F::loadu(sums.ee.data() + i) + ee).store(sums.ee.data() + i);
      }
    }
    for (int64_t c = 0; c < count; ++c)
      if (keep == Keep::kCandidates && taken[c] > 0)
        tile.add_row(v + c, sum(mass[c]), out);
  }

  template <int kCount>
  static auto of(Keep keep) {
    return keep == Keep::kCandidates     ? &Streamer::group<kCount, Keep::kCandidates>
           : keep == Keep::kExponentials ? &Streamer::group<kCount, Keep::kExponentials>
                                         : &Streamer::group<kCount, Keep::kNothing>;
  }

  // kCount columns v, ascending, at x [kCount, padded n]: raw logits, then core(raw), then e = 2^(core * factor - m). Several
  // columns at a time, so that the sums of a token are loaded and stored once for all of them.
  template <int kCount, Keep kKeep>
  void group(const int64_t* v, float* x, std::vector<Target>::const_iterator& target, Chunk& out) {
    constexpr bool kCollect = kKeep == Keep::kCandidates;
    const auto& in = tile.in;
    auto& sums = out.sums;
    const int64_t padded = tile.padded;
    const auto firsts = target;
    while (target != tile.targets.end() && target->column <= v[kCount - 1])
      ++target;
    if constexpr (kStats && kCount == 1) {  // what came before this column came before its tokens' targets
      for (auto t = firsts; t != target; ++t)
        sums.before[t->token] = std::exchange(sums.after[t->token], -kInfinity);
    }

    F top[kCount], bias[kCount];
    for (int c = 0; c < kCount; ++c) {
      top[c] = F(-kInfinity);
      bias[c] = F(in_bias(v[c]));
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
      const auto c = std::find(v, v + kCount, t->column) - v;
      tile.target_x[t->token] = x[c * padded + t->token] * base2.factor;
      tops[c] = kInfinity;  // a target is always kept
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
        out.columns.push_back(int32_t(v[c]));
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
        at::vec::convert(x + c * padded, kept.values + v[c] * kept.stride, in.n);
    }
    for (int c = 0; kCollect && c < kCount; ++c)
      if (drop[c] > 0)
        tile.add_row(v[c], sum(mass[c]), out);
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

}  // namespace fastdpo
