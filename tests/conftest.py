from __future__ import annotations

import importlib
from collections.abc import Iterator

import pytest
import torch
from cases import Backend

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
