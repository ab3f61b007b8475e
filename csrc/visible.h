// Who the rows of a call are, which keys each may see, and which it must hold: the only place that
// knows sequences, positions, limits and forced keys. For host and device.
//
// A call holds sequences: the elements of a batch, or the parts of one packed element that
// cu_seqlens name. A query knows its sequence (by an id), its head and its position, the key of its
// sequence that it stands at. Draws, dropout and masks depend on these and on nothing else, so
// neither the place in the call nor its neighbours change a row.
#pragma once

#include <cstdint>

#include "philox.h"

// Always inlined: a function that files of several instruction sets share must not become one
// symbol to the linker.
#define SMARTBIRD_SHARED SMARTBIRD_HOST_DEVICE inline __attribute__((always_inline))

namespace smartbird {

constexpr int64_t kTile = 32;  // keys per tile: two AVX-512 vectors of float

// [begin, end); empty where end <= begin.
struct Span {
  int64_t begin, end;
};

SMARTBIRD_SHARED int64_t clamp_to(int64_t x, int64_t low, int64_t high) {
  return x < low ? low : (x > high ? high : x);
}

// One side of a call, queries or keys: `length` rows in each of `batch` elements or, where cu is
// given, in one element that n sequences share: sequence s has the rows [cu[s], cu[s + 1]). What
// lies beyond cu[n] belongs to none; it is counted as one more segment, n, so that every row has
// one.
struct Segments {
  int64_t length;
  int64_t n;          // sequences
  const int32_t* cu;  // [n + 1], or null

  // Segments, with that of the rows that belong to no sequence.
  SMARTBIRD_SHARED int64_t count() const { return n + (cu != nullptr); }

  // Rows of segment s within its batch element.
  SMARTBIRD_SHARED Span rows(int64_t s) const {
    if (cu == nullptr) return {0, length};
    // Whatever cu[0] holds, row 0 has a segment.
    const int64_t begin = s == 0 ? 0 : clamp_to(cu[s], 0, length);
    return {begin, s < n ? clamp_to(cu[s + 1], begin, length) : length};
  }

