// The operations between the products of a training step on a CPU: backward passes of norm and SwiGLU, scattering rows to
// experts and summing them back, rotating heads and laying them out for attention, the softmax of causal attention and of the
// vocabulary, mHC's mixing of residual streams; one pass each, forward and backward. The order of sums does not depend on the
// number of threads. The plain twins are next to the callers.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "numbers.h"

namespace {

inline float sigmoid(float x) {  // without overflow
  const float e = exp_(-std::fabs(x));
  return (x < 0 ? e : 1.0f) / (1.0f + e);
}

// The gradient of x from that of out = gain * x * inverse, plus `other`, a further gradient of x, unless null; and the gain's
// gradient, summed per block of rows: d_gain (blocks, size).
template <typename T>
void norm_backward(const T* x, const float* gain, const float* inverse, const T* grad, const T* other, T* d_x,
                   float* d_gain, int64_t tokens, int64_t size, int64_t block) {
#pragma omp parallel for schedule(static)
  for (int64_t first = 0; first < tokens; first += block) {
    float* sums = d_gain + first / block * size;
    std::fill(sums, sums + size, 0.0f);
    for (int64_t t = first; t < std::min(first + block, tokens); ++t) {
      const T *row = x + t * size, *g = grad + t * size;
      T* to = d_x + t * size;
      const float factor = inverse[t];
      float along = 0;
#pragma omp simd reduction(+ : along)
      for (int64_t i = 0; i < size; ++i) along += to_float(g[i]) * gain[i] * to_float(row[i]);
      along *= factor * factor / float(size);
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) sums[i] += to_float(g[i]) * to_float(row[i]) * factor;
      if (other) {
        const T* more = other + t * size;
#pragma omp simd
        for (int64_t i = 0; i < size; ++i)
          narrow((to_float(g[i]) * gain[i] - to_float(row[i]) * along) * factor + to_float(more[i]), to + i);
      } else {
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) narrow((to_float(g[i]) * gain[i] - to_float(row[i]) * along) * factor, to + i);
      }
    }
  }
}

// The gradient of [gate | up] from that of out = silu(gate) * up (rows, width), with gate clamped to at most `limit` and up to
// -limit ... limit; also recomputes out unless null.
template <typename T>
void swiglu_backward(const T* x, const T* grad, T* d_x, T* out, int64_t rows, int64_t width, float limit) {
#pragma omp parallel for schedule(static)
  for (int64_t t = 0; t < rows; ++t) {
    const T *gate = x + 2 * t * width, *up = gate + width, *g = grad + t * width;
    T *d_gate = d_x + 2 * t * width, *d_up = d_gate + width;
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
      const float gated = to_float(gate[i]), upper = to_float(up[i]), given = to_float(g[i]);
      const float a = at_most(gated, limit), b = within(upper, limit), s = sigmoid(a);
      narrow(gated > limit ? 0.0f : given * b * (s + a * s * (1 - s)), d_gate + i);
      narrow(std::fabs(upper) > limit ? 0.0f : given * a * s, d_up + i);
    }
    if (out)
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) {
        const float a = at_most(to_float(gate[i]), limit), b = within(to_float(up[i]), limit);
        narrow(silu(a) * b, out + t * width + i);
      }
  }
}

// rows[slots[t, j]] = x[t], times weight[t, j] unless that is null. x (tokens, size), slots and weight (tokens, choices).
template <typename T>
void spread(const T* x, const int64_t* slots, const float* weight, T* rows, int64_t tokens, int64_t choices,
            int64_t size) {
#pragma omp parallel for schedule(static)
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t pair = t * choices; pair < (t + 1) * choices; ++pair) {
      T* to = rows + slots[pair] * size;
      if (weight) {
        const float factor = weight[pair];
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) narrow(factor * to_float(x[t * size + i]), to + i);
      } else {
        std::memcpy(to, x + t * size, size * sizeof(T));
      }
    }
}

