// Attention of each query over its own gathered keys, and the row primitives its backward shares.
//
// Work runs one head at a time, so that the head's keys and values stay in cache while a block of
// queries gathers from them.
#include <utility>

#include "../philox.h"
#include "vec.h"

#ifndef SMARTBIRD_GATHER_INL_H_
#define SMARTBIRD_GATHER_INL_H_

namespace smartbird::SMARTBIRD_ISA {

// Rows of one task: enough that a task outweighs its start, few enough that short inputs still fill
// all threads.
constexpr int64_t kGatherRows = 64;

// Vectors of a row held in registers at once: half of the 16 that AVX2 has, the others are for the
// gathered row.
constexpr int kChunk = 8;

template <typename A>
inline int64_t pad_to_vector(int64_t n) {
  return ceil_div(n, kLanes<A>) * kLanes<A>;
}

// Hands out 64-byte aligned pieces of a thread's scratch. From null it only counts.
class ScratchAllocator {
 public:
  explicit ScratchAllocator(void* base) : base_(static_cast<char*>(base)) {}

  template <typename T>
  T* take(int64_t n) {
    char* p = base_ ? base_ + bytes_ : nullptr;
    bytes_ += ceil_div(n * static_cast<int64_t>(sizeof(T)), 64) * 64;
    return reinterpret_cast<T*>(p);
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* base_;
  int64_t bytes_ = 0;
};

// Rows of one (batch, head) of a strided tensor.
template <typename T>
struct Rows {
  const T* base;
  int64_t stride;
  int64_t size;  // elements in a row

