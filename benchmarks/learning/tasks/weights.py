"""The state of a model and its optimizer in checkpoints, wherever ranks hold it.

In a file it is whole, as one process has it. In a folder every rank writes what it holds, by
torch.distributed.checkpoint, and reads what it needs, so that none has to hold all of it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from benchmarks.learning.tasks.config import RunError

State = dict[str, Any]


def gather(model: nn.Module, optimizer: torch.optim.Optimizer) -> State:
    """Their states by name, whole on every rank; all of them must call this."""
    weights = model.state_dict()
    for name, x in weights.items():  # in place, as modules say more beside them
        weights[name] = _whole(x)
    return {"model": weights, "optimizer": tree_map(_whole, optimizer.state_dict())}


def spread(state: State, model: nn.Module) -> None:
    """Gives what :func:`gather` gave, and a file held, the parts that ranks have of the model."""
    parameters = dict(model.named_parameters())
    for name, x in state["model"].items():
        state["model"][name] = _like(x, parameters.get(name))
    by_number = list(parameters.values())
    for number, held in state["optimizer"]["state"].items():
        for name, x in held.items():
            held[name] = _like(x, by_number[number])


def save_parts(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Writes what this rank holds; all of them must call this.

    Raises:
        RunError: a rank could not write.
    """
    from torch.distributed.checkpoint.state_dict_saver import save

    state: State = {"model": model.state_dict()}
    held = optimizer.state_dict()["state"]
    if held:
        names = [name for name, _ in model.named_parameters()]
        state["optimizer"] = {names[number]: values for number, values in held.items()}
    _together(folder, "written", lambda: save(state, checkpoint_id=folder))


def load_parts(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Reads what this rank needs of what any number of them wrote; all of them must call this.

    Raises:
        RunError: it cannot be read.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    state: State = {"model": model.state_dict()}
    if optimizer is not None:
        kept = _together(folder, "read", FileSystemReader(folder).read_metadata)
        held = {}
        for number, (name, parameter) in enumerate(model.named_parameters()):
            # What has had no gradient has none.
            if of_parameter := _empty(kept.state_dict_metadata, f"optimizer.{name}.", parameter):
                state.setdefault("optimizer", {})[name] = held[number] = of_parameter
    _together(folder, "read", lambda: load(state, checkpoint_id=folder))
    model.load_state_dict(state["model"])
    if optimizer is not None:
        optimizer.load_state_dict({**optimizer.state_dict(), "state": held})


def _empty(kept: Mapping[str, Any], prefix: str, parameter: Tensor) -> dict[str, Tensor]:
    """Room for what is kept directly under ``prefix``: numbers, and the like of a parameter."""
    names = (name.removeprefix(prefix) for name in kept if name.startswith(prefix))
    return {
        name: torch.zeros_like(parameter) if kept[prefix + name].size else torch.zeros(())
        for name in names
        if "." not in name
    }


def _whole(x: Any) -> Any:
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def _like(x: Any, parameter: Any) -> Any:
    """A tensor of the size of a parameter, spread as that is."""
    if not hasattr(parameter, "placements") or x.shape != parameter.shape:
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _together(folder: Path, done: str, call: Callable[[], Any]) -> Any:
    """What ``call`` gives; where it fails on one rank, the same error on all of them."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with warnings.catch_warnings():
            # That one process is alone is as it should be.
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            return call()
    except (CheckpointException, OSError) as error:
        failures = error.failures if isinstance(error, CheckpointException) else {0: (error, None)}
        reason = str(next(iter(failures.values()))[0]).partition("\n")[0]
        raise RunError(f"{folder}: cannot be {done} ({reason})") from error
