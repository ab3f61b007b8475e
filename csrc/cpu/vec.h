// The vector type the kernels are written over: GCC/Clang vector extensions, so that one source
// serves every instruction set. A translation unit defines SMARTBIRD_ISA (its namespace) and
// SMARTBIRD_VEC_BYTES (0: one lane).
//
// Nothing here may have external linkage outside the ISA's namespace: a weak symbol compiled with
// AVX-512 could otherwise be picked by the linker for all.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "../params.h"

// For what is called once per vector: GCC counts its statements and stops inlining where it hurts
// most.
#define SMARTBIRD_INLINE inline __attribute__((always_inline))

namespace smartbird::SMARTBIRD_ISA {

template <typename T>
constexpr int kLanes =
    SMARTBIRD_VEC_BYTES == 0 ? 1 : SMARTBIRD_VEC_BYTES / static_cast<int>(sizeof(T));

template <typename T, int L = kLanes<T>>
struct VecOf {
  typedef T type __attribute__((vector_size(sizeof(T) * L)));
};

template <typename T>
using Vec = typename VecOf<T>::type;  // float or double
using VecI = typename VecOf<int32_t>::type;
using VecU = typename VecOf<uint32_t>::type;

template <typename V>
using Elem = std::remove_cvref_t<decltype(V{}[0])>;

// Storage types without arithmetic of their own.
struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

template <typename T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename To, typename From>
inline To bit_cast(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof(y));
  return y;
}

template <typename T>
constexpr T min_of(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
constexpr T max_of(T a, T b) {
  return a < b ? b : a;
}
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- scalar conversion --------------------------------------------------------------------------

inline float to_acc(float x) { return x; }
inline double to_acc(double x) { return x; }
inline float to_acc(bfloat16 x) { return bit_cast<float>(uint32_t{x.bits} << 16); }
inline float to_acc(float16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  // Shift exponent and mantissa into place, then multiply by 2^(127 - 15): subnormals come out
  // right.
  const uint32_t magnitude = uint32_t{x.bits & 0x7FFFu} << 13;
  float y = bit_cast<float>(magnitude) * 0x1p112f;
  if (magnitude >= 0x0F800000u) y = bit_cast<float>(magnitude | 0x7F800000u);  // inf and NaN
  return bit_cast<float>(bit_cast<uint32_t>(y) | uint32_t{x.bits & 0x8000u} << 16);
#endif
}

template <typename T>
inline T from_acc(acc_t<T> x);
template <>
inline float from_acc<float>(float x) {
  return x;
}
template <>
inline double from_acc<double>(double x) {
  return x;
}
template <>
inline bfloat16 from_acc<bfloat16>(float x) {
  const uint32_t u = bit_cast<uint32_t>(x);
  if ((u & 0x7FFFFFFFu) > 0x7F800000u)
    return {static_cast<uint16_t>(u >> 16 | 0x40u)};                     // quiet NaN
  return {static_cast<uint16_t>((u + 0x7FFFu + (u >> 16 & 1u)) >> 16)};  // nearest even
}
template <>
inline float16 from_acc<float16>(float x) {
#if defined(__F16C__)
  return {static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT))};
#else
  const uint32_t u = bit_cast<uint32_t>(x), sign = u >> 16 & 0x8000u, magnitude = u & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return {static_cast<uint16_t>(sign | 0x7E00u)};
  if (magnitude >= 0x477FF000u)
    return {static_cast<uint16_t>(sign | 0x7C00u)};  // rounds to 65536: infinity
  if (magnitude < 0x38800000u) {  // subnormal: let the float adder round at 2^-24
    const float rounded = bit_cast<float>(magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (bit_cast<uint32_t>(rounded) - 0x3F000000u))};
  }
  const uint32_t rounded = magnitude - 0x38000000u + 0xFFFu + (magnitude >> 13 & 1u);
  return {static_cast<uint16_t>(sign | rounded >> 13)};
#endif
}

// ---- load, store --------------------------------------------------------------------------------

template <typename A>
inline Vec<A> broadcast(A x) {
  return Vec<A>{} + x;
}

// 0, 1, 2, ...
template <typename A>
inline Vec<A> iota() {
  Vec<A> v;
  for (int l = 0; l < kLanes<A>; ++l) v[l] = static_cast<A>(l);
  return v;
}