// out[t] = sum over j of rows[slots[t, j]], each times weight[t, j] unless that is null.
template <typename T>
void gather(const T* rows, const int64_t* slots, const float* weight, T* out, int64_t tokens, int64_t choices,
            int64_t size) {
#pragma omp parallel
  {
    std::vector<float> sums(size);
#pragma omp for schedule(static)
    for (int64_t t = 0; t < tokens; ++t) {
      std::fill(sums.begin(), sums.end(), 0.0f);
      for (int64_t pair = t * choices; pair < (t + 1) * choices; ++pair) {
        const T* row = rows + slots[pair] * size;
        const float factor = weight ? weight[pair] : 1.0f;
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) sums[i] += factor * to_float(row[i]);
      }
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) narrow(sums[i], out + t * size + i);
    }
  }
}

// d_weight[t, j] = grad[t] . rows[slots[t, j]]
template <typename T>
void weigh(const T* rows, const int64_t* slots, const T* grad, float* d_weight, int64_t tokens, int64_t choices,
           int64_t size) {
#pragma omp parallel for schedule(static)
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t pair = t * choices; pair < (t + 1) * choices; ++pair) {
      const T *row = rows + slots[pair] * size, *g = grad + t * size;
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < size; ++i) sum += to_float(g[i]) * to_float(row[i]);
      d_weight[pair] = sum;
    }
}

// Replaces scores (rows, length, length) by softmax(scale * scores) over visible keys, 0 elsewhere. seen (rows / heads, length,
// length) is the mask; null: causal.
template <typename T>
void causal_softmax(T* scores, const uint8_t* seen, float scale, int64_t rows, int64_t heads, int64_t length) {
#pragma omp parallel
  {
    std::vector<float> buffer(length);
    float* s = buffer.data();
#pragma omp for schedule(static)
    for (int64_t line = 0; line < rows * length; ++line) {
      const int64_t query = line % length, row = line / length, count = seen ? length : query + 1;
      const uint8_t* sees = seen ? seen + (row / heads * length + query) * length : nullptr;
      T* x = scores + line * length;
      float top = -INFINITY, sum = 0;
      for (int64_t i = 0; i < count; ++i) s[i] = to_float(x[i]) * scale;
      if (sees)
        for (int64_t i = 0; i < count; ++i) s[i] = sees[i] ? s[i] : -INFINITY;
#pragma omp simd reduction(max : top)
      for (int64_t i = 0; i < count; ++i) top = std::max(top, s[i]);
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < count; ++i) sum += s[i] = s[i] == -INFINITY ? 0.0f : exp_(s[i] - top);
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) narrow(s[i] / sum, x + i);
      for (int64_t i = count; i < length; ++i) narrow(0.0f, x + i);
    }
  }
}

// Replaces the gradient of the softmax's weights by that of its scores. Both (lines, length).
template <typename T>
void softmax_backward(const T* weights, T* grad, float scale, int64_t lines, int64_t length) {
#pragma omp parallel for schedule(static)
  for (int64_t line = 0; line < lines; ++line) {
    const T* w = weights + line * length;
    T* g = grad + line * length;
    float along = 0;
#pragma omp simd reduction(+ : along)
    for (int64_t i = 0; i < length; ++i) along += to_float(w[i]) * to_float(g[i]);
#pragma omp simd
    for (int64_t i = 0; i < length; ++i) narrow((to_float(g[i]) - along) * to_float(w[i]) * scale, g + i);
  }
}

// Replaces logits (rows, size) by softmax - onehot(label), or by 0 if the label is negative; loss (rows,) is -log softmax[label].
template <typename T>
void cross_entropy(T* logits, const int64_t* labels, float* loss, int64_t rows, int64_t size) {
#pragma omp parallel
  {
    std::vector<float> buffer(size);
    float* s = buffer.data();
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
      T* x = logits + row * size;
      const int64_t label = labels[row];
      loss[row] = 0.0f;
      if (label < 0) {
        for (int64_t i = 0; i < size; ++i) narrow(0.0f, x + i);
        continue;
      }
      float top = -INFINITY, sum = 0;
#pragma omp simd reduction(max : top)
      for (int64_t i = 0; i < size; ++i) top = std::max(top, to_float(x[i]));
      const float picked = to_float(x[label]) - top;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < size; ++i) sum += s[i] = exp_(to_float(x[i]) - top);
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) narrow(s[i] / sum, x + i);
      narrow(s[label] / sum - 1.0f, x + label);
      loss[row] = std::log(sum) - picked;
    }
  }
}

