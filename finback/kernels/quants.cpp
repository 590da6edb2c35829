// Products with matrices that stay quantized as in a GGUF file, for any number of rows. Twin: reference.quantized_product.
//
// A matrix is stored in panels of 16 rows, in as many bytes as in the file, with the bits in another order. A record of a
// panel holds the factors of its 16 rows side by side, followed by the numbers, 32 columns at a time: vectors of 64 bytes in
// which row r has four adjacent columns at byte 4r. With 4 bits, a vector holds four of eight columns in its low nibbles and
// the other four in its high nibbles. An instruction that multiplies four pairs of bytes and sums them thus leaves each row's
// sum in its own lane, so that no sum across lanes is needed.
//
// Activations are quantized to 8 bits with a factor per 32 numbers, as in llama.cpp. Sums of 32 products are integers and so
// exact; blocks are summed in a fixed order. So a row's result does not depend on the number of rows. The compiler flags forbid
// reordering and contracting floating-point operations, since either would break that order.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "numbers.h"

extern "C" int omp_get_num_threads();

// unrolls short loops, so that their arrays live in registers
#define UNROLL _Pragma("GCC unroll 8")

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t panel_rows = 16, group = 32;
// below this many multiplications, one thread finishes before a second one wakes up
constexpr int64_t little = 1 << 18;

inline float half(const uint8_t* at) {
  uint16_t h;
  std::memcpy(&h, at, 2);
  const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 1023;
  if (exponent == 0) return float_of(sign | bits_of(float(fraction) * (1.0f / (1 << 24))));
  return float_of(sign | (exponent == 31 ? 0x7f800000 : (exponent + 112) << 23) | fraction << 13);
}
// Half the power of two of an E8M0 byte, because mx_levels holds twice the E2M1 numbers.
inline float power(uint8_t e) { return e ? float_of(uint32_t(e - 1) << 23) : 0.0f; }

// ---- kinds of blocks, by ggml's numbers -----------------------------------------------------------------------------

enum Factors { one_half, two_halves, one_power, six_bits, signed_bytes };

// Numbers of `bits` bits each, from which `zero` is subtracted. Table entries are stored with `zero` added.
template <int number_, Factors factors_, int bits_, int zero_>
struct Kind {
  static constexpr int number = number_, bits = bits_, zero = zero_;
  static constexpr Factors factors = factors_;
  static constexpr bool is_nested = factors == six_bits || factors == signed_bytes;
  static constexpr int64_t columns = is_nested ? 256 : 32;  // per record
  static constexpr int64_t header = factors == one_half     ? 32
                                    : factors == two_halves ? 64
                                    : factors == one_power  ? 16
                                    : factors == six_bits   ? 64 + 12 * 16
                                                            : 32 + 16 * 16;
  static constexpr int64_t high = bits == 5 ? 64 : bits == 6 ? 128 : 0, low = bits == 8 ? 512 : 256;
  static constexpr int64_t part = high + low;  // bytes of 32 columns
  static constexpr int64_t bytes = header + columns / group * part;
  static constexpr bool has_table = number == 20 || number == 39;
};
using Q4_0 = Kind<2, one_half, 4, 8>;
using Q4_1 = Kind<3, two_halves, 4, 0>;
using Q5_0 = Kind<6, one_half, 5, 16>;
using Q5_1 = Kind<7, two_halves, 5, 0>;
using Q8_0 = Kind<8, one_half, 8, 128>;
using Q4_K = Kind<12, six_bits, 4, 0>;
using Q5_K = Kind<13, six_bits, 5, 0>;
using Q6_K = Kind<14, signed_bytes, 6, 32>;
using IQ4_NL = Kind<20, one_half, 4, 128>;
using MXFP4 = Kind<39, one_power, 4, 12>;

