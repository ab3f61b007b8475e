// Softmax attention over all valid keys, streamed: the sketch's log-sum-exp and its gradients, and
// the dense target of distillation.
//
// A block owns 16 rows; its warps take tiles of 32 columns in turn. Scores are in units of log(2),
// log2(e) being part of the scale, so that a weight is a bare exp2.
#include "launch.h"
#include "score_tile.cuh"

namespace smartbird::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;

__device__ __forceinline__ bool row_takes_part(const DenseParams& p, int64_t b, int64_t r) {
  return r < p.R && (p.row_mask == nullptr || p.row_mask[b * p.R + r] != 0);
}
__device__ __forceinline__ bool col_takes_part(const DenseParams& p, int64_t b, int64_t c) {
  return c < p.C && (p.col_mask == nullptr || p.col_mask[b * p.C + c] != 0);
}

__device__ __forceinline__ bool causal_allows(const DenseParams& p, int64_t r, int64_t c) {
  if (!p.is_causal) return true;
  return p.cols_are_queries ? c >= r - p.causal_offset : c <= r + p.causal_offset;
}

// The tiles of columns [begin, end) that some of 16 rows may see.
struct TileSpan {
  int64_t begin, end;
};
__device__ __forceinline__ TileSpan visible_tiles(const DenseParams& p, int64_t first_row) {
  TileSpan span{0, ceil_div(p.C, kTileCols)};
  if (!p.is_causal) return span;
  const int64_t last_row = first_row + kTileRows - 1;
  if (p.cols_are_queries)
    span.begin = max_of<int64_t>(0, first_row - p.causal_offset) / kTileCols;
  else
    span.end =
        min_of(span.end, ceil_div(max_of<int64_t>(0, last_row + p.causal_offset + 1), kTileCols));
  return span;
}

// Scores, not yet scaled, of the block's rows with the columns of a tile, in head h.
template <typename T, Features kFeatures>
__device__ __forceinline__ ScoreTile<acc_t<T>> score_columns(const DenseParams& p, int64_t b,
                                                             int64_t first_row, int64_t h,
                                                             int64_t tile) {
  const T* rows =
      static_cast<const T*>(p.rows) + b * p.row_stride[0] + h / p.rows_per_head * p.row_stride[1];
  const T* cols =
      static_cast<const T*>(p.cols) + b * p.col_stride[0] + h / p.cols_per_head * p.col_stride[1];
  return score_tile<kFeatures, T>(
      static_cast<int>(p.D),
      [&](int r) { return rows + min_of(first_row + r, p.R - 1) * p.row_stride[2]; },
      [&](int c) { return cols + min_of(tile * kTileCols + c, p.C - 1) * p.col_stride[2]; });
}

// rows [B, H, R, D], cols [B, H, C, D] -> lse [B, H, R].
template <typename T, Features kFeatures>
__global__ void __launch_bounds__(kThreads, 1) dense_lse_kernel(const DenseParams p) {
  using A = acc_t<T>;
  const A none = -static_cast<A>(kInf);
  const int64_t blocks = ceil_div(p.R, kTileRows);
  const int64_t bh = blockIdx.x / blocks, b = bh / p.H, h = bh % p.H;
  const int64_t first_row = blockIdx.x % blocks * kTileRows;
  const A scale = static_cast<A>(p.scale);

  // Of the lane's two rows, over its own columns.
  A largest[2] = {none, none}, sum[2] = {0, 0};
  const TileSpan span = visible_tiles(p, first_row);
  for (int64_t tile = span.begin + warp_id(); tile < span.end; tile += kWarps) {
    auto scores = score_columns<T, kFeatures>(p, b, first_row, h, tile);
    const int64_t own_col = tile * kTileCols + lane_id();
    const unsigned part = __ballot_sync(kAllLanes, col_takes_part(p, b, own_col));
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t row = first_row + tile_row(2 * r);
      A top = largest[r];
#pragma unroll
      for (int n = 0; n < kSubTiles; ++n)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int col = tile_col(n, c);
          const bool valid =
              (part >> col & 1) != 0 && causal_allows(p, row, tile * kTileCols + col);
          A& score = scores.x[n][2 * r + c];
          score = valid ? score * scale : none;
          top = max_of(top, nan_to_inf(score));
        }
      if (top == none) continue;
      sum[r] *= exp2_of(largest[r] - top);
      largest[r] = top;
#pragma unroll
      for (int n = 0; n < kSubTiles; ++n)
#pragma unroll
        for (int c = 0; c < 2; ++c) sum[r] += exp2_of(scores.x[n][2 * r + c] - top);
    }
  }

  struct Shared {
    A largest[kWarps][kTileRows], sum[kWarps][kTileRows];
  };
  Shared& shared = *shared_memory<Shared>();
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const A top = max_lanes<4>(largest[r]);
    const A total = sum_lanes<4>(top == none ? A{0} : sum[r] * exp2_of(largest[r] - top));
    if (lane_id() % 4 == 0) {
      shared.largest[warp_id()][tile_row(2 * r)] = top;
      shared.sum[warp_id()][tile_row(2 * r)] = total;
    }
  }
  __syncthreads();
  const int r = static_cast<int>(threadIdx.x);
  if (r >= kTileRows || first_row + r >= p.R) return;
  A top = none, total = 0;
  for (int w = 0; w < kWarps; ++w) top = max_of(top, shared.largest[w][r]);
  if (top != none)
    for (int w = 0; w < kWarps; ++w)
      total += shared.sum[w][r] * exp2_of(shared.largest[w][r] - top);
  static_cast<A*>(p.lse)[bh * p.R + first_row + r] =
      top == none ? none : (top + log2_of(total)) * static_cast<A>(kLn2);
}