// For logits (rows, size) at a temperature: the log softmax of the ids, the entropy, and log sum exp, (rows,) each.
template <typename T>
void token_logprobs(const T* logits, const int64_t* ids, float inverse_temperature, float* logp, float* entropy, float* sums,
                    int64_t rows, int64_t size) {
#pragma omp parallel
  {
    std::vector<float> buffer(size);
    float* s = buffer.data();
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
      const T* x = logits + row * size;
      float top = -INFINITY, sum = 0, mean = 0;
#pragma omp simd reduction(max : top)
      for (int64_t i = 0; i < size; ++i) top = std::max(top, s[i] = to_float(x[i]) * inverse_temperature);
#pragma omp simd reduction(+ : sum, mean)
      for (int64_t i = 0; i < size; ++i) {
        const float gap = s[i] - top, e = exp_(gap);
        sum += e;
        mean += gap * e;
      }
      sums[row] = top + std::log(sum);
      logp[row] = s[ids[row]] - sums[row];
      entropy[row] = std::log(sum) - mean / sum;
    }
  }
}

// The gradient of the logits from that of the ids' log-probabilities.
template <typename T>
void token_logprobs_backward(const T* logits, const int64_t* ids, float inverse_temperature, const float* sums,
                             const float* grad, T* d_logits, int64_t rows, int64_t size) {
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    const T* x = logits + row * size;
    T* to = d_logits + row * size;
    const float given = grad[row] * inverse_temperature, sum = sums[row];
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) narrow(-given * exp_(to_float(x[i]) * inverse_temperature - sum), to + i);
    const int64_t id = ids[row];
    narrow(given * (1.0f - exp_(to_float(x[id]) * inverse_temperature - sum)), to + id);
  }
}

struct Heads {
  int64_t rows, tokens, heads, plain, rotated, value;
  bool interleaved;
  const float *cosine, *sine;  // (rows or 1, tokens, rotated / 2)
  int64_t angles;              // numbers per row of cosine and sine; 0 if all rows share them
};

// Queries (rows, tokens, heads, plain + rotated) -> (rows, heads, tokens, plain + rotated) with the last dimensions rotated;
// backward: the gradient of the former from that of the latter.
template <typename T, bool backward>
void rotate_heads(const Heads& a, const T* from, T* to) {
  const int64_t size = a.plain + a.rotated, half = a.rotated / 2;
#pragma omp parallel for collapse(2) schedule(static)
  for (int64_t row = 0; row < a.rows; ++row)
    for (int64_t head = 0; head < a.heads; ++head)
      for (int64_t t = 0; t < a.tokens; ++t) {
        const int64_t by_token = ((row * a.tokens + t) * a.heads + head) * size;
        const int64_t by_head = ((row * a.heads + head) * a.tokens + t) * size;
        const T* x = from + (backward ? by_head : by_token);
        T* y = to + (backward ? by_token : by_head);
        const float *c = a.cosine + row * a.angles + t * half, *s = a.sine + row * a.angles + t * half;
        std::memcpy(y, x, a.plain * sizeof(T));
        x += a.plain, y += a.plain;
        const int64_t step = a.interleaved ? 2 : 1, apart = a.interleaved ? 1 : half;
        for (int64_t i = 0; i < half; ++i) {
          if (backward) {
            const float first = to_float(x[i]), second = to_float(x[half + i]);
            narrow(first * c[i] + second * s[i], y + step * i);
            narrow(second * c[i] - first * s[i], y + step * i + apart);
          } else {
            const float first = to_float(x[step * i]), second = to_float(x[step * i + apart]);
            narrow(first * c[i] - second * s[i], y + i);
            narrow(first * s[i] + second * c[i], y + half + i);
          }
        }
      }
}

