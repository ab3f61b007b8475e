// Gradients of gather_attention and gather_scores in two passes without atomics, each parallel over
// what it writes: over queries (dq, dbias, and two numbers per slot), then over keys (dk, dv),
// which read those numbers through the inverse of the indices.
#include "gather-inl.h"
#include "vec.h"

#ifndef SMARTBIRD_GATHER_BACKWARD_INL_H_
#define SMARTBIRD_GATHER_BACKWARD_INL_H_

namespace smartbird::SMARTBIRD_ISA {

// ---- inverse of the indices ---------------------------------------------------------------------

inline int64_t invert_indices_num_tasks(const InvertParams& P) { return P.B * P.H_i; }

inline int64_t invert_indices_scratch_bytes(const InvertParams&) { return 0; }

// indices [N, K] -> key_start [M + 1], entries: the slots of each key, ascending, of one (batch,
// index head).
inline void invert_indices(const InvertParams& P, int64_t task, void*) {
  const int32_t* indices =
      P.indices + task / P.H_i * P.indices_stride[0] + task % P.H_i * P.indices_stride[1];
  int64_t* start = P.key_start + task * (P.M + 1);
  int32_t* entries = P.entries + task * P.N * P.K;
  const auto for_each_key = [&](auto&& f) {
    for (int64_t i = 0; i < P.N; ++i) {
      const int32_t* row = indices + i * P.indices_stride[2];
      for (int64_t j = 0; j < P.K; ++j)
        if (row[j] >= 0 && row[j] < P.M) f(row[j], i * P.K + j);
    }
  };

  for (int64_t m = 0; m <= P.M; ++m) start[m] = 0;
  for_each_key([&](int32_t key, int64_t) { ++start[key + 1]; });
  // start[m + 1] becomes the beginning of key m, and, advanced by each entry placed, its end: the
  // beginning of m + 1.
  int64_t total = 0;
  for (int64_t m = 1; m <= P.M; ++m) {
    const int64_t count = start[m];
    start[m] = total;
    total += count;
  }
  for_each_key(
      [&](int32_t key, int64_t slot) { entries[start[key + 1]++] = static_cast<int32_t>(slot); });
}

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

// Writes what one query gives besides dq: dbias [K] and slot_grads [K, 2], zero from slot n on.
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
    for (int64_t j = 0; j < n; ++j) {
      slot_grads[2 * j] = weights[j];
      slot_grads[2 * j + 1] = dlogits[j] * scale;
    }
    fill(slot_grads + 2 * n, 2 * (F.K - n), A{0});
  }
}

// q [D], k [M, D], v [M, Dv], dout [Dv] -> dq [D], dbias [K], slot_grads [K, 2] of each query.
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

// Entries of a key gathered at once.
constexpr int64_t kListEntries = 256;
// How many entries ahead of its use a slot's gradients are fetched: half a typical key.
constexpr int64_t kSlotGradsAhead = 32;

// Keys of a task. Where heads share a key the task goes through them one by one, so it takes enough
// keys that bringing a head's rows into the cache weighs little.
inline int64_t gather_keys_per_task(const GatherParams& P) {
  const int64_t wanted = P.H == P.H_kv ? kMinLists : kReuse * P.M / max_of<int64_t>(P.K, 1);
  return min_of(max_of(wanted, kMinLists), kMaxLists);
}

// Exact quotients of 0 <= n < 2^31 by a constant without a division.
class Divisor {
 public:
  explicit Divisor(int64_t divisor) {
    while ((int64_t{1} << shift_) < divisor) ++shift_;
    shift_ += 31;
    // With e = multiplier * divisor - 2^shift < divisor <= 2^(shift - 31), the error n * e /
    // 2^shift is below 1.
    multiplier_ = ((uint64_t{1} << shift_) + static_cast<uint64_t>(divisor) - 1) /
                  static_cast<uint64_t>(divisor);
  }
  int32_t quotient(int32_t n) const {
    return static_cast<int32_t>(static_cast<uint64_t>(n) * multiplier_ >> shift_);
  }

