// q_sketch [B, H_s, N, S], k_sketch [B, H_ks, M, S] -> indices, log_inclusion [B, H_i, N, K]: every
// index head draws its own keys of a row from softmax(q_sketch k_sketch^T scale).
//
// A row's scores are made once, for all heads of a sketch, as weights 2^(score - reference) in a
// buffer of one thread, with running sums of them made tile by tile while the weights are in
// registers' reach:
// `cum` within blocks of 32 keys, `block_start` over blocks. To draw a key is to find a uniform
// number among the running sums: a guide table names the block, one compare over 32 sums names the
// key. Numbers are drawn in ascending order, so the keys come out in ascending order too, and
// repeats side by side: no sort and no set.
//
// `gumbel` needs no noise per key: the k largest of log p + Gumbel noise are the first k distinct
// results of independent draws from p. Drawing exactly the number still missing, again and again,
// never overshoots.
#include "pack-inl.h"
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

// While a row's largest weight is within these, 2^score needs no reference: 2^86 * 2^20 keys stays
// far inside float, and what underflows beside 2^-40 is below what draws resolve. The row alone
// decides.
constexpr float kLeastPlainWeight = 0x1p-40f, kMostPlainWeight = 0x1p86f;
// Below this total, weights relative to the largest have begun to underflow: score again relative
// to the rest.
constexpr double kUnderflow = 1e-25;
// Share of a row's mass beyond which "total minus chosen" has lost its digits.
constexpr double kCancellation = 0.999;

// Draws are integers in [0, kWhole]: running sums over blocks are kept on the same grid, so that to
// find a block is to compare integers, many draws at once.
constexpr int32_t kWhole = INT32_MAX;
constexpr int kWholeBits = 31;

// Ascending key numbers.
struct KeyList {
  int32_t* key;
  int64_t size;
};

// A row of weights with its running sums, all in the order of an interleaved tile, see
// interleaved(); weights are 0 where the key cannot be drawn.
struct Row {
  float* weight;        // [padded M]
  float* cum;           // [padded M] inclusive running sum within each block of kTile
  double* block_start;  // [blocks + 1] running sum before each block
  int64_t blocks;
  double reference;  // weight = 2^(score - reference)
  Vec<float> top;    // its largest lane is the largest weight

  // What find_keys needs, made by index_blocks.
  int32_t* start;     // [blocks + 1] block_start on a grid where the total is 2^31
  int32_t* guide;     // [guide size] the block that holds g * 2^31 / guide size, or one before it
  int guide_shift;    // guide index of a draw: draw >> guide_shift
  float draw_weight;  // total / 2^31

  double total() const { return block_start[blocks]; }
};

struct Scratch {
  float* q;        // [kRows, S] queries times scale * log2(e)
  KeyList forced;  // [kRows, K] of each row: keys that are taken without drawing
  KeyList
      blank;  // [kRows, blanks] of each row: those, and what its last block has beyond its limit
  KeyList taken;        // [K] keys of the head at hand
  int32_t* batch;       // [padded K] keys just drawn
  int32_t* place;       // [K]
  int32_t* draws;       // [padded K]
  float* spacing;       // [padded K + 1] also what find_keys works in
  float* drawn_weight;  // [padded K]
  Row rows[kRows];      // those scored together; they share start and guide
  Row rest;             // the row at hand without the keys taken so far
};

inline int64_t padded_keys(const SketchSampleParams& p) {
  return ceil_div(p.most_keys, kTile) * kTile;
}

// Four entries per block: three of four draws then need no step beyond the guide's block.
inline int guide_bits(int64_t blocks) {
  int bits = 6;
  while (bits < 13 && (int64_t{1} << bits) < 4 * blocks) ++bits;
  return bits;
}

inline int64_t blanks_per_row(const SketchSampleParams& p) { return p.K + kTile; }

inline Scratch lay_out(const SketchSampleParams& p, ScratchAllocator* arena) {
  constexpr int L = kLanes<float>;
  const int64_t padded = padded_keys(p), blocks = padded / kTile, vectors = ceil_div(p.K, L) * L;
  Scratch s{};
  s.q = arena->take<float>(kRows * p.S);
  s.forced.key = arena->take<int32_t>(kRows * p.K);
  s.blank.key = arena->take<int32_t>(kRows * blanks_per_row(p));
  s.taken.key = arena->take<int32_t>(vectors);
  s.batch = arena->take<int32_t>(vectors + L);
  s.place = arena->take<int32_t>(p.K);
  s.draws = arena->take<int32_t>(vectors);
  s.spacing = arena->take<float>(vectors + L);
  s.drawn_weight = arena->take<float>(vectors);
  const auto take_row = [&](Row* row) {
    row->weight = arena->take<float>(padded);
    row->cum = arena->take<float>(padded);
    row->block_start = arena->take<double>(blocks + 1);
  };
  const auto take_index = [&](Row* row) {
    row->start = arena->take<int32_t>(blocks + 1);
    row->guide = arena->take<int32_t>((int64_t{1} << guide_bits(blocks)) + L);
  };
  take_index(&s.rows[0]);
  for (Row& row : s.rows) {
    take_row(&row);
    row.start = s.rows[0].start;
    row.guide = s.rows[0].guide;
  }
  take_row(&s.rest);
  take_index(&s.rest);
  return s;
}

