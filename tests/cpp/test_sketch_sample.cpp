// sketch_sample: which keys may, must and must not be drawn, and with what probability.
#include <algorithm>
#include <set>
#include <vector>

#include "testing.h"

namespace smartbird::testing {
namespace {

constexpr SampleMethod kAllMethods[] = {SampleMethod::kGumbel, SampleMethod::kSystematic,
                                        SampleMethod::kMultinomial, SampleMethod::kTopK};

struct Shape {
  int64_t B, N, M, S, H_i, K;
};

struct Options {
  SampleMethod method = SampleMethod::kGumbel;
  bool is_causal = false;
  bool masked = false;
  int64_t window = 0;
  int64_t num_sinks = 0;
};

// One call: its inputs, its packed keys, its results.
struct Problem {
  Problem(const Shape& shape, DType dtype, const Options& options)
      : random(11),
        shape(shape),
        options(options),
        dtype(dtype),
        q(dtype, shape.B * shape.N, shape.S, random),
        k(dtype, shape.B * shape.M, shape.S, random),
        key_mask(static_cast<size_t>(shape.B * shape.M), 1),
        indices(static_cast<size_t>(shape.B * shape.H_i * shape.N * shape.K), -7),
        log_inclusion(indices.size(), std::numeric_limits<float>::quiet_NaN()) {
    if (!options.masked) return;
    for (auto& valid : key_mask) valid = random.integer(0, 2) > 0;
    for (int64_t j = 0; j < shape.B * shape.M; ++j)
      if (!key_mask[static_cast<size_t>(j)]) k.array.set(j * k.stride, kNan);
  }

  void sample(const Kernels& kernels, bool reverse = false) {
    const auto& [B, N, M, S, H_i, K] = shape;
    const int64_t tiles = (M + kTile - 1) / kTile;
    const uint8_t* mask = options.masked ? key_mask.data() : nullptr;
    Array k_tiles(DType::kFloat32, B * tiles * S * kTile);
    Array key_bias(DType::kFloat32, B * tiles * kTile);
    Array tile_norm(DType::kFloat32, B * tiles);
    const PackParams pack{
        .B = B,
        .H = 1,
        .D = S,
        .rows = {M, B, nullptr},
        .dtype = dtype,
        .to_double = false,
        .x = k.array.data(),
        .stride = {M * k.stride, 0, k.stride},
        .scale = 1,
        .interleave = true,
        .key_mask = mask,
        .tiles = k_tiles.data(),
        .key_bias = key_bias.data(),
        .tile_norm = static_cast<float*>(tile_norm.data()),
    };
    run(kernels.pack, pack);
    SketchSampleParams params{
        .B = B,
        .N = N,
        .M = M,
        .S = S,
        .H_s = 1,
        .H_ks = 1,
        .H_i = H_i,
        .K = K,
        .dtype = dtype,
        .visible = {.queries = {N, B, nullptr},
                    .keys = {M, B, nullptr},
                    .is_causal = options.is_causal,
                    .window = options.window,
                    .num_sinks = options.num_sinks,
                    .key_mask = mask},
        .q_sketch = q.array.data(),
        .q_stride = {N * q.stride, N * q.stride, q.stride},
        .scale = scale,
        .method = options.method,
        .row_begin = 0,
        .row_end = N,
        .seed = 1,
        .offset = 2,
        .most_queries = N,
        .most_keys = M,
        .k_sketch = k.array.data(),
        .k_stride = {M * k.stride, 0, k.stride},
        .k_tiles = static_cast<float*>(k_tiles.data()),
        .key_bias = static_cast<float*>(key_bias.data()),
        .tile_norm = static_cast<float*>(tile_norm.data()),
        .indices = indices.data(),
        .log_inclusion = log_inclusion.data(),
        .error = &error,
    };
    std::vector<float> scanned(static_cast<size_t>(scanned_size(params)));
    params.scanned = scanned.data();
    if (scans(params)) run(kernels.sketch_scan, params, reverse);
    run(kernels.sketch_sample, params, reverse);
  }

  bool valid(int64_t b, int64_t i, int64_t j) const {
    return key_mask[static_cast<size_t>(b * shape.M + j)] &&
           (!options.is_causal || j <= i + shape.M - shape.N);
  }

  // One key's score exceeds all others by so much that their weights, relative to its own, are 0.
  void let_one_key_dominate() {
    for (int64_t d = 0; d < shape.S; ++d) {
      q.array.set(d, 1);
      for (int64_t j = 0; j < shape.M; ++j)
        k.array.set(j * k.stride + d, j == shape.M / 2 ? 2 : k(j, d) / 8);
    }
  }

  // The keys of a row that must be taken.
  std::set<int64_t> forced(int64_t b, int64_t i) const {
    const int64_t aligned = i + shape.M - shape.N, side = options.window / 2;
    std::set<int64_t> keys;
    for (int64_t j = 0; j < shape.M; ++j) {
      if (!valid(b, i, j)) continue;
      const bool in_window = options.is_causal ? j > aligned - options.window && j <= aligned
                                               : std::abs(j - aligned) <= side;
      const bool is_sink = static_cast<int64_t>(keys.size()) < options.num_sinks;
      if (is_sink || (options.window > 0 && in_window)) keys.insert(j);
    }
    return keys;
  }

