// Attention of each query over its own gathered keys, and the primitives its backward shares.
//
// What limits these kernels is where the gathered rows come from. A task therefore takes many
// queries of one (batch, key/value head) and goes through them phase by phase - all scores, then
// all softmaxes, then all sums of values - and each phase goes through the keys in blocks that stay
// in L2. Index rows are ascending, so a query's part of a block is a run of its list; any other
// order is slower, not wrong.
#include <utility>

#include "philox-inl.h"
#include "vec.h"

#ifndef SMARTBIRD_GATHER_INL_H_
#define SMARTBIRD_GATHER_INL_H_

namespace smartbird::SMARTBIRD_ISA {

// Vectors of a row held in registers at once: half of the 16 that AVX2 has.
constexpr int kChunk = 8;

// Gathered rows scored or added together; lists are cut at multiples of it.
template <typename A>
constexpr int kGroup = kLanes<A> < 4 ? kLanes<A> : 4;

// Bytes of gathered rows that are to stay in L2: what many cores have.
constexpr int64_t kBlockBytes = 512 * 1024;

// A task gathers this many times each row of its keys, so that reading them into L2 weighs little
// ...
constexpr int64_t kReuse = 8;
// ... within what scratch allows: so many slots, and so many lists. The fewest lists outweigh a
// task's start.
constexpr int64_t kMaxSlots = 65536, kMaxLists = 1024, kMinLists = 64;

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

// The rows of one (batch, head) of a strided tensor.
template <typename T>
struct Rows {
  const T* base;
  int64_t stride;
  int64_t count;
  int64_t size;  // elements in a row

