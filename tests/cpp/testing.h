// What the kernel tests share: checks that count failures, arrays in the kernels' dtypes whose
// values the reference loops read as doubles, and a runner that plays the thread pool.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <new>
#include <random>
#include <vector>

#include "cpu/kernels.h"

namespace smartbird::testing {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr int kSkipped = 77;  // the exit code that CMakeLists.txt tells ctest to read as "skipped"

inline int failures = 0;

#define CHECK(condition)                                                           \
  do {                                                                             \
    if (!(condition)) {                                                            \
      ++smartbird::testing::failures;                                              \
      std::fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition); \
    }                                                                              \
  } while (false)

// Equal up to atol + rtol * |want|; infinities and zeros of a tolerance of 0 must agree exactly.
#define CHECK_CLOSE(got, want, rtol, atol)                                                     \
  do {                                                                                         \
    const double g_ = (got), w_ = (want);                                                      \
    if (!(g_ == w_ || std::fabs(g_ - w_) <= (atol) + (rtol) * std::fabs(w_))) {                \
      ++smartbird::testing::failures;                                                          \
      std::fprintf(stderr, "%s:%d: %s is %.9g, expected %.9g\n", __FILE__, __LINE__, #got, g_, \
                   w_);                                                                        \
    }                                                                                          \
  } while (false)

// ---- arrays -----------------------------------------------------------------------------------

constexpr DType kAllDTypes[] = {DType::kFloat32, DType::kFloat64, DType::kBFloat16,
                                DType::kFloat16};

inline size_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return 8;
    case DType::kFloat32:
      return 4;
    case DType::kBFloat16:
    case DType::kFloat16:
      return 2;
  }
  return 0;
}

// The type sums are kept in.
inline DType acc_dtype(DType dtype) {
  return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

// Relative rounding error of one stored value.
inline double epsilon(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return 0x1p-53;
    case DType::kFloat32:
      return 0x1p-24;
    case DType::kBFloat16:
      return 0x1p-8;
    case DType::kFloat16:
      return 0x1p-11;
  }
  return 0;
}

// The bits of a value that bfloat16 or float16 can hold exactly; all the tests' inputs are such.
inline uint16_t half_bits(DType dtype, double value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const bool bf16 = dtype == DType::kBFloat16;
  const int mantissa_bits = bf16 ? 7 : 10, bias = bf16 ? 127 : 15;
  const uint16_t infinity = bf16 ? 0x7F80 : 0x7C00;
  if (std::isnan(value)) return infinity | 1u;
  if (std::isinf(value)) return sign | infinity;
  if (value == 0) return sign;
  int exponent = 0;  // |value| = fraction * 2^exponent, fraction in [1/2, 1)
  const double fraction = std::frexp(std::fabs(value), &exponent);
  const auto mantissa = static_cast<uint16_t>((2 * fraction - 1) * (1 << mantissa_bits));
  return sign | static_cast<uint16_t>((exponent - 1 + bias) << mantissa_bits) | mantissa;
}

inline double half_value(DType dtype, uint16_t bits) {
  const bool bf16 = dtype == DType::kBFloat16;
  const int mantissa_bits = bf16 ? 7 : 10, bias = bf16 ? 127 : 15, top = bf16 ? 0xFF : 0x1F;
  const double sign = bits & 0x8000u ? -1 : 1;
  const int exponent = (bits >> mantissa_bits) & top;
  const double mantissa =
      static_cast<double>(bits & ((1u << mantissa_bits) - 1)) / (1 << mantissa_bits);
  if (exponent == top) return mantissa == 0 ? sign * kInf : kNan;
  if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias);
  return sign * std::ldexp(1 + mantissa, exponent - bias);
}

