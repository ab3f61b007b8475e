// Softmax attention over all valid keys, streamed: no [N, M] tensor ever exists. The sketch's
// log-sum-exp and its gradients, and the dense target of distillation, are all made of these two
// kernels.
//
// Scores are in units of log(2), log2(e) being part of the scale, so that a weight is a bare exp2.
#include "score-inl.h"

#ifndef SMARTBIRD_DENSE_INL_H_
#define SMARTBIRD_DENSE_INL_H_

namespace smartbird::SMARTBIRD_ISA {
namespace dense {

constexpr double kLn2 = 0.6931471805599453;

// Rows per call of score_tile: with two vectors of columns each, as many accumulators as leave room
// for the operands in 32 (AVX-512) or 16 registers.
constexpr int kScoreRows = SMARTBIRD_VEC_BYTES == 64 ? 8 : 6;
// Rows that are scored, then summed, together: their product with one vector of values has as many
// accumulators.
constexpr int kGroup = 2 * kScoreRows;
// Rows of one task, 32 or 36: a tile of columns, streamed from L2, is scored against all of them,
// and their weights for it (some 4 KiB of float) stay in L1 beside the tile.
constexpr int kRows = (kTile + kGroup - 1) / kGroup * kGroup;

template <typename A>
constexpr A kInf = static_cast<A>(__builtin_inf());

// What a task works on: kRows rows of one sequence, of all heads. Rows and columns are counted from
// the first of the sequence.
template <typename A>
struct RowBlock {
  Sequence sequence;
  int64_t b, first, count;       // rows [first, first + count)
  int64_t first_row, first_col;  // of the sequence within its batch element
  int64_t num_cols, first_tile;  // its columns, and the tile that they begin at
  Span visible[kRows];           // the columns a row may see; empty where it takes no part
  Span hole[kRows];              // those of them that its window takes
  Span seen;                     // hull of `visible`

