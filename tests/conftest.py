from __future__ import annotations

import importlib
from collections.abc import Iterator

import pytest
import torch
from cases import Backend


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="where the tests of the ops run; cuda needs a GPU and the CUDA kernels",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device") == "cuda":
        from smartbird._library import why_no_cuda

        if reason := why_no_cuda():
            raise pytest.UsageError(f"--device cuda: {reason}")


@pytest.fixture(params=["ops"])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """smartbird.ops on the device asked for, run with uninitialised memory filled with NaN.

    By parameter "reference" that module on the CPU, which is tested without the extension.
    """
    module = importlib.import_module(f"smartbird.{request.param}")
    device = "cpu" if request.param == "reference" else request.config.getoption("--device")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield Backend(module, torch.device(device))
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
