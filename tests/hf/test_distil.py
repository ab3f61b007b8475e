"""distil, and report of a batch."""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import FEW, LENGTH, converted, made, near, tokens
from torch import Tensor

from smartbird import hf

BATCHES = [tokens(2, LENGTH, seed=seed) for seed in range(8)]


def weights(model: Any) -> dict[str, Tensor]:
    return {
        name: x.detach().clone() for name, x in model.named_parameters() if ".smartbird." in name
    }


def means(layers: list[hf.LayerReport]) -> dict[str, float]:
    names = "mass", "error", "loss", "floor"
    return {name: sum(getattr(layer, name) for layer in layers) / len(layers) for name in names}


def equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return all(torch.equal(actual[name], x) for name, x in expected.items())


def blurred(model: Any) -> Any:
    """With sketches that know nothing."""
    torch.manual_seed(5)
    for child in model.modules():
        if isinstance(child, hf.SketchedAttention):
            torch.nn.init.normal_(child.q_weight, std=0.3)
            torch.nn.init.normal_(child.k_weight, std=0.3)
    return model


@pytest.mark.parametrize(
    ("name", "num_sketches", "gain"),
    [
        ("llama", "head", 0.05),
        ("llama", "kv", 0.05),
        ("llama", "layer", 0.03),  # one sketch for all heads holds less
        ("gpt2", "head", 0.05),
        ("bert", "kv", 0.05),
    ],
)
def test_sketches_learn_and_the_model_stays(name: str, num_sketches: str, gain: float) -> None:
    model = blurred(hf.convert(made(name), **FEW, num_sketches=num_sketches)).train()
    before = means(hf.report(model, BATCHES[0]))
    kept = {name: x.detach().clone() for name, x in model.named_parameters()}
    flags = {name: x.requires_grad for name, x in model.named_parameters()}
    learned = weights(model)
    last = hf.distil(model, BATCHES, steps=24, lr=0.05)  # three times all of them
    assert last == hf.report(model, BATCHES[-1])
    after = means(hf.report(model, BATCHES[0]))
    assert after["loss"] - after["floor"] < 0.7 * (before["loss"] - before["floor"])
    assert after["mass"] > before["mass"] + gain
    assert after["error"] < before["error"]
    now = dict(model.named_parameters())
    assert not any(torch.equal(now[name], x) for name, x in learned.items())
    assert equal(now, {name: x for name, x in kept.items() if name not in learned})
    assert {name: x.requires_grad for name, x in model.named_parameters()} == flags
    assert all(x.grad is None for x in model.parameters())
    assert all(x.training for x in model.modules())


@pytest.mark.parametrize("dense_steps", [0, 6])
def test_hidden_states_are_those_of_the_phase(dense_steps: int) -> None:
    """A step of one layer, whose inputs depend on the sketches below it if keys are sampled."""
    learned = []
    for seed in range(2):
        model = hf.convert(made("llama"), **FEW)
        torch.manual_seed(seed)
        torch.nn.init.normal_(model.model.layers[0].self_attn.smartbird.q_weight)
        hf.distil(model, BATCHES, steps=1, dense_steps=dense_steps)
        learned.append(weights(model)["model.layers.1.self_attn.smartbird.q_weight"])
        assert not any(x.attention.dense for x in model.modules() if hasattr(x, "attention"))
    assert torch.equal(*learned) == (dense_steps > 0)


