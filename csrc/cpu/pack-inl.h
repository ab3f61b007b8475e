// Packs rows of features into the tiles that score_tile streams.
#include "vec.h"

#ifndef SMARTBIRD_PACK_INL_H_
#define SMARTBIRD_PACK_INL_H_

namespace smartbird::SMARTBIRD_ISA {

// A task packs this many tiles of one (b, h): enough work to pay for handing it out, small enough
// that one head of a few hundred keys already splits among threads.
constexpr int64_t kPackTilesPerTask = 8;

// How many tiles ahead of its use a row is fetched, into outer caches: memory is slow, and the
// innermost has few lines on the way at a time.
constexpr int64_t kPrefetchTiles = 16;

inline int64_t pack_tasks_per_head(const PackParams& p) {
  return ceil_div(p.rows.blocks_per_batch(kTile), kPackTilesPerTask);
}

inline int64_t pack_num_tasks(const PackParams& p) { return p.B * p.H * pack_tasks_per_head(p); }

inline int64_t pack_scratch_bytes(const PackParams&) { return 0; }

// Where an interleaved tile has key j: V float vectors make a tile, and vector v holds its keys v,
// v + V, v + 2 V, ... Sums in the order of the keys then go down the vectors, which is cheap,
// before they go across lanes, which is not.
template <typename I>
SMARTBIRD_INLINE I interleaved(I j) {
  constexpr int L = kLanes<float>, V = kTile / L;
  const I c = j & static_cast<int32_t>(kTile - 1);
  return j - c + (c & (V - 1)) * L + c / V;
}

#if SMARTBIRD_VEC_BYTES > 0
// Of each four lanes, the rows of v[0] to v[3] become columns.
SMARTBIRD_INLINE void transpose_fours(Vec<float>* v) {
  [&]<int... I>(std::integer_sequence<int, I...>) {
    constexpr int L = sizeof...(I);
    const auto low = [](Vec<float> a, Vec<float> b) {  // a[0] b[0] a[1] b[1] of each four
      return __builtin_shufflevector(a, b, (I / 4 * 4 + I % 4 / 2 + I % 2 * L)...);
    };
    const auto high = [](Vec<float> a, Vec<float> b) {  // a[2] b[2] a[3] b[3]
      return __builtin_shufflevector(a, b, (I / 4 * 4 + I % 4 / 2 + 2 + I % 2 * L)...);
    };
    const auto first = [](Vec<float> a, Vec<float> b) {  // a[0] a[1] b[0] b[1]
      return __builtin_shufflevector(a, b, (I / 4 * 4 + I % 2 + I % 4 / 2 * L)...);
    };
    const auto last = [](Vec<float> a, Vec<float> b) {  // a[2] a[3] b[2] b[3]
      return __builtin_shufflevector(a, b, (I / 4 * 4 + I % 2 + 2 + I % 4 / 2 * L)...);
    };
    const Vec<float> ab = low(v[0], v[1]), AB = high(v[0], v[1]), cd = low(v[2], v[3]),
                     CD = high(v[2], v[3]);
    v[0] = first(ab, cd);
    v[1] = last(ab, cd);
    v[2] = first(AB, CD);
    v[3] = last(AB, CD);
  }(std::make_integer_sequence<int, kLanes<float>>{});
}

// columns[d] lane l becomes x[l * stride + d], for as many rows and columns as lanes. Loads put
// fours of a row in place, so that shuffles need not cross them.
SMARTBIRD_INLINE void load_transposed(const float* x, int64_t stride, Vec<float>* columns) {
  for (int d = 0; d < kLanes<float>; d += 4) {
    for (int l = 0; l < 4; ++l) columns[d + l] = load_fours(x + l * stride + d, 4 * stride);
    transpose_fours(columns + d);
  }
}

// A whole tile as it is, in interleaved order; D is a multiple of the lanes.
template <typename T>
inline void pack_whole_tile(const T* __restrict x, int64_t stride, int64_t D,
                            float* __restrict tile) {
  constexpr int L = kLanes<float>, V = kTile / L;
  for (int v = 0; v < V; ++v)
    for (int64_t d = 0; d < D; d += L) {
      const T* rows = x + v * stride + d;
      for (int l = 0; l < L; ++l)
        __builtin_prefetch(rows + (l * V + kPrefetchTiles * kTile) * stride, 0, /*locality=*/1);
      Vec<float> columns[L];
      if constexpr (std::is_same_v<T, float>) {
        load_transposed(rows, V * stride, columns);
      } else {
        float wide[L * L];
        for (int l = 0; l < L; ++l) store(wide + l * L, load(rows + l * V * stride));
        load_transposed(wide, L, columns);
      }
      for (int l = 0; l < L; ++l) store(tile + (d + l) * kTile + v * L, columns[l]);
    }
}
#endif

// x [n <= 32, D] -> tile [D, 32]; a masked key's features are not even read.
template <typename T, typename A>
inline void pack_tile(const T* __restrict x, int64_t stride, int64_t D, int64_t n, double scale,
                      bool interleave, const uint8_t* __restrict mask, A* __restrict tile) {
#if SMARTBIRD_VEC_BYTES > 0
  if constexpr (!std::is_same_v<T, double> && !std::is_same_v<A, double>)
    if (n == kTile && mask == nullptr && interleave && scale == 1 && D % kLanes<float> == 0)
      return pack_whole_tile(x, stride, D, tile);
#endif
  for (int64_t c = 0; c < kTile; ++c) {
    A* column = tile + (interleave ? interleaved(c) : c);
    if (c < n && (mask == nullptr || mask[c])) {
      for (int64_t d = 0; d < D; ++d)
        column[d * kTile] = static_cast<A>(static_cast<double>(to_acc(x[c * stride + d])) * scale);
    } else {
      for (int64_t d = 0; d < D; ++d) column[d * kTile] = A{0};
    }
  }
}

// 0 for each of a tile's n <= 32 keys that may be attended, else -inf.
template <typename A>
inline void pack_bias(int64_t n, bool interleave, const uint8_t* __restrict mask,
                      A* __restrict bias) {
  if (n == kTile && mask == nullptr) {
    for (int64_t c = 0; c < kTile; ++c) bias[c] = 0;
    return;
  }
  for (int64_t c = 0; c < kTile; ++c) {
    const bool valid = c < n && (mask == nullptr || mask[c]);
    bias[interleave ? interleaved(c) : c] = valid ? A{0} : -static_cast<A>(__builtin_inf());
  }
}

// tile [D, 32] -> largest Euclidean norm of its keys; infinite if any feature is NaN.
template <typename A>
inline float largest_norm(const A* __restrict tile, int64_t D) {
  Vec<A> largest{};
  for (int64_t c = 0; c < kTile; c += kLanes<A>) {
    Vec<A> square{};
    for (int64_t d = 0; d < D; ++d) {
      const Vec<A> x = load(tile + d * kTile + c);
      square += x * x;
    }
    largest = max(largest, nan_to_inf(square));
  }
  return static_cast<float>(__builtin_sqrt(static_cast<double>(reduce_max(largest))));
}

template <typename T, typename A>
inline void pack_task(const PackParams& p, int64_t task) {
  const int64_t tasks_per_head = pack_tasks_per_head(p), num_tiles = p.rows.blocks_per_batch(kTile);
  const int64_t bh = task / tasks_per_head, b = bh / p.H, h = bh % p.H;
  const int64_t first = task % tasks_per_head * kPackTilesPerTask;
  const T* x = static_cast<const T*>(p.x) + b * p.stride[0] + h * p.stride[1];
  const uint8_t* mask = p.key_mask == nullptr ? nullptr : p.key_mask + b * p.rows.length;

  for (int64_t t = first; t < min_of(first + kPackTilesPerTask, num_tiles); ++t) {
    // Of a batch, block numbers go on from element to element; all elements are alike.
    const SegmentBlock block = segment_block(p.rows, kTile, t);
    const int64_t row = p.rows.rows(block.segment).begin + block.begin;
    const int64_t n = max_of<int64_t>(0, block.end - block.begin);
    const uint8_t* tile_mask = mask == nullptr ? nullptr : mask + row;
    A* tile = static_cast<A*>(p.tiles) + (bh * num_tiles + t) * p.D * kTile;
    pack_tile(x + row * p.stride[2], p.stride[2], p.D, n, p.scale, p.interleave, tile_mask, tile);
    if (p.tile_norm != nullptr) p.tile_norm[bh * num_tiles + t] = largest_norm(tile, p.D);
    if (p.key_bias != nullptr && h == 0)
      pack_bias(n, p.interleave, tile_mask,
                static_cast<A*>(p.key_bias) + (b * num_tiles + t) * kTile);
  }
}

// x [B, H, M, D] -> tiles [B, H, T, D, 32], key_bias and tile_norm.
inline void pack(const PackParams& p, int64_t task, void*) {
  dispatch_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    p.to_double ? pack_task<T, double>(p, task) : pack_task<T, float>(p, task);
  });
}

}  // namespace smartbird::SMARTBIRD_ISA

#endif  // SMARTBIRD_PACK_INL_H_