// Values that a block sums at once: two halves of a warp have 8 rows each, a lane 2 of the values.
constexpr int kValuesPerBlock = 32;  // a usual sketch; registers for no more
constexpr int kRowsPerLane = kTileRows / 2;
constexpr int kValuesPerLane = kValuesPerBlock / (kWarpSize / 2);
constexpr int kWeightStride = kTileCols + 1;  // no two rows in one bank

template <typename A>
struct MeanShared {
  A weight[kWarps][kTileRows][kWeightStride];
  A out[kTileRows][kValuesPerBlock];
};

// rows [B, H, R, D], cols [B, H, C, D], values [B, C, Dv] -> out [B, R, Dv]: the sum over heads and
// columns of exp2(score * scale - (row_shift + col_shift) log2(e)) * col_weight * values.
template <typename T, Features kFeatures>
__global__ void __launch_bounds__(kThreads, 1) dense_mean_kernel(const DenseParams p) {
  using A = acc_t<T>;
  const A none = -static_cast<A>(kInf);
  const int64_t row_blocks = ceil_div(p.R, kTileRows);
  const int64_t value_blocks = ceil_div(p.Dv, kValuesPerBlock);
  const int64_t first_value = blockIdx.x % value_blocks * kValuesPerBlock;
  const int64_t first_row = blockIdx.x / value_blocks % row_blocks * kTileRows;
  const int64_t b = blockIdx.x / value_blocks / row_blocks;
  const A scale = static_cast<A>(p.scale), log2e = static_cast<A>(kLog2e);
  const A* row_shift = static_cast<const A*>(p.row_shift);
  const A* col_shift = static_cast<const A*>(p.col_shift);
  const A* col_weight = static_cast<const A*>(p.col_weight);
  const A* values = static_cast<const A*>(p.values) + b * p.C * p.Dv;
  MeanShared<A>& shared = *shared_memory<MeanShared<A>>();

  const int half = lane_id() / (kWarpSize / 2), value = lane_id() % (kWarpSize / 2);
  A out[kRowsPerLane][kValuesPerLane];
#pragma unroll
  for (int r = 0; r < kRowsPerLane; ++r)
#pragma unroll
    for (int v = 0; v < kValuesPerLane; ++v) out[r][v] = 0;

  const TileSpan span = visible_tiles(p, first_row);
  for (int64_t tile = span.begin + warp_id(); tile < span.end; tile += kWarps) {
    // Heads share the values, so their weights are added before the product with them.
    ScoreTile<A> weight;
#pragma unroll
    for (int n = 0; n < kSubTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) weight.x[n][i] = 0;
    const int64_t own_col = tile * kTileCols + lane_id();
    const bool exists = col_takes_part(p, b, own_col);
    unsigned used = 0;  // columns that take part in any head
    for (int64_t h = 0; h < p.H; ++h) {
      const auto scores = score_columns<T, kFeatures>(p, b, first_row, h, tile);
      A own_shift = exists ? A{0} : none;
      if (exists && col_shift != nullptr) own_shift = col_shift[(b * p.H + h) * p.C + own_col];
      const unsigned part = __ballot_sync(kAllLanes, own_shift != none);
      used |= part;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int64_t row = first_row + tile_row(2 * r);
        A shift = row_takes_part(p, b, row) ? A{0} : none;
        if (shift != none && row_shift != nullptr) shift = row_shift[(b * p.H + h) * p.R + row];
#pragma unroll
        for (int n = 0; n < kSubTiles; ++n)
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const int col = tile_col(n, c);
            const A col_part = __shfl_sync(kAllLanes, own_shift, col);
            const bool valid = shift != none && (part >> col & 1) != 0 &&
                               causal_allows(p, row, tile * kTileCols + col);
            const A exponent = scores.x[n][2 * r + c] * scale - (shift + col_part) * log2e;
            weight.x[n][2 * r + c] += valid ? exp2_of(exponent) : A{0};
          }
      }
    }

    __syncwarp();  // the tile before has been read
