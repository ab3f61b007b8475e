// The emulation held to what CUDA and PTX say of it, and shown to find planted bugs.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

int failures = 0;

#define CHECK(condition)                                                           \
  do {                                                                             \
    if (!(condition)) {                                                            \
      ++failures;                                                                  \
      std::fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition); \
    }                                                                              \
  } while (false)

constexpr const char* kOrders[] = {"forward", "reverse", "random:7"};

template <typename F>
void run(unsigned blocks, unsigned threads, size_t shared_bytes, F&& body) {
  emulation::run({dim3(blocks), dim3(threads), shared_bytes, body});
}

// What the launch was ended by; empty where nothing was found.
template <typename F>
std::string fault(unsigned threads, size_t shared_bytes, F&& body) {
  try {
    run(1, threads, shared_bytes, body);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

bool contains(const std::string& text, const char* part) {
  return text.find(part) != std::string::npos;
}

template <typename F>
void in_every_order(F&& f) {
  for (const char* order : kOrders) {
    setenv("SMARTBIRD_EMULATION_ORDER", order, 1);
    f();
  }
  setenv("SMARTBIRD_EMULATION_ORDER", "forward", 1);
}

// ---- right programs -----------------------------------------------------------------------------

void test_barrier_and_shared_memory() {
  std::vector<float> out(3 * 96);
  run(3, 96, 96 * sizeof(float), [&] {
    auto* shared = static_cast<float*>(emulation::shared_memory());
    CHECK(shared[threadIdx.x] != shared[threadIdx.x] || threadIdx.x != 0);  // NaN before
    shared[threadIdx.x] = static_cast<float>(blockIdx.x * 1000 + threadIdx.x);
    __syncthreads();
    out[blockIdx.x * blockDim.x + threadIdx.x] = shared[95 - threadIdx.x];
  });
  for (unsigned b = 0; b < 3; ++b)
    for (unsigned t = 0; t < 96; ++t)
      CHECK(out[b * 96 + t] == static_cast<float>(b * 1000 + 95 - t));
}

void test_warp_collectives() {
  std::vector<int> failed(64);
  run(1, 64, 0, [&] {
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
    const unsigned all = 0xFFFFFFFFU;
    int& wrong = failed[threadIdx.x];
    wrong += __shfl_sync(all, 100 * warp + lane, 5) != 100 * warp + 5;
    wrong += __shfl_sync(all, lane, (lane * 7) % 32) != (lane * 7) % 32;
    wrong += __shfl_xor_sync(all, lane, 9) != (lane ^ 9);
    wrong += __shfl_up_sync(all, lane, 3) != (lane < 3 ? lane : lane - 3);
    wrong += __shfl_sync(all, lane * 0.5, 31) != 15.5;
    wrong += __ballot_sync(all, lane % 3 == 0) != 0x49249249U;
    wrong += __match_any_sync(all, lane % 16) != 0x10001U << lane % 16;
    wrong += __any_sync(all, lane == 20 && warp == 1) != warp;
    if (lane < 8) wrong += __ballot_sync(0xFF, lane > 3) != 0xF0U;  // part of a warp
  });
  for (const int wrong : failed) CHECK(wrong == 0);
}

void test_atomics_and_votes_of_a_block() {
  float sum = 0;
  int voted = 0;
  run(5, 64, 0, [&] {
    atomicAdd(&sum, 1.0F);
    if (__syncthreads_or(threadIdx.x == 63 && blockIdx.x == 2) != 0) atomicAdd(&voted, 1);
    if (__syncthreads_or(0) != 0) atomicAdd(&voted, 1);
  });
  CHECK(sum == 5 * 64);
  CHECK(voted == 64);
}

// Fragments as PTX ISA 9.7.14.5.8 lays them out, filled here from whole matrices.
template <typename Half, typename Convert>
void check_mma(emulation::Float16Kind kind, Convert&& convert) {
  int a[16][16], b[16][8];
  for (int r = 0; r < 16; ++r)
    for (int c = 0; c < 16; ++c) a[r][c] = (r * 5 + c * 3) % 13 - 6;
  for (int r = 0; r < 16; ++r)
    for (int c = 0; c < 8; ++c) b[r][c] = (r * 7 + c * 11) % 9 - 4;
  std::vector<int> wrong(32);
  run(1, 32, 0, [&] {
    const int lane = static_cast<int>(threadIdx.x), group = lane / 4, pair = lane % 4 * 2;
    const auto pack = [&](int low, int high) {
      return static_cast<uint32_t>(convert(static_cast<float>(low)).bits) |
             static_cast<uint32_t>(convert(static_cast<float>(high)).bits) << 16;
    };
    const uint32_t fa[4] = {pack(a[group][pair], a[group][pair + 1]),
                            pack(a[group + 8][pair], a[group + 8][pair + 1]),
                            pack(a[group][pair + 8], a[group][pair + 9]),
                            pack(a[group + 8][pair + 8], a[group + 8][pair + 9])};
    const uint32_t fb[2] = {pack(b[pair][group], b[pair + 1][group]),
                            pack(b[pair + 8][group], b[pair + 9][group])};
    float d[4] = {1, 2, 3, 4};
    emulation::mma_m16n8k16(kind, d, fa, fb, emulation::Where::current());
    for (int i = 0; i < 4; ++i) {
      const int row = group + (i < 2 ? 0 : 8), col = pair + i % 2;
      int want = i + 1;
      for (int k = 0; k < 16; ++k) want += a[row][k] * b[k][col];
      wrong[threadIdx.x] += d[i] != static_cast<float>(want);
    }
  });
  for (const int count : wrong) CHECK(count == 0);
}

void test_mma() {
  check_mma<__nv_bfloat16>(emulation::Float16Kind::kBFloat16, __float2bfloat16);
  check_mma<__half>(emulation::Float16Kind::kFloat16, __float2half);
}

void test_16_bit_numbers() {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const auto x = static_cast<uint16_t>(bits);
    const float half = emulation::from_float16(x), brain = emulation::from_bfloat16(x);
    if (half == half) CHECK(emulation::to_float16(half) == x);
    if (brain == brain) CHECK(emulation::to_bfloat16(brain) == x);
  }
  CHECK(emulation::to_float16(65519.0F) == 0x7BFF);  // the largest number, then infinity
  CHECK(emulation::to_float16(65520.0F) == 0x7C00);
  CHECK(emulation::to_float16(1.0F + 0x1p-11F) == 0x3C00);  // ties to even
  CHECK(emulation::to_float16(1.0F + 3 * 0x1p-11F) == 0x3C02);
  CHECK(emulation::to_bfloat16(1.0F + 0x1p-8F) == 0x3F80);
  CHECK(emulation::to_bfloat16(1.0F + 3 * 0x1p-8F) == 0x3F82);
}

// ---- planted bugs -------------------------------------------------------------------------------

// Reads a neighbour's value without a barrier: in one order the neighbour has not written yet.
[[maybe_unused]] bool right_without_barrier(int distance) {
  std::vector<float> out(64);
  run(1, 64, 64 * sizeof(float), [&] {
    auto* shared = static_cast<float*>(emulation::shared_memory());
    shared[threadIdx.x] = 1.0F;
    out[threadIdx.x] = shared[(threadIdx.x + static_cast<unsigned>(distance)) % 64];
  });
  for (const float x : out)
    if (x != 1.0F) return false;
  return true;
}

[[maybe_unused]] void test_missing_barrier_is_found() {
  CHECK(!right_without_barrier(1));
  setenv("SMARTBIRD_EMULATION_ORDER", "reverse", 1);
  CHECK(!right_without_barrier(63));
  setenv("SMARTBIRD_EMULATION_ORDER", "forward", 1);
}

[[maybe_unused]] void test_write_beyond_shared_memory_is_found() {
  CHECK(contains(fault(32, 32 * sizeof(float),
                       [] {
                         // volatile: the write is what is tested
                         auto* shared = static_cast<volatile float*>(emulation::shared_memory());
                         shared[threadIdx.x + 1] = 0;
                       }),
                 "beyond its 128 bytes"));
}

void test_misaligned_vector_access_is_found() {
  alignas(16) static float memory[12];
  CHECK(contains(fault(1, 0, [] { __ldg(reinterpret_cast<const uint4*>(memory + 1)); }),
                 "misaligned __ldg"));
  CHECK(contains(fault(1, 0, [] { __stcs(reinterpret_cast<uint4*>(memory + 2), uint4{}); }),
                 "misaligned __stcs"));
  CHECK(fault(1, 0, [] { __ldg(reinterpret_cast<const uint4*>(memory + 4)); }).empty());
}

void test_divergent_barrier_is_found() {
  const std::string skipped = fault(64, 0, [] {
    if (threadIdx.x != 40) __syncthreads();
  });
  CHECK(contains(skipped, "63 (first 0) in __syncthreads at test_emulation.cpp:"));
  CHECK(contains(skipped, "1 (first 40) ended"));
  const std::string another = fault(64, 0, [] {
    if (threadIdx.x < 32)  // NOLINT(bugprone-branch-clone): two places are what is tested
      __syncthreads();
    else
      __syncthreads();
  });
  CHECK(contains(another, "32 (first 0) in __syncthreads"));
  CHECK(contains(another, "32 (first 32) in __syncthreads"));
}

void test_divergent_shuffle_is_found() {
  CHECK(contains(fault(32, 0,
                       [] {
                         if (threadIdx.x < 16) __shfl_xor_sync(0xFFFFFFFFU, 1, 1);
                       }),
                 "in __shfl_xor_sync"));
  CHECK(contains(fault(32, 0,
                       [] {
                         if (threadIdx.x < 16) __shfl_sync(0xFFFFU, 1, 20);
                       }),
                 "takes no part"));
  CHECK(contains(fault(16, 0, [] { __syncwarp(); }), "divergent"));
}

void test_device_check_ends_the_launch() {
  CHECK(fault(64, 0, [] {
          if (threadIdx.x == 50) emulation::fail("what was wrong");
          __syncthreads();
        }) == "what was wrong");
  CHECK(fault(64, 0, [] { __syncthreads(); }).empty());  // the next launch is none the worse
}

}  // namespace