  const T* operator[](int64_t row) const { return base + row * stride; }
};

template <typename T>
inline Rows<T> head_rows(const void* x, const int64_t (&stride)[3], int64_t b, int64_t h,
                         int64_t size) {
  return {static_cast<const T*>(x) + b * stride[0] + h * stride[1], stride[2], size};
}

// x [size] to accumulation type, zero-padded to whole vectors.
template <typename T>
inline void load_row(const T* x, int64_t size, acc_t<T>* out) {
  constexpr int L = kLanes<acc_t<T>>;
  int64_t d = 0;
  for (; d + L <= size; d += L) store(out + d, load(x + d));
  if (d < size) store(out + d, load_partial(x + d, size - d));
}

// out [size] = x [size] * factor.
template <typename T>
inline void store_row(const acc_t<T>* x, int64_t size, acc_t<T> factor, T* out) {
  constexpr int L = kLanes<acc_t<T>>;
  int64_t d = 0;
  for (; d + L <= size; d += L) store(out + d, load(x + d) * factor);
  if (d < size) store_partial(out + d, load(x + d) * factor, size - d);
}

// ---- gathered rows
// -------------------------------------------------------------------------------------------------

// Cuts a row of `size` elements into chunks of up to kChunk vectors and calls f(integral_constant
// C, d) for each; C = 0 is the part of a vector at the end.
template <typename A, typename F>
inline void for_each_chunk(int64_t size, F&& f) {
  constexpr int L = kLanes<A>;
  int64_t d = 0;
  for (; d + kChunk * L <= size; d += kChunk * L) f(std::integral_constant<int, kChunk>{}, d);
  const int64_t vectors = (size - d) / L;
  [&]<int... C>(std::integer_sequence<int, C...>) {
    ((vectors == C && C > 0 ? f(std::integral_constant<int, C>{}, d) : void()), ...);
  }(std::make_integer_sequence<int, kChunk>{});
  d += vectors * L;
  if (d < size) f(std::integral_constant<int, 0>{}, d);
}

// Vector c of a chunk at p that has `left` elements before the row ends.
template <int C, typename T>
inline Vec<acc_t<T>> load_chunk(const T* p, int c, int64_t left) {
  if constexpr (C == 0)
    return load_partial(p, left);
  else
    return load(p + c * kLanes<acc_t<T>>);
}

// Lane l of the result belongs to row keys[l % S]; the lanes of a row add up to its dot product
// with x. At S = kLanes each lane is a whole dot product: summing across lanes costs one shuffle
// per row, not log2(lanes).
template <int C, int S, typename T, int V>
inline Vec<acc_t<T>> dot_tree(const Vec<acc_t<T>> (&x)[V], const Rows<T>& rows, int64_t d,
                              const int32_t* keys) {
  if constexpr (S == 1) {
    const T* row = rows[keys[0]] + d;
    const int64_t left = rows.size - d;
    Vec<acc_t<T>> sum = x[0] * load_chunk<C>(row, 0, left);
    for (int c = 1; c < V; ++c) sum += x[c] * load_chunk<C>(row, c, left);
    return sum;
  } else {
    return fold<S / 2>(dot_tree<C, S / 2>(x, rows, d, keys),
                       dot_tree<C, S / 2>(x, rows, d, keys + S / 2));
  }
}

// dots[j] = x . rows[keys[j]]; x [rows.size] zero-padded, keys [n] and dots [n] with n whole
// vectors.
template <typename T>
inline void gather_dots(const acc_t<T>* __restrict x, const Rows<T>& rows,
                        const int32_t* __restrict keys, int64_t n, acc_t<T>* __restrict dots) {
  using A = acc_t<T>;
  constexpr int L = kLanes<A>;
  if (rows.size == 0)
    for (int64_t j = 0; j < n; ++j) dots[j] = 0;
  for_each_chunk<A>(rows.size, [&](auto chunk, int64_t d) {
    constexpr int C = decltype(chunk)::value, V = C == 0 ? 1 : C;
    Vec<A> part[V];
    for (int c = 0; c < V; ++c) part[c] = load(x + d + c * L);
    for (int64_t j = 0; j < n; j += L) {
      const Vec<A> sum = dot_tree<C, L>(part, rows, d, keys + j);
      store(dots + j, d == 0 ? sum : sum + load(dots + j));
    }
  });
}

// out += sum_j weights[j] * rows[keys[j]] over j < n; out [rows.size] padded to whole vectors.
template <typename T>
inline void gather_accumulate(const acc_t<T>* __restrict weights, const Rows<T>& rows,
                              const int32_t* __restrict keys, int64_t n, acc_t<T>* __restrict out) {
  using A = acc_t<T>;
  constexpr int L = kLanes<A>;
  for_each_chunk<A>(rows.size, [&](auto chunk, int64_t d) {
    constexpr int C = decltype(chunk)::value, V = C == 0 ? 1 : C;
    constexpr int U = V < 3   ? 4
                      : V < 6 ? 2
                              : 1;  // independent sums of each vector, to hide the latency of FMA
    const int64_t left = rows.size - d;
    Vec<A> sum[U][V] = {};
    int64_t j = 0;
    for (; j + U <= n; j += U)
      for (int u = 0; u < U; ++u)
        for (int c = 0; c < V; ++c)
          sum[u][c] += load_chunk<C>(rows[keys[j + u]] + d, c, left) * weights[j + u];
    for (; j < n; ++j)
      for (int c = 0; c < V; ++c)
        sum[0][c] += load_chunk<C>(rows[keys[j]] + d, c, left) * weights[j];
    for (int c = 0; c < V; ++c) {
      for (int u = 1; u < U; ++u) sum[0][c] += sum[u][c];
      store(out + d + c * L, load(out + d + c * L) + sum[0][c]);
    }
  });
}

// Takes the entries of weight zero out of the list: whatever they point at, NaN too, must not
// count.
template <typename A>
inline int64_t drop_zeros(A* weights, int32_t* keys, int64_t n) {
  int64_t zeros = 0;
  for (int64_t j = 0; j < n; ++j) zeros += weights[j] == 0;
  if (zeros == 0) return n;
  int64_t kept = 0;
  for (int64_t j = 0; j < n; ++j) {
    weights[kept] = weights[j];
    keys[kept] = keys[j];
    kept += weights[j] != 0;
  }
  return kept;
}

// ---- one query's slots
// ---------------------------------------------------------------------------------------------

// The slots of one query row. Arrays hold K entries padded to whole vectors.
template <typename A>
struct GatherSlots {
  int32_t* keys;  // a key that may be read, for every slot below `size`
  A* bias;        // added to the scaled score; -inf in slots that hold no key
  int64_t
      size;  // slots up to the last that holds a key, padded to whole vectors; 0 where none does

