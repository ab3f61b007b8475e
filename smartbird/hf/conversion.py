"""convert and its way back: which attention modules of a model sample their keys."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from smartbird._checks import check_count, check_scale
from smartbird.functional import attend_densely
from smartbird.hf.attention import (
    CHILD,
    NAMES,
    SketchedAttention,
    beside,
    observers,
    sketched,
    unknown_keywords,
)
from smartbird.hf.mask import RowMask
from smartbird.hf.sketches import Moments, leading_directions, rotary_pairs
from smartbird.nn import SampledAttention, SketchStats, seed_evaluation, sketch_stats

RECORD = "_smartbird"  # the attribute of a converted model that remembers what it was
SKETCHES = ("layer", "kv", "head")
PASSAGE = 256  # tokens of the passage that is made where none is given
JUDGED = 64  # queries of a sequence that a report is about

Model = TypeVar("Model", bound=nn.Module)
Batch = Tensor | Mapping[str, Any]  # tokens, or keywords of the base model


@dataclass(frozen=True)
class LayerReport:
    """What became of one attention module.

    The numbers are of a batch, where :func:`report` was given one, and of its queries that sample
    their keys: 64 of each sequence, spread evenly. Without a batch they are None.

    Attributes:
        name: of the module in the model.
        sampled: it samples its keys.
        reason: why it does not; empty if it does.
        mass: of dense attention that the keys of a query hold, the mean of heads and queries.
        error: of the output against dense attention of the same q, k and v: the norm of the
            difference over the norm of the dense output.
        loss: of the sketches, see :func:`smartbird.ops.distill_loss`.
        floor: the least that the loss can be.
    """

    name: str
    sampled: bool
    reason: str = ""
    mass: float | None = None
    error: float | None = None
    loss: float | None = None
    floor: float | None = None

    def __str__(self) -> str:
        if not self.sampled:
            return f"{self.name}: dense, {self.reason}"
        if self.mass is None or self.loss is None or self.floor is None:
            return f"{self.name}: sampled"
        return (
            f"{self.name}: sampled, mass {self.mass:.3f}, error {self.error:.3f}, "
            f"loss {self.loss - self.floor:.3f} above its floor"
        )


@dataclass(frozen=True)
class _Record:
    """What a converted model remembers.

    Attributes:
        before: its configurations, and the attention implementation that each had.
        layers: what :func:`report` says.
        settings: the keywords of :func:`convert` but the last.
        hooks: to be removed.
        in_dense: within :func:`dense`.
    """

    before: list[tuple[Any, str]]
    layers: list[LayerReport]
    settings: dict[str, Any]
    hooks: list[Any] = field(default_factory=list)
    in_dense: bool = False


@dataclass
class _Seen:
    """What one attention module was seen to do with the passage."""

    module: nn.Module
    like: Tensor  # has the dtype and the device of q
    heads: int
    kv_heads: int
    width: int
    is_causal: bool
    scaling: float
    reason: str
    moments: Moments
    rotates: Tensor | None  # some of the cosines of its rotary embedding, [..., R]


def convert(
    model: Model,
    *,
    num_samples: int = 256,
    num_sketches: str = "head",
    sketch_dim: int = 16,
    method: str = "systematic",
    correction: bool = True,
    window: int = 32,
    num_sinks: int = 4,
    layers: Collection[int] | None = None,
    min_length: int | None = None,
    calibration: Tensor | None = None,
) -> Model:
    """Let the attention of a pretrained transformers model sample its keys, in place.

    The model reads a passage once. Attention modules that call transformers' attention interface
    for self-attention, causal or not, get sketches of their own queries and keys: in rotary models
    the ``sketch_dim / 2`` rotary pairs that vary q . k most, in others the leading directions of
    q . k. The child ``smartbird`` of the module, a :class:`SketchedAttention`, makes them. Its
    weights are parameters of the model that want no gradient. Modules that do anything else
    (sliding windows, soft caps, attention sinks, relative biases, cross-attention) stay as they
    are; :func:`report` says why. A call that a converted module cannot serve, such as one with a
    mask of pairs or with ``output_attentions``, is an error.

    A model in evaluation mode gives the same result for the same sequence however it is computed:
    alone, padded, packed, in chunks or token by token, but for the rounding of its projections: see
    :class:`SketchCache`. What a position does depends on the
    position alone, so that a text that grows beyond ``min_length`` changes nothing before it. In
    training mode keys are drawn by PyTorch's generator. Packed sequences are told apart as
    transformers does, by ``position_ids`` that restart where there is neither a mask nor a cache
    (``use_cache=False``), and by ``cu_seq_lens_q``.

    Decoding with a ``StaticCache`` is one graph under ``torch.compile``, as ``generate`` does by
    itself on a GPU. A batch with padding copies the cache there, and sketches of all its places are
    made for each token: :class:`SketchCache` keeps them, in eager mode.

    Converted again, a model takes the settings of the last call, where an argument that is not
    given is its default. Sketches of the size asked for stay unless ``calibration`` is given, and
    their evaluation seed with them; a passage is read only for that or for another ``sketch_dim``
    or ``layers``. If that fails, the model stays as it was. ``save_pretrained`` writes the model
    that it was before, and beside it the sketches, as :func:`smartbird.hf.save` does.

    Args:
        model: a ``transformers.PreTrainedModel``.
        num_samples: K, how many keys a query and set of draws holds.
        num_sketches: ``"head"``, queries have a sketch for each head; ``"kv"``, one for each
            key/value head, whose heads then share the keys drawn: cheaper, and less exact.
            ``"layer"``, queries and keys have one for all heads: cheapest, and far less exact.
        sketch_dim: S, features of a sketch; even for rotary models.
        method: how keys are drawn, see :func:`smartbird.ops.sketch_sample`.
        correction: estimate dense attention from the sample, see
            :func:`smartbird.functional.smart_bird_attention`.
        window: keys nearest a query that are always among its K.
        num_sinks: leading keys that are always among the K.
        layers: ``layer_idx`` of the modules to convert. None: all that can be.
        min_length: positions below it attend to all their keys; in models without causality
            sequences that are shorter do. None: K, below which they hold all keys anyhow.
        calibration: int64 [B, N], tokens of a passage or two of text that the model is for, without
            padding. None: random tokens.

    Returns:
        ``model``.

    Raises:
        TypeError: an argument of another type.
        ValueError: an argument out of its range, or no attention module that can be converted.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a PreTrainedModel, got {type(model).__name__}")
    if num_sketches not in SKETCHES:
        raise ValueError(f"num_sketches must be one of {SKETCHES}, got {num_sketches!r}")
    sketch_dim = check_count("sketch_dim", sketch_dim, 1)
    if layers is not None:
        layers = {check_count("layers", index, 0) for index in layers}
    sampling: dict[str, Any] = {
        "num_samples": num_samples,
        "method": method,
        "correction": correction,
        "window": window,
        "num_sinks": num_sinks,
    }
    checked = SampledAttention(1, is_causal=True, **sampling)
    sampling = {name: getattr(checked, name) for name in sampling}
    if min_length is None:
        min_length = checked.num_samples
    min_length = check_count("min_length", min_length, 0)

    settings = {
        **sampling,
        "num_sketches": num_sketches,
        "sketch_dim": sketch_dim,
        "layers": None if layers is None else sorted(layers),
        "min_length": min_length,
    }
    old = dict(children(model))
    old_record: _Record | None = getattr(model, RECORD, None)
    in_dense = old_record is not None and old_record.in_dense
    in_use = in_dense or samples(model)  # the caller may have set another attention since
    if old_record is not None and in_use and calibration is None:
        changed = {name for name in settings if settings[name] != old_record.settings[name]}
        if not changed & {"sketch_dim", "layers"} and all(
            _keeps(child, num_sketches) for child in old.values()
        ):
            for child in old.values() if changed else ():
                child.set_sampling(sampling, num_sketches=num_sketches, min_length=min_length)
            setattr(model, RECORD, replace(old_record, settings=settings))
            return model
    passage = _passage(model) if calibration is None else _check_tokens("calibration", calibration)
    entry = _implementations(model)
    revert(model)
    before = _implementations(model)
    now = model.config._attn_implementation
    native = "eager" if now == "eager" or not model._supports_sdpa else "sdpa"
    model.set_attn_implementation(NAMES[native])
    try:
        seen = _observe(model, passage, num_sinks)
        _choose(seen, layers)
        made = {
            name: SketchedAttention(
                *_weights(
                    one, sketch_dim, num_sketches, old.get(name) if calibration is None else None
                ),
                SketchedAttention.core(
                    one.heads,
                    one.kv_heads,
                    is_causal=one.is_causal,
                    scale=one.scaling,
                    sampling=sampling,
                ),
                num_sketches=num_sketches,
                min_length=min_length,
            )
            for name, one in seen.items()
            if not one.reason
        }
        reports = [LayerReport(name, name in made, one.reason) for name, one in seen.items()]
        if not made:
            why = "; ".join(map(str, reports)) or (
                f"the attention of {type(model).__name__} does not go through transformers' "
                "attention interface"
            )
            raise ValueError(f"model must have attention that can be converted: {why}")
    except BaseException:
        if old_record is None:
            _restore(before)
        else:
            _attach(model, old, replace(old_record, before=before))
            _restore(entry)
        raise
    _attach(model, made, _Record(before, reports, settings, in_dense=in_dense))
    if in_dense:
        _restore(before)
    seed_evaluation(model, 0)  # or all layers would draw alike
    return model


