"""torch.compile of a decoder with a static cache: one graph, which gives what eager mode gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hf_models import CACHE, converted, generated, near, out, tokens
from torch import Tensor
from transformers import CompileConfig, StaticCache

PROMPT, PLACES = 24, 40


def decoded(model: Any, forward: Any, mask: Tensor | None) -> Tensor:
    """The logits of a prompt and of some tokens after it, of which ``forward`` reads the latter."""
    cache, ids = StaticCache(config=model.config, max_cache_len=PLACES), tokens(2, PROMPT + 6)
    options = {CACHE: cache, "use_cache": True, "attention_mask": mask}
    parts = [out(model, ids[:, :PROMPT], **options)]
    for place in range(PROMPT, ids.shape[1]):
        with torch.no_grad():
            parts.append(forward(input_ids=ids[:, place : place + 1], **options)[0])
    return torch.cat(parts, dim=1)


def check_decoding(name: str, min_length: int, padded: bool, **options: Any) -> None:
    model, mask = converted(name, min_length=min_length), None
    if padded:
        mask = torch.ones(2, PLACES, dtype=torch.int64)
        mask[0, :9] = 0
    torch.compiler.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()
    compiled = torch.compile(model.forward, fullgraph=True, **options)
    actual, expected = decoded(model, compiled, mask), decoded(model, model.forward, mask)
    skip = 9 if padded else 0
    near(actual[:, skip:], expected[:, skip:])
    assert graphs["unique_graphs"] <= 2  # and not one for each token


@pytest.mark.parametrize(
    ("min_length", "padded"), [(0, False), (PROMPT + 3, True)], ids=["full", "padded"]
)
def test_decoding_is_one_graph(min_length: int, padded: bool) -> None:
    check_decoding("llama", min_length, padded, backend="eager")


@pytest.mark.slow
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("name", ["gpt2", "qwen2_mixed", "bert_decoder"])
def test_every_family_is_one_graph(name: str, padded: bool) -> None:
    check_decoding(name, PROMPT + 3, padded)  # by Inductor


def test_generate_compiles() -> None:
    """As it does by itself on a GPU; the mask is made before the graph there."""
    model, ids = converted("llama"), tokens(2, PROMPT)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    expected = generated(model, ids, use_cache=False, attention_mask=mask)
    torch.compiler.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()
    options = CompileConfig(fullgraph=True, backend="eager")
    options._compile_all_devices = True
    actual = generated(
        model, ids, cache_implementation="static", attention_mask=mask, compile_config=options
    )
    assert torch.equal(actual, expected)
    assert 1 <= graphs["unique_graphs"] <= 2


@pytest.mark.slow
def test_a_mask_that_is_too_short_is_an_error_in_a_graph() -> None:
    model, mask = converted("llama"), torch.ones(2, PROMPT, dtype=torch.int64)
    torch.compiler.reset()
    compiled = torch.compile(model.forward, fullgraph=True, backend="eager")
    with pytest.raises(RuntimeError, match=r"out of .*bounds"):
        decoded(model, compiled, mask)
