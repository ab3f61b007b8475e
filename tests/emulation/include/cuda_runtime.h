// Stands in for CUDA's header where kernels run on the CPU, see ../emulation.h: the part of CUDA
// that the kernels and their launchers use, under CUDA's names.
#pragma once

#include <math.h>

#include <atomic>
#include <bit>
#include <cstring>
#include <type_traits>
#include <utility>

#include "../emulation.h"

#define SMARTBIRD_EMULATED

// NOLINTBEGIN(bugprone-reserved-identifier): the names are CUDA's

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

inline const uint3& threadIdx = emulation::position.thread;
inline const uint3& blockIdx = emulation::position.block;
inline const dim3& blockDim = emulation::position.block_dim;
inline const dim3& gridDim = emulation::position.grid_dim;

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// ---- barriers, votes, shuffles ------------------------------------------------------------------

inline void __syncthreads(emulation::Where where = emulation::Where::current()) {
  emulation::meet_block(false, "__syncthreads", where);
}
inline int __syncthreads_or(int predicate, emulation::Where where = emulation::Where::current()) {
  return emulation::meet_block(predicate != 0, "__syncthreads_or", where);
}
inline void __syncwarp(unsigned mask = 0xFFFFFFFFU,
                       emulation::Where where = emulation::Where::current()) {
  emulation::meet_warp(mask, nullptr, [](void* const*, uint32_t) {}, true, "__syncwarp", where);
}

namespace emulation {

struct Vote {
  bool predicate;
  uint32_t ballot;
};

inline uint32_t vote(uint32_t mask, bool predicate, const char* what, Where where) {
  Vote mine{predicate, 0};
  meet_warp(
      mask, &mine,
      [](void* const slots[kWarpSize], uint32_t lanes) {
        uint32_t ballot = 0;
        for (int l = 0; l < kWarpSize; ++l)
          if ((lanes >> l & 1) != 0 && static_cast<Vote*>(slots[l])->predicate) ballot |= 1U << l;
        for (int l = 0; l < kWarpSize; ++l)
          if ((lanes >> l & 1) != 0) static_cast<Vote*>(slots[l])->ballot = ballot;
      },
      false, what, where);
  return mine.ballot;
}

struct Exchange {
  uint64_t in, out;
  int source;
  bool missing;
};

template <typename T>
T exchange(uint32_t mask, T x, int source, const char* what, Where where) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable_v<T>);
  Exchange mine{0, 0, source, false};
  std::memcpy(&mine.in, &x, sizeof(T));
  meet_warp(
      mask, &mine,
      [](void* const slots[kWarpSize], uint32_t lanes) {
        for (int l = 0; l < kWarpSize; ++l) {
          if ((lanes >> l & 1) == 0) continue;
          auto* to = static_cast<Exchange*>(slots[l]);
          to->missing = (lanes >> to->source & 1) == 0;
          if (!to->missing) to->out = static_cast<Exchange*>(slots[to->source])->in;
        }
      },
      false, what, where);
  if (mine.missing) fail(std::string("emulation: ") + what + " from a lane that takes no part");
  T out;
  std::memcpy(&out, &mine.out, sizeof(T));
  return out;
}

}  // namespace emulation

inline unsigned __ballot_sync(unsigned mask, int predicate,
                              emulation::Where where = emulation::Where::current()) {
  return emulation::vote(mask, predicate != 0, "__ballot_sync", where);
}
inline int __any_sync(unsigned mask, int predicate,
                      emulation::Where where = emulation::Where::current()) {
  return emulation::vote(mask, predicate != 0, "__any_sync", where) != 0;
}
inline unsigned __match_any_sync(unsigned mask, int x,
                                 emulation::Where where = emulation::Where::current()) {
  emulation::Exchange mine{static_cast<uint64_t>(static_cast<uint32_t>(x)), 0, 0, false};
  emulation::meet_warp(
      mask, &mine,
      [](void* const slots[emulation::kWarpSize], uint32_t lanes) {
        for (int l = 0; l < emulation::kWarpSize; ++l)
          for (int m = 0; (lanes >> l & 1) != 0 && m < emulation::kWarpSize; ++m) {
            auto* own = static_cast<emulation::Exchange*>(slots[l]);
            if ((lanes >> m & 1) != 0 && static_cast<emulation::Exchange*>(slots[m])->in == own->in)
              own->out |= uint64_t{1} << m;
          }
      },
      false, "__match_any_sync", where);
  return static_cast<unsigned>(mine.out);
}
template <typename T>
T __shfl_sync(unsigned mask, T x, int source,
              emulation::Where where = emulation::Where::current()) {
  return emulation::exchange(mask, x, source & 31, "__shfl_sync", where);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T x, int lanes,
                  emulation::Where where = emulation::Where::current()) {
  return emulation::exchange(mask, x, emulation::position.lane ^ lanes, "__shfl_xor_sync", where);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T x, int lanes,
                 emulation::Where where = emulation::Where::current()) {
  const int lane = emulation::position.lane;
  return emulation::exchange(mask, x, lane < lanes ? lane : lane - lanes, "__shfl_up_sync", where);
}

// ---- memory -------------------------------------------------------------------------------------

template <typename T>
T __ldg(const T* p, emulation::Where where = emulation::Where::current()) {
  emulation::check_aligned(p, sizeof(T), "__ldg", where);
  return *p;
}
template <typename T>
void __stcs(T* p, T x, emulation::Where where = emulation::Where::current()) {
  emulation::check_aligned(p, sizeof(T), "__stcs", where);
  *p = x;
}

template <typename T>
T atomicAdd(T* p, T x) {
  return std::atomic_ref<T>(*p).fetch_add(x, std::memory_order_relaxed);
}
// On a GPU, too, the four additions are atomic each, not together.
inline void atomicAdd(float4* p, float4 x, emulation::Where where = emulation::Where::current()) {
  emulation::check_aligned(p, sizeof(float4), "atomicAdd", where);
  atomicAdd(&p->x, x.x);
  atomicAdd(&p->y, x.y);
  atomicAdd(&p->z, x.z);
  atomicAdd(&p->w, x.w);
}
template <typename T>
T atomicOr(T* p, T x) {
  return std::atomic_ref<T>(*p).fetch_or(x, std::memory_order_relaxed);
}

// ---- arithmetic ---------------------------------------------------------------------------------

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }
inline int __clz(unsigned x) { return x == 0 ? 32 : __builtin_clz(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline float __fmaf_rn(float x, float y, float z) { return __builtin_fmaf(x, y, z); }
inline float __fadd_rn(float x, float y) { return x + y; }

// ---- host ---------------------------------------------------------------------------------------

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorNoKernelImageForDevice = 209 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline const char* cudaGetErrorString(cudaError_t) { return "error of the emulation"; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
// A device of few multiprocessors, so that small problems take both ways of sharing the work.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? 4 : 0;
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) {
  return cudaSuccess;
}
template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               Args&&... args) {
  emulation::run(
      {config->gridDim, config->blockDim, config->dynamicSmemBytes, [&] { kernel(args...); }});
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  std::memset(p, value, bytes);
  return cudaSuccess;
}

// NOLINTEND(bugprone-reserved-identifier)