// Four numbers at each of p, p + step, p + 2 step, ..., for as many as there are lanes.
#if defined(__AVX512F__)
SMARTBIRD_INLINE Vec<float> load_fours(const float* p, int64_t step) {
  const auto four = [&](int i) { return _mm_loadu_ps(p + i * step); };
  __m512 v = _mm512_castps128_ps512(four(0));
  v = _mm512_insertf32x4(v, four(1), 1);
  v = _mm512_insertf32x4(v, four(2), 2);
  return bit_cast<Vec<float>>(_mm512_insertf32x4(v, four(3), 3));
}
#elif defined(__AVX2__)
SMARTBIRD_INLINE Vec<float> load_fours(const float* p, int64_t step) {
  return bit_cast<Vec<float>>(_mm256_loadu2_m128(p + step, p));
}
#endif

template <typename A>
inline Vec<A> load(const A* p) {
  Vec<A> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

inline Vec<float> load(const bfloat16* p) {
#if defined(__AVX512F__)
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return bit_cast<Vec<float>>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
#elif defined(__AVX2__)
  const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return bit_cast<Vec<float>>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
#else
  Vec<float> v;
  for (int l = 0; l < kLanes<float>; ++l) v[l] = to_acc(p[l]);
  return v;
#endif
}

inline Vec<float> load(const float16* p) {
#if defined(__AVX512F__)
  return bit_cast<Vec<float>>(
      _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__AVX2__)
  return bit_cast<Vec<float>>(
      _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  Vec<float> v;
  for (int l = 0; l < kLanes<float>; ++l) v[l] = to_acc(p[l]);
  return v;
#endif
}

// The even and the odd ones of 2 kLanes elements, for less than two loads in order.
inline void load_even_odd(const bfloat16* p, Vec<float>* even, Vec<float>* odd) {
  VecU pair;
  std::memcpy(&pair, p, sizeof(pair));
  *even = bit_cast<Vec<float>>(pair << 16);
  *odd = bit_cast<Vec<float>>(pair & 0xFFFF0000u);
}

// The first n < kLanes elements; the other lanes are 0.
template <typename T>
inline Vec<acc_t<T>> load_partial(const T* p, int64_t n) {
  alignas(64) T lane[kLanes<acc_t<T>>] = {};
#if defined(__AVX512F__)
  const auto mask = static_cast<__mmask16>((1u << n) - 1);
  if constexpr (std::is_same_v<T, float>)
    _mm512_store_ps(lane, _mm512_maskz_loadu_ps(mask, p));
  else if constexpr (std::is_same_v<T, double>)
    _mm512_store_pd(lane, _mm512_maskz_loadu_pd(static_cast<__mmask8>(mask), p));
  else
    _mm256_store_si256(reinterpret_cast<__m256i*>(lane), _mm256_maskz_loadu_epi16(mask, p));
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<T, float>)
    _mm256_store_ps(lane, _mm256_maskload_ps(p, bit_cast<__m256i>(iota<T>() < static_cast<T>(n))));
  else if constexpr (std::is_same_v<T, double>)
    _mm256_store_pd(lane, _mm256_maskload_pd(p, bit_cast<__m256i>(iota<T>() < static_cast<T>(n))));
  else
    for (int64_t l = 0; l < n; ++l) lane[l] = p[l];
#else
  for (int64_t l = 0; l < n; ++l) lane[l] = p[l];
#endif
  const T* padded = lane;
  return load(padded);
}

template <typename A>
inline void store(A* p, std::type_identity_t<Vec<A>> v) {
  std::memcpy(p, &v, sizeof(v));
}

inline void store(bfloat16* p, Vec<float> v) {
  // Nearest even as in from_acc; a NaN keeps its upper bits with the quiet bit set.
  const VecU u = bit_cast<VecU>(v);
  const VecU rounded = (u + 0x7FFFu + (u >> 16 & 1u)) >> 16;
  const VecU nan = u >> 16 | 0x40u;
  const VecU bits = (u & 0x7FFFFFFFu) > 0x7F800000u ? nan : rounded;
  typename VecOf<uint16_t, kLanes<float>>::type h = __builtin_convertvector(bits, decltype(h));
  std::memcpy(p, &h, sizeof(h));
}

inline void store(float16* p, Vec<float> v) {
#if defined(__AVX512F__)
  const __m256i h =
      _mm512_cvtps_ph(bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), h);
#elif defined(__AVX2__)
  const __m128i h =
      _mm256_cvtps_ph(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), h);
#else
  for (int l = 0; l < kLanes<float>; ++l) p[l] = from_acc<float16>(v[l]);
#endif
}

