// q_sketch [B, H_s, N, S], k_sketch [B, H_ks, M, S] -> indices, log_inclusion [B, H_i, N, K]: every
// index head draws its own keys of a row from softmax(q_sketch k_sketch^T scale) of its sketch.
//
// A block owns 16 rows of a sequence, by one sketch. First all its warps stream the keys once, on
// tensor cores, and keep of each row and block of keys only the largest score and the sum of
// weights relative to it. Then a warp takes one (row, head) at a time: a draw is found among the
// running sums of the blocks, and the one block it falls in is scored again. What a row needs on
// chip is a few hundred sums, whatever M is; nothing of size [N, M] exists. The methods are those
// of the CPU kernel; `systematic` and `topk` choose the same keys by a seed, `gumbel` and
// `multinomial` spend its numbers in another way.
//
// A row's draws are the same to the last bit whatever stands beside it: keys are counted from the
// first of their sequence, how many make a block depends on the row alone (RowPlan::limit), and so
// does every sum.
#include "launch.h"
#include "score_tile.cuh"

namespace smartbird::cuda {
namespace {

constexpr int kRows = kTileRows;
constexpr int kMaxWarps = 8;
constexpr int kMaxBlocks = 256;  // of keys; they grow with M
constexpr int kBins = 256;       // of the radix select

// Draws are integers in [0, kWhole), as are the running sums of blocks, scaled to kWhole + 1.
constexpr int32_t kWhole = INT32_MAX;
// Share of a row's mass beyond which "total minus chosen" has lost its digits.
constexpr double kCancellation = 0.999;
// What it costs to leave the drawn keys out, in keys scored again per draw saved.
constexpr double kKeysPerDraw = 24;
// Draws for each place before the drawn keys are left out in any case.
constexpr int64_t kMostDraws = 64;
// Share of a weight that is left, but for very large scores, where it was scored once by mma and
// once by FMA.
constexpr float kRescored = 1 - 0x1p-18f;

// Tiles that make a block of keys of a row with this limit.
__host__ __device__ __forceinline__ int tiles_per_block(int limit) {
  return static_cast<int>(max_of<int64_t>(1, ceil_div(ceil_div(limit, kTileCols), kMaxBlocks)));
}
__host__ __device__ __forceinline__ int num_words(int64_t limit) {
  return static_cast<int>(ceil_div(limit, 32));
}
// Entries of a sorted list of K keys: a power of two.
__host__ __device__ __forceinline__ int64_t list_entries(int64_t K) {
  int64_t n = 1;
  while (n < K) n *= 2;
  return n;
}

// What is certain about a row. Of the keys [0, limit), counted from the first of its sequence,
// those that key_mask allows are valid; the last is, where there is a mask. Valid keys below
// sink_end, in the window or, below global_end, in global_mask are forced.
struct RowPlan {
  int limit, sink_end, window_begin, window_end, global_end;
  int places;              // left by the forced keys
  bool take_all;           // no more valid keys than K
  int block_keys, blocks;  // the keys of a block and how many blocks reach up to the limit
};

// What the rows of a block of threads need at most.
struct Extent {
  int blocks, words;

  // For any limit up to `limit`.
  __host__ __device__ static Extent up_to(int64_t limit) {
    return {static_cast<int>(min_of<int64_t>(kMaxBlocks, ceil_div(limit, kTileCols))),
            num_words(limit)};
  }
};

// Shared memory: [kRows] of everything by row, then [warps] of everything by warp.
struct Shared {
  RowPlan* plan;    // [kRows]
  float* query;     // [kRows, S] times the factor of scores
  float* row_max;   // [kRows, blocks] largest score of a block's drawable keys
  float* row_sum;   // [kRows, blocks] sum of 2^(score - max) over them
  float* rest_max;  // [blocks] the same without the keys taken so far, of one warp
  float* rest_sum;
  int32_t* start;      // [max(blocks + 1, kBins)] running sum before each block; or a histogram
  uint32_t* taken;     // [words] keys of the (row, head) at hand
  uint32_t* excluded;  // [words] keys that cannot be drawn any more
  int32_t* list;       // [list_entries] multinomial only

