"""SketchCache: keys, values and sketches of keys, kept as the kernels read them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin

from smartbird._checks import check_count
from smartbird.hf.attention import SketchedAttention, sketched

LEAST_ROOM = 64  # tokens


class SketchLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys, values and sketches of keys of one converted attention module.

    They lie in buffers that get room for a quarter more than they must hold whenever they are full,
    so that the copies of a token are bounded in the mean, however many follow.

    Args:
        module: makes the sketches.
        max_length: tokens that there is room for from the first update on.

    Attributes:
        keys: [B, H_kv, M, D], a view; None while empty.
        values: [B, H_kv, M, Dv], a view.
        sketches: [B, H_ks, M, S], a view.
    """

    is_sliding = False
    is_croppable = True
    supports_early_init = False
    keys: Tensor | None
    values: Tensor | None

    def __init__(self, module: SketchedAttention, max_length: int = 0) -> None:
        super().__init__()
        self.module = module
        self.max_length = max_length
        self.sketches: Tensor | None = None
        self._length = 0
        self._buffers: list[Tensor] = []

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the first update knows how much room is needed."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys [B, H_kv, N, D] and values [B, H_kv, N, Dv].

        Sketches go to the attention function among the keyword arguments of the attention module.

        Returns:
            All keys and values: views, which later updates leave as they are, but after a crop.

        Raises:
            ValueError: a batch of another size; gradients are recorded, which are not kept.
        """
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise ValueError("SketchCache keeps no gradients: use it within torch.no_grad()")
        new = [key_states, value_states, self.module.sketch_keys(key_states)]
        if self._buffers and self._buffers[0].shape[0] != key_states.shape[0]:
            raise ValueError(
                f"the batch of a SketchCache must stay {self._buffers[0].shape[0]}, "
                f"got {key_states.shape[0]}"
            )
        length = self._length + key_states.shape[2]
        self._reserve(new, length)
        for buffer, x in zip(self._buffers, new, strict=True):
            buffer[:, :, self._length : length] = x
        self._look(length)
        keywords = options.get("kwargs")
        if isinstance(keywords, dict):
            keywords["k_sketch"] = self.sketches
            keywords["k_weight"] = self.module.k_weight
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def _reserve(self, new: list[Tensor], length: int) -> None:
        """Room for ``length`` tokens in buffers like ``new``."""
        if self._buffers and length <= self._buffers[0].shape[2]:
            return
        capacity = self.max_length
        if capacity < length:
            capacity = length + max(LEAST_ROOM, length // 4)
        grown = [x.new_empty((*x.shape[:2], capacity, x.shape[3])) for x in new]
        for buffer, old in zip(grown, self._buffers, strict=False):
            buffer[:, :, : self._length] = old[:, :, : self._length]
        self._buffers = grown

    def _look(self, length: int) -> None:
        """Let the attributes be views of so many tokens."""
        self._length = length
        self.is_initialized = bool(self._buffers)
        views = [x[:, :, :length] for x in self._buffers]
        self.keys, self.values, self.sketches = views if views else (None, None, None)

    def _replace(self, buffers: list[Tensor]) -> None:
        self._buffers = buffers
        self._look(self._length)

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """How many keys there will be, and which is the first."""
        if isinstance(query_length, Tensor):  # transformers 5.0 gives the positions
            query_length = query_length.shape[0]
        return self._length + query_length, 0

    def get_seq_length(self) -> int:
        """How many tokens are kept."""
        return self._length

    def get_max_length(self) -> int:
        """-1: as many as memory holds."""
        return -1

    get_max_cache_shape = get_max_length  # its name in earlier releases of transformers 5

    def offload(self) -> None:
        """Move to the CPU; :meth:`prefetch` moves back."""
        if self._buffers:
            self.device = self._buffers[0].device
            self._replace([x.to("cpu", non_blocking=True) for x in self._buffers])

    def prefetch(self) -> None:
        """Move back to where :meth:`offload` took it from."""
        device = getattr(self, "device", None)
        if self._buffers and device is not None:
            self._replace([x.to(device, non_blocking=True) for x in self._buffers])

    def reset(self) -> None:
        """Forget all tokens, and with them the size of the batch."""
        self._length = 0
        self._replace([])

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens.

        A positive number is how many are kept, as the first releases of transformers 5 mean it.

        Raises:
            ValueError: there are fewer.
        """
        length = tokens_to_remove + (self._length if tokens_to_remove <= 0 else 0)
        if not 0 <= length <= self._length:
            raise ValueError(
                f"tokens_to_remove must leave some of {self._length}, got {tokens_to_remove}"
            )
        self._look(length)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Element b of the batch becomes what element ``beam_idx[b]`` was."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each element of the batch ``repeats`` times, side by side."""
        self._replace([x.repeat_interleave(repeats, dim=0) for x in self._buffers])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the elements ``indices`` of the batch, int64 or a bool mask."""
        self._replace([x[indices.to(x.device)] for x in self._buffers])


class SketchCache(Cache):  # type: ignore[misc]
    """A cache for :func:`smartbird.hf.convert`-ed models, which ``generate`` takes as ``cache``.

    Beside keys and values it keeps their sketches, which other caches let be made anew for each
    token, and appends without copying what is there. ``generate`` gives what it gives with another
    cache or without, as far as the model's own projections round alike: libraries round one row
    otherwise than many, and where that changes a draw, what follows differs as after another draw.
    A quantised cache is another matter: keys, and so their sketches and draws, are those it rounds.

    Args:
        model: a converted model. Layers that stayed as they were get the cache that transformers
            gives them.
        max_length: make room for so many tokens at once; a text may grow beyond. None: room grows
            with the text, by a quarter, and is copied to.

    Raises:
        TypeError: ``max_length`` is no int.
        ValueError: the model has no converted module that is causal, or it has no ``layer_idx``;
            ``max_length`` is not positive.
    """

    def __init__(self, model: nn.Module, *, max_length: int | None = None) -> None:
        reserved = 0 if max_length is None else check_count("max_length", max_length, 1)
        layers = list(DynamicCache(config=model.config).layers)
        found = False
        for name, module in model.named_modules():
            converted = sketched(module)
            if converted is None or not converted.attention.is_causal:
                continue
            index = getattr(module, "layer_idx", None)
            if index is None or not 0 <= index < len(layers):
                raise ValueError(
                    f"model must have attention modules with a layer_idx below {len(layers)} to be "
                    f"cached, {name} has {index}"
                )
            layers[index] = SketchLayer(converted, reserved)
            found = True
        if not found:
            raise ValueError(
                "model must be converted by smartbird.hf.convert, and causal, to have a SketchCache"
            )
        super().__init__(layers=layers)