template <typename T>
inline void store_partial(T* p, Vec<acc_t<T>> v, int64_t n) {
  for (int64_t l = 0; l < n; ++l) p[l] = from_acc<T>(v[l]);
}

// ---- across lanes -------------------------------------------------------------------------------

// Lane l: a[l] + a[l ^ S] where bit S of l is clear, b[l] + b[l ^ S] where it is set. Folding
// pairwise with S = 1, 2, 4, ... sums kLanes vectors across their lanes into the lanes of one.
template <int S, typename V>
inline V fold(V a, V b) {
  return [&]<int... I>(std::integer_sequence<int, I...>) {
    constexpr int L = sizeof...(I);
    return __builtin_shufflevector(a, b, (I & S ? I + L : I)...) +
           __builtin_shufflevector(a, b, (I & S ? I + L - S : I + S)...);
  }(std::make_integer_sequence<int, kLanes<Elem<V>>>{});
}

// Even and odd elements to 2 kLanes elements in order: a becomes the first kLanes, b the others.
template <typename V>
inline void interleave(V* a, V* b) {
  [&]<int... I>(std::integer_sequence<int, I...>) {
    constexpr int L = sizeof...(I);
    const V even = *a, odd = *b;
    *a = __builtin_shufflevector(even, odd, (I / 2 + I % 2 * L)...);
    *b = __builtin_shufflevector(even, odd, (L / 2 + I / 2 + I % 2 * L)...);
  }(std::make_integer_sequence<int, kLanes<Elem<V>>>{});
}

// Lane l < S: the sum of lanes l, l + S, l + 2 S, ... of v.
template <int S, typename V, int Step = kLanes<Elem<V>> / 2>
inline V sum_groups(V v) {
  if constexpr (Step < S)
    return v;
  else
    return sum_groups<S, V, Step / 2>(fold<Step>(v, v));
}

template <typename V>
inline Elem<V> reduce_add(V v) {
  using A = Elem<V>;
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<A, float>) return _mm512_reduce_add_ps(bit_cast<__m512>(v));
#endif
  // Fold halves: the compiler turns the fixed tree into shuffles.
  A lane[kLanes<A>];
  std::memcpy(lane, &v, sizeof(v));
  for (int half = kLanes<A> / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
  return lane[0];
}

// sum + x * x, rounded alike wherever it stands: what the compiler makes of the expression depends
// on what is around it.
inline Vec<float> add_square(Vec<float> sum, Vec<float> x) {
#if defined(__AVX512F__)
  const __m512 v = bit_cast<__m512>(x);
  return bit_cast<Vec<float>>(_mm512_fmadd_ps(v, v, bit_cast<__m512>(sum)));
#elif defined(__AVX2__)
  const __m256 v = bit_cast<__m256>(x);
  return bit_cast<Vec<float>>(_mm256_fmadd_ps(v, v, bit_cast<__m256>(sum)));
#else
  return sum + x * x;
#endif
}

// inf in place of NaN, which comparisons forget: the largest of such numbers is -inf only where all
// are.
template <typename V>
inline V nan_to_inf(V x) {
  return x == x ? x : broadcast(static_cast<Elem<V>>(__builtin_inff()));
}

// Elementwise maximum and minimum; where either is NaN, b. Spelled out: GCC makes a compare and a
// blend of the ternary.
template <typename V>
inline V max(V a, V b) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<V, Vec<float>>)
    return bit_cast<V>(_mm512_max_ps(bit_cast<__m512>(a), bit_cast<__m512>(b)));
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<V, Vec<float>>)
    return bit_cast<V>(_mm256_max_ps(bit_cast<__m256>(a), bit_cast<__m256>(b)));
#endif
  return a > b ? a : b;
}
template <typename V>
inline V min(V a, V b) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<V, Vec<float>>)
    return bit_cast<V>(_mm512_min_ps(bit_cast<__m512>(a), bit_cast<__m512>(b)));
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<V, Vec<float>>)
    return bit_cast<V>(_mm256_min_ps(bit_cast<__m256>(a), bit_cast<__m256>(b)));
#endif
  return a < b ? a : b;
}

template <typename V, int Step = kLanes<Elem<V>> / 2>
inline Elem<V> reduce_max(V v) {
  if constexpr (Step == 0)
    return v[0];
  else
    return [&]<int... I>(std::integer_sequence<int, I...>) {
      return reduce_max<V, Step / 2>(max(v, __builtin_shufflevector(v, v, (I ^ Step)...)));
    }(std::make_integer_sequence<int, kLanes<Elem<V>>>{});
}

