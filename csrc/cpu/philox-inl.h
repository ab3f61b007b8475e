// Philox4x32-10 over a vector of counters.
#include "../philox.h"
#include "vec.h"

#ifndef SMARTBIRD_PHILOX_INL_H_
#define SMARTBIRD_PHILOX_INL_H_

namespace smartbird::SMARTBIRD_ISA {

// (high, low) halves of the 64-bit products a[l] * b.
inline void multiply_wide(VecU a, uint32_t b, VecU* high, VecU* low) {
#if defined(__AVX512F__)
  const __m512i x = bit_cast<__m512i>(a), y = _mm512_set1_epi32(static_cast<int>(b));
  const __m512i even = _mm512_mul_epu32(x, y), odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), y);
  *low = bit_cast<VecU>(_mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32)));
  *high = bit_cast<VecU>(_mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd));
#elif defined(__AVX2__)
  const __m256i x = bit_cast<__m256i>(a), y = _mm256_set1_epi32(static_cast<int>(b));
  const __m256i even = _mm256_mul_epu32(x, y), odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), y);
  *low = bit_cast<VecU>(_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA));
  *high = bit_cast<VecU>(_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA));
#else
  for (int l = 0; l < kLanes<float>; ++l) {
    const uint64_t product = uint64_t{a[l]} * b;
    (*low)[l] = static_cast<uint32_t>(product);
    (*high)[l] = static_cast<uint32_t>(product >> 32);
  }
#endif
}

// The blocks first, first + 1, ... of (head, position), one in each lane, word by word.
SMARTBIRD_INLINE void philox_blocks(PhiloxKey key, int64_t head, int64_t position, uint32_t first,
                                    VecU out[4]) {
  const PhiloxBlock counter = philox_counter(head, position, first);
  VecU c0 = bit_cast<VecU>(iota_int()) + counter.word[0], c1 = VecU{} + counter.word[1],
       c2 = VecU{} + counter.word[2], c3 = VecU{} + counter.word[3];
  for (int round = 0; round < kPhiloxRounds; ++round) {
    VecU high0, low0, high1, low1;
    multiply_wide(c0, kPhiloxM0, &high0, &low0);
    multiply_wide(c2, kPhiloxM1, &high1, &low1);
    c0 = high1 ^ c1 ^ key.lo;
    c1 = low1;
    c2 = high0 ^ c3 ^ key.hi;
    c3 = low0;
    key.lo += kPhiloxW0;
    key.hi += kPhiloxW1;
  }
  out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

// The draws 64 * chunk, ..., 64 * chunk + 63 of (head, position).
inline void philox_chunk(PhiloxKey key, int64_t head, int64_t position, uint32_t chunk,
                         uint32_t out[kDrawsPerChunk]) {
  constexpr int kBlocks = kDrawsPerChunk / 4;
  for (int b = 0; b < kBlocks; b += kLanes<float>) {
    VecU words[4];
    philox_blocks(key, head, position, chunk * kBlocks + static_cast<uint32_t>(b), words);
    for (int w = 0; w < 4; ++w) std::memcpy(out + w * kBlocks + b, &words[w], sizeof(words[w]));
  }
}

// Arrivals of Poisson processes of rate 1 for one (head, position): each is an Exp(1) variable and
// an independent uniform time in (0, 1). A block gives three: 22 bits of each of its first three
// words make an exponential, their 10 others and 10 of the fourth a time. Arrival n of a first take
// is of word n % 24 / 8 of block n / 24 * 8 + n % 8, whatever the vectors are; a second take goes
// on with the next whole step of blocks.
class ArrivalStream {
 public:
  // What n arrivals take of an array: whole vectors of blocks.
  static constexpr int64_t padded(int64_t n) { return ceil_div(n, kStep) * kStep; }

  ArrivalStream(PhiloxKey key, int64_t head, int64_t position)
      : key_(key), head_(head), position_(position) {}

  // The next padded(n) of both; times may be null.
  void take(int64_t n, float* exponentials, float* times) {
    constexpr int L = kLanes<float>;
    for (int64_t begin = 0; begin < n; begin += kStep) {
      for (int b = 0; b < kStepBlocks; b += L, block_ += L) {
        VecU words[4];
        philox_blocks(key_, head_, position_, block_, words);
        const VecI last = bit_cast<VecI>(words[3]);
        for (int w = 0; w < 3; ++w) {
          const VecI bits = bit_cast<VecI>(words[w]);
          const Vec<float> grid = __builtin_convertvector(bits >> 10 & 0x3FFFFF, Vec<float>);
          put(-log((grid + 0.5f) * 0x1p-22f), w, b, exponentials + begin);
          if (times == nullptr) continue;
          const VecI time = (bits & 0x3FF) << 10 | (last >> (10 * w) & 0x3FF);
          put((__builtin_convertvector(time, Vec<float>) + 0.5f) * 0x1p-20f, w, b, times + begin);
        }
      }
    }
  }

 private:
  static constexpr int kGroup = 8;  // blocks that give 24 arrivals
  static constexpr int kStepBlocks = max_of(kGroup, kLanes<float>), kStep = 3 * kStepBlocks;

  // Values of word w of the blocks b, b + 1, ... of a step.
  static SMARTBIRD_INLINE void put(Vec<float> x, int w, int b, float* out) {
    constexpr int kRun = min_of(kGroup, kLanes<float>);
    for (int l = 0; l < kLanes<float>; l += kRun)
      std::memcpy(out + (b + l) / kGroup * 3 * kGroup + w * kGroup + (b + l) % kGroup,
                  reinterpret_cast<const float*>(&x) + l, kRun * sizeof(float));
  }

  PhiloxKey key_;
  int64_t head_, position_;
  uint32_t block_ = 0;
};

}  // namespace smartbird::SMARTBIRD_ISA

#endif  // SMARTBIRD_PHILOX_INL_H_