  A* scores;  // [kGroup, 32] of one group and tile
  A* weight;  // [kRows, 32] summed over heads, of one tile
  A* values;  // [32, padded Dv] values * col_weight of one tile; zeros where a column takes no part
  A* out;     // [kRows, padded Dv]
  A* shift;   // [H, kRows] -row_shift * log2(e)
  A* rows;    // [H, kRows, D] times scale; zeros where a row takes no part
};

// One head's columns [first, first + 32).
template <typename A>
struct ColumnTile {
  int64_t first;
  const A* features;           // [D, 32]
  alignas(64) A bias[kTile];   // 0, or -inf where a column takes no part
  alignas(64) A shift[kTile];  // -col_shift * log2(e)
  bool complete;               // all 32 take part
};

template <typename A>
inline int64_t padded_values(const DenseParams& p) {
  return ceil_div(p.Dv, kLanes<A>) * kLanes<A>;
}

template <typename A>
inline int64_t scratch_elements(const DenseParams& p) {
  return p.H * kRows * (p.D + 1) + (kGroup + kRows) * kTile + (kRows + kTile) * padded_values<A>(p);
}

// ---- rows ---------------------------------------------------------------------------------------

// The columns that row r may see, as far as masks allow: those of the result outside `hole`.
inline Span free_columns(const DenseParams& p, const Sequence& sequence, int64_t r, Span* hole) {
  if (p.cols_are_queries) return free_queries(p.visible, sequence, r, hole);
  return free_keys(p.visible, sequence, position_of(p.visible, sequence, r), hole);
}

// Writes -row_shift of every head; false where row i of the block takes no part in any.
template <typename A>
inline bool load_shift(const DenseParams& p, int64_t i, RowBlock<A>* block) {
  const int64_t r = block->first_row + block->first + i;
  const uint8_t* mask = p.cols_are_queries ? p.visible.key_mask : nullptr;
  const bool exists = i < block->count && (mask == nullptr || mask[block->b * p.R + r]);
  bool takes_part = false;
  for (int64_t h = 0; h < p.H; ++h) {
    A shift = exists ? A{0} : -kInf<A>;
    if (exists && p.row_shift != nullptr)
      shift = static_cast<const A*>(p.row_shift)[(block->b * p.H + h) * p.R + r];
    const bool part = shift != -kInf<A>;
    block->shift[h * kRows + i] = part ? -shift * static_cast<A>(kLog2e) : shift;
    takes_part |= part;
  }
  return takes_part;
}

inline const Segments& row_segments(const DenseParams& p) {
  return p.cols_are_queries ? p.visible.keys : p.visible.queries;
}

inline const Segments& col_segments(const DenseParams& p) {
  return p.cols_are_queries ? p.visible.queries : p.visible.keys;
}

template <typename T, typename A = acc_t<T>>
inline RowBlock<A> load_rows(const DenseParams& p, int64_t task, void* scratch) {
  const SegmentBlock range = segment_block(row_segments(p), kRows, task);
  RowBlock<A> block;
  block.sequence = sequence_at(p.visible, range.segment);
  const Sequence& sequence = block.sequence;
  block.b = sequence.batch;
  block.first = range.begin;
  block.count = max_of<int64_t>(0, range.end - range.begin);
  block.first_row = p.cols_are_queries ? sequence.first_key : sequence.first_query;
  block.first_col = p.cols_are_queries ? sequence.first_query : sequence.first_key;
  block.num_cols = p.cols_are_queries ? sequence.num_queries : sequence.num_keys;
  block.first_tile = col_segments(p).first_block(range.segment, kTile);
  block.scores = static_cast<A*>(scratch);  // what vectors load comes first: aligned
  block.weight = block.scores + kGroup * kTile;
  block.values = block.weight + kRows * kTile;
  block.out = block.values + kTile * padded_values<A>(p);
  block.shift = block.out + kRows * padded_values<A>(p);
  block.rows = block.shift + p.H * kRows;

  block.seen = {block.num_cols, 0};
  for (int64_t i = 0; i < kRows; ++i) {
    const int64_t r = block.first_row + block.first + i;
    block.visible[i] = block.hole[i] = Span{0, 0};
    if (load_shift(p, i, &block))
      block.visible[i] = free_columns(p, sequence, block.first + i, &block.hole[i]);
    const bool sees = block.visible[i].begin < block.visible[i].end;
    if (sees) {
      block.seen.begin = min_of(block.seen.begin, block.visible[i].begin);
      block.seen.end = max_of(block.seen.end, block.visible[i].end);
    }
    const T* x = static_cast<const T*>(p.rows) + block.b * p.row_stride[0] + r * p.row_stride[2];
    for (int64_t h = 0; h < p.H; ++h) {
      const T* head = x + h / p.rows_per_head * p.row_stride[1];
      A* row = block.rows + (h * kRows + i) * p.D;
      const bool used = sees && block.shift[h * kRows + i] != -kInf<A>;
      for (int64_t d = 0; d < p.D; ++d)
        row[d] = used ? static_cast<A>(static_cast<double>(to_acc(head[d])) * p.scale) : A{0};
    }
  }
  return block;
}

// ---- columns ------------------------------------------------------------------------------------

template <typename A>
inline ColumnTile<A> load_columns(const DenseParams& p, const RowBlock<A>& block, int64_t h,
                                  int64_t t) {
  const int64_t tiles = col_segments(p).blocks_per_batch(kTile), heads = p.H / p.cols_per_head;
  const int64_t b = block.b, at = block.first_tile + t, column = block.first_col + t * kTile;
  ColumnTile<A> tile;
  tile.first = t * kTile;
  tile.features = static_cast<const A*>(p.col_tiles) +
                  ((b * heads + h / p.cols_per_head) * tiles + at) * p.D * kTile;
  const A* bias = static_cast<const A*>(p.col_bias) + (b * tiles + at) * kTile;
  for (int64_t c = 0; c < kTile; ++c) {
    tile.bias[c] = bias[c];
    tile.shift[c] = 0;
  }
  if (p.col_shift != nullptr) {
    const int64_t n = min_of(kTile, block.num_cols - tile.first);
    const A* shift = static_cast<const A*>(p.col_shift) + (b * p.H + h) * p.C + column;
    for (int64_t c = 0; c < n; ++c) {
      if (tile.bias[c] != 0 || shift[c] == -kInf<A>)
        tile.bias[c] = -kInf<A>;
      else
        tile.shift[c] = -shift[c] * static_cast<A>(kLog2e);
    }
  }
  tile.complete = true;
  for (int c = 0; c < kTile; c += kLanes<A>)
    tile.complete &= !any_greater(Vec<A>{}, load(tile.bias + c));
  return tile;
}

// Head h_v of the values, of the columns of a tile.
template <typename A>
inline void load_values(const DenseParams& p, const ColumnTile<A>& tile, int64_t h_v,
                        const bool* takes_part, RowBlock<A>* block) {
  const int64_t ld = padded_values<A>(p);
  for (int64_t c = 0; c < kTile; ++c) {
    const int64_t column = (block->b * p.H_v + h_v) * p.C + block->first_col + tile.first + c;
    A* row = block->values + c * ld;
    for (int64_t d = 0; d < ld; ++d) row[d] = 0;
    if (!takes_part[c]) continue;
    const A weight = p.col_weight == nullptr ? A{1} : static_cast<const A*>(p.col_weight)[column];
    const A* values = static_cast<const A*>(p.values) + column * p.Dv;
    for (int64_t d = 0; d < p.Dv; ++d) row[d] = weight * values[d];
  }
}

// ---- scores -------------------------------------------------------------------------------------

// Whether any row of the group that begins at row `group` of the block sees a column of the tile.
template <typename A>
inline bool sees_any(const RowBlock<A>& block, int64_t group, const ColumnTile<A>& tile) {
  for (int64_t i = group; i < group + kGroup; ++i)
    if (block.visible[i].begin < tile.first + kTile && block.visible[i].end > tile.first)
      return true;
  return false;
}

template <typename A>
inline bool sees_all(const RowBlock<A>& block, int64_t group, const ColumnTile<A>& tile) {
  if (!tile.complete) return false;
  const int64_t end = tile.first + kTile;
  for (int64_t i = group; i < group + kGroup; ++i) {
    const Span& visible = block.visible[i];
    const Span& hole = block.hole[i];
    if (visible.begin > tile.first || visible.end < end) return false;
    if (hole.begin < hole.end && hole.begin < end && hole.end > tile.first) return false;
  }
  return true;
}

// block->scores[i, c] = score of row group + i and column c of the tile, for the rows of the group;
// -inf where the pair is not valid, whatever the features hold.
template <typename A>
inline void score_group(int64_t h, int64_t group, int64_t D, const ColumnTile<A>& tile,
                        RowBlock<A>* block) {
  for (int64_t i = group; i < group + kGroup; i += kScoreRows) {
    A* scores = block->scores + (i - group) * kTile;
    score_tile<kScoreRows>(block->rows + (h * kRows + i) * D, D, tile.features, D, tile.bias,
                           [&](int r, int c, Vec<A> x) { store(scores + r * kTile + c, x); });
  }
  if (sees_all(*block, group, tile)) return;
  for (int64_t i = group; i < group + kGroup; ++i) {
    const A begin = static_cast<A>(block->visible[i].begin - tile.first);
    const A end = static_cast<A>(block->visible[i].end - tile.first);
    const A hole = static_cast<A>(block->hole[i].begin - tile.first);
    const A after = static_cast<A>(block->hole[i].end - tile.first);
    for (int c = 0; c < kTile; c += kLanes<A>) {
      const Vec<A> column = iota<A>() + static_cast<A>(c);
      const auto valid = (column >= begin) & (column < end) &
                         ((column < hole) | (column >= after)) & (load(tile.bias + c) > -kInf<A>);
      A* scores = block->scores + (i - group) * kTile + c;
      store(scores, valid ? load(scores) : broadcast(-kInf<A>));
    }
  }
}

// ---- products -----------------------------------------------------------------------------------

// out[r, :] += weight[r, :] . values for R rows and V vectors of values; R x V accumulators.
template <int R, int V, typename A>
inline void add_product(const A* __restrict weight, const A* __restrict values, int64_t ld,
                        A* __restrict out) {
  constexpr int L = kLanes<A>;
  Vec<A> acc[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) acc[r][v] = load(out + r * ld + v * L);
  for (int64_t c = 0; c < kTile; ++c) {
    Vec<A> x[V];
    for (int v = 0; v < V; ++v) x[v] = load(values + c * ld + v * L);
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) acc[r][v] += x[v] * weight[r * kTile + c];
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) store(out + r * ld + v * L, acc[r][v]);
}

// The same for a whole group.
template <typename A>
inline void add_group_product(const A* weight, const A* values, int64_t ld, A* out) {
  constexpr int L = kLanes<A>;
  int64_t d = 0;
  for (; d + 2 * L <= ld; d += 2 * L)
    for (int r = 0; r < kGroup; r += kScoreRows)
      add_product<kScoreRows, 2>(weight + r * kTile, values + d, ld, out + r * ld + d);
  if (d < ld) add_product<kGroup, 1>(weight, values + d, ld, out + d);
}

// ---- kernels ------------------------------------------------------------------------------------

// How far, in units of log(2), a score may lie above the reference of its row before that moves:
// 2^60 times the number of columns is far from overflow, and a reference moves about once.
constexpr int kHeadroom = 60;

template <typename A>
constexpr A kLowest = std::is_same_v<A, double> ? -__DBL_MAX__ : -__FLT_MAX__;

// A row's running sum of 2^(score - reference), by lane.
template <typename A>
struct Sum {
  A reference = kLowest<A>;
  A ceiling = kLowest<A>;  // the reference moves when a score exceeds it
  Vec<A> lanes{};
};

// Adds a row's 32 scores to its sum.
template <typename A>
inline void add_scores(const A* scores, Sum<A>* sum) {
  constexpr int L = kLanes<A>;
  Vec<A> top = load(scores);
  for (int c = L; c < kTile; c += L) top = max(load(scores + c), top);
  if (any_greater(top, broadcast(sum->ceiling))) {
    const A reference = reduce_max(top);
    sum->lanes *= exp2(broadcast(sum->reference - reference));
    sum->reference = reference;
    sum->ceiling = reference + kHeadroom;
  }
  Vec<A> lanes = sum->lanes;
  for (int c = 0; c < kTile; c += L) lanes += exp2(load(scores + c) - sum->reference);
  sum->lanes = lanes;
}

template <typename T, typename A = acc_t<T>>
inline void lse_task(const DenseParams& p, int64_t task, void* scratch) {
  RowBlock<A> block = load_rows<T>(p, task, scratch);
  for (int64_t h = 0; h < p.H; ++h) {
    Sum<A> sums[kRows];
    for (int64_t t = block.seen.begin / kTile; t * kTile < block.seen.end; ++t) {
      const ColumnTile<A> tile = load_columns<A>(p, block, h, t);
      for (int64_t group = 0; group < kRows; group += kGroup) {
        if (!sees_any(block, group, tile)) continue;
        score_group(h, group, p.D, tile, &block);
        for (int64_t i = group; i < group + kGroup; ++i)
          add_scores(block.scores + (i - group) * kTile, &sums[i]);
      }
    }
    A* lse = static_cast<A*>(p.lse) + (block.b * p.H + h) * p.R + block.first_row + block.first;
    for (int64_t i = 0; i < block.count; ++i) {
      const double sum = reduce_add(sums[i].lanes);
      // The reference itself counts 1: a sum of 0 had no column.
      lse[i] =
          sum == 0 ? -kInf<A> : static_cast<A>((sums[i].reference + __builtin_log2(sum)) * kLn2);
    }
  }
}

// block->weight[i, c] becomes, or where it is not the first head that is summed gains,
// 2^(score - shifts).
template <typename A>
inline void add_weights(int64_t h, int64_t group, bool is_first, const ColumnTile<A>& tile,
                        RowBlock<A>* block) {
  for (int64_t i = group; i < group + kGroup; ++i) {
    const A shift = block->shift[h * kRows + i];
    const A* scores = block->scores + (i - group) * kTile;
    A* weight = block->weight + i * kTile;
    for (int c = 0; c < kTile; c += kLanes<A>) {
      const Vec<A> w = exp2(load(scores + c) + (load(tile.shift + c) + shift));
      store(weight + c, is_first ? w : load(weight + c) + w);
    }
  }
}

// block->out += what the heads [begin, end), which share values, give of column tile t.
template <typename A>
inline void add_tile(const DenseParams& p, int64_t t, int64_t begin, int64_t end,
                     RowBlock<A>* block) {
  const int64_t ld = padded_values<A>(p);
  ColumnTile<A> tile;
  bool takes_part[kTile] = {};
  for (int64_t h = begin; h < end; ++h) {
    tile = load_columns<A>(p, *block, h, t);
    for (int64_t c = 0; c < kTile; ++c) takes_part[c] |= tile.bias[c] != -kInf<A>;
    for (int64_t group = 0; group < kRows; group += kGroup) {
      if (!sees_any(*block, group, tile)) continue;
      score_group(h, group, p.D, tile, block);
      add_weights(h, group, h == begin, tile, block);
    }
  }
  load_values(p, tile, begin / (p.H / p.H_v), takes_part, block);
  for (int64_t group = 0; group < kRows; group += kGroup)
    if (sees_any(*block, group, tile))
      add_group_product(block->weight + group * kTile, block->values, ld, block->out + group * ld);
}

template <typename T, typename A = acc_t<T>>
inline void mean_task(const DenseParams& p, int64_t task, void* scratch) {
  RowBlock<A> block = load_rows<T>(p, task, scratch);
  const int64_t ld = padded_values<A>(p), out_heads = p.H / p.H_out,
                shared = p.H / max_of(p.H_v, p.H_out);  // heads with one head of values and of out
  for (int64_t h_out = 0; h_out < p.H_out; ++h_out) {
    for (int64_t i = 0; i < kRows * ld; ++i) block.out[i] = 0;
    for (int64_t t = block.seen.begin / kTile; t * kTile < block.seen.end; ++t)
      for (int64_t h = h_out * out_heads; h < (h_out + 1) * out_heads; h += shared)
        add_tile(p, t, h, h + shared, &block);
    A* out = static_cast<A*>(p.out) +
             ((block.b * p.H_out + h_out) * p.R + block.first_row + block.first) * p.Dv;
    for (int64_t i = 0; i < block.count; ++i) {
      const bool sees = block.visible[i].begin < block.visible[i].end;
      for (int64_t d = 0; d < p.Dv; ++d) out[i * p.Dv + d] = sees ? block.out[i * ld + d] : A{0};
    }
  }
}

}  // namespace dense

