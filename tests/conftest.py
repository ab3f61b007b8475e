from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch


@dataclass(frozen=True)
class Backend:
    """An implementation under test: a module with the names of smartbird.ops, and its device."""

    ops: ModuleType
    device: torch.device


# Name: (module, device). Imported on use: the reference is tested without the extension.
IMPLEMENTATIONS = {
    "reference": ("smartbird.reference", "cpu"),
    "cpu": ("smartbird.ops", "cpu"),
}


@pytest.fixture(params=["cpu"])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """A compiled implementation, run with uninitialised memory filled with NaN."""
    module, device = IMPLEMENTATIONS[request.param]
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield Backend(importlib.import_module(module), torch.device(device))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def restore_num_threads() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)
