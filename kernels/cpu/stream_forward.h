// The streamed forward of ranks that share a vocabulary, which must agree on lse between its two halves.
#pragma once

#include <optional>

#include "stream_tile.h"

namespace fastdpo {

class TileScan {
 public:
  // The next tile: its row results over this rank's columns. What `in` points to must live until choose().
  void rows(const StreamInputs& in, double grad_tol, double workspace_mb, const RowResults& out);

  // Its columns, by probabilities under the lse of all ranks: apart [n] = that less the lse of rows().
  Sparse choose(const double* apart);

  bool waiting() const {
    return tile_.has_value();
  }
  int64_t tokens() const {
    return tile_->in.n;
  }

 private:
  std::vector<Chunk> chunks_;
  std::optional<Tile> tile_;
  Scanned scanned_;
  double workspace_mb_ = 0;
  int64_t tiles_ = 0, dense_ = 0;
};

}  // namespace fastdpo
