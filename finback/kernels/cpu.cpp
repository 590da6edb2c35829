// The operations around the matrix products when a CPU processes few tokens at a time: norms, rotation, cache writes, attention
// over the cache, SwiGLU and routed experts; also the rounding of FP8 training. Each is one pass where the plain form takes a
// dozen. The plain twins are in reference.py and in the model. native.py compiles this file on the user's machine; it uses no
// torch headers. OpenMP symbols resolve to the runtime that torch has loaded, so that there is one thread pool.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "numbers.h"

extern "C" int omp_get_max_threads();

namespace {

// Keeps 64 partial sums: with a single one, every addition would wait for the one before it.
template <typename T>
inline float dot(const float* a, const T* b, int64_t n) {
  constexpr int64_t lanes = 64;
  float sums[lanes] = {};
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes)
#pragma omp simd
    for (int64_t j = 0; j < lanes; ++j) sums[j] += a[i + j] * to_float(b[i + j]);
  float sum = 0;
  if (i > 0)
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < lanes; ++j) sum += sums[j];
#pragma omp simd reduction(+ : sum)
  for (int64_t j = i; j < n; ++j) sum += a[j] * to_float(b[j]);
  return sum;
}

template <typename T>
inline void add_scaled(float* out, float factor, const T* x, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] += factor * to_float(x[i]);
}

// Vectors as wide as the registers.
#if defined(__AVX512F__)
#define BYTES 64
#define LANE 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
#elif defined(__AVX2__)
#define BYTES 32
#define LANE 0, 1, 2, 3, 4, 5, 6, 7
#else
#define BYTES 16
#define LANE 0, 1, 2, 3
#endif
typedef float vector __attribute__((vector_size(BYTES)));
typedef uint16_t halves __attribute__((vector_size(BYTES / 2)));
typedef uint32_t words __attribute__((vector_size(BYTES)));
typedef int32_t signed_words __attribute__((vector_size(BYTES)));
constexpr int64_t width = BYTES / 4;
constexpr int registers = BYTES == 64 ? 16 : 8;  // partial sums that fit, beside operands

// Below this many multiplications, one thread finishes before a second one wakes up.
constexpr int64_t little = 1 << 17;

inline vector load(const float* x) {
  vector y;
  std::memcpy(&y, x, sizeof y);
  return y;
}
inline vector load(const bf16* x) {
  halves bits;
  std::memcpy(&bits, x, sizeof bits);
  const words wider = __builtin_convertvector(bits, words) << 16;
  vector y;
  std::memcpy(&y, &wider, sizeof y);
  return y;
}
// The lanes with these numbers, of x or, from `width` on, of y.
#ifdef __clang__
#define LANES(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define LANES(x, y, ...) __builtin_shuffle(x, y, words{__VA_ARGS__})
#endif
#if BYTES == 64
#define EVEN_LANES 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30
#define ODD_LANES 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31
#define EVEN_PAIRS 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29
#define ODD_PAIRS 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31
inline vector moved_eight(vector x) { return LANES(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7); }
inline vector moved_four(vector x) { return LANES(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11); }
inline vector moved_two(vector x) { return LANES(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13); }
#elif BYTES == 32
#define EVEN_LANES 0, 8, 2, 10, 4, 12, 6, 14
#define ODD_LANES 1, 9, 3, 11, 5, 13, 7, 15
#define EVEN_PAIRS 0, 1, 8, 9, 4, 5, 12, 13
#define ODD_PAIRS 2, 3, 10, 11, 6, 7, 14, 15
inline vector moved_four(vector x) { return LANES(x, x, 4, 5, 6, 7, 0, 1, 2, 3); }
inline vector moved_two(vector x) { return LANES(x, x, 2, 3, 0, 1, 6, 7, 4, 5); }
#else
#define EVEN_LANES 0, 4, 2, 6
#define ODD_LANES 1, 5, 3, 7
#define EVEN_PAIRS 0, 1, 4, 5
#define ODD_PAIRS 2, 3, 6, 7
inline vector moved_two(vector x) { return LANES(x, x, 2, 3, 0, 1); }
#endif
inline vector larger(vector x, vector y) { return x > y ? x : y; }
inline vector sum_of(vector x, vector y) { return x + y; }
// Combines the lanes of a vector whose numbers are equal modulo 4; the result is in each of them.
template <vector (*f)(vector, vector)>
inline vector folded(vector x) {
#if BYTES >= 64
  x = f(x, moved_eight(x));
#endif
#if BYTES >= 32
  x = f(x, moved_four(x));
#endif
  return x;
}
inline float total(vector x) {
  x = folded<sum_of>(x), x += moved_two(x);
  return x[0] + x[1];
}
inline float largest(vector x) {
  x = folded<larger>(x), x = larger(x, moved_two(x));
  return std::max(x[0], x[1]);
}

