// Gradients of gather_attention and gather_scores.
//
// One kernel goes over queries: dq, dbias, and each slot's two numbers, the weight of its value and
// the gradient of its score. dk and dv then come by one of two ways: at once, by atomic additions,
// whose order is not fixed; or from a second kernel, over keys, that reads the slots' numbers
// through the inverse of the indices and always adds in the same order.
#include "gather.cuh"

namespace smartbird::cuda {
namespace {

// What a slot holds between the steps of a query, and slot_grads [.., 2] after.
template <typename A>
struct Slot {
  A weight;  // logit, then p * f: gradient of the value
  A dlogit;  // f * dout . v, then p * (f * dout . v - delta + dlse) * scale: gradient of q . k
};

// First step: each lane fills its slots with (logit, f * dout . v). Returns the largest logit.
template <typename L>
__device__ __forceinline__ typename L::A score_slots(const GatherBackwardParams& p,
                                                     const GatherRow& at, const RowPart<L>& q,
                                                     const RowPart<L>& dout,
                                                     const DropoutRow& random,
                                                     Slot<typename L::A>* slots) {
  using T = typename L::T;
  using A = typename L::A;
  const GatherParams& f = p.fwd;
  const auto k = head_rows<T>(f.k, f.k_stride, at.b, key_head(f, at), f.D);
  const auto v = head_rows<T>(f.v, f.v_stride, at.b, key_head(f, at), f.Dv);
  const bool need_dlogits = p.dq != nullptr || p.dbias != nullptr;
  const bool dropout = f.dropout_p > 0;
  A largest = -static_cast<A>(kInf);
  for (int64_t slot = lane_id(); slot - lane_id() < f.K; slot += kWarpSize) {
    const int key = load_key(f, at, slot);
    const A logit = finish_logit(f, at, slot, key, gather_dots<L>(q, k, key));
    A dweight = need_dlogits ? gather_dots<L>(dout, v, key) : A{0};
    // Zero times a value row of inf or NaN stays zero.
    if (dropout) {
      const A factor = dropout_factor<A>(f, random, slot);
      dweight = factor == 0 ? A{0} : factor * dweight;
    }
    largest = max_of(largest, nan_to_inf(logit));
    if (slot < f.K) slots[slot] = {logit, dweight};
  }
  return max_lanes(largest);
}

// Second step: from (logit, f * dout . v) to (p f, gradient of the logit). The softmax is made
// again rather than read: normalised here it sums to 1, so the difference of two nearly equal
// numbers keeps its digits.
template <typename A>
__device__ __forceinline__ void attention_slot_grads(const GatherBackwardParams& p,
                                                     const GatherRow& at, A largest,
                                                     const DropoutRow& random, Slot<A>* slots) {
  const GatherParams& f = p.fwd;
  const bool dropout = f.dropout_p > 0;
  A sum = 0, delta = 0;
  for (int64_t slot = lane_id(); slot < f.K; slot += kWarpSize) {
    const A weight = exp_of(slots[slot].weight - largest);
    sum += weight;
    delta += weight == 0 ? A{0} : weight * slots[slot].dlogit;
    slots[slot].weight = weight;
  }
  const A normalizer = 1 / sum_lanes(sum);
  const A dlse = p.dlse == nullptr ? A{0} : static_cast<const A*>(p.dlse)[at.number];
  const A shift = dlse - sum_lanes(delta) * normalizer;
  for (int64_t slot = lane_id(); slot < f.K; slot += kWarpSize) {
    // Exactly 0 in slots without a key, also where the row's normalizer is NaN.
    const A weight = slots[slot].weight == 0 ? A{0} : slots[slot].weight * normalizer;
    const A factor = dropout ? dropout_factor<A>(f, random, slot) : A{1};
    slots[slot].dlogit = weight == 0 ? A{0} : weight * (slots[slot].dlogit + shift);
    slots[slot].weight = weight * factor;
  }
}

// dk_sum and dv_sum of the group's slots, by atomic additions.
template <typename L>
__device__ __forceinline__ void scatter(const RowPart<L>& part, typename L::A factor, int size,
                                        typename L::A* row) {
  using A = typename L::A;
#pragma unroll
  for (int c = 0; c < L::kChunks; ++c) {
    const int d = chunk_begin<L>(c);
    if (d >= size) continue;
    A x[L::kVec];
#pragma unroll
    for (int e = 0; e < L::kVec; ++e) x[e] = part.x[c * L::kVec + e] * factor;
    atomic_add(row + d, x);
  }
}

// q [B, H, N, D], k [B, H_kv, M, D], v [B, H_kv, M, Dv], dout [B, H, N, Dv] -> dq, dbias, and
// dk_sum and dv_sum or slot_grads [B, H, N, K, 2]. One warp to a query. In the backward of
// gather_scores v is null and dout [B, H, N, K].
template <typename L>
__global__ void __launch_bounds__(kGatherThreads, L::kBlocks)
    gather_backward_queries_kernel(const GatherBackwardParams p) {
  using T = typename L::T;
  using A = typename L::A;
  const GatherParams& f = p.fwd;
  const int64_t number = int64_t{blockIdx.x} * kGatherWarps + warp_id();
  if (number >= f.B * f.H * f.N) return;
  const GatherRow at = gather_row(f, number);
  const int64_t h_kv = key_head(f, at);
  const auto k = head_rows<T>(f.k, f.k_stride, at.b, h_kv, f.D);
  const auto q_rows = head_rows<T>(f.q, f.q_stride, at.b, at.h, f.D);
  const RowPart<L> q = load_part<L>(q_rows[at.i], q_rows.size, true);
  Slot<A>* slots = p.slot_grads == nullptr ? shared_memory<Slot<A>>() + warp_id() * f.K
                                           : static_cast<Slot<A>*>(p.slot_grads) + number * f.K;
  RowPart<L> dout = zero_part<L>();
  if (f.Dv > 0) {
    dout =
        load_part<L>(static_cast<const T*>(p.dout) + number * f.Dv, static_cast<int>(f.Dv), true);
    const DropoutRow random = dropout_row(f, at);
    const A largest = score_slots<L>(p, at, q, dout, random, slots);
    if (largest == -static_cast<A>(kInf)) {
      for (int64_t slot = lane_id(); slot < f.K; slot += kWarpSize) slots[slot] = {0, 0};
    } else {
      attention_slot_grads(p, at, largest, random, slots);
    }
  } else {
    const T* dscores = static_cast<const T*>(p.dout) + number * f.K;
    for (int64_t slot = lane_id(); slot < f.K; slot += kWarpSize)
      slots[slot] = {0, load_key(f, at, slot) < 0 ? A{0} : to_acc(dscores[slot])};
  }

  // A lane has only read and written its own slots so far, and does so here.
  const A scale = static_cast<A>(f.scale);
  RowPart<L> dq = zero_part<L>();
  for (int64_t slot = lane_id(); slot - lane_id() < f.K; slot += kWarpSize) {
    const int key = load_key(f, at, slot);
    Slot<A> mine{0, 0};
    if (slot < f.K) {
      mine = slots[slot];
      if (p.dbias != nullptr) static_cast<A*>(p.dbias)[number * f.K + slot] = mine.dlogit;
      mine.dlogit *= scale;
      slots[slot] = mine;
    }
    if (p.dq != nullptr) gather_accumulate<L>(mine.dlogit, k, key, &dq);
    if (p.dk_sum == nullptr && p.dv_sum == nullptr) continue;
    for (int s = 0; s < L::kLanes; ++s) {
      const int source = first_slot_of_group<L>() + s;
      const int64_t row = (at.b * f.H_kv + h_kv) * f.M + __shfl_sync(kAllLanes, key, source);
      const A dlogit = __shfl_sync(kAllLanes, mine.dlogit, source);
      const A weight = __shfl_sync(kAllLanes, mine.weight, source);
      if (p.dk_sum != nullptr && dlogit != 0)
        scatter(q, dlogit, static_cast<int>(f.D), static_cast<A*>(p.dk_sum) + row * f.D);
      if (p.dv_sum != nullptr && weight != 0)
        scatter(dout, weight, static_cast<int>(f.Dv), static_cast<A*>(p.dv_sum) + row * f.Dv);
    }
  }
  if (p.dq == nullptr) return;
  sum_groups(&dq);
  if (lane_id() < L::kLanes)
    store_part(dq, A{1}, static_cast<int>(f.D), static_cast<T*>(p.dq) + number * f.D);
}

struct KeyStartParams {
  int64_t lists, M, slots;
  const int32_t* keys;  // [lists, slots] ascending
  int64_t* key_start;   // [lists, M + 1] out: how many come before each key
};

__global__ void __launch_bounds__(kGatherThreads) key_starts_kernel(const KeyStartParams p) {
  const int64_t at = int64_t{blockIdx.x} * kGatherThreads + threadIdx.x;
  if (at >= p.lists * (p.M + 1)) return;
  const int64_t key = at % (p.M + 1);
  const int32_t* keys = p.keys + at / (p.M + 1) * p.slots;
  int64_t low = 0, high = p.slots;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (keys[middle] < key)
      low = middle + 1;
    else
      high = middle;
  }
  p.key_start[at] = low;
}

// slot_grads [B, H, N, K, 2], key_start [B, H_i, M + 1], entries [B, H_i, N * K], q, dout -> dk
// [B, H_kv, M, D], dv [B, H_kv, M, Dv]. One block to a key: its groups take turns at the entries,
// so the order of additions is always the same.
template <typename L>
__global__ void __launch_bounds__(kGatherThreads, L::kBlocks)
    gather_backward_keys_kernel(const GatherBackwardParams p) {
  using T = typename L::T;
  using A = typename L::A;
  const GatherParams& f = p.fwd;
  const int64_t number = blockIdx.x;  // of the key
  const int64_t b = number / (f.H_kv * f.M), h_kv = number / f.M % f.H_kv, key = number % f.M;
  const int64_t group = f.H / f.H_kv;
  RowPart<L> dk = zero_part<L>(), dv = zero_part<L>();
  for (int64_t h = h_kv * group; h < (h_kv + 1) * group; ++h) {
    const int64_t list = b * f.H_i + h / (f.H / f.H_i);
    const int64_t begin = p.key_start[list * (f.M + 1) + key];
    const int64_t end = p.key_start[list * (f.M + 1) + key + 1];
    const int32_t* entries = p.entries + list * f.N * f.K;
    const auto* slots = static_cast<const Slot<A>*>(p.slot_grads) + (b * f.H + h) * f.N * f.K;
    const auto q = head_rows<T>(f.q, f.q_stride, b, h, f.D);
    const T* dout = static_cast<const T*>(p.dout) + (b * f.H + h) * f.N * f.Dv;
    for (int64_t e = begin + static_cast<int>(threadIdx.x) / L::kLanes; e < end;
         e += kGatherThreads / L::kLanes) {
      const int32_t entry = entries[e];
      const Slot<A> slot = slots[entry];
      const int64_t i = entry / f.K;
      if (p.dk != nullptr) {
        const auto row = load_part<L>(q[i], q.size, slot.dlogit != 0);
#pragma unroll
        for (int x = 0; x < L::kElements; ++x) dk.x[x] += slot.dlogit * row.x[x];
      }
      if (p.dv != nullptr) {
        const auto row = load_part<L>(dout + i * f.Dv, static_cast<int>(f.Dv), slot.weight != 0);
#pragma unroll
        for (int x = 0; x < L::kElements; ++x) dv.x[x] += slot.weight * row.x[x];
      }
    }
  }

  const auto finish = [&](RowPart<L>* part, int64_t size, void* out) {
    struct Shared {
      A x[kGatherWarps][L::kRowElements];
    };
    Shared& shared = *shared_memory<Shared>();
    const int in_group = lane_id() % L::kLanes;
    sum_groups(part);
    if (lane_id() < L::kLanes) {
#pragma unroll
      for (int x = 0; x < L::kElements; ++x)
        shared.x[warp_id()][x * L::kLanes + in_group] = part->x[x];
    }
    __syncthreads();
    if (warp_id() == 0 && lane_id() < L::kLanes) {
      for (int w = 1; w < kGatherWarps; ++w)
#pragma unroll
        for (int x = 0; x < L::kElements; ++x) part->x[x] += shared.x[w][x * L::kLanes + in_group];
      store_part(*part, A{1}, static_cast<int>(size), static_cast<T*>(out) + number * size);
    }
    __syncthreads();
  };
  if (p.dk != nullptr) finish(&dk, f.D, p.dk);
  if (p.dv != nullptr) finish(&dv, f.Dv, p.dv);
}

template <typename F>
void dispatch_backward(const GatherBackwardParams& p, F&& f) {
  const bool vectors = reinterpret_cast<uintptr_t>(p.dout) % kVectorBytes == 0;
  dispatch_gather(p.fwd, p.fwd.Dv == 0 || vectors, f);
}

}  // namespace

