// Instantiates every kernel for one instruction set; included once by each kernels_<isa>.cpp.
#include "dense-inl.h"
#include "distill-inl.h"
#include "gather-inl.h"
#include "gather_backward-inl.h"
#include "kernels.h"
#include "pack-inl.h"
#include "sketch_sample-inl.h"

#define SMARTBIRD_STRINGIFY2(x) #x
#define SMARTBIRD_STRINGIFY(x) SMARTBIRD_STRINGIFY2(x)

namespace smartbird::SMARTBIRD_ISA {

const Kernels kernels{
    .isa = SMARTBIRD_STRINGIFY(SMARTBIRD_ISA),
    .pack = {pack_num_tasks, pack_scratch_bytes, pack},
    .sketch_scan = {sketch_scan_num_tasks, sketch_scan_scratch_bytes, sketch_scan},
    .sketch_sample = {sketch_sample_num_tasks, sketch_sample_scratch_bytes, sketch_sample},
    .gather_scores = {gather_num_tasks, gather_scratch_bytes, gather_scores},
    .gather_attention = {gather_num_tasks, gather_scratch_bytes, gather_attention},
    .gather_backward_queries = {gather_backward_queries_num_tasks, gather_backward_scratch_bytes,
                                gather_backward_queries},
    .gather_backward_keys = {gather_backward_keys_num_tasks, gather_backward_scratch_bytes,
                             gather_backward_keys},
    .dense_lse = {dense_num_tasks, dense_scratch_bytes, dense_lse},
    .dense_mean = {dense_num_tasks, dense_scratch_bytes, dense_mean},
    .distill_queries = {distill_num_tasks, distill_scratch_bytes, distill_queries},
    .distill_reduce = {distill_reduce_num_tasks, distill_reduce_scratch_bytes, distill_reduce},
};

}  // namespace smartbird::SMARTBIRD_ISA
