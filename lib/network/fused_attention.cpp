// Attention within each sequence of a pack in one pass: rotary positions, scores, softmax and
// weighted values of a block of queries stay in a core's cache. Softmax is that of one pass over
// blocks of keys (Milakov and Gimelshein 2018; Dao et al. 2022), in float32 and in powers of 2.
//
// Built by lib/network/fused.py for processors with AVX-512; AMX, if there is any, computes the
// products of bfloat16. What a sequence gives does not depend on its neighbours or on threads.
//
// Shapes: T tokens of a pack; n of a sequence; d, head_dim, even; width, d rounded up to what the
// products take at once. Keys stand transposed, in panels of (width, COLS).

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
#include <limits>
#include <type_traits>
#include <vector>

#define INLINE inline __attribute__((always_inline))

namespace {

constexpr int64_t LANES = 16, ROWS = 32;  // numbers of a vector; queries of a block
constexpr int64_t COLS = 128;             // keys of a block: its scores stay in the first cache
constexpr int64_t STEP = 32;              // the last block of keys is a multiple of this

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

template <int step>
INLINE Floats swapped(Floats x) {  // lane i gets lane i ^ step
  Ints order;
  for (int i = 0; i < LANES; ++i) order[i] = i ^ step;
  return (Floats)_mm512_permutexvar_ps((__m512i)order, (__m512)x);
}
INLINE Floats larger(Floats a, Floats b) { return a > b ? a : b; }
INLINE Floats largest(Floats x) {  // in every lane
  x = larger(x, swapped<8>(x)), x = larger(x, swapped<4>(x)), x = larger(x, swapped<2>(x));
  return larger(x, swapped<1>(x));
}
INLINE float total(Floats x) {
  x += swapped<8>(x), x += swapped<4>(x), x += swapped<2>(x), x += swapped<1>(x);
  return x[0];
}

// 2 to the power of x <= 0. The polynomials are minimax on [-0.5, 0.5] (Remez), with relative
// errors of 7.5e-5, below bfloat16's rounding of 2e-3, and 1.9e-9.
template <bool rough>
INLINE Floats exp2(Floats x) {
  x = x < -126.f ? Floats{} - 126.f : x;  // NaN stays NaN
  const Floats shifted = x + 12582912.f;  // 1.5 * 2^23: the whole part stands in the low bits
  const Floats f = x - (shifted - 12582912.f);
  Floats p;
  if constexpr (rough) {
    p = 0.055171669f * f + 0.242611125f;
    p = p * f + 0.693260968f;
    p = p * f + 0.999928057f;
  } else {
    p = 1.534581242e-4f * f + 1.339993090e-3f;
    p = p * f + 9.618489072e-3f;
    p = p * f + 5.550328642e-2f;
    p = p * f + 2.402264625e-1f;
    p = p * f + 6.931471825e-1f;
    p = p * f + 1.0f;
  }
  return (Floats)((Ints)p + ((Ints)shifted << 23));
}

// Layouts.

// Turn n rows of d by their positions: cos and sin are (n, d), the sign of sin included. Queries
// and keys have the two numbers that turn together as neighbours.
template <typename T, typename Element>
INLINE void turn(const T* in, int64_t stride, const float* cos, const float* sin, float scale,
                 int64_t n, int64_t d, int64_t width, Element* out) {
  for (int64_t t = 0; t < n; ++t, in += stride, cos += d, sin += d, out += width)
    for (int64_t i = 0; i < d; i += LANES) {
      const __mmask16 lanes = first_lanes(d - i);
      const Floats x = load(in + i, lanes) * scale;
      store(out + i, x * load(cos + i, lanes) + swapped<1>(x) * load(sin + i, lanes), lanes);
    }
}

// (n, units) to panels of (units, COLS), with zeros for the keys that there are not.
template <typename Unit>
INLINE void transpose(const Unit* in, int64_t n, int64_t units, Unit* out) {
  for (int64_t start = 0; start < n; start += COLS, in += COLS * units)
    for (int64_t i = 0; i < units; ++i, out += COLS) {
      const int64_t count = std::min(COLS, n - start);
      for (int64_t t = 0; t < count; ++t) out[t] = in[t * units + i];
      std::fill(out + count, out + COLS, Unit{});
    }
}

// Products, of ROWS queries. `scores`, (ROWS, COLS) float32, holds the weights after `put`.

template <typename T>
struct Fma {  // float32 products by vector instructions
  using Element = float;
  static constexpr int64_t WIDTH = LANES;
  static void begin() {}
  static void end() {}