inline int64_t dense_num_tasks(const DenseParams& p) {
  return dense::row_segments(p).num_blocks(dense::kRows);
}

inline int64_t dense_scratch_bytes(const DenseParams& p) {
  return p.dtype == DType::kFloat64
             ? dense::scratch_elements<double>(p) * static_cast<int64_t>(sizeof(double))
             : dense::scratch_elements<float>(p) * static_cast<int64_t>(sizeof(float));
}

// rows [B, H, R, D], cols [B, H, C, D] -> lse [B, H, R]: log of the sum over valid columns of
// exp(rows . cols * scale).
inline void dense_lse(const DenseParams& p, int64_t task, void* scratch) {
  dispatch_dtype(p.dtype, [&](auto t) { dense::lse_task<decltype(t)>(p, task, scratch); });
}

// rows [B, H, R, D], cols [B, H, C, D], values [B, H_v, C, Dv] -> out [B, H_out, R, Dv]: the sum
// over heads and free columns of exp(rows . cols * scale - row_shift - col_shift) * col_weight *
// values.
inline void dense_mean(const DenseParams& p, int64_t task, void* scratch) {
  dispatch_dtype(p.dtype, [&](auto t) { dense::mean_task<decltype(t)>(p, task, scratch); });
}

}  // namespace smartbird::SMARTBIRD_ISA

#endif  // SMARTBIRD_DENSE_INL_H_