def test_a_terminal_shows_loss_and_mass(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    expected, model = hf.convert(made("llama"), **FEW), hf.convert(made("llama"), **FEW)
    hf.distil(expected, BATCHES, steps=3)
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    state = torch.get_rng_state()
    hf.distil(model, BATCHES, steps=3)
    assert re.search(r"3/3 .*loss=\d\.\d{3}, mass=0\.\d{3}", terminal.getvalue())
    assert torch.equal(torch.get_rng_state(), state)
    assert equal(weights(model), weights(expected))  # who looks changes nothing


# ---- going on -----------------------------------------------------------------------------------


def stopped(after: int) -> Iterator[Tensor]:
    yield from BATCHES[:after]
    raise KeyboardInterrupt


@pytest.mark.parametrize("after", [1, 3])
def test_what_was_stopped_goes_on_to_the_last_bit(tmp_path: Path, after: int) -> None:
    expected = hf.convert(made("llama"), **FEW)
    last = hf.distil(expected, BATCHES, steps=5)
    file = tmp_path / "checkpoint"
    model = hf.convert(made("llama"), **FEW)
    with pytest.raises(KeyboardInterrupt):
        hf.distil(model, stopped(after), steps=5, checkpoint=file)
    assert [one.name for one in tmp_path.iterdir()] == ["checkpoint"]
    for _ in range(2):  # the second time nothing is left to do
        model = hf.convert(made("llama"), **FEW)
        assert hf.distil(model, BATCHES, steps=5, checkpoint=file) == last
        assert equal(weights(model), weights(expected))


@pytest.mark.parametrize("updates", [5, 27])  # of sixteen in a step
def test_a_step_that_was_stopped_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, updates: int
) -> None:
    expected = hf.convert(made("llama"), **FEW)
    hf.distil(expected, BATCHES, steps=4)
    model = hf.convert(made("llama"), **FEW)
    step, calls = torch.optim.Adam.step, []

    def stop(self: Any, *args: Any) -> None:
        calls.append(self)
        step(self, *args)
        if len(calls) == updates:
            raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim.Adam, "step", stop)
    with pytest.raises(KeyboardInterrupt):
        hf.distil(model, BATCHES, steps=4, checkpoint=tmp_path / "checkpoint")
    monkeypatch.undo()
    hf.distil(model, BATCHES, steps=4, checkpoint=tmp_path / "checkpoint")
    assert equal(weights(model), weights(expected))


def test_another_training_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint"
    hf.distil(hf.convert(made("llama"), **FEW), BATCHES, steps=2, checkpoint=file)
    model = hf.convert(made("llama"), **FEW)
    before = weights(model)
    with pytest.raises(ValueError, match=r"checkpoint must be of the same .*lr=0\.01, .*0\.5"):
        hf.distil(model, BATCHES, steps=2, lr=0.5, checkpoint=file)
    torch.nn.init.normal_(model.model.layers[1].self_attn.k_proj.weight)
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.k_proj\.weight differs"):
        hf.distil(model, BATCHES, steps=2, checkpoint=file)
    file.write_bytes(b"something else")
    with pytest.raises(ValueError, match="checkpoint must be a file that distil wrote"):
        hf.distil(model, BATCHES, steps=2, checkpoint=file)
    assert equal(weights(model), before)
    assert not any(x.requires_grad for name, x in model.named_parameters() if name in before)


# ---- what is read -------------------------------------------------------------------------------


def test_small_steps_count_in_half_precision() -> None:
    model = hf.convert(made("llama").bfloat16(), **FEW)
    before = weights(model)
    hf.distil(model, BATCHES, steps=8, lr=5e-4)
    for name, x in weights(model).items():
        assert x.dtype == torch.bfloat16
        # Below 1 bfloat16 takes steps of 4e-3.
        assert (x != before[name])[before[name] == 1].any()


@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("left", [True, False])
def test_padding_changes_nothing(name: str, left: bool) -> None:
    ids = tokens(1, LENGTH)
    mask = torch.nn.functional.pad(torch.ones_like(ids), (9, 0) if left else (0, 9))
    padded = torch.full_like(mask, 3).masked_scatter(mask.bool(), ids)
    # In a model that counts positions from the first token on its own.
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    inputs = {"input_ids": padded, "attention_mask": mask, "position_ids": positions}
    expected, model = converted(name), converted(name)
    hf.distil(expected, [ids], steps=3)
    hf.distil(model, [inputs | {"labels": padded}], steps=3)
    for name, x in weights(model).items():
        near(x, weights(expected)[name])