  // Lays everything out from `base`, if that is not null; returns the number of bytes. Where plan
  // and query lie depends on no extent.
  __host__ __device__ size_t lay_out(const SketchSampleParams& p, const Extent& extent, char* base,
                                     int warp, int warps) {
    const size_t blocks = static_cast<size_t>(extent.blocks), words = extent.words;
    const size_t entries =
        p.method == SampleMethod::kMultinomial ? static_cast<size_t>(list_entries(p.K)) : 0;
    size_t used = 0;
    const auto take = [&](auto** pointer, size_t count, bool per_warp) {
      using X = std::remove_reference_t<decltype(**pointer)>;
      if (base != nullptr)
        *pointer = reinterpret_cast<X*>(base + used) + (per_warp ? warp * count : 0);
      used += (count * sizeof(X) * (per_warp ? warps : 1) + 15) / 16 * 16;
    };
    take(&plan, kRows, false);
    take(&query, kRows * static_cast<size_t>(p.S), false);
    take(&row_max, kRows * blocks, false);
    take(&row_sum, kRows * blocks, false);
    take(&rest_max, blocks, true);
    take(&rest_sum, blocks, true);
    take(&start, max_of<size_t>(blocks + 1, kBins), true);
    take(&taken, words, true);
    take(&excluded, words, true);
    take(&list, entries, true);
    return used;
  }
};

__device__ __forceinline__ bool test_bit(const uint32_t* bits, int j) {
  return (bits[j / 32] >> (j % 32) & 1) != 0;
}
// Sets bit j; true where it was clear. Of lanes that set the same bit at once, any one gets true.
__device__ __forceinline__ bool insert_bit(uint32_t* bits, int j) {
  const uint32_t bit = 1u << (j % 32);
  return (atomicOr(bits + j / 32, bit) & bit) == 0;
}

// Sets bit `key` of each lane that has one (not -1); true where it was clear, and of lanes with the
// same key in the first, so that sums over the new keys are always taken in the same order.
__device__ __forceinline__ bool insert_keys(uint32_t* bits, int key) {
  const unsigned alike = __match_any_sync(kAllLanes, key);
  return key >= 0 && lane_id() == __ffs(alike) - 1 && insert_bit(bits, key);
}

// For topk the scale only counts by its sign: without it, scores that are equal in exact arithmetic
// stay equal.
__device__ __forceinline__ double score_factor(const SketchSampleParams& p) {
  if (p.method != SampleMethod::kTopK) return p.scale * kLog2e;
  return p.scale > 0 ? 1.0 : (p.scale < 0 ? -1.0 : 0.0);
}

// log(1 - exp(-x)) for x >= 0, with all digits at both ends.
__device__ __forceinline__ float log_one_minus_exp(float x) {
  x = max_of(x, 1e-37f);
  const float series = x * (1 - x * (0.5f - x * (1.0f / 6 - x * (1.0f / 24))));
  const float e = expf(-x);
  const float tail = -e * (1 + e * (0.5f + e * (1.0f / 3 + e * 0.25f)));
  return e < 0.03f ? tail : logf(x < 0.05f ? series : 1 - e);
}

// ---- one row, one warp --------------------------------------------------------------------------

// The blocks' sums that draws are made from. Weights are 2^(score - reference).
struct Sums {
  const float *max, *sum;
  float reference;    // the largest score
  double total;       // of all weights
  float draw_weight;  // total / 2^31
};

// The keys of a sequence by one sketch, and the random numbers of its rows.
struct Keys {
  const void* first;    // features of key 0
  const uint8_t* mask;  // may be null, as the next
  const uint8_t* global;
  int64_t number;  // of key 0 in k_sketch
  PhiloxKey sample_key, arrival_key;
};

template <typename T, Features kFeatures>
struct Row {
  const SketchSampleParams& p;
  const Shared& s;
  const Keys& keys;
  RowPlan plan;
  int64_t number;  // of the first index head's results among all rows of results
  int64_t position;
  const float* query;

  __device__ __forceinline__ bool valid(int j) const {
    return j < plan.limit && (keys.mask == nullptr || __ldg(keys.mask + j) != 0);
  }
  // Of a valid key.
  __device__ __forceinline__ bool forced(int j) const {
    return j < plan.sink_end || (j >= plan.window_begin && j < plan.window_end) ||
           (j < plan.global_end && __ldg(keys.global + j) != 0);
  }
  __device__ __forceinline__ bool drawable(int j) const {
    return valid(j) && !test_bit(s.excluded, j);
  }

  __device__ __forceinline__ float score(int j) const {
    constexpr int kPer = kFeatures == Features::kAny   ? 1
                         : kFeatures == Features::kFew ? 4
                                                       : kVectorBytes / static_cast<int>(sizeof(T));
    const T* key = static_cast<const T*>(keys.first) + j * p.k_stride[2];
    const int size = static_cast<int>(p.S);
    float sum = 0;
    for (int d = 0; d < size; d += kPer) {
      const auto pack = load_features<kFeatures, kPer>(key, d, size);
#pragma unroll
      for (int e = 0; e < kPer; ++e) sum += query[d + e] * static_cast<float>(to_acc(pack.x[e]));
    }
    return sum;
  }

  // taken = excluded = the forced keys.
  __device__ void begin() const {
    for (int w = lane_id(); w < num_words(plan.limit); w += kWarpSize) s.taken[w] = 0;
    __syncwarp();
    for (int j = lane_id(); j < plan.sink_end; j += kWarpSize)
      if (valid(j)) insert_bit(s.taken, j);
    for (int j = plan.window_begin + lane_id(); j < plan.window_end; j += kWarpSize)
      if (valid(j)) insert_bit(s.taken, j);
    for (int j = lane_id(); j < plan.global_end; j += kWarpSize)
      if (__ldg(keys.global + j) != 0 && valid(j)) insert_bit(s.taken, j);
    __syncwarp();
    exclude_taken();
  }

  __device__ void exclude_taken() const {
    __syncwarp();
    for (int w = lane_id(); w < num_words(plan.limit); w += kWarpSize) s.excluded[w] = s.taken[w];
    __syncwarp();
  }

  // Calls f(block, j, score) with one key per lane for the keys of [begin, end) blocks; score is
  // -inf where the key cannot be drawn.
  template <typename F>
  __device__ void for_each_key(int block, F&& f) const {
    const int size = plan.block_keys, first = block * size;
    for (int j = first + lane_id(); j - lane_id() < min_of(first + size, plan.limit);
         j += kWarpSize)
      f(j, drawable(j) ? score(j) : -kInf);
  }

