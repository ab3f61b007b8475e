// The CUDA implementation of every op: tensors become a params struct, outputs are allocated,
// kernels are queued on the current stream. Nothing here waits for the device.
#include <array>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>

#include "../op_inputs.h"
#include "launch.h"

#ifndef SMARTBIRD_EMULATED
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#endif

namespace smartbird {
namespace {

// Kernels go to the device of `like`, where all others must be, too, on PyTorch's current stream
// there.
#ifdef SMARTBIRD_EMULATED
class DeviceScope {
 public:
  DeviceScope(const Tensor&, std::initializer_list<OptionalTensor>, const RowArguments& = {}) {}
  cudaStream_t stream() const { return nullptr; }
};
#else
class DeviceScope {
 public:
  DeviceScope(const Tensor& like, std::initializer_list<OptionalTensor> others,
              const RowArguments& rows = {})
      : index_(like.get_device_index()), guard_(index_) {
    for (const OptionalTensor& t : others) check(t);
    for (const OptionalTensor* t : {&rows.key_mask, &rows.global_mask, &rows.positions,
                                    &rows.cu_seqlens_q, &rows.cu_seqlens_k, &rows.sequence_ids})
      check(*t);
  }
  cudaStream_t stream() const {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    return static_cast<cudaStream_t>(stream);
  }

 private:
  void check(const OptionalTensor& t) const {
    STD_TORCH_CHECK(!t.has_value() || (t->is_cuda() && t->get_device_index() == index_),
                    "all tensors must be on one device");
  }