 private:
  int shift_ = 0;
  uint64_t multiplier_;
};

// What one gradient of a key is summed from: the weights and the queries they belong to.
template <typename A>
struct EntryList {
  A* weights;        // [kListEntries]
  int32_t* queries;  // [kListEntries]
  int64_t size;

  void allocate(ScratchAllocator& scratch) {
    weights = scratch.take<A>(kListEntries);
    queries = scratch.take<int32_t>(kListEntries + kPrefetchAhead);
  }
  // The next one overwrites an entry of weight zero: its row must not count, NaN or not.
  void append(A weight, int32_t query) {
    weights[size] = weight;
    queries[size] = query;
    size += weight != 0;
  }
};

template <typename A>
struct KeyGradScratch {
  A* dk;  // [keys, D]
  A* dv;  // [keys, Dv]
  EntryList<A> dk_list, dv_list;

  KeyGradScratch(const GatherParams& P, ScratchAllocator& scratch) {
    const int64_t keys = gather_keys_per_task(P);
    dk = scratch.take<A>(keys * pad_to_vector<A>(P.D));
    dv = scratch.take<A>(keys * pad_to_vector<A>(P.Dv));
    dk_list.allocate(scratch);
    dv_list.allocate(scratch);
  }
};

// The keys [begin, end) of slice b * H_kv + h_kv.
struct KeyBlock {
  int64_t slice, begin, end;
};

// dk[m] += score gradient * q[query] and dv[m] += weight * dout[query] over the entries of each key
// m of a block, for one head.
template <typename T>
inline void accumulate_entries(const GatherBackwardParams& P, KeyBlock keys, int64_t h,
                               KeyGradScratch<acc_t<T>>& scratch) {
  using A = acc_t<T>;
  const GatherParams& F = P.fwd;
  const int64_t b = keys.slice / F.H_kv, head = b * F.H + h,
                index_head = b * F.H_i + h / (F.H / F.H_i);
  const int64_t* key_start = P.key_start + index_head * (F.M + 1);
  const int32_t* entries = P.entries + index_head * F.N * F.K;
  const A* slot_grads = slot_grads_at<A>(P, {b, h, 0});
  const auto q = head_rows<T>(F.q, F.q_stride, b, h, F.D);
  const Rows<T> dout{static_cast<const T*>(P.dout) + head * F.N * F.Dv, F.Dv, F.Dv};
  const int64_t D = pad_to_vector<A>(F.D), Dv = pad_to_vector<A>(F.Dv),
                last = key_start[keys.end] - 1;
  const Divisor slots_per_query(F.K);
  EntryList<A>&dk_list = scratch.dk_list, &dv_list = scratch.dv_list;

  for (int64_t m = keys.begin; m < keys.end; ++m) {
    for (int64_t begin = key_start[m]; begin < key_start[m + 1]; begin += kListEntries) {
      const int64_t end = min_of(begin + kListEntries, key_start[m + 1]);
      dk_list.size = dv_list.size = 0;
      for (int64_t e = begin; e < end; ++e) {
        __builtin_prefetch(slot_grads + 2 * int64_t{entries[min_of(e + kSlotGradsAhead, last)]});
        const A* slot_grad = slot_grads + 2 * int64_t{entries[e]};
        const int32_t query = slots_per_query.quotient(entries[e]);
        dv_list.append(slot_grad[0], query);
        dk_list.append(slot_grad[1], query);
      }
      if (P.dk)
        gather_accumulate(dk_list.weights, q, dk_list.queries, dk_list.size,
                          scratch.dk + (m - keys.begin) * D);
      if (P.dv)
        gather_accumulate(dv_list.weights, dout, dv_list.queries, dv_list.size,
                          scratch.dv + (m - keys.begin) * Dv);
    }
  }
}

