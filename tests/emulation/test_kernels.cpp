// Every CUDA kernel, emulated and without torch, on small problems with and without wide loads:
// what the sanitizers go through. What the kernels compute is tested at length from Python; here,
// beside that, that a sequence's results do not depend on what stands beside it.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <deque>
#include <vector>

#include "../cpp/testing.h"
#include "cuda/launch.h"

namespace smartbird::testing {
namespace {

#ifdef __SANITIZE_THREAD__  // a hundred times slower
constexpr bool kShort = true;
#else
constexpr bool kShort = false;
#endif

constexpr DType kTensorCoreAndNot[] = {DType::kBFloat16, DType::kFloat32};

struct Matrix {
  Matrix(DType dtype, int64_t rows, int64_t columns, Random& random)
      : array(dtype, rows * columns), columns(columns) {
    for (int64_t i = 0; i < rows * columns; ++i) array.set(i, random.value());
  }
  double operator()(int64_t row, int64_t column) const { return array[row * columns + column]; }
  int64_t rows() const { return array.size() / columns; }

  Array array;
  int64_t columns;
};

// Aligned as device memory is.
struct Aligned {
  Aligned(const Matrix& m, DType dtype)
      : bytes(static_cast<size_t>(m.array.size()) * size_of(dtype)),
        memory(std::aligned_alloc(128, (bytes + 127) / 128 * 128)) {
    if (bytes > 0) std::memcpy(memory, m.array.data(), bytes);
  }
  Aligned(const Aligned&) = delete;
  Aligned& operator=(const Aligned&) = delete;
  ~Aligned() { std::free(memory); }