  static INLINE void lay_keys(const float* turned, int64_t n, int64_t width, float* keys) {
    transpose(turned, n, width, keys);
  }
  static INLINE void lay_values(const T* v, int64_t stride, int64_t n, int64_t d, int64_t width,
                                float* values) {
    for (int64_t t = 0; t < up(n, STEP); ++t, v += stride, values += width)
      for (int64_t i = 0; i < d; i += LANES) {
        const __mmask16 lanes = first_lanes(d - i);
        store(values + i, t < n ? load(v + i, lanes) : Floats{}, lanes);
      }
  }
  // c (8, vectors * LANES) = a (8, k) times b (k, vectors * LANES), added to c if `add`.
  template <int vectors>
  static INLINE void block(const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                           int64_t k, float* c, int64_t c_stride, bool add) {
    Floats sums[8][vectors];
#pragma GCC unroll 8
    for (int r = 0; r < 8; ++r)
      for (int v = 0; v < vectors; ++v)
        sums[r][v] = add ? load(c + r * c_stride + v * LANES) : Floats{};
    for (int64_t i = 0; i < k; ++i, b += b_stride) {
      Floats right[vectors];
      for (int v = 0; v < vectors; ++v) right[v] = load(b + v * LANES);
#pragma GCC unroll 8
      for (int r = 0; r < 8; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; ++v) sums[r][v] += a[r * a_stride + i] * right[v];
    }
#pragma GCC unroll 8
    for (int r = 0; r < 8; ++r)
      for (int v = 0; v < vectors; ++v) store(c + r * c_stride + v * LANES, sums[r][v]);
  }
  static INLINE void product(const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                             int64_t columns, int64_t k, float* c, int64_t c_stride, bool add) {
    for (int64_t r = 0; r < ROWS; r += 8, a += 8 * a_stride, c += 8 * c_stride) {
      int64_t j = 0;
      for (; j + 2 * LANES <= columns; j += 2 * LANES)
        block<2>(a, a_stride, b + j, b_stride, k, c + j, c_stride, add);
      if (j < columns) block<1>(a, a_stride, b + j, b_stride, k, c + j, c_stride, add);
    }
  }
  static INLINE void score(const float* q, int64_t width, const float* keys, int64_t columns,
                           float* scores) {
    product(q, width, keys, COLS, columns, width, scores, COLS, false);
  }
  static INLINE void put(float* row, int64_t i, Floats weights) { store(row + i, weights); }
  static INLINE void mix(const float* weights, int64_t columns, const float* values, int64_t width,
                         float* mixed, bool add) {
    product(weights, COLS, values, width, width, columns, mixed, width, add);
  }
};

struct Amx {  // bfloat16 products by tiles; values stand by pairs of tokens, as the tiles take them
  using Element = Half;
  static constexpr int64_t WIDTH = 32;
  struct Config {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };
  static void begin() { const Config config; _tile_loadconfig(&config); }
  static void end() { _tile_release(); }

  static INLINE void lay_keys(const Half* turned, int64_t n, int64_t width, Half* keys) {
    transpose(reinterpret_cast<const uint32_t*>(turned), n, width / 2,
              reinterpret_cast<uint32_t*>(keys));
  }
  static INLINE void lay_values(const Half* v, int64_t stride, int64_t n, int64_t d, int64_t width,
                                Half* values) {
    for (int64_t t = 0; t < up(n, STEP); t += 2, v += 2 * stride, values += 2 * width)
      for (int64_t i = 0; i < d; ++i) {
        values[2 * i] = t < n ? v[i] : 0;
        values[2 * i + 1] = t + 1 < n ? v[stride + i] : 0;
      }
  }
  // Tiles 0 to 3 += (32, 32) of a times (32, 32) of b, in pairs.
  static INLINE void tiles(const Half* a, int64_t a_bytes, const Half* b, int64_t b_bytes) {
    _tile_loadd(4, a, a_bytes); _tile_loadd(5, a + 8 * a_bytes, a_bytes);
    _tile_loadd(6, b, b_bytes); _tile_loadd(7, b + 32, b_bytes);
    _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
  }
  static INLINE void begin_tiles(const float* c, int64_t bytes, bool add) {
    if (add) {
      _tile_loadd(0, c, bytes); _tile_loadd(1, c + 16, bytes);
      _tile_loadd(2, c + 4 * bytes, bytes); _tile_loadd(3, c + 4 * bytes + 16, bytes);
    } else {
      _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    }
  }
  static INLINE void end_tiles(float* c, int64_t bytes) {
    _tile_stored(0, c, bytes); _tile_stored(1, c + 16, bytes);
    _tile_stored(2, c + 4 * bytes, bytes); _tile_stored(3, c + 4 * bytes + 16, bytes);
  }
  static INLINE void score(const Half* q, int64_t width, const Half* keys, int64_t columns,
                           float* scores) {
    for (int64_t j = 0; j < columns; j += 32) {
      begin_tiles(nullptr, 0, false);
      for (int64_t k = 0; k < width; k += 32)
        tiles(q + k, 2 * width, keys + k * COLS + 2 * j, 4 * COLS);
      end_tiles(scores + j, 4 * COLS);
    }
  }
  static INLINE void put(float* row, int64_t i, Floats weights) {  // over scores already read
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(reinterpret_cast<Half*>(row) + i),
                        (__m256i)_mm512_cvtneps_pbh((__m512)weights));
  }
  static INLINE void mix(const Half* weights, int64_t columns, const Half* values, int64_t width,
                         float* mixed, bool add) {
    for (int64_t j = 0; j < width; j += 32) {
      begin_tiles(mixed + j, 4 * width, add);
      for (int64_t k = 0; k < columns; k += 32)
        tiles(weights + k, 4 * COLS, values + k * width + 2 * j, 4 * width);
      end_tiles(mixed + j, 4 * width);
    }
  }
};

