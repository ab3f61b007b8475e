// q_sketch [B, H_s, N, S], k_sketch [B, H_ks, M, S] -> indices, log_inclusion [B, H_i, N, K]: every
// index head draws its own keys of a row from softmax(q_sketch k_sketch^T scale).
//
// A row's scores are made once, for all heads of a sketch, as weights 2^(score - reference) in a
// buffer of one thread, with running sums of them made tile by tile while the weights are in
// registers' reach: `cum` within blocks of 32 keys, `start` over blocks. To draw a key is to find a
// uniform number among the running sums: a guide table names the block, one compare over 32 sums
// names the key. Numbers are drawn in ascending order, so the keys come out in ascending order too,
// and repeats side by side: no sort and no set.
//
// Keys that draws would only repeat, as they hold so much of a row's mass, are taken out of the
// running sums once per row, for all heads: `heavy`. `systematic` takes them for certain. `gumbel`
// is a race: keys arrive by Poisson processes of rate weight, and the first K distinct arrivals are
// successive sampling from p. A heavy key has an exponential time of its own; the n first arrivals
// of all others are n sorted draws, up to the time of the next arrival, which is the sum of the
// exponentials that the draws are made of. They are a few more than wanted, and are taken back from
// the last: which of them came last is by chance. The time of the last key taken back is kappa, and
// the work does not grow with how peaked a row is.
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
// Below this total, weights have begun to underflow: score again relative to the largest of the
// rest.
constexpr double kUnderflow = 1e-15;
// Below this share of the least weight that takes a place, the rest never takes one.
constexpr double kNegligible = 1e-9;
constexpr float kMostWeight = 0x1p127f;
// Times that keys of a weight have; forced ones come before, others not at all.
constexpr float kLeastTime = 0x1p-126f, kMostTime = 0x1p127f, kNever = __builtin_inff();

// Draws are integers in [0, kWhole]: running sums over blocks are kept on the same grid, so that to
// find a block is to compare integers, many draws at once.
constexpr int32_t kWhole = INT32_MAX;
constexpr int kWholeBits = 31;

// Ascending key numbers.
struct KeyList {
  int32_t* key;
  int64_t size;
};

// Of weights: the largest lane of `top` is the largest; the lanes of `square` add up to the sum of
// their squares. A row's are those of its parts of kPartTiles tiles, put together in their order:
// whoever makes them, in whatever order, makes the same.
struct Moments {
  Vec<float> top, square;

  void add(const Moments& part) {
    top = max(top, part.top);
    square += part.square;
  }
};

// A row of weights with its running sums, all in the order of an interleaved tile, see
// interleaved(); weights are 0 where the key cannot be drawn.
struct Row {
  float* weight;     // [padded M]
  float* cum;        // [padded M] inclusive running sum within each block of kTile; null of a
                     // scanned row: few draws fall into its blocks, which are summed again for them
  float* block_sum;  // [blocks] of each block's weights
  Moments* parts;    // [parts] of a scanned row, else null
  int64_t blocks;
  double reference;  // weight = 2^(score - reference)
  Moments all;

  // What find_keys needs, made by index_blocks.
  double total;
  int32_t* start;     // [blocks + 1] mass before each block on a grid where the total is 2^31
  int32_t* guide;     // [guide size] the block that holds g * 2^31 / guide size, or one before it
  int guide_shift;    // guide index of a draw: draw >> guide_shift
  float draw_weight;  // total / 2^31
};

struct Scratch {
  float* q;        // [kRows, S] queries times scale * log2(e)
  float* tile;     // [S + 1, kTile] a tile that is packed when it is wanted, and its bias
  KeyList forced;  // [kRows, K] of each row: keys that are taken without drawing
  KeyList
      blank;  // [kRows, blanks] of each row: those, and what its last block has beyond its limit
  // Of the row at hand: the forced keys and those too heavy to draw, see find_heavy.
  KeyList heavy;
  float* heavy_weight;
  // Of the head at hand: when each heavy key arrives; the keys drawn, ascending, with repeats until
  // they are removed, and their weights, then what is written with each; and keys that were drawn
  // before those, where they were too few.
  float* heavy_time;
  KeyList taken;
  float* value;
  KeyList past;
  float* past_weight;
  float* spacing;  // exponentials
  uint32_t* words;
  int32_t* draws;
  Row rows[kRows];  // those scored together; they share start and guide
};

// Four entries per block: three of four draws then need no step beyond the guide's block.
inline int guide_bits(int64_t blocks) {
  int bits = 6;
  while (bits < 13 && (int64_t{1} << bits) < 4 * blocks) ++bits;
  return bits;
}

inline int64_t blanks_per_row(const SketchSampleParams& p) { return p.K + kTile; }

// Draws that a race makes at once.
inline int64_t most_draws(int64_t K) { return 2 * K + 16; }

inline Scratch lay_out(const SketchSampleParams& p, ScratchAllocator* arena) {
  constexpr int L = kLanes<float>;
  const int64_t padded = padded_keys(p), blocks = padded / kTile;
  // The keys of one draw that was not enough and of another.
  const int64_t room = ExponentialStream::padded(p.K + most_draws(p.K) + 2) + L;
  Scratch s{};
  s.q = arena->take<float>(kRows * p.S);
  s.tile = arena->take<float>((p.S + 1) * kTile);
  s.forced.key = arena->take<int32_t>(kRows * p.K);
  s.blank.key = arena->take<int32_t>(kRows * blanks_per_row(p));
  for (KeyList* list : {&s.heavy, &s.taken, &s.past}) list->key = arena->take<int32_t>(room);
  for (float** list : {&s.heavy_weight, &s.heavy_time, &s.value, &s.past_weight, &s.spacing})
    *list = arena->take<float>(room);
  s.words = arena->take<uint32_t>(room);
  s.draws = arena->take<int32_t>(room);
  s.rows[0].start = arena->take<int32_t>(blocks + 1);
  s.rows[0].guide = arena->take<int32_t>((int64_t{1} << guide_bits(blocks)) + L);
  for (Row& row : s.rows) {
    row.start = s.rows[0].start;
    row.guide = s.rows[0].guide;
    if (scans(p)) continue;
    row.weight = arena->take<float>(padded);
    row.cum = arena->take<float>(padded);
    row.block_sum = arena->take<float>(blocks);
  }
  return s;
}

// ---- lists of keys ------------------------------------------------------------------------------

// Ends a list with a key that is none, up to beyond a whole vector.
inline void mark_end(const KeyList& list) {
  constexpr int L = kLanes<float>;
  for (int64_t i = list.size; i <= ceil_div(list.size, L) * L; ++i) list.key[i] = -1;
}

