// q_sketch [B, H_s, N, S], k_sketch [B, H_ks, M, S] -> indices, log_inclusion [B, H_i, N, K]: every
// index head draws its own keys of a row from softmax(q_sketch k_sketch^T scale) of its sketch.
//
// A block of threads takes 32 rows of a sequence, by one sketch, and streams their keys twice. A
// row's keys are cut into 32 parts, one after the other, and a part belongs to one lane, which adds
// up its weights key by key: a running sum needs no other lane. The first pass leaves the sum of
// each part. Draws are numbers in [0, total): a warp makes those of all heads of a row, and sorts
// them into one list. In the second pass a lane makes the same running sum again, to the last bit,
// and gives each draw of its part to the key at which the sum passes it. No score is kept and none
// is made for a single draw; what a block needs does not grow with M.
//
// Some keys are certain before any draw: those that are forced and, by a threshold of the score,
// those that hold so much of a row's mass that draws would only repeat them. They weigh nothing in
// the running sums, and the second pass lists them. `systematic` takes them for certain, topk
// chooses by nothing else. `gumbel` is a race, as on the CPU: keys arrive by Poisson processes of
// rate weight, and the first K distinct arrivals are successive sampling. A key beyond the
// threshold has an exponential time of its own; of the others the first n arrivals are n sorted
// draws, with times that do not depend on where they fall. The (K + 1)-th key to come gives kappa.
// Where fewer came, the race goes on from there with n more arrivals.
//
// A row's draws are the same to the last bit whatever stands beside it: how its keys are cut
// depends on its limit alone, and so does every sum. `systematic` and `topk` choose the CPU's keys
// by a seed, `gumbel` and `multinomial` spend its numbers in another way.
#include "launch.h"
#include "score_tile.cuh"

namespace smartbird::cuda {
namespace {

constexpr int kRows = 32;
constexpr int kWarps = 8, kThreads = kWarps * kWarpSize;
constexpr int kParts = kWarpSize;  // of a row's keys
constexpr int kWarpParts = kParts / kWarps;
constexpr int kLaneRows = kRows / 8;  // a lane has the rows lane / 4 + 8 i
constexpr int kChunk = 8;             // neighbouring keys that a lane takes at a time
constexpr uint32_t kWholeChunk = (1u << kChunk) - 1;
constexpr int kBins = 256;         // of the radix select
constexpr int kBuckets = 256;      // of the sort of draws
constexpr int kMostAtOnce = 1024;  // draws of a row in one pass, unless one head has more

// Draws are integers in [0, kWhole), as are the running sums over parts, scaled to kWhole + 1.
constexpr int32_t kWhole = INT32_MAX;
// While a row's largest score is within these (base 2), weights are 2^score; else they are relative
// to the largest. As on the CPU, the row alone decides.
constexpr float kLeastPlain = -40, kMostPlain = 86;

// Registers are few.
__device__ __forceinline__ int thread() { return static_cast<int>(fresh_thread_id()); }
__device__ __forceinline__ int lane() { return static_cast<int>(fresh_thread_id() % kWarpSize); }
__device__ __forceinline__ int warp() { return static_cast<int>(fresh_thread_id() / kWarpSize); }

// What a row does in the next pass over its keys.
enum Stage : int {
  kSelect = 0,  // topk: counts scores by a digit, in four passes
  kSum = 4,     // sums weights, and counts the certain keys
  kDraw = 5,    // lists the certain keys, and finds the draws' keys
  kDone = 6,
};

__host__ __device__ __forceinline__ int most_draws(int K) { return 2 * K + 16; }

// What is known about a row. Of the keys [0, limit), counted from the first of its sequence, those
// that key_mask allows are valid; the last is, where there is a mask. Valid keys below sink_end, in
// the window or, below global_end, in global_mask are forced.
struct alignas(16) Row {
  int limit;
  int plain_begin, plain_end;  // keys that are neither forced nor, by `threshold`, certain
  float reference;             // weight = 2^(score - reference)

  int sink_end, window_begin, window_end, global_end;
  int places;    // left by the forced keys; 0 where nothing is drawn
  bool is_race;  // gumbel, and some are
  int stage;
  int part_keys;  // a multiple of kChunk

  // Keys above it, and of those equal to it the first num_ties, are certain.
  float threshold;
  int num_ties;
  uint32_t prefix;  // of topk: the digits of the threshold found so far
  int certain;      // keys
  bool is_listed;   // they have been written

  float log_mass;     // base 2, of the sum of weights
  float draw_weight;  // that sum / 2^31
  int draws;          // of each head in a pass
  int head, heads;    // of the pass, among those of the sketch
  float per_head;     // 1 / heads
  double step;        // of systematic draws, on the grid of kWhole
  // A race that goes on.
  int stretch, past;  // passes, and light keys, before this one
  float elapsed;      // time, in units of 1 / sum of weights
};

// The draws of one row that fall into one part: [next, end) of its list.
struct Cursor {
  int next, end;
};

// ---- memory -------------------------------------------------------------------------------------

// Elements by row, or by warp, of the memory that a block of threads has in p.scratch.
struct Sizes {
  int draws;    // of a row in a pass, all heads together
  int listed;   // entries of the list that they are taken from
  int certain;  // keys
  int past;     // of a race that goes on
  int found;    // by warp: keys among which a race decides
};

__host__ __device__ inline Sizes sizes_of(const SketchSampleParams& p) {
  const int K = static_cast<int>(p.K), heads = static_cast<int>(p.H_i / p.H_s);
  Sizes n{};
  n.certain = K;
  if (p.method == SampleMethod::kTopK) return n;
  const bool is_race = p.method == SampleMethod::kGumbel;
  const int most = is_race ? most_draws(K) : K, usual = is_race ? K + K / 4 + 8 : K;
  n.draws = max_of(most, heads < kMostAtOnce ? min_of(heads * usual, kMostAtOnce) : kMostAtOnce);
  n.listed = p.method == SampleMethod::kSystematic ? min_of(heads, n.draws) : n.draws;
  if (!is_race) return n;
  n.certain = 2 * K + 2;  // see plan_row and settle_race
  n.past = K;
  n.found = n.certain + n.past + most;
  return n;
}

struct Scratch {
  Sizes size;
  uint32_t* place;  // [kRows, listed] ascending: where draws fall, on a grid of 2^32
  int32_t* slot;    // [kRows, listed] where what they find goes
  int32_t* key;     // [kRows, draws] by head and rank: places before they are sorted, then keys
  float* score;     // of the key, base 2
  float* time;      // [kRows, draws or 0] of arrival, base 2, see write_race
  int32_t* certain_key;  // [kRows, certain]
  float* certain_score;  // infinite where the key is forced
  int32_t* past_key;     // [kRows, past]
  float *past_score, *past_time;
  int32_t* found_key;  // [kWarps, found]
  float *found_score, *found_time;

