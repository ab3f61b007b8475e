"""pytest plugin: every op on CPU tensors runs the CUDA kernels, emulated.

``pytest -p emulated_cuda`` with this folder on PYTHONPATH and SMARTBIRD_EMULATED_LIBRARY naming
the library that CMake builds as ``smartbird_emulated``. It registers csrc/cuda/ops_cuda.cpp in the
place of csrc/cpu/ops_cpu.cpp, so the tests of the ops need not know.
"""

import os

import torch

from smartbird.ops import compose_sampled_distill, sample_indices  # before they are replaced


def draws() -> dict[tuple[torch.dtype, str], torch.Tensor]:
    """Indices [B, H_i, N, K] of the methods whose draws are those of the CPU, by dtype."""
    random = torch.Generator().manual_seed(1)
    q_sketch, k_sketch = (torch.randn(2, n, 16, generator=random) for n in (40, 300))
    seed = torch.tensor([5, 7])
    return {
        (dtype, method): sample_indices(
            *(q_sketch.to(dtype), k_sketch.to(dtype), 24),
            num_index_heads=3,
            method=method,
            window=3,
            seed=seed,
        )
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        for method in ("systematic", "topk")
    }


CPU_DRAWS = draws()

torch.ops.load_library(os.environ["SMARTBIRD_EMULATED_LIBRARY"])
# What CUDA composes of its kernels, too.
_library = torch.library.Library("smartbird", "IMPL")
_library.impl("sampled_distill", compose_sampled_distill, "CPU", allow_override=True)
