// From the ops' arguments to params structs: what the ops of every device check and fill in alike.
// Tensors must outlive the params that point into them.
#pragma once

#include <algorithm>
#include <string>

#include "torch_utils.h"

namespace smartbird {

using OptionalTensor = std::optional<Tensor>;

// ---- who the rows are ---------------------------------------------------------------------------

// What an op is told of its rows: see visible.h and registration.cpp. Tensors are made contiguous
// in place and must outlive the Visible that points into them.
struct RowArguments {
  bool is_causal = false;
  OptionalTensor key_mask{};
  int64_t window = 0, num_sinks = 0;
  OptionalTensor global_mask{};
  std::optional<int64_t> query_offset{};
  OptionalTensor positions{}, cu_seqlens_q{}, cu_seqlens_k{}, sequence_ids{};
  int64_t first_head = 0;

  // Of B batch elements of N queries and M keys.
  Visible visible(int64_t B, int64_t N, int64_t M) {
    STD_TORCH_CHECK(window >= 0 && num_sinks >= 0 && first_head >= 0,
                    "window, num_sinks and first_head must be at least 0");
    STD_TORCH_CHECK(M <= INT32_MAX, "smartbird: M must be below 2^31");
    Visible v{};
    v.queries = segments(&cu_seqlens_q, "cu_seqlens_q", B, N);
    v.keys = segments(&cu_seqlens_k, "cu_seqlens_k", B, M);
    STD_TORCH_CHECK(v.queries.n == v.keys.n && (v.queries.cu == nullptr) == (v.keys.cu == nullptr),
                    "cu_seqlens_q and cu_seqlens_k must name the same sequences");
    v.positions = data<int64_t>(&positions, "positions", ScalarType::Long, {B, N});
    v.has_offset = query_offset.has_value();
    v.query_offset = query_offset.value_or(0);
    v.sequence_ids = data<int64_t>(&sequence_ids, "sequence_ids", ScalarType::Long, {v.queries.n});
    v.first_head = first_head;
    v.is_causal = is_causal;
    v.window = window;
    v.num_sinks = num_sinks;
    v.key_mask = mask_data(&key_mask, "key_mask", B, M);
    v.global_mask = mask_data(&global_mask, "global_mask", B, M);
    return v;
  }

 private:
  template <typename T>
  static const T* data(OptionalTensor* t, const char* name, ScalarType type,
                       std::initializer_list<int64_t> shape) {
    if (!t->has_value()) return nullptr;
    check_type(**t, name, type);
    check_shape(**t, name, shape);
    *t = torch::stable::contiguous(**t);
    return (*t)->const_data_ptr<T>();
  }

  static const uint8_t* mask_data(OptionalTensor* mask, const char* name, int64_t B, int64_t M) {
    return reinterpret_cast<const uint8_t*>(data<bool>(mask, name, ScalarType::Bool, {B, M}));
  }

