"""The encoder that every attention is put into."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from smartbird.modules import SmartBirdAttention
from smartbird.tasks.attention import ATTENTIONS
from smartbird.tasks.config import Config
from smartbird.tasks.data import Task


class Block(nn.Module):
    """Pre-norm Transformer layer: attention, then a feed-forward of four times the width.

    Called with x [B, N, dim], key_mask, and, with `Config.reuse` above 1, the keys of the layer
    before to attend to (None: it draws); gives x and the keys attended to, if they can be reused.
    """

    def __init__(self, config: Config, is_causal: bool) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.dim)
        self.attention = ATTENTIONS[config.attention](config, is_causal)
        self.reuses = config.reuse > 1 and isinstance(self.attention, SmartBirdAttention)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(config.dim),
            nn.Linear(config.dim, 4 * config.dim),
            nn.GELU(),
            nn.Linear(4 * config.dim, config.dim),
            nn.Dropout(config.dropout),
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, key_mask: Tensor | None, indices: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        normed = self.attention_norm(x)
        if self.reuses and not self.attention.dense:
            attended, indices = self.attention(
                normed, key_mask=key_mask, indices=indices, return_indices=True
            )
        else:
            attended = self.attention(normed, key_mask=key_mask)
        x = x + self.dropout(attended)
        x = x + self.feed_forward(x)
        return x, indices


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
        self.reuse = config.reuse
        self.tokens = nn.Embedding(task.vocab_size, config.dim)
        self.positions = nn.Embedding(config.seq_len, config.dim)
        nn.init.normal_(self.tokens.weight, std=config.embedding_std)
        nn.init.normal_(self.positions.weight, std=config.embedding_std)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Block(config, task.is_causal) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.dim)
        self.head = nn.Linear(config.dim, task.num_classes)

    def forward(
        self, tokens: Tensor, key_mask: Tensor | None = None, start: Tensor | None = None
    ) -> Tensor:
        """Logits of `tokens` (int64 [B, N]): [B, N, classes] per position, else [B, classes].

        `key_mask` (bool [B, N], True = a token) keeps padding out of attention and of the mean.
        `start` (int64 [B]) is the position of each row's first token, 0 without it.
        """
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        if start is not None:
            positions = start.unsqueeze(1) + positions
        x = self.dropout(self.tokens(tokens) + self.positions(positions))
        indices = None
        for position, layer in enumerate(self.layers):
            if position % self.reuse == 0:
                indices = None
            x, indices = layer(x, key_mask, indices)
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
