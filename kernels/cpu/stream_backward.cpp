// The compact backward: D [k, n] = gradient of a tile's kept logits (compact_gradient.h; 0 where P has no entry), and
// over all tiles
//
//   dX = D.T @ weight[S] - slope (g t) ⊗ mean_row        dW[S] += D @ X        db[S] += D.sum(tokens)
//
// dX: a task is one tile and a slice of H; its sum [n, slice] float32 stays in the second cache while the kept columns
// pass. dW: a task is a range of the vocabulary; all tiles add to its kept rows in float32, [rows, H] in cache, and
// every row of the range is written once: rounded, or zeros. No other buffer, and no sum depends on the threads.

#include <ATen/cpu/vec/vec.h>

#include <cstring>

#include "compact_gradient.h"
#include "pack.h"
#include "stream.h"
#include "tasks.h"

namespace fastdpo {
namespace {

using c10::BFloat16;

constexpr int64_t kColumns = 128;  // kept columns a product of dX, in steps of kStep: few shapes, few compiled products
constexpr int64_t kAhead = 16;  // kept columns whose rows of weight are fetched before they are packed
constexpr int64_t kSlice = 320;  // of H, a task of dX: [256, 320] float32 is 320 KB
constexpr int64_t kRows = 64;  // rows a product of dW, in steps of kRowStep
constexpr int64_t kRowStep = 16;
constexpr int64_t kSumBytes = 1 << 20;  // the rows of dW that a task sums

int64_t up(int64_t n, int64_t step) {
  return (n + step - 1) / step * step;
}

struct Target {
  int64_t slot, token;  // slot: of the target among the tile's columns
};

// One tile, as both passes want it
struct Tile {
  int64_t first, n, even, k;  // even: n, up to an even number
  const int32_t *columns, *starts, *entries;
  const float *dropped, *mean_row;
  std::vector<Target> targets;  // by slot

  Tile(const CompactTile& tile, const int64_t* all_targets)
      : first(tile.first),
        n(tile.n),
        even(up(tile.n, 2)),
        k(tile.kept.columns.numel()),
        columns(tile.kept.columns.const_data_ptr<int32_t>()),
        starts(tile.kept.starts.const_data_ptr<int32_t>()),
        entries(tile.kept.entries.const_data_ptr<int32_t>()),
        dropped(tile.kept.dropped.const_data_ptr<float>()),
        mean_row(tile.kept.mean_row.const_data_ptr<float>()) {
    for (int64_t i = 0; i < n; ++i)
      targets.push_back({slot_of(all_targets[first + i]), i});
    std::sort(targets.begin(), targets.end(), [](Target a, Target b) {
      return a.slot != b.slot ? a.slot < b.slot : a.token < b.token;
    });
  }

  int64_t slot_of(int64_t column) const {
    return std::lower_bound(columns, columns + k, column) - columns;
  }

  // D of slots begin .. end-1 into the first rows of `out` [rows, even]; the others become zero
  void gradient(
      const CompactGradient& gradient, int64_t begin, int64_t end, int64_t rows, std::vector<BFloat16>& out) const {
    out.assign(rows * even, BFloat16(0));
    for (int64_t j = begin; j < end; ++j) {
      BFloat16* row = out.data() + (j - begin) * even;
      for (int32_t e = starts[j]; e < starts[j + 1]; ++e) {
        const uint32_t entry = uint32_t(entries[e]), token = entry >> 16;
        row[token] = BFloat16(
            gradient.entry(BFloat16(uint16_t(entry), BFloat16::from_bits()), first + int64_t(token)));
      }
    }
    auto target = std::lower_bound(
        targets.begin(), targets.end(), begin, [](Target t, int64_t slot) { return t.slot < slot; });
    for (; target != targets.end() && target->slot < end; ++target)
      out[(target->slot - begin) * even + target->token] = BFloat16(gradient.target(first + target->token));
  }
};

// a [rows, n] (rows even, `stride` apart) -> out [n, rows]: pairs of rows travel as 32-bit elements
void transpose(const BFloat16* a, int64_t rows, int64_t n, int64_t stride, std::vector<BFloat16>& pairs, BFloat16* out) {
  pairs.resize(rows * n);
  for (int64_t r = 0; r < rows; r += 2)
    interleave(a + r * stride, a + (r + 1) * stride, n, pairs.data() + r * n);
  at::vec::transpose_mxn<float>(
      reinterpret_cast<const float*>(pairs.data()), n, reinterpret_cast<float*>(out), rows / 2, int(rows / 2), int(n));
}

template <typename W>
struct Backward {
  const StreamInputs& in;
  const RowGrads& grads;
  CompactGradient gradient;
  std::vector<Tile> tiles;

