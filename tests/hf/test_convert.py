"""convert, revert, dense and report."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hf_models import (
    ALL_KEYS,
    FAMILIES,
    FEW,
    LENGTH,
    REFUSED,
    VOCABULARY,
    T,
    made,
    made_bart,
    near,
    out,
    tokens,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import smartbird
from smartbird import hf
from smartbird.hf.mask import RowMask, row_mask


def a_mask(length: int) -> RowMask:
    return row_mask(
        batch_size=1, q_length=length, kv_length=length, q_offset=0, attention_mask=None
    )


def sampled(model: Any) -> list[bool]:
    return [layer.sampled for layer in hf.report(model)]


@pytest.mark.parametrize("name", FAMILIES)
def test_all_keys_are_dense_attention(name: str) -> None:
    model = hf.convert(made(name), **ALL_KEYS)
    ids = tokens(3, LENGTH)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    mask[1, 30:] = 0
    actual = out(model, ids, attention_mask=mask)
    with hf.dense(model):
        expected = out(model, ids, attention_mask=mask)
    near(actual[mask.bool()], expected[mask.bool()])
    assert any(sampled(model))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("num_sketches", ["layer", "kv", "head"])
def test_few_keys_are_near_dense_attention_and_not_it(name: str, num_sketches: str) -> None:
    model = hf.convert(made(name), **FEW, num_sketches=num_sketches)
    ids = tokens(2, LENGTH)
    actual = out(model, ids)
    assert actual.isfinite().all()
    with hf.dense(model):
        assert not torch.allclose(actual, out(model, ids), rtol=1e-2)


@pytest.mark.parametrize("name", FAMILIES)
def test_revert_gives_the_model_back(name: str) -> None:
    model = made(name)
    ids, keys, way = tokens(2, LENGTH), list(model.state_dict()), model.config._attn_implementation
    before = out(model, ids)
    assert hf.convert(model, **FEW) is model
    assert list(model.state_dict()) != keys
    assert hf.revert(model) is model
    assert torch.equal(out(model, ids), before)
    assert list(model.state_dict()) == keys
    assert model.config._attn_implementation == way
    assert hf.revert(model) is model
    assert not model._forward_pre_hooks


def test_dense_for_a_while() -> None:
    model = made("llama")
    ids = tokens(2, LENGTH)
    before = out(model, ids)
    hf.convert(model, **FEW)
    after = out(model, ids)
    with hf.dense(model):
        assert torch.equal(out(model, ids), before)
    with pytest.raises(KeyError), hf.dense(model):
        raise KeyError
    assert torch.equal(out(model, ids), after)


def test_twice_is_once() -> None:
    model = hf.convert(made("llama"), **FEW)
    ids = tokens(2, LENGTH)
    before, keys = out(model, ids), list(model.state_dict())
    hf.convert(model, **FEW)
    assert torch.equal(out(model, ids), before)
    assert list(model.state_dict()) == keys
    assert len(model._forward_pre_hooks) == 1


def test_once_more_after_another_attention_was_set() -> None:
    model, ids = hf.convert(made("llama"), **FEW), tokens(2, LENGTH)
    expected = out(model, ids)
    model.set_attn_implementation("sdpa")
    assert not torch.equal(out(model, ids), expected)
    assert torch.equal(out(hf.convert(model, **FEW), ids), expected)


@pytest.fixture
def converted_once(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A converted model of a seed of its own, which is to read no other passage."""
    model = hf.convert(made("llama"), **FEW)
    smartbird.seed_evaluation(model, 7)

    def refuse(*args: Any) -> None:
        raise AssertionError("it reads a passage")

    monkeypatch.setattr("smartbird.hf.conversion._observe", refuse)
    return model


def test_the_same_settings_change_nothing(converted_once: Any) -> None:
    before = list(converted_once.modules())
    assert hf.convert(converted_once, **FEW) is converted_once
    assert list(converted_once.modules()) == before
    with hf.dense(converted_once):
        hf.convert(converted_once, **FEW)
        assert converted_once.config._attn_implementation == "sdpa"
    with pytest.raises(AssertionError, match="it reads a passage"):
        hf.convert(converted_once, **FEW, calibration=tokens(1, LENGTH))