def children(model: nn.Module) -> Iterator[tuple[str, SketchedAttention]]:
    """The names of converted modules, and what converts them."""
    for name, module in model.named_modules():
        if (child := sketched(module)) is not None:
            yield name, child


def _attach(model: nn.Module, made: dict[str, SketchedAttention], record: _Record) -> None:
    """Make a model whose configurations are set a converted one."""
    for name, child in made.items():
        module = model.get_submodule(name)
        module.add_module(CHILD, child.train(module.training))
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    hooks = [part.register_forward_pre_hook(_refuse_weights, with_kwargs=True) for part in parts]
    for part in parts:
        # Of the instance. A copy of the model, by pickle too, has one of its own.
        vars(part)["save_pretrained"] = partial(_save_pretrained, part)
    setattr(model, RECORD, replace(record, hooks=hooks))


def revert(model: Model) -> Model:
    """Undo :func:`convert`, in place; a model that is not converted stays as it is.

    Its sketches are gone, the rest is what it was.

    Returns:
        ``model``.
    """
    record = getattr(model, RECORD, None)
    if record is None:
        return model
    for name, _ in list(children(model)):
        delattr(model.get_submodule(name), CHILD)
    for hook in record.hooks:
        hook.remove()
    for part in model.modules():
        vars(part).pop("save_pretrained", None)
    _restore(record.before)
    delattr(model, RECORD)
    return model


