"""Memory grows as N K H_i: the peak of a process that runs one operation.

No operation allocates an N x M tensor, and none holds more than one number or two per slot of each
index head, however many heads share the slots."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LENGTH = 16384
# One byte per pair, a boolean mask, would be 256 MiB. Inputs and outputs here are below 32 MiB.
LIMIT_MIB = LENGTH * LENGTH / 2**20 / 4

SETUP = f"""
import torch
from smartbird import ops
from smartbird.functional import smart_bird_attention
from benchmarks.common.memory import peak_mib

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


# 64 heads that share keys and indices, of two features each: inputs, outputs and gradients take
# 24 MiB at once, where one number per head and slot would be 128 MiB.
SHARED_LENGTH, SHARED_HEADS, SHARED_K = 4096, 64, 128
SHARED_LIMIT_MIB = 96

SHARED_SETUP = f"""
N, H, K = {SHARED_LENGTH}, {SHARED_HEADS}, {SHARED_K}
q = torch.randn(1, H, N, 2, requires_grad=True)
k, v = (torch.randn(1, 1, N, 2, requires_grad=True) for _ in range(2))
q_sketch, k_sketch = (torch.randn(1, N, 4, requires_grad=True) for _ in range(2))
indices = torch.randint(N, (1, 1, N, K), dtype=torch.int32)
log_inclusion = torch.zeros(1, 1, N, K)
before = peak_mib()
"""

SHARED_CALLS = {
    "attention": "ops.gather_attention(q, k, v, indices, bias=log_inclusion).sum().backward()",
    "distillation": "ops.distill_loss(q, k, q_sketch, k_sketch, indices=indices,"
    " log_inclusion=log_inclusion).backward()",
    "functional": "smart_bird_attention(q, k, v, q_sketch, k_sketch, K, num_index_heads=1,"
    " correction=True).sum().backward()",
}


def peak_growth_mib(setup: str, call: str) -> float:
    script = f"{setup}\n{call}\nprint(peak_mib() - before)"
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return float(result.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_peak_memory(name: str) -> None:
    assert peak_growth_mib(SETUP, CALLS[name]) < LIMIT_MIB


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARED_CALLS)
def test_peak_memory_of_many_heads_that_share_keys(name: str) -> None:
    assert peak_growth_mib(SETUP + SHARED_SETUP, SHARED_CALLS[name]) < SHARED_LIMIT_MIB


LEAKS = """
import ctypes, gc, torch, smartbird
from smartbird import ops
class Heap(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in
        "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]
mallinfo2 = ctypes.CDLL(None).mallinfo2
mallinfo2.restype = Heap
q, sketch = torch.randn(1, 4, 64, 16), torch.randn(1, 64, 8)
layer = smartbird.SmartBirdAttention(64, 4, num_samples=8).eval()
x = torch.randn(1, 64, 64)
indices, _ = ops.sketch_sample(sketch, sketch, 8)
calls = {{
    "sample": lambda: ops.sketch_sample(sketch, sketch, 8),
    "gather": lambda: ops.gather_attention(q, q, q, indices),
    "layer": lambda: layer(x),
}}
call = calls[{name!r}]
with torch.inference_mode():
    for step in range({calls}):
        call()
        if step == 300:
            gc.collect()
            before = mallinfo2().uordblks
gc.collect()
print(mallinfo2().uordblks - before)
"""
LEAK_CALLS = 1200


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs mallinfo2, of glibc from 2.33"
)
@pytest.mark.parametrize("name", ["sample", "gather", "layer"])
def test_calls_leave_nothing_behind(name: str) -> None:
    """Not even eight bytes a call. (The type of a string argument once left 48.)"""
    script = LEAKS.format(name=name, calls=LEAK_CALLS)
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert float(result.stdout) < 8 * LEAK_CALLS


# A toy layer, a layer of a small language model, and short rows in a large batch: (layer, tokens).
SOAKED = {
    "toy": ("64, 4, 128, num_samples=16", "4, 256, 64"),
    "wide": ("768, 12, 768, num_samples=64", "1, 1024, 768"),
    "batch": ("128, 8, 128, num_samples=32", "16, 100, 128"),
}
SOAK = """
import os, torch, smartbird
def resident_mib():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
layer = smartbird.SmartBirdEncoderLayer({layer}, batch_first=True).eval()
x = torch.randn({tokens})
with torch.inference_mode():
    for step in range(3000):
        layer(x)
        if step == 300:
            before = resident_mib()
print(resident_mib() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/statm")
@pytest.mark.parametrize("name", SOAKED)
def test_resident_memory_stays_flat(name: str) -> None:
    layer, tokens = SOAKED[name]
    result = subprocess.run(
        [sys.executable, "-c", SOAK.format(layer=layer, tokens=tokens)],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert float(result.stdout) < 16
