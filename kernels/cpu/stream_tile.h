// What the streamed forward of one tile of tokens holds on its way (stream.cpp, choose.cpp).
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "pack.h"
#include "screen.h"
#include "stream.h"

namespace fastdpo {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNoBound = -1e30f;  // below every x; finite, so that differences are numbers

// Per token, over some columns; as Sums in row_forward.cpp. before/after: largest raw logit on either side of the target
template <typename Real>
struct TokenSums {
  std::vector<Real> m, s, dropped, ex, ee, total, before, after;

  void reset(int64_t n, Real bound) {
    m.assign(n, bound);
    for (auto* sums : {&s, &dropped, &ex, &ee, &total})
      sums->assign(n, 0);
    before.assign(n, -kInfinity);
    after.assign(n, -kInfinity);
  }

  void raise(int64_t i, Real to) {
    const Real delta = to - m[i], f = std::exp2(-delta);
    ex[i] = s[i] == 0 ? 0 : f * (ex[i] - delta * s[i]);
    s[i] *= f;
    dropped[i] *= f;
    ee[i] *= f * f;
    m[i] = to;
  }
};

// Some columns' part. Cleared, not freed, from tile to tile: new memory costs a page fault every 4 KB.
struct Chunk {
  TokenSums<float> sums;
  std::vector<int32_t> columns;  // candidates
  std::vector<float> e;  // [at least the candidates, padded n]: 2^(x - sums.m)
  std::vector<float> row_sum;  // [H] sum of mass * weight[v] over dropped columns; mass: by the bound of their time
  double row_mass = 0;
  int64_t again = 0;  // columns screened in vain

  void reset(int64_t padded, int64_t width) {
    sums.reset(padded, 0);
    columns.clear();
    row_sum.assign(width, 0.f);
    row_mass = 0;
    again = 0;
  }

  // Where the e of the next candidates go. Doubles by hand: resize() would zero what is about to be written
  float* room(int64_t candidates, int64_t padded) {
    const size_t at = columns.size() * padded, needed = at + candidates * padded;
    if (e.size() < needed)
      e.resize(std::max<size_t>(needed, 2 * e.size()));
    return e.data() + at;
  }
};

struct Target {
  int64_t column, token;
};

struct Tile {
  StreamInputs in;  // of the tile's tokens alone
  int64_t padded;  // n, up to whole vectors
  double grad_tol;  // what may be left out; 0: nothing
  bool search;  // for columns to keep
  Screen screen;
  std::vector<c10::BFloat16> packed;  // hidden.T in pairs of k: [H/2, padded, 2]
  std::vector<Target> targets;  // by column
  std::vector<float> bound;  // [padded] x of base 2, at most lse
  // [n] of the target, from the same product as every other logit: x, and the raw logit (negated for a negative scale)
  std::vector<float> target_x, target_raw;

  Tile(const StreamInputs& inputs, double tol, bool with_columns)
      : in(inputs), padded((in.n + kLanes - 1) / kLanes * kLanes), grad_tol(tol), search(with_columns && tol > 0) {
    if (grad_tol > 0 && in.width <= kScreenWidth && in.vocab >= kScreenVocab)
      screen = Screen(in.hidden, in.n, in.width, padded);
    packed = pack_hidden(in.hidden, in.n, in.width, padded);
    for (int64_t i = 0; i < in.n; ++i)
      targets.push_back({in.targets[i], i});
    std::sort(targets.begin(), targets.end(), [](Target a, Target b) {
      return a.column != b.column ? a.column < b.column : a.token < b.token;
    });
    bound.assign(padded, -kNoBound);  // a padding token: 2^(x - 1e30) is nothing, whatever the bias
    target_x.assign(in.n, 0.f);  // of a target on another rank: 0
    target_raw.resize(in.n);
  }

  void make_dense() {
    grad_tol = 0;
    search = false;
    screen = {};
  }

  std::vector<Target>::const_iterator first_target(int64_t column) const {
    return std::lower_bound(
        targets.cbegin(), targets.cend(), column, [](Target t, int64_t v) { return t.column < v; });
  }

  // Row v of weight on its way to the cache, before it is needed
  void prefetch_row(int64_t v) const {
    const int64_t size = in.float_weight ? sizeof(float) : sizeof(c10::BFloat16);
    const char* row = static_cast<const char*>(in.weight) + v * in.weight_stride * size;
    for (int64_t at = 0; at < in.width * size; at += 64)
      __builtin_prefetch(row + at, 0, 2);
  }

  // Column v of `mass` is dropped: into the sum that mean_row is made of, unless it is too small to be seen there
  void add_row(int64_t v, double mass, Chunk& out) const {
    if (mass < grad_tol * double(in.n) / double(in.vocab) / 16)
      return;
    if (in.float_weight)
      axpy(float(mass), static_cast<const float*>(in.weight) + v * in.weight_stride, out.row_sum.data());
    else
      axpy(float(mass), static_cast<const c10::BFloat16*>(in.weight) + v * in.weight_stride, out.row_sum.data());
    out.row_mass += mass;
  }

 private:
  template <typename W>
  void axpy(float factor, const W* row, float* to) const {
    const F factors(factor);
    int64_t k = 0;
    for (; k + kStep <= in.width; k += kStep) {
      const F2 w = load2(row + k), before = load2(to + k);
      store2(to + k, F2{at::vec::fmadd(factors, w.a, before.a), at::vec::fmadd(factors, w.b, before.b)});
    }
    for (; k < in.width; ++k)
      to[k] += factor * float(row[k]);
  }
};

// What a pass over the vocabulary leaves for the choice of columns
struct Scanned {
  bool trusted = false;  // false: 8-bit products were not enough
  bool candidates = false;  // false: none sought, or too many; the tile is dense
  std::vector<double> lse2;  // [padded], base 2; infinite for padding
  std::vector<double> dropped;  // [n] probability of the columns dropped at once
};

// One tile: its row results into `out` (of its tokens), and its candidates into the chunks. `kept`: where grad_tol is 0.
Scanned scan(Tile&, std::vector<Chunk>&, double workspace_mb, const RowResults& out, Exponentials& kept);

// Frees what candidates of another tile needed, where it is more than one tile may hold (half of the workspace).
void trim(std::vector<Chunk>&, double workspace_mb);

// The columns and entries to keep among the chunks' candidates; dropped [n]: what was dropped before. lse2 [padded]: in
// base 2, infinite for padding. Not defined where they would be too many.
Sparse choose(const Tile&, std::vector<Chunk>&, const std::vector<double>& lse2, std::vector<double> dropped);

}  // namespace fastdpo
