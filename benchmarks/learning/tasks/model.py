"""The encoder that every attention is put into."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.learning.tasks.attention import ATTENTIONS
from benchmarks.learning.tasks.config import Config
from benchmarks.learning.tasks.data import Task
from smartbird.nn import SmartBirdAttention


class Shared(NamedTuple):
    """What layers of Smart Bird have in common, by `Config.reuse` and `Config.share_sketch`.

    None is made by the next layer that has a use for it.
    """

    indices: Tensor | None = None
    sketch: tuple[Tensor, Tensor] | None = None


class Block(nn.Module):
    """Pre-norm Transformer layer: attention, then a feed-forward of four times the width.

    Called with x [B, N, dim], key_mask, and what it shares with the layers before; gives x and what
    the layers after may share.
    """

    def __init__(self, config: Config, is_causal: bool) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.dim)
        self.attention = ATTENTIONS[config.attention](config, is_causal)
        self.reuses = config.reuse > 1
        self.shares_sketch = config.share_sketch > 1
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(config.dim),
            nn.Linear(config.dim, 4 * config.dim),
            nn.GELU(),
            nn.Linear(4 * config.dim, config.dim),
            nn.Dropout(config.dropout),
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, key_mask: Tensor | None, shared: Shared) -> tuple[Tensor, Shared]:
        normed = self.attention_norm(x)
        if isinstance(self.attention, SmartBirdAttention):
            attended, shared = self._attend(self.attention, normed, key_mask, shared)
        else:
            attended = self.attention(normed, key_mask=key_mask)
        x = x + self.dropout(attended)
        x = x + self.feed_forward(x)
        return x, shared

    def _attend(
        self, attention: SmartBirdAttention, x: Tensor, key_mask: Tensor | None, shared: Shared
    ) -> tuple[Tensor, Shared]:
        indices, sketch = shared
        if self.shares_sketch and sketch is None:
            sketch = attention.sketch(x.detach())
        if self.reuses and not attention.dense:
            attended, indices = attention(
                x, key_mask=key_mask, indices=indices, sketch=sketch, return_indices=True
            )
        else:
            attended = attention(x, key_mask=key_mask, sketch=sketch)
        return attended, Shared(indices, sketch)


class Encoder(nn.Module):
    """Token and learned position embeddings, layers, and a linear head.

    Args:
        config: sizes and the attention.
        task: vocabulary, classes, direction, and whether each position answers or the mean does.
    """

    def __init__(self, config: Config, task: Task) -> None:
        super().__init__()
        self.config = config
        self.per_position = task.per_position
        self.reuse, self.share_sketch = config.reuse, config.share_sketch
        self.tokens = nn.Embedding(task.vocab_size, config.dim)
        self.positions = nn.Embedding(config.seq_len, config.dim)
        nn.init.normal_(self.tokens.weight, std=config.embedding_std)
        nn.init.normal_(self.positions.weight, std=config.embedding_std)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Block(config, task.is_causal) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.dim)
        self.head = nn.Linear(config.dim, task.num_classes)

    def forward(
        self, tokens: Tensor, key_mask: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """Logits of `tokens` (int64 [B, N]): [B, N, classes] per position, else [B, classes].

        `key_mask` (bool [B, N], True = a token) keeps padding out of attention and of the mean.
        `positions` (int64 [B, N]) is where they stand, without it from 0 on.
        """
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.dropout(self.tokens(tokens) + self.positions(positions))
        shared = Shared()
        for position, layer in enumerate(self.layers):
            if position % self.reuse == 0:
                shared = shared._replace(indices=None)
            if position % self.share_sketch == 0:
                shared = shared._replace(sketch=None)
            x, shared = layer(x, key_mask, shared)
        x = self.norm(x)
        if not self.per_position:
            x = _mean(x, key_mask)
        logits: Tensor = self.head(x)
        return logits


def _mean(x: Tensor, key_mask: Tensor | None) -> Tensor:
    """Mean over the positions of x [B, N, dim] that `key_mask` keeps."""
    if key_mask is None:
        return x.mean(dim=1)
    weights = key_mask.unsqueeze(-1).to(x.dtype)
    return (x * weights).sum(dim=1) / weights.sum(dim=1)
