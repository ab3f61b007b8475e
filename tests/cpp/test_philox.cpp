// Philox4x32-10 against the known answers published with Random123 (kat_vectors), and the laws of
// its uniforms.
#include "philox.h"

#include "testing.h"

namespace smartbird::testing {
namespace {

void check_known_answer(PhiloxBlock counter, PhiloxKey key, PhiloxBlock want) {
  const PhiloxBlock got = philox4x32(counter, key);
  for (int i = 0; i < 4; ++i) CHECK(got.word[i] == want.word[i]);
}

void test_known_answers() {
  check_known_answer({{0, 0, 0, 0}}, {0, 0}, {{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}});
  check_known_answer({{~0u, ~0u, ~0u, ~0u}}, {~0u, ~0u},
                     {{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}});
  check_known_answer({{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}}, {0xa4093822, 0x299f31d0},
                     {{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}});
}

void test_streams_differ() {
  const PhiloxKey sample = philox_key(1, 2, kSampleStream);
  const PhiloxKey others[] = {philox_key(1, 2, kDropoutStream), philox_key(1, 3, kSampleStream),
                              philox_key(2, 2, kSampleStream),
                              philox_key(1, uint64_t{2} | uint64_t{1} << 32, kSampleStream)};
  for (const PhiloxKey& other : others) CHECK(other.lo != sample.lo || other.hi != sample.hi);
}

void test_uniforms_stay_below_one() {
  CHECK(uniform_float(0) == 0.0f);
  CHECK(uniform_float(~0u) < 1.0f);
  CHECK(uniform_double(0) == 0.0);
  CHECK(uniform_double(~0u) < 1.0);
}

int test() {
  test_known_answers();
  test_streams_differ();
  test_uniforms_stay_below_one();
  return failures == 0 ? 0 : 1;
}

}  // namespace
}  // namespace smartbird::testing

int main() { return smartbird::testing::test(); }
