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

__host__ __device__ __forceinline__ const Segments& row_segments(const DenseParams& p) {
  return p.cols_are_queries ? p.visible.keys : p.visible.queries;
}

// The 16 rows of a block and the columns that they may meet, all of one sequence. Rows and columns
// are counted from its first, so that where it lies in a call changes no order of additions.
struct RowBlock {
  Sequence sequence;
  int64_t b;
  int64_t first_row, num_rows;  // in [0, R): of the block
  int64_t first_col;            // in [0, C): of the sequence
  int num_cols;                 // of the sequence
  const uint8_t* col_mask;      // of these columns, or null
};

// Block `number` of Segments::num_blocks(kTileRows).
__device__ __forceinline__ RowBlock row_block(const DenseParams& p, int64_t number) {
  const Visible& v = p.visible;
  const SegmentBlock at = segment_block(row_segments(p), kTileRows, number);
  RowBlock block;
  block.sequence = sequence_at(v, at.segment);
  const Sequence& s = block.sequence;
  block.b = s.batch;
  block.first_row = (p.cols_are_queries ? s.first_key : s.first_query) + at.begin;
  block.num_rows = max_of<int64_t>(0, at.end - at.begin);
  block.first_col = p.cols_are_queries ? s.first_query : s.first_key;
  block.num_cols = static_cast<int>(p.cols_are_queries ? s.num_queries : s.num_keys);
  block.col_mask = p.cols_are_queries ? nullptr : mask_of(v, s, v.key_mask);
  return block;
}

// The columns that a row meets: those of [begin, end) that are not in the hole, as far as col_mask
// allows.
struct Reach {
  int begin, end, hole_begin, hole_end;

  // A bit for each of the 32 columns from `first` on.
  __device__ __forceinline__ unsigned columns(int first) const {
    const auto below = [&](int col) {
      col -= first;
      return col <= 0 ? 0u : (col >= kTileCols ? kAllLanes : (1u << col) - 1);
    };
    return below(end) & ~below(begin) & ~(below(hole_end) & ~below(hole_begin));
  }
};

__device__ __forceinline__ Reach reach_of(const DenseParams& p, const RowBlock& block, int r) {
  if (r >= block.num_rows) return {};
  const Visible& v = p.visible;
  const Sequence& s = block.sequence;
  Span span, hole;
  if (p.cols_are_queries) {
    const int64_t key = block.first_row - s.first_key + r;
    const uint8_t* mask = mask_of(v, s, v.key_mask);
    if (mask != nullptr && mask[key] == 0) return {};
    span = free_queries(v, s, key, &hole);
  } else {
    span = free_keys(v, s, position_of(v, s, block.first_row - s.first_query + r), &hole);
  }
  return {static_cast<int>(span.begin), static_cast<int>(span.end), static_cast<int>(hole.begin),
          static_cast<int>(hole.end)};
}

// Fills in reach[kTileRows], which all threads may read then. Returns the tiles [begin, end) of
// columns that any of the rows meets.
struct TileSpan {
  int begin, end;
};
__device__ __forceinline__ TileSpan reach_of_rows(const DenseParams& p, const RowBlock& block,
                                                  Reach* reach) {
  const int r = static_cast<int>(threadIdx.x);
  if (r < kTileRows) reach[r] = reach_of(p, block, r);
  __syncthreads();
  int begin = INT32_MAX, end = 0;
  for (int i = 0; i < kTileRows; ++i) {
    if (reach[i].begin >= reach[i].end) continue;
    begin = min_of(begin, reach[i].begin);
    end = max_of(end, reach[i].end);
  }
  if (end == 0) return {0, 0};
  return {begin / kTileCols, static_cast<int>(ceil_div(end, kTileCols))};
}

__device__ __forceinline__ bool col_takes_part(const RowBlock& block, int col) {
  return col < block.num_cols && (block.col_mask == nullptr || block.col_mask[col] != 0);
}

// Scores, not yet scaled, of the block's rows with the columns of a tile, in head h.
template <typename T, Features kFeatures>
__device__ __forceinline__ ScoreTile<acc_t<T>> score_columns(const DenseParams& p,
                                                             const RowBlock& block, int64_t h,
                                                             int tile) {
  const T* rows = static_cast<const T*>(p.rows) + block.b * p.row_stride[0] +
                  h / p.rows_per_head * p.row_stride[1] + block.first_row * p.row_stride[2];
  const T* cols = static_cast<const T*>(p.cols) + block.b * p.col_stride[0] +
                  h / p.cols_per_head * p.col_stride[1] + block.first_col * p.col_stride[2];
  const int last_row = static_cast<int>(block.num_rows) - 1, last_col = block.num_cols - 1;
  return score_tile<kFeatures, T>(
      static_cast<int>(p.D), [&](int r) { return rows + min_of(r, last_row) * p.row_stride[2]; },
      [&](int c) { return cols + min_of(tile * kTileCols + c, last_col) * p.col_stride[2]; });
}