  const T* operator[](int64_t row) const { return base + row * stride; }
};

template <typename T>
inline Rows<T> head_rows(const void* x, const int64_t (&stride)[3], int64_t b, int64_t h,
                         int64_t count, int64_t size) {
  return {static_cast<const T*>(x) + b * stride[0] + h * stride[1], stride[2], count, size};
}

template <typename T>
inline Rows<T> query_rows(const GatherParams& P, int64_t b, int64_t h) {
  return head_rows<T>(P.q, P.q_stride, b, h, P.N, P.D);
}
template <typename T>
inline Rows<T> key_rows(const GatherParams& P, int64_t b, int64_t h_kv) {
  return head_rows<T>(P.k, P.k_stride, b, h_kv, P.M, P.D);
}
template <typename T>
inline Rows<T> value_rows(const GatherParams& P, int64_t b, int64_t h_kv) {
  return head_rows<T>(P.v, P.v_stride, b, h_kv, P.M, P.Dv);
}

// out [size] = x [size] * factor; x is padded to whole vectors.
template <typename T>
inline void store_row(const acc_t<T>* x, int64_t size, acc_t<T> factor, T* out) {
  constexpr int L = kLanes<acc_t<T>>;
  int64_t d = 0;
  for (; d + L <= size; d += L) store(out + d, load(x + d) * factor);
  if (d < size) store_partial(out + d, load(x + d) * factor, size - d);
}

template <typename A>
inline void fill(A* x, int64_t n, A value) {
  for (int64_t j = 0; j < n; ++j) x[j] = value;
}

// ---- one run of a list: gathered rows that a block holds
// -------------------------------------------

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

// The C vectors of a chunk at p, or for C = 0 the `left` elements before the row ends.
template <int C, typename A>
struct Chunk {
  static constexpr int kVectors = C == 0 ? 1 : C;
  Vec<A> x[kVectors];
};

// Vector c of it.
template <int C, typename T>
inline Vec<acc_t<T>> load_chunk(const T* p, int c, int64_t left) {
  if constexpr (C == 0)
    return load_partial(p, left);
  else
    return load(p + c * kLanes<acc_t<T>>);
}

// Lane l of the result belongs to row keys[l % S]; the lanes of a row add up to its dot product
// with x. Summing across lanes so, S rows at a time, costs far fewer shuffles than row by row.
template <int C, int S, typename T>
inline Vec<acc_t<T>> dot_tree(const Chunk<C, acc_t<T>>& x, const Rows<T>& rows, int64_t d,
                              const int32_t* keys) {
  if constexpr (S == 1) {
    const T* row = rows[keys[0]] + d;
    const int64_t left = rows.size - d;
    Vec<acc_t<T>> sum = x.x[0] * load_chunk<C>(row, 0, left);
    for (int c = 1; c < x.kVectors; ++c) sum += x.x[c] * load_chunk<C>(row, c, left);
    return sum;
  } else {
    return fold<S / 2>(dot_tree<C, S / 2>(x, rows, d, keys),
                       dot_tree<C, S / 2>(x, rows, d, keys + S / 2));
  }
}

// dots[j] (+)= x . rows[keys[j]] over the elements of a chunk at d, from j on while the key lies
// before `end` and j < n; returns where it stopped. keys and dots are padded to whole groups.
template <int C, typename T>
inline int64_t dot_run(const T* x, const Rows<T>& rows, int64_t d, const int32_t* __restrict keys,
                       int64_t j, int64_t n, int64_t end, acc_t<T>* __restrict dots) {
  using A = acc_t<T>;
  constexpr int G = kGroup<A>;
  Chunk<C, A> part;
  for (int c = 0; c < part.kVectors; ++c) part.x[c] = load_chunk<C>(x + d, c, rows.size - d);
  for (; j < n && keys[j] < end; j += G) {
    const Vec<A> sum = sum_groups<G>(dot_tree<C, G>(part, rows, d, keys + j));
    for (int g = 0; g < G; ++g) dots[j + g] = d == 0 ? sum[g] : dots[j + g] + sum[g];
  }
  return j;
}

// out += sum_j weights[j] * rows[keys[j]] over the elements of a chunk at d, from j on while the
// key lies before `end` and j < n; returns where it stopped. out is padded to whole vectors.
template <int C, typename T>
inline int64_t accumulate_run(const acc_t<T>* __restrict weights, const Rows<T>& rows, int64_t d,
                              const int32_t* __restrict keys, int64_t j, int64_t n, int64_t end,
                              acc_t<T>* __restrict out) {
  using A = acc_t<T>;
  constexpr int L = kLanes<A>, V = Chunk<C, A>::kVectors;
  constexpr int U = V < 3   ? 4
                    : V < 6 ? 2
                            : 1;  // independent sums of each vector, to hide FMA's latency
  constexpr int G = 4;
  const int64_t left = rows.size - d;
  const auto add = [&](Vec<A>(&sum)[V], int64_t slot) {
    const T* row = rows[keys[slot]] + d;
    const A weight = weights[slot];
    for (int c = 0; c < V; ++c) sum[c] += load_chunk<C>(row, c, left) * weight;
  };
  Vec<A> sum[U][V] = {};
  for (; j + G <= n && keys[j] < end; j += G)
    for (int g = 0; g < G; ++g) add(sum[g % U], j + g);
  if (j + G > n)
    for (; j < n && keys[j] < end; ++j) add(sum[0], j);
  for (int c = 0; c < V; ++c) {
    for (int u = 1; u < U; ++u) sum[0][c] += sum[u][c];
    store(out + d + c * L, load(out + d + c * L) + sum[0][c]);
  }
  return j;
}

// ---- many lists
// ------------------------------------------------------------------------------------

// The keys that the queries of a task gather.
struct GatherLists {
  int64_t count;      // lists
  int64_t capacity;   // entries of a list, padded to whole vectors
  int32_t* keys;      // [count, capacity]
  int64_t* size;      // [count]
  int64_t* position;  // [count] how far a pass has come

