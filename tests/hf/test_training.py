"""Training converted models: gradients, dropout, checkpointing, precision, graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import ALL_KEYS, FEW, GQA, LENGTH, T, made, near, out, tokens
from torch import Tensor

from smartbird import hf


def loss(model: Any, ids: Tensor) -> Tensor:
    result: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return result


def gradients(model: Any, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(0)
    loss(model, ids).backward()
    return {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}


@pytest.mark.parametrize("min_length", [0, 20])
def test_gradients_of_all_keys_are_those_of_dense_attention(min_length: int) -> None:
    model = hf.convert(made("llama"), **(ALL_KEYS | {"min_length": min_length})).train()
    ids = tokens(2, LENGTH)
    actual = gradients(model, ids)
    with hf.dense(model):
        expected = gradients(model, ids)
    assert actual.keys() == expected.keys()
    assert not any("smartbird" in name for name in actual)
    for name, gradient in actual.items():
        near(gradient, expected[name])


def test_checkpointing_changes_no_gradient() -> None:
    model, ids = hf.convert(made("llama"), **FEW).train(), tokens(2, LENGTH)
    expected = gradients(model, ids)
    model.gradient_checkpointing_enable()
    for name, gradient in gradients(model, ids).items():
        near(gradient, expected[name])


def test_training_draws_anew_and_by_the_seed() -> None:
    model, ids = hf.convert(made("llama"), **FEW).train(), tokens(2, LENGTH)
    torch.manual_seed(3)
    first, second = out(model, ids), out(model, ids)
    torch.manual_seed(3)
    assert torch.equal(out(model, ids), first)
    assert not torch.equal(first, second)
    model.eval()
    assert torch.equal(out(model, ids), out(model, ids))


@pytest.mark.parametrize("min_length", [0, LENGTH])
def test_dropout_in_training_only(min_length: int) -> None:
    torch.manual_seed(0)
    model = T.LlamaForCausalLM(T.LlamaConfig(**GQA, attention_dropout=0.5)).eval()
    hf.convert(model, **(ALL_KEYS | {"min_length": min_length}))
    ids = tokens(2, LENGTH)
    expected = out(model, ids)
    model.train()
    assert not torch.allclose(out(model, ids), expected, rtol=1e-2)
    model.eval()
    assert torch.equal(out(model, ids), expected)
    with hf.dense(model):
        near(expected, out(model, ids))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "bert"])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    model = hf.convert(made(name), **ALL_KEYS)
    ids = tokens(2, LENGTH)
    expected = out(model, ids)
    model.to(dtype)
    with hf.dense(model):
        allowed = (out(model, ids) - expected).abs().max()
    actual = out(model, ids)
    assert actual.dtype == dtype
    assert (actual - expected).abs().max() <= 2 * allowed
    hf.convert(model, **FEW)
    assert out(model, ids).isfinite().all()


def test_autocast() -> None:
    model, ids = hf.convert(made("llama"), **FEW), tokens(2, LENGTH)
    with torch.autocast("cpu", torch.bfloat16):
        assert out(model, ids).isfinite().all()
        model.train()
        loss(model, ids).backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.isfinite().all()


def test_data_parallel_training(tmp_path: Path) -> None:
    """The second step fails if a parameter waits for a gradient."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        model, ids = hf.convert(made("llama"), **FEW).train(), tokens(2, LENGTH)
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        for _ in range(2):
            parallel(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    finally:
        torch.distributed.destroy_process_group()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.isfinite().all()


@pytest.mark.slow
def test_compiled() -> None:
    model, ids = hf.convert(made("llama"), **FEW), tokens(2, LENGTH)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    compiled = torch.compile(model, backend="aot_eager")
    near(out(compiled, ids, use_cache=False), out(model, ids))
    actual = out(compiled, ids, use_cache=False, attention_mask=mask)
    near(actual[mask.bool()], out(model, ids, attention_mask=mask)[mask.bool()])
