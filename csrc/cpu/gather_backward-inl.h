// Gradients of gather_attention and gather_scores in two passes without atomics, each parallel over
// what it writes: over queries (dq, dbias, and two numbers per slot), then over keys (dk, dv),
// which read those numbers through the inverse of the indices.
#include "gather-inl.h"
#include "vec.h"

#ifndef SMARTBIRD_GATHER_BACKWARD_INL_H_
#define SMARTBIRD_GATHER_BACKWARD_INL_H_

namespace smartbird::SMARTBIRD_ISA {

// ---- inverse of the indices

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

// ---- pass 1: queries
// -------------------------------------------------------------------------------

template <typename T>
struct QueryGradScratch {
  using A = acc_t<T>;
  GatherLists lists;
  const T** q;     // [lists]
  const T** dout;  // [lists]
  A* weights;      // [lists, slots] first q . k, at the end d out / d v
  A* dlogits;      // [lists, slots] first dout . v
  A* dq;           // [lists, D]
  A* bias;         // [slots] of one list
  A* factors;      // [slots] of one list

  QueryGradScratch(const GatherParams& P, ScratchAllocator& scratch) {
    const int64_t count = gather_queries_per_task(P) * (P.H / P.H_kv),
                  slots = pad_to_vector<A>(P.K);
    lists.allocate(scratch, count, slots);
    q = scratch.take<const T*>(count);
    dout = scratch.take<const T*>(count);
    weights = scratch.take<A>(count * slots);
    dlogits = scratch.take<A>(count * slots);
    dq = scratch.take<A>(count * pad_to_vector<A>(P.D));
    bias = scratch.take<A>(slots);
    factors = scratch.take<A>(slots);
  }
};

// weights (in: q . k) and dlogits (in: dout . v) of one query: weights[j] = p_j f_j and
// dlogits[j] = p_j (f_j dout . v_j - delta + dlse), p the softmax, f_j the dropout factor of slot j
// and delta = sum_j p_j f_j dout . v_j. Returns the number of slots with a gradient.
//
// Neither lse nor out is read: a softmax normalised here sums to 1 and delta is free of the
// rounding of out, so the difference of two nearly equal numbers keeps its digits.
template <typename A>
inline int64_t attention_slot_grads(const GatherBackwardParams& P, GatherRow at, int64_t n,
                                    PhiloxKey dropout_key, A* bias, A* factors, A* weights,
                                    A* dlogits) {
  const GatherParams& F = P.fwd;
  const A largest = finish_logits(F, at, n, bias, weights);
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
    const Vec<A> p = load(weights + j) * normalizer, f = load(factors + j);
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
    const int64_t round_begin = P.slice_begin * (F.H / F.H_kv) * F.N;
    A* slot_grads = static_cast<A*>(P.slot_grads) + (row_number(F, at) - round_begin) * F.K * 2;
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
                                         PhiloxKey dropout_key, QueryGradScratch<T>& scratch) {
  using A = acc_t<T>;
  const GatherParams& F = P.fwd;
  GatherLists& lists = scratch.lists;
  load_lists(F, task, lists, scratch.q);
  const auto k = key_rows<T>(F, task.b, task.h_kv);
  if (F.v) {
    gather_dots(scratch.q, k, lists, scratch.weights);
    if (P.dq || P.dk || P.dbias) {
      task.for_each_row([&](int64_t r, GatherRow at) {
        scratch.dout[r] = static_cast<const T*>(P.dout) + row_number(F, at) * F.Dv;
      });
      gather_dots(scratch.dout, value_rows<T>(F, task.b, task.h_kv), lists, scratch.dlogits);
    } else {
      fill(scratch.dlogits, lists.count * lists.capacity, A{0});
    }
  }

  task.for_each_row([&](int64_t r, GatherRow at) {
    A* weights = scratch.weights + r * lists.capacity;
    A* dlogits = scratch.dlogits + r * lists.capacity;
    int64_t& n = lists.size[r];
    if (F.v)
      n = attention_slot_grads(P, at, n, dropout_key, scratch.bias, scratch.factors, weights,
                               dlogits);
    else
      scores_slot_grads<T>(P, at, n, weights, dlogits);
    store_slot_grads(P, at, n, weights, dlogits);
    n = drop_zeros(dlogits, lists.keys + r * lists.capacity, n);
  });

  if (!P.dq) return;
  gather_accumulate(scratch.dlogits, k, lists, scratch.dq);
  task.for_each_row([&](int64_t r, GatherRow at) {
    store_row(scratch.dq + r * pad_to_vector<A>(F.D), F.D, static_cast<A>(F.scale),
              static_cast<T*>(P.dq) + row_number(F, at) * F.D);
  });
}

inline int64_t gather_backward_queries_num_tasks(const GatherBackwardParams& P) {
  return (P.slice_end - P.slice_begin) * ceil_div(P.fwd.N, gather_queries_per_task(P.fwd));
}

inline void gather_backward_queries(const GatherBackwardParams& P, int64_t task, void* scratch) {
  const PhiloxKey dropout_key = philox_key(P.fwd.seed, P.fwd.offset, kDropoutStream);
  const int64_t first_task = P.slice_begin * ceil_div(P.fwd.N, gather_queries_per_task(P.fwd));
  dispatch_dtype(P.fwd.dtype, [&](auto type) {
    ScratchAllocator allocator(scratch);
    QueryGradScratch<decltype(type)> task_scratch(P.fwd, allocator);
    gather_backward_queries_task(P, GatherTask(P.fwd, first_task + task), dropout_key,
                                 task_scratch);
  });
}

// ---- pass 2: keys
// ----------------------------------------------------------------------------------

constexpr int64_t kRunEntries = 256;  // entries of a run unpacked at once

// Keys of one task, by the rule of gather_queries_per_task: a key has N * K / M entries.
inline int64_t gather_keys_per_task(const GatherParams& P) {
  const int64_t wanted = kReuse * P.M / max_of<int64_t>(P.K, 1);
  return min_of(min_of(max_of(wanted, kMinLists), kMaxLists), max_of<int64_t>(P.M, 1));
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

template <typename T>
struct KeyGradScratch {
  using A = acc_t<T>;
  A* grads;           // [keys, D or Dv]
  int64_t* position;  // [keys] how far a pass over the queries has come
  A* weights;         // [kRunEntries]
  int32_t* queries;   // [kRunEntries]

  KeyGradScratch(const GatherParams& P, ScratchAllocator& scratch) {
    const int64_t keys = gather_keys_per_task(P);
    grads = scratch.take<A>(keys * pad_to_vector<A>(max_of(P.D, P.Dv)));
    position = scratch.take<int64_t>(keys);
    weights = scratch.take<A>(kRunEntries);
    queries = scratch.take<int32_t>(kRunEntries);
  }
};

// The keys [begin, end) of slice b * H_kv + h_kv.
struct KeyBlock {
  int64_t slice, begin, end;
};

// grads[m] += sum over the entries of key m of slot_grad * rows[query of the entry], for one head.
template <typename T>
inline void accumulate_entries(const int64_t* key_start, const int32_t* entries,
                               const acc_t<T>* slot_grads, const Rows<T>& rows, int64_t K,
                               KeyBlock keys, KeyGradScratch<T>& scratch) {
  using A = acc_t<T>;
  const int64_t grad_size = pad_to_vector<A>(rows.size), row_bytes = rows.size * sizeof(T);
  const int64_t gathered = key_start[keys.end] - key_start[keys.begin];
  const int64_t block = rows_per_block(rows.count, row_bytes, gathered);
  const Divisor slots_per_query(K);
  for (int64_t m = keys.begin; m < keys.end; ++m) scratch.position[m - keys.begin] = key_start[m];
  for (int64_t begin = 0; begin < rows.count; begin += block) {
    const int64_t end_slot = begin + block < rows.count ? (begin + block) * K : INT64_MAX;
    for (int64_t m = keys.begin; m < keys.end; ++m) {
      int64_t e = scratch.position[m - keys.begin];
      int64_t n = 0;
      const auto flush = [&] {
        for_each_chunk<A>(rows.size, [&](auto chunk, int64_t d) {
          accumulate_run<decltype(chunk)::value>(scratch.weights, rows, d, scratch.queries, 0, n,
                                                 INT64_MAX,
                                                 scratch.grads + (m - keys.begin) * grad_size);
        });
        n = 0;
      };
      for (; e < key_start[m + 1] && entries[e] < end_slot; ++e) {
        const A weight = slot_grads[2 * static_cast<int64_t>(entries[e])];
        scratch.weights[n] = weight;
        scratch.queries[n] = slots_per_query.quotient(entries[e]);
        n += weight != 0;  // a row of weight zero must not count, NaN or not
        if (n == kRunEntries) flush();
      }
      if (n > 0) flush();
      scratch.position[m - keys.begin] = e;
    }
  }
}

// grad [keys, size] = sum over the heads that share the keys of slot_grads[.., part] * rows of that
// head.
template <typename T, typename HeadRows>
inline void gather_backward_key_block(const GatherBackwardParams& P, KeyBlock keys, int part,
                                      int64_t size, KeyGradScratch<T>& scratch, void* grad,
                                      HeadRows&& head_rows) {
  using A = acc_t<T>;
  const GatherParams& F = P.fwd;
  const int64_t group = F.H / F.H_kv, b = keys.slice / F.H_kv,
                first_head = keys.slice % F.H_kv * group;
  const int64_t padded_size = pad_to_vector<A>(size);
  fill(scratch.grads, (keys.end - keys.begin) * padded_size, A{0});
  for (int64_t h = first_head; h < first_head + group; ++h) {
    const int64_t index_head = b * F.H_i + h / (F.H / F.H_i);
    const A* slot_grads = static_cast<const A*>(P.slot_grads) +
                          (b * F.H + h - P.slice_begin * group) * F.N * F.K * 2 + part;
    accumulate_entries<T>(P.key_start + index_head * (F.M + 1), P.entries + index_head * F.N * F.K,
                          slot_grads, head_rows(b, h), F.K, keys, scratch);
  }
  for (int64_t m = keys.begin; m < keys.end; ++m)
    store_row(scratch.grads + (m - keys.begin) * padded_size, size, A{1},
              static_cast<T*>(grad) + (keys.slice * F.M + m) * size);
}

inline int64_t gather_backward_keys_num_tasks(const GatherBackwardParams& P) {
  return (P.slice_end - P.slice_begin) * ceil_div(P.fwd.M, gather_keys_per_task(P.fwd));
}

// slot_grads, q [H, N, D], dout [H, N, Dv] -> dk [D], dv [Dv] of a block of keys.
inline void gather_backward_keys(const GatherBackwardParams& P, int64_t task, void* scratch) {
  const GatherParams& F = P.fwd;
  const int64_t step = gather_keys_per_task(F), blocks = ceil_div(F.M, step);
  const int64_t begin = task % blocks * step;
  const KeyBlock keys{P.slice_begin + task / blocks, begin, min_of(begin + step, F.M)};
  dispatch_dtype(F.dtype, [&](auto type) {
    using T = decltype(type);
    ScratchAllocator allocator(scratch);
    KeyGradScratch<T> task_scratch(F, allocator);
    if (P.dk)
      gather_backward_key_block(P, keys, 1, F.D, task_scratch, P.dk,
                                [&](int64_t b, int64_t h) { return query_rows<T>(F, b, h); });
    if (P.dv)
      gather_backward_key_block(P, keys, 0, F.Dv, task_scratch, P.dv, [&](int64_t b, int64_t h) {
        const T* dout = static_cast<const T*>(P.dout);
        return Rows<T>{dout + (b * F.H + h) * F.N * F.Dv, F.Dv, F.N, F.Dv};
      });
  });
}

inline int64_t gather_backward_scratch_bytes(const GatherBackwardParams& P) {
  int64_t bytes = 0;
  dispatch_dtype(P.fwd.dtype, [&](auto type) {
    using T = decltype(type);
    ScratchAllocator queries(nullptr), keys(nullptr);
    QueryGradScratch<T>(P.fwd, queries);
    KeyGradScratch<T>(P.fwd, keys);
    bytes = max_of(queries.bytes(), keys.bytes());
  });
  return bytes;
}

}  // namespace smartbird::SMARTBIRD_ISA

#endif  // SMARTBIRD_GATHER_BACKWARD_INL_H_