  __host__ __device__ int64_t lay_out(const SketchSampleParams& p, char* base, int64_t block) {
    size = sizes_of(p);
    int64_t used = 0;
    const auto take = [&](auto** pointer, int64_t count) {
      using X = std::remove_reference_t<decltype(**pointer)>;
      static_assert(sizeof(X) == 4);
      if (base != nullptr) *pointer = reinterpret_cast<X*>(base) + used;
      used += count;
    };
    const int timed = size.past > 0 ? size.draws : 0;
    for (int pass = 0; pass < 2; ++pass) {  // the first to learn how much a block has
      if (pass == 1) {
        if (base == nullptr) break;
        base += block * used * 4;
        used = 0;
      }
      take(&place, kRows * size.listed);
      take(&slot, kRows * size.listed);
      take(&key, kRows * size.draws);
      take(&score, kRows * size.draws);
      take(&time, kRows * timed);
      take(&certain_key, kRows * size.certain);
      take(&certain_score, kRows * size.certain);
      take(&past_key, kRows * size.past);
      take(&past_score, kRows * size.past);
      take(&past_time, kRows * size.past);
      take(&found_key, kWarps * size.found);
      take(&found_score, kWarps * size.found);
      take(&found_time, kWarps * size.found);
    }
    return used * 4;
  }
};

// ---- a block's rows -----------------------------------------------------------------------------

// The rows that take part in a pass: those of a stage whose parts have part_keys each.
struct Pass {
  int stage, part_keys, limit;
};

// What the rows of a block of threads share. It lies in shared memory, as registers are few.
struct Block {
  int tile;  // its number
  Pass pass;
  Scratch scratch;
  Sequence sequence;
  int64_t sketch, first_query;  // of the sequence's queries
  const char* first_key;        // features of its key 0
  int last_key;
  const uint8_t* key_mask;  // may be null, as the next
  const uint8_t* global_mask;
  PhiloxKey sample_key, arrival_key;
};

// Everything by row has kRows entries, everything by part kRows x kParts.
struct Shared {
  Row row[kRows];
  int start[kRows * kParts];  // the sums before each part
  union {
    struct {
      Cursor cursor[kRows * kParts];
      float sum[kRows * kParts];  // of weights
      float top[kRows * kParts];  // largest score
      float square[kRows * kParts];
      // Number of forced keys and those above the threshold; then of certain keys before the next.
      int above[kRows * kParts];
      // Number of keys at the threshold; then how many of those left are certain.
      int ties[kRows * kParts];
      int buckets[kWarps * kBuckets];
    };
    int bins[kRows * kBins];
  };
  Block block;
};

// Behind it come the rows' sketches, see stage_queries. Rows of float end 4 features later than
// they need to, for the banks' sake.
__device__ __forceinline__ char* staged_queries(Shared& s) {
  return reinterpret_cast<char*>(&s) + (sizeof(Shared) + 15) / 16 * 16;
}
size_t shared_bytes(const SketchSampleParams& p) {
  const size_t size = static_cast<size_t>(p.S);
  return (sizeof(Shared) + 15) / 16 * 16 + kRows * (p.dtype == DType::kFloat32
                                                        ? ((size + 3) / 4 * 4 + 4) * sizeof(float)
                                                        : (size + 15) / 16 * 16 * 2);
}

// What a launch knows beside its problem.
struct SampleLaunch {
  SketchSampleParams problem;
  int tiles, row_blocks, batches;  // of rows and a sketch: of each batch element so many by H_s
  float score_factor;              // of what the tensor cores make
  bool is_wide;                    // 8 bytes of a key's features can be read at a time
  uint32_t key_bytes;              // from key to key
};

// The kernel's parameters and shared memory.
struct Tile {
  const SampleLaunch& launched;
  const SketchSampleParams& p;
  Shared& s;

