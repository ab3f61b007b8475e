"""One law per sequence: its draws and outputs do not depend on how it is computed.

Alone, in a batch of any order, padded, packed, in chunks, token by token against a growing cache,
on several ranks, by one op or by two, with any number of threads: the same numbers to the last bit.
On a GPU, whose sums may be split otherwise, the same keys, and the rest up to rounding.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from cases import DTYPES, METHODS, Backend
from torch import Tensor

from smartbird.functional import smart_bird_attention

hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")

pytestmark = [pytest.mark.one_order, pytest.mark.usefixtures("restore_num_threads")]

# What depends on rounding of scores: below the grid of the noise, beyond it, far beyond.
DEVIATIONS = (0.5, 1.8, 4.0, 12.0, 60.0)
LENGTHS = (1, 2, 5, 17, 31, 32, 33, 63, 64, 65, 100, 129)

law = hypothesis.settings(
    max_examples=3 if "SMARTBIRD_EMULATED_LIBRARY" in os.environ else 15,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)


@dataclass(frozen=True)
class Problem:
    """Sequences of some lengths, and what is asked of all of them."""

    lengths: tuple[tuple[int, int], ...]  # queries and keys of each
    heads: tuple[int, int, int, int, int]  # H, H_kv, H_i, H_s, H_ks
    dtype: torch.dtype
    K: int
    S: int
    is_causal: bool
    window: int
    num_sinks: int
    has_mask: bool
    has_globals: bool
    deviation: float
    has_huge_rows: bool
    correction: bool
    numbers: int  # seed of the tensors


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    lengths = []
    for _ in range(draw(st.integers(1, 4))):
        num_keys = draw(st.sampled_from(LENGTHS))
        lengths.append((draw(st.integers(1, min(num_keys + 2, 24))), num_keys))
    is_causal = draw(st.booleans())
    K = draw(st.integers(1, 20))
    num_sinks = draw(st.integers(0, min(3, K)))
    window = draw(st.integers(0, min(5, K - num_sinks)))
    if not is_causal and window > 0 and 2 * (window // 2) + 1 + num_sinks > K:
        window = 0
    return Problem(
        tuple(lengths),
        draw(
            st.sampled_from(
                [
                    (4, 4, 4, 1, 1),
                    (4, 2, 2, 2, 1),
                    (6, 2, 6, 3, 3),
                    (6, 1, 2, 1, 1),
                    (7, 7, 7, 7, 7),
                ]
            )
        ),
        draw(st.sampled_from(DTYPES)),
        K,
        draw(st.sampled_from([1, 4, 9, 16])),
        is_causal,
        window,
        num_sinks,
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.sampled_from(DEVIATIONS)),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.integers(0, 1000)),
    )


@dataclass
class Sequence:
    """The tensors of one sequence, [1, ...], and who it is."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_sketch: Tensor
    k_sketch: Tensor
    key_mask: Tensor
    global_mask: Tensor
    offset: int
    id: int

    def at(self, rows: slice, keys: slice) -> Sequence:
        """A part of its queries and of its keys."""
        return Sequence(
            self.q[:, :, rows],
            self.k[:, :, keys],
            self.v[:, :, keys],
            self.q_sketch[:, :, rows],
            self.k_sketch[:, :, keys],
            self.key_mask[:, keys],
            self.global_mask[:, keys],
            self.offset + rows.start,
            self.id,
        )