// Attention.

// Make weights of `vectors` * LANES scores of each row; `tops` and `sums` are those of all blocks
// before, and with a larger top, `sums` and `mixed` are scaled to it.
template <typename Kernel, bool rough, int vectors>
INLINE void weigh(float* row, int64_t rows, bool first, int64_t width, Floats* tops, Floats* sums,
                  float* mixed) {
  for (int64_t t = 0; t < rows; ++t, row += COLS, mixed += width) {
    Floats scores[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) scores[v] = load(row + v * LANES);
    Floats top = scores[0];
#pragma GCC unroll 8
    for (int v = 1; v < vectors; ++v) top = larger(top, scores[v]);
    top = largest(top);
    Floats sum{};
    if (!first) {
      const Floats before = tops[t];
      sum = sums[t];
      if (top[0] > before[0]) {
        const Floats factor = exp2<false>(before - top);
        sum *= factor;
        for (int64_t i = 0; i < width; i += LANES) store(mixed + i, load(mixed + i) * factor);
      } else {
        top = before;
      }
    }
    tops[t] = top;
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      const Floats weights = exp2<rough>(scores[v] - top);
      sum += weights;
      Kernel::put(row, v * LANES, weights);
    }
    sums[t] = sum;
  }
}

template <typename Kernel, typename T>
void attend_heads(const T* qkv, const float* cos, const float* sin, const int32_t* bounds,
                  int64_t longest, int64_t heads, int64_t d, T* out, int64_t begin, int64_t end) {
  using Element = typename Kernel::Element;
  constexpr bool rough = !std::is_same_v<T, float>;
  const int64_t stride = 3 * heads * d, width = up(d, Kernel::WIDTH);
  const float scale = 1.442695041f / std::sqrt(static_cast<float>(d));  // log2(e) / sqrt(d)
  std::vector<Element> keys(width * longest), values(width * longest), turned(width * longest);
  std::vector<float> scores(ROWS * COLS), mixed(ROWS * width);
  Floats tops[ROWS], sums[ROWS];
  Kernel::begin();
  for (int64_t item = begin; item < end; ++item) {
    const int64_t head = item % heads, start = bounds[item / heads];
    const int64_t n = bounds[item / heads + 1] - start;
    const T *q = qkv + start * stride + head * d, *k = q + heads * d, *v = k + heads * d;
    turn(k, stride, cos, sin, 1, n, d, width, turned.data());
    Kernel::lay_keys(turned.data(), n, width, keys.data());
    Kernel::lay_values(v, stride, n, d, width, values.data());
    turn(q, stride, cos, sin, scale, n, d, width, turned.data());
    for (int64_t row = 0; row < n; row += ROWS) {
      const int64_t rows = std::min(ROWS, n - row);
      if (head + 1 < heads)  // the next head's, while this one computes
        for (int64_t t = row; t < row + rows; ++t)
          for (const T* next : {q + t * stride + d, k + t * stride + d, v + t * stride + d}) {
            __builtin_prefetch(next, 0, 2);
            __builtin_prefetch(next + d - 1, 0, 2);
          }
      for (int64_t column = 0; column < n; column += COLS) {
        const int64_t left = std::min(COLS, n - column), columns = up(left, STEP);
        Kernel::score(turned.data() + row * width, width, keys.data() + column * width, columns,
                      scores.data());
        for (int64_t t = 0; left < columns && t < rows; ++t)
          std::fill_n(scores.data() + t * COLS + left, columns - left,
                      -std::numeric_limits<float>::infinity());
        const auto weigh_columns = columns == 32   ? weigh<Kernel, rough, 2>
                                   : columns == 64 ? weigh<Kernel, rough, 4>
                                   : columns == 96 ? weigh<Kernel, rough, 6>
                                                   : weigh<Kernel, rough, 8>;
        weigh_columns(scores.data(), rows, column == 0, width, tops, sums, mixed.data());
        Kernel::mix(reinterpret_cast<const Element*>(scores.data()), columns,
                    values.data() + column * width, width, mixed.data(), column > 0);
      }
      for (int64_t t = 0; t < rows; ++t) {
        const float inverse = 1 / total(sums[t]);
        T* to = out + ((start + row + t) * heads + head) * d;
        for (int64_t i = 0; i < d; i += LANES)
          store(to + i, load(mixed.data() + t * width + i) * inverse, first_lanes(d - i));
      }
    }
  }
  Kernel::end();
}

template <typename Kernel, typename T>
void attend_pack(const at::Tensor& qkv, const at::Tensor& turns, const at::Tensor& bounds,
                 at::Tensor& out) {
  const int64_t heads = qkv.size(2), d = qkv.size(3), longest = up(turns.size(1), COLS);
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
  constexpr unsigned int BF16 = 1 << 22, TILE = 1 << 24, AVX512_BF16 = 1 << 5;
  constexpr unsigned int AMX = BF16 | TILE;
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
