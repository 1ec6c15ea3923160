"""``retinanet.train``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import Any

from retinanet.config import Recipe, load_recipe
from retinanet.data.dataset import Dataset
from retinanet.data.memory import Reader, from_torch
from retinanet.data.splits import split_word
from retinanet.errors import ConfigError
from retinanet.training.events import EventCallback
from retinanet.training.trainer import Run
from retinanet.training.trainer import train as train_by_recipe


def train(
    data: str | Path | Reader | Mapping[str, Any],
    *,
    out: str | Path,
    recipe: str | Path | Recipe = "quick",
    settings: Iterable[str] = (),
    device: str = "auto",
    init: str | Path | None = None,
    time: float | str | None = None,
    on_event: EventCallback | None = None,
    classes: Sequence[str] | None = None,
) -> Run:
    """Train a RetinaNet on labelled images, or resume a run that was stopped.

    Args:
        data: a folder or file of any format of :mod:`retinanet.data.formats`; a function that
            yields images with their boxes and class names
            (:func:`retinanet.data.memory.read_with`); or splits by name, each a :class:`Dataset` or
            a map-style data set of ``(image, {"boxes", "labels"})``.
        out: the run folder; an unfinished run of the same recipe and data in it is resumed.
        recipe: a name, a TOML file, or a recipe from :func:`retinanet.load_recipe`.
        settings: overrides of the recipe, such as ``"train.lr=0.005"``.
        device: ``auto`` or a torch device.
        init: a detector to start from, whose network is taken over unless `settings` name
            another: ``coco`` (torchvision's, downloaded once), a run, a checkpoint, or a .pth file.
            Classes of the same name keep their rows (``train.class_map`` for other names).
        time: limit of the whole call, in seconds or as text such as ``20min``: the training has as
            many steps as this machine can do in it (``train.time``).
        on_event: callback for progress events.
        classes: names by label of map-style data sets; None: their ``classes``, else numbers.

    Raises:
        ConfigError: an unknown setting or recipe, or `settings` given with a built recipe.
        RetinaNetError: as :func:`retinanet.training.trainer.train`.
    """
    if isinstance(settings, str):
        settings = [settings]
    started = monotonic()
    settings = [*settings, *([] if time is None else [f"train.time={time}"])]
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, settings)
    elif settings:
        raise ConfigError(
            "settings and time cannot override a built recipe; pass them to load_recipe"
        )
    if isinstance(data, Mapping):
        data = {
            split_word(name) or name: part
            if isinstance(part, Dataset)
            else from_torch(part, classes, split=name)
            for name, part in data.items()
        }
    return train_by_recipe(
        recipe, data, out, device=device, init=init, on_event=on_event, started=started
    )
