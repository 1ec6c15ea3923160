"""Tensors in files of other programs: safetensors, torch files and pickles of numpy arrays.

Opening a file runs no code: a pickle may name tensors, arrays and plain values only.
"""

from __future__ import annotations

import pickle
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from retinanet.errors import WeightsError


class TensorFile(NamedTuple):
    """The content of a file.

    Attributes:
        state: tensors by name, without the prefix ``module.``.
        metadata: of a safetensors file.
        meta: other values beside the state dict, as mmdetection's ``meta``.
    """

    state: dict[str, Tensor]
    metadata: Mapping[str, str]
    meta: Mapping[str, Any]


def read_tensors(file: Path, what: str, otherwise: str = "") -> TensorFile:
    """Read a state dict, alone or as ``state_dict`` or ``model`` of a training's file.

    Args:
        file: .safetensors, a torch file, or a pickle of numpy arrays (detectron2's .pkl).
        what: the file in words, for messages.
        otherwise: end of the message where there is no file.

    Raises:
        WeightsError: it cannot be read, holds no state dict, or runs code when it is unpickled.
    """
    if not file.is_file():
        raise WeightsError(f"{what}: there is no such file{otherwise}")
    metadata: dict[str, str] = {}
    try:
        if file.suffix == ".safetensors":
            with safe_open(str(file), framework="pt") as opened:
                metadata = opened.metadata() or {}
                loaded: Any = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        elif file.suffix == ".pkl":
            with file.open("rb") as stream:
                loaded = _ArrayUnpickler(stream, encoding="latin1").load()
        else:
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(_pickle_message(file, what, str(error))) from None
    except (
        OSError, RuntimeError, ValueError, EOFError, TypeError, LookupError, AttributeError,
        SafetensorError,
    ) as error:  # fmt: skip
        raise WeightsError(_no_tensors(what, str(error))) from None
    outer = loaded
    for wrapper in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
    if isinstance(loaded, dict):
        loaded = {
            key: torch.from_numpy(np.array(value)) if isinstance(value, np.ndarray) else value
            for key, value in loaded.items()
        }
    if not isinstance(loaded, dict) or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise WeightsError(f"{what}: no state dict, that is, tensors by name")
    state = {str(key).removeprefix("module."): value for key, value in loaded.items()}
    meta = outer.get("meta") if isinstance(outer.get("meta"), dict) else {}
    return TensorFile(state, metadata, meta)


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"global _codecs.encode to {encoding}")
    return text.encode("latin1")


_ARRAYS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy._core.multiarray", "scalar"): np.float64(0).__reduce__()[0],
    ("numpy._core.numeric", "_frombuffer"): np.empty(0).__reduce_ex__(5)[0],
    ("_codecs", "encode"): _encode,
}
"""All that a pickle of numpy arrays names, in any protocol."""


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickle plain values, containers and numpy arrays."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a part of an array; any other global is an error."""
        found = _ARRAYS.get((module.replace("numpy.core", "numpy._core"), name))
        if found is None:
            raise pickle.UnpicklingError(f"global {module}.{name}")
        return found


def _pickle_message(file: Path, what: str, error: str) -> str:
    found = re.search(r"(?:GLOBAL|global|type|class '?)\s*([\w.]+\.[\w.]+)", error)
    if found is None:
        return _no_tensors(what, error)
    return (
        f"{what} is not opened: unpickling {found[1]} in it may run any code; where you trust "
        f"its origin, save its tensors alone: torch.save(torch.load({str(file)!r}, "
        "weights_only=False)['state_dict'], 'tensors.pth')"
    )


def _no_tensors(what: str, error: str) -> str:
    # torch's first line is on its default of weights_only, whatever is wrong.
    error = error.partition("WeightsUnpickler error:")[2] or error
    line = next(iter(error.strip().splitlines()), "")
    return f"{what}: neither .safetensors nor a torch file of plain tensors: {line}"
