// The gradients of gather_scores and gather_attention against loops over the drawn keys in double
// precision.
#include <algorithm>
#include <vector>

#include "gather_problem.h"

namespace smartbird::testing {
namespace {

// The gradients, as the loops compute them.
struct Expected {
  explicit Expected(const Shape& s)
      : dq(static_cast<size_t>(s.B * s.H * s.N * s.D)),
        dk(static_cast<size_t>(s.B * s.H_kv * s.M * s.D)),
        dv(static_cast<size_t>(s.B * s.H_kv * s.M * s.Dv)),
        dbias(static_cast<size_t>(s.B * s.H * s.N * s.K)) {}

  // Adds what the gradient `dscore` of the score of (row, slot) gives, before the scale.
  void add_score(const Problem& problem, int64_t row, int64_t slot, int64_t key, double dscore,
                 double scale) {
    const Shape& s = problem.shape;
    dbias[static_cast<size_t>(row * s.K + slot)] = dscore;
    for (int64_t d = 0; d < s.D; ++d) {
      dq[static_cast<size_t>(row * s.D + d)] += scale * dscore * problem.k(key, d);
      dk[static_cast<size_t>(key * s.D + d)] += scale * dscore * problem.q(row, d);
    }
  }

  std::vector<double> dq, dk, dv, dbias;
};

// How the work is cut into rounds that share scratch: at most so many slices, and so many heads of
// each (all of them, unless one slice).
struct Rounds {
  int64_t slices, heads;
};
constexpr int64_t kAll = INT64_MAX;
constexpr Rounds kRounds[] = {{kAll, kAll}, {2, kAll}, {1, 2}, {1, 1}};

void run_backward(const Kernels& kernels, GatherBackwardParams p, Rounds step) {
  const GatherParams& f = p.fwd;
  const int64_t slices = f.B * f.H_kv, group = f.H / f.H_kv;
  const int64_t slice_step = std::min(step.slices, slices), head_step = std::min(step.heads, group);
  Array slot_grads(acc_dtype(f.dtype), slice_step * head_step * f.N * f.K * 2);
  Array dk_sum(acc_dtype(f.dtype), f.M * f.D), dv_sum(acc_dtype(f.dtype), f.M * f.Dv);
  p.slot_grads = slot_grads.data();
  p.dk_sum = dk_sum.data(), p.dv_sum = dv_sum.data();
  for (p.slice_begin = 0; p.slice_begin < slices; p.slice_begin = p.slice_end) {
    p.slice_end = std::min(p.slice_begin + slice_step, slices);
    for (p.head_begin = 0; p.head_begin < group; p.head_begin = p.head_end) {
      p.head_end = std::min(p.head_begin + head_step, group);
      run(kernels.gather_backward_queries, p);
      run(kernels.gather_backward_keys, p);
    }
  }
}

void check_all(const Array& got, const std::vector<double>& want, double rtol, double atol) {
  for (int64_t i = 0; i < got.size(); ++i)
    CHECK_CLOSE(got[i], want[static_cast<size_t>(i)], rtol, atol);
}

// dk and dv sum over every query that drew the key, at most N * H / H_kv * K terms of a few units.
double sum_tolerance(const Shape& s, DType dtype) {
  const int64_t terms = s.D + s.Dv + s.N * s.K * s.H / s.H_kv;
  return 16 * static_cast<double>(terms) * epsilon(acc_dtype(dtype));
}

void test_scores(const Kernels& kernels, const Shape& s, DType dtype, Rounds rounds) {
  Problem problem(s, dtype);
  GatherBackwardParams p{};
  p.fwd = problem.params(false);
  p.fwd.v = nullptr, p.fwd.Dv = 0;
  Array dout(dtype, s.B * s.H * s.N * s.K);
  Array dq(dtype, s.B * s.H * s.N * s.D), dk(dtype, s.B * s.H_kv * s.M * s.D);
  Expected want(s);
  for_each_query(problem, [&](int64_t b, int64_t h, int64_t, int64_t row, const int32_t* keys) {
    for (int64_t j = 0; j < s.K; ++j)
      if (keys[j] >= 0) {  // elsewhere dout stays NaN, and must not count
        dout.set(row * s.K + j, problem.random.value());
        want.add_score(problem, row, j, key_row(s, b, h, keys[j]), dout[row * s.K + j],
                       p.fwd.scale);
      }
  });
  p.dout = dout.data();
  p.dq = dq.data(), p.dk = dk.data();
  run_backward(kernels, p, rounds);
  check_all(dq, want.dq, 2 * epsilon(dtype), sum_tolerance(s, dtype));
  check_all(dk, want.dk, 2 * epsilon(dtype), sum_tolerance(s, dtype));
}

struct Gradients {
  bool dq, dk, dv, dbias;
};

void test_attention(const Kernels& kernels, const Shape& s, DType dtype, Rounds rounds,
                    Gradients needed) {
  Problem problem(s, dtype);
  GatherBackwardParams p{};
  p.fwd = problem.params(/*with_bias=*/true);
  Array out(dtype, s.B * s.H * s.N * s.Dv), lse(acc_dtype(dtype), s.B * s.H * s.N);
  p.fwd.out = out.data(), p.fwd.lse = lse.data();
  run(kernels.gather_attention, p.fwd);

  Array dout(dtype, out.size()), dlse(acc_dtype(dtype), lse.size());
  for (int64_t i = 0; i < dout.size(); ++i) dout.set(i, problem.random.value());
  for (int64_t i = 0; i < dlse.size(); ++i) dlse.set(i, problem.random.value());
  Array dq(dtype, s.B * s.H * s.N * s.D), dk(dtype, s.B * s.H_kv * s.M * s.D);
  Array dv(dtype, s.B * s.H_kv * s.M * s.Dv);
  Array dbias(acc_dtype(dtype), s.B * s.H * s.N * s.K);
  p.dout = dout.data(), p.dlse = dlse.data();
  p.dq = needed.dq ? dq.data() : nullptr;
  p.dk = needed.dk ? dk.data() : nullptr;
  p.dv = needed.dv ? dv.data() : nullptr;
  p.dbias = needed.dbias ? dbias.data() : nullptr;
  run_backward(kernels, p, rounds);

  Expected want(s);
  for_each_query(problem, [&](int64_t b, int64_t h, int64_t i, int64_t row, const int32_t* keys) {
    std::vector<double> weight(static_cast<size_t>(s.K)), dweight(weight);
    double sum = 0, mean = 0;
    for (size_t j = 0; j < weight.size(); ++j) {
      if (keys[j] < 0) continue;
      const int64_t key = key_row(s, b, h, keys[j]);
      const double bias = problem.bias(b * s.N + i, static_cast<int64_t>(j));
      weight[j] = std::exp(p.fwd.scale * dot(problem.q, row, problem.k, key, s.D) + bias);
      sum += weight[j];
      for (int64_t d = 0; d < s.Dv; ++d) dweight[j] += dout[row * s.Dv + d] * problem.v(key, d);
    }
    for (size_t j = 0; j < weight.size(); ++j) {
      if (keys[j] < 0) continue;
      weight[j] /= sum;
      mean += weight[j] * dweight[j];
    }
    for (size_t j = 0; j < weight.size(); ++j) {
      if (keys[j] < 0) continue;
      const int64_t key = key_row(s, b, h, keys[j]);
      want.add_score(problem, row, static_cast<int64_t>(j), key,
                     weight[j] * (dweight[j] - mean + dlse[row]), p.fwd.scale);
      for (int64_t d = 0; d < s.Dv; ++d)
        want.dv[static_cast<size_t>(key * s.Dv + d)] += weight[j] * dout[row * s.Dv + d];
    }
  });
  // What the forward rounded to dtype (out) enters the gradients through the mean of dweight.
  const double atol = sum_tolerance(s, dtype) + 8 * static_cast<double>(s.Dv) * epsilon(dtype);
  if (needed.dq) check_all(dq, want.dq, 2 * epsilon(dtype), atol);
  if (needed.dk) check_all(dk, want.dk, 2 * epsilon(dtype), atol);
  if (needed.dv) check_all(dv, want.dv, 2 * epsilon(dtype), atol);
  if (needed.dbias) check_all(dbias, want.dbias, 2 * epsilon(dtype), atol);
}

void test(const Kernels& kernels) {
  for (const Shape& s : kShapes) {
    for (const DType dtype : kAllDTypes)
      for (const Rounds rounds : kRounds) {
        test_scores(kernels, s, dtype, rounds);
        test_attention(kernels, s, dtype, rounds, {true, true, true, true});
      }
    test_attention(kernels, s, DType::kFloat32, kRounds[0], {true, false, false, false});
    test_attention(kernels, s, DType::kFloat32, kRounds[0], {false, true, false, false});
    test_attention(kernels, s, DType::kFloat32, kRounds[0], {false, false, true, false});
    test_attention(kernels, s, DType::kFloat32, kRounds[0], {false, false, false, true});
  }
}

}  // namespace
}  // namespace smartbird::testing

int main(int argc, char** argv) {
  return smartbird::testing::run_test(argc, argv, smartbird::testing::test);
}
