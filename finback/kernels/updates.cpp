// Updates of parameters on a CPU, each in one pass over memory: AdamW, Muon's momentum, and the step along Muon's direction. bf16
// parameters are rounded stochastically. A multiplication and an addition are fused (fma) exactly where torch's kernels fuse
// them, so that results agree to the bit. The plain twins are in updates.py.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "numbers.h"

namespace {

constexpr int64_t BLOCK = 1 << 14;  // numbers that a thread updates at a time
constexpr int64_t LANES = 8;        // numbers in torch's vectors; torch fuses differently in the remainder at the end

struct Part {
  int64_t row, first, last;
};

// Splits the rows of a table into blocks; column `sizes` has the count of a row's numbers.
std::vector<Part> blocks(const int64_t* table, int64_t rows, int64_t columns, int64_t sizes) {
  std::vector<Part> found;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t size = table[row * columns + sizes];
    for (int64_t first = 0; first < size; first += BLOCK) found.push_back({row, first, std::min(first + BLOCK, size)});
  }
  return found;
}

// 16 random bits that depend only on an index and a key (two rounds of a 32-bit mixing function).
inline uint32_t random16(uint32_t index, uint64_t key) {
  uint32_t x = index + uint32_t(key);
  for (int round = 0; round < 2; ++round) {
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    x ^= x >> 16;
    if (!round) x ^= uint32_t(key >> 32);
  }
  return x >> 16;
}

inline void store(float x, float* y, uint32_t, uint64_t) { *y = x; }
inline void store(float x, bf16* y, uint32_t index, uint64_t key) {  // away from zero with the probability of the cut fraction
  const uint32_t bits = bits_of(x), usual = (bits & 0x7f800000u) != 0x7f800000u;
  y->bits = uint16_t((bits + usual * random16(index, key)) >> 16);
}

struct Adam {
  float scale, decay, weight, beta2, weight2, eps;
};

template <typename T>
void adamw(T* value, const float* gradient, float* first, float* second, Part part, int64_t size, float root, float step,
           const Adam& a, uint32_t offset, uint64_t key) {
  const int64_t whole = std::min(part.last, size / LANES * LANES);
#pragma omp simd
  for (int64_t i = part.first; i < whole; ++i) {
    const float g = gradient[i] * a.scale, m = std::fma(a.weight, g - first[i], first[i]);
    const float v = std::fma(a.weight2 * g, g, second[i] * a.beta2);
    const float x = to_float(value[i]) * a.decay + (-step * m) / (std::sqrt(v) / root + a.eps);
    first[i] = m, second[i] = v;
    store(x, value + i, offset + uint32_t(i), key);
  }
  for (int64_t i = std::max(whole, part.first); i < part.last; ++i) {
    const float g = gradient[i] * a.scale, m = std::fma(a.weight, g - first[i], first[i]);
    const float v = std::fma(second[i], a.beta2, a.weight2 * g * g);
    const float x = to_float(value[i]) * a.decay + (-step * m) / (std::sqrt(v) / root + a.eps);
    first[i] = m, second[i] = v;
    store(x, value + i, offset + uint32_t(i), key);
  }
}

template <typename T>
void momentum(const float* gradient, float* buffer, T* out, Part part, float scale, float decay) {
  for (int64_t i = part.first; i < part.last; ++i) {
    const float g = gradient[i] * scale, b = buffer[i] * decay + g;
    buffer[i] = b;
    if (out) narrow(std::fma(b, decay, g), out + i);
  }
}

template <typename T>
void along(T* value, const float* update, Part part, float decay, float lr, float scale, uint64_t key) {
#pragma omp simd
  for (int64_t i = part.first; i < part.last; ++i)
    store(std::fma(-lr, update[i] * scale, to_float(value[i]) * decay), value + i, uint32_t(i), key);
}

}  // namespace

extern "C" {

// table (rows, 8): parameter, gradient, two moments, count of numbers, whether the parameter is bf16, the index of its first number, key;
// factors (rows, 2): square root of the second moment's bias correction, step size.
void finback_adamw(const int64_t* table, const double* factors, int64_t rows, double scale, double decay, double beta1,
                   double beta2, double eps) {
  const Adam a{float(scale), float(decay), float(1 - beta1), float(beta2), float(1 - beta2), float(eps)};
  const std::vector<Part> parts = blocks(table, rows, 8, 4);
#pragma omp parallel for schedule(static)
  for (int64_t at = 0; at < int64_t(parts.size()); ++at) {
    const int64_t row = parts[at].row, *t = table + row * 8;
    BOTH(t[5], T,
         adamw(reinterpret_cast<T*>(t[0]), reinterpret_cast<const float*>(t[1]), reinterpret_cast<float*>(t[2]),
               reinterpret_cast<float*>(t[3]), parts[at], t[4], float(factors[2 * row]), float(factors[2 * row + 1]), a,
               uint32_t(t[6]), uint64_t(t[7])))
  }
}

// table (rows, 5): gradient, momentum, output for the direction or 0, count of numbers, whether the direction is bf16.
void finback_momentum(const int64_t* table, int64_t rows, double scale, double decay) {
  const std::vector<Part> parts = blocks(table, rows, 5, 3);
#pragma omp parallel for schedule(static)
  for (int64_t at = 0; at < int64_t(parts.size()); ++at) {
    const int64_t* t = table + parts[at].row * 5;
    BOTH(t[4], T,
         momentum(reinterpret_cast<const float*>(t[0]), reinterpret_cast<float*>(t[1]), reinterpret_cast<T*>(t[2]), parts[at],
                  float(scale), float(decay)))
  }
}

// table (rows, 5): parameter, direction, count of numbers, whether the parameter is bf16, key; scales (rows,) of the directions.
void finback_along(const int64_t* table, const double* scales, int64_t rows, double decay, double lr) {
  const std::vector<Part> parts = blocks(table, rows, 5, 2);
#pragma omp parallel for schedule(static)
  for (int64_t at = 0; at < int64_t(parts.size()); ++at) {
    const int64_t* t = table + parts[at].row * 5;
    BOTH(t[3], T,
         along(reinterpret_cast<T*>(t[0]), reinterpret_cast<const float*>(t[1]), parts[at], float(decay), float(lr),
               float(scales[parts[at].row]), uint64_t(t[4])))
  }
}
}
