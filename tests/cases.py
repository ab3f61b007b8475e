"""The problems that the tests of correctness, gradients and opcheck go through, their inputs, and
how results are held to the reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from smartbird import reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
METHODS = ("gumbel", "systematic", "multinomial", "topk")


def at_night(value: object, marker: str) -> object:
    """A parameter whose tests have ``marker``, one of those that only `make nightly` runs."""
    return pytest.param(value, marks=getattr(pytest.mark, marker))


@dataclass(frozen=True)
class Backend:
    """An implementation under test: a module with the names of smartbird.ops, and its device."""

    ops: ModuleType
    device: torch.device


@dataclass(frozen=True)
class Case:
    """Sizes and masks of one problem. Letters as in :mod:`smartbird.reference`."""

    name: str
    B: int = 2
    N: int = 21
    M: int = 21
    H: int = 4
    H_kv: int = 4
    H_i: int = 4
    D: int = 16
    Dv: int = 16
    S: int = 8
    K: int = 6
    is_causal: bool = False
    masked: bool = False
    window: int = 0
    num_sinks: int = 0
    strided: bool = False
    H_s: int | None = None  # None: sketches [B, N, S] and [B, M, S]
    H_ks: int | None = None
    has_globals: bool = False
    query_offset: int | None = None
    own_offsets: bool = False  # query_offset is a tensor
    lengths: tuple[tuple[int, int], ...] = ()  # queries and keys of packed sequences

    def __str__(self) -> str:
        return self.name


# Shapes and masks that every op has to do with.
SHAPES = (
    Case("self"),
    Case("gqa", H=6, H_kv=2, H_i=3),
    Case("mqa_shared_index", H_kv=1, H_i=1),
    Case("index_heads_finer_than_kv", H=6, H_kv=3, H_i=2),
    Case("kv_finer_than_index_heads", H=4, H_kv=4, H_i=2),
    Case("cross", N=7, M=40),
    Case("causal", is_causal=True),
    Case("causal_cache", N=5, M=37, is_causal=True),
    Case("causal_rows_without_keys", N=30, M=9, is_causal=True),
    Case("masked", masked=True),
    Case("masked_causal_gqa", H_kv=2, H_i=1, is_causal=True, masked=True),
    Case("forced", window=3, num_sinks=2, masked=True),
    Case("forced_causal", window=3, num_sinks=2, is_causal=True),
    Case("forced_only", window=4, num_sinks=2, K=7, is_causal=False),
    Case("odd_dims", D=7, Dv=5, S=3, K=5),
    Case("dims_of_one", D=1, Dv=1, S=1),
    Case("wide", N=9, M=33, D=80, Dv=144, S=33),
    Case("past_the_tiles", B=1, N=70, M=333, H=2, H_kv=1, H_i=2, D=64, Dv=64, S=16, K=41),
    Case("one_query", N=1, M=50, K=9),
    Case("one_key", N=3, M=1, K=1),
    Case("more_samples_than_keys", M=5, K=13),
    Case("strided", strided=True, masked=True),
    Case("empty_batch", B=0),
    Case("no_queries", N=0),
    Case("no_keys", M=0),
)
# Lengths of 0, fewer queries than keys, more, and across a tile of 32 keys; with rows left over.
PACKED: dict[str, Any] = {
    "B": 1,
    "lengths": ((5, 5), (0, 0), (3, 37), (0, 4), (2, 0), (9, 4), (6, 6)),
    "N": 28,
    "M": 61,
}
# Who the rows are, which the gather ops do not know.
CASES = (
    *SHAPES,
    Case("sketches", H_kv=2, H_s=2, H_ks=1, is_causal=True),
    Case("sketch_per_head", H=6, H_kv=2, H_i=6, H_s=6, H_ks=3, masked=True),
    Case("sketches_by_key_heads", H=6, H_kv=2, H_i=3, H_s=3, H_ks=3),
    Case("globals", has_globals=True, window=2, num_sinks=1, K=12, is_causal=True),
    Case("more_globals_than_samples", has_globals=True, num_sinks=1, K=4, masked=True),
    Case("offset", N=7, M=40, query_offset=11, window=3, is_causal=True),
    Case("offset_of_a_window", N=7, M=40, query_offset=31, window=4, num_sinks=1),
    Case("offset_before_the_keys", N=9, query_offset=-4, is_causal=True, K=3),
    Case("offsets", N=9, M=40, own_offsets=True, window=3, is_causal=True, masked=True, B=3),
    Case("packed", is_causal=True, **PACKED),
    Case("packed_masked", H_s=2, H_ks=2, masked=True, **PACKED),
    Case("packed_forced", window=3, num_sinks=1, has_globals=True, masked=True, K=8, **PACKED),
    Case("packed_forced_causal", window=3, num_sinks=2, is_causal=True, **PACKED),
    Case("packed_offsets", own_offsets=True, window=2, is_causal=True, H_s=4, H_ks=2, **PACKED),
    Case("packed_long", B=1, lengths=((40, 90), (33, 333)), N=73, M=425, H=2, H_kv=1, H_i=2, K=41),
)
CASE = {case.name: case for case in CASES}
# Who the rows are has nothing to do with the dtype: two of them show what shapes and rounding do.
PROBLEMS = [
    pytest.param(case, dtype, id=f"{case}-{dtype}")
    for case in CASES
    for dtype in (DTYPES if case in SHAPES else (torch.float32, torch.bfloat16))
]


@dataclass
class Inputs:
    """Tensors of one case. ``indices`` are arbitrary: duplicates, -1 anywhere, rows of -1 only."""

    case: Case
    q: Tensor
    k: Tensor
    v: Tensor
    q_sketch: Tensor
    k_sketch: Tensor
    key_mask: Tensor | None
    indices: Tensor
    seed: Tensor
    global_mask: Tensor | None = None
    query_offset: int | Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None

    def masks(self) -> dict[str, Any]:
        """Keywords that say which keys are valid."""
        return {
            "is_causal": self.case.is_causal,
            "key_mask": self.key_mask,
            "query_offset": self.query_offset,
            "cu_seqlens_q": self.cu_seqlens_q,
            "cu_seqlens_k": self.cu_seqlens_k,
        }

    def rows(self) -> dict[str, Any]:
        """Keywords that say which keys are valid, and which of them are forced."""
        return {
            "window": self.case.window,
            "num_sinks": self.case.num_sinks,
            "global_mask": self.global_mask,
            **self.masks(),
        }

    def sampling(self) -> dict[str, Any]:
        """All keywords of sketch_sample but the method."""
        return {"num_index_heads": self.case.H_i, "seed": self.seed, **self.rows()}

    def valid_and_forced(self, num_samples: int | None = None) -> tuple[Tensor, Tensor]:
        """bool [B, N, M], twice; without ``num_samples`` all of ``global_mask`` is forced."""
        sizes = (self.case.B, self.case.N, self.case.M)
        return reference._valid_and_forced(
            sizes, self.q.device, **self.rows(), num_samples=num_samples
        )

    def valid(self) -> Tensor:
        """bool [B, N, M]."""
        return self.valid_and_forced()[0]

    def free(self) -> Tensor:
        """bool [B, N, M]."""
        valid, forced = self.valid_and_forced()
        return valid & ~forced

    def sketch_scores(self) -> Tensor:
        """float64 [B, H_i, N, M]."""
        q_sketch, k_sketch = reference._sketches(self.q_sketch.double(), self.k_sketch.double())
        scores = q_sketch @ k_sketch.mT / math.sqrt(self.case.S)
        return reference._per_head(scores, self.case.H_i)


def make_inputs(
    case: Case, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
) -> Inputs:
    """Standard normal tensors of ``case``, the same values for every dtype up to rounding."""
    rng = torch.Generator().manual_seed(seed)

    def normal(B: int, *shape: int) -> Tensor:
        x = torch.randn(B, *shape, generator=rng, dtype=torch.float64).to(device, dtype)
        if case.strided:  # a slice of a wider tensor, rows and heads in the other order
            x = torch.cat([x, x.new_full(x.shape, math.nan)], -1).transpose(1, -2).contiguous()
            x = x.transpose(1, -2)[..., : shape[-1]]
        return x

    key_mask = None
    if case.masked:  # one batch element, or packed sequence, has no valid key
        key_mask = torch.rand(case.B, case.M, generator=rng) < 0.6
        key_mask[-1, slice(case.lengths[0][1]) if case.lengths else slice(None)] = False
        key_mask = key_mask.to(device)
    shape = (case.B, case.H_i, case.N, case.K)
    indices = torch.randint(-1, max(case.M, 1), shape, generator=rng, dtype=torch.int32)
    if case.M == 0:
        indices.fill_(-1)
    indices[:, :, 1::5] = -1
    q_heads, k_heads = (() if heads is None else (heads,) for heads in (case.H_s, case.H_ks))
    x = Inputs(
        case,
        q=normal(case.B, case.H, case.N, case.D),
        k=normal(case.B, case.H_kv, case.M, case.D),
        v=normal(case.B, case.H_kv, case.M, case.Dv),
        q_sketch=normal(case.B, *q_heads, case.N, case.S),
        k_sketch=normal(case.B, *k_heads, case.M, case.S),
        key_mask=key_mask,
        indices=indices.to(device),
        seed=torch.tensor([seed + 1, 7], device=device),
        query_offset=case.query_offset,
    )
    if case.has_globals:
        x.global_mask = (torch.rand(case.B, case.M, generator=rng) < 0.3).to(device)
    if case.lengths:
        ends = torch.tensor([(0, 0), *case.lengths]).cumsum(0).int().T.contiguous().to(device)
        x.cu_seqlens_q, x.cu_seqlens_k = ends
    if case.own_offsets:
        sequences = (len(case.lengths) or case.B,)
        x.query_offset = torch.randint(-3, case.M, sequences, generator=rng).to(device)
    return x


def drawn_entries(inputs: Inputs, method: str = "multinomial") -> tuple[Tensor, Tensor]:
    """Valid keys and their log_inclusion, drawn by the reference; multinomial holds duplicates."""
    return reference.sketch_sample(
        inputs.q_sketch, inputs.k_sketch, inputs.case.K, method=method, **inputs.sampling()
    )


def leaves(*tensors: Tensor, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Copies that collect gradients, with the strides of the originals unless the dtype changes."""
    return [x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors]