// ---- lists of keys ------------------------------------------------------------------------------

// Removes repeats, which lie side by side.
inline void remove_repeats(KeyList* list) {
  constexpr int L = kLanes<float>;
  int64_t n = 0;
  while (n + L < list->size && !any(load_int(list->key + n) == load_int(list->key + n + 1))) n += L;
  for (int64_t i = n; i < list->size; ++i) {
    const int32_t key = list->key[i];
    list->key[n] = key;
    n += i + 1 == list->size || list->key[i + 1] != key;
  }
  list->size = n;
}

// Number of keys below `key`.
inline int64_t lower_bound(const KeyList& list, int32_t key) {
  int64_t low = 0;
  for (int64_t n = list.size; n > 0;) {
    const int64_t half = n / 2, next = low + half + 1;
    const bool above = list.key[low + half] < key;
    low = above ? next : low;
    n = above ? n - half - 1 : half;
  }
  return low;
}

// Merges what `more` has and `list` lacks into `list`, which has room. `more` and `place` are
// scratch.
inline void merge(KeyList more, int32_t* place, KeyList* list) {
  int64_t n = 0;
  for (int64_t i = 0; i < more.size; ++i) {
    const int64_t at = lower_bound(*list, more.key[i]);
    const bool repeats = (at < list->size && list->key[at] == more.key[i]) ||
                         (n > 0 && more.key[n - 1] == more.key[i]);
    place[n] = static_cast<int32_t>(at);
    more.key[n] = more.key[i];
    n += !repeats;
  }
  int64_t end = list->size;
  list->size += n;
  for (int64_t i = n; i-- > 0; end = place[i]) {
    std::memmove(list->key + place[i] + i + 1, list->key + place[i],
                 static_cast<size_t>(end - place[i]) * sizeof(int32_t));
    list->key[place[i] + i] = more.key[i];
  }
}

// ---- a row --------------------------------------------------------------------------------------

// Puts `value` where a key cannot be drawn.
inline void put(const KeyList& keys, float value, float* weight) {
  for (int64_t n = 0; n < keys.size; ++n) weight[interleaved(keys.key[n])] = value;
}

// Scores to weights relative to their maximum, which becomes the reference.
inline void normalise(int64_t blocks, Row* row) {
  const int64_t n = blocks * kTile;
  Vec<float> top = broadcast(-__builtin_inff());
  for (int64_t j = 0; j < n; j += kLanes<float>) top = max(top, load(row->weight + j));
  const float reference = reduce_max(top);
  for (int64_t j = 0; j < n; j += kLanes<float>)
    store(row->weight + j, exp2(load(row->weight + j) - reference));
  row->reference = static_cast<double>(reference);
}

inline void begin_sums(Row* row) {
  row->blocks = 0;
  row->block_start[0] = 0;
  row->top = Vec<float>{};
}

// The running sums of block t = row->blocks. Vector v holds the keys v, v + V, v + 2 V, ... of the
// block, V the vectors of a block: sums go down the vectors first, and across lanes but once.
SMARTBIRD_INLINE void add_block(Row* row) {
  constexpr int L = kLanes<float>, V = kTile / L;
  const int64_t t = row->blocks++;
  const float* weight = row->weight + t * kTile;
  Vec<float> sums[V], top = row->top;
  for (int v = 0; v < V; ++v) {
    const Vec<float> w = load(weight + v * L);
    sums[v] = v == 0 ? w : sums[v - 1] + w;
    top = max(top, w);
  }
  const Vec<float> across = prefix_sum(sums[V - 1]), before = shift_up(across);
  for (int v = 0; v < V; ++v) store(row->cum + t * kTile + v * L, before + sums[v]);
  row->top = top;
  row->block_start[t + 1] = row->block_start[t] + static_cast<double>(across[L - 1]);
}

inline void sum_row(int64_t blocks, Row* row) {
  begin_sums(row);
  while (row->blocks < blocks) add_block(row);
}

// start, guide and what goes with them.
inline void index_blocks(Row* row) {
  constexpr int L = kLanes<float>;
  const int bits = guide_bits(row->blocks), shift = kWholeBits - bits;
  const double scale = 0x1p31 / row->total();
  for (int64_t t = 0; t < row->blocks; ++t)
    row->start[t] = static_cast<int32_t>(min_of(row->block_start[t] * scale, kWhole - 1.0));
  row->start[row->blocks] = kWhole;
  // Block t is the guide of g from the first g << shift at or beyond its start to that of the next
  // block: about four, written as a whole vector whose surplus the next block overwrites.
  const int32_t cell = (1 << shift) - 1;
  const auto first_entry = [&](int64_t t) { return (int64_t{row->start[t]} + cell) >> shift; };
  for (int64_t t = 0; t < row->blocks; ++t) {
    const int64_t end = t + 1 < row->blocks ? first_entry(t + 1) : int64_t{1} << bits;
    int64_t g = first_entry(t);
    do {
      const VecI block = VecI{} + static_cast<int32_t>(t);
      std::memcpy(row->guide + g, &block, sizeof(block));
      g += L;
    } while (g < end);
  }
  row->guide_shift = shift;
  row->draw_weight = static_cast<float>(row->total() * 0x1p-31);
}

