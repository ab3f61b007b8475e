// Gradients of gather_attention and gather_scores in two passes without atomics, each parallel over
// what it writes: over queries (dq, dbias, and two numbers per slot), then over keys (dk, dv),
// which read those numbers through the inverse of the indices.
#include "gather-inl.h"
#include "vec.h"

#ifndef SMARTBIRD_GATHER_BACKWARD_INL_H_
#define SMARTBIRD_GATHER_BACKWARD_INL_H_

namespace smartbird::SMARTBIRD_ISA {

// ---- inverse of the indices
// ----------------------------------------------------------------------------------------

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
// -----------------------------------------------------------------------------------------------

template <typename A>
struct QueryGradScratch {
  A* q;        // [D]
  A* dq;       // [D]
  A* dout;     // [Dv]
  A* weights;  // [K] d out / d v
  A* dlogits;  // [K]
  A* factors;  // [K]
  GatherSlots<A> slots;

  QueryGradScratch(const GatherParams& P, ScratchAllocator& scratch) {
    q = scratch.take<A>(pad_to_vector<A>(P.D));
    dq = scratch.take<A>(pad_to_vector<A>(P.D));
    dout = scratch.take<A>(pad_to_vector<A>(P.Dv));
    weights = scratch.take<A>(pad_to_vector<A>(P.K));
    dlogits = scratch.take<A>(pad_to_vector<A>(P.K));
    factors = scratch.take<A>(pad_to_vector<A>(P.K));
    slots.allocate(scratch, P.K);
  }
};

// weights[j] = p_j f_j and dlogits[j] = p_j (f_j dout . v_j - delta + dlse), p the softmax, f_j the
// dropout factor of slot j and delta = sum_j p_j f_j dout . v_j. Returns the number of slots with a
// gradient.
//
// Neither lse nor out is read: a softmax normalised here sums to 1 and delta is free of the
// rounding of out, so the difference of two nearly equal numbers keeps its digits.
template <typename T>
inline int64_t attention_slot_grads(const GatherBackwardParams& P, GatherRow at,
                                    PhiloxKey dropout_key, QueryGradScratch<acc_t<T>>& scratch) {
  using A = acc_t<T>;
  const GatherParams& F = P.fwd;
  const int64_t row = (at.b * F.H + at.h) * F.N + at.i, h_kv = at.h / (F.H / F.H_kv),
                n = scratch.slots.size;
  if (n == 0) return 0;
  A* weights = scratch.weights;
  A* dlogits = scratch.dlogits;

  load_row(head_rows<T>(F.q, F.q_stride, at.b, at.h, F.D)[at.i], F.D, scratch.q);
  const auto k = head_rows<T>(F.k, F.k_stride, at.b, h_kv, F.D);
  const A largest = gather_logits(F, scratch.q, k, scratch.slots, weights);
  if (largest == -static_cast<A>(__builtin_inff())) return 0;
  const A normalizer = 1 / exp_and_sum(weights, n, largest);
  for (int64_t j = 0; j < n; ++j) weights[j] *= normalizer;
  if (F.dropout_p > 0)
    dropout_factors(F, at, dropout_key, n, scratch.factors);
  else
    for (int64_t j = 0; j < n; ++j) scratch.factors[j] = 1;

  const bool need_dlogits = P.dq || P.dk || P.dbias;
  const Vec<A> zero{};
  if (need_dlogits) {
    load_row(static_cast<const T*>(P.dout) + row * F.Dv, F.Dv, scratch.dout);
    gather_dots(scratch.dout, head_rows<T>(F.v, F.v_stride, at.b, h_kv, F.Dv), scratch.slots.keys,
                n, dlogits);
    // dlogits becomes the gradient of p; zero times a value row of inf or NaN stays zero.
    Vec<A> delta{};
    for (int64_t j = 0; j < n; j += kLanes<A>) {
      const Vec<A> p = load(weights + j), f = load(scratch.factors + j);
      const Vec<A> dp = p * f == zero ? zero : f * load(dlogits + j);
      store(dlogits + j, dp);
      delta += p * dp;
    }
    const A dlse = P.dlse ? static_cast<const A*>(P.dlse)[row] : A{0};
    const A shift = dlse - reduce_add(delta);
    for (int64_t j = 0; j < n; j += kLanes<A>)
      store(dlogits + j, load(weights + j) * (load(dlogits + j) + shift));
  }
  for (int64_t j = 0; j < n; ++j) weights[j] *= scratch.factors[j];
  return n;
}

// gather_scores: dlogits[j] = dout[j] in slots that hold a key. Returns the number of slots with a
// gradient.
template <typename T>
inline int64_t scores_slot_grads(const GatherBackwardParams& P, GatherRow at,
                                 QueryGradScratch<acc_t<T>>& scratch) {
  using A = acc_t<T>;
  const int64_t row = (at.b * P.fwd.H + at.h) * P.fwd.N + at.i;
  const T* dout = static_cast<const T*>(P.dout) + row * P.fwd.K;
  for (int64_t j = 0; j < scratch.slots.size; ++j) {
    scratch.weights[j] = 0;
    scratch.dlogits[j] = scratch.slots.bias[j] == 0 ? to_acc(dout[j]) : A{0};
  }
  return scratch.slots.size;
}

// One query: dq [D], dbias [K] and slot_grads [K, 2].
template <typename T>
inline void gather_backward_query(const GatherBackwardParams& P, GatherRow at,
                                  PhiloxKey dropout_key, QueryGradScratch<acc_t<T>>& scratch) {
  using A = acc_t<T>;
  const GatherParams& F = P.fwd;
  const int64_t row = (at.b * F.H + at.h) * F.N + at.i, group = F.H / F.H_kv;
  const A scale = static_cast<A>(F.scale);

  load_slots(F, at, scratch.slots);
  const int64_t n = min_of(F.v ? attention_slot_grads<T>(P, at, dropout_key, scratch)
                               : scores_slot_grads<T>(P, at, scratch),
                           F.K);

  if (P.dbias) {
    A* dbias = static_cast<A*>(P.dbias) + row * F.K;
    for (int64_t j = 0; j < n; ++j) dbias[j] = scratch.dlogits[j];
    for (int64_t j = n; j < F.K; ++j) dbias[j] = 0;
  }
  if (P.dk || P.dv) {
    const int64_t head_in_round = at.b * F.H + at.h - P.slice_begin * group;
    A* slot_grads = static_cast<A*>(P.slot_grads) + (head_in_round * F.N + at.i) * F.K * 2;
    for (int64_t j = 0; j < n; ++j) {
      slot_grads[2 * j] = scratch.weights[j];
      slot_grads[2 * j + 1] = scratch.dlogits[j] * scale;
    }
    for (int64_t j = 2 * n; j < 2 * F.K; ++j) slot_grads[j] = 0;
  }
  if (P.dq) {
    for (int64_t d = 0; d < pad_to_vector<A>(F.D); ++d) scratch.dq[d] = 0;
    const auto k = head_rows<T>(F.k, F.k_stride, at.b, at.h / group, F.D);
    const int64_t used = drop_zeros(scratch.dlogits, scratch.slots.keys, n);
    gather_accumulate(scratch.dlogits, k, scratch.slots.keys, used, scratch.dq);
    store_row(scratch.dq, F.D, scale, static_cast<T*>(P.dq) + row * F.D);
  }
}

inline int64_t gather_backward_queries_num_tasks(const GatherBackwardParams& P) {
  return (P.slice_end - P.slice_begin) * ceil_div(P.fwd.N, kGatherRows);
}

inline void gather_backward_queries(const GatherBackwardParams& P, int64_t task, void* scratch) {
  const PhiloxKey dropout_key = philox_key(P.fwd.seed, P.fwd.offset, kDropoutStream);
  const int64_t first_task = P.slice_begin * ceil_div(P.fwd.N, kGatherRows);
  dispatch_dtype(P.fwd.dtype, [&](auto type) {
    using T = decltype(type);
    ScratchAllocator allocator(scratch);
    QueryGradScratch<acc_t<T>> row_scratch(P.fwd, allocator);
    for_each_gather_row(P.fwd, first_task + task, [&](GatherRow at) {
      gather_backward_query<T>(P, at, dropout_key, row_scratch);
    });
  });
}

// ---- pass 2: keys
// --------------------------------------------------------------------------------------------------

constexpr int64_t kGradKeys = 32;      // keys of a task: their sums stay in L1
constexpr int64_t kGradEntries = 256;  // entries gathered at once

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

template <typename A>
struct KeyGradScratch {
  A* dk;          // [kGradKeys, D]
  A* dv;          // [kGradKeys, Dv]
  A* weights;     // [kGradEntries]
  int32_t* rows;  // [kGradEntries] queries