@pytest.mark.parametrize(
    "options",
    [
        {"num_samples": 20},
        {"method": "gumbel"},
        {"correction": False},
        {"window": 4},
        {"min_length": 20},
        {"num_sketches": "kv"},
        {"num_samples": None, "window": None},  # then these are the defaults
    ],
    ids=str,
)
def test_other_settings_take_no_passage(
    converted_once: Any, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """And give what they give a model that is converted by them at first."""
    settings = {name: x for name, x in (FEW | options).items() if x is not None}
    hf.convert(converted_once, **settings)
    monkeypatch.undo()
    model, ids = hf.convert(made("llama"), **settings), tokens(2, LENGTH)
    smartbird.seed_evaluation(model, 7)
    assert torch.equal(out(converted_once, ids), out(model, ids))
    assert str(converted_once) == str(model)


def test_a_conversion_that_fails_changes_nothing() -> None:
    model, ids = hf.convert(made("llama"), **FEW), tokens(2, LENGTH)
    torch.nn.init.normal_(model.model.layers[0].self_attn.smartbird.q_weight)
    before = out(model, ids)
    with pytest.raises(ValueError, match="sketch_dim"):
        hf.convert(model, **(FEW | {"sketch_dim": 3}))
    assert torch.equal(out(model, ids), before)
    assert len(model._forward_pre_hooks) == 1
    assert hf.revert(model).config._attn_implementation == "sdpa"


def test_a_copy_is_converted_and_on_its_own() -> None:
    model, ids = made("llama"), tokens(2, LENGTH)
    before = out(model, ids)
    hf.convert(model, **FEW)
    after = out(model, ids)
    other = copy.deepcopy(model)
    hf.revert(model)
    assert torch.equal(out(other, ids), after)
    assert torch.equal(out(hf.revert(other), ids), before)
    assert not other._forward_pre_hooks


def test_by_default_only_rows_of_more_keys_than_are_drawn_sample() -> None:
    options = {name: value for name, value in FEW.items() if name != "min_length"}
    model, ids = hf.convert(made("llama"), **options), tokens(2, LENGTH)
    assert model.model.layers[0].self_attn.smartbird.min_length == FEW["num_samples"]
    actual = out(model, ids)
    hf.convert(model, **FEW)
    near(actual, out(model, ids))


def test_numbers_of_numpy_are_taken() -> None:
    options = FEW | {"num_samples": np.int64(8), "min_length": np.int64(0), "layers": [np.int64(1)]}
    assert sampled(hf.convert(made("llama"), **options)) == [False, True]


def test_sketches_survive_other_settings_and_not_another_size() -> None:
    model = hf.convert(made("llama"), **FEW)
    child = model.model.layers[0].self_attn.smartbird
    torch.nn.init.constant_(child.q_weight, 0.25)
    hf.convert(model, **(FEW | {"num_samples": 20, "num_sketches": "kv"}))
    child = model.model.layers[0].self_attn.smartbird
    assert child.attention.num_samples == 20
    assert (child.q_weight == 0.25).all()
    hf.convert(model, **(FEW | {"num_sketches": "layer"}))
    child = model.model.layers[0].self_attn.smartbird
    assert not (child.q_weight == 0.25).any()
    torch.nn.init.constant_(child.q_weight, 0.25)
    hf.convert(model, **(FEW | {"num_samples": 20, "num_sketches": "layer"}))
    assert (model.model.layers[0].self_attn.smartbird.q_weight == 0.25).all()
    hf.convert(model, **FEW, calibration=tokens(1, LENGTH))
    assert not (model.model.layers[0].self_attn.smartbird.q_weight == 0.25).all()
    hf.convert(model, **(FEW | {"sketch_dim": 2}))
    assert model.model.layers[0].self_attn.smartbird.q_weight.shape == (4, 8, 2)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("qwen2_mixed", [True, False]), ("modernbert", [True, False]), ("llama", [True, True])],
)
def test_sliding_layers_stay(name: str, expected: list[bool]) -> None:
    model = hf.convert(made(name), **FEW)
    assert sampled(model) == expected
    for layer in hf.report(model):
        assert layer.sampled or "sliding_window" in str(layer)
        assert ("smartbird" in dict(model.get_submodule(layer.name).named_children())) == (
            layer.sampled
        )


def test_cross_attention_stays() -> None:
    model = hf.convert(made_bart(), **ALL_KEYS)
    reasons = {layer.name.rsplit(".", 1)[-1]: layer.reason for layer in hf.report(model)}
    assert sampled(model) == [True, True, False]
    assert reasons["encoder_attn"] == "it attends to another sequence"
    ids, heard = tokens(2, 20), tokens(2, LENGTH, seed=2)
    mask = torch.ones_like(heard)
    mask[1, 30:] = 0
    actual = out(model, heard, attention_mask=mask, decoder_input_ids=ids)
    with hf.dense(model):
        near(actual, out(model, heard, attention_mask=mask, decoder_input_ids=ids))