alignas(16) constexpr uint8_t iq4_levels[16] = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241};
alignas(16) constexpr uint8_t mx_levels[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
template <class K>
constexpr const uint8_t* levels() {
  return K::number == 39 ? mx_levels : iq4_levels;
}

// Calls f with the kind that has this number.
template <class F>
void with_kind(int64_t number, F f) {
  switch (number) {
    case 2: return f(Q4_0{});
    case 3: return f(Q4_1{});
    case 6: return f(Q5_0{});
    case 7: return f(Q5_1{});
    case 8: return f(Q8_0{});
    case 12: return f(Q4_K{});
    case 13: return f(Q5_K{});
    case 14: return f(Q6_K{});
    case 20: return f(IQ4_NL{});
    case 39: return f(MXFP4{});
  }
}

// ---- from blocks of a file to panels, and back to numbers -----------------------------------------------------------

// Stores and reads number q in column c of 32, in one row of a panel.
template <class K>
inline void put(uint8_t* part, int64_t row, int64_t c, uint8_t q) {
  const int64_t g = c / 4, at = row * 4 + c % 4;
  if (K::bits == 8) {
    part[g * 64 + at] = q;
    return;
  }
  part[K::high + g / 2 * 64 + at] |= (q & 15) << (g % 2 * 4);
  if (K::bits == 5) part[at] |= (q >> 4) << g;
  if (K::bits == 6) part[g / 4 * 64 + at] |= (q >> 4) << (g % 4 * 2);
}
template <class K>
inline uint8_t get(const uint8_t* part, int64_t row, int64_t c) {
  const int64_t g = c / 4, at = row * 4 + c % 4;
  if (K::bits == 8) return part[g * 64 + at];
  uint8_t q = part[K::high + g / 2 * 64 + at] >> (g % 2 * 4) & 15;
  if (K::bits == 5) q |= (part[at] >> g & 1) << 4;
  if (K::bits == 6) q |= (part[g / 4 * 64 + at] >> (g % 4 * 2) & 3) << 4;
  return q;
}

// Bytes of a block in the file.
template <class K>
constexpr int64_t stored() {
  return K::bytes / panel_rows;
}

// Writes a block of the file to a row of a panel's record, whose bits for that row must be 0.
template <class K>
void lay(const uint8_t* block, uint8_t* record, int64_t row) {
  const uint8_t* numbers = block + K::header / panel_rows;
  const int64_t fixed = K::factors == one_power ? 0 : K::factors == one_half || K::factors == signed_bytes ? 1 : 2;
  const uint8_t* halves = K::factors == signed_bytes ? block + 208 : block;
  for (int64_t i = 0; i < fixed; ++i) std::memcpy(record + 32 * i + 2 * row, halves + 2 * i, 2);
  if (K::factors == one_power) record[row] = block[0];
  if (K::factors == six_bits)
    for (int64_t i = 0; i < 12; ++i) record[64 + 16 * i + row] = block[4 + i];
  if (K::factors == signed_bytes)
    for (int64_t i = 0; i < 16; ++i) record[32 + 16 * i + row] = block[192 + i];
  for (int64_t c = 0; c < K::columns; ++c) {
    uint8_t q = 0;
    if (K::bits == 8) {
      q = numbers[c] ^ 0x80;  // a signed number plus 128
    } else if (K::columns == group) {
      const uint8_t* nibbles = numbers + (K::bits == 5 ? 4 : 0);
      q = nibbles[c % 16] >> (c / 16 * 4) & 15;
      if (K::bits == 5) q |= (numbers[c / 8] >> (c % 8) & 1) << 4;
    } else if (K::bits == 6) {
      const int64_t half = c / 128, quarter = c / 32 % 4, l = c % 32;
      q = block[64 * half + 32 * (quarter % 2) + l] >> (quarter / 2 * 4) & 15;
      q |= (block[128 + 32 * half + l] >> (2 * quarter) & 3) << 4;
    } else {
      const uint8_t* nibbles = numbers + (K::bits == 5 ? 32 : 0);
      q = nibbles[c / 64 * 32 + c % 32] >> (c / 32 % 2 * 4) & 15;
      if (K::bits == 5) q |= (numbers[c % 32] >> (c / 32) & 1) << 4;
    }
    put<K>(record + K::header + c / group * K::part, row, c % group, q);
  }
}

template <class K>
void pack(const uint8_t* file, uint8_t* panels, int64_t rows, int64_t columns) {
  const int64_t records = columns / K::columns, count = (rows + panel_rows - 1) / panel_rows;
#pragma omp parallel for schedule(static)
  for (int64_t panel = 0; panel < count; ++panel) {
    uint8_t* to = panels + panel * records * K::bytes;
    std::memset(to, 0, records * K::bytes);
    for (int64_t row = 0; row < std::min(panel_rows, rows - panel * panel_rows); ++row)
      for (int64_t r = 0; r < records; ++r)
        lay<K>(file + ((panel * panel_rows + row) * records + r) * stored<K>(), to + r * K::bytes, row);
  }
}

// The six-bit scale and minimum of the j-th 32 columns; b points at a row's first byte of twelve, which are 16 apart.
inline uint8_t six_bit_scale(const uint8_t* b, int64_t j) {
  return j < 4 ? b[16 * j] & 63 : (b[16 * (j + 4)] & 15) | (b[16 * (j - 4)] >> 6) << 4;
}
inline uint8_t six_bit_low(const uint8_t* b, int64_t j) {
  return j < 4 ? b[16 * (j + 4)] & 63 : b[16 * (j + 4)] >> 4 | (b[16 * j] >> 6) << 4;
}

// Dequantizes one row of a matrix.
template <class K, typename T>
void read_row(const uint8_t* panels, int64_t row, int64_t columns, T* out) {
  const int64_t records = columns / K::columns, at = row % panel_rows;
  const uint8_t* record = panels + row / panel_rows * records * K::bytes;
  for (int64_t r = 0; r < records; ++r, record += K::bytes)
    for (int64_t c = 0; c < K::columns; ++c) {
      const int64_t j = c / group;
      const uint8_t q = get<K>(record + K::header + j * K::part, at, c % group);
      const float number = float(K::has_table ? int(levels<K>()[q]) - K::zero : int(q) - K::zero);
      float scale = K::factors == one_power ? power(record[at]) : half(record + 2 * at), low = 0;
      if (K::factors == two_halves) low = half(record + 32 + 2 * at);
      if (K::factors == six_bits) {
        scale *= six_bit_scale(record + 64 + at, j);
        low = -half(record + 32 + 2 * at) * six_bit_low(record + 64 + at, j);
      }
      if (K::factors == signed_bytes) scale *= int8_t(record[32 + 16 * (c / 16) + at]);
      narrow(scale * number + low, out + r * K::columns + c);
    }
}

// ---- activations of 8 bits ------------------------------------------------------------------------------------------

// Rows are multiplied in blocks of several. A block keeps a group's numbers of all its rows side by side, and their factors too:
// row m of M, in the block that begins at row r, has group g's numbers at (r * groups + g * M + m) * 32.
struct Rows {
  int64_t count, columns, groups;
  std::vector<int8_t> q;
  std::vector<float> scale, weight;  // weight: the sum of a group times its factor
  std::vector<int32_t> sums[2];      // of a group's first and last 16 numbers
  void resize(int64_t new_count, int64_t new_columns) {
    count = new_count, columns = new_columns, groups = columns / group;
    q.resize(count * columns);
    for (auto* numbers : {&scale, &weight}) numbers->resize(count * groups);
    for (auto& numbers : sums) numbers.resize(count * groups);
  }
};

// The first row and the number of rows of a block; `most` is the largest number.
struct Block {
  int64_t first, size;
};
template <int64_t most>
Block block_at(int64_t row, int64_t count) {
  const int64_t whole = count / most * most, pairs = most > 4 ? count / 2 * 2 : whole;
  if (row < whole) return {row / most * most, most};
  return row < pairs ? Block{row / 2 * 2, 2} : Block{row, 1};
}

// Quantizes the 32 numbers of x.
template <typename T>
void quantize_group(const T* x, Rows& rows, int64_t at) {
  float v[group];
  int32_t n[group], first = 0, last = 0;
  uint32_t sizes[group];
#pragma omp simd
  for (int64_t i = 0; i < group; ++i) v[i] = to_float(x[i]);
  // the bits of magnitudes compare like the magnitudes, with infinity and then NaN at the top
#pragma omp simd
  for (int64_t i = 0; i < group; ++i) sizes[i] = bits_of(v[i]) & 0x7fffffff;
  UNROLL for (uint64_t half = group / 2; half; half /= 2)
#pragma omp simd
    for (uint64_t i = 0; i < half; ++i) sizes[i] = std::max(sizes[i], sizes[half + i]);
  const float top = float_of(sizes[0]), unit = top > 0 ? 127.0f / top : 0.0f, scale = top / 127.0f;
#pragma omp simd
  for (int64_t i = 0; i < group; ++i) n[i] = int32_t(std::nearbyint(std::min(std::max(v[i] * unit, -127.0f), 127.0f)));
  int8_t* q = rows.q.data() + at * group;
#pragma omp simd
  for (int64_t i = 0; i < group; ++i) q[i] = int8_t(n[i]);
#pragma omp simd reduction(+ : first, last)
  for (int64_t i = 0; i < group / 2; ++i) first += n[i], last += n[group / 2 + i];
  rows.scale[at] = scale;
  rows.weight[at] = scale * float(first + last);
  rows.sums[0][at] = first, rows.sums[1][at] = last;
}

// All threads of a team must call it.
template <int64_t most, typename T>
void quantize(const T* x, Rows& rows) {
#pragma omp for schedule(static)
  for (int64_t row = 0; row < rows.count; ++row) {
    const Block block = block_at<most>(row, rows.count);
    const int64_t at = block.first * rows.groups + row - block.first;
    for (int64_t g = 0; g < rows.groups; ++g)
      quantize_group(x + row * rows.columns + g * group, rows, at + g * block.size);
  }
}

// ---- vector operations of each instruction set, over some rows of a panel -------------------------------------------

// Plain loops over lanes, which the compiler may vectorize.
struct Plain {
  static constexpr int64_t lanes = 16;
  static constexpr int most = 1;  // most rows of activations per call
  static constexpr bool takes_signed = false;
  struct Bytes {
    uint8_t v[64];
  };
  struct Small {
    uint8_t v[16];
  };
  struct Ints {
    int32_t v[16];
  };
  struct Floats {
    float v[16];
  };
  template <class X, class F>
  static X each(F f) {
    X x;
    for (size_t i = 0; i < sizeof x.v / sizeof x.v[0]; ++i) x.v[i] = f(i);
    return x;
  }
  static Bytes load(const uint8_t* p) { return each<Bytes>([&](int i) { return p[i]; }); }
  static Bytes low(Bytes b) { return each<Bytes>([&](int i) { return b.v[i] & 15; }); }
  static Bytes high(Bytes b) { return each<Bytes>([&](int i) { return b.v[i] >> 4; }); }
  template <int shift, int mask>
  static Bytes with_bits(Bytes b, Bytes h) {
    return each<Bytes>([&](int i) { return b.v[i] | (h.v[i] >> shift & mask) << 4; });
  }
  static Bytes lookup(const uint8_t* table, Bytes b) { return each<Bytes>([&](int i) { return table[b.v[i]]; }); }
  static Ints ints(int32_t n) { return each<Ints>([&](int) { return n; }); }
  static Ints dot(Ints sum, Bytes w, const int8_t* a) {
    return each<Ints>([&](int i) {
      const uint8_t* p = w.v + 4 * i;
      return sum.v[i] + p[0] * a[0] + p[1] * a[1] + p[2] * a[2] + p[3] * a[3];
    });
  }
  static Ints dot_signed(Ints sum, Bytes w, const int8_t* a) { return dot(sum, w, a); }
  static Floats floats(Ints n) { return each<Floats>([&](int i) { return float(n.v[i]); }); }
  static Floats all(float x) { return each<Floats>([&](int) { return x; }); }
  static Floats mul(Floats a, Floats b) { return each<Floats>([&](int i) { return a.v[i] * b.v[i]; }); }
  static Floats mul_add(Floats a, Floats b, Floats c) { return each<Floats>([&](int i) { return a.v[i] * b.v[i] + c.v[i]; }); }
  static Floats halves(const uint8_t* p) { return each<Floats>([&](int i) { return half(p + 2 * i); }); }
  static Floats powers(const uint8_t* p) { return each<Floats>([&](int i) { return power(p[i]); }); }
  static Small small(const uint8_t* p) { return each<Small>([&](int i) { return p[i]; }); }
  template <int shift, int mask>
  static Small bits(Small s) {
    return each<Small>([&](int i) { return s.v[i] >> shift & mask; });
  }
  static Small joined(Small s, Small top) { return each<Small>([&](int i) { return s.v[i] | top.v[i] << 4; }); }
  static Floats unsigned_floats(Small s) { return each<Floats>([&](int i) { return float(s.v[i]); }); }
  static Floats signed_floats(Small s) { return each<Floats>([&](int i) { return float(int8_t(s.v[i])); }); }
  static void save(float* p, Floats x) { std::memcpy(p, x.v, sizeof x.v); }
};

#if defined(__AVX2__)
// Sixteen or eight bytes, one per row.
struct SmallOfX86 {
  using Small = __m128i;
  template <int shift, int mask>
  static Small bits(Small s) {
    return _mm_and_si128(_mm_srli_epi16(s, shift), _mm_set1_epi8(mask));
  }
  static Small joined(Small s, Small top) { return _mm_or_si128(s, _mm_slli_epi16(top, 4)); }
};
#endif

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define HAS_AVX2 1
struct Avx2 : SmallOfX86 {
  static constexpr int64_t lanes = 8;
  static constexpr int most = 4;
  static constexpr bool takes_signed = true;  // the sum of two products of unsigned and signed bytes may not fit 16 bits
  using Bytes = __m256i;
  using Ints = __m256i;
  using Floats = __m256;
  static Bytes load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static Bytes low(Bytes b) { return _mm256_and_si256(b, _mm256_set1_epi8(15)); }
  static Bytes high(Bytes b) { return low(_mm256_srli_epi16(b, 4)); }
  template <int shift, int mask>
  static Bytes with_bits(Bytes b, Bytes h) {
    const Bytes moved = shift < 4 ? _mm256_slli_epi16(h, 4 - shift) : _mm256_srli_epi16(h, shift - 4);
    return _mm256_or_si256(b, _mm256_and_si256(moved, _mm256_set1_epi8(mask << 4)));
  }
  static Bytes lookup(const uint8_t* table, Bytes b) {
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(table))), b);
  }
  static Ints ints(int32_t n) { return _mm256_set1_epi32(n); }
  static Ints four(const int8_t* a) {
    int32_t word;
    std::memcpy(&word, a, 4);
    return _mm256_set1_epi32(word);
  }
  static Ints added(Ints sum, __m256i pairs) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  static Ints dot(Ints sum, Bytes w, const int8_t* a) { return added(sum, _mm256_maddubs_epi16(w, four(a))); }
  static Ints dot_signed(Ints sum, Bytes w, const int8_t* a) {
    const Bytes s = _mm256_xor_si256(w, _mm256_set1_epi8(-128));
    return added(sum, _mm256_maddubs_epi16(_mm256_abs_epi8(s), _mm256_sign_epi8(four(a), s)));
  }
  static Floats floats(Ints n) { return _mm256_cvtepi32_ps(n); }
  static Floats all(float x) { return _mm256_set1_ps(x); }
  static Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
  static Floats mul_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
  static Floats halves(const uint8_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static Floats powers(const uint8_t* p) {
    const __m256i e = _mm256_sub_epi32(_mm256_cvtepu8_epi32(small(p)), _mm256_set1_epi32(1));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_max_epi32(e, _mm256_setzero_si256()), 23));
  }
  static Small small(const uint8_t* p) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)); }
  static Floats unsigned_floats(Small s) { return floats(_mm256_cvtepu8_epi32(s)); }
  static Floats signed_floats(Small s) { return floats(_mm256_cvtepi8_epi32(s)); }
  static void save(float* p, Floats x) { _mm256_storeu_ps(p, x); }
};
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)
#define HAS_AVX512 1
struct Avx512 : SmallOfX86 {
  static constexpr int64_t lanes = 16;
  static constexpr int most = 8;
  static constexpr bool takes_signed = false;
  using Bytes = __m512i;
  using Ints = __m512i;
  using Floats = __m512;
  static Bytes load(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static Bytes low(Bytes b) { return _mm512_and_si512(b, _mm512_set1_epi8(15)); }
  static Bytes high(Bytes b) { return low(_mm512_srli_epi16(b, 4)); }
  template <int shift, int mask>
  static Bytes with_bits(Bytes b, Bytes h) {
    const Bytes moved = shift < 4 ? _mm512_slli_epi16(h, 4 - shift) : _mm512_srli_epi16(h, shift - 4);
    return _mm512_or_si512(b, _mm512_and_si512(moved, _mm512_set1_epi8(char(mask << 4))));
  }
  static Bytes lookup(const uint8_t* table, Bytes b) {
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(table))), b);
  }
  static Ints ints(int32_t n) { return _mm512_set1_epi32(n); }
  static Ints dot(Ints sum, Bytes w, const int8_t* a) {
    int32_t word;
    std::memcpy(&word, a, 4);
    return _mm512_dpbusd_epi32(sum, w, _mm512_set1_epi32(word));
  }
  static Ints dot_signed(Ints sum, Bytes w, const int8_t* a) { return dot(sum, w, a); }
  static Floats floats(Ints n) { return _mm512_cvtepi32_ps(n); }
  static Floats all(float x) { return _mm512_set1_ps(x); }
  static Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static Floats mul_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  static Floats halves(const uint8_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static Floats powers(const uint8_t* p) {
    const __m512i e = _mm512_sub_epi32(_mm512_cvtepu8_epi32(small(p)), _mm512_set1_epi32(1));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_max_epi32(e, _mm512_setzero_si512()), 23));
  }
  static Small small(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
  static Floats unsigned_floats(Small s) { return floats(_mm512_cvtepu8_epi32(s)); }
  static Floats signed_floats(Small s) { return floats(_mm512_cvtepi8_epi32(s)); }
  static void save(float* p, Floats x) { _mm512_storeu_ps(p, x); }
};
#endif