@contextmanager
def dense(model: nn.Module) -> Iterator[None]:
    """Within ``with dense(model):`` a converted model computes what it did before.

    Raises:
        ValueError: ``model`` is not converted.
    """
    record = record_of(model)
    now = [(config, config._attn_implementation) for config, _ in record.before]
    setattr(model, RECORD, replace(record, in_dense=True))
    _restore(record.before)
    try:
        yield
    finally:
        if hasattr(model, RECORD):  # another record, if the model was converted again
            _restore(now)
            setattr(model, RECORD, replace(record_of(model), in_dense=record.in_dense))


def report(model: nn.Module, batch: Batch | None = None) -> list[LayerReport]:
    """Which attention modules of a converted model sample their keys, and why others do not.

    With a batch the model reads it as it is, in evaluation mode, and each module that samples is
    compared with dense attention of the queries, keys and values that it meets. Modules that were
    not called while :func:`convert` let the model read a passage are not told.

    Args:
        model: converted.
        batch: int64 [B, N], or a mapping to what the base model takes by name, as
            :func:`smartbird.hf.distil` reads. None: nothing is measured.

    Returns:
        One of each module. Where no query of the batch samples its keys, as sequences are shorter
        than ``min_length``, they hold all: mass 1, error, loss and floor 0.

    Raises:
        ValueError: ``model`` is not converted, or attends densely for now.
        TypeError: ``batch`` is neither.
    """
    layers = record_of(model).layers
    if batch is None:
        return list(layers)
    check_samples(model)
    errors: dict[str, list[float]] = {}
    cores = {name: child.attention for name, child in children(model)}
    hooks = [
        core.register_forward_hook(
            partial(_compare, errors.setdefault(name, [0.0, 0.0])), with_kwargs=True
        )
        for name, core in cores.items()
    ]
    try:
        with sketch_stats(model, rows=JUDGED) as stats:
            read(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    measured: dict[str, dict[str, Any]] = {}
    for name, (difference, norm) in errors.items():
        one = stats.get(f"{name}.{CHILD}.attention", SketchStats(mass=1.0))
        error = math.sqrt(difference / norm) if norm > 0 else 0.0
        measured[name] = {"mass": one.mass, "error": error, "loss": one.loss, "floor": one.floor}
    return [replace(layer, **measured.get(layer.name, {})) for layer in layers]


@torch.no_grad()
def _compare(
    sums: list[float],
    core: SampledAttention,
    args: tuple[Tensor, ...],
    keywords: dict[str, Any],
    out: Tensor,
) -> None:
    """Add the squared norms of what a call misses of dense attention, and of that, to ``sums``."""
    q, k, v = (x.float() for x in args[:3])
    rows = torch.linspace(0, q.shape[2] - 1, min(JUDGED, q.shape[2]), device=q.device).long()
    visible = core.visible(q.shape[0], q.shape[2], k.shape[2], q.device, **keywords).at_rows(rows)
    dense = attend_densely(q.index_select(2, rows), k, v, visible, scale=core.scale)
    sums[0] += float((out.index_select(2, rows) - dense).square().sum())
    sums[1] += float(dense.square().sum())


def record_of(model: nn.Module) -> _Record:
    """What a converted model remembers, which others do not."""
    record = getattr(model, RECORD, None)
    if not isinstance(record, _Record):
        raise ValueError(
            "model must be converted by smartbird.hf.convert, got a "
            f"{type(model).__name__} that is not"
        )
    return record


# ---- the configurations -------------------------------------------------------------------------


def samples(model: Any) -> bool:
    """Whether the attention of a converted model is that of smartbird for now."""
    return model.config._attn_implementation in NAMES.values()


def check_samples(model: Any) -> None:
    """Refuse a converted model that attends densely for now."""
    if not samples(model):
        raise ValueError(
            "model must sample its keys, but its attention is set to "
            f"{model.config._attn_implementation!r}: within smartbird.hf.dense or by its caller"
        )


def _implementations(model: nn.Module) -> list[tuple[Any, str]]:
    return [(config, config._attn_implementation) for config in _configs(model)]


def _configs(model: nn.Module) -> list[Any]:
    """Of the model and all that it is made of, each once, a whole before its parts."""
    found: dict[int, Any] = {}
    waiting = [part.config for part in model.modules() if isinstance(part, PreTrainedModel)]
    while waiting:
        config = waiting.pop(0)
        if id(config) not in found:
            found[id(config)] = config
            parts = (getattr(config, name, None) for name in config.sub_configs)
            waiting += [part for part in parts if part is not None]
    return list(found.values())


def _restore(before: list[tuple[Any, str]]) -> None:
    for config, implementation in before:
        config._attn_implementation = implementation


def _refuse_weights(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    if keywords.get("output_attentions", getattr(module.config, "output_attentions", False)):
        raise ValueError(
            "output_attentions must be False: attention over sampled keys gives no weights of all "
            "pairs, see smartbird.hf.revert"
        )


def _save_pretrained(model: Any, *args: Any, **keywords: Any) -> None:
    """``save_pretrained`` of a converted model: what it was before, and its sketches beside it."""
    from smartbird.hf.files import write  # which needs this module

    original = type(model).save_pretrained
    given = inspect.signature(original).bind(model, *args, **keywords).arguments
    if given.get("push_to_hub"):
        raise ValueError(
            "push_to_hub must be False, as the sketches would stay behind: see model.push_to_hub"
        )
    told = "smartbird.hf.load brings back the sketches, which are beside it"
    if not hasattr(model, RECORD):
        told = "the sketches of a part of a model are not written, smartbird.hf.save writes them"
    elif given.get("is_main_process", True):
        try:
            # Where parameters are spread over processes, the caller has gathered them.
            write(model, given["save_directory"], given.get("state_dict") or model.state_dict())
        except ValueError as error:  # of weights that are not here
            told = f"the sketches are not written, as {error}"
    warnings.warn(
        f"from_pretrained loads what save_pretrained writes as a dense model: {told}", stacklevel=2
    )
    ignored = model._keys_to_ignore_on_save
    sketches = {
        f"{name}.{CHILD}.{part}" for name, child in children(model) for part in child.state_dict()
    }
    model._keys_to_ignore_on_save = sketches | set(ignored or ())
    try:
        original(model, *args, **keywords)
    finally:
        model._keys_to_ignore_on_save = ignored


# ---- the passage --------------------------------------------------------------------------------


def _passage(model: nn.Module) -> Tensor:
    """Tokens that follow from the model alone, int64 [1, N]."""
    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    most = getattr(model.config, "max_position_embeddings", None) or 2 * PASSAGE
    length = max(min(PASSAGE, most // 2), 1)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (1, length), generator=generator)


def _check_tokens(name: str, tokens: Tensor) -> Tensor:
    if not isinstance(tokens, Tensor) or tokens.dtype != torch.int64:
        kind = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
        raise TypeError(f"{name} must be an int64 Tensor, got {kind}")
    if tokens.dim() != 2 or tokens.numel() == 0:
        raise ValueError(f"{name} must be [B, N] with at least one token, got {list(tokens.shape)}")
    return tokens


def _observe(model: Any, passage: Tensor, num_sinks: int) -> dict[str, _Seen]:
    """What each attention module does while the model reads the passage, in their order."""
    names = {id(module): name for name, module in model.named_modules()}
    given: dict[int, dict[str, Any]] = {}
    seen: dict[str, _Seen] = {}

    def look(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        bound = inspect.signature(module.forward).bind_partial(*args, **keywords).arguments
        given[id(module)] = keywords | bound

    def observe(
        module: nn.Module, q: Tensor, k: Tensor, mask: Any, keywords: dict[str, Any]
    ) -> None:
        if id(module) not in names:  # of another model, in another thread
            return
        arguments = given.get(id(module), {})
        cos = (arguments.get("position_embeddings") or [None])[0]
        one = seen.setdefault(
            names[id(module)],
            _Seen(
                module,
                like=q.new_empty(0),
                heads=q.shape[1],
                kv_heads=k.shape[1],
                width=q.shape[3],
                is_causal=isinstance(mask, RowMask) and mask.is_causal,
                scaling=check_scale("scaling", keywords.pop("scaling"), q.shape[3]),
                reason="",
                moments=Moments(),
                rotates=cos.flatten(0, -2)[:1] if isinstance(cos, Tensor) else None,
            ),
        )
        one.reason = one.reason or _reason(mask, arguments, keywords)
        if not one.reason:
            # Sinks are held by every row, so sketches need not find them.
            one.moments.add(q, k[:, :, num_sinks:] if k.shape[2] > num_sinks else k)

    hooks = [
        module.register_forward_pre_hook(look, with_kwargs=True)
        for module in model.modules()
        if hasattr(module, "config") and not isinstance(module, PreTrainedModel)
    ]
    observers.append(observe)
    try:
        read(model, passage)
    finally:
        observers.remove(observe)
        for hook in hooks:
            hook.remove()
    return seen


@torch.no_grad()
def read(model: Any, batch: Batch) -> None:
    """Let a model read a batch in evaluation mode, without its head and without a cache."""
    inputs = batch if isinstance(batch, Mapping) else {"input_ids": _check_tokens("batch", batch)}
    embedding = model.get_input_embeddings().weight
    # Where it is offloaded, what brings it back moves the inputs too.
    device = None if embedding.is_meta else embedding.device
    given = {
        name: x.to(device) if isinstance(x, Tensor) else x
        for name, x in inputs.items()
        if name != "labels"
    }
    if model.config.is_encoder_decoder:
        given.setdefault("decoder_input_ids", given["input_ids"])
    if "use_cache" in inspect.signature(model.base_model.forward).parameters:
        given["use_cache"] = False
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        model.base_model(**given)
    finally:
        for module in training:
            module.training = True


def _reason(mask: Any, arguments: dict[str, Any], keywords: dict[str, Any]) -> str:
    """Why an attention module that was called so cannot sample its keys; empty if it can."""
    for name in ("encoder_hidden_states", "key_value_states"):
        if arguments.get(name) is not None:
            return "it attends to another sequence"
    if unknown := unknown_keywords(keywords):
        return f"it is called with {', '.join(unknown)}"
    if not isinstance(mask, RowMask):
        return "its mask does not come from transformers' mask functions"
    return mask.reason or ""


def _choose(seen: dict[str, _Seen], layers: Collection[int] | None) -> None:
    """Leave out modules of other layers; those without a ``layer_idx`` are numbered in order.

    Raises:
        ValueError: there is no such layer.
    """
    if layers is None:
        return
    number: list[int] = []
    for place, one in enumerate(seen.values()):
        index = getattr(one.module, "layer_idx", None)
        number.append(place if index is None else index)
    if missing := sorted(set(layers) - set(number)):
        raise ValueError(f"layers must be among {sorted(set(number))}, got {missing}")
    for one, index in zip(seen.values(), number, strict=True):
        if index not in layers:
            one.reason = one.reason or "it is not among the layers to convert"


def _keeps(old: SketchedAttention, num_sketches: str) -> bool:
    """Whether sketches serve so many as well: those of a whole layer lie otherwise."""
    return (old.num_sketches == "layer") == (num_sketches == "layer")


def _weights(
    one: _Seen, sketch_dim: int, num_sketches: str, old: SketchedAttention | None
) -> tuple[Tensor, Tensor]:
    """q_weight [H, D, S] and k_weight [H_kv, D, S], those of ``old`` if they serve."""
    if sketch_dim > one.width:
        raise ValueError(f"sketch_dim must be at most the head dim, {one.width}, got {sketch_dim}")
    shape = (one.heads, one.width, sketch_dim)
    if old is not None and old.q_weight.shape == shape and _keeps(old, num_sketches):
        return old.q_weight.detach(), old.k_weight.detach()
    partner = None if one.rotates is None else _partners(one.module, one.width, one.rotates)
    together = num_sketches == "layer"
    if partner is None:
        weights = leading_directions(one.moments, sketch_dim, together=together)
    elif sketch_dim % 2:
        raise ValueError(f"sketch_dim must be even with rotary embedding, got {sketch_dim}")
    else:
        weights = rotary_pairs(one.moments, partner, sketch_dim, together=together)
    return weights[0].to(one.like), weights[1].to(one.like)


def _partners(module: nn.Module, width: int, cos: Tensor) -> Tensor | None:
    """int64 [D]: which feature each one is turned with; None: they are not turned in pairs.

    Asks the model: the function beside its attention turns unit vectors by a right angle. Features
    that it leaves alone make pairs among themselves.
    """
    turn = beside(module, "apply_rotary_pos_emb")
    for features in (width, cos.shape[-1]):  # the second where the module splits q and k itself
        unit = torch.eye(features, dtype=cos.dtype, device=cos.device)[None, None]
        angle = cos.new_zeros((1, features, cos.shape[-1]))
        try:
            turned = turn(unit, unit, angle, angle + 1)[0][0, 0]
        except (RuntimeError, TypeError):  # another width, or no such function
            continue
        partner = torch.arange(width)
        partner[:features] = turned.abs().argmax(-1)
        alone = (partner == torch.arange(width)).nonzero().squeeze(-1)
        if alone.numel() % 2 == 0:
            partner[alone] = torch.unflatten(alone, 0, (-1, 2)).flip(-1).flatten()
        mutual = torch.equal(partner[partner], torch.arange(width))
        if mutual and not (partner == torch.arange(width)).any():
            return partner
    return None