// kv (rows, tokens, heads, plain + value) and the rotated key that heads share (rows, tokens, rotated) -> keys, values by head.
template <typename T>
void split_heads(const Heads& a, const T* kv, const T* shared, T* key, T* value) {
  const int64_t line = a.plain + a.value, size = a.plain + a.rotated;
#pragma omp parallel for collapse(2) schedule(static)
  for (int64_t row = 0; row < a.rows; ++row)
    for (int64_t head = 0; head < a.heads; ++head)
      for (int64_t t = 0; t < a.tokens; ++t) {
        const T* x = kv + ((row * a.tokens + t) * a.heads + head) * line;
        const int64_t at = (row * a.heads + head) * a.tokens + t;
        std::memcpy(key + at * size, x, a.plain * sizeof(T));
        std::memcpy(key + at * size + a.plain, shared + (row * a.tokens + t) * a.rotated, a.rotated * sizeof(T));
        std::memcpy(value + at * a.value, x + a.plain, a.value * sizeof(T));
      }
}

template <typename T>
void split_heads_backward(const Heads& a, const T* d_key, const T* d_value, T* d_kv, T* d_shared) {
  const int64_t line = a.plain + a.value, size = a.plain + a.rotated;
#pragma omp parallel
  {
    std::vector<float> sums(a.rotated);
#pragma omp for collapse(2) schedule(static)
    for (int64_t row = 0; row < a.rows; ++row)
      for (int64_t t = 0; t < a.tokens; ++t) {
        std::fill(sums.begin(), sums.end(), 0.0f);
        for (int64_t head = 0; head < a.heads; ++head) {
          T* x = d_kv + ((row * a.tokens + t) * a.heads + head) * line;
          const int64_t at = (row * a.heads + head) * a.tokens + t;
          const T* key = d_key + at * size;
          std::memcpy(x, key, a.plain * sizeof(T));
          std::memcpy(x + a.plain, d_value + at * a.value, a.value * sizeof(T));
          for (int64_t i = 0; i < a.rotated; ++i) sums[i] += to_float(key[a.plain + i]);
        }
        for (int64_t i = 0; i < a.rotated; ++i) narrow(sums[i], d_shared + (row * a.tokens + t) * a.rotated + i);
      }
  }
}

// Doubly stochastic matrices (tokens, n, n) of mHC: softmax over rows, + eps, then columns and rows divided in turn by their
// sums + eps, 2 steps - 1 times. With `grad`, the gradient of the logits instead. LANES tokens at a time.
constexpr int64_t LANES = 16;

// m (n * n, LANES): divides the entries of each column (or row) by their sum + eps, which goes to sums (n, LANES).
inline void divide_lines(float* m, float* sums, int64_t n, bool columns, float eps) {
  const int64_t along = columns ? n : 1, across = columns ? 1 : n;
  for (int64_t line = 0; line < n; ++line) {
    float* sum = sums + line * LANES;
    std::fill(sum, sum + LANES, eps);
    for (int64_t k = 0; k < n; ++k)
#pragma omp simd
      for (int64_t l = 0; l < LANES; ++l) sum[l] += m[(line * across + k * along) * LANES + l];
    for (int64_t k = 0; k < n; ++k)
#pragma omp simd
      for (int64_t l = 0; l < LANES; ++l) m[(line * across + k * along) * LANES + l] /= sum[l];
  }
}

// The gradient g of what was divided, from that of y = x / sum, in place.
inline void undivide_lines(float* g, const float* y, const float* sums, int64_t n, bool columns) {
  const int64_t along = columns ? n : 1, across = columns ? 1 : n;
  for (int64_t line = 0; line < n; ++line) {
    float product[LANES] = {};
    const float* sum = sums + line * LANES;
    for (int64_t k = 0; k < n; ++k)
#pragma omp simd
      for (int64_t l = 0; l < LANES; ++l) {
        const int64_t at = (line * across + k * along) * LANES + l;
        product[l] += g[at] * y[at];
      }
    for (int64_t k = 0; k < n; ++k)
#pragma omp simd
      for (int64_t l = 0; l < LANES; ++l) {
        const int64_t at = (line * across + k * along) * LANES + l;
        g[at] = (g[at] - product[l]) / sum[l];
      }
  }
}

