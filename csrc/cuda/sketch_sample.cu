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
constexpr int kBins = 256;                 // of the radix select
constexpr int kBuckets = 256;              // of the sort of draws
constexpr int kMostAtOnce = 1024;          // draws of a row in one pass, unless one head has more
constexpr uint32_t kTakenBack = 1u << 31;  // a race: the first of the random numbers for that

// Draws are integers in [0, kWhole), as are the running sums over parts, scaled to kWhole + 1.
constexpr int32_t kWhole = INT32_MAX;
// While a row's largest score is within these (base 2), weights are 2^score; else they are relative
// to the largest. Below the upper one the sum of squares stays in range, too. The row alone
// decides.
constexpr float kLeastPlain = -40, kMostPlain = 50;

// Registers are few.
__device__ __forceinline__ int thread() { return static_cast<int>(fresh_thread_id()); }
__device__ __forceinline__ int lane() { return static_cast<int>(fresh_thread_id() % kWarpSize); }
__device__ __forceinline__ int warp() { return static_cast<int>(fresh_thread_id() / kWarpSize); }

// What a row does in the next pass over its keys.
enum Stage : int {
  kSelect = 0,  // topk: counts scores by a digit, in four passes
  kCount = 4,   // counts scores by how far below the largest they are
  kSum = 5,     // sums weights, and counts the certain keys
  kDraw = 6,    // lists the certain keys, and finds the draws' keys
  kDone = 7,
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
  int places;       // left by the forced keys; 0 where nothing is drawn
  bool is_race;     // gumbel, and some are
  bool is_listed;   // the certain keys have been written
  bool is_counted;  // the last step towards the threshold was kCount
  int stage;
  int part_keys;  // a multiple of kChunk

  // Keys above it, and of those equal to it the first num_ties, are certain.
  float threshold;
  int num_ties;
  uint32_t prefix;  // of topk: the digits of the threshold found so far
  int certain;      // keys

  float log_mass;     // base 2, of the sum of weights
  float draw_weight;  // that sum / 2^31
  int draws;          // of each head in a pass
  int head, heads;    // of the pass, among those of the sketch
  float per_head;     // 1 / heads
  double step;        // of systematic draws, on the grid of kWhole
  // A race that goes on.
  int stretch, past;  // passes, and drawn keys, before this one
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
  int spans;    // of a race: heads in a pass
  int past;     // of a race that goes on: keys
  int came;     // by warp: certain keys that a race decides about
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
  n.certain = n.came = 2 * K + 2;  // see plan_row and room
  n.spans = heads;
  n.past = K;
  return n;
}

struct Scratch {
  Sizes size;
  uint32_t* place;  // [kRows, listed] ascending: where draws fall, on a grid of 2^32
  int32_t* slot;    // [kRows, listed] where what they find goes
  int32_t* key;     // [kRows, draws] by head and rank: places before they are sorted, then keys
  float* score;     // of the key, base 2
  float* span;      // [kRows, spans] time from a head's first draw to its last, as Row::elapsed
  int32_t* certain_key;  // [kRows, certain]
  float* certain_score;  // infinite where the key is forced
  int32_t* past_key;     // [kRows, past]
  float* past_score;
  int32_t* came_key;  // [kWarps, came]
  float *came_score, *came_time;

  __host__ __device__ int64_t lay_out(const SketchSampleParams& p, char* base, int64_t block) {
    size = sizes_of(p);
    int64_t used = 0;
    const auto take = [&](auto** pointer, int64_t count) {
      using X = std::remove_reference_t<decltype(**pointer)>;
      static_assert(sizeof(X) == 4);
      if (base != nullptr) *pointer = reinterpret_cast<X*>(base) + used;
      used += count;
    };
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
      take(&span, kRows * size.spans);
      take(&certain_key, kRows * size.certain);
      take(&certain_score, kRows * size.certain);
      take(&past_key, kRows * size.past);
      take(&past_score, kRows * size.past);
      take(&came_key, kWarps * size.came);
      take(&came_score, kWarps * size.came);
      take(&came_time, kWarps * size.came);
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
    // Of scores, see bin_of: those of a row lie where nothing but its own is, as others may wait
    // for their draws.
    int bins[kBins / kParts][kRows * kParts];
  };
  Block block;