// Whether any lane of a exceeds that of b; a NaN does not.
template <typename V>
inline bool any_greater(V a, V b) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<V, Vec<float>>)
    return _mm512_cmp_ps_mask(bit_cast<__m512>(a), bit_cast<__m512>(b), _CMP_GT_OQ) != 0;
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<V, Vec<float>>)
    return _mm256_movemask_ps(bit_cast<__m256>(a > b)) != 0;
#endif
  bool any = false;
  for (int l = 0; l < kLanes<Elem<V>>; ++l) any |= a[l] > b[l];
  return any;
}

// 0, 1, 2, ... as integers.
inline VecI iota_int() {
  return [&]<int... I>(std::integer_sequence<int, I...>) {
    return VecI{I...};
  }(std::make_integer_sequence<int, kLanes<float>>{});
}

inline VecI load_int(const int32_t* p) {
  VecI v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

// base[index[l]] in lane l.
SMARTBIRD_INLINE Vec<float> gather(const float* base, VecI index) {
#if defined(__AVX512F__)
  return bit_cast<Vec<float>>(_mm512_i32gather_ps(bit_cast<__m512i>(index), base, 4));
#elif defined(__AVX2__)
  return bit_cast<Vec<float>>(_mm256_i32gather_ps(base, bit_cast<__m256i>(index), 4));
#else
  Vec<float> v;
  for (int l = 0; l < kLanes<float>; ++l) v[l] = base[index[l]];
  return v;
#endif
}

// Bit l is lane l of a comparison's result.
SMARTBIRD_INLINE uint32_t lane_bits(VecI mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask(bit_cast<__m512i>(mask));
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps(bit_cast<__m256>(mask)));
#else
  uint32_t bits = 0;
  for (int l = 0; l < kLanes<float>; ++l) bits |= (mask[l] & 1u) << l;
  return bits;
#endif
}

// Whether any lane of a comparison's result is true.
SMARTBIRD_INLINE bool any(VecI mask) { return lane_bits(mask) != 0; }

#if defined(__AVX2__) && !defined(__AVX512F__)
// The lanes of each set of eight, first those in it: bytes.
struct CompressTable {
  uint64_t lanes[256];
};
constexpr CompressTable kCompress = [] {
  CompressTable table{};
  for (uint32_t set = 0; set < 256; ++set)
    for (uint32_t lane = 0, n = 0; lane < 8; ++lane)
      if (set >> lane & 1) table.lanes[set] |= uint64_t{lane} << (8 * n++);
  return table;
}();
#endif

// The lanes of v, float or int32_t, where mask is true, in order, from lane 0 on; the others are
// whatever.
template <typename V>
SMARTBIRD_INLINE V compress(V v, VecI mask) {
#if defined(__AVX512F__)
  return bit_cast<V>(
      _mm512_maskz_compress_epi32(static_cast<__mmask16>(lane_bits(mask)), bit_cast<__m512i>(v)));
#elif defined(__AVX2__)
  const __m128i lanes = _mm_cvtsi64_si128(static_cast<int64_t>(kCompress.lanes[lane_bits(mask)]));
  return bit_cast<V>(
      _mm256_permutevar8x32_epi32(bit_cast<__m256i>(v), _mm256_cvtepu8_epi32(lanes)));
#else
  int n = 0;
  V packed{};
  for (int l = 0; l < kLanes<float>; ++l)
    if (mask[l]) packed[n++] = v[l];
  return packed;
#endif
}

// How many of 32 floats are <= x.
SMARTBIRD_INLINE int count_le(const float* p, float x) {
#if defined(__AVX512F__)
  const __m512 t = _mm512_set1_ps(x);
  const __mmask16 low = _mm512_cmp_ps_mask(_mm512_loadu_ps(p), t, _CMP_LE_OQ);
  const __mmask16 high = _mm512_cmp_ps_mask(_mm512_loadu_ps(p + 16), t, _CMP_LE_OQ);
  return __builtin_popcount(_mm512_kunpackw(high, low));
#elif defined(__AVX2__)
  const __m256 t = _mm256_set1_ps(x);
  const auto le = [&](int i) {
    return _mm256_castps_si256(_mm256_cmp_ps(_mm256_loadu_ps(p + i), t, _CMP_LE_OQ));
  };
  const __m256i low = _mm256_packs_epi32(le(0), le(8)), high = _mm256_packs_epi32(le(16), le(24));
  return __builtin_popcount(
      static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_packs_epi16(low, high))));