  // The sums of the keys not excluded, made anew.
  __device__ Sums sum_rest() const {
    for (int block = 0; block < plan.blocks; ++block) {
      float top = -kInf, sum = 0;  // of this lane's keys
      for_each_key(block, [&](int, float x) {
        if (x == -kInf) return;
        const float larger = max_of(top, x);
        sum = sum * exp2f(top - larger) + exp2f(x - larger);
        top = larger;
      });
      const float largest = max_lanes(top);
      sum = sum_lanes(top == -kInf ? 0.0f : sum * exp2f(top - largest));
      if (lane_id() == 0) {
        s.rest_max[block] = largest;
        s.rest_sum[block] = sum;
      }
    }
    __syncwarp();
    return index_blocks(s.rest_max, s.rest_sum);
  }

  // Fills in s.start, [0, kWhole] over all blocks.
  __device__ Sums index_blocks(const float* max, const float* sum) const {
    const int blocks = plan.blocks;
    Sums sums{max, sum, -kInf, 0, 0};
    for (int block = lane_id(); block < blocks; block += kWarpSize)
      sums.reference = max_of(sums.reference, max[block]);
    sums.reference = max_lanes(sums.reference);
    const auto mass = [&](int block) {
      return block < blocks && sum[block] > 0
                 ? static_cast<double>(sum[block] * exp2f(max[block] - sums.reference))
                 : 0.0;
    };
    int last = 0;  // block with any mass: beyond it no draw may fall
    for (int block = lane_id(); block < blocks; block += kWarpSize) {
      sums.total += mass(block);
      if (mass(block) > 0) last = block;
    }
    sums.total = sum_lanes(sums.total);
    last = max_lanes(last);
    sums.draw_weight = static_cast<float>(sums.total * 0x1p-31);
    const double scale = 0x1p31 / sums.total;
    double before = 0;
    __syncwarp();
    for (int first = 0; first <= blocks; first += kWarpSize) {
      const int block = first + lane_id();
      const double own = mass(block), upto = before + scan_lanes(own);
      const double begin = min_of((upto - own) * scale, kWhole - 1.0);
      if (block <= blocks) s.start[block] = block > last ? kWhole : static_cast<int32_t>(begin);
      before = __shfl_sync(kAllLanes, upto, kWarpSize - 1);
    }
    __syncwarp();
    return sums;
  }

  // The key that holds each active lane's draw, and its weight; -1 in the other lanes. Lanes whose
  // draws fall in one block share the scoring of it.
  __device__ int find_keys(const Sums& sums, int32_t draw, bool active, float* weight) const {
    int block = -1;
    if (active) {  // the last that begins at or before the draw
      int low = 0, high = plan.blocks;
      while (high - low > 1) {
        const int middle = (low + high) / 2;
        (s.start[middle] <= draw ? low : high) = middle;
      }
      block = low;
    }
    int key = -1;
    *weight = 0;
    for (unsigned pending = __ballot_sync(kAllLanes, active); pending != 0;) {
      const int at = __shfl_sync(kAllLanes, block, __ffs(pending) - 1);
      bool open = block == at;
      pending &= ~__ballot_sync(kAllLanes, open);
      const float unit = exp2f(sums.reference - sums.max[at]);
      const float target = static_cast<float>(draw - s.start[at]) * sums.draw_weight * unit;
      float carry = 0;
      for_each_key(at, [&](int j, float x) {
        const float w = exp2f(x - sums.max[at]);
        const unsigned positive = __ballot_sync(kAllLanes, w > 0);
        if (positive == 0) return;
        const float upto = carry + scan_lanes(w);
        int below = 0;  // lanes whose running sum does not exceed the target, up to 31
#pragma unroll
        for (int step = kWarpSize / 2; step > 0; step /= 2)
          if (__shfl_sync(kAllLanes, upto, below + step - 1) <= target) below += step;
        carry = __shfl_sync(kAllLanes, upto, kWarpSize - 1);
        const bool inside = target < carry;
        // Running sums are rounded: what they point at may be a key of weight 0 beside the one
        // meant, or lie just beyond the block's last.
        const unsigned beyond = inside ? positive >> below << below : 0;
        const int from = beyond != 0 ? __ffs(beyond) - 1 : kWarpSize - 1 - __clz(positive);
        const float found = __shfl_sync(kAllLanes, w, from);
        if (open) {
          key = j - lane_id() + from;
          *weight = found / unit;
        }
        open = open && !inside;
      });
    }
    return key;
  }

  // The taken keys in ascending order, then -1, and log_inclusion(key): 0 for forced ones, -inf in
  // unused slots.
  template <typename F>
  __device__ void write(int64_t head, F&& log_inclusion) const {
    int32_t* out = output(head);
    int n = 0;
    for (int first = 0; first < num_words(plan.limit); first += kWarpSize) {
      const int word = first + lane_id();
      uint32_t bits = word < num_words(plan.limit) ? s.taken[word] : 0;
      const int count = __popc(bits), upto = scan_lanes(count);
      for (int at = n + upto - count; bits != 0; bits &= bits - 1)
        out[at++] = key_number(word * 32 + __ffs(bits) - 1);
      n += __shfl_sync(kAllLanes, upto, kWarpSize - 1);
    }
    for (int64_t slot = n + lane_id(); slot < p.K; slot += kWarpSize) out[slot] = -1;
    write_log_inclusion(head, log_inclusion);
  }