template <typename A>
struct LseShared {
  A largest[kWarps][kTileRows], sum[kWarps][kTileRows];
  Reach reach[kTileRows];
};

// rows [B, H, R, D], cols [B, H, C, D] -> lse [B, H, R].
template <typename T, Features kFeatures>
__global__ void __launch_bounds__(kThreads, 1) dense_lse_kernel(const DenseParams p) {
  using A = acc_t<T>;
  const A none = -static_cast<A>(kInf);
  LseShared<A>& shared = *shared_memory<LseShared<A>>();
  const int64_t per_batch = row_segments(p).blocks_per_batch(kTileRows);
  const int64_t h = blockIdx.x / per_batch % p.H;
  const RowBlock block =
      row_block(p, blockIdx.x / per_batch / p.H * per_batch + blockIdx.x % per_batch);
  if (block.num_rows == 0) return;
  const TileSpan span = reach_of_rows(p, block, shared.reach);
  const Reach reach[2] = {shared.reach[tile_row(0)], shared.reach[tile_row(2)]};
  const A scale = static_cast<A>(p.scale);

  // Of the lane's two rows, over its own columns.
  A largest[2] = {none, none}, sum[2] = {0, 0};
  for (int tile = span.begin + warp_id(); tile < span.end; tile += kWarps) {
    auto scores = score_columns<T, kFeatures>(p, block, h, tile);
    const unsigned part =
        __ballot_sync(kAllLanes, col_takes_part(block, tile * kTileCols + lane_id()));
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const unsigned valid = part & reach[r].columns(tile * kTileCols);
      A top = largest[r];
#pragma unroll
      for (int n = 0; n < kSubTiles; ++n)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          A& score = scores.x[n][2 * r + c];
          score = (valid >> tile_col(n, c) & 1) != 0 ? score * scale : none;
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
  if (r >= block.num_rows) return;
  A top = none, total = 0;
  for (int w = 0; w < kWarps; ++w) top = max_of(top, shared.largest[w][r]);
  if (top != none)
    for (int w = 0; w < kWarps; ++w)
      total += shared.sum[w][r] * exp2_of(shared.largest[w][r] - top);
  static_cast<A*>(p.lse)[(block.b * p.H + h) * p.R + block.first_row + r] =
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
  Reach reach[kTileRows];
};

// rows [B, H, R, D], cols [B, H, C, D], values [B, H_v, C, Dv] -> out [B, H_out, R, Dv]: the sum
// over the heads of each head of out, and over columns, of exp2(score * scale - (row_shift +
// col_shift) log2(e)) * col_weight * values.
template <typename T, Features kFeatures>
__global__ void __launch_bounds__(kThreads, 1) dense_mean_kernel(const DenseParams p) {
  using A = acc_t<T>;
  const A none = -static_cast<A>(kInf);
  const int64_t value_blocks = ceil_div(p.Dv, kValuesPerBlock);
  const int64_t per_batch = row_segments(p).blocks_per_batch(kTileRows);
  const int first_value = static_cast<int>(blockIdx.x % value_blocks) * kValuesPerBlock;
  const int64_t h_out = blockIdx.x / value_blocks / per_batch % p.H_out;
  const RowBlock block = row_block(p, blockIdx.x / value_blocks / per_batch / p.H_out * per_batch +
                                          blockIdx.x / value_blocks % per_batch);
  if (block.num_rows == 0) return;
  MeanShared<A>& shared = *shared_memory<MeanShared<A>>();
  const TileSpan span = reach_of_rows(p, block, shared.reach);
  const A scale = static_cast<A>(p.scale), log2e = static_cast<A>(kLog2e);

  const int half = lane_id() / (kWarpSize / 2), value = lane_id() % (kWarpSize / 2);
  A out[kRowsPerLane][kValuesPerLane];
#pragma unroll
  for (int r = 0; r < kRowsPerLane; ++r)
#pragma unroll
    for (int v = 0; v < kValuesPerLane; ++v) out[r][v] = 0;

  // Heads that share values, so that their weights are added before the product with them.
  const int64_t group = p.H / max_of(p.H_out, p.H_v), heads = p.H / p.H_out;
#pragma unroll 1
  for (int tile = span.begin + warp_id(); tile < span.end; tile += kWarps) {
    const int own_col = tile * kTileCols + lane_id();
    const bool exists = col_takes_part(block, own_col);
#pragma unroll 1
    for (int64_t first_head = h_out * heads; first_head < (h_out + 1) * heads;
         first_head += group) {
      ScoreTile<A> weight;
#pragma unroll
      for (int n = 0; n < kSubTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) weight.x[n][i] = 0;
      unsigned used = 0;  // columns that take part in any row and head
#pragma unroll 1
      for (int64_t h = first_head; h < first_head + group; ++h) {
        const auto scores = score_columns<T, kFeatures>(p, block, h, tile);
        const A* col_shift = static_cast<const A*>(p.col_shift);
        const A* row_shift = static_cast<const A*>(p.row_shift);
        A own_shift = exists ? A{0} : none;
        if (exists && col_shift != nullptr)
          own_shift = col_shift[(block.b * p.H + h) * p.C + block.first_col + own_col];
        const unsigned part = __ballot_sync(kAllLanes, own_shift != none);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int row = tile_row(2 * r);
          A shift = 0;
          if (row_shift != nullptr && row < block.num_rows)
            shift = row_shift[(block.b * p.H + h) * p.R + block.first_row + row];
          const unsigned valid =
              shift == none ? 0 : part & shared.reach[row].columns(tile * kTileCols);
          used |= valid;
#pragma unroll
          for (int n = 0; n < kSubTiles; ++n)
#pragma unroll
            for (int c = 0; c < 2; ++c) {
              const int col = tile_col(n, c);
              const A col_part = __shfl_sync(kAllLanes, own_shift, col);
              const A exponent = scores.x[n][2 * r + c] * scale - (shift + col_part) * log2e;
              weight.x[n][2 * r + c] += (valid >> col & 1) != 0 ? exp2_of(exponent) : A{0};
            }
        }
      }
      used = reduce_lanes<kWarpSize, 4>(used, [](unsigned a, unsigned b) { return a | b; });

      __syncwarp();  // the weights before have been read
#pragma unroll
      for (int n = 0; n < kSubTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          shared.weight[warp_id()][tile_row(i)][tile_col(n, i)] = weight.x[n][i];
      __syncwarp();
      const int64_t first =
          (block.b * p.H_v + first_head / (p.H / p.H_v)) * p.C + block.first_col + tile * kTileCols;
      const A* values = static_cast<const A*>(p.values) + first * p.Dv + first_value + value;
      const A* col_weight =
          p.col_weight == nullptr ? nullptr : static_cast<const A*>(p.col_weight) + first;
      const int left = static_cast<int>(p.Dv) - first_value - value;
#pragma unroll 1  // registers are full
      for (int c = 0; c < kTileCols; ++c) {
        if ((used >> c & 1) == 0) continue;  // not read: it may hold anything
        const A factor = col_weight == nullptr ? A{1} : col_weight[c];
        A x[kValuesPerLane];
#pragma unroll
        for (int v = 0; v < kValuesPerLane; ++v)
          x[v] =
              v * (kWarpSize / 2) < left ? factor * values[c * p.Dv + v * (kWarpSize / 2)] : A{0};
#pragma unroll
        for (int r = 0; r < kRowsPerLane; ++r) {
          const A w = shared.weight[warp_id()][half * kRowsPerLane + r][c];
#pragma unroll
          for (int v = 0; v < kValuesPerLane; ++v) out[r][v] += w * x[v];
        }
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
    const int r = at / kValuesPerBlock, d = first_value + at % kValuesPerBlock;
    if (r < block.num_rows && d < p.Dv)
      static_cast<A*>(p.out)[((block.b * p.H_out + h_out) * p.R + block.first_row + r) * p.Dv + d] =
          shared.out[r][at % kValuesPerBlock];
  }
}

// Blocks of rows of all batch elements.
int64_t count_row_blocks(const DenseParams& p) { return row_segments(p).num_blocks(kTileRows); }

}  // namespace

void run_dense_lse(const DenseParams& params, cudaStream_t stream) {
  dispatch_features(params.dtype, params.rows, params.row_stride, params.cols, params.col_stride,
                    params.D, [&](auto type, auto features) {
                      using T = decltype(type);
                      launch("dense_lse", dense_lse_kernel<T, decltype(features)::value>,
                             count_row_blocks(params) * params.H, kThreads,
                             sizeof(LseShared<acc_t<T>>), stream, params);
                    });
}

void run_dense_mean(const DenseParams& params, cudaStream_t stream) {
  dispatch_features(
      params.dtype, params.rows, params.row_stride, params.cols, params.col_stride, params.D,
      [&](auto type, auto features) {
        using T = decltype(type);
        launch("dense_mean", dense_mean_kernel<T, decltype(features)::value>,
               count_row_blocks(params) * params.H_out * ceil_div(params.Dv, kValuesPerBlock),
               kThreads, sizeof(MeanShared<acc_t<T>>), stream, params);
      });
}

}  // namespace smartbird::cuda
