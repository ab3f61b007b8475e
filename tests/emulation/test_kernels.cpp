// Every CUDA kernel, emulated and without torch, on small problems with and without wide loads:
// what the sanitizers go through. What the kernels compute is tested at length from Python.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <vector>

#include "../cpp/testing.h"
#include "cuda/launch.h"

namespace smartbird::testing {
namespace {

constexpr DType kTensorCoreAndNot[] = {DType::kBFloat16, DType::kFloat32};

struct Matrix {
  Matrix(DType dtype, int64_t rows, int64_t columns, Random& random)
      : array(dtype, rows * columns), columns(columns) {
    for (int64_t i = 0; i < rows * columns; ++i) array.set(i, random.value());
  }
  double operator()(int64_t row, int64_t column) const { return array[row * columns + column]; }

  Array array;
  int64_t columns;
};

// Aligned as device memory is.
struct Aligned {
  Aligned(const Matrix& m, DType dtype)
      : bytes(static_cast<size_t>(m.array.size()) * size_of(dtype)),
        memory(std::aligned_alloc(128, (bytes + 127) / 128 * 128)) {
    std::memcpy(memory, m.array.data(), bytes);
  }
  Aligned(const Aligned&) = delete;
  Aligned& operator=(const Aligned&) = delete;
  ~Aligned() { std::free(memory); }