// ---- the product ----------------------------------------------------------------------------------------------------

// The factors of a record. Its j-th 32 columns have `scale` (two for signed bytes, of 16 columns each) and `low`, the minimum.
template <class V, class K>
struct RecordFactors {
  typename V::Floats d, m;
  const uint8_t* bytes;
  RecordFactors(const uint8_t* record, int64_t lane) {
    d = K::factors == one_power ? V::powers(record + lane) : V::halves(record + 2 * lane);
    if (K::factors == two_halves) m = V::halves(record + 32 + 2 * lane);
    if (K::factors == six_bits) m = V::mul(V::halves(record + 32 + 2 * lane), V::all(-1.0f));
    bytes = record + (K::factors == six_bits ? 64 : 32) + lane;
  }
  void of(int64_t j, typename V::Floats* scale, typename V::Floats* low) const {
    scale[0] = d, *low = m;
    if (K::factors == six_bits) {
      const auto own = V::small(bytes + 16 * (j + 4));
      if (j < 4) {
        scale[0] = V::mul(d, V::unsigned_floats(V::template bits<0, 63>(V::small(bytes + 16 * j))));
        *low = V::mul(m, V::unsigned_floats(V::template bits<0, 63>(own)));
      } else {
        const auto top = V::template bits<6, 3>(V::small(bytes + 16 * (j - 4)));
        const auto top_low = V::template bits<6, 3>(V::small(bytes + 16 * j));
        scale[0] = V::mul(d, V::unsigned_floats(V::joined(V::template bits<0, 15>(own), top)));
        *low = V::mul(m, V::unsigned_floats(V::joined(V::template bits<4, 15>(own), top_low)));
      }
    }
    if (K::factors == signed_bytes)
      for (int64_t i = 0; i < 2; ++i)
        scale[i] = V::mul(d, V::signed_floats(V::small(bytes + 16 * (2 * j + i))));
  }
};

