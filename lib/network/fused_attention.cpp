// Attention within each sequence of a pack in one pass: rotary positions, scores, softmax and
// weighted values of a block of queries stay in a core's cache. Softmax is that of one pass over
// blocks of keys (Milakov and Gimelshein 2018; Dao et al. 2022), in float32 and in powers of 2.
//
// Built by lib/network/fused.py for processors with AVX-512; AMX, if there is any, computes the
// products of bfloat16. What a sequence gives does not depend on its neighbours or on threads.
//
// Shapes: T tokens of a pack; n of a sequence; d, head_dim, even; width, d rounded up to what the
// products take at once. Scores are (keys, queries), and what is mixed is (d, queries): a query has
// a lane of its own, so that softmax needs nothing from other lanes.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <torch/library.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#define INLINE inline __attribute__((always_inline))

namespace {

constexpr int64_t LANES = 16, QUERIES = 32;  // numbers of a vector; queries of a block
constexpr int64_t KEYS = 128;                // keys of a block: its scores stay in the first cache

typedef float Floats __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
using Half = uint16_t;  // the bits of a bfloat16

INLINE int64_t up(int64_t number, int64_t step) { return (number + step - 1) / step * step; }

// Vectors.

INLINE Floats load(const float* from) { return *reinterpret_cast<const Floats*>(from); }
INLINE void store(float* to, Floats x) { *reinterpret_cast<Floats*>(to) = x; }

INLINE __mmask16 first_lanes(int64_t count) {
  return count >= LANES ? 0xffff : static_cast<__mmask16>((1 << count) - 1);
}
INLINE Floats load(const float* from, __mmask16 lanes) { return _mm512_maskz_loadu_ps(lanes, from); }
INLINE Floats load(const Half* from, __mmask16 lanes) {
  const __m256i bits = _mm256_maskz_loadu_epi16(lanes, from);
  return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
}
INLINE void store(float* to, Floats x, __mmask16 lanes) { _mm512_mask_storeu_ps(to, lanes, x); }
INLINE void store(Half* to, Floats x, __mmask16 lanes) {  // rounds to nearest, ties to even
  const Words bits = (Words)x;
  const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  _mm256_mask_storeu_epi16(to, lanes, _mm512_cvtepi32_epi16((__m512i)rounded));
}

INLINE void store16(Half* to, Words bits) {  // the lower half of each
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16((__m512i)bits));
}

INLINE Floats larger(Floats a, Floats b) { return a > b ? a : b; }
// Lane i gets lane i ^ 1.
INLINE Floats neighbours(Floats x) { return (Floats)_mm512_permute_ps((__m512)x, 0b10110001); }
INLINE void transpose(Floats (&x)[LANES]) {
#pragma GCC unroll 4
  for (int bit = 0; bit < 4; ++bit) {
    const int step = 1 << bit;
    Ints low, high;
    for (int i = 0; i < LANES; ++i) {
      low[i] = i & step ? LANES + (i ^ step) : i;
      high[i] = i & step ? LANES + i : i ^ step;
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i)
      if (!(i & step)) {
        const __m512 a = (__m512)x[i], b = (__m512)x[i + step];
        x[i] = (Floats)_mm512_permutex2var_ps(a, (__m512i)low, b);
        x[i + step] = (Floats)_mm512_permutex2var_ps(a, (__m512i)high, b);
      }
  }
}

// 2 to the power of x <= 0. The polynomials are minimax on [-0.5, 0.5] (Remez), with relative
// errors of 7.5e-5, below bfloat16's rounding of 2e-3, and 1.9e-9.
template <bool rough>
INLINE Floats exp2(Floats x) {
  x = larger(Floats{} - 125.f, x);  // NaN stays NaN
  const float shift = 12582912.f + 127.f;  // 1.5 * 2^23: the whole part stands in the low bits
  const Floats shifted = x + shift;
  const Floats f = x - (shifted - shift);
  const Floats head = 1.534581242e-4f * f + 1.339993090e-3f;
  const Floats p = rough ? ((0.055171669f * f + 0.242611125f) * f + 0.693260968f) * f + 0.999928057f
                         : ((((head * f + 9.618489072e-3f) * f + 5.550328642e-2f) * f +
                             2.402264625e-1f) * f + 6.931471825e-1f) * f + 1.0f;
  return p * (Floats)((Ints)shifted << 23);  // by addition to its bits, NaN could become finite
}

