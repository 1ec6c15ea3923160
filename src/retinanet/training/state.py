"""What a run must remember to go on as if it had never stopped, and how it is kept on disk.

Tensors go to safetensors and the rest to JSON: opening somebody's run executes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from retinanet.errors import WeightsError

_TENSORS = "training.safetensors"
_NUMBERS = "training.json"


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        step: steps done.
        steps: steps in all.
        best_ap: the best validation AP so far; -1: none yet.
        best_step: the step it was reached at.
        bad_validations: validations in a row without a better AP.
        stopped_early: whether the run ended by that.
        left_out: objects and images that training could not use.
        seconds: time spent training, validation included.
        metrics: the last validation's figures.
        best_metrics: those of the best.
    """

    step: int = 0
    steps: int = 0
    best_ap: float = -1.0
    best_step: int = 0
    bad_validations: int = 0
    stopped_early: bool = False
    left_out: int = 0
    seconds: float = 0.0
    metrics: dict[str, Any] = field(default_factory=dict)
    best_metrics: dict[str, Any] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        """Whether nothing is left to train."""
        return self.stopped_early or (self.steps > 0 and self.step >= self.steps)


def save_state(
    folder: Path,
    progress: Progress,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    extras: Mapping[str, Tensor],
    numbers: Mapping[str, Any],
) -> None:
    """Write the training state into an existing folder.

    Args:
        model: the raw weights that the optimiser moves (a checkpoint beside it may hold averages).
        extras: further tensors, such as the averaged weights and the running normaliser.
        numbers: further plain values, such as the loss scale of fp16.
    """
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"extra.{name}": value for name, value in extras.items()}
    tensors["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    packed = optimizer.state_dict()
    scalars: dict[str, Any] = {}
    for index, values in packed["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{name}"] = value
            elif value is not None:
                scalars[f"{index}.{name}"] = value
    # safetensors refuses two names for one memory, and views.
    save_file(
        {name: one.detach().clone().contiguous() for name, one in tensors.items()},
        folder / _TENSORS,
    )
    (folder / _NUMBERS).write_text(
        json.dumps(
            {"progress": asdict(progress), "optimizer": scalars, "numbers": dict(numbers)}, indent=1
        ),
        "utf-8",
    )


def load_state(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[Progress, dict[str, Tensor], dict[str, Any]]:
    """Put a saved state back into `model`, `optimizer` and the random generators.

    Returns:
        The progress, the extra tensors and the extra numbers given to :func:`save_state`.

    Raises:
        WeightsError: a file is missing or damaged, or belongs to another network.
    """
    try:
        tensors = load_file(folder / _TENSORS)
        stored = json.loads((folder / _NUMBERS).read_text("utf-8"))
        progress = Progress(**stored["progress"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(
            f"{folder}: the training state cannot be read ({error}); "
            "delete the run folder to start again, or use its best/ with --init"
        ) from None
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "extra": {}, "random": {}, "optimizer": {}}
    for name, value in tensors.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = value
    try:
        model.load_state_dict(parts["model"])
    except RuntimeError as error:
        raise WeightsError(f"{folder}: the state is of another network: {error}") from None
    state: dict[int, dict[str, Any]] = {}
    for name, value in (parts["optimizer"] | stored["optimizer"]).items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )
    _lay_out_as_weights(optimizer)
    torch.set_rng_state(parts["random"]["cpu"])
    if torch.cuda.is_available() and "cuda" in parts["random"]:
        torch.cuda.set_rng_state(parts["random"]["cuda"])
    return progress, parts["extra"], stored["numbers"]


def _lay_out_as_weights(optimizer: torch.optim.Optimizer) -> None:
    """Give momentum and moments the strides of their weights, which the file does not keep.

    Fused kernels go through both as they lie in memory: on a GPU torch refuses strides that differ,
    on a CPU it mixes up the elements.
    """
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                # Nothing but the layout is the weight's: torch has chosen device and type.
                as_weight = torch.empty_like(parameter, dtype=value.dtype, device=value.device)
                values[name] = as_weight.copy_(value).detach()


def read_progress(folder: Path) -> Progress | None:
    """The progress kept in a ``last/`` folder, or None where there is none."""
    try:
        return Progress(**json.loads((folder / _NUMBERS).read_text("utf-8"))["progress"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(
            f"{folder / _NUMBERS} cannot be read ({error}); delete the run folder to start again"
        ) from None
