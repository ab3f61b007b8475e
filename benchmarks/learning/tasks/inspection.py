"""What a model of the tasks reads, and which keys its layers choose there."""

from __future__ import annotations

import dataclasses
import itertools
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.learning.tasks.attention import ProjectedAttention
from benchmarks.learning.tasks.config import RunError
from benchmarks.learning.tasks.continuation import Continuation
from benchmarks.learning.tasks.data import Batch, Task
from benchmarks.learning.tasks.model import Encoder
from benchmarks.learning.tasks.sotu import Sotu
from smartbird.inspection import LayerCall, LayerKeys, record


def sample_recall(model: Encoder, batch: Batch) -> Tensor:
    """Recall at K: the share of dense attention's mass on the keys that each head chooses.

    The model is in evaluation mode meanwhile.

    Returns:
        float32 [layers, H], means over the queries of the batch; 1 where attention is dense.
    """
    calls = _calls(model, batch.tokens, batch.key_mask)
    return torch.stack([call.recall().nanmean((0, 2)) for call in calls])


def look(model: Encoder, tokens: Tensor, key_mask: Tensor | None = None) -> list[LayerKeys]:
    """What every layer of the model chooses, with the bounds that its recall lies between.

    Args:
        model: in evaluation mode meanwhile.
        tokens: int64 [B, N].
        key_mask: bool [B, N], True where there is a token. None: everywhere.
    """
    return [call.keys() for call in _calls(model, tokens, key_mask)]


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


@torch.no_grad()
def _calls(model: Encoder, tokens: Tensor, key_mask: Tensor | None) -> list[LayerCall]:
    """The calls of all attention layers, in order, Smart Bird's or those of `ATTENTIONS`."""

    def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
        assert isinstance(layer, ProjectedAttention)
        calls[str(len(calls))] = layer.call(*args, **kwargs)

    training = model.training
    model.eval()
    try:
        with record(model) as calls, ExitStack() as hooks:
            for layer in model.modules():
                if isinstance(layer, ProjectedAttention):
                    hooks.enter_context(layer.register_forward_hook(note, with_kwargs=True))
            model(tokens, key_mask)
    finally:
        model.train(training)
    return list(calls.values())
