"""SketchCache, and generation with it, with other caches and without."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hf_models import (
    CACHE,
    FEW,
    LENGTH,
    T,
    converted,
    generated,
    made,
    made_bart,
    near,
    out,
    tokens,
)
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, QuantizedCache

from smartbird import hf
from smartbird.hf.cache import LEAST_ROOM, SketchLayer

PROMPT = 24
SEARCHES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 2.0},
    "beams": {"num_beams": 3},
    "beam_sampling": {"num_beams": 3, "do_sample": True, "temperature": 2.0},
    "several": {"do_sample": True, "temperature": 2.0, "num_return_sequences": 2},
}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("min_length", [0, PROMPT + 4])
def test_generation_is_that_without_a_cache(name: str, search: str, min_length: int) -> None:
    model, ids = converted(name, min_length=min_length), tokens(2, PROMPT)
    options = SEARCHES[search]
    expected = generated(model, ids, use_cache=False, **options)
    assert torch.equal(generated(model, ids, hf.SketchCache(model), **options), expected)
    assert expected[:, PROMPT:].unique().numel() > 3


@pytest.mark.parametrize("name", ["mistral", "qwen2", "qwen3", "qwen2_mixed", "bert_decoder"])
def test_every_family_generates(name: str) -> None:
    model, ids = converted(name), tokens(2, PROMPT)
    expected = generated(model, ids, use_cache=False)
    assert torch.equal(generated(model, ids, hf.SketchCache(model)), expected)
    assert torch.equal(generated(model, ids), expected)


@pytest.mark.parametrize("min_length", [0, PROMPT + 4])
def test_assisted_generation_is_greedy(min_length: int) -> None:
    model, ids = converted("llama", min_length=min_length), tokens(1, 8).repeat(1, 3)
    expected = generated(model, ids, use_cache=False)
    assert torch.equal(
        generated(model, ids, hf.SketchCache(model), prompt_lookup_num_tokens=3), expected
    )
    helper = made("llama").double()  # whose guesses are right or wrong
    assert torch.equal(
        generated(model, ids, hf.SketchCache(model), assistant_model=helper), expected
    )


@pytest.mark.parametrize("name", ["llama", "qwen2_mixed"])
@pytest.mark.parametrize("min_length", [0, PROMPT + 4])
def test_other_caches_give_the_same(name: str, min_length: int) -> None:
    model, ids = converted(name, min_length=min_length), tokens(2, PROMPT)
    expected = generated(model, ids, use_cache=False)
    assert torch.equal(generated(model, ids), expected)
    assert torch.equal(generated(model, ids, cache_implementation="static"), expected)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    expected = generated(model, ids, use_cache=False, attention_mask=mask)
    static = {"cache_implementation": "static"}
    for cache, options in ((None, {}), (None, static), (hf.SketchCache(model), {})):
        actual = generated(model, ids, cache, attention_mask=mask, **options)
        assert torch.equal(actual, expected)


class OneStream:
    """Stands for a CUDA stream, where all is done in order."""

    def __enter__(self) -> None: ...
    def __exit__(self, *error: object) -> None: ...
    def wait_stream(self, other: OneStream) -> None: ...


@pytest.mark.parametrize("implementation", ["offloaded", "offloaded_static"])
def test_offloaded_caches_give_the_same(
    monkeypatch: pytest.MonkeyPatch, implementation: str
) -> None:
    model, ids = converted("llama"), tokens(2, PROMPT)
    expected = generated(model, ids, use_cache=False)
    monkeypatch.setattr(torch, "Stream", OneStream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: OneStream())
    assert torch.equal(generated(model, ids, cache_implementation=implementation), expected)


@pytest.mark.parametrize("search", ["greedy", "beams"])
def test_quantised_caches_give_what_they_give_dense_attention(search: str) -> None:
    """Sketches are of the keys that it gives, as rounded as they are."""
    model, ids = converted("llama", num_samples=64), tokens(2, PROMPT)

    def quantised() -> Tensor:
        try:
            cache = QuantizedCache("fp8", model.config)
        except ValueError:
            pytest.skip("this transformers rounds by packages that are not installed only")
        return generated(model, ids, cache, **SEARCHES[search])

    actual = quantised()
    assert not torch.equal(actual, generated(model, ids, **SEARCHES[search]))
    with hf.dense(model):
        assert torch.equal(actual, quantised())


def test_dense_layers_beside_sampled_ones_see_no_empty_places() -> None:
    """A static cache counts in a tensor that it changes before they ask for their mask."""
    model, ids = converted("llama", layers=[1]), tokens(2, PROMPT)
    options = {"return_dict_in_generate": True, "output_logits": True}
    expected = generated(model, ids, use_cache=False, **options).logits
    static = generated(model, ids, cache_implementation="static", **options).logits
    near(torch.stack(static), torch.stack(expected))


def test_left_padding_generates_what_each_does_alone() -> None:
    model, ids, pad = converted("llama"), tokens(2, PROMPT), 9
    mask = torch.ones_like(ids)
    mask[0, :pad] = 0
    both = generated(model, ids, hf.SketchCache(model), attention_mask=mask)
    alone = generated(model, ids[:1, pad:], hf.SketchCache(model))
    assert torch.equal(both[0, PROMPT:], alone[0, PROMPT - pad :])


@pytest.mark.skipif(
    T.__version__.startswith("5.0."), reason="its chunks stand a place further than its cache says"
)
def test_prefill_in_chunks() -> None:
    model, ids = converted("llama"), tokens(2, PROMPT)
    expected = generated(model, ids, use_cache=False)
    cache = hf.SketchCache(model)
    assert torch.equal(generated(model, ids, cache, prefill_chunk_size=7), expected)


def test_a_decoder_with_an_encoder() -> None:
    bart, ids = hf.convert(made_bart().double(), **FEW), tokens(2, PROMPT)
    expected = generated(bart, ids, use_cache=False)
    cache = EncoderDecoderCache(hf.SketchCache(bart), DynamicCache(config=bart.config))
    assert torch.equal(generated(bart, ids, cache), expected)


def test_a_conversation_goes_on() -> None:
    model, ids, more = converted("llama"), tokens(1, PROMPT), tokens(1, 6, seed=3)
    cache = hf.SketchCache(model)
    first = torch.cat([generated(model, ids, cache), more], dim=1)
    expected = generated(model, first, use_cache=False)
    assert torch.equal(generated(model, first, cache), expected)


def test_dense_generation_takes_the_cache_too() -> None:
    model, ids = made("llama").double(), tokens(2, PROMPT)
    expected = generated(model, ids)
    hf.convert(model, **FEW)
    cache = hf.SketchCache(model)
    with hf.dense(model):
        assert torch.equal(generated(model, ids, cache), expected)
    more = tokens(2, 3, seed=4)
    sparse = out(model, more, **{CACHE: cache}, use_cache=True)
    assert sparse.isfinite().all()


# ---- what the cache does to its tensors ---------------------------------------------------------


def filled(model: Any, ids: Tensor) -> tuple[hf.SketchCache, DynamicCache]:
    """A SketchCache and a DynamicCache that have read the tokens."""
    caches = hf.SketchCache(model), DynamicCache(config=model.config)
    for cache in caches:
        out(model, ids, **{CACHE: cache}, use_cache=True)
    return caches


def check_alike(model: Any, cache: hf.SketchCache, other: DynamicCache, ids: Tensor) -> None:
    """Equal content, its sketches are those of its keys, and so is what the model goes on with."""
    for index, (layer, expected) in enumerate(zip(cache.layers, other.layers, strict=True)):
        near(layer.keys, expected.keys)
        near(layer.values, expected.values)
        assert layer.get_seq_length() == expected.get_seq_length()
        child = model.model.layers[index].self_attn.smartbird
        near(layer.sketches, child.sketch_keys(layer.keys))
    ours = out(model, ids, **{CACHE: cache}, use_cache=True)
    near(ours, out(model, ids, **{CACHE: other}, use_cache=True))


OPERATIONS: dict[str, Any] = {
    "crop": lambda cache: cache.crop(-7),
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])),
    "repeat": lambda cache: cache.batch_repeat_interleave(2),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([2, 1])),
    "select_by_mask": lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])),
    "offload": lambda cache: [layer.offload() for layer in cache.layers],
    "there_and_back": lambda cache: [
        move() for layer in cache.layers for move in (layer.offload, layer.prefetch)
    ],
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_sketches_go_with_their_keys(operation: str) -> None:
    model = converted("llama")
    cache, other = filled(model, tokens(3, LENGTH))
    for each in (cache, other):
        OPERATIONS[operation](each)
    rows = other.layers[0].keys.shape[0]
    check_alike(model, cache, other, tokens(rows, 5, seed=3))


def test_reset_takes_another_batch() -> None:
    model = converted("llama")
    cache, _ = filled(model, tokens(3, LENGTH))
    cache.reset()
    assert cache.get_seq_length() == 0
    ids = tokens(1, LENGTH, seed=3)
    near(out(model, ids, **{CACHE: cache}, use_cache=True), out(model, ids))


def a_layer(max_length: int = 0) -> SketchLayer:
    return SketchLayer(converted("llama").model.layers[0].self_attn.smartbird, max_length)


def states(length: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(1, 2, length, 8), torch.zeros(1, 2, length, 8)


def copied(layer: SketchLayer, length: int) -> int:
    """How many tokens are copied to new buffers while so many are appended, one by one."""
    total = 0
    place = None
    for count in range(length):
        keys, _ = layer.update(*states(1))
        if keys.data_ptr() != place:
            total, place = total + count, keys.data_ptr()
    assert layer.get_seq_length() == length
    return total


def test_the_copies_of_a_token_are_bounded_in_the_mean() -> None:
    """So the time of a token does not grow with those before it, but for reading them."""
    for length in (10 * LEAST_ROOM, 40 * LEAST_ROOM):
        assert copied(a_layer(), length) <= 5 * length


def test_room_for_all_is_made_once() -> None:
    layer = a_layer(10 * LEAST_ROOM)
    assert copied(layer, 10 * LEAST_ROOM) == 0
    place = layer.update(*states(1))[0].data_ptr()  # there is no more, so it grows as others do
    assert layer.update(*states(LEAST_ROOM))[0].data_ptr() == place
    cache = hf.SketchCache(converted("llama"), max_length=7)
    assert [layer.max_length for layer in cache.layers] == [7, 7]


@pytest.mark.parametrize("length", [1024, 1000, 300])
def test_room_is_little_more_than_what_is_held(length: int) -> None:
    layer = a_layer()
    layer.update(*states(length))
    for _ in range(100):
        keys, values = layer.update(*states(1))
        assert layer.sketches is not None
        parts = (keys, values, layer.sketches)
        held = sum(x.nbytes for x in parts)
        allocated = sum(x.untyped_storage().nbytes() for x in parts)
        assert held <= allocated < 1.5 * held


def test_views_stay_what_they_were() -> None:
    layer = a_layer()
    first, _ = layer.update(torch.ones(1, 2, 3, 8), torch.ones(1, 2, 3, 8))
    layer.update(torch.zeros(1, 2, 200, 8), torch.zeros(1, 2, 200, 8))
    assert first.shape == (1, 2, 3, 8)
    assert (first == 1).all()


@pytest.mark.skipif(CACHE != "cache", reason="this transformers hands caches no keyword arguments")
def test_sketches_are_not_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, made_of = converted("llama"), []
    cache = hf.SketchCache(model)
    out(model, tokens(2, LENGTH), **{CACHE: cache}, use_cache=True)
    sketch_keys = hf.SketchedAttention.sketch_keys

    def count(self: hf.SketchedAttention, k: Tensor) -> Tensor:
        made_of.append(k.shape[2])
        return sketch_keys(self, k)

    monkeypatch.setattr(hf.SketchedAttention, "sketch_keys", count)
    out(model, tokens(2, 1), **{CACHE: cache}, use_cache=True)
    assert made_of == [1, 1]


def test_what_a_cache_cannot_do_is_an_error() -> None:
    model, ids = converted("llama"), tokens(2, LENGTH)
    cache, _ = filled(model, ids)
    with pytest.raises(ValueError, match="the batch of a SketchCache must stay 2, got 1"):
        out(model, ids[:1], **{CACHE: cache}, use_cache=True)
    for tokens_to_remove in (-41, 41):
        with pytest.raises(ValueError, match="tokens_to_remove must leave some of 40"):
            cache.crop(tokens_to_remove)
    with pytest.raises(ValueError, match=r"model must be converted .* and causal"):
        hf.SketchCache(converted("bert"))
    with pytest.raises(ValueError, match="max_length must be at least 1"):
        hf.SketchCache(model, max_length=0)
    with pytest.raises(ValueError, match="SketchCache keeps no gradients"):
        model(ids, **{CACHE: hf.SketchCache(model)}, use_cache=True)


def test_a_cache_of_other_sketches_is_refused() -> None:
    model, ids = hf.convert(made("llama"), **FEW), tokens(1, LENGTH)
    cache = hf.SketchCache(model)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        model(ids[:, :1], past_key_values=copy.deepcopy(cache))
        hf.convert(model, **FEW | {"calibration": tokens(1, LENGTH, seed=5)})
        with pytest.raises(ValueError, match="past_key_values must be a SketchCache that"):
            model(ids[:, :1], past_key_values=cache)
