// The head streamed: logits of one tile of tokens in blocks that stay in cache, in float32, never as [n, V].
#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>
#include <vector>

#include "kernels.h"

namespace fastdpo {

struct StreamInputs {
  const c10::BFloat16* hidden;  // [n, H] dense
  const void* weight;  // [V, H] bf16, or float32 that is rounded to bf16 on its way; rows weight_stride elements apart
  bool float_weight;
  int64_t weight_stride;
  const float* bias;  // [V] or null
  const int64_t* targets;  // [n], all in [0, V)
  int64_t n, vocab, width;  // width: H, even
  Transform transform;
};

// The columns that a tile keeps. None: the softmax was not sparse enough, and the tile is to be handled as dense.
struct Compact {
  std::vector<int32_t> columns;  // [k] ascending, every target among them
  std::vector<c10::BFloat16> probs;  // [k, n]
  std::vector<float> dropped;  // [n] probability outside of the columns
  std::vector<float> mean_row;  // [H] mean of the dropped rows of weight, by their mass
};

// Dropped: at most grad_tol * n in sum. grad_tol = 0: nothing is kept, `compact` stays as it is. workspace_mb bounds
// what the search for columns may hold; a tile that needs more is dense.
void stream_forward(
    const StreamInputs&, double grad_tol, double workspace_mb, const RowResults&, Compact& compact);

// d(sum grad_logps*logps + grad_entropy*entropy) / d(raw logits of columns first .. last-1), transposed: out [last-first, n]
void stream_gradient(const StreamInputs&, const RowGrads&, int64_t first, int64_t last, c10::BFloat16* out);

}  // namespace fastdpo