  __device__ __forceinline__ int32_t* output(int64_t head) const {
    return p.indices + (number + head * p.N) * p.K;
  }
  __device__ __forceinline__ int32_t key_number(int j) const {
    return static_cast<int32_t>(keys.number) + j;
  }

  template <typename F>
  __device__ void write_log_inclusion(int64_t head, F&& log_inclusion) const {
    __syncwarp();  // other lanes' indices are read
    if (p.log_inclusion == nullptr) return;
    const int32_t* numbers = output(head);
    float* out = p.log_inclusion + (numbers - p.indices);
    for (int64_t slot = lane_id(); slot < p.K; slot += kWarpSize) {
      const int key = numbers[slot] - key_number(0);
      out[slot] = numbers[slot] < 0 ? -kInf : (forced(key) ? 0.0f : log_inclusion(key));
    }
  }
};

// ---- methods ------------------------------------------------------------------------------------

// The random numbers of one (sequence, head, position), a warp's worth at a time.
struct Uniforms {
  PhiloxKey key;
  int64_t head, position;
  uint32_t next = 0;

  __device__ uint32_t operator()(uint32_t n) const {
    return philox_draw(key, head, position, next + n);
  }
};

// Sum of n independent Exp(1) variables.
__device__ double gamma_variate(int64_t n, Uniforms* arrivals) {
  float sum = 0;
  for (uint32_t j = static_cast<uint32_t>(lane_id()); j < n; j += kWarpSize)
    sum -= logf((static_cast<float>((*arrivals)(j) >> 8) + 0.5f) * 0x1p-24f);
  arrivals->next += static_cast<uint32_t>(n);
  return sum_lanes(static_cast<double>(sum));
}

// Successive sampling: the first `places` distinct results of independent draws. Drawing exactly
// the number still missing, again and again, never overshoots. log_inclusion needs the time at
// which the next key would have come: keys arrive by Poisson processes of rate weight, m arrivals
// of all of them take Gamma(m) / total.
template <typename R>
__device__ void sample_gumbel(const R& row, int64_t head) {
  const SketchSampleParams& p = row.p;
  Uniforms uniforms{row.keys.sample_key, row.p.visible.first_head + head, row.position};
  Uniforms arrivals{row.keys.arrival_key, row.p.visible.first_head + head, row.position};
  const bool need_time = p.log_inclusion != nullptr;
  Sums sums = row.index_blocks(row.s.row_max, row.s.row_sum);
  double time = 0, mass = 0;  // mass: drawn from `sums`
  int64_t draws = 0;          // made from `sums`
  const auto leave_out_taken = [&] {
    if (need_time) time += gamma_variate(draws, &arrivals) / sums.total;
    const float old_reference = sums.reference;
    row.exclude_taken();
    sums = row.sum_rest();
    time *= exp2(static_cast<double>(sums.reference - old_reference));
    mass = 0;
    draws = 0;
  };
  int missing = row.plan.places;
  for (;;) {
    const int count = missing;
    for (int first = 0; first < count; first += kWarpSize) {
      const int n = first + lane_id();
      const bool active = n < count;
      const auto bits = active ? uniforms(static_cast<uint32_t>(n)) : 0;
      float weight;
      const int key =
          row.find_keys(sums, min_of(static_cast<int32_t>(bits >> 1), kWhole - 1), active, &weight);
      const bool is_new = insert_keys(row.s.taken, key);
      mass += static_cast<double>(sum_lanes(is_new ? weight : 0.0f));
      missing -= __popc(__ballot_sync(kAllLanes, is_new));
    }
    uniforms.next += static_cast<uint32_t>(count);
    draws += count;
    if (missing == 0) break;
    // Repeats come at the rate mass / total: leave the taken keys out where that is cheaper than
    // drawing on. Very large scores round to other weights in `mass` than in `total`, and no draw
    // may be new: then, too.
    const double share = mass / sums.total;
    if (share > kCancellation ||
        missing * share > (1 - share) * static_cast<double>(row.plan.limit) / kKeysPerDraw ||
        draws > kMostDraws * (row.plan.places + 1))
      leave_out_taken();
  }
  if (need_time) {
    if (mass > kCancellation * sums.total) leave_out_taken();
    time += gamma_variate(draws, &arrivals) / sums.total +
            gamma_variate(1, &arrivals) / (sums.total - mass);
  }
  __syncwarp();
  const float rate = static_cast<float>(time);
  row.write(head, [&](int key) {
    return log_one_minus_exp(exp2f(row.score(key) - sums.reference) * rate);
  });
}

// Takes every key whose inclusion probability reaches 1, again and again, leaving the others in
// *sums; returns how many places are left for them.
template <typename R>
__device__ int cap_inclusion(const R& row, Sums* sums) {
  int places = row.plan.places;
  while (places > 0 && places >= sums->total) {  // the largest weight is 1
    const float cap = static_cast<float>(sums->total / places) * kRescored;
    int capped = 0;
    for (int block = 0; block < row.plan.blocks; ++block) {
      if (exp2f(sums->max[block] - sums->reference) < cap * kRescored) continue;
      row.for_each_key(block, [&](int j, float x) {
        const bool reaches = exp2f(x - sums->reference) >= cap;
        const unsigned lanes = __ballot_sync(kAllLanes, reaches);
        if (reaches && capped + __popc(lanes & ((1u << lane_id()) - 1)) < places)
          insert_bit(row.s.taken, j);
        capped = min_of(places, capped + __popc(lanes));
      });
    }
    places -= capped;
    if (places == 0) break;
    row.exclude_taken();
    *sums = row.sum_rest();
  }
  return places;
}

// Inclusion probabilities proportional to weight, up to 1; draw n is the key whose step of the
// running sum holds u + n.
template <typename R>
__device__ void sample_systematic(const R& row, int64_t head) {
  const Uniforms uniforms{row.keys.sample_key, row.p.visible.first_head + head, row.position};
  Sums sums = row.index_blocks(row.s.row_max, row.s.row_sum);
  const int places = cap_inclusion(row, &sums);
  const double u = uniform_double(uniforms(0)), step = 0x1p31 / places;
  for (int first = 0; first < places; first += kWarpSize) {
    const int n = first + lane_id();
    const bool active = n < places;
    float weight;
    int key =
        row.find_keys(sums, active ? static_cast<int32_t>(min_of((u + n) * step, kWhole - 1.0)) : 0,
                      active, &weight);
    const bool is_new = insert_keys(row.s.taken, key);
    // A probability just below 1 can be passed twice by rounding: the next free key stands in.
    for (unsigned repeats = __ballot_sync(kAllLanes, active && !is_new); repeats != 0;
         repeats &= repeats - 1) {
      if (lane_id() == __ffs(repeats) - 1) do {
          key = (key + 1) % row.plan.limit;
        } while (!(row.drawable(key) && insert_bit(row.s.taken, key)));
      __syncwarp();
    }
  }
  __syncwarp();
  const float inclusion_scale = static_cast<float>(places / sums.total);
  row.write(head, [&](int key) {
    if (places == 0) return 0.0f;
    const float pi = exp2f(row.score(key) - sums.reference) * inclusion_scale;
    return min_of(logf(max_of(pi, 1e-37f)), 0.0f);
  });
}

// Sorts x [entries], a power of two, ascending.
__device__ void sort_ascending(int32_t* x, int entries) {
  for (int size = 2; size <= entries; size *= 2)
    for (int distance = size / 2; distance > 0; distance /= 2) {
      for (int a = lane_id(); a < entries; a += kWarpSize) {
        const int b = a ^ distance;
        if (b > a && (x[a] > x[b]) == ((a & size) == 0)) {
          const int32_t t = x[a];
          x[a] = x[b];
          x[b] = t;
        }
      }
      __syncwarp();
    }
}

template <typename R>
__device__ void sample_multinomial(const R& row, int64_t head) {
  const SketchSampleParams& p = row.p;
  const Uniforms uniforms{row.keys.sample_key, row.p.visible.first_head + head, row.position};
  const Sums sums = row.index_blocks(row.s.row_max, row.s.row_sum);
  int32_t* list = row.s.list;
  const int entries = static_cast<int>(list_entries(p.K)), places = row.plan.places;
  for (int first = 0; first < places; first += kWarpSize) {
    const int n = first + lane_id();
    const auto bits = n < places ? uniforms(static_cast<uint32_t>(n)) : 0;
    float weight;
    const int key = row.find_keys(sums, min_of(static_cast<int32_t>(bits >> 1), kWhole - 1),
                                  n < places, &weight);
    if (n < places) list[n] = key;
  }
  int n = places;  // then the forced keys
  for (int first = 0; first < row.plan.limit; first += kWarpSize) {
    const int j = first + lane_id();
    const bool forced = j < row.plan.limit && test_bit(row.s.taken, j);
    const unsigned lanes = __ballot_sync(kAllLanes, forced);
    if (forced) list[n + __popc(lanes & ((1u << lane_id()) - 1))] = j;
    n += __popc(lanes);
  }
  for (int at = n + lane_id(); at < entries; at += kWarpSize) list[at] = INT32_MAX;
  __syncwarp();
  sort_ascending(list, entries);
  int32_t* out = row.output(head);
  for (int at = lane_id(); at < p.K; at += kWarpSize) out[at] = row.key_number(list[at]);
  const float inclusion_scale = static_cast<float>(places / sums.total);
  row.write_log_inclusion(head, [&](int key) {
    const float expected = exp2f(row.score(key) - sums.reference) * inclusion_scale;
    return logf(max_of(expected, 1e-37f));
  });
}

// The keys of the largest scores, ties to the lower index, the same for every index head of
// [first_head, end_head): a radix select, eight bits of the score at a time.
template <typename R>
__device__ void take_largest(const R& row, int64_t first_head, int64_t end_head) {
  const auto ordered = [](float x) {  // an integer of the same order; + 0 makes -0 equal to 0
    const int bits = __float_as_int(x + 0.0f);
    return static_cast<uint32_t>(bits ^ (bits >> 31 & 0x7FFFFFFF)) ^ 0x80000000u;
  };
  const auto for_each_score = [&](auto&& f) {
    for (int block = 0; block < row.plan.blocks; ++block)
      row.for_each_key(block, [&](int j, float x) { f(j, x != -kInf, ordered(x)); });
  };
  int32_t* count = row.s.start;
  uint32_t prefix = 0;
  int remaining = row.plan.places;  // of the keys that begin with `prefix`
  for (int shift = 24; shift >= 0; shift -= 8) {
    __syncwarp();
    for (int bin = lane_id(); bin < kBins; bin += kWarpSize) count[bin] = 0;
    __syncwarp();
    for_each_score([&](int, bool drawable, uint32_t x) {
      // The prefix is all bits above shift + 8: none at first.
      if (drawable && (shift == 24 || x >> (shift + 8) == prefix))
        atomicAdd(count + (x >> shift & (kBins - 1)), 1);
    });
    __syncwarp();
    // Lane l has the bins 255 - 8 l, ..., 248 - 8 l.
    constexpr int kPer = kBins / kWarpSize;
    const int first = kBins - 1 - lane_id() * kPer;
    int own = 0;
    for (int e = 0; e < kPer; ++e) own += count[first - e];
    int above = scan_lanes(own) - own, bin = first;
    const bool here = above < remaining && remaining <= above + own;
    for (int e = 0; here && above + count[bin] < remaining && e < kPer; ++e) above += count[bin--];
    const int source = __ffs(__ballot_sync(kAllLanes, here)) - 1;
    prefix = prefix << 8 | static_cast<uint32_t>(__shfl_sync(kAllLanes, bin, source));
    remaining -= __shfl_sync(kAllLanes, above, source);
  }
  __syncwarp();
  for_each_score([&](int j, bool drawable, uint32_t x) {
    const bool tied = drawable && x == prefix;
    const unsigned lanes = __ballot_sync(kAllLanes, tied);
    const bool wins = tied && __popc(lanes & ((1u << lane_id()) - 1)) < remaining;
    if (wins || (drawable && x > prefix)) insert_bit(row.s.taken, j);
    remaining = max_of(0, remaining - __popc(lanes));
  });
  __syncwarp();
  for (int64_t head = first_head; head < end_head; ++head)
    row.write(head, [](int) { return 0.0f; });
}

// ---- rows together ------------------------------------------------------------------------------

// By one warp: the forced keys are those of for_each_forced in visible.h.
__device__ RowPlan plan_row(const SketchSampleParams& p, const Sequence& sequence, const Keys& keys,
                            int64_t position) {
  const Visible& v = p.visible;
  RowPlan plan{};
  const Span window = window_span(v, sequence, position);
  plan.limit = static_cast<int>(key_limit(v, sequence, position));
  plan.window_begin = static_cast<int>(window.begin);
  plan.window_end = static_cast<int>(window.end);
  const auto in_window = [&](int j) { return j >= plan.window_begin && j < plan.window_end; };
  const unsigned lanes_before = (1u << lane_id()) - 1;
  const int limit = plan.limit;
  int valid = limit;
  if (keys.mask == nullptr) {
    plan.sink_end = static_cast<int>(min_of<int64_t>(v.num_sinks, limit));
    plan.places =
        plan.sink_end + max_of(0, plan.window_end - max_of(plan.window_begin, plan.sink_end));
  } else {
    valid = 0;
    plan.sink_end = v.num_sinks > 0 ? limit : 0;
    plan.limit = 0;  // up to the last valid key: masked ones behind it change nothing
    for (int first = 0; first < limit; first += kWarpSize) {
      const int j = first + lane_id();
      const bool is_valid = j < limit && keys.mask[j] != 0;
      const unsigned lanes = __ballot_sync(kAllLanes, is_valid);
      const int before = valid + __popc(lanes & lanes_before);
      const bool sink = is_valid && before < v.num_sinks;
      plan.places += __popc(__ballot_sync(kAllLanes, sink || (is_valid && in_window(j))));
      valid += __popc(lanes);
      if (lanes != 0) plan.limit = first + kWarpSize - __clz(lanes);
      const unsigned last = __ballot_sync(kAllLanes, is_valid && before + 1 == v.num_sinks);
      if (last != 0) plan.sink_end = first + __ffs(last);
    }
  }
  plan.places = static_cast<int>(p.K) - plan.places;
  if (keys.global != nullptr) {
    for (int first = plan.sink_end; first < plan.limit && plan.places > 0; first += kWarpSize) {
      const int j = first + lane_id();
      const bool wanted = j < plan.limit && keys.global[j] != 0 && !in_window(j) &&
                          (keys.mask == nullptr || keys.mask[j] != 0);
      const int before = __popc(__ballot_sync(kAllLanes, wanted) & lanes_before);
      const unsigned taken = __ballot_sync(kAllLanes, wanted && before < plan.places);
      if (taken != 0) plan.global_end = first + kWarpSize - __clz(taken);
      plan.places -= __popc(taken);
    }
  }
  plan.take_all = valid <= p.K;
  plan.block_keys = kTileCols * tiles_per_block(plan.limit);
  plan.blocks = static_cast<int>(ceil_div(plan.limit, plan.block_keys));
  return plan;
}

// Largest score and sum of every block of keys, for the rows of a block of threads whose blocks
// have `block_keys`. Scores of forced keys are left out. query(r) and key(j) point at features.
template <typename T, Features kFeatures, typename Query, typename Key>
__device__ __forceinline__ void sum_blocks(const SketchSampleParams& p, const Shared& s,
                                           const Keys& keys, int block_keys, int stride, int warps,
                                           Query&& query, Key&& key) {
  const float factor = static_cast<float>(score_factor(p));
  const int tiles = block_keys / kTileCols;
  RowPlan plan[2] = {s.plan[tile_row(0)], s.plan[tile_row(2)]};
#pragma unroll
  for (int r = 0; r < 2; ++r)
    if (plan[r].block_keys != block_keys) plan[r].limit = 0;
  int limit = 0, blocks = 0;
  for (int r = 0; r < kRows; ++r) {
    if (s.plan[r].block_keys != block_keys) continue;
    limit = max_of(limit, s.plan[r].limit);
    blocks = max_of(blocks, s.plan[r].blocks);
  }

  for (int block = warp_id(); block < blocks; block += warps) {
    float top[2] = {-kInf, -kInf}, sum[2] = {0, 0};
    bool finite = true;
    for (int tile = block * tiles; tile < (block + 1) * tiles && tile * kTileCols < limit; ++tile) {
      const auto scores = score_tile<kFeatures, T>(
          static_cast<int>(p.S), query, [&](int c) { return key(tile * kTileCols + c); });
      const int own = tile * kTileCols + lane_id();
      const bool is_valid = own < limit && (keys.mask == nullptr || keys.mask[own] != 0);
      const unsigned exists = __ballot_sync(kAllLanes, is_valid);
      const unsigned global = keys.global == nullptr
                                  ? 0
                                  : __ballot_sync(kAllLanes, own < limit && keys.global[own] != 0);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float x[kSubTiles][2], larger = top[r];
#pragma unroll
        for (int n = 0; n < kSubTiles; ++n)
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const int col = tile_col(n, c), j = tile * kTileCols + col;
            const bool valid = j < plan[r].limit && (exists >> col & 1) != 0;
            const float score = static_cast<float>(scores.x[n][2 * r + c]) * factor;
            finite = finite && (!valid || score - score == 0);
            const bool forced = j < plan[r].sink_end ||
                                (j >= plan[r].window_begin && j < plan[r].window_end) ||
                                (j < plan[r].global_end && (global >> col & 1) != 0);
            x[n][c] = valid && !forced ? score : -kInf;
            larger = max_of(larger, x[n][c]);
          }
        if (larger == -kInf) continue;
        sum[r] *= exp2f(top[r] - larger);
        top[r] = larger;
#pragma unroll
        for (int n = 0; n < kSubTiles; ++n)
#pragma unroll
          for (int c = 0; c < 2; ++c) sum[r] += exp2f(x[n][c] - larger);
      }
    }
    SMARTBIRD_DEVICE_CHECK(
        finite,
        "smartbird: q_sketch or k_sketch holds NaN or infinity, or numbers whose "
        "products overflow float32, in which all dtypes are sampled");
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float largest = max_lanes<4>(top[r]);
      const float total = sum_lanes<4>(top[r] == -kInf ? 0.0f : sum[r] * exp2f(top[r] - largest));
      if (lane_id() % 4 == 0 && block * block_keys < plan[r].limit) {
        s.row_max[tile_row(2 * r) * stride + block] = largest;
        s.row_sum[tile_row(2 * r) * stride + block] = total;
      }
    }
  }
}

