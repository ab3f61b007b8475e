// The CPU implementation of every op: tensors become a params struct, scratch is allocated, tasks
// are spread over torch's threads.
#include <atomic>
#include <cstdlib>
#include <memory>
#include <string>
#include <tuple>

#include "../torch_utils.h"
#include "kernels.h"

namespace smartbird {
namespace {

using OptionalTensor = std::optional<Tensor>;

struct FreeDeleter {
  void operator()(void* p) const { std::free(p); }
};

// Tasks are fetched one by one, so that rows of unequal length (causal) and threads of unequal
// speed even out.
template <typename Params>
void run(const TaskKernel<Params>& kernel, const Params& params) {
  const int64_t tasks = kernel.num_tasks(params);
  if (tasks == 0) return;
  const int64_t threads = std::min<int64_t>(tasks, torch::stable::get_num_threads());
  const int64_t bytes = (kernel.scratch_bytes(params) + 63) / 64 * 64;
  std::unique_ptr<void, FreeDeleter> scratch(
      std::aligned_alloc(64, std::max<int64_t>(64, bytes * threads)));
  STD_TORCH_CHECK(scratch != nullptr, "smartbird ran out of memory: ", bytes * threads,
                  " bytes of scratch");
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;)
        kernel.run(params, task, static_cast<char*>(scratch.get()) + t * bytes);
  });
}

// smartbird/ops.py turns these into ValueError by their prefix.
void raise_value_error(int32_t error) {
  STD_TORCH_CHECK(error != kIndexOutOfRange, "smartbird: indices holds a value outside [-1, M)");
  STD_TORCH_CHECK(error != kSketchNotFinite,
                  "smartbird: q_sketch or k_sketch holds NaN or infinity, or their scores overflow "
                  "float32, in which all dtypes are sampled");
}

const uint8_t* mask_data(OptionalTensor* mask, int64_t B, int64_t M) {
  if (!mask->has_value()) return nullptr;
  check_type(**mask, "key_mask", ScalarType::Bool);
  check_shape(**mask, "key_mask", {B, M});
  *mask = torch::stable::contiguous(**mask);
  return static_cast<const uint8_t*>((*mask)->const_data_ptr());
}

void read_seed(const Tensor& seed, uint64_t* key, uint64_t* offset) {
  check_type(seed, "seed", ScalarType::Long);
  check_shape(seed, "seed", {2});
  const Tensor words = torch::stable::contiguous(seed);
  *key = static_cast<uint64_t>(words.const_data_ptr<int64_t>()[0]);
  *offset = static_cast<uint64_t>(words.const_data_ptr<int64_t>()[1]);
}

// ---- packing ------------------------------------------------------------------------------------

struct Packed {
  Tensor tiles, key_bias, tile_norm;
};

// x [B, H, M, D] (or [B, M, D] with H = 1) with contiguous rows.
Packed pack(const Tensor& x, const uint8_t* key_mask, bool to_double, double scale = 1,
            bool interleave = false) {
  PackParams p{};
  const int64_t last = x.dim() - 1;
  p.B = x.size(0);
  p.H = last == 3 ? x.size(1) : 1;
  p.M = x.size(last - 1);
  p.D = x.size(last);
  p.dtype = dtype_of(x, "x");
  p.to_double = to_double;
  p.x = x.const_data_ptr();
  p.stride[0] = x.stride(0);
  p.stride[1] = last == 3 ? x.stride(1) : 0;
  p.stride[2] = x.stride(last - 1);
  p.scale = scale;
  p.interleave = interleave;
  p.key_mask = key_mask;
  const int64_t tiles = (p.M + kTile - 1) / kTile;
  const ScalarType type = to_double ? ScalarType::Double : ScalarType::Float;
  Packed packed{new_tensor(x, {p.B, p.H, tiles, p.D, kTile}, type),
                new_tensor(x, {p.B, tiles * kTile}, type),
                new_tensor(x, {p.B, p.H, tiles}, ScalarType::Float)};
  p.tiles = packed.tiles.mutable_data_ptr();
  p.key_bias = packed.key_bias.mutable_data_ptr();
  p.tile_norm = packed.tile_norm.mutable_data_ptr<float>();
  run(active_kernels().pack, p);
  return packed;
}