// A key of positive weight at or nearest after j, else nearest before it.
inline int64_t nearest_drawable(const Row& row, int64_t j) {
  const int64_t n = row.blocks * kTile;
  for (int64_t after = j; after < n; ++after)
    if (row.weight[interleaved(after)] > 0) return after;
  for (int64_t before = min_of(j, n) - 1; before > 0; --before)
    if (row.weight[interleaved(before)] > 0) return before;
  return 0;
}

// keys[n] holds draw n: the first key whose running sum exceeds it. Arrays are padded to whole
// vectors; `within` is scratch. Loop by loop, so that no vector is loaded from scalars just stored.
inline void find_keys(const Row& row, const int32_t* __restrict draws, int64_t count,
                      float* __restrict within, int32_t* __restrict keys) {
  constexpr int L = kLanes<float>;
  const int32_t* __restrict guide = row.guide;
  const int32_t* __restrict start = row.start;
  const int shift = row.guide_shift;
  int32_t* rest = reinterpret_cast<int32_t*>(within);
  for (int64_t n = 0; n < count; ++n) {
    const int32_t draw = draws[n];
    // The first two steps have no branch to mispredict.
    int64_t block = guide[draw >> shift];
    block += draw >= start[block + 1];
    block += draw >= start[block + 1];
    while (__builtin_expect(draw >= start[block + 1], 0)) ++block;
    rest[n] = draw - start[block];
    keys[n] = static_cast<int32_t>(block * kTile);
  }
  for (int64_t n = 0; n < count; n += L)
    store(within + n, __builtin_convertvector(load_int(rest + n), Vec<float>) * row.draw_weight);
  for (int64_t n = 0; n < count; ++n) keys[n] += count_le(row.cum + keys[n], within[n]);

  // Sums within a block are rounded in an order of their own: rarely, a draw falls between two that
  // should be equal.
  const int32_t last = static_cast<int32_t>(row.blocks * kTile) - 1;
  for (int64_t n = count; n < ceil_div(count, L) * L; ++n) keys[n] = keys[0];
  for (int64_t n = 0; n < count; n += L) {
    const VecI key = load_int(keys + n), beyond = key > last;
    const VecI off = (gather(row.weight, interleaved(key + beyond)) <= 0.0f) | beyond;
    if (__builtin_expect(any(off), 0))
      for (int l = 0; l < L; ++l)
        if (off[l]) keys[n + l] = static_cast<int32_t>(nearest_drawable(row, keys[n + l]));
  }
}

// The weights of all keys of a list, padded to whole vectors, those beyond it 0.
inline void gather_weights(const Row& row, const KeyList& list, float* weights) {
  constexpr int L = kLanes<float>;
  for (int64_t n = 0; n < list.size; n += L) {
    const VecI lane = iota_int() + static_cast<int32_t>(n);
    const VecI here = lane < static_cast<int32_t>(list.size);
    const VecI key = load_int(list.key + n) & here;
    const Vec<float> weight = gather(row.weight, interleaved(key));
    store(weights + n, bit_cast<Vec<float>>(bit_cast<VecI>(weight) & here));
  }
}

// What the rows of a task share: a sequence and a sketch.
struct TaskContext {
  const SketchSampleParams* p;
  Sequence sequence;
  int64_t sketch;
  const float* k_tiles;  // of the sequence's keys
  const float* key_bias;
  const uint8_t* key_mask;  // or null
  PhiloxKey key, arrival_key;

  int64_t heads() const { return p->H_i / p->H_s; }  // that the sketch serves
};

// What one row's draws share. Queries and keys are counted from the first of the sequence.
struct RowContext {
  const SketchSampleParams* p;
  const TaskContext* task;
  int64_t i, position;
  const float* q;  // [S] scaled query
  int64_t limit;   // keys [0, limit) may be attended as far as key_mask allows
  int64_t valid;   // how many those are
  KeyList forced, blank;
  int64_t to_draw;  // places left by the forced keys; fewer than the keys that can be drawn

  int64_t blocks() const { return ceil_div(limit, kTile); }
};

// The address of a head's random numbers.
inline int64_t draw_head(const RowContext& c, int64_t head) {
  return c.p->visible.first_head + c.task->sketch * c.task->heads() + head;
}

// weight = score of one row.
inline void score_row(const RowContext& c, float* weight) {
  const int64_t S = c.p->S;
  for (int64_t t = 0; t < c.blocks(); ++t)
    score_tile<1>(c.q, S, c.task->k_tiles + t * S * kTile, S, c.task->key_bias + t * kTile,
                  [&](int, int column, Vec<float> s) { store(weight + t * kTile + column, s); });
}

