"""save and load."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from hf_models import FEW, LENGTH, made, out, tokens
from safetensors.torch import load_file, save_file

from smartbird import hf


def saved(folder: Path, name: str = "llama") -> torch.Tensor:
    """What the model gives whose sketches are then in the folder, which no calibration makes."""
    model = hf.convert(made(name), **FEW, num_sketches="kv")
    for child in model.modules():
        if isinstance(child, hf.SketchedAttention):
            torch.nn.init.normal_(child.q_weight)
    hf.save(model, folder)
    return out(model, tokens(2, LENGTH))


@pytest.mark.parametrize("name", ["llama", "qwen2_mixed", "gpt2", "bert"])
def test_loaded_is_saved(tmp_path: Path, name: str) -> None:
    expected = saved(tmp_path / "new" / "sketch", name)
    model = made(name)
    assert hf.load(model, tmp_path / "new" / "sketch") is model
    assert torch.equal(out(model, tokens(2, LENGTH)), expected)
    assert torch.equal(
        out(hf.load(model, tmp_path / "new" / "sketch"), tokens(2, LENGTH)), expected
    )


def test_only_sketches_are_saved(tmp_path: Path) -> None:
    saved(tmp_path)
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == ["sketches.safetensors", "smartbird.json"]
    assert (tmp_path / "sketches.safetensors").stat().st_size < 4000


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_another_dtype_is_the_same_model(tmp_path: Path, dtype: torch.dtype) -> None:
    saved(tmp_path)
    assert out(hf.load(made("llama").to(dtype), tmp_path), tokens(1, LENGTH)).isfinite().all()


def test_another_model_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    other = made("llama")
    torch.nn.init.normal_(other.model.layers[1].self_attn.k_proj.weight)
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.k_proj\.weight differs"):
        hf.load(other, tmp_path)
    with pytest.raises(ValueError, match=r"model must have model\.layers\.0\.self_attn with"):
        hf.load(made("gpt2"), tmp_path)
    assert other.config._attn_implementation == "sdpa"


def test_offloaded_weights(tmp_path: Path) -> None:
    """As ``device_map`` leaves them where a device is too small."""
    accelerate = pytest.importorskip("accelerate")
    parts = ["embed_tokens", "layers.0", "layers.1", "norm", "rotary_emb"]
    places = {f"model.{part}": "cpu" for part in parts} | {"lm_head": "cpu"}
    places |= {"model.embed_tokens": "disk", "model.layers.1": "disk"}
    options = {"main_device": "cpu", "offload_dir": tmp_path, "force_hooks": True}
    model = hf.convert(accelerate.dispatch_model(made("llama"), places, **options), **FEW)
    ids = tokens(2, LENGTH)
    assert torch.equal(out(model, ids), out(hf.convert(made("llama"), **FEW), ids))
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj\.weight is offloaded"):
        hf.save(model, tmp_path / "sketch")


def test_what_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model must be converted"):
        hf.save(made("llama"), tmp_path)
    with pytest.raises(FileNotFoundError):
        hf.load(made("llama"), tmp_path)
    saved(tmp_path)
    file = tmp_path / "smartbird.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 2}))
    with pytest.raises(ValueError, match="must have format 1, got 2"):
        hf.load(made("llama"), tmp_path)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_save_pretrained_writes_the_model_and_its_sketches_beside_it(
    tmp_path: Path, name: str
) -> None:
    model = made(name)
    ids = tokens(2, LENGTH)
    expected = out(model, ids)
    other = copy.deepcopy(hf.convert(model, **FEW))
    sampled = out(model, ids)
    for number, one in enumerate((model, other, pickle.loads(pickle.dumps(model)))):
        folder = tmp_path / str(number)
        with pytest.warns(UserWarning, match=r"smartbird\.hf\.load brings back the sketches"):
            one.save_pretrained(folder)
        assert "smartbird" not in (folder / "config.json").read_text()
        loaded, info = type(model).from_pretrained(folder, output_loading_info=True)
        assert not info["unexpected_keys"]
        assert not info["missing_keys"]
        assert torch.equal(out(loaded.eval(), ids), expected)
        assert torch.equal(out(hf.load(loaded, folder), ids), sampled)
    hf.revert(other)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.save_pretrained(tmp_path / "reverted")


def test_save_pretrained_of_a_part_says_that_it_has_no_sketches(tmp_path: Path) -> None:
    model = hf.convert(made("llama"), **FEW)
    with pytest.warns(UserWarning, match="the sketches of a part of a model are not written"):
        model.base_model.save_pretrained(tmp_path)
    assert not (tmp_path / "smartbird.json").exists()


def test_save_pretrained_takes_what_the_caller_says(tmp_path: Path) -> None:
    model = hf.convert(made("llama"), **FEW)
    with pytest.warns(UserWarning, match="as a dense model"):
        model.save_pretrained(tmp_path / "other rank", False)
    assert not (tmp_path / "other rank" / "smartbird.json").exists()
    with pytest.raises(ValueError, match="push_to_hub must be False"):
        model.save_pretrained(tmp_path / "hub", push_to_hub=True)
    # As of a model whose parameters are spread over processes.
    gathered = model.state_dict()
    name = "model.layers.0.self_attn.q_proj.weight"
    with pytest.warns(UserWarning, match=f"are not written, as model must hold .* {name} is"):
        model.save_pretrained(
            tmp_path / "spread", state_dict=gathered | {name: gathered[name].new_empty(0)}
        )
    assert not (tmp_path / "spread" / "smartbird.json").exists()
    with pytest.warns(UserWarning, match="brings back the sketches"):
        model.save_pretrained(tmp_path / "gathered", state_dict=gathered)
    hf.load(made("llama"), tmp_path / "gathered")


def test_sketches_of_other_sizes_are_refused(tmp_path: Path) -> None:
    hf.save(hf.convert(made("llama"), **FEW), tmp_path)
    file = tmp_path / "sketches.safetensors"
    tensors = load_file(file)
    first = next(iter(tensors))
    save_file(tensors | {first: tensors[first][..., :2].contiguous()}, file)
    with pytest.raises(ValueError, match="must hold sketches of"):
        hf.load(made("llama"), tmp_path)
