// The streamed softmax sums over all valid pairs against loops over the whole score matrix.
#include <algorithm>
#include <vector>

#include "testing.h"

namespace smartbird::testing {
namespace {

struct Shape {
  int64_t B, H, rows_per_head, cols_per_head, H_v, H_out, R, C, D, Dv;
};

constexpr Shape kShapes[] = {
    {1, 1, 1, 1, 1, 1, 1, 1, 1, 1},    {2, 1, 1, 1, 1, 1, 5, 40, 16, 8},
    {1, 4, 1, 2, 2, 1, 7, 33, 9, 17},  {2, 4, 2, 1, 1, 2, 40, 70, 24, 16},
    {1, 2, 2, 2, 2, 2, 65, 31, 64, 5}, {1, 1, 1, 1, 1, 1, 3, 500, 8, 1},
};

// Columns are packed by the pack kernel, which has a test of its own.
struct Problem {
  Problem(const Kernels& kernels, const Shape& s, DType dtype, bool cols_are_queries)
      : random(3),
        cols_are_queries(cols_are_queries),
        acc(acc_dtype(dtype)),
        rows(dtype, s.B * (s.H / s.rows_per_head) * s.R, s.D, random),
        cols(dtype, s.B * (s.H / s.cols_per_head) * s.C, s.D, random),
        key_mask(static_cast<size_t>(s.B * (cols_are_queries ? s.R : s.C))),
        tiles(acc, s.B * (s.H / s.cols_per_head) * padded(s.C) * s.D),
        col_bias(acc, s.B * padded(s.C)) {
    for (auto& valid : key_mask) valid = random.integer(0, 3) > 0;
    const PackParams pack{
        .B = s.B,
        .H = s.H / s.cols_per_head,
        .D = s.D,
        .rows = {s.C, s.B, nullptr},
        .dtype = dtype,
        .to_double = acc == DType::kFloat64,
        .x = cols.array.data(),
        .stride = {s.H / s.cols_per_head * s.C * cols.stride, s.C * cols.stride, cols.stride},
        .scale = 1,
        .key_mask = cols_are_queries ? nullptr : key_mask.data(),
        .tiles = tiles.data(),
        .key_bias = col_bias.data(),
        .tile_norm = nullptr,
    };
    run(kernels.pack, pack);
  }

  static int64_t padded(int64_t size) { return (size + kTile - 1) / kTile * kTile; }

  DenseParams params(const Shape& s, DType dtype) {
    DenseParams p{};
    p.B = s.B, p.H = s.H, p.R = s.R, p.C = s.C, p.D = s.D, p.Dv = s.Dv;
    p.dtype = dtype;
    p.rows = rows.array.data();
    p.row_stride[0] = s.H / s.rows_per_head * s.R * rows.stride;
    p.row_stride[1] = s.R * rows.stride, p.row_stride[2] = rows.stride;
    p.rows_per_head = s.rows_per_head, p.cols_per_head = s.cols_per_head;
    p.scale = 0.3 * kLog2e;
    p.col_tiles = tiles.data(), p.col_bias = col_bias.data();
    const Segments rows_of{s.R, s.B, nullptr}, cols_of{s.C, s.B, nullptr};
    p.visible.queries = cols_are_queries ? cols_of : rows_of;
    p.visible.keys = cols_are_queries ? rows_of : cols_of;
    p.visible.key_mask = key_mask.data();
    p.cols_are_queries = cols_are_queries;
    p.H_v = s.H_v, p.H_out = s.H_out;
    return p;
  }

  bool valid(const Shape& s, int64_t b, int64_t r, int64_t c) const {
    return key_mask[static_cast<size_t>(cols_are_queries ? b * s.R + r : b * s.C + c)] != 0;
  }