#pragma unroll
    for (int n = 0; n < kSubTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        shared.weight[warp_id()][tile_row(i)][tile_col(n, i)] = weight.x[n][i];
    __syncwarp();
#pragma unroll 1  // registers are full
    for (int c = 0; c < kTileCols; ++c) {
      if ((used >> c & 1) == 0) continue;  // not read: it may hold anything
      const int64_t col = tile * kTileCols + c;
      const A factor = col_weight == nullptr ? A{1} : col_weight[b * p.C + col];
      A x[kValuesPerLane];
#pragma unroll
      for (int v = 0; v < kValuesPerLane; ++v) {
        const int64_t d = first_value + value + v * (kWarpSize / 2);
        x[v] = d < p.Dv ? factor * values[col * p.Dv + d] : A{0};
      }
#pragma unroll
      for (int r = 0; r < kRowsPerLane; ++r) {
        const A w = shared.weight[warp_id()][half * kRowsPerLane + r][c];
#pragma unroll
        for (int v = 0; v < kValuesPerLane; ++v) out[r][v] += w * x[v];
      }
    }
  }

  // One warp after the other, so that the order of additions is always the same.
  for (int w = 0; w < kWarps; ++w) {
    if (warp_id() == w) {
#pragma unroll
      for (int r = 0; r < kRowsPerLane; ++r)
#pragma unroll
        for (int v = 0; v < kValuesPerLane; ++v) {
          A& total = shared.out[half * kRowsPerLane + r][value + v * (kWarpSize / 2)];
          total = w == 0 ? out[r][v] : total + out[r][v];
        }
    }
    __syncthreads();
  }
  for (int at = static_cast<int>(threadIdx.x); at < kTileRows * kValuesPerBlock; at += kThreads) {
    const int64_t r = first_row + at / kValuesPerBlock, d = first_value + at % kValuesPerBlock;
    if (r < p.R && d < p.Dv)
      static_cast<A*>(p.out)[(b * p.R + r) * p.Dv + d] =
          shared.out[at / kValuesPerBlock][at % kValuesPerBlock];
  }
}

}  // namespace

void run_dense_lse(const DenseParams& params, cudaStream_t stream) {
  dispatch_features(params.dtype, params.rows, params.row_stride, params.cols, params.col_stride,
                    params.D, [&](auto type, auto features) {
                      using T = decltype(type);
                      launch("dense_lse", dense_lse_kernel<T, decltype(features)::value>,
                             params.B * params.H * ceil_div(params.R, kTileRows), kThreads,
                             2 * kWarps * kTileRows * sizeof(acc_t<T>), stream, params);
                    });
}

void run_dense_mean(const DenseParams& params, cudaStream_t stream) {
  dispatch_features(
      params.dtype, params.rows, params.row_stride, params.cols, params.col_stride, params.D,
      [&](auto type, auto features) {
        using T = decltype(type);
        launch("dense_mean", dense_mean_kernel<T, decltype(features)::value>,
               params.B * ceil_div(params.R, kTileRows) * ceil_div(params.Dv, kValuesPerBlock),
               kThreads, sizeof(MeanShared<acc_t<T>>), stream, params);
      });
}

}  // namespace smartbird::cuda