// m (n * n, LANES) from logits: the softmax of each row.
inline void softmax_rows(float* m, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    float most[LANES], sum[LANES] = {};
    float* row = m + i * n * LANES;
    std::copy(row, row + LANES, most);
    for (int64_t j = 1; j < n; ++j)
#pragma omp simd
      for (int64_t l = 0; l < LANES; ++l) most[l] = std::max(most[l], row[j * LANES + l]);
    for (int64_t j = 0; j < n; ++j)
#pragma omp simd
      for (int64_t l = 0; l < LANES; ++l) sum[l] += row[j * LANES + l] = exp_(row[j * LANES + l] - most[l]);
    for (int64_t j = 0; j < n; ++j)
#pragma omp simd
      for (int64_t l = 0; l < LANES; ++l) row[j * LANES + l] /= sum[l];
  }
}

void sinkhorn(const float* logits, const float* grad, float* to, int64_t tokens, int64_t n, int64_t steps, float eps) {
  const int64_t entries = n * n, size = entries * LANES, divisions = 2 * steps - 1;
#pragma omp parallel
  {
    // the softmax, the matrix after each division, and the divisions' sums; without `grad` all in one place
    std::vector<float> matrices((grad ? divisions + 1 : 1) * size), sums((grad ? divisions : 1) * n * LANES), g(size);
    auto turn = [&](const float* from, float* into, int64_t first, int64_t count, bool in) {
      for (int64_t l = 0; l < count; ++l)
        for (int64_t e = 0; e < entries; ++e)
          (in ? into[e * LANES + l] : into[(first + l) * entries + e]) =
              in ? from[(first + l) * entries + e] : from[e * LANES + l];
    };
#pragma omp for schedule(static)
    for (int64_t first = 0; first < tokens; first += LANES) {
      const int64_t count = std::min(LANES, tokens - first);
      float* m = matrices.data();
      std::fill(m, m + size, 0.0f);
      turn(logits, m, first, count, true);
      softmax_rows(m, n);
      for (int64_t k = 0; k < divisions; ++k) {
        if (grad) std::copy(m, m + size, m + size), m += size;
        if (k == 0)
          for (int64_t e = 0; e < size; ++e) m[e] += eps;
        divide_lines(m, sums.data() + (grad ? k * n * LANES : 0), n, k % 2 == 0, eps);
      }
      if (!grad) {
        turn(m, to, first, count, false);
        continue;
      }
      std::fill(g.begin(), g.end(), 0.0f);
      turn(grad, g.data(), first, count, true);
      for (int64_t k = divisions - 1; k >= 0; --k, m -= size)
        undivide_lines(g.data(), m, sums.data() + k * n * LANES, n, k % 2 == 0);
      for (int64_t i = 0; i < n; ++i) {  // m is the softmax again
        float product[LANES] = {};
        for (int64_t e = i * n; e < (i + 1) * n; ++e)
          for (int64_t l = 0; l < LANES; ++l) product[l] += g[e * LANES + l] * m[e * LANES + l];
        for (int64_t e = i * n; e < (i + 1) * n; ++e)
          for (int64_t l = 0; l < LANES; ++l) g[e * LANES + l] = m[e * LANES + l] * (g[e * LANES + l] - product[l]);
      }
      turn(g.data(), to, first, count, false);
    }
  }
}

// out[t, j] = sum over i of shares[t, i, j] * streams[t, i], plus given[t, j] * made[t] unless `made` is null.
// shares (tokens, n, m), streams (tokens, n, size), given (tokens, m), made (tokens, size), out (tokens, m, size).
template <typename T>
void mix_streams(const float* shares, const T* streams, const float* given, const T* made, T* out, int64_t tokens,
                 int64_t n, int64_t m, int64_t size) {
#pragma omp parallel
  {
    std::vector<float> sum(size);
#pragma omp for schedule(static)
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t j = 0; j < m; ++j) {
        std::fill(sum.begin(), sum.end(), 0.0f);
        float* to = sum.data();
        for (int64_t i = 0; i < n; ++i) {
          const float share = shares[(t * n + i) * m + j];
          const T* from = streams + (t * n + i) * size;
#pragma omp simd
          for (int64_t k = 0; k < size; ++k) to[k] += share * to_float(from[k]);
        }
        const float share = made ? given[t * m + j] : 0.0f;
        const T* more = made ? made + t * size : streams + t * n * size;  // times 0 if there is none
        T* row = out + (t * m + j) * size;
#pragma omp simd
        for (int64_t k = 0; k < size; ++k) narrow(to[k] + share * to_float(more[k]), row + k);
      }
  }
}