  void allocate(ScratchAllocator& scratch, int64_t K) {
    keys = scratch.take<int32_t>(pad_to_vector<A>(K));
    bias = scratch.take<A>(pad_to_vector<A>(K));
  }
};

// Which row a kernel works on: head h of query i of batch b.
struct GatherRow {
  int64_t b, h, i;
};

// Fills `slots` from the indices and the bias of a row. Slots without a key borrow a key of the
// same row, so that no row is read that no index names.
template <typename A>
inline void load_slots(const GatherParams& P, GatherRow at, GatherSlots<A>& slots) {
  const int64_t index_head = at.h / (P.H / P.H_i);
  const int32_t* indices = P.indices + at.b * P.indices_stride[0] +
                           index_head * P.indices_stride[1] + at.i * P.indices_stride[2];
  const uint32_t M = static_cast<uint32_t>(P.M);
  uint32_t out_of_range = 0;
  for (int64_t j = 0; j < P.K; ++j) out_of_range |= static_cast<uint32_t>(indices[j]) + 1 > M;
  if (out_of_range)
    __atomic_store_n(P.error, static_cast<int32_t>(kIndexOutOfRange), __ATOMIC_RELAXED);

  const auto holds_key = [&](int64_t j) { return static_cast<uint32_t>(indices[j]) < M; };
  int64_t begin = 0, end = P.K;
  while (end > 0 && !holds_key(end - 1)) --end;
  slots.size = pad_to_vector<A>(end);
  if (end == 0) return;
  while (!holds_key(begin)) ++begin;

  const int32_t borrowed = indices[begin];
  const A none = -static_cast<A>(__builtin_inff());
  if (P.bias) {
    const A* bias = static_cast<const A*>(P.bias) + at.b * P.bias_stride[0] +
                    at.h * P.bias_stride[1] + at.i * P.bias_stride[2];
    for (int64_t j = 0; j < end; ++j)
      slots.bias[j] = holds_key(j) ? bias[j * P.bias_stride[3]] : none;
  } else {
    for (int64_t j = 0; j < end; ++j) slots.bias[j] = holds_key(j) ? A{0} : none;
  }
  for (int64_t j = 0; j < end; ++j) slots.keys[j] = holds_key(j) ? indices[j] : borrowed;
  for (int64_t j = end; j < slots.size; ++j) {
    slots.bias[j] = none;
    slots.keys[j] = borrowed;
  }
}

// logits[j] = scale * q . k[key of slot j] + bias of slot j, -inf where the bias is; returns the
// largest.
template <typename T>
inline acc_t<T> gather_logits(const GatherParams& P, const acc_t<T>* q, const Rows<T>& k,
                              const GatherSlots<acc_t<T>>& slots, acc_t<T>* logits) {
  using A = acc_t<T>;
  gather_dots(q, k, slots.keys, slots.size, logits);
  const A scale = static_cast<A>(P.scale);
  const Vec<A> none = broadcast(-static_cast<A>(__builtin_inff()));
  Vec<A> largest = none;
  for (int64_t j = 0; j < slots.size; j += kLanes<A>) {
    const Vec<A> bias = load(slots.bias + j);
    const Vec<A> logit = bias == none ? none : load(logits + j) * scale + bias;
    store(logits + j, logit);
    largest = max(largest, logit);
  }
  return reduce_max(largest);
}

// factors[j] of the slots j < n: 0 where dropout takes the slot, else 1 / (1 - p).
template <typename A>
inline void dropout_factors(const GatherParams& P, GatherRow at, PhiloxKey key, int64_t n,
                            A* factors) {
  const A kept = P.dropout_p < 1 ? 1 / (1 - static_cast<A>(P.dropout_p)) : A{0};
  for (int64_t j = 0; j < n; ++j) {
    const PhiloxBlock block =
        philox4x32(philox_counter(at.b, at.h, at.i, static_cast<uint32_t>(j / 4)), key);
    factors[j] = uniform_float(block.word[j % 4]) >= P.dropout_p ? kept : A{0};
  }
}

// ---- forward
// -------------------------------------------------------------------------------------------------------

// Calls f(row) for the rows of a task: a block of queries of one (batch, key/value head), head by
// head. Tasks that share keys are neighbours.
template <typename F>
inline void for_each_gather_row(const GatherParams& P, int64_t task, F&& f) {
  const int64_t blocks = ceil_div(P.N, kGatherRows), group = P.H / P.H_kv;
  const int64_t slice = task / blocks, begin = task % blocks * kGatherRows;
  const int64_t end = min_of(begin + kGatherRows, P.N);
  const int64_t b = slice / P.H_kv, first_head = slice % P.H_kv * group;
  for (int64_t h = first_head; h < first_head + group; ++h)
    for (int64_t i = begin; i < end; ++i) f(GatherRow{b, h, i});
}

template <typename A>
struct GatherScratch {
  A* q;        // [D]
  A* out;      // [Dv]
  A* logits;   // [K], later the weights
  A* factors;  // [K]
  GatherSlots<A> slots;