// What a launch knows beside its problem.
struct SampleLaunch {
  SketchSampleParams problem;
  int64_t shared_bytes;
};

// One kernel for all methods: all warps branch alike, shared memory and not registers says how many
// run at once, and a kernel for each would take four times as long to compile.
template <typename T, Features kFeatures>
__global__ void __launch_bounds__(kMaxWarps* kWarpSize, 1)
    sketch_sample_kernel(const SampleLaunch launched) {
  const SketchSampleParams& p = launched.problem;
  const Visible& v = p.visible;
  const int warps = static_cast<int>(blockDim.x) / kWarpSize;
  const int64_t per_batch = v.queries.blocks_per_batch(kRows);
  const int64_t sketch = blockIdx.x / per_batch % p.H_s;
  const SegmentBlock at = segment_block(
      v.queries, kRows, blockIdx.x / per_batch / p.H_s * per_batch + blockIdx.x % per_batch);
  const int rows = static_cast<int>(at.end - at.begin);
  if (rows <= 0) return;
  const Sequence sequence = sequence_at(v, at.segment);
  const int64_t first_row = sequence.first_query + at.begin;

  const T* first_query = static_cast<const T*>(p.q_sketch) + sequence.batch * p.q_stride[0] +
                         sketch * p.q_stride[1] + first_row * p.q_stride[2];
  const T* first_key = static_cast<const T*>(p.k_sketch) + sequence.batch * p.k_stride[0] +
                       sketch / (p.H_s / p.H_ks) * p.k_stride[1] +
                       sequence.first_key * p.k_stride[2];
  const auto query = [&](int r) { return first_query + min_of(r, rows - 1) * p.q_stride[2]; };
  const int last_key = static_cast<int>(sequence.num_keys) - 1;
  const auto key = [&](int j) { return first_key + min_of(j, last_key) * p.k_stride[2]; };
  const Keys keys{first_key,
                  mask_of(v, sequence, v.key_mask),
                  mask_of(v, sequence, v.global_mask),
                  sequence.first_key,
                  sequence_key(read_philox_key(p.device_seed, kSampleStream), sequence),
                  sequence_key(read_philox_key(p.device_seed, kArrivalStream), sequence)};

  Shared s;
  s.lay_out(p, Extent{}, shared_memory<char>(), 0, 1);
  for (int r = warp_id(); r < kRows; r += warps) {
    const RowPlan plan =
        r < rows ? plan_row(p, sequence, keys, position_of(v, sequence, at.begin + r)) : RowPlan{};
    if (lane_id() == 0) s.plan[r] = plan;
    for (int d = lane_id(); d < p.S; d += kWarpSize)
      s.query[r * p.S + d] =
          static_cast<float>(static_cast<double>(to_acc(query(r)[d])) * score_factor(p));
  }
  __syncthreads();

  // The warps that draw are as many as have room: of long rows not all.
  Extent extent{};
  for (int r = 0; r < kRows; ++r) {
    extent.blocks = max_of(extent.blocks, s.plan[r].blocks);
    extent.words = max_of(extent.words, num_words(s.plan[r].limit));
  }
  int drawing = warps;
  const auto fits = [&] {
    return Shared().lay_out(p, extent, nullptr, 0, drawing) <=
           static_cast<size_t>(launched.shared_bytes);
  };
  while (drawing > 1 && !fits()) drawing /= 2;
  SMARTBIRD_DEVICE_CHECK(fits(),
                         "smartbird: sketch_sample on CUDA keeps a bitmap of the keys on "
                         "chip, and a sequence has too many");
  s.lay_out(p, extent, shared_memory<char>(), warp_id(), drawing);

  // Rows with blocks of one size are summed together: almost always all of them.
  for (int size = 0;;) {
    int next = INT32_MAX;
    for (int r = 0; r < kRows; ++r)
      if (s.plan[r].block_keys > size) next = min_of(next, s.plan[r].block_keys);
    if (next == INT32_MAX) break;
    size = next;
    sum_blocks<T, kFeatures>(p, s, keys, size, extent.blocks, warps, query, key);
  }
  __syncthreads();
  if (warp_id() >= drawing) return;

  const bool topk = p.method == SampleMethod::kTopK;  // all heads of a sketch alike
  const int64_t per_sketch = p.H_i / p.H_s, end_head = (sketch + 1) * per_sketch;
  const int heads = topk ? 1 : static_cast<int>(per_sketch);
  for (int task = warp_id(); task < rows * heads; task += drawing) {
    const int r = task / heads;
    const int64_t head = sketch * per_sketch + task % heads;
    Shared own = s;
    own.row_max += r * extent.blocks;
    own.row_sum += r * extent.blocks;
    const Row<T, kFeatures> row{p,
                                own,
                                keys,
                                s.plan[r],
                                sequence.batch * p.H_i * p.N + first_row + r,
                                position_of(v, sequence, at.begin + r),
                                s.query + r * p.S};
    row.begin();
    if (row.plan.take_all || row.plan.places == 0) {
      if (row.plan.take_all)
        for (int j = lane_id(); j < row.plan.limit; j += kWarpSize)
          if (row.valid(j)) insert_bit(own.taken, j);
      __syncwarp();
      for (int64_t h = head; h < (topk ? end_head : head + 1); ++h)
        row.write(h, [](int) { return 0.0f; });
    } else if (topk) {
      take_largest(row, head, end_head);
    } else if (p.method == SampleMethod::kGumbel) {
      sample_gumbel(row, head);
    } else if (p.method == SampleMethod::kSystematic) {
      sample_systematic(row, head);
    } else {
      sample_multinomial(row, head);
    }
    __syncwarp();  // the next task writes what this one read
  }
}

}  // namespace