  __device__ __forceinline__ int* bin(int r, int b) {
    return bins[b / kParts] + r * kParts + b % kParts;
  }
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

// Where a score is counted, or -1. For topk, by the next digit of those that begin with the digits
// known. Else by how far below the largest it is, base 2: bins are 1/64 wide at first, and twice as
// wide wherever the distance + 1/4 has doubled.
constexpr int kDepthShift = 19;
__device__ __forceinline__ float depth_of_bin(int b) {
  return 0.25f * (__int_as_float((b << kDepthShift) + 0x3F800000) - 1);
}
__device__ __forceinline__ int bin_of(const Row& row, int stage, float score) {
  const float depth = __fmaf_rn(row.reference - score, 4.0f, 1.0f);
  const uint32_t x = stage != kCount
                         ? ordered(score) >> (24 - 8 * stage)
                         : min_of((__float_as_int(depth) - 0x3F800000) >> kDepthShift, kBins - 1);
  return score > -kInf && x / kBins == row.prefix ? static_cast<int>(x % kBins) : -1;
}

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
#pragma unroll 1
  for (int step = 0; step < pass.part_keys && first_part * pass.part_keys + step < pass.limit;
       step += kChunk) {
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
#pragma unroll
        for (int k = 0; k < kChunk; ++k) {
          const int b = bin_of(row, pass.stage, score[i][k]);
          if (b >= 0) atomicAdd(s.bin(r, b), 1);
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
__device__ void select_digit(const Tile& tile, int r, Row* row) {
  if (row->stage == kSelect) row->num_ties = row->places;  // of the keys that begin with `prefix`
  // Lane l has the bins 255 - 8 l, ..., 248 - 8 l.
  constexpr int kPer = kBins / kWarpSize;
  const int first = kBins - 1 - lane() * kPer;
  int own = 0;
  for (int e = 0; e < kPer; ++e) own += *tile.s.bin(r, first - e);
  int above = scan_lanes(own) - own, bin = first;
  const bool here = above < row->num_ties && row->num_ties <= above + own;
  for (int e = 0; here && above + *tile.s.bin(r, bin) < row->num_ties && e < kPer; ++e)
    above += *tile.s.bin(r, bin--);
  const int source = __ffs(__ballot_sync(kAllLanes, here)) - 1;
  row->prefix = row->prefix << 8 | static_cast<uint32_t>(__shfl_sync(kAllLanes, bin, source));
  row->num_ties -= __shfl_sync(kAllLanes, above, source);
  if (++row->stage < kCount) return;
  row->stage = kSum;
  row->threshold = from_ordered(row->prefix);
  row->plain_end = 0;
}

// The places for which keys that are not certain yet run. Of `systematic` those that the certain
// ones leave; of a race a few more than are left until K + 1 keys have come.
__device__ __forceinline__ float room(const Tile& tile, const Row& row) {
  const float certain = static_cast<float>(row.certain - (static_cast<int>(tile.p.K) - row.places)),
              places = static_cast<float>(row.places);
  return (row.is_race ? 1.25f * (places + 1) : places) - certain;
}

// Lowers the threshold to the border of two bins, so that the keys above it get a place each and
// the others, by their weights, the rest: from the numbers of keys in the bins, as if each weighed
// what the heaviest of its bin may. What is left to do is for exact sums.
__device__ void lower_by_count(const Tile& tile, int r, Row* row) {
  const float places = room(tile, *row);
  // Lane l has the bins 8 l, ..., 8 l + 7.
  constexpr int kPer = kBins / kWarpSize;
  const int first = lane() * kPer;
  const auto shrink = [](int from, int to) { return exp2f(depth_of_bin(from) - depth_of_bin(to)); };
  // Of the bins from one on: their weights, beside that of its heaviest key.
  float rest = 0;
  int own = 0;
  for (int b = first + kPer - 1; b >= first; --b) {
    const int count = *tile.s.bin(r, b);
    rest = static_cast<float>(count) + rest * shrink(b, b + 1);
    own += count;
  }
  for (int lanes = 1; lanes < kWarpSize; lanes *= 2) {
    const float behind = __shfl_sync(kAllLanes, rest, min_of(lane() + lanes, kWarpSize - 1));
    if (lane() + lanes < kWarpSize) rest += behind * shrink(first, first + lanes * kPer);
  }
  const int above = scan_lanes(own) - own;
  // The last bin for which there is room.
  float behind = __shfl_sync(kAllLanes, rest, min_of(lane() + 1, kWarpSize - 1));
  if (lane() == kWarpSize - 1) behind = 0;
  int last = 0, upto = above + own;
  for (int b = first + kPer - 1; b >= first; --b) {
    const int count = *tile.s.bin(r, b);
    upto -= count;
    behind = static_cast<float>(count) + behind * shrink(b, b + 1);
    if (last == 0 && static_cast<float>(upto) + behind <= places) last = b;
  }
  last = max_lanes(last);
  // No key of bin `last` reaches it.
  row->threshold = from_ordered(ordered(row->reference - depth_of_bin(last)) + 1);
  row->plain_end = 0;
  int heaviest = kBins;  // of the bins left that hold a key
  for (int b = first + kPer - 1; b >= max_of(first, last); --b)
    if (*tile.s.bin(r, b) > 0) heaviest = b;
  heaviest = reduce_lanes(heaviest, [](int a, int b) { return min_of(a, b); });
  if (heaviest < kBins) row->reference -= depth_of_bin(heaviest);
  row->stage = kSum;
}

// How many draws are enough for a race of `want` keys, but for about one row and head in 10^4:
// `certain` keys run beside those of a mass of `mass`, the sum of whose weights' squares is twice
// half_square. By `unit`, a time, each key at the threshold has come once in the mean, or enough
// others have; by `time` units, so many distinct keys of both kinds at least.
__device__ int plan_race(float want, float certain, float mass, float half_square, float unit,
                         float most) {
  for (float begin = 0.5f;; begin *= 4) {
    const float time = begin * exp2f(static_cast<float>(lane()) / (kWarpSize / 2)),
                draws = mass * unit * time, late = certain * expf(-time),
                repeats = min_of(half_square * unit * time * unit * time, 0.4f * draws);
    const bool enough = draws > most || begin > 100 ||
                        certain - late + draws - repeats > want + 1 + 4 * sqrtf(late + repeats);
    const unsigned lanes = __ballot_sync(kAllLanes, enough);
    if (lanes == 0) continue;
    const float planned = __shfl_sync(kAllLanes, draws, __ffs(lanes) - 1);
    return static_cast<int>(max_of(1.0f, min_of(most, ceilf(planned))));
  }
}

// From the sums of a row's parts to what draws are made from; or to what must be known before, in
// another pass.
__device__ void settle(const Tile& tile, int r, Row* row) {
  const SketchSampleParams& p = tile.p;
  const int at = r * kParts + lane();
  const double own = tile.s.sum[at], total = sum_lanes(own);
  const int above = tile.s.above[at], ties = tile.s.ties[at];
  const int above_before = scan_lanes(above) - above, ties_before = scan_lanes(ties) - ties;
  row->certain = __shfl_sync(kAllLanes, above_before + above, kWarpSize - 1) +
                 min_of(row->num_ties, __shfl_sync(kAllLanes, ties_before + ties, kWarpSize - 1));
  row->draws = 0;
  const float top = max_lanes(tile.s.top[at]);
  if (row->places > 0 && p.method != SampleMethod::kTopK && top > -kInf) {
    if (top - row->reference < kLeastPlain || top - row->reference > kMostPlain) {
      row->reference = top;
      return;
    }
    row->draws = row->places;
    if (p.method != SampleMethod::kMultinomial) {
      // Keys whose share of the room is a whole place are certain. So are those that come so close
      // to it that rounding could draw them twice. A race takes them for such where draws would
      // repeat them so often that it costs more than to let them run by themselves.
      const float room_left = room(tile, *row), places = static_cast<float>(row->places);
      const float margin = min_of(places * 0x1p-21f, 0.25f / places);
      const float mass = static_cast<float>(total), cap = mass / room_left * (1 - margin),
                  half_square = row->is_race ? 0.5f * sum_lanes(tile.s.square[at]) : 0.0f;
      const float bound = row->reference + log2f(cap);
      if (room_left > 0 && top >= bound &&
          (!row->is_race || half_square > 0.1f * (places + 1) * cap * cap)) {
        row->is_counted = !row->is_counted;
        if (row->is_counted) {
          row->reference = top;
          row->stage = kCount;
        } else {
          row->threshold = bound;
          row->plain_end = 0;
        }
        return;
      }
      const int certain = row->certain - (static_cast<int>(p.K) - row->places);
      if (row->is_race)
        row->draws = plan_race(
            places + 1, static_cast<float>(certain), mass, half_square,
            max_of(exp2f(row->reference - row->threshold), max_of(room_left, 0.0f) / mass),
            static_cast<float>(most_draws(row->places)));
      else
        row->draws -= certain;
    }
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
// variables, whose running sums over their total are the order statistics. Of a race the draws are
// arrivals: the total, which does not depend on the places, is when one more comes, and times the
// n-th root of a uniform number when the last of them does.
__device__ void draw_places(const Tile& tile, int r, const Row& row, int local) {
  const int n = row.draws, blocks = n / 4 + 1;
  const int64_t head = tile.draw_head(row.head + local), position = tile.position(r);
  const uint32_t first = static_cast<uint32_t>(row.stretch) * static_cast<uint32_t>(blocks + 1);
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
  if (!row.is_race || lane() > 0) return;
  tile.scratch().span[r * tile.scratch().size.spans + local] =
      static_cast<float>(total) *
      exp2f(log2f(uniform(random(blocks).word[0])) / static_cast<float>(n));
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
  __syncwarp();  // what the heads before have drawn is written
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
  __device__ __forceinline__ bool holds(int x) const {
    const int at = below(x);
    return at < size && key[at] == x;
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

// Copies the keys n of a list for which keep(n, true) is true, which all lanes ask together, with
// false where n is beyond it. `to` may be where the list lies.
template <typename Keep>
__device__ __forceinline__ Found compact(const Found& from, int32_t* key, float* score,
                                         Keep&& keep) {
  Found to{key, score, 0};
  for (int first = 0; first < from.size; first += kWarpSize) {
    const int n = first + lane();
    const bool kept = keep(n, n < from.size);
    const unsigned lanes = __ballot_sync(kAllLanes, kept);
    const int at = to.size + __popc(lanes & ((1u << lane()) - 1));
    const int32_t own_key = kept ? from.key[n] : 0;
    const float own_score = kept ? from.score[n] : 0;
    __syncwarp();
    if (kept) {
      key[at] = own_key;
      score[at] = own_score;
    }
    to.size += __popc(lanes);
    __syncwarp();
  }
  return to;
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
// exponential is e comes at log2(e) - log2(w), which no weight is too small for. Draws have none:
// given how many they are and when the last came, they came at independent uniform times. So they
// are taken back one by one from the last, until K keys are left: the last of m is any of them, and
// what is left of its time, times the (m - 1)-th root of a uniform number, is when the last of the
// others came. The time of the key that goes last is kappa.
__device__ bool write_race(const Tile& tile, int r, int local, Row* row) {
  const Scratch& scratch = tile.scratch();
  const Sizes& size = scratch.size;
  const int K = static_cast<int>(tile.p.K);
  const int64_t head = tile.draw_head(row->head + local), position = tile.position(r);
  const Found certain{scratch.certain_key + r * size.certain,
                      scratch.certain_score + r * size.certain, row->certain};
  const Found past{scratch.past_key + r * size.past, scratch.past_score + r * size.past, row->past};
  const int begin = r * size.draws + local * row->draws;
  Found drawn{scratch.key + begin, scratch.score + begin, row->draws};
  int32_t* const came_key = scratch.came_key + warp() * size.came;
  float* const came_score = scratch.came_score + warp() * size.came;
  float* const time = scratch.came_time + warp() * size.came;  // of the certain keys
  __syncwarp();
  for (int n = lane(); n < certain.size; n += kWarpSize) {
    const PhiloxBlock x = philox4x32(philox_counter(head, position, static_cast<uint32_t>(n / 4)),
                                     tile.s.block.arrival_key);
    const uint32_t bits = n % 4 == 0   ? x.word[0]
                          : n % 4 == 1 ? x.word[1]
                          : n % 4 == 2 ? x.word[2]
                                       : x.word[3];
    const float score = certain.score[n];
    time[n] = score == kInf ? -kInf : log2f(-logf(uniform(bits))) - (score - row->reference);
  }
  __syncwarp();
  const auto came_by = [&](float t) {  // of the certain keys
    int came = 0;
    for (int first = 0; first < certain.size; first += kWarpSize) {
      const int n = first + lane();
      came += __popc(__ballot_sync(kAllLanes, n < certain.size && time[n] <= t));
    }
    return came;
  };
  // A draw taken back has the complement of its key.
  const auto key_of = [](int32_t x) { return x < 0 ? ~x : x; };
  // Whether a draw that is not taken back is the first of its key.
  const auto is_new = [&](int n) {
    const int32_t j = drawn.key[n];
    if (j < 0 || past.holds(j)) return false;
    for (int m = n - 1; m >= 0 && key_of(drawn.key[m]) == j; --m)
      if (drawn.key[m] == j) return false;
    return true;
  };

  // When the last of the draws came that are left.
  const float span = row->draws > 0 ? scratch.span[r * size.spans + local] : 0.0f;
  float log_share = 0;
  const auto last_time = [&](int left) {
    return log2f(row->elapsed + (left > 0 ? span * exp2f(log_share) : 0.0f)) - row->log_mass;
  };
  int left = row->draws, light = past.size;  // draws, and keys among all draws
  for (int first = 0; first < left; first += kWarpSize) {
    const int n = first + lane();
    light += __popc(__ballot_sync(kAllLanes, n < left && is_new(n)));
  }
  if (light + came_by(left > 0 ? last_time(left) : kInf) <= K) {
    drawn = compact(drawn, drawn.key, drawn.score,
                    [&](int n, bool is_draw) { return is_draw && is_new(n); });
    const Found before =
        compact(past, came_key, came_score, [](int, bool is_key) { return is_key; });
    const Found all[2] = {before, drawn};
    merge(all, [&](int rank, int list, int n) {
      past.key[rank] = all[list].key[n];
      past.score[rank] = all[list].score[n];
    });
    row->past = light;
    row->elapsed += span;
    return false;
  }

  float kappa;
  int certain_left;  // of the certain keys
  int choice = 0;
  float log_uniform = 0;
  for (uint32_t tries = 0;;) {
    kappa = last_time(left);
    certain_left = came_by(kappa);
    if (light + certain_left <= K) {  // but one more of the certain keys comes next
      certain_left = K - light;
      uint32_t low = ordered(-kInf),
               high = ordered(kInf);  // few have come by `low`, more by `high`
      while (high - low > 1) {
        const uint32_t middle = low + (high - low) / 2;
        (came_by(from_ordered(middle)) > certain_left ? high : low) = middle;
      }
      kappa = from_ordered(high);
      break;
    }
    // 32 choices at a time, of which one that is gone already does not count.
    int n;
    do {
      if (tries % kWarpSize == 0) {
        const PhiloxBlock x = philox4x32(
            philox_counter(head, position, kTakenBack + tries + static_cast<uint32_t>(lane())),
            tile.s.block.sample_key);
        choice = static_cast<int>(uint64_t{x.word[0]} * static_cast<uint32_t>(row->draws) >> 32);
        log_uniform = log2f(uniform(x.word[1]));
      }
      n = __shfl_sync(kAllLanes, choice, static_cast<int>(tries++ % kWarpSize));
    } while (drawn.key[n] < 0);
    const int32_t j = drawn.key[n];
    bool is_last = !past.holds(j);  // of its key
    for (int m = n - 1; m >= 0 && key_of(drawn.key[m]) == j; --m) is_last &= drawn.key[m] != j;
    for (int m = n + 1; m < row->draws && key_of(drawn.key[m]) == j; ++m)
      is_last &= drawn.key[m] != j;
    __syncwarp();
    if (lane() == 0) drawn.key[n] = ~j;
    __syncwarp();
    --left;
    light -= is_last;
    if (light + certain_left == K) break;
    log_share += __shfl_sync(kAllLanes, log_uniform, static_cast<int>((tries - 1) % kWarpSize)) /
                 static_cast<float>(max_of(left, 1));
  }
  drawn = compact(drawn, drawn.key, drawn.score,
                  [&](int n, bool is_draw) { return is_draw && is_new(n); });
  // Keys that come at one time do so in their order.
  int before = 0;
  for (int first = 0; first < certain.size; first += kWarpSize) {
    const int n = first + lane();
    before += __popc(__ballot_sync(kAllLanes, n < certain.size && time[n] < kappa));
  }
  int ties = certain_left - before;
  const Found came = compact(certain, came_key, came_score, [&](int n, bool is_key) {
    const unsigned tied = __ballot_sync(kAllLanes, is_key && time[n] == kappa);
    const bool wins = __popc(tied & ((1u << lane()) - 1)) < ties;
    ties -= __popc(tied);
    return is_key && (time[n] < kappa || (time[n] == kappa && wins));
  });
  const Found all[3] = {came, past, drawn};
  write(tile, r, row->head + local, all,
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
  // Beyond what settle rules out: a slot is left unused, and no key is there twice.
  if (p.method == SampleMethod::kSystematic)
    found[1] = compact(found[1], found[1].key, found[1].score, [&](int n, bool is_key) {
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
  if (row->stage < kCount) {
    select_digit(tile, r, row);
    return;
  }
  if (row->stage == kCount) {
    lower_by_count(tile, r, row);
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
      for (int b = thread(); next.stage < kSum && b < kRows * kBins; b += kThreads) {
        const Row& row = s.row[b / kBins];
        if (row.stage == next.stage && row.part_keys == next.part_keys)
          *s.bin(b / kBins, b % kBins) = 0;
      }
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