def test_cross_attention_that_the_passage_did_not_come_by_stays() -> None:
    config = T.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=4, add_cross_attention=True
    )
    torch.manual_seed(0)
    model = hf.convert(T.GPT2LMHeadModel(config).eval(), **ALL_KEYS)
    assert sampled(model) == [True]
    options = {"encoder_hidden_states": torch.randn(2, 9, 32)}
    actual = out(model, tokens(2, LENGTH), **options)
    with hf.dense(model):
        near(actual, out(model, tokens(2, LENGTH), **options))


def test_only_some_layers() -> None:
    model = hf.convert(made("llama"), **FEW, layers=[1])
    assert sampled(model) == [False, True]
    assert "not among the layers" in str(hf.report(model)[0])
    ids = tokens(2, LENGTH)
    mask = torch.ones_like(ids)
    mask[1, 30:] = 0
    hf.convert(model, **ALL_KEYS, layers=[1])
    actual = out(model, ids, attention_mask=mask)
    with hf.dense(model):
        near(actual[mask.bool()], out(model, ids, attention_mask=mask)[mask.bool()])


@pytest.mark.parametrize("name", REFUSED)
def test_nothing_to_convert(name: str) -> None:
    model = made(name)
    way, keys = model.config._attn_implementation, list(model.state_dict())
    with pytest.raises(ValueError, match=REFUSED[name][1]):
        hf.convert(model, **FEW)
    assert model.config._attn_implementation == way
    assert list(model.state_dict()) == keys


def test_eager_models_keep_eager_layers() -> None:
    model = made("qwen2_mixed")
    model.set_attn_implementation("eager")
    hf.convert(model, **ALL_KEYS)
    assert model.config._attn_implementation == "smartbird_eager"
    ids = tokens(2, LENGTH)
    actual = out(model, ids)
    with hf.dense(model):
        assert model.config._attn_implementation == "eager"
        near(actual, out(model, ids))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_samples": 0}, ValueError, "num_samples"),
        ({"num_samples": 2.5}, TypeError, "num_samples"),
        ({"num_samples": 8, "window": 9}, ValueError, "num_samples"),
        ({"num_sketches": "each"}, ValueError, "num_sketches"),
        ({"sketch_dim": 0}, ValueError, "sketch_dim"),
        ({"sketch_dim": 9}, ValueError, "sketch_dim must be at most the head dim, 8, got 9"),
        ({"sketch_dim": 3}, ValueError, "sketch_dim must be even"),
        ({"method": "best"}, ValueError, "method"),
        ({"correction": 1}, TypeError, "correction"),
        ({"window": -1}, ValueError, "window"),
        ({"num_sinks": -1}, ValueError, "num_sinks"),
        ({"min_length": -1}, ValueError, "min_length"),
        ({"layers": ["a"]}, TypeError, "layers"),
        ({"layers": [0, 7]}, ValueError, r"layers must be among \[0, 1\], got \[7\]"),
        ({"layers": []}, ValueError, "not among the layers"),
        ({"calibration": [1, 2]}, TypeError, "calibration must be an int64 Tensor, got list"),
        ({"calibration": torch.zeros(1, 2)}, TypeError, "calibration"),
        ({"calibration": torch.zeros(2, dtype=torch.int64)}, ValueError, r"calibration .* \[2\]"),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    model = made("llama")
    with pytest.raises(error, match=message):
        hf.convert(model, **(FEW | options))
    assert model.config._attn_implementation == "sdpa"
    assert not hasattr(model.model.layers[0].self_attn, "smartbird")


def test_bad_models() -> None:
    with pytest.raises(TypeError, match="model must be a PreTrainedModel, got Linear"):
        hf.convert(torch.nn.Linear(2, 2))  # type: ignore[type-var]
    for call in (hf.report, hf.SketchCache, lambda model: hf.dense(model).__enter__()):
        with pytest.raises(ValueError, match="model must be converted"):
            call(made("llama"))


# ---- what a call may ask ------------------------------------------------------------------------


def test_weights_of_attention_are_refused() -> None:
    for name in ("llama", "gpt2", "bert"):
        model = hf.convert(made(name), **FEW)
        with pytest.raises(ValueError, match="output_attentions must be False"):
            out(model, tokens(1, LENGTH), output_attentions=True)
        with hf.dense(model), pytest.raises(ValueError, match="output_attentions"):
            out(model, tokens(1, LENGTH), output_attentions=True)