// rest = row without the taken keys, scored again where what remains has underflowed. `rest` may be
// `row`.
inline void exclude_taken(const RowContext& c, const KeyList& taken, const Row& row, Row* rest) {
  const int64_t blocks = c.blocks();
  if (rest->weight != row.weight)
    std::memcpy(rest->weight, row.weight, static_cast<size_t>(blocks * kTile) * sizeof(float));
  rest->reference = row.reference;
  put(taken, 0.0f, rest->weight);
  sum_row(blocks, rest);
  if (rest->total() < kUnderflow) {
    score_row(c, rest->weight);
    put(c.blank, -__builtin_inff(), rest->weight);
    put(taken, -__builtin_inff(), rest->weight);
    normalise(blocks, rest);
    put(c.blank, 0.0f, rest->weight);
    put(taken, 0.0f, rest->weight);
    sum_row(blocks, rest);
  }
  index_blocks(rest);
}

// ---- uniform numbers ----------------------------------------------------------------------------

// n uniform draws in [0, kWhole), ascending, and zeros up to whole vectors: n + 1 exponential
// spacings over their sum are the order statistics. Sums are float within a vector and double
// beyond it; as what they are divided by is no round number, draws fall on no grid but that of
// integers.
inline void take_draws(ExponentialStream* spacings, int64_t n, float* spacing, int32_t* draws) {
  constexpr int L = kLanes<float>;
  spacings->take(n + 1, spacing);
  double total = 0;
  for (int64_t i = 0; i <= n; i += L) {
    const Vec<float> sums = prefix_sum(load(spacing + i));
    store(spacing + i, sums);
    total += static_cast<double>(sums[L - 1]);
  }
  const double scale = (kWhole - 1.0) / total;
  double before = 0;
  for (int64_t i = 0; i < n; i += L) {
    // Each lane's sum is rounded in an order of its own: a small spacing may leave it above the
    // next.
    Vec<float> sums = min(load(spacing + i), broadcast(spacing[i + L - 1]));
    if (__builtin_expect(any_greater(shift_up(sums), sums), 0))
      for (int l = 1; l < L; ++l) sums[l] = max_of(sums[l], sums[l - 1]);
    const VecI draw = scaled_to_int(sums, scale, before * scale);
    std::memcpy(draws + i, &draw, sizeof(draw));
    before += static_cast<double>(sums[L - 1]);
  }
}