  __device__ __forceinline__ const Scratch& scratch() const { return s.block.scratch; }
  __device__ __forceinline__ int64_t position(int r) const {
    return position_of(p.visible, s.block.sequence, s.block.first_query + r);
  }
  __device__ __forceinline__ int heads() const { return static_cast<int>(p.H_i / p.H_s); }
  // The address of a head's random numbers.
  __device__ __forceinline__ int64_t draw_head(int head) const {
    return p.visible.first_head + s.block.sketch * heads() + head;
  }
  // Where a row's results begin.
  __device__ __forceinline__ int64_t output(int r, int head) const {
    const int64_t index_head = s.block.sequence.batch * p.H_i + s.block.sketch * heads() + head;
    return (index_head * p.N + s.block.sequence.first_query + s.block.first_query + r) * p.K;
  }
};

// For topk the scale only counts by its sign: without it, scores that are equal in exact arithmetic
// stay equal.
__host__ __device__ __forceinline__ double score_factor(const SketchSampleParams& p) {
  if (p.method != SampleMethod::kTopK) return p.scale * kLog2e;
  return p.scale > 0 ? 1.0 : (p.scale < 0 ? -1.0 : 0.0);
}

// An integer of the same order; + 0 makes -0 equal to 0.
__device__ __forceinline__ uint32_t ordered(float x) {
  const int bits = __float_as_int(x + 0.0f);
  return static_cast<uint32_t>(bits ^ (bits >> 31 & 0x7FFFFFFF)) ^ 0x80000000u;
}
__device__ __forceinline__ float from_ordered(uint32_t x) {
  const int bits = static_cast<int>(x ^ 0x80000000u);
  return __int_as_float(bits ^ (bits >> 31 & 0x7FFFFFFF));
}

// Uniform in (0, 1).
__device__ __forceinline__ float uniform(uint32_t bits) {
  return (static_cast<float>(bits >> 9) + 0.5f) * 0x1p-23f;
}

// log(1 - exp(-x)) for x >= 0, with all digits at both ends.
__device__ __forceinline__ float log_one_minus_exp(float x) {
  x = max_of(x, 1e-37f);
  const float series = x * (1 - x * (0.5f - x * (1.0f / 6 - x * (1.0f / 24))));
  const float e = expf(-x);
  const float tail = -e * (1 + e * (0.5f + e * (1.0f / 3 + e * 0.25f)));
  return e < 0.03f ? tail : logf(x < 0.05f ? series : 1 - e);
}

// The first m of [0, n) for which f(m) >= x, ascending; else n.
template <typename X, typename F>
__device__ __forceinline__ int lower_bound(int n, X x, F&& f) {
  int low = 0;
  while (n > low) {
    const int middle = low + (n - low) / 2;
    if (f(middle) < x)
      low = middle + 1;
    else
      n = middle;
  }
  return low;
}

// By one warp: the forced keys are those of for_each_forced in visible.h.
__device__ Row plan_row(const Tile& tile, int r) {
  const SketchSampleParams& p = tile.p;
  const Block& block = tile.s.block;
  const Visible& v = p.visible;
  const int64_t position = tile.position(r);
  Row row{};
  const Span window = window_span(v, block.sequence, position);
  row.limit = static_cast<int>(key_limit(v, block.sequence, position));
  row.window_begin = static_cast<int>(window.begin);
  row.window_end = static_cast<int>(window.end);
  const auto in_window = [&](int j) { return j >= row.window_begin && j < row.window_end; };
  const unsigned lanes_before = (1u << lane()) - 1;
  const int limit = row.limit;
  int valid = limit, forced = 0;
  if (block.key_mask == nullptr) {
    row.sink_end = static_cast<int>(min_of<int64_t>(v.num_sinks, limit));
    forced = row.sink_end + max_of(0, row.window_end - max_of(row.window_begin, row.sink_end));
  } else {
    valid = 0;
    row.sink_end = v.num_sinks > 0 ? limit : 0;
    row.limit = 0;  // up to the last valid key: masked ones behind it change nothing
    for (int first = 0; first < limit; first += kWarpSize) {
      const int j = first + lane();
      const bool is_valid = j < limit && block.key_mask[j] != 0;
      const unsigned lanes = __ballot_sync(kAllLanes, is_valid);
      const int before = valid + __popc(lanes & lanes_before);
      const bool sink = is_valid && before < v.num_sinks;
      forced += __popc(__ballot_sync(kAllLanes, sink || (is_valid && in_window(j))));
      valid += __popc(lanes);
      if (lanes != 0) row.limit = first + kWarpSize - __clz(lanes);
      const unsigned last = __ballot_sync(kAllLanes, is_valid && before + 1 == v.num_sinks);
      if (last != 0) row.sink_end = first + __ffs(last);
    }
  }
  row.places = static_cast<int>(p.K) - forced;
  if (block.global_mask != nullptr) {
    for (int first = row.sink_end; first < row.limit && row.places > 0; first += kWarpSize) {
      const int j = first + lane();
      const bool wanted = j < row.limit && block.global_mask[j] != 0 && !in_window(j) &&
                          (block.key_mask == nullptr || block.key_mask[j] != 0);
      const int before = __popc(__ballot_sync(kAllLanes, wanted) & lanes_before);
      const unsigned taken = __ballot_sync(kAllLanes, wanted && before < row.places);
      if (taken != 0) row.global_end = first + kWarpSize - __clz(taken);
      row.places -= __popc(taken);
    }
  }
  row.part_keys = kChunk * static_cast<int>(ceil_div(row.limit, kChunk * kParts));
  row.num_ties = INT32_MAX;
  row.threshold = valid <= p.K ? -kInf : kInf;
  if (valid <= p.K) row.places = 0;
  row.is_race = p.method == SampleMethod::kGumbel && row.places > 0;
  // Where few are left beyond those wanted, all run by themselves.
  const int free = valid - (static_cast<int>(p.K) - row.places);
  if (row.is_race && free <= 2 * (row.places + 1)) row.threshold = -kInf;

  // The longer side of the window.
  row.plain_begin = row.sink_end;
  row.plain_end = row.limit;
  if (row.window_begin < row.window_end) {
    const int behind = max_of(row.sink_end, row.window_end);
    if (row.window_begin - row.sink_end >= row.limit - behind)
      row.plain_end = row.window_begin;
    else
      row.plain_begin = behind;
  }
  if (row.threshold < kInf) row.plain_end = 0;
  row.stage = p.method == SampleMethod::kTopK && row.places > 0 ? kSelect : kSum;
  if (row.limit == 0) row.stage = kDraw;  // nothing
  row.heads = tile.heads();
  return row;
}

// ---- scores -------------------------------------------------------------------------------------

// The rows' sketches, by all threads: of 16 bits, as the fragments of mma.m16n8k16 want them, 16
// rows and 16 features after the other; of float, times the factor of scores, one row after the
// other. Row r has features for r < rows, else zeros.
__device__ void stage_queries(const SketchSampleParams& p, const char* first_query, int rows,
                              char* staged) {
  const int size = static_cast<int>(p.S);
  if (p.dtype != DType::kFloat32) {
    const auto* features = reinterpret_cast<const uint16_t*>(first_query);
    const int fragments = (size + 15) / 16 * 2 * kWarpSize;
    for (int n = thread(); n < fragments; n += kThreads) {
      const int own = n % kWarpSize, g = own / 4 + n / kWarpSize % 2 * 16,
                d = n / (2 * kWarpSize) * 16 + own % 4 * 4;
      const auto feature = [&](int r, int e) -> uint32_t {
        return r < rows && e < size ? features[r * p.q_stride[2] + e] : 0;
      };
      const auto pair = [&](int r, int e) { return feature(r, e) | feature(r, e + 1) << 16; };
      reinterpret_cast<uint4*>(staged)[n] = {pair(g, d), pair(g + 8, d), pair(g, d + 2),
                                             pair(g + 8, d + 2)};
    }
  } else {
    const auto* features = reinterpret_cast<const float*>(first_query);
    const int padded = (size + 3) / 4 * 4;
    for (int n = thread(); n < kRows * padded; n += kThreads) {
      const int r = n / padded, d = n % padded;
      const double x = r < rows && d < size ? features[r * p.q_stride[2] + d] : 0;
      reinterpret_cast<float*>(staged)[r * (padded + 4) + d] =
          static_cast<float>(x * score_factor(p));
    }
  }
}

// 8 bytes of features of n keys, from d on; zeros beyond `size`.
template <typename T, int features, int n, typename Key>
__device__ __forceinline__ void load_keys(bool is_wide, int d, int size, Key&& key,
                                          Pack<T, features> (&x)[n]) {
  if (is_wide) {
#pragma unroll
    for (int i = 0; i < n; ++i)
      x[i] =
          load_features<Features::kVectors, features>(reinterpret_cast<const T*>(key(i)), d, size);
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i)
      x[i] = load_features<Features::kAny, features>(reinterpret_cast<const T*>(key(i)), d, size);
  }
}

// By one warp: score[i][k] is that of row lane / 4 + 8 i with key k of the chunk of lane % 4.
// key(part, k) points at features. The tensor core's column c is a key of part c / 2, so that its
// results land in the lane that the part belongs to.
//
// float32 takes FMA, which keeps its 24 bits and adds in the order of the CPU; 16 features take
// twice the time of the exponentials. Three products in TF32 would be faster and keep about 21.
template <typename Key>
__device__ __forceinline__ void score_chunk(DType dtype, const char* query, int size, bool is_wide,
                                            Key&& key, float (&score)[kLaneRows][kChunk]) {
  const int g = lane() / 4, t = lane() % 4;
#pragma unroll
  for (int i = 0; i < kLaneRows; ++i)
#pragma unroll
    for (int k = 0; k < kChunk; ++k) score[i][k] = 0;
  if (dtype != DType::kFloat32) {
    const uint4* fragment = reinterpret_cast<const uint4*>(query) + lane();
    __syncwarp();
#pragma unroll 1
    for (int begin = 0; begin < size; begin += 16, fragment += 2 * kWarpSize) {
      Pack<uint16_t, 4> column[kChunk / 2];
      load_keys(
          is_wide, begin + 4 * t, size, [&](int n) { return key(g / 2, 2 * n + g % 2); }, column);
#pragma unroll
      for (int m = 0; m < kLaneRows / 2; ++m) {
        const uint4 a = fragment[m * kWarpSize];
#pragma unroll
        for (int n = 0; n < kChunk / 2; ++n) {
          uint32_t b[2];
          memcpy(b, &column[n], sizeof(b));
          float (&low)[kChunk] = score[2 * m], (&high)[kChunk] = score[2 * m + 1];
          float d[4] = {low[2 * n], low[2 * n + 1], high[2 * n], high[2 * n + 1]};
          if (dtype == DType::kBFloat16)
            mma_m16n8k16<bfloat16>(d, {a.x, a.y, a.z, a.w}, b);
          else
            mma_m16n8k16<float16>(d, {a.x, a.y, a.z, a.w}, b);
          low[2 * n] = d[0], low[2 * n + 1] = d[1], high[2 * n] = d[2], high[2 * n + 1] = d[3];
        }
      }
    }
  } else {
    const int stride = (size + 3) / 4 * 4 + 4;
    const float* row = reinterpret_cast<const float*>(query) + g * stride;
#pragma unroll 1
    for (int begin = 0; begin < size; begin += 2) {
      float2 a[kLaneRows];
#pragma unroll
      for (int i = 0; i < kLaneRows; ++i)
        a[i] = *reinterpret_cast<const float2*>(row + 8 * i * stride + begin);
      constexpr int kAtOnce = kChunk / 4;
#pragma unroll
      for (int first = 0; first < kChunk; first += kAtOnce) {
        Pack<float, 2> b[kAtOnce];
        load_keys(is_wide, begin, size, [&](int n) { return key(t, first + n); }, b);
#pragma unroll
        for (int n = 0; n < kAtOnce; ++n)
#pragma unroll
          for (int i = 0; i < kLaneRows; ++i) {
            float& x = score[i][first + n];
            x = __fmaf_rn(a[i].x, b[n].x[0], x);
            x = __fmaf_rn(a[i].y, b[n].x[1], x);
          }
      }
    }
  }
}

// ---- a pass over the keys -----------------------------------------------------------------------

// m / heads. A half keeps m clear of where rounding counts.
__device__ __forceinline__ int round_of(const Row& row, int m) {
  return static_cast<int>((static_cast<float>(m) + 0.5f) * row.per_head);
}

// Of the draws of a row's pass, the m-th: where it falls on the grid of kWhole.
__device__ __forceinline__ int32_t draw_place(const Tile& tile, int r, int m) {
  const Row& row = tile.s.row[r];
  const uint32_t* place = tile.scratch().place + r * tile.scratch().size.listed;
  if (tile.p.method != SampleMethod::kSystematic) return static_cast<int32_t>(place[m] >> 1);
  // Head by head, and again one step further on.
  const int n = round_of(row, m);
  const double u = uniform_double(place[m - n * row.heads]);
  return static_cast<int32_t>(min_of((u + n) * row.step, kWhole - 1.0));
}

// Where what it finds goes.
__device__ __forceinline__ int draw_slot(const Tile& tile, int r, int m) {
  const int32_t* slot = tile.scratch().slot + r * tile.scratch().size.listed;
  if (tile.p.method != SampleMethod::kSystematic) return slot[m];
  const Row& row = tile.s.row[r];
  const int n = round_of(row, m);
  return slot[m - n * row.heads] + n;
}

// The running sum of a part at which its next draw falls, infinite where none is left. Rounding
// must not take it beyond the part's last key.
__device__ __forceinline__ float next_draw(const Tile& tile, int r, int part) {
  const int at = r * kParts + part;
  const Cursor cursor = tile.s.cursor[at];
  if (cursor.next >= cursor.end) return kInf;
  const float target = static_cast<float>(draw_place(tile, r, cursor.next) - tile.s.start[at]) *
                       tile.s.row[r].draw_weight;
  return min_of(target, __int_as_float(__float_as_int(tile.s.sum[at]) - 1));
}

__device__ __forceinline__ float first_draw(const Tile& tile, int r, int part) {
  const Row& row = tile.s.row[r];
  const int at = r * kParts + part, draws = row.draws * row.heads;
  const auto place = [&](int m) { return draw_place(tile, r, m); };
  const int begin = lower_bound(draws, tile.s.start[at], place);
  const int end = part + 1 < kParts ? lower_bound(draws, tile.s.start[at + 1], place) : draws;
  tile.s.cursor[at] = {begin, end};
  return next_draw(tile, r, part);
}

// Bits of a mask for the keys j, j + 1, ...
__device__ __forceinline__ uint32_t mask_bits(const uint8_t* mask, int j, int last) {
  uint32_t bits = 0;
#pragma unroll
  for (int k = 0; k < kChunk; ++k)
    if (j <= last - k && __ldg(mask + j + k) != 0) bits |= 1u << k;
  return bits;
}
// The n lowest.
__device__ __forceinline__ uint32_t low_bits(int n) {
  return n <= 0 ? 0 : (n >= kChunk ? kWholeChunk : (1u << n) - 1);
}

// Of a chunk from key j on that is not plain: counts or lists its certain keys, and gives -inf for
// the score of each key that cannot be drawn. Adds 0 times the valid scores to *probe.
__device__ __forceinline__ void take_apart(const Tile& tile, int stage, int r, int part, int j,
                                           uint32_t valid_keys, uint32_t global_keys,
                                           float (&score)[kChunk], float* probe) {
  const Row& row = tile.s.row[r];
  const int at = r * kParts + part;
  const uint32_t valid = low_bits(row.limit - j) & valid_keys;
  const uint32_t forced =
      valid & (low_bits(row.sink_end - j) |
               (low_bits(row.window_end - j) & ~low_bits(row.window_begin - j)) |
               (low_bits(row.global_end - j) & global_keys));
  uint32_t above = 0, tied = 0;
#pragma unroll
  for (int k = 0; k < kChunk; ++k) {
    if ((valid >> k & 1) != 0) *probe = __fmaf_rn(score[k], 0.0f, *probe);
    if (score[k] > row.threshold) above |= 1u << k;
    if (score[k] == row.threshold) tied |= 1u << k;
  }
  above = forced | (above & valid);
  tied &= valid & ~forced;
  uint32_t certain = above | tied;
  if (stage == kSum) {
    tile.s.above[at] += __popc(above);
    tile.s.ties[at] += __popc(tied);
  } else if (stage == kDraw && certain != 0) {
    for (; __popc(tied) > tile.s.ties[at]; tied &= (1u << (31 - __clz(tied))) - 1) {
    }
    tile.s.ties[at] -= __popc(tied);
    certain = above | tied;
    if (!row.is_listed) {
      int n = tile.s.above[at];
      tile.s.above[at] += __popc(certain);
      n += r * tile.scratch().size.certain;
#pragma unroll
      for (int k = 0; k < kChunk; ++k) {
        if ((certain >> k & 1) == 0) continue;
        tile.scratch().certain_key[n] = j + k;
        tile.scratch().certain_score[n++] = (forced >> k & 1) != 0 ? kInf : score[k];
      }
    }
  }
#pragma unroll
  for (int k = 0; k < kChunk; ++k)
    if (((valid & ~certain) >> k & 1) == 0) score[k] = -kInf;
}

__device__ __forceinline__ Pass next_pass(const Row* rows) {
  Pass pass{kDone, 0, 0};
  for (int r = 0; r < kRows; ++r) {
    const int stage = rows[r].stage, part_keys = rows[r].part_keys;
    if (stage > pass.stage || (stage == pass.stage && part_keys > pass.part_keys)) continue;
    if (stage < pass.stage || part_keys < pass.part_keys) pass = {stage, part_keys, 0};
    pass.limit = max_of(pass.limit, rows[r].limit);
  }
  return pass;
}

__device__ __forceinline__ void stream(const Tile& tile) {
  Shared& s = tile.s;
  const Pass& pass = s.block.pass;
  const int g = lane() / 4, t = lane() % 4, first_part = kWarpParts * warp(), part = first_part + t;
  // Of the block's and the rows' values few are kept in registers, as these are few.
  const Block& block = s.block;
  float sum[kLaneRows];   // NaN where the row takes no part
  float mark[kLaneRows];  // the largest score, or the running sum at which the next draw falls
#pragma unroll
  for (int i = 0; i < kLaneRows; ++i) {
    const int r = g + 8 * i, at = r * kParts + part;
    const Row& row = s.row[r];
    sum[i] = __builtin_nanf("");
    mark[i] = pass.stage == kDraw ? kInf : -kInf;
    if (row.stage != pass.stage || row.part_keys != pass.part_keys) continue;
    sum[i] = 0;
    if (pass.stage == kSum) {
      s.above[at] = s.ties[at] = 0;
      s.square[at] = 0;
    }
    if (pass.stage == kDraw && row.draws > 0) mark[i] = first_draw(tile, r, part);
  }
  float probe = 0;
  const int end = min_of(pass.part_keys, pass.limit - first_part * pass.part_keys);
#pragma unroll 1
  for (int step = 0; step < end; step += kChunk) {
    float score[kLaneRows][kChunk];
    score_chunk(
        tile.p.dtype, staged_queries(s), static_cast<int>(tile.p.S), tile.launched.is_wide,
        [&](int p, int k) {
          const int j = min_of((first_part + p) * pass.part_keys + step + k, block.last_key);
          return block.first_key + uint64_t{static_cast<uint32_t>(j)} * tile.launched.key_bytes;
        },
        score);
    const int j = part * pass.part_keys + step;
    uint32_t valid_keys = kWholeChunk, global_keys = 0;
    if (tile.p.visible.key_mask != nullptr)
      valid_keys = mask_bits(block.key_mask, j, block.last_key);
    if (tile.p.visible.global_mask != nullptr)
      global_keys = mask_bits(block.global_mask, j, block.last_key);
    const bool is_plain = valid_keys == kWholeChunk && global_keys == 0;
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) {
      const int r = g + 8 * i;
      const Row& row = s.row[r];
      if (!(sum[i] >= 0) || j >= row.limit) continue;
#pragma unroll
      for (int k = 0; k < kChunk; ++k) score[i][k] *= tile.launched.score_factor;
      if (is_plain && j >= row.plain_begin && j + kChunk <= row.plain_end) {
#pragma unroll
        for (int k = 0; k < kChunk; ++k) probe = __fmaf_rn(score[i][k], 0.0f, probe);
      } else {
        take_apart(tile, pass.stage, r, part, j, valid_keys, global_keys, score[i], &probe);
      }
      if (pass.stage < kSum) {
        const int shift = 24 - 8 * pass.stage;
        const uint32_t prefix = row.prefix;
#pragma unroll
        for (int k = 0; k < kChunk; ++k) {
          const uint32_t x = ordered(score[i][k]);
          // The prefix is all bits above shift + 8: none at first.
          if (score[i][k] > -kInf && (shift == 24 || x >> (shift + 8) == prefix))
            atomicAdd(s.bins + r * kBins + static_cast<int>(x >> shift & (kBins - 1)), 1);
        }
        continue;
      }
      const float reference = row.reference;
      float upto[kChunk], square = 0;
#pragma unroll
      for (int k = 0; k < kChunk; ++k) {
        const float weight = exp2_approx(__fadd_rn(score[i][k], -reference));
        square = __fmaf_rn(weight, weight, square);
        sum[i] = __fadd_rn(sum[i], weight);
        upto[k] = sum[i];
      }
      if (pass.stage == kSum) {
#pragma unroll
        for (int k = 0; k < kChunk; ++k) mark[i] = max_of(mark[i], score[i][k]);
        if (row.is_race) s.square[r * kParts + part] += square;
        continue;
      }
      while (mark[i] < sum[i]) {
        int key = j;
        float found = score[i][0];
#pragma unroll
        for (int k = 1; k < kChunk; ++k) {
          if (upto[k - 1] > mark[i]) continue;
          key = j + k;
          found = score[i][k];
        }
        Cursor& cursor = s.cursor[r * kParts + part];
        const int slot = r * tile.scratch().size.draws + draw_slot(tile, r, cursor.next);
        tile.scratch().key[slot] = key;
        tile.scratch().score[slot] = found;
        ++cursor.next;
        mark[i] = next_draw(tile, r, part);
      }
    }
  }
  SMARTBIRD_DEVICE_CHECK(probe == 0,
                         "smartbird: q_sketch or k_sketch holds NaN or infinity, or numbers whose "
                         "products overflow float32, in which all dtypes are sampled");
  if (pass.stage != kSum) return;
#pragma unroll
  for (int i = 0; i < kLaneRows; ++i) {
    if (!(sum[i] >= 0)) continue;
    const int at = (g + 8 * i) * kParts + part;
    s.sum[at] = sum[i];
    s.top[at] = mark[i];
  }
}

