"""One seed draws the same keys on the CPU and by the CUDA kernels, up to ties of rounding."""

from __future__ import annotations

import os

import pytest
import torch

if "SMARTBIRD_EMULATED_LIBRARY" not in os.environ:
    pytest.skip("needs the emulation: make test-emulated", allow_module_level=True)

import emulated_cuda

from smartbird.ops import sketch_sample

EMULATED_DRAWS = emulated_cuda.draws()


@pytest.mark.parametrize("case", list(emulated_cuda.CPU_DRAWS), ids=str)
def test_draws_are_those_of_the_cpu(case: tuple[torch.dtype, str, str]) -> None:
    on_cpu, emulated = emulated_cuda.CPU_DRAWS[case], EMULATED_DRAWS[case]
    assert on_cpu.shape[1:] == (3, 40, 24)
    # A draw at the border of two keys may fall to either; it moves no other.
    assert (on_cpu == emulated).float().mean() > 0.99


def test_keys_beyond_what_a_chip_could_hold() -> None:
    """Nothing on chip grows with M: the two keys that have all the mass are found."""
    k_sketch = torch.full((1, 500_000, 1), -200.0)
    k_sketch[0, [7, 499_999]] = 0
    indices, _ = sketch_sample(torch.ones(1, 1, 1), k_sketch, 2, scale=1.0)
    assert indices.tolist() == [[[[7, 499_999]]]]
