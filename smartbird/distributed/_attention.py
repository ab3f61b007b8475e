"""Attention over keys and values that lie on all ranks, by the all-gather of a few heads at a time.

The keys and values of the next heads come while these are worked on. They are gathered once more in
the backward pass instead of kept, and the sums of their gradients go back the same way. So a rank
holds all tokens of two such parts of the heads at most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from smartbird.distributed._collectives import overlapped, start_gather, start_sum
from smartbird.ops._call import (
    OPS,
    acc_dtype,
    call,
    refuse_gradient,
    register_autograd,
    register_fake,
    save,
    saved,
)


def parts_of_heads(whole: int, *others: int) -> list[tuple[slice, ...]]:
    """Cuts heads into as many parts as possible, each with an equal share of ``whole``.

    Of another number a part has its share as well or, where there are fewer of those than parts,
    the one that it belongs to.
    """
    count = next(
        count
        for count in range(whole, 0, -1)
        if whole % count == 0 and all(n % count == 0 or count % n == 0 for n in others)
    )
    return [
        tuple(
            slice(n * part // count, max(n * (part + 1) // count, n * part // count + 1))
            for n in (whole, *others)
        )
        for part in range(count)
    ]


def gather_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    bias: Tensor | None,
    scale: float,
    dropout: Sequence[Any],
    layout: tuple[str, bool, int],
) -> tuple[Tensor, Tensor]:
    """``smartbird.ops.gather_attention`` of k and v [B, H_kv, local, *], by the sequence's indices.

    Args:
        dropout: dropout_p, seed, and ``Visible.dropout()`` of the queries but its first_head.
        layout: group, head_tail and length.

    Returns:
        out and lse. Differentiable in q, k, v and bias.
    """
    arguments = (q, k, v, indices, bias, scale, *dropout, *layout)
    out, lse = call(OPS.sharded_gather_attention.default, *arguments)
    return out, lse


class _Part(NamedTuple):
    """Heads that are worked on together: of keys, queries, lists and the bias."""

    kv: slice
    heads: slice
    lists: slice
    bias: slice
    first_head: int  # in lists of this part, so that its dropout is that of these heads


def _parts(q: Tensor, k: Tensor, indices: Tensor, bias: Tensor | None) -> list[_Part]:
    parts = []
    slices = parts_of_heads(k.shape[1], q.shape[1], indices.shape[1])
    for number, (kv, heads, lists) in enumerate(slices):
        by_list = bias is not None and bias.shape[1] == indices.shape[1]
        first_head = number * (lists.stop - lists.start)
        parts.append(_Part(kv, heads, lists, lists if by_list else heads, first_head))
    return parts


def _gathered(parts: list[_Part], k: Tensor, v: Tensor, layout: Any) -> Iterator[list[Tensor]]:
    """All keys and values of each part."""
    return overlapped(_start(start_gather, (k[:, p.kv], v[:, p.kv]), layout) for p in parts)


def _start(
    start: Callable[..., Callable[[], Tensor]], tensors: Sequence[Tensor], layout: Any
) -> Callable[[], list[Tensor]]:
    started = [start(x, *layout) for x in tensors]
    return lambda: [finish() for finish in started]


def _of(x: Tensor | None, heads: slice) -> Tensor | None:
    return None if x is None else x[:, heads]


# ---- the op and its gradient --------------------------------------------------------------------

_define: Callable[..., Any] = torch.library.custom_op
_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor indices, Tensor? bias, float scale, float dropout_p, "
    "Tensor? seed, int? query_offset, Tensor? positions, Tensor? cu_seqlens_q, "
    "Tensor? sequence_ids, str group, bool head_tail, int length"
)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, bias: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor]:
    options, layout = options[:-3], options[-3:]
    parts = _parts(q, k, indices, bias)
    results = [
        OPS.gather_attention(
            *(q[:, part.heads], *whole, indices[:, part.lists], _of(bias, part.bias)),
            *options,
            part.first_head,
        )
        for part, whole in zip(parts, _gathered(parts, k, v, layout), strict=True)
    ]
    out, lse = (torch.cat(each, 1) for each in zip(*results, strict=True))
    return out, lse


def _backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    bias: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options, layout, needs = options[:-7], options[-7:-4], options[-4:]
    need_dqk, need_dv, need_dbias, _ = needs
    parts = _parts(q, k, indices, bias)
    dqs, dbiases = [], []

    def sums() -> Iterator[Callable[[], list[Tensor]]]:
        for part, whole in zip(parts, _gathered(parts, k, v, layout), strict=True):
            dq, dk, dv, dbias = OPS.gather_attention_backward(
                *(dout[:, part.heads], _of(dlse, part.heads)),
                *(q[:, part.heads], *whole, indices[:, part.lists], _of(bias, part.bias)),
                *options,
                part.first_head,
                *needs,
            )
            dqs.append(dq)
            dbiases.append(dbias)
            keys = [x for x, need in ((dk, need_dqk), (dv, need_dv)) if need]
            yield _start(start_sum, keys, layout)

    keys = [torch.cat(each, 1) for each in zip(*overlapped(sums()), strict=True)]
    nothing = q.new_empty(0)
    return (
        torch.cat(dqs, 1) if need_dqk else nothing,
        keys.pop(0) if need_dqk else nothing.clone(),
        keys.pop(0) if need_dv else nothing.clone(),
        torch.cat(dbiases, 1) if need_dbias else q.new_empty(0, dtype=acc_dtype(q)),
    )


_define(
    "smartbird::sharded_gather_attention",
    _forward,
    mutates_args=(),
    schema=f"({_INPUTS}) -> (Tensor, Tensor)",
)
_define(
    "smartbird::sharded_gather_attention_backward",
    _backward,
    mutates_args=(),
    schema=(
        f"(Tensor dout, Tensor? dlse, {_INPUTS}, bool need_dqk, bool need_dv, bool need_dbias, "
        "bool deterministic) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
)


@register_fake("sharded_gather_attention")
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty((*q.shape[:3], v.shape[3])), q.new_empty(q.shape[:3], dtype=acc_dtype(q))


@register_fake("sharded_gather_attention_backward")
def _(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, indices: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    need_dqk, need_dv, need_dbias, _ = rest[-4:]
    slots = (*q.shape[:3], indices.shape[3])
    return (
        q.new_empty(q.shape if need_dqk else (0,)),
        k.new_empty(k.shape if need_dqk else (0,)),
        v.new_empty(v.shape if need_dv else (0,)),
        q.new_empty(slots if need_dbias else (0,), dtype=acc_dtype(q)),
    )


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    save(ctx, *inputs)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Any:
    q, k, v, indices, bias, *options = saved(ctx)
    need_dq, need_dk, need_dv, _, need_dbias = ctx.needs_input_grad[:5]
    dq, dk, dv, dbias = OPS.sharded_gather_attention_backward(
        q.new_zeros((*q.shape[:3], v.shape[3])) if dout is None else dout,
        dlse,
        *(q, k, v, indices, bias, *options),
        *(need_dq or need_dk, need_dv, need_dbias, torch.are_deterministic_algorithms_enabled()),
    )
    if need_dbias and bias.shape[1] != q.shape[1]:
        dbias = torch.unflatten(dbias, 1, (bias.shape[1], -1)).sum(2)
    return (
        dq if need_dq else None,
        dk if need_dk else None,
        dv if need_dv else None,
        None,
        dbias if need_dbias else None,
        *[None] * 10,
    )


register_autograd("sharded_gather_attention", _gradients, _save)
register_autograd("sharded_gather_attention_backward", refuse_gradient)