#else
  int n = 0;
  for (int l = 0; l < 32; ++l) n += p[l] <= x;
  return n;
#endif
}

// Lane l becomes the sum of lanes 0..l.
SMARTBIRD_INLINE Vec<float> prefix_sum(Vec<float> v) {
#if defined(__AVX512F__)
  __m512 x = bit_cast<__m512>(v);
  const auto shift = [](__m512 y, auto n) {  // towards higher lanes, zeros in
    constexpr int k = 16 - decltype(n)::value;
    return _mm512_castsi512_ps(
        _mm512_maskz_alignr_epi32(0xFFFF, _mm512_castps_si512(y), _mm512_setzero_si512(), k));
  };
  x = _mm512_add_ps(x, shift(x, std::integral_constant<int, 1>{}));
  x = _mm512_add_ps(x, shift(x, std::integral_constant<int, 2>{}));
  x = _mm512_add_ps(x, shift(x, std::integral_constant<int, 4>{}));
  x = _mm512_add_ps(x, shift(x, std::integral_constant<int, 8>{}));
  return bit_cast<Vec<float>>(x);
#elif defined(__AVX2__)
  __m256 x = bit_cast<__m256>(v);
  x = _mm256_add_ps(x, _mm256_castsi256_ps(_mm256_slli_si256(_mm256_castps_si256(x), 4)));
  x = _mm256_add_ps(x, _mm256_castsi256_ps(_mm256_slli_si256(_mm256_castps_si256(x), 8)));
  const __m128 low_total = _mm_permute_ps(_mm256_castps256_ps128(x), 0xFF);
  return bit_cast<Vec<float>>(
      _mm256_add_ps(x, _mm256_insertf128_ps(_mm256_setzero_ps(), low_total, 1)));
#else
  for (int l = 1; l < kLanes<float>; ++l) v[l] += v[l - 1];
  return v;
#endif
}

// x * scale + offset in double, rounded towards zero.
SMARTBIRD_INLINE VecI scaled_to_int(Vec<float> x, double scale, double offset) {
#if defined(__AVX512F__)
  const __m512d s = _mm512_set1_pd(scale), o = _mm512_set1_pd(offset);
  const auto half = [&](__m256 y) {
    return _mm512_cvttpd_epi32(_mm512_fmadd_pd(_mm512_cvtps_pd(y), s, o));
  };
  const __m512 v = bit_cast<__m512>(x);
  return bit_cast<VecI>(_mm512_inserti64x4(
      _mm512_castsi256_si512(half(_mm512_castps512_ps256(v))),
      half(_mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1))), 1));
#elif defined(__AVX2__)
  const __m256d s = _mm256_set1_pd(scale), o = _mm256_set1_pd(offset);
  const auto half = [&](__m128 y) {
    return _mm256_cvttpd_epi32(_mm256_fmadd_pd(_mm256_cvtps_pd(y), s, o));
  };
  const __m256 v = bit_cast<__m256>(x);
  return bit_cast<VecI>(
      _mm256_set_m128i(half(_mm256_extractf128_ps(v, 1)), half(_mm256_castps256_ps128(v))));
#else
  VecI y{};
  for (int l = 0; l < kLanes<float>; ++l)
    y[l] = static_cast<int32_t>(static_cast<double>(x[l]) * scale + offset);
  return y;
#endif
}

// Lane l becomes lane l - 1, lane 0 zero.
SMARTBIRD_INLINE Vec<float> shift_up(Vec<float> v) {
  return [&]<int... I>(std::integer_sequence<int, I...>) {
    constexpr int L = sizeof...(I);
    return __builtin_shufflevector(v, Vec<float>{}, (I == 0 ? L : I - 1)...);
  }(std::make_integer_sequence<int, kLanes<float>>{});
}

// ---- elementary functions -----------------------------------------------------------------------