// ---- sketch_sample ------------------------------------------------------------------------------

SampleMethod method_named(const std::string& name) {
  if (name == "gumbel") return SampleMethod::kGumbel;
  if (name == "systematic") return SampleMethod::kSystematic;
  if (name == "multinomial") return SampleMethod::kMultinomial;
  STD_TORCH_CHECK(name == "topk", "method must be gumbel, systematic, multinomial or topk, got ",
                  name);
  return SampleMethod::kTopK;
}

std::tuple<Tensor, Tensor> sketch_sample_cpu(const Tensor& q_sketch, const Tensor& k_sketch,
                                             int64_t num_samples, int64_t num_index_heads,
                                             std::string method, double scale, bool is_causal,
                                             OptionalTensor key_mask, int64_t window,
                                             int64_t num_sinks, const Tensor& seed,
                                             bool need_log_inclusion) {
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
  const Tensor q = with_contiguous_rows(q_sketch), k = with_contiguous_rows(k_sketch);
  SketchSampleParams p{};
  p.B = q.size(0);
  p.N = q.size(1);
  p.S = q.size(2);
  p.M = k.size(1);
  p.K = num_samples;
  p.H_i = num_index_heads;
  p.dtype = dtype_of(q, "q_sketch");
  p.q_sketch = q.const_data_ptr();
  set_strides(q, p.q_stride);
  p.key_mask = mask_data(&key_mask, p.B, p.M);
  p.scale = scale;
  p.method = method_named(method);
  p.is_causal = is_causal;
  p.window = window;
  p.num_sinks = num_sinks;
  read_seed(seed, &p.seed, &p.offset);

  const Packed packed = pack(k, p.key_mask, /*to_double=*/false, /*scale=*/1, /*interleave=*/true);
  p.k_tiles = packed.tiles.const_data_ptr<float>();
  p.key_bias = packed.key_bias.const_data_ptr<float>();
  p.tile_norm = packed.tile_norm.const_data_ptr<float>();

  const Tensor indices = new_tensor(q, {p.B, p.H_i, p.N, p.K}, ScalarType::Int);
  const int64_t kept = need_log_inclusion ? p.K : 0;
  const Tensor log_inclusion = new_tensor(q, {p.B, p.H_i, p.N, kept}, ScalarType::Float);
  p.indices = indices.mutable_data_ptr<int32_t>();
  p.log_inclusion = need_log_inclusion ? log_inclusion.mutable_data_ptr<float>() : nullptr;
  int32_t error = kNoError;
  p.error = &error;
  run(active_kernels().sketch_sample, p);
  raise_value_error(error);
  return {indices, log_inclusion};
}

// ---- gather -------------------------------------------------------------------------------------

// Everything but v, bias, dropout and the outputs. The tensors must outlive the params.
GatherParams gather_params(const Tensor& q, const Tensor& k, const Tensor& indices, double scale) {
  check_dim(q, "q", 4);
  check_dim(k, "k", 4);
  check_dim(indices, "indices", 4);
  GatherParams p{};
  p.B = q.size(0);
  p.H = q.size(1);
  p.N = q.size(2);
  p.D = q.size(3);
  p.H_kv = k.size(1);
  p.M = k.size(2);
  p.H_i = indices.size(1);
  p.K = indices.size(3);
  check_shape(k, "k", {p.B, p.H_kv, p.M, p.D});
  check_shape(indices, "indices", {p.B, p.H_i, p.N, p.K});
  check_type(k, "k", q.scalar_type());
  check_type(indices, "indices", ScalarType::Int);
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
  p.indices = indices.const_data_ptr<int32_t>();
  set_strides(indices, p.indices_stride);
  p.scale = scale;
  return p;
}