// Loads (where there is something to add to) or clears the sums of a block's keys; rows of
// `sum` [M, size] are not padded, those of `x` are.
template <typename A>
inline void begin_sums(const void* sum, KeyBlock keys, int64_t size, A* x) {
  const int64_t padded = pad_to_vector<A>(size);
  fill(x, (keys.end - keys.begin) * padded, A{0});
  if (sum == nullptr) return;
  for (int64_t m = keys.begin; m < keys.end; ++m)
    std::memcpy(x + (m - keys.begin) * padded, static_cast<const A*>(sum) + m * size,
                static_cast<size_t>(size) * sizeof(A));
}

// The sums of a block's keys to the rows [first + begin, first + end) of out [., size].
template <typename T>
inline void store_sums(const acc_t<T>* x, KeyBlock keys, int64_t size, int64_t first, void* out) {
  using A = acc_t<T>;
  for (int64_t m = keys.begin; m < keys.end; ++m)
    store_row(x + (m - keys.begin) * pad_to_vector<A>(size), size, A{1},
              static_cast<T*>(out) + (first + m) * size);
}

// q [H, N, D], dout [H, N, Dv], slot_grads -> dk [D], dv [Dv] of each key, summed over the heads
// that share it.
template <typename T>
inline void gather_backward_keys_task(const GatherBackwardParams& P, KeyBlock keys,
                                      KeyGradScratch<acc_t<T>>& scratch) {
  using A = acc_t<T>;
  const GatherParams& F = P.fwd;
  const int64_t group = heads_per_slice(F), first_head = keys.slice % F.H_kv * group;
  const bool is_first = P.head_begin == 0, is_last = P.head_end == group;
  begin_sums(is_first ? nullptr : P.dk_sum, keys, F.D, scratch.dk);
  begin_sums(is_first ? nullptr : P.dv_sum, keys, F.Dv, scratch.dv);
  for (int64_t h = first_head + P.head_begin; h < first_head + P.head_end; ++h)
    accumulate_entries<T>(P, keys, h, scratch);
  if (is_last) {
    if (P.dk) store_sums<T>(scratch.dk, keys, F.D, keys.slice * F.M, P.dk);
    if (P.dv) store_sums<T>(scratch.dv, keys, F.Dv, keys.slice * F.M, P.dv);
  } else {
    if (P.dk) store_sums<A>(scratch.dk, keys, F.D, 0, P.dk_sum);
    if (P.dv) store_sums<A>(scratch.dv, keys, F.Dv, 0, P.dv_sum);
  }
}

inline int64_t gather_backward_keys_num_tasks(const GatherBackwardParams& P) {
  return (P.slice_end - P.slice_begin) * ceil_div(P.fwd.M, gather_keys_per_task(P.fwd));
}

inline void gather_backward_keys(const GatherBackwardParams& P, int64_t task, void* scratch) {
  const GatherParams& F = P.fwd;
  const int64_t step = gather_keys_per_task(F), blocks = ceil_div(F.M, step);
  const int64_t begin = task % blocks * step;
  const KeyBlock keys{P.slice_begin + task / blocks, begin, min_of(begin + step, F.M)};
  dispatch_dtype(F.dtype, [&](auto type) {
    using T = decltype(type);
    ScratchAllocator allocator(scratch);
    KeyGradScratch<acc_t<T>> task_scratch(F, allocator);
    fill(task_scratch.dk_list.queries, kListEntries + kPrefetchAhead, 0);
    fill(task_scratch.dv_list.queries, kListEntries + kPrefetchAhead, 0);
    gather_backward_keys_task<T>(P, keys, task_scratch);
  });
}

inline int64_t gather_backward_scratch_bytes(const GatherBackwardParams& P) {
  int64_t bytes = 0;
  dispatch_dtype(P.fwd.dtype, [&](auto type) {
    using T = decltype(type);
    ScratchAllocator queries(nullptr), keys(nullptr);
    QueryGradScratch<acc_t<T>>(P, queries);
    KeyGradScratch<acc_t<T>>(P.fwd, keys);
    bytes = max_of(queries.bytes(), keys.bytes());
  });
  return bytes;
}

}  // namespace smartbird::SMARTBIRD_ISA

#endif  // SMARTBIRD_GATHER_BACKWARD_INL_H_
