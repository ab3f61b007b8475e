// Philox4x32-10 over a vector of counters.
#include "../philox.h"
#include "vec.h"

#ifndef SMARTBIRD_PHILOX_INL_H_
#define SMARTBIRD_PHILOX_INL_H_

namespace smartbird::SMARTBIRD_ISA {

// Of vectors of 64-bit lanes, two of a VecU each.
#if defined(__AVX512F__)
SMARTBIRD_INLINE VecU high_halves(VecU a) {
  return bit_cast<VecU>(_mm512_srli_epi64(bit_cast<__m512i>(a), 32));
}

SMARTBIRD_INLINE VecU multiply_low_halves(VecU a, VecU b) {
  return bit_cast<VecU>(_mm512_mul_epu32(bit_cast<__m512i>(a), bit_cast<__m512i>(b)));
}

SMARTBIRD_INLINE VecU join_low_halves(VecU even, VecU odd) {
  return bit_cast<VecU>(_mm512_mask_blend_epi32(0xAAAA, bit_cast<__m512i>(even),
                                                _mm512_slli_epi64(bit_cast<__m512i>(odd), 32)));
}
#elif defined(__AVX2__)
SMARTBIRD_INLINE VecU high_halves(VecU a) {
  return bit_cast<VecU>(_mm256_srli_epi64(bit_cast<__m256i>(a), 32));
}

SMARTBIRD_INLINE VecU multiply_low_halves(VecU a, VecU b) {
  return bit_cast<VecU>(_mm256_mul_epu32(bit_cast<__m256i>(a), bit_cast<__m256i>(b)));
}

SMARTBIRD_INLINE VecU join_low_halves(VecU even, VecU odd) {
  return bit_cast<VecU>(_mm256_blend_epi32(bit_cast<__m256i>(even),
                                           _mm256_slli_epi64(bit_cast<__m256i>(odd), 32), 0xAA));
}
#endif

// The blocks first, first + 1, ... of (head, position), one in each lane, word by word.
SMARTBIRD_INLINE void philox_blocks(PhiloxKey key, int64_t head, int64_t position, uint32_t first,
                                    VecU out[4]) {
  const PhiloxBlock counter = philox_counter(head, position, first);
#if defined(__AVX2__)
  // Even lanes and odd ones apart, in the low halves of 64 bits each, as products want them; what
  // the high halves hold counts for nothing.
  VecU even[4], odd[4];
  for (int w = 0; w < 4; ++w) {
    even[w] = VecU{} + counter.word[w];
    if (w == 0) even[w] += bit_cast<VecU>(iota_int());
    odd[w] = high_halves(even[w]);
  }
  const auto turn = [&](VecU c[4]) {
    const VecU p0 = multiply_low_halves(c[0], VecU{} + kPhiloxM0),
               p1 = multiply_low_halves(c[2], VecU{} + kPhiloxM1);
    c[0] = high_halves(p1) ^ c[1] ^ key.lo;
    c[1] = p1;
    c[2] = high_halves(p0) ^ c[3] ^ key.hi;
    c[3] = p0;
  };
  for (int round = 0; round < kPhiloxRounds; ++round) {
    turn(even);
    turn(odd);
    key.lo += kPhiloxW0;
    key.hi += kPhiloxW1;
  }
  for (int w = 0; w < 4; ++w) out[w] = join_low_halves(even[w], odd[w]);
#else
  for (int l = 0; l < kLanes<float>; ++l) {
    PhiloxBlock block = counter;
    block.word[0] += static_cast<uint32_t>(l);
    block = philox4x32(block, key);
    for (int w = 0; w < 4; ++w) out[w][l] = block.word[w];
  }
#endif
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

// Uniform in (0, 1), on a grid of 2^-23.
SMARTBIRD_INLINE Vec<float> uniform(VecU bits) {
  return (__builtin_convertvector(bit_cast<VecI>(bits >> 9), Vec<float>) + 0.5f) * 0x1p-23f;
}

// Exp(1) variables of one (head, position), and uniform bits, in steps of 16 blocks: the first
// three words of a block give one of the first each, its last word is the second. Variable n of a
// step is of word n / 16 of block n % 16, whatever the vectors are.
class ExponentialStream {
 public:
  static constexpr int kBlocks = 16, kStep = 3 * kBlocks;

  // What n variables take of an array, and of one of words: whole steps.
  static constexpr int64_t padded(int64_t n) { return ceil_div(n, kStep) * kStep; }
  static constexpr int64_t words(int64_t n) { return padded(n) / 3; }

  ExponentialStream(PhiloxKey key, int64_t head, int64_t position)
      : key_(key), head_(head), position_(position) {}

  // The next n variables, up to whole vectors, and the words(n) words of their steps, which may be
  // null.
  void take(int64_t n, float* exponentials, uint32_t* words) {
    constexpr int L = kLanes<float>;
    for (int64_t begin = 0; begin < n; begin += kStep)
      for (int b = 0; b < kBlocks; b += L, block_ += L) {
        VecU word[4];
        philox_blocks(key_, head_, position_, block_, word);
        for (int w = 0; w < 3; ++w)
          if (const int64_t at = begin + w * kBlocks + b; at < n)
            store(exponentials + at, -log(uniform(word[w])));
        if (words != nullptr) std::memcpy(words + begin / 3 + b, &word[3], sizeof(word[3]));
      }
  }

 private:
  PhiloxKey key_;
  int64_t head_, position_;
  uint32_t block_ = 0;
};

}  // namespace smartbird::SMARTBIRD_ISA

#endif  // SMARTBIRD_PHILOX_INL_H_
