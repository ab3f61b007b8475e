// The distillation loss on sampled keys and its gradients, in one pass over the queries:
//   loss = sum_i (mass_i lse_i - sum_j t_ij s_ij),  s_ij = q_sketch_i . k_sketch_j * sketch_scale,
// lse_i over the free keys of the row (visible.h), t_ij the mean over the sketch's heads of the
// softmax over each head's own entries that are free keys, mass_i = sum_j t_ij (1 unless heads have
// no such entry). With p_i the softmax of s_i,
//   dq_i = sketch_scale sum_j (mass_i p_ij - t_ij) k_j,
//   dk_j = sketch_scale sum_i (mass_i p_ij - t_ij) q_i.
//
// The loss is a scalar, so its gradients are made while t and p are at hand, and only scaled later:
// t and the scores of all pairs are made once. Scores are kept for a few rows at a time, their
// exponentials made twice, for the sum of a row and then for p.
//
// A task takes a chunk of queries of one sequence and sketch and sums dk in a buffer of its own;
// the number of chunks depends on sizes alone, and a second kernel adds the buffers in order, so
// results do not depend on threads. Queries and keys are counted from the first of the sequence.
#include "dense-inl.h"
#include "gather-inl.h"

#ifndef SMARTBIRD_DISTILL_INL_H_
#define SMARTBIRD_DISTILL_INL_H_

namespace smartbird::SMARTBIRD_ISA {
namespace distill {

// Queries whose scores are made together: with two vectors of features, as many accumulators as
// fit.
constexpr int kRows = SMARTBIRD_VEC_BYTES == 64 ? 8 : 4;
constexpr int64_t kKeysPerReduceTask = 256;

// Feature vectors handled at once: f(integral_constant V, d) for pieces of V vectors from d on.
template <typename A, typename F>
SMARTBIRD_INLINE void for_each_piece(int64_t size, F&& f) {
  constexpr int L = kLanes<A>;
  int64_t d = 0;
  for (; d + 2 * L <= size; d += 2 * L) f(std::integral_constant<int, 2>{}, d);
  for (; d < size; d += L) f(std::integral_constant<int, 1>{}, d);
}

template <typename A>
struct Scratch {
  A* query;     // [chunk, S_pad] sketches; zeros where a row has no free key
  A* scaled;    // [kRows, S] of the rows at hand, times sketch_scale * log2(e)
  A* expected;  // [chunk, S_pad] sum_j t_ij k_j
  A* mass;      // [chunk]
  // Of the lists of one head, kMaxSlots at most.
  int32_t* free;  // [lists, K] of the indices those that are free keys of their row, else -1
  int32_t* keys;  // [lists, capacity]
  A* weights;     // [lists, capacity]
  int64_t* size;  // [lists]
  bool* is_full;  // [lists]
  A* bias;        // [capacity] of one list
  // Of the rows at hand.
  A* scores;  // [kRows, part_keys]
  A* tile;    // [kRows, 32] mass_i p_ij of one tile
  A* sums;    // [kRows, S_pad] sum_j mass_i p_ij k_j

  int64_t lists, capacity;

  Scratch(const DistillParams& P, ScratchAllocator& arena) {
    capacity = pad_to_vector<A>(P.gather.K);
    lists = min_of(P.chunk, max_of<int64_t>(1, kMaxSlots / capacity));
    query = arena.take<A>(P.chunk * P.S_pad);
    scaled = arena.take<A>(kRows * P.S);
    expected = arena.take<A>(P.chunk * P.S_pad);
    mass = arena.take<A>(P.chunk);
    free = arena.take<int32_t>(lists * P.gather.K);
    keys = arena.take<int32_t>(lists * capacity + kPrefetchAhead);
    weights = arena.take<A>(lists * capacity);
    size = arena.take<int64_t>(lists);
    is_full = arena.take<bool>(lists);
    bias = arena.take<A>(capacity);
    scores = arena.take<A>(kRows * P.part_keys);
    tile = arena.take<A>(kRows * kTile);
    sums = arena.take<A>(kRows * P.S_pad);
  }
};

// The queries [begin, end) of a sequence, for one sketch.
struct Chunk {
  const Sequence* sequence;
  int64_t sketch, begin, end;

