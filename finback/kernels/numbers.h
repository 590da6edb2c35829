// fp32, bf16, exp and SiLU, shared by the kernels.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

struct bf16 {
  uint16_t bits;
};

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return float_of(uint32_t(x.bits) << 16); }

inline void narrow(float x, float* y) { *y = x; }
inline void narrow(float x, bf16* y) {  // to nearest, ties to even
  const uint32_t bits = bits_of(x);
  y->bits = std::isnan(x) ? 0x7fc0 : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// exp for x <= 0 to about 1e-7 relative (Cephes' polynomial); inline, so that loops over it vectorize.
inline float exp_(float x) {
  x = std::max(x, -87.0f);
  float n = std::nearbyint(x * 1.44269504f);
  float r = x - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * float_of(uint32_t(int32_t(n) + 127) << 23);
}

// By value: loops in which std::min takes the address of a number are not vectorized.
inline float at_most(float x, float limit) { return limit < x ? limit : x; }
inline float within(float x, float limit) { return at_most(x < -limit ? -limit : x, limit); }

inline float silu(float x) {  // sigmoid without overflow
  const float e = exp_(-std::fabs(x));
  return x * (x < 0 ? e : 1.0f) / (1.0f + e);
}

}  // namespace

// Instantiates the given lines with T as bf16 or float.
#define BOTH(is_bf16, T, ...)  \
  if (is_bf16) {               \
    using T = bf16;            \
    __VA_ARGS__;               \
  } else {                     \
    using T = float;           \
    __VA_ARGS__;               \
  }