// Unrolls short loops, so that their arrays live in registers.
#define UNROLL _Pragma("GCC unroll 16")

// The sums of four vectors. Each step adds neighbouring lanes and joins two vectors, so that after two steps every fourth lane
// belongs to the same vector.
inline void four_totals(const vector* x, float* out) {
  const vector a = LANES(x[0], x[1], EVEN_LANES) + LANES(x[0], x[1], ODD_LANES);
  const vector b = LANES(x[2], x[3], EVEN_LANES) + LANES(x[2], x[3], ODD_LANES);
  const vector all = folded<sum_of>(LANES(a, b, EVEN_PAIRS) + LANES(a, b, ODD_PAIRS));
  std::memcpy(out, &all, 4 * sizeof(float));
}

// s[q][i] = x[q] . key i for Q queries and K keys, at most 4. The order of additions depends on neither Q nor K.
template <int Q, int K, typename T>
inline void some_products(const float* const* x, const T* keys, int64_t stride, int64_t n, float* s, int64_t line) {
  const int64_t even = n / width * width;
  vector sums[Q][4] = {};
  for (int64_t d = 0; d < even; d += width)
    UNROLL for (int k = 0; k < K; ++k) {
      const vector key = load(keys + k * stride + d);
      UNROLL for (int q = 0; q < Q; ++q) sums[q][k] += load(x[q] + d) * key;
    }
  UNROLL for (int q = 0; q < Q; ++q) {
    float found[4];
    four_totals(sums[q], found);
    UNROLL for (int k = 0; k < K; ++k) {
      for (int64_t d = even; d < n; ++d) found[k] += x[q][d] * to_float(keys[k * stride + d]);
      s[q * line + k] = found[k];
    }
  }
}

// s[q][i] = x[q] . key i for Q queries and `count` keys; each key is read once for all queries.
template <int Q, typename T>
void products(const float* const* x, const T* keys, int64_t stride, int64_t n, int64_t count, float* s, int64_t line) {
  constexpr int K = Q * 4 <= registers ? 4 : Q * 2 <= registers ? 2 : 1;
  int64_t i = 0;
  for (; i + K <= count; i += K) some_products<Q, K>(x, keys + i * stride, stride, n, s + i, line);
  for (; i < count; ++i) some_products<Q, 1>(x, keys + i * stride, stride, n, s + i, line);
}

// Columns v .. v + V * width of mix.
template <int Q, int V, typename T>
inline void mix_columns(float* const* y, const float* fade, const T* values, int64_t stride, int64_t v, int64_t count,
                        const float* s, int64_t line) {
  vector sums[Q][V];
  UNROLL for (int q = 0; q < Q; ++q)
    UNROLL for (int j = 0; j < V; ++j) sums[q][j] = load(y[q] + v + j * width) * fade[q];
  for (int64_t i = 0; i < count; ++i)
    UNROLL for (int j = 0; j < V; ++j) {
      const vector value = load(values + i * stride + v + j * width);
      UNROLL for (int q = 0; q < Q; ++q) sums[q][j] += s[q * line + i] * value;
    }
  UNROLL for (int q = 0; q < Q; ++q)
    UNROLL for (int j = 0; j < V; ++j) std::memcpy(y[q] + v + j * width, &sums[q][j], sizeof(vector));
}

