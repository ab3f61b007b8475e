"""pytest plugin: every op on CPU tensors runs the CUDA kernels, emulated.

``pytest -p emulated_cuda`` with this folder on PYTHONPATH and SMARTBIRD_EMULATED_LIBRARY naming
the library that CMake builds as ``smartbird_emulated``. It registers csrc/cuda/ops_cuda.cpp in the
place of csrc/cpu/ops_cpu.cpp, so the tests of the ops need not know.
"""

import os

import torch

from smartbird.ops import compose_sampled_distill  # its ops must be there before they are replaced

torch.ops.load_library(os.environ["SMARTBIRD_EMULATED_LIBRARY"])
# What CUDA composes of its kernels, too.
_library = torch.library.Library("smartbird", "IMPL")
_library.impl("sampled_distill", compose_sampled_distill, "CPU", allow_override=True)
