"""Context parallelism: a sequence that is spread over ranks."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle

from smartbird._checks import (
    can_look,
    check_count,
    check_flag,
    check_inputs,
    check_keywords,
    check_seed,
    default_index_heads,
    shape_of,
)
from smartbird._library import build_info
from smartbird._visible import Visible, check_visible
from smartbird.distributed._call import EXCHANGES, ShardedCall
from smartbird.distributed._shards import Shards
from smartbird.functional import attend
from smartbird.nn import SampledAttention, SmartBirdAttention
from smartbird.ops._call import OPS

if TYPE_CHECKING:
    from typing_extensions import Unpack

LAYOUTS = ("head_tail", "contiguous")


class RowOptions(TypedDict, total=False):
    """The keywords of :meth:`ContextParallel.attention` about the rows of the whole sequence."""

    is_causal: bool
    key_mask: Tensor | None
    window: int
    num_sinks: int
    global_mask: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    sequence_ids: Tensor | None


class AttentionOptions(RowOptions, total=False):
    """The keywords of :meth:`ContextParallel.attention` but the last."""

    num_index_heads: int | None
    method: str
    correction: bool
    dropout_p: float
    scale: float | None
    sketch_scale: float | None
    seed: Tensor | None
    generator: torch.Generator | None


class ContextParallel(ParallelStyle):
    """Self-attention over a sequence of which every rank holds a part (context parallelism).

    Queries stay where they are: a rank draws the keys of its own queries from the sketches of all
    keys, which are gathered, and then attends to them by one of two exchanges.

    - ``"all_gather"``: keys and values of all tokens, a few heads at a time, those of the next
      heads while these are worked on. They are gathered again in the backward pass, not kept.
    - ``"ulysses"``: an all-to-all, after which a rank has all tokens of its share of the heads.
      The number of ranks must divide that of key/value heads and divide, or be divided by, that of
      index heads.
    - ``"auto"``: the one by which a rank receives fewer bytes in a forward pass.

    Whatever the number of ranks, keys drawn, inclusion probabilities, outputs and the gradient of
    queries are those of one process, on a CPU to the last bit. Gradients of keys, values and key
    sketches are sums over ranks and equal up to rounding. Random numbers are those of rank 0 of the
    group.

    As a style it changes a :class:`smartbird.SampledAttention` or
    :class:`smartbird.SmartBirdAttention`, which then takes this rank's tokens in place of all::

        cp = ContextParallel(mesh["cp"], length=tokens.shape[1])
        parallelize_module(model, mesh["cp"], {"layers.*.self_attn": cp})
        logits = model(cp.shard(tokens))

    A layer's sketch loss is the mean over the whole sequence, and the same on every rank; its
    gradient on a rank is the part of this rank's rows. So gradients must be **added up** over the
    ranks of the group, as they must where the training loss on a rank is a sum over its tokens,
    divided by the number of all. Where a wrapper takes their mean (DistributedDataParallel, FSDP2),
    multiply the training loss and ``loss_weight`` by the number of ranks: see docs/distributed.md.

    :meth:`attention` is the same as a function. What is said of rows, the masks of
    ``SampledAttention``, ``cu_seqlens_q``, ``cu_seqlens_k`` and ``sequence_ids``, is that of the
    whole sequence and the same on every rank.

    Not served, and refused by name: attention from one sequence to another of another length, what
    changes which tokens there are within a layer (``query_mask``, ``key_mask`` of
    ``SmartBirdAttention``, nested tensors), a ``query_offset``, a part of the heads
    (``first_head``), the route ``"value"``, and observers such as ``sketch_stats``.

    Args:
        mesh: a DeviceMesh of one dimension or a ProcessGroup. All of its ranks must make this, and
            make the same calls.
        length: tokens of the sequence.
        layout: ``"head_tail"``, a piece from the start and one from the end for every rank, which
            gives each the same work where attention is causal, or ``"contiguous"``.
        exchange: as above.

    Attributes:
        length: as above; where sequences differ, set it anew before :meth:`shard`, once the
            backward pass of the last is over.

    Raises:
        ValueError, TypeError: an argument that does not fit, by name.
    """

    def __init__(
        self,
        mesh: DeviceMesh | dist.ProcessGroup,
        length: int,
        *,
        layout: str = "head_tail",
        exchange: str = "auto",
    ) -> None:
        super().__init__()
        self.group = _group_of("mesh", mesh)
        if layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
        if exchange not in EXCHANGES:
            raise ValueError(f"exchange must be one of {', '.join(EXCHANGES)}, got {exchange!r}")
        self.layout, self.exchange = layout, exchange
        self.length = length
        self._ranks_agree = False

    @property
    def length(self) -> int:
        return self._shards.length

    @length.setter
    def length(self, length: int) -> None:
        length = check_count("length", length, 1)
        head_tail = self.layout == "head_tail"
        self._shards = Shards(self.group.rank(), self.group.size(), head_tail, length)

    # ---- tokens ----

    def shard(self, x: Tensor, dim: int = 1, *, fill: float = 0) -> Tensor:
        """This rank's part of ``x``, which has the tokens of the sequence in dimension ``dim``.

        Args:
            x: of any dtype, the same on every rank.
            fill: what stands in padding, where ranks cannot share the tokens evenly.

        Returns:
            ``x`` with as many tokens as every rank has in dimension ``dim``: see :meth:`positions`.

        Raises:
            ValueError: ``x`` has not ``length`` tokens.
        """
        self._check_tokens("x", x, dim, self.length)
        shards = self._shards
        x = x.movedim(dim, 0)
        padding = x.new_full((shards.size * shards.local - self.length, *x.shape[1:]), fill)
        mine = torch.cat([x, padding]).index_select(0, shards.rows(x.device))
        return mine.movedim(0, dim)

    def unshard(self, x: Tensor, dim: int = 1) -> Tensor:
        """The tokens of all ranks, from what :meth:`shard` gave or a model made of it.

        Differentiable: the gradient of a rank's part is added up over ranks.

        Raises:
            ValueError: ``x`` has not as many tokens as :meth:`shard` gives.
        """
        self._check_tokens("x", x, dim, self._shards.local)
        x = x.movedim(dim, 0)
        layout = (self.group.group_name, self.layout == "head_tail", self.length)
        whole: Tensor = OPS.gather_tokens(x.reshape(1, 1, x.shape[0], -1), *layout)
        return whole.view(self.length, *x.shape[1:]).movedim(0, dim)

    def positions(self, device: torch.device | str | None = None) -> Tensor:
        """int64 [tokens of a rank]: where this rank's tokens stand; padding, at ``length`` on."""
        return self._shards.rows(device)

    def _check_tokens(self, name: str, x: Tensor, dim: int, length: int) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(x).__name__}")
        if not -x.dim() <= dim < x.dim():
            raise ValueError(f"dim must be a dimension of {name} {shape_of(x)}, got {dim}")
        if x.shape[dim] != length:
            raise ValueError(
                f"{name} must have {length} tokens in dimension {dim}, by length={self.length} and "
                f"{self._shards.size} ranks, got {shape_of(x)}"
            )

    # ---- as a function ----

    @overload
    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_sketch: Tensor,
        k_sketch: Tensor,
        num_samples: int,
        *,
        return_indices: Literal[False] = ...,
        **options: Unpack[AttentionOptions],
    ) -> Tensor: ...
    @overload
    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_sketch: Tensor,
        k_sketch: Tensor,
        num_samples: int,
        *,
        return_indices: Literal[True],
        **options: Unpack[AttentionOptions],
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_sketch: Tensor,
        k_sketch: Tensor,
        num_samples: int,
        *,
        return_indices: bool,
        **options: Unpack[AttentionOptions],
    ) -> Tensor | tuple[Tensor, Tensor]: ...
    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_sketch: Tensor,
        k_sketch: Tensor,
        num_samples: int,
        *,
        return_indices: bool = False,
        **options: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """``smartbird.functional.smart_bird_attention`` of this rank's tokens.

        Args:
            q, k, v, q_sketch, k_sketch, num_samples: as there, with this rank's tokens for N and M.
            return_indices: also return the keys drawn.
            options: keywords as there, but query_offset, first_head and query_mask. Masks, [B,
                length], cu_seqlens_q, cu_seqlens_k and sequence_ids are those of the whole
                sequence, and the same on every rank; a seed as well, where it is given.

        Returns:
            [B, H, tokens of a rank, Dv], zeros in padding; with ``return_indices`` also the
            indices, int32 [B, H_i, tokens of a rank, K], of keys in the whole sequence, -1 in
            padding.

        Raises:
            ValueError, TypeError: an argument that does not fit, by name.
        """
        check_keywords("attention", options, AttentionOptions.__annotations__)
        return_indices = check_flag("return_indices", return_indices)
        q, k, v, q_sketch, k_sketch = check_inputs(q, k, v, q_sketch, k_sketch)
        rows = {name: options.pop(name) for name in RowOptions.__annotations__ if name in options}
        self.check_local("q", q, 2)
        self.check_local("k", k, 2)
        length = self.whole_length(rows)
        call = self.call(check_visible(q.shape[0], length, length, q.device, **rows))
        options.setdefault("method", "gumbel")
        if options.get("num_index_heads") is None:
            options["num_index_heads"] = default_index_heads(k.shape[1], q_sketch.shape[1])
        given, generator = options.pop("seed", None), options.pop("generator", None)
        seed = check_seed(given, q.device, generator)
        attended = attend(
            call.cut(q),
            k,
            v,
            call.cut(q_sketch),
            call.gather(k_sketch.detach()),
            num_samples,
            call.visible,
            seed=call.of_first_rank(seed) if given is None else seed,
            attend_keys=call.attend_to,
            need_indices=return_indices,
            **options,
        )
        out = call.fill(attended.out)
        if attended.indices is None or not return_indices:
            return out
        return out, call.fill(attended.indices, -1)

    # ---- as a style of layers ----

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        ranks = dist.get_process_group_ranks
        if ranks(_group_of("device_mesh", device_mesh)) != ranks(self.group):
            raise ValueError("device_mesh must be of the ranks that ContextParallel was made with")
        if isinstance(module, SmartBirdAttention):
            if "value" in module.learning:
                raise ValueError(
                    "learning must be without 'value' under ContextParallel, as a sketch's own "
                    f"attention goes over all keys, got {module.learning}"
                )
            module = module.core
        elif not isinstance(module, SampledAttention):
            raise TypeError(
                "ContextParallel must be applied to SampledAttention or SmartBirdAttention, got "
                f"{type(module).__name__}"
            )
        module.context = self
        return module

    def refuse(self, **given: Any) -> None:
        """Arguments of a layer that must be left out.

        Raises:
            ValueError: one is given, by name.
        """
        for name, value in given.items():
            if value is not None:
                raise ValueError(
                    f"{name} must be None under ContextParallel, where each rank has a part of the "
                    f"tokens, got {type(value).__name__}"
                )

    def check_local(self, name: str, x: Tensor, dim: int) -> None:
        """An argument of a layer must have this rank's tokens in dimension ``dim``.

        Raises:
            ValueError: it has others, by name.
        """
        self._check_tokens(name, x, dim, self._shards.local)

    def whole_length(self, rows: Mapping[str, Any]) -> int:
        """N and M of the whole sequence, for a call whose rows are told by these keywords.

        Raises:
            ValueError: they tell what is not served.
        """
        self.refuse(query_offset=rows.get("query_offset"))
        if rows.get("first_head", 0) != 0:
            raise ValueError(
                f"first_head must be 0 under ContextParallel, got {rows['first_head']}"
            )
        for name in ("cu_seqlens_q", "cu_seqlens_k"):
            cu_seqlens = rows.get(name)
            if not isinstance(cu_seqlens, Tensor) or not can_look(cu_seqlens):
                continue
            if cu_seqlens.numel() and int(cu_seqlens[-1]) != self.length:
                raise ValueError(
                    f"{name} must end at the length of the whole sequence, {self.length}, "
                    f"got {int(cu_seqlens[-1])}"
                )
        return self.length

    def call(self, whole: Visible) -> ShardedCall:
        """What a call does here whose queries see ``whole``, of the whole sequence."""
        self._check_ranks(whole.device)
        rows = self._shards.rows(whole.device)[: self._shards.real]
        return ShardedCall(
            self._shards, self.group.group_name, self.exchange, whole, rows, whole.at_rows(rows)
        )

    def _check_ranks(self, device: torch.device) -> None:
        """Refuse ranks that round differently or were told otherwise, on all, at the first call."""
        if self._ranks_agree or device.type != "cpu" or torch.compiler.is_compiling():
            return
        info = build_info()
        mine = (
            f"smartbird {info['version']}, SMARTBIRD_CPU_ISA={info['cpu_isa']}, "
            f"length={self.length}, layout={self.layout!r}, exchange={self.exchange!r}"
        )
        number, group = torch.tensor(zlib.crc32(mine.encode())), self.group.group_name
        differs = number != OPS.of_first_rank(number, group)
        if OPS.sum_of_ranks(differs.int(), group):
            raise RuntimeError(
                f"ranks must agree on what they are and know: rank {self.group.rank()} has {mine}"
            )
        self._ranks_agree = True

    def __deepcopy__(self, memo: dict[int, Any]) -> ContextParallel:
        return self  # a group cannot be copied


def _group_of(name: str, mesh: DeviceMesh | dist.ProcessGroup) -> dist.ProcessGroup:
    if isinstance(mesh, DeviceMesh):
        if mesh.ndim != 1:
            raise ValueError(f"{name} must have one dimension, got {mesh.ndim}: take mesh['cp']")
        group: dist.ProcessGroup = mesh.get_group()
        return group
    if not isinstance(mesh, dist.ProcessGroup):
        raise TypeError(f"{name} must be a DeviceMesh or a ProcessGroup, got {type(mesh).__name__}")
    return mesh