// Sum of n independent Exp(1) variables.
inline double gamma_variate(int64_t n, ExponentialStream* arrivals, float* spacing) {
  arrivals->take(n, spacing);
  double sum = 0;
  for (int64_t i = 0; i < n; i += kLanes<float>)
    sum += static_cast<double>(reduce_add(load(spacing + i)));
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

// ---- methods: each fills `taken` for one head ---------------------------------------------------

// Successive sampling of c.to_draw keys. Returns the arrival time of the next key that would have
// come, in units of 1 / weight of the row whose reference is *reference: think of keys arriving by
// Poisson processes of rate weight. The arrivals of a rate-W process after m draws is Gamma(m) / W.
inline double draw_distinct(const RowContext& c, ExponentialStream* spacings,
                            ExponentialStream* arrivals, const Row& row, Scratch* s,
                            double* reference) {
  const Row* current = &row;
  KeyList* taken = &s->taken;
  double time = 0;
  int64_t draws = 0;       // made from `current`
  const auto wait = [&] {  // for all of them, in pieces that `spacing` holds
    double gamma = 0;
    for (; draws > 0; draws -= min_of(draws, c.p->K))
      gamma += gamma_variate(min_of(draws, c.p->K), arrivals, s->spacing);
    return gamma / current->total();
  };
  // What was drawn from `current`; keys taken before weigh nothing in it.
  const auto mass = [&] {
    gather_weights(*current, *taken, s->drawn_weight);
    Vec<float> sum{};
    for (int64_t n = 0; n < taken->size; n += kLanes<float>) sum += load(s->drawn_weight + n);
    return static_cast<double>(reduce_add(sum));
  };
  const auto leave_out_taken = [&] {
    if (arrivals != nullptr) time += wait();
    const double old_reference = current->reference;
    exclude_taken(c, *taken, *current, &s->rest);
    current = &s->rest;
    time *= __builtin_exp2(current->reference - old_reference);
    draws = 0;
  };

  taken->size = 0;
  for (bool first = true;; first = false) {
    const int64_t missing = c.to_draw - taken->size;
    take_draws(spacings, missing, s->spacing, s->draws);
    draws += missing;
    find_keys(*current, s->draws, missing, s->spacing, first ? taken->key : s->batch);
    if (first) {
      taken->size = missing;
      remove_repeats(taken);
    } else {
      merge({s->batch, missing}, s->place, taken);
    }
    const int64_t left = c.to_draw - taken->size;
    if (left == 0) break;
    if (first && left * 2 < missing) continue;
    // Repeats come at the rate mass / total: leave the taken keys out where that is cheaper than
    // drawing on.
    const double share = mass() / current->total();
    const double keys_per_draw = 24;  // what scanning keys costs, measured in draws
    if (share > kCancellation || static_cast<double>(left) * share >
                                     (1 - share) * static_cast<double>(c.valid) / keys_per_draw)
      leave_out_taken();
  }
  if (arrivals == nullptr) return 0;
  double drawn = mass();
  if (drawn > kCancellation * current->total()) {
    leave_out_taken();
    drawn = 0;
  }
  *reference = current->reference;
  time += wait();
  return time + gamma_variate(1, arrivals, s->spacing) / (current->total() - drawn);
}

// Takes every key whose inclusion probability would reach 1 into c->forced and leaves the others in
// *remaining; returns how many places are left for them. Shared by the heads of a row.
inline int64_t cap_inclusion(RowContext* c, const Row& row, Scratch* s, const Row** remaining) {
  int64_t places = c->to_draw;
  *remaining = &row;
  for (;;) {
    const Row& current = **remaining;
    const float largest = reduce_max(current.top);
    if (places == 0 || static_cast<double>(largest) * static_cast<double>(places) < current.total())
      return places;
    const float cap = static_cast<float>(current.total() / static_cast<double>(places));
    KeyList capped{s->batch, 0};
    const float least = min_of(cap, largest);
    for (int64_t begin = 0; begin < c->limit && capped.size < places; begin += kTile) {
      VecI reach{};
      for (int64_t j = begin; j < begin + kTile; j += kLanes<float>)
        reach |= load(current.weight + j) >= least;
      if (!any(reach)) continue;
      for (int64_t j = begin; j < begin + kTile && capped.size < places; ++j)
        if (current.weight[interleaved(j)] >= least)
          capped.key[capped.size++] = static_cast<int32_t>(j);
    }
    places -= capped.size;
    merge(capped, s->place, &c->forced);
    if (places == 0) return 0;
    exclude_taken(*c, c->forced, current, &s->rest);
    *remaining = &s->rest;
  }
}

// Takes the keys at which the running sum of inclusion probabilities passes u, u + 1, ..., u +
// places - 1; u = uniform / 2^32.
inline void draw_systematic(const Row& row, int64_t places, uint32_t uniform, Scratch* s) {
  KeyList* taken = &s->taken;
  const double u = uniform_double(uniform), step = 0x1p31 / static_cast<double>(places);
  for (int64_t n = 0; n < ceil_div(places, kLanes<float>) * kLanes<float>; ++n)
    s->draws[n] = static_cast<int32_t>(min_of((u + static_cast<double>(n)) * step, kWhole - 1.0));
  find_keys(row, s->draws, places, s->spacing, taken->key);
  taken->size = places;
  remove_repeats(taken);
  // A probability just below 1 can be passed twice by rounding: free keys stand in.
  for (int64_t j = 0; taken->size < places; ++j) {
    const int64_t at = lower_bound(*taken, static_cast<int32_t>(j));
    if (!(row.weight[interleaved(j)] > 0) || (at < taken->size && taken->key[at] == j)) continue;
    int32_t key = static_cast<int32_t>(j), place;
    merge({&key, 1}, &place, taken);
  }
}

// The k largest scores, ties to the lower index. Scores are compared as integers of the same order.
inline void take_largest(float* score, int64_t limit, int64_t k, KeyList* taken) {
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
    const int32_t x = bit_cast<int32_t>(score[interleaved(j)]);
    if (x < low) continue;
    if (x == low && surplus > 0)
      --surplus;
    else
      taken->key[k - 1 - taken->size++] = static_cast<int32_t>(j);
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
  const Sequence& sequence = c.task->sequence;
  const int64_t rows = p.row_end - p.row_begin,
                index_head = c.task->sketch * c.task->heads() + head;
  const int64_t row = sequence.first_query + c.i - p.row_begin;
  const int64_t at = ((sequence.batch * p.H_i + index_head) * rows + row) * p.K;
  return {p.indices + at, p.log_inclusion == nullptr ? nullptr : p.log_inclusion + at};
}

// Adds the certain keys to those taken and writes all, then -1.
inline void write_indices(const RowContext& c, const KeyList& certain, Scratch* s, Output out) {
  if (certain.size > 0) {
    const size_t bytes = static_cast<size_t>(certain.size) * sizeof(int32_t);
    std::memcpy(s->batch, certain.key, bytes);
    merge({s->batch, certain.size}, s->place, &s->taken);
  }
  const int32_t first_key = static_cast<int32_t>(c.task->sequence.first_key);
  for (int64_t j = 0; j < s->taken.size; ++j) out.indices[j] = s->taken.key[j] + first_key;
  for (int64_t j = s->taken.size; j < c.p->K; ++j) out.indices[j] = -1;
}

// log_inclusion = f(weight) of the taken keys; 0 of those that weigh nothing in `row`, as they were
// taken for certain; -inf in unused slots.
template <typename F>
inline void write_log_inclusion(const RowContext& c, const Row& row, Scratch* s, Output out,
                                F&& f) {
  constexpr int L = kLanes<float>;
  const int64_t n = s->taken.size;
  gather_weights(row, s->taken, s->drawn_weight);
  for (int64_t j = 0; j < n; j += L) {
    const Vec<float> weight = load(s->drawn_weight + j);
    store(s->drawn_weight + j, weight == 0.0f ? Vec<float>{} : f(weight));
  }
  std::memcpy(out.log_inclusion, s->drawn_weight, static_cast<size_t>(n) * sizeof(float));
  for (int64_t j = n; j < c.p->K; ++j) out.log_inclusion[j] = -__builtin_inff();
}

inline void copy_head(const RowContext& c, int64_t from, int64_t to) {
  const Output a = output_row(c, from), b = output_row(c, to);
  std::memcpy(b.indices, a.indices, static_cast<size_t>(c.p->K) * sizeof(int32_t));
  if (a.log_inclusion != nullptr)
    std::memcpy(b.log_inclusion, a.log_inclusion, static_cast<size_t>(c.p->K) * sizeof(float));
}

// Rows whose keys are the same for every head and certain: those taken and `forced`.
inline void write_certain(const RowContext& c, const KeyList& forced, Scratch* s) {
  const Output out = output_row(c, 0);
  write_indices(c, forced, s, out);
  if (out.log_inclusion != nullptr)
    for (int64_t j = 0; j < c.p->K; ++j)
      out.log_inclusion[j] = j < s->taken.size ? 0.0f : -__builtin_inff();
  for (int64_t head = 1; head < c.task->heads(); ++head) copy_head(c, 0, head);
}

inline void sample_gumbel(const RowContext& c, const Row& row, Scratch* s) {
  for (int64_t head = 0; head < c.task->heads(); ++head) {
    const Output out = output_row(c, head);
    const int64_t address = draw_head(c, head);
    ExponentialStream spacings(c.task->key, address, c.position),
        arrivals(c.task->arrival_key, address, c.position);
    double reference = row.reference;
    const double time = draw_distinct(
        c, &spacings, out.log_inclusion == nullptr ? nullptr : &arrivals, row, s, &reference);
    write_indices(c, c.forced, s, out);
    if (out.log_inclusion == nullptr) continue;
    const Row* weights = &row;
    if (reference != row.reference) {  // weights of keys drawn since lie in another range
      score_row(c, s->rest.weight);
      const float shift = static_cast<float>(reference);
      for (int64_t j = 0; j < c.blocks() * kTile; j += kLanes<float>)
        store(s->rest.weight + j, exp2(load(s->rest.weight + j) - shift));
      put(c.forced, 0.0f, s->rest.weight);
      weights = &s->rest;
    }
    const float rate = static_cast<float>(time);
    write_log_inclusion(c, *weights, s, out,
                        [&](Vec<float> w) { return log_one_minus_exp(w * rate); });
  }
}

inline void sample_systematic(RowContext c, const Row& row, Scratch* s) {
  const Row* remaining;
  const int64_t places = cap_inclusion(&c, row, s, &remaining);
  if (places == 0) return write_certain(c, c.forced, s);
  const float inclusion_scale =
      static_cast<float>(static_cast<double>(places) / remaining->total());
  for (int64_t head = 0; head < c.task->heads(); ++head) {
    const Output out = output_row(c, head);
    const PhiloxBlock counter = philox_counter(draw_head(c, head), c.position, 0);
    const uint32_t bits = philox4x32(counter, c.task->key).word[0];
    draw_systematic(*remaining, places, bits, s);
    write_indices(c, c.forced, s, out);
    if (out.log_inclusion == nullptr) continue;
    write_log_inclusion(c, *remaining, s, out, [&](Vec<float> w) {
      return min(log(max(w * inclusion_scale, broadcast(1e-37f))), broadcast(0.0f));
    });
  }
}

inline void sample_multinomial(const RowContext& c, const Row& row, Scratch* s) {
  const float inclusion_scale = static_cast<float>(static_cast<double>(c.to_draw) / row.total());
  for (int64_t head = 0; head < c.task->heads(); ++head) {
    const Output out = output_row(c, head);
    ExponentialStream spacings(c.task->key, draw_head(c, head), c.position);
    take_draws(&spacings, c.to_draw, s->spacing, s->draws);
    find_keys(row, s->draws, c.to_draw, s->spacing, s->taken.key);
    s->taken.size = c.to_draw;
    write_indices(c, c.forced, s, out);
    if (out.log_inclusion == nullptr) continue;
    write_log_inclusion(c, row, s, out, [&](Vec<float> w) {
      return log(max(w * inclusion_scale, broadcast(1e-37f)));
    });
  }
}

// ---- rows together ------------------------------------------------------------------------------

inline int64_t count_valid(const uint8_t* key_mask, int64_t limit) {
  if (key_mask == nullptr) return limit;
  int64_t n = 0;
  for (int64_t j = 0; j < limit; ++j) n += key_mask[j];
  return n;
}

// For topk the scale only counts by its sign: without it, scores that are equal in exact arithmetic
// stay equal.
inline double query_factor(const SketchSampleParams& p) {
  if (p.method != SampleMethod::kTopK) return p.scale * kLog2e;
  return p.scale > 0 ? 1.0 : (p.scale < 0 ? -1.0 : 0.0);
}

template <typename T>
inline float load_query(const TaskContext& task, int64_t i, float* q) {
  const SketchSampleParams& p = *task.p;
  const T* x = static_cast<const T*>(p.q_sketch) + task.sequence.batch * p.q_stride[0] +
               task.sketch * p.q_stride[1] + (task.sequence.first_query + i) * p.q_stride[2];
  const double factor = query_factor(p);
  float square = 0;
  for (int64_t d = 0; d < p.S; ++d) {
    q[d] = static_cast<float>(static_cast<double>(to_acc(x[d])) * factor);
    square += q[d] * q[d];
  }
  return __builtin_sqrtf(square);
}

inline bool is_finite(float x) { return x - x == 0; }

// Of query i, the r-th of those scored together: everything but the scaled query itself.
inline RowContext row_context(const TaskContext& task, int64_t i, int r, const Scratch& s) {
  const SketchSampleParams& p = *task.p;
  RowContext c{};
  c.p = &p;
  c.task = &task;
  c.i = i;
  c.position = position_of(p.visible, task.sequence, i);
  c.q = s.q + r * p.S;
  c.limit = key_limit(p.visible, task.sequence, c.position);
  c.valid = count_valid(task.key_mask, c.limit);
  c.forced.key = s.forced.key + r * p.K;
  c.blank.key = s.blank.key + r * blanks_per_row(p);
  for_each_forced(p.visible, task.sequence, c.position, p.K,
                  [&](int64_t j) { c.forced.key[c.forced.size++] = static_cast<int32_t>(j); });
  c.to_draw = c.valid > p.K ? p.K - c.forced.size : 0;
  c.blank.size = c.forced.size;
  std::memcpy(c.blank.key, c.forced.key, static_cast<size_t>(c.forced.size) * sizeof(int32_t));
  for (int64_t j = c.limit; j < c.blocks() * kTile; ++j)
    c.blank.key[c.blank.size++] = static_cast<int32_t>(j);
  return c;
}

// Scores of kRows rows over the keys of each to the rows' weights; with kExp to 2 to their power,
// blanked, with their running sums, all while a tile's weights are at hand.
template <bool kExp>
inline void score_rows(const RowContext* rows, int64_t count, Scratch* s) {
  const TaskContext& task = *rows[0].task;
  const int64_t S = task.p->S;
  int64_t next[kRows] = {};  // of each row's blank keys
  int64_t blocks = 0;
  for (int64_t r = 0; r < count; ++r) {
    begin_sums(&s->rows[r]);
    blocks = max_of(blocks, rows[r].blocks());
  }
  for (int64_t t = 0; t < blocks; ++t) {
    score_tile<kRows>(s->q, S, task.k_tiles + t * S * kTile, S, task.key_bias + t * kTile,
                      [&](int r, int column, Vec<float> score) {
                        store(s->rows[r].weight + t * kTile + column, kExp ? exp2(score) : score);
                      });
    if (!kExp) continue;
    for (int64_t r = 0; r < count; ++r) {
      if (t >= rows[r].blocks()) continue;
      const KeyList& blank = rows[r].blank;
      while (next[r] < blank.size && blank.key[next[r]] < (t + 1) * kTile)
        s->rows[r].weight[interleaved(blank.key[next[r]++])] = 0;
      add_block(&s->rows[r]);
    }
  }
}

// Whether the weights of score_rows<true> serve, so that no maximum need be taken out.
inline bool is_plain(const Row& row) {
  const float largest = reduce_max(row.top);
  return largest >= kLeastPlainWeight && largest <= kMostPlainWeight;
}

// Draws for all heads of a row from its weights and running sums.
inline void draw_row(const RowContext& c, Row* row, Scratch* s) {
  s->taken.size = 0;
  index_blocks(row);
  if (c.p->method == SampleMethod::kGumbel)
    sample_gumbel(c, *row, s);
  else if (c.p->method == SampleMethod::kSystematic)
    sample_systematic(c, *row, s);
  else
    sample_multinomial(c, *row, s);
}

// Draws for the rows that have something to draw, all of one task.
inline void draw_rows(const RowContext* rows, int64_t count, Scratch* s) {
  bool rest[kRows] = {};
  bool any_rest = false;
  const bool topk = rows[0].p->method == SampleMethod::kTopK;
  if (!topk) score_rows<true>(rows, count, s);
  for (int64_t r = 0; r < count; ++r) {
    if (rows[r].to_draw == 0) continue;
    rest[r] = topk || !is_plain(s->rows[r]);
    any_rest |= rest[r];
    if (rest[r]) continue;
    s->rows[r].reference = 0;
    draw_row(rows[r], &s->rows[r], s);
  }
  if (!any_rest) return;
  score_rows<false>(rows, count, s);
  for (int64_t r = 0; r < count; ++r) {
    if (!rest[r]) continue;
    const RowContext& c = rows[r];
    Row& row = s->rows[r];
    put(c.blank, -__builtin_inff(), row.weight);
    if (topk) {
      s->taken.size = 0;
      take_largest(row.weight, c.limit, c.to_draw, &s->taken);
      write_certain(c, c.forced, s);
      continue;
    }
    normalise(c.blocks(), &row);
    sum_row(c.blocks(), &row);
    draw_row(c, &row, s);
  }
}

// A row all of whose keys are certain: all its valid keys, or its forced ones.
inline void write_certain_row(const RowContext& c, Scratch* s) {
  s->taken.size = 0;
  if (c.valid > c.p->K) return write_certain(c, c.forced, s);
  for (int64_t j = 0; j < c.limit; ++j)
    if (c.task->key_mask == nullptr || c.task->key_mask[j])
      s->taken.key[s->taken.size++] = static_cast<int32_t>(j);
  write_certain(c, {nullptr, 0}, s);
}

}  // namespace sampling