int main(int argc, char** argv) {
  // Bugs for the sanitizers to find: each is run alone, because it ends the program.
  const std::string planted = argc > 1 ? argv[1] : "";
  if (planted == "overrun") {
    run(1, 32, 32 * sizeof(float), [] {
      // volatile: the read, which leaves no trace, is what is tested
      const auto* shared = static_cast<const volatile float*>(emulation::shared_memory());
      static_cast<void>(shared[threadIdx.x + 1]);
    });
    return 0;
  }
  if (planted == "race") {
    run(1, 32, 32 * sizeof(int), [] {
      auto* shared = static_cast<int*>(emulation::shared_memory());
      shared[threadIdx.x] = static_cast<int>(threadIdx.x);
      __shfl_sync(0xFFFFFFFFU, 0, 0);  // lanes meet, but memory is not ordered: no __syncwarp
      if (shared[31 - threadIdx.x] < -1) std::abort();
    });
    return 0;
  }
  if (!planted.empty()) {
    std::fprintf(stderr, "no such bug: %s\n", planted.c_str());
    return 2;
  }
  in_every_order([] {
    test_barrier_and_shared_memory();
    test_warp_collectives();
    test_atomics_and_votes_of_a_block();
    test_mma();
  });
  test_16_bit_numbers();
  // A sanitizer would end the program at the first of these.
#if !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__)
  test_missing_barrier_is_found();
  test_write_beyond_shared_memory_is_found();
#endif
  test_misaligned_vector_access_is_found();
  test_divergent_barrier_is_found();
  test_divergent_shuffle_is_found();
  test_device_check_ends_the_launch();
  return failures == 0 ? 0 : 1;
}
