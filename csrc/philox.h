// Counter-based random numbers, one source for host and device: Philox4x32-10 of Salmon et al.,
// "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). A number is a pure function of (seed,
// offset, stream, sequence, head, position, draw), so neither tiling, threads nor the place in a
// call ever change a result.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define SMARTBIRD_HOST_DEVICE __host__ __device__
#else
#define SMARTBIRD_HOST_DEVICE
#endif

namespace smartbird {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;  // round multipliers
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;  // key increments
constexpr int kPhiloxRounds = 10;

struct PhiloxKey {
  uint32_t lo, hi;
};

struct PhiloxBlock {
  uint32_t word[4];
};

// Streams of one seed that must not overlap.
enum PhiloxStream : uint32_t { kSampleStream = 0, kDropoutStream = 1, kArrivalStream = 2 };

SMARTBIRD_HOST_DEVICE static inline PhiloxBlock philox4x32(PhiloxBlock counter, PhiloxKey key) {
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t p0 = uint64_t{kPhiloxM0} * counter.word[0];
    const uint64_t p1 = uint64_t{kPhiloxM1} * counter.word[2];
    counter = {
        {static_cast<uint32_t>(p1 >> 32) ^ counter.word[1] ^ key.lo, static_cast<uint32_t>(p1),
         static_cast<uint32_t>(p0 >> 32) ^ counter.word[3] ^ key.hi, static_cast<uint32_t>(p0)}};
    key.lo += kPhiloxW0;
    key.hi += kPhiloxW1;
  }
  return counter;
}

// The key of a stream: seed and offset are 64 bits each, a Philox key is 64, so the offset is mixed
// in by one block.
SMARTBIRD_HOST_DEVICE static inline PhiloxKey philox_key(uint64_t seed, uint64_t offset,
                                                         PhiloxStream stream) {
  const PhiloxBlock counter{{static_cast<uint32_t>(offset), static_cast<uint32_t>(offset >> 32),
                             static_cast<uint32_t>(stream), 0}};
  const PhiloxKey key{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  const PhiloxBlock mixed = philox4x32(counter, key);
  return {mixed.word[0], mixed.word[1]};
}

// Where the numbers of one row live: block `n` of the row at `position` in `head` is philox4x32(
// philox_counter(head, position, n), key), with the key of its sequence, see visible.h.
SMARTBIRD_HOST_DEVICE static inline PhiloxBlock philox_counter(int64_t head, int64_t position,
                                                               uint32_t block) {
  return {{block, static_cast<uint32_t>(position), static_cast<uint32_t>(head),
           static_cast<uint32_t>(static_cast<uint64_t>(position) >> 32)}};
}

// Draws of a row are numbered so that 16 blocks give 64 draws word by word, as vector code
// makes them: draw d is word d / 16 % 4 of block d / 64 * 16 + d % 16.
constexpr int kDrawsPerChunk = 64;

// Uniform in [0, 1): on a grid of 2^-24 in float, of 2^-32 in double.
SMARTBIRD_HOST_DEVICE static inline float uniform_float(uint32_t bits) {
  return static_cast<float>(bits >> 8) * 0x1p-24f;
}

SMARTBIRD_HOST_DEVICE static inline double uniform_double(uint32_t bits) {
  return static_cast<double>(bits) * 0x1p-32;
}

}  // namespace smartbird