// Turn n rows of d by their positions: cos and sin are (n, d), the sign of sin included. Queries
// and keys have the two numbers that turn together as neighbours.
template <typename T, typename Element>
INLINE void turn(const T* in, int64_t stride, const float* cos, const float* sin, float scale,
                 int64_t n, int64_t d, int64_t width, Element* out) {
  for (int64_t t = 0; t < n; ++t, in += stride, cos += d, sin += d, out += width)
    for (int64_t i = 0; i < d; i += LANES) {
      const __mmask16 lanes = first_lanes(d - i);
      const Floats x = load(in + i, lanes) * scale;
      store(out + i, x * load(cos + i, lanes) + neighbours(x) * load(sin + i, lanes), lanes);
    }
}

// Call put(row, column, x) with the LANES numbers of each column of (rows, columns) that begin at
// each row that is a multiple of LANES and below `padded`; those after `rows` are zeros.
template <typename Put>
INLINE void by_columns(const float* in, int64_t stride, int64_t rows, int64_t padded,
                       int64_t columns, Put put) {
  for (int64_t row = 0; row < padded; row += LANES)
    for (int64_t column = 0; column < columns; column += LANES) {
      const __mmask16 lanes = first_lanes(columns - column);
      Floats x[LANES];
#pragma GCC unroll 16
      for (int64_t i = 0; i < LANES; ++i)
        x[i] = row + i < rows ? load(in + (row + i) * stride + column, lanes) : Floats{};
      transpose(x);
#pragma GCC unroll 16
      for (int64_t i = 0; i < LANES; ++i)
        if (column + i < columns) put(row, column + i, x[i]);
    }
}

// Products. `scores`, (KEYS, QUERIES) float32, holds the weights after `put`.

template <typename T>
struct Fma {  // float32 products by vector instructions
  using Element = float;
  static constexpr int64_t WIDTH = 8, STEP = 8;  // width and number of keys are multiples of these
  static void begin() {}
  static void end() {}

  static INLINE void lay_values(const T* v, int64_t stride, int64_t n, int64_t d, int64_t width,
                                float* values) {
    for (int64_t t = 0; t < n; ++t, v += stride, values += width)
      for (int64_t i = 0; i < d; i += LANES) {
        const __mmask16 lanes = first_lanes(d - i);
        store(values + i, load(v + i, lanes), lanes);
      }
  }
  // c (8, QUERIES) = a (8, k) times b (k, QUERIES), added to c if `add`, in the first vectors.
  template <int vectors>
  static INLINE void block(const float* a, int64_t a_row, int64_t a_column, const float* b,
                           int64_t k, float* c, bool add) {
    Floats sums[8][vectors];
    for (int r = 0; r < 8; ++r)
      for (int v = 0; v < vectors; ++v)
        sums[r][v] = add ? load(c + r * QUERIES + v * LANES) : Floats{};
    for (int64_t i = 0; i < k; ++i, a += a_column, b += QUERIES) {
      Floats right[vectors];
      for (int v = 0; v < vectors; ++v) right[v] = load(b + v * LANES);
#pragma GCC unroll 8
      for (int r = 0; r < 8; ++r) {
        const Floats left = (Floats)_mm512_set1_ps(a[r * a_row]);
        for (int v = 0; v < vectors; ++v) sums[r][v] += left * right[v];
      }
    }
    for (int r = 0; r < 8; ++r)
      for (int v = 0; v < vectors; ++v) store(c + r * QUERIES + v * LANES, sums[r][v]);
  }
  template <int vectors>
  static INLINE void score(const float* keys, int64_t count, const float* queries, int64_t d,
                           int64_t width, float* scores) {
    for (int64_t t = 0; t < count; t += 8)
      block<vectors>(keys + t * width, width, 1, queries, d, scores + t * QUERIES, false);
  }
  static INLINE void put(float* scores, Floats even, Floats odd) {
    store(scores, even), store(scores + QUERIES, odd);
  }
  template <int vectors>
  static INLINE void mix(const float* values, int64_t count, const float* weights, int64_t width,
                         float* mixed, bool add) {
    for (int64_t i = 0; i < width; i += 8)
      block<vectors>(values + i, 1, width, weights, count, mixed + i * QUERIES, add);
  }
};

