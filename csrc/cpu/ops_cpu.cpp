// The CPU implementation of every op: tensors become a params struct, scratch is allocated, tasks
// are spread over torch's threads.
#include <sys/mman.h>

#include <atomic>
#include <string>
#include <tuple>

#include "../op_inputs.h"
#include "kernels.h"

namespace smartbird {
namespace {

// Scratch of 64-byte aligned pieces, kept by the calling thread for its next call: taken from the
// heap and given back, it splits what PyTorch's aligned allocations leave, glibc before 2.38 finds
// no use for the parts, and a process grows with every call.
class ScratchMemory {
 public:
  enum Use { kTasks, kIndices, kRows, kUses };

  ScratchMemory(Use use, int64_t bytes) : memory_(&kept(use)) {
    const auto size = static_cast<size_t>(bytes + 64);
    if (memory_->size() < size) {
      memory_->reset();
      memory_->allocate(size);
    }
    STD_TORCH_CHECK(memory_->data() != nullptr, "smartbird ran out of memory: ", bytes,
                    " bytes of scratch");
  }
  ~ScratchMemory() {
    if (memory_->size() > kMostKept) memory_->reset();
  }
  ScratchMemory(const ScratchMemory&) = delete;
  ScratchMemory& operator=(const ScratchMemory&) = delete;

  char* aligned() const {
    char* data = memory_->data();
    return data + (64 - reinterpret_cast<uintptr_t>(data) % 64) % 64;
  }

 private:
  // More than this is given back.
  static constexpr size_t kMostKept = size_t{32} << 20;

  class Block {
   public:
    Block() = default;
    ~Block() { reset(); }
    Block(const Block&) = delete;
    Block& operator=(const Block&) = delete;

    void allocate(size_t size) {
      void* data = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (data == MAP_FAILED) return;
      data_ = static_cast<char*>(data);
      size_ = size;
    }
    void reset() {
      if (data_ != nullptr) munmap(data_, size_);
      data_ = nullptr;
      size_ = 0;
    }
    char* data() const { return data_; }
    size_t size() const { return size_; }

   private:
    char* data_ = nullptr;
    size_t size_ = 0;
  };

  static Block& kept(Use use) {
    thread_local Block blocks[kUses];
    return blocks[use];
  }

  Block* memory_;
};

// Tasks are fetched one by one, so that rows of unequal length (causal) and threads of unequal
// speed even out.
template <typename Params>
void run(const TaskKernel<Params>& kernel, const Params& params) {
  const int64_t tasks = kernel.num_tasks(params);
  if (tasks == 0) return;
  const int64_t threads = std::min<int64_t>(tasks, torch::stable::get_num_threads());
  const int64_t bytes = (kernel.scratch_bytes(params) + 63) / 64 * 64;
  const ScratchMemory scratch(ScratchMemory::kTasks, bytes * threads);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;)
        kernel.run(params, task, scratch.aligned() + t * bytes);
  });
}

// smartbird/ops/_call.py turns these into ValueError by their prefix.
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

// What a device would have to be asked for: that the sequences of a packed call are in order.
void check_segments(const Segments& segments, const char* name) {
  if (segments.cu == nullptr) return;
  int64_t last = 0;
  bool ordered = segments.cu[0] == 0;
  for (int64_t s = 0; s <= segments.n; ++s) {
    ordered = ordered && segments.cu[s] >= last;
    last = segments.cu[s];
  }
  STD_TORCH_CHECK(ordered && last <= segments.length, "smartbird: ", name,
                  " must ascend from 0 to no more than the number of rows, ", segments.length,
                  ", got an end of ", last);
}

void check_sequences(const Visible& v) {
  check_segments(v.queries, "cu_seqlens_q");
  check_segments(v.keys, "cu_seqlens_k");
}

int64_t longest(const Segments& segments) {
  if (segments.cu == nullptr) return segments.length;
  int64_t most = 0;
  for (int64_t s = 0; s < segments.count(); ++s)
    most = std::max(most, segments.rows(s).end - segments.rows(s).begin);
  return most;
}

// ---- packing ------------------------------------------------------------------------------------

struct Packed {
  Tensor tiles, key_bias, tile_norm;
};

