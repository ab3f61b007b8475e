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

// The draws 64 * chunk, ..., 64 * chunk + 63 of (batch, head, row).
inline void philox_chunk(PhiloxKey key, int64_t batch, int64_t head, int64_t row, uint32_t chunk,
                         uint32_t out[kDrawsPerChunk]) {
  constexpr int L = kLanes<float>;
  constexpr int kBlocks = kDrawsPerChunk / 4;
  const PhiloxBlock first = philox_counter(batch, head, row, chunk * kBlocks);
  for (int b = 0; b < kBlocks; b += L) {
    VecU c0, c1 = VecU{} + first.word[1], c2 = VecU{} + first.word[2], c3 = VecU{} + first.word[3];
    for (int l = 0; l < L; ++l) c0[l] = first.word[0] + static_cast<uint32_t>(b + l);
    PhiloxKey k = key;
    for (int round = 0; round < kPhiloxRounds; ++round) {
      VecU high0, low0, high1, low1;
      multiply_wide(c0, kPhiloxM0, &high0, &low0);
      multiply_wide(c2, kPhiloxM1, &high1, &low1);
      c0 = high1 ^ c1 ^ k.lo;
      c1 = low1;
      c2 = high0 ^ c3 ^ k.hi;
      c3 = low0;
      k.lo += kPhiloxW0;
      k.hi += kPhiloxW1;
    }
    std::memcpy(out + 0 * kBlocks + b, &c0, sizeof(c0));
    std::memcpy(out + 1 * kBlocks + b, &c1, sizeof(c1));
    std::memcpy(out + 2 * kBlocks + b, &c2, sizeof(c2));
    std::memcpy(out + 3 * kBlocks + b, &c3, sizeof(c3));
  }
}

// The uniforms of one (batch, head, row) in order, a chunk at a time.
class UniformStream {
 public:
  UniformStream(PhiloxKey key, int64_t batch, int64_t head, int64_t row)
      : key_(key), batch_(batch), head_(head), row_(row) {}

  uint32_t next() {
    if (position_ == kDrawsPerChunk) {
      philox_chunk(key_, batch_, head_, row_, chunk_++, words_);
      position_ = 0;
    }
    return words_[position_++];
  }

 private:
  PhiloxKey key_;
  int64_t batch_, head_, row_;
  uint32_t chunk_ = 0;
  int position_ = kDrawsPerChunk;
  alignas(64) uint32_t words_[kDrawsPerChunk];
};

}  // namespace smartbird::SMARTBIRD_ISA

#endif  // SMARTBIRD_PHILOX_INL_H_