inline int64_t sketch_sample_num_tasks(const SketchSampleParams& p) {
  return p.H_s * p.visible.queries.num_blocks(sampling::kRowsPerTask);
}

inline int64_t sketch_sample_scratch_bytes(const SketchSampleParams& p) {
  ScratchAllocator arena(nullptr);
  sampling::lay_out(p, &arena);
  return arena.bytes();
}

inline void sketch_sample(const SketchSampleParams& p, int64_t number, void* scratch) {
  using namespace sampling;
  const SegmentBlock block = segment_block(p.visible.queries, kRowsPerTask, number / p.H_s);
  TaskContext task{};
  task.p = &p;
  task.sequence = sequence_at(p.visible, block.segment);
  task.sketch = number % p.H_s;
  const Sequence& sequence = task.sequence;
  const int64_t begin = max_of(block.begin, p.row_begin - sequence.first_query),
                end = min_of(block.end, p.row_end - sequence.first_query);
  if (begin >= end) return;
  const int64_t tiles = p.visible.keys.blocks_per_batch(kTile),
                first_tile = p.visible.keys.first_block(block.segment, kTile),
                k_head = sequence.batch * p.H_ks + task.sketch / (p.H_s / p.H_ks);
  task.k_tiles = p.k_tiles + (k_head * tiles + first_tile) * p.S * kTile;
  task.key_bias = p.key_bias + (sequence.batch * tiles + first_tile) * kTile;
  task.key_mask = mask_of(p.visible, sequence, p.visible.key_mask);
  task.key = sequence_key(philox_key(p.seed, p.offset, kSampleStream), sequence);
  task.arrival_key = sequence_key(philox_key(p.seed, p.offset, kArrivalStream), sequence);

  float key_norm = 0;
  for (int64_t t = 0; t < ceil_div(sequence.num_keys, kTile); ++t) {
    const float norm = p.tile_norm[k_head * tiles + first_tile + t];
    key_norm = is_finite(norm) ? max_of(key_norm, norm) : __builtin_inff();
  }
  ScratchAllocator arena(scratch);
  Scratch s = lay_out(p, &arena);
  for (int64_t i0 = begin; i0 < end; i0 += kRows) {
    const int64_t rows = min_of<int64_t>(kRows, end - i0);
    RowContext context[kRows];
    float query_norm = 0;
    bool draws = false;
    std::memset(s.q, 0, static_cast<size_t>(kRows * p.S) * sizeof(float));
    dispatch_dtype(p.dtype, [&](auto dtype) {
      for (int r = 0; r < rows; ++r) {
        context[r] = row_context(task, i0 + r, r, s);
        draws |= context[r].to_draw > 0;
        if (context[r].valid == 0) continue;  // such a query is not looked at, whatever it holds
        const float norm = load_query<decltype(dtype)>(task, i0 + r, s.q + r * p.S);
        query_norm = is_finite(norm) ? max_of(query_norm, norm) : __builtin_inff();
      }
    });
    // Cauchy-Schwarz: no |score| of these rows is larger.
    const float bound = query_norm * key_norm;
    if (!is_finite(bound) || !is_finite(query_norm) || !is_finite(key_norm)) {
      __atomic_store_n(p.error, kSketchNotFinite, __ATOMIC_RELAXED);
      return;
    }
    for (int64_t r = 0; r < rows; ++r)
      if (context[r].to_draw == 0) write_certain_row(context[r], &s);
    if (draws) draw_rows(context, rows, &s);
  }
}

}  // namespace smartbird::SMARTBIRD_ISA

#endif  // SMARTBIRD_SKETCH_SAMPLE_INL_H_
