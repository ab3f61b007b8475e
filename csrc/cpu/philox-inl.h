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

// The draws 64 * chunk, ..., 64 * chunk + 63 of (head, position).
inline void philox_chunk(PhiloxKey key, int64_t head, int64_t position, uint32_t chunk,
                         uint32_t out[kDrawsPerChunk]) {
  constexpr int L = kLanes<float>;
  constexpr int kBlocks = kDrawsPerChunk / 4;
  const PhiloxBlock first = philox_counter(head, position, chunk * kBlocks);
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

// Independent Exp(1) variables of one (head, position) in order, a chunk at a time: -log of 64
// uniforms of 24 bits, and of 16 more that are made of the 8 bits those leave over.
class ExponentialStream {
 public:
  ExponentialStream(PhiloxKey key, int64_t head, int64_t position)
      : key_(key), head_(head), position_(position) {}

  // The next n, and zeros up to whole vectors.
  void take(int64_t n, float* out) {
    const int64_t padded = ceil_div(n, kLanes<float>) * kLanes<float>;
    for (int64_t i = n; i < padded; ++i) out[i] = 0;
    while (n > 0) {
      if (used_ == kSize) refill();
      const int64_t count = min_of<int64_t>(n, kSize - used_);
      std::memcpy(out, values_ + used_, static_cast<size_t>(count) * sizeof(float));
      used_ += static_cast<int>(count);
      out += count;
      n -= count;
    }
  }

 private:
  static constexpr int kSpare = kDrawsPerChunk / 4, kSize = kDrawsPerChunk + kSpare;

  void refill() {
    alignas(64) uint32_t words[kSize];
    philox_chunk(key_, head_, position_, chunk_++, words);
    for (int i = 0; i < kSpare; ++i) {
      uint32_t word = 0;
      for (int part = 0; part < 4; ++part) word |= (words[part * kSpare + i] & 0xFFu) << (8 * part);
      words[kDrawsPerChunk + i] = word;
    }
    for (int i = 0; i < kSize; i += kLanes<float>) {
      VecI bits;
      std::memcpy(&bits, words + i, sizeof(bits));
      const Vec<float> grid = __builtin_convertvector(bits >> 8 & 0xFFFFFF, Vec<float>);
      // The largest would round to 1, and no spacing may be 0.
      store(values_ + i, -log(min((grid + 0.5f) * 0x1p-24f, broadcast(0x1.fffffep-1f))));
    }
    used_ = 0;
  }

  PhiloxKey key_;
  int64_t head_, position_;
  uint32_t chunk_ = 0;
  int used_ = kSize;  // of values_
  alignas(64) float values_[kSize];
};

}  // namespace smartbird::SMARTBIRD_ISA

#endif  // SMARTBIRD_PHILOX_INL_H_
