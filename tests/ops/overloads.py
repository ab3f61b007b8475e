"""For mypy alone: when a tuple comes back, and that keywords are known. Nothing here runs."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import assert_type

from smartbird import SampledAttention, SmartBirdAttention, ops
from smartbird.functional import smart_bird_attention, smart_bird_attention_varlen


def _(x: Tensor, indices: Tensor, ends: Tensor, flag: bool, seed: torch.Tensor) -> None:
    assert_type(ops.gather_attention(x, x, x, indices), Tensor)
    assert_type(ops.gather_attention(x, x, x, indices, return_lse=True), tuple[Tensor, Tensor])
    either = ops.gather_attention(x, x, x, indices, return_lse=flag)
    assert_type(either, Tensor | tuple[Tensor, Tensor])

    assert_type(smart_bird_attention(x, x, x, x, x, 4, is_causal=True, seed=seed), Tensor)
    both = smart_bird_attention(x, x, x, x, x, 4, return_indices=True, query_mask=x)
    assert_type(both, tuple[Tensor, Tensor])
    either = smart_bird_attention(x, x, x, x, x, 4, return_indices=flag)
    assert_type(either, Tensor | tuple[Tensor, Tensor])
    smart_bird_attention(x, x, x, x, x, 4, windwo=3)  # type: ignore[call-overload]

    out = smart_bird_attention_varlen(x, x, x, x, x, 4, cu_seqlens_q=ends, cu_seqlens_k=ends)
    assert_type(out, Tensor)
    both = smart_bird_attention_varlen(
        x, x, x, x, x, 4, cu_seqlens_q=ends, cu_seqlens_k=ends, window=1, return_indices=True
    )
    assert_type(both, tuple[Tensor, Tensor])
    smart_bird_attention_varlen(x, x, x, x, x, 4, cu_seqlens_q=ends)  # type: ignore[call-overload]

    layer, core = SmartBirdAttention(16, 4), SampledAttention(4)
    assert_type(layer(x), Tensor)
    assert_type(layer(x, return_indices=False), Tensor)
    assert_type(layer(x, key_mask=x, return_indices=True), tuple[Tensor, Tensor])
    assert_type(layer(x, return_indices=flag), Tensor | tuple[Tensor, Tensor])
    assert_type(core(x, x, x, x, x), Tensor)
    assert_type(core(x, x, x, x, x, return_indices=False), Tensor)
    assert_type(core(x, x, x, x, x, first_head=1, return_indices=True), tuple[Tensor, Tensor])
    assert_type(core(x, x, x, x, x, return_indices=flag), Tensor | tuple[Tensor, Tensor])
