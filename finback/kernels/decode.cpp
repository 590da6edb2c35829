// All blocks of a dense model for a few new tokens, in one call: for weights in blocks of a GGUF file and grouped-query attention.
// It runs the kernels of cpu.cpp and quants.cpp in the order in which the model's modules call them, and rounds where they
// round, so the results are the same to the bit. What it saves is eight calls from Python per block.

#include <cstdint>
#include <vector>

#include "numbers.h"

extern "C" {
void finback_add_norm(int64_t, const void*, const void*, const float*, void*, void*, float*, int64_t, int64_t, double);
void finback_quant_product(int64_t, int64_t, const void*, const uint8_t*, const int64_t*, int64_t, void*, int64_t, int64_t,
                           int64_t);
void finback_quant_feed_forward(int64_t, int64_t, const void*, const uint8_t*, const int64_t*, int64_t, const uint8_t*,
                                const int64_t*, int64_t, void*, int64_t, int64_t, int64_t, int64_t);
void finback_grouped_query(int64_t, const void*, void*, void*, const int64_t*, const int64_t*, const int64_t*, const int64_t*,
                           const float*, const float*, const float*, const float*, int64_t, int64_t, int64_t, int64_t, int64_t,
                           int64_t, int64_t, double, double);
}

namespace {

// Stacked matrices as BlockLinear.matrices returns them, and a bias in the activations' dtype, or null.
struct Matrices {
  const uint8_t* panels;
  const int64_t* parts;
  int64_t n;
  const void* bias;
};

// One block; Python writes the fields as int64, in this order. Query and key gains may be null.
struct Block {
  const float *attention_gain, *query_gain, *key_gain, *feed_forward_gain;
  Matrices qkv, out, gate_up, down;
  int64_t width;   // of the feed-forward
  int64_t window;  // of the attention, in tokens; 0: none
};
static_assert(sizeof(Block) == 22 * sizeof(int64_t), "pointers have 64 bits");

struct Sizes {
  int64_t rows, new_tokens, hidden, heads, groups, size, page, pages;
};

struct Rows {
  const int64_t *slots, *table, *lengths, *starts;
  const float *cosine, *sine;
};

template <typename T>
void product(int64_t form, const Matrices& w, const T* x, T* out, int64_t tokens, int64_t columns, int64_t outputs) {
  finback_quant_product(form, sizeof(T) == 2, x, w.panels, w.parts, w.n, out, tokens, columns, outputs);
  if (const T* bias = static_cast<const T*>(w.bias))
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t i = 0; i < outputs; ++i) narrow(to_float(out[t * outputs + i]) + to_float(bias[i]), out + t * outputs + i);
}

template <typename T>
void decode(int64_t form, T* x, const Block* blocks, int64_t count, T* cache, int64_t layer_size, const Rows& rows,
            const Sizes& s, double eps, double scale) {
  constexpr int64_t is_bf16 = sizeof(T) == 2;
  const int64_t tokens = s.rows * s.new_tokens, d = s.hidden, all = (s.heads + 2 * s.groups) * s.size, read = s.heads * s.size;
  static thread_local std::vector<T> scratch;
  static thread_local std::vector<int64_t> starts;
  scratch.resize(tokens * (2 * d + all + read)), starts.resize(s.rows);
  T *normed = scratch.data(), *y = normed + tokens * d, *qkv = y + tokens * d, *attended = qkv + tokens * all;
  for (const Block* b = blocks; b < blocks + count; ++b, cache += layer_size) {
    // adds what the block before computed
    finback_add_norm(is_bf16, x, b == blocks ? nullptr : y, b->attention_gain, x, normed, nullptr, tokens, d, eps);
    product(form, b->qkv, normed, qkv, tokens, d, all);
    for (int64_t r = 0; b->window && r < s.rows; ++r)
      starts[r] = std::max(rows.starts ? rows.starts[r] : 0, rows.lengths[r] + 1 - b->window);
    finback_grouped_query(is_bf16, qkv, cache, attended, rows.slots, rows.table, rows.lengths,
                          b->window ? starts.data() : rows.starts, rows.cosine, rows.sine, b->query_gain, b->key_gain, s.rows,
                          s.new_tokens, s.heads, s.groups, s.size, s.page, s.pages, eps, scale);
    product(form, b->out, attended, y, tokens, read, d);
    finback_add_norm(is_bf16, x, y, b->feed_forward_gain, x, normed, nullptr, tokens, d, eps);
    finback_quant_feed_forward(form, is_bf16, normed, b->gate_up.panels, b->gate_up.parts, b->gate_up.n, b->down.panels,
                               b->down.parts, b->down.n, y, tokens, d, b->width, d);
  }
  for (int64_t i = 0; i < tokens * d; ++i) narrow(to_float(x[i]) + to_float(y[i]), x + i);
}

}  // namespace

extern "C" void finback_decode_blocks(int64_t is_bf16, int64_t form, void* x, const int64_t* blocks, int64_t count, void* cache,
                                      int64_t layer_size, const int64_t* slots, const int64_t* table, const int64_t* lengths,
                                      const int64_t* starts, const float* cosine, const float* sine, int64_t rows,
                                      int64_t new_tokens, int64_t hidden, int64_t heads, int64_t groups, int64_t size,
                                      int64_t page, int64_t pages, double eps, double scale) {
  BOTH(is_bf16, T,
       decode(form, static_cast<T*>(x), reinterpret_cast<const Block*>(blocks), count, static_cast<T*>(cache), layer_size,
              {slots, table, lengths, starts, cosine, sine}, {rows, new_tokens, hidden, heads, groups, size, page, pages}, eps,
              scale))
}