template <typename T>
inline float product_of(const T* x, const T* y, int64_t size) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t k = 0; k < size; ++k) sum += to_float(x[k]) * to_float(y[k]);
  return sum;
}

// The gradients of mix_streams' inputs from grad (tokens, m, size).
template <typename T>
void mix_streams_backward(const float* shares, const T* streams, const float* given, const T* made, const T* grad,
                          float* d_shares, T* d_streams, float* d_given, T* d_made, int64_t tokens, int64_t n, int64_t m,
                          int64_t size) {
#pragma omp parallel
  {
    std::vector<float> sum(size);
    // the sum over j of weights[j] * g[j]
    auto weighed = [&](const float* weights, const T* g, T* to) {
      std::fill(sum.begin(), sum.end(), 0.0f);
      float* into = sum.data();
      for (int64_t j = 0; j < m; ++j) {
        const float weight = weights[j];
#pragma omp simd
        for (int64_t k = 0; k < size; ++k) into[k] += weight * to_float(g[j * size + k]);
      }
#pragma omp simd
      for (int64_t k = 0; k < size; ++k) narrow(into[k], to + k);
    };
#pragma omp for schedule(static)
    for (int64_t t = 0; t < tokens; ++t) {
      const T* g = grad + t * m * size;
      for (int64_t i = 0; i < n; ++i) {
        const int64_t at = t * n + i;
        for (int64_t j = 0; j < m; ++j) d_shares[at * m + j] = product_of(streams + at * size, g + j * size, size);
        weighed(shares + at * m, g, d_streams + at * size);
      }
      if (!made) continue;
      for (int64_t j = 0; j < m; ++j) d_given[t * m + j] = product_of(made + t * size, g + j * size, size);
      weighed(given + t * m, g, d_made + t * size);
    }
  }
}

}  // namespace

