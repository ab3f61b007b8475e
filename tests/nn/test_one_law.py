"""One law per sequence, for the layers: in evaluation a result is a function of the sequence alone.

Alone, anywhere in a batch, padded on either side, nested, with any number of threads: the same keys
to the last bit. So is the output where projections do not round. BLAS rounds a row differently for
few rows than for many, so here weights and tokens are multiples of 1/8 whose sums are exact; with
any other weights the output is the same up to that rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layers import E, H
from torch import Tensor

from smartbird.nn import (
    RotaryEmbedding,
    SampledAttention,
    SmartBirdAttention,
    SmartBirdEncoderLayer,
    seed_evaluation,
)
from smartbird.nn.attention import _linear_by_row

pytestmark = pytest.mark.usefixtures("restore_num_threads")

law = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

METHODS = ("gumbel", "systematic", "multinomial", "topk", "dealt")


@dataclass(frozen=True)
class Call:
    """A layer, and the sequences that it is called with."""

    options: dict[str, Any]
    lengths: list[int]
    is_exact: bool
    numbers: int


@st.composite
def calls(draw: st.DrawFn) -> Call:
    num_samples = draw(st.integers(1, 12))
    num_sinks = draw(st.integers(0, min(2, num_samples)))
    is_causal = draw(st.booleans())
    room = num_samples - num_sinks
    options = {
        "num_samples": num_samples,
        "sketch_dim": draw(st.sampled_from([2, 4])),
        "num_kv_heads": draw(st.sampled_from([1, 2, H])),
        "num_sketches": draw(st.sampled_from(["layer", "kv", "head"])),
        "rotary": RotaryEmbedding() if draw(st.booleans()) else None,
        "method": draw(st.sampled_from(METHODS)),
        "correction": draw(st.booleans()),
        "is_causal": is_causal,
        "num_sinks": num_sinks,
        "window": draw(st.integers(0, room if is_causal else max(room - 1, 0))),
        "learning": draw(st.sampled_from([(), ("distill",), ("distill", "bias")])),
    }
    lengths = draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    return Call(options, lengths, draw(st.booleans()), draw(st.integers(0, 1000)))


def eighths(*shape: int, most: int = 8) -> Tensor:
    """Multiples of 1/8 up to 1: sums of products of them are exact in float32."""
    return torch.randint(-most, most + 1, shape) / 8


def make(call: Call) -> tuple[SmartBirdAttention, list[Tensor]]:
    torch.manual_seed(call.numbers)
    layer = SmartBirdAttention(E, H, **call.options).eval()
    seed_evaluation(layer, call.numbers)
    if not call.is_exact:
        return layer, [torch.randn(length, E) for length in call.lengths]
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(eighths(*parameter.shape))
        layer.out_proj.weight.copy_(torch.eye(E))
        layer.out_proj.bias.zero_()
    return layer, [eighths(length, E) for length in call.lengths]


def padded(sequences: list[Tensor], sides: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """The sequences in a batch, each with so many rows of padding before it, and the key mask."""
    rows = [F.pad(x, (0, 0, *side), value=7.0) for x, side in zip(sequences, sides, strict=True)]
    real = [
        F.pad(torch.ones(len(x), dtype=torch.bool), side)
        for x, side in zip(sequences, sides, strict=True)
    ]
    return torch.stack(rows), torch.stack(real)


@law
@given(call=calls(), data=st.data())
def test_a_sequence_is_computed_alike_wherever_it_stands(call: Call, data: st.DataObject) -> None:
    layer, sequences = make(call)
    alone = []
    with torch.no_grad():
        for x in sequences:
            alone.append(layer(x, return_indices=True))

        def check(place: int, out: Tensor, indices: Tensor) -> None:
            expected, expected_indices = alone[place]
            assert indices.equal(expected_indices[0])
            if call.is_exact:
                assert out.equal(expected)
            else:
                torch.testing.assert_close(out, expected)

        order = data.draw(st.permutations(range(len(sequences))))
        longest = max(call.lengths) + data.draw(st.integers(0, 3))
        sides = []
        for i in order:
            before = data.draw(st.integers(0, longest - len(sequences[i])))
            sides.append((before, longest - len(sequences[i]) - before))
        tokens, mask = padded([sequences[i] for i in order], sides)
        torch.set_num_threads(data.draw(st.sampled_from([1, 2])))
        layer.batch_first = data.draw(st.booleans())
        out, indices = layer(
            tokens if layer.batch_first else tokens.transpose(0, 1),
            key_mask=mask,
            return_indices=True,
        )
        out = out if layer.batch_first else out.transpose(0, 1)
        assert (out[~mask] == 0).all()
        for row, i in enumerate(order):
            before, real = sides[row][0], slice(sides[row][0], sides[row][0] + len(sequences[i]))
            own = indices[row, :, real]
            check(i, out[row, real], torch.where(own < 0, own, own - before))
            assert (indices[row].masked_fill(mask[row, :, None], -1) == -1).all()

        nested = torch.nested.nested_tensor([sequences[i] for i in order], layout=torch.jagged)
        out, indices = layer(nested, return_indices=True)
        for row, i in enumerate(order):
            begin, end = nested.offsets()[row : row + 2].tolist()
            check(i, out.values()[begin:end], indices.values()[:, begin:end])


@law
@given(call=calls(), data=st.data())
def test_cross_attention_is_computed_alike(call: Call, data: st.DataObject) -> None:
    layer, keys = make(call)
    queries = [
        (eighths if call.is_exact else torch.randn)(data.draw(st.integers(1, 6)), E) for _ in keys
    ]
    key_tokens, key_mask = padded(keys, [(0, max(map(len, keys)) - len(x)) for x in keys])
    tokens, query_mask = padded(queries, [(max(map(len, queries)) - len(x), 0) for x in queries])
    with torch.no_grad():
        out, indices = layer(
            tokens, key_tokens, key_mask=key_mask, query_mask=query_mask, return_indices=True
        )
        assert (out[~query_mask] == 0).all()
        for row, (x, y) in enumerate(zip(queries, keys, strict=True)):
            expected, expected_indices = layer(x, y, return_indices=True)
            real = query_mask[row]
            assert indices[row][:, real].equal(expected_indices[0])
            if call.is_exact:
                assert out[row, real].equal(expected)
            else:
                torch.testing.assert_close(out[row, real], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("num_inputs", "num_outputs"), [(16, 4), (256, 16), (1000, 24), (768, 48)])
def test_rows_of_sketches_do_not_know_of_each_other(
    num_inputs: int, num_outputs: int, dtype: torch.dtype
) -> None:
    weight, bias = (
        torch.randn(num_outputs, num_inputs).to(dtype),
        torch.randn(num_outputs).to(dtype),
    )
    x = torch.randn(1, 1000, num_inputs).to(dtype)
    expected = _linear_by_row(x, weight, bias)
    # Roundings of a sum add up as a random walk.
    atol = num_inputs**0.5 * torch.finfo(dtype).eps * expected.abs().max().item()
    torch.testing.assert_close(expected, F.linear(x, weight, bias), atol=atol, rtol=0)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for rows in (1, 2, 3, 17, 64, 1000):
            first = (1000 - rows) // 2
            out = _linear_by_row(x[:, first : first + rows], weight, bias)
            assert out.equal(expected[:, first : first + rows])


def test_draws_of_a_wide_layer_do_not_depend_on_the_batch() -> None:
    """Rounding of BLAS, which depends on the number of rows, does not reach the draws."""
    layer = SmartBirdAttention(256, 4, num_samples=8, sketch_dim=8, method="systematic").eval()
    x = torch.randn(3, 40, 256)
    with torch.no_grad():
        out, indices = layer(x, return_indices=True)
        for b in range(3):
            alone, alone_indices = layer(x[b], return_indices=True)
            assert alone_indices.equal(indices[b : b + 1])
            torch.testing.assert_close(alone, out[b])


@pytest.mark.parametrize("norm_first", [False, True])
def test_encoder_layers_draw_alike_however_padded(norm_first: bool) -> None:
    torch.manual_seed(1)
    layer = SmartBirdEncoderLayer(
        E, H, 32, batch_first=True, norm_first=norm_first, num_samples=4, sketch_dim=4
    )
    layer.eval()
    sequences = [torch.randn(length, E) for length in (5, 12, 1)]
    for side in (False, True):
        sides = [(12 - len(x), 0) if side else (0, 12 - len(x)) for x in sequences]
        tokens, mask = padded(sequences, sides)
        with torch.no_grad():
            out = layer(tokens, src_key_padding_mask=~mask)
            assert (out[~mask] == 0).all()
            for row, x in enumerate(sequences):
                torch.testing.assert_close(out[row][mask[row]], layer(x))


def test_a_compiled_layer_computes_padding_as_eager_does() -> None:
    layer = SmartBirdAttention(E, H, num_samples=4, sketch_dim=4).eval()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="eager")
    with torch.no_grad():
        for length in (9, 17):
            mask = torch.rand(3, length) < 0.6
            x = torch.randn(3, length, E)
            out, indices = layer(x, key_mask=mask, return_indices=True)
            compiled_out, compiled_indices = compiled(x, key_mask=mask, return_indices=True)
            assert compiled_indices.equal(indices)
            torch.testing.assert_close(compiled_out, out)


@law
@given(data=st.data())
def test_the_core_computes_a_sequence_alike(data: st.DataObject) -> None:
    """Without projections the output is the same to the last bit for any numbers."""
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    core = SampledAttention(
        4,
        num_kv_heads=2,
        num_samples=data.draw(st.integers(3, 9)),
        method=data.draw(st.sampled_from(METHODS)),
        is_causal=data.draw(st.booleans()),
        num_sinks=data.draw(st.integers(0, 2)),
        correction=data.draw(st.booleans()),
    ).eval()
    length = data.draw(st.integers(1, 40))
    one = [torch.randn(1, heads, length, 8) for heads in (4, 2, 2, 1, 1)]
    out, indices = core(*one, return_indices=True)

    batch = [torch.cat([torch.randn_like(x), x]) for x in one]
    assert core(*batch)[1:].equal(out)

    left, right = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 4))
    real = F.pad(torch.ones(2, length, dtype=torch.bool), (left, right))
    with_padding = [F.pad(x, (0, 0, left, right), value=7.0) for x in batch]
    masked, drawn = core(*with_padding, query_mask=real, key_mask=real, return_indices=True)
    assert masked[1:, :, left : left + length].equal(out)
    drawn = drawn[1:, :, left : left + length]
    assert torch.where(drawn < 0, drawn, drawn - left).equal(indices)

    # Two sequences in one pack, the second of which is that one.
    pack = [torch.cat([torch.randn(1, x.shape[1], 5, x.shape[3]), x], dim=2) for x in one]
    cu_seqlens = torch.tensor([0, 5, 5 + length], dtype=torch.int32)
    packed = core(*pack, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens)
    assert packed[:, :, 5:].equal(out)

    # The last queries alone, against all keys.
    begin = data.draw(st.integers(0, length - 1))
    q, k, v, q_sketch, k_sketch = one
    last = core(q[:, :, begin:], k, v, q_sketch[:, :, begin:], k_sketch)
    assert last.equal(out[:, :, begin:])