  // Work on a segment is cut into blocks of `size` rows, counted from its first. Blocks are
  // numbered through all segments so that a number's segment is found without a table: segment s of
  // a packed element begins at block rows(s).begin / size + s, which leaves a few numbers unused.
  SMARTBIRD_SHARED int64_t num_blocks(int64_t size) const {
    if (cu == nullptr) return n * ((length + size - 1) / size);
    return length / size + n + 1;
  }
  // Of the packed form; of a batch element, blocks begin anew.
  SMARTBIRD_SHARED int64_t first_block(int64_t s, int64_t size) const {
    return cu == nullptr ? 0 : rows(s).begin / size + s;
  }
  // The number of a segment's first block among those of all.
  SMARTBIRD_SHARED int64_t block_number(int64_t s, int64_t size) const {
    return cu == nullptr ? s * ((length + size - 1) / size) : first_block(s, size);
  }
  // Blocks that one batch element has, used or not.
  SMARTBIRD_SHARED int64_t blocks_per_batch(int64_t size) const {
    return cu == nullptr ? (length + size - 1) / size : num_blocks(size);
  }
  // The last segment that begins at or before `row`.
  SMARTBIRD_SHARED int64_t of_row(int64_t batch, int64_t row) const {
    if (cu == nullptr) return batch;
    int64_t low = 0, high = n;
    while (low < high) {
      const int64_t middle = (low + high + 1) / 2;
      if (rows(middle).begin <= row)
        low = middle;
      else
        high = middle - 1;
    }
    return low;
  }
};

// A block of a segment: rows [begin, end) counted from the segment's first; empty where the number
// is unused.
struct SegmentBlock {
  int64_t segment, begin, end;
};

SMARTBIRD_SHARED SegmentBlock segment_block(const Segments& segments, int64_t size, int64_t block) {
  SegmentBlock found{};
  if (segments.cu == nullptr) {
    const int64_t blocks = (segments.length + size - 1) / size;
    found.segment = block / blocks;
    found.begin = block % blocks * size;
  } else {
    int64_t low = 0, high = segments.n;
    while (low < high) {
      const int64_t middle = (low + high + 1) / 2;
      if (segments.first_block(middle, size) <= block)
        low = middle;
      else
        high = middle - 1;
    }
    found.segment = low;
    found.begin = (block - segments.first_block(low, size)) * size;
  }
  const Span rows = segments.rows(found.segment);
  found.end = clamp_to(found.begin + size, 0, rows.end - rows.begin);
  return found;
}

// What a call says of its rows.
struct Visible {
  Segments queries, keys;    // with the same sequences
  const int64_t* positions;  // [B, N] the position of each query, ascending within a sequence; or
                             // null: query i of a sequence stands at its query_offset + i
  bool has_offset;           // else query_offset is num_keys - num_queries of the sequence
  int64_t query_offset;
  const int64_t* sequence_ids;  // [sequences], or null: 0, 1, ...
  int64_t first_head;           // number of index head 0 of this call
  bool is_causal;               // a query sees the keys up to its position
  int64_t window, num_sinks;
  const uint8_t* key_mask;     // [B, M] contiguous, 0 = may not be attended; or null
  const uint8_t* global_mask;  // [B, M] contiguous, 1 = forced where it is visible; or null
};

struct Sequence {
  int64_t segment;
  int64_t batch;                     // its element of every tensor's batch dimension
  int64_t first_query, num_queries;  // its rows within that element
  int64_t first_key, num_keys;
  bool exists;     // false of the rows beyond the last sequence, which see nothing
  int64_t offset;  // position of its query 0, where `positions` is null
  uint64_t id;
};

SMARTBIRD_SHARED Sequence sequence_at(const Visible& v, int64_t segment) {
  const Span queries = v.queries.rows(segment), keys = v.keys.rows(segment);
  Sequence s{};
  s.segment = segment;
  s.batch = v.queries.cu == nullptr ? segment : 0;
  s.first_query = queries.begin;
  s.num_queries = queries.end - queries.begin;
  s.first_key = keys.begin;
  s.num_keys = keys.end - keys.begin;
  s.exists = segment < v.queries.n;
  s.offset = v.has_offset ? v.query_offset : s.num_keys - s.num_queries;
  s.id = static_cast<uint64_t>(v.sequence_ids != nullptr && s.exists ? v.sequence_ids[segment]
                                                                     : segment);
  return s;
}

// In what follows, queries i and keys j are counted from the first of their sequence.

SMARTBIRD_SHARED int64_t position_of(const Visible& v, const Sequence& s, int64_t i) {
  if (v.positions == nullptr) return s.offset + i;
  return v.positions[s.batch * v.queries.length + s.first_query + i];
}

// The first query at or beyond a position.
SMARTBIRD_SHARED int64_t query_at(const Visible& v, const Sequence& s, int64_t position) {
  if (v.positions == nullptr) return clamp_to(position - s.offset, 0, s.num_queries);
  int64_t low = 0, high = s.num_queries;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (position_of(v, s, middle) < position)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// The keys [0, limit) of a row are valid as far as key_mask allows.
SMARTBIRD_SHARED int64_t key_limit(const Visible& v, const Sequence& s, int64_t position) {
  if (!s.exists) return 0;
  return v.is_causal ? clamp_to(position + 1, 0, s.num_keys) : s.num_keys;
}

// This sequence's part of a [B, M] mask; null of null.
SMARTBIRD_SHARED const uint8_t* mask_of(const Visible& v, const Sequence& s, const uint8_t* mask) {
  return mask == nullptr ? nullptr : mask + s.batch * v.keys.length + s.first_key;
}

// The window's keys among those below the row's limit.
SMARTBIRD_SHARED Span window_span(const Visible& v, const Sequence& s, int64_t position) {
  const int64_t limit = key_limit(v, s, position);
  if (v.window == 0) return {limit, limit};
  const int64_t before = v.is_causal ? v.window - 1 : v.window / 2;
  const int64_t after = v.is_causal ? 0 : v.window / 2;
  return {clamp_to(position - before, 0, limit), clamp_to(position + after + 1, 0, limit)};
}

// Calls take(j) for the forced keys of a row in ascending order: the first num_sinks valid keys,
// those of the window and, while there is room among K, those of global_mask.
template <typename Take>
SMARTBIRD_SHARED void for_each_forced(const Visible& v, const Sequence& s, int64_t position,
                                      int64_t K, Take&& take) {
  const uint8_t* valid = mask_of(v, s, v.key_mask);
  const uint8_t* global = mask_of(v, s, v.global_mask);
  const int64_t limit = key_limit(v, s, position);
  const auto is_valid = [&](int64_t j) { return valid == nullptr || valid[j] != 0; };
  int64_t sinks = 0, next = 0;
  for (; next < limit && sinks < v.num_sinks; ++next) {
    if (!is_valid(next)) continue;
    take(next);
    ++sinks;
  }
  Span window = window_span(v, s, position);
  if (window.begin < next) window.begin = next;
  if (window.end < window.begin) window.end = window.begin;
  int64_t room = 0;
  if (global != nullptr) {
    room = K - sinks;
    for (int64_t j = window.begin; j < window.end; ++j) room -= is_valid(j);
  }
  const auto take_global = [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end && room > 0; ++j) {
      if (!global[j] || !is_valid(j)) continue;
      take(j);
      --room;
    }
  };
  take_global(next, window.begin);
  for (int64_t j = window.begin; j < window.end; ++j)
    if (is_valid(j)) take(j);
  take_global(window.end, limit);
}

// The keys of a row that its window leaves, [0, window.begin) and [window.end, limit): what the
// sketch's log-sum-exp and its distillation go over. (Sinks and global keys are left out there by
// key_mask.)
SMARTBIRD_SHARED Span free_keys(const Visible& v, const Sequence& s, int64_t position, Span* hole) {
  const int64_t limit = key_limit(v, s, position);
  *hole = window_span(v, s, position);
  if (hole->end < limit) return {0, limit};
  return {0, hole->begin};
}

// Whether a row has any, by the number of valid keys below each key of its batch element ([B, M +
// 1]; null: all are valid).
SMARTBIRD_SHARED bool has_free_key(const Visible& v, const Sequence& s, int64_t i,
                                   const int32_t* valid_before) {
  Span hole;
  const Span keys = free_keys(v, s, position_of(v, s, i), &hole);
  hole.end = clamp_to(hole.end, 0, keys.end);
  hole.begin = clamp_to(hole.begin, 0, hole.end);
  if (valid_before == nullptr) return keys.end > hole.end - hole.begin;
  const int32_t* before = valid_before + s.batch * (v.keys.length + 1) + s.first_key;
  return before[keys.end] - before[0] > before[hole.end] - before[hole.begin];
}

// The same seen from a key: the queries that have it among their free keys are those of the span
// that are not in the hole.
SMARTBIRD_SHARED Span free_queries(const Visible& v, const Sequence& s, int64_t key, Span* hole) {
  *hole = {s.num_queries, s.num_queries};
  if (!s.exists) return {0, 0};
  if (v.is_causal) return {query_at(v, s, key + v.window), s.num_queries};
  if (v.window > 0)
    *hole = {query_at(v, s, key - v.window / 2), query_at(v, s, key + v.window / 2 + 1)};
  return {0, s.num_queries};
}

// The key of a sequence's random numbers.
SMARTBIRD_SHARED PhiloxKey sequence_key(PhiloxKey stream, const Sequence& s) {
  const PhiloxBlock mixed =
      philox4x32({{static_cast<uint32_t>(s.id), static_cast<uint32_t>(s.id >> 32), 0, 0}}, stream);
  return {mixed.word[0], mixed.word[1]};
}

}  // namespace smartbird
