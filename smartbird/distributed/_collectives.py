"""What ranks send each other, as ops that eager code, graphs and autograd all know.

Tensors are [B, C, tokens, F]: ``local`` tokens of a rank or all ``length`` of the sequence, as
:class:`Shards` says. An op names its group, since an op's arguments can hold no group itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from smartbird.distributed._shards import Shards
from smartbird.ops._call import OPS

T = TypeVar("T")
Layout = tuple[str, bool, int]  # how ops are told of shards: group, head_tail and length

# The older names give a warning from torch 2.13 on, the newer ones are not in 2.10.
_all_gather: Callable[..., Any] = (
    getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
)
_reduce_scatter: Callable[..., Any] = (
    getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
)


def group_named(name: str) -> dist.ProcessGroup:
    # Private to torch, and what its own ops find their groups by.
    group: dist.ProcessGroup = dist.distributed_c10d._resolve_process_group(name)
    return group


def shards_of(group: str, head_tail: bool, length: int) -> Shards:
    of = group_named(group)
    return Shards(of.rank(), of.size(), head_tail, length)


# ---- in the background --------------------------------------------------------------------------


def start_gather(x: Tensor, *layout: Any) -> Callable[[], Tensor]:
    """Starts to gather [B, C, local, F]; what it gives waits and gives [B, C, length, F]."""
    shards = shards_of(*layout)
    send = shards.split(x)
    parts = send.new_empty((shards.size * send.shape[0], *send.shape[1:]))
    work = _all_gather(_bytes(parts), _bytes(send), group=group_named(layout[0]), async_op=True)

    def finish() -> Tensor:
        work.wait()
        return shards.join_whole(parts)

    return finish


def start_sum(x: Tensor, *layout: Any) -> Callable[[], Tensor]:
    """Starts to add up [B, C, length, F] of all ranks; then waits and gives [B, C, local, F]."""
    shards = shards_of(*layout)
    # Sums of 16 bits would lose more with every rank.
    send = shards.split_whole(x).to(torch.promote_types(x.dtype, torch.float32))
    parts = send.new_empty((send.shape[0] // shards.size, *send.shape[1:]))
    work = _reduce_scatter(parts, send, group=group_named(layout[0]), async_op=True)

    def finish() -> Tensor:
        work.wait()
        return shards.join(parts).to(x.dtype)

    return finish


def overlapped(started: Iterable[Callable[[], T]]) -> Iterator[T]:
    """The results of what was started, each waited for once the next is under way."""
    pending = None
    for finish in started:
        if pending is not None:
            yield pending()
        pending = finish
    if pending is not None:
        yield pending()


def _bytes(x: Tensor) -> Tensor:
    """What is only moved is moved as bytes: not every backend knows every dtype."""
    return x.view(torch.uint8)


# ---- ops ----------------------------------------------------------------------------------------


def _define(name: str, arguments: str) -> Callable[[Callable[..., Any]], Any]:
    """Registers an op of one tensor and ``arguments`` that gives a tensor."""
    define: Callable[..., Any] = torch.library.custom_op
    schema = f"(Tensor x, {arguments}) -> Tensor"
    return lambda function: define(f"smartbird::{name}", function, mutates_args=(), schema=schema)


_LAYOUT = "str group, bool head_tail, int length"


def _gather_tokens(x: Tensor, group: str, head_tail: bool, length: int) -> Tensor:
    return start_gather(x, group, head_tail, length)()


def _sum_tokens(x: Tensor, group: str, head_tail: bool, length: int) -> Tensor:
    return start_sum(x, group, head_tail, length)()


def _to_heads(x: Tensor, group: str, head_tail: bool, length: int) -> Tensor:
    shards = shards_of(group, head_tail, length)
    send = torch.cat([shards.split(heads) for heads in x.chunk(shards.size, 1)])
    return shards.join_whole(_exchange(send, group))


def _to_tokens(x: Tensor, group: str, head_tail: bool, length: int) -> Tensor:
    shards = shards_of(group, head_tail, length)
    parts = _exchange(shards.split_whole(x), group)
    return torch.cat([shards.join(heads) for heads in parts.chunk(shards.size)], 1)


def _exchange(send: Tensor, group: str) -> Tensor:
    parts = torch.empty_like(send)
    dist.all_to_all_single(_bytes(parts), _bytes(send), group=group_named(group))
    return parts


def _of_first(x: Tensor, group: str) -> Tensor:
    x = x.clone()
    dist.broadcast(x, group=group_named(group), group_src=0)
    return x


def _sum_ranks(x: Tensor, group: str) -> Tensor:
    x = x.clone()
    dist.all_reduce(x, group=group_named(group))
    return x


gather_op = _define("gather_tokens", _LAYOUT)(_gather_tokens)
sum_op = _define("sum_tokens", _LAYOUT)(_sum_tokens)
to_heads_op = _define("tokens_to_heads", _LAYOUT)(_to_heads)
to_tokens_op = _define("heads_to_tokens", _LAYOUT)(_to_tokens)
of_first_op = _define("of_first_rank", "str group")(_of_first)
sum_ranks_op = _define("sum_of_ranks", "str group")(_sum_ranks)


@gather_op.register_fake
def _(x: Tensor, group: str, head_tail: bool, length: int) -> Tensor:
    return x.new_empty((*x.shape[:2], length, x.shape[3]))


@sum_op.register_fake
def _(x: Tensor, group: str, head_tail: bool, length: int) -> Tensor:
    shards = shards_of(group, head_tail, length)
    return x.new_empty((*x.shape[:2], shards.local, x.shape[3]))


@to_heads_op.register_fake
def _(x: Tensor, group: str, head_tail: bool, length: int) -> Tensor:
    heads = x.shape[1] // shards_of(group, head_tail, length).size
    return x.new_empty((x.shape[0], heads, length, x.shape[3]))


@to_tokens_op.register_fake
def _(x: Tensor, group: str, head_tail: bool, length: int) -> Tensor:
    shards = shards_of(group, head_tail, length)
    return x.new_empty((x.shape[0], x.shape[1] * shards.size, shards.local, x.shape[3]))


@of_first_op.register_fake
@sum_ranks_op.register_fake
def _(x: Tensor, group: str) -> Tensor:
    return torch.empty_like(x)


def _save_layout(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.layout = inputs[1:]


# An op that moves tokens and the one that moves them back are each other's gradients; tokens that
# every rank was given add up their gradients.
for _op, _back in (
    (gather_op, "sum_tokens"),
    (sum_op, "gather_tokens"),
    (to_heads_op, "heads_to_tokens"),
    (to_tokens_op, "tokens_to_heads"),
):

    def _backward(ctx: Any, dout: Tensor, back: str = _back) -> Any:
        return getattr(OPS, back)(dout, *ctx.layout), None, None, None

    _op.register_autograd(_backward, setup_context=_save_layout)

# A rank's gradient of the sum is that of its own summand.
sum_ranks_op.register_autograd(lambda ctx, dout: (dout, None))
