// Which keys a row may see and must hold, against a check of every pair.
#include "visible.h"

#include <algorithm>
#include <set>
#include <vector>

#include "testing.h"

namespace smartbird::testing {
namespace {

constexpr int32_t kQueries[] = {0, 5, 5, 12, 40}, kKeys[] = {0, 9, 20, 20, 61};
constexpr int64_t kN = 44, kM = 63, kSequences = 4;

// Every row lies in just one block, and in the segment that of_row names.
void test_blocks() {
  for (const int64_t size : {1, 3, 16, 100})
    for (const bool packed : {false, true}) {
      const int64_t B = packed ? 1 : 3;
      const Segments segments{kN, packed ? kSequences : B, packed ? kQueries : nullptr};
      std::vector<int> seen(static_cast<size_t>(B * kN));
      for (int64_t number = 0; number < segments.num_blocks(size); ++number) {
        const SegmentBlock block = segment_block(segments, size, number);
        const int64_t b = packed ? 0 : block.segment, first = segments.rows(block.segment).begin;
        CHECK(block.end - block.begin <= size);
        for (int64_t i = block.begin; i < block.end; ++i) {
          ++seen[static_cast<size_t>(b * kN + first + i)];
          CHECK(segments.of_row(b, first + i) == block.segment);
          CHECK(segments.block_number(block.segment, size) + block.begin / size == number);
        }
      }
      CHECK(std::all_of(seen.begin(), seen.end(), [](int times) { return times == 1; }));
    }
}

struct Options {
  bool is_causal;
  int64_t window, num_sinks, K;
  bool masked, global, with_positions, with_offset;
};

void test_rows(const Options& o) {
  Random random(5);
  std::vector<uint8_t> key_mask(kM), global_mask(kM);
  for (auto& valid : key_mask) valid = random.integer(0, 3) > 0;
  for (auto& forced : global_mask) forced = random.integer(0, 4) == 0;
  std::vector<int64_t> positions(kN);
  for (int64_t i = 0, at = -2; i < kN; ++i)
    positions[static_cast<size_t>(i)] = at += random.integer(0, 2);
  Visible v{};
  v.queries = {kN, kSequences, kQueries}, v.keys = {kM, kSequences, kKeys};
  v.positions = o.with_positions ? positions.data() : nullptr;
  v.has_offset = o.with_offset, v.query_offset = 3;
  v.is_causal = o.is_causal, v.window = o.window, v.num_sinks = o.num_sinks;
  v.key_mask = o.masked ? key_mask.data() : nullptr;
  v.global_mask = o.global ? global_mask.data() : nullptr;
  std::vector<int32_t> valid_before{0};
  for (int64_t j = 0; j < kM; ++j)
    valid_before.push_back(valid_before.back() + (o.masked ? key_mask[static_cast<size_t>(j)] : 1));

  for (int64_t segment = 0; segment <= kSequences; ++segment) {
    const Sequence s = sequence_at(v, segment);
    CHECK(s.exists == (segment < kSequences));
    for (int64_t i = 0; i < s.num_queries; ++i) {
      const int64_t position = position_of(v, s, i);
      if (!o.with_positions)
        CHECK(position == i + (o.with_offset ? 3 : s.num_keys - s.num_queries));
      std::vector<int64_t> valid;
      for (int64_t j = 0; j < s.num_keys && s.exists; ++j)
        if ((!o.is_causal || j <= position) &&
            (!o.masked || key_mask[static_cast<size_t>(s.first_key + j)]))
          valid.push_back(j);
      const auto in_window = [&](int64_t j) {
        const int64_t behind = position - j;
        if (o.window == 0) return false;
        return o.is_causal ? behind >= 0 && behind < o.window : std::abs(behind) <= o.window / 2;
      };
      std::set<int64_t> want;
      for (const int64_t j : valid)
        if (static_cast<int64_t>(want.size()) < o.num_sinks) want.insert(j);
      for (const int64_t j : valid)
        if (in_window(j)) want.insert(j);
      for (const int64_t j : valid)
        if (o.global && global_mask[static_cast<size_t>(s.first_key + j)] &&
            static_cast<int64_t>(want.size()) < o.K)
          want.insert(j);
      std::vector<int64_t> forced;
      for_each_forced(v, s, position, o.K, [&](int64_t j) { forced.push_back(j); });
      CHECK(std::equal(forced.begin(), forced.end(), want.begin(), want.end()));

      bool any_free = false;
      for (int64_t j = 0; j < s.num_keys; ++j) {
        const bool sees = s.exists && (!o.is_causal || j <= position) && !in_window(j);
        Span hole;
        const Span keys = free_keys(v, s, position, &hole);
        CHECK(sees == (j >= keys.begin && j < keys.end && (j < hole.begin || j >= hole.end)));
        const Span queries = free_queries(v, s, j, &hole);
        CHECK(sees == (i >= queries.begin && i < queries.end && (i < hole.begin || i >= hole.end)));
        any_free |= sees && (!o.masked || key_mask[static_cast<size_t>(s.first_key + j)]);
      }
      CHECK(any_free == has_free_key(v, s, i, o.masked ? valid_before.data() : nullptr));
    }
  }
}

int test() {
  test_blocks();
  for (const bool is_causal : {false, true})
    for (const int64_t window : {0, 1, 4, 5})
      for (const int64_t num_sinks : {0, 2})
        for (const int64_t K : {7, 12})
          for (const bool masked : {false, true})
            for (const bool global : {false, true})
              for (const int at : {0, 1, 2})
                test_rows({is_causal, window, num_sinks, K, masked, global, at == 1, at == 2});
  return failures == 0 ? 0 : 1;
}

}  // namespace
}  // namespace smartbird::testing

int main() { return smartbird::testing::test(); }
