// The distillation loss on sampled keys and its gradients against loops over all pairs.
#include <cmath>
#include <vector>

#include "gather_problem.h"

namespace smartbird::testing {
namespace {

constexpr int64_t kSketchDims[] = {1, 16, 24, 40};

int64_t padded(int64_t size, int64_t to) { return (size + to - 1) / to * to; }

// Everything a key or a row that takes no part may hold is NaN.
struct Sketches {
  Sketches(const Kernels& kernels, Problem* problem, int64_t S, bool is_causal, int64_t window)
      : S(S),
        is_causal(is_causal),
        window(window),
        acc(acc_dtype(problem->dtype)),
        q(problem->dtype, problem->shape.B * problem->shape.N, S, problem->random),
        k(problem->dtype, problem->shape.B * problem->shape.M, S, problem->random),
        mask(static_cast<size_t>(problem->shape.B * problem->shape.M)),
        M_pad(padded(problem->shape.M, kTile)),
        S_pad(padded(S, kFeaturePad)),
        tiles(acc, problem->shape.B * M_pad * S),
        key_bias(acc, problem->shape.B * M_pad),
        k_rows(acc, problem->shape.B * M_pad * S_pad) {
    const Shape& s = problem->shape;
    for (auto& valid : mask) valid = problem->random.integer(0, 4) > 0;
    for (int64_t row = 0; row < s.B * M_pad; ++row) {
      const int64_t b = row / M_pad, m = row % M_pad;
      const bool valid = m < s.M && mask[static_cast<size_t>(b * s.M + m)];
      for (int64_t d = 0; d < S_pad; ++d)
        k_rows.set(row * S_pad + d, valid && d < S ? k(b * s.M + m, d) : 0);
      for (int64_t d = 0; d < S && !valid && m < s.M; ++d)
        k.array.set((b * s.M + m) * k.stride + d, kNan);
    }
    for (int64_t b = 0; b < s.B; ++b) {
      valid_before.push_back(0);
      for (int64_t m = 0; m < s.M; ++m)
        valid_before.push_back(valid_before.back() + mask[static_cast<size_t>(b * s.M + m)]);
    }
    for (int64_t row = 0; row < s.B * s.N; ++row)
      for (int64_t d = 0; d < S && !sees_any(s, row / s.N, row % s.N); ++d)
        q.array.set(row * q.stride + d, kNan);
    const PackParams pack{.B = s.B,
                          .H = 1,
                          .D = S,
                          .rows = {s.M, s.B, nullptr},
                          .dtype = problem->dtype,
                          .to_double = acc == DType::kFloat64,
                          .x = k.array.data(),
                          .stride = {s.M * k.stride, 0, k.stride},
                          .scale = 1,
                          .key_mask = mask.data(),
                          .tiles = tiles.data(),
                          .key_bias = key_bias.data(),
                          .tile_norm = nullptr};
    run(kernels.pack, pack);
  }

  bool sees(const Shape& s, int64_t b, int64_t i, int64_t m) const {
    const int64_t ahead = m - (i + s.M - s.N);
    if (m < 0 || !mask[static_cast<size_t>(b * s.M + m)]) return false;
    return is_causal ? ahead <= -window : window == 0 || std::abs(ahead) > window / 2;
  }
  bool sees_any(const Shape& s, int64_t b, int64_t i) const {
    for (int64_t m = 0; m < s.M; ++m)
      if (sees(s, b, i, m)) return true;
    return false;
  }

