// Attention of each query over its own gathered keys, and the primitives its backward shares.
//
// What limits these kernels is where the gathered rows come from. A task therefore takes many
// queries of one (batch, key/value head) and goes through them phase by phase (all scores, then all
// softmaxes, then all sums of values), so that the cache holds either the keys or the values of one
// head, not both; and rows are fetched a few entries ahead. Ascending index rows are the fastest,
// any order is right.
#include <utility>

#include "philox-inl.h"
#include "scratch.h"
#include "vec.h"

#ifndef SMARTBIRD_GATHER_INL_H_
#define SMARTBIRD_GATHER_INL_H_

namespace smartbird::SMARTBIRD_ISA {

// Vectors of a row held in registers at once: half of the 16 that AVX2 has.
constexpr int kChunk = 8;

// Gathered rows scored together: enough that summing across lanes is cheap, few enough to stay in
// registers.
template <typename A>
constexpr int kGroup = kLanes<A> < 4 ? kLanes<A> : 4;

// How many entries ahead of its use a gathered row is fetched.
constexpr int64_t kPrefetchAhead = 8;

// A task gathers each row of its keys this many times, so that bringing them into the cache weighs
// little ...
constexpr int64_t kReuse = 8;
// Heads that share a list, and the keys too, take it in parts: a part's rows, of about this many
// bytes, are in the innermost cache when the second head reads them. (A head on its own takes the
// same parts: its sums must not depend on its neighbours.)
constexpr int64_t kPartBytes = 16384;
// ... within what scratch allows: so many slots, and so many lists. The fewest lists outweigh a
// task's start.
constexpr int64_t kMaxSlots = 65536, kMaxLists = 1024, kMinLists = 64;

template <typename A>
inline int64_t pad_to_vector(int64_t n) {
  return ceil_div(n, kLanes<A>) * kLanes<A>;
}

// The rows of one (batch, head) of a strided tensor.
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

// ---- gathered rows ------------------------------------------------------------------------------

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

// A chunk of a row in registers: C whole vectors, or for C = 0 the `left` elements before the row
// ends. bfloat16 comes as pairs of vectors of even and odd elements, half the work of two vectors
// in order: nothing to a dot product, and add_to() puts them back.
template <int C, typename T>
struct Chunk {
  using A = acc_t<T>;
  static constexpr int kSize = C == 0 ? 1 : C, L = kLanes<A>;
  static constexpr int kPaired = std::is_same_v<T, bfloat16> && L > 1 ? C / 2 * 2 : 0;
  Vec<A> v[kSize] = {};