def test_unknown_arguments_are_refused() -> None:
    model = hf.convert(made("llama"), **FEW)
    with pytest.raises(ValueError, match=r"does not know the arguments \['softcap'\]"):
        out(model, tokens(1, LENGTH), softcap=30.0)


def test_another_scaling_is_refused() -> None:
    model = hf.convert(made("llama"), **FEW)
    model.model.layers[0].self_attn.scaling = 2.0
    with pytest.raises(ValueError, match="scaling must be"):
        out(model, tokens(1, LENGTH))


@pytest.mark.parametrize("name", ["gemma2", "granite", "gpt2"])
def test_sketches_are_scaled_as_the_heads_are(name: str) -> None:
    children = [x for x in hf.convert(made(name), **FEW).modules() if hasattr(x, "sketch_scale")]
    assert children[-1].scale != 8**-0.5
    assert all(child.sketch_scale == child.scale for child in children)


def test_contradicting_causality_is_refused() -> None:
    model = hf.convert(made("llama"), **FEW)
    module, q, mask = model.model.layers[0].self_attn, torch.zeros(1, 4, 3, 8), a_mask(3)
    attention = ALL_ATTENTION_FUNCTIONS["smartbird"]
    with pytest.raises(ValueError, match="is_causal must be what the mask says, True, got False"):
        attention(module, q, q[:, :2], q[:, :2], mask, is_causal=False)
    assert attention(module, q, q[:, :2], q[:, :2], mask, is_causal=True)[0].shape == (1, 3, 4, 8)


# ---- sketches as parameters ---------------------------------------------------------------------


def test_sketches_are_parameters() -> None:
    model = hf.convert(made("llama"), **FEW)
    name = "model.layers.0.self_attn.smartbird.q_weight"
    assert dict(model.named_parameters())[name].shape == (4, 8, 4)
    other = hf.convert(made("llama"), **FEW)
    torch.nn.init.normal_(dict(other.named_parameters())[name])
    other.load_state_dict(model.state_dict())
    ids = tokens(2, LENGTH)
    assert torch.equal(out(model, ids), out(other, ids))
    assert model.to(torch.bfloat16).get_parameter(name).dtype == torch.bfloat16


def test_evaluation_seed() -> None:
    model = hf.convert(made("llama"), **FEW)
    layers = [x for x in model.modules() if isinstance(x, smartbird.SampledAttention)]
    assert len({layer.eval_seed for layer in layers}) == 2
    ids = tokens(2, LENGTH)
    before = out(model, ids)
    smartbird.seed_evaluation(model, 7)
    after = out(model, ids)
    assert not torch.equal(before, after)
    assert torch.equal(out(model, ids), after)


def test_smartbird_does_not_need_transformers() -> None:
    root = Path(smartbird.__file__).parent
    for file in root.rglob("*.py"):
        if file.parent.name != "hf":
            found = re.search(
                r"^\s*(from|import) (transformers|smartbird\.hf)", file.read_text(), re.M
            )
            assert not found, file


def test_other_settings_and_back_judge_the_same() -> None:
    model, ids = hf.convert(made("llama"), **FEW), tokens(2, LENGTH)
    before = hf.report(model, ids)
    hf.convert(hf.convert(model, **FEW | {"num_samples": 20}), **FEW)
    assert hf.report(model, ids) == before


def test_dense_ends_as_the_block_left_the_model() -> None:
    model = hf.convert(made("llama"), **FEW)
    with hf.dense(model):
        hf.revert(model)
    assert model.config._attn_implementation == "sdpa"

    model, ids = hf.convert(made("llama"), **FEW), tokens(2, LENGTH)
    sampled = out(model, ids)
    with hf.dense(model):
        expected = out(model, ids)
        with pytest.raises(ValueError, match="layers must be among"):
            hf.convert(model, **FEW, layers=[9])
        assert torch.equal(out(model, ids), expected)
    assert torch.equal(out(model, ids), sampled)
    with hf.dense(model):
        hf.convert(model, **FEW, layers=[1])
        assert torch.equal(out(model, ids), expected)
    assert [layer.sampled for layer in hf.report(model)] == [False, True]
    assert not torch.equal(out(model, ids), expected)


def test_a_report_of_a_model_that_is_dense_for_now_is_refused() -> None:
    model = hf.convert(made("llama"), **FEW)
    with hf.dense(model), pytest.raises(ValueError, match="model must sample its keys"):
        hf.report(model, tokens(2, LENGTH))