// exp(x) to 2 ulp; 0 below -87.3 (no subnormals), +inf above 88.7, NaN stays.
SMARTBIRD_INLINE Vec<float> exp(Vec<float> x) {
  constexpr float kLog2e = 1.44269504f, kLn2Hi = 0.693359375f, kLn2Lo = -2.12194440e-4f;
  constexpr float kRound =
      12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const Vec<float> clamped = min(max(broadcast(-87.3f), x), broadcast(88.75f));
  const Vec<float> shifted = clamped * kLog2e + kRound;
  const Vec<float> n = shifted - kRound;
  const Vec<float> r = (clamped - n * kLn2Hi) - n * kLn2Lo;
  // Minimax of (exp(r) - 1 - r) / r^2 on |r| <= ln(2) / 2, relative error of exp 3e-9.
  Vec<float> p = broadcast(0.001381459878757596f);
  p = p * r + 0.008368716575205326f;
  p = p * r + 0.04166838899254799f;
  p = p * r + 0.1666652113199234f;
  p = p * r + 0.4999999403953552f;
  p = p * (r * r) + (r + 1.0f);
  // Times 2^n in two steps, as n may be 128.
  const VecI e = bit_cast<VecI>(shifted) - bit_cast<int32_t>(kRound);
  const VecI half = e >> 1;
  const Vec<float> y =
      p * bit_cast<Vec<float>>((half + 127) << 23) * bit_cast<Vec<float>>((e - half + 127) << 23);
  return x < -87.3f ? broadcast(0.0f) : (x == x ? y : x);
}

// 2^x to 2 ulp for x in [-126, 127]; towards -127 it falls to an exact 0 and stays there, above 127
// it stays 2^127, a NaN stays. About half the price of exp.
SMARTBIRD_INLINE Vec<float> exp2(Vec<float> x) {
  constexpr float kRound =
      12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const Vec<float> clamped = max(broadcast(-127.0f), min(broadcast(127.0f), x));
  const Vec<float> shifted = clamped + kRound;
  const Vec<float> r = clamped - (shifted - kRound);
  // Minimax of 2^r on |r| <= 1/2 among polynomials that are 1 at 0, relative error 9e-8.
  Vec<float> p = broadcast(0.001326472731307149f);
  p = p * r + 0.009671512991189957f;
  p = p * r + 0.05550733581185341f;
  p = p * r + 0.24022242426872253f;
  p = p * r + 0.6931470036506653f;
  p = p * r + 1.0f;
  // To add n to the exponent multiplies by 2^n; at n = -127, where p is 1, it leaves all bits 0.
  return bit_cast<Vec<float>>(bit_cast<VecU>(p) + (bit_cast<VecU>(shifted) << 23));
}

// log(x) for normal x > 0 to 2 ulp; log(0) = -inf, NaN stays. Negative or subnormal: undefined.
SMARTBIRD_INLINE Vec<float> log(Vec<float> x) {
  constexpr float kLn2Hi = 0.693359375f, kLn2Lo = -2.12194440e-4f;
  constexpr int32_t kSqrtHalf = 0x3F3504F3;
  const VecI bits = bit_cast<VecI>(x);
  const VecI e = (bits - kSqrtHalf) >> 23;  // so that the mantissa lies in [sqrt(1/2), sqrt(2))
  const Vec<float> t = bit_cast<Vec<float>>(bits - (e << 23)) - 1.0f;
  const Vec<float> n = __builtin_convertvector(e, Vec<float>);
  // Minimax of (log(1 + t) - t + t^2 / 2) / t^3, relative error of log 3e-8.
  Vec<float> p = broadcast(0.08700437098741531f);
  p = p * t + -0.14267489314079285f;
  p = p * t + 0.14914768934249878f;
  p = p * t + -0.1657758504152298f;
  p = p * t + 0.19963063299655914f;
  p = p * t + -0.2500133812427521f;
  p = p * t + 0.3333390951156616f;
  const Vec<float> t2 = t * t;
  const Vec<float> y = (p * t * t2 + n * kLn2Lo) - 0.5f * t2 + t + n * kLn2Hi;
  return x == 0.0f ? broadcast(-__builtin_inff()) : (x < __builtin_inff() ? y : x);
}

inline float log_of(float x) { return log(broadcast(x))[0]; }  // as log()
inline double log_of(double x) { return __builtin_log(x); }

// float64 exists for tests and reference runs: the C library, lane by lane.
inline Vec<double> exp(Vec<double> x) {
  for (int l = 0; l < kLanes<double>; ++l) x[l] = __builtin_exp(x[l]);
  return x;
}

inline Vec<double> exp2(Vec<double> x) {
  for (int l = 0; l < kLanes<double>; ++l) x[l] = __builtin_exp2(x[l]);
  return x;
}

// ---- dtype to type ------------------------------------------------------------------------------

// Calls f with a value of the storage type that `dtype` names.
template <typename F>
inline void dispatch_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(float{});
    case DType::kFloat64:
      return f(double{});
    case DType::kBFloat16:
      return f(bfloat16{});
    case DType::kFloat16:
      return f(float16{});
  }
}

}  // namespace smartbird::SMARTBIRD_ISA
