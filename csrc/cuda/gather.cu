// Attention of each query over its own gathered keys: forward.
#include "gather.cuh"

namespace smartbird::cuda {
namespace {

// q [B, H, N, D], k [B, H_kv, M, D], indices [B, H_i, N, K] -> out [B, H, N, K]: the scaled scores
// of each query's keys, -inf in empty slots.
template <typename L>
__global__ void __launch_bounds__(kGatherThreads, L::kBlocks)
    gather_scores_kernel(const GatherParams p) {
  using T = typename L::T;
  const int64_t number = int64_t{blockIdx.x} * kGatherWarps + warp_id();
  if (number >= p.B * p.H * p.N) return;
  const GatherRow at = gather_row(p, number);
  const auto k = head_rows<T>(p.k, p.k_stride, at.b, key_head(p, at), p.D);
  const auto q_rows = head_rows<T>(p.q, p.q_stride, at.b, at.h, p.D);
  const RowPart<L> q = load_part<L>(q_rows[at.i], q_rows.size, true);
  T* out = static_cast<T*>(p.out) + number * p.K;
  for (int64_t slot = lane_id(); slot - lane_id() < p.K; slot += kWarpSize) {
    const int key = load_key(p, at, slot);
    const auto logit = finish_logit(p, at, slot, key, gather_dots<L>(q, k, key));
    if (slot < p.K) out[slot] = from_acc<T>(logit);
  }
}

// Softmax and its product with values over some of a query's slots, not yet normalised.
template <typename L>
struct PartialAttention {
  typename L::A largest;  // logit, inf where one is NaN; all lanes alike
  typename L::A sum;      // of exp(logit - largest); all lanes alike
  RowPart<L> out;         // of exp(logit - largest) * values, before sum_groups
};

// The slots of the tiles first_tile, first_tile + step, ...
template <typename L>
__device__ __forceinline__ PartialAttention<L> attend(const GatherParams& p, const GatherRow& at,
                                                      int first_tile, int step) {
  using T = typename L::T;
  using A = typename L::A;
  const int64_t h_kv = key_head(p, at);
  const auto k = head_rows<T>(p.k, p.k_stride, at.b, h_kv, p.D);
  const auto v = head_rows<T>(p.v, p.v_stride, at.b, h_kv, p.Dv);
  const auto q_rows = head_rows<T>(p.q, p.q_stride, at.b, at.h, p.D);
  const RowPart<L> q = load_part<L>(q_rows[at.i], q_rows.size, true);
  const bool dropout = p.dropout_p > 0;
  const DropoutRow random = dropout_row(p, at);

  const A none = -static_cast<A>(kInf);
  PartialAttention<L> part{none, 0, zero_part<L>()};
  A sum = 0;  // of this lane's slots
  for (int64_t tile = first_tile; tile * kWarpSize < p.K; tile += step) {
    const int64_t slot = tile * kWarpSize + lane_id();
    const int key = load_key(p, at, slot);
    const A logit = finish_logit(p, at, slot, key, gather_dots<L>(q, k, key));
    const A largest = max_of(part.largest, max_lanes(nan_to_inf(logit)));
    if (largest == none) continue;
    const A rescale = exp_of(part.largest - largest);
    part.largest = largest;
    A weight = exp_of(logit - largest);
    sum = sum * rescale + weight;
    if (dropout && weight != 0) weight *= dropout_factor<A>(p, random, slot);
#pragma unroll
    for (int e = 0; e < L::kElements; ++e) part.out.x[e] *= rescale;
    gather_accumulate<L>(weight, v, key, &part.out);
  }
  part.sum = sum_lanes(sum);
  return part;
}

// q [B, H, N, D], k [B, H_kv, M, D], v [B, H_kv, M, Dv], indices [B, H_i, N, K] -> out [B, H, N,
// Dv], lse [B, H, N]. kWarps warps share the slots of a query: one where there are queries enough
// to fill the device, all of a block where there are few.
template <typename L, int kWarps>
__global__ void __launch_bounds__(kGatherThreads, L::kBlocks)
    gather_attention_kernel(const GatherParams p) {
  using T = typename L::T;
  using A = typename L::A;
  const int64_t number = int64_t{blockIdx.x} * (kGatherWarps / kWarps) + warp_id() / kWarps;
  if (number >= p.B * p.H * p.N) return;  // with kWarps > 1 the whole block or none of it
  const GatherRow at = gather_row(p, number);
  PartialAttention<L> part = attend<L>(p, at, warp_id() % kWarps, kWarps);
  sum_groups(&part.out);

  if constexpr (kWarps > 1) {
    struct Shared {
      A largest[kWarps], sum[kWarps], out[kWarps][L::kRowElements];
    };
    Shared& shared = *shared_memory<Shared>();
    const int in_group = lane_id() % L::kLanes;
    if (lane_id() < L::kLanes) {
#pragma unroll
      for (int e = 0; e < L::kElements; ++e)
        shared.out[warp_id()][e * L::kLanes + in_group] = part.out.x[e];
    }
    if (lane_id() == 0) {
      shared.largest[warp_id()] = part.largest;
      shared.sum[warp_id()] = part.sum;
    }
    __syncthreads();
    if (warp_id() > 0) return;
    for (int w = 1; w < kWarps; ++w) part.largest = max_of(part.largest, shared.largest[w]);
    part.sum = 0;
    part.out = zero_part<L>();
    for (int w = 0; w < kWarps; ++w) {
      if (shared.sum[w] == 0) continue;
      const A rescale = exp_of(shared.largest[w] - part.largest);
      part.sum += rescale * shared.sum[w];
#pragma unroll
      for (int e = 0; e < L::kElements; ++e)
        part.out.x[e] += rescale * shared.out[w][e * L::kLanes + in_group];
    }
  }

  const A normalizer = part.sum == 0 ? A{0} : 1 / part.sum;
  if (lane_id() < L::kLanes)
    store_part(part.out, normalizer, static_cast<int>(p.Dv),
               static_cast<T*>(p.out) + number * p.Dv);
  if (lane_id() == 0)
    static_cast<A*>(p.lse)[number] = part.largest + log2_of(part.sum) * static_cast<A>(kLn2);
}

}  // namespace

void run_gather_scores(const GatherParams& params, cudaStream_t stream) {
  dispatch_gather(params, true, [&](auto layout) {
    launch("gather_scores", gather_scores_kernel<decltype(layout)>,
           ceil_div(params.B * params.H * params.N, kGatherWarps), kGatherThreads, 0, stream,
           params);
  });
}

void run_gather_attention(const GatherParams& params, cudaStream_t stream) {
  const int64_t rows = params.B * params.H * params.N;
  int device = 0, multiprocessors = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  // Fewer queries than two blocks per multiprocessor have warps, and slots for several warps.
  const bool share = rows < 2 * kGatherWarps * multiprocessors && params.K > kWarpSize;
  dispatch_gather(params, true, [&](auto layout) {
    using L = decltype(layout);
    if (share)
      launch("gather_attention", gather_attention_kernel<L, kGatherWarps>, rows, kGatherThreads,
             kGatherWarps * (2 + L::kRowElements) * sizeof(typename L::A), stream, params);
    else
      launch("gather_attention", gather_attention_kernel<L, 1>, ceil_div(rows, kGatherWarps),
             kGatherThreads, 0, stream, params);
  });
}

}  // namespace smartbird::cuda
