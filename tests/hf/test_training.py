"""Training converted models: gradients, dropout, checkpointing, precision, graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hf_models import ALL_KEYS, FEW, GQA, LENGTH, T, converted, made, near, out, tokens
from torch import Tensor

from smartbird import SampledAttention, hf


def loss(model: Any, ids: Tensor, use_cache: bool = False) -> Tensor:
    result: Tensor = model(input_ids=ids, labels=ids, use_cache=use_cache).loss
    return result


def gradients(
    model: Any, ids: Tensor, autocast: bool = False, use_cache: bool = False
) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        result = loss(model, ids, use_cache)
    result.backward()
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


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")  # renamed
def test_checkpointing_changes_no_gradient(autocast: bool) -> None:
    model, ids = hf.convert(made("llama"), **FEW).train(), tokens(2, LENGTH)
    expected = gradients(model, ids, autocast)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for use_cache in (False, True):  # a pass that is made again must find no cache
        for name, gradient in gradients(model, ids, autocast, use_cache).items():
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


def test_autocast_rounds_as_dense_attention_does() -> None:
    model, ids = hf.convert(made("llama"), **ALL_KEYS).train(), tokens(2, LENGTH)
    actual = gradients(model, ids, autocast=True)
    with hf.dense(model):
        expected, rounded = gradients(model, ids), gradients(model, ids, autocast=True)
    for name, gradient in actual.items():
        allowed = 2 * (rounded[name] - expected[name]).norm()
        assert (gradient - expected[name]).norm() <= allowed, name


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2_mixed"])
@pytest.mark.parametrize("bounds", [False, True])
def test_a_pack_of_the_collator_is_each_sequence_alone(name: str, bounds: bool) -> None:
    model = converted(name)
    sequences = [tokens(n, seed=n) for n in (40, 3, 31, 2, 17)]
    collator = T.DataCollatorWithFlattening(return_flash_attn_kwargs=bounds)
    pack = collator([{"input_ids": ids} for ids in sequences])
    count = sum(len(ids) - 1 for ids in sequences)
    with torch.no_grad():
        actual = model(**pack, num_items_in_batch=torch.tensor(count), use_cache=False).loss
        alone = [float(loss(model, ids[None])) * (len(ids) - 1) for ids in sequences]
    assert float(actual) == pytest.approx(sum(alone) / count, rel=1e-5)


@pytest.mark.filterwarnings("ignore:from_pretrained loads what save_pretrained writes")
def test_trainer_goes_on_where_it_stopped(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers' Trainer needs it")

    def train(model: Any, steps: int, folder: Path, resume: bool = False) -> dict[str, Tensor]:
        arguments = T.TrainingArguments(
            output_dir=str(folder),
            use_cpu=True,
            bf16=True,
            per_device_train_batch_size=2,
            max_steps=steps,
            save_steps=2,
            lr_scheduler_type="constant",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = T.Trainer(
            model=model,
            args=arguments,
            train_dataset=[{"input_ids": tokens(n, seed=n)} for n in range(10, 26)],
            data_collator=T.DataCollatorWithFlattening(),
        )
        trainer.train(resume_from_checkpoint=resume or None)
        return trainer.model.state_dict()

    expected = train(hf.convert(made("llama"), **FEW), 4, tmp_path / "whole")
    parts = tmp_path / "parts"
    train(hf.convert(made("llama"), **FEW), 2, parts)
    # The sketches come from the checkpoint: another passage would give others.
    written = parts / "checkpoint-2"
    model = hf.load(T.LlamaForCausalLM.from_pretrained(written), written)
    resumed = train(model, 4, parts, resume=True)
    assert resumed.keys() == expected.keys()
    for name, x in resumed.items():
        assert torch.equal(x, expected[name]), name


def test_no_parameter_waits_for_a_gradient() -> None:
    """DistributedDataParallel takes one that does for an error."""
    model = hf.convert(made("llama"), **FEW).train()
    loss(model, tokens(2, LENGTH)).backward()
    assert all(x.grad is not None for x in model.parameters() if x.requires_grad)


def test_distributed(tmp_path: Path) -> None:
    """Twice, as what waits for a gradient is missed in the second pass."""
    model, ids = hf.convert(made("llama"), **ALL_KEYS).train(), tokens(2, LENGTH)
    expected = gradients(model, ids)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        gradients(wrapped, ids)
        actual = gradients(wrapped, ids)
    finally:
        torch.distributed.destroy_process_group()
    for name, gradient in actual.items():
        near(gradient, expected[name.removeprefix("module.")])


@pytest.mark.slow
def test_compiled() -> None:
    model, ids = hf.convert(made("llama"), **FEW), tokens(2, LENGTH)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    compiled = torch.compile(model, backend="aot_eager")
    near(out(compiled, ids, use_cache=False), out(model, ids))
    actual = out(compiled, ids, use_cache=False, attention_mask=mask)
    near(actual[mask.bool()], out(model, ids, attention_mask=mask)[mask.bool()])


def test_context_parallelism_is_refused() -> None:
    model = hf.convert(made("llama"), **FEW)
    for module in model.modules():
        if isinstance(module, SampledAttention):
            module.context = mock.Mock()
    with pytest.raises(ValueError, match="ContextParallel does not serve"):
        model(torch.zeros(1, 9, dtype=torch.int64))
