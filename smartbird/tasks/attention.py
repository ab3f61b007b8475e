"""The one registry of attentions: what `--attention` chooses from."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smartbird.tasks.config import Config


class ProjectedAttention(nn.Module):
    """Self-attention x [B, N, dim] -> [B, N, dim] with the usual projections around `attend`."""

    def __init__(self, config: Config, is_causal: bool) -> None:
        super().__init__()
        self.heads, self.is_causal = config.heads, is_causal
        self.in_proj = nn.Linear(config.dim, 3 * config.dim)
        self.out_proj = nn.Linear(config.dim, config.dim)
        nn.init.xavier_uniform_(self.in_proj.weight)
        nn.init.zeros_(self.in_proj.bias)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, key_mask: Tensor | None) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.in_proj(x).chunk(3, dim=-1)
        )
        out = self.attend(q, k, v, key_mask)
        result: Tensor = self.out_proj(out.transpose(1, 2).flatten(2))
        return result

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        """Attention of q, k, v [B, H, N, D] -> [B, H, N, D]; `key_mask` is bool [B, N]."""
        raise NotImplementedError


class DenseAttention(ProjectedAttention):
    """Every key: PyTorch's scaled_dot_product_attention."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        if key_mask is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=self.is_causal)
        mask = key_mask[:, None, None, :]
        if self.is_causal:
            mask = mask & torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


ATTENTIONS: dict[str, Callable[[Config, bool], nn.Module]] = {
    "dense": DenseAttention,
}


def build_attention(config: Config, is_causal: bool) -> nn.Module:
    """The attention of one layer: called with x [B, N, dim] and key_mask, bool [B, N] or None."""
    return ATTENTIONS[config.attention](config, is_causal)