  int64_t S;
  bool is_causal;
  int64_t window;
  DType acc;
  Rows q, k;
  std::vector<uint8_t> mask;
  int64_t M_pad, S_pad;
  Array tiles, key_bias, k_rows;
  std::vector<int32_t> valid_before;
};

void test_distill(const Kernels& kernels, const Shape& shape, DType dtype, int64_t S,
                  bool is_causal, int64_t window, bool with_bias, int64_t chunk) {
  Problem problem(shape, dtype);
  const Shape& s = problem.shape;
  Sketches sketches(kernels, &problem, S, is_causal, window);
  const DType acc = sketches.acc;
  const int64_t chunks = (s.N + chunk - 1) / chunk;
  Array dk_parts(acc, s.B * chunks * sketches.M_pad * sketches.S_pad), dq(acc, s.B * s.N * S),
      dk(acc, s.B * s.M * S);
  std::vector<double> loss_parts(static_cast<size_t>(s.B * chunks), kNan);
  DistillParams p{};
  p.gather = problem.params(with_bias);
  p.visible.queries = {s.N, s.B, nullptr}, p.visible.keys = {s.M, s.B, nullptr};
  p.visible.is_causal = is_causal, p.visible.window = window;
  p.visible.key_mask = sketches.mask.data();
  p.H_s = p.H_ks = 1;
  p.S = S, p.S_pad = sketches.S_pad, p.T = sketches.M_pad / kTile, p.part_keys = sketches.M_pad;
  p.q_sketch = sketches.q.array.data();
  p.q_sketch_stride[0] = p.q_sketch_stride[1] = s.N * sketches.q.stride;
  p.q_sketch_stride[2] = sketches.q.stride;
  p.k_rows = sketches.k_rows.data(), p.k_tiles = sketches.tiles.data();
  p.key_bias = sketches.key_bias.data(), p.valid_before = sketches.valid_before.data();
  p.sketch_scale = 0.7, p.row_weight = 0.25, p.chunk = chunk;
  p.loss_parts = loss_parts.data(), p.dk_parts = dk_parts.data();
  p.dq_sketch = dq.data(), p.dk_sketch = dk.data();
  run(kernels.distill_queries, p);
  run(kernels.distill_reduce, p);
  CHECK(problem.error == kNoError);
  double loss = 0;
  for (const double part : loss_parts) loss += part;

  // coefficient[i, m] = mass_i p_im - t_im.
  std::vector<double> want_dk(static_cast<size_t>(s.B * s.M * S));
  double want_loss = 0;
  const double rounding = (64 + 4 * static_cast<double>(S + s.D)) * epsilon(acc);
  for (int64_t b = 0; b < s.B; ++b)
    for (int64_t i = 0; i < s.N; ++i) {
      std::vector<double> coefficient(static_cast<size_t>(s.M)), want_dq(static_cast<size_t>(S));
      double mass = 0, sum = 0, agreement = 0;
      for (int64_t h = 0; h < s.H; ++h) {
        const int32_t* keys =
            problem.indices.data() + ((b * s.H_i + h / (s.H / s.H_i)) * s.N + i) * s.K;
        std::vector<double> weights(static_cast<size_t>(s.K));
        double total = 0;
        for (int64_t j = 0; j < s.K; ++j) {
          if (!sketches.sees(s, b, i, keys[j])) continue;
          const double logit = 0.3 * dot(problem.q, (b * s.H + h) * s.N + i, problem.k,
                                         key_row(s, b, h, keys[j]), s.D);
          weights[static_cast<size_t>(j)] =
              std::exp(logit + (with_bias ? problem.bias(b * s.N + i, j) : 0));
          total += weights[static_cast<size_t>(j)];
        }
        if (total == 0) continue;
        mass += 1.0 / static_cast<double>(s.H);
        for (int64_t j = 0; j < s.K; ++j)
          if (sketches.sees(s, b, i, keys[j]))
            coefficient[static_cast<size_t>(keys[j])] -=
                weights[static_cast<size_t>(j)] / total / static_cast<double>(s.H);
      }
      std::vector<double> score(static_cast<size_t>(s.M), -kInf);
      for (int64_t m = 0; m < s.M; ++m)
        if (sketches.sees(s, b, i, m)) {
          score[static_cast<size_t>(m)] =
              0.7 * dot(sketches.q, b * s.N + i, sketches.k, b * s.M + m, S);
          sum += std::exp(score[static_cast<size_t>(m)]);
        }
      for (int64_t m = 0; m < s.M && sum > 0; ++m) {
        if (!sketches.sees(s, b, i, m)) continue;
        double& c = coefficient[static_cast<size_t>(m)];
        agreement -= c * score[static_cast<size_t>(m)];
        c += mass * std::exp(score[static_cast<size_t>(m)]) / sum;
        for (int64_t d = 0; d < S; ++d) {
          want_dq[static_cast<size_t>(d)] += 0.7 * 0.25 * c * sketches.k(b * s.M + m, d);
          want_dk[static_cast<size_t>((b * s.M + m) * S + d)] +=
              0.7 * 0.25 * c * sketches.q(b * s.N + i, d);
        }
      }
      if (sum > 0) want_loss += 0.25 * (mass * std::log(sum) - agreement);
      for (int64_t d = 0; d < S; ++d)
        CHECK_CLOSE(dq[(b * s.N + i) * S + d], want_dq[static_cast<size_t>(d)], rounding, rounding);
    }
  const double rows = static_cast<double>(s.B * s.N);
  CHECK_CLOSE(loss, want_loss, rounding, rows * rounding);
  for (int64_t j = 0; j < dk.size(); ++j)
    CHECK_CLOSE(dk[j], want_dk[static_cast<size_t>(j)], rounding, rows * rounding);
}

void test(const Kernels& kernels) {
  for (const Shape& shape : kShapes)
    for (const DType dtype : kAllDTypes)
      for (const bool is_causal : {false, true})
        for (const int64_t window : {0, 3})
          for (const int64_t chunk : {int64_t{3}, shape.N})
            test_distill(kernels, shape, dtype, kSketchDims[(shape.K + chunk) % 4], is_causal,
                         window, chunk == 3, chunk);
}

}  // namespace
}  // namespace smartbird::testing

int main(int argc, char** argv) {
  return smartbird::testing::run_test(argc, argv, smartbird::testing::test);
}