// y[q] = fade[q] * y[q] + sum over i of s[q][i] * value i
template <int Q, typename T>
void mix(float* const* y, const float* fade, const T* values, int64_t stride, int64_t n, int64_t count, const float* s,
         int64_t line) {
  constexpr int V = Q * 4 <= registers ? 4 : Q * 2 <= registers ? 2 : 1;
  const int64_t even = n / width * width;
  int64_t v = 0;
  for (; v + V * width <= even; v += V * width) mix_columns<Q, V>(y, fade, values, stride, v, count, s, line);
  for (; v < even; v += width) mix_columns<Q, 1>(y, fade, values, stride, v, count, s, line);
  for (int q = 0; q < Q; ++q)
    for (int64_t v = even; v < n; ++v) {
      float sum = y[q][v] * fade[q];
      for (int64_t i = 0; i < count; ++i) sum += s[q * line + i] * to_float(values[i * stride + v]);
      y[q][v] = sum;
    }
}

// Scales the first `seen` of `count` scores and replaces them by exp(score - high), the others by 0; high is the largest of
// them and of `top`, the largest so far. Returns the sum. s has room for whole vectors; seen > 0.
inline float exponentials(float* s, int64_t seen, int64_t count, float scale, float* top) {
  constexpr signed_words lane = {LANE};
  const vector none = vector{} - INFINITY;
  vector most = vector{} + *top, sum = {};
  for (int64_t i = 0; i < count; i += width) {
    const vector x = lane < int32_t(seen - i) ? load(s + i) * scale : none;
    most = larger(x, most);
    std::memcpy(s + i, &x, sizeof x);
  }
  const float high = *top = largest(most);
  for (int64_t i = 0; i < count; i += width) {
    float x[width];
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) x[j] = exp_(s[i + j] - high);
    const vector y = lane < int32_t(seen - i) ? load(x) : vector{};
    std::memcpy(s + i, &y, sizeof y);
    sum += y;
  }
  return total(sum);
}

// out = gain * x / sqrt(mean(x^2) + eps); returns 1 / sqrt(mean(x^2) + eps)
template <typename T, typename U>
inline float norm(const T* x, const float* gain, float eps, U* out, int64_t n) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += to_float(x[i]) * to_float(x[i]);
  const float inverse = 1.0f / std::sqrt(sum / float(n) + eps);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) narrow(to_float(x[i]) * inverse * gain[i], out + i);
  return inverse;
}

// Rotates pairs (2i, 2i + 1) or (i, i + n / 2); the result is [first of each pair | second of each pair].
template <typename T, typename U>
inline void rotate(const T* x, const float* cosine, const float* sine, bool interleaved, U* out, int64_t n) {
  const int64_t half = n / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float a = to_float(interleaved ? x[2 * i] : x[i]), b = to_float(interleaved ? x[2 * i + 1] : x[i + half]);
    narrow(a * cosine[i] - b * sine[i], out + i);
    narrow(a * sine[i] + b * cosine[i], out + half + i);
  }
}

// Asks for `count` runs of n numbers.
template <typename T>
inline void prefetch(const T* x, int64_t stride, int64_t n, int64_t count) {
  constexpr int64_t line = 64 / sizeof(T);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t d = 0; d < n; d += line) __builtin_prefetch(x + i * stride + d);
}

struct Attention {
  const float* query;      // (rows, new, heads, key)
  float* out;              // (rows, new, heads, value)
  const int64_t* table;    // (rows, pages)
  const int64_t* lengths;  // (rows,) entries before the first new one
  const int64_t* starts;   // (rows,) the first visible entry; null: all are visible
  int64_t rows, new_tokens, heads, groups, key, value, elements, value_at, page, pages;
  float scale;
};

// What a thread needs while it attends: of each query the largest score so far and the sum of exponentials; Q rows of scores.
struct Progress {
  std::vector<float> top, sum, scores;
};

// Some heads of one row: heads first .. last of each of the groups from .. to.
struct Heads {
  int64_t row, from, to, first, last;
};