  void allocate(ScratchAllocator& scratch, int64_t max_count, int64_t padded_slots) {
    capacity = padded_slots;
    keys = scratch.take<int32_t>(max_count * capacity);
    size = scratch.take<int64_t>(max_count);
    position = scratch.take<int64_t>(max_count);
  }
};

// How many rows of `row_bytes` a pass takes at a time when it gathers `gathered` times from `rows`
// rows: all at once where they are too rarely gathered for a block to serve twice.
inline int64_t rows_per_block(int64_t rows, int64_t row_bytes, int64_t gathered) {
  return gathered < 2 * rows ? max_of<int64_t>(rows, 1)
                             : max_of<int64_t>(kBlockBytes / row_bytes, 1);
}

// Takes all lists through `rows`, a chunk and a block at a time: f(chunk, d, list, begin, end)
// works on the list's entries from `begin` on whose row lies before `end`, and returns where it
// stopped.
template <typename T, typename F>
inline void for_each_run(const Rows<T>& rows, const GatherLists& lists, F&& f) {
  using A = acc_t<T>;
  for_each_chunk<A>(rows.size, [&](auto chunk, int64_t d) {
    constexpr int64_t kBytes = Chunk<decltype(chunk)::value, A>::kVectors * kLanes<A> * sizeof(T);
    const int64_t block = rows_per_block(rows.count, kBytes, lists.count * lists.capacity);
    for (int64_t r = 0; r < lists.count; ++r) lists.position[r] = 0;
    for (int64_t begin = 0; begin < rows.count; begin += block) {
      const int64_t end = begin + block < rows.count ? begin + block : INT64_MAX;
      for (int64_t r = 0; r < lists.count; ++r)
        lists.position[r] = f(chunk, d, r, lists.position[r], end);
    }
  });
}

// dots[r, j] = x[r] . rows[keys[r, j]]; x [count] rows, dots [count, capacity].
template <typename T>
inline void gather_dots(const T* const* x, const Rows<T>& rows, const GatherLists& lists,
                        acc_t<T>* dots) {
  if (rows.size == 0) fill(dots, lists.count * lists.capacity, acc_t<T>{0});
  for_each_run(rows, lists, [&](auto chunk, int64_t d, int64_t r, int64_t begin, int64_t end) {
    const int64_t at = r * lists.capacity;
    return dot_run<decltype(chunk)::value>(x[r], rows, d, lists.keys + at, begin, lists.size[r],
                                           end, dots + at);
  });
}

// out[r] = sum_j weights[r, j] * rows[keys[r, j]]; weights [count, capacity], out [count, row size
// padded to whole vectors].
template <typename T>
inline void gather_accumulate(const acc_t<T>* weights, const Rows<T>& rows,
                              const GatherLists& lists, acc_t<T>* out) {
  using A = acc_t<T>;
  const int64_t out_size = pad_to_vector<A>(rows.size);
  fill(out, lists.count * out_size, A{0});
  for_each_run(rows, lists, [&](auto chunk, int64_t d, int64_t r, int64_t begin, int64_t end) {
    const int64_t at = r * lists.capacity;
    return accumulate_run<decltype(chunk)::value>(weights + at, rows, d, lists.keys + at, begin,
                                                  lists.size[r], end, out + r * out_size);
  });
}

// Takes the entries of weight zero out of a list: whatever they point at, NaN too, must not count.
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
// -----------------------------------------------------------------------------

// Query i of head h of batch b.
struct GatherRow {
  int64_t b, h, i;
};

inline const int32_t* row_indices(const GatherParams& P, GatherRow at) {
  const int64_t index_head = at.h / (P.H / P.H_i);
  return P.indices + at.b * P.indices_stride[0] + index_head * P.indices_stride[1] +
         at.i * P.indices_stride[2];
}

// keys [K, padded to a group] from the row's indices; returns the number of slots up to the last
// that holds a key. Those without a key borrow one of the same row, so that no row is read that no
// index names.
template <typename A>
inline int64_t load_keys(const GatherParams& P, GatherRow at, int32_t* keys) {
  const int32_t* indices = row_indices(P, at);
  const uint32_t M = static_cast<uint32_t>(P.M);
  uint32_t out_of_range = 0, empty = 0;
  for (int64_t j = 0; j < P.K; ++j) {
    const uint32_t index = static_cast<uint32_t>(indices[j]);
    out_of_range |= index + 1 > M;
    empty |= index >= M;
    keys[j] = indices[j];
  }
  int64_t n = P.K;
  if (empty) {
    if (out_of_range)
      __atomic_store_n(P.error, static_cast<int32_t>(kIndexOutOfRange), __ATOMIC_RELAXED);
    const auto holds_key = [&](int64_t j) { return static_cast<uint32_t>(indices[j]) < M; };
    while (n > 0 && !holds_key(n - 1)) --n;
    int32_t borrowed = n > 0 ? indices[n - 1] : 0;
    for (int64_t j = n - 1; j >= 0; --j) keys[j] = borrowed = holds_key(j) ? indices[j] : borrowed;
  }
  if (n > 0)
    for (int64_t j = n; j % kGroup<A> != 0; ++j) keys[j] = keys[n - 1];
  return n;
}

// logits[j] = scale * dots[j] + bias[j] in place for j < n; -inf in slots without a key, where the
// bias is -inf, and in the padding to whole vectors. `bias` is scratch. Returns the largest.
template <typename A>
inline A finish_logits(const GatherParams& P, GatherRow at, int64_t n, A* bias, A* logits) {
  const A none = -static_cast<A>(__builtin_inff());
  const int32_t* indices = row_indices(P, at);
  const auto holds_key = [&](int64_t j) {
    return static_cast<uint32_t>(indices[j]) < static_cast<uint32_t>(P.M);
  };
  if (P.bias) {
    const A* row = static_cast<const A*>(P.bias) + at.b * P.bias_stride[0] +
                   at.h * P.bias_stride[1] + at.i * P.bias_stride[2];
    for (int64_t j = 0; j < n; ++j) bias[j] = holds_key(j) ? row[j * P.bias_stride[3]] : none;
  } else {
    for (int64_t j = 0; j < n; ++j) bias[j] = holds_key(j) ? A{0} : none;
  }
  fill(bias + n, pad_to_vector<A>(n) - n, none);

  const A scale = static_cast<A>(P.scale);
  Vec<A> largest = broadcast(none);
  for (int64_t j = 0; j < n; j += kLanes<A>) {
    const Vec<A> b = load(bias + j);
    const Vec<A> logit = b == none ? broadcast(none) : load(logits + j) * scale + b;
    store(logits + j, logit);
    largest = max(largest, logit);
  }
  return reduce_max(largest);
}

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

// factors[j] of the slots j < n: 0 where dropout takes the slot, else 1 / (1 - p). Slot j has draw
// j of the row.
template <typename A>
inline void dropout_factors(const GatherParams& P, GatherRow at, PhiloxKey key, int64_t n,
                            A* factors) {
  const A kept = P.dropout_p < 1 ? 1 / (1 - static_cast<A>(P.dropout_p)) : A{0};
  uint32_t draws[kDrawsPerChunk];
  for (int64_t begin = 0; begin < n; begin += kDrawsPerChunk) {
    philox_chunk(key, at.b, at.h, at.i, static_cast<uint32_t>(begin / kDrawsPerChunk), draws);
    const int64_t count = min_of<int64_t>(n - begin, kDrawsPerChunk);
    for (int64_t j = 0; j < count; ++j)
      factors[begin + j] = uniform_float(draws[j]) >= P.dropout_p ? kept : A{0};
  }
}

// ---- tasks
// -----------------------------------------------------------------------------------------

// Queries of one task and head.
inline int64_t gather_queries_per_task(const GatherParams& P) {
  const int64_t slots = max_of<int64_t>(P.K, 1), group = P.H / P.H_kv;
  const int64_t wanted = min_of(max_of(kReuse * P.M / slots, kMinLists), kMaxLists);
  const int64_t lists = min_of(wanted, kMaxSlots / slots);
  return min_of(max_of<int64_t>(lists / group, 1), max_of<int64_t>(P.N, 1));
}

// A block of queries of the heads that share one (batch, key/value head).
struct GatherTask {
  int64_t b, h_kv, first_head, heads, begin, queries;

