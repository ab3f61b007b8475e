// Runs CUDA kernels on the CPU: the kernels' sources are compiled by a C++ compiler against the
// headers in include/, and every CUDA thread becomes a fiber.
//
// A block's threads run one at a time, each until it waits for others (a barrier, a shuffle, a
// matrix multiplication) or ends; in what order is chosen by SMARTBIRD_EMULATION_ORDER: `forward`
// (the default), `reverse` or `random[:seed]`. What is right in every order needs no luck on a GPU.
//
// Found, and thrown from the launch as std::runtime_error with the threads' places: barriers and
// warp collectives that not all threads reach, or reach at different places; shuffles from lanes
// that take no part; misaligned vector accesses through __ldg and __stcs; writes beyond shared
// memory; failed device checks. Shared memory starts as NaN. Under ThreadSanitizer a fiber is a
// thread and only barriers order memory, so races are found, a missing __syncwarp among them.
// Not modelled: fast-math, the order of mma's additions, the memory model between blocks, time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>
#include <string>

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) noexcept  // NOLINT: as in CUDA
      : x(x_), y(y_), z(z_) {}
};

namespace emulation {

constexpr int kWarpSize = 32;
using Where = std::source_location;

struct Launch {
  dim3 grid, block;
  size_t shared_bytes;
  std::function<void()> body;  // one thread of the kernel
};

// Runs all blocks; throws std::runtime_error at the first fault.
void run(const Launch& launch);

// Where the running thread is.
struct Position {
  uint3 thread, block;
  dim3 block_dim, grid_dim;
  int lane;
};
extern Position position;

// Dynamic shared memory of the running block.
void* shared_memory();

// Ends the launch; `message` becomes the exception.
[[noreturn]] void fail(const std::string& message);

// Every thread of the block waits here; returns whether `predicate` held for any.
bool meet_block(bool predicate, const char* what, Where where);

// The lanes of `mask` wait here for each other; the last to come calls combine(slots, mask), where
// slots[l] is what lane l passed. With `orders_memory`, what a lane wrote before is seen by the
// others after.
using Combine = void (*)(void* const slots[kWarpSize], uint32_t mask);
void meet_warp(uint32_t mask, void* slot, Combine combine, bool orders_memory, const char* what,
               Where where);

void check_aligned(const void* p, size_t bytes, const char* what, Where where);

// d += a b of m16n8k16 with the fragments of PTX ISA 9.7.14.5.8, "Matrix Fragments for
// mma.m16n8k16 with floating point type".
enum class Float16Kind { kBFloat16, kFloat16 };
void mma_m16n8k16(Float16Kind kind, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                  Where where);

float from_bfloat16(uint16_t bits);
uint16_t to_bfloat16(float x);
float from_float16(uint16_t bits);
uint16_t to_float16(float x);

}  // namespace emulation