// Attention of Q queries, which share keys and values, over some entries of a page; queries are numbered by new token and,
// within a token, by head. `at` is the position behind the entries' first.
template <int Q, typename T>
inline void attend_page(const Attention& a, const Heads& h, int64_t group, int64_t query, const T* base, int64_t at,
                        int64_t count, float* top, float* sum, float* s) {
  const float* x[Q];
  float *y[Q], fade[Q];
  int64_t seen[Q];
  const int64_t share = h.last - h.first, line = (a.page + width - 1) / width * width;
  UNROLL for (int q = 0; q < Q; ++q) {
    const int64_t token = (query + q) / share, head = group * (a.heads / a.groups) + h.first + (query + q) % share;
    const int64_t number = (h.row * a.new_tokens + token) * a.heads + head;
    x[q] = a.query + number * a.key, y[q] = a.out + number * a.value;
    // a new token sees the cached entries, earlier new tokens and itself
    seen[q] = std::max<int64_t>(std::min(count, a.lengths[h.row] + token + 1 - at), 0);
  }
  products<Q>(x, base + group * a.key, a.elements, a.key, count, s, line);
  UNROLL for (int q = 0; q < Q; ++q) {
    fade[q] = 1;
    if (seen[q] == 0) {
      std::fill(s + q * line, s + q * line + count, 0.0f);
      continue;
    }
    const float before = top[q], more = exponentials(s + q * line, seen[q], count, a.scale, top + q);
    fade[q] = exp_(before - top[q]);
    sum[q] = sum[q] * fade[q] + more;
  }
  mix<Q>(y, fade, base + a.value_at + group * a.value, a.elements, a.value, count, s, line);
}

// Page by page with an online softmax. All groups of a page are processed before the next page, since their entries adjoin.
template <typename T>
void attend_heads(const Attention& a, const T* data, const Heads& h, Progress& p) {
  const int64_t share = h.last - h.first, queries = a.new_tokens * share, end = a.lengths[h.row] + a.new_tokens;
  p.top.assign((h.to - h.from) * queries, -INFINITY), p.sum.assign((h.to - h.from) * queries, 0.0f);
  p.scores.resize(4 * (a.page + width));
  const int64_t start = a.starts ? a.starts[h.row] : 0, size = a.heads / a.groups;
  const auto each = [&](auto f) {
    for (int64_t group = h.from; group < h.to; ++group)
      for (int64_t q = 0; q < queries; ++q)
        f(a.out + ((h.row * a.new_tokens + q / share) * a.heads + group * size + h.first + q % share) * a.value,
          p.sum[(group - h.from) * queries + q]);
  };
  each([&](float* y, float) { std::fill(y, y + a.value, 0.0f); });
  for (int64_t page = start / a.page; page * a.page < end; ++page) {
    const int64_t skip = std::max<int64_t>(start - page * a.page, 0), at = page * a.page + skip;
    const int64_t count = std::min(a.page - skip, end - at), *next = a.table + h.row * a.pages + page + 1;
    const T* base = data + (next[-1] * a.page + skip) * a.elements;
    const int64_t ahead = std::min(a.page, end - (page + 1) * a.page);  // entries of the next page, which is elsewhere in memory
    for (int64_t group = h.from; group < h.to; ++group) {
      if (ahead > 0) {
        prefetch(data + *next * a.page * a.elements + group * a.key, a.elements, a.key, ahead);
        prefetch(data + *next * a.page * a.elements + a.value_at + group * a.value, a.elements, a.value, ahead);
      }
      for (int64_t q = 0; q < queries; q += 4) {
        const int64_t number = (group - h.from) * queries + q;
        const auto some = [&](auto f) { f(a, h, group, q, base, at, count, &p.top[number], &p.sum[number], p.scores.data()); };
        switch (std::min<int64_t>(queries - q, 4)) {
          case 4: some(attend_page<4, T>); break;
          case 3: some(attend_page<3, T>); break;
          case 2: some(attend_page<2, T>); break;
          case 1: some(attend_page<1, T>);
        }
      }
    }
  }
  each([&](float* y, float sum) {
    for (int64_t v = 0; v < a.value; ++v) y[v] /= sum;
  });
}