def assert_accurate(actual: Tensor, same_dtype: Tensor, exact: Tensor) -> None:
    """The error against float64 is at most twice that of same-dtype PyTorch, plus rounding.

    The added term is one rounding of the result and 16 of the arithmetic (sums of up to a few
    hundred terms in another order), at the scale of the largest entry or of the standard normal
    inputs.
    """
    assert actual.shape == exact.shape
    assert actual.dtype == same_dtype.dtype
    finite = exact.isfinite()
    # -inf is exact: empty rows, unused slots. NaN is never right.
    assert torch.equal(actual.double()[~finite], exact[~finite])
    assert actual[finite].isfinite().all()
    if not finite.any():
        return
    arithmetic = torch.float64 if actual.dtype == torch.float64 else torch.float32
    scale = exact[finite].abs().max().clamp(min=1.0)
    rounding = (torch.finfo(actual.dtype).eps + 16 * torch.finfo(arithmetic).eps) * scale
    error = (actual.double() - exact)[finite].abs().max()
    allowed = 2 * (same_dtype.double() - exact)[finite].abs().max() + rounding
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


def assert_all_accurate(
    actual: Sequence[Tensor], same_dtype: Sequence[Tensor], exact: Sequence[Tensor]
) -> None:
    for triple in zip(actual, same_dtype, exact, strict=True):
        assert_accurate(*triple)


