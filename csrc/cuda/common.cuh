// What all CUDA kernels share. The only file with inline PTX, and, with the emulation of tests/,
// the only one that knows of it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cassert>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../params.h"
#include "../philox.h"
#include "../visible.h"

// Stops the kernel where the data is wrong, as PyTorch's own indexing does. `message` names what.
#ifdef SMARTBIRD_EMULATED
#define SMARTBIRD_DEVICE_CHECK(condition, message) \
  do {                                             \
    if (!(condition)) emulation::fail(message);    \
  } while (false)
#else
#define SMARTBIRD_DEVICE_CHECK(condition, message) assert((condition) && (message))
#endif

namespace smartbird::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;
constexpr float kInf = __builtin_inff();
constexpr double kLn2 = 0.6931471805599453;

// ---- types --------------------------------------------------------------------------------------

using bfloat16 = __nv_bfloat16;
using float16 = __half;

// What sums of T are kept in.
template <typename T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ __forceinline__ float to_acc(float x) { return x; }
__device__ __forceinline__ double to_acc(double x) { return x; }
__device__ __forceinline__ float to_acc(bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_acc(float16 x) { return __half2float(x); }

template <typename T>
__device__ __forceinline__ T from_acc(acc_t<T> x) {
  if constexpr (std::is_same_v<T, bfloat16>)
    return __float2bfloat16(x);
  else if constexpr (std::is_same_v<T, float16>)
    return __float2half(x);
  else
    return x;
}

// Calls f(T{}) with the type that `dtype` names.
template <typename F>
void dispatch_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(float{});
    case DType::kFloat64:
      return f(double{});
    case DType::kBFloat16:
      return f(bfloat16{});
    case DType::kFloat16:
      return f(float16{});
  }
}

template <typename T>
__host__ __device__ __forceinline__ T min_of(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
__host__ __device__ __forceinline__ T max_of(T a, T b) {
  return a < b ? b : a;
}
__host__ __device__ __forceinline__ int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// inf in place of NaN, which comparisons forget: the largest of such numbers is the same in
// whatever order they come, and is -inf only where all are.
template <typename A>
__device__ __forceinline__ A nan_to_inf(A x) {
  return x == x ? x : static_cast<A>(kInf);
}

__device__ __forceinline__ float exp2_of(float x) { return exp2f(x); }
__device__ __forceinline__ double exp2_of(double x) { return exp2(x); }
__device__ __forceinline__ float log2_of(float x) { return log2f(x); }
__device__ __forceinline__ double log2_of(double x) { return log2(x); }
// 2^x as the special function unit makes it, to about two units in the last place; what is below
// the least normal number is 0.
__device__ __forceinline__ float exp2_approx(float x) {
#ifdef SMARTBIRD_EMULATED
  const float y = exp2f(x);
  return y < 0x1p-126f ? 0.0f : y;
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}
template <typename A>
__device__ __forceinline__ A exp_of(A x) {
  return exp2_of(x * static_cast<A>(kLog2e));
}

// ---- memory -------------------------------------------------------------------------------------

constexpr int kVectorBytes = 16;  // the widest access of one lane

// `n` neighbouring elements in one access.
template <typename T, int n>
struct Pack {
  T x[n];
};

template <typename T, int n>
__device__ __forceinline__ Pack<T, n> load_pack(const T* p) {
  Pack<T, n> pack;
  if constexpr (n == 1) {
    pack.x[0] = __ldg(p);
  } else if constexpr (n * sizeof(T) == 16) {
    const uint4 bits = __ldg(reinterpret_cast<const uint4*>(p));
    memcpy(&pack, &bits, sizeof(bits));
  } else {
    static_assert(n * sizeof(T) == 8);
    const uint2 bits = __ldg(reinterpret_cast<const uint2*>(p));
    memcpy(&pack, &bits, sizeof(bits));
  }
  return pack;
}

// Past the caches: what a kernel writes it does not read again.
template <typename T, int n>
__device__ __forceinline__ void store_pack(T* p, const Pack<T, n>& pack) {
  if constexpr (n == 1) {
    *p = pack.x[0];
  } else {
    static_assert(n * sizeof(T) == 16);
    uint4 bits;
    memcpy(&bits, &pack, sizeof(bits));
    __stcs(reinterpret_cast<uint4*>(p), bits);
  }
}

// The kernel's dynamic shared memory.
template <typename T>
__device__ __forceinline__ T* shared_memory() {
#ifdef SMARTBIRD_EMULATED
  return static_cast<T*>(emulation::shared_memory());
#else
  extern __shared__ uint4 smartbird_shared_memory[];
  return reinterpret_cast<T*>(smartbird_shared_memory);
#endif
}

// ---- warps --------------------------------------------------------------------------------------

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x) % kWarpSize; }
__device__ __forceinline__ int warp_id() { return static_cast<int>(threadIdx.x) / kWarpSize; }

// threadIdx.x, read anew: a compiler keeps what follows from the other in registers for as long as
// the kernel runs.
__device__ __forceinline__ unsigned fresh_thread_id() {
#ifdef SMARTBIRD_EMULATED
  return threadIdx.x;
#else
  unsigned id;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(id));
  return id;
#endif
}

