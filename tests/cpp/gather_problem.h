// The inputs that the gather tests share, forward and backward.
#pragma once

#include <algorithm>
#include <vector>

#include "testing.h"

namespace smartbird::testing {

struct Shape {
  int64_t B, H, H_kv, H_i, N, M, K, D, Dv;
};

// Odd sizes leave part of a vector and part of an unrolled loop over; each head ratio is met once.
inline constexpr Shape kShapes[] = {
    {1, 1, 1, 1, 1, 1, 1, 1, 1},    {2, 4, 4, 4, 5, 40, 16, 64, 64},
    {1, 6, 2, 3, 7, 33, 9, 24, 40}, {2, 4, 1, 2, 3, 50, 33, 17, 5},
    {1, 2, 2, 1, 4, 6, 12, 65, 3},  {1, 8, 4, 8, 2, 300, 70, 128, 96},
    {1, 2, 1, 2, 3, 20, 8, 8, 300}, {1, 4, 1, 1, 6, 30, 12, 20, 33},
    {1, 3, 1, 1, 5, 25, 10, 40, 7},
};

struct Problem {
  Problem(const Shape& shape, DType dtype)
      : random(7),
        shape(shape),
        dtype(dtype),
        q(dtype, shape.B * shape.H * shape.N, shape.D, random),
        k(dtype, shape.B * shape.H_kv * shape.M, shape.D, random),
        v(dtype, shape.B * shape.H_kv * shape.M, shape.Dv, random),
        bias(acc_dtype(dtype), shape.B * shape.N, shape.K, random),
        indices(static_cast<size_t>(shape.B * shape.H_i * shape.N * shape.K)) {
    for (auto& index : indices) index = static_cast<int32_t>(random.integer(-1, shape.M - 1));
    // The first query of each index head drew nothing.
    for (int64_t head = 0; head < shape.B * shape.H_i; ++head)
      std::fill_n(indices.begin() + head * shape.N * shape.K, shape.K, -1);
  }

  GatherParams params(bool with_bias) {
    const auto& [B, H, H_kv, H_i, N, M, K, D, Dv] = shape;
    GatherParams p{};
    p.B = B, p.H = H, p.H_kv = H_kv, p.H_i = H_i, p.N = N, p.M = M, p.K = K, p.D = D, p.Dv = Dv;
    p.H_bias = H, p.row_end = N;
    p.visible.queries = {N, B, nullptr}, p.visible.keys = {M, B, nullptr};
    p.dtype = dtype;
    p.q = q.array.data(), p.k = k.array.data(), p.v = v.array.data();
    const auto set_stride = [](int64_t* stride, int64_t heads, int64_t rows, int64_t row) {
      stride[0] = heads * rows * row, stride[1] = rows * row, stride[2] = row;
    };
    set_stride(p.q_stride, H, N, q.stride);
    set_stride(p.k_stride, H_kv, M, k.stride);
    set_stride(p.v_stride, H_kv, M, v.stride);
    set_stride(p.indices_stride, H_i, N, K);
    p.indices = indices.data();
    if (with_bias) {  // one bias for all heads
      p.bias = bias.array.data();
      p.bias_stride[0] = N * bias.stride, p.bias_stride[1] = 0;
      p.bias_stride[2] = bias.stride, p.bias_stride[3] = 1;
    }
    p.scale = 0.3;
    p.seed = 5, p.offset = 6;
    p.error = &error;
    return p;
  }

  Random random;
  Shape shape;
  DType dtype;
  Rows q, k, v, bias;
  std::vector<int32_t> indices;
  int32_t error = kNoError;
};

// Calls body(b, h, i, row, keys): `row` counts (b, h, i), `keys` points at the K indices.
template <typename Body>
void for_each_query(const Problem& problem, Body body) {
  const Shape& s = problem.shape;
  for (int64_t b = 0; b < s.B; ++b)
    for (int64_t h = 0; h < s.H; ++h)
      for (int64_t i = 0; i < s.N; ++i) {
        const int64_t index_row = (b * s.H_i + h / (s.H / s.H_i)) * s.N + i;
        body(b, h, i, (b * s.H + h) * s.N + i, problem.indices.data() + index_row * s.K);
      }
}

inline int64_t key_row(const Shape& s, int64_t b, int64_t h, int32_t key) {
  return (b * s.H_kv + h / (s.H / s.H_kv)) * s.M + key;
}

}  // namespace smartbird::testing
