// Sums of token logps [N] over sequences: sequence s owns bounds[s] .. bounds[s+1]-1. Then, for B pairs
// (s chosen, s + B rejected), the sigmoid loss of fastdpo/losses/ and its slope:
//
//   h = (chosen - ref_chosen) - (rejected - ref_rejected)
//   loss = mean over pairs of -(1-eps) log sigmoid(beta h) - eps log sigmoid(-beta h)
//   slope = d loss / d chosen = -beta ((1-eps) sigmoid(-beta h) - eps sigmoid(beta h)) / B;  rejected: -slope

#include <cmath>

#include "kernels.h"

namespace fastdpo {
namespace {

double log_sigmoid(double x) {
  return std::min(x, 0.) - std::log1p(std::exp(-std::abs(x)));
}

double sigmoid(double x) {
  return std::exp(log_sigmoid(x));
}

}  // namespace

void sequence_sums(const float* values, const int64_t* bounds, int64_t sequences, float* sums) {
  for (int64_t s = 0; s < sequences; ++s) {
    double total = 0;
    for (int64_t i = bounds[s]; i < bounds[s + 1]; ++i)
      total += values[i];
    sums[s] = float(total);
  }
}

void pair_sigmoid(
    const float* logps, const int64_t* bounds, const float* ref_logps, int64_t pairs, double beta,
    double label_smoothing, float* loss, float* sums, float* slope) {
  sequence_sums(logps, bounds, 2 * pairs, sums);
  double total = 0;
  for (int64_t s = 0; s < pairs; ++s) {
    const double ref = ref_logps ? double(ref_logps[s]) - ref_logps[s + pairs] : 0;
    const double margin = beta * (double(sums[s]) - sums[s + pairs] - ref);
    total -= (1 - label_smoothing) * log_sigmoid(margin) + label_smoothing * log_sigmoid(-margin);
    slope[s] = float(-beta * ((1 - label_smoothing) * sigmoid(-margin) - label_smoothing * sigmoid(margin)) / pairs);
    slope[s + pairs] = -slope[s];
  }
  *loss = pairs ? float(total / pairs) : 0;
}

}  // namespace fastdpo
