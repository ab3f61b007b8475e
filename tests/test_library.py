"""Which compiled libraries are loaded, and what is said where one cannot be."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

import smartbird
from smartbird import _library

CPU, CUDA = "_C.abi3.so", "_C_cuda.abi3.so"


def load_anew(folder: Path) -> ModuleType:
    """smartbird._library as it runs in ``folder``; libraries that are loaded already stay."""
    source = Path(_library.__file__)
    (folder / source.name).write_text(source.read_text())
    spec = importlib.util.spec_from_file_location("library_copy", folder / source.name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With the CPU library in it."""
    (tmp_path / CPU).symlink_to(Path(_library.__file__).with_name(CPU))
    return tmp_path


def test_without_the_compiled_library(tmp_path: Path) -> None:
    with pytest.raises(ImportError, match=f"compiled library is missing: .*{CPU}.*pip install"):
        load_anew(tmp_path)


def test_torch_without_cuda_leaves_the_cuda_library_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    (folder / CUDA).write_bytes(b"not a library")
    library = load_anew(folder)
    assert library.build_info()["cuda_archs"] is None
    assert library.why_no_cuda() == f"torch {torch.__version__} is built without CUDA"


def test_torch_with_cuda_does_without_the_cuda_library(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    library = load_anew(folder)
    assert library.build_info()["cuda_archs"] is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "built without CUDA kernels" in library.why_no_cuda()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no usable GPU" in library.why_no_cuda()


def test_cuda_library_that_cannot_be_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    (folder / CUDA).write_bytes(b"not a library")
    said = rf"CUDA library {CUDA} was built for .* under torch .*\(CUDA 13.0\): .*{CUDA}"
    with pytest.raises(ImportError, match=said):
        load_anew(folder)


def test_cuda_library_that_can(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is an empty stand-in; its op is implemented here."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (folder / CUDA).touch()
    loaded = []
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    with torch.library._scoped_library("smartbird", "IMPL") as ops:
        ops.impl("cuda_archs", lambda: "sm_80 sm_90a", "CompositeExplicitAutograd")
        library = load_anew(folder)
        assert loaded == [str(folder / CPU), str(folder / CUDA)]
        assert library.build_info()["cuda_archs"] == ["sm_80", "sm_90a"]
        assert library.why_no_cuda() is None


def test_cuda_composes_what_it_has_no_kernel_for() -> None:
    """Registered with smartbird.ops, whether or not the CUDA library is there."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    assert has_kernel("smartbird::sampled_distill", "CUDA")
    kernels = smartbird.build_info()["cuda_archs"] is not None
    assert has_kernel("smartbird::gather_attention", "CUDA") == kernels