// The numbers of columns 4g .. 4g + 3 of 32.
template <class V, class K, int g>
inline typename V::Bytes four_columns(const uint8_t* part, int64_t lane) {
  if (K::bits == 8) return V::load(part + g * 64 + 4 * lane);
  const auto both = V::load(part + K::high + g / 2 * 64 + 4 * lane);
  const auto q = g % 2 ? V::high(both) : V::low(both);
  if constexpr (K::bits == 5) return V::template with_bits<g, 1>(q, V::load(part + 4 * lane));
  if constexpr (K::bits == 6) return V::template with_bits<g % 4 * 2, 3>(q, V::load(part + g / 4 * 64 + 4 * lane));
  return K::has_table ? V::lookup(levels<K>(), q) : q;
}

// sums[i][m] += columns from 4g on, of 32, times row m's activations; if `two`, i = 1 has the last 16 columns.
template <class V, class K, int M, int two, int g>
[[gnu::always_inline]] inline void add_four(const uint8_t* part, int64_t lane, const int8_t* a, typename V::Ints (*sums)[M]) {
  constexpr bool is_wide = K::zero == 128;
  const auto w = four_columns<V, K, g>(part, lane);
  UNROLL for (int m = 0; m < M; ++m) {
    auto& sum = sums[g / 4 * two][m];
    sum = is_wide ? V::dot_signed(sum, w, a + m * group + 4 * g) : V::dot(sum, w, a + m * group + 4 * g);
  }
  if constexpr (g + 1 < 8) add_four<V, K, M, two, g + 1>(part, lane, a, sums);
}