  Random random;
  bool cols_are_queries;
  DType acc;
  Rows rows, cols;
  std::vector<uint8_t> key_mask;
  Array tiles, col_bias;
};

struct Mask {
  bool is_causal;
  int64_t window;
};

// Whether query i, at position i + offset, has key j among its free keys.
bool is_free(Mask mask, int64_t i, int64_t j, int64_t offset) {
  const int64_t ahead = j - (i + offset);
  if (mask.is_causal) return ahead <= -mask.window;
  return mask.window == 0 || std::abs(ahead) > mask.window / 2;
}

void test_dense(const Kernels& kernels, const Shape& s, DType dtype, Mask mask,
                bool cols_are_queries) {
  Problem problem(kernels, s, dtype, cols_are_queries);
  const DType acc = problem.acc;
  Array lse(acc, s.B * s.H * s.R), row_shift = lse, col_shift(acc, s.B * s.H * s.C);
  Array col_weight(acc, s.B * s.H_v * s.C), values(acc, s.B * s.H_v * s.C * s.Dv),
      out(acc, s.B * s.H_out * s.R * s.Dv);
  for (Array* array : {&row_shift, &col_shift, &col_weight, &values})
    for (int64_t i = 0; i < array->size(); ++i) array->set(i, problem.random.value());

  DenseParams p = problem.params(s, dtype);
  p.visible.is_causal = mask.is_causal;
  p.visible.window = mask.window;
  p.lse = lse.data();
  run(kernels.dense_lse, p);
  p.row_shift = row_shift.data(), p.col_shift = col_shift.data();
  p.col_weight = col_weight.data(), p.values = values.data();
  p.out = out.data();
  run(kernels.dense_mean, p);
  const int64_t offset = cols_are_queries ? s.R - s.C : s.C - s.R;

  // exp to 2 ulp of scores that carry the rounding of a sum of D terms.
  const double rounding = (16 + 4 * static_cast<double>(s.D)) * epsilon(acc);
  for (int64_t b = 0; b < s.B; ++b)
    for (int64_t r = 0; r < s.R; ++r) {
      std::vector<double> mean(static_cast<size_t>(s.H_out * s.Dv));
      double magnitude = 0;
      for (int64_t h = 0; h < s.H; ++h) {
        const int64_t h_out = h / (s.H / s.H_out), h_v = h / (s.H / s.H_v);
        double sum = 0;
        for (int64_t c = 0; c < s.C; ++c) {
          if (!problem.valid(s, b, r, c) ||
              !is_free(mask, cols_are_queries ? c : r, cols_are_queries ? r : c, offset))
            continue;
          const int64_t row = (b * s.H + h) / s.rows_per_head * s.R + r;
          const int64_t col = (b * s.H + h) / s.cols_per_head * s.C + c;
          const int64_t value = (b * s.H_v + h_v) * s.C + c;
          const double score = p.scale / kLog2e * dot(problem.rows, row, problem.cols, col, s.D);
          sum += std::exp(score);
          const double weight = std::exp(score - row_shift[(b * s.H + h) * s.R + r] -
                                         col_shift[(b * s.H + h) * s.C + c]) *
                                col_weight[value];
          magnitude += std::fabs(weight);
          for (int64_t d = 0; d < s.Dv; ++d)
            mean[static_cast<size_t>(h_out * s.Dv + d)] += weight * values[value * s.Dv + d];
        }
        CHECK_CLOSE(lse[(b * s.H + h) * s.R + r], sum > 0 ? std::log(sum) : -kInf, rounding,
                    rounding);
      }
      for (int64_t h_out = 0; h_out < s.H_out; ++h_out)
        for (int64_t d = 0; d < s.Dv; ++d)
          CHECK_CLOSE(out[((b * s.H_out + h_out) * s.R + r) * s.Dv + d],
                      mean[static_cast<size_t>(h_out * s.Dv + d)], rounding,
                      2 * magnitude * rounding);
    }
}

void test(const Kernels& kernels) {
  for (const Shape& shape : kShapes)
    for (const DType dtype : kAllDTypes)
      for (const Mask mask : {Mask{false, 0}, Mask{true, 0}, Mask{false, 5}, Mask{true, 4}})
        for (const bool cols_are_queries : {false, true})
          test_dense(kernels, shape, dtype, mask, cols_are_queries);
}

}  // namespace
}  // namespace smartbird::testing

int main(int argc, char** argv) {
  return smartbird::testing::run_test(argc, argv, smartbird::testing::test);
}
