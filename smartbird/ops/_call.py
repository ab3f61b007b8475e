"""The way to the dispatcher's ops, and what they have in common there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from smartbird import _library as _library  # loads the compiled library

OPS = torch.ops.smartbird


def call(op: Callable[..., Any], *args: Any) -> Any:
    """Calls ``op``; what only the kernel can see to be wrong becomes a ValueError.

    In a compiled graph nothing stands between the two, and it stays the kernel's RuntimeError.
    """
    refuse_tangents(op, args)
    if torch.compiler.is_compiling():
        return op(*args)
    try:
        return op(*args)
    except RuntimeError as error:
        message = str(error).partition("smartbird: ")[2].partition("\n")[0]
        if not message:
            raise
        raise ValueError(message) from None


def constants(op: Callable[..., Any], *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors cut off from gradients, in which ``op`` is not differentiable."""
    refuse_tangents(op, tensors)
    return tuple(x.detach() for x in tensors)


def refuse_tangents(op: Callable[..., Any], args: Sequence[Any]) -> None:
    """Forward-mode AD has no formula here, and PyTorch would drop the tangents without a word."""
    if forward_ad._current_level < 0:
        return
    if any(_has_tangent(x) for x in args if isinstance(x, Tensor)):
        raise NotImplementedError(
            f"Trying to use forward AD with {op} that does not support it because it has not been "
            "implemented yet. Reverse mode (backward, torch.autograd.grad) is."
        )


def _has_tangent(x: Tensor) -> bool:
    transforms = torch._C._functorch
    if transforms.is_batchedtensor(x):
        return _has_tangent(transforms.get_unwrapped(x))
    unpack: Callable[[Tensor], Any] = forward_ad.unpack_dual
    if unpack(x).tangent is not None:
        return True
    # Of an outer torch.func.jvp, the tangents cannot be seen from within another transform.
    return transforms.is_functorch_wrapped_tensor(x) and transforms.is_gradtrackingtensor(
        transforms.get_unwrapped(x)
    )


def acc_dtype(x: Tensor) -> torch.dtype:
    """What the kernels compute in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# ---- registering ------------------------------------------------------------------------------


def save(ctx: Any, *values: Any) -> None:
    """Keeps tensors and other values for the backward pass, which takes them by :func:`saved`."""
    ctx.save_for_backward(*(x for x in values if isinstance(x, Tensor)))
    ctx.values = [... if isinstance(x, Tensor) else x for x in values]


def saved(ctx: Any) -> list[Any]:
    tensors = iter(ctx.saved_tensors)
    return [next(tensors) if x is ... else x for x in ctx.values]


def refuse_gradient(ctx: Any, *_: Any) -> Any:
    """Of a gradient, which PyTorch would leave out of a sum with a warning at most."""
    raise RuntimeError("the ops of smartbird can be differentiated once only")


def register_fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    register: Callable[..., Any] = torch.library.register_fake(f"smartbird::{name}")
    return register


def register_autograd(
    name: str, backward: Callable[..., Any], setup_context: Callable[..., Any] | None = None
) -> None:
    torch.library.register_autograd(f"smartbird::{name}", backward, setup_context=setup_context)


def register_flops(name: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """For torch.utils.flop_counter: a function of the op's arguments.

    As of PyTorch's own attention, both halves of a multiplication that is added count, masks do
    not, and a backward pass makes the scores again.
    """
    packet = getattr(OPS, name)

    def register(count: Callable[..., int]) -> Callable[..., int]:
        def formula(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
            return count(*args, **kwargs)

        register_flop_formula(packet, get_raw=True)(formula)
        return count

    return register


def pairs(q: Tensor, k: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None) -> int:
    """Queries times keys of q [B, H, N, D] and k, summed over sequences and heads of q.

    Of a pack whose ends hold no data (fake or meta) an upper bound, as if it were one sequence.
    """
    if cu_seqlens_q is None or cu_seqlens_k is None or _has_no_data(cu_seqlens_q):
        return q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
    lengths = cu_seqlens_q.long().diff() * cu_seqlens_k.long().diff()
    return q.shape[1] * int(lengths.sum())


def _has_no_data(x: Tensor) -> bool:
    return x.is_meta or isinstance(x, FakeTensor)
