"""pytest plugin: every op on CPU tensors runs the CUDA kernels, emulated.

``pytest -p emulated_cuda`` with this folder on PYTHONPATH and SMARTBIRD_EMULATED_LIBRARY naming
the library that CMake builds as ``smartbird_emulated``. It registers csrc/cuda/ops_cuda.cpp in the
place of csrc/cpu/ops_cpu.cpp, so the tests of the ops need not know.
"""

import os

import torch

from smartbird.ops import sketch_sample  # before the kernels are replaced
from smartbird.ops.distill import compose_sampled_distill


def draws() -> dict[tuple[torch.dtype, str, str], torch.Tensor]:
    """Indices [B, H_i, N, K] of the methods whose draws are those of the CPU, by dtype and form."""
    random = torch.Generator().manual_seed(1)
    q_sketch, k_sketch = (
        torch.randn(2, h, n, 16, generator=random) for h, n in ((3, 40), (1, 300))
    )
    masks = torch.rand(2, 2, 300, generator=random)
    packed = {
        "cu_seqlens_q": torch.tensor([0, 17, 17, 38], dtype=torch.int32),
        "cu_seqlens_k": torch.tensor([0, 120, 150, 290], dtype=torch.int32),
        "is_causal": True,
    }
    forms = {
        "batch": (slice(None), {}),
        "masks": (slice(None), {"key_mask": masks[0] > 0.2, "global_mask": masks[1] > 0.98}),
        "offsets": (
            slice(None),
            {
                "query_offset": torch.tensor([250, 90]),
                "sequence_ids": torch.tensor([7, 2**40]),
                "first_head": 2,
                "is_causal": True,
            },
        ),
        "packed": (slice(1), packed),
    }
    seed = torch.tensor([5, 7])
    return {
        (dtype, method, form): sketch_sample(
            *(q_sketch[batch].to(dtype), k_sketch[batch].to(dtype), 24),
            num_index_heads=3,
            method=method,
            window=3,
            num_sinks=2,
            seed=seed,
            **options,
        )[0]
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        for method in ("systematic", "topk")
        for form, (batch, options) in forms.items()
    }


CPU_DRAWS = draws()

torch.ops.load_library(os.environ["SMARTBIRD_EMULATED_LIBRARY"])
# What CUDA composes of its kernels, too.
_library = torch.library.Library("smartbird", "IMPL")
_library.impl("sampled_distill", compose_sampled_distill, "CPU", allow_override=True)
