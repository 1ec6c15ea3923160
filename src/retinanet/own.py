"""Parts of the user in place of the package's: classes and functions by their import path.

Recipes and checkpoints name them as ``module:NAME``. A recipe imports the module; a checkpoint,
which may be a stranger's, imports nothing and calls classes of torch and functions of tensors only,
and a function that builds a network only if the user has named it.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from retinanet.config import is_own
from retinanet.errors import ConfigError
from retinanet.structures import IGNORED, is_readable

IMPORT_VARIABLE = "RETINANET_IMPORT"
"""Environment variable with modules, separated by commas, that a checkpoint may name unimported."""

_named: set[str] = set()
"""Import paths that the user has named in this process: functions among them may build networks."""


def import_own(paths: Mapping[str, str]) -> None:
    """Import the modules of import paths, also from the current folder; pass over other names."""
    for setting, path in paths.items():
        if is_own(path):
            if os.getcwd() not in sys.path:
                sys.path.append(os.getcwd())
            try:
                importlib.import_module(path.partition(":")[0])
            # Of names such as "" and ".net" the others.
            except (ImportError, ValueError, TypeError) as error:
                raise ConfigError(f"{setting} {path!r} cannot be imported: {error}") from None
            if _find(setting, path) is None:
                raise ConfigError(_missing(setting, path, "class or function"))
            _named.add(path)


def build_module(setting: str, path: str, **arguments: Any) -> nn.Module:
    """Build the network of an import path; imports nothing.

    Args:
        setting: for messages.
        path: of a class of ``torch.nn.Module``, or of a function that returns one and that the user
            has named: the text of a checkpoint must not run a function of any module.
        arguments: given by position; the names are for messages.

    Raises:
        ConfigError: there is no such class or function, it takes other arguments, or it returns no
            module.
    """
    found = _find(setting, path)
    is_class = isinstance(found, type) and issubclass(found, nn.Module)
    module, _, name = path.partition(":")
    if not callable(found) or (isinstance(found, type) and not is_class):
        raise ConfigError(_missing(setting, path, "class or function"))
    if not is_class and path not in _named and not _is_listed(module):
        raise ConfigError(
            f"{setting} {path!r} is a function, which a checkpoint does not call by itself: set "
            f"{IMPORT_VARIABLE}={module}, or make it a class of torch.nn.Module"
        )
    try:
        inspect.signature(found).bind(*arguments.values())
    except (TypeError, ValueError) as error:
        call = f"{name}({', '.join(arguments)})"
        raise ConfigError(f"{setting} {path!r} is built as {call}: {error}") from None
    net = found(*arguments.values())
    if not isinstance(net, nn.Module):
        raise ConfigError(f"{setting} {path!r} returned {_describe(net)}: return a torch.nn.Module")
    return net


def find_function(setting: str, path: str) -> Callable[..., Any]:
    """Return the function of an import path, or an instance of its class of ``torch.nn.Module``."""
    found = _find(setting, path)
    if isinstance(found, type) and issubclass(found, nn.Module):
        return _instance(found)  # type: ignore[arg-type]
    # Not of Python's library, which can do more than compute; also not by way of another module.
    if not inspect.isfunction(found) or found.__module__.split(".")[0] in sys.stdlib_module_names:
        raise ConfigError(_missing(setting, path, "function or class"))
    return found


@lru_cache
def _instance(kind: Callable[[], nn.Module]) -> nn.Module:
    return kind()


def _find(setting: str, path: str) -> Any:
    module, _, name = path.partition(":")
    if module not in sys.modules:
        if not _is_listed(module):
            raise ConfigError(
                f"{setting} {path!r}: the module {module} is not imported; import it before, or "
                f"set {IMPORT_VARIABLE}={module} (loading a checkpoint imports nothing by itself)"
            )
        import_own({setting: path})
    found: Any = sys.modules[module]
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def _is_listed(module: str) -> bool:
    return module in os.environ.get(IMPORT_VARIABLE, "").split(",")


def _missing(setting: str, path: str, what: str) -> str:
    module, _, name = path.partition(":")
    return (
        f"{setting} {path!r}: {module} has no {what} {name} of torch.nn.Module; define it at "
        "the top level of a module, so that a checkpoint can name it"
    )


# --- losses and assigners -------------------------------------------------------------------------


def classification_loss(path: str, logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Sum an own classification loss, ``loss(logits, targets)``, over the anchors.

    It takes logits (N, K) and targets (N, K) of 0 and 1, and returns the loss of each logit (N, K)
    or of each anchor (N,), as losses of torch and torchvision with ``reduction="none"``.

    Args:
        path: of the function.
        logits: (B, R, K).
        labels: (B, R) class 0..K-1, BACKGROUND or IGNORED.
        weights: (B,) factors of the images.
    """
    kept = labels.flatten() != IGNORED
    # Before the call: a NaN or Inf of an ignored anchor would reach the gradient.
    flat = logits.flatten(0, 1).to(weights.dtype).where(kept[:, None], 0)
    classes = torch.arange(flat.shape[1], device=labels.device)
    targets = (labels.flatten()[:, None] == classes).to(flat.dtype)
    losses = find_function("loss.classification", path)(flat, targets)
    per_anchor = _per_row("loss.classification", path, losses, flat).where(kept, 0)
    return (per_anchor.view(labels.shape) * weights[:, None]).sum()


def box_loss(path: str, predicted: Tensor, boxes: Tensor) -> Tensor:
    """Compute an own box loss, ``loss(predicted, boxes)`` of boxes (N, 4) in pixels: (N,)."""
    losses = find_function("loss.box", path)(predicted, boxes)
    return _per_row("loss.box", path, losses, predicted)


def _per_row(setting: str, path: str, losses: Any, like: Tensor) -> Tensor:
    shapes = (tuple(like.shape), tuple(like.shape[:1]))
    if not isinstance(losses, Tensor) or tuple(losses.shape) not in shapes:
        raise ConfigError(
            f"{setting} {path!r} returned {_describe(losses)} for {shapes[0]}: return a loss per "
            "row or per element (reduction='none' in torch)"
        )
    return losses if losses.ndim == 1 else losses.sum(dim=1)


def match(path: str, anchors: Tensor, targets: Any, outputs: Any) -> Tensor:
    """Match anchors by an own assigner, ``assign(anchors, targets, outputs)``.

    It takes anchors (R, 4), :class:`retinanet.Targets` and :class:`retinanet.Outputs`, and returns
    integers (B, R): the index of an anchor's object, BACKGROUND (-1) or IGNORED (-2).
    """
    matches = find_function("matching.assignment", path)(anchors, targets, outputs)
    shape, limit = (len(targets.boxes), len(anchors)), targets.boxes.shape[1]
    wrong = (
        not isinstance(matches, Tensor)
        or tuple(matches.shape) != shape
        or matches.is_floating_point()
        or (is_readable(matches) and not -2 <= matches.min() <= matches.max() < limit)
    )
    if wrong:
        raise ConfigError(
            f"matching.assignment {path!r} returned {_describe(matches)}: return integers {shape}, "
            f"the index 0..{limit - 1} of each anchor's object, -1 for background, -2 for ignored"
        )
    result: Tensor = matches.long()
    return result


def _describe(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    ends = f" of {value.min():g} to {value.max():g}" if is_readable(value) else ""
    return f"{value.dtype} {tuple(value.shape)}{ends}"
