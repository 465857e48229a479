// The transformed logit in base 2, x = z * log2(e) = core(raw) * factor, and dz/draw; constants folded once per call.
#pragma once

#include <cmath>

#include "kernels.h"
#include "simd.h"

namespace fastdpo {

constexpr double kLog2e = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

template <bool kSoftcap>
struct Base2 {
  float in;  // softcap: exp(2u) = 2^(raw * in) for core = tanh(u)
  float factor;  // float, and every later use of log2(e) is relative to it: its rounding is a common factor of all x
  float slope;  // dz/draw = slope * (1 - tanh(u)^2)
  double unit;  // factor in units of z: z = core * unit

  explicit Base2(const Transform& t) {
    slope = float(t.logit_scale / t.temperature);
    in = kSoftcap ? float(2 * kLog2e * t.logit_scale / *t.softcap) : t.logit_scale < 0 ? -1.f : 1.f;
    unit = kSoftcap ? *t.softcap / t.temperature : t.logit_scale / t.temperature;
    factor = float(kLog2e * unit);
  }

  // raw, or tanh(u) = 1 - 2 / (exp(2u) + 1); beyond |2u log2 e| = 60 that is 1 to float's last bit
  F core(F raw) const {
    if constexpr (!kSoftcap)
      return raw;
    const F e = exp2(at::vec::clamp(raw * F(in), F(-60.f), F(60.f)));
    return F(1.f) - F(2.f) / (e + F(1.f));
  }
  double core(double raw) const {
    return kSoftcap ? std::tanh(raw * in * (kLn2 / 2)) : raw;
  }

  // (dz/draw) / slope = 1 - tanh(u)^2, from x
  F flatness(F x) const {
    const F tanh = at::vec::clamp(x * F(1.f / factor), F(-1.f), F(1.f));
    return F(1.f) - tanh * tanh;
  }
  double flatness(double x) const {
    const double tanh = kSoftcap ? x / factor : 0;
    return 1 - tanh * tanh;
  }

  // z in base 2 as x is: with factor's rounding
  double from_natural(double z) const {
    return unit == 0 ? z * kLog2e : z * (factor / unit);
  }
  double to_natural(double x) const {
    return factor == 0 ? x * kLn2 : x * (unit / factor);
  }
};

}  // namespace fastdpo