// What is subtracted from a panel's numbers where V multiplies them, and whether their factors are per 16 columns.
template <class V, class K>
constexpr int zero_of = K::zero == 128 && V::takes_signed ? 0 : K::zero;
template <class K>
constexpr int is_halved = K::factors == signed_bytes;

// -zero times the sums of each group, or of both its halves, with which sums of products begin. All threads must call it.
template <class V, class K>
void offsets_of(const Rows& rows, int32_t* to) {
  constexpr int zero = zero_of<V, K>;
  if (!zero) return;
  const int64_t count = rows.count * rows.groups;
  const int32_t *first = rows.sums[0].data(), *last = rows.sums[1].data();
#pragma omp for simd
  for (int64_t i = 0; i < count; ++i) {
    to[i] = -zero * (is_halved<K> ? first[i] : first[i] + last[i]);
    if (is_halved<K>) to[count + i] = -zero * last[i];
  }
}

// Multiplies a block of M rows of activations by `lanes` rows of a panel.
template <class V, class K, int M>
void few(const uint8_t* panel, const Rows& rows, const int32_t* offsets, int64_t row, int64_t lane, float* out) {
  constexpr int two = is_halved<K>, zero = zero_of<V, K>;
  typename V::Floats total[M];
  UNROLL for (int m = 0; m < M; ++m) total[m] = V::all(0);
  const int64_t records = rows.columns / K::columns, start = row * rows.groups, half = rows.count * rows.groups;
  const int8_t* a = rows.q.data() + start * group;
  const float *row_scale = rows.scale.data() + start, *weight = rows.weight.data() + start;
  offsets += start;
  for (int64_t r = 0; r < records; ++r, panel += K::bytes) {
    const RecordFactors<V, K> factors(panel, lane);
    for (int64_t j = 0; j < K::columns / group; ++j) {
      typename V::Ints sums[two + 1][M];
      UNROLL for (int m = 0; m < M; ++m)
        UNROLL for (int i = 0; i <= two; ++i) sums[i][m] = V::ints(zero ? offsets[i * half + m] : 0);
      add_four<V, K, M, two, 0>(panel + K::header + j * K::part, lane, a, sums);
      typename V::Floats scale[two + 1], low;
      factors.of(j, scale, &low);
      UNROLL for (int m = 0; m < M; ++m) {
        auto found = V::mul(V::floats(sums[0][m]), scale[0]);
        if (two) found = V::mul_add(V::floats(sums[two][m]), scale[two], found);
        total[m] = V::mul_add(found, V::all(row_scale[m]), total[m]);
        if (K::factors == two_halves || K::factors == six_bits) total[m] = V::mul_add(low, V::all(weight[m]), total[m]);
      }
      a += M * group, row_scale += M, weight += M, offsets += M;
    }
  }
  UNROLL for (int m = 0; m < M; ++m) V::save(out + m * panel_rows + lane, total[m]);
}

