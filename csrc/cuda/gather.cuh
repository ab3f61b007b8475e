// What the gather kernels share: how a warp reads the rows that a query's indices name.
//
// A warp has one query. Its slots come 32 at a time, one to a lane; a gathered row is spread over a
// group of kLanes lanes, 16 bytes to each, so that 32 / kLanes rows are read at once, and several
// such reads are in flight before the first is needed. Group g goes through the slots of its own
// lanes, g * kLanes, g * kLanes + 1, ...
#pragma once

#include "common.cuh"
#include "launch.h"

namespace smartbird::cuda {

constexpr int kGatherThreads = 128;
constexpr int kGatherWarps = kGatherThreads / kWarpSize;

// A row of up to kLanes * kChunks * kVec elements: lane l of its group holds the elements
// (c * kLanes + l) * kVec + e.
template <typename T_, int kVec_, int kLanes_, int kChunks_>
struct RowLayout {
  using T = T_;
  using A = acc_t<T>;
  static constexpr int kVec = kVec_, kLanes = kLanes_, kChunks = kChunks_;
  static constexpr int kElements = kVec * kChunks;  // of one lane
  static constexpr int kRowElements = kElements * kLanes;
  static constexpr int kGroups = kWarpSize / kLanes;
  // Rows read before the first is used: some 64 bytes in flight per lane, few enough registers.
  static constexpr int kInFlight = kChunks * kVec * sizeof(T) <= 16 ? 4 : (kChunks <= 2 ? 2 : 1);
  // On a multiprocessor at least: 128 registers to a thread, 168 where rows come element by
  // element.
  static constexpr int kBlocks = kVec > 1 ? 4 : 3;
};

// One lane's part of a row.
template <typename L>
struct RowPart {
  typename L::A x[L::kElements];
};

template <typename L>
__device__ __forceinline__ RowPart<L> zero_part() {
  RowPart<L> part;
#pragma unroll
  for (int e = 0; e < L::kElements; ++e) part.x[e] = 0;
  return part;
}

// Where chunk c of this lane begins in a row.
template <typename L>
__device__ __forceinline__ int chunk_begin(int c) {
  return (c * L::kLanes + lane_id() % L::kLanes) * L::kVec;
}

// The lane's part of a row of `size` elements, zeros beyond; all zeros where not `present`, and
// then nothing is read. A lane beyond a row's end reads nothing.
template <typename L>
__device__ __forceinline__ RowPart<L> load_part(const typename L::T* row, int size, bool present) {
  RowPart<L> part = zero_part<L>();
#pragma unroll
  for (int c = 0; c < L::kChunks; ++c) {
    const int d = chunk_begin<L>(c);
    if (present && d < size) {
      const auto pack = load_pack<typename L::T, L::kVec>(row + d);
#pragma unroll
      for (int e = 0; e < L::kVec; ++e) part.x[c * L::kVec + e] = to_acc(pack.x[e]);
    }
  }
  return part;
}

template <typename L>
__device__ __forceinline__ void store_part(const RowPart<L>& part, typename L::A factor, int size,
                                           typename L::T* row) {
#pragma unroll
  for (int c = 0; c < L::kChunks; ++c) {
    const int d = chunk_begin<L>(c);
    if (d >= size) continue;
    Pack<typename L::T, L::kVec> pack;
#pragma unroll
    for (int e = 0; e < L::kVec; ++e)
      pack.x[e] = from_acc<typename L::T>(part.x[c * L::kVec + e] * factor);
    store_pack(row + d, pack);
  }
}

// Adds up the parts that the groups hold of the same row.
template <typename L>
__device__ __forceinline__ void sum_groups(RowPart<L>* part) {
#pragma unroll
  for (int e = 0; e < L::kElements; ++e) part->x[e] = sum_lanes<kWarpSize, L::kLanes>(part->x[e]);
}

// The rows of one (batch, head) of a strided tensor.
template <typename T>
struct Rows {
  const T* base;
  int64_t stride;
  int size;  // elements in a row