  GatherScratch(const GatherParams& P, ScratchAllocator& scratch) {
    q = scratch.take<A>(pad_to_vector<A>(P.D));
    out = scratch.take<A>(pad_to_vector<A>(P.Dv));
    logits = scratch.take<A>(pad_to_vector<A>(P.K));
    factors = scratch.take<A>(pad_to_vector<A>(P.K));
    slots.allocate(scratch, P.K);
  }
};

// weights[j] = exp(logits[j] - largest) in place; returns their sum.
template <typename A>
inline A exp_and_sum(A* logits, int64_t n, A largest) {
  Vec<A> sum{};
  for (int64_t j = 0; j < n; j += kLanes<A>) {
    const Vec<A> weight = exp(load(logits + j) - largest);
    store(logits + j, weight);
    sum += weight;
  }
  return reduce_add(sum);
}

// q [D], k [M, D], v [M, Dv], K slots -> out [Dv], lse: softmax attention of one query over its
// gathered keys.
template <typename T>
inline void gather_attention_row(const GatherParams& P, GatherRow at, PhiloxKey dropout_key,
                                 GatherScratch<acc_t<T>>& scratch) {
  using A = acc_t<T>;
  const int64_t row = (at.b * P.H + at.h) * P.N + at.i, h_kv = at.h / (P.H / P.H_kv);
  const auto q = head_rows<T>(P.q, P.q_stride, at.b, at.h, P.D);
  const auto k = head_rows<T>(P.k, P.k_stride, at.b, h_kv, P.D);
  const auto v = head_rows<T>(P.v, P.v_stride, at.b, h_kv, P.Dv);
  GatherSlots<A>& slots = scratch.slots;
  A* weights = scratch.logits;

  const A none = -static_cast<A>(__builtin_inff());
  A lse = none, normalizer = 0;
  for (int64_t d = 0; d < pad_to_vector<A>(P.Dv); ++d) scratch.out[d] = 0;

  load_slots(P, at, slots);
  load_row(q[at.i], P.D, scratch.q);
  const A largest = slots.size > 0 ? gather_logits(P, scratch.q, k, slots, weights) : none;
  if (largest != none) {
    const A sum = exp_and_sum(weights, slots.size, largest);
    normalizer = 1 / sum;
    lse = largest + static_cast<A>(__builtin_log(static_cast<double>(sum)));
    if (P.dropout_p > 0) {
      dropout_factors(P, at, dropout_key, slots.size, scratch.factors);
      for (int64_t j = 0; j < slots.size; ++j) weights[j] *= scratch.factors[j];
    }
    const int64_t n = drop_zeros(weights, slots.keys, slots.size);
    gather_accumulate(weights, v, slots.keys, n, scratch.out);
  }
  store_row(scratch.out, P.Dv, normalizer, static_cast<T*>(P.out) + row * P.Dv);
  static_cast<A*>(P.lse)[row] = lse;
}

// q [D], k [M, D], K slots -> out [K]: scaled scores of one query's gathered keys, -inf in slots
// without one.
template <typename T>
inline void gather_scores_row(const GatherParams& P, GatherRow at,
                              GatherScratch<acc_t<T>>& scratch) {
  using A = acc_t<T>;
  const auto q = head_rows<T>(P.q, P.q_stride, at.b, at.h, P.D);
  const auto k = head_rows<T>(P.k, P.k_stride, at.b, at.h / (P.H / P.H_kv), P.D);
  T* out = static_cast<T*>(P.out) + ((at.b * P.H + at.h) * P.N + at.i) * P.K;

  load_slots(P, at, scratch.slots);
  const int64_t n = min_of(scratch.slots.size, P.K);
  if (n > 0) {
    load_row(q[at.i], P.D, scratch.q);
    gather_logits(P, scratch.q, k, scratch.slots, scratch.logits);
    store_row(scratch.logits, n, A{1}, out);
  }
  for (int64_t j = n; j < P.K; ++j) out[j] = from_acc<T>(-static_cast<A>(__builtin_inff()));
}

inline int64_t gather_num_tasks(const GatherParams& P) {
  return P.B * P.H_kv * ceil_div(P.N, kGatherRows);
}

inline int64_t gather_scratch_bytes(const GatherParams& P) {
  int64_t bytes = 0;
  dispatch_dtype(P.dtype, [&](auto type) {
    ScratchAllocator scratch(nullptr);
    GatherScratch<acc_t<decltype(type)>>(P, scratch);
    bytes = scratch.bytes();
  });
  return bytes;
}

inline void gather_attention(const GatherParams& P, int64_t task, void* scratch) {
  const PhiloxKey dropout_key = philox_key(P.seed, P.offset, kDropoutStream);
  dispatch_dtype(P.dtype, [&](auto type) {
    using T = decltype(type);
    ScratchAllocator allocator(scratch);
    GatherScratch<acc_t<T>> row_scratch(P, allocator);
    for_each_gather_row(
        P, task, [&](GatherRow at) { gather_attention_row<T>(P, at, dropout_key, row_scratch); });
  });
}

inline void gather_scores(const GatherParams& P, int64_t task, void* scratch) {
  dispatch_dtype(P.dtype, [&](auto type) {
    using T = decltype(type);
    ScratchAllocator allocator(scratch);
    GatherScratch<acc_t<T>> row_scratch(P, allocator);
    for_each_gather_row(P, task, [&](GatherRow at) { gather_scores_row<T>(P, at, row_scratch); });
  });
}

}  // namespace smartbird::SMARTBIRD_ISA

#endif  // SMARTBIRD_GATHER_INL_H_
