"""How DTensor may spread the ops that gather keys over ranks.

Over each dimension of a mesh: the batch; heads, with the keys that are theirs; or queries, where
every rank has all keys. The ops know no positions, so some of the queries get what they would among
all. DTensor moves whatever lies otherwise, and adds up the gradients of keys that several ranks
have.

Dropout is drawn by who a row is, which some of the rows do not tell: with it the ops take whole
tensors only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding as _register_sharding
from torch.distributed.tensor.placement_types import Placement

from smartbird.ops._call import OPS

Rule = list[tuple[list[Placement], list[Placement | None]]]

BATCH, HEADS, QUERIES = range(3)  # dimensions of all tensors
register_sharding: Callable[..., Callable[[Callable[..., Rule]], Callable[..., Rule]]] = (
    _register_sharding
)


class _Tensor(NamedTuple):
    """[B, heads, N, ...] of queries or [B, heads, M, ...] of keys."""

    heads: int
    of_keys: bool = False

    def placement(self, dim: int, whole: Placement) -> Placement:
        """Where ``dim`` is spread: ``whole`` for what every rank has."""
        every_rank = self.of_keys if dim == QUERIES else dim == HEADS and self.heads == 1
        return whole if every_rank else Shard(dim)


def _rule(
    size: int, outputs: Sequence[_Tensor | None], inputs: Sequence[_Tensor | None], others: Any
) -> Rule:
    """The placements of outputs and inputs that go together.

    Args:
        size: ranks of the mesh.
        outputs: None for the empty tensor in place of a gradient that is not asked for.
        inputs: None where there is no tensor.
        others: the arguments after them, of which dropout's are tensors.
    """
    everywhere: Placement = Replicate()
    for_dropout: list[Placement | None] = [everywhere if _is_tensor(x) else None for x in others]
    rule: Rule = [([everywhere] * len(outputs), [x and everywhere for x in inputs] + for_dropout)]
    if any(for_dropout):
        return rule
    # One head serves all others. Several are shared as those are that they serve, or not at all.
    heads = [x.heads for x in (*outputs, *inputs) if x is not None]
    shared = max(heads) > 1 and all(n == 1 or n % size == 0 for n in heads)
    for dim in (BATCH, HEADS, QUERIES) if shared else (BATCH, QUERIES):
        rule.append(
            (
                # Of what all ranks have in full, each has a part of the gradient.
                [x.placement(dim, Partial()) if x else everywhere for x in outputs],
                [x and x.placement(dim, everywhere) for x in inputs] + for_dropout,
            )
        )
    return rule


def _is_tensor(x: Any) -> bool:
    return hasattr(x, "placements")


def _rows(x: Any) -> _Tensor | None:
    return _Tensor(x.shape[1]) if _is_tensor(x) else None


def _keys(x: Any) -> _Tensor:
    return _Tensor(x.shape[1], of_keys=True)


@register_sharding(OPS.gather_scores.default)
def _(q: Any, k: Any, indices: Any, *others: Any) -> Rule:
    return _rule(q.mesh.size(), [_rows(q)], [_rows(q), _keys(k), _rows(indices)], others)


@register_sharding(OPS.gather_scores_backward.default)
def _(dscores: Any, q: Any, k: Any, indices: Any, *others: Any) -> Rule:
    inputs = [_rows(dscores), _rows(q), _keys(k), _rows(indices)]
    return _rule(q.mesh.size(), [_rows(q), _keys(k)], inputs, others)


@register_sharding(OPS.gather_attention.default)
def _(q: Any, k: Any, v: Any, indices: Any, bias: Any, *others: Any) -> Rule:
    inputs = [_rows(q), _keys(k), _keys(v), _rows(indices), _rows(bias)]
    return _rule(q.mesh.size(), [_rows(q), _rows(q)], inputs, others)


@register_sharding(OPS.gather_attention_backward.default)
def _(dout: Any, dlse: Any, q: Any, k: Any, v: Any, indices: Any, bias: Any, *others: Any) -> Rule:
    needs_dqk, needs_dv, needs_dbias = others[8:11]
    inputs = [_rows(x) for x in (dout, dlse, q)] + [_keys(k), _keys(v), _rows(indices), _rows(bias)]
    outputs = [
        _rows(q) if needs_dqk else None,
        _keys(k) if needs_dqk else None,
        _keys(v) if needs_dv else None,
        _rows(q) if needs_dbias else None,
    ]
    return _rule(q.mesh.size(), outputs, inputs, others)
