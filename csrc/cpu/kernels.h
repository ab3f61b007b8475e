// The function table of one instruction set, and the choice among them at run time.
#pragma once

#include <cstdint>

#include "../params.h"

namespace smartbird {

// A kernel splits its work into tasks that may run in any order on any thread, each with
// `scratch_bytes` of 64-byte aligned scratch of its thread's own. Results never depend on which
// thread runs a task.
template <typename Params>
struct TaskKernel {
  int64_t (*num_tasks)(const Params&);
  int64_t (*scratch_bytes)(const Params&);
  void (*run)(const Params&, int64_t task, void* scratch);
};

struct Kernels {
  const char* isa;
  TaskKernel<PackParams> pack;
  TaskKernel<SketchSampleParams> sketch_scan;
  TaskKernel<SketchSampleParams> sketch_sample;
  TaskKernel<GatherParams> gather_scores;
  TaskKernel<GatherParams> gather_attention;
  TaskKernel<GatherBackwardParams> gather_backward_queries;
  TaskKernel<GatherBackwardParams> gather_backward_keys;
  TaskKernel<DenseParams> dense_lse;
  TaskKernel<DenseParams> dense_mean;
  TaskKernel<DistillParams> distill_queries;
  TaskKernel<DistillParams> distill_reduce;
};

#if defined(__x86_64__) || defined(__i386__)
#define SMARTBIRD_X86
#endif

namespace scalar {
extern const Kernels kernels;
}
#ifdef SMARTBIRD_X86
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
#endif

// The table that `name` asks for ("scalar", "avx2", "avx512"), or null where it was not built or
// the processor lacks it.
const Kernels* kernels_for(const char* name);

// The table in use: what SMARTBIRD_CPU_ISA names, else the best the processor has. Throws
// std::runtime_error when the variable names an instruction set that cannot run here.
const Kernels& active_kernels();

}  // namespace smartbird