// ---- what a pass has shown: by one warp, all lanes of which know the row ------------------------

// One more digit of the threshold of topk.
__device__ void select_digit(const int* count, Row* row) {
  if (row->stage == kSelect) row->num_ties = row->places;  // of the keys that begin with `prefix`
  // Lane l has the bins 255 - 8 l, ..., 248 - 8 l.
  constexpr int kPer = kBins / kWarpSize;
  const int first = kBins - 1 - lane() * kPer;
  int own = 0;
  for (int e = 0; e < kPer; ++e) own += count[first - e];
  int above = scan_lanes(own) - own, bin = first;
  const bool here = above < row->num_ties && row->num_ties <= above + own;
  for (int e = 0; here && above + count[bin] < row->num_ties && e < kPer; ++e)
    above += count[bin--];
  const int source = __ffs(__ballot_sync(kAllLanes, here)) - 1;
  row->prefix = row->prefix << 8 | static_cast<uint32_t>(__shfl_sync(kAllLanes, bin, source));
  row->num_ties -= __shfl_sync(kAllLanes, above, source);
  if (++row->stage < kSum) return;
  row->threshold = from_ordered(row->prefix);
  row->plain_end = 0;
}

// Lowers the threshold to `bound`, if keys of the rest reach it: they go over to the certain ones,
// and the rest is summed again.
__device__ __forceinline__ bool lower_threshold(float bound, float top, Row* row) {
  if (top < bound) return false;
  row->threshold = bound;
  row->plain_end = 0;
  return true;
}