  Backward(const StreamInputs& inputs, const RowGrads& row_grads, const std::vector<CompactTile>& given)
      : in(inputs), grads(row_grads), gradient(row_grads, inputs.transform) {
    for (const auto& tile : given)
      tiles.emplace_back(tile, in.targets);
  }

  const W* weight(int64_t v) const {
    return static_cast<const W*>(in.weight) + v * in.weight_stride;
  }

  void hidden(float* dx) const {
    const int64_t slices = (in.width + kSlice - 1) / kSlice;
    each_task(0, int64_t(tiles.size()) * slices, [&] {
      return [&, sum = std::vector<float>(), d = std::vector<BFloat16>(), pairs = std::vector<BFloat16>(),
              dt = std::vector<BFloat16>(), w = std::vector<BFloat16>(),
              rounded = std::vector<BFloat16>(2 * kSlice)](int64_t task) mutable {
        const Tile& tile = tiles[task / slices];
        const int64_t h0 = task % slices * kSlice, width = std::min(kSlice, in.width - h0);
        sum.assign(tile.n * width, 0.f);
        for (int64_t begin = 0; begin < tile.k; begin += kColumns) {
          const int64_t end = std::min(tile.k, begin + kColumns), columns = up(end - begin, kStep);
          tile.gradient(gradient, begin, end, columns, d);
          dt.resize(tile.n * columns);
          transpose(d.data(), columns, tile.n, tile.even, pairs, dt.data());
          w.assign(columns * width, BFloat16(0));
          for (int64_t j = begin; j < end; j += 2) {
            for (int64_t ahead = j + kAhead; ahead < std::min(tile.k, j + kAhead + 2); ++ahead)
              for (int64_t h = 0; h < width; h += 64 / int64_t(sizeof(W)))
                __builtin_prefetch(weight(tile.columns[ahead]) + h0 + h, 0, 2);
            const int64_t next = std::min(j + 1, end - 1);  // D is zero where there is none
            interleave(
                bf16_row(weight(tile.columns[j]) + h0, width, rounded.data()),
                bf16_row(weight(tile.columns[next]) + h0, width, rounded.data() + kSlice), width,
                w.data() + (j - begin) * width);
          }
          at::native::cpublas::brgemm(
              tile.n, width, columns, columns, width, width, true, dt.data(), w.data(), sum.data(), true);
        }
        for (int64_t i = 0; i < tile.n; ++i) {
          const float rest = float(-gradient.slope) * grads.grad_logps[tile.first + i] * tile.dropped[i];
          float* to = dx + (tile.first + i) * in.width + h0;
          for (int64_t h = 0; h < width; ++h)
            to[h] = sum[i * width + h] + rest * tile.mean_row[h0 + h];
        }
      };
    });
  }

