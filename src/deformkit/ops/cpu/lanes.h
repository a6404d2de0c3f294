// Small vectors of numbers, in the registers that the compiler has.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <utility>

#include "cpu/tensor.h"

namespace deformkit {

template <typename A, int count>
struct Lanes {
  typedef A type __attribute__((vector_size(count * sizeof(A))));
};

#if defined(__AVX512F__)
constexpr int register_bytes = 64;
#else
constexpr int register_bytes = 32;
#endif

// The number of lanes that suits rows of `channels` elements, or of any number if 0.
template <typename A>
constexpr int lanes_for(int channels) {
  constexpr int full = register_bytes / static_cast<int>(sizeof(A));
  return channels > 0 && channels % full == 0 ? full : channels == 4 ? 4 : 32 / static_cast<int>(sizeof(A));
}

// a * b + c * d, added up from zero. Of two bare products a compiler may fuse either with their addition, and need not
// choose the same in each copy of a loop, so that bits would depend on how long the loop is (GCC 16 on AVX-512:
// tests/ops/test_batch.py). Longer sums of products start from zero for the same reason.
template <typename V>
inline V sum_of_products(const V& a, const V& b, const V& c, const V& d) {
  V sum{};
  sum += a * b;
  return sum + c * d;
}

template <typename V, typename A>
inline V read_lanes(const A* from) {
  V value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

template <typename V, typename A>
inline void write_lanes(A* to, const V& value) {
  std::memcpy(to, &value, sizeof value);
}

// Like read_lanes(), from elements of any type.
template <typename V, typename T>
inline V load_lanes(const T* from) {
  using A = std::remove_cvref_t<decltype(V{}[0])>;
  constexpr int count = sizeof(V) / sizeof(A);
  if constexpr (std::is_same_v<T, A>) {
    return read_lanes<V>(from);
  } else if constexpr (std::is_same_v<T, BFloat16> && sizeof(A) == 4) {
    typedef uint16_t Bits __attribute__((vector_size(count * 2)));
    typedef uint32_t Wide __attribute__((vector_size(count * 4)));
    return reinterpret_cast<V>(__builtin_convertvector(read_lanes<Bits>(from), Wide) << 16);
#if defined(__AVX512F__)
  } else if constexpr (std::is_same_v<T, Half> && count == 16) {
    return reinterpret_cast<V>(_mm512_maskz_cvtph_ps(__mmask16(-1), read_lanes<__m256i>(from)));
#endif
#if defined(__F16C__)
  } else if constexpr (std::is_same_v<T, Half> && count == 8 && sizeof(A) == 4) {
    return reinterpret_cast<V>(_mm256_cvtph_ps(read_lanes<__m128i>(from)));
#endif
  } else {
    V value;
    for (int lane = 0; lane < count; ++lane) value[lane] = load<A>(from[lane]);
    return value;
  }
}

// The elements of an array at the lanes of `index`; 0, and nothing is read, where one is negative.
template <typename V, typename T, typename I>
inline V gather_lanes(const T* from, const I& index) {
  using A = std::remove_cvref_t<decltype(V{}[0])>;
  constexpr int count = sizeof(V) / sizeof(A);
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float> && sizeof(V) == 64 && sizeof(I) == 64) {
    const __m512i at = reinterpret_cast<__m512i>(index);
    const __mmask16 counts = _mm512_cmpge_epi32_mask(at, _mm512_setzero_si512());
    return reinterpret_cast<V>(_mm512_mask_i32gather_ps(_mm512_setzero_ps(), counts, at, from, 4));
  }
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<T, float> && sizeof(V) == 32 && sizeof(I) == 32) {
    const __m256i at = reinterpret_cast<__m256i>(index);
    const __m256i counts = _mm256_cmpgt_epi32(at, _mm256_set1_epi32(-1));
    return reinterpret_cast<V>(_mm256_mask_i32gather_ps(_mm256_setzero_ps(), from, at, _mm256_castsi256_ps(counts), 4));
  }
#endif
  V value;
  for (int lane = 0; lane < count; ++lane) value[lane] = index[lane] < 0 ? A(0) : load<A>(from[index[lane]]);
  return value;
}

