// The only helpers that know torch: from stable-ABI tensors to the plain values that params.h
// holds.
#pragma once

#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "params.h"

namespace smartbird {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, float64, bfloat16 or float16");
  }
}

// float64 for float64, float32 for all others.
inline ScalarType acc_type(DType dtype) {
  return dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
}
inline int64_t acc_bytes(DType dtype) { return dtype == DType::kFloat64 ? 8 : 4; }

// The public functions check their arguments and say what is wrong; here, where torch.ops is called
// directly, only what keeps a kernel inside its memory.
inline void check_shape(const Tensor& t, const char* name, std::initializer_list<int64_t> shape) {
  bool equal = t.dim() == static_cast<int64_t>(shape.size());
  int64_t d = 0;
  for (const int64_t size : shape) {
    equal = equal && t.size(d) == size;
    ++d;
  }
  STD_TORCH_CHECK(equal, name, " has the wrong shape");
}

inline void check_dim(const Tensor& t, const char* name, int64_t dim) {
  STD_TORCH_CHECK(t.dim() == dim, name, " must have ", dim, " dimensions, got ", t.dim());
}

inline void check_type(const Tensor& t, const char* name, ScalarType type) {
  STD_TORCH_CHECK(t.scalar_type() == type, name, " has the wrong dtype");
}

// The tensor itself where its last dimension is contiguous, else a contiguous copy.
inline Tensor with_contiguous_rows(const Tensor& t) {
  return t.size(t.dim() - 1) <= 1 || t.stride(t.dim() - 1) == 1 ? t : torch::stable::contiguous(t);
}

// The text of a string argument, which the op owns. An argument of type std::string would lose its
// memory in every call: torch's own conversion (seen in 2.13) makes a copy that nothing deletes.
inline std::string take(StringHandle handle) {
  const char* text = nullptr;
  size_t length = 0;
  TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &text));
  TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
  std::string taken(text, length);
  TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
  return taken;
}

template <size_t n>
inline void set_strides(const Tensor& t, int64_t (&stride)[n]) {
  for (size_t d = 0; d < n; ++d) stride[d] = t.stride(static_cast<int64_t>(d));
}

inline Tensor new_tensor(const Tensor& like, std::vector<int64_t> sizes, ScalarType type) {
  return torch::stable::new_empty(like, sizes, type);
}

}  // namespace smartbird
