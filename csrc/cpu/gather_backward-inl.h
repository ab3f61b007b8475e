// Gradients of gather_attention and gather_scores in two passes without atomics, each parallel over
// what it writes: over queries (dq, dbias, and two numbers per slot), then over features of keys
// (dk, dv), to which all queries add, in order, by those numbers.
#include "gather-inl.h"
#include "vec.h"

#ifndef SMARTBIRD_GATHER_BACKWARD_INL_H_
#define SMARTBIRD_GATHER_BACKWARD_INL_H_

namespace smartbird::SMARTBIRD_ISA {

// ---- pass 1: queries ----------------------------------------------------------------------------

template <typename A>
struct QueryGradScratch {
  GatherLists lists;
  A* weights;  // [lists, capacity] first q . k, at the end d out / d v
  A* dlogits;  // [lists, capacity] first dout . v
  A* bias;     // [capacity] of one list
  A* factors;  // [capacity] of one list
  A* dq;       // [heads that share a list, D]

  QueryGradScratch(const GatherBackwardParams& P, ScratchAllocator& scratch) {
    const int64_t count = lists.allocate<A>(P.fwd, P.head_end - P.head_begin, scratch);
    weights = scratch.take<A>(count * lists.capacity);
    dlogits = scratch.take<A>(count * lists.capacity);
    bias = scratch.take<A>(lists.capacity);
    factors = scratch.take<A>(lists.capacity);
    dq = scratch.take<A>(heads_per_list(P.fwd) * pad_to_vector<A>(P.fwd.D));
  }
};

// Of one query or, with at.i = 0, of a head: where its slot gradients begin.
template <typename A>
inline A* slot_grads_at(const GatherBackwardParams& P, GatherRow at) {
  const GatherParams& F = P.fwd;
  const int64_t group = heads_per_slice(F), slice = at.b * F.H_kv + at.h / group;
  const int64_t head =
      (slice - P.slice_begin) * (P.head_end - P.head_begin) + at.h % group - P.head_begin;
  return static_cast<A*>(P.slot_grads) + (head * F.N + at.i) * F.K * 2;
}

// weights (in: q . k) and dlogits (in: dout . v) of one query: weights[j] = p_j f_j and
// dlogits[j] = p_j (f_j dout . v_j - delta + dlse), p the softmax, f_j the dropout factor of slot j
// and delta = sum_j p_j f_j dout . v_j. Returns the number of slots with a gradient.
//
// Neither lse nor out is read: a softmax normalised here sums to 1 and delta is free of the
// rounding of out, so the difference of two nearly equal numbers keeps its digits.
template <typename A>
inline int64_t attention_slot_grads(const GatherBackwardParams& P, GatherRow at, int64_t n,
                                    bool is_full, PhiloxKey dropout_key, A* bias, A* factors,
                                    A* weights, A* dlogits) {
  const GatherParams& F = P.fwd;
  const A largest = finish_logits(F, at, n, is_full, bias, weights);
  if (largest == -static_cast<A>(__builtin_inff())) return 0;
  const A normalizer = 1 / exp_and_sum(weights, n, largest);
  if (F.dropout_p > 0)
    dropout_factors(F, at, dropout_key, n, factors);
  else
    fill(factors, n, A{1});
  fill(factors + n, pad_to_vector<A>(n) - n, A{0});

  const Vec<A> zero{};
  Vec<A> delta{};
  for (int64_t j = 0; j < n; j += kLanes<A>) {
    // Exactly 0 in slots without a key, also where the row's normalizer is NaN.
    const Vec<A> w = load(weights + j), p = w == zero ? zero : w * normalizer;
    const Vec<A> f = load(factors + j);
    // The gradient of p; zero times a value row of inf or NaN stays zero.
    const Vec<A> dp = p * f == zero ? zero : f * load(dlogits + j);
    store(weights + j, p);
    store(dlogits + j, dp);
    delta += p * dp;
  }
  const A dlse = P.dlse ? static_cast<const A*>(P.dlse)[row_number(F, at)] : A{0};
  const A shift = dlse - reduce_add(delta);
  for (int64_t j = 0; j < n; j += kLanes<A>) {
    const Vec<A> p = load(weights + j);
    store(dlogits + j, p * (load(dlogits + j) + shift));
    store(weights + j, p * load(factors + j));
  }
  return n;
}

// gather_scores: dlogits[j] = dout[j] in slots that hold a key, and no gradient of values.
template <typename T>
inline void scores_slot_grads(const GatherBackwardParams& P, GatherRow at, int64_t n,
                              acc_t<T>* weights, acc_t<T>* dlogits) {
  const T* dout = static_cast<const T*>(P.dout) + row_number(P.fwd, at) * P.fwd.K;
  const int32_t* indices = row_indices(P.fwd, at);
  for (int64_t j = 0; j < n; ++j) {
    const bool holds_key = static_cast<uint32_t>(indices[j]) < static_cast<uint32_t>(P.fwd.M);
    weights[j] = 0;
    dlogits[j] = holds_key ? to_acc(dout[j]) : acc_t<T>{0};
  }
}

// Writes what one query gives besides dq: dbias [K] and slot_grads [2, K], zero from slot n on.
template <typename A>
inline void store_slot_grads(const GatherBackwardParams& P, GatherRow at, int64_t n,
                             const A* weights, const A* dlogits) {
  const GatherParams& F = P.fwd;
  if (P.dbias) {
    A* dbias = static_cast<A*>(P.dbias) + row_number(F, at) * F.K;
    for (int64_t j = 0; j < n; ++j) dbias[j] = dlogits[j];
    fill(dbias + n, F.K - n, A{0});
  }
  if (P.dk || P.dv) {
    const A scale = static_cast<A>(F.scale);
    A* slot_grads = slot_grads_at<A>(P, at);
    for (int64_t j = 0; j < n; ++j) slot_grads[j] = weights[j];
    for (int64_t j = 0; j < n; ++j) slot_grads[F.K + j] = dlogits[j] * scale;
    fill(slot_grads + n, F.K - n, A{0});
    fill(slot_grads + F.K + n, F.K - n, A{0});
  }
}

// q [D], k [M, D], v [M, Dv], dout [Dv] -> dq [D], dbias [K], slot_grads [2, K] of each query.
template <typename T>
inline void gather_backward_queries_task(const GatherBackwardParams& P, const GatherTask& task,
                                         PhiloxKey dropout_key,
                                         QueryGradScratch<acc_t<T>>& scratch) {
  using A = acc_t<T>;
  const GatherParams& F = P.fwd;
  GatherLists& lists = scratch.lists;
  lists.load(F, task);
  if (F.Dv > 0) {
    score_keys<T>(F, task, lists, scratch.weights);
    const bool need_dlogits = P.dq || P.dk || P.dbias;
    const auto v = head_rows<T>(F.v, F.v_stride, task.b, task.h_kv, F.Dv);
    const auto dout = [&](GatherRow at) {
      return static_cast<const T*>(P.dout) + row_number(F, at) * F.Dv;
    };
    if (need_dlogits)
      gather_all_dots(F, task, lists, v, dout, scratch.dlogits);
    else
      fill(scratch.dlogits, task.heads * task.queries * lists.capacity, A{0});
  }

  task.for_each_row([&](int64_t r, GatherRow at) {
    A* weights = scratch.weights + r * lists.capacity;
    A* dlogits = scratch.dlogits + r * lists.capacity;
    int64_t& n = lists.size[r];
    if (F.Dv > 0)
      n = attention_slot_grads(P, at, n, lists.is_full[r], dropout_key, scratch.bias,
                               scratch.factors, weights, dlogits);
    else
      scores_slot_grads<T>(P, at, n, weights, dlogits);
    store_slot_grads(P, at, n, weights, dlogits);
    n = drop_zeros(dlogits, lists.keys + r * lists.capacity, n);
  });

  if (!P.dq) return;
  const auto k = head_rows<T>(F.k, F.k_stride, task.b, task.h_kv, F.D);
  gather_all_sums(F, task, lists, k, scratch.dlogits, scratch.dq,
                  [&](int64_t, GatherRow at, const A* sum) {
                    store_row(sum, F.D, static_cast<A>(F.scale),
                              static_cast<T*>(P.dq) + row_number(F, at) * F.D);
                  });
}

inline int64_t gather_backward_query_blocks(const GatherBackwardParams& P) {
  return ceil_div(P.fwd.N, gather_queries_per_task(P.fwd, P.head_end - P.head_begin));
}

inline int64_t gather_backward_queries_num_tasks(const GatherBackwardParams& P) {
  return (P.slice_end - P.slice_begin) * gather_backward_query_blocks(P);
}

inline void gather_backward_queries(const GatherBackwardParams& P, int64_t task, void* scratch) {
  const PhiloxKey dropout_key = philox_key(P.fwd.seed, P.fwd.offset, kDropoutStream);
  const GatherTask at(P.fwd, P.slice_begin * gather_backward_query_blocks(P) + task, P.head_begin,
                      P.head_end);
  dispatch_dtype(P.fwd.dtype, [&](auto type) {
    using T = decltype(type);
    ScratchAllocator allocator(scratch);
    QueryGradScratch<acc_t<T>> task_scratch(P, allocator);
    gather_backward_queries_task<T>(P, at, dropout_key, task_scratch);
  });
}

// ---- pass 2: keys -------------------------------------------------------------------------------

// A task sums some features of all keys of a slice. A query adds to keys in no order, so their sums
// stay within the second cache, of which this is a half, up to 8192 keys: beyond, a line of each
// key is more ...
constexpr int64_t kSumBytes = int64_t{512} << 10;
// ... and what a query adds stays in registers: so many cache lines of a row.
constexpr int64_t kLineBytes = 64, kMaxLines = 2;

// How many queries ahead of its use a row is fetched.
constexpr int64_t kRowsAhead = 4;

// The gradient of the keys or of the values of a slice: sums of rows of q or of dout.
struct KeySums {
  bool of_values;
  int64_t size;     // D or Dv
  const void* sum;  // acc [M, size] of earlier rounds, or null
  void* out;        // acc [M, size] in rounds before the last, else [B, H_kv, M, size]
};

template <typename A>
inline int64_t features_per_task(const GatherParams& P) {
  const int64_t lines = kSumBytes / (max_of<int64_t>(P.M, 1) * kLineBytes);
  return min_of(max_of<int64_t>(lines, 1), kMaxLines) * kLineBytes /
         static_cast<int64_t>(sizeof(A));
}

// sums[keys[j]] [V vectors] += weights[g][j] * x[g] over the heads g and the slots j < n that hold
// a key. An entry of weight zero must not count where skip_zeros says that a row is not finite.
template <int G, int V, bool skip_zeros, typename A>
SMARTBIRD_INLINE void add_to_keys(const A* const (&weights)[G], const Vec<A> (&x)[G][V],
                                  const int32_t* keys, int64_t n, int64_t M, A* sums) {
  constexpr int L = kLanes<A>;
  const A* w[G];  // copies, which a store to sums cannot change
  Vec<A> row[G][V];
  for (int g = 0; g < G; ++g) w[g] = weights[g];
  for (int g = 0; g < G; ++g)
    for (int v = 0; v < V; ++v) row[g][v] = x[g][v];
  for (int64_t j = 0; j < n; ++j) {
    if (static_cast<uint32_t>(keys[j]) >= static_cast<uint32_t>(M)) continue;
    if (skip_zeros && w[0][j] == 0) continue;
    A* sum = sums + int64_t{keys[j]} * V * L;
    Vec<A> total[V];
    for (int v = 0; v < V; ++v) total[v] = load(sum + v * L);
    for (int g = 0; g < G; ++g)
      for (int v = 0; v < V; ++v) total[v] += row[g][v] * w[g][j];
    for (int v = 0; v < V; ++v) store(sum + v * L, total[v]);
  }
}

// What query i of G heads that share a list adds to the features [d, d + V vectors) of its keys.
template <int G, int V, typename T>
SMARTBIRD_INLINE void add_query(const GatherBackwardParams& P, const KeySums& which, GatherRow at,
                                int64_t d, acc_t<T>* sums) {
  using A = acc_t<T>;
  constexpr int L = kLanes<A>;
  const GatherParams& F = P.fwd;
  const A* weights[G];
  Vec<A> x[G][V], not_finite{};
  for (int g = 0; g < G; ++g) {
    const GatherRow row{at.b, at.h + g, at.i};
    weights[g] = slot_grads_at<A>(P, row) + (which.of_values ? 0 : F.K);
    const Rows<T> rows =
        which.of_values
            ? Rows<T>{static_cast<const T*>(P.dout) + (at.b * F.H + row.h) * F.N * F.Dv, F.Dv, F.Dv}
            : head_rows<T>(F.q, F.q_stride, row.b, row.h, F.D);
    const T *from = rows[at.i] + d, *later = rows[min_of(at.i + kRowsAhead, F.N - 1)] + d;
    for (int v = 0; v < V; ++v) {
      const int64_t left = which.size - d - v * L;
      x[g][v] =
          left >= L ? load(from + v * L) : (left > 0 ? load_partial(from + v * L, left) : Vec<A>{});
      if (left > 0) __builtin_prefetch(later + v * L);
      not_finite += x[g][v] - x[g][v];
    }
  }
  const int32_t* keys = row_indices(F, at);
  if (reduce_add(not_finite) == 0) {
    add_to_keys<G, V, false>(weights, x, keys, F.K, F.M, sums);
  } else {
    for (int g = 0; g < G; ++g) {
      const A* const one_weight[1] = {weights[g]};
      Vec<A> one[1][V];
      for (int v = 0; v < V; ++v) one[0][v] = x[g][v];
      add_to_keys<1, V, true>(one_weight, one, keys, F.K, F.M, sums);
    }
  }
}

// q [H, N, D], dout [H, N, Dv], slot_grads -> the features [d, d + V vectors) of dk or dv of all
// keys of a slice, summed over the heads of the round.
template <int V, typename T>
inline void sum_keys(const GatherBackwardParams& P, const KeySums& which, int64_t slice, int64_t d,
                     acc_t<T>* sums) {
  using A = acc_t<T>;
  constexpr int64_t width = V * kLanes<A>;
  const GatherParams& F = P.fwd;
  const int64_t features = min_of(width, which.size - d), sharing = F.H / F.H_i,
                first_head = slice % F.H_kv * heads_per_slice(F), end = first_head + P.head_end;
  fill(sums, F.M * width, A{0});
  if (which.sum)
    for (int64_t m = 0; m < F.M; ++m)
      std::memcpy(sums + m * width, static_cast<const A*>(which.sum) + m * which.size + d,
                  static_cast<size_t>(features) * sizeof(A));
  for (int64_t i = 0; i < F.N; ++i)
    for (int64_t h = first_head + P.head_begin; h < end;) {
      const GatherRow at{slice / F.H_kv, h, i};
      const int64_t sharing_end = min_of(end, (h / sharing + 1) * sharing),
                    together = min_of<int64_t>(sharing_end - h, kTogether<A>);
      dispatch_heads<A>(together, [&](auto heads) {
        add_query<decltype(heads)::value, V, T>(P, which, at, d, sums);
      });
      h += together;
    }
  const bool is_last = P.head_end == heads_per_slice(F);
  for (int64_t m = 0; m < F.M; ++m) {
    if (is_last)
      store_row(sums + m * width, features, A{1},
                static_cast<T*>(which.out) + (slice * F.M + m) * which.size + d);
    else
      store_row(sums + m * width, features, A{1}, static_cast<A*>(which.out) + m * which.size + d);
  }
}

// Tasks of one slice: pieces of dk, then of dv.
template <typename A>
inline int64_t key_pieces(const GatherBackwardParams& P, bool of_values) {
  if ((of_values ? P.dv : P.dk) == nullptr) return 0;
  return ceil_div(of_values ? P.fwd.Dv : P.fwd.D, features_per_task<A>(P.fwd));
}

inline int64_t gather_backward_keys_num_tasks(const GatherBackwardParams& P) {
  int64_t pieces = 0;
  dispatch_dtype(P.fwd.dtype, [&](auto type) {
    using A = acc_t<decltype(type)>;
    pieces = key_pieces<A>(P, false) + key_pieces<A>(P, true);
  });
  return (P.slice_end - P.slice_begin) * pieces;
}

inline void gather_backward_keys(const GatherBackwardParams& P, int64_t task, void* scratch) {
  const GatherParams& F = P.fwd;
  dispatch_dtype(F.dtype, [&](auto type) {
    using T = decltype(type);
    using A = acc_t<T>;
    constexpr int L = kLanes<A>, line = kLineBytes / static_cast<int>(sizeof(A)) / L;
    const int64_t of_keys = key_pieces<A>(P, false), pieces = of_keys + key_pieces<A>(P, true),
                  piece = task % pieces, slice = P.slice_begin + task / pieces;
    const bool of_values = piece >= of_keys, is_first = P.head_begin == 0,
               is_last = P.head_end == heads_per_slice(F);
    void* const sum = of_values ? P.dv_sum : P.dk_sum;
    const KeySums which{of_values, of_values ? F.Dv : F.D, is_first ? nullptr : sum,
                        is_last ? (of_values ? P.dv : P.dk) : sum};
    const int64_t width = features_per_task<A>(F), d = (piece - (of_values ? of_keys : 0)) * width;
    A* sums = static_cast<A*>(scratch);
    if (min_of(width, which.size - d) > line * L)
      sum_keys<kMaxLines * line, T>(P, which, slice, d, sums);
    else
      sum_keys<line, T>(P, which, slice, d, sums);
  });
}

inline int64_t gather_backward_scratch_bytes(const GatherBackwardParams& P) {
  int64_t bytes = 0;
  dispatch_dtype(P.fwd.dtype, [&](auto type) {
    using T = decltype(type);
    using A = acc_t<T>;
    ScratchAllocator queries(nullptr), keys(nullptr);
    QueryGradScratch<A>(P, queries);
    keys.take<A>(P.fwd.M * features_per_task<A>(P.fwd));
    bytes = max_of(queries.bytes(), keys.bytes());
  });
  return bytes;
}

}  // namespace smartbird::SMARTBIRD_ISA

#endif  // SMARTBIRD_GATHER_BACKWARD_INL_H_
