// What the kernels take: raw pointers, sizes and strides, filled in (and checked) by
// cpu/ops_cpu.cpp and cuda/ops_cuda.cpp. CUDA kernels read keys where they lie and report errors by
// device assertions: fields of packed tiles, of errors and of a range of rows are the CPU's,
// `device_seed`, `scratch` and `cols` are CUDA's.
//
// Sizes: B batch, N queries, M keys, H heads, H_kv key/value heads, H_i index heads, H_s sketches,
// H_ks sketches of keys (H_ks divides H_s, which divides H_i), D head dim, Dv value dim, S sketch
// dim, K samples per query and index head. Of a packed call (see visible.h) B is 1, N and M are
// those of all sequences together. Strides count elements; the last dimension is contiguous. `acc`
// stands for the accumulation type: double for float64 inputs, float for all others.
#pragma once

#include <cstdint>

#include "visible.h"

namespace smartbird {

enum class DType : int32_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

enum class SampleMethod : int32_t { kGumbel, kSystematic, kMultinomial, kTopK };

// What a kernel found wrong in the values of its inputs, reported through `error` (0: nothing).
enum ValueError : int32_t { kNoError = 0, kIndexOutOfRange = 1, kSketchNotFinite = 2 };

constexpr double kLog2e = 1.4426950408889634;

constexpr int64_t kFeaturePad = 16;  // rows padded to this are whole vectors everywhere

// Rearranges rows so that a vector holds one feature of neighbouring rows, and two such vectors lie
// side by side: a plain [D, M] layout at power-of-two M would make all D streams collide in L1.
// Each segment begins a tile of its own, at Segments::first_block(segment, kTile), so that where a
// sequence lies in a call does not change how its keys are summed.
struct PackParams {
  int64_t B, H, D;
  Segments rows;  // M of them in each batch element, in T = rows.blocks_per_batch(kTile) tiles
  DType dtype;
  bool to_double;  // tiles and key_bias are double, else float
  const void* x;   // [B, H, M, D]
  int64_t stride[3];
  double scale;             // factor of every feature
  bool interleave;          // the keys of a tile in the order that the sampler sums them in
  const uint8_t* key_mask;  // [B, M] contiguous, 0 = may not be attended; or null

  void* tiles;       // [B, H, T, D, 32] out; zeros for masked keys and where a tile has no row
  void* key_bias;    // [B, T * 32] out: 0 where the key may be attended, else -inf; or null
  float* tile_norm;  // [B, H, T] out: largest Euclidean norm of a tile's keys; or null
};

struct SketchSampleParams {
  int64_t B, N, M, S, H_s, H_ks, H_i, K;
  DType dtype;
  Visible visible;
  const void* q_sketch;  // [B, H_s, N, S]
  int64_t q_stride[3];
  double scale;
  SampleMethod method;
  int64_t row_begin, row_end;  // the queries to draw for, all that the outputs hold
  uint64_t seed, offset;
  int64_t most_queries, most_keys;  // of a sequence

  const int64_t*
      device_seed;  // [2] (seed, offset) in place of the two above, not known to the host
  void* scratch;    // of cuda::sketch_sample_scratch_bytes

