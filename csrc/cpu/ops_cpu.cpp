// The CPU implementation of every op: tensors become a params struct, scratch is allocated, tasks
// are spread over torch's threads.
#include <atomic>
#include <cstdlib>
#include <memory>
#include <string>
#include <tuple>

#include "../op_inputs.h"
#include "kernels.h"

namespace smartbird {
namespace {

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
                  "smartbird: q_sketch or k_sketch holds NaN or infinity, or numbers whose "
                  "products overflow float32, in which all dtypes are sampled");
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

// Packed keys (which must outlive the params), mask and seed.
Packed add_keys(const Tensor& k, OptionalTensor* key_mask, const Tensor& seed,
                SketchSampleParams* p) {
  p->key_mask = mask_data(key_mask, p->B, p->M);
  read_seed(seed, &p->seed, &p->offset);
  Packed packed = pack(k, p->key_mask, /*to_double=*/false, /*scale=*/1, /*interleave=*/true);
  p->k_tiles = packed.tiles.const_data_ptr<float>();
  p->key_bias = packed.key_bias.const_data_ptr<float>();
  p->tile_norm = packed.tile_norm.const_data_ptr<float>();
  return packed;
}

std::tuple<Tensor, Tensor> sketch_sample_cpu(const Tensor& q_sketch, const Tensor& k_sketch,
                                             int64_t num_samples, int64_t num_index_heads,
                                             std::string method, double scale, bool is_causal,
                                             OptionalTensor key_mask, int64_t window,
                                             int64_t num_sinks, const Tensor& seed,
                                             bool need_log_inclusion) {
  const Tensor q = with_contiguous_rows(q_sketch), k = with_contiguous_rows(k_sketch);
  SketchSampleParams p = sketch_sample_params(q, k, num_samples, num_index_heads, method, scale,
                                              is_causal, window, num_sinks);
  const Packed packed = add_keys(k, &key_mask, seed, &p);
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
  if (seed.has_value()) read_seed(*seed, &p.seed, &p.offset);
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

// Queries that sampled_attention takes at once: a multiple of what a gather takes at once, so that
// each key is gathered several times while it is in the cache, with indices of about this size.
constexpr int64_t kIndexBytes = int64_t{16} << 20, kQueryStep = 1024;

// sketch_sample and gather_attention, a block of queries after the other, so that no more indices
// exist at a time than those of a block.
Tensor sampled_attention_cpu(const Tensor& q_, const Tensor& k_, const Tensor& v_,
                             const Tensor& q_sketch_, const Tensor& k_sketch_, int64_t num_samples,
                             int64_t num_index_heads, std::string method, bool correction,
                             double scale, double sketch_scale, bool is_causal,
                             OptionalTensor key_mask, int64_t window, int64_t num_sinks,
                             double dropout_p, const Tensor& seed) {
  const Tensor q = with_contiguous_rows(q_), k = with_contiguous_rows(k_),
               v = with_contiguous_rows(v_), q_sketch = with_contiguous_rows(q_sketch_),
               k_sketch = with_contiguous_rows(k_sketch_);
  SketchSampleParams s = sketch_sample_params(q_sketch, k_sketch, num_samples, num_index_heads,
                                              method, sketch_scale, is_causal, window, num_sinks);
  GatherParams g = gather_params(q, k, num_index_heads, num_samples, scale);
  add_values(v, std::nullopt, dropout_p, seed, &g);
  STD_TORCH_CHECK(s.B == g.B && s.N == g.N && s.M == g.M,
                  "q_sketch and k_sketch must have the tokens of q and k");
  const Packed packed = add_keys(k_sketch, &key_mask, seed, &s);
  g.seed = s.seed, g.offset = s.offset;

  const int64_t row_bytes = std::max<int64_t>(1, s.B * s.H_i * s.K * 4);
  const int64_t steps = std::max<int64_t>(1, kIndexBytes / row_bytes / kQueryStep);
  const int64_t rows = std::min(s.N, steps * kQueryStep);
  const Tensor indices = new_tensor(q, {s.B, s.H_i, rows, s.K}, ScalarType::Int);
  Tensor log_inclusion;
  if (correction) log_inclusion = new_tensor(q, {s.B, s.H_i, rows, s.K}, ScalarType::Float);
  const Tensor out = new_tensor(q, {g.B, g.H, g.N, g.Dv}, q.scalar_type());
  const Tensor lse = new_tensor(q, {g.B, g.H, g.N}, acc_type(g.dtype));
  int32_t error = kNoError;
  s.indices = indices.mutable_data_ptr<int32_t>();
  g.indices = s.indices;
  g.out = out.mutable_data_ptr();
  g.lse = lse.mutable_data_ptr();
  s.error = g.error = &error;
  for (int64_t begin = 0; begin < s.N; begin += rows) {
    s.row_begin = g.row_begin = begin;
    s.row_end = g.row_end = std::min(begin + rows, s.N);
    const int64_t count = s.row_end - begin;
    g.indices_stride[0] = s.H_i * count * s.K;
    g.indices_stride[1] = count * s.K;
    g.indices_stride[2] = s.K;
    if (correction) s.log_inclusion = log_inclusion.mutable_data_ptr<float>();
    run(active_kernels().sketch_sample, s);
    raise_value_error(error);
    Tensor bias;
    if (correction) {
      torch::stable::parallel_for(0, s.B * s.H_i * count * s.K, 1 << 16,
                                  [&](int64_t first, int64_t last) {
                                    for (int64_t j = first; j < last; ++j)
                                      s.log_inclusion[j] = -s.log_inclusion[j];
                                  });
      bias = torch::stable::to(log_inclusion, acc_type(g.dtype));
      g.H_bias = g.H_i;
      g.bias = bias.const_data_ptr();
      for (int d = 0; d < 3; ++d) g.bias_stride[d] = g.indices_stride[d];
      g.bias_stride[3] = 1;
    }
    run(active_kernels().gather_attention, g);
  }
  return out;
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
  if (seed.has_value()) read_seed(*seed, &p.fwd.seed, &p.fwd.offset);
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

// ---- distillation on sampled keys ---------------------------------------------------------------

// k_sketch [B, M, S] as acc [B, M_pad, S_pad], zeros in the padding and where the mask hides a key:
// what a weight of zero multiplies must be finite.
template <typename A>
Tensor padded_keys(const Tensor& k, const DistillParams& p) {
  const int64_t B = k.size(0), M = k.size(1);
  const ScalarType type = acc_type(p.gather.dtype);
  const Tensor source = to_acc(k, p.gather.dtype), out = new_tensor(k, {B, p.M_pad, p.S_pad}, type);
  const A* from = source.const_data_ptr<A>();
  A* to = out.mutable_data_ptr<A>();
  torch::stable::parallel_for(0, B * p.M_pad, 1 << 12, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / p.M_pad, m = row % p.M_pad;
      const bool valid = m < M && (p.key_mask == nullptr || p.key_mask[b * M + m]);
      for (int64_t d = 0; d < p.S_pad; ++d)
        to[row * p.S_pad + d] = valid && d < p.S ? from[(b * M + m) * p.S + d] : A{0};
    }
  });
  return out;
}

// Chunks of queries, each with a buffer for dk: tasks for many cores, of no fewer queries than pay
// for a buffer, within what memory allows.
constexpr int64_t kMostChunks = 16, kFewestTasks = 4, kLeastChunk = 64;
constexpr int64_t kChunkBytes = int64_t{64} << 20;

int64_t distill_chunk(const DistillParams& p) {
  const GatherParams& g = p.gather;
  const int64_t buffer = std::max<int64_t>(1, g.B * p.M_pad * p.S_pad * acc_bytes(g.dtype));
  const int64_t fewest = (kFewestTasks + g.B - 1) / std::max<int64_t>(1, g.B);
  const int64_t chunks = std::clamp<int64_t>(kChunkBytes / buffer, fewest, kMostChunks);
  return std::max(kLeastChunk, (g.N + chunks - 1) / chunks);
}

std::tuple<Tensor, Tensor, Tensor> sampled_distill_cpu(
    const Tensor& q_, const Tensor& k_, const Tensor& q_sketch_, const Tensor& k_sketch_,
    const Tensor& indices_, OptionalTensor bias, double scale, double sketch_scale, bool is_causal,
    OptionalTensor key_mask, bool need_grads) {
  const Tensor q = with_contiguous_rows(q_), k = with_contiguous_rows(k_),
               q_sketch = with_contiguous_rows(q_sketch_),
               k_sketch = with_contiguous_rows(k_sketch_), indices = with_contiguous_rows(indices_);
  DistillParams p{};
  p.gather = gather_params(q, k, indices, scale);
  GatherParams& g = p.gather;
  add_bias(bias, &g);
  check_dim(q_sketch, "q_sketch", 3);
  p.S = q_sketch.size(2);
  check_shape(q_sketch, "q_sketch", {g.B, g.N, p.S});
  check_shape(k_sketch, "k_sketch", {g.B, g.M, p.S});
  check_type(q_sketch, "q_sketch", q.scalar_type());
  check_type(k_sketch, "k_sketch", q.scalar_type());
  p.S_pad = (p.S + kFeaturePad - 1) / kFeaturePad * kFeaturePad;
  p.M_pad = (g.M + kTile - 1) / kTile * kTile;
  p.q_sketch = q_sketch.const_data_ptr();
  set_strides(q_sketch, p.q_sketch_stride);
  p.key_mask = mask_data(&key_mask, g.B, g.M);
  p.sketch_scale = sketch_scale;
  p.is_causal = is_causal;
  const bool is_double = g.dtype == DType::kFloat64;
  const Packed packed = pack(k_sketch, p.key_mask, is_double);
  const Tensor k_rows =
      is_double ? padded_keys<double>(k_sketch, p) : padded_keys<float>(k_sketch, p);
  p.k_tiles = packed.tiles.const_data_ptr();
  p.key_bias = packed.key_bias.const_data_ptr();
  p.k_rows = k_rows.const_data_ptr();

  std::vector<int64_t> first_valid(static_cast<size_t>(g.B), 0);
  int64_t valid_rows = 0;
  for (int64_t b = 0; b < g.B; ++b) {
    int64_t& first = first_valid[static_cast<size_t>(b)];
    while (first < g.M && p.key_mask != nullptr && !p.key_mask[b * g.M + first]) ++first;
    // A causal row i sees the keys j <= i + M - N.
    if (first < g.M) valid_rows += is_causal ? std::min(g.N, g.M - first) : g.N;
  }
  p.first_valid = first_valid.data();
  p.row_weight = 1.0 / static_cast<double>(std::max<int64_t>(1, valid_rows));

  p.chunk = distill_chunk(p);
  const int64_t chunks = (g.N + p.chunk - 1) / p.chunk;
  const ScalarType acc = acc_type(g.dtype);
  const auto gradient = [&](std::vector<int64_t> shape) {
    return new_tensor(q, need_grads ? shape : std::vector<int64_t>{0}, acc);
  };
  const Tensor dq = gradient({g.B, g.N, p.S}), dk = gradient({g.B, g.M, p.S}),
               dk_parts = gradient({g.B, chunks, p.M_pad, p.S_pad});
  if (need_grads) {
    p.dq_sketch = dq.mutable_data_ptr();
    p.dk_sketch = dk.mutable_data_ptr();
    p.dk_parts = dk_parts.mutable_data_ptr();
  }
  std::vector<double> loss_parts(static_cast<size_t>(g.B * chunks));
  p.loss_parts = loss_parts.data();
  int32_t error = kNoError;
  g.error = &error;
  run(active_kernels().distill_queries, p);
  raise_value_error(error);
  if (need_grads) run(active_kernels().distill_reduce, p);
  double sum = 0;
  for (const double part : loss_parts) sum += part;
  const Tensor loss = new_tensor(q, {}, acc);
  if (is_double)
    *loss.mutable_data_ptr<double>() = sum;
  else
    *loss.mutable_data_ptr<float>() = static_cast<float>(sum);
  return {loss, dq, dk};
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
  m.impl("sampled_attention", TORCH_BOX(&sampled_attention_cpu));
  m.impl("gather_attention_backward", TORCH_BOX(&gather_attention_backward_cpu));
  m.impl("sketch_lse", TORCH_BOX(&sketch_lse_cpu));
  m.impl("sketch_lse_backward", TORCH_BOX(&sketch_lse_backward_cpu));
  m.impl("summed_attention", TORCH_BOX(&summed_attention_cpu));
  m.impl("summed_attention_backward", TORCH_BOX(&summed_attention_backward_cpu));
  m.impl("sampled_distill", TORCH_BOX(&sampled_distill_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(smartbird, CompositeExplicitAutograd, m) {
  m.impl("cpu_isas", TORCH_BOX(&cpu_isas));
}

}  // namespace smartbird
