"""No operation allocates an N x M tensor: the peak of a process that runs one, at N = M = 16384."""

from __future__ import annotations

import subprocess
import sys

import pytest

LENGTH = 16384
# One byte per pair, a boolean mask, would be 256 MiB. Inputs and outputs here are below 32 MiB.
LIMIT_MIB = LENGTH * LENGTH / 2**20 / 4

SETUP = f"""
import resource
import torch
from smartbird import ops

def peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

N = {LENGTH}
q, k, v = (torch.randn(1, 2, N, 16, requires_grad=True) for _ in range(3))
q_sketch, k_sketch = (torch.randn(1, N, 8, requires_grad=True) for _ in range(2))
indices = torch.randint(N, (1, 2, N, 8), dtype=torch.int32)

# What autograd and the thread pool take once, on a small problem.
ops.gather_attention(q[:, :, :9], k, v, indices[:, :, :9]).sum().backward()
before = peak_mib()
"""

CALLS = {
    "gumbel": "ops.sketch_sample(q_sketch, k_sketch, 8, num_index_heads=2)",
    "systematic": "ops.sketch_sample(q_sketch, k_sketch, 8, method='systematic')",
    "multinomial": "ops.sketch_sample(q_sketch, k_sketch, 8, method='multinomial')",
    "topk": "ops.sketch_sample(q_sketch, k_sketch, 8, method='topk', is_causal=True)",
    "gather_scores": "ops.gather_scores(q, k, indices).sum().backward()",
    "gather_attention": "ops.gather_attention(q, k, v, indices).sum().backward()",
    "sketch_lse": "ops.sketch_lse(q_sketch, k_sketch).sum().backward()",
    "distill_dense": "ops.distill_loss(q, k, q_sketch, k_sketch).backward()",
    "distill_sampled": "ops.distill_loss(q, k, q_sketch, k_sketch, indices=indices).backward()",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_peak_memory(name: str) -> None:
    script = f"{SETUP}\n{CALLS[name]}\nprint(peak_mib() - before)"
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert float(result.stdout) < LIMIT_MIB