  int64_t batch() const { return sequence->batch; }
  int64_t row(int64_t i) const { return sequence->first_query + i; }
  Chunk part(int64_t from, int64_t to) const { return {sequence, sketch, from, to}; }
};

// The free keys of query i: those of the result outside `hole` that the mask allows.
inline Span free_keys(const DistillParams& P, const Sequence& sequence, int64_t i, Span* hole) {
  return free_keys(P.visible, sequence, position_of(P.visible, sequence, i), hole);
}

inline bool has_free_key(const DistillParams& P, const Sequence& sequence, int64_t i) {
  return has_free_key(P.visible, sequence, i, P.valid_before);
}

// k_rows or k_tiles of the sequence and sketch at hand: `size` numbers per key.
template <typename A>
inline const A* sketch_keys(const DistillParams& P, Chunk at, const void* keys, int64_t size) {
  const int64_t head = at.batch() * P.H_ks + at.sketch / (P.H_s / P.H_ks);
  const int64_t tile = head * P.T + P.visible.keys.first_block(at.sequence->segment, kTile);
  return static_cast<const A*>(keys) + tile * kTile * size;
}

template <typename T>
inline void load_queries(const DistillParams& P, Chunk at, Scratch<acc_t<T>>* s) {
  using A = acc_t<T>;
  const auto rows = head_rows<T>(P.q_sketch, P.q_sketch_stride, at.batch(), at.sketch, P.S);
  for (int64_t i = at.begin; i < at.end; ++i) {
    A* query = s->query + (i - at.begin) * P.S_pad;
    fill(query, P.S_pad, A{0});
    if (!has_free_key(P, *at.sequence, i)) continue;
    const T* x = rows[at.row(i)];
    for (int64_t d = 0; d < P.S; ++d) query[d] = to_acc(x[d]);
  }
}

// ---- the target ---------------------------------------------------------------------------------

// expected += sum_j weights[j] * k[keys[j]] and dk[keys[j]] -= weights[j] * query over j < n, V
// vectors of features from each pointer on; rows are `ld` long.
template <int V, typename A>
inline void scatter(const A* __restrict weights, const int32_t* __restrict keys, int64_t n,
                    const A* __restrict k, const A* __restrict query, int64_t ld,
                    A* __restrict expected, A* dk) {
  constexpr int L = kLanes<A>;
  Vec<A> q[V], sum[2][V] = {};
  for (int v = 0; v < V; ++v) {
    q[v] = load(query + v * L);
    sum[0][v] = load(expected + v * L);
  }
  const auto add = [&](Vec<A>* to, int64_t j) __attribute__((always_inline)) {
    const int64_t row = keys[j] * ld;
    for (int v = 0; v < V; ++v) {
      to[v] += load(k + row + v * L) * weights[j];
      if (dk != nullptr) store(dk + row + v * L, load(dk + row + v * L) - q[v] * weights[j]);
    }
  };
  int64_t j = 0;
  for (; j + 2 <= n; j += 2) {  // two sums hide the latency of FMA
    add(sum[0], j);
    add(sum[1], j + 1);
  }
  if (j < n) add(sum[0], j);
  for (int v = 0; v < V; ++v) store(expected + v * L, sum[0][v] + sum[1][v]);
}

// The indices of head h that are free keys of their rows.
inline void keep_free(const DistillParams& P, Chunk at, int64_t h, int32_t* kept) {
  const GatherParams& G = P.gather;
  const Sequence& sequence = *at.sequence;
  const uint8_t* mask = mask_of(P.visible, sequence, P.visible.key_mask);
  const int32_t first = static_cast<int32_t>(sequence.first_key);
  uint32_t out_of_range = 0;
  for (int64_t i = at.begin; i < at.end; ++i, kept += G.K) {
    const int32_t* indices = row_indices(G, {at.batch(), h, at.row(i)});
    Span span;
    const Span keys = free_keys(P, sequence, i, &span);
    const auto end = static_cast<int32_t>(keys.end);
    const auto hole = static_cast<int32_t>(span.begin), after = static_cast<int32_t>(span.end);
    for (int64_t j = 0; j < G.K; ++j) {
      const int32_t index = indices[j], key = index - first;
      out_of_range |= static_cast<uint32_t>(index) + 1 > static_cast<uint32_t>(G.M);
      const bool is_free = (key >= 0) & (key < end) & ((key < hole) | (key >= after));
      kept[j] = is_free ? index : -1;
    }
    for (int64_t j = 0; j < G.K && mask != nullptr; ++j)
      if (kept[j] >= 0 && !mask[kept[j] - first]) kept[j] = -1;
  }
  if (out_of_range)
    __atomic_store_n(G.error, static_cast<int32_t>(kIndexOutOfRange), __ATOMIC_RELAXED);
}

// expected, mass and the part of dk that t gives, of the queries of `at` and the sketch's heads.
template <typename T>
inline void add_targets(const DistillParams& P, Chunk at, acc_t<T>* dk, Scratch<acc_t<T>>* s,
                        int64_t first_row) {
  using A = acc_t<T>;
  const int64_t lists = at.end - at.begin, heads = P.gather.H / P.H_s,
                index_group = P.gather.H / P.gather.H_i;
  const int32_t first_key = static_cast<int32_t>(at.sequence->first_key);
  const A share = A{1} / static_cast<A>(heads);
  const A* k_sketch = sketch_keys<A>(P, at, P.k_rows, P.S_pad);
  GatherParams G = P.gather;  // of these lists alone
  G.row_begin = at.row(at.begin);
  G.indices = s->free;
  G.indices_stride[0] = G.indices_stride[1] = 0;
  G.indices_stride[2] = G.K;
  if (G.bias != nullptr) G.bias = static_cast<const A*>(G.bias) + G.row_begin * G.bias_stride[2];
  for (int64_t h = at.sketch * heads; h < (at.sketch + 1) * heads; ++h) {
    if (h == at.sketch * heads || h % index_group == 0) keep_free(P, at, h, s->free);
    for (int64_t r = 0; r < lists; ++r)
      s->size[r] = load_keys(G, {at.batch(), h, G.row_begin + r}, s->capacity,
                             s->keys + r * s->capacity, s->is_full + r);
    fill(s->keys + lists * s->capacity, kPrefetchAhead, 0);

    const auto q = head_rows<T>(G.q, G.q_stride, at.batch(), h, G.D);
    const auto k = head_rows<T>(G.k, G.k_stride, at.batch(), h / heads_per_slice(G), G.D);
    for (int64_t r = 0; r < lists; ++r)
      gather_dots(q[G.row_begin + r], k, s->keys + r * s->capacity, s->size[r],
                  s->weights + r * s->capacity);

    for (int64_t r = 0; r < lists; ++r) {
      A* weights = s->weights + r * s->capacity;
      int32_t* keys = s->keys + r * s->capacity;
      int64_t& n = s->size[r];
      const A largest =
          finish_logits(G, {at.batch(), h, G.row_begin + r}, n, s->is_full[r], s->bias, weights);
      if (largest == -static_cast<A>(__builtin_inff())) {
        n = 0;
        continue;
      }
      const A factor = share / exp_and_sum(weights, n, largest);
      for (int64_t j = 0; j < n; j += kLanes<A>) store(weights + j, load(weights + j) * factor);
      s->mass[first_row + r] += share;
      n = drop_zeros(weights, keys, n);
      for (int64_t j = 0; j < n; ++j) keys[j] -= first_key;
    }

    for (int64_t r = 0; r < lists; ++r) {
      const int64_t row = (first_row + r) * P.S_pad;
      for_each_piece<A>(P.S_pad, [&](auto vectors, int64_t d) {
        scatter<decltype(vectors)::value>(s->weights + r * s->capacity, s->keys + r * s->capacity,
                                          s->size[r], k_sketch + d, s->query + row + d, P.S_pad,
                                          s->expected + row + d, dk == nullptr ? nullptr : dk + d);
      });
    }
  }
}

// ---- the softmax over the free keys -------------------------------------------------------------

// dk[c, :] += sum_r weight[r, c] * query[r, :] for R queries, 32 keys and V vectors of features.
template <int R, int V, typename A>
inline void add_transposed(const A* __restrict weight, const A* __restrict query, int64_t ld,
                           A* __restrict dk) {
  constexpr int L = kLanes<A>;
  Vec<A> q[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) q[r][v] = load(query + r * ld + v * L);
  for (int64_t c = 0; c < kTile; ++c) {
    Vec<A> sum[V];
    for (int v = 0; v < V; ++v) sum[v] = load(dk + c * ld + v * L);
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) sum[v] += q[r][v] * weight[r * kTile + c];
    for (int v = 0; v < V; ++v) store(dk + c * ld + v * L, sum[v]);
  }
}

// Scores of kRows queries, of which `at` holds those that exist, and their sums, in units of
// log(2); -inf where a key is not free.
template <typename A>
inline void score_rows(const DistillParams& P, Chunk at, int64_t tiles, Scratch<A>* s,
                       dense::Sum<A>* sums) {
  const A none = -static_cast<A>(__builtin_inff());
  const A* k_tiles = sketch_keys<A>(P, at, P.k_tiles, P.S);
  const A* key_bias =
      static_cast<const A*>(P.key_bias) +
      (at.batch() * P.T + P.visible.keys.first_block(at.sequence->segment, kTile)) * kTile;
  Span keys[kRows], hole[kRows];
  for (int64_t r = 0; r < at.end - at.begin; ++r)
    keys[r] = free_keys(P, *at.sequence, at.begin + r, &hole[r]);
  for (int64_t t = 0; t < tiles; ++t) {
    A* scores = s->scores + t * kTile;
    score_tile<kRows>(s->scaled, P.S, k_tiles + t * kTile * P.S, P.S, key_bias + t * kTile,
                      [&](int r, int c, Vec<A> x) { store(scores + r * P.part_keys + c, x); });
    for (int64_t r = 0; r < at.end - at.begin; ++r) {
      A* row = s->scores + r * P.part_keys;
      const int64_t begin = t * kTile, end = begin + kTile;
      for (int64_t j = max_of(keys[r].end, begin); j < end; ++j) row[j] = none;
      for (int64_t j = max_of(hole[r].begin, begin); j < min_of(hole[r].end, end); ++j)
        row[j] = none;
      dense::add_scores(row + begin, &sums[r]);
    }
  }
}

// Of at most kRows queries: what p gives to dq and dk; returns their loss. `query`, `expected` and
// `mass` are theirs.
template <typename A>
inline double add_rows(const DistillParams& P, Chunk at, const A* query, const A* expected,
                       const A* mass, A* dk, Scratch<A>* s) {
  constexpr int L = kLanes<A>;
  const int64_t count = at.end - at.begin, stride = P.part_keys, S_pad = P.S_pad;
  int64_t limit = 0;
  for (int64_t i = at.begin; i < at.end; ++i) {
    Span hole;
    limit = max_of(limit, free_keys(P, *at.sequence, i, &hole).end);
  }
  const int64_t tiles = ceil_div(limit, kTile);
  const A scale = static_cast<A>(P.sketch_scale * kLog2e);
  for (int64_t r = 0; r < kRows; ++r)
    for (int64_t d = 0; d < P.S; ++d)
      s->scaled[r * P.S + d] = r < count ? query[r * S_pad + d] * scale : A{0};
  dense::Sum<A> sums[kRows];
  score_rows(P, at, tiles, s, sums);

  double loss = 0;
  A factor[kRows] = {};
  for (int64_t r = 0; r < count; ++r) {
    if (!has_free_key(P, *at.sequence, at.begin + r)) continue;
    const double sum = static_cast<double>(reduce_add(sums[r].lanes));
    const double lse = (static_cast<double>(sums[r].reference) + __builtin_log2(sum)) * dense::kLn2;
    // With the very queries that the scores are made with: the loss is a difference of large
    // numbers.
    double agreement = 0;
    for (int64_t d = 0; d < P.S; ++d)
      agreement += static_cast<double>(s->scaled[r * P.S + d]) *
                   static_cast<double>(expected[r * S_pad + d]);
    loss += static_cast<double>(mass[r]) * lse - agreement * dense::kLn2;
    factor[r] = static_cast<A>(static_cast<double>(mass[r]) / sum);
  }
  if (P.dq_sketch == nullptr) return loss;

  const A* k_rows = sketch_keys<A>(P, at, P.k_rows, S_pad);
  fill(s->sums, kRows * S_pad, A{0});
  fill(s->tile, kRows * kTile, A{0});
  for (int64_t t = 0; t < tiles; ++t) {
    for (int64_t r = 0; r < count; ++r)
      for (int64_t c = 0; c < kTile; c += L)
        store(s->tile + r * kTile + c,
              exp2(load(s->scores + r * stride + t * kTile + c) - sums[r].reference) * factor[r]);
    const int64_t first = t * kTile * S_pad;
    for_each_piece<A>(S_pad, [&](auto vectors, int64_t d) {
      constexpr int V = decltype(vectors)::value;
      dense::add_product<kRows, V>(s->tile, k_rows + first + d, S_pad, s->sums + d);
      // A chunk's last rows may be fewer: their weights are zero, their queries not to be read.
      if (count == kRows)
        add_transposed<kRows, V>(s->tile, query + d, S_pad, dk + first + d);
      else
        for (int64_t r = 0; r < count; ++r)
          add_transposed<1, V>(s->tile + r * kTile, query + r * S_pad + d, S_pad, dk + first + d);
    });
  }
  const A out_scale = static_cast<A>(P.sketch_scale * P.row_weight);
  for (int64_t r = 0; r < count; ++r) {
    A* dq = static_cast<A*>(P.dq_sketch) +
            ((at.batch() * P.H_s + at.sketch) * P.gather.N + at.row(at.begin + r)) * P.S;
    for (int64_t d = 0; d < P.S; ++d)
      dq[d] = (s->sums[r * S_pad + d] - expected[r * S_pad + d]) * out_scale;
  }
  return loss;
}

template <typename T>
inline void task(const DistillParams& P, int64_t index, void* memory) {
  using A = acc_t<T>;
  const int64_t blocks = P.visible.queries.num_blocks(P.chunk);
  const SegmentBlock block = segment_block(P.visible.queries, P.chunk, index % blocks);
  P.loss_parts[index] = 0;
  const Sequence sequence = sequence_at(P.visible, block.segment);
  const Chunk whole{&sequence, index / blocks, block.begin, block.end};
  if (whole.begin >= whole.end) return;
  ScratchAllocator arena(memory);
  Scratch<A> s(P, arena);
  A* dk = nullptr;
  if (P.dk_parts != nullptr) {
    dk = static_cast<A*>(P.dk_parts) + index * P.part_keys * P.S_pad;
    fill(dk, ceil_div(sequence.num_keys, kTile) * kTile * P.S_pad, A{0});
  }
  load_queries<T>(P, whole, &s);
  fill(s.expected, P.chunk * P.S_pad, A{0});
  fill(s.mass, P.chunk, A{0});
  for (int64_t i = whole.begin; i < whole.end; i += s.lists)
    add_targets<T>(P, whole.part(i, min_of(i + s.lists, whole.end)), dk, &s, i - whole.begin);
  double loss = 0;
  for (int64_t i = whole.begin; i < whole.end; i += kRows) {
    const int64_t r = i - whole.begin;
    loss += add_rows(P, whole.part(i, min_of<int64_t>(i + kRows, whole.end)), s.query + r * P.S_pad,
                     s.expected + r * P.S_pad, s.mass + r, dk, &s);
  }
  P.loss_parts[index] = loss * P.row_weight;
}

// The number of tasks that reduce one head of keys.
inline int64_t reduce_blocks(const DistillParams& P) {
  return P.visible.keys.num_blocks(kKeysPerReduceTask);
}

template <typename A>
inline void reduce_task(const DistillParams& P, int64_t index) {
  const SegmentBlock block =
      segment_block(P.visible.keys, kKeysPerReduceTask, index % reduce_blocks(P));
  const Sequence sequence = sequence_at(P.visible, block.segment);
  const int64_t k_head = index / reduce_blocks(P), shared = P.H_s / P.H_ks;
  const int64_t first = P.visible.queries.block_number(block.segment, P.chunk),
                chunks = ceil_div(sequence.num_queries, P.chunk),
                blocks = P.visible.queries.num_blocks(P.chunk);
  const uint8_t* mask = mask_of(P.visible, sequence, P.visible.key_mask);
  const A scale = static_cast<A>(P.sketch_scale * P.row_weight);
  for (int64_t m = block.begin; m < block.end; ++m) {
    A* out = static_cast<A*>(P.dk_sketch) +
             ((sequence.batch * P.H_ks + k_head) * P.gather.M + sequence.first_key + m) * P.S;
    fill(out, P.S, A{0});
    if (!sequence.exists || (mask != nullptr && !mask[m])) continue;
    for (int64_t sketch = k_head * shared; sketch < (k_head + 1) * shared; ++sketch)
      for (int64_t c = 0; c < chunks; ++c) {
        const A* part = static_cast<const A*>(P.dk_parts) +
                        ((sketch * blocks + first + c) * P.part_keys + m) * P.S_pad;
        for (int64_t d = 0; d < P.S; ++d) out[d] += part[d];
      }
    for (int64_t d = 0; d < P.S; ++d) out[d] *= scale;
  }
}

}  // namespace distill