// Removes repeats, which lie side by side, and what belongs to them.
inline void remove_repeats(KeyList* list, float* weights) {
  constexpr int L = kLanes<float>;
  mark_end(*list);
  int64_t n = 0;
  for (int64_t i = 0; i < list->size; i += L) {
    const VecI key = load_int(list->key + i), differs = key != load_int(list->key + i + 1);
    const VecI kept = compress(key, differs);
    std::memcpy(list->key + n, &kept, sizeof(kept));
    store(weights + n, compress(load(weights + i), differs));
    n += __builtin_popcount(lane_bits(differs));
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

inline bool contains(const KeyList& list, int32_t key) {
  const int64_t at = lower_bound(list, key);
  return at < list.size && list.key[at] == key;
}

// Puts x at place `at` of n, those from there on one further.
template <typename T>
inline void insert(T* list, int64_t n, int64_t at, T x) {
  std::memmove(list + at + 1, list + at, static_cast<size_t>(n - at) * sizeof(T));
  list[at] = x;
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

// The running sums of a block. Vector v holds the keys v, v + V, v + 2 V, ... of the block, V the
// vectors of a block: sums go down the vectors first, and across lanes but once. Takes the weights
// in `sums`. Returns the last sum.
template <int V = kTile / kLanes<float>>
SMARTBIRD_INLINE float running_sums(Vec<float> (&sums)[V]) {
  constexpr int L = kLanes<float>;
  for (int v = 1; v < V; ++v) sums[v] += sums[v - 1];
  const Vec<float> across = prefix_sum(sums[V - 1]), before = shift_up(across);
  for (int v = 0; v < V; ++v) sums[v] += before;
  return across[L - 1];
}

// Sums block t, and adds it to `moments`.
SMARTBIRD_INLINE void sum_block(int64_t t, Row* row, Moments* moments) {
  constexpr int L = kLanes<float>, V = kTile / L;
  Vec<float> sums[V], top = moments->top, square = moments->square;
  for (int v = 0; v < V; ++v) {
    sums[v] = load(row->weight + t * kTile + v * L);
    top = max(top, sums[v]);
    square = add_square(square, sums[v]);
  }
  *moments = {top, square};
  row->block_sum[t] = running_sums(sums);
  if (row->cum == nullptr) return;
  for (int v = 0; v < V; ++v) store(row->cum + t * kTile + v * L, sums[v]);
}

inline void begin_sums(int64_t blocks, Row* row) {
  row->blocks = blocks;
  row->all = Moments{};
}

// Sums the blocks of a part.
inline Moments sum_part(int64_t part, Row* row) {
  Moments moments{};
  const int64_t end = min_of((part + 1) * kPartTiles, row->blocks);
  for (int64_t t = part * kPartTiles; t < end; ++t) sum_block(t, row, &moments);
  return moments;
}

inline void sum_row(int64_t blocks, Row* row) {
  begin_sums(blocks, row);
  for (int64_t part = 0; part * kPartTiles < blocks; ++part) row->all.add(sum_part(part, row));
}

// Sums a row as sketch_scan has left it, but for what is blank, in ascending order, which it did
// not know: parts with such keys, and the last one, are summed again.
inline void sum_scanned(const KeyList& blank, int64_t blocks, Row* row) {
  constexpr int64_t kPart = kPartTiles * kTile;
  begin_sums(blocks, row);
  put(blank, 0, row->weight);
  int64_t n = 0;
  for (int64_t part = 0; part * kPartTiles < blocks; ++part) {
    const int64_t first = n;
    while (n < blank.size && blank.key[n] < (part + 1) * kPart) ++n;
    const bool whole = n == first && (part + 1) * kPartTiles <= blocks;
    row->all.add(whole ? row->parts[part] : sum_part(part, row));
  }
}

inline void add_blocks(Row* row) {
  constexpr int kSums = 4;  // which do not wait for each other
  double sums[kSums] = {};
  int64_t t = 0;
  for (; t + kSums <= row->blocks; t += kSums)
    for (int n = 0; n < kSums; ++n) sums[n] += static_cast<double>(row->block_sum[t + n]);
  for (; t < row->blocks; ++t) sums[0] += static_cast<double>(row->block_sum[t]);
  row->total = sums[0] + sums[1] + (sums[2] + sums[3]);
}

// start, guide and what goes with them, of a row whose total is not 0.
inline void index_blocks(Row* row) {
  constexpr int L = kLanes<float>;
  const int bits = guide_bits(row->blocks), shift = kWholeBits - bits;
  const double scale = 0x1p31 / row->total;
  double before = 0;
  for (int64_t t = 0; t < row->blocks; ++t) {
    row->start[t] = static_cast<int32_t>(min_of(before * scale, kWhole - 1.0));
    before += static_cast<double>(row->block_sum[t]);
  }
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
  row->draw_weight = static_cast<float>(row->total * 0x1p-31);
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

// keys[n] becomes draw n: the first key whose running sum exceeds it; its weight goes to
// weights[n]. Arrays are padded to whole vectors, draws with draws, and are used up. Loops are
// short: their iterations overlap, and no vector is loaded from scalars just stored.
inline void find_keys(const Row& row, int32_t* __restrict draws, int64_t count,
                      float* __restrict weights, int32_t* __restrict keys) {
  constexpr int L = kLanes<float>;
  const int32_t* __restrict guide = row.guide;
  const int32_t* __restrict start = row.start;
  const int shift = row.guide_shift;
  for (int64_t n = 0; n < count; ++n) {
    const int32_t draw = draws[n];
    int64_t block = guide[draw >> shift];
    block += draw >= start[block + 1];  // no branch to mispredict
    while (__builtin_expect(draw >= start[block + 1], 0)) ++block;
    draws[n] = draw - start[block];
    keys[n] = static_cast<int32_t>(block * kTile);
  }
  for (int64_t n = 0; n < count; n += L)
    store(weights + n, __builtin_convertvector(load_int(draws + n), Vec<float>) * row.draw_weight);
  if (row.cum != nullptr) {
    for (int64_t n = 0; n < count; ++n) keys[n] += count_le(row.cum + keys[n], weights[n]);
  } else {
    for (int64_t n = 0; n < count; ++n) {
      Vec<float> sums[kTile / L];
      for (int v = 0; v < kTile / L; ++v) sums[v] = load(row.weight + keys[n] + v * L);
      running_sums(sums);
      for (const Vec<float> sum : sums) keys[n] += __builtin_popcount(lane_bits(sum <= weights[n]));
    }
  }
  // Rounding may take a draw past the last sum of its block: never past the last key.
  const VecI last = VecI{} + static_cast<int32_t>(row.blocks * kTile - 1);
  for (int64_t n = 0; n < count; n += L) {
    VecI key = load_int(keys + n);
    key = key < last ? key : last;
    std::memcpy(keys + n, &key, sizeof(key));
    const VecI place = interleaved(key);
    std::memcpy(draws + n, &place, sizeof(place));
  }
  for (int64_t n = 0; n < count; ++n) weights[n] = row.weight[draws[n]];
  // Sums within a block are rounded in an order of their own: rarely, a draw falls between two that
  // should be equal.
  for (int64_t n = count; n < ceil_div(count, L) * L; ++n) weights[n] = 1;
  for (int64_t n = 0; n < count; n += L) {
    if (__builtin_expect(!any(load(weights + n) <= 0.0f), 1)) continue;
    for (int64_t i = n; i < min_of(n + L, count); ++i) {
      if (weights[i] > 0) continue;
      keys[i] = static_cast<int32_t>(nearest_drawable(row, keys[i]));
      weights[i] = row.weight[interleaved(keys[i])];
    }
  }
}

// What the rows of a task share: a sequence and a sketch.
struct TaskContext {
  const SketchSampleParams* p;
  Sequence sequence;
  int64_t sketch;
  int64_t key_head;      // batch * H_ks + the key sketch
  const float* k_tiles;  // of the sequence's keys; null where none are packed
  const float* key_bias;
  const float* tile_norm;
  const uint8_t* key_mask;  // or null
  PhiloxKey key, heavy_key;

  int64_t heads() const { return p->H_i / p->H_s; }  // that the sketch serves
};

inline TaskContext task_context(const SketchSampleParams& p, int64_t segment, int64_t sketch) {
  TaskContext task{};
  task.p = &p;
  task.sequence = sequence_at(p.visible, segment);
  task.sketch = sketch;
  task.key_head = task.sequence.batch * p.H_ks + sketch / (p.H_s / p.H_ks);
  if (!scans(p)) {
    const int64_t tiles = p.visible.keys.blocks_per_batch(kTile),
                  first = p.visible.keys.first_block(segment, kTile);
    task.k_tiles = p.k_tiles + (task.key_head * tiles + first) * p.S * kTile;
    task.key_bias = p.key_bias + (task.sequence.batch * tiles + first) * kTile;
    task.tile_norm = p.tile_norm + task.key_head * tiles + first;
  }
  task.key_mask = mask_of(p.visible, task.sequence, p.visible.key_mask);
  task.key = sequence_key(philox_key(p.seed, p.offset, kSampleStream), task.sequence);
  task.heavy_key = sequence_key(philox_key(p.seed, p.offset, kArrivalStream), task.sequence);
  return task;
}

// Features [S, kTile] and bias [kTile] of tile t of a sequence's keys.
struct KeyTile {
  const float *features, *bias;
};

// Packed before, or now, into `room` [S + 1, kTile].
inline KeyTile key_tile(const TaskContext& task, int64_t t, float* room) {
  const SketchSampleParams& p = *task.p;
  const int64_t S = p.S;
  if (task.k_tiles != nullptr) return {task.k_tiles + t * S * kTile, task.key_bias + t * kTile};
  const int64_t first = t * kTile, n = min_of(kTile, task.sequence.num_keys - first);
  const uint8_t* mask = task.key_mask == nullptr ? nullptr : task.key_mask + first;
  dispatch_dtype(p.dtype, [&](auto type) {
    const auto* x = static_cast<const decltype(type)*>(p.k_sketch) +
                    task.sequence.batch * p.k_stride[0] + task.key_head % p.H_ks * p.k_stride[1] +
                    (task.sequence.first_key + first) * p.k_stride[2];
    pack_tile(x, p.k_stride[2], S, n, /*scale=*/1, /*interleave=*/true, mask, room);
  });
  pack_bias(n, /*interleave=*/true, mask, room + S * kTile);
  return {room, room + S * kTile};
}

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
inline void score_row(const RowContext& c, float* room, float* weight) {
  const int64_t S = c.p->S;
  for (int64_t t = 0; t < c.blocks(); ++t) {
    const KeyTile tile = key_tile(*c.task, t, room);
    score_tile<1>(c.q, S, tile.features, S, tile.bias,
                  [&](int, int column, Vec<float> s) { store(weight + t * kTile + column, s); });
  }
}

// Fills a list's last vector up with infinity: a time that never comes, a weight that is certain.
inline void fill_up(int64_t n, float* list) {
  for (int64_t i = n; i < ceil_div(n, kLanes<float>) * kLanes<float>; ++i) list[i] = kNever;
}

// ---- heavy keys ---------------------------------------------------------------------------------

// Begins `heavy` with the forced keys, which come first whatever is drawn.
inline void begin_heavy(const RowContext& c, Scratch* s) {
  s->heavy.size = c.forced.size;
  for (int64_t n = 0; n < c.forced.size; ++n) {
    s->heavy.key[n] = c.forced.key[n];
    s->heavy_weight[n] = __builtin_inff();
  }
}

// Adds the heavy keys for which `takes` is true, with their weights, to the ascending list of those
// taken. Between two heavy keys lie runs of the others, which are copied as whole vectors.
template <typename Takes>
inline void merge_heavy(Scratch* s, Takes&& takes) {
  constexpr int L = kLanes<float>;
  const int64_t size = s->taken.size;
  const VecI beyond = VecI{} + INT32_MAX;
  std::memcpy(s->taken.key + size, &beyond, sizeof(beyond));
  int64_t from = 0, to = 0;
  const auto copy_next = [&] {
    const VecI key = load_int(s->taken.key + from);
    std::memcpy(s->draws + to, &key, sizeof(key));
    store(s->spacing + to, load(s->value + from));
    return key;
  };
  for (int64_t i = 0; i < s->heavy.size; ++i) {
    int below;
    do {
      below = __builtin_popcount(lane_bits(copy_next() < s->heavy.key[i]));
      from += below;
      to += below;
    } while (below == L);
    s->draws[to] = s->heavy.key[i];
    s->spacing[to] = s->heavy_weight[i];
    to += takes(i);
  }
  for (; from < size; from += L, to += L) copy_next();
  s->taken.size = to - (from - size);
  std::swap(s->taken.key, s->draws);
  std::swap(s->value, s->spacing);
}

// Moves the keys of at least `least`, no more than `most`, from the row's weights to `heavy`.
// Returns their number.
inline int64_t take_out(float least, int64_t most, Row* row, Scratch* s) {
  constexpr int L = kLanes<float>, V = kTile / L;
  int64_t taken = 0;
  int32_t* keys = s->taken.key;
  row->all = Moments{};
  for (int64_t t = 0; t < row->blocks; ++t) {
    float* weight = row->weight + t * kTile;
    Moments moments = row->all;
    VecI reach{};
    for (int v = 0; v < V; ++v) {
      const Vec<float> w = load(weight + v * L);
      reach |= w >= least;
      moments.top = max(moments.top, w);
      moments.square = add_square(moments.square, w);
    }
    if (!any(reach)) {
      row->all = moments;
      continue;
    }
    for (int v = 0; v < V; ++v)
      for (uint32_t lanes = lane_bits(load(weight + v * L) >= least); lanes != 0 && taken < most;
           lanes &= lanes - 1) {
        const int l = __builtin_ctz(lanes);
        const int32_t key = static_cast<int32_t>(t * kTile + l * V + v);  // see interleaved()
        int64_t at = taken;
        for (; at > 0 && keys[at - 1] > key; --at) {
          keys[at] = keys[at - 1];
          s->value[at] = s->value[at - 1];
        }
        keys[at] = key;
        s->value[at] = weight[v * L + l];
        weight[v * L + l] = 0;
        ++taken;
      }
    sum_block(t, row, &row->all);
  }
  s->taken.size = taken;
  merge_heavy(s, [](int64_t) { return true; });
  std::swap(s->heavy, s->taken);
  std::swap(s->heavy_weight, s->value);
  return taken;
}

// A first estimate of the least weight for which find_heavy is looking, a little too large rather
// than too small: the keys below it share what places the others leave, in a few passes without
// moving any.
inline float estimate_least(double places, const Row& row) {
  constexpr int L = kLanes<float>, V = kTile / L;
  double least = row.total / places;
  for (int step = 0; step < 6; ++step) {
    const Vec<float> threshold = broadcast(static_cast<float>(least));
    Vec<float> rest[V] = {};
    VecI above[V] = {};
    for (int64_t j = 0; j < row.blocks * kTile; j += kTile)
      for (int v = 0; v < V; ++v) {
        const Vec<float> w = load(row.weight + j + v * L);
        const VecI below = w < threshold;
        above[v] += ~below;
        rest[v] += bit_cast<Vec<float>>(bit_cast<VecI>(w) & below);
      }
    for (int v = 1; v < V; ++v) rest[0] += rest[v], above[0] += above[v];
    const double heavy =
        -static_cast<double>(reduce_add(__builtin_convertvector(above[0], Vec<float>)));
    if (heavy + 1 > places) break;
    const double left = static_cast<double>(reduce_add(rest[0]));
    if (left < kUnderflow || left > 0.95 * least * (places - heavy)) break;
    least = left / (places - heavy);
  }
  return static_cast<float>(least * 1.001);
}

// Scores the row again without the keys in `heavy`, relative to the largest of the rest.
inline void score_rest(const RowContext& c, Row* row, Scratch* s) {
  const double old_reference = row->reference;
  score_row(c, s->tile, row->weight);
  put(c.blank, -__builtin_inff(), row->weight);
  put(s->heavy, -__builtin_inff(), row->weight);
  normalise(c.blocks(), row);
  sum_row(c.blocks(), row);
  const double factor = __builtin_exp2(min_of(old_reference - row->reference, 1000.0));
  for (int64_t n = 0; n < s->heavy.size; ++n)
    if (s->heavy_weight[n] < kNever)
      s->heavy_weight[n] = static_cast<float>(
          min_of(static_cast<double>(s->heavy_weight[n]) * factor, double{kMostWeight}));
}

// The keys that would be drawn with probability 1 or more if `places` were given out in proportion
// to the weights go into `heavy`, until no such key is left, or until no more than `repeats` of so
// many independent draws are expected to repeat a key. Returns the places left.
inline double find_heavy(const RowContext& c, double places, double repeats, Row* row, Scratch* s) {
  add_blocks(row);
  for (bool first = true;; first = false) {
    if (places <= 0) return 0;
    if (row->total < kUnderflow) {
      if (s->heavy.size > c.p->K) {
        float least = kNever;
        for (int64_t n = 0; n < s->heavy.size; ++n) least = min_of(least, s->heavy_weight[n]);
        if (row->total < kNegligible * static_cast<double>(least)) row->total = 0;
        return places;
      }
      score_rest(c, row, s);
      add_blocks(row);
    }
    const float largest = reduce_max(row->all.top);
    const double cap = row->total / places;
    if (static_cast<double>(largest) < cap) return places;
    if (0.5 * static_cast<double>(reduce_add(row->all.square)) < repeats * cap * cap) return places;
    const float least = first ? estimate_least(places, *row) : static_cast<float>(cap);
    places -= static_cast<double>(
        take_out(min_of(least, largest), static_cast<int64_t>(__builtin_ceil(places)), row, s));
    add_blocks(row);
  }
}

// ---- uniform numbers ----------------------------------------------------------------------------

// n uniform draws in [0, kWhole), ascending, and any such up to whole vectors, from n + 1
// exponential spacings: their running sums over their total are the order statistics. Returns the
// total, which is independent of the draws: the time of arrival n + 1 of a process of rate 1, to
// which the draws are arrivals 1 to n. Sums are float within a vector and double beyond it; as what
// they are divided by is no round number, draws fall on no grid but that of integers.
inline double take_draws(int64_t n, float* spacing, int32_t* draws) {
  constexpr int L = kLanes<float>;
  double total = 0;
  for (int64_t i = n + 1; i < ceil_div(n + 1, L) * L; ++i) spacing[i] = 0;
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
  return total;
}

// log(1 - exp(-x)) for x >= 0, with all digits at both ends.
inline Vec<float> log_one_minus_exp(Vec<float> x) {
  x = max(x, broadcast(1e-37f));
  // The first terms of the series of log((1 - exp(-x)) / x): good to 1e-7 up to 1.
  const Vec<float> square = x * x;
  const Vec<float> p = 1.0f / 24 - square * (1.0f / 2880 - square * (1.0f / 181440));
  const Vec<float> correction = x * (0.5f - x * p);
  const VecI large = x > 1.0f;
  if (!any(large)) return log(x) - correction;
  const Vec<float> e = exp(-x);
  const Vec<float> tail = 0.0f - e * (1.0f + e * (0.5f + e * (1.0f / 3 + e * 0.25f)));
  const Vec<float> y = log(large ? 1.0f - e : x);
  return large ? (e < 0.03f ? tail : y) : y - correction;
}

// ---- a race -------------------------------------------------------------------------------------

// A time by which more than c.to_draw keys of a row arrive, but rarely many more, and how many
// draws its light keys make until then: the expectation and two deviations, by a few steps of
// Newton's method from `places` keys.
struct Plan {
  double time;
  int64_t draws;
};

inline Plan plan_race(const RowContext& c, double places, const Row& row, const Scratch& s) {
  constexpr int L = kLanes<float>;
  fill_up(s.heavy.size, s.heavy_weight);
  const double half_square = 0.5 * static_cast<double>(reduce_add(row.all.square));
  const double want = static_cast<double>(c.to_draw) + 1,
               heavy = static_cast<double>(s.heavy.size - c.forced.size);
  double time = places / row.total;
  if (!(row.total > 0)) {  // the mean, of heavy keys, of when half of them are there
    double log_weight = 0;
    for (int64_t n = 0; n < s.heavy.size; ++n)
      if (s.heavy_weight[n] < kNever) log_weight += __builtin_log2f(s.heavy_weight[n]);
    time = __builtin_exp2(-log_weight / heavy);
  }
  for (int step = 0; step < 8; ++step) {
    Vec<float> late{}, late_square{}, slope{};
    for (int64_t n = 0; n < s.heavy.size; n += L) {
      const Vec<float> x = load(s.heavy_weight + n) * static_cast<float>(time), e = exp(-x);
      late += e;
      late_square += e * e;
      slope += min(x, broadcast(100.0f)) * e;
    }
    const double draws = row.total * time, repeats = min_of(half_square * time * time, 0.4 * draws),
                 missing = static_cast<double>(reduce_add(late));
    const double variance = repeats + missing - static_cast<double>(reduce_add(late_square));
    const double surplus = heavy - missing + draws - repeats - want - 2 * __builtin_sqrt(variance);
    const double gain = static_cast<double>(reduce_add(slope)) + draws - 2 * repeats;
    if (surplus * surplus < 0.01) break;
    time *= max_of(0.25, min_of(4.0, 1 - surplus / gain));
  }
  return {time, static_cast<int64_t>(
                    min_of(row.total * time + 1, static_cast<double>(most_draws(c.p->K))))};
}

// The heavy keys' own times; forced keys come first, at 0.
inline void draw_heavy(ExponentialStream stream, Scratch* s) {
  constexpr int L = kLanes<float>;
  const int64_t n = s->heavy.size;
  if (n == 0) return;
  stream.take(n, s->heavy_time, nullptr);
  for (int64_t i = 0; i < n; i += L) {
    const Vec<float> weight = load(s->heavy_weight + i);
    const Vec<float> time = max(load(s->heavy_time + i) / weight, broadcast(kLeastTime));
    store(s->heavy_time + i, weight < kNever ? min(time, broadcast(kMostTime)) : Vec<float>{});
  }
  fill_up(n, s->heavy_time);
}

// A stretch of a race. The light keys that arrive in it are the scratch's `taken`, those that came
// before are `past`.
struct Stretch {
  float begin = 0, end = 0;
  bool at_begin = false;  // of the arrivals, one comes when it begins
};

// The first n arrivals of light keys, up to the next.
inline Stretch draw_light(int64_t n, const Row& row, ExponentialStream* stream, Scratch* s) {
  stream->take(n + 1, s->spacing, s->words);
  const double time = take_draws(n, s->spacing, s->draws) / row.total;
  find_keys(row, s->draws, n, s->value, s->taken.key);
  s->taken.size = n;
  mark_end(s->taken);
  return {0, static_cast<float>(time), false};
}

// Adds the keys of a stretch to those before it.
inline void add_to_past(Scratch* s) {
  remove_repeats(&s->taken, s->value);
  if (s->past.size == 0) {
    std::swap(s->past, s->taken);
    std::swap(s->past_weight, s->value);
  }
  for (int64_t i = 0; i < s->taken.size; ++i) {
    const int32_t key = s->taken.key[i];
    const int64_t at = lower_bound(s->past, key);
    if (at < s->past.size && s->past.key[at] == key) continue;
    insert(s->past_weight, s->past.size, at, s->value[i]);
    insert(s->past.key, s->past.size++, at, key);
  }
  s->taken.size = 0;
}

// What comes after a stretch: the arrival at its end and n more, up to the next.
inline Stretch draw_on(const Stretch& before, int64_t n, const Row& row, ExponentialStream* stream,
                       Scratch* s) {
  add_to_past(s);
  // The sum of m + 1 exponentials times a uniform number's m-th root is as that of m.
  const double m = static_cast<double>(n + 1);
  Stretch at = draw_light(n + 1, row, stream, s);
  const double shrink = uniform_double(s->words[ExponentialStream::words(n + 2) - 1]) + 0x1p-33;
  at.begin = before.end;
  at.end = at.begin + at.end * static_cast<float>(__builtin_pow(shrink, 1 / m));
  at.at_begin = true;
  return at;
}

// How many keys have come when a stretch ends.
inline int64_t count_keys(const Stretch& at, const Scratch& s) {
  constexpr int L = kLanes<float>;
  const int64_t n = s.taken.size;
  const int32_t* key = s.taken.key;
  int64_t keys = 0;
  for (int64_t i = 0; i < n; i += L)
    keys += __builtin_popcount(lane_bits(load_int(key + i) != load_int(key + i + 1)));
  for (int64_t i = 0; i < s.heavy.size; i += L)
    keys += __builtin_popcount(lane_bits(load(s.heavy_time + i) < at.end));
  if (s.past.size == 0) return keys;
  for (int64_t i = 0; i < n; ++i) keys -= key[i] != key[i + 1] && contains(s.past, key[i]);
  return keys + s.past.size;
}

// Takes the arrivals of a stretch back, from the last, until of `keys` only K are left: heavy ones
// are given a time that never comes. Returns when the last that went had come: kappa, where light
// ones are timed; where only they are left to go, they need not be.
//
// Given how many they are, light arrivals came at independent uniform times. So the last of m is
// any of them, and of those that did not come at the very begin it came at the m-th root of a
// uniform number.
inline float take_back(const Stretch& at, int64_t keys, int64_t K, bool timed,
                       ExponentialStream* stream, Scratch* s) {
  constexpr int L = kLanes<float>;
  int32_t* key = s->taken.key;
  int64_t left = s->taken.size, used = 0,
          words = ExponentialStream::words(left + 1) - at.at_begin;  // see draw_on
  int32_t chosen[L];  // of the next arrivals to go: which, and when they came
  float when[L];
  store(when, broadcast(at.end));
  int next = L;
  float log_share = 0;
  const auto choose = [&] {
    if (used + L > words) {
      stream->take(1, s->spacing, s->words);
      words = ExponentialStream::words(1);
      used = 0;
    }
    VecU word;
    std::memcpy(&word, s->words + used, sizeof(word));
    used += L;
    // Of a word times m, the upper half is uniform below m and the lower half is what is left of
    // the word.
    using Wide = typename VecOf<uint64_t, L>::type;
    const VecI m = static_cast<int32_t>(left) - iota_int();
    const Wide product =
        __builtin_convertvector(word, Wide) * __builtin_convertvector(bit_cast<VecU>(m), Wide);
    const VecU high = __builtin_convertvector(product >> 32, VecU),
               low = __builtin_convertvector(product, VecU);
    std::memcpy(chosen, &high, sizeof(high));
    next = 0;
    if (!timed) return;
    const Vec<float> others = __builtin_convertvector(m - int32_t{at.at_begin}, Vec<float>);
    const Vec<float> logs =
        prefix_sum(others > 0.0f ? log(uniform(low)) / others : broadcast(-kNever)) + log_share;
    log_share = logs[L - 1];
    store(when, at.begin + (at.end - at.begin) * exp(logs));
  };
  int64_t heavy = -1;  // the last to come of the heavy keys that are left
  float heavy_time = -1;
  const auto look = [&] {
    Vec<float> last = broadcast(-1.0f);
    for (int64_t i = 0; i < s->heavy.size; i += L) {
      const Vec<float> time = load(s->heavy_time + i);
      last = max(last, time < at.end ? time : broadcast(-1.0f));
    }
    heavy_time = reduce_max(last);
    for (int64_t i = 0; i < s->heavy.size; i += L)
      if (const uint32_t lanes = lane_bits(load(s->heavy_time + i) == heavy_time); lanes != 0)
        heavy = i + __builtin_ctz(lanes);
  };
  look();
  for (;;) {
    if (next == L && left > 0) choose();
    const float light_time = left > 0 ? when[next] : -1;
    float time = heavy_time;
    if (heavy_time > light_time) {
      s->heavy_time[heavy] = kNever;
      --keys;
      look();
    } else {
      const int64_t i = chosen[next++];
      time = light_time;
      const bool repeats = (i > 0 && key[i] == key[i - 1]) || key[i] == key[i + 1] ||
                           (s->past.size > 0 && contains(s->past, key[i]));
      keys -= !repeats;
      for (int64_t j = i; j < left; j += L) {  // the mark goes with them
        const VecI keys_after = load_int(key + j + 1);
        const Vec<float> weights_after = load(s->value + j + 1);
        std::memcpy(key + j, &keys_after, sizeof(keys_after));
        store(s->value + j, weights_after);
      }
      s->taken.size = --left;
    }
    if (keys == K) return time;
  }
}

// ---- other methods ------------------------------------------------------------------------------

// Takes the keys at which the running sum of inclusion probabilities passes u, u + 1, ..., u +
// places - 1; u = uniform / 2^32.
inline void draw_systematic(const Row& row, int64_t places, uint32_t uniform, Scratch* s) {
  KeyList* taken = &s->taken;
  const double u = uniform_double(uniform), step = 0x1p31 / static_cast<double>(places);
  for (int64_t n = 0; n < ceil_div(places, kLanes<float>) * kLanes<float>; ++n)
    s->draws[n] = static_cast<int32_t>(min_of((u + static_cast<double>(n)) * step, kWhole - 1.0));
  find_keys(row, s->draws, places, s->value, taken->key);
  // A probability just below 1 can be passed twice by rounding: free keys stand in.
  taken->size = places;
  remove_repeats(taken, s->value);
  for (int32_t j = 0; taken->size < places; ++j) {
    const float weight = row.weight[interleaved(j)];
    const int64_t at = lower_bound(*taken, j);
    if (!(weight > 0) || (at < taken->size && taken->key[at] == j)) continue;
    insert(s->value, taken->size, at, weight);
    insert(taken->key, taken->size++, at, j);
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

// Writes the keys taken, then -1, and f(weight) of each, then -inf.
template <typename F>
inline void write_row(const RowContext& c, const Scratch& s, Output out, F&& f) {
  const int32_t first_key = static_cast<int32_t>(c.task->sequence.first_key);
  const int64_t n = s.taken.size;
  for (int64_t j = 0; j < n; ++j) out.indices[j] = s.taken.key[j] + first_key;
  for (int64_t j = n; j < c.p->K; ++j) out.indices[j] = -1;
  if (out.log_inclusion == nullptr) return;
  for (int64_t j = n; j < ceil_div(n, kLanes<float>) * kLanes<float>; ++j) s.value[j] = 0;
  for (int64_t j = 0; j < n; j += kLanes<float>) store(s.value + j, f(load(s.value + j)));
  std::memcpy(out.log_inclusion, s.value, static_cast<size_t>(n) * sizeof(float));
  for (int64_t j = n; j < c.p->K; ++j) out.log_inclusion[j] = -__builtin_inff();
}

inline void copy_head(const RowContext& c, int64_t from, int64_t to) {
  const Output a = output_row(c, from), b = output_row(c, to);
  std::memcpy(b.indices, a.indices, static_cast<size_t>(c.p->K) * sizeof(int32_t));
  if (a.log_inclusion != nullptr)
    std::memcpy(b.log_inclusion, a.log_inclusion, static_cast<size_t>(c.p->K) * sizeof(float));
}

// Rows whose keys are the same for every head and certain: those taken and the heavy ones.
inline void write_certain(const RowContext& c, Scratch* s) {
  merge_heavy(s, [](int64_t) { return true; });
  write_row(c, *s, output_row(c, 0), [](Vec<float>) { return Vec<float>{}; });
  for (int64_t head = 1; head < c.task->heads(); ++head) copy_head(c, 0, head);
}

inline void sample_gumbel(const RowContext& c, Row* row, Scratch* s) {
  begin_heavy(c, s);
  const double want = static_cast<double>(c.to_draw) + 1,
               free = static_cast<double>(c.valid - c.forced.size);
  // Keys that draws would repeat, where that costs more than to find them; where few are left
  // beyond those wanted, all.
  const bool all = free <= 2 * want;
  const double places = find_heavy(c, all ? free : 1.25 * want, all ? 0 : 0.1 * want, row, s);
  const Plan plan = plan_race(c, places, *row, *s);
  const bool timed = c.p->log_inclusion != nullptr || s->heavy.size > c.forced.size;
  if (row->total > 0) index_blocks(row);
  for (int64_t head = 0; head < c.task->heads(); ++head) {
    const Output out = output_row(c, head);
    const int64_t address = draw_head(c, head);
    ExponentialStream stream(c.task->key, address, c.position);
    draw_heavy(ExponentialStream(c.task->heavy_key, address, c.position), s);
    s->taken.size = s->past.size = 0;
    const bool any_light = row->total > 0;
    Stretch at{0, static_cast<float>(plan.time), false};
    if (any_light) at = draw_light(plan.draws, *row, &stream, s);
    int64_t keys;
    while (keys = count_keys(at, *s), keys <= c.p->K)
      if (any_light)
        at = draw_on(at, plan.draws / 4 + 1, *row, &stream, s);
      else
        at.end = kNever;
    const float kappa = take_back(at, keys, c.p->K, timed, &stream, s);
    if (s->past.size > 0) {
      add_to_past(s);
      std::swap(s->past, s->taken);
      std::swap(s->past_weight, s->value);
    } else {
      remove_repeats(&s->taken, s->value);
    }
    merge_heavy(s, [&](int64_t i) { return s->heavy_time[i] < at.end; });
    write_row(c, *s, out, [&](Vec<float> w) { return log_one_minus_exp(w * kappa); });
  }
}

inline void sample_systematic(const RowContext& c, Row* row, Scratch* s) {
  begin_heavy(c, s);
  const int64_t places =
      static_cast<int64_t>(find_heavy(c, static_cast<double>(c.to_draw), 0, row, s));
  s->taken.size = 0;
  if (places == 0) return write_certain(c, s);
  index_blocks(row);
  const float inclusion_scale = static_cast<float>(static_cast<double>(places) / row->total);
  for (int64_t head = 0; head < c.task->heads(); ++head) {
    const Output out = output_row(c, head);
    const PhiloxBlock counter = philox_counter(draw_head(c, head), c.position, 0);
    draw_systematic(*row, places, philox4x32(counter, c.task->key).word[0], s);
    merge_heavy(s, [](int64_t) { return true; });
    write_row(c, *s, out, [&](Vec<float> w) {
      return min(log(max(w * inclusion_scale, broadcast(1e-37f))), broadcast(0.0f));
    });
  }
}

inline void sample_multinomial(const RowContext& c, Row* row, Scratch* s) {
  begin_heavy(c, s);
  add_blocks(row);
  index_blocks(row);
  const float inclusion_scale = static_cast<float>(static_cast<double>(c.to_draw) / row->total);
  for (int64_t head = 0; head < c.task->heads(); ++head) {
    const Output out = output_row(c, head);
    ExponentialStream(c.task->key, draw_head(c, head), c.position)
        .take(c.to_draw + 1, s->spacing, nullptr);
    take_draws(c.to_draw, s->spacing, s->draws);
    find_keys(*row, s->draws, c.to_draw, s->value, s->taken.key);
    s->taken.size = c.to_draw;
    merge_heavy(s, [](int64_t) { return true; });
    write_row(c, *s, out, [&](Vec<float> w) {
      return w < kNever ? log(max(w * inclusion_scale, broadcast(1e-37f))) : Vec<float>{};
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
inline float load_query(const TaskContext& task, int64_t sketch, int64_t i, float* q) {
  const SketchSampleParams& p = *task.p;
  const T* x = static_cast<const T*>(p.q_sketch) + task.sequence.batch * p.q_stride[0] +
               sketch * p.q_stride[1] + (task.sequence.first_query + i) * p.q_stride[2];
  const double factor = query_factor(p);
  float square = 0;
  for (int64_t d = 0; d < p.S; ++d) {
    q[d] = static_cast<float>(static_cast<double>(to_acc(x[d])) * factor);
    square += q[d] * q[d];
  }
  return __builtin_sqrtf(square);
}

inline bool is_finite(float x) { return x - x == 0; }

// By Cauchy-Schwarz no |score| is larger than the product; reports numbers that are not finite.
inline bool check_norms(const SketchSampleParams& p, float query_norm, float key_norm) {
  if (is_finite(query_norm) && is_finite(key_norm) && is_finite(query_norm * key_norm)) return true;
  __atomic_store_n(p.error, kSketchNotFinite, __ATOMIC_RELAXED);
  return false;
}

// Lets a row be what sketch_scan makes of query i of a sketch: weights, with the sums of blocks and
// the moments of parts, or, of topk, scores.
inline void use_scanned(const TaskContext& task, int64_t sketch, int64_t i, Row* row) {
  const SketchSampleParams& p = *task.p;
  row->weight = p.scanned + ((task.sequence.segment * p.H_s + sketch) * p.most_queries + i) *
                                scanned_row_size(p);
  row->block_sum = row->weight + padded_keys(p);
  row->parts = reinterpret_cast<Moments*>(row->block_sum + parts_of_row(p) * kPartTiles);
}

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
  Moments part[kRows] = {};
  int64_t blocks = 0;
  for (int64_t r = 0; r < count; ++r) {
    begin_sums(rows[r].blocks(), &s->rows[r]);
    blocks = max_of(blocks, rows[r].blocks());
  }
  for (int64_t t = 0; t < blocks; ++t) {
    const KeyTile tile = key_tile(task, t, s->tile);
    score_tile<kRows>(s->q, S, tile.features, S, tile.bias,
                      [&](int r, int column, Vec<float> score) {
                        store(s->rows[r].weight + t * kTile + column, kExp ? exp2(score) : score);
                      });
    if (!kExp) continue;
    for (int64_t r = 0; r < count; ++r) {
      if (t >= rows[r].blocks()) continue;
      const KeyList& blank = rows[r].blank;
      while (next[r] < blank.size && blank.key[next[r]] < (t + 1) * kTile)
        s->rows[r].weight[interleaved(blank.key[next[r]++])] = 0;
      sum_block(t, &s->rows[r], &part[r]);
      if ((t + 1) % kPartTiles != 0 && t + 1 != rows[r].blocks()) continue;
      s->rows[r].all.add(part[r]);
      part[r] = Moments{};
    }
  }
}

// Whether the weights of score_rows<true> serve, so that no maximum need be taken out.
inline bool is_plain(const Row& row) {
  const float largest = reduce_max(row.all.top);
  return largest >= kLeastPlainWeight && largest <= kMostPlainWeight;
}

// Draws for all heads of a row from its weights and running sums.
inline void draw_row(const RowContext& c, Row* row, Scratch* s) {
  if (c.p->method == SampleMethod::kGumbel)
    sample_gumbel(c, row, s);
  else if (c.p->method == SampleMethod::kSystematic)
    sample_systematic(c, row, s);
  else
    sample_multinomial(c, row, s);
}

// Draws for the rows that have something to draw, all of one task.
inline void draw_rows(const RowContext* rows, int64_t count, Scratch* s) {
  bool rest[kRows] = {};
  bool any_rest = false;
  const bool topk = rows[0].p->method == SampleMethod::kTopK, scanned = scans(*rows[0].p);
  if (!topk && !scanned) score_rows<true>(rows, count, s);
  for (int64_t r = 0; r < count; ++r) {
    if (rows[r].to_draw == 0) continue;
    if (!topk && scanned) sum_scanned(rows[r].blank, rows[r].blocks(), &s->rows[r]);
    rest[r] = topk || !is_plain(s->rows[r]);
    any_rest |= rest[r];
    if (rest[r]) continue;
    s->rows[r].reference = 0;
    draw_row(rows[r], &s->rows[r], s);
  }
  if (!any_rest) return;
  if (!scanned) score_rows<false>(rows, count, s);
  for (int64_t r = 0; r < count; ++r) {
    if (!rest[r]) continue;
    const RowContext& c = rows[r];
    Row& row = s->rows[r];
    if (scanned && !topk) score_row(c, s->tile, row.weight);
    put(c.blank, -__builtin_inff(), row.weight);
    if (topk) {
      begin_heavy(c, s);
      s->taken.size = 0;
      take_largest(row.weight, c.limit, c.to_draw, &s->taken);
      write_certain(c, s);
      continue;
    }
    normalise(c.blocks(), &row);
    sum_row(c.blocks(), &row);
    draw_row(c, &row, s);
  }
}

// A row all of whose keys are certain: all its valid keys, or its forced ones.
inline void write_certain_row(const RowContext& c, Scratch* s) {
  begin_heavy(c, s);
  s->taken.size = 0;
  if (c.valid <= c.p->K) {
    s->heavy.size = 0;
    for (int64_t j = 0; j < c.limit; ++j)
      if (c.task->key_mask == nullptr || c.task->key_mask[j])
        s->taken.key[s->taken.size++] = static_cast<int32_t>(j);
  }
  write_certain(c, s);
}

// ---- few queries --------------------------------------------------------------------------------

// Whether query i sees any of the keys [begin, end).
inline bool sees_any(const TaskContext& task, int64_t i, int64_t begin, int64_t end) {
  const Visible& v = task.p->visible;
  end = min_of(end, key_limit(v, task.sequence, position_of(v, task.sequence, i)));
  if (task.key_mask == nullptr) return begin < end;
  for (int64_t j = begin; j < end; ++j)
    if (task.key_mask[j]) return true;
  return false;
}

// Adds what tile t makes of the queries of a sketch to their rows; of R queries `count` exist.
template <int R>
inline void scan_tile(const float* q, int64_t S, const KeyTile& tile, int64_t t, bool topk,
                      int64_t count, Row* rows, Moments* moments) {
  score_tile<R>(q, S, tile.features, S, tile.bias, [&](int r, int column, Vec<float> score) {
    if (r < count) store(rows[r].weight + t * kTile + column, topk ? score : exp2(score));
  });
  for (int64_t r = 0; !topk && r < count; ++r) sum_block(t, &rows[r], &moments[r]);
}

}  // namespace sampling

inline int64_t sketch_scan_num_tasks(const SketchSampleParams& p) {
  return p.visible.queries.count() * p.H_ks * parts_of_row(p);
}

// Of all sketches that share one of the keys: queries and their rows; and a tile.
inline int64_t sketch_scan_scratch_bytes(const SketchSampleParams& p) {
  const int64_t sketches = p.H_s / p.H_ks;
  ScratchAllocator arena(nullptr);
  arena.take<float>((p.S + 1) * kTile);
  arena.take<float>(sketches * kScanQueries * p.S);
  arena.take<sampling::Row>(sketches * kScanQueries);
  arena.take<sampling::Moments>(sketches * kScanQueries);
  return arena.bytes();
}

inline void sketch_scan(const SketchSampleParams& p, int64_t number, void* scratch) {
  using namespace sampling;
  const int64_t parts = parts_of_row(p), part = number % parts, sketches = p.H_s / p.H_ks,
                first_sketch = number / parts % p.H_ks * sketches;
  const TaskContext task = task_context(p, number / parts / p.H_ks, first_sketch);
  const int64_t count = task.sequence.num_queries, begin = part * kPartTiles * kTile,
                end = min_of(begin + kPartTiles * kTile, task.sequence.num_keys);
  if (!task.sequence.exists || count == 0 || begin >= end) return;
  if (task.sequence.first_query >= p.row_end || task.sequence.first_query + count <= p.row_begin)
    return;  // drawn for in another call
  ScratchAllocator arena(scratch);
  float* room = arena.take<float>((p.S + 1) * kTile);
  float* q = arena.take<float>(sketches * kScanQueries * p.S);
  Row* rows = arena.take<Row>(sketches * kScanQueries);
  Moments* moments = arena.take<Moments>(sketches * kScanQueries);
  std::memset(q, 0, static_cast<size_t>(sketches * kScanQueries * p.S) * sizeof(float));
  float query_norm = 0;
  for (int64_t i = 0; i < count; ++i) {
    // Its own keys first: a mask may begin with many that none sees.
    const bool sees = sees_any(task, i, begin, end) || sees_any(task, i, 0, task.sequence.num_keys);
    for (int64_t n = 0; n < sketches; ++n) {
      const int64_t row = n * kScanQueries + i, sketch = first_sketch + n;
      rows[row] = Row{};
      moments[row] = Moments{};
      use_scanned(task, sketch, i, &rows[row]);
      if (!sees) continue;  // such a query is not looked at, whatever it holds
      dispatch_dtype(p.dtype, [&](auto type) {
        const float norm = load_query<decltype(type)>(task, sketch, i, q + row * p.S);
        query_norm = is_finite(norm) ? max_of(query_norm, norm) : __builtin_inff();
      });
    }
  }
  const bool topk = p.method == SampleMethod::kTopK;
  for (int64_t t = begin / kTile; t * kTile < end; ++t) {
    const KeyTile tile = key_tile(task, t, room);
    if (!check_norms(p, query_norm, largest_norm(tile.features, p.S))) return;
    for (int64_t n = 0; n < sketches; ++n) {
      const float* queries = q + n * kScanQueries * p.S;
      Row* own = rows + n * kScanQueries;
      Moments* sums = moments + n * kScanQueries;
      if (count == 1)
        scan_tile<1>(queries, p.S, tile, t, topk, count, own, sums);
      else
        scan_tile<kScanQueries>(queries, p.S, tile, t, topk, count, own, sums);
    }
  }
  for (int64_t n = 0; n < sketches; ++n)
    for (int64_t i = 0; i < count; ++i)
      rows[n * kScanQueries + i].parts[part] = moments[n * kScanQueries + i];
}

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
  const TaskContext task = task_context(p, block.segment, number % p.H_s);
  const Sequence& sequence = task.sequence;
  const int64_t begin = max_of(block.begin, p.row_begin - sequence.first_query),
                end = min_of(block.end, p.row_end - sequence.first_query);
  if (begin >= end) return;

  float key_norm = 0;  // sketch_scan has looked at norms
  const bool looks = !scans(p) && sequence.exists;
  for (int64_t t = 0; looks && t < ceil_div(sequence.num_keys, kTile); ++t) {
    const float norm = task.tile_norm[t];
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
        if (scans(p)) use_scanned(task, task.sketch, i0 + r, &s.rows[r]);
        if (context[r].valid == 0) continue;  // such a query is not looked at, whatever it holds
        const float norm = load_query<decltype(dtype)>(task, task.sketch, i0 + r, s.q + r * p.S);
        query_norm = is_finite(norm) ? max_of(query_norm, norm) : __builtin_inff();
      }
    });
    if (!check_norms(p, query_norm, key_norm)) return;
    for (int64_t r = 0; r < rows; ++r)
      if (context[r].to_draw == 0) write_certain_row(context[r], &s);
    if (draws) draw_rows(context, rows, &s);
  }
}

}  // namespace smartbird::SMARTBIRD_ISA

#endif  // SMARTBIRD_SKETCH_SAMPLE_INL_H_