template <typename T>
void attend(const Attention& a, const T* data) {
  const int64_t share = a.heads / a.groups, threads = omp_get_max_threads();
  // with few rows, groups are split over threads, and then heads that share keys, which costs reading the keys more than once
  const int64_t apart = a.rows >= threads ? 1 : a.groups;
  const int64_t parts = std::min(share, (threads + a.rows * apart - 1) / (a.rows * apart)), tasks = a.rows * apart * parts;
  int64_t entries = 0;
  for (int64_t row = 0; row < a.rows; ++row) entries += a.lengths[row] + a.new_tokens;
#pragma omp parallel if (tasks > 1 && entries * a.new_tokens * a.heads * (a.key + a.value) > little)
  {
    static thread_local Progress progress;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t part = task % parts, place = task / parts % apart, row = task / parts / apart;
      const int64_t groups = a.groups / apart, first = part * share / parts, last = (part + 1) * share / parts;
      attend_heads(a, data, {row, place * groups, (place + 1) * groups, first, last}, progress);
    }
  }
}

// The cache slots and rotation angles of the new tokens.
struct Place {
  const int64_t* slots;  // (rows * new)
  const float *cosine, *sine;  // (rows * new, rotated / 2)
  bool interleaved;
};

// Grouped-query attention after the projections: rotates, stores in the cache, attends. qkv (tokens, heads + 2 groups, size).
template <typename T>
void grouped_query(Attention a, const Place& at, const T* qkv, const float* query_gain, const float* key_gain, float eps,
                   T* data, T* out) {
  const int64_t tokens = a.rows * a.new_tokens, size = a.key, line = (a.heads + 2 * a.groups) * size;
  static thread_local std::vector<float> scratch;
  scratch.resize(2 * tokens * a.heads * size + tokens * size);
  float *query = scratch.data(), *read = query + tokens * a.heads * size;
  a.query = query;
  a.out = read;
#pragma omp parallel for schedule(static) if (tokens > 4)
  for (int64_t t = 0; t < tokens; ++t) {
    float* normed = query + 2 * tokens * a.heads * size + t * size;
    const T* x = qkv + t * line;
    const float *c = at.cosine + t * size / 2, *s = at.sine + t * size / 2;
    T* entry = data + at.slots[t] * a.elements;
    for (int64_t h = 0; h < a.heads + a.groups; ++h) {
      const bool is_query = h < a.heads;
      const float* gain = is_query ? query_gain : key_gain;
      float* to = query + (t * a.heads + h) * size;
      if (gain) {
        norm(x + h * size, gain, eps, normed, size);
        if (is_query)
          rotate(normed, c, s, at.interleaved, to, size);
        else
          rotate(normed, c, s, at.interleaved, entry + (h - a.heads) * size, size);
      } else if (is_query) {
        rotate(x + h * size, c, s, at.interleaved, to, size);
      } else {
        rotate(x + h * size, c, s, at.interleaved, entry + (h - a.heads) * size, size);
      }
    }
    std::memcpy(entry + a.groups * size, x + (a.heads + a.groups) * size, a.groups * size * sizeof(T));
  }
  attend(a, data);
#pragma omp parallel for simd schedule(static) if (tokens > 4)
  for (int64_t i = 0; i < tokens * a.heads * size; ++i) narrow(read[i], out + i);
}