@dataclass
class Law:
    """A problem on a backend: its sequences and how to compute with them."""

    backend: Backend
    problem: Problem
    method: str
    sequences: list[Sequence] = field(default_factory=list)

    def __post_init__(self) -> None:
        p, device = self.problem, self.backend.device
        H, H_kv, _, H_s, H_ks = p.heads
        rng = torch.Generator().manual_seed(p.numbers)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=rng, dtype=torch.float64)

        for n, (N, M) in enumerate(p.lengths):
            q_sketch = normal(1, H_s, N, p.S) * p.deviation
            if p.has_huge_rows:
                q_sketch[:, :, ::3] *= 1000
                q_sketch = q_sketch.clamp(-3e4, 3e4)  # what float16 holds
            key_mask = torch.rand(1, M, generator=rng) < (0.7 if p.has_mask else 1.0)
            tensors = (
                normal(1, H, N, 8),
                normal(1, H_kv, M, 8),
                normal(1, H_kv, M, 5),
                q_sketch,
                normal(1, H_ks, M, p.S),
            )
            self.sequences.append(
                Sequence(
                    *(x.to(device, p.dtype) for x in tensors),
                    key_mask.to(device),
                    (torch.rand(1, M, generator=rng) < 0.1).to(device),
                    offset=M - N,
                    id=3 * n + 1,
                )
            )
        self.seed = torch.tensor([p.numbers, 11], device=device)

    def run(self, x: Sequence, **rows: Any) -> tuple[Tensor, ...]:
        """indices, log_inclusion, out and the two log-sum-exps; one op for all gives this out."""
        p, ops = self.problem, self.backend.ops
        H, _, H_i, _, _ = p.heads
        local_heads = H_i * x.q.shape[1] // H
        ids = torch.tensor([x.id], device=x.q.device)
        who = {"query_offset": x.offset, "sequence_ids": ids} | rows
        masks: dict[str, Any] = {
            "is_causal": p.is_causal,
            "key_mask": x.key_mask if p.has_mask or "padded" in who else None,
            "window": p.window,
            "num_sinks": p.num_sinks,
            "global_mask": x.global_mask if p.has_globals else None,
        }
        who.pop("padded", None)
        indices, log_inclusion = ops.sketch_sample(
            x.q_sketch,
            x.k_sketch,
            p.K,
            num_index_heads=local_heads,
            method=self.method,
            seed=self.seed,
            **masks,
            **who,
        )
        sketch_lse = ops.sketch_lse(x.q_sketch, x.k_sketch, **masks, **who)
        by_one_op = smart_bird_attention(
            x.q,
            x.k,
            x.v,
            x.q_sketch,
            x.k_sketch,
            p.K,
            num_index_heads=local_heads,
            method=self.method,
            correction=p.correction,
            dropout_p=0.2,
            seed=self.seed,
            **masks,
            **who,
        )
        who.pop("cu_seqlens_k", None)
        out, lse = ops.gather_attention(
            x.q,
            x.k,
            x.v,
            indices,
            bias=-log_inclusion if p.correction else None,
            dropout_p=0.2,
            seed=self.seed,
            return_lse=True,
            **who,
        )
        result = (indices, log_inclusion, out, lse, sketch_lse)
        self.check((indices, log_inclusion, by_one_op, lse, sketch_lse), result)
        return result

    def check(self, actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
        names = ("indices", "log_inclusion", "out", "lse", "sketch_lse")
        on_cpu = self.backend.device.type == "cpu"
        exact = on_cpu and "SMARTBIRD_EMULATED_LIBRARY" not in os.environ
        for name, a, e in zip(names, actual, expected, strict=True):
            assert a.dtype == e.dtype
            if exact or name == "indices":  # padding is NaN in both
                torch.testing.assert_close(a, e, rtol=0, atol=0, equal_nan=True)
            else:
                # Log-sum-exps and probabilities of scores as large as the sketch's.
                scale = e[e.isfinite()].abs().max().item() if e.isfinite().any() else 1.0
                tolerance = 1e-5 if e.dtype in (torch.float32, torch.float64) else 2e-2
                tolerances = {"rtol": tolerance, "atol": tolerance * max(scale, 1.0)}
                torch.testing.assert_close(a, e, **tolerances, equal_nan=True)


def rows_of(results: tuple[Tensor, ...], b: int, rows: slice) -> tuple[Tensor, ...]:
    return tuple(x[b : b + 1, :, rows] for x in results)


def joined(parts: list[tuple[Tensor, ...]], dim: int) -> tuple[Tensor, ...]:
    return tuple(torch.cat(tensors, dim) for tensors in zip(*parts, strict=True))


def pad(tensors: list[Tensor], dim: int, value: float) -> Tensor:
    """[1, ...] each, as one batch, filled up at the end of dimension ``dim``."""
    longest = max(x.shape[dim] for x in tensors)
    filled = []
    for x in tensors:
        shape = list(x.shape)
        shape[dim] = longest - shape[dim]
        filled.append(torch.cat([x, x.new_full(shape, value)], dim))
    return torch.cat(filled)


@pytest.mark.parametrize("method", METHODS)
@law
@hypothesis.given(problem=problems(), data=st.data())
def test_in_a_padded_batch(
    backend: Backend, method: str, problem: Problem, data: st.DataObject
) -> None:
    """Of any order, with padding of NaN on the right."""
    law = Law(backend, problem, method)
    order = data.draw(st.permutations(law.sequences))
    names = ("q", "k", "v", "q_sketch", "k_sketch")
    batch = Sequence(
        *(pad([getattr(x, name) for x in order], 2, math.nan) for name in names),
        pad([x.key_mask for x in order], 1, False),
        pad([x.global_mask for x in order], 1, True),
        offset=0,
        id=0,
    )
    # A query of padding sees keys, so it must be finite.
    batch.q_sketch = batch.q_sketch.nan_to_num(0.0)
    device = backend.device
    results = law.run(
        batch,
        padded=True,
        query_offset=torch.tensor([x.offset for x in order], device=device),
        sequence_ids=torch.tensor([x.id for x in order], device=device),
    )
    for b, x in enumerate(order):
        law.check(rows_of(results, b, slice(0, x.q.shape[2])), law.run(x))


@pytest.mark.parametrize("method", METHODS)
@law
@hypothesis.given(problem=problems(), data=st.data())
def test_packed(backend: Backend, method: str, problem: Problem, data: st.DataObject) -> None:
    """Of any order, with an empty sequence among them and rows left over."""
    law = Law(backend, problem, method)
    order = data.draw(st.permutations(law.sequences))
    empty = order[0].at(slice(0, 0), slice(0, 0))
    order.insert(data.draw(st.integers(0, len(order))), empty)
    rest = order[-1].at(slice(0, 2), slice(0, 1))  # belongs to none
    names = ("q", "k", "v", "q_sketch", "k_sketch")
    pack = Sequence(
        *(torch.cat([getattr(x, name) for x in (*order, rest)], 2) for name in names),
        torch.cat([x.key_mask for x in (*order, rest)], 1),
        torch.cat([x.global_mask for x in (*order, rest)], 1),
        offset=0,
        id=0,
    )
    device = backend.device
    lengths = torch.tensor([(0, 0), *((x.q.shape[2], x.k.shape[2]) for x in order)])
    cu_seqlens_q, cu_seqlens_k = lengths.cumsum(0).int().T.contiguous().to(device)
    results = law.run(
        pack,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        query_offset=torch.tensor([x.offset for x in order], device=device),
        sequence_ids=torch.tensor([x.id for x in order], device=device),
    )
    for s, x in enumerate(order):
        rows = slice(int(cu_seqlens_q[s]), int(cu_seqlens_q[s + 1]))
        indices, *others = rows_of(results, 0, rows)
        first_key = cu_seqlens_k[s]
        indices = torch.where(indices < 0, indices, indices - first_key)
        law.check((indices, *others), law.run(x))
    indices, _, out, lse, sketch_lse = rows_of(results, 0, slice(int(cu_seqlens_q[-1]), None))
    assert (indices == -1).all()
    assert (out == 0).all()
    assert (lse == -math.inf).all()
    assert (sketch_lse == -math.inf).all()


@pytest.mark.parametrize("method", METHODS)
@law
@hypothesis.given(problem=problems(), parts=st.sampled_from([2, 3, 7, 1000]))
def test_in_chunks(backend: Backend, method: str, problem: Problem, parts: int) -> None:
    """On ranks that share the queries or, one after the other, against a cache: of causal rows it
    holds no more than the keys up to the last of the chunk. 1000 parts are one token each."""
    law = Law(backend, problem, method)
    x = law.sequences[0]
    N, M = x.q.shape[2], x.k.shape[2]
    size = max(1, math.ceil(N / parts))
    results = []
    for begin in range(0, N, size):
        end = min(begin + size, N)
        most = min(max(x.offset + end, 0), M) if problem.is_causal else M
        results.append(law.run(x.at(slice(begin, end), slice(0, most))))
    law.check(joined(results, 2), law.run(x))


@pytest.mark.parametrize("method", METHODS)
@law
@hypothesis.given(problem=problems())
def test_on_ranks_that_share_the_heads(backend: Backend, method: str, problem: Problem) -> None:
    law = Law(backend, problem, method)
    x = law.sequences[0]
    _, H_kv, H_i, H_s, H_ks = problem.heads
    for ranks in (2, 3, 7):
        if H_i % ranks or any(n % ranks and n > 1 for n in (H_kv, H_s, H_ks)):
            continue
        results = []
        for rank in range(ranks):

            def share(t: Tensor, ranks: int = ranks, rank: int = rank) -> Tensor:
                return t if t.shape[1] == 1 else t.chunk(ranks, 1)[rank]

            part = Sequence(
                *map(share, (x.q, x.k, x.v, x.q_sketch, x.k_sketch)),
                x.key_mask,
                x.global_mask,
                x.offset,
                x.id,
            )
            results.append(law.run(part, first_head=rank * H_i // ranks))
        *whole, sketch_lse = law.run(x)
        *parts, lse = joined(results, 1)
        law.check((*parts, lse[:, : sketch_lse.shape[1]]), (*whole, sketch_lse))


@pytest.mark.parametrize("method", METHODS)
@law
@hypothesis.given(problem=problems())
def test_with_any_number_of_threads(backend: Backend, method: str, problem: Problem) -> None:
    law = Law(backend, problem, method)
    for x in law.sequences:
        torch.set_num_threads(1)
        expected = law.run(x)
        for num_threads in (2, 5):
            torch.set_num_threads(num_threads)
            law.check(law.run(x), expected)