  const void* k_sketch;  // [B, H_ks, M, S]
  int64_t k_stride[3];
  const float* k_tiles;  // packed k_sketch, interleaved, see PackParams; none where queries are few
  const float* key_bias;  // packed key_mask, interleaved
  const float* tile_norm;
  float* scanned;    // of few queries: [sequences, H_s, most_queries, scanned_row_size()], scratch
  int32_t* indices;  // [B, H_i, rows, K] out: rows of k_sketch
  float* log_inclusion;  // [B, H_i, rows, K] out, or null
  int32_t* error;        // [1] out
};

// Keys of a row in whole tiles.
inline int64_t padded_keys(const SketchSampleParams& p) {
  return (p.most_keys + kTile - 1) / kTile * kTile;
}

// Tiles of a row whose sums belong together, see Moments; a task of sketch_scan reads them.
constexpr int64_t kPartTiles = 64;

inline int64_t parts_of_row(const SketchSampleParams& p) {
  return (padded_keys(p) + kPartTiles * kTile - 1) / (kPartTiles * kTile);
}

// Floats of a row that is scanned: its weights, and of each part the sums of its blocks and its
// moments, which take two vectors of no more than kTile floats.
inline int64_t scanned_row_size(const SketchSampleParams& p) {
  return padded_keys(p) + parts_of_row(p) * (kPartTiles + kTile);
}

// Floats of all rows that are scanned.
inline int64_t scanned_size(const SketchSampleParams& p) {
  return p.visible.queries.count() * p.H_s * p.most_queries * scanned_row_size(p);
}

// Where no sequence has more queries than this, keys are not packed: sketch_scan reads them as they
// lie, on all cores, and leaves the weights of every row for sketch_sample; unless these are more
// than so many floats.
constexpr int64_t kScanQueries = 4, kMostScanned = int64_t{1} << 26;

inline bool scans(const SketchSampleParams& p) {
  return p.most_queries <= kScanQueries && scanned_size(p) <= kMostScanned;
}

struct GatherParams {
  int64_t B, H, H_kv, H_i, N, M, K, D, Dv;
  DType dtype;
  const void* q;  // [B, H, N, D]
  int64_t q_stride[3];
  const void* k;  // [B, H_kv, M, D]
  int64_t k_stride[3];
  const void* v;  // [B, H_kv, M, Dv]; null in gather_scores
  int64_t v_stride[3];
  int64_t row_begin, row_end;  // the queries to attend from, all that indices and bias hold
  const int32_t* indices;      // [B, H_i, rows, K], -1 = no key
  int64_t indices_stride[3];
  const void* bias;  // acc [B, H_bias, rows, K] added to the scaled scores, all four strides free;
                     // or null
  int64_t bias_stride[4];
  int64_t H_bias;  // H or H_i: head h has the bias of h / (H / H_bias)
  double scale;
  double dropout_p;
  Visible visible;  // who the queries are: for dropout only
  uint64_t seed, offset;
  const int64_t*
      device_seed;  // [2] (seed, offset) in place of the two above, not known to the host

  void* out;       // [B, H, N, Dv] out, contiguous; in gather_scores [B, H, N, K]
  void* lse;       // acc [B, H, N] out, contiguous; null in gather_scores
  int32_t* error;  // [1] out
};

// The forward's inputs in `fwd`; its results are not read, the softmax is made again. Each gradient
// may be null where it is not needed. In the backward of gather_scores v, dv, lse, dlse and bias
// are null, Dv is 0, and dout is [B, H, N, K].
struct GatherBackwardParams {
  GatherParams fwd;
  const void* dout;  // [B, H, N, Dv], contiguous
  const void* dlse;  // acc [B, H, N], contiguous; or null
  void* dq;          // [B, H, N, D] out, contiguous
  void* dk;          // [B, H_kv, M, D] out, contiguous
  void* dv;          // [B, H_kv, M, Dv] out, contiguous
  void* dbias;       // acc [B, H, N, K] out, contiguous

  // The work of one round, a pass over queries and then one over keys: the slices [slice_begin,
  // slice_end), where slice s is (b, h_kv) = (s / H_kv, s % H_kv), and of each the heads
  // [head_begin, head_end) among the H / H_kv that share its keys. Where these are not all, a round
  // has one slice, and dk_sum and dv_sum carry its sums from round to round.
  int64_t slice_begin, slice_end;
  int64_t head_begin, head_end;
  void* dk_sum;      // acc [M, D], or null
  void* dv_sum;      // acc [M, Dv], or null
  void* slot_grads;  // acc [slices, heads of the round, N, 2, K] the dv weight and the score
                     // gradient of each slot