void add_values(const Tensor& v, const OptionalTensor& bias, double dropout_p,
                const OptionalTensor& seed, GatherParams* p) {
  check_dim(v, "v", 4);
  check_shape(v, "v", {p->B, p->H_kv, p->M, v.size(3)});
  STD_TORCH_CHECK(dtype_of(v, "v") == p->dtype, "v must have the dtype of q");
  p->Dv = v.size(3);
  STD_TORCH_CHECK(p->Dv >= 1, "Dv must be at least 1");
  p->v = v.const_data_ptr();
  set_strides(v, p->v_stride);
  if (bias.has_value()) {
    check_type(*bias, "bias", acc_type(p->dtype));
    check_dim(*bias, "bias", 4);
    p->H_bias = bias->size(1) == p->H_i ? p->H_i : p->H;
    check_shape(*bias, "bias", {p->B, p->H_bias, p->N, p->K});
    p->bias = bias->const_data_ptr();
    set_strides(*bias, p->bias_stride);
  }
  STD_TORCH_CHECK(dropout_p >= 0 && dropout_p <= 1, "dropout_p must be in [0, 1]");
  STD_TORCH_CHECK(dropout_p == 0 || seed.has_value(), "dropout needs a seed");
  p->dropout_p = dropout_p;
  if (seed.has_value()) read_seed(*seed, &p->seed, &p->offset);
}

Tensor gather_scores_cpu(const Tensor& q_, const Tensor& k_, const Tensor& indices_, double scale) {
  const Tensor q = with_contiguous_rows(q_), k = with_contiguous_rows(k_),
               indices = with_contiguous_rows(indices_);
  GatherParams p = gather_params(q, k, indices, scale);
  const Tensor out = new_tensor(q, {p.B, p.H, p.N, p.K}, q.scalar_type());
  p.out = out.mutable_data_ptr();
  int32_t error = kNoError;
  p.error = &error;
  run(active_kernels().gather_scores, p);
  raise_value_error(error);
  return out;
}

std::tuple<Tensor, Tensor> gather_attention_cpu(const Tensor& q_, const Tensor& k_,
                                                const Tensor& v_, const Tensor& indices_,
                                                OptionalTensor bias, double scale, double dropout_p,
                                                OptionalTensor seed) {
  const Tensor q = with_contiguous_rows(q_), k = with_contiguous_rows(k_),
               v = with_contiguous_rows(v_), indices = with_contiguous_rows(indices_);
  GatherParams p = gather_params(q, k, indices, scale);
  add_values(v, bias, dropout_p, seed, &p);
  const Tensor out = new_tensor(q, {p.B, p.H, p.N, p.Dv}, q.scalar_type());
  const Tensor lse = new_tensor(q, {p.B, p.H, p.N}, acc_type(p.dtype));
  p.out = out.mutable_data_ptr();
  p.lse = lse.mutable_data_ptr();
  int32_t error = kNoError;
  p.error = &error;
  run(active_kernels().gather_attention, p);
  raise_value_error(error);
  return {out, lse};
}

// Rounds keep the per-slot gradients within this, or within those of one head: enough rows and keys
// for all cores.
constexpr int64_t kSlotGradBytes = int64_t{64} << 20;

