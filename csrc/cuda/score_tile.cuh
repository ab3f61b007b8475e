// Scores of 16 rows with 32 columns by one warp, spread over it as the tensor core leaves them.
//
// 16-bit inputs go through mma.m16n8k16, which adds in float; float and double through FMA, so that
// float32 scores keep their 24 bits, into the same places. Operands are loaded from memory straight
// into fragments, without shared memory: features may be multiplied in any order, so a lane takes
// neighbouring features of its rows and columns, one wide load each, where PTX's layout has them
// apart.
#pragma once

#include "common.cuh"

namespace smartbird::cuda {

constexpr int kTileRows = 16, kTileCols = 32;
constexpr int kSubTiles = kTileCols / 8;  // matrix multiplications side by side

// How features are loaded.
enum class Features {
  kAny,      // one by one: any number, any alignment
  kVectors,  // 16 bytes at a time
  kFew,      // at most 16 of 16 bits, 8 bytes at a time: one matrix multiplication deep
};

// Of one lane, with g = lane / 4 and t = lane % 4: x[n][2 r + c] is the score of row g + 8 r with
// column 8 n + 2 t + c.
template <typename A>
struct ScoreTile {
  A x[kSubTiles][4];
};
__device__ __forceinline__ int tile_row(int i) { return lane_id() / 4 + i / 2 * 8; }
__device__ __forceinline__ int tile_col(int n, int i) { return 8 * n + lane_id() % 4 * 2 + i % 2; }

// Features d, ..., d + n - 1 of a row of `size`; zeros beyond it.
template <Features kFeatures, int n, typename T>
__device__ __forceinline__ Pack<T, n> load_features(const T* row, int d, int size) {
  if constexpr (kFeatures != Features::kAny) {
    if (d < size) return load_pack<T, n>(row + d);
    Pack<T, n> zeros;
    memset(&zeros, 0, sizeof(zeros));
    return zeros;
  } else {
    Pack<T, n> pack;
#pragma unroll
    for (int e = 0; e < n; ++e) pack.x[e] = d + e < size ? __ldg(row + d + e) : from_acc<T>(0);
    return pack;
  }
}

// row(r) and col(c) point at the features of row r < 16 and column c < 32: any valid row where
// there is none such, its scores are not looked at.
template <Features kFeatures, typename T, typename Row, typename Col>
__device__ __forceinline__ ScoreTile<acc_t<T>> score_tile(int size, Row&& row, Col&& col) {
  using A = acc_t<T>;
  ScoreTile<A> tile;
#pragma unroll
  for (int n = 0; n < kSubTiles; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) tile.x[n][i] = 0;

  const int g = lane_id() / 4, t = lane_id() % 4;
  if constexpr (sizeof(T) == 2) {
    constexpr int kPer = kFeatures == Features::kVectors ? 8 : 4;  // features of a lane at a time
    constexpr int kSteps = kPer / 4;
    const T *const row0 = row(g), *const row1 = row(g + 8);
#pragma unroll 1
    for (int begin = 0; begin < size; begin += 4 * kPer) {
      const int d = begin + kPer * t;
      uint32_t low[kPer / 2], high[kPer / 2];
      const auto a0 = load_features<kFeatures, kPer>(row0, d, size);
      const auto a1 = load_features<kFeatures, kPer>(row1, d, size);
      memcpy(low, &a0, sizeof(low));
      memcpy(high, &a1, sizeof(high));
#pragma unroll
      for (int n = 0; n < kSubTiles; ++n) {
        uint32_t b[kPer / 2];
        const auto column = load_features<kFeatures, kPer>(col(8 * n + g), d, size);
        memcpy(b, &column, sizeof(b));
#pragma unroll
        for (int s = 0; s < kSteps; ++s)
          mma_m16n8k16<T>(tile.x[n], {low[2 * s], high[2 * s], low[2 * s + 1], high[2 * s + 1]},
                          {b[2 * s], b[2 * s + 1]});
      }
    }
  } else {
    constexpr int kPer = kFeatures == Features::kAny ? 1 : kVectorBytes / sizeof(T);
#pragma unroll 1
    for (int d = 0; d < size; d += kPer) {
      Pack<T, kPer> a[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) a[r] = load_features<kFeatures, kPer>(row(g + 8 * r), d, size);
#pragma unroll
      for (int n = 0; n < kSubTiles; ++n)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const auto b = load_features<kFeatures, kPer>(col(8 * n + 2 * t + c), d, size);
#pragma unroll
          for (int r = 0; r < 2; ++r)
#pragma unroll
            for (int e = 0; e < kPer; ++e) tile.x[n][2 * r + c] += a[r].x[e] * b.x[e];
        }
    }
  }
  return tile;
}

// ---- choice of Features (host) ------------------------------------------------------------------

// Whether rows of `size` elements that begin at multiples of `stride` can be read `bytes` at a
// time.
template <int dims>
bool features_are_vectors(const void* x, const int64_t (&stride)[dims], int64_t size,
                          int64_t element_bytes, int64_t bytes) {
  bool whole = reinterpret_cast<uintptr_t>(x) % bytes == 0 && size * element_bytes % bytes == 0;
  for (const int64_t s : stride) whole = whole && s * element_bytes % bytes == 0;
  return whole;
}

// Calls f(T{}, integral_constant<Features>) for rows x and columns y of `size` features each.
template <int dims, typename F>
void dispatch_features(DType dtype, const void* x, const int64_t (&x_stride)[dims], const void* y,
                       const int64_t (&y_stride)[dims], int64_t size, F&& f) {
  dispatch_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    const auto fits = [&](int64_t bytes) {
      return features_are_vectors(x, x_stride, size, sizeof(T), bytes) &&
             features_are_vectors(y, y_stride, size, sizeof(T), bytes);
    };
    using Any = std::integral_constant<Features, Features::kAny>;
    using Vectors = std::integral_constant<Features, Features::kVectors>;
    using Few = std::integral_constant<Features, Features::kFew>;
    if constexpr (sizeof(T) == 2)
      if (size <= 16 && fits(8)) return f(type, Few{});
    if constexpr (!std::is_same_v<T, double>)  // float64 is for tests: one way is enough
      if (fits(kVectorBytes)) return f(type, Vectors{});
    f(type, Any{});
  });
}

}  // namespace smartbird::cuda
