// Attention over a paged cache, and routed experts, for few tokens at a time on a CPU. The plain twins are in
// reference.py. Compiled by native.py with the machine's own compiler, loaded without any of torch's headers; the
// OpenMP symbols are resolved to the runtime that torch has loaded, so that there is one pool of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

struct bf16 {
  uint16_t bits;
};

inline float wide(float x) { return x; }
inline float wide(bf16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

// exp for x <= 0 to about 1e-7 relative (Cephes' polynomial); inline, so that loops over it vectorise.
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
  uint32_t bits = uint32_t(int32_t(n) + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, 4);
  return p * scale;
}

// Several sums side by side: with one, every addition would wait for the one before it.
template <typename T>
inline float dot(const float* a, const T* b, int64_t n) {
  constexpr int64_t lanes = 64;
  float sums[lanes] = {};
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes)
#pragma omp simd
    for (int64_t j = 0; j < lanes; ++j) sums[j] += a[i + j] * wide(b[i + j]);
  float sum = 0;
  if (i > 0)
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < lanes; ++j) sum += sums[j];
#pragma omp simd reduction(+ : sum)
  for (int64_t j = i; j < n; ++j) sum += a[j] * wide(b[j]);
  return sum;
}

template <typename T>
inline void add_scaled(float* out, float factor, const T* x, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] += factor * wide(x[i]);
}

struct Attention {
  const float* query;      // (rows, new, heads, key)
  float* out;              // (rows, new, heads, value)
  const int64_t* table;    // (rows, pages)
  const int64_t* lengths;  // (rows,) entries before the first new one
  const int64_t* starts;   // (rows,) the first entry that is seen, or null
  int64_t rows, news, heads, groups, key, value, elements, value_at, page, pages;
  float scale;
};

// One row, one group of heads that share keys and values: pages one after the other, softmax in the running form.
template <typename T>
void attend_group(const Attention& a, const T* data, int64_t row, int64_t group, int64_t first, int64_t last,
                  std::vector<float>& buffer) {
  const int64_t share = last - first, queries = a.news * share;
  buffer.assign(queries * (2 + a.page), 0.0f);
  float* top = buffer.data();
  float* sum = top + queries;
  float* score = sum + queries;  // (queries, page)
  std::fill(top, top + queries, -INFINITY);
  const int64_t start = a.starts ? a.starts[row] : 0, end = a.lengths[row] + a.news;
  auto query = [&](int64_t q) {
    return a.query + ((row * a.news + q / share) * a.heads + first + q % share) * a.key;
  };
  auto out = [&](int64_t q) {
    return a.out + ((row * a.news + q / share) * a.heads + first + q % share) * a.value;
  };
  for (int64_t q = 0; q < queries; ++q) std::fill(out(q), out(q) + a.value, 0.0f);
  for (int64_t p = start / a.page; p * a.page < end; ++p) {
    const T* base = data + a.table[row * a.pages + p] * a.page * a.elements;
    const int64_t from = std::max<int64_t>(start - p * a.page, 0), to = std::min(a.page, end - p * a.page);
    for (int64_t q = 0; q < queries; ++q) {
      // query number q / share sees what was there, itself, and the new ones before it
      const int64_t seen = std::min(to, a.lengths[row] + q / share + 1 - p * a.page);
      if (seen <= from) continue;
      float* s = score + q * a.page;
      const float* x = query(q);
      float high = top[q];
      for (int64_t i = from; i < seen; ++i) {
        s[i] = a.scale * dot(x, base + i * a.elements + group * a.key, a.key);
        high = std::max(high, s[i]);
      }
      const float fade = exp_(top[q] - high);
      float total = 0;
#pragma omp simd reduction(+ : total)
      for (int64_t i = from; i < seen; ++i) {
        s[i] = exp_(s[i] - high);
        total += s[i];
      }
      float* y = out(q);
      if (fade != 1.0f)
        for (int64_t v = 0; v < a.value; ++v) y[v] *= fade;
      for (int64_t i = from; i < seen; ++i)
        add_scaled(y, s[i], base + i * a.elements + a.value_at + group * a.value, a.value);
      top[q] = high;
      sum[q] = sum[q] * fade + total;
    }
  }
  for (int64_t q = 0; q < queries; ++q) {
    float* y = out(q);
    for (int64_t v = 0; v < a.value; ++v) y[v] /= sum[q];
  }
}

template <typename T>
void attend(const Attention& a, const T* data) {
  const int64_t share = a.heads / a.groups;
  // few rows: heads that share keys are split over the threads, at the price of reading the keys more than once
  const int64_t parts = a.rows * a.groups >= 8 ? 1 : std::min<int64_t>(share, 4);
  const int64_t tasks = a.rows * a.groups * parts;
#pragma omp parallel if (tasks > 1)
  {
    std::vector<float> buffer;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t part = task % parts, group = task / parts % a.groups, row = task / parts / a.groups;
      const int64_t first = group * share + part * share / parts;
      const int64_t last = group * share + (part + 1) * share / parts;
      if (first < last) attend_group(a, data, row, group, first, last, buffer);
    }
  }
}

template <typename T>
void experts(const float* x, const int64_t* index, const float* weight, const T* gate_up, const T* down, float* out,
             float* hidden, int64_t tokens, int64_t choices, int64_t size, int64_t width) {
  const int64_t pairs = tokens * choices;
  // Token after token within an expert's row: a row of weights is read once for all tokens that chose the expert.
  std::vector<int64_t> order(pairs);
  for (int64_t i = 0; i < pairs; ++i) order[i] = i;
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return index[a] < index[b]; });
  std::vector<int64_t> starts;  // of each expert's run in `order`
  for (int64_t i = 0; i < pairs; ++i)
    if (i == 0 || index[order[i]] != index[order[i - 1]]) starts.push_back(i);
  starts.push_back(pairs);
  const int64_t runs = int64_t(starts.size()) - 1;
#pragma omp parallel
  {
#pragma omp for schedule(static)
    for (int64_t job = 0; job < runs * width; ++job) {
      const int64_t run = job / width, unit = job % width, expert = index[order[starts[run]]];
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

}  // namespace

extern "C" {

void finback_attend(int is_bf16, const float* query, const void* data, float* out, const int64_t* table,
                    const int64_t* lengths, const int64_t* starts, int64_t rows, int64_t news, int64_t heads,
                    int64_t groups, int64_t key, int64_t value, int64_t elements, int64_t value_at, int64_t page,
                    int64_t pages, float scale) {
  const Attention a{query, out,   table,    lengths,  starts, rows,  news, heads,
                    groups, key, value, elements, value_at, page, pages, scale};
  if (is_bf16)
    attend(a, static_cast<const bf16*>(data));
  else
    attend(a, static_cast<const float*>(data));
}

void finback_experts(int is_bf16, const float* x, const int64_t* index, const float* weight, const void* gate_up,
                     const void* down, float* out, float* hidden, int64_t tokens, int64_t choices, int64_t size,
                     int64_t width) {
  if (is_bf16)
    experts(x, index, weight, static_cast<const bf16*>(gate_up), static_cast<const bf16*>(down), out, hidden, tokens,
            choices, size, width);
  else
    experts(x, index, weight, static_cast<const float*>(gate_up), static_cast<const float*>(down), out, hidden,
            tokens, choices, size, width);
}
}