// The destination of a product, `outputs` numbers per row.
template <typename T>
struct Output {
  T* data;
  int64_t outputs;
};

template <class V, class K, int M, typename T>
void some(const uint8_t* panel, const Rows& rows, const int32_t* offsets, int64_t row, int64_t count, const Output<T>& to,
          int64_t first) {
  float out[M * panel_rows];
  for (int64_t lane = 0; lane < panel_rows; lane += V::lanes) few<V, K, M>(panel, rows, offsets, row, lane, out);
  for (int m = 0; m < M; ++m) {
    T* at = to.data + (row + m) * to.outputs + first;
    const float* from = out + m * panel_rows;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) narrow(from[i], at + i);
  }
}

// Multiplies by one matrix of a stack, `size` rows whose outputs begin at `first`; all threads of a team must call it.
template <class V, class K, typename T>
void multiply(const uint8_t* panels, const Rows& rows, const int32_t* offsets, int64_t size, const Output<T>& to, int64_t first) {
  const int64_t count = (size + panel_rows - 1) / panel_rows, bytes = rows.columns / K::columns * K::bytes;
  // With many rows a thread takes some of them, which it has quantized itself and which fit its cache.
  const int64_t most = std::clamp<int64_t>(rows.count / omp_get_num_threads(), 64, 256);
  const int64_t chunks = std::max<int64_t>(1, rows.count / most), chunk = (rows.count / chunks + 7) / 8 * 8;
#pragma omp for schedule(static) collapse(2) nowait
  for (int64_t c = 0; c < chunks; ++c)
    for (int64_t p = 0; p < count; ++p) {
      const uint8_t* panel = panels + p * bytes;
      const int64_t seen = std::min(panel_rows, size - p * panel_rows), at = first + p * panel_rows;
      const int64_t end = c + 1 < chunks ? (c + 1) * chunk : rows.count;
      for (int64_t row = c * chunk; row < end;) {
        const int64_t taken = block_at<V::most>(row, rows.count).size;
        if (taken == V::most)
          some<V, K, V::most>(panel, rows, offsets, row, seen, to, at);
        else if (taken == 2)
          some<V, K, 2>(panel, rows, offsets, row, seen, to, at);
        else
          some<V, K, 1>(panel, rows, offsets, row, seen, to, at);
        row += taken;
      }
    }
}

