"""What the tests share: the device they run on, and the markers that runs are chosen by.

pyproject.toml says what the markers mean.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cases import CASE, Backend

EMULATION = Path(__file__).parent / "emulation"
# Of the problems that the ops are tested on, few that together take most ways through the kernels.
SANITIZED = [CASE[name] for name in ("past_the_tiles", "masked_causal_gqa", "packed_forced")]


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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if EMULATION in item.path.parents:
            item.add_marker("emulation")
        if not isinstance(item, pytest.Function):
            continue
        params = item.callspec.params if hasattr(item, "callspec") else {}
        if "backend" in item.fixturenames:
            item.add_marker("reference" if params.get("backend") == "reference" else "ops")
        if any(params.get("case") is case for case in SANITIZED):
            item.add_marker("sanitized")
        if item.get_closest_marker("gpu") and config.getoption("--device") != "cuda":
            item.add_marker(pytest.mark.skip(reason="needs a GPU: pytest --device cuda"))


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
