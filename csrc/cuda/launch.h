// The CUDA kernels' launchers, free of torch. Each queues its work on a stream and returns; none
// waits for the device. They throw std::runtime_error where a kernel cannot be launched or a size
// is beyond what it takes.
#pragma once

#include <cuda_runtime.h>

#include "../params.h"

namespace smartbird::cuda {

// Largest head dimension (of keys and of values) that the gather kernels take.
constexpr int64_t kMaxHeadDim = 256;
// Largest number of slots whose gradients a query keeps on chip; beyond, slot_grads is needed.
constexpr int64_t kMaxSharedSlots = 1024;

void run_gather_scores(const GatherParams& params, cudaStream_t stream);
void run_gather_attention(const GatherParams& params, cudaStream_t stream);

// dq and dbias, and either dk_sum and dv_sum or, where slot_grads is given, the gradients of each
// slot.
void run_gather_backward_queries(const GatherBackwardParams& params, cudaStream_t stream);
// keys [B, H_i, N * K] in ascending order -> key_start [B, H_i, M + 1]: where each key begins.
void run_find_key_starts(const GatherParams& params, const int32_t* keys, int64_t* key_start,
                         cudaStream_t stream);
// dk and dv from slot_grads, key_start and entries: deterministic.
void run_gather_backward_keys(const GatherBackwardParams& params, cudaStream_t stream);

// Bytes of params.scratch: so many for each block of threads that the device holds at once,
// whatever N and M are. Does not look at tensors.
int64_t sketch_sample_scratch_bytes(const SketchSampleParams& params);
// float64 must have been made float32.
void run_sketch_sample(const SketchSampleParams& params, cudaStream_t stream);

void run_dense_lse(const DenseParams& params, cudaStream_t stream);
void run_dense_mean(const DenseParams& params, cudaStream_t stream);

}  // namespace smartbird::cuda
