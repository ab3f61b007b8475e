// q_sketch [B, N, S], k_sketch [B, M, S] -> indices, log_inclusion [B, H_i, N, K]: every index head
// draws its own keys of a row from softmax(q_sketch k_sketch^T scale).
//
// A row's scores are made once, for all heads, as weights 2^(score - reference) in a buffer of one
// thread, with running sums of them: `cum` within blocks of 32 keys, `block_start` over blocks. To
// draw a key is to find a uniform number among the running sums: a guide table names the block, one
// compare over 32 sums names the key. The distinct keys of a head are a bitmap, which also gives
// them in ascending order without a sort.
//
// `gumbel` needs no noise per key: the k largest of log p + Gumbel noise are the first k distinct
// results of independent draws from p. Drawing exactly the number still missing, again and again,
// never overshoots.
#include "philox-inl.h"
#include "score-inl.h"
#include "scratch.h"

#ifndef SMARTBIRD_SKETCH_SAMPLE_INL_H_
#define SMARTBIRD_SKETCH_SAMPLE_INL_H_

namespace smartbird::SMARTBIRD_ISA {
namespace sampling {

// Rows scored together, see score_tile: as many as the registers hold.
constexpr int kRows = kLanes<float> == 16 ? 8 : 4;
constexpr int kRowsPerTask = 16;  // enough work that fetching a task costs nothing
constexpr int kWordBits = 64;
constexpr int kEager = 4;  // see list_bits

// While |score| cannot exceed this, 2^score needs no reference: 2^86 * 2^20 keys stays far inside
// float.
constexpr float kPlainExpBound = 86.0f;
// Below this total, weights relative to the largest have begun to underflow: score again relative
// to the rest.
constexpr double kUnderflow = 1e-25;
// Share of a row's mass beyond which "total minus chosen" has lost its digits.
constexpr double kCancellation = 0.999;

// Draws are integers in [0, kWhole]: running sums over blocks are kept on the same grid, so that to
// find a block is to compare integers, many draws at once.
constexpr int32_t kWhole = INT32_MAX;
constexpr int kWholeBits = 31;

// A row of weights with its running sums.
struct Row {
  float* weight;        // [padded M]; 0 where the key cannot be drawn
  float* cum;           // [padded M] inclusive running sum within each block of kTile
  double* block_start;  // [blocks + 1] running sum before each block
  int32_t* start;       // [blocks + 1] the same, total = 2^31
  int32_t* guide;       // [guide_size] the block that holds g * 2^31 / guide_size, or one before it
  int64_t blocks;
  int guide_shift;    // guide index of a draw: draw >> guide_shift
  float draw_weight;  // total / 2^31
  double total;
  double reference;  // weight = 2^(score - reference)
  float max;
};

struct Scratch {
  float* q;             // [kRows, S] queries times scale * log2(e)
  float* weight;        // [kRows, padded M]
  uint64_t* forced;     // [words] keys that are taken without drawing
  uint64_t* taken;      // [words] keys of the head at hand
  int32_t* draws;       // [padded K]
  int32_t* list;        // [K + kEager]
  float* drawn_weight;  // [padded K]
  Row row;              // running sums of the row at hand; its weights lie in `weight`
  Row rest;             // the same row without the keys taken so far
};

inline int64_t padded_keys(const SketchSampleParams& p) { return ceil_div(p.M, kTile) * kTile; }
inline int64_t bitmap_words(const SketchSampleParams& p) { return ceil_div(p.M, kWordBits); }

// Four entries per block: three of four draws then need no step beyond the guide's block.
inline int guide_bits(int64_t blocks) {
  int bits = 6;
  while (bits < 13 && (int64_t{1} << bits) < 4 * blocks) ++bits;
  return bits;
}

inline Scratch lay_out(const SketchSampleParams& p, ScratchAllocator* arena) {
  const int64_t padded = padded_keys(p), blocks = padded / kTile, words = bitmap_words(p);
  Scratch s{};
  s.q = arena->take<float>(kRows * p.S);
  s.weight = arena->take<float>(kRows * padded);
  s.forced = arena->take<uint64_t>(words);
  s.taken = arena->take<uint64_t>(words);
  s.list = arena->take<int32_t>(p.K + kEager);
  s.draws = arena->take<int32_t>(p.K + kLanes<float>);
  s.drawn_weight = arena->take<float>(p.K + kLanes<float>);
  for (Row* row : {&s.row, &s.rest}) {
    row->cum = arena->take<float>(padded);
    row->block_start = arena->take<double>(blocks + 1);
    row->start = arena->take<int32_t>(blocks + 1);
    row->guide = arena->take<int32_t>((int64_t{1} << guide_bits(blocks)) + kEager);
  }
  s.rest.weight = arena->take<float>(padded);
  return s;
}

// ---- bitmaps ------------------------------------------------------------------------------------

inline bool test_bit(const uint64_t* bits, int64_t j) {
  return bits[j / kWordBits] >> (j % kWordBits) & 1;
}
inline void set_bit(uint64_t* bits, int64_t j) {
  bits[j / kWordBits] |= uint64_t{1} << (j % kWordBits);
}

// Sets bit j; true where it was clear.
inline bool insert_bit(uint64_t* bits, int64_t j) {
  const uint64_t word = bits[j / kWordBits], bit = uint64_t{1} << (j % kWordBits);
  bits[j / kWordBits] = word | bit;
  return (word & bit) == 0;
}

template <typename F>
inline void for_each_bit(const uint64_t* bits, int64_t words, F&& f) {
  for (int64_t i = 0; i < words; ++i)
    for (uint64_t word = bits[i]; word != 0; word &= word - 1)
      f(i * kWordBits + __builtin_ctzll(word));
}

// ---- a row --------------------------------------------------------------------------------------

// The keys [0, limit) of a row may be attended as far as key_mask allows.
inline int64_t key_limit(const SketchSampleParams& p, int64_t i) {
  return p.is_causal ? max_of<int64_t>(0, min_of(p.M, i + p.M - p.N + 1)) : p.M;
}

// weight[r] = scores of kRows rows, or 2 to their power, over the tiles below `limit`.
template <bool kExp>
inline void score_rows(const SketchSampleParams& p, int64_t b, const float* q, int64_t rows,
                       int64_t limit, float* weight, int64_t weight_ld) {
  const int64_t tiles = ceil_div(p.M, kTile);
  const auto run = [&](auto rows_at_once) {
    for (int64_t t = 0; t < ceil_div(limit, kTile); ++t) {
      const float* tile = p.k_tiles + (b * tiles + t) * p.S * kTile;
      const float* bias = p.key_bias + (b * tiles + t) * kTile;
      score_tile<decltype(rows_at_once)::value>(
          q, p.S, tile, p.S, bias, [&](int r, int c, Vec<float> s) {
            store(weight + r * weight_ld + t * kTile + c, kExp ? exp2(s) : s);
          });
    }
  };
  if (rows == 1)
    run(std::integral_constant<int, 1>{});
  else
    run(std::integral_constant<int, kRows>{});
}

// Puts `value` where a key cannot be drawn: beyond the limit and at the excluded keys.
inline void blank(const uint64_t* excluded, int64_t words, int64_t limit, float value,
                  float* weight) {
  for (int64_t j = limit; j < ceil_div(limit, kTile) * kTile; ++j) weight[j] = value;
  for_each_bit(excluded, words, [&](int64_t j) { weight[j] = value; });
}

// Scores to weights relative to their maximum, which becomes the reference.
inline void normalise(int64_t limit, Row* row) {
  const int64_t n = ceil_div(limit, kTile) * kTile;
  Vec<float> top = broadcast(-__builtin_inff());
  for (int64_t j = 0; j < n; j += kLanes<float>) top = max(top, load(row->weight + j));
  const float reference = reduce_max(top);
  for (int64_t j = 0; j < n; j += kLanes<float>)
    store(row->weight + j, exp2(load(row->weight + j) - reference));
  row->reference = static_cast<double>(reference);
}

// start and guide from block_start and total.
inline void index_blocks(Row* row) {
  const int bits = guide_bits(row->blocks);
  row->guide_shift = kWholeBits - bits;
  const double scale = 0x1p31 / row->total;
  for (int64_t t = 0; t < row->blocks; ++t)
    row->start[t] = static_cast<int32_t>(min_of(row->block_start[t] * scale, kWhole - 1.0));
  row->start[row->blocks] = kWhole;
  // Block t is the guide of g from the first g << guide_shift at or beyond its start to that of the
  // next block: about four, written eagerly, as in list_bits.
  const int32_t cell = (1 << row->guide_shift) - 1;
  const auto first_entry = [&](int64_t t) {
    return (int64_t{row->start[t]} + cell) >> row->guide_shift;
  };
  for (int64_t t = 0, g = 0; t < row->blocks; ++t) {
    const int64_t end = t + 1 < row->blocks ? first_entry(t + 1) : int64_t{1} << bits;
    for (int e = 0; e < kEager; ++e) row->guide[g + e] = static_cast<int32_t>(t);
    for (int64_t e = g + kEager; e < end; ++e) row->guide[e] = static_cast<int32_t>(t);
    g = end;
  }
}

// Fills in everything but weight and reference.
inline void sum_row(int64_t limit, Row* row) {
  constexpr int L = kLanes<float>;
  row->blocks = ceil_div(limit, kTile);
  Vec<float> top{};
  double total = 0;
  for (int64_t t = 0; t < row->blocks; ++t) {
    float sum = 0;
    row->block_start[t] = total;
    for (int c = 0; c < kTile; c += L) {
      const Vec<float> w = load(row->weight + t * kTile + c);
      const Vec<float> sums = prefix_sum(w) + sum;
      store(row->cum + t * kTile + c, sums);
      top = max(top, w);
      sum = sums[L - 1];
    }
    total += static_cast<double>(sum);
  }
  row->block_start[row->blocks] = total;
  row->total = total;
  row->draw_weight = static_cast<float>(total * 0x1p-31);
  row->max = reduce_max(top);
  index_blocks(row);
}

// A key of positive weight at or nearest after j, else nearest before it.
inline int64_t nearest_drawable(const Row& row, int64_t j) {
  const int64_t n = row.blocks * kTile;
  for (int64_t after = j; after < n; ++after)
    if (row.weight[after] > 0) return after;
  for (int64_t before = min_of(j, n) - 1; before > 0; --before)
    if (row.weight[before] > 0) return before;
  return 0;
}

// Calls f(n, j) for each draw n: j is the key that holds it, the first whose running sum exceeds
// it. `draws` is read up to a multiple of the vector length.
template <typename F>
inline void find_keys(const Row& row, const int32_t* draws, int64_t count, F&& f) {
  constexpr int L = kLanes<float>;
  for (int64_t n = 0; n < count; n += L) {
    const VecI draw = load_int(draws + n);
    VecI block = gather(row.guide, draw >> row.guide_shift);
    for (;;) {
      const VecI beyond = draw >= gather(row.start + 1, block);
      if (!any(beyond)) break;
      block -= beyond;
    }
    const VecI rest = draw - gather(row.start, block);
    const Vec<float> within = __builtin_convertvector(rest, Vec<float>) * row.draw_weight;
    const int lanes = static_cast<int>(min_of<int64_t>(L, count - n));
    for (int l = 0; l < lanes; ++l) {
      const int64_t begin = int64_t{block[l]} * kTile;
      int64_t j = begin + count_le(row.cum + begin, within[l]);
      // Sums within a block are rounded in an order of their own: rarely, a draw falls between two
      // that should be equal.
      if (__builtin_expect(j >= row.blocks * kTile || !(row.weight[j] > 0), 0))
        j = nearest_drawable(row, j);
      f(n + l, j);
    }
  }
}

// What one row's draws share.
struct RowContext {
  const SketchSampleParams* p;
  int64_t b, i;
  const float* q;   // [S] scaled query
  int64_t limit;    // keys [0, limit) may be attended as far as key_mask allows
  int64_t words;    // bitmap words below the limit
  int64_t to_draw;  // places left by the forced keys; fewer than the keys that can be drawn
};

// weight = 2^(score - reference) of the keys not excluded, the reference being their largest
// score.
inline void rescore(const RowContext& c, const uint64_t* excluded, Row* row) {
  score_rows<false>(*c.p, c.b, c.q, 1, c.limit, row->weight, 0);
  blank(excluded, c.words, c.limit, -__builtin_inff(), row->weight);
  normalise(c.limit, row);
}

// rest = row without the taken keys, scored again where what remains has underflowed. `rest` may be
// `row`.
inline void exclude_taken(const RowContext& c, const uint64_t* taken, const Row& row, Row* rest) {
  const size_t bytes = static_cast<size_t>(row.blocks * kTile) * sizeof(float);
  if (rest->weight != row.weight) std::memcpy(rest->weight, row.weight, bytes);
  rest->reference = row.reference;
  blank(taken, c.words, c.limit, 0.0f, rest->weight);
  sum_row(c.limit, rest);
  if (rest->total < kUnderflow) {
    rescore(c, taken, rest);
    blank(taken, c.words, c.limit, 0.0f, rest->weight);
    sum_row(c.limit, rest);
  }
}

// ---- methods: each fills the bitmap `taken` for one head ----------------------------------------

// n draws in [0, kWhole).
inline void take_draws(UniformStream* uniforms, int64_t n, int32_t* draws) {
  for (int64_t j = 0; j < n; ++j)
    draws[j] = min_of(static_cast<int32_t>(uniforms->next() >> 1), kWhole - 1);
  for (int64_t j = n; j < ceil_div(n, kLanes<float>) * kLanes<float>; ++j) draws[j] = 0;
}

// Sum of n independent Exp(1) variables.
inline double gamma_variate(int64_t n, UniformStream* arrivals) {
  constexpr int L = kLanes<float>;
  double sum = 0;
  for (int64_t done = 0; done < n; done += L) {
    Vec<float> u = broadcast(1.0f);
    for (int l = 0; l < min_of<int64_t>(L, n - done); ++l)
      u[l] = (static_cast<float>(arrivals->next() >> 8) + 0.5f) * 0x1p-24f;
    sum -= static_cast<double>(reduce_add(log(u)));
  }
  return sum;
}

// log(1 - exp(-x)) for x >= 0, with all digits at both ends.
inline Vec<float> log_one_minus_exp(Vec<float> x) {
  x = max(x, broadcast(1e-37f));
  const Vec<float> series = x * (1.0f - x * (0.5f - x * (1.0f / 6 - x * (1.0f / 24))));
  const Vec<float> e = exp(-x);
  const Vec<float> tail = -e * (1.0f + e * (0.5f + e * (1.0f / 3 + e * 0.25f)));
  return e < 0.03f ? tail : log(x < 0.05f ? series : 1.0f - e);
}

// Successive sampling of c.to_draw keys into `taken`, which holds the forced keys before. Returns
// the arrival time of the next key that would have come, in units of 1 / weight of the row whose
// reference is *reference: think of keys arriving by Poisson processes of rate weight. The arrivals
// of a rate-W process after m draws is Gamma(m) / W.
inline double draw_distinct(const RowContext& c, UniformStream* uniforms, UniformStream* arrivals,
                            const Row& row, Row* rest, int32_t* list, uint64_t* taken,
                            double* reference) {
  const Row* current = &row;
  double time = 0, mass = 0;  // mass: drawn from `current`
  int64_t draws = 0;          // made from `current`
  const auto leave_out_taken = [&] {
    if (arrivals != nullptr) time += gamma_variate(draws, arrivals) / current->total;
    const double old_reference = current->reference;
    exclude_taken(c, taken, *current, rest);
    current = rest;
    time *= __builtin_exp2(current->reference - old_reference);
    mass = 0;
    draws = 0;
  };
  int64_t missing = c.to_draw;
  for (;;) {
    take_draws(uniforms, missing, list);
    draws += missing;
    const int64_t count = missing;
    find_keys(*current, list, count, [&](int64_t, int64_t j) {
      const bool is_new = insert_bit(taken, j);
      mass += is_new ? static_cast<double>(current->weight[j]) : 0.0;
      missing -= is_new;
    });
    if (missing == 0) break;
    // Repeats come at the rate mass / total: leave the taken keys out where that is cheaper than
    // drawing on.
    const double share = mass / current->total;
    const double keys_per_draw = 24;  // what scanning keys costs, measured in draws
    if (share > kCancellation || static_cast<double>(missing) * share >
                                     (1 - share) * static_cast<double>(c.limit) / keys_per_draw)
      leave_out_taken();
  }
  if (arrivals == nullptr) return 0;
  if (mass > kCancellation * current->total) leave_out_taken();
  *reference = current->reference;
  return time + gamma_variate(draws, arrivals) / current->total +
         gamma_variate(1, arrivals) / (current->total - mass);
}

// Takes every key whose inclusion probability would reach 1 and leaves the others in *rest; returns
// how many places are left for them. Shared by the heads of a row.
inline int64_t cap_inclusion(const RowContext& c, const Row& row, Row* rest, uint64_t* taken,
                             const Row** remaining) {
  int64_t places = c.to_draw;
  *remaining = &row;
  while (places > 0 && static_cast<double>((*remaining)->max) * static_cast<double>(places) >=
                           (*remaining)->total) {
    const Row& current = **remaining;
    const float cap = static_cast<float>(current.total / static_cast<double>(places));
    int64_t capped = 0;
    for (int64_t j = 0; j < c.limit && capped < places; ++j)
      if (current.weight[j] >= cap || current.weight[j] == current.max) {
        set_bit(taken, j);
        ++capped;
      }
    places -= capped;
    if (places == 0) break;
    exclude_taken(c, taken, current, rest);
    *remaining = rest;
  }
  return places;
}

// Takes the keys at which the running sum of inclusion probabilities passes u, u + 1, ..., u +
// places - 1; u = uniform / 2^32.
inline void draw_systematic(const Row& row, int64_t places, uint32_t uniform, int32_t* draws,
                            uint64_t* taken) {
  const double u = uniform_double(uniform), step = 0x1p31 / static_cast<double>(places);
  for (int64_t n = 0; n < ceil_div(places, kLanes<float>) * kLanes<float>; ++n)
    draws[n] = static_cast<int32_t>(min_of((u + static_cast<double>(n)) * step, kWhole - 1.0));
  const int64_t end = row.blocks * kTile;
  find_keys(row, draws, places, [&](int64_t, int64_t j) {
    // A probability just below 1 can be passed twice by rounding: the next free key stands in.
    while (!(row.weight[j] > 0 && insert_bit(taken, j))) j = (j + 1) % end;
  });
}

// The k largest scores, ties to the lower index. Scores are compared as integers of the same order.
inline void take_largest(float* score, int64_t limit, int64_t k, uint64_t* taken) {
  constexpr int L = kLanes<float>;
  const int64_t n = ceil_div(limit, kTile) * kTile;
  const auto ordered = [](VecI bits) { return bits ^ (bits >> 31 & 0x7FFFFFFF); };
  for (int64_t j = 0; j < n; j += L)  // + 0 makes -0 equal to 0
    store(score + j, bit_cast<Vec<float>>(ordered(bit_cast<VecI>(load(score + j) + 0.0f))));
  const auto key = [&](int64_t j) { return bit_cast<VecI>(load(score + j)); };
  // Bisect for the largest threshold that at least k keys reach.
  int64_t low = INT32_MIN, high = int64_t{INT32_MAX} + 1, reached = n;
  while (high - low > 1 && reached != k) {
    const int64_t middle = (low + high) >> 1;
    VecI count{};
    for (int64_t j = 0; j < n; j += L) count -= key(j) >= static_cast<int32_t>(middle);
    int64_t total = 0;
    for (int l = 0; l < L; ++l) total += count[l];
    if (total >= k) {
      low = middle;
      reached = total;
    } else {
      high = middle;
    }
  }
  int64_t surplus = reached - k;  // of those equal to the threshold, the last are left
  for (int64_t j = limit - 1; j >= 0; --j) {
    const int32_t x = bit_cast<int32_t>(score[j]);
    if (x < low) continue;
    if (x == low && surplus > 0)
      --surplus;
    else
      set_bit(taken, j);
  }
}

inline void sort_ascending(int32_t* x, int64_t n) {  // heap sort: no library template, no bad case
  const auto sift = [&](int64_t root, int64_t end) {
    for (int64_t child; (child = 2 * root + 1) < end; root = child) {
      if (child + 1 < end && x[child] < x[child + 1]) ++child;
      if (x[root] >= x[child]) return;
      const int32_t t = x[root];
      x[root] = x[child];
      x[child] = t;
    }
  };
  for (int64_t root = n / 2; root-- > 0;) sift(root, n);
  for (int64_t end = n; end-- > 1;) {
    const int32_t t = x[0];
    x[0] = x[end];
    x[end] = t;
    sift(0, end);
  }
}

// ---- output -------------------------------------------------------------------------------------

// One head's row of results.
struct Output {
  int32_t* indices;      // [K]
  float* log_inclusion;  // [K] or null
};

inline Output output_row(const RowContext& c, int64_t head) {
  const SketchSampleParams& p = *c.p;
  const int64_t at = ((c.b * p.H_i + head) * p.N + c.i) * p.K;
  return {p.indices + at, p.log_inclusion == nullptr ? nullptr : p.log_inclusion + at};
}

// Lists the set bits in ascending order; returns how many. With about one bit a word, a loop over
// bits would mispredict its exit every time: so kEager bits are listed whether there or not, up to
// kEager entries beyond the last.
inline int64_t list_bits(const uint64_t* bits, int64_t words, int32_t* list) {
  int64_t n = 0;
  for (int64_t i = 0; i < words; ++i) {
    uint64_t word = bits[i];
    const int32_t first = static_cast<int32_t>(i * kWordBits);
    const int count = __builtin_popcountll(word);
    for (int e = 0; e < kEager; ++e) {
      list[n + e] = first + (word == 0 ? 0 : __builtin_ctzll(word));
      word &= word - 1;
    }
    if (__builtin_expect(count > kEager, 0))
      for (int e = kEager; e < count; ++e, word &= word - 1)
        list[n + e] = first + __builtin_ctzll(word);
    n += count;
  }
  return n;
}

// The taken keys in ascending order, then -1; returns how many.
inline int64_t write_indices(const RowContext& c, const uint64_t* taken, int32_t* list,
                             Output out) {
  const int64_t n = list_bits(taken, c.words, list);
  std::memcpy(out.indices, list, static_cast<size_t>(n) * sizeof(int32_t));
  for (int64_t j = n; j < c.p->K; ++j) out.indices[j] = -1;
  return n;
}

// log_inclusion = f(weight) of the n drawn keys, 0 of those that were taken for certain, -inf in
// unused slots.
template <typename F>
inline void write_log_inclusion(const RowContext& c, const float* weight, const uint64_t* certain,
                                int64_t n, float* gathered, Output out, F&& f) {
  constexpr int L = kLanes<float>;
  for (int64_t j = 0; j < n; ++j) gathered[j] = weight[out.indices[j]];
  for (int64_t j = n; j < ceil_div(n, L) * L; ++j) gathered[j] = 1.0f;
  for (int64_t j = 0; j < n; j += L) store(gathered + j, f(load(gathered + j)));
  for (int64_t j = 0; j < n; ++j)
    out.log_inclusion[j] = test_bit(certain, out.indices[j]) ? 0.0f : gathered[j];
  for (int64_t j = n; j < c.p->K; ++j) out.log_inclusion[j] = -__builtin_inff();
}

inline void copy_head(const RowContext& c, int64_t from, int64_t to) {
  const Output a = output_row(c, from), b = output_row(c, to);
  std::memcpy(b.indices, a.indices, static_cast<size_t>(c.p->K) * sizeof(int32_t));
  if (a.log_inclusion != nullptr)
    std::memcpy(b.log_inclusion, a.log_inclusion, static_cast<size_t>(c.p->K) * sizeof(float));
}

// Rows whose keys are the same for every head and certain: `taken` whole.
inline void write_certain(const RowContext& c, const uint64_t* taken, int32_t* list) {
  const Output out = output_row(c, 0);
  const int64_t n = write_indices(c, taken, list, out);
  if (out.log_inclusion != nullptr)
    for (int64_t j = 0; j < c.p->K; ++j) out.log_inclusion[j] = j < n ? 0.0f : -__builtin_inff();
  for (int64_t head = 1; head < c.p->H_i; ++head) copy_head(c, 0, head);
}

inline void sample_gumbel(const RowContext& c, PhiloxKey key, PhiloxKey arrival_key, Scratch* s) {
  for (int64_t head = 0; head < c.p->H_i; ++head) {
    const Output out = output_row(c, head);
    std::memcpy(s->taken, s->forced, static_cast<size_t>(c.words) * sizeof(uint64_t));
    UniformStream uniforms(key, c.b, head, c.i), arrivals(arrival_key, c.b, head, c.i);
    double reference = s->row.reference;
    const double time =
        draw_distinct(c, &uniforms, out.log_inclusion == nullptr ? nullptr : &arrivals, s->row,
                      &s->rest, s->draws, s->taken, &reference);
    const int64_t n = write_indices(c, s->taken, s->list, out);
    if (out.log_inclusion == nullptr) continue;
    const float* weight = s->row.weight;
    if (reference != s->row.reference) {  // weights of keys drawn since lie in another range
      score_rows<false>(*c.p, c.b, c.q, 1, c.limit, s->rest.weight, 0);
      const float shift = static_cast<float>(reference);
      for (int64_t j = 0; j < s->row.blocks * kTile; j += kLanes<float>)
        store(s->rest.weight + j, exp2(load(s->rest.weight + j) - shift));
      weight = s->rest.weight;
    }
    const float rate = static_cast<float>(time);
    write_log_inclusion(c, weight, s->forced, n, s->drawn_weight, out,
                        [&](Vec<float> w) { return log_one_minus_exp(w * rate); });
  }
}

inline void sample_systematic(const RowContext& c, PhiloxKey key, Scratch* s) {
  const Row* remaining;
  uint64_t* certain = s->forced;
  const int64_t places = cap_inclusion(c, s->row, &s->rest, certain, &remaining);
  const float inclusion_scale = static_cast<float>(static_cast<double>(places) / remaining->total);
  for (int64_t head = 0; head < c.p->H_i; ++head) {
    const Output out = output_row(c, head);
    std::memcpy(s->taken, certain, static_cast<size_t>(c.words) * sizeof(uint64_t));
    const uint32_t bits = philox4x32(philox_counter(c.b, head, c.i, 0), key).word[0];
    if (places > 0) draw_systematic(*remaining, places, bits, s->draws, s->taken);
    const int64_t n = write_indices(c, s->taken, s->list, out);
    if (out.log_inclusion == nullptr) continue;
    write_log_inclusion(c, remaining->weight, certain, n, s->drawn_weight, out, [&](Vec<float> w) {
      return min(log(max(w * inclusion_scale, broadcast(1e-37f))), broadcast(0.0f));
    });
  }
}

inline void sample_multinomial(const RowContext& c, PhiloxKey key, Scratch* s) {
  const float inclusion_scale = static_cast<float>(static_cast<double>(c.to_draw) / s->row.total);
  for (int64_t head = 0; head < c.p->H_i; ++head) {
    const Output out = output_row(c, head);
    UniformStream uniforms(key, c.b, head, c.i);
    take_draws(&uniforms, c.to_draw, s->draws);
    find_keys(s->row, s->draws, c.to_draw,
              [&](int64_t i, int64_t j) { out.indices[i] = static_cast<int32_t>(j); });
    int64_t n = c.to_draw;
    for_each_bit(s->forced, c.words,
                 [&](int64_t j) { out.indices[n++] = static_cast<int32_t>(j); });
    sort_ascending(out.indices, n);
    if (out.log_inclusion == nullptr) continue;
    write_log_inclusion(c, s->row.weight, s->forced, n, s->drawn_weight, out, [&](Vec<float> w) {
      return log(max(w * inclusion_scale, broadcast(1e-37f)));
    });
  }
}

// ---- rows together ------------------------------------------------------------------------------

// Marks the forced keys of row i; returns how many.
inline int64_t mark_forced(const SketchSampleParams& p, const float* key_bias, int64_t i,
                           int64_t limit, uint64_t* forced) {
  int64_t n = 0;
  for (int64_t j = 0; j < limit && n < p.num_sinks; ++j)
    if (key_bias[j] == 0) n += insert_bit(forced, j);
  if (p.window > 0) {
    const int64_t position = i + p.M - p.N;
    const int64_t first = p.is_causal ? position - p.window + 1 : position - p.window / 2;
    const int64_t last = p.is_causal ? position : position + p.window / 2;
    for (int64_t j = max_of<int64_t>(first, 0); j <= min_of(last, limit - 1); ++j)
      if (key_bias[j] == 0) n += insert_bit(forced, j);
  }
  return n;
}

inline int64_t count_valid(const SketchSampleParams& p, const float* key_bias, int64_t limit) {
  if (p.key_mask == nullptr) return limit;
  int64_t n = 0;
  for (int64_t j = 0; j < limit; ++j) n += key_bias[j] == 0;
  return n;
}

// For topk the scale only counts by its sign: without it, scores that are equal in exact arithmetic
// stay equal.
inline double query_factor(const SketchSampleParams& p) {
  if (p.method != SampleMethod::kTopK) return p.scale * kLog2e;
  return p.scale > 0 ? 1.0 : (p.scale < 0 ? -1.0 : 0.0);
}

template <typename T>
inline float load_query(const SketchSampleParams& p, int64_t b, int64_t i, float* q) {
  const T* x = static_cast<const T*>(p.q_sketch) + b * p.q_stride[0] + i * p.q_stride[1];
  const double factor = query_factor(p);
  float square = 0;
  for (int64_t d = 0; d < p.S; ++d) {
    q[d] = static_cast<float>(static_cast<double>(to_acc(x[d])) * factor);
    square += q[d] * q[d];
  }
  return __builtin_sqrtf(square);
}

inline bool is_finite(float x) { return x - x == 0; }

}  // namespace sampling

inline int64_t sketch_sample_num_tasks(const SketchSampleParams& p) {
  return p.B * ceil_div(p.N, sampling::kRowsPerTask);
}

inline int64_t sketch_sample_scratch_bytes(const SketchSampleParams& p) {
  ScratchAllocator arena(nullptr);
  sampling::lay_out(p, &arena);
  return arena.bytes();
}

inline void sketch_sample(const SketchSampleParams& p, int64_t task, void* scratch) {
  using namespace sampling;
  ScratchAllocator arena(scratch);
  Scratch s = lay_out(p, &arena);
  const PhiloxKey key = philox_key(p.seed, p.offset, kSampleStream);
  const PhiloxKey arrival_key = philox_key(p.seed, p.offset, kArrivalStream);
  const int64_t blocks_per_batch = ceil_div(p.N, kRowsPerTask), tiles = ceil_div(p.M, kTile);
  const int64_t b = task / blocks_per_batch, first = task % blocks_per_batch * kRowsPerTask;
  const float* key_bias = p.key_bias + b * tiles * kTile;

  float key_norm = 0;
  for (int64_t t = 0; t < tiles; ++t) {
    const float norm = p.tile_norm[b * tiles + t];
    key_norm = is_finite(norm) ? max_of(key_norm, norm) : __builtin_inff();
  }

  for (int64_t i0 = first; i0 < min_of(first + kRowsPerTask, p.N); i0 += kRows) {
    const int64_t rows = min_of<int64_t>(kRows, p.N - i0);
    float query_norm = 0;
    int64_t valid[kRows] = {};
    std::memset(s.q, 0, static_cast<size_t>(kRows * p.S) * sizeof(float));
    dispatch_dtype(p.dtype, [&](auto dtype) {
      for (int64_t r = 0; r < rows; ++r) {
        valid[r] = count_valid(p, key_bias, key_limit(p, i0 + r));
        if (valid[r] == 0) continue;  // such a query is not looked at, whatever it holds
        const float norm = load_query<decltype(dtype)>(p, b, i0 + r, s.q + r * p.S);
        query_norm = is_finite(norm) ? max_of(query_norm, norm) : __builtin_inff();
      }
    });
    const float bound =
        query_norm * key_norm;  // Cauchy-Schwarz: no |score| of these rows is larger
    if (!is_finite(bound) || !is_finite(query_norm) || !is_finite(key_norm)) {
      __atomic_store_n(p.error, kSketchNotFinite, __ATOMIC_RELAXED);
      return;
    }
    const bool plain_exp = bound <= kPlainExpBound && p.method != SampleMethod::kTopK;
    const int64_t group_limit = key_limit(p, i0 + rows - 1);
    if (plain_exp)
      score_rows<true>(p, b, s.q, kRows, group_limit, s.weight, tiles * kTile);
    else
      score_rows<false>(p, b, s.q, kRows, group_limit, s.weight, tiles * kTile);

    for (int64_t r = 0; r < rows; ++r) {
      RowContext c{&p, b, i0 + r, s.q + r * p.S, key_limit(p, i0 + r), 0, 0};
      c.words = ceil_div(c.limit, kWordBits);
      std::memset(s.forced, 0, static_cast<size_t>(c.words) * sizeof(uint64_t));
      c.to_draw = p.K - mark_forced(p, key_bias, c.i, c.limit, s.forced);
      if (valid[r] <= p.K) {
        for (int64_t j = 0; j < c.limit; ++j)
          if (key_bias[j] == 0) set_bit(s.forced, j);
        c.to_draw = 0;
      }
      if (c.to_draw == 0) {
        write_certain(c, s.forced, s.list);
        continue;
      }
      s.row.weight = s.weight + r * tiles * kTile;
      s.row.reference = 0;
      if (plain_exp) {
        blank(s.forced, c.words, c.limit, 0.0f, s.row.weight);
      } else {
        blank(s.forced, c.words, c.limit, -__builtin_inff(), s.row.weight);
        if (p.method == SampleMethod::kTopK) {
          take_largest(s.row.weight, c.limit, c.to_draw, s.forced);
          write_certain(c, s.forced, s.list);
          continue;
        }
        normalise(c.limit, &s.row);
      }
      sum_row(c.limit, &s.row);
      if (p.method == SampleMethod::kGumbel)
        sample_gumbel(c, key, arrival_key, &s);
      else if (p.method == SampleMethod::kSystematic)
        sample_systematic(c, key, &s);
      else
        sample_multinomial(c, key, &s);
    }
  }
}

}  // namespace smartbird::SMARTBIRD_ISA

#endif  // SMARTBIRD_SKETCH_SAMPLE_INL_H_