// Latent attention in absorbed form, after the projections. q (tokens, heads, nope + rope), kv (tokens, latent + rope),
// up (heads, nope + value, latent).
template <typename T>
void latent(Attention a, const Place& at, const T* q, const T* kv, const float* gain, float eps, const T* up, T* data,
            T* out, int64_t nope, int64_t rope, int64_t value) {
  const int64_t tokens = a.rows * a.new_tokens, size = a.value, pairs = tokens * a.heads;  // size: that of the latent
  static thread_local std::vector<float> scratch;
  scratch.resize(pairs * (a.key + size));
  float *query = scratch.data(), *read = query + pairs * a.key;
  a.query = query;
  a.out = read;
#pragma omp parallel if (pairs * nope * size > little)
  {
#pragma omp for schedule(static) nowait
    for (int64_t t = 0; t < tokens; ++t) {
      const T* x = kv + t * (size + rope);
      T* entry = data + at.slots[t] * a.elements;
      norm(x, gain, eps, entry, size);
      rotate(x + size, at.cosine + t * rope / 2, at.sine + t * rope / 2, at.interleaved, entry + size, rope);
    }
#pragma omp for schedule(static)
    for (int64_t pair = 0; pair < pairs; ++pair) {
      const int64_t t = pair / a.heads, h = pair % a.heads;
      const T *x = q + pair * (nope + rope), *w = up + h * (nope + value) * size;
      float* to = query + pair * a.key;
      std::fill(to, to + size, 0.0f);
      for (int64_t n = 0; n < nope; ++n) add_scaled(to, to_float(x[n]), w + n * size, size);
      rotate(x + nope, at.cosine + t * rope / 2, at.sine + t * rope / 2, at.interleaved, to + size, rope);
    }
  }
  attend(a, data);
#pragma omp parallel for schedule(static) if (pairs * value * size > little)
  for (int64_t pair = 0; pair < pairs; ++pair) {
    const T* w = up + (pair % a.heads * (nope + value) + nope) * size;
    for (int64_t v = 0; v < value; ++v) narrow(dot(read + pair * size, w + v * size, size), out + pair * value + v);
  }
}

// sum = x + y unless y is null; out = norm(sum); inverse (tokens,), for the backward pass, unless null
template <typename T>
void add_norm(const T* x, const T* y, const float* gain, float eps, T* sum, T* out, float* inverse, int64_t tokens,
              int64_t size) {
#pragma omp parallel for schedule(static) if (tokens > 8)
  for (int64_t t = 0; t < tokens; ++t) {
    const T* row = x + t * size;
    if (y) {
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) narrow(to_float(row[i]) + to_float(y[t * size + i]), sum + t * size + i);
      row = sum + t * size;
    }
    const float factor = norm(row, gain, eps, out + t * size, size);
    if (inverse) inverse[t] = factor;
  }
}

// out = silu(gate) * up for x (tokens, [gate | up])
template <typename T>
void swiglu(const T* x, T* out, int64_t tokens, int64_t width, float limit) {
#pragma omp parallel for schedule(static) if (tokens > 8)
  for (int64_t t = 0; t < tokens; ++t) {
    const T *gate = x + 2 * t * width, *up = gate + width;
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
      const float a = at_most(to_float(gate[i]), limit), b = within(to_float(up[i]), limit);
      narrow(silu(a) * b, out + t * width + i);
    }
  }
}

template <typename T>
void experts(const float* x, const int64_t* index, const float* weight, const T* gate_up, const T* down, float* out,
             float* hidden, int64_t tokens, int64_t choices, int64_t size, int64_t width) {
  const int64_t pairs = tokens * choices;
  // For each row of an expert's weights, loops over the tokens that chose the expert, so that the row is read once.
  std::vector<int64_t> order(pairs);
  for (int64_t i = 0; i < pairs; ++i) order[i] = i;
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return index[a] < index[b]; });
  std::vector<int64_t> starts;  // of each expert's run in `order`
  for (int64_t i = 0; i < pairs; ++i)
    if (i == 0 || index[order[i]] != index[order[i - 1]]) starts.push_back(i);
  starts.push_back(pairs);
  const int64_t runs = int64_t(starts.size()) - 1;