// Keys whose inclusion probability reaches 1 are certain. So are those that come so close to it
// that rounding could draw them twice. Returns whether that changed the threshold.
__device__ bool settle_systematic(double total, float top, Row* row) {
  const float places = static_cast<float>(row->draws);
  const float margin = min_of(places * 0x1p-21f, 0.25f / places);
  const float cap = static_cast<float>(total / row->draws) * (1 - margin);
  return lower_threshold(row->reference + log2f(cap), top, row);
}

// The same for keys whose draws would repeat them, where that costs more than to let them run by
// themselves; else how many draws of the others are enough for a race, but for about one row and
// head in 10^4. `half_square` is half of the sum of their weights' squares.
__device__ bool settle_race(double total, float top, float half_square, int heavy, Row* row) {
  const float mass = static_cast<float>(total), want = static_cast<float>(row->places + 1),
              runners = static_cast<float>(heavy), room = 1.25f * want - runners;
  if (room > 0) {
    const float cap = mass / room;
    if (half_square > 0.1f * want * cap * cap &&
        lower_threshold(row->reference + log2f(cap), top, row))
      return true;
  }
  // By `unit` each key at the threshold has come once, in the mean, or enough others have; by time
  // units, so many distinct keys of both kinds at least.
  const float unit = max_of(exp2f(row->reference - row->threshold), max_of(room, 0.0f) / mass);
  const float most = static_cast<float>(most_draws(row->places));
  float time = 0.5f;
  for (; time < 256; time *= 1.04f) {
    const float draws = mass * unit * time, late = runners * expf(-time),
                repeats = min_of(half_square * unit * time * unit * time, 0.4f * draws);
    if (draws > most) break;
    if (runners - late + draws - repeats > want + 1 + 4 * sqrtf(late + repeats)) break;
  }
  row->draws = static_cast<int>(max_of(1.0f, min_of(most, ceilf(mass * unit * time))));
  return false;
}

// From the sums of a row's parts to what draws are made from; or to what must be known before, in
// another pass.
__device__ void settle(const Tile& tile, int r, Row* row) {
  const SketchSampleParams& p = tile.p;
  const int at = r * kParts + lane();
  const float top = max_lanes(tile.s.top[at]);
  if (top > -kInf && (top - row->reference < kLeastPlain || top - row->reference > kMostPlain)) {
    row->reference = top;
    return;
  }
  const double own = tile.s.sum[at], total = sum_lanes(own);
  const int above = tile.s.above[at], ties = tile.s.ties[at];
  const int above_before = scan_lanes(above) - above, ties_before = scan_lanes(ties) - ties;
  row->certain = __shfl_sync(kAllLanes, above_before + above, kWarpSize - 1) +
                 min_of(row->num_ties, __shfl_sync(kAllLanes, ties_before + ties, kWarpSize - 1));
  row->draws = 0;
  if (row->places > 0 && top > -kInf && p.method != SampleMethod::kTopK) {
    const int heavy = row->certain - (static_cast<int>(p.K) - row->places);
    row->draws = max_of(0, row->places - heavy);
    if (p.method == SampleMethod::kSystematic && row->draws > 0 &&
        settle_systematic(total, top, row))
      return;
    if (p.method == SampleMethod::kGumbel &&
        settle_race(total, top, 0.5f * sum_lanes(tile.s.square[at]), heavy, row))
      return;
  }
  SMARTBIRD_DEVICE_CHECK(row->certain <= tile.scratch().size.certain,
                         "smartbird: sketch_sample counted too many certain keys");
  tile.s.above[at] = above_before + min_of(ties_before, row->num_ties);
  tile.s.ties[at] = row->num_ties == INT32_MAX ? INT32_MAX : max_of(0, row->num_ties - ties_before);
  if (row->draws > 0) {
    const int last = max_lanes(own > 0 ? lane() : 0);  // beyond it no draw may fall
    const double before = (scan_lanes(own) - own) * (0x1p31 / total);
    tile.s.start[at] = lane() > last ? kWhole : static_cast<int32_t>(min_of(before, kWhole - 1.0));
    row->log_mass = log2f(static_cast<float>(total));
    row->draw_weight = static_cast<float>(total * 0x1p-31);
  }
  row->stage = kDraw;
}