struct Amx {  // bfloat16 products by tiles; queries and weights stand by pairs, as tiles take them
  using Element = Half;
  static constexpr int64_t WIDTH = 32, STEP = 32, ROW = 4 * QUERIES;  // bytes of a row of scores
  struct Config {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };
  static void begin() { const Config config; _tile_loadconfig(&config); }
  static void end() { _tile_release(); }

  // To panels of (width, KEYS), by words of two numbers of a token.
  static INLINE void lay_values(const Half* v, int64_t stride, int64_t n, int64_t d, int64_t width,
                                Half* values) {
    by_columns(reinterpret_cast<const float*>(v), stride / 2, n, up(n, STEP), d / 2,
               [=](int64_t t, int64_t i, Floats x) {
                 Half* to = values + t / KEYS * KEYS * width + 2 * i * KEYS + t % KEYS;
                 store16(to, (Words)x), store16(to + KEYS, (Words)x >> 16);
               });
  }
  // Tiles 0 to 3 += (32, 32) of a times (32, 32) of b, in pairs.
  static INLINE void tiles(const Half* a, int64_t a_bytes, const Half* b, int64_t b_bytes) {
    _tile_loadd(4, a, a_bytes); _tile_loadd(5, a + 8 * a_bytes, a_bytes);
    _tile_loadd(6, b, b_bytes); _tile_loadd(7, b + 32, b_bytes);
    _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
  }
  static INLINE void begin_tiles(const float* c, bool add) {
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    if (!add) return;
    _tile_loadd(0, c, ROW); _tile_loadd(1, c + 16, ROW);
    _tile_loadd(2, c + 4 * ROW, ROW); _tile_loadd(3, c + 4 * ROW + 16, ROW);
  }
  static INLINE void end_tiles(float* c) {
    _tile_stored(0, c, ROW); _tile_stored(1, c + 16, ROW);
    _tile_stored(2, c + 4 * ROW, ROW); _tile_stored(3, c + 4 * ROW + 16, ROW);
  }
  template <int>
  static INLINE void score(const Half* keys, int64_t count, const Half* queries, int64_t,
                           int64_t width, float* scores) {
    for (int64_t t = 0; t < up(count, STEP); t += 32) {
      begin_tiles(nullptr, false);
      for (int64_t k = 0; k < width; k += 32)
        tiles(keys + t * width + k, 2 * width, queries + k * QUERIES, ROW);
      end_tiles(scores + t * QUERIES);
    }
  }
  static INLINE void put(float* scores, Floats even, Floats odd) {  // over scores already read
    const Words low = (Words)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)even));
    const Words high = (Words)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)odd));
    store(scores, (Floats)(low | high << 16));
  }
  template <int>
  static INLINE void mix(const Half* values, int64_t count, const Half* weights, int64_t width,
                         float* mixed, bool add) {
    for (int64_t i = 0; i < width; i += 32) {
      begin_tiles(mixed + i * QUERIES, add);
      for (int64_t t = 0; t < count; t += 32)
        tiles(values + i * KEYS + t, 2 * KEYS, weights + 2 * t * QUERIES, 2 * ROW);
      end_tiles(mixed + i * QUERIES);
    }
  }
};

// Attention.