// x [B, H, M, D] with contiguous rows.
Packed pack(const Tensor& x, const Segments& rows, const uint8_t* key_mask, bool to_double,
            double scale = 1, bool interleave = false) {
  PackParams p{};
  p.B = x.size(0);
  p.H = x.size(1);
  p.D = x.size(3);
  p.rows = rows;
  p.dtype = dtype_of(x, "x");
  p.to_double = to_double;
  p.x = x.const_data_ptr();
  for (int d = 0; d < 3; ++d) p.stride[d] = x.stride(d);
  p.scale = scale;
  p.interleave = interleave;
  p.key_mask = key_mask;
  const int64_t tiles = rows.blocks_per_batch(kTile);
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

// Seed and keys; packed ones, which must outlive the params, unless sketch_scan reads them.
std::optional<Packed> add_keys(const Tensor& k, const Tensor& seed, SketchSampleParams* p) {
  check_sequences(p->visible);
  read_seed(seed, &p->seed, &p->offset);
  p->most_queries = longest(p->visible.queries);
  p->most_keys = longest(p->visible.keys);
  p->k_sketch = k.const_data_ptr();
  set_strides(k, p->k_stride);
  if (scans(*p)) return std::nullopt;
  Packed packed = pack(k, p->visible.keys, p->visible.key_mask, /*to_double=*/false, /*scale=*/1,
                       /*interleave=*/true);
  p->k_tiles = packed.tiles.const_data_ptr<float>();
  p->key_bias = packed.key_bias.const_data_ptr<float>();
  p->tile_norm = packed.tile_norm.const_data_ptr<float>();
  return packed;
}

void draw(SketchSampleParams* p) {
  std::optional<ScratchMemory> rows;
  if (scans(*p)) {
    rows.emplace(ScratchMemory::kRows, scanned_size(*p) * int64_t{sizeof(float)});
    p->scanned = reinterpret_cast<float*>(rows->aligned());
    run(active_kernels().sketch_scan, *p);
    raise_value_error(*p->error);
  }
  run(active_kernels().sketch_sample, *p);
  raise_value_error(*p->error);
}

std::tuple<Tensor, Tensor> sketch_sample_cpu(
    const Tensor& q_sketch, const Tensor& k_sketch, int64_t num_samples, int64_t num_index_heads,
    StringHandle method_name, double scale, bool is_causal, OptionalTensor key_mask, int64_t window,
    int64_t num_sinks, OptionalTensor global_mask, std::optional<int64_t> query_offset,
    OptionalTensor positions, OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k,
    OptionalTensor sequence_ids, int64_t first_head, const Tensor& seed, bool need_log_inclusion) {
  const std::string method = take(method_name);
  const Tensor q = with_contiguous_rows(q_sketch), k = with_contiguous_rows(k_sketch);
  RowArguments rows{is_causal, key_mask,     window,       num_sinks,    global_mask, query_offset,
                    positions, cu_seqlens_q, cu_seqlens_k, sequence_ids, first_head};
  SketchSampleParams p =
      sketch_sample_params(q, k, num_samples, num_index_heads, method, scale, &rows);
  const std::optional<Packed> packed = add_keys(k, seed, &p);
  const Tensor indices = new_tensor(q, {p.B, p.H_i, p.N, p.K}, ScalarType::Int);
  const int64_t kept = need_log_inclusion ? p.K : 0;
  const Tensor log_inclusion = new_tensor(q, {p.B, p.H_i, p.N, kept}, ScalarType::Float);
  p.indices = indices.mutable_data_ptr<int32_t>();
  p.log_inclusion = need_log_inclusion ? log_inclusion.mutable_data_ptr<float>() : nullptr;
  int32_t error = kNoError;
  p.error = &error;
  draw(&p);
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

std::tuple<Tensor, Tensor> gather_attention_cpu(
    const Tensor& q_, const Tensor& k_, const Tensor& v_, const Tensor& indices_,
    OptionalTensor bias, double scale, double dropout_p, OptionalTensor seed,
    std::optional<int64_t> query_offset, OptionalTensor positions, OptionalTensor cu_seqlens_q,
    OptionalTensor sequence_ids, int64_t first_head) {
  const Tensor q = with_contiguous_rows(q_), k = with_contiguous_rows(k_),
               v = with_contiguous_rows(v_), indices = with_contiguous_rows(indices_);
  RowArguments rows{.query_offset = query_offset,
                    .positions = positions,
                    .cu_seqlens_q = cu_seqlens_q,
                    .sequence_ids = sequence_ids,
                    .first_head = first_head};
  GatherParams p = gather_params(q, k, indices, scale);
  add_values(v, bias, dropout_p, seed, &rows, &p);
  check_sequences(p.visible);
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
constexpr int64_t kIndexBytes = int64_t{8} << 20, kQueryStep = 1024;

// sketch_sample and gather_attention, a block of queries after the other, so that no more indices
// exist at a time than those of a block.
Tensor sampled_attention_cpu(const Tensor& q_, const Tensor& k_, const Tensor& v_,
                             const Tensor& q_sketch_, const Tensor& k_sketch_, int64_t num_samples,
                             int64_t num_index_heads, StringHandle method_name, bool correction,
                             double scale, double sketch_scale, bool is_causal,
                             OptionalTensor key_mask, int64_t window, int64_t num_sinks,
                             OptionalTensor global_mask, std::optional<int64_t> query_offset,
                             OptionalTensor positions, OptionalTensor cu_seqlens_q,
                             OptionalTensor cu_seqlens_k, OptionalTensor sequence_ids,
                             int64_t first_head, double dropout_p, const Tensor& seed) {
  const std::string method = take(method_name);
  const Tensor q = with_contiguous_rows(q_), k = with_contiguous_rows(k_),
               v = with_contiguous_rows(v_), q_sketch = with_contiguous_rows(q_sketch_),
               k_sketch = with_contiguous_rows(k_sketch_);
  RowArguments rows_of{is_causal,    key_mask,     window,    num_sinks,
                       global_mask,  query_offset, positions, cu_seqlens_q,
                       cu_seqlens_k, sequence_ids, first_head};
  SketchSampleParams s = sketch_sample_params(q_sketch, k_sketch, num_samples, num_index_heads,
                                              method, sketch_scale, &rows_of);
  GatherParams g = gather_params(q, k, num_index_heads, num_samples, scale);
  add_values(v, std::nullopt, dropout_p, seed, &rows_of, &g);
  STD_TORCH_CHECK(s.B == g.B && s.N == g.N && s.M == g.M,
                  "q_sketch and k_sketch must have the tokens of q and k");
  const std::optional<Packed> packed = add_keys(k_sketch, seed, &s);
  g.seed = s.seed, g.offset = s.offset;

  const int64_t row_bytes = std::max<int64_t>(1, s.B * s.H_i * s.K * 4);
  const int64_t steps = std::max<int64_t>(1, kIndexBytes / row_bytes / kQueryStep);
  const int64_t rows = std::min(s.N, steps * kQueryStep);
  // Of the slots of a block of queries: the keys, log_inclusion and, in double, the bias made of
  // it.
  const int64_t slots = s.B * s.H_i * rows * s.K;
  const bool widened = correction && g.dtype == DType::kFloat64;
  const ScratchMemory memory(ScratchMemory::kIndices, slots * (widened ? 16 : correction ? 8 : 4));
  double* bias = widened ? reinterpret_cast<double*>(memory.aligned()) : nullptr;
  s.indices = reinterpret_cast<int32_t*>(memory.aligned() + (widened ? 8 * slots : 0));
  if (correction) s.log_inclusion = reinterpret_cast<float*>(s.indices + slots);
  const Tensor out = new_tensor(q, {g.B, g.H, g.N, g.Dv}, q.scalar_type());
  const Tensor lse = new_tensor(q, {g.B, g.H, g.N}, acc_type(g.dtype));
  int32_t error = kNoError;
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
    draw(&s);
    if (correction) {
      torch::stable::parallel_for(0, s.B * s.H_i * count * s.K, 1 << 16,
                                  [&](int64_t first, int64_t last) {
                                    for (int64_t j = first; j < last; ++j) {
                                      s.log_inclusion[j] = -s.log_inclusion[j];
                                      if (widened)
                                        bias[j] = static_cast<double>(s.log_inclusion[j]);
                                    }
                                  });
      g.H_bias = g.H_i;
      g.bias = widened ? static_cast<const void*>(bias) : s.log_inclusion;
      for (int d = 0; d < 3; ++d) g.bias_stride[d] = g.indices_stride[d];
      g.bias_stride[3] = 1;
    }
    run(active_kernels().gather_attention, g);
  }
  return out;
}

// Rounds keep the per-slot gradients within this, or within those of one head.
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
  Tensor slot_grads, dk_sum, dv_sum;
  if (need_keys) {
    slot_grads = new_tensor(like, {slice_step, head_step, f.N, 2, f.K}, acc_type(f.dtype));
    if (head_step < group) {
      dk_sum = new_tensor(like, {f.M, f.D}, acc_type(f.dtype));
      dv_sum = new_tensor(like, {f.M, f.Dv}, acc_type(f.dtype));
      p->dk_sum = dk_sum.mutable_data_ptr();
      p->dv_sum = dv_sum.mutable_data_ptr();
    }
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
    OptionalTensor seed, std::optional<int64_t> query_offset, OptionalTensor positions,
    OptionalTensor cu_seqlens_q, OptionalTensor sequence_ids, int64_t first_head, bool need_dqk,
    bool need_dv, bool need_dbias, bool /*deterministic*/) {
  const Tensor q = with_contiguous_rows(q_), k = with_contiguous_rows(k_),
               v = with_contiguous_rows(v_), indices = with_contiguous_rows(indices_);
  const Tensor dout = torch::stable::contiguous(dout_);
  RowArguments rows{.query_offset = query_offset,
                    .positions = positions,
                    .cu_seqlens_q = cu_seqlens_q,
                    .sequence_ids = sequence_ids,
                    .first_head = first_head};
  GatherBackwardParams p{};
  p.fwd = gather_params(q, k, indices, scale);
  add_values(v, bias, dropout_p, seed, &rows, &p.fwd);
  check_sequences(p.fwd.visible);
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

// q [B, H, N, D] and k [B, H_k, M, D] with contiguous rows, and which keys each row may see.
struct DenseInputs {
  Tensor q, k;
  Visible visible;
  DType dtype;
  double scale;

  DenseInputs(const Tensor& q_, const Tensor& k_, double scale_, RowArguments* rows)
      : q(with_contiguous_rows(q_)), k(with_contiguous_rows(k_)), scale(scale_) {
    check_dense(q, k);
    dtype = dtype_of(q, "q");
    visible = rows->visible(q.size(0), q.size(2), k.size(2));
    check_sequences(visible);
  }

  Packed pack_keys() const {
    return pack(k, visible.keys, visible.key_mask, dtype == DType::kFloat64);
  }
  Packed pack_queries() const {
    return pack(q, visible.queries, nullptr, dtype == DType::kFloat64, scale * kLog2e);
  }
  Tensor new_lse() const {
    return new_tensor(q, {q.size(0), q.size(1), q.size(2)}, acc_type(dtype));
  }
  void check_lse(const Tensor& lse, const char* name) const {
    check_type(lse, name, acc_type(dtype));
    check_shape(lse, name, {q.size(0), q.size(1), q.size(2)});
  }
};

// One side as rows, the other packed as columns.
DenseParams dense_params(const DenseInputs& in, const Packed& cols, bool cols_are_queries) {
  const Tensor& rows = cols_are_queries ? in.k : in.q;
  DenseParams p{};
  p.B = rows.size(0);
  p.H = in.q.size(1);
  p.R = rows.size(2);
  p.C = cols_are_queries ? in.q.size(2) : in.k.size(2);
  p.D = rows.size(3);
  p.dtype = in.dtype;
  p.visible = in.visible;
  p.cols_are_queries = cols_are_queries;
  p.rows = rows.const_data_ptr();
  for (int d = 0; d < 3; ++d) p.row_stride[d] = rows.stride(d);
  p.rows_per_head = p.H / rows.size(1);
  p.cols_per_head = p.H / cols.tiles.size(1);
  p.scale = cols_are_queries ? 1 : in.scale * kLog2e;  // the packed queries carry it
  p.col_tiles = cols.tiles.const_data_ptr();
  p.col_bias = cols.key_bias.const_data_ptr();
  return p;
}

// lse [B, H, N].
Tensor dense_lse(const DenseInputs& in, const Packed& keys) {
  DenseParams p = dense_params(in, keys, false);
  const Tensor lse = in.new_lse();
  p.lse = lse.mutable_data_ptr();
  run(active_kernels().dense_lse, p);
  return lse;
}

// out [B, num_sums, rows, Dv] = sum over heads and columns of weight * values [B, H_v, cols, Dv].
Tensor dense_mean(DenseParams p, const Tensor& values, int64_t num_sums) {
  p.H_v = values.size(1);
  p.H_out = num_sums;
  check_groups(p.H, p.H_v, "the heads of q must be a multiple of those of the values");
  check_groups(p.H, p.H_out, "the heads of q must be a multiple of the sums");
  check_groups(std::max(p.H_v, p.H_out), std::min(p.H_v, p.H_out),
               "the sums and the heads of the values must divide one another");
  p.Dv = values.size(3);
  p.values = values.const_data_ptr();
  const Tensor out = new_tensor(values, {p.B, p.H_out, p.R, p.Dv}, acc_type(p.dtype));
  p.out = out.mutable_data_ptr();
  run(active_kernels().dense_mean, p);
  return out;
}

// out [B, num_sums, N, Dv]: softmax weights times values of keys.
Tensor dense_forward(const DenseInputs& in, const Packed& keys, const Tensor& lse,
                     const Tensor& values, int64_t num_sums) {
  DenseParams p = dense_params(in, keys, false);
  p.row_shift = lse.const_data_ptr();
  return dense_mean(p, values, num_sums);
}

// out [B, num_sums, M, Dv]: the transposed product, with values of queries and a weight of each.
Tensor dense_transposed(const DenseInputs& in, const Tensor& lse, const void* query_weight,
                        const Tensor& values, int64_t num_sums) {
  const Packed queries = in.pack_queries();
  DenseParams p = dense_params(in, queries, true);
  p.col_shift = lse.const_data_ptr();
  p.col_weight = query_weight;
  return dense_mean(p, values, num_sums);
}

Tensor sketch_lse_cpu(const Tensor& q_sketch, const Tensor& k_sketch, double scale, bool is_causal,
                      OptionalTensor key_mask, int64_t window, std::optional<int64_t> query_offset,
                      OptionalTensor positions, OptionalTensor cu_seqlens_q,
                      OptionalTensor cu_seqlens_k) {
  RowArguments rows{.is_causal = is_causal,
                    .key_mask = key_mask,
                    .window = window,
                    .query_offset = query_offset,
                    .positions = positions,
                    .cu_seqlens_q = cu_seqlens_q,
                    .cu_seqlens_k = cu_seqlens_k};
  const DenseInputs in(q_sketch, k_sketch, scale, &rows);
  return dense_lse(in, in.pack_keys());
}

// Without the factors `dlse` of a row and `scale`, which the caller multiplies in: see
// smartbird/ops/dense.py.
std::tuple<Tensor, Tensor> sketch_lse_backward_cpu(
    const Tensor& dlse_, const Tensor& q_sketch, const Tensor& k_sketch, const Tensor& lse_,
    double scale, bool is_causal, OptionalTensor key_mask, int64_t window,
    std::optional<int64_t> query_offset, OptionalTensor positions, OptionalTensor cu_seqlens_q,
    OptionalTensor cu_seqlens_k) {
  RowArguments rows{.is_causal = is_causal,
                    .key_mask = key_mask,
                    .window = window,
                    .query_offset = query_offset,
                    .positions = positions,
                    .cu_seqlens_q = cu_seqlens_q,
                    .cu_seqlens_k = cu_seqlens_k};
  const DenseInputs in(q_sketch, k_sketch, scale, &rows);
  const Tensor dlse = torch::stable::contiguous(dlse_), lse = torch::stable::contiguous(lse_);
  in.check_lse(dlse, "dlse");
  in.check_lse(lse, "lse");
  const int64_t H_s = in.q.size(1), H_ks = in.k.size(1);
  const Tensor dq = dense_forward(in, in.pack_keys(), lse, to_acc(in.k, in.dtype), H_s);
  const Tensor dk = dense_transposed(in, lse, dlse.const_data_ptr(), to_acc(in.q, in.dtype), H_ks);
  return {dq, dk};
}

std::tuple<Tensor, Tensor> summed_attention_cpu(
    const Tensor& q, const Tensor& k, const Tensor& v, int64_t num_sums, double scale,
    bool is_causal, OptionalTensor key_mask, int64_t window, std::optional<int64_t> query_offset,
    OptionalTensor positions, OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k) {
  RowArguments rows{.is_causal = is_causal,
                    .key_mask = key_mask,
                    .window = window,
                    .query_offset = query_offset,
                    .positions = positions,
                    .cu_seqlens_q = cu_seqlens_q,
                    .cu_seqlens_k = cu_seqlens_k};
  const DenseInputs in(q, k, scale, &rows);
  check_dim(v, "v", 4);
  check_shape(v, "v", {k.size(0), v.size(1), k.size(2), v.size(3)});
  const Packed keys = in.pack_keys();
  const Tensor lse = dense_lse(in, keys);
  return {dense_forward(in, keys, lse, to_acc(v, in.dtype), num_sums), lse};
}

Tensor summed_attention_backward_cpu(const Tensor& dout, const Tensor& q, const Tensor& k,
                                     const Tensor& lse_, int64_t num_values, double scale,
                                     bool is_causal, OptionalTensor key_mask, int64_t window,
                                     std::optional<int64_t> query_offset, OptionalTensor positions,
                                     OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k) {
  RowArguments rows{.is_causal = is_causal,
                    .key_mask = key_mask,
                    .window = window,
                    .query_offset = query_offset,
                    .positions = positions,
                    .cu_seqlens_q = cu_seqlens_q,
                    .cu_seqlens_k = cu_seqlens_k};
  const DenseInputs in(q, k, scale, &rows);
  check_dim(dout, "dout", 4);
  check_shape(dout, "dout", {q.size(0), dout.size(1), q.size(2), dout.size(3)});
  const Tensor lse = torch::stable::contiguous(lse_);
  in.check_lse(lse, "lse");
  return dense_transposed(in, lse, nullptr, to_acc(dout, in.dtype), num_values);
}

// ---- distillation on sampled keys ---------------------------------------------------------------

// k_sketch [B, H_ks, M, S] as acc [B, H_ks, T * 32, S_pad], each segment from a tile of its own on;
// zeros in the padding and where the mask hides a key: what a weight of zero multiplies must be
// finite.
template <typename A>
Tensor padded_keys(const Tensor& k, const DistillParams& p) {
  const int64_t heads = k.size(0) * k.size(1), M = k.size(2);
  const Segments& keys = p.visible.keys;
  const ScalarType type = acc_type(p.gather.dtype);
  const Tensor source = to_acc(k, p.gather.dtype),
               out = new_tensor(k, {k.size(0), k.size(1), p.T * kTile, p.S_pad}, type);
  const A* from = source.const_data_ptr<A>();
  A* to = out.mutable_data_ptr<A>();
  torch::stable::parallel_for(0, heads * p.T, 1 << 7, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t head = tile / p.T, b = head / k.size(1);
      const SegmentBlock block = segment_block(keys, kTile, tile % p.T);
      const int64_t first = keys.rows(block.segment).begin + block.begin;
      for (int64_t c = 0; c < kTile; ++c) {
        const int64_t m = first + c;
        const bool valid = block.begin + c < block.end &&
                           (p.visible.key_mask == nullptr || p.visible.key_mask[b * M + m]);
        A* row = to + (tile * kTile + c) * p.S_pad;
        for (int64_t d = 0; d < p.S_pad; ++d)
          row[d] = valid && d < p.S ? from[(head * M + m) * p.S + d] : A{0};
      }
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
  const int64_t tasks = std::max<int64_t>(1, g.B * p.H_s);
  const int64_t buffer = std::max<int64_t>(1, p.part_keys * p.S_pad * acc_bytes(g.dtype));
  const int64_t fewest = (kFewestTasks + tasks - 1) / tasks;
  const int64_t chunks = std::clamp<int64_t>(kChunkBytes / (tasks * buffer), fewest, kMostChunks);
  return std::max(kLeastChunk, (g.N + chunks - 1) / chunks);
}

// How many rows have a free key.
int64_t count_free_rows(const Visible& v, const int32_t* valid_before) {
  int64_t count = 0;
  for (int64_t segment = 0; segment < v.queries.n; ++segment) {
    const Sequence s = sequence_at(v, segment);
    for (int64_t i = 0; i < s.num_queries; ++i) count += has_free_key(v, s, i, valid_before);
  }
  return count;
}

std::tuple<Tensor, Tensor, Tensor> sampled_distill_cpu(
    const Tensor& q_, const Tensor& k_, const Tensor& q_sketch_, const Tensor& k_sketch_,
    const Tensor& indices_, OptionalTensor bias, double scale, double sketch_scale, bool is_causal,
    OptionalTensor key_mask, int64_t window, std::optional<int64_t> query_offset,
    OptionalTensor positions, OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k, bool mean,
    bool need_grads) {
  const Tensor q = with_contiguous_rows(q_), k = with_contiguous_rows(k_),
               q_sketch = with_contiguous_rows(q_sketch_),
               k_sketch = with_contiguous_rows(k_sketch_), indices = with_contiguous_rows(indices_);
  RowArguments rows{.is_causal = is_causal,
                    .key_mask = key_mask,
                    .window = window,
                    .query_offset = query_offset,
                    .positions = positions,
                    .cu_seqlens_q = cu_seqlens_q,
                    .cu_seqlens_k = cu_seqlens_k};
  DistillParams p{};
  p.gather = gather_params(q, k, indices, scale);
  GatherParams& g = p.gather;
  add_bias(bias, &g);
  check_dim(q_sketch, "q_sketch", 4);
  check_dim(k_sketch, "k_sketch", 4);
  p.H_s = q_sketch.size(1);
  p.H_ks = k_sketch.size(1);
  p.S = q_sketch.size(3);
  check_shape(q_sketch, "q_sketch", {g.B, p.H_s, g.N, p.S});
  check_shape(k_sketch, "k_sketch", {g.B, p.H_ks, g.M, p.S});
  check_type(q_sketch, "q_sketch", q.scalar_type());
  check_type(k_sketch, "k_sketch", q.scalar_type());
  check_groups(p.H_s, p.H_ks, "the sketches of queries must be a multiple of those of keys");
  check_groups(g.H, p.H_s, "the heads of q must be a multiple of the sketches");
  p.visible = rows.visible(g.B, g.N, g.M);
  check_sequences(p.visible);
  p.S_pad = (p.S + kFeaturePad - 1) / kFeaturePad * kFeaturePad;
  p.T = p.visible.keys.blocks_per_batch(kTile);
  p.part_keys = (longest(p.visible.keys) + kTile - 1) / kTile * kTile;
  p.q_sketch = q_sketch.const_data_ptr();
  set_strides(q_sketch, p.q_sketch_stride);
  p.sketch_scale = sketch_scale;
  const bool is_double = g.dtype == DType::kFloat64;
  const Packed packed = pack(k_sketch, p.visible.keys, p.visible.key_mask, is_double);
  const Tensor k_rows =
      is_double ? padded_keys<double>(k_sketch, p) : padded_keys<float>(k_sketch, p);
  p.k_tiles = packed.tiles.const_data_ptr();
  p.key_bias = packed.key_bias.const_data_ptr();
  p.k_rows = k_rows.const_data_ptr();

  std::vector<int32_t> valid_before;
  if (p.visible.key_mask != nullptr) {
    valid_before.resize(static_cast<size_t>(g.B * (g.M + 1)), 0);
    for (int64_t b = 0; b < g.B; ++b)
      for (int64_t m = 0; m < g.M; ++m)
        valid_before[static_cast<size_t>(b * (g.M + 1) + m + 1)] =
            valid_before[static_cast<size_t>(b * (g.M + 1) + m)] +
            (p.visible.key_mask[b * g.M + m] != 0);
    p.valid_before = valid_before.data();
  }
  p.row_weight = 1;
  if (mean) {
    const int64_t count = p.H_s * count_free_rows(p.visible, p.valid_before);
    p.row_weight = 1.0 / static_cast<double>(std::max<int64_t>(1, count));
  }

  p.chunk = distill_chunk(p);
  const int64_t blocks = p.visible.queries.num_blocks(p.chunk);
  const ScalarType acc = acc_type(g.dtype);
  const auto gradient = [&](std::vector<int64_t> shape) {
    return new_tensor(q, need_grads ? shape : std::vector<int64_t>{0}, acc);
  };
  const Tensor dq = gradient({g.B, p.H_s, g.N, p.S}), dk = gradient({g.B, p.H_ks, g.M, p.S}),
               dk_parts = gradient({p.H_s, blocks, p.part_keys, p.S_pad});
  if (need_grads) {
    p.dq_sketch = dq.mutable_data_ptr();
    p.dk_sketch = dk.mutable_data_ptr();
    p.dk_parts = dk_parts.mutable_data_ptr();
  }
  std::vector<double> loss_parts(static_cast<size_t>(p.H_s * blocks));
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
