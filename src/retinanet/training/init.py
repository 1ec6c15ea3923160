"""Start of a training from another detector: its network, its weights, its class rows.

The network follows the checkpoint, so that all of its tensors fit; settings that the user named
stay as named, and the tensors that are lost are counted.
"""

from __future__ import annotations

import json
import tomllib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retinanet.config import AnchorConfig, ModelConfig, Recipe, listed, nearest
from retinanet.errors import ConfigError, WeightsError
from retinanet.files import readable_folder
from retinanet.model.checkpoint import (
    TEXT_FILE,
    Checkpoint,
    TransferReport,
    load_checkpoint,
    transfer_weights,
)
from retinanet.model.retinanet import RetinaNet, to_channels_last
from retinanet.training.events import Emit

MIN_LOADED = 0.9
"""Share of the tensors that fit, under which a start from a checkpoint is an error."""
MIN_LOADED_OF_PART = 0.5
"""The same of the backbone, the pyramid and each head: of a deep backbone alone over .9 fit."""

_OWN = ("backbone_weights", "frozen_stages", "prior")
"""Settings of the network that concern its training, not its tensors or its outputs."""


@dataclass(frozen=True, eq=False)
class Start:
    """A detector to start from."""

    recipe: Recipe
    source: Checkpoint
    taken: str


def follow_checkpoint(recipe: Recipe, run: Path) -> Start | None:
    """Take over the network of ``train.init``; None: the recipe starts from no detector.

    Channels, heads, anchors, levels, backbone, normalization and image size become the
    checkpoint's, unless the recipe states them (:meth:`Recipe.states`); then it states all of them.
    """
    if recipe.train.init is None:
        return None
    last = readable_folder(run / "last")
    source = load_checkpoint(last if (last / TEXT_FILE).is_file() else recipe.train.init)
    given = network_settings(source)
    followed = {key: value for key, value in given.items() if not recipe.states(key)}
    taken = [
        f"{key}={_short(value)} (recipe {_short(recipe.value(key))})"
        for key, value in followed.items()
        if recipe.value(key) not in (value, None)
    ]
    return Start(recipe.override(followed), source, ", ".join(taken))


def network_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the settings, by ``section.key``, that a checkpoint determines."""
    model = checkpoint.model
    values = {
        f"{section}.{key}": getattr(model.spec, key)
        for section, kind in (("model", ModelConfig), ("anchors", AnchorConfig))
        for key in kind.model_fields
        if key not in _OWN
    }
    if model.anchors.sizes == tuple(4.0 * stride for stride in model.strides):
        values["anchors.sizes"] = None  # so that they follow a named P2
    sizes = {"data.image_size": checkpoint.image_size, "data.max_size": checkpoint.max_size}
    return values | sizes


def _short(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_short, value))}]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def build_from(start: Start, recipe: Recipe, classes: Sequence[str], emit: Emit) -> RetinaNet:
    """Build the network of the recipe with the weights of the checkpoint."""
    source, init = start.source, recipe.train.init
    wanted, given = recipe.model_spec, source.model.spec
    if given.backbone != wanted.backbone:
        raise ConfigError(
            f"--init {init} has the backbone {given.backbone}, and model.backbone is "
            f"{wanted.backbone}; leave out --backbone, or give --backbone {given.backbone}"
        )
    model = RetinaNet(len(classes), wanted, norm_eps=given.norm_eps)
    synonyms = {}
    if recipe.train.class_map is not None:
        synonyms = read_class_map(recipe.train.class_map, classes, source.classes)
    report = transfer_weights(model, classes, source, synonyms)
    if start.taken:
        emit("message", message=f"network of {init}: {start.taken}")
    emit("message", message=f"from {init}: {describe_transfer(report, classes)}")
    if not recipe.train.init_partial:
        _check_loaded(report, f"--init {init}")
    return to_channels_last(model)


def describe_transfer(report: TransferReport, classes: Sequence[str]) -> str:
    """Describe in a line the tensors that were loaded and the classes that keep their rows."""
    loaded, lost = _count(report.loaded), _count(report.lost)
    new = [name for name in classes if name not in report.rows]
    text = f"{loaded.total()} of {loaded.total() + lost.total()} tensors loaded"
    if lost:
        text += f" (lost: {_by_part(lost)})"
    if report.rows:
        text += f"; class rows loaded: {listed(report.rows)}"
    return text + (f"; classes without rows there: {listed(new)}" if new else "")


def _count(names: Sequence[str]) -> Counter[str]:
    """Count tensors by part of the network; batch norm's count of batches is not used."""
    return Counter(name.split(".")[0] for name in names if not name.endswith("num_batches_tracked"))


def _by_part(counts: Counter[str]) -> str:
    return ", ".join(f"{count} of {part}" for part, count in counts.items())


def _check_loaded(report: TransferReport, what: str) -> None:
    loaded, lost = _count(report.loaded), _count(report.lost)
    total = loaded.total() + lost.total()
    poor = any(
        loaded[part] < MIN_LOADED_OF_PART * (loaded[part] + count) for part, count in lost.items()
    )
    if poor or loaded.total() < MIN_LOADED * total:
        raise WeightsError(
            f"{what} does not fit the network: {loaded.total()} of {total} tensors can be loaded "
            f"(lost: {_by_part(lost)}); leave out the settings of the network, or give "
            "--init-partial to train those tensors from scratch"
        )


def read_class_map(
    file: str | Path, classes: Sequence[str], source_classes: Sequence[str]
) -> dict[str, str]:
    """Read a TOML or JSON file of ``class of the data = class of the checkpoint``."""
    file = Path(file)
    try:
        text = file.read_text("utf-8")
        values = json.loads(text) if file.suffix.lower() == ".json" else tomllib.loads(text)
    except (OSError, ValueError) as error:
        raise ConfigError(f"class map {file} cannot be read as TOML or JSON: {error}") from None
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values.values()):
        raise ConfigError(f"class map {file} is no table of names: write pedestrian = 'person'")
    for names, known, owner in (
        (values.keys(), classes, "the data"),
        (values.values(), source_classes, "the checkpoint"),
    ):
        for name in names:
            if name not in known:
                raise ConfigError(
                    f"class map {file}: {name!r} is no class of {owner}{nearest(name, known)}"
                )
    return values
