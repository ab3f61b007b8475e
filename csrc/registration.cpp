// Every schema of the library, and nothing else. Kernels are registered beside their implementation
// (cpu/ops_cpu.cpp), fake kernels and gradients in smartbird/ops/.
#include <torch/csrc/stable/library.h>

// clang-format off: it would break the strings where no reader would.
STABLE_TORCH_LIBRARY(smartbird, m) {
  // What a call says of its rows has these arguments, see visible.h:
  //   is_causal, key_mask, window, num_sinks, global_mask, query_offset, positions, cu_seqlens_q,
  //   cu_seqlens_k, sequence_ids, first_head
  // or as many of them as the op needs.
  m.def(
      "sketch_sample(Tensor q_sketch, Tensor k_sketch, SymInt num_samples, int num_index_heads, "
      "str method, float scale, "
      "bool is_causal, Tensor? key_mask, int window, int num_sinks, Tensor? global_mask, "
      "SymInt? query_offset, Tensor? positions, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
      "Tensor? sequence_ids, int first_head, "
      "Tensor seed, bool need_log_inclusion) -> (Tensor indices, Tensor log_inclusion)");
  m.def("gather_scores(Tensor q, Tensor k, Tensor indices, float scale) -> Tensor");
  m.def(
      "gather_scores_backward(Tensor dscores, Tensor q, Tensor k, Tensor indices, float scale, "
      "bool deterministic=False) -> (Tensor dq, Tensor dk)");
  m.def(
      "gather_attention(Tensor q, Tensor k, Tensor v, Tensor indices, Tensor? bias, float scale, "
      "float dropout_p, Tensor? seed, SymInt? query_offset, Tensor? positions, "
      "Tensor? cu_seqlens_q, Tensor? sequence_ids, int first_head) "
      "-> (Tensor out, Tensor lse)");
  m.def(
      "gather_attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, "
      "Tensor indices, Tensor? bias, float scale, "
      "float dropout_p, Tensor? seed, SymInt? query_offset, Tensor? positions, "
      "Tensor? cu_seqlens_q, Tensor? sequence_ids, int first_head, "
      "bool need_dqk, bool need_dv, bool need_dbias, bool deterministic=False) "
      "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias)");
  m.def(
      "sampled_attention(Tensor q, Tensor k, Tensor v, Tensor q_sketch, Tensor k_sketch, "
      "SymInt num_samples, int num_index_heads, str method, bool correction, float scale, "
      "float sketch_scale, "
      "bool is_causal, Tensor? key_mask, int window, int num_sinks, Tensor? global_mask, "
      "SymInt? query_offset, Tensor? positions, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
      "Tensor? sequence_ids, int first_head, "
      "float dropout_p, Tensor seed) -> Tensor");
  m.def(
      "sketch_lse(Tensor q_sketch, Tensor k_sketch, float scale, "
      "bool is_causal, Tensor? key_mask, int window, SymInt? query_offset, Tensor? positions, "
      "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k) -> Tensor");
  m.def(
      "sketch_lse_backward(Tensor dlse, Tensor q_sketch, Tensor k_sketch, Tensor lse, float scale, "
      "bool is_causal, Tensor? key_mask, int window, SymInt? query_offset, Tensor? positions, "
      "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k) "
      "-> (Tensor dq_sketch, Tensor dk_sketch)");
  m.def(
      "summed_attention(Tensor q, Tensor k, Tensor v, int num_sums, float scale, "
      "bool is_causal, Tensor? key_mask, int window, SymInt? query_offset, Tensor? positions, "
      "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k) -> (Tensor out, Tensor lse)");
  m.def(
      "summed_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor lse, int num_values, "
      "float scale, "
      "bool is_causal, Tensor? key_mask, int window, SymInt? query_offset, Tensor? positions, "
      "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k) -> Tensor dv");
  m.def(
      "sampled_distill(Tensor q, Tensor k, Tensor q_sketch, Tensor k_sketch, Tensor indices, "
      "Tensor? bias, float scale, float sketch_scale, "
      "bool is_causal, Tensor? key_mask, int window, SymInt? query_offset, Tensor? positions, "
      "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
      "bool mean, bool need_grads) -> (Tensor loss, Tensor dq_sketch, Tensor dk_sketch)");
  m.def("cpu_isas() -> str");
  m.def("cuda_archs() -> str");
}
// clang-format on