  void head(W* dw, float* db, bool add) const {
    std::vector<int32_t> kept;  // columns of any tile, ascending
    {
      std::vector<char> any(in.vocab);
      for (const Tile& tile : tiles)
        for (int64_t j = 0; j < tile.k; ++j)
          any[tile.columns[j]] = 1;
      for (int64_t v = 0; v < in.vocab; ++v)
        if (any[v])
          kept.push_back(int32_t(v));
    }
    const auto packed = packed_tokens();
    const int64_t count = int64_t(kept.size());
    const int64_t step = std::max<int64_t>(kRowStep, kSumBytes / int64_t(sizeof(float)) / in.width);
    each_task(0, std::max<int64_t>(1, (count + step - 1) / step), [&] {
      return [&, sum = std::vector<float>(), sum_bias = std::vector<float>(),
              product = std::vector<float>(kRows * in.width), d = std::vector<BFloat16>()](int64_t task) mutable {
        const int64_t k0 = task * step, k1 = std::min(count, k0 + step);
        sum.assign(dw ? (k1 - k0) * in.width : 0, 0.f);
        sum_bias.assign(k1 - k0, 0.f);
        for (size_t t = 0; k0 < k1 && t < tiles.size(); ++t) {
          const Tile& tile = tiles[t];
          const int64_t last = tile.slot_of(kept[k1 - 1] + 1);
          auto row = kept.begin() + k0;
          for (int64_t begin = tile.slot_of(kept[k0]); begin < last; begin += kRows) {
            const int64_t end = std::min(last, begin + kRows), rows = up(end - begin, kRowStep);
            tile.gradient(gradient, begin, end, rows, d);
            if (dw)
              at::native::cpublas::brgemm(
                  rows, in.width, tile.even, tile.even, in.width, in.width, false, d.data(), packed[t].data(),
                  product.data(), true);
            for (int64_t j = begin; j < end; ++j) {
              row = std::lower_bound(row, kept.end(), tile.columns[j]);
              const int64_t slot = row - kept.begin() - k0;
              if (dw)
                add_to(sum.data() + slot * in.width, product.data() + (j - begin) * in.width);
              for (int64_t i = 0; db && i < tile.n; ++i)
                sum_bias[slot] += float(d[(j - begin) * tile.even + i]);
            }
          }
        }
        // The rows from this task's first kept one to the next task's
        int64_t v = task == 0 ? 0 : kept[k0];
        for (int64_t k = k0; k < k1; ++k) {
          write_zeros(dw, db, v, kept[k], add);
          v = kept[k] + 1;
          if (dw)
            write(dw + kept[k] * in.width, sum.data() + (k - k0) * in.width, add);
          if (db)
            db[kept[k]] = sum_bias[k - k0] + (add ? db[kept[k]] : 0.f);
        }
        write_zeros(dw, db, v, k1 < count ? kept[k1] : in.vocab, add);
      };
    });
  }

 private:
  // hidden of each tile in pairs of tokens: [even/2, H, 2]
  std::vector<std::vector<BFloat16>> packed_tokens() const {
    std::vector<std::vector<BFloat16>> packed(tiles.size());
    const std::vector<BFloat16> zeros(in.width);
    each_task(0, int64_t(tiles.size()), [&] {
      return [&](int64_t t) {
        packed[t].resize(tiles[t].even * in.width);
        for (int64_t i = 0; i < tiles[t].n; i += 2) {
          const BFloat16* x = in.hidden + (tiles[t].first + i) * in.width;
          interleave(x, i + 1 < tiles[t].n ? x + in.width : zeros.data(), in.width, packed[t].data() + i * in.width);
        }
      };
    });
    return packed;
  }

  void add_to(float* sum, const float* product) const {
    for (int64_t h = 0; h < in.width; ++h)
      sum[h] += product[h];
  }

  void write(W* row, const float* sum, bool add) const {
    int64_t h = 0;
    for (; h + kStep <= in.width; h += kStep) {
      const F2 x = load2(sum + h), before = add ? load2(row + h) : F2{F(0.f), F(0.f)};
      store2(row + h, F2{x.a + before.a, x.b + before.b});
    }
    for (; h < in.width; ++h)
      row[h] = W(sum[h] + (add ? float(row[h]) : 0.f));
  }

  void write_zeros(W* dw, float* db, int64_t from, int64_t to, bool add) const {
    if (add || from >= to)
      return;
    if (dw)
      std::memset(dw + from * in.width, 0, (to - from) * in.width * sizeof(W));
    if (db)
      std::fill(db + from, db + to, 0.f);
  }
};

template <typename W>
void run(
    const StreamInputs& in, const RowGrads& grads, const std::vector<CompactTile>& tiles, const StreamGradients& out) {
  const Backward<W> backward(in, grads, tiles);
  if (out.dx)
    backward.hidden(out.dx);
  if (out.dw || out.db)
    backward.head(static_cast<W*>(out.dw), out.db, out.add);
}

}  // namespace

void stream_backward(
    const StreamInputs& in, const RowGrads& grads, const std::vector<CompactTile>& tiles, const StreamGradients& out) {
  (in.float_weight ? run<float> : run<BFloat16>)(in, grads, tiles, out);
}

}  // namespace fastdpo