inline int64_t distill_num_tasks(const DistillParams& P) {
  return P.H_s * P.visible.queries.num_blocks(P.chunk);
}

inline int64_t distill_scratch_bytes(const DistillParams& P) {
  int64_t bytes = 0;
  dispatch_dtype(P.gather.dtype, [&](auto type) {
    ScratchAllocator arena(nullptr);
    distill::Scratch<acc_t<decltype(type)>>(P, arena);
    bytes = arena.bytes();
  });
  return bytes;
}

inline void distill_queries(const DistillParams& P, int64_t task, void* scratch) {
  dispatch_dtype(P.gather.dtype,
                 [&](auto type) { distill::task<decltype(type)>(P, task, scratch); });
}

inline int64_t distill_reduce_num_tasks(const DistillParams& P) {
  return P.H_ks * distill::reduce_blocks(P);
}

inline int64_t distill_reduce_scratch_bytes(const DistillParams&) { return 0; }

// dk_parts [H_s, Q, part_keys, S_pad] -> dk_sketch [B, H_ks, M, S].
inline void distill_reduce(const DistillParams& P, int64_t task, void*) {
  P.gather.dtype == DType::kFloat64 ? distill::reduce_task<double>(P, task)
                                    : distill::reduce_task<float>(P, task);
}

}  // namespace smartbird::SMARTBIRD_ISA

#endif  // SMARTBIRD_DISTILL_INL_H_