  // CUDA has one round of everything. There, dk_sum [B, H_kv, M, D] and dv_sum [B, H_kv, M, Dv],
  // zero at first, collect by atomic additions what dk and dv are then rounded from; or a second
  // kernel sums over the inverse of the indices, with slot_grads [B, H, N, K, 2].
  const int64_t* key_start;  // [B, H_i, M + 1] where each key's entries begin within its index head
  const int32_t* entries;    // [B, H_i, N * K] inverse of indices: the slots i * K + j that hold a
                             // key, ascending
};

// Streamed softmax attention over the free keys of each row (visible.h); no [N, M] tensor ever
// exists. `rows` are what a task owns a block of, `cols` what it streams: (queries, keys), but in
// the gradient of the keys (keys, queries).
//   weight[r, c] = exp2(rows[r] . cols[c] * scale - (row_shift[r] + col_shift[c]) * log2(e)) *
//   col_weight[c]
// over valid pairs. The queries carry the softmax scale times log2(e), whichever side they are on,
// so that a score is the same number to the last bit in both orientations.
struct DenseParams {
  int64_t B, H, R, C, D, Dv;
  DType dtype;
  Visible visible;        // key_mask is that of `rows` or of `cols`, whichever are the keys
  bool cols_are_queries;  // else rows are
  const void* rows;       // [B, H or fewer heads, R, D]
  int64_t row_stride[3];
  int64_t rows_per_head, cols_per_head;  // heads that share one head of rows / of cols
  double scale;                          // factor of the rows
  const void* cols;                      // [B, H or fewer heads, C, D]
  int64_t col_stride[3];
  const void* col_tiles;  // acc, packed cols, see PackParams
  const void* col_bias;   // acc [B, T * 32] 0 or -inf

  // dense_lse: writes lse. dense_mean: reads the shifts and weights, and sums weight[r, c] *
  // values[c] over the H / H_out heads of each head of out; head h takes the values of head
  // h / (H / H_v). One of H_out and H_v divides the other, both divide H.
  int64_t H_v, H_out;
  void* lse;  // acc [B, H, R] out: log-sum-exp over the row's free columns, -inf if none
  const void* row_shift;   // acc [B, H, R], or null for 0
  const void* col_shift;   // acc [B, H, C], or null for 0
  const void* col_weight;  // acc [B, H_v, C], or null for 1
  const void* values;      // acc [B, H_v, C, Dv] contiguous
  void* out;               // acc [B, H_out, R, Dv] out: sum over heads and columns
};

// The distillation loss on sampled keys with its gradients, see cpu/distill-inl.h. A task takes one
// sketch and a block of `chunk` queries of one segment, of which there are Q =
// visible.queries.num_blocks(chunk). The CPU's only: CUDA composes it of the kernels above.
struct DistillParams {
  GatherParams gather;  // q, k, indices and bias of the target; v, dropout and outputs unused
  Visible visible;
  int64_t H_s, H_ks;
  int64_t S, S_pad;      // S_pad a multiple of kFeaturePad
  int64_t T;             // tiles of keys, visible.keys.blocks_per_batch(kTile)
  const void* q_sketch;  // [B, H_s, N, S]
  int64_t q_sketch_stride[3];
  const void* k_rows;    // acc [B, H_ks, T * 32, S_pad]; zeros in padding and masked keys
  const void* k_tiles;   // acc, packed k_sketch, see PackParams
  const void* key_bias;  // acc [B, T * 32] 0 or -inf
  double sketch_scale;
  const int32_t* valid_before;  // [B, M + 1] valid keys below each in its batch element; or null
                                // where all are valid
  double row_weight;            // of a row and sketch in the loss
  int64_t chunk;

  double* loss_parts;  // [H_s, Q] out
  void* dk_parts;     // acc [H_s, Q, part_keys, S_pad] scratch, or null where no gradient is wanted
  int64_t part_keys;  // keys of the longest sequence, in whole tiles
  void* dq_sketch;    // acc [B, H_s, N, S] out; or null
  void* dk_sketch;    // acc [B, H_ks, M, S] out
};

}  // namespace smartbird