// Whether a lane is not 0.
template <typename I>
inline bool any_lane(const I& lanes) {
#if defined(__AVX512F__)
  if constexpr (sizeof(I) == 64) {
    const __m512i bits = reinterpret_cast<__m512i>(lanes);
    return _mm512_test_epi32_mask(bits, bits) != 0;
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(I) == 32) {
    const __m256i bits = reinterpret_cast<__m256i>(lanes);
    return !_mm256_testz_si256(bits, bits);
  }
#endif
  bool any = false;
  for (size_t lane = 0; lane < sizeof(I) / sizeof(lanes[0]); ++lane) any |= lanes[lane] != 0;
  return any;
}

// low[l] = from[index[l]] and high[l] = from[index[l] + 1]: a load for each pair.
template <typename V>
inline void load_pairs(const float* from, const int32_t* index, V& low, V& high) {
  constexpr int count = sizeof(V) / sizeof(float);
  typedef typename Lanes<double, count / 2>::type Pairs;
  const auto pair = [&](int lane) {
    double both;
    std::memcpy(&both, from + index[lane], sizeof both);
    return both;
  };
  const auto pairs = [&](int at) {
    if constexpr (count == 16)
      return Pairs{pair(at),     pair(at + 1), pair(at + 2), pair(at + 3),
                   pair(at + 4), pair(at + 5), pair(at + 6), pair(at + 7)};
    if constexpr (count == 8) return Pairs{pair(at), pair(at + 1), pair(at + 2), pair(at + 3)};
    if constexpr (count == 4) return Pairs{pair(at), pair(at + 1)};
  };
  const V a = reinterpret_cast<V>(pairs(0)), b = reinterpret_cast<V>(pairs(count / 2));
  if constexpr (count == 16) {
    low = __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    high = __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  } else if constexpr (count == 8) {
    low = __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14);
    high = __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
  } else {
    low = __builtin_shufflevector(a, b, 0, 2, 4, 6);
    high = __builtin_shufflevector(a, b, 1, 3, 5, 7);
  }
}

// The same of elements in half precision.
template <typename V, typename T>
  requires(sizeof(T) == 2)
inline void load_pairs(const T* from, const int32_t* index, V& low, V& high) {
  constexpr int count = sizeof(V) / sizeof(float);
  typedef typename Lanes<uint32_t, count>::type Pairs;
  Pairs pairs;
#pragma GCC unroll 16
  for (int lane = 0; lane < count; ++lane) {
    uint32_t both;
    std::memcpy(&both, from + index[lane], sizeof both);
    pairs[lane] = both;
  }
  if constexpr (std::is_same_v<T, BFloat16>) {
    low = reinterpret_cast<V>(pairs << 16), high = reinterpret_cast<V>(pairs & 0xffff0000u);
  } else {
    const auto widened = [](const Pairs& elements) {
      T narrow[count];
      write_lanes(narrow, __builtin_convertvector(elements, typename Lanes<uint16_t, count>::type));
      return load_lanes<V>(narrow);
    };
    low = widened(pairs & 0xffffu), high = widened(pairs >> 16);
  }
}

