"""Sketches in files, beside those of the model that they belong to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

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
        ValueError: ``model`` is not converted, or its weights are offloaded or spread over
            processes.
    """
    write(model, path, model.state_dict())


def write(model: nn.Module, path: str | PathLike[str], weights: Mapping[str, Tensor]) -> None:
    """:func:`save` with the weights of ``model`` by name, which the caller may have gathered."""
    settings = {
        "format": FORMAT,
        "settings": record_of(model).settings,
        "base": fingerprints(model, weights),
    }
    tensors = {
        f"{name}.{CHILD}.{part}": _here(weights, f"{name}.{CHILD}.{part}").cpu().contiguous()
        for name, child in children(model)
        for part in child.state_dict()
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
    own = {
        f"{name}.{CHILD}.{part}": tensor
        for name, child in children(model)
        for part, tensor in child.state_dict().items()
    }
    expected, got = ({name: list(x.shape) for name, x in some.items()} for some in (own, tensors))
    if got != expected:
        raise ValueError(f"{folder / WEIGHTS} must hold sketches of {expected}, got {got}")
    for name, tensor in own.items():
        tensor.copy_(tensors[name])
    return model


def fingerprints(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """By which :func:`check_base` knows the converted modules of a model."""
    return {name: _fingerprint(model, name, weights) for name, _ in children(model)}


def _here(weights: Mapping[str, Tensor], name: str) -> Tensor:
    """A whole weight, on whatever device."""
    tensor = weights.get(name)
    if tensor is None or tensor.is_meta or tensor.numel() == 0 or hasattr(tensor, "full_tensor"):
        raise ValueError(
            f"model must hold its weights, but {name} is offloaded, spread over processes or was "
            "never loaded"
        )
    return tensor.detach()


def _fingerprint(model: nn.Module, name: str, weights: Mapping[str, Tensor]) -> dict[str, float]:
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
    for part, _ in module.named_parameters():
        if not part.startswith(f"{CHILD}."):
            values = _here(weights, f"{name}.{part}").flatten()
            values = values[:: -(-values.numel() // SAMPLE)].double().cpu()
            norm = values.norm().clamp(min=torch.finfo(torch.float64).tiny)
            numbers[part] = float(values @ direction[: values.numel()] / norm)
    return numbers


def check_base(model: nn.Module, base: dict[str, dict[str, float]]) -> None:
    """Refuse a model with other numbers."""
    weights = model.state_dict()
    for name, expected in base.items():
        numbers = _fingerprint(model, name, weights)
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