// Make weights of the scores; `tops` and `sums` are those of all blocks before, and with a larger
// top, `sums` and `mixed` are scaled to it.
template <typename Kernel, bool rough, int vectors>
INLINE void weigh(float* scores, int64_t keys, bool first, int64_t d, Floats* tops, Floats* sums,
                  float* mixed) {
  for (int v = 0; v < vectors; ++v, scores += LANES, mixed += LANES) {
    Floats largest[8];
    for (int r = 0; r < 8; ++r) largest[r] = load(scores + r * QUERIES);
    for (int64_t t = 8; t < keys; t += 8)
      for (int r = 0; r < 8; ++r)
        largest[r] = larger(largest[r], load(scores + (t + r) * QUERIES));
    Floats top = largest[0], sum{};
    for (int r = 1; r < 8; ++r) top = larger(top, largest[r]);
    if (!first) {
      top = larger(top, tops[v]);
      const Floats factor = exp2<false>(tops[v] - top);
      sum = sums[v] * factor;
      for (int64_t i = 0; i < d; ++i)
        store(mixed + i * QUERIES, load(mixed + i * QUERIES) * factor);
    }
    for (int64_t t = 0; t < keys; t += 2) {
      const Floats even = exp2<rough>(load(scores + t * QUERIES) - top);
      const Floats odd = exp2<rough>(load(scores + (t + 1) * QUERIES) - top);
      sum += even + odd;
      Kernel::put(scores + t * QUERIES, even, odd);
    }
    tops[v] = top, sums[v] = sum;
  }
}

// Attend for a block of queries, and leave (d, QUERIES) in `mixed`.
template <typename Kernel, bool rough, int vectors, typename Element = typename Kernel::Element>
INLINE void attend_block(const Element* keys, const Element* values, const Element* queries,
                         int64_t n, int64_t d, int64_t width, float* scores, float* mixed) {
  Floats tops[vectors], sums[vectors];
  for (int64_t start = 0; start < n; start += KEYS) {
    const int64_t count = std::min(KEYS, n - start), padded = up(count, Kernel::STEP);
    Kernel::template score<vectors>(keys + start * width, count, queries, d, width, scores);
    std::fill_n(scores + count * QUERIES, (padded - count) * QUERIES, -INFINITY);
    weigh<Kernel, rough, vectors>(scores, padded, start == 0, d, tops, sums, mixed);
    Kernel::template mix<vectors>(values + start * width, count,
                                  reinterpret_cast<const Element*>(scores), width, mixed, start > 0);
  }
  for (int64_t i = 0; i < d; ++i)
    for (int v = 0; v < vectors; ++v) {
      float* to = mixed + i * QUERIES + v * LANES;
      store(to, load(to) / sums[v]);
    }
}

template <typename Kernel, typename T>
void attend_heads(const T* qkv, const float* cos, const float* sin, const int32_t* bounds,
                  int64_t longest, int64_t heads, int64_t d, T* out, int64_t begin, int64_t end) {
  using Element = typename Kernel::Element;
  constexpr bool rough = !std::is_same_v<T, float>;
  const int64_t stride = 3 * heads * d, width = up(d, Kernel::WIDTH);
  const float scale = 1.442695041f / std::sqrt(static_cast<float>(d));  // log2(e) / sqrt(d)
  std::vector<Element> keys(width * longest), values(width * longest);
  std::vector<Element> turned(width * QUERIES), queries(width * QUERIES);
  std::vector<float> scores(KEYS * QUERIES), mixed(width * QUERIES);
  const int64_t units = width * sizeof(Element) / 4;  // two bfloat16 stay together
  float* words = reinterpret_cast<float*>(queries.data());
  Kernel::begin();
  for (int64_t item = begin; item < end; ++item) {
    const int64_t head = item % heads, start = bounds[item / heads];
    const int64_t n = bounds[item / heads + 1] - start;
    const T *q = qkv + start * stride + head * d, *k = q + heads * d, *v = k + heads * d;
    turn(k, stride, cos, sin, 1, n, d, width, keys.data());
    Kernel::lay_values(v, stride, n, d, width, values.data());
    for (int64_t row = 0; row < n; row += QUERIES) {
      const int64_t rows = std::min(QUERIES, n - row);
      if (head + 1 < heads)  // the next head's, while this one computes
        for (int64_t t = row; t < row + rows; ++t)
          for (const T* next : {q + t * stride + d, k + t * stride + d, v + t * stride + d})
            __builtin_prefetch(next, 0, 2), __builtin_prefetch(next + d - 1, 0, 2);
      turn(q + row * stride, stride, cos + row * d, sin + row * d, scale, rows, d, width,
           turned.data());
      by_columns(reinterpret_cast<const float*>(turned.data()), units, rows, rows, units,
                 [=](int64_t t, int64_t i, Floats x) { store(words + i * QUERIES + t, x); });
      const auto attend_queries = rows > LANES ? attend_block<Kernel, rough, 2>
                                               : attend_block<Kernel, rough, 1>;
      attend_queries(keys.data(), values.data(), queries.data(), n, d, width, scores.data(),
                     mixed.data());
      T* to = out + ((start + row) * heads + head) * d;
      by_columns(mixed.data(), QUERIES, d, d, rows, [=](int64_t i, int64_t t, Floats x) {
        store(to + t * heads * d + i, x, first_lanes(d - i));
      });
    }
  }
  Kernel::end();
}