  static Chunk load(const T* p, int64_t left) {
    Chunk x;
    if constexpr (C == 0) x.v[0] = load_partial(p, left);
    if constexpr (kPaired > 0)
      for (int c = 0; c < kPaired; c += 2) load_even_odd(p + c * L, &x.v[c], &x.v[c + 1]);
    for (int c = kPaired; c < C; ++c) x.v[c] = SMARTBIRD_ISA::load(p + c * L);
    return x;
  }
  static void prefetch(const T* p) {
    for (size_t byte = 0; byte < kSize * L * sizeof(T); byte += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(p) + byte);
  }
  void add_to(A* p) {
    if constexpr (kPaired > 0)
      for (int c = 0; c < kPaired; c += 2) interleave(&v[c], &v[c + 1]);
    for (int c = 0; c < kSize; ++c) store(p + c * L, SMARTBIRD_ISA::load(p + c * L) + v[c]);
  }
};

// Lane l of the result belongs to row keys[l % S]; the lanes of a row add up to its dot product
// with x. Summing across lanes so, S rows at a time, costs far fewer shuffles than row by row.
template <int S, int C, typename T>
inline Vec<acc_t<T>> dot_tree(const Chunk<C, T>& x, const Rows<T>& rows, int64_t d,
                              const int32_t* keys) {
  if constexpr (S == 1) {
    const auto row = Chunk<C, T>::load(rows[keys[0]] + d, rows.size - d);
    Vec<acc_t<T>> sum = x.v[0] * row.v[0];
    for (int c = 1; c < row.kSize; ++c) sum += x.v[c] * row.v[c];
    return sum;
  } else {
    return fold<S / 2>(dot_tree<S / 2>(x, rows, d, keys),
                       dot_tree<S / 2>(x, rows, d, keys + S / 2));
  }
}

// dots[j] = x . rows[keys[j]] for j < n; keys and dots are padded to whole groups, and keys may be
// fetched from up to kPrefetchAhead later.
template <typename T>
inline void gather_dots(const T* x, const Rows<T>& rows, const int32_t* __restrict keys, int64_t n,
                        acc_t<T>* __restrict dots) {
  using A = acc_t<T>;
  constexpr int G = kGroup<A>;
  if (rows.size == 0) fill(dots, n, A{0});
  for_each_chunk<A>(rows.size, [&](auto vectors, int64_t d) {
    using RowChunk = Chunk<decltype(vectors)::value, T>;
    const auto part = RowChunk::load(x + d, rows.size - d);
    for (int64_t j = 0; j < n; j += G) {
      for (int g = 0; g < G; ++g) RowChunk::prefetch(rows[keys[j + g + kPrefetchAhead]] + d);
      const Vec<A> sum = sum_groups<G>(dot_tree<G>(part, rows, d, keys + j));
      for (int g = 0; g < G; ++g) dots[j + g] = d == 0 ? sum[g] : dots[j + g] + sum[g];
    }
  });
}

// Sums of V vectors that run side by side: as many hide the latency of FMA.
constexpr int parallel_sums(int V) { return V < 3 ? 4 : (V < 6 ? 2 : 1); }

// out += sum_j weights[j] * rows[keys[j]] over j < n; out is padded to whole vectors, and keys may
// be fetched from up to kPrefetchAhead later.
template <typename T>
inline void gather_accumulate(const acc_t<T>* __restrict weights, const Rows<T>& rows,
                              const int32_t* __restrict keys, int64_t n, acc_t<T>* __restrict out) {
  for_each_chunk<acc_t<T>>(rows.size, [&](auto vectors, int64_t d) {
    using RowChunk = Chunk<decltype(vectors)::value, T>;
    constexpr int V = RowChunk::kSize;
    constexpr int U = parallel_sums(V);
    RowChunk sum[U];
    const auto add = [&](RowChunk& to, int64_t j) {
      const auto row = RowChunk::load(rows[keys[j]] + d, rows.size - d);
      RowChunk::prefetch(rows[keys[j + kPrefetchAhead]] + d);
      for (int c = 0; c < V; ++c) to.v[c] += row.v[c] * weights[j];
    };
    int64_t j = 0;
    for (; j + U <= n; j += U)
      for (int u = 0; u < U; ++u) add(sum[u], j + u);
    for (; j < n; ++j) add(sum[0], j);
    for (int u = 1; u < U; ++u)
      for (int c = 0; c < V; ++c) sum[0].v[c] += sum[u].v[c];
    sum[0].add_to(out + d);
  });
}

// gather_dots for H heads that gather the same keys: each row is read once for all of them. The
// sums are those of gather_dots to the last bit. Out of line, as its twin below: inlined, they made
// the loop of a head on its own, beside them, take a third longer.
template <int H, typename T>
__attribute__((noinline)) void gather_dots_together(const T* const (&x)[kGroup<acc_t<T>>],
                                                    const Rows<T>& rows,
                                                    const int32_t* __restrict keys, int64_t n,
                                                    acc_t<T>* const (&dots)[kGroup<acc_t<T>>]) {
  using A = acc_t<T>;
  static_assert(H <= 4 && kGroup<A> == 4);
  for (int g = 0; g < H && rows.size == 0; ++g) fill(dots[g], n, A{0});
  for_each_chunk<A>(rows.size, [&](auto vectors, int64_t d) {
    using RowChunk = Chunk<decltype(vectors)::value, T>;
    RowChunk part[H];
    for (int g = 0; g < H; ++g) part[g] = RowChunk::load(x[g] + d, rows.size - d);
    for (int64_t j = 0; j < n; ++j) {
      RowChunk::prefetch(rows[keys[j + kPrefetchAhead]] + d);
      const auto row = RowChunk::load(rows[keys[j]] + d, rows.size - d);
      Vec<A> sum[4] = {};
      for (int g = 0; g < H; ++g) {
        sum[g] = part[g].v[0] * row.v[0];
        for (int c = 1; c < row.kSize; ++c) sum[g] += part[g].v[c] * row.v[c];
      }
      const Vec<A> all = sum_groups<4>(fold<2>(fold<1>(sum[0], sum[1]), fold<1>(sum[2], sum[3])));
      for (int g = 0; g < H; ++g) dots[g][j] = d == 0 ? all[g] : dots[g][j] + all[g];
    }
  });
}

// gather_accumulate for H heads that gather the same keys, likewise.
template <int H, typename T>
__attribute__((noinline)) void gather_accumulate_together(
    const acc_t<T>* const (&weights)[kGroup<acc_t<T>>], const Rows<T>& rows,
    const int32_t* __restrict keys, int64_t n, acc_t<T>* const (&out)[kGroup<acc_t<T>>]) {
  using A = acc_t<T>;
  constexpr int L = kLanes<A>;
  for_each_chunk<A>(rows.size, [&](auto vectors, int64_t d) {
    using RowChunk = Chunk<decltype(vectors)::value, T>;
    constexpr int V = RowChunk::kSize;
    constexpr int U = parallel_sums(V);
    using Part = Chunk<V % 2 == 0 ? 2 : decltype(vectors)::value, T>;  // what registers hold
    for (int c = 0; c < V; c += Part::kSize) {
      const int64_t at = d + c * L;
      Part sum[H][U];
      const auto add = [&](int u, int64_t j) {
        const auto row = Part::load(rows[keys[j]] + at, rows.size - at);
        if (c == 0) RowChunk::prefetch(rows[keys[j + kPrefetchAhead]] + d);
        for (int g = 0; g < H; ++g)
          for (int i = 0; i < Part::kSize; ++i) sum[g][u].v[i] += row.v[i] * weights[g][j];
      };
      int64_t j = 0;
      for (; j + U <= n; j += U)
        for (int u = 0; u < U; ++u) add(u, j + u);
      for (; j < n; ++j) add(0, j);
      for (int g = 0; g < H; ++g) {
        for (int u = 1; u < U; ++u)
          for (int i = 0; i < Part::kSize; ++i) sum[g][0].v[i] += sum[g][u].v[i];
        sum[g][0].add_to(out[g] + at);
      }
    }
  });
}

// So many heads that share a list go together. Where vectors hold fewer than four elements every
// head goes alone.
template <typename A>
constexpr int kTogether = kGroup<A> == 4 ? 4 : 1;

// Calls f(integral_constant H) for up to kTogether heads.
template <typename A, typename F>
SMARTBIRD_INLINE void dispatch_heads(int64_t heads, F&& f) {
  if constexpr (kTogether<A> == 4) {
    if (heads == 4) return f(std::integral_constant<int, 4>{});
    if (heads == 3) return f(std::integral_constant<int, 3>{});
    if (heads == 2) return f(std::integral_constant<int, 2>{});
  }
  f(std::integral_constant<int, 1>{});
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

// ---- one query's slots --------------------------------------------------------------------------

// Query i of head h of batch b.
struct GatherRow {
  int64_t b, h, i;
};

inline const int32_t* row_indices(const GatherParams& P, GatherRow at) {
  const int64_t index_head = at.h / (P.H / P.H_i);
  return P.indices + at.b * P.indices_stride[0] + index_head * P.indices_stride[1] +
         (at.i - P.row_begin) * P.indices_stride[2];
}

// keys [capacity] from the row's indices; returns the number of slots up to the last that holds a
// key, and whether all hold one. The others borrow a key of the same row, so that no row is read
// that no index names.
inline int64_t load_keys(const GatherParams& P, GatherRow at, int64_t capacity, int32_t* keys,
                         bool* is_full) {
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
  *is_full = empty == 0;
  if (empty) {
    if (out_of_range)
      __atomic_store_n(P.error, static_cast<int32_t>(kIndexOutOfRange), __ATOMIC_RELAXED);
    const auto holds_key = [&](int64_t j) { return static_cast<uint32_t>(indices[j]) < M; };
    while (n > 0 && !holds_key(n - 1)) --n;
    int32_t borrowed = n > 0 ? indices[n - 1] : 0;
    for (int64_t j = n - 1; j >= 0; --j) keys[j] = borrowed = holds_key(j) ? indices[j] : borrowed;
  }
  fill(keys + n, capacity - n, n > 0 ? keys[n - 1] : 0);
  return n;
}

// logits[j] = scale * dots[j] + bias[j] in place for j < n; -inf in slots without a key, where the
// bias is -inf, and in the padding to whole vectors; is_full: no slot is without. `bias` is
// scratch. Returns the largest, inf where one is NaN.
template <typename A>
inline A finish_logits(const GatherParams& P, GatherRow at, int64_t n, bool is_full, A* bias,
                       A* logits) {
  const A none = -static_cast<A>(__builtin_inff()), scale = static_cast<A>(P.scale);
  Vec<A> largest = broadcast(none);
  if (is_full && P.bias == nullptr && n % kLanes<A> == 0) {  // the usual case
    for (int64_t j = 0; j < n; j += kLanes<A>) {
      const Vec<A> logit = load(logits + j) * scale;
      store(logits + j, logit);
      largest = max(largest, nan_to_inf(logit));
    }
    return reduce_max(largest);
  }

  const int32_t* indices = row_indices(P, at);
  const auto holds_key = [&](int64_t j) {
    return static_cast<uint32_t>(indices[j]) < static_cast<uint32_t>(P.M);
  };
  if (P.bias) {
    const A* row = static_cast<const A*>(P.bias) + at.b * P.bias_stride[0] +
                   at.h / (P.H / P.H_bias) * P.bias_stride[1] +
                   (at.i - P.row_begin) * P.bias_stride[2];
    for (int64_t j = 0; j < n; ++j) bias[j] = holds_key(j) ? row[j * P.bias_stride[3]] : none;
  } else {
    for (int64_t j = 0; j < n; ++j) bias[j] = holds_key(j) ? A{0} : none;
  }
  fill(bias + n, pad_to_vector<A>(n) - n, none);

  for (int64_t j = 0; j < n; j += kLanes<A>) {
    const Vec<A> b = load(bias + j);
    const Vec<A> logit = b == none ? broadcast(none) : load(logits + j) * scale + b;
    store(logits + j, logit);
    largest = max(largest, nan_to_inf(logit));
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
inline void dropout_factors(const GatherParams& P, GatherRow at, PhiloxKey stream, int64_t n,
                            A* factors) {
  const A kept = P.dropout_p < 1 ? static_cast<A>(1 / (1 - P.dropout_p)) : A{0};
  const float dropout_p = static_cast<float>(P.dropout_p);
  const Sequence sequence = sequence_at(P.visible, P.visible.queries.of_row(at.b, at.i));
  const PhiloxKey key = sequence_key(stream, sequence);
  const int64_t position = position_of(P.visible, sequence, at.i - sequence.first_query);
  const int64_t head = P.visible.first_head * (P.H / P.H_i) + at.h;
  uint32_t draws[kDrawsPerChunk];
  for (int64_t begin = 0; begin < n; begin += kDrawsPerChunk) {
    philox_chunk(key, head, position, static_cast<uint32_t>(begin / kDrawsPerChunk), draws);
    const int64_t count = min_of<int64_t>(n - begin, kDrawsPerChunk);
    for (int64_t j = 0; j < count; ++j)
      factors[begin + j] = uniform_float(draws[j]) >= dropout_p ? kept : A{0};
  }
}

// ---- tasks --------------------------------------------------------------------------------------

// Queries of one task that takes `heads` heads.
inline int64_t gather_queries_per_task(const GatherParams& P, int64_t heads) {
  const int64_t slots = max_of<int64_t>(P.K, 1);
  const int64_t wanted = min_of(max_of(kReuse * P.M / slots, kMinLists), kMaxLists);
  const int64_t lists = min_of(wanted, kMaxSlots / slots);
  return min_of(max_of<int64_t>(lists / heads, 1), max_of<int64_t>(P.N, 1));
}

inline int64_t heads_per_slice(const GatherParams& P) { return P.H / P.H_kv; }

// A block of queries of heads that share one (batch, key/value head).
struct GatherTask {
  int64_t b, h_kv, first_head, heads, begin, queries;

  // The heads [head_begin, head_end) of those that share keys. Neighbouring tasks share keys.
  GatherTask(const GatherParams& P, int64_t task, int64_t head_begin, int64_t head_end) {
    heads = head_end - head_begin;
    const int64_t step = gather_queries_per_task(P, heads),
                  blocks = ceil_div(P.row_end - P.row_begin, step), slice = task / blocks;
    b = slice / P.H_kv;
    h_kv = slice % P.H_kv;
    first_head = h_kv * heads_per_slice(P) + head_begin;
    begin = P.row_begin + task % blocks * step;
    queries = min_of(step, P.row_end - begin);
  }

  // Calls f(r, row) for all rows, r = 0, 1, ...
  template <typename F>
  void for_each_row(F&& f) const {
    int64_t r = 0;
    for (int64_t h = first_head; h < first_head + heads; ++h)
      for (int64_t i = begin; i < begin + queries; ++i) f(r++, GatherRow{b, h, i});
  }
};

// Slots of a part, whole vectors.
template <typename T>
inline int64_t part_slots(int64_t row_size) {
  constexpr int64_t L = kLanes<acc_t<T>>;
  const int64_t bytes = max_of<int64_t>(row_size, 1) * static_cast<int64_t>(sizeof(T));
  return max_of<int64_t>(kPartBytes / bytes / L, 1) * L;
}

// Heads of a task that share a list.
inline int64_t heads_per_list(const GatherParams& P) { return min_of(P.H / P.H_i, P.H / P.H_kv); }

inline int64_t row_number(const GatherParams& P, GatherRow at) {
  return (at.b * P.H + at.h) * P.N + at.i;
}

inline int64_t gather_num_tasks(const GatherParams& P) {
  return P.B * P.H_kv *
         ceil_div(P.row_end - P.row_begin, gather_queries_per_task(P, heads_per_slice(P)));
}

// The keys that each query of a task gathers.
struct GatherLists {
  int64_t capacity;  // slots of a list, padded to whole vectors
  int32_t* keys;     // [lists, capacity]
  int64_t* size;     // [lists]
  bool* is_full;     // [lists] every slot holds a key

  // Returns how many lists a task of `heads` heads may have.
  template <typename A>
  int64_t allocate(const GatherParams& P, int64_t heads, ScratchAllocator& scratch) {
    const int64_t lists = gather_queries_per_task(P, heads) * heads;
    capacity = pad_to_vector<A>(P.K);
    keys = scratch.take<int32_t>(lists * capacity + kPrefetchAhead);
    size = scratch.take<int64_t>(lists);
    is_full = scratch.take<bool>(lists);
    return lists;
  }
  void load(const GatherParams& P, const GatherTask& task) {
    int64_t lists = 0;
    task.for_each_row([&](int64_t r, GatherRow at) {
      size[r] = load_keys(P, at, capacity, keys + r * capacity, is_full + r);
      lists = r + 1;
    });
    fill(keys + lists * capacity, kPrefetchAhead, 0);
  }
};

// The slots [j, j + n) of one row or of up to kTogether rows: those of neighbouring heads that hold
// the same keys there.
struct GatherPart {
  GatherRow first;
  int64_t first_row, first_member, queries, heads, j, n;

  GatherRow at(int64_t g) const { return {first.b, first.h + g, first.i}; }
  int64_t row(int64_t g) const { return first_row + g * queries; }  // its number in the task
  int64_t member(int64_t g) const { return first_member + g; }  // its number among those that share
};

// Calls f(part) for all rows of a task in ascending parts of `slots` slots, the heads that share a
// list after each other or together; once at least for each row.
template <typename A, typename F>
inline void for_each_part(const GatherParams& P, const GatherTask& task, const GatherLists& lists,
                          int64_t slots, F&& f) {
  if (heads_per_list(P) == 1) {  // all that follows costs more than a tenth of such a head's time
    task.for_each_row([&](int64_t r, GatherRow at) {
      const int64_t size = lists.size[r];
      for (int64_t j = 0; j == 0 || j < size; j += slots)
        f(GatherPart{at, r, 0, task.queries, 1, j, min_of(slots, size - j)});
    });
    return;
  }
  const int64_t end_head = task.first_head + task.heads, sharing = P.H / P.H_i,
                first_end = (task.first_head / sharing + 1) * sharing;
  for (int64_t i = task.begin; i < task.begin + task.queries; ++i)
    for (int64_t first = task.first_head, end = first_end; first < end_head;
         first = end, end += sharing) {
      end = min_of(end, end_head);
      const auto row = [&](int64_t h) {
        return (h - task.first_head) * task.queries + i - task.begin;
      };
      int64_t longest = 0;
      for (int64_t h = first; h < end; ++h) longest = max_of(longest, lists.size[row(h)]);
      for (int64_t j = 0; j == 0 || j < longest; j += slots)
        for (int64_t h = first; h < end;) {
          const int64_t r = row(h), size = lists.size[r];
          GatherPart part{{task.b, h, i},         r, h - first, task.queries, 1, j,
                          min_of(slots, size - j)};
          const auto same = [&](int64_t other) {
            return lists.size[other] == size &&
                   std::memcmp(lists.keys + other * lists.capacity + j,
                               lists.keys + r * lists.capacity + j,
                               static_cast<size_t>(part.n) * sizeof(int32_t)) == 0;
          };
          if (j == 0 || j < size) {
            while (part.heads < kTogether<A> && h + part.heads < end && same(row(h + part.heads)))
              ++part.heads;
            f(part);
          }
          h += part.heads;
        }
    }
}

// dots [lists, capacity] of x_of(row) with the gathered keys of each row of a task.
template <typename T, typename RowOf>
inline void gather_all_dots(const GatherParams& P, const GatherTask& task, const GatherLists& lists,
                            const Rows<T>& rows, RowOf&& x_of, acc_t<T>* dots) {
  using A = acc_t<T>;
  for_each_part<A>(P, task, lists, part_slots<T>(rows.size), [&](const GatherPart& part) {
    const T* x[kGroup<A>] = {};
    A* to[kGroup<A>] = {};
    for (int64_t g = 0; g < part.heads; ++g) {
      x[g] = x_of(part.at(g));
      to[g] = dots + part.row(g) * lists.capacity + part.j;
    }
    const int32_t* keys = lists.keys + part.first_row * lists.capacity + part.j;
    dispatch_heads<A>(part.heads, [&](auto heads) {
      constexpr int H = decltype(heads)::value;
      if constexpr (H == 1)
        gather_dots(x[0], rows, keys, part.n, to[0]);
      else
        gather_dots_together<H>(x, rows, keys, part.n, to);
    });
  });
}

// Calls take(r, row, sum) with the sum of the gathered keys of each row of a task, weighted by
// weights [lists, capacity]. `sums` is scratch: [heads_per_list(P), row size in whole vectors].
template <typename T, typename Take>
inline void gather_all_sums(const GatherParams& P, const GatherTask& task, const GatherLists& lists,
                            const Rows<T>& rows, const acc_t<T>* weights, acc_t<T>* sums,
                            Take&& take) {
  using A = acc_t<T>;
  const int64_t padded = pad_to_vector<A>(rows.size);
  for_each_part<A>(P, task, lists, part_slots<T>(rows.size), [&](const GatherPart& part) {
    const A* from[kGroup<A>] = {};
    A* to[kGroup<A>] = {};
    for (int64_t g = 0; g < part.heads; ++g) {
      from[g] = weights + part.row(g) * lists.capacity + part.j;
      to[g] = sums + part.member(g) * padded;
      if (part.j == 0) fill(to[g], padded, A{0});
    }
    const int32_t* keys = lists.keys + part.first_row * lists.capacity + part.j;
    dispatch_heads<A>(part.heads, [&](auto heads) {
      constexpr int H = decltype(heads)::value;
      if constexpr (H == 1)
        gather_accumulate(from[0], rows, keys, part.n, to[0]);
      else
        gather_accumulate_together<H>(from, rows, keys, part.n, to);
    });
    if (part.j + part.n < lists.size[part.first_row]) return;
    for (int64_t g = 0; g < part.heads; ++g) take(part.row(g), part.at(g), to[g]);
  });
}

// ---- forward ------------------------------------------------------------------------------------

template <typename A>
struct GatherScratch {
  GatherLists lists;
  A* weights;     // [lists, capacity] first dot products, then logits, then weights
  A* normalizer;  // [lists]
  A* bias;        // [capacity] of one list
  A* factors;     // [capacity] of one list
  A* out;         // [heads that share a list, Dv]

  GatherScratch(const GatherParams& P, ScratchAllocator& scratch) {
    const int64_t count = lists.allocate<A>(P, heads_per_slice(P), scratch);
    weights = scratch.take<A>(count * lists.capacity);
    normalizer = scratch.take<A>(count);
    bias = scratch.take<A>(lists.capacity);
    factors = scratch.take<A>(lists.capacity);
    out = scratch.take<A>(heads_per_list(P) * pad_to_vector<A>(P.Dv));
  }
};

// dots [lists, capacity] of each query of a task with its gathered keys.
template <typename T>
inline void score_keys(const GatherParams& P, const GatherTask& task, const GatherLists& lists,
                       acc_t<T>* dots) {
  const auto k = head_rows<T>(P.k, P.k_stride, task.b, task.h_kv, P.D);
  const auto query = [&](GatherRow at) {
    return head_rows<T>(P.q, P.q_stride, at.b, at.h, P.D)[at.i];
  };
  gather_all_dots(P, task, lists, k, query, dots);
}

// q [D], k [M, D], v [M, Dv] -> out [Dv], lse of each query: softmax attention over its gathered
// keys.
template <typename T>
inline void gather_attention_task(const GatherParams& P, const GatherTask& task,
                                  PhiloxKey dropout_key, GatherScratch<acc_t<T>>& scratch) {
  using A = acc_t<T>;
  const A none = -static_cast<A>(__builtin_inff());
  GatherLists& lists = scratch.lists;
  lists.load(P, task);
  score_keys<T>(P, task, lists, scratch.weights);

  task.for_each_row([&](int64_t r, GatherRow at) {
    A* weights = scratch.weights + r * lists.capacity;
    A& lse = static_cast<A*>(P.lse)[row_number(P, at)];
    int64_t& n = lists.size[r];
    const A largest = finish_logits(P, at, n, lists.is_full[r], scratch.bias, weights);
    if (largest == none) {
      lse = none;
      scratch.normalizer[r] = 0;
      n = 0;
      return;
    }
    const A sum = exp_and_sum(weights, n, largest);
    lse = largest + log_of(sum);
    scratch.normalizer[r] = 1 / sum;
    if (P.dropout_p > 0) {
      dropout_factors(P, at, dropout_key, n, scratch.factors);
      for (int64_t j = 0; j < n; ++j) weights[j] *= scratch.factors[j];
    }
    n = drop_zeros(weights, lists.keys + r * lists.capacity, n);
  });

  const auto v = head_rows<T>(P.v, P.v_stride, task.b, task.h_kv, P.Dv);
  gather_all_sums(P, task, lists, v, scratch.weights, scratch.out,
                  [&](int64_t r, GatherRow at, const A* sum) {
                    store_row(sum, P.Dv, scratch.normalizer[r],
                              static_cast<T*>(P.out) + row_number(P, at) * P.Dv);
                  });
}

// q [D], k [M, D] -> out [K] of each query: the scaled scores of its gathered keys, -inf in empty
// slots.
template <typename T>
inline void gather_scores_task(const GatherParams& P, const GatherTask& task,
                               GatherScratch<acc_t<T>>& scratch) {
  using A = acc_t<T>;
  const GatherLists& lists = scratch.lists;
  scratch.lists.load(P, task);
  score_keys<T>(P, task, lists, scratch.weights);
  task.for_each_row([&](int64_t r, GatherRow at) {
    A* scores = scratch.weights + r * lists.capacity;
    T* out = static_cast<T*>(P.out) + row_number(P, at) * P.K;
    const int64_t n = lists.size[r];
    finish_logits(P, at, n, lists.is_full[r], scratch.bias, scores);
    store_row(scores, n, A{1}, out);
    fill(out + n, P.K - n, from_acc<T>(-static_cast<A>(__builtin_inff())));
  });
}

inline int64_t gather_scratch_bytes(const GatherParams& P) {
  int64_t bytes = 0;
  dispatch_dtype(P.dtype, [&](auto type) {
    ScratchAllocator allocator(nullptr);
    GatherScratch<acc_t<decltype(type)>>(P, allocator);
    bytes = allocator.bytes();
  });
  return bytes;
}

inline void gather_attention(const GatherParams& P, int64_t task, void* scratch) {
  const PhiloxKey dropout_key = philox_key(P.seed, P.offset, kDropoutStream);
  dispatch_dtype(P.dtype, [&](auto type) {
    using T = decltype(type);
    ScratchAllocator allocator(scratch);
    GatherScratch<acc_t<T>> task_scratch(P, allocator);
    gather_attention_task<T>(P, GatherTask(P, task, 0, heads_per_slice(P)), dropout_key,
                             task_scratch);
  });
}

inline void gather_scores(const GatherParams& P, int64_t task, void* scratch) {
  dispatch_dtype(P.dtype, [&](auto type) {
    using T = decltype(type);
    ScratchAllocator allocator(scratch);
    GatherScratch<acc_t<T>> task_scratch(P, allocator);
    gather_scores_task<T>(P, GatherTask(P, task, 0, heads_per_slice(P)), task_scratch);
  });
}

}  // namespace smartbird::SMARTBIRD_ISA

#endif  // SMARTBIRD_GATHER_INL_H_