  // Neighbouring tasks share keys.
  GatherTask(const GatherParams& P, int64_t task) {
    const int64_t step = gather_queries_per_task(P), blocks = ceil_div(P.N, step),
                  slice = task / blocks;
    b = slice / P.H_kv;
    h_kv = slice % P.H_kv;
    heads = P.H / P.H_kv;
    first_head = h_kv * heads;
    begin = task % blocks * step;
    queries = min_of(step, P.N - begin);
  }

  // Calls f(r, row) for all rows, r = 0, 1, ...
  template <typename F>
  void for_each_row(F&& f) const {
    int64_t r = 0;
    for (int64_t h = first_head; h < first_head + heads; ++h)
      for (int64_t i = begin; i < begin + queries; ++i) f(r++, GatherRow{b, h, i});
  }
};

inline int64_t row_number(const GatherParams& P, GatherRow at) {
  return (at.b * P.H + at.h) * P.N + at.i;
}

inline int64_t gather_num_tasks(const GatherParams& P) {
  return P.B * P.H_kv * ceil_div(P.N, gather_queries_per_task(P));
}

// Fills the lists of a task's queries, and the pointers to their rows of q.
template <typename T>
inline void load_lists(const GatherParams& P, const GatherTask& task, GatherLists& lists,
                       const T** q) {
  lists.count = task.heads * task.queries;
  task.for_each_row([&](int64_t r, GatherRow at) {
    q[r] = query_rows<T>(P, at.b, at.h)[at.i];
    lists.size[r] = load_keys<acc_t<T>>(P, at, lists.keys + r * lists.capacity);
  });
}

// ---- forward
// ---------------------------------------------------------------------------------------

template <typename T>
struct GatherScratch {
  using A = acc_t<T>;
  GatherLists lists;
  const T** q;    // [lists]
  A* weights;     // [lists, slots] first dot products, then logits, then weights
  A* normalizer;  // [lists]
  A* out;         // [lists, Dv]
  A* bias;        // [slots] of one list
  A* factors;     // [slots] of one list

