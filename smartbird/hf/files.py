"""Sketches in files, beside those of the model that they belong to."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from smartbird.hf.attention import CHILD
from smartbird.hf.conversion import Model, children, convert, record_of

WEIGHTS, SETTINGS = "sketches.safetensors", "smartbird.json"
FORMAT = 1
SAMPLE = 4096  # values of a parameter that its fingerprint looks at
# The number of a parameter is that of a standard normal variable; rounding it to another dtype
# moves it by some thousandths.
TOLERANCE = 0.05


def save(model: nn.Module, path: str | PathLike[str]) -> None:
    """Write the sketches and settings of a converted model, without the model itself.

    Args:
        model: a converted model.
        path: a folder, made if it is missing.

    Raises:
        ValueError: ``model`` is not converted.
    """
    settings = {
        "format": FORMAT,
        "settings": record_of(model).settings,
        "base": fingerprints(model),
    }
    tensors = {
        f"{name}.{part}": tensor.detach().cpu().contiguous()
        for name, child in children(model)
        for part, tensor in child.state_dict().items()
    }
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS)
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")


def load(model: Model, path: str | PathLike[str]) -> Model:
    """Convert a model as the one that :func:`save` wrote was, with its sketches, in place.

    Args:
        model: the same pretrained model, of any dtype, converted or not.
        path: the folder.

    Returns:
        ``model``.

    Raises:
        FileNotFoundError: the folder holds no sketches.
        ValueError: they are of another model, or written by another version.
    """
    folder = Path(path)
    written = json.loads((folder / SETTINGS).read_text())
    if written.get("format") != FORMAT:
        raise ValueError(
            f"{folder / SETTINGS} must have format {FORMAT}, got {written.get('format')}"
        )
    tensors = load_file(folder / WEIGHTS)
    check_base(model, written["base"])
    convert(model, **written["settings"])
    for name, child in children(model):
        own = {part: tensors[f"{name}.{part}"] for part in child.state_dict()}
        child.load_state_dict(own)
    return model


def fingerprints(model: nn.Module) -> dict[str, dict[str, float]]:
    """By which :func:`check_base` knows the converted modules of a model."""
    return {name: _fingerprint(model, name) for name, _ in children(model)}


def _fingerprint(model: nn.Module, name: str) -> dict[str, float]:
    """A number for each parameter of the attention module ``name``, if the model has it.

    A projection of evenly spaced values of it to a fixed direction, over their norm: other dtypes
    change it little, other weights as much as chance does.
    """
    direction = torch.randn(SAMPLE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    numbers: dict[str, float] = {}
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return numbers
    for part, tensor in module.named_parameters():
        if not part.startswith(f"{CHILD}."):
            if tensor.is_meta:
                raise ValueError(
                    f"model must hold its weights, but {name}.{part} is offloaded or was never "
                    "loaded: save and load sketches without offloading"
                )
            values = tensor.detach().flatten()
            values = values[:: -(-values.numel() // SAMPLE)].double().cpu()
            norm = values.norm().clamp(min=torch.finfo(torch.float64).tiny)
            numbers[part] = float(values @ direction[: values.numel()] / norm)
    return numbers


def check_base(model: nn.Module, base: dict[str, dict[str, float]]) -> None:
    """Refuse a model with other numbers."""
    for name, expected in base.items():
        numbers = _fingerprint(model, name)
        if numbers.keys() != expected.keys():
            raise ValueError(
                f"model must have {name} with {sorted(expected)}, as that of the sketches has, "
                f"got {sorted(numbers)}"
            )
        for part, number in expected.items():
            if abs(numbers[part] - number) > TOLERANCE:
                raise ValueError(
                    f"model must be the one that the sketches were made for, but its "
                    f"{name}.{part} differs"
                )