void run_gather_backward(GatherBackwardParams* p, const Tensor& like) {
  const Kernels& kernels = active_kernels();
  const GatherParams& f = p->fwd;
  const int64_t slices = f.B * f.H_kv, group = f.H / f.H_kv, slots = f.N * f.K;
  const bool need_keys = p->dk != nullptr || p->dv != nullptr;
  const int64_t head_bytes = std::max<int64_t>(1, slots * 2 * acc_bytes(f.dtype));
  const int64_t round_heads = std::max<int64_t>(1, kSlotGradBytes / head_bytes);
  const int64_t head_step = std::min(group, round_heads);
  const int64_t slice_step = std::max<int64_t>(1, std::min(slices, round_heads / group));
  Tensor key_start, entries, slot_grads, dk_sum, dv_sum;
  if (need_keys) {
    key_start = new_tensor(like, {f.B, f.H_i, f.M + 1}, ScalarType::Long);
    entries = new_tensor(like, {f.B, f.H_i, slots}, ScalarType::Int);
    slot_grads = new_tensor(like, {slice_step, head_step, slots, 2}, acc_type(f.dtype));
    if (head_step < group) {
      dk_sum = new_tensor(like, {f.M, f.D}, acc_type(f.dtype));
      dv_sum = new_tensor(like, {f.M, f.Dv}, acc_type(f.dtype));
      p->dk_sum = dk_sum.mutable_data_ptr();
      p->dv_sum = dv_sum.mutable_data_ptr();
    }
    InvertParams invert{};
    invert.B = f.B;
    invert.H_i = f.H_i;
    invert.N = f.N;
    invert.M = f.M;
    invert.K = f.K;
    invert.indices = f.indices;
    for (int d = 0; d < 3; ++d) invert.indices_stride[d] = f.indices_stride[d];
    invert.key_start = key_start.mutable_data_ptr<int64_t>();
    invert.entries = entries.mutable_data_ptr<int32_t>();
    run(kernels.invert_indices, invert);
    p->key_start = invert.key_start;
    p->entries = invert.entries;
    p->slot_grads = slot_grads.mutable_data_ptr();
  }
  for (p->slice_begin = 0; p->slice_begin < slices; p->slice_begin = p->slice_end) {
    p->slice_end = std::min(slices, p->slice_begin + slice_step);
    for (p->head_begin = 0; p->head_begin < group; p->head_begin = p->head_end) {
      p->head_end = std::min(group, p->head_begin + head_step);
      run(kernels.gather_backward_queries, *p);
      if (need_keys) run(kernels.gather_backward_keys, *p);
    }
  }
}