  GatherScratch(const GatherParams& P, ScratchAllocator& scratch) {
    const int64_t count = gather_queries_per_task(P) * (P.H / P.H_kv),
                  slots = pad_to_vector<A>(P.K);
    lists.allocate(scratch, count, slots);
    q = scratch.take<const T*>(count);
    weights = scratch.take<A>(count * slots);
    normalizer = scratch.take<A>(count);
    out = scratch.take<A>(count * pad_to_vector<A>(P.Dv));
    bias = scratch.take<A>(slots);
    factors = scratch.take<A>(slots);
  }
};

// q [D], k [M, D], v [M, Dv] -> out [Dv], lse of each query: softmax attention over its gathered
// keys.
template <typename T>
inline void gather_attention_task(const GatherParams& P, const GatherTask& task,
                                  PhiloxKey dropout_key, GatherScratch<T>& scratch) {
  using A = acc_t<T>;
  const A none = -static_cast<A>(__builtin_inff());
  GatherLists& lists = scratch.lists;
  load_lists(P, task, lists, scratch.q);
  gather_dots(scratch.q, key_rows<T>(P, task.b, task.h_kv), lists, scratch.weights);

  task.for_each_row([&](int64_t r, GatherRow at) {
    A* weights = scratch.weights + r * lists.capacity;
    A& lse = static_cast<A*>(P.lse)[row_number(P, at)];
    int64_t& n = lists.size[r];
    const A largest = finish_logits(P, at, n, scratch.bias, weights);
    if (largest == none) {
      lse = none;
      scratch.normalizer[r] = 0;
      n = 0;
      return;
    }
    const A sum = exp_and_sum(weights, n, largest);
    lse = largest + static_cast<A>(__builtin_log(static_cast<double>(sum)));
    scratch.normalizer[r] = 1 / sum;
    if (P.dropout_p > 0) {
      dropout_factors(P, at, dropout_key, n, scratch.factors);
      for (int64_t j = 0; j < n; ++j) weights[j] *= scratch.factors[j];
    }
    n = drop_zeros(weights, lists.keys + r * lists.capacity, n);
  });

  gather_accumulate(scratch.weights, value_rows<T>(P, task.b, task.h_kv), lists, scratch.out);
  task.for_each_row([&](int64_t r, GatherRow at) {
    store_row(scratch.out + r * pad_to_vector<A>(P.Dv), P.Dv, scratch.normalizer[r],
              static_cast<T*>(P.out) + row_number(P, at) * P.Dv);
  });
}

// q [D], k [M, D] -> out [K] of each query: the scaled scores of its gathered keys, -inf in empty
// slots.
template <typename T>
inline void gather_scores_task(const GatherParams& P, const GatherTask& task,
                               GatherScratch<T>& scratch) {
  using A = acc_t<T>;
  GatherLists& lists = scratch.lists;
  load_lists(P, task, lists, scratch.q);
  gather_dots(scratch.q, key_rows<T>(P, task.b, task.h_kv), lists, scratch.weights);
  task.for_each_row([&](int64_t r, GatherRow at) {
    A* scores = scratch.weights + r * lists.capacity;
    T* out = static_cast<T*>(P.out) + row_number(P, at) * P.K;
    const int64_t n = lists.size[r];
    finish_logits(P, at, n, scratch.bias, scores);
    store_row(scores, n, A{1}, out);
    fill(out + n, P.K - n, from_acc<T>(-static_cast<A>(__builtin_inff())));
  });
}

inline int64_t gather_scratch_bytes(const GatherParams& P) {
  int64_t bytes = 0;
  dispatch_dtype(P.dtype, [&](auto type) {
    ScratchAllocator allocator(nullptr);
    GatherScratch<decltype(type)>(P, allocator);
    bytes = allocator.bytes();
  });
  return bytes;
}

inline void gather_attention(const GatherParams& P, int64_t task, void* scratch) {
  const PhiloxKey dropout_key = philox_key(P.seed, P.offset, kDropoutStream);
  dispatch_dtype(P.dtype, [&](auto type) {
    ScratchAllocator allocator(scratch);
    GatherScratch<decltype(type)> task_scratch(P, allocator);
    gather_attention_task(P, GatherTask(P, task), dropout_key, task_scratch);
  });
}

inline void gather_scores(const GatherParams& P, int64_t task, void* scratch) {
  dispatch_dtype(P.dtype, [&](auto type) {
    ScratchAllocator allocator(scratch);
    GatherScratch<decltype(type)> task_scratch(P, allocator);
    gather_scores_task(P, GatherTask(P, task), task_scratch);
  });
}

}  // namespace smartbird::SMARTBIRD_ISA

#endif  // SMARTBIRD_GATHER_INL_H_