  __device__ __forceinline__ const T* operator[](int64_t row) const { return base + row * stride; }
};

template <typename T>
__device__ __forceinline__ Rows<T> head_rows(const void* x, const int64_t (&stride)[3], int64_t b,
                                             int64_t h, int64_t size) {
  return {static_cast<const T*>(x) + b * stride[0] + h * stride[1], stride[2],
          static_cast<int>(size)};
}

// Query i of head h of batch b; `number` counts all of them.
struct GatherRow {
  int64_t number;
  int b, h, i;
};

__device__ __forceinline__ GatherRow gather_row(const GatherParams& p, int64_t number) {
  return {number, static_cast<int>(number / (p.H * p.N)), static_cast<int>(number / p.N % p.H),
          static_cast<int>(number % p.N)};
}

__device__ __forceinline__ int64_t key_head(const GatherParams& p, const GatherRow& at) {
  return at.h / (p.H / p.H_kv);
}

// The key in a slot; -1 in empty slots and beyond the last.
__device__ __forceinline__ int load_key(const GatherParams& p, const GatherRow& at, int64_t slot) {
  if (slot >= p.K) return -1;
  const int key =
      __ldg(p.indices + at.b * p.indices_stride[0] + at.h / (p.H / p.H_i) * p.indices_stride[1] +
            at.i * p.indices_stride[2] + slot);
  SMARTBIRD_DEVICE_CHECK(key >= -1 && key < p.M,
                         "smartbird: indices holds a value outside [-1, M)");
  return key;
}

// The first of the slots (as lanes) that this lane's group goes through.
template <typename L>
__device__ __forceinline__ int first_slot_of_group() {
  return lane_id() / L::kLanes * L::kLanes;
}

// x . rows[key] of each lane's own key; 0 where the key is -1.
template <typename L>
__device__ __forceinline__ typename L::A gather_dots(const RowPart<L>& x,
                                                     const Rows<typename L::T>& rows, int key) {
  using A = typename L::A;
  A mine = 0;
#pragma unroll 1  // kInFlight is how much is unrolled
  for (int s = 0; s < L::kLanes; s += L::kInFlight) {
    RowPart<L> row[L::kInFlight];
#pragma unroll
    for (int f = 0; f < L::kInFlight; ++f) {
      const int k = __shfl_sync(kAllLanes, key, first_slot_of_group<L>() + s + f);
      row[f] = load_part<L>(rows[k], rows.size, k >= 0);
    }
#pragma unroll
    for (int f = 0; f < L::kInFlight; ++f) {
      A dot = 0;
#pragma unroll
      for (int e = 0; e < L::kElements; ++e) dot += x.x[e] * row[f].x[e];
      dot = sum_lanes<L::kLanes>(dot);
      if (lane_id() % L::kLanes == s + f) mine = dot;
    }
  }
  return mine;
}

// out += the sum over the group's slots of weight * rows[key]. Rows of weight 0 are not read:
// whatever they hold, NaN too, must not count.
template <typename L>
__device__ __forceinline__ void gather_accumulate(typename L::A weight,
                                                  const Rows<typename L::T>& rows, int key,
                                                  RowPart<L>* out) {
  using A = typename L::A;
#pragma unroll 1  // kInFlight is how much is unrolled
  for (int s = 0; s < L::kLanes; s += L::kInFlight) {
    RowPart<L> row[L::kInFlight];
    A w[L::kInFlight];
#pragma unroll
    for (int f = 0; f < L::kInFlight; ++f) {
      const int slot = first_slot_of_group<L>() + s + f;
      w[f] = __shfl_sync(kAllLanes, weight, slot);
      row[f] = load_part<L>(rows[__shfl_sync(kAllLanes, key, slot)], rows.size, w[f] != 0);
    }
#pragma unroll
    for (int f = 0; f < L::kInFlight; ++f)
#pragma unroll
      for (int e = 0; e < L::kElements; ++e) out->x[e] += w[f] * row[f].x[e];
  }
}

// Scaled score plus bias; -inf where there is no key or the bias is -inf.
template <typename A>
__device__ __forceinline__ A finish_logit(const GatherParams& p, const GatherRow& at, int64_t slot,
                                          int key, A dot) {
  if (key < 0) return -static_cast<A>(kInf);
  const A score = dot * static_cast<A>(p.scale);
  if (p.bias == nullptr) return score;
  const A bias = static_cast<const A*>(
      p.bias)[at.b * p.bias_stride[0] + at.h / (p.H / p.H_bias) * p.bias_stride[1] +
              at.i * p.bias_stride[2] + slot * p.bias_stride[3]];
  return bias == -static_cast<A>(kInf) ? bias : score + bias;
}

// Where the random numbers of a query's dropout live.
struct DropoutRow {
  PhiloxKey key;
  int head;
  int64_t position;
};

__device__ __forceinline__ DropoutRow dropout_row(const GatherParams& p, const GatherRow& at) {
  if (!(p.dropout_p > 0)) return {};
  const Visible& v = p.visible;
  const Sequence sequence = sequence_at(v, v.queries.of_row(at.b, at.i));
  return {sequence_key(read_philox_key(p.device_seed, kDropoutStream), sequence),
          static_cast<int>(v.first_head * (p.H / p.H_i)) + at.h,
          position_of(v, sequence, at.i - sequence.first_query)};
}

// 0 where dropout takes the slot, else 1 / (1 - p).
template <typename A>
__device__ __forceinline__ A dropout_factor(const GatherParams& p, const DropoutRow& row,
                                            int64_t slot) {
  const uint32_t bits = philox_draw(row.key, row.head, row.position, static_cast<uint32_t>(slot));
  if (uniform_float(bits) < static_cast<float>(p.dropout_p) || p.dropout_p >= 1) return 0;
  return static_cast<A>(1 / (1 - p.dropout_p));
}

// ---- choice of the layout (host) ----------------------------------------------------------------

// Whether rows of x [*, *, *, size] can be read 16 bytes at a time.
inline bool rows_are_vectors(const void* x, const int64_t (&stride)[3], int64_t b, int64_t h,
                             int64_t n, int64_t size, int64_t element_bytes) {
  const auto whole = [&](int64_t elements, int64_t extent) {
    return extent <= 1 || elements * element_bytes % kVectorBytes == 0;
  };
  return reinterpret_cast<uintptr_t>(x) % kVectorBytes == 0 && whole(size, 2) &&
         whole(stride[0], b) && whole(stride[1], h) && whole(stride[2], n);
}

// Calls f(RowLayout) with the narrowest layout that holds rows of p.D and p.Dv elements. With
// `vectors` they are read 16 bytes at a time, else element by element.
template <typename T, typename F>
void dispatch_layout(const GatherParams& p, bool vectors, F&& f) {
  const int64_t size = max_of(p.D, p.Dv);
  if (size > kMaxHeadDim)
    throw std::runtime_error("smartbird: head dims of more than " + std::to_string(kMaxHeadDim) +
                             " are not supported on CUDA, got " + std::to_string(size));
  constexpr int kVec = kVectorBytes / sizeof(T);
  if constexpr (!std::is_same_v<T, double>) {  // float64 is for tests: one layout is enough
    if (vectors) {
      if (size <= 4 * kVec) return f(RowLayout<T, kVec, 4, 1>{});
      if (size <= 8 * kVec) return f(RowLayout<T, kVec, 8, 1>{});
      if (size <= 16 * kVec) return f(RowLayout<T, kVec, 16, 1>{});
      if (size <= 32 * kVec) return f(RowLayout<T, kVec, 32, 1>{});
      if constexpr (kMaxHeadDim > 32 * kVec) return f(RowLayout<T, kVec, 32, 2>{});
    }
  }
  f(RowLayout<T, 1, 32, kMaxHeadDim / 32>{});
}

// dispatch_layout by the dtype, strides and alignment of q, k and v.
template <typename F>
void dispatch_gather(const GatherParams& p, bool more_vectors, F&& f) {
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    const bool vectors =
        more_vectors && rows_are_vectors(p.q, p.q_stride, p.B, p.H, p.N, p.D, sizeof(T)) &&
        rows_are_vectors(p.k, p.k_stride, p.B, p.H_kv, p.M, p.D, sizeof(T)) &&
        (p.Dv == 0 || rows_are_vectors(p.v, p.v_stride, p.B, p.H_kv, p.M, p.Dv, sizeof(T)));
    dispatch_layout<T>(p, vectors, f);
  });
}

}  // namespace smartbird::cuda
