// The streamed softmax sums over all valid pairs against loops over the whole score matrix.
#include <algorithm>
#include <vector>

#include "testing.h"

namespace smartbird::testing {
namespace {

constexpr int64_t kTile = 32;

struct Shape {
  int64_t B, H, rows_per_head, cols_per_head, R, C, D, Dv;
};

constexpr Shape kShapes[] = {
    {1, 1, 1, 1, 1, 1, 1, 1},     {2, 1, 1, 1, 5, 40, 16, 8},  {1, 4, 1, 2, 7, 33, 9, 17},
    {2, 4, 2, 1, 40, 70, 24, 16}, {1, 2, 2, 2, 65, 31, 64, 5}, {1, 1, 1, 1, 3, 500, 8, 1},
};

// Columns are packed by the pack kernel, which has a test of its own.
struct Problem {
  Problem(const Kernels& kernels, const Shape& s, DType dtype)
      : random(3),
        acc(acc_dtype(dtype)),
        rows(dtype, s.B * (s.H / s.rows_per_head) * s.R, s.D, random),
        cols(dtype, s.B * (s.H / s.cols_per_head) * s.C, s.D, random),
        row_mask(static_cast<size_t>(s.B * s.R)),
        col_mask(static_cast<size_t>(s.B * s.C)),
        tiles(acc, s.B * (s.H / s.cols_per_head) * padded(s.C) * s.D),
        col_bias(acc, s.B * padded(s.C)) {
    for (auto& valid : row_mask) valid = random.integer(0, 3) > 0;
    for (auto& valid : col_mask) valid = random.integer(0, 3) > 0;
    const PackParams pack{
        .B = s.B,
        .H = s.H / s.cols_per_head,
        .M = s.C,
        .D = s.D,
        .dtype = dtype,
        .to_double = acc == DType::kFloat64,
        .x = cols.array.data(),
        .stride = {s.H / s.cols_per_head * s.C * cols.stride, s.C * cols.stride, cols.stride},
        .key_mask = col_mask.data(),
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
    p.scale = 0.3;
    p.col_tiles = tiles.data(), p.col_bias = col_bias.data();
    p.row_mask = row_mask.data();
    return p;
  }

  Random random;
  DType acc;
  Rows rows, cols;
  std::vector<uint8_t> row_mask, col_mask;
  Array tiles, col_bias;
};
