"""What ranks send each other, as ops that eager code, graphs and autograd all know.

Tensors are [B, C, tokens, F]: ``local`` tokens of a rank or all ``length`` of the sequence, as
:class:`Shards` says. An op names its group, since an op's arguments can hold no group itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from smartbird.distributed._shards import Shards
from smartbird.ops._call import OPS, register_autograd, register_fake

T = TypeVar("T")

# The older names give a warning from torch 2.13 on, the newer ones are not in 2.10.
_all_gather: Callable[..., Any] = (
    getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
)
_reduce_scatter: Callable[..., Any] = (
    getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
)


def group_named(name: str) -> dist.ProcessGroup:
    c10d: Any = dist.distributed_c10d
    # Private to torch, and how its own ops find their groups.
    group: dist.ProcessGroup = c10d._resolve_process_group(name)
    return group


def shards_of(group: str, head_tail: bool, length: int) -> Shards:
    of = group_named(group)
    return Shards(of.rank(), of.size(), head_tail, length)


@contextmanager
def with_others(group: str) -> Iterator[dist.ProcessGroup]:
    """The group, for an exchange; where that fails, it is said what that means.

    Raises:
        DistBackendError: a RuntimeError, from that of the backend.
    """
    of = group_named(group)
    try:
        yield of
    except RuntimeError as error:
        raise dist.DistBackendError(
            f"rank {of.rank()} of the {of.size()} that share a sequence has lost the others: one "
            "has failed, as its own message says, or did not make the same call in time"
        ) from error


# ---- in the background --------------------------------------------------------------------------


def start_gather(x: Tensor, *layout: Any) -> Callable[[], Tensor]:
    """Starts to gather [B, C, local, F]; what it gives waits and gives [B, C, length, F]."""
    shards = shards_of(*layout)
    send = shards.split(x)
    parts = send.new_empty((shards.size * send.shape[0], *send.shape[1:]))
    with with_others(layout[0]) as group:
        work = _all_gather(_bytes(parts), _bytes(send), group=group, async_op=True)

    def finish() -> Tensor:
        with with_others(layout[0]):
            work.wait()
        return shards.join_whole(parts)

    return finish


def start_sum(x: Tensor, *layout: Any) -> Callable[[], Tensor]:
    """Starts to add up [B, C, length, F] of all ranks; then waits and gives [B, C, local, F]."""
    shards = shards_of(*layout)
    # Sums of 16 bits would lose more with every rank.
    send = shards.split_whole(x).to(torch.promote_types(x.dtype, torch.float32))
    parts = send.new_empty((send.shape[0] // shards.size, *send.shape[1:]))
    with with_others(layout[0]) as group:
        work = _reduce_scatter(parts, send, group=group, async_op=True)

    def finish() -> Tensor:
        with with_others(layout[0]):
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


def gather_each(tensors: Iterable[Tensor], *layout: Any) -> Iterator[Tensor]:
    """All tokens of each [B, C, local, F]: constants, of which the next comes meanwhile.

    In a graph, which has nothing but ops, one after the other.
    """
    if torch.compiler.is_compiling():
        return (OPS.gather_tokens(x, *layout) for x in tensors)
    return overlapped(start_gather(x, *layout) for x in tensors)


def _bytes(x: Tensor) -> Tensor:
    """What is only moved is moved as bytes: not every backend knows every dtype."""
    return x.view(torch.uint8)


# ---- ops ----------------------------------------------------------------------------------------


def _define(name: str, arguments: str, function: Callable[..., Tensor]) -> None:
    """Registers an op of one tensor and ``arguments``."""
    define: Callable[..., Any] = torch.library.custom_op
    schema = f"(Tensor x, {arguments}) -> Tensor"
    define(f"smartbird::{name}", function, mutates_args=(), schema=schema)


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
    with with_others(group) as of:
        dist.all_to_all_single(_bytes(parts), _bytes(send), group=of)
    return parts


def _of_first(x: Tensor, group: str) -> Tensor:
    x = x.clone()
    with with_others(group) as of:
        dist.broadcast(x, group=of, group_src=0)
    return x


def _sum_ranks(x: Tensor, group: str) -> Tensor:
    x = x.clone()
    with with_others(group) as of:
        dist.all_reduce(x, group=of)
    return x


_define("gather_tokens", _LAYOUT, _gather_tokens)
_define("sum_tokens", _LAYOUT, _sum_tokens)
_define("tokens_to_heads", _LAYOUT, _to_heads)
_define("heads_to_tokens", _LAYOUT, _to_tokens)
_define("of_first_rank", "str group", _of_first)
_define("sum_of_ranks", "str group", _sum_ranks)


@register_fake("gather_tokens")
def _(x: Tensor, group: str, head_tail: bool, length: int) -> Tensor:
    return x.new_empty((*x.shape[:2], length, x.shape[3]))


@register_fake("sum_tokens")
def _(x: Tensor, group: str, head_tail: bool, length: int) -> Tensor:
    shards = shards_of(group, head_tail, length)
    return x.new_empty((*x.shape[:2], shards.local, x.shape[3]))


@register_fake("tokens_to_heads")
def _(x: Tensor, group: str, head_tail: bool, length: int) -> Tensor:
    heads = x.shape[1] // shards_of(group, head_tail, length).size
    return x.new_empty((x.shape[0], heads, length, x.shape[3]))


@register_fake("heads_to_tokens")
def _(x: Tensor, group: str, head_tail: bool, length: int) -> Tensor:
    shards = shards_of(group, head_tail, length)
    return x.new_empty((x.shape[0], x.shape[1] * shards.size, shards.local, x.shape[3]))


@register_fake("of_first_rank")
@register_fake("sum_of_ranks")
def _(x: Tensor, group: str) -> Tensor:
    return torch.empty_like(x)


def _save_layout(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.layout = inputs[1:]


def _undone_by(name: str) -> Callable[[Any, Tensor], Any]:
    """The backward formula of an op whose transpose is another."""

    def backward(ctx: Any, dout: Tensor) -> Any:
        return getattr(OPS, name)(dout, *ctx.layout), None, None, None

    return backward


# A gather gives tokens to every rank, so it adds up what ranks make of them.
register_autograd("gather_tokens", _undone_by("sum_tokens"), _save_layout)
register_autograd("sum_tokens", _undone_by("gather_tokens"), _save_layout)
register_autograd("tokens_to_heads", _undone_by("heads_to_tokens"), _save_layout)
register_autograd("heads_to_tokens", _undone_by("tokens_to_heads"), _save_layout)
# A rank's gradient of the sum is that of its own summand.
register_autograd("sum_of_ranks", lambda ctx, dout: (dout, None))