// The reverse of load_lanes(), rounded to nearest.
template <typename V, typename T>
inline void store_lanes(T* to, const V& value) {
  using A = std::remove_cvref_t<decltype(V{}[0])>;
  constexpr int count = sizeof(V) / sizeof(A);
  if constexpr (std::is_same_v<T, A>) {
    write_lanes(to, value);
  } else if constexpr (std::is_same_v<T, BFloat16> && sizeof(A) == 4) {
    typedef typename Lanes<uint32_t, count>::type Wide;
    const Wide bits = reinterpret_cast<Wide>(value), number = reinterpret_cast<Wide>(value == value);
    const Wide even = bits + 0x7fff + (bits >> 16 & 1);
    const Wide rounded = ((even & number) | (0x7fc00000u & ~number)) >> 16;
    typedef typename Lanes<uint16_t, count>::type Bits;
    write_lanes(to, __builtin_convertvector(rounded, Bits));
#if defined(__AVX512F__)
  } else if constexpr (std::is_same_v<T, Half> && count == 16) {
    write_lanes(to, _mm512_maskz_cvtps_ph(__mmask16(-1), value, _MM_FROUND_TO_NEAREST_INT));
#endif
#if defined(__F16C__)
  } else if constexpr (std::is_same_v<T, Half> && count == 8 && sizeof(A) == 4) {
    write_lanes(to, _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
#endif
  } else {
    for (int lane = 0; lane < count; ++lane) to[lane] = store<T>(value[lane]);
  }
}

#if defined(__AVX512F__)
// The same as the processor rounds, which only one with AVX512-BF16 does. Subnormal numbers become zero.
template <typename V>
inline void store_lanes_quickly(BFloat16* to, const V& value) {
  typename Lanes<uint16_t, sizeof(V) / 4>::type bits;
  __asm__("vcvtneps2bf16 %1, %0" : "=v"(bits) : "v"(value));
  write_lanes(to, bits);
}
#endif

// Calls f<width>(i) for vectors of `width` elements from i on that cover [0, count), as wide as `lanes` or as the count
// allows. The last one may overlap that before.
template <int lanes, typename F>
inline void cover(int64_t count, const F& f) {
  if constexpr (lanes > 1) {
    if (count < lanes) return cover<lanes / 2>(count, f);
  }
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) f.template operator()<lanes>(i);
  if (i < count) f.template operator()<lanes>(count - lanes);
}

// to[0 ... count) = from[0 ... count), as A.
template <typename A, typename T>
inline void load_run(const T* from, int64_t count, A* to) {
  cover<register_bytes / int(sizeof(A))>(
      count, [&]<int width>(int64_t i) { write_lanes(to + i, load_lanes<typename Lanes<A, width>::type>(from + i)); });
}

// The reverse, rounded to T.
template <typename T, typename A>
inline void store_run(const A* from, int64_t count, T* to) {
  cover<register_bytes / int(sizeof(A))>(
      count, [&]<int width>(int64_t i) { store_lanes(to + i, read_lanes<typename Lanes<A, width>::type>(from + i)); });
}

// out[i] += the sum of the lanes of v[i], for four vectors at once.
template <typename A, int count, typename V>
inline void add_sums(const V (&v)[4], A* out) {
  if constexpr (std::is_same_v<A, float> && count == 16) {
    typename Lanes<float, 8>::type half[4];
    for (int i = 0; i < 4; ++i)
      half[i] = __builtin_shufflevector(v[i], v[i], 0, 1, 2, 3, 4, 5, 6, 7) +
                __builtin_shufflevector(v[i], v[i], 8, 9, 10, 11, 12, 13, 14, 15);
    add_sums<float, 8>(half, out);
  } else if constexpr (std::is_same_v<A, float> && count == 8) {
    // Vectors are interleaved and added twice. Every lane then holds a part of the sum of its place.
    const V a = __builtin_shufflevector(v[0], v[1], 0, 8, 1, 9, 4, 12, 5, 13) +
                __builtin_shufflevector(v[0], v[1], 2, 10, 3, 11, 6, 14, 7, 15);
    const V b = __builtin_shufflevector(v[2], v[3], 0, 8, 1, 9, 4, 12, 5, 13) +
                __builtin_shufflevector(v[2], v[3], 2, 10, 3, 11, 6, 14, 7, 15);
    const V c = __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13) +
                __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
    typedef typename Lanes<float, 4>::type Four;
    const Four sums = __builtin_shufflevector(c, c, 0, 1, 2, 3) + __builtin_shufflevector(c, c, 4, 5, 6, 7);
    write_lanes(out, read_lanes<Four>(out) + sums);
  } else if constexpr (std::is_same_v<A, float> && count == 4) {
    const V a = __builtin_shufflevector(v[0], v[1], 0, 4, 1, 5) + __builtin_shufflevector(v[0], v[1], 2, 6, 3, 7);
    const V b = __builtin_shufflevector(v[2], v[3], 0, 4, 1, 5) + __builtin_shufflevector(v[2], v[3], 2, 6, 3, 7);
    const V sums = __builtin_shufflevector(a, b, 0, 1, 4, 5) + __builtin_shufflevector(a, b, 2, 3, 6, 7);
    write_lanes(out, read_lanes<V>(out) + sums);
  } else {
    for (int i = 0; i < 4; ++i)
      for (int lane = 0; lane < count; ++lane) out[i] += v[i][lane];
  }
}