// A dense array of one dtype. Its memory is exactly as long as its values, so that AddressSanitizer
// sees the first element read or written beyond them. It starts as NaN.
class Array {
 public:
  Array(DType dtype, int64_t size)
      : dtype_(dtype), size_(size), bytes_(static_cast<size_t>(size) * size_of(dtype)) {
    for (int64_t i = 0; i < size; ++i) set(i, kNan);
  }

  int64_t size() const { return size_; }
  void* data() { return bytes_.data(); }
  const void* data() const { return bytes_.data(); }

  double operator[](int64_t i) const {
    switch (dtype_) {
      case DType::kFloat32:
        return get<float>(i);
      case DType::kFloat64:
        return get<double>(i);
      default:
        return half_value(dtype_, get<uint16_t>(i));
    }
  }

  void set(int64_t i, double value) {
    switch (dtype_) {
      case DType::kFloat32:
        return put(i, static_cast<float>(value));
      case DType::kFloat64:
        return put(i, value);
      default:
        return put(i, half_bits(dtype_, value));
    }
  }

 private:
  template <typename T>
  T get(int64_t i) const {
    T x;
    std::memcpy(&x, bytes_.data() + static_cast<size_t>(i) * sizeof(T), sizeof(T));
    return x;
  }
  template <typename T>
  void put(int64_t i, T x) {
    std::memcpy(bytes_.data() + static_cast<size_t>(i) * sizeof(T), &x, sizeof(T));
  }

  DType dtype_;
  int64_t size_;
  std::vector<unsigned char> bytes_;
};

// Multiples of 1/16 in [-2, 2): exact in every dtype, so that all dtypes share one expected result.
class Random {
 public:
  explicit Random(uint32_t seed) : engine_(seed) {}
  double value() { return static_cast<double>(integer(-32, 31)) / 16; }
  int64_t integer(int64_t low, int64_t high) {  // both inclusive
    return low + static_cast<int64_t>(engine_() % static_cast<uint64_t>(high - low + 1));
  }

 private:
  std::mt19937 engine_;
};

// A [rows..., row_size] array with a NaN after each row: the last dimension is contiguous, the
// others are not.
struct Rows {
  Rows(DType dtype, int64_t rows, int64_t row_size, Random& random)
      : array(dtype, rows * (row_size + 1)), stride(row_size + 1) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < row_size; ++c) array.set(r * stride + c, random.value());
  }
  double operator()(int64_t row, int64_t column) const { return array[row * stride + column]; }

  Array array;
  int64_t stride;
};

inline double dot(const Rows& a, int64_t i, const Rows& b, int64_t j, int64_t size) {
  double sum = 0;
  for (int64_t d = 0; d < size; ++d) sum += a(i, d) * b(j, d);
  return sum;
}

// ---- running a kernel -------------------------------------------------------------------------

// Runs every task of a kernel, last to first if `reverse`, each on scratch that holds NaN (all bits
// set).
template <typename Params>
void run(const TaskKernel<Params>& kernel, const Params& params, bool reverse = false) {
  const int64_t num_tasks = kernel.num_tasks(params);
  const auto bytes = static_cast<size_t>(kernel.scratch_bytes(params));
  const std::align_val_t alignment{64};
  for (int64_t i = 0; i < num_tasks; ++i) {
    void* scratch = ::operator new(bytes, alignment);
    std::memset(scratch, 0xFF, bytes);
    kernel.run(params, reverse ? num_tasks - 1 - i : i, scratch);
    ::operator delete(scratch, alignment);
  }
}

// main() of a kernel test: `test` is given the table of the instruction set named on the command
// line.
inline int run_test(int argc, char** argv, void (*test)(const Kernels&)) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: %s scalar|avx2|avx512\n", argv[0]);
    return 2;
  }
  const Kernels* kernels = kernels_for(argv[1]);
  if (kernels == nullptr) {
    std::printf("this processor has no %s\n", argv[1]);
    return kSkipped;
  }
  test(*kernels);
  return failures == 0 ? 0 : 1;
}

}  // namespace smartbird::testing
