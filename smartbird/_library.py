"""Loads the compiled library and says what it holds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

__version__ = "0.1.0"


def _load() -> None:
    library = Path(__file__).with_name("_C.abi3.so")
    if not library.exists():
        raise ImportError(
            f"smartbird's compiled library is missing: {library}. In a source tree, build it "
            "first: pip install -e . --no-build-isolation"
        )
    load: Callable[[str], None] = torch.ops.load_library
    try:
        load(str(library))
    except OSError as error:
        raise ImportError(
            f"smartbird's compiled library was built for torch >= 2.10 and could not be loaded "
            f"under torch {torch.__version__}: {error}"
        ) from error


_load()


def build_info() -> dict[str, Any]:
    """What this installation holds.

    Returns:
        dict with ``version`` (str), ``torch_built_for`` (str, the oldest torch whose stable ABI the
        library uses), ``torch`` (str, the one loaded), ``cpu_isas`` (list of the instruction sets
        built in that this processor can run), ``cpu_isa`` (str, the one in use; see
        ``SMARTBIRD_CPU_ISA``), ``cuda_archs`` (list of str, or None without CUDA kernels).
    """
    in_use, _, available = torch.ops.smartbird.cpu_isas().partition(":")
    return {
        "version": __version__,
        "torch_built_for": ">=2.10",
        "torch": torch.__version__,
        "cpu_isas": available.split(),
        "cpu_isa": in_use,
        "cuda_archs": None,
    }