// ---- lists of draws -----------------------------------------------------------------------------

// Places of row.draws independent draws of a head, ascending, from one spacing more: exponential
// variables, whose running sums over their total are the order statistics. Of a race, also when
// they come: the last at the end of the stretch, the others at any time within it. The total does
// not depend on the places; times the n-th root of a uniform number it is when arrival n comes.
__device__ void draw_places(const Tile& tile, int r, const Row& row, int local) {
  const int n = row.draws, blocks = n / 4 + 1;
  const int64_t head = tile.draw_head(row.head + local), position = tile.position(r);
  const uint32_t first =
      static_cast<uint32_t>(row.stretch) * (2 * static_cast<uint32_t>(blocks) + 1);
  const auto random = [&](int block) {
    return philox4x32(philox_counter(head, position, first + static_cast<uint32_t>(block)),
                      tile.s.block.sample_key);
  };
  const int begin = r * tile.scratch().size.draws + local * n;
  double spacing[4] = {};  // of this lane's block, the last one made
  int made = -1;
  const auto make = [&](int block) {
    if (made == block) return;
    made = block;
    const PhiloxBlock x = random(block);
#pragma unroll
    for (int w = 0; w < 4; ++w)
      spacing[w] = 4 * block + w <= n ? static_cast<double>(-logf(uniform(x.word[w]))) : 0;
  };
  double total = 0;
  for (int block = lane(); block < blocks; block += kWarpSize) {
    make(block);
    total += spacing[0] + spacing[1] + (spacing[2] + spacing[3]);
  }
  total = sum_lanes(total);
  const double scale = (kWhole - 1.0) / total;
  double before = 0;
  for (int from = 0; from < blocks; from += kWarpSize) {
    const int block = from + lane();
    make(block);
    const double own = spacing[0] + spacing[1] + (spacing[2] + spacing[3]), upto = scan_lanes(own);
    double sum = before + (upto - own);
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      sum += spacing[w];
      if (4 * block + w < n)
        tile.scratch().key[begin + 4 * block + w] =
            static_cast<int32_t>(static_cast<uint32_t>(min_of(sum * scale, kWhole - 1.0)) << 1);
    }
    before += __shfl_sync(kAllLanes, upto, kWarpSize - 1);
  }
  if (!row.is_race) return;
  const PhiloxBlock end = random(2 * blocks);
  const float span =
      static_cast<float>(total) * exp2f(log2f(uniform(end.word[0])) / static_cast<float>(n));
  const int last = static_cast<int>(uint64_t{end.word[1]} * static_cast<uint32_t>(n) >> 32);
  for (int block = lane(); 4 * block < n; block += kWarpSize) {
    const PhiloxBlock x = random(blocks + block);
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const int rank = 4 * block + w;
      const float share = rank == last ? 1.0f : uniform(x.word[w]);
      if (rank < n)
        tile.scratch().time[begin + rank] = log2f(row.elapsed + span * share) - row.log_mass;
    }
  }
}

// Sorts the n places in `unsorted` into place [n]; slot[m] = number of the m-th * slots. Into
// buckets first, then within each.
__device__ void sort_places(const int32_t* unsorted, int n, int slots, int* count, uint32_t* place,
                            int32_t* slot) {
  const uint32_t buckets = n <= kWarpSize ? kWarpSize : kBuckets;
  const auto bucket = [&](uint32_t x) { return static_cast<int>(uint64_t{x} * buckets >> 32); };
  for (uint32_t b = static_cast<uint32_t>(lane()); b < buckets; b += kWarpSize) count[b] = 0;
  __syncwarp();
  for (int m = lane(); m < n; m += kWarpSize)
    atomicAdd(count + bucket(static_cast<uint32_t>(unsorted[m])), 1);
  __syncwarp();
  int before = 0;
  for (uint32_t first = 0; first < buckets; first += kWarpSize) {
    int* own = count + first + lane();
    const int size = *own, upto = scan_lanes(size);
    *own = before + upto - size;
    before += __shfl_sync(kAllLanes, upto, kWarpSize - 1);
  }
  __syncwarp();
  for (int m = lane(); m < n; m += kWarpSize) {
    const uint32_t x = static_cast<uint32_t>(unsorted[m]);
    const int at = atomicAdd(count + bucket(x), 1);
    place[at] = x;
    slot[at] = m * slots;
  }
  __syncwarp();
  // Where a bucket began, the one before now ends.
  for (uint32_t b = static_cast<uint32_t>(lane()); b < buckets; b += kWarpSize) {
    const int begin = b == 0 ? 0 : count[b - 1];
    for (int m = begin + 1; m < count[b]; ++m) {
      const uint32_t x = place[m];
      const int32_t own = slot[m];
      int at = m;
      for (; at > begin && (place[at - 1] > x || (place[at - 1] == x && slot[at - 1] > own));
           --at) {
        place[at] = place[at - 1];
        slot[at] = slot[at - 1];
      }
      place[at] = x;
      slot[at] = own;
    }
  }
  __syncwarp();
}

// The draws of the next heads, as many as there is room for.
__device__ void list_draws(const Tile& tile, int r, Row* row) {
  const Scratch& scratch = tile.scratch();
  row->heads = tile.heads() - row->head;
  if (row->stretch > 0) row->heads = 1;
  if (row->draws == 0) return;
  row->heads = min_of(row->heads, scratch.size.draws / row->draws);
  row->per_head = 1.0f / static_cast<float>(row->heads);
  row->step = 0x1p31 / row->draws;
  int32_t* unsorted = scratch.key + r * scratch.size.draws;
  const bool is_systematic = tile.p.method == SampleMethod::kSystematic;
  if (is_systematic) {  // one uniform number for each
    for (int local = lane(); local < row->heads; local += kWarpSize)
      unsorted[local] = static_cast<int32_t>(
          philox4x32(philox_counter(tile.draw_head(row->head + local), tile.position(r), 0),
                     tile.s.block.sample_key)
              .word[0]);
  } else {
    for (int local = 0; local < row->heads; ++local) draw_places(tile, r, *row, local);
  }
  __syncwarp();
  sort_places(unsorted, is_systematic ? row->heads : row->heads * row->draws,
              is_systematic ? row->draws : 1, tile.s.buckets + warp() * kBuckets,
              scratch.place + r * scratch.size.listed, scratch.slot + r * scratch.size.listed);
}

// ---- results ------------------------------------------------------------------------------------

// Keys in ascending order, with their scores.
struct Found {
  int32_t* key;
  float* score;
  int size;

  __device__ __forceinline__ int below(int x) const {
    return lower_bound(size, x, [&](int m) { return key[m]; });
  }
};

// Calls f(rank, list, n) for each n-th key of each list, ranked among all. They have none in
// common.
template <int lists, typename F>
__device__ __forceinline__ void merge(const Found (&found)[lists], F&& f) {
#pragma unroll
  for (int l = 0; l < lists; ++l)
    for (int n = lane(); n < found[l].size; n += kWarpSize) {
      int rank = n;
#pragma unroll
      for (int other = 0; other < lists; ++other)
        if (other != l) rank += found[other].below(found[l].key[n]);
      f(rank, l, n);
    }
}