def results_and_gradients(
    run: Callable[..., tuple[Tensor, ...]], *tensors: Tensor, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Outputs of ``run`` and the gradients of a fixed weighted sum of their finite entries."""
    inputs = leaves(*tensors, dtype=dtype)
    outputs = run(*inputs)
    rng = torch.Generator().manual_seed(5)
    total = inputs[0].sum() * 0.0
    for out in outputs:
        weights = torch.randn(out.shape, generator=rng, dtype=torch.float64)
        weights = weights.to(out.device, out.dtype)
        total = total + torch.where(out.isfinite(), out * weights, 0.0).sum()
    gradients = torch.autograd.grad(total, inputs)
    return [*(out.detach() for out in outputs), *gradients]


def check_against_reference(
    ops: ModuleType, run: Callable[..., tuple[Tensor, ...]], *tensors: Tensor
) -> None:
    """Hold ``run(ops, *tensors)`` and its gradients to the reference, same dtype and float64."""
    actual = results_and_gradients(lambda *x: run(ops, *x), *tensors)
    same_dtype = results_and_gradients(lambda *x: run(reference, *x), *tensors)
    exact = results_and_gradients(lambda *x: run(reference, *x), *tensors, dtype=torch.float64)
    assert_all_accurate(actual, same_dtype, exact)