template <typename Kernel, typename T>
void attend_pack(const at::Tensor& qkv, const at::Tensor& turns, const at::Tensor& bounds,
                 at::Tensor& out) {
  const int64_t heads = qkv.size(2), d = qkv.size(3), longest = up(turns.size(1), KEYS);
  const float *cos = turns.const_data_ptr<float>(), *sin = cos + turns.size(1) * d;
  at::parallel_for(0, (bounds.size(0) - 1) * heads, 1, [&](int64_t begin, int64_t end) {
    attend_heads<Kernel, T>(static_cast<const T*>(qkv.const_data_ptr()), cos, sin,
                            bounds.const_data_ptr<int32_t>(), longest, heads, d,
                            static_cast<T*>(out.mutable_data_ptr()), begin, end);
  });
}

// qkv: (T, 3, heads, d) float32 or bfloat16; turns: (2, longest, d) float32, cosines and signed
// sines by position; bounds: (N + 1,) int32, first tokens and the end. Returns (rows, heads, d),
// zeros after T.
at::Tensor attend(const at::Tensor& qkv, const at::Tensor& turns, const at::Tensor& bounds,
                  int64_t rows, bool tiles) {
  TORCH_CHECK(qkv.dim() == 4 && qkv.size(1) == 3 && qkv.size(3) % 2 == 0 &&
              (qkv.scalar_type() == at::kFloat || qkv.scalar_type() == at::kBFloat16), "qkv");
  TORCH_CHECK(turns.dim() == 3 && turns.size(0) == 2 && turns.size(2) == qkv.size(3) &&
              turns.scalar_type() == at::kFloat, "turns");
  TORCH_CHECK(bounds.dim() == 1 && bounds.scalar_type() == at::kInt, "bounds");
  TORCH_CHECK(qkv.is_contiguous() && turns.is_contiguous() && bounds.is_contiguous(), "strides");
  const int32_t* bound = bounds.const_data_ptr<int32_t>();
  TORCH_CHECK(bound[0] == 0 && bound[bounds.size(0) - 1] == qkv.size(0) &&
              rows >= qkv.size(0), "bounds");
  for (int64_t i = 1; i < bounds.size(0); ++i)
    TORCH_CHECK(bound[i] > bound[i - 1] && bound[i] - bound[i - 1] <= turns.size(1), "lengths");
  at::Tensor out = at::empty({rows, qkv.size(2), qkv.size(3)}, qkv.options());
  const size_t filled = qkv.size(0) * qkv.size(2) * qkv.size(3) * qkv.element_size();
  std::memset(static_cast<char*>(out.mutable_data_ptr()) + filled, 0, out.nbytes() - filled);
  const auto attend_all = qkv.scalar_type() == at::kFloat ? attend_pack<Fma<float>, float>
                          : tiles                         ? attend_pack<Amx, Half>
                                                          : attend_pack<Fma<Half>, Half>;
  attend_all(qkv, turns, bounds, out);
  return out;
}

// Whether the processor has AMX for bfloat16 and the system lets this process use it.
bool may_use_tiles() {
  unsigned int a, b, c, d;
  constexpr unsigned int BF16 = 1 << 22, TILE = 1 << 24, AVX512_BF16 = 1 << 5, AMX = BF16 | TILE;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & AMX) != AMX) return false;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & AVX512_BF16)) return false;
  constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // asm/prctl.h
  return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

}  // namespace

TORCH_LIBRARY(esm_ledger, library) {
  library.def(
      "attend(Tensor qkv, Tensor turns, Tensor bounds, int rows, bool tiles) -> Tensor", &attend);
  library.def("may_use_tiles() -> bool", &may_use_tiles);
}