extern "C" {

void finback_sinkhorn(const float* logits, const float* grad, float* to, int64_t tokens, int64_t n, int64_t steps,
                      double eps) {
  sinkhorn(logits, grad, to, tokens, n, steps, float(eps));
}

void finback_mix_streams(int64_t is_bf16, const float* shares, const void* streams, const float* given, const void* made,
                         void* out, int64_t tokens, int64_t n, int64_t m, int64_t size) {
  BOTH(is_bf16, T,
       mix_streams(shares, static_cast<const T*>(streams), given, static_cast<const T*>(made), static_cast<T*>(out),
                   tokens, n, m, size))
}

void finback_mix_streams_backward(int64_t is_bf16, const float* shares, const void* streams, const float* given,
                                  const void* made, const void* grad, float* d_shares, void* d_streams, float* d_given,
                                  void* d_made, int64_t tokens, int64_t n, int64_t m, int64_t size) {
  BOTH(is_bf16, T,
       mix_streams_backward(shares, static_cast<const T*>(streams), given, static_cast<const T*>(made),
                            static_cast<const T*>(grad), d_shares, static_cast<T*>(d_streams), d_given,
                            static_cast<T*>(d_made), tokens, n, m, size))
}

void finback_norm_backward(int64_t is_bf16, const void* x, const float* gain, const float* inverse, const void* grad,
                           const void* other, void* d_x, float* d_gain, int64_t tokens, int64_t size, int64_t block) {
  BOTH(is_bf16, T,
       norm_backward(static_cast<const T*>(x), gain, inverse, static_cast<const T*>(grad), static_cast<const T*>(other),
                     static_cast<T*>(d_x), d_gain, tokens, size, block))
}

void finback_swiglu_backward(int64_t is_bf16, const void* x, const void* grad, void* d_x, void* out, int64_t rows,
                             int64_t width, double limit) {
  BOTH(is_bf16, T,
       swiglu_backward(static_cast<const T*>(x), static_cast<const T*>(grad), static_cast<T*>(d_x), static_cast<T*>(out),
                       rows, width, float(limit)))
}

void finback_spread(int64_t is_bf16, const void* x, const int64_t* slots, const float* weight, void* rows,
                    int64_t tokens, int64_t choices, int64_t size) {
  BOTH(is_bf16, T, spread(static_cast<const T*>(x), slots, weight, static_cast<T*>(rows), tokens, choices, size))
}

void finback_gather(int64_t is_bf16, const void* rows, const int64_t* slots, const float* weight, void* out,
                    int64_t tokens, int64_t choices, int64_t size) {
  BOTH(is_bf16, T, gather(static_cast<const T*>(rows), slots, weight, static_cast<T*>(out), tokens, choices, size))
}

void finback_weigh(int64_t is_bf16, const void* rows, const int64_t* slots, const void* grad, float* d_weight,
                   int64_t tokens, int64_t choices, int64_t size) {
  BOTH(is_bf16, T,
       weigh(static_cast<const T*>(rows), slots, static_cast<const T*>(grad), d_weight, tokens, choices, size))
}

void finback_causal_softmax(int64_t is_bf16, void* scores, const uint8_t* seen, int64_t rows, int64_t heads,
                            int64_t length, double scale) {
  BOTH(is_bf16, T, causal_softmax(static_cast<T*>(scores), seen, float(scale), rows, heads, length))
}

void finback_softmax_backward(int64_t is_bf16, const void* weights, void* grad, int64_t lines, int64_t length,
                              double scale) {
  BOTH(is_bf16, T, softmax_backward(static_cast<const T*>(weights), static_cast<T*>(grad), float(scale), lines, length))
}

void finback_cross_entropy(int64_t is_bf16, void* logits, const int64_t* labels, float* loss, int64_t rows,
                           int64_t size) {
  BOTH(is_bf16, T, cross_entropy(static_cast<T*>(logits), labels, loss, rows, size))
}

void finback_token_logprobs(int64_t is_bf16, const void* logits, const int64_t* ids, float* logp, float* entropy,
                            float* sums, int64_t rows, int64_t size, double inverse_temperature) {
  BOTH(is_bf16, T,
       token_logprobs(static_cast<const T*>(logits), ids, float(inverse_temperature), logp, entropy, sums, rows, size))
}

void finback_token_logprobs_backward(int64_t is_bf16, const void* logits, const int64_t* ids, const float* sums,
                                     const float* grad, void* d_logits, int64_t rows, int64_t size,
                                     double inverse_temperature) {
  BOTH(is_bf16, T,
       token_logprobs_backward(static_cast<const T*>(logits), ids, float(inverse_temperature), sums, grad,
                               static_cast<T*>(d_logits), rows, size))
}

void finback_rotate_heads(int64_t is_bf16, const void* from, void* to, const float* cosine, const float* sine,
                        int64_t rows, int64_t tokens, int64_t heads, int64_t plain, int64_t rotated, int64_t angles,
                        int64_t interleaved, int64_t backward) {
  const Heads a{rows, tokens, heads, plain, rotated, 0, interleaved != 0, cosine, sine, angles};
  if (backward) {
    BOTH(is_bf16, T, rotate_heads<T, true>(a, static_cast<const T*>(from), static_cast<T*>(to)))
  } else {
    BOTH(is_bf16, T, rotate_heads<T, false>(a, static_cast<const T*>(from), static_cast<T*>(to)))
  }
}

void finback_split_heads(int64_t is_bf16, const void* kv, const void* shared, void* key, void* value, int64_t rows,
                        int64_t tokens, int64_t heads, int64_t plain, int64_t rotated, int64_t width) {
  const Heads a{rows, tokens, heads, plain, rotated, width, false, nullptr, nullptr, 0};
  BOTH(is_bf16, T,
       split_heads(a, static_cast<const T*>(kv), static_cast<const T*>(shared), static_cast<T*>(key), static_cast<T*>(value)))
}

void finback_split_heads_backward(int64_t is_bf16, const void* d_key, const void* d_value, void* d_kv, void* d_shared,
                                 int64_t rows, int64_t tokens, int64_t heads, int64_t plain, int64_t rotated,
                                 int64_t width) {
  const Heads a{rows, tokens, heads, plain, rotated, width, false, nullptr, nullptr, 0};
  BOTH(is_bf16, T,
       split_heads_backward(a, static_cast<const T*>(d_key), static_cast<const T*>(d_value), static_cast<T*>(d_kv),
                           static_cast<T*>(d_shared)))
}
}