  const void* at(int64_t element, DType dtype) const {
    return static_cast<const char*>(memory) + static_cast<size_t>(element) * size_of(dtype);
  }

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

// One sequence of N queries and M keys.
Visible one_sequence(int64_t N, int64_t M) {
  Visible v{};
  v.queries = {N, 1, nullptr};
  v.keys = {M, 1, nullptr};
  return v;
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
  p.visible = one_sequence(N, M);
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

// Which keys a row of queries may meet, said once more, without visible.h: one or several packed
// sequences, each with its queries and keys, and rows that belong to none behind them.
struct Layout {
  std::vector<int32_t> cu_q, cu_k;  // empty: one sequence
  int64_t N, M;
  bool is_causal;
  int64_t window;
  std::vector<uint8_t> key_mask;  // [M]

  Visible visible() const {
    Visible v = one_sequence(N, M);
    if (!cu_q.empty()) {
      const auto n = static_cast<int64_t>(cu_q.size()) - 1;
      v.queries = {N, n, cu_q.data()};
      v.keys = {M, n, cu_k.data()};
    }
    v.is_causal = is_causal;
    v.window = window;
    v.key_mask = key_mask.data();
    return v;
  }

  // Whether row j of the keys is among the free keys of row i of the queries.
  bool is_free(int64_t i, int64_t j) const {
    if (key_mask[static_cast<size_t>(j)] == 0) return false;
    Span queries{0, N}, keys{0, M};
    if (!cu_q.empty()) {
      size_t s = 0;
      while (s + 1 < cu_q.size() && !(cu_q[s] <= i && i < cu_q[s + 1])) ++s;
      if (s + 1 == cu_q.size()) return false;
      queries = {cu_q[s], cu_q[s + 1]};
      keys = {cu_k[s], cu_k[s + 1]};
    }
    if (j < keys.begin || j >= keys.end) return false;
    const int64_t key = j - keys.begin;
    const int64_t position =
        i - queries.begin + (keys.end - keys.begin) - (queries.end - queries.begin);
    if (is_causal) return key <= position && (window == 0 || key <= position - window);
    return window == 0 || std::abs(key - position) > window / 2;
  }
};

std::vector<uint8_t> random_mask(int64_t M, Random& random) {
  std::vector<uint8_t> mask(static_cast<size_t>(M));
  for (auto& m : mask) m = random.integer(0, 3) > 0 ? 1 : 0;
  return mask;
}

// Log-sum-exp of H heads against all free keys, and the mean of values of keys and, the other way
// round, of queries.
void test_dense(DType dtype, int64_t D, const Layout& layout, int64_t H_out, int64_t H_v) {
  const int64_t H = 4, H_k = 2, N = layout.N, M = layout.M, Dv = 5;
  const DType acc = acc_dtype(dtype);
  const double scale = 0.2;
  Random random(12);
  const Matrix q(dtype, H * N, D, random), k(dtype, H_k * M, D, random);
  const Matrix of_keys(acc, H_v * M, Dv, random), of_queries(acc, H_v * N, Dv, random),
      weights(acc, H_v * N, 1, random);
  const Aligned q_(q, dtype), k_(k, dtype);
  DenseParams p{};
  p.B = 1, p.H = H, p.R = N, p.C = M, p.D = D, p.Dv = Dv, p.H_out = H_out, p.H_v = H_v;
  p.dtype = dtype;
  p.visible = layout.visible();
  p.rows = q_.memory, p.cols = k_.memory;
  set_strides(p.row_stride, H, N, D);
  set_strides(p.col_stride, H_k, M, D);
  p.rows_per_head = 1, p.cols_per_head = H / H_k;
  p.scale = scale * kLog2e;
  Array lse(acc, H * N), out(acc, H_out * N * Dv), transposed(acc, H_out * M * Dv);
  p.lse = lse.data();
  cuda::run_dense_lse(p, nullptr);
  p.row_shift = lse.data();
  p.values = of_keys.array.data();
  p.out = out.data();
  cuda::run_dense_mean(p, nullptr);

  DenseParams t = p;
  t.R = M, t.C = N;
  t.rows = p.cols, t.cols = p.rows;
  t.cols_are_queries = true;
  std::swap(t.row_stride, t.col_stride);
  std::swap(t.rows_per_head, t.cols_per_head);
  t.row_shift = nullptr, t.col_shift = lse.data();
  t.col_weight = weights.array.data();
  t.values = of_queries.array.data();
  t.out = transposed.data();
  cuda::run_dense_mean(t, nullptr);

  std::vector<double> want(static_cast<size_t>(H_out * N)), want_t(static_cast<size_t>(H_out * M));
  for (int64_t h = 0; h < H; ++h)
    for (int64_t i = 0; i < N; ++i) {
      const int64_t value_head = h / (H / H_v), sum_head = h / (H / H_out);
      const auto weight = [&](int64_t j) {
        return layout.is_free(i, j) ? std::exp(scale * dot(q, h * N + i, k, h / (H / H_k) * M + j))
                                    : 0.0;
      };
      double sum = 0;
      for (int64_t j = 0; j < M; ++j) sum += weight(j);
      CHECK_CLOSE(lse[h * N + i], std::log(sum), 1e-5, 1e-5);
      for (int64_t j = 0; j < M; ++j) {
        if (weight(j) == 0) continue;
        const double w = weight(j) / sum;
        want[static_cast<size_t>(sum_head * N + i)] += w * of_keys(value_head * M + j, 1);
        want_t[static_cast<size_t>(sum_head * M + j)] +=
            w * weights(value_head * N + i, 0) * of_queries(value_head * N + i, 1);
      }
    }
  for (int64_t row = 0; row < H_out * N; ++row)
    CHECK_CLOSE(out[row * Dv + 1], want[static_cast<size_t>(row)], 1e-4, 1e-5);
  for (int64_t row = 0; row < H_out * M; ++row)
    CHECK_CLOSE(transposed[row * Dv + 1], want_t[static_cast<size_t>(row)], 1e-4, 1e-5);
}

void test_dense(DType dtype, int64_t D) {
  Random random(14);
  const Layout one{{}, {}, 20, 70, true, 0, random_mask(70, random)};
  const Layout packed{{0, 18, 18, 30}, {0, 40, 47, 70}, 33, 75, false, 4, random_mask(75, random)};
  if (!kShort || D != 16) test_dense(dtype, D, one, 1, 1);
  if (!kShort || D == 16) test_dense(dtype, D, packed, 2, 4);
  if (kShort) return;
  Layout other = one;
  other.window = 3;
  test_dense(dtype, D, other, 4, 2);
  other = packed;
  other.is_causal = true;
  test_dense(dtype, D, other, 2, 1);
}

// ---- draws --------------------------------------------------------------------------------------

// A call of sketch_sample with what it draws. Sketches [H, rows, S] with strides of their own, so
// that a call may be a part of another.
struct Draws {
  SketchSampleParams p{};
  std::vector<int32_t> indices;
  std::vector<float> log_inclusion;
  std::vector<char> scratch;

  void run() {
    indices.assign(static_cast<size_t>(p.B * p.H_i * p.N * p.K), -7);
    log_inclusion.assign(indices.size(), 7);
    scratch.assign(static_cast<size_t>(cuda::sketch_sample_scratch_bytes(p)), -1);
    p.indices = indices.data(), p.log_inclusion = log_inclusion.data(), p.scratch = scratch.data();
    cuda::run_sketch_sample(p, nullptr);
  }

  const int32_t* keys(int64_t head, int64_t i) const {
    return indices.data() + (head * p.N + i) * p.K;
  }
  const float* log_inclusions(int64_t head, int64_t i) const {
    return log_inclusion.data() + (head * p.N + i) * p.K;
  }
};

// Row (head, i) of `got`, whose keys are numbered from first_key, is row (want_head, want_i) of
// `want`.
void check_same_row(const Draws& got, int64_t head, int64_t i, int64_t first_key, const Draws& want,
                    int64_t want_head, int64_t want_i) {
  int different = 0;
  for (int64_t n = 0; n < got.p.K; ++n) {
    const int32_t key = want.keys(want_head, want_i)[n];
    const int64_t renumbered = key < 0 ? key : key + first_key;
    different += got.keys(head, i)[n] != renumbered ||
                 got.log_inclusions(head, i)[n] != want.log_inclusions(want_head, want_i)[n];
  }
  CHECK(different == 0);
}

// The sketches and masks of one sequence of N queries and M keys.
struct Sketches {
  Sketches(DType dtype, int64_t H_s, int64_t N, int64_t H_ks, int64_t M, int64_t S, Random& random)
      : dtype(dtype),
        H_s(H_s),
        N(N),
        H_ks(H_ks),
        M(M),
        S(S),
        q(dtype, H_s * N, S, random),
        k(dtype, H_ks * M, S, random),
        q_(q, dtype),
        k_(k, dtype),
        key_mask(random_mask(M, random)),
        global_mask(static_cast<size_t>(M)) {
    for (auto& g : global_mask) g = random.integer(0, 9) == 0 ? 1 : 0;
  }

  Draws call(int64_t H_i, int64_t K, SampleMethod method, const int64_t* seed) const {
    Draws draws;
    SketchSampleParams& p = draws.p;
    p.B = 1, p.N = N, p.M = M, p.S = S, p.H_s = H_s, p.H_ks = H_ks, p.H_i = H_i, p.K = K;
    p.dtype = dtype;
    p.visible = one_sequence(N, M);
    p.visible.key_mask = key_mask.data();
    p.visible.global_mask = global_mask.data();
    p.q_sketch = q_.memory, p.k_sketch = k_.memory;
    set_strides(p.q_stride, H_s, N, S);
    set_strides(p.k_stride, H_ks, M, S);
    p.scale = 0.5;
    p.method = method;
    p.device_seed = seed;
    return draws;
  }

  DType dtype;
  int64_t H_s, N, H_ks, M, S;
  Matrix q, k;
  Aligned q_, k_;
  std::vector<uint8_t> key_mask, global_mask;
};

// Rows of distinct valid keys, the forced ones among them, with log_inclusion where it belongs.
void test_sample(DType dtype, int64_t S, SampleMethod method, bool is_causal, bool masked) {
  const int64_t N = 17, M = 75, K = 9, H_i = 4;
  Random random(13);
  const Sketches sketches(dtype, 2, N, 1, M, S, random);
  const int64_t seed[2] = {5, 6};
  Draws draws = sketches.call(H_i, K, method, seed);
  Visible& v = draws.p.visible;
  v.is_causal = is_causal;
  v.window = 2, v.num_sinks = 1;
  if (!masked) v.key_mask = nullptr;
  draws.run();
  const Sequence sequence = sequence_at(v, 0);
  for (int64_t head = 0; head < H_i; ++head)
    for (int64_t i = 0; i < N; ++i) {
      const int64_t position = position_of(v, sequence, i);
      std::vector<int64_t> forced;
      for_each_forced(v, sequence, position, K, [&](int64_t j) { forced.push_back(j); });
      const int32_t* keys = draws.keys(head, i);
      const float* log_inclusion = draws.log_inclusions(head, i);
      for (const int64_t j : forced) CHECK(std::count(keys, keys + K, j) >= 1);
      for (int64_t n = 0; n < K; ++n) {
        const int32_t key = keys[n];
        CHECK(key >= 0 && key < key_limit(v, sequence, position));
        CHECK(v.key_mask == nullptr || v.key_mask[key] == 1);
        if (n > 0)
          CHECK(method == SampleMethod::kMultinomial ? keys[n - 1] <= key : keys[n - 1] < key);
        const bool is_forced = std::find(forced.begin(), forced.end(), key) != forced.end();
        CHECK(std::isfinite(log_inclusion[n]) && (!is_forced || log_inclusion[n] == 0));
        CHECK(method == SampleMethod::kMultinomial || log_inclusion[n] <= 0);
      }
    }
}

// One law per sequence: it draws the same to the last bit alone, packed, chunk by chunk, row by
// row from a growing cache, padded, and head by head.
void test_same_draws(DType dtype, int64_t S, SampleMethod method, bool is_causal) {
  const int64_t K = 9, H_i = 4, H_s = 2, H_ks = 1;
  const int64_t lengths[][2] = {{18, 75}, {3, 40}, {0, 7}, {5, 5}};
  const int64_t ids[] = {3, int64_t{1} << 40, 0, -1}, seed[2] = {5, 6};
  Random random(15);
  std::deque<Sketches> sequences;
  std::vector<int32_t> cu_q{0}, cu_k{0};
  for (const auto& [N, M] : lengths) {
    sequences.emplace_back(dtype, H_s, N, H_ks, M, S, random);
    cu_q.push_back(cu_q.back() + static_cast<int32_t>(N));
    cu_k.push_back(cu_k.back() + static_cast<int32_t>(M));
  }
  // Packed, with rows behind that belong to no sequence.
  Sketches all(dtype, H_s, cu_q.back() + 6, H_ks, cu_k.back() + 2, S, random);
  for (size_t s = 0; s < sequences.size(); ++s) {
    const Sketches& one = sequences[s];
    const auto copy = [&](const Matrix& from, int64_t heads, int64_t rows, const Aligned& to,
                          int64_t all_rows, int64_t first) {
      const size_t row_bytes = static_cast<size_t>(S) * size_of(dtype);
      for (int64_t h = 0; h < heads && rows > 0; ++h)
        std::memcpy(
            static_cast<char*>(to.memory) + static_cast<size_t>(h * all_rows + first) * row_bytes,
            static_cast<const char*>(from.array.data()) + static_cast<size_t>(h * rows) * row_bytes,
            static_cast<size_t>(rows) * row_bytes);
    };
    copy(one.q, H_s, one.N, all.q_, all.N, cu_q[s]);
    copy(one.k, H_ks, one.M, all.k_, all.M, cu_k[s]);
    std::copy(one.key_mask.begin(), one.key_mask.end(), all.key_mask.begin() + cu_k[s]);
    std::copy(one.global_mask.begin(), one.global_mask.end(), all.global_mask.begin() + cu_k[s]);
  }
  const auto n = static_cast<int64_t>(sequences.size());
  const auto set_rules = [&](Draws& draws, const int64_t* sequence_ids) {
    Visible& v = draws.p.visible;
    v.is_causal = is_causal;
    v.window = 2, v.num_sinks = 1;
    v.sequence_ids = sequence_ids;
  };
  Draws packed = all.call(H_i, K, method, seed);
  set_rules(packed, ids);
  packed.p.visible.queries = {all.N, n, cu_q.data()};
  packed.p.visible.keys = {all.M, n, cu_k.data()};
  packed.run();
  for (int64_t head = 0; head < H_i; ++head)
    for (int64_t i = cu_q.back(); i < all.N; ++i)
      for (int64_t slot = 0; slot < K; ++slot)
        CHECK(packed.keys(head, i)[slot] == -1 && packed.log_inclusions(head, i)[slot] == -kInf);

  if (kShort) return;

  for (size_t s = 0; s < sequences.size(); ++s) {
    const Sketches& one = sequences[s];
    if (one.N == 0) continue;
    Draws alone = one.call(H_i, K, method, seed);
    set_rules(alone, ids + s);
    alone.run();
    const auto for_each_row = [&](auto&& f) {
      for (int64_t head = 0; head < H_i; ++head)
        for (int64_t i = 0; i < one.N; ++i) f(head, i);
    };
    for_each_row([&](int64_t head, int64_t i) {
      check_same_row(packed, head, cu_q[s] + i, cu_k[s], alone, head, i);
    });

    // Row by row; where causal from a cache that has only the keys so far.
    for (int64_t i = 0; i < one.N; ++i) {
      Draws row = alone;
      row.p.N = 1;
      row.p.q_sketch = one.q_.at(i * S, dtype);
      row.p.visible.has_offset = true;
      row.p.visible.query_offset = one.M - one.N + i;
      row.p.visible.queries.length = 1;
      if (is_causal) row.p.M = row.p.visible.keys.length = one.M - one.N + i + 1;
      row.run();
      for (int64_t head = 0; head < H_i; ++head) check_same_row(row, head, 0, 0, alone, head, i);
    }

    // Every other row, by positions.
    std::vector<int64_t> positions;
    for (int64_t i = 0; i < one.N; i += 2) positions.push_back(one.M - one.N + i);
    Draws some = alone;
    some.p.N = some.p.visible.queries.length = static_cast<int64_t>(positions.size());
    some.p.q_stride[2] = 2 * S;
    some.p.visible.positions = positions.data();
    some.run();
    for (int64_t head = 0; head < H_i; ++head)
      for (int64_t i = 0; i < some.p.N; ++i) check_same_row(some, head, i, 0, alone, head, 2 * i);

    // One head of each sketch at a time.
    for (int64_t head = 0; head < H_i; ++head) {
      Draws part = alone;
      part.p.H_i = part.p.H_s = part.p.H_ks = 1;
      part.p.q_sketch = one.q_.at(head / (H_i / H_s) * one.N * S, dtype);
      part.p.visible.first_head = head;
      part.run();
      for (int64_t i = 0; i < one.N; ++i) check_same_row(part, 0, i, 0, alone, head, i);
    }
  }

  // Padded on the right to the keys of the packed call: its first sequence, in a longer row of
  // keys.
  Draws alone = sequences[0].call(H_i, K, method, seed), padded = alone;
  set_rules(alone, ids);
  set_rules(padded, ids);
  alone.run();
  std::vector<uint8_t> mask(all.key_mask);
  std::fill(mask.begin() + sequences[0].M, mask.end(), 0);
  padded.p.k_sketch = all.k_.memory;
  padded.p.k_stride[0] = padded.p.k_stride[1] = all.M * S;
  padded.p.M = padded.p.visible.keys.length = all.M;
  padded.p.visible.key_mask = mask.data();
  padded.p.visible.global_mask = all.global_mask.data();
  padded.p.visible.has_offset = true;
  padded.p.visible.query_offset = sequences[0].M - sequences[0].N;
  padded.run();
  for (int64_t head = 0; head < H_i; ++head)
    for (int64_t i = 0; i < sequences[0].N; ++i) check_same_row(padded, head, i, 0, alone, head, i);
}

// Rows of one block of threads whose parts have 8 keys, 256, 264, 512 and 520.
void test_long_rows(SampleMethod method) {
  const int64_t N = 6, M = 24600, H_i = 3, S = 4, K = 50, seed[2] = {5, 6};
  const int64_t positions[N] = {60, 8191, 8192, 16383, 16390, 16391};
  Random random(16);
  const Sketches sketches(DType::kBFloat16, 1, N, 1, M, S, random);
  Draws all = sketches.call(H_i, K, method, seed);
  all.p.visible.is_causal = true;
  all.p.visible.key_mask = nullptr;
  all.p.visible.global_mask = nullptr;
  all.p.visible.positions = positions;
  Draws row = all;
  all.run();
  for (int64_t i = 0; i < N; ++i) {
    row.p.N = row.p.visible.queries.length = 1;
    row.p.M = row.p.visible.keys.length = positions[i] + 1;
    row.p.q_sketch = sketches.q_.at(i * S, DType::kBFloat16);
    row.p.visible.positions = positions + i;
    row.run();
    for (int64_t head = 0; head < H_i; ++head) check_same_row(row, head, 0, 0, all, head, i);
  }
  // All of them as the second sequence of a pack.
  const int32_t cu_q[] = {0, 0, N}, cu_k[] = {0, 0, M};
  const int64_t ids[] = {5, 0};
  Draws packed = all;
  packed.p.visible.queries = {N, 2, cu_q};
  packed.p.visible.keys = {M, 2, cu_k};
  packed.p.visible.sequence_ids = ids;
  packed.p.visible.is_causal = all.p.visible.is_causal = false;
  packed.run();
  all.run();
  for (int64_t head = 0; head < H_i; ++head)
    for (int64_t i = 0; i < N; ++i) check_same_row(packed, head, i, 0, all, head, i);

  // The last of these with all keys, none of them valid that it does not see.
  std::vector<uint8_t> mask(static_cast<size_t>(M));
  std::fill_n(mask.begin(), row.p.M, 1);
  Draws padded = row;
  padded.p.M = padded.p.visible.keys.length = M;
  padded.p.visible.key_mask = mask.data();
  padded.p.visible.is_causal = false;
  padded.run();
  for (int64_t head = 0; head < H_i; ++head) check_same_row(padded, head, 0, 0, row, head, 0);
}

// Dropout of a packed call is that of its sequences alone and of each head alone.
void test_same_dropout() {
  const int64_t H = 4, H_i = 2, K = 12, D = 4, M = 30, cu_q_end = 9;
  const int32_t cu_q[] = {0, 4, 9};
  const int64_t ids[] = {8, 2}, seed[2] = {5, 6};
  const DType dtype = DType::kFloat32;
  Random random(17);
  const Matrix q(dtype, H * cu_q_end, D, random), k(dtype, M, D, random), v(dtype, M, D, random);
  const Aligned q_(q, dtype), k_(k, dtype), v_(v, dtype);
  std::vector<int32_t> indices(static_cast<size_t>(H_i * cu_q_end * K));
  for (auto& index : indices) index = static_cast<int32_t>(random.integer(0, M - 1));
  GatherParams p{};
  p.B = 1, p.H = H, p.H_kv = 1, p.H_i = H_i, p.H_bias = H, p.N = cu_q_end, p.M = M, p.K = K;
  p.D = p.Dv = D;
  p.dtype = dtype;
  p.q = q_.memory, p.k = k_.memory, p.v = v_.memory;
  set_strides(p.q_stride, H, p.N, D);
  set_strides(p.k_stride, 1, M, D);
  set_strides(p.v_stride, 1, M, D);
  set_strides(p.indices_stride, H_i, p.N, K);
  p.indices = indices.data();
  p.scale = 0.3;
  p.dropout_p = 0.5;
  p.device_seed = seed;
  p.visible.queries = p.visible.keys = {p.N, 2, cu_q};
  p.visible.has_offset = true;
  p.visible.query_offset = 7;
  p.visible.sequence_ids = ids;
  p.visible.first_head = 1;
  Array out(dtype, H * cu_q_end * D), lse(dtype, H * cu_q_end);
  p.out = out.data(), p.lse = lse.data();
  cuda::run_gather_attention(p, nullptr);
  int other_draws = 0;
  for (int64_t s = 0; s < 2; ++s)
    for (int64_t h_i = 0; h_i < H_i; ++h_i)
      for (const int64_t shift : {0, 1}) {
        GatherParams part = p;
        const int64_t N = cu_q[s + 1] - cu_q[s], heads = H / H_i;
        part.H = part.H_bias = heads, part.H_i = 1, part.N = N;
        part.q = q_.at((h_i * heads * cu_q_end + cu_q[s]) * D, dtype);
        part.indices = indices.data() + (h_i * cu_q_end + cu_q[s]) * K;
        part.visible = one_sequence(N, M);
        part.visible.has_offset = true;
        part.visible.query_offset = 7 + shift;
        part.visible.sequence_ids = ids + s;
        part.visible.first_head = 1 + h_i;
        Array part_out(dtype, heads * N * D), part_lse(dtype, heads * N);
        part.out = part_out.data(), part.lse = part_lse.data();
        cuda::run_gather_attention(part, nullptr);
        for (int64_t h = 0; h < heads; ++h)
          for (int64_t x = 0; x < N * D; ++x) {
            const double whole = out[((h_i * heads + h) * cu_q_end + cu_q[s]) * D + x];
            if (shift == 0)
              CHECK(part_out[h * N * D + x] == whole);
            else
              other_draws += part_out[h * N * D + x] != whole;
          }
      }
  CHECK(other_draws > 0);
}

int test() {
  constexpr SampleMethod kMethods[] = {SampleMethod::kGumbel, SampleMethod::kSystematic,
                                       SampleMethod::kMultinomial, SampleMethod::kTopK};
  for (const DType dtype : kTensorCoreAndNot) {
    for (const int64_t D : {5, 64}) {
      test_gather(dtype, D, 3, 70);  // few queries: warps share the slots of one
      test_gather(dtype, D, 9, 10);  // many
    }
    for (const int64_t D : {5, 16, 64}) {
      test_dense(dtype, D);
      for (const SampleMethod method : kMethods) test_sample(dtype, D, method, D != 16, D != 64);
    }
    for (const SampleMethod method : kMethods)
      if (!kShort || dtype == DType::kBFloat16)
        test_same_draws(dtype, 16, method, method != SampleMethod::kSystematic);
  }
  test_same_dropout();
  if (kShort) return failures == 0 ? 0 : 1;
  test_same_draws(DType::kBFloat16, 16, SampleMethod::kSystematic, true);
  test_same_draws(DType::kBFloat16, 16, SampleMethod::kGumbel, false);
  for (const SampleMethod method : kMethods) test_long_rows(method);
  return failures == 0 ? 0 : 1;
}

}  // namespace
}  // namespace smartbird::testing

int main() { return smartbird::testing::test(); }
