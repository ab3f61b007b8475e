// pack: key rows rearranged into tiles of 32, masked and missing keys as zeros.
#include <algorithm>
#include <string>
#include <vector>

#include "testing.h"

namespace smartbird::testing {
namespace {

constexpr int64_t kTile = 32;

// Where a tile of kernels with `lanes` floats in a vector has its key c: the keys of a vector are
// as far apart as the tile has vectors.
int64_t place(int64_t c, int64_t lanes, bool interleave) {
  const int64_t vectors = kTile / lanes;
  return interleave ? c % vectors * lanes + c / vectors : c;
}

int64_t lanes_of(const std::string& isa) { return isa == "avx512" ? 16 : (isa == "avx2" ? 8 : 1); }

void test_pack(const Kernels& kernels, DType dtype, int64_t H, int64_t M, int64_t D, bool masked,
               bool interleave) {
  const int64_t lanes = lanes_of(kernels.isa);
  const int64_t B = 2, tiles = (M + kTile - 1) / kTile;
  Random random(1);
  Rows x(dtype, B * H * M, D, random);
  std::vector<uint8_t> key_mask(static_cast<size_t>(B * M));
  for (auto& valid : key_mask) valid = random.integer(0, 2) > 0;

  const DType acc = acc_dtype(dtype);
  Array packed(acc, B * H * tiles * D * kTile), key_bias(acc, B * tiles * kTile);
  std::vector<float> tile_norm(static_cast<size_t>(B * H * tiles));
  const PackParams params{
      .B = B,
      .H = H,
      .D = D,
      .rows = {M, B, nullptr},
      .dtype = dtype,
      .to_double = acc == DType::kFloat64,
      .x = x.array.data(),
      .stride = {H * M * x.stride, M * x.stride, x.stride},
      .scale = 1,
      .interleave = interleave,
      .key_mask = masked ? key_mask.data() : nullptr,
      .tiles = packed.data(),
      .key_bias = key_bias.data(),
      .tile_norm = tile_norm.data(),
  };
  run(kernels.pack, params);

  for (int64_t b = 0; b < B; ++b) {
    const auto valid = [&](int64_t j) {
      return j < M && (!masked || key_mask[static_cast<size_t>(b * M + j)]);
    };
    for (int64_t j = 0; j < tiles * kTile; ++j)
      CHECK(key_bias[b * tiles * kTile + j / kTile * kTile + place(j % kTile, lanes, interleave)] ==
            (valid(j) ? 0 : -kInf));
    for (int64_t h = 0; h < H; ++h)
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t tile = (b * H + h) * tiles + t;
        double largest = 0;
        for (int64_t l = 0; l < kTile; ++l) {
          const int64_t j = t * kTile + l, row = (b * H + h) * M + j;
          for (int64_t d = 0; d < D; ++d)
            CHECK(packed[(tile * D + d) * kTile + place(l, lanes, interleave)] ==
                  (valid(j) ? x(row, d) : 0));
          if (valid(j)) largest = std::max(largest, std::sqrt(dot(x, row, x, row, D)));
        }
        // A bound on scores is made of it, so it may exceed the norm by rounding.
        CHECK_CLOSE(tile_norm[static_cast<size_t>(tile)], largest, 1e-5, 0);
      }
  }
}

// Each sequence of a packed element begins a tile of its own.
void test_packed(const Kernels& kernels) {
  const int32_t cu[] = {0, 5, 5, 70, 102};
  const int64_t n = 4, M = 110, D = 3;
  const Segments rows{M, n, cu};
  const int64_t tiles = rows.blocks_per_batch(kTile);
  Random random(1);
  Rows x(DType::kFloat32, M, D, random);
  Array packed(DType::kFloat32, tiles * D * kTile), key_bias(DType::kFloat32, tiles * kTile);
  const PackParams params{.B = 1,
                          .H = 1,
                          .D = D,
                          .rows = rows,
                          .dtype = DType::kFloat32,
                          .to_double = false,
                          .x = x.array.data(),
                          .stride = {M * x.stride, M * x.stride, x.stride},
                          .scale = 1,
                          .tiles = packed.data(),
                          .key_bias = key_bias.data()};
  run(kernels.pack, params);
  std::vector<int> seen(static_cast<size_t>(tiles * kTile));
  for (int64_t s = 0; s <= n; ++s) {
    const Span span = rows.rows(s);
    for (int64_t j = 0; j < span.end - span.begin; ++j) {
      const int64_t tile = rows.first_block(s, kTile) + j / kTile, column = j % kTile;
      ++seen[static_cast<size_t>(tile * kTile + column)];
      for (int64_t d = 0; d < D; ++d)
        CHECK(packed[(tile * D + d) * kTile + column] == x(span.begin + j, d));
    }
  }
  for (int64_t j = 0; j < tiles * kTile; ++j) {
    CHECK(seen[static_cast<size_t>(j)] <= 1);
    CHECK(key_bias[j] == (seen[static_cast<size_t>(j)] ? 0 : -kInf));
    for (int64_t d = 0; d < D && !seen[static_cast<size_t>(j)]; ++d)
      CHECK(packed[(j / kTile * D + d) * kTile + j % kTile] == 0);
  }
}

void test(const Kernels& kernels) {
  test_packed(kernels);
  for (const DType dtype : kAllDTypes)
    for (const int64_t H : {1, 3})
      for (const int64_t M : {1, 31, 32, 33, 70})
        for (const int64_t D : {1, 7, 16})
          for (const bool masked : {false, true})
            for (const bool interleave : {false, true})
              test_pack(kernels, dtype, H, M, D, masked, interleave);
}

}  // namespace
}  // namespace smartbird::testing

int main(int argc, char** argv) {
  return smartbird::testing::run_test(argc, argv, smartbird::testing::test);
}