  double score(int64_t b, int64_t i, int64_t j) const {
    return scale * dot(q, b * shape.N + i, k, b * shape.M + j, shape.S);
  }

  Random random;
  Shape shape;
  Options options;
  DType dtype;
  double scale =
      0.25;  // a power of two: scores of small multiples of 1/16 stay exact, ties stay ties
  Rows q, k;
  std::vector<uint8_t> key_mask;
  std::vector<int32_t> indices;
  std::vector<float> log_inclusion;
  int32_t error = kNoError;
};

// ---- what every draw must satisfy -------------------------------------------------------------

void check_row(const Problem& problem, int64_t b, int64_t i, const int32_t* index,
               const float* log_inclusion) {
  const int64_t K = problem.shape.K, M = problem.shape.M;
  std::vector<int64_t> valid;
  for (int64_t j = 0; j < M; ++j)
    if (problem.valid(b, i, j)) valid.push_back(j);
  const bool takes_all = static_cast<int64_t>(valid.size()) <= K;
  const std::set<int64_t> forced = problem.forced(b, i);
  const bool distinct = problem.options.method != SampleMethod::kMultinomial || takes_all;

  const int64_t filled = takes_all ? static_cast<int64_t>(valid.size()) : K;
  for (int64_t j = 0; j < K; ++j) {
    if (j >= filled) {
      CHECK(index[j] == -1);
      CHECK(log_inclusion[j] == -kInf);
      continue;
    }
    CHECK(index[j] >= 0 && index[j] < M && problem.valid(b, i, index[j]));
    if (j > 0) CHECK(distinct ? index[j - 1] < index[j] : index[j - 1] <= index[j]);
    if (takes_all || forced.count(index[j]) > 0 || problem.options.method == SampleMethod::kTopK)
      CHECK(log_inclusion[j] == 0);
    else if (distinct)
      CHECK(log_inclusion[j] <= 0);
    else
      CHECK(std::isfinite(log_inclusion[j]));
  }
  if (takes_all) {
    CHECK(std::equal(valid.begin(), valid.end(), index));
    return;
  }
  for (const int64_t key : forced) CHECK(std::count(index, index + K, key) == 1);

  if (problem.options.method == SampleMethod::kTopK) {
    std::vector<int64_t> rest;
    for (const int64_t j : valid)
      if (forced.count(j) == 0) rest.push_back(j);
    std::stable_sort(rest.begin(), rest.end(), [&](int64_t a, int64_t c) {
      return problem.score(b, i, a) > problem.score(b, i, c);
    });
    std::set<int64_t> want = forced;
    for (const int64_t j : rest)
      if (static_cast<int64_t>(want.size()) < K) want.insert(j);
    CHECK(std::equal(want.begin(), want.end(), index));
  }
}

void test_rows(const Kernels& kernels, const Shape& shape, DType dtype, const Options& options) {
  Problem problem(shape, dtype, options);
  problem.sample(kernels);
  CHECK(problem.error == kNoError);
  for (int64_t row = 0; row < shape.B * shape.H_i * shape.N; ++row)
    check_row(problem, row / (shape.H_i * shape.N), row % shape.N,
              problem.indices.data() + row * shape.K, problem.log_inclusion.data() + row * shape.K);

  const std::vector<int32_t> first = problem.indices;
  problem.sample(kernels, /*reverse=*/true);
  CHECK(problem.indices == first);
}

// ---- the laws ---------------------------------------------------------------------------------

// Probability that successive sampling of k keys without replacement takes each key.
void add_successive(const std::vector<double>& p, std::vector<bool>& taken, int64_t k,
                    double chance, std::vector<double>& inclusion) {
  if (k == 0) return;
  double mass = 0;
  for (size_t j = 0; j < p.size(); ++j) mass += taken[j] ? 0 : p[j];
  for (size_t j = 0; j < p.size(); ++j) {
    if (taken[j]) continue;
    const double here = chance * p[j] / mass;
    inclusion[j] += here;
    taken[j] = true;
    add_successive(p, taken, k - 1, here, inclusion);
    taken[j] = false;
  }
}

// min(1, c p) with c such that they sum to k, by bisection of log c.
std::vector<double> capped(const std::vector<double>& p, int64_t k) {
  double low = 0, high = 700;
  std::vector<double> inclusion(p.size());
  for (int step = 0; step < 100; ++step) {
    const double log_c = (low + high) / 2;
    double sum = 0;
    for (size_t j = 0; j < p.size(); ++j)
      sum += inclusion[j] = std::min(1.0, std::exp(log_c) * p[j]);
    (sum < static_cast<double>(k) ? low : high) = log_c;
  }
  return inclusion;
}

// How often each key is drawn, over many index heads, and what log_inclusion says of it. The law of
// `gumbel` is summed over all orders of drawing, so it is known for few keys only.
void test_law(const Kernels& kernels, SampleMethod method, const Shape& shape, double scale,
              bool dominated) {
  Options options;
  options.method = method;
  Problem problem(shape, DType::kFloat32, options);
  problem.scale = scale;
  if (dominated) problem.let_one_key_dominate();
  problem.sample(kernels);

  const auto n = static_cast<double>(shape.H_i), K = static_cast<double>(shape.K);
  std::vector<double> p, want(static_cast<size_t>(shape.M));
  double sum = 0;
  for (int64_t j = 0; j < shape.M; ++j) {
    p.push_back(std::exp(problem.score(0, 0, j)));
    sum += p.back();
  }
  for (double& x : p) x /= sum;
  const bool known = method != SampleMethod::kGumbel || shape.M <= 6;
  if (!known) {
    want.assign(p.size(), kNan);
  } else if (method == SampleMethod::kGumbel) {
    std::vector<bool> taken(p.size());
    add_successive(p, taken, shape.K, 1, want);
  } else if (method == SampleMethod::kSystematic) {
    want = capped(p, shape.K);
  } else {
    for (size_t j = 0; j < p.size(); ++j) want[j] = K * p[j];
  }

  std::vector<double> count(p.size()), inverse(p.size()), square(p.size());
  for (size_t slot = 0; slot < problem.indices.size(); ++slot) {
    const auto j = static_cast<size_t>(problem.indices[slot]);
    const double weight = std::exp(-static_cast<double>(problem.log_inclusion[slot]));
    count[j] += 1, inverse[j] += weight, square[j] += weight * weight;
    // A float score of up to 64 * scale is rounded, and so is the log of a sum of such.
    if (method != SampleMethod::kGumbel)
      CHECK_CLOSE(problem.log_inclusion[slot], std::log(want[j]), 0, 1e-5 * (1 + scale));
  }
  for (size_t j = 0; j < p.size(); ++j) {
    // Five standard deviations, and two draws for keys whose count is hardly normal; draws with
    // replacement within a head are independent, the others at most as dispersed. The seed is
    // fixed, so a test that passes cannot flicker.
    const double dispersion =
        method == SampleMethod::kMultinomial ? want[j] : want[j] * (1 - want[j]);
    if (known)
      CHECK_CLOSE(count[j] / n, want[j], 0, (5 * std::sqrt(std::max(dispersion, 0.0) * n) + 2) / n);
    // Weighting each draw by 1 / inclusion counts every key once on average (Horvitz-Thompson); the
    // mean of a key that is hardly ever drawn is far from normal, and says nothing.
    if (count[j] > 200) CHECK_CLOSE(inverse[j] / n, 1.0, 0, 5 * std::sqrt(square[j]) / n + 1e-4);
  }
}

// ---- bad values -------------------------------------------------------------------------------

void test_not_a_number(const Kernels& kernels) {
  const Shape shape{2, 3, 70, 9, 2, 8};
  for (const SampleMethod method : kAllMethods)
    for (const double bad : {kNan, kInf}) {
      Options options;
      options.method = method;
      Problem in_key(shape, DType::kFloat32, options);
      in_key.k.array.set(69 * in_key.k.stride + 3, bad);
      in_key.sample(kernels);
      CHECK(in_key.error == kSketchNotFinite);
      Problem in_query(shape, DType::kFloat32, options);
      in_query.q.array.set(5 * in_query.q.stride + 8, bad);
      in_query.sample(kernels);
      CHECK(in_query.error == kSketchNotFinite);
    }
}

void test(const Kernels& kernels) {
  const Shape shapes[] = {{1, 1, 1, 1, 1, 1},     {2, 3, 40, 16, 2, 8},  {1, 6, 4, 16, 3, 9},
                          {1, 4, 300, 16, 2, 40}, {1, 9, 20, 16, 1, 20}, {1, 7, 64, 8, 2, 6}};
  for (const SampleMethod method : kAllMethods)
    for (const Shape& shape : shapes) {
      for (const DType dtype : kAllDTypes) test_rows(kernels, shape, dtype, {.method = method});
      for (const bool is_causal : {false, true})
        for (const bool masked : {false, true})
          for (const int64_t window : {0, 1, 3})
            for (const int64_t num_sinks : {0, 2}) {
              if (num_sinks + 2 * (window / 2) + 1 > shape.K) continue;
              test_rows(kernels, shape, DType::kFloat32,
                        {method, is_causal, masked, window, num_sinks});
            }
    }
  for (const SampleMethod method :
       {SampleMethod::kGumbel, SampleMethod::kSystematic, SampleMethod::kMultinomial}) {
    for (const Shape& shape : {Shape{1, 1, 6, 16, 20000, 3}, Shape{1, 1, 300, 16, 5000, 8}}) {
      // At scale 8 scores are beyond what exp can hold without a reference.
      for (const double scale : {0.0, 0.25, 1.0, 8.0})
        test_law(kernels, method, shape, scale, /*dominated=*/false);
      test_law(kernels, method, shape, 8.0, /*dominated=*/true);
    }
  }
  test_not_a_number(kernels);
}

}  // namespace
}  // namespace smartbird::testing

int main(int argc, char** argv) {
  return smartbird::testing::run_test(argc, argv, smartbird::testing::test);
}
