"""Which keys the attention layers of a model choose, and how much of dense attention they hold."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from smartbird import ops, patterns
from smartbird.modules import SmartBirdAttention
from smartbird.tasks.attention import PatternAttention, ProjectedAttention
from smartbird.tasks.config import RunError
from smartbird.tasks.continuation import Continuation
from smartbird.tasks.data import Batch, Task
from smartbird.tasks.model import Encoder
from smartbird.tasks.sotu import Sotu

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class LayerKeys:
    """The keys that one layer chooses in a batch, and the shares of dense attention they hold.

    Dense attention is the softmax of the layer's own q . k over all valid keys. Its shares are NaN
    for queries that are padding or have no valid key.

    Attributes:
        indices: int32 [B, H_i, N, K]; None where the layer attends to every valid key.
        is_causal: whether query i sees keys ``j <= i`` only.
        recall: float32 [B, H, N], the probability of dense attention on the chosen keys.
        best: likewise, on the K keys that hold most of it.
        chance: likewise, on as many random keys as were chosen, on average.
    """

    indices: Tensor | None
    is_causal: bool
    recall: Tensor
    best: Tensor
    chance: Tensor


def sample_recall(model: Encoder, batch: Batch) -> Tensor:
    """Recall at K: the share of dense attention's mass on the keys that each head chooses.

    The model is in evaluation mode meanwhile. No N x N tensor is made: the normaliser of dense
    attention is streamed, and only the scores of the chosen keys are kept.

    Returns:
        float32 [layers, H], means over the queries of the batch; 1 where attention is dense.
    """

    def mean_recall(q: Tensor, k: Tensor, indices: Tensor | None, is_causal: bool) -> Tensor:
        recall = attention_recall(q, k, indices, is_causal=is_causal, key_mask=batch.key_mask)
        return recall.nanmean((0, 2))

    return torch.stack(_of_each_layer(model, batch.tokens, batch.key_mask, mean_recall))


def look(model: Encoder, tokens: Tensor, key_mask: Tensor | None = None) -> list[LayerKeys]:
    """What every layer of the model chooses, with the bounds that its recall lies between.

    The best keys take as long to find as dense attention.

    Args:
        model: in evaluation mode meanwhile.
        tokens: int64 [B, N].
        key_mask: bool [B, N], True where there is a token. None: everywhere.
    """

    def keys(q: Tensor, k: Tensor, indices: Tensor | None, is_causal: bool) -> LayerKeys:
        masks: dict[str, Any] = {"is_causal": is_causal, "key_mask": key_mask}
        recall = attention_recall(q, k, indices, **masks)
        if indices is None:
            return LayerKeys(None, is_causal, recall, recall, recall)
        best = patterns.oracle_indices(q, k, indices.shape[-1], **masks)
        share = (_distinct(indices) >= 0).sum(-1) / _num_valid(q.shape[2], is_causal, key_mask)
        chance = share.repeat_interleave(q.shape[1] // indices.shape[1], dim=1)
        return LayerKeys(
            indices=indices,
            is_causal=is_causal,
            recall=recall,
            best=attention_recall(q, k, best, **masks),
            chance=chance.masked_fill(recall.isnan(), torch.nan),
        )

    return _of_each_layer(model, tokens, key_mask, keys)


@torch.no_grad()
def attention_recall(
    q: Tensor,
    k: Tensor,
    indices: Tensor | None,
    *,
    is_causal: bool = False,
    key_mask: Tensor | None = None,
) -> Tensor:
    """The probability that dense self-attention gives to chosen keys: sum of softmax over them.

    Args:
        q: [B, H, N, D].
        k: [B, H, N, D].
        indices: valid keys, [B, H_i, N, K], ascending, -1 in unused places at the end; a repeated
            key counts once. None: every valid key.
        is_causal: query i sees keys ``j <= i``.
        key_mask: bool [B, N], True where there is a token.

    Returns:
        float32 [B, H, N] in [0, 1], NaN for queries that are padding or have no valid key.
    """
    batch, heads, num_queries, _ = q.shape
    lse = ops.sketch_lse(
        q.flatten(0, 1),
        k.flatten(0, 1),
        is_causal=is_causal,
        key_mask=None if key_mask is None else key_mask.repeat_interleave(heads, dim=0),
    ).view(batch, heads, num_queries)
    counts = lse > -torch.inf
    if key_mask is not None:
        counts = counts & key_mask[:, None]
    if indices is None:
        recall = torch.ones_like(lse)
    else:
        scores = ops.gather_scores(q, k, _distinct(indices))
        # Rounding may put the sum of all keys a little above 1.
        recall = (scores.logsumexp(-1) - lse).exp().clamp(max=1.0)
    return recall.masked_fill(~counts, torch.nan)


@dataclasses.dataclass(frozen=True)
class Document:
    """One sequence for a model to read.

    Attributes:
        source: where it is from, in words.
        tokens: int64 [1, N].
        pieces: the tokens as people read them.
        begins: for each token, whether it stands apart from the one before.
    """

    source: str
    tokens: Tensor
    pieces: list[str]
    begins: list[bool]


def read_document(task: Task, file: Path | None) -> Document:
    """The beginning of a text file as the task's tokenizer reads it, cut to the model's length.

    Without a file, the first sequence of the task's validation split.

    Raises:
        RunError: the task reads no text, or the file holds none.
        OSError: the file cannot be read.
    """
    if file is None:
        batch = next(iter(task.eval_batches("valid")))
        tokens = batch.tokens[0]
        tokens = tokens if batch.key_mask is None else tokens[batch.key_mask[0]]
        pieces = [task.token_name(token) for token in tokens.tolist()]
        source = "the first sequence of the validation split"
        return Document(source, tokens[None], pieces, [True] * len(pieces))
    if not isinstance(task, Sotu | Continuation):
        raise RunError(f"{file}: the task of this checkpoint reads no text; leave --text out")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RunError(f"{file}: is not a text in UTF-8 ({error.reason})") from error
    text, encoding = task.read(text)
    if not encoding.ids:
        raise RunError(f"{file}: holds no words")
    return Document(
        source=file.name,
        tokens=torch.tensor([encoding.ids]),
        pieces=[text[start:stop] for start, stop in encoding.offsets],
        begins=[True, *(before != word for before, word in itertools.pairwise(encoding.word_ids))],
    )


def _of_each_layer(
    model: Encoder,
    tokens: Tensor,
    key_mask: Tensor | None,
    measure: Callable[[Tensor, Tensor, Tensor | None, bool], _T],
) -> list[_T]:
    """`measure(q, k, indices, is_causal)` of every attention layer, in order.

    q and k are [B, H, N, D]; indices [B, H_i, N, K], or None where the layer attends to all keys.
    """
    calls: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = []

    def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((layer, args, kwargs))

    training = model.training
    model.eval()
    try:
        with ExitStack() as hooks, torch.no_grad():
            for block in model.layers:
                layer = block.get_submodule("attention")
                hooks.enter_context(layer.register_forward_pre_hook(note, with_kwargs=True))
            model(tokens, key_mask)
        # In evaluation mode a layer chooses the same keys again.
        with torch.no_grad():
            return [
                measure(*_choice(layer, args, kwargs), bool(layer.is_causal))
                for layer, args, kwargs in calls
            ]
    finally:
        model.train(training)


def _choice(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """q, k and indices of a call of a layer."""
    (x,) = args
    if isinstance(layer, SmartBirdAttention):
        q, k, _ = layer._project(x, x, x)
        if layer.dense:
            return q, k, None
        return q, k, layer(*args, **kwargs | {"return_indices": True})[1]
    assert isinstance(layer, ProjectedAttention)
    q, k, _ = layer.project(x)
    if not isinstance(layer, PatternAttention):
        return q, k, None
    return q, k, layer.indices(q, k, kwargs["key_mask"]).expand(len(q), -1, -1, -1)


def _distinct(indices: Tensor) -> Tensor:
    """Ascending indices with -1 in place of all but the first of equal ones."""
    repeated = torch.zeros_like(indices, dtype=torch.bool)
    repeated[..., 1:] = indices[..., 1:] == indices[..., :-1]
    return indices.masked_fill(repeated, -1)


def _num_valid(num_keys: int, is_causal: bool, key_mask: Tensor | None) -> Tensor:
    """How many keys each query sees, broadcastable to [B, H, N]."""
    kept = torch.ones(1, num_keys, dtype=torch.bool) if key_mask is None else key_mask
    return (kept.cumsum(-1) if is_causal else kept.sum(-1, keepdim=True))[:, None]