void run_gather_backward_queries(const GatherBackwardParams& params, cudaStream_t stream) {
  const GatherParams& f = params.fwd;
  if (f.B * f.H * f.N == 0) return;  // slot_grads is empty, too
  if (params.slot_grads == nullptr && f.K > kMaxSharedSlots)
    throw std::runtime_error("smartbird: slot_grads is needed where K exceeds " +
                             std::to_string(kMaxSharedSlots));
  dispatch_backward(params, [&](auto layout) {
    using L = decltype(layout);
    const size_t slots = params.slot_grads == nullptr ? static_cast<size_t>(f.K) : 0;
    launch("gather_backward_queries", gather_backward_queries_kernel<L>,
           ceil_div(f.B * f.H * f.N, kGatherWarps), kGatherThreads,
           kGatherWarps * slots * sizeof(Slot<typename L::A>), stream, params);
  });
}

void run_find_key_starts(const GatherParams& params, const int32_t* keys, int64_t* key_start,
                         cudaStream_t stream) {
  const KeyStartParams p{params.B * params.H_i, params.M, params.N * params.K, keys, key_start};
  launch("key_starts", key_starts_kernel, ceil_div(p.lists * (p.M + 1), kGatherThreads),
         kGatherThreads, 0, stream, p);
}

void run_gather_backward_keys(const GatherBackwardParams& params, cudaStream_t stream) {
  const GatherParams& f = params.fwd;
  dispatch_backward(params, [&](auto layout) {
    using L = decltype(layout);
    launch("gather_backward_keys", gather_backward_keys_kernel<L>, f.B * f.H_kv * f.M,
           kGatherThreads, kGatherWarps * L::kRowElements * sizeof(typename L::A), stream, params);
  });
}

}  // namespace smartbird::cuda