// `deterministic` chooses between kernels on CUDA; here results never depend on the order of
// threads.
std::tuple<Tensor, Tensor> gather_scores_backward_cpu(const Tensor& dscores, const Tensor& q_,
                                                      const Tensor& k_, const Tensor& indices_,
                                                      double scale, bool /*deterministic*/) {
  const Tensor q = with_contiguous_rows(q_), k = with_contiguous_rows(k_),
               indices = with_contiguous_rows(indices_), dout = torch::stable::contiguous(dscores);
  GatherBackwardParams p{};
  p.fwd = gather_params(q, k, indices, scale);
  check_shape(dout, "dscores", {p.fwd.B, p.fwd.H, p.fwd.N, p.fwd.K});
  check_type(dout, "dscores", q.scalar_type());
  int32_t error = kNoError;
  p.fwd.error = &error;
  p.dout = dout.const_data_ptr();
  const Tensor dq = new_tensor(q, {p.fwd.B, p.fwd.H, p.fwd.N, p.fwd.D}, q.scalar_type());
  const Tensor dk = new_tensor(q, {p.fwd.B, p.fwd.H_kv, p.fwd.M, p.fwd.D}, q.scalar_type());
  p.dq = dq.mutable_data_ptr();
  p.dk = dk.mutable_data_ptr();
  run_gather_backward(&p, q);
  raise_value_error(error);
  return {dq, dk};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gather_attention_backward_cpu(
    const Tensor& dout_, OptionalTensor dlse_, const Tensor& q_, const Tensor& k_, const Tensor& v_,
    const Tensor& indices_, OptionalTensor bias, double scale, double dropout_p,
    OptionalTensor seed, bool need_dqk, bool need_dv, bool need_dbias, bool /*deterministic*/) {
  const Tensor q = with_contiguous_rows(q_), k = with_contiguous_rows(k_),
               v = with_contiguous_rows(v_), indices = with_contiguous_rows(indices_);
  const Tensor dout = torch::stable::contiguous(dout_);
  GatherBackwardParams p{};
  p.fwd = gather_params(q, k, indices, scale);
  add_values(v, bias, dropout_p, seed, &p.fwd);
  const GatherParams& f = p.fwd;
  check_shape(dout, "dout", {f.B, f.H, f.N, f.Dv});
  check_type(dout, "dout", q.scalar_type());
  p.dout = dout.const_data_ptr();
  Tensor dlse;
  if (dlse_.has_value()) {
    dlse = torch::stable::contiguous(*dlse_);
    check_shape(dlse, "dlse", {f.B, f.H, f.N});
    check_type(dlse, "dlse", acc_type(f.dtype));
    p.dlse = dlse.const_data_ptr();
  }
  int32_t error = kNoError;
  p.fwd.error = &error;
  // A gradient that is not asked for is an empty tensor.
  const auto gradient = [&](bool needed, std::vector<int64_t> shape, ScalarType type, void** data) {
    const Tensor t = new_tensor(q, needed ? shape : std::vector<int64_t>{0}, type);
    if (needed) *data = t.mutable_data_ptr();
    return t;
  };
  const Tensor dq = gradient(need_dqk, {f.B, f.H, f.N, f.D}, q.scalar_type(), &p.dq);
  const Tensor dk = gradient(need_dqk, {f.B, f.H_kv, f.M, f.D}, q.scalar_type(), &p.dk);
  const Tensor dv = gradient(need_dv, {f.B, f.H_kv, f.M, f.Dv}, q.scalar_type(), &p.dv);
  const Tensor dbias = gradient(need_dbias, {f.B, f.H, f.N, f.K}, acc_type(f.dtype), &p.dbias);
  run_gather_backward(&p, q);
  raise_value_error(error);
  return {dq, dk, dv, dbias};
}

// ---- streamed dense -----------------------------------------------------------------------------

// rows [B, H, R, D] (or [B, R, D]) against packed cols of `cols` heads and C columns.
DenseParams dense_params(const Tensor& rows, const Packed& cols, int64_t C, double scale) {
  DenseParams p{};
  const int64_t last = rows.dim() - 1;
  const int64_t row_heads = last == 3 ? rows.size(1) : 1, col_heads = cols.tiles.size(1);
  p.B = rows.size(0);
  p.H = std::max(row_heads, col_heads);
  p.R = rows.size(last - 1);
  p.C = C;
  p.D = rows.size(last);
  p.dtype = dtype_of(rows, "rows");
  p.rows = rows.const_data_ptr();
  p.row_stride[0] = rows.stride(0);
  p.row_stride[1] = last == 3 ? rows.stride(1) : 0;
  p.row_stride[2] = rows.stride(last - 1);
  p.rows_per_head = p.H / row_heads;
  p.cols_per_head = p.H / col_heads;
  p.scale = scale;
  p.col_tiles = cols.tiles.const_data_ptr();
  p.col_bias = cols.key_bias.const_data_ptr();
  return p;
}

Tensor to_acc(const Tensor& t, DType dtype) {
  return torch::stable::contiguous(torch::stable::to(t, acc_type(dtype)));
}

void check_dense(const Tensor& q, const Tensor& k) {
  STD_TORCH_CHECK(q.dim() == k.dim() && (q.dim() == 3 || q.dim() == 4),
                  "q and k must have 3 or 4 dimensions alike");
  STD_TORCH_CHECK(q.size(0) == k.size(0) && q.size(q.dim() - 1) == k.size(k.dim() - 1),
                  "q and k must agree in batch and feature size");
  STD_TORCH_CHECK(q.dim() == 3 || (k.size(1) > 0 && q.size(1) > 0 && q.size(1) % k.size(1) == 0),
                  "the heads of q must be a multiple of the heads of k");
  check_type(k, "k", q.scalar_type());
}

// The forward: lse [B, H, N] (or [B, N]) of q against k.
Tensor dense_lse(const Tensor& q, const Packed& keys, int64_t M, double scale, bool is_causal,
                 Tensor lse) {
  DenseParams p = dense_params(q, keys, M, scale * kLog2e);
  p.is_causal = is_causal;
  p.causal_offset = M - p.R;
  p.lse = lse.mutable_data_ptr();
  run(active_kernels().dense_lse, p);
  return lse;
}

Tensor sketch_lse_cpu(const Tensor& q_sketch, const Tensor& k_sketch, double scale, bool is_causal,
                      OptionalTensor key_mask) {
  check_dim(q_sketch, "q_sketch", 3);
  check_dense(q_sketch, k_sketch);
  const Tensor q = with_contiguous_rows(q_sketch), k = with_contiguous_rows(k_sketch);
  const uint8_t* mask = mask_data(&key_mask, k.size(0), k.size(1));
  const DType dtype = dtype_of(q, "q_sketch");
  const Packed keys = pack(k, mask, dtype == DType::kFloat64);
  return dense_lse(q, keys, k.size(1), scale, is_causal,
                   new_tensor(q, {q.size(0), q.size(1)}, acc_type(dtype)));
}

// out [B, M, Dv] = sum over heads and queries of softmax weight * query_weight * values: the
// transposed product.
Tensor dense_transposed(const Tensor& q, const Tensor& k, const Tensor& lse, const uint8_t* mask,
                        double scale, bool is_causal, const void* query_weight,
                        const Tensor& values) {
  const DType dtype = dtype_of(q, "q");
  const int64_t N = q.size(q.dim() - 2), M = k.size(k.dim() - 2);
  const Packed queries = pack(q, nullptr, dtype == DType::kFloat64, scale * kLog2e);
  DenseParams p = dense_params(k, queries, N, 1);
  p.row_mask = mask;
  p.is_causal = is_causal;
  p.cols_are_queries = true;
  p.causal_offset = M - N;
  p.col_shift = lse.const_data_ptr();
  p.col_weight = query_weight;
  p.Dv = values.size(2);
  p.values = values.const_data_ptr();
  const Tensor out = new_tensor(q, {p.B, M, p.Dv}, acc_type(dtype));
  p.out = out.mutable_data_ptr();
  run(active_kernels().dense_mean, p);
  return out;
}

// out [B, N, Dv] = sum over heads and keys of softmax weight * values.
Tensor dense_forward(const Tensor& q, const Packed& keys, int64_t M, const Tensor& lse,
                     double scale, bool is_causal, const Tensor& values) {
  DenseParams p = dense_params(q, keys, M, scale * kLog2e);
  p.is_causal = is_causal;
  p.causal_offset = M - p.R;
  p.row_shift = lse.const_data_ptr();
  p.Dv = values.size(2);
  p.values = values.const_data_ptr();
  const Tensor out = new_tensor(q, {p.B, p.R, p.Dv}, acc_type(p.dtype));
  p.out = out.mutable_data_ptr();
  run(active_kernels().dense_mean, p);
  return out;
}

// Without the factors `dlse` of a row and `scale`, which the caller multiplies in: see
// smartbird/ops.py.
std::tuple<Tensor, Tensor> sketch_lse_backward_cpu(const Tensor& dlse_, const Tensor& q_sketch,
                                                   const Tensor& k_sketch, const Tensor& lse_,
                                                   double scale, bool is_causal,
                                                   OptionalTensor key_mask) {
  check_dim(q_sketch, "q_sketch", 3);
  check_dense(q_sketch, k_sketch);
  const Tensor q = with_contiguous_rows(q_sketch), k = with_contiguous_rows(k_sketch);
  const DType dtype = dtype_of(q, "q_sketch");
  const Tensor dlse = torch::stable::contiguous(dlse_), lse = torch::stable::contiguous(lse_);
  for (const Tensor* t : {&dlse, &lse}) {
    check_type(*t, "dlse, lse", acc_type(dtype));
    check_shape(*t, "dlse, lse", {q.size(0), q.size(1)});
  }
  const uint8_t* mask = mask_data(&key_mask, k.size(0), k.size(1));
  const Packed keys = pack(k, mask, dtype == DType::kFloat64);
  const Tensor dq = dense_forward(q, keys, k.size(1), lse, scale, is_causal, to_acc(k, dtype));
  const Tensor dk =
      dense_transposed(q, k, lse, mask, scale, is_causal, dlse.const_data_ptr(), to_acc(q, dtype));
  return {dq, dk};
}

std::tuple<Tensor, Tensor> summed_attention_cpu(const Tensor& q_, const Tensor& k_, const Tensor& v,
                                                double scale, bool is_causal,
                                                OptionalTensor key_mask) {
  check_dim(q_, "q", 4);
  check_dense(q_, k_);
  check_dim(v, "v", 3);
  check_shape(v, "v", {k_.size(0), k_.size(2), v.size(2)});
  const Tensor q = with_contiguous_rows(q_), k = with_contiguous_rows(k_);
  const DType dtype = dtype_of(q, "q");
  const int64_t M = k.size(2);
  const Packed keys = pack(k, mask_data(&key_mask, k.size(0), M), dtype == DType::kFloat64);
  const Tensor lse = dense_lse(q, keys, M, scale, is_causal,
                               new_tensor(q, {q.size(0), q.size(1), q.size(2)}, acc_type(dtype)));
  return {dense_forward(q, keys, M, lse, scale, is_causal, to_acc(v, dtype)), lse};
}

Tensor summed_attention_backward_cpu(const Tensor& dout, const Tensor& q_, const Tensor& k_,
                                     const Tensor& lse_, double scale, bool is_causal,
                                     OptionalTensor key_mask) {
  check_dim(q_, "q", 4);
  check_dense(q_, k_);
  check_dim(dout, "dout", 3);
  const Tensor q = with_contiguous_rows(q_), k = with_contiguous_rows(k_),
               lse = torch::stable::contiguous(lse_);
  const DType dtype = dtype_of(q, "q");
  check_shape(dout, "dout", {q.size(0), q.size(2), dout.size(2)});
  check_type(lse, "lse", acc_type(dtype));
  check_shape(lse, "lse", {q.size(0), q.size(1), q.size(2)});
  const uint8_t* mask = mask_data(&key_mask, k.size(0), k.size(2));
  return dense_transposed(q, k, lse, mask, scale, is_causal, nullptr, to_acc(dout, dtype));
}

// "in use: built and runnable, ...", for build_info().
std::string cpu_isas() {
  std::string names = active_kernels().isa;
  names += ":";
  for (const char* name : {"scalar", "avx2", "avx512"})
    if (kernels_for(name) != nullptr) names += std::string(" ") + name;
  return names;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(smartbird, CPU, m) {
  m.impl("sketch_sample", TORCH_BOX(&sketch_sample_cpu));
  m.impl("gather_scores", TORCH_BOX(&gather_scores_cpu));
  m.impl("gather_scores_backward", TORCH_BOX(&gather_scores_backward_cpu));
  m.impl("gather_attention", TORCH_BOX(&gather_attention_cpu));
  m.impl("gather_attention_backward", TORCH_BOX(&gather_attention_backward_cpu));
  m.impl("sketch_lse", TORCH_BOX(&sketch_lse_cpu));
  m.impl("sketch_lse_backward", TORCH_BOX(&sketch_lse_backward_cpu));
  m.impl("summed_attention", TORCH_BOX(&summed_attention_cpu));
  m.impl("summed_attention_backward", TORCH_BOX(&summed_attention_backward_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(smartbird, CompositeExplicitAutograd, m) {
  m.impl("cpu_isas", TORCH_BOX(&cpu_isas));
}

}  // namespace smartbird