def test_only_queries_that_sample_teach() -> None:
    model = hf.convert(made("llama"), **(FEW | {"min_length": LENGTH - 1}))
    other = hf.convert(made("llama"), **(FEW | {"min_length": LENGTH - 1}))
    hf.distil(model, [tokens(1, LENGTH)], steps=2, rows=1)
    hf.distil(other, [tokens(1, LENGTH)], steps=2, rows=LENGTH)
    assert equal(weights(model), weights(other))  # there is but one
    hf.convert(model, **(FEW | {"min_length": LENGTH}))
    with pytest.raises(ValueError, match="batches must hold sequences longer than min_length=40"):
        hf.distil(model, [tokens(1, LENGTH)], steps=2)


@pytest.mark.parametrize(
    ("batches", "options", "error", "message"),
    [
        (iter(BATCHES[:2]), {}, ValueError, "batches must hold as many batches as steps"),
        ([], {}, ValueError, "batches must hold as many batches as steps"),
        ([[1, 2]], {}, TypeError, "batch must be an int64 Tensor, got list"),
        (BATCHES, {"steps": 0}, ValueError, "steps"),
        (BATCHES, {"lr": 0.0}, ValueError, "lr"),
        (BATCHES, {"rows": 0}, ValueError, "rows"),
        (BATCHES, {"updates": 0}, ValueError, "updates"),
        (BATCHES, {"dense_steps": -1}, ValueError, "dense_steps"),
        (BATCHES, {"seed": 0.5}, TypeError, "seed"),
    ],
)
def test_bad_arguments(
    batches: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = hf.convert(made("llama"), **FEW)
    with pytest.raises(error, match=message):
        hf.distil(model, batches, **({"steps": 3} | options))
    with pytest.raises(ValueError, match="model must be converted"):
        hf.distil(made("llama"), BATCHES, steps=1)


# ---- report -------------------------------------------------------------------------------------


def test_all_keys_hold_all_mass() -> None:
    for options in ({"num_samples": 64}, {"min_length": 64}):
        layers = hf.report(hf.convert(made("llama"), **(FEW | options)), tokens(2, LENGTH))
        for layer in layers:
            assert layer.mass == pytest.approx(1.0)
            assert layer.error == pytest.approx(0.0, abs=1e-5)


def test_a_report_is_of_what_the_module_computes() -> None:
    model = hf.convert(made("llama"), **FEW)
    seen: list[Tensor] = []

    def look(module: Any, args: tuple[Tensor, ...], keywords: Any, out: Tensor) -> None:
        dense = torch.nn.functional.scaled_dot_product_attention(
            *args[:3], is_causal=True, enable_gqa=True
        )
        seen.append((out.transpose(1, 2) - dense).norm() / dense.norm())

    for layer in model.model.layers:
        layer.self_attn.smartbird.register_forward_hook(look, with_kwargs=True)
    layers = hf.report(model, tokens(2, LENGTH))
    assert [layer.error for layer in layers] == pytest.approx([float(x) for x in seen], rel=1e-4)
    for layer in layers:
        assert layer.mass is not None
        assert 0.3 < layer.mass < 1
        assert f"mass {layer.mass:.3f}, error {layer.error:.3f}" in str(layer)


def test_without_a_batch_nothing_is_measured() -> None:
    model = hf.convert(made("qwen2_mixed"), **FEW)
    assert all(layer.mass is None for layer in hf.report(model))
    first, second = hf.report(model, {"input_ids": tokens(1, LENGTH)})
    assert first.mass is not None
    assert second.mass is None
    assert "dense" in str(second)


def test_what_is_no_training_is_refused(tmp_path: Path) -> None:
    model, ids = hf.convert(made("llama"), **FEW), tokens(1, LENGTH)
    for batches in (ids, {"input_ids": ids}, 3):
        with pytest.raises(TypeError, match="batches must be an iterable of batches, got a"):
            hf.distil(model, batches, steps=1)
    with hf.dense(model), pytest.raises(ValueError, match="model must sample its keys"):
        hf.distil(model, [ids], steps=1)
    file = tmp_path / "new" / "state"
    hf.distil(model, [ids], steps=1, checkpoint=file)
    with zipfile.ZipFile(file, "w") as other:
        other.writestr("a", "b")
    with pytest.raises(ValueError, match="checkpoint must be a file that distil wrote"):
        hf.distil(model, [ids], steps=1, checkpoint=file)