  KeyGradScratch(const GatherParams& P, ScratchAllocator& scratch) {
    dk = scratch.take<A>(kGradKeys * pad_to_vector<A>(P.D));
    dv = scratch.take<A>(kGradKeys * pad_to_vector<A>(P.Dv));
    weights = scratch.take<A>(kGradEntries);
    rows = scratch.take<int32_t>(kGradEntries);
  }
};

// grad += sum over the entries of one key of slot_grads[entry] * rows[query of the entry].
template <typename T>
inline void accumulate_entries(const int32_t* entries, int64_t n, const acc_t<T>* slot_grads,
                               const Rows<T>& rows, Divisor slots_per_query,
                               KeyGradScratch<acc_t<T>>& scratch, acc_t<T>* grad) {
  for (int64_t begin = 0; begin < n; begin += kGradEntries) {
    const int64_t count = min_of(kGradEntries, n - begin);
    int64_t used = 0;
    for (int64_t e = 0; e < count; ++e) {
      const int32_t slot = entries[begin + e];
      const acc_t<T> weight = slot_grads[2 * static_cast<int64_t>(slot)];
      scratch.weights[used] = weight;
      scratch.rows[used] = slots_per_query.quotient(slot);
      used += weight != 0;  // a row of weight zero must not count, NaN or not
    }
    gather_accumulate(scratch.weights, rows, scratch.rows, used, grad);
  }
}

// A block of keys of one slice: dk [D] and dv [Dv] of each, summed over the heads that share the
// key.
template <typename T>
inline void gather_backward_key_block(const GatherBackwardParams& P, int64_t slice, int64_t begin,
                                      int64_t end, KeyGradScratch<acc_t<T>>& scratch) {
  using A = acc_t<T>;
  const GatherParams& F = P.fwd;
  const int64_t b = slice / F.H_kv, h_kv = slice % F.H_kv, group = F.H / F.H_kv;
  const int64_t D = pad_to_vector<A>(F.D), Dv = pad_to_vector<A>(F.Dv);
  const Divisor slots_per_query(F.K);
  for (int64_t d = 0; d < kGradKeys * D; ++d) scratch.dk[d] = 0;
  for (int64_t d = 0; d < kGradKeys * Dv; ++d) scratch.dv[d] = 0;

  for (int64_t h = h_kv * group; h < (h_kv + 1) * group; ++h) {
    const int64_t index_head = b * F.H_i + h / (F.H / F.H_i);
    const int64_t* start = P.key_start + index_head * (F.M + 1);
    const int32_t* entries = P.entries + index_head * F.N * F.K;
    const A* slot_grads =
        static_cast<const A*>(P.slot_grads) + (b * F.H + h - P.slice_begin * group) * F.N * F.K * 2;
    const auto q = head_rows<T>(F.q, F.q_stride, b, h, F.D);
    const Rows<T> dout{static_cast<const T*>(P.dout) + (b * F.H + h) * F.N * F.Dv, F.Dv, F.Dv};
    for (int64_t m = begin; m < end; ++m) {
      const int64_t n = start[m + 1] - start[m];
      if (P.dk)
        accumulate_entries(entries + start[m], n, slot_grads + 1, q, slots_per_query, scratch,
                           scratch.dk + (m - begin) * D);
      if (P.dv)
        accumulate_entries(entries + start[m], n, slot_grads, dout, slots_per_query, scratch,
                           scratch.dv + (m - begin) * Dv);
    }
  }

  for (int64_t m = begin; m < end; ++m) {
    const int64_t row = slice * F.M + m;
    if (P.dk) store_row(scratch.dk + (m - begin) * D, F.D, A{1}, static_cast<T*>(P.dk) + row * F.D);
    if (P.dv)
      store_row(scratch.dv + (m - begin) * Dv, F.Dv, A{1}, static_cast<T*>(P.dv) + row * F.Dv);
  }
}

inline int64_t gather_backward_keys_num_tasks(const GatherBackwardParams& P) {
  return (P.slice_end - P.slice_begin) * ceil_div(P.fwd.M, kGradKeys);
}

inline void gather_backward_keys(const GatherBackwardParams& P, int64_t task, void* scratch) {
  const int64_t blocks = ceil_div(P.fwd.M, kGradKeys), begin = task % blocks * kGradKeys;
  dispatch_dtype(P.fwd.dtype, [&](auto type) {
    using T = decltype(type);
    ScratchAllocator allocator(scratch);
    KeyGradScratch<acc_t<T>> block_scratch(P.fwd, allocator);
    gather_backward_key_block<T>(P, P.slice_begin + task / blocks, begin,
                                 min_of(begin + kGradKeys, P.fwd.M), block_scratch);
  });
}

inline int64_t gather_backward_scratch_bytes(const GatherBackwardParams& P) {
  int64_t bytes = 0;
  dispatch_dtype(P.fwd.dtype, [&](auto type) {
    using A = acc_t<decltype(type)>;
    ScratchAllocator queries(nullptr), keys(nullptr);
    QueryGradScratch<A>(P.fwd, queries);
    KeyGradScratch<A>(P.fwd, keys);
    bytes = max_of(queries.bytes(), keys.bytes());
  });
  return bytes;
}

}  // namespace smartbird::SMARTBIRD_ISA

#endif  // SMARTBIRD_GATHER_BACKWARD_INL_H_
