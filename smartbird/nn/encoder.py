"""``nn.TransformerEncoderLayer`` with Smart Bird attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smartbird._checks import can_look, check_count, check_flag, kind_of, shape_of
from smartbird.nn._layout import lay_out
from smartbird.nn.attention import SmartBirdAttention


class SmartBirdEncoderLayer(nn.Module):
    """``nn.TransformerEncoderLayer`` with Smart Bird attention (arXiv 2108.09193).

    Takes its arguments and loads its ``state_dict`` with ``strict=False``: sketch parameters are
    the only missing keys. With ``num_samples`` no less than the number of tokens it equals that
    layer in evaluation mode (unless ``"bias"`` is among the learning routes). It can be a layer of
    ``nn.TransformerEncoder``; give that ``enable_nested_tensor=False``, as this layer takes none of
    its nested tensors (but those of layout ``torch.jagged``). Padding costs nothing, and its output
    is zero.

    Args:
        d_model, nhead, dim_feedforward, dropout, activation: as ``nn.TransformerEncoderLayer``.
        layer_norm_eps, batch_first, norm_first, bias, device, dtype: likewise.
        attention: any other keyword argument of :class:`SmartBirdAttention`, such as
            ``num_samples``. (Keys and sketches of another layer are given to ``self_attn`` only.)
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **attention: Any,
    ) -> None:
        super().__init__()
        d_model, nhead = check_count("d_model", d_model, 1), check_count("nhead", nhead, 1)
        if d_model % nhead:
            raise ValueError(f"nhead must divide d_model {d_model}, got {nhead}")
        dim_feedforward = check_count("dim_feedforward", dim_feedforward, 1)
        if isinstance(activation, str):
            if activation not in ("relu", "gelu"):
                raise ValueError(
                    f"activation must be 'relu', 'gelu' or a callable, got {activation!r}"
                )
            activation = F.relu if activation == "relu" else F.gelu
        self.self_attn = SmartBirdAttention(
            d_model,
            nhead,
            dropout=dropout,
            bias=bias,
            batch_first=batch_first,
            device=device,
            dtype=dtype,
            **attention,
        )
        self.linear1 = nn.Linear(d_model, dim_feedforward, bias=bias, device=device, dtype=dtype)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(dim_feedforward, d_model, bias=bias, device=device, dtype=dtype)
        self.norm_first = norm_first
        self.norm1 = nn.LayerNorm(d_model, layer_norm_eps, bias=bias, device=device, dtype=dtype)
        self.norm2 = nn.LayerNorm(d_model, layer_norm_eps, bias=bias, device=device, dtype=dtype)
        self.dropout1 = nn.Dropout(dropout)
        self.dropout2 = nn.Dropout(dropout)
        self.activation = activation

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Pass the tokens through the layer.

        Args:
            src: [N, B, E], or [B, N, E] with ``batch_first``, or [N, E] for one sequence, or a
                nested tensor [B, j, E] of layout ``torch.jagged``.
            src_mask: None or the causal mask [N, N], boolean (True = not attended) or additive.
            src_key_padding_mask: [B, N], or [N] for one sequence, boolean (True = ignored) or
                additive (0 = kept, -inf = ignored).
            is_causal: attention is causal; as in PyTorch, a ``src_mask`` given along with it is
                taken to be the causal one without looking.

        Returns:
            The shape of ``src``; zeros in padding.

        Raises:
            ValueError: tokens of another shape; a mask that says anything else, which sampled
                attention cannot honour; a ``src_mask`` without ``is_causal`` while compiling or
                exporting. What a padding mask of floats holds is checked by the graph itself there,
                which raises a RuntimeError.
            TypeError: tokens or a flag of another type.
        """
        lay_out("src", src, self.self_attn.in_proj_weight, self.self_attn.batch_first)
        causal = self.self_attn.core.is_causal or check_flag("is_causal", is_causal)
        if src_mask is not None and not is_causal:
            _require_causal(src_mask, src, self.self_attn.batch_first)
            causal = True
        kept = None
        if src_key_padding_mask is not None:
            kept = _kept_tokens(src_key_padding_mask, src, self.self_attn.batch_first)
        if self.norm_first:
            x = src + self._attend(self.norm1(src), kept, causal)
            x = x + self._feed_forward(self.norm2(x), kept)
        else:
            x = self.norm1(src + self._attend(src, kept, causal))
            x = self.norm2(x + self._feed_forward(x, kept))
        if kept is not None:
            x = x.masked_fill(~self._laid_out(kept).unsqueeze(-1), 0)
        return x

    def _attend(self, x: Tensor, kept: Tensor | None, is_causal: bool) -> Tensor:
        out: Tensor = self.dropout1(self.self_attn(x, key_mask=kept, is_causal=is_causal))
        return out

    def _feed_forward(self, x: Tensor, kept: Tensor | None) -> Tensor:
        if kept is not None and can_look(x):
            # Of the tokens alone; in a graph, whose shapes cannot follow from data, of padding too.
            kept = self._laid_out(kept)
            rows = self._feed_forward(x[kept], None)
            return rows.new_zeros(x.shape).index_put((kept,), rows)
        out: Tensor = self.dropout2(self.linear2(self.dropout(self.activation(self.linear1(x)))))
        return out

    def _laid_out(self, kept: Tensor) -> Tensor:
        """A mask [B, N] in the order of the tokens; [N] of one sequence stays so."""
        return kept if self.self_attn.batch_first or kept.dim() == 1 else kept.T


def _require_causal(src_mask: Tensor, src: Tensor, batch_first: bool) -> None:
    """Refuse a mask other than the causal one: it would have to be dropped."""
    # The comparison reads values, which a traced graph cannot branch on.
    if torch.compiler.is_compiling():
        raise ValueError(
            "src_mask must come with is_causal=True in a compiled or exported graph, which cannot "
            "compare it with the causal mask, got is_causal=False"
        )
    if src.is_nested:
        raise ValueError("src_mask must be None with a nested src: give is_causal=True")
    length = src.shape[1 if src.dim() == 3 and batch_first else 0]
    what = f"got {kind_of(src_mask)}"
    if isinstance(src_mask, Tensor):
        what = f"got a {src_mask.dtype} mask {shape_of(src_mask)}"
        causal = nn.Transformer.generate_square_subsequent_mask(length, device=src_mask.device)
        if src_mask.dtype == torch.bool:
            causal = causal == -torch.inf
        if src_mask.is_floating_point():
            causal = causal.to(src_mask.dtype)
        if src_mask.equal(causal):
            return
    raise ValueError(
        f"src_mask must be None or the causal mask [{length}, {length}], boolean or additive, as "
        f"attention over sampled keys can honour no other, {what}"
    )


def _kept_tokens(padding_mask: Tensor, src: Tensor, batch_first: bool) -> Tensor:
    """PyTorch's padding mask (True or -inf = ignored) as a key mask (True = may be attended)."""
    name = "src_key_padding_mask"
    if src.is_nested:
        raise ValueError(f"{name} must be None with a nested src, got {kind_of(padding_mask)}")
    # An integer mask may mean either: in other libraries 1 is a token.
    if not isinstance(padding_mask, Tensor) or not (
        padding_mask.dtype == torch.bool or padding_mask.is_floating_point()
    ):
        raise ValueError(
            f"{name} must be a boolean Tensor (True = ignored), or an additive one of floats, "
            f"got {kind_of(padding_mask)}"
        )
    shape = src.shape[:-1]
    if src.dim() == 3 and not batch_first:
        shape = shape[::-1]
    if padding_mask.shape != shape:
        raise ValueError(f"{name} must be {list(shape)}, got {shape_of(padding_mask)}")
    if padding_mask.dtype == torch.bool:
        return ~padding_mask
    kept = padding_mask == 0
    allowed = (kept | (padding_mask == -torch.inf)).all()
    message = f"{name} must be boolean, or hold 0 (kept) and -inf (ignored) only"
    if torch.compiler.is_compiling():
        torch._assert_async(allowed, message)
    elif not allowed:
        raise ValueError(f"{message}, got other values in a {padding_mask.dtype} mask")
    return kept