  size_t bytes;
  void* memory;
};

double dot(const Matrix& a, int64_t i, const Matrix& b, int64_t j) {
  double sum = 0;
  for (int64_t d = 0; d < a.columns; ++d) sum += a(i, d) * b(j, d);
  return sum;
}

void set_strides(int64_t (&stride)[3], int64_t heads, int64_t rows, int64_t columns) {
  stride[0] = heads * rows * columns, stride[1] = rows * columns, stride[2] = columns;
}

// Attention of 2 heads over gathered keys, forward and backward by both ways.
void test_gather(DType dtype, int64_t D, int64_t N, int64_t K) {
  const int64_t H = 2, M = 40, Dv = D;
  const DType acc = acc_dtype(dtype);
  Random random(11);
  const Matrix q(dtype, H * N, D, random), k(dtype, M, D, random), v(dtype, M, Dv, random),
      dout(dtype, H * N, Dv, random);
  const Aligned q_(q, dtype), k_(k, dtype), v_(v, dtype), dout_(dout, dtype);
  std::vector<int32_t> indices(static_cast<size_t>(H * N * K));
  for (auto& index : indices) index = static_cast<int32_t>(random.integer(-1, M - 1));
  const int64_t seed[2] = {3, 4};

  GatherParams p{};
  p.B = 1, p.H = H, p.H_kv = 1, p.H_i = H, p.N = N, p.M = M, p.K = K, p.D = D, p.Dv = Dv;
  p.H_bias = H;
  p.dtype = dtype;
  p.q = q_.memory, p.k = k_.memory, p.v = v_.memory;
  set_strides(p.q_stride, H, N, D);
  set_strides(p.k_stride, 1, M, D);
  set_strides(p.v_stride, 1, M, Dv);
  set_strides(p.indices_stride, H, N, K);
  p.indices = indices.data();
  p.scale = 0.3;
  p.device_seed = seed;
  Array scores(dtype, H * N * K), out(dtype, H * N * Dv), lse(acc, H * N);
  p.out = scores.data();
  cuda::run_gather_scores(p, nullptr);
  p.out = out.data(), p.lse = lse.data();
  cuda::run_gather_attention(p, nullptr);
  for (int64_t row = 0; row < H * N; ++row) {
    double sum = 0;
    for (int64_t j = 0; j < K; ++j) {
      const int32_t key = indices[static_cast<size_t>(row * K + j)];
      const double score = key < 0 ? -kInf : p.scale * dot(q, row, k, key);
      CHECK_CLOSE(scores[row * K + j], score, 2 * epsilon(dtype), 0.01 * epsilon(DType::kFloat16));
      sum += std::exp(score);
    }
    CHECK_CLOSE(lse[row], std::log(sum), 1e-5, 1e-5);
    double want = 0;
    for (int64_t j = 0; j < K; ++j) {
      const int32_t key = indices[static_cast<size_t>(row * K + j)];
      if (key >= 0) want += std::exp(p.scale * dot(q, row, k, key)) / sum * v(key, 0);
    }
    CHECK_CLOSE(out[row * Dv], want, 2 * epsilon(dtype), 1e-5);
  }

  // Gradients by atomic additions, then by key.
  p.dropout_p = 0.3;
  Array dq(dtype, H * N * D), dbias(acc, H * N * K), dk_sum(acc, M * D), dv_sum(acc, M * Dv),
      dk(dtype, M * D), dv(dtype, M * Dv), slot_grads(acc, H * N * K * 2);
  for (int64_t i = 0; i < M * D; ++i) dk_sum.set(i, 0), dv_sum.set(i, 0);
  GatherBackwardParams g{};
  g.fwd = p;
  g.dout = dout_.memory;
  g.dq = dq.data(), g.dbias = dbias.data();
  g.dk_sum = dk_sum.data(), g.dv_sum = dv_sum.data();
  cuda::run_gather_backward_queries(g, nullptr);

  std::vector<int32_t> keys, entries;
  for (int64_t h = 0; h < H; ++h) {
    const int32_t* list = indices.data() + h * N * K;
    const size_t begin = entries.size();
    for (int32_t e = 0; e < N * K; ++e) entries.push_back(e);
    std::stable_sort(entries.begin() + static_cast<int64_t>(begin), entries.end(),
                     [&](int32_t a, int32_t b) { return list[a] < list[b]; });
    for (size_t e = begin; e < entries.size(); ++e) keys.push_back(list[entries[e]]);
  }
  std::vector<int64_t> key_start(static_cast<size_t>(H * (M + 1)));
  cuda::run_find_key_starts(p, keys.data(), key_start.data(), nullptr);
  g.dk_sum = g.dv_sum = nullptr;
  g.slot_grads = slot_grads.data();
  cuda::run_gather_backward_queries(g, nullptr);
  g.dk = dk.data(), g.dv = dv.data();
  g.key_start = key_start.data(), g.entries = entries.data();
  cuda::run_gather_backward_keys(g, nullptr);
  for (int64_t i = 0; i < M * D; ++i) {
    CHECK_CLOSE(dk[i], dk_sum[i], 2 * epsilon(dtype), 1e-4);
    CHECK_CLOSE(dv[i], dv_sum[i], 2 * epsilon(dtype), 1e-4);
  }
}

// Log-sum-exp and mean of 2 heads against all keys, with a mask and causal.
void test_dense(DType dtype, int64_t D) {
  const int64_t H = 2, N = 20, M = 70, Dv = 5;
  const DType acc = acc_dtype(dtype);
  Random random(12);
  const Matrix q(dtype, H * N, D, random), k(dtype, M, D, random), values(acc, M, Dv, random);
  const Aligned q_(q, dtype), k_(k, dtype);
  std::vector<uint8_t> mask(static_cast<size_t>(M));
  for (auto& m : mask) m = random.integer(0, 3) > 0 ? 1 : 0;
  DenseParams p{};
  p.B = 1, p.H = H, p.R = N, p.C = M, p.D = D, p.Dv = Dv;
  p.dtype = dtype;
  p.rows = q_.memory, p.cols = k_.memory;
  set_strides(p.row_stride, H, N, D);
  set_strides(p.col_stride, 1, M, D);
  p.rows_per_head = 1, p.cols_per_head = 2;
  p.scale = 0.2 * kLog2e;
  p.col_mask = mask.data();
  p.is_causal = true;
  p.causal_offset = M - N - 30;
  Array lse(acc, H * N), out(acc, N * Dv);
  p.lse = lse.data();
  cuda::run_dense_lse(p, nullptr);
  p.row_shift = lse.data();
  p.values = values.array.data();
  p.out = out.data();
  cuda::run_dense_mean(p, nullptr);
  for (int64_t i = 0; i < N; ++i) {
    double want = 0;
    for (int64_t h = 0; h < H; ++h) {
      double sum = 0, product = 0;
      for (int64_t j = 0; j <= i + p.causal_offset; ++j) {
        if (mask[static_cast<size_t>(j)] == 0) continue;
        const double weight = std::exp(0.2 * dot(q, h * N + i, k, j));
        sum += weight, product += weight * values(j, 1);
      }
      CHECK_CLOSE(lse[h * N + i], std::log(sum), 1e-5, 1e-5);
      want += product / sum;
    }
    CHECK_CLOSE(out[i * Dv + 1], want, 1e-4, 1e-5);
  }
}

// Rows of distinct valid keys, the forced ones among them, with log_inclusion where it belongs.
void test_sample(DType dtype, int64_t S, SampleMethod method) {
  const int64_t N = 17, M = 75, K = 9, H_i = 1;
  Random random(13);
  const Matrix q(dtype, N, S, random), k(dtype, M, S, random);
  const Aligned q_(q, dtype), k_(k, dtype);
  std::vector<uint8_t> mask(static_cast<size_t>(M), 1);
  mask[0] = mask[33] = 0;
  const int64_t seed[2] = {5, 6};
  SketchSampleParams p{};
  p.B = 1, p.N = N, p.M = M, p.S = S, p.H_i = H_i, p.K = K;
  p.dtype = dtype;
  p.q_sketch = q_.memory, p.k_sketch = k_.memory;
  p.q_stride[0] = N * S, p.q_stride[1] = S, p.k_stride[0] = M * S, p.k_stride[1] = S;
  p.key_mask = mask.data();
  p.scale = 0.5;
  p.method = method;
  p.is_causal = true;
  p.window = 2, p.num_sinks = 1;
  p.device_seed = seed;
  std::vector<int32_t> indices(static_cast<size_t>(H_i * N * K), -7);
  std::vector<float> log_inclusion(indices.size());
  p.indices = indices.data(), p.log_inclusion = log_inclusion.data();
  cuda::run_sketch_sample(p, nullptr);
  for (int64_t row = 0; row < H_i * N; ++row) {
    const int64_t i = row % N, last = i + M - N;
    const int32_t* keys = indices.data() + row * K;
    CHECK(keys[0] == 1 && std::count(keys, keys + K, last) >= 1);
    for (int64_t j = 0; j < K; ++j) {
      CHECK(keys[j] >= 0 && keys[j] <= last && mask[static_cast<size_t>(keys[j])] == 1);
      if (j > 0)
        CHECK(method == SampleMethod::kMultinomial ? keys[j - 1] <= keys[j]
                                                   : keys[j - 1] < keys[j]);
      const float x = log_inclusion[static_cast<size_t>(row * K + j)];
      CHECK(std::isfinite(x) && (keys[j] < last - 1 || x == 0));
    }
  }
}

int test() {
  for (const DType dtype : kTensorCoreAndNot) {
    for (const int64_t D : {5, 64}) {
      test_gather(dtype, D, 3, 70);  // few queries: warps share the slots of one
      test_gather(dtype, D, 9, 10);  // many
    }
    for (const int64_t D : {5, 16, 64}) {
      test_dense(dtype, D);
      for (const SampleMethod method : {SampleMethod::kGumbel, SampleMethod::kSystematic,
                                        SampleMethod::kMultinomial, SampleMethod::kTopK})
        test_sample(dtype, D, method);
    }
  }
  return failures == 0 ? 0 : 1;
}

}  // namespace
}  // namespace smartbird::testing

int main() { return smartbird::testing::test(); }
