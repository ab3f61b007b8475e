"""pytest plugin: every op on CPU tensors runs the CUDA kernels, emulated.

``pytest -p emulated_cuda`` with this folder on PYTHONPATH and SMARTBIRD_EMULATED_LIBRARY naming the
library that CMake builds as ``smartbird_emulated``. It registers csrc/cuda/ops_cuda.cpp in the place
of csrc/cpu/ops_cpu.cpp, so the tests of the ops need not know.
"""

import os
import warnings

import torch

import smartbird  # noqa: F401  # its ops must be there before they are replaced

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message=".*Overriding a previously registered kernel.*")
    torch.ops.load_library(os.environ["SMARTBIRD_EMULATED_LIBRARY"])