  static Segments segments(OptionalTensor* cu, const char* name, int64_t B, int64_t length) {
    if (!cu->has_value()) return {length, B, nullptr};
    check_dim(**cu, name, 1);
    STD_TORCH_CHECK(B == 1 && (*cu)->size(0) >= 1, name, " needs a batch of 1 and an entry");
    const int64_t n = (*cu)->size(0) - 1;
    return {length, n, data<int32_t>(cu, name, ScalarType::Int, {n + 1})};
  }
};

// Of queries, as dropout needs them. Where nothing is said of the keys of a pack, a sequence has as
// many as queries: positions count from 0 unless told otherwise.
inline Visible query_rows(int64_t B, int64_t N, int64_t M, RowArguments* rows) {
  if (!rows->cu_seqlens_k.has_value() && rows->cu_seqlens_q.has_value()) {
    rows->cu_seqlens_k = rows->cu_seqlens_q;
    M = N;
  }
  return rows->visible(B, N, M);
}

// ---- the ops' own inputs ------------------------------------------------------------------------

inline SampleMethod method_named(const std::string& name) {
  if (name == "gumbel") return SampleMethod::kGumbel;
  if (name == "systematic") return SampleMethod::kSystematic;
  if (name == "multinomial") return SampleMethod::kMultinomial;
  STD_TORCH_CHECK(name == "topk", "method must be gumbel, systematic, multinomial or topk, got ",
                  name);
  return SampleMethod::kTopK;
}

// Heads of queries and keys: H a multiple of H_k.
inline void check_groups(int64_t H, int64_t H_k, const char* what) {
  STD_TORCH_CHECK(H_k > 0 && H > 0 && H % H_k == 0, what);
}

// Sizes, queries and what may be drawn; not keys, seed or outputs.
inline SketchSampleParams sketch_sample_params(const Tensor& q_sketch, const Tensor& k_sketch,
                                               int64_t num_samples, int64_t num_index_heads,
                                               const std::string& method, double scale,
                                               RowArguments* rows) {
  check_dim(q_sketch, "q_sketch", 4);
  check_dim(k_sketch, "k_sketch", 4);
  SketchSampleParams p{};
  p.B = q_sketch.size(0);
  p.H_s = q_sketch.size(1);
  p.N = q_sketch.size(2);
  p.S = q_sketch.size(3);
  p.H_ks = k_sketch.size(1);
  p.M = k_sketch.size(2);
  p.K = num_samples;
  p.H_i = num_index_heads;
  check_shape(k_sketch, "k_sketch", {p.B, p.H_ks, p.M, p.S});
  check_type(k_sketch, "k_sketch", q_sketch.scalar_type());
  check_groups(p.H_s, p.H_ks, "the sketches of queries must be a multiple of those of keys");
  check_groups(p.H_i, p.H_s, "num_index_heads must be a multiple of the sketches");
  STD_TORCH_CHECK(p.K >= 1 && p.K <= INT32_MAX, "num_samples must be in [1, 2^31)");
  STD_TORCH_CHECK(p.S >= 1, "S must be at least 1");
  p.visible = rows->visible(p.B, p.N, p.M);
  const Visible& v = p.visible;
  STD_TORCH_CHECK(v.window <= p.K && v.num_sinks <= p.K,
                  "window and num_sinks must be no larger than num_samples");
  const int64_t near = v.is_causal || v.window == 0 ? v.window : v.window / 2 * 2 + 1;
  STD_TORCH_CHECK(v.num_sinks + near <= p.K,
                  "window and num_sinks force more keys than num_samples");
  p.dtype = dtype_of(q_sketch, "q_sketch");
  p.q_sketch = q_sketch.const_data_ptr();
  set_strides(q_sketch, p.q_stride);
  p.scale = scale;
  p.method = method_named(method);
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
  check_groups(p.H, p.H_kv, "the heads of q must be a multiple of the heads of k");
  check_groups(p.H, p.H_i, "the heads of q must be a multiple of the heads of indices");
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

// v, bias, dropout and who the rows are that it depends on; without the seed.
inline void add_values(const Tensor& v, const OptionalTensor& bias, double dropout_p,
                       const OptionalTensor& seed, RowArguments* rows, GatherParams* p) {
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
  p->visible = query_rows(p->B, p->N, p->M, rows);
}

// q [B, H, N, D] and k [B, H_k, M, D].
inline void check_dense(const Tensor& q, const Tensor& k) {
  check_dim(q, "q", 4);
  check_dim(k, "k", 4);
  check_shape(k, "k", {q.size(0), k.size(1), k.size(2), q.size(3)});
  check_groups(q.size(1), k.size(1), "the heads of q must be a multiple of the heads of k");
  check_type(k, "k", q.scalar_type());
}

// Contiguous, in the accumulation type of `dtype`.
inline Tensor to_acc(const Tensor& t, DType dtype) {
  return torch::stable::contiguous(torch::stable::to(t, acc_type(dtype)));
}

}  // namespace smartbird