#pragma omp parallel if (pairs * 3 * width * size > little)
  {
#pragma omp for schedule(static)
    for (int64_t item = 0; item < runs * width; ++item) {
      const int64_t run = item / width, unit = item % width, expert = index[order[starts[run]]];
      const T* gate = gate_up + (expert * 2 * width + unit) * size;
      const T* up = gate + width * size;
      for (int64_t i = starts[run]; i < starts[run + 1]; ++i) {
        const int64_t pair = order[i];
        const float* row = x + pair / choices * size;
        const float g = dot(row, gate, size);
        hidden[pair * width + unit] = weight[pair] * dot(row, up, size) * g / (1.0f + std::exp(-g));
      }
    }
#pragma omp for schedule(static)
    for (int64_t unit = 0; unit < size; ++unit) {
      for (int64_t token = 0; token < tokens; ++token) out[token * size + unit] = 0.0f;
      for (int64_t i = 0; i < pairs; ++i) {
        const int64_t pair = order[i];
        out[pair / choices * size + unit] +=
            dot(hidden + pair * width, down + (index[pair] * size + unit) * width, width);
      }
    }
  }
}

// Tiles of FP8 training, in which 128 numbers share a factor. See fp8_products.round_tiles.
constexpr int64_t tile = 128;

// The bits of a magnitude, which compare like the magnitude itself, with infinity and then NaN at the top.
inline uint32_t magnitude(float x) { return bits_of(x) & 0x7fffffff; }

// The factor that scales a tile with this largest magnitude to at most 448; optionally rounded up to a power of two.
inline float factor(uint32_t largest, bool power_of_two) {
  float scale = float_of(largest);
  if (scale < 1e-30f) scale = 1e-30f;
  scale /= 448.0f;
  const uint32_t bits = bits_of(scale);
  return power_of_two && bits < 0x7f800000 ? float_of((bits + 0x7fffff) & 0x7f800000) : scale;
}

// Rounds to the nearest E4M3 number, ties to even; |x| <= 448. Below 2^-6 these numbers are 2^-9 apart.
inline float e4m3(float x) {
  const uint32_t bits = bits_of(x);
  const float normal = float_of((bits + 0x7ffff + (bits >> 20 & 1)) & 0xfff00000);
  const float small = std::nearbyint(x * 512.0f) * (1.0f / 512.0f);
  return std::fabs(x) < 0.015625f ? small : normal;
}

// Tiles along the columns of x (rows, columns).
template <typename T>
void round_tiles(const T* x, float* out, int64_t rows, int64_t columns, bool power_of_two) {
#pragma omp parallel for schedule(static) if (rows * columns > little)
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t begin = row * columns; begin < (row + 1) * columns; begin += tile) {
      const int64_t end = std::min(begin + tile, (row + 1) * columns);
      uint32_t largest = 0;
#pragma omp simd reduction(max : largest)
      for (int64_t i = begin; i < end; ++i) largest = std::max(largest, magnitude(to_float(x[i])));
      const float scale = factor(largest, power_of_two);
#pragma omp simd
      for (int64_t i = begin; i < end; ++i) out[i] = e4m3(to_float(x[i]) / scale) * scale;
    }
}

// Tiles along the rows, processed in strips of columns that stay in the processor's cache for the second pass.
template <typename T>
void round_columns(const T* x, float* out, int64_t rows, int64_t columns, bool power_of_two) {
  const int64_t bands = (rows + tile - 1) / tile, strips = (columns + tile - 1) / tile;
#pragma omp parallel for collapse(2) schedule(static) if (rows * columns > little)
  for (int64_t band = 0; band < bands; ++band)
    for (int64_t strip = 0; strip < strips; ++strip) {
      const int64_t first = strip * tile, size = std::min(tile, columns - first);
      const int64_t begin = band * tile, end = std::min(begin + tile, rows);
      uint32_t largest[tile] = {};
      float scale[tile];
      for (int64_t row = begin; row < end; ++row)
#pragma omp simd
        for (int64_t i = 0; i < size; ++i)
          largest[i] = std::max(largest[i], magnitude(to_float(x[row * columns + first + i])));
      for (int64_t i = 0; i < size; ++i) scale[i] = factor(largest[i], power_of_two);
      for (int64_t row = begin; row < end; ++row)
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) {
          const int64_t at = row * columns + first + i;
          out[at] = e4m3(to_float(x[at]) / scale[i]) * scale[i];
        }
    }
}

}  // namespace

