// The head streamed: logits in blocks that stay in cache, in float32, never as [n, V].
#pragma once

#include <ATen/core/Tensor.h>
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
  const int64_t* targets;  // [n], in [0, V]; V: on another rank, its logit counts as 0
  int64_t n, vocab, width;  // width: H, even
  Transform transform;
  const float* bounds = nullptr;  // [n] raw logits that stand somewhere in their rows; null: the targets'
};

// What a tile keeps (fastdpo/compaction.py): of P = p[:, columns] only the entries that are worth their memory, a
// fifth of it on real text. Not defined: the softmax was not sparse enough, the tile is to be handled as dense.
struct Sparse {
  at::Tensor columns;  // int32 [k] ascending, every target of this rank among them
  at::Tensor starts;  // int32 [k + 1] entries of column c: starts[c] .. starts[c+1]-1
  at::Tensor entries;  // int32 [e] token << 16 | bits of p in bf16
  at::Tensor dropped;  // float32 [n] probability outside of the entries
  at::Tensor mean_row;  // float32 [H] mean of the dropped rows of weight, about by their mass
};

constexpr int64_t kWaveRows = 32768;  // columns that share a factor

// What the exact backward needs of each logit: -(d logp / d raw logit) = slope * values * scale of its column's wave.
struct Exponentials {
  c10::BFloat16* values;  // [V, n] or null: 2^(x - bound) times dz/dz's flatness; at a target its own, p - 1 in p's place
  float* scale;  // [waves, n]: 2^(bound - lse)
  int64_t stride;  // of tokens: n, of the whole batch
  bool usable = true;  // false: a logit left the range of these numbers
};

// Row results of all tokens; and, with `search`, one Sparse for each tile of tile_tokens. grad_tol: what may be left out
// of the columns, at most grad_tol * n in sum, and of products in bf16 (screen.h); 0: nothing, no columns, and `kept`
// where it is not null. workspace_mb bounds what the search may hold; a tile that needs more is dense.
std::vector<Sparse> stream_forward(
    const StreamInputs&, int64_t tile_tokens, double grad_tol, bool search, double workspace_mb, const RowResults& out,
    Exponentials& kept);

// d(sum grad_logps*logps + grad_entropy*entropy) / d(raw logits of columns first .. last-1), transposed: out [last-first, n]
void stream_gradient(const StreamInputs&, const RowGrads&, int64_t first, int64_t last, c10::BFloat16* out);

struct CompactTile {
  int64_t first, n;  // its tokens
  const Sparse& kept;
};

// The compact backward of tiles: dX [n, H] float32 of their tokens, dW [V, H] and db [V] whole. Null: not needed.
// add: dW and db hold the dense tiles' part already; otherwise they are written everywhere.
struct StreamGradients {
  float* dx;
  void* dw;  // in weight's dtype
  float* db;
  bool add;
};
void stream_backward(
    const StreamInputs&, const RowGrads&, const std::vector<CompactTile>&, const StreamGradients& out);

}  // namespace fastdpo
