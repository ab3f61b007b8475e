// From the ops' arguments to params structs: what the ops of every device check and fill in alike.
// Tensors must outlive the params that point into them.
#pragma once

#include <algorithm>
#include <string>

#include "torch_utils.h"

namespace smartbird {

using OptionalTensor = std::optional<Tensor>;

// Replaces *mask by a contiguous tensor where it is not one.
inline const uint8_t* mask_data(OptionalTensor* mask, int64_t B, int64_t M) {
  if (!mask->has_value()) return nullptr;
  check_type(**mask, "key_mask", ScalarType::Bool);
  check_shape(**mask, "key_mask", {B, M});
  *mask = torch::stable::contiguous(**mask);
  return static_cast<const uint8_t*>((*mask)->const_data_ptr());
}

inline SampleMethod method_named(const std::string& name) {
  if (name == "gumbel") return SampleMethod::kGumbel;
  if (name == "systematic") return SampleMethod::kSystematic;
  if (name == "multinomial") return SampleMethod::kMultinomial;
  STD_TORCH_CHECK(name == "topk", "method must be gumbel, systematic, multinomial or topk, got ",
                  name);
  return SampleMethod::kTopK;
}

// Sizes, queries and what may be drawn; not keys, seed, mask or outputs.
inline SketchSampleParams sketch_sample_params(const Tensor& q_sketch, const Tensor& k_sketch,
                                               int64_t num_samples, int64_t num_index_heads,
                                               const std::string& method, double scale,
                                               bool is_causal, int64_t window, int64_t num_sinks) {
  check_dim(q_sketch, "q_sketch", 3);
  check_dim(k_sketch, "k_sketch", 3);
  check_shape(k_sketch, "k_sketch", {q_sketch.size(0), k_sketch.size(1), q_sketch.size(2)});
  check_type(k_sketch, "k_sketch", q_sketch.scalar_type());
  STD_TORCH_CHECK(
      num_samples >= 1 && num_index_heads >= 1 && window >= 0 && num_sinks >= 0,
      "num_samples and num_index_heads must be at least 1, window and num_sinks at least 0");
  STD_TORCH_CHECK(window <= num_samples && num_sinks <= num_samples && num_samples <= INT32_MAX,
                  "num_samples must be below 2^31, window and num_sinks no larger than it");
  STD_TORCH_CHECK(q_sketch.size(2) >= 1, "S must be at least 1");
  STD_TORCH_CHECK(k_sketch.size(1) <= INT32_MAX, "smartbird: M must be below 2^31");
  const int64_t forced = num_sinks + (is_causal || window == 0 ? window : window / 2 * 2 + 1);
  STD_TORCH_CHECK(forced <= num_samples, "window and num_sinks force more keys than num_samples");
  SketchSampleParams p{};
  p.B = q_sketch.size(0);
  p.N = q_sketch.size(1);
  p.S = q_sketch.size(2);
  p.M = k_sketch.size(1);
  p.K = num_samples;
  p.H_i = num_index_heads;
  p.dtype = dtype_of(q_sketch, "q_sketch");
  p.q_sketch = q_sketch.const_data_ptr();
  set_strides(q_sketch, p.q_stride);
  p.scale = scale;
  p.method = method_named(method);
  p.is_causal = is_causal;
  p.window = window;
  p.num_sinks = num_sinks;
  p.row_end = p.N;
  return p;
}

// Everything but indices, v, bias, dropout and the outputs.
inline GatherParams gather_params(const Tensor& q, const Tensor& k, int64_t num_index_heads,
                                  int64_t num_samples, double scale) {
  check_dim(q, "q", 4);
  check_dim(k, "k", 4);
  GatherParams p{};
  p.B = q.size(0);
  p.H = q.size(1);
  p.N = q.size(2);
  p.D = q.size(3);
  p.H_kv = k.size(1);
  p.M = k.size(2);
  p.H_i = num_index_heads;
  p.K = num_samples;
  check_shape(k, "k", {p.B, p.H_kv, p.M, p.D});
  check_type(k, "k", q.scalar_type());
  STD_TORCH_CHECK(p.H_kv > 0 && p.H % p.H_kv == 0,
                  "the heads of q must be a multiple of the heads of k");
  STD_TORCH_CHECK(p.H_i > 0 && p.H % p.H_i == 0,
                  "the heads of q must be a multiple of the heads of indices");
  STD_TORCH_CHECK(p.D >= 1 && p.K >= 1, "D and K must be at least 1");
  STD_TORCH_CHECK(p.M <= INT32_MAX, "smartbird: M must be below 2^31");
  STD_TORCH_CHECK(p.N * p.K <= INT32_MAX, "smartbird: N * K must be below 2^31");
  p.dtype = dtype_of(q, "q");
  p.q = q.const_data_ptr();
  set_strides(q, p.q_stride);
  p.k = k.const_data_ptr();
  set_strides(k, p.k_stride);
  p.scale = scale;
  p.row_end = p.N;
  return p;
}

// The same with indices.
inline GatherParams gather_params(const Tensor& q, const Tensor& k, const Tensor& indices,
                                  double scale) {
  check_dim(indices, "indices", 4);
  GatherParams p = gather_params(q, k, indices.size(1), indices.size(3), scale);
  check_shape(indices, "indices", {p.B, p.H_i, p.N, p.K});
  check_type(indices, "indices", ScalarType::Int);
  p.indices = indices.const_data_ptr<int32_t>();
  set_strides(indices, p.indices_stride);
  return p;
}

// bias [B, H or H_i, N, K]; or none.
inline void add_bias(const OptionalTensor& bias, GatherParams* p) {
  if (!bias.has_value()) return;
  check_type(*bias, "bias", acc_type(p->dtype));
  check_dim(*bias, "bias", 4);
  p->H_bias = bias->size(1) == p->H_i ? p->H_i : p->H;
  check_shape(*bias, "bias", {p->B, p->H_bias, p->N, p->K});
  p->bias = bias->const_data_ptr();
  set_strides(*bias, p->bias_stride);
}

// v, bias and dropout, without the seed.
inline void add_values(const Tensor& v, const OptionalTensor& bias, double dropout_p,
                       const OptionalTensor& seed, GatherParams* p) {
  check_dim(v, "v", 4);
  check_shape(v, "v", {p->B, p->H_kv, p->M, v.size(3)});
  STD_TORCH_CHECK(dtype_of(v, "v") == p->dtype, "v must have the dtype of q");
  p->Dv = v.size(3);
  STD_TORCH_CHECK(p->Dv >= 1, "Dv must be at least 1");
  p->v = v.const_data_ptr();
  set_strides(v, p->v_stride);
  add_bias(bias, p);
  STD_TORCH_CHECK(dropout_p >= 0 && dropout_p <= 1, "dropout_p must be in [0, 1]");
  STD_TORCH_CHECK(dropout_p == 0 || seed.has_value(), "dropout needs a seed");
  p->dropout_p = dropout_p;
}

inline void check_dense(const Tensor& q, const Tensor& k) {
  STD_TORCH_CHECK(q.dim() == k.dim() && (q.dim() == 3 || q.dim() == 4),
                  "q and k must have 3 or 4 dimensions alike");
  STD_TORCH_CHECK(q.size(0) == k.size(0) && q.size(q.dim() - 1) == k.size(k.dim() - 1),
                  "q and k must agree in batch and feature size");
  STD_TORCH_CHECK(q.dim() == 3 || (k.size(1) > 0 && q.size(1) > 0 && q.size(1) % k.size(1) == 0),
                  "the heads of q must be a multiple of the heads of k");
  check_type(k, "k", q.scalar_type());
}

// Contiguous, in the accumulation type of `dtype`.
inline Tensor to_acc(const Tensor& t, DType dtype) {
  return torch::stable::contiguous(torch::stable::to(t, acc_type(dtype)));
}

}  // namespace smartbird