// Moves the keys n of a list for which keep(n) is true to its front, which all lanes ask together.
template <typename Keep>
__device__ __forceinline__ void compact(Found* found, float* time, Keep&& keep) {
  int kept = 0;
  for (int first = 0; first < found->size; first += kWarpSize) {
    const int n = first + lane();
    const bool kept_here = keep(n, n < found->size);
    const unsigned lanes = __ballot_sync(kAllLanes, kept_here);
    const int at = kept + __popc(lanes & ((1u << lane()) - 1));
    const int32_t key = kept_here ? found->key[n] : 0;
    const float score = kept_here ? found->score[n] : 0,
                own_time = kept_here && time != nullptr ? time[n] : 0;
    __syncwarp();
    if (kept_here) {
      found->key[at] = key;
      found->score[at] = score;
      if (time != nullptr) time[at] = own_time;
    }
    kept += __popc(lanes);
    __syncwarp();
  }
  found->size = kept;
}

// A head's results: the keys of all lists in ascending order, then -1, and log_inclusion(score),
// then -inf. Of forced keys, whose score is infinite, it is 0.
template <int lists, typename F>
__device__ __forceinline__ void write(const Tile& tile, int r, int head,
                                      const Found (&found)[lists], F&& log_inclusion) {
  const int64_t begin = tile.output(r, head);
  int32_t* indices = tile.p.indices + begin;
  float* log_inclusions = tile.p.log_inclusion == nullptr ? nullptr : tile.p.log_inclusion + begin;
  merge(found, [&](int rank, int list, int n) {
    indices[rank] = static_cast<int32_t>(tile.s.block.sequence.first_key) + found[list].key[n];
    if (log_inclusions == nullptr) return;
    const float score = found[list].score[n];
    log_inclusions[rank] = score == kInf ? 0.0f : log_inclusion(list, score);
  });
  int size = 0;
#pragma unroll
  for (int l = 0; l < lists; ++l) size += found[l].size;
  for (int64_t n = size + lane(); n < tile.p.K; n += kWarpSize) {
    indices[n] = -1;
    if (log_inclusions != nullptr) log_inclusions[n] = -kInf;
  }
}

// Decides the race of a head: true, and its results, if more than K keys came; else false, and
// those that came are past.
//
// Times are logarithms, base 2, relative to the row's reference: a key of weight w whose
// exponential is e comes at log2(e) - log2(w), which no weight is too small for.
__device__ bool write_race(const Tile& tile, int r, int local, Row* row) {
  const Scratch& scratch = tile.scratch();
  const int K = static_cast<int>(tile.p.K), head = row->head + local;
  const int own = warp() * scratch.size.found;
  int32_t* const key = scratch.found_key + own;
  float *const score = scratch.found_score + own, *const time = scratch.found_time + own;
  // Certain keys, those that came in earlier stretches, and those of this one.
  const int past_begin = row->certain, drawn_begin = row->certain + row->past,
            end = drawn_begin + row->draws;
  __syncwarp();
  for (int n = lane(); n < row->certain; n += kWarpSize) {
    const int from = r * scratch.size.certain + n;
    key[n] = scratch.certain_key[from];
    score[n] = scratch.certain_score[from];
    const PhiloxBlock x = philox4x32(
        philox_counter(tile.draw_head(head), tile.position(r), static_cast<uint32_t>(n / 4)),
        tile.s.block.arrival_key);
    const uint32_t bits = n % 4 == 0   ? x.word[0]
                          : n % 4 == 1 ? x.word[1]
                          : n % 4 == 2 ? x.word[2]
                                       : x.word[3];
    time[n] = score[n] == kInf ? -kInf : log2f(-logf(uniform(bits))) - (score[n] - row->reference);
  }
  for (int n = lane(); n < row->past; n += kWarpSize) {
    const int from = r * scratch.size.past + n;
    key[past_begin + n] = scratch.past_key[from];
    score[past_begin + n] = scratch.past_score[from];
    time[past_begin + n] = scratch.past_time[from];
  }
  __syncwarp();
  const int drawn = r * scratch.size.draws + local * row->draws;
  const int32_t* const drawn_key = scratch.key + drawn;
  const float* const drawn_time = scratch.time + drawn;
  const Found past{key + past_begin, score + past_begin, row->past};
  float horizon = row->draws == 0 ? kInf : -kInf;  // up to which the race is known
  for (int n = lane(); n < row->draws; n += kWarpSize) {
    const int32_t j = drawn_key[n];
    // A repeat never comes, and of one time the first counts.
    const int in_past = past.below(j);
    bool repeats = in_past < past.size && past.key[in_past] == j;
    for (int m = n - 1; m >= 0 && drawn_key[m] == j; --m)
      repeats = repeats || drawn_time[m] <= drawn_time[n];
    for (int m = n + 1; m < row->draws && drawn_key[m] == j; ++m)
      repeats = repeats || drawn_time[m] < drawn_time[n];
    key[drawn_begin + n] = j;
    score[drawn_begin + n] = scratch.score[drawn + n];
    time[drawn_begin + n] = repeats ? kInf : drawn_time[n];
    horizon = max_of(horizon, drawn_time[n]);
  }
  horizon = max_lanes(horizon);
  __syncwarp();
  const auto count = [&](uint32_t most) {
    int came = 0;
    for (int first = 0; first < end; first += kWarpSize) {
      const int n = first + lane();
      came += __popc(__ballot_sync(kAllLanes, n < end && ordered(time[n]) <= most));
    }
    return came;
  };
  uint32_t low = 0, high = ordered(horizon);
  int reached = count(high);
  Found found[3] = {
      {key, score, row->certain}, past, {key + drawn_begin, score + drawn_begin, row->draws}};
  if (reached <= K) {
    compact(&found[2], time + drawn_begin,
            [&](int n, bool is_key) { return is_key && time[drawn_begin + n] < kInf; });
    const Found light[2] = {found[1], found[2]};
    merge(light, [&](int rank, int list, int n) {
      const int to = r * scratch.size.past + rank;
      scratch.past_key[to] = light[list].key[n];
      scratch.past_score[to] = light[list].score[n];
      scratch.past_time[to] = time[(list == 0 ? past_begin : drawn_begin) + n];
    });
    row->past += found[2].size;
    row->elapsed = exp2f(horizon + row->log_mass);
    return false;
  }
  // When key K + 1 came: the least time by which so many had.
  while (high - low > 1 && reached != K + 1) {
    const uint32_t middle = low + (high - low) / 2;
    const int came = count(middle);
    if (came > K) {
      high = middle;
      reached = came;
    } else {
      low = middle;
    }
  }
  float kappa = -kInf;
  int before = 0;  // keys that came before it
  for (int n = lane(); n < end; n += kWarpSize)
    if (ordered(time[n]) <= high) kappa = max_of(kappa, time[n]);
  kappa = max_lanes(kappa);
  for (int first = 0; first < end; first += kWarpSize) {
    const int n = first + lane();
    before += __popc(__ballot_sync(kAllLanes, n < end && time[n] < kappa));
  }
  int ties = K - before;  // of the keys that came at that very time
  const int begins[3] = {0, past_begin, drawn_begin};
#pragma unroll
  for (int l = 0; l < 3; ++l)
    compact(&found[l], nullptr, [&](int n, bool is_key) {
      const float own_time = is_key ? time[begins[l] + n] : kInf;
      const unsigned tied = __ballot_sync(kAllLanes, is_key && own_time == kappa);
      const bool wins = __popc(tied & ((1u << lane()) - 1)) < ties;
      ties = max_of(0, ties - __popc(tied));
      return is_key && (own_time < kappa || (own_time == kappa && wins));
    });
  write(tile, r, head, found,
        [&](int, float x) { return log_one_minus_exp(exp2f(x - row->reference + kappa)); });
  return true;
}

