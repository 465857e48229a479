// The streamed forward, tile by tile: a pass over the vocabulary (stream.cpp), and the choice of columns (choose.cpp).

#include "stream_forward.h"

#include <cmath>

#include "transform.h"

namespace fastdpo {
namespace {

RowResults from(const RowResults& all, int64_t first) {
  const auto at = [&](auto* values) { return values ? values + first : nullptr; };
  return {at(all.logps), at(all.lse), at(all.entropy), at(all.mean_logits), at(all.log_sum_sq_probs), at(all.is_top1)};
}

// Where most tiles turn out dense, the search for columns is not worth its time
bool worth_searching(int64_t dense, int64_t tiles) {
  return 2 * dense <= tiles + 1;
}

}  // namespace

void trim(std::vector<Chunk>& chunks, double workspace_mb) {
  size_t held = 0;
  for (const auto& chunk : chunks)
    held += chunk.e.size() * sizeof(float);
  if (double(held) > workspace_mb * 0x1p20 / 2)
    for (auto& chunk : chunks)
      chunk.e = {};
}

std::vector<Sparse> stream_forward(
    const StreamInputs& in, int64_t tile_tokens, double grad_tol, bool search, double workspace_mb,
    const RowResults& out, Exponentials& kept) {
  std::vector<Chunk> chunks;
  std::vector<Sparse> tiles;
  int64_t dense = 0;
  for (int64_t first = 0; first < in.n; first += tile_tokens) {
    StreamInputs part = in;
    part.hidden += first * in.width;
    part.targets += first;
    if (part.bounds)
      part.bounds += first;
    part.n = std::min(tile_tokens, in.n - first);
    Tile tile(part, worth_searching(dense, int64_t(tiles.size())) ? grad_tol : 0, search);
    Exponentials of_tile{
        kept.values ? kept.values + first : nullptr, kept.scale ? kept.scale + first : nullptr, in.n};
    auto scanned = scan(tile, chunks, workspace_mb, from(out, first), of_tile);
    tiles.push_back(
        scanned.candidates ? choose(tile, chunks, scanned.lse2, std::move(scanned.dropped)) : Sparse{});
    kept.usable &= of_tile.usable;
    trim(chunks, workspace_mb);
    dense += !scanned.trusted || (search && !tiles.back().columns.defined());
  }
  return tiles;
}

void TileScan::rows(const StreamInputs& in, double grad_tol, double workspace_mb, const RowResults& out) {
  Exponentials none{nullptr, nullptr, in.n};
  tile_.emplace(in, worth_searching(dense_, tiles_) ? grad_tol : 0, true);
  workspace_mb_ = workspace_mb;
  scanned_ = scan(*tile_, chunks_, workspace_mb, out, none);
}

Sparse TileScan::choose(const double* apart) {
  const int64_t n = tile_->in.n;
  for (int64_t i = 0; i < n; ++i) {
    scanned_.lse2[i] += apart[i] / kLn2;
    scanned_.dropped[i] *= std::exp(-apart[i]);
    scanned_.candidates &= std::isfinite(scanned_.lse2[i]);
  }
  const Sparse result =
      scanned_.candidates ? fastdpo::choose(*tile_, chunks_, scanned_.lse2, std::move(scanned_.dropped)) : Sparse{};
  trim(chunks_, workspace_mb_);
  ++tiles_;
  dense_ += !result.columns.defined();
  tile_.reset();
  return result;
}

}  // namespace fastdpo