  torch::stable::accelerator::DeviceIndex index_;
  torch::stable::accelerator::DeviceGuard guard_;
};
#endif

const int64_t* seed_data(const Tensor& seed) {
  check_type(seed, "seed", ScalarType::Long);
  check_shape(seed, "seed", {2});
  return seed.const_data_ptr<int64_t>();
}

Tensor zeros(const Tensor& like, std::vector<int64_t> sizes, ScalarType type) {
  return torch::stable::new_zeros(like, sizes, type);
}

// ---- sketch_sample ------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> draw(const Tensor& q_sketch, const Tensor& k_sketch, int64_t num_samples,
                                int64_t num_index_heads, const std::string& method, double scale,
                                RowArguments rows, const Tensor& seed, bool need_log_inclusion) {
  const DeviceScope device(q_sketch, {k_sketch, seed}, rows);
  // float64 is sampled in float32, as on the CPU.
  const auto rows_of = [](const Tensor& t) {
    return with_contiguous_rows(
        t.scalar_type() == ScalarType::Double ? torch::stable::to(t, ScalarType::Float) : t);
  };
  const Tensor q = rows_of(q_sketch), k = rows_of(k_sketch),
               seed_words = torch::stable::contiguous(seed);
  SketchSampleParams p =
      sketch_sample_params(q, k, num_samples, num_index_heads, method, scale, &rows);
  p.k_sketch = k.const_data_ptr();
  set_strides(k, p.k_stride);
  p.device_seed = seed_data(seed_words);
  const Tensor indices = new_tensor(q, {p.B, p.H_i, p.N, p.K}, ScalarType::Int);
  const int64_t kept = need_log_inclusion ? p.K : 0;
  const Tensor log_inclusion = new_tensor(q, {p.B, p.H_i, p.N, kept}, ScalarType::Float);
  p.indices = indices.mutable_data_ptr<int32_t>();
  p.log_inclusion = need_log_inclusion ? log_inclusion.mutable_data_ptr<float>() : nullptr;
  const Tensor scratch = new_tensor(q, {cuda::sketch_sample_scratch_bytes(p)}, ScalarType::Byte);
  p.scratch = scratch.mutable_data_ptr();
  cuda::run_sketch_sample(p, device.stream());
  return {indices, log_inclusion};
}

std::tuple<Tensor, Tensor> sketch_sample_cuda(
    const Tensor& q_sketch, const Tensor& k_sketch, int64_t num_samples, int64_t num_index_heads,
    StringHandle method_name, double scale, bool is_causal, OptionalTensor key_mask, int64_t window,
    int64_t num_sinks, OptionalTensor global_mask, std::optional<int64_t> query_offset,
    OptionalTensor positions, OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k,
    OptionalTensor sequence_ids, int64_t first_head, const Tensor& seed, bool need_log_inclusion) {
  return draw(q_sketch, k_sketch, num_samples, num_index_heads, take(method_name), scale,
              {is_causal, key_mask, window, num_sinks, global_mask, query_offset, positions,
               cu_seqlens_q, cu_seqlens_k, sequence_ids, first_head},
              seed, need_log_inclusion);
}

// ---- gather -------------------------------------------------------------------------------------

Tensor gather_scores_cuda(const Tensor& q_, const Tensor& k_, const Tensor& indices_,
                          double scale) {
  const DeviceScope device(q_, {k_, indices_});
  const Tensor q = with_contiguous_rows(q_), k = with_contiguous_rows(k_),
               indices = with_contiguous_rows(indices_);
  GatherParams p = gather_params(q, k, indices, scale);
  const Tensor out = new_tensor(q, {p.B, p.H, p.N, p.K}, q.scalar_type());
  p.out = out.mutable_data_ptr();
  cuda::run_gather_scores(p, device.stream());
  return out;
}

// What gather_attention is told of its rows, for dropout.
RowArguments dropout_rows(std::optional<int64_t> query_offset, const OptionalTensor& positions,
                          const OptionalTensor& cu_seqlens_q, const OptionalTensor& sequence_ids,
                          int64_t first_head) {
  RowArguments rows;
  rows.query_offset = query_offset;
  rows.positions = positions;
  rows.cu_seqlens_q = cu_seqlens_q;
  rows.sequence_ids = sequence_ids;
  rows.first_head = first_head;
  return rows;
}

std::tuple<Tensor, Tensor> attend(const Tensor& q_, const Tensor& k_, const Tensor& v_,
                                  const Tensor& indices_, const OptionalTensor& bias, double scale,
                                  double dropout_p, OptionalTensor seed, RowArguments rows) {
  const DeviceScope device(q_, {k_, v_, indices_, bias, seed}, rows);
  const Tensor q = with_contiguous_rows(q_), k = with_contiguous_rows(k_),
               v = with_contiguous_rows(v_), indices = with_contiguous_rows(indices_);
  GatherParams p = gather_params(q, k, indices, scale);
  add_values(v, bias, dropout_p, seed, &rows, &p);
  if (seed.has_value()) {
    *seed = torch::stable::contiguous(*seed);
    p.device_seed = seed_data(*seed);
  }
  const Tensor out = new_tensor(q, {p.B, p.H, p.N, p.Dv}, q.scalar_type());
  const Tensor lse = new_tensor(q, {p.B, p.H, p.N}, acc_type(p.dtype));
  p.out = out.mutable_data_ptr();
  p.lse = lse.mutable_data_ptr();
  cuda::run_gather_attention(p, device.stream());
  return {out, lse};
}

std::tuple<Tensor, Tensor> gather_attention_cuda(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& indices, OptionalTensor bias,
    double scale, double dropout_p, OptionalTensor seed, std::optional<int64_t> query_offset,
    OptionalTensor positions, OptionalTensor cu_seqlens_q, OptionalTensor sequence_ids,
    int64_t first_head) {
  return attend(q, k, v, indices, bias, scale, dropout_p, seed,
                dropout_rows(query_offset, positions, cu_seqlens_q, sequence_ids, first_head));
}

// The two ops one after the other.
Tensor sampled_attention_cuda(const Tensor& q, const Tensor& k, const Tensor& v,
                              const Tensor& q_sketch, const Tensor& k_sketch, int64_t num_samples,
                              int64_t num_index_heads, StringHandle method_name, bool correction,
                              double scale, double sketch_scale, bool is_causal,
                              OptionalTensor key_mask, int64_t window, int64_t num_sinks,
                              OptionalTensor global_mask, std::optional<int64_t> query_offset,
                              OptionalTensor positions, OptionalTensor cu_seqlens_q,
                              OptionalTensor cu_seqlens_k, OptionalTensor sequence_ids,
                              int64_t first_head, double dropout_p, const Tensor& seed) {
  const auto [indices, log_inclusion] =
      draw(q_sketch, k_sketch, num_samples, num_index_heads, take(method_name), sketch_scale,
           {is_causal, key_mask, window, num_sinks, global_mask, query_offset, positions,
            cu_seqlens_q, cu_seqlens_k, sequence_ids, first_head},
           seed, correction);
  OptionalTensor bias;
  if (correction) {
    const Tensor zero = zeros(log_inclusion, {1}, ScalarType::Float);
    bias = to_acc(torch::stable::subtract(zero, log_inclusion), dtype_of(q, "q"));
  }
  return std::get<0>(attend(q, k, v, indices, bias, scale, dropout_p, seed,
                            {.query_offset = query_offset,
                             .positions = positions,
                             .cu_seqlens_q = cu_seqlens_q,
                             .cu_seqlens_k = cu_seqlens_k,
                             .sequence_ids = sequence_ids,
                             .first_head = first_head}));
}

// indices sorted by key within each index head, equal keys in their order: (keys, slots), both
// [B, H_i, N * K].
std::tuple<Tensor, Tensor> sort_indices(const Tensor& indices) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  const Tensor flat = torch::stable::reshape(
      indices, {indices.size(0), indices.size(1), indices.size(2) * indices.size(3)});
  std::array<StableIValue, 4> stack{from(flat), from(std::optional<bool>(true)), from(int64_t{-1}),
                                    from(false)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  const Tensor keys = to<Tensor>(stack[0]), slots = to<Tensor>(stack[1]);
  return {keys, torch::stable::to(slots, ScalarType::Int)};
}

struct GatherGradients {
  Tensor dq, dk, dv, dbias;
};

// p.fwd, dout and dlse are filled in. Gradients that are not needed are empty tensors.
GatherGradients gather_backward(GatherBackwardParams p, const Tensor& q, const Tensor& indices,
                                bool need_dqk, bool need_dv, bool need_dbias, bool deterministic,
                                cudaStream_t stream) {
  const GatherParams& f = p.fwd;
  const ScalarType type = q.scalar_type(), acc = acc_type(f.dtype);
  const std::vector<int64_t> none{0}, dk_shape{f.B, f.H_kv, f.M, f.D},
      dv_shape{f.B, f.H_kv, f.M, f.Dv};
  GatherGradients grads{
      new_tensor(q, need_dqk ? std::vector<int64_t>{f.B, f.H, f.N, f.D} : none, type),
      new_tensor(q, none, type), new_tensor(q, none, type),
      new_tensor(q, need_dbias ? std::vector<int64_t>{f.B, f.H, f.N, f.K} : none, acc)};
  if (need_dqk) p.dq = grads.dq.mutable_data_ptr();
  if (need_dbias) p.dbias = grads.dbias.mutable_data_ptr();
  const bool by_key = deterministic && (need_dqk || need_dv);
  Tensor slot_grads;
  if (by_key || f.K > cuda::kMaxSharedSlots) {
    slot_grads = new_tensor(q, {f.B, f.H, f.N, f.K, 2}, acc);
    p.slot_grads = slot_grads.mutable_data_ptr();
  }
  if (by_key) {
    cuda::run_gather_backward_queries(p, stream);
    const auto [keys, entries] = sort_indices(indices);
    const Tensor key_start = new_tensor(q, {f.B, f.H_i, f.M + 1}, ScalarType::Long);
    cuda::run_find_key_starts(f, keys.const_data_ptr<int32_t>(),
                              key_start.mutable_data_ptr<int64_t>(), stream);
    if (need_dqk) {
      grads.dk = new_tensor(q, dk_shape, type);
      p.dk = grads.dk.mutable_data_ptr();
    }
    if (need_dv) {
      grads.dv = new_tensor(q, dv_shape, type);
      p.dv = grads.dv.mutable_data_ptr();
    }
    p.key_start = key_start.const_data_ptr<int64_t>();
    p.entries = entries.const_data_ptr<int32_t>();
    cuda::run_gather_backward_keys(p, stream);
    return grads;
  }
  if (need_dqk) {
    grads.dk = zeros(q, dk_shape, acc);
    p.dk_sum = grads.dk.mutable_data_ptr();
  }
  if (need_dv) {
    grads.dv = zeros(q, dv_shape, acc);
    p.dv_sum = grads.dv.mutable_data_ptr();
  }
  cuda::run_gather_backward_queries(p, stream);
  grads.dk = torch::stable::to(grads.dk, type);
  grads.dv = torch::stable::to(grads.dv, type);
  return grads;
}

std::tuple<Tensor, Tensor> gather_scores_backward_cuda(const Tensor& dscores, const Tensor& q_,
                                                       const Tensor& k_, const Tensor& indices_,
                                                       double scale, bool deterministic) {
  const DeviceScope device(q_, {k_, indices_, dscores});
  const Tensor q = with_contiguous_rows(q_), k = with_contiguous_rows(k_),
               indices = with_contiguous_rows(indices_), dout = torch::stable::contiguous(dscores);
  GatherBackwardParams p{};
  p.fwd = gather_params(q, k, indices, scale);
  check_shape(dout, "dscores", {p.fwd.B, p.fwd.H, p.fwd.N, p.fwd.K});
  check_type(dout, "dscores", q.scalar_type());
  p.dout = dout.const_data_ptr();
  const GatherGradients grads =
      gather_backward(p, q, indices, true, false, false, deterministic, device.stream());
  return {grads.dq, grads.dk};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gather_attention_backward_cuda(
    const Tensor& dout_, OptionalTensor dlse, const Tensor& q_, const Tensor& k_, const Tensor& v_,
    const Tensor& indices_, OptionalTensor bias, double scale, double dropout_p,
    OptionalTensor seed, std::optional<int64_t> query_offset, OptionalTensor positions,
    OptionalTensor cu_seqlens_q, OptionalTensor sequence_ids, int64_t first_head, bool need_dqk,
    bool need_dv, bool need_dbias, bool deterministic) {
  RowArguments rows = dropout_rows(query_offset, positions, cu_seqlens_q, sequence_ids, first_head);
  const DeviceScope device(q_, {k_, v_, indices_, bias, seed, dout_, dlse}, rows);
  const Tensor q = with_contiguous_rows(q_), k = with_contiguous_rows(k_),
               v = with_contiguous_rows(v_), indices = with_contiguous_rows(indices_),
               dout = torch::stable::contiguous(dout_);
  GatherBackwardParams p{};
  p.fwd = gather_params(q, k, indices, scale);
  add_values(v, bias, dropout_p, seed, &rows, &p.fwd);
  if (seed.has_value()) {
    *seed = torch::stable::contiguous(*seed);
    p.fwd.device_seed = seed_data(*seed);
  }
  check_shape(dout, "dout", {p.fwd.B, p.fwd.H, p.fwd.N, p.fwd.Dv});
  check_type(dout, "dout", q.scalar_type());
  p.dout = dout.const_data_ptr();
  if (dlse.has_value()) {
    *dlse = torch::stable::contiguous(*dlse);
    check_shape(*dlse, "dlse", {p.fwd.B, p.fwd.H, p.fwd.N});
    check_type(*dlse, "dlse", acc_type(p.fwd.dtype));
    p.dlse = dlse->const_data_ptr();
  }
  const GatherGradients grads =
      gather_backward(p, q, indices, need_dqk, need_dv, need_dbias, deterministic, device.stream());
  return {grads.dq, grads.dk, grads.dv, grads.dbias};
}

// ---- streamed dense -----------------------------------------------------------------------------

// What the dense ops are told of their rows.
RowArguments dense_rows(bool is_causal, const OptionalTensor& key_mask, int64_t window,
                        std::optional<int64_t> query_offset, const OptionalTensor& positions,
                        const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k) {
  return {is_causal, key_mask, window, 0, {}, query_offset, positions, cu_seqlens_q, cu_seqlens_k};
}

// rows [B, H or fewer heads, R, D] and cols [B, H or fewer heads, C, D], both with contiguous rows.
DenseParams dense_params(const Tensor& rows, const Tensor& cols, double scale,
                         const Visible& visible) {
  DenseParams p{};
  p.B = rows.size(0);
  p.H = std::max(rows.size(1), cols.size(1));
  p.R = rows.size(2);
  p.C = cols.size(2);
  p.D = rows.size(3);
  p.dtype = dtype_of(rows, "rows");
  p.visible = visible;
  p.rows = rows.const_data_ptr();
  set_strides(rows, p.row_stride);
  p.rows_per_head = p.H / rows.size(1);
  p.cols_per_head = p.H / cols.size(1);
  p.scale = scale * kLog2e;
  p.cols = cols.const_data_ptr();
  set_strides(cols, p.col_stride);
  return p;
}

// The same with the other side's rows: rows are keys, columns queries.
DenseParams key_rows(const Tensor& q, const Tensor& k, double scale, const Visible& visible) {
  DenseParams p = dense_params(k, q, scale, visible);
  p.cols_are_queries = true;
  return p;
}

// out [B, H_out, R, Dv] of values [B, H_v, C, Dv], which are contiguous and of the accumulation
// type.
Tensor dense_mean(DenseParams p, const Tensor& values, int64_t num_out, cudaStream_t stream) {
  p.H_v = values.size(1);
  p.H_out = num_out;
  check_groups(p.H, p.H_v, "the heads of q must be a multiple of those of the values");
  check_groups(p.H, p.H_out, "the heads of q must be a multiple of the sums");
  check_groups(std::max(p.H_v, p.H_out), std::min(p.H_v, p.H_out),
               "of the sums and the heads of the values one must be a multiple of the other");
  p.Dv = values.size(3);
  p.values = values.const_data_ptr();
  const Tensor out = new_tensor(values, {p.B, p.H_out, p.R, p.Dv}, acc_type(p.dtype));
  p.out = out.mutable_data_ptr();
  cuda::run_dense_mean(p, stream);
  return out;
}

// lse [B, H, R], which stays in p->row_shift, too.
Tensor dense_lse(DenseParams* p, const Tensor& like, cudaStream_t stream) {
  const Tensor lse = new_tensor(like, {p->B, p->H, p->R}, acc_type(p->dtype));
  p->lse = lse.mutable_data_ptr();
  cuda::run_dense_lse(*p, stream);
  p->row_shift = lse.const_data_ptr();
  return lse;
}

Tensor sketch_lse_cuda(const Tensor& q_sketch, const Tensor& k_sketch, double scale, bool is_causal,
                       OptionalTensor key_mask, int64_t window, std::optional<int64_t> query_offset,
                       OptionalTensor positions, OptionalTensor cu_seqlens_q,
                       OptionalTensor cu_seqlens_k) {
  check_dense(q_sketch, k_sketch);
  RowArguments rows =
      dense_rows(is_causal, key_mask, window, query_offset, positions, cu_seqlens_q, cu_seqlens_k);
  const DeviceScope device(q_sketch, {k_sketch}, rows);
  const Tensor q = with_contiguous_rows(q_sketch), k = with_contiguous_rows(k_sketch);
  DenseParams p = dense_params(q, k, scale, rows.visible(q.size(0), q.size(2), k.size(2)));
  return dense_lse(&p, q, device.stream());
}

// Without the factors `dlse` of a row (in dq_sketch) and `scale`, which the caller multiplies in.
std::tuple<Tensor, Tensor> sketch_lse_backward_cuda(
    const Tensor& dlse_, const Tensor& q_sketch, const Tensor& k_sketch, const Tensor& lse_,
    double scale, bool is_causal, OptionalTensor key_mask, int64_t window,
    std::optional<int64_t> query_offset, OptionalTensor positions, OptionalTensor cu_seqlens_q,
    OptionalTensor cu_seqlens_k) {
  check_dense(q_sketch, k_sketch);
  RowArguments rows =
      dense_rows(is_causal, key_mask, window, query_offset, positions, cu_seqlens_q, cu_seqlens_k);
  const DeviceScope device(q_sketch, {k_sketch, lse_, dlse_}, rows);
  const Tensor q = with_contiguous_rows(q_sketch), k = with_contiguous_rows(k_sketch);
  const DType dtype = dtype_of(q, "q_sketch");
  const Tensor dlse = torch::stable::contiguous(dlse_), lse = torch::stable::contiguous(lse_);
  for (const Tensor* t : {&dlse, &lse}) {
    check_type(*t, "dlse, lse", acc_type(dtype));
    check_shape(*t, "dlse, lse", {q.size(0), q.size(1), q.size(2)});
  }
  const Visible visible = rows.visible(q.size(0), q.size(2), k.size(2));
  DenseParams of_queries = dense_params(q, k, scale, visible);
  of_queries.row_shift = lse.const_data_ptr();
  DenseParams of_keys = key_rows(q, k, scale, visible);
  of_keys.col_shift = lse.const_data_ptr();
  of_keys.col_weight = dlse.const_data_ptr();
  return {dense_mean(of_queries, to_acc(k, dtype), q.size(1), device.stream()),
          dense_mean(of_keys, to_acc(q, dtype), k.size(1), device.stream())};
}

std::tuple<Tensor, Tensor> summed_attention_cuda(
    const Tensor& q_, const Tensor& k_, const Tensor& v, int64_t num_sums, double scale,
    bool is_causal, OptionalTensor key_mask, int64_t window, std::optional<int64_t> query_offset,
    OptionalTensor positions, OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k) {
  check_dense(q_, k_);
  check_dim(v, "v", 4);
  check_shape(v, "v", {k_.size(0), v.size(1), k_.size(2), v.size(3)});
  RowArguments rows =
      dense_rows(is_causal, key_mask, window, query_offset, positions, cu_seqlens_q, cu_seqlens_k);
  const DeviceScope device(q_, {k_, v}, rows);
  const Tensor q = with_contiguous_rows(q_), k = with_contiguous_rows(k_);
  DenseParams p = dense_params(q, k, scale, rows.visible(q.size(0), q.size(2), k.size(2)));
  const Tensor lse = dense_lse(&p, q, device.stream());
  return {dense_mean(p, to_acc(v, p.dtype), num_sums, device.stream()), lse};
}

Tensor summed_attention_backward_cuda(const Tensor& dout, const Tensor& q_, const Tensor& k_,
                                      const Tensor& lse_, int64_t num_values, double scale,
                                      bool is_causal, OptionalTensor key_mask, int64_t window,
                                      std::optional<int64_t> query_offset, OptionalTensor positions,
                                      OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k) {
  check_dense(q_, k_);
  check_dim(dout, "dout", 4);
  check_shape(dout, "dout", {q_.size(0), dout.size(1), q_.size(2), dout.size(3)});
  RowArguments rows =
      dense_rows(is_causal, key_mask, window, query_offset, positions, cu_seqlens_q, cu_seqlens_k);
  const DeviceScope device(q_, {k_, lse_, dout}, rows);
  const Tensor q = with_contiguous_rows(q_), k = with_contiguous_rows(k_),
               lse = torch::stable::contiguous(lse_);
  DenseParams p = key_rows(q, k, scale, rows.visible(q.size(0), q.size(2), k.size(2)));
  check_type(lse, "lse", acc_type(p.dtype));
  check_shape(lse, "lse", {q.size(0), q.size(1), q.size(2)});
  p.col_shift = lse.const_data_ptr();
  return dense_mean(p, to_acc(dout, p.dtype), num_values, device.stream());
}

// The architectures that are built in, for build_info().
std::string cuda_archs() { return SMARTBIRD_CUDA_ARCHS; }

}  // namespace

// Under emulation these very functions serve CPU tensors.
#ifdef SMARTBIRD_EMULATED
#define SMARTBIRD_DISPATCH_KEY CPU
#else
#define SMARTBIRD_DISPATCH_KEY CUDA
#endif

STABLE_TORCH_LIBRARY_IMPL(smartbird, SMARTBIRD_DISPATCH_KEY, m) {
  m.impl("sketch_sample", TORCH_BOX(&sketch_sample_cuda));
  m.impl("gather_scores", TORCH_BOX(&gather_scores_cuda));
  m.impl("gather_scores_backward", TORCH_BOX(&gather_scores_backward_cuda));
  m.impl("gather_attention", TORCH_BOX(&gather_attention_cuda));
  m.impl("sampled_attention", TORCH_BOX(&sampled_attention_cuda));
  m.impl("gather_attention_backward", TORCH_BOX(&gather_attention_backward_cuda));
  m.impl("sketch_lse", TORCH_BOX(&sketch_lse_cuda));
  m.impl("sketch_lse_backward", TORCH_BOX(&sketch_lse_backward_cuda));
  m.impl("summed_attention", TORCH_BOX(&summed_attention_cuda));
  m.impl("summed_attention_backward", TORCH_BOX(&summed_attention_backward_cuda));
}

STABLE_TORCH_LIBRARY_IMPL(smartbird, CompositeExplicitAutograd, m) {
  m.impl("cuda_archs", TORCH_BOX(&cuda_archs));
}

}  // namespace smartbird