void run_sketch_sample(const SketchSampleParams& params, cudaStream_t stream) {
  const Extent extent = Extent::up_to(params.M);
  const auto shared_bytes = [&](int warps) {
    return Shared().lay_out(params, extent, nullptr, 0, warps);
  };
  // How long packed sequences are is not known here: their blocks settle it.
  const bool packed = params.visible.keys.cu != nullptr;
  int warps = kMaxWarps;
  while (!packed && warps > 1 && shared_bytes(warps) > kMaxSharedBytes) warps /= 2;
  const size_t bytes = packed ? min_of(shared_bytes(warps), kMaxSharedBytes) : shared_bytes(warps);
  if (bytes > kMaxSharedBytes)
    throw std::runtime_error(
        "smartbird: sketch_sample on CUDA keeps a bitmap of the keys on chip, and M = " +
        std::to_string(params.M) + " with K = " + std::to_string(params.K) + " is beyond it");
  const SampleLaunch launched{params, static_cast<int64_t>(bytes)};
  dispatch_features(params.dtype, params.q_sketch, params.q_stride, params.k_sketch,
                    params.k_stride, params.S, [&](auto type, auto features) {
                      launch("sketch_sample",
                             sketch_sample_kernel<decltype(type), decltype(features)::value>,
                             params.visible.queries.num_blocks(kRows) * params.H_s,
                             warps * kWarpSize, bytes, stream, launched);
                    });
}

}  // namespace smartbird::cuda