// Of every square of 2 * distance rows and lanes, exchanges the upper right and the lower left quarter.
template <int distance, typename V, int n, int... lane>
inline void exchange(V (&row)[n], std::integer_sequence<int, lane...>) {
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) {
    if (i & distance) continue;
    const V low = row[i], high = row[i + distance];
    row[i] = __builtin_shufflevector(low, high, (lane & distance ? n + lane - distance : lane)...);
    row[i + distance] = __builtin_shufflevector(low, high, (lane & distance ? n + lane : lane + distance)...);
  }
}

// to[c * to_pitch + r] = from[r * from_pitch + c] for n rows and columns, 8 or 16, in registers of A.
template <typename A, int n, typename T, typename U>
inline void transpose_square(const T* from, int64_t from_pitch, U* to, int64_t to_pitch) {
  constexpr std::make_integer_sequence<int, n> all{};
  typename Lanes<A, n>::type row[n];
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) row[i] = load_lanes<typename Lanes<A, n>::type>(from + i * from_pitch);
  exchange<1>(row, all);
  exchange<2>(row, all);
  exchange<4>(row, all);
  if constexpr (n == 16) exchange<8>(row, all);
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) store_lanes(to + i * to_pitch, row[i]);
}

// to[c * to_pitch + r] = from[r * from_pitch + c], by way of A, for every row r and column c: what has another type is
// converted in the registers that turn it. Inlined, it knows a pitch that is constant: built by GCC 12, deform_sample()
// of a plane then takes a tenth less time on AVX2. `python benchmarks/run.py sample half --case 2d` measures both.
template <typename A, typename T, typename U>
__attribute__((always_inline)) inline void transpose(const T* from, int64_t rows, int64_t columns, int64_t from_pitch,
                                                     U* to, int64_t to_pitch) {
  const auto move = [&](int64_t row, int64_t column) {
    to[column * to_pitch + row] = store<U>(load<A>(from[row * from_pitch + column]));
  };
  int64_t row = 0;
  // Squares of n, as many rows as they fill; the columns that are left over are moved one by one.
  const auto squares = [&]<int n>() {
    for (; row + n <= rows; row += n) {
      int64_t column = 0;
      for (; column + n <= columns; column += n)
        transpose_square<A, n>(from + row * from_pitch + column, from_pitch, to + column * to_pitch + row, to_pitch);
      for (; column < columns; ++column)
        for (int64_t r = row; r < row + n; ++r) move(r, column);
    }
  };
  if constexpr (sizeof(A) == 4 && register_bytes == 64) {
    if (columns % 16 == 0) squares.template operator()<16>();  // else too many columns are left over
  }
  if constexpr (sizeof(A) <= 4) squares.template operator()<8>();
  for (; row < rows; ++row)
    for (int64_t column = 0; column < columns; ++column) move(row, column);
}

}  // namespace deformkit
