// gather_scores and gather_attention against loops over the drawn keys in double precision.
#include <algorithm>
#include <vector>

#include "gather_problem.h"

namespace smartbird::testing {
namespace {

void test_scores(const Kernels& kernels, const Shape& s, DType dtype) {
  Problem problem(s, dtype);
  Array out(dtype, s.B * s.H * s.N * s.K);
  GatherParams p = problem.params(false);
  p.v = nullptr, p.Dv = 0;
  p.out = out.data();
  run(kernels.gather_scores, p);
  CHECK(problem.error == kNoError);
  for_each_query(problem, [&](int64_t b, int64_t h, int64_t, int64_t row, const int32_t* keys) {
    for (int64_t j = 0; j < s.K; ++j) {
      const double want =
          keys[j] < 0 ? -kInf
                      : p.scale * dot(problem.q, row, problem.k, key_row(s, b, h, keys[j]), s.D);
      // Terms of at most 4 each are summed in any order; then the result is stored in dtype.
      CHECK_CLOSE(out[row * s.K + j], want, 2 * epsilon(dtype),
                  4 * static_cast<double>(s.D) * epsilon(acc_dtype(dtype)));
    }
  });
}

void test_attention(const Kernels& kernels, const Shape& s, DType dtype, bool with_bias) {
  Problem problem(s, dtype);
  Array out(dtype, s.B * s.H * s.N * s.Dv), again = out;
  Array lse(acc_dtype(dtype), s.B * s.H * s.N);
  GatherParams p = problem.params(with_bias);
  p.out = out.data(), p.lse = lse.data();
  run(kernels.gather_attention, p);
  CHECK(problem.error == kNoError);

  std::vector<double> score(static_cast<size_t>(s.K));
  for_each_query(problem, [&](int64_t b, int64_t h, int64_t i, int64_t row, const int32_t* keys) {
    double largest = -kInf, sum = 0;
    for (int64_t j = 0; j < s.K; ++j) {
      double& x = score[static_cast<size_t>(j)] = -kInf;
      if (keys[j] >= 0) {
        x = p.scale * dot(problem.q, row, problem.k, key_row(s, b, h, keys[j]), s.D);
        if (with_bias) x += problem.bias(b * s.N + i, j);
      }
      largest = std::max(largest, x);
    }
    if (largest > -kInf)
      for (double& x : score) sum += x = std::exp(x - largest);
    // float32: exp to 2 ulp of scores that carry the rounding of a sum of D terms.
    const double tolerance = (16 + 2 * static_cast<double>(s.D)) * epsilon(acc_dtype(dtype));
    CHECK_CLOSE(lse[row], sum > 0 ? largest + std::log(sum) : -kInf, tolerance, tolerance);
    for (int64_t d = 0; d < s.Dv; ++d) {
      double want = 0;
      for (int64_t j = 0; j < s.K && sum > 0; ++j)
        if (keys[j] >= 0)
          want += score[static_cast<size_t>(j)] / sum * problem.v(key_row(s, b, h, keys[j]), d);
      CHECK_CLOSE(out[row * s.Dv + d], want, 2 * epsilon(dtype), 2 * tolerance);
    }
  });

  // The order of the tasks never matters.
  p.out = again.data();
  run(kernels.gather_attention, p, /*reverse=*/true);
  CHECK(std::memcmp(out.data(), again.data(), static_cast<size_t>(out.size()) * size_of(dtype)) ==
        0);
}

// Dropped weights become 0 and the others grow by 1 / (1 - p): with values of 1 an output is a sum
// of kept weights.
void test_dropout(const Kernels& kernels) {
  const Shape s{1, 64, 64, 64, 32, 40, 16, 8, 1};
  const double dropout_p = 0.25;
  Problem problem(s, DType::kFloat64);
  for (int64_t j = 0; j < s.B * s.H_kv * s.M; ++j) problem.v.array.set(j * problem.v.stride, 1);
  Array out(DType::kFloat64, s.B * s.H * s.N), lse = out;
  GatherParams p = problem.params(false);
  p.out = out.data(), p.lse = lse.data();
  p.scale = 0;  // equal weights
  p.dropout_p = static_cast<float>(dropout_p);
  run(kernels.gather_attention, p);

  double kept = 0, slots = 0;
  for_each_query(problem, [&](int64_t, int64_t, int64_t, int64_t row, const int32_t* keys) {
    const auto n = static_cast<double>(s.K - std::count(keys, keys + s.K, -1));
    const double kept_here = out[row] * (1 - dropout_p) * n;
    CHECK_CLOSE(kept_here, std::round(kept_here), 0, 1e-9);
    kept += kept_here, slots += n;
    CHECK_CLOSE(lse[row], std::log(n), 1e-12, 1e-12);  // dropout comes after the softmax
  });
  // Five standard deviations of a binomial; the seed is fixed, so this cannot flicker.
  const double deviation = std::sqrt(dropout_p * (1 - dropout_p) / slots);
  CHECK_CLOSE(kept / slots, 1 - dropout_p, 0, 5 * deviation);
}

void test_bad_index(const Kernels& kernels) {
  const Shape s{1, 2, 2, 2, 3, 20, 8, 16, 16};
  for (const int32_t bad : {20, -2, INT32_MAX, INT32_MIN}) {
    Problem problem(s, DType::kFloat32);
    problem.indices.back() = bad;
    Array out(DType::kFloat32, s.B * s.H * s.N * std::max(s.Dv, s.K)),
        lse(DType::kFloat32, s.B * s.H * s.N);
    GatherParams p = problem.params(false);
    p.out = out.data(), p.lse = lse.data();
    run(kernels.gather_attention, p);
    CHECK(problem.error == kIndexOutOfRange);
    problem.error = kNoError;
    run(kernels.gather_scores, p);
    CHECK(problem.error == kIndexOutOfRange);
  }
}

void test(const Kernels& kernels) {
  for (const Shape& shape : kShapes)
    for (const DType dtype : kAllDTypes) {
      test_scores(kernels, shape, dtype);
      for (const bool with_bias : {false, true}) test_attention(kernels, shape, dtype, with_bias);
    }
  test_dropout(kernels);
  test_bad_index(kernels);
}

}  // namespace
}  // namespace smartbird::testing

int main(int argc, char** argv) {
  return smartbird::testing::run_test(argc, argv, smartbird::testing::test);
}
