"""Loads the compiled libraries and says what they hold."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

__version__ = "0.2.0"

_CPU = Path(__file__).with_name("_C.abi3.so")
_CUDA = Path(__file__).with_name("_C_cuda.abi3.so")


def _load(library: Path, what: str, built_for: str) -> None:
    load: Callable[[str], None] = torch.ops.load_library
    try:
        load(str(library))
    except OSError as error:
        raise ImportError(
            f"smartbird's {what} was built for {built_for} and could not be loaded under torch "
            f"{torch.__version__} (CUDA {torch.version.cuda}): {error}. Build it again, or remove "
            f"{library}"
        ) from error


if not _CPU.exists():
    raise ImportError(
        f"smartbird's compiled library is missing: {_CPU}. In a source tree, build it first: "
        "pip install -e . --no-build-isolation"
    )
_load(_CPU, "compiled library", "torch >= 2.10")
# The CUDA kernels may be built where torch has no CUDA, or not be built where it has.
_HAS_CUDA = torch.version.cuda is not None and _CUDA.exists()
if _HAS_CUDA:
    _load(_CUDA, f"CUDA library {_CUDA.name}", "a CUDA build of torch >= 2.10")


def build_info() -> dict[str, Any]:
    """What this installation holds.

    Returns:
        dict with ``version`` (str), ``torch_built_for`` (str, the oldest torch whose stable ABI the
        libraries use), ``torch`` (str, the one loaded), ``cpu_isas`` (list of the instruction sets
        built in that this processor can run), ``cpu_isa`` (str, the one in use; see
        ``SMARTBIRD_CPU_ISA``), ``cuda_archs`` (list of str, for example ``["sm_80", "sm_90a"]``, or
        None where no CUDA kernels are built or torch has no CUDA).
    """
    in_use, _, available = torch.ops.smartbird.cpu_isas().partition(":")
    return {
        "version": __version__,
        "torch_built_for": ">=2.10",
        "torch": torch.__version__,
        "cpu_isas": available.split(),
        "cpu_isa": in_use,
        "cuda_archs": torch.ops.smartbird.cuda_archs().split() if _HAS_CUDA else None,
    }


def why_no_cuda() -> str | None:
    """The reason why tensors on a GPU cannot be served here, in one line; None where they can."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no usable GPU"
    if not _HAS_CUDA:
        return (
            f"smartbird is built without CUDA kernels ({_CUDA} is missing): build it again with "
            "SMARTBIRD_CUDA=1 pip install -e . --no-build-isolation"
        )
    return None