// Stacked matrices with equal columns; parts (n, 3): kind, offset of its panels in bytes, rows.
struct Matrices {
  const uint8_t* panels;
  const int64_t* parts;
  int64_t n;
};

template <class V, typename T, typename U>
void product(const T* x, const Matrices& w, Output<U> to, int64_t count, int64_t columns) {
  static thread_local Rows rows;
  static thread_local std::vector<int32_t> offsets;  // (parts, 2, count * groups)
  rows.resize(count, columns);
  const int64_t each = 2 * count * rows.groups;
  offsets.resize(w.n * each);
  Rows& shared = rows;
  int32_t* starts = offsets.data();
  const auto prepare = [&shared, starts, each, x, &w] {
    quantize<V::most>(x, shared);
    for (int64_t i = 0; i < w.n; ++i)
      with_kind(w.parts[3 * i], [&](auto kind) { offsets_of<V, decltype(kind)>(shared, starts + i * each); });
  };
  const bool is_little = count <= 16;  // which one thread prepares before others wake up
  if (is_little) prepare();
#pragma omp parallel if (count * columns * to.outputs > little)
  {
    if (!is_little) prepare();
    int64_t first = 0;
    for (int64_t i = 0; i < w.n; ++i) {
      const int64_t* part = w.parts + 3 * i;
      with_kind(part[0], [&](auto kind) {
        multiply<V, decltype(kind)>(w.panels + part[1], shared, starts + i * each, part[2], to, first);
      });
      first += part[2];
    }
  }
}