// Every lane gets op over the `width` neighbouring lanes it is one of; or, from `stride` on, over
// the lanes that are a multiple of `stride` away.
template <int width = kWarpSize, int stride = 1, typename A, typename Op>
__device__ __forceinline__ A reduce_lanes(A x, Op&& op) {
#pragma unroll
  for (int lanes = stride; lanes < width; lanes *= 2)
    x = op(x, __shfl_xor_sync(kAllLanes, x, lanes));
  return x;
}
template <int width = kWarpSize, int stride = 1, typename A>
__device__ __forceinline__ A sum_lanes(A x) {
  return reduce_lanes<width, stride>(x, [](A a, A b) { return a + b; });
}
template <int width = kWarpSize, int stride = 1, typename A>
__device__ __forceinline__ A max_lanes(A x) {
  return reduce_lanes<width, stride>(x, [](A a, A b) { return max_of(a, b); });
}

// Inclusive running sum over the lanes of a warp.
template <typename A>
__device__ __forceinline__ A scan_lanes(A x) {
#pragma unroll
  for (int lanes = 1; lanes < kWarpSize; lanes *= 2) {
    const A before = __shfl_up_sync(kAllLanes, x, lanes);
    x += lane_id() < lanes ? A{0} : before;
  }
  return x;
}

// ---- tensor cores -------------------------------------------------------------------------------

// d += a b for a [16, 16] and b [16, 8] of T, d [16, 8] of float, spread over a warp as PTX ISA
// 9.7.14.5.8 lays down: with g = lane / 4 and t = lane % 4, d holds (g, 2t), (g, 2t + 1),
// (g + 8, 2t), (g + 8, 2t + 1).
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
  static_assert(std::is_same_v<T, bfloat16> || std::is_same_v<T, float16>);
#ifdef SMARTBIRD_EMULATED
  emulation::mma_m16n8k16(std::is_same_v<T, bfloat16> ? emulation::Float16Kind::kBFloat16
                                                      : emulation::Float16Kind::kFloat16,
                          d, a, b, emulation::Where::current());
#else
  if constexpr (std::is_same_v<T, bfloat16>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// ---- atomics ------------------------------------------------------------------------------------

// p[i] += x[i], each addition atomic; four floats at once where the architecture can. p is aligned
// to 4 elements where n is a multiple of 4.
template <int n, typename A>
__device__ __forceinline__ void atomic_add(A* p, const A (&x)[n]) {
#if defined(SMARTBIRD_EMULATED) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900)
  if constexpr (std::is_same_v<A, float> && n % 4 == 0) {
#pragma unroll
    for (int i = 0; i < n; i += 4)
      atomicAdd(reinterpret_cast<float4*>(p + i), make_float4(x[i], x[i + 1], x[i + 2], x[i + 3]));
  } else
#endif
  {
#pragma unroll
    for (int i = 0; i < n; ++i) atomicAdd(p + i, x[i]);
  }
}

// ---- random numbers -----------------------------------------------------------------------------

__device__ __forceinline__ PhiloxKey read_philox_key(const int64_t* device_seed,
                                                     PhiloxStream stream) {
  return philox_key(static_cast<uint64_t>(device_seed[0]), static_cast<uint64_t>(device_seed[1]),
                    stream);
}

// Draw `n` of (head, position) by the key of a sequence, in the numbering of philox.h.
__device__ __forceinline__ uint32_t philox_draw(PhiloxKey key, int64_t head, int64_t position,
                                                uint32_t n) {
  constexpr uint32_t kBlocks = kDrawsPerChunk / 4;
  const uint32_t block = n / kDrawsPerChunk * kBlocks + n % kBlocks;
  const uint32_t word = n / kBlocks % 4;
  const PhiloxBlock x = philox4x32(philox_counter(head, position, block), key);
  return word == 0 ? x.word[0] : (word == 1 ? x.word[1] : (word == 2 ? x.word[2] : x.word[3]));
}

// ---- launching ----------------------------------------------------------------------------------

// Dynamic shared memory that a block may ask for on every architecture.
constexpr size_t kMaxSharedBytes = size_t{99} << 10;

// Queues kernel<<<blocks, threads, shared_bytes, stream>>>(params); throws std::runtime_error where
// that fails, which does not include errors of the running kernel. `name` is for the message, which
// begins with "smartbird: " only where the caller's arguments are to blame.
template <typename Params>
void launch(const char* name, void (*kernel)(Params), int64_t blocks, int threads,
            size_t shared_bytes, cudaStream_t stream, const Params& params) {
  if (blocks == 0) return;
  if (blocks > INT32_MAX)
    throw std::runtime_error(std::string("smartbird: too many queries or keys for one launch of ") +
                             name);
  constexpr size_t kDefaultLimit = size_t{48} << 10;  // of shared memory, unless asked for
  cudaError_t error = cudaSuccess;
  // The same for every launch of a kernel: the attribute is shared by all threads and graphs.
  if (shared_bytes > kDefaultLimit)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(kMaxSharedBytes));
  if (error == cudaSuccess) {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    error = cudaLaunchKernelEx(&config, kernel, params);
  }
  if (error == cudaSuccess) return;
  int device = 0, major = 0, minor = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  throw std::runtime_error(std::string("smartbird could not launch ") + name + " on sm_" +
                           std::to_string(10 * major + minor) + " (built for " +
                           SMARTBIRD_CUDA_ARCHS + "): " + cudaGetErrorString(error));
}

}  // namespace smartbird::cuda