extern "C" {

void finback_attend(int64_t is_bf16, const float* query, const void* data, float* out, const int64_t* table,
                    const int64_t* lengths, const int64_t* starts, int64_t rows, int64_t new_tokens, int64_t heads,
                    int64_t groups, int64_t key, int64_t value, int64_t elements, int64_t value_at, int64_t page,
                    int64_t pages, double scale) {
  const Attention a{query,  out, table, lengths,  starts,   rows, new_tokens, heads,
                    groups, key, value, elements, value_at, page, pages, float(scale)};
  BOTH(is_bf16, T, attend(a, static_cast<const T*>(data)))
}

void finback_grouped_query(int64_t is_bf16, const void* qkv, void* data, void* out, const int64_t* slots,
                           const int64_t* table, const int64_t* lengths, const int64_t* starts, const float* cosine,
                           const float* sine, const float* query_gain, const float* key_gain, int64_t rows,
                           int64_t new_tokens, int64_t heads, int64_t groups, int64_t size, int64_t page, int64_t pages, double eps,
                           double scale) {
  const Attention a{nullptr, nullptr, table,         lengths,       starts, rows, new_tokens, heads,
                    groups,  size,    size,          2 * groups * size, groups * size, page,  pages, float(scale)};
  const Place at{slots, cosine, sine, false};
  BOTH(is_bf16, T,
       grouped_query(a, at, static_cast<const T*>(qkv), query_gain, key_gain, float(eps), static_cast<T*>(data),
                     static_cast<T*>(out)))
}

void finback_latent(int64_t is_bf16, const void* q, const void* kv, const void* up, void* data, void* out,
                    const int64_t* slots, const int64_t* table, const int64_t* lengths, const int64_t* starts,
                    const float* cosine, const float* sine, const float* gain, int64_t interleaved, int64_t rows,
                    int64_t new_tokens, int64_t heads, int64_t nope, int64_t rope, int64_t value, int64_t size,
                    int64_t page, int64_t pages, double eps, double scale) {
  const Attention a{nullptr, nullptr, table, lengths,     starts, rows, new_tokens, heads,
                    1,       size + rope, size,  size + rope, 0,      page, pages, float(scale)};
  const Place at{slots, cosine, sine, interleaved != 0};
  BOTH(is_bf16, T,
       latent(a, at, static_cast<const T*>(q), static_cast<const T*>(kv), gain, float(eps), static_cast<const T*>(up),
              static_cast<T*>(data), static_cast<T*>(out), nope, rope, value))
}

void finback_add_norm(int64_t is_bf16, const void* x, const void* y, const float* gain, void* sum, void* out,
                      float* inverse, int64_t tokens, int64_t size, double eps) {
  BOTH(is_bf16, T,
       add_norm(static_cast<const T*>(x), static_cast<const T*>(y), gain, float(eps), static_cast<T*>(sum),
                static_cast<T*>(out), inverse, tokens, size))
}

void finback_swiglu(int64_t is_bf16, const void* x, void* out, int64_t tokens, int64_t width, double limit) {
  BOTH(is_bf16, T, swiglu(static_cast<const T*>(x), static_cast<T*>(out), tokens, width, float(limit)))
}

void finback_experts(int64_t is_bf16, const float* x, const int64_t* index, const float* weight, const void* gate_up,
                     const void* down, float* out, float* hidden, int64_t tokens, int64_t choices, int64_t size,
                     int64_t width) {
  BOTH(is_bf16, T,
       experts(x, index, weight, static_cast<const T*>(gate_up), static_cast<const T*>(down), out, hidden, tokens, choices,
               size, width))
}

void finback_round_tiles(int64_t is_bf16, const void* x, float* out, int64_t rows, int64_t columns, int64_t down,
                         int64_t power_of_two) {
  if (down) {
    BOTH(is_bf16, T, round_columns(static_cast<const T*>(x), out, rows, columns, power_of_two != 0))
  } else {
    BOTH(is_bf16, T, round_tiles(static_cast<const T*>(x), out, rows, columns, power_of_two != 0))
  }
}
}