// The results of a head of which all keys are known.
__device__ void write_head(const Tile& tile, int r, int local, const Row& row) {
  const SketchSampleParams& p = tile.p;
  const Scratch& scratch = tile.scratch();
  const int drawn = r * scratch.size.draws + local * row.draws, certain = r * scratch.size.certain;
  Found found[2] = {{scratch.certain_key + certain, scratch.certain_score + certain, row.certain},
                    {scratch.key + drawn, scratch.score + drawn, row.draws}};
  // Beyond what settle_systematic rules out: a slot is left unused, and no key is there twice.
  if (p.method == SampleMethod::kSystematic)
    compact(&found[1], nullptr, [&](int n, bool is_key) {
      return is_key && (n == 0 || found[1].key[n] != found[1].key[n - 1]);
    });
  const float log_draws = log2f(static_cast<float>(max_of(1, row.draws)));
  const bool is_distinct = p.method != SampleMethod::kMultinomial;
  write(tile, r, row.head + local, found, [&](int list, float score) {
    if (list == 0) return 0.0f;
    const float expected =
        static_cast<float>(kLn2) * ((score - row.reference) + (log_draws - row.log_mass));
    return is_distinct ? min_of(expected, 0.0f) : expected;
  });
}

// What a row does next, after a pass that it took part in.
__device__ void go_on(const Tile& tile, int r, Row* row) {
  if (row->stage < kSum) {
    select_digit(tile.s.bins + r * kBins, row);
    return;
  }
  if (row->stage == kSum) {
    settle(tile, r, row);
    if (row->stage == kSum) return;
  } else {
    row->is_listed = true;
    bool is_decided = true;
    for (int local = 0; local < row->heads && is_decided; ++local) {
      if (row->is_race)
        is_decided = write_race(tile, r, local, row);
      else
        write_head(tile, r, local, *row);
      if (!is_decided) {
        row->heads = local;
        ++row->stretch;
      } else {
        row->stretch = row->past = 0;
        row->elapsed = 0;
      }
    }
    row->head += row->heads;
    if (row->head == tile.heads()) {
      row->stage = kDone;
      return;
    }
  }
  list_draws(tile, r, row);
}

__global__ void __launch_bounds__(kThreads, 2) sketch_sample_kernel(const SampleLaunch launched) {
  const SketchSampleParams& p = launched.problem;
  const Visible& v = p.visible;
  Shared& s = *shared_memory<Shared>();
  const Tile tile{launched, p, s};
  // The last rows of all batch elements first: of causal ones they see the most keys.
  for (int n = static_cast<int>(blockIdx.x); n < launched.tiles;
       n = s.block.tile + static_cast<int>(gridDim.x)) {
    const int H_s = static_cast<int>(p.H_s), sketch = n % H_s, batch = n / H_s % launched.batches,
              number = launched.row_blocks - 1 - n / H_s / launched.batches;
    const SegmentBlock at =
        segment_block(v.queries, kRows, int64_t{batch} * launched.row_blocks + number);
    const int rows = static_cast<int>(at.end - at.begin);
    const Sequence sequence = sequence_at(v, at.segment);
    __syncthreads();  // the rows before are done
    const int64_t element_bytes = p.dtype == DType::kFloat32 ? 4 : 2;
    if (thread() == 0) {
      Block& block = s.block;
      block.tile = n;
      block.scratch.lay_out(p, static_cast<char*>(p.scratch), blockIdx.x);
      block.sequence = sequence;
      block.sketch = sketch;
      block.first_query = at.begin;
      block.first_key =
          static_cast<const char*>(p.k_sketch) +
          (sequence.batch * p.k_stride[0] + sketch / (p.H_s / p.H_ks) * p.k_stride[1] +
           sequence.first_key * p.k_stride[2]) *
              element_bytes;
      block.last_key = static_cast<int>(sequence.num_keys) - 1;
      block.key_mask = mask_of(v, sequence, v.key_mask);
      block.global_mask = mask_of(v, sequence, v.global_mask);
      block.sample_key = sequence_key(read_philox_key(p.device_seed, kSampleStream), sequence);
      block.arrival_key = sequence_key(read_philox_key(p.device_seed, kArrivalStream), sequence);
    }
    stage_queries(p,
                  static_cast<const char*>(p.q_sketch) +
                      (sequence.batch * p.q_stride[0] + sketch * p.q_stride[1] +
                       (sequence.first_query + at.begin) * p.q_stride[2]) *
                          element_bytes,
                  rows, staged_queries(s));
    __syncthreads();
    for (int r = warp(); r < kRows; r += kWarps) {
      Row row{};
      row.stage = kDone;
      if (r < rows) row = plan_row(tile, r);
      if (lane() == 0) s.row[r] = row;
    }
    __syncthreads();
    for (;;) {
      const Pass next = next_pass(s.row);
      if (next.stage == kDone) break;
      if (thread() == 0) s.block.pass = next;
      for (int b = thread(); next.stage < kSum && b < kRows * kBins; b += kThreads) s.bins[b] = 0;
      __syncthreads();
      stream(tile);
      __syncthreads();
      for (int r = warp(); r < kRows; r += kWarps) {
        Row row = s.row[r];
        if (row.stage != s.block.pass.stage || row.part_keys != s.block.pass.part_keys) continue;
        go_on(tile, r, &row);
        __syncwarp();
        if (lane() == 0) s.row[r] = row;
      }
      __syncthreads();
    }
  }
}

// Blocks of threads that share the rows: two to a multiprocessor, which is what registers allow.
int64_t num_blocks(const SketchSampleParams& p) {
  int device = 0, multiprocessors = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  return min_of<int64_t>(p.visible.queries.num_blocks(kRows) * p.H_s, 2 * multiprocessors);
}

}  // namespace

int64_t sketch_sample_scratch_bytes(const SketchSampleParams& params) {
  return num_blocks(params) * Scratch().lay_out(params, nullptr, 0);
}

void run_sketch_sample(const SketchSampleParams& params, cudaStream_t stream) {
  const size_t bytes = shared_bytes(params);
  if (bytes > kMaxSharedBytes)
    throw std::runtime_error("smartbird: sketch_sample on CUDA keeps its rows on chip, and S = " +
                             std::to_string(params.S) + " is beyond it");
  if (params.K > INT32_MAX / (8 * kRows))
    throw std::runtime_error("smartbird: num_samples is too large for sketch_sample on CUDA");
  if (params.dtype == DType::kFloat64)
    throw std::runtime_error("sketch_sample on CUDA takes float64 as float32");
  const int64_t element_bytes = params.dtype == DType::kFloat32 ? 4 : 2,
                key_bytes = params.k_stride[2] * element_bytes,
                row_blocks = params.visible.queries.blocks_per_batch(kRows);
  if (row_blocks == 0) return;
  if (key_bytes > UINT32_MAX)
    throw std::runtime_error("smartbird: keys of k_sketch lie more than 2^32 bytes apart");
  const int64_t blocks = params.visible.queries.num_blocks(kRows);
  if (blocks * params.H_s > INT32_MAX / 2)
    throw std::runtime_error("smartbird: too many queries for one launch of sketch_sample");
  SampleLaunch launched{params, static_cast<int>(blocks * params.H_s), static_cast<int>(row_blocks),
                        static_cast<int>(blocks / row_blocks)};
  launched.score_factor =
      params.dtype == DType::kFloat32 ? 1.0f : static_cast<float>(score_factor(params));
  launched.is_wide =
      features_are_vectors(params.k_sketch, params.k_stride, params.S, element_bytes, 8);
  launched.key_bytes = static_cast<uint32_t>(key_bytes);
  launch("sketch_sample", sketch_sample_kernel, num_blocks(params), kThreads, bytes, stream,
         launched);
}

}  // namespace smartbird::cuda