// down(silu(gate x) * up x); gate and up have `width` rows each, and values between the products are fp32.
template <class V, typename T>
void feed_forward(const T* x, const Matrices& gate_up, const Matrices& down, Output<T> to, int64_t count, int64_t columns,
                  int64_t width) {
  static thread_local std::vector<float> scratch;
  scratch.resize(3 * count * width);
  float *both = scratch.data(), *hidden = both + 2 * count * width;
  product<V>(x, gate_up, Output<float>{both, 2 * width}, count, columns);
#pragma omp parallel for schedule(static) if (count > 8)
  for (int64_t row = 0; row < count; ++row) {
    const float *gate = both + 2 * row * width, *up = gate + width;
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) hidden[row * width + i] = silu(gate[i]) * up[i];
  }
  product<V>(hidden, down, to, count, width);
}

// Calls f with the instruction set of this number, or with the plain loops if the processor lacks it.
template <class F>
void with_form(int64_t form, F f) {
#ifdef HAS_AVX512
  if (form == 2) return f(Avx512{});
#endif
#ifdef HAS_AVX2
  if (form == 1) return f(Avx2{});
#endif
  f(Plain{});
}

}  // namespace

extern "C" {

void finback_quant_pack(int64_t kind, const uint8_t* file, uint8_t* panels, int64_t rows, int64_t columns) {
  with_kind(kind, [&](auto k) { pack<decltype(k)>(file, panels, rows, columns); });
}

void finback_quant_rows(int64_t is_bf16, int64_t kind, const uint8_t* panels, const int64_t* index, void* out,
                        int64_t count, int64_t columns) {
  BOTH(is_bf16, T, with_kind(kind, [&](auto k) {
         for (int64_t i = 0; i < count; ++i)
           read_row<decltype(k)>(panels, index[i], columns, static_cast<T*>(out) + i * columns);
       }))
}

// The instruction sets of this processor: plain, AVX2, AVX-512 with VNNI.
void finback_quant_forms(int64_t* has) {
  has[0] = 1, has[1] = has[2] = 0;
#ifdef HAS_AVX2
  has[1] = 1;
#endif
#ifdef HAS_AVX512
  has[2] = 1;
#endif
}

void finback_quant_product(int64_t form, int64_t is_bf16, const void* x, const uint8_t* panels, const int64_t* parts,
                           int64_t n, void* out, int64_t count, int64_t columns, int64_t outputs) {
  BOTH(is_bf16, T, {
    const T* in = static_cast<const T*>(x);
    const Output<T> to{static_cast<T*>(out), outputs};
    with_form(form, [&](auto v) { product<decltype(v)>(in, {panels, parts, n}, to, count, columns); });
  })
}

void finback_quant_feed_forward(int64_t form, int64_t is_bf16, const void* x, const uint8_t* gate_up,
                                const int64_t* gate_up_parts, int64_t gate_up_n, const uint8_t* down,
                                const int64_t* down_parts, int64_t down_n, void* out, int64_t count, int64_t columns,
                                int64_t width, int64_t outputs) {
  BOTH(is_bf16, T, {
    const T* in = static_cast<const T*>(x);
    const Output<T> to{static_cast<T*>(out), outputs};
    const Matrices first{gate_up, gate_up_parts, gate_up_n}, second{down, down_parts, down_n};
    with_form(form, [&](auto v) { feed_forward<decltype(v)>(in, first, second, to, count, columns, width); });
  })
}
}
